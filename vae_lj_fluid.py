"""A two-dimensional Lennard-Jones fluid under gravity, and a VAE on its distance matrices.

Reproduces Bacilieri, Barbiero, Bordin, Pitteri, "Variational Auto Encoders" (slides of
an exam, 2023). Thirty particles in a box, in units of sigma and epsilon, have the energy

    U = sum_{i<j} 4 (r_ij^-12 - r_ij^-6) + gamma sum_i y_i

and are sampled by Metropolis moves (argon's gamma is about 1e-13; here it is 0.1 to 1).
A VAE learns the matrices of distances r_ij / (L sqrt 2), four gammas together:

    loss = MSE(x, x_hat) + lambda KL(q(z|x) || N(0, 1)), means over entries and dimensions

    python vae_lj_fluid.py                       about 14 minutes on 2 CPU cores
    python vae_lj_fluid.py --lambdas 0.000035    then another weight of the KL, same folder
    python vae_lj_fluid.py --sweeps 10000 --out out/settled   nearer to equilibrium

A run leaves figures, tables, sets of data and nets (units/*.pt) in its folder. Of the slides:
potentials, gammas, 10,000 configurations of each, D = 40, and the claims. Of the authors' code:
all other settings of sampler and main VAE, and the MSE, KL and Jensen-Shannon distance to be
met; the acceptances are those of a run of it. Our choices:
* Quick takes nearly as many steps as that code (2,400 of 2,500), on an eighth of its samples:
  4,000 configurations of a gamma, 3 epochs, batches of 16 (there 10,000, 10 and 128).
* Variants of the main VAE (convolutional, distances to distances) have fewer epochs than the
  other nets; they are compared with it at equal steps.
* Errors are of mean codes (eps = 0), but the MSE and KL beside the published ones are means
  over the steps of the last epoch. A verdict's "±" is over test configurations, of one net.
* The thresholds in the claims (half, 90 %, 10 %, 50 %, 0.5) are ours: the document says
  "lower", "well", "no pattern".
* "unit" nets have the lambda of the slides' own likelihood, without its 1/2: D / entries.
"""
import math
from typing import NamedTuple

import common  # before torch: from here on Ctrl-C is one line
import torch
import torch.nn.functional as F
from torch import nn

# C configurations (chains), N particles, G gammas, B batch, D latent dimensions, K records.
# variant_epochs  of the variants of the main VAE
# tests           how many configurations are evaluated, of each set
# chains          of a gamma, in the long run
PRESETS = {
    "smoke": dict(configurations=25, sweeps=10, epochs=1, latents=[5], lambdas=[3.5e-3],
                  compile=False, batch=32, variant_epochs=1, tests=20, chains=10),
    "quick": dict(configurations=4000, sweeps=2500, epochs=3, latents=[5], lambdas=[3.5e-3],
                  compile=True, batch=16, variant_epochs=1, tests=2000, chains=200),
    "paper": dict(configurations=10_000, sweeps=2500, epochs=10, latents=[5, 20, 80],
                  lambdas=[3.5e-5, 3.5e-3], compile=True, batch=128, variant_epochs=3,
                  tests=8000, chains=1000)}
N = 30                     # particles
L = 10.0                   # side of the box, sigma
T = 0.75                   # temperature, epsilon
SCALE = L * math.sqrt(2)   # of all data: the largest distance in the box is 1
GAMMAS = [0.1, 0.4, 0.7, 1.0]
UNSEEN, FAKE = 3.0, 0.5    # gammas of two sets that are not trained on
STEP = 0.2                 # largest move of a coordinate, sigma
CUTOFF = 3.0               # where the potential ends, sigma
CORE = 1e-3                # constant energy below this r^2, for finite random starts
CHUNK = 5000               # chains at a time on a CPU, so that they stay in its cache
LATENT, LAMBDA = 40, 0.00035  # the authors' D, and weight of the KL
RECORDS = 40               # of energies in the long run, which has 10 times the sweeps
RATE = 1e-3                # Adam's
CELLS = 20                 # of the grid, per side: 0.5 sigma each
BLOCKS = [3, 6, 9, 12, 15]  # sides of blacked-out blocks
BINS = 50                  # of energies
ACCEPTANCE = {0.1: 0.704, 0.4: 0.662, 0.7: 0.606, 1.0: 0.557}  # of the authors' sampler
MAIN = "distances-conv"
AGAIN = "distances-conv-again"
AUTOENCODER = "distances-conv-AE"


class Model(NamedTuple):
    """What goes into a net and comes out, and how it is trained."""
    net: str = "conv"
    input: str = "distances"
    output: str = "distances"
    latent: int = LATENT
    lam: float = LAMBDA        # lambda; 0: no noise, a plain autoencoder


UNIT = LATENT / N ** 2     # lambda if squared error and KL are sums, as on the slides
MODELS = {
    MAIN: Model(),
    AGAIN: Model(),  # from another start: how far apart are two of them?
    AUTOENCODER: Model(lam=0.0),
    "distances-conv-unit": Model(lam=UNIT),
    "distances-deep-conv": Model("deep"),
    "distances-dense": Model("dense"),
    "distances-dense-unit": Model("dense", lam=UNIT),
    "coordinates-dense": Model("dense", "coordinates", "coordinates"),
    "coordinates-dense-unit": Model("dense", "coordinates", "coordinates",
                                    lam=LATENT / (2 * N)),
    "grid-conv": Model("conv", "grid", "grid"),
    "matrix-to-points-dense": Model("dense", "distances", "coordinates", 2 * N, 0.0),
    "matrix-to-points-conv": Model("conv", "distances", "coordinates", 2 * N, 0.0)}


# --- data: the fluid --------------------------------------------------------------------

def lennard_jones(r2):
    """4 (r^-12 - r^-6) in epsilon, of r2 in sigma^2; it ends at r = 3 with a jump of 0.0055."""
    s = 1 / r2.clamp(min=CORE)  # finite at r = 0, too
    s = s * s * s               # r^-6
    return torch.where(r2 <= CUTOFF ** 2, 4 * (s * s - s), 0.0)  # "Physical problem"


def fake(r2):
    """4 (r^-4 - r^-2), as above, without a cut-off. Slide "Different potential"."""
    s = 1 / r2.clamp(min=CORE)  # r^-2
    return 4 * (s * s - s)


def energy(xy, gamma, pair):
    """U (C,) in epsilon of positions xy (2, N, C) in sigma; pair, gamma: as in metropolis."""
    n = xy.shape[1]
    i, j = torch.triu_indices(n, n, 1, device=xy.device)  # (P,) pairs
    r2 = ((xy[:, i] - xy[:, j]) ** 2).sum(0)  # (P, C)
    return pair(r2).sum(0) + gamma * xy[1].sum(0)  # U' of "Physical problem"


def trial(xy, u):
    """Trial positions (2, N, C) of a sweep, and the rise in energy (N, C) each may cause.

    xy in sigma; u (3, N, C) uniform in [0, 1). Metropolis accepts if u < exp(-dU / T), that is
    if dU < -T log u, the budget in epsilon. A sweep's trials can be drawn first: no particle
    moves before its own.
    """
    new = xy + STEP * (2 * u[:2] - 1)  # uniform in a square
    inside = (new > 0) & (new < L)     # walls: a coordinate that would leave stays
    return torch.where(inside, new, xy), -T * torch.log(u[2])


def move(xy, old, new, others, gamma, budget, pair):
    """Where a particle of every chain xy (2, N, C) is after its trial move: (2, C).

    old, new (2, C); others (N, 1): 0 for the particle itself, else 1; budget (C,): of trial.
    """
    before = ((xy - old[:, None]) ** 2).sum(0)  # (N, C), squared distances
    after = ((xy - new[:, None]) ** 2).sum(0)
    change = ((pair(after) - pair(before)) * others).sum(0)  # (C,)
    change = change + gamma * (new[1] - old[1])
    return torch.where(change < budget, new, old)  # accept, or stay


def share_accepted(xy, new):
    """The share of a sweep's trials that were accepted, of positions after it. (2, N, C)"""
    return (xy == new).all(0).float().mean()


def metropolis(gamma, chains, sweeps, pair, g, compile=False, start=None):
    """Metropolis sampling of independent systems, slide "Metropolis Algorithm".

    Returns positions (2, N, C) in sigma after the last sweep, and the share of accepted moves
    in every tenth sweep. Each chain starts anew: the document resets after every sampling.

    gamma: m g sigma / epsilon, a number or a tensor (C,)
    pair: a function from squared distances in sigma^2 to energies in epsilon
    g: generator on the device to compute on
    start: positions to go on from, else uniform random ones
    """
    steps = [trial, move, share_accepted]
    if compile:
        steps = [torch.compile(step, dynamic=False) for step in steps]
    propose, decide, count = steps
    if start is None:
        start = L * torch.rand(2, N, chains, generator=g, device=g.device)
    xy = start.clone()
    gamma = torch.as_tensor(gamma, device=g.device)
    others = (1 - torch.eye(N, device=g.device))[..., None].unbind()  # (N, 1) each
    accepted = []
    for sweep in range(sweeps):
        u = torch.rand(3, N, chains, generator=g, device=g.device)
        new, budget = propose(xy, u)
        for i in range(N):  # in order, as the document does; the next one sees it moved
            xy[:, i] = decide(xy, xy[:, i], new[:, i], others[i], gamma, budget[i], pair)
        if sweep % 10 == 0:
            accepted.append(count(xy, new))
    return xy, torch.stack(accepted).mean()


def sample(name, gamma, count, sweeps, pair, seed, device, compile):
    """A work unit: last configurations "xy" (C, N, 2), and the "acceptance"."""
    chunk = count
    if device == "cpu":
        chunk = CHUNK
    parts = []
    accepted = 0
    for first in range(0, count, chunk):
        chains = min(chunk, count - first)
        g = common.generator(seed, f"{name} {first}", device)
        xy, share = metropolis(gamma, chains, sweeps, pair, g, compile)
        parts.append(xy.permute(2, 1, 0).cpu())  # (2, N, C) -> (C, N, 2)
        accepted += share.item() * chains / count
    return {"xy": torch.cat(parts), "acceptance": accepted}


def long_run(chains, every, seed, device, compile):
    """A work unit: "energy" (K, G, C) of chains of all gammas, after every so many sweeps."""
    g = common.generator(seed, "long", device)
    gamma = torch.tensor(GAMMAS, device=device).repeat_interleave(chains)  # (G C,)
    xy = L * torch.rand(2, N, len(gamma), generator=g, device=device)
    log = torch.zeros(RECORDS, 1, len(gamma), device=device)
    for k in common.steps("long", RECORDS, log, ["energy"], xy, g):
        new, _ = metropolis(gamma, len(gamma), every, lennard_jones, g, compile, xy)
        xy.copy_(new)
        log[k, 0] = energy(xy, gamma, lennard_jones)
    return {"energy": log[:, 0].unflatten(1, (len(GAMMAS), chains))}


def can_compile(device="cpu"):
    """Compile something small: where that fails, one note says why."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # no compiler, one that fails, a folder with a space: many kinds
        why = str(error).strip().partition("\n")[0][:100]
        common.note(f"note: torch.compile does not work here ({why}): running without it, "
                    "which is slower")
        return False


# --- data: what the nets see ------------------------------------------------------------

def by_origin(xy):
    """Particles sorted by their distance from the origin. (C, N, 2) -> (C, N, 2)"""
    order = (xy ** 2).sum(-1).argsort(1)  # (C, N)
    return xy.gather(1, order[..., None].expand_as(xy))


def distance_matrix(xy):
    """(C, N, 2) -> (C, 1, N, N)"""
    return (xy[:, :, None] - xy[:, None]).norm(dim=-1)[:, None]  # torch.cdist loses digits


def occupancy(xy):
    """1 in cells with a particle, the floor first. xy (C, N, 2) in L sqrt 2 -> (C, 1, M, M)"""
    cell = (xy * CELLS * math.sqrt(2)).long().clamp(0, CELLS - 1)  # (C, N, 2): column, row
    image = torch.zeros(len(xy), CELLS ** 2, device=xy.device)
    image.scatter_(1, CELLS * cell[..., 1] + cell[..., 0], 1.0)
    return image.view(-1, 1, CELLS, CELLS)  # "Alternative Representation"


def represent(kind, xy):
    """What a net sees, or puts out, of configurations xy (C, N, 2)."""
    if kind == "distances":
        return distance_matrix(xy)
    if kind == "grid":
        return occupancy(xy)
    return xy


def corrupt(xy, reading, g):
    """Move four particles of each of xy (C, N, 2); and which were moved (C, N).

    By up to 0.2 L sqrt 2 (2.8 sigma): per coordinate, as the authors' "code" does, or in a
    random direction, as the "slide" says ("Corrupting data"). Their order stays.
    """
    u = torch.rand(xy.shape, generator=g, device=xy.device)  # (C, N, 2)
    if reading == "code":
        step = 0.4 * u - 0.2
    else:
        length = 0.2 * u[..., 0]
        angle = 2 * math.pi * u[..., 1]
        step = torch.stack([length * angle.cos(), length * angle.sin()], -1)
    order = torch.rand(xy.shape[:2], generator=g, device=xy.device).argsort(1)
    moved = order < 4  # rows of order are permutations
    return xy + moved[..., None] * step, moved


def black_out(d, size, g):
    """Set a block of size x size entries of each d (C, 1, N, N), and its mirror image, to 0.

    Returns the matrices, and which distances are hidden; the diagonal's zeros are none.
    """
    n = d.shape[-1]
    corner = torch.randint(n - size + 1, (len(d), 2, 1), generator=g, device=d.device)
    at = torch.arange(n, device=d.device)
    inside = (at >= corner) & (at < corner + size)  # (C, 2, N): rows, columns
    where = (inside[:, 0, :, None] & inside[:, 1, None])[:, None]  # (C, 1, N, N)
    where = (where | where.mT) & (at[:, None] != at)  # the mirror image would tell them
    return d.masked_fill(where, 0.0), where


# --- model ------------------------------------------------------------------------------

class VAE(nn.Module):
    """An encoder to means and log variances (B, 2 D), and a decoder from codes (B, D)."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, x, eps):
        """x and standard normal eps (B, D), or zeros, to x_hat, mu, logvar."""
        mu, logvar = self.encoder(x).chunk(2, 1)  # (B, 2 D) -> (B, D) each
        z = mu + eps * (0.5 * logvar).exp()
        return self.decoder(z), mu, logvar


def convolutions(channels):
    """3x3 convolutions that keep rows and columns, a ReLU after each."""
    layers = []
    for a, b in zip(channels, channels[1:]):
        layers.append(nn.Conv2d(a, b, 3, padding=1))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def conv_vae(side, latent, widths=(60, 50)):
    """The document's net on images (B, 1, S, S) in [0, 1].

    The authors' transposed convolutions, of stride 1, are convolutions; there is one more of
    them than in the encoder.
    """
    first = widths[0]
    last = widths[-1]
    encoder = nn.Sequential(
        convolutions((1, *widths)), nn.Flatten(), nn.Linear(last * side ** 2, 2 * latent))
    decoder = nn.Sequential(
        nn.Linear(latent, last * side ** 2), nn.ReLU(), nn.Unflatten(1, (last, side, side)),
        convolutions((last, *widths[::-1])), nn.Conv2d(first, 1, 3, padding=1), nn.Sigmoid())
    return VAE(encoder, decoder)


def dense_vae(shape, latent):
    """A fully connected net on data (B, *shape) in [0, 1]."""
    size = math.prod(shape)
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(size, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(),
        nn.Linear(256, 2 * latent))
    decoder = nn.Sequential(
        nn.Linear(latent, 256), nn.ReLU(), nn.Linear(256, 512), nn.ReLU(),
        nn.Linear(512, size), nn.Sigmoid(), nn.Unflatten(1, shape))
    return VAE(encoder, decoder)


def build(name, model, seed):
    """The untrained net, with Glorot's weights as in Keras."""
    shapes = {"coordinates": (N, 2), "distances": (1, N, N), "grid": (1, CELLS, CELLS)}
    shape = shapes[model.input]
    if model.net == "conv":
        net = conv_vae(shape[1], model.latent)
    elif model.net == "deep":
        net = conv_vae(shape[1], model.latent, (60, 60, 50))
    else:
        net = dense_vae(shape, model.latent)
    if model.output != model.input:
        net = VAE(net.encoder, dense_vae(shapes[model.output], model.latent).decoder)
    g = common.generator(seed, f"net {name}")
    for value in net.parameters():
        if value.dim() > 1:
            nn.init.xavier_uniform_(value, generator=g)
        else:
            nn.init.zeros_(value)
    return net.to(memory_format=torch.channels_last)  # the faster one


# --- objective --------------------------------------------------------------------------

def kl_divergence(mu, logvar):
    """KL(N(mu, exp logvar) || N(0, 1)) in nats, mu and logvar (B, D) -> (B, D)"""
    return -0.5 * (1 + logvar - mu ** 2 - logvar.exp())  # "Sampling in latent space"


def vae_loss(net, x, target, eps, lam):
    """MSE + lambda KL, and both terms: means over entries (MSE) and latent dimensions (KL).

    net(x, eps) gives x_hat, mu, logvar: a VAE as above. x: input (B, ...); target: what x_hat
    should be, here x itself or the coordinates; eps (B, D): standard normal; lam: lambda
    """
    x_hat, mu, logvar = net(x, eps)
    error = ((x_hat - target) ** 2).mean()
    kl = kl_divergence(mu, logvar).mean()
    return error + lam * kl, error, kl  # "Wrapping up"


def grid_loss(net, x, eps, lam, progress):
    """Weighted cross-entropy + lambda KL of grids x (B, 1, M, M), and both terms.

    "Epoch dependent": from progress 0 to 1 the weight of live cells falls to 1, lambda rises.
    """
    x_hat, mu, logvar = net(x, eps)
    live = (1 / x.mean() - 1) ** (1 - progress)  # empty cells per live one, falling to 1
    error = F.binary_cross_entropy(x_hat, x, 1 + (live - 1) * x)
    kl = kl_divergence(mu, logvar).mean()
    return error + progress * lam * kl, error, kl


# --- train ------------------------------------------------------------------------------

def train(name, net, model, xy, test, epochs, batch, g):
    """Adam on configurations xy (C, N, 2).

    Returns first term of the loss and KL of each step (steps, 2), and the MSE of mean codes on
    `test`, before training and after each epoch (epochs + 1,).
    """
    per_epoch = math.ceil(len(xy) / batch)
    optimiser = torch.optim.Adam(net.parameters(), RATE, fused=True)
    log = torch.zeros(epochs * per_epoch, 2, device=xy.device)
    errors = torch.zeros(epochs + 1, device=xy.device)
    errors[0] = test_error(net, model, test)
    order = torch.arange(len(xy), device=xy.device)
    parts = net, optimiser, g, order, errors
    for step in common.steps(name, len(log), log, ["error", "KL"], *parts):
        epoch, k = divmod(step, per_epoch)
        if k == 0:
            order.copy_(torch.randperm(len(xy), generator=g, device=xy.device))
        some = xy[order[k * batch:(k + 1) * batch]]  # (B, N, 2)
        x = represent(model.input, some)
        target = represent(model.output, some)
        eps = torch.randn(len(x), model.latent, generator=g, device=xy.device)
        if model.lam == 0:
            eps = torch.zeros_like(eps)  # a plain autoencoder
        if model.input == "grid":
            loss, error, kl = grid_loss(net, x, eps, model.lam, step / len(log))
        else:
            loss, error, kl = vae_loss(net, x, target, eps, model.lam)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        log[step] = torch.stack([error, kl]).detach()
        if k == per_epoch - 1:
            errors[epoch + 1] = test_error(net, model, test)
    return log, errors


def train_net(name, model, seed, xy, test, epochs, batch):
    """A work unit: weights, "log" (epochs, 2) and "test" (epochs + 1,), as of `train`."""
    net = build(name, model, seed).to(xy.device)
    g = common.generator(seed, f"batches {name}", xy.device)
    log, errors = train(name, net, model, xy, test, epochs, batch, g)
    means = log.unflatten(0, (epochs, -1)).mean(1)  # (epochs, 2)
    return {"weights": net.state_dict(), "log": means, "test": errors}


# --- evaluate: nets ---------------------------------------------------------------------

@torch.no_grad()
def evaluate(net, x):
    """Of the mean codes of x (C, ...): what is decoded, the codes, their KL: (C, D) both."""
    x_hat = []
    codes = []
    kl = []
    for some in x.split(250):
        mu, logvar = net.encoder(some).chunk(2, 1)
        x_hat.append(net.decoder(mu))
        codes.append(mu)
        kl.append(kl_divergence(mu, logvar))
    return torch.cat(x_hat), torch.cat(codes), torch.cat(kl)


def reconstruct(net, model, xy):
    """What a net makes of configurations xy (C, N, 2), in the representation of its output."""
    x_hat, _, _ = evaluate(net, represent(model.input, xy))
    return x_hat


def test_error(net, model, xy):
    """MSE of a net's reconstructions of configurations xy (C, N, 2)."""
    return squared_error(reconstruct(net, model, xy), represent(model.output, xy)).mean()


def squared_error(a, b):
    """(C, ...) twice -> (C,), the mean over entries."""
    return ((a - b) ** 2).flatten(1).mean(1)


def pca(x, k):
    """Mean, k axes of largest variance (size, k) and their shares of it, of x (C, ...)."""
    flat = x.flatten(1)
    covariance = torch.cov(flat.T.cpu().double())
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    axes = vectors.flip(1)[:, :k].to(x)
    shares = values.flip(0)[:k] / values.sum()
    return flat.mean(0), axes, shares


def pca_reconstruct(x, other, k):
    """`other` (C, ...) through the k principal components of x."""
    mean, axes, _ = pca(x, k)
    centred = other.flatten(1) - mean
    return (mean + centred @ axes @ axes.T).view_as(other)


def evaluate_representations(nets, xy, test):
    """{name: measures (C,) on test} of all nets, of PCA and of the mean of the training set xy.

    "error": squared error of the output; "trivial": that of the training set's mean;
    "distances": squared error in sigma^2 of the distances it implies (of a grid: none).
    """
    found = {}
    d = distance_matrix(test)
    for kind in ("coordinates", "distances", "grid"):
        x = represent(kind, xy)
        target = represent(kind, test)
        mean = x.mean(0).expand_as(target)
        guesses = {f"{kind}, mean": mean,
                   f"{kind}, PCA-{LATENT}": pca_reconstruct(x, target, LATENT)}
        for name, (net, model) in nets.items():
            if model.output == kind:
                guesses[name] = reconstruct(net, model, test)
        for name, x_hat in guesses.items():
            one = {"error": squared_error(x_hat, target),
                   "trivial": squared_error(mean, target)}
            if kind == "coordinates":
                x_hat = distance_matrix(x_hat)
            if kind != "grid":
                one["distances"] = SCALE ** 2 * squared_error(x_hat, d)
            found[name] = one
    return found


def y_gradient(data):
    """Squared error (C,) on the test set's grids if all cells of a row are predicted by the
    mean of that row over the training set of the same gamma."""
    grids = occupancy(data.test)
    errors = torch.zeros(len(grids), device=grids.device)
    for value in data.gamma.unique():
        known = occupancy(data.xy[data.gamma_xy == value])
        rows = known.mean((0, 3), keepdim=True)  # (1, 1, M, 1)
        at = data.gamma == value
        errors[at] = squared_error(grids[at], rows)
    return errors


# --- evaluate: points of matrices -------------------------------------------------------

def gram_coordinates(d):
    """Points (C, N, 2) in float64 of distance matrices d (C, N, N), slide "Gram matrices".

    The points are known up to a rigid motion. Also returns how planar they are: the share (C,)
    of the two largest eigenvalues, 1 for distances in a plane.
    """
    square = d.double() ** 2
    gram = (square[:, :, :1] + square[:, :1] - square) / 2  # g_ij = x_i . x_j, x_1 = 0
    values, vectors = torch.linalg.eigh(gram)  # ascending: (C, N), (C, N, N)
    U = vectors[..., -2:]
    S = values[:, -2:]  # the two largest
    points = U * S.clamp(min=0).sqrt()[:, None]  # X = U sqrt S
    return points, S.sum(1) / values.abs().sum(1)


def procrustes(points, goal):
    """Points (C, N, 2) shifted, turned and, if need be, mirrored onto goal, alike in shape and
    dtype."""
    centre = goal.mean(1, keepdim=True)
    a = points - points.mean(1, keepdim=True)
    U, _, Vh = torch.linalg.svd(a.mT @ (goal - centre))  # (C, 2, 2)
    return a @ U @ Vh + centre


def turbo_tumbler(points):
    """Turn points (C, N, 2) in sigma to the least potential energy on the floor of the box.

    In "turbo tumbler" the hull sits on its side nearest to the centre of mass: here all turns by
    half a degree are tried for the least sum of y. x is centred; wide shapes leave the box.
    """
    angle = torch.arange(720, device=points.device, dtype=points.dtype)
    angle = angle * (2 * math.pi / 720)
    parts = []
    for some in points.split(250):
        x = some[..., :1]  # (C, N, 1)
        y = some[..., 1:]
        height = angle.sin() * x + angle.cos() * y  # (C, N, A), of the points when turned
        rise = height.mean(1) - height.amin(1)  # of the centre of mass above the lowest one
        best = angle[rise.argmin(1)][:, None, None]  # (C, 1, 1)
        right = best.cos() * x - best.sin() * y
        up = best.sin() * x + best.cos() * y
        middle = (right.amin(1, keepdim=True) + right.amax(1, keepdim=True)) / 2
        right = right - middle + L / 2
        up = up - up.amin(1, keepdim=True)
        parts.append(torch.cat([right, up], -1))
    return torch.cat(parts)


def points_of(d_hat):
    """Points (C, N, 2) in sigma of decoded matrices (C, 1, N, N), and how planar they are."""
    d = SCALE * d_hat[:, 0].double()
    d = (d + d.mT) / 2  # as distances are
    d = d * (1 - torch.eye(N, device=d.device))
    return gram_coordinates(d)


def outside_core(r2):
    """Lennard-Jones without the pairs nearer than sigma, as the document's energies."""
    return torch.where(r2 >= 1, lennard_jones(r2), 0.0)


def energies_of(xy, gamma):
    """Energies (C,) of configurations xy (C, N, 2) in sigma, pairs nearer than 1 left out."""
    return energy(xy.permute(2, 1, 0), gamma, outside_core)


def jensen_shannon(a, b, bins=BINS):
    """Jensen-Shannon distance of two samples' histograms, from 0 to sqrt(log 2) = 0.833."""
    low = min(a.min(), b.min()).item()
    high = max(a.max(), b.max()).item()
    a = a.float().cpu()
    b = b.float().cpu()
    p = torch.histc(a, bins, low, high).double() / len(a)
    q = torch.histc(b, bins, low, high).double() / len(b)
    m = (p + q) / 2
    terms = torch.xlogy(p, p / m) + torch.xlogy(q, q / m)
    divergence = terms.nan_to_num(0.0).sum() / 2  # 0 / 0 in bins that are empty in both
    return divergence.clamp(min=0).sqrt().item()  # the root, as SciPy's jensenshannon


def pair_correlation(xy, bins=60, end=3.0):
    """g(r) of configurations xy (C, N, 2) in sigma: middles of the bins, and g.

    Normalised by other configurations: distances within one, over those from one to the next.
    Gravity and walls drop out if both have the same gamma.
    """
    i, j = torch.triu_indices(N, N, 1)
    within = distance_matrix(xy)[:, 0, i, j].float().cpu()
    other = xy.roll(1, 0)  # each beside the one before
    between = (xy[:, :, None] - other[:, None]).norm(dim=-1).float().cpu()
    share_within = torch.histc(within, bins, 0, end) / within.numel()
    share_between = torch.histc(between, bins, 0, end) / between.numel()
    middles = torch.linspace(0, end, 2 * bins + 1)[1::2]
    return middles, share_within / share_between


def overlaps(xy):
    """Pairs nearer than sigma in each configuration xy (C, N, 2) in sigma. (C,)"""
    near = distance_matrix(xy)[:, 0] < 1
    return (near.sum((1, 2)) - N) / 2  # a particle is no pair


def structure(x_hat, drawn, test, gamma):
    """What matrices are as points, {name: measures (C,)}: the true ones, reconstructions x_hat
    of the test set (C, N, 2), and what is drawn from the prior.

    "tumbled" and "aligned" (C, N, 2) in sigma, by the tumbler and by Procrustes; "true" stands
    as it is, and "true, tumbled" is what a perfect net would give.
    """
    xy = SCALE * test.double()
    exact, exact_planar = gram_coordinates(distance_matrix(xy)[:, 0])
    points, planar = points_of(x_hat)
    drawn_points, drawn_planar = points_of(drawn)
    found = {"true": {"tumbled": xy, "planar": exact_planar},
             "true, tumbled": {"tumbled": turbo_tumbler(exact), "planar": exact_planar},
             "reconstructed": {"tumbled": turbo_tumbler(points), "planar": planar,
                               "aligned": procrustes(points, xy)},
             "drawn": {"tumbled": turbo_tumbler(drawn_points), "planar": drawn_planar}}
    order = gamma.argsort()  # neighbours of one gamma, for g(r); draws have none
    for name, one in found.items():
        one["overlaps"] = overlaps(one["tumbled"])
        if name == "drawn":
            one["g"] = pair_correlation(one["tumbled"])
        else:
            one["g"] = pair_correlation(one["tumbled"][order])
            one["energy"] = energies_of(one["tumbled"], gamma)
    return found


# --- evaluate: latent space, anomalies --------------------------------------------------

def mean_codes(mu, gamma):
    """The mean code of each gamma. (C, D), (C,) -> (G, D)"""
    return torch.stack([mu[gamma == value].mean(0) for value in gamma.unique()])


def nearest_gamma(mu, means, gammas):
    """The gamma (C,), of gammas (G,), whose mean code (G, D) is nearest to each of mu (C, D)."""
    apart = (mu[:, None] - means).norm(dim=-1)  # (C, G)
    return gammas[apart.argmin(1)]


def finds_gamma(mu, gamma):
    """Is the nearest mean code that of the own gamma? Means are of the first half of the codes
    mu (C, D); the answers (C / 2,) are of the second."""
    half = len(mu) // 2
    means = mean_codes(mu[:half], gamma[:half])
    nearest = nearest_gamma(mu[half:], means, gamma[:half].unique())
    return (nearest == gamma[half:]).double()


def spread(mu, groups):
    """Distances (C,) of codes mu (C, D) from the mean code of their group (C,)."""
    values, place = groups.unique(return_inverse=True)
    return (mu - mean_codes(mu, groups)[place]).norm(dim=1)


def auroc(normal, anomalous):
    """How often an anomalous score is above a normal one, equal ones counting half."""
    scores = normal.sort().values
    below = torch.searchsorted(scores, anomalous)
    up_to = torch.searchsorted(scores, anomalous, right=True)
    return ((below + up_to) / 2 / len(normal)).mean().item()


def evaluate_anomalies(net, untrained, mean, sets, gamma):
    """{set: measures (C,)} of matrices {name: (C, 1, N, N)}; "test" among them has the gammas.

    Beside the RMSE that of the mean matrix, and beside the spread that of an untrained net.
    """
    _, test, _ = evaluate(net, sets["test"])
    means = mean_codes(test, gamma)
    found = {}
    for name, d in sets.items():
        x_hat, mu, _ = evaluate(net, d)
        _, before, _ = evaluate(untrained, d)
        groups = torch.zeros(len(d), device=d.device)
        if name == "test":
            groups = gamma
        found[name] = {"rmse": SCALE * squared_error(x_hat, d).sqrt(), "mu": mu,
                       "mean rmse": SCALE * squared_error(mean, d).sqrt(),
                       "nearest": nearest_gamma(mu, means, gamma.unique()),
                       "spread": spread(mu, groups), "untrained": spread(before, groups)}
    return found


def evaluate_corruption(net, mean, test, x_hat, reading, g):
    """Paired measures (C,) of test configurations (C, N, 2), x_hat of the original ones.

    Do the errors of net and of mean matrix rise? How far do reconstructions move ("shift")
    where neither particle was moved, and where one was ("touched")?
    """
    xy, moved = corrupt(test, reading, g)
    d = distance_matrix(test)
    bad = distance_matrix(xy)
    out, _, _ = evaluate(net, bad)
    touched = (moved[:, :, None] | moved[:, None])[:, None]  # (C, 1, N, N)
    pairs = ~torch.eye(N, dtype=torch.bool, device=d.device)  # a particle is none with itself
    return {"rises": squared_error(out, bad) > squared_error(x_hat, d),
            "mean rises": squared_error(mean, bad) > squared_error(mean, d),
            "shift": rmse_at(out - x_hat, ~touched & pairs),
            "touched": rmse_at(out - x_hat, touched & pairs), "d": bad, "x_hat": out}


def rmse_at(difference, where):
    """RMS (C,) in sigma of matrices (C, 1, N, N) where a mask is True."""
    squares = (difference ** 2 * where).sum((1, 2, 3))
    return SCALE * (squares / where.sum((1, 2, 3))).sqrt()


def evaluate_missing(net, mean, d, size, g):
    """RMSE (C,) in sigma of the distances in blacked-out blocks of d (C, 1, N, N): of the mean
    matrix, and of reconstructions of the black matrix. Slide "missing data"."""
    black, where = black_out(d, size, g)
    restored, _, _ = evaluate(net, black)
    return {"mean": rmse_at(mean - d, where), "restored": rmse_at(restored - d, where),
            "d": black, "x_hat": restored}


def texture(d):
    """RMS step (C,) between neighbours above the diagonal of d (C, 1, N, N); 0: all equal."""
    steps = d[:, 0, :, 1:] - d[:, 0, :, :-1]  # (C, N, N - 1)
    above = torch.ones_like(steps[0]).triu(1) > 0
    return steps[:, above].square().mean(1).sqrt()


@torch.no_grad()
def probe(decoder, kl, g):
    """Decode along the five dimensions of largest kl (D,); slide "Latent space probing".

    "along" (5, 7, N, N): one dimension from -3 to 3, the others 0; "draws" (200, 1, N, N):
    standard normal in the five, 0 in the others; "top": the dimensions; "cosines" (10,)
    between what two of them change.
    """
    top = kl.topk(5).indices
    z = torch.zeros(5, 7, len(kl), device=kl.device)
    for k, dimension in enumerate(top):
        z[k, :, dimension] = torch.linspace(-3, 3, 7, device=kl.device)
    along = decoder(z.flatten(0, 1)).view(5, 7, N, N)
    z = torch.zeros(200, len(kl), device=kl.device)
    z[:, top] = torch.randn(200, 5, generator=g, device=kl.device)
    change = (along[:, -1] - along[:, 0]).flatten(1)
    change = F.normalize(change, dim=1)
    i, j = torch.triu_indices(5, 5, 1)
    return {"along": along, "draws": decoder(z), "top": top.tolist(),
            "cosines": (change @ change.T).abs()[i, j]}


def properties(xy):
    """{what is known of configurations xy (C, N, 2) in sigma: (C,)}"""
    d = distance_matrix(xy)[:, 0]
    return {"height of the centre of mass": xy[..., 1].mean(1),
            "width (deviation of x)": xy[..., 0].std(1),
            "contacts (pairs nearer than 1.5 σ)": (d < 1.5).sum((1, 2)) / 2.0,
            "energy without gravity": energies_of(xy, 0.0)}


def r_squared(codes, y):
    """Share of the variance of y (C,) that codes (C, D) explain linearly: fitted on the first
    half, measured on the second."""
    half = len(codes) // 2
    x = F.pad(codes.cpu().double(), (0, 1), value=1.0)
    y = y.cpu().double()
    weights = torch.linalg.lstsq(x[:half], y[:half, None], driver="gelsd").solution
    rest = y[half:] - (x[half:] @ weights)[:, 0]
    return (1 - rest.square().mean() / y[half:].var(correction=0)).item()


def same_neighbour(mu, gamma):
    """Has the nearest other code of mu (C, D) the same gamma? (C,)"""
    apart = torch.cdist(mu, mu, compute_mode="donot_use_mm_for_euclid_dist")  # exact
    apart.fill_diagonal_(math.inf)  # itself
    return (gamma[apart.argmin(1)] == gamma).double()


class Data(NamedTuple):
    """All that the nets see, configurations in units of L sqrt 2."""
    xy: torch.Tensor           # (C, N, 2), to train
    test: torch.Tensor         # (C', N, 2)
    gamma_xy: torch.Tensor     # (C,)
    gamma: torch.Tensor        # (C',)
    unseen: torch.Tensor       # gamma = 3
    fake: torch.Tensor         # the other potential


def measure(nets, data, seed):
    """All figures of trained nets {name: (net, model)}, or of any others."""
    test = data.test
    gamma = data.gamma
    net, _ = nets[MAIN]
    untrained = build(MAIN, MODELS[MAIN], seed).to(test.device)
    d = distance_matrix(test)
    g = common.generator(seed, "evaluate", test.device)
    mean = distance_matrix(data.xy).mean(0)  # (1, N, N)
    x_hat, mu, kl = evaluate(net, d)
    _, before, _ = evaluate(untrained, d)
    kl = kl.mean(0)

    found = {"x_hat": x_hat, "y gradient": y_gradient(data),
             "representations": evaluate_representations(nets, data.xy, test)}
    z = torch.randn(len(test), LATENT, generator=g, device=test.device)
    with torch.no_grad():
        drawn = torch.cat([net.decoder(some) for some in z.split(250)])
    found["structure"] = structure(x_hat.cpu(), drawn.cpu(), test.cpu(), gamma.cpu())
    points = reconstruct(*nets["matrix-to-points-conv"], test)
    found["learned points"] = procrustes(SCALE * points, SCALE * test).double().cpu()

    uniform = torch.rand(data.unseen.shape, generator=g, device=test.device) / math.sqrt(2)
    sets = {"test": d, "unseen": distance_matrix(data.unseen),
            "fake": distance_matrix(data.fake), "random": distance_matrix(by_origin(uniform))}
    found["anomalies"] = evaluate_anomalies(net, untrained, mean, sets, gamma)
    found["corrupted"] = {}
    found["missing"] = {}
    for reading in ("code", "slide"):
        found["corrupted"][reading] = evaluate_corruption(net, mean, test, x_hat, reading, g)
    for size in BLOCKS:
        found["missing"][size] = evaluate_missing(net, mean, d[:500], size, g)

    _, _, found["axes"] = pca(mu, 2)
    found["clusters"] = finds_gamma(mu, gamma)
    found["clusters before"] = finds_gamma(before, gamma)
    for name in (AGAIN, AUTOENCODER):
        _, found[f"codes {name}"], _ = evaluate(nets[name][0], d)
        found[f"neighbours {name}"] = same_neighbour(found[f"codes {name}"], gamma)
    found["probe"] = probed = probe(net.decoder, kl, g)
    along = probed["along"].flatten(0, 1)[:, None]  # (35, 1, N, N)
    found["texture"] = {"mean": texture(mean[None]), "real": texture(d),
                        "along": texture(along).view(5, 7), "draws": texture(probed["draws"])}
    found["knowledge"] = knowledge_rows(mu, before, SCALE * test)
    return found


def errors_after(epochs, models, units):
    """{name: test MSE after so many epochs} of the nets from distances to distances."""
    errors = {}
    for name, model in models.items():
        if model.input == model.output == "distances":
            errors[name] = units[name]["test"][epochs].item()
    return errors


# --- plot -------------------------------------------------------------------------------

def show_matrices(axes, matrices, titles=(), **options):
    """Matrices (N, N) in units of L sqrt 2, one on each of the axes."""
    for k, (ax, matrix) in enumerate(zip(axes, matrices)):
        image = ax.imshow(matrix.cpu().numpy(), **(dict(vmin=0, vmax=1) | options))
        ax.set_xticks([])
        ax.set_yticks([])
        if titles:
            ax.set_title(titles[k], fontsize="medium")
    return image


def show_points(ax, xy, colour):
    """Points (N, 2) in sigma, and the box."""
    ax.plot([0, L, L, 0, 0], [0, 0, L, L, 0], color="0.6", lw=0.8)
    ax.plot(*xy.cpu().T, "o", ms=4, color=colour)
    ax.set(aspect="equal", xlim=(-0.08 * L, 1.08 * L), ylim=(-0.08 * L, 1.08 * L), xticks=[],
           yticks=[])


def histogram(ax, values, low, high, colour, label, bins=50):
    """The probability density of values; what lies outside is counted in no bin."""
    values = values.float().cpu()
    count = torch.histc(values, bins, low, high)
    edges = torch.linspace(low, high, bins + 1)
    density = count / len(values) * bins / (high - low)
    ax.stairs(density.numpy(), edges.numpy(), color=colour, label=label, lw=1.3)


def plot_matrices(test, x_hat, structure, gamma):
    """One test configuration of each gamma: matrices, reconstructions, points."""
    d = distance_matrix(test)
    fig, axes = common.panels(len(GAMMAS), 6, 2.2, 2.2)
    titles = ["r / (L√2)", "reconstruction", "reconstruction - true", "true points",
              "red: reconstructed, by\nProcrustes; grey: true", "reconstructed,\nby the tumbler"]
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize="medium")
    for row, value in enumerate(gamma.unique()):
        k = (gamma == value).nonzero()[0, 0]
        matrix, rebuilt, apart, points, aligned, tumbled = axes[6 * row:6 * row + 6]
        matrix.set_ylabel(f"γ = {value:g}")
        image = show_matrices([matrix, rebuilt], [d[k, 0], x_hat[k, 0]])
        error = x_hat[k, 0] - d[k, 0]
        difference = show_matrices([apart], [error], cmap="RdBu_r", vmin=-0.2, vmax=0.2)
        true = structure["true"]["tumbled"][k]
        ours = structure["reconstructed"]
        show_points(points, true, common.COLOURS[0])
        show_points(aligned, true, "0.8")
        show_points(aligned, ours["aligned"][k], common.COLOURS[3])
        show_points(tumbled, ours["tumbled"][k], common.COLOURS[3])
    below = dict(orientation="horizontal", fraction=0.05, pad=0.02)
    fig.colorbar(image, ax=axes[-6:-4], **below)
    fig.colorbar(difference, ax=axes[-4:-3], **below)
    return fig


def plot_representations(nets, xy):
    """What nets make of one configuration (1, N, 2) in each representation."""
    fig, axes = common.panels(2, 4, 2.9, 2.9)
    show_points(axes[0], SCALE * xy[0], common.COLOURS[0])
    axes[0].set_title("coordinates", fontsize="medium")
    show_matrices(axes[4:5], [distance_matrix(xy)[0, 0]], ["distances / (L√2)"])
    names = ["coordinates-dense", "coordinates-dense-unit", "grid-conv",
             "distances-dense", "distances-dense-unit", "distances-conv-unit"]
    for ax, name in zip([axes[1], axes[2], axes[3], axes[5], axes[6], axes[7]], names):
        net, model = nets[name]
        x_hat = reconstruct(net, model, xy)
        if model.output == "coordinates":
            show_points(ax, SCALE * x_hat[0], common.COLOURS[3])
        elif model.output == "grid":
            show_matrices([ax], [x_hat[0, 0]], origin="lower")
            column, row = (xy[0] * CELLS * math.sqrt(2)).cpu().T - 0.5
            ax.plot(column, row, "x", ms=4, color="w")
            name = "grid-conv: probability of\na particle (×: true particles)"
        else:
            show_matrices([ax], [x_hat[0, 0]])
        ax.set_title(name, fontsize="medium")
    return fig


def plot_equilibrium(energies, every, sets, end):
    """Energies (K, G, C) of the long run against sweeps, the sets' end at `end` of them; how
    high the particles of the sets are."""
    fig, (run, profile) = common.panels(1, 2, 5, 3.6)
    sweeps = every * torch.arange(1, len(energies) + 1)
    for k, value in enumerate(GAMMAS):
        xy = sets[f"fluid-{value:g}"]
        colour = common.COLOURS[k]
        mean = energies[:, k].mean(1)
        error = energies[:, k].std(1) / energies.shape[2] ** 0.5
        run.plot(sweeps, mean, color=colour, label=f"γ = {value:g}")
        run.fill_between(sweeps, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.3)
        histogram(profile, xy[..., 1].flatten(), 0, L, colour, f"γ = {value:g}", 100)
    run.axvline(end, color="grey", ls=":", label="end of the sets")
    run.set(xscale="log", xlabel="sweeps", ylabel="U / ε (± 2 standard errors)")
    profile.set(yscale="log", xlabel="height y / σ", ylabel="density of a height / σ⁻¹")
    for ax in (run, profile):
        ax.legend(fontsize="small")
    return fig


def plot_structure(found):
    """Energies, and pair correlations, of true, reconstructed and drawn points."""
    fig, (energies, correlation) = common.panels(1, 2, 5, 3.6)
    names = ["true", "true, tumbled", "reconstructed"]
    shown = torch.cat([found[name]["energy"] for name in names])
    low = shown.quantile(0.001).item()
    high = shown.quantile(0.999).item()
    for name, colour in zip(names, common.COLOURS):
        histogram(energies, found[name]["energy"], low, high, colour, name)
    energies.set(xlabel="U / ε, pairs with r ≥ σ", ylabel="probability density",
                 title="energies")
    for k, name in enumerate(["true", "reconstructed", "drawn"]):
        correlation.plot(*found[name]["g"], color=common.COLOURS[2 * k], label=name)
    correlation.axvline(1, color="grey", ls=":", label="σ")
    correlation.set(xlabel="r / σ", ylabel="g(r), normalised by pairs\n"
                    "of two configurations", title="pair correlation")
    for ax in (energies, correlation):
        ax.legend(fontsize="small")
    return fig


def scatter(ax, mu, gamma, plane, extra=None, label=""):
    """Codes (C, D) in a plane: (mean (D,), axes (D, 2)); black: those of another set."""
    mean, axes = plane
    for k, value in enumerate(gamma.unique()):
        some = mu[gamma == value][:400]
        x, y = ((some - mean) @ axes).T.cpu()
        ax.plot(x, y, ".", ms=3, color=common.COLOURS[k], label=f"γ = {value:g}")
    if extra is not None:
        x, y = ((extra[:200] - mean) @ axes).T.cpu()
        ax.plot(x, y, "x", ms=3, color="k", label=label)


def plot_latent(codes, gamma):
    """Codes {net: (C, D)} in the plane of their two principal axes."""
    fig, axes = common.panels(1, len(codes), 4.5, 4)
    for ax, (name, mu) in zip(axes, codes.items()):
        mean, principal, shares = pca(mu, 2)
        scatter(ax, mu, gamma, (mean, principal))
        ax.set(title=name, xlabel=f"principal axes: {shares[0]:.1%}, {shares[1]:.1%} of variance")
    axes[0].legend(fontsize="small", markerscale=3)
    return fig


def plot_anomalies(found, gamma):
    """Errors and codes of the anomalous sets beside those of the test set."""
    names = [name for name in found if name != "test"]
    fig, axes = common.panels(2, len(names), 3.6, 3.2)
    mu = found["test"]["mu"]
    mean, across, _ = pca(mean_codes(mu, gamma), 2)
    high = max(one["rmse"].quantile(0.99).item() for one in found.values())
    for k, name in enumerate(names):
        errors = axes[k]
        codes = axes[k + len(names)]
        histogram(errors, found["test"]["rmse"], 0, high, common.COLOURS[0], "test set")
        histogram(errors, found[name]["rmse"], 0, high, common.COLOURS[3], name)
        errors.set(xlabel="RMSE of a matrix / σ", ylabel="probability density")
        errors.legend(fontsize="small")
        scatter(codes, mu, gamma, (mean, across), found[name]["mu"], name)
        codes.set_xlabel("plane of the γs' mean codes")
        codes.legend(fontsize="x-small", markerscale=2)
    return fig


def plot_damage(test, found):
    """The first test matrix as it is, corrupted, and blacked out, with reconstructions."""
    d = distance_matrix(test)
    corrupted = found["corrupted"]["code"]
    shown = {"original": (d[0, 0], found["x_hat"][0, 0]),
             "four particles moved by\n±0.2 L√2 per coordinate":
                 (corrupted["d"][0, 0], corrupted["x_hat"][0, 0])}
    for size in BLOCKS[::2]:  # three examples
        one = found["missing"][size]
        shown[f"{size} x {size} black"] = (one["d"][0, 0], one["x_hat"][0, 0])
    fig, axes = common.panels(2, len(shown), 2.5, 2.5)
    above, below = zip(*shown.values())
    show_matrices(axes[:len(shown)], above, list(shown))
    image = show_matrices(axes[len(shown):], below, ["reconstruction"] * len(shown))
    fig.colorbar(image, ax=axes, label="r / (L√2)", fraction=0.02)
    return fig


def plot_probe(found):
    """Matrices along the five dimensions of largest KL; below, draws in these alone."""
    fig, (along, draws) = common.panels(2, 1, 8, 3.5, height_ratios=[5, 1])
    rows = [f"$z_{{{k}}}$" for k in found["top"]]
    columns = [f"z = {z:g}" for z in range(-3, 4)]
    common.image_sheet(along, found["along"][:, :, None].cpu(), rows, columns, "viridis")
    draw = found["draws"][:7, 0].cpu()  # (7, N, N)
    common.image_sheet(draws, draw[None, :, None], ["draws in\nall five"], (), "viridis")
    return fig


# --- verdicts ---------------------------------------------------------------------------

def trained(one):
    """Is a net's error at most 110 % of that of the training set's mean?"""
    return one["error"].mean() < 1.1 * one["trivial"].mean()


def learned(one):
    """Is a net's error below half of that of the training set's mean?"""
    return one["error"].mean() < one["trivial"].mean() / 2


def fails(claim, one, known):
    """Row: a net learns nothing: its error is 90 to 110 % of that of the training set's mean.

    Above 110 % it has not been trained: open, as where the main net has learned nothing.
    """
    row = common.ordered(claim, 0.9 * one["trivial"], one["error"], known and trained(one))
    share = one["error"].mean() / one["trivial"].mean()
    row["here"] = f"{share:.0%} of the mean's error"
    return row


def falls(claim, errors, apart, earned):
    """Row: errors {value: error} fall along the dict, each time by more than twice the
    difference between two equal nets. A single value says nothing: open."""
    drops = -torch.tensor(list(errors.values())).diff()
    verdict = "open"
    if earned and len(drops) > 0 and (drops > 2 * apart).all():
        verdict = "yes"
    elif (drops < -2 * apart).any():
        verdict = "no"
    keys = list(errors)
    here = ", ".join(f"{value:.4f}" for value in errors.values())
    claim = f"{claim} ({keys[0]:.2g} to {keys[-1]:.2g})"
    return dict(claim=claim, document="yes", here=here, verdict=verdict)


def settled(gamma, xy, long):
    """Row: the drift from the energies of a set xy (C, N, 2) to those of a long run (C',).

    "yes" where it is surely below a tenth of the energies' own deviation, "no" where above.
    """
    energies = energy(xy.permute(2, 1, 0).double(), gamma, lennard_jones)
    drift = long.mean() - energies.mean()
    error = (long.var() / len(long) + energies.var() / len(energies)).sqrt()
    margin = 0.1 * energies.std()
    verdict = "open"
    if drift.abs() + 2 * error < margin:
        verdict = "yes"
    elif drift.abs() - 2 * error > margin:
        verdict = "no"
    return {"γ": f"{gamma:g}", "U": f"{energies.mean():.2f}", "later": f"{long.mean():.2f}",
            "drift": f"{drift:.2f} ± {error:.2f}", "a tenth of U's deviation": f"{margin:.2f}",
            "verdict": verdict}


def claims(found, acceptance, drifts, log, before, errors, models):
    """The closing table. log: error and KL of the main net's last epoch; before, errors: {name:
    MSE} of untrained nets and at equal steps; the rest as in the functions below."""
    main = found["representations"][MAIN]
    known = bool(learned(main))
    # at equal steps: the main net beats the mean, and all have halved their first error
    comparable = errors[MAIN] < 0.75 * main["trivial"].mean().item()
    for name, error in errors.items():
        comparable = comparable and error < before[name] / 2
    return (claims_about_fluid(acceptance, drifts)
            + claims_about_nets(found, log.tolist(), known)
            + claims_about_sweeps(errors, models, comparable)
            + claims_about_anomalies(found["anomalies"], known)
            + claims_about_damage(found["corrupted"], found["missing"], known)
            + claims_about_codes(found, known))


def claims_about_fluid(acceptance, drifts):
    """Rows of the sampler. acceptance: {gamma: share}; drifts: rows of `settled`."""
    table = []
    for value, published in ACCEPTANCE.items():
        table.append(common.reproduced(f"acceptance, γ = {value:g}",
                                       published, acceptance[value], 0.005))
    table.append(common.throughout("the sets are settled", drifts, "assumed"))
    return table


def claims_about_nets(found, log, known):
    """Rows of representations and of the main net; log: error and KL of its last epoch."""
    nets = found["representations"]
    ordered = common.ordered
    main = nets[MAIN]
    grid = nets["grid-conv"]
    ours = found["structure"]["reconstructed"]
    true = found["structure"]["true"]["tumbled"]
    table = [common.reproduced("MSE in the last epoch", 0.0013, log[0], better="lower",
                               earned=known),
             common.reproduced("KL per dimension there, nats", 2.110, log[1], earned=known),
             ordered("distances-conv errs < half of the mean", main["error"],
                     main["trivial"] / 2, known)]
    for name in ("coordinates-dense", "distances-dense", "matrix-to-points-dense",
                 "matrix-to-points-conv"):
        table.append(fails(f"{name} fails", nets[name], known))
    table.append(ordered("grid-conv: no more than the y gradient", found["y gradient"],
                         grid["error"], known and trained(grid)))
    table.append(ordered("codes' neighbours share γ (AE; VAE)",
                         found[f"neighbours {AUTOENCODER}"], found[f"neighbours {AGAIN}"],
                         learned(nets[AGAIN]) and trained(nets[AUTOENCODER])))
    _, js = js_distances(found["structure"])
    table.append(common.reproduced("JS distance of energies", 0.185, js, better="lower",
                                   earned=known))
    table.append(ordered("Gram matrix beats matrix-to-points",
                         squared_error(ours["aligned"], true),
                         squared_error(found["learned points"], true),
                         known and trained(nets["matrix-to-points-conv"])))
    return table


def claims_about_sweeps(errors, models, known):
    """Rows of latent size, lambda and depth, of nets at equal steps: errors {name: MSE}.

    Two equal nets give one difference: a hint at what chance does, no standard error. The KL is
    a mean over dimensions: with more of them each nat weighs less.
    """
    ours = errors[MAIN]
    apart = max(abs(ours - errors[AGAIN]), 0.01 * ours)  # two can be near by chance
    sizes = {}
    weights = {}
    for name, error in errors.items():
        model = models[name]
        if name != AGAIN and model == Model(latent=model.latent):
            sizes[model.latent] = error
        if name not in (AGAIN, AUTOENCODER) and model == Model(lam=model.lam):
            weights[model.lam] = error
    sizes = dict(sorted(sizes.items()))
    weights = dict(sorted(weights.items(), reverse=True))
    deep = errors["distances-deep-conv"]
    change = abs(deep - ours)
    verdict = "open"
    if known and change + apart < 0.1 * ours:
        verdict = "yes"
    elif change - apart > 0.1 * ours:
        verdict = "no"
    return [falls("lower MSE at larger D", sizes, apart, known),
            falls("lower MSE at smaller λ", weights, apart, known),
            dict(claim="deeper nets change the MSE by < 10 %", document="yes",
                 here=f"{ours:.4f}, {deep:.4f} (± {apart:.1g})", verdict=verdict)]


def most(claim, nearest, wanted, known):
    """Row: the codes' nearest gammas (C,) are the wanted ones, more often than halfway between
    chance and always."""
    hits = torch.isin(nearest, torch.tensor(wanted).to(nearest)).double()
    chance = len(wanted) / len(GAMMAS)
    return common.ordered(claim, torch.full_like(hits, (1 + chance) / 2), hits, known)


def claims_about_anomalies(sets, known):
    """Rows of the sets that are not trained on, of evaluate_anomalies."""
    ordered = common.ordered
    test = sets["test"]
    random = sets["random"]
    table = []
    for name, text, wanted in (("unseen", "γ = 3", [1.0]), ("fake", "fake", [0.4, 0.7])):
        one = sets[name]
        names = " or ".join(f"{value:g}" for value in wanted)
        table.append(most(f"{text}: codes nearest to γ = {names}", one["nearest"],
                          wanted, known))
        table.append(ordered(f"{text}: errs < half of the mean matrix", one["rmse"] ** 2,
                             one["mean rmse"] ** 2 / 2, known))
    n = min(len(test["rmse"]), len(random["rmse"]))
    growth = random["spread"].mean() / test["spread"].mean()
    control = random["untrained"].mean() / test["untrained"].mean()
    table.append(ordered("random: codes spread more than a γ's", test["spread"][:n],
                         random["spread"][:n], known and growth > control))
    usual = (test["rmse"] - test["rmse"].mean()).abs()
    wide = (random["rmse"] - random["rmse"].mean()).abs()
    growth = random["rmse"].std() / test["rmse"].std()
    control = random["mean rmse"].std() / test["mean rmse"].std()
    table.append(ordered("random: errors more scattered", usual[:n], wide[:n],
                         known and growth > control, "all over"))
    return table


def claims_about_damage(corrupted, missing, known):
    """Rows of corrupted configurations and of missing data."""
    ordered = common.ordered
    table = []
    rows = []
    for reading, one in corrupted.items():
        table.append(ordered(f"corrupted, {reading}: rises > mean matrix's",
                             one["mean rises"].double(), one["rises"].double(), known,
                             "clearly"))
        table.append(ordered(f"corrupted, {reading}: rest shifts, by half",
                             one["touched"] / 2, one["shift"], known))
    for one in missing.values():
        rows.append(ordered("", one["restored"], one["mean"], known))
    table.append(common.throughout("blacked out: restored, all sizes", rows, "tried"))
    return table


def claims_about_codes(found, known):
    """Rows of the latent space. The mean matrix's texture is subtracted from all others. Below
    10 % of the real matrices' there is no feature, above 50 % there is a pattern."""
    ordered = common.ordered
    textures = found["texture"]
    along = found["texture"]["along"]
    mean = textures["mean"]
    cosines = found["probe"]["cosines"]
    real = textures["real"] - mean  # (C,)
    at_zero = along[0, 3] - mean  # (1,)
    at_three = along[:, [0, 6]].flatten() - mean  # (10,)
    draws = textures["draws"][:len(real)] - mean
    share = found["axes"].sum().item()
    axes = common.reproduced("two principal axes: variance of codes", 0.115, share, 0.035,
                             earned=known)
    axes.update(document="8-15 %", here=f"{100 * share:.1f} %")
    zero = ordered("zero is featureless (10 % of texture)", at_zero.expand_as(real), real / 10,
                   known)
    zero["here"] = zero["here"].partition(" (±")[0]  # of a single matrix
    return [axes, zero,
            ordered("codes cluster by γ (untrained; trained)", found["clusters before"],
                    found["clusters"], known),
            ordered("at |z| = 3 a pattern (50 % of texture)",
                    (real.mean() / 2).expand_as(at_three), at_three, known),
            ordered("patterns differ: |cosine| < 0.5", cosines,
                    torch.full_like(cosines, 0.5), known),
            ordered("draws in five dimensions: 10 % of texture", draws,
                    real[:len(draws)] / 10, known)]


# --- tables -----------------------------------------------------------------------------

def js_distances(structure):
    """Jensen-Shannon distances of energies to the true ones: a perfect net's, and ours."""
    true = structure["true"]["energy"]
    return (jensen_shannon(true, structure["true, tumbled"]["energy"]),
            jensen_shannon(true, structure["reconstructed"]["energy"]))


def representation_rows(representations, errors, fitted):
    """errors: MSE at equal steps, of 1,000 configurations at most."""
    rows = []
    for name, one in representations.items():
        share = one["error"].mean() / one["trivial"].mean()
        row = {"net": name, "epochs": "", "MSE": f"{one['error'].mean():.5f}",
               "of the mean's": f"{share:.0%}"}
        if name in fitted:  # a net
            row["epochs"] = len(fitted[name]["log"])
        if "distances" in one:
            row["RMSE of distances"] = f"{one['distances'].mean().sqrt():.3f} σ"
        if name in errors:
            row["at equal steps"] = f"{errors[name]:.5f}"
        rows.append(row)
    return rows


def structure_rows(structure):
    rows = []
    for name, one in structure.items():
        r, g = one["g"]
        row = {"points": name, "planar": f"{one['planar'].mean():.3f}",
               "overlaps": f"{one['overlaps'].mean():.2f}",
               "peak of g": f"{g.max():.2f} at {r[g.argmax()]:.2f} σ"}
        if "aligned" in one:
            apart = (one["aligned"] - structure["true"]["tumbled"]).square().sum(-1)
            row["RMSE / σ"] = f"{apart.mean().sqrt():.2f}"
        rows.append(row)
    for row, distance in zip(rows[1:3], js_distances(structure)):
        row[f"JS distance ({BINS} bins)"] = f"{distance:.3f}"
    return rows


def anomaly_rows(sets):
    test = sets["test"]
    rows = []
    for name, one in sets.items():
        rows.append({
            "set": name, "RMSE": common.show(one["rmse"]),
            "mean matrix": common.show(one["mean rmse"]),
            "AUROC": f"{auroc(test['rmse'], one['rmse']):.3f}",
            "of mean": f"{auroc(test['mean rmse'], one['mean rmse']):.3f}",
            "spread": f"{one['spread'].mean():.2f}",
            "untrained": f"{one['untrained'].mean():.3f}"})
    return rows


def missing_rows(missing):
    rows = []
    for size, one in missing.items():
        rows.append({"block": f"{size} x {size}", "mean matrix": f"{one['mean'].mean():.2f}",
                     "restored": f"{one['restored'].mean():.2f}"})
    return rows


def knowledge_rows(mu, before, xy):
    """What trained and untrained codes (C, D) know of configurations xy (C, N, 2)."""
    rows = []
    for name, y in properties(xy).items():
        rows.append({"property": name, "trained": f"{r_squared(mu, y):.3f}",
                     "untrained": f"{r_squared(before, y):.3f}"})
    return rows


def tables_of(drifts, found, errors, fitted):
    """{title: rows}: what the document lacks."""
    beyond = "Beyond the document: "
    return {
        beyond + "drift of the energies up to the second half of the long run": drifts,
        beyond + "representations":
            representation_rows(found["representations"], errors, fitted),
        beyond + "points of matrices": structure_rows(found["structure"]),
        beyond + "anomalies, RMSE in σ (± over configurations)":
            anomaly_rows(found["anomalies"]),
        beyond + "blacked out: RMSE of the hidden distances in σ":
            missing_rows(found["missing"]),
        beyond + "what the codes know, linear R²": found["knowledge"]}


def metrics_of(units):
    """A flat dict for each net and epoch. "error" is the first term of the loss: the MSE, but
    of grid-conv the weighted cross-entropy. "test error" is the MSE of mean codes."""
    metrics = []
    for name, unit in units.items():
        for epoch, (error, kl) in enumerate(unit["log"].tolist()):
            metrics.append({"net": name, "epoch": epoch + 1, "error": error, "KL": kl,
                            "test error": unit["test"][epoch + 1].item()})
    return metrics


# --- main -------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__, PRESETS)
    number = common.number
    add = parser.add
    add("--configurations", type=number(int, 20, 10**6), help="independent systems of a gamma")
    add("--sweeps", type=number(int, 1, 10**7), help="Metropolis sweeps of a system")
    add("--epochs", type=number(int, 1, 10**4),
        help="of all nets but the variants of the main VAE, which have no more than their own")
    add("--latents", nargs="+", type=number(int, 2, 2000), metavar="D",
        help=f"latent sizes to train beside {LATENT}")
    add("--lambdas", nargs="+", type=number(float, 1e-9, 100), metavar="LAMBDA",
        help=f"weights of the KL to train beside {LAMBDA}")
    add("--compile", action=common.argparse.BooleanOptionalAction,
        help="use torch.compile for the sampler")
    return parser.parse(argv)


def models_of(latents, lambdas):
    """All nets: {name: Model}."""
    models = dict(MODELS)
    for latent in latents:
        if latent != LATENT:
            models[f"latent-{latent}"] = Model(latent=latent)
    for lam in lambdas:
        if lam != LAMBDA:
            models[f"lambda-{lam}"] = Model(lam=lam)
    return models


def split(sets, tests, seed, device):
    """Sets {name: (C, N, 2)} in sigma as Data: 80 % of the four gammas to train, of the rest
    `tests` at most to test."""
    def prepare(xy):
        return by_origin(xy.to(device) / SCALE)

    xy = torch.cat([sets[f"fluid-{value:g}"] for value in GAMMAS])
    gamma = torch.tensor(GAMMAS).repeat_interleave(len(xy) // len(GAMMAS))
    order = torch.randperm(len(xy), generator=common.generator(seed, "split"))
    n = len(xy) * 4 // 5
    train = order[:n]
    test = order[n:][:tests]
    return Data(prepare(xy[train]), prepare(xy[test]), gamma[train].to(device),
                gamma[test].to(device), prepare(sets["unseen"]), prepare(sets["fake"]))


def plot(run, nets, data, sets, energies, every, end, epochs, found):
    """All pictures. every, end: sweeps, as in plot_equilibrium; epochs: of the codes' nets."""
    test = data.test
    gamma = data.gamma
    run.figure(plot_equilibrium(energies, every, sets, end), "equilibrium",
               "Energies of the long run, and heights of particles in the sets")
    run.figure(plot_matrices(test, found["x_hat"], found["structure"], gamma.cpu()),
               "matrices", "Distance matrices and the points they hold")
    run.figure(plot_representations(nets, test[gamma == GAMMAS[2]][:1]), "representations",
               "One configuration in each representation (blue: true, red: reconstructed)")
    run.figure(plot_structure(found["structure"]), "structure",
               "Energies and pair correlations")
    codes = {"VAE (second start)": found[f"codes {AGAIN}"],
             "autoencoder, λ = 0": found[f"codes {AUTOENCODER}"]}
    run.figure(plot_latent(codes, gamma), "latent",
               f"Codes of the test set; the VAE is not the main net (epochs of both: {epochs})")
    run.figure(plot_anomalies(found["anomalies"], gamma), "anomalies",
               "Sets that were not trained on")
    run.figure(plot_damage(test, found), "damage",
               "Damaged matrices of one configuration, and reconstructions")
    run.figure(plot_probe(found["probe"]), "probe",
               "The five dimensions of largest KL, the others 0")


def fluids_of(configurations, tests, sweeps):
    """What is sampled, {name: (gamma, configurations, sweeps, pair)}."""
    fluids = {}
    for value in GAMMAS:
        fluids[f"fluid-{value:g}"] = value, configurations, sweeps, lennard_jones
    fluids["unseen"] = UNSEEN, tests, sweeps, lennard_jones
    fluids["fake"] = FAKE, tests, 2 * sweeps, fake  # as the authors
    return fluids


def nets_of(models, fitted, seed, device):
    """Nets with their trained weights, {name: (net, model)}."""
    nets = {}
    for name, model in models.items():
        net = build(name, model, seed)
        net.load_state_dict(fitted[name]["weights"])
        nets[name] = net.to(device).requires_grad_(False), model
    return nets


def drifts_of(sets, energies):
    """A row of `settled` for each gamma; energies (K, G, C) of the long run."""
    rows = []
    for k, value in enumerate(GAMMAS):
        later = energies[RECORDS // 2:, k].double().mean(0)  # (C,), independent
        rows.append(settled(value, sets[f"fluid-{value:g}"], later))
    return rows


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    compile = args.compile and can_compile(args.device)
    every = max(1, 10 * args.sweeps // RECORDS)  # sweeps from one record to the next
    few = min(args.variant_epochs, args.epochs)
    with common.Run(__file__, args, f"N = {N}, L = {L:g}, T = {T:g}",
                    additive=["latents", "lambdas"]) as run:
        fluids = fluids_of(args.configurations, args.tests, args.sweeps)

        def sample_unit(name):
            if name == "long":
                return long_run(args.chains, every, args.seed, args.device, compile)
            gamma, count, sweeps, pair = fluids[name]
            return sample(name, gamma, count, sweeps, pair, args.seed, args.device, compile)

        sampled = run.units([*fluids, "long"], sample_unit)
        energies = sampled.pop("long")["energy"]
        sets = {name: unit["xy"] for name, unit in sampled.items()}
        data = split(sets, args.tests, args.seed, args.device)
        models = models_of(args.latents, args.lambdas)

        def train_unit(name):
            model = models[name]
            epochs = args.epochs
            if name != MAIN and model.net != "dense" and model.output == "distances":
                epochs = few  # a variant of the main VAE
            return train_net(name, model, args.seed, data.xy, data.test[:1000], epochs,
                             args.batch)

        fitted = run.units(list(models), train_unit)
        nets = nets_of(models, fitted, args.seed, args.device)
        found = measure(nets, data, args.seed)
        plot(run, nets, data, sets, energies, every, args.sweeps, few, found)
        acceptance = {value: sampled[f"fluid-{value:g}"]["acceptance"] for value in GAMMAS}
        drifts = drifts_of(sets, energies)
        before = errors_after(0, models, fitted)
        errors = errors_after(few, models, fitted)
        closing = claims(found, acceptance, drifts, fitted[MAIN]["log"][-1], before, errors,
                         models)
        results = {"acceptance": acceptance, "MSE at equal steps": errors}
        tables = tables_of(drifts, found, errors, fitted)
        judged = args.preset != "smoke"  # where nothing is learned, nothing settles
        return run.finish(results, closing, tables, metrics_of(fitted), judged)


if __name__ == "__main__":
    main()
