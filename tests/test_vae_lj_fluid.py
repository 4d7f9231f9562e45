"""vae_lj_fluid.py: the sampler against exact laws, the measures, the null test, and the run as a
user sees it."""

import ast
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import common
import vae_lj_fluid as lj
from conftest import ROOT, environment

T, SCALE = 0.75, 10 * math.sqrt(2)
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def g(name="test"):
    return common.generator(0, name)


def points(C=8, n=30, name="points"):
    return torch.rand(C, n, 2, generator=g(name), dtype=torch.double)


def apart(xy):
    return (xy[..., :, None, :] - xy[..., None, :, :]).norm(dim=-1)


def turned(xy, angle):
    c, s = math.cos(angle), math.sin(angle)
    return xy @ torch.tensor([[c, s], [-s, c]], dtype=torch.double)


def smirnov(x, law):
    """Kolmogorov-Smirnov statistic times sqrt n; above 1.95 with probability 0.001."""
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
    ends = lj.lennard_jones(torch.tensor([3.0, 3.0001], dtype=torch.double) ** 2)
    assert ends[0].item() == pytest.approx(4 * (3**-12 - 3**-6)) and ends[1] == 0  # not shifted
    assert lj.fake(torch.tensor([100.0])).item() == pytest.approx(4 * (1e-4 - 1e-2))
    assert torch.isfinite(lj.lennard_jones(torch.zeros(1))).all()


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
    u = torch.rand(3, 40, 1000, generator=g())
    new, _ = lj.trial(10 * torch.rand(2, 40, 1000, generator=g("x")), u)
    assert (new > 0).all() and (new < 10).all()


# --- distributions ---


def test_one_particle_has_the_barometric_density(monkeypatch):
    L, gamma = 2.0, 1.5
    monkeypatch.setattr(lj, "N", 1), monkeypatch.setattr(lj, "L", L)
    xy, accepted = lj.metropolis(gamma, 4000, 1200, lj.lennard_jones, g())
    x, y = xy[:, 0]
    scale = T / gamma
    total = 1 - math.exp(-L / scale)
    assert smirnov(y, lambda y: (1 - torch.exp(-y / scale)) / total) < 1.95
    assert smirnov(x, lambda x: x / L) < 1.95
    assert 0.85 < accepted < 1  # only moves up by 0.2 at most cost energy


@pytest.mark.parametrize("pair", [lj.lennard_jones, lj.fake])
def test_two_particles_have_the_energy_of_the_boltzmann_weight(pair, monkeypatch):
    """Mean energy and share of close pairs against quadrature over the distances dx, dy."""
    L, gamma, C = 2.5, 1.0, 4000
    monkeypatch.setattr(lj, "N", 2), monkeypatch.setattr(lj, "L", L)
    xy, _ = lj.metropolis(gamma, C, 1000, pair, g(pair.__name__))
    grid = (torch.arange(300, dtype=torch.double) + 0.5) / 300 * L
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
def test_the_fluid_has_the_energy_of_a_plain_cpp_metropolis():
    """2,500 sweeps of 200 systems at gamma = 1 by both, and the acceptance of the authors'."""
    subprocess.run(["g++", "-O3", "-o", "plain", ROOT / "tests/metropolis.cpp"], check=True)
    out = subprocess.run(["./plain", "1.0", "200", "2500", "1"], capture_output=True, text=True)
    plain = torch.tensor([[float(x) for x in line.split()] for line in out.stdout.splitlines()])
    U, height, accepted = plain.T
    xy, share = lj.metropolis(1.0, 200, 2500, lj.lennard_jones, g(), compile=True)
    ours = lj.energy(xy, 1.0, lj.lennard_jones)
    error = (U.var() / 200 + ours.var() / 200).sqrt().item()
    assert ours.mean().item() == pytest.approx(U.mean().item(), abs=3 * error)
    assert xy[1].mean().item() == pytest.approx(height.mean().item(), abs=0.04)
    assert share.item() == pytest.approx(accepted.mean().item(), abs=0.005)
    assert share.item() == pytest.approx(lj.ACCEPTANCE[1.0], abs=0.005)


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


def test_a_broken_compiler_is_one_note(monkeypatch, capsys):
    def broken(*rest, **more):
        raise RuntimeError("first line\nno compiler here\n")

    monkeypatch.setattr(torch, "compile", broken)
    lj.can_compile.cache_clear()
    assert not lj.can_compile() and not lj.can_compile()
    lj.can_compile.cache_clear()
    assert capsys.readouterr().err.count("\n") == 1


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
    step = (after - xy)[moved]
    if reading == "code":
        assert step.abs().max() <= 0.2 and step.abs().max() > 0.195
        assert step.std().item() == pytest.approx(0.4 / 12**0.5, rel=0.03)
    else:
        assert smirnov(step.norm(dim=1), lambda r: r / 0.2) < 1.95
        assert smirnov(torch.atan2(*step.T), lambda a: (a + math.pi) / (2 * math.pi)) < 1.95
    assert moved.double().mean(0).std() < 0.03  # any particle


def test_blocks_are_black_symmetric_and_everywhere():
    d = lj.distance_matrix(points(4000)) + 1
    black, where = lj.black_out(d, 6, g())
    assert torch.equal(where, where.mT) and torch.equal(black == 0, where)
    assert torch.equal(black[~where], d[~where])
    count = where.flatten(1).sum(1)
    assert count.min() == 36 and count.max() == 72  # on the diagonal; off it, with its mirror image
    assert where.any(0).all()


# --- nets and objective ---


def test_the_main_net_has_the_documents_weights():
    net = lj.build(lj.MAIN, lj.MODELS[lj.MAIN], 0)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (net.encoder, net.decoder)]
    assert sizes == [3_627_730, 1_895_151]
    bound = math.sqrt(6 / (9 * 60 + 9 * 50))  # Glorot's
    weight = net.encoder[0][2].weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("name", lj.MODELS)
def test_every_net_has_shapes_and_draws_nothing_from_the_global_generator(name):
    model = lj.MODELS[name]
    torch.manual_seed(1)
    a = lj.build(name, model, 0)
    torch.manual_seed(2)
    b = lj.build(name, model, 0)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    xy = points(3).float() / math.sqrt(2)
    x_hat = lj.reconstruct(a, model, xy)
    _, mu, kl = lj.evaluate(a, lj.represent(model.input, xy))
    assert x_hat.shape == lj.represent(model.output, xy).shape
    assert mu.shape == kl.shape == (3, model.latent) and ((x_hat > 0) & (x_hat < 1)).all()


def test_losses():
    net = lj.dense_vae((1, 6, 6), 5).double()
    x, eps = lj.distance_matrix(points(9, 6)), torch.randn(9, 5, generator=g(), dtype=torch.double)
    mu, logvar = net.encoder(x).chunk(2, 1)
    q = Normal(mu, (logvar / 2).exp())
    kl = kl_divergence(q, Normal(0.0, 1.0)).mean()
    x_hat = net.decoder(mu + eps * q.scale)
    loss = lj.vae_loss(net, x, x, eps, 0.01)
    assert torch.allclose(torch.stack(loss), torch.stack(
        [((x_hat - x) ** 2).mean() + 0.01 * kl, ((x_hat - x) ** 2).mean(), kl]))
    x = (x > 0.5).double()
    live = 1 / x.mean() - 1
    x_hat = net.decoder(net.encoder(x)[:, :5] + eps * (net.encoder(x)[:, 5:] / 2).exp())
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
    xy = 10 * points()
    d = apart(xy)
    found, planar = lj.gram_coordinates(d)
    assert torch.allclose(apart(found), d, atol=1e-9)
    assert torch.allclose(planar, torch.ones(8, dtype=torch.double))
    assert torch.allclose(lj.procrustes(found, xy), xy, atol=1e-9)
    noise = 0.3 * torch.randn(d.shape, generator=g(), dtype=torch.double).triu(1)
    assert (lj.gram_coordinates(d + noise + noise.mT)[1] < 0.99).all()


def test_procrustes_is_the_best_of_all_rigid_motions():
    a, b = points(3, 6, "a"), points(3, 6, "b")
    best = ((lj.procrustes(a, b) - b) ** 2).sum((1, 2))
    a, goal = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    for mirror in (1.0, -1.0):
        for angle in torch.linspace(0, 2 * math.pi, 721, dtype=torch.double).tolist():
            rotated = turned(a, angle) * torch.tensor([1.0, mirror])
            assert (((rotated - goal) ** 2).sum((1, 2)) > best - 1e-9).all()


def test_the_tumbler_keeps_distances_and_sits_on_the_side_nearest_to_the_centre_of_mass():
    from scipy.spatial import ConvexHull

    xy = turned(10 * points(30), 0.7)
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
    assert lj.js_distances(found)[0] == lj.js_distances(found)[1]
    near = (apart(xy) < 1).sum((1, 2)) - 30
    assert torch.equal(true["overlaps"], near / 2) and near.sum() > 0
    pairs = apart(xy)[:, *torch.triu_indices(30, 30, 1)]
    wanted = torch.where(pairs >= 1, lj.lennard_jones(pairs**2), 0.0).sum(1)  # no near pairs
    assert torch.allclose(true["energy"], wanted + gamma * xy[..., 1].sum(1))


def test_pair_correlation():
    """1 for independent points; a lattice of 1.2, shifted as a whole, has its peak there."""
    _, flat = lj.pair_correlation(10 * points(4000))
    assert torch.allclose(flat[15:], torch.ones(45), atol=0.05)
    lattice = torch.cartesian_prod(torch.arange(5), torch.arange(6)) * 1.2
    r, peaked = lj.pair_correlation(lattice + 3 * points(2000, 1))
    assert r[peaked.argmax()].item() == pytest.approx(1.2, abs=0.03) and peaked.max() > 3


# --- statistics ---


def test_jensen_shannon_distance():
    from scipy.spatial.distance import jensenshannon

    x, y = torch.randn(2, 20_000, generator=g("n"))
    assert lj.jensen_shannon(x, x) == 0 and lj.jensen_shannon(x, y) < 0.05
    assert lj.jensen_shannon(x, 20 + y[:900]) == pytest.approx(math.sqrt(math.log(2)))
    a, b = torch.randint(20, (2, 9), generator=g())
    a[0], b[-1] = 5, 7  # the common bins reach from the first to the last value
    samples = [torch.arange(9.0).repeat_interleave(count) for count in (a, b)]
    assert lj.jensen_shannon(*samples, bins=9) == pytest.approx(jensenshannon(a, b), rel=1e-6)


def test_neighbours_and_spread():
    mu = torch.cat([torch.arange(300.0), 1000 + torch.arange(300.0)])[:, None]
    gamma = torch.tensor([0.1, 1.0]).repeat_interleave(300)
    assert lj.same_neighbour(mu, gamma).mean() == 1
    assert lj.same_neighbour(mu, torch.tensor([0.1, 1.0]).repeat(300)).mean() == 0
    wanted = (torch.arange(300.0) - 149.5).abs().repeat(2)
    assert torch.equal(lj.spread(mu, gamma), wanted)


def test_auroc_and_nearest_gamma():
    a, b = torch.randn(300, generator=g("a")), torch.randn(200, generator=g("b")) + 0.7
    assert lj.auroc(a, b) == pytest.approx((b[:, None] > a).double().mean().item(), abs=1e-6)
    assert lj.auroc(a, a) == pytest.approx(0.5) and lj.auroc(a * 0, b * 0) == 0.5
    mu, gamma = torch.tensor([[0.0], [2.0], [9.0], [11.0]]), torch.tensor([0.1, 0.1, 1.0, 1.0])
    means = lj.mean_codes(mu, gamma)
    assert means.tolist() == [[1], [10]]
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


def test_r_squared_of_a_linear_law_and_of_nothing():
    codes = torch.randn(4000, 5, generator=g())
    y = 3 + codes @ torch.arange(5.0)
    noise = torch.randn(4000, generator=g("n"))
    assert lj.r_squared(codes, y) == pytest.approx(1) and abs(lj.r_squared(codes, noise)) < 0.02
    noisy = lj.r_squared(codes, y + noise * 30**0.5)  # 0 + 1 + 4 + 9 + 16
    assert noisy == pytest.approx(0.5, abs=0.05)


class Half(torch.nn.Module):
    """A net whose codes are the entries of 30 x 30 matrices, and come back halved."""

    encoder = staticmethod(lambda x: torch.cat([x.flatten(1), torch.zeros(len(x), 900)], 1))
    decoder = staticmethod(lambda z: z.view(-1, 1, 30, 30) / 2)


def test_corruption_of_a_net_that_halves_everything():
    test = lj.by_origin(points(60).float()) / math.sqrt(2)
    d = lj.distance_matrix(test)
    found = lj.evaluate_corruption(Half(), d.mean(0), test, d / 2, "code", g("c"))
    xy, moved = lj.corrupt(test, "code", g("c"))
    bad = lj.distance_matrix(xy)
    rises = (bad**2).mean((1, 2, 3)) > (d**2).mean((1, 2, 3))
    assert torch.equal(found["rises"], rises) and 0 < rises.sum() < 60
    assert (found["shift"] == 0).all()  # this net moves touched entries alone
    square = ((bad - d) / 2).square().sum((1, 2, 3))  # of 4 * 29 + 4 * 26 pairs, in order
    assert torch.allclose(found["touched"], SCALE * (square / 220).sqrt(), rtol=1e-4)


def test_missing_data_of_a_net_that_halves_everything():
    d = lj.distance_matrix(points(50).float()) + 1
    mean = d.mean(0)
    found = lj.evaluate_missing(Half(), mean, d, 30, g())  # all is black
    for key, guess in (("restored", 0 * d), ("filled", mean / 2), ("mean", mean)):
        wanted = SCALE * (guess - d).square().mean((1, 2, 3)).sqrt()
        assert torch.allclose(found[key], wanted, rtol=1e-4), key


def test_probe_and_texture_of_a_net_that_halves_everything():
    kl = torch.zeros(900)
    kl[[31, 2, 700, 62, 5]] = torch.tensor([5.0, 4, 3, 2, 1])
    found = lj.probe(Half().decoder, kl, g())
    assert found["top"] == [31, 2, 700, 62, 5] and found["cosines"].tolist() == [0] * 10
    assert found["along"][0, :, 1, 1].tolist() == [-1.5, -1, -0.5, 0, 0.5, 1, 1.5]
    assert found["along"].abs().sum().item() == 5 * 6
    draws = found["draws"].flatten(1)
    assert (draws[:, [31, 2, 700, 62, 5]] != 0).all() and (draws != 0).sum() == 1000
    stripes = torch.arange(6.0).expand(1, 1, 6, 6) * 0.5
    assert lj.texture(stripes).item() == pytest.approx(0.5)
    assert lj.texture(torch.zeros(1, 1, 6, 6) + 9 * torch.eye(6)) == 0  # the diagonal is none


# --- verdicts ---


def test_settled_needs_power():
    """Equal energies of few chains are open, of many settled; a drift of half a deviation is not.
    """
    for count, shift, verdict in ((20, 0.0, "open"), (5000, 0.0, "yes"), (5000, 0.5, "no")):
        xy = 10 * points(count, 1, "settled")  # U = gamma y, of deviation 10 / sqrt 12
        later = xy[:, 0, 1] + shift * 10 / 12**0.5
        assert lj.settled(1.0, xy, later)["verdict"] == verdict


def test_fails_is_open_for_a_net_that_was_not_trained():
    trivial = torch.ones(100)
    for error, verdict in ((0.3, "no"), (0.8, "no"), (1.05, "yes"), (3.0, "open")):
        one = {"error": error + 0.01 * torch.rand(100, generator=g()), "trivial": trivial}
        assert lj.fails("x", one, True)["verdict"] == verdict
        assert lj.fails("x", one, False)["verdict"] != "yes"


def test_sweeps_are_open_within_what_two_equal_nets_are_apart():
    for last, apart, verdict in ((0.5, 0.1, "yes"), (0.9, 0.1, "open"), (1.5, 0.1, "no")):
        assert lj.falls("x", {5: 1.0, 40: last}, apart, True)["verdict"] == verdict
    assert lj.falls("x", {5: 1.0, 40: 0.5}, 0.1, False)["verdict"] == "open"


# --- the run ---

SMOKE = ["--preset", "smoke", "--out", "run"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lj") / "run"
    return folder, lj.main(["--preset", "smoke", "--out", str(folder)])


def test_smoke_writes_everything(smoke):
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


def trained(smoke, names=lj.MODELS):
    """{name: (net, model)} with the smoke run's weights, for `names`; others untrained."""
    nets = {}
    for name, model in lj.models_of([5], [0.0035]).items():
        net = lj.build(name, model, 0)
        if name in names:
            path = smoke[0] / "units" / f"{name}.pt"
            net.load_state_dict(torch.load(path, weights_only=True)["result"]["weights"])
        nets[name] = net.requires_grad_(False), model
    return nets


def data_of(smoke):
    sets = {path.stem: torch.load(path, weights_only=True)["result"].get("xy")
            for path in (smoke[0] / "units").glob("*.pt")}
    return lj.split(sets, 40, 0, "cpu"), sets


def test_weights_and_sets_reload_and_give_the_measured_numbers(smoke):
    data, sets = data_of(smoke)
    assert len(data.xy) == 160 and len(data.test) == 40
    assert 0 <= sets["fluid-0.1"].min() and sets["fluid-0.1"].max() <= 10
    net, model = trained(smoke)[lj.MAIN]
    x_hat, *_ = lj.evaluate(net, lj.distance_matrix(data.test))
    log = torch.load(smoke[0] / "units" / f"{lj.MAIN}.pt", weights_only=True)["result"]["test"]
    error = lj.squared_error(x_hat, lj.distance_matrix(data.test)).mean().item()
    assert error == pytest.approx(log[-1].item(), rel=1e-4)


EARNED = ("reproduced", "fitted", "better", "yes")


def closing_rows(nets, data):
    """The closing table of a quick run with such nets."""
    found = lj.measure(nets, data, 0)
    trivial = found["representations"][lj.MAIN]["trivial"].mean().item()
    errors = {}
    for name, (_, model) in nets.items():
        if model.input == model.output == "distances":
            errors[name] = found["representations"][name]["error"].mean().item()
    log, models = torch.tensor([2 * trivial, 0.1]), lj.models_of([5], [0.0035])
    return lj.claims(found, dict.fromkeys(lj.GAMMAS, 0.9), [], log, errors, models)


class Mean(torch.nn.Module):
    """A net that gives the mean of what it was made for, whatever it sees."""

    def __init__(self, mean, latent):
        super().__init__()
        self.mean, self.latent = mean, latent

    def encoder(self, x):
        return 0.1 * x.flatten(1)[:, :1].expand(-1, 2 * self.latent)

    def decoder(self, z):
        return self.mean.expand(len(z), *self.mean.shape)


@pytest.mark.parametrize("dead", ["untrained", "mean"])
def test_null(dead, smoke):
    """Nets that were never trained, and nets that give the mean, earn no row."""
    data, _ = data_of(smoke)
    nets = trained(smoke, [])
    if dead == "mean":
        for name, (_, model) in nets.items():
            nets[name] = Mean(lj.represent(model.output, data.xy).mean(0), model.latent), model
    table = [row for row in closing_rows(nets, data) if row["claim"] != "the sets are settled"]
    assert len(table) > 25 and [row for row in table if row["verdict"] in EARNED] == []


def test_null_test_sees_a_loosened_verdict(smoke, monkeypatch):
    monkeypatch.setattr(lj, "learned", lambda one: True)
    data, _ = data_of(smoke)
    table = closing_rows(trained(smoke, []), data)
    assert len([row for row in table if row["verdict"] in EARNED]) > 3


def test_dead_controls_earn_nothing_for_a_main_net_that_has_learned(smoke):
    """Rows that compare two nets, of a main net that errs little and others untrained."""
    data, _ = data_of(smoke)
    found = lj.measure(trained(smoke, []), data, 0)
    for name in (lj.MAIN, lj.AGAIN):
        one = found["representations"][name]
        one["error"] = 0.2 * one["trivial"]
    trivial = one["trivial"].mean().item()
    models = lj.models_of([5], [0.0035])
    errors = {name: 7 * trivial for name, model in models.items()
              if model.input == model.output == "distances"}
    errors[lj.MAIN] = errors[lj.AGAIN] = 0.2 * trivial
    table = lj.claims(found, dict.fromkeys(lj.GAMMAS, 0.9), [], torch.ones(2), errors, models)
    compares = ("MSE falls", "Gram", "codes' neighbours", "grid", "coordinates", "distances-dense",
                "matrix", "deeper")
    rows = [row for row in table if row["claim"].startswith(compares)]
    assert len(rows) == 10 and [row for row in rows if row["verdict"] in EARNED] == []


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


@pytest.mark.parametrize("part", ["long.1.checkpoint", "distances-conv.1.checkpoint"])
def test_kill_and_continue_equals_an_undisturbed_run(part, smoke, killed_and_continued):
    """A real kill -9 in the middle of a unit, then the same command again."""
    assert "reused fluid-0.1" in killed_and_continued("vae_lj_fluid", part)
    report = json.load(open("run/results.json"))
    assert report["results"] == smoke[1]["results"] and report["tables"] == smoke[1]["tables"]
    assert open("run/metrics.csv").read() == (smoke[0] / "metrics.csv").read_text()


def test_a_second_command_keeps_what_the_first_left(smoke, refused, tmp_path, monkeypatch):
    """Near lambdas are two nets, and earlier ones stay in the tables."""
    shutil.copytree(smoke[0], tmp_path / "run")
    assert "--out" in refused(lj.main, [*SMOKE, "--epochs", "1"])
    monkeypatch.setattr(lj, "plot", lambda *rest: None)
    report = lj.main([*SMOKE, "--lambdas", "0.1234567", "0.1234568"])
    nets = {row["net"] for row in report["tables"][
        "Beyond the document: nets at equal steps, test MSE"]}
    assert {"lambda-0.0035", "lambda-0.1234567", "lambda-0.1234568", "latent-5"} <= nets


def test_epochs_alone(monkeypatch):
    monkeypatch.setattr(lj, "plot", lambda *rest: None)
    flags = "--epochs 1 --configurations 20 --sweeps 1 --lambdas 1"
    report = lj.main([*SMOKE, *flags.split()])
    assert report["config"]["epochs"] == 1 and "lambda-1.0" in report["units"]


BAD = """--gammas 0.1; --temperature 1; --particles 16; --epochs 0; --epochs 1.5; --sweeps 0;
    --configurations 19; --latents 1; --latents; --lambdas 0; --lambdas nan; --chains 5; extra"""


@pytest.mark.parametrize("argv", [line.split() for line in BAD.split(";")])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    assert argv[0] in refused(lj.main, argv) and os.listdir() == []


PASTED = """
N, L, T, STEP, CUTOFF, CORE = 12, 6.0, 0.75, 0.2, 3.0, 1e-3
g = torch.Generator().manual_seed(0)
xy, accepted = metropolis(1.0, 200, 50, lennard_jones, g)
xy = xy.permute(2, 1, 0)
d = (xy[:, :, None] - xy[:, None]).norm(dim=-1)
points, planar = gram_coordinates(d)
x = d[:, None] / (L * 2 ** 0.5)
net = conv_vae(N, 8)
optimiser = torch.optim.Adam(net.parameters(), 1e-3)
for step in range(15):
    loss, error, kl = vae_loss(net, x, x, torch.randn(200, 8, generator=g), 0.00035)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    if step == 0:
        start = error.item()
again = (points[:, :, None] - points[:, None]).norm(dim=-1)
print(0.3 < accepted < 0.9, (again - d).abs().max().item() < 1e-3, error.item() < start)
"""


def test_the_copy_test():
    """The sampler, the convolutional VAE with its loss and the Gram matrix, pasted alone, run."""
    source = (ROOT / "vae_lj_fluid.py").read_text()
    wanted = ["lennard_jones", "trial", "move", "share_accepted", "metropolis", "VAE",
              "convolutions", "conv_vae", "kl_divergence", "vae_loss", "gram_coordinates"]
    parts = [ast.get_source_segment(source, node) for node in ast.parse(source).body
             if getattr(node, "name", "") in wanted]
    head = "import torch\nfrom torch import nn\n\n"
    open("pasted.py", "w").write(head + "\n\n".join(parts) + PASTED)
    done = subprocess.run([sys.executable, "pasted.py"], capture_output=True, text=True,
                          env=environment())
    assert len(parts) == 11 and done.stdout == "tensor(True) True True\n", done.stderr
