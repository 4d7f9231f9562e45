"""A two-dimensional Lennard-Jones fluid under gravity, and a VAE on its distance matrices.

Reproduces Bacilieri, Barbiero, Bordin, Pitteri, "Variational Auto Encoders" (LCP-B exam, 2023). N
particles in a box of side L, in units of sigma and epsilon, have the energy

    U = sum_{i<j} 4 (r_ij^-12 - r_ij^-6) + gamma sum_i y_i

and are sampled by Metropolis moves, in all systems at once. A VAE learns the matrices of distances
r_ij / (L sqrt 2) of their last configurations, four gammas together, by minimising

    mean over entries (x - x_hat)^2 + lambda mean over latent dimensions KL(q(z|x) || N(0, 1))

and is asked for energies, coordinates, anomalies, missing data and the meaning of its dimensions.

    python vae_lj_fluid.py                           everything: about 14 minutes on 2 CPU cores
    python vae_lj_fluid.py --lambdas 0.000035 0.035  two other weights of the KL, in the same folder
    python vae_lj_fluid.py --sweeps 10000 --out out/settled    a fluid nearer to equilibrium

A run leaves figures, results.json, metrics.csv, nets and sets of data (units/*.pt) in
out/vae_lj_fluid-<preset>; it has not been timed on a GPU. Sampler and main VAE have the settings of
the authors' code, which is also where the document's MSE, KL and Jensen-Shannon distance are from.
Quick: half of the configurations, a quarter of the main VAE's steps. We chose:
* Below r^2 = 0.001 the energy is constant, so that random starts are finite.
* Of the other nets: the widths of dense ones, the grid and its schedule, 256 numbers to points.
* Test errors are those of the mean code; while training goes on, and in the sweeps, of a drawn one.
* "fails": test error above half of that of the trivial predictor, the mean of the training set (a
  grid's: above 90 % of it). "unit": with lambda of the slides' likelihood N(mu(z), 1), which is
  2 D / entries (grid: D / entries; all for N = 30). All nets but the main one train --other-epochs
  only, dense ones ten times as many.
"""
import math
import pathlib
import sys
from typing import NamedTuple

sys.path.append(str(pathlib.Path(__file__).with_name(".first")))  # until its second edition
import first_edition as common  # noqa: E402
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# C configurations or chains, N particles, B batch, D latent dimensions, G gammas, K records
PRESETS = {
    "smoke": dict(configurations=50, anomalies=40, sweeps=40, long_sweeps=80, chains=10, epochs=2,
                  other_epochs=1, latents=[5], lambdas=[0.0035], compile=False),
    "quick": dict(configurations=5000, anomalies=2000, sweeps=2500, long_sweeps=25_000, chains=400,
                  epochs=5, other_epochs=2, latents=[5], lambdas=[0.0035], compile=True),
    "paper": dict(configurations=10_000, anomalies=2000, sweeps=2500, long_sweeps=25_000,
                  chains=1000, epochs=10, other_epochs=3, latents=[5, 20, 80],
                  lambdas=[0.000035, 0.0035], compile=True)}
STEP, CUTOFF, CORE = 0.2, 3.0, 1e-3  # largest move per coordinate; where 6-12 ends; least r^2
CHUNK = 5000  # chains at a time on a CPU, so that they stay in its cache
SIZES, CELLS = (3, 6, 9, 12, 15), 20  # of blacked-out blocks; of the grid per side, 0.5 sigma each
LATENT, LAMBDA, BATCH, RATE = 40, 0.00035, 128, 1e-3  # the authors' settings; RATE: Adam's
DOCUMENT = {"mse": 0.0013, "kl": 2.110, "axes": (0.08, 0.15), "js": 0.185}  # notebook; axes: slide
RERUN = {0.1: 0.704, 0.4: 0.662, 0.7: 0.606, 1.0: 0.557}  # acceptances of the authors' sampler
UNSEEN, FAKE = 3.0, 0.5  # gammas of two sets that are not trained on
BLUE, RED = common.COLOURS[0], common.COLOURS[3]


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
    output: str = "distances"
    latent: int = LATENT       # D
    lam: float = LAMBDA        # lambda, of the KL; 0: no variational part


MAIN = "distances, conv"
MODELS = {  # unit: lambda of the slides' own likelihood, of variance 1: 2 D / entries
    MAIN: Model(),
    "coordinates, dense": Model("coordinates", "dense", "coordinates"),
    "coordinates, dense, unit": Model("coordinates", "dense", "coordinates", lam=4 / 3),  # 80 / 60
    "distances, dense": Model(net="dense"),
    "distances, dense, unit": Model(net="dense", lam=4 / 45),  # 80 / 900
    "grid, conv": Model("grid", output="grid"),
    "grid, conv, unit": Model("grid", output="grid", lam=0.1),  # grid: D / entries = 40 / 400
    "matrix to points, dense": Model("distances", "dense", "coordinates", 256, 0.0),
    "matrix to points, conv": Model("distances", "conv", "coordinates", 256, 0.0)}


# --- data ----------------------------------------------------------------------------------------

def lennard_jones(r2):
    """4 (r^-12 - r^-6) of squared distances up to the cut-off, 0 beyond."""
    s = 1 / r2.clamp(min=CORE)  # finite at r = 0 too: `move` multiplies that by 0
    s = s * s * s  # r^-6
    return torch.where(r2 <= CUTOFF ** 2, 4 * (s * s - s), 0.0)  # not shifted: jumps by 0.0055 at 3


def fake(r2):
    """4 (r^-4 - r^-2), the document's other potential; without cut-off."""
    s = 1 / r2.clamp(min=CORE)  # r^-2
    return 4 * (s * s - s)  # slide "Different potential"


POTENTIALS = {"lennard-jones": lennard_jones, "fake": fake}


def propose(xy, u, gamma, temperature, box):
    """Trial positions of a whole sweep (2, N, C), and what each pair energy may rise by (N, C): a
    move with the energy change dU is accepted if u < exp(-dU / T), that is dU < -T log u.

    xy (2, N, C), u (3, N, C) uniform, gamma () or (C,). A coordinate outside (0, L) stays.
    """
    new = xy + STEP * (2 * u[:2] - 1)  # uniform in a square
    new = torch.where((new > 0) & (new < box), new, xy)  # walls, no periodic images
    return new, -temperature * torch.log(u[2]) - gamma * (new[1] - xy[1])  # u = 0: inf, accepted


def move(xy, old, new, others, limit, pair):
    """Where a particle of every chain xy (2, N, C) is after its trial move from old to new (2, C);
    others (N, 1): 0 for the particle itself, limit (C,) of propose."""
    before = ((xy - old[:, None]) ** 2).sum(0)  # (N, C), squared distances
    after = ((xy - new[:, None]) ** 2).sum(0)
    change = ((pair(after) - pair(before)) * others).sum(0)  # (C,), gravity is in limit
    return torch.where(change < limit, new, old)  # (2, C), x and y together


def energy(xy, gamma, pair):
    """U of configurations xy (2, N, C) -> (C,)"""
    rest = (xy[:, i:i + 1] - xy[:, i + 1:] for i in range(xy.shape[1] - 1))  # (2, N-1-i, C)
    return sum(pair((r ** 2).sum(0)).sum(0) for r in rest) + gamma * xy[1].sum(0)  # every pair once


def metropolis(fluid, name, device="cpu", compile=False, checkpoint=None):
    """Sample a Fluid: {"xy": last configurations (C, N, 2), and along the way, by gamma (K, G):
    "sweep" (K,), "energy" and its standard error "error", "acceptance" (of that sweep), "height"}.

    Particles move in order, from uniform random points, at once in all chains of a chunk.
    """
    N, L, T, G = fluid.particles, fluid.box, fluid.temperature, len(fluid.gamma)
    pair, K = POTENTIALS[fluid.potential], min(50, fluid.sweeps)
    shots = torch.linspace(0, fluid.sweeps, K + 1, dtype=torch.double).round().long()[1:].tolist()
    trial, step = (common.compiled(f, compile, dynamic=False) for f in (propose, move))
    others = (1 - torch.eye(N, device=device)[..., None]).unbind(0)  # (N, 1) each
    gammas = torch.tensor(fluid.gamma, device=device).repeat_interleave(fluid.count // G)
    chunk = CHUNK if device == "cpu" and G == 1 else fluid.count  # each must hold all gammas
    done, sweep, moves, g = [], 0, 0, torch.Generator(device)  # done: (xy, records) of chunks
    if checkpoint and checkpoint.state:
        done, sweep, xy, records = checkpoint.restore(g)
        moves = N * (len(done) * chunk * fluid.sweeps + sweep * xy.shape[2])
    bar = tqdm(total=fluid.count * fluid.sweeps * N, desc=name, unit=" moves", unit_scale=True,
               initial=moves, disable=None)
    for gamma in gammas.split(chunk)[len(done):]:  # (C,), of the chunks not yet done
        C = len(gamma)
        if sweep == 0:  # else a checkpoint has given xy, records and g
            g = common.generator(fluid.seed, f"{name} {len(done) * chunk}", device)
            xy, records = L * torch.rand(2, N, C, generator=g, device=device), []
        for sweep in range(sweep + 1, fluid.sweeps + 1):  # from 1, or on from the checkpoint
            new, limit = trial(xy, torch.rand(3, N, C, generator=g, device=device), gamma, T, L)
            for particle in zip(xy.unbind(1), new.unbind(1), others, limit.unbind(0)):
                particle[0].copy_(step(xy, *particle, pair))  # the next one sees it moved
            bar.update(N * C)
            if sweep in shots:
                U, accepted = energy(xy, gamma, pair), (xy == new).all(0).float().mean(0)  # (C,)
                records.append(torch.stack([U, U ** 2, accepted, xy[1].mean(0)]).cpu().double()
                               .view(4, G, -1).sum(2).tolist())  # sums of chains, (4, G)
            if checkpoint and checkpoint.due():
                checkpoint.save((done, sweep, xy, records), g)
        done.append((xy.permute(2, 1, 0).cpu(), torch.tensor(records, dtype=torch.double)))
        sweep = 0  # the next chunk starts from random points again
    bar.close()
    U, square, accepted, height = (sum(part[1] for part in done) * G / fluid.count).unbind(1)
    error = ((square - U ** 2).clamp(min=0) / max(1, fluid.count // G - 1)).sqrt()  # (K, G)
    return {"xy": torch.cat([part[0] for part in done]), "sweep": torch.tensor(shots), "energy": U,
            "error": error, "acceptance": accepted, "height": height}


def by_origin(xy):
    """Particles sorted by their distance from the origin. (C, N, 2) -> (C, N, 2)"""
    return xy.gather(1, (xy ** 2).sum(-1).argsort(1)[..., None].expand_as(xy))  # index (C, N, 2)


def distance_matrix(xy):
    """(C, N, 2) -> (C, 1, N, N)"""
    return (xy[:, :, None] - xy[:, None]).norm(dim=-1)[:, None]  # (C, N, N, 2) first; cdist rounds


def occupancy(xy):
    """1 in cells with a particle, first row: the floor. (C, N, 2) / (L sqrt 2) -> (C, 1, M, M)"""
    cell = (xy * (CELLS * math.sqrt(2))).long().clamp(0, CELLS - 1)  # (C, N, 2); may round to CELLS
    image = torch.zeros(len(xy), CELLS ** 2, device=xy.device)
    return image.scatter_(1, CELLS * cell[..., 1] + cell[..., 0], 1.0).view(-1, 1, CELLS, CELLS)


REPRESENT = {"coordinates": nn.Flatten(), "distances": distance_matrix, "grid": occupancy}


def corrupt(xy, reading, box, generator, moved=4):
    """Move `moved` particles of each configuration (C, N, 2), in units of L sqrt 2, by up to 0.2:
    per coordinate as the authors' "code" does, or in a random direction as their "slide" says.
    "xy" in sigma, in the same order, also outside of the box, and which were "moved" (C, N)."""
    u = torch.rand(xy.shape, generator=generator, device=xy.device)  # (C, N, 2)
    length, angle = 0.2 * u[..., :1], 2 * math.pi * u[..., 1:]  # (C, N, 1) each
    slide = length * torch.cat([angle.cos(), angle.sin()], -1)
    step = {"code": 0.4 * u - 0.2, "slide": slide}[reading]  # 0.2 L sqrt 2 is 2.8 sigma at L = 10
    order = torch.rand(xy.shape[:2], generator=generator, device=xy.device).argsort(1)  # shuffled
    chosen = order < moved  # (C, N); a row of order is a permutation: exactly `moved` are True
    return {"xy": (xy + chosen[..., None] * step) * box * math.sqrt(2), "moved": chosen}


def black_out(d, size, generator):
    """Hide a block of size x size entries and its mirror image: matrices "d" (C, 1, N, N) are 0,
    black, "where" (C, 1, N, N) is True."""
    C, _, N, _ = d.shape
    corner = torch.randint(N - size + 1, (C, 2, 1), generator=generator, device=d.device)
    at = torch.arange(N, device=d.device)
    inside = (at >= corner) & (at < corner + size)  # (C, 2, N), rows and columns
    where = (inside[:, 0, :, None] & inside[:, 1, None])[:, None]  # (C, 1, N, N)
    where = where | where.mT  # or the mirror image would tell what is hidden
    return {"d": d.masked_fill(where, 0.0), "where": where}


# --- model ---------------------------------------------------------------------------------------

def build(model, particles, generator):
    """Encoder (B, ...) -> (B, 2 D), means and log variances, and decoder (B, D) -> (B, ...)."""
    shapes = {"coordinates": (2 * particles,), "distances": (1, particles, particles),
              "grid": (1, CELLS, CELLS)}
    shape, goal, D, relu = shapes[model.input], shapes[model.output], model.latent, nn.ReLU(True)
    maps, last = (50, *shape[1:]), [] if model.input == "grid" else [nn.Sigmoid()]  # grid: logits

    def conv(a, b):
        return nn.Conv2d(a, b, 3, padding=1)  # "same": rows and columns stay
    if model.net == "conv":
        encoder = [conv(1, 60), relu, conv(60, 50), relu, nn.Flatten(),
                   nn.Linear(math.prod(maps), 2 * D)]  # the two heads, mu and logvar
        # with stride 1 the authors' transposed convolution is a convolution, and slower
        decoder = [nn.Linear(D, math.prod(maps)), relu, nn.Unflatten(1, maps),  # (B, 50, N, N)
                   conv(50, 50), relu, conv(50, 60), relu, conv(60, 1), *last]  # (B, 1, N, N)
    else:
        encoder = [nn.Flatten(), nn.Linear(math.prod(shape), 512), relu, nn.Linear(512, 256), relu,
                   nn.Linear(256, 2 * D)]
    if model.net == "dense" or model.output != model.input:
        decoder = [nn.Linear(D, 256), relu, nn.Linear(256, 512), relu,
                   nn.Linear(512, math.prod(goal)), *last, nn.Unflatten(1, goal)]  # (B, *goal)
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
    return 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar)  # (B, D); slide "Sampling in latent space"


def objective(nets, model, x, target, progress, generator):
    """What is minimised, and its terms (2,): error and KL in nats, means over all they run over.

    The error is squared, for a grid the binary cross-entropy in nats. There, as training progresses
    (0 to 1), the weight of live cells falls from that of empty ones together to 1, and that of the
    KL rises to lambda. Without lambda no noise is added to the code.
    """
    mu, logvar = nets["encoder"](x).chunk(2, 1)  # (B, D) each
    noise = torch.randn(mu.shape, generator=generator, device=mu.device) if model.lam else 0.0
    x_hat = nets["decoder"](mu + noise * (logvar / 2).exp())  # z from q(z|x), sigma = e^(logvar/2)
    kl, lam = kl_divergence(mu, logvar).mean(), model.lam  # mean over B and D; a sum on the slide
    if model.input == "grid":
        live = (1 / x.mean() - 1) ** (1 - progress)  # empty cells per live one, falling to 1
        error, lam = F.binary_cross_entropy_with_logits(x_hat, x, pos_weight=live), progress * lam
    else:
        error = ((x_hat - target) ** 2).mean()  # over B and entries; slide "Sampling and stuff"
    return error + lam * kl, torch.stack([error, kl]).detach()  # slide "Wrapping up"


# --- train ---------------------------------------------------------------------------------------

def train(name, nets, model, xy, test, epochs, generator, checkpoint=None):
    """Adam on configurations xy (C, N, 2); returns a row of figures per epoch, those of `test` too.

    FloatingPointError where a loss is not finite.
    """
    n, source, goal = math.ceil(len(xy) / BATCH), REPRESENT[model.input], REPRESENT[model.output]
    optimiser = torch.optim.Adam(nets.parameters(), RATE, fused=True)
    parts, rows, first = [nets, optimiser, generator], [], 0
    log = torch.zeros(n, 2, device=generator.device)  # error and KL of this epoch's steps
    if checkpoint and checkpoint.state:
        first, rows, log, order = checkpoint.restore(*parts)
    bar = tqdm(range(first, epochs * n), name, epochs * n, initial=first, disable=None)
    for step in bar:
        k, last = step % n, (step + 1) % n == 0
        if k == 0:
            order = common.batches(len(xy), BATCH, generator)  # indices, n batches
        batch = xy[order[k]]  # (B, N, 2)
        loss, log[k] = objective(nets, model, source(batch), goal(batch), step / (epochs * n),
                                 generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        due = checkpoint and checkpoint.due()
        if (last or due) and not log[:k + 1].isfinite().all():  # rarely: a GPU must wait for it
            at, term = (~log[:k + 1].isfinite()).nonzero()[0].tolist()
            raise FloatingPointError(f"{name}: the term {('error', 'KL')[term]} is not finite at "
                                     f"step {step - k + at}")
        if last:
            error, kl = log.mean(0).tolist()
            out = evaluate(nets, model, source(test), goal(test), noise=True)  # as in training
            rows.append({"model": name, "epoch": (step + 1) // n, "error": error, "kl": kl,
                         "test error": out["error"].mean().item(),
                         "test kl": out["kl"].mean().item()})
            bar.set_postfix_str(f"error {error:.4f}, KL {kl:.3f}", refresh=False)
        if due:
            checkpoint.save((step + 1, rows, log, order), *parts)
    return rows


# --- evaluate ------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(nets, model, x, target=None, noise=False):
    """Of each x (C, ...): "x_hat" like target (default x), "error" (C,), a mean over entries, "mu"
    and "kl" (C, D); of the decoded mean code or, with noise, of one draw."""
    g, found = common.generator(0, "evaluate", x.device), []
    loss = F.binary_cross_entropy_with_logits if model.input == "grid" else F.mse_loss
    for part, goal in zip(x.split(250), (x if target is None else target).split(250)):
        mu, logvar = nets["encoder"](part).chunk(2, 1)  # (B, D) each
        draw = torch.randn(mu.shape, generator=g, device=x.device) * (logvar / 2).exp()
        x_hat = nets["decoder"](mu + draw if noise and model.lam else mu)
        error = loss(x_hat, goal, reduction="none").flatten(1).mean(1)  # (B,)
        found.append((x_hat, error, mu, kl_divergence(mu, logvar)))
    return dict(zip(("x_hat", "error", "mu", "kl"), map(torch.cat, zip(*found))))


def contact_density(xy, box, width=0.4, bins=20, degree=3):
    """Particles per length at the wall y = 0 minus at y = L, a value per configuration (C,): that
    of a polynomial fitted to the histogram up to `width` from the wall, a weighted count."""
    edge = torch.linspace(0, width, bins + 1, dtype=torch.double)
    powers = torch.arange(1, degree + 2)  # y^k integrates to y^(k+1) / (k+1)
    area = (edge[1:, None] ** powers - edge[:-1, None] ** powers) / powers  # of y^k in each bin
    weight = F.pad(torch.linalg.pinv(area)[0], (0, 1))  # (bins + 1,): fitted density at y = 0
    low, high = (weight[(y / width * bins).long().clamp(max=bins)].sum(1)  # (C,) each
                 for y in (xy[..., 1], box - xy[..., 1]))
    return low - high


def fluid_rows(found):
    """Figures of a sampled set after its last sweep, by gamma, and the contact theorem: acceptance
    is a mean over the recorded sweeps, settled the mean energy over those of the second half, its
    standard error as if they were independent (500 sweeps apart: up to 1.5 times too small)."""
    fluid, rows, half = found["parameters"], [], found["energy"][len(found["energy"]) // 2:]
    spread = half.std(0, correction=min(1, len(half) - 1)) / len(half) ** 0.5  # (G,)
    for k, xy in enumerate(found["xy"].double().chunk(len(fluid["gamma"]))):
        T, L, g = fluid["temperature"], fluid["box"], fluid["gamma"][k]
        near = min(0.4, 1.6 * L * T / max(fluid["particles"] * g, 1e-9))  # steep walls: fit less
        contact = T * contact_density(xy, L, near)
        U, acceptance, height = (found[key][:, k] for key in ("energy", "acceptance", "height"))
        rows.append({  # contact theorem, in equilibrium: T [rho(0) - rho(L)] = N gamma
            "gamma": g, "sweeps": int(found["sweep"][-1]), "energy": U[-1].item(),
            "error": found["error"][-1, k].item(), "settled": half[:, k].mean().item(),
            "settled error": spread[k].item(), "acceptance": acceptance.mean().item(),
            "height / L": height[-1].item() / L,
            "N gamma": fluid["particles"] * g, "contact": contact.mean().item(),
            "contact error": contact.std().item() / len(contact) ** 0.5})
    return rows


def representation_row(name, nets, model, xy, test):
    """Test error of one net, and of the trivial predictor: the mean of the training set xy."""
    goal = REPRESENT[model.output]
    target = goal(test)
    mean = torch.stack([goal(part).sum(0) for part in xy.split(2000)]).sum(0) / len(xy)
    out = evaluate(nets, model, REPRESENT[model.input](test), target)
    loss = F.binary_cross_entropy if model.input == "grid" else F.mse_loss
    trivial = loss(mean.clamp(1e-6, 1).expand_as(target), target)  # empty cells have no logarithm
    return {"model": name, "latent": model.latent, "error": out["error"].mean().item(),
            "trivial": trivial.item(), "kl": out["kl"].mean().item() if model.lam else None}


def gram_coordinates(d):
    """Points (C, N, 2) of distances d (C, N, N), and the share of the two leading eigenvalues (C,):
    1 if d are distances in a plane; then the points are exact up to a rigid motion."""
    square = d.double() ** 2  # (C, N, N); slide "Gram matrices"
    gram = (square[:, :, :1] + square[:, :1] - square) / 2  # g_ij = x_i . x_j, x_1 in the origin
    values, vectors = torch.linalg.eigh(gram)  # ascending, (C, N); (C, N, N)
    points = vectors[..., -2:] * values[:, None, -2:].clamp(min=0).sqrt()  # X = U sqrt S
    return points, values[:, -2:].sum(1) / values.abs().sum(1)  # of d_hat some are < 0


def procrustes(points, goal):
    """Points (C, N, 2) shifted, turned and, if that is nearer, mirrored onto goal (C, N, 2)."""
    a, centre = points - points.mean(1, keepdim=True), goal.mean(1, keepdim=True)
    U, _, Vh = torch.linalg.svd(a.mT @ (goal - centre))  # (C, 2, 2)
    return a @ U @ Vh + centre  # U Vh turns, and mirrors where its determinant is -1


def turbo_tumbler(points, box):
    """Let the convex hull of the points (C, N, 2) sit on its side nearest to the centre of mass:
    the side on y = 0, the points' extent centred in the box. Two points are a side if no other lies
    beyond the line through them; all pairs P are tried."""
    (i, j), found = torch.triu_indices(points.shape[1], points.shape[1], 1), []  # (P,) each
    for part in points.double().split(200):
        side, row = part[:, j] - part[:, i], torch.arange(len(part), device=part.device)
        along = F.normalize(side, dim=-1)  # (C, P, 2)
        up = torch.stack([-along[..., 1], along[..., 0]], -1)  # (C, P, 2), turned by 90 degrees
        height = up @ part.mT - (up * part[:, i]).sum(-1, keepdim=True)  # (C, P, N)
        sign = torch.where(height.sum(-1, keepdim=True) < 0, -1.0, 1.0)  # (C, P, 1)
        height, tiny = height * sign, 1e-9 * (part.amax(1) - part.amin(1)).amax(1)[:, None]
        beyond = (height.amin(-1) < -tiny) | (side.norm(dim=-1) <= tiny)  # (C, P); or a point twice
        best = height.mean(-1).masked_fill(beyond, math.inf).argmin(1)  # (C,), from centre of mass
        x = (part @ along[row, best, :, None])[..., 0] * sign[row, best]  # turned, not mirrored
        x = x + box / 2 - (x.amax(1) + x.amin(1))[:, None] / 2  # (C, N)
        found.append(torch.stack([x, height[row, best].clamp(min=0)], -1))  # (C, N, 2)
    return torch.cat(found)


def jensen_shannon(a, b, bins=50):
    """Jensen-Shannon distance, 0 to sqrt(log 2) = 0.833, of two samples' histograms in common bins
    from the least to the largest value."""
    low, high = min(a.min(), b.min()).item(), max(a.max(), b.max()).item()
    p, q = (torch.histc(x.float().cpu(), bins, low, high).double() for x in (a, b))
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2  # 0 where both are empty: p / m is NaN
    divergence = (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).nan_to_num(0.0).sum() / 2
    return divergence.clamp(min=0).sqrt().item()  # the root, as SciPy's jensenshannon


def geometry(d_hat, test, gammas, box):
    """What reconstructed matrices d_hat (C, 1, N, N) say of the true points test (C, N, 2), both in
    units of L sqrt 2: figures; true, fitted and tumbled points; energies of true and tumbled."""
    def pair(r2):  # slide "Energy distribution": without the pairs below r = 1
        return torch.where(r2 >= 1, lennard_jones(r2), 0.0)
    scale = box * math.sqrt(2)
    d = (d_hat + d_hat.mT) / 2 * (1 - torch.eye(d_hat.shape[-1]))  # as distances are
    xy, d = scale * test.double(), scale * d[:, 0].double()  # sigma: (C, N, 2), (C, N, N)
    exact, _ = gram_coordinates(distance_matrix(xy)[:, 0])  # of the true distances
    points, share = gram_coordinates(d)
    fitted, tumbled = procrustes(points, xy), turbo_tumbler(points, box)
    U, U_hat = (energy(x.permute(2, 1, 0), gammas, pair) for x in (xy, tumbled))  # (C,)
    return {"js": jensen_shannon(U, U_hat), "share": share.mean().item(),
            "gram error": (procrustes(exact, xy) - xy).norm(dim=-1).max().item(),
            "procrustes rmse": (fitted - xy).square().sum(-1).mean().sqrt().item()
            }, (xy, fitted, tumbled), (U, U_hat)


def principal_axes(mu):
    """Mean (D,), two leading axes (D, 2) and their shares of the variance (2,), of mu (C, D)."""
    values, vectors = torch.linalg.eigh(torch.cov(mu.T.cpu().double()))  # (D, D), ascending
    return mu.mean(0), vectors.flip(1)[:, :2].to(mu), values.flip(0)[:2] / values.sum()


def roc(normal, anomalous):
    """False and true positive rates over all thresholds, from high to low, and the area under their
    curve: how often an anomalous score is above a normal one, equal ones counting half."""
    a, b = normal.cpu().sort().values, anomalous.cpu().sort().values
    at = torch.cat([a, b]).unique().flip(0)  # each score a threshold, highest first
    false, true = (torch.cat([torch.zeros(1), 1 - torch.searchsorted(x, at).double() / len(x)])
                   for x in (a, b))  # share at or above the threshold
    return false, true, torch.trapezoid(true, false).item()


def mean_codes(mu, gammas):
    """The mean (G, D) of the codes mu (C, D) of each gamma."""
    return torch.stack([mu[gammas == g].mean(0) for g in gammas.unique()])


def anomaly_rows(nets, model, gammas, sets, mean):
    """Errors and detection of each set of matrices {name: (C, 1, N, N)}, of which the first is the
    test set, whose configurations have the gammas (C,): rows, {name: evaluation}.
    AUROC: against the test set, by RMSE, by RMSE + KL, each standardised by the test set's mean and
    spread, and by the RMSE of the training set's mean matrix, which knows nothing; there: by RMSE,
    against the gamma whose mean code is nearest to that of the set.
    """
    found, rows = {name: evaluate(nets, model, x) for name, x in sets.items()}, []
    normal = next(iter(found.values()))
    base, nats = normal["error"].sqrt(), normal["kl"].sum(1)  # (C,), nats sum over D
    means = mean_codes(normal["mu"], gammas)
    trivial = [((x - mean) ** 2).flatten(1).mean(1).sqrt() for x in sets.values()]  # (C,) each
    for (name, out), plain in zip(found.items(), trivial):
        rmse, kl = out["error"].sqrt(), out["kl"].sum(1)
        out["scores"] = rmse, (rmse - base.mean()) / base.std() + (kl - nats.mean()) / nats.std()
        out["roc"] = [roc(a, b) for a, b in zip(normal["scores"], out["scores"])]
        near = gammas.unique()[(means - out["mu"].mean(0)).norm(dim=1).argmin().cpu()]
        there = base[gammas == near]
        rows.append({
            "set": name, "rmse": common.mean_std(rmse), "kl": out["kl"].mean().item(),
            "nearest gamma": near.item(), "rmse there": there.mean().item(),
            "rmse of mean": plain.mean().item(), "AUROC there": roc(there, rmse)[2],
            "AUROC RMSE": out["roc"][0][2], "AUROC RMSE + KL": out["roc"][1][2],
            "AUROC of mean": roc(trivial[0], plain)[2]})
    return rows, found


def change_of_rest(before, after, moved):
    """Root mean square change of reconstructions (C, 1, N, N) where neither particle was moved
    (C, N), by that where one was."""
    change = ((after - before[:len(after)])[:, 0] ** 2).cpu()  # (C, N, N)
    touched = (moved[:, :, None] | moved[:, None]).cpu()
    pairs = ~torch.eye(moved.shape[1], dtype=torch.bool)  # a particle is none with itself
    return (change[~touched & pairs].mean() / change[touched & pairs].mean()).sqrt().item()


def missing_rows(nets, model, d, mean, hidden):
    """RMSE inside and outside of blocks of d (C, 1, N, N) that are black in {size: set}: of the
    mean matrix of the training set, of reconstructions of the black matrix, and of the black one
    filled with the mean."""
    rows = []
    for size, found in hidden.items():
        black, where = found["d"].to(d.device), found["where"].to(d.device)
        restored, filled = (evaluate(nets, model, x)["x_hat"]
                            for x in (black, torch.where(where, mean, d)))  # mean (1, N, N)
        rows.append({"size": size} | {
            f"{key} {place}": (x - d)[at].square().mean().sqrt().item()
            for key, x in (("mean", mean), ("black", restored), ("filled", filled))
            for place, at in (("inside", where), ("outside", ~where))})
    return rows


def texture(d):
    """Root mean square step between neighbouring entries of d (C, 1, N, N) above the diagonal;
    small where it has no features."""
    steps = (d[..., 1:] - d[..., :-1])[..., torch.ones_like(d[0, 0, :, 1:]).triu(1) > 0]
    return steps.square().mean().sqrt().item()


@torch.no_grad()
def probe(decoder, kl, generator, count=5):
    """Matrices (count + 1, 7, N, N) decoded along each of the `count` dimensions with the largest
    kl (D,), from -3 to 3, z = 0 in the middle, and from draws in these alone; the dimensions."""
    top = kl.topk(count).indices  # (count,); slide "Latent space probing"
    z = torch.zeros(count + 1, 7, len(kl), device=kl.device)  # last row: the draws
    z[torch.arange(count), :, top] = torch.linspace(-3, 3, 7, device=kl.device)  # the rest is 0
    z[-1][:, top] = torch.randn(7, count, generator=generator, device=kl.device)
    return decoder(z.flatten(0, 1)).unflatten(0, (count + 1, 7))[:, :, 0], top.tolist()


# --- plot ----------------------------------------------------------------------------------------

def histogram(label, x, low, high, colour, bins=50):
    """A line of common.plot_lines: the probability density of the numbers x."""
    count = torch.histc(x.float().cpu(), bins, low, high)
    middles = torch.linspace(low, high, 2 * bins + 1)[1::2]
    style = dict(drawstyle="steps-mid", color=colour)
    return label, middles, count / count.sum() * bins / (high - low), style


def scatter(codes, gammas, mean, axes):
    """Lines of common.plot_lines: codes (C, D) in the plane of axes (D, 2), 500 of each gamma."""
    return [(f"γ = {g:g}", *((codes[gammas == g][:500] - mean) @ axes).T.cpu(),
             dict(ls="", marker=".", ms=3, alpha=0.6, color=colour))
            for g, colour in zip(gammas.unique(), common.COLOURS)]


def plot_equilibrium(sets, long, rows):
    """Energy against sweeps, the contact theorem, and density profiles."""
    energies, profiles, box = [], [], long["parameters"]["box"]
    for k, (found, row, colour) in enumerate(zip(sets, rows, common.COLOURS)):
        for label, run, column, line in ((f"γ = {row['gamma']:g}", long, k, "-"),
                                         (None, found, 0, ":")):
            energies.append((label, run["sweep"], run["energy"][:, column], dict(
                std=run["error"][:, column], ls=line, color=colour)))
        profiles.append(histogram(None, found["xy"][..., 1], 0, box, colour, 100))
    ends, weight, contact, error = (torch.tensor([row[key] for row in rows]) for key in (
        "energy", "N gamma", "contact", "contact error"))
    return common.plot_lines({
        "energy (dotted: data sets; drawn: few chains, long)": (energies, dict(
            xscale="log", xlabel="sweeps", ylabel="U / ε, mean ± standard error",
            ylim=(min(ends.min().item(), long["energy"].min().item()) - 3,
                  ends.max().item() + 15))),
        "contact theorem (grey: in equilibrium)": (
            [(None, weight, contact, dict(std=error, marker="o", color=BLUE)),
             (None, [0, weight.max()], [0, weight.max()], dict(color="0.5"))],
            dict(xlabel="weight N γ / (ε/σ)", ylabel="T [ρ(0) − ρ(L)] / (ε/σ)")),
        "density profiles": (profiles, dict(
            yscale="log", xlabel="height y / σ", ylabel="probability density of a height"))},
        width=4.4)


def plot_matrices(found, gammas, box):
    """One configuration of each gamma of found: matrices and reconstructions (C, N, N), in units of
    L sqrt 2; points, and those of the latter by Procrustes and by the tumbler (C, N, 2)."""
    titles = ("r / (L√2),\n0 (dark) to 1", "reconstruction", "difference,\n−0.2 (blue) to 0.2",
              "points", "Gram matrix, Procrustes\n(grey: original)", "Gram matrix, turbo tumbler")
    fig, axes = common.panels(len(gammas.unique()), 6, 2.3, 2.3,
                             subplot_kw=dict(xticks=[], yticks=[]))
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize="small")
    for k, g in enumerate(gammas.unique()):
        row, (d, d_hat, *points) = axes[6 * k:6 * k + 6], (x[gammas == g][0] for x in found)
        row[0].set_ylabel(f"γ = {g:g}")
        row[0].imshow(d.numpy(), vmin=0, vmax=1)
        row[1].imshow(d_hat.numpy(), vmin=0, vmax=1)
        row[2].imshow((d_hat - d).numpy(), cmap="RdBu_r", vmin=-0.2, vmax=0.2)
        row[4].plot(*points[0].T, "o", ms=4, color="0.8")
        for ax, xy, colour in zip(row[3:], points, (BLUE, RED, RED)):
            ax.plot([0, box, box, 0, 0], [0, 0, box, box, 0], color="0.6", lw=0.8)
            ax.plot(*xy.T, "o", ms=4, color=colour)
            ax.set(aspect="equal", xlim=(-0.08 * box, 1.08 * box), ylim=(-0.08 * box, 1.08 * box))
    return fig


def plot_energies(energies, gammas):
    """Energies of original and reconstructed configurations, together and by gamma."""
    low, high = torch.cat(energies).min().item(), torch.cat(energies).max().item()
    chosen = {"all": gammas >= 0} | {f"γ = {g:g}": gammas == g for g in gammas.unique()}
    return common.plot_lines({title: (
        [histogram("original", energies[0][at], low, high, BLUE),
         histogram("reconstructed", energies[1][at], low, high, RED)],
        dict(xlabel="U / ε, pairs with r ≥ σ", ylabel="probability density"))
        for title, at in chosen.items()}, columns=len(chosen), width=3)


def plot_anomalies(normal, found, gammas, mean, axes):
    """RMSE histograms, codes in the plane of axes (D, 2), and ROC curves of sets found."""
    high = 1.1 * max(out["scores"][0].quantile(0.99).item() for out in (normal, *found.values()))
    known, errors, codes, curves = scatter(normal["mu"], gammas, mean, axes), {}, {}, {}
    for name, out in found.items():
        x, y = ((out["mu"][:500] - mean) @ axes).T.cpu()
        first, second = out["roc"]  # by RMSE, by RMSE + KL
        errors[name] = [histogram("test", normal["scores"][0], 0, high, BLUE),
                        histogram("anomalous", out["scores"][0], 0, high, RED)], dict(
            xlabel="RMSE of a matrix", ylabel="probability density")
        codes[f"{name}: codes"] = [
            *known, ("anomalous", x, y, dict(ls="", marker="x", ms=3, color="k"))], dict(
            xlabel="plane of the γs' mean codes", ylabel="second axis")
        curves[f"{name}: {first[2]:.3f}, {second[2]:.3f}"] = [
            ("RMSE, first area", *first[:2], dict(color=BLUE)),
            ("RMSE + KL, second", *second[:2], dict(color=BLUE, ls="--"))], dict(
            xlabel="false positive rate", ylabel="true positive rate")
    fig = common.plot_lines(errors | codes | curves, len(errors), 3, 3, legend=None)
    for ax in fig.axes[::len(errors)]:
        ax.legend(fontsize="x-small")
    return fig


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__, PRESETS)
    for flag, kind, low, high, default, text in (
            ("gammas", float, 0, 100, [0.1, 0.4, 0.7, 1.0],
             "gravity of the training sets, in epsilon / sigma"),
            ("temperature", float, 0.01, 1000, 0.75, "temperature T, in epsilon"),
            ("particles", int, 16, 64, 30, "particles N"),  # the largest block has 15
            ("box", float, 1, 1000, 10.0, "side L, in sigma"),
            ("configurations", int, 20, 10**6, None, "independent systems per gamma"),
            ("anomalies", int, 20, 10**6, None, "configurations per anomalous set"),
            ("sweeps", int, 1, 10**7, None, "Metropolis sweeps per system"),
            ("long-sweeps", int, 1, 10**8, None, "sweeps of the run to equilibrium"),
            ("chains", int, 2, 10**5, None, "systems per gamma of the run to equilibrium"),
            ("epochs", int, 1, 10**4, None, "epochs of the main VAE"),
            ("other-epochs", int, 1, 10**4, None, "epochs of other nets (dense: ten-fold)"),
            ("latents", int, 2, 2000, [], f"latent sizes to train beside {LATENT}"),
            ("lambdas", float, 0, 100, [], f"weights of the KL to train beside {LAMBDA}")):
        parser.add(f"--{flag}", type=common.number(kind, low, high), default=default, help=text,
                   nargs="+" if isinstance(default, list) else None)
    args = parser.parse(argv)
    args.gammas = sorted(set(args.gammas))
    for flag, wrong, why in (
            # centres are about 1 apart: each takes a hexagon's area, walls are half a unit off
            ("box", args.particles * math.sqrt(3) / 2 > (args.box + 1) ** 2, f"{args.particles} "
             f"particles of diameter 1 do not fit into a box of side {args.box:g}"),
            ("epochs", args.other_epochs > args.epochs,
             f"{args.epochs} is less than --other-epochs {args.other_epochs}"),
            ("long-sweeps", args.long_sweeps < 2 * args.sweeps,
             f"{args.long_sweeps} is less than twice --sweeps {args.sweeps}"),
            ("gammas", len(args.gammas) > 8, f"{len(args.gammas)} values, at most 8"),
            ("gammas", UNSEEN in args.gammas, f"{UNSEEN:g} is that of the unseen set")):
        if wrong:
            parser.error(f"argument --{flag}: {why}")
    return args


def make_sets(run, args):
    """{name: set}, a work unit each; sorted configurations to train and to test (C, N, 2), in units
    of L sqrt 2; the gammas of the latter (C,)."""
    C, N, L, sets = args.anomalies, args.particles, args.box, {}

    def add(name, parameters, compute):
        sets[name] = found = run.unit(
            name, lambda checkpoint: compute(checkpoint) | {"parameters": parameters})
        wrong = [f"{key} {value}" for key, value in found["parameters"].items()
                 if value != parameters.get(key)]
        if wrong:
            common.die(f"{run.folder}/units/{name}.pt is a set with {', '.join(wrong)}, not what "
                       "the flags ask for: delete it, or choose another --out")

    def derive(name, make, count=C, **parameters):
        add(name, {"count": count, "seed": args.seed} | parameters,
            lambda _: make(common.generator(args.seed, name)))
    fluids = {f"fluid-{g:g}": ((g,), args.configurations, args.sweeps) for g in args.gammas}
    fluids |= {"unseen": ((UNSEEN,), C, args.sweeps),
               "fake": ((FAKE,), C, 2 * args.sweeps, "fake"),  # the authors ran it twice as long
               "long": (tuple(args.gammas), args.chains * len(args.gammas), args.long_sweeps)}
    for name, what in fluids.items():
        fluid = Fluid(*what, particles=N, box=L, temperature=args.temperature, seed=args.seed)
        cutoff = math.inf if name == "fake" else CUTOFF
        add(name, fluid._asdict() | {"step": STEP, "cutoff": cutoff},
            lambda checkpoint: metropolis(fluid, name, args.device, args.compile, checkpoint))
    xy = torch.cat([sets[f"fluid-{g:g}"]["xy"] for g in args.gammas])  # (C, N, 2), by gamma
    order = torch.randperm(len(xy), generator=common.generator(args.seed, "split"))
    n = len(xy) * 4 // 5  # 80 % to train, as the authors
    xy, test = by_origin(xy[order] / (L * math.sqrt(2))).split([n, len(xy) - n])
    gammas = torch.tensor(args.gammas, dtype=torch.double).repeat_interleave(args.configurations)
    derive("random", lambda g: {"xy": L * torch.rand(C, N, 2, generator=g)}, particles=N, box=L)
    for reading in ("code", "slide"):
        derive(f"corrupted-{reading}", lambda g: corrupt(test[:C], reading, L, g),
               len(test[:C]), reading=reading)
    for size in SIZES:
        derive(f"blacked-out-{size}", lambda g: black_out(distance_matrix(test[:500]), size, g),
               len(test[:500]), size=size)
    return sets, xy.to(args.device), test.to(args.device), gammas[order][n:]


def train_all(run, args, xy, test):
    """Everything trained, a work unit each: {name: (nets, model)}, and the rows of all epochs."""
    models = MODELS | {f"latent {D}": Model(latent=D) for D in args.latents if D != LATENT}
    models |= {f"lambda {lam}": Model(lam=lam) for lam in args.lambdas if lam != LAMBDA}
    trained, history = {}, []
    for name, model in models.items():
        g = common.generator(args.seed, name, args.device)
        nets = build(model, args.particles, g)
        longer = 10 if model.net == "dense" else 1
        epochs = args.epochs if name == MAIN else longer * args.other_epochs
        result = run.unit(name.replace(", ", "-").replace(" ", "-"), lambda checkpoint: {
            "rows": train(name, nets, model, xy, test[:2000], epochs, g, checkpoint),
            "state": nets.state_dict()})  # after "rows" has trained them
        nets.load_state_dict(result["state"])
        trained[name] = nets.requires_grad_(False), model
        history += [row | {"latent": model.latent, "lambda": model.lam} for row in result["rows"]]
    return trained, history


def net_claims(results, epochs):
    """On representations, nets and codes: (claim, document, here, holds)."""
    last, shape, axes = results["training"][-1], results["geometry"], sum(results["codes"]["axes"])
    mse, kl, (low, high), js = DOCUMENT.values()
    nets = {row["model"]: row for row in results["representations"]}
    table = [
        (f"MSE, in epoch {last['epoch']} of training (at most that)", f"{mse}",
         f"{last['error']:.4f}; test {last['test error']:.4f}; mean matrix "
         f"{nets[MAIN]['trivial']:.4f}", round(last["error"], 4) <= mse),
        ("KL per dimension in nats there (within 0.1)", f"{kl:.3f}",
         f"{last['kl']:.3f}; test {last['test kl']:.3f}", abs(last["kl"] - kl) <= 0.1),
        ("variance of the codes on two principal axes", f"{low:.0%} to {high:.0%}", f"{axes:.1%}",
         low <= axes <= high),
        ("energies, Jensen-Shannon distance (at most that)", f"{js}", f"{shape['js']:.3f}",
         shape["js"] <= js),
        ("Gram matrix gives back the points (0.001 σ, true distances)", "yes",
         f"{shape['gram error']:.1e} σ; from reconstructed ones {shape['procrustes rmse']:.2f} σ, "
         f"{shape['share']:.0%} in two eigenvalues", shape["gram error"] < 1e-3)]
    for key, name in (("latent", "larger latent size"), ("lambda", "lower lambda")):
        errors = sorted({row[key]: row["test error"] for row in results["sweeps"]
                         if row["model"].startswith((MAIN, key))}.items(), reverse=key == "lambda")
        if len(errors) > 1:
            table.append((f"lower test MSE with {name} (after {epochs} epochs)", "yes",
                          ", ".join(f"{x:g}: {error:.4f}" for x, error in errors),
                          all(a[1] > b[1] for a, b in zip(errors, errors[1:]))))
    for name, row in nets.items():
        share = row["error"] / row["trivial"]
        limit, words = (0.9, "90 %") if "grid" in name else (0.5, "half")
        text, holds = "fails (test error above", share > limit
        if name == MAIN:
            text, holds = "works (test error below", share < limit
        table.append((f"{name} {text} {words} of the trivial)", "-" if "unit" in name else "yes",
                      f"{row['error']:.4f}, {share:.0%} of it", holds))
    return table


def anomaly_claims(results):
    """On anomalies, missing data and the latent space: (claim, document, here, holds)."""
    sets, table = {row["set"]: row for row in results["anomalies"]}, []
    gammas = [row["gamma"] for row in results["fluid"]]
    hidden, rough = results["missing"], results["probe"]["texture"]
    areas = {name: f"{row['AUROC RMSE']:.3f}; RMSE + KL {row['AUROC RMSE + KL']:.3f}; by the mean "
             f"matrix {row['AUROC of mean']:.3f}" for name, row in sets.items()}
    clear = {name: row["AUROC RMSE"] > max(0.9, row["AUROC of mean"]) for name, row in sets.items()}
    for name, g in (("unseen", UNSEEN), ("fake", FAKE)):
        below, above = [f for f in gammas if f <= g], [f for f in gammas if f >= g]
        beside = sorted({*below[-1:], *above[:1]})
        row, near = sets[name], sets[name]["nearest gamma"]
        table.append((f"{name} (γ = {g:g}): beside γ = {' or '.join(f'{f:g}' for f in beside)}, "
                      "RMSE at most 1.5 times, below half of the mean matrix's", "yes",
                      f"γ = {near:g}; {row['rmse']['mean']:.4f}, {row['rmse there']:.4f}, mean "
                      f"matrix {row['rmse of mean']:.4f}; area under ROC {row['AUROC RMSE']:.2f}",
                      near in beside and row["rmse"]["mean"] <= min(
                          1.5 * row["rmse there"], row["rmse of mean"] / 2)))
    row = sets["random"]
    table.append(("random: separable by RMSE (area under ROC above 0.9 and the mean matrix's)",
                  "yes", f"{areas['random']}; from γ = {row['nearest gamma']:g} "
                  f"{row['AUROC there']:.3f}", clear["random"]))
    for name, change in results["change of the rest"].items():
        table += [(f"{name}: RMSE reflects it (area above 0.9 and the mean matrix's)", "yes",
                   areas[name], clear[name]),
                  (f"{name}: the whole matrix shifts (untouched pairs half as much)", "yes",
                   f"{change:.2f} times the touched", change > 0.5)]
    black, filled = (sum(row[f"{key} inside"] < row["mean inside"] for row in hidden)
                     for key in ("black", "filled"))
    return table + [
        ("blacked-out blocks come back better than the mean matrix (all sizes)", "tried",
         f"{black} of {len(hidden)} sizes; filled with the mean first {filled}",
         black == len(hidden)),
        ("zero latent featureless (texture below a quarter of reconstructions')", "yes",
         f"{rough['zero']:.3f}, {rough['reconstructed']:.3f}; real {rough['real']:.3f}, mean "
         f"matrix {rough['mean']:.3f}", rough["zero"] < rough["reconstructed"] / 4)]


def fluid_claims(results, faithful):
    """Have the sets settled, and is the sampler the authors' (for their settings alone)?"""
    table, rows = [], results["fluid"]
    for row, end in zip(rows, results["long"]):
        drift, miss = row["energy"] - end["settled"], row["contact"] - row["N gamma"]
        error = math.hypot(row["error"], end["settled error"])
        table.append((
            f"γ = {row['gamma']:g}: settled after {row['sweeps']:,} sweeps (drift and contact "
            "theorem within 3 standard errors)", "assumed",
            f"U {row['energy']:.2f} ± {row['error']:.2f}, from {end['sweeps'] // 2:,} on "
            f"{end['settled']:.2f} ± {end['settled error']:.2f}; contact {row['contact']:.2f} ± "
            f"{row['contact error']:.2f} of {row['N gamma']:g}",
            abs(drift) < 3 * error and abs(miss) < 3 * row["contact error"]))
    pairs = [(RERUN[row["gamma"]], row["acceptance"]) for row in rows if row["gamma"] in RERUN]
    if faithful and pairs:
        table.append(("acceptance as of the authors' sampler (within 0.01)",
                      *(", ".join(f"{x:.3f}" for x in values) for values in zip(*pairs)),
                      all(abs(a - b) < 0.01 for a, b in pairs)))
    return table


def study(run, args, sets, trained, history, xy, test, gammas):
    """Every figure of results.json, and the pictures: of sets, nets, and the configurations to
    train and to test (C, N, 2) in units of L sqrt 2, the latter's gammas (C,)."""
    (nets, model), scale = trained[MAIN], args.box * math.sqrt(2)
    fluids = [sets[f"fluid-{g:g}"] for g in args.gammas]
    fluid, long = [row for found in fluids for row in fluid_rows(found)], fluid_rows(sets["long"])
    run.figure(plot_equilibrium(fluids, sets["long"], fluid), "equilibrium", "Has it settled?")
    d, mean = distance_matrix(test), sum(distance_matrix(part).sum(0) for part in xy.split(2000))
    mean, normal = mean / len(xy), evaluate(nets, model, d)
    x_hat = normal["x_hat"].cpu()
    shape, points, energies = geometry(x_hat, test.cpu(), gammas, args.box)
    run.figure(plot_matrices((d.cpu()[:, 0], x_hat[:, 0], *points), gammas, args.box), "matrices",
               "Distance matrices and the points they hold")
    run.figure(plot_energies(energies, gammas), "energies",
               f"Energies: Jensen–Shannon distance {shape['js']:.3f}")
    *plane, shares = principal_axes(normal["mu"])
    means, axis = mean_codes(normal["mu"], gammas), dict(xlabel="first axis", ylabel="second axis")
    across = principal_axes(means)[:2] if len(means) > 2 else plane  # two lie on a line
    run.figure(common.plot_lines({
        f"principal axes ({shares[0]:.1%}, {shares[1]:.1%})": (
            scatter(normal["mu"], gammas, *plane), axis),
        "plane of the γs' means": (scatter(normal["mu"], gammas, *across), axis)}),
        "latent", "Codes of the test set")
    strange = {name: by_origin(sets[name]["xy"] / scale) for name in ("unseen", "fake", "random")}
    strange |= {name: found["xy"] / scale for name, found in sets.items() if "moved" in found}
    anomalies, found = anomaly_rows(nets, model, gammas, {"test": d} | {
        name: distance_matrix(x.to(args.device)) for name, x in strange.items()}, mean)
    run.figure(plot_anomalies(found.pop("test"), found, gammas, *across), "anomalies",
               "Anomalies against the test set")
    change = {name: change_of_rest(normal["x_hat"], found[name]["x_hat"], sets[name]["moved"])
              for name in found if "moved" in sets[name]}
    hidden = {found["parameters"]["size"]: found for found in sets.values() if "where" in found}
    sheet, top = probe(nets["decoder"], normal["kl"].mean(0),
                       common.generator(args.seed, "probe", args.device))
    names = [*(f"$z_{{{k}}}$ from −3 to 3" for k in top), "draws along\nthese alone"]
    run.figure(common.plot_sheet(sheet[:, :, None].cpu(), 1.2, 1, names, cmap="viridis"),
               "probe", "The five dimensions of largest KL, z = 0 in the middle; draws: r / (L√2), "
               "0 (dark) to 1")
    matrices = {"zero": sheet[:1, 3:4], "mean": mean[None], "real": d[:200],  # 3 of 7: z = 0
                "reconstructed": normal["x_hat"][:200]}
    return {"fluid": fluid, "long": long,
            "training": [row for row in history if row["model"] == MAIN],
            "sweeps": [row for row in history if row["epoch"] == args.other_epochs
                       and row["model"] in (trained.keys() - MODELS.keys()) | {MAIN}],
            "representations": [representation_row(name, *trained[name], xy, test[:2000])
                                for name in MODELS],
            "codes": {"axes": shares.tolist()}, "geometry": shape, "anomalies": anomalies,
            "change of the rest": change,
            "missing": missing_rows(nets, model, d[:500], mean, hidden),
            "probe": {"top": top, "texture": {key: texture(x) for key, x in matrices.items()}}}


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    label = f"N = {args.particles}, L = {args.box:g}, T = {args.temperature:g}"
    with common.Run(__file__, args, label, additive=("latents", "lambdas")) as run:
        sets, xy, test, gammas = make_sets(run, args)
        trained, history = train_all(run, args, xy, test)
        results = study(run, args, sets, trained, history, xy, test, gammas)
        for key in ("fluid", "long", "sweeps", "representations", "anomalies", "missing"):
            common.print_rows(f"{key} (RMSE)" if key == "missing" else key, results[key])
        faithful = (args.particles, args.box, args.temperature, args.sweeps) == (30, 10, 0.75, 2500)
        claims = (net_claims(results, args.other_epochs) + anomaly_claims(results)
                  + fluid_claims(results, faithful))
        return run.finish(results, claims, history)


if __name__ == "__main__":
    main()
