"""Entropic autoencoders: no prior, but an ensemble of encoders at a temperature.

Reproduces "Entropic Auto-Encoding via Implicit Free-Energy Minimization". The reconstruction loss
U is the only objective. Under a fixed decoder phi the encoder's weights theta are particles in the
potential U, held at the temperature T by a Nose-Hoover chain (Simmering), so that they sample

    p(theta) = exp(-U(theta, phi) / T) / Z(phi),                              Eqs. (1), (8)

and the decoder descends its free energy -T log Z, whose gradient is an average (Algorithm 1):

    dF/dphi = <dU/dphi> over the encoders sampled under this decoder          Eqs. (7), (10)

    python eae_simmering.py                                    MNIST: 5 minutes on 2 CPU cores
    python eae_simmering.py --experiment reaction-diffusion    a wave's equations of motion: 8
    python eae_simmering.py --experiment all                   everything that there is data for: 33
    python eae_simmering.py --sampler langevin --out out/langevin    another thermostat

A run leaves figures, results.json, metrics.csv and the nets (units/*.pt) in
out/eae_simmering-<preset>; `all` afterwards puts together what single experiments left there. It
has not been timed on a GPU.

What the document leaves open or its text lost, and what we chose:
* MNIST and Frey nets are 784-256-256-64 (560-...) and back with ReLU, U is the mean binary cross-
  entropy of a pixel; of CelebA it is the squared error. Temperatures and time steps: see SETTINGS.
* All velocities, the thermostats' too, are drawn anew every 20 steps, as the document does every 5
  for the waves. Without it (--redraw 0) the latents' variance ran into the thousands in trials, as
  nothing confines the scale of a ReLU encoder.
* quick has many updates of few samples each, which costs minutes; the document's few updates of
  thousands are `paper`. VAE and AE have the EAE's batches; their rate falls to 0 in the last half.
* Appendix A.4, which is lost: M encoders are kept, one every 20 steps under the trained decoder.
  The code of an image is its mean over them, its reconstruction that of the mean code. To generate,
  up to 10,000 training images are encoded by one of them each, Eq. (2), 20 Gaussians are fitted to
  the k-means clusters of these codes, and draws from them are decoded ("mixture"); or one Gaussian.
* Active units have a variance above 0.01 over images and encoders. Informative ones have it as
  covariance between the mean codes of the ensemble's halves: the encoder's own motion, which tells
  nothing about an image, has none.
* CelebA: all kernels are 3x3, but as large as the stride where a transposed layer has one of 4; the
  last layer has no ReLU, under which pixels die.
* The nets of the waves see 64 POD modes, which hold the data to 1e-14 of its variance: weights
  outside of them would neither act nor be acted on (--modes 10000: pixels). Adam's rate of the last
  layer is ten times as high there, since a mode stands for many pixels. Eq. (16) is taken as least
  squares in dz/dt, with a ridge: on a limit cycle its candidates are collinear. Eq. (14) has the
  weights 1 and 0.5. Every run has one decoder; Fig. 1e, f show a run of either sense of rotation.
"""
import functools
import math
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import common

# B batch, D latent, N weights of the encoder, M members of its ensemble, K encoders per update
PRESETS = {
    "smoke": dict(dataset="glyphs", runs=2, grid=32, modes=64, judge_steps=60),
    "quick": dict(dataset="real", runs=4, grid=100, modes=64, judge_steps=2000),
    "paper": dict(dataset="real", runs=4, grid=100, modes=10_000, judge_steps=2000),
}
EXPERIMENTS = ("mnist", "frey", "celeba", "reaction-diffusion", "temperature")


class Setting(NamedTuple):
    """An EAE: its thermostat (lengths of time in steps), then what it costs."""
    temperature: float             # T, in the unit of the loss
    final_temperature: float = -1  # end of a geometric schedule; -1: T is constant
    sampler: str = "nose-hoover"
    mass: float = 1.0
    step: float = 0.5              # time step of the integrator
    chain: int = 30                # thermostats in a row
    tau: float = 10                # thermostat time; of langevin: 1 / friction
    redraw: int = 20               # steps between new Maxwell velocities; 0: never
    substeps: int = 1              # of the chain, and Suzuki-Yoshida's three in each of them
    suzuki_yoshida: bool = False
    rate: float = 1e-3             # Adam's, of decoder, VAE and AE
    updates: int = 1200            # of the decoder
    samples: int = 20              # encoders per update, K
    batch: int = 128
    members: int = 50              # encoders kept after the training, M, one every `stride` steps
    stride: int = 20
    vae: int = 8000                # Adam's steps for the VAE
    ae: int = 8000                 # and for the AE
    size: int = 0                  # images or frames; 0: all


SETTINGS = {  # the physics of each experiment; hot: celeba's high temperature
    "mnist": Setting(1e-7), "temperature": Setting(1e-7), "frey": Setting(1e-7),
    "celeba": Setting(1e-9, step=1.0), "hot": Setting(1e-4, step=1.0),
    "reaction-diffusion": Setting(1e-7, step=0.02, redraw=5, rate=1e-2)}
WAVES = dict(updates=100, samples=200, batch=256, members=5000, stride=1, size=10_000)
TINY = dict(updates=6, samples=5, batch=32, members=3, stride=2, vae=30, ae=30)
COSTS = {  # where they differ from the defaults of Setting
    "smoke": {"mnist": TINY, "frey": TINY, "temperature": TINY,
              "celeba": TINY | dict(batch=8, size=100),
              "reaction-diffusion": TINY | dict(members=20, size=1000)},
    "quick": {"mnist": dict(vae=16_000), "frey": dict(batch=256, vae=12_000, ae=6000),
              "celeba": dict(updates=640, samples=5, batch=32, members=20, size=10_000),
              "temperature": dict(updates=360, members=20),
              "reaction-diffusion": WAVES},
    "paper": {"mnist": dict(updates=250, samples=3126, batch=32, vae=109_410, ae=218_820),
              "frey": dict(updates=1500, samples=1000, batch=2000, members=100, stride=10,
                           vae=10_000, ae=10_000),
              "celeba": dict(updates=700, samples=5087, batch=32, members=100, stride=10),
              "temperature": dict(updates=900), "reaction-diffusion": WAVES}}
KINDS = ("EAE", "VAE", "AE")
LATENT, ACTIVE = 64, 0.01  # units of the images' nets; variance of an active one
CHECK = 20                 # steps between looks at the losses and at the checkpoint
BETAS = (0.01, 0.1, 0.3, 1, 3, 10)
TEMPERATURES = (0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
SUZUKI_YOSHIDA = (0.828981543588751, -0.657963087177502, 0.828981543588751)
SIGNIFICANT, RIDGE, WEIGHTS, OMEGA = 0.1, 1e-3, (1.0, 0.5), 0.9077
CANDIDATES = tuple("z1 z2 z1² z1z2 z2² z1³ z1²z2 z1z2² z2³".split()) + ("sin z1", "sin z2")
DOCUMENT = {  # Table 1: test MSE and active units of 64
    "mnist": {"EAE": (0.026, 64), "VAE": (0.016, 16), "AE": (0.010, 53)},
    "frey": {"EAE": (0.0052, 64), "VAE": (0.0046, 3), "AE": (0.0014, 64)}}
TABLE_4 = """0.47 0.48 -1.98 -1.98
    1.00 1.17 -1.37 -0.38
    0.00 0.00 0.01 0.00
    0.00 0.00 -0.03 -0.03
    -0.03 -0.01 -0.03 -0.01
    0.00 -0.01 -0.05 -0.07
    -0.02 -0.03 0.09 -0.03
    -0.03 -0.03 0.14 -0.03
    0.03 0.02 0.09 0.02
    0.36 0.31 0.13 0.31
    0.86 0.81 0.11 0.85"""  # of CANDIDATES: mean and mode in dz1/dt, mean and mode in dz2/dt
FREY = "https://cs.nyu.edu/~roweis/data/frey_rawface.mat"
CELEBA = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


# --- data ----------------------------------------------------------------------------------------

def load_images(experiment, dataset, size, folder, device):
    """(x, y, x_test, y_test): pixels in [0, 1] (n, pixels), of celeba uint8 (n, 3, 64, 64), and
    labels (none: zeros). Of MNIST's training images 10,000 stay apart; the faces are split 80 to 10
    (unused) to 10 %, Frey's at random, CelebA's in order, which is nearly its standard split.
    """
    if dataset == "glyphs":
        count = size or 1000
        x, y = common.glyphs(count, 0, 3 if experiment == "celeba" else 1, device)
        if experiment == "celeba":
            x = (F.interpolate(x, size=64, mode="bilinear") * 255).byte()
        else:
            x = (x[..., 4:24] if experiment == "frey" else x).flatten(1)
    elif experiment in ("frey", "celeba"):
        x = (frey_faces(folder) if experiment == "frey" else celeba(folder, size)).to(device)
        y = torch.zeros(len(x), dtype=torch.long, device=device)
    else:
        x, y = common.images("mnist", True, folder, device)
        x_test, y_test = common.images("mnist", False, folder, device)
        return x[:50_000].flatten(1), y[:50_000], x_test.flatten(1), y_test
    a, b = int(0.8 * len(x)), int(0.9 * len(x))
    return x[:a], y[:a], x[b:], y[b:]


def frey_faces(folder):
    """The 1,965 Frey Faces in random order: (1965, 560) in [0, 1], rows of 28x20 images."""
    from scipy.io import loadmat
    path = pathlib.Path(folder) / "frey_rawface.mat"
    try:
        faces = torch.from_numpy(loadmat(path)["ff"]).T.float() / 255
    except Exception as error:  # missing, cut short, or another file: many kinds
        common.die(f"cannot read {path} ({' '.join(str(error).split())[:80]}): Frey Faces are "
                   f"published at {FREY}; put that file there")
    return faces[torch.randperm(len(faces), generator=common.generator(0, "frey"))].contiguous()


def celeba(folder, size):
    """Aligned faces from folder/celeba/img_align_celeba: uint8 (n, 3, 64, 64), 0: all of them.

    The centre square of 128/178 of the width, brought to 64x64: of half-size images a plain crop.
    """
    import numpy
    from PIL import Image
    home = pathlib.Path(folder) / "celeba" / "img_align_celeba"
    paths = sorted(home.glob("*.jpg"))
    if not paths:
        try:
            from torchvision import datasets
            datasets.CelebA(folder, "all", download=True)
        except Exception as error:  # no network, quota, read-only folder: many kinds
            common.die(f"no CelebA images in {home} ({' '.join(str(error).split())[:80]}): they "
                       f"are published at {CELEBA}; unpack img_align_celeba there")
        paths = sorted(home.glob("*.jpg"))
    faces = []
    for path in tqdm(paths[:size or None], "reading faces", disable=None, leave=False):
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            common.die(f"cannot read {path}: {error}")
        w, h = image.size
        half = round(w * 32 / 89)
        image = image.crop((w // 2 - half, h // 2 - half, w // 2 + half, h // 2 + half))
        faces.append(torch.from_numpy(numpy.array(image.resize((64, 64)))).permute(2, 0, 1))
    return torch.stack(faces)


def spiral(frames, n=100, length=20.0, d=0.1, beta=1.0, dt=0.05, tolerance=1e-5, checkpoint=None,
           device="cpu"):
    """The lambda-omega spiral of the document's Fig. 1 and its time derivative, in POD modes.

    w = u + iv obeys w_t = (1 - |w|^2) w - i beta |w|^2 w + d Laplace(w), periodic, in Fourier space
    by an integrating factor and Runge-Kutta 4; u and u_t are multiplied by exp(-r^2 / 100). A frame
    is its coefficients in a basis that grows with every 100 frames by what it misses by more than
    the tolerance. Returns basis (r, n^2), orthonormal, u and u_t (frames, r), by falling variance.
    """
    x = torch.arange(n, dtype=torch.double, device=device) * length / n - length / 2
    Y, X = torch.meshgrid(x, x, indexing="ij")
    r, angle = (X ** 2 + Y ** 2).sqrt(), torch.atan2(Y, X)
    k = 2 * math.pi * torch.fft.fftfreq(n, length / n, dtype=torch.double, device=device)
    linear = -d * (k[:, None] ** 2 + k ** 2)
    half, window = torch.exp(linear * dt / 2), torch.exp(-0.01 * r ** 2)
    whole, ifft = half ** 2, torch.fft.ifft2

    def reaction(W):
        w = ifft(W)
        A2 = w.real ** 2 + w.imag ** 2
        return torch.fft.fft2(w * torch.complex(1 - A2, -beta * A2))

    def frame(W):
        return (ifft(W).real * window).flatten()

    W = torch.fft.fft2(torch.polar(torch.tanh(r), angle - r))
    first, basis, parts = 0, torch.zeros(0, n * n, dtype=torch.double, device=device), []
    if checkpoint and checkpoint.state:
        first, W, basis, parts = checkpoint.restore()
    for chunk in tqdm(range(first, frames // 100), "spiral", frames // 100, initial=first,
                      disable=None):
        u, u_t = [], []
        for _ in range(100):
            a = reaction(W)
            u.append(frame(W))
            u_t.append(frame(a + linear * W))
            b = reaction(half * (W + dt / 2 * a))
            c = reaction(half * W + dt / 2 * b)
            e = reaction(whole * W + dt * half * c)
            W = whole * W + dt / 6 * (whole * a + 2 * half * (b + c) + e)
        both = torch.stack(u + u_t)  # (200, n^2)
        missed = both - both @ basis.T @ basis
        if missed.abs().max() > tolerance:
            _, s, new = torch.linalg.svd(missed, full_matrices=False)
            new = new[s > tolerance]
            basis = torch.cat([basis, torch.linalg.qr((new - new @ basis.T @ basis).T).Q.T])
        parts.append(both @ basis.T)
        if len(parts) > 1 and checkpoint and checkpoint.due():
            checkpoint.save((chunk + 1, W, basis, parts))
    return to_modes(basis, parts)


def to_modes(basis, parts):
    """Rotate coefficients (200, <= r), u above u_t, into modes of falling variance."""
    r = len(basis)
    both = torch.stack([F.pad(part, (0, r - part.shape[1])) for part in parts])
    u, u_t = both.view(len(parts), 2, -1, r).transpose(0, 1).reshape(2, -1, r)
    _, _, modes = torch.linalg.svd(torch.cat([u, u_t]), full_matrices=False)
    return modes @ basis, u @ modes.T, u_t @ modes.T


# --- model ---------------------------------------------------------------------------------------

def build(experiment, generator, pixels=None, modes=None, codes=LATENT):
    """{encoder, decoder} of an experiment, weights and biases as PyTorch draws them, by generator.

    mnist, frey: (B, pixels) -> (B, codes), (B, 64) -> logits (B, pixels). celeba: (B, 3, 64, 64) ->
    (B, 256) and back. reaction-diffusion: (B, modes) -> (B, 2) and back, drawn as for `pixels`.
    """
    def mlp(*sizes, active=nn.ReLU):
        pairs = list(zip(sizes, sizes[1:]))
        return nn.Sequential(*[m for a, b in pairs for m in (nn.Linear(a, b), active())][:-1])

    if experiment == "celeba":
        sizes = (3, 32, 64, 128, 256)
        down = [m for a, b in zip(sizes, sizes[1:])
                for m in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU())]
        encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(4096, 256))
        decoder = nn.Sequential(
            nn.Linear(256, 1024), nn.ReLU(), nn.Unflatten(1, (64, 4, 4)),
            nn.ConvTranspose2d(64, 64, 4, 4), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 4), nn.ReLU(), nn.ConvTranspose2d(32, 3, 3, padding=1))
    elif experiment == "reaction-diffusion":
        encoder, decoder = mlp(modes, 256, 2, active=nn.ELU), mlp(2, 256, modes, active=nn.ELU)
    else:
        encoder, decoder = mlp(pixels, 256, 256, codes), mlp(LATENT, 256, 256, pixels)
    nets = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(generator.device)
    for layer in nets.modules():
        if hasattr(layer, "weight"):
            wide = modes is not None and layer is encoder[0]
            bound = 1 / math.sqrt(pixels if wide else layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator)
            if modes is not None:  # no constant among the candidates: start centred
                nn.init.zeros_(layer.bias)
    return nets


def reconstruct(nets, z):
    """Images from codes: sigmoid of the logits; of faces the output itself, within [0, 1]."""
    out = nets["decoder"](z)
    return out.clamp(0, 1) if out.dim() == 4 else out.sigmoid()


# --- objective -----------------------------------------------------------------------------------

def reconstruction_loss(nets, x):
    """U of images: binary cross-entropy in nats of (B, pixels); of faces (B, 3, 64, 64), bytes, the
    squared error. Mean over pixels and batch: a scalar."""
    if x.dtype == torch.uint8:
        x = x.float() / 255
        return F.mse_loss(nets["decoder"](nets["encoder"](x)), x)
    return F.binary_cross_entropy_with_logits(nets["decoder"](nets["encoder"](x)), x)


def vae_loss(nets, x, beta, generator):
    """Cross-entropy + beta KL(q(z|x) || N(0, 1)), both summed and then divided by the number of
    pixels, in nats; mean over the batch: a scalar."""
    mu, logvar = nets["encoder"](x).chunk(2, 1)
    z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=generator, device=mu.device)
    kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(1).mean()
    return F.binary_cross_entropy_with_logits(nets["decoder"](z), x) + beta * kl / x.shape[1]


def candidates(z):
    """The functions of Eq. (13), as in CANDIDATES: (..., 2) -> (..., 11)"""
    a, b = z.unbind(-1)
    return torch.stack([a, b, a * a, a * b, b * b, a ** 3, a * a * b, a * b * b, b ** 3, a.sin(),
                        b.sin()], -1)


def coefficients(z, z_t, ridge=RIDGE):
    """Xi (11, 2) of Eq. (16): least squares of z_t (B, 2) in candidates(z), mean over the batch, +
    ridge |Xi|^2, without which it is not determined: on a limit cycle candidates are collinear."""
    theta = candidates(z.double())  # (B, 11)
    gram = theta.T @ theta / len(z) + ridge * torch.eye(theta.shape[1], device=z.device)
    return torch.linalg.solve_ex(gram, theta.T @ z_t.double() / len(z)).result.to(z.dtype)


def tangent(net, x, x_t):
    """net(x) and its time derivative, in forward mode: Eq. (15), for layers Linear and ELU."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            x, x_t = layer(x), x_t @ layer.weight.T
        else:
            y = layer(x)
            x, x_t = y, torch.where(x > 0, x_t, x_t * (y + 1))
    return x, x_t


def sindy_terms(nets, x, x_t, pixels):
    """Squared errors of x and x_t (B, modes), summed over modes, per pixel, mean over the batch;
    also Xi, z and z_t. Eq. (14) weighs them."""
    z, z_t = tangent(nets["encoder"], x, x_t)
    Xi = coefficients(z, z_t)
    x_hat, x_t_hat = tangent(nets["decoder"], z, candidates(z) @ Xi)
    errors = [((a - b) ** 2).sum(1).mean() / pixels for a, b in ((x, x_hat), (x_t, x_t_hat))]
    return errors, Xi, z, z_t


# --- sampler -------------------------------------------------------------------------------------

def flatten(module):
    """All weights of a module as one vector (N,), and their gradients as another: the module's
    parameters become views of them, so that one operation moves all of them."""
    parameters = list(module.parameters())
    theta = torch.cat([p.detach().flatten() for p in parameters])
    grad, sizes = torch.zeros_like(theta), [p.numel() for p in parameters]
    for p, value, slope in zip(parameters, theta.split(sizes), grad.split(sizes)):
        p.data, p.grad = value.view_as(p), slope.view_as(p)
    return theta, grad


class Sampler:
    """Weights theta (N,) of `module` as particles in a potential U, at the temperature T.

    A step is half a step of the thermostat, velocity Verlet, half a step of the thermostat. The
    thermostat is a Nose-Hoover chain with Q_1 = N T (tau dt)^2 and Q_k = T (tau dt)^2 (Martyna et
    al. 1996), whose odd and even members move in turn, so that a long chain costs no more than a
    short one; or, under "langevin", friction 1 / (tau dt) and noise, all before Verlet. At T = 0
    there is no ensemble: Adam moves the weights downhill.
    """
    tensors = ("v", "grad", "odd", "even", "heat", "kinetic")

    def __init__(self, module, setting, generator):
        s, (self.theta, self.grad) = setting, flatten(module)
        self.method = s.sampler if s.temperature else "adam"
        self.m, self.dt, self.generator, self.N = s.mass, s.step, generator, len(self.theta)
        self.rate = (s.tau * s.step) ** -2
        self.adam = torch.optim.Adam([self.theta], s.rate, fused=True)
        half = (s.chain + 1) // 2

        def zeros(n):
            return torch.zeros(n, dtype=torch.double, device=self.theta.device)

        # velocities of the chain's odd and of its even members; even[0] stands for the particles,
        # and behind the last member, odd or even, there is a wall that never moves
        self.odd, self.even = zeros(half + 1), zeros(half + 1)
        self.views = self.odd[:-1], self.even[:-1], self.even[1:], self.even[0]
        self.weight, self.moves = zeros(half) + 1, zeros(half) + 1
        self.weight[0], self.moves[-1] = self.N, 1 - s.chain % 2
        parts = SUZUKI_YOSHIDA if s.suzuki_yoshida else (1.0,)
        self.parts = [part / s.substeps for part in parts] * s.substeps
        self.heat, self.kinetic, self.zero = zeros(3)
        self.counting = False  # of the heat, which only `energy` needs
        self.v, self.every, self.count = torch.zeros_like(self.theta), s.redraw, 0
        self.redraw(s.temperature)

    def redraw(self, T):
        """New velocities of particles and thermostats, from Maxwell's distribution; what they
        gain in energy counts as heat taken."""
        if self.method == "adam":
            return
        before, none = self.energy(self.zero, T), self.zero
        self.v.normal_(generator=self.generator).mul_(math.sqrt(T / self.m))
        self.kinetic = self.v.dot(self.v).to(none) * (self.m / 2)
        if self.method == "nose-hoover":
            wide = math.sqrt(self.rate)  # of the first one: Q_1 is N times as large
            self.odd[:-1].normal_(generator=self.generator).mul_(wide / self.weight.sqrt())
            self.even[1:].normal_(generator=self.generator).mul_(wide * self.moves)
        self.heat += before - self.energy(none, T)

    def half_chain(self, T):
        """Half a time step of the Nose-Hoover chain, symmetric in time.

        Its velocities obey dv_k/dt = (Q_{k-1} v_{k-1}^2 - T) / Q_k - v_k v_{k+1}, the particles'
        dv/dt = -v_1 v. While the even ones rest, the odd ones move, and the other way round. Far
        from equilibrium one may want to outrun the time step; 10 / dt is the most it gets.
        """
        odd, even, rate, most = self.odd, self.even, self.rate, 10 / self.dt
        inner, left, right, particles = self.views
        particles.copy_(before := (self.kinetic * (2 * rate / (self.N * T))).sqrt())

        def move_odd(h):
            decay = (right * (-h / 2)).exp_()
            inner.mul_(decay).add_((left * left).sub_(rate), alpha=h).mul_(decay)
            inner.clamp_(-most, most)
            if self.counting:
                self.heat.add_(right.sum(), alpha=h * T)

        for part in self.parts:
            h = self.dt / 2 * part
            move_odd(h / 2)
            decay = (odd * (-h / 2)).exp_()
            even.mul_(decay)
            right.add_((inner * inner * self.weight).sub_(rate).mul_(self.moves), alpha=h)
            even.mul_(decay)
            right.clamp_(-most, most)
            if self.counting:
                self.heat.add_(inner.dot(self.weight), alpha=h * T)
            move_odd(h / 2)
        scale = particles / before
        self.kinetic = self.kinetic * scale * scale
        self.v.mul_(scale.to(self.v.dtype))

    def friction(self, T):
        """A whole time step of Langevin's friction and noise."""
        keep = math.exp(-self.dt * math.sqrt(self.rate))
        before = self.v.dot(self.v) if self.counting else None
        noise = torch.randn(self.v.shape, generator=self.generator, device=self.v.device,
                            dtype=self.v.dtype)
        self.v.mul_(keep).add_(noise, alpha=math.sqrt((1 - keep ** 2) * T / self.m))
        if self.counting:
            self.heat += (before - self.v.dot(self.v)).to(self.heat) * (self.m / 2)

    def force(self, potential):
        """U and, in self.grad, its gradient; other weights in it gather theirs."""
        self.grad.zero_()
        U = potential()
        U.backward()
        return U.detach()

    def step(self, potential, T):
        """One time step, with one backward pass. potential() -> U, a scalar. Returns U at its end.
        """
        if self.method == "adam":
            U = self.force(potential)
            self.theta.grad = self.grad
            self.adam.step()
            return U
        if self.every and self.count and self.count % self.every == 0:
            self.redraw(T)
        self.count += 1
        if self.method == "langevin":
            self.friction(T)
        else:
            self.half_chain(T)
        self.v.add_(self.grad, alpha=-self.dt / (2 * self.m))
        self.theta.add_(self.v, alpha=self.dt)
        U = self.force(potential)
        self.v.add_(self.grad, alpha=-self.dt / (2 * self.m))
        self.kinetic = self.v.dot(self.v).to(self.heat) * (self.m / 2)
        if self.method == "nose-hoover":
            self.half_chain(T)
        return U

    def temperature(self):
        """Kinetic: m v^2 by degree of freedom."""
        return self.kinetic * (2 / self.N)

    def energy(self, U, T):
        """The extended energy, which an exact integrator would conserve at constant T, while
        `counting` is on."""
        chain = (self.odd[:-1] ** 2 * self.weight).sum() + (self.even[1:] ** 2).sum()
        return U.to(self.heat) + self.kinetic + self.heat + chain * (T / self.rate / 2)

    def state_dict(self):
        """What to continue from, beside the module's own weights."""
        return {key: getattr(self, key).clone() for key in self.tensors} | {
            "adam": self.adam.state_dict(), "count": self.count}

    def load_state_dict(self, state):
        """Put it back in place."""
        self.adam.load_state_dict(state["adam"])
        self.count = state["count"]
        for key in self.tensors:
            getattr(self, key).copy_(state[key])


# --- train ---------------------------------------------------------------------------------------

def batch_of(n, size, generator):
    """Numbers of `size` of n items, at random; all of them where the batch holds them all."""
    if size >= n:
        return torch.arange(n, device=generator.device)
    return torch.randint(n, (size,), generator=generator, device=generator.device)


def schedule(setting, progress):
    """T at a progress from 0 to 1: constant, or geometric to the final temperature."""
    T, end = setting.temperature, setting.final_temperature
    return T if end < 0 else T * (end / T) ** progress


def check_finite(name, losses, end, setting=None):
    """Raise FloatingPointError if one of the last CHECK losses before step `end` is not finite."""
    bad = ~torch.isfinite(losses[max(0, end - CHECK):end])
    if bad.any():
        step = max(0, end - CHECK) + bad.nonzero()[0, 0].item()
        advice = f": lower --step {setting.step:g} or raise --mass" if setting else ""
        raise FloatingPointError(f"{name}: the loss is not finite at step {step}{advice}")


def algorithm_1(name, nets, loss, codes, sampler, optimiser, setting, generator, checkpoint=None):
    """Algorithm 1: K encoders are sampled while the decoder rests, then it takes a step of Adam
    along the mean gradient. loss(index) -> U; codes() -> latents (n, D) to watch.

    One backward pass gives the force on the encoder and the decoder's gradient. Returns by sample
    "loss" and "kinetic", the kinetic temperature by T, and by update "variance" (D,) of the watched
    latents. Raises FloatingPointError where the loss is not finite.
    """
    n, K, total = setting.size, setting.samples, setting.updates * setting.samples
    _, gradient = flatten(nets["decoder"])
    parts, first = [nets, sampler, optimiser, generator], 0
    with torch.no_grad():
        out = {"loss": torch.zeros(total, device=gradient.device),
               "variance": torch.zeros(setting.updates, codes().shape[1], device=gradient.device)}
    out["kinetic"] = torch.zeros_like(out["loss"])

    def potential():
        return loss(batch_of(n, setting.batch, generator))

    if checkpoint and checkpoint.state:
        first, out, summed = checkpoint.restore(*parts)
        gradient.copy_(summed)
    else:
        sampler.force(potential)
        gradient.zero_()
    bar = tqdm(range(first, total), name, total, initial=first, disable=None)
    for step in bar:
        T = schedule(setting, step / total)
        out["loss"][step] = sampler.step(potential, T)  # adds dU/dphi to the decoder's gradient
        if T:
            out["kinetic"][step] = sampler.temperature() / T
        if (step + 1) % K == 0:
            gradient /= K  # Eq. (7)
            optimiser.step()
            gradient.zero_()
            with torch.no_grad():
                out["variance"][step // K] = codes().var(0)
        if (step + 1) % CHECK == 0 or step + 1 == total:
            check_finite(name, out["loss"], step + 1, setting)
            bar.set_postfix_str(f"loss {out['loss'][step]:.4f}", refresh=False)
            if checkpoint and checkpoint.due():
                checkpoint.save((step + 1, out, gradient), *parts)
    return out


def collect(name, nets, loss, take, sampler, setting, generator, checkpoint=None):
    """The ensemble after training (Appendix A.4): take() -> tensor, of every `stride`-th encoder
    sampled under the trained decoder, stacked (M, ...). T = 0 has a single one."""
    if sampler.method == "adam":
        return take()[None]
    T, total, out, first = schedule(setting, 1), setting.members * setting.stride, [], 0
    losses, parts = torch.zeros(total, device=generator.device), [nets, sampler, generator]
    if checkpoint and checkpoint.state:
        first, out, losses = checkpoint.restore(*parts)
    for step in tqdm(range(first, total), f"{name}, ensemble", total, initial=first, disable=None):
        losses[step] = sampler.step(
            lambda: loss(batch_of(setting.size, setting.batch, generator)), T)
        if (step + 1) % setting.stride == 0:
            out.append(take())
        if (step + 1) % CHECK == 0 or step + 1 == total:
            check_finite(f"{name}, ensemble", losses, step + 1, setting)
            if checkpoint and checkpoint.due():
                checkpoint.save((step + 1, out, losses), *parts)
    return torch.stack(out)


def energy_drift(loss, n, sampler, setting, steps=100):
    """Largest change of the extended energy, by the kinetic energy N T / 2, where one fixed batch
    is all the data and no velocities are redrawn; None at T = 0."""
    if sampler.method == "adam":
        return None
    T, index = schedule(setting, 1), torch.arange(min(n, setting.batch), device=sampler.grad.device)
    sampler.counting, sampler.every, every = True, 0, sampler.every
    energies = [sampler.energy(sampler.force(lambda: loss(index)), T)]
    for _ in range(steps):
        energies.append(sampler.energy(sampler.step(lambda: loss(index), T), T))
    sampler.counting, sampler.every, energies = False, every, torch.stack(energies)
    return ((energies - energies[0]).abs().max() / (sampler.N * T / 2)).item()


def train(name, nets, loss, n, batch, steps, rate, generator, checkpoint=None):
    """Adam on loss(index) of random batches; returns the losses (steps,). The rate falls linearly
    to 0 over the last half. Raises FloatingPointError where the loss is not finite."""
    optimiser, device = torch.optim.Adam(nets.parameters(), rate, fused=True), generator.device
    first, history, parts = 0, torch.zeros(steps, device=device), [nets, optimiser, generator]
    if checkpoint and checkpoint.state:
        first, history = checkpoint.restore(*parts)
    bar = tqdm(range(first, steps), name, steps, initial=first, disable=None)
    for step in bar:
        optimiser.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - step / steps))
        value = loss(batch_of(n, batch, generator))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        history[step] = value.detach()
        if (step + 1) % CHECK == 0 or step + 1 == steps:
            check_finite(name, history, step + 1)
            bar.set_postfix_str(f"loss {history[step]:.4f}", refresh=False)
            if checkpoint and checkpoint.due():
                checkpoint.save((step + 1, history), *parts)
    return history


# --- evaluate ------------------------------------------------------------------------------------

class Codes(NamedTuple):
    """Latents of n images under the encoder ensemble, Eq. (2)."""
    mean: torch.Tensor      # (n, D), averaged over the ensemble; of a VAE mu
    draw: torch.Tensor      # (n, D), image i under encoder i % M; of a VAE drawn from q(z|x)
    variance: torch.Tensor  # (D,), over images and encoders; of a VAE over the images of mu
    shared: torch.Tensor    # (D,), covariance over images of the means of the ensemble's halves


@torch.no_grad()
def ensemble_codes(encoder, members, x):
    """Codes of x under encoders of weights members (M, N)."""
    theta, _ = flatten(encoder)
    M, draw, half, total, square = len(members), None, 0, 0, 0
    for k, member in enumerate(members):
        half = total if k == M // 2 else half
        theta.copy_(member)
        z = torch.cat([encoder(part) for part in x.split(5000)])
        total, square = total + z.double(), square + z.double().square().mean(0)
        draw = z.clone() if draw is None else draw
        draw[k::M] = z[k::M]
    mean = total / M
    variance = square / M - mean.mean(0).square()
    a, b = (half / (M // 2), (total - half) / (M - M // 2)) if M > 1 else (mean, mean)
    shared = ((a - a.mean(0)) * (b - b.mean(0))).mean(0)
    return Codes(mean.float(), draw, variance.float(), shared.float())


@torch.no_grad()
def plain_codes(encoder, x, generator=None):
    """Codes of one deterministic encoder; with a generator that of a VAE."""
    z = encoder(x)
    if generator is None:
        return Codes(z, z, z.var(0), z.var(0))
    mu, logvar = z.chunk(2, 1)
    noise = torch.randn(mu.shape, generator=generator, device=mu.device)
    return Codes(mu, mu + (logvar / 2).exp() * noise, mu.var(0), mu.var(0))


def active_units(variance):
    """Number of latent units (D,) whose variance is above 0.01."""
    return int((variance > ACTIVE).sum())


def linear_probe(z, y, z_test, y_test):
    """Test accuracy of a logistic regression on standardised latents (n, D)."""
    mean, std = z.mean(0), z.std(0) + 1e-8
    z, z_test = (z - mean) / std, (z_test - mean) / std
    W = torch.zeros(z.shape[1], 10, device=z.device, requires_grad=True)
    b = torch.zeros(10, device=z.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([W, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(z @ W + b, y) + 1e-4 * W.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return ((z_test @ W + b).argmax(1) == y_test).float().mean().item()


def digit_overlap(z, y, bins=40):
    """How far the latent histograms of two digits cover each other, mean over pairs: (D,) in [0, 1]
    of latents z (n, D), labels y (n,); 1: the unit tells nothing about the digit."""
    D, low, high = z.shape[1], z.amin(0), z.amax(0)
    place = ((z - low) / (high - low + 1e-12) * bins).long().clamp(max=bins - 1)  # (n, D)
    place = (y[:, None] * D + torch.arange(D, device=z.device)) * bins + place
    count = torch.bincount(place.flatten(), minlength=10 * D * bins).view(10, D, bins).float()
    p = count / count.sum(2, keepdim=True).clamp(min=1)
    a, b = torch.triu_indices(10, 10, 1)
    return torch.minimum(p[a], p[b]).sum(2).mean(0)


def pca_error(x, x_test, k):
    """Test MSE of the best k-dimensional plane of x (n, pixels), and of its mean (k = 0)."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov(x.T.double()))
    kept, rest = vectors[:, -k:].float() if k else vectors[:, :0].float(), x_test - mean
    return ((rest - rest @ kept @ kept.T) ** 2).mean().item()


def frechet_distance(a, b):
    """Of the Gaussians with the moments of two sets of features (n, d), (m, d); in float64."""
    a, b = a.cpu().double(), b.cpu().double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^(1/2)
    # tr (A B)^(1/2) by way of a symmetric matrix with the same eigenvalues
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp(min=0).sqrt().sum()
    return (((a.mean(0) - b.mean(0)) ** 2).sum() + A.trace() + B.trace() - 2 * cross).item()


class Judge(nn.Module):
    """A small convolutional classifier: (n, 784) -> (n, 10) logits; features (n, 64)."""

    def __init__(self, generator):
        super().__init__()
        layers = [nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(),
                  nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                  nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                  nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(64, 10)
        self.to(generator.device)
        for value in self.parameters():  # He's, from a generator of its own
            if value.dim() > 1:
                nn.init.normal_(value, 0, math.sqrt(2 / value[0].numel()), generator)
            else:
                nn.init.zeros_(value)

    def forward(self, x):
        return self.head(self.features(x.view(-1, 1, 28, 28)))


@torch.no_grad()
def judged(judge, x, real):
    """The judge's mean highest probability in x (n, 784), the entropy of its classes by log 10, and
    Frechet's distance of its features to real (m, 64)."""
    features = judge.features(x.view(-1, 1, 28, 28))
    p = judge.head(features).softmax(1)
    share = p.mean(0)
    return {"confidence": p.amax(1).mean().item(), "frechet": frechet_distance(features, real),
            "balance": (-(share * share.clamp(min=1e-12).log()).sum() / math.log(10)).item()}


def gaussian(z, n, generator):
    """n draws from the Gaussian with the moments of z (m, D). -> (n, D)"""
    values, vectors = torch.linalg.eigh(torch.cov(z.T.double()))
    root = (vectors * values.clamp(min=0).sqrt()).float()
    noise = torch.randn(n, z.shape[1], generator=generator, device=z.device)
    return z.mean(0) + noise @ root.T


def mixture(z, n, generator, k=20, rounds=20):
    """n draws from k Gaussians with the moments of the k-means clusters of z (m, D)."""
    centres = z[torch.randperm(len(z), generator=generator, device=z.device)[:k]]
    for _ in range(rounds):
        nearest = torch.cdist(z, centres).argmin(1)
        centres = torch.stack([z[nearest == j].mean(0) if (nearest == j).any() else centre
                               for j, centre in enumerate(centres)])
    chosen = nearest[torch.randint(len(z), (n,), generator=generator, device=z.device)]
    out = torch.empty(n, z.shape[1], device=z.device)
    for j in chosen.unique().tolist():
        members = z[nearest == j]
        wanted = chosen == j
        out[wanted] = (gaussian(members, int(wanted.sum()), generator) if len(members) > 1
                       else members)
    return out


def between(a, b, alpha):
    """Eq. (17): (1 - alpha) a + alpha b for a, b (D,) and alpha (S,). -> (S, D)"""
    return torch.lerp(a, b, alpha[:, None])


def integrate(Xi, z, dt, steps):
    """dz/dt = candidates(z) Xi by Runge-Kutta 4: Xi (R, 11, 2), z (R, 2) -> (steps + 1, R, 2)"""
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
    """Mean angular velocity about the middle of each path (steps, R, 2), in rad per time: (R,);
    positive from z1 to z2."""
    x, y = (path - path.mean(0)).unbind(-1)
    turn = torch.atan2(y[1:] * x[:-1] - x[1:] * y[:-1], x[1:] * x[:-1] + y[1:] * y[:-1])
    return turn.mean(0) / dt


def density_mode(values):
    """Where the kernel density of values (n,) is highest; of equal values that value."""
    from scipy.stats import gaussian_kde
    values = values.double()
    if len(values) < 3 or values.std() < 1e-9:
        return values.mean().item()
    grid = torch.linspace(values.min(), values.max(), 400, dtype=torch.double)
    return grid[gaussian_kde(values.numpy())(grid.numpy()).argmax()].item()


def significant(Xi):
    """Names of the terms of each equation whose mean and mode over encoders, Xi (M, 11, 2), are
    both above the threshold, and all (mean, mode): ([names, names], (2, 11, 2))."""
    both = torch.tensor([[(Xi[:, j, d].mean().item(), density_mode(Xi[:, j, d]))
                          for j in range(11)] for d in range(2)])
    return [[name for name, pair in zip(CANDIDATES, both[d]) if pair.abs().min() > SIGNIFICANT]
            for d in range(2)], both


@torch.no_grad()
def face_scores(x_hat, x):
    """Of reconstructions x_hat of faces x (n, 3, 64, 64): MSE; recognised: share that is nearer to
    its own face than to any other one; distinct: variance between them by that of the faces."""
    a, b = x_hat.flatten(1), x.flatten(1)
    own = torch.arange(len(a), device=a.device)
    return {"mse": ((a - b) ** 2).mean().item(),
            "recognised": (torch.cdist(a, b).argmin(1) == own).float().mean().item(),
            "distinct": (a.var(0).mean() / b.var(0).mean()).item()}


def thermostat_row(name, out, sampler, setting, drift, seconds):
    """What the sampler did: over the last tenth of the samples, and the watched latents at the end
    and by those at half time."""
    tail, variance = max(2, len(out["loss"]) // 10), out["variance"].mean(1)
    return {"run": name, "T": schedule(setting, 1), "sampler": sampler.method, "drift": drift,
            "kinetic": out["kinetic"][-tail:].mean().item(),
            "loss": out["loss"][-tail:].mean().item(), "std": out["loss"][-tail:].std().item(),
            "variance": variance[-1].item(),
            "growth": (variance[-1] / variance[(len(variance) - 1) // 2]).item(),
            "steps per second": len(out["loss"]) / seconds}


# --- plot ----------------------------------------------------------------------------------------

def as_images(x, experiment):
    """Rows of pixels (..., pixels) or faces (..., 3, 64, 64) as (..., C, H, W) in [0, 1]."""
    x = x.float().cpu() / (255 if x.dtype == torch.uint8 else 1)
    return x if experiment == "celeba" else x.reshape(*x.shape[:-1], 1, 28, -1)


def plot_sheet(rows, experiment, columns=(), width=0.5):
    """A labelled sheet of images: {row label: (n, pixels) or (n, 3, 64, 64)}."""
    x = torch.stack([as_images(value, experiment) for value in rows.values()])
    tall = x.shape[3] / x.shape[4]
    fig = Figure(figsize=(width * x.shape[1] + 3, width * tall * len(x) + 1), layout="constrained")
    cmap = "viridis" if experiment == "celeba" else "gray"
    common.image_sheet(fig.subplots(), x, list(rows), columns, cmap=cmap)
    return fig


def plot_histograms(codes, labels, units, rows):
    """Figs. 2b and 5: latent histograms by digit, a ridge each: {kind: Codes}, unit numbers."""
    fig = Figure(figsize=(2.1 * len(units) + 0.6, 2.5 * len(codes) + 0.6), layout="constrained")
    for axes, (kind, code), row in zip(fig.subplots(len(codes), len(units), squeeze=False),
                                       codes.items(), rows):
        z = code.mean if kind == "VAE" else code.draw
        for ax, unit in zip(axes, units):
            values, scale = z[:, unit].cpu(), z[:, unit].std().cpu() * 3 + 1e-6
            edges = torch.linspace(values.mean() - scale, values.mean() + scale, 41)
            counts = [torch.histogram(values[labels == digit], edges).hist for digit in range(10)]
            top = max(count.max() for count in counts).clamp(min=1)
            for digit, count in enumerate(counts):
                ax.fill_between((edges[1:] + edges[:-1]) / 2, digit, digit + count / top * 1.4,
                                color=common.COLOURS[digit % 2], alpha=0.8, zorder=-digit, lw=0)
            ax.set_title(f"{kind}, unit {unit}: a = {code.variance[unit]:.2g}", fontsize="small")
            ax.set_yticks(range(10) if unit == units[0] else [])
            ax.tick_params(labelsize="x-small")
        axes[0].set_ylabel(f"digit (overlap {row['overlap']:.2f})")
    for ax in axes:
        ax.set_xlabel("latent z", fontsize="small")
    return fig


def plot_thermostat(outs):
    """Loss, kinetic temperature and latent variance by decoder update: {name: out of algorithm_1}.
    """
    fig = Figure(figsize=(13, 3.6), layout="constrained")
    axes = fig.subplots(1, 3)
    for i, (name, out) in enumerate(outs.items()):
        colour, x = common.COLOURS[i % 8], torch.arange(1, len(out["variance"]) + 1)
        loss = out["loss"].view(len(x), -1)
        axes[0].plot(x, loss.mean(1), color=colour, lw=1, label=name)
        axes[1].plot(x, out["kinetic"].view(len(x), -1).mean(1), color=colour, lw=0.8)
        axes[2].plot(x, out["variance"].mean(1), color=colour, lw=1)
    axes[1].axhline(1, color="0.5", lw=0.8, ls=":")
    for ax, (label, scale) in zip(axes, (("loss, mean over the K encoders", "log"),
                                         ("kinetic temperature / T", "log"),
                                         ("variance of the latents, mean of units", "log"))):
        ax.set(xlabel="decoder update", ylabel=label, yscale=scale)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize="x-small")
    return fig


def plot_faces(outs, sheets):
    """Fig. 3: loss bands (a), and reconstructions at both temperatures (b, c)."""
    fig = Figure(figsize=(15, 3.8), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1, 3.2])
    for i, (name, out) in enumerate(outs.items()):
        loss = out["loss"].view(len(out["variance"]), -1)
        mean, std, x = loss.mean(1), loss.std(1), range(1, len(loss) + 1)
        left.plot(x, mean, color=common.COLOURS[i], lw=1, label=name)
        left.fill_between(x, mean - std, mean + std, color=common.COLOURS[i], alpha=0.3, lw=0)
    left.set(xlabel="decoder update", yscale="log", title="a",
             ylabel="loss of the encoders: mean ± std of K")
    left.legend(fontsize="small")
    x = torch.stack([as_images(value, "celeba") for value in sheets.values()])
    common.image_sheet(right, x, list(sheets), cmap="viridis")
    right.set_title("b, c")
    return fig


def plot_sweep(rows):
    """What T does to the EAE and beta to the VAE, and both in one plane."""
    fig = Figure(figsize=(14, 7), layout="constrained")
    axes = fig.subplots(2, 3).flatten()
    eae, vae = ([row for row in rows if row["kind"] == kind] for kind in ("EAE", "VAE"))
    at = range(len(eae))
    for ax, (key, label, scale) in zip(axes, (
            ("mse", "test MSE", "log"), ("active", "units of 64", "linear"),
            ("variance", "latent variance, mean of units", "log"),
            ("probe", "linear probe, test accuracy", "linear"))):
        ax.plot(at, [row[key] for row in eae], "o-", color=common.COLOURS[0], label=key)
        if key == "active":
            ax.plot(at, [row["informative"] for row in eae], "s--", color=common.COLOURS[3],
                    label="informative")
            ax.set_ylim(0, 68)
            ax.legend(fontsize="small")
        ax.set(yscale=scale, xlabel="temperature T of the EAE", ylabel=label)
        ax.set_xticks(at, [f"{row['value']:g}" for row in eae])
    for ax, key, label in ((axes[4], "informative", "informative units of 64"),
                           (axes[5], "probe", "linear probe, test accuracy")):
        for chosen, k, mark, name in ((eae, 0, "o", "EAE, T"), (vae, 1, "s", "VAE, β")):
            ax.plot([row["mse"] for row in chosen], [row[key] for row in chosen], mark,
                    color=common.COLOURS[k], label=name)
            for row in chosen:
                ax.annotate(f"{row['value']:g}", (row["mse"], row[key]), fontsize="x-small",
                            xytext=(4, -10 if k == 0 else 4), textcoords="offset points",
                            rotation=-40 if k == 0 else 0, va="center" if k else "top")
        ax.set(xscale="log", xlabel="test MSE", ylabel=label)
        ax.set_xticks([0.005, 0.01, 0.02, 0.05], ["0.005", "0.01", "0.02", "0.05"])
        ax.minorticks_off()
        ax.legend(fontsize="small")
    return fig


def plot_waves(frames, titles):
    """Fig. 1a-c: u and u_t above what the decoder makes of them: {row: (frames, n, n)}."""
    fig = Figure(figsize=(2 * len(titles) + 1.2, 2 * len(frames) + 0.6), layout="constrained")
    axes = fig.subplots(len(frames), len(titles), squeeze=False)
    limit = max(value.abs().max() for value in frames.values())
    for i, (line, (label, values)) in enumerate(zip(axes, frames.items())):
        for ax, value, title in zip(line, values, titles):
            shown = ax.imshow(value, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower",
                              extent=(-10, 10, -10, 10))
            ax.set_xticks([]), ax.set_yticks([])
            if i == 0:
                ax.set_title(title, fontsize="small")
        line[0].set_ylabel(label, fontsize="small")
    fig.colorbar(shown, ax=axes, shrink=0.5, label="u, du/dt on a square of side 20")
    return fig


def plot_dynamics(runs):
    """Fig. 1d-f: rotation coefficients of every run's ensemble, and the limit cycles of the first
    run of either sense of rotation. runs: [{"Xi" (M, 11, 2), "path", "codes", "omega"}]"""
    fig = Figure(figsize=(13, 4.2), layout="constrained")
    left, *right = fig.subplots(1, 3)
    for i, found in enumerate(runs):
        Xi, colour = found["Xi"], common.COLOURS[i % 8]
        for j, mark, name in ((1, "o", "linear"), (10, "x", "sine")):
            left.plot(Xi[:, j, 0], Xi[:, j - 1, 1], mark, color=colour, ms=4, alpha=0.3,
                      label=f"run {i + 1}, {name}")
    left.axline((0, 0), slope=-1, color="0.6", lw=0.8, ls=":")
    left.axhline(0, color="0.8", lw=0.8), left.axvline(0, color="0.8", lw=0.8)
    left.set(xlabel="of z2 (sin z2) in dz1/dt", ylabel="of z1 (sin z1) in dz2/dt", title="d")
    left.legend(fontsize="xx-small", ncols=2)
    shown = [next((k for k, found in enumerate(runs) if (found["omega"].mean() > 0) == sense), None)
             for sense in (True, False)]
    for ax, k, letter in zip(right, shown, "ef"):
        ax.set(title=letter, xlabel="z1", ylabel="z2", aspect="equal")
        if k is None:
            ax.text(0.5, 0.5, "no run turns this way", ha="center", transform=ax.transAxes)
            continue
        found = runs[k]
        codes, path = found["codes"], found["path"]
        ax.plot(codes[:, 0], codes[:, 1], ".", color="0.6", ms=3, label="encoded test frames")
        ax.plot(path[:, 0], path[:, 1], color=common.COLOURS[k % 8], lw=1.2,
                label=f"run {k + 1} integrated: {found['omega'].mean():+.3f} rad / time")
        ax.plot(*path[0], "k*", ms=9)
        ax.annotate("", path[8], path[0], arrowprops=dict(arrowstyle="->"))
        ax.legend(fontsize="x-small", loc="upper right")
    return fig


def plot_correlations(Xi):
    """Fig. 4: correlations over the ensemble of all coefficients (M, 11, 2)."""
    fig = Figure(figsize=(8.2, 7.2), layout="constrained")
    ax = fig.subplots()
    names = [f"{name} in dz{d}" for d in (1, 2) for name in CANDIDATES]
    values = torch.corrcoef(Xi.transpose(1, 2).flatten(1).T.double()).nan_to_num()
    shown = ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks(range(22), names, rotation=90, fontsize="x-small")
    ax.set_yticks(range(22), names, fontsize="x-small")
    fig.colorbar(shown, label="correlation over the encoders", shrink=0.7)
    return fig


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add_argument_group("flags of this script").add_argument
    add("--experiment", choices=(*EXPERIMENTS, "all"), default="mnist",
        help="what to run; all: everything that there is data for")
    add("--dataset", choices=("real", "glyphs"),
        help="real: the experiments' own images; glyphs: digits drawn here in their place")
    own = parser.add_argument_group("of every EAE that is run, if not its own (SETTINGS, COSTS)")
    own.add_argument("--sampler", choices=("nose-hoover", "langevin"), help="thermostat")
    own.add_argument("--suzuki-yoshida", action="store_true", default=None,
                     help="three parts of Suzuki and Yoshida to each substep of the chain")
    for name, kind, low, text in (
            ("temperature", float, 0, "T, unit of the loss; 0: no ensemble, Adam (not of the "
             "sweep; of celeba the low one)"),
            ("final-temperature", float, 1e-300, "T at the end of a geometric schedule"),
            ("mass", float, 1e-12, "m of a weight"), ("step", float, 1e-12, "time step"),
            ("chain", int, 1, "thermostats in the chain"),
            ("tau", float, 1e-3, "thermostat time in steps; of langevin: 1 / friction"),
            ("redraw", int, 0, "steps between new Maxwell velocities, 0: never"),
            ("substeps", int, 1, "substeps of the chain"),
            ("updates", int, 1, "decoder updates"), ("samples", int, 1, "encoders per update, K"),
            ("batch", int, 2, "items per step"),
            ("members", int, 2, "encoders of the final ensemble")):
        own.add_argument(f"--{name}", type=number(kind, low), help=text)
    add("--runs", type=number(int, 1, 100), help="independent EAEs of reaction-diffusion")
    add("--grid", type=number(int, 8, 1000), help="points a side of reaction-diffusion")
    add("--modes", type=number(int, 2, 10_000),
        help="POD modes of reaction-diffusion that the nets see; 10000: pixels")
    add("--judge-steps", type=number(int, 1, 10**6), help="batches of 128 for the judge of digits")
    args = parser.parse(argv)
    for flag in ("temperature", "final_temperature"):
        if args.experiment == "temperature" and getattr(args, flag) is not None:
            parser.error(f"argument --{flag.replace('_', '-')}: the sweep has its own temperatures")
    if args.temperature == 0 and args.final_temperature:
        parser.error("argument --final-temperature: not with --temperature 0")
    if args.device == "mps":
        parser.error("argument --device: mps has no double precision, which thermostats need")
    return args


def setting_of(args, name, experiment=None):
    """The Setting of an EAE: the experiment's own, the preset's costs, the flags given."""
    given = {key: value for key, value in vars(args).items()
             if key in Setting._fields and value is not None}
    if name in ("hot", "temperature"):
        given = {key: value for key, value in given.items() if "temperature" not in key}
    return SETTINGS[name]._replace(**{**COSTS[args.preset][experiment or name], **given})


def simmer(run, args, name, nets, loss, watch, take, setting, generator, optimiser=None):
    """A work unit of training and one of sampling: (out of algorithm_1, ensemble, row)."""
    if setting.temperature == 0:
        common.note(f"note: {name}: temperature 0 has no ensemble; Adam trains the encoder, the "
                    "deterministic limit")
    loss = common.compiled(loss, args.compile)
    sampler = Sampler(nets["encoder"], setting, generator)
    optimiser = optimiser or torch.optim.Adam(nets["decoder"].parameters(), setting.rate,
                                              fused=True)

    def training(checkpoint):
        out = algorithm_1(name, nets, loss, watch, sampler, optimiser, setting, generator,
                          checkpoint)
        return {"out": {key: value.cpu() for key, value in out.items()},
                "state": {key: value.clone() for key, value in nets.state_dict().items()},
                "sampler": sampler.state_dict(),
                "generator": generator.get_state()}

    done = run.unit(name, training)
    nets.load_state_dict(done["state"])
    sampler.load_state_dict(done["sampler"])
    generator.set_state(done["generator"])
    seconds = run.seconds[name]

    def sampling(checkpoint):
        ensemble = collect(name, nets, loss, lambda: take(sampler.theta), sampler, setting,
                           generator, checkpoint)
        return {"ensemble": ensemble.cpu(),
                "drift": energy_drift(loss, setting.size, sampler, setting)}

    found = run.unit(f"{name}-ensemble", sampling)
    nets.load_state_dict(done["state"])
    row = thermostat_row(name, done["out"], sampler, setting, found["drift"], seconds)
    return done["out"], found["ensemble"].to(args.device), row


def image_model(run, args, name, kind, experiment, x, setting, beta=1.0):
    """Train one model of images (n, pixels): {"nets", "ensemble", "out", "row", "loss"}."""
    generator = common.generator(args.seed, name, args.device)
    codes = LATENT * (2 if kind == "VAE" else 1)
    nets = build(experiment, generator, pixels=x.shape[1], codes=codes)

    def loss(index):
        if kind == "VAE":
            return vae_loss(nets, x[index], beta, generator)
        return reconstruction_loss(nets, x[index])

    model = {"kind": kind, "nets": nets, "ensemble": None}
    if kind == "EAE":
        model["out"], model["ensemble"], model["row"] = simmer(
            run, args, name, nets, loss, lambda: nets["encoder"](x[:256]), torch.clone,
            setting._replace(size=len(x)), generator)
        return model
    steps = setting.vae if kind == "VAE" else setting.ae

    def compute(checkpoint):
        history = train(name, nets, common.compiled(loss, args.compile), len(x), setting.batch,
                        steps, setting.rate, generator, checkpoint)
        return {"state": nets.state_dict(), "history": history.cpu()}

    done = run.unit(name, compute)
    nets.load_state_dict(done["state"])
    return model | {"out": {"loss": done["history"]}}


def codes_of(model, x, generator):
    """Codes of images x (n, pixels) under a model of image_model."""
    encoder = model["nets"]["encoder"]
    if model["kind"] == "EAE":
        return ensemble_codes(encoder, model["ensemble"], x)
    return plain_codes(encoder, x, generator if model["kind"] == "VAE" else None)


@torch.no_grad()
def image_row(model, code, x):
    """Table 1 of one model, and what it leaves out: test images x, their Codes."""
    mse = ((reconstruct(model["nets"], code.mean) - x) ** 2).mean().item()
    one = ((reconstruct(model["nets"], code.draw) - x) ** 2).mean().item()
    return {"kind": model["kind"], "mse": mse, "mse of a draw": one,
            "active": active_units(code.variance), "informative": active_units(code.shared),
            "variance": code.variance.mean().item()}


def table_claims(experiment, rows):
    """Table 1's figures and what it is said to show."""
    rows = {row["kind"]: row for row in rows}
    table = []
    for kind, (mse, active) in DOCUMENT[experiment].items():
        row = rows[kind]
        near = {"EAE": row["active"] == LATENT, "VAE": row["active"] <= LATENT // 4,
                "AE": rows["VAE"]["active"] < row["active"]}[kind]
        rule = {"EAE": "all", "VAE": "at most 25 %", "AE": "more than the VAE"}[kind]
        table += [(f"{experiment}, Table 1: {kind} test MSE", f"{mse}", f"{row['mse']:.4f}",
                   row["mse"] <= mse),
                  (f"{experiment}, Table 1: {kind} active units ({rule})", f"{active}/{LATENT}",
                   f"{row['active']}/{LATENT}; {row['informative']} informative", near)]
    between = rows["VAE"]["active"] < rows["AE"]["active"] < rows["EAE"]["active"]
    if experiment == "mnist":
        table.append((f"{experiment}: the AE's active units lie between VAE's and EAE's",
                      "16 < 53 < 64", " < ".join(str(rows[k]["active"]) for k in
                                                 ("VAE", "AE", "EAE")), between))
    best = min(DOCUMENT[experiment], key=lambda kind: rows[kind]["mse"])
    return table + [(f"{experiment}: the AE has the lowest test MSE", "yes",
                     f"{best}, {rows[best]['mse']:.4f}", best == "AE"),
                    (f"{experiment}: EAE below PCA of 64 components", "-",
                     f"{rows['EAE']['mse']:.4f}; {rows['PCA-64']['mse']:.4f}",
                     rows["EAE"]["mse"] < rows["PCA-64"]["mse"])]


def print_image_rows(rows):
    """Table 1 on the screen; reference rows have an MSE only."""
    formats = {"mse": ".4f", "mse of a draw": ".4f", "active": "d", "informative": "d",
               "variance": ".3g"}
    common.print_table(["", "test MSE", "of a draw", "active", "informative", "variance"], [
        [row["kind"], *(format(row[key], text) if key in row else ""
                        for key, text in formats.items())] for row in rows])


def study_images(experiment, run, args, data):
    """mnist or frey: Table 1, and for mnist the figures about digits."""
    x, y, x_test, y_test = data
    setting = setting_of(args, experiment)
    models = {kind: image_model(run, args, f"{experiment}-{kind}", kind, experiment, x, setting)
              for kind in KINDS}
    g = common.generator(args.seed, f"{experiment} evaluation", args.device)
    codes = {kind: codes_of(model, x_test, g) for kind, model in models.items()}
    rows = [image_row(model, codes[kind], x_test) for kind, model in models.items()]
    results, claims = {"models": rows, "thermostat": [models["EAE"]["row"]]}, []
    if experiment == "mnist":
        more, claims = study_digits(run, args, models, codes, rows, x, y, x_test, y_test, g)
        results |= more
    rows += [{"kind": "PCA-64", "mse": pca_error(x, x_test, LATENT)},
             {"kind": "mean image", "mse": pca_error(x, x_test, 0)}]
    print(f"\n{experiment}: {len(x):,} training and {len(x_test):,} test images")
    print_image_rows(rows)
    shown = torch.randperm(len(x_test), generator=g, device=x.device)[:16]
    sheet = {"test image": x_test[shown]} | {
        kind: reconstruct(model["nets"], codes[kind].mean[shown]).detach()
        for kind, model in models.items()}
    run.figure(plot_sheet(sheet, experiment), f"{experiment}_reconstructions",
               f"{experiment}: test images and reconstructions")
    run.figure(plot_thermostat({"EAE": models["EAE"]["out"]}), f"{experiment}_thermostat",
               f"{experiment}: training of the EAE")
    growth = models["EAE"]["row"]["growth"]
    claims += [(f"{experiment}: the EAE's latents are bounded (variance at the end by that at half "
                "time, at most 1.1)", "-", f"{growth:.2f}", growth <= 1.1)]
    return (results, table_claims(experiment, rows) + claims,
            {f"{experiment}-{kind}": model["out"] for kind, model in models.items()})


def study_digits(run, args, models, codes, rows, x, y, x_test, y_test, g):
    """Figs. 2 and 5, generations, judge and probe: (results, claims); adds to rows."""
    judge, count = trained_judge(run, args, x, y), min(10_000, len(x))
    known = {kind: codes_of(model, x[:count], g) for kind, model in models.items()}
    for row, kind in zip(rows, KINDS):
        z = codes[kind].mean if kind == "VAE" else codes[kind].draw
        used = codes[kind].variance > ACTIVE
        row["overlap"] = digit_overlap(z, y_test)[used].mean().item() if used.any() else 1.0
        row["probe"] = linear_probe(known[kind].mean, y[:count], codes[kind].mean, y_test)
    order = torch.randperm(len(x_test), generator=g, device=x.device)
    made = digit_images(models, codes, known, x_test, order, g)
    real = judge.features(x_test.view(-1, 1, 28, 28)).detach()
    n, right = len(made["test images"]), judge(x_test).argmax(1) == y_test
    accuracy = right.float().mean().item()
    samples = [{"row": name} | judged(judge, value, real[order[n:]] if name == "test images"
                                      else real) for name, value in made.items()]
    paths, alphas = digit_paths(models, codes, x_test, y_test)
    run.figure(plot_sheet(paths, "mnist", alphas * 2), "2a_interpolation",
               "Fig. 2a: between the mean codes of 3 and 8, and of 4 and 9, by α of Eq. (17)")
    common_units = torch.stack([code.shared > ACTIVE for code in codes.values()]).sum(0)
    units = common_units.argsort(descending=True, stable=True)[:6].sort().values.tolist()
    run.figure(plot_histograms(codes, y_test.cpu(), units, rows), "2b_latents",
               "Figs. 2b, 5: latents of test images by digit; a: activity")
    run.figure(plot_sheet({name: value[:20] for name, value in made.items()}, "mnist"), "samples",
               "Generations, and interpolations of random pairs of test images")
    print(f"\njudge: {accuracy:.1%} of the test images right")
    common.print_table(["", "probe", "overlap of digits"], [
        [row["kind"], f"{row['probe']:.1%}", f"{row['overlap']:.2f}"] for row in rows])
    common.print_table(["\nsamples", "confidence", "balance", "Fréchet"], [
        [row["row"], f"{row['confidence']:.1%}", f"{row['balance']:.2f}", f"{row['frechet']:.1f}"]
        for row in samples])
    return {"samples": samples, "judge": accuracy}, digit_claims(rows, samples)


@torch.no_grad()
def digit_images(models, codes, known, x_test, order, g, n=2000):
    """{row: (n, 784)}: test images, and what the models make of fits to the codes known of training
    images, and of points between the mean codes of random pairs of test images."""
    n = min(n, len(x_test) // 2)
    a, b = torch.randint(len(x_test), (2, n), generator=g, device=x_test.device)
    alpha = torch.rand(n, 1, generator=g, device=x_test.device)
    made = {"test images": x_test[order[:n]], "pixels, between": x_test[a].lerp(x_test[b], alpha)}
    for kind, model in models.items():
        z, draw = codes[kind].mean, known[kind].draw
        ways = {"between": z[a].lerp(z[b], alpha), "mixture": mixture(draw, n, g),
                "Gaussian": gaussian(draw, n, g)}
        if kind == "VAE":
            ways["prior"] = torch.randn(n, LATENT, generator=g, device=z.device)
        made |= {f"{kind}, {way}": reconstruct(model["nets"], z) for way, z in ways.items()}
    return made


@torch.no_grad()
def digit_paths(models, codes, x_test, y_test, pairs=((3, 8), (4, 9)), steps=9):
    """Fig. 2a: ({row: images (pairs * steps, 784)}, [alpha])."""
    alpha = torch.linspace(0, 1, steps, device=x_test.device)

    def path(values):
        means = [[values[y_test == digit].mean(0) for digit in pair] for pair in pairs]
        return torch.cat([between(a, b, alpha) for a, b in means])

    rows = {"Test Data": path(x_test)}
    for kind, model in models.items():
        z = codes[kind].draw if kind == "VAE" else codes[kind].mean
        rows[kind] = reconstruct(model["nets"], path(z))
    return rows, [f"{value:.2g}" for value in alpha.tolist()]


def trained_judge(run, args, x, y):
    g = common.generator(args.seed, "judge", args.device)
    judge = Judge(g)

    def compute(checkpoint):
        train("judge", judge, lambda i: F.cross_entropy(judge(x[i]), y[i]), len(x), 128,
              args.judge_steps, 2e-3, g, checkpoint)
        return judge.state_dict()

    judge.load_state_dict(run.unit("judge", compute))
    return judge.eval()


def digit_claims(rows, samples):
    """What Figs. 2 and 5 are said to show, in figures."""
    by = {row["kind"]: row for row in rows}
    got = {row["row"]: row for row in samples}

    def listed(key, text):
        return "; ".join(f"{kind} {format(by[kind][key], text)}" for kind in KINDS)

    table = [("mnist: EAE's latent histograms separate digits best (overlap)", "yes",
              listed("overlap", ".2f"), by["EAE"]["overlap"] == min(by[k]["overlap"]
                                                                    for k in KINDS)),
             ("mnist: EAE's latents separate digits best (linear probe)", "suggested",
              listed("probe", ".1%"), by["EAE"]["probe"] == max(by[k]["probe"] for k in KINDS)),
             ("mnist: EAE's latents have the highest variance", "yes",
              listed("variance", ".3g"), by["EAE"]["variance"] == max(by[k]["variance"]
                                                                      for k in KINDS))]
    for claim, name in (("EAE interpolates between images better than the AE", "between"),
                        ("EAE generates better than the AE", "mixture")):
        a, b = (got[f"{kind}, {name}"]["frechet"] for kind in ("EAE", "AE"))
        table.append((f"mnist: {claim} (Fréchet)", "yes", f"{a:.1f}; {b:.1f}", a < b))
    best = {kind: min(row["frechet"] for row in samples if row["row"].startswith(kind)
                      and "between" not in row["row"]) for kind in KINDS}
    return table + [("mnist: EAE generates better than the VAE (Fréchet, best way of each)",
                     "suggested", "; ".join(f"{kind} {best[kind]:.1f}" for kind in KINDS),
                     best["EAE"] < best["VAE"])]


def study_celeba(run, args, data):
    """Fig. 3: faces at a high and at a low temperature."""
    x, _, x_test, _ = data
    x_test = x_test[:1000]
    outs, rows, made, found = {}, [], {"test image": x_test[:12]}, {}
    for title, name in (("high T", "hot"), ("low T", "celeba")):
        s = setting_of(args, name, "celeba")._replace(size=len(x))
        g = common.generator(args.seed, "celeba", args.device)
        nets = build("celeba", g)

        def loss(index):
            return reconstruction_loss(nets, x[index])

        @torch.no_grad()
        def codes(images=x_test[:64]):
            return torch.cat([nets["encoder"](part.float() / 255) for part in images.split(100)])

        @torch.no_grad()
        def take(_):
            U = loss(torch.arange(min(256, len(x)), device=x.device))
            return torch.cat([codes(x_test).flatten(), U[None]])

        out, z, row = simmer(run, args, f"celeba-{title.replace(' ', '-')}", nets, loss, codes,
                             take, s, g)
        with torch.no_grad():
            x_hat = torch.cat([reconstruct(nets, part) for part in
                               z[:, :-1].mean(0).view(len(x_test), -1).split(100)])
        label = f"{title} = {s.temperature:g}"
        outs[label], made[label] = out, x_hat[:12]
        rows.append(row)
        found[title] = face_scores(x_hat, x_test.float() / 255)
        found[title]["loss std"] = z[:, -1].std().item()
    mean = x.float().mean(0) / 255
    yardstick = ((x_test.float() / 255 - mean) ** 2).mean().item()
    print(f"\nceleba: {len(x):,} training and {len(x_test):,} test faces; mean face "
          f"{yardstick:.4f}")
    common.print_table(["", "test MSE", "recognised", "variance between faces"], [
        [name, f"{row['mse']:.4f}", f"{row['recognised']:.1%}", f"{row['distinct']:.1%}"]
        for name, row in found.items()])
    run.figure(plot_faces(outs, made), "3_faces", "Fig. 3: faces at a high and a low temperature")
    run.figure(plot_thermostat(outs), "celeba_thermostat", "CelebA: training of the EAEs")
    return ({"faces": found, "mean face": yardstick, "thermostat": rows}, face_claims(found),
            {f"celeba {name}": out for name, out in outs.items()})


def face_claims(found):
    """What Fig. 3 is said to show, in figures."""
    hot, cold = found["high T"], found["low T"]
    return [
        ("celeba: low T has at most half the test MSE of high T", "clearly lower",
         f"{cold['mse']:.4f}; {hot['mse']:.4f}", cold["mse"] <= hot["mse"] / 2),
        ("celeba: high T makes one generic face (at most 25 % of the variance between faces)",
         "all-human face", f"{hot['distinct']:.1%}, {hot['recognised']:.1%} recognised",
         hot["distinct"] <= 0.25),
        ("celeba: low T makes individuals (half of that variance, half of the faces recognised)",
         "individual", f"{cold['distinct']:.1%}, {cold['recognised']:.1%} recognised",
         cold["distinct"] >= 0.5 and cold["recognised"] >= 0.5),
        ("celeba: the loss band is wider at high T (std over the kept encoders, one batch)", "yes",
         f"{hot['loss std']:.4f}; {cold['loss std']:.4f}", hot["loss std"] > cold["loss std"])]


def study_waves(run, args, _):
    """Fig. 1, Fig. 4, Table 4: the reaction-diffusion system."""
    setting = setting_of(args, "reaction-diffusion")

    def data(checkpoint):
        return tuple(value.float().cpu() for value in spiral(
            setting.size, args.grid, checkpoint=checkpoint, device=args.device))

    basis, u, u_t = (value.to(args.device) for value in run.unit("spiral", data))
    lost = (u[:, args.modes:].square().sum() / u.square().sum()).item()
    g = common.generator(args.seed, "spiral split", args.device)
    if args.modes == 10_000:  # the document's pixels
        x, x_t = u @ basis, u_t @ basis  # (frames, grid^2)
    else:
        x, x_t = u[:, :args.modes], u_t[:, :args.modes]
    x, x_t = (value + 1e-6 * torch.randn(value.shape, generator=g, device=value.device)
              for value in (x, x_t))
    count = int(0.9 * len(x))
    index = torch.randperm(count, generator=g, device=x.device)[:int(0.4 * len(x))]
    test = slice(count, None)
    runs = [one_wave(run, args, f"spiral-{k + 1}", setting, args.grid ** 2, (x[index], x_t[index]),
                     (x[test], x_t[test])) for k in range(args.runs)]
    return wave_results(run, runs, basis, x, x_t, test, lost)


def one_wave(run, args, name, setting, pixels, train_set, test_set):
    """An EAE of the waves and what its encoders say of the dynamics."""
    (x, x_t), (x_test, x_t_test) = train_set, test_set
    g, setting = common.generator(args.seed, name, args.device), setting._replace(size=len(x))
    nets = build("reaction-diffusion", g, pixels, x.shape[1])
    *inner, last = nets["decoder"]
    # Adam moves every number alike: where a mode stands for all pixels, it has to go further
    far = 0.1 * math.sqrt(pixels) if x.shape[1] < pixels else 1.0
    optimiser = torch.optim.Adam([
        {"params": inner[0].parameters()},
        {"params": last.parameters(), "lr": setting.rate * far}], setting.rate, fused=True)

    def loss(index):
        errors, *_ = sindy_terms(nets, x[index], x_t[index], pixels)
        return WEIGHTS[0] * errors[0] + WEIGHTS[1] * errors[1]  # Eq. (14)

    @torch.no_grad()
    def take(_=None):
        errors, Xi, z, _ = sindy_terms(nets, x_test, x_t_test, pixels)
        return torch.cat([Xi.flatten(), z[0], torch.stack(errors)])  # (26,)

    out, found, row = simmer(run, args, name, nets, loss, lambda: nets["encoder"](x[:256]), take,
                             setting, g, optimiser)
    Xi, start, errors = found[:, :22].view(-1, 11, 2), found[:, 22:24], found[:, 24:]
    power = torch.stack([value.square().sum(1).mean() / pixels for value in test_set])
    with torch.no_grad():
        codes = nets["encoder"](x_test)
    every = max(1, len(Xi) // 200)
    omega = rotation_rate(integrate(Xi[::every], start[::every], 0.05, 1000), 0.05)
    path = integrate(Xi.mean(0)[None], codes[:1], 0.05, 1000)[:, 0]
    return {"nets": nets, "out": out, "row": row, "Xi": Xi.cpu(), "codes": codes.cpu(),
            "path": path.cpu(), "omega": omega.cpu(), "errors": (errors / power).mean(0).tolist(),
            "data": rotation_rate(codes[:, None], 0.05).item(),
            "radius": ((path[-200:] - codes.mean(0)).norm(dim=1).mean()
                       / (codes - codes.mean(0)).norm(dim=1).mean()).item()}


def wave_results(run, runs, basis, x, x_t, test, lost):
    """Tables, figures and claims of all runs."""
    grid, first = math.isqrt(basis.shape[1]), runs[0]
    for found in runs:
        found["terms"], found["table"] = significant(found["Xi"])
    print("\nTable 4, run 1: coefficients over the encoders, mean and mode; document's beside them")
    common.print_table(["", "in dz1/dt", "", "document", "", "in dz2/dt", "", "document", ""], [
        [name, *(f"{v:.2f}" for v in a), *theirs.split()[:2], *(f"{v:.2f}" for v in b),
         *theirs.split()[2:]]
        for name, a, b, theirs in zip(CANDIDATES, *first["table"].tolist(), TABLE_4.splitlines())])
    common.print_table(["\nrun", "terms of dz1/dt", "of dz2/dt", "rate", "errors of x, x_t"], [
        [k + 1, ", ".join(found["terms"][0]), ", ".join(found["terms"][1]),
         f"{found['omega'].mean():+.4f}", "{:.4f}, {:.4f}".format(*found["errors"])]
        for k, found in enumerate(runs)])
    at = torch.linspace(0, len(first["codes"]) - 1, 5).long()
    with torch.no_grad():
        z, z_t = tangent(first["nets"]["encoder"], x[test], x_t[test])
        z_t = candidates(z) @ coefficients(z, z_t)
        shown = [x[test], x_t[test], *tangent(first["nets"]["decoder"], z, z_t)]
        if x.shape[1] < grid ** 2:
            shown = [value @ basis[:x.shape[1]] for value in shown]
    labels = ("u", "du/dt", "u, decoded", "du/dt, decoded")
    run.figure(plot_waves({label: value[at].view(-1, grid, grid).cpu()
                           for label, value in zip(labels, shown)},
                          [f"t = {0.05 * (test.start + int(i)):.1f}" for i in at]), "1_waves",
               "Fig. 1a-c: test frames and what the first run makes of them")
    run.figure(plot_dynamics(runs), "1_dynamics", "Fig. 1d-f: the dynamics that the encoders see")
    run.figure(plot_correlations(first["Xi"]), "4_correlations",
               "Fig. 4: correlations of the coefficients, run 1")
    outs = {found["row"]["run"]: found["out"] for found in runs}
    run.figure(plot_thermostat(outs), "waves_thermostat",
               "Reaction-diffusion: training of the EAEs")
    results = {"variance beyond the modes": lost, "thermostat": [found["row"] for found in runs],
               "runs": [{"terms": found["terms"], "table": found["table"].tolist(),
                         "omega": common.mean_std(found["omega"]), "data": found["data"],
                         "radius": found["radius"], "errors": found["errors"]} for found in runs]}
    return results, wave_claims(runs), outs


def wave_claims(runs):
    """What the document says of the reaction-diffusion system."""
    plain = {"z1", "z2", "sin z1", "sin z2"}
    terms = [[set(names) for names in found["terms"]] for found in runs]
    good = sum(all(names and names <= plain for names in pair) for pair in terms)
    other = sorted(set().union(*(names for pair in terms for names in pair)) - plain)
    omegas = torch.stack([found["omega"].mean() for found in runs])
    worst = (omegas.abs() / OMEGA - 1).abs().max().item()
    radii = [found["radius"] for found in runs]
    errors = torch.tensor([found["errors"] for found in runs]).mean(0).tolist()
    # the share of a run's encoders that turn against the majority
    mixed = max(min((found["omega"] > 0).float().mean(), (found["omega"] < 0).float().mean()).item()
                for found in runs)
    return [
        ("waves: only linear and sine terms are significant (in every run)", "yes",
         f"{good} of {len(runs)} runs" + (f"; also {', '.join(other)}" if other else ""),
         good == len(runs)),
        ("waves: rotation rate of the identified system, rad / time (every run within 3 %)",
         f"{OMEGA} (data)", f"{common.show(common.mean_std(omegas.abs()))}; worst {worst:.1%} off",
         worst <= 0.03),
        ("waves: it stays on the limit cycle for 50 units of time (radius within 10 %)", "yes",
         f"{min(radii):.3f} to {max(radii):.3f} of the test frames'",
         all(abs(radius - 1) <= 0.1 for radius in radii)),
        ("waves: coefficient sets of both senses of rotation, as z1 <-> z2 makes them (over runs)",
         "yes", f"{int((omegas > 0).sum())} and {int((omegas < 0).sum())} of {len(runs)} runs",
         bool((omegas > 0).any() and (omegas < 0).any())),
        ("waves: both sets in the ensemble under one decoder (5 % of it)", "yes",
         f"at most {mixed:.0%} of a run's encoders turn the other way", mixed >= 0.05),
        ("waves: relative test errors of x, x_t (SINDy autoencoder 0.016)", "0.016, 0.016",
         "{:.4f}, {:.4f}".format(*errors), max(errors) < 0.0165)]


def study_temperature(run, args, data):
    """What the document argues for: EAE over T and VAE over beta, on digits."""
    x, y, x_test, y_test = data
    setting, rows, outs, thermostat = setting_of(args, "temperature"), [], {}, []
    g = common.generator(args.seed, "temperature evaluation", args.device)
    count = min(10_000, len(x))
    for kind, values in (("EAE", TEMPERATURES), ("VAE", BETAS)):
        for value in values:
            s = setting._replace(temperature=value) if kind == "EAE" else setting
            model = image_model(run, args, f"sweep-{kind}-{value:g}", kind, "mnist", x, s, value)
            code, z = codes_of(model, x_test, g), codes_of(model, x[:count], g).mean
            probe = linear_probe(z, y[:count], code.mean, y_test)
            rows.append(image_row(model, code, x_test) | {"value": value, "probe": probe})
            if kind == "EAE":
                outs[f"T = {value:g}"] = model["out"]
                thermostat.append(model["row"])
    print("\ntemperature of the EAE, beta of the VAE")
    common.print_table(["", "test MSE", "active", "informative", "variance", "probe"], [
        [f"{row['kind']} {row['value']:g}", f"{row['mse']:.4f}", row["active"],
         row["informative"], f"{row['variance']:.3g}", f"{row['probe']:.1%}"] for row in rows])
    run.figure(plot_sweep(rows), "temperature", "Temperature of the EAE, weight of the VAE's KL")
    run.figure(plot_thermostat(outs), "temperature_thermostat",
               "Training of the EAEs over the temperature")
    return ({"rows": rows, "thermostat": thermostat}, sweep_claims(rows, pca_error(x, x_test, 0)),
            {f"sweep {name}": out for name, out in outs.items()})


def sweep_claims(rows, mean_image):
    """Is entropy better than the KL, and are both limits of T where the document puts them?"""
    eae, vae = ([row for row in rows if row["kind"] == kind] for kind in ("EAE", "VAE"))
    warm, hot = [row for row in eae if row["value"]], eae[-1]
    usual = next(row for row in vae if row["value"] == 1)
    rivals = [row for row in warm if row["mse"] <= usual["mse"]]
    best = max(rivals, key=lambda row: row["informative"], default=None)
    keys = ("informative", "probe")
    better = sum(any(e["mse"] <= v["mse"] and all(e[key] >= v[key] for key in keys) for e in warm)
                 for v in vae)
    lowest = min(row["mse"] for row in warm)
    return [
        ("temperature: excessively high T gives uninformative codes (MSE near the mean image)",
         "yes", f"T = {hot['value']:g}: {hot['mse']:.4f}, mean image {mean_image:.4f}",
         hot["mse"] >= 0.9 * mean_image),
        ("temperature: at the test MSE of the VAE (beta 1), more informative units", "yes",
         f"T = {best['value']:g}: {best['informative']}; VAE {usual['informative']}" if best
         else "no EAE is as good", bool(best and best["informative"] > usual["informative"])),
        ("temperature: for every beta an EAE that is no worse in MSE, units and probe", "-",
         f"{better} of {len(vae)}", better == len(vae)),
        ("temperature: some T > 0 reconstructs better than the limit T = 0", "-",
         f"{lowest:.4f}; {eae[0]['mse']:.4f}", lowest < eae[0]["mse"])]


def available(args, names):
    """{experiment: what load_images returns}; of `all` those without data are left out."""
    data = {}
    for name in names:
        try:
            size = setting_of(args, name).size
            data[name] = None if name == "reaction-diffusion" else load_images(
                name, args.dataset, size, args.data, args.device)
        except SystemExit:
            if args.experiment != "all":
                raise
            common.note(f"note: {name} is left out")
    return data


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args = arguments(argv)
    data = available(args, EXPERIMENTS if args.experiment == "all" else (args.experiment,))
    studies = {"mnist": functools.partial(study_images, "mnist"),
               "frey": functools.partial(study_images, "frey"), "celeba": study_celeba,
               "reaction-diffusion": study_waves, "temperature": study_temperature}
    label = {"real": "real data", "glyphs": "generated glyphs"}[args.dataset]
    label = "simulated waves" if args.experiment == "reaction-diffusion" else label
    results, claims, metrics, every = {}, [], [], 20
    with common.Run(__file__, args, label, additive=("experiment", "runs")) as run:
        for name, images in data.items():
            results[name], rows, outs = studies[name](run, args, images)
            claims += rows
            metrics += [{"run": key, "step": step} | {
                term: out[term][step - 1].item() for term in ("loss", "kinetic") if term in out}
                for key, out in outs.items() for step in range(every, len(out["loss"]) + 1, every)]
        print()
        common.print_table(
            ["sampler", "T", "kinetic / T", "energy drift", "loss", "latent variance", "steps / s"],
            [[row["run"], f"{row['T']:g}", f"{row['kinetic']:.2f}",
              "" if row["drift"] is None else f"{row['drift']:.1e}",
              f"{row['loss']:.4f} ± {row['std']:.4f}", f"{row['variance']:.3g}",
              f"{row['steps per second']:.0f}"]
             for found in results.values() for row in found["thermostat"]])
        return run.finish(results, claims, metrics)


if __name__ == "__main__":
    main()
