"""Entropic autoencoders: no prior, but an ensemble of encoders at a temperature.

Reproduces "Entropic Auto-Encoding via Implicit Free-Energy Minimization". The reconstruction loss
U is the only objective. Under a fixed decoder phi the encoder's weights theta are particles in the
potential U, which a Nose-Hoover chain holds at the temperature T (Simmering). They sample

    p(theta) = exp(-U(theta, phi) / T) / Z(phi)                               Eqs. (1), (11)

and the decoder descends its free energy -T log Z, Eqs. (6), (9), by a mean over them (Algorithm 1):

    dF/dphi = <dU/dphi>                                                       Eqs. (7), (10)

    python eae_simmering.py                             MNIST: about 5 minutes on 2 CPU cores
    python eae_simmering.py --experiment reaction-diffusion     the waves: about 3 minutes
    python eae_simmering.py --experiment all            all that has data here: about 26 minutes

A run leaves figures, tables, logs and nets (units/*.pt). Our choices, where the document is
silent or its text is lost (temperatures and time steps: SETTINGS):
* U is the mean binary cross-entropy of a pixel. For CelebA it is the mean squared error, and the
  decoder has no ReLU at its end: under one, pixels stay black for good.
* quick updates the decoder often, after 5 encoders each time; paper as the document, seldom, after
  thousands. Eq. (7) is the limit of many. Velocities are drawn anew every 20 steps (waves: 5).
* A.4 is lost. After the training the decoder rests, and one encoder in `stride` steps is kept,
  `members` in all. An image's code is the mean over them; it is decoded to the reconstruction.
* The nets see the waves in 64 POD modes. Eq. (16) is solved for latents of unit variance, with a
  ridge of 1e-6.
"""
import copy
import math
import pathlib
import warnings
from typing import NamedTuple

import common  # before torch: from here on Ctrl-C is one line
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jvp

# B batch, D latent, N weights of the encoder, M members of its ensemble, K encoders of an update
PRESETS = {"smoke": dict(dataset="glyphs", seeds=2),
           "quick": dict(dataset="real", seeds=3),
           "paper": dict(dataset="real", seeds=3)}  # all else: SETTINGS


class Setting(NamedTuple):
    """What an EAE is trained with, and what it is compared with."""
    T: float = 1e-7            # temperature, unit of U
    dt: float = 1.0            # time step
    redraw: int = 20           # steps between new Maxwell velocities
    updates: int = 1500        # of the decoder
    samples: int = 5           # K
    batch: int = 64
    members: int = 20          # M, of the ensemble that is kept
    stride: int = 20           # steps between two members
    rate: float = 1e-3         # Adam's, of decoders, VAEs and AEs
    vae: int = 7500            # Adam's steps; in quick as many as the EAE's encoder takes
    ae: int = 7500
    size: int = 0              # images or frames; 0: all


SETTINGS = {  # of quick
    "mnist": Setting(),
    "frey": Setting(updates=2000, vae=10_000, ae=10_000),
    "celeba": Setting(T=1e-9, updates=300, batch=16),
    "reaction-diffusion": Setting(dt=0.02, redraw=5, updates=100, samples=40, batch=128,
                                  members=1000, stride=1, rate=1e-2, size=10_000),
    "temperature": Setting(updates=800, vae=4000, ae=4000)}
SMOKE = dict(updates=6, samples=5, batch=32, members=3, stride=2, vae=30, ae=30)
CHANGES = {  # by the other presets: costs alone
    "smoke": {"mnist": SMOKE, "frey": SMOKE, "temperature": SMOKE,
              "celeba": SMOKE | dict(batch=8, size=200),
              "reaction-diffusion": SMOKE | dict(members=20, size=1000)},
    "paper": {"mnist": dict(updates=250, samples=3126, batch=32, vae=109_410, ae=218_820),
              "frey": dict(updates=1500, samples=1000, batch=2000, members=100, stride=10,
                           vae=10_000, ae=10_000),
              "celeba": dict(updates=700, samples=5087, batch=32, members=100, stride=10),
              "reaction-diffusion": dict(samples=200, batch=256, members=5000),
              "temperature": dict(updates=2000, vae=10_000, ae=10_000)}}
HOT = 1e-4                 # CelebA's high temperature
TEMPERATURES = [1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3]
KINDS = ["EAE", "VAE", "AE"]
LATENT = 64                # units of MNIST's and Frey's nets
ACTIVE = 0.01              # variance of an active unit
IN_USE = 0.01              # a unit is in use if the MSE rises by this share without it
TERMS = ["loss", "deviation of the loss", "kinetic T", "configurational T"]  # of the logs
TABLE_1 = {  # test MSE and active units
    "mnist": {"EAE": (0.026, 64), "VAE": (0.016, 16), "AE": (0.010, 53)},
    "frey": {"EAE": (0.0052, 64), "VAE": (0.0046, 3), "AE": (0.0014, 64)}}
ORDERS = [  # claim, measure, the net that has less, the one that has more
    ("MSE: VAE below EAE", "mse", "VAE", "EAE"),
    ("MSE: AE below EAE", "mse", "AE", "EAE"),
    ("MSE: AE below VAE", "mse", "AE", "VAE")]
DIGIT_ORDERS = [
    ("variance of an active unit: AE below EAE", "variance", "AE", "EAE"),
    ("digits explain a unit (η²): VAE below EAE", "eta2", "VAE", "EAE"),
    ("digits explain a unit (η²): AE below EAE", "eta2", "AE", "EAE"),
    ("multimodal units, share: VAE below EAE", "multimodal", "VAE", "EAE"),
    ("multimodal units, share: noise below EAE", "multimodal", "normal noise", "EAE"),
    ("Fréchet of half-way images: EAE below VAE", "between", "EAE", "VAE"),
    ("Fréchet of half-way images: EAE below AE", "between", "EAE", "AE"),
    ("Fréchet of generated images: EAE below VAE", "generated", "EAE", "VAE")]
# of the waves
MODES = 64                 # POD modes that the nets see
PIXELS = 100               # a side
FRAME = 0.05               # time between two frames
OMEGA = 0.9077             # the waves' rotation rate, rad per time
WEIGHTS = (1.0, 0.5)       # of Eq. (14)
SIGNIFICANT = 0.1          # Table 4
CANDIDATES = ["z1", "z2", "z1²", "z1z2", "z2²", "z1³", "z1²z2", "z1z2²", "z2³",
              "sin z1", "sin z2"]
TABLE_4 = {  # coefficients of CANDIDATES in dz1/dt and in dz2/dt
    "mean": [[0.47, 1.00, 0, 0, -0.03, 0, -0.02, -0.03, 0.03, 0.36, 0.86],
             [-1.98, -1.37, 0.01, -0.03, -0.03, -0.05, 0.09, 0.14, 0.09, 0.13, 0.11]],
    "mode": [[0.48, 1.17, 0, 0, -0.01, -0.01, -0.03, -0.03, 0.02, 0.31, 0.81],
             [-1.98, -0.38, 0, -0.03, -0.01, -0.07, -0.03, -0.03, 0.02, 0.31, 0.85]]}


# --- data ----------------------------------------------------------------------------------------

def load_images(name, dataset, size, folder, device):
    """(x, y, x_test, y_test) of an experiment, pixels in [0, 1].

    x (n, pixels), faces bytes (n, 3, 64, 64); labels y, or None. Left out are the validation sets:
    the last 10,000 of MNIST's training images, a tenth of all else.
    """
    if dataset == "real" and name in ("mnist", "temperature"):
        x, y = common.images("mnist", True, folder, device)
        x_test, y_test = common.images("mnist", False, folder, device)
        return x[:50_000].flatten(1), y[:50_000], x_test.flatten(1), y_test
    y = None
    if dataset == "glyphs":
        x, y = glyphs_as(name, size or 1000)
    elif name == "frey":
        x = load_frey(pathlib.Path(folder))
    else:
        x = load_celeba(pathlib.Path(folder), size)
    x = x.to(device)
    a, b = round(0.8 * len(x)), round(0.9 * len(x))
    if name == "celeba":  # the standard split, of fewer images its shares
        a, b = len(x) * 162_770 // 202_599, len(x) * 182_637 // 202_599
    if y is None:
        return x[:a], None, x[b:], None
    y = y.to(device)
    return x[:a], y[:a], x[b:], y[b:]


def glyphs_as(name, n):
    """Glyphs in the shape of an experiment's images."""
    if name == "celeba":
        x, y = common.glyphs(n, 0, channels=3)
        return (F.interpolate(x, size=64, mode="bilinear") * 255).byte(), y
    x, y = common.glyphs(n, 0)
    if name == "frey":
        x = x[..., 4:24]  # 28x20
    return x.flatten(1), y


def load_frey(folder):
    """Frey Faces (n, 560) in [0, 1], shuffled, alike for every seed: frames follow each other."""
    common.need("scipy", "--experiment frey")
    from scipy.io import loadmat
    path = folder / "frey_rawface.mat"
    try:
        with path.open("rb") as file:
            x = torch.as_tensor(loadmat(file)["ff"]).float()  # (560, 1965)
    except Exception as error:  # missing, damaged, of another content: many kinds
        why = " ".join(str(error).split())[:120]
        common.die(f"cannot read {path} ({why}): it is published at "
                   "https://cs.nyu.edu/~roweis/data/frey_rawface.mat; put it there")
    if x.dim() == 2 and x.shape[1] != 560:
        x = x.T
    if x.dim() != 2 or x.shape[1] != 560 or len(x) < 100:
        common.die(f"{path}: ff has the shape {tuple(x.shape)}, not 560 pixels by 100 or more")
    if x.max() > 1:
        x = x / 255
    if not 0 <= x.min() <= x.max() <= 1:  # nan is in no order
        common.die(f"{path}: pixels lie neither in [0, 1] nor in [0, 255]")
    return x[torch.randperm(len(x), generator=common.generator(0, "frey"))]


def load_celeba(folder, size):
    """The first `size` aligned faces (0: all), bytes (n, 3, 64, 64), downloaded if none is there.

    The centre square of 128/178 of the width, at 64x64.
    """
    import numpy
    from PIL import Image
    from torchvision import datasets
    home = folder / "celeba"
    paths = sorted(home.rglob("*.[jp][pn]g"), key=lambda path: path.name)
    if not paths:
        try:
            datasets.CelebA(folder, "all", download=True)  # into `home`
        except Exception as error:  # no network, no gdown, a quota: many kinds
            why = " ".join(str(error).split())[:120]
            common.die(f"cannot load celeba ({why}): put its aligned images into "
                       f"{home / 'img_align_celeba'}")
        paths = sorted(home.rglob("*.[jp][pn]g"))
    if len(paths) < 100:
        common.die(f"{home}: {len(paths)} images are too few; 100 or more are needed")
    faces = []
    for path in paths[:size or None]:
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            common.die(f"cannot read {path}: {error}")
        w, h = image.size
        half = round(w * 32 / 89)  # half a side: 64 of 178
        image = image.crop((w // 2 - half, h // 2 - half, w // 2 + half, h // 2 + half))
        pixels = numpy.array(image.resize((64, 64)))  # (64, 64, 3)
        faces.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return torch.stack(faces)  # (n, 3, 64, 64)


def spiral(frames, n=PIXELS, length=20.0, d=0.1, beta=1.0, dt=FRAME, device="cpu"):
    """Yields u and u_t (n, n) of a lambda-omega spiral wave, frame by frame, in double precision.

    w = u + iv obeys w_t = (1 - |w|^2) w - i beta |w|^2 w + d Laplace(w) in a periodic square: in
    Fourier space by an integrating factor and Runge-Kutta 4. u and u_t are multiplied by
    exp(-r^2 / 100), as in the SINDy autoencoder's data [6].
    """
    X = torch.linspace(-length / 2, length / 2, n + 1, dtype=torch.double, device=device)[:-1]
    Y = X[:, None]  # (n, 1)
    r, angle = (X ** 2 + Y ** 2).sqrt(), torch.atan2(Y, X)  # (n, n)
    k = 2 * math.pi * torch.fft.fftfreq(n, length / n, dtype=torch.double, device=device)
    linear = -d * (k[:, None] ** 2 + k ** 2)  # (n, n): d Laplace in Fourier space
    half = torch.exp(linear * dt / 2)  # its decay over dt / 2
    whole = half ** 2
    window = torch.exp(-0.01 * r ** 2)

    def reaction(W):
        w = torch.fft.ifft2(W)  # products are taken in space
        A2 = w.real ** 2 + w.imag ** 2
        return torch.fft.fft2(w * torch.complex(1 - A2, -beta * A2))

    W = torch.fft.fft2(torch.polar(torch.tanh(r), angle - r))
    for _ in range(frames):
        a = reaction(W)  # a, b, c, e: Runge-Kutta's slopes of the reaction alone
        u = torch.fft.ifft2(W).real
        u_t = torch.fft.ifft2(a + linear * W).real
        yield u * window, u_t * window
        b = reaction(half * (W + dt / 2 * a))
        c = reaction(half * W + dt / 2 * b)
        e = reaction(whole * W + dt * half * c)
        W = whole * W + dt / 6 * (whole * a + 2 * half * (b + c) + e)


def wave_modes(frames, device):
    """The waves in MODES proper orthogonal modes, found in every 20th frame.

    basis (MODES, n^2) is orthonormal; x and x_t (frames, MODES) are the amplitudes of u and u_t,
    both divided by norm, so that |x|^2 is 1 on average over time. missed: the share of the squares
    of u and u_t that the modes do not hold.
    """
    kept = []
    for k, pair in enumerate(spiral(frames, device=device)):
        if k % 20 == 0:
            kept.extend(pair)
    kept = torch.stack(kept).flatten(1)  # (frames / 10, n^2)
    _, _, basis = torch.linalg.svd(kept, full_matrices=False)
    basis = basis[:MODES]
    coefficients, total = [], 0.0
    for pair in spiral(frames, device=device):
        pair = torch.stack(pair).flatten(1)  # (2, n^2)
        coefficients.append(pair @ basis.T)
        total += (pair ** 2).sum()
    both = torch.stack(coefficients, 1)  # (2, frames, MODES)
    missed = 1 - (both ** 2).sum() / total
    norm = (both[0] ** 2).sum(1).mean().sqrt()  # of u
    x, x_t = (both / norm).float()
    return {"basis": basis.float(), "x": x, "x_t": x_t, "missed": missed.item(),
            "norm": norm.item()}


# --- model ---------------------------------------------------------------------------------------

def mlp(*sizes, activation=nn.ReLU):
    """Linear layers of these sizes, with an activation between them."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def digit_nets(pixels, codes=LATENT):
    """Encoder (B, pixels) to (B, codes), a VAE's twice LATENT; decoder (B, LATENT) to logits."""
    return mlp(pixels, 256, 256, codes), mlp(LATENT, 256, 256, pixels)


def face_nets():
    """Encoder (B, 3, 64, 64) to (B, 256) and decoder back (Appendix A.5.3)."""
    encoder = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(),  # 32x32
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),  # 16x16
        nn.Conv2d(64, 128, 3, stride=2, padding=1), nn.ReLU(),  # 8x8
        nn.Conv2d(128, 256, 3, stride=2, padding=1), nn.ReLU(),  # 4x4
        nn.Flatten(), nn.Linear(4096, 256))
    decoder = nn.Sequential(
        nn.Linear(256, 1024), nn.ReLU(), nn.Unflatten(1, (64, 4, 4)),
        nn.ConvTranspose2d(64, 64, 4, stride=4), nn.ReLU(),  # 16x16
        nn.ConvTranspose2d(64, 32, 4, stride=4), nn.ReLU(),  # 64x64
        nn.ConvTranspose2d(32, 3, 3, padding=1))
    return encoder, decoder


def wave_nets():
    """Encoder (B, MODES) to (B, 2) and decoder back; biases 0: Eq. (13) has no constant term."""
    encoder = mlp(MODES, 256, 2, activation=nn.ELU)
    decoder = mlp(2, 256, MODES, activation=nn.ELU)
    for net in (encoder, decoder):
        for layer in (net[0], net[2]):
            nn.init.zeros_(layer.bias)
    return encoder, decoder


def build(nets, seed, name, device, *sizes):
    """Encoder and decoder of a builder, their first weights from a generator called `name`."""
    common.seed_weights(seed, f"{name} weights")
    encoder, decoder = nets(*sizes)
    return encoder.to(device), decoder.to(device)


# --- objective -----------------------------------------------------------------------------------

def cross_entropy(logits, x):
    """Mean binary cross-entropy of a pixel, nats: logits, x (B, pixels) to a scalar."""
    return F.binary_cross_entropy_with_logits(logits, x)


def vae_loss(encoder, decoder, x, eps, beta):
    """cross_entropy + beta KL(q(z|x) || N(0, 1)) / pixels, nats: x (B, pixels), eps (B, D)."""
    mu, logvar = encoder(x).chunk(2, 1)  # (B, D) each
    z = mu + (logvar / 2).exp() * eps
    kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(1).mean()  # of an image
    return cross_entropy(decoder(z), x) + beta * kl / x.shape[1]


def candidates(z):
    """The functions of Eq. (13), in the order of CANDIDATES: z (..., 2) to (..., 11)."""
    a, b = z.unbind(-1)
    linear = [a, b]
    square = [a ** 2, a * b, b ** 2]
    cubic = [a ** 3, a ** 2 * b, a * b ** 2, b ** 3]
    return torch.stack(linear + square + cubic + [a.sin(), b.sin()], -1)


def identify(z, z_t, ridge=1e-6):
    """Xi (11, 2) of Eq. (16): ridge regression of z_t (B, 2) on the candidates at z (B, 2).

    On a circle of radius r, z2 and z2 (z1^2 + z2^2) / r^2 are the same function. No data can tell
    them apart: the ridge decides how they share the coefficient. At unit variance cubic terms come
    out as large as linear ones; at r below 0.5 they vanish.
    """
    theta = candidates(z.double())  # (B, 11), double: the Gram matrix squares its condition
    one = torch.eye(11, dtype=torch.double, device=z.device)
    gram = theta.T @ theta + len(z) * ridge * one
    return torch.linalg.solve(gram, theta.T @ z_t.double()).float()


def reconstruct_waves(encoder, decoder, x, x_t):
    """Waves x and their derivatives x_t (B, MODES), reconstructed as Eq. (14) wants them.

    Returns x_hat and x_hat_t (B, MODES), Xi (11, 2), and z (B, 2) scaled to unit variance.
    """
    z, z_t = jvp(encoder, (x,), (x_t,))  # (B, 2) each: chain rule
    scale = z.std(0)  # Xi depends on the scale of z: it is found for z / scale
    Xi = identify(z / scale, z_t / scale)  # Eq. (16), anew on every batch, with gradients
    rate = scale * (candidates(z / scale) @ Xi)  # dz/dt, Eq. (13), in the decoder's units
    x_hat, x_hat_t = jvp(decoder, (z,), (rate,))  # Eq. (15)
    return x_hat, x_hat_t, Xi, z / scale


def squared_error(x_hat, x):
    """Of waves (B, MODES), mean over the batch. The basis is orthonormal: pixels give the same."""
    return ((x_hat - x) ** 2).sum(1).mean()


# --- sampler -------------------------------------------------------------------------------------

class NoseHoover:
    """The weights theta (N,) of `module` as particles in a potential U at the temperature T.

        dv/dt = -dU/dtheta / m - w_1 v,    dw_1/dt = (m v^2 - N T) / Q - w_1 w_2,
        dw_k/dt = w_(k-1)^2 - T / Q - w_k w_(k+1),    Q = N T tau^2

    (Martyna et al. 1996, Eq. (4.1)). In time theta follows exp(-U / T), v a normal law of variance
    T / m. All thermostats of the chain have the mass Q, usual for the first alone. Lighter ones
    would brake it, so that it could not carry off the heat that a training decoder gives.
    A step is half a step of the chain, position Verlet, half a step of the chain. It costs one
    gradient, taken half-way: there theta in a well of stiffness k has the exact variance T / k (at
    the ends of a step, 1 - dt^2 k / 4 m of it). The module's parameters become views of theta, and
    their gradients views of grad. Never call its zero_grad(): it would cut them off.
    """

    def __init__(self, module, T, m=1.0, dt=0.5, tau=5.0, chain=30, generator=None):
        parameters = list(module.parameters())
        self.theta = torch.cat([p.detach().flatten() for p in parameters])  # (N,)
        self.grad = torch.zeros_like(self.theta)
        first = 0
        for p in parameters:
            last = first + p.numel()
            p.data = self.theta[first:last].view_as(p)
            p.grad = self.grad[first:last].view_as(p)  # backward() adds into it
            first = last
        self.T, self.m, self.dt, self.generator = T, m, dt, generator
        self.N = len(self.theta)
        self.Q = self.N * T * tau ** 2
        self.w = [0.0] * chain  # Python floats: 30 tiny tensors would cost four times as much
        self.v = torch.zeros_like(self.theta)
        self.virial = 0.0
        self.redraw()

    def redraw(self):
        """New Maxwell velocities; the chain, which is independent of them, goes on."""
        self.v.normal_(0, math.sqrt(self.T / self.m), generator=self.generator)
        self.mv2 = self.m * self.v.dot(self.v).item()

    def kick(self, k, h):
        """w_k after a time h: half of its friction, what pushes it, the other half."""
        push = (self.mv2 - self.N * self.T) / self.Q
        if k > 0:
            push = self.w[k - 1] ** 2 - self.T / self.Q
        friction = 1.0
        if k + 1 < len(self.w):
            friction = math.exp(-self.w[k + 1] * h / 2)
        self.w[k] = (self.w[k] * friction + push * h) * friction

    def thermostat(self, h):
        """The chain and the particles' friction alone, for a time h, symmetric in time."""
        try:
            for k in reversed(range(len(self.w))):
                self.kick(k, h / 2)
            friction = math.exp(-self.w[0] * h)
            self.mv2 *= friction ** 2
            for k in range(len(self.w)):
                self.kick(k, h / 2)
        except OverflowError:  # the time step is far too long: the next loss shows it
            friction = math.nan
        self.v *= friction

    def step(self, potential):
        """One time step: potential() gives U, a scalar, at theta; returns it."""
        self.thermostat(self.dt / 2)
        self.theta.add_(self.v, alpha=self.dt / 2)
        self.grad.zero_()
        with torch.enable_grad():
            U = potential()
        U.backward()  # adds the gradients of other weights in U, the decoder's, to theirs
        self.v.add_(self.grad, alpha=-self.dt / self.m)
        measured = torch.stack([self.v.dot(self.v), self.theta.dot(self.grad)])
        mv2, self.virial = measured.double().tolist()  # the step's one wait for a GPU
        self.mv2 = self.m * mv2
        self.theta.add_(self.v, alpha=self.dt / 2)
        self.thermostat(self.dt / 2)
        return U.detach()

    def thermometers(self):
        """Kinetic and configurational temperature: means of m v^2 and of theta dU/dtheta."""
        return self.mv2 / self.N, self.virial / self.N

    def state_dict(self):
        return {"theta": self.theta, "v": self.v, "mv2": self.mv2, "w": self.w}

    def load_state_dict(self, state):
        self.theta.copy_(state["theta"])
        self.v.copy_(state["v"])
        self.mv2, self.w = state["mv2"], list(state["w"])


# --- train ---------------------------------------------------------------------------------------

def batch_of(n, size, g):
    """`size` of n items at random, all of them where the batch holds all."""
    if size >= n:
        return torch.arange(n, device=g.device)
    return torch.randint(n, (size,), generator=g, device=g.device)


def algorithm_1(name, loss, n, decoder, sampler, s, g):
    """Algorithm 1 under a Setting s: its log (updates, TERMS), temperatures in units of s.T.

    loss(i) is U of the items i (B,) of n. The sampler's encoder and the decoder change in place.
    """
    optimiser = torch.optim.Adam(decoder.parameters(), s.rate, fused=True)
    log = torch.zeros(s.updates, len(TERMS), device=g.device)
    U = torch.zeros(s.samples, device=g.device)
    for update in common.steps(name, s.updates, log, TERMS, sampler, decoder, optimiser, g):
        optimiser.zero_grad()
        kinetic, configurational = 0.0, 0.0
        for k in range(s.samples):
            if (update * s.samples + k) % s.redraw == 0:  # steps since the start
                sampler.redraw()
            i = batch_of(n, s.batch, g)
            U[k] = sampler.step(lambda: loss(i))  # theta ~ exp(-U / T), Eq. (1)
            kinetic += sampler.thermometers()[0] / (s.samples * s.T)
            configurational += sampler.thermometers()[1] / (s.samples * s.T)
        for p in decoder.parameters():
            p.grad /= s.samples  # <dU/dphi>, Eq. (7)
        optimiser.step()
        log[update] = torch.tensor([0.0, 0.0, kinetic, configurational])
        log[update, 0] = U.mean()
        log[update, 1] = U.std(correction=0)
    return log


def sample_ensemble(name, loss, n, sampler, s, g, take):
    """Appendix A.4: take() (L,) of each of M encoders, (M, L). The decoder does not change.

    Returns it with the log (M, TERMS) of every member's last step.
    """
    ensemble = torch.zeros(s.members, len(take()), device=g.device)
    log = torch.zeros(s.members, len(TERMS), device=g.device)
    for member in common.steps(f"{name}, ensemble", s.members, log, TERMS, sampler, g, ensemble):
        for k in range(s.stride):
            if (member * s.stride + k) % s.redraw == 0:
                sampler.redraw()
            i = batch_of(n, s.batch, g)
            U = sampler.step(lambda: loss(i))
        kinetic, configurational = sampler.thermometers()
        ensemble[member] = take()
        log[member] = torch.tensor([0.0, 0.0, kinetic / s.T, configurational / s.T])
        log[member, 0] = U
    return ensemble, log


def simmer(name, loss, n, encoder, decoder, s, g, take=None):
    """A work unit: an EAE by Algorithm 1, then its ensemble of take(), by default the weights."""
    sampler = NoseHoover(encoder, s.T, dt=s.dt, tau=10 * s.dt, generator=g)
    with torch.no_grad():  # but for U in the sampler's steps
        log = algorithm_1(name, loss, n, decoder, sampler, s, g)
        trained = copy.deepcopy(encoder.state_dict())
        ensemble, rest = sample_ensemble(name, loss, n, sampler, s, g, take or sampler.theta.clone)
    return {"encoder": trained, "decoder": decoder.state_dict(), "ensemble": ensemble,
            "log": log, "at rest": rest}


def train(name, loss, n, encoder, decoder, steps, s, g):
    """A work unit: encoder and decoder by Adam on loss(i) of random batches of n items."""
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, s.rate, fused=True)
    log = torch.zeros(steps, 1, device=g.device)
    for step in common.steps(name, steps, log, ["loss"], encoder, decoder, optimiser, g):
        i = batch_of(n, s.batch, g)
        value = loss(i)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        log[step, 0] = value.detach()
    weights = nn.utils.parameters_to_vector(encoder.parameters()).detach()
    return {"encoder": encoder.state_dict(), "decoder": decoder.state_dict(),
            "ensemble": weights[None], "log": log}


def train_digits(name, kind, x, s, seed):
    """A work unit of an EAE, a VAE or an AE of images x (n, pixels)."""
    codes = LATENT
    if kind == "VAE":
        codes = 2 * LATENT
    encoder, decoder = build(digit_nets, seed, name, x.device, x.shape[1], codes)
    g = common.generator(seed, f"{name} batches", x.device)

    def reconstruction(i):
        return cross_entropy(decoder(encoder(x[i])), x[i])

    def elbo(i):
        eps = torch.randn(len(i), LATENT, generator=g, device=x.device)
        return vae_loss(encoder, decoder, x[i], eps, beta=1.0)

    if kind == "EAE":
        return simmer(name, reconstruction, len(x), encoder, decoder, s, g)
    if kind == "AE":
        return train(name, reconstruction, len(x), encoder, decoder, s.ae, s, g)
    return train(name, elbo, len(x), encoder, decoder, s.vae, s, g)


# --- evaluate ------------------------------------------------------------------------------------

class Model(NamedTuple):
    kind: str
    encoder: nn.Module
    decoder: nn.Module
    ensemble: torch.Tensor     # (M, N): the encoder's weights, M = 1 but for an EAE


class Codes(NamedTuple):
    mean: torch.Tensor         # (n, D): of an image, over the encoders; of a VAE mu
    draw: torch.Tensor         # (n, D): image i under encoder i % M; of a VAE from q(z|x)
    variance: torch.Tensor     # (D,): over images and encoders; of a VAE mu's
    motion: torch.Tensor       # (D,): the part of it that is due to the encoders' motion


def digit_model(kind, unit, pixels, device):
    """The nets of a finished unit of train_digits."""
    codes = LATENT
    if kind == "VAE":
        codes = 2 * LATENT
    encoder, decoder = digit_nets(pixels, codes)
    encoder.load_state_dict(unit["encoder"])
    decoder.load_state_dict(unit["decoder"])
    ensemble = unit["ensemble"].to(device)
    return Model(kind, encoder.to(device), decoder.to(device), ensemble)


def untrained_model(seed, pixels, device):
    """An EAE before any training, an ensemble of one: the control."""
    encoder, decoder = build(digit_nets, seed, "untrained", device, pixels)
    weights = nn.utils.parameters_to_vector(encoder.parameters()).detach()
    return Model("untrained", encoder, decoder, weights[None])


@torch.no_grad()
def codes_of(model, x, g):
    """Codes of images x (n, pixels), Eq. (2); g: for a VAE's draws."""
    if model.kind == "VAE":
        mu, logvar = model.encoder(x).chunk(2, 1)  # (n, D) each
        eps = torch.randn(mu.shape, generator=g, device=mu.device)
        variance = mu.var(0, correction=0)
        return Codes(mu, mu + (logvar / 2).exp() * eps, variance, torch.zeros_like(variance))
    encoder = copy.deepcopy(model.encoder)  # the model's own stays as it is
    M = len(model.ensemble)
    total, square = 0.0, 0.0
    draw = torch.zeros(len(x), encoder[-1].out_features, device=x.device)
    for k, theta in enumerate(model.ensemble):
        nn.utils.vector_to_parameters(theta, encoder.parameters())
        z = encoder(x)  # (n, D)
        draw[k::M] = z[k::M]
        total = total + z.double()  # double: below, nearly equal numbers are subtracted
        square = square + z.double() ** 2
    mean = total / M
    motion = (square / M - mean ** 2).mean(0)  # variance over encoders, mean over images
    variance = mean.var(0, correction=0) + motion
    return Codes(mean.float(), draw, variance.float(), (motion / variance).float())


@torch.no_grad()
def reconstruct(model, z):
    return model.decoder(z).sigmoid()


def rises(model, z, x):
    """(D,): the share by which the MSE of images x (n, pixels) rises with one unit at its mean.

    Does the decoder use the unit? Unlike the variance, the answer is free of the codes' scale.
    """
    mse = ((reconstruct(model, z) - x) ** 2).mean()
    rise = torch.zeros(z.shape[1], device=z.device)
    for unit in range(z.shape[1]):
        without = z.clone()
        without[:, unit] = z[:, unit].mean()
        rise[unit] = ((reconstruct(model, without) - x) ** 2).mean() / mse - 1
    return rise


def explained_by(y, z):
    """eta^2 (D,): the share of a unit's variance that the labels y (n,) explain, of z (n, D)."""
    between = torch.zeros(z.shape[1], device=z.device)
    for label in y.unique():
        chosen = z[y == label]
        apart = chosen.mean(0) - z.mean(0)
        between += len(chosen) / len(z) * apart ** 2
    return between / z.var(0, correction=0).clamp(min=1e-30)


def linear_probe(z, y, z_test, y_test):
    """Test accuracy of the best linear readout, in the least squares sense, of latents (n, D)."""
    mean, deviation = z.mean(0), z.std(0) + 1e-8  # a dead unit has deviation 0
    one = torch.ones(len(z), 1, device=z.device)
    A = torch.cat([(z - mean) / deviation, one], 1).double()
    wanted = F.one_hot(y, 10).double()
    gram = A.T @ A + 1e-4 * len(z) * torch.eye(A.shape[1], dtype=A.dtype, device=z.device)
    W = torch.linalg.solve(gram, A.T @ wanted).float()  # (D + 1, 10)
    scores = (z_test - mean) / deviation @ W[:-1] + W[-1]
    return (scores.argmax(1) == y_test).float().mean().item()


def density(values, points):
    """Gaussian kernel density of each column of values (n, D) at points (P, D), Scott's rule."""
    width = values.std(0, correction=0).clamp(min=1e-12) * len(values) ** -0.2  # (D,)
    result = torch.zeros_like(points)
    for j in range(values.shape[1]):
        distance = (points[:, j, None] - values[:, j]) / width[j]  # (P, n)
        result[:, j] = (-distance ** 2 / 2).exp().mean(1)
    return result / (width * math.sqrt(2 * math.pi))


def grid_over(values, count=200):
    """count points from the least to the largest value of each column: (n, D) to (count, D)."""
    low, high = values.amin(0), values.amax(0)
    return low + (high - low) * torch.linspace(0, 1, count, device=values.device)[:, None]


def modes_of(values):
    """Peaks (D,) of the kernel densities of values (n, D), above a tenth of the highest each."""
    p = density(values, grid_over(values))  # (P, D)
    inner = p[1:-1]
    high = inner > p.amax(0) / 10
    peak = (inner > p[:-2]) & (inner > p[2:])
    return (peak & high).sum(0)


def principal_axes(x):
    """Mean (pixels,) and orthonormal axes (pixels, k) of x (n, pixels), by falling variance."""
    _, axes = torch.linalg.eigh(torch.cov(x.T.double()))
    return x.mean(0), axes.flip(1).float()


def pca_mse(axes, x, k):
    """MSE of the projection of x (n, pixels) on k principal axes; k = 0: of the mean image."""
    mean, vectors = axes
    vectors = vectors[:, :k]
    rest = x - mean
    return ((rest - rest @ vectors @ vectors.T) ** 2).mean().item()


def frechet_distance(a, b):
    """Squared Fréchet distance of the Gaussians fitted to features (n, d) and (m, d)."""
    a, b = a.cpu().double(), b.cpu().double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()  # tr (A B)^(1/2)
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return (apart + A.trace() + B.trace() - 2 * cross).item()


def gaussian_draws(z, n, g):
    """n draws (n, D) of the Gaussian with the mean and covariance of z (m, D)."""
    values, vectors = torch.linalg.eigh(torch.cov(z.T.double()))
    noise = torch.randn(n, z.shape[1], generator=g, device=z.device)
    return z.mean(0) + noise @ (vectors * values.clamp(min=0).sqrt()).float().T  # clamp: rounding


def measure_digits(model, data, axes, g):
    """All figures of one model, each a number: Table 1's, and what Section 4.2 says in words."""
    x, y, x_test, y_test = data
    code = codes_of(model, x_test, g)
    x_hat = reconstruct(model, code.mean)
    values = code.draw  # what Fig. 2b shows
    if model.kind == "VAE":
        values = code.mean
    active = code.variance > ACTIVE
    chosen = active
    if not active.any():
        chosen = ~active  # of a net without active units, all of them
    few = values[:2000]
    rise = rises(model, code.mean[:2000], x_test[:2000])
    found = {"mse": ((x_hat - x_test) ** 2).mean(),
             "active": active.sum(),
             "in use": (rise > IN_USE).sum(),
             "rise": rise.mean(),
             "variance": code.variance[chosen].mean(),
             "motion": code.motion[chosen].mean(),
             "multimodal": (modes_of(few)[chosen] > 1).float().mean()}
    if y_test is not None:
        known = codes_of(model, x[:10_000], g)
        found["eta2"] = explained_by(y_test, values)[chosen].mean()
        found["probe"] = linear_probe(known.mean, y[:10_000], code.mean, y_test)
        found |= frechet_of(model, code.mean, known.draw, x_test, axes, g)
    return {key: float(value) for key, value in found.items()}


def frechet_of(model, z, draws, x_test, axes, g):
    """Fréchet distances to the test images x_test, in 64 principal components.

    Of images half-way between the codes z of random pairs of them, and of images generated from the
    Gaussian that is fitted to the codes `draws` of training images: our measures, the document
    shows pictures.
    """
    n = len(z)
    order = torch.randperm(n, generator=g, device=z.device)
    between = reconstruct(model, (z + z[order]) / 2)
    new = gaussian_draws(draws, n, g)
    real = features(x_test, axes)
    return {"between": frechet_distance(features(between, axes), real),
            "generated": frechet_distance(features(reconstruct(model, new), axes), real)}


def features(x, axes):
    mean, vectors = axes
    return (x - mean) @ vectors[:, :LATENT]


def yardsticks(x_test, axes, g):
    """What needs no net: MSE of mean image and PCA, Fréchet of pixel averages, modes of noise."""
    n = len(x_test)
    order = torch.randperm(n, generator=g, device=x_test.device)
    averages = (x_test + x_test[order]) / 2
    real = features(x_test, axes)
    noise = torch.randn(2000, LATENT, generator=g, device=x_test.device)
    first, second = real[order].chunk(2)
    return {"mean image": {"mse": pca_mse(axes, x_test, 0)},
            "PCA-64": {"mse": pca_mse(axes, x_test, LATENT)},
            "averages of pixels": {"between": frechet_distance(features(averages, axes), real)},
            "half of the test images": {"between": frechet_distance(first, second)},
            "normal noise": {"multimodal": (modes_of(noise) > 1).float().mean().item()}}


def digit_paths(models, codes, x_test, y_test, alpha, pairs=((3, 8), (4, 9))):
    """Fig. 2a: {row: images (len(pairs) * S, pixels)} by alpha (S,) of Eq. (17)."""
    def path(values):
        parts = []
        for first, second in pairs:
            a = values[y_test == first].mean(0)
            b = values[y_test == second].mean(0)
            parts.append(torch.lerp(a, b, alpha[:, None]))  # Eq. (17)
        return torch.cat(parts)

    rows = {"test images": path(x_test)}
    for kind, model in models.items():
        z = codes[kind].mean
        if kind == "VAE":
            z = codes[kind].draw
        rows[kind] = reconstruct(model, path(z))
    return rows


def integrate(Xi, z, dt, steps):
    """dz/dt = candidates(z) Xi by Runge-Kutta 4: Xi (R, 11, 2), z (R, 2) to (steps + 1, R, 2)."""
    def rate(z):
        return torch.einsum("rc,rcd->rd", candidates(z), Xi)

    path = [z]
    for _ in range(steps):
        a = rate(z)
        b = rate(z + dt / 2 * a)
        c = rate(z + dt / 2 * b)
        z = z + dt / 6 * (a + 2 * b + 2 * c + rate(z + dt * c))
        path.append(z)
    return torch.stack(path)


def rotation_rate(path, dt):
    """Mean angular velocity (R,) of paths (steps, R, 2) about 0, from z1 to z2 positive."""
    a, b = path.unbind(-1)  # (steps, R) each
    sine = a[:-1] * b[1:] - b[:-1] * a[1:]  # of the turn between frames, times both radii
    cosine = a[:-1] * a[1:] + b[:-1] * b[1:]
    return torch.atan2(sine, cosine).mean(0) / dt


def significant(Xi):
    """Table 4 of Xi (M, 11, 2): mean and mode of each coefficient, (11, 2) each, and the terms.

    A term is significant where both are, over the encoders, above the threshold.
    """
    flat = Xi.flatten(1)  # (M, 22)
    points = grid_over(flat, 400)
    at = density(flat, points).argmax(0, keepdim=True)  # (1, 22)
    mode = points.gather(0, at).view(11, 2)
    mean = Xi.mean(0)
    large = (mean.abs() > SIGNIFICANT) & (mode.abs() > SIGNIFICANT)
    return mean, mode, large


# --- plot ----------------------------------------------------------------------------------------

def plot_sheet(rows, columns=(), width=0.55):
    """A labelled sheet of {row: images (n, pixels) or (n, C, H, W) in [0, 1]}."""
    stacked = []
    for images in rows.values():
        if images.dim() == 2:
            images = images.view(len(images), 1, 28, -1)
        stacked.append(images.cpu())
    sheet = torch.stack(stacked)  # (rows, n, C, H, W)
    r, n, _, h, w = sheet.shape
    fig, (ax,) = common.panels(1, 1, n * width + 1.2, r * width * h / w + 0.3)
    common.image_sheet(ax, sheet, list(rows), columns)
    return fig


def plot_training(eaes):
    """Fig. 3a, and both thermometers: units of EAEs."""
    fig, axes = common.panels(1, 3, 4.2, 3.2)
    for name, unit in eaes.items():
        log = unit["log"]
        loss, deviation, kinetic, configurational = log.T
        update = torch.arange(1, len(log) + 1)
        (line,) = axes[0].plot(update, loss, label=name, lw=1)
        axes[0].fill_between(update, loss - deviation, loss + deviation, alpha=0.3, lw=0,
                             color=line.get_color())
        width = max(1, len(log) // 100)
        for ax, values in zip(axes[1:], (kinetic, configurational)):
            values = values[:len(log) // width * width].view(-1, width).mean(1)
            ax.plot(update[width - 1::width], values, lw=1, color=line.get_color())
    axes[0].set(yscale="log", ylabel="loss U, mean ± deviation of the K samples")
    axes[1].set(yscale="log", ylabel="kinetic temperature / T")
    axes[2].set(yscale="symlog", ylabel="configurational temperature / T")
    for ax in axes:
        ax.set(xlabel="decoder update")
    for ax in axes[1:]:
        ax.axhline(1, color="0.6", ls=":")
    fig.legend(loc="outside right upper", fontsize="small")
    return fig


def plot_histograms(codes, labels, units):
    """Figs. 2b and 5: latents by digit, a ridge each: {kind: Codes}, numbers of units."""
    fig, axes = common.panels(len(codes), len(units), 2.2, 2.6)
    labels = labels.cpu()
    panel = 0
    for kind, code in codes.items():
        values = code.draw.cpu()
        if kind == "VAE":
            values = code.mean.cpu()
        for unit in units:
            ax, panel = axes[panel], panel + 1
            z = values[:, unit]
            reach = 3 * z.std() + 1e-6
            edges = torch.linspace(z.mean() - reach, z.mean() + reach, 41)
            middles = (edges[1:] + edges[:-1]) / 2
            counts = [torch.histogram(z[labels == digit], edges).hist for digit in range(10)]
            highest = torch.stack(counts).max().clamp(min=1)
            for digit, count in enumerate(counts):
                ax.fill_between(middles, digit, digit + 1.4 * count / highest, lw=0, alpha=0.8,
                                color=common.COLOURS[digit % 2], zorder=-digit)
            ax.set_title(f"{kind}, unit {unit}: a = {code.variance[unit]:.2g}", fontsize="small")
            ax.set(yticks=range(10), xlabel="latent z")
            ax.locator_params(axis="x", nbins=3)  # long numbers would run into each other
            if unit == units[0]:
                ax.set_ylabel("digit")
    return fig


def plot_waves(basis, norm, x, x_t, x_hat, x_hat_t, columns):
    """Fig. 1a-c: waves and their derivatives, (frames, MODES) each, and their reconstructions."""
    fig, axes = common.panels(4, len(x), 2.1, 1.9)
    rows = {"u": x, "u, reconstructed": x_hat, "du/dt": x_t, "du/dt, reconstructed": x_hat_t}
    panel = 0
    for title, coefficients in rows.items():
        fields = (coefficients * norm) @ basis  # (frames, n^2)
        for column, field in zip(columns, fields):
            ax, panel = axes[panel], panel + 1
            shown = ax.imshow(field.view(PIXELS, PIXELS).numpy(), cmap="RdBu_r", vmin=-1, vmax=1,
                              extent=(-10, 10, -10, 10), origin="lower")
            ax.set(xticks=[], yticks=[])
            if title == "u":
                ax.set_title(column, fontsize="small")
            if column == columns[0]:
                ax.set_ylabel(title, fontsize="small")
    fig.colorbar(shown, ax=axes, shrink=0.5, label="u, du/dt per unit of time")
    return fig


def plot_dynamics(ensembles, z, paths):
    """Fig. 1d-f: coefficients (M, 11, 2) of each run's ensemble; codes z and paths of run 1."""
    fig, axes = common.panels(1, 4, 3.9, 3.7)
    for k, Xi in enumerate(ensembles):
        colour = common.COLOURS[k % 8]
        # z2 and sin z2 in dz1/dt against z1 and sin z1 in dz2/dt
        for a, b, mark, name in ((1, 0, "o", "z"), (10, 9, "x", "sin z")):
            label = f"run {k + 1}, {name}"
            axes[0].plot(Xi[:, a, 0], Xi[:, b, 1], mark, ms=3, alpha=0.3, color=colour,
                         label=label)
    first = ensembles[0]
    axes[1].plot(first[:, 1, 0], first[:, 0, 1], "o", ms=3, alpha=0.3)
    axes[0].set(title="d: all runs", xlabel="coefficient of z2 (sin z2) in dz1/dt",
                ylabel="coefficient of z1 (sin z1) in dz2/dt")
    axes[1].set(title="d: the ensemble of run 1, z", xlabel="coefficient of z2 in dz1/dt",
                ylabel="coefficient of z1 in dz2/dt")
    axes[0].legend(fontsize="x-small")
    axes[2].plot(*z.T, "k:", lw=1, zorder=3, label="codes of the test frames")
    for radii, path in paths.items():
        axes[2].plot(*path.T, lw=1, label=f"from {radii:g} times the first code")
    axes[2].set(title="e: run 1, integrated")
    for name, coefficients in TABLE_4.items():
        Xi = torch.tensor(coefficients).T[None]
        path = integrate(Xi, torch.tensor([[1.0, 0.0]]), FRAME, 400)[:, 0]
        axes[3].plot(*path.T, lw=1, label=f"{name} coefficients")
    axes[3].set(title="the document's Table 4, from (1, 0)")
    for ax in axes[2:]:
        ax.set(xlabel="z1", ylabel="z2", xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        ax.legend(fontsize="x-small", loc="upper right")
    return fig


def plot_correlations(Xi):
    """Fig. 4: correlations over the ensemble of all coefficients (M, 11, 2)."""
    fig, (ax,) = common.panels(1, 1, 7.6, 6.6)
    names = [f"{name} in dz{d}/dt" for d in (1, 2) for name in CANDIDATES]
    values = torch.corrcoef(Xi.transpose(1, 2).flatten(1).T.double()).nan_to_num()  # (22, 22)
    shown = ax.imshow(values.numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks(range(22), names, rotation=90, fontsize="x-small")
    ax.set_yticks(range(22), names, fontsize="x-small")
    fig.colorbar(shown, label="correlation over the encoders", shrink=0.7)
    return fig


def plot_sweep(at, bayes):
    """What T does to the EAE: {"T 1e-09", ..., "AE", "untrained": {measure: (runs,)}}."""
    measures = {"mse": "test MSE", "active": f"active units of {LATENT}",
                "in use": f"units in use of {LATENT}", "eta2": "η², mean of active units"}
    fig, axes = common.panels(1, 4, 3.5, 3.2)
    for ax, (key, title) in zip(axes, measures.items()):
        found = torch.stack([at[f"T {T:g}"][key] for T in TEMPERATURES])  # (temperatures, runs)
        deviation = found.std(1, correction=min(1, found.shape[1] - 1))  # of one run: 0
        ax.errorbar(TEMPERATURES, found.mean(1), deviation, marker="o", ms=4, capsize=2,
                    label="EAE, mean ± std of runs")
        ax.axhline(at["AE"][key].mean(), color=common.COLOURS[2], ls="--",
                   label="AE, the limit T = 0")
        ax.axhline(at["untrained"][key].mean(), color="0.6", ls=":", label="untrained")
        ax.axvline(bayes, color="k", ls="-.", lw=1, label="Bayesian posterior")
        ax.set(xscale="log", xlabel="temperature T, units of U", ylabel=title)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize="x-small")
    return fig


# --- verdicts ------------------------------------------------------------------------------------

def holds(claim, flags, here, earned=True):
    """Row of a claim that each run meets or does not: "yes" in all of them, "no" in none."""
    verdict = "open"
    if all(flags) and earned:
        verdict = "yes"
    elif not any(flags):
        verdict = "no"
    return dict(claim=claim, document="yes", here=here, verdict=verdict)


def learned(at, kind):
    """Has a net at most 60 % of the mean image's test error, in every run?"""
    return bool((at[kind]["mse"] < 0.6 * at["mean image"]["mse"]).all())


def image_claims(name, at):
    """Table 1, and what Section 4.2 says: at {kind: {measure: (runs,)}}."""
    good = {kind: learned(at, kind) for kind in KINDS}
    all_good = all(good.values())
    rows = []
    for kind, (error, active) in TABLE_1[name].items():
        rows.append(common.reproduced(f"{name}: {kind}, test MSE", error, at[kind]["mse"],
                                      better="lower", earned=good[kind]))
        rows.append(common.reproduced(f"{name}: {kind}, active units of {LATENT}", active,
                                      at[kind]["active"], earned=good[kind]))
    orders = ORDERS
    if name == "mnist":
        orders = ORDERS + DIGIT_ORDERS
    for claim, key, low, high in orders:
        earned = all_good
        if key == "eta2":  # random weights have some, too
            earned = all_good and bool((at["EAE"][key] > at["untrained"][key]).all())
        rows.append(common.ordered(f"{name}: {claim}", at[low][key], at[high][key], earned))
    vae = at["VAE"]["active"]
    rows.append(holds(f"{name}: VAE, at most a quarter of the units active",
                      (vae <= LATENT / 4).tolist(), common.show(vae), good["VAE"]))
    if name == "mnist":
        full = {kind: at[kind]["active"] == LATENT for kind in KINDS}
        alone = full["EAE"] & ~full["VAE"] & ~full["AE"]
        units = [f"{kind} {at[kind]['active'].mean():.3g}" for kind in KINDS]
        rows.append(holds("mnist: only the EAE uses all units", alone.tolist(), "; ".join(units),
                          all_good))
    return rows


def face_claims(at):
    """What Section 4.3 says: at {"high T": ..., "low T": ...} of {measure: (runs,)}."""
    hot, cold = at["high T"], at["low T"]
    apart = hot["mse"] / hot["mean face"] - 1  # a generic face, neither noise nor blank
    good = bool((cold["mse"] < cold["mean face"] / 2).all() and (apart < 0.1).all())
    return [holds("celeba: high T gives a generic face (the mean's MSE ± 10 %)",
                  (apart.abs() < 0.1).tolist(), f"{apart.mean():+.1%}", good),
            common.ordered("celeba: MSE, low T below high T", cold["mse"], hot["mse"], good),
            common.ordered("celeba: how faces differ, high T below low T (by real)",
                           hot["distinct"], cold["distinct"], good),
            common.ordered("celeba: deviation of U over encoders, low T below high T",
                           cold["loss deviation"], hot["loss deviation"], good)]


def wave_claims(found):
    """What Section 4.1 says, of each run's measures."""
    good = all(run["error"] < 0.5 for run in found)
    others = [set(run["terms"]) - {"z1", "z2", "sin z1", "sin z2"} for run in found]
    union = set().union(*others)
    names = ", ".join(name for name in CANDIDATES if name in union)
    attract = [run["attractor"] for run in found]
    mixed = [run["minority"] for run in found]
    return [holds("waves: only linear and sine terms are significant",
                  [run["terms"] and not more for run, more in zip(found, others)],
                  f"others: {names or 'none'}", good),
            holds("waves: it is an attractor: from 0.5 and 1.5 radii to 1", attract,
                  f"in {sum(attract)} of {len(found)} runs", good),
            holds("waves: both senses of rotation in an ensemble (above 5 %)",
                  [share > 0.05 for share in mixed], f"at most {max(mixed):.0%}", good)]


def sweep_claims(at):
    """What Section 3.3 says of T: at {"T 1e-09", ...: {measure: (runs,)}}."""
    mild, hot = at["T 1e-07"], at["T 0.001"]
    good = learned(at, "T 1e-07")
    return [common.ordered("temperature: MSE at 1e-7 below 1e-3", mild["mse"], hot["mse"], good),
            common.ordered("temperature: variance of a unit at 1e-7 below 1e-3", mild["variance"],
                           hot["variance"], good),
            common.ordered("temperature: digits read by a linear probe, 1e-3 below 1e-7",
                           hot["probe"], mild["probe"], good)]


# --- experiments ---------------------------------------------------------------------------------

def table_of(at, keys, head):
    """Means over the runs, without verdicts: at {name: {key: (runs,)}}."""
    rows = []
    for name, measures in at.items():
        row = {head: name}
        for key in keys:
            if key in measures:
                row[key] = f"{measures[key].mean():.3g}"
        if len(row) > 1:
            rows.append(row)
    return rows


def log_rows(name, log):
    """Rows of metrics.csv: means over at most 200 blocks of a log's steps."""
    rows = []
    terms = TERMS[:log.shape[1]]
    for block, values in enumerate(common.in_blocks(log, 200).tolist(), 1):
        rows.append({"net": name, "block": block} | dict(zip(terms, values)))
    return rows


def thermometer_rows(eaes):
    """Both temperatures, in T: the last tenth of the training, and the ensemble at rest."""
    rows = []
    for name, unit in eaes.items():
        tenth = max(1, len(unit["log"]) // 10)
        _, _, kinetic, configurational = unit["log"][-tenth:].mean(0)
        _, _, kinetic_at_rest, at_rest = unit["at rest"].mean(0)
        rows.append({"EAE": name, "kinetic, training": f"{kinetic:.3g}",
                     "configurational": f"{configurational:.3g}",
                     "kinetic, at rest": f"{kinetic_at_rest:.3g}",
                     "configurational, at rest": f"{at_rest:.3g}"})
    return rows


def tasks_of(name, titles, seeds):
    """{unit: (k, title)}: a work unit of every net `title` for the k-th of all seeds."""
    tasks = {}
    for k in range(seeds):
        for title in titles:
            tasks[f"{name}-{k + 1}-{title.replace(' ', '-')}"] = k, title
    return tasks


def compare(run, args, name, nets, data):
    """Train and measure nets {title: (kind, Setting)} on images, from every seed.

    Returns the units, {title: {measure: (runs,)}} with yardsticks, and the models of run 1.
    """
    x, _, x_test, _ = data
    tasks = tasks_of(name, nets, args.seeds)

    def train_unit(unit):
        k, title = tasks[unit]
        kind, s = nets[title]
        return train_digits(unit, kind, x, s, args.seed + k)

    units = run.units(list(tasks), train_unit)
    axes = principal_axes(x)
    found = {title: [] for title in [*nets, "untrained"]}
    models = {}
    controls = tasks_of(name, ["untrained"], args.seeds)
    for unit, (k, title) in (tasks | controls).items():
        if unit in controls:
            model = untrained_model(args.seed + k, x.shape[1], x.device)
        else:
            model = digit_model(nets[title][0], units[unit], x.shape[1], x.device)
            models.setdefault(title, model)
        g = common.generator(args.seed + k, f"{name} evaluation", x.device)
        found[title].append(measure_digits(model, data, axes, g))
    at = {title: common.over_repeats(measures) for title, measures in found.items()}
    g = common.generator(args.seed, f"{name} yardsticks", x.device)
    for what, measures in yardsticks(x_test, axes, g).items():
        at[what] = common.over_repeats([measures] * args.seeds)
    return units, at, models


def digits(run, args, name, data):
    """Section 4.2 on MNIST or Frey Faces: (results, claims, tables, units)."""
    s = setting_of(args, name)
    _, _, x_test, y_test = data
    units, at, models = compare(run, args, name, {kind: (kind, s) for kind in KINDS}, data)
    g = common.generator(args.seed, f"{name} figures", x_test.device)
    codes = {kind: codes_of(model, x_test, g) for kind, model in models.items()}
    shown = torch.randperm(len(x_test), generator=g, device=x_test.device)[:16]
    sheet = {"test images": x_test[shown]}
    for kind, model in models.items():
        sheet[kind] = reconstruct(model, codes[kind].mean[shown])
    title = data_name(name, args.dataset)
    run.figure(plot_sheet(sheet), f"{name}_reconstructions",
               f"{title}: test images and reconstructions")
    beyond = f"Beyond the document: {name}, "
    columns = ["mse", "active", "in use", "rise", "variance", "motion", "eta2", "probe",
               "multimodal", "between", "generated"]
    tables = {beyond + "means over the runs": table_of(at, columns[:6], "net")}
    if name == "mnist":
        tables[beyond + "latents"] = table_of(at, columns[6:], "net")
        plot_digits(run, title, models, codes, x_test, y_test)
    return at, image_claims(name, at), tables, units


def plot_digits(run, title, models, codes, x_test, y_test):
    """Figs. 2a, 2b and 5."""
    alpha = torch.linspace(0, 1, 9, device=x_test.device)
    run.figure(plot_sheet(digit_paths(models, codes, x_test, y_test, alpha),
                          [f"{a:.3g}" for a in alpha.tolist()] * 2), "2a_interpolation",
               f"Fig. 2a, {title}: between the mean codes of 3 and 8, and of 4 and 9, by α")
    active = torch.stack([code.variance > ACTIVE for code in codes.values()]).sum(0)
    units = active.argsort(descending=True, stable=True)[:4].sort().values.tolist()
    run.figure(plot_histograms(codes, y_test, units), "2b_latents",
               f"Figs. 2b and 5, {title}: latents of test images by digit; a: activity")


def train_faces(name, x, x_test, s, seed):
    """A work unit: an EAE of bytes x (n, 3, 64, 64); all temperatures of a seed start alike.

    Its ensemble (M, len(x_test) D + 1) are the codes of x_test, and U of one fixed batch.
    """
    encoder, decoder = build(face_nets, seed, "celeba", x.device)
    g = common.generator(seed, "celeba batches", x.device)
    fixed = x[:256].float() / 255

    def loss(i):
        images = x[i].float() / 255  # bytes until here: a quarter of the memory
        return F.mse_loss(decoder(encoder(images)), images)

    def take():
        codes = torch.cat([encoder(part) for part in x_test.split(100)])
        U = F.mse_loss(decoder(encoder(fixed)), fixed)
        return torch.cat([codes.flatten(), U[None]])

    return simmer(name, loss, len(x), encoder, decoder, s, g, take)


def faces(run, args, name, data):
    """Section 4.3: CelebA at a high and at a low temperature."""
    low = setting_of(args, name)
    temperatures = {"high T": HOT, "low T": low.T}
    x, _, x_test, _ = data
    x_test = x_test[:1000].float() / 255
    tasks = tasks_of(f"{name}-{len(x)}", temperatures, args.seeds)

    def train_unit(unit):
        k, title = tasks[unit]
        return train_faces(unit, x, x_test, low._replace(T=temperatures[title]), args.seed + k)

    units = run.units(list(tasks), train_unit)
    mean = torch.zeros_like(x_test[0], dtype=torch.double)
    for part in x.split(1000):
        mean += part.double().sum(0) / (255 * len(x))
    found = {title: [] for title in temperatures}
    sheet = {"test images": x_test[:12]}
    for unit, (k, title) in tasks.items():
        _, decoder = face_nets()
        decoder.load_state_dict(units[unit]["decoder"])
        ensemble = units[unit]["ensemble"].to(x.device)
        measures, x_hat = measure_faces(decoder.to(x.device), ensemble, x_test, mean.float())
        found[title].append(measures)
        if k == 0:
            sheet[f"{title} = {temperatures[title]:g}"] = x_hat[:12]
    at = {title: common.over_repeats(measures) for title, measures in found.items()}
    title = data_name(name, args.dataset)
    run.figure(plot_sheet(sheet, width=0.9), "3_faces",
               f"Fig. 3b and c, {title}: faces at a high and a low temperature")
    columns = ["mse", "mean face", "distinct", "loss deviation"]
    beyond = f"Beyond the document: {name}, "
    tables = {beyond + "means over the runs": table_of(at, columns, "EAE")}
    return at, face_claims(at), tables, units


@torch.no_grad()
def measure_faces(decoder, ensemble, x_test, mean):
    """Measures of test faces x_test, reconstructed from the ensemble's mean codes, and these."""
    z = ensemble[:, :-1].mean(0).view(len(x_test), -1)  # (n, D)
    x_hat = torch.cat([decoder(part).clamp(0, 1) for part in z.split(100)])
    found = {"mse": ((x_hat - x_test) ** 2).mean(),
             "mean face": ((x_test - mean) ** 2).mean(),
             "distinct": x_hat.var(0).mean() / x_test.var(0).mean(),
             "loss deviation": ensemble[:, -1].std()}
    return {key: value.item() for key, value in found.items()}, x_hat


def wave_measures(encoder, decoder, x, x_t):
    """(26,) of one encoder on test waves: Xi, the first frame's code, both relative errors."""
    x_hat, x_hat_t, Xi, z = reconstruct_waves(encoder, decoder, x, x_t)
    error = squared_error(x_hat, x) / (x ** 2).sum(1).mean()
    error_t = squared_error(x_hat_t, x_t) / (x_t ** 2).sum(1).mean()
    return torch.cat([Xi.flatten(), z[0], torch.stack([error, error_t])])


def train_waves(name, train_set, test_set, s, seed):
    """A work unit: an EAE of the waves; its ensemble is wave_measures of every encoder."""
    x, x_t = train_set
    encoder, decoder = build(wave_nets, seed, name, x.device)
    g = common.generator(seed, f"{name} batches", x.device)

    def loss(i):
        x_hat, x_hat_t, _, _ = reconstruct_waves(encoder, decoder, x[i], x_t[i])
        first, second = WEIGHTS
        return first * squared_error(x_hat, x[i]) + second * squared_error(x_hat_t, x_t[i])

    def take():
        return wave_measures(encoder, decoder, *test_set)

    return simmer(name, loss, len(x), encoder, decoder, s, g, take)


def orbits(Xi, start, turns):
    """Paths (steps, R, 2) of systems Xi (R, 11, 2) from start (R, 2)."""
    steps = round(turns * 2 * math.pi / (OMEGA * FRAME))
    return integrate(Xi, start, FRAME, steps)


def measure_ensemble(ensemble):
    """What an ensemble (M, 26) of wave_measures says of the dynamics, and paths of one member."""
    every = max(1, len(ensemble) // 100)
    Xi = ensemble[:, :22].view(-1, 11, 2)
    some, start = Xi[::every], ensemble[::every, 22:24]
    omega = rotation_rate(orbits(some, start, 3), FRAME)  # (R,): of whole turns
    finite = omega[omega.isfinite()]  # a path that leaves all bounds has no sense of rotation
    positive = int((finite > 0).sum())
    negative = int((finite < 0).sum())
    # from 0.5 and from 1.5 times the codes' radius, side by side
    path = orbits(torch.cat([some, some]), torch.cat([0.5 * start, 1.5 * start]), 14)
    last_turn = path[-len(path) // 14:]
    radius = ((last_turn ** 2).sum(2).mean(0) / 2).sqrt()  # (2 R,): of the codes it is 1
    radius = radius.nan_to_num(math.inf, math.inf)  # a median with one nan would be nan
    inner, outer = radius.chunk(2)
    end_radius = [inner.median().item(), outer.median().item()]
    paths = {0.5: path[:, 0], 1.5: path[:, len(some)]}
    mean, mode, large = significant(Xi)
    terms = [name for name, one in zip(CANDIDATES, large.any(1)) if one]
    pair = torch.stack([Xi[:, 1, 0], Xi[:, 0, 1]])  # of z2 in dz1/dt, of z1 in dz2/dt
    r = math.nan
    if len(Xi) > 1:
        r = torch.corrcoef(pair)[0, 1].item()
    return {"error": ensemble[:, 24].mean().item(), "error of dx/dt": ensemble[:, 25].mean().item(),
            "omega": finite.abs().median().item(), "minority": min(positive, negative) / len(omega),
            "correlation": r, "terms": terms, "end radius": end_radius,
            "attractor": all(abs(radius - 1) < 0.1 for radius in end_radius),
            "mean": mean.tolist(), "mode": mode.tolist()}, paths


def waves(run, args, name, _):
    """Section 4.1: the reaction-diffusion system."""
    s = setting_of(args, name)
    data = run.unit("waves", lambda: wave_modes(s.size, args.device))
    x = data["x"].to(args.device)  # (frames, MODES)
    x_t = data["x_t"].to(args.device)
    count = len(x) * 9 // 10  # the last tenth, in time, is the test set
    g = common.generator(args.seed, "waves split", args.device)
    index = torch.randperm(count, generator=g, device=x.device)[:len(x) * 4 // 10]
    train_set = x[index], x_t[index]
    test_set = x[count:], x_t[count:]
    names = [f"waves-{k + 1}" for k in range(args.seeds)]

    def train_unit(unit):
        return train_waves(unit, train_set, test_set, s, args.seed + names.index(unit))

    units = run.units(names, train_unit)
    found, paths = [], []
    for unit in names:
        measures, path = measure_ensemble(units[unit]["ensemble"])
        found.append(measures)
        paths.append(path)
    encoder, decoder = build(wave_nets, args.seed, "untrained waves", args.device)
    with torch.no_grad():
        control, _ = measure_ensemble(wave_measures(encoder, decoder, *test_set)[None].cpu())
        encoder.load_state_dict(units["waves-1"]["encoder"])
        decoder.load_state_dict(units["waves-1"]["decoder"])
        x_hat, x_hat_t, _, z = reconstruct_waves(encoder, decoder, *test_set)

    frames = [0, 40, 80]
    fields = [field[frames].cpu() for field in (*test_set, x_hat, x_hat_t)]
    run.figure(plot_waves(data["basis"], data["norm"], *fields,
                          [f"t = {(count + k) * FRAME:g}" for k in frames]), "1a_waves",
               "Fig. 1a to c: test waves, run 1")
    ensembles = [units[unit]["ensemble"][:, :22].view(-1, 11, 2) for unit in names]
    run.figure(plot_dynamics(ensembles, z.cpu(), paths[0]), "1d_dynamics",
               "Fig. 1d to f: the dynamics that the encoders identify")
    run.figure(plot_correlations(ensembles[0]), "4_correlations",
               "Fig. 4: correlations of the coefficients, run 1")
    beyond = "Beyond the document: waves, "
    told = dict(zip(names, found)) | {"untrained": control}
    tables = {beyond + f"the runs; {MODES} modes miss {data['missed']:.0e} of the squares":
              wave_rows(told),
              beyond + "Table 4, mean; mode of run 1 beside the document's": table_4(found[0]),
              beyond + "the document's Table 4, integrated": integrated_table_4()}
    return {"runs": told, "missed": data["missed"]}, wave_claims(found), tables, units


def wave_rows(told):
    """A row for each run, for nets that are not trained, and the rate of the data."""
    rows = []
    for name, run in told.items():
        inner, outer = run["end radius"]
        rows.append({"EAE": name, "error of x": f"{run['error']:.3g}",
                     "error of dx/dt": f"{run['error of dx/dt']:.3g}",
                     "ω": f"{run['omega']:.4f}",
                     "r of Fig. 1d": f"{run['correlation']:.2f}",
                     "from 0.5 radii": f"{inner:.2g}", "from 1.5": f"{outer:.2g}"})
    rows.append({"EAE": "the data", "ω": f"{OMEGA}"})
    return rows


def table_4(run):
    """Table 4 beside the document's."""
    rows = []
    for j, term in enumerate(CANDIDATES):
        row = {"term": term}
        for d in (0, 1):
            here = f"{run['mean'][j][d]:.2f}; {run['mode'][j][d]:.2f}"
            row[f"dz{d + 1}/dt"] = here
            theirs = f"{TABLE_4['mean'][d][j]:.2f}; {TABLE_4['mode'][d][j]:.2f}"
            row[f"dz{d + 1}/dt, document"] = theirs
        rows.append(row)
    return rows


def integrated_table_4():
    """Where the document's own coefficients lead: from (1, 0), after 100 units of time."""
    Xi = torch.tensor([*TABLE_4.values()], dtype=torch.double).transpose(1, 2)  # (2, 11, 2)
    start = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.double)
    path = integrate(Xi, start, FRAME, 2000)  # (2001, 2, 2)
    omega = rotation_rate(path[-400:], FRAME)
    rows = []
    for k, name in enumerate(TABLE_4):
        J = Xi[k, :2] + Xi[k, 9:]  # at the origin sin z = z; (2, 2), transposed
        value = torch.linalg.eigvals(J)[0]
        rows.append({"coefficients": name, "eigenvalues at 0":
                     f"{value.real:.3f} ± {abs(value.imag):.2f}i",
                     "radius at the end": f"{path[-1, k].norm():.2g}", "ω": f"{omega[k]:.2f}",
                     "ω of the data": f"{OMEGA}"})
    return rows


def sweep(run, args, name, data):
    """Section 3.3 in figures: EAEs over T, and the AE as the limit of T = 0."""
    s = setting_of(args, name)
    nets = {"AE": ("AE", s)}
    for T in TEMPERATURES:
        nets[f"T {T:g}"] = "EAE", s._replace(T=T)
    units, at, _ = compare(run, args, "sweep", nets, data)
    n, pixels = data[0].shape
    bayes = 1 / (n * pixels)  # U is a mean over images and pixels, the posterior a sum
    run.figure(plot_sweep(at, bayes), "temperature",
               f"{data_name(name, args.dataset)}: EAEs by temperature")
    columns = ["mse", "active", "in use", "variance", "motion", "eta2", "probe"]
    title = f"Beyond the document: EAEs by T; the Bayesian posterior has T = {bayes:.2g}"
    return at, sweep_claims(at), {title: table_of(at, columns, "net")}, units


# --- main ----------------------------------------------------------------------------------------

EXPERIMENTS = {"mnist": digits, "frey": digits, "celeba": faces, "reaction-diffusion": waves,
               "temperature": sweep}


def data_name(name, dataset):
    if name == "reaction-diffusion":
        return "simulated waves"
    title = {"frey": "Frey Faces", "celeba": "CelebA"}.get(name, "MNIST")
    if dataset == "glyphs":
        return f"glyphs in place of {title}"
    return title


def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add
    add("--experiment", nargs="+", choices=[*EXPERIMENTS, "all"], default=["mnist"],
        metavar="NAME", help=f"of {', '.join(EXPERIMENTS)}; all: all that there is data for")
    add("--dataset", choices=["real", "glyphs"],
        help="real: the experiments' own images; glyphs: digits drawn here in their place")
    add("--seeds", type=number(int, 1, 100), help="seeds, counted from --seed; 1: no verdicts")
    add("--temperature", type=number(float, 1e-15, 1e3), metavar="T",
        help="of the EAEs, in units of U (of celeba the low one), if not the experiment's own")
    add("--step", type=number(float, 1e-9, 1e3), metavar="DT",
        help="time step of the sampler, if not the experiment's own")
    add("--updates", type=number(int, 1, 10**7),
        help="decoder updates, if not the experiment's own")
    add("--samples", type=number(int, 1, 10**7), metavar="K",
        help="encoders of an update, if not the experiment's own")
    args = parser.parse(argv)
    if args.temperature and args.experiment == ["temperature"]:
        parser.error("argument --temperature: this experiment has its own temperatures")
    if args.temperature and args.temperature >= HOT and {"celeba", "all"} & {*args.experiment}:
        parser.error(f"argument --temperature: of celeba the low one, below {HOT:g}")
    return args


def setting_of(args, name):
    """The experiment's Setting, as the preset changes it and the flags."""
    s = SETTINGS[name]._replace(**CHANGES.get(args.preset, {}).get(name, {}))
    flags = {"T": args.temperature, "dt": args.step, "updates": args.updates,
             "samples": args.samples}
    for field, value in flags.items():
        if value is not None:
            s = s._replace(**{field: value})
    return s


def load_data(args, name):
    if name == "reaction-diffusion":
        return None  # it is simulated
    return load_images(name, args.dataset, setting_of(args, name).size, args.data, args.device)


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    data = {}
    everything = "all" in args.experiment
    for name in EXPERIMENTS:
        if everything or name in args.experiment:
            try:
                data[name] = load_data(args, name)
            except SystemExit:
                if not everything:
                    raise
                common.note(f"note: {name} is left out")
    args.experiment = list(data)
    label = f"seeds from {args.seed}"
    if args.dataset == "glyphs":
        label += ", glyphs for images"
    with common.Run(__file__, args, label, additive=["experiment", "seeds"]) as run, \
            warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")  # torch.func's own
        results, closing, tables, metrics = {}, [], {}, []
        for name, experiment in EXPERIMENTS.items():
            if name not in args.experiment:
                continue
            if name not in data:  # an earlier command in this folder ran it
                data[name] = load_data(args, name)
            results[name], claims, beyond, units = experiment(run, args, name, data[name])
            closing += claims
            tables |= beyond
            eaes = {unit: found for unit, found in units.items() if "at rest" in found}
            eaes = dict(list(eaes.items())[:7])  # the first ones, in figure and table
            run.figure(plot_training(eaes), f"{name}_training",
                       f"{data_name(name, args.dataset)}: training of EAEs, as Fig. 3a")
            tables[f"Beyond the document: {name}, thermometers by T"] = thermometer_rows(eaes)
            for unit, found in units.items():
                metrics += log_rows(unit, found["log"])
        judged = args.preset != "smoke" and args.seeds > 1  # something learned, a spread
        return run.finish(results, closing, tables, metrics, judged)


if __name__ == "__main__":
    main()
