"""Autoencoders on the surface of a cube: noise, information rate, KL, MMD, annealing, search.

Reproduces M. DaRocha, "Autoencoders & Controlling Latent Space for Generative Modeling" (VUW,
AIML425, 2024). Each model f1-f6 is a row of MODELS and minimises

    L = MSE(x, x_hat) + c * mean_j [E(y_j)^2 + (Var(y_j) - 1)^2] + beta_t * KL + lambda_t * MMD^2

(Eq. 5 with f2's moment penalty), z = y + noise of variance 10^(-SNR/10) + exp(logvar(x)): the
channel's, the encoder's, or both. MSE is a mean over points and coordinates; KL, in nats, a mean
over points and a sum over latent dimensions; MMD^2 is unbiased.

    python ae_cube.py                   all models, 3 seeds: about 5 minutes on 2 CPU cores
    python ae_cube.py --tune            adds the Optuna search: about 4 minutes more
    python ae_cube.py --models f2 --snr 12 --latent 6 --out out/f2      one point of the plane

A run leaves figures, results.json, metrics.csv and the nets (units/*.pt) in out/ae_cube-<preset>.
It has not been timed on a GPU. What the document leaves open, and what we chose:
* Nets 3-64-64-d-64-64-3, tanh (ReLU stops f2 at 0.0054 +- 0.0002), batches of 250, Adam at 1e-2,
  falling linearly to 0 over the second half; the document's logs have 1,000 to 1,500 epochs of
  unknown batches, ours 100 (paper: 400). f2-wide: 160 hidden units and twice the epochs.
* SNR is in dB against a signal of variance 1, so the noise is fixed. Nothing holds f1's signal to
  that variance, and it outgrows the noise; in row "f1 held" the noise follows the signal.
* f2's penalty is on y, before the noise (its rates are those of Var(z) = 1 + noise), with c = 1.
* The textbook beta = 1 collapses f3 to a loss of 5/9, the variance; 0.1 comes near the document's.
* f4 and f5 add the encoder's noise to the channel's. The target "fitted" is the Gaussian with the
  latents' own moments, the SNR as in "f1 held". f4 has lambda = 1, on 64 points of each batch.
* f5 rises over the first two thirds of the epochs; "f5 Optuna" has the weights that the document's
  search ended with. Its range is not stated: ours, "f5 tuned", reaches down to f4 and f6.
* f6 is the document's future work: a beta-VAE whose beta is annealed from 0.
* The generative KL is estimated by k nearest neighbours (the document does not say how). Only its
  order compares: for points off the surface the true divergence is infinite.
"""
import itertools
import math
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import common

# P sweep points, S seeds, M = P * S nets side by side, B batch, D latent dimensions (masked to d)
PRESETS = {
    "smoke": dict(seeds=2, epochs=3, points=1000, held_out=500, trials=8),
    "quick": dict(seeds=3, epochs=100, points=10_000, held_out=10_000, trials=40),
    "paper": dict(seeds=10, epochs=400, points=10_000, held_out=10_000, trials=120)}
BATCH, MMD_ROWS, RATE = 250, 64, 1e-2  # points, those in the MMD (quadratic cost), first rate
EXACT = dict(compute_mode="donot_use_mm_for_euclid_dist")  # of torch.cdist, also for close pairs
ANNEAL = 2 / 3  # tau of Eq. (6) as a share of the epochs: 1,000 of about 1,500 in Table 5
NO_CHANNEL = math.inf  # dB, noise of variance 0


class Point(NamedTuple):
    """One autoencoder to train: a model at an SNR (dB) and latent size d."""
    name: str
    snr: float
    d: int
    c: float = 0.0             # weight of the moment penalty
    beta: tuple = (0.0, 0.0)   # weight of the KL, at the start and from tau on
    lam: tuple = (0.0, 0.0)    # weight of the MMD, likewise
    stochastic: bool = True    # does the encoder put out a variance?
    fitted: bool = False       # latent target: own moments (True) or N(0, 1), f2: N(0, 1 + noise)
    held: bool = False         # does the channel's noise follow the signal's variance?
    width: int = 64            # hidden units
    longer: int = 1            # factor on the epochs

    def __str__(self):
        return f"{self.name}, " + f"{self.snr:g} dB, " * (self.snr < NO_CHANNEL) + f"d={self.d}"


F1, F2 = dict(stochastic=False, fitted=True), dict(stochastic=False, c=1.0)
MODELS = {  # model: SNRs in dB, latent sizes, {row: what differs from Point's defaults}
    "f1": ((5, 15), (6,), {"f1": F1, "f1 held": dict(F1, held=True)}),  # Table 1
    "f2": ((5, 10, 15, 20), (2, 4, 6, 8), {"f2": F2}),  # Table 2, Figure A
    "f2-wide": ((15,), (6,), {"f2-wide": dict(F2, width=160, longer=2)}),
    "f3": ((NO_CHANNEL,), (6,), {f"f3 beta={b:g}": dict(beta=(b, b)) for b in (1, .1, .01)}),
    "f4": ((5, 10, 15), (4, 6, 8), {  # Table 4, Figures B and C
        "f4 standard": dict(lam=(1, 1)), "f4 fitted": dict(lam=(1, 1), fitted=True, held=True)}),
    "f5": ((15,), (6,), {"f5 annealed": dict(beta=(1, 10), lam=(0.01, 1)),  # Table 5
                         "f5 Optuna": dict(beta=(1, 10), lam=(0.01, 0.1))}),
    "f6": ((NO_CHANNEL,), (6,), {f"f6 beta={b:g}": dict(beta=(0, b))
                                 for b in (0.001, 0.003, 0.01, 0.03, 0.1)})}
SEARCH = dict(beta=(1e-4, 10.0), lam=(1e-2, 10.0))  # range of the final weights of "f5 tuned"
HEADS = ("f1", "f2", "f3 beta=0.1", "f4 standard", "f4 fitted", "f5 annealed", "f6 beta=0.01",
         "f5 tuned")  # one row a model for the figures, at 15 dB or without a channel, d=6
TERMS = ("mse", "moments", "kl", "mmd", "rate", "total")
NAMES = dict(mse="MSE", kl="KL (nats)", mmd="MMD²", rate="bits per neuron", total="total loss",
             knn_kl="generative KL (k=5)", beta="weight β", lam="weight λ")
DOCUMENT = {  # table: {measure: published}, points (row, SNR, d); holds: ours <=, rate within 0.03
    "Table 1 (SNR not stated)": (dict(mse=0.0920), ("f1", 15, 6), ("f1 held", 5, 6)),
    "Table 2": (dict(total=0.0052, rate=2.528), ("f2", 15, 6), ("f2-wide", 15, 6)),
    "Table 3": (dict(total=0.3467), *((f"f3 beta={beta}", NO_CHANNEL, 6) for beta in (1, 0.1))),
    "Table 4": (dict(mse=0.0042, mmd=0.0408, knn_kl=2.983), ("f4 standard", 15, 8),
                ("f4 fitted", 15, 8)),
    "Table 5, fixed": (dict(total=0.4364, mmd=0.0309, knn_kl=4.517), ("f5 annealed", 15, 6)),
    "Table 5, tuned": (dict(total=0.6700, mmd=0.0271, knn_kl=7.050), ("f5 Optuna", 15, 6))}


# --- data ----------------------------------------------------------------------------------------

def cube_surface(n, generator):
    """n points (n, 3) uniform over the surface of [-1, 1]^3; the variance is 5/9 a coordinate."""
    device = generator.device
    x = torch.rand(n, 3, generator=generator, device=device) * 2 - 1
    face = torch.randint(6, (n,), generator=generator, device=device)  # 2 axis + side; equal areas
    x[torch.arange(n, device=device), face // 2] = (face % 2 * 2 - 1).to(x.dtype)
    return x


def nearest_face(x):
    """Number 0..5 of the face of the cube nearest to each point. (..., 3) -> (...)"""
    axis = x.abs().argmax(-1)
    return 2 * axis + (x.gather(-1, axis[..., None])[..., 0] > 0)  # numbered as in cube_surface


def surface_distance(x):
    """Euclidean distance to the surface of [-1, 1]^3 from inside or outside. (..., 3) -> (...)"""
    outside = (x.abs() - 1).clamp(min=0).norm(dim=-1)  # 0 for inner points
    return outside + (1 - x.abs().amax(-1)).clamp(min=0)


def draws(draw, generators, points, n, D):
    """torch.rand or torch.randn, (M, n, D): each seed's own, the same at all points of a sweep."""
    values = [draw(n, D, generator=g, device=g.device) for g in generators]
    return torch.stack(values).repeat(points, 1, 1)  # (S, n, D) -> (M, n, D), m = p * S + s


# --- model ---------------------------------------------------------------------------------------

class StackedMLP(nn.Module):
    """M tanh nets in the order (point, seed); a seed draws one (He-uniform) for all its points."""

    def __init__(self, sizes, generators, points):
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            for group, rows, gain in ((self.weights, fan_in, 6), (self.biases, 1, 1)):
                uniform = draws(torch.rand, generators, points, rows, fan_out) * 2 - 1
                group.append(uniform * math.sqrt(gain / fan_in))  # (M, in, out), (M, 1, out)

    def forward(self, h):
        """(M, B, in) -> (M, B, out), one batched product per layer."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, torch.tanh(h) if i else h, weight)
        return h


class Stack(nn.Module):
    """The autoencoders of all points and seeds of one model; a mask over D = max d sets each d."""

    def __init__(self, points, generators):
        super().__init__()
        device, width, self.D = generators[0].device, points[0].width, max(p.d for p in points)
        self.encoder = StackedMLP([3, width, width, 2 * self.D], generators, len(points))
        self.decoder = StackedMLP([self.D, width, width, 3], generators, len(points))
        settings = torch.tensor([[10 ** (-p.snr / 10), p.d, p.stochastic, p.fitted, p.held, p.c,
                                  *p.beta, *p.lam] for p in points for _ in generators],
                                device=device).T.contiguous()  # (10, M)
        self.noise, d, *flags = settings[:5, :, None, None]  # (M, 1, 1); the channel's variance
        self.stochastic, self.fitted, self.held = (flag > 0 for flag in flags)
        self.c, self.beta, self.lam = settings[5], settings[6:8], settings[8:]  # (M,), then (2, M)
        self.mask = (torch.arange(self.D, device=device) < d).float()  # (M, 1, D)

    def encode(self, x):
        """y and var of z = y + sqrt(var) eps. (M, B, 3) -> (M, B, D), (M, B, D)"""
        y, logvar = self.encoder(x).chunk(2, -1)  # (M, B, D); clamped: exp and log stay finite
        power = torch.where(self.held, y.var(1, keepdim=True), 1.0)  # (M, 1, D)
        return y * self.mask, self.noise * power + self.stochastic * logvar.clamp(-30, 20).exp()

    def target(self, z, gauss):
        """Draws of each net's latent target, z (M, B, D), from standard normal ones, (M, C, D)."""
        # gradients flow through the moments, as through r: held constant, they would shrink z
        own = z.mean(1, keepdim=True) + z.std(1, keepdim=True) * gauss  # (M, C, D)
        width = torch.where(self.stochastic, 1.0, 1 + self.noise).sqrt()  # f2: Var(y) = 1
        return torch.where(self.fitted, own, width * gauss) * self.mask


# --- objective -----------------------------------------------------------------------------------

def information_rate(z, var, mask):
    """Bits per neuron, 1/2 log2(Var(z_j) / var_j), Eq. (13), mean over points and neurons. (M,)"""
    bits = 0.5 * (z.var(1).clamp(min=1e-30).log2() - var.expand_as(z).log2().mean(1))  # (M, D)
    return (bits * mask[:, 0]).sum(1) / mask.sum((1, 2))  # 1e-30: no -inf * 0 where masked


def moment_penalty(y, mask):
    """Squared deviations of means from 0 and variances from 1, mean over dimensions. (M,)"""
    penalty = y.mean(1) ** 2 + (y.var(1) - 1) ** 2  # (M, D)
    return (penalty * mask[:, 0]).sum(1) / mask.sum((1, 2))  # Table 2's latent regularisation


def kl_to_standard(mu, var, mask):
    """KL(N(mu, var) || N(0, 1)) in nats, sum over dimensions, mean over points. (M,)"""
    return (0.5 * (mu ** 2 + var - 1 - var.log()) * mask).sum(2).mean(1)  # Eq. (9)


def squared_distances(a, b):
    """||a_i - b_j||^2. (M, B, D), (M, C, D) -> (M, B, C)"""
    norms = (a ** 2).sum(2)[:, :, None] + (b ** 2).sum(2)[:, None, :]
    return torch.baddbmm(norms, a, b.transpose(1, 2), alpha=-2).clamp(min=0)  # rounding


def median_heuristic(a, b, rows=32):
    """Kernel width r: median squared distance among the first rows of a and b pooled. (M, 1, 1)"""
    pooled = torch.cat([a[:, :rows], b[:, :rows]], 1)  # (M, 2 rows, D)
    i, j = torch.triu_indices(pooled.shape[1], pooled.shape[1], 1, device=a.device)
    distances = squared_distances(pooled, pooled)[:, i, j]  # (M, pairs)
    return distances.median(1).values.clamp(min=1e-12)[:, None, None]  # all the same: no 0 / 0


def mmd2(a, b, r):
    """Unbiased MMD^2, kernel exp(-||x - y||^2 / r). (M, B, D), (M, C, D) -> (M,)"""
    def off_diagonal_mean(k):
        n = k.shape[1]  # k(x, x) = 1 on the diagonal would bias the mean
        return (k.sum((1, 2)) - k.diagonal(dim1=1, dim2=2).sum(1)) / (n * (n - 1))
    aa, bb, ab = (torch.exp(-squared_distances(*pair) / r) for pair in ((a, a), (b, b), (a, b)))
    return off_diagonal_mean(aa) + off_diagonal_mean(bb) - 2 * ab.mean((1, 2))


def annealed(start, end, t, tau):
    """start + (end - start) min(1, t / tau): Eq. (6) for 0 to 1."""
    return start + (end - start) * min(1.0, t / tau)


def terms(stack, beta, lam, gauss, x, eps):
    """TERMS (6, M) on x (M, B, 3), weighted by beta and lam (M,), and the latents z (M, B, D)."""
    # standard normal: eps (M, B, D) and, for the MMD of C points, gauss (M, C, D) or None: no MMD
    y, var = stack.encode(x)
    z = (y + var.sqrt() * eps) * stack.mask  # Eq. (2), reparameterised as in Figure 2
    mse = ((stack.decoder(z) - x) ** 2).mean((1, 2))  # Eq. (14)
    moments, kl = moment_penalty(y, stack.mask), kl_to_standard(y, var, stack.mask)
    mmd = torch.zeros_like(mse)
    if gauss is not None:
        a, b = z[:, :gauss.shape[1]], stack.target(z, gauss)  # (M, C, D), moments from B points
        mmd = mmd2(a, b, median_heuristic(a, b))
    total = mse + stack.c * moments + beta * kl + lam * mmd  # Eq. (5); c: Table 2
    return torch.stack([mse, moments, kl, mmd, information_rate(z, var, stack.mask), total]), z


# --- train ---------------------------------------------------------------------------------------

def train(points, seeds, name, epochs, n, device="cpu", compile=False, checkpoint=None):
    """Train all points x seeds side by side: (Stack, epoch means of TERMS (epochs, 6, P, S)).

    A seed has its own generator for nets, n training points, batches and noise: results depend on
    no other seed nor, at equal D, other point. FloatingPointError where a loss is not finite.
    """
    epochs *= points[0].longer  # the same for all points of a model, as is the width
    P, S, steps = len(points), len(seeds), n // BATCH  # an incomplete last batch is left out
    generators = [common.generator(seed, name, device) for seed in seeds]
    stack = Stack(points, generators)
    data = torch.stack([cube_surface(n, g) for g in generators])  # (S, n, 3)
    use_mmd, loss = any(any(p.lam) for p in points), common.compiled(terms, compile)
    optimiser = torch.optim.Adam(stack.parameters(), lr=RATE, fused=True)
    parts = [stack, optimiser, *generators]  # without the data: the seeds draw it again
    first, history = (checkpoint.restore(*parts) if checkpoint and checkpoint.state
                      else (0, torch.zeros(epochs, len(TERMS), P * S, device=device)))
    bar = tqdm(range(first, epochs), f"{name}, nets: {P * S}", epochs, initial=first, disable=None)
    for epoch in bar:
        beta, lam = (annealed(*ends, epoch, ANNEAL * epochs) for ends in (stack.beta, stack.lam))
        order = torch.stack([torch.cat(common.batches(n, n, g)) for g in generators])  # (S, n)
        x = data.gather(1, order[:, :, None].expand(-1, -1, 3)).repeat(P, 1, 1)  # (M, n, 3)
        eps, gauss, values = draws(torch.randn, generators, P, n, stack.D), [None] * steps, []
        if use_mmd:  # gauss: steps of (M, MMD_ROWS, D)
            gauss = draws(torch.randn, generators, P, steps * MMD_ROWS, stack.D).split(MMD_ROWS, 1)
        for i, batch in enumerate(zip(gauss, x.split(BATCH, 1), eps.split(BATCH, 1))):
            done = (epoch * steps + i) / (epochs * steps)
            optimiser.param_groups[0]["lr"] = RATE * min(1.0, 2 * (1 - done))
            value, _ = loss(stack, beta, lam, *batch)  # (6, M)
            optimiser.zero_grad()
            value[-1].sum().backward()  # no weight is shared: the sum trains each on its own loss
            optimiser.step()
            values.append(value.detach())
        values = torch.stack(values)  # (steps, 6, M)
        history[epoch] = values.mean(0)
        if not torch.isfinite(values).all():  # once an epoch: looking waits for the device
            step, term, m = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise FloatingPointError(f"{points[m // S].name}: the term {TERMS[term]} is not finite "
                                     f"at step {epoch * steps + step}")
        bar.set_postfix_str(f"mse {history[epoch, 0].mean():.4f}", refresh=False)
        if checkpoint and checkpoint.due():
            checkpoint.save((epoch + 1, history), *parts)
    return stack, history.view(epochs, len(TERMS), P, S)  # M to P, S: m = p * S + s


# --- evaluate ------------------------------------------------------------------------------------

def knn_kl(x, y, k=5):
    """KL(p_x || p_y) in nats from samples (n, D), (m, D), by k-th neighbours (Wang et al. 2009)."""
    rho = torch.cdist(x, x, **EXACT).kthvalue(k + 1, dim=1).values  # k + 1: the first is itself
    nu = torch.cdist(x, y, **EXACT).kthvalue(k, dim=1).values  # (n,), no point of y is one of x
    return x.shape[1] * (nu / rho).log().mean() + math.log(len(y) / (len(x) - 1))


def energy_distance(x, y):
    """Unbiased 2 E||X - Y|| - E||X - X'|| - E||Y - Y'||, 0 only for equal distributions."""
    within = sum(torch.cdist(a, a, **EXACT).sum() / (len(a) * (len(a) - 1)) for a in (x, y))
    return 2 * torch.cdist(x, y, **EXACT).mean() - within


def analytic_rate(snr):
    """Bits per neuron of a Gaussian signal of variance 1 at this SNR (dB)."""
    return 0.5 * math.log2(1 + 10 ** (snr / 10))  # Eq. (13), Var(z) = 1 + noise


def linear_code_mse(snr, d):
    """MSE of the best linear code with d neurons of signal variance 1 at this SNR (dB)."""
    sent = min(d, 3)  # d > 3: each coordinate gets d / 3 neurons' worth; d < 3: some are left out
    return 5 / 9 * (1 - sent / 3 + (sent / 3) / (1 + d / sent * 10 ** (snr / 10)))


def shannon_lower_bound(bits):
    """Least MSE of any code for a surface of area 24; no bound below about 4 bits in total."""
    return (2 / 3) * 24 * 2 ** (-bits) / (2 * math.pi * math.e)  # error in 2 of 3 dimensions


@torch.no_grad()
def evaluate(stack, history, seeds, n, pairs=2000):
    """Measure the nets that train returned on n held-out points, the same for all models.

    Returns a work unit: weights, history, measures {name: (P, S)}, and the first seed's arrays x,
    x_hat, generated (P, up to 1,000, 3), z (P, up to 1,000, D). rate is in bits per neuron, bits in
    all of them, kl and knn_kl in nats; mmd, knn_kl and energy are of the first `pairs` points;
    signal is Var(y); gap, the excess over the last epoch's MSE. Generated points are decoded draws
    of the latent target: spread is their standard deviation (of the data: 0.745), surface their
    distance to the cube, "face +x" etc. the share nearest to a face, faces the worst |share - 1/6|.
    """
    for_x, for_eps, for_target = ([common.generator(s, f"held-out {part}", stack.c.device)
                                   for s in seeds] for part in ("x", "eps", "z"))
    P, mask, d = history.shape[2], stack.mask, stack.mask.sum((1, 2))  # d (M,)
    x = torch.stack([cube_surface(n, g) for g in for_x]).repeat(P, 1, 1)  # (M, n, 3)
    eps = draws(torch.randn, for_eps, P, n, stack.D)
    values, z = terms(stack, stack.beta[1], stack.lam[1], None, x, eps)  # (6, M), the MMD follows
    target = stack.target(z, draws(torch.randn, for_target, P, n, stack.D))  # (M, n, D)
    x_hat, generated = stack.decoder(z), stack.decoder(target)  # (M, n, 3)
    share = nn.functional.one_hot(nearest_face(generated), 6).float().mean(1)  # (M, 6)
    out = dict(zip(TERMS, values))  # {term: (M,)}
    out |= zip((f"face {side}{axis}" for axis in "xyz" for side in "-+"), share.T)
    out |= {"gap": out["mse"] / history[-1, 0].view(-1) - 1, "bits": out["rate"] * d,
            "signal": (stack.encode(x)[0].var(1) * mask[:, 0]).sum(1) / d,
            "spread": generated.var(1).mean(1).sqrt(), "faces": (share - 1 / 6).abs().amax(1),
            "surface": surface_distance(generated).mean(1)}
    values = []
    for m in tqdm(range(len(x)), f"measuring, nets: {len(x)}", disable=None, leave=False):
        a, b = z[m:m + 1, :pairs], target[m:m + 1, :pairs]  # (1, pairs, D)
        clouds = x[m, :pairs], generated[m, :pairs]  # (pairs, 3)
        values.append(torch.stack([mmd2(a, b, median_heuristic(a, b, 500))[0], knn_kl(*clouds),
                                   energy_distance(*clouds)]))
    out |= zip(("mmd", "knn_kl", "energy"), torch.stack(values, 1))  # (3, M)
    out["total"] += stack.lam[1] * out["mmd"]  # terms left it out
    arrays = {"x": x, "x_hat": x_hat, "generated": generated, "z": z}
    return {"weights": stack.state_dict(), "history": history.cpu(),
            "measures": {key: value.view(P, -1).cpu() for key, value in out.items()},
            "arrays": {key: v[::len(seeds), :1000].cpu().clone() for key, v in arrays.items()}}


# --- search --------------------------------------------------------------------------------------

def tuned_point(beta, lam):
    """f5 with weights that rise from a tenth to beta and lam, as in the document's own log."""
    return Point("f5 tuned", 15, 6, beta=(beta / 10, beta), lam=(lam / 10, lam))


def propose(trials, space, seed, count):
    """`count` proposals {parameter: value} of Optuna's TPE sampler after these trials."""
    # It starts anew from the seed and is told all earlier trials, so that a search continued later
    # proposes what an undisturbed one would.
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {key: optuna.distributions.FloatDistribution(*ends, log=True)
             for key, ends in space.items()}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=count, constant_liar=True))  # first round at random
    for trial in trials:
        study.add_trial(optuna.trial.create_trial(
            params={key: trial[key] for key in space}, distributions=space, value=trial["knn_kl"]))
    return [study.ask(space).params for _ in range(count)]  # asked at once, spread by constant_liar


def search(trials, seeds, name, count=8, **options):
    """The next trials [{beta, lam, knn_kl}], knn_kl on points of their own; options as of train."""
    seed = common.generator(seeds[0], name).initial_seed() % 2 ** 32  # NumPy's limit
    proposals = propose(trials, SEARCH, seed, count)
    points = [tuned_point(**proposal) for proposal in proposals]
    own = [s + 2 ** 32 for s in seeds]  # points apart from the table's: no bias by selection
    found = evaluate(*train(points, seeds, name, **options), own, 2000)["measures"]["knn_kl"]
    return [dict(p, knn_kl=value.item()) for p, value in zip(proposals, found.mean(1))]


# --- plot ----------------------------------------------------------------------------------------
# fits: {point: {history (epochs, 6, S), measures {name: (S,)}, arrays {name: (n, ...)}}}

def plot_clouds(fits, names):
    """Rows of 3-D clouds on the same axes: the arrays of these names, of all points."""
    columns, limits, ticks = len({(p.name, p.d) for p in fits}), (-1.3, 1.3), (-1, 0, 1)
    fig, axes = common.panels(math.ceil(len(names) * len(fits) / columns), columns,
                              max(2.1, 4.5 / columns), 2.4, subplot_kw={"projection": "3d"})
    for ax, (name, p) in zip(axes, itertools.product(names, fits)):
        arrays = fits[p]["arrays"]
        face = nearest_face(arrays["generated" if name == "generated" else "x"])
        ax.scatter(*arrays[name].T.numpy(), c=[common.COLOURS[f] for f in face], s=3, linewidths=0)
        ax.set(xlim=limits, ylim=limits, zlim=limits, xticks=ticks, yticks=ticks, zticks=ticks)
        ax.set_box_aspect((1, 1, 1), zoom=1.1)
        ax.tick_params(labelsize=6, pad=-3)
        ax.set_title("" if name == "x" else p, fontsize="small")
    return fig


def plot_latents(fits, names):
    """Histograms of every latent dimension against N(0, 1)."""
    u = torch.linspace(-4, 4, 161)
    normal = ("N(0, 1)", u, (-u ** 2 / 2).exp() / math.sqrt(2 * math.pi), dict(color="k", ls="--"))
    fig = common.plot_lines({p: ([normal], dict(ylabel="density")) for p in fits}, 4, 3, 2.6)
    for ax, (p, found) in zip(fig.axes, fits.items()):
        z = found["arrays"]["z"][:, :p.d].numpy()  # below: a density, also where tails are cut off
        ax.hist(z, 32, range=(-4, 4), weights=0 * z + 4 / len(z), histtype="step", lw=0.8)
        ax.set(xlabel="latent z", ylim=(0, 0.9), title=f"{p}\nvariance {z.var(0).mean():.3g}")
    return fig


def plot_training(fits, names):
    """Annealed weights and TERMS of these names over the epochs, means of the seeds."""
    def curve(p, history, name):
        if name in TERMS:
            return history[:, TERMS.index(name)].mean(-1)
        tau = ANNEAL * len(history)  # below: no 0 on a logarithmic axis
        return [annealed(*getattr(p, name), t, tau) or math.nan for t in range(len(history))]
    return common.plot_lines({NAMES[name]: (
        [(str(p), None, curve(p, found["history"], name),
          dict(color=common.COLOURS[i % 8], ls=("-", "--")[i // 8 % 2]))
         for i, (p, found) in enumerate(fits.items())],
        dict(xlabel="epoch", yscale="linear" if name in ("mmd", "rate") else "log"))
        for name in names}, columns=5)


def plot_rates(fits, names):
    """The MSE against the total information rate, best linear codes of each size, lower bound."""
    series = {}  # {(row, d): its (bits, mse)}
    for p, found in fits.items():
        series.setdefault((p.name.split(" beta")[0], p.d), []).append(
            [found["measures"][name].mean().item() for name in names])
    colours = dict(zip(sorted({d for _, d in series}), itertools.cycle(common.COLOURS)))
    marks = dict(zip(dict.fromkeys(name for name, _ in series), itertools.cycle("voDXs^P*<>p")))
    lines = [(f"{name}, d={d}", *zip(*pairs), dict(color=colours[d], marker=marks[name], lw=0.8))
             for (name, d), pairs in series.items()]
    dbs, bits = range(-20, 26), torch.linspace(4, 30, 50)
    lines += [(f"best linear code, d={d}", [d * analytic_rate(snr) for snr in dbs],
               [linear_code_mse(snr, d) for snr in dbs], dict(color=colour, ls="--"))
              for d, colour in colours.items()]
    lines += [("Shannon lower bound (high rate)", bits, shannon_lower_bound(bits), {"color": "k"})]
    return common.plot_lines({"colour: latent size d": (lines, dict(
        xlim=(0, None), ylim=(1e-4, 1), yscale="log", xlabel="total information rate (bits)",
        ylabel="MSE per coordinate, held-out points"))}, width=7, height=5)


def pictures(run, fits, trials):
    """Save all figures: clouds and latents of the first seed, curves as means over the seeds."""
    f2, standard, fitted = ([p for p in fits if p.name == name]
                            for name in ("f2", "f4 standard", "f4 fitted"))
    heads = [p for p in fits if p.name in HEADS and p.snr in (15, NO_CHANNEL) and p.d == 6]
    heads, moving = heads or list(fits)[:4], [p for p in fits if p.beta[0] != p.beta[1]]
    for name, plot, parts, points, title in (
            ("target", plot_clouds, ["x"], heads[:1], "Figure 1: targets"),
            ("f2", plot_clouds, ["x_hat"], f2, "Figure A: f2, reconstructions"),
            ("f4_standard", plot_clouds, ["generated"], standard, "Figure B: f4, target N(0, 1)"),
            ("f4_fitted", plot_clouds, ["generated"], fitted, "Figure C: f4, fitted Gaussian"),
            ("models", plot_clouds, ["x_hat", "generated"], heads,
             "Reconstructions (top) and generated points (bottom)"),
            ("latents", plot_latents, ["z"], heads, "Latent marginals"),
            ("training", plot_training, ["total", "rate"], f2, "f2: loss, information rate"),
            ("annealing", plot_training, ["beta", "lam", "mse", "kl", "mmd"], moving, "Annealing"),
            ("rate_distortion", plot_rates, ["bits", "mse"], fits, "Rate and distortion")):
        if points:
            run.figure(plot({p: fits[p] for p in points}, parts), name, title)
    if trials:
        kl, dots = [trial["knn_kl"] for trial in trials], dict(marker="o", ls="")
        beta, lam = ([trial[key] for trial in trials] for key in ("beta", "lam"))
        charts = {f"against {label}": (
            [("", x, kl, dots)], dict(xlabel=label, xscale=scale, yscale="log", ylabel="KL (nats)"))
            for label, x, scale in (("trial", None, "linear"), ("final β", beta, "log"),
                                    ("final λ", lam, "log"))}
        run.figure(common.plot_lines(charts, legend=None), "search", "f5 tuned: generative KL")


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add
    add("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="models to train")
    add("--snr", nargs="+", type=number(float, -20, 60), metavar="DB",
        help="SNRs in dB in place of the models' own (f3, f6 have no channel)")
    add("--latent", nargs="+", type=number(int, 1, 64), metavar="D", help="likewise latent sizes")
    add("--seeds", type=number(int, 1, 100), help="seeds, counted from --seed")
    add("--epochs", type=number(int, 1, 10**6), help=f"passes in batches of {BATCH}")
    add("--points", type=number(int, BATCH, 10**6), help="training points")
    add("--held-out", type=number(int, 100, 10**5), help="points to measure on")
    add("--tune", action="store_true", help="also search f5's weights with Optuna, at 15 dB, d=6")
    add("--trials", type=number(int, 1, 10**4), help="trials of a search, rounded up to eights")
    args = parser.parse(argv)
    args.models = [model for model in MODELS if model in args.models]
    return args


def sweep(model, snrs=None, sizes=None):
    """The Points of one model: its rows at all SNRs and latent sizes."""
    own, own_sizes, variants = MODELS[model]
    snrs = own if own == (NO_CHANNEL,) else snrs or own
    return [Point(name, snr, d, **settings) for name, settings in variants.items()
            for snr in dict.fromkeys(snrs) for d in dict.fromkeys(sizes or own_sizes)]


def claims(at):
    """Closing table (claim, document, here, holds), as far as {(row, SNR, d): measures} goes."""
    table = []
    for where, (figures, *points) in DOCUMENT.items():
        for key, (measure, published) in itertools.product(points, figures.items()):
            if key in at:
                here, collapsed = at[key][measure], at[key]["spread"]["mean"] < 0.1
                table.append((f"{where}: {Point(*key)}, {NAMES[measure]}", f"{published:g}",
                              common.show(here) + " (collapsed)" * collapsed,
                              not collapsed and (abs(here["mean"] - published) <= 0.03 if measure
                              == "rate" else round(here["mean"], 4) <= published)))  # as shown
    if all(p[:3] in at for p in sweep("f2")):
        mse, bits, gap = ({key[1:]: measures[name]["mean"] for key, measures in at.items()
                           if key[0] == "f2"} for name in ("mse", "bits", "gap"))
        falls = [mse[a] > mse[b] for a, b in itertools.combinations(sorted(mse), 2) if a[1] == b[1]]
        ratio = [mse[key] / linear_code_mse(*key) for key in mse if key[1] >= 4]
        better = [f"{Point('f2', *key)}: {mse[key]:.4f} at {bits[key]:.1f} bits" for key in mse
                  if bits[key] < bits[15, 6] and mse[key] < mse[15, 6]]
        table += [
            ("f2: MSE falls with SNR", "yes", f"{sum(falls)} of {len(falls)} pairs", all(falls)),
            ("f2: MSE below the best linear code's, d >= 4", "-",
             f"{min(ratio):.2f} to {max(ratio):.2f} of it", max(ratio) < 1),
            ("f2: 15 dB, d=6 is efficient", "yes", "; ".join(better) or "none better", not better),
            ("f2: overfits at 20 dB, d=6 (by 5 %)", "yes", f"{gap[20, 6]:+.1%}", gap[20, 6] > 0.05)]

    def generative(model, latent):  # (row, its generative KL), the least of the model's at 15 dB
        rows = [(name, m["knn_kl"]) for (name, snr, d), m in at.items() if name.startswith(model)
                and d == latent and snr in (15, NO_CHANNEL)]
        return min(rows, key=lambda row: row[1]["mean"], default=None)
    for claim, *pair, better in (
            ("f4, d=8, generates better than f3, d=6", ("f4 fitted", 8), ("f3 beta=0.1", 6), True),
            *((f"f4, d=8, generates better than d={d}", ("f4", 8), ("f4", d), 1) for d in (4, 6)),
            *((f"{row} does not improve on f4", (row, 6), ("f4", 6), False)
              for row in ("f5 annealed", "f5 Optuna", "f5 tuned")),
            ("f6, the future work, generates better than f4", ("f6", 6), ("f4", 6), True),
            ("f6 generates better than f3: annealing helps", ("f6", 6), ("f3", 6), True)):
        rows = [generative(*key) for key in pair]
        if all(rows):  # better: by two standard errors
            (_, x), (_, y) = rows
            gain = (y["mean"] - x["mean"]) * x["n"] ** 0.5
            table.append((f"{claim} (generative KL)", "hoped" if "f6" in claim else "yes",
                          "; ".join(f"{name} {common.show(x, 2)}" for name, x in rows),
                          (gain > 2 * math.hypot(x["std"] or 0, y["std"] or 0)) == better))
    return table


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    seeds, fits, trials = list(range(args.seed, args.seed + args.seeds)), {}, []
    options = dict(epochs=args.epochs, n=args.points, device=args.device, compile=args.compile)
    with common.Run(__file__, args, "cube surface", additive=("tune", "trials")) as run:
        def add(name, points):  # a work unit, taken apart by points
            unit = run.unit(name, lambda checkpoint: evaluate(*train(
                points, seeds, name, checkpoint=checkpoint, **options), seeds, args.held_out))
            for i, p in enumerate(points):
                fits[p] = {"history": unit["history"][:, :, i]}  # (epochs, 6, S)
                for part in ("measures", "arrays"):
                    fits[p][part] = {key: value[i] for key, value in unit[part].items()}

        for model in args.models:
            add(model, sweep(model, args.snr, args.latent))
        while args.tune and len(trials) < args.trials:
            name = f"f5-search-{len(trials)}"
            trials += run.unit(name, lambda checkpoint: search(
                trials, seeds, name, checkpoint=checkpoint, **options))
        if trials:
            best = min(trials, key=lambda trial: trial["knn_kl"])
            add(f"f5-tuned-{len(trials)}", [tuned_point(best["beta"], best["lam"])])
        pictures(run, fits, trials)
        at = {p[:3]: {key: common.mean_std(values) for key, values in found["measures"].items()}
              for p, found in fits.items()}
        shown = ("total", "mse", "rate", "mmd", "knn_kl", "energy", "surface", "faces")
        common.print_rows("Models, on held-out points", [
            {"row": p, **{key: at[p[:3]][key] for key in shown}} for p in fits])
        rows = [{"name": p.name, "snr": p.snr, "d": p.d, "beta": p.beta, "lam": p.lam,
                 "analytic_rate": analytic_rate(p.snr), "linear_mse": linear_code_mse(p.snr, p.d)
                 if p.snr < NO_CHANNEL else None, "measures": at[p[:3]]} for p in fits]
        metrics = [{"row": p.name, "snr": p.snr, "d": p.d, "seed": seed, "epoch": epoch,
                    **dict(zip(TERMS, values.tolist()))} for p, found in fits.items()
                   for seed, history in zip(seeds, found["history"].unbind(-1))
                   for epoch, values in enumerate(history, 1)]
        return run.finish({"points": rows, "trials": trials}, claims(at), metrics)


if __name__ == "__main__":
    main()
