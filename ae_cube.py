"""Autoencoders on the surface of a cube: noise, information, KL, MMD, annealing, search.

Reproduces M. DaRocha, "Autoencoders & Controlling Latent Space for Generative Modeling" (VUW,
AIML425, 2024). With z = y(x) + noise, each of the models f1 to f5 minimises

    L = MSE(x, x_hat) + c * penalty(y) + beta_t * KL + lambda_t * MMD^2       (Eq. 5, Table 2)

    python ae_cube.py                          all models, 3 seeds: 5 to 6 minutes on 2 CPU cores
    python ae_cube.py --tune                   adds the Optuna search: about 3 minutes more
    python ae_cube.py --models f2 --snr 12 --latent 5 --out out/f2     one SNR and latent size

A run leaves figures, table.md, results.json, metrics.csv and the nets (units/*.pt) in its folder.
What the document leaves open, and what we chose:
* Nets 3-64-64-d-64-64-3 with tanh (ReLU stops f2 at 0.0054), Kaiming's start; 2,000 steps of Adam
  in batches of 250 at 0.01, falling to 0 over the second half; second decay 0.99 for 0.999.
* SNR is in dB against a signal of variance 1, so the noise is fixed; f1's signal outgrows it, as
  nothing holds it. In "f1 held" and "f4 fitted" the noise follows the signal's variance.
* f2's penalty is on y: the document writes z, but its rates are those of y ("f2 on z": the other).
* MSE and penalty are means, over coordinates and latent dimensions; KL, in nats, is a sum over
  them; MMD^2 is unbiased, on 64 points of a batch. c = 1, f4's lambda = 1; f3's beta is 1, which
  collapses it to a loss of 5/9, or 0.1, which comes near the document's.
* f3 has no channel; f4, f5 and the plane add a channel's noise to the encoder's. f5's weights rise
  over the first two thirds of the steps, as in Table 5; the plane's are constant.
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
BATCH, MMD_POINTS, LEARNING_RATE = 250, 64, 1e-2
ANNEAL = 2 / 3             # tau of Eq. (6) as a share of the steps: 1,000 of 1,500 in Table 5
NO_CHANNEL = math.inf      # dB
VARIANCE = 5 / 9           # of a coordinate: the MSE of the mean
SNRS = {"f1": [5, 15], "f2": [5, 10, 15, 20], "f2 on z": [15], "f2 few": [15, 20],
        "f3": [NO_CHANNEL], "f4": [5, 10, 15], "f5": [15]}
SIZES = {"f1": [6], "f2": [2, 4, 6, 8], "f2 on z": [6], "f2 few": [6], "f3": [6], "f4": [4, 6, 8],
         "f5": [6]}
HEADS = ["f1", "f2", "f3 β=0.1", "f4 standard", "f4 fitted", "f5 annealed"]  # of the figures
BETAS = [0, 0.001, 0.01, 0.1, 1, 10]  # the plane: f3 where only lambda is 0, f4 where only beta
LAMBDAS = [0, 0.1, 1, 10, 100]        # is, f5 where none is
SEARCH_BETA, SEARCH_LAMBDA = (1e-3, 10), (1e-1, 100)  # where Optuna looks: the plane's inside
TABLE_2 = [0.9352, 0.0095, 0.0071, 0.0064, 0.0062, 0.0055, 0.0053, 0.0052, 0.0053, 0.0052]
TABLE_2_BITS = [3.006, 2.494, 2.503, 2.513, 2.498, 2.527, 2.530, 2.504, 2.510, 2.528]
TABLE_5_EPOCHS = [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1400]
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
    held: bool = False         # does the channel's noise follow the signal's variance?
    stochastic: bool = True    # does the encoder put out a variance?
    penalised: str = "y"       # f2's penalty before ("y") or after the noise ("z")
    points: int = 0            # training points, 0: as many as the preset has

    @property
    def noise(self):
        return 10 ** (-self.snr / 10)

    def __str__(self):
        channel = "" if self.snr == NO_CHANNEL else f"{self.snr:g} dB, "
        return f"{self.name}, {channel}d={self.d}"


def rows_of(model, snr, d):
    """The rows of a model (a key of SNRS) at one SNR and latent size."""
    plain = Row("f1", snr, d, stochastic=False)
    if model == "f1":  # Table 1
        return [plain._replace(own_moments=True),
                plain._replace(name="f1 held", own_moments=True, held=True)]
    if model == "f2":  # Table 2, Figure A
        return [plain._replace(name="f2", c=1)]
    if model == "f2 on z":
        return [plain._replace(name="f2 on z", c=1, penalised="z")]
    if model == "f2 few":
        return [plain._replace(name="f2 few", c=1, points=1000)]
    if model == "f3":  # Table 3; f6 is the document's future work, with the plane's channel
        return [Row("f3 β=1", snr, d, beta=(1, 1)), Row("f3 β=0.1", snr, d, beta=(0.1, 0.1)),
                Row("f6", 15, d, beta=(0, 0.01))]
    if model == "f4":  # Table 4, Figures B and C
        return [Row("f4 standard", snr, d, lam=(1, 1)),
                Row("f4 fitted", snr, d, lam=(1, 1), own_moments=True, held=True)]
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
    """3-64-64-D, a noisy channel, D-64-64-3; a stochastic encoder (f3 to f5) also puts out the
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

    def forward(self, x, eps, noise, held=0):
        """x (B, 3) and standard normal eps (B, D) to y, Var(z|x), z (B, D) and x_hat (B, 3).

        noise: the channel's variance, in units of the signal's where held is 1 and not 0.
        """
        y = self.encoder(x)
        if self.stochastic:
            y, logvar = y.chunk(2, 1)  # (B, D) each
        power = held * y.var(0) + (1 - held)  # (D,)
        var = (noise * power).expand_as(y)
        if self.stochastic:
            var = var + logvar.clamp(-30, 20).exp()
        z = y + var.sqrt() * eps  # Eq. (2), reparameterised as in Figure 2
        return y, var, z, self.decoder(z)


# --- objective -----------------------------------------------------------------------------------

def information_rate(z, var):
    """Bits per neuron, 1/2 log2(Var(z_j) / Var(z_j|x)), mean over points and neurons. Eq. (13)"""
    return 0.5 * (z.var(0).log2() - var.log2().mean(0)).mean()


def moment_penalty(y):
    """Squared deviations of the means from 0 and the variances from 1, mean over dimensions."""
    return (y.mean(0) ** 2 + (y.var(0) - 1) ** 2).mean()  # Table 2's latent regularisation


def kl_to_standard(mu, var):
    """KL(N(mu, var) || N(0, 1)) in nats, sum over dimensions, mean over points. Eq. (9)"""
    return 0.5 * (mu ** 2 + var - 1 - var.log()).sum(1).mean()


def squared_distances(a, b):
    """||a_i - b_j||^2. (B, D), (C, D) -> (B, C)"""
    norms = (a ** 2).sum(1)[:, None] + (b ** 2).sum(1)
    return (norms - 2 * a @ b.T).clamp(min=0)


def median_heuristic(a, b):
    """The kernel's r: the median squared distance among 32 points of a and 32 of b."""
    pooled = torch.cat([a[:32], b[:32]])  # (64, D)
    i, j = torch.triu_indices(len(pooled), len(pooled), 1, device=a.device)
    return squared_distances(pooled, pooled)[i, j].median().clamp(min=1e-12)


def mmd2(a, b, r):
    """Unbiased squared MMD with the kernel exp(-||x - y||^2 / r). (B, D), (C, D) -> ()"""
    def off_diagonal_mean(k):
        n = len(k)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1))  # k(x, x) = 1 would bias it

    aa = torch.exp(-squared_distances(a, a) / r)
    bb = torch.exp(-squared_distances(b, b) / r)
    ab = torch.exp(-squared_distances(a, b) / r)
    return off_diagonal_mean(aa) + off_diagonal_mean(bb) - 2 * ab.mean()


def latent_target(z, gauss, own_moments):
    """Draws of the latent target from standard normal ones: N(0, 1), or with z's own moments."""
    # gradients flow through the moments, as through r: held constant, they would shrink z
    own = z.mean(0) + z.std(0) * gauss
    return own_moments * own + (1 - own_moments) * gauss


def annealed(start, end, t, tau):
    """Eq. (6), min(1, t / tau), between two ends."""
    return start + (end - start) * min(1.0, t / tau)


def loss(x, y, var, z, x_hat, target=None, penalised="y", c=None, beta=None, lam=None):
    """The total loss of one net, Eq. (5) with Table 2's penalty, and its terms.

    Terms without a weight are left out. target: draws of the latent target (C, D), for the MMD.
    """
    terms = {"mse": ((x_hat - x) ** 2).mean()}  # Eq. (14)
    total = terms["mse"]
    if c is not None:
        terms["penalty"] = moment_penalty(y if penalised == "y" else z)
        total = total + c * terms["penalty"]
    if beta is not None:
        terms["kl"] = kl_to_standard(y, var)
        total = total + beta * terms["kl"]
    if lam is not None:
        codes = z[:len(target)]
        terms["mmd"] = mmd2(codes, target, median_heuristic(codes, target))
        total = total + lam * terms["mmd"]
    terms["rate"] = information_rate(z, var)
    terms["total"] = total
    return total, terms


# --- train ---------------------------------------------------------------------------------------

def train(rows, seeds, name, steps, points, device="cpu"):
    """Train all rows x seeds of one latent size side by side.

    The rows differ in SNR, weights, target and what the noise follows, not in d, encoder, penalty
    and training points. A seed gives its nets one start, the same training points, batches and
    noise. Returns the nets' weights, stacked {name: (M, ...)} in the order (row, seed), and the
    log of the loss's terms {term: (steps, R, S)}. FloatingPointError where one is not finite.
    """
    R, S, shared = len(rows), len(seeds), rows[0]
    generators = [common.generator(seed, name, device) for seed in seeds]
    data = [cube_surface(shared.points or points, g) for g in generators]
    nets = [build(shared, seed).to(device) for _ in rows for seed in seeds]
    params, _ = stack_module_state(nets)  # {name: (M, ...)}
    optimiser = torch.optim.Adam(params.values(), LEARNING_RATE, betas=(0.9, 0.99), fused=True)

    def column(field):
        """One number of all nets, (M,), or the two ends of a weight that is annealed."""
        values = torch.tensor([getattr(row, field) for row in rows], dtype=torch.float)
        return values.repeat_interleave(S, 0).to(device)

    noise, held, own_moments = column("noise"), column("held"), column("own_moments")
    beta, lam = column("beta"), column("lam")  # (M, 2): at the start and from tau on
    use_kl, use_mmd = bool(beta.any()), bool(lam.any())
    terms, weights = ["mse"], {}
    if shared.c:
        weights["c"] = column("c")
        terms.append("penalty")
    if use_kl:
        terms.append("kl")
    if use_mmd:
        terms.append("mmd")
    terms += ["rate", "total"]

    def loss_of_one(params, x, eps, gauss, noise, held, own_moments, weights):
        y, var, z, x_hat = functional_call(nets[0], params, (x, eps, noise, held))
        target = None
        if use_mmd:
            target = latent_target(z, gauss, own_moments)
        return loss(x, y, var, z, x_hat, target, shared.penalised, **weights)

    def draw(n):
        """Standard normal numbers (M, n, D), a seed's the same for all rows."""
        own = [torch.randn(n, shared.d, generator=g, device=device) for g in generators]
        return torch.stack(own).repeat(R, 1, 1)

    log = torch.zeros(steps, len(terms), R * S, device=device)
    for step in common.steps(name, steps, log, terms, optimiser, *params.values(), *generators):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1, 2 * (1 - step / steps))
        if use_kl:
            weights["beta"] = annealed(*beta.T, step, ANNEAL * steps)  # (M,)
        if use_mmd:
            weights["lam"] = annealed(*lam.T, step, ANNEAL * steps)
        batches = [batch(points, g) for points, g in zip(data, generators)]
        x = torch.stack(batches).repeat(R, 1, 1)  # (M, B, 3)
        eps, gauss = draw(BATCH), draw(MMD_POINTS)
        total, values = vmap(loss_of_one)(params, x, eps, gauss, noise, held, own_moments, weights)
        optimiser.zero_grad()
        total.sum().backward()  # the nets share no weight: each is trained on its own loss
        optimiser.step()
        log[step] = torch.stack([values[term] for term in terms]).detach()  # (T, M)
    return params, dict(zip(terms, log.view(steps, len(terms), R, S).unbind(1)))


def batch(points, g):
    """A batch of points, drawn with replacement. (n, 3) -> (B, 3)"""
    return points[torch.randint(len(points), (BATCH,), generator=g, device=points.device)]


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
    """The most that this code can tell about x: that of a Gaussian source."""
    return 1.5 * math.log2(1 + d / 3 * 10 ** (snr / 10))


def shannon_lower_bound(bits):
    """Least MSE of any code for a surface of area 24; no bound below about 4 bits in total."""
    along = 24 * 2 ** -bits / (2 * math.pi * math.e)  # error in each direction of the surface
    return 2 * along / 3  # per coordinate


@torch.no_grad()
def evaluate(net, row, seed, n, device="cpu", points="held-out"):
    """Measure one net on n points that it was not trained on, the same for all nets of a seed.

    mse, total, rate (bits per neuron), information_low and _high (bits), mmd, generative_kl (nats,
    of 2,000 decoded draws of the latent target), scatter (variance of x_hat over the noise); also
    the first 1,000 of x, x_hat and generated points. points: "held-out", or "selection" to choose
    rows by their results on other points.
    """
    def draw(what, size=n):
        g = common.generator(seed, f"{points} {what}", device)
        return torch.randn(size, row.d, generator=g, device=device)

    x = cube_surface(n, common.generator(seed, points, device))
    y, var, z, x_hat = net(x, draw("noise"), row.noise, row.held)
    target = latent_target(z, draw("target"), row.own_moments)
    if row.c and row.penalised == "y":
        target = target * (1 + row.noise) ** 0.5  # Var(y) is held at 1
    generated = net.decoder(target)
    mse = ((x_hat - x) ** 2).mean()
    a, b = z[:2000], target[:2000]
    mmd = mmd2(a, b, median_heuristic(a, b))
    total = mse + row.beta[1] * kl_to_standard(y, var) + row.lam[1] * mmd
    total = total + row.c * moment_penalty(y if row.penalised == "y" else z)
    some = slice(4000 if points == "held-out" else 500)  # n^2 numbers
    low, high = mutual_information(y[some], var[some], z[some])
    again = []
    for i in range(8):
        eps = draw(f"noise {i}", len(y[:1000]))
        again.append(net.decoder(y[:1000] + var[:1000].sqrt() * eps))
    scatter = torch.stack(again).var(0).mean()
    kl = knn_kl(x[:2000], generated[:2000])
    measures = {"mse": mse, "total": total, "rate": information_rate(z, var), "mmd": mmd,
                "information_low": low, "information_high": high, "generative_kl": kl,
                "scatter": scatter}
    measures = {key: value.item() for key, value in measures.items()}
    arrays = {"x": x, "x_hat": x_hat, "generated": generated}
    return measures, {key: value[:1000] for key, value in arrays.items()}


def evaluate_row(row, weights, seeds, args, points="held-out"):
    """Of a row's nets, one a seed: {"weights", "measures": {name: (S,)}, "arrays" of the first}."""
    measures, arrays = [], []
    for seed, state in zip(seeds, weights):
        net = Autoencoder(row.d, row.stochastic)
        net.load_state_dict(state)
        net.to(args.device)
        measured, clouds = evaluate(net, row, seed, args.held_out, args.device, points)
        measures.append(measured)
        arrays.append(clouds)
    return {"weights": weights, "measures": common.over_repeats(measures), "arrays": arrays[0]}


def train_and_evaluate(rows, seeds, name, args, points="held-out"):
    """A work unit: of each row what evaluate_row returns, with the log in at most 100 blocks."""
    params, log = train(rows, seeds, name, args.steps, args.points, args.device)
    found = []
    for r, row in enumerate(rows):
        weights = []
        for m in range(r * len(seeds), (r + 1) * len(seeds)):
            weights.append({key: value[m].detach() for key, value in params.items()})
        one = evaluate_row(row, weights, seeds, args, points)
        one["log"] = {term: common.in_blocks(values[:, r]) for term, values in log.items()}
        at_the_end = one["log"]["mse"][-5:].mean(0)  # (S,), on training points
        one["measures"]["gap"] = one["measures"]["mse"] / at_the_end.cpu() - 1
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
    best, least = None, math.inf
    for row, found in cells.items():
        kl = found["measures"]["generative_kl"].mean().item()
        if (row.beta[1] > 0) == beta and (row.lam[1] > 0) == lam and kl < least:
            best, least = row, kl
    return best


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
    """Optuna's trials [{beta, lam, generative_kl}], and the nets {row: found} that they trained."""
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
        axes[0].scatter([], [], [], color=common.COLOURS[face], label=f"face {label}")
    fig.legend(loc="outside lower center", ncols=6, fontsize="large", markerscale=1.5)
    return fig


def plot_training(f2, f5):
    """Logs {term: (blocks, S)} of f2 and f5 beside those of Tables 2 and 5."""
    fig, axes = common.panels(1, 4, 3.3, 3.2)
    plot_log(axes[0], f2["total"], range(0, 1000, 100), TABLE_2, "f2, 15 dB, d=6: total loss")
    plot_log(axes[1], f2["rate"], range(0, 1000, 100), TABLE_2_BITS, "f2: bits per neuron")
    plot_log(axes[2], f5["total"], TABLE_5_EPOCHS, TABLE_5, "f5 annealed: total loss")
    plot_log(axes[3], f5["mmd"], TABLE_5_EPOCHS, TABLE_5_MMD, "f5 annealed: MMD² (here unbiased)")
    axes[0].set_yscale("log")
    axes[2].set_yscale("log")
    axes[0].legend(fontsize="small")
    return fig


def plot_log(ax, values, epochs, published, title):
    """Our blocks (blocks, S) and the document's figures over the share of the training."""
    blocks = torch.arange(1, len(values) + 1) / len(values)
    lines = ax.plot(blocks, values, color=common.COLOURS[0], lw=0.8)
    lines[0].set_label("here, each seed")
    share = [epoch / epochs[-1] for epoch in epochs]
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
    snrs, bits = range(0, 26), torch.linspace(4, 14, 50)
    for d in (4, 6, 8):
        mse = [linear_code_mse(snr, d) for snr in snrs]
        right.plot([d * analytic_rate(snr) for snr in snrs], mse, "--", color=colours[d], lw=0.8)
    bits_of_8 = [linear_code_bits(snr, 8) for snr in snrs]  # over bits, all d have the same curve
    mse_of_8 = [linear_code_mse(snr, 8) for snr in snrs]
    left.plot(bits_of_8, mse_of_8, "--", color="grey", lw=0.8)
    for ax in (left, right):
        ax.plot(bits, shannon_lower_bound(bits), "k", lw=1)
    left.set(xlabel="I(X; Z) in bits, between its bounds", ylabel="MSE, held-out points",
             yscale="log", ylim=(1e-4, 1), xlim=(0, 14))
    right.set(xlabel="the document's rate: d times bits per neuron", xlim=(0, 30))
    for name, marker in markers.items():
        right.plot([], [], marker, color="grey", label=name)
    for d, colour in colours.items():
        right.plot([], [], color=colour, label=f"d = {d}")
    right.plot([], [], "--", color="grey", lw=0.8, label="best linear code")
    right.plot([], [], "k", lw=1, label="Shannon bound\n(high rate)")
    fig.legend(loc="outside right", fontsize="small")
    fig.set_figwidth(fig.get_figwidth() + 1.5)
    return fig


def plot_plane(cells, trials):
    """Heat maps of the generative KL and the MSE over the weights, with the document's points."""
    fig, (left, right) = common.panels(1, 2, 5.2, 4.6)
    picture, bar = plot_cells(left, cells, "generative_kl", "generative KL (nats)")
    plot_cells(right, cells, "mse", "MSE per coordinate")
    f4 = cells[best_of(cells, lam=True)]["measures"]["generative_kl"].mean().item()
    bar.ax.axhline(math.log10(f4), color=common.COLOURS[3], lw=2)
    bar.ax.set_xlabel("line:\nbest f4", fontsize="x-small")
    for trial in trials:  # cells lie a decade apart: 0.001 at place 1 of BETAS, 0.1 at 1 of LAMBDAS
        x, y = math.log10(trial["beta"]) + 4, math.log10(trial["lam"]) + 2
        colour = picture.to_rgba(math.log10(trial["generative_kl"]))
        left.plot(x, y, "o", ms=6, color=colour, mec="white", mew=0.8)
    return fig


def plot_cells(ax, cells, measure, title):
    """One heat map, in logarithms, with the document's weights marked: (image, colour bar)."""
    means = torch.stack([found["measures"][measure].mean() for found in cells.values()])
    grid = means.view(len(LAMBDAS), len(BETAS))
    picture = ax.imshow(grid.log10(), cmap="viridis_r", origin="lower", aspect="auto")
    for i in range(len(LAMBDAS)):
        for j in range(len(BETAS)):
            dark = picture.norm(grid[i, j].log10().item()) > 0.5
            ax.text(j, i, f"{grid[i, j]:.2g}", ha="center", va="center", fontsize="small",
                    color="white" if dark else "black")
    for lam, label in ((1, "f5 annealed"), (0.1, "f5 Optuna")):
        place = BETAS.index(10), LAMBDAS.index(lam)
        ax.plot(*place, "s", ms=30, mfc="none", mec=common.COLOURS[1], mew=2)
        ax.annotate(label, place, (0, -23), textcoords="offset points", ha="center",
                    fontsize="x-small", color=common.COLOURS[1])
    ax.set_xticks(range(len(BETAS)), BETAS)
    ax.set_yticks(range(len(LAMBDAS)), LAMBDAS)
    ax.set_xlabel("β, weight of the KL (left column: f4)")
    ax.set_ylabel("λ, weight of the MMD² (bottom row: f3)")
    ax.set_title(title, fontsize="medium")
    bar = ax.figure.colorbar(picture, ax=ax, format=lambda power, _: f"{10 ** power:.2g}")
    return picture, bar


def plot(run, fits, cells, trials):
    """All figures that the rows there are allow; clouds are the first seed's."""
    for model, array, columns, title in (
            ("f2", "x_hat", 4, "Figure A: f2, reconstructions"),
            ("f4 standard", "generated", 3, "Figure B: f4, target N(0, 1), generated"),
            ("f4 fitted", "generated", 3, "Figure C: f4, target with own moments, generated")):
        rows = {row: found for row, found in fits.items() if row.name == model}
        if rows:
            run.figure(plot_clouds(rows, [array], columns), model.replace(" ", "_"), title)
    heads = {}
    for row, found in fits.items():
        if row.name in HEADS and row.d == 6 and row.snr in (15, NO_CHANNEL):
            heads[row] = found
    if heads:
        first = dict(list(heads.items())[:1])
        run.figure(plot_clouds(first, ["x"], 1), "target", "Figure 1: targets")
        run.figure(plot_clouds(heads, ["x_hat", "generated"], len(heads)), "models",
                   "Reconstructions (top) and generated points (bottom)")
    logs = {row.name: found["log"] for row, found in heads.items()}
    if "f2" in logs and "f5 annealed" in logs:
        run.figure(plot_training(logs["f2"], logs["f5 annealed"]), "training",
                   f"Training in batches of {BATCH}, beside the document's logs")
    if fits:
        run.figure(plot_rate_distortion(fits), "rate_distortion", "Information and distortion")
    if cells:
        run.figure(plot_plane(cells, trials), "plane", "The plane of both weights, 15 dB, d=6")


# --- verdicts ------------------------------------------------------------------------------------

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
    Order("f2 reconstructs better than f1", "f2, 15 dB, d=6", "f1 held, 15 dB, d=6", "mse"),
    Order("f2 reconstructs better than f3", "f2, 15 dB, d=6", "f3 β=0.1, d=6", "mse"),
    Order("f2 reconstructs better than f4", "f2, 15 dB, d=6", "f4 fitted, 15 dB, d=6", "mse"),
    Order("f3 scatters more than f2", "f2, 15 dB, d=6", "f3 β=0.1, d=6", "scatter"),
    Order("f4 generates better than f2", "f4 fitted, 15 dB, d=6", "f2, 15 dB, d=6"),
    Order("f4 generates better than f3 (best)", "best f4", "best f3"),
    Order("f4 generates better at d=8 than at 6", "f4 fitted, 15 dB, d=8", "f4 fitted, 15 dB, d=6"),
    Order("f4 generates better at d=8 than at 4", "f4 fitted, 15 dB, d=8", "f4 fitted, 15 dB, d=4"),
    Order("f4 generates better than f5 annealed", "f4 fitted, 15 dB, d=8",
          "f5 annealed, 15 dB, d=6", document="2.98; 4.52"),
    Order("f5 annealed better than f5 Optuna", "f5 annealed, 15 dB, d=6", "f5 Optuna, 15 dB, d=6",
          document="4.52; 7.05"),
    Order("no f5 of the plane beats f4", "best f4", "best f5"),
    Order("no f5 of the search beats f4", "best f4", "f5 tuned")]


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
    """Rows of what the document says of f2 over all SNRs and latent sizes."""
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
    few, few_at_20 = at.get("f2 few, 15 dB, d=6"), at.get("f2 few, 20 dB, d=6")
    if few and few_at_20:
        table.append(common.ordered("f2 overfits more at 20 dB (n = 1,000)", few["gap"],
                                    few_at_20["gap"], learned(few_at_20)))
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


# --- tables --------------------------------------------------------------------------------------

def models_table(at):
    """All rows with what was measured, means of the seeds."""
    table = []
    for name, measures in at.items():
        low, high = measures["information_low"].mean(), measures["information_high"].mean()
        row = {"model": name, "I(X;Z), bits": f"{low:.1f} to {high:.1f}"}
        for head, key in (("MSE", "mse"), ("bits a neuron", "rate"),
                          ("generative KL", "generative_kl")):
            row[head] = common.show(measures[key])
        table.append(row)
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
    add("--models", nargs="+", choices=models, default=models, help="models to train")
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
        snrs = args.snr or SNRS[model]
        if model == "f3":
            snrs = SNRS[model]
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
            if name.startswith("plane"):
                cells.update(zip(rows, found[name]))
            else:
                fits.update(zip(rows, found[name]))
        trials, tuned = [], {}
        if args.tune:
            trials, tuned = search(run, seeds, args)

        at = {str(row): one["measures"] for row, one in fits.items()}
        chosen = {}  # on points of their own, and measured on the tables'
        if cells:
            chosen["best f3"] = cells, best_of(cells, beta=True)
            chosen["best f4"] = cells, best_of(cells, lam=True)
            chosen["best f5"] = cells, best_of(cells, beta=True, lam=True)
        if tuned:
            chosen["f5 tuned"] = tuned, best_of(tuned, beta=True, lam=True)
        for name, (among, row) in chosen.items():
            at[name] = evaluate_row(row, among[row]["weights"], seeds, args)["measures"]

        plot(run, fits, cells, trials)
        weights = {name: row.name for name, (_, row) in chosen.items()}
        plane = {row.name: one["measures"]["generative_kl"] for row, one in cells.items()}
        results = {"measures": at, "weights": weights, "plane": plane, "trials": trials}
        tables = {"Beyond the document: models, on held-out points": models_table(at),
                  "Beyond the document: yardsticks":
                      yardsticks(args.seed, min(2000, args.held_out))}
        judged = args.preset != "smoke" and args.seeds > 1  # something learned, a spread
        return run.finish(results, claims(at), tables, metrics_of(fits, seeds), judged)


if __name__ == "__main__":
    main()
