"""A script of the house in small: a random walk in each unit, and a net that follows it."""

import common
import torch

PRESETS = {"smoke": dict(steps=30), "quick": dict(steps=300), "paper": dict(steps=3000)}


def walk(name, steps, seed):
    """A net that is trained towards points of a random walk."""
    g = common.generator(seed, name)
    torch.manual_seed(seed)
    net, place = torch.nn.Linear(2, 2), torch.zeros(2)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    log = torch.zeros(steps, 2)
    for step in common.steps(name, steps, log, ["loss", "size"], net, optimiser, g, place):
        place += torch.randn(2, generator=g)
        loss = ((net(torch.ones(2)) - place) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if name == "bad":
            loss = loss / 0
        log[step] = torch.stack([loss, place.norm()]).detach()
    return {"log": log, "weights": net.state_dict()}


def main(argv=None):
    parser = common.Parser("A toy: π ± 1.", PRESETS)
    parser.add("--steps", type=common.number(int, 1, 10**6), help="steps of each walk")
    parser.add("--units", nargs="+", default=["a", "b", "c"], help="names of walks")
    parser.add("--level", type=common.number(float, -100, 100), default=0.5, help="a number")
    args = parser.parse(argv)
    with common.Run(__file__, args, "walks", additive=["units"]) as run:
        found = run.units(args.units, lambda name: walk(name, args.steps, args.seed))
        fig, (ax,) = common.panels(1, 1)
        for name, unit in found.items():
            ax.plot(unit["log"][:, 0], label=name)
        run.figure(fig, "walks", "Walks")
        results = {name: unit["log"][-1] for name, unit in found.items()}
        metrics = [
            {"unit": name, "step": step, "loss": row[0].item()}
            for name, unit in found.items()
            for step, row in enumerate(unit["log"])
        ]
        rows = [common.reproduced("σ² of a walk é", 1.0, [1.05, 0.97])]
        return run.finish(results, rows, {}, metrics)


if __name__ == "__main__":
    main()
