"""Autoencoders on the surface of a cube: noise, information rate, KL, MMD, annealing, search.

Reproduces M. DaRocha, "Autoencoders & Controlling Latent Space for Generative Modeling" (VUW,
AIML425, 2024). Each model f1-f6 is a row of MODELS and minimises

    L = MSE(x, x_hat) + c * mean_j [E(y_j)^2 + (Var(y_j) - 1)^2] + beta_t * KL + lambda_t * MMD^2

(Eq. 5 with f2's moment penalty) where z = y + noise of variance 10^(-SNR/10) + exp(logvar(x)): the
channel's, the encoder's, or both. MSE is a mean over points and coordinates; KL, in nats, is a mean
over points and a sum over latent dimensions; MMD^2 is unbiased.

    python ae_cube.py                   all models, 3 seeds: about 4 minutes on 2 CPU cores
    python ae_cube.py --tune            adds the Optuna search: about 4 minutes more
    python ae_cube.py --models f2 --snr 12 --latent 6 --out out/f2      one point of the plane

A run leaves figures, results.json, metrics.csv and the nets (units/*.pt) in out/ae_cube-<preset>.
It has not been timed on a GPU.

What the document leaves open, and what we chose:
* Nets 3-64-64-d-64-64-3, tanh (ReLU stops f2 at 0.0054 +- 0.0002), Adam at 1e-2, falling linearly
  to 0 over the second half; 10,000 training points, 4,000 steps of 250 (paper: 16,000; the document
  logs 900 to 1,400 epochs of unknown size). f2-wide: 160 hidden units and twice the steps.
* SNR is in dB against a signal of variance 1, so the noise is fixed. Nothing holds f1's signal to
  that variance, and it outgrows the noise; in row "f1 held" the noise follows the signal.
* f2's penalty is on y, before the noise (its rates are those of Var(z) = 1 + noise), with c = 1;
  f4 has lambda = 1.
* The textbook weight beta = 1 collapses f3: its loss stays at the variance 5/9. The document's
  0.3467 lies below that; a weight of 0.1 per nat comes near it. Both are rows of f3.
* f4 and f5 add the encoder's noise to the channel's. The target "fitted" is the Gaussian with the
  latents' own moments, its SNR held as in f1. MMD sees the first 64 points of a batch.
* f5 rises over the first two thirds of the epochs; "f5 Optuna" has the weights that the document's
  search ended with. Its range is not stated: ours, "f5 tuned", reaches down to f4 and f6.
* The estimator of the generative KL is not stated; ours is the k-nearest-neighbour one. Only its
  order compares: for points off the surface the true divergence is infinite.
* f6 is the document's future work: a beta-VAE whose beta is annealed from 0.
"""
import itertools
import math
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import common

# P sweep points, S seeds, M = P * S nets side by side, B batch, D latent dimensions (masked to d)
PRESETS = {
    "smoke": dict(seeds=2, epochs=3, points=1000, held_out=500, trials=8),
    "quick": dict(seeds=3, epochs=100, points=10_000, held_out=10_000, trials=40),
    "paper": dict(seeds=10, epochs=400, points=10_000, held_out=10_000, trials=120),
}
BATCH, MMD_ROWS, LEARNING_RATE = 250, 64, 1e-2
ANNEAL = 2 / 3  # tau of Eq. (6) as a share of the epochs
NO_CHANNEL = math.inf  # dB
WIDE = {"f2-wide": (160, 2)}  # hidden units, factor on the epochs; all others (64, 1)


class Point(NamedTuple):
    """One autoencoder to train: a model at an SNR (dB) and latent size d."""
    name: str
    snr: float
    d: int
    c: float = 0.0             # weight of the moment penalty
    beta: tuple = (0.0, 0.0)   # weight of the KL, at the start and from tau on
    lam: tuple = (0.0, 0.0)    # weight of the MMD, likewise
    stochastic: bool = True    # does the encoder put out a variance?
    fitted: bool = False       # latent target: its own moments (True) or N(0, 1)
    held: bool = False         # does the channel's noise follow the signal's variance?


F1, F2 = dict(stochastic=False, fitted=True), dict(stochastic=False, c=1.0)
MODELS = {  # model: SNRs in dB, latent sizes, {row: what differs from Point's defaults}
    "f1": ((5, 15), (6,), {"f1": F1, "f1 held": dict(F1, held=True)}),
    "f2": ((5, 10, 15, 20), (2, 4, 6, 8), {"f2": F2}),  # Figure A
    "f2-wide": ((15,), (6,), {"f2-wide": F2}),
    "f3": ((NO_CHANNEL,), (6,), {f"f3 beta={b:g}": dict(beta=(b, b)) for b in (1, 0.1)}),
    "f4": ((5, 10, 15), (4, 6, 8), {  # Figures B and C
        "f4 standard": dict(lam=(1, 1)), "f4 fitted": dict(lam=(1, 1), fitted=True, held=True)}),
    "f5": ((15,), (6,), {"f5 annealed": dict(beta=(1, 10), lam=(0.01, 1)),  # Table 5
                         "f5 Optuna": dict(beta=(1, 10), lam=(0.01, 0.1))}),
    "f6": ((NO_CHANNEL,), (6,), {
        f"f6 beta={b:g}": dict(beta=(0, b)) for b in (0.001, 0.003, 0.01, 0.03, 0.1)}),
}
SEARCH = dict(beta=(1e-4, 10.0), lam=(1e-2, 10.0))  # range of the final weights of "f5 tuned"
HEADS = [  # one point a model for the figures
    ("f1", 15, 6), ("f2", 15, 6), ("f3 beta=0.1", NO_CHANNEL, 6), ("f4 standard", 15, 8),
    ("f4 fitted", 15, 8), ("f5 annealed", 15, 6), ("f5 tuned", 15, 6),
    ("f6 beta=0.01", NO_CHANNEL, 6),
]
DOCUMENT = [  # claim, (row, SNR, d), measure, published; holds if ours is at most as large
    ("Table 1: f1 MSE (SNR not stated, 15 dB here)", ("f1", 15, 6), "mse", 0.0920),
    ("Table 1: f1 MSE, SNR held, 5 dB", ("f1 held", 5, 6), "mse", 0.0920),
    ("Table 2: f2 total loss, 15 dB, d=6", ("f2", 15, 6), "total", 0.0052),
    ("Table 2: f2 bits per neuron (within 0.03)", ("f2", 15, 6), "rate", 2.528),
    ("Table 2: f2-wide total loss", ("f2-wide", 15, 6), "total", 0.0052),
    ("Table 3: f3 total loss, beta=1", ("f3 beta=1", NO_CHANNEL, 6), "total", 0.3467),
    ("Table 3: f3 total loss, beta=0.1", ("f3 beta=0.1", NO_CHANNEL, 6), "total", 0.3467),
    *[(f"Table 4: {row} {text}, 15 dB, d=8", (row, 15, 8), measure, value)
      for row in ("f4 standard", "f4 fitted") for text, measure, value in
      (("MSE", "mse", 0.0042), ("MMD²", "mmd", 0.0408), ("generative KL", "knn_kl", 2.983))],
    *[(f"Table 5: {row} {text}", (row, 15, 6), measure, value)
      for row, values in (("f5 annealed", (0.4364, 0.0309, 4.517)),
                          ("f5 Optuna", (0.6700, 0.0271, 7.050)))
      for text, measure, value in zip(("total loss", "MMD²", "generative KL"),
                                      ("total", "mmd", "knn_kl"), values)],
]


# --- data ----------------------------------------------------------------------------------------

def cube_surface(n, generator):
    """n points (n, 3) uniform over the surface of [-1, 1]^3; the variance is 5/9 a coordinate."""
    device = generator.device
    x = torch.rand(n, 3, generator=generator, device=device) * 2 - 1
    face = torch.randint(6, (n,), generator=generator, device=device)
    x[torch.arange(n, device=device), face // 2] = (face % 2 * 2 - 1).to(x.dtype)
    return x


def nearest_face(x):
    """Number 0..5 of the face of the cube nearest to each point. (..., 3) -> (...)"""
    axis = x.abs().argmax(-1)
    return 2 * axis + (x.gather(-1, axis[..., None])[..., 0] > 0)


def surface_distance(x):
    """Euclidean distance to the surface of [-1, 1]^3 from inside or outside. (..., 3) -> (...)"""
    outside = (x.abs() - 1).clamp(min=0).norm(dim=-1)
    return outside + (1 - x.abs().amax(-1)).clamp(min=0)


def normals(generators, points, n, D):
    """Standard normal numbers (M, n, D): each seed's own, the same at all points of a sweep."""
    draws = [torch.randn(n, D, generator=g, device=g.device) for g in generators]
    return torch.stack(draws).repeat(points, 1, 1)


# --- model ---------------------------------------------------------------------------------------

class StackedMLP(nn.Module):
    """M tanh nets side by side, one batched product per layer. (M, B, in) -> (M, B, out)

    Each seed's generator draws one He-uniform net for all sweep points; order (point, seed).
    """

    def __init__(self, sizes, generators, points):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            for group, rows, bound in ((self.weights, fan_in, math.sqrt(6 / fan_in)),
                                       (self.biases, 1, math.sqrt(1 / fan_in))):
                draws = [torch.rand(rows, fan_out, generator=g, device=g.device)
                         for g in generators]
                group.append((torch.stack(draws).repeat(points, 1, 1) * 2 - 1) * bound)

    def forward(self, h):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, torch.tanh(h) if i else h, weight)  # (M, B, out)
        return h


class Stack(nn.Module):
    """The autoencoders of all points and seeds of one model, and their settings as tensors.

    Latent sizes differ by a mask over D = max d dimensions.
    """

    def __init__(self, points, generators, width=64):
        super().__init__()
        device, self.D = generators[0].device, max(p.d for p in points)
        self.encoder = StackedMLP([3, width, width, 2 * self.D], generators, len(points))
        self.decoder = StackedMLP([self.D, width, width, 3], generators, len(points))

        def column(values):  # one value per point -> (M, 1, 1)
            values = [float(v) for v in values for _ in generators]
            return torch.tensor(values, device=device).view(-1, 1, 1)

        self.noise = column(10 ** (-p.snr / 10) for p in points)  # the channel's variance
        self.stochastic = column(p.stochastic for p in points)
        self.fitted = column(p.fitted for p in points) > 0
        self.held = column(p.held for p in points) > 0
        self.mask = (torch.arange(self.D, device=device) < column(p.d for p in points)).float()
        self.c = column(p.c for p in points).view(-1)  # (M,)
        self.beta, self.lam = ([column(getattr(p, key)[end] for p in points).view(-1)
                                for end in (0, 1)] for key in ("beta", "lam"))

    def encode(self, x):
        """y and var of z = y + sqrt(var) eps. (M, B, 3) -> (M, B, D), (M, B, D)"""
        y, logvar = self.encoder(x).chunk(2, -1)
        power = torch.where(self.held, y.var(1, keepdim=True), 1.0)
        return y * self.mask, self.noise * power + self.stochastic * logvar.clamp(-30, 20).exp()

    def decode(self, z):
        """(M, B, D) -> (M, B, 3)"""
        return self.decoder(z * self.mask)

    def target(self, z, gauss):
        """Draws of each net's latent target from standard normal ones. (M, B, D) -> (M, B, D)

        The gradient flows through the moments, as it does through r in the kernel. Held constant,
        they make spreading the latents look like progress, and the nets run away.
        """
        own = z.mean(1, keepdim=True) + z.std(1, keepdim=True) * gauss
        return torch.where(self.fitted, own, gauss) * self.mask


# --- objective -----------------------------------------------------------------------------------

def information_rate(z, var, mask):
    """Bits per neuron, 1/2 log2(Var(z_j) / var_j), Eq. (13), mean over points and neurons. (M,)

    d times this bounds the information that z has on x: a Gaussian has the most entropy.
    """
    var = var.expand_as(z)
    bits = 0.5 * (z.var(1).clamp(min=1e-30).log2() - var.log2().mean(1))  # (M, D)
    return (bits * mask[:, 0]).sum(1) / mask.sum((1, 2))


def moment_penalty(y, mask):
    """Squared deviations of means from 0 and variances from 1, mean over dimensions. (M,)"""
    penalty = y.mean(1) ** 2 + (y.var(1) - 1) ** 2  # (M, D)
    return (penalty * mask[:, 0]).sum(1) / mask.sum((1, 2))


def kl_to_standard(mu, var, mask):
    """KL(N(mu, var) || N(0, 1)) in nats, sum over dimensions, mean over points. (M,)"""
    return (0.5 * (mu ** 2 + var - 1 - var.log()) * mask).sum(2).mean(1)


def squared_distances(a, b):
    """||a_i - b_j||^2. (M, B, D), (M, C, D) -> (M, B, C)"""
    norms = (a ** 2).sum(2)[:, :, None] + (b ** 2).sum(2)[:, None, :]
    return torch.baddbmm(norms, a, b.transpose(1, 2), alpha=-2).clamp(min=0)


def median_heuristic(a, b, rows=32):
    """Kernel width r: median squared distance among the first rows of a and b pooled. (M, 1, 1)"""
    pooled = torch.cat([a[:, :rows], b[:, :rows]], 1)
    i, j = torch.triu_indices(pooled.shape[1], pooled.shape[1], 1, device=a.device)
    distances = squared_distances(pooled, pooled)[:, i, j]
    return distances.median(1).values.clamp(min=1e-12)[:, None, None]


def mmd2(a, b, r):
    """Unbiased MMD^2, kernel exp(-||x - y||^2 / r). (M, B, D), (M, C, D) -> (M,)"""
    def off_diagonal_mean(k):
        n = k.shape[1]
        return (k.sum((1, 2)) - k.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))
    aa, bb, ab = (torch.exp(-squared_distances(*pair) / r) for pair in ((a, a), (b, b), (a, b)))
    return off_diagonal_mean(aa) + off_diagonal_mean(bb) - 2 * ab.mean((1, 2))


def annealed(start, end, t, tau):
    """start + (end - start) min(1, t / tau): Eq. (6) for 0 to 1."""
    return start + (end - start) * min(1.0, t / tau)


TERMS = ("mse", "moments", "kl", "mmd", "rate", "total")


def terms(stack, x, eps, gauss, beta, lam):
    """TERMS (6, M) of the nets from x (M, B, 3), eps (M, B, D), weights beta and lam (M,).

    gauss: standard normal numbers (M, C, D) for the MMD of the first C points, None: no MMD.
    """
    y, var = stack.encode(x)
    z = (y + var.sqrt() * eps) * stack.mask
    mse = ((stack.decode(z) - x) ** 2).mean((1, 2))  # Eq. (14)
    moments, kl = moment_penalty(y, stack.mask), kl_to_standard(y, var, stack.mask)
    mmd = torch.zeros_like(mse)
    if gauss is not None:
        a, b = z[:, :gauss.shape[1]], stack.target(z, gauss)
        mmd = mmd2(a, b, median_heuristic(a, b))
    total = mse + stack.c * moments + beta * kl + lam * mmd  # Eq. (5)
    return torch.stack([mse, moments, kl, mmd, information_rate(z, var, stack.mask), total])


# --- train ---------------------------------------------------------------------------------------

def train(points, seeds, name, epochs, n, device="cpu", width=64, compile=False, checkpoint=None):
    """Train all points x seeds side by side: (Stack, epoch means of TERMS (epochs, 6, M)).

    Every seed has its own generator for its nets, n training points, batches and noise, so that a
    result depends neither on the other seeds nor, at equal D, on the other points of the sweep.
    Raises FloatingPointError at a non-finite loss.
    """
    generators = [common.generator(seed, name, device) for seed in seeds]
    stack = Stack(points, generators, width).to(device)
    data = torch.stack([cube_surface(n, g) for g in generators])  # (S, n, 3)
    P, S, steps = len(points), len(seeds), n // BATCH
    use_mmd, loss = any(any(p.lam) for p in points), common.compiled(terms, compile)
    optimiser = torch.optim.Adam(stack.parameters(), lr=LEARNING_RATE, fused=True)
    history, first = torch.zeros(epochs, len(TERMS), P * S, device=device), 0
    parts = [stack, optimiser, *generators]
    if checkpoint and checkpoint.state:
        first, history = checkpoint.restore(*parts)
    bar = tqdm(range(first, epochs), f"{name}, {P * S} nets", epochs, initial=first, disable=None)
    for epoch in bar:
        beta, lam = (annealed(*ends, epoch, ANNEAL * epochs) for ends in (stack.beta, stack.lam))
        order = torch.stack([torch.cat(common.batches(n, n, g)) for g in generators])  # (S, n)
        x = data.gather(1, order[:, :, None].expand(-1, -1, 3))
        eps = normals(generators, 1, n, stack.D)
        gauss = normals(generators, 1, steps * MMD_ROWS, stack.D) if use_mmd else None
        values = []
        for i in range(steps):
            rows, kernel_rows = (slice(i * k, (i + 1) * k) for k in (BATCH, MMD_ROWS))
            done = (epoch * steps + i) / (epochs * steps)
            optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 2 * (1 - done))
            value = loss(stack, x[:, rows].repeat(P, 1, 1), eps[:, rows].repeat(P, 1, 1),
                         gauss[:, kernel_rows].repeat(P, 1, 1) if use_mmd else None, beta, lam)
            optimiser.zero_grad()
            value[-1].sum().backward()  # no weight is shared: the sum trains each on its own loss
            optimiser.step()
            values.append(value.detach())
        values = torch.stack(values)  # (steps, 6, M)
        history[epoch] = values.mean(0)
        if not torch.isfinite(values).all():
            step, term, m = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise FloatingPointError(f"{points[m // S].name}: the term {TERMS[term]} is not finite "
                                     f"at step {epoch * steps + step}")
        bar.set_postfix_str(f"mse {history[epoch, 0].mean():.4f}", refresh=False)
        if checkpoint and checkpoint.due():
            checkpoint.save((epoch + 1, history), *parts)
    return stack, history


# --- evaluate ------------------------------------------------------------------------------------

def pairwise(a, b):
    """Euclidean distances (n, m) between two sets of points, exact also for close pairs."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def knn_kl(x, y, k=5):
    """KL(p_x || p_y) in nats from samples (n, D), (m, D), by k-th neighbours (Wang et al. 2009)."""
    rho = pairwise(x, x).kthvalue(k + 1, dim=1).values  # the first neighbour is the point itself
    nu = pairwise(x, y).kthvalue(k, dim=1).values
    return x.shape[1] * (nu / rho).log().mean() + math.log(len(y) / (len(x) - 1))


def energy_distance(x, y):
    """Unbiased 2 E||X - Y|| - E||X - X'|| - E||Y - Y'||, 0 only for equal distributions."""
    within = sum(pairwise(a, a).sum() / (len(a) * (len(a) - 1)) for a in (x, y))
    return 2 * pairwise(x, y).mean() - within


def analytic_rate(snr):
    """Bits per neuron of a Gaussian signal of variance 1 at this SNR (dB)."""
    return 0.5 * math.log2(1 + 10 ** (snr / 10))


def linear_code_mse(snr, d):
    """MSE of the best linear code with d neurons of signal variance 1 at this SNR (dB)."""
    sent = min(d, 3)  # more neurons repeat the three coordinates, fewer leave some out
    return 5 / 9 * (1 - sent / 3 + (sent / 3) / (1 + d / sent * 10 ** (snr / 10)))


def shannon_lower_bound(bits):
    """Least MSE of any code at a total rate, for a source uniform over a surface of area 24.

    The form for high rates: below about 4 bits it is no bound (at 0 it exceeds the variance 5/9).
    """
    return (2 / 3) * 24 * 2 ** (-bits) / (2 * math.pi * math.e)


@torch.no_grad()
def evaluate(stack, points, seeds, n, pairs=2000):
    """Measure the nets on n held-out points, the same for all models: {measure: (P, S)} and the
    first seed's arrays x, x_hat, generated (P, up to 1,000, 3) and z (P, up to 1,000, D).

    rate is in bits per neuron, bits in all neurons together; kl, knn_kl in nats; signal is Var(y).
    Generated points are decoded draws of the latent target: spread is their standard deviation
    (the data's is 0.745), surface their mean distance to the cube, "face +x" etc. the share
    nearest to each face, faces the largest deviation of a share from 1/6.
    """
    def generators(part):
        return [common.generator(seed, f"held-out {part}", stack.c.device) for seed in seeds]

    P, mask = len(points), stack.mask
    x = torch.stack([cube_surface(n, g) for g in generators("x")]).repeat(P, 1, 1)  # (M, n, 3)
    y, var = stack.encode(x)
    z = (y + var.sqrt() * normals(generators("eps"), P, n, stack.D)) * mask
    unit_signal = (stack.stochastic == 0) & ~stack.fitted  # f2 wants Var(y) = 1, so z is wider
    target = stack.target(z, normals(generators("z"), P, n, stack.D))
    target = target * torch.where(unit_signal, 1 + stack.noise, 1.0).sqrt()
    x_hat, generated = stack.decode(z), stack.decode(target)
    d, k = mask.sum((1, 2)), min(pairs, n)
    out = {"mse": ((x_hat - x) ** 2).mean((1, 2)), "moments": moment_penalty(y, mask),
           "kl": kl_to_standard(y, var, mask), "rate": information_rate(z, var, mask),
           "signal": (y.var(1) * mask[:, 0]).sum(1) / d,
           "spread": generated.var(1).mean(1).sqrt(),
           "surface": surface_distance(generated).mean(1)}
    out["bits"] = out["rate"] * d
    share = nn.functional.one_hot(nearest_face(generated), 6).float().mean(1)  # (M, 6)
    out["faces"] = (share - 1 / 6).abs().amax(1)
    out |= zip((f"face {side}{axis}" for axis in "xyz" for side in "-+"), share.T)
    values = []
    for m in tqdm(range(len(x)), f"measuring {len(x)} nets", disable=None, leave=False):
        a, b = z[m:m + 1, :k], target[m:m + 1, :k]  # (1, k, D)
        values.append(torch.stack([mmd2(a, b, median_heuristic(a, b, 500))[0],
                                   knn_kl(x[m, :k], generated[m, :k]),
                                   energy_distance(x[m, :k], generated[m, :k])]))
    out |= zip(("mmd", "knn_kl", "energy"), torch.stack(values, 1))
    out["total"] = (out["mse"] + stack.c * out["moments"] + stack.beta[1] * out["kl"]
                    + stack.lam[1] * out["mmd"])  # Eq. (5) with the final weights
    arrays = {"x": x, "x_hat": x_hat, "generated": generated, "z": z}
    return ({key: value.view(P, -1).cpu() for key, value in out.items()},
            {key: value[::len(seeds), :1000].cpu().clone() for key, value in arrays.items()})


# --- search --------------------------------------------------------------------------------------

def tuned_point(beta, lam):
    """f5 with weights that rise from a tenth to beta and lam, as in the document's own log."""
    return Point("f5 tuned", 15, 6, beta=(beta / 10, beta), lam=(lam / 10, lam))


def propose(trials, space, seed, count):
    """`count` proposals {parameter: value} of Optuna's TPE sampler after these trials.

    The sampler starts anew from the seed and is told all earlier trials, so that a search that is
    continued later proposes what an undisturbed one would.
    """
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: optuna.distributions.FloatDistribution(*ends, log=True)
             for key, ends in space.items()}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=count, constant_liar=True))
    for trial in trials:
        study.add_trial(optuna.trial.create_trial(
            params={key: trial[key] for key in space}, distributions=space, value=trial["knn_kl"]))
    return [study.ask(space).params for _ in range(count)]


def search(run, args, seeds, batch=8):
    """Trials [{beta, lam, knn_kl}] towards the least knn_kl, mean over seeds; `batch` a work unit.

    They are measured on 2,000 points of their own, not on the held-out ones.
    """
    trials = []

    def one_round(name, checkpoint):
        seed = common.generator(args.seed, name).initial_seed() % 2 ** 32
        proposals = propose(trials, SEARCH, seed, batch)
        points = [tuned_point(**proposal) for proposal in proposals]
        stack, _ = train(points, seeds, name, args.epochs, args.points, args.device,
                         compile=args.compile, checkpoint=checkpoint)
        validation = [seed + 2 ** 32 for seed in seeds]
        values = evaluate(stack, points, validation, 2000)[0]["knn_kl"].mean(1)
        return [dict(p, knn_kl=value.item()) for p, value in zip(proposals, values)]

    while len(trials) < args.trials:
        name = f"f5-search-{len(trials)}"
        trials += run.unit(name, lambda checkpoint: one_round(name, checkpoint))
    return trials


# --- plot ----------------------------------------------------------------------------------------

def plot_clouds(panels, rows):
    """Rows of 3-D clouds on the same axes; panels: (title, x (n, 3), face of each point (n,))."""
    columns = len(panels) // rows
    fig = Figure(figsize=(max(4.5, 2.1 * columns), 2.3 * rows + 0.7), layout="constrained")
    for i, (title, x, face) in enumerate(panels):
        ax = fig.add_subplot(rows, columns, i + 1, projection="3d")
        ax.scatter(*x.T.numpy(), c=[common.COLOURS[f] for f in face], s=3, linewidths=0)
        ax.set(**dict.fromkeys(("xlim", "ylim", "zlim"), (-1.3, 1.3)),
               **dict.fromkeys(("xticks", "yticks", "zticks"), (-1, 0, 1)))
        ax.set_box_aspect((1, 1, 1), zoom=1.1)
        ax.tick_params(labelsize=6, pad=-3)
        ax.set_title(title, fontsize="small")
    return fig


def plot_latents(panels):
    """Histograms of every latent dimension against N(0, 1); panels: (title, z (n, d))."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig = Figure(figsize=(3 * columns, 2.4 * rows + 0.7), layout="constrained")
    u = torch.linspace(-4, 4, 161)
    for i, (title, z) in enumerate(panels):
        ax = fig.add_subplot(rows, columns, i + 1, xlim=(-4, 4), ylim=(0, 0.9),
                             xlabel="latent z", ylabel="density")
        for values, colour in zip(z.T.numpy(), itertools.cycle(common.COLOURS)):
            ax.hist(values, bins=u[::5], density=True, histtype="step", lw=0.8, color=colour)
        ax.plot(u, (-u ** 2 / 2).exp() / math.sqrt(2 * math.pi), "k--", label="N(0, 1)")
        ax.set_title(f"{title}\nvariance {z.var(0).mean():.3g}", fontsize="small")
    fig.axes[0].legend(fontsize="small")
    return fig


def plot_rate_distortion(rows):
    """MSE against total information rate, best linear codes, lower bound; rows as in results."""
    fig = Figure(figsize=(9, 5.4), layout="constrained")
    ax = fig.subplots()
    top = 1.03 * max([10.0] + [row["measures"]["bits"]["mean"] for row in rows])
    colours = dict(zip(sorted({row["d"] for row in rows}), itertools.cycle(common.COLOURS)))
    marks = dict(zip(dict.fromkeys(row["name"].split(" beta")[0] for row in rows),
                     itertools.cycle("voDXs^P*<>p")))
    for d, colour in colours.items():
        code = [(d * analytic_rate(snr), linear_code_mse(snr, d)) for snr in range(-20, 61)]
        ax.plot(*zip(*code), "--", color=colour, lw=0.8, label=f"best linear code, d={d}")
    bits = torch.linspace(4, top, 50)
    ax.plot(bits, shannon_lower_bound(bits), "k", label="Shannon lower bound (high rate)")
    for row in rows:
        bits, mse = row["measures"]["bits"]["mean"], row["measures"]["mse"]
        ax.errorbar(bits, mse["mean"], yerr=mse["std"], marker=marks[row["name"].split(" beta")[0]],
                    color=colours[row["d"]], mfc=None if row["name"] == "f2" else "white")
    for name, mark in marks.items():
        ax.plot([], [], mark, color="0.4", mfc=None if name == "f2" else "white", label=name)
    ax.set(yscale="log", ylim=(1e-4, 1), xlim=(0, top), xlabel="total information rate (bits)",
           ylabel="MSE per coordinate, held-out points")
    fig.legend(loc="outside right", fontsize="small", title="colour: latent size d")
    return fig


def plot_search(trials):
    """History and landscape of the search; trials as from search."""
    fig = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2)
    value, number = torch.tensor([t["knn_kl"] for t in trials]), range(1, len(trials) + 1)
    left.plot(number, value, "o", color=common.COLOURS[0], markersize=4)
    left.plot(number, value.cummin(0).values, color=common.COLOURS[3])
    left.set(xlabel="trial (line: best so far)", ylabel="generative KL (nats)", yscale="log")
    dots = right.scatter([t["beta"] for t in trials], [t["lam"] for t in trials], c=value)
    right.set(xlabel="final β", ylabel="final λ", xscale="log", yscale="log")
    fig.colorbar(dots, ax=right, label="generative KL (nats)")
    return fig


def pictures(run, units, rows, trials):
    """Save all figures; clouds and latents are those of the first seed, curves means of seeds."""
    first = {p[:3]: {name: values[i] for name, values in result["arrays"].items()}
             for points, result in units.values() for i, p in enumerate(points)}
    curves = {p: result["history"][:, :, i].mean(-1)  # (epochs, 6)
              for points, result in units.values() for i, p in enumerate(points)}

    def panel(key, which, label=""):
        face = nearest_face(first[key]["generated" if which == "generated" else "x"])
        size = f"{key[1]:g} dB, d={key[2]}" if key[1] < NO_CHANNEL else f"d={key[2]}"
        return f"{label}{size}", first[key][which], face.tolist()

    run.figure(plot_clouds([("", *panel(next(iter(first)), "x")[1:])], 1), "target",
               "Figure 1: targets")
    for row, which, title in (("f2", "x_hat", "Figure A: f2, reconstructions"),
                              ("f4 standard", "generated", "Figure B: f4, target N(0, 1)"),
                              ("f4 fitted", "generated", "Figure C: f4, fitted Gaussian")):
        keys = [key for key in first if key[0] == row]
        if keys:
            run.figure(plot_clouds([panel(key, which) for key in keys], len({k[1] for k in keys})),
                       row.replace(" ", "_"), title)
    heads = [key for key in HEADS if key in first] or list(first)[:4]
    run.figure(plot_clouds([panel(key, "x_hat", f"{key[0]}\n") for key in heads]
                           + [panel(key, "generated", "generated\n") for key in heads], 2),
               "models", "Reconstructions (top) and generated points (bottom)")
    run.figure(plot_latents([(f"{key[0]}, d={key[2]}", first[key]["z"][:, :key[2]])
                             for key in heads]), "latents", "Latent marginals")

    def lines(chosen, term):
        return [(label, curves[p][:, TERMS.index(term)], colour, style)
                for p, (label, colour, style) in chosen.items()]

    f2 = [p for p in curves if p.name == "f2"]
    f2 = {p: (f"{p.snr:g} dB, d={p.d}", common.COLOURS[i // 4 % 8], (":", "-.", "-", "--")[i % 4])
          for i, p in enumerate(f2)}
    if f2:
        analytic = [(None, [analytic_rate(p.snr)] * len(curves[p]), "0.7", "-") for p in f2]
        panels = {f"MSE + moment penalty of {BATCH} points": lines(f2, "total"),
                  "bits per neuron (grey: analytic)": analytic + lines(f2, "rate")}
        run.figure(common.plot_curves(panels, ("log", "linear")), "training",
                   "f2: total loss and information rate")
    moving = [p for p in curves if p.name[:2] in ("f5", "f6")]
    moving = {p: (p.name, common.COLOURS[i % 8], "-") for i, p in enumerate(moving)}
    if moving:
        weights = [(label if style == "-" else None,
                    [annealed(*ends, t, ANNEAL * len(curves[p])) or math.nan
                     for t in range(len(curves[p]))], colour, style)
                   for p, (label, colour, _) in moving.items()
                   for ends, style in ((p.beta, "-"), (p.lam, ":"))]
        panels = {"weights β, λ (dotted)": weights, "MSE": lines(moving, "mse"),
                  "KL (nats)": lines(moving, "kl"), "MMD²": lines(moving, "mmd")}
        run.figure(common.plot_curves(panels, ("log", "log", "log", "linear")), "annealing",
                   "f5 and f6: annealing")
    run.figure(plot_rate_distortion(rows), "rate_distortion", "Rate and distortion")
    if trials:
        run.figure(plot_search(trials), "search", "Optuna's search for the weights of f5")


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__, PRESETS)
    group = parser.add_argument_group("flags of ae_cube.py")
    number = common.number
    group.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS),
                       help="which models to train")
    group.add_argument("--snr", nargs="+", type=number(float, -20, 60), metavar="DB",
                       help="SNRs in dB in place of the models' own (f3, f6 have no channel)")
    group.add_argument("--latent", nargs="+", type=number(int, 1, 64), metavar="D",
                       help="latent sizes in place of the models' own")
    group.add_argument("--seeds", type=number(int, 1, 100), help="seeds, counted from --seed")
    group.add_argument("--epochs", type=number(int, 1, 10**6), help=f"passes in batches of {BATCH}")
    group.add_argument("--points", type=number(int, BATCH, 10**6), help="training points")
    group.add_argument("--held-out", type=number(int, 100, 10**6), help="points to measure on")
    group.add_argument("--tune", action="store_true", help="also search f5's weights with Optuna")
    group.add_argument("--trials", type=number(int, 1, 10**4),
                       help="trials of each search, rounded up to eights")
    args = parser.parse(argv)
    args.models = [model for model in MODELS if model in args.models]
    return args


def sweep(model, snrs=None, sizes=None):
    """The Points of one model: its rows at all SNRs and latent sizes."""
    own, own_sizes, variants = MODELS[model]
    snrs = own if own == (NO_CHANNEL,) else snrs or own
    return [Point(name, snr, d, **settings) for name, settings in variants.items()
            for snr in dict.fromkeys(snrs) for d in dict.fromkeys(sizes or own_sizes)]


def fit(points, seeds, name, args, checkpoint):
    """Train and measure all points x seeds: one work unit {history (epochs, 6, P, S), measures,
    arrays, weights}."""
    width, factor = WIDE.get(name, (64, 1))
    stack, history = train(points, seeds, name, factor * args.epochs, args.points, args.device,
                           width, args.compile, checkpoint)
    measures, arrays = evaluate(stack, points, seeds, args.held_out)
    history = history.view(len(history), len(TERMS), len(points), len(seeds)).cpu()
    measures["gap"] = measures["mse"] / history[-1, 0] - 1  # to the last epoch's training MSE
    return {"history": history, "measures": measures, "arrays": arrays,
            "weights": stack.state_dict()}


def claims(rows):
    """Closing table (claim, document, here, holds): published figures, then the conclusions.

    A published figure holds if ours is at most as large. Claims whose points are missing are left
    out.
    """
    at = {(row["name"], row["snr"], row["d"]): row["measures"] for row in rows}
    table = []
    for claim, key, measure, published in DOCUMENT:
        if key in at:
            here, collapsed = at[key][measure], at[key]["spread"]["mean"] < 0.1
            holds = (abs(here["mean"] - published) <= 0.03 if measure == "rate"
                     else round(here["mean"], 4) <= published)
            table.append((claim, f"{published:g}", common.show(here) + " (collapsed)" * collapsed,
                          holds))

    f2 = {key[1:]: measures for key, measures in at.items() if key[0] == "f2"}
    mse, bits = ({key: f2[key][name]["mean"] for key in f2} for name in ("mse", "bits"))
    if all(p[:3] in at for p in sweep("f2")):
        falls = [mse[a] > mse[b] for a, b in itertools.combinations(sorted(f2), 2) if a[1] == b[1]]
        ratio = [mse[key] / linear_code_mse(*key) for key in f2 if key[1] >= 4]
        better = [f"{snr:g} dB d={d}: {mse[snr, d]:.4f}, {bits[snr, d]:.1f} bits" for snr, d in f2
                  if bits[snr, d] < bits[15, 6] and mse[snr, d] < mse[15, 6]]
        gap = f2[20, 6]["gap"]["mean"]
        table += [
            ("f2: MSE falls with SNR, at every d", "yes", f"{sum(falls)} of {len(falls)} pairs",
             all(falls)),
            ("f2: below the best linear code, d >= 4", "-",
             f"{min(ratio):.2f} to {max(ratio):.2f} of it", max(ratio) < 1),
            ("f2: 15 dB, d=6 is efficient (none better with fewer bits)", "yes",
             "; ".join(better) or f"{mse[15, 6]:.4f}, {bits[15, 6]:.1f} bits", not better),
            ("f2: overfits at 20 dB, d=6 (held-out MSE 5 % above training)", "yes", f"{gap:+.1%}",
             gap > 0.05)]

    def generative(model, d):  # least generative KL of the model's rows at 15 dB, and its row
        found = [(m["knn_kl"]["mean"], f"{row} {common.show(m['knn_kl'], 2)}")
                 for (row, snr, size), m in at.items()
                 if row.startswith(model) and snr in (15, NO_CHANNEL) and size == d]
        return min(found, default=None)

    for claim, document, row, d, other, better in (
            ("f4 generates better than f3", "yes", "f4 fitted", 8, "f3", True),
            ("f5 does not improve on f4: annealed", "yes", "f5 annealed", 6, "f4", False),
            ("f5 does not improve on f4: Optuna's weights", "yes", "f5 Optuna", 6, "f4", False),
            ("f5 does not improve on f4: our search", "yes", "f5 tuned", 6, "f4", False),
            ("f6, the future work, generates better than f4", "hoped", "f6", 6, "f4", True)):
        ours, theirs = generative(row, d), generative(other, 6)
        if ours and theirs:
            table.append((f"{claim} (generative KL)", document, f"{ours[1]}; {theirs[1]}",
                          (ours < theirs) == better))
    return table


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    seeds = list(range(args.seed, args.seed + args.seeds))
    with common.Run(__file__, args, "cube surface", additive=("tune", "trials")) as run:
        units, trials, rows, metrics = {}, [], [], []

        def add(name, points):
            units[name] = points, run.unit(name, lambda ckpt: fit(points, seeds, name, args, ckpt))

        for model in args.models:
            add(model, sweep(model, args.snr, args.latent))
        if args.tune:
            trials = search(run, args, seeds)
            best = min(trials, key=lambda trial: trial["knn_kl"])
            add(f"f5-tuned-{len(trials)}", [tuned_point(best["beta"], best["lam"])])
        for points, result in units.values():
            for i, p in enumerate(points):
                channel = p.snr < NO_CHANNEL
                rows.append({
                    "name": p.name, "snr": p.snr, "d": p.d, "beta": p.beta, "lam": p.lam,
                    "analytic_rate": analytic_rate(p.snr) if channel else None,
                    "linear_mse": linear_code_mse(p.snr, p.d) if channel else None, "measures":
                    {key: common.mean_std(v[i]) for key, v in result["measures"].items()}})
                metrics += [{"row": p.name, "snr": p.snr, "d": p.d, "seed": seed, "epoch": e + 1,
                             **dict(zip(TERMS, values.tolist()))} for s, seed in enumerate(seeds)
                            for e, values in enumerate(result["history"][:, :, i, s])]
        pictures(run, units, rows, trials)
        shown = {"total": 4, "mse": 4, "rate": 3, "mmd": 4, "knn_kl": 2, "energy": 3, "surface": 2,
                 "faces": 2}
        common.print_table(["row", "SNR", "d", *shown], [
            [row["name"], f"{row['snr']:g}", row["d"]]
            + [common.show(row["measures"][key], digits) for key, digits in shown.items()]
            for row in rows])
        return run.finish({"points": rows, "trials": trials}, claims(rows), metrics)


if __name__ == "__main__":
    main()
