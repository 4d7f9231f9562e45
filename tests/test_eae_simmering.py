"""eae_simmering.py: the sampler's physics, Algorithm 1, SINDy, the spiral, measures and runs."""

import json
import math
import os
import pathlib
import re

import pytest
import torch
from torch import nn

import first_edition as common
import eae_simmering as eae

torch.set_num_threads(2)
SETTING = eae.Setting(0.7, mass=2.0, step=0.1, chain=3, tau=10, redraw=0)


class Particles(nn.Module):
    """Positions as a module's weights, in double precision."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.double())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sampled(setting, x, potential, steps, seed=0, every=1):
    """Positions (steps / every, n), kinetic temperatures, U and extended energies of a run."""
    particles = Particles(x)
    sampler = eae.Sampler(particles, setting, generator(seed))
    sampler.counting = True
    sampler.force(lambda: potential(particles.x))
    positions, rows = [], []
    for step in range(steps):
        U = sampler.step(lambda: potential(particles.x), setting.temperature)
        if step % every == 0:
            positions.append(particles.x.detach().clone())
            rows.append((sampler.temperature(), U, sampler.energy(U, setting.temperature)))
    kinetic, U, energy = torch.tensor(rows, dtype=torch.double).T
    return torch.stack(positions), kinetic, U, energy


def quartic(x):
    return (x**4 / 4 + x**2 / 2).sum()


# --- sampler -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, chain, method, redraw",
    [
        (1, 2, "nose-hoover", 0),
        (1, 5, "nose-hoover", 0),
        (1000, 4, "nose-hoover", 0),
        (1000, 4, "nose-hoover", 30),
        (1000, 1, "langevin", 0),
    ],
)
def test_harmonic_wells_are_canonical(n, chain, method, redraw):
    k = torch.logspace(-0.5, 0.5, n).double() if n > 1 else torch.ones(1).double()
    setting = SETTING._replace(chain=chain, sampler=method, redraw=redraw)
    steps = 25_000 if n == 1 else 8000
    x, kinetic, U, _ = sampled(
        setting, torch.randn(n, generator=generator()), lambda x: (k * x**2).sum() / 2, steps
    )
    T, kinetic, x = setting.temperature, kinetic[steps // 10 :], x[steps // 10 :]
    near = 0.1 if n == 1 else 0.03  # three standard errors
    assert kinetic.mean() == pytest.approx(T, rel=near)  # <m v^2>
    assert (k * x**2).mean() == pytest.approx(T, rel=near)  # <k x^2>
    # the kinetic energy of n degrees of freedom at T has the variance n T^2 / 2
    assert (kinetic * n / 2).var() == pytest.approx(n * T**2 / 2, rel=0.3)
    if n == 1:  # and a single position is Gaussian: the fourth moment is 3 of the second squared
        assert (x**4).mean() / (x**2).mean() ** 2 == pytest.approx(3, rel=0.2)
    elif redraw or method == "langevin":  # each stiffness by itself: wells that share nothing but
        for part in (slice(0, 300), slice(700, 1000)):  # a chain's friction keep their shares
            assert (k[part] * x[:, part] ** 2).mean() == pytest.approx(T, rel=0.08)


@pytest.mark.parametrize(
    "changes",
    [
        {"chain": 1},
        {"chain": 2},
        {"chain": 5},
        {"chain": 4, "suzuki_yoshida": True},
        {"chain": 3, "substeps": 3},
    ],
)
def test_extended_energy_is_conserved_to_second_order(changes):
    def drift(step):
        setting = SETTING._replace(step=step, tau=1.0 / step, **changes)  # tau: one unit of time
        _, _, _, energy = sampled(
            setting, torch.linspace(-1, 1, 20), quartic, round(20 / step), every=round(0.1 / step)
        )
        return (energy - energy[0]).abs().mean().item()

    coarse, fine = drift(0.02), drift(0.01)
    assert 3.2 < coarse / fine < 4.8
    assert coarse < 0.02 * 20 * SETTING.temperature


@pytest.mark.parametrize("fourth, least, most", [(False, 3.5, 4.5), (True, 14, 18)])
def test_the_chain_alone_is_of_second_or_with_suzuki_and_yoshida_of_fourth_order(
    fourth, least, most
):
    """Particles that exchange energy with the chain and nothing else, from twice their T."""
    assert sum(eae.SUZUKI_YOSHIDA) == pytest.approx(1, abs=1e-14)
    assert sum(w**3 for w in eae.SUZUKI_YOSHIDA) == pytest.approx(0, abs=1e-14)

    def error(step):
        setting = SETTING._replace(step=step, tau=1 / step, chain=5, suzuki_yoshida=fourth)
        sampler = eae.Sampler(Particles(torch.zeros(20)), setting, generator())
        sampler.counting, T, zero = True, SETTING.temperature, torch.zeros(())
        sampler.kinetic = sampler.kinetic * 0 + 20 * T
        before, worst = sampler.energy(zero, T), 0.0
        for _ in range(round(4 / step)):
            sampler.half_chain(T)
            worst = max(worst, (sampler.energy(zero, T) - before).abs().item())
        return worst

    assert least < error(0.1) / error(0.05) < most


def test_a_run_turned_round_comes_back():
    for changes in ({"chain": 1}, {"chain": 6}, {"chain": 3, "suzuki_yoshida": True}):
        particles = Particles(torch.linspace(-1, 1, 9))
        sampler = eae.Sampler(particles, SETTING._replace(**changes), generator())
        start = particles.x.detach().clone()
        sampler.force(lambda: quartic(particles.x))
        away = []
        for _ in range(2):
            for _ in range(200):
                sampler.step(lambda: quartic(particles.x), 0.7)
            away.append((particles.x - start).abs().max().item())
            for velocity in (sampler.v, sampler.odd, sampler.even):
                velocity.neg_()
        assert away[0] > 0.1 and away[1] < 1e-8


def test_a_double_well_is_visited_on_both_sides():
    for method in ("nose-hoover", "langevin"):
        setting = SETTING._replace(temperature=0.5, chain=4, mass=1.0, sampler=method)
        x, *_ = sampled(setting, torch.tensor([1.0]), lambda x: (x**2 - 1).square().sum(), 20_000)
        assert 0.3 < (x > 0).double().mean() < 0.7
        assert (x.abs() > 0.5).double().mean() > 0.6  # in the wells, not on the hill


def test_chain_of_one_is_no_chain_of_two():
    ends = []
    for chain in (1, 2, 3, 30):
        x, *_ = sampled(SETTING._replace(chain=chain), torch.linspace(-1, 1, 5), quartic, 300)
        ends.append(x[-1, 0].item())
    assert len({round(end, 9) for end in ends}) == 4


def test_mass_scales_time():
    """Four times the mass and twice the step: the same path, velocities halved."""
    light, *_ = sampled(SETTING._replace(mass=1.0), torch.linspace(-1, 1, 5), quartic, 100)
    heavy, *_ = sampled(
        SETTING._replace(mass=4.0, step=0.2), torch.linspace(-1, 1, 5), quartic, 100
    )
    assert torch.allclose(light, heavy, atol=1e-9)


def test_redrawn_velocities_are_maxwells_and_their_energy_counts():
    particles = Particles(torch.zeros(100_000))
    sampler = eae.Sampler(particles, SETTING._replace(chain=60), generator())
    before, v = sampler.energy(torch.zeros(()), 0.7), sampler.v.clone()
    sampler.redraw(0.7)
    assert (sampler.v - v).abs().max() > 0.1
    assert sampler.temperature() == pytest.approx(0.7, rel=0.02)
    assert (sampler.v**4).mean() / (sampler.v**2).mean() ** 2 == pytest.approx(3, rel=0.03)
    after = sampler.energy(torch.zeros(()), 0.7)
    assert (after - before).abs() < 1e-9 * 0.7 * 100_000 and sampler.heat.abs() > 1
    # thermostats: <Q v^2> = T with Q_k = T tau^2, tau = 10 steps of 0.1; the last is a wall
    others = torch.cat([sampler.odd[1:-1], sampler.even[1:]])
    assert others.std() == pytest.approx(1.0, rel=0.3) and sampler.odd[-1] == 0
    assert sampler.odd[0].abs() < 5 / 100_000**0.5


def test_flat_views_are_the_modules_weights():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    values = [p.detach().clone() for p in net.parameters()]
    theta, grad = eae.flatten(net)
    assert all(torch.equal(p, value) for p, value in zip(net.parameters(), values))
    net(torch.ones(1, 3)).sum().backward()
    assert torch.equal(grad, torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert grad.abs().sum() > 0
    theta.zero_()
    assert all(p.abs().sum() == 0 for p in net.parameters())


def test_state_restores_the_sampler_exactly():
    def run(stop):
        particles, g = Particles(torch.linspace(-1, 1, 9)), generator()
        sampler = eae.Sampler(particles, SETTING._replace(sampler="langevin"), g)
        sampler.force(lambda: quartic(particles.x))
        for step in range(40):
            if step == stop:
                state, x, dice = sampler.state_dict(), particles.x.detach().clone(), g.get_state()
                particles, g = Particles(x), generator(5)
                sampler = eae.Sampler(particles, SETTING._replace(sampler="langevin"), g)
                sampler.load_state_dict(state)
                g.set_state(dice)
            U = sampler.step(lambda: quartic(particles.x), 0.7)
        return particles.x.detach(), sampler.energy(U, 0.7)

    (a, energy), (b, again) = run(None), run(17)
    assert torch.equal(a, b) and energy == again


# --- Algorithm 1 ---------------------------------------------------------------------------------


def toy(kind="EAE", seed=0):
    """Nets, images and the loss of a small mnist model."""
    nets = eae.build("mnist", generator(seed), pixels=20)
    x = torch.rand(64, 20, generator=generator(1)).round()
    return nets, x, lambda index: eae.reconstruction_loss(nets, x[index])


def toy_run(setting, optimiser, seed=0):
    nets, x, loss = toy(seed=seed)
    setting = setting._replace(size=len(x))
    g = generator(3)
    sampler = eae.Sampler(nets["encoder"], setting, g)
    out = eae.algorithm_1(
        "toy", nets, loss, lambda: nets["encoder"](x).var(0), sampler, setting, g, optimiser(nets)
    )
    return nets, x, loss, sampler, out, g, setting


def test_decoder_gradient_is_the_average_over_the_encoders():
    nets, x, loss = toy()
    setting = eae.Setting(1e-3, step=0.3, updates=1, samples=4, batch=64, size=64, redraw=0)
    g, encoders = generator(3), []
    before = [p.detach().clone() for p in nets["decoder"].parameters()]
    sampler = eae.Sampler(nets["encoder"], setting, g)

    def watched(index):
        encoders.append(sampler.theta.clone())
        return loss(index)

    optimiser = torch.optim.SGD(nets["decoder"].parameters(), lr=1.0)
    eae.algorithm_1(
        "toy", nets, watched, lambda: nets["encoder"](x).var(0), sampler, setting, g, optimiser
    )
    step = [a - b for a, b in zip(before, nets["decoder"].parameters())]
    fresh, x, loss = toy()
    parameters, gradients = list(fresh["decoder"].parameters()), []
    for theta in encoders[1:]:  # the first evaluation is the force at the start
        torch.nn.utils.vector_to_parameters(theta, fresh["encoder"].parameters())
        gradients.append(torch.autograd.grad(loss(torch.arange(64)), parameters))
    assert len(gradients) == 4
    for moved, *parts in zip(step, *gradients):
        assert torch.allclose(moved, torch.stack(parts).mean(0), atol=1e-7)
        assert not torch.allclose(moved, parts[0], atol=1e-7)


def test_temperature_zero_is_the_plain_autoencoder():
    def adam(nets):
        return torch.optim.Adam(nets["decoder"].parameters(), 1e-3, fused=True)

    setting = eae.Setting(0.0, updates=60, samples=1, batch=64)
    *_, sampler, out, _, _ = toy_run(setting, adam)
    nets, x, loss = toy()
    optimiser = torch.optim.Adam(nets.parameters(), 1e-3, fused=True)
    for _ in range(60):
        optimiser.zero_grad()
        value = loss(torch.arange(64))
        value.backward()
        optimiser.step()
    assert sampler.method == "adam" and out["kinetic"].abs().max() == 0
    assert out["loss"][-1] <= value * 1.001
    assert value < 0.69
    # and a small temperature under friction goes downhill, too
    cold = eae.Setting(1e-12, sampler="langevin", step=3.0, tau=5, updates=60, samples=10, batch=64)
    *_, out, _, _ = toy_run(cold._replace(redraw=0), adam)
    assert out["loss"][-1] <= value * 1.001


def test_schedule_is_geometric_and_followed():
    setting = eae.Setting(1e-2, final_temperature=1e-4)
    assert [eae.schedule(setting, p) for p in (0, 0.5, 1)] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert eae.schedule(eae.Setting(3.0), 0.7) == 3.0
    setting = setting._replace(updates=40, samples=20, step=0.1, tau=5, redraw=0, batch=64)
    *_, sampler, out, _, _ = toy_run(
        setting, lambda nets: torch.optim.SGD(nets["decoder"].parameters(), 0.0)
    )
    assert out["kinetic"][:20].mean() == pytest.approx(1, rel=0.2)  # by T, which falls
    assert out["kinetic"][-20:].mean() == pytest.approx(1, rel=0.2)
    assert sampler.temperature() == pytest.approx(1e-4, rel=0.2)
    row = eae.thermostat_row("toy", out, sampler, setting, 0.0, 1.0)
    assert row["T"] == pytest.approx(1e-4) and row["kinetic"] == pytest.approx(1, rel=0.2)


def test_ensemble_and_drift():
    setting = eae.Setting(1e-4, step=0.1, updates=3, samples=5, batch=64, members=7, stride=3)
    nets, x, loss, sampler, _, g, setting = toy_run(
        setting, lambda nets: torch.optim.Adam(nets["decoder"].parameters())
    )
    decoder = [p.detach().clone() for p in nets["decoder"].parameters()]
    out = eae.algorithm_1("toy", nets, loss, sampler.theta.clone, sampler, setting, g)
    members = out["ensemble"]
    assert members.shape == (7, sampler.N) and members.std(0).max() > 0
    assert all(torch.equal(a, b) for a, b in zip(decoder, nets["decoder"].parameters()))
    code = eae.codes_of({"kind": "EAE", "nets": nets, "ensemble": members}, x)
    every = []
    for theta in members:
        torch.nn.utils.vector_to_parameters(theta, nets["encoder"].parameters())
        every.append(nets["encoder"](x).detach())
    every = torch.stack(every)  # (7, 64, 64)
    assert torch.allclose(code.mean, every.mean(0), atol=1e-6)
    assert torch.allclose(code.variance, every.flatten(0, 1).var(0, unbiased=False), atol=1e-6)
    assert torch.equal(code.draw[9], every[2, 9])
    drifts, start = [], sampler.theta.clone()
    for step, count in ((2.0, 20), (0.5, 80)):
        torch.nn.utils.vector_to_parameters(start, nets["encoder"].parameters())
        changed = setting._replace(temperature=1e-3, step=step, tau=40 / step)
        dice = generator(4)
        again = eae.Sampler(nets["encoder"], changed, dice)
        before = dice.get_state()
        drifts.append(eae.energy_drift(loss, 64, again, changed, count))
        assert again.every == setting.redraw and torch.equal(before, dice.get_state())
    assert 0 < 6 * drifts[1] < drifts[0] < 0.1


def test_a_step_too_long_stops_with_advice():
    setting = eae.Setting(1e-4, step=1e6, updates=100, samples=5, batch=64)
    with pytest.raises(FloatingPointError, match=r"toy: .* at step \d+: lower --step 1e\+06"):
        toy_run(setting, lambda nets: torch.optim.Adam(nets["decoder"].parameters()))


def test_an_ensemble_that_diverges_stops_with_advice():
    setting = eae.Setting(1e-4, step=0.1, updates=1, samples=2, batch=64, members=9, stride=5)
    nets, x, loss, sampler, _, g, setting = toy_run(
        setting, lambda nets: torch.optim.Adam(nets["decoder"].parameters())
    )
    sampler.dt = 1e30
    with pytest.raises(FloatingPointError, match=r"toy, ensemble: .* at step \d+: lower --step"):
        eae.algorithm_1("toy, ensemble", nets, loss, sampler.theta.clone, sampler, setting, g)


# --- SINDy and the spiral ------------------------------------------------------------------------


@pytest.mark.parametrize("terms", ["linear", "cubic", "sine"])
def test_coefficients_of_a_planar_system_are_exact(terms):
    Xi = torch.zeros(11, 2, dtype=torch.double)
    Xi[:2] = torch.tensor([[0.1, -1.3], [0.9, 0.2]])
    if terms == "cubic":
        Xi[5:9] = torch.tensor([[-0.3, 0.0], [0.4, -1.0], [-0.3, 0.0], [0.0, 0.7]])
    if terms == "sine":
        Xi[9:] = torch.tensor([[0.5, 0.0], [0.0, -0.6]])
    z = 2 * torch.randn(400, 2, generator=generator(), dtype=torch.double)
    found = eae.coefficients(z, eae.candidates(z) @ Xi, ridge=0.0)
    assert torch.allclose(found, Xi, atol=1e-8)
    shrunk = eae.coefficients(z, eae.candidates(z) @ Xi, ridge=0.1)
    assert shrunk.norm() < Xi.norm()


def test_ridge_is_that_of_the_mean_square():
    """Xi minimises mean |z_t - theta Xi|^2 + ridge |Xi|^2: the gradient vanishes there."""
    z, z_t = torch.randn(2, 50, 2, generator=generator(), dtype=torch.double)
    Xi = eae.coefficients(z, z_t, ridge=0.03).requires_grad_()
    loss = ((z_t - eae.candidates(z) @ Xi) ** 2).sum(1).mean() + 0.03 * Xi.square().sum()
    (slope,) = torch.autograd.grad(loss, Xi)
    assert slope.abs().max() < 1e-8 < Xi.abs().max()


def test_chain_rule_equals_autograd():
    nets = eae.build("reaction-diffusion", generator(), 100, 12).double()
    x, x_t = torch.randn(2, 5, 12, generator=generator(1), dtype=torch.double)
    for net, a, b in ((nets["encoder"], x, x_t), (nets["decoder"], x[:, :2], x_t[:, :2])):
        value, slope = torch.autograd.functional.jvp(net, a, b)
        here = eae.tangent(net, a, b)
        assert torch.allclose(here[0], value) and torch.allclose(here[1], slope)


def test_sindy_terms_are_pixel_means():
    """In an orthonormal basis the errors are those of the pixels."""
    basis = torch.linalg.qr(torch.randn(50, 6, generator=generator()))[0].T  # (6, 50)
    nets = eae.build("reaction-diffusion", generator(), 50, 6)
    x, x_t = torch.randn(2, 9, 6, generator=generator(1))
    (error, slope), Xi, z = eae.sindy_terms(nets, x, x_t, 50)
    with torch.no_grad():
        assert ((x @ basis - nets["decoder"](z) @ basis) ** 2).mean() == pytest.approx(error.item())
        z_t_hat = eae.candidates(z) @ Xi
        x_t_hat = torch.autograd.functional.jvp(nets["decoder"], z, z_t_hat)[1]
        assert ((x_t @ basis - x_t_hat @ basis) ** 2).mean() == pytest.approx(slope.item())


def test_integration_and_rotation():
    Xi = torch.zeros(2, 11, 2, dtype=torch.double)
    Xi[0, 1, 0], Xi[0, 0, 1] = -2.0, 2.0  # dz1 = -2 z2, dz2 = 2 z1: from z1 to z2
    Xi[1, 1, 0], Xi[1, 0, 1] = 0.5, -0.5
    start = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.double)
    path = eae.integrate(Xi, start, 0.01, 1000)
    t = torch.arange(1001) * 0.01
    assert torch.allclose(path[:, 0, 0], torch.cos(2 * t).double(), atol=1e-5)
    assert torch.allclose(path.norm(dim=2)[-1], start.norm(dim=1), atol=1e-6)
    turns = eae.integrate(Xi, start, 4 * math.pi / 1000, 1000)  # 4 turns and 1, backwards
    rate = eae.rotation_rate(turns, 4 * math.pi / 1000)
    assert torch.allclose(rate, torch.tensor([2.0, -0.5]).double(), rtol=1e-3)


def test_spiral_against_a_fine_reference():
    basis, u, u_t = eae.spiral(100, n=32)
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis)).double(), atol=1e-10)
    fine_basis, fine, fine_t = eae.spiral(400, n=32, dt=0.0125)
    here, there = u @ basis, fine[::4] @ fine_basis
    assert (here - there).abs().max() < 2e-4
    exact_basis, exact, _ = eae.spiral(100, n=32, tolerance=1e-11)
    assert (here - exact @ exact_basis).abs().max() < 2e-5  # what the basis misses
    assert (u_t @ basis - fine_t[::4] @ fine_basis).abs().max() < 1e-3
    # the time derivative is that of the frames
    slope = (here[2:] - here[:-2]) / 0.1
    assert ((u_t @ basis)[1:-1] - slope).abs().max() < 5e-3
    # the first frame is the document's
    x = (torch.arange(32).double() / 32 - 0.5) * 20
    r, angle = (x[None] ** 2 + x[:, None] ** 2).sqrt(), torch.atan2(x[:, None], x[None])
    start = torch.tanh(r) * torch.cos(angle - r) * torch.exp(-0.01 * r**2)
    assert (here[0].view(32, 32) - start).abs().max() < 1e-4


def test_spiral_turns_at_its_rate_in_two_modes():
    _, u, _ = eae.spiral(2400, n=50)
    late = u[1400:]
    share = late.square().sum(0) / late.square().sum()
    assert share[:2].sum() > 0.95
    rate = eae.rotation_rate((late[:, :2] / late[:, :2].std(0))[:, None], 0.05)
    assert abs(rate.item()) == pytest.approx(eae.OMEGA, rel=0.01)


def test_spiral_goes_on_where_it_was_killed(tmp_path):
    whole = eae.spiral(400, n=16)
    common.Checkpoint.every, every = 0, common.Checkpoint.every
    try:
        checkpoint = common.Checkpoint(tmp_path / "a", "cpu")
        save = checkpoint.save

        def stop(progress, *parts):
            save(progress, *parts)
            if progress[0] == 3:
                raise KeyboardInterrupt

        checkpoint.save = stop
        with pytest.raises(KeyboardInterrupt):
            eae.spiral(400, n=16, checkpoint=checkpoint)
        second = eae.spiral(400, n=16, checkpoint=common.Checkpoint(tmp_path / "a", "cpu"))
    finally:
        common.Checkpoint.every = every
    assert all(torch.equal(a, b) for a, b in zip(whole, second))


# --- data and measures ---------------------------------------------------------------------------


def test_active_units_and_codes():
    encoder = nn.Linear(3, 4)
    model = {"kind": "AE", "nets": {"encoder": encoder, "decoder": nn.Linear(4, 3)}}
    x = torch.randn(10, 3, generator=generator())
    code = eae.codes_of(model, x)
    assert torch.equal(code.mean, encoder(x)) and torch.equal(code.draw, code.mean)
    code = code._replace(draw=0 * code.draw, variance=torch.tensor([0.0, 0.009, 0.0101, 5.0]))
    row = eae.image_row(model, code, x)  # of the mean codes
    error = ((model["nets"]["decoder"](encoder(x)).sigmoid() - x) ** 2).mean().item()
    assert row["active"] == 2 and row["mse"] == pytest.approx(error)
    model["kind"] = "VAE"
    vae = eae.codes_of(model, x, generator())
    mu, logvar = encoder(x).chunk(2, 1)
    assert torch.equal(vae.mean, mu) and torch.allclose(vae.variance, mu.var(0))
    wide = eae.codes_of(model, x[:1].expand(20_000, 3), generator()).draw
    assert torch.allclose(wide.var(0), logvar[0].exp(), rtol=0.05)


def test_losses_by_hand():
    nets, x, loss = toy()
    logits = nets["decoder"](nets["encoder"](x))
    p = logits.sigmoid()
    entropy = -(x * p.log() + (1 - x) * (1 - p).log())
    assert loss(torch.arange(64)).item() == pytest.approx(entropy.mean().item(), rel=1e-5)
    nets = eae.build("mnist", generator(), pixels=20, codes=2 * eae.LATENT)
    mu, logvar = nets["encoder"](x).chunk(2, 1)
    q, prior = torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0, 1)
    kl = torch.distributions.kl_divergence(q, prior).sum(1).mean() / 20
    some, none = (eae.vae_loss(nets, x, beta, generator()) for beta in (2.0, 0.0))
    assert (some - none).item() == pytest.approx(2 * kl.item(), rel=1e-3)
    faces = eae.build("celeba", generator())
    x = torch.randint(0, 256, (2, 3, 64, 64), generator=generator(), dtype=torch.uint8)
    z = faces["encoder"](x / 255)
    assert z.shape == (2, 256) and faces["decoder"](z).shape == x.shape
    error = ((faces["decoder"](z) - x / 255) ** 2).mean().item()
    assert eae.reconstruction_loss(faces, x).item() == pytest.approx(error, rel=1e-5)


def test_probe_knows_the_extremes():
    y = torch.arange(2000) % 10
    spots = torch.randn(10, 5, generator=generator()) * 5
    z = spots[y] + torch.randn(2000, 5, generator=generator())
    assert eae.linear_probe(z[:1000], y[:1000], z[1000:], y[1000:]) > 0.97
    noise = torch.randn(2000, 5, generator=generator())
    assert eae.linear_probe(noise[:1000], y[:1000], noise[1000:], y[1000:]) < 0.2


def test_pca_mse_against_svd():
    x = torch.randn(200, 12, generator=generator()) @ torch.randn(12, 12, generator=generator())
    test = x[150:] + 1
    _, _, v = torch.linalg.svd(x - x.mean(0))
    rest = test - x.mean(0)
    plain = ((rest - rest @ v[:4].T @ v[:4]) ** 2).mean().item()
    assert eae.pca_mse(x, test, 4) == pytest.approx(plain, rel=1e-4)
    assert eae.pca_mse(x, test, 0) == pytest.approx((rest**2).mean().item(), rel=1e-5)


def test_draws_have_the_moments_of_the_codes():
    z = torch.cat([torch.randn(3000, 3, generator=generator()) * 0.2 + at for at in (-2, 2)])
    for draw in (eae.gaussian, lambda *a: eae.mixture(*a, k=2)):
        made = draw(z, 40_000, generator(1))
        assert torch.allclose(made.mean(0), z.mean(0), atol=0.05)
        assert torch.allclose(torch.cov(made.T), torch.cov(z.T), atol=0.1)
    inside = (made.abs() - 2).abs().amax(1) < 1  # the mixture leaves the gap empty
    assert inside.float().mean() > 0.99
    assert (eae.gaussian(z, 4000, generator()).abs() < 1).float().mean() > 0.2
    assert len(eae.mixture(z[:3], 10, generator(), k=5)) == 10


def test_frechet_distance_of_gaussians():
    a = torch.randn(40_000, 3, generator=generator())
    assert eae.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert eae.frechet_distance(a, 2 * a + 1) == pytest.approx(3 + 3, rel=0.02)


def test_interpolation_ends_at_the_mean_codes():
    y, alpha = torch.arange(200) % 10, torch.tensor([0.0, 0.25, 1.0])
    x = torch.rand(200, 3, generator=generator()) + y[:, None]
    nets = {"decoder": torch.logit}  # reconstruct is the identity
    models = {kind: {"nets": nets} for kind in ("EAE", "VAE")}
    codes = {"EAE": eae.Codes(x / 20, x, x), "VAE": eae.Codes(x, x / 20, x)}
    paths = eae.digit_paths(models, codes, x, y, alpha)
    assert list(paths) == ["test images", "EAE", "VAE"] and paths["EAE"].shape == (6, 3)
    three, eight = x[y == 3].mean(0), x[y == 8].mean(0)
    a, b, c, *_ = paths["test images"]
    assert torch.equal(a, three) and torch.equal(c, eight)
    assert torch.allclose(b, 0.75 * three + 0.25 * eight)
    assert torch.equal(paths["test images"][5], x[y == 9].mean(0))
    for kind in ("EAE", "VAE"):  # of the mean codes, of a VAE of drawn ones
        assert torch.allclose(paths[kind] * 20, paths["test images"], atol=1e-3)


def test_density_mode_finds_the_larger_peak():
    values = torch.cat([torch.randn(300, generator=generator()), torch.full((100,), 9.0)])
    assert abs(eae.density_mode(values)) < 0.5
    assert eae.density_mode(torch.full((50,), 3.0)) == 3.0


def test_significant_needs_mean_and_mode():
    Xi = torch.randn(400, 11, 2, generator=generator()) * 0.001
    Xi[:, 0, 0] += 0.5
    Xi[:120, 10, 1] += 1.0  # mean 0.3, mode 0
    terms, table = eae.significant(Xi)
    assert terms == [["z1"], []] and table.shape == (2, 11, 2)


def test_split_of_images():
    x, y, x_test, y_test = eae.load_images("frey", "glyphs", 200, "nowhere", "cpu")
    assert x.shape == (160, 560) and x_test.shape == (20, 560) and len(y_test) == 20
    x, _, x_test, _ = eae.load_images("celeba", "glyphs", 100, "nowhere", "cpu")
    assert x.shape == (80, 3, 64, 64) and x.dtype == torch.uint8 and x.float().std() > 30


def test_frey_faces_file():
    from scipy.io import savemat

    faces = (torch.arange(560)[:, None] + torch.arange(30)).remainder(256).byte()
    savemat("frey_rawface.mat", {"ff": faces.numpy()})
    x, _, x_test, _ = eae.load_images("frey", "real", 0, ".", "cpu")
    assert len(x) == 24 and len(x_test) == 3
    order = torch.randperm(30, generator=common.generator(0, "frey"))
    assert torch.allclose(x[5], faces[:, order[5]] / 255)


@pytest.mark.parametrize("size", [(89, 109), (178, 218)])
def test_celeba_folder(size):
    from PIL import Image

    home = pathlib.Path("celeba/img_align_celeba")
    home.mkdir(parents=True)
    for k in range(20):
        image = Image.new("RGB", size, (k, 0, 0))
        w, h = size
        s = w // 89
        box = (w // 2 - 32 * s, h // 2 - 32 * s, w // 2 + 32 * s, h // 2 + 32 * s)
        image.paste((k, 200, 100), box)
        image.save(home / f"{k:06d}.jpg", quality=95)
    x, _, x_test, _ = eae.load_images("celeba", "real", 0, ".", "cpu")
    assert x.shape == (16, 3, 64, 64) and len(x_test) == 2
    inner = x[3].float()[:, 4:-4, 4:-4]
    assert (inner[1] - 200).abs().max() < 12 and (inner[2] - 100).abs().max() < 12  # the square
    (home / "000003.jpg").write_bytes(b"not an image")
    with pytest.raises(SystemExit):
        eae.load_images("celeba", "real", 0, ".", "cpu")


# --- claims --------------------------------------------------------------------------------------


def table_1(experiment):
    rows = [
        {"kind": kind, "mse": mse, "active": active}
        for kind, (mse, active) in eae.DOCUMENT[experiment].items()
    ]
    return [*rows, {"kind": "PCA-64", "mse": 0.03}, {"kind": "mean image", "mse": 0.07}]


@pytest.mark.parametrize("experiment", eae.DOCUMENT)
def test_the_documents_table_meets_its_claims(experiment):
    claims = eae.table_claims(experiment, table_1(experiment))
    assert len(claims) == (9 if experiment == "mnist" else 8)
    assert [claim for claim, *_, holds in claims if not holds] == []


@pytest.mark.parametrize(
    "kind, key, value, broken",
    [
        (0, "mse", 0.027, ["EAE test MSE"]),
        (0, "active", 60, ["EAE active units"]),
        (1, "mse", 0.017, ["VAE test MSE"]),
        (1, "active", 17, ["VAE active units"]),
        (1, "active", 54, ["VAE active units", "AE active units", "lie between"]),
        (2, "mse", 0.0101, ["AE test MSE"]),
        (2, "active", 64, ["lie between"]),
        (2, "active", 12, ["AE active units", "lie between"]),
        (1, "mse", 0.009, ["lowest"]),
        (3, "mse", 0.02, ["PCA"]),
    ],
)
def test_each_figure_of_table_1_is_looked_at(kind, key, value, broken):
    rows = table_1("mnist")
    rows[kind][key] = value
    failed = [claim for claim, *_, holds in eae.table_claims("mnist", rows) if not holds]
    assert len(failed) == len(broken)
    assert all(part in claim for part, claim in zip(broken, failed))


def test_digit_claims_look_at_every_figure():
    def failed(**changes):
        rows = [
            {"kind": kind, "probe": p, "variance": v}
            for kind, p, v in (("EAE", 0.95, 9), ("VAE", 0.9, 1), ("AE", 0.93, 2))
        ]
        samples = {
            "EAE, between": 20, "VAE, between": 25, "AE, between": 30, "EAE, mixture": 40,
            "VAE, mixture": 45, "AE, mixture": 50, "VAE, prior": 1, "EAE, Gaussian": 99,
        }  # fmt: skip
        rows[2] |= {key: value for key, value in changes.items() if key in rows[2]}
        samples |= {key: value for key, value in changes.items() if key in samples}
        claims = eae.digit_claims(rows, [{"row": k, "frechet": v} for k, v in samples.items()])
        return [claim for claim, *_, holds in claims if not holds]

    assert failed() == []
    for changes, part in (
        ({"probe": 0.96}, "probe"),
        ({"variance": 10}, "highest variance"),
        ({"AE, between": 19}, "interpolates"),
        ({"VAE, between": 19}, "interpolates"),
        ({"AE, mixture": 39}, "generates"),
        ({"VAE, mixture": 39}, "generates"),
    ):
        (claim,) = failed(**changes)
        assert part in claim


def wave(omega=0.908, terms=("z1", "sin z2"), errors=(0.016, 0.016), mixed=1):
    rates = torch.full((10,), omega)
    rates[0] *= mixed
    return {"omega": rates, "terms": [list(terms), ["z1"]], "errors": list(errors)}


def test_wave_claims_look_at_every_figure():
    def holds(*runs):
        return [row[3] for row in eae.wave_claims(list(runs))]

    assert holds(wave(), wave(-0.9)) == [True, True, True, False, True]
    for broken, changed in (
        (0, wave(-0.9, terms=("z1", "z1²"))),
        (0, wave(-0.9, terms=())),
        (1, wave(-0.87)),
        (1, wave(-0.95)),
        (2, wave(0.9)),
        (4, wave(-0.9, errors=(0.016, 0.02))),
    ):
        verdicts = holds(wave(), changed)
        assert [k for k in range(5) if not verdicts[k]] == sorted({3, broken})
    assert holds(wave(), wave(-0.9, mixed=-1))[3]
    nan = holds(wave(mixed=math.nan), wave(-0.9))
    assert not nan[1] and not nan[3]


def test_sweep_and_face_claims_look_at_every_figure():
    def sweep(**changes):
        rows = [
            {"kind": kind, "value": value, "mse": mse, "active": units, "probe": probe}
            for kind, value, mse, units, probe in (
                ("EAE", 0, 0.012, 64, 0.9), ("EAE", 1e-7, 0.01, 64, 0.95),
                ("EAE", 1e-3, 0.066, 3, 0.12), ("VAE", 1, 0.015, 20, 0.94),
            )
        ]  # fmt: skip
        for index, change in changes.items():
            rows[int(index[1])] |= change
        return [k for k, row in enumerate(eae.sweep_claims(rows, 0.067)) if not row[3]]

    assert sweep() == []
    assert sweep(_2={"mse": 0.05}) == sweep(_2={"mse": 0.1}) == [0]
    assert sweep(_2={"probe": 0.5}) == [1]
    assert sweep(_1={"active": 19}) == [2, 3]
    assert sweep(_1={"probe": 0.9}) == [3]
    assert sweep(_0={"mse": 0.009}) == [4]
    assert sweep(_1={"mse": 0.02}) == [2, 3, 4]

    def faces(title, **change):
        found = {
            "high T": {"mse": 0.06, "distinct": 0.05, "loss std": 0.01, "mse of mean": 0.06},
            "low T": {"mse": 0.01, "distinct": 0.8, "loss std": 0.001},
        }
        found[title] |= change
        return [k for k, row in enumerate(eae.face_claims(found)) if not row[3]]

    assert faces("low T") == []
    assert faces("low T", mse=0.04) == [0]
    assert faces("high T", distinct=0.3) == faces("high T", mse=0.07) == [1]  # not grey, either
    assert faces("low T", distinct=0.4) == [2]
    assert faces("low T", **{"loss std": 0.02}) == [3]


# --- runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("experiment", eae.SETTINGS)
def test_smoke(experiment):
    report = eae.main(["--preset", "smoke", "--experiment", experiment, "--out", "run"])
    found = json.loads(pathlib.Path("run/results.json").read_text())
    assert found == report and list(found["results"]) == [experiment]
    result = found["results"][experiment]
    for row in result["thermostat"]:
        assert row["variance"] > 0 and row["steps per second"] > 1
        assert (row["sampler"] == "adam") == (row["drift"] is None)
        if row["T"] >= 1e-5:  # below, so few steps do not leave the fall into the minimum
            assert 0.8 < row["kinetic"] < 1.3 and 0 <= row["drift"] < 0.2
    figures = {
        "mnist": {
            "2a_interpolation", "2b_latents", "samples", "mnist_reconstructions", "mnist_thermostat"
        },
        "frey": {"frey_reconstructions", "frey_thermostat"},
        "celeba": {"3_faces", "celeba_thermostat"},
        "reaction-diffusion": {
            "1_dynamics", "4_correlations", "reaction-diffusion_thermostat"
        },
        "temperature": {"temperature", "temperature_thermostat"},
    }[experiment]  # fmt: skip
    there = {path.stem.removeprefix("fig_") for path in pathlib.Path("run").glob("fig_*.png")}
    assert there == figures
    if experiment in ("mnist", "frey"):
        kinds = [row["kind"] for row in result["models"]]
        assert kinds == ["EAE", "VAE", "AE", "PCA-64", "mean image"]
        assert all(0 < row["mse"] < 0.5 for row in result["models"])
        saved = torch.load(f"run/units/{experiment}-EAE.pt", weights_only=True)["result"]
        nets = eae.build(experiment, generator(), pixels=784 if experiment == "mnist" else 560)
        nets.load_state_dict(saved["state"])
        assert os.path.getsize("run/metrics.csv") > 100
    if experiment == "celeba":
        for row in result["faces"].values():  # after six updates: alike, far from the mean face
            assert 0 < row["mse of mean"] < row["mse"] < 1 and 0 <= row["distinct"] < 0.2
    if experiment == "reaction-diffusion":
        for row in result["runs"]:  # relative: of nets that put out nothing it is 1
            assert all(0.05 < error < 1.2 for error in row["errors"])
    if experiment == "mnist":
        assert len(result["samples"]) == 12
        again = eae.main(["--preset", "smoke", "--out", "run"])
        assert again["results"] == found["results"]  # from the finished units, bit for bit


def test_growth_compares_means_of_twentieths():
    variance = torch.ones(100, 3)
    variance[45:50], variance[95:], variance[44], variance[94] = 2.0, 3.0, 99.0, 99.0
    out = {"loss": torch.ones(100), "kinetic": torch.ones(100), "variance": variance}
    sampler = eae.Sampler(Particles(torch.zeros(3)), SETTING, generator())
    row = eae.thermostat_row("x", out, sampler, SETTING, None, 2.0)
    assert row["growth"] == pytest.approx(1.5) and row["steps per second"] == 50
    out["variance"] = variance[:1]
    assert eae.thermostat_row("x", out, sampler, SETTING, None, 2.0)["growth"] == 1


def test_flags_win_over_the_preset_and_that_over_the_experiment():
    args = eae.arguments(["--preset", "smoke", "--batch", "7", "--suzuki-yoshida"])
    waves, faces = (eae.setting_of(args, name) for name in ("reaction-diffusion", "celeba"))
    assert waves.batch == faces.batch == 7 and waves.members == 20 and faces.members == 3
    assert (waves.step, faces.temperature, waves.suzuki_yoshida) == (0.02, 1e-9, True)
    assert eae.arguments(["--preset", "paper"]).modes == 10_000


def test_pixels_are_the_modes_written_out():
    report = eae.main(
        ["--preset", "smoke", "--experiment", "reaction-diffusion", "--runs", "1"]
        + ["--modes", "10000", "--out", "run"]
    )
    state = torch.load("run/units/spiral-1.pt", weights_only=True)["result"]["state"]
    assert state["encoder.0.weight"].shape == (256, 1024)
    assert len(report["results"]["reaction-diffusion"]["runs"]) == 1


def test_langevin_and_temperature_zero_run(capsys):
    for flags in (["--sampler", "langevin"], ["--temperature", "0"]):
        report = eae.main(["--preset", "smoke", "--experiment", "frey", *flags, "--fresh"])
        (row,) = report["results"]["frey"]["thermostat"]
        assert row["sampler"] == {"langevin": "langevin", "0": "adam"}[flags[1]]
        held = [row["here"] for row in report["claims"] if "thermostats hold T" in row["claim"]]
        assert held == [f"{row['kinetic']:.2f} T, worst of 1"] * (flags[1] == "langevin")
    assert "temperature 0 has no ensemble" in capsys.readouterr().err


def test_killed_inside_the_sampler_and_continued(killed_and_continued):
    printed = killed_and_continued("eae_simmering", "mnist-EAE.checkpoint")
    assert "continuing mnist-EAE where it stopped" in printed
    found = json.loads(pathlib.Path("run/results.json").read_text())["results"]
    whole = eae.main(["--preset", "smoke", "--out", "whole"])["results"]
    for key in ("models", "samples"):
        assert found["mnist"][key] == whole["mnist"][key]


def figures(report):
    """The results without what a clock measured."""
    text = json.dumps(report["results"])
    return re.sub(r'"steps per second": [0-9.e+-]+', "", text)


@pytest.mark.parametrize("part", ["frey-EAE-ensemble", "spiral-1", "celeba-80-low-T"])
def test_continued_and_reused_runs_are_equal(part, monkeypatch):
    """Stopped inside a unit, continued, and run once more from its files: the same results."""
    experiment = {"f": "frey", "s": "reaction-diffusion", "c": "celeba"}[part[0]]
    argv = ["--preset", "smoke", "--experiment", experiment, "--runs", "1", "--out"]
    whole = figures(eae.main([*argv, "whole"]))
    save = common.Checkpoint.save

    def stopping(self, *arguments):
        save(self, *arguments)
        if self.path.stem == part:
            raise KeyboardInterrupt

    monkeypatch.setattr(eae, "CHECK", 2)
    with monkeypatch.context() as patch:
        patch.setattr(common.Checkpoint, "every", 0)
        patch.setattr(common.Checkpoint, "save", stopping)
        with pytest.raises(SystemExit):
            eae.main([*argv, "run"])
    assert os.path.exists(f"run/units/{part}.checkpoint")
    for _ in range(2):
        assert figures(eae.main([*argv, "run"])) == whole


BAD = {
    "--temperature -1": "--temperature",
    "--temperature nan": "--temperature",
    "--mass 0": "--mass",
    "--step 0": "--step",
    "--chain 0": "--chain",
    "--members 1": "--members",
    "--experiment faces": "--experiment",
    "--final-temperature 0": "--final-temperature",
    "--experiment temperature --temperature 1e-6": "--temperature",
    "--temperature 0 --final-temperature 1e-9": "--final-temperature",
    "--experiment temperature --final-temperature 1e-9": "--final-temperature",
    "--runs 0": "--runs",
    "--modes 1": "--modes",
    "--grid 2000": "--grid",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(refused, flags):
    assert BAD[flags] in refused(eae.main, flags.split())
    assert not os.path.exists("out")


def test_missing_data_is_named(refused):
    line = refused(eae.main, ["--experiment", "frey", "--data", "empty"])
    assert "empty/frey_rawface.mat" in line and eae.SOURCES["frey"][1] in line
    pathlib.Path("frey_rawface.mat").write_bytes(b"no mat file")
    line = refused(eae.main, ["--experiment", "frey", "--data", ".", "--out", "other"])
    assert "cannot read frey_rawface.mat" in line


def test_missing_faces_are_named(refused, monkeypatch):
    from torchvision import datasets

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "CelebA", offline)
    line = refused(eae.main, ["--experiment", "celeba", "--data", "empty"])
    assert "empty/celeba/img_align_celeba" in line and eae.SOURCES["celeba"][1] in line


def test_a_diverging_run_stops_with_advice(capsys):
    with pytest.raises(SystemExit) as stop:
        eae.main(["--preset", "smoke", "--experiment", "frey", "--step", "1e8", "--redraw", "0"])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert "at step" in error and "lower --step 1e+08 or raise --mass" in error
