"""A two-dimensional Lennard-Jones fluid under gravity, and a VAE on its distance matrices.

Reproduces Bacilieri, Barbiero, Bordin, Pitteri, "Variational Auto Encoders" (LCP-B exam, 2023). N
particles in a box of side L, in units of sigma and epsilon, have the energy

    U = sum_{i<j} 4 (r_ij^-12 - r_ij^-6) + gamma sum_i y_i

and are sampled by Metropolis moves, in all systems at once. A VAE learns the matrices of distances
r_ij / (L sqrt 2) of their last configurations, four gammas together, by minimising

    mean over entries (x - x_hat)^2 + lambda mean over latent dimensions KL(q(z|x) || N(0, 1))

and is asked for energies, coordinates, anomalies, missing data and the meaning of its dimensions.

    python vae_lj_fluid.py                      everything: about 14 minutes on 2 CPU cores
    python vae_lj_fluid.py --lambdas 0.00035 0.035 --sets out/vae_lj_fluid-quick --out out/lambda
                                                other weights, on the sets sampled before
    python vae_lj_fluid.py --gammas 0.1 --sweeps 25000 --out out/settled    a fluid at rest

A run leaves figures, results.json, metrics.csv, the sampled sets with their parameters and the nets
(units/*.pt) in out/vae_lj_fluid-<preset>. It has not been timed on a GPU.

The settings of sampler and main VAE are those of the authors' code. What else is open, and what we
chose:
* A coordinate that would leave the box is dropped alone; the cut-off at 3 sigma is not shifted; a
  configuration is the one after 2,500 sweeps. Below r^2 = 0.001 the energy is constant, so that
  random starts are finite.
* Quick has 6,000 configurations per gamma for 10,000 and half of the optimiser's steps.
* Glorot's initial weights. The errors of a test set are those of the mean code; where they stand
  beside the document's, of a drawn one, as in training.
* The other representations: dense nets n-512-256-D and back, ten times the epochs; a grid of 20 x
  20, where the weight of live cells falls to 1 and lambda rises during training. "fails": the test
  error is above half of that of the trivial predictor, the mean of the training set. Rows "unit"
  have the lambda of the slides' own likelihood N(mu(z), 1), 2 D / entries (grid: D / entries).
* Energies are those of the pairs; both histograms leave out pairs with r < 1 and have 50 bins.
* Corrupted: the code moves 4 particles by up to 0.2 L sqrt 2 per coordinate ("code"), the slide in
  a direction by up to 0.2, which may be in those units ("slide") or in sigma ("sigma"). The order
  of the particles is kept, so that rows of the matrix keep their meaning; others are sorted.
* The second score of an anomaly is RMSE + KL, each standardised by the test set's mean and spread.
"""
import math
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import common

# C configurations or chains, N particles, B batch, D latent dimensions, G gammas, K records
PRESETS = {
    "smoke": dict(configurations=50, anomalies=40, sweeps=40, long_sweeps=80, chains=10, epochs=1,
                  other_epochs=1, latents=[5], lambdas=[0.0035], compile=False),
    "quick": dict(configurations=6000, anomalies=2000, sweeps=2500, long_sweeps=25_000,
                  chains=400, epochs=5, other_epochs=2, latents=[5], lambdas=[0.0035],
                  compile=True),
    "paper": dict(configurations=10_000, anomalies=2000, sweeps=2500, long_sweeps=25_000,
                  chains=1000, epochs=10, other_epochs=3, latents=[5, 20, 80],
                  lambdas=[0.000035, 0.0035], compile=True),
}
STEP, CUTOFF = 0.2, 3.0   # largest displacement per coordinate; Lennard-Jones ends there, unshifted
CORE = 1e-3               # r^2 below which energies stay finite: random starts overlap
CHUNK = 5000              # chains at a time on a CPU, so that they stay in its cache
CELLS = 20                # of the grid per side: 0.5 sigma, one particle each
LATENT, LAMBDA, BATCH, RATE = 40, 0.00035, 128, 1e-3
DOCUMENT = {"mse": 0.0013, "kl": 2.110, "axes": (0.08, 0.15), "js": 0.185}
RERUN = {0.1: (0.704, 0.422), 0.4: (0.662, 0.257), 0.7: (0.606, 0.193),
         1.0: (0.557, 0.168)}  # acceptance and mean height / L of the authors' sampler, run again


class Fluid(NamedTuple):
    """All that defines a sampled data set; saved with it."""
    gamma: tuple              # one or more: equal shares of the chains
    count: int                # independent systems C
    sweeps: int               # of N trial moves, from uniform random points
    potential: str = "lennard-jones"
    particles: int = 30       # N
    box: float = 10.0         # L, in sigma
    temperature: float = 0.75  # T, in epsilon
    seed: int = 0


class Model(NamedTuple):
    """What goes into a net and comes out of it, of which kind it is, and how it is trained."""
    input: str = "distances"
    net: str = "conv"
    output: str = ""           # if it is not the input
    latent: int = LATENT       # D
    lam: float = LAMBDA        # lambda, of the KL; 0: no variational part
    longer: int = 1            # factor on --other-epochs


MODELS = {  # unit: lambda of the slides' own likelihood, of variance 1
    "distances, conv": Model(),
    "coordinates, dense": Model("coordinates", "dense", longer=10),
    "coordinates, dense, unit": Model("coordinates", "dense", lam=4 / 3, longer=10),
    "distances, dense": Model("distances", "dense", longer=10),
    "distances, dense, unit": Model("distances", "dense", lam=4 / 45, longer=10),
    "grid, conv": Model("grid"), "grid, conv, unit": Model("grid", lam=0.1),
    "matrix to points, dense": Model("distances", "dense", "coordinates", 256, 0.0, 10),
    "matrix to points, conv": Model("distances", "conv", "coordinates", 256, 0.0),
}
MAIN = "distances, conv"


# --- data: Metropolis sampling -------------------------------------------------------------------

def lennard_jones(r2):
    """4 (r^-12 - r^-6) of squared distances up to the cut-off, 0 beyond."""
    s = 1 / r2.clamp(min=CORE)
    s = s * s * s
    return torch.where(r2 <= CUTOFF ** 2, 4 * (s * s - s), 0.0)


def fake(r2):
    """4 (r^-4 - r^-2), the document's other potential, of squared distances; without cut-off."""
    s = 1 / r2.clamp(min=CORE)
    return 4 * (s * s - s)


POTENTIALS = {"lennard-jones": lennard_jones, "fake": fake}


def propose(xy, u, gamma, temperature, box):
    """Trial positions of a whole sweep (2, N, C), and what each pair energy may rise by (N, C).

    xy (2, N, C), u (3, N, C) uniform. A coordinate outside (0, L) is dropped alone. A move with the
    energy change dU is accepted if u < exp(-dU / T), that is dU < -T log u.
    """
    new = xy + STEP * (2 * u[:2] - 1)
    new = torch.where((new > 0) & (new < box), new, xy)
    return new, -temperature * torch.log(u[2]) - gamma * (new[1] - xy[1])


def move(xy, old, new, others, limit, pair):
    """Where one particle of every chain is after its trial move (2, C); xy (2, N, C).

    old, new (2, C), others (N, 1): 0 for the particle itself, limit (C,): see propose.
    """
    before = ((xy - old[:, None]) ** 2).sum(0)  # (N, C), squared distances
    after = ((xy - new[:, None]) ** 2).sum(0)
    change = ((pair(after) - pair(before)) * others).sum(0)
    return torch.where(change < limit, new, old)


def energy(xy, gamma, pair):
    """U of configurations xy (2, N, C) -> (C,)"""
    pairs = (pair(((xy[:, i:i + 1] - xy[:, i + 1:]) ** 2).sum(0)).sum(0)
             for i in range(xy.shape[1] - 1))
    return sum(pairs) + gamma * xy[1].sum(0)


def metropolis(fluid, name, device="cpu", compile=False, checkpoint=None):
    """Sample a Fluid: {"xy": last configurations (C, N, 2), and along the way, by gamma (K, G):
    "sweep" (K,), "energy" and its standard error "error", "acceptance" (of that sweep), "height"}.

    Every chain starts at uniform random points; particles move in order, at once in all chains of a
    chunk.
    """
    N, L, T, G = fluid.particles, fluid.box, fluid.temperature, len(fluid.gamma)
    pair, K = POTENTIALS[fluid.potential], min(50, fluid.sweeps)
    shots = torch.linspace(0, fluid.sweeps, K + 1).round().long()[1:].tolist()
    trial, step = (common.compiled(f, compile, dynamic=False) for f in (propose, move))
    others = (1 - torch.eye(N, device=device)[..., None]).unbind(0)  # (N, 1) each
    gammas = torch.tensor(fluid.gamma, device=device).repeat_interleave(fluid.count // G)
    chunk = CHUNK if device == "cpu" and G == 1 else fluid.count
    done, start, sweep, xy, g = [], 0, 0, None, torch.Generator(device)
    if checkpoint and checkpoint.state:
        done, start, sweep, xy, records = checkpoint.restore(g)
    bar = tqdm(total=fluid.count * fluid.sweeps * N, desc=name, unit=" moves", unit_scale=True,
               initial=N * (start * fluid.sweeps + sweep * min(chunk, fluid.count - start)),
               disable=None)
    while start < fluid.count:
        gamma = gammas[start:start + chunk]
        C = len(gamma)
        if xy is None:
            g = common.generator(fluid.seed, f"{name} {start}", device)
            xy, records = L * torch.rand(2, N, C, generator=g, device=device), []
        for sweep in range(sweep + 1, fluid.sweeps + 1):
            new, limit = trial(xy, torch.rand(3, N, C, generator=g, device=device), gamma, T, L)
            for particle in zip(xy.unbind(1), new.unbind(1), others, limit.unbind(0)):
                particle[0].copy_(step(xy, *particle, pair))  # the next one sees it moved
            bar.update(N * C)
            if sweep in shots:
                U, accepted = energy(xy, gamma, pair), (xy == new).all(0).float().mean(0)
                records.append(torch.stack([U, U ** 2, accepted, xy[1].mean(0)])
                               .cpu().double().view(4, G, -1).sum(2))  # sums of chains, (4, G)
            if checkpoint and checkpoint.due():
                checkpoint.save((done, start, sweep, xy, records), g)
        done.append((xy.permute(2, 1, 0).cpu(), torch.stack(records)))
        start, sweep, xy = start + C, 0, None
    bar.close()
    U, square, accepted, height = (sum(part[1] for part in done) * G / fluid.count).unbind(1)
    error = ((square - U ** 2).clamp(min=0) / max(1, fluid.count // G - 1)).sqrt()
    return {"xy": torch.cat([part[0] for part in done]), "sweep": torch.tensor(shots), "energy": U,
            "error": error, "acceptance": accepted, "height": height,
            "parameters": fluid._asdict()}


# --- data: representations -----------------------------------------------------------------------

def by_origin(xy):
    """Particles sorted by their distance from the origin. (C, N, 2) -> (C, N, 2)"""
    return xy.gather(1, (xy ** 2).sum(-1).argsort(1)[..., None].expand_as(xy))


def distance_matrix(xy):
    """(C, N, 2) -> (C, 1, N, N)"""
    return (xy[:, :, None] - xy[:, None]).norm(dim=-1)[:, None]


def occupancy(xy):
    """An image: 1 in the cells that hold a particle. (C, N, 2) in units of L sqrt 2 -> (C, 1, M, M)

    The first row is the floor.
    """
    cell = (xy * (CELLS * math.sqrt(2))).long().clamp(0, CELLS - 1)  # (C, N, 2)
    image = torch.zeros(len(xy), CELLS ** 2, device=xy.device)
    return image.scatter_(1, CELLS * cell[..., 1] + cell[..., 0], 1.0).view(-1, 1, CELLS, CELLS)


REPRESENT = {"coordinates": lambda xy: xy.flatten(1), "distances": distance_matrix,
             "grid": occupancy}


def corrupt(xy, reading, box, generator, moved=4):
    """Move `moved` particles of each configuration (C, N, 2) (in units of L sqrt 2, order kept).

    reading: "code", uniform within 0.2 per coordinate; "slide", a random direction and a length up
    to 0.2; "sigma", likewise, the length being in sigma. Particles may leave the box.
    """
    C, N, _ = xy.shape
    u = torch.rand(C, N, 2, generator=generator, device=xy.device)
    length, angle = 0.2 * u[..., :1], 2 * math.pi * u[..., 1:]
    step = length * torch.cat([angle.cos(), angle.sin()], -1)
    if reading == "code":
        step = 0.4 * u - 0.2
    if reading == "sigma":
        step = step / (box * math.sqrt(2))
    chosen = torch.rand(C, N, generator=generator, device=xy.device).argsort(1)[..., None] < moved
    return xy + chosen * step, chosen[..., 0]


def black_out(d, size, generator):
    """Hide a block of size x size entries and its mirror image. d (C, 1, N, N) -> (hidden, where)

    Hidden entries are 0, black; where (C, 1, N, N) is True there.
    """
    C, _, N, _ = d.shape
    corner = torch.randint(N - size + 1, (C, 2, 1), generator=generator, device=d.device)
    at = torch.arange(N, device=d.device)
    inside = (at >= corner) & (at < corner + size)  # (C, 2, N)
    where = inside[:, 0, :, None] & inside[:, 1, None]
    where = (where | where.transpose(1, 2))[:, None]
    return d.masked_fill(where, 0.0), where


# --- model ---------------------------------------------------------------------------------------

def build(model, particles, generator):
    """Encoder (B, ...) -> (B, 2 D), means and log variances, and decoder (B, D) -> (B, ...)."""
    shape = {"coordinates": (2 * particles,), "distances": (1, particles, particles),
             "grid": (1, CELLS, CELLS)}
    size, out = math.prod(shape[model.input]), math.prod(shape[model.output or model.input])
    D, side, last = model.latent, shape[model.input][-1], [nn.Sigmoid()]
    if model.input == "grid":
        last = []  # logits
    relu = nn.ReLU(inplace=True)

    def conv(a, b):
        return nn.Conv2d(a, b, 3, padding=1)
    if model.net == "conv":
        encoder = [conv(1, 60), relu, conv(60, 50), relu, nn.Flatten(),
                   nn.Linear(50 * side ** 2, 2 * D)]
        # with stride 1 the document's transposed convolution is a convolution, and slower
        decoder = [nn.Linear(D, 50 * side ** 2), relu, nn.Unflatten(1, (50, side, side)),
                   conv(50, 50), relu, conv(50, 60), relu, conv(60, 1), *last]
    else:
        encoder = [nn.Flatten(), nn.Linear(size, 512), relu, nn.Linear(512, 256), relu,
                   nn.Linear(256, 2 * D)]
    if model.net == "dense" or model.output:
        decoder = [nn.Linear(D, 256), relu, nn.Linear(256, 512), relu, nn.Linear(512, out), *last,
                   nn.Unflatten(1, shape[model.output or model.input])]
    nets = nn.ModuleDict({"encoder": nn.Sequential(*encoder), "decoder": nn.Sequential(*decoder)})
    nets.to(generator.device, memory_format=torch.channels_last)
    for value in nets.parameters():  # Glorot's, as in Keras
        if value.dim() > 1:
            nn.init.xavier_uniform_(value, generator=generator)
        else:
            nn.init.zeros_(value)
    return nets


# --- objective -----------------------------------------------------------------------------------

def kl_divergence(mu, logvar):
    """KL(N(mu, exp logvar) || N(0, 1)) in nats of each latent dimension."""
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar)


def objective(nets, model, x, target, progress, generator):
    """What is minimised, and its terms (2,): error and KL in nats, means over all they run over.

    The error is squared, for a grid the binary cross-entropy in nats. There, as training progresses
    (0 to 1), the weight of live cells falls from that of empty ones together to 1, and that of the
    KL rises to lambda. Without lambda no noise is added to the code.
    """
    mu, logvar = nets["encoder"](x).chunk(2, 1)  # (B, D)
    noise = torch.randn(mu.shape, generator=generator, device=mu.device) if model.lam else 0.0
    x_hat = nets["decoder"](mu + noise * (logvar / 2).exp())
    kl, lam = kl_divergence(mu, logvar).mean(), model.lam
    if model.input == "grid":
        live = (1 / x.mean() - 1) ** (1 - progress)
        error, lam = F.binary_cross_entropy_with_logits(x_hat, x, pos_weight=live), progress * lam
    else:
        error = ((x_hat - target) ** 2).mean()
    return error + lam * kl, torch.stack([error, kl]).detach()


# --- train ---------------------------------------------------------------------------------------

def train(name, nets, model, xy, test, epochs, generator, checkpoint=None):
    """Adam on configurations xy (C, N, 2); returns a row of figures per epoch, those of `test` too.

    Raises FloatingPointError at a non-finite loss.
    """
    device, n, source = generator.device, math.ceil(len(xy) / BATCH), REPRESENT[model.input]
    goal = REPRESENT[model.output or model.input]
    optimiser = torch.optim.Adam(nets.parameters(), RATE, fused=True)
    parts, rows, first, log = [nets, optimiser, generator], [], 0, torch.zeros(n, 2, device=device)
    if checkpoint and checkpoint.state:
        first, rows, log, order = checkpoint.restore(*parts)
    for step in tqdm(range(first, epochs * n), name, epochs * n, initial=first, disable=None):
        if step % n == 0:
            order = common.batches(len(xy), BATCH, generator)
        batch = xy[order[step % n]]
        loss, log[step % n] = objective(nets, model, source(batch), goal(batch),
                                        step / (epochs * n), generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % n == 0 or (checkpoint and checkpoint.due()):
            done = log[:step % n + 1]
            if not torch.isfinite(done).all():
                at, term = (~torch.isfinite(done)).nonzero()[0].tolist()
                raise FloatingPointError(f"{name}: the {('error', 'KL')[term]} term is not finite "
                                         f"at step {step - step % n + at}")
            if (step + 1) % n == 0:
                error, kl = done.mean(0).tolist()
                out = evaluate(nets, model, source(test), goal(test), noise=True)
                rows.append({"model": name, "epoch": (step + 1) // n, "error": error, "kl": kl,
                             "test error": out["error"].mean().item(),
                             "test kl": out["kl"].mean().item()})
            if checkpoint and checkpoint.due():
                checkpoint.save((step + 1, rows, log, order), *parts)
    return rows


# --- evaluate ------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(nets, model, x, target=None, noise=False):
    """Of each x (C, ...): "x_hat" like target (default x), "error" (C,), "mu" and "kl" (C, D).

    The error is a mean over entries, of the decoded mean code or, with noise, of one draw.
    """
    g, found = common.generator(0, "evaluate", x.device), []
    for part, goal in zip(x.split(250), (x if target is None else target).split(250)):
        mu, logvar = nets["encoder"](part).chunk(2, 1)
        draw = torch.randn(mu.shape, generator=g, device=x.device) * (logvar / 2).exp()
        x_hat = nets["decoder"](mu + draw if noise and model.lam else mu)
        if model.input == "grid":
            error = F.binary_cross_entropy_with_logits(x_hat, goal, reduction="none")
        else:
            error = (x_hat - goal) ** 2
        found.append((x_hat, error.flatten(1).mean(1), mu, kl_divergence(mu, logvar)))
    return dict(zip(("x_hat", "error", "mu", "kl"), map(torch.cat, zip(*found))))


def contact_density(xy, box, axis=1, width=0.4, bins=20, degree=3):
    """Particles per length at the wall y = 0 minus at y = L, a value per configuration (C,).

    A polynomial is fitted to the histogram up to `width` from the wall; its value at the wall is a
    weighted count of the particles there.
    """
    edge = torch.linspace(0, width, bins + 1, dtype=torch.double)
    powers = torch.arange(1, degree + 2)
    area = (edge[1:, None] ** powers - edge[:-1, None] ** powers) / powers  # of y^k in each bin
    weight = torch.cat([torch.linalg.pinv(area)[0], torch.zeros(1, dtype=torch.double)])

    def at_wall(y):  # (C, N)
        return weight[(y / width * bins).long().clamp(max=bins)].sum(1)
    return at_wall(xy[..., axis]) - at_wall(box - xy[..., axis])


def tidy(d):
    """What a net makes of a matrix of distances as one: symmetric, 0 on the diagonal."""
    d = (d + d.transpose(-2, -1)) / 2
    return d * (1 - torch.eye(d.shape[-1], device=d.device))


def gram_coordinates(d):
    """Points (C, N, 2) of distances d (C, N, N), and the share of the two leading eigenvalues (C,).

    g_ij = (d_i1^2 + d_j1^2 - d_ij^2) / 2 = x_i . x_j with the first particle in the origin. Exact
    up to a rotation or reflection if d are distances in a plane: then the share is 1.
    """
    square = d.double() ** 2
    gram = (square[:, :, :1] + square[:, :1] - square) / 2
    values, vectors = torch.linalg.eigh(gram)  # ascending
    points = vectors[..., -2:] * values[:, None, -2:].clamp(min=0).sqrt()
    return points, values[:, -2:].sum(1) / values.abs().sum(1)


def procrustes(points, goal):
    """Points (C, N, 2) shifted, turned and, if that is nearer, mirrored onto goal (C, N, 2)."""
    a, b = points - points.mean(1, keepdim=True), goal.to(points) - goal.to(points).mean(1, True)
    U, _, V = torch.linalg.svd(a.transpose(1, 2) @ b)
    return a @ U @ V + goal.to(points).mean(1, keepdim=True)


def turbo_tumbler(points, box):
    """Let the convex hull of the points (C, N, 2) sit on its side nearest to the centre of mass.

    A pair of points is a side of the hull if no point lies beyond the line through them: all pairs
    are tried. Returns the points turned, the side on y = 0 and their extent centred in the box.
    """
    i, j = torch.triu_indices(points.shape[1], points.shape[1], 1)
    found = []
    for part in points.double().split(200):
        side = part[:, j] - part[:, i]  # (C, P, 2)
        length = side.norm(dim=-1, keepdim=True)
        along = torch.where(length > 0, side / length, torch.tensor([1.0, 0.0]).to(part))
        up = torch.stack([-along[..., 1], along[..., 0]], -1)
        height = up @ part.transpose(1, 2) - (up * part[:, i]).sum(-1, keepdim=True)  # (C, P, N)
        sign = torch.where(height.sum(-1, keepdim=True) < 0, -1.0, 1.0)
        height = height * sign
        extent = (part.amax(1) - part.amin(1)).amax(1)[:, None]
        beyond = (height.amin(-1) < -1e-9 * extent) | (length[..., 0] <= 1e-9 * extent)
        best = (height.mean(-1) + torch.where(beyond, math.inf, 0.0)).argmin(1)
        row = torch.arange(len(part), device=part.device)
        y = height[row, best]
        x = (part @ along[row, best, :, None])[..., 0]
        x = x + box / 2 - (x.amax(1) + x.amin(1))[:, None] / 2
        found.append(torch.stack([x, y.clamp(min=0)], -1))
    return torch.cat(found)


def pair_energy(d):
    """Lennard-Jones energy of distances d (C, N, N) in sigma without pairs below r = 1. -> (C,)"""
    upper = torch.triu(torch.ones_like(d[0], dtype=torch.bool), 1)
    return torch.where(upper & (d >= 1), lennard_jones(d ** 2), 0.0).sum((1, 2))


def histograms(a, b, bins=50):
    """Of two samples, in common bins from the least to the largest value: (edges, p, q)."""
    low, high = min(a.min(), b.min()).item(), max(a.max(), b.max()).item()
    p, q = (torch.histc(x.float().cpu(), bins, low, high) / len(x) for x in (a, b))
    return torch.linspace(low, high, bins + 1), p, q


def jensen_shannon(p, q):
    """Jensen-Shannon distance of two histograms, natural logarithm: 0 to sqrt(log 2) = 0.833."""
    p, q = p.double() / p.sum(), q.double() / q.sum()
    m = (p + q) / 2
    divergence = (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).nan_to_num(0.0).sum() / 2
    return divergence.clamp(min=0).sqrt().item()


def roc(normal, anomalous):
    """False and true positive rates over all thresholds, and the area under their curve."""
    scores = torch.cat([normal, anomalous])
    label = torch.cat([torch.zeros(len(normal)), torch.ones(len(anomalous))])
    label = label[scores.cpu().argsort(descending=True)].double()
    true = torch.cat([torch.zeros(1).double(), label.cumsum(0) / label.sum()])
    false = torch.cat([torch.zeros(1).double(), (1 - label).cumsum(0) / (1 - label).sum()])
    return false, true, torch.trapezoid(true, false).item()


def principal_axes(mu):
    """Mean (D,), axes (D, D) and their shares of the variance (D,), largest first, of mu (C, D)."""
    values, vectors = torch.linalg.eigh(torch.cov(mu.T.cpu().double()))
    return mu.mean(0), vectors.flip(1).to(mu), values.flip(0) / values.sum()


def fluid_row(found):
    """Figures of a sampled set after its last sweep, by gamma, and the contact theorem.

    acceptance is a mean over the run, settled the mean energy of its second half.
    """
    parameters, rows = found["parameters"], []
    N, L, T = (parameters[key] for key in ("particles", "box", "temperature"))
    for k, (part, g) in enumerate(zip(found["xy"].double().chunk(len(parameters["gamma"])),
                                      parameters["gamma"])):
        contact, U = T * contact_density(part, L), found["energy"][:, k]
        rows.append({
            "gamma": g, "count": len(part), "sweeps": int(found["sweep"][-1]),
            "energy": U[-1].item(), "error": found["error"][-1, k].item(),
            "settled": U[len(U) // 2:].mean().item(),
            "acceptance": found["acceptance"][:, k].mean().item(),
            "height / L": found["height"][-1, k].item() / L, "N gamma": N * g,
            "contact": contact.mean().item(),
            "contact error": contact.std().item() / len(contact) ** 0.5})
    return rows


def representation_row(name, nets, model, xy, test, box):
    """Test error of one representation beside the trivial predictor's, and distances in sigma.

    trivial: the mean of training outputs; rows: for a grid, the mean of each height; pca: as many
    principal components as latent dimensions; overlaps: pairs nearer than 0.9 sigma.
    """
    goal = REPRESENT[model.output or model.input]
    mean = torch.stack([goal(part).sum(0) for part in xy.split(2000)]).sum(0) / len(xy)
    target = goal(test)
    out = evaluate(nets, model, REPRESENT[model.input](test), target)
    row = {"model": name, "error": out["error"].mean().item(), "latent": model.latent,
           "kl": out["kl"].mean().item() if model.lam else None}
    if model.input == "grid":
        def entropy(p):
            return F.binary_cross_entropy(p.clamp(1e-6, 1).expand_as(target), target).item()
        row |= {"trivial": entropy(mean), "rows": entropy(mean.mean(-1, keepdim=True)),
                "double cells": 1 - (target.sum() / test.shape[:2].numel()).item()}
        return row, out["x_hat"].sigmoid()
    row["trivial"] = ((target - mean) ** 2).mean().item()
    if not model.output:
        sample = goal(xy[:8000]).flatten(1)
        _, axes, _ = principal_axes(sample)
        rest, axes = (target - mean).flatten(1), axes[:, :model.latent]
        row["pca"] = ((rest - rest @ axes @ axes.T) ** 2).mean().item()
    points = goal is REPRESENT["coordinates"]
    d = distance_matrix(out["x_hat"].view(test.shape)) if points else tidy(out["x_hat"])
    true, scale, N = distance_matrix(test), box * math.sqrt(2), test.shape[1]
    row |= {"distance rmse": scale * ((d - true) ** 2).mean().sqrt().item(),
            "overlaps": ((scale * d < 0.9).sum().item() / len(d) - N) / 2,
            "overlaps true": ((scale * true < 0.9).sum().item() / len(d) - N) / 2}
    return row, out["x_hat"]


def geometry(d_hat, test, raw_gamma, box):
    """What reconstructed matrices d_hat (C, 1, N, N) say of energies, points and heights; test
    (C, N, 2) are the true points, both in units of L sqrt 2. Returns figures and arrays to plot."""
    scale = box * math.sqrt(2)
    true, d = scale * distance_matrix(test)[:, 0].double(), scale * tidy(d_hat)[:, 0].double()
    points, share = gram_coordinates(d)
    exact, exact_share = gram_coordinates(true)
    fitted = procrustes(points, scale * test)
    off = (procrustes(exact, scale * test) - scale * test).norm(dim=-1)
    energies = [pair_energy(x) for x in (true, d)]
    edges, p, q = histograms(*energies)
    tumbled, tumbled_true = turbo_tumbler(points, box), turbo_tumbler(exact, box)
    heights = [{"gamma": g, **{key: x[raw_gamma == g][..., 1].mean().item() for key, x in (
        ("true", scale * test), ("tumbled", tumbled_true), ("reconstructed", tumbled))}}
        for g in raw_gamma.unique().tolist()]
    figures = {
        "js": jensen_shannon(p, q),
        "js floor": jensen_shannon(*histograms(energies[0][::2], energies[0][1::2])[1:]),
        "energy": energies[0].mean().item(),
        "energy reconstructed": energies[1].mean().item(),
        "gram error": off.max().item(), "gram share": exact_share.mean().item(),
        "share": share.mean().item(), "heights": heights,
        "procrustes rmse": ((fitted - scale * test) ** 2).sum(-1).mean().sqrt().item()}
    return figures, {"edges": edges, "p": p, "q": q, "true": true, "d": d, "fitted": fitted,
                     "tumbled": tumbled, "points": scale * test, "energies": energies}


def anomaly_rows(nets, model, normal, gammas, sets):
    """Errors, codes and detection of each set of matrices {name: (C, 1, N, N)}, beside the test
    set's evaluation `normal`, whose configurations have the gammas (C,): rows, {name: evaluation}.

    nearest gamma: whose mean code is nearest to the set's; spread: mean distance from the mean
    code, by that of this gamma's configurations.
    """
    def scores(found):
        rmse, kl = found["error"].sqrt(), found["kl"].sum(1)
        return rmse, (rmse - base.mean()) / base.std() + (kl - nats.mean()) / nats.std()
    base, nats, levels = normal["error"].sqrt(), normal["kl"].sum(1), gammas.unique().tolist()
    codes = {g: normal["mu"][gammas == g] for g in levels}

    def width(mu):
        return (mu - mu.mean(0)).norm(dim=1).mean().item()
    rows, arrays = [], {"test": normal} | {name: evaluate(nets, model, x)
                                           for name, x in sets.items()}
    for name, out in arrays.items():
        mu, both = out["mu"], scores(out)
        out["roc"] = {key: roc(a.cpu(), b.cpu()) for key, a, b in zip(
            ("RMSE", "RMSE + KL"), scores(normal), both)}
        near = min(levels, key=lambda g: (codes[g].mean(0) - mu.mean(0)).norm().item())
        rows.append({"set": name, "rmse": common.mean_std(both[0]), "kl": out["kl"].mean().item(),
                     "nearest gamma": near, "spread": width(mu) / width(codes[near]),
                     **{key: area for key, (*_, area) in out["roc"].items()}})
    rows += [{"set": f"test, γ = {g:g}", "rmse": common.mean_std(base[gammas == g])}
             for g in levels]
    return rows, arrays


def change_of_rest(before, after, moved):
    """Root mean square change of reconstructions (C, 1, N, N) where neither particle was moved
    (C, N), by that where one was."""
    change, touched = (after - before)[:, 0] ** 2, moved[:, :, None] | moved[:, None]
    return (change[~touched].mean() / change[touched].mean()).sqrt().item()


def code_figures(mu, gammas):
    """Shares of variance of two principal axes, and how often the nearest mean code of a gamma is
    that of the configuration's own: means of one half of the codes (C, D), tried on the other."""
    half, levels = len(mu) // 2, gammas.unique()
    centres = torch.stack([mu[:half][gammas[:half] == g].mean(0) for g in levels])
    found = levels[torch.cdist(mu[half:], centres).argmin(1).cpu()]
    return {"axes": principal_axes(mu)[2][:2].tolist(),
            "nearest is own": (found == gammas[half:]).double().mean().item()}


def missing_rows(nets, model, d, mean, sizes, generator):
    """RMSE inside and outside of blacked-out blocks of d (C, 1, N, N), in units of L sqrt 2.

    What is hidden is 0 (black) or the mean matrix of the training set (filled); baseline: that mean
    itself, inside; intact: of the reconstruction of the whole matrix, inside.
    """
    rows, shown = [], []
    intact = evaluate(nets, model, d)["x_hat"]
    for size in sizes:
        black, where = black_out(d, size, generator)
        filled = torch.where(where, mean, d)
        x_hat = {"black": evaluate(nets, model, black)["x_hat"],
                 "filled": evaluate(nets, model, filled)["x_hat"]}

        def rmse(x, at):
            return ((x - d) ** 2)[at].mean().sqrt().item()
        rows.append({"size": size, "baseline": rmse(mean.expand_as(d), where),
                     "intact": rmse(intact, where), "intact outside": rmse(intact, ~where)} | {
            f"{key} {place}": rmse(x, at) for key, x in x_hat.items()
            for place, at in (("inside", where), ("outside", ~where))})
        shown.append(torch.stack([d[0, 0], black[0, 0], x_hat["black"][0, 0],
                                  x_hat["filled"][0, 0]]).cpu())
    return rows, torch.stack(shown, 1)  # (4, sizes, N, N)


@torch.no_grad()
def probe(nets, normal, d, mean, generator, count=5):
    """The origin of the latent space, the `count` dimensions with the largest KL (and their
    traversal from -3 to 3), and draws from the prior along these alone: figures and matrices."""
    kl = normal["kl"].mean(0)
    top, decode = kl.topk(count).indices, nets["decoder"]
    D, device = len(kl), d.device
    zero = decode(torch.zeros(1, D, device=device))
    at = torch.linspace(-3, 3, 7, device=device)
    walk = torch.zeros(count, len(at), D, device=device)
    walk[torch.arange(count), :, top] = at
    walk = decode(walk.flatten(0, 1)).view(count, len(at), *d.shape[2:])
    patterns = F.normalize((walk[:, -1] - walk[:, 0]).flatten(1), dim=1)
    cosine = (patterns @ patterns.T - torch.eye(count, device=device)).abs().max().item()
    code = torch.zeros(200, D, device=device)
    code[:, top] = torch.randn(200, count, generator=generator, device=device)
    drawn = decode(code)
    matrices = {"zero": zero, "mean": mean[None], "real": d[:200],
                "reconstructed": normal["x_hat"][:200], "drawn": drawn}
    return {"kl by dimension": kl.tolist(), "top": top.tolist(), "cosine": cosine,
            "texture": {key: texture(x) for key, x in matrices.items()},
            "share": {key: gram_coordinates(tidy(x)[:, 0].cpu())[1].mean().item()
                      for key, x in matrices.items()}}, {
        "zero": zero[0, 0].cpu(), "walk": walk.cpu(), "drawn": drawn[:7, 0].cpu(),
        "at": at.tolist()}


def texture(d):
    """Root mean square step between neighbouring entries of d (C, 1, N, N), next to which a matrix
    without features is smooth; entries beside the diagonal left out."""
    step = (d[..., 1:] - d[..., :-1])[..., torch.ones_like(d[0, 0, :, 1:]).triu(1) > 0]
    return (step ** 2).mean().sqrt().item()


# --- plot ----------------------------------------------------------------------------------------

def show_matrix(ax, matrix, title="", limit=1.0, cmap="viridis"):
    """One matrix as a picture, from 0 (or, diverging, -limit) to limit."""
    low = 0 if cmap == "viridis" else -limit
    picture = ax.imshow(matrix, cmap=cmap, vmin=low, vmax=limit, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize="small")
    return picture


def show_points(ax, points, box, title="", colour=common.COLOURS[0], **style):
    """Particles in the box, which is drawn even where they have left it."""
    ax.plot([0, box, box, 0, 0], [0, 0, box, box, 0], color="0.6", lw=0.8)
    ax.plot(*points.T, "o", ms=4, color=colour, **style)
    ax.set(aspect="equal", xticks=[], yticks=[], xlim=(-0.08 * box, 1.08 * box),
           ylim=(-0.08 * box, 1.08 * box))
    ax.set_title(title, fontsize="small")


def plot_equilibrium(sets, long, rows):
    """Energy against sweeps, the contact theorem, and density profiles."""
    fig = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    for k, (found, row) in enumerate(zip(sets.values(), rows)):
        style = dict(color=common.COLOURS[k])
        box, count, last = found["parameters"]["box"], row["count"], row["sweeps"]
        for run, column, line in ((long, k, "-"), (found, 0, ":")):
            U, error = run["energy"][:, column], run["error"][:, column]
            left.plot(run["sweep"], U, line, **style,
                      label=f"γ = {row['gamma']:g}" if line == "-" else None)
            left.fill_between(run["sweep"], U - error, U + error, alpha=0.25, lw=0, **style)
        middle.errorbar(row["N gamma"], row["contact"], row["contact error"], fmt="o", capsize=3,
                        **style)
        y = found["xy"][..., 1].flatten()
        density = torch.histc(y, 100, 0, box) / count / (box / 100)
        at = (torch.arange(100) + 0.5) * box / 100
        right.plot(at[density > 0], density[density > 0], **style)
    left.axvline(last, color="0.5", lw=0.8)
    ends = [x["energy"][-1].max().item() for x in sets.values()]
    lowest, highest = min(*ends, long["energy"].min().item()), max(ends)
    left.set(xscale="log", ylim=(lowest - 3, highest + 15), xlabel="sweeps",
             ylabel="energy per system / ε, mean ± standard error")
    left.text(last, lowest - 2.5, f" {last:,} sweeps ", fontsize="small")
    left.legend(title="— few chains, long run\n··· data sets", fontsize="small")
    end = 1.1 * max(row["N gamma"] for row in rows)
    middle.plot([0, end], [0, end], color="0.5", lw=0.8, label="equilibrium")
    middle.set(xlabel="weight N γ / (ε/σ)", ylabel="T [ρ(0) − ρ(L)] / (ε/σ)")
    middle.legend()
    right.set(yscale="log", xlabel="height y / σ", ylabel="ρ, particles per σ of height")
    return fig


def plot_representations(rows, outputs, points, box):
    """One configuration in every representation, and what each net makes of it."""
    fig = Figure(figsize=(2.3 * len(rows), 5.2), layout="constrained")
    axes, scale = fig.subplots(2, len(rows)), box * math.sqrt(2)
    for (top, low), row, x_hat in zip(axes.T, rows, outputs):
        share = f"error / trivial {row['error'] / row['trivial']:.2f}"
        if x_hat.dim() == 2:
            show_points(top, scale * points, box, row["model"])
            show_points(low, scale * points, box, share, "0.8")
            show_points(low, scale * x_hat[0].view(-1, 2), box, share, common.COLOURS[3])
        else:
            grid = x_hat.shape[-1] == CELLS
            show_matrix(top, (occupancy if grid else distance_matrix)(points[None])[0, 0],
                        row["model"]).axes.invert_yaxis()
            picture = show_matrix(low, x_hat[0, 0], share, x_hat[0].max().item() if grid else 1.0)
            picture.axes.invert_yaxis()
    axes[0, 0].set_ylabel("original")
    axes[1, 0].set_ylabel("reconstruction")
    return fig


def plot_matrices(d, x_hat, found, gammas, box):
    """Per gamma: matrix, reconstruction, difference, and the points that come of it."""
    levels = gammas.unique().tolist()
    fig = Figure(figsize=(14, 2.3 * len(levels) + 0.6), layout="constrained")
    axes = fig.subplots(len(levels), 6, squeeze=False)
    for ax, g in zip(axes, levels):
        k = int((gammas == g).nonzero()[0])
        pictures = [show_matrix(ax[0], d[k, 0]), show_matrix(ax[1], x_hat[k, 0]),
                    show_matrix(ax[2], x_hat[k, 0] - d[k, 0], "", 0.2, "RdBu_r")]
        show_points(ax[3], found["points"][k], box)
        show_points(ax[4], found["points"][k], box, "", "0.8")
        show_points(ax[4], found["fitted"][k], box, "", common.COLOURS[3])
        show_points(ax[5], found["tumbled"][k], box, "", common.COLOURS[3])
        ax[0].set_ylabel(f"γ = {g:g}")
    for ax, title in zip(axes[0], (
            "original r / (L√2)", "reconstruction", "difference", "original points",
            "Gram matrix, Procrustes\n(grey: original)", "Gram matrix, turbo tumbler")):
        ax.set_title(title, fontsize="medium")
    fig.colorbar(pictures[1], ax=axes[:, :2], shrink=0.5, location="bottom")
    fig.colorbar(pictures[2], ax=axes[:, 2], shrink=0.7, location="bottom")
    return fig


def scatter_latent(ax, codes, groups, axes, mean, **style):
    """Latent means (C, D) on the two leading principal axes, coloured by group."""
    for k, g in enumerate(groups.unique().tolist()):
        at = (codes[groups == g] - mean) @ axes[:, :2]
        ax.plot(*at[:500].T.cpu(), ".", ms=3, alpha=0.6, color=common.COLOURS[k], **style,
                label=f"γ = {g:g}")
    ax.set_xlabel("first principal axis")


def swept(rows, key):
    """Those rows that differ from the main VAE in nothing but "latent" or "lambda", in order."""
    same = ("lambda", LAMBDA) if key == "latent" else ("latent", LATENT)
    return sorted((row for row in rows if row[same[0]] == same[1]), key=lambda row: row[key])


def plot_latent(mu, gammas, history, sweeps):
    """Principal axes of the codes, the training, and the sweeps of latent size and lambda."""
    fig = Figure(figsize=(15, 4), layout="constrained")
    scatter, training, sizes, weights = fig.subplots(1, 4)
    mean, axes, shares = principal_axes(mu)
    scatter_latent(scatter, mu, gammas, axes, mean)
    scatter.set(xlabel=f"first principal axis ({shares[0]:.1%})",
                ylabel=f"second principal axis ({shares[1]:.1%})")
    scatter.legend(markerscale=3, fontsize="small")
    epochs = [row["epoch"] for row in history]
    training.plot(epochs, [row["error"] for row in history], "o-", label="MSE, training")
    training.plot(epochs, [row["test error"] for row in history], "o:", label="MSE, test")
    panels = [(training, epochs, [row["test kl"] for row in history], "epoch")]
    for ax, key, label in ((sizes, "latent", "latent dimensions"), (weights, "lambda", "λ")):
        chosen = swept(sweeps, key)
        x = [row[key] for row in chosen]
        ax.plot(x, [row["test error"] for row in chosen], "o-", label="MSE, test")
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{value:g}" for value in x], fontsize="small")
        ax.minorticks_off()
        panels.append((ax, x, [row["test kl"] for row in chosen], label))
    for ax, x, kl, label in panels:
        other = ax.twinx()
        other.plot(x, kl, "s--", color=common.COLOURS[3], label="KL, test")
        other.set_ylabel("KL per dimension / nats", color=common.COLOURS[3])
        ax.set(xlabel=label, ylabel="mean squared error")
        ax.legend(loc="upper center", fontsize="small")
    return fig


def plot_energies(found, gammas):
    """Energies of original and reconstructed matrices, together and by gamma."""
    levels = gammas.unique().tolist()
    fig = Figure(figsize=(3 * len(levels) + 3, 3.4), layout="constrained")
    for ax, g in zip(fig.subplots(1, len(levels) + 1, sharex=True), [None, *levels]):
        chosen = gammas == g if g is not None else torch.ones_like(gammas, dtype=torch.bool)
        for x, label, colour in zip(found["energies"], ("original", "reconstructed"),
                                    common.COLOURS[::3]):
            ax.hist(x[chosen].numpy(), found["edges"].numpy(), density=True, alpha=0.6,
                    color=colour, label=label)
        ax.set(xlabel="energy / ε, pairs with r ≥ σ", title="all" if g is None else f"γ = {g:g}")
    fig.axes[0].set_ylabel("probability density")
    fig.axes[0].legend(fontsize="small")
    return fig


def plot_anomalies(arrays, gammas):
    """RMSE histograms, codes on the test set's principal axes, and ROC curves."""
    sets = [name for name in arrays if name != "test"]
    rmse = {name: arrays[name]["error"].sqrt().cpu() for name in arrays}
    fig = Figure(figsize=(2.7 * len(sets), 8), layout="constrained")
    panels = fig.subplots(3, len(sets), sharex="row", sharey="row")
    mean, axes, _ = principal_axes(arrays["test"]["mu"])
    edges = torch.linspace(0, 1.1 * max(x.quantile(0.99).item() for x in rmse.values()), 60).numpy()
    for (first, second, third), name in zip(panels.T, sets):
        for key, colour in (("test", common.COLOURS[0]), (name, common.COLOURS[3])):
            first.hist(rmse[key].numpy(), edges, density=True, alpha=0.6, color=colour)
        first.set_title(name, fontsize="medium")
        first.set_xlabel("RMSE of a matrix")
        scatter_latent(second, arrays["test"]["mu"], gammas, axes, mean)
        at = (arrays[name]["mu"][:500] - mean) @ axes[:, :2]
        second.plot(*at.T.cpu(), "x", ms=3, color="k", label="anomalous")
        for (key, (false, true, area)), line in zip(arrays[name]["roc"].items(), ("-", "--")):
            third.plot(false, true, line, color=common.COLOURS[0], label=f"{key}: {area:.3f}")
        third.plot([0, 1], [0, 1], color="0.7", lw=0.8)
        third.set_xlabel("false positive rate")
        third.legend(title="area under the curve", fontsize="small", loc="lower right")
    for row, label in zip(panels, ("probability density", "second principal axis",
                                   "true positive rate")):
        row[0].set_ylabel(label)
    panels[0, 0].legend(["test", "anomalous"], fontsize="small")
    panels[1, 0].legend(fontsize="x-small", markerscale=3)
    return fig


def plot_missing(rows, shown):
    """Blacked-out blocks and their reconstructions; errors against the size of the block."""
    fig = Figure(figsize=(15, 6.4), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[1.25, 1])
    titles = ("original", "blacked out", "reconstructed", "filled with the mean,\nreconstructed")
    for axes, matrices, title in zip(left.subplots(4, shown.shape[1]), shown, titles):
        for ax, matrix, row in zip(axes, matrices, rows):
            show_matrix(ax, matrix, f"{row['size']} x {row['size']}" if title == titles[0] else "")
        axes[0].set_ylabel(title, fontsize="small")
    sizes = [row["size"] for row in rows]
    for ax, place in zip(right.subplots(1, 2, sharey=True), ("inside", "outside")):
        lines = {f"black {place}": "reconstructed", f"filled {place}": "filled, reconstructed"}
        lines |= ({"intact": "of the whole matrix", "baseline": "mean matrix"} if place == "inside"
                  else {"intact outside": "of the whole matrix"})
        for k, (key, label) in enumerate(lines.items()):
            ax.plot(sizes, [row[key] for row in rows], "o-", color=common.COLOURS[k], label=label)
        ax.set(xlabel="side of the block", title=f"{place} the block", ylim=(0, None))
        ax.legend(fontsize="small")
    right.axes[0].set_ylabel("RMSE, distances / (L√2)")
    return fig


def plot_probe(found, top, mean):
    """The decoded origin, traversals of the most relevant dimensions, and draws along them."""
    columns = len(found["at"])
    fig = Figure(figsize=(1.6 * columns + 0.5, 1.65 * (len(top) + 2) + 0.6), layout="constrained")
    axes = fig.subplots(len(top) + 2, columns)
    for ax in axes[0]:
        ax.axis("off")
    for ax, matrix, title in zip(axes[0], (found["zero"], mean), ("z = 0", "mean matrix")):
        ax.axis("on")
        show_matrix(ax, matrix, title)
    for ax, row, k in zip(axes[1:], found["walk"], top):
        for panel, matrix, at in zip(ax, row, found["at"]):
            show_matrix(panel, matrix, f"{at:+g}" if k == top[0] else "")
        ax[0].set_ylabel(f"z {k}")
    for ax, matrix in zip(axes[-1], found["drawn"]):
        picture = show_matrix(ax, matrix)
    axes[-1, 0].set_ylabel("draws")
    fig.colorbar(picture, ax=axes, shrink=0.3, label="r / (L√2)")
    return fig


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__, PRESETS)
    add, number = parser.add_argument_group("flags of vae_lj_fluid.py").add_argument, common.number
    add("--gammas", nargs="+", type=number(float, 0, 100), metavar="GAMMA",
        default=[0.1, 0.4, 0.7, 1.0], help="gravity of the training sets, in epsilon / sigma")
    add("--unseen", type=number(float, 0, 100), default=3.0, metavar="GAMMA",
        help="gravity of the set that is not trained on")
    add("--temperature", type=number(float, 0.01, 1000), default=0.75, help="T, in epsilon")
    add("--particles", type=number(int, 4, 200), default=30, help="N")
    add("--box", type=number(float, 1, 1000), default=10.0, help="side L, in sigma")
    add("--configurations", type=number(int, 20, 10**6), help="independent systems per gamma")
    add("--anomalies", type=number(int, 20, 10**6), help="configurations per anomalous set")
    add("--sweeps", type=number(int, 1, 10**7), help="Metropolis sweeps per system")
    add("--long-sweeps", type=number(int, 1, 10**8), help="sweeps of the run to equilibrium")
    add("--chains", type=number(int, 2, 10**5), help="systems per gamma of the run to equilibrium")
    add("--epochs", type=number(int, 1, 10**4), help="of the main VAE")
    add("--other-epochs", type=number(int, 1, 10**4),
        help="of all other nets (dense ones ten times as many)")
    add("--latents", nargs="+", type=number(int, 2, 2000), metavar="D",
        help=f"latent sizes to train beside {LATENT}")
    add("--lambdas", nargs="+", type=number(float, 0, 100), metavar="LAMBDA",
        help=f"weights of the KL to train beside {LAMBDA}")
    add("--sets", metavar="DIR", help="take the sampled sets from this folder of an earlier run")
    args = parser.parse(argv)
    if args.sets and not pathlib.Path(args.sets, "units").is_dir():
        parser.error(f"argument --sets: {args.sets!r} is not the folder of a run")
    # centres are about 1 apart: each takes the area of a hexagon, walls are half a unit off
    if args.particles * math.sqrt(3) / 2 > (args.box + 1) ** 2:
        parser.error(f"argument --box: {args.particles} particles of diameter 1 do not fit into a "
                     f"box of side {args.box:g}")
    if args.other_epochs > args.epochs:
        parser.error(f"argument --other-epochs: {args.other_epochs} is more than --epochs "
                     f"{args.epochs}")
    args.gammas = sorted(set(args.gammas))
    args.latents = sorted(set(args.latents) - {LATENT})
    args.lambdas = sorted(set(args.lambdas) - {LAMBDA})
    return args


def sample_sets(run, args):
    """All sampled sets, a work unit each: {gamma: set}, {name: set} and the long run."""
    share = dict(particles=args.particles, box=args.box, temperature=args.temperature,
                 seed=args.seed)
    fluids = {f"fluid-{g:g}": Fluid((g,), args.configurations, args.sweeps, **share)
              for g in args.gammas}
    fluids |= {"unseen": Fluid((args.unseen,), args.anomalies, args.sweeps, **share),
               "fake": Fluid((0.5,), args.anomalies, 2 * args.sweeps, "fake", **share),
               "long": Fluid(tuple(args.gammas), args.chains * len(args.gammas), args.long_sweeps,
                             **share)}
    found = {}
    for name, fluid in fluids.items():
        def compute(checkpoint):
            saved = args.sets and common.load(pathlib.Path(args.sets, "units", f"{name}.pt"), "cpu")
            return saved["result"] if saved else metropolis(fluid, name, args.device, args.compile,
                                                            checkpoint)
        found[name] = run.unit(name, compute)
        wrong = [f"{key} {value}" for key, value in found[name]["parameters"].items()
                 if value != getattr(fluid, key)]
        if wrong:
            (run.folder / "units" / f"{name}.pt").unlink()
            common.die(f"the set {name} in {args.sets or run.folder} has {', '.join(wrong)}: "
                       "not what the flags ask for")
    return {g: found.pop(f"fluid-{g:g}") for g in args.gammas}, found


def train_all(run, args, xy, test):
    """Everything trained, a work unit each: {name: (nets, model)}, and the rows of all epochs."""
    models = MODELS | {f"latent {D}": Model(latent=D) for D in args.latents}
    models |= {f"lambda {lam:g}": Model(lam=lam) for lam in args.lambdas}
    trained, history = {}, []
    for name, model in models.items():
        g = common.generator(args.seed, name, args.device)
        nets = build(model, args.particles, g)
        epochs = args.epochs if name == MAIN else model.longer * args.other_epochs

        def compute(checkpoint):
            rows = train(name, nets, model, xy, test[:2000], epochs, g, checkpoint)
            return {"rows": rows, "state": nets.state_dict()}
        result = run.unit(name.replace(", ", "-").replace(" ", "-"), compute)
        nets.load_state_dict(result["state"])
        trained[name] = nets.requires_grad_(False), model
        history += [row | {"latent": model.latent, "lambda": model.lam} for row in result["rows"]]
    return trained, history


def claims(results, args):
    """Closing table (claim, document, here, holds)."""
    last, shape, codes, found = (results[key] for key in ("training", "geometry", "codes", "probe"))
    last, axes, nets = last[-1], sum(codes["axes"]), {
        row["model"]: row for row in results["representations"]}
    sets = {row["set"]: row for row in results["anomalies"]}
    low, high = DOCUMENT["axes"]
    table = [
        (f"MSE, {last['epoch']} epochs", f"{DOCUMENT['mse']}", f"{last['test error']:.4f}; mean "
         f"matrix {nets[MAIN]['trivial']:.4f}, PCA with {LATENT} {nets[MAIN]['pca']:.4f}",
         last["test error"] < DOCUMENT["mse"] + 0.00005),
        ("KL per dimension in nats (at most 2.2)", f"{DOCUMENT['kl']:.3f}",
         f"{last['test kl']:.3f}", last["test kl"] <= 2.2),
        ("variance of the codes on two principal axes", f"{low:.0%} to {high:.0%}", f"{axes:.1%}",
         low <= axes <= high),
        ("energies, Jensen-Shannon distance", f"{DOCUMENT['js']}", f"{shape['js']:.3f}; two halves "
         f"of the true ones {shape['js floor']:.3f}", shape["js"] <= DOCUMENT["js"])]
    for key, name, sign in (("latent", "larger latent size", 1), ("lambda", "lower lambda", -1)):
        rows = sorted(swept(results["sweeps"], key), key=lambda row: sign * row[key])
        values = [row["test error"] for row in rows]
        table.append((f"lower MSE with {name} (after {args.other_epochs} epochs)", "yes", ", ".join(
            f"{row[key]:g}: {row['test error']:.4f}" for row in rows),
            all(a > b for a, b in zip(values, values[1:]))))
    for name, row in nets.items():
        works, share = name == MAIN, row["error"] / row["trivial"]
        verb, side = ("works", "below") if works else ("fails", "above")
        table.append((f"{name} {verb} (error {side} half of the trivial)", "yes",
                      f"{row['error']:.4f}, {share:.0%} of it", (share < 0.5) == works))
    own, chance = codes["nearest is own"], 1 / len(args.gammas)
    table += [(f"codes lie by gamma (nearest mean is their own; {chance:.0%} by chance)", "yes",
               f"{own:.0%}", own > 2 * chance)]
    unseen, other, random = (sets[name] for name in (f"γ = {args.unseen:g}", "fake potential",
                                                     "random"))
    top, half = f"test, γ = {args.gammas[-1]:g}", min(args.gammas, key=lambda g: abs(g - 0.5))
    for row, near, at in ((unseen, args.gammas[-1], top), (other, half, f"test, γ = {half:g}")):
        limit = 1.5 * sets[at]["rmse"]["mean"]
        table.append((f"{row['set']} lies at {at[6:]}, RMSE within 1.5 times", "yes",
                      f"at γ = {row['nearest gamma']:g}; {row['rmse']['mean']:.4f}, "
                      f"{sets[at]['rmse']['mean']:.4f}",
                      row["nearest gamma"] == near and row["rmse"]["mean"] < limit))
    table += [("random: separable by RMSE (area under ROC above 0.9)", "yes",
               f"{random['RMSE']:.3f}; RMSE + KL {random['RMSE + KL']:.3f}", random["RMSE"] > 0.9),
              (f"random: codes spread more (than γ = {random['nearest gamma']:g}, by a tenth)",
               "yes", f"{random['spread']:.2f} times", random["spread"] > 1.1)]
    for name, change in results["change of the rest"].items():
        row = sets[f"corrupted, {name}"]
        table += [(f"corrupted, {name}: RMSE reflects it (area above 0.9)", "yes",
                   f"{row['RMSE']:.3f}; RMSE + KL {row['RMSE + KL']:.3f}", row["RMSE"] > 0.9),
                  (f"corrupted, {name}: the whole matrix shifts (untouched pairs half as much)",
                   "yes", f"{change:.2f} times the touched", change > 0.5)]
    hidden, rough = results["missing"], found["texture"]
    better = [row for row in hidden if row["black inside"] < row["baseline"]]
    table += [
        ("blacked-out blocks are restored better than by the mean matrix", "tried",
         f"{len(better)} of {len(hidden)} sizes; filled with the mean first "
         f"{sum(row['filled inside'] < row['baseline'] for row in hidden)}",
         len(better) == len(hidden)),
        ("zero latent featureless (texture below a quarter of real)", "yes",
         f"{rough['zero']:.3f}, {rough['real']:.3f}; mean matrix {rough['mean']:.3f}",
         rough["zero"] < rough["real"] / 4),
        ("each dimension another pattern (|cosine| of five below 0.5)", "yes",
         f"at most {found['cosine']:.2f}", found["cosine"] < 0.5),
        ("draws along five dimensions are no configurations (share of two eigenvalues)", "yes",
         f"{found['share']['drawn']:.3f}, reconstructions {found['share']['reconstructed']:.3f}",
         found["share"]["drawn"] < found["share"]["reconstructed"])]
    return table + fluid_claims(results)


def fluid_claims(results):
    """The sampler beside the authors', the exact theorem, and whether the sets have settled."""
    rows, table = results["fluid"], []
    for row, end in zip(rows, results["long"]):
        g, settled = row["gamma"], end["settled"]
        drift, error = row["energy"] - settled, (row["error"] ** 2 + end["error"] ** 2) ** 0.5
        table.append((f"γ = {g:g}: settled after {row['sweeps']:,} sweeps (3 standard errors)",
                      "assumed", f"U {row['energy']:.2f}, after {end['sweeps']:,} {settled:.2f}; "
                      f"contact {row['contact']:.2f} ± {row['contact error']:.2f} of "
                      f"{row['N gamma']:g}", abs(drift) < 3 * error and abs(
                          row["contact"] - row["N gamma"]) < 3 * row["contact error"]))
    known = [row for row in rows if row["gamma"] in RERUN]
    for key, k in (("acceptance", 0), ("height / L", 1)):
        table.append((f"{key} as of the authors' sampler (within 0.01)", ", ".join(
            f"{RERUN[row['gamma']][k]:.3f}" for row in known), ", ".join(
            f"{row[key]:.3f}" for row in known), bool(known) and all(
            abs(row[key] - RERUN[row["gamma"]][k]) < 0.01 for row in known)))
    return table


def print_tables(results):
    """Everything measured, before the closing table."""
    table = common.print_table
    table(["\nγ", "systems", "sweeps", "energy", "acceptance", "height / L", "contact", "N γ"], [
        [f"{row['gamma']:g}", row["count"], row["sweeps"],
         f"{row['energy']:.2f} ± {row['error']:.2f}", f"{row['acceptance']:.3f}",
         f"{row['height / L']:.3f}", f"{row['contact']:.2f} ± {row['contact error']:.2f}",
         f"{row['N gamma']:g}"] for row in (*results["fluid"], *results["long"])])
    table(["\nrepresentation, net", "error", "trivial", "PCA", "KL", "distances / σ", "overlaps"], [
        [row["model"], *(f"{row[key]:.{digits}f}" if row.get(key) is not None else "-"
                         for key, digits in (("error", 4), ("trivial", 4), ("pca", 4), ("kl", 2),
                                             ("distance rmse", 2), ("overlaps", 1)))]
        for row in results["representations"]])
    table(["\nset", "RMSE", "KL", "at γ", "spread", "AUROC, RMSE", "RMSE + KL"], [
        [row["set"], common.show(row["rmse"]), f"{row['kl']:.2f}", f"{row['nearest gamma']:g}",
         f"{row['spread']:.2f}", f"{row['RMSE']:.3f}", f"{row['RMSE + KL']:.3f}"]
        if "kl" in row else [row["set"], common.show(row["rmse"]), *[""] * 5]
        for row in results["anomalies"]])
    table(["\nblack block", "mean matrix", "whole", "black", "filled", "whole, outside", "black",
           "filled"], [[f"{row['size']} x {row['size']}", *(f"{row[key]:.3f}" for key in (
               "baseline", "intact", "black inside", "filled inside", "intact outside",
               "black outside", "filled outside"))] for row in results["missing"]])
    shape = results["geometry"]
    table(["\nmean height / σ", *(f"γ = {row['gamma']:g}" for row in shape["heights"])], [
        [key, *(f"{row[key]:.2f}" for row in shape["heights"])]
        for key in ("true", "tumbled", "reconstructed")])
    print(f"\nGram matrix: error {shape['gram error']:.1e} σ from true distances; from "
          f"reconstructed ones {shape['procrustes rmse']:.2f} σ, two eigenvalues being "
          f"{shape['share']:.1%} of all")


def pictures(run, args, sets, long, results, arrays):
    """Save all figures."""
    run.figure(plot_equilibrium(sets, long["long"], results["fluid"]), "equilibrium",
               "Has the fluid settled? (right: density profiles)")
    run.figure(plot_representations(results["representations"], arrays["outputs"],
                                    arrays["test"][0], args.box), "representations",
               "Five representations: one configuration of the test set and its reconstruction")
    run.figure(plot_matrices(arrays["d"], arrays["x_hat"], arrays["geometry"], arrays["gammas"],
                             args.box), "matrices", "Distance matrices and the points they hold")
    run.figure(plot_latent(arrays["normal"]["mu"], arrays["gammas"],
                           results["training"], results["sweeps"]), "latent",
               "Codes of the test set; training; latent size and λ")
    run.figure(plot_energies(arrays["geometry"], arrays["gammas"]), "energies",
               f"Pair energies, Jensen–Shannon distance {results['geometry']['js']:.3f}")
    run.figure(plot_anomalies(arrays["anomalies"], arrays["gammas"]),
               "anomalies", "Anomaly detection against the test set")
    run.figure(plot_missing(results["missing"], arrays["missing"]), "missing", "Missing data")
    run.figure(plot_probe(arrays["probe"], results["probe"]["top"], arrays["mean"]), "probe",
               "Latent space probing: the origin, the five dimensions of largest KL, draws")


def analyse(args, sets, others, trained, history, xy, test, gammas):
    """All figures of results.json, and the arrays for the pictures."""
    (nets, model), scale, device = trained[MAIN], args.box * math.sqrt(2), args.device
    results = {"fluid": [row for found in sets.values() for row in fluid_row(found)],
               "long": fluid_row(others["long"]),
               "training": [row for row in history if row["model"] == MAIN],
               "sweeps": [row for row in history if row["epoch"] == args.other_epochs
                          and row["model"] in trained.keys() - MODELS.keys() | {MAIN}]}
    results["representations"], outputs = zip(*(representation_row(
        name, *trained[name], xy, test[:2000], args.box) for name in MODELS))
    d = distance_matrix(test)
    mean = sum(distance_matrix(part).sum(0) for part in xy.split(2000)) / len(xy)
    normal = evaluate(nets, model, d)
    results["codes"] = code_figures(normal["mu"], gammas)
    results["geometry"], shapes = geometry(normal["x_hat"].cpu(), test.cpu(), gammas, args.box)
    g = common.generator(args.seed, "anomalies", device)
    moved = {reading: corrupt(test[:args.anomalies], reading, args.box, g)
             for reading in ("code", "slide", "sigma")}
    uniform = torch.rand(args.anomalies, args.particles, 2, generator=g, device=device)
    points = {f"γ = {args.unseen:g}": others["unseen"]["xy"].to(device) / scale,
              "fake potential": others["fake"]["xy"].to(device) / scale,
              "random": uniform / math.sqrt(2)}
    anomalies = {name: distance_matrix(by_origin(x)) for name, x in points.items()}
    anomalies |= {f"corrupted, {name}": distance_matrix(x) for name, (x, _) in moved.items()}
    results["anomalies"], found = anomaly_rows(nets, model, normal, gammas, anomalies)
    results["change of the rest"] = {name: change_of_rest(
        normal["x_hat"][:args.anomalies], found[f"corrupted, {name}"]["x_hat"], chosen)
        for name, (_, chosen) in moved.items()}
    sizes = [size for size in (3, 6, 9, 12, 15) if size < args.particles]
    results["missing"], hidden = missing_rows(nets, model, d[:500], mean, sizes, g)
    results["probe"], probed = probe(nets, normal, d, mean, g)
    return results, {"outputs": outputs, "test": test.cpu(), "d": d.cpu(), "gammas": gammas,
                     "x_hat": normal["x_hat"].cpu(), "geometry": shapes, "normal": normal,
                     "anomalies": found, "missing": hidden, "probe": probed,
                     "mean": mean[0].cpu()}


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    label = f"N = {args.particles}, L = {args.box:g}, T = {args.temperature:g}"
    with common.Run(__file__, args, label, additive=("latents", "lambdas", "sets")) as run:
        sets, others = sample_sets(run, args)
        xy = torch.cat([found["xy"] for found in sets.values()]) / (args.box * math.sqrt(2))
        gammas = torch.tensor(args.gammas).double().repeat_interleave(args.configurations)
        order = torch.randperm(len(xy), generator=common.generator(args.seed, "split"))
        xy, gammas = by_origin(xy[order].to(args.device)), gammas[order]
        n = len(xy) * 4 // 5
        trained, history = train_all(run, args, xy[:n], xy[n:])
        results, arrays = analyse(args, sets, others, trained, history, xy[:n], xy[n:], gammas[n:])
        pictures(run, args, sets, others, results, arrays)
        print_tables(results)
        return run.finish(results, claims(results, args), history)


if __name__ == "__main__":
    main()
