"""ae_cube.py: the mathematics of the document, the null test, and the run as a user sees it."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ae_cube
import common
from ae_cube import Row
from helpers import killed, pasted


def g(name="test"):
    return common.generator(0, name)


# --- data and objective ---


def test_points_are_uniform_on_the_surface():
    n = 60_000
    x = ae_cube.cube_surface(n, g())
    assert (x.abs().amax(1) == 1).all()
    face = ae_cube.nearest_face(x)
    share = face.bincount(minlength=6) / n
    assert ((share - 1 / 6).abs() < 5 * math.sqrt(5 / 36 / n)).all()
    assert torch.allclose(x.var(0), torch.tensor(5 / 9), atol=0.01)
    top = x[face == 5]
    assert (top[:, 2] == 1).all()
    assert torch.allclose(top[:, :2].var(0), torch.tensor(1 / 3), atol=0.02)


def test_information_rate_penalty_and_kl():
    y, eps = torch.randn(2, 200_000, 4, generator=g())
    for snr, bits in ((5, 1.029), (10, 1.730), (15, 2.514), (20, 3.329)):  # of unit signals
        noise = 10 ** (-snr / 10)
        assert ae_cube.analytic_rate(snr) == pytest.approx(bits, abs=5e-4)
        rate = ae_cube.information_rate(y + noise**0.5 * eps, torch.full_like(y, noise))
        assert rate.item() == pytest.approx(bits, abs=0.01)
    y = torch.tensor([[-1.0, 3.0], [1.0, 5.0]])  # means 0, 4; variances 2, 2
    assert ae_cube.moment_penalty(y).item() == pytest.approx((1 + 16 + 1) / 2)
    batches = torch.randn(2000, 250, 4, generator=g())  # perfect codes: 1/B + 2/(B - 1)
    assert torch.vmap(ae_cube.moment_penalty)(batches).mean() == pytest.approx(0.012, rel=0.05)
    mu, var = torch.randn(7, 5, generator=g()), torch.rand(7, 5, generator=g("v")) + 0.1
    exact = kl_divergence(Normal(mu, var.sqrt()), Normal(0.0, 1.0)).sum(1).mean()
    assert torch.isclose(ae_cube.kl_to_standard(mu, var), exact)


def test_unbiased_mmd_has_the_mean_of_two_gaussians():
    """E k of N(0, 1) and N(m, 1) is sqrt(r / (r + 4)) exp(-m^2 / (r + 4)) in each dimension."""
    a, b = torch.randn(2, 4000, 20, 3, generator=g())  # 4,000 pairs of samples
    mmd2 = torch.vmap(ae_cube.mmd2, in_dims=(0, 0, None))
    for shift in (0.0, 1.0):
        values = mmd2(a, b + shift, 6.0)
        exact = 2 * (6 / 10) ** 1.5 * (1 - math.exp(-3 * shift**2 / 10))
        assert values.mean().item() == pytest.approx(exact, abs=3e-3)  # biased: 0.05 more
    a, b = torch.randn(2, 40, 4, generator=g())
    exact = torch.nn.functional.pdist(torch.cat([a[:32], b[:32]])).square().median()
    assert torch.isclose(ae_cube.median_heuristic(a, b), exact, rtol=1e-4)


def test_fitted_target_ignores_the_scale_through_its_gradient():
    z, gauss = torch.rand(64, 8, generator=g("z")), torch.randn(64, 8, generator=g("n"))

    def slope(constant):
        scale = torch.ones((), requires_grad=True)
        target = ae_cube.latent_target(z * scale, gauss, 1)
        if constant:
            target = target.detach()
        value = ae_cube.mmd2(z * scale, target, ae_cube.median_heuristic(z * scale, target))
        return torch.autograd.grad(value, scale)[0].item()

    assert abs(slope(constant=False)) < 1e-5
    assert slope(constant=True) > 1e-3  # descent would shrink z
    assert torch.equal(ae_cube.latent_target(z, gauss, 0), gauss)


def test_channel_encoder_and_equation_5():
    x, eps = torch.randn(50, 3, generator=g("x")), torch.randn(50, 6, generator=g("e"))
    net = ae_cube.Autoencoder(6)
    for relative in (0, 1):
        y, var, z, x_hat = net(x, eps, 0.1, relative)
        unit = y.var(0) if relative else torch.ones(6)
        assert torch.equal(y, net.encoder(x)) and torch.equal(x_hat, net.decoder(z))
        assert torch.allclose(z, y + (0.1 * unit).sqrt() * eps)
    net = ae_cube.Autoencoder(6, stochastic=True)
    y, var, z, x_hat = net(x, eps, 0.1)
    assert torch.allclose(var, 0.1 + net.encoder(x)[:, 6:].exp())
    for codes, penalise_z in ((y, False), (z, True)):
        terms = ae_cube.loss(x, y, var, z, x_hat, eps[:20], 2.0, 3.0, 5.0, penalise_z)
        mse, penalty, kl, mmd = (terms[key] for key in ("mse", "penalty", "kl", "mmd"))
        assert torch.allclose(terms["total"], mse + 2 * penalty + 3 * kl + 5 * mmd)
        assert torch.allclose(penalty, ae_cube.moment_penalty(codes)) and mmd.abs() > 1e-3


# --- training ---


def test_nets_side_by_side_are_plain_nets_trained_one_by_one():
    """With the annealing of Table 5, whose tau is two of three steps, and the falling rate."""
    betas = [ae_cube.annealed(1.0, 10.0, t, 1000) for t in (0, 100, 200, 1000, 1400)]
    assert betas == pytest.approx([1, 1.9, 2.8, 10, 10])  # the column KL-Beta of Table 5
    annealed, _ = ae_cube.rows_of("f5", 15, 4)
    _, fitted = ae_cube.rows_of("f4", 10, 4)
    weights = [[(1, 0.01), (5.5, 0.505), (10, 1)], [(0, 1)] * 3]  # (beta, lambda) of each step
    params, log, data = ae_cube.train([annealed, fitted], [0, 1], "two", 3, 1000)
    for r, row in enumerate((annealed, fitted)):
        net, generator = ae_cube.build(row, 1), common.generator(1, "two")
        points = ae_cube.cube_surface(1000, generator)
        optimiser = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
        for step, (beta, lam) in enumerate(weights[r]):
            x = points[torch.randint(1000, (250,), generator=generator)]
            eps = torch.randn(250, 4, generator=generator)
            gauss = torch.randn(64, 4, generator=generator)
            y, var, z, x_hat = net(x, eps, row.noise, int(row.relative_noise))
            target = ae_cube.latent_target(z, gauss, int(row.own_moments))
            total = ae_cube.loss(x, y, var, z, x_hat, target, 0, beta, lam)["total"]
            assert torch.isclose(log["total"][step, r, 1], total.detach(), rtol=1e-4)
            optimiser.param_groups[0]["lr"] = 0.01 * (1, 1, 2 / 3)[step]
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
        assert torch.equal(points, data[1])
        for name, value in net.named_parameters():
            assert torch.allclose(params[name][2 * r + 1], value, atol=1e-4), (row, name)


@pytest.mark.parametrize("field, value", [("d", 4), ("penalise_z", True), ("points", 500)])
def test_rows_that_share_too_little_are_refused(field, value):
    row = Row("f2", 15, 6, c=1)
    with pytest.raises(ValueError, match=f"differ in {field}"):
        ae_cube.train([row, row._replace(**{field: value})], [0], "mixed", 1, 1000)


def test_gap_is_of_the_final_net_on_its_own_points():
    """A few steps on many points overfit nothing; a net that knows 20 points by heart does."""
    row = Row("f1", 15, 6, stochastic=False)
    gaps = []
    for steps, points in ((20, 10_000), (100, 20)):
        args = SimpleNamespace(steps=steps, points=points, held_out=10_000, device="cpu")
        (found,) = ae_cube.train_and_evaluate([row], [0], "gap", args, "selection")
        gaps.append(found["measures"]["gap"].item())
    assert abs(gaps[0]) < 0.04 and gaps[1] > 0.5


# --- measures ---


def test_knn_kl_and_mutual_information_of_gaussians():
    n, noise = 2000, torch.tensor([0.5, 1.0, 2.0])
    x, y = torch.randn(2, n, 3, generator=g())
    for shift, scale in ((0.0, 1.0), (0.5, 1.0), (0.5, 1.5)):
        exact = 3 * kl_divergence(Normal(0.0, 1.0), Normal(shift, scale)).item()
        assert ae_cube.knn_kl(x, shift + scale * y).item() == pytest.approx(exact, abs=0.12)
    for signal in (0.0, 0.3, 10.0):  # 0: a dead encoder
        codes = signal**0.5 * x
        exact = 0.5 * (1 + signal / noise).log2().sum().item()
        low, high = ae_cube.mutual_information(codes, noise.expand(n, 3), codes + noise.sqrt() * y)
        assert low.item() - 0.1 < exact < high.item() + 0.1 and high - low < 0.5


def test_best_linear_code_against_least_squares():
    """The formula is the least-squares MSE of a balanced encoder; no other does better."""
    x, exact = ae_cube.cube_surface(100_000, g()), ae_cube.linear_code_mse(15, 6)
    noise = 10 ** (-15 / 20) * torch.randn(len(x), 6, generator=g("n"))
    balanced = torch.eye(3).repeat(2, 1)
    other = torch.nn.functional.normalize(torch.randn(6, 3, generator=g()))
    for frame, expected in ((balanced, pytest.approx(exact, rel=0.01)), (other, None)):
        z = x @ frame.T / (5 / 9) ** 0.5 + noise
        mse = ((z @ torch.linalg.lstsq(z, x).solution - x) ** 2).mean().item()
        assert mse == expected or (expected is None and mse > exact)
    assert ae_cube.linear_code_bits(15, 6) == pytest.approx(9.0, abs=0.02)
    assert ae_cube.shannon_lower_bound(15.08) == pytest.approx(2.7e-5, abs=1e-6)


# --- figures and verdicts ---


def test_figures_of_logs_and_of_a_generative_kl_below_zero():
    log = {term: torch.ones(10, 2) for term in ("total", "rate", "mmd")}
    ends = [ax.lines[-1].get_xdata()[-1] for ax in ae_cube.plot_training(log, log).axes]
    assert ends == pytest.approx([0.9, 0.9, 1400 / 1500, 1400 / 1500])  # of 1,000, 1,500 epochs
    measures = {"generative_kl": torch.tensor([-0.01, 0.0]), "mse": torch.tensor([0.1])}
    rows = [ae_cube.weighted(beta, lam) for lam in ae_cube.LAMBDAS for beta in ae_cube.BETAS]
    trials = [{"beta": 0.1, "lam": 1.0, "generative_kl": -0.01}]
    ae_cube.plot_plane({row: {"measures": measures} for row in rows}, trials).savefig("plane.png")


def measures(**changes):
    """Of three nets that have learned, a little different from seed to seed."""
    values = dict(mse=0.004, total=0.005, rate=2.5, information_low=7.0, information_high=7.2,
                  generative_kl=1.0, scatter=0.01, gap=0.0) | changes
    return {key: value * torch.tensor([0.99, 1.0, 1.01]) for key, value in values.items()}


def verdict(at, start):
    return next(row["verdict"] for row in ae_cube.claims(at) if row["claim"].startswith(start))


def test_claims_about_f2_look_at_every_figure():
    at = {}
    for snr in (5, 10, 15, 20):
        for d in (2, 4, 6, 8):
            rate = ae_cube.analytic_rate(snr)
            at[f"f2, {snr} dB, d={d}"] = measures(
                mse=0.2 / d / snr, rate=rate, information_low=d * rate, information_high=d * rate)
    at["f2, 15 dB, d=6"]["mse"] *= 0.5
    for start in ("f2: MSE at 15 dB", "f2: rate rises", "f2: 15 dB, d=6 is eff"):
        assert verdict(at, start) == "yes"
    rival = at["f2, 20 dB, d=4"] = measures(mse=1e-4, information_low=6.0, information_high=6.5)
    assert verdict(at, "f2: 15 dB, d=6 is eff") == "no"  # less error and less information
    rival["information_high"] += 20  # the bound does not exclude more
    assert verdict(at, "f2: 15 dB, d=6 is eff") == "open"
    at["f2, 10 dB, d=2"]["mse"] *= 0.1
    assert verdict(at, "f2: MSE at 15 dB") == "no"


def test_the_best_is_chosen_among_rows_with_its_weights():
    cells = {}
    for beta, lam, kl in ((0, 0, 0.1), (0.1, 0, 0.5), (0, 1, 0.4), (0, 10, 0.3), (0.1, 1, 0.7)):
        cells[ae_cube.weighted(beta, lam)] = {"measures": measures(generative_kl=kl)}
    best = [ae_cube.best_of(cells, beta, lam) for beta, lam in ((1, 0), (0, 1), (1, 1))]
    assert best == [ae_cube.weighted(*pair) for pair in ((0.1, 0), (0, 10), (0.1, 1))]


# --- the run ---


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "run"
    return folder, ae_cube.main(["--preset", "smoke", "--out", str(folder)])


def test_smoke_writes_everything(smoke):
    folder, report = smoke
    names = "target f2 f4_standard f4_fitted models training rate_distortion plane"
    assert {path.stem for path in folder.glob("*.png")} == {f"fig_{n}" for n in names.split()}
    assert json.load(open(folder / "results.json")) == report
    for row in report["results"]["measures"].values():
        assert all(math.isfinite(x) for values in row.values() for x in values)
    claims = report["tables"]["The document's figures and claims"]
    assert len(claims) == 25 and {row["verdict"] for row in claims} == {"-"}
    assert all(len(line) < 100 for line in (folder / "table.md").read_text().splitlines()[3:])


@pytest.mark.parametrize("kind", ["untrained", "mean"])
def test_null(kind, monkeypatch):
    """Nets that have learned nothing, and the mean as a predictor, earn no row."""
    claims, build, seen = ae_cube.claims, ae_cube.build, []

    def dead(row, seed):
        net = build(row, seed)
        if kind == "mean":
            torch.nn.init.zeros_(net.decoder[-1].weight)
            torch.nn.init.zeros_(net.decoder[-1].bias)
        return net

    monkeypatch.setattr(ae_cube, "build", dead)
    monkeypatch.setattr(ae_cube, "claims", lambda at: seen.append(at) or [])
    monkeypatch.setattr(ae_cube, "LEARNING_RATE", 0.0)
    monkeypatch.setattr(ae_cube, "plot", lambda *rest: None)
    ae_cube.main("--steps 1 --seeds 3 --held-out 100 --points 300 --out run".split())
    verdicts = [row["verdict"] for row in claims(seen[0])]
    assert len(verdicts) == 25 and set(verdicts) <= {"no", "open", "worse", "differs"}
    monkeypatch.setattr(ae_cube, "learned", lambda measures: True)
    assert "yes" in [row["verdict"] for row in claims(seen[0])]  # the test can be lost


def test_kill_and_continue_equals_an_undisturbed_run(smoke, monkeypatch):
    """A real kill -9 in the middle of a unit, then the same command again."""
    shutil.copytree(smoke[0], "run")
    os.remove("run/results.json")
    os.remove("run/units/f2-d4.pt")
    killed("import ae_cube; ae_cube.main()", "f2-d4.1.checkpoint", "--preset", "smoke")
    monkeypatch.setattr(ae_cube, "plot", lambda *rest: None)
    report = ae_cube.main(["--preset", "smoke", "--out", "run"])
    assert report["results"] == smoke[1]["results"] and report["tables"] == smoke[1]["tables"]


def test_tune_adds_rows_keeps_figures_and_a_search_continues(monkeypatch):
    monkeypatch.setattr(ae_cube, "plot", lambda *rest: None)
    monkeypatch.setitem(ae_cube.PRESETS["quick"], "trials", 8)
    flags = "--models plane --seeds 1 --steps 1 --held-out 300 --points 500 --out run".split()
    plain = ae_cube.main(flags)["results"]
    tuned = ae_cube.main([*flags, "--tune", "--trials", "16"])["results"]
    assert len({trial["beta"] for trial in tuned["trials"]}) == 16
    for trial in tuned["trials"]:
        assert 1e-3 <= trial["beta"] <= 10 and 0.1 <= trial["lam"] <= 100
    assert "f5 tuned" in tuned["measures"] and tuned["plane"] == plain["plane"]
    os.remove("run/units/search-8.pt")  # as if killed after the first round: the same again
    assert ae_cube.main(flags)["results"] == tuned


@pytest.mark.parametrize("argv", ["--models f9", "--snr 99", "--held-out 1", "--trials 9"])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    assert argv.split()[0] in refused(ae_cube.main, argv.split()) and os.listdir() == []


def test_the_copy_test():
    """Model, loss, data and MMD, pasted alone into an empty file, train a net."""
    note = pasted("ae_cube", ["cube_surface", "Autoencoder", "information_rate", "moment_penalty",
                              "kl_to_standard", "squared_distances", "median_heuristic", "mmd2",
                              "loss"])
    net, draw = note["Autoencoder"](4, stochastic=True), g()
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(100):
        x = note["cube_surface"](250, draw)
        eps, target = torch.randn(250, 4, generator=draw), torch.randn(64, 4, generator=draw)
        terms = note["loss"](x, *net(x, eps, 0.03), target, lam=1.0)
        optimiser.zero_grad()
        terms["total"].backward()
        optimiser.step()
    assert terms["mse"] < 0.2
