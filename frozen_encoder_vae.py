"""Who needs an encoder? VAEs whose encoders are trained, half frozen, or frozen at random.

Reproduces M. IJzer, "Who Needs an Encoder? Evaluating the Use of Random Latent
Representations in Variational Autoencoders" (2021), on MNIST: encoders L (learnable), PNL
(all but the last layer frozen), NL (frozen), RKS (random kitchen sinks: one frozen layer),
fully connected or convolutional, under a normal prior or a RealNVP of 2 or 6 flows u = f(z):

    loss = RE - RT,   RE = sum over pixels (x - x_hat)^2,   z ~ q(z|x) = N(mu, sigma^2)
    RT = mean over dimensions (log N(u; 0, 1) - log q(z|x)) + log |det df/dz|

    python frozen_encoder_vae.py         24 models, 2 seeds: about 20 minutes on 2 CPU cores
    python frozen_encoder_vae.py --objective corrected --out out/corrected    the true bound
    python frozen_encoder_vae.py --dataset svhn --preset paper --epochs 500 --out out/svhn

A run leaves figures, tables, logs and nets (units/*.pt) in its folder. Our choices:
* RT's mean beside a whole determinant is what the document's figures turn out to be; with
  a sum in both places ("corrected") -loss is, but for a constant, a bound of log p(x)
  with p(x|z) = N(x_hat, 1/2).
* Flows have 64 hidden units under fc, 128 under conv (Table 5.6; the text says 64), Tanh at
  the end of s and t, and swap the halves by reversing z. E log q is in closed form.
* A frozen encoder's decoder does not depend on the prior: one is trained for all three.
* Quick has two fifths of the images, in batches of 64 for 256; 1,900 steps.
* RKS under conv is a 16x16 convolution of stride 16; the document gives no kernel.
* "distance" is Fréchet's to test images, in the features of a LeNet that was trained on
  others; not the FID, which --fid adds. A gap is positive where test images come out worse.
"""
import math
import pathlib
import time
from typing import NamedTuple

import common  # before torch: from here on Ctrl-C is one line
import torch
import torch.nn.functional as F
from torch import nn

# B batch, C colours, D latent dimensions, M latent features at a place, N images, K flows,
# S repeats, P priors
PRESETS = {
    "smoke": dict(dataset="glyphs", train_images=300, test_images=200, epochs=2, batch=256,
                  seeds=1, samples=100, judge_steps=15, log_p_images=4, log_p_steps=1, rounds=1,
                  timed_steps=1),
    "quick": dict(train_images=10_000, test_images=10_000, epochs=12, batch=64, seeds=2,
                  samples=5000, judge_steps=1000, log_p_images=25, log_p_steps=50, rounds=5,
                  timed_steps=8),
    "paper": dict(train_images=25_000, test_images=60_000, epochs=250, batch=256, seeds=5,
                  samples=10_000, judge_steps=3000, log_p_images=500, log_p_steps=50,
                  rounds=5, timed_steps=20)}
ENCODERS, LAYERS = ["L", "PNL", "NL", "RKS"], ["fc", "conv"]
PRIORS = {"normal": 0, "flow2": 2, "flow6": 6}  # flows K
FROZEN = ["NL", "RKS", "PCA"]
LEARNING_RATE = 1e-3       # Table 4.1
BATCH = 256                # of the judge, and where seconds are measured
VARIANCE = 1e-6            # of q(z|x), where an encoder is frozen; Table 4.1
EPOCH = 25_000             # images; Table 5.5
ALPHA, PERMUTATIONS = 0.01, 4999  # section 4.5
SURE = 0.9                 # the judge's confidence in a digit that can be read
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")


class Model(NamedTuple):
    """What is trained at once: an encoder and a decoder under these priors."""
    layers: str
    encoder: str
    priors: tuple
    standardised: bool = False  # are the frozen codes' means 0 and deviations 1?

    def __str__(self):
        name = f"{self.layers}-{self.encoder}"
        if self.standardised:
            return f"{name}-standardised"
        if self.priors == tuple(PRIORS):
            return name
        return "-".join([name, *self.priors])


# --- data -------------------------------------------------------------------------------

def load_data(dataset, train, n, folder, device):
    """x (N, C, 32, 32) in [0, 1], labels y (N,); n: how many digits to draw, of glyphs.

    The document divides the training part; the other one is the judge's.
    """
    if dataset == "glyphs":
        x, y = common.glyphs(n, int(train))
    elif dataset == "glyphs-rgb":
        x, y = common.glyphs(n, int(train), channels=3)
    else:
        x, y = common.images(dataset, train, folder)
    mode = "constant"
    if x.shape[1] == 3:
        mode = "replicate"  # a coloured ground goes on to the edge
    edge = (32 - x.shape[3]) // 2
    x = F.pad(x, [edge] * 4, mode).to(device, memory_format=torch.channels_last)
    return x, y.to(device)


def split(x, train_images, test_images, seed):
    """A repeat's own training and test images; those for validation stay unused."""
    order = torch.randperm(len(x), generator=common.generator(seed, "split")).to(x.device)
    test = order[train_images * 7 // 5:]  # 25,000, 10,000 and the rest: Table 4.1
    return x[order[:train_images]], x[test[:test_images]]


# --- model ------------------------------------------------------------------------------

class Encoder(nn.Module):
    """x (B, C, 32, 32) to mu and logvar (B, D), in two steps, since what the frozen layers
    make of an image never changes: h = frozen(x), and the rest of it of h."""

    def __init__(self, kind, layers, C, M):
        super().__init__()
        self.kind = kind
        outputs = M
        if kind in ("L", "PNL"):
            outputs = 2 * M  # mean and log variance: N = 2 in Appendix B
        if kind in ("RKS", "PCA") and layers == "fc":  # one layer, no activation
            self.body, self.last = nn.Flatten(), nn.Linear(1024 * C, outputs)
        elif kind in ("RKS", "PCA"):
            self.body, self.last = nn.Identity(), nn.Conv2d(C, outputs, 16, stride=16)
        elif layers == "fc":  # Table B.1
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(1024 * C, 256), nn.LeakyReLU(),
                nn.Linear(256, 128), nn.LeakyReLU(), nn.Linear(128, 64), nn.LeakyReLU())
            self.last = nn.Linear(64, outputs)
        else:  # Table B.2
            self.body = nn.Sequential(
                nn.Conv2d(C, 4, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2),  # 16x16
                nn.Conv2d(4, 8, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2),  # 8x8
                nn.Conv2d(8, 16, 3, padding=1), nn.LeakyReLU(), nn.MaxPool2d(2))  # 4x4
            self.last = nn.Conv2d(16, outputs, 3)  # (B, outputs, 2, 2)
        self.register_buffer("shift", torch.zeros(1))
        self.register_buffer("scale", torch.ones(1))

    def frozen(self, x):
        if self.kind == "L":
            return x
        h = self.body(x)
        if self.kind == "PNL":
            return h
        return (self.last(h).flatten(1) - self.shift) / self.scale  # (B, D)

    def forward(self, h):
        if self.kind == "L":
            h = self.body(h)
        if self.kind in ("L", "PNL"):
            mu, logvar = self.last(h).chunk(2, 1)  # conv: (B, M, 2, 2)
            return mu.flatten(1), logvar.flatten(1)
        return h, torch.full_like(h, math.log(VARIANCE))


def Decoder(layers, C, M):
    """z (B, D) to x_hat (B, C, 32, 32)."""
    if layers == "fc":  # Table B.1
        return nn.Sequential(
            nn.Linear(M, 128), nn.LeakyReLU(), nn.Linear(128, 256), nn.LeakyReLU(),
            nn.Linear(256, 512), nn.LeakyReLU(), nn.Linear(512, 1024), nn.LeakyReLU(),
            nn.Linear(1024, 1024 * C), nn.Unflatten(1, (C, 32, 32)))
    return nn.Sequential(  # Table B.2
        nn.Unflatten(1, (M, 2, 2)),
        nn.Conv2d(M, 64, 3, padding=1), nn.LeakyReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 32, 3, padding=1), nn.LeakyReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(32, 16, 3, padding=1), nn.LeakyReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 8, 3, padding=1), nn.LeakyReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(8, C, 3, padding=1))


class Flow(nn.Module):
    """RealNVP of K couplings (0: the normal prior): z (B, D) to u = f(z) ~ N(0, 1)."""

    def __init__(self, D, hidden, K):
        super().__init__()
        self.s, self.t = nn.ModuleList(), nn.ModuleList()
        for _ in range(K):
            for nets in (self.s, self.t):
                nets.append(nn.Sequential(
                    nn.Linear(D // 2, hidden), nn.LeakyReLU(),
                    nn.Linear(hidden, hidden), nn.LeakyReLU(),
                    nn.Linear(hidden, D // 2), nn.Tanh()))  # section 4.2: on both

    def forward(self, z):
        """u (B, D) and log |det du/dz| (B,)."""
        logdet = torch.zeros_like(z[:, 0])
        for s, t in zip(self.s, self.t):
            a, b = z.chunk(2, 1)  # (B, D/2) each
            scale = s(a)  # in (-1, 1): a flow adds less than D/2 to log |det|
            b = scale.exp() * b + t(a)  # Eq. (2.2.2)
            z = torch.cat([a, b], 1).flip(1)  # the permutation layer: |det| = 1
            logdet = logdet + scale.sum(1)  # Eq. (A.2.3)
        return z, logdet

    def inverse(self, u):
        for s, t in zip(reversed(self.s), reversed(self.t)):  # the last flow first
            a, b = u.flip(1).chunk(2, 1)
            b = (b - t(a)) * (-s(a)).exp()  # Eq. (2.2.4)
            u = torch.cat([a, b], 1)
        return u


class VAE(nn.Module):
    """Encoder and decoder under one prior; where the encoder is frozen, under several."""

    def __init__(self, encoder, decoder, priors):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.priors = nn.ModuleDict(priors)

    def forward(self, h, eps):
        """h = encoder.frozen(x) and standard normal eps (B, D) to x_hat, z, logvar."""
        mu, logvar = self.encoder(h)
        z = mu + (0.5 * logvar).exp() * eps  # section 2.1's reparameterisation
        return self.decoder(z), z, logvar


def latent_size(channels):
    return 16 * (1 + channels // 3)  # section 4.2: 32 of three colours


def build(layers, kind, priors, channels, seed):
    """The untrained VAE of Appendix B; of a seed, it starts alike under all priors."""
    D, hidden = latent_size(channels), 64
    M = D
    if layers == "conv":
        M, hidden = D // 4, 128  # M features at each of 2x2 places
    common.seed_weights(seed, f"net {layers}")
    decoder, encoder = Decoder(layers, channels, M), Encoder(kind, layers, channels, M)
    for part in [*decoder.modules(), *encoder.modules()]:
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight)  # section 4.6; biases, flows: PyTorch's
    flows = {prior: Flow(D, hidden, PRIORS[prior]) for prior in priors}
    if kind == "PNL":
        encoder.body.requires_grad_(False)
    if kind in FROZEN:
        encoder.requires_grad_(False)
    return VAE(encoder, decoder, flows).to(memory_format=torch.channels_last)


def document_count(vae):
    """What Table 5.6 prints: the sum over trainable tensors of the sum of their shape."""
    return sum(sum(p.shape) for p in vae.parameters() if p.requires_grad)


def set_components(encoder, x):
    """RKS's layer with the principal components of x in place of random weights."""
    patches = x
    if isinstance(encoder.last, nn.Conv2d):
        patches = x.unfold(2, 16, 16).unfold(3, 16, 16)  # (N, C, 2, 2, 16, 16)
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    flat = patches.flatten(1)
    _, vectors = torch.linalg.eigh(torch.cov(flat.T.cpu().double()))  # ascending
    weight = encoder.last.weight
    weight.copy_(vectors.T[-len(weight):].view_as(weight))


def standardise(encoder, x):
    h = frozen_features(encoder, x)
    encoder.shift, encoder.scale = h.mean(0), h.std(0)


def Judge(channels):
    """LeNet-5 with ReLUs, a classifier of real digits; its last layer sees 84 features."""
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),  # (B, 6, 14, 14)
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),  # (B, 16, 5, 5)
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
        nn.Linear(84, 10))


# --- objective --------------------------------------------------------------------------

def reconstruction_error(x_hat, x):
    """RE, the squared error summed over an image. (B, C, H, W) -> (B,)"""
    return ((x_hat - x) ** 2).flatten(1).sum(1)  # section 4.3 says mean: Table 5.3 is a sum


def regularisation_term(prior, z, logvar, objective):
    """RT in nats (B,), high is good: z ~ q(z|x) of variance exp(logvar), under a prior."""
    u, logdet = prior(z)
    RT = (1 + logvar - u ** 2) / 2  # log N(u; 0, 1) - E log q: both log 2 pi cancel
    if objective == "as-published":
        return RT.mean(1) + logdet
    return RT.sum(1) + logdet  # Eq. (4.3.2)


def loss_terms(vae, h, x, eps, objective):
    """RE and the RT of each prior, (B,) each; the loss is the mean of RE - sum of RT.

    Of a frozen encoder's z no gradient flows on: decoder and priors learn apart.
    """
    x_hat, z, logvar = vae(h, eps)
    terms = [reconstruction_error(x_hat, x)]
    for prior in vae.priors.values():
        terms.append(regularisation_term(prior, z, logvar, objective))
    return terms


# --- train ------------------------------------------------------------------------------

@torch.no_grad()
def frozen_features(encoder, x):
    if encoder.kind == "L":
        return x
    return torch.cat([encoder.frozen(part) for part in x.split(1000)])


def descend(vae, optimiser, h, x, eps, objective):
    """One step on a batch; the means of RE and RT before it. (1 + P,)"""
    terms = loss_terms(vae, h, x, eps, objective)
    means = torch.stack([term.mean() for term in terms])
    loss = means[0] - means[1:].sum()  # the negative ELBO, section 4.3
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    return means.detach()


def adam(vae):
    weights = [p for p in vae.parameters() if p.requires_grad]
    return torch.optim.Adam(weights, LEARNING_RATE, fused=True)


def train(name, vae, x, objective, epochs, batch, g):
    """Adam on shuffled batches of x (N, C, 32, 32); log of RE and RT (epochs, 1 + P)."""
    device, D = x.device, latent_size(x.shape[1])
    h = frozen_features(vae.encoder, x)
    batches = math.ceil(len(x) / batch)
    steps, terms = epochs * batches, ["RE", *vae.priors]
    optimiser = adam(vae)
    log = torch.zeros(steps, len(terms), device=device)
    order = torch.zeros(len(x), dtype=torch.long, device=device)
    for step in common.steps(name, steps, log, terms, vae, optimiser, g, order):
        place = step % batches * batch
        if place == 0:
            order.copy_(torch.randperm(len(x), generator=g, device=device))
        i = order[place:place + batch]
        eps = torch.randn(len(i), D, generator=g, device=device)
        log[step] = descend(vae, optimiser, h[i], x[i], eps, objective)
    return log.view(epochs, batches, len(terms)).mean(1)


def make(model, seed, x):
    """The untrained VAE of a model, its encoder fitted to the training images x, if so."""
    vae = build(*model[:2], model.priors, x.shape[1], seed).to(x.device)
    with torch.no_grad():
        if model.encoder == "PCA":
            set_components(vae.encoder, x)
        if model.standardised:
            standardise(vae.encoder, x)
    return vae


def load_vae(model, seed, x, weights):
    vae = make(model, seed, x)
    vae.load_state_dict(weights)
    return vae.to(x.device)


def train_unit(unit, model, seed, x, objective, epochs, batch):
    """A work unit: weights and log; a seed's models see equal batches and noise."""
    vae = make(model, seed, x)
    g = common.generator(seed, "batches", x.device)
    log = train(unit, vae, x, objective, epochs, batch, g)
    return {"weights": vae.state_dict(), "log": log}


def train_judge(judge, x, y, steps, g):
    """Cross-entropy on the labelled digits; Adam's rate falls to 0."""
    optimiser = torch.optim.Adam(judge.parameters(), fused=True)
    log = torch.zeros(steps, 1, device=x.device)
    for step in common.steps("judge", steps, log, ["loss"], judge, optimiser, g):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        i = torch.randint(len(x), (BATCH,), generator=g, device=x.device)
        loss = F.cross_entropy(judge(x[i]), y[i])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        log[step] = loss.detach()
    return {"weights": judge.state_dict()}


def time_epochs(cells, x, rounds, steps):
    """Seconds (rounds,) of an epoch of each of cells (layers, prior, encoder), in turn.

    As the document does it: the frozen layers, too, are gone through in each step.
    """
    seconds = {cell: [] for cell in cells}
    g, D = common.generator(0, "time", x.device), latent_size(x.shape[1])
    for _ in range(rounds):
        for layers, prior, encoder in cells:
            vae = build(layers, encoder, [prior], x.shape[1], 0).to(x.device)
            optimiser = adam(vae)
            for step in range(steps + 1):
                i = torch.randint(len(x), (BATCH,), generator=g, device=x.device)
                eps = torch.randn(BATCH, D, generator=g, device=x.device)
                h = vae.encoder.frozen(x[i])
                means = descend(vae, optimiser, h, x[i], eps, "as-published")
                if step == 0:  # the first one warms up
                    means.tolist()  # waits for the device
                    start = time.perf_counter()
            means.tolist()
            elapsed = time.perf_counter() - start
            seconds[layers, prior, encoder].append(elapsed / steps * EPOCH / BATCH)
    return seconds


# --- evaluate ---------------------------------------------------------------------------

@torch.no_grad()
def evaluate(vae, x, objective, g):
    """RE and RT of each prior, means over images x (N, C, 32, 32) of one drawn z each."""
    sums = 0
    for part in x.split(1000):
        eps = torch.randn(len(part), latent_size(x.shape[1]), generator=g, device=x.device)
        terms = loss_terms(vae, vae.encoder.frozen(part), part, eps, objective)
        sums = sums + torch.stack([term.double().sum().cpu() for term in terms])
    return (sums / len(x)).tolist()


def codes_of(encoder, x):
    """The means of q(z|x), (N, D)."""
    means = []
    for part in x.split(1000):
        mu, _ = encoder(encoder.frozen(part))
        means.append(mu)
    return torch.cat(means)


def decode(decoder, z):
    """Images of codes (n, D), clipped to [0, 1]."""
    return torch.cat([decoder(part) for part in z.split(1000)]).clamp(0, 1)


def gaussian_codes(z, n, g):
    """n codes of the Gaussian fitted to codes z (N, D): chapter 6's ex-post density."""
    covariance = torch.cov(z.T.cpu().double())
    tiny = 1e-12 * torch.eye(len(covariance), dtype=torch.double)
    root = torch.linalg.cholesky(covariance + tiny)
    noise = torch.randn(n, len(root), generator=g, device=g.device)
    return z.mean(0) + noise @ root.T.to(z)


def interpolate(decoder, a, b):
    """Straight lines in latent space between codes a and b (n, D). (n, 7, C, 32, 32)"""
    t = torch.linspace(0, 1, 7, device=a.device)[:, None]  # six steps: Table 5.9
    z = (1 - t) * a[:, None] + t * b[:, None]  # (n, 7, D)
    return decode(decoder, z.flatten(0, 1)).unflatten(0, (len(a), 7))


def constant(x):
    """-log p(x|z) - RE in nats of p(x|z) = N(x_hat, 1/2)."""
    return x[0].numel() / 2 * math.log(math.pi)


def log_likelihood(decoder, prior, mu, x, steps, g, rate=0.1):
    """log p(x) in nats (N,), p(x|z) = N(x_hat, 1/2), by importance sampling.

    It is too low on average, the less so, the better the proposals: a Gaussian with full
    covariance for each image, which begins at its code mu (N, D) with a tenth of the codes'
    deviation and climbs the same bound until that stops rising from one block of steps to
    the next, at smaller and smaller rates.
    """
    N, D = mu.shape
    unit = mu.std(0).clamp(min=1e-6)  # of lengths: codes differ in scale by a hundredfold
    mean = torch.zeros(N, D, device=x.device, requires_grad=True)
    log_width = torch.full_like(mean, math.log(0.1), requires_grad=True)
    slant = torch.zeros(N, D, D, device=x.device, requires_grad=True)

    def log_weight():
        """log p(x, z) - log r(z) of one z drawn from each proposal r. (N,)"""
        eps = torch.randn(N, D, generator=g, device=x.device)
        root = slant.tril(-1) + log_width.exp().diag_embed()  # (N, D, D)
        z = mu + unit * (mean + (root @ eps[:, :, None])[:, :, 0])
        u, logdet = prior(z)
        RE = reconstruction_error(decoder(z), x)
        volume = (log_width + unit.log()).sum(1)  # log |det| of eps to z
        return logdet - RE - constant(x) + ((eps ** 2 - u ** 2) / 2).sum(1) + volume

    optimiser = torch.optim.Adam([mean, log_width, slant], rate)
    best = -math.inf
    while rate > 0.005:
        optimiser.param_groups[0]["lr"] = rate
        total = 0
        for _ in range(steps):
            bound = log_weight().mean()
            optimiser.zero_grad()
            (-N * bound).backward()  # each image's proposal has a gradient of its own
            optimiser.step()
            total = total + bound.detach()
        if total / steps < best + 0.05:
            rate = rate / 2
        best = max(best, total.item() / steps)
    with torch.no_grad():
        weights = torch.stack([log_weight() for _ in range(20 * steps)])
    return weights.logsumexp(0) - math.log(20 * steps)  # (N,)


def moments(features):
    """Mean (d,) and covariance (d, d) of features (n, d), in float64."""
    features = features.cpu().double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a, A, mean_b, B):
    """Squared Fréchet distance of the Gaussians N(mean_a, A) and N(mean_b, B), in float64."""
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2)
    # tr (A B)^(1/2) by a symmetric matrix with the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    distance = ((mean_a - mean_b) ** 2).sum() + A.trace() + B.trace() - 2 * cross
    return distance.clamp(min=0).item()  # equal ones may round below 0


def judged(judge, x, real):
    """What the judge sees in images x (n, C, 32, 32), beside real: its moments of others.

    read: the share in which it is sure of a digit; balance: the entropy of its classes
    (1: ten equal shares); variation: the images' variance, summed over pixels.
    """
    features = torch.cat([judge[:-1](part) for part in x.split(1000)])  # (n, 84)
    p = judge[-1](features).softmax(1)  # (n, 10)
    share = p.argmax(1).cpu().bincount(minlength=10).double() / len(x)
    mean, covariance = moments(features)
    return {"distance": frechet_distance(mean, covariance, *real),
            "read": (p.amax(1) >= SURE).double().mean().item(),
            "balance": torch.special.entr(share).sum().item() / math.log(10),
            "variation": x.var(0).sum().item()}


def inception(device):
    """The net of the standard FID: (B, 3, 299, 299) in [-1, 1] -> (B, 2048) features."""
    from torchvision.models import inception_v3
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", INCEPTION.rpartition("/")[2])
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path), "6726825d", progress=False)
        net.load_state_dict(torch.load(path, weights_only=True))
    except Exception as error:  # no network, a cut file, another net: many kinds
        why = " ".join(str(error).split())[:100]
        common.die(f"argument --fid: cannot load {path} ({why}): put {INCEPTION} there, or "
                   "leave --fid away")
    for block in net.children():
        if hasattr(block, "branch_pool"):
            block.branch_pool.register_forward_pre_hook(unpadded_average)
    last = net.Mixed_7c  # takes maxima in their place
    last.register_forward_pre_hook(lambda block, x: setattr(block, "seen", x[0]))
    last.branch_pool.register_forward_pre_hook(lambda *_: F.max_pool2d(last.seen, 3, 1, 1))
    net.fc = nn.Identity()  # leaves the 2048 pooled features
    return net.requires_grad_(False).eval().to(device)


def unpadded_average(_, averages):
    """TensorFlow's averages leave the padding out."""
    return averages[0] / F.avg_pool2d(torch.ones_like(averages[0]), 3, 1, 1)


def fid_moments(net, x):
    """Moments of the Inception features of x (n, C, H, W) in [0, 1], read as 8-bit files."""
    features = []
    for part in x.split(100):
        part = ((part * 255).round() / 255).expand(-1, 3, -1, -1)
        part = F.interpolate(part, (299, 299), mode="bilinear", align_corners=False)
        features.append(net(2 * part - 1))
    return moments(torch.cat(features))


@torch.no_grad()
def score_unit(vae, seed, x, x_test, judge, net, real, args, first):
    """A work unit: {prior: measures and pictures}, and what the codes are like.

    first: the first repeat, which is enough for log p(x). net: Inception or None.
    """
    def new(name):
        return common.generator(seed, name, x.device)

    vae.requires_grad_(False)
    terms = evaluate(vae, x_test, args.objective, new("test"))
    z = codes_of(vae.encoder, x)
    eight = torch.stack([x_test[:8], decode(vae.decoder, codes_of(vae.encoder, x_test[:8]))])
    if first:
        few = x_test[:args.log_p_images]
        bounds = evaluate(vae, few, "corrected", new("bound"))
    codes = gaussian_codes(z, args.samples, new("samples"))
    images = decode(vae.decoder, codes)
    found = {"deviation": z.std(0).cpu(), "square": (z ** 2).mean(0).cpu(),
             "Gaussian": look_at(judge, net, images, real)}
    for p, (name, prior) in enumerate(vae.priors.items(), 1):
        u = torch.randn(args.samples, z.shape[1], generator=new("samples"), device=x.device)
        codes = prior.inverse(u)
        row = look_at(judge, net, decode(vae.decoder, codes), real)
        row["RE"], row["RT"] = terms[0], terms[p]
        row["reconstructions"] = eight.cpu()
        row["paths"] = interpolate(vae.decoder, codes[:2], codes[2:4]).cpu()
        if first:
            row["bound"] = bounds[p] - bounds[0] - constant(x)
            with torch.enable_grad():
                log_p = log_likelihood(vae.decoder, prior, codes_of(vae.encoder, few), few,
                                       args.log_p_steps, new("log p"))
            row["log p of images"] = log_p.cpu()
        found[name] = row
    return found


def look_at(judge, net, images, real):
    """Measures of images (n, C, 32, 32) beside real ones, and forty of them."""
    row = judged(judge, images, real["moments"]) | {"pictures": images[:40].cpu()}
    if net is not None:
        row["FID"] = frechet_distance(*fid_moments(net, images), *real["FID moments"])
    return row


@torch.no_grad()
def real_unit(judge, net, x, x_test, samples):
    """A work unit: what the judge makes of real images, and yardsticks."""
    test, mean = x_test[:samples], x.mean(0, keepdim=True)
    real = {"moments": moments(judge[:-1](test))}
    if net is not None:
        real["FID moments"] = fid_moments(net, test)
    noise = torch.rand(test.shape, generator=common.generator(0, "noise")).to(x)
    rows = {"test images (real)": look_at(judge, net, test, real),
            "training images (floor)": look_at(judge, net, x[:samples], real),
            "the mean image": look_at(judge, net, mean.expand(test.shape), real),
            "noise": look_at(judge, net, noise, real)}
    error = reconstruction_error(mean, x_test).mean().item()
    return {**real, "rows": rows, "mean image": error}


def predicted_rt(deviation, square, K, objective):
    """RT of a frozen encoder's codes by theory, from their deviation and mean square (D,).

    A dimension passes K / 2 couplings, each of which scales it by less than e, and RT is
    highest where u has a deviation of 1, or of sqrt(D) under the published weights.
    """
    D = len(deviation)
    own = (1 + math.log(VARIANCE)) / 2
    if K == 0:
        spread, volume = square, torch.zeros(D)
    else:
        wanted = 1.0
        if objective == "as-published":
            wanted = D ** 0.5
        scale = (wanted / deviation).clamp(max=math.exp(K / 2))
        spread, volume = (scale * deviation) ** 2, scale.log()
    RT = own - spread / 2
    if objective == "as-published":
        return (RT.mean() + volume.sum()).item()
    return (RT.sum() + volume.sum()).item()


# --- statistics -------------------------------------------------------------------------

def anova(y, levels, terms, permutations, g):
    """Analysis of variance of a balanced design: {term: F, df, error df, p}.

    y (n,); levels: {factor: (n,) integers}; terms: tuples of factors, an interaction after
    its factors.
    p by permuting what the other terms leave (Freedman and Lane 1983): needs no normality.
    """
    n, y = len(y), y.double()
    rest = torch.eye(n, dtype=torch.double) - 1 / n  # projects on what is not explained yet
    projections = {}
    for term in terms:
        same = torch.ones(n, n, dtype=torch.double)
        for factor in term:
            same = same * (levels[factor][:, None] == levels[factor])
        projections[term] = same / same.sum(1) @ rest  # the mean over a cell of the rest
        rest = rest - projections[term]
    error_df = round(rest.trace().item())
    orders = torch.rand(permutations, n, generator=g).argsort(1)
    table = {}
    for term, projection in projections.items():
        df = round(projection.trace().item())
        if df == 0:  # a factor of one level
            continue
        unexplained = projection @ y + rest @ y  # by all other terms
        own = ratio(unexplained, projection, rest)
        others = ratio(unexplained[orders], projection, rest)
        extreme = (others >= own * (1 - 1e-9)).sum()
        table[term] = {"F": (own * error_df / df).item(), "df": df, "error df": error_df,
                       "p": (1 + extreme.item()) / (1 + permutations)}
    return table


def ratio(y, projection, rest):
    """Sums of squares of y (..., n) in two projections, one by the other."""
    return ((y @ projection) ** 2).sum(-1) / ((y @ rest) ** 2).sum(-1)


def sign_flip_p(differences, permutations, g):
    """p of a mean of paired differences (n,), whose signs are arbitrary if it is 0."""
    differences = differences.double()
    signs = torch.randint(0, 2, (permutations, len(differences)), generator=g) * 2 - 1
    means = (signs * differences).mean(1).abs()
    extreme = (means >= differences.mean().abs() * (1 - 1e-9)).sum()
    return (1 + extreme.item()) / (1 + permutations)


def t4_within(t):
    """P(|T| <= t) of Student's T with 4 degrees of freedom, those of five repeats."""
    r = t / (4 + t * t) ** 0.5
    return r * (1 + (1 - r * r) / 2)


# --- plot -------------------------------------------------------------------------------

TITLES = {"fc": "FC", "conv": "Conv", "normal": "Normal", "flow2": "Flow (2)",
          "flow6": "Flow (6)"}


def plot_sheets(sheets, height):
    """A sheet (r, c, C, H, W) of each cell in the document's layout."""
    columns = len({encoder for _, _, encoder in sheets})
    fig, axes = common.panels(len(sheets) // columns, columns, 2.3, height)
    for place, ((layers, prior, encoder), images) in enumerate(sheets.items()):
        ax = axes[place]
        common.image_sheet(ax, images)
        if place < columns:
            ax.set_title(encoder, fontsize="medium")
        if place % columns == 0:
            ax.set_ylabel(f"{TITLES[layers]}\n{TITLES[prior]}", fontsize="medium")
    return fig


def plot_training(logs, at, document):
    """RE and RT over the epochs, {cell: (epochs, 2)}, cells of one prior."""
    layers = list(dict.fromkeys(key[0] for key in logs))
    fig, axes = common.panels(2, len(layers), 4.2, 2.7, sharex=True, sharey="row")
    for (layer, prior, encoder), log in logs.items():
        place = ENCODERS.index(encoder)
        colour, end = common.COLOURS[place], len(log) * (1.04 + 0.03 * place)
        for row, term in enumerate(("RE", "RT")):
            ax = axes[row * len(layers) + layers.index(layer)]
            ax.set_title(f"{term}, {TITLES[layer]}", fontsize="medium")
            epochs = range(1, len(log) + 1)
            ax.plot(epochs, log[:, row], color=colour, label=encoder)
            here = at[layer, prior, encoder][term].mean()
            theirs, _ = published(document, (layer, prior, encoder), term)
            ax.plot(end, here, "o", mfc="none", color=colour)
            ax.plot(end, theirs, "*", ms=8, color=colour)
    axes[0].plot([], [], "o", mfc="none", color="grey", label="test images")
    axes[0].plot([], [], "*", ms=8, color="grey", label="document")
    axes[0].set(yscale="log", ylabel="squared error per image")
    axes[0].set_yticks([5, 10, 20, 40, 80], [5, 10, 20, 40, 80])
    axes[0].minorticks_off()
    axes[len(layers)].set(ylabel="nats")
    for ax in axes[len(layers):]:
        ax.set_xlabel("epoch")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    return fig


def plot_scale(rows):
    """{name: images (n, C, H, W)}: a row of twenty each."""
    shown = torch.stack([images[:20] for images in rows.values()])
    fig, (ax,) = common.panels(1, 1, 9.2, 0.34 * len(rows))
    common.image_sheet(ax, shown, list(rows))
    return fig


def plot(run, models, trained, scores, at, document, real):
    """All figures; pictures are the first repeat's. trained, scores: {model: result}."""
    sheets, logs, rows = {"reconstructions": {}, "samples": {}, "paths": {}}, {}, {}
    for layers, prior, encoder in at:
        for model in models:
            same = (model.layers, model.encoder) == (layers, encoder)
            if same and prior in model.priors and not model.standardised:
                found, key = scores[model][prior], (layers, prior, encoder)
                sheets["reconstructions"][key] = found["reconstructions"]
                sheets["samples"][key] = found["pictures"][:10].unflatten(0, (2, 5))
                sheets["paths"][key] = found["paths"]
                logs[key] = trained[model]["log"][:, [0, 1 + model.priors.index(prior)]]
    for name, title, height in (
            ("reconstructions", "Table 5.7: test images (top), reconstructed (bottom)", 0.64),
            ("samples", "Table 5.8: generated images", 0.97),
            ("paths", "Table 5.9: interpolations between generated images", 0.64)):
        run.figure(plot_sheets(sheets[name], height), name, title)
    _, last, _ = list(logs)[-1]
    some = {key: log for key, log in logs.items() if key[1] == last}
    run.figure(plot_training(some, at, document), "training",
               f"Training, {TITLES[last]}, first repeat")
    for model in models:
        if model.layers == "conv" and model.encoder in ("NL", "RKS"):
            found, name = scores[model], model.encoder
            if model.standardised:
                rows[name]["codes standardised"] = found["normal"]["pictures"]
                continue
            rows[name] = {TITLES[prior]: found[prior]["pictures"] for prior in model.priors}
            rows[name]["Gaussian fitted after"] = found["Gaussian"]["pictures"]
    shown = {}
    for name, pictures in rows.items():
        for prior, images in pictures.items():
            shown[f"{name}: {prior}"] = images
    if shown:
        shown["real images"] = real
        run.figure(plot_scale(shown), "scale", "Conv, frozen encoders: samples by prior")


# --- verdicts ---------------------------------------------------------------------------

COLUMNS = ["negative ELBO", "RT", "RE", "FID", "seconds"]
TABLES_5_1_TO_5_6 = [  # mean and std of each of COLUMNS, weights
    ("fc", "normal", "L", 9.84, 0.05, -1.83, 0.02, 8.01, 0.05, 92.39, 2.87, 0.71, 0.01, 10256),
    ("fc", "normal", "PNL", 21.77, 0.39, -1.98, 0.01, 19.79, 0.39, 153.11, 1.78, 0.63, 0.00, 7952),
    ("fc", "normal", "NL", 36.67, 0.47, -6.46, 0.01, 30.22, 0.48, 212.92, 4.45, 0.59, 0.00, 7824),
    ("fc", "normal", "RKS", 33.52, 0.91, -6.48, 0.01, 27.04, 0.91, 175.85, 2.94, 0.56, 0.00, 7824),
    ("fc", "flow2", "L", -6.11, 0.05, 13.76, 0.01, 7.66, 0.05, 70.39, 1.56, 1.08, 0.02, 11888),
    ("fc", "flow2", "PNL", 5.78, 0.32, 13.64, 0.01, 19.43, 0.31, 138.15, 2.31, 0.99, 0.01, 9584),
    ("fc", "flow2", "NL", 20.78, 0.87, 9.53, 0.01, 30.31, 0.87, 165.32, 5.79, 0.95, 0.01, 9456),
    ("fc", "flow2", "RKS", 16.48, 0.23, 9.32, 0.02, 25.80, 0.23, 142.73, 1.77, 0.92, 0.01, 9456),
    ("fc", "flow6", "L", -36.90, 0.17, 44.82, 0.02, 7.92, 0.18, 54.68, 0.64, 2.02, 0.01, 15152),
    ("fc", "flow6", "PNL", -26.06, 0.47, 44.66, 0.01, 18.60, 0.46, 112.23, 1.67, 1.96, 0.01, 12848),
    ("fc", "flow6", "NL", -7.70, 1.22, 38.07, 0.38, 30.38, 1.21, 107.11, 8.98, 1.87, 0.02, 12720),
    ("fc", "flow6", "RKS", -2.53, 0.63, 28.80, 0.17, 26.27, 0.70, 120.72, 10.82, 1.86, 0.01, 12720),
    ("conv", "normal", "L", 13.08, 0.29, -2.66, 0.04, 10.42, 0.26, 90.05, 6.25, 1.87, 0.01, 521),
    ("conv", "normal", "PNL", 20.04, 2.35, -2.88, 0.06, 17.15, 2.33, 128.32, 7.52, 1.45, 0.00, 434),
    ("conv", "normal", "NL", 35.37, 2.04, -6.43, 0.02, 28.94, 2.05, 242.73, 24.38, 1.40, 0.00, 396),
    ("conv", "normal", "RKS", 31.52, 1.81, -6.42, 0.00, 25.09, 1.81, 209.22, 6.84, 1.20, 0.01, 396),
    ("conv", "flow2", "L", -2.16, 0.53, 12.89, 0.03, 10.74, 0.55, 45.71, 9.45, 2.04, 0.00, 3689),
    ("conv", "flow2", "PNL", 2.65, 0.88, 12.86, 0.05, 15.52, 0.88, 42.67, 4.74, 1.62, 0.01, 3602),
    ("conv", "flow2", "NL", 21.01, 4.77, 9.58, 0.01, 30.60, 4.78, 220.86, 30.27, 1.56, 0.00, 3564),
    ("conv", "flow2", "RKS", 14.26, 0.61, 9.54, 0.01, 23.80, 0.61, 138.68, 15.39, 1.39, 0.01, 3564),
    ("conv", "flow6", "L", -31.91, 0.32, 42.97, 0.01, 11.06, 0.32, 40.96, 5.20, 2.64, 0.00, 10025),
    ("conv", "flow6", "PNL", -25.43, 1.83, 42.90, 0.03, 17.48, 1.84, 39.29, 7.29, 2.20, 0.00, 9938),
    ("conv", "flow6", "NL", -10.74, 4.92, 41.08, 0.34, 30.34, 5.20, 78.17, 26.78, 2.11, 0.01, 9900),
    ("conv", "flow6", "RKS", -13.31, 1.24, 38.74, 0.21, 25.43, 1.4, 57.29, 11.54, 2.06, 0.01, 9900),
]
TABLE_5_10 = [
    ("conv", "flow6", "L", -79.23, 0.11, 90.81, 0.01, 11.58, 0.11, 59.15, 1.77, 2.65, 0.01, 10339),
    ("conv", "flow6", "PNL", -74.09, 2.66, 90.89, 0.04, 16.8, 2.63, 57.68, 1.52, 2.21, 0.01, 10250),
    ("conv", "flow6", "NL", -62.60, 3.36, 90.30, 1.28, 27.69, 2.36, 78.08, 5.46, 2.13, 0.01, 10196),
    ("conv", "flow6", "RKS", -67.90, 1.19, 88.00, 0.23, 20.10, 1.37, 65.40, 4.00, 2.08, 0.0, 10196),
]
DOCUMENT = {row[:3]: row[3:] for row in TABLES_5_1_TO_5_6}
SVHN = {row[:3]: row[3:] for row in TABLE_5_10}


class Order(NamedTuple):
    """A claim that models of these levels have less of a measure than models of those."""
    claim: str
    measure: str
    pairs: list
    document: str = "yes"


def chain(*names):
    """Each level has less than the next."""
    return [([low], [high]) for low, high in zip(names, names[1:])]


def each_below(lows, highs):
    return [([low], [high]) for low in lows for high in highs]


def best_is_conv_flow6(encoders):
    """It has less than each other combination of the same encoder."""
    pairs = []
    for layers, prior, encoder in DOCUMENT:
        if encoder in encoders and (layers, prior) != ("conv", "flow6"):
            pairs.append((["conv", "flow6", encoder], [layers, prior, encoder]))
    return pairs


def two_flows_help():
    """All models have less than under the normal prior, but for conv NL."""
    pairs = []
    for layers, prior, encoder in DOCUMENT:
        if prior == "flow2" and (layers, encoder) != ("conv", "NL"):
            pairs.append(([layers, prior, encoder], [layers, "normal", encoder]))
    return pairs


ORDERS = [  # sections 5.1 and 6; "distance" stands for the FID where that is not computed
    Order("RE: L < PNL < RKS < NL", "RE", chain("L", "PNL", "RKS", "NL")),
    Order("negative ELBO: L < PNL < RKS < NL", "negative ELBO", chain("L", "PNL", "RKS", "NL")),
    Order("RT: RKS < NL < PNL, L", "RT",
          [(["RKS"], ["NL"]), (["NL"], ["PNL"]), (["NL"], ["L"])]),
    Order("RE: L better with fc, all others with conv", "RE",
          [(["fc", "L"], ["conv", "L"]), (["conv", "PNL"], ["fc", "PNL"]),
           (["conv", "NL"], ["fc", "NL"]), (["conv", "RKS"], ["fc", "RKS"])]),
    Order("negative ELBO: L better with fc, RKS with conv", "negative ELBO",
          [(["fc", "L"], ["conv", "L"]), (["conv", "RKS"], ["fc", "RKS"])]),
    Order("RT: L, PNL better with fc, NL, RKS with conv", "RT",
          [(["conv", "L"], ["fc", "L"]), (["conv", "PNL"], ["fc", "PNL"]),
           (["fc", "NL"], ["conv", "NL"]), (["fc", "RKS"], ["conv", "RKS"])]),
    Order("gap of negative ELBO: conv < fc", "gap of negative ELBO", chain("conv", "fc"),
          "1.26; 12.0"),
    Order("gap of negative ELBO: L, PNL < RKS, NL", "gap of negative ELBO",
          each_below(["L", "PNL"], ["RKS", "NL"])),
    Order("gap of RE: the same two", "gap of RE",
          chain("conv", "fc") + each_below(["L", "PNL"], ["RKS", "NL"])),
    Order("gap of RT: RKS above all others", "gap of RT",
          each_below(["L", "PNL", "NL"], ["RKS"])),
    Order("gap of RT: flow6 above flow2 and normal", "gap of RT",
          each_below(["normal", "flow2"], ["flow6"])),
    Order("distance: conv < fc", "distance", chain("conv", "fc")),
    Order("distance: flow6 < flow2 < normal", "distance", chain("flow6", "flow2", "normal")),
    Order("distance: L < PNL < RKS < NL", "distance", chain("L", "PNL", "RKS", "NL")),
    Order("distance: conv, flow6 best for every encoder", "distance",
          best_is_conv_flow6(ENCODERS)),
    Order("distance: flow2 < normal, but for conv NL", "distance", two_flows_help()),
    Order("unread: NL, RKS least with conv, flow6", "unread",
          best_is_conv_flow6(["NL", "RKS"]), "only these"),
    Order("fc, flow6: NL, RKS vary less than L, PNL", "variation",
          [(["fc", "flow6", low], ["fc", "flow6", high])
           for low in ("NL", "RKS") for high in ("L", "PNL")], "hardly vary"),
    Order("seconds: RKS < NL < PNL < L", "seconds", chain("RKS", "NL", "PNL", "L")),
    Order("seconds: normal < flow2 < flow6", "seconds", chain("normal", "flow2", "flow6")),
    Order("seconds: fc < conv", "seconds", chain("fc", "conv"))]
ORDERS_SVHN = [  # section 5.2
    Order("negative ELBO: L < PNL < RKS < NL", "negative ELBO", chain("L", "PNL", "RKS", "NL")),
    Order("RT: RKS < NL, PNL, L", "RT", each_below(["RKS"], ["NL", "PNL", "L"])),
    Order("RE: L < PNL, RKS < NL", "RE",
          each_below(["L"], ["PNL", "RKS"]) + each_below(["PNL", "RKS"], ["NL"])),
    Order("distance: L, PNL, RKS < NL", "distance", each_below(["L", "PNL", "RKS"], ["NL"])),
    Order("seconds: RKS < NL < PNL < L", "seconds", chain("RKS", "NL", "PNL", "L"))]
MAIN = [("encoder",), ("layers",), ("prior",)]
COVARIATE = [("encoder",), ("layers",), ("encoder", "layers"), ("prior",)]
FULL = MAIN + [("encoder", "layers"), ("encoder", "prior"), ("layers", "prior"),
               ("encoder", "layers", "prior")]
ANALYSES = {  # section 5.1: the terms of the linear model, and the document's F
    "negative ELBO": (COVARIATE, {"prior": "F(2, 110) = 3459.90",
                                  "encoder": "F(3, 110) = 700.46",
                                  "encoder x layers": "F(3, 110) = 17.79"}),
    "RT": (COVARIATE, {"prior": "F(2, 110) = 6300.92", "encoder": "F(3, 110) = 83.64",
                       "encoder x layers": "F(3, 110) = 10.95"}),
    "RE": (FULL, {"encoder x layers": "F(3, 96) = 13.61", "encoder": "F(3, 96) = 809.61",
                  "prior": "n.s."}),
    "gap of negative ELBO": (MAIN, {"layers": "F(1, 113) = 395.31",
                                    "encoder": "F(3, 113) = 53.73"}),
    "gap of RE": (MAIN, {"layers": "p < .000", "encoder": "p < .000"}),
    "gap of RT": (MAIN, {"encoder": "F(3, 113) = 13.97", "prior": "F(2, 113) = 26.14"}),
    "distance": (FULL, {"encoder x layers x prior": "FID: F(6, 96) = 17.37",
                        "encoder": "FID: F > 69.60", "layers": "FID: F > 69.60",
                        "prior": "FID: F > 69.60"}),
    "seconds": (MAIN, {"prior": "F(2, 113) = 538.17", "encoder": "F(3, 113) = 39.80",
                       "layers": "F(1, 113) = 528.99"})}


def published(document, key, measure):
    """Mean and std of the document's five repeats."""
    place = 2 * COLUMNS.index(measure)
    return document[key][place], document[key][place + 1]


def mean_of(at, measure, levels):
    """Mean over all cells that have these levels, of each repeat. (S,)"""
    some = [found[measure] for key, found in at.items() if set(levels) <= set(key)]
    return torch.stack(some).mean(0)


def learned(at, D, mean_image):
    """Do all nets beat the mean image, and do flows reach half of their ceiling?"""
    floor = (1 + math.log(VARIANCE)) / 2  # RT of a frozen encoder, if u were 0
    for (_, prior, _), found in at.items():
        K = PRIORS[prior]
        if found["RE"].mean() > 0.9 * mean_image:
            return False
        if K and found["RT"].mean() < floor + K * D / 4:  # flows can add K D / 2
            return False
    return True


def claims(at, document, earned, read, repeats):
    """The closing table, as far as the cells {(layers, prior, encoder): measures} go.

    earned: have the nets learned? read: can the judge read real images?
    """
    table = claims_about_figures(at, document, earned, repeats)
    if at.keys() != document.keys():
        return table
    orders, distance = ORDERS, "distance"
    if document is SVHN:
        orders = ORDERS_SVHN
    if "FID" in at["conv", "flow6", "L"]:
        distance = "FID"
    for claim, measure, pairs, word in orders:
        if measure == "distance":
            claim, measure = claim.replace("distance", distance), distance
        rows, known = [], earned
        if measure in ("distance", "unread", "variation"):
            known = earned and read
        for low, high in pairs:
            less, more = mean_of(at, measure, low), mean_of(at, measure, high)
            rows.append(common.ordered(claim, less, more, known, word))
        if len(rows) > 1:
            rows = [common.throughout(claim, rows, word)]
        table += rows
    if document is DOCUMENT:
        seen = earned and (read or distance == "FID")
        table += claims_about_samples(at, distance, seen) + claims_about_prior(at, earned)
        if repeats > 1:
            table += claims_about_spread(at, distance, seen)
        full, half = at["conv", "flow6", "L"], at["conv", "flow6", "PNL"]
        table.append(common.ordered("conv, flow6: PNL saves 15 % of the time",
                                    half["seconds"], 0.85 * full["seconds"], earned, "16.5 %"))
    return table


def claims_about_figures(at, document, earned, repeats):
    """Rows of the document's tables: how many are met, Conv, Flow (6), and weights."""
    table = []
    measures = [name for name in COLUMNS[:4] if name in next(iter(at.values()))]
    for measure in measures:
        count = 0
        for key, found in at.items():
            theirs, std = published(document, key, measure)
            count += abs(found[measure].mean() - theirs) <= max(2 * std, 0.01)
        # their means and stds are of five repeats, ours of so many
        chance = t4_within(2 / (1 / repeats + 1 / 5) ** 0.5)
        expected, sd = chance * len(at), (len(at) * chance * (1 - chance)) ** 0.5
        verdict = "differs"
        if count >= expected - 2 * sd:
            verdict = "reproduced" if earned else "open"
        table.append(dict(claim=f"{measure}: models within two std",
                          document=f"{expected:.1f} of {len(at)}", here=f"{count}",
                          verdict=verdict))
    for encoder in ENCODERS:
        key = "conv", "flow6", encoder
        if key in at:
            for measure, better in (("RE", "lower"), ("RT", "higher")):
                theirs, std = published(document, key, measure)
                table.append(common.reproduced(
                    f"conv, flow6, {encoder}: {measure} (± {std})", theirs,
                    at[key][measure], max(std, 0.01), better, earned=earned))
    wrong = sum(found["weights"] != document[key][-1] for key, found in at.items())
    return table + [common.reproduced("weights that differ from the document's", 0, wrong,
                                      0, earned=earned)]


def claims_about_samples(at, name, earned):
    """Rows of the distance (or FID), name, that are differences or ratios."""
    table, gains = [], {}
    for layers, _, encoder in at:
        normal, flow6 = at[layers, "normal", encoder], at[layers, "flow6", encoder]
        gains[layers, encoder] = normal[name] - flow6[name]
    rows = []
    for encoder in ENCODERS:
        rows.append(common.ordered("", gains["fc", encoder], gains["conv", encoder], earned))
    table.append(common.throughout(f"{name}: conv gains more by six flows than fc", rows))
    rows = []
    for low, high in (("L", "NL"), ("L", "RKS"), ("PNL", "NL"), ("PNL", "RKS")):
        rows.append(common.ordered("", gains["conv", low], gains["conv", high], earned))
    table.append(common.throughout(f"{name}: conv NL, RKS gain more than L, PNL", rows))
    if name == "FID":  # another measure has another ratio
        share = at["conv", "flow6", "PNL"][name] / at["conv", "flow6", "L"][name]
        table.append(common.reproduced("conv, flow6: FID of PNL / L", 39.29 / 40.96, share,
                                       0.2, earned=earned))
    return table


def claims_about_spread(at, name, earned):
    """Rows of the std over repeats, each a mean over cells, paired by two factors."""
    spread = torch.stack([found[name].std() for found in at.values()])
    spread = spread.view(len(LAYERS), len(PRIORS), len(ENCODERS))
    fc, conv = spread.flatten(1)
    trained, frozen = spread[..., :2].mean(2).flatten(), spread[..., 2:].mean(2).flatten()
    return [common.ordered(f"std of {name}: fc < conv", fc, conv, earned),
            common.ordered(f"std of {name}: L, PNL < NL, RKS", trained, frozen, earned)]


def claims_about_prior(at, earned):
    """Rows: the prior does not change RE; of frozen encoders that is an identity."""
    table = []
    for prior in ("flow2", "flow6"):
        ours, theirs = [], []
        for layers in LAYERS:
            for encoder in ("L", "PNL"):
                one, other = (layers, prior, encoder), (layers, "normal", encoder)
                ours.append(at[one]["RE"] / at[other]["RE"])
                theirs.append(published(DOCUMENT, one, "RE")[0]
                              / published(DOCUMENT, other, "RE")[0])
        table.append(common.reproduced(f"RE of L, PNL: {prior} / normal", sum(theirs) / 4,
                                       sum(ours) / 4, 0.05, earned=earned))
    return table


# --- tables -----------------------------------------------------------------------------

TABLES = {"negative ELBO": "Table 5.1: negative ELBO [document]",
          "RT": "Table 5.2: RT [document]", "RE": "Table 5.3: RE [document]",
          "FID": "Table 5.4: FID [document]",
          "distance": "In place of Table 5.4: Fréchet distance in LeNet's features",
          "seconds": "Table 5.5: seconds per epoch [document]",
          "gap of RE": "Gaps of RE", "gap of RT": "Gaps of RT",
          "read": "Share of samples that LeNet is sure of",
          "balance": "Entropy of the samples' classes / log 10",
          "variation": "Variance of the samples, summed over pixels"}
SCALE_COLUMNS = ["layers", "encoder", "RE", "normal", "standardised", "Gaussian", "flow6"]


def table_of(at, measure, document):
    """One measure in the document's layout, its own means in brackets."""
    table = []
    for layers, prior, encoder in at:
        key, head = (layers, prior, encoder), {"layers": layers, "prior": prior}
        if not table or not head.items() <= table[-1].items():
            table.append(head)
        cell = common.show(at[key][measure])
        if measure in COLUMNS and key in document:
            cell += f" [{published(document, key, measure)[0]:.2f}]"
        table[-1][encoder] = cell
    return table


def over_priors(at, measure):
    """{(layers, encoder): mean over the priors (S,)}"""
    found = {}
    for layers, _, encoder in at:
        found[layers, encoder] = mean_of(at, measure, [layers, encoder])
    return found


def analysis_table(at, g):
    """Analyses of variance beside the document's.

    A frozen encoder has one RE under all priors: RE is analysed as a mean over priors.
    """
    table = []
    for measure, (terms, theirs) in ANALYSES.items():
        factors = ["layers", "prior", "encoder"]
        cells = {key: found[measure] for key, found in at.items()}
        if measure in ("RE", "gap of RE"):
            factors, cells = ["layers", "encoder"], over_priors(at, measure)
            terms = [term for term in terms if "prior" not in term]
        y = torch.stack(list(cells.values()))  # (cells, S)
        levels = {}
        for place, factor in enumerate(factors):
            names = sorted({key[place] for key in cells})
            numbers = torch.tensor([names.index(key[place]) for key in cells])
            levels[factor] = numbers.repeat_interleave(y.shape[1])
        for term, found in anova(y.flatten(), levels, terms, PERMUTATIONS, g).items():
            name = " x ".join(term)
            table.append({"measure": measure, "term": name,
                          "here": f"F({found['df']}, {found['error df']}) = {found['F']:.2f}",
                          "p": f"{found['p']:.2g}", "document": theirs.get(name, "")})
    return table


def post_hoc_table(at, g):
    """Mean differences between encoders, paired by repeat and layers, means over priors."""
    table = []
    for i, low in enumerate(ENCODERS):
        for high in ENCODERS[i + 1:]:
            row = {"encoders": f"{high} - {low}"}
            for measure in ("RE", "negative ELBO", "RT", "distance", "seconds"):
                cells = over_priors(at, measure)
                differences = [cells[layers, high] - cells[layers, low] for layers in LAYERS]
                differences = torch.cat(differences)
                p = sign_flip_p(differences, PERMUTATIONS, g)
                row[measure] = f"{differences.mean():.3g} ({p:.2g})"
                if p < ALPHA:
                    row[measure] += "*"
            table.append(row)
    return table


def predicted_table(at, codes, document, objective):
    """RT of the frozen encoders: by theory, as trained here, in the document."""
    table = []
    for layers, prior, encoder in at:
        if encoder in FROZEN:
            repeats = codes[layers, encoder]
            values = [predicted_rt(one["deviation"], one["square"], PRIORS[prior], objective)
                      for one in repeats]
            deviation = torch.stack([one["deviation"].mean() for one in repeats])
            theirs, std = published(document, (layers, prior, encoder), "RT")
            table.append({"layers": layers, "prior": prior, "encoder": encoder,
                          "codes' std": common.show(deviation),
                          "predicted": common.show(values),
                          "here": common.show(at[layers, prior, encoder]["RT"]),
                          "document": f"{theirs} ± {std}"})
    return table


def scale_table(models, scores):
    """How samples depend on the scale of codes and prior; first repeat."""
    table = {}
    for model in models:
        row = table.setdefault(model[:2], dict.fromkeys(SCALE_COLUMNS, ""))
        row["layers"], row["encoder"] = model[:2]
        for prior, found in scores[model].items():
            if prior in ("normal", "flow6", "Gaussian"):
                cell = f"{found['distance']:.0f} ({found['read']:.2f}, {found['balance']:.2f})"
                if model.standardised and prior == "normal":
                    row["standardised"] = cell
                elif not model.standardised and not row[prior]:
                    row[prior] = cell
        if not model.standardised and not row["RE"]:
            row["RE"] = f"{scores[model][model.priors[0]]['RE']:.1f}"
    return list(table.values())


def log_p_table(models, scores):
    """log p(x) (its bound by q(z|x)) in nats, means over images of the first repeat."""
    table = {}
    for model in models:
        if not model.standardised:
            for prior in model.priors:
                found, head = scores[model][prior], (model.layers, prior)
                row = table.setdefault(head, {"layers": model.layers, "prior": prior})
                mean = found["log p of images"].mean()
                row[model.encoder] = f"{mean:.1f} ({found['bound']:.0f})"
    return list(table.values())


def tables_of(args, models, scores, at, codes, document, real):
    """{title: rows}: the document's tables, and what it lacks."""
    tables, beyond = {}, "Beyond the document: "
    for measure, title in TABLES.items():
        if measure in next(iter(at.values())):
            tables[title] = table_of(at, measure, document)
    if args.seeds > 1:
        g = common.generator(0, "permutations")
        tables["Section 5.1: analyses of variance, p by permutation"] = analysis_table(at, g)
        if at.keys() == document.keys():
            tables[f"Post-hoc: differences (p by sign flips; *: p < {ALPHA})"] = (
                post_hoc_table(at, g))
    tables[beyond + "RT of frozen encoders, predicted without training"] = predicted_table(
        at, codes, document, args.objective)
    tables[beyond + "it is the scale: distance (share read, entropy) by prior"] = scale_table(
        models, scores)
    tables[beyond + f"log p(x) (its bound) in nats, {args.log_p_images} images"] = (
        log_p_table(models, scores))
    yardsticks = []
    for name, found in real["rows"].items():
        row = {key: f"{value:.3g}" for key, value in found.items() if key != "pictures"}
        yardsticks.append({"images": name, **row})
    pictures = real["rows"]["noise"]["pictures"]
    error, log_p = real["mean image"], -real["mean image"] - constant(pictures)
    title = f"yardsticks (the mean image: RE {error:.1f}, log p {log_p:.0f})"
    tables[beyond + title] = yardsticks
    return tables


def collect(cells, models, seeds, trained, scores, seconds, channels):
    """{cell: measures (S,)} and {(layers, encoder): what its codes are like}."""
    at, codes = {}, {}
    for layers, prior, encoder in cells:
        for model in models:
            if (layers, encoder) == model[:2] and prior in model.priors:
                units = [f"seed{seed}-{model}" for seed in seeds]
                p = 1 + model.priors.index(prior)
        rows = []
        for unit in units:
            log = trained[unit]["log"][-1]
            rows.append(measures_of(scores[f"{unit}-scores"][prior], log[0], log[p]))
        found = common.over_repeats(rows)
        vae = build(layers, encoder, [prior], channels, 0)
        found["weights"] = document_count(vae)
        found["seconds"] = torch.tensor(seconds[layers, prior, encoder])
        at[layers, prior, encoder] = found
        codes[layers, encoder] = [scores[f"{unit}-scores"] for unit in units]
    return at, codes


def measures_of(found, RE, RT):
    """Numbers of one cell and repeat; RE, RT: of the last epoch of training."""
    names = ["RE", "RT", "distance", "FID", "read", "balance", "variation"]
    row = {name: found[name] for name in names if name in found}
    row["unread"] = 1 - row["read"]
    row["negative ELBO"] = row["RE"] - row["RT"]
    row["gap of RE"] = row["RE"] - RE.item()
    row["gap of RT"] = RT.item() - row["RT"]  # RT is to be high
    row["gap of negative ELBO"] = row["gap of RE"] + row["gap of RT"]
    return row


def metrics_of(tasks, trained):
    """RE and RT by epoch as flat dicts, one for each unit and epoch."""
    metrics = []
    for unit, (seed, model) in tasks.items():
        for epoch, values in enumerate(trained[unit]["log"].tolist(), 1):
            row = {"model": str(model), "seed": seed, "epoch": epoch, "RE": values[0]}
            for prior, value in zip(model.priors, values[1:]):
                row[f"RT {prior}"] = value
            metrics.append(row)
    return metrics


# --- main -------------------------------------------------------------------------------

def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add
    add("--dataset", choices=["mnist", "svhn", "glyphs", "glyphs-rgb"], default="mnist",
        help="mnist, svhn: real images; glyphs, glyphs-rgb: digits drawn here, offline")
    add("--encoder", nargs="+", choices=ENCODERS, default=ENCODERS, help="encoders")
    add("--layers", nargs="+", choices=LAYERS, help="all; of three colours: conv")
    add("--prior", nargs="+", choices=list(PRIORS), help="all; of three colours: flow6")
    add("--objective", choices=["as-published", "corrected"], default="as-published",
        help="the document's RT, or that of the evidence lower bound, without verdicts")
    add("--epochs", type=number(int, 1, 10**5), help="passes over the training images")
    add("--seeds", type=number(int, 1, 100), help="seeds, counted from --seed; 1: no verdicts")
    add("--train-images", type=number(int, 256, 10**6), help="training images")
    add("--test-images", type=number(int, 100, 10**6), help="test images, at most")
    add("--samples", type=number(int, 100, 10**6), help="samples for each distance")
    add("--log-p-images", type=number(int, 2, 10**6), help="test images to find log p(x) of")
    add("--fid", action="store_true", help="the standard FID, too: slow without a GPU")
    args = parser.parse(argv)
    layers, priors = LAYERS, list(PRIORS)
    if args.dataset in ("svhn", "glyphs-rgb"):
        layers, priors = ["conv"], ["flow6"]  # Table 5.10
    args.layers = args.layers or layers
    args.prior = args.prior or priors
    for flag, given, known in (("layers", args.layers, layers), ("prior", args.prior, priors)):
        if not set(given) <= set(known):
            parser.error(f"argument --{flag}: {args.dataset} has {', '.join(known)} alone, as "
                         "the document")
    return args


def models_of(args):
    """The models to train in each repeat, and those beyond the document, in the first."""
    models, more = [], []
    priors = tuple(prior for prior in PRIORS if prior in args.prior)
    encoders = [encoder for encoder in ENCODERS if encoder in args.encoder]
    for layers in LAYERS:
        for encoder in encoders:
            if layers not in args.layers:
                continue
            if encoder in FROZEN:
                models.append(Model(layers, encoder, priors))
                continue
            for prior in priors:
                models.append(Model(layers, encoder, (prior,)))
        if layers in args.layers and encoders == ENCODERS and "normal" in priors:
            more += [Model(layers, "PCA", priors), Model(layers, "NL", ("normal",), True),
                     Model(layers, "RKS", ("normal",), True)]
    return models, more


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    net = None
    if args.fid:
        net = inception(args.device)
    n = args.train_images * 7 // 5
    images = n + args.test_images
    x, _ = load_data(args.dataset, True, images, args.data, args.device)
    if len(x) < n + 100:
        common.die(f"argument --train-images: {args.train_images}, and 0.4 of that for "
                   f"validation, leave less than 100 of {args.dataset}'s {len(x)} to test")
    document, channels = DOCUMENT, x.shape[1]
    if channels == 3:
        document = SVHN
    additive = ["encoder", "layers", "prior", "seeds"]
    with common.Run(__file__, args, f"{args.dataset} 32x32, {args.objective}",
                    additive=additive) as run:
        seeds = list(range(args.seed, args.seed + args.seeds))
        models, more = models_of(args)

        g = common.generator(args.seed, "judge", args.device)
        torch.manual_seed(g.initial_seed())
        judge = Judge(channels).to(args.device)
        digits = load_data(args.dataset, False, images, args.data, args.device)
        found = run.unit("judge", lambda: train_judge(judge, *digits, args.judge_steps, g))
        judge.load_state_dict(found["weights"])
        judge.requires_grad_(False)

        tasks = {}  # {unit: (seed, model)}
        for seed in seeds:
            for model in models:
                tasks[f"seed{seed}-{model}"] = seed, model
        for model in more:
            tasks[f"seed{args.seed}-{model}"] = args.seed, model

        def data(seed):
            return split(x, args.train_images, args.test_images, seed)

        def train_one(unit):
            seed, model = tasks[unit]
            return train_unit(unit, model, seed, data(seed)[0], args.objective, args.epochs,
                              args.batch)

        trained = run.units(list(tasks), train_one)

        real_tasks = {f"seed{seed}-real": seed for seed in seeds}

        def look_at_real(unit):
            return real_unit(judge, net, *data(real_tasks[unit]), args.samples)

        reals = run.units(list(real_tasks), look_at_real)

        def score_one(unit):
            unit = unit.removesuffix("-scores")
            seed, model = tasks[unit]
            vae = load_vae(model, seed, data(seed)[0], trained[unit]["weights"])
            return score_unit(vae, seed, *data(seed), judge, net,
                              reals[f"seed{seed}-real"], args, first=seed == args.seed)

        scores = run.units([f"{unit}-scores" for unit in tasks], score_one)
        cells = []  # in the order of the document's tables
        for layers, prior, encoder in document:
            if layers in args.layers and prior in args.prior and encoder in args.encoder:
                cells.append((layers, prior, encoder))
        name = "-".join(["seconds", *args.layers, *args.prior, *args.encoder])
        seconds = run.unit(name, lambda: time_epochs(cells, x, args.rounds, args.timed_steps))

        at, codes = collect(cells, models, seeds, trained, scores, seconds, channels)
        real = reals[f"seed{args.seed}-real"]
        models += more
        first = {model: trained[f"seed{args.seed}-{model}"] for model in models}
        firsts = {model: scores[f"seed{args.seed}-{model}-scores"] for model in models}
        real_row = real["rows"]["test images (real)"]
        plot(run, models, first, firsts, at, document, real_row["pictures"])
        earned = learned(at, latent_size(channels), real["mean image"])
        read = real_row["read"] > 0.8
        closing = claims(at, document, earned, read, args.seeds)
        tables = tables_of(args, models, firsts, at, codes, document, real)
        results = {"mean image": real["mean image"]}
        for cell, found in at.items():
            results["-".join(cell)] = found
        judged = args.preset != "smoke" and args.seeds > 1  # something learned, a spread
        judged = judged and args.objective != "corrected"  # of which nothing is claimed
        return run.finish(results, closing, tables, metrics_of(tasks, trained), judged)


if __name__ == "__main__":
    main()
