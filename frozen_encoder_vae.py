"""Who needs an encoder? VAEs whose encoders are trained, half frozen, or frozen at random.

Reproduces M. IJzer, "Who Needs an Encoder? Evaluating the Use of Random Latent
Representations in Variational Autoencoders" (2021), on MNIST: encoders L (learnable), PNL
(all but the last layer frozen), NL (frozen), RKS (random kitchen sinks: one frozen layer),
fully connected or convolutional, under a normal prior or a RealNVP of 2 or 6 flows u = f(z):

    loss = RE - RT = -ELBO,   RE = sum over pixels (x - x_hat)^2,   z ~ q(z|x) = N(mu, sigma^2)
    RT = mean over dimensions (log N(u; 0, 1) - log q(z|x)) + log |det du/dz|

    python frozen_encoder_vae.py         24 models, 2 seeds: about 20 minutes on 2 CPU cores
    python frozen_encoder_vae.py --objective corrected --out out/corrected    the true bound
    python frozen_encoder_vae.py --dataset svhn --preset paper --epochs 500 --out out/svhn

A run leaves figures, tables, logs and nets (units/*.pt) in its folder. Our choices:
* The document's RT averages over the D dimensions but adds up all of log |det|. Its tables
  show it: a frozen encoder's RT is then at most -6.41, and 8 K more with K flows; Table 5.2
  has -6.42, 9.58 (K = 2) and 41.08 (K = 6). With --objective corrected RT is a sum, too;
  -loss is then, but for a constant, a lower bound of log p(x) with p(x|z) = N(x_hat, 1/2).
* Table 5.6 adds up the sides of the weight tensors: 10,256 for fc L with its 2,047,328
  weights. So flows have 64 hidden units under fc, 128 under conv; the text says 64.
* s and t both end in Tanh; the permutation reverses z. E log q(z|x) is in closed form.
* A frozen encoder's decoder does not depend on the prior: one is trained for all three.
* RKS is a plain random linear projection (section 4.2); under conv a 16x16 convolution of
  stride 16, since the document gives no kernel.
* Quick has two fifths of the images, in batches of 64 for 256; 1,900 steps.
* "distance" is the squared Fréchet distance to test images in the features of a LeNet that
  was trained on other images. It is no FID: Table 5.4 needs --fid.
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
# S seeds, P priors
PRESETS = {
    "smoke": dict(dataset="glyphs", train_images=300, test_images=200, epochs=2, batch=256,
                  seeds=1, samples=100, judge_steps=5, log_p_images=4, log_p_steps=1, rounds=1,
                  timed_steps=1),
    "quick": dict(train_images=10_000, test_images=10_000, epochs=12, batch=64, seeds=2,
                  samples=5000, judge_steps=1000, log_p_images=25, log_p_steps=50, rounds=5,
                  timed_steps=8),
    "paper": dict(train_images=25_000, test_images=60_000, epochs=250, batch=256,  # Table 4.1
                  seeds=5, samples=10_000, judge_steps=3000, log_p_images=500,
                  log_p_steps=50, rounds=5, timed_steps=20)}
ENCODERS, LAYERS = ["L", "PNL", "NL", "RKS"], ["fc", "conv"]
PRIORS = {"normal": 0, "flow2": 2, "flow6": 6}  # flows K
FROZEN = ["NL", "RKS", "PCA"]
LEARNING_RATE = 1e-3       # Table 4.1
BATCH = 256                # of the judge, and where seconds are measured
IMAGES_PER_EPOCH = 25_000  # of Table 5.5
PERMUTATIONS = 4999
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
        name = "-".join([self.layers, self.encoder, *self.priors])
        if self.standardised:
            name += "-standardised"
        return name


# --- data -------------------------------------------------------------------------------

def load_data(dataset, train, n, folder, device):
    """x (N, C, 32, 32) in [0, 1], labels y (N,); n: how many digits to draw, of glyphs.

    The document divides the training part; the other one is the judge's.
    """
    seed = 0
    if train:
        seed = 1  # the two parts of glyphs are other digits
    if dataset == "glyphs":
        x, y = common.glyphs(n, seed)
    elif dataset == "glyphs-rgb":
        x, y = common.glyphs(n, seed, channels=3)
    else:
        x, y = common.images(dataset, train, folder)
    mode = "constant"
    if x.shape[1] == 3:
        mode = "replicate"  # a coloured ground goes on to the edge
    edge = (32 - x.shape[3]) // 2  # section 4.4: MNIST's 28x28 get two pixels on each side
    x = F.pad(x, [edge] * 4, mode).to(device, memory_format=torch.channels_last)
    return x, y.to(device)


def split(x, train_images, test_images, seed):
    """A seed's own training and test images; those for validation stay unused."""
    order = torch.randperm(len(x), generator=common.generator(seed, "split")).to(x.device)
    test = order[train_images * 7 // 5:]  # 25,000, 10,000 and the rest: Table 4.1
    return x[order[:train_images]], x[test[:test_images]]


# --- model ------------------------------------------------------------------------------

VARIANCE = 1e-6  # of q(z|x), where the encoder is frozen: Table 4.1


class Encoder(nn.Module):
    """x (B, C, 32, 32) to mu and logvar (B, D) of q(z|x): the four encoders of Figure 3.1.1.

    What the frozen layers make of an image never changes, so that training can compute it
    once: forward(x) = trained(frozen(x)).
    """

    def __init__(self, kind, layers, C, M):
        super().__init__()
        self.kind = kind
        outputs = M
        if kind in ("L", "PNL"):
            outputs = 2 * M  # mean and log variance: N = 2 in Appendix B
        if kind in ("RKS", "PCA") and layers == "fc":  # one linear layer: section 4.2
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
        D = M
        if layers == "conv":
            D = 4 * M  # M features at each of 2x2 places
        self.register_buffer("shift", torch.zeros(D))
        self.register_buffer("scale", torch.ones(D))
        if kind == "PNL":
            self.body.requires_grad_(False)
        elif kind != "L":
            self.requires_grad_(False)

    def frozen(self, x):
        """The layers that never learn: computed once for each image, and stored.

        x (B, C, 32, 32) to x itself (L), features (PNL), or codes (B, D) (all others).
        """
        if self.kind == "L":
            return x
        h = self.body(x)
        if self.kind == "PNL":
            return h
        return (self.last(h).flatten(1) - self.shift) / self.scale

    def trained(self, h):
        """The layers that learn, gone through in every step: h = frozen(x) to mu, logvar."""
        if self.kind == "L":
            h = self.body(h)
        if self.kind in ("L", "PNL"):
            mu, logvar = self.last(h).chunk(2, 1)  # conv: (B, M, 2, 2)
            return mu.flatten(1), logvar.flatten(1)
        return h, torch.full_like(h, math.log(VARIANCE))

    def forward(self, x):
        """x (B, C, 32, 32) to mu and logvar, (B, D) each."""
        return self.trained(self.frozen(x))


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
    """RealNVP of K couplings (Figure 2.2.1): z (B, D) to u ~ N(0, 1). K = 0: z itself."""

    def __init__(self, D, hidden, K):
        super().__init__()
        self.D = D
        self.s, self.t = nn.ModuleList(), nn.ModuleList()
        for _ in range(K):
            for nets in (self.s, self.t):
                nets.append(nn.Sequential(
                    nn.Linear(D // 2, hidden), nn.LeakyReLU(),
                    nn.Linear(hidden, hidden), nn.LeakyReLU(),
                    nn.Linear(hidden, D // 2), nn.Tanh()))  # section 4.2: on both

    def forward(self, z):
        """z (B, D) to u (B, D) and log |det du/dz| (B,)."""
        logdet = torch.zeros_like(z[:, 0])
        for s, t in zip(self.s, self.t):
            a, b = z.chunk(2, 1)  # (B, D/2) each
            scale = s(a)  # in (-1, 1): a flow adds less than D/2 to log |det|
            b = scale.exp() * b + t(a)  # Eq. (2.2.2)
            z = torch.cat([a, b], 1)  # Eq. (2.2.1): the half a stays
            z = z.flip(1)  # the permutation layer: |det| = 1
            logdet = logdet + scale.sum(1)  # Eq. (A.2.3)
        return z, logdet

    def inverse(self, u):
        """u (B, D) back to z (B, D)."""
        for s, t in zip(reversed(self.s), reversed(self.t)):  # the last flow first
            a, b = u.flip(1).chunk(2, 1)
            b = (b - t(a)) * (-s(a)).exp()  # Eq. (2.2.4)
            u = torch.cat([a, b], 1)  # Eq. (2.2.3)
        return u


class VAE(nn.Module):
    """Encoder and decoder under one prior; where the encoder is frozen, under several."""

    def __init__(self, encoder, decoder, priors):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.priors = nn.ModuleDict(priors)

    def forward(self, h, eps):
        """h = encoder.frozen(x) and standard normal eps (B, D) to x_hat, z, logvar."""
        mu, logvar = self.encoder.trained(h)
        z = mu + (0.5 * logvar).exp() * eps  # section 2.1's reparameterisation
        return self.decoder(z), z, logvar


def latent_size(channels):
    """D, the latent dimensions."""
    return 16 * (1 + channels // 3)  # section 4.2: 32 of three colours


def build(layers, kind, priors, channels, seed):
    """The untrained VAE of Appendix B. Models of one seed start with equal weights."""
    D = latent_size(channels)
    M, hidden = D, 64
    if layers == "conv":
        M, hidden = D // 4, 128  # M features at each of 2x2 places
    common.seed_weights(seed, f"net {layers}")
    decoder, encoder = Decoder(layers, channels, M), Encoder(kind, layers, channels, M)
    for part in [*decoder.modules(), *encoder.modules()]:
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight)  # section 4.6; biases, flows: PyTorch's
    flows = {prior: Flow(D, hidden, PRIORS[prior]) for prior in priors}
    return VAE(encoder, decoder, flows).to(memory_format=torch.channels_last)


def count_weights(vae):
    """Trainable weights, and what Table 5.6 prints in their place: the sum of all sides."""
    count = sides = 0
    for weight in vae.parameters():
        if weight.requires_grad:
            count += weight.numel()
            sides += sum(weight.shape)
    return count, sides


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
    """From now on the frozen codes of x have means of 0 and deviations of 1."""
    h = frozen_features(encoder, x)
    encoder.shift, encoder.scale = h.mean(0), h.std(0)


def Judge(channels):
    """LeNet-5 with ReLUs and max pooling, a classifier; its last layer sees 84 features."""
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
    """RT (B,), high is good, of z ~ q(z|x) with variance exp(logvar) under a prior.

    Only "corrected" is in nats; "as-published" averages one part over D, not the other.
    """
    u, logdet = prior(z)
    RT = (1 + logvar - u ** 2) / 2  # log N(u; 0, 1) - E log q: both log 2 pi cancel
    if objective == "as-published":
        return RT.mean(1) + logdet  # what the document's tables hold
    if objective == "corrected":
        return RT.sum(1) + logdet  # Eqs. (2.1.1), (4.3.1) without flows; Eq. (4.3.2)
    raise ValueError(f"objective {objective!r} is not as-published or corrected")


def loss_terms(vae, h, x, eps, objective):
    """RE and the RT of each prior, (B,) each; the loss is the mean of RE - sum of RT.

    One sum trains all priors as if each had a VAE of its own: several priors share only a
    frozen encoder, so no gradient of theirs reaches the decoder or each other.
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


def train_step(vae, optimiser, h, x, eps, objective):
    """One step of Adam on a batch. Returns the batch's mean RE and RTs before it, (1 + P,)."""
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
        log[step] = train_step(vae, optimiser, h[i], x[i], eps, objective)
    sizes = torch.full((batches, 1), batch, device=device)
    sizes[-1] = len(x) - batch * (batches - 1)  # the last batch may be smaller
    return (log.view(epochs, batches, len(terms)) * sizes).sum(1) / len(x)


def make(model, seed, x):
    """The untrained VAE of a model; PCA and standardised codes are fitted to images x."""
    vae = build(model.layers, model.encoder, model.priors, x.shape[1], seed).to(x.device)
    with torch.no_grad():
        if model.encoder == "PCA":
            set_components(vae.encoder, x)
        if model.standardised:
            standardise(vae.encoder, x)
    return vae


def load_vae(model, channels, weights, device):
    """The VAE of a model with the weights of a unit."""
    vae = build(model.layers, model.encoder, model.priors, channels, 0).to(device)
    vae.load_state_dict(weights)
    return vae


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
    epoch = IMAGES_PER_EPOCH / BATCH  # steps
    g, D = common.generator(0, "time", x.device), latent_size(x.shape[1])
    for _ in range(rounds):
        for layers, prior, encoder in cells:
            vae = build(layers, encoder, [prior], x.shape[1], 0).to(x.device)
            optimiser = adam(vae)
            for step in range(steps + 1):
                i = torch.randint(len(x), (BATCH,), generator=g, device=x.device)
                eps = torch.randn(BATCH, D, generator=g, device=x.device)
                h = vae.encoder.frozen(x[i])
                means = train_step(vae, optimiser, h, x[i], eps, "as-published")
                if step == 0:  # the first one warms up
                    means.tolist()  # waits for the device
                    start = time.perf_counter()
            means.tolist()
            elapsed = time.perf_counter() - start
            seconds[layers, prior, encoder].append(elapsed / steps * epoch)
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
        mu, _ = encoder(part)
        means.append(mu)
    return torch.cat(means)


def decode(decoder, z):
    """Images of codes (n, D), clipped to [0, 1]."""
    return torch.cat([decoder(part) for part in z.split(1000)]).clamp(0, 1)


@torch.no_grad()
def sample(vae, prior, n, g):
    """n images (n, C, 32, 32) drawn from the prior of this name, and their codes (n, D)."""
    flow = vae.priors[prior]
    u = torch.randn(n, flow.D, generator=g, device=g.device)
    z = flow.inverse(u)  # section 4.5
    return decode(vae.decoder, z), z


def interpolate(decoder, a, b):
    """Straight lines in latent space between codes a and b (n, D). (n, 7, C, 32, 32)"""
    t = torch.linspace(0, 1, 7, device=a.device)[:, None]  # six steps: Table 5.9
    z = (1 - t) * a[:, None] + t * b[:, None]  # (n, 7, D)
    return decode(decoder, z.flatten(0, 1)).unflatten(0, (len(a), 7))


def log_normaliser(x):
    """-log p(x|z) = RE + this, in nats, for p(x|z) = N(x_hat, 1/2)."""
    return x[0].numel() / 2 * math.log(math.pi)


def log_likelihood(decoder, prior, mu, x, steps, g, rate=0.1):
    """Importance-sampled lower bound of log p(x) in nats (N,), p(x|z) = N(x_hat, 1/2).

    Each image has a Gaussian proposal r(z) with a full covariance. It starts at the code mu
    (N, D), a tenth as wide as all codes, and climbs E log p(x, z) / r(z). The rate is halved
    when that bound stops rising; the better the proposals, the tighter the result.
    """
    N, D = mu.shape
    unit = mu.std(0).clamp(min=1e-6)  # (D,): codes differ in scale by a hundredfold
    shift = torch.zeros(N, D, device=x.device, requires_grad=True)
    log_scale = torch.full_like(shift, math.log(0.1), requires_grad=True)
    L_offdiag = torch.zeros(N, D, D, device=x.device, requires_grad=True)

    def log_weight():
        """log p(x, z) - log r(z) of one z drawn from each proposal r. (N,)"""
        eps = torch.randn(N, D, generator=g, device=x.device)
        L = L_offdiag.tril(-1) + log_scale.exp().diag_embed()  # Cholesky factor (N, D, D)
        z = mu + unit * (shift + (L @ eps[:, :, None])[:, :, 0])
        u, logdet = prior(z)
        log_prior = logdet - (u ** 2).sum(1) / 2
        log_r = -(log_scale + unit.log()).sum(1) - (eps ** 2).sum(1) / 2
        log_p = -reconstruction_error(decoder(z), x) - log_normaliser(x)
        return log_p + log_prior - log_r  # both log 2 pi cancel

    optimiser = torch.optim.Adam([shift, log_scale, L_offdiag], rate)
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
        mean = total.item() / steps
        if not math.isfinite(mean):  # it would never stop rising
            raise FloatingPointError("log p(x): the bound is not finite")
        if mean < best + 0.05:
            rate = rate / 2
        best = max(best, mean)
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

    read: the share in which it is sure of a digit; variation: variance, summed over pixels.
    """
    features = torch.cat([judge[:-1](part) for part in x.split(1000)])  # (n, 84)
    p = judge[-1](features).softmax(1)  # (n, 10)
    mean, covariance = moments(features)
    return {"distance": frechet_distance(mean, covariance, *real),
            "read": (p.amax(1) >= SURE).double().mean().item(),
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
    """A work unit: measures and pictures under each of the "priors", and the deviation and
    mean square of the "codes" of training images.

    first: is it the first seed? It is enough for log p(x). net: Inception or None.
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
    rows = {}
    for p, (name, prior) in enumerate(vae.priors.items(), 1):
        images, codes = sample(vae, name, args.samples, new("samples"))
        row = look_at(judge, net, images, real)
        row["RE"], row["RT"] = terms[0], terms[p]
        row["reconstructions"] = eight.cpu()
        row["paths"] = interpolate(vae.decoder, codes[:2], codes[2:4]).cpu()
        if first:
            row["bound"] = bounds[p] - bounds[0] - log_normaliser(x)
            with torch.enable_grad():
                log_p = log_likelihood(vae.decoder, prior, codes_of(vae.encoder, few), few,
                                       args.log_p_steps, new("log p"))
            row["log p of images"] = log_p.cpu()
        rows[name] = row
    scale = {"deviation": z.std(0).cpu(), "square": (z ** 2).mean(0).cpu()}
    return {"priors": rows, "codes": scale}


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
    yardsticks = {"test images (real)": test, "training images (floor)": x[:samples],
                  "the mean image": mean.expand(test.shape)}
    rows = []
    for name, images in yardsticks.items():
        row = look_at(judge, net, images, real)
        del row["pictures"]
        rows.append({"images": name} | {key: round(value, 3) for key, value in row.items()})
    error = reconstruction_error(mean, x_test).mean().item()
    return real | {"rows": rows, "mean image": error, "pictures": test[:20].cpu()}


def predicted_rt(deviation, square, K, objective):
    """RT of frozen codes under the best diagonal map, from their deviation and mean square (D,).

    A dimension passes K / 2 couplings, each of which scales it by less than e, and RT is
    highest where u has a deviation of 1, or of sqrt(D) under the published weights. Real
    flows also decorrelate the codes and may exceed it.
    """
    z = square.sqrt()
    scale = torch.ones_like(z)
    if K > 0:
        z = deviation  # t takes the mean away
        wanted = 1.0
        if objective == "as-published":
            wanted = len(z) ** 0.5
        scale = (wanted / deviation).clamp(max=math.exp(K / 2))

    def diagonal_map(z):
        return scale * z, scale.log().sum()

    logvar = torch.full_like(z, math.log(VARIANCE))
    return regularisation_term(diagonal_map, z[None], logvar[None], objective).item()


# --- statistics -------------------------------------------------------------------------

def anova(y, levels, terms, permutations, g):
    """Analysis of variance of a balanced design: {term: F, df, error df, p}.

    y (n,); levels: {factor: (n,) integers}; terms: tuples of factors, an interaction after
    its factors. p permutes what is left of y when all other terms are taken away (Freedman
    and Lane 1983); it needs no normality.
    """
    n, y = len(y), y.double()
    residual = torch.eye(n, dtype=torch.double) - 1 / n  # projects on what is unexplained
    projections = {}
    for term in terms:
        same = torch.ones(n, n, dtype=torch.double)
        for factor in term:
            same = same * (levels[factor][:, None] == levels[factor])
        cell_means = same / same.sum(1)
        projections[term] = cell_means @ residual
        residual = residual - projections[term]
    error_df = round(residual.trace().item())
    orders = torch.rand(permutations, n, generator=g).argsort(1)
    table = {}
    for term, projection in projections.items():
        df = round(projection.trace().item())
        if df == 0:  # a factor of one level
            continue
        reduced = projection @ y + residual @ y  # without all other terms
        observed = ratio(reduced, projection, residual)
        permuted = ratio(reduced[orders], projection, residual)
        extreme = (permuted >= observed * (1 - 1e-9)).sum()
        table[term] = {"F": (observed * error_df / df).item(), "df": df, "error df": error_df,
                       "p": (1 + extreme.item()) / (1 + permutations)}
    return table


def ratio(y, projection, residual):
    """Sums of squares of y (..., n) in two projections, one by the other."""
    return ((y @ projection) ** 2).sum(-1) / ((y @ residual) ** 2).sum(-1)


def t4_within(t):
    """P(|T| <= t) of Student's T with 4 degrees of freedom, those of five seeds."""
    r = t / (4 + t * t) ** 0.5
    return r * (1 + (1 - r * r) / 2)


# --- plot -------------------------------------------------------------------------------

TITLES = {"fc": "FC", "conv": "Conv", "normal": "Normal", "flow2": "Flow (2)",
          "flow6": "Flow (6)"}
NUMBERS = {"negative ELBO": "Table 5.1", "RT": "Table 5.2", "RE": "Table 5.3",
           "FID": "Table 5.4", "distance": "Beside Table 5.4", "seconds": "Table 5.5",
           "weights": "Table 5.6", "reconstructions": "Table 5.7", "samples": "Table 5.8",
           "paths": "Table 5.9"}


def number_of(name, document):
    """The document's table of a measure or of pictures; of SVHN it has a single one."""
    if document is SVHN:
        return "Table 5.10"
    return NUMBERS[name]


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


def plot_scale(scores, real):
    """Twenty images of each conv model with a frozen encoder; scores: {model: result}."""
    shown = {}
    for encoder in ("NL", "RKS"):
        for model, found in scores.items():
            if (model.layers, model.encoder) != ("conv", encoder):
                continue
            if model.standardised:
                shown[f"{encoder}: codes standardised"] = found["priors"]["normal"]
                continue
            for prior, row in found["priors"].items():
                shown[f"{encoder}: {TITLES[prior]}"] = row
    shown["real images"] = real
    sheet = torch.stack([row["pictures"][:20] for row in shown.values()])
    fig, (ax,) = common.panels(1, 1, 9.2, 0.34 * len(shown))
    common.image_sheet(ax, sheet, list(shown))
    return fig


def plot(run, cells, scores, document, real):
    """All figures, of the first seed. cells: {cell: model}; scores: {model: result}."""
    sheets = {"reconstructions": {}, "samples": {}, "paths": {}}
    for cell, model in cells.items():
        _, prior, _ = cell
        found = scores[model]["priors"][prior]
        sheets["reconstructions"][cell] = found["reconstructions"]
        sheets["samples"][cell] = found["pictures"][:10].unflatten(0, (2, 5))
        sheets["paths"][cell] = found["paths"]
    for name, title, height in (
            ("reconstructions", "test images (top), reconstructed (bottom)", 0.64),
            ("samples", "generated images", 0.97),
            ("paths", "interpolations between generated images", 0.64)):
        title = f"{number_of(name, document)}: {title}"
        run.figure(plot_sheets(sheets[name], height), name, title)
    if any(model.layers == "conv" and model.encoder in FROZEN for model in scores):
        run.figure(plot_scale(scores, real), "scale", "Conv, frozen encoders: samples by prior")


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
    """A claim: in each pair, models of the first levels have less of the measure."""
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


ORDERS = [  # sections 5.1 and 6
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
          "1.26 < 12.0"),
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
ONE_WAY = [("encoder",)], {"encoder": "F(3, 19) > 21.76"}
ANALYSES_SVHN = dict.fromkeys(["negative ELBO", "RT", "RE", "distance", "seconds"], ONE_WAY)


def published(document, key, measure):
    """Mean and std of the document's five seeds."""
    place = 2 * COLUMNS.index(measure)
    return document[key][place], document[key][place + 1]


def mean_of(at, measure, levels):
    """Mean over all cells that have these levels, of each seed. (S,)"""
    some = [found[measure] for key, found in at.items() if set(levels) <= set(key)]
    return torch.stack(some).mean(0)


def distance_of(at):
    """The measure in place of Table 5.4's: the FID, where it is computed."""
    if "FID" in next(iter(at.values())):
        return "FID"
    return "distance"


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
    orders, distance = ORDERS, distance_of(at)
    if document is SVHN:
        orders = ORDERS_SVHN
    for claim, measure, pairs, word in orders:
        rows, known = [], earned or measure == "seconds"  # seconds need no learning
        if measure in ("distance", "unread", "variation"):
            known = earned and read
        if measure == "distance":
            claim, measure = claim.replace("distance", distance), distance
        for low, high in pairs:
            less, more = mean_of(at, measure, low), mean_of(at, measure, high)
            rows.append(common.ordered(claim, less, more, known, word))
        if len(rows) > 1:
            rows = [common.throughout(claim, rows, word)]
        table += rows
    if document is DOCUMENT:
        table += claims_about_samples(at, distance, earned and (read or distance == "FID"))
        full, half = at["conv", "flow6", "L"]["seconds"], at["conv", "flow6", "PNL"]["seconds"]
        table.append(common.ordered("conv, flow6: PNL saves 15 % of the time", half,
                                    0.85 * full, document="16.5 %"))
    return table


def claims_about_figures(at, document, earned, repeats):
    """Rows of the document's tables: how many are met, Conv, Flow (6), and weights."""
    table = []
    for measure in COLUMNS[:4]:
        if measure not in next(iter(at.values())):  # the FID
            continue
        count = 0
        for key, found in at.items():
            theirs, std = published(document, key, measure)
            count += abs(found[measure].mean() - theirs) <= max(2 * std, 0.01)
        # a perfect reproduction misses some, too: both means are of a few seeds
        chance = t4_within(2 / (1 / repeats + 1 / 5) ** 0.5)
        expected, sd = chance * len(at), (len(at) * chance * (1 - chance)) ** 0.5
        verdict = "differs"
        if count >= expected - 2 * sd:
            verdict = "reproduced" if earned else "open"
        table.append(dict(claim=f"{measure}: models within two std",
                          document=f"{len(at)} of {len(at)}",
                          here=f"{count} (expected {expected:.1f})", verdict=verdict))
    for encoder in ENCODERS:
        key = "conv", "flow6", encoder
        if key in at:
            for measure, better in (("RE", "lower"), ("RT", "higher")):
                theirs, std = published(document, key, measure)
                table.append(common.reproduced(
                    f"conv, flow6, {encoder}: {measure} (± {std})", theirs,
                    at[key][measure], max(std, 0.01), better, earned=earned))
    wrong = sum(found["weights"] != document[key][-1] for key, found in at.items())
    table.append(common.reproduced("weights that differ from the document's", 0, wrong, 0))
    return table


def claims_about_samples(at, name, earned):
    """Rows of the distance (or FID), name, that compare what six flows gain."""
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
    return table


# --- tables -----------------------------------------------------------------------------

SCALE_COLUMNS = ["layers", "encoder", "RE", "normal", "standardised", "flow2", "flow6"]


def table_of(at, measure, theirs):
    """One measure in the document's layout, its own means in brackets."""
    table = []
    for key, found in at.items():
        layers, prior, encoder = key
        cell = common.show(found[measure])
        if measure == "weights":
            cell = f"{found['true weights']:,} [{found['weights']}]"
        elif measure in COLUMNS and key in theirs:
            mean, _ = published(theirs, key, measure)
            cell += f" [{mean:.2f}]"
        head = {"layers": layers, "prior": prior}
        if not table or not head.items() <= table[-1].items():
            table.append(head)
        table[-1][encoder] = cell
    return table


def over_priors(at, measure):
    """{(layers, encoder): mean over the priors, of each seed (S,)}"""
    pairs = dict.fromkeys((layers, encoder) for layers, _, encoder in at)
    return {pair: mean_of(at, measure, pair) for pair in pairs}


def anova_of_cells(cells, factors, terms, g):
    """anova of {levels of the factors: repeats (S,)}."""
    y = torch.stack(list(cells.values()))  # (cells, S)
    levels = {}
    for place, factor in enumerate(factors):
        names = sorted({key[place] for key in cells})
        numbers = torch.tensor([names.index(key[place]) for key in cells])
        levels[factor] = numbers.repeat_interleave(y.shape[1])
    return anova(y.flatten(), levels, terms, PERMUTATIONS, g)


def analysis_table(at, document, theirs, g):
    """Analyses of variance beside the document's.

    Terms without the prior are tested on means over the priors, since a frozen encoder's
    cells share one decoder, split and noise and so are near copies of each other.
    """
    table, analyses = [], ANALYSES
    if document is SVHN:
        analyses = ANALYSES_SVHN
    for measure, (terms, F_values) in analyses.items():
        name = measure
        if measure == "distance":
            name = distance_of(at)
        alone = [term for term in terms if "prior" not in term]
        means = anova_of_cells(over_priors(at, name), ["layers", "encoder"], alone, g)
        cells = {key: found[name] for key, found in at.items()}
        full = anova_of_cells(cells, ["layers", "prior", "encoder"], terms, g)
        for term in terms:
            found = means.get(term)
            if "prior" in term:
                found = full.get(term)
            if found is None:  # a factor of one level
                continue
            effect = " x ".join(term)
            row = {"measure": name, "term": effect,
                   "here": f"F({found['df']}, {found['error df']}) = {found['F']:.2f}",
                   "p": f"{found['p']:.2g}"}
            if theirs:
                row["document"] = F_values.get(effect, "")
            table.append(row)
    return table


def predicted_table(at, codes, theirs, objective):
    """RT of the frozen encoders: by theory, as trained here, in the document."""
    table = []
    for cell, found in at.items():
        layers, prior, encoder = cell
        if encoder not in FROZEN:
            continue
        scales = codes[layers, encoder]
        values = [predicted_rt(one["deviation"], one["square"], PRIORS[prior], objective)
                  for one in scales]
        deviations = [one["deviation"].mean() for one in scales]
        row = {"layers": layers, "prior": prior, "encoder": encoder,
               "codes' std": common.show(deviations), "predicted": common.show(values),
               "here": common.show(found["RT"])}
        if theirs:
            mean, std = published(theirs, cell, "RT")
            row["document"] = f"{mean} ± {std}"
        table.append(row)
    return table


def scale_table(scores):
    """How samples depend on the scale of codes and prior: distance (share read)."""
    table = {}
    for model, found in scores.items():
        key = model.layers, model.encoder
        row = table.setdefault(key, dict.fromkeys(SCALE_COLUMNS, ""))
        row["layers"], row["encoder"] = key
        for column, measures in found["priors"].items():
            if model.standardised:
                column = "standardised"
            elif not row["RE"]:
                row["RE"] = f"{measures['RE']:.1f}"
            row[column] = f"{measures['distance']:.0f} ({measures['read']:.2f})"
    return list(table.values())


def log_p_table(scores):
    """Lower bound of log p(x) (that by q(z|x)) in nats, means over images."""
    table = {}
    for model, result in scores.items():
        if model.standardised:
            continue
        for prior, found in result["priors"].items():
            head = {"layers": model.layers, "prior": prior}
            row = table.setdefault((model.layers, prior), head)
            mean = found["log p of images"].mean()
            row[model.encoder] = f"{mean:.1f} ({found['bound']:.0f})"
    return list(table.values())


def tables_of(args, scores, at, codes, document, theirs, real):
    """{title: rows}: the document's tables, and what it lacks; scores: the first seed's."""
    tables, beyond = {}, "Beyond the document: "
    for measure in ("negative ELBO", "RT", "RE", "FID", "distance", "seconds", "weights"):
        if measure in next(iter(at.values())):
            title = f"{number_of(measure, document)}: {measure}"
            if measure == "weights":
                title += " [as the document counts: sides of tensors added up]"
            elif measure in COLUMNS and theirs:
                title += " [document]"
            tables[title] = table_of(at, measure, theirs)
    if args.seeds > 1:
        g = common.generator(0, "permutations")
        section = "Section 5.1"
        if document is SVHN:
            section = "Section 5.2"
        title = f"{section}: analyses of variance, p by permutation"
        tables[title] = analysis_table(at, document, theirs, g)
    title = "RT of frozen encoders by the best diagonal map, untrained"
    tables[beyond + title] = predicted_table(at, codes, theirs, args.objective)
    tables[beyond + "it is the scale: distance (share read) by prior"] = scale_table(scores)
    title = "importance-sampled lower bound of log p(x) (that by q(z|x)), in nats"
    tables[beyond + title] = log_p_table(scores)
    title = f"yardsticks (RE of the mean image: {real['mean image']:.1f})"
    tables[beyond + title] = real["rows"]
    return tables


def collect(cells, seeds, trained, scores, seconds, channels):
    """{cell: measures (S,)} and {(layers, encoder): the scale of its codes by seed}."""
    at, codes = {}, {}
    for cell, model in cells.items():
        layers, prior, encoder = cell
        rows, scales = [], []
        for seed in seeds:
            unit = f"seed{seed}-{model}"
            log = trained[unit]["log"][-1]
            found = scores[f"{unit}-scores"]
            RT = log[1 + model.priors.index(prior)]
            rows.append(measures_of(found["priors"][prior], log[0], RT))
            scales.append(found["codes"])
        measures = common.over_repeats(rows)
        vae = build(layers, encoder, [prior], channels, 0)
        measures["true weights"], measures["weights"] = count_weights(vae)
        measures["seconds"] = torch.tensor(seconds[cell])  # of rounds, not of seeds
        at[cell] = measures
        codes[layers, encoder] = scales
    return at, codes


def measures_of(found, RE, RT):
    """Numbers of one cell and seed; RE, RT: of the last epoch of training."""
    names = ["RE", "RT", "distance", "FID", "read", "variation"]
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
    add("--encoder", nargs="+", choices=ENCODERS, default=ENCODERS,
        help="encoders to train")
    add("--layers", nargs="+", choices=LAYERS,
        help="nets to train, if not all (of three colours: conv)")
    add("--prior", nargs="+", choices=list(PRIORS),
        help="priors to train, if not all (of three colours: flow6)")
    add("--objective", choices=["as-published", "corrected"], default="as-published",
        help="the document's RT, or that of the evidence lower bound, without its figures")
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
            parser.error(f"argument --{flag}: {args.dataset} has {', '.join(known)} alone")
    return args


def models_of(args):
    """The models to train for each seed, and those beyond the document, for the first."""
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


def cells_of(models, document):
    """{(layers, prior, encoder): the model that covers it}, in the order of the tables."""
    found = {}
    for model in models:
        for prior in model.priors:
            found[model.layers, prior, model.encoder] = model
    return {cell: found[cell] for cell in document if cell in found}


def tasks_of(models, more, seeds):
    """{work unit: (seed, model)}"""
    tasks = {}
    for seed in seeds:
        for model in models:
            tasks[f"seed{seed}-{model}"] = seed, model
    for model in more:
        tasks[f"seed{seeds[0]}-{model}"] = seeds[0], model
    return tasks


def both_parts(args):
    """The images x that the seeds divide, and the judge's own (x, y); too few are one line."""
    n = args.train_images * 7 // 5
    count = n + args.test_images
    x, _ = load_data(args.dataset, True, count, args.data, args.device)
    digits = load_data(args.dataset, False, count, args.data, args.device)
    if len(x) < n + 100:
        common.die(f"argument --train-images: {args.train_images}, and 0.4 of that for "
                   f"validation, leave less than 100 of {args.dataset}'s {len(x)} to test")
    return x, digits


def judge_of(run, args, digits, channels):
    """The judge, trained on images that no VAE sees."""
    g = common.generator(args.seed, "judge", args.device)
    torch.manual_seed(g.initial_seed())
    judge = Judge(channels).to(args.device)
    found = run.unit("judge", lambda: train_judge(judge, *digits, args.judge_steps, g))
    judge.load_state_dict(found["weights"])
    return judge.requires_grad_(False)


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    net = None
    if args.fid:
        net = inception(args.device)
    x, digits = both_parts(args)
    channels = x.shape[1]
    document = DOCUMENT
    if channels == 3:
        document = SVHN
    theirs = document
    if args.objective == "corrected":
        theirs = {}  # the document has no figures of this objective
    additive = ["encoder", "layers", "prior", "seeds"]
    with common.Run(__file__, args, f"{args.dataset} 32x32, {args.objective}",
                    additive=additive) as run:
        seeds = list(range(args.seed, args.seed + args.seeds))
        models, more = models_of(args)
        cells, tasks = cells_of(models, document), tasks_of(models, more, seeds)
        judge = judge_of(run, args, digits, channels)

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
            vae = load_vae(model, channels, trained[unit]["weights"], args.device)
            return score_unit(vae, seed, *data(seed), judge, net,
                              reals[f"seed{seed}-real"], args, first=seed == args.seed)

        scores = run.units([f"{unit}-scores" for unit in tasks], score_one)
        name = "-".join(["seconds", *args.layers, *args.prior, *args.encoder])
        seconds = run.unit(name, lambda: time_epochs(cells, x, args.rounds, args.timed_steps))

        at, codes = collect(cells, seeds, trained, scores, seconds, channels)
        real = reals[f"seed{args.seed}-real"]
        firsts = {model: scores[f"seed{args.seed}-{model}-scores"] for model in models + more}
        plot(run, cells, firsts, document, real)
        closing = []
        if theirs:
            earned = learned(at, latent_size(channels), real["mean image"])
            read = real["rows"][0]["read"] > 0.8  # the share of real images
            closing = claims(at, document, earned, read, args.seeds)
        tables = tables_of(args, firsts, at, codes, document, theirs, real)
        results = {"-".join(cell): found for cell, found in at.items()}
        results["mean image"] = real["mean image"]
        judged = args.preset != "smoke" and args.seeds > 1  # something learned, and a spread
        return run.finish(results, closing, tables, metrics_of(tasks, trained), judged)


if __name__ == "__main__":
    main()
