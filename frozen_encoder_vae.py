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

    python frozen_encoder_vae.py                        24 models: about 17 minutes on 2 CPU cores
    python frozen_encoder_vae.py --objective corrected --out out/corrected    the true bound
    python frozen_encoder_vae.py --repeats 2            a second repeat, and chapter 5's statistics
    python frozen_encoder_vae.py --dataset svhn --preset paper --out out/svhn    Table 5.10

`torchrun --nproc_per_node 4 frozen_encoder_vae.py --preset paper` shares the models among processes
that see one folder, each with its own GPU or its share of the cores. A run leaves figures,
tables.md (the document's tables, its figures in brackets), results.json, metrics.csv and the nets
(units/*.pt). It has not been timed on a GPU. What the document leaves open, and what we chose:
* Flows have 64 hidden units under fc, 128 under conv (so Table 5.6; the text says 64), Tanh at the
  end of s and t, and swap the halves by reversing z. E log q is used in closed form.
* RKS is one layer without activation (section 4.2). PRKS, which chapter 6 would like to see, is a
  trainable layer on 16,448 (fc: 4,112) random features: leaky ReLUs of a layer that is frozen.
* A gap is positive where test images (of one drawn z each) come out worse than the last epoch of
  training. Time per epoch is the median, without the frozen layers, which are computed once.
* distance, of samples (clipped to [0, 1]) to test images, is Fréchet's in the 84 features of a
  LeNet trained on all labelled images, not the FID: --fid computes that, with the TF-ported
  Inception. Samples are readable if LeNet is 90 % confident in two thirds of them, and the entropy
  of its classes is 90 % of log 10. An interpolation jumps if one of its 7 steps is over 3/7 of it.
* log p(x) is by importance sampling from a Gaussian per image that starts at q(z|x) and is refined
  by Adam, since a frozen q is far too narrow for one.
"""
import contextlib
import datetime
import hashlib
import io
import itertools
import math
import operator
import os
import pathlib
import re
import sys
import time

sys.path.append(str(pathlib.Path(__file__).with_name(".first")))  # until its second edition
import first_edition as common  # noqa: E402
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# B batch, C colour channels, D latent dimensions, K flows, M latent channels, N images
PRESETS = {  # epochs: of one colour, of three; paper: Table 4.1, section 4.5's five repeats
    "smoke": dict(dataset="glyphs", train_images=512, test_images=256, epochs=(2, 4), repeats=1,
                  judge_steps=30, samples=200, importance_images=16, importance_steps=10,
                  importance_samples=10),
    "quick": dict(dataset="mnist", train_images=10_000, test_images=10_000, epochs=(50, 100),
                  repeats=1, judge_steps=1500, samples=10_000, importance_images=200,
                  importance_steps=100, importance_samples=200),
    "paper": dict(dataset="mnist", train_images=25_000, test_images=None, epochs=(250, 500),
                  repeats=5, judge_steps=1500, samples=10_000, importance_images=1000,
                  importance_steps=100, importance_samples=1000)}
ENCODERS, LAYERS = ("L", "PNL", "NL", "RKS", "PRKS"), ("fc", "conv")
PRIORS = {"normal": 0, "flow2": 2, "flow6": 6}  # flows
TITLES = {"fc": "FC", "conv": "Conv", "normal": "Normal", "flow2": "Flow (2)", "flow6": "Flow (6)"}
SIDE, BATCH, RATE, CONSTANT_VARIANCE, WIDE = 32, 256, 1e-3, 1e-6, 1028  # Table 4.1; chapter 6
ADDITIVE = ("encoder", "layers", "prior", "repeats", "anova", "fid", "fid_weights")
FACTORS = ("layers", "prior", "encoder")
KEY = operator.itemgetter(*FACTORS)
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
DOCUMENT = {  # mean/std of L, PNL, NL, RKS: fc normal, flow2, flow6, conv normal, ..., SVHN (5.10)
    "negative ELBO": """9.84/0.05 21.77/0.39 36.67/0.47 33.52/0.91 -6.11/0.05 5.78/0.32 20.78/0.87
        16.48/0.23 -36.90/0.17 -26.06/0.47 -7.70/1.22 -2.53/0.63 13.08/0.29 20.04/2.35 35.37/2.04
        31.52/1.81 -2.16/0.53 2.65/0.88 21.01/4.77 14.26/0.61 -31.91/0.32 -25.43/1.83 -10.74/4.92
        -13.31/1.24 -79.23/0.11 -74.09/2.66 -62.60/3.36 -67.90/1.19""",  # Table 5.1
    "RT": """-1.83/0.02 -1.98/0.01 -6.46/0.01 -6.48/0.01 13.76/0.01 13.64/0.01 9.53/0.01 9.32/0.02
        44.82/0.02 44.66/0.01 38.07/0.38 28.80/0.17 -2.66/0.04 -2.88/0.06 -6.43/0.02 -6.42/0.00
        12.89/0.03 12.86/0.05 9.58/0.01 9.54/0.01 42.97/0.01 42.90/0.03 41.08/0.34 38.74/0.21
        90.81/0.01 90.89/0.04 90.30/1.28 88.00/0.23""",  # Table 5.2
    "RE": """8.01/0.05 19.79/0.39 30.22/0.48 27.04/0.91 7.66/0.05 19.43/0.31 30.31/0.87 25.80/0.23
        7.92/0.18 18.60/0.46 30.38/1.21 26.27/0.70 10.42/0.26 17.15/2.33 28.94/2.05 25.09/1.81
        10.74/0.55 15.52/0.88 30.60/4.78 23.80/0.61 11.06/0.32 17.48/1.84 30.34/5.20 25.43/1.40
        11.58/0.11 16.80/2.63 27.69/2.36 20.10/1.37""",  # Table 5.3
    "FID": """92.39/2.87 153.11/1.78 212.92/4.45 175.85/2.94 70.39/1.56 138.15/2.31 165.32/5.79
        142.73/1.77 54.68/0.64 112.23/1.67 107.11/8.98 120.72/10.82 90.05/6.25 128.32/7.52
        242.73/24.38 209.22/6.84 45.71/9.45 42.67/4.74 220.86/30.27 138.68/15.39 40.96/5.20
        39.29/7.29 78.17/26.78 57.29/11.54 59.15/1.77 57.68/1.52 78.08/5.46 65.40/4.00""",
    "seconds": """0.71/0.01 0.63/0.00 0.59/0.00 0.56/0.00 1.08/0.02 0.99/0.01 0.95/0.01 0.92/0.01
        2.02/0.01 1.96/0.01 1.87/0.02 1.86/0.01 1.87/0.01 1.45/0.00 1.40/0.00 1.20/0.01 2.04/0.00
        1.62/0.01 1.56/0.00 1.39/0.01 2.64/0.00 2.20/0.00 2.11/0.01 2.06/0.01 2.65/0.01 2.21/0.01
        2.13/0.01 2.08/0.00""",  # Table 5.5
    "weights": """10256 7952 7824 7824 11888 9584 9456 9456 15152 12848 12720 12720 521 434 396 396
        3689 3602 3564 3564 10025 9938 9900 9900 10339 10250 10196 10196"""}  # Table 5.6
MAIN, COVARIATE = "encoder + layers + prior", "encoder + layers + encoder x layers + prior"
FULL = MAIN + " + encoder x layers + encoder x prior + layers x prior + encoder x layers x prior"
ANALYSES = {  # measure: linear model, the document's F (section 5.1)
    "negative ELBO": (COVARIATE, {"prior": "F(2, 110) = 3459.90", "encoder": "F(3, 110) = 700.46",
                                  "encoder x layers": "F(3, 110) = 17.79"}),
    "RT": (COVARIATE, {"prior": "F(2, 110) = 6300.92", "encoder": "F(3, 110) = 83.64",
                       "encoder x layers": "F(3, 110) = 10.95"}),
    "RE": (FULL, {"encoder x layers": "F(3, 96) = 13.61", "encoder": "F(3, 96) = 809.61",
                  "prior": "n.s."}),
    "gap of negative ELBO": (MAIN, {"layers": "F(1, 113) = 395.31",
                                    "encoder": "F(3, 113) = 53.73"}),
    "gap of RE": (MAIN, {"layers": "p < .000", "encoder": "p < .000"}),
    "gap of RT": (MAIN, {"encoder": "F(3, 113) = 13.97", "prior": "F(2, 113) = 26.14"}),
    "FID": (FULL, {"encoder x layers x prior": "F(6, 96) = 17.37", "encoder": "F > 69.60",
                   "layers": "F > 69.60", "prior": "F > 69.60"}),
    "seconds": (MAIN, {"prior": "F(2, 113) = 538.17", "encoder": "F(3, 113) = 39.80",
                       "layers": "F(1, 113) = 528.99"})}
MEASURES = {  # their tables in the document
    "negative ELBO": "5.1", "RT": "5.2", "RE": "5.3", "FID": "5.4", "seconds": "5.5",
    "distance": "5.4, the document's FID in brackets",
    "weights": "5.6, counted as the document does",
    **dict.fromkeys(["real weights", "true ELBO", "log p", "confident", "balance", "jumps",
                     "gap of negative ELBO", "gap of RE", "gap of RT"])}  # in no table of it
CLAIMS = [  # order ("a, b < 2 c": a and b are below twice c), of what, document, words
    ("L < PNL < RKS < NL", "RE", "yes", ""), ("L < PNL < RKS < NL", "negative ELBO", "yes", ""),
    ("conv flow6 PNL < 1.2 conv flow6 L", "distance", "yes",  # chapter 6
     "Conv, Flow (6): {} of PNL that of L (at most a fifth higher)"),
    ("conv flow6 PNL < 0.85 conv flow6 L", "seconds", "16.5 % less",  # chapter 6
     "Conv, Flow (6): PNL saves 15 % of L's {} per epoch"),
    # the last three are also of Table 5.10, where PNL's and RKS's RE do not differ (section 5.2)
    ("normal, flow2, flow6 < 1.05 normal, 1.05 flow2, 1.05 flow6", "RE", "yes",  # section 5.1
     "the prior does not change RE (means within 5 %)"),
    ("conv < fc", "gap of negative ELBO", "1.26; 12.03", "fc overfits more than conv: {}"),
    ("L, PNL < RKS, NL", "gap of negative ELBO", "1.66; 5.23; 9.64; 10.04",  # section 5.1
     "random encoders overfit more: {}"),
    ("1.5 L, 1.5 PNL, 1.5 RKS < NL", "std of RE", "yes",  # chapter 6
     "NL varies most between repeats, by half: {}"),
    ("normal < flow2 < flow6", "log p", "not comparable", "{}(x) in nats rises with flows"),
    ("PNL < 0.86 L", "seconds", "0.85 L", "PNL: {} per epoch at most 0.86 of L's"),  # by Table 5.5
    ("NL < 0.82 L", "seconds", "0.82 L", "NL: {} per epoch at most 0.82 of L's"),
    ("RKS < 0.78 L", "seconds", "0.77 L", "RKS: {} per epoch at most 0.78 of L's")]


# --- data ----------------------------------------------------------------------------------------

def load_data(dataset, train_images, test_images, folder, device):
    """All images, x (N, C, 32, 32) in [0, 1], and labels y (N,), to be split."""
    if dataset.startswith("glyphs"):
        channels, n = (3, 73_257) if dataset == "glyphs-rgb" else (1, 60_000)  # as in section 4.4
        n = train_images * 7 // 5 + test_images if test_images else n  # 7 / 5: with validation
        x, y = common.glyphs(n, 0, channels)
    else:
        x, y = common.images(dataset, True, folder)  # Table 4.1 divides the official training part
    mode = "replicate" if x.shape[1] == 3 else "constant"  # a coloured ground goes on to the edge
    return F.pad(x, [(SIDE - x.shape[3]) // 2] * 4, mode).to(device), y.to(device)  # 28 or 32 -> 32


def split(n, train_images, test_images, generator):
    """Indices (train, test) of a new division of n images; those for validation stay unused."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    return order[:train_images], order[train_images * 7 // 5:][:test_images]  # Table 4.1


# --- model ---------------------------------------------------------------------------------------

def active(*layers):
    """The layers in a row, each with a leaky ReLU."""
    return [part for layer in layers for part in (layer, nn.LeakyReLU(inplace=True))]


class Flow(nn.Module):
    """RealNVP of K couplings (0: the normal prior): codes z (B, D) to u = f(z) (B, D) ~ N(0, 1)."""

    def __init__(self, D, hidden, K):
        super().__init__()
        self.D = D

        def net():
            return nn.Sequential(*active(nn.Linear(D // 2, hidden), nn.Linear(hidden, hidden)),
                                 nn.Linear(hidden, D // 2), nn.Tanh())  # section 4.2: Tanh on both
        self.s, self.t = (nn.ModuleList(net() for _ in range(K)) for _ in range(2))

    def forward(self, z):
        """u (B, D) and log |det du/dz| (B,)."""
        logdet = z.new_zeros(len(z))
        for s, t in zip(self.s, self.t):
            a, b = z.chunk(2, 1)  # (B, D/2) each
            scale = s(a)  # in (-1, 1): a flow adds less than D/2 to log |det|
            z = torch.cat([a, scale.exp() * b + t(a)], 1).flip(1)  # Eqs. 2.2.1 and 2.2.2
            logdet = logdet + scale.sum(1)  # Eq. A.2.3; the reversal's |det| is 1
        return z, logdet

    def inverse(self, u):
        for s, t in zip(reversed(self.s), reversed(self.t)):  # the last flow is undone first
            a, b = u.flip(1).chunk(2, 1)  # (B, D/2) each
            u = torch.cat([a, (b - t(a)) * (-s(a)).exp()], 1)  # Eqs. 2.2.3 and 2.2.4
        return u


class UpConv(nn.Conv2d):
    """Upsample by 2, then convolve by 3x3, without the large image in between: each of the four
    pixels that come of one sees 2x2 of the small image, so this is a convolution there, of 4 times
    the channels. The same numbers, a third faster on a CPU."""

    def __init__(self, a, b):
        super().__init__(a, b, 3, padding=1)
        rows = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 1, 0]],  # pixel 2 i sees i - 1, i, i
                             [[0, 1, 0], [0, 1, 0], [0, 0, 1]]])  # pixel 2 i + 1 sees i, i, i + 1
        self.register_buffer("rows", rows, persistent=False)  # (pixel, tap in large, in small)

    def forward(self, x):
        weight = torch.einsum("oikl,akp,blq->oabipq", self.weight, self.rows, self.rows)
        weight = weight.flatten(0, 2).contiguous(memory_format=torch.channels_last)
        small = F.conv2d(x, weight, self.bias.repeat_interleave(4), padding=1)  # (B, 4 out, H, W)
        return F.pixel_shuffle(small, 2)  # (B, out, 2 H, 2 W), its channels ordered o, a, b


def encoder_layers(encoder, layers, channels, M):
    """Appendix B: (all layers but the last, the last); M latent features, at each of 2x2 places
    under conv. NL and RKS give means alone."""
    N, pixels = 1 if encoder in ("NL", "RKS") else 2, SIDE * SIDE * channels  # N: Table B.1's note
    if layers == "fc":
        sizes = {"RKS": [pixels], "PRKS": [pixels, 4 * WIDE]}.get(encoder, [pixels, 256, 128, 64])
        body = active(*map(nn.Linear, sizes, sizes[1:]))  # RKS: no body, as sizes has one entry
        return [nn.Flatten(), *body], nn.Linear(sizes[-1], N * M)  # Table B.1
    if encoder == "RKS":
        return [], nn.Conv2d(channels, M, 16, stride=16)  # 32x32 -> 2x2; the kernel is our choice
    if encoder == "PRKS":  # 4x4 places of 1028 features, and a trainable layer (chapter 6)
        return active(nn.Conv2d(channels, WIDE, 8, stride=8)), nn.Conv2d(WIDE, N * M, 3)
    body = [part for a, b in ((channels, 4), (4, 8), (8, 16))  # 32x32 -> 16x16 -> 8x8 -> 4x4
            for part in (*active(nn.Conv2d(a, b, 3, padding=1)), nn.MaxPool2d(2))]
    return body, nn.Conv2d(16, N * M, 3)  # Table B.2: without padding 4x4 -> 2x2


def build(encoder, layers, prior, channels, generator):
    """One VAE as a ModuleDict: frozen and trainable part of the encoder, decoder, prior."""
    D, conv = 16 if channels == 1 else 32, layers == "conv"  # section 4.2
    M = D // 4 if conv else D  # conv: D = M x 2 x 2
    body, last = encoder_layers(encoder, layers, channels, M)
    if conv:  # Table B.2: 2x2 -> 4x4 -> 8x8 -> 16x16 -> 32x32
        decoder = [nn.Unflatten(1, (M, 2, 2)), *active(nn.Conv2d(M, 64, 3, padding=1)),
                   *active(UpConv(64, 32), UpConv(32, 16), UpConv(16, 8)), UpConv(8, channels)]
    else:  # Table B.1
        sizes = [M, 128, 256, 512, 1024]
        decoder = [*active(*map(nn.Linear, sizes, sizes[1:])),
                   nn.Linear(1024, SIDE * SIDE * channels), nn.Unflatten(1, (channels, SIDE, SIDE))]
    k = {"L": 0, "PNL": len(body), "PRKS": len(body)}.get(encoder, len(body) + 1)  # frozen parts
    nets = nn.ModuleDict({
        "frozen": nn.Sequential(*[*body, last][:k]), "encoder": nn.Sequential(*[*body, last][k:]),
        "decoder": nn.Sequential(*decoder), "prior": Flow(D, 128 if conv else 64, PRIORS[prior])})
    flows = set(nets.to(generator.device)["prior"].modules())
    for part in nets.modules():  # PyTorch drew weights from its global generator: now from ours
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            weight, fan_in = part.weight, part.weight[0].numel()  # conv: in channels x kernel area
            bound = default = fan_in ** -0.5  # PyTorch's own
            if part not in flows:  # flows keep PyTorch's: Xavier is for encoder and decoder
                bound = math.sqrt(6 / (fan_in + len(weight) * weight[0, 0].numel()))  # section 4.6
            if encoder == "PRKS" and part is body[-2]:  # its many outputs would make these tiny
                bound = math.sqrt(6 / fan_in)  # He uniform
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            nn.init.uniform_(part.bias, -default, default, generator=generator)  # not stated: ours
    nets["frozen"].requires_grad_(False)  # so Adam and Table 5.6 leave them out
    return nets.to(memory_format=torch.channels_last)


def document_count(nets):
    """What Table 5.6 prints: the sum, over trainable tensors, of the sum of their shape."""
    return sum(sum(value.shape) for value in nets.parameters() if value.requires_grad)


def lenet(channels, generator):
    """LeNet-5 with ReLUs: x (B, C, 32, 32) -> (B, 10) logits; its part `features` -> (B, 84)."""
    net = nn.Sequential()
    net.features = nn.Sequential(  # 32x32 -> 28x28 -> 14x14 -> 10x10 -> 5x5, times 16 = 400
        nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84),
        nn.ReLU())
    net.head = nn.Linear(84, 10)
    for value in net.to(generator.device).parameters():
        if value.dim() > 1:  # weights: He normal, for the ReLUs
            nn.init.normal_(value, std=math.sqrt(2 / value[0].numel()), generator=generator)
        else:
            nn.init.zeros_(value)
    return net


# --- objective -----------------------------------------------------------------------------------

def encode(nets, h):
    """mu, log sigma^2 (B, D) from what the frozen layers make of the images."""
    if not len(nets["encoder"]):  # NL, RKS: all of it is frozen, so h is the mean
        mu = h.flatten(1)  # (B, D), under conv from (B, M, 2, 2)
        return mu, torch.full_like(mu, math.log(CONSTANT_VARIANCE))  # Table 4.1
    mu, logvar = nets["encoder"](h).chunk(2, 1)  # (B, M, 2, 2) each under conv, else (B, D)
    return mu.flatten(1), logvar.flatten(1)


def loss_terms(nets, h, x, noise, objective):
    """RE, squared error summed over an image, and RT in nats (B,); the loss is the mean of RE - RT.
    h: frozen features of the images x (B, C, 32, 32); noise (B, D). RT is log N(u; 0, 1) - E log
    q(z|x), its mean over D (as-published) or its sum (corrected), plus log |det du/dz|.
    """
    mu, logvar = encode(nets, h)
    z = mu + (logvar / 2).exp() * noise  # (B, D), reparameterised (section 2.1)
    u, logdet = nets["prior"](z)  # (B, D), (B,)
    RE = ((nets["decoder"](z) - x) ** 2).flatten(1).sum(1)  # (B,), a sum: section 4.3 says mean
    RT = (1 + logvar - u ** 2) / 2  # log p - E log q per dimension: both log 2 pi cancel
    return RE, (RT.mean(1) if objective == "as-published" else RT.sum(1)) + logdet  # Eq. 4.3.2


# --- train ---------------------------------------------------------------------------------------

@torch.no_grad()
def in_parts(function, *tensors, size=1000):
    """function of `size` rows at a time."""
    return torch.cat([function(*part) for part in zip(*(x.split(size) for x in tensors))])


def train(name, nets, x, objective, epochs, generator, compile=False, checkpoint=None):
    """Adam on batches of x (N, C, 32, 32); returns RE, RT (means) and seconds of each epoch.
    FloatingPointError where a loss is not finite."""
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
        history = history.cpu()  # a checkpoint is loaded onto the device
    bar = tqdm(range(first, epochs), name, epochs, initial=first, disable=None,
               position=int(os.environ.get("LOCAL_RANK", 0)))
    for epoch in bar:
        start, sums = time.perf_counter(), []
        for index in common.batches(len(x), BATCH, generator):
            noise = torch.randn(len(index), nets["prior"].D, generator=generator, device=x.device)
            images = x[index]
            RE, RT = terms(nets, images if h is x else h[index], images, noise, objective)
            optimiser.zero_grad()
            (RE - RT).mean().backward()  # negative ELBO (section 4.3), mean over the batch
            optimiser.step()
            sums.append(torch.stack([RE.detach().sum(), RT.detach().sum()]))
        sums = torch.stack(sums)  # (steps, 2); the epoch's only synchronisation is below
        if not torch.isfinite(sums).all():
            step, term = (~torch.isfinite(sums)).nonzero()[0].tolist()  # the first in time
            raise FloatingPointError(f"{name}: the term {('RE', 'RT')[term]} is not finite at step "
                                     f"{epoch * len(sums) + step}")
        RE, RT = (sums.sum(0) / len(x)).tolist()  # over the epoch, in which the weights moved
        history[epoch] = torch.tensor([RE, RT, time.perf_counter() - start])  # .tolist() has waited
        bar.set_postfix_str(f"RE {RE:.2f}, RT {RT:.2f}", refresh=False)
        if checkpoint and checkpoint.due():
            checkpoint.save((epoch + 1, history), *parts)
    return dict(zip(("RE", "RT", "seconds"), history.T))


def train_judge(judge, x, y, steps, generator):
    """LeNet's weights after cross-entropy in nats, mean over a batch; x (N, C, 32, 32), y (N,).
    FloatingPointError where the loss ends up not finite."""
    optimiser = torch.optim.Adam(judge.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in tqdm(range(steps), "LeNet", disable=None):
        index = torch.randint(len(x), (BATCH,), generator=generator, device=x.device)
        loss = F.cross_entropy(judge(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    if not torch.isfinite(loss):  # one bad step spoils the weights, and so the last loss
        raise FloatingPointError("LeNet: the cross-entropy is not finite")
    return judge.state_dict()


# --- evaluate ------------------------------------------------------------------------------------

def constant(x):
    """-log p(x|z) - RE in nats of p(x|z) = N(x_hat, 1/2), images x (N, C, H, W)."""
    return x[0].numel() / 2 * math.log(math.pi)  # log sqrt(2 pi sigma^2) per value


def evaluate(nets, x, objective, generator):
    """RE, RT and the loss RE - RT, means over the images x (N, C, 32, 32), one drawn z each."""
    noise = torch.randn(len(x), nets["prior"].D, generator=generator, device=x.device)
    RE, RT = in_parts(lambda x, noise: torch.stack(loss_terms(  # (N, 2), averaged in float64
        nets, nets["frozen"](x), x, noise, objective), 1), x, noise).cpu().double().mean(0).tolist()
    return {"negative ELBO": RE - RT, "RE": RE, "RT": RT}


def log_likelihood(nets, x, samples, generator, steps=100):
    """log p(x) in nats (N,) by importance sampling, p(x|z) = N(x_hat, 1/2); on average too low. One
    Gaussian proposal per image begins as q(z|x), though not with variances below 0.001, and is
    refined by `steps` of Adam on the same bound. Freezes the nets."""
    nets.requires_grad_(False)
    mu, logvar = encode(nets, nets["frozen"](x))  # (N, D) each
    mu, logvar = mu.clone().requires_grad_(), logvar.clamp(min=math.log(1e-3)).requires_grad_()

    def log_weight():
        """log p(x, z) - log r(z) (N,) of a z drawn from the proposals r."""
        noise = torch.randn(mu.shape, generator=generator, device=x.device)
        z = mu + (logvar / 2).exp() * noise
        u, logdet = nets["prior"](z)
        RE = ((nets["decoder"](z) - x) ** 2).flatten(1).sum(1)
        # log N(u) - log r(z) is (noise^2 + logvar - u^2) / 2 per dimension: both log 2 pi cancel
        return logdet - RE - constant(x) + ((noise ** 2 + logvar - u ** 2) / 2).sum(1)
    optimiser = torch.optim.Adam([{"params": mu, "lr": 0.02}, {"params": logvar, "lr": 0.1}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for _ in tqdm(range(steps), "proposals for log p(x)", disable=None, leave=False):
        optimiser.zero_grad()
        (-log_weight().sum()).backward()  # a sum: each image's proposal has its own gradient
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        weights = torch.stack([log_weight() for _ in range(samples)])  # (samples, N)
    return weights.logsumexp(0) - math.log(samples)  # log of a mean: by Jensen too low on average


@torch.no_grad()
def sample(nets, n, generator):
    """n images from the prior, clipped to [0, 1], and their codes: (n, C, 32, 32), (n, D)."""
    u = torch.randn(n, nets["prior"].D, generator=generator, device=generator.device)
    z = in_parts(nets["prior"].inverse, u)  # (n, D)
    return in_parts(nets["decoder"], z).clamp(0, 1), z


@torch.no_grad()
def interpolate(nets, z):
    """Straight lines in latent space between pairs of codes: z (2, n, D) -> (n, 8, C, 32, 32)."""
    t = torch.linspace(0, 1, 8, device=z.device)[:, None]  # (8, 1), both ends included (Table 5.9)
    codes = (1 - t) * z[0][:, None] + t * z[1][:, None]  # (n, 8, D)
    return in_parts(nets["decoder"], codes.flatten(0, 1)).clamp(0, 1).unflatten(0, (-1, 8))


def jump_share(paths):
    """The share of paths (n, 8, C, 32, 32) in which one of the 7 steps is over 3/7 of all."""
    steps = (paths[:, 1:] - paths[:, :-1]).flatten(2).norm(dim=2)  # (n, 7)
    return (steps.amax(1) > 3 / 7 * steps.sum(1)).float().mean().item()  # even steps: 1/7 each


def naive_samples(x, n, generator, k=16):
    """n draws of the Gaussian in the plane of k principal components of x (N, C, H, W), clipped."""
    flat = x.flatten(1)  # (N, C H W)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T.cpu().double()))  # ascending
    noise = torch.randn(n, k, generator=generator, device=x.device)  # (n, k)
    draws = flat.mean(0) + noise * values[-k:].sqrt().to(x) @ vectors[:, -k:].T.to(x)  # (n, C H W)
    return draws.view(n, *x.shape[1:]).clamp(0, 1)


def moments(features):
    """Mean (d,) and covariance (d, d) of features (n, d), in float64."""
    features = features.cpu().double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(a, b):
    """Squared Fréchet distance of two Gaussians (mean (d,), covariance (d, d)), in float64."""
    (mean_a, A), (mean_b, B) = a, b
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2); eigenvalues round below 0
    # tr (A B)^(1/2) by way of a symmetric matrix with the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return (((mean_a - mean_b) ** 2).sum() + A.trace() + B.trace() - 2 * cross).item()


@torch.no_grad()
def judged(judge, x, real):
    """What LeNet sees in x (n, C, 32, 32), beside the moments of its features of real images."""
    features = in_parts(judge.features, x)  # (n, 84)
    p = judge.head(features).softmax(1)  # (n, 10)
    share = p.argmax(1).cpu().bincount(minlength=10).double() / len(x)  # (10,), 0 where absent
    return {"distance": frechet_distance(moments(features), real),
            "confident": (p.amax(1) >= 0.9).float().mean().item(),
            "balance": torch.special.entr(share).sum().item() / math.log(10)}  # 1: ten equal shares


def inception(path, device):
    """The net of the standard FID, (B, 3, 299, 299) in [-1, 1] -> (B, 2048) features, and the first
    8 digits of its file's hash. path: its weights, or None: those in torch's hub, downloaded."""
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
        common.die(f"argument --fid: cannot load {path or home} ({error!r:.120}); name a copy of "
                   f"{INCEPTION} with --fid-weights, or leave --fid away")
    for block in net.children():
        if hasattr(block, "branch_pool"):  # TensorFlow's averages leave the padding out
            block.branch_pool.register_forward_pre_hook(
                lambda _, x: x[0] / F.avg_pool2d(torch.ones_like(x[0]), 3, 1, 1))
    # the last one takes maxima in their place: its second hook runs after and replaces the above
    inputs, last = [], net.Mixed_7c
    last.register_forward_pre_hook(lambda _, x: inputs.append(*x))
    last.branch_pool.register_forward_pre_hook(lambda *_: F.max_pool2d(inputs.pop(), 3, 1, 1))
    net.fc = nn.Identity()  # leaves the 2048 pooled features
    return net.requires_grad_(False).eval().to(device), hashlib.sha256(data).hexdigest()[:8]


def fid_moments(net, x):
    """moments of the Inception features of images x (n, C, H, W) in [0, 1], read as 8-bit files."""
    def features(x):
        x = ((x * 255).round() / 255).expand(-1, 3, -1, -1)  # (B, 3, H, W), 256 levels
        return net(2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1)
    return moments(in_parts(features, x, size=100))


def anova(rows, value, terms):
    """Analysis of variance of a balanced design: {term: {"F", "df", "error df", "p"}}.
    rows: dicts; terms: "a", "b", "a x b", ..., left out where a factor has one level."""
    from scipy.stats import f
    y, table = torch.tensor([row[value] for row in rows], dtype=torch.double), {}
    error, df_error = y - y.mean(), len(y) - 1  # the grand mean is out, and one df with it
    # balanced: an effect is the mean, over a cell, of what is left; interactions come after factors
    for term in terms:
        cells = [[row[factor] for factor in term.split(" x ")] for row in rows]
        df = math.prod(len(set(levels)) - 1 for levels in zip(*cells))
        effect = torch.stack([error[torch.tensor([other == cell for other in cells])].mean()
                              for cell in cells])  # (rows,), the mean of each row's cell
        error, df_error = error - effect, df_error - df
        if df:  # 0: a factor of one level
            table[term] = {"F": (effect ** 2).sum().item() / df, "df": df}  # a mean square so far
    for row in table.values():
        row["F"] /= (error ** 2).sum().item() / df_error  # over the unexplained mean square
        row |= {"error df": df_error, "p": float(f.sf(row["F"], row["df"], df_error))}
    return table


# --- plot ----------------------------------------------------------------------------------------

def grid_of(cells):
    """The rows {(layers, prior): title} and columns [encoder, ...] of the document's tables."""
    return ({key[:2]: f"{TITLES[key[0]]}, {TITLES[key[1]]}" for key in cells},
            list(dict.fromkeys(key[2] for key in cells)))


def plot_sheets(pictures):
    """A sheet per model in the document's layout: {(layers, prior, encoder): (r, c, C, H, W)}."""
    groups, encoders = grid_of(pictures)
    r, c, *_ = next(iter(pictures.values())).shape
    fig, axes = common.panels(len(groups), len(encoders), 2.6, 2.6 * r / c + 0.1)
    for ax, (key, images) in zip(axes, pictures.items()):
        common.image_sheet(ax, images)
        ax.set_title(key[2] if ax in axes[:len(encoders)] else "", fontsize="medium")
        ax.set_ylabel(groups[key[:2]].replace(", ", "\n") if key[2] == encoders[0] else "")
    return fig


def plot_training(histories, cells):
    """RE and RT by epoch, first repeat, and the test images' mean as a dot: {cell: history}."""
    (groups, encoders), charts = grid_of(cells), {}
    for term, scale, unit in (("RE", "log", "squared error per image"), ("RT", "linear", "nats")):
        for group, title in groups.items():
            lines = []
            for name, colour in zip(encoders, common.COLOURS):
                values, test = (some[(*group, name)][term] for some in (histories, cells))
                lines += [(name, None, values.numpy(), dict(color=colour)),
                          (None, [len(values)], [test["mean"]], dict(color=colour, marker="o"))]
            charts[f"{term}: {title}"] = lines, dict(xlabel="epoch", ylabel=unit, yscale=scale)
    return common.plot_lines(charts, len(groups), 2.8, 2.8)


def plot_means(cells, labels):
    """Measures {name: label} of every model: seconds by prior, others by trainable weights."""
    colours, charts = dict(zip(grid_of(cells)[1], common.COLOURS)), {}
    for measure, label in labels.items():
        lines, timed = [], measure == "seconds"
        for layers, encoder in dict.fromkeys((key[0], key[2]) for key in cells):
            some = [key for key in cells if (key[0], key[2]) == (layers, encoder)]
            x = [TITLES[key[1]] if timed else cells[key]["real weights"]["mean"] for key in some]
            y = [cells[key][measure]["mean"] for key in some]
            style = dict(color=colours[encoder], marker="s" if layers == "fc" else "o")
            lines.append((f"{TITLES[layers]}, {encoder}", x, y, style))
        charts[label] = lines, dict(xlabel="prior") if timed else dict(
            xscale="log", yscale="log", xlabel="trainable weights")
    return common.plot_lines(charts, width=5.5, height=4)


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser = common.Parser(__doc__, PRESETS)
    add = parser.add
    add("--dataset", choices=["mnist", "svhn", "glyphs", "glyphs-rgb"],
        help="mnist, svhn: real images; glyphs, glyphs-rgb: digits drawn offline")
    add("--encoder", nargs="+", choices=ENCODERS, default=list(ENCODERS[:4]), help="encoders")
    add("--layers", nargs="+", choices=LAYERS, help="default: both, of three colours conv")
    add("--prior", nargs="+", choices=list(PRIORS), help="default: all, of three colours flow6")
    add("--objective", choices=["as-published", "corrected"], default="as-published",
        help="the document's weighting of RT, or the evidence lower bound")
    for flag, low, high, text in (
            ("epochs", 1, 10**5,
             "passes over the training images; two defaults: of one colour, of three"),
            ("repeats", 1, 100, "repeats, each with a split of its own"),
            ("train-images", 256, 10**6, "training images per split"),
            ("test-images", 100, 10**6, "test images per split; default: all left"),
            ("samples", 100, 10**6, "images per model for the distances"),
            ("importance-images", 1, 10**6, "test images to find log p(x) of"),
            ("importance-steps", 1, 10**6, "steps of Adam on their proposals"),
            ("importance-samples", 1, 10**6, "samples of each proposal"),
            ("judge-steps", 1, 10**6, f"batches of {BATCH} for LeNet")):
        add(f"--{flag}", type=common.number(int, low, high), help=text)
    add("--anova", action="store_true",
        help="insist on chapter 5's statistics, which several repeats have")
    add("--fid", action="store_true", help="the standard FID, too: slow without a GPU")
    add("--fid-weights", metavar="FILE", help="Inception's weights; default: downloaded")
    args = parser.parse(argv)
    colour = args.dataset in ("svhn", "glyphs-rgb")  # Table 5.10 has conv, flow6 alone
    args.epochs = args.epochs[colour] if isinstance(args.epochs, tuple) else args.epochs
    args.layers = [name for name in LAYERS if name in (args.layers or LAYERS[colour:])]
    args.prior = [name for name in PRIORS if name in (args.prior or list(PRIORS)[2 * colour:])]
    args.encoder = [name for name in ENCODERS if name in args.encoder]
    args.fid |= args.fid_weights is not None
    if args.anova and args.repeats < 2:
        parser.error("argument --anova: of 1 repeat, it needs at least 2: add --repeats 2")
    args.anova = args.repeats > 1
    return args


def join(device):
    """(rank, size) of this process under torchrun, else (0, 1): each its GPU or share of cores."""
    if "RANK" not in os.environ:
        return 0, 1
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    else:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))  # only barriers
    return dist.get_rank(), dist.get_world_size()


def real_images(run, args, judge, fid, x, train, test, repeat):
    """Work units: moments of the test images' features, and how these, training images and naive
    samples are judged beside them. fid: (net, digits of its hash) or None."""
    def references():
        g = common.generator(args.seed, f"real {repeat}", args.device)
        naive = naive_samples(x[train], args.samples, g)
        return {"test images (real)": x[test[:args.samples]],
                "training images (floor)": x[train[:args.samples]],
                "16 principal components, Gaussian (naive)": naive}

    def compute(_):
        images = references()
        real = moments(in_parts(judge.features, images["test images (real)"]))
        rows = [{"images": name, "repeat": repeat, **judged(judge, some, real)}
                for name, some in images.items()]
        return {"moments": real, "rows": rows}

    def compute_fid(_):
        found = [fid_moments(fid[0], some) for some in references().values()]
        return found[0], [frechet_distance(some, found[0]) for some in found]
    real = run.unit(f"real-{repeat}", compute)
    if fid:
        real["FID moments"], values = run.unit(f"real-{repeat}-fid-{fid[1]}", compute_fid)
        for row, value in zip(real["rows"], values):
            row["FID"] = value
    return real


def one_model(run, args, judge, fid, x, train_index, test_index, real, repeat, *key):
    """Train and measure one VAE, work units: (row of scores, pictures, history)."""
    name = "-".join([*key, str(repeat)])

    def generator(part=""):
        return common.generator(args.seed, name + part, args.device)
    g = generator()
    nets = build(key[2], *key[:2], x.shape[1], g)

    def compute(checkpoint):
        history = train(name, nets, x[train_index], args.objective, args.epochs, g, args.compile,
                        checkpoint)
        return {"history": history, "state": nets.state_dict()}

    def compute_scores(_):
        test, g = x[test_index], generator(" scores")
        scores, some = evaluate(nets, test, args.objective, g), test[:args.importance_images]
        bound = -evaluate(nets, some, "corrected", g)["negative ELBO"] - constant(x)  # of log p(x)
        log_p = log_likelihood(nets, some, args.importance_samples, g, args.importance_steps)
        images, z = sample(nets, args.samples, generator(" samples"))
        paths = interpolate(nets, z[:len(z) // 2 * 2][:400].unflatten(0, (2, -1)))
        scores |= {"true ELBO": bound, "log p": log_p.mean().item(),
                   **judged(judge, images, real["moments"]), "jumps": jump_share(paths)}
        mu, _ = encode(nets, nets["frozen"](test[:8]))  # (8, D), without noise
        pictures = {"reconstructions": torch.stack([test[:8], nets["decoder"](mu).clamp(0, 1)]),
                    "samples": images[:64].unflatten(0, (8, -1)), "interpolations": paths[:4]}
        return scores, {key: value.cpu().clone() for key, value in pictures.items()}

    def compute_fid(_):
        images, _ = sample(nets, args.samples, generator(" samples"))  # the images that were scored
        return frechet_distance(fid_moments(fid[0], images), real["FID moments"])
    history, state = run.unit(name, compute).values()
    nets.load_state_dict(state)
    row = dict(zip(FACTORS, key)) | {
        "repeat": repeat, "weights": document_count(nets),
        "real weights": sum(p.numel() for p in nets.parameters() if p.requires_grad)}
    nets.requires_grad_(False)  # after the counts of what is trainable
    scores, pictures = run.unit(f"{name}-scores", compute_scores)
    if fid:
        scores["FID"] = run.unit(f"{name}-fid-{fid[1]}", compute_fid)
    # RE is to be low and RT high: both gaps are positive where test images come out worse
    row |= scores | {"seconds": history["seconds"].median().item(),
                     "gap of RE": scores["RE"] - history["RE"][-1].item(),
                     "gap of RT": history["RT"][-1].item() - scores["RT"]}
    return row | {"gap of negative ELBO": row["gap of RE"] + row["gap of RT"]}, pictures, history


def published(channels):
    """The document's figures: {measure: {(layers, prior, encoder): {"mean", "std"}}}."""
    grid = list(itertools.product(LAYERS, PRIORS, ENCODERS[:4]))
    keys, tables = (grid if channels == 1 else [None] * 24 + grid[-4:]), {}  # SVHN's come last
    for name, text in DOCUMENT.items():
        figures = [word.partition("/") for word in text.split()]
        tables[name] = {key: {"mean": float(mean), "std": float(std) if std else None}
                        for key, (mean, _, std) in zip(keys, figures) if key}
    return tables


def summary(rows):
    """Mean and std over repeats of every measure: {(layers, prior, encoder): {measure: ...}}."""
    cells = {}
    for key in dict.fromkeys(map(KEY, rows)):
        some = [row for row in rows if KEY(row) == key]
        cells[key] = {name: common.mean_std(torch.tensor([float(row[name]) for row in some],
                                                         dtype=torch.double))
                      for name in MEASURES if name in some[0]}
        cells[key]["weights"]["std"] = cells[key]["real weights"]["std"] = None
    return cells


def tables_of(cells, objective, channels):
    """{title: rows}: each measure in the document's layout, its own figures in brackets."""
    (groups, encoders), document, tables = grid_of(cells), published(channels), {}
    if objective == "corrected":
        del document["negative ELBO"], document["RT"]  # other quantities
    for name, number in MEASURES.items():
        if name not in next(iter(cells.values())):
            continue  # FID without --fid
        theirs = document.get("FID" if name == "distance" else name, {})
        digits = 0 if "weights" in name else 2
        if number and channels == 3:
            number = "5.10" + number[3:]  # one table for all measures
        head = f"Table {number}" if number else "Not in the document"
        tables[f"{head}: {name}"] = rows = []
        for group in groups:
            rows.append(dict(zip(("Layer", "Prior"), map(TITLES.get, group))))
            for encoder in encoders:
                key = (*group, encoder)
                beside = f" [{common.show(theirs[key], digits)}]" if key in theirs else ""
                rows[-1][encoder] = common.show(cells[key][name], digits) + beside
    return tables


def in_order(order, measure, cells):
    """Means over models by name ("conv L": all that are both), and are they in order? None where
    there are no such models."""
    measure, statistic = measure.removeprefix("std of "), "std" if "std of" in measure else "mean"
    means, sides = {}, []
    for side in order.split(" < "):
        sides.append([])
        for term in side.split(", "):
            factor, name = re.fullmatch(r"([\d.]*) ?(.*)", term).groups()  # "2 c" -> "2", "c"
            some = [row[measure][statistic] for key, row in cells.items()
                    if {*name.split()} <= {*key}]  # models that have all of these levels
            if None in some or not some:
                return None
            means[name] = sum(some) / len(some)
            sides[-1].append(float(factor or 1) * means[name])
    return ("; ".join(f"{name} {mean:.2f}" for name, mean in means.items()),
            all(max(low) < min(high) for low, high in zip(sides, sides[1:])))


def closing_table(cells, distance, objective, channels):
    """Every claim that these models can tell of: (claim, document, here, holds)."""
    document, claims, as_published = published(channels), [], objective == "as-published"
    known = {key: row for key, row in cells.items() if key in document["RE"]}
    for name in ("negative ELBO", "RT", "RE", "FID", "weights"):
        near = [abs(row[name]["mean"] - document[name][key]["mean"])
                <= 2 * (document[name][key]["std"] or 0) + 0.01  # and one in its last digit
                for key, row in known.items() if name in row]
        if near and (as_published or name == "weights"):
            number = MEASURES[name][:3] if channels == 1 else "5.10"
            within = "as the document counts" if name == "weights" else "within two std of its own"
            claims.append((f"Table {number}: {name} {within}", f"{len(near)} models",
                           f"{sum(near)} of {len(near)}", all(near)))
    whole = known.keys() == document["RE"].keys()
    for order, name, theirs, words in CLAIMS if channels == 1 else CLAIMS[1:4]:
        name = distance if name == "distance" else name
        found = in_order(order, name, known) if whole or "conv flow6" in order else None
        if found:  # the negative ELBO is another quantity under `corrected`
            claims.append((words.format(name) or f"{order} in {name}",
                           theirs if as_published or "ELBO" not in name else "-", *found))
    if not whole or channels == 3:
        return claims
    far, confident, balance, jumps = ({key: row[name]["mean"] for key, row in known.items()}
                                      for name in (distance, "confident", "balance", "jumps"))
    best = [min((key for key in known if key[2] == name), key=far.get) for name in ENCODERS[:4]]
    random = [key for key in known if key[2] in ("NL", "RKS")]
    wanted = [key for key in random if key[:2] == ("conv", "flow6")]
    good = [key for key in random if confident[key] >= 2 / 3 and balance[key] >= 0.9]
    rough = max(jumps, key=jumps.get)
    return claims + [
        (f"Conv, Flow (6) has the best {distance} for every encoder", "yes",
         "; ".join(f"{' '.join(key)} {far[key]:.1f}" for key in best),
         all(key[:2] == ("conv", "flow6") for key in best)),
        ("of random encoders only Conv, Flow (6) gives readable samples", "yes",
         "; ".join(f"{' '.join(key)} {confident[key]:.0%}, balance {balance[key]:.2f}"
                   for key in random if key in good + wanted), good == wanted),
        ("interpolations are smooth (at most 1 % jump, every model)", "yes",
         f"{' '.join(rough)} {jumps[rough]:.1%}", jumps[rough] <= 0.01)]


def study(run, args, found, reals, channels):
    """Figures, tables and closing table from what one_model returned, a triple each."""
    rows, pictures, histories = zip(*found)
    cells, distance = summary(rows), "FID" if args.fid else "distance"
    for name, text in (("5.7_reconstructions", "reconstructions (below) of test images"),
                       ("5.8_samples", "samples from the prior"),
                       ("5.9_interpolations", "interpolations between samples")):
        shown = dict(zip(cells, (some[name[4:]] for some in pictures)))
        run.figure(plot_sheets(shown), name, f"Table {name[:3]}: {text}")
    run.figure(plot_training(dict(zip(cells, histories)), cells), "training",
               "Training by epoch, first repeat; dots: test images, mean of repeats")
    labels = {distance: "FID" if args.fid else "Fréchet distance in LeNet's features",
              "seconds": "seconds per epoch (median)"}
    run.figure(plot_means(cells, labels), "weights", "Samples against real images, and time")
    tables = tables_of(cells, args.objective, channels)
    real = [row for one in reals for row in one["rows"]]
    tables["Real and naive images"] = [
        {"images": row["images"], "repeat": row["repeat"]}
        | {key: f"{row[key]:.3f}" for key in (distance, "confident", "balance")} for row in real]
    analyses, lines, ours = {}, [], [row for row in rows if row["encoder"] != "PRKS"]
    comparable = args.objective == "as-published" and channels == 1
    for name, (model, theirs) in ANALYSES.items() if args.anova and ours else ():
        name, theirs = (name, theirs) if name in ours[0] else (distance, {})  # no FID
        analyses[name] = anova(ours, name, model.split(" + "))
        lines += [{"measure": name, "term": term,
                   "here": f"F({row['df']}, {row['error df']}) = {row['F']:.2f}",
                   "p": f"{row['p']:.2g}", "document": theirs.get(term, "-") if comparable else "-"}
                  for term, row in analyses[name].items()]
    tables |= {"Analysis of variance": lines} if lines else {}
    text = f"# {run.label}\n"
    for name, lines in tables.items():
        common.print_rows(name, lines)
        sheet = [lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)]
        text += f"\n{name}\n\n" + "".join(f"| {' | '.join(map(str, row))} |\n" for row in sheet)
    common.write(run.folder / "tables.md", text)
    metrics = [{"model": "-".join(KEY(row)), "repeat": row["repeat"], "epoch": epoch + 1,
                **{key: values[epoch].item() for key, values in history.items()}}
               for row, history in zip(rows, histories) for epoch in range(args.epochs)]
    return run.finish({
        "models": rows, "cells": [dict(zip(FACTORS, key)) | row for key, row in cells.items()],
        "real": real, "anova": analyses},
        closing_table(cells, distance, args.objective, channels), metrics)


def main(argv=None):
    """Run the document; returns what results.json holds (None in all but torchrun's first)."""
    args = arguments(argv)
    rank, size = join(args.device)
    if rank:  # the first process fetches data and opens the run, the others then find both
        dist.barrier()
        args.fresh = False
    fid = inception(args.fid_weights, args.device) if args.fid else None
    x, y = load_data(args.dataset, args.train_images, args.test_images, args.data, args.device)
    left, test = len(x) - args.train_images * 7 // 5, args.test_images or 100
    if left < test:
        flag = "train" if left < 100 else "test"
        common.die(f"argument --{flag}-images: {args.train_images} to train on and 0.4 of that for "
                   f"validation leave {max(0, left)} of {args.dataset}'s {len(x)}, not {test}")
    with contextlib.redirect_stdout(io.StringIO()) if rank else contextlib.nullcontext(), \
            common.Run(__file__, args, f"{args.dataset} 32x32, {args.objective}", ADDITIVE) as run:
        g = common.generator(args.seed, "LeNet", args.device)
        judge = lenet(x.shape[1], g)
        judge.load_state_dict(run.unit("lenet", lambda _: train_judge(
            judge, x, y, args.judge_steps, g)))
        judge.requires_grad_(False)
        splits = [split(len(x), args.train_images, args.test_images, common.generator(
            args.seed, f"split {repeat}", args.device)) for repeat in range(args.repeats)]
        reals = [real_images(run, args, judge, fid, x, *both, repeat)
                 for repeat, both in enumerate(splits)]

        def model(repeat, *key):
            return one_model(run, args, judge, fid, x, *splits[repeat], reals[repeat], repeat, *key)
        jobs = list(itertools.product(range(args.repeats), args.layers, args.prior, args.encoder))
        if size > 1:
            # the first releases the others, the second waits until they have opened the run, too
            for _ in range(1 if rank else 2):
                dist.barrier()
            order = torch.randperm(len(jobs), generator=common.generator(0, "jobs"))  # all encoders
            for i in order[rank::size]:  # on every device, or seconds would compare devices
                model(*jobs[i])
            dist.barrier()  # what the others have computed is in the folder now
            dist.destroy_process_group()
            if rank:
                return None
        return study(run, args, [model(*job) for job in jobs], reals, x.shape[1])


if __name__ == "__main__":
    main()
