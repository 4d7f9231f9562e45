"""ae_cube.py: the mathematics of the document, and the run as a user sees it."""

import json
import math
import os
import pathlib
import subprocess
import sys
import time

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import ae_cube
import common
from conftest import ROOT


def g(name="test"):
    return common.generator(0, name)


# --- data ---


def test_sampler_is_uniform_on_the_surface():
    n = 60_000
    x = ae_cube.cube_surface(n, g())
    assert ae_cube.surface_distance(x).abs().max() == 0
    share = ae_cube.nearest_face(x).bincount(minlength=6) / n
    assert ((share - 1 / 6).abs() < 5 * math.sqrt(5 / 36 / n)).all()
    assert torch.allclose(x.var(0), torch.full((3,), 5 / 9), atol=0.01)
    assert x.mean(0).abs().max() < 0.02
    # within a face the two free coordinates are uniform: variance 1/3, fourth moment 1/5
    face = x[ae_cube.nearest_face(x) == 5]
    assert (face[:, 2] == 1).all()
    assert torch.allclose(face[:, :2].var(0), torch.tensor(1 / 3), atol=0.02)
    assert torch.allclose(face[:, :2].pow(4).mean(0), torch.tensor(1 / 5), atol=0.02)


@pytest.mark.parametrize(
    "x, distance",
    [((0, 0, 0), 1), ((2, 0, 0), 1), ((2, 2, 2), math.sqrt(3)), ((1, 0.3, -0.2), 0)]
    + [((0.9, 0.5, 0), 0.1), ((-1.3, 1.4, 0), 0.5)],
)
def test_distance_to_the_surface(x, distance):
    found = ae_cube.surface_distance(torch.tensor(x).float()).item()
    assert found == pytest.approx(distance, abs=1e-6)


# --- objective ---


@pytest.mark.parametrize("snr, bits", [(5, 1.029), (10, 1.730), (15, 2.514), (20, 3.329)])
def test_information_rate_of_unit_signals(snr, bits):
    noise = 10 ** (-snr / 10)
    assert 0.5 * math.log2(1 + 10 ** (snr / 10)) == pytest.approx(bits, abs=5e-4)
    y, eps = torch.randn(2, 200_000, 4, generator=g()).unsqueeze(1)
    mask = torch.tensor([1.0, 1, 1, 0]).view(1, 1, 4)
    y[..., 3] *= 100  # a masked dimension counts for nothing
    rate = ae_cube.information_rate(y + math.sqrt(noise) * eps, torch.full((1, 1, 1), noise), mask)
    assert rate.item() == pytest.approx(bits, abs=0.01)


def test_kl_equals_torch_distributions():
    mu, var = torch.randn(2, 7, 5, generator=g()), torch.rand(2, 7, 5, generator=g("v")) + 0.1
    mask = torch.tensor([[1.0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).view(2, 1, 5)
    exact = kl_divergence(Normal(mu, var.sqrt()), Normal(0.0, 1.0)) * mask
    assert torch.allclose(ae_cube.kl_to_standard(mu, var, mask), exact.sum(2).mean(1))


def test_moment_penalty():
    y = torch.tensor([[-1.0, 3.0], [1.0, 5.0]])[None]  # means 0, 4; variances 2, 2
    both = ae_cube.moment_penalty(y, torch.ones(1, 1, 2)).item()
    one = ae_cube.moment_penalty(y, torch.tensor([1.0, 0]).view(1, 1, 2)).item()
    assert both == pytest.approx((1 + 16 + 1) / 2) and one == pytest.approx(1)


def test_mmd_equals_a_double_loop():
    a, b, r = torch.randn(5, 3, generator=g()), torch.randn(7, 3, generator=g("b")) + 1, 2.3

    def k(x, y):
        return math.exp(-((x - y) ** 2).sum().item() / r)

    aa = [k(a[i], a[j]) for i in range(5) for j in range(5) if i != j]
    bb = [k(b[i], b[j]) for i in range(7) for j in range(7) if i != j]
    ab = [k(x, y) for x in a for y in b]
    loop = sum(aa) / len(aa) + sum(bb) / len(bb) - 2 * sum(ab) / len(ab)
    assert ae_cube.mmd2(a[None], b[None], r).item() == pytest.approx(loop, abs=1e-6)


def test_mmd_is_unbiased_and_sees_a_difference():
    a, b = torch.randn(2, 2000, 20, 3, generator=g())  # 2,000 pairs of samples
    values = ae_cube.mmd2(a, b, 6.0)
    assert values.mean().abs() < 4 * values.std() / math.sqrt(len(values))
    assert values.std() / math.sqrt(len(values)) < 1e-3  # a biased estimate would be off by 0.05
    assert ae_cube.mmd2(a, b + 1, 6.0).mean() > 0.1
    assert ae_cube.mmd2(a, 2 * b, 6.0).mean() > 0.02


def test_median_heuristic():
    a, b = torch.randn(2, 9, 4, generator=g()), torch.randn(2, 9, 4, generator=g("b"))
    for m in range(2):
        pooled = torch.cat([a[m, :6], b[m, :6]])
        exact = torch.nn.functional.pdist(pooled).square().median()
        assert torch.isclose(ae_cube.median_heuristic(a, b, 6)[m].squeeze(), exact, rtol=1e-4)


def test_fitted_target_ignores_the_scale():
    """MMD to the Gaussian with the latents' own moments does not depend on their scale."""
    stack = ae_cube.Stack(ae_cube.sweep("f4")[-1:], [g()])
    z, gauss = torch.rand(1, 64, 8, generator=g("z")), torch.randn(1, 64, 8, generator=g("n"))

    def value(scale):
        a, b = z * scale, stack.target(z * scale, gauss)
        return ae_cube.mmd2(a, b, ae_cube.median_heuristic(a, b))

    scale = torch.ones((), requires_grad=True)
    (slope,) = torch.autograd.grad(value(scale).sum(), scale)
    assert abs(slope.item()) < 1e-5 and torch.allclose(value(1.0), value(30.0), atol=1e-5)
    assert stack.fitted.all() and value(1.0).abs() > 1e-4


def test_annealing_schedule():
    assert [ae_cube.annealed(0.0, 1.0, t, 4) for t in range(7)] == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [
        ae_cube.annealed(1.0, 10.0, t, 1000) for t in (0, 100, 200, 1000, 1400)
    ] == pytest.approx([1, 1.9, 2.8, 10, 10])  # the column KL-Beta of Table 5
    stack = ae_cube.Stack(ae_cube.sweep("f5"), [g()])
    assert stack.beta.tolist() == [[1, 1], [10, 10]]
    assert stack.lam[1].tolist() == pytest.approx([1, 0.1])


# --- model ---


def test_stack_equals_single_nets():
    points = [p for p in ae_cube.sweep("f2") if p.snr == 15]
    generators = [common.generator(s, "stack") for s in (0, 1)]
    stack = ae_cube.Stack(points, generators)
    x = torch.randn(8, 5, 3, generator=g())
    y, var = stack.encode(x)
    for m in range(8):
        h = x[m]
        for i, (w, b) in enumerate(zip(stack.encoder.weights, stack.encoder.biases)):
            h = torch.nn.functional.linear(h.tanh() if i else h, w[m].T, b[m, 0])
        d = points[m // 2].d
        assert torch.allclose(y[m, :, :d], h[:, :d], atol=1e-5) and (y[m, :, d:] == 0).all()
    assert torch.allclose(var[:, 0, 0], torch.tensor(10**-1.5))
    eps = torch.randn(8, 5, 8, generator=g())
    _, z = ae_cube.terms(stack, stack.beta[1], stack.lam[1], None, x, eps)
    assert torch.allclose(z, (y + 10**-0.75 * eps) * stack.mask)  # the decoder sees d dimensions
    assert torch.allclose(stack.target(z, eps), (1 + 10**-1.5) ** 0.5 * eps * stack.mask)
    assert not torch.equal(stack.encoder.weights[0][0], stack.encoder.weights[0][1])  # by seed


def test_a_result_depends_on_its_own_seed_and_point_only():
    points = [p for p in ae_cube.sweep("f2") if p.d == 8]
    many, _ = ae_cube.train(points, [0, 1, 2], "f2", 2, 500)
    one, _ = ae_cube.train(points[2:3], [1], "f2", 2, 500)
    m = 2 * 3 + 1
    for a, b in zip(many.parameters(), one.parameters()):
        assert torch.allclose(a[m], b[0], atol=1e-4)
    assert not torch.allclose(a[m], a[m + 1], atol=1e-2)


def test_training_stops_at_a_non_finite_loss(monkeypatch):
    monkeypatch.setattr(ae_cube, "RATE", math.inf)
    with pytest.raises(FloatingPointError, match="f3.* the term mse is not finite at step 1"):
        ae_cube.train(ae_cube.sweep("f3"), [0], "f3", 2, 500)


def test_same_command_same_numbers():
    runs = [ae_cube.train(ae_cube.sweep("f5"), [0], "f5", 2, 500)[1] for _ in range(2)]
    assert torch.equal(*runs)


# --- measures ---


def test_knn_kl_against_gaussians():
    n = 4000
    for shift, scale in ((0.0, 1.0), (0.5, 1.0), (0.0, 2.0), (0.5, 1.5)):
        x, y = torch.randn(2, n, 3, generator=g())
        exact = 3 * kl_divergence(Normal(0.0, 1.0), Normal(shift, scale)).item()
        assert ae_cube.knn_kl(x, shift + scale * y).item() == pytest.approx(exact, abs=0.12)


def test_energy_distance():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert ae_cube.energy_distance(x, y).item() == pytest.approx(2 * (3 + 5 + 2 + 4) / 4 - 1 - 2)
    draws = [torch.randn(2, 50, 2, generator=g(str(i))) for i in range(300)]
    values = torch.stack([ae_cube.energy_distance(*pair) for pair in draws])
    assert values.mean().abs() < 4 * values.std() / math.sqrt(300)


@pytest.mark.parametrize("snr, d", [(5, 1), (5, 2), (10, 3), (15, 4), (15, 6), (5, 8)])
def test_linear_code_against_least_squares(snr, d):
    """The formula is the least-squares MSE of a balanced encoder; no other does better."""
    x = ae_cube.cube_surface(200_000, g())
    noise = 10 ** (-snr / 20) * torch.randn(len(x), d, generator=g("n"))
    balanced = {
        4: torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5,
        8: torch.tensor([[a, b, c] for a in (1.0, -1) for b in (1, -1) for c in (1, -1)]) / 3**0.5,
    }
    frames = [balanced.get(d, torch.eye(3).repeat(2, 1)[:d])]
    frames += [
        torch.nn.functional.normalize(torch.randn(d, 3, generator=g(str(i))), dim=1)
        for i in range(5)
    ]
    errors = []
    for frame in frames:
        z = x @ frame.T / (5 / 9) ** 0.5 + noise
        fit = torch.linalg.lstsq(z, x).solution
        errors.append(((z @ fit - x) ** 2).mean().item())
    assert errors[0] == pytest.approx(ae_cube.linear_code_mse(snr, d), rel=0.01)
    assert min(errors) > 0.99 * ae_cube.linear_code_mse(snr, d)


def test_yardsticks_of_the_facts():
    assert ae_cube.linear_code_mse(15, 6) == pytest.approx(0.00865, abs=5e-6)
    bits = 3 * math.log2(1 + 10**1.5)
    assert ae_cube.shannon_lower_bound(bits) == pytest.approx(2.7e-5, abs=5e-7)
    # a square of side L coded by R bits of uniform quantisation has L^2 2^-R / 12 a coordinate,
    # worse than the bound for two of three coordinates by the known factor 2 pi e / 12
    ratio = (24 * 2**-20 / 12 * 2 / 3) / ae_cube.shannon_lower_bound(20)
    assert ratio == pytest.approx(2 * math.pi * math.e / 12)


# --- the run ---

@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    start = time.time()
    report = ae_cube.main(["--preset", "smoke", "--out", str(folder / "run")])
    return folder / "run", report, time.time() - start


def test_smoke_writes_everything(smoke):
    folder, report, _ = smoke
    figures = "target f2 f4_standard f4_fitted models latents training annealing rate_distortion"
    assert {path.name for path in folder.glob("*.*")} == {
        *("config.json", "results.json", "metrics.csv"),
        *(f"fig_{name}.png" for name in figures.split()),
    }
    assert json.load(open(folder / "results.json")) == report
    assert all(path.stat().st_size > 10_000 for path in folder.glob("fig_*.png"))
    rows = report["results"]["points"]
    assert len(rows) == sum(len(ae_cube.sweep(model)) for model in ae_cube.MODELS)
    assert all(
        math.isfinite(v["mean"]) and v["n"] == 2 for row in rows for v in row["measures"].values()
    )
    claims = {claim["claim"]: claim for claim in report["claims"]}
    assert len(claims) == 20 + 4 + 7
    assert claims["Table 2: f2, 15 dB, d=6, total loss"]["document"] == "0.0052"
    lines = open(folder / "metrics.csv").read().splitlines()
    assert lines[0] == "row,snr,d,seed,epoch,mse,moments,kl,mmd,rate,total"
    assert len(lines) == 1 + 2 * (3 * (len(rows) - 1) + 6)


def test_smoke_has_learnt_something_and_says_what_is_true(smoke):
    _, report, seconds = smoke
    at = {
        (row["name"], row["snr"], row["d"]): {k: v["mean"] for k, v in row["measures"].items()}
        for row in report["results"]["points"]
    }
    assert at["f2", 15, 6]["mse"] < 0.3 < at["f2", 5, 2]["mse"]
    for m in at.values():
        assert m["total"] >= m["mse"] - 0.02 and 0 <= m["faces"] <= 5 / 6 and m["kl"] >= 0
        if m["bits"] > 4:
            assert m["mse"] > ae_cube.shannon_lower_bound(m["bits"])
    holds = {claim["claim"]: claim["holds"] for claim in report["claims"]}
    assert holds["Table 2: f2, 15 dB, d=6, total loss"] is False  # three epochs cannot
    assert at["f1 held", 5, 6]["rate"] == pytest.approx(1.029, abs=0.05)


def test_weights_reload_and_give_the_measured_numbers(smoke):
    unit = torch.load(smoke[0] / "units" / "f3.pt", weights_only=True)["result"]
    stack = ae_cube.Stack(ae_cube.sweep("f3"), [g(), g()])
    stack.load_state_dict(unit["weights"])
    again = ae_cube.evaluate(stack, unit["history"], [0, 1], 500)
    for key, value in again["measures"].items():
        assert torch.allclose(value, unit["measures"][key], rtol=1e-4, atol=1e-5), key


def test_continue_reuses_and_rewrites_the_same_results(smoke, capsys):
    folder, report, _ = smoke
    again = ae_cube.main(["--preset", "smoke", "--out", str(folder)])
    assert "reused f2" in capsys.readouterr().out
    assert again | {"seconds": 0} == report | {"seconds": 0}


def test_tune_adds_rows_and_a_search_continues(capsys):
    one = ["--preset", "smoke", "--models", "f5", "--seeds", "1", "--epochs", "1", "--out", "run"]
    plain = ae_cube.main(one)
    tuned = ae_cube.main([*one, "--tune", "--trials", "16"])
    assert "reused f5\n" in capsys.readouterr().out
    assert tuned["results"]["points"][:2] == plain["results"]["points"]
    trials, space = tuned["results"]["trials"], ae_cube.SEARCH
    assert len(trials) == 16 and len({trial["beta"] for trial in trials}) == 16
    assert all(space[key][0] <= trial[key] <= space[key][1] for trial in trials for key in space)
    best = min(trials, key=lambda trial: trial["knn_kl"])
    row = tuned["results"]["points"][2]
    assert row["name"] == "f5 tuned"
    assert [row["beta"][1], row["lam"][1]] == [best["beta"], best["lam"]]
    os.remove("run/units/f5-search-8.pt")  # as if killed after the first round: the same again
    again = ae_cube.main([*one, "--tune", "--trials", "16"])
    assert again["results"] == tuned["results"]


def test_total_is_equation_5_and_the_variances_add():
    stack = ae_cube.Stack(ae_cube.sweep("f5"), [g()])
    x, eps = torch.randn(2, 50, 3, generator=g("x")), torch.randn(2, 50, 6, generator=g("e"))
    (mse, _, kl, mmd, _, total), _ = ae_cube.terms(
        stack, stack.beta[0], stack.lam[1], eps[:, :20], x, eps
    )
    assert torch.allclose(total, mse + stack.beta[0] * kl + stack.lam[1] * mmd)
    assert mmd.abs().min() > 1e-3 and kl.min() > 1e-3
    assert torch.allclose(stack.encode(x)[1], 10**-1.5 + stack.encoder(x)[..., 6:].exp())


def test_training_anneals(monkeypatch):
    seen, exact = [], ae_cube.terms

    def terms(stack, beta, lam, *rest):
        seen.append([beta[0].item(), lam[0].item()])
        return exact(stack, beta, lam, *rest)

    monkeypatch.setattr(ae_cube, "terms", terms)
    ae_cube.train(ae_cube.sweep("f5"), [0], "f5", 3, 250)  # up to tau = 2 epochs
    assert [pytest.approx(pair) for pair in seen] == [[1, 0.01], [5.5, 0.505], [10, 1]]


def test_generative_claims_need_two_standard_errors_and_no_collapse():
    def value(mean, std=0.3, n=9):
        return {"mean": mean, "std": std, "n": n}

    def verdicts(f4, f5, f6, spread=0.7):
        rows = {("f4 fitted", 15, 6): f4, ("f5 annealed", 15, 6): f5}
        rows["f6 beta=0.01", ae_cube.NO_CHANNEL, 6] = f6
        measures = dict.fromkeys(("total", "mmd"), value(0.0)) | {"spread": value(spread)}
        at = {key: measures | {"knn_kl": value(kl)} for key, kl in rows.items()}
        return {row[0].partition(" (gen")[0]: row[3] for row in ae_cube.claims(at)}

    future = "f6, the future work, generates better than f4"
    annealed = "f5 annealed does not improve"
    error = 2 * math.hypot(0.3, 0.3) / 3
    for f6, better in ((1 - 1.1 * error, True), (1 - 0.9 * error, False), (1.5, False)):
        assert verdicts(1.0, 1.0, f6)[future] is better
    assert verdicts(1.0, 0.9, 1.0)[f"{annealed} on f4"] is True
    assert verdicts(1.0, 0.5, 1.0)[f"{annealed} on f4"] is False
    table = "Table 5, fixed: f5 annealed, 15 dB, d=6, total loss"
    assert verdicts(1, 1, 1)[table] is True and verdicts(1, 1, 1, spread=0.0)[table] is False


def test_optuna_proposes_better_points_than_it_started_with():
    space, trials = {"beta": (1e-3, 10.0), "lam": (1e-3, 10.0)}, []
    for _ in range(8):
        for p in ae_cube.propose(trials, space, len(trials), 8):
            score = math.log10(p["beta"] / 0.1) ** 2 + math.log10(p["lam"] / 1) ** 2
            trials = trials + [dict(p, knn_kl=score)]
    first, last = ([t["knn_kl"] for t in part] for part in (trials[:8], trials[-8:]))
    assert sum(last) < sum(first) / 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, str(ROOT / "ae_cube.py"), "--preset", "smoke", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("part", ["f2.checkpoint", "f4.checkpoint", "f2.pt"])
def test_kill_and_continue_equals_an_undisturbed_run(part, killed_and_continued, undisturbed):
    """A real kill -9, in the middle of a unit or between two, then the same command again."""
    told = killed_and_continued("ae_cube", part)
    assert f"continuing {part[:2]}" in told if part.endswith("checkpoint") else "reused f2" in told
    a, b = (json.load(open(f"{folder}/results.json")) for folder in ("run", undisturbed))
    assert a | {"seconds": 0} == b | {"seconds": 0}
    assert open("run/metrics.csv").read() == open(undisturbed / "metrics.csv").read()


BAD = """--models f9; --snr abc; --snr 99; --latent 0; --latent 2.5; --seeds -1; --seeds 0;
    --points 10; --held-out 1; --epochs 0; --trials 0; --model f2; --preset tiny; --seed x; extra"""


@pytest.mark.parametrize("argv", [line.split() for line in BAD.split(";")])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    line = refused(ae_cube.main, argv)
    assert argv[0] in line and os.listdir() == []


def test_bad_input_as_a_process():
    done = subprocess.run(
        [sys.executable, str(ROOT / "ae_cube.py"), "--snr", "abc"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "'abc'" in done.stderr
    assert done.stdout == "" and os.listdir() == []


def test_other_configuration_and_truncated_unit(refused, capsys):
    one = ["--preset", "smoke", "--models", "f3", "--epochs", "1", "--out", "run"]
    first = ae_cube.main(one)
    assert "--epochs 1" in refused(ae_cube.main, [*one[:3], "f3", "--epochs", "2", "--out", "run"])
    path = pathlib.Path("run/units/f3.pt")
    path.write_bytes(path.read_bytes()[:2000])
    again = ae_cube.main(one)
    assert "f3.pt" in capsys.readouterr().err
    assert again["results"] == first["results"] and path.with_name("f3.pt.broken").exists()
