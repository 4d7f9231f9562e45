"""vae_lj_fluid.py: the sampler against exact laws, the measures, and the run as a user sees it."""

import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import first_edition as common
import vae_lj_fluid as lj
from conftest import ROOT

T, SCALE = 0.75, 10 * math.sqrt(2)
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def g(name="test"):
    return common.generator(0, name)


def points(C=8, N=30, name="points"):
    return torch.rand(C, N, 2, generator=g(name), dtype=torch.double)


def apart(xy):
    """Distances, exactly: torch.cdist takes a rounded short cut."""
    return (xy[..., :, None, :] - xy[..., None, :, :]).norm(dim=-1)


def smirnov(x, law):
    """Kolmogorov-Smirnov statistic times sqrt n; above 1.95 with probability 0.001."""
    x = x.sort().values.double()
    n, F = len(x), law(x)
    steps = torch.arange(n + 1, dtype=torch.double) / n
    return max((steps[1:] - F).max(), (F - steps[:-1]).max()).item() * math.sqrt(n)


# --- energies and moves ---


def test_pair_energies_have_their_known_minima_zeros_and_cut_off():
    r = torch.linspace(0.9, 3.2, 230_001, dtype=torch.double)
    for pair, at, depth in ((lj.lennard_jones, 2 ** (1 / 6), -1), (lj.fake, math.sqrt(2), -1)):
        U = pair(r**2)
        assert r[U.argmin()].item() == pytest.approx(at, abs=1e-5)
        assert U.min().item() == pytest.approx(depth, abs=1e-9)
        assert pair(torch.tensor([1.0])).item() == 0
    ends = lj.lennard_jones(torch.tensor([2.9999, 3.0, 3.0001], dtype=torch.double) ** 2)
    assert ends[1].item() == pytest.approx(4 * (3**-12 - 3**-6)) and ends[2] == 0  # not shifted
    assert lj.fake(torch.tensor([100.0])).item() == pytest.approx(4 * (1e-4 - 1e-2))
    assert torch.isfinite(lj.lennard_jones(torch.zeros(1))).all()


def test_energy_of_a_triangle_is_known():
    xy = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]).T[..., None]  # 2, 4 and sqrt 20 apart
    inside = 4 * (2.0**-12 - 2.0**-6)
    assert lj.energy(xy, 0.5, lj.lennard_jones).item() == pytest.approx(inside + 0.5 * 4)
    far = [4 * (r**-4 - r**-2) for r in (2.0, 4.0, 20**0.5)]
    assert lj.energy(xy, 0.0, lj.fake).item() == pytest.approx(sum(far))


@pytest.mark.parametrize("pair", [lj.lennard_jones, lj.fake])
def test_the_change_of_energy_of_a_move_is_the_difference_of_full_energies(pair):
    """The acceptance switches exactly there, gravity included."""
    lattice = torch.cartesian_prod(torch.arange(3), torch.arange(4)) * 1.4 + 0.5
    xy = (lattice + 0.7 * points(50, 12)).permute(2, 1, 0)  # (2, N, C)
    u = torch.rand(3, 12, 50, generator=g("u"), dtype=torch.double)
    gamma = torch.linspace(0, 3, 50, dtype=torch.double)
    new, limit = lj.propose(xy, u, gamma, T, 6.0)
    others = 1 - torch.eye(12, dtype=torch.double)[..., None]
    for i in (0, 5, 11):
        after = xy.clone()
        after[:, i] = new[:, i]
        change = lj.energy(after, gamma, pair) - lj.energy(xy, gamma, pair)
        for shift, moves in ((1e-6, True), (-1e-6, False)):
            # u = exp(-change / T) is the border; propose has -T log u - gravity as the limit
            border = limit[i] + T * torch.log(u[2, i]) + change * (1 + shift * change.sign())
            got = lj.move(xy, xy[:, i], new[:, i], others[i], border, pair)
            assert torch.equal(got, new[:, i] if moves else xy[:, i])


def test_steps_stay_in_the_box_and_a_coordinate_that_leaves_is_dropped_alone():
    xy = torch.tensor([[0.05, 9.95, 5.0], [5.0, 0.1, 9.9]])[:, None]  # (2, 1, 3)
    u = torch.tensor([[0.0, 1.0, 0.25], [0.75, 0.0, 1.0], [0.5, 0.5, 0.5]])[:, None]
    new, limit = lj.propose(xy, u, torch.tensor(2.0), T, 10.0)
    wanted = torch.tensor([[0.05, 9.95, 4.9], [5.1, 0.1, 9.9]])  # x, both, and y dropped
    assert torch.allclose(new[:, 0], wanted)
    assert torch.allclose(limit[0], T * math.log(2) - 2.0 * torch.tensor([0.1, 0.0, 0.0]))
    u = torch.rand(3, 40, 1000, generator=g())
    new, _ = lj.propose(10 * torch.rand(2, 40, 1000, generator=g("x")), u, torch.zeros(1), T, 10.0)
    assert (new > 0).all() and (new < 10).all()


def test_detailed_balance_of_single_moves():
    """p(A -> B) exp(-U_A / T) = p(B -> A) exp(-U_B / T), p from all values of u at once."""
    n, pair, others = 20_000, lj.lennard_jones, 1 - torch.eye(3, dtype=torch.double)[..., None]
    u = (torch.arange(n, dtype=torch.double) + 0.5) / n
    base = torch.tensor([[1.0, 2.1, 1.5], [1.0, 1.2, 2.0]], dtype=torch.double)[..., None]
    A, gamma = base, torch.tensor(0.7, dtype=torch.double)
    for step in ((0.15, 0.1), (-0.1, 0.18), (0.02, -0.19)):
        B = A.clone()
        B[:, 1, 0] += torch.tensor(step, dtype=torch.double)
        rates = []
        for a, b in ((A, B), (B, A)):
            draw = ((b - a)[:, 1, 0] / lj.STEP + 1) / 2  # the u that proposes it
            many = torch.cat([draw[:, None, None].expand(2, 3, n), u.expand(1, 3, n)])
            start = a.expand(2, 3, n)
            new, limit = lj.propose(start, many, gamma, T, 10.0)
            assert torch.allclose(new[:, 1], b[:, 1].expand(2, n))
            end = lj.move(start, start[:, 1], new[:, 1], others[1], limit[1], pair)
            rates.append((end != start[:, 1]).any(0).double().mean().item())
        weight = math.exp(-(lj.energy(B, gamma, pair) - lj.energy(A, gamma, pair)).item() / T)
        assert rates[0] == pytest.approx(min(1, weight), abs=1e-4)
        assert rates[0] / rates[1] == pytest.approx(weight, rel=1e-3)
        assert abs(weight - 1) > 0.05


# --- distributions ---


def test_one_particle_has_the_barometric_density():
    box, gamma = 2.0, 1.5
    found = lj.metropolis(lj.Fluid((gamma,), 4000, 1200, particles=1, box=box), "one")
    x, y = found["xy"][:, 0].T
    scale = T / gamma
    total = 1 - math.exp(-box / scale)
    assert smirnov(y, lambda y: (1 - torch.exp(-y / scale)) / total) < 1.95
    assert smirnov(x, lambda x: x / box) < 1.95
    mean = scale - box * math.exp(-box / scale) / total
    assert y.mean().item() == pytest.approx(mean, abs=4 * y.std().item() / 4000**0.5)
    assert found["height"][-1, 0].item() == pytest.approx(y.mean().item(), rel=1e-5)
    assert found["energy"][-1, 0].item() == pytest.approx(gamma * y.mean().item(), rel=1e-5)
    error = gamma * y.std().item() / 4000**0.5
    assert found["error"][-1, 0].item() == pytest.approx(error, rel=1e-3)
    # the contact theorem for an ideal gas, exact in the box of the walls
    contact = T * lj.contact_density(found["xy"].double(), box)
    assert contact.mean().item() == pytest.approx(gamma, abs=4 * contact.std().item() / 4000**0.5)


@pytest.mark.parametrize("potential", ["lennard-jones", "fake"])
def test_two_particles_have_the_energy_of_the_boltzmann_weight(potential):
    """Mean energy and share of close pairs against quadrature over the distances dx, dy."""
    box, gamma, C, pair = 2.5, 1.0, 4000, lj.POTENTIALS[potential]
    found = lj.metropolis(
        lj.Fluid((gamma,), C, 1000, potential, particles=2, box=box), f"two {potential}"
    )
    grid = (torch.arange(300, dtype=torch.double) + 0.5) / 300 * box
    dx, y1, y2 = grid[:, None, None], grid[None, :, None], grid[None, None, :]
    r2 = dx**2 + (y1 - y2) ** 2
    U = pair(r2) + gamma * (y1 + y2)
    weight = (box - dx) * torch.exp(-U / T)  # (box - dx): how many places two x dx apart have
    weight = weight / weight.sum()
    mean, close = (weight * U).sum().item(), (weight * (r2 < 1.3**2)).sum().item()
    xy = found["xy"].double()
    energy = lj.energy(xy.permute(2, 1, 0), gamma, pair)
    assert energy.mean().item() == pytest.approx(mean, abs=4 * energy.std().item() / C**0.5)
    near = ((xy[:, 0] - xy[:, 1]).norm(dim=1) < 1.3).double().mean().item()
    assert near == pytest.approx(close, abs=4 * (close * (1 - close) / C) ** 0.5)


@needs_compiler
def test_the_fluid_has_the_energy_of_a_plain_cpp_metropolis():
    """2,500 sweeps of 400 systems at gamma = 1, T = 0.75, N = 30, L = 10, by both."""
    subprocess.run(["g++", "-O3", "-o", "plain", ROOT / "tests/metropolis.cpp"], check=True)
    out = subprocess.run(["./plain", "1.0", "400", "2500", "1"], capture_output=True, text=True)
    U, height, accepted = torch.tensor(
        [[float(x) for x in line.split()] for line in out.stdout.splitlines()]
    ).T
    found = lj.metropolis(lj.Fluid((1.0,), 400, 2500), "cpp", compile=True)
    error = math.hypot(U.std().item() / 20, found["error"][-1, 0].item())
    assert found["energy"][-1, 0].item() == pytest.approx(U.mean().item(), abs=3 * error)
    assert found["height"][-1, 0].item() == pytest.approx(height.mean().item(), abs=0.03)
    assert found["acceptance"].mean().item() == pytest.approx(accepted.mean().item(), abs=0.01)
    assert accepted.mean().item() == pytest.approx(lj.RERUN[1.0], abs=0.01)


@needs_compiler
def test_compiled_and_eager_give_the_same_chains():
    fluid = lj.Fluid((0.1, 1.0), 200, 12)
    plain, fast = (lj.metropolis(fluid, "same", compile=c)["xy"] for c in (False, True))
    same = torch.isclose(plain, fast, atol=1e-4).all(-1).all(-1).double().mean().item()
    assert same > 0.98  # rounding may turn a decision, and with it one chain


def test_sampling_continues_exactly_after_a_kill(tmp_path, monkeypatch):
    """Also from chunk to chunk, and each chunk is what it would be alone."""
    monkeypatch.setattr(lj, "CHUNK", 5)
    fluid, calls = lj.Fluid((0.4,), 12, 7), []

    def run(stop=None):
        checkpoint = common.Checkpoint(tmp_path / "x.checkpoint", "cpu")
        checkpoint.every = 0

        def watched(*args):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return propose(*args)

        monkeypatch.setattr(lj, "propose", watched)
        return lj.metropolis(fluid, "kill", checkpoint=checkpoint)

    propose = lj.propose
    with pytest.raises(KeyboardInterrupt):
        run(stop=11)  # in the fourth sweep of the second of three chunks
    calls.clear()
    continued = run()
    assert len(calls) == 21 - 10
    os.remove(tmp_path / "x.checkpoint")
    whole = run()
    for key in ("xy", "energy", "error", "acceptance", "height"):
        assert torch.equal(continued[key], whole[key])
    assert whole["xy"].shape == (12, 30, 2) and not torch.equal(*whole["xy"][:10].chunk(2))
    assert whole["sweep"].tolist() == list(range(1, 8))
    alone = lj.metropolis(fluid._replace(count=5), "kill")
    assert torch.equal(alone["xy"], whole["xy"][:5])


def test_chains_of_several_gammas_are_recorded_apart():
    fluid = lj.Fluid((0.0, 50.0), 40, 60, particles=2)
    found = lj.metropolis(fluid, "apart") | {"parameters": fluid._asdict()}
    height = found["xy"][..., 1].view(2, 20, 2).mean((1, 2))
    assert torch.allclose(found["height"][-1].float(), height)
    assert height[1] < height[0] - 1  # the second half falls
    U = [lj.energy(part.permute(2, 1, 0), gamma, lj.lennard_jones).mean().item()
         for part, gamma in zip(found["xy"].chunk(2), (0.0, 50.0))]
    assert found["energy"][-1].tolist() == pytest.approx(U, rel=1e-4)
    rows = lj.fluid_rows(found)
    assert [row["gamma"] for row in rows] == [0, 50] and rows[1]["energy"] == pytest.approx(U[1])
    assert rows[1]["N gamma"] == 100
    half = found["energy"][25:].mean(0)  # of 50 records
    assert [row["settled"] for row in rows] == pytest.approx(half.tolist())
    error = [statistics.stdev(U) / 5 for U in found["energy"][25:].T.tolist()]
    assert [row["settled error"] for row in rows] == pytest.approx(error)
    near = 1.6 * 10 * T / 100  # the wall's profile is steep: 0.12 of the box, not 0.4
    contact = T * lj.contact_density(found["xy"][20:].double(), 10.0, near)
    assert rows[1]["contact"] == pytest.approx(contact.mean().item())
    assert rows[1]["contact error"] == pytest.approx(contact.std().item() / 20**0.5)
    contact = T * lj.contact_density(found["xy"][:20].double(), 10.0, 0.4)
    assert rows[0]["contact"] == pytest.approx(contact.mean().item())
    assert rows[0]["acceptance"] == found["acceptance"][:, 0].mean().item()


def test_contact_density_of_known_profiles():
    C, N = 4000, 30
    u = torch.rand(C, N, generator=g("contact"), dtype=torch.double)
    y = -0.5 * torch.log(1 - u * (1 - math.exp(-20)))  # density 2 exp(-2 y) in a box of 10
    contact = lj.contact_density(torch.stack([u, y], -1), 10.0)
    assert contact.mean().item() == pytest.approx(2 * N, abs=4 * contact.std().item() / C**0.5)
    mirrored = lj.contact_density(torch.stack([u, 10 - y], -1), 10.0)
    assert torch.allclose(mirrored, -contact)


# --- representations and nets ---


def test_distance_matrices_and_order():
    xy = lj.by_origin(points())
    assert (xy.norm(dim=-1).diff(dim=1) >= 0).all()
    assert torch.allclose(xy.sum(1), points().sum(1))
    d = lj.distance_matrix(xy)
    assert torch.allclose(d[:, 0], apart(xy)) and d.shape == (8, 1, 30, 30)


def test_occupancy_has_a_cell_per_particle():
    xy = torch.tensor([[[0.1, 0.1], [9.9, 0.3], [5.2, 7.6], [5.3, 7.7]]]) / SCALE
    image = lj.occupancy(xy)[0, 0]
    assert image.nonzero().tolist() == [[0, 0], [0, 19], [15, 10]]  # row: height, column: x


@pytest.mark.parametrize("reading", ["code", "slide"])
def test_corruption_moves_four_particles_as_it_says(reading):
    xy = lj.by_origin(points(500)) / math.sqrt(2)
    found = lj.corrupt(xy, reading, 10.0, g())
    after, moved = found["xy"] / SCALE, found["moved"]
    assert (moved.sum(1) == 4).all() and torch.allclose(after[~moved], xy[~moved])
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
    black, where = lj.black_out(d, 6, g()).values()
    assert torch.equal(where, where.transpose(2, 3)) and torch.equal(black == 0, where)
    assert torch.equal(black[~where], d[~where])
    count = where.flatten(1).sum(1)
    assert count.min() == 36 and count.max() == 72  # on the diagonal; off it, with its mirror image
    assert where.any(0).all()


def test_the_main_net_has_the_documents_weights():
    nets = lj.build(lj.MODELS[lj.MAIN], 30, g())
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets.values()]
    assert sizes == [3_627_730, 1_895_151]
    bound = math.sqrt(6 / (9 * 60 + 9 * 50))  # Glorot's
    weight = nets["encoder"][2].weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize("name", lj.MODELS)
def test_every_net_has_shapes_and_draws_nothing_from_the_global_generator(name):
    torch.manual_seed(1)
    model = lj.MODELS[name]
    a = lj.build(model, 10, g(name))
    torch.manual_seed(2)
    b = lj.build(model, 10, g(name))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    x, goal = (lj.REPRESENT[key](points(5, 10).float() / 2)
               for key in (model.input, model.output))
    out = lj.evaluate(a, model, x, goal)
    assert out["x_hat"].shape == goal.shape and out["mu"].shape == (5, model.latent)
    if model.input != "grid":
        assert ((out["x_hat"] > 0) & (out["x_hat"] < 1)).all()
        assert torch.allclose(out["error"], ((out["x_hat"] - goal) ** 2).flatten(1).mean(1))


def test_kl_and_objective():
    mu, logvar = torch.randn(2, 7, 5, generator=g(), dtype=torch.double)
    exact = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0))
    assert torch.allclose(lj.kl_divergence(mu, logvar), exact)
    model = lj.Model("distances", "dense", lam=0.01)
    nets = lj.build(model, 6, g("net")).double()
    x = lj.distance_matrix(points(9, 6))
    mu, logvar = nets["encoder"](x).chunk(2, 1)
    noise = torch.randn(mu.shape, generator=g("draw"))
    error = ((nets["decoder"](mu + noise * (logvar / 2).exp()) - x) ** 2).mean()
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).mean()
    loss, terms = lj.objective(nets, model, x, x, 0.3, g("draw"))
    assert torch.allclose(loss, error + 0.01 * kl)
    assert terms.tolist() == pytest.approx([error.item(), kl.item()])
    plain, _ = lj.objective(nets, model._replace(lam=0.0), x, x, 0.3, g("draw"))
    assert torch.allclose(plain, ((nets["decoder"](mu) - x) ** 2).mean())


def test_the_weights_of_the_grid_objective_change_with_the_epochs():
    model = lj.Model("grid", "dense", "grid", lam=0.5)
    nets = lj.build(model, 5, g("net"))
    x = lj.occupancy(points(9, 5).float() / math.sqrt(2))
    live = 1 / x.mean() - 1
    mu, logvar = nets["encoder"](x).chunk(2, 1)
    noise = torch.randn(mu.shape, generator=g("draw"))
    p = nets["decoder"](mu + noise * (logvar / 2).exp()).sigmoid()
    for progress in (0.0, 0.25, 1.0):
        loss, (error, kl) = lj.objective(nets, model, x, x, progress, g("draw"))
        wanted = -(live ** (1 - progress) * x * p.log() + (1 - x) * (1 - p).log()).mean()
        assert error.item() == pytest.approx(wanted.item(), rel=1e-4)
        assert loss.item() == pytest.approx((wanted + progress * 0.5 * kl).item(), rel=1e-4)


def test_training_continues_exactly_and_stops_at_non_finite_losses(tmp_path, monkeypatch):
    model = lj.Model("distances", "dense", latent=3)
    xy = lj.by_origin(points(300, 8).float()) / math.sqrt(2)
    real, calls = lj.objective, []

    def run(stop=None):
        checkpoint = common.Checkpoint(tmp_path / "t.checkpoint", "cpu")
        checkpoint.every = 0
        generator = g("train")
        nets = lj.build(model, 8, generator)

        def watched(*args):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(lj, "objective", watched)
        return lj.train("net", nets, model, xy, xy[:50], 2, generator, checkpoint), nets

    with pytest.raises(KeyboardInterrupt):
        run(stop=5)  # in the second of two epochs of three batches
    calls.clear()
    rows, nets = run()
    assert len(calls) == 2
    os.remove(tmp_path / "t.checkpoint")
    whole, same = run()
    assert rows == whole and [row["epoch"] for row in rows] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(nets.parameters(), same.parameters()))
    found = lj.evaluate(nets, model, lj.distance_matrix(xy[:50]), noise=True)
    assert rows[-1]["test error"] == found["error"].mean().item()

    def broken(*args):
        calls.append(1)
        loss, terms = real(*args)
        return (loss, terms * torch.tensor([1.0, math.nan])) if len(calls) == 5 else (loss, terms)

    calls.clear()
    monkeypatch.setattr(lj, "objective", broken)
    with pytest.raises(FloatingPointError, match="net: the term KL is not finite at step 4"):
        lj.train("net", nets, model, xy, xy[:50], 2, g())


# --- geometry ---


def test_gram_matrix_gives_the_points_up_to_a_rigid_motion():
    xy = 10 * points()
    d = apart(xy)
    found, share = lj.gram_coordinates(d)
    assert torch.allclose(apart(found), d, atol=1e-9)
    assert torch.allclose(share, torch.ones(8, dtype=torch.double))
    assert torch.allclose(lj.procrustes(found, xy), xy, atol=1e-9)
    assert torch.allclose(found[:, 0], torch.zeros(8, 2, dtype=torch.double), atol=1e-6)
    noise = 0.3 * torch.randn(d.shape, generator=g(), dtype=torch.double).triu(1)
    assert (lj.gram_coordinates(d + noise + noise.mT)[1] < 0.99).all()


def test_procrustes_is_the_best_of_all_rigid_motions():
    a, b = points(3, 6, "a"), points(3, 6, "b")
    best = ((lj.procrustes(a, b) - b) ** 2).sum((1, 2))
    a, goal = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    for mirror in (1.0, -1.0):
        for angle in torch.linspace(0, 2 * math.pi, 721, dtype=torch.double):
            c, s = angle.cos(), angle.sin()
            turn = torch.stack([torch.stack([c, -s]), mirror * torch.stack([s, c])])
            assert (((a @ turn - goal) ** 2).sum((1, 2)) > best - 1e-9).all()


def turned(xy, angle):
    c, s = math.cos(angle), math.sin(angle)
    return xy @ torch.tensor([[c, s], [-s, c]], dtype=torch.double)


def test_the_tumbler_keeps_distances_and_sits_a_side_of_the_hull_on_the_floor():
    xy = turned(10 * points(50), 0.7)
    sat = lj.turbo_tumbler(xy, 10.0)
    assert torch.allclose(apart(sat), apart(xy), atol=1e-9)
    lowest = sat[..., 1].sort(1).values
    assert (lowest[:, :2].abs() < 1e-9).all() and (lowest[:, 2] > 1e-9).all()
    before, after = (torch.linalg.det(x[:, 1:3] - x[:, :1]) for x in (xy, sat))
    assert torch.allclose(before, after)  # turned, not mirrored
    middle = (sat[..., 0].amax(1) + sat[..., 0].amin(1)) / 2
    assert torch.allclose(middle, torch.full((50,), 5.0, dtype=torch.double))


def test_the_tumbler_takes_the_side_nearest_to_the_centre_of_mass():
    from scipy.spatial import ConvexHull

    xy = points(20, 12)
    sat = lj.turbo_tumbler(xy, 10.0)
    for before, after in zip(xy, sat):
        hull = ConvexHull(before.numpy())
        centre = before.mean(0).numpy()
        nearest = min(-(hull.equations[:, :2] @ centre + hull.equations[:, 2]))
        assert after[:, 1].mean().item() == pytest.approx(nearest, abs=1e-9)


@pytest.mark.parametrize("angle", [0.0, 0.5, 2.0, 4.0])
def test_the_tumbler_on_rectangles_lines_and_duplicates(angle):
    box = torch.tensor([[0.0, 0], [8, 0], [8, 1], [0, 1], [4, 0.5]], dtype=torch.double)
    line = torch.tensor([[1.0, 1], [2, 2], [4, 4], [2, 2], [7, 7]], dtype=torch.double)
    dot = torch.ones(5, 2, dtype=torch.double)
    double = box[[0, 1, 2, 3, 2]]
    sat = lj.turbo_tumbler(torch.stack([turned(x, angle) for x in (box, line, dot, double)]), 10.0)
    assert sat[0, :, 1].max().item() == pytest.approx(1) and sat[0, :, 1].min() >= 0  # lies flat
    assert sat[1, :, 1].abs().max() < 1e-9 and sat[2, :, 1].abs().max() < 1e-9
    assert sat[1, :, 0].max() - sat[1, :, 0].min() == pytest.approx(6 * 2**0.5)
    assert sat[3, :, 1].max().item() == pytest.approx(1) and torch.isfinite(sat).all()


def test_energies_leave_out_pairs_nearer_than_sigma():
    xy = torch.tensor([[[0.0, 0.0], [0.5, 0.0], [2.0, 4.0]]]).double() / SCALE
    gamma = torch.tensor([0.5]).double()
    _, _, (U, _) = lj.geometry(lj.distance_matrix(xy), xy, gamma, 10.0)
    assert U.item() == pytest.approx(0.5 * 4, rel=1e-5)  # beyond the cut-off, and at 0.5
    xy[0, 2, 1] = 0.0
    wanted = sum(4 * (r**-12 - r**-6) for r in (1.5, 2.0))  # not the pair at 0.5
    _, _, (U, U_hat) = lj.geometry(lj.distance_matrix(xy), xy, gamma, 10.0)
    assert U.item() == pytest.approx(wanted, rel=1e-5)
    assert U_hat.item() == pytest.approx(wanted, rel=1e-4)


# --- statistics ---


def test_jensen_shannon_distance():
    x, y = torch.randn(2, 20_000, generator=g("n"))
    assert lj.jensen_shannon(x, x) == 0 and lj.jensen_shannon(x, y) < 0.05
    maximum = pytest.approx(math.sqrt(math.log(2)))
    assert lj.jensen_shannon(x, 20 + y[:900]) == maximum
    from scipy.spatial.distance import jensenshannon

    a, b = torch.randint(20, (2, 9), generator=g())
    a[0], b[-1] = 5, 7  # the common bins reach from the first to the last value
    samples = (torch.arange(9.0).repeat_interleave(count) for count in (a, b))
    assert lj.jensen_shannon(*samples, bins=9) == pytest.approx(jensenshannon(a, b), rel=1e-6)


def test_histogram_lines_are_probability_densities():
    label, middles, density, style = lj.histogram("x", torch.tensor([0.0, 0.1, 1.9]), 0, 2, "k", 4)
    assert middles.tolist() == [0.25, 0.75, 1.25, 1.75] and (label, style["color"]) == ("x", "k")
    assert density.tolist() == pytest.approx([4 / 3, 0, 0, 2 / 3])


def test_area_under_the_roc_is_the_share_of_rightly_ordered_pairs():
    a, b = torch.randn(300, generator=g("a")), torch.randn(200, generator=g("b")) + 0.7
    false, true, area = lj.roc(a, b)
    assert area == pytest.approx((b[:, None] > a).double().mean().item(), abs=1e-9)
    assert false[0] == true[0] == 0 and false[-1] == true[-1] == 1
    assert lj.roc(b, b + 9)[2] == 1 and lj.roc(b + 9, b)[2] == 0
    assert lj.roc(b, b)[2] == pytest.approx(0.5) and lj.roc(a * 0, b * 0)[2] == 0.5


def test_principal_axes():
    scale = torch.tensor([3.0, 2.0, 1.0], dtype=torch.double)
    x = torch.randn(50_000, 3, generator=g(), dtype=torch.double) * scale + 1
    mean, axes, shares = lj.principal_axes(x)
    assert shares.tolist() == pytest.approx([9 / 14, 4 / 14], rel=0.03)
    assert torch.allclose(axes.abs(), torch.eye(3, dtype=torch.double)[:, :2], atol=0.03)
    values = torch.linalg.svdvals(x - x.mean(0)) ** 2
    assert torch.allclose(shares, values[:2] / values.sum()) and torch.allclose(mean, x.mean(0))


def test_change_of_the_rest_and_texture():
    moved = torch.zeros(1, 5, dtype=torch.bool)
    moved[0, 2] = True
    before, after = torch.zeros(1, 1, 5, 5), torch.ones(1, 1, 5, 5)
    after[0, 0, 2] = after[0, 0, :, 2] = 4.0
    after[0, 0].fill_diagonal_(9.0)  # a particle is no pair with itself
    assert lj.change_of_rest(before, after, moved) == pytest.approx(1 / 4)
    stripes = torch.arange(6.0).expand(1, 1, 6, 6) * 0.5
    assert lj.texture(stripes) == pytest.approx(0.5)
    spiked = torch.zeros(1, 1, 6, 6) + 9 * torch.eye(6)  # the diagonal is not a feature
    assert lj.texture(spiked) == 0 and lj.texture(torch.ones(1, 1, 6, 6)) == 0


class Half(torch.nn.Module):
    """An encoder or decoder that lets matrices of 3 x 3 through: the codes are the entries."""

    def __init__(self, encodes):
        super().__init__()
        self.encodes = encodes

    def forward(self, x):
        if self.encodes:
            return torch.cat([x.flatten(1), torch.zeros(len(x), 9)], 1)
        return x.view(-1, 1, 3, 3) * 0.5


HALF = {"encoder": Half(True), "decoder": Half(False)}


def test_anomaly_rows_of_a_net_that_halves_everything():
    model = lj.Model(latent=9)
    x = torch.rand(400, 1, 3, 3, generator=g())
    gammas = torch.tensor([0.1, 1.0]).double().repeat(200)
    x[gammas == 1] += 2
    normal = lj.evaluate(HALF, model, x)
    assert torch.allclose(normal["error"], (x**2).flatten(1).mean(1) / 4)
    sets, mean = {"test": x, "same": x, "far": x[:200] + 30}, torch.full((1, 3, 3), 3.0)
    rows, found = lj.anomaly_rows(HALF, model, gammas, sets, mean)
    rows = {row["set"]: row for row in rows}
    assert rows["same"]["AUROC of mean"] == pytest.approx(0.5) and rows["far"]["AUROC of mean"] == 1
    trivial = ((x - 3) ** 2).flatten(1).mean(1).sqrt().mean().item()
    assert rows["test"]["rmse of mean"] == pytest.approx(trivial, rel=1e-5)
    assert rows["same"]["AUROC RMSE"] == pytest.approx(0.5) and rows["far"]["AUROC RMSE"] == 1
    assert rows["far"]["AUROC RMSE + KL"] == 1 and rows["far"]["nearest gamma"] == 1
    assert rows["same"]["rmse"] == rows["test"]["rmse"] and list(found) == list(sets)
    rmse = (x[gammas == 1] ** 2).flatten(1).mean(1).sqrt() / 2
    assert rows["far"]["rmse there"] == pytest.approx(rmse.mean().item())
    sets = {"test": x, "new": x[gammas < 1] + 1.8}
    rows, _ = lj.anomaly_rows(HALF, model, gammas, sets, mean)
    errors = ((x[gammas < 1] + 1.8) ** 2).flatten(1).mean(1).sqrt() / 2
    near = (errors[:, None] > rmse).double().mean().item()  # against gamma = 1 alone
    assert rows[1]["nearest gamma"] == 1 and 0 < near < 0.5
    assert rows[1]["AUROC there"] == pytest.approx(near, abs=1e-3)
    assert rows[1]["AUROC RMSE"] == pytest.approx((1 + near) / 2, abs=1e-3)


def test_missing_rows_of_a_net_that_halves_everything():
    d = torch.rand(50, 1, 3, 3, generator=g()) + 1
    mean = torch.full((1, 3, 3), 1.5)
    hidden = {size: lj.black_out(d, size, g()) for size in (1, 3)}
    part, row = lj.missing_rows(HALF, lj.Model(latent=9), d, mean, hidden)
    # a block of 3 is all: black stays black, filled comes back as half of the mean
    assert row["black inside"] == pytest.approx((d**2).mean().sqrt().item())
    assert row["filled inside"] == pytest.approx(((d - 0.75) ** 2).mean().sqrt().item())
    assert row["mean inside"] == pytest.approx(((d - 1.5) ** 2).mean().sqrt().item())
    where = hidden[1]["where"]
    for key in ("black", "filled"):  # what is outside is untouched
        rest = (d**2)[~where].mean().sqrt().item() / 2
        assert part[f"{key} outside"] == pytest.approx(rest)
    assert part["black inside"] == pytest.approx((d**2)[where].mean().sqrt().item())


def test_probe_of_a_net_that_halves_everything():
    kl = torch.arange(9.0)
    sheet, top = lj.probe(HALF["decoder"], kl, g("draw"), count=2)
    assert top == [8, 7] and sheet.shape == (3, 7, 3, 3)  # a dimension is an entry
    for k, row, column in ((0, 2, 2), (1, 2, 1)):
        walk = torch.zeros(7, 3, 3)
        walk[:, row, column] = torch.linspace(-1.5, 1.5, 7)
        assert torch.allclose(sheet[k], walk)
    assert (sheet[:2, 3] == 0).all()
    assert (sheet[2].flatten(1)[:, :7] == 0).all() and (sheet[2].flatten(1)[:, 7:] != 0).all()


def test_representation_row_has_the_trivial_predictor_beside_it():
    model = lj.Model("distances", "dense", latent=4)
    xy = lj.by_origin(points(600, 6).float()) / math.sqrt(2)
    nets = lj.build(model, 6, g("net"))
    row = lj.representation_row("net", nets, model, xy[:500], xy[500:])
    train, test = lj.distance_matrix(xy[:500]), lj.distance_matrix(xy[500:])
    assert row["trivial"] == pytest.approx(((test - train.mean(0)) ** 2).mean().item(), rel=1e-4)
    whole = lj.evaluate(nets, model, test)["x_hat"]
    assert row["error"] == pytest.approx(((whole - test) ** 2).mean().item(), rel=1e-4)
    grid = lj.Model("grid", "dense", "grid", latent=4)
    nets = lj.build(grid, 6, g("n"))
    row = lj.representation_row("grid", nets, grid, xy[:500], xy[500:])
    image, p = lj.occupancy(xy[500:]), lj.occupancy(xy[:500]).mean(0).clamp(1e-6, 1)
    wanted = -(image * p.log() + (1 - image) * (1 - p).log()).mean().item()
    assert row["trivial"] == pytest.approx(wanted, rel=1e-4)
    p = lj.evaluate(nets, grid, image)["x_hat"].sigmoid()
    wanted = -(image * p.log() + (1 - image) * (1 - p).log()).mean().item()
    assert row["error"] == pytest.approx(wanted, rel=1e-4)


def test_geometry_of_a_perfect_reconstruction():
    gammas = torch.tensor([0.1, 1.0]).double().repeat(20)
    test = lj.by_origin(points(40) / math.sqrt(2))
    d, skew = lj.distance_matrix(test), torch.rand(30, 30, generator=g("skew")).double()
    figures, (true, fitted, tumbled), (U_true, U_hat) = lj.geometry(  # made a matrix of distances
        d + skew.triu(1) - skew.triu(1).mT + torch.eye(30), test, gammas, 10.0)
    assert torch.allclose(fitted, true) and figures["gram error"] < 1e-9
    U = lj.energy(SCALE * test.permute(2, 1, 0), gammas, lambda r2: torch.where(
        r2 >= 1, lj.lennard_jones(r2), 0.0))
    assert torch.allclose(U_true, U)
    # tumbled points have the same pairs and less weight
    fallen = gammas * (true - tumbled)[..., 1].sum(1)
    assert torch.allclose(U_hat, U - fallen)
    assert figures["procrustes rmse"] < 1e-9 and figures["share"] == pytest.approx(1)
    assert figures["js"] == lj.jensen_shannon(U_true, U_hat)


# --- the run as a user sees it ---


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lj") / "run"
    return folder, lj.main(["--preset", "smoke", "--out", str(folder)])


def test_smoke_writes_everything(smoke):
    folder, report = smoke
    assert json.load(open(folder / "results.json")) == report
    for name in ("equilibrium", "matrices", "latent", "energies", "anomalies", "probe"):
        assert (folder / f"fig_{name}.png").stat().st_size > 10_000
    sampled = {"fluid-0.1", "fluid-0.4", "fluid-0.7", "fluid-1", "unseen", "fake", "long"}
    derived = {"random", "corrupted-code", "corrupted-slide"} | {
        f"blacked-out-{size}" for size in lj.SIZES}
    nets = {name.replace(", ", "-").replace(" ", "-") for name in lj.MODELS}
    assert {p.stem for p in (folder / "units").iterdir()} == sampled | derived | nets | {
        "latent-5", "lambda-0.0035"}
    for name in sampled:
        found = unit(folder, name)
        xy, parameters = found["xy"], found["parameters"]
        assert xy.shape == (parameters["count"], 30, 2) and (xy > 0).all() and (xy < 10).all()
        assert set(parameters) == {*lj.Fluid._fields, "step", "cutoff"}
        wanted = {"fake": (0.5,), "unseen": (3.0,), "long": (0.1, 0.4, 0.7, 1.0)}
        assert parameters["gamma"] == wanted.get(name, (float(name[6:] or 0),) if (
            name.startswith("fluid")) else None)
        assert parameters["sweeps"] == {"fake": 80, "long": 80}.get(name, 40)
        assert parameters["potential"] == ("fake" if name == "fake" else "lennard-jones")
        assert parameters["cutoff"] == (math.inf if name == "fake" else 3.0)
        assert (parameters["temperature"], parameters["box"], parameters["step"]) == (0.75, 10, 0.2)
    table = (folder / "metrics.csv").read_text().splitlines()
    others = [model.net for name, model in lj.MODELS.items() if name != lj.MAIN]
    epochs = 2 + sum(10 if net == "dense" else 1 for net in others) + 2  # two of the sweeps
    assert len(table) == 1 + epochs and sum("distances, conv" in row for row in table) == 2


def unit(folder, name):
    return torch.load(folder / f"units/{name}.pt", weights_only=True)["result"]


def test_smoke_measures_the_sets_that_it_saved(smoke):
    """Every anomalous set again, from its file and the saved net, beside the row of the table."""
    folder, report = smoke
    rows = {row["set"]: row for row in report["results"]["anomalies"]}
    model = lj.MODELS[lj.MAIN]
    nets = lj.build(model, 30, g())
    nets.load_state_dict(unit(folder, "distances-conv")["state"])
    xy = torch.cat([unit(folder, f"fluid-{name}")["xy"] for name in ("0.1", "0.4", "0.7", "1")])
    order, xy_all = torch.randperm(200, generator=common.generator(0, "split")), xy
    test = lj.by_origin(xy[order])[160:]
    sets = {"test": test, **{name: lj.by_origin(unit(folder, name)["xy"]) for name in (
        "unseen", "fake", "random")}}
    for reading in ("code", "slide"):
        found = unit(folder, f"corrupted-{reading}")
        assert torch.allclose(found["xy"][~found["moved"]], test[~found["moved"]], atol=1e-5)
        sets[f"corrupted-{reading}"] = found["xy"]
    for name, xy in sets.items():
        out = lj.evaluate(nets, model, lj.distance_matrix(xy / SCALE))
        rmse = out["error"].sqrt().mean().item()
        assert rows[name]["rmse"]["mean"] == pytest.approx(rmse, rel=1e-4)
    assert (sets["random"] > 9).any() and sets["random"].max() < 10
    for name in ("corrupted-code", "blacked-out-6"):  # all of the 40 test configurations
        assert unit(folder, name)["parameters"]["count"] == 40
    gammas = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.double).repeat_interleave(50)
    gammas = gammas[order][160:]
    rmse = lj.evaluate(nets, model, lj.distance_matrix(test / SCALE))["error"].sqrt()
    for row in rows.values():  # the labels belong to the configurations
        there = rmse[gammas == row["nearest gamma"]].mean().item()
        assert row["rmse there"] == pytest.approx(there, rel=1e-4)
    mean = lj.distance_matrix(lj.by_origin(xy_all[order][:160]) / SCALE).mean(0)
    hidden = unit(folder, "blacked-out-6")
    inside = (mean - lj.distance_matrix(test / SCALE))[hidden["where"]].square().mean().sqrt()
    row = {row["size"]: row for row in report["results"]["missing"]}[6]
    assert row["mean inside"] == pytest.approx(inside.item(), rel=1e-4)
    d = lj.distance_matrix(test / SCALE)
    assert torch.allclose(hidden["d"][~hidden["where"]], d[~hidden["where"]], atol=1e-6)
    last = lj.evaluate(nets, model, d, noise=True)
    row = report["results"]["training"][-1]
    assert row["epoch"] == 2 and row["test error"] == pytest.approx(last["error"].mean().item())
    assert [row["epoch"] for row in report["results"]["sweeps"]] == [1, 1, 1]
    assert {row["nearest gamma"] for row in rows.values()} <= {0.1, 0.4, 0.7, 1.0}  # exactly


GOOD = {  # what makes every claim hold, and one that breaks it: path in results, good, bad
    "MSE": ("training.-1.error", 0.00134, 0.00136),
    "KL per": ("training.-1.kl", 2.2, 2.22),
    "variance": ("codes.axes", [0.06, 0.05], [0.04, 0.03]),
    "energies": ("geometry.js", 0.18, 0.19),
    "Gram": ("geometry.gram error", 1e-6, 1e-2),
    "lower test MSE with larger": ("sweeps.1.test error", 0.004, 0.001),
    "lower test MSE with lower": ("sweeps.2.test error", 0.004, 0.001),
    "distances, conv works": ("representations.0.error", 0.4, 0.6),
    "coordinates, dense fails": ("representations.1.error", 0.6, 0.4),
    "grid, conv fails": ("representations.5.error", 0.92, 0.88),
    "unseen": ("anomalies.1.nearest gamma", 1.0, 0.7),
    "fake": ("anomalies.2.rmse.mean", 0.14, 0.16),
    "unseen (": ("anomalies.1.rmse of mean", 0.3, 0.19),
    "random: separable": ("anomalies.3.AUROC RMSE", 0.91, 0.89),
    "corrupted-code: RMSE": ("anomalies.4.AUROC RMSE", 0.91, 0.89),
    "corrupted-slide: RMSE": ("anomalies.5.AUROC of mean", 0.7, 0.96),
    "corrupted-slide: the whole": ("change of the rest.corrupted-slide", 0.6, 0.4),
    "blacked-out": ("missing.4.black inside", 0.1, 0.3),
    "zero latent": ("probe.texture.zero", 0.01, 0.03),
    "γ = 0.1: settled": ("fluid.0.energy", -9.9, -12.0),
    "γ = 1: settled": ("fluid.3.contact", 29.0, 26.0),
    "acceptance": ("fluid.1.acceptance", 0.665, 0.645),
}


def put(results, path, value):
    *keys, last = [int(key) if key.lstrip("-").isdigit() else key for key in path.split(".")]
    for key in keys:
        results = results[key]
    results[last] = value


def held(results):
    rows = lj.net_claims(results, 2) + lj.anomaly_claims(results) + lj.fluid_claims(results, True)
    return {claim: holds for claim, _, _, holds in rows}


@pytest.fixture(scope="module")
def flawless(smoke):
    """Smoke's results with figures under which all claims hold."""
    results = json.loads(json.dumps(smoke[1]["results"]))
    for row in results["representations"]:
        row |= {"trivial": 1.0, "error": 0.95 if "grid" in row["model"] else 0.6}
    for row in results["sweeps"]:
        row["test error"] = 0.003
    for k, row in enumerate(results["anomalies"]):
        row |= {"nearest gamma": 0.4, "rmse there": 0.1, "AUROC RMSE": 0.95}
        row |= {"AUROC of mean": 0.5, "rmse of mean": 0.4}
        row["rmse"]["mean"] = 0.1
    results["anomalies"][1]["nearest gamma"] = 1.0
    results["change of the rest"] = dict.fromkeys(results["change of the rest"], 0.7)
    for row in results["missing"]:
        row |= {"black inside": 0.1, "mean inside": 0.2}
    results["probe"]["texture"]["reconstructed"] = 0.1
    for row, end in zip(results["fluid"], results["long"]):
        row |= {"energy": -10.0, "error": 0.3, "contact error": 1.0, "contact": row["N gamma"]}
        row["acceptance"] = lj.RERUN[row["gamma"]]
        end |= {"settled": -10.0, "settled error": 0.4, "error": 9.0}  # the latter plays no part
    for path, good, _ in GOOD.values():
        put(results, path, good)
    return results


def test_all_claims_hold_for_flawless_figures(flawless):
    assert all(held(flawless).values()) and len(held(flawless)) == 30


@pytest.mark.parametrize("claim", GOOD)
def test_each_claim_fails_by_its_own_figure_alone(claim, flawless):
    path, _, bad = GOOD[claim]
    broken = json.loads(json.dumps(flawless))
    put(broken, path, bad)
    (failed,) = [name for name, holds in held(broken).items() if not holds]
    assert failed.startswith(claim)


def test_claims_that_need_more_than_was_run_are_left_out(flawless):
    single = json.loads(json.dumps(flawless))
    single["sweeps"] = single["sweeps"][:1]
    assert "lower test MSE" not in " ".join(row[0] for row in lj.net_claims(single, 2))
    assert len(lj.fluid_claims(flawless, False)) == 4  # not the authors' settings


def test_a_set_with_other_parameters_is_refused(smoke, refused, capsys):
    folder, _ = smoke
    line = refused(lj.main, ["--preset", "smoke", "--out", str(folder), "--sweeps", "39"])
    assert "--sweeps 40" in line
    shutil.copytree(folder, "copy")
    found = torch.load("copy/units/unseen.pt", weights_only=True)
    found["result"]["parameters"]["temperature"] = 0.8
    torch.save(found, "copy/units/unseen.pt")
    capsys.readouterr()
    line = refused(lj.main, ["--preset", "smoke", "--out", "copy"])
    assert "unseen.pt" in line and "temperature 0.8" in line


@pytest.mark.parametrize("argv", [
    ["--gammas", "0.5", "--particles", "16", "--latents", "40", "--lambdas", "0"],
    ["--gammas", *"01245678", "--epochs", "1", "--temperature", "0.01", "--box", "30"],
])  # fmt: skip
def test_unusual_flags_work(argv):
    few = "--configurations 25 --sweeps 3 --long-sweeps 6 --chains 2 --anomalies 20".split()
    report = lj.main(["--preset", "smoke", "--out", "run", *few, *argv])
    assert os.path.exists("run/fig_probe.png") and report["claims"]


@pytest.mark.parametrize("part", ["long.checkpoint", "distances-conv.checkpoint", "grid-conv.pt"])
def test_kill_and_continue_equals_an_undisturbed_run(part, smoke, killed_and_continued):
    """A real kill -9, in the middle of a unit or between two, then the same command again."""
    out = killed_and_continued("vae_lj_fluid", part)
    told = "continuing" if part.endswith("checkpoint") else "reused"
    assert f"{told} {pathlib.Path(part).stem}" in out
    assert json.load(open("run/results.json"))["results"] == smoke[1]["results"]
    assert open("run/metrics.csv").read() == open(smoke[0] / "metrics.csv").read()


@pytest.mark.parametrize(
    "argv",
    [
        ["--gammas", "-0.1"],
        ["--gammas"],
        ["--configurations", "-5"],
        ["--configurations", "19"],
        ["--temperature", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--box", "3"],
        ["--box", "0"],
        ["--particles", "150"],
        ["--particles", "15"],
        ["--sweeps", "0"],
        ["--chains", "1"],
        ["--epochs", "0"],
        ["--epochs", "1", "--other-epochs", "2"],
        ["--latents", "1"],
        ["--lambdas", "-1"],
        ["--long-sweeps", "4999"],
        ["--gammas", "1", "3"],
        ["--gammas", *"123456789"],
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    line = refused(lj.main, argv)
    assert {"--particles": "--box"}.get(argv[0], argv[0]) in line or argv[0] in line
    assert os.listdir() == []
