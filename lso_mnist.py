"""Latent space optimisation: a classifier draws digits through an autoencoder's decoder.

Reproduces G. Nothnagel, "Combining Autoencoders and Classifiers for Latent Space
Optimization" (2024), on MNIST at 14x14. Decoder and classifier, trained apart and frozen,
are put in a row, and a random latent point v moves until the classifier sees the digit:

    E(v) = sum_j (classifier(decoder(v))_j - onehot_j)^2, v <- v + D C / |D|^2, D = dE/dv

    python lso_mnist.py                          3 seeds: about 3 minutes on 2 CPU cores
    python lso_mnist.py --dataset glyphs --out out/glyphs   digits drawn here, offline
    torchrun --nproc_per_node 2 lso_mnist.py     the units shared by two processes

A run leaves figures, tables, logs and nets (units/*.pt) in its folder. Our choices:
* C = -0.01 and 240 steps were chosen towards its 64 % and 82 %, no test ("fitted").
* The document trains by Algorithm 3, too, with a C that it does not state. Here Adam
  trains; beside it "-A3" by Algorithm 3, C chosen for a low error, "-A3-tenth" by C / 10.
* Success: E <= 0.01, its ".001 MSE". Figure 6's caption has another reading, MSE .01.
* Guard: no step is longer than a tenth of the starts' mean distance from their centre.
* Starts are normal with the training codes' mean and deviation; N(0, 1) in VAE and GAN.
  "input" moves pixels, freely as in the document; "bounded" keeps v in a box: of pixels
  [0, 1], of codes the training codes' own.
* Its VAE and GAN pictures are of other papers. Ours are draws that the classifier takes
  for the digit. The VAE is LSO-2 with a KL, at its rate and on its batches.
"""
import math
from typing import NamedTuple

import common  # before torch: from here on Ctrl-C is one line
import torch
import torch.nn.functional as F
from torch import nn

# S seeds, B batch, N starts = A attempts x G generations, K latent units (or pixels)
PRESETS = {
    "smoke": dict(dataset="glyphs", seeds=2, train_steps=400, generations=20, steps=130,
                  sizes=[2]),
    "quick": dict(seeds=3, train_steps=2000, generations=100, steps=240,
                  sizes=[2, 5, 10, 50]),
    "paper": dict(seeds=20, train_steps=2000, generations=100, steps=240,
                  sizes=[1, 2, 3, 5, 7, 10, 14, 30, 50, 70, 100])}
SIDE, PIXELS = 14, 196     # Figure 1
BATCH = 100
BETA = 0.2                 # weight of the VAE's KL, per nat
R1 = 0.3                   # weight of the GAN's gradient penalty
THRESHOLD = 0.01           # of E, section 5; ".001 MSE" over 10 outputs is the same
C = -0.01                  # wanted change of E in a step
GUARD = 0.1                # longest step; unit: the starts' distance from their centre
ADAM_SEARCH = 0.05         # Adam's rate on v; unit: the starts' deviation
ATTEMPTS, POOL = 5, 20_000  # starts for a generation; draws of a prior for all of them
PRIOR_BOX = 3.5            # about the extremes of 10,000 normal numbers


class Net(NamedTuple):
    """A net that is trained once for each seed."""
    kind: str
    k: int = 0                 # latent units
    images: int = 10_000       # section 5.1
    rate: float = 5e-3         # of Adam; of Algorithm 3: the wanted drop -C of the loss
    algorithm_3: bool = False


class Search(NamedTuple):
    """How a digit is looked for: Algorithm 3, and what is changed in it."""
    C: float = C
    relative: bool = False     # is C in units of E?
    longer: int = 1            # factor on --steps
    guard: float = GUARD
    threshold: float = THRESHOLD
    bounded: bool = False      # is v kept in the box of the training codes?
    ensemble: bool = False     # is E the mean over all seeds' classifiers?
    adam: bool = False         # Adam on v in place of Algorithm 3
    attempts: int = 1


NETS = {"classifier": Net("classifier", rate=2e-2),
        "classifier-A3": Net("classifier", rate=0.1, algorithm_3=True),
        "LSO-1": Net("autoencoder", 5, 1000, rate=2e-3),
        "LSO-2": Net("autoencoder", 20),
        "LSO-2-A3": Net("autoencoder", 20, rate=3.0, algorithm_3=True),
        "LSO-2-A3-tenth": Net("autoencoder", 20, rate=0.3, algorithm_3=True),
        "VAE": Net("vae", 20),
        "GAN": Net("gan", 20, rate=2e-3)}
JUDGE = Net("judge", rate=3e-3)  # has 50,000 images of its own
RULES = {"constant": Search(attempts=ATTEMPTS),
         "patient": Search(longer=4),
         "fine": Search(C=C / 5, longer=5),
         "Polyak": Search(C=-1, relative=True),  # the step to E = 0
         "proportional": Search(C=-0.1, relative=True)}
OTHERS = {"no guard": Search(guard=math.inf, attempts=ATTEMPTS),
          "Adam": Search(adam=True),
          "MSE .01": Search(threshold=0.1),
          "bounded": Search(bounded=True, attempts=ATTEMPTS),
          "ensemble": Search(ensemble=True, attempts=ATTEMPTS)}
STUDIED = ["LSO-1", "LSO-2", "input"]  # the document's own, under all rules
REGULAR = ["VAE", "GAN"]
DRAWN = ["LSO-2", "VAE", "GAN"]  # whose draws the classifier filters
METHODS = [("input", "constant"), ("input", "bounded"), ("LSO-1", "constant"),
           ("LSO-2", "constant"), ("LSO-2", "no guard"), ("LSO-2", "ensemble"),
           ("LSO-2", "draws"), ("VAE", "constant"), ("VAE", "draws"), ("GAN", "constant"),
           ("GAN", "draws")]  # rows of Figure 6
NET_COLUMNS = ["accuracy", "E ≤ 0.01", "train", "test", "PCA train", "PCA test", "mean"]
SEARCH_COLUMNS = ["read", "solved", "attempts", "draws", "moved", "outside", "clipped"]
FAILURE_COLUMNS = ["success", "leaps", "leapt", "flat", "slow", "longest"]


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
    """196-100-K-100-196 with sigmoids (Figure 1; the width of 100 is ours)."""

    def __init__(self, k):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(196, 100), nn.Sigmoid(), nn.Linear(100, k))
        self.decoder = nn.Sequential(
            nn.Linear(k, 100), nn.Sigmoid(), nn.Linear(100, 196), nn.Sigmoid())

    def forward(self, x):
        return self.decoder(self.encoder(x))


class VAE(nn.Module):
    """The autoencoder, whose encoder also puts out the logarithm of a variance."""

    def __init__(self, k):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(196, 100), nn.Sigmoid(), nn.Linear(100, 2 * k))
        self.decoder = nn.Sequential(
            nn.Linear(k, 100), nn.Sigmoid(), nn.Linear(100, 196), nn.Sigmoid())

    def forward(self, x, eps):
        """x (B, 196) and standard normal eps (B, K) to x_hat, mu, logvar."""
        mu, logvar = self.encoder(x).chunk(2, 1)  # (B, 2 K) -> (B, K) each
        z = mu + (0.5 * logvar).exp() * eps
        return self.decoder(z), mu, logvar


class GAN(nn.Module):
    """A generator, which is a decoder for LSO, too, and a discriminator."""

    def __init__(self, k):
        super().__init__()
        self.decoder = nn.Sequential(
            nn.Linear(k, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 196), nn.Sigmoid())
        self.discriminator = nn.Sequential(
            nn.Linear(196, 256), nn.LeakyReLU(0.2),
            nn.Linear(256, 256), nn.LeakyReLU(0.2), nn.Linear(256, 1))


def Classifier():
    """196-64-10, one output for each digit (Figure 2; the width of 64 is ours)."""
    return nn.Sequential(
        nn.Linear(196, 64), nn.Sigmoid(), nn.Linear(64, 10), nn.Sigmoid())


def Judge():
    """A convolutional classifier (B, 196) -> logits (B, 10), which no search has seen."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
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
    if net.kind == "autoencoder":
        return Autoencoder(net.k)
    if net.kind == "vae":
        return VAE(net.k)
    return GAN(net.k)


# --- objective --------------------------------------------------------------------------

def total_squared_error(output, digits):
    """E: squared deviations from one-hot, their sum. (B, 10), (B,) -> (B,)"""
    return ((output - F.one_hot(digits, 10)) ** 2).sum(1)  # section 5


def reconstruction_error(x_hat, x):
    """Squared error summed over pixels, mean over the batch."""
    return ((x_hat - x) ** 2).sum(1).mean()


def kl_to_standard(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats, sum over units, mean over the batch."""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(1).mean()


def vae_loss(net, x, eps, beta):
    """Squared error + beta KL; beta times the negative ELBO at a variance of beta / 2."""
    x_hat, mu, logvar = net(x, eps)
    return reconstruction_error(x_hat, x) + beta * kl_to_standard(mu, logvar)


def discriminator_loss(net, x, z, r1):
    """Logistic loss of real x (B, 196) and of fakes from z (B, K), + r1/2 |dD/dx|^2."""
    x = x.detach().requires_grad_()
    real, fake = net.discriminator(x), net.discriminator(net.decoder(z).detach())
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)  # (B, 196)
    penalty = (slope ** 2).sum(1).mean()  # R1 (Mescheder et al. 2018): both nets settle
    return F.softplus(-real).mean() + F.softplus(fake).mean() + r1 / 2 * penalty


def generator_loss(net, z):
    return F.softplus(-net.discriminator(net.decoder(z))).mean()  # the non-saturating one


# --- train ------------------------------------------------------------------------------

class Algorithm3(torch.optim.Optimizer):
    """Algorithm 3 on parameters; the rate is -C, the wanted drop of the loss."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        S = 0
        for param in group["params"]:
            S = S + (param.grad ** 2).sum()
        for param in group["params"]:
            param -= param.grad * group["lr"] / S.clamp(min=1e-12)


def train(name, net, loss, x, y, steps, optimiser, g, noise):
    """Minimise loss(x, y) over batches; the rate falls to 0 over the second half.

    Batches are drawn from the generator g; from `noise` the loss may draw. Its log.
    """
    rate = optimiser.param_groups[0]["lr"]
    log = torch.zeros(steps, 1, device=x.device)
    for step in common.steps(name, steps, log, ["loss"], net, optimiser, g, noise):
        optimiser.param_groups[0]["lr"] = rate * min(1, 2 * (1 - step / steps))
        i = torch.randint(len(x), (BATCH,), generator=g, device=x.device)
        value = loss(x[i], y[i])
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        log[step, 0] = value.detach()
    return log


def train_gan(name, net, x, k, steps, rate, r1, g):
    """Discriminator and generator in turn; the rate falls as above. Both losses' log."""
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
    g = common.generator(seed, "batches", device)  # equal for nets of equal images
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
            optimiser = Algorithm3(model.parameters(), net.rate)
        log = train(unit, model, loss, x, y, steps, optimiser, g, noise)
    return {"weights": model.state_dict(), "log": common.in_blocks(log)}


# --- latent space optimisation ----------------------------------------------------------

def algorithm_3(error, v, C, steps, threshold, guard, relative=False, box=None):
    """Minimise error(v) -> (N,) over starts v (N, K) by Algorithm 3, all side by side.

    v <- v + D C / S, S = |D|^2, changes E by C (relative: by C E) to first order. A start
    rests once E <= threshold. No step is longer than guard; v is kept between the ends of
    box. Returns v, and (N,) each: the step of success (-1: none), and how long the
    longest and the last step would have been without a guard.
    """
    success = torch.full((len(v),), -1, device=v.device)
    longest = torch.zeros(len(v), device=v.device)
    last = longest
    for step in range(steps + 1):  # once more than steps: the last v is tested, too
        if box is not None:
            v = v.clamp(box[0], box[1])
        v = v.detach().requires_grad_()  # a new leaf: no graph grows along the walk
        E = error(v)
        (D,) = torch.autograd.grad(E.sum(), v)  # (N, K): no start is in another's E
        success = torch.where((success < 0) & (E <= threshold), step, success)
        moving = success < 0
        if step == steps or (step % 20 == 0 and not moving.any()):  # any() waits
            break
        wanted = torch.full_like(E, C)
        if relative:
            wanted = C * E.detach()
        S = (D ** 2).sum(1).clamp(min=1e-30)  # "squared sum"; the bound is for D = 0
        change = D * (wanted / S)[:, None]  # Algorithm 3
        length = change.norm(dim=1)  # (N,), |C| / |D|: a leap where E is flat
        change = change * (guard / length).clamp(max=1)[:, None]
        v = torch.where(moving[:, None], v + change, v)
        longest = torch.where(moving, torch.maximum(longest, length), longest)
        last = torch.where(moving, length, last)
    return v.detach(), success, longest, last


def adam_search(error, v, rate, steps, threshold):
    """The same by Adam, which does not rest: v (N, K) and the steps of success (N,)."""
    success = torch.full((len(v),), -1, device=v.device)
    v = v.clone().requires_grad_()
    optimiser = torch.optim.Adam([v], rate)
    for step in range(steps + 1):
        E = error(v)
        success = torch.where((success < 0) & (E <= threshold), step, success)
        optimiser.zero_grad()
        E.sum().backward()
        optimiser.step()
    return v.detach(), success


def first_success(success):
    """Of attempts (A, G) the first that succeeded, else the last; whether one did."""
    solved = (success >= 0).any(0)
    first = (success >= 0).int().argmax(0)
    return torch.where(solved, first, len(success) - 1), solved


def run_search(how, decoder, classifiers, starts, digits, box, steps):
    """Look for the digits (G,) from starts (A, G, K), a row of them for each attempt.

    Returns images and figures of the chosen attempts, and of the first ones the success
    and the longest and last steps, in units of the starts' distance from their centre.
    """
    starts = starts[:how.attempts]
    attempts, G, _ = starts.shape
    v, wanted = starts.flatten(0, 1), digits.repeat(attempts)  # (N, K), (N,)
    radius = v.var(0).sum().sqrt().item()
    steps = how.longer * steps

    def error_of(x, digits):
        """E, the mean over the classifiers. (N, 196), (N,) -> (N,)"""
        total = 0
        for classifier in classifiers:
            total = total + total_squared_error(classifier(x), digits)
        return total / len(classifiers)

    def error(v):  # decoder and classifier in a row: Figure 3
        return error_of(decoder(v), wanted)

    if how.adam:
        rate = ADAM_SEARCH * radius / v.shape[1] ** 0.5
        end, success = adam_search(error, v, rate, steps, how.threshold)
        longest = last = torch.zeros(len(v), device=v.device)
    else:
        if not how.bounded:
            box = None
        end, success, longest, last = algorithm_3(
            error, v, how.C, steps, how.threshold, how.guard * radius, how.relative, box)
    attempt, solved = first_success(success.view(attempts, G))
    chosen = attempt * G + torch.arange(G, device=v.device)
    start, x = v[chosen], decoder(end[chosen])
    clipped = x.clamp(0, 1)  # free pixels leave [0, 1]
    result = {"images": clipped, "start": start, "success": success[:G], "solved": solved,
              "attempts": attempt + 1, "longest": longest[:G] / radius,
              "last": last[:G] / radius,
              "moved": (x - decoder(start)).square().mean(1).sqrt(),  # RMS of a pixel
              "outside": (x != clipped).float().mean(1),
              "E, clipped": error_of(clipped, digits)}
    return result


def draw(decoder, classifier, z, digits):
    """Algorithm 3 without a step: draws that the classifier takes for the digits (G,).

    All are of one pool z (n, K), in its order; where too few are accepted, the draw of
    least error stands for the digit.
    """
    x = decoder(z)  # (n, 196)
    output = classifier(x)
    images = torch.zeros(len(digits), PIXELS, device=z.device)
    solved = torch.zeros(len(digits), dtype=torch.bool, device=z.device)
    draws = []
    for digit in range(10):
        E = total_squared_error(output, torch.full((len(z),), digit, device=z.device))
        accepted = (E <= THRESHOLD).nonzero()[:, 0]
        draws.append(len(z) / max(1, len(accepted)))  # until one is accepted
        places = (digits == digit).nonzero()[:, 0]
        taken = accepted[:len(places)]
        images[places] = x[E.argmin()]
        images[places[:len(taken)]] = x[taken]
        solved[places[:len(taken)]] = True
    return {"images": images, "solved": solved, "draws": torch.tensor(draws)}


def walk(decoder, classifier, v, digit, steps, guard):
    """The way of one start v (1, K) to a digit: images (T, 196) and E (T,)."""
    wanted = torch.tensor([digit], device=v.device)

    def error(v):
        return total_squared_error(classifier(decoder(v)), wanted)

    images, errors = [decoder(v)], [error(v)]
    while len(errors) <= steps and errors[-1] > THRESHOLD:
        v, _, _, _ = algorithm_3(error, v, C, 1, THRESHOLD, guard)
        images.append(decoder(v))
        errors.append(error(v))
    return {"images": torch.cat(images).clamp(0, 1), "E": torch.cat(errors)}


def searches_of(layer):
    """{rule: Search} in a layer."""
    if layer in STUDIED:
        return RULES | OTHERS
    if layer in REGULAR:
        return {"constant": RULES["constant"], "bounded": OTHERS["bounded"]}
    return {"constant": RULES["constant"]}  # a latent size of Figure 7


def start_distribution(layer, model, k, x):
    """Mean and deviation (K,) of the starts, and the box of the codes of x (n, 196)."""
    if layer == "input":
        return x.mean(0), x.std(0), (torch.zeros_like(x[0]), torch.ones_like(x[0]))
    zero, one = torch.zeros(k, device=x.device), torch.ones(k, device=x.device)
    if layer == "GAN":  # has no codes
        return zero, one, (-PRIOR_BOX * one, PRIOR_BOX * one)
    codes = model.encoder(x)
    if layer == "VAE":
        mu, _ = codes.chunk(2, 1)
        return zero, one, (mu.amin(0), mu.amax(0))
    return codes.mean(0), codes.std(0), (codes.amin(0), codes.amax(0))


def search_layer(layer, net, model, classifiers, own, seed, x, generations, steps):
    """A work unit: all searches in one layer, from equal starts; draws; a walk to an 8.

    classifiers: of all seeds; own: the place of this seed's.
    """
    mean, deviation, box = start_distribution(layer, model, net.k, x[:net.images])
    decoder = nn.Identity()
    if layer != "input":
        decoder = model.decoder
    g = common.generator(seed, f"starts {layer}", x.device)
    digits = torch.arange(generations, device=x.device) % 10
    noise = torch.randn(ATTEMPTS, generations, net.k, generator=g, device=x.device)
    starts = mean + deviation * noise  # (A, G, K)
    found = {}
    for rule, how in searches_of(layer).items():
        seen = [classifiers[own]]
        if how.ensemble:
            seen = classifiers
        found[rule] = run_search(how, decoder, seen, starts, digits, box, steps)
    if layer in DRAWN:
        pool = torch.randn(POOL, net.k, generator=g, device=x.device)
        found["draws"] = draw(decoder, classifiers[own], mean + deviation * pool, digits)
    if layer in STUDIED:
        start = found["constant"]["start"][8:9]  # it wants an 8
        guard = GUARD * deviation.norm()
        found["walk"] = walk(decoder, classifiers[own], start, 8, steps, guard)
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
        success, longest = found["success"] >= 0, found["longest"]
        leaps = longest > GUARD           # no slope on the way
        flat = found["last"] > GUARD      # none at the end
        values["attempts"], values["moved"] = found["attempts"], found["moved"]
        values["outside"] = found["outside"]
        values["clipped"] = found["E, clipped"] <= THRESHOLD
        values["success"], values["leaps"] = success, leaps
        values["flat"], values["leapt"] = ~success & flat, ~success & leaps & ~flat
        values["slow"] = ~success & ~leaps
        values["longest"] = longest.max()
        values["with leaps"], values["without"] = success[leaps], success[~leaps]
    return {key: value.float().mean() for key, value in values.items()}


def wilson(share, n, z=1.96):
    """95 % interval (low, high) of a share of n independent trials (Wilson 1927)."""
    t = z * z / n
    centre = (share + t / 2) / (1 + t)
    half = z * math.sqrt(share * (1 - share) / n + t / (4 * n)) / (1 + t)
    return max(0.0, centre - half), min(1.0, centre + half)


def real_digits(x, y):
    """A hundred test digits at most, 0 to 9 in turn. (100, 196)"""
    count = min(10, int(y.bincount().min()))
    digits = [x[y == digit][:count] for digit in range(10)]
    return torch.stack(digits, 1).flatten(0, 1).cpu()


# --- plot -------------------------------------------------------------------------------

def sheet(ax, images, solved, rows=(), columns=()):
    """Images (R, C, 196), framed in red where the classifier did not take them."""
    common.image_sheet(ax, images.unflatten(2, (1, SIDE, SIDE)), rows, columns)
    for i, j in (~solved).nonzero().tolist():
        left, top = (SIDE + 2) * j, (SIDE + 2) * i
        right, bottom = left + SIDE + 1, top + SIDE + 1
        ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top],
                color=common.COLOURS[3], lw=1.5)


def plot_generations(found):
    """Figures 4 and 5: the digits 0 to 9, ten times."""
    images, solved = found["images"].view(-1, 10, PIXELS), found["solved"].view(-1, 10)
    count = min(10, len(images))
    fig, (ax,) = common.panels(1, 1, 5.5, 0.54 * count)
    sheet(ax, images[:count], solved[:count], columns=range(10))
    return fig


def plot_methods(searches, real):
    """Figure 6: one generation of each digit by each of METHODS, and other eights."""
    images = [searches[layer][rule]["images"] for layer, rule in METHODS]
    solved = [searches[layer][rule]["solved"] for layer, rule in METHODS]
    names = [f"{layer}, {rule}" for layer, rule in METHODS]
    images.append(real)
    solved.append(torch.ones(len(real), dtype=torch.bool))
    names.append("real digits")
    count = min(6, len(solved[0]) // 10, len(real) // 10)
    shown = [*range(10), *range(18, 10 * count, 10)]
    images = torch.stack([one[shown] for one in images])  # (R, C, 196)
    solved = torch.stack([one[shown] for one in solved])
    fig, (ax,) = common.panels(1, 1, 7.6, 0.43 * len(images))
    sheet(ax, images, solved, names, [i % 10 for i in shown])
    return fig


def plot_success(at, sizes, n):
    """Figure 7: success, and what the judge reads, by size {layer: units}; by rule."""
    fig, (success, read, rules) = common.panels(1, 3, 4.2, 3.6)
    plot_sizes(success, at, sizes, "success", "success of first attempts (E ≤ 0.01)")
    plot_sizes(read, at, sizes, "read", f"read as wanted ({ATTEMPTS} attempts at most)")
    success.plot([5, 20], [0.64, 0.82], "k*", ms=9, label="document")
    success.set_ylabel("share (± std over seeds)")
    read.axhline(0.1, color="grey", ls=":", label="chance")
    for i, layer in enumerate(STUDIED):
        colour = common.COLOURS[i]
        for place, rule in enumerate(RULES | OTHERS):
            share = at[layer, rule]["success"].mean().item()
            x = place + 0.2 * (i - 1)
            rules.plot([x, x], wilson(share, n), color=colour)
            rules.plot(x, share, "o", ms=4, color=colour)
        rules.plot([], [], "o-", ms=4, color=colour, label=layer)
    rules.set_xticks(range(len(RULES | OTHERS)), [*RULES, *OTHERS], rotation=60)
    rules.set_ylim(0, 1.05)
    rules.set_title("success by rule, 95 % intervals", fontsize="medium")
    for ax in (success, read, rules):
        ax.legend(fontsize="small", loc="lower center", framealpha=0.6)
    return fig


def plot_sizes(ax, at, sizes, key, title):
    """One measure over the size of the layer that is optimised."""
    series = {"10,000 images (20: LSO-2)": sizes, "LSO-1: 1,000 images": {"LSO-1": 5},
              "input": {"input": PIXELS}}
    for label, layers in series.items():
        values = torch.stack([at[layer, "constant"][key] for layer in layers])  # (L, S)
        spread = values.std(1, correction=min(1, values.shape[1] - 1))
        ax.errorbar(list(layers.values()), values.mean(1), spread, fmt="o-", label=label)
    ticks = [*sizes.values(), PIXELS]
    ax.set(xscale="log", ylim=(0, 1.05), xlabel="units of the layer")
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set_title(title, fontsize="medium")


def plot_walks(walks):
    """{layer: walk} to an 8: twelve images, and E."""
    fig, axes = common.panels(len(walks), 2, 5, 1.5, width_ratios=[3.6, 1])
    for i, (name, found) in enumerate(walks.items()):
        images, errors = axes[2 * i], axes[2 * i + 1]
        E = found["E"]
        places = torch.linspace(0, len(E) - 1, 12).round().int().tolist()
        shown = found["images"][places].view(1, 12, 1, SIDE, SIDE)
        common.image_sheet(images, shown, [name], places)
        end = "failed: the classifier sees no 8 in step"
        if E[-1] <= THRESHOLD:
            end = "the classifier sees an 8 in step"
        images.set_xlabel(f"{end} {len(E) - 1}")
        errors.plot(E)
        errors.axhline(THRESHOLD, color="grey", ls=":", label="threshold")
        errors.set(yscale="log", xlabel="step", ylabel="E")
        errors.legend(fontsize="small")
    return fig


def plot(run, searches, at, nets, real, n):
    """All figures; images are the first seed's. n: generations over all seeds."""
    for number, layer in ((4, "LSO-1"), (5, "LSO-2")):
        run.figure(plot_generations(searches[layer]["constant"]), layer.lower(),
                   f"Figure {number}: {layer} generations (red frame: failed)")
    run.figure(plot_methods(searches, real), "methods",
               "Figure 6: one generation of each digit, and other eights (red: failed)\n"
               "draws: of the prior, those that the classifier takes for the digit")
    sizes = {}
    for name, net in sorted(nets.items(), key=lambda item: item[1].k):
        if name.startswith("AE-") or name == "LSO-2":
            sizes[name] = net.k
    run.figure(plot_success(at, sizes, n), "success", "Figure 7: success and quality")
    walks = {layer: searches[layer]["walk"] for layer in STUDIED}
    run.figure(plot_walks(walks), "walk",
               "A walk to an 8: the first start that succeeds, or the last tried")


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


def shares_ordered(claim, low, high, n, earned, document="yes"):
    """common.ordered for shares of n generations a seed: at least the binomial error."""
    row = common.ordered(claim, low, high, earned, document)
    trials, variance = n * len(low), 0
    for share in (low.mean().item(), high.mean().item()):
        p = (share * trials + 1) / (trials + 2)  # no interval of zero width at 0 and 1
        variance += p * (1 - p) / trials
    error = variance ** 0.5
    if len(low) > 1:
        paired = (high - low).std() / len(low) ** 0.5
        error = max(error, paired.item())
    if abs((high - low).mean()) <= 2 * error:
        row["verdict"] = "open"
    row["here"] = f"{low.mean():.3g}; {high.mean():.3g} (± {error:.1g})"
    return row


def learned(measures):
    """Does a net read half of the digits, or err by half of the mean image at most?"""
    if "accuracy" in measures:
        return measures["accuracy"].mean() > 0.5
    return measures["train"].mean() < measures["mean"].mean() / 2


def claims(at, quality, n):
    """The closing table. at: {(layer, rule): measures}; n: generations of a seed."""
    known = {name: bool(learned(measures)) for name, measures in quality.items()}
    earned = known["classifier"] and known["LSO-1"] and known["LSO-2"] and known["VAE"]
    accuracy = quality["classifier"]["accuracy"].mean()
    error = common.show(quality["classifier"]["test"])
    table = [dict(claim=f"classifier: test MSE (accuracy {accuracy:.3f})",
                  document="very low (lost)", here=error, verdict="-")]
    for name, (mse, _) in PUBLISHED.items():
        here = quality[name]["train"]
        table.append(common.reproduced(f"{name}: MSE of its training images", mse, here,
                                       better="lower", earned=known[name]))
    table += claims_about_success(at, n, earned)
    for claim, document, measure, low, high in ORDERS:
        less, more = at[low][measure], at[high][measure]
        table.append(shares_ordered(claim, less, more, n, earned, document))
    pixels, codes = at["input", "constant"], at["LSO-2", "constant"]
    table.append(common.ordered("input moves less than LSO-2 (RMS pixel)",
                                pixels["moved"], codes["moved"], earned,
                                "vaguely altered"))
    gain = (at["LSO-2", "bounded"]["read"] - codes["read"]).round(decimals=4)
    gain_vae = at["VAE", "bounded"]["read"] - at["VAE", "constant"]["read"]
    table.append(common.ordered("a box gains less in VAE than in LSO-2",
                                gain_vae.round(decimals=4), gain, earned,
                                "§3.3: suspected"))
    free = at["LSO-2", "no guard"]
    table.append(common.ordered("LSO-2 unguarded: leaps help success",
                                free["without"], free["with leaps"], earned,
                                "to quality"))
    return table


def claims_about_success(at, n, earned):
    """Rows of the success rates: what was fitted, and what follows for other rules."""
    table, others = [], {}
    for layer in STUDIED:
        shares = [at[layer, rule]["success"] for rule in RULES if rule != "constant"]
        others[layer] = torch.stack(shares).mean(0)  # (S,)
    for name, (_, share) in PUBLISHED.items():
        tolerance = 2 * (share * (1 - share) / 100) ** 0.5  # it has 100 generations
        here = at[name, "constant"]["success"]
        table.append(common.reproduced(f"{name}: success of first attempts", share, here,
                                       tolerance, fitted=True, earned=earned))
    retries = at["LSO-2", "constant"]["attempts"] - 1
    row = common.ordered("LSO-2: less than one retry each", retries,
                         torch.ones_like(retries), earned, "very few")
    if row["verdict"] == "yes":
        row["verdict"] = "fitted"  # as its success is
    table.append(row)
    apart = others["LSO-2"] - others["LSO-1"]
    table.append(common.reproduced("LSO-2's success - LSO-1's, other rules", 0.82 - 0.64,
                                   apart, 0.12, earned=earned))  # two standard errors
    for low, high in (("LSO-1", "LSO-2"), ("LSO-2", "input")):
        rows = []
        for rule in RULES:
            less, more = at[low, rule]["success"], at[high, rule]["success"]
            rows.append(shares_ordered("", less, more, n, earned))
        claim = f"success of {high} > {low}, each rule"
        table.append(common.throughout(claim, rows))
    always = torch.full_like(apart, 0.95)
    table.append(shares_ordered("input: success above 0.95, other rules", always,
                                others["input"], n, earned, "almost always"))
    return table


# --- tables -----------------------------------------------------------------------------

def rows_of(measures, keys, head):
    """A table: a row for each of measures {name: {key: (S,)}}."""
    table = []
    for name, found in measures.items():
        row = {head: name}
        for key in keys:
            row[key] = ""
            if key in found:
                value = found[key].mean().item()
                row[key] = f"{value:.4g}"
                if 1000 <= value < 10**6:
                    row[key] = f"{value:,.0f}"
        table.append(row)
    return table


def rule_table(at, n):
    """Success of first attempts and its interval; n: generations over all seeds."""
    table = []
    for rule in RULES | OTHERS:
        row = {"rule": rule}
        for layer in STUDIED:
            share = at[layer, rule]["success"].mean().item()
            low, high = wilson(share, n)
            row[layer] = f"{share:.2f} ({low:.2f} to {high:.2f})"
        table.append(row)
    return table


def tables_of(quality, at, named, n):
    """{title: rows}: what the document lacks."""
    judged = {"real test digits": {"read": quality["judge"]["accuracy"]}}
    failing = {}
    for name, measures in named.items():
        rule = name.split(", ")[1]
        if rule in ("constant", "no guard", "bounded", "ensemble", "draws"):
            judged[name] = measures
        if rule in ("constant", "no guard"):
            failing[name] = measures
    nets = rows_of(quality, NET_COLUMNS, "net")
    generated = rows_of(judged, SEARCH_COLUMNS, "search")
    failures = rows_of(failing, FAILURE_COLUMNS, "search")
    beyond = "Beyond the document: "
    return {beyond + "nets on real digits, MSE beside PCA's and the mean image's": nets,
            beyond + "success of first attempts, 95 % intervals": rule_table(at, n),
            beyond + "what is generated, and what the judge reads": generated,
            beyond + "first attempts, and why they fail": failures}


def metrics_of(tasks, trained):
    """The logs as flat dicts, one for each net and block of steps."""
    metrics = []
    for unit, (seed, name, _) in tasks.items():
        for block, values in enumerate(trained[unit]["log"].tolist(), 1):
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
        help="real digits, or digits drawn here, offline")
    add("--seeds", type=number(int, 1, 100),
        help="seeds, counted from --seed; 1: no verdicts")
    add("--train-steps", type=number(int, 1, 10**6),
        help=f"training in batches of {BATCH}")
    add("--generations", type=number(int, 20, 10**4),
        help="of a search; a multiple of 10")
    add("--steps", type=number(int, 1, 10**6), help="step limit of Algorithm 3")
    add("--sizes", nargs="+", type=number(int, 1, PIXELS), metavar="K",
        help="latent sizes of Figure 7 beside the document's 20")
    args = parser.parse(argv)
    if args.generations % 10:
        parser.error("argument --generations: must be a multiple of 10")
    return args


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    seeds = list(range(args.seed, args.seed + args.seeds))
    data = load_data(args.dataset, args.data, args.device)
    with common.Run(__file__, args, f"{args.dataset} 14x14", additive=["sizes"]) as run:
        nets = dict(NETS)
        for k in sorted(set(args.sizes) - {20}):
            nets[f"AE-{k}"] = Net("autoencoder", k)

        tasks = {f"seed{args.seed}-judge": (args.seed, "judge", JUDGE)}  # one for all
        for seed in seeds:
            for name, net in nets.items():
                tasks[f"seed{seed}-{name}"] = seed, name, net

        def train_unit(unit):
            seed, name, net = tasks[unit]
            return train_net(unit, name, net, seed, data, args.train_steps, args.device)

        trained = run.units(list(tasks), train_unit)
        models = {}
        for unit, (seed, name, net) in tasks.items():
            model = build(name, net, seed)
            model.load_state_dict(trained[unit]["weights"])
            models[seed, name] = model.to(args.device).requires_grad_(False)

        layers = {"input": Net("input", PIXELS)}
        for name, net in nets.items():
            if net.k and not net.algorithm_3:
                layers[name] = net
        classifiers = [models[seed, "classifier"] for seed in seeds]
        searches = {}
        for seed in seeds:
            for layer in layers:
                searches[f"seed{seed}-search-{layer}"] = seed, layer

        def search_unit(unit):
            seed, layer = searches[unit]
            x, _ = data["nets"]
            model = models.get((seed, layer))  # none for the pixels
            own = seed - args.seed
            return search_layer(layer, layers[layer], model, classifiers, own, seed, x,
                                args.generations, args.steps)

        found = run.units(list(searches), search_unit)

        quality, at = {}, {}  # {net: measures}, {(layer, rule): measures}
        for name, net in nets.items():
            if net.kind != "gan":
                ours = [evaluate_net(net, models[seed, name], data) for seed in seeds]
                quality[name] = common.over_repeats(ours)
        judge = models[args.seed, "judge"]
        quality["judge"] = common.over_repeats([evaluate_net(JUDGE, judge, data)])
        for layer in layers:
            units = [found[f"seed{seed}-search-{layer}"] for seed in seeds]
            for rule in units[0]:
                if rule != "walk":
                    ours = []
                    for unit in units:
                        ours.append(evaluate_search(unit[rule], judge, args.device))
                    at[layer, rule] = common.over_repeats(ours)

        n = args.generations * args.seeds
        first = {layer: found[f"seed{args.seed}-search-{layer}"] for layer in layers}
        plot(run, first, at, nets, real_digits(*data["test"]), n)
        named = {f"{layer}, {rule}": measures for (layer, rule), measures in at.items()}
        results = {"nets": quality, "searches": named}
        judged = args.preset != "smoke" and args.seeds > 1  # something learned, a spread
        return run.finish(results, claims(at, quality, args.generations),
                          tables_of(quality, at, named, n), metrics_of(tasks, trained), judged)


if __name__ == "__main__":
    main()
