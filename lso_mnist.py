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
out/lso_mnist-<preset>. It has not been timed on a GPU. What the document leaves open, and what we
chose:
* 14x14 is the mean of 2x2 pixels (--downsample stride: every 2nd pixel). Sigmoid nets: 196-100-k
  with linear codes, k-100-196, and 196-64-10; Adam on 3,000 batches of 100. At a rate of 1e-3 LSO-1
  ends near the document's error; 1e-2 (rows "regular") is much better.
* The rule for C and the step limit decide the success rates. Default: C = -0.01, the threshold
  itself, and 250 steps, which meets 64 % and 82 %. "patient" has four times the steps, "fine" a
  tenth of C and twenty times; "proportional" is C = -E/10, "polyak" C = -E, Polyak's step to 0.
* Starts are normal, with the mean and deviation of each unit over training codes (--start box:
  uniform in their range; codes: training codes themselves), in a VAE or GAN draws from the prior.
  Pixels start likewise and are clipped to [0, 1] only at the end, where few of them still satisfy
  the classifier; the judge sees them clipped and, in a row of its own, unclipped.
* Success rates are those of first attempts. What is judged went on from new starts until success
  ("as many attempts as needed") or --attempts. Where |D|^2 <= 1e-30 a start is stuck, and counted.
* The document's VAE and GAN pictures are of other papers. Ours see the images of LSO-2, and draw
  from the prior until the classifier sees the wanted digit with E <= 0.01: Algorithm 3 without a
  step. The VAE has LSO-2's nets, a higher rate and twice the batches; the GAN larger nets.
* "regular" autoencoders have unit noise on their codes z and beta |z|^2 / 2 in the loss (a VAE of
  constant variance, a baseline of Ghosh et al. 2020); regular 0 has neither.
* The judge, a convolutional net, is trained on 50,000 (glyphs: 10,000) images unseen by all others.
"""
import math
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
DOCUMENT = {"LSO-1": (0.0239, 0.64), "LSO-2": (0.0203, 0.82)}  # MSE, success; section 5.1
SIDE, PIXELS, BATCH, MODEL_IMAGES = 14, 196, 100, 10_000
THRESHOLD = 0.01  # of the total squared error: the document's ".001 MSE" over 10 outputs
GUARD = 1e-30     # of |D|^2
RULES = {  # the wanted change C of the error E, factor on the step limit
    "constant": (lambda E: -0.01, 1), "patient": (lambda E: -0.01, 4),
    "fine": (lambda E: -0.001, 20), "proportional": (lambda E: -0.1 * E, 1),
    "polyak": (lambda E: -E, 1)}
STARTS = ("normal", "box", "codes")


class Model(NamedTuple):
    """One model: latent units (or outputs), training images, and how it is trained."""
    k: int
    images: int = MODEL_IMAGES
    lr: float = 1e-3
    beta: float = 0.0    # weight of the KL per nat, against the sum of squared pixel errors
    noise: str = "none"  # on the codes: none, unit (variance 1) or learned (a VAE)
    longer: int = 1      # factor on --train-steps


CLASSIFIER, JUDGE = Model(10, lr=1e-2), Model(10, 50_000, lr=1e-2, longer=2)
MODELS = {
    "LSO-1": Model(5, images=1000), "LSO-2": Model(20), "regular 0": Model(20, lr=1e-2),
    "regular 0.01": Model(20, lr=1e-2, beta=0.01, noise="unit"),
    "regular 0.1": Model(20, lr=1e-2, beta=0.1, noise="unit"),
    "VAE": Model(20, lr=1e-2, beta=0.2, noise="learned", longer=2), "GAN": Model(20, longer=2)}
REGULAR = ("regular 0", "regular 0.01", "regular 0.1", "LSO in VAE", "LSO in GAN")
STUDIED = ("LSO-1", "LSO-2", "input")  # the document's own; input: optimisation of the pixels
DRAWS = {"LSO-2 draws": "LSO-2", "VAE": "VAE", "GAN": "GAN"}  # Algorithm 3 without a step
METHODS = ("input", "LSO-1", "LSO-2", *REGULAR[2:], *DRAWS, "real")  # of Figure 6; real: tests
COMPARISONS = [  # claim, document, rows a, b; a is read `factor` times as often (0: no less) as b
    ("LSO is read as wanted 3 times as often", "wildly", "LSO-2", "input", 3),
    ("GAN draws are read more often than LSO", "yes", "GAN", "LSO-2", 1),
    ("VAE draws are read more often than LSO", "yes", "VAE", "LSO-2", 1),
    ("LSO in a GAN is read as often as draws", "open", "LSO in GAN", "GAN", 0),
    ("LSO in a VAE is read as often as draws", "open", "LSO in VAE", "VAE", 0),
    ("LSO is read as often as draws", "-", "LSO-2", "LSO-2 draws", 0),
    ("a regular latent space is read more often", "suspected", "regular 0.1", "regular 0", 1)]


# --- data ----------------------------------------------------------------------------------------

def load_data(dataset, downsample, folder, device):
    """{split: (x (n, 196) in [0, 1], y (n,))}: models and judge share no image; test is apart."""
    if dataset == "glyphs":
        (x, y), tests = common.glyphs(25_000, 0, device=device), 5000
    else:
        parts = [common.images(dataset, train, folder, device) for train in (True, False)]
        (x, y), tests = map(torch.cat, zip(*parts)), len(parts[1][1])
    x = (F.avg_pool2d(x, 2) if downsample == "pool" else x[:, :, ::2, ::2]).flatten(1)  # (n, 196)
    splits = (part.tensor_split([MODEL_IMAGES, len(y) - tests]) for part in (x, y))
    return dict(zip(("models", "judge", "test"), zip(*splits)))


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


def build(name, model, repeats, g):
    """The nets of one model; those of MODELS have a decoder (R, B, k) -> (R, B, 196) in [0, 1].

    The judge is convolutional, (n, 196) -> logits (n, 10); judge[:-1] are its features (n, 64).
    """
    k, codes = model.k, 2 * model.k if model.noise == "learned" else model.k
    if name == "classifier":
        return MLP([PIXELS, 64, k], repeats, g, out=torch.sigmoid)
    if name == "GAN":
        return nn.ModuleDict({
            "decoder": MLP([k, 256, 256, PIXELS], repeats, g, torch.relu, torch.sigmoid),
            "discriminator": MLP([PIXELS, 256, 256, 1], repeats, g, F.leaky_relu)})
    if name != "judge":
        return nn.ModuleDict({"encoder": MLP([PIXELS, 100, codes], repeats, g),
                              "decoder": MLP([k, 100, PIXELS], repeats, g, out=torch.sigmoid)})
    features = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 9, 64), nn.ReLU())
    judge = nn.Sequential(OrderedDict(image=nn.Unflatten(1, (1, SIDE, SIDE)), features=features,
                                      head=nn.Linear(64, k))).to(g.device)
    for layer in judge.modules():  # PyTorch's own first weights are from the global generator
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=g)
            nn.init.zeros_(layer.bias)
    return judge


# --- objective -----------------------------------------------------------------------------------

def autoencoder_loss(nets, model, x, generator):
    """Squared error summed over pixels + beta KL(q(z|x) || N(0, 1)) in nats summed over units, mean
    over the batch. (R, B, 196) -> (R,). Noise "unit" leaves |z|^2 / 2 of the KL."""
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
    moved = torch.stack([pixel.roll((s // 3 - 1, s % 3 - 1), (0, 1)).flatten() for s in range(9)])
    shift = torch.randint(9, x.shape[:2], generator=generator, device=x.device)
    return F.cross_entropy(judge(x.gather(2, moved[shift])[0]), y[0])


def total_squared_error(output, digits):
    """E: squared deviations from one-hot summed over 10 outputs. (..., 10), (...) -> (...)"""
    return ((output - F.one_hot(digits, 10)) ** 2).sum(-1)


def objectives(name, model, nets, x, y, g):
    """What trains each net: {term: (net, loss)}; loss(i) -> (R,) on the images x[i], i (R, B)."""
    def z(i):
        return torch.randn(*i.shape, model.k, generator=g, device=g.device)

    if name == "classifier":
        return {"squared error": (nets, lambda i: total_squared_error(nets(x[i]), y[i]).mean(1))}
    if name == "judge":
        return {"cross-entropy": (nets, lambda i: judge_loss(nets, x[i], y[i], g))}
    if name == "GAN":
        return {"discriminator": (nets["discriminator"],
                                  lambda i: discriminator_loss(nets, x[i], z(i))),
                "generator": (nets["decoder"], lambda i: generator_loss(nets, z(i)))}
    return {"squared error + KL": (nets, lambda i: autoencoder_loss(nets, model, x[i], g))}


# --- train ---------------------------------------------------------------------------------------

def train(name, nets, losses, n, repeats, steps, lr, generator, compile=False, checkpoint=None):
    """Adam on each of `losses` in turn (see objectives); returns them by step (steps, terms).

    Each net sees its own batches of n images; the rate falls linearly to 0 over the second half.
    FloatingPointError where a loss is not finite.
    """
    betas = (0.9, 0.999) if len(losses) == 1 else (0.5, 0.99)  # a moving target: less momentum
    optimisers = [torch.optim.Adam(net.parameters(), lr, betas, fused=True)
                  for net, _ in losses.values()]
    terms = [common.compiled(loss, compile and len(losses) == 1) for _, loss in losses.values()]
    first, history = 0, torch.zeros(steps, len(terms), device=generator.device)
    parts = [nets, *optimisers, generator]
    if checkpoint and checkpoint.state:
        first, history = checkpoint.restore(*parts)
    bar = tqdm(range(first, steps), f"{name}, nets: {repeats}", steps, initial=first, disable=None)
    for step in bar:
        index = torch.randint(n, (repeats, BATCH), generator=generator, device=generator.device)
        for j, (optimiser, loss) in enumerate(zip(optimisers, terms)):
            optimiser.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
            value = loss(index)  # (R,)
            optimiser.zero_grad()
            value.sum().backward()  # no weight is shared: the sum trains each net on its own loss
            optimiser.step()
            history[step, j] = value.detach().mean()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            if not torch.isfinite(history).all():
                at, j = (~torch.isfinite(history)).nonzero()[0].tolist()
                raise FloatingPointError(f"{name}: the term {list(losses)[j]} is not finite at "
                                         f"step {at}")
            bar.set_postfix_str(f"loss {history[step, -1]:.4f}", refresh=False)
            if checkpoint and checkpoint.due():
                checkpoint.save((step + 1, history), *parts)
    return history


def train_all(run, args, data, models):
    """Classifier, models and judge, trained and frozen: ({name: nets}, rows of metrics.csv)."""
    trained, history = {}, []
    for name, model in ({"classifier": CLASSIFIER} | models | {"judge": JUDGE}).items():
        x, y = (part[:model.images] for part in data["judge" if name == "judge" else "models"])
        repeats, steps = 1 if name == "judge" else args.repeats, model.longer * args.train_steps
        g = common.generator(args.seed, name, args.device)
        nets = trained[name] = build(name, model, repeats, g)
        losses = objectives(name, model, nets, x, y, g)

        def compute(checkpoint):
            values = train(name, nets, losses, len(x), repeats, steps, model.lr, g, args.compile,
                           checkpoint)
            return {"history": values.cpu(), "state": nets.state_dict()}
        result = run.unit(name.replace(" ", "-"), compute)
        nets.load_state_dict(result["state"])
        nets.requires_grad_(False).eval()
        history += [{"net": name, "term": term, "step": step, "loss": value}
                    for term, values in zip(losses, result["history"].T)
                    for step, value in enumerate(values.tolist(), 1) if step % 20 == 0]
    return trained, history


# --- latent space optimisation -------------------------------------------------------------------

def algorithm_3(error, v, rule, steps, trace=None):
    """Minimise error(v) -> (R, N) over v (R, N, k) by Algorithm 3, all starts at once.

    v <- v + D C / S, S = |D|^2 being each start's own, changes E by C = rule(E) to first order.
    A start ends with E <= THRESHOLD; one with S <= GUARD stays where it is. trace: a list that gets
    (v, E, S) of every step. Returns v, the step of success (R, N) (-1: none) and stuck (R, N).
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

    error(v, digits) -> (R, n) for wanted digits (R, n). Returns v (R, N, k) of the success or last
    attempt, and (R, N) each: solved, attempts, steps of all attempts (those of a failed one: the
    limit), and of the first attempt the step of success (-1: none) and stuck.
    """
    first, solved = 0, torch.zeros_like(digits, dtype=torch.bool)
    out = {"solved": solved, "attempts": solved.long(), "steps": solved.long()}
    if checkpoint and checkpoint.state:
        first, out = checkpoint.restore(generator)
    for attempt in tqdm(range(first, attempts), f"{name}, attempts", attempts, initial=first,
                        disable=None, leave=False):
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


def starts(kind, codes, n, generator):
    """Random starts (R, n, k) like codes (R, m, k), unit by unit."""
    (R, m, k), random = codes.shape, dict(generator=generator, device=generator.device)
    if kind == "codes":
        return codes.gather(1, torch.randint(m, (R, n, 1), **random).expand(R, n, k))
    if kind == "box":
        low, high = codes.amin(1, keepdim=True), codes.amax(1, keepdim=True)
        return low + (high - low) * torch.rand(R, n, k, **random)
    return codes.mean(1, keepdim=True) + codes.std(1, keepdim=True) * torch.randn(R, n, k, **random)


def start_codes(name, model, nets, x, seed):
    """What starts should look like (R, 1000, k): codes of the images x (R, 1000, 196), or draws
    from the prior of a VAE or GAN, so scaled that "normal" starts are N(0, 1) itself."""
    if name != "GAN" and model.noise != "learned":
        return nets["encoder"](x)
    g = common.generator(seed, f"{name} prior", x.device)
    z = torch.randn(*x.shape[:2], model.k, generator=g, device=x.device)
    return (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)


def study(run, args, classifier, layers):
    """All generations, a work unit each: {(row, rule, start): what generate returned}. All layers
    under --rule and --start until success; STUDIED under all rules and starts, one attempt; draws.
    """
    rules, chosen, found = RULES | {"none": (None, 0)}, (args.rule, args.start), {}
    choices = [(rule, args.start) for rule in RULES] + [(args.rule, start) for start in STARTS]
    tasks = [(f"LSO in {name}" if name in ("VAE", "GAN") else name, name, *chosen, args.attempts)
             for name in layers]
    tasks += [(name, name, *choice, 1) for name in STUDIED for choice in choices
              if choice != chosen]
    tasks += [(row, name, "none", "normal", 40 * args.attempts) for row, name in DRAWS.items()]
    digits = (torch.arange(args.starts, device=args.device) % 10).repeat(args.repeats, 1)
    for row, name, rule, start, attempts in tasks:
        (decode, codes), (change, factor) = layers[name], rules[rule]
        g = common.generator(args.seed, f"{name} {start}", args.device)  # rules share their starts

        def compute(checkpoint):
            out = generate(lambda v, wanted: total_squared_error(classifier(decode(v)), wanted),
                           lambda n, g: starts(start, codes, n, g), digits, change,
                           factor * args.steps, attempts, g, row, checkpoint)
            out["images"] = decode(out["v"]).clamp(0, 1)
            return {key: value.cpu() for key, value in out.items()}
        unit = f"{row} {rule} {start}".replace(" ", "-")
        found[row, rule, start] = run.unit(unit, compute)
    return found


def walk(args, name, classifier, decode, codes, digit=8):
    """Walks of a start per digit and repeat: images "x", "E" and "S" of the first one to `digit`,
    "jumps": path_in_jumps of all with 20 steps or more."""
    digits, trace = torch.arange(10, device=args.device).repeat(args.repeats, 1), []
    (change, factor), g = RULES[args.rule], common.generator(args.seed, f"walk {name}", args.device)
    _, success, _ = algorithm_3(lambda v: total_squared_error(classifier(decode(v)), digits),
                                starts(args.start, codes, 10, g), change, args.steps * factor,
                                trace)
    v, E, S = (torch.stack(part) for part in zip(*trace))
    x = torch.stack([decode(part).clamp(0, 1) for part in v])  # (T, R, 10, 196)
    lengths = (x[1:] - x[:-1]).norm(dim=3)
    end = torch.where(success < 0, len(lengths), success)  # steps of each walk, (R, 10)
    jumps = [path_in_jumps(lengths[:end[r, d], r, d]) for r, d in (end >= 20).nonzero().tolist()]
    first = {key: value[:end[0, digit] + 1, 0, digit].cpu().clone()
             for key, value in {"x": x, "E": E, "S": S}.items()}
    return first | {"jumps": common.mean_std(torch.tensor(jumps or [math.nan]))}


# --- evaluate ------------------------------------------------------------------------------------

def real_digits(x, y, count):
    """Up to `count` images of each digit, 0 to 9 in turn (1, N, 196), and all others (n, 196)."""
    count = min(count, int(y.bincount().min()) // 2)
    chosen = torch.stack([(y == d).nonzero()[:count, 0] for d in range(10)], 1).flatten()
    others = torch.ones_like(y, dtype=torch.bool).index_fill(0, chosen, False)
    return x[chosen][None], x[others]


def pca_mse(x, k, *others):
    """Mean squared error per pixel of PCA with k components of x: [on x, on each of others]."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov(x.T.cpu().double()))  # ascending eigenvalues
    top = vectors[:, -k:].to(x)
    return [((y - mean - (y - mean) @ top @ top.T) ** 2).mean().item() for y in (x, *others)]


def reconstruction_row(name, nets, model, x, x_test):
    """Errors without noise on the training images and the test set, those of PCA beside them."""
    row, sets = {"row": name, "size": model.k, "images": model.images}, (x[:model.images], x_test)
    for key, y in zip(("train", "test"), sets):
        z = nets["encoder"](y.expand(len(nets["encoder"].weights[0]), -1, -1))[..., :model.k]
        row[key] = common.mean_std(((nets["decoder"](z) - y) ** 2).mean((1, 2)))
    row["pca_train"], row["pca_test"] = pca_mse(sets[0], model.k, x_test)
    return row


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

    success, stuck: shares of first attempts; interval: Wilson's, as if starts that share a net were
    independent; solved: share after retries; attempts, steps: retries included, also by digit.
    """
    first = out["first"]
    shares = {"success": first >= 0, "stuck": out["stuck"], "solved": out["solved"]}
    scores = {key: common.mean_std(value.float().mean(1)) for key, value in shares.items()}
    scores["interval"] = wilson(int((first >= 0).sum()), first.numel())
    for key in ("attempts", "steps"):
        mean = out[key].float().view(len(first), -1, 10).mean((0, 1))
        scores |= {key: mean.mean().item(), f"{key} by digit": mean.tolist()}
    return scores


def frechet_distance(a, b):
    """Squared Fréchet distance of the Gaussians fitted to features (n, d), (m, d); in float64."""
    a, b = a.cpu().double(), b.cpu().double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2)
    # tr (A B)^(1/2) by way of a symmetric matrix with the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return (((a.mean(0) - b.mean(0)) ** 2).sum() + A.trace() + B.trace() - 2 * cross).item()


def judge_scores(judge, x, real, shown, train):
    """What the judge sees in x (R, N, 196), image n being meant as n % 10.

    read: share read as meant; confidence: highest probability; frechet: distance to the features
    real (m, 64); nearest: mean distance to the nearest image of train (n, 196), by that of the real
    images shown (a copy has 0, but blur comes near, too); diversity: of two images of one digit.
    """
    R, N, _ = x.shape
    features = judge[:-1](x.flatten(0, 1))
    p = judge[-1](features).softmax(1).view(R, N, 10)
    read = p.argmax(2) == torch.arange(N, device=x.device) % 10
    digits = x.view(R, N // 10, 10, PIXELS).transpose(1, 2)  # (R, 10, N / 10, 196)
    pairs = (N // 10) * (N // 10 - 1)
    near, scale = (torch.stack([torch.cdist(part, train).amin(1).mean() for part in images])
                   for images in (x, shown))
    values = {"read": read.float().mean(1), "confidence": p.amax(2).mean(1),
              "nearest": near / scale,
              "diversity": torch.cdist(digits, digits).sum((2, 3)).mean(1) / pairs}
    return ({key: common.mean_std(value) for key, value in values.items()}
            | {"frechet": frechet_distance(features, real)})


def path_in_jumps(lengths, share=0.05):
    """Part of a walk that its longest steps make up; lengths (T,) of the steps in the image. Near
    `share` the pace is even, near 1 it rests and jumps: a step in v has the length |C| / |D|."""
    longest = lengths.topk(math.ceil(share * len(lengths))).values
    return (longest.sum() / lengths.sum().clamp(min=1e-12)).item()


def measure(studies, judge, data, models, chosen):
    """What results.json says of all generations: ({(row, rule, start): row}, {row: images}); those
    with the rule and start `chosen`, the draws, unclipped pixels and real images are judged."""
    x, (x_test, y_test), rows, images = data["models"][0], data["test"], {}, {}
    unclipped = studies[("input", *chosen)]["v"]
    shown, others = real_digits(x_test, y_test, unclipped[..., 0].numel() // 10)
    real = judge[:-1](others)
    more = {("input unclipped", "-", "-"): unclipped, ("real", "-", "-"): shown}
    for (name, rule, start), out in (studies | {k: {"images": v} for k, v in more.items()}).items():
        row = rows[name, rule, start] = {"row": name, "rule": rule, "start": start}
        if "first" in out:
            row |= {"size": out["v"].shape[2], **success_scores(out)}
        if (rule, start) == chosen or rule not in RULES:
            images[name] = out["images"].to(x.device)
            train = x[:models[name].images] if name in models else x
            row |= judge_scores(judge, images[name], real, shown, train)
    return rows, images


# --- plot ----------------------------------------------------------------------------------------

def plot_digits(x, rows=(), columns=range(10), framed=None):
    """A sheet of digits (rows, columns, 196), labelled; framed (rows, columns)."""
    images = x.unflatten(2, (1, SIDE, SIDE))
    return common.plot_sheet(images, 0.6, 0.52, rows, columns, framed=framed)[0]


def share_line(label, x, rows, key, **style):
    """A line for common.plot_lines: a share of the generations with a band of +- std of repeats."""
    mean, std = torch.tensor([[row[key]["mean"], row[key]["std"] or 0] for row in rows]).T.numpy()
    return label, x, mean, dict(marker="o", std=std, **style)


def plot_sizes(rows):
    """Figure 7: success, and what the judge reads, against the size of the optimised layer."""
    sweep = [row for name, row in rows.items() if name.startswith("AE-") or name == "LSO-2"]
    groups = {"others, 10,000 images": sorted(sweep, key=lambda row: row["size"]),
              "LSO-1, LSO-2, input": [rows[name] for name in STUDIED]}
    ticks = sorted({row["size"] for group in groups.values() for row in group})
    axis = dict(xlabel="size of the optimised layer", ylabel="share of the generations",
                ylim=(0, 1.02), xscale="log", xticks=ticks, xticklabels=ticks)
    success, read = ([share_line(name, [row["size"] for row in group], group, key)
                      for name, group in groups.items()] for key in ("success", "read"))
    success.append(("document", [5, 20], [share for _, share in DOCUMENT.values()],
                    dict(color="k", marker="x", ls="")))
    return common.plot_lines({"success of the first attempt (± std)": (success, axis),
                              "read as wanted (± std)": (read, axis)}, width=5)


def plot_choices(rows, first, limit):
    """Success against rule and start, and against steps: first {name: step of success (R, N), -1
    for none} under rule patient."""
    choices, by_choice, by_step = [key[1:] for key in rows if key[0] == "input"], [], []
    names = ["\n".join(choice) for choice in choices]
    for name, colour in zip(STUDIED, common.COLOURS):
        chosen = [rows[(name, *choice)] for choice in choices]
        by_choice.append(share_line(name, names, chosen, "success", color=colour))
        if name in DOCUMENT:
            by_choice.append((f"{name}, document", names, [DOCUMENT[name][1]] * len(names),
                              dict(color=colour, ls=":")))
        steps = first[name][first[name] >= 0].sort().values.numpy()
        reached = [n / first[name].numel() for n in range(1, len(steps) + 1)]
        by_step.append((name, steps, reached, dict(color=colour, drawstyle="steps-post")))
    fig = common.plot_lines({
        "by rule for C and start (± std)": (by_choice, dict(ylim=(0, 1.02), ylabel="success")),
        "rule patient (line: --steps)": (by_step, dict(
            ylim=(0, 1.02), xlabel="step", ylabel="success"))}, width=7)
    fig.axes[1].axvline(limit, color="0.5", lw=0.8)
    return fig


def plot_walks(walks, count=12):
    """Images along one walk a model, over its error and |D|: {name: {"x", "E", "S"}}."""
    fig, axes = common.panels(len(walks), 3, 4.7, 1.6, width_ratios=[3.4, 1, 1])
    for i, (name, walk) in enumerate(walks.items()):
        at = torch.linspace(0, len(walk["E"]) - 1, count).round().int().tolist()
        end = "success" if walk["E"][-1] <= THRESHOLD else "failure"
        common.image_sheet(axes[3 * i], walk["x"][at].view(1, count, 1, SIDE, SIDE),
                           [f"{name}\n{end}"], at)
        for j, values, label in ((1, walk["E"], "E"), (2, walk["S"].sqrt(), "|D|")):
            axes[3 * i + j].plot(values, "o-", lw=1, ms=3, markevery=at)
            axes[3 * i + j].set(yscale="log", xlabel="step", ylabel=label)
            axes[3 * i + j].tick_params(which="minor", labelleft=False)
        axes[3 * i + 1].axhline(THRESHOLD, color="0.5", ls=":")
    return fig


def pictures(run, args, judge, rows, images, studies, walks):
    """Save all figures; images are those of the first repeat."""
    count = min(10, args.starts // 10)
    x = {name: value[0].cpu().view(-1, 10, PIXELS)[:count] for name, value in images.items()}
    for name, number in (("LSO-1", 4), ("LSO-2", 5)):
        misread = judge(images[name][0]).argmax(1).cpu().view(-1, 10)[:count] != torch.arange(10)
        run.figure(plot_digits(x[name], framed=misread), f"{number}_{name}".lower(),
                   f"Figure {number}: {name} generations (framed: the judge reads another digit)")
    sheet = [torch.cat([x[name][0], torch.ones(1, PIXELS), x[name][:, 8]]) for name in METHODS]
    run.figure(plot_digits(torch.stack(sheet), METHODS, [*range(10), "", *[8] * count]),
               "6_methods", f"Figure 6: one generation of each digit, and {count} of 8")
    run.figure(plot_sizes({row["row"]: row for row in rows.values() if "read" in row}), "7_sizes",
               "Figure 7: the size of the optimised layer")
    first = {name: studies[name, "patient", args.start]["first"] for name in STUDIED}
    run.figure(plot_choices(rows, first, args.steps), "choices",
               "Success and what the document leaves open")
    run.figure(plot_walks(walks), "walk", "The first walk to an 8")


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add
    add("--dataset", choices=["mnist", "glyphs"],
        help="mnist: real digits; glyphs: digits drawn offline")
    add("--downsample", choices=["pool", "stride"], default="pool",
        help="28x28 to 14x14: mean of 2x2 pixels, or every second one")
    add("--rule", choices=list(RULES), default="constant", help="rule for the wanted change C of E")
    add("--start", choices=STARTS, default="normal",
        help="starts: normal or uniform (box) like training codes, or these codes")
    add("--repeats", type=number(int, 1, 100), help="repeats: trainings of every net, side by side")
    add("--starts", type=number(int, 20, 10**4),
        help="generations per model and repeat, a multiple of 10: equally many of each digit")
    add("--steps", type=number(int, 1, 10**6), help="step limit of Algorithm 3")
    add("--attempts", type=number(int, 1, 10**4),
        help="attempts per generation at most; draws: 40 times as many")
    add("--train-steps", type=number(int, 1, 10**6),
        help=f"batches of {BATCH}; VAE, GAN and judge see twice as many")
    add("--sizes", nargs="+", type=number(int, 1, PIXELS), metavar="K",
        help="latent sizes to train beside the document's 20")
    args = parser.parse(argv)
    if args.starts % 10:
        parser.error(f"argument --starts: {args.starts} is not a multiple of 10")
    args.sizes = sorted(set(args.sizes) - {MODELS["LSO-2"].k})
    return args


def claims(autoencoders, rows, jumps, accuracy):
    """Closing table: (claim, document, here, holds)."""
    percent, table = common.percent, []
    success = {key: row["success"] for key, row in rows.items() if "success" in row}
    final = {row["row"]: row for row in rows.values() if "read" in row}
    for (name, (mse, _)), row in zip(DOCUMENT.items(), autoencoders):
        here, pca = row["train"]["mean"], row["pca_train"]
        table += [(f"{name}: MSE, {row['size']} units, {row['images']:,} images", f"{mse}",
                   common.show(row["train"]), here <= mse),
                  (f"{name}: below PCA of the same size and images", "-",
                   f"{here:.4f}; PCA {pca:.4f}", here < pca)]
    theirs = {name: (f"{share:.0%}", "95 % intervals overlap", *wilson(100 * share, 100))
              for name, (_, share) in DOCUMENT.items()}
    theirs["input"] = ("almost never fails", "interval reaches 95 %", 0.95, 1.0)
    for name, (document, claim, least, most) in theirs.items():
        low, high = final[name]["interval"]
        over = [value["mean"] for key, value in success.items() if key[0] == name]
        table.append((f"{name}: success of the first attempt ({claim})", document,
                      f"{percent(final[name]['success'])} ({low:.0%} to {high:.0%}); "
                      f"{min(over):.0%} to {max(over):.0%} over rules and starts",
                      low <= most and least <= high))
    for a, b in zip(STUDIED, STUDIED[1:]):
        pairs = [(success[(a, *choice)]["mean"], success[(b, *choice)]["mean"])
                 for name, *choice in success if name == a]
        count, x, y = sum(x < y for x, y in pairs), final[a]["success"], final[b]["success"]
        table.append((f"smaller layer, lower success: {a} < {b} (clearly, and under most)", "yes",
                      f"{x['mean']:.1%}; {y['mean']:.1%}; so under {count} of {len(pairs)} rules "
                      "and starts", clearly_more(y, x) and 2 * count > len(pairs)))
    plain, *regular = (final[name]["success"] for name in REGULAR)
    table += [("a regular latent space raises success (the first one is not)", "suspected",
               "; ".join(f"{name} {final[name]['success']['mean']:.0%}" for name in REGULAR),
               any(clearly_more(value, plain) for value in regular)),
              ("latent walks jump more than pixels (path in the longest 5 % of steps)", "yes",
               "; ".join(f"{name} {percent(jumps[name])}" for name in STUDIED),
               clearly_more(jumps["LSO-2"], jumps["input"]))]
    for claim, document, a, b, factor in COMPARISONS:
        x, y, near, far = (final[name][key] for key in ("read", "frechet") for name in (a, b))
        holds = (clearly_more(x, y) and x["mean"] >= factor * y["mean"] if factor
                 else not clearly_more(y, x))
        table.append((f"{claim}: {a}, {b}", document,
                      f"{percent(x)}, Fréchet {near:.0f}; {percent(y)}, {far:.0f}", holds))
    return table + [("the judge reads real test digits (99 %)", "-", f"{accuracy:.2%}",
                     accuracy >= 0.99)]


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    data = load_data(args.dataset, args.downsample, args.data, args.device)
    x, (x_test, y_test) = data["models"][0], data["test"]
    models = MODELS | {f"AE-{k}": Model(k) for k in args.sizes}
    label = f"{args.dataset} 14x14, {args.downsample}"
    with common.Run(__file__, args, label, additive=("sizes",)) as run:
        nets, history = train_all(run, args, data, models)
        classifier, judge = nets["classifier"], nets["judge"]
        first = x[:1000].repeat(args.repeats, 1, 1)
        layers = {"input": (lambda v: v, first)} | {
            name: (nets[name]["decoder"], start_codes(name, model, nets[name], first, args.seed))
            for name, model in models.items()}
        studies = study(run, args, classifier, layers)
        walks = {name: run.unit(f"walk-{name}", lambda checkpoint: walk(
            args, name, classifier, *layers[name])) for name in STUDIED}

        output = classifier(x_test.expand(args.repeats, -1, -1))  # (R, n, 10)
        error = total_squared_error(output, y_test).mean(1) / 10
        scores = {"accuracy": common.mean_std((output.argmax(2) == y_test).float().mean(1)),
                  "mse": common.mean_std(error)}
        accuracy = (judge(x_test).argmax(1) == y_test).float().mean().item()
        autoencoders = [reconstruction_row(name, nets[name], model, x, x_test)
                        for name, model in models.items() if name != "GAN"]
        rows, images = measure(studies, judge, data, models, (args.rule, args.start))
        jumps = {name: walk["jumps"] for name, walk in walks.items()}
        pictures(run, args, judge, rows, images, studies, walks)
        common.print_rows("Classifier, on test digits", [scores])
        common.print_rows("Autoencoders: MSE per pixel, and that of PCA", autoencoders)
        common.print_rows("Generations: first attempts, until success, as judged", [
            {key: value for key, value in row.items() if not isinstance(value, (list, tuple))}
            for row in rows.values()], digits=3)
        return run.finish({"autoencoders": autoencoders, "classifier": scores, "judge": accuracy,
                           "generations": list(rows.values()), "path in jumps": jumps},
                          claims(autoencoders, rows, jumps, accuracy), history)


if __name__ == "__main__":
    main()
