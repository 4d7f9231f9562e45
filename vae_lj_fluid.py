"""A two-dimensional Lennard-Jones fluid under gravity, and a VAE on its distance matrices.

Reproduces Bacilieri, Barbiero, Bordin, Pitteri, "Variational Auto Encoders" (LCP-B exam,
2023). Thirty particles in a box, in units of sigma and epsilon, have the energy

    U = sum_{i<j} 4 (r_ij^-12 - r_ij^-6) + gamma sum_i y_i

and are sampled by Metropolis moves (argon's gamma is about 1e-13; here it is 0.1 to 1).
A VAE learns the matrices of distances r_ij / (L sqrt 2), four gammas together:

    loss = MSE(x, x_hat) + lambda mean over latent dimensions KL(q(z|x) || N(0, 1))

    python vae_lj_fluid.py                       about 14 minutes on 2 CPU cores
    python vae_lj_fluid.py --lambdas 0.000035    then another weight of the KL, same folder
    python vae_lj_fluid.py --sweeps 10000 --out out/settled   nearer to equilibrium

A run leaves figures, tables, sets of data and nets (units/*.pt) in its folder. Physics and
main VAE have the settings of the authors' code, which is also where the document's MSE, KL
and Jensen-Shannon distance are from. Our choices:
* Quick has 4,000 of 10,000 configurations, in batches of 16 for 128: more steps in a sixth
  of the work. Other nets stand beside the main one at equal steps.
* Errors are those of mean codes, but for the published two, which are those of training.
* "unit" nets have lambda of the slides' own likelihood, N(mu(z), 1): 2 D / entries.
* Below r^2 = 0.001 the energy is constant, so that random starts are finite.
"""
import functools
import math
from typing import NamedTuple

import common  # before torch: from here on Ctrl-C is one line
import torch
import torch.nn.functional as F
from torch import nn

LATENT, LAMBDA = 40, 0.00035  # the authors' D, and weight of the KL

# C configurations (chains), N particles, G gammas, B batch, D latent dimensions, K records;
# compared: epochs of the nets beside the main one; tests: configurations of a set to evaluate;
# chains (of a gamma) and long: those of the long run, and its sweeps
PRESETS = {
    "smoke": dict(configurations=50, sweeps=40, epochs=2, latents=[5], lambdas=[3.5e-3],
                  compile=False, batch=32, compared=1, tests=40, chains=10, long=80),
    "quick": dict(configurations=4000, sweeps=2500, epochs=4, latents=[5], lambdas=[LAMBDA],
                  compile=True, batch=16, compared=1, tests=2000, chains=400, long=25_000),
    "paper": dict(configurations=10_000, sweeps=2500, epochs=10, latents=[5, 20, 80],
                  lambdas=[3.5e-5, 3.5e-3], compile=True, batch=128, compared=3,
                  tests=8000, chains=1000, long=25_000)}
N, L, T = 30, 10.0, 0.75   # particles; side of the box, sigma; temperature, epsilon
SCALE = L * math.sqrt(2)   # of all data: the largest distance in the box is 1
GAMMAS = [0.1, 0.4, 0.7, 1.0]
UNSEEN, FAKE = 3.0, 0.5    # gammas of two sets that are not trained on
STEP, CUTOFF = 0.2, 3.0    # largest move of a coordinate; where the potential ends
CORE = 1e-3                # least r^2
CHUNK = 5000               # chains at a time on a CPU, so that they stay in its cache
RECORDS = 40               # of the long run
RATE = 1e-3                # Adam's
CELLS = 20                 # of the grid, per side: 0.5 sigma each
BLOCKS = [3, 6, 9, 12, 15]  # sides of blacked-out blocks
BINS = 50                  # of energies
ACCEPTANCE = {0.1: 0.704, 0.4: 0.662, 0.7: 0.606, 1.0: 0.557}  # of the authors' sampler
MAIN = "distances-conv"
AGAIN, AUTOENCODER = "distances-conv-again", "distances-conv-AE"


class Model(NamedTuple):
    """What goes into a net and comes out, and how it is trained."""
    net: str = "conv"
    input: str = "distances"
    output: str = "distances"
    latent: int = LATENT
    lam: float = LAMBDA        # lambda; 0: no noise, a plain autoencoder


UNIT = 2 * LATENT / N ** 2     # lambda of N(mu(z), 1): the KL is a sum there
MODELS = {
    MAIN: Model(),
    AGAIN: Model(),  # from another start: how far apart are two of them?
    AUTOENCODER: Model(lam=0.0),
    "distances-conv-unit": Model(lam=UNIT),
    "distances-deep-conv": Model("deep"),
    "distances-dense": Model("dense"),
    "distances-dense-unit": Model("dense", lam=UNIT),
    "coordinates-dense": Model("dense", "coordinates", "coordinates"),
    "coordinates-dense-unit": Model("dense", "coordinates", "coordinates", lam=LATENT / N),
    "grid-conv": Model("conv", "grid", "grid"),
    "matrix-to-points-dense": Model("dense", "distances", "coordinates", 2 * N, 0.0),
    "matrix-to-points-conv": Model("conv", "distances", "coordinates", 2 * N, 0.0)}


# --- data: the fluid --------------------------------------------------------------------

def lennard_jones(r2):
    """4 (r^-12 - r^-6) of squared distances; it ends at r = 3 with a jump of 0.0055."""
    s = 1 / r2.clamp(min=CORE)  # finite at r = 0, too
    s = s * s * s               # r^-6
    return torch.where(r2 <= CUTOFF ** 2, 4 * (s * s - s), 0.0)


def fake(r2):
    """4 (r^-4 - r^-2), the document's other potential; it has no end."""
    s = 1 / r2.clamp(min=CORE)  # r^-2
    return 4 * (s * s - s)


def energy(xy, gamma, pair):
    """U of positions xy (2, N, C) -> (C,)"""
    i, j = torch.triu_indices(xy.shape[1], xy.shape[1], 1, device=xy.device)  # pairs P
    r2 = ((xy[:, i] - xy[:, j]) ** 2).sum(0)  # (P, C)
    return pair(r2).sum(0) + gamma * xy[1].sum(0)


def trial(xy, u):
    """Trial positions (2, N, C) of a sweep, and what energy (N, C) each of them may cost.

    xy (2, N, C), u (3, N, C) uniform. u < exp(-dU / T) is the same as dU < -T log u.
    """
    new = xy + STEP * (2 * u[:2] - 1)  # uniform in a square
    inside = (new > 0) & (new < L)     # walls: a coordinate that would leave stays
    return torch.where(inside, new, xy), -T * torch.log(u[2])


def move(xy, old, new, others, gamma, budget, pair):
    """Where a particle of every chain xy (2, N, C) is after its trial move: (2, C).

    old, new (2, C); others (N, 1): 0 for the particle itself; budget (C,), of trial.
    """
    before = ((xy - old[:, None]) ** 2).sum(0)  # (N, C), squared distances
    after = ((xy - new[:, None]) ** 2).sum(0)
    change = ((pair(after) - pair(before)) * others).sum(0)  # (C,)
    change = change + gamma * (new[1] - old[1])
    return torch.where(change < budget, new, old)  # accept, or stay


def metropolis(gamma, chains, sweeps, pair, g, compile=False, start=None):
    """Sample independent systems: their positions (2, N, C), and the share of moves accepted.

    gamma: a number, or a tensor (C,); g: generator on the device to compute on
    start: positions to go on from; else uniform random ones
    """
    propose, decide = trial, move
    if compile:
        propose = torch.compile(trial, dynamic=False)
        decide = torch.compile(move, dynamic=False)
    if start is None:
        start = L * torch.rand(2, N, chains, generator=g, device=g.device)
    xy, gamma = start.clone(), torch.as_tensor(gamma, device=g.device)
    others = 1 - torch.eye(N, device=g.device)
    accepted = 0
    for _ in range(sweeps):
        u = torch.rand(3, N, chains, generator=g, device=g.device)
        new, budget = propose(xy, u)
        for i in range(N):  # in order, as the document does; the next one sees it moved
            xy[:, i] = decide(xy, xy[:, i], new[:, i], others[i, :, None], gamma,
                              budget[i], pair)
        accepted = accepted + (xy == new).all(0).float().mean()
    return xy, accepted / sweeps


def sample(name, gamma, count, sweeps, pair, seed, device, compile):
    """A work unit: last configurations "xy" (C, N, 2), and the "acceptance"."""
    chunk = count
    if device == "cpu":
        chunk = CHUNK
    parts, accepted = [], 0
    for first in range(0, count, chunk):
        chains = min(chunk, count - first)
        g = common.generator(seed, f"{name} {first}", device)
        xy, share = metropolis(gamma, chains, sweeps, pair, g, compile)
        parts.append(xy.permute(2, 1, 0).cpu())  # (2, N, C) -> (C, N, 2)
        accepted += share.item() * chains / count
    return {"xy": torch.cat(parts), "acceptance": accepted}


def long_run(chains, sweeps, records, seed, device, compile):
    """A work unit: "energy" (K, G, C) of fewer chains, all gammas, in a much longer run."""
    g = common.generator(seed, "long", device)
    gamma = torch.tensor(GAMMAS, device=device).repeat_interleave(chains)  # (G C,)
    xy = L * torch.rand(2, N, len(gamma), generator=g, device=device)
    log = torch.zeros(records, 1, len(gamma), device=device)
    for k in common.steps("long", records, log, ["energy"], xy, g):
        new, _ = metropolis(gamma, len(gamma), sweeps // records, lennard_jones, g, compile,
                            xy)
        xy.copy_(new)
        log[k, 0] = energy(xy, gamma, lennard_jones)
    return {"energy": log[:, 0].unflatten(1, (len(GAMMAS), chains)).cpu()}


@functools.cache  # one note is enough
def can_compile():
    """Compile something small: where that fails, one note says why."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8))
        return True
    except Exception as error:  # no compiler, one that fails, a folder with a space: many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = "".join(lines[-1:])[:100]
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
    return (xy[:, :, None] - xy[:, None]).norm(dim=-1)[:, None]  # cdist rounds


def occupancy(xy):
    """1 in cells with a particle, the floor first. (C, N, 2), largest 1/sqrt 2, -> (C, 1, M, M)"""
    cell = (xy * CELLS * math.sqrt(2)).long().clamp(0, CELLS - 1)  # (C, N, 2): column, row
    image = torch.zeros(len(xy), CELLS ** 2, device=xy.device)
    image.scatter_(1, CELLS * cell[..., 1] + cell[..., 0], 1.0)
    return image.view(-1, 1, CELLS, CELLS)


def represent(kind, xy):
    """What a net sees, or puts out, of configurations xy (C, N, 2)."""
    if kind == "distances":
        return distance_matrix(xy)
    if kind == "grid":
        return occupancy(xy)
    return xy


def corrupt(xy, reading, g, count=4):
    """Move `count` particles of each configuration; xy, and which were moved (C, N).

    By up to 0.2 in units of L sqrt 2 (2.8 sigma): per coordinate, as the authors' "code"
    does, or in a random direction, as the "slide" says. Their order stays.
    """
    u = torch.rand(xy.shape, generator=g, device=xy.device)  # (C, N, 2)
    if reading == "code":
        step = 0.4 * u - 0.2
    else:
        length = 0.2 * u[..., 0]
        angle = 2 * math.pi * u[..., 1]
        step = torch.stack([length * angle.cos(), length * angle.sin()], -1)
    order = torch.rand(xy.shape[:2], generator=g, device=xy.device).argsort(1)
    moved = order < count  # rows of order are permutations
    return xy + moved[..., None] * step, moved


def black_out(d, size, g):
    """Set a block of size x size entries of each d (C, 1, N, N), and its mirror image, to 0.

    Returns the matrices, and where they are black.
    """
    n = d.shape[-1]
    corner = torch.randint(n - size + 1, (len(d), 2, 1), generator=g, device=d.device)
    at = torch.arange(n, device=d.device)
    inside = (at >= corner) & (at < corner + size)  # (C, 2, N): rows, columns
    where = (inside[:, 0, :, None] & inside[:, 1, None])[:, None]  # (C, 1, N, N)
    where = where | where.mT  # else the mirror image tells what is hidden
    return d.masked_fill(where, 0.0), where


# --- model ------------------------------------------------------------------------------

class VAE(nn.Module):
    """An encoder to means and log variances (B, 2 D), and a decoder from codes (B, D)."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

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
    """The document's net on images (B, 1, S, S) in [0, 1]; the decoder is its mirror.

    The authors' transposed convolutions of stride 1 are convolutions.
    """
    first, last = widths[0], widths[-1]
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
    """KL(N(mu, exp logvar) || N(0, 1)) in nats of each latent dimension. (B, D)"""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar)


def vae_loss(net, x, target, eps, lam):
    """Squared error + lambda KL, and both: means over entries and over latent dimensions."""
    x_hat, mu, logvar = net(x, eps)
    error = ((x_hat - target) ** 2).mean()
    kl = kl_divergence(mu, logvar).mean()
    return error + lam * kl, error, kl


def grid_loss(net, x, eps, lam, progress):
    """Cross-entropy + lambda KL of grids, "epoch dependent": progress goes from 0 to 1.

    Live cells begin with the weight of all empty ones and end with 1; lambda begins with 0.
    """
    x_hat, mu, logvar = net(x, eps)
    live = (1 / x.mean() - 1) ** (1 - progress)  # empty cells per live one, falling to 1
    error = F.binary_cross_entropy(x_hat, x, 1 + (live - 1) * x)
    kl = kl_divergence(mu, logvar).mean()
    return error + progress * lam * kl, error, kl


# --- train ------------------------------------------------------------------------------

def train(name, net, model, xy, test, epochs, batch, g):
    """Adam on configurations xy (C, N, 2); error and KL of each step (steps, 2), and the mean
    squared error of the mean codes of `test` after each epoch (epochs,)."""
    per_epoch = math.ceil(len(xy) / batch)
    optimiser = torch.optim.Adam(net.parameters(), RATE, fused=True)
    log = torch.zeros(epochs * per_epoch, 2, device=xy.device)
    errors = torch.zeros(epochs, device=xy.device)
    order = torch.arange(len(xy), device=xy.device)
    parts = net, optimiser, g, order, errors
    for step in common.steps(name, len(log), log, ["error", "KL"], *parts):
        epoch, k = divmod(step, per_epoch)
        if k == 0:
            order.copy_(torch.randperm(len(xy), generator=g, device=xy.device))
        some = xy[order[k * batch:(k + 1) * batch]]  # (B, N, 2)
        x, target = represent(model.input, some), represent(model.output, some)
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
            x, target = represent(model.input, test), represent(model.output, test)
            errors[epoch] = evaluate(net, x, target)["error"].mean()
    return log, errors


def train_net(name, model, seed, xy, test, epochs, batch):
    """A work unit: the net trained, its weights, and the means of each epoch."""
    net = build(name, model, seed).to(xy.device)
    g = common.generator(seed, f"batches {name}", xy.device)
    log, errors = train(name, net, model, xy, test, epochs, batch, g)
    weights = {key: value.cpu() for key, value in net.state_dict().items()}
    means = log.unflatten(0, (epochs, -1)).mean(1)  # (epochs, 2)
    return {"weights": weights, "log": means.cpu(), "test": errors.cpu()}


# --- evaluate: nets ---------------------------------------------------------------------

@torch.no_grad()
def evaluate(net, x, target=None):
    """Of mean codes: "x_hat" like target (default x), squared "error" (C,), "mu" and "kl" (C, D).
    """
    if target is None:
        target = x
    parts = []
    for some in x.split(250):
        mu, logvar = net.encoder(some).chunk(2, 1)
        parts.append((net.decoder(mu), mu, kl_divergence(mu, logvar)))
    x_hat, mu, kl = [torch.cat(part) for part in zip(*parts)]
    error = ((x_hat - target) ** 2).flatten(1).mean(1)
    return {"x_hat": x_hat, "error": error, "mu": mu, "kl": kl}


def decode(net, model, xy):
    """What a net makes of configurations xy (C, N, 2), in the representation of its output."""
    target = represent(model.output, xy)
    return evaluate(net, represent(model.input, xy), target)["x_hat"]


def pca(x, k):
    """Mean, k axes of largest variance (size, k) and their shares of it, of x (C, ...)."""
    flat = x.flatten(1)
    covariance = torch.cov(flat.T.cpu().double())
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    axes, shares = vectors.flip(1).to(x), values.flip(0) / values.sum()
    return flat.mean(0), axes[:, :k], shares[:k]


def pca_reconstruct(x, other, k):
    """`other` (C, ...) through the k principal components of x."""
    mean, axes, _ = pca(x, k)
    centred = other.flatten(1) - mean
    return (mean + centred @ axes @ axes.T).view_as(other)


def squared_distance_error(kind, x_hat, xy):
    """Mean squared error (C,), in sigma^2, of the distances that an output stands for; of a
    grid's cells. kind: of representation."""
    if kind == "grid":
        return ((x_hat - occupancy(xy)) ** 2).flatten(1).mean(1)
    if kind == "coordinates":
        x_hat = distance_matrix(x_hat)
    return SCALE ** 2 * ((x_hat - distance_matrix(xy)) ** 2).flatten(1).mean(1)


def evaluate_representations(nets, xy, test):
    """{name: {"error" (C,) and of the mean ("trivial"), both as trained, "distances": error of
    distances}}, of all nets, of PCA and of the mean of the training set xy."""
    found = {}
    for kind in ("coordinates", "distances", "grid"):
        x, target = represent(kind, xy), represent(kind, test)
        mean = x.mean(0).expand_as(target)
        trivial = ((mean - target) ** 2).flatten(1).mean(1)
        guesses = {f"{kind}, mean": mean,
                   f"{kind}, PCA-{LATENT}": pca_reconstruct(x, target, LATENT)}
        for name, (net, model) in nets.items():
            if model.output == kind:
                guesses[name] = decode(net, model, test)
        for name, x_hat in guesses.items():
            found[name] = {"error": ((x_hat - target) ** 2).flatten(1).mean(1),
                           "distances": squared_distance_error(kind, x_hat, test),
                           "trivial": trivial}
    return found


def y_gradient(data):
    """Squared error (C,) on the test set's grids of the mean occupancy of each row, given gamma."""
    grids = occupancy(data.test)
    errors = torch.zeros(len(grids), device=grids.device)
    for value in data.gamma.unique():
        known = occupancy(data.xy[data.gamma_xy == value])
        rows = known.mean((0, 3), keepdim=True)  # (1, 1, M, 1)
        at = data.gamma == value
        errors[at] = ((grids[at] - rows) ** 2).flatten(1).mean(1)
    return errors


# --- evaluate: points of matrices -------------------------------------------------------

def gram_coordinates(d):
    """Points (C, N, 2) of distances d (C, N, N), up to a rigid motion; how planar they are.

    That is the share of the two leading eigenvalues (C,), 1 for distances in a plane.
    """
    square = d.double() ** 2
    gram = (square[:, :, :1] + square[:, :1] - square) / 2  # g_ij = x_i . x_j, x_1 = 0
    values, vectors = torch.linalg.eigh(gram)  # ascending: (C, N), (C, N, N)
    U, S = vectors[..., -2:], values[:, -2:]  # the two largest
    points = U * S.clamp(min=0).sqrt()[:, None]  # X = U sqrt S
    return points, S.sum(1) / values.abs().sum(1)


def procrustes(points, goal):
    """Points (C, N, 2) shifted, turned and, if need be, mirrored onto goal (C, N, 2)."""
    centre = goal.mean(1, keepdim=True)
    a = points - points.mean(1, keepdim=True)
    U, _, Vh = torch.linalg.svd(a.mT @ (goal - centre))  # (C, 2, 2)
    return a @ U @ Vh + centre


def turbo_tumbler(points, angles=720):
    """Turn points (C, N, 2) to the least potential energy on the floor of the box.

    That is the rotation of least sum of y: the hull sits on the side that is nearest to the
    centre of mass, as the document says. The extent in x is centred in the box.
    """
    parts = []
    angle = torch.arange(angles, device=points.device) * (2 * math.pi / angles)
    up = torch.stack([angle.sin(), angle.cos()]).to(points)  # (2, A)
    for some in points.split(250):
        height = some @ up  # (C, N, A)
        rise = height.mean(1) - height.amin(1)  # of the centre of mass above the lowest point
        sin, cos = up[:, rise.argmin(1), None]  # (C, 1) each
        x, y = some.unbind(-1)  # (C, N) each
        x, y = cos * x - sin * y, sin * x + cos * y
        middle = (x.amin(1, keepdim=True) + x.amax(1, keepdim=True)) / 2
        x, y = x - middle + L / 2, y - y.amin(1, keepdim=True)
        parts.append(torch.stack([x, y], -1))
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
    p = torch.histc(a.float().cpu(), bins, low, high).double() / len(a)
    q = torch.histc(b.float().cpu(), bins, low, high).double() / len(b)
    m = (p + q) / 2
    terms = torch.xlogy(p, p / m) + torch.xlogy(q, q / m)
    divergence = terms.nan_to_num(0.0).sum() / 2  # 0 / 0 in bins that are empty in both
    return divergence.clamp(min=0).sqrt().item()  # the root, as SciPy's jensenshannon


def pair_correlation(xy, bins=60, end=3.0):
    """g(r) of configurations xy (C, N, 2): pairs of one over pairs of two configurations, so
    that gravity and walls drop out. Middles of the bins, g (bins,)."""
    d = distance_matrix(xy)[:, 0]
    i, j = torch.triu_indices(N, N, 1)
    one = d[:, i, j].float().cpu()
    other = xy.roll(1, 0)  # each beside the one before
    two = (xy[:, :, None] - other[:, None]).norm(dim=-1).float().cpu()
    share_of_one = torch.histc(one, bins, 0, end) / one.numel()
    share_of_two = torch.histc(two, bins, 0, end) / two.numel()
    return torch.linspace(0, end, 2 * bins + 1)[1::2], share_of_one / share_of_two


def overlaps(xy):
    """Pairs nearer than sigma in each configuration xy (C, N, 2) in sigma. (C,)"""
    near = distance_matrix(xy)[:, 0] < 1
    return (near.sum((1, 2)) - N) / 2  # a particle is no pair


def structure(x_hat, drawn, test, gamma):
    """What decoded matrices are as points: of the test set, of draws of the prior, and of the
    true matrices, which is the floor. Energies and so on (C,) of each, and the points."""
    xy = SCALE * test.double()
    exact, _ = gram_coordinates(distance_matrix(xy)[:, 0])
    one = torch.ones(len(xy))
    found = {"true": {"xy": xy, "planar": one, "points": xy}}
    found["true, tumbled"] = {"xy": turbo_tumbler(exact), "planar": one,
                              "points": procrustes(exact, xy)}
    points, planar = points_of(x_hat)
    found["reconstructed"] = {"xy": turbo_tumbler(points), "planar": planar,
                              "points": procrustes(points, xy)}
    points, planar = points_of(drawn)
    found["drawn from the prior"] = {"xy": turbo_tumbler(points), "planar": planar}
    for name, one in found.items():
        one["overlaps"] = overlaps(one["xy"])
        one["g"] = pair_correlation(one["xy"])
        if name != "drawn from the prior":  # a draw has no gamma
            one["energy"] = energies_of(one["xy"], gamma)
            one["error"] = (one["points"] - xy).square().sum(-1).mean(1)  # (C,), sigma^2
    return found


# --- evaluate: latent space, anomalies --------------------------------------------------

def mean_codes(mu, gamma):
    """The mean code of each gamma. (C, D), (C,) -> (G, D)"""
    return torch.stack([mu[gamma == value].mean(0) for value in gamma.unique()])


def nearest_gamma(mu, means, gammas):
    """The gamma (C,), of gammas (G,), whose mean code (G, D) is nearest to each of mu (C, D)."""
    apart = (mu[:, None] - means).norm(dim=-1)  # (C, G)
    return gammas[apart.argmin(1)]


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
    """{set: measures (C,)} of matrices {name: (C, 1, N, N)}, the test set, of gamma, first.

    Beside the RMSE that of the mean matrix, and beside the spread that of an untrained net.
    """
    means = mean_codes(evaluate(net, sets["test"])["mu"], gamma)
    found = {}
    for name, d in sets.items():
        one = evaluate(net, d)
        mu, before = one["mu"], evaluate(untrained, d)["mu"]
        groups = torch.zeros(len(d), device=d.device)
        if name == "test":
            groups = gamma
        found[name] = {"rmse": SCALE * one["error"].sqrt(), "mu": mu,
                       "mean rmse": SCALE * ((d - mean) ** 2).mean((1, 2, 3)).sqrt(),
                       "nearest": nearest_gamma(mu, means, gamma.unique()),
                       "spread": spread(mu, groups), "untrained": spread(before, groups)}
    return found


def evaluate_corruption(net, mean, test, x_hat, reading, g):
    """Paired measures (C,) of test configurations (C, N, 2), x_hat of the original ones.

    Do the errors of net and of mean matrix rise? How far do reconstructions move where
    neither particle was moved, beside the error there before?
    """
    xy, moved = corrupt(test, reading, g)
    d, bad = distance_matrix(test), distance_matrix(xy)
    out = evaluate(net, bad)["x_hat"]
    rest = ~(moved[:, :, None] | moved[:, None])[:, None]  # (C, 1, N, N)
    rest = rest & ~torch.eye(N, dtype=torch.bool, device=d.device)
    everywhere = torch.ones_like(rest)
    return {"rises": rmse_at(out - bad, everywhere) > rmse_at(x_hat - d, everywhere),
            "mean rises": rmse_at(mean - bad, everywhere) > rmse_at(mean - d, everywhere),
            "shift": rmse_at(out - x_hat, rest), "error": rmse_at(x_hat - d, rest),
            "d": bad, "x_hat": out}


def rmse_at(difference, where):
    """RMS (C,) in sigma of matrices (C, 1, N, N) where a mask is True."""
    squares = (difference ** 2 * where).sum((1, 2, 3))
    return SCALE * (squares / where.sum((1, 2, 3))).sqrt()


def evaluate_missing(net, mean, d, size, g):
    """RMSE (C,) in sigma within blacked-out blocks of d (C, 1, N, N): of the mean matrix, of
    reconstructions of the black matrix, and of the one filled with the mean first."""
    black, where = black_out(d, size, g)
    restored = evaluate(net, black)["x_hat"]
    filled = evaluate(net, torch.where(where, mean, d))["x_hat"]
    return {"mean": rmse_at(mean - d, where), "restored": rmse_at(restored - d, where),
            "filled": rmse_at(filled - d, where), "d": black, "x_hat": restored}


def texture(d):
    """RMS step between neighbours above the diagonal of d (C, 1, N, N); 0: no features. (C,)"""
    steps = d[:, 0, :, 1:] - d[:, 0, :, :-1]  # (C, N, N - 1)
    above = torch.ones_like(steps[0]).triu(1) > 0
    return steps[:, above].square().mean(1).sqrt()


@torch.no_grad()
def probe(decoder, kl, g, count=5, draws=200):
    """Decode along the `count` dimensions of largest kl (D,), from -3 to 3, the rest 0.

    "along" (count, 7, N, N), z = 0 in the middle; "draws" (draws, 1, N, N) in these alone;
    "top": the dimensions; "cosines" between what they change, of all pairs.
    """
    top = kl.topk(count).indices
    z = torch.zeros(count, 7, len(kl), device=kl.device)
    for k, dimension in enumerate(top):
        z[k, :, dimension] = torch.linspace(-3, 3, 7, device=kl.device)
    along = decoder(z.flatten(0, 1)).view(count, 7, N, N)
    z = torch.zeros(draws, len(kl), device=kl.device)
    z[:, top] = torch.randn(draws, count, generator=g, device=kl.device)
    change = (along[:, -1] - along[:, 0]).flatten(1)
    change = F.normalize(change, dim=1)
    i, j = torch.triu_indices(count, count, 1)
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
    return (1 - rest.var() / y[half:].var()).item()


@torch.no_grad()
def halfway(net, d):
    """How planar (C/2,) are the matrices decoded halfway between codes of pairs of d?"""
    mu, half = evaluate(net, d)["mu"], len(d) // 2
    middle = (mu[:half] + mu[half:2 * half]) / 2
    x_hat = torch.cat([net.decoder(some) for some in middle.split(250)])
    _, planar = points_of(x_hat)
    return planar


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
    test, gamma = data.test, data.gamma
    net, _ = nets[MAIN]
    untrained = build(MAIN, MODELS[MAIN], seed).to(test.device)
    d, g = distance_matrix(test), common.generator(seed, "evaluate", test.device)
    mean = torch.stack([distance_matrix(some).sum(0) for some in data.xy.split(1000)]).sum(0)
    mean = mean / len(data.xy)  # the mean matrix
    plain = evaluate(net, d)
    x_hat, mu, kl = plain["x_hat"], plain["mu"], plain["kl"].mean(0)
    before = evaluate(untrained, d)["mu"]

    found = {"x_hat": x_hat, "models": {name: model for name, (_, model) in nets.items()},
             "representations": evaluate_representations(nets, data.xy, test),
             "y gradient": y_gradient(data)}
    points = decode(*nets["matrix-to-points-conv"], test)
    squares = SCALE ** 2 * (points - test).square().sum(-1)  # (C, N)
    found["learned points"] = squares.mean(1).cpu()

    z = torch.randn(min(2000, len(test)), LATENT, generator=g, device=test.device)
    with torch.no_grad():
        drawn = torch.cat([net.decoder(some) for some in z.split(250)])
    found["structure"] = structure(x_hat.cpu(), drawn.cpu(), test.cpu(), gamma.cpu())

    uniform = torch.rand(data.unseen.shape, generator=g, device=test.device) / math.sqrt(2)
    sets = {"test": d, "unseen": distance_matrix(data.unseen),
            "fake": distance_matrix(data.fake), "random": distance_matrix(by_origin(uniform))}
    found["anomalies"] = evaluate_anomalies(net, untrained, mean, sets, gamma)
    found["corrupted"], found["missing"] = {}, {}
    for reading in ("code", "slide"):
        found["corrupted"][reading] = evaluate_corruption(net, mean, test, x_hat, reading, g)
    for size in BLOCKS:
        found["missing"][size] = evaluate_missing(net, mean, d[:500], size, g)

    _, _, found["axes"] = pca(mu, 2)
    for key, codes in (("clusters", mu), ("clusters before", before)):
        nearest = nearest_gamma(codes, mean_codes(codes, gamma), gamma.unique())
        found[key] = (nearest == gamma).double()
    for name in (AGAIN, AUTOENCODER):
        found[f"halfway {name}"] = halfway(nets[name][0], d)
    found["probe"] = probed = probe(net.decoder, kl, g)
    along = probed["along"].flatten(0, 1)[:, None]  # (35, 1, N, N)
    found["texture"] = {"mean": texture(mean[None]), "reconstructed": texture(x_hat),
                        "along": texture(along).view(5, 7), "draws": texture(probed["draws"])}
    found["knowledge"] = knowledge_rows(mu, before, SCALE * test)
    found["dimensions"] = dimension_rows(mu, kl, probed["top"], SCALE * test)
    return found


def compared_errors(models, units, compared):
    """{name: test MSE after `compared` epochs} of the nets on distances."""
    errors = {}
    for name, model in models.items():
        if model.input == model.output == "distances":
            errors[name] = units[name]["test"][compared - 1].item()
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


def plot_matrices(d, x_hat, structure, gamma):
    """One test configuration of each gamma: matrices, reconstructions, points."""
    fig, axes = common.panels(len(GAMMAS), 6, 2.2, 2.2)
    titles = ["r / (L√2)", "reconstruction", "difference", "points",
              "reconstructed,\nby Procrustes", "reconstructed,\nby the tumbler"]
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize="medium")
    for row, value in enumerate(gamma.unique()):
        k = (gamma == value).nonzero()[0, 0]
        row = axes[6 * row:6 * row + 6]
        image = show_matrices(row[:2], [d[k, 0], x_hat[k, 0]])
        apart = x_hat[k, 0] - d[k, 0]
        difference = show_matrices(row[2:3], [apart], cmap="RdBu_r", vmin=-0.2, vmax=0.2)
        row[0].set_ylabel(f"γ = {value:g}")
        show_points(row[3], structure["true"]["xy"][k], common.COLOURS[0])
        show_points(row[4], structure["true"]["xy"][k], "0.8")
        show_points(row[4], structure["reconstructed"]["points"][k], common.COLOURS[3])
        show_points(row[5], structure["reconstructed"]["xy"][k], common.COLOURS[3])
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
        x_hat = decode(net, model, xy)
        if model.output == "coordinates":
            show_points(ax, SCALE * x_hat[0], common.COLOURS[3])
        elif model.output == "grid":
            show_matrices([ax], [x_hat[0, 0]], origin="lower")
            column, row = (xy[0] * CELLS * math.sqrt(2)).cpu().T - 0.5
            ax.plot(column, row, "x", ms=4, color=common.COLOURS[3])
            name = "grid-conv: probability\nof a particle (×: particles)"
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
        xy, colour = sets[f"fluid-{value:g}"], common.COLOURS[k]
        mean = energies[:, k].mean(1)
        error = energies[:, k].std(1) / energies.shape[2] ** 0.5
        run.plot(sweeps, mean, color=colour, label=f"γ = {value:g}")
        run.fill_between(sweeps, mean - 2 * error, mean + 2 * error, color=colour, alpha=0.3)
        histogram(profile, xy[..., 1].flatten(), 0, L, colour, f"γ = {value:g}", 100)
    run.axvline(end, color="grey", ls=":", label="end of the sets")
    run.set(xscale="log", xlabel="sweeps", ylabel="U / ε (± 2 standard errors)")
    profile.set(yscale="log", xlabel="height y / σ", ylabel="density of a particle's height / σ⁻¹")
    for ax in (run, profile):
        ax.legend(fontsize="small")
    return fig


def plot_structure(found):
    """Energies, and pair correlations, of true, reconstructed and drawn points."""
    fig, (energies, correlation) = common.panels(1, 2, 5, 3.6)
    names = ["true", "true, tumbled", "reconstructed"]
    shown = torch.cat([found[name]["energy"] for name in names])
    low, high = shown.quantile(0.001).item(), shown.quantile(0.999).item()
    for name, colour in zip(names, common.COLOURS):
        histogram(energies, found[name]["energy"], low, high, colour, name)
    energies.set(xlabel="U / ε, pairs with r ≥ σ", ylabel="probability density",
                 title="energies")
    for k, name in enumerate(["true", "reconstructed", "drawn from the prior"]):
        correlation.plot(*found[name]["g"], color=common.COLOURS[2 * k], label=name)
    correlation.axvline(1, color="grey", ls=":", label="σ")
    correlation.set(xlabel="r / σ", ylabel="g(r): pairs of one over pairs\n"
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
    """Codes {net: (C, D)} in the plane of their principal axes, and of the gammas' means."""
    fig, axes = common.panels(1, 2 * len(codes), 3.6, 3.6)
    for k, (name, mu) in enumerate(codes.items()):
        mean, principal, shares = pca(mu, 2)
        scatter(axes[2 * k], mu, gamma, (mean, principal))
        label = f"principal axes: {shares[0]:.1%}, {shares[1]:.1%}"
        axes[2 * k].set(title=name, xlabel=label)
        mean, across, _ = pca(mean_codes(mu, gamma), 2)
        scatter(axes[2 * k + 1], mu, gamma, (mean, across))
        axes[2 * k + 1].set(title=name, xlabel="plane of the γs' mean codes")
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
        errors, codes = axes[k], axes[k + len(names)]
        histogram(errors, found["test"]["rmse"], 0, high, common.COLOURS[0], "test set")
        histogram(errors, found[name]["rmse"], 0, high, common.COLOURS[3], name)
        errors.set(xlabel="RMSE of a matrix / σ", ylabel="probability density")
        errors.legend(fontsize="small")
        scatter(codes, mu, gamma, (mean, across), found[name]["mu"], name)
        codes.set_xlabel("plane of the γs' mean codes")
        codes.legend(fontsize="x-small", markerscale=2)
    return fig


def plot_damage(test, x_hat, corrupted, missing):
    """The first test matrix as it is, corrupted, and blacked out, with reconstructions."""
    d = distance_matrix(test)
    shown = {"original": (d[0, 0], x_hat[0, 0]),
             "four particles moved": (corrupted["d"][0, 0], corrupted["x_hat"][0, 0])}
    for size, one in missing.items():
        if size % 2 == 0 or size == BLOCKS[-1]:
            shown[f"{size} x {size} black"] = (one["d"][0, 0], one["x_hat"][0, 0])
    fig, axes = common.panels(2, len(shown), 2.5, 2.5)
    above, below = zip(*shown.values())
    show_matrices(axes[:len(shown)], above, list(shown))
    image = show_matrices(axes[len(shown):], below, ["reconstruction"] * len(shown))
    fig.colorbar(image, ax=axes, label="r / (L√2)", fraction=0.02)
    return fig


def plot_probe(found):
    """Matrices along the five dimensions of largest KL, and draws in these alone."""
    along = found["along"]
    rows = torch.cat([along, found["draws"][:7, 0][None]])  # (6, 7, N, N)
    fig, (ax,) = common.panels(1, 1, 8, 7)
    names = [f"$z_{{{k}}}$" for k in found["top"]]
    columns = [f"z = {z:g}" for z in range(-3, 4)]
    common.image_sheet(ax, rows[:, :, None].cpu(), [*names, "draws in\nthese alone"], columns,
                       "viridis")
    return fig


# --- verdicts ---------------------------------------------------------------------------

def fails(claim, one):
    """Row: a net errs more than half as much as the mean of the training set does.

    One that errs clearly more than that mean has not been trained: open.
    """
    trained = one["error"].mean() < 1.1 * one["trivial"].mean()
    row = common.ordered(claim, one["trivial"] / 2, one["error"], trained)
    share = one["error"].mean() / one["trivial"].mean()
    row["here"] = f"{share:.0%} of the mean's error"
    return row


def falls(claim, errors, apart, earned):
    """Row: errors {value: error} fall along the dict, each time by more than twice what two
    equal nets are apart."""
    values = list(errors.values())
    drops = torch.tensor(values[:-1]) - torch.tensor(values[1:])
    verdict = "open"
    if earned and drops.min() > 2 * apart:
        verdict = "yes"
    elif drops.min() < -2 * apart:
        verdict = "no"
    names = ", ".join(f"{key:.2g}" for key in errors)
    here = ", ".join(f"{value:.4f}" for value in values)
    return dict(claim=f"{claim}: {names}", document="yes", here=here, verdict=verdict)


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


def claims_about_fluid(acceptance, drifts):
    """Rows of the sampler. acceptance: {gamma: share}; drifts: rows of `settled`."""
    table = []
    for value, published in ACCEPTANCE.items():
        table.append(common.reproduced(f"acceptance, γ = {value:g}",
                                       published, acceptance[value], 0.005))
    table.append(common.throughout("the sets are settled", drifts, "assumed"))
    return table


def claims_about_nets(found, log, compared):
    """Rows of the nets. log: error and KL of the main one's last epoch; compared: {name:
    error at equal steps}."""
    nets, structure, ordered = found["representations"], found["structure"], common.ordered
    main, known = nets[MAIN], learned(nets[MAIN])
    table = [common.reproduced("MSE in the last epoch", 0.0013, log[0], None, "lower", False,
                               known),
             common.reproduced("KL per dimension there, nats", 2.110, log[1], earned=known),
             ordered("distances-conv errs < half of the mean", main["error"],
                     main["trivial"] / 2, known)]
    for name in ("coordinates-dense", "distances-dense", "matrix-to-points-dense",
                 "matrix-to-points-conv"):
        table.append(fails(f"{name} fails", nets[name]))
    table.append(ordered("grid-conv: no more than the y gradient", found["y gradient"],
                         nets["grid-conv"]["error"], known))
    trivial = main["trivial"].mean().item()
    table += claims_about_sweeps(compared, found["models"], trivial)
    table.append(ordered("VAE more coherent than AE (halfway)",
                         found[f"halfway {AUTOENCODER}"], found[f"halfway {AGAIN}"], known))
    floor, js = js_distances(structure)
    table.append(common.reproduced(f"energies: JS distance - floor of {floor:.3f}",
                                   0.185 - floor, js - floor, 0.0185, "lower", False, known))
    table.append(ordered("Gram matrix beats matrix-to-points",
                         structure["reconstructed"]["error"], found["learned points"], known))
    return table


def learned(one):
    """Does a net err by half of what the mean of the training set does, at most?"""
    return one["error"].mean() < one["trivial"].mean() / 2


def claims_about_sweeps(errors, models, trivial):
    """Rows of latent size, lambda and depth, of nets at equal steps."""
    ours = errors[MAIN]
    apart = max(abs(ours - errors[AGAIN]), 0.01 * ours)  # two can be near by chance
    known = ours < trivial / 2
    sizes = {LATENT: ours}
    weights = {LAMBDA: ours, 0: errors[AUTOENCODER], UNIT: errors["distances-conv-unit"]}
    for name, error in errors.items():
        if name.startswith("latent"):
            sizes[models[name].latent] = error
        if name.startswith("lambda"):
            weights[models[name].lam] = error
    sizes = dict(sorted(sizes.items()))
    weights = dict(sorted(weights.items(), reverse=True))
    deep = errors["distances-deep-conv"]
    change = abs(deep - ours)
    verdict = "open"
    if known and change + apart < 0.1 * ours:
        verdict = "yes"
    elif change - apart > 0.1 * ours:
        verdict = "no"
    return [falls("MSE falls with D", sizes, apart, known),
            falls("MSE falls with λ", weights, apart, known),
            dict(claim="deeper nets change the MSE by < 10 %", document="yes",
                 here=f"{ours:.4f}, {deep:.4f} (± {apart:.1g})", verdict=verdict)]


def most(claim, nearest, wanted, earned):
    """Row: more than half of the codes have one of the wanted gammas nearest, of (C,)."""
    hits = torch.zeros_like(nearest)
    for value in wanted:
        hits = hits + torch.isclose(nearest, torch.full_like(nearest, value))
    return common.ordered(claim, torch.full_like(hits, 0.5), hits, earned)


def claims_about_anomalies(found):
    """Rows of the sets that are not trained on, of damage and of missing data."""
    sets, ordered = found["anomalies"], common.ordered
    known = learned(found["representations"][MAIN])
    test, unseen, other, random = sets["test"], sets["unseen"], sets["fake"], sets["random"]
    n = min(len(test["rmse"]), len(random["rmse"]))
    wider = random["spread"].mean() / test["spread"].mean()
    untrained = random["untrained"].mean() / test["untrained"].mean()
    scatter = (test["rmse"] - test["rmse"].mean()).abs()
    random_scatter = (random["rmse"] - random["rmse"].mean()).abs()
    table = [
        most("γ = 3: codes nearest to γ = 1's", unseen["nearest"], [1.0], known),
        ordered("γ = 3: errs < half of the mean matrix", unseen["rmse"],
                unseen["mean rmse"] / 2, known),
        most("fake: codes nearest to γ = 0.4's or 0.7's", other["nearest"], [0.4, 0.7],
             known),
        ordered("fake: errs < half of the mean matrix", other["rmse"],
                other["mean rmse"] / 2, known),
        ordered("random: codes spread more than a γ's", test["spread"][:n],
                random["spread"][:n], known and wider > untrained),
        ordered("random: errors more scattered", scatter[:n],
                random_scatter[:n], known, "all over")]
    for reading, one in found["corrupted"].items():
        table += [ordered(f"corrupted, {reading}: rises > mean matrix's",
                          one["mean rises"], one["rises"], known, "clearly"),
                  ordered(f"corrupted, {reading}: rest shifts > its error",
                          one["error"], one["shift"], known)]
    rows = []
    for one in found["missing"].values():
        rows.append(ordered("", one["restored"], one["mean"], known))
    table.append(common.throughout("blacked out: restored, all sizes", rows,
                                   "tried"))
    return table


def claims_about_codes(found):
    """Rows of the latent space."""
    ordered, textures = common.ordered, found["texture"]
    known = learned(found["representations"][MAIN])
    cosines, along = found["probe"]["cosines"], textures["along"]  # (5, 7), z from -3 to 3
    rebuilt, mean = textures["reconstructed"], textures["mean"]
    excess, zero = (rebuilt - mean) / 10, along[0, 3] - mean
    draws = textures["draws"][:len(rebuilt)]
    return [common.reproduced("two principal axes: variance of codes", 0.115,
                              found["axes"].sum().item(), 0.035, earned=known),
            ordered("codes cluster by γ (untrained; trained)",
                    found["clusters before"], found["clusters"], known),
            ordered("zero is featureless (10 % of texture)",
                    zero.expand_as(excess), excess, known and excess.mean() > 0),
            ordered("texture grows along dimensions",
                    along[:, [2, 4]].flatten(), along[:, [0, 6]].flatten(), known),
            ordered("patterns differ: |cosine| < 0.5", cosines,
                    torch.full_like(cosines, 0.5), known),
            ordered("draws in five dimensions: no pattern", draws,
                    rebuilt[:len(draws)], known)]


# --- tables without verdicts ------------------------------------------------------------

def js_distances(structure):
    """Jensen-Shannon distances of energies to the true ones: a perfect net's, and ours."""
    true = structure["true"]["energy"]
    return (jensen_shannon(true, structure["true, tumbled"]["energy"]),
            jensen_shannon(true, structure["reconstructed"]["energy"]))


def representation_rows(representations):
    rows = []
    for name, one in representations.items():
        share = one["error"].mean() / one["trivial"].mean()
        rows.append({"net": name, "MSE as trained": f"{one['error'].mean():.5f}",
                     "of the mean's": f"{share:.0%}",
                     "RMSE": f"{one['distances'].mean().sqrt():.3f}"})
    return rows


def compared_rows(errors, models):
    rows = []
    for name, error in errors.items():
        model = models[name]
        rows.append({"net": name, "D": model.latent, "λ": f"{model.lam:.3g}",
                     "MSE": f"{error:.5f}"})
    return rows


def structure_rows(structure):
    rows = []
    for name, one in structure.items():
        r, g = one["g"]
        row = {"points": name, "planar": f"{one['planar'].mean():.3f}",
               "overlaps": f"{one['overlaps'].mean():.2f}",
               "peak of g": f"{g.max():.2f} at {r[g.argmax()]:.2f} σ"}
        if "error" in one:
            row["RMSE / σ"] = f"{one['error'].mean().sqrt():.2g}"
        rows.append(row)
    for row, distance in zip(rows[1:3], js_distances(structure)):
        row[f"JS distance ({BINS} bins)"] = f"{distance:.3f}"
    return rows


def anomaly_rows(sets):
    test, rows = sets["test"], []
    for name, one in sets.items():
        rows.append({
            "set": name, "RMSE": common.show(one["rmse"]),
            "mean matrix": common.show(one["mean rmse"]),
            "AUROC": f"{auroc(test['rmse'], one['rmse']):.3f}",
            "of mean": f"{auroc(test['mean rmse'], one['mean rmse']):.3f}",
            "spread": f"{one['spread'].mean():.2f}",
            "untrained": f"{one['untrained'].mean():.3f}"})
    return rows


def corruption_rows(corrupted, gamma):
    rows = []
    for value in gamma.unique():
        row, at = {"γ": f"{value:g}"}, gamma == value
        for reading, one in corrupted.items():
            row[reading] = f"{one['rises'][at].float().mean():.3f}"
            row[f"{reading}, mean matrix"] = f"{one['mean rises'][at].float().mean():.3f}"
        rows.append(row)
    return rows


def missing_rows(missing):
    rows = []
    for size, one in missing.items():
        rows.append({"block": f"{size} x {size}", "mean matrix": f"{one['mean'].mean():.2f}",
                     "restored": f"{one['restored'].mean():.2f}",
                     "filled with the mean first": f"{one['filled'].mean():.2f}"})
    return rows


def knowledge_rows(mu, before, xy):
    """What trained and untrained codes (C, D) know of configurations xy (C, N, 2)."""
    rows = []
    for name, y in properties(xy).items():
        rows.append({"property": name, "trained": f"{r_squared(mu, y):.3f}",
                     "untrained": f"{r_squared(before, y):.3f}"})
    return rows


def dimension_rows(mu, kl, top, xy):
    """The property that each of the dimensions `top` of mu (C, D) is most like."""
    known, rows = properties(xy), []
    for k in top:
        best, r = "", torch.zeros(())
        for name, y in known.items():
            here = torch.corrcoef(torch.stack([mu[:, k], y.to(mu)]))[0, 1]
            if here.abs() > r.abs():
                best, r = name, here
        rows.append({"dimension": k, "KL, nats": f"{kl[k]:.2f}", "most like": best,
                     "correlation": f"{r:.2f}"})
    return rows


def tables_of(closing, drifts, found, compared, gamma):
    """{title: rows}: the document's table, and without verdicts what it lacks."""
    beyond = "Beyond the document: "
    nets = representation_rows(found["representations"])
    return {
        "The document's figures and claims": closing,
        beyond + "drift of the energies up to the second half of the long run": drifts,
        beyond + "representations, RMSE of distances in σ (grid: of cells)": nets,
        beyond + "nets at equal steps, test MSE": compared_rows(compared, found["models"]),
        beyond + "points of matrices": structure_rows(found["structure"]),
        beyond + "anomalies, RMSE in σ (± over configurations)":
            anomaly_rows(found["anomalies"]),
        beyond + "corrupted: share whose error rises above the original's":
            corruption_rows(found["corrupted"], gamma),
        beyond + "blacked out: RMSE of the hidden distances in σ":
            missing_rows(found["missing"]),
        beyond + "what the codes know, linear R²": found["knowledge"],
        beyond + "the five dimensions of largest KL": found["dimensions"]}


def metrics_of(trained):
    """A flat dict for each net and epoch."""
    metrics = []
    for name, unit in trained.items():
        for epoch, (error, kl) in enumerate(unit["log"].tolist()):
            metrics.append({"net": name, "epoch": epoch + 1, "error": error, "KL": kl,
                            "test error": unit["test"][epoch].item()})
    return metrics


# --- main -------------------------------------------------------------------------------

def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add
    add("--configurations", type=number(int, 20, 10**6), help="independent systems of a gamma")
    add("--sweeps", type=number(int, 1, 10**7), help="Metropolis sweeps of a system")
    add("--epochs", type=number(int, 1, 10**4), help="of the main VAE")
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
    train, test = order[:n], order[n:][:tests]
    return Data(prepare(xy[train]), prepare(xy[test]), gamma[train].to(device),
                gamma[test].to(device), prepare(sets["unseen"]), prepare(sets["fake"]))


def plot(run, nets, data, sets, energies, every, end, found):
    """All figures."""
    test, gamma, x_hat = data.test, data.gamma, found["x_hat"]
    run.figure(plot_equilibrium(energies, every, sets, end), "equilibrium",
               "Long run: energies drift on; sets: how high the particles are")
    run.figure(plot_matrices(distance_matrix(test), x_hat, found["structure"], gamma.cpu()),
               "matrices", "Distance matrices and the points they hold")
    run.figure(plot_representations(nets, test[gamma == GAMMAS[2]][:1]), "representations",
               "One configuration in each representation (red: reconstructed)")
    run.figure(plot_structure(found["structure"]), "structure",
               "Energies and pair correlations")
    codes = {}
    for title, name in (("VAE", AGAIN), ("autoencoder, λ = 0", AUTOENCODER)):
        codes[title] = evaluate(nets[name][0], distance_matrix(test))["mu"]
    run.figure(plot_latent(codes, gamma), "latent", "Codes of the test set, nets of equal steps")
    run.figure(plot_anomalies(found["anomalies"], gamma), "anomalies",
               "Sets that were not trained on")
    run.figure(plot_damage(test, x_hat, found["corrupted"]["code"], found["missing"]), "damage",
               "Damaged matrices of one configuration, and reconstructions")
    run.figure(plot_probe(found["probe"]), "probe",
               "The five dimensions of largest KL, the others 0")


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    compile = args.compile and can_compile()
    compared = min(args.compared, args.epochs)  # epochs of the nets beside the main one
    long = max(args.long, 10 * args.sweeps)
    with common.Run(__file__, args, f"N = {N}, L = {L:g}, T = {T:g}",
                    additive=["latents", "lambdas"]) as run:
        fluids = {}
        for value in GAMMAS:
            fluids[f"fluid-{value:g}"] = value, args.configurations, args.sweeps, lennard_jones
        fluids["unseen"] = UNSEEN, args.tests, args.sweeps, lennard_jones
        fluids["fake"] = FAKE, args.tests, 2 * args.sweeps, fake  # as the authors

        def sample_unit(name):
            if name == "long":
                return long_run(args.chains, long, RECORDS, args.seed, args.device, compile)
            gamma, count, sweeps, pair = fluids[name]
            return sample(name, gamma, count, sweeps, pair, args.seed, args.device, compile)

        sampled = run.units([*fluids, "long"], sample_unit)
        energies = sampled.pop("long")["energy"]
        sets = {name: unit["xy"] for name, unit in sampled.items()}
        data = split(sets, args.tests, args.seed, args.device)

        models = models_of(args.latents, args.lambdas)

        def train_unit(name):
            model, epochs = models[name], args.epochs
            if name != MAIN and model.net != "dense" and model.input != "grid":
                epochs = compared
            return train_net(name, model, args.seed, data.xy, data.test[:1000], epochs,
                             args.batch)

        trained, nets = run.units(list(models), train_unit), {}
        for name, model in models.items():
            net = build(name, model, args.seed)
            net.load_state_dict(trained[name]["weights"])
            nets[name] = net.to(args.device).requires_grad_(False), model

        found = measure(nets, data, args.seed)
        errors = compared_errors(models, trained, compared)
        plot(run, nets, data, sets, energies, long // RECORDS, args.sweeps, found)

        acceptance, drifts = {}, []
        for k, value in enumerate(GAMMAS):
            name = f"fluid-{value:g}"
            acceptance[value] = sampled[name]["acceptance"]
            later = energies[len(energies) // 2:, k].double().mean(0)  # (C,), independent
            drifts.append(settled(value, sets[name], later))
        log = trained[MAIN]["log"][-1].tolist()
        closing = (claims_about_fluid(acceptance, drifts)
                   + claims_about_nets(found, log, errors) + claims_about_anomalies(found)
                   + claims_about_codes(found))
        if args.preset == "smoke":  # nothing is learned, nothing settles
            for row in closing + drifts:
                row["verdict"] = "-"
        floor, js = js_distances(found["structure"])
        results = {"acceptance": acceptance, "compared": errors, "JS floor": floor, "JS": js}
        return run.finish(results, tables_of(closing, drifts, found, errors, data.gamma),
                          metrics_of(trained))


if __name__ == "__main__":
    main()
