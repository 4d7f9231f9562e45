"""Entropic autoencoders: no prior, but an ensemble of encoders at a temperature.

Reproduces "Entropic Auto-Encoding via Implicit Free-Energy Minimization". The reconstruction loss
U is the only objective. Under a fixed decoder phi the encoder's weights theta are particles in the
potential U, held at the temperature T by a Nose-Hoover chain (Simmering); in time they sample

    p(theta) = exp(-U(theta, phi) / T) / Z(phi),                              Eqs. (1), (8)

and the decoder descends its free energy -T log Z, whose gradient is an average (Algorithm 1):

    dF/dphi = <dU/dphi> over the encoders sampled under this decoder          Eqs. (7), (10)

    python eae_simmering.py                           MNIST: about 5 minutes on 2 CPU cores
    python eae_simmering.py --experiment reaction-diffusion     the waves: about 8 minutes
    python eae_simmering.py --experiment all          all that has data here: about 33 minutes
    python eae_simmering.py --sampler langevin --out out/langevin    another thermostat

A run leaves figures, results.json, metrics.csv and the nets (units/*.pt) in
out/eae_simmering-<preset>; `all` also gathers what single experiments left there. It has not been
timed on a GPU. What the document leaves open or its text lost, and what we chose (temperatures and
steps: SETTINGS, HOT):
* MNIST and Frey nets are 784-256-256-64 (560-...) and back with ReLU, U is the mean binary cross-
  entropy of a pixel; of CelebA it is the squared error, its kernels are 3x3, but 4x4 under a stride
  of 4, without ReLU at the end, under which pixels die.
* Velocities are drawn anew every 20 steps, as the document does every 5 for the waves: it slows the
  drift along the free scale directions of a ReLU encoder, which nothing bounds. quick has many
  updates of few samples each, `paper` the document's few of thousands. VAE's and AE's rate falls.
* Appendix A.4, which is lost: M encoders are kept, one every `stride` steps (20; waves: 1) under
  the trained decoder: they diffuse around the trained encoder and are far from independent. The
  code of an image is its mean over them, its reconstruction that of the mean code. To generate,
  up to 10,000 training images are encoded by one of them each, Eq. (2), 20 Gaussians are fitted to
  the k-means clusters of these codes, and draws from them are decoded ("mixture"); or one Gaussian.
* Active units have a variance above 0.01 over images and encoders, by the encoders' motion, too.
* The nets of the waves see 64 POD modes, which hold the data to rounding (`paper`: the pixels). Eq.
  (16) is least squares in dz/dt, with a ridge: on a limit cycle its candidates are collinear. Eq.
  (14) has the weights 1 and 0.5.
"""
import math
import pathlib
import sys
from collections import OrderedDict, namedtuple

sys.path.append(str(pathlib.Path(__file__).with_name(".first")))  # until its second edition
import first_edition as common  # noqa: E402
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

# B batch, D latent, N weights of the encoder, M members of its ensemble, K encoders per update
PRESETS = {  # all else: COSTS
    "smoke": dict(dataset="glyphs", runs=2, grid=32, modes=64),
    "quick": dict(dataset="real", runs=4, grid=100, modes=64),
    "paper": dict(dataset="real", runs=4, grid=100, modes=10_000)}  # 10,000: pixels
FLAGS = {  # of an EAE: default, least value, meaning
    "temperature": (1e-7, 0, "T, unit of the loss (not of the sweep; of celeba the low one); 0: no "
                             "ensemble, Adam"),
    "final_temperature": (-1.0, 1e-300, "T at the end of a geometric schedule"),  # -1: none
    "mass": (1.0, 1e-12, "mass m of a weight"),
    "step": (0.5, 1e-12, "time step, in the sampler's own units"),
    "chain": (30, 1, "thermostats in the chain"),
    "tau": (10.0, 1e-3, "thermostat time in steps; of langevin: 1 / friction"),
    "redraw": (20, 0, "steps between new Maxwell velocities, 0: never"),
    "substeps": (1, 1, "substeps of the chain"),
    "updates": (1200, 1, "decoder updates"),
    "samples": (20, 1, "encoders per update, K"),
    "batch": (128, 2, "items per step"),
    "members": (50, 2, "encoders of the final ensemble")}
OTHERS = dict(
    sampler="nose-hoover", suzuki_yoshida=False,
    stride=20,                      # steps between the members of the final ensemble
    rate=1e-3,                      # Adam's, of decoder, VAE and AE
    vae=8000, ae=8000, judge=2000,  # Adam's steps for each
    size=0)                         # images or frames; 0: all
Setting = namedtuple("Setting", [*FLAGS, *OTHERS],
                     defaults=[default for default, _, _ in FLAGS.values()] + [*OTHERS.values()])
SETTINGS = {  # the experiments, and their physics
    "mnist": Setting(), "frey": Setting(), "celeba": Setting(1e-9, step=1.0),
    "reaction-diffusion": Setting(step=0.02, redraw=5, rate=1e-2), "temperature": Setting()}
WAVES = dict(updates=100, samples=200, batch=256, members=5000, stride=1, size=10_000)
TINY = dict(updates=6, samples=5, batch=32, members=3, stride=2, vae=30, ae=30, judge=60)
COSTS = {  # where they differ from the defaults
    "smoke": {"mnist": TINY, "frey": TINY, "temperature": TINY,
              "celeba": TINY | dict(batch=8, size=100),
              "reaction-diffusion": TINY | dict(members=20, size=1000)},
    "quick": {"mnist": dict(vae=16_000), "frey": dict(batch=256, vae=12_000, ae=12_000),
              "celeba": dict(updates=640, samples=5, batch=32, members=20, size=10_000),
              "temperature": dict(updates=360, members=20), "reaction-diffusion": WAVES},
    "paper": {"mnist": dict(updates=250, samples=3126, batch=32, vae=109_410, ae=218_820),
              "frey": dict(updates=1500, samples=1000, batch=2000, members=100, stride=10,
                           vae=10_000, ae=10_000),
              "celeba": dict(updates=700, samples=5087, batch=32, members=100, stride=10),
              "temperature": dict(updates=900), "reaction-diffusion": WAVES}}
Codes = namedtuple("Codes", "mean draw variance")  # of codes_of
KINDS = ("EAE", "VAE", "AE")
LATENT, ACTIVE = 64, 0.01  # units of MNIST's and Frey's nets; variance of an active one
CHECK, HOT = 20, 1e-4      # steps between looks at losses and checkpoint; celeba's high T
SWEEP = {"EAE": (0, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3), "VAE": (0.01, 0.1, 0.3, 1, 3, 10)}
SUZUKI_YOSHIDA = (*[0.414490771794376] * 2, -0.657963087177503, *[0.414490771794376] * 2)
SIGNIFICANT, RIDGE, WEIGHTS, OMEGA = 0.1, 1e-3, (1.0, 0.5), 0.9077  # Table 4; Eqs. (16), (14); data
CANDIDATES = (*"z1 z2 z1² z1z2 z2² z1³ z1²z2 z1z2² z2³".split(), "sin z1", "sin z2")  # Eq. (13)
DOCUMENT = {  # Table 1: test MSE and active units of 64
    "mnist": {"EAE": (0.026, 64), "VAE": (0.016, 16), "AE": (0.010, 53)},
    "frey": {"EAE": (0.0052, 64), "VAE": (0.0046, 3), "AE": (0.0014, 64)}}
TABLE_4 = {  # coefficients of CANDIDATES
    "mean in dz1/dt": "0.47 1.00 0.00 0.00 -0.03 0.00 -0.02 -0.03 0.03 0.36 0.86",
    "mode in dz1/dt": "0.48 1.17 0.00 0.00 -0.01 -0.01 -0.03 -0.03 0.02 0.31 0.81",
    "mean in dz2/dt": "-1.98 -1.37 0.01 -0.03 -0.03 -0.05 0.09 0.14 0.09 0.13 0.11",
    "mode in dz2/dt": "-1.98 -0.38 0.00 -0.03 -0.01 -0.07 -0.03 -0.03 0.02 0.31 0.85"}
SOURCES = {"frey": ("frey_rawface.mat", "https://cs.nyu.edu/~roweis/data/frey_rawface.mat"),
           "celeba": ("celeba/img_align_celeba",
                      "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html")}


# --- data ----------------------------------------------------------------------------------------

def load_images(experiment, dataset, size, folder, device):
    """(x, y, x_test, y_test): pixels in [0, 1] (n, pixels), of celeba uint8 (n, 3, 64, 64), and
    labels (none: zeros). Of MNIST's training images 10,000 stay apart; all else is split 80 to 10
    (unused) to 10 %, Frey's at random, CelebA's in order, which is nearly its standard split."""
    faces = experiment == "celeba"
    if dataset == "glyphs":
        x, y = common.glyphs(size or 1000, 0, 3 if faces else 1, device)  # (n, 1 or 3, 28, 28)
        x = ((F.interpolate(x, size=64, mode="bilinear") * 255).byte() if faces  # (n, 3, 64, 64)
             else x[..., 4:24].flatten(1) if experiment == "frey" else x.flatten(1))  # (n, pixels)
    elif experiment in SOURCES:
        from scipy.io import loadmat
        path, url = pathlib.Path(folder, SOURCES[experiment][0]), SOURCES[experiment][1]
        try:
            x = celeba(path, size) if faces else loadmat(path)["ff"].T  # (1965, 560)
        except Exception as error:  # missing, damaged, no network, quota: many kinds
            common.die(f"cannot read {path} ({' '.join(str(error).split())[:120]}): it is "
                       f"published at {url}; put it there")
        if not faces:  # frames follow each other in time: shuffled, alike for every --seed
            order = torch.randperm(len(x), generator=common.generator(0, "frey"))
            x = (torch.from_numpy(x).float() / 255)[order].contiguous()
        x, y = x.to(device), torch.zeros(len(x), dtype=torch.long, device=device)
    else:
        (x, y), (x_test, y_test) = (common.images("mnist", train, folder, device)
                                    for train in (True, False))
        return x[:50_000].flatten(1), y[:50_000], x_test.flatten(1), y_test
    a, b = int(0.8 * len(x)), int(0.9 * len(x))
    return x[:a], y[:a], x[b:], y[b:]


def celeba(home, size):
    """Aligned faces from a folder, downloaded if it has none: uint8 (n, 3, 64, 64), 0: all of them;
    the centre square of 128/178 of the width, at 64x64: of half-size images a plain crop."""
    import numpy
    from PIL import Image
    from torchvision import datasets
    if not any(home.glob("*.jpg")):
        datasets.CelebA(home.parent.parent, "all", download=True)
    faces = []
    for path in tqdm(sorted(home.glob("*.jpg"))[:size or None], "faces", disable=None, leave=False):
        try:
            image = Image.open(path).convert("RGB")
        except OSError as error:
            raise OSError(f"{path.name}: {error}") from error
        w, h = image.size
        half = round(w * 32 / 89)  # half a side: 64 of 178
        image = image.crop((w // 2 - half, h // 2 - half, w // 2 + half, h // 2 + half))
        faces.append(torch.from_numpy(numpy.array(image.resize((64, 64)))).permute(2, 0, 1))
    return torch.stack(faces)  # (n, 3, 64, 64)


def spiral(frames, n=100, length=20.0, d=0.1, beta=1.0, dt=0.05, tolerance=1e-5, checkpoint=None,
           device="cpu"):
    """The lambda-omega spiral of the document's Fig. 1 and its time derivative, in POD modes.

    w = u + iv obeys w_t = (1 - |w|^2) w - i beta |w|^2 w + d Laplace(w), periodic, in Fourier space
    by an integrating factor and Runge-Kutta 4; u and u_t are multiplied by exp(-r^2 / 100). A frame
    is its coefficients in a basis that grows with every 100 frames by what it misses by more than
    the tolerance. Returns basis (r, n^2), orthonormal, u and u_t (frames, r), by falling variance.
    """
    X = torch.arange(n, dtype=torch.double, device=device) * length / n - length / 2
    Y = X[:, None]  # (n, 1)
    r, angle = (X ** 2 + Y ** 2).sqrt(), torch.atan2(Y, X)  # (n, n)
    k = 2 * math.pi * torch.fft.fftfreq(n, length / n, dtype=torch.double, device=device)
    linear = -d * (k[:, None] ** 2 + k ** 2)  # (n, n): d Laplace in Fourier space, solved exactly
    half, window = torch.exp(linear * dt / 2), torch.exp(-0.01 * r ** 2)  # decay over dt / 2
    whole = half ** 2  # over dt

    def reaction(W):
        w = torch.fft.ifft2(W)  # products are taken in space
        A2 = w.real ** 2 + w.imag ** 2
        return torch.fft.fft2(w * torch.complex(1 - A2, -beta * A2))

    W = torch.fft.fft2(torch.polar(torch.tanh(r), angle - r))
    first, basis, parts = 0, torch.zeros(0, n * n, dtype=torch.double, device=device), []
    if checkpoint and checkpoint.state:
        first, W, basis, parts = checkpoint.restore()
    for chunk in tqdm(range(first, frames // 100), "spiral", frames // 100, initial=first,
                      disable=None):
        u, u_t = [], []
        for _ in range(100):
            a = reaction(W)  # a, b, c, e: Runge-Kutta's slopes of the reaction alone
            u.append(torch.fft.ifft2(W).real * window)
            u_t.append(torch.fft.ifft2(a + linear * W).real * window)  # no finite difference
            b = reaction(half * (W + dt / 2 * a))
            c = reaction(half * W + dt / 2 * b)
            e = reaction(whole * W + dt * half * c)
            W = whole * W + dt / 6 * (whole * a + 2 * half * (b + c) + e)
        both = torch.stack(u + u_t).flatten(1)  # (200, n^2)
        missed = both - both @ basis.T @ basis  # (200, n^2), orthogonal to the basis
        if missed.abs().max() > tolerance:
            _, s, new = torch.linalg.svd(missed, full_matrices=False)
            new = new[s > tolerance]  # projected again below: rounding leaves a part in the basis
            basis = torch.cat([basis, torch.linalg.qr((new - new @ basis.T @ basis).T).Q.T])
        parts.append(both @ basis.T)  # (200, <= r)
        if len(parts) > 1 and checkpoint and checkpoint.due():
            checkpoint.save((chunk + 1, W, basis, parts))
    # zeros for modes that came later; (chunks, 2, 100, r) -> u and u_t (frames, r)
    both = torch.stack([F.pad(part, (0, len(basis) - part.shape[1])) for part in parts])
    u, u_t = both.view(len(parts), 2, 100, -1).transpose(0, 1).reshape(2, -1, len(basis))
    _, _, modes = torch.linalg.svd(torch.cat([u, u_t]), full_matrices=False)  # (r, r)
    return modes @ basis, u @ modes.T, u_t @ modes.T


# --- model ---------------------------------------------------------------------------------------

def build(experiment, generator, pixels=None, modes=None, codes=LATENT):
    """{encoder, decoder} of an experiment, weights and biases as PyTorch draws them, by generator.

    mnist, frey: (B, pixels) -> (B, codes), (B, 64) -> logits (B, pixels). celeba: (B, 3, 64, 64) ->
    (B, 256) and back. reaction-diffusion: (B, modes) -> (B, 2), drawn as of `pixels`; biases 0.
    """
    def mlp(*sizes, active=nn.ReLU):  # no activation behind the last layer
        pairs = list(zip(sizes, sizes[1:]))
        return nn.Sequential(*[m for a, b in pairs for m in (nn.Linear(a, b), active())][:-1])

    if experiment == "celeba":
        down = [m for a, b in ((3, 32), (32, 64), (64, 128), (128, 256))
                for m in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU())]  # 64 to 4 a side
        encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(4096, 256))  # 256 x 4 x 4 = 4096
        up, relu = nn.ConvTranspose2d, nn.ReLU()
        decoder = nn.Sequential(
            nn.Linear(256, 1024), relu, nn.Unflatten(1, (64, 4, 4)), up(64, 64, 4, 4), relu,
            up(64, 32, 4, 4), relu, up(32, 3, 3, padding=1))  # kernel, stride 4: 4, 16, 64 a side
    elif experiment == "reaction-diffusion":
        encoder, decoder = mlp(modes, 256, 2, active=nn.ELU), mlp(2, 256, modes, active=nn.ELU)
    else:  # codes: twice as many for a VAE, mu and logvar
        encoder, decoder = mlp(pixels, 256, 256, codes), mlp(LATENT, 256, 256, pixels)
    nets = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(generator.device)
    for layer in [layer for layer in nets.modules() if hasattr(layer, "weight")]:
        wide = modes and layer is encoder[0]  # drawn as if its inputs were all the pixels
        bound = 1 / math.sqrt(pixels if wide else layer.weight[0].numel())  # fan-in, as in PyTorch
        nn.init.uniform_(layer.weight, -bound, bound, generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator)
        if modes:  # no constant among the candidates: start centred
            nn.init.zeros_(layer.bias)
    return nets


def reconstruct(nets, z):
    """Images from codes: sigmoid of the logits; of faces the output itself, within [0, 1]."""
    out = nets["decoder"](z)
    return out.clamp(0, 1) if out.dim() == 4 else out.sigmoid()


# --- objective -----------------------------------------------------------------------------------

def reconstruction_loss(nets, x):
    """U, a scalar: mean binary cross-entropy of a pixel of (B, pixels), in nats; of faces, bytes
    (B, 3, 64, 64), the mean squared error."""
    if x.dtype == torch.uint8:
        x = x.float() / 255  # bytes until here: a quarter of the memory
        return F.mse_loss(nets["decoder"](nets["encoder"](x)), x)
    return F.binary_cross_entropy_with_logits(nets["decoder"](nets["encoder"](x)), x)


def vae_loss(nets, x, beta, generator):
    """Cross-entropy + beta KL(q(z|x) || N(0, 1)), both summed and then divided by the number of
    pixels, in nats; mean over the batch: a scalar."""
    mu, logvar = nets["encoder"](x).chunk(2, 1)  # (B, D) each
    z = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=generator, device=mu.device)
    kl = 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(1).mean()  # nats per image
    return F.binary_cross_entropy_with_logits(nets["decoder"](z), x) + beta * kl / x.shape[1]


def candidates(z):
    """The functions of Eq. (13), as in CANDIDATES: (..., 2) -> (..., 11)"""
    a, b = z.unbind(-1)
    cubic = a, b, a * a, a * b, b * b, a ** 3, a * a * b, a * b * b, b ** 3
    return torch.stack([*cubic, a.sin(), b.sin()], -1)


def coefficients(z, z_t, ridge=RIDGE):
    """Xi (11, 2) of Eq. (16): least squares of z_t (B, 2) in candidates(z), mean over the batch, +
    ridge |Xi|^2, without which it is not determined: on a limit cycle candidates are collinear."""
    theta = candidates(z.double())  # (B, 11), in double: the gram matrix squares its condition
    gram = theta.T @ theta / len(z) + ridge * torch.eye(theta.shape[1], device=z.device)  # (11, 11)
    return torch.linalg.solve_ex(gram, theta.T @ z_t.double() / len(z)).result.to(z.dtype)


def tangent(net, x, x_t):
    """net(x) and its time derivative, in forward mode: Eq. (15), for layers Linear and ELU."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            x, x_t = layer(x), x_t @ layer.weight.T  # the bias is constant in time
        else:
            y = layer(x)
            x, x_t = y, torch.where(x > 0, x_t, x_t * (y + 1))  # ELU' = exp(x) = y + 1 for x <= 0
    return x, x_t


def sindy_terms(nets, x, x_t, pixels):
    """Squared errors of x and x_t (B, modes), summed over modes, per pixel, mean over the batch,
    for Eq. (14) to weigh; also Xi and z."""
    z, z_t = tangent(nets["encoder"], x, x_t)  # (B, 2) each
    Xi = coefficients(z, z_t)  # (11, 2), Eq. (16), anew on every batch, with gradients
    decoded = tangent(nets["decoder"], z, candidates(z) @ Xi)  # Eqs. (13), (15)
    errors = [((a - b) ** 2).sum(1).mean() / pixels for a, b in zip((x, x_t), decoded)]
    return errors, Xi, z  # modes are orthonormal: their sum is that over pixels


# --- sampler -------------------------------------------------------------------------------------

def flatten(module):
    """A module's weights as one vector (N,) and their gradients as another, of which its parameters
    become views: one operation moves all of them."""
    parameters = list(module.parameters())
    theta = torch.cat([p.detach().flatten() for p in parameters])  # (N,)
    grad, sizes = torch.zeros_like(theta), [p.numel() for p in parameters]
    for p, value, slope in zip(parameters, theta.split(sizes), grad.split(sizes)):
        p.data, p.grad = value.view_as(p), slope.view_as(p)  # backward() adds in place: into `grad`
    return theta, grad


class Sampler:
    """Weights theta (N,) of `module` as particles in a potential U, at the temperature T.

    A step is half a step of the thermostat, velocity Verlet, half a step of the thermostat: a
    Nose-Hoover chain with Q_1 = N T (tau dt)^2, Q_k = T (tau dt)^2 (Martyna et al. 1996), whose odd
    and even members move in turn, so that a long one costs no more than a short one; or, under
    "langevin", friction 1 / (tau dt) and noise, all before Verlet. At T = 0 Adam moves the weights.
    """
    tensors = ("v", "grad", "odd", "even", "heat", "kinetic")

    def __init__(self, module, setting, generator):
        s, (self.theta, self.grad) = setting, flatten(module)
        self.method = s.sampler if s.temperature else "adam"
        self.m, self.dt, self.generator, self.N = s.mass, s.step, generator, len(self.theta)
        self.rate, half = (s.tau * s.step) ** -2, (s.chain + 1) // 2  # T / Q_k, k > 1
        self.adam = torch.optim.Adam([self.theta], s.rate, fused=True)  # for T = 0 alone
        # velocities of the chain's odd and of its even members; even[0] stands for the particles,
        # and behind the last member, odd or even, there is a wall that never moves
        self.odd = torch.zeros(half + 1, dtype=torch.double, device=self.theta.device)
        self.even, self.inertia, self.moves = self.odd.clone(), self.odd[1:] + 1, self.odd[1:] + 1
        self.inertia[0], self.moves[-1] = self.N, 1 - s.chain % 2  # Q_1 / Q_k; a wall if odd
        self.views = self.odd[:-1], self.even[:-1], self.even[1:], self.even[0]  # see half_chain
        parts = SUZUKI_YOSHIDA if s.suzuki_yoshida else (1.0,)
        self.parts = [part / s.substeps for part in parts] * s.substeps  # of dt / 2
        self.heat, self.kinetic, self.zero = self.odd.new_zeros(3)  # heat: energy given to the bath
        self.counting = False  # of the heat, which only `energy` needs
        self.v, self.every, self.count = torch.zeros_like(self.theta), s.redraw, 0
        self.redraw(s.temperature)

    def redraw(self, T):
        """New Maxwell velocities for particles and thermostats; their energy counts as heat."""
        if self.method == "adam":
            return
        before = self.energy(self.zero, T)
        self.v.normal_(generator=self.generator).mul_(math.sqrt(T / self.m))  # <m v^2> = T
        self.kinetic = self.v.dot(self.v).to(self.heat) * (self.m / 2)
        if self.method == "nose-hoover":
            wide = math.sqrt(self.rate)  # of the first one: Q_1 is N times as large
            self.odd[:-1].normal_(generator=self.generator).mul_(wide / self.inertia.sqrt())
            self.even[1:].normal_(generator=self.generator).mul_(wide * self.moves)  # wall: 0
        self.heat += before - self.energy(self.zero, T)

    def half_chain(self, T):
        """Half a time step of the Nose-Hoover chain, symmetric in time.

        Its velocities obey dv_k/dt = (Q_{k-1} v_{k-1}^2 - T) / Q_k - v_k v_{k+1}, the particles'
        dv/dt = -v_1 v. While the even ones rest, the odd ones move, and the other way round. Far
        from equilibrium one may want to outrun the time step; 10 / dt is the most it gets.
        """
        odd, even, rate, most = self.odd, self.even, self.rate, 10 / self.dt
        inner, left, right, particles = self.views  # odd members; their even neighbours
        # the particles as member 0 of the chain: v_0^2 is `rate` where their m v^2 is T on average
        particles.copy_(before := (self.kinetic * (2 * rate / (self.N * T))).sqrt())

        def move_odd(h):
            decay = (right * (-h / 2)).exp_()  # half of the friction before the kick, half after it
            inner.mul_(decay).add_((left * left).sub_(rate), alpha=h).mul_(decay)  # (Q v^2 - T) / Q
            inner.clamp_(-most, most)
            if self.counting:
                self.heat.add_(right.sum(), alpha=h * T)  # T v_2, T v_4, ...

        for part in self.parts:
            h = self.dt / 2 * part
            move_odd(h / 2)
            decay = (odd * (-h / 2)).exp_()
            even.mul_(decay)  # even[0], too: v_1 slows or speeds up the particles
            right.add_((inner * inner * self.inertia).sub_(rate).mul_(self.moves), alpha=h)
            even.mul_(decay)
            right.clamp_(-most, most)
            if self.counting:
                self.heat.add_(inner.dot(self.inertia), alpha=h * T)  # N T v_1, T v_3, ...
            move_odd(h / 2)
        scale = particles / before  # one factor for all N weights
        self.kinetic = self.kinetic * scale * scale
        self.v.mul_(scale.to(self.v.dtype))

    def friction(self, T):
        """A whole time step of Langevin's friction and noise."""
        keep, before = math.exp(-self.dt * math.sqrt(self.rate)), self.v.dot(self.v)  # exp(-1/tau)
        noise = torch.empty_like(self.v).normal_(generator=self.generator)
        self.v.mul_(keep).add_(noise, alpha=math.sqrt((1 - keep ** 2) * T / self.m))  # <m v^2> = T
        if self.counting:
            self.heat += (before - self.v.dot(self.v)).to(self.heat) * (self.m / 2)

    def force(self, potential):
        """U and, in self.grad, its gradient; other weights in it gather theirs."""
        self.grad.zero_()  # the encoder's; the decoder's goes on adding up
        with torch.enable_grad():  # its callers run without gradients
            U = potential()
        U.backward()
        return U.detach()

    def step(self, potential, T):
        """One time step, with one backward pass. potential() -> U, a scalar: U at its end."""
        if self.method == "adam":
            U = self.force(potential)
            self.theta.grad = self.grad
            self.adam.step()
            return U
        if self.every and self.count and self.count % self.every == 0:
            self.redraw(T)  # turns a drift along free scale directions into diffusion
        self.count += 1
        (self.friction if self.method == "langevin" else self.half_chain)(T)
        self.v.add_(self.grad, alpha=-self.dt / (2 * self.m))  # half a kick by the latest force
        self.theta.add_(self.v, alpha=self.dt)
        U = self.force(potential)  # of a new batch; its force opens the next step, too
        self.v.add_(self.grad, alpha=-self.dt / (2 * self.m))
        self.kinetic = self.v.dot(self.v).to(self.heat) * (self.m / 2)
        if self.method == "nose-hoover":
            self.half_chain(T)
        return U

    def temperature(self):
        """Kinetic: m v^2 by degree of freedom."""
        return self.kinetic * (2 / self.N)

    def energy(self, U, T):
        """The extended energy, which an exact integrator conserves at constant T if `counting`."""
        chain = (self.odd[:-1] ** 2 * self.inertia).sum() + (self.even[1:] ** 2).sum()
        return U.to(self.heat) + self.kinetic + self.heat + chain * (T / self.rate / 2)  # Q v^2 / 2

    def state_dict(self):
        return {key: getattr(self, key).clone() for key in self.tensors} | {
            "adam": self.adam.state_dict(), "count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
        self.adam.load_state_dict(state["adam"])
        for key in self.tensors:
            getattr(self, key).copy_(state[key])


# --- train ---------------------------------------------------------------------------------------

def batch_of(n, size, generator):
    """`size` of n items at random; all of them where the batch holds them all."""
    if size >= n:
        return torch.arange(n, device=generator.device)
    return torch.randint(n, (size,), generator=generator, device=generator.device)  # with repeats


def schedule(setting, progress):
    """T at a progress from 0 to 1: constant, or geometric to the final temperature."""
    T, end = setting.temperature, setting.final_temperature
    return T if end < 0 else T * (end / T) ** progress


def repeat(name, step, losses, filled, parts, checkpoint, advice=""):
    """losses[i] = step(i) for every i. A checkpoint keeps them, the tensors that step(i) has
    `filled`, and the state of `parts`. FloatingPointError names the first loss not finite."""
    first, total = 0, len(losses)
    if checkpoint and checkpoint.state:
        first, *saved = checkpoint.restore(*parts)
        for tensor, value in zip((losses, *filled), saved):
            tensor.copy_(value)  # in place: step(i) goes on writing into these tensors
    bar = tqdm(range(first, total), name, total, initial=first, disable=None)
    for i in bar:
        losses[i] = step(i)
        if (i + 1) % CHECK == 0 or i + 1 == total:  # reading losses waits for a GPU
            start = max(0, i + 1 - CHECK)
            bad = (~losses[start:i + 1].isfinite()).nonzero()
            if len(bad):
                raise FloatingPointError(
                    f"{name}: the loss is not finite at step {start + bad[0].item()}{advice}")
            bar.set_postfix_str(f"loss {losses[i]:.4f}", refresh=False)
            if checkpoint and checkpoint.due():
                checkpoint.save((i + 1, losses, *filled), *parts)


@torch.no_grad()
def algorithm_1(name, nets, loss, watch, sampler, setting, generator, optimiser=None,
                checkpoint=None):
    """Algorithm 1: K encoders are sampled while the decoder rests, then it takes a step of Adam
    along the mean gradient. Without an optimiser it rests throughout, and the ensemble of Appendix
    A.4 is collected: M encoders, one every `stride` steps. loss(index) -> U.

    One backward pass gives the force on the encoder and the decoder's gradient. Returns by sample
    "loss" and "kinetic", the kinetic temperature by T, and what watch() gives after each update
    ("variance", of latents) or for each member ("ensemble").
    """
    s = setting
    K, rounds = (s.samples, s.updates) if optimiser else (s.stride, s.members)
    total, (_, gradient) = K * rounds, flatten(nets["decoder"])
    losses, kinetic = torch.zeros(2, total, device=gradient.device)
    seen = watch()
    seen = seen.new_zeros(rounds, *seen.shape)  # (updates, D) or (M, ...)

    def potential():
        return loss(batch_of(s.size, s.batch, generator))

    def step(i):
        T = schedule(s, i / total if optimiser else 1)  # the ensemble is that of the final T
        U = sampler.step(potential, T)  # adds dU/dphi to the decoder's gradient
        if T:
            kinetic[i] = sampler.temperature() / T
        if (i + 1) % K == 0 and optimiser:
            gradient.div_(K)  # Eq. (7)
            optimiser.step()
            gradient.zero_()  # not zero_grad(), which would cut p.grad loose from it
        if (i + 1) % K == 0:
            seen[i // K] = watch()
        return U

    if optimiser and not (checkpoint and checkpoint.state):
        sampler.force(potential)  # the first half kick needs a force
        gradient.zero_()  # its encoder is none of the K
    parts = [nets, sampler, generator] + [optimiser] * bool(optimiser)
    repeat(name, step, losses, (kinetic, seen, gradient), parts, checkpoint,
           f": lower --step {s.step:g} or raise --mass")
    return {"loss": losses, "kinetic": kinetic, "variance" if optimiser else "ensemble": seen}


def energy_drift(loss, n, sampler, setting, steps=100):
    """Largest change of the extended energy, by the kinetic energy N T / 2, where one fixed batch
    is all the data and no velocities are redrawn."""
    T, index = schedule(setting, 1), torch.arange(min(n, setting.batch), device=sampler.grad.device)
    sampler.counting, sampler.every, every = True, 0, sampler.every
    energies = [sampler.energy(sampler.force(lambda: loss(index)), T)]
    for _ in range(steps):
        energies.append(sampler.energy(sampler.step(lambda: loss(index), T), T))
    sampler.counting, sampler.every, energies = False, every, torch.stack(energies)
    return ((energies - energies[0]).abs().max() / (sampler.N * T / 2)).item()


def train(name, nets, loss, n, batch, steps, rate, generator, checkpoint=None):
    """Adam on loss(index) of random batches; returns the losses (steps,). The rate falls linearly
    to 0 over the last half."""
    optimiser = torch.optim.Adam(nets.parameters(), rate, fused=True)
    losses = torch.zeros(steps, device=generator.device)

    def step(i):
        optimiser.param_groups[0]["lr"] = rate * min(1.0, 2 * (1 - i / steps))
        with torch.enable_grad():
            value = loss(batch_of(n, batch, generator))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        return value.detach()

    repeat(name, step, losses, (), [nets, optimiser, generator], checkpoint)
    return losses


# --- evaluate ------------------------------------------------------------------------------------

@torch.no_grad()
def codes_of(model, x, generator=None):
    """Codes of images x (n, pixels) under a model of image_model; generator: for a VAE alone.

    mean (n, D): over the ensemble, Eq. (2), of a VAE mu; draw (n, D): image i under encoder i % M,
    of a VAE from q(z|x); variance (D,): over images and encoders.
    """
    encoder = model["nets"]["encoder"]
    if model["kind"] == "AE":
        z = encoder(x)  # (n, D)
        return Codes(z, z, z.var(0))
    if model["kind"] == "VAE":
        mu, logvar = encoder(x).chunk(2, 1)  # (n, D) each
        noise = torch.randn(mu.shape, generator=generator, device=mu.device)
        return Codes(mu, mu + (logvar / 2).exp() * noise, mu.var(0))  # of mu: Appendix A.5.2
    (theta, _), M, total, square = flatten(encoder), len(model["ensemble"]), 0, 0
    for k, member in enumerate(model["ensemble"]):
        theta.copy_(member)  # theta is the encoder's weights
        z = torch.cat([encoder(part) for part in x.split(5000)])  # (n, D)
        if k == 0:
            draw = z.clone()
        draw[k::M] = z[k::M]  # one encoder for each image: a draw from Eq. (2)
        total, square = total + z.double(), square + z.double().square().mean(0)
    mean = total / M  # (n, D), in double: below, nearly equal numbers are subtracted
    return Codes(mean.float(), draw, (square / M - mean.mean(0).square()).float())


def image_row(model, code, x):
    """Table 1 of one model, from test images x (n, pixels) and their Codes."""
    return {"kind": model["kind"],
            "mse": F.mse_loss(reconstruct(model["nets"], code.mean), x).item(),
            "active": int((code.variance > ACTIVE).sum()), "variance": code.variance.mean().item()}


def linear_probe(z, y, z_test, y_test):
    """Test accuracy of a logistic regression on standardised latents (n, D)."""
    mean, std = z.mean(0), z.std(0) + 1e-8  # a dead unit has std 0
    z, z_test = (z - mean) / std, (z_test - mean) / std
    W = torch.zeros(z.shape[1], 10, device=z.device, requires_grad=True)
    b = torch.zeros(10, device=z.device, requires_grad=True)
    optimiser = torch.optim.LBFGS([W, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure():  # LBFGS calls it with gradients on
        optimiser.zero_grad()
        loss = F.cross_entropy(z @ W + b, y) + 1e-4 * W.square().sum()  # bounds W
        loss.backward()
        return loss

    optimiser.step(closure)
    return ((z_test @ W + b).argmax(1) == y_test).float().mean().item()


def pca_mse(x, x_test, k):
    """Test MSE of the best k-dimensional plane of x (n, pixels), and of its mean (k = 0)."""
    mean, (_, vectors) = x.mean(0), torch.linalg.eigh(torch.cov(x.T.double()))
    kept, rest = vectors[:, len(vectors) - k:].float(), x_test - mean  # not -k:, k may be 0
    return ((rest - rest @ kept @ kept.T) ** 2).mean().item()


def frechet_distance(a, b):
    """Squared Fréchet distance of the Gaussians fitted to features (n, d), (m, d); in float64."""
    a, b = a.cpu().double(), b.cpu().double()
    A, B = torch.cov(a.T), torch.cov(b.T)  # (d, d); A B has eigenvalues >= 0, up to rounding
    cross = torch.linalg.eigvals(A @ B).real.clamp(min=0).sqrt().sum()  # tr (A B)^(1/2)
    return (((a.mean(0) - b.mean(0)) ** 2).sum() + A.trace() + B.trace() - 2 * cross).item()


def build_judge(generator):
    """A classifier of digits (n, 784) -> logits (n, 10); without its head: features (n, 64)."""
    convs = [layer for channels in ((16, 32), (32, 64)) for layer in (
        nn.Conv2d(*channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]  # 14 to 7 to 3 a side
    features = nn.Sequential(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.ReLU(), *convs,
                             nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU())  # 64 x 3 x 3
    judge = nn.Sequential(OrderedDict(images=nn.Unflatten(1, (1, 28, 28)), features=features,
                                      head=nn.Linear(64, 10))).to(generator.device)
    for value in judge.parameters():  # He's, from a generator of its own
        nn.init.zeros_(value)
        if value.dim() > 1:
            nn.init.normal_(value, 0, math.sqrt(2 / value[0].numel()), generator)
    return judge


def gaussian(z, n, generator):
    """n draws from the Gaussian with the moments of z (m, D). -> (n, D)"""
    values, vectors = torch.linalg.eigh(torch.cov(z.T.double()))  # (D,), (D, D)
    noise = torch.randn(n, z.shape[1], generator=generator, device=z.device)  # (n, D)
    return z.mean(0) + noise @ (vectors * values.clamp(min=0).sqrt()).float().T  # clamp: rounding


def mixture(z, n, generator, k=20, rounds=20):
    """n draws from k Gaussians with the moments of the k-means clusters of z (m, D)."""
    centres = z[torch.randperm(len(z), generator=generator, device=z.device)[:k]]
    for _ in range(rounds):
        nearest = torch.cdist(z, centres).argmin(1)  # (m, k) -> (m,)
        centres = torch.stack([z[nearest == j].mean(0) if (nearest == j).any() else centre
                               for j, centre in enumerate(centres)])  # (k, D); empty: as it was
    chosen = nearest[torch.randint(len(z), (n,), generator=generator, device=z.device)]  # (n,)
    out = torch.empty(n, z.shape[1], device=z.device)
    for j in chosen.unique():
        members, wanted = z[nearest == j], chosen == j
        out[wanted] = (gaussian(members, int(wanted.sum()), generator) if len(members) > 1
                       else members)  # a single code has no covariance
    return out


def generations(models, codes, known, x_test, order, g, n=2000):
    """{row: (n, 784)}: test images, decoded draws from fits to the codes known of training images,
    and decoded points between the mean codes of random pairs of test images."""
    n = min(n, len(x_test) // 2)
    a, b = torch.randint(len(x_test), (2, n), generator=g, device=x_test.device)  # (n,) each
    alpha = torch.rand(n, 1, generator=g, device=x_test.device)
    made = {"test images": x_test[order[:n]], "pixels, between": x_test[a].lerp(x_test[b], alpha)}
    for kind, model in models.items():
        z, draw = codes[kind].mean, known[kind].draw  # of test images; of training images
        ways = {"between": z[a].lerp(z[b], alpha), "mixture": mixture(draw, n, g),
                "Gaussian": gaussian(draw, n, g)}
        if kind == "VAE":
            ways["prior"] = torch.randn(n, LATENT, generator=g, device=z.device)
        made |= {f"{kind}, {way}": reconstruct(model["nets"], z) for way, z in ways.items()}
    return made


def digit_paths(models, codes, x_test, y_test, alpha, pairs=((3, 8), (4, 9))):
    """Fig. 2a: {row: images (pairs * S, 784)} by alpha (S,) between the digits' means, Eq. (17)."""
    def path(values):
        means = [[values[y_test == digit].mean(0) for digit in pair] for pair in pairs]
        return torch.cat([torch.lerp(a, b, alpha[:, None]) for a, b in means])  # Eq. (17)

    return {"test images": path(x_test)} | {
        kind: reconstruct(models[kind]["nets"], path(code.draw if kind == "VAE" else code.mean))
        for kind, code in codes.items()}


def integrate(Xi, z, dt, steps):
    """dz/dt = candidates(z) Xi by Runge-Kutta 4: Xi (R, 11, 2), z (R, 2) -> (steps + 1, R, 2)"""
    def rate(z):
        return torch.einsum("rc,rcd->rd", candidates(z), Xi)  # (R, 2), Eq. (13)

    path = [z]
    for _ in range(steps):
        a = rate(z)
        b = rate(z + dt / 2 * a)
        c = rate(z + dt / 2 * b)
        z = z + dt / 6 * (a + 2 * b + 2 * c + rate(z + dt * c))
        path.append(z)
    return torch.stack(path)


def rotation_rate(path, dt):
    """Mean angular velocity of paths (steps, R, 2), rad per time, from z1 to z2 positive: (R,)"""
    x, y = (path - path.mean(0)).unbind(-1)  # (steps, R) each, about the path's own centre
    turn = torch.atan2(y[1:] * x[:-1] - x[1:] * y[:-1], x[1:] * x[:-1] + y[1:] * y[:-1])
    return turn.mean(0) / dt  # turn (steps - 1, R): between frames, so that none passes pi


def density_mode(values):
    """Where the kernel density of values (n,) is highest; of equal values that value."""
    from scipy.stats import gaussian_kde
    values = values.double()
    if len(values) < 3 or values.std() < 1e-9:  # a kernel density needs a spread
        return values.mean().item()
    grid = torch.linspace(values.min(), values.max(), 400, dtype=torch.double)
    return grid[gaussian_kde(values.numpy())(grid.numpy()).argmax()].item()


def significant(Xi):
    """Table 4: names of the terms of each equation whose mean and mode over encoders, Xi (M, 11,
    2), are both above the threshold, and all (mean, mode): ([names, names], (2, 11, 2))."""
    both = torch.tensor([[(term.mean().item(), density_mode(term)) for term in equation.T]
                         for equation in Xi.unbind(2)])  # equation (M, 11), term (M,)
    return [[name for name, pair in zip(CANDIDATES, pairs) if pair.abs().min() > SIGNIFICANT]
            for pairs in both], both  # pair: mean and mode of a term


def thermostat_row(name, out, sampler, setting, drift, seconds):
    """What the sampler did in the last tenth of the samples; growth: the latents' variance over the
    last twentieth of the updates by that over the last twentieth of their first half."""
    tail, variance = max(2, len(out["loss"]) // 10), out["variance"].mean(1)  # (updates,)
    half, few = max(1, len(variance) // 2), max(1, len(variance) // 20)
    loss, kinetic = out["loss"][-tail:], out["kinetic"][-tail:].mean().item()
    return {"run": name, "T": schedule(setting, 1), "sampler": sampler.method, "drift": drift,
            "kinetic": kinetic, "loss": loss.mean().item(), "std": loss.std().item(),
            "variance": variance[-1].item(), "steps per second": len(out["loss"]) / seconds,
            "growth": (variance[-few:].mean() / variance[:half][-few:].mean()).item()}


# --- plot ----------------------------------------------------------------------------------------

def plot_sheet(rows, columns=(), width=0.5):
    """A labelled sheet: {row: images (n, pixels) or (n, C, H, W) in [0, 1]}, width inches each."""
    x = torch.stack([value if value.dim() == 4 else value.view(len(value), 1, 28, -1)
                     for value in rows.values()]).cpu()  # (rows, columns, C, H, W)
    h, w = x.shape[-2:]
    return common.plot_sheet(x, width, width * h / w, list(rows), columns)


def plot_histograms(codes, labels, units):
    """Figs. 2b and 5: latent histograms by digit, a ridge each: {kind: Codes}, unit numbers."""
    fig, axes = common.panels(len(codes), len(units), 2.1, 2.5)
    panels = [(kind, code, unit) for kind, code in codes.items() for unit in units]
    for ax, (kind, code, unit) in zip(axes, panels):
        values = (code.mean if kind == "VAE" else code.draw)[:, unit].cpu()
        scale = values.std() * 3 + 1e-6
        edges = torch.linspace(values.mean() - scale, values.mean() + scale, 41)
        counts = torch.stack([torch.histogram(values[labels == digit], edges).hist
                              for digit in range(10)])
        for digit, count in enumerate(counts / counts.max().clamp(min=1)):
            ax.fill_between((edges[1:] + edges[:-1]) / 2, digit, digit + count * 1.4,
                            color=common.COLOURS[digit % 2], alpha=0.8, zorder=-digit, lw=0)
        ax.set_title(f"{kind}, unit {unit}: a = {code.variance[unit]:.2g}", fontsize="small")
        ax.set(yticks=range(10), xlabel="latent z" if kind == KINDS[-1] else "",
               ylabel="digit" if unit == units[0] else "")
    return fig


def plot_thermostat(outs):
    """By decoder update of {name: "out" of a model}: loss (Fig. 3a), temperature, latents."""
    charts = {"loss, mean ± std of K steps, a batch each": [], "kinetic temperature / T": [],
              "variance of the latents, mean of units": []}
    for name, out in [(name, out) for name, out in outs.items() if "kinetic" in out]:  # EAEs
        U, T = (out[key].view(len(out["variance"]), -1).numpy() for key in ("loss", "kinetic"))
        curves = (U.mean(1), {"std": U.std(1)}), (T.mean(1), {}), (out["variance"].mean(1), {})
        for lines, (values, band) in zip(charts.values(), curves):
            if values.any():  # no temperature at T = 0
                lines.append((name, None, values, {"lw": 1} | band))
    axis = dict(xlabel="decoder update", yscale="log")
    return common.plot_lines({title: (lines, axis) for title, lines in charts.items()})


def plot_sweep(rows):
    """What T does to the EAE and beta to the VAE, and both in a plane, labelled at their ends."""
    eae, vae = ([row for row in rows if row["kind"] == kind] for kind in SWEEP)
    measures = {"mse": ("test MSE", dict(yscale="log")),
                "active": ("active units of 64", dict(ylim=(0, 72))),
                "variance": ("latent variance, mean of units", dict(yscale="log")),
                "probe": ("linear probe, test accuracy", {})}
    at, ticks, planes, charts = range(len(eae)), [0.005, 0.01, 0.02, 0.05], ("active", "probe"), {}
    axis = dict(xlabel="temperature T of the EAE", xticks=at,
                xticklabels=[f"{row['value']:g}" for row in eae])
    for key, (title, own) in measures.items():
        charts[title] = [("EAE", at, [row[key] for row in eae], dict(marker="o"))], axis | own
    for key in planes:
        title, own = measures[key]
        charts[f"{title}, by test MSE"] = (
            [(name, [row["mse"] for row in chosen], [row[key] for row in chosen], dict(marker=mark))
             for name, chosen, mark in (("EAE, T", eae, "o"), ("VAE, β", vae, "s"))],
            own | dict(xlabel="test MSE", xscale="log", xticks=ticks, xticklabels=ticks))
    fig = common.plot_lines(charts, columns=3, width=4.6, legend=None)
    for ax, key in zip(fig.axes[4:], planes):
        ax.minorticks_off()
        ax.legend(fontsize="small")
        for row in (eae[0], eae[-1], vae[0], vae[-1]):
            ax.annotate(f"{row['value']:g}", (row["mse"], row[key]), ha="center", xytext=(0, 5),
                        textcoords="offset points", fontsize="small")
    return fig


def plot_dynamics(runs):
    """Fig. 1d-f: rotation coefficients of all runs, orbits of the first one of each sense.
    runs: [{"Xi" (M, 11, 2), "codes" (frames, 2), "path" (steps, 2), "omega" (R,)}]"""
    dots = [(f"run {k + 1}, {name}", found["Xi"][:, j, 0], found["Xi"][:, j - 1, 1],
             dict(color=common.COLOURS[k % 8], marker=mark, ls="", ms=4, alpha=0.3))
            for k, found in enumerate(runs) for j, mark, name in ((1, "o", "linear"),
                                                                  (10, "x", "sine"))]
    charts = {"d": (dots, dict(xlabel="coefficient of z2 (sin z2) in dz1/dt",
                               ylabel="coefficient of z1 (sin z1) in dz2/dt"))}
    for letter, sense in (("e", 1), ("f", -1)):
        chosen = [(k, found) for k, found in enumerate(runs) if found["omega"].mean() * sense > 0]
        for k, found in chosen[:1]:
            name = f"run {k + 1} integrated: {found['omega'].mean():+.3f} rad / time"
            lines = [("encoded test frames", *found["codes"].T, dict(color="0.6", ls=":")),
                     (name, *found["path"].T, dict(color=common.COLOURS[k % 8], lw=1.2)),
                     ("its start", *found["path"][:1].T, dict(color="k", marker="*", ls=""))]
            charts[letter] = lines, dict(xlabel="z1", ylabel="z2", aspect="equal",
                                         adjustable="datalim")
    return common.plot_lines(charts, width=4.4, height=4.2, legend="each")


def plot_correlations(Xi):
    """Fig. 4: correlations over the ensemble of all coefficients (M, 11, 2)."""
    fig, (ax,) = common.panels(1, 1, 8.2, 6.7)
    names = [f"{name} in dz{d}" for d in (1, 2) for name in CANDIDATES]
    values = torch.corrcoef(Xi.transpose(1, 2).flatten(1).T.double()).nan_to_num()  # (22, 22)
    shown = ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    ax.set_xticks(range(22), names, rotation=90, fontsize="x-small")
    ax.set_yticks(range(22), names, fontsize="x-small")
    fig.colorbar(shown, label="correlation over the encoders", shrink=0.7)
    return fig


# --- main ----------------------------------------------------------------------------------------

def arguments(argv=None):
    parser, number = common.Parser(__doc__, PRESETS), common.number
    add = parser.add
    add("--experiment", choices=(*SETTINGS, "all"), default="mnist",
        help="what to run; all: everything that there is data for")
    add("--dataset", choices=("real", "glyphs"),
        help="real: the experiments' own images; glyphs: digits drawn offline in their place")
    add("--runs", type=number(int, 1, 100), help="independent EAEs of reaction-diffusion")
    add("--grid", type=number(int, 8, 1000), help="points a side of reaction-diffusion")
    add("--modes", type=number(int, 2, 10_000),
        help="POD modes of reaction-diffusion that the nets see; 10000: pixels")
    add = parser.add_argument_group("of an EAE; its defaults: SETTINGS, COSTS").add_argument
    for name, (default, least, text) in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=number(type(default), least), help=text)
    add("--sampler", choices=("nose-hoover", "langevin"), help="thermostat")
    add("--suzuki-yoshida", action="store_true", default=None,
        help="Suzuki and Yoshida's five parts of each substep: a chain of fourth order")
    args = parser.parse(argv)
    for flag in ("temperature", "final_temperature"):
        if args.experiment == "temperature" and getattr(args, flag) is not None:
            parser.error(f"argument --{flag.replace('_', '-')}: the sweep has its own temperatures")
    if args.temperature == 0 and args.final_temperature:
        parser.error("argument --final-temperature: not with --temperature 0")
    if args.experiment in ("celeba", "all") and (args.temperature or 0) >= HOT:
        parser.error(f"argument --temperature: of celeba the low one, below {HOT:g}")
    if args.device == "mps":
        parser.error("argument --device: mps has no double precision, which thermostats need")
    return args


def setting_of(args, name):
    """The Setting of an EAE: the experiment's own, the preset's costs, the flags given."""
    given = {key: value for key, value in vars(args).items()
             if key in Setting._fields and value is not None}
    return SETTINGS[name]._replace(**(COSTS[args.preset][name] | given))


def simmer(run, args, name, nets, loss, watch, setting, g, take=None, optimiser=None):
    """A work unit of training and one of sampling: {"nets", "out" of algorithm_1, "ensemble" of
    take(), or of the encoder's weights, "row"}."""
    if setting.temperature == 0:
        common.note(f"note: {name}: temperature 0 has no ensemble: Adam, the deterministic limit")
    loss, sampler = common.compiled(loss, args.compile), Sampler(nets["encoder"], setting, g)
    optimiser = optimiser or torch.optim.Adam(nets["decoder"].parameters(), setting.rate,
                                              fused=True)
    take = take or sampler.theta.clone

    def training(checkpoint):
        out = algorithm_1(name, nets, loss, lambda: watch().var(0), sampler, setting, g, optimiser,
                          checkpoint)
        return {"out": {key: value.cpu() for key, value in out.items()},
                "state": {key: value.clone() for key, value in nets.state_dict().items()},
                "sampler": sampler.state_dict(), "generator": g.get_state()}

    def sampling(checkpoint):
        if setting.temperature == 0:  # a single encoder
            return {"ensemble": take()[None].cpu(), "drift": None}
        out = algorithm_1(f"{name}, ensemble", nets, loss, take, sampler, setting, g,
                          checkpoint=checkpoint)
        return {"ensemble": out["ensemble"].cpu(),
                "drift": energy_drift(loss, setting.size, sampler, setting)}

    done = run.unit(name, training)
    nets.load_state_dict(done["state"])
    sampler.load_state_dict(done["sampler"])
    g.set_state(done["generator"])
    found = run.unit(f"{name}-ensemble", sampling)
    nets.load_state_dict(done["state"])  # sampling has moved the encoder
    row = thermostat_row(name, done["out"], sampler, setting, found["drift"], run.seconds[name])
    return {"nets": nets, "out": done["out"], "ensemble": found["ensemble"].to(args.device),
            "row": row}


def image_model(run, args, name, kind, x, setting, beta=1.0):
    """An EAE, VAE or AE of images x (n, pixels): {"kind", "nets", "out"}, an EAE's as of simmer."""
    g = common.generator(args.seed, name, args.device)
    nets = build("mnist", g, x.shape[1], codes=LATENT * (2 if kind == "VAE" else 1))

    def loss(index):
        if kind == "VAE":
            return vae_loss(nets, x[index], beta, g)
        return reconstruction_loss(nets, x[index])

    def compute(checkpoint):
        history = train(name, nets, common.compiled(loss, args.compile), len(x), setting.batch,
                        setting.vae if kind == "VAE" else setting.ae, setting.rate, g, checkpoint)
        return {"state": nets.state_dict(), "history": history.cpu()}

    if kind == "EAE":
        return {"kind": kind} | simmer(run, args, name, nets, loss,
                                       lambda: nets["encoder"](x[:256]),
                                       setting._replace(size=len(x)), g)
    done = run.unit(name, compute)
    nets.load_state_dict(done["state"])
    return {"kind": kind, "nets": nets, "out": {"loss": done["history"]}}


def study_images(run, args, name, data):
    """mnist or frey: Table 1, and for mnist the figures about digits."""
    (x, _, x_test, _), setting = data, setting_of(args, name)
    models = {kind: image_model(run, args, f"{name}-{kind}", kind, x, setting) for kind in KINDS}
    g = common.generator(args.seed, f"{name} evaluation", args.device)
    codes = {kind: codes_of(model, x_test, g) for kind, model in models.items()}
    rows = [image_row(model, codes[kind], x_test) for kind, model in models.items()]
    results, claims = {"models": rows}, []
    if name == "mnist":
        more, claims = study_digits(run, args, models, codes, rows, *data, setting.judge, g)
        results |= more
    rows += [{"kind": "PCA-64", "mse": pca_mse(x, x_test, LATENT)},
             {"kind": "mean image", "mse": pca_mse(x, x_test, 0)}]
    common.print_rows(f"{name}: {len(x):,} training and {len(x_test):,} test images", rows)
    shown = torch.randperm(len(x_test), generator=g, device=x.device)[:16]
    sheet = {"test images": x_test[shown]} | {
        kind: reconstruct(models[kind]["nets"], codes[kind].mean[shown]) for kind in KINDS}
    run.figure(plot_sheet(sheet), f"{name}_reconstructions",
               f"{name}: test images and reconstructions")
    growth = models["EAE"]["row"]["growth"]
    claims = table_claims(name, rows) + claims + [
        (f"{name}: the EAE's latents are bounded (variance at the end by that at half time, at "
         "most 1.1)", "-", f"{growth:.2f}", growth <= 1.1)]
    return results, claims, {f"{name}-{kind}": model for kind, model in models.items()}


def study_digits(run, args, models, codes, rows, x, y, x_test, y_test, steps, g):
    """Figs. 2 and 5, generations, judge and probe: (results, claims); adds to rows."""
    dice = common.generator(args.seed, "judge", args.device)
    judge = build_judge(dice)

    def train_judge(checkpoint):
        train("judge", judge, lambda i: F.cross_entropy(judge(x[i]), y[i]), len(x), 128, steps,
              2e-3, dice, checkpoint)
        return judge.state_dict()

    judge.load_state_dict(run.unit("judge", train_judge))
    known = {kind: codes_of(model, x[:10_000], g) for kind, model in models.items()}
    for row, (kind, code) in zip(rows, codes.items()):
        row["probe"] = linear_probe(known[kind].mean, y[:10_000], code.mean, y_test)
    order = torch.randperm(len(x_test), generator=g, device=x.device)
    made = generations(models, codes, known, x_test, order, g)
    real = judge[:-1](x_test)  # (n, 64): features, without the head
    rest = real[order[len(made["test images"]):]]  # real images are compared with others
    samples = [{"row": name, "confidence": judge(value).softmax(1).amax(1).mean().item(),
                "frechet": frechet_distance(judge[:-1](value),
                                            rest if name == "test images" else real)}
               for name, value in made.items()]
    alpha = torch.linspace(0, 1, 9, device=x.device)
    run.figure(plot_sheet(digit_paths(models, codes, x_test, y_test, alpha),
                          [f"{a:.2g}" for a in alpha.tolist()] * 2), "2a_interpolation",
               "Fig. 2a: between the mean codes of 3 and 8, and of 4 and 9, by α of Eq. (17)")
    active = torch.stack([code.variance > ACTIVE for code in codes.values()]).sum(0)
    units = active.argsort(descending=True, stable=True)[:6].sort().values.tolist()
    run.figure(plot_histograms(codes, y_test.cpu(), units), "2b_latents",
               "Figs. 2b, 5: latents of test images by digit; a: activity")
    run.figure(plot_sheet({name: value[:20] for name, value in made.items()}), "samples",
               "Generations, and interpolations of random pairs of test images")
    accuracy = (judge(x_test).argmax(1) == y_test).float().mean().item()
    common.print_rows(f"mnist: samples (the judge has {accuracy:.1%} of tests right)", samples)
    return {"samples": samples, "judge": accuracy}, digit_claims(rows, samples)


def study_celeba(run, args, name, data):
    """Fig. 3: faces at a high and at a low temperature."""
    x, x_test = data[0], data[2][:1000]
    faces, models, found = x_test.float() / 255, {}, {}
    sheet, low = {"test images": faces[:12]}, setting_of(args, name)._replace(size=len(x))
    hot = low._replace(temperature=HOT, final_temperature=-1.0)
    mean = sum(part.double().sum(0) for part in x.split(1000)).float() / (255 * len(x))
    for title, setting in (("high T", hot), ("low T", low)):
        g = common.generator(args.seed, name, args.device)  # both start alike
        nets = build(name, g)

        def codes(images=x_test[:64]):
            return torch.cat([nets["encoder"](part.float() / 255) for part in images.split(100)])

        def take():  # codes of all test faces, and U of one batch
            U = reconstruction_loss(nets, x[torch.arange(min(256, len(x)), device=x.device)])
            return torch.cat([codes(x_test).flatten(), U[None]])  # (n * 256 + 1,)

        unit = f"{name}-{len(x)}-{title.replace(' ', '-')}"  # of a folder with more faces: another
        model = simmer(run, args, unit, nets, lambda index: reconstruction_loss(nets, x[index]),
                       codes, setting, g, take)
        z, U = model["ensemble"][:, :-1].mean(0).view(len(faces), -1), model["ensemble"][:, -1]
        x_hat = torch.cat([reconstruct(nets, part) for part in z.split(100)])
        label = f"{title} = {schedule(setting, 1):g}"
        sheet[label], models[f"{name} {label}"] = x_hat[:12], model
        a, b = x_hat.flatten(1), faces.flatten(1)  # distinct: variance between faces, by the real
        found[title] = {"mse": ((a - b) ** 2).mean().item(), "loss std": U.std().item(),
                        "mse of mean": ((faces - mean) ** 2).mean().item(),
                        "distinct": (a.var(0).mean() / b.var(0).mean()).item()}
    common.print_rows(f"{name}: faces", [{"": title} | row for title, row in found.items()])
    run.figure(plot_sheet(sheet, width=0.9), "3_faces",
               "Fig. 3b, c: faces at a high and a low temperature")
    return {"faces": found}, face_claims(found), models


def study_waves(run, args, name, _):
    """Fig. 1d-f, Fig. 4, Table 4: the reaction-diffusion system."""
    setting = setting_of(args, name)

    def data(checkpoint):
        found = spiral(setting.size, args.grid, checkpoint=checkpoint, device=args.device)
        return tuple(value.float().cpu() for value in found)

    basis, u, u_t = (value.to(args.device) for value in run.unit("spiral", data))
    g = common.generator(args.seed, "spiral split", args.device)
    x, x_t = (value @ basis if args.modes == 10_000 else value[:, :args.modes]
              for value in (u, u_t))
    x, x_t = (value + 1e-6 * torch.randn(value.shape, generator=g, device=value.device)
              for value in (x, x_t))  # (frames, modes)
    count = int(0.9 * len(x))  # the last tenth, in time, is the test set
    index = torch.randperm(count, generator=g, device=x.device)[:int(0.4 * len(x))]
    runs = [wave_run(run, args, f"spiral-{k + 1}", setting, (x[index], x_t[index]),
                     (x[count:], x_t[count:])) for k in range(args.runs)]
    here = zip(TABLE_4.items(), runs[0]["table"].transpose(1, 2).flatten(0, 1))  # (4, 11)
    columns = {key: [f"{a:.2f}; {b}" for a, b in zip(values, theirs.split())]
               for (key, theirs), values in here}
    common.print_rows(f"{name}: Table 4, coefficients of run 1; the document's", [
        {"": term} | {key: column[j] for key, column in columns.items()}
        for j, term in enumerate(CANDIDATES)])
    run.figure(plot_dynamics(runs), "1_dynamics", "Fig. 1d-f: the dynamics that the encoders see")
    run.figure(plot_correlations(runs[0]["Xi"]), "4_correlations",
               "Fig. 4: correlations of the coefficients, run 1")
    rows = [{"terms": found["terms"], "data": found["data"], "errors": found["errors"],
             "omega": common.mean_std(found["omega"])} for found in runs]
    common.print_rows(f"{name}: runs", rows)
    return ({"runs": [row | {"table": found["table"].tolist()} for row, found in zip(rows, runs)]},
            wave_claims(runs), {found["row"]["run"]: found for found in runs})


def wave_run(run, args, name, setting, train_set, test_set):
    """An EAE of the waves (x, x_t) and what its encoders say of the dynamics."""
    (x, x_t), pixels = train_set, args.grid ** 2
    g = common.generator(args.seed, name, args.device)
    nets = build("reaction-diffusion", g, pixels, x.shape[1])
    *inner, last = nets["decoder"]  # Adam moves all alike; a mode, for all pixels, must go further
    far = 0.1 * args.grid if x.shape[1] < pixels else 1.0
    groups = [{"params": inner[0].parameters()},
              {"params": last.parameters(), "lr": setting.rate * far}]

    def loss(index):
        errors, *_ = sindy_terms(nets, x[index], x_t[index], pixels)
        return WEIGHTS[0] * errors[0] + WEIGHTS[1] * errors[1]  # Eq. (14)

    def take():
        errors, Xi, z = sindy_terms(nets, *test_set, pixels)  # Xi: Eq. (16), on test data
        return torch.cat([Xi.flatten(), z[0], torch.stack(errors)])  # (26,)

    model = simmer(run, args, name, nets, loss, lambda: nets["encoder"](x[:256]),
                   setting._replace(size=len(x)), g, take,
                   torch.optim.Adam(groups, setting.rate, fused=True))
    Xi, start, errors = model["ensemble"].split((22, 2, 2), 1)  # (M, 22), (M, 2), (M, 2)
    Xi, every = Xi.reshape(-1, 11, 2), max(1, len(Xi) // 200)  # (M, 11, 2)
    power = torch.stack([value.square().sum(1).mean() / pixels for value in test_set])  # (2,)
    codes = nets["encoder"](test_set[0])  # (frames, 2), by the last encoder of the training
    omega = rotation_rate(integrate(Xi[::every], start[::every], 0.05, 1000), 0.05)
    path = integrate(Xi.mean(0)[None], codes[:1], 0.05, 1000)[:, 0]  # (1001, 2)
    terms, table = significant(Xi.cpu())
    return model | {"Xi": Xi.cpu(), "codes": codes.cpu(), "path": path.cpu(), "omega": omega.cpu(),
                    "terms": terms, "table": table, "errors": (errors / power).mean(0).tolist(),
                    "data": rotation_rate(codes[:, None], 0.05).item()}


def study_temperature(run, args, name, data):
    """What the document argues for: EAE over T and VAE over beta, on digits."""
    (x, y, x_test, y_test), setting, rows, models = data, setting_of(args, name), [], {}
    g = common.generator(args.seed, "temperature evaluation", args.device)
    for kind, value in ((kind, value) for kind in SWEEP for value in SWEEP[kind]):
        own = setting._replace(temperature=value, final_temperature=-1.0)  # of EAEs
        model = image_model(run, args, f"sweep-{kind}-{value:g}", kind, x, own, value)
        code, z = codes_of(model, x_test, g), codes_of(model, x[:10_000], g).mean
        probe = linear_probe(z, y[:10_000], code.mean, y_test)
        rows.append(image_row(model, code, x_test) | {"value": value, "probe": probe})
        if kind == "EAE":
            models[f"sweep T = {value:g}"] = model
    run.figure(plot_sweep(rows), "temperature", "Temperature of the EAE, weight of the VAE's KL")
    common.print_rows("temperature: EAE by T, VAE by beta", rows)
    return {"rows": rows}, sweep_claims(rows, pca_mse(x, x_test, 0)), models


def table_claims(name, rows):
    """Table 1's figures and what it is said to show."""
    mse, active = ({row["kind"]: row.get(key) for row in rows} for key in ("mse", "active"))
    best = min(KINDS, key=mse.get)
    rules = {"EAE": ("all", active["EAE"] == LATENT),
             "VAE": ("at most 25 %", active["VAE"] <= LATENT // 4),
             "AE": ("more than the VAE", active["VAE"] < active["AE"])}
    claims = []
    for kind, (error, units) in DOCUMENT[name].items():
        rule, met = rules[kind]
        claims += [(f"{name}, Table 1: {kind} test MSE", f"{error}", f"{mse[kind]:.4f}",
                    mse[kind] <= error),
                   (f"{name}, Table 1: {kind} active units ({rule})", f"{units}/{LATENT}",
                    f"{active[kind]}/{LATENT}", met)]
    if name == "mnist":
        claims.append(("mnist: the AE's active units lie between VAE's and EAE's", "16 < 53 < 64",
                       f"{active['VAE']} < {active['AE']} < {active['EAE']}",
                       active["VAE"] < active["AE"] < active["EAE"]))
    return claims + [
        (f"{name}: the AE has the lowest test MSE", "yes", f"{best}, {mse[best]:.4f}",
         best == "AE"),
        (f"{name}: EAE below PCA of 64 components", "-", f"{mse['EAE']:.4f}; {mse['PCA-64']:.4f}",
         mse["EAE"] < mse["PCA-64"])]


def digit_claims(rows, samples):
    """What Figs. 2 and 5 are said to show, in figures."""
    probe, variance = ({row["kind"]: row[key] for row in rows} for key in ("probe", "variance"))
    frechet, claims = {row["row"]: row["frechet"] for row in samples}, []
    between, drawn = ({kind: frechet[f"{kind}, {way}"] for kind in KINDS}
                      for way in ("between", "mixture"))
    for claim, said, values, form, best in (
            ("EAE's latents separate digits best (linear probe)", "suggested", probe, ".1%", max),
            ("EAE's latents have the highest variance (encoders' motion included)", "yes",
             variance, ".3g", max),
            ("EAE interpolates between images best (Fréchet)", "suggested", between, ".1f", min),
            ("EAE generates best (Fréchet, 20 Gaussians fitted to the codes)", "suggested", drawn,
             ".1f", min)):
        here = "; ".join(f"{kind} {value:{form}}" for kind, value in values.items())
        claims.append((f"mnist: {claim}", said, here, values["EAE"] == best(values.values())))
    return claims


def face_claims(found):
    """What Fig. 3 is said to show, in figures."""
    hot, cold = found["high T"], found["low T"]
    return [
        ("celeba: low T has at most half the test MSE of high T", "clearly lower",
         f"{cold['mse']:.4f}; {hot['mse']:.4f}", cold["mse"] <= hot["mse"] / 2),
        ("celeba: high T makes one generic face (25 % of the variance between faces, 110 % of the "
         "mean face's MSE at most)", "all-human face",
         f"{hot['distinct']:.1%}; {hot['mse']:.4f}, mean face {hot['mse of mean']:.4f}",
         hot["distinct"] <= 0.25 and hot["mse"] <= 1.1 * hot["mse of mean"]),
        ("celeba: low T makes individuals (at least half of that variance)", "individual",
         f"{cold['distinct']:.1%}", cold["distinct"] >= 0.5),
        ("celeba: the loss band is wider at high T (std over the kept encoders, one batch)", "yes",
         f"{hot['loss std']:.4f}; {cold['loss std']:.4f}", hot["loss std"] > cold["loss std"])]


def wave_claims(runs):
    """What the document says of the reaction-diffusion system."""
    omegas = torch.stack([found["omega"].abs().mean() for found in runs])
    left = sum(bool(found["omega"].mean() > 0) for found in runs)
    worst = (omegas / OMEGA - 1).abs().max().item()
    mixed = max(min((found["omega"] > 0).float().mean(), (found["omega"] < 0).float().mean()).item()
                for found in runs)  # share of a run's encoders that turn against the majority
    plain = {"z1", "z2", "sin z1", "sin z2"}
    errors = torch.tensor([found["errors"] for found in runs]).mean(0).tolist()
    good = sum(all(terms and plain.issuperset(terms) for terms in found["terms"]) for found in runs)
    return [
        ("waves: only linear and sine terms are significant (in every run)", "yes",
         f"{good} of {len(runs)} runs", good == len(runs)),
        ("waves: rotation rate of the identified system, rad / time (every run within 3 %)",
         f"{OMEGA} (data)", f"{common.show(common.mean_std(omegas))}; worst {worst:.1%} off",
         worst <= 0.03),
        ("waves: coefficient sets of both senses of rotation, as z1 <-> z2 makes them (over runs)",
         "yes", f"{left} and {len(runs) - left} of {len(runs)} runs", 0 < left < len(runs)),
        ("waves: both sets in the ensemble under one decoder (5 % of it)", "yes",
         f"at most {mixed:.0%} of a run's encoders turn the other way", mixed >= 0.05),
        ("waves: relative test errors of x, x_t (SINDy autoencoder 0.016)", "0.016, 0.016",
         "{:.4f}, {:.4f}".format(*errors), max(errors) < 0.0165)]


def sweep_claims(rows, mean_image):
    """Is entropy better than the KL, and are both limits of T where the document puts them?"""
    # cold: the limit T = 0; warm: ensembles, by rising T
    (cold, *warm), vae = ([row for row in rows if row["kind"] == kind] for kind in ("EAE", "VAE"))
    usual, hot = next(row for row in vae if row["value"] == 1), warm[-1]
    lowest = min(row["mse"] for row in warm)
    best = max((row["active"] for row in warm if row["mse"] <= usual["mse"]), default=0)
    better = sum(any(e["mse"] <= v["mse"] and all(e[key] >= v[key] for key in ("active", "probe"))
                     for e in warm) for v in vae)
    return [
        ("temperature: excessively high T: blank reconstructions (the mean image's MSE ± 10 %)",
         "yes", f"T = {hot['value']:g}: {hot['mse']:.4f}, mean image {mean_image:.4f}",
         abs(hot["mse"] / mean_image - 1) <= 0.1),
        ("temperature: excessively high T: uninformative codes (probe at most 20 %)", "yes",
         f"T = {hot['value']:g}: {hot['probe']:.1%}", hot["probe"] <= 0.2),
        ("temperature: at the test MSE of the VAE (beta 1), more active units", "yes",
         f"{best}; VAE {usual['active']}", best > usual["active"]),
        ("temperature: for every beta an EAE that is no worse in MSE, units and probe", "-",
         f"{better} of {len(vae)}", better == len(vae)),
        ("temperature: some T > 0 reconstructs better than the limit T = 0", "-",
         f"{lowest:.4f}; {cold['mse']:.4f}", lowest < cold["mse"])]


def main(argv=None):
    """Run the document; returns what results.json holds."""
    args, data = arguments(argv), {}
    for name in SETTINGS if args.experiment == "all" else (args.experiment,):
        try:
            data[name] = None if name == "reaction-diffusion" else load_images(
                name, args.dataset, setting_of(args, name).size, args.data, args.device)
        except SystemExit:
            if args.experiment != "all":
                raise
            common.note(f"note: {name} is left out")
    studies = {"celeba": study_celeba, "reaction-diffusion": study_waves,
               "temperature": study_temperature}
    label = {"real": "real data", "glyphs": "generated glyphs"}[args.dataset]
    label = "simulated waves" if args.experiment == "reaction-diffusion" else label
    run = common.Run(__file__, args, label, additive=("experiment", "runs"))
    results, claims, metrics = {}, [], []
    with run, torch.no_grad():  # but for the losses of `force` and `train`
        for name, images in data.items():
            found, rows, models = studies.get(name, study_images)(run, args, name, images)
            outs = {key: model["out"] for key, model in models.items()}
            thermostats = [model["row"] for model in models.values() if "row" in model]
            run.figure(plot_thermostat(outs), f"{name}_thermostat", f"{name}: training of the EAEs")
            common.print_rows(f"{name}: thermostat", thermostats)
            results[name], claims = found | {"thermostat": thermostats}, claims + rows
            held = [row["kinetic"] for row in thermostats if row["T"]]
            if held:  # none where T is 0
                worst = max(held, key=lambda kinetic: abs(kinetic - 1))
                claims += [(f"{name}: thermostats hold T (kinetic temperature within 5 %)",
                            "assumed", f"{worst:.2f} T, worst of {len(held)}",
                            abs(worst - 1) <= 0.05)]
            metrics += [{"run": key, "step": step} | {
                term: out[term][step - 1].item() for term in ("loss", "kinetic") if term in out}
                for key, out in outs.items() for step in range(20, len(out["loss"]) + 1, 20)]
        return run.finish(results, claims, metrics)


if __name__ == "__main__":
    main()
