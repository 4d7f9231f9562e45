"""Ratios against plain baselines, measured in one run, by hand: `python tests/bench.py`.

Each ratio is the time of the plain way over that of the script's way, in turn, median of three
(eae_simmering: nine), with its range. Memory is the peak of a process of its own. About five
minutes. The table at its end is .github/results/bench.md.
"""

import copy
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / ".first")]
import ae_cube  # noqa: E402
import common  # noqa: E402
import eae_simmering  # noqa: E402
import frozen_encoder_vae  # noqa: E402
import lso_mnist  # noqa: E402
import vae_lj_fluid  # noqa: E402


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


ROWS = []  # of the table: script, what is measured, figure, range, goal


def add(script, what, figure, spread="", goal=""):
    ROWS.append([f"{script}.py", what, figure, spread, goal])
    print(" | ".join(ROWS[-1]), flush=True)


def ratio(script, what, plain, ours, goal="", repeats=3):
    """Add the median of plain / ours, after one call of each to warm up."""
    plain(), ours()
    ratios = sorted(seconds(plain) / seconds(ours) for _ in range(repeats))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    add(script, what, f"{statistics.median(ratios):.2f} ×", spread, goal)


def memory(script, what, call, goal=""):
    """Add the peak memory of `call`, an expression, in a process of its own, beyond the imports."""
    peaks = []
    for expression in ("0", call):
        command = [sys.executable, __file__, "--only", expression]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 2**20)
    add(script, what, f"{peaks[1] - peaks[0]:.2f} GiB", "", goal)


def side_by_side(rows, seeds, steps=40):
    ae_cube.train(rows, seeds, "bench", steps, 5000)


def textbook_loop(steps=40, n=5000):
    """f2 at one SNR as a textbook has it: one net, DataLoader, .item() at every step."""
    x = ae_cube.cube_surface(n, common.generator(0, "bench"))
    net = ae_cube.Autoencoder(6)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    data = torch.utils.data.TensorDataset(x)
    loader = torch.utils.data.DataLoader(data, ae_cube.BATCH, shuffle=True)
    log = []
    while len(log) < steps:
        for (batch,) in loader:
            y, var, z, x_hat = net(batch, torch.randn(len(batch), 6), 10**-1.5)
            total, terms = ae_cube.loss(batch, y, var, z, x_hat, c=1.0)
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            log.append(total.item())


def cube_rows(model, d):
    return [row for snr in ae_cube.SNRS[model] for row in ae_cube.rows_of(model, snr, d)]


def lso(groups, starts=100, steps=20):
    """Algorithm 3 on LSO-2's nets for `starts` starts, in so many groups; untrained nets do."""
    decoder = lso_mnist.build("LSO-2", lso_mnist.NETS["LSO-2"], 0).decoder
    classifier = lso_mnist.Classifier()
    decoder.requires_grad_(False), classifier.requires_grad_(False)
    v = torch.randn(starts, 20, generator=common.generator(0, "bench"))
    digits = torch.arange(starts) % 10
    for some, wanted in zip(v.chunk(groups), digits.chunk(groups)):
        lso_mnist.algorithm_3(
            lambda v: lso_mnist.total_squared_error(classifier(decoder(v)), wanted),
            some,
            -0.002,
            steps,
            lso_mnist.THRESHOLD,
            float("inf"),
        )


def plain_fluid(program, gamma, systems, sweeps=2500, seed=1):
    """The plain C++ Metropolis on one core: (energy, mean height, acceptance) of each system."""
    command = [program, str(gamma), str(systems), str(sweeps), str(seed)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return torch.tensor([[float(x) for x in line.split()] for line in lines])


def fluid(gamma, systems, sweeps=2500):
    g = common.generator(0, f"bench {gamma}")
    return vae_lj_fluid.metropolis(
        gamma, systems, sweeps, vae_lj_fluid.lennard_jones, g, compile=True
    )


def fluid_against_cpp(repeats=3):
    """Trial moves per second of both, and their energies at the document's settings."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = pathlib.Path(__file__).with_name("metropolis.cpp"), f"{folder}/plain"
        subprocess.run(["g++", "-O3", "-o", program, source], check=True)
        fluid(0.4, 5000, 50)  # compiles
        plain, ours = [], []
        for _ in range(repeats):
            plain.append(100 * 2500 * 30 / seconds(lambda: plain_fluid(program, 0.4, 100)))
            ours.append(5000 * 2500 * 30 / seconds(lambda: fluid(0.4, 5000)))
        ratios = sorted(a / b for a, b in zip(ours, plain))
        add(
            "vae_lj_fluid",
            "trial moves per second (30 particles): all chains at once, both cores / plain C++ "
            "(`-O3`, one core)",
            f"{statistics.median(ratios):.1f} ×",
            f"{ratios[0]:.1f} to {ratios[-1]:.1f}; {statistics.median(ours) / 1e6:.1f} and "
            f"{statistics.median(plain) / 1e6:.1f} million",
            "5 ×",
        )
        apart, accept = [], []
        for gamma in vae_lj_fluid.GAMMAS:
            U, height, accepted = plain_fluid(program, gamma, 400).T
            xy, share = fluid(gamma, 2000)
            here = vae_lj_fluid.energy(xy, gamma, vae_lj_fluid.lennard_jones)
            error = (here.var() / 2000 + U.var() / 400).sqrt()
            apart.append(((U.mean() - here.mean()).abs() / error).item())
            accept.append((accepted.mean() - share).abs().item())
        add(
            "vae_lj_fluid",
            "energies at four γ: difference from the C++, in standard errors",
            f"{max(apart):.1f} at most",
            f"acceptances within {max(accept):.3f}",
            "3",
        )


def plain_vae(layers, prior, x):
    """A model of frozen_encoder_vae.py with encoder L, for one epoch in the style of
    pytorch/examples: DataLoader, .item() at every step, PyTorch's own memory format."""
    vae = frozen_encoder_vae.build(layers, "L", [prior], 1, 0)
    vae = vae.to(memory_format=torch.contiguous_format)
    optimiser = torch.optim.Adam(vae.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 256, shuffle=True)
    total = 0.0
    for (batch,) in loader:
        optimiser.zero_grad()
        eps = torch.randn(len(batch), 16)
        RE, RT = frozen_encoder_vae.loss_terms(vae, batch, batch, eps, "as-published")
        loss = (RE - RT).mean()
        loss.backward()
        total += loss.item()
        optimiser.step()


def our_vae(layers, encoder, prior, x):
    vae = frozen_encoder_vae.build(layers, encoder, [prior], 1, 0)
    frozen_encoder_vae.train("bench", vae, x, "as-published", 1, 256, common.generator(0, "bench"))


def encoder_steps(how, chain=30, steps=200):
    """A function that makes so many steps of eae_simmering.py's MNIST encoder under its decoder, in
    batches of 128: the gradient alone, with fused Adam, or under a thermostat."""
    g = common.generator(0, "bench")
    nets = eae_simmering.build("mnist", g, pixels=784)
    x = torch.rand(10_000, 784, generator=g)
    setting = eae_simmering.SETTINGS["mnist"]._replace(chain=chain)
    if how in ("langevin", "nose-hoover"):
        setting = setting._replace(sampler=how)
    sampler = eae_simmering.Sampler(nets["encoder"], setting, g)
    optimiser = torch.optim.Adam(nets["encoder"].parameters(), 1e-3, fused=True)
    weights, moments = copy.deepcopy((nets.state_dict(), optimiser.state_dict()))

    def potential():
        return eae_simmering.reconstruction_loss(nets, x[eae_simmering.batch_of(10_000, 128, g)])

    def run():  # from the start each time: on noise units die, and Adam's moments fade into
        nets.load_state_dict(weights)  # denormal numbers, which are slow
        optimiser.load_state_dict(copy.deepcopy(moments))
        for _ in range(steps):
            if setting.sampler == how:
                sampler.step(potential, setting.temperature)
            else:
                sampler.force(potential)
                if how == "adam":
                    optimiser.step()

    return run


def our_epoch_of_vae(n=10_000):
    our_vae("conv", "L", "flow6", torch.rand(n, 1, 32, 32))


def main():
    fluid_against_cpp()
    seeds, f2, f4 = [0, 1, 2], cube_rows("f2", 6), cube_rows("f4", 6)
    ratio(
        "ae_cube",
        "f2, 4 SNRs × 3 seeds: textbook loops (`DataLoader`, `.item()`) / side by side",
        lambda: [textbook_loop() for _ in f2 for _ in seeds],
        lambda: side_by_side(f2, seeds),
    )
    ratio(
        "ae_cube",
        "f4 (MMD), 6 rows × 3 seeds: one after another, same code / side by side",
        lambda: [side_by_side([row], [seed]) for row in f4 for seed in seeds],
        lambda: side_by_side(f4, seeds),
    )
    ratio(
        "ae_cube",
        "a step of f4 / a step of f2 with as many nets (the MMD costs more)",
        lambda: side_by_side(f4, [0, 1]),
        lambda: side_by_side(f2, seeds),
    )
    ratio(
        "lso_mnist",
        "Algorithm 3 from 100 starts: one after another / all at once",
        lambda: lso(100),
        lambda: lso(1),
    )
    time_taken = f"{seconds(lambda: lso(1, 10_000, 500)):.0f} s"
    add("lso_mnist", "10,000 starts × 500 steps of Algorithm 3", time_taken, "", "60 s")
    frozen_epochs()
    thermostats()


def frozen_epochs():
    x = torch.rand(10_000, 1, 32, 32, generator=common.generator(0, "bench"))
    for layers, prior, goal in (("fc", "normal", "1.25 ×"), ("conv", "flow6", "1.5 ×")):
        ratio(
            "frozen_encoder_vae",
            f"an epoch of {layers}/{prior}/L: plain loop (`DataLoader`, `.item()`) / ours",
            lambda: plain_vae(layers, prior, x),
            lambda: our_vae(layers, "L", prior, x),
            goal,
        )
    for encoder, goal in (("PNL", "1.20 ×"), ("NL", "1.25 ×"), ("RKS", "1.28 ×")):
        ratio(
            "frozen_encoder_vae",
            f"an epoch of conv/flow6: encoder L / {encoder} (goal: Table 5.5's)",
            lambda: our_vae("conv", "L", "flow6", x),
            lambda: our_vae("conv", encoder, "flow6", x),
            goal,
        )


def thermostats():
    for plain, ours, chain, goal in (
        ("adam", "nose-hoover", 30, ""),
        ("adam", "nose-hoover", 1, ""),
        ("adam", "langevin", 1, ""),
        ("gradient", "nose-hoover", 30, "0.87 ×"),
    ):
        name = {"adam": "fused Adam", "gradient": "the gradient alone"}[plain]
        other = {"nose-hoover": f"Nosé–Hoover, chain of {chain}", "langevin": "Langevin"}[ours]
        ratio(
            "eae_simmering",
            f"a step of the MNIST encoder (batch 128): {name} / {other}",
            encoder_steps(plain),
            encoder_steps(ours, chain),
            goal,
            repeats=9,
        )


def memory_peaks():
    for script, what, call, goal in (
        ("ae_cube", "18 nets of f4", "side_by_side(cube_rows('f4', 6), [0, 1, 2])", ""),
        ("lso_mnist", "10,000 starts at once", "lso(1, 10_000, 20)", ""),
        ("vae_lj_fluid", "40,000 chains at once", "fluid(0.4, 40_000, 20)", "2 GiB"),
        ("frozen_encoder_vae", "conv/flow6/L, 10,000 images", "our_epoch_of_vae()", ""),
        ("eae_simmering", "the MNIST encoder", "encoder_steps('nose-hoover')()", ""),
    ):
        memory(script, f"memory peak beyond the imports: {what}", call, goal)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--only"]:
        eval(sys.argv[2])
        status = pathlib.Path("/proc/self/status").read_text()  # rusage has the parent's peak, too
        print(status.partition("VmHWM:")[2].split()[0])  # kB
        sys.exit()
    start, head = time.perf_counter(), ["script", "plain way / the script's way", "figure", "range",
                                        "goal"]
    main()
    memory_peaks()
    print(f"\n{torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
          f"{time.perf_counter() - start:.0f} s\n")
    print(common.as_markdown([dict(zip(head, row)) for row in ROWS]))
