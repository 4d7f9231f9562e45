"""The sampler against known distributions, the waves against their equation, measures against
known answers, and a null test: nets that have learned nothing earn no row."""
import json
import math
import pathlib

import common
import eae_simmering as eae
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import killed, pasted

# The copy test: what follows tests the sampler, the losses and the dynamics alone in a notebook.
NAMES = ["NoseHoover", "cross_entropy", "vae_loss", "candidates", "identify", "reconstruct_waves",
         "integrate", "rotation_rate"]
NOTEBOOK = pasted("eae_simmering", NAMES, "from torch.func import jvp")
NoseHoover, _, vae_loss, candidates, identify, reconstruct_waves, integrate, rotation_rate = [
    NOTEBOOK[name] for name in NAMES]


class Particles(nn.Module):
    """Parameters theta (N,) that a potential acts on."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.as_tensor(theta, dtype=torch.double))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(module, potential, steps, **settings):
    """theta (steps, N) and both thermometers (steps, 2) of a NoseHoover, after 500 steps."""
    sampler = NoseHoover(module, generator=seeded(1), **settings)
    theta, both = [], []
    for _ in range(500 + steps):
        sampler.step(potential)
        theta.append(sampler.theta.clone())
        both.append(sampler.thermometers())
    return torch.stack(theta[500:]), torch.tensor(both[500:])


# --- sampler -------------------------------------------------------------------------------------

def test_harmonic_well_is_sampled_canonically_by_a_chain_of_30():
    well = Particles([0.1])
    T, k = 0.5, 2.0
    theta, both = sample(well, lambda: k / 2 * (well.theta ** 2).sum(), 10_000, T=T, dt=0.3,
                         tau=1.0, chain=30)
    scaled = theta.flatten() * (k / T) ** 0.5
    assert abs(scaled.var() - 1) < 0.08  # equipartition
    assert abs((scaled ** 4).mean() - 3) < 0.5  # a Gaussian: 1.5 for a swing of fixed energy
    assert torch.allclose(both.mean(0) / T, torch.ones(2), atol=0.08)


@pytest.mark.parametrize("chain", [1, 30])
def test_extended_energy_is_conserved_to_second_order(chain):
    def lattice(theta):  # coupled quartic wells
        return (theta ** 4).sum() / 4 + (theta.diff() ** 2).sum() / 2

    drifts = []
    for dt in (0.02, 0.01):
        particles = Particles(torch.linspace(-1, 1, 12))
        T, m = 0.7, 2.0
        sampler = NoseHoover(particles, T, m, dt, tau=1.0, chain=chain, generator=seeded())
        weights = [sampler.N * T] + [T] * (chain - 1)
        heat, energies = 0.0, []
        for _ in range(round(4 / dt)):
            before = list(sampler.w)
            sampler.step(lambda: lattice(particles.theta))
            for weight, old, new in zip(weights, before, sampler.w):
                heat += weight * dt * (old + new) / 2  # N T s_1 + T s_2 + ..., ds_k/dt = w_k
            thermostats = sampler.Q / 2 * sum(w ** 2 for w in sampler.w)
            U = lattice(sampler.theta).item()
            energies.append(U + sampler.mv2 / 2 + thermostats + heat)
        drifts.append(max(energies) - min(energies))
    assert drifts[0] < 0.01
    assert 3 < drifts[0] / drifts[1] < 5  # halved step, a quarter of the error


def test_new_velocities_hide_cold_weights_from_the_kinetic_thermometer_alone():
    wells = Particles(torch.zeros(2000))  # far colder than T
    sampler = NoseHoover(wells, T=0.5, m=2.0, dt=0.1, generator=seeded())
    for _ in range(10):
        chain = list(sampler.w)
        sampler.redraw()
        assert sampler.w == chain  # it goes on
        sampler.step(lambda: (wells.theta ** 2).sum() / 2)
    kinetic, configurational = sampler.thermometers()
    assert abs(kinetic / 0.5 - 1) < 0.2 and 0 < configurational / 0.5 < 0.2


def test_free_energy_gradient_is_the_mean_gradient_over_the_encoders():
    """Eq. (7) on one weight: -T log Z by quadrature, its slope from samples."""
    T, phi = 0.3, torch.tensor(0.3, dtype=torch.double, requires_grad=True)
    encoder = Particles([0.0])

    def U(theta, phi):
        return (1 - phi * theta) ** 2 / 2 + theta ** 2 / 10

    grid = torch.linspace(-15, 15, 20_001, dtype=torch.double)
    F_phi = -T * torch.logsumexp(-U(grid, phi) / T, 0)
    (exact,) = torch.autograd.grad(F_phi, phi)
    theta, _ = sample(encoder, lambda: U(encoder.theta, phi.detach()).sum(), 8000, T=T, dt=0.4,
                      tau=1.0)
    (mean,) = torch.autograd.grad(U(theta.flatten(), phi).mean(), phi)
    assert abs(exact) > 0.3 and abs(mean - exact) < 0.05


def test_decoder_takes_the_mean_of_K_gradients(monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, fused: torch.optim.SGD(p, lr))
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(3, 2), nn.Linear(2, 3)
    x = torch.randn(8, 3)

    def loss(i):
        return F.mse_loss(decoder(encoder(x)), x)

    s = eae.Setting(T=1e-20, dt=1e-6, updates=1, samples=4, batch=8, rate=0.1)
    slopes = torch.autograd.grad(loss(None), [*decoder.parameters()])
    wanted = [p - 0.1 * slope for p, slope in zip(decoder.parameters(), slopes)]
    sampler = NoseHoover(encoder, s.T, dt=s.dt, generator=seeded())  # the encoder does not move
    with torch.no_grad():
        eae.algorithm_1("test", loss, 8, decoder, sampler, s, seeded())
    for p, target in zip(decoder.parameters(), wanted):
        assert torch.allclose(p, target, atol=1e-5)


# --- waves ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of the smoke preset, two experiments."""
    out = tmp_path_factory.mktemp("smoke") / "run"
    argv = ["--preset", "smoke", "--experiment", "mnist", "reaction-diffusion"]
    eae.main([*argv, "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def wave_data(smoke):
    return torch.load(smoke / "units" / "waves.pt", weights_only=True)["result"]


def test_spiral_obeys_its_equation_and_turns_at_omega(wave_data):
    frames = list(eae.spiral(60, n=40, length=20.0, dt=0.05))
    u, u_t = torch.stack([a for a, _ in frames]), torch.stack([b for _, b in frames])
    slope = (u[2:] - u[:-2]) / 0.1
    assert ((slope - u_t[1:-1])[20:].abs().max() / u_t.abs().max()) < 2e-3
    fine = list(eae.spiral(119, n=40, length=20.0, dt=0.025))[-1][0]
    assert (fine - u[59]).abs().max() < 1e-5  # fourth order in time
    basis, x = wave_data["basis"], wave_data["x"]
    assert torch.allclose(basis @ basis.T, torch.eye(eae.MODES), atol=1e-5)
    assert 0 <= wave_data["missed"] < 1e-5
    late = x[-400:, None, :2]  # in the transient the spiral still grows
    assert abs(rotation_rate(late, eae.FRAME).abs().item() / eae.OMEGA - 1) < 0.02


def test_eq_15_is_the_time_derivative(wave_data):
    torch.manual_seed(0)
    encoder, decoder = eae.wave_nets()
    x, x_t = wave_data["x"][-100:], wave_data["x_t"][-100:]
    _, x_hat_t, Xi, z = reconstruct_waves(encoder, decoder, x, x_t)
    assert torch.allclose(z.std(0), torch.ones(2), atol=1e-5)
    ahead = 1e-3 * encoder(x).std(0) * (candidates(z) @ Xi)
    slope = (decoder(encoder(x) + ahead) - decoder(encoder(x) - ahead)) / 2e-3
    assert torch.allclose(x_hat_t, slope, atol=1e-3 * slope.abs().max().item())


def test_identify_finds_a_known_system_and_the_rate_on_a_circle():
    torch.manual_seed(0)
    z = torch.randn(4000, 2)
    Xi = torch.randn(11, 2)
    assert torch.allclose(identify(z, candidates(z) @ Xi), Xi, atol=1e-2)
    angle = torch.linspace(0, 40, 2000)
    circle = 2 ** 0.5 * torch.stack([angle.cos(), angle.sin()], 1)  # of unit variance
    found = identify(circle, 0.9 * torch.stack([-circle[:, 1], circle[:, 0]], 1))
    path = integrate(found[None], circle[:1], 0.05, 400)
    assert abs(rotation_rate(path, 0.05).item() - 0.9) < 2e-3


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

    explodes = hopf(0.9, 0.2)
    explodes[5, 0] = 50.0  # dz1/dt = 50 z1^3: it has no sense of rotation
    cycle = measure(hopf(0.9, 0.2), hopf(0.9, 0.21), explodes)
    assert cycle["attractor"] and cycle["minority"] == 0  # by the median
    assert abs(cycle["omega"] - 0.9) < 1e-3
    centre = measure(hopf(0.9, 0.0), hopf(-0.9, 0.0))
    assert not centre["attractor"] and centre["minority"] == 0.5
    assert centre["end radius"] == pytest.approx([0.5, 1.5], abs=0.01)


def test_the_documents_table_4_is_no_limit_cycle_of_the_data():
    mean, mode = eae.integrated_table_4()
    assert mean["eigenvalues at 0"] == "-0.215 ± 1.53i" and float(mean["radius at the end"]) < 1e-3
    assert abs(abs(float(mode["ω"])) - 2.88) < 0.02


def test_significant_needs_mean_and_mode():
    Xi = 0.01 * torch.randn(500, 11, 2, generator=seeded())
    Xi[:, 0, 0] += 0.5  # both
    Xi[:100, 1, 1] += 2.0  # mean 0.4, mode 0
    mean, mode, large = eae.significant(Xi)
    assert large[0, 0] and large.sum() == 1
    assert mean[1, 1] > 0.3 and abs(mode[1, 1]) < 0.05


# --- measures ------------------------------------------------------------------------------------

def test_vae_loss_is_cross_entropy_and_kl():
    torch.manual_seed(0)
    encoder, decoder = eae.digit_nets(12, 2 * eae.LATENT)
    x, eps = torch.rand(6, 12), torch.randn(6, eae.LATENT)
    mu, logvar = encoder(x).chunk(2, 1)
    posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
    plain = F.binary_cross_entropy(decoder(mu + posterior.stddev * eps).sigmoid(), x)
    assert torch.allclose(vae_loss(encoder, decoder, x, eps, 0.7), plain + 0.7 * kl / 12)


def test_codes_are_means_over_encoders():
    torch.manual_seed(0)
    encoder, decoder = eae.digit_nets(30)
    first = nn.utils.parameters_to_vector(encoder.parameters()).detach()
    ensemble = torch.stack([first, first + 0.1, first + 0.2])
    x = torch.rand(10, 30)
    codes = eae.codes_of(eae.Model("EAE", encoder, decoder, ensemble), x, None)
    z = []
    for theta in ensemble:
        nn.utils.vector_to_parameters(theta, encoder.parameters())
        z.append(encoder(x).detach())
    z = torch.stack(z)  # (M, n, D)
    assert torch.allclose(codes.mean, z.mean(0), rtol=1e-4)
    assert torch.allclose(codes.variance, z.flatten(0, 1).var(0, correction=0), rtol=1e-3)
    motion = z.var(0, correction=0).mean(0) / codes.variance
    assert torch.allclose(codes.motion, motion, rtol=1e-3)


def test_eta_squared_modes_and_frechet_distance_have_their_known_values():
    torch.manual_seed(0)
    y = torch.arange(10).repeat(400)
    z = torch.randn(4000, 3)
    z[:, 0] = y.float()  # told by the class alone
    z[:, 1] += 2 * (y % 2)  # class means 0 and 2: between 1, within 1
    assert torch.allclose(eae.explained_by(y, z), torch.tensor([1.0, 0.5, 0.0]), atol=0.03)
    values = torch.randn(1000, 2)
    values[:500, 1] += 6
    assert eae.modes_of(values).tolist() == [1, 2]
    a = torch.randn(20_000, 3)
    b = 2 * torch.randn(20_000, 3) + 1
    assert abs(eae.frechet_distance(a, b) - 6) < 0.3  # |mean|^2 3, (2 - 1)^2 in 3 dimensions


def test_the_sweeps_bars_are_deviations_of_a_sample():
    measures = dict.fromkeys(["mse", "active", "in use", "eta2"], torch.tensor([1.0, 3.0]))
    titles = [f"T {T:g}" for T in eae.TEMPERATURES] + ["AE", "untrained"]
    fig = eae.plot_sweep(dict.fromkeys(titles, measures), 1e-6)
    low, high = fig.axes[1].containers[0][2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(2 ** 0.5)


def test_paper_is_the_documents_protocol():
    """Appendix A.5.2 and A.5.3: epochs of 50,000 digits and of CelebA's 162,770 faces."""
    args = eae.arguments(["--preset", "paper"])
    digits, faces = eae.setting_of(args, "mnist"), eae.setting_of(args, "celeba")
    epoch = math.ceil(50_000 / 32)
    assert digits.batch == 32 and digits.samples == 2 * epoch
    assert (digits.vae, digits.ae) == (70 * epoch, 140 * epoch)
    assert faces.batch == 32 and faces.samples == math.ceil(162_770 / 32)


# --- verdicts ------------------------------------------------------------------------------------

EARNED = ("yes", "reproduced", "better", "fitted")


@pytest.fixture(scope="module")
def dead():
    """{kind: {measure: (runs,)}} where all nets are untrained, on glyphs, with the yardsticks."""
    data = eae.load_images("mnist", "glyphs", 500, "", "cpu")
    axes = eae.principal_axes(data[0])
    found = {kind: [] for kind in [*eae.KINDS, "untrained"]}
    for seed in range(3):
        for k, kind in enumerate(found):
            model = eae.untrained_model(10 * seed + k, 784, "cpu")
            found[kind].append(eae.measure_digits(model, data, axes, seeded(seed)))
    at = {kind: common.over_repeats(measures) for kind, measures in found.items()}
    for what, measures in eae.yardsticks(data[2], axes, seeded()).items():
        at[what] = common.over_repeats([measures] * 3)
    return at


def test_untrained_nets_earn_no_row(dead, wave_data):
    rows = eae.image_claims("mnist", dead) + eae.image_claims("frey", dead)
    sweep = {"T 1e-07": dead["EAE"], "T 0.001": dead["VAE"], "mean image": dead["mean image"]}
    rows += eae.sweep_claims(sweep)
    members = []
    x, x_t = wave_data["x"][-200:], wave_data["x_t"][-200:]
    for seed in range(3):
        encoder, decoder = eae.build(eae.wave_nets, seed, "dead", "cpu")
        members.append(eae.wave_measures(encoder, decoder, x, x_t).detach())
    waves, _ = eae.measure_ensemble(torch.stack(members))
    rows += eae.wave_claims([waves | {"attractor": True}] * 3)  # even if it were one by chance
    living = {"mse": 0.01, "mean face": 0.07, "distinct": 0.8, "loss deviation": 1e-4}
    noise = {"mse": 0.3, "mean face": 0.07, "distinct": 0.0, "loss deviation": 0.1}
    for low in (living, noise):  # the hot net is dead, then both are
        faces = {"high T": common.over_repeats([noise] * 3),
                 "low T": common.over_repeats([low] * 3)}
        rows += eae.face_claims(faces)
    assert len(rows) == 43
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
    at["mean image"] = {"mse": torch.tensor(0.067).repeat(3)}
    rows = eae.image_claims("mnist", at)
    assert [row["verdict"] for row in rows[:6]] == ["reproduced"] * 6
    assert [row["verdict"] for row in rows[6:9] + rows[-2:]] == ["yes"] * 5


# --- runs ----------------------------------------------------------------------------------------

def test_smoke_leaves_loadable_nets_and_no_verdicts(smoke):
    report = json.loads((smoke / "results.json").read_text())
    rows = report["tables"]["The document's figures and claims"]
    assert len(rows) == 22 and {row["verdict"] for row in rows} == {"-"}
    assert len(list(smoke.glob("fig_*.png"))) == 8
    found = torch.load(smoke / "units" / "mnist-1-EAE.pt", weights_only=True)["result"]
    encoder, decoder = eae.digit_nets(784)
    encoder.load_state_dict(found["encoder"])
    decoder.load_state_dict(found["decoder"])
    assert found["ensemble"].shape == (3, sum(p.numel() for p in encoder.parameters()))
    assert not torch.equal(found["ensemble"][0], found["ensemble"][1])


def test_a_killed_run_continues_to_the_same_results(smoke):
    """A kill -9 in the middle of the first ensemble, then the same command."""
    code = "import eae_simmering; eae_simmering.main()"
    killed(code, "mnist-1-EAE.2.checkpoint", "--preset", "smoke")
    ours = eae.main(["--preset", "smoke", "--out", "run"])
    theirs = json.loads((smoke / "results.json").read_text())
    assert ours["results"]["mnist"] == theirs["results"]["mnist"]


@pytest.mark.parametrize("argv, part", [
    (["--temperature", "1e-4", "--experiment", "celeba"], "below 0.0001"),
    (["--temperature", "1e-7", "--experiment", "temperature"], "its own temperatures"),
    (["--step", "1e300"], "--step")])
def test_bad_flags_are_refused_in_one_line(refused, argv, part):
    assert part in refused(eae.main, argv)
    assert not pathlib.Path("out").exists()
