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
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def g(name="test"):
    return common.generator(0, name)


def points(C=8, n=30, name="points"):
    return torch.rand(C, n, 2, generator=g(name), dtype=torch.double)


def apart(xy):
    return (xy[..., :, None, :] - xy[..., None, :, :]).norm(dim=-1)


def smirnov(x, law):
    """Kolmogorov-Smirnov statistic times sqrt n; above 2.3 with probability 5e-5 (4 sigma)."""
    x = x.sort().values.double()
    n, F = len(x), law(x)
    steps = torch.arange(n + 1, dtype=torch.double) / n
    return max((steps[1:] - F).max(), (F - steps[:-1]).max()).item() * math.sqrt(n)


# --- energies and moves ---


def test_pair_energies_have_their_known_minima_zeros_and_cut_off():
    r = torch.linspace(0.9, 3.2, 230_001, dtype=torch.double)
    for pair, at in ((lj.lennard_jones, 2 ** (1 / 6)), (lj.fake, math.sqrt(2))):
        U = pair(r**2)
        assert r[U.argmin()].item() == pytest.approx(at, abs=1e-5)
        assert U.min().item() == pytest.approx(-1, abs=1e-9)
        assert pair(torch.tensor([1.0])).item() == 0
        assert torch.isfinite(pair(torch.zeros(1))).all()
    ends = lj.lennard_jones(torch.tensor([3.0, 3.0001], dtype=torch.double) ** 2)
    assert ends[0].item() == pytest.approx(4 * (3**-12 - 3**-6)) and ends[1] == 0  # not shifted
    assert lj.fake(torch.tensor([100.0])).item() == pytest.approx(4 * (1e-4 - 1e-2))


def test_energy_of_a_triangle_is_known():
    xy = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]).T[..., None]  # 2, 4 and sqrt 20 apart
    inside = 4 * (2.0**-12 - 2.0**-6)
    assert lj.energy(xy, 0.5, lj.lennard_jones).item() == pytest.approx(inside + 0.5 * 4)
    far = [4 * (r**-4 - r**-2) for r in (2.0, 4.0, 20**0.5)]
    assert lj.energy(xy, 0.0, lj.fake).item() == pytest.approx(sum(far))


@pytest.mark.parametrize("pair", [lj.lennard_jones, lj.fake])
def test_a_move_is_accepted_where_the_full_energy_rises_by_less_than_the_budget(pair):
    lattice = torch.cartesian_prod(torch.arange(3), torch.arange(4)) * 1.4 + 0.5
    xy = (lattice + 0.7 * points(50, 12)).permute(2, 1, 0)  # (2, N, C)
    gamma = torch.linspace(0, 3, 50, dtype=torch.double)
    new, _ = lj.trial(xy, torch.rand(3, 12, 50, generator=g("u"), dtype=torch.double))
    others = 1 - torch.eye(12, dtype=torch.double)[..., None]
    for i in (0, 5, 11):
        after = xy.clone()
        after[:, i] = new[:, i]
        change = lj.energy(after, gamma, pair) - lj.energy(xy, gamma, pair)
        for budget, wanted in ((change + 1e-6, new), (change - 1e-6, xy)):
            got = lj.move(xy, xy[:, i], new[:, i], others[i], gamma, budget, pair)
            assert torch.equal(got, wanted[:, i])


def test_trials_stay_in_the_box_and_a_coordinate_that_leaves_is_dropped_alone():
    xy = torch.tensor([[0.05, 9.95, 5.0], [5.0, 0.1, 9.9]])[:, None]  # (2, 1, 3)
    u = torch.tensor([[0.0, 1.0, 0.25], [0.75, 0.0, 1.0], [0.5, 0.5, 0.5]])[:, None]
    new, budget = lj.trial(xy, u)
    wanted = torch.tensor([[0.05, 9.95, 4.9], [5.1, 0.1, 9.9]])  # x, both, and y dropped
    assert torch.allclose(new[:, 0], wanted) and torch.allclose(budget, -T * u[2].log())


# --- distributions ---


def test_one_particle_has_the_barometric_density(monkeypatch):
    L, gamma = 2.0, 1.5
    monkeypatch.setattr(lj, "N", 1), monkeypatch.setattr(lj, "L", L)
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
    monkeypatch.setattr(lj, "N", 2), monkeypatch.setattr(lj, "L", L)
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
    L, n, gamma, width, bins = 5.0, 5, 0.5, 1.0, 20
    monkeypatch.setattr(lj, "N", n), monkeypatch.setattr(lj, "L", L)
    xy, _ = lj.metropolis(gamma, 10_000, 1500, lj.lennard_jones, g(), bool(shutil.which("g++")))
    edge = torch.linspace(0, width, bins + 1, dtype=torch.double)
    powers = torch.arange(1, 5)
    area = (edge[1:, None] ** powers - edge[:-1, None] ** powers) / powers
    weight = torch.linalg.pinv(area)[0]  # of each bin, in the fitted density at the wall
    y = xy[1].T.double()  # (C, N)
    contact = 0
    for sign, height in ((1, y), (-1, L - y)):
        place = (height / width * bins).long()
        inside = place < bins
        contact = contact + sign * (weight[place.clamp(max=bins - 1)] * inside).sum(1)
    contact = T * contact
    assert contact.mean().item() == pytest.approx(
        n * gamma, abs=4 * contact.std().item() / 100)
    assert contact.std() / 100 < 0.1  # the test could see 20 % off


@needs_compiler
def test_the_fluid_is_that_of_a_plain_cpp_metropolis():
    """Energy, height and acceptance of 500 systems at gamma = 1 after 200 sweeps by both."""
    subprocess.run(["g++", "-O3", "-o", "plain", ROOT / "tests/metropolis.cpp"], check=True)
    out = subprocess.run(["./plain", "1.0", "500", "200", "1"], capture_output=True, text=True)
    plain = torch.tensor([[float(x) for x in line.split()] for line in out.stdout.splitlines()])
    xy, share = lj.metropolis(1.0, 500, 200, lj.lennard_jones, g())
    ours = lj.energy(xy, 1.0, lj.lennard_jones), xy[1].mean(0)  # (C,) each
    for theirs, values in zip(plain.T, ours):
        error = ((theirs.var() + values.var()) / 500).sqrt().item()
        assert values.mean().item() == pytest.approx(theirs.mean().item(), abs=4 * error)
    assert share.item() == pytest.approx(plain[:, 2].mean().item(), abs=0.01)


@needs_compiler
def test_compiled_and_eager_give_the_same_chains():
    gamma = torch.tensor([0.1, 1.0]).repeat(100)
    plain, _ = lj.metropolis(gamma, 200, 12, lj.lennard_jones, g())
    fast, _ = lj.metropolis(gamma, 200, 12, lj.lennard_jones, g(), compile=True)
    same = torch.isclose(plain, fast, atol=1e-4).all(0).all(0).double().mean().item()
    assert same > 0.98  # rounding may turn a decision, and with it one chain


def test_chunks_are_what_they_would_be_alone_and_chains_go_on(monkeypatch):
    monkeypatch.setattr(lj, "CHUNK", 5)
    whole = lj.sample("x", 0.4, 12, 7, lj.lennard_jones, 3, "cpu", False)
    alone = lj.sample("x", 0.4, 5, 7, lj.lennard_jones, 3, "cpu", False)
    assert whole["xy"].shape == (12, 30, 2) and torch.equal(whole["xy"][:5], alone["xy"])
    assert not torch.equal(whole["xy"][:5], whole["xy"][5:10]) and 0.3 < whole["acceptance"] < 1
    one, two = g(), g()
    straight, _ = lj.metropolis(0.4, 6, 9, lj.lennard_jones, one)
    half, _ = lj.metropolis(0.4, 6, 4, lj.lennard_jones, two)
    rest, _ = lj.metropolis(0.4, 6, 5, lj.lennard_jones, two, start=half)
    assert torch.equal(straight, rest)


# --- what the nets see ---


def test_distance_matrices_order_and_occupancy():
    xy = lj.by_origin(points())
    assert (xy.norm(dim=-1).diff(dim=1) >= 0).all()
    assert torch.allclose(xy.sum(1), points().sum(1))
    assert torch.allclose(lj.distance_matrix(xy)[:, 0], apart(xy))
    xy = torch.tensor([[[0.1, 0.1], [9.9, 0.3], [5.2, 7.6], [5.3, 7.7]]]) / SCALE
    assert lj.occupancy(xy)[0, 0].nonzero().tolist() == [[0, 0], [0, 19], [15, 10]]  # row: height


@pytest.mark.parametrize("reading", ["code", "slide"])
def test_corruption_moves_four_particles_as_it_says(reading):
    xy = lj.by_origin(points(500)) / math.sqrt(2)
    after, moved = lj.corrupt(xy, reading, g())
    assert (moved.sum(1) == 4).all() and torch.equal(after[~moved], xy[~moved])
    assert moved.double().mean(0).std() < 0.03  # any particle
    step = (after - xy)[moved]
    if reading == "code":
        assert smirnov(step.flatten(), lambda s: (s + 0.2) / 0.4) < 2.3
    else:
        assert smirnov(step.norm(dim=1), lambda r: r / 0.2) < 2.3
        assert smirnov(torch.atan2(*step.T), lambda a: (a + math.pi) / (2 * math.pi)) < 2.3


def test_blocks_are_black_symmetric_and_everywhere():
    d = lj.distance_matrix(points(2000)) + 1
    black, where = lj.black_out(d, 6, g())
    assert torch.equal(where, where.mT) and torch.equal(black == 0, where)
    assert torch.equal(black[~where], d[~where])
    count = where.flatten(1).sum(1)
    assert count.min() == 36 and count.max() == 72  # on the diagonal; off it, with its mirror image
    assert where.any(0).all()


# --- nets and objective ---


def test_the_main_net_has_the_documents_weights_of_its_own_seed():
    net = lj.build(lj.MAIN, lj.MODELS[lj.MAIN], 0)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.decoder)]
    assert sizes == [3_627_730, 1_895_151]
    bound = math.sqrt(6 / (9 * 60 + 9 * 50))  # Glorot's
    weight = net.encoder[0][2].weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    torch.manual_seed(1)  # no draw of the global generator is in it
    again = lj.build(lj.MAIN, lj.MODELS[lj.MAIN], 0)
    assert all(torch.equal(x, y) for x, y in zip(net.parameters(), again.parameters()))
    assert not torch.equal(lj.build(lj.AGAIN, lj.MODELS[lj.AGAIN], 0).encoder[0][2].weight, weight)
    names = set(lj.models_of([40, 5], [0.00035, 0.1234567, 0.1234568])) - set(lj.MODELS)
    assert names == {"latent-5", "lambda-0.1234567", "lambda-0.1234568"}


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
    for progress in (0.0, 0.25, 1.0):
        loss, error, kl = lj.grid_loss(net, x, eps, 0.5, progress)
        weighted = live ** (1 - progress) * x * x_hat.log() + (1 - x) * (1 - x_hat).log()
        assert error.item() == pytest.approx(-weighted.mean().item())
        assert loss.item() == pytest.approx((error + progress * 0.5 * kl).item())


def test_a_plain_autoencoder_draws_nothing_and_training_lowers_the_error():
    xy = lj.by_origin(points(640).float()) / math.sqrt(2)
    first = {}
    for lam in (0.0, lj.LAMBDA):
        model = lj.Model("dense", "coordinates", "coordinates", lam=lam)
        net = lj.build("net", model, 0)
        log, errors = lj.train("net", net, model, xy, xy, 3, 32, g())
        assert log.shape == (60, 2) and errors[2] < errors[0] < log[0, 0]
        first[lam] = log[0, 0].item()
    net = lj.build("net", model, 0)
    batch = xy[torch.randperm(640, generator=g())[:32]]
    plain = ((net.decoder(net.encoder(batch)[:, :40]) - batch) ** 2).mean().item()
    assert first[0.0] == pytest.approx(plain) and abs(first[lj.LAMBDA] - plain) > 1e-3 * plain


# --- geometry ---


def test_gram_matrix_gives_the_points_up_to_a_rigid_motion():
    from scipy.linalg import orthogonal_procrustes

    xy = 10 * points()
    d = apart(xy)
    found, planar = lj.gram_coordinates(d)
    assert torch.allclose(apart(found), d, atol=1e-9)
    assert torch.allclose(planar, torch.ones(8, dtype=torch.double))
    assert torch.allclose(lj.procrustes(found, xy), xy, atol=1e-9)
    noise = 0.3 * torch.randn(d.shape, generator=g(), dtype=torch.double).triu(1)
    assert (lj.gram_coordinates(d + noise + noise.mT)[1] < 0.99).all()
    other = points(1, name="other")[0]
    a, b = found[0] - found[0].mean(0), other - other.mean(0)
    best = a.numpy() @ orthogonal_procrustes(a, b)[0] + other.mean(0).numpy()
    assert torch.allclose(lj.procrustes(found[:1], other[None])[0], torch.as_tensor(best))


def test_the_tumbler_keeps_distances_and_sits_on_the_side_nearest_to_the_centre_of_mass():
    from scipy.spatial import ConvexHull

    xy = 10 * points(30)
    sat = lj.turbo_tumbler(xy)
    assert torch.allclose(apart(sat), apart(xy), atol=1e-9)
    before, after = (torch.linalg.det(x[:, 1:3] - x[:, :1]) for x in (xy, sat))
    assert torch.allclose(before, after)  # turned, not mirrored
    assert (sat[..., 1].amin(1).abs() < 1e-12).all()
    assert torch.allclose(sat[..., 0].amax(1) + sat[..., 0].amin(1), torch.tensor(10.0).double())
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
    near = (apart(xy) < 1).sum((1, 2)) - 30
    assert torch.equal(true["overlaps"], near / 2) and near.sum() > 0
    pairs = apart(xy)[:, *torch.triu_indices(30, 30, 1)]
    wanted = torch.where(pairs >= 1, lj.lennard_jones(pairs**2), 0.0).sum(1)  # no near pairs
    assert torch.allclose(true["energy"], wanted + gamma * xy[..., 1].sum(1))


# --- statistics ---


def test_jensen_shannon_distance():
    from scipy.spatial.distance import jensenshannon

    x, y = torch.randn(2, 20_000, generator=g("n"))
    assert lj.jensen_shannon(x, x) == 0
    assert lj.jensen_shannon(x, 20 + y[:900]) == pytest.approx(math.sqrt(math.log(2)))
    a, b = torch.randint(20, (2, 9), generator=g())
    a[0], b[-1] = 5, 7  # the common bins reach from the first to the last value
    samples = [torch.arange(9.0).repeat_interleave(count) for count in (a, b)]
    assert lj.jensen_shannon(*samples, bins=9) == pytest.approx(jensenshannon(a, b), rel=1e-6)


def test_codes_by_gamma():
    mu, gamma = torch.tensor([[0.0], [2.0], [9.0], [11.0]]), torch.tensor([0.1, 0.1, 1.0, 1.0])
    means = lj.mean_codes(mu, gamma)
    assert means.tolist() == [[1], [10]]
    assert lj.spread(mu, gamma).tolist() == [1, 1, 1, 1]
    assert lj.same_neighbour(mu, gamma).tolist() == [1, 1, 1, 1]
    assert lj.same_neighbour(mu, torch.tensor([0.1, 1.0, 1.0, 0.1])).tolist() == [0, 0, 0, 0]
    near = lj.nearest_gamma(torch.tensor([[5.0], [6.0]]), means, gamma.unique())
    assert torch.equal(near, gamma.unique())
    for wanted, verdict in (([0.1, 1.0], "yes"), ([0.1], "no"), ([0.7], "no")):
        assert lj.most("x", near.repeat(50), wanted, True)["verdict"] == verdict


def test_pca_is_the_best_linear_net():
    x = torch.randn(5000, 3, generator=g(), dtype=torch.double) * torch.tensor([3.0, 2.0, 1.0]) + 1
    _, _, shares = lj.pca(x, 2)
    values = torch.linalg.svdvals(x - x.mean(0)) ** 2
    assert torch.allclose(shares, values[:2] / values.sum())
    error = (lj.pca_reconstruct(x, x, 2) - x).square().sum()
    assert error.item() == pytest.approx(values[2].item())


class Half(torch.nn.Module):
    """A net whose codes are the entries of 30 x 30 matrices, and come back halved."""

    encoder = staticmethod(lambda x: torch.cat([x.flatten(1), torch.zeros(len(x), 900)], 1))
    decoder = staticmethod(lambda z: z.view(-1, 1, 30, 30) / 2)


def test_damage_and_probe_of_a_net_that_halves_everything():
    test = lj.by_origin(points(60).float()) / math.sqrt(2)
    d = lj.distance_matrix(test)
    found = lj.evaluate_corruption(Half(), d.mean(0), test, d / 2, "code", g("c"))
    bad = lj.distance_matrix(lj.corrupt(test, "code", g("c"))[0])
    rises = (bad**2).mean((1, 2, 3)) > (d**2).mean((1, 2, 3))
    assert torch.equal(found["rises"], rises) and 0 < rises.sum() < 60
    assert (found["shift"] == 0).all()  # this net moves touched entries alone
    square = ((bad - d) / 2).square().sum((1, 2, 3))  # of 4 * 29 + 4 * 26 pairs, in order
    assert torch.allclose(found["touched"], SCALE * (square / 220).sqrt(), rtol=1e-4)
    mean = (d + 1).mean(0)
    found = lj.evaluate_missing(Half(), mean, d + 1, 30, g())  # all is black
    for key, guess in (("restored", 0 * d), ("filled", mean / 2), ("mean", mean)):
        wanted = SCALE * (guess - d - 1).square().mean((1, 2, 3)).sqrt()
        assert torch.allclose(found[key], wanted, rtol=1e-4), key
    kl = torch.zeros(900)
    kl[[31, 2, 700, 62, 5]] = torch.tensor([5.0, 4, 3, 2, 1])
    found = lj.probe(Half().decoder, kl, g())
    assert found["top"] == [31, 2, 700, 62, 5] and found["cosines"].tolist() == [0] * 10
    assert found["along"][0, :, 1, 1].tolist() == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5]
    assert found["along"].abs().sum().item() == 5 * 6
    assert (found["draws"].flatten(1)[:, found["top"]] != 0).all()
    stripes = torch.arange(6.0).expand(1, 1, 6, 6) * 0.5 + 9 * torch.eye(6)  # it is left out
    assert lj.texture(stripes).item() == pytest.approx(0.5)


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
        assert lj.fails("x", one, False)["verdict"] != "yes"
    for last, verdict in ((0.5, "yes"), (0.9, "open"), (1.5, "no")):
        assert lj.falls("x", {5: 1.0, 40: last}, 0.1, True)["verdict"] == verdict
    assert lj.falls("x", {5: 1.0, 40: 0.5}, 0.1, False)["verdict"] == "open"


# --- the run ---

SMOKE = ["--preset", "smoke", "--epochs", "1"]
EARNED = ("reproduced", "fitted", "better", "yes")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lj") / "run"
    return folder, lj.main([*SMOKE, "--out", str(folder)])


def unit(smoke, name):
    return torch.load(smoke[0] / "units" / f"{name}.pt", weights_only=True)["result"]


@pytest.fixture(scope="module")
def data(smoke):
    names = [f"fluid-{value:g}" for value in lj.GAMMAS] + ["unseen", "fake"]
    return lj.split({name: unit(smoke, name)["xy"] for name in names}, 40, 0, "cpu")


def test_smoke_writes_everything(smoke, data):
    assert len(data.xy) == 160 and len(data.test) == 40
    folder, report = smoke
    figures = "equilibrium matrices representations structure latent anomalies damage probe"
    assert {path.name for path in folder.glob("[!.]*.*")} == {
        *("config.json", "results.json", "metrics.csv", "table.md"),
        *(f"fig_{name}.png" for name in figures.split())}
    assert json.load(open(folder / "results.json")) == report
    closing, *others = report["tables"].values()
    assert {row["verdict"] for row in closing} == {"-"} and len(closing) > 25 and len(others) == 9
    lines = (folder / "table.md").read_text().splitlines()[3:]
    assert all(len(line) < 106 for line in lines), max(lines, key=len)


def test_kill_and_continue_equals_an_undisturbed_run(smoke, monkeypatch):
    """A real kill -9 in the middle of a net, an error in that of the long run; then the same."""
    shutil.copytree(smoke[0], "run")
    os.remove("run/results.json")
    os.remove(f"run/units/{lj.MAIN}.pt")
    killed("import vae_lj_fluid; vae_lj_fluid.main()", f"{lj.MAIN}.1.checkpoint", *SMOKE)
    os.remove("run/units/long.pt")
    three = iter([lj.metropolis] * 3)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(common, "EVERY", 0)
        patch.setattr(lj, "metropolis", lambda *rest: next(three)(*rest))
        lj.main([*SMOKE, "--out", "run"])
    assert os.path.exists("run/units/long.1.checkpoint")
    monkeypatch.setattr(lj, "plot", lambda *rest: None)
    report = lj.main([*SMOKE, "--out", "run"])
    assert report["results"] == smoke[1]["results"] and report["tables"] == smoke[1]["tables"]
    assert open("run/metrics.csv").read() == (smoke[0] / "metrics.csv").read_text()


def nets_of(models, dead=None):
    """Untrained nets {name: (net, model)}, or others in their place."""
    nets = {}
    for name, model in models.items():
        net = lj.build(name, model, 0)
        if dead is not None:
            net = dead(model)
        nets[name] = net.requires_grad_(False), model
    return nets


MODELS = lj.models_of([5], [0.0035])


@pytest.fixture(scope="module")
def untrained(data):
    return lj.measure(nets_of(MODELS), data, 0)


def earned_rows(found, learned=()):
    """How many rows the closing table has, and those that it earns; of a quick run.

    learned: nets that err little, whatever was measured.
    """
    errors, nets = {}, dict(found["representations"])
    for name in learned:
        nets[name] = dict(nets[name], error=0.2 * nets[name]["trivial"])
    trivial = nets[lj.MAIN]["trivial"].mean().item()
    for name, model in MODELS.items():
        if model.input == model.output == "distances":
            errors[name] = nets[name]["error"].mean().item()
            if learned and name not in learned:
                errors[name] = 7 * trivial  # of untrained nets in settled fluids
    log = torch.tensor([2 * trivial, 0.1])
    found = dict(found, representations=nets)
    table = lj.claims(found, dict.fromkeys(lj.GAMMAS, 0.9), [], log, errors, MODELS)
    table = [row for row in table if row["claim"] != "the sets are settled"]
    return len(table), [row["claim"] for row in table if row["verdict"] in EARNED]


class Mean(torch.nn.Module):
    """A net that gives the mean of what it was made for, whatever it sees."""

    def __init__(self, mean, latent):
        super().__init__()
        self.mean, self.latent = mean, latent

    def encoder(self, x):
        return 0.1 * x.flatten(1)[:, :1].expand(-1, 2 * self.latent)

    def decoder(self, z):
        return self.mean.expand(len(z), *self.mean.shape)


def test_null(untrained, data, monkeypatch):
    """Untrained nets and those that give the mean earn no row, and as controls none that
    compares two nets."""
    def mean(model):
        return Mean(lj.represent(model.output, data.xy).mean(0), model.latent)

    for found in (untrained, lj.measure(nets_of(MODELS, mean), data, 0)):
        count, earned = earned_rows(found)
        assert count > 25 and earned == []
    _, earned = earned_rows(untrained, learned=[lj.MAIN, lj.AGAIN])  # the other nets are dead
    compares = ("MSE falls", "Gram", "codes' neighbours", "grid", "coordinates", "distances-dense",
                "matrix", "deeper")
    assert earned and [claim for claim in earned if claim.startswith(compares)] == []
    monkeypatch.setattr(lj, "learned", lambda one: True)
    assert len(earned_rows(untrained)[1]) > 3  # this test sees a loosened verdict


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


@pytest.mark.parametrize("argv", ["--gammas 0.1", "--configurations 19", "--latents",
                                  "--lambdas 0"])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    assert argv.split()[0] in refused(lj.main, argv.split()) and os.listdir() == []


def test_the_copy_test():
    """The sampler, the convolutional VAE with its loss and the Gram matrix, pasted alone, run."""
    note = pasted("vae_lj_fluid", ["lennard_jones", "trial", "move", "share_accepted",
                                   "metropolis", "VAE", "convolutions", "conv_vae",
                                   "kl_divergence", "vae_loss", "gram_coordinates"],
                  "N, L, T, STEP, CUTOFF, CORE = 12, 6.0, 0.75, 0.2, 3.0, 1e-3")
    xy, accepted = note["metropolis"](1.0, 50, 50, note["lennard_jones"], g())
    d = apart(xy.permute(2, 1, 0))
    found, _ = note["gram_coordinates"](d)
    assert 0.3 < accepted < 0.9 and torch.allclose(apart(found).float(), d, atol=1e-3)
    net, x = note["conv_vae"](12, 8), d[:, None] / SCALE
    loss, _, _ = note["vae_loss"](net, x, x, torch.randn(50, 8, generator=g()), 3e-4)
    loss.backward()
    assert net.encoder[0][0].weight.grad.abs().max() > 0
