"""lso_mnist.py: the mathematics of the document, the null test, and the run as a user sees it."""

import math
import os
import shutil

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import common
import lso_mnist
from helpers import killed, pasted
from lso_mnist import Search


def g(name="test"):
    return common.generator(0, name)


# --- Algorithm 3 ---


def linear(slope):
    return lambda v: (slope * v).sum(1) + 1.5


@pytest.mark.parametrize("relative, change", [(False, -0.3), (True, -0.45)])
def test_algorithm_3_changes_a_linear_error_by_exactly_c(relative, change):
    slope = torch.randn(5, 7, generator=g(), dtype=torch.double)
    v, error = torch.zeros(5, 7, dtype=torch.double), linear(slope)
    end, E, lengths = lso_mnist.algorithm_3(error, v, -0.3, 1, 0.0, math.inf, relative)
    assert torch.allclose(E[1] - E[0], torch.tensor(change, dtype=torch.double))
    assert torch.allclose(end, slope * (change / (slope**2).sum(1))[:, None])  # along D
    assert torch.allclose(lengths[0], -change / slope.norm(dim=1))


def test_guard_shortens_steps_and_tells_the_wanted_length():
    slope = torch.tensor([[1e-3, 0.0], [0.0, 3.0], [0.0, 0.0]])  # flat, steep, without slope
    v = torch.zeros(3, 2)
    end, _, lengths = lso_mnist.algorithm_3(linear(slope), v, -0.3, 1, 0.0, 0.5)
    assert torch.allclose(end, torch.tensor([[-0.5, 0.0], [0.0, -0.1], [0.0, 0.0]]))
    assert torch.allclose(lengths[0], torch.tensor([300.0, 0.1, 0.0]))


def test_a_start_rests_once_it_has_succeeded():
    v = torch.tensor([[0.05], [3.0]])
    end, E, lengths = lso_mnist.algorithm_3(
        lambda v: (v**2).sum(1), v, -1, 9, 0.01, math.inf, relative=True)
    assert end[0] == v[0] and end[1].item() == pytest.approx(3 / 32)  # Polyak's step halves v
    assert (E <= 0.01).sum(0).tolist() == [10, 5]  # at first, and after 5 of 9 steps
    assert (lengths > 0).sum(0).tolist() == [0, 5]


def test_normalised_descent_takes_the_wanted_drop_off_a_linear_loss():
    """With one S for all groups; a parameter without a gradient stays."""
    one, two, idle = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
    slope = torch.tensor([1.0, -2.0, 3.0])
    groups = [{"params": [one, idle]}, {"params": [two]}]
    optimiser = lso_mnist.NormalisedDescent(groups, 0.25)
    (slope @ one + 2 * slope @ two).backward()
    optimiser.step()
    assert (slope @ one + 2 * slope @ two).item() == pytest.approx(-0.25)
    assert two.norm() == 2 * one.norm() and idle.norm() == 0


# --- a search ---


class Reader(torch.nn.Module):
    """A classifier whose output for digit d is the d-th pixel."""

    def forward(self, x):
        return x[:, :10]


def search(starts, **options):
    """A zero and a three, in pixels, by two steps."""
    how = Search(**{"C": -0.1, "guard": 10.0, "attempts": 2, **options})
    box = torch.zeros(196), torch.ones(196)
    digits = torch.tensor([0, 3])
    return lso_mnist.run_search(how, torch.nn.Identity(), Reader(), starts, digits, box, 2, 1.0)


def test_a_search_in_pixels():
    """Starts of 0 need E = 1 brought down; with two steps only the second attempt succeeds."""
    starts = torch.zeros(2, 2, 196)
    starts[1, 0, 0] = starts[1, 1, 3] = 0.95
    starts[:, :, 195] = -2.0  # outside of [0, 1], and no matter to the classifier
    found = search(starts)
    assert found["attempts"].tolist() == [2, 2] and found["solved"].all()
    assert not found["success"].any()  # of the first attempts
    assert torch.allclose(found["outside"], torch.tensor(1 / 196))
    assert found["E, clipped"].tolist() == pytest.approx([0.05**2] * 2, rel=1e-3)
    first = search(starts, attempts=1)
    assert not first["solved"].any() and first["moved"][0] > 0
    assert search(starts, bounded=True)["moved"].tolist() == [0, 0]  # clamping is no move


def test_leaps_that_lower_the_error():
    """(1 - v)^2 is flat near its minimum; a step of |C / D| goes beyond it there."""
    starts = torch.zeros(1, 2, 196)
    starts[0, 0, 0] = 0.89  # E = 0.0121, D = -0.22
    found = search(starts, attempts=1)
    assert found["longest"].tolist() == pytest.approx([0.1 / 0.22, 0.1 / 1.9], rel=1e-3)
    assert found["lower"][0] == 0.5 and math.isnan(found["lower"][1])  # too far, and back


def test_draws_are_the_first_that_are_accepted():
    z = torch.zeros(50, 196)
    z[:, 100] = torch.arange(50.0)  # to tell them apart
    z[7, 3] = z[9, 3] = z[30, 3] = z[20, 5] = 1.0
    found = lso_mnist.draw(torch.nn.Identity(), Reader(), z, torch.arange(20) % 10)
    assert found["solved"].nonzero()[:, 0].tolist() == [3, 5, 13]
    assert torch.equal(found["images"][[3, 13]], z[[7, 9]])
    assert found["draws"][3].item() == pytest.approx(50 / 3)
    assert lso_mnist.cell(found["draws"].mean().item()) == "> 20,000"  # no zero is accepted


# --- data, losses, training ---


@pytest.fixture(scope="module")
def data():
    return lso_mnist.load_data("glyphs", "data", "cpu")


def test_splits_share_no_image_and_pixels_are_means_of_four(data):
    images = torch.cat([x for x, _ in data.values()])
    assert len(images.unique(dim=0)) == len(images) == 14_000
    raw, y = common.glyphs(20, 0)
    mean = raw[5, 0, 12:14, 14:16].mean().item()
    assert data["nets"][0][5, 14 * 6 + 7].item() == pytest.approx(mean)


def test_vae_loss_is_squared_error_and_the_kl_of_torch_distributions():
    net, x = lso_mnist.VAE(3), torch.rand(8, 196, generator=g())
    eps = torch.randn(8, 3, generator=g("eps"))
    mu, std = net.encoder(x)[:, :3], (net.encoder(x)[:, 3:] / 2).exp()
    exact = kl_divergence(Normal(mu, std), Normal(0.0, 1.0)).sum(1).mean()
    error = ((net.decoder(mu + std * eps) - x) ** 2).sum(1).mean()
    assert torch.allclose(lso_mnist.vae_loss(net, x, eps, 0.7), error + 0.7 * exact)


def test_the_gan_loop_learns_a_toy():
    """Pictures with an upper half of some brightness from 0.3 to 0.9, and a black lower one."""
    upper = (torch.arange(196) < 98).float()
    x = upper * (0.3 + 0.6 * torch.rand(400, 1, generator=g("x")))
    torch.manual_seed(0)
    net = lso_mnist.GAN(4)
    lso_mnist.train_gan("toy", net, x, 4, 200, 2e-3, 0.3, g())
    with torch.no_grad():
        drawn = net.decoder(torch.randn(500, 4, generator=g("z")))
    assert drawn[:, :98].mean().item() == pytest.approx(0.6, abs=0.1)
    assert drawn[:, 98:].mean() < 0.03


# --- verdicts ---


def test_shares_are_judged_by_their_intervals():
    def ordered(low, high, n):
        low, high = torch.full((3,), low), torch.full((3,), high)
        return lso_mnist.shares_ordered("", low, high, n, True)["verdict"]

    def always(share, n):
        return lso_mnist.claim_almost_always(torch.full((2,), share), n, True)["verdict"]

    assert ordered(0.95, 1.0, 20) == "open"  # a width of 0 says nothing
    assert ordered(0.95, 1.0, 2000) == "yes" and ordered(1.0, 0.95, 2000) == "no"
    assert lso_mnist.wilson(0.5, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert always(1.0, 50) == "yes" and always(1.0, 30) == "open"  # above 0.963 and 0.940
    assert always(0.9, 200) == "no"


def test_leaps_are_judged_by_the_seeds_that_have_any():
    def row(*shares):
        return lso_mnist.claim_about_leaps(torch.tensor(shares), True)

    assert row(0.7, math.nan, 0.8)["verdict"] == "yes" and row(0.3, 0.2)["verdict"] == "no"
    assert row(0.7, math.nan)["verdict"] == "open"
    assert row(math.nan)["here"] == "no leaps" and row(math.nan)["verdict"] == "open"


# --- the run ---

SMOKE = ["--preset", "smoke"]


def earned(table):
    good = ("reproduced", "fitted", "better", "yes")
    return {row["claim"] for row in table if row["verdict"] in good}


def run(data, *argv, **replaced):
    """(results.json, what claims() was given) of main, functions of the script replaced."""
    seen, claims = [], lso_mnist.claims
    replaced["load_data"] = lambda *rest: data
    replaced["claims"] = lambda *rest: seen.append(rest) or claims(*rest)
    with pytest.MonkeyPatch.context() as patch:
        for name, function in replaced.items():
            patch.setattr(lso_mnist, name, function)
        return lso_mnist.main(argv), seen[0]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("smoke") / "run"
    return folder, *run(data, *SMOKE, "--out", str(folder))


def unit(smoke, name):
    return torch.load(smoke[0] / "units" / f"{name}.pt", weights_only=True)["result"]


def test_smoke_writes_everything(smoke):
    folder, report, _ = smoke
    names = {path.name for path in folder.glob("fig_*.png")}
    assert names == {f"fig_{name}.png" for name in "lso-1 lso-2 methods success walk".split()}
    closing, *others = report["tables"].values()
    assert {row["verdict"] for row in closing} == {"-"} and len(closing) > 15
    assert len(others) == 4 and all("verdict" not in table[0] for table in others)
    found = report["results"]["searches"]["input, constant"]
    assert max(found["solved"]) > max(found["success"]) > 0  # some succeed, more by retrying


def test_searches_are_what_they_say(smoke):
    searches = unit(smoke, "seed0-search-input")
    free, kept = searches["constant"], searches["bounded"]
    assert free["outside"].min() > 0 and kept["outside"].max() == 0
    classifier = lso_mnist.Classifier()
    classifier.load_state_dict(unit(smoke, "seed0-classifier")["weights"])
    for found in (free, kept):
        E = lso_mnist.total_squared_error(classifier(found["images"]), torch.arange(20) % 10)
        frames = lso_mnist.plot_generations(found).axes[0].lines
        assert len(frames) == (E > 0.01).sum()  # by what is shown
    assert torch.equal(E <= 0.01, kept["solved"]) and kept["solved"].any()


@pytest.mark.parametrize("dead", [["LSO-1", "LSO-2", "VAE", "GAN"], ["classifier"]])
def test_null(dead, smoke, data):
    """Untrained decoders or an untrained classifier, in a quick run, earn no row."""
    def train_net(unit_name, name, net, seed, *rest):
        weights = lso_mnist.build(name, net, seed).state_dict()
        if name not in dead:
            weights = unit(smoke, f"seed{seed}-{name}")["weights"]
        return {"weights": weights, "log": torch.ones(1, 1)}

    flags = "--dataset glyphs --seeds 2 --generations 20 --steps 20 --sizes 2 --out null"
    report, given = run(data, *flags.split(), train_net=train_net, plot=lambda *rest: None)
    closing = next(iter(report["tables"].values()))
    assert {row["verdict"] for row in closing} == {"-"}  # glyphs are not the document's digits
    assert earned(lso_mnist.claims(*given)) == set()


def test_each_row_needs_the_nets_that_it_is_about(smoke):
    """As if all had gone as in the document; then one net after the other has not learned."""
    at, quality, _ = smoke[2]
    at, quality = dict(at), dict(quality)
    for key, read in {("input", "constant"): 0.1, ("LSO-2", "constant"): 0.5,
                      ("LSO-1", "constant"): 0.5, ("VAE", "draws"): 0.9}.items():
        at[key] = at[key] | {"read": torch.full((2,), read)}
    for name in ("LSO-1", "LSO-2", "VAE"):
        quality[name] = quality[name] | {"train": torch.full((2,), 0.001)}

    def rows(**worse):
        return earned(lso_mnist.claims(at, quality | worse, 1000))

    every = rows()
    reading = {claim for claim in every if "read" in claim}
    assert len(reading) == 3 and len(every) > 5
    assert rows(judge={"accuracy": torch.tensor([0.1])}) == every - reading
    assert every - rows(VAE=smoke[2][1]["VAE"]) == {"VAE draws are read more often than LSO-2"}


def test_kill_and_continue_equals_an_undisturbed_run(smoke, data):
    """A real kill -9 in the middle of a net; then the same."""
    shutil.copytree(smoke[0], "run")
    for name in ("results.json", "units/seed0-VAE.pt"):
        os.remove(f"run/{name}")
    killed("import lso_mnist; lso_mnist.main()", "seed0-VAE.1.checkpoint", *SMOKE)
    report, _ = run(data, *SMOKE, "--out", "run", plot=lambda *rest: None)
    assert report["results"] == smoke[1]["results"] and report["tables"] == smoke[1]["tables"]
    again = torch.load("run/units/seed0-VAE.pt")["result"]["weights"]  # its search was there
    first = unit(smoke, "seed0-VAE")["weights"]
    assert all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("argv", ["--train-steps 0", "--generations 25", "--sizes 197"])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    assert argv.split()[0] in refused(lso_mnist.main, argv.split()) and os.listdir() == []


def test_the_copy_test():
    """Algorithm 3, the VAE with its loss, the GAN with its loop, the judge: pasted alone."""
    note = pasted("lso_mnist", ["VAE", "GAN", "Judge", "reconstruction_error", "kl_to_standard",
                                "vae_loss", "generator_loss", "discriminator_loss", "train_gan",
                                "algorithm_3"], "BATCH = 50")
    note["common"] = common  # all that the GAN's loop needs of it: its steps
    x = torch.rand(100, 196, generator=g())
    assert note["Judge"]()(x).shape == (100, 10)
    assert note["train_gan"]("", note["GAN"](2), x, 2, 3, 1e-3, 0.3, g()).isfinite().all()
    vae = note["VAE"](2)
    note["vae_loss"](vae, x, torch.randn(100, 2, generator=g()), 0.2).backward()
    target = vae.decoder(torch.zeros(1, 2)).detach()

    def error(v):
        return ((vae.decoder(v) - target) ** 2).sum(1)

    start = torch.full((4, 2), 0.5)
    _, E, _ = note["algorithm_3"](error, start, -0.5, 200, 1e-4, 1.0, True)
    assert (E[0] > 1e-4).all() and (E[-1] <= 1e-4).all()
