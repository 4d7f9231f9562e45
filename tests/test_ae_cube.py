"""ae_cube.py: the mathematics of the document, the null test, and the run as a user sees it."""

import json
import math
import os
import shutil

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ae_cube
import common
from ae_cube import Row
from helpers import killed, pasted


def g(name="test"):
    return common.generator(0, name)


# --- data ---


def test_points_are_uniform_on_the_surface():
    n = 60_000
    x = ae_cube.cube_surface(n, g())
    assert (x.abs().amax(1) == 1).all() and x.abs().max() == 1
    share = ae_cube.nearest_face(x).bincount(minlength=6) / n
    assert ((share - 1 / 6).abs() < 5 * math.sqrt(5 / 36 / n)).all()
    assert torch.allclose(x.var(0), torch.full((3,), 5 / 9), atol=0.01)
    assert x.mean(0).abs().max() < 0.02
    # within a face the two free coordinates are uniform: variance 1/3, fourth moment 1/5
    face = x[ae_cube.nearest_face(x) == 5]
    assert (face[:, 2] == 1).all()
    assert torch.allclose(face[:, :2].var(0), torch.tensor(1 / 3), atol=0.02)
    assert torch.allclose(face[:, :2].pow(4).mean(0), torch.tensor(1 / 5), atol=0.02)


# --- objective ---


def test_information_rate_penalty_and_kl():
    y, eps = torch.randn(2, 200_000, 4, generator=g())
    for snr, bits in ((5, 1.029), (10, 1.730), (15, 2.514), (20, 3.329)):  # of unit signals
        noise = 10 ** (-snr / 10)
        assert ae_cube.analytic_rate(snr) == pytest.approx(bits, abs=5e-4)
        rate = ae_cube.information_rate(y + noise**0.5 * eps, torch.full_like(y, noise))
        assert rate.item() == pytest.approx(bits, abs=0.01)
    y = torch.tensor([[-1.0, 3.0], [1.0, 5.0]])  # means 0, 4; variances 2, 2
    assert ae_cube.moment_penalty(y).item() == pytest.approx((1 + 16 + 1) / 2)
    mu, var = torch.randn(7, 5, generator=g()), torch.rand(7, 5, generator=g("v")) + 0.1
    exact = kl_divergence(Normal(mu, var.sqrt()), Normal(0.0, 1.0)).sum(1).mean()
    assert torch.isclose(ae_cube.kl_to_standard(mu, var), exact)


def test_mmd_equals_a_double_loop():
    a, b, r = torch.randn(5, 3, generator=g()), torch.randn(7, 3, generator=g("b")) + 1, 2.3

    def k(x, y):
        return math.exp(-((x - y) ** 2).sum().item() / r)

    aa = [k(a[i], a[j]) for i in range(5) for j in range(5) if i != j]
    bb = [k(b[i], b[j]) for i in range(7) for j in range(7) if i != j]
    ab = [k(x, y) for x in a for y in b]
    loop = sum(aa) / len(aa) + sum(bb) / len(bb) - 2 * sum(ab) / len(ab)
    assert ae_cube.mmd2(a, b, r).item() == pytest.approx(loop, abs=1e-6)


def test_mmd_is_unbiased_and_sees_a_difference():
    mmd2 = torch.func.vmap(ae_cube.mmd2, in_dims=(0, 0, None))
    a, b = torch.randn(2, 2000, 20, 3, generator=g())  # 2,000 pairs of samples
    values = mmd2(a, b, 6.0)
    assert values.mean().abs() < 4 * values.std() / math.sqrt(len(values))
    assert values.std() / math.sqrt(len(values)) < 1e-3  # a biased estimate would be off by 0.05
    assert mmd2(a, b + 1, 6.0).mean() > 0.1 and mmd2(a, 2 * b, 6.0).mean() > 0.02


def test_median_heuristic():
    a, b = torch.randn(2, 40, 4, generator=g())
    exact = torch.nn.functional.pdist(torch.cat([a[:32], b[:32]])).square().median()
    assert torch.isclose(ae_cube.median_heuristic(a, b), exact, rtol=1e-4)


def test_fitted_target_ignores_the_scale():
    """MMD to the Gaussian with the latents' own moments does not depend on their scale."""
    z, gauss = torch.rand(64, 8, generator=g("z")), torch.randn(64, 8, generator=g("n"))

    def value(scale, fitted):
        target = ae_cube.latent_target(z * scale, gauss, fitted)
        return ae_cube.mmd2(z * scale, target, ae_cube.median_heuristic(z * scale, target))

    scale = torch.ones((), requires_grad=True)
    (slope,) = torch.autograd.grad(value(scale, 1), scale)
    assert abs(slope.item()) < 1e-5 and value(1.0, 1).abs() > 1e-4
    assert torch.allclose(value(1.0, 1), value(30.0, 1), atol=1e-5)
    assert value(30.0, 0) > 0.1 and torch.equal(ae_cube.latent_target(z, gauss, 0), gauss)


def test_total_is_equation_5():
    net = ae_cube.Autoencoder(6, stochastic=True)
    x, eps = torch.randn(50, 3, generator=g("x")), torch.randn(50, 6, generator=g("e"))
    y, var, z, x_hat = net(x, eps, 0.1)
    total, terms = ae_cube.loss(x, y, var, z, x_hat, eps[:20], "y", 2.0, 3.0, 5.0)
    mse, penalty, kl, mmd = (terms[key] for key in ("mse", "penalty", "kl", "mmd"))
    assert torch.allclose(total, mse + 2 * penalty + 3 * kl + 5 * mmd) and mmd.abs() > 1e-3
    assert torch.allclose(penalty, ae_cube.moment_penalty(y))
    on_z = ae_cube.loss(x, y, var, z, x_hat, penalised="z", c=1.0)[1]
    assert torch.allclose(on_z["penalty"], ae_cube.moment_penalty(z))
    assert set(on_z) == {"mse", "penalty", "rate", "total"}  # what has no weight is not there


# --- model and training ---


def test_noise_of_the_channel_and_of_the_encoder():
    x, eps = torch.randn(50, 3, generator=g("x")), torch.randn(50, 6, generator=g("e"))
    net = ae_cube.Autoencoder(6)
    y, var, z, x_hat = net(x, eps, 0.1)
    assert torch.equal(y, net.encoder(x)) and torch.allclose(var, torch.tensor(0.1))
    assert torch.allclose(z, y + 0.1**0.5 * eps) and torch.equal(x_hat, net.decoder(z))
    held = net(x, eps, 0.1, held=1)[1]
    assert torch.allclose(held, 0.1 * y.var(0).expand_as(y))
    net = ae_cube.Autoencoder(6, stochastic=True)
    mu, var, *_ = net(x, eps, 0.1)
    assert torch.equal(mu, net.encoder(x)[:, :6])
    assert torch.allclose(var, 0.1 + net.encoder(x)[:, 6:].exp())


def test_nets_side_by_side_are_nets_one_by_one():
    """The stacked nets' losses and gradients are those of plain nets with plain losses."""
    rows = ae_cube.rows_of("f4", 15, 4)
    many, _ = ae_cube.train(rows, [0, 1], "f4", 3, 1000)
    for r, row in enumerate(rows):
        one, _ = ae_cube.train([row], [1], "f4", 3, 1000)
        for name, value in one.items():
            assert torch.allclose(many[name][2 * r + 1], value[0], atol=2e-5), (row, name)
    assert not torch.allclose(many[name][0], many[name][1], atol=1e-2)  # by seed


def test_training_is_plain_gradient_descent_on_the_loss():
    """One step of train equals one step of Adam on one plain net."""
    row = Row("f5", 15, 4, beta=(2.0, 2.0), lam=(3.0, 3.0))
    params, log = ae_cube.train([row], [0], "one", 1, 1000)
    net, generator = ae_cube.build(row, 0), common.generator(0, "one")
    data = ae_cube.cube_surface(1000, generator)
    optimiser = torch.optim.Adam(net.parameters(), ae_cube.LEARNING_RATE, betas=(0.9, 0.99))
    x = data[torch.randint(1000, (ae_cube.BATCH,), generator=generator)]
    eps = torch.randn(ae_cube.BATCH, 4, generator=generator)
    target = torch.randn(ae_cube.MMD_POINTS, 4, generator=generator)
    y, var, z, x_hat = net(x, eps, row.noise)
    total, _ = ae_cube.loss(x, y, var, z, x_hat, target, beta=2.0, lam=3.0)
    total.backward()
    optimiser.step()
    assert torch.isclose(log["total"][0, 0, 0], total.detach(), rtol=1e-5)
    for name, value in net.named_parameters():
        assert torch.allclose(params[name][0], value, atol=1e-4), name


def test_training_anneals_and_the_rate_falls(monkeypatch):
    seen, exact = [], ae_cube.annealed

    def annealed(start, end, t, tau):
        value = exact(start, end, t, tau)
        seen.append(value.tolist())
        return value

    monkeypatch.setattr(ae_cube, "annealed", annealed)
    ae_cube.train(ae_cube.rows_of("f5", 15, 6)[:1], [0], "f5", 3, 250)  # tau: 2 steps
    assert seen == [pytest.approx([v]) for v in (1, 0.01, 5.5, 0.505, 10, 1)]
    betas = [exact(1.0, 10.0, t, 1000) for t in (0, 100, 200, 1000, 1400)]
    assert betas == pytest.approx([1, 1.9, 2.8, 10, 10])  # the column KL-Beta of Table 5


# --- measures ---


def test_knn_kl_against_gaussians():
    n = 2500
    for shift, scale in ((0.0, 1.0), (0.5, 1.0), (0.5, 1.5)):
        x, y = torch.randn(2, n, 3, generator=g())
        exact = 3 * kl_divergence(Normal(0.0, 1.0), Normal(shift, scale)).item()
        assert ae_cube.knn_kl(x, shift + scale * y).item() == pytest.approx(exact, abs=0.12)


def test_mutual_information_brackets_that_of_a_gaussian_channel():
    """I = d/2 log2(1 + signal / noise), dimension by dimension, is between the bounds."""
    n, noise = 3000, torch.tensor([0.5, 1.0, 2.0])
    for signal in (0.3, 10.0):
        y = signal**0.5 * torch.randn(n, 3, generator=g())
        z = y + noise.sqrt() * torch.randn(n, 3, generator=g("n"))
        exact = 0.5 * (1 + signal / noise).log2().sum().item()
        low, high = ae_cube.mutual_information(y, noise.expand(n, 3), z)
        assert low.item() - 0.1 < exact < high.item() + 0.1 and high - low < 0.4
    dead = ae_cube.mutual_information(0 * y, noise.expand(n, 3), z)
    assert max(map(abs, dead)) < 1e-3  # the code of a dead encoder tells nothing


@pytest.mark.parametrize("snr, d", [(15, 4), (15, 6), (5, 8)])
def test_linear_code_against_least_squares(snr, d):
    """The formula is the least-squares MSE of a balanced encoder; no other does better."""
    x = ae_cube.cube_surface(100_000, g())
    noise = 10 ** (-snr / 20) * torch.randn(len(x), d, generator=g("n"))
    balanced = {
        4: torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5,
        8: torch.tensor([[a, b, c] for a in (1.0, -1) for b in (1, -1) for c in (1, -1)]) / 3**0.5,
    }
    frames = [balanced.get(d, torch.eye(3).repeat(2, 1)[:d])]
    for i in range(3):
        frames.append(torch.nn.functional.normalize(torch.randn(d, 3, generator=g(str(i)))))
    errors = []
    for frame in frames:
        z = x @ frame.T / (5 / 9) ** 0.5 + noise
        fit = torch.linalg.lstsq(z, x).solution
        errors.append(((z @ fit - x) ** 2).mean().item())
    assert errors[0] == pytest.approx(ae_cube.linear_code_mse(snr, d), rel=0.01)
    assert min(errors) > 0.99 * ae_cube.linear_code_mse(snr, d)


def test_yardsticks_of_the_facts():
    assert ae_cube.linear_code_mse(15, 6) == pytest.approx(0.00865, abs=5e-6)
    assert ae_cube.linear_code_bits(15, 6) == pytest.approx(9.0, abs=0.02)
    bits = 3 * math.log2(1 + 10**1.5)
    assert ae_cube.shannon_lower_bound(bits) == pytest.approx(2.7e-5, abs=5e-7)
    clouds = [float(row["generative KL"]) for row in ae_cube.yardsticks(0, 2000)]
    assert clouds == pytest.approx([0.01, 0.22, 1.08, 1.50, 1.95, 6.85], abs=0.12)


# --- verdicts ---


def measures(n=3, **changes):
    """Of a net that has learned, as evaluate gives them, a little different from seed to seed."""
    values = dict(mse=0.004, total=0.005, rate=2.5, information_low=7.0, information_high=7.2,
                  mmd=0.0, generative_kl=1.0, scatter=0.01, gap=0.0) | changes
    spread = torch.linspace(0.99, 1.01, n)
    return {key: value * spread for key, value in values.items()}


def verdict(at, start):
    return next(row["verdict"] for row in ae_cube.claims(at) if row["claim"].startswith(start))


def f2_everywhere():
    """f2's rows as the document describes them."""
    at = {}
    for snr in (5, 10, 15, 20):
        for d in (2, 4, 6, 8):
            rate = ae_cube.analytic_rate(snr)
            at[f"f2, {snr} dB, d={d}"] = measures(
                mse=0.2 / d / snr, rate=rate, information_low=d * rate, information_high=d * rate)
    at["f2, 15 dB, d=6"]["mse"] *= 0.5
    return at


def test_claims_about_f2_look_at_every_figure():
    assert verdict(f2_everywhere(), "f2: MSE at 15 dB") == "yes"
    assert verdict(f2_everywhere(), "f2: rate rises") == "yes"
    assert verdict(f2_everywhere(), "f2: 15 dB, d=6 is eff") == "yes"
    at = f2_everywhere()
    at["f2, 10 dB, d=2"]["mse"] *= 0.1
    assert verdict(at, "f2: MSE at 15 dB") == "no"
    at = f2_everywhere()
    at["f2, 20 dB, d=4"] = measures(mse=1e-4, information_low=6.0, information_high=6.5)
    assert verdict(at, "f2: 15 dB, d=6 is eff") == "no"  # less error and less information
    at["f2, 20 dB, d=4"]["information_high"] += 20  # the bound does not exclude more
    assert verdict(at, "f2: 15 dB, d=6 is eff") == "open"
    at["f2, 20 dB, d=4"]["information_low"] += 20  # more it is
    assert verdict(at, "f2: 15 dB, d=6 is eff") == "yes"
    at["f2, 15 dB, d=6"]["mse"] += 0.4  # has not learned
    assert verdict(at, "f2: 15 dB, d=6 is eff") != "yes"
    at["f2 few, 15 dB, d=6"], at["f2 few, 20 dB, d=6"] = measures(gap=0.1), measures(gap=0.3)
    assert verdict(at, "f2 overfits more") == "yes"
    at["f2 few, 20 dB, d=6"] = measures(gap=0.3, mse=0.5)
    assert verdict(at, "f2 overfits more") == "open"


def test_generative_claims_compare_best_with_best():
    def at(f4, f3, f5, mse=0.004):
        return {"best f3": measures(generative_kl=f3), "best f5": measures(generative_kl=f5),
                "best f4": measures(generative_kl=f4, mse=mse)}

    assert verdict(at(0.5, 1.0, 2.0), "f4 generates better than f3") == "yes"
    assert verdict(at(1.0, 0.5, 2.0), "f4 generates better than f3") == "no"
    assert verdict(at(1.0, 1.001, 2.0, mse=0.5), "f4 generates better than f3") != "yes"
    assert verdict(at(0.5, 1.0, 2.0), "no f5 of the plane") == "yes"
    assert verdict(at(0.5, 1.0, 0.2), "no f5 of the plane") == "no"


# --- the run ---

SMOKE = ["--preset", "smoke", "--out", "run"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "run"
    return folder, ae_cube.main(["--preset", "smoke", "--out", str(folder)])


def test_smoke_writes_everything(smoke):
    folder, report = smoke
    figures = "target f2 f4_standard f4_fitted models training rate_distortion plane"
    assert {path.name for path in folder.glob("[!.]*.*")} == {
        *("config.json", "results.json", "metrics.csv", "table.md"),
        *(f"fig_{name}.png" for name in figures.split()),
    }
    assert json.load(open(folder / "results.json")) == report
    values = [v for row in report["results"]["measures"].values() for v in row.values()]
    assert len(values) > 300 and all(math.isfinite(x) for value in values for x in value)
    closing, *others = report["tables"].values()
    assert {row["verdict"] for row in closing} == {"-"} and len(closing) > 20
    assert all(len(line) < 100 for line in (folder / "table.md").read_text().splitlines()[3:])
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert header == "model,seed,block,mse,rate,total,penalty,kl,mmd" and len(lines) > 1000
    f2 = next(line for line in lines if line.startswith('"f2,'))
    assert f2.endswith(",,")  # no KL and no MMD where none was trained with


EARNED = ("reproduced", "fitted", "better", "yes")


def run_untrained(monkeypatch, folder):
    """What the claims of a quick run with nets of no training are about."""
    seen = []
    monkeypatch.setattr(ae_cube, "claims", lambda at: seen.append(at) or [])
    monkeypatch.setattr(ae_cube, "LEARNING_RATE", 0.0)
    monkeypatch.setattr(ae_cube, "plot", lambda *rest: None)
    flags = "--steps 1 --seeds 3 --held-out 500 --points 1000 --preset quick"
    ae_cube.main([*flags.split(), "--out", folder])
    return seen[0]


def test_null(monkeypatch):
    """Nets that have learned nothing, and the mean as a predictor, earn no row."""
    claims, build = ae_cube.claims, ae_cube.build

    def mean(row, seed):
        net = build(row, seed)
        torch.nn.init.zeros_(net.decoder[-1].weight)
        torch.nn.init.zeros_(net.decoder[-1].bias)
        return net

    untrained = run_untrained(monkeypatch, "untrained")
    monkeypatch.setattr(ae_cube, "build", mean)
    for at in (untrained, run_untrained(monkeypatch, "mean")):
        table = claims(at)
        assert len(table) > 20 and [row for row in table if row["verdict"] in EARNED] == []
    monkeypatch.setattr(ae_cube, "learned", lambda measures: True)
    assert [row for row in claims(untrained) if row["verdict"] in EARNED]  # it can be lost


def test_kill_and_continue_equals_an_undisturbed_run(smoke, monkeypatch):
    """A real kill -9 in the middle of a unit, then the same command again."""
    shutil.copytree(smoke[0], "run")
    os.remove("run/results.json")
    os.remove("run/units/f2-d4.pt")
    killed("import ae_cube; ae_cube.main()", "f2-d4.1.checkpoint", "--preset", "smoke")
    monkeypatch.setattr(ae_cube, "plot", lambda *rest: None)
    report = ae_cube.main(SMOKE)
    assert report["results"] == smoke[1]["results"] and report["tables"] == smoke[1]["tables"]
    assert open("run/metrics.csv").read() == (smoke[0] / "metrics.csv").read_text()


def test_tune_adds_rows_keeps_figures_and_a_search_continues(monkeypatch):
    """Of one seed, which gives no verdicts."""
    monkeypatch.setattr(ae_cube, "plot", lambda *rest: None)
    monkeypatch.setitem(ae_cube.PRESETS["quick"], "trials", 8)
    flags = "--models plane --seeds 1 --steps 1 --held-out 300 --points 500 --out run"
    one = flags.split()
    plain = ae_cube.main(one)
    tuned = ae_cube.main([*one, "--tune", "--trials", "16"])
    trials = tuned["results"]["trials"]
    rows = tuned["tables"]["The document's figures and claims"]
    assert len(rows) > 2 and {row["verdict"] for row in rows} == {"-"}
    assert len(trials) == 16 and len({trial["beta"] for trial in trials}) == 16
    for trial in trials:
        assert ae_cube.SEARCH_BETA[0] <= trial["beta"] <= ae_cube.SEARCH_BETA[1]
        assert ae_cube.SEARCH_LAMBDA[0] <= trial["lam"] <= ae_cube.SEARCH_LAMBDA[1]
    assert "f5 tuned" in tuned["results"]["measures"]
    assert tuned["results"]["plane"] == plain["results"]["plane"]
    os.remove("run/units/search-8.pt")  # as if killed after the first round: the same again
    again = ae_cube.main(one)  # and without the flag what an earlier command found stays
    assert again["results"] == tuned["results"]


def test_tune_without_optuna_is_one_line_before_any_work(refused, monkeypatch):
    find = common.importlib.util.find_spec
    monkeypatch.setattr(common.importlib.util, "find_spec",
                        lambda name: None if name == "optuna" else find(name))
    assert "--tune" in refused(ae_cube.main, [*SMOKE, "--tune"]) and os.listdir() == []


def test_optuna_proposes_better_points_than_it_started_with():
    trials = []
    for _ in range(8):
        for p in ae_cube.propose(trials, len(trials), 8):
            score = math.log10(p["beta"] / 0.1) ** 2 + math.log10(p["lam"] / 1) ** 2
            trials = trials + [dict(p, generative_kl=score)]
    first, last = ([t["generative_kl"] for t in part] for part in (trials[:8], trials[-8:]))
    assert sum(last) < sum(first) / 2


@pytest.mark.parametrize("argv", ["--models f9", "--snr 99", "--held-out 1", "--trials 9"])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    assert argv.split()[0] in refused(ae_cube.main, argv.split()) and os.listdir() == []


def test_the_copy_test():
    """Model, loss, data and MMD, pasted alone into an empty file, train a net."""
    note = pasted("ae_cube", ["cube_surface", "Autoencoder", "information_rate", "moment_penalty",
                              "kl_to_standard", "squared_distances", "median_heuristic", "mmd2",
                              "loss"])
    net = note["Autoencoder"](4, stochastic=True)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    draw = g()
    for step in range(100):
        x = note["cube_surface"](250, draw)
        eps, target = torch.randn(250, 4, generator=draw), torch.randn(64, 4, generator=draw)
        total, terms = note["loss"](x, *net(x, eps, 0.03), target, lam=1.0)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    assert terms["mse"] < 0.2
