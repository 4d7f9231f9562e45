"""Who needs an encoder? VAEs whose encoders are trained, half frozen, frozen, or one random layer.

Reproduces M. IJzer, "Who Needs an Encoder? Evaluating the Use of Random Latent Representations in
Variational Autoencoders" (VU Amsterdam, 2021): encoders L (learnable), PNL (all but the last layer
frozen), NL (frozen), RKS (random kitchen sinks: one frozen layer), of fully connected or
convolutional layers, under a normal prior or a RealNVP of 2 or 6 flows f with u = f(z):

    loss = RE - RT,   RE = sum over pixels (x - x_hat)^2,   z ~ q(z|x) = N(mu, sigma^2)
    RT = mean over latent dimensions (log N(u; 0, 1) - log q(z|x)) + log |det df/dz|

RT with a mean but a whole determinant is what the document's figures turn out to be (as-published,
the default). With a sum in both places (corrected) -loss is the evidence lower bound in nats of
p(x|z) = N(x_hat, 1/2), up to 512 log pi (1536 log pi with three colours), and priors compare.

    python frozen_encoder_vae.py                        24 models: about 15 minutes on 2 CPU cores
    python frozen_encoder_vae.py --objective corrected --out out/corrected    the true bound
    python frozen_encoder_vae.py --repeats 2 --anova    a second repeat, and chapter 5's statistics
    python frozen_encoder_vae.py --dataset svhn --preset paper --out out/svhn    Table 5.10

`torchrun --nproc_per_node 4 frozen_encoder_vae.py --preset paper` shares the models among processes
that see one folder, each with its own GPU or its share of the cores. A run leaves figures,
tables.md (the document's tables), results.json, metrics.csv and the nets (units/*.pt) in
out/frozen_encoder_vae-<preset>. It has not been timed on a GPU.

What the document leaves open, and what we chose:
* Flows have 64 hidden units under fc and 128 under conv (Table 5.6 says so, the text says 64), Tanh
  at the end of s and t, and swap the halves by reversing z. Weights of encoder and decoder are
  Xavier uniform; their biases, and the flows, start as PyTorch's do.
* RKS is a single layer without activation (section 4.2), under conv of kernel and stride 16. PRKS,
  the encoder that chapter 6 would like to see, has a trainable last layer on 4x4x1028 (fc: 4,112)
  random features: leaky ReLUs of weights from U(+-sqrt(6 / fan_in)), of kernel and stride 8.
* E log q is used in closed form. The validation images (0.4 of the training images) stay unused.
* Time per epoch is the median. Features of frozen layers are computed once, before the first.
* Test figures are those of one drawn z per image, reconstructions those of its mean. A gap is
  positive where the test images come out worse than the last epoch of training.
* distance, of samples to the test images, is Fréchet's in the 84 features of a LeNet trained on all
  labelled images. It is not the FID; --fid computes that, too, with the TF-ported Inception.
  Samples are clipped to [0, 1]. floor: training against test images; naive: a Gaussian in the plane
  of 16 principal components.
* Limits of ours in the closing table. Readable: LeNet is 90 % confident in two thirds of the
  samples, and the entropy of its classes is 90 % of log 10. An interpolation jumps if one of its 7
  steps is more than 3/7 of the path. Others stand in the claim.
* log p(x) is by importance sampling from a Gaussian per image that starts at q(z|x) and is refined
  by --importance-steps of Adam, since a frozen q is far too narrow for one.
"""
import argparse
import contextlib
import datetime
import functools
import hashlib
import io
import itertools
import math
import operator
import os
import pathlib
import sys
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import common

# B batch, C colour channels, D latent dimensions, K flows, M latent channels, N images
PRESETS = {
    "smoke": dict(dataset="glyphs", train_images=512, test_images=256, epochs=(2, 4), repeats=1,
                  judge_steps=30, samples=200, importance_images=16, importance_steps=10,
                  importance_samples=10),
    "quick": dict(dataset="mnist", train_images=10_000, test_images=10_000, epochs=(50, 100),
                  repeats=1, judge_steps=1500, samples=10_000, importance_images=200,
                  importance_steps=100, importance_samples=200),
    "paper": dict(dataset="mnist", train_images=25_000, test_images=None, epochs=(250, 500),
                  repeats=5, judge_steps=1500, samples=10_000, importance_images=1000,
                  importance_steps=100, importance_samples=1000),
}
ENCODERS, LAYERS = ("L", "PNL", "NL", "RKS", "PRKS"), ("fc", "conv")
PRIORS = {"normal": 0, "flow2": 2, "flow6": 6}  # flows
TITLES = {"fc": "FC", "conv": "Conv", "normal": "Normal", "flow2": "Flow (2)", "flow6": "Flow (6)"}
SIDE, BATCH, RATE, CONSTANT_VARIANCE, WIDE = 32, 256, 1e-3, 1e-6, 1028  # Table 4.1; chapter 6
ADDITIVE = ("encoder", "layers", "prior", "repeats", "anova", "fid", "fid_weights")
KEY = operator.itemgetter("layers", "prior", "encoder")
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
DOCUMENT = {  # mean and std of L, PNL, NL, RKS; rows fc normal, flow2, flow6, conv normal, ...
    "negative ELBO": """9.84 0.05 21.77 0.39 36.67 0.47 33.52 0.91
        -6.11 0.05 5.78 0.32 20.78 0.87 16.48 0.23 -36.90 0.17 -26.06 0.47 -7.70 1.22 -2.53 0.63
        13.08 0.29 20.04 2.35 35.37 2.04 31.52 1.81 -2.16 0.53 2.65 0.88 21.01 4.77 14.26 0.61
        -31.91 0.32 -25.43 1.83 -10.74 4.92 -13.31 1.24""",  # Table 5.1
    "RT": """-1.83 0.02 -1.98 0.01 -6.46 0.01 -6.48 0.01 13.76 0.01 13.64 0.01 9.53 0.01 9.32 0.02
        44.82 0.02 44.66 0.01 38.07 0.38 28.80 0.17 -2.66 0.04 -2.88 0.06 -6.43 0.02 -6.42 0.00
        12.89 0.03 12.86 0.05 9.58 0.01 9.54 0.01 42.97 0.01 42.90 0.03 41.08 0.34 38.74 0.21""",
    "RE": """8.01 0.05 19.79 0.39 30.22 0.48 27.04 0.91 7.66 0.05 19.43 0.31 30.31 0.87 25.80 0.23
        7.92 0.18 18.60 0.46 30.38 1.21 26.27 0.70 10.42 0.26 17.15 2.33 28.94 2.05 25.09 1.81
        10.74 0.55 15.52 0.88 30.60 4.78 23.80 0.61 11.06 0.32 17.48 1.84 30.34 5.20 25.43 1.40""",
    "FID": """92.39 2.87 153.11 1.78 212.92 4.45 175.85 2.94
        70.39 1.56 138.15 2.31 165.32 5.79 142.73 1.77 54.68 0.64 112.23 1.67 107.11 8.98 120.72
        10.82 90.05 6.25 128.32 7.52 242.73 24.38 209.22 6.84 45.71 9.45 42.67 4.74 220.86 30.27
        138.68 15.39 40.96 5.20 39.29 7.29 78.17 26.78 57.29 11.54""",  # Table 5.4
    "seconds": """0.71 0.01 0.63 0.00 0.59 0.00 0.56 0.00 1.08 0.02 0.99 0.01 0.95 0.01 0.92 0.01
        2.02 0.01 1.96 0.01 1.87 0.02 1.86 0.01 1.87 0.01 1.45 0.00 1.40 0.00 1.20 0.01
        2.04 0.00 1.62 0.01 1.56 0.00 1.39 0.01 2.64 0.00 2.20 0.00 2.11 0.01 2.06 0.01""",
    "weights": """10256 0 7952 0 7824 0 7824 0 11888 0 9584 0 9456 0 9456 0 15152 0 12848 0 12720 0
        12720 0 521 0 434 0 396 0 396 0 3689 0 3602 0 3564 0 3564 0 10025 0 9938 0 9900 0 9900 0""",
}  # Tables 5.2, 5.3, 5.5, 5.6
SVHN = {"negative ELBO": "-79.23 0.11 -74.09 2.66 -62.60 3.36 -67.90 1.19",  # Table 5.10
        "RT": "90.81 0.01 90.89 0.04 90.30 1.28 88.00 0.23",
        "RE": "11.58 0.11 16.80 2.63 27.69 2.36 20.10 1.37",
        "FID": "59.15 1.77 57.68 1.52 78.08 5.46 65.40 4.00",
        "seconds": "2.65 0.01 2.21 0.01 2.13 0.01 2.08 0.00",
        "weights": "10339 0 10250 0 10196 0 10196 0"}
ANALYSES = {  # measure: factors whose interactions count, others, document's F (section 5.1)
    "negative ELBO": (("encoder", "layers"), ("prior",), {
        "prior": "F(2, 110) = 3459.90", "encoder x layers": "F(3, 110) = 17.79",
        "encoder": "F(3, 110) = 700.46"}),
    "RT": (("encoder", "layers"), ("prior",), {
        "prior": "F(2, 110) = 6300.92", "encoder x layers": "F(3, 110) = 10.95",
        "encoder": "F(3, 110) = 83.64"}),
    "RE": (("encoder", "layers", "prior"), (), {
        "encoder x layers": "F(3, 96) = 13.61", "encoder": "F(3, 96) = 809.61", "prior": "n.s."}),
    "gap of negative ELBO": ((), ("encoder", "layers", "prior"), {
        "layers": "F(1, 113) = 395.31", "encoder": "F(3, 113) = 53.73"}),
    "gap of RE": ((), ("encoder", "layers", "prior"), {"layers": "p < .000",
                                                       "encoder": "p < .000"}),
    "gap of RT": ((), ("encoder", "layers", "prior"), {
        "encoder": "F(3, 113) = 13.97", "prior": "F(2, 113) = 26.14"}),
    "distance": (("encoder", "layers", "prior"), (), {
        "encoder x layers x prior": "F(6, 96) = 17.37", "encoder": "F > 69.60",
        "layers": "F > 69.60", "prior": "F > 69.60"}),
    "seconds": ((), ("encoder", "layers", "prior"), {
        "prior": "F(2, 113) = 538.17", "encoder": "F(3, 113) = 39.80",
        "layers": "F(1, 113) = 528.99"}),
}


# --- data ----------------------------------------------------------------------------------------

def load_data(dataset, train_images, test_images, folder, device):
    """All images to be split, x (N, C, 32, 32) in [0, 1], y (N,), and the data set's own test
    images, which only show how well LeNet reads."""
    if dataset.startswith("glyphs"):
        channels, n = (3, 73_257) if dataset == "glyphs-rgb" else (1, 60_000)
        if test_images:
            n = train_images * 7 // 5 + test_images
        data = common.glyphs(n, 0, channels), common.glyphs(min(n, 10_000), 1, channels)
    else:
        data = [common.images(dataset, train, folder) for train in (True, False)]
    mode = "replicate" if data[0][0].shape[1] == 3 else "constant"
    return [(F.pad(x, [(SIDE - x.shape[3]) // 2] * 4, mode).to(device), y.to(device))
            for x, y in data]


def split(n, train_images, test_images, generator):
    """Indices (train, test) of a new division of n images, as Table 4.1 has it: those in between
    are for validation, and stay unused."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    rest = order[train_images * 7 // 5:]
    return order[:train_images], rest[:test_images]


# --- model ---------------------------------------------------------------------------------------

class Flow(nn.Module):
    """The prior, a RealNVP f: latent codes z (B, D) to the base u = f(z) (B, D), u ~ N(0, 1).

    K couplings, each followed by a reversal of the order; without any it is the normal prior.
    """

    def __init__(self, D, hidden, K):
        super().__init__()
        self.D = D

        def net():
            return nn.Sequential(nn.Linear(D // 2, hidden), nn.LeakyReLU(),
                                 nn.Linear(hidden, hidden), nn.LeakyReLU(),
                                 nn.Linear(hidden, D // 2), nn.Tanh())
        self.s, self.t = (nn.ModuleList(net() for _ in range(K)) for _ in range(2))

    def forward(self, z):
        """u (B, D) and log |det du/dz| (B,)."""
        logdet = z.new_zeros(len(z))
        for s, t in zip(self.s, self.t):
            a, b = z.chunk(2, 1)
            scale = s(a)
            z = torch.cat([a, scale.exp() * b + t(a)], 1).flip(1)  # Eqs. 2.2.1 and 2.2.2
            logdet = logdet + scale.sum(1)  # Eq. A.2.3
        return z, logdet

    def inverse(self, u):
        for s, t in zip(reversed(self.s), reversed(self.t)):
            a, b = u.flip(1).chunk(2, 1)
            u = torch.cat([a, (b - t(a)) * (-s(a)).exp()], 1)  # Eqs. 2.2.3 and 2.2.4
        return u


class UpConv(nn.Conv2d):
    """Upsample by 2, then convolve by 3x3, without the large image in between.

    Each of the four pixels that come of one sees 2x2 of the small image, so that it is a
    convolution there, of 4 times the channels: the same numbers, a third faster on a CPU.
    """

    def __init__(self, a, b):
        super().__init__(a, b, 3, padding=1)
        rows = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 1, 0]],
                             [[0, 1, 0], [0, 1, 0], [0, 0, 1]]])
        self.register_buffer("rows", rows, persistent=False)  # (pixel, tap in large, in small)

    def forward(self, x):
        weight = torch.einsum("oikl,akp,blq->oabipq", self.weight, self.rows, self.rows)
        weight = weight.flatten(0, 2).contiguous(memory_format=torch.channels_last)
        small = F.conv2d(x, weight, self.bias.repeat_interleave(4), padding=1)
        return F.pixel_shuffle(small, 2)


def active(*layers):
    """The layers in a row, each with a leaky ReLU."""
    return [part for layer in layers for part in (layer, nn.LeakyReLU(inplace=True))]


def encoder_layers(encoder, layers, channels, M):
    """Appendix B: (all layers but the last, the last); M latent features, at each of 2x2 places
    under conv. NL and RKS give means alone."""
    N, pixels = 1 if encoder in ("NL", "RKS") else 2, SIDE * SIDE * channels
    if layers == "fc":
        sizes = {"RKS": [pixels], "PRKS": [pixels, 4 * WIDE]}.get(encoder, [pixels, 256, 128, 64])
        body = active(*map(nn.Linear, sizes, sizes[1:]))
        return [nn.Flatten(), *body], nn.Linear(sizes[-1], N * M)
    if encoder == "RKS":
        return [], nn.Conv2d(channels, M, 16, stride=16)
    if encoder == "PRKS":
        return active(nn.Conv2d(channels, WIDE, 8, stride=8)), nn.Conv2d(WIDE, N * M, 3)
    sizes = [channels, 4, 8, 16]
    body = [part for a, b in zip(sizes, sizes[1:])
            for part in (*active(nn.Conv2d(a, b, 3, padding=1)), nn.MaxPool2d(2))]
    return body, nn.Conv2d(16, N * M, 3)


def build(encoder, layers, prior, channels, generator):
    """One VAE as a ModuleDict: frozen and trainable part of the encoder, decoder, prior."""
    D, conv = 16 if channels == 1 else 32, layers == "conv"
    M = D // 4 if conv else D
    body, last = encoder_layers(encoder, layers, channels, M)
    if conv:
        decoder = [nn.Unflatten(1, (M, 2, 2)), *active(nn.Conv2d(M, 64, 3, padding=1)),
                   *active(UpConv(64, 32), UpConv(32, 16), UpConv(16, 8)), UpConv(8, channels)]
    else:
        sizes = [M, 128, 256, 512, 1024]
        decoder = [*active(*map(nn.Linear, sizes, sizes[1:])),
                   nn.Linear(1024, SIDE * SIDE * channels), nn.Unflatten(1, (channels, SIDE, SIDE))]
    k = {"L": 0, "PNL": len(body), "PRKS": len(body)}.get(encoder, len(body) + 1)
    nets = nn.ModuleDict({
        "frozen": nn.Sequential(*[*body, last][:k]), "encoder": nn.Sequential(*[*body, last][k:]),
        "decoder": nn.Sequential(*decoder), "prior": Flow(D, 128 if conv else 64, PRIORS[prior])})
    nets.to(generator.device)
    flows = set(nets["prior"].modules())
    for part in nets.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            weight, fan_in = part.weight, part.weight[0].numel()
            bound = default = fan_in ** -0.5  # PyTorch's own
            if part not in flows:
                bound = math.sqrt(6 / (fan_in + len(weight) * weight[0, 0].numel()))  # section 4.6
            if encoder == "PRKS" and part is body[-2]:  # its many outputs would make these tiny
                bound = math.sqrt(6 / fan_in)
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            nn.init.uniform_(part.bias, -default, default, generator=generator)
    nets["frozen"].requires_grad_(False)
    return nets.to(memory_format=torch.channels_last)


def document_count(nets):
    """What Table 5.6 prints: the sum, over trainable tensors, of the sum of their shape."""
    return sum(sum(value.shape) for value in nets.parameters() if value.requires_grad)


class LeNet(nn.Module):
    """LeNet-5 with ReLUs: x (B, C, 32, 32) -> (B, 10) logits; features (B, 84)."""

    def __init__(self, channels, generator):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84),
            nn.ReLU())
        self.head = nn.Linear(84, 10)
        self.to(generator.device)
        for value in self.parameters():
            if value.dim() > 1:
                nn.init.normal_(value, std=math.sqrt(2 / value[0].numel()), generator=generator)
            else:
                nn.init.zeros_(value)

    def forward(self, x):
        return self.head(self.features(x))


# --- objective -----------------------------------------------------------------------------------

def encode(nets, h):
    """mu, log sigma^2 (B, D) from what the frozen layers make of the images."""
    if not len(nets["encoder"]):
        mu = h.flatten(1)
        return mu, torch.full_like(mu, math.log(CONSTANT_VARIANCE))
    mu, logvar = nets["encoder"](h).chunk(2, 1)
    return mu.flatten(1), logvar.flatten(1)


def loss_terms(nets, h, x, noise, objective):
    """RE, squared error summed over an image, and RT in nats (B,); the loss is the mean of RE - RT.

    h: frozen features of the images x (B, C, 32, 32); noise (B, D). RT is log p(z) - E log q(z|x),
    its mean over D (as-published) or its sum (corrected), plus log |det du/dz|.
    """
    mu, logvar = encode(nets, h)
    z = mu + (logvar / 2).exp() * noise
    u, logdet = nets["prior"](z)
    RE = ((nets["decoder"](z) - x) ** 2).flatten(1).sum(1)
    RT = (1 + logvar - u ** 2) / 2  # per dimension, in which both log 2 pi cancel
    return RE, (RT.mean(1) if objective == "as-published" else RT.sum(1)) + logdet  # Eq. 4.3.2


# --- train ---------------------------------------------------------------------------------------

@torch.no_grad()
def in_parts(function, *tensors, size=1000):
    """function of `size` rows at a time."""
    return torch.cat([function(*part) for part in zip(*(x.split(size) for x in tensors))])


def train(name, nets, x, objective, epochs, generator, compile=False, checkpoint=None):
    """Adam on batches of x (N, C, 32, 32); returns RE, RT (means) and seconds of each epoch.

    Raises FloatingPointError where a term is not finite.
    """
    # frozen layers never change: their features are computed once, and nothing flows back into them
    h = in_parts(nets["frozen"], x) if len(nets["frozen"]) else x
    optimiser = torch.optim.Adam([value for value in nets.parameters() if value.requires_grad],
                                 RATE, fused=True)
    if compile:
        torch.compiler.reset()  # else the ninth net would find the cache of graphs full
    terms = common.compiled(loss_terms, compile, mode="reduce-overhead" if x.is_cuda else None)
    parts, first, history = (nets, optimiser, generator), 0, torch.zeros(epochs, 3)
    if checkpoint and checkpoint.state:
        first, history = checkpoint.restore(*parts)
        history = history.cpu()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    bar = tqdm(range(first, epochs), name, epochs, initial=first, disable=None, position=rank)
    for epoch in bar:
        start, sums = time.perf_counter(), []
        for index in common.batches(len(x), BATCH, generator):
            noise = torch.randn(len(index), nets["prior"].D, generator=generator,
                                device=x.device)
            RE, RT = terms(nets, h[index], x[index], noise, objective)
            optimiser.zero_grad()
            (RE - RT).mean().backward()
            optimiser.step()
            sums.append(torch.stack([RE.detach().sum(), RT.detach().sum()]))
        sums = torch.stack(sums)  # (steps, 2); the epoch's only synchronisation is below
        if not torch.isfinite(sums).all():
            step, term = (~torch.isfinite(sums)).nonzero()[0].tolist()
            raise FloatingPointError(f"{name}: the term {('RE', 'RT')[term]} is not finite at step "
                                     f"{epoch * len(sums) + step}")
        RE, RT = (sums.sum(0) / len(x)).tolist()
        history[epoch] = torch.tensor([RE, RT, time.perf_counter() - start])
        bar.set_postfix_str(f"RE {RE:.2f}, RT {RT:.2f}", refresh=False)
        if checkpoint and checkpoint.due():
            checkpoint.save((epoch + 1, history), *parts)
    return dict(zip(("RE", "RT", "seconds"), history.T))


def train_judge(judge, x, y, steps, generator):
    """Cross-entropy in nats, mean over the batch; Adam whose rate falls linearly to 0.

    x (N, C, 32, 32), y (N,). Raises FloatingPointError where the loss ends up not finite.
    """
    optimiser = torch.optim.Adam(judge.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in tqdm(range(steps), "LeNet", disable=None):
        index = torch.randint(len(x), (BATCH,), generator=generator, device=x.device)
        loss = F.cross_entropy(judge(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    if not torch.isfinite(loss):
        raise FloatingPointError("LeNet: the cross-entropy is not finite")


# --- evaluate ------------------------------------------------------------------------------------

def constant(x):
    """-log p(x|z) - RE in nats of p(x|z) = N(x_hat, 1/2), images x (N, C, H, W)."""
    return x[0].numel() / 2 * math.log(math.pi)


def evaluate(nets, x, objective, generator):
    """RE, RT and the loss RE - RT, means over the images x (N, C, 32, 32), one drawn z each."""
    noise = torch.randn(len(x), nets["prior"].D, generator=generator, device=x.device)
    RE, RT = in_parts(lambda x, noise: torch.stack(loss_terms(
        nets, nets["frozen"](x), x, noise, objective), 1), x, noise).cpu().double().mean(0).tolist()
    return {"negative ELBO": RE - RT, "RE": RE, "RT": RT}


def log_likelihood(nets, x, samples, generator, steps=100):
    """log p(x) in nats (N,) by importance sampling, p(x|z) = N(x_hat, 1/2); on average too low.
    Freezes the nets.

    One Gaussian proposal per image: it begins as q(z|x), though not with variances below 0.01, and
    is refined by `steps` of Adam on the same bound.
    """
    nets.requires_grad_(False)
    mu, logvar = encode(nets, nets["frozen"](x))
    proposal = [mu.clone().requires_grad_(), logvar.clamp(min=math.log(0.01)).requires_grad_()]

    def log_weight(noise):
        """log p(x, z) - log r(z) of z = mu + sigma noise, noise (N, D). -> (N,)"""
        mu, logvar = proposal
        z = mu + (logvar / 2).exp() * noise
        u, logdet = nets["prior"](z)
        RE = ((nets["decoder"](z) - x) ** 2).flatten(1).sum(1)
        # log N(u) - log r(z) is (noise^2 + logvar - u^2) / 2 per dimension: both log 2 pi cancel
        return logdet - RE - constant(x) + ((noise ** 2 + logvar - u ** 2) / 2).sum(1)

    def draw():
        return torch.randn(proposal[0].shape, generator=generator, device=x.device)
    optimiser = torch.optim.Adam([{"params": value, "lr": lr} for value, lr in
                                  zip(proposal, (0.02, 0.1))])
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for _ in tqdm(range(steps), "proposals for log p(x)", disable=None, leave=False):
        optimiser.zero_grad()
        (-log_weight(draw()).sum()).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        weights = torch.stack([log_weight(draw()) for _ in range(samples)])  # (samples, N)
    return weights.logsumexp(0) - math.log(samples)


@torch.no_grad()
def sample(nets, n, generator):
    """n images from the prior, clipped to [0, 1], and their codes: (n, C, 32, 32), (n, D)."""
    u = torch.randn(n, nets["prior"].D, generator=generator, device=generator.device)
    z = in_parts(nets["prior"].inverse, u)
    return in_parts(nets["decoder"], z).clamp(0, 1), z


@torch.no_grad()
def interpolate(nets, z):
    """Straight lines in latent space between pairs of codes: z (2, n, D) -> (n, 8, C, 32, 32)."""
    t = torch.linspace(0, 1, 8, device=z.device)[:, None]
    codes = (1 - t) * z[0][:, None] + t * z[1][:, None]  # (n, 8, D)
    return in_parts(nets["decoder"], codes.flatten(0, 1)).clamp(0, 1).unflatten(0, (-1, 8))


def moments(features):
    """Mean (d,) and covariance (d, d) of features (n, d), in float64."""
    features = features.cpu().double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(a, b):
    """Squared Fréchet distance of two Gaussians (mean (d,), covariance (d, d)), in float64."""
    (mean_a, A), (mean_b, B) = a, b
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2)
    # tr (A B)^(1/2) by way of a symmetric matrix with the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return (((mean_a - mean_b) ** 2).sum() + A.trace() + B.trace() - 2 * cross).item()


class PoolBranch(nn.Module):
    """The pooling branch of an Inception block as the TF-ported net has it: of the block's own
    input, averages that leave the padding out, in the last block the largest instead."""

    def __init__(self, block, largest):
        super().__init__()
        self.conv, self.largest = block.branch_pool, largest
        block.register_forward_pre_hook(lambda _, inputs: setattr(self, "x", inputs[0]))

    def forward(self, _):
        x = self.__dict__.pop("x")
        return self.conv(F.max_pool2d(x, 3, 1, 1) if self.largest else
                         F.avg_pool2d(x, 3, 1, 1, count_include_pad=False))


def inception(path, device):
    """The net of the standard FID, (B, 3, 299, 299) in [-1, 1] -> (B, 2048) features, and the first
    8 digits of its file's hash.

    path: its weights (pytorch-fid's file), or None: torch's hub folder, downloaded if need be.
    """
    from torchvision.models import inception_v3
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    home = pathlib.Path(torch.hub.get_dir(), "checkpoints", INCEPTION.rpartition("/")[2])
    try:
        if not path and not home.exists():
            home.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(home), "6726825d", progress=False)
        data = pathlib.Path(path or home).read_bytes()
        net.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    except Exception as error:  # no network, no such file, another net: many kinds
        why = " ".join(str(error).split())[:120]
        common.die(f"argument --fid: cannot load {path or home} ({why}); name a copy of "
                   f"{INCEPTION} with --fid-weights, or leave --fid away")
    for name, block in net.named_children():
        if hasattr(block, "branch_pool") and isinstance(block.branch_pool, nn.Module):
            block.branch_pool = PoolBranch(block, largest=name == "Mixed_7c")
    net.fc = nn.Identity()
    return net.requires_grad_(False).eval().to(device), hashlib.sha256(data).hexdigest()[:8]


def inception_features(net, x):
    """x (B, C, H, W) in [0, 1] as the usual tool reads it from 8-bit files -> (B, 2048)."""
    x = ((x * 255).round() / 255).expand(-1, 3, -1, -1)
    return net(2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1)


def fid_moments(net, x):
    """moments of the Inception features of images x (n, C, H, W) in [0, 1]."""
    return moments(in_parts(lambda part: inception_features(net, part), x, size=100))


def naive_samples(x, n, generator, k=16):
    """n draws of the Gaussian in the plane of k principal components of x (N, C, H, W), clipped,
    and the squared errors per image of that plane and of the mean image."""
    flat = x.flatten(1)
    mean, cov = flat.mean(0), torch.cov(flat.T.cpu().double())
    values, vectors = torch.linalg.eigh(cov)  # ascending
    noise = torch.randn(n, k, generator=generator, device=x.device)
    draws = mean + noise * values[-k:].sqrt().to(x) @ vectors[:, -k:].T.to(x)
    return (draws.view(n, *x.shape[1:]).clamp(0, 1), values[:-k].sum().item(), values.sum().item())


@torch.no_grad()
def judged(judge, x, real):
    """What LeNet sees in x (n, C, 32, 32), beside the moments and the variance of real images."""
    features = in_parts(judge.features, x)
    p = judge.head(features).softmax(1)
    share = p.argmax(1).cpu().bincount(minlength=10).double() / len(x)
    return {"distance": frechet_distance(moments(features), real["moments"]),
            "confident": (p.amax(1) >= 0.9).float().mean().item(),
            "balance": torch.special.entr(share).sum().item() / math.log(10),
            "variety": x.var(0).sum().item() / real["variance"]}


def readable(row):
    """Are the samples of this row of `summary` digits, and of all ten kinds? Limits of ours."""
    return row["confident"]["mean"] >= 2 / 3 and row["balance"]["mean"] >= 0.9


def step_shares(paths):
    """Shares of the 7 steps in each path (n, 8, C, 32, 32), 1/7 if it is even. -> (n, 7)"""
    steps = (paths[:, 1:] - paths[:, :-1]).flatten(2).norm(dim=2)
    return steps / steps.sum(1, keepdim=True).clamp(min=1e-12)


def anova(rows, value, interacting, others=()):
    """Analysis of variance of a balanced design: {term: {"F", "df", "error df", "p"}}.

    rows: dicts; interacting: factors that enter with all their interactions; others: main effects
    alone. Each term's sum of squares is what leaving it out of the model adds (type III). Raises
    ValueError where no degree of freedom is left for the error.
    """
    from scipy.stats import f
    y, effects = torch.tensor([row[value] for row in rows], dtype=torch.double), {}
    for factor in (*interacting, *others):
        levels = list(dict.fromkeys(row[factor] for row in rows))
        one_hot = F.one_hot(torch.tensor([levels.index(row[factor]) for row in rows])).double()
        if len(levels) > 1:
            effects[factor] = one_hot[:, :-1] - one_hot[:, -1:]  # of each level, summing to 0
    crossed = [factor for factor in interacting if factor in effects]
    terms = {" x ".join(names): functools.reduce(
        lambda a, b: (a[:, :, None] * b[:, None]).flatten(1), map(effects.get, names))
        for size in range(1, len(crossed) + 1) for names in itertools.combinations(crossed, size)}
    terms |= {factor: effects[factor] for factor in others if factor in effects}

    def residual(names):
        X = torch.cat([torch.ones(len(y), 1, dtype=y.dtype), *(terms[name] for name in names)], 1)
        left = y - X @ torch.linalg.lstsq(X, y[:, None]).solution[:, 0]
        return (left ** 2).sum().item(), len(y) - X.shape[1]
    error, df_error = residual(terms)
    if df_error < 1:
        raise ValueError("the analysis of variance needs at least two repeats")
    table = {}
    for name in terms:
        without, df = residual([other for other in terms if other != name])
        ratio = (without - error) / (df - df_error) / (error / df_error)
        table[name] = {"F": ratio, "df": df - df_error, "error df": df_error,
                       "p": float(f.sf(ratio, df - df_error, df_error))}
    return table


def measure(nets, name, judge, real, x, args):
    """Everything but FID measured in a trained model: (scores, pictures); x: test images, real:
    what real_images returned."""
    g = common.generator(args.seed, f"{name} scores", args.device)
    scores, some = evaluate(nets, x, args.objective, g), x[:args.importance_images]
    scores["nats there"] = evaluate(nets, some, "corrected", g)["negative ELBO"] + constant(x)
    scores["log p"] = log_likelihood(nets, some, args.importance_samples, g,
                                     args.importance_steps).mean().item()
    images, z = samples_of(nets, name, args)
    paths = interpolate(nets, z[:len(z) // 2 * 2][:400].unflatten(0, (2, -1)))
    longest = step_shares(paths).amax(1)
    scores |= judged(judge, images, real) | {
        "longest step": longest.mean().item(), "jumps": (longest > 3 / 7).float().mean().item()}
    mu, _ = encode(nets, nets["frozen"](x[:8]))
    pictures = {"reconstructions": torch.stack([x[:8], nets["decoder"](mu).clamp(0, 1)]),
                "samples": images[:64].unflatten(0, (8, -1)), "interpolations": paths[:4]}
    return scores, {key: value.cpu().clone() for key, value in pictures.items()}


def samples_of(nets, name, args):
    """The model's own --samples images and codes, the same whenever they are drawn."""
    return sample(nets, args.samples, common.generator(args.seed, f"{name} samples", args.device))


# --- plot ----------------------------------------------------------------------------------------

def groups_and_encoders(cells):
    """The rows [(layers, prior), ...] and columns [encoder, ...] of the document's tables."""
    return [list(dict.fromkeys(part)) for part in zip(*((key[:2], key[2]) for key in cells))]


def title(group, between=", "):
    return between.join(TITLES[part] for part in group)


def plot_sheets(pictures):
    """A sheet per model in the document's layout: {(layers, prior, encoder): (r, c, C, H, W)}."""
    groups, encoders = groups_and_encoders(pictures)
    r, c, *_ = next(iter(pictures.values())).shape
    fig = Figure(figsize=(2.6 * len(encoders) + 1.4, 2.6 * len(groups) * r / c + 1),
                 layout="constrained")
    axes = fig.subplots(len(groups), len(encoders), squeeze=False)
    for ax, images in zip(axes.flat, pictures.values()):
        common.image_sheet(ax, images)
    for ax, name in zip(axes[0], encoders):
        ax.set_title(name, fontsize="medium")
    for ax, group in zip(axes[:, 0], groups):
        ax.set_ylabel(title(group, "\n"))
    return fig


def plot_training(histories, cells):
    """RE and RT by epoch, first repeat, and the test images' mean as a dot: {cell: history}."""
    groups, encoders = groups_and_encoders(histories)
    fig = Figure(figsize=(2.6 * len(groups) + 1.6, 5.5), layout="constrained")
    axes = fig.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    for i, (term, unit) in enumerate((("RE", "squared error per image"), ("RT", "nats"))):
        axes[i, 0].set_ylabel(f"{term} ({unit})")
        for ax, group in zip(axes[i], groups):
            for k, encoder in enumerate(encoders):
                values, style = histories[(*group, encoder)][term], dict(color=common.COLOURS[k])
                ax.plot(range(1, len(values) + 1), values, label=encoder, **style)
                ax.plot(len(values), cells[(*group, encoder)][term]["mean"], "o", ms=4, **style)
            ax.set(xlabel="epoch" if i else None, yscale="linear" if i else "log")
            if not i:
                ax.set_title(title(group), fontsize="medium")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right")
    return fig


def plot_distances(cells, key, floors):
    """Distance of samples to real images against the number of trainable weights."""
    fig, encoders = Figure(figsize=(8, 4.6), layout="constrained"), groups_and_encoders(cells)[1]
    ax = fig.subplots()
    for (layers, prior, encoder), row in cells.items():
        colour = common.COLOURS[encoders.index(encoder)]
        ax.errorbar(row["real weights"]["mean"], row[key]["mean"], row[key]["std"] or 0, capsize=3,
                    ms=7, fmt="osD"[list(PRIORS).index(prior)], color=colour,
                    mfc=colour if layers == "conv" else "white")
    for style, (label, value) in zip(("--", ":"), floors.items()):
        ax.axhline(value, color="0.4", ls=style, lw=1, label=label)
    for k, encoder in enumerate(encoders):
        ax.plot([], [], "o", color=common.COLOURS[k], label=encoder)
    for mark, prior in zip("osD", PRIORS):
        ax.plot([], [], mark, color="0.4", label=TITLES[prior])
    ax.plot([], [], "o", color="0.4", label="Conv")
    ax.plot([], [], "o", color="0.4", mfc="white", label="FC")
    ax.set(xscale="log", yscale="log", xlabel="trainable weights",
           ylabel="FID" if key == "FID" else "Fréchet distance in LeNet's features")
    fig.legend(loc="outside right", fontsize="small")
    return fig


def plot_seconds(cells, document):
    """Seconds per epoch; marks: those of L by the document's ratio."""
    (groups, encoders), fig = groups_and_encoders(cells), Figure((8, 4), layout="constrained")
    ax, width = fig.subplots(), 1 / (len(encoders) + 1)
    for k, encoder in enumerate(encoders):
        for i, group in enumerate(groups):
            key, base = (*group, encoder), (*group, "L")
            at = i + (k - len(encoders) / 2 + 0.5) * width
            ax.bar(at, cells[key]["seconds"]["mean"], width, color=common.COLOURS[k],
                   label=None if i else encoder)
            if key in document and base in cells:
                ratio = document[key]["mean"] / document[base]["mean"]
                ax.plot(at, ratio * cells[base]["seconds"]["mean"], "k_", ms=10, mew=2,
                        label=None if i or k else "L, by the\ndocument's\nratio")
    ax.set_xticks(range(len(groups)), [title(group, "\n") for group in groups])
    ax.set_ylabel("seconds per epoch (median)")
    fig.legend(loc="outside right")
    return fig


# --- tables --------------------------------------------------------------------------------------

def published(channels):
    """The document's figures: {measure: {(layers, prior, encoder): {"mean", "std"}}}."""
    rows = itertools.product(LAYERS, PRIORS) if channels == 1 else [("conv", "flow6")]
    keys = [(*row, encoder) for row in rows for encoder in ENCODERS[:4]]
    return {measure: {key: {"mean": mean, "std": None if measure == "weights" else std}
                      for key, mean, std in zip(keys, *[iter(map(float, text.split()))] * 2)}
            for measure, text in (DOCUMENT if channels == 1 else SVHN).items()}


def summary(rows):
    """Mean and std over repeats of every measure: {(layers, prior, encoder): {measure: ...}}."""
    found = {}
    for row in rows:
        found.setdefault(KEY(row), []).append(row)
    cells = {key: {measure: common.mean_std(torch.tensor([row[measure] for row in some],
                                                         dtype=torch.double))
                   for measure, value in some[0].items() if isinstance(value, (int, float))}
             for key, some in found.items()}
    for row in cells.values():
        for measure in ("weights", "real weights"):
            row[measure]["std"] = None
    return cells


def document_tables(cells, args, document, channels):
    """Tables 5.1 to 5.6, or 5.10 table by table, the document's figures beside ours."""
    (groups, encoders), tables = groups_and_encoders(cells), []
    foreign = ("negative ELBO", "RT") if args.objective == "corrected" else ()  # other quantities
    measures = [("5.1", "negative ELBO", 2), ("5.2", "RT", 2), ("5.3", "RE", 2), ("5.4", "FID", 2),
                ("5.4, on another scale", "distance", 2), ("5.5", "seconds", 2),
                ("5.6, counted as the document does", "weights", 0), ("5.6", "real weights", 0)]
    for number, key, digits in measures:
        if key != "FID" or args.fid:
            theirs, head, rows = document.get("FID" if key == "distance" else key, {}), [], []
            for name in encoders:
                known = name in ENCODERS[:4] and key != "real weights"
                head += [name, f"{name}, document" + "'s FID" * (key == "distance")][:1 + known]
            for group in groups:
                rows.append([TITLES[part] for part in group])
                for name in encoders:
                    rows[-1].append(common.show(cells[(*group, name)][key], digits))
                    if name in ENCODERS[:4] and key != "real weights":
                        known = key not in foreign and theirs.get((*group, name))
                        rows[-1].append(common.show(known, digits) if known else "-")
            number = number if channels == 1 else "5.10"
            tables.append((f"Table {number}: {key}", ["Layer", "Prior", *head], rows))
    return tables


def write_tables(run, args, cells, reals, analyses, document, channels):
    """The document's tables and what it has not, on the screen and as Markdown in tables.md."""
    tables = document_tables(cells, args, document, channels)
    keys = ["nats there", "log p", "confident", "balance", "variety", "longest step", "jumps",
            "gap of negative ELBO", "gap of RE", "gap of RT"]
    tables.append(("Not in the document (nats there: negative ELBO in nats, of the "
                   f"{args.importance_images} images of log p)",
                   ["Layer", "Prior", "Encoder", *keys],
                   [[*(TITLES.get(part, part) for part in cell),
                     *(common.show(row[key], 2) for key in keys)] for cell, row in cells.items()]))
    keys = list(reals[0]["rows"][0])
    plane, mean = (reals[0][key] for key in ("PCA RE", "mean image RE"))
    tables.append((f"Real and naive images (RE of 16 principal components {plane:.1f}, of the mean "
                   f"image {mean:.1f})", keys, [
                       [f"{row[key]:.3f}" if isinstance(row[key], float) else row[key]
                        for key in keys] for real in reals for row in real["rows"]]))
    if analyses:
        documents_F = {"FID": ANALYSES["distance"]} | ANALYSES
        comparable = args.objective == "as-published" and channels == 1
        tables.append(("Analysis of variance", ["measure", "term", "here", "p", "document"], [
            [measure, term, f"F({row['df']}, {row['error df']}) = {row['F']:.2f}",
             f"{row['p']:.2g}", documents_F[measure][2].get(term, "-") if comparable else "-"]
            for measure, table in analyses.items() for term, row in table.items()]))
    text = ""
    for name, head, rows in tables:
        print(f"\n{name}")
        common.print_table(head, rows)
        lines = [head, ["---"] * len(head), *rows]
        text += f"\n{name}\n\n" + "".join(f"| {' | '.join(map(str, row))} |\n" for row in lines)
    common.write(run.folder / "tables.md", f"# {run.label}\n{text}")


# --- claims --------------------------------------------------------------------------------------

def mean_of(cells, measure, level):
    """Mean over all models that have this encoder, kind of layers or prior."""
    values = [row[measure]["mean"] for key, row in cells.items() if level in key]
    return sum(values) / len(values)


def ranking(cells, measure, names, digits=2):
    """Means by names, whether they rise strictly, and the same as text."""
    values = {name: mean_of(cells, measure, name) for name in names}
    pairs = list(zip(values.values(), list(values.values())[1:]))
    text = "; ".join(f"{TITLES.get(name, name)} {x:.{digits}f}" for name, x in values.items())
    return values, all(a < b for a, b in pairs), text


def figure_claims(cells, document, objective, channels):
    """Published figures beside ours, a table each: (claim, document, here, holds)."""
    table = []
    for number, measure in (("5.1", "negative ELBO"), ("5.2", "RT"), ("5.3", "RE"), ("5.4", "FID")):
        if objective == "as-published" and measure in next(iter(cells.values())):
            near = [key for key, row in cells.items() for theirs in [document[measure][key]]
                    if abs(row[measure]["mean"] - theirs["mean"]) <= 2 * theirs["std"] + 0.01]
            number = number if channels == 1 else "5.10"
            table.append((f"Table {number}: {measure} within two std of the document's",
                          f"{len(cells)} models", f"{len(near)}", len(near) == len(cells)))
    count = [(row["weights"]["mean"], document["weights"][key]["mean"])
             for key, row in cells.items()]
    ours, theirs = (sum(part) for part in zip(*count))
    number = "5.6" if channels == 1 else "5.10"
    return table + [(f"Table {number}: weights as the document counts, every model and in all",
                     f"{theirs:,.0f}", f"{ours:,.0f}", all(a == b for a, b in count))]


def grid_claims(cells, distance, objective):
    """Chapter 5's conclusions from all 24 models: (claim, document, here, holds)."""
    order, foreign, table = ("L", "PNL", "RKS", "NL"), objective == "corrected", []
    for key in ("negative ELBO", "RE"):
        _, holds, text = ranking(cells, key, order)
        table.append((f"{' < '.join(order)} in {key}", "-" if foreign else "yes", text, holds))
    values, _, text = ranking(cells, "RE", PRIORS)
    best = {name: min((key for key in cells if key[2] == name),
                      key=lambda key: cells[key][distance]["mean"]) for name in order}
    random = {key: row for key, row in cells.items() if key[2] in ("NL", "RKS")}
    wanted = {key for key in random if key[:2] == ("conv", "flow6")}
    good = {key for key, row in random.items() if readable(row)}
    seen = "; ".join(f"{'-'.join(key)} {row['confident']['mean']:.0%}, balance "
                     f"{row['balance']['mean']:.2f}"
                     for key, row in random.items() if key in good | wanted)
    flat = [cells["fc", "flow6", name]["variety"]["mean"] for name in ("NL", "RKS")]
    table += [
        ("the prior does not change RE (means within 5 %)", "yes", text,
         max(values.values()) <= 1.05 * min(values.values())),
        (f"Conv, Flow (6) has the best {distance} for every encoder", "yes", "; ".join(
            f"{name}: {title(key[:2])} {cells[key][distance]['mean']:.1f}"
            for name, key in best.items()),
         all(key[:2] == ("conv", "flow6") for key in best.values())),
        ("of random encoders only Conv, Flow (6) gives readable samples", "yes", seen,
         good == wanted),
        ("FC, Flow (6), random: samples hardly vary (variance below half of the images')", "yes",
         "NL {:.2f}; RKS {:.2f}".format(*flat), max(flat) < 0.5)]
    _, holds, text = ranking(cells, "gap of negative ELBO", ("conv", "fc"))
    table.append(("fc overfits more than conv (gap of negative ELBO)",
                  "-" if foreign else "1.26; 12.03", text, holds))
    values, _, text = ranking(cells, "gap of negative ELBO", order)
    table.append(("random encoders overfit more (gap of negative ELBO)",
                  "-" if foreign else "1.66; 5.23; 9.64; 10.04", text,
                  min(values["NL"], values["RKS"]) > max(values["L"], values["PNL"])))
    if next(iter(cells.values()))["RE"]["n"] > 1:
        spread = {name: sum(row["RE"]["std"] for key, row in cells.items() if name in key) / 6
                  for name in order}
        table.append(("NL varies most between repeats (mean std of RE)", "yes", "; ".join(
            f"{name} {x:.2f}" for name, x in spread.items()), max(spread, key=spread.get) == "NL"))
    jumps = {key: row["jumps"]["mean"] for key, row in cells.items()}
    rough = max(jumps, key=jumps.get)
    _, holds, text = ranking(cells, "log p", PRIORS, 1)
    return table + [("interpolations are smooth (at most 1 % jump, every model)", "yes",
                     f"{'-'.join(rough)} {jumps[rough]:.1%}", jumps[rough] <= 0.01),
                    ("log p(x) in nats rises with the flows", "not comparable", text, holds)]


def svhn_claims(cells, distance):
    """Section 5.2's conclusions from the four models of three colours."""
    table = []
    for key, text, test in (
            ("negative ELBO", "L < PNL < RKS < NL", lambda L, PNL, NL, RKS: L < PNL < RKS < NL),
            ("RE", "L < PNL, RKS < NL", lambda L, PNL, NL, RKS: L < min(PNL, RKS)
             and max(PNL, RKS) < NL),
            (distance, "L, PNL, RKS < NL", lambda L, PNL, NL, RKS: max(L, PNL, RKS) < NL)):
        values = {cell[2]: row[key]["mean"] for cell, row in cells.items()}
        table.append((f"{text} in {key}", "yes", "; ".join(
            f"{name} {x:.2f}" for name, x in values.items()), test(**values)))
    return table


def pair_claims(cells, distance, document):
    """The other encoders against L, and PRKS against PNL: speed and distance."""
    table, at = [], ("conv", "flow6")

    def pair(claim, text, key, a, b, limit, digits=1):
        if (*at, a) in cells and (*at, b) in cells:
            x, y = (cells[(*at, name)][key]["mean"] for name in (a, b))
            table.append((f"Conv, Flow (6): {claim}", text, f"{x:.{digits}f}; {y:.{digits}f}",
                          x <= limit * y))
    fid = "FID {:.2f}; {:.2f}".format(
        *(document["FID"][(*at, name)]["mean"] for name in ("PNL", "L")))
    pair(f"{distance} of PNL that of L (at most a fifth higher)", fid, distance, "PNL", "L", 1.2)
    pair("PNL saves 15 % of L's seconds per epoch", "16.5 %", "seconds", "PNL", "L", 0.85, 2)
    for name in ("PNL", "NL", "RKS"):
        pairs = [(key, (*key[:2], "L")) for key in document["seconds"]
                 if key[2] == name and key in cells and (*key[:2], "L") in cells]
        ours, theirs = ([some[a]["mean"] / some[b]["mean"] for a, b in pairs] for some in (
            {key: row["seconds"] for key, row in cells.items()}, document["seconds"]))
        if pairs:
            count = sum(a <= b for a, b in zip(ours, theirs))
            table.append((f"{name}: seconds per epoch by those of L (mean at most that)",
                          f"{sum(theirs) / len(pairs):.2f}", f"{sum(ours) / len(pairs):.2f}; lower "
                          f"for {count} of {len(pairs)}", sum(ours) <= sum(theirs)))
    pair("PRKS as fast as PNL (seconds per epoch)", "likely", "seconds", "PRKS", "PNL", 1.0, 2)
    pair(f"{distance} of PRKS that of PNL (at most a fifth higher)", "likely", distance, "PRKS",
         "PNL", 1.2)
    return table


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__, PRESETS)
    add, number = (parser.add_argument_group("flags of frozen_encoder_vae.py").add_argument,
                   common.number)
    add("--dataset", choices=["mnist", "svhn", "glyphs", "glyphs-rgb"],
        help="real images, or digits drawn offline")
    add("--encoder", nargs="+", choices=ENCODERS, default=list(ENCODERS[:4]), help="to train")
    add("--layers", nargs="+", choices=LAYERS, help="fc, conv or both; default: both, with three "
        "colours conv")
    add("--prior", nargs="+", choices=list(PRIORS), help="default: all, with three colours flow6")
    add("--objective", choices=["as-published", "corrected"], default="as-published",
        help="the document's weighting of RT, or the evidence lower bound")
    add("--epochs", type=number(int, 1, 10**5),
        help="of every model; two defaults: with one colour, with three")
    add("--repeats", type=number(int, 1, 100), help="of everything, each with a split of its own")
    add("--train-images", type=number(int, 256, 10**6), help="per split")
    add("--test-images", type=number(int, 100, 10**6), help="per split; default: all that are left")
    add("--samples", type=number(int, 100, 10**6), help="images per model for the distances")
    add("--importance-images", type=number(int, 1, 10**6), help="test images to find log p(x) of")
    add("--importance-steps", type=number(int, 1, 10**6), help="of Adam on their proposals")
    add("--importance-samples", type=number(int, 1, 10**6), help="of each of them")
    add("--judge-steps", type=number(int, 1, 10**6), help=f"batches of {BATCH} for LeNet")
    add("--anova", action=argparse.BooleanOptionalAction,
        help="analysis of variance; default: where there are two repeats")
    add("--fid", action="store_true", help="the standard FID, too: slow without a GPU")
    add("--fid-weights", metavar="FILE", help="Inception's weights; default: downloaded")
    args = parser.parse(argv)
    colour = args.dataset in ("svhn", "glyphs-rgb")
    args.epochs = args.epochs[colour] if isinstance(args.epochs, tuple) else args.epochs
    args.layers = [name for name in LAYERS if name in (args.layers or LAYERS[colour:])]
    args.prior = [name for name in PRIORS if name in (args.prior or list(PRIORS)[2 * colour:])]
    args.encoder = [name for name in ENCODERS if name in args.encoder]
    args.fid |= args.fid_weights is not None
    if args.anova and args.repeats < 2:
        parser.error("argument --anova: 1 repeat, the analysis of variance needs at least 2: add "
                     "--repeats 2")
    args.anova = args.repeats > 1 if args.anova is None else args.anova
    return args


def join(device):
    """(rank, size) of this process under torchrun, else (0, 1): each process its own GPU, or its
    share of the cores."""
    if "RANK" not in os.environ:
        return 0, 1
    local, beside = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cuda":
        torch.cuda.set_device(local % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, os.cpu_count() // beside))
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    return dist.get_rank(), dist.get_world_size()


def references(args, x, train, test, repeat):
    """What samples of this repeat are held against, {name: images}, and naive_samples' errors."""
    g = common.generator(args.seed, f"real {repeat}", args.device)
    draws, *errors = naive_samples(x[train], args.samples, g)
    return {"test images (real)": x[test[:args.samples]],
            "training images (floor)": x[train[:args.samples]],
            "16 principal components, Gaussian (naive)": draws}, errors


def real_images(run, args, judge, x, train, test, repeat, fid):
    """Moments and variance of the test images, how the references are judged beside them, and the
    same for FID: work units. fid: (net, digits of its hash) or None."""
    def compute(_):
        images, (plane, mean) = references(args, x, train, test, repeat)
        real = images["test images (real)"]
        out = {"moments": moments(in_parts(judge.features, real)),
               "variance": real.var(0).sum().item(), "PCA RE": plane, "mean image RE": mean}
        return out | {"rows": [{"images": name, "repeat": repeat, **judged(judge, some, out)}
                               for name, some in images.items()]}

    def compute_fid(_):
        found = [fid_moments(fid[0], some) for some in references(args, x, train, test,
                                                                  repeat)[0].values()]
        return found[0], [frechet_distance(some, found[0]) for some in found]
    real = run.unit(f"real-{repeat}", compute)
    if fid:
        real["FID moments"], values = run.unit(f"real-{repeat}-fid-{fid[1]}", compute_fid)
        for row, value in zip(real["rows"], values):
            row["FID"] = value
    return real


def one_model(run, args, name, key, repeat, judge, real, fid, x, train_index, test_index):
    """Train and measure one VAE, work units: (row of scores, pictures, history)."""
    g = common.generator(args.seed, name, args.device)
    nets = build(key[2], *key[:2], x.shape[1], g)

    def compute(checkpoint):
        history = train(name, nets, x[train_index], args.objective, args.epochs, g, args.compile,
                        checkpoint)
        return {"history": history, "state": nets.state_dict()}

    def compute_fid(_):
        return frechet_distance(fid_moments(fid[0], samples_of(nets, name, args)[0]),
                                real["FID moments"])
    result = run.unit(name, compute)
    nets.load_state_dict(result["state"])
    row = dict(zip(("layers", "prior", "encoder"), key)) | {
        "repeat": repeat, "weights": document_count(nets),
        "real weights": sum(p.numel() for p in nets.parameters() if p.requires_grad)}
    nets.requires_grad_(False)
    scores, pictures = run.unit(f"{name}-scores", lambda _: measure(
        nets, name, judge, real, x[test_index], args))
    if fid:
        scores["FID"] = run.unit(f"{name}-fid-{fid[1]}", compute_fid)
    history = result["history"]
    RE, RT = (history[term][-1].item() for term in ("RE", "RT"))
    # RE is to be low and RT high: both gaps are positive where test images come out worse
    row |= scores | {"seconds": history["seconds"].median().item(),
                     "gap of RE": scores["RE"] - RE, "gap of RT": RT - scores["RT"]}
    return row | {"gap of negative ELBO": row["gap of RE"] + row["gap of RT"]}, pictures, history


def study(run, args, found, reals, accuracy, channels):
    """Tables, figures and closing table from what one_model returned, a triple each."""
    rows, pictures, histories = zip(*found)
    distance = "FID" if args.fid else "distance"
    document, cells = published(channels), summary(rows)
    analyses, ours = {}, [row for row in rows if row["encoder"] != "PRKS"]
    for measure, (interacting, others, _) in ANALYSES.items() if args.anova and ours else ():
        measure = distance if measure == "distance" else measure
        table = anova(ours, measure, interacting, others)
        analyses |= {measure: table} if table else {}
    for number, what, text in (("5.7", "reconstructions", "reconstructions (below) of test images"),
                               ("5.8", "samples", "samples from the prior"),
                               ("5.9", "interpolations", "interpolations between samples")):
        run.figure(plot_sheets(dict(zip(cells, (shown[what] for shown in pictures)))),
                   f"{number}_{what}", f"Table {number}: {text}")
    run.figure(plot_training(dict(zip(cells, histories)), cells), "training",
               "Training by epoch; dots: test images")
    floors = {name: sum(row[distance] for real in reals for row in real["rows"]
                        if name in row["images"]) / len(reals) for name in ("floor", "naive")}
    run.figure(plot_distances(cells, distance, floors), "distances",
               "Samples against real images (lower is better)")
    run.figure(plot_seconds(cells, document["seconds"]), "seconds", "Table 5.5: time per epoch")
    write_tables(run, args, cells, reals, analyses, document, channels)
    known, claims = {key: row for key, row in cells.items() if key in document["RE"]}, []
    if known:
        claims += figure_claims(known, document, args.objective, channels)
    if known.keys() == document["RE"].keys():
        claims += (grid_claims(known, distance, args.objective) if channels == 1 else
                   svhn_claims(known, distance))
    claims += pair_claims(cells, distance, document)
    results = {"models": rows, "cells": [dict(zip(("layers", "prior", "encoder"), key)) | row
                                         for key, row in cells.items()],
               "real": [row for real in reals for row in real["rows"]], "LeNet": accuracy,
               "anova": analyses, "PCA RE": reals[0]["PCA RE"],
               "mean image RE": reals[0]["mean image RE"]}
    metrics = [{"model": "-".join(KEY(row)), "repeat": row["repeat"], "epoch": epoch + 1,
                **{key: values[epoch].item() for key, values in history.items()}}
               for row, history in zip(rows, histories) for epoch in range(args.epochs)]
    return run.finish(results, claims, metrics)


def main(argv=None):
    """Run the document; returns what results.json holds (None in all but torchrun's first)."""
    args = arguments(argv)
    rank, size = join(args.device)
    if rank:  # the first process fetches data and opens the run, the others then find both
        dist.barrier()
        args.fresh = False
    fid = inception(args.fid_weights, args.device) if args.fid else None
    (x, y), (x_test, y_test) = load_data(args.dataset, args.train_images, args.test_images,
                                         args.data, args.device)
    left = len(x) - args.train_images * 7 // 5
    if left < (args.test_images or 100):
        common.die(f"argument --train-images: {args.train_images} and 0.4 of that for validation "
                   f"leave {max(0, left)} of {args.dataset}'s {len(x)} images to test")
    with contextlib.redirect_stdout(io.StringIO() if rank else sys.stdout), \
            common.Run(__file__, args, f"{args.dataset} 32x32, {args.objective}", ADDITIVE) as run:
        g = common.generator(args.seed, "LeNet", args.device)
        judge = LeNet(x.shape[1], g)

        def compute(_):
            train_judge(judge, x, y, args.judge_steps, g)
            return judge.state_dict()
        judge.load_state_dict(run.unit("lenet", compute))
        judge.requires_grad_(False)
        accuracy = (in_parts(judge, x_test).argmax(1) == y_test).float().mean().item()
        splits = [split(len(x), args.train_images, args.test_images, common.generator(
            args.seed, f"split {repeat}", args.device)) for repeat in range(args.repeats)]
        reals = [real_images(run, args, judge, x, *both, repeat, fid)
                 for repeat, both in enumerate(splits)]
        # the first releases the others, the second waits until they have opened the run, too
        for _ in range(0 if size == 1 else 1 if rank else 2):
            dist.barrier()
        jobs = list(itertools.product(range(args.repeats), args.layers, args.prior, args.encoder))
        # dealt like cards: in their order one process would get all the slow encoders
        deal = torch.randperm(len(jobs), generator=common.generator(args.seed, "deal")).tolist()
        found = {}
        for i in sorted(deal[rank::size]):
            repeat, *key = jobs[i]
            found[i] = one_model(run, args, "-".join([*key, str(repeat)]), key, repeat, judge,
                                 reals[repeat], fid, x, *splits[repeat])
        if size > 1:
            parts = [None] * size
            dist.gather_object((found, run.seconds), None if rank else parts)
            dist.destroy_process_group()
            if rank:
                return None
            for some, seconds in parts:
                found |= some
                run.seconds |= seconds
        return study(run, args, [found[i] for i in sorted(found)], reals, accuracy, x.shape[1])


if __name__ == "__main__":
    main()
