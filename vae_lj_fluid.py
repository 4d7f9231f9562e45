"""A two-dimensional Lennard-Jones fluid under gravity, and a VAE on its distance matrices.

Reproduces Bacilieri, Barbiero, Bordin, Pitteri, "Variational Auto Encoders" (LCP-B exam, 2023). N
particles in a box of side L, in units of sigma and epsilon, have the energy

    U = sum_{i<j} 4 (r_ij^-12 - r_ij^-6) + gamma sum_i y_i

and are sampled by Metropolis moves, in all systems at once. A VAE learns the matrices of distances
r_ij / (L sqrt 2) of their last configurations, four gammas together, by minimising

    mean over entries (x - x_hat)^2 + lambda mean over latent dimensions KL(q(z|x) || N(0, 1))

and is asked for energies, coordinates, anomalies, missing data and the meaning of its dimensions.

    python vae_lj_fluid.py                           everything: about 13 minutes on 2 CPU cores
    python vae_lj_fluid.py --lambdas 0.000035 0.035  two other weights of the KL, in the same folder
    python vae_lj_fluid.py --sweeps 10000 --out out/settled    a fluid nearer to equilibrium

A run leaves figures, results.json, metrics.csv, the nets and the sets of data with all their
parameters (units/*.pt) in out/vae_lj_fluid-<preset>. It has not been timed on a GPU.

The settings of sampler and main VAE are those of the authors' code. What else is open, and what we
chose:
* A coordinate that would leave the box is dropped alone; the cut-off at 3 sigma is not shifted; a
  configuration is the one after 2,500 sweeps. Below r^2 = 0.001 the energy is constant, so that
  random starts are finite.
* Quick has 5,000 configurations per gamma for 10,000 and a quarter of the optimiser's steps.
* Glorot's initial weights, Keras' default. The document's 0.0013 is met as what training logs, the
  mean over the last epoch; the test error is a third larger. Test errors are those of the mean
  code; while training goes on, and in the sweeps, those of a drawn one.
* The other representations: dense nets n-512-256-D and back, ten times the epochs; a grid of 20 x
  20, where the weight of live cells falls to 1 and lambda rises during training. "fails": the test
  error is above half of that of the trivial predictor, the mean of the training set. Rows "unit"
  have the lambda of the slides' own likelihood N(mu(z), 1), 2 D / entries for N = 30 (grid: D /
  entries): they show what a lambda, not a representation, does.
* The energies of reconstructed configurations are those of the tumbled points, gravity included;
  both histograms leave out pairs with r < 1 and have 50 bins.
* Corrupted: the code moves 4 particles by up to 0.2 L sqrt 2 per coordinate ("code"), the slide in
  a direction by up to 0.2, which may be in those units ("slide") or in sigma ("sigma"). The order
  of the particles is kept, so that rows of the matrix keep their meaning; others are sorted.
* The second score of an anomaly is RMSE + KL, each standardised by the test set's mean and spread.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import common

# C configurations or chains, N particles, B batch, D latent dimensions, G gammas, K records
PRESETS = {
    "smoke": dict(configurations=50, anomalies=40, sweeps=40, long_sweeps=80, chains=10, epochs=2,
                  other_epochs=1, latents=[5], lambdas=[0.0035], compile=False),
    "quick": dict(configurations=5000, anomalies=2000, sweeps=2500, long_sweeps=25_000,
                  chains=400, epochs=5, other_epochs=2, latents=[5], lambdas=[0.0035],
                  compile=True),
    "paper": dict(configurations=10_000, anomalies=2000, sweeps=2500, long_sweeps=25_000,
                  chains=1000, epochs=10, other_epochs=3, latents=[5, 20, 80],
                  lambdas=[0.000035, 0.0035], compile=True),
}
STEP, CUTOFF = 0.2, 3.0   # largest displacement per coordinate; Lennard-Jones ends there, unshifted
CORE = 1e-3               # r^2 below which energies stay finite: random starts overlap
CHUNK = 5000              # chains at a time on a CPU, so that they stay in its cache
SIZES = (3, 6, 9, 12, 15)  # of blacked-out blocks
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
CUTOFFS = {"lennard-jones": CUTOFF, "fake": math.inf}


def propose(xy, u, gamma, temperature, box):
    """Trial positions of a whole sweep (2, N, C), and what each pair energy may rise by (N, C).

    xy (2, N, C), u (3, N, C) uniform, gamma () or (C,). A coordinate outside (0, L) is dropped
    alone. A move with the energy change dU is accepted if u < exp(-dU / T), that is dU < -T log u.
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
        done = [(points.cpu(), record.cpu()) for points, record in done]
        records = [record.cpu() for record in records]
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
            "error": error, "acceptance": accepted, "height": height}


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
    """Move `moved` particles of each configuration (C, N, 2), in units of L sqrt 2: "xy" in sigma,
    and which particles were "moved" (C, N).

    reading: "code", uniform within 0.2 per coordinate; "slide", a random direction and a length up
    to 0.2; "sigma", likewise, the length being in sigma. The order is kept; particles may leave the
    box.
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
    return {"xy": (xy + chosen * step) * box * math.sqrt(2), "moved": chosen[..., 0]}


def black_out(d, size, generator):
    """Hide a block of size x size entries and its mirror image: matrices "d" (C, 1, N, N), hidden
    entries being 0, black, "where" (C, 1, N, N) is True."""
    C, _, N, _ = d.shape
    corner = torch.randint(N - size + 1, (C, 2, 1), generator=generator, device=d.device)
    at = torch.arange(N, device=d.device)
    inside = (at >= corner) & (at < corner + size)  # (C, 2, N)
    where = inside[:, 0, :, None] & inside[:, 1, None]
    where = (where | where.transpose(1, 2))[:, None]
    return {"d": d.masked_fill(where, 0.0), "where": where}


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


def contact_density(xy, box, width=0.4, bins=20, degree=3):
    """Particles per length at the wall y = 0 minus at y = L, a value per configuration (C,).

    A polynomial is fitted to the histogram up to `width` from the wall; its value at the wall is a
    weighted count of the particles there.
    """
    edge = torch.linspace(0, width, bins + 1, dtype=torch.double)
    powers = torch.arange(1, degree + 2)
    area = (edge[1:, None] ** powers - edge[:-1, None] ** powers) / powers  # of y^k in each bin
    weight = torch.cat([torch.linalg.pinv(area)[0], torch.zeros(1, dtype=torch.double)])
    low, high = (weight[(y / width * bins).long().clamp(max=bins)].sum(1)
                 for y in (xy[..., 1], box - xy[..., 1]))
    return low - high


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
        x = (part @ along[row, best, :, None])[..., 0] * sign[row, best]  # turned, not mirrored
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
    """False and true positive rates over all thresholds, from high to low, and the area under their
    curve: how often an anomalous score is above a normal one, equal ones counting half."""
    a, b = normal.cpu().sort().values, anomalous.cpu().sort().values
    at = torch.cat([a, b]).unique().flip(0)
    false, true = (torch.cat([torch.zeros(1), 1 - torch.searchsorted(x, at).double() / len(x)])
                   for x in (a, b))
    return false, true, torch.trapezoid(true, false).item()


def principal_axes(mu):
    """Mean (D,), axes (D, D) and their shares of the variance (D,), largest first, of mu (C, D)."""
    values, vectors = torch.linalg.eigh(torch.cov(mu.T.cpu().double()))
    return mu.mean(0), vectors.flip(1).to(mu), values.flip(0) / values.sum()


def fluid_rows(found):
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
    principal components as latent dimensions; overlaps: pairs nearer than 0.9 sigma. Returns the
    row and what the net makes of the first configuration.
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
        return row, out["x_hat"][:1].sigmoid().cpu()
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
    return row, out["x_hat"][:1].cpu()


def geometry(d_hat, test, gammas, box):
    """What reconstructed matrices d_hat (C, 1, N, N) say of points, heights and energies; test
    (C, N, 2) are the true points, both in units of L sqrt 2. Returns figures and arrays to plot.

    js: of the energies U of true points and of tumbled ones, pairs with r < 1 left out; js pairs:
    of the pairs' energies, straight from the matrices; js floor: of two halves of the true ones.
    """
    scale, xy = box * math.sqrt(2), box * math.sqrt(2) * test.double()
    true, d = distance_matrix(xy)[:, 0], scale * tidy(d_hat)[:, 0].double()
    (exact, _), (points, share) = gram_coordinates(true), gram_coordinates(d)
    exact_sat, sat = turbo_tumbler(exact, box), turbo_tumbler(points, box)
    U, U_hat = (pair_energy(distance_matrix(x)[:, 0]) + gammas * x[..., 1].sum(1)
                for x in (xy, sat))

    def js(a, b):
        return jensen_shannon(*histograms(a, b)[1:])
    fitted = procrustes(points, xy)
    heights = [{"gamma": g} | {key: x[gammas == g][..., 1].mean().item() for key, x in (
        ("true", xy), ("tumbled", exact_sat), ("reconstructed", sat))}
        for g in gammas.unique().tolist()]
    return {"js": js(U, U_hat), "js pairs": js(pair_energy(true), pair_energy(d)),
            "js floor": js(U[::2], U[1::2]), "share": share.mean().item(), "heights": heights,
            "gram error": (procrustes(exact, xy) - xy).norm(dim=-1).max().item(),
            "procrustes rmse": (fitted - xy).square().sum(-1).mean().sqrt().item()}, {
        "points": xy, "fitted": fitted, "tumbled": sat, "energies": (U, U_hat)}


def anomaly_rows(nets, model, normal, gammas, sets):
    """Errors, codes and detection of each set of matrices {name: (C, 1, N, N)}, beside the test
    set's evaluation `normal`, whose configurations have the gammas (C,): rows, {name: evaluation}.

    nearest gamma: whose mean code is nearest to the set's; spread: mean distance from the mean
    code, by that of this gamma's configurations; AUROC: areas under the ROC curve against the test
    set; there: by RMSE, against those with the nearest gamma.
    """
    def scores(found):
        rmse, kl = found["error"].sqrt(), found["kl"].sum(1)
        return rmse, (rmse - base.mean()) / base.std() + (kl - nats.mean()) / nats.std()
    base, nats, levels = normal["error"].sqrt(), normal["kl"].sum(1), gammas.unique().tolist()
    codes = {g: normal["mu"][gammas == g] for g in levels}

    def width(mu):
        return (mu - mu.mean(0)).norm(dim=1).mean().item()
    arrays = {"test": normal} | {name: evaluate(nets, model, x) for name, x in sets.items()}
    parts = {f"test, γ = {g:g}": {key: normal[key][gammas == g] for key in ("error", "kl", "mu")}
             for g in levels}
    rows = []
    for name, out in (arrays | parts).items():
        mu, both = out["mu"], scores(out)
        out["roc"] = {key: roc(a, b) for key, a, b in zip(
            ("RMSE", "RMSE + KL"), scores(normal), both)}
        near = min(levels, key=lambda g: (codes[g].mean(0) - mu.mean(0)).norm().item())
        fair = roc(base[gammas == near], both[0])[2]
        rows.append({"set": name, "rmse": common.mean_std(both[0]), "kl": out["kl"].mean().item(),
                     "nearest gamma": near, "spread": width(mu) / width(codes[near]),
                     "AUROC there": fair,
                     **{f"AUROC {key}": area for key, (*_, area) in out["roc"].items()}})
    return rows, arrays


def change_of_rest(before, after, moved):
    """Root mean square change of reconstructions (C, 1, N, N) where neither particle was moved
    (C, N), by that where one was."""
    change, touched = (after - before[:len(after)])[:, 0] ** 2, moved[:, :, None] | moved[:, None]
    return (change[~touched].mean() / change[touched].mean()).sqrt().item()


def code_figures(mu, gammas):
    """Shares of variance of two principal axes, and how often the nearest mean code of a gamma is
    that of the configuration's own: means of one half of the codes (C, D), tried on the other."""
    half, levels = len(mu) // 2, gammas.unique()
    centres = torch.stack([mu[:half][gammas[:half] == g].mean(0) for g in levels])
    found = levels[torch.cdist(mu[half:], centres).argmin(1).cpu()]
    return {"axes": principal_axes(mu)[2][:2].tolist(),
            "nearest is own": (found == gammas[half:]).double().mean().item()}


def missing_rows(nets, model, d, mean, hidden):
    """RMSE inside and outside of blocks of d (C, 1, N, N) that are black in {size: set}: of the
    mean matrix of the training set, of reconstructions of the whole matrix, of the black one, and
    of the black one filled with the mean. Rows, and a sheet (4, sizes, N, N)."""
    rows, sheet = [], []
    whole = evaluate(nets, model, d)["x_hat"]
    for size, found in hidden.items():
        black, where = found["d"].to(d.device), found["where"].to(d.device)
        restored, filled = (evaluate(nets, model, x)["x_hat"]
                            for x in (black, torch.where(where, mean, d)))
        guesses = {"mean": mean.expand_as(d), "whole": whole, "black": restored, "filled": filled}
        rows.append({"size": size} | {
            f"{key} {place}": ((x - d) ** 2)[at].mean().sqrt().item() for key, x in guesses.items()
            for place, at in (("inside", where), ("outside", ~where))})
        sheet.append(torch.stack([d[0, 0], black[0, 0], restored[0, 0], filled[0, 0]]))
    return rows, torch.stack(sheet, 1).cpu()


@torch.no_grad()
def probe(nets, normal, d, mean, generator, count=5):
    """The origin of the latent space, the `count` dimensions with the largest KL (and their
    traversal from -3 to 3), and draws from the prior along these alone and along all dimensions:
    figures, and a sheet of matrices (count + 3, 7, N, N)."""
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
    code = torch.randn(200, D, generator=generator, device=device)
    few = torch.zeros_like(code).index_copy(1, top, code[:, top])
    matrices = {"zero": zero, "mean": mean[None], "real": d[:200], "drawn": decode(few),
                "drawn along all": decode(code), "reconstructed": normal["x_hat"][:200]}
    first = torch.full_like(walk[:1], math.nan)
    first[0, :3] = torch.stack([zero[0, 0], mean[0], d[0, 0]])
    sheet = torch.cat([first, walk, matrices["drawn"][None, :7, 0],
                       matrices["drawn along all"][None, :7, 0]])
    return {"kl by dimension": kl.tolist(), "top": top.tolist(), "cosine": cosine,
            "texture": {key: texture(x) for key, x in matrices.items()},
            "share": {key: gram_coordinates(tidy(x)[:, 0].cpu())[1].mean().item()
                      for key, x in matrices.items()}}, sheet.cpu()


def texture(d):
    """Root mean square step between neighbouring entries of d (C, 1, N, N) above the diagonal;
    small where it has no features."""
    step = (d[..., 1:] - d[..., :-1])[..., torch.ones_like(d[0, 0, :, 1:]).triu(1) > 0]
    return (step ** 2).mean().sqrt().item()


# --- plot ----------------------------------------------------------------------------------------

def show_matrix(ax, matrix, title="", limit=1.0, cmap="viridis"):
    """One matrix as a picture, from 0 (or, diverging, -limit) to limit."""
    low = 0 if cmap == "viridis" else -limit
    picture = ax.imshow(matrix.numpy(), cmap=cmap, vmin=low, vmax=limit, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_title(title, fontsize="small")
    return picture


def show_points(ax, points, box, title="", colour=common.COLOURS[0]):
    """Particles in the box, which is drawn even where they have left it."""
    ax.plot([0, box, box, 0, 0], [0, 0, box, box, 0], color="0.6", lw=0.8)
    ax.plot(*points.T, "o", ms=4, color=colour)
    ax.set(aspect="equal", xticks=[], yticks=[], xlim=(-0.08 * box, 1.08 * box),
           ylim=(-0.08 * box, 1.08 * box))
    ax.set_title(title, fontsize="small")


def plot_equilibrium(sets, long, rows):
    """Energy against sweeps, the contact theorem, and density profiles."""
    fig = Figure(figsize=(14, 4.2), layout="constrained")
    left, middle, right = fig.subplots(1, 3)
    for k, (found, row) in enumerate(zip(sets, rows)):
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
    ends = [x["energy"][-1].max().item() for x in sets]
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
            grid = "rows" in row
            show_matrix(top, (occupancy if grid else distance_matrix)(points[None])[0, 0],
                        row["model"])
            show_matrix(low, x_hat[0, 0], share, x_hat[0].max().item() if grid else 1.0)
            if grid:  # the first row is the floor
                top.invert_yaxis(), low.invert_yaxis()
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


def plane_of_means(mu, gammas):
    """Origin (D,) and two axes (D, 2) of the plane next to the mean codes of the gammas; with less
    than three gammas, of the codes (C, D)."""
    levels = gammas.unique()
    centres = torch.stack([mu[gammas == g].mean(0) for g in levels])
    origin, axes, _ = principal_axes(centres if len(levels) > 2 else mu)
    return origin, axes[:, :2]


def scatter_latent(ax, codes, gammas, origin, axes):
    """Codes (C, D) on two axes (D, 2), coloured by gamma; at most 500 of each."""
    for k, g in enumerate(gammas.unique().tolist()):
        at = (codes[gammas == g][:500] - origin) @ axes
        ax.plot(*at.T.cpu(), ".", ms=3, alpha=0.6, color=common.COLOURS[k], label=f"γ = {g:g}")


def swept(rows, key):
    """Those rows that differ from the main VAE in nothing but "latent" or "lambda", in order."""
    same = ("lambda", LAMBDA) if key == "latent" else ("latent", LATENT)
    return sorted((row for row in rows if row[same[0]] == same[1]), key=lambda row: row[key])


def plot_latent(mu, gammas, history, sweeps):
    """Principal axes of the codes, the training, and the sweeps of latent size and lambda."""
    fig = Figure(figsize=(17, 3.8), layout="constrained")
    left, right, *panels = fig.subplots(1, 5)
    mean, axes, shares = principal_axes(mu)
    scatter_latent(left, mu, gammas, mean, axes[:, :2])
    left.set(xlabel=f"first principal axis ({shares[0]:.1%})",
             ylabel=f"second principal axis ({shares[1]:.1%})")
    scatter_latent(right, mu, gammas, *plane_of_means(mu, gammas))
    right.set(xlabel="plane of the γs' mean codes, first axis", ylabel="second axis")
    left.legend(markerscale=3, fontsize="small")
    for ax, key, label, rows in zip(panels, ("epoch", "latent", "lambda"), (
            "epoch", "latent dimensions", "λ"), (history, swept(sweeps, "latent"),
                                                swept(sweeps, "lambda"))):
        x, other = [row[key] for row in rows], ax.twinx()
        if key == "epoch":
            ax.plot(x, [row["error"] for row in rows], "o-", color=common.COLOURS[0],
                    label="training")
        else:
            ax.set_xscale("log")
            ax.minorticks_off()
        ax.plot(x, [row["test error"] for row in rows], "o:", color=common.COLOURS[0], label="test")
        other.plot(x, [row["test kl"] for row in rows], "s--", color=common.COLOURS[3])
        other.set_ylabel("KL per dimension / nats, test", color=common.COLOURS[3], fontsize="small")
        ax.set_xticks(x, [f"{value:g}" for value in x], fontsize="small")
        ax.set(xlabel=label, ylabel="mean squared error")
        ax.legend(loc="upper center", fontsize="small")
    return fig


def plot_energies(found, gammas):
    """Energies of original and reconstructed configurations, together and by gamma."""
    levels, edges = gammas.unique().tolist(), histograms(*found["energies"])[0]
    fig = Figure(figsize=(3 * len(levels) + 3, 3.4), layout="constrained")
    for ax, g in zip(fig.subplots(1, len(levels) + 1, sharex=True), [None, *levels]):
        chosen = gammas == g if g is not None else torch.ones_like(gammas, dtype=torch.bool)
        for x, label, colour in zip(found["energies"], ("original", "reconstructed"),
                                    common.COLOURS[::3]):
            ax.hist(x[chosen].numpy(), edges.numpy(), density=True, alpha=0.6, color=colour,
                    label=label)
        ax.set(xlabel="U / ε, pairs with r ≥ σ", title="all" if g is None else f"γ = {g:g}")
    fig.axes[0].set_ylabel("probability density")
    fig.axes[0].legend(fontsize="small")
    return fig


def plot_anomalies(arrays, gammas):
    """RMSE histograms, codes in the plane of the test set's mean codes, and ROC curves."""
    sets = [name for name in arrays if name != "test"]
    rmse = {name: arrays[name]["error"].sqrt().cpu() for name in arrays}
    fig = Figure(figsize=(2.7 * len(sets), 8), layout="constrained")
    panels = fig.subplots(3, len(sets), sharex="row", sharey="row")
    origin, axes = plane_of_means(arrays["test"]["mu"], gammas)
    edges = torch.linspace(0, 1.1 * max(x.quantile(0.99).item() for x in rmse.values()), 60).numpy()
    for (first, second, third), name in zip(panels.T, sets):
        for key, colour in (("test", common.COLOURS[0]), (name, common.COLOURS[3])):
            first.hist(rmse[key].numpy(), edges, density=True, alpha=0.6, color=colour)
        first.set_title(name, fontsize="medium")
        first.set_xlabel("RMSE of a matrix")
        scatter_latent(second, arrays["test"]["mu"], gammas, origin, axes)
        second.set_xlabel("plane of the γs' mean codes")
        at = (arrays[name]["mu"][:500] - origin) @ axes
        second.plot(*at.T.cpu(), "x", ms=3, color="k", label="anomalous")
        for (key, (false, true, area)), line in zip(arrays[name]["roc"].items(), ("-", "--")):
            third.plot(false, true, line, color=common.COLOURS[0], label=key)
        third.plot([0, 1], [0, 1], color="0.7", lw=0.8)
        third.set_xlabel("false positive rate")
        third.set_title("area " + ", ".join(
            f"{area:.3f}" for *_, area in arrays[name]["roc"].values()), fontsize="medium")
    for row, label in zip(panels, ("probability density", "second axis", "true positive rate")):
        row[0].set_ylabel(label)
    panels[2, 0].legend(fontsize="small")
    panels[0, 0].legend(["test", "anomalous"], fontsize="small")
    panels[1, 0].legend(fontsize="x-small", markerscale=3)
    return fig


def plot_missing(rows, sheet):
    """Blacked-out blocks and their reconstructions; errors against the size of the block."""
    fig = Figure(figsize=(15, 6), layout="constrained")
    left, *panels = fig.subplots(1, 3, width_ratios=[6, 3, 3])
    sizes = [row["size"] for row in rows]
    common.image_sheet(left, sheet[:, :, None], (
        "original", "blacked\nout", "recon-\nstructed", "filled,\nrecon-\nstructed"),
        [f"{size} × {size}" for size in sizes], cmap="viridis")
    lines = {"black": "black, reconstructed", "filled": "filled with the mean,\nreconstructed",
             "whole": "whole, reconstructed", "mean": "mean matrix"}
    for ax, place in zip(panels, ("inside", "outside")):
        for k, (key, label) in enumerate(lines.items()):
            ax.plot(sizes, [row[f"{key} {place}"] for row in rows], "o-", color=common.COLOURS[k],
                    label=label)
        ax.set(xlabel="side of the block", title=f"{place} the block", xticks=sizes, ylim=(0, 0.2),
               ylabel="RMSE of distances / (L√2)")
    panels[1].legend(fontsize="small")
    return fig


def plot_probe(sheet, top):
    """The decoded origin, traversals of the most relevant dimensions, and draws."""
    fig = Figure(figsize=(9, len(sheet) + 0.7), layout="constrained")
    ax = fig.subplots()
    shown = common.image_sheet(ax, sheet[:, :, None], (
        "z = 0, mean, real", *(f"$z_{{{k}}}$ from −3 to 3" for k in top),
        "draws along\nthese alone", "draws along\nall"), cmap="viridis")
    fig.colorbar(shown, ax=ax, shrink=0.3, label="r / (L√2)")
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
    add("--particles", type=number(int, 8, 64), default=30, help="N")
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
    args = parser.parse(argv)
    # centres are about 1 apart: each takes the area of a hexagon, walls are half a unit off
    if args.particles * math.sqrt(3) / 2 > (args.box + 1) ** 2:
        parser.error(f"argument --box: {args.particles} particles of diameter 1 do not fit into a "
                     f"box of side {args.box:g}")
    args.gammas = sorted(set(args.gammas))
    if args.other_epochs > args.epochs:
        parser.error(f"argument --epochs: {args.epochs} is less than --other-epochs "
                     f"{args.other_epochs}")
    if args.long_sweeps < 2 * args.sweeps:
        parser.error(f"argument --long-sweeps: {args.long_sweeps} is less than twice --sweeps "
                     f"{args.sweeps}")
    if len(args.gammas) > len(common.COLOURS):
        parser.error(f"argument --gammas: {len(args.gammas)} values, at most 8")
    args.latents = sorted(set(args.latents) - {LATENT})
    args.lambdas = sorted(set(args.lambdas) - {LAMBDA})
    return args


def one_set(run, name, parameters, compute):
    """The set `name` of the run, a work unit; its file must have been made with the parameters."""
    found = run.unit(name, lambda checkpoint: compute(checkpoint) | {"parameters": parameters})
    wrong = [f"{key} {value}" for key, value in found["parameters"].items()
             if value != parameters.get(key)]
    if wrong:
        common.die(f"{run.folder}/units/{name}.pt is a set with {', '.join(wrong)}, not what the "
                   "flags ask for: delete it, or choose another --out")
    return found


def sampled_sets(run, args):
    """{name: set}: one per gamma to train on, an unseen gamma, the fake potential, a long run."""
    share = dict(particles=args.particles, box=args.box, temperature=args.temperature,
                 seed=args.seed)
    fluids = {f"fluid-{g:g}": Fluid((g,), args.configurations, args.sweeps, **share)
              for g in args.gammas}
    fluids |= {"unseen": Fluid((args.unseen,), args.anomalies, args.sweeps, **share),
               "fake": Fluid((0.5,), args.anomalies, 2 * args.sweeps, "fake", **share),
               "long": Fluid(tuple(args.gammas), args.chains * len(args.gammas), args.long_sweeps,
                             **share)}
    return {name: one_set(
        run, name, fluid._asdict() | {"step": STEP, "cutoff": CUTOFFS[fluid.potential]},
        lambda checkpoint: metropolis(fluid, name, args.device, args.compile, checkpoint))
        for name, fluid in fluids.items()}


def derived_sets(run, args, test):
    """{name: set}: random points and corrupted test configurations, in sigma; blacked-out matrices.
    test (C, N, 2) in units of L sqrt 2, on the CPU."""
    C, N, L, found = args.anomalies, args.particles, args.box, {}

    def add(name, parameters, compute):
        found[name] = one_set(run, name, {"count": C, "seed": args.seed, **parameters},
                              lambda _: compute(common.generator(args.seed, name)))
    add("random", {"particles": N, "box": L},
        lambda g: {"xy": L * torch.rand(C, N, 2, generator=g)})
    for reading in ("code", "slide", "sigma"):
        add(f"corrupted-{reading}", {"reading": reading}, lambda g: corrupt(
            test[:C], reading, L, g))
    for size in SIZES:
        if size < N:
            add(f"blacked-out-{size}", {"size": size}, lambda g: black_out(
                distance_matrix(test[:500]), size, g))
    return found


def train_all(run, args, xy, test):
    """Everything trained, a work unit each: {name: (nets, model)}, and the rows of all epochs."""
    models = MODELS | {f"latent {D}": Model(latent=D) for D in args.latents}
    models |= {f"lambda {lam}": Model(lam=lam) for lam in args.lambdas}
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


def net_claims(results, epochs):
    """Claims on representations, nets and codes: (claim, document, here, holds)."""
    last, shape, codes = results["training"][-1], results["geometry"], results["codes"]
    nets, axes = {row["model"]: row for row in results["representations"]}, sum(codes["axes"])
    low, high = DOCUMENT["axes"]
    table = [
        (f"MSE, in epoch {last['epoch']} of training (at most that)", f"{DOCUMENT['mse']}",
         f"{last['error']:.4f}; test {last['test error']:.4f}; mean matrix "
         f"{nets[MAIN]['trivial']:.4f}, PCA with {LATENT} {nets[MAIN]['pca']:.4f}",
         round(last["error"], 4) <= DOCUMENT["mse"]),
        ("KL per dimension in nats there (at most 2.2)", f"{DOCUMENT['kl']:.3f}",
         f"{last['kl']:.3f}; test {last['test kl']:.3f}", last["kl"] <= 2.2),
        ("variance of the codes on two principal axes", f"{low:.0%} to {high:.0%}", f"{axes:.1%}",
         low <= axes <= high),
        ("energies, Jensen-Shannon distance (at most that)", f"{DOCUMENT['js']}",
         f"{shape['js']:.3f}; pairs alone {shape['js pairs']:.3f}; two halves of the true ones "
         f"{shape['js floor']:.3f}", shape["js"] <= DOCUMENT["js"]),
        ("Gram matrix gives back the points (0.001 σ, true distances)", "yes",
         f"{shape['gram error']:.1e} σ; from reconstructed ones {shape['procrustes rmse']:.2f} σ",
         shape["gram error"] < 1e-3)]
    for key, name, sign in (("latent", "larger latent size", 1), ("lambda", "lower lambda", -1)):
        rows = swept(results["sweeps"], key)[::sign]
        values = [row["test error"] for row in rows]
        if len(rows) > 1:
            table.append((f"lower test MSE with {name} (after {epochs} epochs)", "yes", ", ".join(
                f"{row[key]:g}: {row['test error']:.4f}" for row in rows),
                all(a > b for a, b in zip(values, values[1:]))))
    for name, row in nets.items():
        share = row["error"] / row.get("rows", row["trivial"])
        text, holds = "fails (test error above half of the trivial)", share > 0.5
        if name == MAIN:
            text, holds = "works (test error below half of the trivial)", share < 0.5
        if "rows" in row:
            text, holds = "learns at most a gradient in y (error above 90 % of its)", share > 0.9
        table.append((f"{name} {text}", "-" if "unit" in name else "yes",
                      f"{row['error']:.4f}, {share:.0%} of it", holds))
    own, chance = codes["nearest is own"], 1 / len({row["gamma"] for row in results["fluid"]})
    if chance < 1:
        table.append((f"codes lie by gamma (nearest mean is their own; {chance:.0%} by chance)",
                      "yes", f"{own:.0%}", own - chance > (1 - chance) / 3))
    return table


def anomaly_claims(results, unseen):
    """Claims on anomalies, missing data and the latent space: (claim, document, here, holds)."""
    sets, table = {row["set"]: row for row in results["anomalies"]}, []
    random, gammas = sets["random"], [row["gamma"] for row in results["fluid"]]
    for name, g in (("unseen", unseen), ("fake", 0.5)):
        row = sets[name]
        near = sorted({max([f for f in gammas if f <= g], default=min(gammas)),
                       min([f for f in gammas if f >= g], default=max(gammas))})
        usual = sets[f"test, γ = {row['nearest gamma']:g}"]["rmse"]["mean"]
        beside = " or ".join(f"{f:g}" for f in near)
        table.append((f"{name} (γ = {g:g}): beside γ = {beside}, RMSE at most 1.5 times", "yes",
                      f"γ = {row['nearest gamma']:g}; "
                      f"{row['rmse']['mean']:.4f}, {usual:.4f}; area under ROC "
                      f"{row['AUROC RMSE']:.2f}",
                      row["nearest gamma"] in near and row["rmse"]["mean"] <= 1.5 * usual))
    table += [("random: separable by RMSE (area under ROC above 0.9)", "yes",
               f"{random['AUROC RMSE']:.3f}; RMSE + KL {random['AUROC RMSE + KL']:.3f}; from γ = "
               f"{random['nearest gamma']:g} {random['AUROC there']:.3f}",
               random["AUROC RMSE"] > 0.9),
              (f"random: codes spread more (than γ = {random['nearest gamma']:g}, by a tenth)",
               "yes", f"{random['spread']:.2f} times", random["spread"] > 1.1)]
    for name, change in results["change of the rest"].items():
        table += [(f"{name}: RMSE reflects it (area above 0.9)", "yes",
                   f"{sets[name]['AUROC RMSE']:.3f}; RMSE + KL {sets[name]['AUROC RMSE + KL']:.3f}",
                   sets[name]["AUROC RMSE"] > 0.9),
                  (f"{name}: the whole matrix shifts (untouched pairs half as much)", "yes",
                   f"{change:.2f} times the touched", change > 0.5)]
    hidden, texture, share = results["missing"], *(
        results["probe"][key] for key in ("texture", "share"))
    black, filled = ([row["size"] for row in hidden if row[f"{key} inside"] < row["mean inside"]]
                     for key in ("black", "filled"))
    return table + [
        ("blacked-out blocks come back better than the mean matrix (all sizes)", "tried",
         f"{len(black)} of {len(hidden)} sizes; filled with the mean first {len(filled)}",
         len(black) == len(hidden)),
        ("zero latent featureless (texture below a quarter of reconstructions')", "yes",
         f"{texture['zero']:.3f}, {texture['reconstructed']:.3f}; real {texture['real']:.3f}, mean "
         f"matrix {texture['mean']:.3f}", texture["zero"] < texture["reconstructed"] / 4),
        ("each dimension another pattern (|cosine| of five below 0.5)", "yes",
         f"at most {results['probe']['cosine']:.2f}", results["probe"]["cosine"] < 0.5),
        ("draws along five dimensions are no configurations (two eigenvalues' share)", "yes",
         f"{share['drawn']:.3f}; along all {share['drawn along all']:.3f}, reconstructions "
         f"{share['reconstructed']:.3f}", share["drawn"] < share["reconstructed"] - 0.02)]


def fluid_claims(results, faithful):
    """Have the sets settled, and is the sampler the authors' (for their settings alone)?"""
    table, rows = [], results["fluid"]
    for row, end in zip(rows, results["long"]):
        drift, error = row["energy"] - end["settled"], math.hypot(row["error"], end["error"])
        miss = row["contact"] - row["N gamma"]
        table.append((
            f"γ = {row['gamma']:g}: settled after {row['sweeps']:,} sweeps (drift and contact "
            "theorem within 3 standard errors)", "assumed",
            f"U {row['energy']:.2f} ± {row['error']:.2f}, after {end['sweeps']:,} "
            f"{end['settled']:.2f}; contact {row['contact']:.2f} ± {row['contact error']:.2f} of "
            f"{row['N gamma']:g}", abs(drift) < 3 * error and abs(miss) < 3 * row["contact error"]))
    known = [(row, RERUN[row["gamma"]]) for row in rows if row["gamma"] in RERUN and faithful]
    for k, key in enumerate(("acceptance", "height / L") if known else ()):
        table.append((f"{key} as of the authors' sampler (within 0.01)",
                      ", ".join(f"{theirs[k]:.3f}" for _, theirs in known),
                      ", ".join(f"{row[key]:.3f}" for row, _ in known),
                      all(abs(row[key] - theirs[k]) < 0.01 for row, theirs in known)))
    return table


def print_tables(results):
    """Everything measured, before the closing table."""
    def cell(value):
        if isinstance(value, dict):
            return common.show(value)
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else value
    tables = {"the fluid": results["fluid"], "the long run": results["long"],
              "representations": results["representations"], "anomalies": results["anomalies"],
              "missing data": results["missing"], "heights": results["geometry"]["heights"]}
    for name, rows in tables.items():
        keys = list(dict.fromkeys(key for row in rows for key in row))
        print(f"\n{name}")
        common.print_table(keys, [[cell(row.get(key)) for key in keys] for row in rows])


def study_fluid(run, args, sets):
    """The sampler's figures, and its records along the way for metrics.csv."""
    names = [f"fluid-{g:g}" for g in args.gammas]
    results = {"fluid": [row for name in names for row in fluid_rows(sets[name])],
               "long": fluid_rows(sets["long"])}
    run.figure(plot_equilibrium([sets[name] for name in names], sets["long"], results["fluid"]),
               "equilibrium", "Has the fluid settled? (right: density profiles)")
    return results, [
        {"set": name, "gamma": g, "sweep": sweep} | {key: sets[name][key][i, k].item() for key in (
            "energy", "error", "acceptance", "height")}
        for name in (*names, "long")
        for k, g in enumerate(sets[name]["parameters"]["gamma"])
        for i, sweep in enumerate(sets[name]["sweep"].tolist())]


def study_vae(run, args, sets, trained, history, xy, test, gammas):
    """The nets' figures and pictures; xy, test (C, N, 2) in units of L sqrt 2, gammas of test."""
    (nets, model), L, device = trained[MAIN], args.box, args.device
    results = {"training": [row for row in history if row["model"] == MAIN],
               "sweeps": [row for row in history if row["epoch"] == args.other_epochs
                          and row["model"] in trained.keys() - MODELS.keys() | {MAIN}]}
    results["representations"], outputs = zip(*(
        representation_row(name, *trained[name], xy, test[:2000], L) for name in MODELS))
    run.figure(plot_representations(results["representations"], outputs, test[0].cpu(), L),
               "representations", "Representations and nets: one configuration of the test set")
    d = distance_matrix(test)
    mean = sum(distance_matrix(part).sum(0) for part in xy.split(2000)) / len(xy)
    normal = evaluate(nets, model, d)
    results["codes"] = code_figures(normal["mu"], gammas)
    run.figure(plot_latent(normal["mu"], gammas, results["training"], results["sweeps"]), "latent",
               "Codes of the test set; training; latent size and λ")
    x_hat = normal["x_hat"].cpu()
    results["geometry"], shapes = geometry(x_hat, test.cpu(), gammas, L)
    run.figure(plot_matrices(d.cpu(), x_hat, shapes, gammas, L), "matrices",
               "Distance matrices and the points they hold")
    run.figure(plot_energies(shapes, gammas), "energies",
               f"Energies: Jensen–Shannon distance {results['geometry']['js']:.3f}")

    points = {name: sets[name]["xy"].to(device) / (L * math.sqrt(2)) for name in sets
              if name in ("unseen", "fake", "random") or name.startswith("corrupted")}
    anomalies = {name: distance_matrix(x if name.startswith("corrupted") else by_origin(x))
                 for name, x in points.items()}
    results["anomalies"], found = anomaly_rows(nets, model, normal, gammas, anomalies)
    run.figure(plot_anomalies(found, gammas), "anomalies", "Anomaly detection against the test set")
    results["change of the rest"] = {name: change_of_rest(
        normal["x_hat"], found[name]["x_hat"], sets[name]["moved"].to(device))
        for name in sets if "moved" in sets[name]}
    hidden = {size: sets[f"blacked-out-{size}"] for size in SIZES if size < args.particles}
    results["missing"], sheet = missing_rows(nets, model, d[:500], mean, hidden)
    run.figure(plot_missing(results["missing"], sheet), "missing", "Missing data")
    g = common.generator(args.seed, "probe", device)
    results["probe"], sheet = probe(nets, normal, d, mean, g)
    run.figure(plot_probe(sheet, results["probe"]["top"]), "probe",
               "Latent space probing: the origin, the five dimensions of largest KL, draws")
    return results


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    label = f"N = {args.particles}, L = {args.box:g}, T = {args.temperature:g}"
    with common.Run(__file__, args, label, additive=("latents", "lambdas")) as run:
        sets = sampled_sets(run, args)
        xy = torch.cat([sets[f"fluid-{g:g}"]["xy"] for g in args.gammas])
        gammas = torch.tensor(args.gammas, dtype=torch.double)
        order = torch.randperm(len(xy), generator=common.generator(args.seed, "split"))
        xy, n = by_origin(xy[order] / (args.box * math.sqrt(2))), len(xy) * 4 // 5
        sets |= derived_sets(run, args, xy[n:])
        gammas = gammas.repeat_interleave(args.configurations)[order][n:]
        xy, test = xy[:n].to(args.device), xy[n:].to(args.device)
        trained, history = train_all(run, args, xy, test)
        results, records = study_fluid(run, args, sets)
        results |= study_vae(run, args, sets, trained, history, xy, test, gammas)
        print_tables(results)
        faithful = (args.particles, args.box, args.temperature, args.sweeps) == (30, 10, 0.75, 2500)
        table = (net_claims(results, args.other_epochs) + anomaly_claims(results, args.unseen)
                 + fluid_claims(results, faithful))
        return run.finish(results, table, history + records)


if __name__ == "__main__":
    main()
