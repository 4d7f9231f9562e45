"""frozen_encoder_vae.py: Table 5.6, flow, objectives, measures, and the run as a user sees it."""

import hashlib
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal

import first_edition as common
import frozen_encoder_vae as fe
from conftest import ROOT


def g(name="test"):
    return common.generator(0, name)


def digits(n=64, channels=1):
    return F.pad(common.glyphs(n, 3, channels)[0], [2] * 4)


def vae(encoder="L", layers="conv", prior="normal", channels=1, seed="net"):
    return fe.build(encoder, layers, prior, channels, g(seed))


GRID = list(itertools.product(fe.LAYERS, fe.PRIORS, fe.ENCODERS[:4]))
TABLE_5_6 = {  # thousands separators taken out
    ("fc", "normal"): (10256, 7952, 7824, 7824),
    ("fc", "flow2"): (11888, 9584, 9456, 9456),
    ("fc", "flow6"): (15152, 12848, 12720, 12720),
    ("conv", "normal"): (521, 434, 396, 396),
    ("conv", "flow2"): (3689, 3602, 3564, 3564),
    ("conv", "flow6"): (10025, 9938, 9900, 9900),
}


# --- Table 5.6 and Appendix B ---


def test_table_5_6_exactly():
    total = 0
    for (layers, prior), row in TABLE_5_6.items():
        for encoder, count in zip(fe.ENCODERS, row):
            assert fe.document_count(vae(encoder, layers, prior)) == count
            total += count
    for encoder, count in zip(fe.ENCODERS, (10339, 10250, 10196, 10196)):
        assert fe.document_count(vae(encoder, "conv", "flow6", 3)) == count
        total += count
    assert total == 224_590


def test_real_counts():
    def count(*key):
        return sum(value.numel() for value in vae(*key).parameters() if value.requires_grad)

    assert count("L", "fc", "normal") == 2_047_328 and count("L", "conv", "normal") == 29_353
    assert count("L", "fc", "flow2") - 2_047_328 == 2 * 10_512
    assert count("L", "conv", "flow6") - 29_353 == 6 * 37_392


def test_shapes_of_appendix_b():
    nets, shapes = vae("L", "conv"), []
    for part in (*nets["encoder"], *nets["decoder"]):
        part.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    mu, _ = fe.encode(nets, torch.rand(2, 1, 32, 32))
    nets["decoder"](mu)
    wanted = [(4, 32, 32), (4, 16, 16), (8, 16, 16), (8, 8, 8), (16, 8, 8), (16, 4, 4), (8, 2, 2)]
    wanted += [(4, 2, 2), (64, 2, 2), (32, 4, 4), (16, 8, 8), (8, 16, 16), (1, 32, 32)]
    assert [key for key, _ in itertools.groupby(shapes)] == wanted
    linear = [m for m in vae("L", "fc")["decoder"] if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [128, 256, 512, 1024, 1024]
    for key in GRID:
        out = vae(key[2], key[0], key[1])
        mu, logvar = fe.encode(out, out["frozen"](torch.rand(3, 1, 32, 32)))
        assert mu.shape == logvar.shape == (3, 16)
        assert out["decoder"](mu).shape == (3, 1, 32, 32)
    mu, _ = fe.encode(out := vae("PNL", "conv", "flow6", 3), out["frozen"](digits(2, 3)))
    assert mu.shape == (2, 32) and out["decoder"](mu).shape == (2, 3, 32, 32)


def test_which_layers_have_an_activation():
    for layers in fe.LAYERS:
        nets = vae("L", layers)
        weighted = [m for m in nets["decoder"] if isinstance(m, (nn.Linear, nn.Conv2d))]
        active = [m for m in nets["decoder"] if isinstance(m, nn.LeakyReLU)]
        assert len(weighted) == 5 and len(active) == 4
        last = list(nets["encoder"])[-1]
        assert isinstance(last, (nn.Linear, nn.Conv2d))
        rks, (a, b) = vae("RKS", layers)["frozen"], torch.rand(2, 4, 1, 32, 32)
        zero = rks(torch.zeros(4, 1, 32, 32))
        assert torch.allclose(rks(a + b) - zero, rks(a) + rks(b) - 2 * zero, atol=1e-5)
        wide = vae("PRKS", layers)["frozen"]
        assert (wide(a).numel() / 4) == 16 * 1028 / (1 if layers == "conv" else 4)
        bent = (wide(a + b) + wide(0 * a) - wide(a) - wide(b)).abs() > 1e-5
        assert bent.float().mean() > 0.4  # of its features: with smaller weights most were linear


def test_xavier_bounds():
    linear = vae("L", "fc")["decoder"][6]  # 512 -> 1024
    bound = math.sqrt(6 / (512 + 1024))
    assert 0.99 * bound < linear.weight.abs().max() <= bound
    conv = vae("L", "conv")["decoder"][1]  # 4 -> 64
    bound = math.sqrt(6 / (9 * 4 + 9 * 64))
    assert 0.98 * bound < conv.weight.abs().max() <= bound
    assert 0.9 / 32 < vae("NL", "fc")["frozen"][1].bias.abs().max() <= 1 / 32  # PyTorch's own
    flow = vae(prior="flow2")["prior"].s[0][0].weight.abs().max()  # no Xavier there
    assert 0.9 * 8**-0.5 < flow <= 8**-0.5


def test_upconv_is_upsampling_and_then_a_convolution():
    small = torch.randn(3, 5, 7, 4, generator=g(), dtype=torch.double)
    ours = fe.UpConv(5, 2).double()
    theirs = nn.Conv2d(5, 2, 3, padding=1).double()
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(small), theirs(F.interpolate(small, scale_factor=2)))


# --- the flow ---


def flow(K=3, D=6, scale=1.0):
    prior = fe.Flow(D, 8, K).double()
    for value in prior.parameters():
        nn.init.normal_(value, std=scale, generator=g("flow"))
    return prior


def test_flow_and_inverse_are_the_identity():
    prior, z = flow(), torch.randn(50, 6, generator=g(), dtype=torch.double)
    u, _ = prior(z)
    assert torch.allclose(prior.inverse(u), z, atol=1e-10)
    assert torch.allclose(prior(prior.inverse(z))[0], z, atol=1e-10)
    assert (u - z).abs().mean() > 0.1


def test_log_determinant_equals_that_of_autograds_jacobian():
    prior, z = flow(), torch.randn(5, 6, generator=g(), dtype=torch.double)
    _, logdet = prior(z)
    for row, value in zip(z, logdet):
        J = torch.autograd.functional.jacobian(lambda v: prior(v[None])[0][0], row)
        assert torch.allclose(torch.linalg.slogdet(J)[1], value)


def test_one_coupling_as_the_equations_have_it():
    prior, z = flow(1, 4), torch.randn(7, 4, generator=g(), dtype=torch.double)
    u, _ = prior(z)
    a, b = z[:, :2], z[:, 2:]
    y_b = prior.s[0](a).exp() * b + prior.t[0](a)
    assert torch.allclose(u, torch.stack([y_b[:, 1], y_b[:, 0], a[:, 1], a[:, 0]], 1))


def test_density_in_two_dimensions_integrates_to_one():
    prior = flow(4, 2, 0.7)
    line = torch.linspace(-12, 12, 1201, dtype=torch.double)
    z = torch.cartesian_prod(line, line)
    u, logdet = prior(z)
    density = (logdet - (u**2).sum(1) / 2 - math.log(2 * math.pi)).exp()
    assert abs(density.sum().item() * 0.02**2 - 1) < 1e-4
    assert density.max() / density.median() > 1e3


def test_no_flow_is_the_normal_prior():
    z = torch.randn(9, 6, generator=g())
    u, logdet = fe.Flow(6, 8, 0)(z)
    assert torch.equal(u, z) and torch.equal(logdet, torch.zeros(9))


# --- objectives ---


@pytest.mark.parametrize("layers, K", [("conv", 0), ("conv", 2), ("fc", 6)])
def test_ceiling_of_the_published_rt(layers, K):
    """A frozen encoder stays below 8 K - 6.408, and reaches it with saturated flows at u = 0."""
    nets = vae("NL", layers, {v: k for k, v in fe.PRIORS.items()}[K])
    x, noise = digits(), torch.randn(64, 16, generator=g())
    h = nets["frozen"](x)
    _, RT = fe.loss_terms(nets, h, x, noise, "as-published")
    assert (RT <= 8 * K - 6.4077).all()
    for s in nets["prior"].s:
        s[4].bias.data.fill_(50.0)
    for t in nets["prior"].t:
        for value in t.parameters():
            value.data.zero_()
    _, RT = fe.loss_terms(nets, 0 * h, x, 0 * noise, "as-published")
    assert torch.allclose(RT, torch.tensor(8 * K + (1 + math.log(1e-6)) / 2)) and RT[0] < 42


def test_terms_against_the_definition():
    nets, x, noise = vae("L", "conv", "flow2"), digits(), torch.randn(64, 16, generator=g())
    mu, logvar = fe.encode(nets, x)
    z = mu + (logvar / 2).exp() * noise
    u, logdet = nets["prior"](z)
    q, p = torch.distributions.Normal(mu, (logvar / 2).exp()), torch.distributions.Normal(0, 1)
    per_dimension = p.log_prob(u) + q.entropy()
    RE, published = fe.loss_terms(nets, x, x, noise, "as-published")
    _, corrected = fe.loss_terms(nets, x, x, noise, "corrected")
    assert torch.allclose(published, per_dimension.mean(1) + logdet, atol=1e-5)
    assert torch.allclose(corrected, per_dimension.sum(1) + logdet, atol=1e-4)
    assert torch.allclose(RE, ((nets["decoder"](z) - x) ** 2).sum((1, 2, 3)))


def linear_vae(n=20_000):
    """A linear decoder, its exact posterior as encoder, images of it, and their log p(x)."""
    C, D, side = 1, 4, 8
    W = torch.linalg.qr(torch.randn(side * side, D, generator=g("W")))[0] * torch.tensor(
        [3.0, 2.0, 1.0, 0.3]
    )
    x = torch.randn(n, D, generator=g("z")) @ W.T
    x = x + math.sqrt(0.5) * torch.randn(n, side * side, generator=g("x"))
    variance = 1 / (1 + 2 * (W**2).sum(0))  # of the posterior, whose mean is 2 variance W' x
    encoder, decoder = nn.Linear(side * side, 2 * D), nn.Linear(D, side * side)
    encoder.weight.data = torch.cat([2 * variance[:, None] * W.T, torch.zeros(D, side * side)])
    encoder.bias.data = torch.cat([torch.zeros(D), variance.log()])
    decoder.weight.data, decoder.bias.data = W, torch.zeros(side * side)
    nets = nn.ModuleDict(
        {
            "frozen": nn.Sequential(),
            "encoder": nn.Sequential(nn.Flatten(), encoder),
            "decoder": nn.Sequential(decoder, nn.Unflatten(1, (C, side, side))),
            "prior": fe.Flow(D, 4, 0),
        }
    )
    exact = MultivariateNormal(torch.zeros(side * side), W @ W.T + torch.eye(side * side) / 2)
    return nets, x.view(n, C, side, side), exact.log_prob(x)


def bound_of(nets, x):
    """The evidence lower bound in nats, the mean over x."""
    return -fe.evaluate(nets, x, "corrected", g())["negative ELBO"] - fe.constant(x)


@torch.no_grad()
def test_corrected_bound_is_tight_with_the_exact_posterior():
    nets, x, exact = linear_vae()
    assert abs(bound_of(nets, x) - exact.mean().item()) < 0.1
    published, corrected = (
        fe.evaluate(nets, x, name, g()) for name in ("as-published", "corrected")
    )
    assert published["RE"] == corrected["RE"] and published["RT"] > corrected["RT"] + 1
    for scores in (published, corrected):
        assert scores["negative ELBO"] == pytest.approx(scores["RE"] - scores["RT"])


def test_importance_sampling_finds_log_p_where_the_encoder_is_poor():
    nets, x, exact = linear_vae(100)
    assert torch.allclose(fe.log_likelihood(nets, x, 50, g()), exact, atol=0.3)
    encoder = nets["encoder"][1]
    encoder.weight.data *= 0.9
    encoder.bias.data[4:] = math.log(1e-6)  # as narrow as a frozen one
    found = fe.log_likelihood(nets, x, 400, g())
    assert bound_of(nets, x) < exact.mean() - 10
    assert (found - exact).abs().mean() < 0.3 and found.mean() < exact.mean() + 0.1


def test_importance_sampling_is_more_than_the_bound_of_its_proposal():
    nets, x, exact = linear_vae(100)
    encoder = nets["encoder"][1]
    encoder.bias.data[4:] += 1.0  # too wide
    found = fe.log_likelihood(nets, x, 5000, g(), steps=1)
    assert bound_of(nets, x) < exact.mean() - 1
    assert (found - exact).abs().mean() < 0.1


@pytest.mark.parametrize("key", [("L", "conv", "normal"), ("NL", "conv", "flow2")])
def test_bound_is_below_log_p_in_a_real_net(key):
    nets, x = vae(*key), digits(16)
    assert bound_of(nets, x) < fe.log_likelihood(nets, x, 20, g()).mean().item()


# --- training ---


@pytest.mark.parametrize("encoder", fe.ENCODERS)
@pytest.mark.parametrize("layers", fe.LAYERS)
def test_frozen_weights_stay_and_all_others_move(encoder, layers):
    nets = vae(encoder, layers, "flow2")
    before = {key: value.clone() for key, value in nets.state_dict().items()}
    fe.train("test", nets, digits(256), "as-published", 2, g())
    moved = {key for key, value in nets.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {key for key in before if not key.startswith("frozen.")}
    whole = fe.encoder_layers(encoder, layers, 1, 4)
    weights = [m for m in (*whole[0], whole[1]) if list(m.parameters())]
    trainable = {"L": len(weights), "PNL": 1, "PRKS": 1}.get(encoder, 0)
    assert len([key for key in moved if key.startswith("encoder.")]) == 2 * trainable


@pytest.mark.parametrize("objective", ["as-published", "corrected"])
def test_training_equals_a_plain_loop(objective):
    """Frozen features computed once, against a loop that does all of it in every step."""
    x, nets, plain = digits(600), vae("PNL", "conv", "flow2"), vae("PNL", "conv", "flow2")
    history = fe.train("test", nets, x, objective, 2, g())
    generator, means = g(), []
    adam = torch.optim.Adam(
        [
            *plain["encoder"].parameters(),
            *plain["decoder"].parameters(),
            *plain["prior"].parameters(),
        ],
        1e-3,
    )
    for _ in range(2):
        total = torch.zeros(2)
        for index in torch.randperm(600, generator=generator).split(256):
            noise = torch.randn(len(index), 16, generator=generator)
            h = plain["encoder"](plain["frozen"](x[index]))
            mu, logvar = h[:, :4].flatten(1), h[:, 4:].flatten(1)
            z = mu + torch.exp(0.5 * logvar) * noise
            u, logdet = plain["prior"](z)
            RE = (plain["decoder"](z) - x[index]).pow(2).sum((1, 2, 3))
            per_dimension = 0.5 * (1 + logvar - u**2)
            RT = logdet + (
                per_dimension.mean(1) if objective == "as-published" else per_dimension.sum(1)
            )
            adam.zero_grad()
            (RE.mean() - RT.mean()).backward()
            adam.step()
            total += torch.stack([RE.sum(), RT.sum()]).detach()
        means.append(total / 600)
    found = torch.stack([history["RE"], history["RT"]])
    assert torch.allclose(torch.stack(means).T, found, rtol=1e-4)
    for a, b in zip(nets.parameters(), plain.parameters()):
        assert torch.allclose(a, b, atol=2e-4)


def test_a_loss_that_is_not_finite_names_step_and_term():
    x = digits(600)
    x[599] = math.nan
    with pytest.raises(FloatingPointError, match=r"mine: the term RE is not finite at step [012]$"):
        fe.train("mine", vae("RKS", "fc", "flow2"), x, "as-published", 1, g())


def test_splits_are_disjoint_and_drawn_anew():
    train, test = fe.split(60_000, 25_000, None, g("a"))
    assert len(train) == 25_000 and len(test) == 25_000  # and 10,000 for validation, Table 4.1
    assert not set(train.tolist()) & set(test.tolist())
    other, some = fe.split(60_000, 25_000, 100, g("b"))
    assert len(some) == 100 and 0.3 < torch.isin(other, train).float().mean() < 0.55
    assert len(fe.split(73_257, 25_000, None, g())[1]) == 38_257


# --- measures ---


def gaussian(mean, root):
    mean, root = (torch.tensor(part, dtype=torch.double) for part in (mean, root))
    return mean, root @ root.T


def test_frechet_distance_of_gaussians():
    a = gaussian([0, 0], [[1, 0], [0, 2]])
    b = gaussian([3, 4], [[3, 0], [0, 5]])
    assert fe.frechet_distance(a, b) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 5) ** 2)
    c = gaussian([1, 0], [[1, 0.5], [-0.3, 2]])
    product = torch.linalg.eigvals(a[1] @ c[1]).real.sqrt().sum()  # of the root of A C
    expected = 1 + a[1].trace() + c[1].trace() - 2 * product
    assert fe.frechet_distance(a, c) == pytest.approx(expected.item())
    assert fe.frechet_distance(a, c) == pytest.approx(fe.frechet_distance(c, a))
    assert abs(fe.frechet_distance(c, c)) < 1e-12
    singular = gaussian([0, 0], [[1, 0], [1, 0]])
    assert abs(fe.frechet_distance(singular, singular)) < 1e-7
    assert fe.frechet_distance(singular, a) == pytest.approx(fe.frechet_distance(a, singular))
    x = torch.randn(500, 3, generator=g())
    mean, cov = fe.moments(x)
    assert mean.dtype == torch.double and torch.allclose(cov, torch.cov(x.double().T))


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A file of the format of the TF-ported weights, its numbers drawn at random."""
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return str(path)


def test_inception_is_the_tf_ported_one(weights_file):
    net, digits_of_hash = fe.inception(weights_file, "cpu")
    data = pathlib.Path(weights_file).read_bytes()
    assert digits_of_hash == hashlib.sha256(data).hexdigest()[:8]
    x = torch.rand(2, 1, 32, 32, generator=g())
    seen = []
    net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert fe.fid_moments(net, x)[0].shape == (2048,)
    assert seen[0].shape == (2, 3, 299, 299) and -1 <= seen[0].min() < -0.9 < 0.9 < seen[0].max()
    assert torch.equal(seen[0][:, 0], seen[0][:, 2])
    fe.fid_moments(net, torch.full((2, 3, 32, 32), 0.5))
    level = torch.tensor(2 * 128 / 255 - 1)  # the nearest of 256
    assert torch.allclose(seen[1], level, atol=1e-6)
    for name, size, largest in [
        *[("Mixed_5b", 192, False), ("Mixed_6c", 768, False)],
        *[("Mixed_7b", 1280, False), ("Mixed_7c", 2048, True)],
    ]:
        block, h = getattr(net, name), torch.randn(1, size, 9, 9, generator=g())
        count = F.avg_pool2d(torch.ones(1, 1, 9, 9), 3, 1, 1)  # the share that is no padding
        pooled = F.max_pool2d(h, 3, 1, 1) if largest else F.avg_pool2d(h, 3, 1, 1) / count
        expected = block.branch_pool.forward(pooled)  # without the hook that pools
        assert torch.allclose(block(h)[:, -expected.shape[1] :], expected, atol=1e-5)
        plain = block.branch_pool.forward(F.avg_pool2d(h, 3, 1, 1))
        assert not torch.allclose(plain, expected, atol=1e-3)


def test_inception_without_its_weights(weights_file, refused, monkeypatch, tmp_path):
    argv = ["--preset", "smoke", "--out", "run", "--fid"]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: 1 / 0)
    error = refused(fe.main, argv)
    assert "--fid-weights" in error and "pt_inception-2015-12-05-6726825d.pth" in error
    torch.save(vae().state_dict(), "other.pth")
    assert "other.pth" in refused(fe.main, [*argv, "--fid-weights", "other.pth"])
    pathlib.Path("cut.pth").write_bytes(pathlib.Path(weights_file).read_bytes()[:1000])
    assert "cut.pth" in refused(fe.main, [*argv, "--fid-weights", "cut.pth"])
    assert "none.pth" in refused(fe.main, [*argv, "--fid-weights", "none.pth"])
    assert not os.path.exists("run")


TOOTH_GROWTH = {  # R's data set ToothGrowth (Crampton 1947), length by supplement and dose
    ("VC", 0.5): "4.2 11.5 7.3 5.8 6.4 10.0 11.2 11.2 5.2 7.0",
    ("VC", 1): "16.5 16.5 15.2 17.3 22.5 17.3 13.6 14.5 18.8 15.5",
    ("VC", 2): "23.6 18.5 33.9 25.5 26.4 32.5 26.7 21.5 23.3 29.5",
    ("OJ", 0.5): "15.2 21.5 17.6 9.7 14.5 10.0 8.2 9.4 16.5 9.7",
    ("OJ", 1): "19.7 23.3 23.6 26.4 20.0 25.2 25.8 21.2 14.5 27.3",
    ("OJ", 2): "25.5 26.4 22.4 24.5 24.8 30.9 26.4 27.3 29.4 23.0",
}


def test_anova_against_published_tables():
    """aov(len ~ supp * dose) and aov(len ~ supp + dose), dose a factor, as R prints them."""
    rows = [
        {"supp": supp, "dose": dose, "len": float(value)}
        for (supp, dose), text in TOOTH_GROWTH.items()
        for value in text.split()
    ]
    table = fe.anova(rows, "len", ["supp", "dose", "supp x dose"])
    assert [(t, round(r["F"], 3), r["df"], r["error df"]) for t, r in table.items()] == [
        ("supp", 15.572, 1, 54),
        ("dose", 92.0, 2, 54),
        ("supp x dose", 4.107, 2, 54),
    ]
    assert table["supp"]["p"] == pytest.approx(0.000231, abs=1e-6)
    assert table["supp x dose"]["p"] == pytest.approx(0.02186, abs=1e-5)
    table = fe.anova(rows, "len", ["supp", "dose"])
    assert round(table["supp"]["F"], 2) == 14.02 and round(table["dose"]["F"], 2) == 82.81
    assert table["supp"]["p"] == pytest.approx(0.000429, abs=1e-6)


def test_degrees_of_freedom_are_the_documents():
    """110, 96 and 113 for five repeats of the 24 models; a factor of one level drops out."""
    rows = [
        {"layers": a, "prior": b, "encoder": c, "y": torch.randn((), generator=g(f"{a}{b}{c}{i}"))}
        for a, b, c in GRID
        for i in range(5)
    ]
    for measure, df in (("RE", 96), ("RT", 110), ("seconds", 113), ("FID", 96)):
        model, published_F = fe.ANALYSES[measure]
        table = fe.anova(rows, "y", model.split(" + "))
        assert {row["error df"] for row in table.values()} == {df}
        for term, text in published_F.items():
            published = f"F({table[term]['df']}, {df})", "F > ", "n.s."
            assert text.startswith(published)
    svhn = [row for row in rows if row["layers"] == "conv" and row["prior"] == "flow6"]
    table = fe.anova(svhn, "y", fe.ANALYSES["RE"][0].split(" + "))
    assert list(table) == ["encoder"] and table["encoder"]["error df"] == 16


class Reader(nn.Module):
    """A judge that sees the mean of each image's rows 0 to 9 as its logits."""

    features = nn.Sequential(nn.Flatten(2), nn.Flatten())

    def head(self, h):
        return 10 * h.view(-1, 32, 32)[:, :10].mean(2)


def test_judged():
    x = torch.zeros(100, 1, 32, 32)
    x[torch.arange(100), 0, torch.arange(100) % 4] = 1.0  # classes 0 to 3, with certainty
    real = fe.moments(x.flatten(1))
    row = fe.judged(Reader(), x, real)
    assert row["confident"] == 1 and row["balance"] == pytest.approx(math.log(4) / math.log(10))
    assert abs(row["distance"]) < 1e-4
    assert fe.judged(Reader(), 0.01 * x, real)["confident"] == 0


def test_share_of_jumping_paths():
    def paths(*steps):
        values = torch.tensor([0.0, *steps]).cumsum(0)
        return values.view(1, 8, 1, 1, 1).expand(1, 8, 1, 4, 4)

    smooth, still = paths(2.9, 1, 1, 1, 1, 0, 0), paths(0, 0, 0, 0, 0, 0, 0)
    jump = paths(1, 0, 0, 3.1, 1, 1, 1)
    assert fe.jump_share(paths(1, 1, 1, 1, 1, 1, 1)) == fe.jump_share(smooth) == 0
    assert fe.jump_share(still) == 0 and fe.jump_share(jump) == 1
    assert fe.jump_share(torch.cat([smooth, jump, still, still])) == 0.25


def test_samples_and_interpolations_come_from_the_prior():
    nets = vae("RKS", "conv", "flow2")
    images, z = fe.sample(nets, 1500, g())
    u = torch.randn(1500, 16, generator=g())
    assert torch.allclose(nets["prior"](z)[0], u, atol=1e-4)
    assert torch.allclose(nets["decoder"](z[:9]).clamp(0, 1), images[:9], atol=1e-6)
    paths = fe.interpolate(nets, z[:10].unflatten(0, (2, -1)))
    assert paths.shape == (5, 8, 1, 32, 32)
    assert torch.allclose(paths[:, 0], images[:5], atol=1e-5)
    assert torch.allclose(paths[:, 7], images[5:10], atol=1e-5)
    third = nets["decoder"](z[0:1] + (z[5:6] - z[0:1]) * 2 / 7).clamp(0, 1)
    assert torch.allclose(paths[0, 2], third[0], atol=1e-5)


def test_naive_samples_have_the_moments_of_the_plane():
    basis = torch.linalg.qr(torch.randn(16, 16, generator=g()))[0]
    spread = 0.1 * 0.7 ** torch.arange(16)
    x = (0.5 + torch.randn(5000, 16, generator=g("x")) * spread @ basis.T).view(-1, 1, 4, 4)
    draws = fe.naive_samples(x, 20_000, g("draws"), k=3)
    cov = torch.cov(x.flatten(1).T.double())
    values = torch.linalg.eigvalsh(torch.cov(draws.flatten(1).T.double()))
    assert torch.allclose(values[-3:], torch.linalg.eigvalsh(cov)[-3:], rtol=0.1)
    assert values[-4] < 1e-8


def test_images_are_padded_to_32():
    x, _ = fe.load_data("glyphs", 256, 100, "none", "cpu")
    assert x.shape == (458, 1, 32, 32) and x[:, :, :2].abs().max() == 0
    assert torch.equal(x[:, :, 2:30, 2:30], common.glyphs(458, 0)[0])
    x, y = fe.load_data("glyphs-rgb", 256, 100, "none", "cpu")
    assert x.shape == (458, 3, 32, 32) and x[:, :, 0].min() > 0 and len(y) == 458


# --- the closing table ---


def documents_cells(channels=1):
    """A run in which everything is as the document says."""
    tables, cells = fe.published(channels), {}
    for key in tables["RE"]:
        row = {name: dict(table[key], n=5) for name, table in tables.items()}
        random, conv6 = key[2] in ("NL", "RKS"), key[:2] == ("conv", "flow6")
        L_gap = {"L": 1.66, "PNL": 5.23, "NL": 10.04, "RKS": 9.64}[key[2]]
        row |= {
            name: {"mean": value, "std": 0.1, "n": 5}
            for name, value in {
                "gap of negative ELBO": L_gap + (10 if key[0] == "fc" else 0),
                "confident": 0.9 if conv6 or not random else 0.4,
                "balance": 0.97,
                "jumps": 0.0,
                "log p": -600.0 + fe.PRIORS[key[1]],
            }.items()
        }
        cells[key] = row
    return cells


def closing(cells, channels=1, objective="as-published"):
    return fe.closing_table(cells, "FID", objective, channels)


def verdicts(cells, channels=1):
    return {claim: holds for claim, _, _, holds in closing(cells, channels)}


def test_the_documents_own_figures_meet_its_claims():
    assert [claim for claim, holds in verdicts(documents_cells()).items() if not holds] == []
    assert [claim for claim, holds in verdicts(documents_cells(3), 3).items() if not holds] == []


FLIPS = [  # what is changed, and the one claim (its beginning) that then fails
    (("fc", "normal", "NL"), "RE", 100.0, "the prior does not change RE"),
    (("conv", "flow6", "NL"), "FID", 250.0, "Conv, Flow (6) has the best FID"),
    (("conv", "flow2", "RKS"), "confident", 0.7, "of random encoders only"),
    (("conv", "flow6", "RKS"), "confident", 0.6, "of random encoders only"),
    (("conv", "flow6", "NL"), "balance", 0.8, "of random encoders only"),
    (("conv", "normal", "NL"), "gap of negative ELBO", 500.0, "fc overfits more"),
    (("fc", "normal", "PNL"), "gap of negative ELBO", 90.0, "random encoders overfit more"),
    (("fc", "flow2", "PNL"), "jumps", 0.02, "interpolations are smooth"),
    (("fc", "flow2", "PNL"), "log p", -650.0, "log p(x) in nats"),
    (("fc", "flow2", "L"), "weights", 11889.0, "Table 5.6"),
    (("fc", "flow2", "L"), "negative ELBO", -6.30, "Table 5.1"),
    (("fc", "flow2", "L"), "RT", 13.70, "Table 5.2"),
    (("fc", "flow2", "L"), "RE", 7.80, "Table 5.3"),
    (("fc", "flow2", "L"), "FID", 80.0, "Table 5.4"),
    (("conv", "flow6", "L"), "FID", 30.0, "Conv, Flow (6): FID of PNL that of L"),
    (("conv", "flow6", "PNL"), "seconds", 2.25, "Conv, Flow (6): PNL saves"),
    (("fc", "normal", "RKS"), "seconds", 0.70, "RKS: seconds"),
    (("fc", "normal", "NL"), "seconds", 0.70, "NL: seconds"),
    (("fc", "normal", "PNL"), "seconds", 0.71, "PNL: seconds"),
]


@pytest.mark.parametrize("key, measure, value, claim", FLIPS)
def test_each_claim_follows_its_own_figure(key, measure, value, claim):
    cells = documents_cells()
    cells[key][measure] = dict(cells[key][measure], mean=value)
    failed = [name for name, holds in verdicts(cells).items() if not holds]
    assert any(name.startswith(claim) for name in failed)
    others = [name for name in failed if not name.startswith((claim, "Table"))]
    assert others == []


def test_order_claims_and_the_spread_of_repeats():
    for measure in ("negative ELBO", "RE"):
        cells = documents_cells()
        for key in cells:
            if key[2] == "PNL":
                cells[key][measure] = dict(cells[key][measure], mean=60.0)
        assert not verdicts(cells)[f"L < PNL < RKS < NL in {measure}"]
    cells = documents_cells()
    for key in cells:
        if key[2] == "L":
            cells[key]["RE"] = dict(cells[key]["RE"], std=9.0)
    assert not verdicts(cells)["NL varies most between repeats, by half: std of RE"]
    for row in cells.values():
        row["RE"] = dict(row["RE"], std=None, n=1)
    assert "NL varies most between repeats, by half: std of RE" not in verdicts(cells)
    cells = documents_cells(3)
    cells["conv", "flow6", "RKS"]["negative ELBO"]["mean"] = -60.0
    assert not verdicts(cells, 3)["L < PNL < RKS < NL in negative ELBO"]
    assert "L < PNL < RKS < NL in RE" not in verdicts(cells, 3)  # not so in section 5.2
    assert "Table 5.1" not in str(closing(documents_cells(), 1, "corrected"))


# --- the run ---


def smoke(*flags):
    return fe.main(["--preset", "smoke", "--out", "run", *flags])


def test_smoke(capsys):
    report = smoke()
    out = capsys.readouterr().out
    assert out.rstrip().endswith("run") and "holds?" in out
    rows = report["results"]["models"]
    assert len(rows) == 24 and {row["weights"] for row in rows} == {
        count for row in TABLE_5_6.values() for count in row
    }
    for row in rows:
        assert row["negative ELBO"] == pytest.approx(row["RE"] - row["RT"])
        assert 10 < row["RE"] < 300 and row["distance"] > 0 and row["log p"] > row["true ELBO"]
        assert row["true ELBO"] < -row["RE"] - 400
        assert row["gap of negative ELBO"] == pytest.approx(row["gap of RE"] + row["gap of RT"])
        assert 0 <= row["confident"] <= 1 and 0 <= row["jumps"] <= 1
    figures = {path.name for path in pathlib.Path("run").glob("fig_*.png")}
    assert figures == {
        f"fig_{name}.png"
        for name in (
            *("5.7_reconstructions", "5.8_samples", "5.9_interpolations"),
            *("training", "weights"),
        )
    }
    text = pathlib.Path("run/tables.md").read_text()
    for number in range(1, 7):
        assert f"Table 5.{number}" in text
    assert "| FC | Flow (6) |" in text and "-36.90 ± 0.17" in text and "12720" in text
    assert "Table 5.4: FID" not in text and "document's FID" in text
    unit = torch.load("run/units/conv-flow6-PNL-0.pt", weights_only=True)
    nets = vae("PNL", "conv", "flow6")
    nets.load_state_dict(unit["result"]["state"])
    history = unit["result"]["history"]
    (row,) = (row for row in rows if [*fe.KEY(row)] == ["conv", "flow6", "PNL"])
    assert row["gap of RT"] == pytest.approx(history["RT"][1].item() - row["RT"], abs=1e-5)
    assert row["gap of RE"] == pytest.approx(row["RE"] - history["RE"][1].item(), abs=1e-5)
    assert os.path.getsize("run/units/conv-flow6-PNL-0-scores.pt") < 1e6
    again = smoke()
    assert again["results"] == report["results"]
    metrics = pathlib.Path("run/metrics.csv").read_text().splitlines()
    assert metrics[0] == "model,repeat,epoch,RE,RT,seconds" and len(metrics) == 1 + 24 * 2


def test_repeats_statistics_and_the_extra_encoder():
    few = ["--layers", "conv", "--prior", "flow6", "normal", "--encoder", "PRKS", "PNL"]
    report = smoke(*few)
    assert not report["results"]["anova"]
    report = smoke(*few, "L", "--repeats", "2")  # in the same folder: units are added
    models = report["results"]["models"]
    assert len(models) == 12 and [row["encoder"] for row in models[:3]] == ["L", "PNL", "PRKS"]
    a, b = (row["RE"] for row in models if row["encoder"] == "L" and row["prior"] == "flow6")
    assert a != b
    table = report["results"]["anova"]["RE"]
    assert set(table) == {"encoder", "prior", "encoder x prior"} and table["prior"]["error df"] == 4
    cell = next(cell for cell in report["results"]["cells"] if cell["encoder"] == "L")
    assert cell["RE"]["n"] == 2
    assert "| Layer | Prior | L | PNL | PRKS |" in pathlib.Path("run/tables.md").read_text()


def test_three_colours_train_the_four_models_of_table_5_10():
    report = smoke("--dataset", "glyphs-rgb", "--objective", "corrected")
    rows = report["results"]["models"]
    assert [row["weights"] for row in rows] == [10339, 10250, 10196, 10196]
    assert {(row["layers"], row["prior"]) for row in rows} == {("conv", "flow6")}
    assert report["config"]["epochs"] == 4
    text = pathlib.Path("run/tables.md").read_text()
    assert "Table 5.10: RE" in text and "11.58 ± 0.11" in text and "Table 5.3" not in text
    assert "90.81" not in text  # RT, another quantity under the corrected objective
    assert report["claims"][1]["claim"] == "L < PNL < RKS < NL in negative ELBO"


def test_fid_is_computed_beside_the_other_distance(weights_file, monkeypatch):
    def pooled(net, x):
        return fe.moments(F.avg_pool2d(x, 8).flatten(1))

    monkeypatch.setattr(fe, "fid_moments", pooled)
    one = ["--layers", "fc", "--prior", "normal", "--encoder", "RKS"]
    report = smoke(*one, "--fid-weights", weights_file)
    row = report["results"]["models"][0]
    assert row["FID"] > 0 and row["distance"] > 10 * row["FID"]
    floor = report["results"]["real"]
    assert abs(floor[0]["FID"]) < 1e-6 < floor[1]["FID"] < row["FID"]
    assert "Table 5.4: FID" in pathlib.Path("run/tables.md").read_text()
    again = smoke(*one)  # without, in the same folder
    assert "FID" not in again["results"]["models"][0]
    assert again["results"]["models"][0]["distance"] == row["distance"]


def test_two_processes_give_what_one_does():
    flags = ["--preset", "smoke", "--encoder", "L", "RKS", "--layers", "conv", "--prior", "flow2"]
    reports = []
    for n in (1, 2):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc_per_node", str(n), str(ROOT / "frozen_encoder_vae.py")),
                *(*flags, "--repeats", "2", "--out", f"run{n}"),
            ],
            check=True,
            capture_output=True,
            text=True,
        )
        units = [f"conv-flow2-{name}-{repeat}" for name in ("L", "RKS") for repeat in (0, 1)]
        assert all((f"reused {unit}\n" in done.stdout) == (n == 2) for unit in units)
        reports.append(json.loads(pathlib.Path(f"run{n}/results.json").read_text()))
    one, two = (report["results"]["models"] for report in reports)
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and fe.KEY(a) == fe.KEY(b) and a["repeat"] == b["repeat"]
        for key in a:
            if key not in ("layers", "prior", "encoder", "seconds"):
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-3), key
    units = [set(report["seconds"]["units"]) for report in reports]
    assert units[0] == units[1] and len(units[0]) == 1 + 2 + 2 * 4


def test_a_killed_run_continues_inside_a_model(killed_and_continued):
    out = killed_and_continued("frozen_encoder_vae", "conv-flow2-NL-0.checkpoint")
    assert "reused conv-normal-RKS-0" in out
    killed = json.loads(pathlib.Path("run/results.json").read_text())["results"]
    whole = fe.main(["--preset", "smoke", "--out", "whole"])["results"]
    for a, b in zip(killed["models"], whole["models"]):
        assert {k: v for k, v in a.items() if k != "seconds"} == {
            k: v for k, v in b.items() if k != "seconds"
        }


def test_the_extra_encoder_alone():
    report = smoke("--encoder", "PRKS", "--layers", "fc", "--prior", "normal")
    assert report["claims"] == [] and len(report["results"]["models"]) == 1


def test_bad_input_ends_in_one_line(refused):
    base = ["--preset", "smoke", "--out", "run"]
    for flags, words in [
        (["--encoder", "XL"], ["--encoder", "XL", "PRKS"]),
        (["--layers", "conv", "dense"], ["--layers", "dense"]),
        (["--prior", "flow4"], ["--prior", "flow4", "flow6"]),
        (["--objective", "elbo"], ["--objective"]),
        (["--anova"], ["--anova", "1 repeat", "at least 2"]),
        (["--repeats", "0"], ["--repeats", "1"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--train-images", "10"], ["--train-images", "256"]),
    ]:
        error = refused(fe.main, [*base, *flags])
        assert all(word in error for word in words), error
    assert not os.path.exists("run")


def test_data_that_does_not_do(refused, tmp_path, monkeypatch):
    base = ["--preset", "smoke", "--out", "run", "--data", str(tmp_path / "data")]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    svhn = tmp_path / "data" / "SVHN"
    svhn.mkdir(parents=True)
    (svhn / "train_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut short")
    error = refused(fe.main, [*base, "--dataset", "svhn"])
    assert "train_32x32.mat" in error and "SVHN" in error and not os.path.exists("run")


def test_more_training_images_than_there_are(refused, monkeypatch):
    few = torch.rand(700, 1, 28, 28), torch.arange(700) % 10
    monkeypatch.setattr(common, "images", lambda *_: few)
    argv = ["--preset", "smoke", "--out", "run", "--dataset", "mnist", "--train-images", "500"]
    error = refused(fe.main, argv)
    assert "--train-images" in error and "700" in error and not os.path.exists("run")
