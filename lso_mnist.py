"""Latent space optimisation: a classifier draws digits through an autoencoder's decoder.

Reproduces G. Nothnagel, "Combining Autoencoders and Classifiers for Latent Space
Optimization" (2024), on MNIST at 14x14. Decoder and classifier are trained apart, frozen and
put in a row. A random latent point v then moves until the classifier sees the digit:

    E(v) = sum_j (classifier(decoder(v))_j - onehot_j)^2, v <- v + D C / |D|^2, D = dE/dv

    python lso_mnist.py                          3 seeds: about 2 minutes on 2 CPU cores
    python lso_mnist.py --dataset glyphs --out out/glyphs   offline, without verdicts
    torchrun --nproc_per_node 2 lso_mnist.py     the units shared by two processes

A run leaves figures, tables, logs and nets (units/*.pt) in its folder. Our choices:
* C = -0.01 and 240 steps were chosen to meet its success of 64 % (LSO-1) and 82 % (LSO-2).
  LSO-2 comes near (0.89), LSO-1 stays near 0.5 at any step limit. No rule for C meets both:
  these two rows are no evidence.
* Adam trains. The document trains by Algorithm 3, with a C that it does not state. So do nets
  "-A3"; their C was chosen for a low error and falls to 0. "-A3-tenth" has C / 10.
* Rates and steps of training decide the rows of MSE: "better" there means longer training.
* Success: E <= 0.01, its ".001 MSE". Figure 6's caption has another reading, MSE .01.
* A digit has 5 attempts; in the document as many as it needs. Its "almost never fails" is
  success above 0.95 here.
* Guard: no step is longer than a tenth of the starts' RMS distance from their centre.
* Codes are linear. Starts are independent normals with the means and standard deviations of
  the training codes (or pixels, for "input"); N(0, 1) in VAE and GAN.
* "input" moves pixels without bounds: the document says nothing of clipping. "bounded" keeps
  v in a box: of pixels [0, 1], of codes the range of the training codes.
* Its VAE and GAN pictures are of other papers. Ours are draws that the classifier takes
  for the digit. The VAE is LSO-2 with a KL, at its rate and on its batches.
"""
import math
from typing import NamedTuple

import common  # before torch: from here on Ctrl-C is one line
import torch
import torch.nn.functional as F
from torch import nn

# Shapes: S seeds, B images of a batch, K latent units (or pixels), T steps of a search.
# A search makes G generations with A attempts each, all side by side: N = A * G starts.
PRESETS = {
    "smoke": dict(dataset="glyphs", seeds=2, train_steps=300, generations=20, steps=110,
                  sizes=[2]),
    "quick": dict(seeds=3, train_steps=2000, generations=100, steps=240, sizes=[2, 5, 10, 50]),
    "paper": dict(seeds=20, train_steps=2000, generations=100, steps=240,
                  sizes=[1, 2, 3, 5, 7, 10, 14, 30, 50, 70, 100])}
SIDE, PIXELS = 14, 196     # Figure 1
BATCH = 100
BETA = 0.2                 # weight of the VAE's KL, per nat
R1 = 0.3                   # weight of the GAN's gradient penalty
THRESHOLD = 0.01           # of E, section 5; ".001 MSE" over 10 outputs is the same
C = -0.01                  # wanted change of E in a step
GUARD = 0.1                # longest step; unit: the starts' RMS distance from their centre
ATTEMPTS = 5               # starts for a generation, at most
POOL = 20_000              # draws of a prior, for all generations together


class Net(NamedTuple):
    """A net that is trained once for each seed."""
    kind: str
    k: int = 0                 # latent units
    images: int = 10_000       # section 5.1
    rate: float = 5e-3         # of Adam; of Algorithm 3: the wanted drop -C of the loss
    algorithm_3: bool = False


class Search(NamedTuple):
    """How a digit is looked for: Algorithm 3, and what is changed in it."""
    C: float = C               # wanted change of E in a step ...
    relative: bool = False     # ... or, if True, that change divided by E
    longer: int = 1            # factor on --steps
    guard: float = GUARD
    threshold: float = THRESHOLD
    bounded: bool = False      # is v kept in a box?
    attempts: int = 1


NETS = {"classifier": Net("classifier", rate=2e-2),
        "classifier-A3": Net("classifier", rate=0.1, algorithm_3=True),
        "LSO-1": Net("autoencoder", 5, 1000, rate=2e-3),
        "LSO-2": Net("autoencoder", 20),
        "LSO-2-A3": Net("autoencoder", 20, rate=3.0, algorithm_3=True),
        "LSO-2-A3-tenth": Net("autoencoder", 20, rate=0.3, algorithm_3=True),
        "VAE": Net("vae", 20),
        "GAN": Net("gan", 20, rate=2e-3)}
JUDGE = Net("judge", rate=3e-3)  # trained on 50,000 images of its own
RULES = {"constant": Search(attempts=ATTEMPTS),
         "patient": Search(longer=4),
         "fine": Search(C=C / 5, longer=5),
         "Polyak": Search(C=-1, relative=True),  # the step to E = 0
         "proportional": Search(C=-0.1, relative=True)}
OTHERS = {"no guard": Search(guard=math.inf, attempts=ATTEMPTS),
          "MSE .01": Search(threshold=0.1),
          "bounded": Search(bounded=True, attempts=ATTEMPTS)}
STUDIED = ["LSO-1", "LSO-2", "input"]  # the document's own, under all rules
METHODS = [("input", "constant"), ("input", "bounded"), ("LSO-1", "constant"),
           ("LSO-2", "constant"), ("LSO-2", "no guard"), ("LSO-2", "draws"),
           ("VAE", "constant"), ("VAE", "draws"), ("GAN", "constant"),
           ("GAN", "draws")]  # rows of Figure 6
NET_COLUMNS = ["accuracy", "E ≤ 0.01", "train", "test", "PCA train", "PCA test", "mean"]
# read by the judge as wanted; E <= threshold in up to 5 attempts; attempts; draws until one
# is accepted; RMS change of a pixel; pixels outside of [0, 1]; E <= 0.01 once clipped to it
SEARCH_COLUMNS = ["read", "solved", "attempts", "draws", "moved", "outside", "clipped"]
# A leap is a step longer than the guard, or one that the guard shortens: E is flat there.
# Starts that succeed; that leap; the longest step as it would be without a guard; leaps
# after which E is lower (mean over the starts that leap)
LEAP_COLUMNS = ["success", "leaps", "longest", "lower"]


# --- data -------------------------------------------------------------------------------

def load_data(dataset, folder, device):
    """{split: (x (n, 196) in [0, 1], y (n,))}: nets and judge share no image."""
    if dataset == "glyphs":
        x, y = common.glyphs(14_000, 0, device=device)
        tests = 2000
    else:
        x, y = common.images(dataset, True, folder, device)
        x_test, y_test = common.images(dataset, False, folder, device)
        x, y, tests = torch.cat([x, x_test]), torch.cat([y, y_test]), len(y_test)
    x = F.avg_pool2d(x, 2).flatten(1)  # (n, 1, 28, 28) -> (n, 196)
    end = len(x) - tests
    return {"nets": (x[:10_000], y[:10_000]), "judge": (x[10_000:end], y[10_000:end]),
            "test": (x[end:], y[end:])}


# --- model ------------------------------------------------------------------------------

class Autoencoder(nn.Module):
    """196-100-K-100-196 (Figure 1): x (B, 196) in [0, 1] to x_hat; widths are ours."""

    def __init__(self, k):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(196, 100), nn.Sigmoid(), nn.Linear(100, k))
        self.decoder = nn.Sequential(
            nn.Linear(k, 100), nn.Sigmoid(), nn.Linear(100, 196), nn.Sigmoid())

    def forward(self, x):
        return self.decoder(self.encoder(x))


class VAE(nn.Module):
    """The autoencoder, whose encoder puts out mean and log variance of each code."""

    def __init__(self, k):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(196, 100), nn.Sigmoid(), nn.Linear(100, 2 * k))
        self.decoder = nn.Sequential(
            nn.Linear(k, 100), nn.Sigmoid(), nn.Linear(100, 196), nn.Sigmoid())

    def forward(self, x, eps):
        """x (B, 196) and standard normal eps (B, K) to x_hat, mu, logvar."""
        mu, logvar = self.encoder(x).chunk(2, 1)  # (B, 2 K) -> (B, K) each
        z = mu + (0.5 * logvar).exp() * eps
        return self.decoder(z), mu, logvar


class GAN(nn.Module):
    """A generator, named decoder as LSO needs it, and a discriminator (B, 196) -> (B, 1)."""

    def __init__(self, k):
        super().__init__()
        self.decoder = nn.Sequential(  # (B, K) -> (B, 196) in [0, 1]
            nn.Linear(k, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 196), nn.Sigmoid())
        self.discriminator = nn.Sequential(
            nn.Linear(196, 256), nn.LeakyReLU(0.2),
            nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1))


def Classifier():
    """196-64-10 (Figure 2; the width is ours): (B, 196) -> (B, 10) in [0, 1], one a digit."""
    return nn.Sequential(nn.Linear(196, 64), nn.Sigmoid(), nn.Linear(64, 10), nn.Sigmoid())


def Judge():
    """A convolutional classifier (B, 196) -> logits (B, 10), which no search has seen."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 14, 14)),
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),  # (B, 16, 7, 7)
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # (B, 32, 3, 3)
        nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10))


def build(name, net, seed):
    """The untrained net of a seed."""
    common.seed_weights(seed, f"net {name}")
    if net.kind == "classifier":
        return Classifier()
    if net.kind == "judge":
        return Judge()
    builders = {"autoencoder": Autoencoder, "vae": VAE, "gan": GAN}
    return builders[net.kind](net.k)


# --- objective --------------------------------------------------------------------------

def total_squared_error(output, digits):
    """E: squared distance from one-hot. (B, 10), (B,) -> (B,)"""
    return ((output - F.one_hot(digits, 10)) ** 2).sum(1)  # section 5


def reconstruction_error(x_hat, x):
    """Squared error, summed over pixels, mean over the batch. (B, 196) each -> ()"""
    return ((x_hat - x) ** 2).sum(1).mean()


def kl_to_standard(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats, mean over the batch. (B, K) each -> ()"""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(1).mean()


def vae_loss(net, x, eps, beta):
    """Squared error + beta KL; x (B, 196), standard normal eps (B, K) -> ()."""
    x_hat, mu, logvar = net(x, eps)
    # beta times the negative ELBO of a Gaussian decoder of variance beta / 2
    return reconstruction_error(x_hat, x) + beta * kl_to_standard(mu, logvar)


def discriminator_loss(net, x, z, r1):
    """Logistic loss of real x (B, 196) and of fakes from z (B, K), + r1/2 |dD/dx|^2."""
    x = x.detach().requires_grad_()
    real, fake = net.discriminator(x), net.discriminator(net.decoder(z).detach())
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, 196)
    penalty = (slope ** 2).sum(1).mean()  # R1 (Mescheder et al. 2018): both nets settle
    return F.softplus(-real).mean() + F.softplus(fake).mean() + r1 / 2 * penalty


def generator_loss(net, z):
    """The non-saturating loss of the fakes from z (B, K) -> ()."""
    return F.softplus(-net.discriminator(net.decoder(z))).mean()


# --- train ------------------------------------------------------------------------------

class NormalisedDescent(torch.optim.Optimizer):
    """Algorithm 3 on parameters; the rate is -C, the wanted drop of the loss."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        S, moved = 0, []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    S = S + (param.grad ** 2).sum()
                    moved.append((param, group["lr"]))
        for param, rate in moved:
            param -= param.grad * rate / S.clamp(min=1e-30)


def train(name, net, loss, x, y, steps, optimiser, g, noise):
    """Minimise loss(x, y) over batches drawn from g; the loss may draw from noise. Its log."""
    rate = optimiser.param_groups[0]["lr"]
    log = torch.zeros(steps, 1, device=x.device)
    for step in common.steps(name, steps, log, ["loss"], net, optimiser, g, noise):
        # constant over the first half, then falling to 0
        optimiser.param_groups[0]["lr"] = rate * min(1, 2 * (1 - step / steps))
        i = torch.randint(len(x), (BATCH,), generator=g, device=x.device)
        value = loss(x[i], y[i])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        log[step, 0] = value.detach()
    return log


def train_gan(name, net, x, k, steps, rate, r1, g):
    """Discriminator and generator in turn; the rate as above. The log of both losses."""
    adam = dict(lr=rate, betas=(0.5, 0.99), fused=True)  # a moving target: less momentum
    optimiser_d = torch.optim.Adam(net.discriminator.parameters(), **adam)
    optimiser_g = torch.optim.Adam(net.decoder.parameters(), **adam)
    terms = ["discriminator", "generator"]
    log = torch.zeros(steps, 2, device=x.device)
    for step in common.steps(name, steps, log, terms, net, optimiser_d, optimiser_g, g):
        for optimiser in (optimiser_d, optimiser_g):
            optimiser.param_groups[0]["lr"] = rate * min(1, 2 * (1 - step / steps))
        i = torch.randint(len(x), (BATCH,), generator=g, device=x.device)
        z = torch.randn(BATCH, k, generator=g, device=x.device)
        loss_d = discriminator_loss(net, x[i], z, r1)
        optimiser_d.zero_grad()
        loss_d.backward()
        optimiser_d.step()
        z = torch.randn(BATCH, k, generator=g, device=x.device)
        loss_g = generator_loss(net, z)
        optimiser_g.zero_grad()
        loss_g.backward()  # its gradients of the discriminator are cleared above
        optimiser_g.step()
        log[step] = torch.stack([loss_d, loss_g]).detach()
    return log


def train_net(unit, name, net, seed, data, steps, device):
    """A work unit: the net trained, its weights and its log in at most 100 blocks."""
    model = build(name, net, seed).to(device)
    g = common.generator(seed, "batches", device)  # equal for autoencoder and VAE
    noise = common.generator(seed, "noise", device)
    x, y = data["nets"]
    x, y = x[:net.images], y[:net.images]
    if net.kind == "judge":
        x, y = data["judge"]

    def loss(x, y):
        if net.kind == "classifier":
            return total_squared_error(model(x), y).mean()
        if net.kind == "judge":
            return F.cross_entropy(model(x), y)
        if net.kind == "vae":
            eps = torch.randn(len(x), net.k, generator=noise, device=device)
            return vae_loss(model, x, eps, BETA)
        return reconstruction_error(model(x), x)

    if net.kind == "gan":
        log = train_gan(unit, model, x, net.k, steps, net.rate, R1, g)
    else:
        optimiser = torch.optim.Adam(model.parameters(), net.rate, fused=True)
        if net.algorithm_3:
            optimiser = NormalisedDescent(model.parameters(), net.rate)
        log = train(unit, model, loss, x, y, steps, optimiser, g, noise)
    return {"weights": model.state_dict(), "log": common.in_blocks(log)}


# --- latent space optimisation ----------------------------------------------------------

def algorithm_3(error, v, C, steps, threshold, guard, relative=False, box=None):
    """Algorithm 3 of Nothnagel (2024) on starts v (N, K), all side by side.

    error: v -> E (N,), row by row. A step v <- v + D C / S with D = dE/dv and S = |D|^2
    changes E by C < 0 to first order, if relative by C E. No step is longer than guard, in
    units of v. box: None, or ends (low, high), (K,) each, between which v is kept. A start
    rests once E <= threshold. Returns v (N, K), E (T + 1, N) before each step and at the
    end, and the steps' lengths (T, N) as they would be without guard; 0 at rest.
    """
    errors, lengths = [], []
    moving = torch.ones(len(v), dtype=torch.bool, device=v.device)
    for step in range(steps + 1):  # once more than steps: the last v has its E, too
        if box is not None:
            v = v.clamp(box[0], box[1])
        v = v.detach().requires_grad_()  # a new leaf: no graph grows along the way
        E = error(v)
        (D,) = torch.autograd.grad(E.sum(), v)  # (N, K), by Algorithms 1 and 2
        E = E.detach()
        errors.append(E)
        moving = moving & (E > threshold)
        if step == steps:
            break
        if step % 20 == 19 and not moving.any():  # seldom: a GPU stops to answer this
            break
        wanted = C * E if relative else torch.full_like(E, C)
        S = (D ** 2).sum(1).clamp(min=1e-30)  # "squared sum"; the bound is for D = 0
        change = D * (wanted / S)[:, None]
        length = change.norm(dim=1)  # (N,), |C| / |D|: long where E is flat
        change = change * (guard / length).clamp(max=1)[:, None]
        v = torch.where(moving[:, None], v + change, v)
        lengths.append(length * moving)
    return v.detach(), torch.stack(errors), torch.stack(lengths)


def combined_error(v, decoder, classifier, digits):
    """Figure 3, decoder and classifier in a row: E of v (N, K) for digits (N,) -> (N,)."""
    return total_squared_error(classifier(decoder(v)), digits)


def run_search(how, decoder, classifier, starts, digits, box, steps, radius):
    """Look for the digits (G,) from starts (A, G, K), a row of them for each attempt.

    radius: the unit of lengths, the RMS distance of starts from their centre. Returns a
    dict of tensors (G,), but for images (G, 196) and start (G, K).
    Of each digit's first attempt that succeeds, else its last:
      images (clipped to [0, 1]), start, solved, attempts, moved, outside, "E, clipped"
    Of its first attempt: success, longest (step, as it would be without a guard), and
      lower: the share of its leaps after which E is lower, nan where it does not leap
    """
    starts = starts[:how.attempts]
    attempts, G, _ = starts.shape
    v = starts.flatten(0, 1)  # (N, K)
    wanted = digits.repeat(attempts)  # (N,)
    if how.bounded:
        v = v.clamp(box[0], box[1])  # here, so that moved does not count it
    else:
        box = None

    def error(v):
        return combined_error(v, decoder, classifier, wanted)

    end, errors, lengths = algorithm_3(error, v, how.C, how.longer * steps, how.threshold,
                                       how.guard * radius, how.relative, box)
    lengths = lengths[:, :G] / radius  # (T, G), of first attempts
    leaps = lengths > GUARD
    helps = errors[1:, :G] < errors[:-1, :G]  # is E lower after the step?
    success = (errors[-1] <= how.threshold).view(attempts, G)
    solved = success.any(0)
    attempt = torch.where(solved, success.int().argmax(0), attempts - 1)  # first, else last
    chosen = attempt * G + torch.arange(G, device=v.device)
    start = v[chosen]
    x = decoder(end[chosen])
    clipped = x.clamp(0, 1)  # free pixels leave [0, 1]
    return {"images": clipped, "start": start, "solved": solved, "attempts": attempt + 1,
            "moved": (x - decoder(start)).square().mean(1).sqrt(),  # RMS over pixels
            "outside": (x != clipped).float().mean(1),
            "E, clipped": total_squared_error(classifier(clipped), digits),
            "success": success[0], "longest": lengths.amax(0),
            "lower": (leaps & helps).sum(0) / leaps.sum(0)}


def draw(decoder, classifier, z, digits):
    """Rejection sampling: for each of digits (G,) a draw of the prior with E <= THRESHOLD.

    All are of one pool z (n, K), in its order; where too few are accepted, the draw of
    least E stands for the digit. Returns images (G, 196), their E (G,), solved (G,), and
    how many draws each digit needs for one that is accepted (10,), inf if none was.
    """
    x = decoder(z)  # (n, 196)
    output = classifier(x)
    images = torch.zeros(len(digits), PIXELS, device=z.device)
    errors = torch.zeros(len(digits), device=z.device)
    solved = torch.zeros(len(digits), dtype=torch.bool, device=z.device)
    counts = torch.zeros(10)
    for digit in range(10):
        E = total_squared_error(output, torch.full((len(z),), digit, device=z.device))
        accepted = (E <= THRESHOLD).nonzero()[:, 0]
        counts[digit] = len(accepted)
        places = (digits == digit).nonzero()[:, 0]
        taken = torch.cat([accepted, E.argmin().repeat(len(places))])[:len(places)]
        images[places] = x[taken]
        errors[places] = E[taken]
        solved[places[:len(accepted)]] = True
    return {"images": images, "E, clipped": errors, "solved": solved, "draws": len(z) / counts}


def walk(decoder, classifier, v, digit, steps, guard):
    """The way of one start v (1, K) to a digit: images (T + 1, 196) and E (T + 1,)."""
    wanted = torch.tensor([digit], device=v.device)

    def error(v):
        return combined_error(v, decoder, classifier, wanted)

    images, errors = [decoder(v)], [error(v)]
    while len(errors) <= steps and errors[-1] > THRESHOLD:
        v, E, _ = algorithm_3(error, v, C, 1, THRESHOLD, guard)
        images.append(decoder(v))
        errors.append(E[-1])
    return {"images": torch.cat(images).clamp(0, 1), "E": torch.cat(errors)}


def searches_of(layer):
    """{rule: Search} in a layer."""
    if layer in STUDIED:
        return RULES | OTHERS
    if layer == "VAE":
        return {"constant": RULES["constant"], "bounded": OTHERS["bounded"]}
    return {"constant": RULES["constant"]}  # a latent size of Figure 7


def start_distribution(layer, model, k, x):
    """Mean and standard deviation (K,) of the starts, and the box of x (n, 196)."""
    if layer == "input":
        return x.mean(0), x.std(0), (torch.zeros_like(x[0]), torch.ones_like(x[0]))
    zero, one = torch.zeros(k, device=x.device), torch.ones(k, device=x.device)
    if layer == "GAN":
        return zero, one, None  # it has no codes
    codes = model.encoder(x)
    if layer == "VAE":
        mu, _ = codes.chunk(2, 1)
        return zero, one, (mu.amin(0), mu.amax(0))
    return codes.mean(0), codes.std(0), (codes.amin(0), codes.amax(0))


def search_layer(layer, net, model, classifier, seed, x, generations, steps):
    """A work unit: all searches in one layer, from equal starts; draws; a walk to an 8."""
    mean, std, box = start_distribution(layer, model, net.k, x[:net.images])
    radius = std.norm().item()  # RMS distance of the starts from their centre
    decoder = nn.Identity() if layer == "input" else model.decoder
    g = common.generator(seed, f"starts {layer}", x.device)
    digits = torch.arange(generations, device=x.device) % 10
    noise = torch.randn(ATTEMPTS, generations, net.k, generator=g, device=x.device)
    starts = mean + std * noise  # (A, G, K)
    found = {}
    for rule, how in searches_of(layer).items():
        found[rule] = run_search(how, decoder, classifier, starts, digits, box, steps, radius)
    if layer in ("LSO-2", "VAE", "GAN"):
        pool = torch.randn(POOL, net.k, generator=g, device=x.device)
        found["draws"] = draw(decoder, classifier, mean + std * pool, digits)
    if layer in STUDIED:
        start = found["constant"]["start"][8:9]  # it wants an 8
        found["walk"] = walk(decoder, classifier, start, 8, steps, GUARD * radius)
    return found


# --- evaluate ---------------------------------------------------------------------------

def pca_mse(x, k, other):
    """Mean squared error per pixel, on x and on other, of PCA with k components of x."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov(x.T.cpu().double()))  # ascending eigenvalues
    top = vectors[:, -k:].to(x)  # (196, K), the directions of largest variance
    errors = []
    for y in (x, other):
        centred = y - mean
        errors.append(((centred - centred @ top @ top.T) ** 2).mean())
    return errors


def evaluate_net(net, model, data):
    """Accuracy and errors of one net on its training images and on the test set."""
    x, _ = data["nets"]
    x_test, y_test = data["test"]
    if net.kind in ("classifier", "judge"):
        output = model(x_test)
        E = total_squared_error(output, y_test)
        measures = {"accuracy": (output.argmax(1) == y_test).float().mean()}
        if net.kind == "classifier":
            measures["E ≤ 0.01"] = (E <= THRESHOLD).float().mean()
            measures["test"] = E.mean() / 10
        return measures
    x = x[:net.images]
    errors = []
    for images in (x, x_test):
        codes = model.encoder(images)[:, :net.k]  # a VAE's means
        errors.append(((model.decoder(codes) - images) ** 2).mean())
    pca, pca_test = pca_mse(x, net.k, x_test)
    return {"train": errors[0], "test": errors[1], "PCA train": pca, "PCA test": pca_test,
            "mean": x.var(0, correction=0).mean()}  # the error of the mean image


def evaluate_search(found, judge, device):
    """Means over the generations of one search of one seed."""
    images = found["images"]
    digits = torch.arange(len(images)) % 10
    read = judge(images.to(device)).argmax(1).cpu() == digits
    values = {"read": read, "solved": found["solved"]}
    if "draws" in found:
        values["draws"] = found["draws"]
    else:
        for key in ("success", "attempts", "moved", "outside"):
            values[key] = found[key]
        values["leaps"] = found["longest"] > GUARD
        values["longest"] = found["longest"].max()
        values["lower"] = found["lower"].nanmean()  # nan if nothing leaps
        values["clipped"] = found["E, clipped"] <= THRESHOLD
    return {key: value.float().mean() for key, value in values.items()}


def evaluate_all(nets, models, found, seeds, data, device):
    """Measures over seeds, (S,) each: {net: measures}, {(layer, rule): measures}."""
    quality, at = {}, {}
    for name, net in nets.items():
        if net.kind != "gan":
            ours = [evaluate_net(net, models[seed, name], data) for seed in seeds]
            quality[name] = common.over_repeats(ours)
    judge = models[seeds[0], "judge"]  # one for all
    quality["judge"] = common.over_repeats([evaluate_net(JUDGE, judge, data)])
    for (layer, rule), searches in found.items():
        if rule != "walk":
            ours = [evaluate_search(search, judge, device) for search in searches]
            at[layer, rule] = common.over_repeats(ours)
    return quality, at


def wilson(share, n, z=1.96):
    """95 % interval (low, high) of a share of n independent trials (Wilson 1927)."""
    t = z * z / n
    centre = (share + t / 2) / (1 + t)
    half = z * math.sqrt(share * (1 - share) / n + t / (4 * n)) / (1 + t)
    return max(0.0, centre - half), min(1.0, centre + half)


def some_tests(x, y, classifier):
    """A hundred test images at most, digits 0 to 9 in turn, as if a search had found them."""
    count = min(10, int(y.bincount().min()))
    tens = [x[y == digit][:count] for digit in range(10)]
    images = torch.stack(tens, 1).flatten(0, 1)  # (n, 10, 196) -> (10 n, 196)
    digits = torch.arange(len(images), device=x.device) % 10
    E = total_squared_error(classifier(images), digits)
    return {"images": images.cpu(), "E, clipped": E.cpu()}


# --- plot -------------------------------------------------------------------------------

def sheet(ax, images, E, rows=(), columns=()):
    """Images (R, C, 196), framed in red where their E (R, C), as shown, is too high."""
    common.image_sheet(ax, images.unflatten(2, (1, SIDE, SIDE)), rows, columns)
    for i, j in (E > THRESHOLD).nonzero().tolist():
        left, top = (SIDE + 2) * j, (SIDE + 2) * i
        right, bottom = left + SIDE + 1, top + SIDE + 1
        ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top],
                color="red", lw=1.5)


def plot_generations(found):
    """Figures 4 and 5: the digits 0 to 9, ten times."""
    images = found["images"][:100].view(-1, 10, PIXELS)
    E = found["E, clipped"][:100].view(-1, 10)
    fig, (ax,) = common.panels(1, 1, 5.5, 0.54 * len(images))
    sheet(ax, images, E, columns=range(10))
    return fig


def plot_methods(found, tests):
    """Figure 6: one generation of each digit by each of METHODS, and other eights."""
    rows = {}
    for layer, rule in METHODS:
        rows[f"{layer}, {rule}"] = found[layer, rule][0]
    rows["test images"] = tests
    count = min(6, min(len(row["images"]) for row in rows.values()) // 10)
    shown = [*range(10), *range(18, 10 * count, 10)]
    images = torch.stack([row["images"][shown] for row in rows.values()])  # (R, C, 196)
    E = torch.stack([row["E, clipped"][shown] for row in rows.values()])
    fig, (ax,) = common.panels(1, 1, 7.6, 0.43 * len(images))
    sheet(ax, images, E, list(rows), [i % 10 for i in shown])
    return fig


def plot_success(at, sizes):
    """Figure 7: success, and what the judge reads, by size {layer: units}."""
    series = {"10,000 images (20: LSO-2)": sizes, "LSO-1: 1,000 images": {"LSO-1": 5},
              "input": {"input": PIXELS}}
    ticks = [*sizes.values(), PIXELS]
    fig, (success, read) = common.panels(1, 2, 4.8, 3.6)
    for ax, key in ((success, "success"), (read, "read")):
        for label, layers in series.items():
            values = torch.stack([at[layer, "constant"][key] for layer in layers])  # (L, S)
            spread = values.std(1, correction=min(1, values.shape[1] - 1))
            ax.errorbar(list(layers.values()), values.mean(1), spread, fmt="o-", label=label)
        ax.set(xscale="log", xlabel="units of the layer", ylim=(-0.05, 1.4))
        ax.set_xticks(ticks, ticks)
        ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])  # above 1 is the legend's place
        ax.minorticks_off()
    success.plot([5, 20], [0.64, 0.82], "k*", ms=9, label="document, on MNIST")
    success.set_title("success of first attempts (E ≤ 0.01)", fontsize="medium")
    success.set_ylabel("share (± std over seeds)")
    read.axhline(0.1, color="grey", ls=":", label="chance")
    read.set_title(f"read as wanted ({ATTEMPTS} attempts at most)", fontsize="medium")
    for ax in (success, read):
        ax.legend(fontsize="small", loc="upper center", ncols=2)
    return fig


def plot_walks(walks):
    """{layer: walk} to an 8: twelve images, and E."""
    fig, axes = common.panels(len(walks), 2, 5, 1.5, width_ratios=[3.6, 1])
    for i, (name, found) in enumerate(walks.items()):
        images, errors = axes[2 * i], axes[2 * i + 1]
        E = found["E"]
        places = torch.linspace(0, len(E) - 1, 12).round().int().tolist()
        shown = found["images"][places].view(1, 12, 1, SIDE, SIDE)
        common.image_sheet(images, shown, [name], places)
        images.set_xlabel(f"E = {E[-1]:.2g} after step {len(E) - 1} (success: E ≤ 0.01)")
        errors.plot(E)
        errors.axhline(THRESHOLD, color="grey", ls=":", label="threshold")
        errors.set(yscale="log", xlabel="step", ylabel="E")
        errors.legend(fontsize="small")
    return fig


def plot(run, found, tests, at, nets):
    """All figures; images are the first seed's."""
    frame = "red frame: E > 0.01 of the image as shown, clipped to [0, 1]"
    for number, layer in ((4, "LSO-1"), (5, "LSO-2")):
        run.figure(plot_generations(found[layer, "constant"][0]), layer.lower(),
                   f"Figure {number}: {layer}, 0 to 9 (document: 0 and 8)\n{frame}")
    run.figure(plot_methods(found, tests), "methods",
               f"Figure 6: one generation of each digit, and other eights\n{frame}\n"
               "draws: of the prior, those that the classifier takes for the digit")
    sizes = {}
    for name, net in sorted(nets.items(), key=lambda item: item[1].k):
        if name.startswith("AE-") or name == "LSO-2":
            sizes[name] = net.k
    run.figure(plot_success(at, sizes), "success", "Figure 7: success and quality")
    walks = {layer: found[layer, "walk"][0] for layer in STUDIED}
    run.figure(plot_walks(walks), "walk",
               "A walk to an 8: the first start that succeeds, or the last tried\n"
               "images clipped to [0, 1], E before clipping")


# --- verdicts ---------------------------------------------------------------------------

PUBLISHED = {"LSO-1": (0.0239, 0.64), "LSO-2": (0.0203, 0.82)}  # MSE, success; 5.1
ORDERS = [  # claim, the document's word, measure, the search that has less, that has more
    ("LSO-2 is read more often than input", "wildly", "read", ("input", "constant"),
     ("LSO-2", "constant")),
    ("LSO-1 is read more often than input", "wildly", "read", ("input", "constant"),
     ("LSO-1", "constant")),
    ("VAE draws are read more often than LSO-2", "yes", "read", ("LSO-2", "constant"),
     ("VAE", "draws")),
    ("GAN draws are read more often than LSO-2", "yes", "read", ("LSO-2", "constant"),
     ("GAN", "draws")),
    ("VAE has fewer flat places than LSO-2", "suspected", "leaps",
     ("VAE", "constant"), ("LSO-2", "constant")),
    ("LSO-2 is read more often within a box", "§3.3: yes", "read", ("LSO-2", "constant"),
     ("LSO-2", "bounded"))]


def shares_ordered(claim, low, high, generations, earned, document="yes"):
    """common.ordered for shares of the generations of a seed: at least binomial errors."""
    row = common.ordered(claim, low, high, earned, document)
    trials, variance = generations * len(low), 0
    for share in (low.mean().item(), high.mean().item()):
        p = (share * trials + 1) / (trials + 2)  # no interval of zero width at 0 and 1
        variance += p * (1 - p) / trials
    error = variance ** 0.5
    if len(low) > 1:  # the error paired by seed
        error = max(error, (high - low).std().item() / len(low) ** 0.5)
    if abs((high - low).mean()) <= 2 * error:
        row["verdict"] = "open"
    row["here"] = common.side_by_side(low, high, error)
    return row


def learned(measures):
    """Does a net read half of the digits, or err by half of the mean image at most?"""
    if "accuracy" in measures:
        return measures["accuracy"].mean() > 0.5
    return measures["train"].mean() < measures["mean"].mean() / 2


def claims(at, quality, generations):
    """The closing table. at: {(layer, rule): measures}; generations: of one seed."""
    known = {"input": True}  # a row is earned if the nets that it is about have learned
    for name, measures in quality.items():
        known[name] = bool(learned(measures))
    known["GAN"] = bool(at["GAN", "draws"]["solved"].mean() > 0.5)
    accuracy = quality["classifier"]["accuracy"].mean()
    error = common.show(quality["classifier"]["test"])
    table = [dict(claim=f"classifier: test MSE (accuracy {accuracy:.3f})",
                  document="very low (lost)", here=error, verdict="-")]
    for name, (mse, _) in PUBLISHED.items():
        claim, here = f"{name}: MSE of its training images", quality[name]["train"]
        table.append(common.reproduced(claim, mse, here, better="lower", earned=known[name]))
    table += claims_about_success(at, generations, known)
    for claim, document, measure, low, high in ORDERS:
        earned = known["classifier"] and known[low[0]] and known[high[0]]
        if measure == "read":
            earned = earned and known["judge"]
        less, more = at[low][measure], at[high][measure]
        table.append(shares_ordered(claim, less, more, generations, earned, document))
    earned = known["classifier"] and known["LSO-2"]
    less, more = at["input", "constant"]["moved"], at["LSO-2", "constant"]["moved"]
    table.append(common.ordered("input moves less than LSO-2 (RMS pixel)", less, more, earned,
                                "vaguely altered"))
    table.append(claim_about_leaps(at["LSO-2", "no guard"]["lower"], earned))
    gains = []
    for layer in ("VAE", "LSO-2"):
        gain = at[layer, "bounded"]["read"] - at[layer, "constant"]["read"]
        gains.append(gain.round(decimals=4))
    earned = earned and known["VAE"] and known["judge"]
    table.append(common.ordered("a box gains less in VAE than in LSO-2", gains[0], gains[1],
                                earned, "§3.3: suspected"))
    return table


def claim_about_leaps(lower, earned):
    """Row of section 6's jumps: E is lower after more than half of a start's. lower: (S,)"""
    claim = "LSO-2 unguarded: a leap lowers E (share)"
    lower = lower[~lower.isnan()]  # seeds with leaps
    if len(lower) == 0:
        return dict(claim=claim, document="to quality", here="no leaps", verdict="open")
    return common.ordered(claim, torch.full_like(lower, 0.5), lower, earned, "to quality")


def claims_about_success(at, generations, known):
    """Rows of the success rates: what was fitted, and what follows for other rules."""
    table, others = [], {}
    seen = known["classifier"]
    for layer in STUDIED:
        shares = [at[layer, rule]["success"] for rule in RULES if rule != "constant"]
        others[layer] = torch.stack(shares).mean(0)  # (S,)
    for name, (_, share) in PUBLISHED.items():
        tolerance = 2 * (share * (1 - share) / 100) ** 0.5  # it has 100 generations
        here = at[name, "constant"]["success"]
        table.append(common.reproduced(f"{name}: success of first attempts", share, here,
                                       tolerance, fitted=True, earned=seen and known[name]))
    retries = at["LSO-2", "constant"]["attempts"] - 1
    row = common.ordered("LSO-2: less than one retry each", retries,
                         torch.ones_like(retries), seen and known["LSO-2"], "very few")
    if row["verdict"] == "yes":
        row["verdict"] = "fitted"  # as its success is
    table.append(row)
    apart = others["LSO-2"] - others["LSO-1"]
    earned = seen and known["LSO-1"] and known["LSO-2"]
    table.append(common.reproduced("LSO-2's success - LSO-1's, other rules", 0.82 - 0.64,
                                   apart, 0.12, earned=earned))  # two standard errors
    for low, high in (("LSO-1", "LSO-2"), ("LSO-2", "input")):
        earned = seen and known[low] and known[high]
        rows = []
        for rule in RULES:
            less, more = at[low, rule]["success"], at[high, rule]["success"]
            rows.append(shares_ordered("", less, more, generations, earned))
        table.append(common.throughout(f"success of {high} > {low}, each rule", rows))
    table.append(claim_almost_always(others["input"], generations, seen))
    return table


def claim_almost_always(share, generations, earned):
    """Row of "almost never fails": is the interval of the share (S,) above 0.95?"""
    mean = share.mean().item()
    low, high = wilson(mean, generations * len(share))
    verdict = "open"
    if low > 0.95 and earned:
        verdict = "yes"
    elif high < 0.95:
        verdict = "no"
    return dict(claim="input: success above 0.95, other rules", document="almost always",
                here=f"{mean:.3f} ({low:.3f} to {high:.3f})", verdict=verdict)


# --- tables -----------------------------------------------------------------------------

def rows_of(measures, keys, head):
    """A table: a row for each of measures {name: {key: (S,)}}."""
    table = []
    for name, found in measures.items():
        row = {head: name}
        for key in keys:
            row[key] = ""
            if key in found:
                row[key] = cell(found[key].mean().item())
        table.append(row)
    return table


def cell(value):
    if math.isinf(value):  # draws: of some digit none was accepted
        return f"> {POOL:,}"
    if math.isnan(value):  # the mean over no leaps
        return "-"
    if 1000 <= value < 10**6:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def rule_table(at, trials):
    """Success of first attempts and its interval; trials: generations over all seeds."""
    table = []
    for rule in RULES | OTHERS:
        row = {"rule": rule}
        for layer in STUDIED:
            share = at[layer, rule]["success"].mean().item()
            low, high = wilson(share, trials)
            row[layer] = f"{share:.2f} ({low:.2f} to {high:.2f})"
        table.append(row)
    return table


def tables_of(quality, at, trials):
    """{title: rows}: what the document lacks."""
    judged = {"test images": {"read": quality["judge"]["accuracy"]}}
    leaping = {}
    for (layer, rule), measures in at.items():
        if rule in ("constant", "no guard", "bounded", "draws"):
            judged[f"{layer}, {rule}"] = measures
        if rule in ("constant", "no guard"):
            leaping[f"{layer}, {rule}"] = measures
    nets = rows_of(quality, NET_COLUMNS, "net")
    generated = rows_of(judged, SEARCH_COLUMNS, "search")
    leaps = rows_of(leaping, LEAP_COLUMNS, "search")
    beyond = "Beyond the document: "
    return {beyond + "nets on test images, MSE beside PCA's and the mean image's": nets,
            beyond + "success of first attempts, 95 % intervals": rule_table(at, trials),
            beyond + "what is generated, and what the judge reads": generated,
            beyond + "first attempts, and their leaps over flat places": leaps}


def metrics_of(logs):
    """The logs {(seed, net): values} as flat dicts, one for each net and block of steps."""
    metrics = []
    for (seed, name), log in logs.items():
        for block, values in enumerate(log.tolist(), 1):
            row = {"net": name, "seed": seed, "block": block, "loss": values[0]}
            if len(values) == 2:  # the GAN's
                row["generator loss"] = values[1]
            metrics.append(row)
    return metrics


# --- main -------------------------------------------------------------------------------

def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add
    add("--dataset", choices=["mnist", "glyphs"], default="mnist",
        help="real digits; or drawn here, offline, without verdicts")
    add("--seeds", type=number(int, 1, 100),
        help="seeds, counted from --seed; 1: no verdicts")
    add("--train-steps", type=number(int, 1, 10**6), help=f"batches of {BATCH} images")
    add("--generations", type=number(int, 20, 10**4),
        help="digits that a search looks for; a multiple of 10")
    add("--steps", type=number(int, 1, 10**5), help="step limit of Algorithm 3")
    add("--sizes", nargs="+", type=number(int, 1, PIXELS), metavar="K",
        help="latent sizes of Figure 7 beside the document's 20")
    args = parser.parse(argv)
    if args.generations % 10:
        parser.error("argument --generations: must be a multiple of 10")
    return args


def train_all(run, nets, seeds, data, steps, device):
    """One judge, and the nets of each seed: models and logs, both {(seed, net): ...}."""
    tasks = {f"seed{seeds[0]}-judge": (seeds[0], "judge", JUDGE)}
    for seed in seeds:
        for name, net in nets.items():
            tasks[f"seed{seed}-{name}"] = seed, name, net

    def train_unit(unit):
        seed, name, net = tasks[unit]
        return train_net(unit, name, net, seed, data, steps, device)

    trained = run.units(list(tasks), train_unit)
    models, logs = {}, {}
    for unit, (seed, name, net) in tasks.items():
        model = build(name, net, seed)
        model.load_state_dict(trained[unit]["weights"])
        models[seed, name] = model.to(device).requires_grad_(False)
        logs[seed, name] = trained[unit]["log"]
    return models, logs


def search_all(run, nets, models, seeds, x, generations, steps):
    """All searches in pixels and latent layers: {(layer, rule): [what each seed found]}."""
    layers = {"input": Net("input", PIXELS)}
    for name, net in nets.items():
        if net.k and not net.algorithm_3:
            layers[name] = net
    tasks = {}
    for seed in seeds:
        for layer in layers:
            tasks[f"seed{seed}-search-{layer}"] = seed, layer

    def search_unit(unit):
        seed, layer = tasks[unit]
        model = models.get((seed, layer))  # none for the pixels
        return search_layer(layer, layers[layer], model, models[seed, "classifier"], seed, x,
                            generations, steps)

    units = run.units(list(tasks), search_unit)
    found = {}
    for unit, (_, layer) in tasks.items():
        for rule, search in units[unit].items():
            found.setdefault((layer, rule), []).append(search)
    return found


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    seeds = list(range(args.seed, args.seed + args.seeds))
    data = load_data(args.dataset, args.data, args.device)
    with common.Run(__file__, args, f"{args.dataset} 14x14", additive=["sizes"]) as run:
        nets = dict(NETS)
        for k in sorted(set(args.sizes) - {20}):
            nets[f"AE-{k}"] = Net("autoencoder", k)
        models, logs = train_all(run, nets, seeds, data, args.train_steps, args.device)
        x, _ = data["nets"]
        found = search_all(run, nets, models, seeds, x, args.generations, args.steps)

        quality, at = evaluate_all(nets, models, found, seeds, data, args.device)
        tests = some_tests(*data["test"], models[args.seed, "classifier"])
        trials = args.generations * args.seeds
        plot(run, found, tests, at, nets)

        named = {f"{layer}, {rule}": measures for (layer, rule), measures in at.items()}
        results = {"nets": quality, "searches": named}
        # verdicts need nets that have learned, a spread over seeds, and the document's data
        judged = args.preset != "smoke" and args.seeds > 1 and args.dataset == "mnist"
        return run.finish(results, claims(at, quality, args.generations),
                          tables_of(quality, at, trials), metrics_of(logs), judged)


if __name__ == "__main__":
    main()
