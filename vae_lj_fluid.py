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
parameters (units/*.pt) in out/vae_lj_fluid-<preset>. It has not been timed on a GPU. Sampler and
main VAE have the settings of the authors' code. What the document leaves open, and what we chose:
* A coordinate that would leave the box is dropped alone; the cut-off at 3 sigma is not shifted; a
  configuration is the one after 2,500 sweeps. Below r^2 = 0.001 the energy is constant, so that
  random starts are finite. Quick: half of the configurations, a quarter of the optimiser's steps.
* Glorot's initial weights, Keras' default. The document's 0.0013 is met as what training logs, the
  mean over the last epoch; the test error is a third larger. Test errors are those of the mean
  code; while training goes on, and in the sweeps, those of a drawn one.
* Other nets: dense n-512-256-D and back, ten times the epochs; a grid of 20 x 20, where the weight
  of live cells falls to 1 and lambda rises during training. "fails": test error above half of that
  of the trivial predictor, the mean of the training set. "unit": with the lambda of the slides'
  likelihood N(mu(z), 1), 2 D / entries for N = 30 (grid: D / entries), to show what lambda does.
* Energies of reconstructed configurations are those of the tumbled points, gravity included; both
  histograms leave out pairs with r < 1 and have 50 bins.
* Corrupted: the code moves 4 particles by up to 0.2 L sqrt 2 per coordinate ("code"), the slide in
  a direction by up to 0.2, which may be in those units ("slide") or in sigma ("sigma"). The order
  of the particles is kept, so that rows of the matrix keep their meaning; others are sorted.
* The second score of an anomaly is RMSE + KL, each standardised by the test set's mean and spread.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import common

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
LATENT, LAMBDA, BATCH, RATE = 40, 0.00035, 128, 1e-3
DOCUMENT = {"mse": 0.0013, "kl": 2.110, "axes": (0.08, 0.15), "js": 0.185}
RERUN = {0.1: (0.704, 0.422), 0.4: (0.662, 0.257), 0.7: (0.606, 0.193),
         1.0: (0.557, 0.168)}  # acceptance and mean height / L of the authors' sampler, run again
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
    longer: int = 1            # factor on --other-epochs


MAIN = "distances, conv"
MODELS = {  # unit: lambda of the slides' own likelihood, of variance 1
    MAIN: Model(),
    "coordinates, dense": Model("coordinates", "dense", "coordinates", longer=10),
    "coordinates, dense, unit": Model("coordinates", "dense", "coordinates", lam=4 / 3, longer=10),
    "distances, dense": Model(net="dense", longer=10),
    "distances, dense, unit": Model(net="dense", lam=4 / 45, longer=10),
    "grid, conv": Model("grid", output="grid"),
    "grid, conv, unit": Model("grid", output="grid", lam=0.1),
    "matrix to points, dense": Model("distances", "dense", "coordinates", 256, 0.0, 10),
    "matrix to points, conv": Model("distances", "conv", "coordinates", 256, 0.0)}


# --- data ----------------------------------------------------------------------------------------

def lennard_jones(r2):
    """4 (r^-12 - r^-6) of squared distances up to the cut-off, 0 beyond."""
    s = 1 / r2.clamp(min=CORE)
    s = s * s * s
    return torch.where(r2 <= CUTOFF ** 2, 4 * (s * s - s), 0.0)


def fake(r2):
    """4 (r^-4 - r^-2), the document's other potential; without cut-off."""
    s = 1 / r2.clamp(min=CORE)
    return 4 * (s * s - s)


POTENTIALS = {"lennard-jones": lennard_jones, "fake": fake}


def propose(xy, u, gamma, temperature, box):
    """Trial positions of a whole sweep (2, N, C), and what each pair energy may rise by (N, C): a
    move with the energy change dU is accepted if u < exp(-dU / T), that is dU < -T log u.

    xy (2, N, C), u (3, N, C) uniform, gamma () or (C,). A coordinate outside (0, L) stays.
    """
    new = xy + STEP * (2 * u[:2] - 1)
    new = torch.where((new > 0) & (new < box), new, xy)
    return new, -temperature * torch.log(u[2]) - gamma * (new[1] - xy[1])


def move(xy, old, new, others, limit, pair):
    """Where a particle of every chain xy (2, N, C) is after its trial move from old to new (2, C);
    others (N, 1): 0 for the particle itself, limit (C,) of propose."""
    before = ((xy - old[:, None]) ** 2).sum(0)  # (N, C), squared distances
    after = ((xy - new[:, None]) ** 2).sum(0)
    change = ((pair(after) - pair(before)) * others).sum(0)
    return torch.where(change < limit, new, old)


def energy(xy, gamma, pair):
    """U of configurations xy (2, N, C) -> (C,)"""
    rest = (xy[:, i:i + 1] - xy[:, i + 1:] for i in range(xy.shape[1] - 1))
    return sum(pair((r ** 2).sum(0)).sum(0) for r in rest) + gamma * xy[1].sum(0)


def metropolis(fluid, name, device="cpu", compile=False, checkpoint=None):
    """Sample a Fluid: {"xy": last configurations (C, N, 2), and along the way, by gamma (K, G):
    "sweep" (K,), "energy" and its standard error "error", "acceptance" (of that sweep), "height"}.

    Particles move in order, from uniform random points, at once in all chains of a chunk.
    """
    N, L, T, G = fluid.particles, fluid.box, fluid.temperature, len(fluid.gamma)
    pair, K = POTENTIALS[fluid.potential], min(50, fluid.sweeps)
    shots = torch.linspace(0, fluid.sweeps, K + 1).round().long()[1:].tolist()
    trial, step = (common.compiled(f, compile, dynamic=False) for f in (propose, move))
    others = (1 - torch.eye(N, device=device)[..., None]).unbind(0)  # (N, 1) each
    gammas = torch.tensor(fluid.gamma, device=device).repeat_interleave(fluid.count // G)
    chunk = CHUNK if device == "cpu" and G == 1 else fluid.count
    done, sweep, moves, g = [], 0, 0, torch.Generator(device)
    if checkpoint and checkpoint.state:
        done, sweep, xy, records = checkpoint.restore(g)
        moves = N * (len(done) * chunk * fluid.sweeps + sweep * xy.shape[2])
    bar = tqdm(total=fluid.count * fluid.sweeps * N, desc=name, unit=" moves", unit_scale=True,
               initial=moves, disable=None)
    for gamma in gammas.split(chunk)[len(done):]:
        C = len(gamma)
        if sweep == 0:
            g = common.generator(fluid.seed, f"{name} {len(done) * chunk}", device)
            xy, records = L * torch.rand(2, N, C, generator=g, device=device), []
        for sweep in range(sweep + 1, fluid.sweeps + 1):
            new, limit = trial(xy, torch.rand(3, N, C, generator=g, device=device), gamma, T, L)
            for particle in zip(xy.unbind(1), new.unbind(1), others, limit.unbind(0)):
                particle[0].copy_(step(xy, *particle, pair))  # the next one sees it moved
            bar.update(N * C)
            if sweep in shots:
                U, accepted = energy(xy, gamma, pair), (xy == new).all(0).float().mean(0)
                records.append(torch.stack([U, U ** 2, accepted, xy[1].mean(0)]).cpu().double()
                               .view(4, G, -1).sum(2).tolist())  # sums of chains, (4, G)
            if checkpoint and checkpoint.due():
                checkpoint.save((done, sweep, xy, records), g)
        done.append((xy.permute(2, 1, 0).cpu(), torch.tensor(records, dtype=torch.double)))
        sweep = 0
    bar.close()
    U, square, accepted, height = (sum(part[1] for part in done) * G / fluid.count).unbind(1)
    error = ((square - U ** 2).clamp(min=0) / max(1, fluid.count // G - 1)).sqrt()
    return {"xy": torch.cat([part[0] for part in done]), "sweep": torch.tensor(shots), "energy": U,
            "error": error, "acceptance": accepted, "height": height}


def by_origin(xy):
    """Particles sorted by their distance from the origin. (C, N, 2) -> (C, N, 2)"""
    return xy.gather(1, (xy ** 2).sum(-1).argsort(1)[..., None].expand_as(xy))


def distance_matrix(xy):
    """(C, N, 2) -> (C, 1, N, N)"""
    return (xy[:, :, None] - xy[:, None]).norm(dim=-1)[:, None]


def occupancy(xy):
    """1 in cells with a particle, first row: the floor. (C, N, 2) / (L sqrt 2) -> (C, 1, M, M)"""
    cell = (xy * (CELLS * math.sqrt(2))).long().clamp(0, CELLS - 1)  # (C, N, 2)
    image = torch.zeros(len(xy), CELLS ** 2, device=xy.device)
    return image.scatter_(1, CELLS * cell[..., 1] + cell[..., 0], 1.0).view(-1, 1, CELLS, CELLS)


REPRESENT = {"coordinates": nn.Flatten(), "distances": distance_matrix, "grid": occupancy}


def corrupt(xy, reading, box, generator, moved=4):
    """Move `moved` particles of each configuration (C, N, 2), in units of L sqrt 2: "xy" in sigma,
    and which particles were "moved" (C, N). They may leave the box; the order is kept.

    reading: "code", uniform within 0.2 per coordinate; "slide", a random direction and a length up
    to 0.2; "sigma", likewise, the length being in sigma.
    """
    u = torch.rand(xy.shape, generator=generator, device=xy.device)
    length, angle = 0.2 * u[..., :1], 2 * math.pi * u[..., 1:]
    slide = length * torch.cat([angle.cos(), angle.sin()], -1)
    step = {"code": 0.4 * u - 0.2, "slide": slide, "sigma": slide / (box * math.sqrt(2))}[reading]
    order = torch.rand(xy.shape[:2], generator=generator, device=xy.device).argsort(1)
    chosen = order < moved  # (C, N)
    return {"xy": (xy + chosen[..., None] * step) * box * math.sqrt(2), "moved": chosen}


def black_out(d, size, generator):
    """Hide a block of size x size entries and its mirror image: matrices "d" (C, 1, N, N) are 0,
    black, "where" (C, 1, N, N) is True."""
    C, _, N, _ = d.shape
    corner = torch.randint(N - size + 1, (C, 2, 1), generator=generator, device=d.device)
    at = torch.arange(N, device=d.device)
    inside = (at >= corner) & (at < corner + size)  # (C, 2, N)
    where = (inside[:, 0, :, None] & inside[:, 1, None])[:, None]
    where = where | where.mT
    return {"d": d.masked_fill(where, 0.0), "where": where}


# --- model ---------------------------------------------------------------------------------------

def build(model, particles, generator):
    """Encoder (B, ...) -> (B, 2 D), means and log variances, and decoder (B, D) -> (B, ...)."""
    shapes = {"coordinates": (2 * particles,), "distances": (1, particles, particles),
              "grid": (1, CELLS, CELLS)}
    shape, goal, D, relu = shapes[model.input], shapes[model.output], model.latent, nn.ReLU(True)
    maps, last = (50, *shape[1:]), [] if model.input == "grid" else [nn.Sigmoid()]  # grid: logits

    def conv(a, b):
        return nn.Conv2d(a, b, 3, padding=1)
    if model.net == "conv":
        encoder = [conv(1, 60), relu, conv(60, 50), relu, nn.Flatten(),
                   nn.Linear(math.prod(maps), 2 * D)]
        # with stride 1 the document's transposed convolution is a convolution, and slower
        decoder = [nn.Linear(D, math.prod(maps)), relu, nn.Unflatten(1, maps),
                   conv(50, 50), relu, conv(50, 60), relu, conv(60, 1), *last]
    else:
        encoder = [nn.Flatten(), nn.Linear(math.prod(shape), 512), relu, nn.Linear(512, 256), relu,
                   nn.Linear(256, 2 * D)]
    if model.net == "dense" or model.output != model.input:
        decoder = [nn.Linear(D, 256), relu, nn.Linear(256, 512), relu,
                   nn.Linear(512, math.prod(goal)), *last, nn.Unflatten(1, goal)]
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
            order = common.batches(len(xy), BATCH, generator)
        batch = xy[order[k]]
        loss, log[k] = objective(nets, model, source(batch), goal(batch), step / (epochs * n),
                                 generator)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        due = checkpoint and checkpoint.due()
        if (last or due) and not log[:k + 1].isfinite().all():
            at, term = (~log[:k + 1].isfinite()).nonzero()[0].tolist()
            raise FloatingPointError(f"{name}: the term {('error', 'KL')[term]} is not finite at "
                                     f"step {step - k + at}")
        if last:
            error, kl = log.mean(0).tolist()
            out = evaluate(nets, model, source(test), goal(test), noise=True)
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
        mu, logvar = nets["encoder"](part).chunk(2, 1)
        draw = torch.randn(mu.shape, generator=g, device=x.device) * (logvar / 2).exp()
        x_hat = nets["decoder"](mu + draw if noise and model.lam else mu)
        error = loss(x_hat, goal, reduction="none").flatten(1).mean(1)
        found.append((x_hat, error, mu, kl_divergence(mu, logvar)))
    return dict(zip(("x_hat", "error", "mu", "kl"), map(torch.cat, zip(*found))))


def rms(x):
    """Root mean square of all entries."""
    return (x ** 2).mean().sqrt().item()


def contact_density(xy, box, width=0.4, bins=20, degree=3):
    """Particles per length at the wall y = 0 minus at y = L, a value per configuration (C,): that
    of a polynomial fitted to the histogram up to `width` from the wall, a weighted count."""
    edge = torch.linspace(0, width, bins + 1, dtype=torch.double)
    powers = torch.arange(1, degree + 2)
    area = (edge[1:, None] ** powers - edge[:-1, None] ** powers) / powers  # of y^k in each bin
    weight = F.pad(torch.linalg.pinv(area)[0], (0, 1))
    low, high = (weight[(y / width * bins).long().clamp(max=bins)].sum(1)
                 for y in (xy[..., 1], box - xy[..., 1]))
    return low - high


def fluid_rows(found):
    """Figures of a sampled set after its last sweep, by gamma, and the contact theorem: acceptance
    is a mean over the run, settled the mean energy of its second half."""
    fluid, rows = found["parameters"], []
    for k, xy in enumerate(found["xy"].double().chunk(len(fluid["gamma"]))):
        contact, g = fluid["temperature"] * contact_density(xy, fluid["box"]), fluid["gamma"][k]
        U, acceptance, height = (found[key][:, k] for key in ("energy", "acceptance", "height"))
        rows.append({
            "gamma": g, "count": len(xy), "sweeps": int(found["sweep"][-1]),
            "energy": U[-1].item(), "error": found["error"][-1, k].item(),
            "settled": U[len(U) // 2:].mean().item(), "acceptance": acceptance.mean().item(),
            "height / L": height[-1].item() / fluid["box"], "N gamma": fluid["particles"] * g,
            "contact": contact.mean().item(),
            "contact error": contact.std().item() / len(contact) ** 0.5})
    return rows


def tidy(d):
    """What a net makes of a matrix of distances as one: symmetric, 0 on the diagonal."""
    return (d + d.mT) / 2 * (1 - torch.eye(d.shape[-1], device=d.device))


def gram_coordinates(d):
    """Points (C, N, 2) of distances d (C, N, N), and the share of the two leading eigenvalues (C,):
    1 if d are distances in a plane; then the points are exact up to a rigid motion."""
    square = d.double() ** 2
    gram = (square[:, :, :1] + square[:, :1] - square) / 2  # g_ij = x_i . x_j, x_1 in the origin
    values, vectors = torch.linalg.eigh(gram)  # ascending
    points = vectors[..., -2:] * values[:, None, -2:].clamp(min=0).sqrt()
    return points, values[:, -2:].sum(1) / values.abs().sum(1)


def procrustes(points, goal):
    """Points (C, N, 2) shifted, turned and, if that is nearer, mirrored onto goal (C, N, 2)."""
    a, centre = points - points.mean(1, keepdim=True), goal.mean(1, keepdim=True)
    U, _, V = torch.linalg.svd(a.mT @ (goal - centre))
    return a @ U @ V + centre


def turbo_tumbler(points, box):
    """Let the convex hull of the points (C, N, 2) sit on its side nearest to the centre of mass:
    the side on y = 0, the points' extent centred in the box.

    Two points are a side if no other lies beyond the line through them; all pairs P are tried.
    """
    (i, j), found = torch.triu_indices(points.shape[1], points.shape[1], 1), []
    for part in points.double().split(200):
        side, row = part[:, j] - part[:, i], torch.arange(len(part), device=part.device)
        along = F.normalize(side, dim=-1)  # (C, P, 2)
        up = torch.stack([-along[..., 1], along[..., 0]], -1)
        height = up @ part.mT - (up * part[:, i]).sum(-1, keepdim=True)  # (C, P, N)
        sign = torch.where(height.sum(-1, keepdim=True) < 0, -1.0, 1.0)
        height, tiny = height * sign, 1e-9 * (part.amax(1) - part.amin(1)).amax(1)[:, None]
        beyond = (height.amin(-1) < -tiny) | (side.norm(dim=-1) <= tiny)
        best = height.mean(-1).masked_fill(beyond, math.inf).argmin(1)
        x = (part @ along[row, best, :, None])[..., 0] * sign[row, best]  # turned, not mirrored
        x = x + box / 2 - (x.amax(1) + x.amin(1))[:, None] / 2
        found.append(torch.stack([x, height[row, best].clamp(min=0)], -1))
    return torch.cat(found)


def pair_energy(d):
    """Lennard-Jones energy of distances d (C, N, N) in sigma without pairs below r = 1. -> (C,)"""
    upper = torch.triu(torch.ones_like(d[0], dtype=torch.bool), 1)
    return torch.where(upper & (d >= 1), lennard_jones(d ** 2), 0.0).sum((1, 2))


def jensen_shannon(a, b, bins=50):
    """Jensen-Shannon distance, 0 to sqrt(log 2) = 0.833, of two samples' histograms in common bins
    from the least to the largest value."""
    low, high = min(a.min(), b.min()).item(), max(a.max(), b.max()).item()
    p, q = (torch.histc(x.float().cpu(), bins, low, high) / len(x) for x in (a, b))
    p, q = p.double() / p.sum(), q.double() / q.sum()
    m = (p + q) / 2
    divergence = (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).nan_to_num(0.0).sum() / 2
    return divergence.clamp(min=0).sqrt().item()


def geometry(d_hat, test, gammas, box):
    """What reconstructed matrices d_hat (C, 1, N, N) say of the true points test (C, N, 2), both in
    units of L sqrt 2: figures; true, fitted and tumbled points; energies. js: Jensen-Shannon
    distance of energies of true and tumbled points; js floor: of two halves of the true ones; js
    pairs: of pairs alone, straight from the matrices."""
    xy = box * math.sqrt(2) * test.double()
    true, d = distance_matrix(xy)[:, 0], box * math.sqrt(2) * tidy(d_hat)[:, 0].double()
    (exact, _), (points, share) = gram_coordinates(true), gram_coordinates(d)
    fitted, tumbled = procrustes(points, xy), turbo_tumbler(points, box)
    U, U_hat = (pair_energy(distance_matrix(x)[:, 0]) + gammas * x[..., 1].sum(1)
                for x in (xy, tumbled))
    kinds = {"true": xy, "tumbled": turbo_tumbler(exact, box), "reconstructed": tumbled}
    heights = [{"gamma": g} | {key: x[gammas == g][..., 1].mean().item()
                               for key, x in kinds.items()} for g in gammas.unique().tolist()]
    return {"js": jensen_shannon(U, U_hat), "js floor": jensen_shannon(U[::2], U[1::2]),
            "js pairs": jensen_shannon(pair_energy(true), pair_energy(d)),
            "share": share.mean().item(), "heights": heights,
            "gram error": (procrustes(exact, xy) - xy).norm(dim=-1).max().item(),
            "procrustes rmse": (fitted - xy).square().sum(-1).mean().sqrt().item()
            }, (xy, fitted, tumbled), (U, U_hat)


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


def mean_codes(mu, gammas):
    """The mean (G, D) of the codes (C, D) of each gamma."""
    return torch.stack([mu[gammas == g].mean(0) for g in gammas.unique()])


def code_figures(mu, gammas):
    """Shares of variance of two principal axes, and how often the nearest mean code of a gamma is
    the own one: means of one half of the codes (C, D), tried on the other."""
    half, own = len(mu) // 2, gammas[len(mu) // 2:]
    near = torch.cdist(mu[half:], mean_codes(mu[:half], gammas[:half])).argmin(1).cpu()
    return {"axes": principal_axes(mu)[2][:2].tolist(),
            "nearest is own": (gammas.unique()[near] == own).double().mean().item()}


def representation_row(name, nets, model, xy, test, box):
    """Test error of one representation beside those of the training mean ("trivial"; of a grid also
    of each height, "rows") and of as many principal components ("pca"); distances in sigma, pairs
    below 0.9 sigma ("overlaps"). The row, and what the net makes of the first configuration."""
    goal, scale, N = REPRESENT[model.output], box * math.sqrt(2), test.shape[1]
    mean = torch.stack([goal(part).sum(0) for part in xy.split(2000)]).sum(0) / len(xy)
    target, true = goal(test), distance_matrix(test)
    out = evaluate(nets, model, REPRESENT[model.input](test), target)
    x_hat, rest = out["x_hat"], target - mean
    row = {"model": name, "error": out["error"].mean().item(), "latent": model.latent,
           "kl": out["kl"].mean().item() if model.lam else None}
    if model.input == "grid":
        for key, p in (("trivial", mean), ("rows", mean.mean(-1, keepdim=True))):
            row[key] = F.binary_cross_entropy(p.clamp(1e-6, 1).expand_as(target), target).item()
        row["double cells"] = 1 - (target.sum() / test.shape[:2].numel()).item()
        return row, x_hat[:1].sigmoid().cpu()
    row["trivial"] = (rest ** 2).mean().item()
    if model.output == model.input:
        axes = principal_axes(goal(xy[:8000]).flatten(1))[1][:, :model.latent]
        rest = rest.flatten(1)
        row["pca"] = ((rest - rest @ axes @ axes.T) ** 2).mean().item()
    points = model.output == "coordinates"
    d = distance_matrix(x_hat.view(test.shape)) if points else tidy(x_hat)
    row["distance rmse"] = scale * rms(d - true)
    for key, x in (("overlaps", d), ("overlaps true", true)):
        row[key] = ((scale * x < 0.9).sum().item() / len(d) - N) / 2
    return row, x_hat[:1].cpu()


def anomaly_rows(nets, model, normal, gammas, sets):
    """Errors, codes and detection of each set of matrices {name: (C, 1, N, N)}, beside the test
    set's evaluation `normal`, whose configurations have the gammas (C,): rows, {name: evaluation}.

    nearest gamma: that of the nearest mean code; spread: mean distance from the mean code, by that
    of this gamma; AUROC: against the test set; there: by RMSE, against the nearest gamma alone.
    """
    base, nats, rows = normal["error"].sqrt(), normal["kl"].sum(1), []

    def scores(out):
        rmse, kl = out["error"].sqrt(), out["kl"].sum(1)
        return rmse, (rmse - base.mean()) / base.std() + (kl - nats.mean()) / nats.std()

    def width(mu):
        return (mu - mu.mean(0)).norm(dim=1).mean().item()
    found = {"test": normal} | {name: evaluate(nets, model, x) for name, x in sets.items()}
    found |= {f"test, γ = {g:g}": {key: x[gammas == g] for key, x in normal.items()}
              for g in gammas.unique()}
    for name, out in found.items():
        mu, rmse, centres = out["mu"], out["error"].sqrt(), mean_codes(normal["mu"], gammas)
        out["roc"] = [roc(a, b) for a, b in zip(scores(normal), scores(out))]
        near = gammas.unique()[(centres - mu.mean(0)).norm(dim=1).argmin().cpu()]
        row = {"set": name, "rmse": common.mean_std(rmse), "kl": out["kl"].mean().item()}
        row |= {"nearest gamma": near.item(), "AUROC there": roc(base[gammas == near], rmse)[2]}
        row["spread"] = width(mu) / width(normal["mu"][gammas == near])
        rows.append(row | {"AUROC RMSE": out["roc"][0][2], "AUROC RMSE + KL": out["roc"][1][2]})
    return rows, found


def change_of_rest(before, after, moved):
    """Root mean square change of reconstructions (C, 1, N, N) where neither particle was moved
    (C, N), by that where one was."""
    change = ((after - before[:len(after)])[:, 0] ** 2).cpu()
    touched = (moved[:, :, None] | moved[:, None]).cpu()
    return (change[~touched].mean() / change[touched].mean()).sqrt().item()


def missing_rows(nets, model, d, mean, hidden):
    """RMSE inside and outside of blocks of d (C, 1, N, N) that are black in {size: set}: of the
    mean matrix of the training set, of reconstructions of the whole matrix, of the black one, and
    of the black one filled with the mean. Rows, and a sheet (4, sizes, N, N)."""
    rows, sheet, whole = [], [], evaluate(nets, model, d)["x_hat"]
    for size, found in hidden.items():
        black, where = found["d"].to(d.device), found["where"].to(d.device)
        restored, filled = (evaluate(nets, model, x)["x_hat"]
                            for x in (black, torch.where(where, mean, d)))
        guesses = {"mean": mean.expand_as(d), "whole": whole, "black": restored, "filled": filled}
        rows.append({"size": size} | {
            f"{key} {place}": rms((x - d)[at]) for key, x in guesses.items()
            for place, at in (("inside", where), ("outside", ~where))})
        sheet.append(torch.stack([x[0, 0] for x in (d, black, restored, filled)]))
    return rows, torch.stack(sheet, 1).cpu()


def texture(d):
    """Root mean square step between neighbouring entries of d (C, 1, N, N) above the diagonal;
    small where it has no features."""
    return rms((d[..., 1:] - d[..., :-1])[..., torch.ones_like(d[0, 0, :, 1:]).triu(1) > 0])


@torch.no_grad()
def probe(nets, normal, d, mean, generator, count=5):
    """The origin of the latent space, the `count` dimensions with the largest KL (and their
    traversal from -3 to 3), and draws from the prior along these alone and along all dimensions:
    figures, and a sheet of matrices (count + 3, 7, N, N)."""
    kl, decode, device = normal["kl"].mean(0), nets["decoder"], d.device
    D, top = len(kl), kl.topk(count).indices
    walk = torch.zeros(count, 7, D, device=device)
    walk[torch.arange(count), :, top] = torch.linspace(-3, 3, 7, device=device)
    walk = decode(walk.flatten(0, 1)).view(count, 7, *d.shape[2:])
    patterns = F.normalize((walk[:, -1] - walk[:, 0]).flatten(1), dim=1)
    code = torch.randn(200, D, generator=generator, device=device)
    few = torch.zeros_like(code).index_copy(1, top, code[:, top])
    matrices = {"zero": decode(torch.zeros_like(code[:1])), "mean": mean[None], "real": d[:200],
                "drawn": decode(few), "drawn along all": decode(code),
                "reconstructed": normal["x_hat"][:200]}
    sheet = torch.full((count + 3, 7, *d.shape[2:]), math.nan, device=device)
    sheet[0, :3] = torch.cat([matrices[key][0] for key in ("zero", "mean", "real")])
    sheet[1:-2] = walk
    sheet[-2], sheet[-1] = matrices["drawn"][:7, 0], matrices["drawn along all"][:7, 0]
    return {"kl by dimension": kl.tolist(), "top": top.tolist(),
            "cosine": (patterns @ patterns.T).fill_diagonal_(0).abs().max().item(),
            "texture": {key: texture(x) for key, x in matrices.items()},
            "share": {key: gram_coordinates(tidy(x)[:, 0].cpu())[1].mean().item()
                      for key, x in matrices.items()}}, sheet.cpu()


# --- plot ----------------------------------------------------------------------------------------

def gallery(rows, titles, box):
    """Pictures in a grid, {label: [cell, ...]}. A cell is {colour: points (N, 2) in sigma}, in the
    box, or a matrix (N, N), from 0 to 1 or, with negative entries, from -0.2 to 0.2."""
    bare = dict(xticks=[], yticks=[])
    fig, axes = common.panels(len(rows), len(titles), 2.3, 2.3, subplot_kw=bare)
    for ax, cell in zip(axes, sum(rows.values(), [])):
        if isinstance(cell, dict):
            ax.plot([0, box, box, 0, 0], [0, 0, box, box, 0], color="0.6", lw=0.8)
            for colour, points in cell.items():
                ax.plot(*points.T, "o", ms=4, color=colour)
            ax.set(aspect="equal", xlim=(-0.08 * box, 1.08 * box), ylim=(-0.08 * box, 1.08 * box))
        elif cell.min() < 0:
            ax.imshow(cell.numpy(), cmap="RdBu_r", vmin=-0.2, vmax=0.2)
        else:
            ax.imshow(cell.numpy(), vmin=0, vmax=1)
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize="small")
    for ax, label in zip(axes[::len(titles)], rows):
        ax.set_ylabel(label)
    return fig


def plot_sheet(sheet, rows, columns=()):
    """Matrices (rows, columns, N, N) with labels."""
    fig, shown = common.plot_sheet(sheet[:, :, None], 1.2, 1, rows, columns, cmap="viridis")
    fig.colorbar(shown, shrink=0.3, label="r / (L√2)")
    return fig


def histogram(label, x, low, high, colour, bins=50):
    """A line of common.plot_lines: the probability density of the numbers x."""
    count = torch.histc(x.float().cpu(), bins, low, high)
    middles = torch.linspace(low, high, 2 * bins + 1)[1::2]
    style = dict(drawstyle="steps-mid", color=colour)
    return label, middles, count / count.sum() * bins / (high - low), style


def scatter(codes, gammas, plane):
    """Lines of common.plot_lines: codes (C, D) in a plane, origin (D,) and axes (D, 2); at most 500
    of each gamma."""
    return [(f"γ = {g:g}", *((codes[gammas == g][:500] - plane[0]) @ plane[1]).T.cpu(),
             dict(ls="", marker=".", ms=3, alpha=0.6, color=colour))
            for g, colour in zip(gammas.unique(), common.COLOURS)]


def plane_of_means(mu, gammas):
    """Origin (D,) and two axes (D, 2) of the plane next to the mean codes of the gammas; with less
    than three gammas, of the codes (C, D)."""
    centres = mean_codes(mu, gammas)
    origin, axes, _ = principal_axes(centres if len(centres) > 2 else mu)
    return origin, axes[:, :2]


def plot_equilibrium(sets, long, rows):
    """Energy against sweeps, the contact theorem, and density profiles."""
    energies, profiles, box = [], [], long["parameters"]["box"]
    for k, (found, row, colour) in enumerate(zip(sets, rows, common.COLOURS)):
        for label, run, column, line in ((f"γ = {row['gamma']:g}", long, k, "-"),
                                         (None, found, 0, ":")):
            energies.append((label, run["sweep"], run["energy"][:, column], dict(
                std=run["error"][:, column], ls=line, color=colour)))
        profiles.append(histogram(None, found["xy"][..., 1], 0, box, colour, 100))
    ends, end = [row["energy"] for row in rows], max(row["N gamma"] for row in rows)
    weight, contact, error = (torch.tensor([row[key] for row in rows])
                              for key in ("N gamma", "contact", "contact error"))
    return common.plot_lines({
        "energy (dotted: data sets; drawn: few chains, long)": (energies, dict(
            xscale="log", xlabel="sweeps", ylabel="U / ε, mean ± standard error",
            ylim=(min(*ends, long["energy"].min().item()) - 3, max(ends) + 15))),
        "contact theorem (grey: in equilibrium)": (
            [(None, weight, contact, dict(std=error, marker="o", color=BLUE)),
             (None, [0, end], [0, end], dict(color="0.5"))],
            dict(xlabel="weight N γ / (ε/σ)", ylabel="T [ρ(0) − ρ(L)] / (ε/σ)")),
        "density profiles": (profiles, dict(
            yscale="log", xlabel="height y / σ", ylabel="probability density of a height"))},
        width=4.4)


def swept(rows, key):
    """Those rows that differ from the main VAE in nothing but "latent" or "lambda", in order."""
    same = ("lambda", LAMBDA) if key == "latent" else ("latent", LATENT)
    return sorted((row for row in rows if row[same[0]] == same[1]), key=lambda row: row[key])


def plot_latent(mu, gammas, history, sweeps):
    """Codes in two planes; error and KL in training, by latent size and by lambda."""
    (mean, axes, shares), charts = principal_axes(mu), {}
    for term, unit, title, plane in (
            ("error", "mean squared error",
             f"codes, principal axes ({shares[0]:.1%}, {shares[1]:.1%})", (mean, axes[:, :2])),
            ("kl", "KL per dimension / nats", "codes, plane of the γs' means",
             plane_of_means(mu, gammas))):
        charts[title] = scatter(mu, gammas, plane), dict(xlabel="first axis", ylabel="second axis")
        for key, rows in (("epoch", history), ("latent", swept(sweeps, "latent")),
                          ("lambda", swept(sweeps, "lambda"))):
            x = [row[key] if key == "epoch" else f"{row[key]:g}" for row in rows]
            lines = [(label, x, [row[name] for row in rows], dict(marker="o", color=colour))
                     for label, name, colour in (("training", term, BLUE),
                                                 ("test", f"test {term}", RED))]
            charts[f"{term}, {key}"] = lines, dict(xlabel=key, ylabel=unit)
    return common.plot_lines(charts, legend="each")


def plot_energies(energies, gammas):
    """Energies of original and reconstructed configurations, together and by gamma."""
    low, high = torch.cat(energies).min().item(), torch.cat(energies).max().item()
    chosen = {"all": gammas >= 0} | {f"γ = {g:g}": gammas == g for g in gammas.unique()}
    return common.plot_lines({title: (
        [histogram("original", energies[0][at], low, high, BLUE),
         histogram("reconstructed", energies[1][at], low, high, RED)],
        dict(xlabel="U / ε, pairs with r ≥ σ", ylabel="probability density"))
        for title, at in chosen.items()}, columns=len(chosen), width=3)


def plot_anomalies(found, sets, gammas):
    """RMSE histograms, codes in the plane of the test set's mean codes, and ROC curves."""
    rmse = {name: found[name]["error"].sqrt() for name in ("test", *sets)}
    high = 1.1 * max(x.quantile(0.99).item() for x in rmse.values())
    mu, errors, codes, curves = found["test"]["mu"], {}, {}, {}
    origin, axes = plane_of_means(mu, gammas)
    for name in sets:
        cross = ((found[name]["mu"][:500] - origin) @ axes).T.cpu()
        first, second = found[name]["roc"]  # by RMSE, by RMSE + KL
        errors[name] = [histogram("test", rmse["test"], 0, high, BLUE),
                        histogram("anomalous", rmse[name], 0, high, RED)], dict(
            xlabel="RMSE of a matrix", ylabel="probability density")
        codes[f"{name}: codes"] = scatter(mu, gammas, (origin, axes)) + [
            ("anomalous", *cross, dict(ls="", marker="x", ms=3, color="k"))], dict(
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
    add = parser.add
    for flag, kind, low, high, default, text in (
            ("gammas", float, 0, 100, [0.1, 0.4, 0.7, 1.0],
             "gravity of the training sets, in epsilon / sigma"),
            ("unseen", float, 0, 100, 3.0, "gravity of the set that is not trained on"),
            ("temperature", float, 0.01, 1000, 0.75, "temperature T, in epsilon"),
            ("particles", int, 8, 64, 30, "particles N"),
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
        add(f"--{flag}", type=common.number(kind, low, high), default=default, help=text,
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
            ("gammas", len(args.gammas) > 8, f"{len(args.gammas)} values, at most 8")):
        if wrong:
            parser.error(f"argument --{flag}: {why}")
    args.latents = sorted(set(args.latents) - {LATENT})
    args.lambdas = sorted(set(args.lambdas) - {LAMBDA})
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

    def derive(name, make, **parameters):
        add(name, {"count": C, "seed": args.seed} | parameters,
            lambda _: make(common.generator(args.seed, name)))
    fluids = {f"fluid-{g:g}": ((g,), args.configurations, args.sweeps) for g in args.gammas}
    fluids |= {"unseen": ((args.unseen,), C, args.sweeps),
               "fake": ((0.5,), C, 2 * args.sweeps, "fake"),
               "long": (tuple(args.gammas), args.chains * len(args.gammas), args.long_sweeps)}
    for name, what in fluids.items():
        fluid = Fluid(*what, particles=N, box=L, temperature=args.temperature, seed=args.seed)
        cutoff = math.inf if name == "fake" else CUTOFF
        add(name, fluid._asdict() | {"step": STEP, "cutoff": cutoff},
            lambda checkpoint: metropolis(fluid, name, args.device, args.compile, checkpoint))
    xy = torch.cat([sets[f"fluid-{g:g}"]["xy"] for g in args.gammas])
    order = torch.randperm(len(xy), generator=common.generator(args.seed, "split"))
    n = len(xy) * 4 // 5
    xy, test = by_origin(xy[order] / (L * math.sqrt(2))).split([n, len(xy) - n])
    gammas = torch.tensor(args.gammas, dtype=torch.double).repeat_interleave(args.configurations)
    derive("random", lambda g: {"xy": L * torch.rand(C, N, 2, generator=g)}, particles=N, box=L)
    for reading in ("code", "slide", "sigma"):
        derive(f"corrupted-{reading}", lambda g: corrupt(test[:C], reading, L, g), reading=reading)
    for size in SIZES:
        if size < N:
            derive(f"blacked-out-{size}", lambda g: black_out(
                distance_matrix(test[:500]), size, g), size=size)
    return sets, xy.to(args.device), test.to(args.device), gammas[order][n:]


def train_all(run, args, xy, test):
    """Everything trained, a work unit each: {name: (nets, model)}, and the rows of all epochs."""
    models = MODELS | {f"latent {D}": Model(latent=D) for D in args.latents}
    models |= {f"lambda {lam}": Model(lam=lam) for lam in args.lambdas}
    trained, history = {}, []
    for name, model in models.items():
        g = common.generator(args.seed, name, args.device)
        nets = build(model, args.particles, g)
        epochs = args.epochs if name == MAIN else model.longer * args.other_epochs
        result = run.unit(name.replace(", ", "-").replace(" ", "-"), lambda checkpoint: {
            "rows": train(name, nets, model, xy, test[:2000], epochs, g, checkpoint),
            "state": nets.state_dict()})
        nets.load_state_dict(result["state"])
        trained[name] = nets.requires_grad_(False), model
        history += [row | {"latent": model.latent, "lambda": model.lam} for row in result["rows"]]
    return trained, history


def net_claims(results, epochs):
    """On representations, nets and codes: (claim, document, here, holds)."""
    last, shape, codes = (results[key] for key in ("training", "geometry", "codes"))
    last, (mse, kl, (low, high), js) = last[-1], DOCUMENT.values()
    nets, axes = {row["model"]: row for row in results["representations"]}, sum(codes["axes"])
    table = [
        (f"MSE, in epoch {last['epoch']} of training (at most that)", f"{mse}",
         f"{last['error']:.4f}; test {last['test error']:.4f}; mean matrix "
         f"{nets[MAIN]['trivial']:.4f}, PCA with {LATENT} {nets[MAIN]['pca']:.4f}",
         round(last["error"], 4) <= mse),
        ("KL per dimension in nats there (at most 2.2)", f"{kl:.3f}",
         f"{last['kl']:.3f}; test {last['test kl']:.3f}", last["kl"] <= 2.2),
        ("variance of the codes on two principal axes", f"{low:.0%} to {high:.0%}", f"{axes:.1%}",
         low <= axes <= high),
        ("energies, Jensen-Shannon distance (at most that)", f"{js}", f"{shape['js']:.3f}; pairs "
         f"alone {shape['js pairs']:.3f}; two halves of the true ones {shape['js floor']:.3f}",
         shape["js"] <= js),
        ("Gram matrix gives back the points (0.001 σ, true distances)", "yes",
         f"{shape['gram error']:.1e} σ; from reconstructed ones {shape['procrustes rmse']:.2f} σ",
         shape["gram error"] < 1e-3)]
    for key, name, sign in (("latent", "larger latent size", 1), ("lambda", "lower lambda", -1)):
        rows = swept(results["sweeps"], key)[::sign]
        if len(rows) > 1:
            table.append((f"lower test MSE with {name} (after {epochs} epochs)", "yes",
                          ", ".join(f"{row[key]:g}: {row['test error']:.4f}" for row in rows),
                          all(a["test error"] > b["test error"] for a, b in zip(rows, rows[1:]))))
    for name, row in nets.items():
        share = row["error"] / row.get("rows", row["trivial"])
        text, holds = "fails (test error above half of the trivial)", share > 0.5
        if name == MAIN:
            text, holds = "works (test error below half of the trivial)", share < 0.5
        if "rows" in row:
            text, holds = "learns at most a gradient in y (error above 90 % of its)", share > 0.9
        table.append((f"{name} {text}", "-" if "unit" in name else "yes",
                      f"{row['error']:.4f}, {share:.0%} of it", holds))
    own, chance = codes["nearest is own"], 1 / len(results["fluid"])
    if chance < 1:
        table.append((f"codes lie by gamma (nearest mean is their own; {chance:.0%} by chance)",
                      "yes", f"{own:.0%}", own - chance > (1 - chance) / 3))
    return table


def anomaly_claims(results, unseen):
    """On anomalies, missing data and the latent space: (claim, document, here, holds)."""
    sets, table = {row["set"]: row for row in results["anomalies"]}, []
    gammas, hidden = [row["gamma"] for row in results["fluid"]], results["missing"]
    for name, g in (("unseen", unseen), ("fake", 0.5)):
        beside = sorted({max([f for f in gammas if f <= g], default=gammas[0]),
                         min([f for f in gammas if f >= g], default=gammas[-1])})
        near, rmse = sets[name]["nearest gamma"], sets[name]["rmse"]["mean"]
        usual = sets[f"test, γ = {near:g}"]["rmse"]["mean"]
        table.append((f"{name} (γ = {g:g}): beside γ = {' or '.join(f'{f:g}' for f in beside)}, "
                      "RMSE at most 1.5 times", "yes", f"γ = {near:g}; {rmse:.4f}, {usual:.4f}; "
                      f"area under ROC {sets[name]['AUROC RMSE']:.2f}",
                      near in beside and rmse <= 1.5 * usual))
    areas = {name: f"{row['AUROC RMSE']:.3f}; RMSE + KL {row['AUROC RMSE + KL']:.3f}"
             for name, row in sets.items()}
    row, near = sets["random"], f"γ = {sets['random']['nearest gamma']:g}"
    table += [("random: separable by RMSE (area under ROC above 0.9)", "yes",
               f"{areas['random']}; from {near} {row['AUROC there']:.3f}", row["AUROC RMSE"] > 0.9),
              (f"random: codes spread more (than {near}, by a tenth)", "yes",
               f"{row['spread']:.2f} times", row["spread"] > 1.1)]
    for name, change in results["change of the rest"].items():
        table += [(f"{name}: RMSE reflects it (area above 0.9)", "yes", areas[name],
                   sets[name]["AUROC RMSE"] > 0.9),
                  (f"{name}: the whole matrix shifts (untouched pairs half as much)", "yes",
                   f"{change:.2f} times the touched", change > 0.5)]
    texture, share, cosine = (results["probe"][key] for key in ("texture", "share", "cosine"))
    black, filled = (sum(row[f"{key} inside"] < row["mean inside"] for row in hidden)
                     for key in ("black", "filled"))
    return table + [
        ("blacked-out blocks come back better than the mean matrix (all sizes)", "tried",
         f"{black} of {len(hidden)} sizes; filled with the mean first {filled}",
         black == len(hidden)),
        ("zero latent featureless (texture below a quarter of reconstructions')", "yes",
         f"{texture['zero']:.3f}, {texture['reconstructed']:.3f}; real {texture['real']:.3f}, mean "
         f"matrix {texture['mean']:.3f}", texture["zero"] < texture["reconstructed"] / 4),
        ("each dimension another pattern (|cosine| of five below 0.5)", "yes",
         f"at most {cosine:.2f}", cosine < 0.5),
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
    rows = [row for row in rows if row["gamma"] in RERUN and faithful]
    for k, key in enumerate(("acceptance", "height / L") if rows else ()):
        theirs, ours = [RERUN[row["gamma"]][k] for row in rows], [row[key] for row in rows]
        table.append((f"{key} as of the authors' sampler (within 0.01)",
                      *(", ".join(f"{x:.3f}" for x in values) for values in (theirs, ours)),
                      all(abs(a - b) < 0.01 for a, b in zip(theirs, ours))))
    return table


def picture(kind, x, box, colour):
    """What gallery shows of a representation x (1, ...) of one configuration."""
    if kind == "coordinates":
        return {colour: box * math.sqrt(2) * x.view(-1, 2)}
    return x[0, 0] if kind == "distances" else x[0, 0].flip(0) / x.max()  # floor below


def study(run, args, sets, trained, history, xy, test, gammas):
    """Every figure of results.json, and the pictures: of sets, nets, and the configurations to
    train and to test (C, N, 2) in units of L sqrt 2, the latter's gammas (C,)."""
    (nets, model), L = trained[MAIN], args.box
    fluids = [sets[f"fluid-{g:g}"] for g in args.gammas]
    fluid, long = [row for found in fluids for row in fluid_rows(found)], fluid_rows(sets["long"])
    run.figure(plot_equilibrium(fluids, sets["long"], fluid), "equilibrium", "Has it settled?")

    rows, outputs = zip(*(
        representation_row(name, *trained[name], xy, test[:2000], L) for name in MODELS))
    kinds = [model.output for model in MODELS.values()]
    run.figure(gallery({
        "original": [picture(kind, REPRESENT[kind](test[:1].cpu()), L, BLUE) for kind in kinds],
        "reconstruction": [picture(kind, x, L, RED) for kind, x in zip(kinds, outputs)]},
        [f"{x['model']}\nerror / trivial {x['error'] / x['trivial']:.2f}" for x in rows], L),
        "representations", "Representations and nets: one configuration of the test set")

    training = [row for row in history if row["model"] == MAIN]
    sweeps = [row for row in history if row["epoch"] == args.other_epochs
              and row["model"] in trained.keys() - MODELS.keys() | {MAIN}]
    d, mean = distance_matrix(test), sum(distance_matrix(part).sum(0) for part in xy.split(2000))
    mean, normal = mean / len(xy), evaluate(nets, model, d)
    run.figure(plot_latent(normal["mu"], gammas, training, sweeps), "latent",
               "Codes of the test set; training; latent size and λ")
    original, x_hat = d[:, 0].cpu(), normal["x_hat"][:, 0].cpu()
    shape, (points, fitted, tumbled), energies = geometry(x_hat[:, None], test.cpu(), gammas, L)
    firsts = {f"γ = {g:g}": (gammas == g).nonzero()[0, 0] for g in gammas.unique()}
    names = ("r / (L√2),\n0 (dark) to 1", "reconstruction", "difference,\n−0.2 (blue) to 0.2",
             "points", "Gram matrix, Procrustes\n(grey: original)", "Gram matrix, turbo tumbler")
    run.figure(gallery({
        label: [original[k], x_hat[k], x_hat[k] - original[k], {BLUE: points[k]},
                {"0.8": points[k], RED: fitted[k]}, {RED: tumbled[k]}]
        for label, k in firsts.items()}, names, L), "matrices",
        "Distance matrices and the points they hold")
    run.figure(plot_energies(energies, gammas), "energies",
               f"Energies: Jensen–Shannon distance {shape['js']:.3f}")

    anomalies = {name: sets[name]["xy"].to(args.device) / (L * math.sqrt(2)) for name in sets
                 if name in ("unseen", "fake", "random") or "moved" in sets[name]}
    anomalies = {name: distance_matrix(x if "moved" in sets[name] else by_origin(x))
                 for name, x in anomalies.items()}
    anomaly, found = anomaly_rows(nets, model, normal, gammas, anomalies)
    run.figure(plot_anomalies(found, anomalies, gammas), "anomalies",
               "Anomalies against the test set")
    change = {name: change_of_rest(normal["x_hat"], found[name]["x_hat"], sets[name]["moved"])
              for name in anomalies if "moved" in sets[name]}
    hidden = {found["parameters"]["size"]: found for found in sets.values() if "where" in found}
    missing, sheet = missing_rows(nets, model, d[:500], mean, hidden)
    names = "original", "black", "reconstructed", "filled and\nreconstructed"
    run.figure(plot_sheet(sheet, names, [f"{size} × {size}" for size in hidden]), "missing",
               "Missing data")
    probed, sheet = probe(nets, normal, d, mean, common.generator(args.seed, "probe", args.device))
    names = ["z = 0, mean, real", *(f"$z_{{{k}}}$ from −3 to 3" for k in probed["top"]),
             "draws along\nthese alone", "draws along\nall"]
    run.figure(plot_sheet(sheet, names), "probe",
               "Latent space probing: the origin, the five dimensions of largest KL, draws")
    return {"fluid": fluid, "long": long, "training": training, "sweeps": sweeps,
            "representations": rows, "codes": code_figures(normal["mu"], gammas), "geometry": shape,
            "anomalies": anomaly, "change of the rest": change, "missing": missing, "probe": probed}


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    label = f"N = {args.particles}, L = {args.box:g}, T = {args.temperature:g}"
    with common.Run(__file__, args, label, additive=("latents", "lambdas")) as run:
        sets, xy, test, gammas = make_sets(run, args)
        trained, history = train_all(run, args, xy, test)
        results = study(run, args, sets, trained, history, xy, test, gammas)
        for title, key in (("Data sets", "fluid"), ("Run to equilibrium", "long"),
                           ("Representations and nets", "representations"),
                           ("Anomalies", "anomalies"), ("Missing data: RMSE", "missing")):
            common.print_rows(title, results[key])
        common.print_rows("Mean heights / σ", results["geometry"]["heights"])
        faithful = (args.particles, args.box, args.temperature, args.sweeps) == (30, 10, 0.75, 2500)
        claims = (net_claims(results, args.other_epochs) + anomaly_claims(results, args.unseen)
                  + fluid_claims(results, faithful))
        records = [{"set": name, "gamma": g, "sweep": sweep} | {
            key: found[key][i, k].item() for key in ("energy", "error", "acceptance", "height")}
            for name, found in sets.items() if name.startswith(("fluid", "long"))
            for k, g in enumerate(found["parameters"]["gamma"])
            for i, sweep in enumerate(found["sweep"].tolist())]
        return run.finish(results, claims, history + records)


if __name__ == "__main__":
    main()
