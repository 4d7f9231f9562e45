"""Speed and memory against plain baselines, by hand: `python tests/bench.py > bench.md`.

A ratio is one time over another, taken in turn: median and range of five rounds. Where these range
over a factor of two the machine is too noisy, and no figure is given. About five minutes.
"""
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ae_cube  # noqa: E402
import common  # noqa: E402
import eae_simmering  # noqa: E402
import frozen_encoder_vae  # noqa: E402
import vae_lj_fluid  # noqa: E402

ROUNDS = 5
ROWS = []  # of the table


def add(script, what, figure, spread="", goal=""):
    ROWS.append(dict(script=f"{script}.py", measured=what, figure=figure, range=spread, goal=goal))
    print(" | ".join(ROWS[-1].values()), file=sys.stderr, flush=True)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(script, what, over, under, goal):
    """The time of `over` by that of `under`, after one call of each."""
    over()
    under()
    ratios = sorted(seconds(over) / seconds(under) for _ in range(ROUNDS))
    figure = f"{statistics.median(ratios):.2f} ×"
    if ratios[-1] > 2 * ratios[0]:
        figure = "machine too noisy"
    add(script, what, figure, f"{ratios[0]:.2f} to {ratios[-1]:.2f}", goal)


def sampler(folder, chains=5000, sweeps=250):
    program, source = f"{folder}/metropolis", pathlib.Path(__file__).with_name("metropolis.cpp")
    subprocess.run(["g++", "-O3", "-o", program, source], check=True)
    command = [program, "0.4", str(chains), str(sweeps), "1"]
    g, pair = common.generator(0, "bench"), vae_lj_fluid.lennard_jones
    ratio("vae_lj_fluid", "sampling 5,000 systems: plain C++ (`-O3`, one core) / all at once",
          lambda: subprocess.run(command, capture_output=True, check=True),
          lambda: vae_lj_fluid.metropolis(0.4, chains, sweeps, pair, g, compile=True), "≥ 5 ×")


def cube(model, steps=40):
    rows = []
    for snr in ae_cube.SNRS[model]:
        rows += ae_cube.rows_of(model, snr, 6)

    def one_after_another():
        for row in rows:
            for seed in range(3):
                ae_cube.train([row], [seed], "bench", steps, 5000)

    ratio("ae_cube", f"{len(rows) * 3} nets of {model}: one after another / side by side",
          one_after_another, lambda: ae_cube.train(rows, range(3), "b", steps, 5000), "≥ 4 ×")


def vae_epoch(layers, prior, goal, n=5000):
    g = common.generator(0, "bench")
    x = torch.rand(n, 1, 32, 32, generator=g)

    def plain():
        """In the style of pytorch/examples: DataLoader, plain Adam, .item() in each step."""
        vae = frozen_encoder_vae.build(layers, "L", [prior], 1, 0)
        vae = vae.to(memory_format=torch.contiguous_format)
        optimiser = torch.optim.Adam(vae.parameters(), lr=1e-3)
        for (batch,) in DataLoader(TensorDataset(x), 256, shuffle=True):
            optimiser.zero_grad()
            eps = torch.randn(len(batch), 16)
            RE, RT = frozen_encoder_vae.loss_terms(vae, batch, batch, eps, "as-published")
            loss = (RE - RT).mean()
            loss.backward()
            loss.item()
            optimiser.step()

    def ours():
        vae = frozen_encoder_vae.build(layers, "L", [prior], 1, 0)
        frozen_encoder_vae.train("bench", vae, x, "as-published", 1, 256, g)

    ratio("frozen_encoder_vae", f"an epoch of {layers}, {prior}, L: `DataLoader` loop / ours",
          plain, ours, goal)


def thermostat(steps=100):
    x = common.glyphs(1000, 0)[0].flatten(1)  # (n, 784)
    encoder, decoder = eae_simmering.digit_nets(784)
    decoder.requires_grad_(False)
    optimiser = torch.optim.Adam(encoder.parameters(), fused=True)
    chain = eae_simmering.NoseHoover(encoder, T=1e-7, m=1.0, dt=0.5, tau=10.0, chain=30)

    def potential():
        batch = x[torch.randint(len(x), (128,))]
        return (decoder(encoder(batch)) - batch).square().mean()

    def descend():
        for _ in range(steps):
            optimiser.zero_grad()
            potential().backward()
            optimiser.step()

    ratio("eae_simmering", "a step of MNIST's encoder: Nosé–Hoover, chain of 30 / fused Adam",
          lambda: [chain.step(potential) for _ in range(steps)], descend, "≤ 1.15 ×")


def memory(script, folder):
    code = f"import {script}; {script}.main(); print(open('/proc/self/status').read())"
    command = [sys.executable, "-c", code, "--preset", "smoke", "--out", f"{folder}/{script}"]
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=ROOT), text=True, check=True,
                          stdout=subprocess.PIPE)
    peak = done.stdout.rpartition("VmHWM:")[2].split()[0]  # kB
    add(script, "memory peak of the smoke run", f"{int(peak) / 2**20:.2f} GiB")


def main():
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        sampler(folder)
        cube("f2")
        cube("f4")
        vae_epoch("fc", "normal", "≥ 1.25 ×")
        vae_epoch("conv", "flow6", "≥ 1.5 ×")
        thermostat()
        for path in sorted(ROOT.glob("*_*.py")):
            memory(path.stem, folder)
    text = (f"# Speed and memory\n\nMade by `python tests/bench.py`: each ratio's times are taken "
            f"in turn.\n\n*{torch.get_num_threads()} threads, torch {torch.__version__}; median "
            f"and range of {ROUNDS} rounds; {time.time() - start:.0f} s*\n\n")
    text += common.as_markdown(ROWS)
    print(text, end="")


if __name__ == "__main__":
    main()
