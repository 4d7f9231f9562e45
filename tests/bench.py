"""Ratios against plain baselines, measured in one run, by hand: `python tests/bench.py`.

Each line is the time of the plain way over that of the script's way, in turn, median of three.
"""

import pathlib
import statistics
import sys
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import ae_cube  # noqa: E402
import common  # noqa: E402
import lso_mnist  # noqa: E402


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ratio(what, plain, ours, repeats=3):
    """Print the median of plain / ours, after one call of each to warm up."""
    plain(), ours()
    pairs = [(seconds(plain), seconds(ours)) for _ in range(repeats)]
    ratios = sorted(a / b for a, b in pairs)
    print(f"{what:72s} {statistics.median(ratios):5.1f} x   ({ratios[0]:.1f} to {ratios[-1]:.1f})")


def one_epoch(points, seeds):
    ae_cube.train(points, seeds, "bench", 2, 5000)


def plain_loop(epochs=2, n=5000):
    """f2 at one point as a textbook loop: nn.Sequential, DataLoader, .item() at every step."""
    x = ae_cube.cube_surface(n, common.generator(0, "bench"))
    layers = [3, 64, 64, 6, 64, 64, 3]
    half = [
        [m for a, b in zip(part, part[1:]) for m in (torch.nn.Linear(a, b), torch.nn.Tanh())][:-1]
        for part in (layers[:4], layers[3:])
    ]
    encoder, decoder = (torch.nn.Sequential(*part) for part in half)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x), ae_cube.BATCH, shuffle=True
    )
    log = []
    for _ in range(epochs):
        for (batch,) in loader:
            y = encoder(batch)
            x_hat = decoder(y + 10**-0.75 * torch.randn_like(y))
            mse, penalty = (
                ((x_hat - batch) ** 2).mean(),
                (y.mean(0) ** 2 + (y.var(0) - 1) ** 2).mean(),
            )
            optimiser.zero_grad()
            (mse + penalty).backward()
            optimiser.step()
            log.append(mse.item())


def lso(groups, starts=100, steps=20):
    """Algorithm 3 on LSO-2's nets for `starts` starts, in so many groups; untrained nets do."""
    g = common.generator(0, "bench")
    nets = lso_mnist.build("LSO-2", lso_mnist.MODELS["LSO-2"], 1, g)
    classifier = lso_mnist.MLP([196, 64, 10], 1, g, out=torch.sigmoid)
    nets.requires_grad_(False), classifier.requires_grad_(False)
    digits = torch.arange(starts)[None] % 10
    for v, wanted in zip(
        torch.randn(1, starts, 20, generator=g).chunk(groups, 1), digits.chunk(groups, 1)
    ):
        lso_mnist.algorithm_3(
            lambda v: lso_mnist.total_squared_error(classifier(nets["decoder"](v)), wanted),
            v,
            lso_mnist.RULES["fine"][0],
            steps,
        )


if __name__ == "__main__":
    print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}\n")
    sweep, seeds = ae_cube.sweep("f2"), [0, 1, 2]
    ratio(
        "ae_cube f2, 16 points x 3 seeds: one after another / side by side",
        lambda: [one_epoch([p], [s]) for p in sweep for s in seeds],
        lambda: one_epoch(sweep, seeds),
    )
    ratio(
        "ae_cube f2, 16 points x 3 seeds: textbook loops / side by side",
        lambda: [plain_loop() for _ in sweep for _ in seeds],
        lambda: one_epoch(sweep, seeds),
    )
    mmd = ae_cube.sweep("f4")
    ratio(
        "ae_cube f4, 18 points x 3 seeds: one after another / side by side",
        lambda: [one_epoch([p], [s]) for p in mmd for s in seeds],
        lambda: one_epoch(mmd, seeds),
    )
    ratio(
        "lso_mnist, Algorithm 3 from 100 starts: one after another / all at once",
        lambda: lso(100),
        lambda: lso(1),
    )
    print(f"lso_mnist, 10,000 starts x 500 steps: {seconds(lambda: lso(1, 10_000, 500)):.0f} s")
