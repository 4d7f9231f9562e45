"""vae_lj_fluid.py: the sampler against exact laws, the measures, the null test, and the run."""

import json
import math
import os
import shutil
import subprocess

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import common
import vae_lj_fluid as lj
from conftest import ROOT
from helpers import killed, pasted

T, SCALE = 0.75, 10 * math.sqrt(2)


def g(name="test"):
    return common.generator(0, name)


def points(C=8, n=30, name="points"):
    return torch.rand(C, n, 2, generator=g(name), dtype=torch.double)


def apart(xy):
    return (xy[..., :, None, :] - xy[..., None, :, :]).norm(dim=-1)


def constant(output, latent):
    """A net that gives one output, whatever it sees; its codes are not all equal."""
    net = torch.nn.Module()
    net.encoder = lambda x: 0.1 * x.flatten(1)[:, :1].expand(-1, 2 * latent)
    net.decoder = lambda z: output.expand(len(z), *output.shape)
    return net


def smirnov(x, law):
    """Kolmogorov-Smirnov statistic times sqrt n; above 2.3 with probability 5e-5 (4 sigma)."""
    x = x.sort().values.double()
    n, F = len(x), law(x)
    steps = torch.arange(n + 1, dtype=torch.double) / n
    return max((steps[1:] - F).max(), (F - steps[:-1]).max()).item() * math.sqrt(n)


# --- energies, moves, distributions ---


def test_energies_have_their_known_minima_zeros_and_cut_off():
    r = torch.linspace(0.9, 3.2, 230_001, dtype=torch.double)
    for pair, at in ((lj.lennard_jones, 2 ** (1 / 6)), (lj.fake, math.sqrt(2))):
        U = pair(r**2)
        assert r[U.argmin()].item() == pytest.approx(at, abs=1e-5)
        assert U.min().item() == pytest.approx(-1, abs=1e-9)
        assert pair(torch.tensor([1.0])).item() == 0 and torch.isfinite(pair(torch.zeros(1)))
    ends = lj.lennard_jones(torch.tensor([3.0, 3.0001], dtype=torch.double) ** 2)
    assert ends[0].item() == pytest.approx(4 * (3**-12 - 3**-6)) and ends[1] == 0  # not shifted


def test_a_coordinate_that_would_leave_the_box_is_dropped_alone():
    xy = torch.tensor([[0.05, 5.0], [5.0, 9.9]])[:, None]  # (2, 1, 2)
    new, _ = lj.trial(xy, torch.tensor([[0.0, 0.25], [0.75, 1.0], [0.5, 0.5]])[:, None])
    assert torch.allclose(new[:, 0], torch.tensor([[0.05, 4.9], [5.1, 9.9]]))  # x, and y dropped


def test_one_particle_has_the_barometric_density(monkeypatch):
    L, gamma = 2.0, 1.5
    monkeypatch.setattr(lj, "N", 1)
    monkeypatch.setattr(lj, "L", L)
    xy, accepted = lj.metropolis(gamma, 4000, 1200, lj.lennard_jones, g())
    x, y = xy[:, 0]
    scale = T / gamma
    total = 1 - math.exp(-L / scale)
    assert smirnov(y, lambda y: (1 - torch.exp(-y / scale)) / total) < 2.3
    assert smirnov(x, lambda x: x / L) < 2.3
    assert 0.85 < accepted < 1  # only moves up by 0.2 at most cost energy


@pytest.mark.parametrize("pair", [lj.lennard_jones, lj.fake])
def test_two_particles_have_the_energy_of_the_boltzmann_weight(pair, monkeypatch):
    """Mean energy and share of close pairs against quadrature over the distances dx, dy."""
    L, gamma, C = 2.5, 1.0, 4000
    monkeypatch.setattr(lj, "N", 2)
    monkeypatch.setattr(lj, "L", L)
    xy, _ = lj.metropolis(gamma, C, 700, pair, g(pair.__name__))
    grid = (torch.arange(125, dtype=torch.double) + 0.5) / 125 * L
    dx, y1, y2 = grid[:, None, None], grid[None, :, None], grid[None, None, :]
    r2 = dx**2 + (y1 - y2) ** 2
    U = pair(r2) + gamma * (y1 + y2)
    weight = (L - dx) * torch.exp(-U / T)  # (L - dx): how many places two x dx apart have
    weight = weight / weight.sum()
    mean, close = (weight * U).sum().item(), (weight * (r2 < 1.3**2)).sum().item()
    energy = lj.energy(xy.double(), gamma, pair)
    assert energy.mean().item() == pytest.approx(mean, abs=4 * energy.std().item() / C**0.5)
    near = ((xy[:, 0] - xy[:, 1]).norm(dim=0) < 1.3).double().mean().item()
    assert near == pytest.approx(close, abs=4 * (close * (1 - close) / C) ** 0.5)


def test_contact_theorem(monkeypatch):
    """T [rho(0) - rho(L)] = N gamma in equilibrium; rho from a cubic fitted near the walls."""
    L, n, gamma, C, bins = 5.0, 5, 0.5, 3000, 20
    monkeypatch.setattr(lj, "N", n)
    monkeypatch.setattr(lj, "L", L)
    xy, _ = lj.metropolis(gamma, C, 800, lj.lennard_jones, g())
    edge = torch.linspace(0, 1, bins + 1, dtype=torch.double)
    powers = torch.arange(1, 5)
    area = (edge[1:, None] ** powers - edge[:-1, None] ** powers) / powers
    weight = torch.linalg.pinv(area)[0]  # of each bin, in the fitted density at the wall
    contact = 0
    for sign, height in ((1, xy[1].T), (-1, L - xy[1].T)):  # (C, N)
        place = (height * bins).long()
        inside = place < bins
        contact = contact + T * sign * (weight[place.clamp(max=bins - 1)] * inside).sum(1)
    error = contact.std().item() / C**0.5
    assert contact.mean().item() == pytest.approx(n * gamma, abs=4 * error) and error < 0.1


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_the_compiled_sampler_is_a_plain_cpp_metropolis():
    """Energy, height and acceptance of 500 systems at gamma = 1 after 100 sweeps by both."""
    subprocess.run(["g++", "-O3", "-o", "plain", ROOT / "tests/metropolis.cpp"], check=True)
    out = subprocess.run(["./plain", "1.0", "500", "100", "1"], capture_output=True, text=True)
    plain = torch.tensor([[float(x) for x in line.split()] for line in out.stdout.splitlines()])
    xy, share = lj.metropolis(1.0, 500, 100, lj.lennard_jones, g(), compile=True)
    ours = lj.energy(xy, 1.0, lj.lennard_jones), xy[1].mean(0)  # (C,) each
    for theirs, values in zip(plain.T, ours):
        error = ((theirs.var() + values.var()) / 500).sqrt().item()
        assert values.mean().item() == pytest.approx(theirs.mean().item(), abs=4 * error)
    assert share.item() == pytest.approx(plain[:, 2].mean().item(), abs=0.01)


# --- damage, nets, objective ---


@pytest.mark.parametrize("reading", ["code", "slide"])
def test_corruption_moves_four_particles_as_it_says(reading):
    xy = points(500) / math.sqrt(2)
    after, moved = lj.corrupt(xy, reading, g())
    assert (moved.sum(1) == 4).all() and torch.equal(after[~moved], xy[~moved])
    step = (after - xy)[moved]
    if reading == "code":
        assert smirnov(step.flatten(), lambda s: (s + 0.2) / 0.4) < 2.3
    else:
        assert smirnov(step.norm(dim=1), lambda r: r / 0.2) < 2.3
        assert smirnov(torch.atan2(*step.T), lambda a: (a + math.pi) / (2 * math.pi)) < 2.3


def test_hidden_distances_are_those_of_a_block_and_its_mirror_image_not_the_diagonal():
    d = lj.distance_matrix(points(2000))
    black, hidden = lj.black_out(d, 6, g())
    assert torch.equal(hidden, hidden.mT) and torch.equal(black != d, hidden)
    count = hidden.flatten(1).sum(1)
    assert count.max() == 72 and count.min() == 30  # 36 on the diagonal, less 6 zeros
    assert not hidden.diagonal(dim1=-2, dim2=-1).any() and hidden.any(0).sum() == 870
    net = constant(torch.full((1, 30, 30), 0.1), 1)
    found = lj.evaluate_missing(net, d.mean(0), d, 30, g())  # all is hidden
    pairs = apart(points(2000))[:, *torch.triu_indices(30, 30, 1)]
    assert torch.allclose(found["restored"], SCALE * (pairs - 0.1).square().mean(1).sqrt())


def test_the_main_net_has_the_documents_weights():
    net = lj.build(lj.MAIN, lj.MODELS[lj.MAIN], 0)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.decoder)]
    assert sizes == [3_627_730, 1_895_151]
    glorot = math.sqrt(2 / (9 * 60 + 9 * 50))
    assert net.encoder[0][2].weight.std().item() == pytest.approx(glorot, rel=0.02)


def test_losses():
    net = lj.dense_vae((1, 6, 6), 5).double()
    x, eps = lj.distance_matrix(points(9, 6)), torch.randn(9, 5, generator=g(), dtype=torch.double)
    mu, logvar = net.encoder(x).chunk(2, 1)
    q = Normal(mu, (logvar / 2).exp())
    kl = kl_divergence(q, Normal(0.0, 1.0)).mean()
    error = ((net.decoder(mu + eps * q.scale) - x) ** 2).mean()
    loss = torch.stack(lj.vae_loss(net, x, x, eps, 0.01))
    assert torch.allclose(loss, torch.stack([error + 0.01 * kl, error, kl]))
    x = (x > 0.5).double()
    live = 1 / x.mean() - 1
    mu, logvar = net.encoder(x).chunk(2, 1)
    x_hat = net.decoder(mu + eps * (logvar / 2).exp())
    loss, error, kl = lj.grid_loss(net, x, eps, 0.5, 0.25)
    weighted = live**0.75 * x * x_hat.log() + (1 - x) * (1 - x_hat).log()
    assert error.item() == pytest.approx(-weighted.mean().item())
    assert loss.item() == pytest.approx((error + 0.25 * 0.5 * kl).item())


def test_unit_nets_have_the_slides_likelihood():
    """(x - mu(z))^2 + KL, both sums, over the number of entries."""
    for name, entries in (("distances-conv-unit", 900), ("coordinates-dense-unit", 60)):
        squares, kl = torch.rand(entries, generator=g()), torch.rand(40, generator=g("kl"))
        slides = (squares.sum() + kl.sum()) / entries
        ours = squares.mean() + lj.MODELS[name].lam * kl.mean()
        assert ours.item() == pytest.approx(slides.item(), rel=1e-5)


# --- geometry ---


def test_gram_matrix_gives_the_points_up_to_a_rigid_motion():
    xy = 10 * points()
    d = apart(xy)
    found, planar = lj.gram_coordinates(d)
    assert torch.allclose(apart(found), d, atol=1e-9)
    assert torch.allclose(planar, torch.ones(8, dtype=torch.double))
    assert torch.allclose(lj.procrustes(found, xy), xy, atol=1e-9)


def test_the_tumbler_sits_on_the_side_nearest_to_the_centre_of_mass():
    from scipy.spatial import ConvexHull

    xy = 10 * points(30)
    sat = lj.turbo_tumbler(xy)
    assert torch.allclose(apart(sat), apart(xy), atol=1e-9)
    assert (sat[..., 1].amin(1).abs() < 1e-12).all()
    for points_before, points_after in zip(xy, sat):
        hull = ConvexHull(points_before.numpy())
        centre = points_before.mean(0).numpy()
        nearest = min(-(hull.equations[:, :2] @ centre + hull.equations[:, 2]))
        height = points_after[:, 1].mean().item()
        assert nearest - 1e-9 < height < nearest + 0.03  # half a degree of 5 sigma


def test_a_perfect_net_has_true_points_and_the_energies_of_less_height():
    gamma = torch.tensor([0.1, 1.0]).double().repeat(20)
    test = lj.by_origin(points(40) / math.sqrt(2))
    skew = torch.rand(30, 30, generator=g("skew")).double().triu(1)
    d_hat = lj.distance_matrix(test) + skew - skew.mT + torch.eye(30)  # no matrix of distances
    found = lj.structure(d_hat, d_hat, test, gamma)
    ours, true, xy = found["reconstructed"], found["true"], found["true"]["tumbled"]
    assert torch.allclose(ours["aligned"], xy) and ours["planar"].min() > 1 - 1e-9
    fallen = gamma * (xy - ours["tumbled"])[..., 1].sum(1)
    assert torch.allclose(ours["energy"], true["energy"] - fallen)
    pairs = apart(xy)[:, *torch.triu_indices(30, 30, 1)]
    assert torch.equal(true["overlaps"], (pairs < 1).sum(1).double())
    wanted = torch.where(pairs >= 1, lj.lennard_jones(pairs**2), 0.0).sum(1)  # no near pairs
    assert torch.allclose(true["energy"], wanted + gamma * xy[..., 1].sum(1))


# --- statistics ---


def test_jensen_shannon_distance_is_scipys():
    from scipy.spatial.distance import jensenshannon

    x, y = torch.randn(2, 900, generator=g("n"))
    assert lj.jensen_shannon(x, 20 + y) == pytest.approx(math.sqrt(math.log(2)))
    a, b = torch.randint(20, (2, 9), generator=g())
    a[0], b[-1] = 5, 7  # the common bins reach from the first to the last value
    samples = [torch.arange(9.0).repeat_interleave(count) for count in (a, b)]
    assert lj.jensen_shannon(*samples, bins=9) == pytest.approx(jensenshannon(a, b), rel=1e-6)


def test_measures_of_codes_are_taken_where_they_were_not_fitted():
    gamma = torch.tensor(lj.GAMMAS).repeat(100)
    noise = torch.randn(400, 40, generator=g())
    chance = lj.finds_gamma(noise, gamma).mean().item()
    assert chance == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 200) ** 0.5)  # on itself: 0.43
    assert lj.finds_gamma(noise + 9 * gamma[:, None], gamma).mean() == 1
    assert abs(lj.r_squared(noise, noise[:, 0] + noise[:, 1]) - 1) < 1e-9
    y = noise[:, 0].clone()
    y[200:] += 3  # a bias in the second half alone
    assert lj.r_squared(noise, y) < -5


# --- verdicts ---


def test_verdicts_need_power_training_and_more_than_two_equal_nets_are_apart():
    for count, shift, verdict in ((20, 0.0, "open"), (5000, 0.0, "yes"), (5000, 0.5, "no")):
        xy = 10 * points(count, 1, "settled")  # U = gamma y, of deviation 10 / sqrt 12
        later = xy[:, 0, 1] + shift * 10 / 12**0.5
        assert lj.settled(1.0, xy, later)["verdict"] == verdict
    for error, verdict in ((0.3, "no"), (0.8, "no"), (1.05, "yes"), (3.0, "open")):
        error = error + 0.01 * torch.rand(100, generator=g())
        one = {"error": error, "trivial": torch.ones(100)}
        assert lj.fails("x", one, True)["verdict"] == verdict
    for last, verdict in ((0.5, "yes"), (0.9, "open"), (1.5, "no")):
        assert lj.falls("x", {5: 1.0, 40: last}, 0.1, True)["verdict"] == verdict
    assert lj.falls("x", {5: 1.0, 40: 0.5}, 0.1, False)["verdict"] == "open"


@pytest.mark.parametrize("latents, lambdas", [([40], [0.00035]), ([5, 80], [0.00035]),
                                              ([40], [lj.UNIT, 1e-9])])
def test_claims_stand_on_any_flags(latents, lambdas):
    models = lj.models_of(latents, lambdas)
    errors = {}
    for name, model in models.items():
        errors[name] = model.lam + 1 / model.latent  # lower with a larger D, a smaller lambda
    sizes, weights, _ = lj.claims_about_sweeps(errors, models, True)
    assert sizes["verdict"] == ("yes" if len(latents) == 2 else "open")
    assert weights["verdict"] in ("yes", "open")  # 1e-9 is no better than two equal nets are apart


# --- the run ---

SMOKE = ["--preset", "smoke", "--epochs", "2"]
EARNED = ("reproduced", "fitted", "better", "yes")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lj") / "run"
    return folder, lj.main([*SMOKE, "--out", str(folder)])


@pytest.fixture(scope="module")
def data(smoke):
    sets = {}
    for name in lj.fluids_of(0, 0, 0):
        sets[name] = common.load(smoke[0] / "units" / f"{name}.pt")["result"]["xy"]
    return lj.split(sets, 20, 0, "cpu")


def test_smoke_writes_everything(smoke):
    folder, report = smoke
    assert json.load(open(folder / "results.json")) == report and len(report["units"]) == 21
    assert len(list(folder.glob("fig_*.png"))) == 8
    closing, *others = report["tables"].values()
    assert {row["verdict"] for row in closing} == {"-"} and len(closing) > 25
    here = {row["claim"]: row for row in closing}
    assert float(here["JS distance of energies"]["here"]) > 0
    assert "±" not in here["zero is featureless (10 % of texture)"]["here"]
    epochs = {row["net"]: row["epochs"] for row in others[1]}
    assert epochs["distances-conv"] == epochs["grid-conv"] == epochs["distances-dense"] == 2
    assert epochs["distances-deep-conv"] == epochs["latent-5"] == 1 and epochs["grid, mean"] == ""
    assert max(map(len, here)) <= 42  # the printed table has less than 100 columns


def test_kill_and_continue_equals_an_undisturbed_run(smoke, monkeypatch):
    """A real kill -9 in the middle of the main net; then the same command."""
    shutil.copytree(smoke[0], "run")
    os.remove("run/results.json")
    os.remove(f"run/units/{lj.MAIN}.pt")
    killed("import vae_lj_fluid; vae_lj_fluid.main()", f"{lj.MAIN}.1.checkpoint", *SMOKE)
    monkeypatch.setattr(lj, "plot", lambda *rest: None)
    report = lj.main([*SMOKE, "--out", "run"])
    assert report["results"] == smoke[1]["results"] and report["tables"] == smoke[1]["tables"]
    assert open("run/metrics.csv").read() == (smoke[0] / "metrics.csv").read_text()


MODELS = lj.models_of([5], [0.0035])


def earned_rows(found, learned=()):
    """How many rows the closing table has, and those that it earns.

    learned: nets that err little, whatever was measured; all nets began with a larger error.
    """
    nets = dict(found["representations"])
    for name in learned:
        nets[name] = dict(nets[name], error=0.2 * nets[name]["trivial"])
    errors, before = {}, {}
    for name, model in MODELS.items():
        if model.input == model.output == "distances":
            before[name] = found["representations"][name]["error"].mean().item()
            errors[name] = nets[name]["error"].mean().item()
    log = torch.tensor([0.02, 0.1])
    found = dict(found, representations=nets)
    table = lj.claims(found, dict.fromkeys(lj.GAMMAS, 0.9), [], log, before, errors, MODELS)
    table = [row for row in table if row["claim"] != "the sets are settled"]
    return len(table), [row["claim"] for row in table if row["verdict"] in EARNED]


def test_null(data, monkeypatch):
    """Untrained nets and those that give the mean earn no row, and as controls none that
    compares two nets."""
    untrained, means = {}, {}
    for name, model in MODELS.items():
        untrained[name] = lj.build(name, model, 0).requires_grad_(False), model
        means[name] = constant(lj.represent(model.output, data.xy).mean(0), model.latent), model
    found = lj.measure(untrained, data, 0)
    for dead in (found, lj.measure(means, data, 0)):
        count, earned = earned_rows(dead)
        assert count > 25 and earned == []
    _, earned = earned_rows(found, learned=[lj.MAIN, lj.AGAIN])  # the other nets are dead
    compares = ("lower MSE", "Gram", "codes' neighbours", "grid", "coordinates", "distances-dense",
                "matrix", "deeper")
    assert earned and [claim for claim in earned if claim.startswith(compares)] == []
    monkeypatch.setattr(lj, "learned", lambda one: True)
    assert len(earned_rows(found)[1]) > 3  # this test sees a loosened verdict


def test_null_of_the_sampler():
    """A gas without interactions is accepted too often, and random points are not settled."""
    xy = torch.rand(500, 30, 2, generator=g()) * 10
    later = torch.randn(500, generator=g("later")).double()
    accepted, drifts = {}, []
    for gamma in lj.GAMMAS:
        _, share = lj.metropolis(gamma, 50, 20, torch.zeros_like, g())
        accepted[gamma] = share.item()
        drifts.append(lj.settled(gamma, xy, later))
    table = lj.claims_about_fluid(accepted, drifts)
    assert len(table) == 5 and [row for row in table if row["verdict"] in EARNED] == []


@pytest.mark.parametrize("argv", ["--gammas 0.1", "--configurations 19", "--lambdas 0"])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    assert argv.split()[0] in refused(lj.main, argv.split()) and os.listdir() == []


def test_the_copy_test():
    """The sampler with another pair energy, the VAE with its loss, the Gram matrix: each alone."""
    note = pasted("vae_lj_fluid", ["trial", "move", "share_accepted", "metropolis"],
                  "N, L, T, STEP = 12, 6.0, 0.75, 0.2")
    xy, accepted = note["metropolis"](1.0, 50, 50, lambda r2: 1 / (r2 + 0.1), g())
    d = apart(xy.permute(2, 1, 0))
    assert xy.shape == (2, 12, 50) and 0.3 < accepted < 0.99
    note = pasted("vae_lj_fluid", ["gram_coordinates"])
    assert torch.allclose(apart(note["gram_coordinates"](d)[0]).float(), d, atol=1e-3)
    note = pasted("vae_lj_fluid", ["VAE", "convolutions", "conv_vae", "kl_divergence", "vae_loss"])
    net, x = note["conv_vae"](12, 8), d[:, None] / SCALE
    loss, _, _ = note["vae_loss"](net, x, x, torch.randn(50, 8, generator=g()), 3e-4)
    loss.backward()
    assert net.encoder[0][0].weight.grad.abs().max() > 0
