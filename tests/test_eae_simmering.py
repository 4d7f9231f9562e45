"""The sampler against known distributions, the waves against their equation, measures against
known answers, and a null test: nets that have learned nothing earn no row."""
import json
import math
import pathlib
import shutil

import common
import eae_simmering as eae
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import killed, pasted


class Particles(nn.Module):
    """Parameters theta (N,) that a potential acts on."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.as_tensor(theta, dtype=torch.double))


def sample(module, potential, steps, burn=1000, **settings):
    """theta (steps, N), v (steps, N) and both thermometers (steps, 2) of a NoseHoover."""
    g = torch.Generator().manual_seed(1)
    sampler = eae.NoseHoover(module, generator=g, **settings)
    theta, v, both = [], [], []
    for step in range(burn + steps):
        sampler.step(potential)
        if step >= burn:
            theta.append(sampler.theta.clone())
            v.append(sampler.v.clone())
            both.append(sampler.thermometers())
    return torch.stack(theta), torch.stack(v), torch.tensor(both)


# --- sampler -------------------------------------------------------------------------------------

def test_harmonic_well_is_sampled_canonically_by_a_chain_of_30():
    well = Particles([0.1])
    T, k = 0.5, 2.0
    theta, v, both = sample(well, lambda: k / 2 * (well.theta ** 2).sum(), 25_000, T=T, dt=0.3,
                            tau=1.0, chain=30)
    scaled = theta.flatten() * (k / T) ** 0.5
    assert abs(scaled.var() - 1) < 0.08  # equipartition
    assert abs((scaled ** 4).mean() - 3) < 0.5  # a Gaussian: 1.5 for a swing of fixed energy
    assert abs(v.var() / T - 1) < 0.08
    assert torch.allclose(both.mean(0) / T, torch.ones(2), atol=0.08)
    normal = torch.distributions.Normal(0, 1)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.double)
    assert torch.allclose(normal.cdf(scaled.quantile(quantiles)), quantiles, atol=0.03)


def lattice(theta):
    """Coupled quartic wells, chaotic: U of theta (N,)."""
    return (theta ** 4).sum() / 4 + (theta.diff() ** 2).sum() / 2


@pytest.mark.parametrize("chain", [1, 30])
def test_both_thermometers_read_T_in_chaotic_wells(chain):
    particles = Particles(torch.zeros(12))
    T = 0.7
    _, v, both = sample(particles, lambda: lattice(particles.theta), 6000, T=T, m=2.0, dt=0.1,
                        tau=1.0, chain=chain)
    assert torch.allclose(both.mean(0) / T, torch.ones(2), atol=0.06)
    assert abs(2.0 * (v ** 2).mean() / T - 1) < 0.06
    assert abs((v ** 4).mean() / (v ** 2).mean() ** 2 - 3) < 0.3  # Maxwell's law


@pytest.mark.parametrize("chain", [1, 2, 30])
def test_extended_energy_is_conserved_to_second_order(chain):
    drifts = []
    for dt in (0.02, 0.01):
        particles = Particles(torch.linspace(-1, 1, 12))
        T, m = 0.7, 2.0
        sampler = eae.NoseHoover(particles, T, m, dt, tau=1.0, chain=chain,
                                 generator=torch.Generator().manual_seed(0))
        weights = [sampler.N * T] + [T] * (chain - 1)
        heat, energies = 0.0, []
        for _ in range(round(4 / dt)):
            before = sampler.w
            sampler.w = list(before)
            sampler.step(lambda: lattice(particles.theta))
            for weight, old, new in zip(weights, before, sampler.w):
                heat += weight * dt * (old + new) / 2  # N T s_1 + T s_2 + ..., ds_k/dt = w_k
            thermostats = sampler.Q / 2 * sum(w ** 2 for w in sampler.w)
            U = lattice(sampler.theta).item()
            energies.append(U + sampler.mv2 / 2 + thermostats + heat)
        drifts.append(max(energies) - min(energies))
    assert drifts[0] < 0.01
    assert 3 < drifts[0] / drifts[1] < 5  # halved step, a quarter of the error


def test_the_configurational_thermometer_sees_what_new_velocities_hide():
    wells = Particles(torch.zeros(2000))  # far colder than T
    sampler = eae.NoseHoover(wells, T=0.5, dt=0.1, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        sampler.redraw()
        sampler.step(lambda: (wells.theta ** 2).sum() / 2)
    kinetic, configurational = sampler.thermometers()
    assert abs(kinetic / 0.5 - 1) < 0.2 and 0 < configurational / 0.5 < 0.2


def test_new_velocities_leave_the_chain_alone():
    sampler = eae.NoseHoover(Particles(torch.zeros(4000)), T=0.5, m=2.0, tau=3.0, chain=3,
                             generator=torch.Generator().manual_seed(0))
    sampler.w = [0.1, -0.2, 0.3]
    sampler.redraw()
    assert sampler.w == [0.1, -0.2, 0.3]
    assert sampler.Q == pytest.approx(4000 * 0.5 * 3.0 ** 2)
    assert abs(2.0 * (sampler.v ** 2).mean() / 0.5 - 1) < 0.1
    assert abs(sampler.thermometers()[0] / 0.5 - 1) < 0.1


def test_free_energy_gradient_is_the_mean_gradient_over_the_encoders():
    """Eq. (7) on one weight: -T log Z by quadrature, its slope from samples."""
    T, phi = 0.3, torch.tensor(0.3, dtype=torch.double, requires_grad=True)
    encoder = Particles([0.0])

    def U(theta, phi):
        return (1 - phi * theta) ** 2 / 2 + theta ** 2 / 10

    grid = torch.linspace(-15, 15, 20_001, dtype=torch.double)
    F_phi = -T * torch.logsumexp(-U(grid, phi) / T, 0)
    (exact,) = torch.autograd.grad(F_phi, phi)
    theta, _, _ = sample(encoder, lambda: U(encoder.theta, phi.detach()).sum(), 15_000, T=T,
                         dt=0.4, tau=1.0)
    (mean,) = torch.autograd.grad(U(theta.flatten(), phi).mean(), phi)
    assert abs(exact) > 0.3 and abs(mean - exact) < 0.04


def test_decoder_takes_the_mean_of_K_gradients_and_rests_between(monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, fused: torch.optim.SGD(p, lr))
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(3, 2), nn.Linear(2, 3)
    x = torch.randn(8, 3)
    seen = []

    def loss(i):
        seen.append(decoder.weight.detach().clone())
        return F.mse_loss(decoder(encoder(x)), x)

    s = eae.Setting(T=1e-20, dt=1e-6, updates=3, samples=4, batch=8, rate=0.1)
    wanted = [p.clone() for p in decoder.parameters()]
    for _ in range(3):  # the encoder does not move: every gradient is that of the decoder's loss
        value = F.mse_loss(F.linear(encoder(x).detach(), *wanted), x)
        slopes = torch.autograd.grad(value, wanted)
        wanted = [p - 0.1 * slope for p, slope in zip(wanted, slopes)]
    g = torch.Generator().manual_seed(0)
    sampler = eae.NoseHoover(encoder, s.T, dt=s.dt, generator=g)
    with torch.no_grad():
        log = eae.algorithm_1("test", loss, 8, decoder, sampler, s, g)
    for p, target in zip(decoder.parameters(), wanted):
        assert torch.allclose(p, target, atol=1e-5)
    assert len(seen) == 12 and all(torch.equal(seen[0], seen[k]) for k in range(4))
    assert log.shape == (3, 4) and log[0, 0] > log[2, 0]


# --- waves ---------------------------------------------------------------------------------------

def test_spiral_obeys_its_equation():
    frames = list(eae.spiral(60, n=40, length=20.0, dt=0.05))
    u, u_t = torch.stack([a for a, _ in frames]), torch.stack([b for _, b in frames])
    slope = (u[2:] - u[:-2]) / 0.1
    assert ((slope - u_t[1:-1])[20:].abs().max() / u_t.abs().max()) < 2e-3
    fine = list(eae.spiral(119, n=40, length=20.0, dt=0.025))[-1][0]
    assert (fine - u[59]).abs().max() < 1e-5  # fourth order in time


@pytest.fixture(scope="module")
def wave_data():
    return eae.wave_modes(1200, "cpu")


def test_modes_are_orthonormal_hold_the_waves_and_turn_at_omega(wave_data):
    basis, x = wave_data["basis"], wave_data["x"]
    assert torch.allclose(basis @ basis.T, torch.eye(eae.MODES), atol=1e-5)
    assert 0 <= wave_data["missed"] < 1e-5
    assert abs((x ** 2).sum(1).mean() - 1) < 1e-4
    late = x[-600:, :2]  # in the transient the spiral still grows
    rate = eae.rotation_rate(late[:, None], eae.FRAME).abs().item()
    assert abs(rate / eae.OMEGA - 1) < 0.02


def test_eq_15_is_the_time_derivative(wave_data):
    torch.manual_seed(0)
    encoder, decoder = eae.wave_nets()
    x, x_t = wave_data["x"][900:1000], wave_data["x_t"][900:1000]
    _, x_hat_t, Xi, z = eae.reconstruct_waves(encoder, decoder, x, x_t)
    assert torch.allclose(z.std(0), torch.ones(2), atol=1e-5)  # the gauge
    scale = encoder(x).std(0)
    h = 1e-3
    ahead = encoder(x) + h * scale * (eae.candidates(z) @ Xi)
    behind = encoder(x) - h * scale * (eae.candidates(z) @ Xi)
    slope = (decoder(ahead) - decoder(behind)) / (2 * h)
    assert torch.allclose(x_hat_t, slope, atol=1e-3 * slope.abs().max().item())


def test_identify_finds_a_known_system_and_the_rate_on_a_circle():
    torch.manual_seed(0)
    z = torch.randn(4000, 2)
    Xi = torch.randn(11, 2)
    found = eae.identify(z, eae.candidates(z) @ Xi)
    assert torch.allclose(found, Xi, atol=1e-2)
    angle = torch.linspace(0, 40, 2000)
    circle = 2 ** 0.5 * torch.stack([angle.cos(), angle.sin()], 1)  # of unit variance
    found = eae.identify(circle, 0.9 * torch.stack([-circle[:, 1], circle[:, 0]], 1))
    path = eae.integrate(found[None], circle[:1], 0.05, 400)
    assert abs(eae.rotation_rate(path, 0.05).item() - 0.9) < 2e-3


def hopf(omega, growth):
    """Xi (11, 2) of a Hopf normal form: dr/dt = growth r (1 - r^2 / 2), its cycle at sqrt(2)."""
    Xi = torch.zeros(11, 2)
    Xi[0, 0] = Xi[1, 1] = growth
    Xi[1, 0], Xi[0, 1] = -omega, omega
    Xi[5, 0] = Xi[7, 0] = Xi[6, 1] = Xi[8, 1] = -growth / 2  # z1 r^2 and z2 r^2
    return Xi


def test_an_attractor_is_told_from_a_centre_and_both_senses_from_one():
    def measure(*systems):
        end = torch.tensor([2.0 ** 0.5, 0.0, 0.1, 0.1])
        members = [torch.cat([Xi.flatten(), end]) for Xi in systems]
        return eae.measure_ensemble(torch.stack(members))[0]

    cycle = measure(hopf(0.9, 0.2), hopf(0.9, 0.21), hopf(0.9, 0.19))
    assert cycle["attractor"] and cycle["minority"] == 0
    assert abs(cycle["omega"] - 0.9) < 1e-3
    assert cycle["end radius"] == pytest.approx([1, 1], abs=0.01)
    centre = measure(hopf(0.9, 0.0), hopf(0.9, 0.0))
    assert not centre["attractor"]
    assert centre["end radius"] == pytest.approx([0.5, 1.5], abs=0.01)
    mixed = measure(hopf(0.9, 0.2), hopf(-0.9, 0.2))
    assert mixed["minority"] == 0.5 and abs(mixed["omega"] - 0.9) < 1e-3
    explodes = hopf(0.9, 0.2)
    explodes[5, 0] = 50.0  # dz1/dt = 50 z1^3: it has no sense of rotation
    assert measure(hopf(0.9, 0.2), explodes)["minority"] == 0


def test_integration_is_of_fourth_order_and_keeps_a_rotation():
    Xi = torch.zeros(1, 11, 2, dtype=torch.double)
    Xi[0, 1, 0], Xi[0, 0, 1] = -1.5, 1.5  # dz1 = -1.5 z2, dz2 = 1.5 z1
    start = torch.tensor([[1.0, 0.0]], dtype=torch.double)
    errors = []
    for steps in (20, 40):
        end = eae.integrate(Xi, start, 2 / steps, steps)[-1, 0]
        exact = torch.tensor([math.cos(3), math.sin(3)], dtype=torch.double)
        errors.append((end - exact).norm().item())
    assert 12 < errors[0] / errors[1] < 20
    path = eae.integrate(Xi, start, 0.05, 100)
    assert abs(eae.rotation_rate(path, 0.05).item() - 1.5) < 1e-4


def test_the_documents_table_4_is_no_limit_cycle_of_the_data():
    mean, mode = eae.integrated_table_4()
    assert mean["eigenvalues at 0"] == "-0.215 ± 1.53i" and float(mean["radius at the end"]) < 1e-3
    assert abs(abs(float(mode["ω"])) - 2.88) < 0.02


def test_significant_needs_mean_and_mode():
    torch.manual_seed(0)
    Xi = 0.01 * torch.randn(500, 11, 2)
    Xi[:, 0, 0] += 0.5  # both
    Xi[:100, 1, 1] += 2.0  # mean 0.4, mode 0
    mean, mode, large = eae.significant(Xi)
    assert large[0, 0] and large.sum() == 1
    assert mean[1, 1] > 0.3 and abs(mode[1, 1]) < 0.05


# --- measures ------------------------------------------------------------------------------------

def test_sampler_and_dynamics_can_be_pasted_alone():
    sampler = pasted("eae_simmering", ["NoseHoover"])["NoseHoover"]
    net = nn.Linear(4, 1)
    x = torch.randn(10, 4)
    chain = sampler(net, T=1e-3, dt=0.1)
    first = [chain.step(lambda: net(x).square().mean()) for _ in range(50)][0]
    assert first.isfinite() and chain.theta.isfinite().all()
    notebook = pasted("eae_simmering", ["candidates", "identify", "integrate", "rotation_rate"])
    angle = torch.linspace(0, 20, 400)
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    Xi = notebook["identify"](circle, torch.stack([-circle[:, 1], circle[:, 0]], 1))
    path = notebook["integrate"](Xi[None], circle[:1], 0.05, 400)
    assert abs(notebook["rotation_rate"](path, 0.05).item() - 1) < 1e-3


def test_codes_are_means_over_encoders_and_leave_the_model_alone():
    torch.manual_seed(0)
    encoder, decoder = eae.digit_nets(30)
    own = [p.clone() for p in encoder.parameters()]
    first = nn.utils.parameters_to_vector(encoder.parameters()).detach()
    ensemble = torch.stack([first + 0.1 * k for k in range(3)])
    x = torch.rand(10, 30)
    codes = eae.codes_of(eae.Model("EAE", encoder, decoder, ensemble), x, None)
    for p, value in zip(encoder.parameters(), own):
        assert torch.equal(p, value)
    z = []
    for theta in ensemble:
        nn.utils.vector_to_parameters(theta, encoder.parameters())
        z.append(encoder(x).detach())
    z = torch.stack(z)  # (M, n, D)
    assert torch.allclose(codes.mean, z.mean(0), rtol=1e-4)
    assert torch.allclose(codes.draw[4], z[1, 4], rtol=1e-4)
    assert torch.allclose(codes.variance, z.flatten(0, 1).var(0, correction=0), rtol=1e-3)
    motion = z.var(0, correction=0).mean(0) / codes.variance
    assert torch.allclose(codes.motion, motion, rtol=1e-3)


def test_only_units_that_the_decoder_reads_are_in_use_at_any_scale():
    torch.manual_seed(0)
    decoder = nn.Linear(5, 20)
    with torch.no_grad():
        decoder.weight[:, 3:] = 0
    z = torch.randn(200, 5)
    model = eae.Model("AE", None, decoder, None)
    x = (decoder(z) + 0.1 * torch.randn(200, 20)).sigmoid().detach()
    rise = eae.rises(model, z, x)
    assert (rise[:3] > 1).all() and torch.allclose(rise[3:], torch.zeros(2), atol=1e-5)
    with torch.no_grad():
        decoder.weight /= 30
    assert torch.allclose(eae.rises(model, 30 * z, x), rise, rtol=1e-3, atol=1e-4)


def test_eta_squared_and_probe_on_known_classes():
    torch.manual_seed(0)
    y = torch.arange(10).repeat(400)
    z = torch.randn(4000, 3)
    z[:, 0] = y.float()  # told by the class alone
    z[:, 1] += 2 * (y % 2)  # class means 0 and 2: between 1, within 1
    eta = eae.explained_by(y, z)
    assert torch.allclose(eta, torch.tensor([1.0, 0.5, 0.0]), atol=0.03)
    assert eae.linear_probe(torch.randn(4000, 3), y, torch.randn(4000, 3), y) < 0.15
    corners = torch.eye(10)[y] + 0.1 * torch.randn(4000, 10)
    assert eae.linear_probe(corners, y, corners, y) > 0.99


def test_density_is_scipys_and_modes_are_counted():
    gaussian_kde = pytest.importorskip("scipy.stats").gaussian_kde
    torch.manual_seed(0)
    values = torch.randn(1000, 2)
    values[:500, 1] += 6
    points = eae.grid_over(values)
    ours = eae.density(values, points)
    for j in range(2):
        theirs = torch.from_numpy(gaussian_kde(values[:, j].numpy())(points[:, j].numpy()))
        assert torch.allclose(ours[:, j].double(), theirs, atol=1e-4)
    assert eae.modes_of(values).tolist() == [1, 2]


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    a = torch.randn(20_000, 3)
    b = 2 * torch.randn(20_000, 3) + 1
    assert abs(eae.frechet_distance(a, b) - 6) < 0.3  # |mean|^2 3, (2 - 1)^2 in 3 dimensions
    assert eae.frechet_distance(a, a) < 1e-6


def test_vae_loss_is_cross_entropy_and_kl():
    torch.manual_seed(0)
    encoder, decoder = eae.digit_nets(12, 2 * eae.LATENT)
    x, eps = torch.rand(6, 12), torch.randn(6, eae.LATENT)
    mu, logvar = encoder(x).chunk(2, 1)
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
    plain = F.binary_cross_entropy(decoder(mu + posterior.stddev * eps).sigmoid(), x)
    assert torch.allclose(eae.vae_loss(encoder, decoder, x, eps, 0.7), plain + 0.7 * kl / 12)


# --- data ----------------------------------------------------------------------------------------

def test_frey_faces_in_any_layout(refused, tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    torch.manual_seed(0)
    ff = torch.randint(0, 256, (560, 150), dtype=torch.uint8).numpy()
    path = tmp_path / "frey_rawface.mat"

    def load(array):
        scipy_io.savemat(path, {"ff": array})
        return eae.load_frey(tmp_path)

    usual = load(ff)
    assert usual.shape == (150, 560) and usual.max() == 1
    for other in (ff.T, ff / 255, (ff / 255).T, ff.astype(float)):
        assert torch.allclose(load(other), usual)

    def main(argv):
        eae.main(["--experiment", "frey", "--data", str(tmp_path), *argv])

    for bad in (ff[None], ff[:100], ff - 300.0):
        scipy_io.savemat(path, {"ff": bad})
        assert "frey_rawface.mat" in refused(main, [])
    path.write_bytes(b"no matrix")
    assert "https://" in refused(main, [])


def test_celeba_is_found_in_nested_folders_and_too_few_are_refused(refused, tmp_path):
    from PIL import Image
    home = tmp_path / "celeba" / "img_align_celeba" / "img_align_celeba"
    home.mkdir(parents=True)
    for k in range(100):
        Image.new("RGB", (178, 218), (k, 0, 255)).save(home / f"{k:06}.jpg")
    faces = eae.load_celeba(tmp_path, 0)
    assert faces.shape == (100, 3, 64, 64) and faces.dtype == torch.uint8
    assert abs(int(faces[90, 0, 30, 30]) - 90) < 4  # in order
    (home / "000000.jpg").unlink()

    def main(argv):
        eae.main(["--experiment", "celeba", "--data", str(tmp_path), *argv])

    assert "too few" in refused(main, [])
    (home / "000000.jpg").write_bytes(b"no image")
    assert "000000.jpg" in refused(main, [])


# --- verdicts ------------------------------------------------------------------------------------

EARNED = ("yes", "reproduced", "better", "fitted")


def untrained_digits():
    """{kind: measures} where all nets are untrained, on glyphs, with the yardsticks."""
    data = eae.load_images("mnist", "glyphs", 1000, "", "cpu")
    axes = eae.principal_axes(data[0])
    found = {kind: [] for kind in [*eae.KINDS, "untrained"]}
    for seed in range(3):
        for k, kind in enumerate(found):
            model = eae.untrained_model(10 * seed + k, 784, "cpu")
            g = torch.Generator().manual_seed(seed)
            measures = eae.measure_digits(model, data, axes, g)
            found[kind].append(measures | {"mean image": 0.0446})
    at = {kind: common.over_repeats(measures) for kind, measures in found.items()}
    g = torch.Generator().manual_seed(0)
    for what, measures in eae.yardsticks(data[2], axes, g).items():
        at[what] = common.over_repeats([measures] * 3)
    return at


@pytest.fixture(scope="module")
def dead():
    return untrained_digits()


def test_untrained_nets_earn_no_row(dead, wave_data):
    rows = eae.image_claims("mnist", dead) + eae.image_claims("frey", dead)
    sweep = {T: dead["EAE"] for T in eae.TEMPERATURES} | {"AE": dead["AE"]}
    sweep[eae.TEMPERATURES[-1]] = dead["VAE"]
    rows += eae.sweep_claims(sweep)
    found = []
    for seed in range(3):
        encoder, decoder = eae.build(eae.wave_nets, seed, "dead", "cpu")
        test_set = wave_data["x"][-200:], wave_data["x_t"][-200:]
        with torch.no_grad():
            members = eae.wave_measures(encoder, decoder, *test_set)[None]
        found.append(eae.measure_ensemble(members)[0])
    rows += eae.wave_claims(found)
    faces = {}
    for title, seed in (("high T", 0), ("low T", 1)):
        torch.manual_seed(seed)
        _, decoder = eae.face_nets()
        x_test = torch.rand(20, 3, 64, 64)
        ensemble = torch.randn(3, 20 * 256 + 1)
        runs = [eae.measure_faces(decoder, ensemble, x_test, x_test.mean(0))[0]] * 3
        faces[title] = common.over_repeats(runs)
    rows += eae.face_claims(faces)
    living = common.over_repeats([{"mse": 0.01, "mean face": 0.07, "distinct": 0.8,
                             "loss deviation": 1e-4 * k} for k in (1, 2, 3)])
    noise = common.over_repeats([{"mse": 0.3, "mean face": 0.07, "distinct": 0.0,
                            "loss deviation": 0.1 * k} for k in (1, 2, 3)])
    rows += eae.face_claims({"high T": noise, "low T": living})  # a dead hot net, a living cold one
    assert len(rows) == 44
    assert [row for row in rows if row["verdict"] in EARNED] == []


def test_the_mean_image_earns_no_row(dead):
    """Every net in the place of the mean image, with all units active by the codes' scale."""
    at = {key: dict(measures) for key, measures in dead.items()}
    for k, kind in enumerate(eae.KINDS):
        at[kind]["mse"] = at["mean image"]["mse"] * (1 + 0.001 * k)
        at[kind]["active"] = torch.tensor([64.0, 16.0, 53.0][k]).repeat(3)
    rows = eae.image_claims("mnist", at)
    assert [row for row in rows if row["verdict"] in EARNED] == []


def test_the_documents_own_figures_earn_their_rows(dead):
    at = {key: dict(measures) for key, measures in dead.items()}
    for kind, (error, active) in eae.TABLE_1["mnist"].items():
        spread = torch.tensor([0.99, 1.0, 1.01])
        at[kind] |= {"mse": error * spread, "active": torch.tensor(float(active)).repeat(3)}
    at["EAE"]["variance"] = torch.tensor([9.0, 10.0, 11.0])
    at["EAE"]["eta2"] = torch.tensor([0.9, 0.91, 0.92])
    at["mean image"] = {"mse": torch.tensor(0.067).repeat(3)}
    rows = eae.image_claims("mnist", at)
    assert [row["verdict"] for row in rows[:6]] == ["reproduced"] * 6
    verdicts = {row["claim"]: row["verdict"] for row in rows}
    for claim in ("MSE: VAE below EAE", "MSE: AE below EAE", "MSE: AE below VAE",
                  "digits explain a unit (η²): AE below EAE",
                  "VAE, at most a quarter of the units active", "only the EAE uses all units"):
        assert verdicts[f"mnist: {claim}"] == "yes", claim


# --- runs ----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke preset of two experiments, in two commands of one folder."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    eae.main(["--preset", "smoke", "--out", str(out)])
    first = {path.name for path in out.glob("fig_*.png")}
    eae.main(["--preset", "smoke", "--experiment", "reaction-diffusion", "--out", str(out)])
    return out, first


def test_a_second_experiment_keeps_the_results_of_the_first(smoke):
    out, first = smoke
    report = json.loads((out / "results.json").read_text())
    assert set(report["results"]) == {"mnist", "reaction-diffusion"}
    figures = {path.name for path in out.glob("fig_*.png")}
    assert len(first) == 4 and first < figures and len(figures) == 8
    rows = report["tables"]["The document's figures and claims"]
    assert len(rows) == 23 and {row["verdict"] for row in rows} == {"-"}
    for line in (out / "table.md").read_text().splitlines():
        assert len(line) < 122
    assert (out / "metrics.csv").read_text().startswith("net,block,loss")


def test_units_hold_loadable_nets(smoke):
    out, _ = smoke
    found = torch.load(out / "units" / "mnist-1-EAE.pt", weights_only=True)["result"]
    encoder, decoder = eae.digit_nets(784)
    encoder.load_state_dict(found["encoder"])
    decoder.load_state_dict(found["decoder"])
    assert found["ensemble"].shape == (3, sum(p.numel() for p in encoder.parameters()))
    assert not torch.equal(found["ensemble"][0], found["ensemble"][1])


def test_a_killed_run_continues_to_the_same_results(smoke):
    """A kill -9 in the middle of an ensemble, one in that of an AE; then the same command."""
    out, _ = smoke
    shutil.copytree(out, "run")
    for file in ("results.json", "units/mnist-1-EAE.pt", "units/mnist-2-AE.pt"):
        pathlib.Path("run", file).unlink()
    for part in ("mnist-1-EAE.2.checkpoint", "mnist-2-AE.1.checkpoint"):
        killed("import eae_simmering; eae_simmering.main()", part, "--preset", "smoke")
    eae.main(["--preset", "smoke", "--out", "run"])
    for file in ("metrics.csv", "table.md"):
        ours = pathlib.Path("run", file).read_text().split("\n")
        theirs = (out / file).read_text().split("\n")
        assert ours[:2] + ours[3:] == theirs[:2] + theirs[3:]  # but for the seconds


def test_a_loss_that_is_not_finite_is_named():
    argv = ["--preset", "smoke", "--step", "1000", "--updates", "40"]
    with pytest.raises(FloatingPointError, match="mnist-1-EAE: .* is not finite at step"):
        eae.main(argv)


@pytest.mark.parametrize("argv, part", [
    (["--temperature", "0"], "--temperature"),
    (["--temperature", "1e-4", "--experiment", "celeba"], "below 0.0001"),
    (["--temperature", "1e-7", "--experiment", "temperature"], "its own temperatures"),
    (["--step", "1e300"], "--step"),
    (["--samples", "0"], "--samples"),
    (["--experiment", "cifar"], "--experiment"),
    (["--experiment", "mnist", "--data", "nowhere/else"], "mnist")])
def test_bad_flags_are_refused_in_one_line(refused, argv, part):
    if "--data" in argv:
        pathlib.Path("nowhere").write_text("a file, no folder")
    assert part in refused(eae.main, argv)
    assert not pathlib.Path("out").exists()
