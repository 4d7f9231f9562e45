"""Latent space optimisation: digits drawn by a classifier through the decoder of an autoencoder.

Reproduces G. Nothnagel, "Combining Autoencoders and Classifiers for Latent Space Optimization"
(2024), on MNIST at 14x14. A decoder and a classifier, trained apart and frozen, are put in a row,
and a random latent point v is moved until the classifier sees the wanted digit y (Algorithm 3):

    E(v) = sum_j (classifier(decoder(v))_j - onehot(y)_j)^2,    v <- v + D C / |D|^2,    D = dE/dv

where C < 0 is the change of E that is wanted; success is E <= 0.01. It is compared with the same
optimisation of the 196 pixels, with a VAE and a GAN, and (the document's next experiment) done
through their decoders and through regularised autoencoders.

    python lso_mnist.py                                  everything: about 4 minutes on 2 CPU cores
    python lso_mnist.py --rule polyak --out out/polyak   the same with another rule for C
    python lso_mnist.py --dataset glyphs --out out/glyphs    digits drawn here, without MNIST

A run leaves figures, results.json, metrics.csv and the nets (units/*.pt) in
out/lso_mnist-<preset>. It has not been timed on a GPU.

What the document leaves open, and what we chose:
* Halving by 2x2 average pooling (--downsample stride: every 2nd pixel). Sigmoid nets: 196-100-k
  with linear codes, k-100-196, and 196-64-10; Adam on 3,000 batches of 100. At a rate of 1e-3 LSO-1
  ends near the document's error; the rows "regular" have 1e-2, which is much better (regular 0).
* The rule for C and the step limit decide the success rates. Default: C = -0.01, the threshold
  itself, and 250 steps, which meets 64 % and 82 %. "patient" has four times the steps, "fine" a
  tenth of C and twenty times; "proportional" is C = -E/10, "polyak" C = -E, Polyak's step to 0.
* Starts are normal, with the mean and deviation of each unit over training codes (--start box:
  uniform in their range; codes: training codes themselves), in a VAE or GAN draws from the prior.
  Pixels start likewise; they are clipped to [0, 1] only at the end, where few of them still
  satisfy the classifier. The judge sees them clipped and, as a row of its own, unclipped.
* Where |D|^2 <= 1e-30 a start stays for good and is counted as stuck.
* Success rates are those of first attempts. What is judged went on from new starts until success,
  as the document assumes ("as many attempts as needed"), or is the last of --attempts.
* The document shows VAE and GAN pictures of other papers. Ours see the images of LSO-2, and draw
  from the prior until the classifier sees the wanted digit with E <= 0.01: Algorithm 3 without a
  step. The VAE has LSO-2's nets, a higher rate and twice the batches; the GAN larger nets.
* "regular" autoencoders have unit noise on their codes z and beta |z|^2 / 2 in the loss (a VAE of
  constant variance, a baseline of Ghosh et al. 2020); regular 0 has neither.
* The judge is a convolutional net, trained on the 50,000 images (glyphs: 10,000) that nothing else
  sees.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import common

# R repeats (nets side by side), N starts, B batch, k latent units; images are rows of 196 pixels
PRESETS = {
    "smoke": dict(dataset="glyphs", repeats=2, starts=20, train_steps=150, steps=120, attempts=1,
                  sizes=[5, 50]),
    "quick": dict(dataset="mnist", repeats=5, starts=100, train_steps=3000, steps=250, attempts=50,
                  sizes=[2, 5, 10, 50, 100]),
    "paper": dict(dataset="mnist", repeats=20, starts=100, train_steps=3000, steps=250, attempts=50,
                  sizes=[1, 2, 3, 5, 7, 10, 14, 30, 50, 70, 100]),
}
SIDE, PIXELS, BATCH, MODEL_IMAGES = 14, 196, 100, 10_000
THRESHOLD = 0.01  # of the total squared error: the document's ".001 MSE" over 10 outputs
GUARD = 1e-30     # of |D|^2
RULES = {  # the wanted change C of the error E, factor on the step limit
    "constant": (lambda E: -0.01, 1), "patient": (lambda E: -0.01, 4),
    "fine": (lambda E: -0.001, 20), "proportional": (lambda E: -0.1 * E, 1),
    "polyak": (lambda E: -E, 1),
}
STARTS = ("normal", "box", "codes")


class Model(NamedTuple):
    """One generative model: latent units, training images, and how it is trained."""
    k: int
    images: int = MODEL_IMAGES
    lr: float = 1e-3
    beta: float = 0.0       # weight of the KL per nat, against the sum of squared pixel errors
    noise: str = "none"     # on the codes: none, unit (variance 1) or learned (a VAE)
    longer: int = 1         # factor on --train-steps


MODELS = {
    "LSO-1": Model(5, images=1000), "LSO-2": Model(20),
    **{f"regular {b:g}": Model(20, lr=1e-2, beta=b, noise="unit" if b else "none")
       for b in (0, 0.01, 0.1)},
    "VAE": Model(20, lr=1e-2, beta=0.2, noise="learned", longer=2),
    "GAN": Model(20, lr=1e-3, longer=2),
}
STUDIED = ("LSO-1", "LSO-2", "input")  # the document's own; input: optimisation of the pixels
METHODS = ("input", "LSO-1", "LSO-2", "regular 0.1", "LSO in VAE", "LSO in GAN", "LSO-2 draws",
           "VAE", "GAN", "real")  # the rows of Figure 6; real: test images
REGULAR = ("regular 0", "regular 0.01", "regular 0.1", "LSO in VAE", "LSO in GAN")
DOCUMENT = {"LSO-1": (0.0239, 0.64), "LSO-2": (0.0203, 0.82)}  # MSE, success; section 5.1
COMPARISONS = [  # claim, document, rows a, b; a is read `factor` times as often (0: no less) as b
    ("LSO is read as wanted 3 times as often", "wildly", "LSO-2", "input", 3),
    ("GAN draws are read more often than LSO", "yes", "GAN", "LSO-2", 1),
    ("VAE draws are read more often than LSO", "yes", "VAE", "LSO-2", 1),
    ("LSO in a GAN is read as often as draws", "open", "LSO in GAN", "GAN", 0),
    ("LSO in a VAE is read as often as draws", "open", "LSO in VAE", "VAE", 0),
    ("LSO is read as often as draws", "-", "LSO-2", "LSO-2 draws", 0),
    ("a regular latent space is read more often", "suspected", "regular 0.1", "regular 0", 1),
]


# --- data ----------------------------------------------------------------------------------------

def load_data(dataset, downsample, folder, device):
    """{split: (x (n, 196) in [0, 1], y (n,))}: models and judge share no image; test is apart."""
    if dataset == "glyphs":
        x, y = common.glyphs(25_000, 0, device=device)
        (x, x_test), (y, y_test) = x.split([20_000, 5000]), y.split([20_000, 5000])
    else:
        x, y = common.images(dataset, True, folder, device)
        x_test, y_test = common.images(dataset, False, folder, device)
    x, x_test = halve(x, downsample), halve(x_test, downsample)
    n = MODEL_IMAGES
    return {"models": (x[:n], y[:n]), "judge": (x[n:], y[n:]), "test": (x_test, y_test)}


def halve(x, how):
    """28x28 to 14x14 by the mean of 2x2 pixels or every second one. (n, 1, 28, 28) -> (n, 196)"""
    return (F.avg_pool2d(x, 2) if how == "pool" else x[:, :, ::2, ::2]).flatten(1)


# --- model ---------------------------------------------------------------------------------------

class MLP(nn.Module):
    """R nets side by side, one batched product per layer. (R, B, in) -> (R, B, out)"""

    def __init__(self, sizes, repeats, generator, hidden=torch.sigmoid, out=None):
        super().__init__()
        self.hidden, self.out = hidden, out
        gain = 2.0 if hidden is torch.sigmoid else math.sqrt(2)  # keeps the signal's variance
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in zip(sizes, sizes[1:]):
            draw = torch.randn(repeats, a, b, generator=generator, device=generator.device)
            self.weights.append(draw * gain / math.sqrt(a))
            self.biases.append(torch.zeros(repeats, 1, b, device=generator.device))

    def forward(self, h):
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(bias, self.hidden(h) if i else h, weight)
        return self.out(h) if self.out else h


def build(name, model, repeats, generator):
    """The nets of one row of MODELS; all have a decoder (R, B, k) -> (R, B, 196) in [0, 1]."""
    g, k = generator, model.k
    if name == "GAN":
        return nn.ModuleDict({
            "decoder": MLP([k, 256, 256, PIXELS], repeats, g, torch.relu, torch.sigmoid),
            "discriminator": MLP([PIXELS, 256, 256, 1], repeats, g, F.leaky_relu)})
    codes = 2 * k if model.noise == "learned" else k
    return nn.ModuleDict({"encoder": MLP([PIXELS, 100, codes], repeats, g),
                          "decoder": MLP([k, 100, PIXELS], repeats, g, out=torch.sigmoid)})


class Judge(nn.Module):
    """A small convolutional classifier: (..., 196) -> (n, 10) logits; features (n, 64)."""

    def __init__(self, generator):
        super().__init__()
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                  nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                  nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                  nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(64, 10)
        self.to(generator.device)
        for name, value in self.named_parameters():  # He's, from a generator of its own
            if value.dim() > 1:
                nn.init.normal_(value, std=math.sqrt(2 / value[0].numel()), generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(value)

    def forward(self, x):
        return self.head(self.features(x.reshape(-1, 1, SIDE, SIDE)))


# --- objective -----------------------------------------------------------------------------------

def autoencoder_loss(nets, model, x, generator):
    """Squared error summed over pixels + beta KL(q(z|x) || N(0, 1)) in nats summed over units, mean
    over the batch. (R, B, 196) -> (R,)

    Noise "unit" leaves |z|^2 / 2 of the KL; without noise beta is 0.
    """
    z, logvar = nets["encoder"](x), torch.zeros((), device=x.device)
    if model.noise == "learned":
        z, logvar = z.chunk(2, -1)
    kl = 0.5 * (z ** 2 + logvar.exp() - 1 - logvar).sum(-1)
    if model.noise != "none":
        z = z + (logvar / 2).exp() * torch.randn(z.shape, generator=generator, device=z.device)
    return (((nets["decoder"](z) - x) ** 2).sum(-1) + model.beta * kl).mean(-1)


def discriminator_loss(nets, x, z, r1=0.3):
    """Logistic loss of real x (R, B, 196) and fakes from z (R, B, k), + r1/2 |dD/dx|^2. -> (R,)"""
    x = x.detach().requires_grad_()
    real, fake = nets["discriminator"](x), nets["discriminator"](nets["decoder"](z).detach())
    (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
    # R1 (Mescheder et al. 2018): flat around the data, so that the two nets come to rest
    penalty = r1 / 2 * (slope ** 2).sum(-1).mean(1)
    return (F.softplus(-real) + F.softplus(fake)).mean((1, 2)) + penalty


def generator_loss(nets, z):
    """Non-saturating loss of the generator, mean over the batch. (R, B, k) -> (R,)"""
    return F.softplus(-nets["discriminator"](nets["decoder"](z))).mean((1, 2))


def judge_loss(judge, x, y, generator):
    """Cross-entropy in nats of images (1, B, 196), each shifted by up to a pixel; a scalar."""
    pixel = torch.arange(PIXELS, device=x.device).view(SIDE, SIDE)
    moved = torch.stack([pixel.roll((i, j), (0, 1)).flatten() for i in (-1, 0, 1)
                         for j in (-1, 0, 1)])  # (9, 196)
    shift = torch.randint(9, x.shape[:2], generator=generator, device=x.device)
    return F.cross_entropy(judge(x.gather(2, moved[shift])), y[0])


def total_squared_error(output, digits):
    """E: squared deviations from one-hot summed over 10 outputs. (..., 10), (...) -> (...)"""
    return ((output - F.one_hot(digits, 10)) ** 2).sum(-1)


# --- train ---------------------------------------------------------------------------------------

def train(name, nets, losses, n, repeats, steps, lr, generator, compile=False, checkpoint=None):
    """Adam on each {term: (net, loss)} in turn; returns the losses by step (steps, terms).

    loss(index) -> (R,) for image numbers index (R, B) below n, each net on its own batch. The rate
    falls linearly to 0 over the second half. Raises FloatingPointError at a non-finite loss.
    """
    betas = (0.9, 0.999) if len(losses) == 1 else (0.5, 0.99)  # a moving target: less momentum
    optimisers = [torch.optim.Adam(net.parameters(), lr, betas, fused=True)
                  for net, _ in losses.values()]
    terms = [common.compiled(loss, compile and len(losses) == 1) for _, loss in losses.values()]
    device, first = generator.device, 0
    history, parts = torch.zeros(steps, len(terms), device=device), [nets, *optimisers, generator]
    if checkpoint and checkpoint.state:
        first, history = checkpoint.restore(*parts)
    bar = tqdm(range(first, steps), f"{name}, {repeats} nets", steps, initial=first, disable=None)
    for step in bar:
        index = torch.randint(n, (repeats, BATCH), generator=generator, device=device)
        for j, (optimiser, loss) in enumerate(zip(optimisers, terms)):
            optimiser.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
            value = loss(index)  # (R,)
            optimiser.zero_grad()
            value.sum().backward()  # no weight is shared: the sum trains each net on its own loss
            optimiser.step()
            history[step, j] = value.detach().mean()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            if not torch.isfinite(history[:step + 1]).all():
                at, j = (~torch.isfinite(history)).nonzero()[0].tolist()
                raise FloatingPointError(f"{name}: the {list(losses)[j]} loss is not finite at "
                                         f"step {at}")
            bar.set_postfix_str(f"loss {history[step, -1]:.4f}", refresh=False)
            if checkpoint and checkpoint.due():
                checkpoint.save((step + 1, history), *parts)
    return history


# --- latent space optimisation -------------------------------------------------------------------

def algorithm_3(error, v, rule, steps, trace=None):
    """Minimise error(v) -> (R, N) over v (R, N, k) by Algorithm 3, all starts at once.

    v <- v + D C / S, S = |D|^2 being each start's own: to first order E changes by C, and by
    exactly C where it is linear. rule: C of E, as in RULES. A start ends with E <= THRESHOLD; one
    with S <= GUARD stays where it is. trace: a list that gets (v, E, S) of every step. Returns v,
    the step of success (R, N) (-1: none) and stuck (R, N).
    """
    success = torch.full(v.shape[:2], -1, device=v.device)
    stuck = torch.zeros_like(success, dtype=torch.bool)
    for step in range(steps + 1):
        v = v.detach().requires_grad_()
        E = error(v)
        (D,) = torch.autograd.grad(E.sum(), v)  # weights are frozen: this is dE/dv, start by start
        E, S = E.detach(), (D ** 2).sum(-1)
        success = torch.where((success < 0) & (E <= THRESHOLD), step, success)
        stuck |= (success < 0) & (S <= GUARD)
        moving = (success < 0) & ~stuck
        if trace is not None:
            trace.append((v.detach(), E, S))
        if step == steps or (step % 50 == 0 and not moving.any()):
            break
        change = D * (rule(E) / S)[..., None]  # Algorithm 3
        v = torch.where(moving[..., None], v + change, v)
    return v.detach(), success, stuck


def generate(error, draw, digits, rule, steps, attempts, generator, name="", checkpoint=None):
    """Algorithm 3 from draw(n, generator) -> (R, n, k), again from new points where it failed.

    error(v, digits) -> (R, n) for wanted digits (R, n). Returns v (R, N, k) of the success or the
    last attempt, and (R, N) each: solved, attempts, steps of all attempts (a failed one counts with
    the limit), and of the first attempt the step of success (-1: none) and stuck.
    """
    out, begin = {"solved": torch.zeros_like(digits, dtype=torch.bool)}, 0
    out |= {"attempts": torch.zeros_like(digits), "steps": torch.zeros_like(digits)}
    if checkpoint and checkpoint.state:
        begin, out = checkpoint.restore(generator)
    bar = tqdm(range(begin, attempts), f"{name}, attempts", attempts, initial=begin, disable=None,
               leave=False)
    for attempt in bar:
        width = int((~out["solved"]).sum(1).max())
        if width == 0:
            break
        # the failed ones first; repeats with fewer of them fill up with solved ones, left alone
        index = out["solved"].int().argsort(dim=1, stable=True)[:, :width]
        wanted, again = digits.gather(1, index), ~out["solved"].gather(1, index)
        v, success, stuck = algorithm_3(lambda v: error(v, wanted), draw(width, generator), rule,
                                        steps)
        if attempt == 0:
            out |= {"v": v, "first": success, "stuck": stuck}
        wide = index[..., None].expand_as(v)
        out["v"].scatter_(1, wide, torch.where(again[..., None], v, out["v"].gather(1, wide)))
        out["solved"].scatter_(1, index, (success >= 0) | ~again)
        out["attempts"].scatter_add_(1, index, again.long())
        out["steps"].scatter_add_(1, index, again * torch.where(success < 0, steps, success))
        if checkpoint and checkpoint.due():
            checkpoint.save((attempt + 1, out), generator)
    return out


def starts(kind, codes):
    """draw(n, generator) -> (R, n, k): random starts like codes (R, m, k), unit by unit."""
    R, m, k = codes.shape

    def draw(n, generator):
        device = generator.device
        if kind == "codes":
            row = torch.randint(m, (R, n, 1), generator=generator, device=device)
            return codes.gather(1, row.expand(R, n, k))
        if kind == "box":
            low, high = codes.amin(1, keepdim=True), codes.amax(1, keepdim=True)
            return low + (high - low) * torch.rand(R, n, k, generator=generator, device=device)
        noise = torch.randn(R, n, k, generator=generator, device=device)
        return codes.mean(1, keepdim=True) + codes.std(1, keepdim=True) * noise
    return draw


# --- evaluate ------------------------------------------------------------------------------------

def real_digits(x, y, count):
    """Up to `count` images of each digit, 0 to 9 in turn (1, N, 196), and all others (n, 196)."""
    count = min(count, int(y.bincount().min()) // 2)
    chosen = torch.stack([(y == d).nonzero()[:count, 0] for d in range(10)], 1).flatten()
    others = torch.ones_like(y, dtype=torch.bool).index_fill(0, chosen, False)
    return x[chosen][None], x[others]


def reconstruction_mse(nets, model, x):
    """Mean squared error per pixel of an autoencoder without noise. (n, 196) -> (R,)"""
    codes = nets["encoder"](x.expand(len(nets["encoder"].weights[0]), -1, -1))[..., :model.k]
    return ((nets["decoder"](codes) - x) ** 2).mean((1, 2))


def pca_mse(x, k, *others):
    """Mean squared error per pixel of PCA with k components of x: [on x, on each of others]."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov(x.T.cpu().double()))  # ascending eigenvalues
    top = vectors[:, -k:].to(x)
    return [((y - mean - (y - mean) @ top @ top.T) ** 2).mean().item() for y in (x, *others)]


def reconstruction_row(name, nets, model, x, x_test):
    """Errors on the training images and the test set, PCA of the same size beside them."""
    sets = {"train": x[:model.images], "test": x_test}
    pca = pca_mse(sets["train"], model.k, x_test)
    return {"row": name, "size": model.k, "images": model.images,
            **{key: common.mean_std(reconstruction_mse(nets, model, y)) for key, y in sets.items()},
            **{f"pca_{key}": value for key, value in zip(sets, pca)}}


def classifier_scores(classifier, x, y):
    """Accuracy and MSE over the 10 outputs on x (n, 196), y (n,): two (R,) tensors."""
    output = classifier(x.expand(len(classifier.weights[0]), -1, -1))  # (R, n, 10)
    error = total_squared_error(output, y.expand(output.shape[:2]))
    return (output.argmax(2) == y).float().mean(1), error.mean(1) / 10


def wilson(successes, n, z=1.96):
    """95 % interval (low, high) of a success rate from n independent trials (Wilson 1927)."""
    p, t = successes / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + t / (4 * n)) / (1 + t)
    centre = (p + t / 2) / (1 + t)
    return max(0.0, centre - half), min(1.0, centre + half)


def clearly_more(a, b):
    """Is the mean a above b by two standard errors? Both as from common.mean_std."""
    error = sum((x["std"] or 0) ** 2 / x["n"] for x in (a, b)) ** 0.5
    return a["mean"] - b["mean"] > 2 * error


def success_scores(out):
    """Figures of what generate returned, start n having wanted the digit n % 10.

    success, stuck: shares of first attempts; interval: Wilson's for all repeats together, as if
    starts were independent (those of one repeat share its nets: see std); solved: share after
    retries; attempts, steps: of one generation, retries included, also by digit.
    """
    first, R = out["first"], len(out["first"])
    shares = {"success": first >= 0, "stuck": out["stuck"], "solved": out["solved"]}
    scores = {key: common.mean_std(value.float().mean(1)) for key, value in shares.items()}
    scores["interval"] = wilson(int((first >= 0).sum()), first.numel())
    for key in ("attempts", "steps"):
        mean = out[key].float().view(R, -1, 10).mean((0, 1))
        scores |= {key: mean.mean().item(), f"{key} by digit": mean.tolist()}
    return scores


def frechet_distance(a, b):
    """Of the Gaussians with the moments of two sets of features (n, d), (m, d); in float64."""
    a, b = a.cpu().double(), b.cpu().double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2)
    # tr (A B)^(1/2) by way of a symmetric matrix with the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return (((a.mean(0) - b.mean(0)) ** 2).sum() + A.trace() + B.trace() - 2 * cross).item()


def nearest_distance(x, train):
    """Mean distance over the pixels to the nearest of train. (R, N, 196), (n, 196) -> (R,)"""
    return torch.stack([torch.cdist(part, train).amin(1).mean() for part in x])


def judge_scores(judge, x, real, shown, train):
    """What the judge sees in x (R, N, 196), image n being meant as n % 10: (scores, read (R, N)).

    read: share read as the wanted digit; confidence: the judge's highest probability; frechet: to
    the features real (m, 64), all repeats together; nearest: distance to the nearest image of train
    (n, 196), by that of the real images shown: a copy has 0, but blur comes near, too; diversity:
    mean distance of two images of one digit, which noise raises.
    """
    R, N, _ = x.shape
    features = judge.features(x.reshape(-1, 1, SIDE, SIDE))
    p = judge.head(features).softmax(1).view(R, N, 10)
    read = p.argmax(2) == torch.arange(N, device=x.device) % 10
    digits = x.view(R, N // 10, 10, PIXELS).transpose(1, 2)  # (R, 10, N / 10, 196)
    pairs = (N // 10) * (N // 10 - 1)
    values = {"read": read.float().mean(1), "confidence": p.amax(2).mean(1),
              "nearest": nearest_distance(x, train) / nearest_distance(shown, train),
              "diversity": torch.cdist(digits, digits).sum((2, 3)).mean(1) / pairs}
    return ({key: common.mean_std(value) for key, value in values.items()}
            | {"frechet": frechet_distance(features, real)}, read)


def path_in_jumps(lengths, share=0.05):
    """Part of a walk that its longest steps make up; lengths (T,) of the steps in the image.

    At an even pace it is `share`; near 1 the image rests, and then changes at once. Under Algorithm
    3 a step in v has the length |C| / |D|: where the gradient nearly vanishes it jumps.
    """
    longest = lengths.topk(math.ceil(share * len(lengths))).values
    return (longest.sum() / lengths.sum().clamp(min=1e-12)).item()


# --- plot ----------------------------------------------------------------------------------------

def plot_digits(sheets, framed=None):
    """Sheets of digits side by side: (images (rows, columns, 196), row labels, column labels)."""
    rows, widths = len(sheets[0][0]), [x.shape[1] for x, *_ in sheets]
    fig = Figure(figsize=(0.6 * sum(widths) + 0.5, 0.52 * rows + 1.2), layout="constrained")
    for ax, (x, *labels) in zip(fig.subplots(1, len(sheets), width_ratios=widths, squeeze=False)[0],
                                sheets):
        common.image_sheet(ax, x.view(*x.shape[:2], 1, SIDE, SIDE), *labels, framed)
    return fig


def plot_success(ax, x, rows, **style):
    """Success of first attempts against x, with 95 % intervals."""
    y = torch.tensor([row["success"]["mean"] for row in rows])
    low, high = torch.tensor([row["interval"] for row in rows]).T
    ax.errorbar(x, y, [(y - low).clamp(min=0), (high - y).clamp(min=0)], capsize=3, **style)


def plot_sizes(rows):
    """Figure 7: success, and what the judge reads, against the size of the optimised layer."""
    fig = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    plain = [row for name, row in rows.items() if name.startswith("AE-") or name == "LSO-2"]
    marks = {"LSO-2 and others, 10,000 images": sorted(plain, key=lambda row: row["size"])}
    marks |= {name: [rows[name]] for name in ("LSO-1", "input", *REGULAR)}
    for i, (label, chosen) in enumerate(marks.items()):
        x = [row["size"] * (1 + 0.06 * max(0, i - 2)) for row in chosen]  # six share the size 20
        style = dict(fmt="osD<>Pv^"[i], color=common.COLOURS[i], ls="-" if i == 0 else "")
        plot_success(left, x, chosen, label=label, **style)
        right.errorbar(x, [row["read"]["mean"] for row in chosen],
                       [row["read"]["std"] or 0 for row in chosen], capsize=3, **style)
    left.plot([5, 20], [DOCUMENT[name][1] for name in ("LSO-1", "LSO-2")], "kx", ms=9,
              label="document")
    ticks = sorted({row["size"] for row in rows.values()})
    for ax, label in ((left, "success, first attempt (95 % interval)"),
                      (right, "read as the wanted digit (± std of repeats)")):
        ax.set(xscale="log", xlabel="size of the optimised layer", ylabel=label, ylim=(0, 1.02))
        ax.set_xticks(ticks, ticks)
        ax.minorticks_off()
    fig.legend(*left.get_legend_handles_labels(), loc="outside right", fontsize="small")
    return fig


def plot_choices(panels, first, limit):
    """Success against what the document leaves open: {label: {choice: {name: row}}}, and against
    steps: {name: step of success (R, N) or -1} under a wider limit."""
    fig = Figure(figsize=(14, 4), layout="constrained")
    *axes, last = fig.subplots(1, len(panels) + 1, sharey=True, width_ratios=[5, 3, 5])
    for i, name in enumerate(STUDIED):
        style = dict(color=common.COLOURS[i])
        for ax, (label, choices) in zip(axes, panels.items()):
            at = [x + 0.08 * (i - 1) for x in range(len(choices))]
            plot_success(ax, at, [rows[name] for rows in choices.values()], fmt="o", **style)
            ax.set_xticks(range(len(choices)), choices)
            ax.set(xlabel=label, ylim=(0, 1.02))
        steps = first[name][first[name] >= 0].sort().values
        last.step(steps, torch.arange(1, len(steps) + 1) / first[name].numel(), label=name, **style)
        for ax in (*axes, last) if name in DOCUMENT else ():
            ax.axhline(DOCUMENT[name][1], ls=":", label=f"{name}, document", **style)
    last.axvline(limit, color="0.5", lw=0.8, label="step limit (--steps)")
    last.set_xlabel("step of Algorithm 3, rule patient")
    axes[0].set_ylabel("success, first attempt")
    fig.legend(*last.get_legend_handles_labels(), loc="outside right", fontsize="small")
    return fig


def plot_walks(walks, count=12):
    """Images along one walk a model, over its error and |D|: {name: {"x", "E", "S"}}."""
    fig = Figure(figsize=(14, 1.6 * len(walks) + 0.5), layout="constrained")
    axes = fig.subplots(len(walks), 3, width_ratios=[3.4, 1, 1], squeeze=False)
    for (sheet, *curves), (name, walk) in zip(axes, walks.items()):
        at = torch.linspace(0, len(walk["E"]) - 1, count).round().long()
        images = walk["x"][at].view(1, count, 1, SIDE, SIDE)
        end = "success" if walk["E"][-1] <= THRESHOLD else "failure"
        common.image_sheet(sheet, images, [f"{name}\n{end}"], at.tolist())
        for ax, values, label in zip(curves, (walk["E"], walk["S"].sqrt()), ("E", "|D|")):
            ax.plot(values, color=common.COLOURS[0], lw=1)
            ax.plot(at, values[at], "o", color=common.COLOURS[3], ms=3)
            ax.set(yscale="log", xlabel="step", ylabel=label)
            ax.tick_params(which="minor", labelleft=False)
        curves[0].axhline(THRESHOLD, color="0.5", ls=":")
    return fig


def pictures(run, args, rows, images, read, first, walks):
    """Save all figures; images are those of the first repeat."""
    judged = {row["row"]: row for row in rows if "read" in row}
    count = min(10, args.starts // 10)
    sheets = {name: x[0].cpu().view(-1, 10, PIXELS)[:count] for name, x in images.items()}
    for name, number in (("LSO-1", 4), ("LSO-2", 5)):
        misread = ~read[name][0].cpu().view(-1, 10)[:count]
        fig = plot_digits([(sheets[name], (), range(10))], misread)
        run.figure(fig, f"{number}_{name}".lower(), f"Figure {number}: {name} generations (framed: "
                   "the judge reads another digit)")
    x = torch.stack([sheets[name] for name in METHODS])  # (10, count, 10, 196)
    run.figure(plot_digits([(x[:, 0], METHODS, range(10)), (x[:, :, 8], (), [8] * count)]),
               "6_methods", f"Figure 6: one generation of each digit, and {count} of 8")
    run.figure(plot_sizes({name: row for name, row in judged.items() if row["rule"] == args.rule}),
               "7_sizes", "Figure 7: the size of the optimised layer (all six near 20 have 20)")

    def choices(key, other, values):
        return {value: {row["row"]: row for row in rows if row[key] == value
                        and row[other] == getattr(args, other)} for value in values}
    panels = {"rule for C": choices("rule", "start", RULES),
              "distribution of the starts": choices("start", "rule", STARTS)}
    run.figure(plot_choices(panels, first, args.steps), "choices",
               "Success and what the document leaves open")
    run.figure(plot_walks(walks), "walk", "The first walk to an 8")


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__, PRESETS)
    add, number = parser.add_argument_group("flags of lso_mnist.py").add_argument, common.number
    add("--dataset", choices=["mnist", "glyphs"], help="real digits, or drawn ones offline")
    add("--downsample", choices=["pool", "stride"], default="pool",
        help="28x28 to 14x14: mean of 2x2 pixels, or every second one")
    add("--rule", choices=list(RULES), default="constant", help="for the wanted change C of E")
    add("--start", choices=STARTS, default="normal",
        help="starts like training codes: normal, uniform in their range, or codes themselves")
    add("--repeats", type=number(int, 1, 100), help="trainings of every net, side by side")
    add("--starts", type=number(int, 20, 10**4),
        help="generations per model and repeat, a multiple of 10: equally many of each digit")
    add("--steps", type=number(int, 1, 10**6), help="step limit of Algorithm 3")
    add("--attempts", type=number(int, 1, 10**4),
        help="attempts of a generation at most; 40 times as many draws without optimisation")
    add("--train-steps", type=number(int, 1, 10**6),
        help=f"batches of {BATCH}; VAE, GAN and judge see twice as many")
    add("--sizes", nargs="+", type=number(int, 1, PIXELS), metavar="K",
        help="latent sizes to train beside the document's 20")
    args = parser.parse(argv)
    if args.starts % 10:
        parser.error(f"argument --starts: {args.starts} is not a multiple of 10")
    args.sizes = sorted(set(args.sizes) - {MODELS["LSO-2"].k})
    return args


def train_all(run, args, data, models):
    """Everything trained and frozen: classifier, {name: nets}, judge, and the loss history."""
    (x, y), (x_judge, y_judge), history = data["models"], data["judge"], []
    R, steps = args.repeats, args.train_steps

    def fresh(name):
        return common.generator(args.seed, name, args.device)

    def fit(name, nets, losses, n, steps, lr, generator, repeats=R):
        def compute(checkpoint):
            values = train(name, nets, losses, n, repeats, steps, lr, generator, args.compile,
                           checkpoint)
            return {"history": values.cpu(), "state": nets.state_dict()}
        result = run.unit(name.replace(" ", "-"), compute)
        nets.load_state_dict(result["state"])
        nets.requires_grad_(False).eval()
        history.extend({"net": name, "term": term, "step": step + 1, "loss": value}
                       for term, values in zip(losses, result["history"].T)
                       for step, value in enumerate(values.tolist()) if (step + 1) % 20 == 0)

    g = fresh("classifier")
    classifier = MLP([PIXELS, 64, 10], R, g, out=torch.sigmoid)
    fit("classifier", classifier, {"squared error": (classifier, lambda i: total_squared_error(
        classifier(x[i]), y[i]).mean(1))}, len(x), steps, 1e-2, g)
    trained = {}
    for name, model in models.items():
        g = fresh(name)
        nets = trained[name] = build(name, model, R, g)

        def z():
            return torch.randn(R, BATCH, model.k, generator=g, device=args.device)
        losses = {"squared error + KL": (nets, lambda i: autoencoder_loss(nets, model, x[i], g))}
        if name == "GAN":
            losses = {"discriminator": (nets["discriminator"],
                                        lambda i: discriminator_loss(nets, x[i], z())),
                      "generator": (nets["decoder"], lambda i: generator_loss(nets, z()))}
        fit(name, nets, losses, model.images, model.longer * steps, model.lr, g)
    g = fresh("judge")
    judge = Judge(g)
    losses = {"cross-entropy": (judge, lambda i: judge_loss(judge, x_judge[i], y_judge[i], g))}
    fit("judge", judge, losses, len(x_judge), 2 * steps, 1e-2, g, repeats=1)
    return classifier, trained, judge, history


def start_codes(name, model, nets, x, args):
    """What starts should look like: codes of training images, or draws from the prior N(0, 1) of a
    VAE or GAN. -> (R, 1000, k)"""
    if name != "GAN" and model.noise != "learned":
        return nets["encoder"](x[:1000].repeat(args.repeats, 1, 1))
    g = common.generator(args.seed, f"{name} prior", args.device)
    z = torch.randn(args.repeats, 1000, model.k, generator=g, device=args.device)
    return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)  # "normal" starts: N(0, 1) itself


def study(run, args, classifier, decoders):
    """All generations, a work unit each: {(row, rule, start): result of generate and "size"}.

    Every model under --rule and --start, until success; STUDIED under all rules and under all
    starts, one attempt; draws without optimisation. decoders: {name: (decode, codes)}.
    """
    rules, chosen = RULES | {"none": (None, 0)}, (args.rule, args.start)
    tasks = [(f"LSO in {name}" if name in ("VAE", "GAN") else name, name, *chosen, args.attempts)
             for name in decoders]
    tasks += [(name, name, *choice, 1) for name in STUDIED for choice in
              [(rule, args.start) for rule in RULES] + [(args.rule, start) for start in STARTS]
              if choice != chosen]
    tasks += [(row, name, "none", "normal", 40 * args.attempts) for row, name in
              (("LSO-2 draws", "LSO-2"), ("VAE", "VAE"), ("GAN", "GAN"))]
    digits = (torch.arange(args.starts, device=args.device) % 10).repeat(args.repeats, 1)
    found = {}
    for row, name, rule, start, attempts in tasks:
        (decode, codes), (change, factor) = decoders[name], rules[rule]
        g = common.generator(args.seed, f"{name} {start}", args.device)  # rules share their starts

        def error(v, wanted):
            return total_squared_error(classifier(decode(v)), wanted)

        def compute(checkpoint):
            out = generate(error, starts(start, codes), digits, change, factor * args.steps,
                           attempts, g, row, checkpoint)
            out["images"] = decode(out["v"]).clamp(0, 1)
            return {key: value.cpu() for key, value in out.items()}

        unit = f"{row} {rule} {start}".replace(" ", "-")
        found[row, rule, start] = run.unit(unit, compute) | {"size": codes.shape[2]}
    return found


def walk(args, name, classifier, decode, codes, digit=8):
    """Walks of a start per digit and repeat: images "x", "E" and "S" of the first one to `digit`,
    "jumps": path_in_jumps of all with 20 steps or more."""
    digits, trace = torch.arange(10, device=args.device).repeat(args.repeats, 1), []
    change, factor = RULES[args.rule]
    v = starts(args.start, codes)(10, common.generator(args.seed, f"walk {name}", args.device))
    _, success, _ = algorithm_3(lambda v: total_squared_error(classifier(decode(v)), digits), v,
                                change, args.steps * factor, trace)
    v, E, S = zip(*trace)
    x = torch.stack([decode(part).clamp(0, 1) for part in v])  # (T, R, 10, 196)
    lengths = (x[1:] - x[:-1]).norm(dim=3)
    end = torch.where(success < 0, len(lengths), success)  # steps of each walk, (R, 10)
    jumps = [path_in_jumps(lengths[:end[r, d], r, d]) for r, d in (end >= 20).nonzero().tolist()]
    first = {key: value[:end[0, digit] + 1, 0, digit].cpu().clone() for key, value in
             (("x", x), ("E", torch.stack(E)), ("S", torch.stack(S)))}
    return first | {"jumps": common.mean_std(torch.tensor(jumps or [math.nan]))}


def print_tables(autoencoders, rows, scores):
    """Everything measured, before the closing table."""
    show, percent = common.show, common.percent
    judged = [row for row in rows if "read" in row]
    print(f"\nclassifier: accuracy {percent(scores['accuracy'])}, MSE {show(scores['mse'])}")
    common.print_table(["autoencoder", "units", "images", "MSE train", "PCA", "MSE test", "PCA"], [
        [row["row"], row["size"], row["images"], show(row["train"]), f"{row['pca_train']:.4f}",
         show(row["test"]), f"{row['pca_test']:.4f}"] for row in autoencoders])
    common.print_table(["\nfirst attempts", "rule", "start", "success", "95 %", "stuck"], [
        [row["row"], row["rule"], row["start"], percent(row["success"]),
         "{:.0%} to {:.0%}".format(*row["interval"]), percent(row["stuck"])]
        for row in rows if "success" in row])
    common.print_table(["\nattempts/steps", "solved", "mean", *"0123456789"], [
        [row["row"], percent(row["solved"]), f"{row['attempts']:.1f}/{row['steps']:.0f}",
         *(f"{attempts:.1f}/{steps:.0f}" for attempts, steps in zip(
             row["attempts by digit"], row["steps by digit"]))]
        for row in judged if "success" in row])
    common.print_table(["\njudged", "read", "confidence", "Fréchet", "nearest", "diversity"], [
        [row["row"], percent(row["read"]), percent(row["confidence"]), f"{row['frechet']:.1f}",
         show(row["nearest"], 2), show(row["diversity"], 2)] for row in judged])


def claims(autoencoders, rows, jumps, accuracy, chosen):
    """Closing table (claim, document, here, holds); chosen: the rule and start in force."""
    at = {(row["row"], row["rule"], row["start"]): row["success"]["mean"]
          for row in rows if "success" in row}
    final, table = {row["row"]: row for row in rows if "read" in row}, []
    for row in autoencoders:
        if row["row"] in DOCUMENT:
            document, here, pca = DOCUMENT[row["row"]][0], row["train"]["mean"], row["pca_train"]
            table += [(f"{row['row']}: MSE, {row['size']} units, {row['images']:,} images",
                       f"{document}", common.show(row["train"]), here <= document),
                      (f"{row['row']}: below PCA of the same size and images", "-",
                       f"{here:.4f}; PCA {pca:.4f}", here < pca)]
    for name in STUDIED:
        low, high = final[name]["interval"]
        over = [value for key, value in at.items() if key[0] == name]
        text, claim, holds = "almost never fails", "interval reaches 95 %", high >= 0.95
        if name in DOCUMENT:
            theirs, text = wilson(100 * DOCUMENT[name][1], 100), f"{DOCUMENT[name][1]:.0%}"
            claim, holds = "95 % intervals overlap", low <= theirs[1] and theirs[0] <= high
        table.append((f"{name}: success of the first attempt ({claim})", text,
                      f"{common.percent(final[name]['success'])} ({low:.0%} to {high:.0%}); "
                      f"{min(over):.0%} to {max(over):.0%} over rules and starts", holds))
    for a, b in zip(STUDIED, STUDIED[1:]):
        pairs = [(at[key], at[(b, *key[1:])]) for key in at if key[0] == a]
        count, both = sum(x < y for x, y in pairs), [final[name]["success"] for name in (b, a)]
        table.append((f"smaller layer, lower success: {a} < {b} (clearly, and under most)", "yes",
                      f"{both[1]['mean']:.1%}; {both[0]['mean']:.1%}; so under {count} of "
                      f"{len(pairs)} rules and starts",
                      clearly_more(*both) and 2 * count > len(pairs)))
    plain, *regular = (final[name]["success"] for name in REGULAR)
    table += [("a regular latent space raises success (the first one is not)", "suspected",
               "; ".join(f"{name} {final[name]['success']['mean']:.0%}" for name in REGULAR),
               any(clearly_more(success, plain) for success in regular)),
              ("latent walks jump more than pixels (path in the longest 5 % of steps)", "yes",
               "; ".join(f"{name} {common.percent(jumps[name])}" for name in STUDIED),
               clearly_more(jumps["LSO-2"], jumps["input"]))]
    for claim, document, a, b, factor in COMPARISONS:
        (more, near), (less, far) = ((final[name]["read"], final[name]["frechet"])
                                     for name in (a, b))
        holds = (clearly_more(more, less) and more["mean"] >= factor * less["mean"] if factor
                 else not clearly_more(less, more))
        here = f"{common.percent(more)}, Fréchet {near:.0f}; {common.percent(less)}, {far:.0f}"
        table.append((f"{claim}: {a}, {b}", document, here, holds))
    return table + [("the judge reads real test digits (99 %)", "-", f"{accuracy:.2%}",
                     accuracy >= 0.99)]


def measure(studies, judge, data, models, args):
    """The rows of results.json, judged where they went on until success, and two more to judge, of
    unclipped pixels and of real images: (rows, {row: images (R, N, 196)}, {row: read (R, N)})."""
    x, (x_test, y_test) = data["models"][0], data["test"]
    shown, others = real_digits(x_test, y_test, args.repeats * args.starts // 10)
    real, rows, images, read = judge.features(others.view(-1, 1, SIDE, SIDE)), [], {}, {}
    more = {"input unclipped": studies["input", args.rule, args.start]["v"], "real": shown}
    more = {(name, "-", "-"): {"images": value} for name, value in more.items()}
    for (name, rule, start), out in (studies | more).items():
        row = {"row": name, "rule": rule, "start": start}
        if "first" in out:
            row |= {"size": out["size"], **success_scores(out)}
        if (rule, start) == (args.rule, args.start) or rule not in RULES:  # not the other choices
            images[name] = out["images"].to(args.device)
            train = x[:models[name].images] if name in models else x
            scores, read[name] = judge_scores(judge, images[name], real, shown, train)
            row |= scores
        rows.append(row)
    return rows, images, read


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    data = load_data(args.dataset, args.downsample, args.data, args.device)
    x, (x_test, y_test) = data["models"][0], data["test"]
    models, label = MODELS | {f"AE-{k}": Model(k) for k in args.sizes}, f"{args.dataset} 14x14"
    with common.Run(__file__, args, f"{label}, {args.downsample}", additive=("sizes",)) as run:
        classifier, trained, judge, history = train_all(run, args, data, models)
        decoders = {"input": (lambda v: v, x[:1000].repeat(args.repeats, 1, 1))}
        decoders |= {name: (nets["decoder"], start_codes(name, models[name], nets, x, args))
                     for name, nets in trained.items()}
        studies = study(run, args, classifier, decoders)
        walks = {name: run.unit(f"walk-{name}", lambda checkpoint: walk(
            args, name, classifier, *decoders[name])) for name in STUDIED}

        autoencoders = [reconstruction_row(name, trained[name], model, x, x_test)
                        for name, model in models.items() if name != "GAN"]
        scores = dict(zip(("accuracy", "mse"), map(common.mean_std, classifier_scores(
            classifier, x_test, y_test))))
        accuracy = (judge(x_test).argmax(1) == y_test).float().mean().item()
        rows, images, read = measure(studies, judge, data, models, args)
        jumps = {name: walks[name]["jumps"] for name in STUDIED}
        patient = {name: studies[name, "patient", args.start]["first"] for name in STUDIED}
        pictures(run, args, rows, images, read, patient, walks)
        print_tables(autoencoders, rows, scores)
        return run.finish({"autoencoders": autoencoders, "classifier": scores, "judge": accuracy,
                           "generations": rows, "path in jumps": jumps},
                          claims(autoencoders, rows, jumps, accuracy, (args.rule, args.start)),
                          history)


if __name__ == "__main__":
    main()
