"""lso_mnist.py: the algorithms and measures of the document, and the run as a user sees it."""

import json
import math
import os
import pathlib
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import MultivariateNormal, Normal, kl_divergence

import first_edition as common
import lso_mnist
from conftest import ROOT

RULES = lso_mnist.RULES
WANTED = {  # constant and share of E in the wanted drop, as the docstring says
    "constant": (0.01, 0),
    "patient": (0.01, 0),
    "fine": (0.001, 0),
    "proportional": (0, 0.1),
    "polyak": (0, 1),
}


def g(name="test"):
    return common.generator(0, name)


def frozen(sizes, repeats, name, **kwargs):
    return lso_mnist.MLP(sizes, repeats, g(name), **kwargs).requires_grad_(False)


# --- Algorithms 1, 2 and 3 ---


def test_algorithms_1_and_2_as_the_documents_loops_equal_autograd():
    """Decoder and classifier in a row, node by node; E is the total squared error."""
    decoder = lso_mnist.MLP([2, 3, 4], 1, g("d"), out=torch.sigmoid).double()
    classifier = lso_mnist.MLP([4, 3, 10], 1, g("c"), out=torch.sigmoid).double()
    v = torch.randn(1, 1, 2, generator=g(), dtype=torch.double, requires_grad=True)
    E = lso_mnist.total_squared_error(classifier(decoder(v)), torch.tensor([[7]])).sum()
    E.backward()

    weights = [w[0].tolist() for net in (decoder, classifier) for w in net.weights]
    biases = [b[0, 0].tolist() for net in (decoder, classifier) for b in net.biases]
    layers = [v[0, 0].tolist()]
    for w, b in zip(weights, biases):
        before = layers[-1]
        total = [sum(x * row[m] for x, row in zip(before, w)) + b[m] for m in range(len(b))]
        layers.append([1 / (1 + math.exp(-x)) for x in total])
    wanted = [float(m == 7) for m in range(10)]
    node = [2 * (o - t) * o * (1 - o) for o, t in zip(layers[-1], wanted)]
    nets = [(net, i) for net in (decoder, classifier) for i in range(len(net.weights))]
    for (net, i), w, before in zip(nets[::-1], weights[::-1], layers[-2::-1]):
        # Algorithm 2: of the biases the nodes' own, of a weight from N to M: N times that of M
        assert torch.allclose(net.biases[i].grad[0, 0], torch.tensor(node, dtype=torch.double))
        grad = [[n * d for d in node] for n in before]
        assert torch.allclose(net.weights[i].grad[0], torch.tensor(grad, dtype=torch.double))
        # Algorithm 1: of a node N: sum over M of (weight N to M) * (derivative of M), activation
        node = [sum(w[n][m] * d for m, d in enumerate(node)) for n in range(len(before))]
        if before is not layers[0]:
            node = [d * x * (1 - x) for d, x in zip(node, before)]
    assert torch.allclose(v.grad[0, 0], torch.tensor(node, dtype=torch.double))


@pytest.mark.parametrize("rule", RULES)
def test_algorithm_3_changes_a_linear_error_by_exactly_c(rule):
    slope = torch.randn(2, 5, 7, generator=g(), dtype=torch.double)
    trace = []
    v = torch.zeros(2, 5, 7, dtype=torch.double)
    lso_mnist.algorithm_3(lambda v: (slope * v).sum(-1) + 1.5, v, RULES[rule][0], 3, trace)
    constant, share = WANTED[rule]
    E = [E for _, E, _ in trace]
    for before, after in zip(E, E[1:]):
        open_ = before > lso_mnist.THRESHOLD
        assert torch.allclose((after - before)[open_], -(constant + share * before)[open_])
    assert torch.allclose(trace[0][2], (slope**2).sum(-1))
    step = trace[1][0] - trace[0][0]
    assert torch.allclose(step, -slope * ((constant + share * 1.5) / trace[0][2])[..., None])


def nets_and_error(dtype=torch.double):
    decoder = frozen([4, 16, 20], 3, "decoder", out=torch.sigmoid).to(dtype)
    classifier = frozen([20, 16, 10], 3, "classifier", out=torch.sigmoid).to(dtype)
    digits = (torch.arange(20) % 10).repeat(3, 1)
    v = torch.randn(3, 20, 4, generator=g(), dtype=dtype)

    def error(v, digits):
        return lso_mnist.total_squared_error(classifier(decoder(v)), digits)

    return decoder, classifier, digits, v, error


def test_a_batch_gives_what_each_start_gives_alone():
    decoder, classifier, digits, v, error = nets_and_error()
    rule = RULES["constant"][0]
    together, success, _ = lso_mnist.algorithm_3(lambda v: error(v, digits), v, rule, 8)
    for r in range(3):
        parts = [frozen([1, 1], 1, "x") for _ in range(2)]
        for part, net in zip(parts, (decoder, classifier)):
            part.weights = torch.nn.ParameterList(w[r : r + 1] for w in net.weights)
            part.biases = torch.nn.ParameterList(b[r : r + 1] for b in net.biases)
            part.out = torch.sigmoid
        for n in (0, 7, 19):
            alone, _, _ = lso_mnist.algorithm_3(
                lambda v: lso_mnist.total_squared_error(
                    parts[1](parts[0](v)), digits[r : r + 1, n : n + 1]
                ),
                v[r : r + 1, n : n + 1],
                rule,
                8,
            )
            assert torch.allclose(alone[0, 0], together[r, n], rtol=1e-7)
            assert not torch.allclose(together[r, n], v[r, n])


def test_zero_gradient_stops_nothing_and_moves_nothing():
    v = torch.tensor([[[1.0, 2.0], [0.0, 0.0], [3.0, 3.0]]])
    weight = torch.tensor([[1.0, 0.0, 1.0]])  # the second start sees a flat error
    end, success, stuck = lso_mnist.algorithm_3(
        lambda v: weight * (v**2).sum(-1) + (1 - weight), v, lambda E: -0.5 * E, 200
    )
    assert torch.equal(end[0, 1], v[0, 1]) and success[0, 1] == -1
    assert stuck.tolist() == [[False, True, False]]
    assert (success[0, [0, 2]] > 0).all() and torch.isfinite(end).all()
    assert ((end[0, [0, 2]] ** 2).sum(-1) <= lso_mnist.THRESHOLD).all()


def test_a_start_rests_once_it_has_succeeded():
    trace = []
    v = torch.tensor([[[0.05], [3.0]]])
    end, success, _ = lso_mnist.algorithm_3(lambda v: v[..., 0] ** 2, v, lambda E: -E, 9, trace)
    assert success.tolist() == [[0, 5]] and end[0, 0, 0] == v[0, 0, 0]  # Polyak halves v
    assert [E[0, 1].item() for _, E, _ in trace][:4] == pytest.approx([9, 9 / 4, 9 / 16, 9 / 64])


def test_frozen_weights_do_not_change():
    decoder, classifier, digits, v, error = nets_and_error(torch.float)
    before = [p.clone() for net in (decoder, classifier) for p in net.parameters()]
    lso_mnist.generate(
        error, lambda n, g: v[:, :n], digits, RULES["constant"][0], 30, 2, g()
    )
    after = [p for net in (decoder, classifier) for p in net.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after))


def test_the_two_thresholds_of_the_document_are_one():
    output, digits = torch.rand(3, 5, 10, generator=g()), torch.arange(15).view(3, 5) % 10
    E = lso_mnist.total_squared_error(output, digits)
    mse = ((output - torch.eye(10)[digits]) ** 2).mean(-1)
    assert torch.allclose(E, 10 * mse) and lso_mnist.THRESHOLD == pytest.approx(10 * 0.001)


def test_retries_until_success_and_their_count():
    """Starts at 0 lie on a plateau; the others need four steps. What fails starts again."""
    digits = torch.arange(4).repeat(2, 1)
    fails = torch.tensor([[0, 1, 2, 0], [3, 0, 0, 9]])  # attempts that each generation will lose
    drawn, asked = torch.zeros(2, 4, dtype=torch.long), []

    def draw(n, generator):
        return torch.full((2, n, 1), -1.0)  # replaced below

    def error(v, wanted):
        asked.append(wanted.clone())
        return (v[..., 0] - 1) ** 2

    def algorithm(error, v, rule, steps, trace=None):
        error(v)
        success = torch.full(v.shape[:2], -1)
        for r in range(2):
            for i, d in enumerate(asked[-1][r].tolist()):
                success[r, i] = 4 if drawn[r, d] == fails[r, d] else -1  # once solved, it stays
                v[r, i] = 100 * r + d + drawn[r, d] / 10
                drawn[r, d] += 1
        return v, success, success < 0

    real, lso_mnist.algorithm_3 = lso_mnist.algorithm_3, algorithm
    try:
        out = lso_mnist.generate(error, draw, digits, RULES["constant"][0], 7, 5, g())
    finally:
        lso_mnist.algorithm_3 = real
    assert out["attempts"].tolist() == [[1, 2, 3, 1], [4, 1, 1, 5]]
    assert out["steps"].tolist() == [[4, 11, 18, 4], [25, 4, 4, 35]]
    assert out["solved"].tolist() == [[True] * 4, [True] * 3 + [False]]
    assert out["first"].tolist() == [[4, -1, -1, 4], [-1, 4, 4, -1]]
    expected = [[0, 1.1, 2.2, 3], [100.3, 101, 102, 103.4]]
    assert torch.allclose(out["v"][..., 0], torch.tensor(expected))
    scores = lso_mnist.success_scores(
        {key: value.repeat(1, 5)[:, :20] for key, value in out.items() if key != "v"}
    )
    assert scores["success"]["mean"] == 0.5 and scores["attempts"] == pytest.approx(18 / 8)
    assert len(scores["attempts by digit"]) == 10


def test_retries_continue_after_a_kill(tmp_path, monkeypatch):
    decoder, classifier, digits, _, error = nets_and_error(torch.float)
    codes = torch.randn(3, 50, 4, generator=g("codes"))

    def draw(n, generator):
        return lso_mnist.starts("normal", codes, n, generator)

    def run(stop=None):
        checkpoint, calls = common.Checkpoint(tmp_path / "lso.checkpoint", "cpu"), []
        checkpoint.every = 0

        def watched(v, wanted):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return error(v, wanted)

        return lso_mnist.generate(
            watched, draw, digits, RULES["constant"][0], 9, 5, g("kill"), "", checkpoint
        ), len(calls)

    with pytest.raises(KeyboardInterrupt):
        run(stop=35)  # in the fourth attempt
    continued, calls = run()
    assert calls == 20  # the fourth and the fifth attempt, of ten evaluations each
    os.remove(tmp_path / "lso.checkpoint")
    whole, _ = run()
    assert all(torch.equal(continued[key], value) for key, value in whole.items())


def test_draws_are_algorithm_3_without_a_step():
    v = torch.randn(1, 50, 3, generator=g())
    end, success, _ = lso_mnist.algorithm_3(lambda v: v[..., 0].abs(), v, None, 0)
    assert torch.equal(end, v) and torch.equal(success >= 0, v[..., 0].abs() <= 0.01)


def test_starts_look_like_the_codes():
    codes = torch.randn(2, 500, 3, generator=g()) * torch.tensor([1.0, 5.0, 0.1]) + 2
    normal = lso_mnist.starts("normal", codes, 20_000, g("n"))
    assert torch.allclose(normal.mean(1), codes.mean(1), atol=0.1)
    assert torch.allclose(normal.std(1), codes.std(1), rtol=0.03)
    box = lso_mnist.starts("box", codes, 20_000, g("b"))
    assert (box >= codes.amin(1, keepdim=True)).all() and (box <= codes.amax(1, keepdim=True)).all()
    assert torch.allclose(box.std(1) * 12**0.5, codes.amax(1) - codes.amin(1), rtol=0.03)


# --- data and objectives ---


def test_halving(monkeypatch):
    def images(dataset, train, folder, device):
        n = 3 if train else 2
        x = torch.arange(784.0).view(1, 1, 28, 28) + torch.arange(n).view(n, 1, 1, 1)
        return x + 1000 * train, torch.arange(n) + 5 * train

    monkeypatch.setattr(common, "images", images)
    monkeypatch.setattr(lso_mnist, "MODEL_IMAGES", 2)
    for how in ("pool", "stride"):
        data = lso_mnist.load_data("mnist", how, "data", "cpu")
        assert [y.tolist() for _, y in data.values()] == [[5, 6], [7], [0, 1]]
        assert list(data) == ["models", "judge", "test"]
        for name, first in (("models", 1000), ("judge", 1002), ("test", 0)):
            x = data[name][0].view(-1, 14, 14)[0] - first
            if how == "pool":
                assert x[0, 0] == (0 + 1 + 28 + 29) / 4
            else:
                assert x[3, 5] == 28 * 6 + 10


def rows_as_bytes(x):
    return {row.numpy().tobytes() for row in x}


@pytest.mark.parametrize("dataset", ["glyphs", "mnist"])
def test_the_judge_shares_no_image_with_the_models(dataset, request):
    if dataset == "mnist":
        request.getfixturevalue("mnist")
    data = lso_mnist.load_data(dataset, "pool", "data", "cpu")
    sets = {name: rows_as_bytes(x) for name, (x, y) in data.items()}
    assert len(data["models"][0]) == lso_mnist.MODEL_IMAGES
    assert not sets["judge"] & sets["models"] and not sets["test"] & (sets["models"])
    assert not sets["judge"] & sets["test"]


@pytest.fixture
def mnist():
    folder = ROOT.parent / "shared" / "data" / "MNIST"
    if not folder.exists():
        pytest.skip("no real MNIST beside the checkout")
    shutil.copytree(folder, "data/MNIST")


@pytest.mark.parametrize(
    "downsample, mean_image, five, twenty",
    [("pool", 0.050, 0.0295, 0.0130), ("stride", 0.065, 0.0426, 0.0224)],
)
def test_pca_of_real_mnist_meets_the_known_errors(downsample, mean_image, five, twenty, mnist):
    x = lso_mnist.load_data("mnist", downsample, "data", "cpu")["models"][0]
    first = x[:1000]
    assert ((first - first.mean(0)) ** 2).mean().item() == pytest.approx(mean_image, rel=0.02)
    assert lso_mnist.pca_mse(first, 5)[0] == pytest.approx(five, rel=0.02)
    assert lso_mnist.pca_mse(x, 20)[0] == pytest.approx(twenty, rel=0.02)


def test_pca_equals_the_singular_values():
    x = torch.randn(300, 12, generator=g()) @ torch.randn(12, 12, generator=g("m")) + 3
    s = torch.linalg.svdvals((x - x.mean(0)).double())
    for k in (1, 5, 11):
        fit, other = lso_mnist.pca_mse(x, k, x[:50])
        assert fit == pytest.approx((s[k:] ** 2).sum().item() / x.numel(), rel=1e-4)
        assert other == pytest.approx(lso_mnist.pca_mse(x, k, x[:50])[1])
    _, exact = lso_mnist.pca_mse(x, 11, x.mean(0, keepdim=True))
    assert exact == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("noise", ["none", "unit", "learned"])
def test_autoencoder_loss(noise):
    """The sum of squares plus beta times the KL of torch.distributions, at zero reconstruction."""
    model = lso_mnist.Model(3, beta=0.7, noise=noise)
    out = torch.randn(2, 4, 6 if noise == "learned" else 3, generator=g())

    class Encoder(torch.nn.Module):
        def forward(self, x):
            return out

    class Decoder(torch.nn.Module):
        def forward(self, z):
            self.z = z
            return torch.zeros(2, 4, 196)

    nets = torch.nn.ModuleDict({"encoder": Encoder(), "decoder": Decoder()})
    loss = lso_mnist.autoencoder_loss(nets, model, torch.full((2, 4, 196), 0.5), g("eps"))
    mu, std = out[..., :3], (out[..., 3:] / 2).exp() if noise == "learned" else torch.ones(2, 4, 3)
    kl = kl_divergence(Normal(mu, std), Normal(0.0, 1.0)).sum(-1).mean(-1)
    assert torch.allclose(loss, 196 * 0.25 + 0.7 * kl, rtol=1e-5)
    eps = torch.randn(mu.shape, generator=g("eps"))
    assert torch.allclose(nets["decoder"].z, mu if noise == "none" else mu + std * eps)


def test_gan_losses():
    """A linear discriminator has the slope w everywhere: the penalty is r1/2 |w|^2."""
    w = torch.randn(2, 196, 1, generator=g())
    nets = torch.nn.ModuleDict({
        "decoder": frozen([3, 196], 2, "G", out=torch.sigmoid),
        "discriminator": frozen([196, 1], 2, "D"),
    })
    nets["discriminator"].weights[0] = torch.nn.Parameter(w)
    x, z = torch.rand(2, 5, 196, generator=g("x")), torch.randn(2, 5, 3, generator=g("z"))
    real, fake = x @ w, nets["decoder"](z) @ w
    loss = lso_mnist.discriminator_loss(nets, x, z, r1=3.0)
    plain = (-torch.sigmoid(real).log() - (1 - torch.sigmoid(fake)).log()).mean((1, 2))
    assert torch.allclose(loss, plain + 1.5 * (w**2).sum((1, 2)), rtol=1e-3)
    expected = -torch.sigmoid(fake).log().mean((1, 2))
    terms = lso_mnist.objectives("GAN", lso_mnist.Model(3), nets, x, None, g("z"))
    net, generator_loss = terms["generator"]
    assert net is nets["decoder"] and terms["discriminator"][0] is nets["discriminator"]
    assert torch.allclose(generator_loss(torch.zeros(2, 5)), expected, rtol=1e-3)


def test_the_judge_is_trained_on_shifted_images():
    x, seen = torch.rand(1, 40, 196, generator=g()), []

    def judge(images):
        seen.append(images)
        return torch.zeros(40, 10)

    loss = lso_mnist.judge_loss(judge, x, torch.arange(40)[None] % 10, g("shift"))
    assert loss.item() == pytest.approx(math.log(10))
    shifts = set()
    for image, shown in zip(x[0].view(-1, 14, 14), seen[0].view(-1, 14, 14)):
        found = [
            (i, j)
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if torch.equal(shown, image.roll((i, j), (0, 1)))
        ]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) == 9


# --- measures ---


@pytest.mark.parametrize("k, n", [(64, 100), (82, 100), (0, 10), (100, 100), (1, 3)])
def test_wilson_interval_equals_scipy(k, n):
    from scipy.stats import binomtest

    ours = lso_mnist.wilson(k, n)
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert ours == pytest.approx((theirs.low, theirs.high), abs=2e-5)


def test_frechet_distance_of_known_gaussians():
    from scipy.linalg import sqrtm

    a = MultivariateNormal(torch.zeros(3), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    torch.manual_seed(0)
    x = a.sample((200_000,))
    y = x * torch.tensor([2.0, 0.5, 1.0]) + torch.tensor([3.0, 0.0, 0.0])
    assert lso_mnist.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert lso_mnist.frechet_distance(x, y) == pytest.approx(9 + 1 + 1, rel=0.02)
    y = x[:500] @ torch.randn(3, 3, generator=g()) + 1
    A, B = (torch.cov(s.T.double()).numpy() for s in (x, y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + (A + B - 2 * sqrtm(A @ B)).trace().real
    assert lso_mnist.frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)


def test_judge_scores_of_known_images():
    class Features(torch.nn.Module):
        def forward(self, x):
            return x[:, :2]

    class Head(torch.nn.Module):
        """Reads the first pixel as the digit, certain to 0.7."""

        def forward(self, f):
            p = torch.full((len(f), 10), 0.3 / 9)
            return p.scatter(1, (f[:, :1] * 10).round().long(), 0.7).log()

    reader = torch.nn.Sequential(Features(), Head())

    x = torch.zeros(2, 30, 196)
    x[:, :, 0] = (torch.arange(30) % 10) / 10
    x[:, 10:20, 5] = 3.0  # the second ten lie 3 from the first, the third 4: a triangle
    x[:, 20:, 6] = 4.0
    x[1, :3, 0] = 0.9  # three digits misread
    train, real = x[0, :10], torch.rand(50, 2, generator=g())
    scores = lso_mnist.judge_scores(reader, x, real, train)
    expected = common.mean_std(torch.tensor([1, 0.9]))
    assert scores["read"]["mean"] == pytest.approx(expected["mean"])
    assert scores["read"]["std"] == pytest.approx(expected["std"])
    assert scores["confidence"]["mean"] == pytest.approx(0.7, abs=1e-4)
    alone = lso_mnist.judge_scores(reader, x[:1], real, train)
    assert alone["nearest"]["mean"] == pytest.approx((0 + 3 + 4) / 3, rel=1e-4)
    assert alone["diversity"]["mean"] == pytest.approx((3 + 4 + 5) / 3, rel=1e-4)
    assert alone["frechet"] > 0 and alone["read"]["std"] is None


def test_real_digits_come_in_turn_and_are_left_out_of_the_rest():
    y = torch.randint(10, (600,), generator=g())
    x = torch.arange(600.0)[:, None].expand(-1, 196)
    shown, others = lso_mnist.real_digits(x, y, 7)
    assert y[shown[0, :, 0].long()].tolist() == list(range(10)) * 7
    assert shown.shape == (1, 70, 196) and len(others) == 530
    assert not set(shown[0, :, 0].tolist()) & set(others[:, 0].tolist())
    assert lso_mnist.real_digits(x, y, 10**6)[1].shape[0] >= 300


def test_clearly_more_means_two_standard_errors():
    def value(mean, std, n=4):
        return {"mean": mean, "std": std, "n": n}

    assert lso_mnist.clearly_more(value(2.0, 0.6), value(1.0, 0.6))  # error 0.424
    assert not lso_mnist.clearly_more(value(1.8, 0.6), value(1.0, 0.6))
    assert lso_mnist.clearly_more(value(1.1, None, 1), value(1.0, None, 1))
    assert not lso_mnist.clearly_more(value(1.0, None, 1), value(1.0, None, 1))


@pytest.mark.parametrize("noise", ["none", "learned"])
def test_reconstruction_row(noise):
    model = lso_mnist.Model(4, images=20, noise=noise)
    nets = lso_mnist.build("x", model, 2, g()).requires_grad_(False)
    x, x_test = torch.rand(30, 196, generator=g("x")), torch.rand(30, 196, generator=g("y"))
    row = lso_mnist.reconstruction_row("x", nets, model, x, x_test)
    assert (row["row"], row["size"], row["images"]) == ("x", 4, 20)
    assert [row["pca_train"], row["pca_test"]] == lso_mnist.pca_mse(x[:20], 4, x_test)
    for key, y in (("train", x[:20]), ("test", x_test)):
        mse = torch.zeros(2)
        for r in range(2):
            h = y
            for net in (nets["encoder"], nets["decoder"]):
                for i, (w, b) in enumerate(zip(net.weights, net.biases)):
                    h = (torch.sigmoid(h) if i else h) @ w[r] + b[r, 0]
                h = h[:, :4] if net is nets["encoder"] else h  # the mean codes of a VAE
            mse[r] = F.mse_loss(torch.sigmoid(h), y)
        assert row[key]["mean"] == pytest.approx(mse.mean().item(), rel=1e-5)
        assert row[key]["std"] == pytest.approx(mse.std().item(), rel=1e-2)


# --- training ---


def test_training_continues_exactly_and_stops_at_non_finite_losses(tmp_path):
    x, y = torch.rand(300, 196, generator=g()), torch.arange(300) % 10

    def judge(stop=None):
        generator = g("judge")
        net, calls = lso_mnist.build("judge", lso_mnist.JUDGE, 1, generator), []

        def loss(i):
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return lso_mnist.judge_loss(net, x[i], y[i], generator)

        checkpoint = common.Checkpoint(tmp_path / "judge.checkpoint", "cpu")
        checkpoint.every = 0
        history = lso_mnist.train(
            "judge", net, {"ce": (net, loss)}, 300, 1, 250, 1e-2, generator, checkpoint
        )
        return history, net.state_dict()

    with pytest.raises(KeyboardInterrupt):
        judge(stop=231)
    continued = judge()
    os.remove(tmp_path / "judge.checkpoint")
    whole = judge()
    assert torch.equal(continued[0], whole[0]) and whole[0][-1] < 2
    assert all(torch.equal(continued[1][key], value) for key, value in whole[1].items())

    net = lso_mnist.MLP([196, 1], 1, g())
    with pytest.raises(FloatingPointError, match="some: the term odd is not finite at step 120"):
        calls = iter(range(1000))
        lso_mnist.train(
            "some",
            net,
            {"odd": (net, lambda i: net(x[i]).mean((1, 2)) / (next(calls) != 120))},
            300,
            1,
            200,
            1e-3,
            g(),
        )


def test_the_rate_falls_to_zero_over_the_second_half():
    """Under a constant gradient every step of Adam is as long as the rate."""
    net = lso_mnist.MLP([1, 1], 1, g())
    before = net.biases[0].item()
    losses = {"loss": (net, lambda i: net(torch.zeros(1, 1, 1)).sum((1, 2)))}
    lso_mnist.train("net", net, losses, 5, 1, 400, 0.01, g("b"))
    assert before - net.biases[0].item() == pytest.approx(0.01 * (200 + 100), rel=0.01)


def test_training_two_nets_side_by_side_trains_each_on_its_own_loss():
    x, single = torch.rand(50, 196, generator=g()), []
    for chosen in (0, 1, None):
        net = lso_mnist.MLP([196, 2], 2, g("net"))
        weight = torch.ones(2) if chosen is None else F.one_hot(torch.tensor(chosen), 2)
        lso_mnist.train(
            "nets",
            net,
            {"loss": (net, lambda i: weight * (net(x[i]) ** 2).mean((1, 2)))},
            50,
            2,
            30,
            1e-2,
            g("batches"),
        )
        single.append(net.weights[0].detach())
    assert torch.allclose(single[2][0], single[0][0]) and torch.allclose(single[2][1], single[1][1])


# --- the run ---


SEEN = {}  # images that each net of the smoke run was trained on


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder, objectives = tmp_path_factory.mktemp("smoke") / "run", lso_mnist.objectives

    def looking(name, model, nets, x, *rest):
        SEEN[name] = x
        return objectives(name, model, nets, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lso_mnist, "objectives", looking)
        report = lso_mnist.main(["--preset", "smoke", "--out", str(folder)])
    return folder, report


def unit(smoke, name):
    return torch.load(smoke[0] / "units" / f"{name}.pt", weights_only=True)["result"]


def test_each_net_sees_its_own_images(smoke):
    assert len(SEEN["LSO-1"]) == 1000 and len(SEEN["LSO-2"]) == 10_000
    others = rows_as_bytes(torch.cat([x for name, x in SEEN.items() if name != "judge"]))
    assert not rows_as_bytes(SEEN["judge"]) & others and len(others) <= 10_000


def test_units_of_the_study(smoke):
    pixels = unit(smoke, "input-constant-normal")
    assert torch.equal(pixels["images"], pixels["v"].clamp(0, 1)) and (pixels["v"] < 0).any()
    assert unit(smoke, "LSO-1-fine-normal")["steps"].max() == 20 * 120
    assert unit(smoke, "LSO-1-patient-normal")["steps"].max() == 4 * 120
    for name in ("GAN", "VAE"):  # the prior itself, not codes of images
        model, x = lso_mnist.MODELS[name], torch.rand(2, 1000, 196, generator=g())
        codes = lso_mnist.start_codes(name, model, {"encoder": None}, x, 0)
        assert codes.shape == (2, 1000, 20)
        assert torch.allclose(codes.mean(1), torch.zeros(2, 20), atol=1e-5)
        assert torch.allclose(codes.std(1), torch.ones(2, 20), atol=1e-5)


def test_steps_and_attempts_by_digit():
    out = {key: torch.zeros(2, 20) for key in ("first", "stuck", "solved", "steps")}
    out["attempts"] = (torch.arange(20) % 10 + 1).repeat(2, 1)
    scores = lso_mnist.success_scores(out)
    assert scores["attempts by digit"] == list(range(1, 11)) and scores["attempts"] == 5.5


def test_smoke_writes_everything(smoke):
    folder, report = smoke
    names = "4_lso-1 5_lso-2 6_methods 7_success walk".split()
    assert {path.name for path in folder.glob("*.*")} == {
        ".lock",
        "config.json",
        "table.md",
        "results.json",
        "metrics.csv",
        *(f"fig_{name}.png" for name in names),
    }
    assert all((folder / f"fig_{name}.png").stat().st_size > 10_000 for name in names)
    assert json.load(open(folder / "results.json")) == report
    assert report["label"] == "glyphs 14x14, pool, preset smoke"
    header, *lines = open(folder / "metrics.csv").read().splitlines()
    assert header == "net,term,step,loss" and {line.split(",")[0] for line in lines} == {
        "classifier",
        "judge",
        *lso_mnist.MODELS,
        "AE-5",
        "AE-50",
    }


def test_smoke_says_what_is_true(smoke):
    _, report = smoke
    rows = {(r["row"], r["rule"], r["start"]): r for r in report["results"]["generations"]}
    choices = [key for key in rows if key[0] == "input"]
    assert len(choices) == len(RULES) + len(lso_mnist.STARTS) - 1
    for row in rows.values():
        if "success" in row:
            low, high = row["interval"]
            assert 0 <= low <= row["success"]["mean"] <= high <= 1
            assert row["solved"]["mean"] >= row["success"]["mean"] and row["attempts"] >= 1
    judged = {row["row"]: row for row in rows.values() if "read" in row}
    assert set(lso_mnist.METHODS) < set(judged)
    assert judged["real"]["frechet"] < min(
        row["frechet"] for name, row in judged.items() if name != "real"
    )
    assert report["results"]["judge"] > 0.8  # glyphs are easy
    for row in report["results"]["autoencoders"]:
        assert row["pca_train"] < 0.055 and row["train"]["mean"] < 0.1
    holds = {claim["claim"]: claim["holds"] for claim in report["claims"]}
    assert holds["LSO-1: MSE, 5 units, 1,000 images (and below PCA)"] is False  # 150 steps cannot
    assert len(holds) == len(report["claims"]) > 15


def test_a_comparison_holds_if_a_is_clearly_above_factor_times_b(smoke):
    results = json.loads(json.dumps(smoke[1]["results"]))
    rows = {(r["row"], r["rule"], r["start"]): r for r in results["generations"]}
    judged = {r["row"]: r for r in rows.values() if "read" in r}
    name = "LSO is read as wanted 3 times as often: LSO-2, input"
    for share, wanted in ((0.61, True), (0.59, False), (0.1, False)):
        judged["LSO-2"]["read"] = {"mean": share, "std": 0.01, "n": 2}
        judged["input"]["read"] = {"mean": 0.2, "std": 0.01, "n": 2}
        table = lso_mnist.claims(results["autoencoders"], rows, judged, 1.0)
        assert {row[0]: row[3] for row in table}[name] is wanted


def test_success_and_mse_claims_look_at_every_figure(smoke):
    results = json.loads(json.dumps(smoke[1]["results"]))
    rows = {(r["row"], r["rule"], r["start"]): r for r in results["generations"]}
    judged = {r["row"]: r for r in rows.values() if "read" in r}

    def holds(claim):
        table = lso_mnist.claims(results["autoencoders"], rows, judged, 1.0)
        return next(row[3] for row in table if row[0].startswith(claim))

    for interval, wanted in (([0, 0.1], False), ([0.6, 0.7], True), ([0.9, 1.0], False)):
        judged["LSO-1"]["interval"] = interval
        assert holds("LSO-1: success") is wanted
    for mse, pca, wanted in ((0.02, 0.03, True), (0.025, 0.03, False), (0.02, 0.015, False)):
        row = results["autoencoders"][0]
        row["train"]["mean"], row["pca_train"], row["test"]["mean"] = mse, pca, 9.0
        assert holds("LSO-1: MSE") is wanted
    for (name, *_), row in rows.items():  # LSO-2 is ahead under the chosen rule alone, or always
        if name in ("LSO-1", "LSO-2"):
            row["success"] = {"mean": 0.5 if name == "LSO-1" else 0.4, "std": 0.01, "n": 2}
    judged["LSO-2"]["success"]["mean"] = 0.6
    assert holds("larger layer, more success: LSO-2, LSO-1") is False
    for (name, *_), row in rows.items():
        if name == "LSO-2":
            row["success"]["mean"] = 0.6
    assert holds("larger layer, more success: LSO-2, LSO-1") is True


def test_walks_end_with_their_success_or_with_the_last_step(smoke):
    classifier = lso_mnist.build("classifier", lso_mnist.CLASSIFIER, 2, g()).requires_grad_(False)
    path = smoke[0] / "units" / "classifier.pt"
    classifier.load_state_dict(torch.load(path, weights_only=True)["result"]["state"])
    for name in lso_mnist.STUDIED:
        walk = torch.load(smoke[0] / "units" / f"walk-{name}.pt", weights_only=True)["result"]
        steps = len(walk["E"]) - 1
        assert walk["x"].shape == (steps + 1, 196) and walk["S"].shape == (steps + 1,)
        assert (walk["E"][:-1] > lso_mnist.THRESHOLD).all() and (walk["S"] >= 0).all()
        assert walk["E"][-1] <= lso_mnist.THRESHOLD or steps == 120 or steps in (50, 100)
        if name != "input":  # pixels are clipped in the picture
            output = classifier(walk["x"].expand(2, -1, -1))[0]
            E = lso_mnist.total_squared_error(output, torch.tensor(8))
            assert torch.allclose(E, walk["E"], rtol=1e-3, atol=1e-5)


def test_saved_nets_reload_and_give_the_measured_numbers(smoke):
    folder, report = smoke
    data = lso_mnist.load_data("glyphs", "pool", "data", "cpu")

    def reload(name, model):
        state = torch.load(folder / "units" / f"{name}.pt", weights_only=True)["result"]["state"]
        nets = lso_mnist.build(name, model, 2, g()).requires_grad_(False).eval()
        nets.load_state_dict(state)
        return nets

    model, (x, y) = lso_mnist.MODELS["LSO-1"], data["test"]
    again = lso_mnist.reconstruction_row(
        "LSO-1", reload("LSO-1", model), model, data["models"][0], x
    )
    row = report["results"]["autoencoders"][0]
    for key in ("train", "test"):
        assert again[key]["mean"] == pytest.approx(row[key]["mean"], rel=1e-4)
    output = reload("classifier", lso_mnist.CLASSIFIER)(x.repeat(2, 1, 1))
    accuracy = (output.argmax(2) == y).float().mean(1)
    mse = ((output - torch.eye(10)[y]) ** 2).mean((1, 2))
    for key, value in (("accuracy", accuracy), ("mse", mse)):
        scores = report["results"]["classifier"][key]
        assert [scores["mean"], scores["std"]] == pytest.approx(
            [value.mean().item(), value.std().item()], rel=1e-3
        )
    read = reload("judge", lso_mnist.JUDGE)(x).argmax(1)
    assert (read == y).float().mean().item() == pytest.approx(report["results"]["judge"], abs=1e-3)


def test_sizes_may_be_added_to_a_run_and_other_flags_not(smoke, refused, tmp_path, capsys):
    shutil.copytree(smoke[0], tmp_path / "run")
    flags = ["--preset", "smoke", "--out", "run"]
    assert "--rule constant" in refused(lso_mnist.main, [*flags, "--rule", "polyak"])
    report = lso_mnist.main([*flags, "--sizes", "9", "5", "5", "20"])
    assert "reused AE-5\n" in capsys.readouterr().out
    sizes = [r["size"] for r in report["results"]["autoencoders"] if r["row"].startswith("AE-")]
    assert sizes == [5, 9]


@pytest.mark.parametrize("part", ["GAN.checkpoint", "LSO-1-fine-normal.pt"])
def test_kill_and_continue_equals_an_undisturbed_run(part, smoke, killed_and_continued):
    """A real kill -9, in the middle of a unit or between two, then the same command again."""
    out = killed_and_continued("lso_mnist", part)
    told = "continuing GAN" if part.endswith("checkpoint") else "reused LSO-1-fine-normal"
    assert told in out
    assert json.load(open("run/results.json"))["results"] == smoke[1]["results"]
    assert open("run/metrics.csv").read() == open(smoke[0] / "metrics.csv").read()


def test_a_damaged_mnist_is_one_line_and_writes_nothing(refused, monkeypatch):
    import urllib.request

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    folder = pathlib.Path("mine/MNIST/raw")
    folder.mkdir(parents=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bnot a zip")
    line = refused(lso_mnist.main, ["--data", "mine"])
    assert "train-images-idx3-ubyte.gz" in line and "--dataset glyphs" in line
    assert os.listdir() == ["mine"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--dataset", "svhn"],
        ["--downsample", "crop"],
        ["--rule", "none"],
        ["--start", "zero"],
        ["--repeats", "0"],
        ["--starts", "10"],
        ["--starts", "25"],
        ["--steps", "0"],
        ["--steps", "1e3"],
        ["--attempts", "0"],
        ["--train-steps", "-1"],
        ["--sizes", "0"],
        ["--sizes", "197"],
        ["--sizes"],
        ["--start-steps", "3"],
        ["extra"],
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    line = refused(lso_mnist.main, argv)
    assert argv[0] in line and os.listdir() == []
