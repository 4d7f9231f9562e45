"""Autoencoders on the surface of a cube: noise, information, KL, MMD, annealing, search.

Reproduces M. DaRocha, "Autoencoders & Controlling Latent Space for Generative Modeling" (VUW,
AIML425, 2024). With z = y(x) + noise, each of the models f1 to f5 minimises

    L = MSE(x, x_hat) + c * penalty(y) + beta_t * KL + lambda_t * MMD^2       (Eq. 5, Table 2)

    python ae_cube.py                          all models, 3 seeds: 5 to 6 minutes on 2 CPU cores
    python ae_cube.py --tune                   adds the Optuna search: about 3 minutes more
    python ae_cube.py --models f2 --snr 12 --latent 5 --out out/f2     one SNR and latent size

A run leaves figures, table.md, results.json, metrics.csv and the nets (units/*.pt) in its folder.
What the document leaves open, and what we chose:
* Nets 3-64-64-d-64-64-3 with tanh, Kaiming-uniform initialisation; 2,000 steps of Adam with
  beta2 = 0.99, in batches of 250, at a rate of 0.01 that falls to 0 over the second half. With
  ReLU f2 ends at a total loss of about 0.0055, the document's at 0.0052; tanh, our choice,
  reaches 0.0035, so "better" is the activation's.
* SNR is in dB against a signal of variance 1, so the noise is fixed. Nothing limits f1's signal:
  it grows until the noise hardly matters. In "f1 held" and "f4 fitted" the noise follows the
  signal's variance, which holds the SNR.
* f2's penalty is on y. The document writes z, but its rates are those of y ("f2 on z" is the
  other). The rate follows from SNR and penalty. "f2 few" has 1,000 training points, to overfit.
* MSE and penalty are means, over coordinates and latent dimensions; KL, in nats, is a sum over
  dimensions; MMD^2 is unbiased, on 64 points of a batch. c = 1, f4's lambda = 1; f3's beta is 1,
  which collapses it to a loss of 5/9, or 0.1, which comes near the document's.
* f3 has no channel; f4 to f6 add a channel's noise to the encoder's. f5's weights rise over the
  first two thirds of the steps, as in Table 5. f6 is the VAE with annealed KL that the document
  proposes. The plane has constant weights of KL and MMD on a grid, at 15 dB and d = 6.
* The generative KL is estimated by nearest neighbours; only its order compares with the document.
"""
import math
from typing import NamedTuple

import common  # before torch: from here on Ctrl-C is one line
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

# B batch, C points for the MMD, D latent dimensions, T terms of the loss; S seeds, R rows of one
# work unit (a file in units/: the nets of one model and latent size), M = R * S nets side by side
PRESETS = {
    "smoke": dict(seeds=2, steps=20, points=1000, held_out=500, trials=8),
    "quick": dict(seeds=3, steps=2000, points=10_000, held_out=10_000, trials=40),
    "paper": dict(seeds=10, steps=10_000, points=10_000, held_out=10_000, trials=120)}
TERMS = ["mse", "penalty", "kl", "rate", "total", "mmd"]  # of the loss; the last costs most
BATCH = 250
MMD_POINTS = 64
LEARNING_RATE = 1e-2
ANNEAL = 2 / 3             # tau of Eq. (6) as a share of the steps: 1,000 of 1,500 in Table 5
NO_CHANNEL = math.inf      # dB
VARIANCE = 5 / 9           # of a coordinate: the MSE of the mean
SNRS = {"f1": [5, 15], "f2": [5, 10, 15, 20], "f2 on z": [15], "f2 few": [15, 20],
        "f3": [NO_CHANNEL], "f4": [5, 10, 15], "f5": [15]}
SIZES = {"f1": [6], "f2": [2, 4, 6, 8], "f2 on z": [6], "f2 few": [6], "f3": [6], "f4": [4, 6, 8],
         "f5": [6]}
HEADS = ["f1 held", "f2", "f3 β=0.1", "f4 standard", "f4 fitted", "f5 annealed"]  # of figures
BETAS = [0, 0.001, 0.01, 0.1, 1, 10]  # the plane's weights of the KL
LAMBDAS = [0, 0.1, 1, 10, 100]        # and of the MMD; both 0: neither f4 nor KL alone
LEAST = 1e-3                          # for the plane's logarithmic colours
SEARCH_BETA = (1e-3, 10)              # where Optuna looks: the plane's inside
SEARCH_LAMBDA = (1e-1, 100)
TABLE_2_EPOCHS = range(0, 1000, 100)  # f2, 15 dB, d=6: total loss, bits; of 1,000 epochs
TABLE_2 = [0.9352, 0.0095, 0.0071, 0.0064, 0.0062, 0.0055, 0.0053, 0.0052, 0.0053, 0.0052]
TABLE_2_BITS = [3.006, 2.494, 2.503, 2.513, 2.498, 2.527, 2.530, 2.504, 2.510, 2.528]
TABLE_5_EPOCHS = [*range(0, 1000, 100), 1400]  # fixed annealing: total and MMD loss; of 1,500
TABLE_5 = [184.92, 1.2056, 0.7092, 0.5678, 0.5299, 0.5021, 0.4792, 0.4698, 0.4606, 0.4527, 0.4364]
TABLE_5_MMD = [0.0357, 0.0331, 0.0308, 0.0397, 0.0322, 0.0346, 0.0354, 0.0355, 0.0324, 0.0346,
               0.0309]


class Row(NamedTuple):
    """An autoencoder of the tables, trained once for each seed."""
    name: str
    snr: float                 # dB
    d: int                     # latent dimensions
    c: float = 0.0             # weight of f2's penalty
    beta: tuple = (0.0, 0.0)   # weight of the KL, at the start and from tau on
    lam: tuple = (0.0, 0.0)    # weight of the MMD, likewise
    own_moments: bool = False  # latent target: a Gaussian with z's own means and variances
    relative_noise: bool = False  # is the channel's noise in units of the signal's variance?
    stochastic: bool = True    # does the encoder put out a variance?
    penalise_z: bool = False   # f2's penalty after the noise, and not before it
    points: int = 0            # training points, 0: as many as the preset has

    @property
    def noise(self):
        return 10 ** (-self.snr / 10)  # variance of the channel's noise

    def __str__(self):
        channel = "" if self.snr == NO_CHANNEL else f"{self.snr:g} dB, "
        return f"{self.name}, {channel}d={self.d}"


def rows_of(model, snr, d):
    """The rows of a model (a key of SNRS) at one SNR and latent size."""
    plain = Row("f1", snr, d, stochastic=False)
    if model == "f1":  # Table 1
        return [plain._replace(own_moments=True),
                plain._replace(name="f1 held", own_moments=True, relative_noise=True)]
    if model == "f2":  # Table 2, Figure A
        return [plain._replace(name="f2", c=1)]
    if model == "f2 on z":
        return [plain._replace(name="f2 on z", c=1, penalise_z=True)]
    if model == "f2 few":
        return [plain._replace(name="f2 few", c=1, points=1000)]
    if model == "f3":  # Table 3, Eq. (22) with its sign changed; f6: the end of Section 4
        return [Row("f3 β=1", snr, d, beta=(1, 1)), Row("f3 β=0.1", snr, d, beta=(0.1, 0.1)),
                Row("f6", 15, d, beta=(0, 0.01))]
    if model == "f4":  # Table 4, Figures B and C
        return [Row("f4 standard", snr, d, lam=(1, 1)),
                Row("f4 fitted", snr, d, lam=(1, 1), own_moments=True, relative_noise=True)]
    if model == "f5":  # Table 5: the weights of its annealing and those of its search
        return [Row("f5 annealed", snr, d, beta=(1, 10), lam=(0.01, 1)),
                Row("f5 Optuna", snr, d, beta=(1, 10), lam=(0.01, 0.1))]


def weighted(beta, lam):
    """A row at 15 dB, d=6 with constant weights, of the plane or the search."""
    return Row(f"β={beta:.3g}, λ={lam:.3g}", 15, 6, beta=(beta, beta), lam=(lam, lam))


# --- data ----------------------------------------------------------------------------------------

def cube_surface(n, generator):
    """n points (n, 3) uniform over the surface of [-1, 1]^3; the variance is 5/9 a coordinate."""
    device = generator.device
    x = torch.rand(n, 3, generator=generator, device=device) * 2 - 1
    face = torch.randint(6, (n,), generator=generator, device=device)  # 2 axis + side; equal areas
    side = face % 2 * 2 - 1  # -1 or 1
    x[torch.arange(n, device=device), face // 2] = side.to(x.dtype)
    return x


def nearest_face(x):
    """Number 0..5 (-x, +x, -y, +y, -z, +z) of the face of the cube nearest to each point. (n,)"""
    axis = x.abs().argmax(1)
    positive = x.gather(1, axis[:, None])[:, 0] > 0
    return 2 * axis + positive


# --- model ---------------------------------------------------------------------------------------

class Autoencoder(nn.Module):
    """3-64-64-D, a noisy channel, D-64-64-3; a stochastic encoder (f3 to f6) also puts out the
    logarithm of a variance."""

    def __init__(self, d, stochastic=False):
        super().__init__()
        self.stochastic = stochastic
        outputs = 2 * d if stochastic else d
        self.encoder = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                                     nn.Linear(64, outputs))
        self.decoder = nn.Sequential(nn.Linear(d, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                                     nn.Linear(64, 3))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="tanh")

    def forward(self, x, eps, noise, relative_noise=0):
        """x (B, 3) and standard normal eps (B, D) to y, Var(z|x), z (B, D) and x_hat (B, 3).

        noise: the channel's variance; where relative_noise is 1, in units of y's. B >= 2.
        """
        y = self.encoder(x)
        if self.stochastic:
            y, logvar = y.chunk(2, 1)  # (B, D) each
        unit = relative_noise * y.var(0) + (1 - relative_noise)  # (D,)
        var = (noise * unit).expand_as(y)
        if self.stochastic:
            var = var + logvar.clamp(-30, 20).exp()
        z = y + var.sqrt() * eps  # Eq. (2), reparameterised as in Figure 2
        return y, var, z, self.decoder(z)


# --- objective -----------------------------------------------------------------------------------

def information_rate(z, var):
    """Bits per neuron, 1/2 log2(Var(z_j) / Var(z_j|x)), mean over points and neurons.

    Eqs. (3), (13). Exact for a Gaussian neuron, else an upper bound on I(X; z_j).
    """
    return 0.5 * (z.var(0).log2() - var.log2().mean(0)).mean()


def moment_penalty(y):
    """Table 2: squared deviations of means from 0 and variances from 1, mean over dimensions.

    B >= 2. A batch of 250 has sampling noise: of perfect codes the penalty is 0.004 (values of +1
    and -1) to 0.012 (Gaussian) on average.
    """
    return (y.mean(0) ** 2 + (y.var(0) - 1) ** 2).mean()


def kl_to_standard(mu, var):
    """KL(N(mu, var) || N(0, 1)) in nats, sum over dimensions, mean over points. Eq. (9)"""
    return 0.5 * (mu ** 2 + var - 1 - var.log()).sum(1).mean()


def squared_distances(a, b):
    """||a_i - b_j||^2. (B, D), (C, D) -> (B, C)"""
    norms = (a ** 2).sum(1)[:, None] + (b ** 2).sum(1)
    return (norms - 2 * a @ b.T).clamp(min=0)


def median_heuristic(a, b):
    """The kernel's r: median squared distance in 32 points of a and 32 of b. Gretton et al. 2012"""
    pooled = torch.cat([a[:32], b[:32]])  # (64, D)
    i, j = torch.triu_indices(len(pooled), len(pooled), 1, device=a.device)
    return squared_distances(pooled, pooled)[i, j].median().clamp(min=1e-12)


def mmd2(a, b, r):
    """Unbiased MMD^2 of Gretton et al. 2012, kernel exp(-||x - y||^2 / r). (B, D), (C, D) -> ()"""
    def off_diagonal_mean(k):
        n = len(k)  # >= 2
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))  # k(x, x) = 1 would bias it

    aa = torch.exp(-squared_distances(a, a) / r)
    bb = torch.exp(-squared_distances(b, b) / r)
    ab = torch.exp(-squared_distances(a, b) / r)
    return off_diagonal_mean(aa) + off_diagonal_mean(bb) - 2 * ab.mean()


def latent_target(z, gauss, own_moments):
    """Draws of the latent target from standard normal ones: N(0, 1), or with z's own moments."""
    # gradients flow through z's moments: were these constants, the MMD's gradient would shrink z
    own = z.mean(0) + z.std(0) * gauss
    return own_moments * own + (1 - own_moments) * gauss


def annealed(start, end, t, tau):
    """Eq. (6), min(1, t / tau), between two ends."""
    return start + (end - start) * min(1.0, t / tau)


def loss(x, y, var, z, x_hat, target=None, c=0, beta=0, lam=0, penalise_z=False):
    """Terms of the loss of one net, with their total, and the information rate.

    x, x_hat (B, 3); y, var, z (B, D); target (C, D): draws of the latent target, which the MMD
    compares with the first C codes z (without them it is 0). B, C >= 2.
    """
    mse = ((x_hat - x) ** 2).mean()  # Eq. (14)
    penalty = moment_penalty(z if penalise_z else y)
    kl = kl_to_standard(y, var)
    mmd = torch.zeros_like(mse)
    if target is not None:
        codes = z[:len(target)]  # (C, D)
        mmd = mmd2(codes, target, median_heuristic(codes, target))
    total = mse + c * penalty + beta * kl + lam * mmd  # Eq. (5), with Table 2's penalty
    return {"mse": mse, "penalty": penalty, "kl": kl, "rate": information_rate(z, var),
            "total": total, "mmd": mmd}


# --- train ---------------------------------------------------------------------------------------

def train(rows, seeds, name, steps, points, device="cpu"):
    """Train all rows x seeds side by side.

    A seed gives its nets one start, the same training points, batches and noise. Returns the nets'
    weights, stacked {name: (M, ...)} in the order (row, seed), the log of the loss's terms
    {term: (steps, R, S)}, and each seed's training points. FloatingPointError where a term is not
    finite, ValueError where rows differ in what they must share.
    """
    shared = rows[0]
    for field in ("d", "stochastic", "penalise_z", "points"):
        if len({getattr(row, field) for row in rows}) > 1:
            raise ValueError(f"{name}: rows that are trained side by side differ in {field}")
    R, S = len(rows), len(seeds)
    generators = [common.generator(seed, name, device) for seed in seeds]
    data = [cube_surface(shared.points or points, g) for g in generators]
    nets = [build(shared, seed).to(device) for _ in rows for seed in seeds]
    params, _ = stack_module_state(nets)  # {name: (M, ...)}
    optimiser = torch.optim.Adam(params.values(), LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    settings = {}  # {field: (M,)}, of beta and lam the start and the end (M, 2)
    for field in ("noise", "relative_noise", "own_moments", "c", "beta", "lam"):
        values = torch.tensor([getattr(row, field) for row in rows], dtype=torch.float)
        settings[field] = values.repeat_interleave(S, 0).to(device)
    use_mmd = any(max(row.lam) > 0 for row in rows)
    names = TERMS if use_mmd else TERMS[:-1]

    def terms_of_one(params, x, eps, gauss, setting, beta, lam):
        channel = setting["noise"], setting["relative_noise"]
        y, var, z, x_hat = functional_call(nets[0], params, (x, eps, *channel))
        target = latent_target(z, gauss, setting["own_moments"]) if use_mmd else None
        return loss(x, y, var, z, x_hat, target, setting["c"], beta, lam, shared.penalise_z)

    log = torch.zeros(steps, len(names), R * S, device=device)
    for step in common.steps(name, steps, log, names, optimiser, *params.values(), *generators):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1, 2 * (1 - step / steps))
        beta = annealed(settings["beta"][:, 0], settings["beta"][:, 1], step, ANNEAL * steps)
        lam = annealed(settings["lam"][:, 0], settings["lam"][:, 1], step, ANNEAL * steps)
        drawn = [batch(data[s], shared.d, generators[s]) for s in range(S)]
        x, eps, gauss = (torch.stack(part).repeat(R, 1, 1) for part in zip(*drawn))  # (M, ...)
        terms = vmap(terms_of_one)(params, x, eps, gauss, settings, beta, lam)
        optimiser.zero_grad()
        terms["total"].sum().backward()  # no shared weights: each net is trained on its own loss
        optimiser.step()
        log[step] = torch.stack([terms[term] for term in names]).detach()  # (T, M)
    log = log.view(steps, len(names), R, S)
    return params, {term: log[:, t] for t, term in enumerate(names)}, data


def batch(points, d, g):
    """A batch of points (B, 3), drawn with replacement; standard normal numbers (B, D), (C, D)."""
    chosen = torch.randint(len(points), (BATCH,), generator=g, device=points.device)
    eps = torch.randn(BATCH, d, generator=g, device=points.device)
    gauss = torch.randn(MMD_POINTS, d, generator=g, device=points.device)
    return points[chosen], eps, gauss


def build(row, seed):
    """The untrained net of a seed."""
    common.seed_weights(seed, f"net {row.d}")
    return Autoencoder(row.d, row.stochastic)


# --- evaluate ------------------------------------------------------------------------------------

def mutual_information(y, var, z):
    """Bounds (lower, upper) in bits on I(X; Z), Eq. (12), from n codes z ~ N(y, var), each (n, D).

    E log q(z|x) - E log mean_x' q(z|x'), where the mean counts x itself (lower, at most log2 n) or
    leaves it out (upper). B. Poole et al., "On Variational Bounds of Mutual Information", 2019.
    """
    n, precision = len(z), 1 / var
    # log q(z_i | x_j) = -1/2 sum_k [(z_ik - y_jk)^2 / var_jk + log var_jk] + constant  (n, n)
    log_q = z @ (y * precision).T - 0.5 * (z ** 2) @ precision.T
    log_q -= 0.5 * (y ** 2 * precision + var.log()).sum(1)
    own = log_q.diagonal().clone()
    lower = own - log_q.logsumexp(1) + math.log(n)
    log_q.fill_diagonal_(-math.inf)
    upper = own - log_q.logsumexp(1) + math.log(n - 1)
    return lower.mean() / math.log(2), upper.mean() / math.log(2)


def knn_kl(x, y, k=5):
    """KL(p_x || p_y) in nats from samples (n, D), (m, D), by k-th neighbours (Wang et al. 2009).

    Of a surface and points beside it the true one is infinite: this then grows with n.
    """
    exact = dict(compute_mode="donot_use_mm_for_euclid_dist")  # for close pairs, too
    rho = torch.cdist(x, x, **exact).kthvalue(k + 1, dim=1).values  # k + 1: the first is itself
    nu = torch.cdist(x, y, **exact).kthvalue(k, dim=1).values  # (n,), no point of y is one of x
    return x.shape[1] * (nu / rho).log().mean() + math.log(len(y) / (len(x) - 1))


def analytic_rate(snr):
    """Bits per neuron of a Gaussian signal of variance 1 at this SNR (dB)."""
    return 0.5 * math.log2(1 + 10 ** (snr / 10))  # Eq. (13), Var(z) = 1 + noise


def linear_code_mse(snr, d):
    """MSE of the best linear code with d >= 3 neurons of signal variance 1 at this SNR (dB)."""
    return VARIANCE / (1 + d / 3 * 10 ** (snr / 10))


def linear_code_bits(snr, d):
    """Upper bound on the information of this code: that of a Gaussian source."""
    return 1.5 * math.log2(1 + d / 3 * 10 ** (snr / 10))


def shannon_lower_bound(bits):
    """Least MSE of any code for a surface of area 24, at high rates: false below about 3 bits."""
    along = 24 * 2 ** -bits / (2 * math.pi * math.e)  # error in each direction of the surface
    return 2 * along / 3  # per coordinate


@torch.no_grad()
def evaluate(net, row, seed, n, device="cpu", points="held-out", training=None):
    """Measure one net on n points that it was not trained on, the same for all nets of a seed.

    mse, total, rate (bits per neuron), information_low and _high (bits), mmd, generative_kl (nats,
    of 2,000 decoded draws of the latent target), scatter (variance of x_hat over the noise), gap
    (MSE over that of the training points, less 1); and 1,000 of x, x_hat and generated points.
    points: "held-out", or "selection" to choose rows by their results on other points.
    """
    def normal(name, *shape):
        g = common.generator(seed, f"{points} {name}", device)
        return torch.randn(*shape, row.d, generator=g, device=device)

    x = cube_surface(n, common.generator(seed, points, device))
    eps = normal("noise", n)
    y, var, z, x_hat = net(x, eps, row.noise, row.relative_noise)
    target = latent_target(z, normal("target", n), row.own_moments)
    if row.c and not row.penalise_z:
        target = target * (1 + row.noise) ** 0.5  # Var(y) is held at 1
    generated = net.decoder(target)
    terms = loss(x, y, var, z, x_hat, target[:2000], row.c, row.beta[1], row.lam[1],
                 row.penalise_z)
    again = y[:1000] + var[:1000].sqrt() * normal("noise again", 8, n)[:, :1000]  # (8, ., D)
    some = 4000 if points == "held-out" else 500  # n^2 numbers
    low, high = mutual_information(y[:some], var[:some], z[:some])
    measures = {key: terms[key] for key in ("mse", "total", "rate", "mmd")}
    measures |= {"information_low": low, "information_high": high,
                 "generative_kl": knn_kl(x[:2000], generated[:2000]),
                 "scatter": net.decoder(again).var(0).mean()}
    if training is not None:  # the same noise; fewer points than n are used several times each
        seen = training[torch.arange(n, device=device) % len(training)]
        _, _, _, seen_hat = net(seen, eps, row.noise, row.relative_noise)
        measures["gap"] = terms["mse"] / ((seen_hat - seen) ** 2).mean() - 1
    measures = {key: value.item() for key, value in measures.items()}
    arrays = {"x": x, "x_hat": x_hat, "generated": generated}
    return measures, {key: value[:1000] for key, value in arrays.items()}


def evaluate_row(row, weights, seeds, args, points="held-out", training=None):
    """Of a row's nets, one a seed: {"weights", "measures": {name: (S,)}, "arrays" of the first}."""
    measures, arrays = [], []
    for s, seed in enumerate(seeds):
        net = Autoencoder(row.d, row.stochastic)
        net.load_state_dict(weights[s])
        net.to(args.device)
        seen = training[s] if training else None
        measured, clouds = evaluate(net, row, seed, args.held_out, args.device, points, seen)
        measures.append(measured)
        arrays.append(clouds)
    return {"weights": weights, "measures": common.over_repeats(measures), "arrays": arrays[0]}


def train_and_evaluate(rows, seeds, name, args, points="held-out"):
    """A work unit: of each row what evaluate_row returns, with the log in at most 100 blocks."""
    params, log, training = train(rows, seeds, name, args.steps, args.points, args.device)
    found = []
    for r, row in enumerate(rows):
        weights = []
        for m in range(r * len(seeds), (r + 1) * len(seeds)):
            weights.append({key: value[m].detach() for key, value in params.items()})
        one = evaluate_row(row, weights, seeds, args, points, training)
        one["name"] = str(row)
        one["log"] = {term: common.in_blocks(values[:, r]) for term, values in log.items()}
        found.append(one)
    return found


def yardsticks(seed, n):
    """The generative KL of clouds that no net has made: table rows, beside n points of the cube."""
    normal = torch.randn(n, 3, generator=common.generator(seed, "normal"))
    solid = torch.rand(n, 3, generator=common.generator(seed, "solid")) * 2 - 1
    others = cube_surface(n, common.generator(seed, "others"))
    clouds = {"other points of the surface": others,
              "the surface, with noise of 0.05": others + 0.05 * normal,
              "a sphere of the same variance": nn.functional.normalize(normal) * (5 / 3) ** 0.5,
              "the solid cube": solid,
              "a Gaussian of the same variance": normal * VARIANCE ** 0.5,
              "a single point (noise of 0.001)": normal * 0.001}
    x = cube_surface(n, common.generator(seed, "held-out"))
    return [{"cloud": name, "generative KL": f"{knn_kl(x, cloud).item():.3g}"}
            for name, cloud in clouds.items()]


# --- the plane of beta and lambda, and the search ------------------------------------------------

def best_of(cells, beta=False, lam=False):
    """The row of least generative KL, by the mean over seeds, among those with these weights."""
    kl = {}
    for row, found in cells.items():
        if (row.beta[1] > 0, row.lam[1] > 0) == (beta, lam):
            kl[row] = found["measures"]["generative_kl"].mean().item()
    return min(kl, key=kl.get)


def propose(trials, seed, count):
    """`count` proposals (beta, lambda) of Optuna's TPE sampler after these trials.

    It starts anew from the seed and is told all earlier trials, so that a search that is continued
    proposes what an undisturbed one would.
    """
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"beta": optuna.distributions.FloatDistribution(*SEARCH_BETA, log=True),
             "lam": optuna.distributions.FloatDistribution(*SEARCH_LAMBDA, log=True)}
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=count, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    for trial in trials:
        params = {"beta": trial["beta"], "lam": trial["lam"]}
        known = optuna.trial.create_trial(params=params, distributions=space,
                                          value=trial["generative_kl"])
        study.add_trial(known)
    return [study.ask(space).params for _ in range(count)]  # constant_liar spreads them


def search(run, seeds, args, count=8):
    """Optuna's trials [{beta, lam, generative_kl}], and the nets {row: found} that they trained.

    The objective is ours: the generative KL of nets with constant weights, mean over seeds.
    """
    trials, nets = [], {}
    while len(trials) < args.trials:
        name = f"search-{len(trials)}"
        seed = common.generator(seeds[0], name).initial_seed() % 2 ** 32  # NumPy's limit
        rows = [weighted(p["beta"], p["lam"]) for p in propose(trials, seed, count)]
        found = run.unit(name, lambda: train_and_evaluate(rows, seeds, name, args, "selection"))
        nets.update(zip(rows, found))
        for row, one in zip(rows, found):
            kl = one["measures"]["generative_kl"].mean().item()
            trials.append({"beta": row.beta[1], "lam": row.lam[1], "generative_kl": kl})
    return trials, nets


# --- plot ----------------------------------------------------------------------------------------

def plot_clouds(fits, names, columns):
    """Rows of 3-D clouds, the arrays of these names; each point has the colour of its face."""
    rows = math.ceil(len(fits) / columns)
    fig, axes = common.panels(len(names) * rows, columns, 2.5, 2.6,
                              subplot_kw={"projection": "3d"})
    for i, name in enumerate(names):
        for k, (row, found) in enumerate(fits.items()):
            ax = axes[i * rows * columns + k]
            arrays = found["arrays"]
            faces = nearest_face(arrays["generated" if name == "generated" else "x"])
            colours = [common.COLOURS[face] for face in faces]
            ax.scatter(*arrays[name].T.numpy(), c=colours, s=3, lw=0)
            ax.set_title(str(row) if i == 0 else "", fontsize="large")
    for ax in axes:
        limits, ticks = (-1.3, 1.3), (-1, 0, 1)
        ax.set(xlim=limits, ylim=limits, zlim=limits, xticks=ticks, yticks=ticks, zticks=ticks)
        ax.set_xlabel("x", labelpad=-8)
        ax.set_ylabel("y", labelpad=-8)
        ax.set_zlabel("z", labelpad=-9)
        ax.tick_params(labelsize=7, pad=-4)
        ax.set_box_aspect((1, 1, 1), zoom=0.95)
    for face, label in enumerate(["-x", "+x", "-y", "+y", "-z", "+z"]):
        axes[0].scatter([], [], [], color=common.COLOURS[face], label=label)
    fig.legend(title="face", loc="outside lower center", ncols=min(6, 3 * columns),
               fontsize="large", markerscale=1.5, columnspacing=0.6, handletextpad=0)
    return fig


def plot_training(f2, f5):
    """Logs {term: (blocks, S)} of f2 and f5 beside those of Tables 2 and 5.

    A batch's total loss holds the sampling noise of its penalty (see moment_penalty).
    """
    fig, axes = common.panels(1, 4, 3.3, 3.2)
    share_2 = [epoch / 1000 for epoch in TABLE_2_EPOCHS]
    share_5 = [epoch / 1500 for epoch in TABLE_5_EPOCHS]
    plot_log(axes[0], f2["total"], share_2, TABLE_2, f"f2: total loss of a batch of {BATCH}")
    plot_log(axes[1], f2["rate"], share_2, TABLE_2_BITS, "f2: bits per neuron")
    plot_log(axes[2], f5["total"], share_5, TABLE_5, "f5 annealed: total loss of a batch")
    plot_log(axes[3], f5["mmd"], share_5, TABLE_5_MMD, "f5 annealed: MMD² (here unbiased)")
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize="small")
    return fig


def plot_log(ax, values, share, published, title):
    """Our blocks (blocks, S) and the document's figures over the share of the training."""
    blocks = torch.arange(1, len(values) + 1) / len(values)
    lines = ax.plot(blocks, values, color=common.COLOURS[0], lw=0.8)
    lines[0].set_label("here, each seed")
    ax.plot(share, published, "o", color=common.COLOURS[3], ms=4, label="document")
    ax.set_xlabel("share of the training")
    ax.set_title(title, fontsize="medium")


def plot_rate_distortion(fits):
    """MSE over the mutual information, and over the document's rate of all neurons."""
    fig, (left, right) = common.panels(1, 2, 4.6, 4.4, sharey=True)
    markers = {"f1": "v", "f2": "o", "f3": "D", "f4": "X", "f5": "P", "f6": "s"}
    colours = {2: common.COLOURS[0], 4: common.COLOURS[1], 6: common.COLOURS[3],
               8: common.COLOURS[4]}  # of latent sizes, from run to run
    for row, found in fits.items():
        style = dict(color=colours.get(row.d, "grey"), marker=markers[row.name[:2]], ms=5)
        means = {key: values.mean().item() for key, values in found["measures"].items()}
        low, high, mse = means["information_low"], means["information_high"], means["mse"]
        left.plot([low, high], [mse, mse], color=style["color"], lw=0.8)
        left.plot((low + high) / 2, mse, **style)
        right.plot(row.d * means["rate"], mse, **style)
    snrs = range(26)
    for d in (4, 6, 8):
        mse = [linear_code_mse(snr, d) for snr in snrs]
        right.plot([d * analytic_rate(snr) for snr in snrs], mse, "--", color=colours[d], lw=0.8)
    bits_of_8 = [linear_code_bits(snr, 8) for snr in snrs]  # over bits, all d have the same curve
    mse_of_8 = [linear_code_mse(snr, 8) for snr in snrs]
    left.plot(bits_of_8, mse_of_8, "--", color="grey", lw=0.8)
    bits = torch.linspace(4, 14, 50)
    for ax in (left, right):
        ax.plot(bits, shannon_lower_bound(bits), "k", lw=1)
    left.set(xlabel="I(X; Z) in bits, between its bounds", ylabel="MSE, held-out points",
             yscale="log", ylim=(1e-4, 1), xlim=(0, None))
    right.set(xlabel="the document's rate: d times bits per neuron", xlim=(0, None))
    for name, marker in markers.items():
        right.plot([], [], marker, color="grey", label=name)
    for d, colour in colours.items():
        right.plot([], [], color=colour, label=f"d = {d}")
    right.plot([], [], "--", color="grey", label="best linear code (left:\nat most these bits)")
    right.plot([], [], "k", lw=1, label="Shannon bound\n(high rate)")
    fig.legend(loc="outside right", fontsize="small")
    fig.set_figwidth(fig.get_figwidth() + 1.5)
    return fig


def plot_plane(cells, trials):
    """Heat maps of the generative KL and the MSE over the weights, with the document's points."""
    fig, (left, right) = common.panels(1, 2, 5.2, 4.6)
    picture = heat_map(left, cells, "generative_kl", "generative KL (nats)")
    heat_map(right, cells, "mse", "MSE per coordinate")
    for trial in trials:  # cells lie a decade apart: 0.001 at place 1 of BETAS, 0.1 at 1 of LAMBDAS
        x = math.log10(trial["beta"]) + 4
        y = math.log10(trial["lam"]) + 2
        colour = picture.to_rgba(max(trial["generative_kl"], LEAST))
        left.plot(x, y, "o", ms=6, color=colour, mec="white", mew=0.8)
    return fig


def heat_map(ax, cells, measure, title):
    """A measure of all cells, with the last weights of Table 5 marked."""
    means = torch.stack([found["measures"][measure].mean() for found in cells.values()])
    grid = means.clamp(min=LEAST).view(len(LAMBDAS), len(BETAS))
    picture = ax.imshow(grid.numpy(), norm="log", cmap="viridis_r", origin="lower", aspect="auto")
    for i in range(len(LAMBDAS)):
        for j in range(len(BETAS)):
            dark = picture.norm(grid[i, j].item()) > 0.5
            ax.text(j, i, f"{grid[i, j]:.2g}", ha="center", va="center", fontsize="small",
                    color="white" if dark else "black")
    for lam, label in ((1, "f5 annealed"), (0.1, "f5 Optuna")):
        place = BETAS.index(10), LAMBDAS.index(lam)
        ax.plot(*place, "s", ms=30, mfc="none", mec=common.COLOURS[1], mew=2)
        ax.annotate(label, place, (0, -23), textcoords="offset points", ha="center",
                    fontsize="x-small", color=common.COLOURS[1])
    ax.set_xticks(range(len(BETAS)), BETAS)
    ax.set_yticks(range(len(LAMBDAS)), LAMBDAS)
    ax.set_xlabel("β, weight of the KL (left column: MMD alone, f4)")
    ax.set_ylabel("λ, weight of the MMD² (bottom row: KL alone)")
    ax.set_title(title, fontsize="medium")
    ax.figure.colorbar(picture, ax=ax, ticks=[0.003, 0.01, 0.03, 0.1, 0.3, 1, 2, 5],
                       format="%g").minorticks_off()
    return picture


def plot(run, fits, cells, trials):
    """All figures that the rows there are allow; clouds are the first seed's."""
    for model, array, columns, title in (
            ("f2", "x_hat", 4, "Figure A: f2, reconstructions"),
            ("f4 standard", "generated", 3, "Figure B: f4, target N(0, 1), generated"),
            ("f4 fitted", "generated", 3, "Figure C: f4, target with own moments, generated")):
        rows = {row: found for row, found in fits.items() if row.name == model}
        if rows:
            run.figure(plot_clouds(rows, [array], columns), model.replace(" ", "_"), title)
    heads = {row: found for row, found in fits.items()
             if row.name in HEADS and row.d == 6 and row.snr in (15, NO_CHANNEL)}
    if heads:
        run.figure(plot_clouds(heads, ["x_hat", "generated"], len(heads)), "models",
                   "Reconstructions (top) and generated points (bottom)")
        first = {"held-out points": list(heads.values())[0]}
        run.figure(plot_clouds(first, ["x"], 1), "target", "Figure 1: targets")
    logs = {row.name: found["log"] for row, found in heads.items()}
    if "f2" in logs and "f5 annealed" in logs:
        run.figure(plot_training(logs["f2"], logs["f5 annealed"]), "training",
                   "Losses of training batches (the table's: held-out points)")
    if fits:
        run.figure(plot_rate_distortion(fits), "rate_distortion", "Information and distortion")
    if cells:
        run.figure(plot_plane(cells, trials), "plane",
                   "Constant weights, channel of 15 dB, d=6; squares: last weights of Table 5")


# --- verdicts and tables -------------------------------------------------------------------------

class Published(NamedTuple):
    """A figure of the document, and the row and measure that stand beside it."""
    claim: str
    row: str
    measure: str
    figure: float
    tolerance: float = None  # a tenth of the figure
    better: str = "lower"
    fitted: bool = False     # was the row's setting chosen to meet it?


PUBLISHED = [
    Published("Table 1: f1 (SNR not stated), MSE", "f1 held, 15 dB, d=6", "mse", 0.0920),
    Published("Table 2: f2, 15 dB, d=6, total loss", "f2, 15 dB, d=6", "total", 0.0052),
    Published("Table 2: bits per neuron", "f2, 15 dB, d=6", "rate", 2.528, 0.03, ""),
    Published("Table 3: f3, β=1, total loss", "f3 β=1, d=6", "total", 0.3467),
    Published("Table 3: f3, β=0.1, total loss", "f3 β=0.1, d=6", "total", 0.3467, fitted=True),
    Published("Table 4: f4, 15 dB, d=8, MSE", "f4 fitted, 15 dB, d=8", "mse", 0.0042),
    Published("Table 4: f4 standard, MSE", "f4 standard, 15 dB, d=8", "mse", 0.0042),
    Published("Table 5: f5 annealed, total loss", "f5 annealed, 15 dB, d=6", "total", 0.4364),
    Published("Table 5: f5 Optuna, total loss", "f5 Optuna, 15 dB, d=6", "total", 0.6700)]


class Order(NamedTuple):
    """A claim that the row low, which must have learned, has less of a measure than high."""
    claim: str
    low: str
    high: str
    measure: str = "generative_kl"
    document: str = "yes"


ORDERS = [
    Order("f2 overfits more at 20 dB (n = 1,000)", "f2 few, 15 dB, d=6", "f2 few, 20 dB, d=6",
          "gap"),
    Order("f2 reconstructs better than f1", "f2, 15 dB, d=6", "f1 held, 15 dB, d=6", "mse"),
    Order("f2 reconstructs better than f3", "f2, 15 dB, d=6", "f3 β=0.1, d=6", "mse"),
    Order("f2 reconstructs better than f4", "f2, 15 dB, d=6", "f4 fitted, 15 dB, d=6", "mse"),
    Order("f3 scatters more than f2", "f2, 15 dB, d=6", "f3 β=0.1, d=6", "scatter"),
    Order("f4 generates better than f2", "f4 fitted, 15 dB, d=6", "f2, 15 dB, d=6"),
    Order("f4 generates better than KL alone", "best f4", "best KL alone"),
    Order("f4 generates better at d=8 than at 6", "f4 fitted, 15 dB, d=8", "f4 fitted, 15 dB, d=6"),
    Order("f4 generates better at d=8 than at 4", "f4 fitted, 15 dB, d=8", "f4 fitted, 15 dB, d=4"),
    Order("f4 generates better than f5 annealed", "f4 fitted, 15 dB, d=8",
          "f5 annealed, 15 dB, d=6", document="2.98 < 4.52"),
    Order("f5 annealed better than f5 Optuna", "f5 annealed, 15 dB, d=6", "f5 Optuna, 15 dB, d=6",
          document="4.52 < 7.05"),
    Order("no f5 of the plane beats f4", "best f4", "best f5"),
    Order("no f5 of the search beats f4", "best f4", "f5 tuned"),
    Order("f6 generates better than f4 at d=6", "f6, 15 dB, d=6", "f4 fitted, 15 dB, d=6",
          document="proposed")]


def learned(measures):
    """Is the MSE below half of the mean's? Else no "yes" is earned."""
    return measures["mse"].mean() < VARIANCE / 2


def claims(at):
    """The closing table, as far as the rows {name: measures} go."""
    table = []
    for claim, row, measure, figure, tolerance, better, fitted in PUBLISHED:
        if row in at:
            here = at[row]
            table.append(common.reproduced(claim, figure, here[measure], tolerance, better, fitted,
                                           learned(here)))
    table += claims_about_f2(at)
    for claim, low, high, measure, document in ORDERS:
        if low in at and high in at:
            a, b = at[low], at[high]
            table.append(common.ordered(claim, a[measure], b[measure], learned(a), document))
    return table


def claims_about_f2(at):
    """Rows of what the document says of f2 over all SNRs and latent sizes.

    The rate's row, like Table 2's, checks the set-up: the rate follows from SNR and penalty.
    """
    grid = {}
    for snr in SNRS["f2"]:
        for d in SIZES["f2"]:
            grid[snr, d] = at.get(f"f2, {snr} dB, d={d}")
    if not all(grid.values()):
        return []
    falls, rises = [], []
    for d in SIZES["f2"]:
        middle = grid[15, d]
        for snr in (5, 10):
            noisier = grid[snr, d]["mse"]
            falls.append(common.ordered("", middle["mse"], noisier, learned(middle)))
        inside = 2.2 <= middle["rate"].mean() <= 3.5  # the document's range at 15 dB
        for low, high in ((5, 10), (10, 15), (15, 20)):
            rises.append(common.ordered("", grid[low, d]["rate"], grid[high, d]["rate"], inside))
    table = [common.throughout("f2: MSE at 15 dB below 5 and 10 dB", falls),
             common.throughout("f2: rate rises, 2.2-3.5 bits at 15 dB", rises)]
    here = grid.pop((15, 6))
    table.append(efficient("f2: 15 dB, d=6 is efficient", here, grid.values()))
    return table


def efficient(claim, here, rivals):
    """Row: no rival has both less error and less information, by two standard errors.

    Less or more information: where the bounds on both are apart; else the rival is undecided.
    """
    def below(a, b):
        return common.ordered("", a, b)["verdict"] == "yes"

    better = undecided = 0
    for rival in rivals:
        if below(rival["mse"], here["mse"]):
            if below(rival["information_high"], here["information_low"]):
                better += 1
            elif not below(here["information_high"], rival["information_low"]):
                undecided += 1
    verdict = "yes"
    if better:
        verdict = "no"
    elif undecided or not learned(here):
        verdict = "open"
    return dict(claim=claim, document="yes", here=f"{better} better, {undecided} undecided",
                verdict=verdict)


def models_table(at):
    """All rows with what was measured, means of the seeds."""
    table = []
    for name, measures in at.items():
        low, high = measures["information_low"].mean(), measures["information_high"].mean()
        table.append({"model": name, "I(X;Z), bits": f"{low:.1f} to {high:.1f}",
                      "MSE": common.show(measures["mse"]),
                      "bits a neuron": common.show(measures["rate"]),
                      "generative KL": common.show(measures["generative_kl"])})
    return table


def metrics_of(fits, seeds):
    """The logs as flat dicts, one for each row, seed and block of steps."""
    metrics = []
    for row, found in fits.items():
        log = found["log"]
        for s, seed in enumerate(seeds):
            for block in range(len(log["mse"])):
                values = {term: log[term][block, s].item() for term in log}
                metrics.append({"model": str(row), "seed": seed, "block": block + 1, **values})
    return metrics


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add
    models = [*SNRS, "plane"]
    add("--models", nargs="+", choices=models, default=models, metavar="MODEL",
        help=f"models to train, of {', '.join(models)}")
    add("--snr", nargs="+", type=number(float, -20, 60), metavar="DB",
        help="SNRs in dB in place of the models' own (f3, f6 and the plane keep theirs)")
    add("--latent", nargs="+", type=number(int, 1, 64), metavar="D",
        help="latent sizes in place of the models' own (the plane keeps its)")
    add("--seeds", type=number(int, 1, 100), help="seeds, counted from --seed; 1: no verdicts")
    add("--steps", type=number(int, 1, 10**7), help=f"steps of Adam, in batches of {BATCH}")
    add("--points", type=number(int, 1, 10**7), help="training points")
    add("--held-out", type=number(int, 100, 10**6), help="points to measure on")
    add("--tune", action="store_true", help="also search f5's weights with Optuna")
    add("--trials", type=number(int, 1, 10**4), help="trials of --tune, rounded up to eights")
    args = parser.parse(argv)
    if args.tune:
        common.need("optuna", "--tune")
    elif args.trials != PRESETS[args.preset]["trials"]:
        parser.error("argument --trials: goes with --tune")
    return args


def units_of(args):
    """{unit: its rows}: a unit for each model and latent size, and for each lambda of the plane."""
    units = {}
    for model in args.models:
        if model == "plane":
            for lam in LAMBDAS:
                units[f"plane-lambda{lam}"] = [weighted(beta, lam) for beta in BETAS]
            continue
        snrs = args.snr if args.snr and model != "f3" else SNRS[model]
        for d in args.latent or SIZES[model]:
            units[f"{model}-d{d}"] = [row for snr in snrs for row in rows_of(model, snr, d)]
    return units


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    seeds = list(range(args.seed, args.seed + args.seeds))
    with common.Run(__file__, args, "cube surface", additive=["models", "tune", "trials"]) as run:
        units = units_of(args)

        def compute(name):
            points = "selection" if name.startswith("plane") else "held-out"
            return train_and_evaluate(units[name], seeds, name, args, points)

        found = run.units(list(units), compute)
        fits, cells = {}, {}  # {row: weights, measures, arrays, log}
        for name, rows in units.items():
            kept = cells if name.startswith("plane") else fits
            kept.update(zip(rows, found[name]))
        trials, tuned = [], {}
        if args.tune:
            trials, tuned = search(run, seeds, args)

        at = {str(row): one["measures"] for row, one in fits.items()}
        chosen = {}  # on points of their own, then measured on the tables', which the same nets
        if cells:    # have not seen; being the best of 20 cells favours f5 over the best of 4 or 5
            chosen["best KL alone"] = best_of(cells, beta=True)
            chosen["best f4"] = best_of(cells, lam=True)
            chosen["best f5"] = best_of(cells, beta=True, lam=True)
        if tuned:
            chosen["f5 tuned"] = best_of(tuned, beta=True, lam=True)
        nets = cells | tuned
        for name, row in chosen.items():
            at[name] = evaluate_row(row, nets[row]["weights"], seeds, args)["measures"]

        plot(run, fits, cells, trials)
        plane = {row.name: one["measures"]["generative_kl"] for row, one in cells.items()}
        results = {"measures": at, "plane": plane, "trials": trials,
                   "chosen": {name: row.name for name, row in chosen.items()}}
        tables = {"Beyond the document: models, on held-out points": models_table(at),
                  "Beyond the document: yardsticks":
                      yardsticks(args.seed, min(2000, args.held_out))}
        judged = args.preset != "smoke" and args.seeds > 1  # something learned, a spread
        return run.finish(results, claims(at), tables, metrics_of(fits, seeds), judged)


if __name__ == "__main__":
    main()
