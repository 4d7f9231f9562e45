"""frozen_encoder_vae.py: Table 5.6, flow, objective, measures, null test, and the run."""

import itertools
import json
import math
import os
import pathlib
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import MultivariateNormal, Normal

import common
import frozen_encoder_vae as fe
from helpers import killed, pasted


def g(name="test"):
    return common.generator(0, name)


def digits(n=64, channels=1):
    return F.pad(common.glyphs(n, 3, channels)[0], [2] * 4)


def vae(layers="conv", encoder="L", prior="normal", channels=1, seed=0):
    return fe.build(layers, encoder, [prior], channels, seed)


# --- Table 5.6 and Appendix B ---


def test_table_5_6_exactly():
    """Every entry, and the text's total; the transcription of the weights with it."""
    total = 0
    for channels, document in ((1, fe.DOCUMENT), (3, fe.SVHN)):
        for (layers, prior, encoder), row in document.items():
            assert fe.document_count(vae(layers, encoder, prior, channels)) == row[-1]
            total += row[-1]
    assert total == 224_590


def test_the_transcribed_tables_add_up():
    """negative ELBO = RE - RT (section 5.1), in means rounded to two digits."""
    for document in (fe.DOCUMENT, fe.SVHN):
        for key in document:
            elbo, RT, RE = (fe.published(document, key, name)[0] for name in fe.COLUMNS[:3])
            assert elbo == pytest.approx(RE - RT, abs=0.021), key
    assert len(fe.DOCUMENT) == 24 and fe.published(fe.DOCUMENT, ("fc", "flow6", "RKS"), "FID") == (
        120.72, 10.82)


def test_shapes_and_activations_of_appendix_b():
    net, shapes = vae("conv", "L"), []
    for part in (*net.encoder.body, net.encoder.last, *net.decoder):
        part.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    net(torch.rand(2, 1, 32, 32), torch.zeros(2, 16))
    wanted = [(4, 32, 32), (4, 16, 16), (8, 16, 16), (8, 8, 8), (16, 8, 8), (16, 4, 4), (8, 2, 2)]
    wanted += [(4, 2, 2), (64, 2, 2), (64, 4, 4), (32, 4, 4), (32, 8, 8), (16, 8, 8)]
    wanted += [(16, 16, 16), (8, 16, 16), (8, 32, 32), (1, 32, 32)]
    assert [key for key, _ in itertools.groupby(shapes)] == wanted
    for layers in fe.LAYERS:
        active = [m for m in vae(layers).decoder if isinstance(m, nn.LeakyReLU)]
        assert len(active) == 4 and not isinstance(vae(layers).decoder[-1], nn.LeakyReLU)
        rks, (a, b) = vae(layers, "RKS").encoder.frozen, torch.rand(2, 4, 1, 32, 32)
        assert torch.allclose(rks(a + b) + rks(0 * a), rks(a) + rks(b), atol=1e-5)  # affine


def test_xavier_bounds_and_equal_starts():
    bound = math.sqrt(6 / (512 + 1024))
    assert 0.99 * bound < vae("fc").decoder[6].weight.abs().max() <= bound
    bound = math.sqrt(6 / (9 * 4 + 9 * 64))
    assert 0.98 * bound < vae("conv").decoder[1].weight.abs().max() <= bound
    a, b = vae("conv", "PNL"), vae("conv", "PNL", "flow6")
    assert torch.equal(a.decoder[1].weight, b.decoder[1].weight)
    assert torch.equal(a.encoder.body[0].weight, b.encoder.body[0].weight)
    assert not torch.equal(a.decoder[1].weight, vae(seed=1).decoder[1].weight)


# --- the flow ---


def flow(K=3, D=6, scale=1.0):
    prior = fe.Flow(D, 8, K).double()
    for value in prior.parameters():
        nn.init.normal_(value, std=scale, generator=g("flow"))
    return prior


def test_flow_inverts_and_its_log_determinant_is_autograds():
    prior, z = flow(), torch.randn(5, 6, generator=g(), dtype=torch.double)
    u, logdet = prior(z)
    assert torch.allclose(prior.inverse(u), z, atol=1e-10) and (u - z).abs().mean() > 0.1
    for row, value in zip(z, logdet):
        J = torch.autograd.functional.jacobian(lambda v: prior(v[None])[0][0], row)
        assert torch.allclose(torch.linalg.slogdet(J)[1], value)
    prior = flow(1, 4)
    a, b = z[:, :2], z[:, 2:4]
    y_b = prior.s[0](a).exp() * b + prior.t[0](a)  # the document's equations
    wanted = torch.stack([y_b[:, 1], y_b[:, 0], a[:, 1], a[:, 0]], 1)
    assert torch.allclose(prior(z[:, :4])[0], wanted)
    u, logdet = fe.Flow(6, 8, 0)(z)
    assert torch.equal(u, z) and not logdet.any()  # no flow: the normal prior


def test_density_in_two_dimensions_integrates_to_one():
    prior, line = flow(4, 2, 0.7), torch.linspace(-12, 12, 301, dtype=torch.double)
    u, logdet = prior(torch.cartesian_prod(line, line))
    density = (logdet - (u**2).sum(1) / 2 - math.log(2 * math.pi)).exp()
    assert abs(density.sum().item() * 0.08**2 - 1) < 1e-3


# --- the objective ---


def test_terms_against_the_definition():
    net, x, eps = vae("conv", "L", "flow2"), digits(), torch.randn(64, 16, generator=g())
    mu, logvar = net.encoder(x)
    z = mu + (logvar / 2).exp() * eps
    u, logdet = net.priors["flow2"](z)
    parts = Normal(0, 1).log_prob(u) + Normal(mu, (logvar / 2).exp()).entropy()
    RE, RT = fe.loss_terms(net, x, x, eps, "as-published")
    assert torch.allclose(RT, parts.mean(1) + logdet, atol=1e-5)
    assert torch.allclose(RE, ((net.decoder(z) - x) ** 2).sum((1, 2, 3)))
    _, RT = fe.loss_terms(net, x, x, eps, "corrected")
    assert torch.allclose(RT, parts.sum(1) + logdet, atol=1e-4)


@pytest.mark.parametrize("prior", ["normal", "flow6"])
def test_ceiling_of_the_published_rt(prior):
    """A frozen encoder stays below 8 K - 6.408, and reaches it with saturated flows at 0."""
    net, x, K = vae("fc", "NL", prior), digits(), fe.PRIORS[prior]
    h, eps = net.encoder.frozen(x), torch.randn(64, 16, generator=g())
    assert (fe.loss_terms(net, h, x, eps, "as-published")[1] <= 8 * K - 6.4077).all()
    for s, t in zip(net.priors[prior].s, net.priors[prior].t):
        s[4].bias.data.fill_(50.0)
        t[4].weight.data.zero_(), t[4].bias.data.zero_()
    RT = fe.loss_terms(net, 0 * h, x, 0 * eps, "as-published")[1]
    assert torch.allclose(RT, torch.tensor(8 * K + (1 + math.log(1e-6)) / 2))


def test_re_of_a_frozen_encoder_does_not_depend_on_the_prior():
    """One decoder for three priors is three trainings' own: no gradient goes across."""
    x, eps = digits(), torch.randn(64, 16, generator=g())
    for encoder in ("NL", "L"):
        net = vae("conv", encoder, "flow2")
        _, z, _ = net(net.encoder.frozen(x), eps)
        assert z.requires_grad == (encoder == "L")
    together = fe.build("conv", "NL", ["normal", "flow2"], 1, 0)
    alone = vae("conv", "NL", "flow2")
    alone.priors.load_state_dict({key: value for key, value in together.priors.state_dict().items()
                                  if key.startswith("flow2")})
    log = fe.train("", together, digits(300), "as-published", 2, 256, g())
    other = fe.train("", alone, digits(300), "as-published", 2, 256, g())
    assert torch.allclose(log[:, [0, 2]], other, rtol=1e-5)
    for key, value in alone.state_dict().items():
        assert torch.allclose(value, together.state_dict()[key], atol=1e-5), key


# --- training ---


@pytest.mark.parametrize("layers, encoder", [*itertools.product(["conv"], fe.ENCODERS),
                                             ("fc", "PNL"), ("fc", "PCA")])
def test_frozen_weights_stay_and_all_others_move(layers, encoder):
    net = vae(layers, encoder, "flow2")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    fe.train("test", net, digits(256), "as-published", 2, 256, g())
    moved = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    stay = {"L": (), "PNL": ("encoder.body",)}.get(encoder, ("encoder",))
    still = (*stay, "encoder.shift", "encoder.scale")
    assert moved == {key for key in before if not key.startswith(still)}


def test_training_equals_a_plain_loop():
    """Frozen features computed once, against a loop that does all of it in every step."""
    x, net, plain = digits(600), vae("conv", "PNL", "flow2"), vae("conv", "PNL", "flow2")
    log = fe.train("test", net, x, "as-published", 2, 256, g())
    generator, means = g(), []
    adam = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        for index in torch.randperm(600, generator=generator).split(256):
            eps = torch.randn(len(index), 16, generator=generator)
            out = plain.encoder.last(plain.encoder.body(x[index]))
            mu, logvar = out[:, :4].flatten(1), out[:, 4:].flatten(1)
            z = mu + torch.exp(0.5 * logvar) * eps
            u, logdet = plain.priors["flow2"](z)
            RE = (plain.decoder(z) - x[index]).pow(2).sum((1, 2, 3)).mean()
            RT = (logdet + (0.5 * (1 + logvar - u**2)).mean(1)).mean()
            adam.zero_grad()
            (RE - RT).backward()
            adam.step()
            means.append(torch.stack([RE, RT]).detach())
    assert torch.allclose(torch.stack(means).view(2, 3, 2).mean(1), log, rtol=1e-4)


def test_splits_are_disjoint_and_drawn_anew():
    x = torch.arange(60_000.0)
    train, test = fe.split(x, 25_000, 60_000, 0)
    assert len(train) == len(test) == 25_000  # and 10,000 for validation: Table 4.1
    assert not set(train.tolist()) & set(test.tolist())
    assert not torch.equal(train, fe.split(x, 25_000, 60_000, 1)[0])
    assert len(fe.split(torch.arange(73_257.0), 25_000, 60_000, 0)[1]) == 38_257


def test_pca_is_the_best_linear_code_and_standardised_codes_are_standard():
    x = digits(400)
    codes = fe.make(fe.Model("fc", "PCA", ("normal",)), 0, x).encoder.frozen(x)
    values = torch.linalg.eigvalsh(torch.cov(x.flatten(1).T.double()))
    assert torch.allclose(codes.var(0).double(), values[-16:], rtol=1e-3)
    net = fe.make(fe.Model("conv", "RKS", ("normal",), True), 0, x)
    codes = net.encoder.frozen(x)
    assert codes.mean(0).abs().max() < 1e-4 and (codes.std(0) - 1).abs().max() < 1e-4


# --- log p(x) ---


def test_log_p_of_a_linear_gaussian_model():
    """Known exactly; codes of a random encoder, as far off as a frozen one's."""
    W = torch.randn(64, 16, generator=g("W"))
    x = torch.randn(100, 16, generator=g("z")) @ W.T
    x = x + math.sqrt(0.5) * torch.randn(100, 64, generator=g("x"))
    exact = MultivariateNormal(torch.zeros(64), W @ W.T + torch.eye(64) / 2).log_prob(x)
    mu = x @ (0.02 * torch.randn(64, 16, generator=g("encoder")))
    found = fe.log_likelihood(lambda z: z @ W.T, fe.Flow(16, 8, 0), mu, x, 50, g())
    assert abs((found - exact).mean()) < 0.05


def test_predicted_rt():
    """The document's Table 5.2, from codes' deviations of untrained encoders on MNIST."""
    for deviation, K, published in ((0.034, 0, -6.43), (0.034, 2, 9.58), (0.034, 6, 41.08),
                                    (0.12, 6, 38.07), (0.31, 2, 9.32)):
        std = torch.full((16,), deviation)
        assert fe.predicted_rt(std, std**2, K, "as-published") == pytest.approx(published, rel=0.03)
    std = torch.tensor([0.5, 2.0])  # corrected: whitening is best, where the flow can
    own = 1 + math.log(1e-6)
    assert fe.predicted_rt(std, std**2, 6, "corrected") == pytest.approx(own - 1)
    assert fe.predicted_rt(std, std**2, 1, "corrected") == pytest.approx(
        own + math.log(math.exp(0.5) / 2) - (0.25 * math.e + 1) / 2)


# --- measures and statistics ---


def test_frechet_distance_of_gaussians():
    zero, A = torch.zeros(2).double(), torch.diag(torch.tensor([1.0, 4])).double()
    B, mean = torch.diag(torch.tensor([9.0, 25])).double(), torch.tensor([3.0, 4]).double()
    assert fe.frechet_distance(zero, A, mean, B) == pytest.approx(25 + 4 + 9)
    root = torch.tensor([[1, 0.5], [-0.3, 2]]).double()
    C = root @ root.T
    product = torch.linalg.eigvals(A @ C).real.sqrt().sum()
    expected = A.trace() + C.trace() - 2 * product
    assert fe.frechet_distance(zero, A, zero, C) == pytest.approx(expected.item())
    assert abs(fe.frechet_distance(mean, C, mean, C)) < 1e-12


class Rows(nn.Module):
    """The means of rows 0 to 9 as logits."""

    def forward(self, h):
        return 10 * h.view(-1, 32, 32)[:, :10].mean(2)


READER = nn.Sequential(nn.Flatten(), Rows())  # a judge whose features are the pixels


def test_judged():
    x = torch.zeros(100, 1, 32, 32)
    x[torch.arange(100), 0, torch.arange(100) % 4] = 1.0  # classes 0 to 3, with certainty
    real = fe.moments(x.flatten(1))
    row = fe.judged(READER, x, real)
    assert row["read"] == 1 and row["balance"] == pytest.approx(math.log(4) / math.log(10))
    assert abs(row["distance"]) < 1e-4
    assert row["variation"] == pytest.approx(x.flatten(1).var(0).sum().item())
    assert fe.judged(READER, 0.01 * x, real)["read"] == 0


def test_samples_of_codes_own_gaussian_and_interpolations():
    z = torch.randn(4000, 3, generator=g()) @ torch.tensor([[1.0, 0.4, 0], [0, 1, 2], [0, 0, 3]])
    drawn = fe.gaussian_codes(z + 5, 40_000, g("drawn"))
    assert torch.allclose(torch.cov(drawn.T), torch.cov(z.T), atol=0.5)
    assert torch.allclose(drawn.mean(0), torch.full((3,), 5.0), atol=0.2)
    net, (a, b) = vae("conv", "RKS"), torch.randn(2, 3, 16, generator=g())
    paths = fe.interpolate(net.decoder, a, b)
    third = net.decoder(a + (b - a) * 2 / 6).clamp(0, 1)
    assert paths.shape == (3, 7, 1, 32, 32) and torch.allclose(paths[:, 2], third, atol=1e-5)


TOOTH_GROWTH = {  # R's data set ToothGrowth (Crampton 1947), length by supplement and dose
    (0, 0): "4.2 11.5 7.3 5.8 6.4 10.0 11.2 11.2 5.2 7.0",
    (0, 1): "16.5 16.5 15.2 17.3 22.5 17.3 13.6 14.5 18.8 15.5",
    (0, 2): "23.6 18.5 33.9 25.5 26.4 32.5 26.7 21.5 23.3 29.5",
    (1, 0): "15.2 21.5 17.6 9.7 14.5 10.0 8.2 9.4 16.5 9.7",
    (1, 1): "19.7 23.3 23.6 26.4 20.0 25.2 25.8 21.2 14.5 27.3",
    (1, 2): "25.5 26.4 22.4 24.5 24.8 30.9 26.4 27.3 29.4 23.0",
}


def test_anova_against_a_published_table():
    """aov(len ~ supp * dose), dose a factor, as R prints it; p by permutation near R's."""
    rows = [(a, b, float(v)) for (a, b), text in TOOTH_GROWTH.items() for v in text.split()]
    supp, dose, y = (torch.tensor(column) for column in zip(*rows))
    terms = [("supp",), ("dose",), ("supp", "dose")]
    table = fe.anova(y, {"supp": supp, "dose": dose}, terms, 9999, g())
    assert [(round(r["F"], 3), r["df"], r["error df"]) for r in table.values()] == [
        (15.572, 1, 54), (92.0, 2, 54), (4.107, 2, 54)]
    assert table[terms[2]]["p"] == pytest.approx(0.0219, abs=0.006)
    assert table[terms[1]]["p"] == 1e-4 and table[terms[0]]["p"] < 0.002
    assert fe.sign_flip_p(torch.ones(6), 9999, g()) == pytest.approx(2 / 64, abs=0.007)
    assert fe.sign_flip_p(torch.tensor([1.0, -1, 2, -2]), 999, g()) == 1
    assert fe.t4_within(2.776) == pytest.approx(0.95, abs=1e-4)


# --- the FID ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A hub folder with a file of the format of the TF-ported weights, drawn at random."""
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    home = tmp_path_factory.mktemp("hub")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(net.state_dict(), home / "hub" / "checkpoints" / fe.INCEPTION.rpartition("/")[2])
    return home


def test_inception_is_the_tf_ported_one(weights, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(weights))
    net, seen = fe.inception("cpu"), []
    net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert fe.fid_moments(net, torch.rand(2, 1, 32, 32, generator=g()))[0].shape == (2048,)
    assert seen[0].shape == (2, 3, 299, 299) and -1 <= seen[0].min() < -0.9 < 0.9 < seen[0].max()
    fe.fid_moments(net, torch.full((2, 3, 32, 32), 0.5))
    assert torch.allclose(seen[1], torch.tensor(2 * 128 / 255 - 1), atol=1e-6)  # of 256 levels
    for name, size, largest in [("Mixed_5b", 192, False), ("Mixed_6c", 768, False),
                                ("Mixed_7b", 1280, False), ("Mixed_7c", 2048, True)]:
        block, h = getattr(net, name), torch.randn(1, size, 9, 9, generator=g())
        count = F.avg_pool2d(torch.ones(1, 1, 9, 9), 3, 1, 1)  # the share that is no padding
        pooled = F.max_pool2d(h, 3, 1, 1) if largest else F.avg_pool2d(h, 3, 1, 1) / count
        expected = block.branch_pool.forward(pooled)  # without the hook that pools
        assert torch.allclose(block(h)[:, -expected.shape[1] :], expected, atol=1e-5)


def test_fid_without_its_weights_is_one_line(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: 1 / 0)
    error = refused(fe.main, [*SMOKE, "--fid"])
    assert "pt_inception-2015-12-05-6726825d.pth" in error and not os.path.exists("run")


# --- verdicts ---

EARNED = ("reproduced", "better", "yes")


def documents_run(document=fe.DOCUMENT, repeats=3):
    """Cells as the document has them, each repeat off by the same little."""
    off, at = torch.linspace(-0.001, 0.001, repeats).double(), {}
    for key in document:
        layers, prior, encoder = key
        found = {name: fe.published(document, key, name)[0] + off for name in fe.COLUMNS}
        frozen, six = encoder in ("NL", "RKS"), prior == "flow6"
        found["FID"] = found["FID"] + 500 * off * fe.published(document, key, "FID")[1]
        gap = {"L": 1.66, "PNL": 5.23, "NL": 10.04, "RKS": 9.64}[encoder]
        found["gap of negative ELBO"] = gap + 10 * (layers == "fc") + off
        found["gap of RE"] = found["gap of negative ELBO"]
        found["gap of RT"] = 0.5 * (encoder == "RKS") + 0.6 * six + off
        found["unread"] = 0.5 - 0.4 * (six and layers == "conv") + off
        found["variation"] = 50.0 - 40 * (frozen and six and layers == "fc") + off
        found["weights"] = document[key][-1]
        at[key] = found
    return at


def not_earned(table):
    return [row["claim"] for row in table if row["verdict"] not in EARNED]


def test_the_documents_own_figures_meet_its_claims():
    """And none without learning; of a part of the grid there are no orders."""
    table = fe.claims(documents_run(), fe.DOCUMENT, True, True, 3)
    assert len(table) > 35 and not_earned(table) == []
    table = fe.claims(documents_run(), fe.DOCUMENT, False, True, 3)
    assert len(not_earned(table)) == len(table)
    assert not_earned(fe.claims(documents_run(fe.SVHN), fe.SVHN, True, True, 3)) == []
    few = {key: row for key, row in documents_run().items() if key[:2] == ("conv", "flow6")}
    assert len(fe.claims(few, fe.DOCUMENT, True, True, 3)) == 13


FLIPS = [  # what is changed in the document's run, and the beginning of a claim that then fails
    (("fc", "normal", "NL"), "RE", -100.0, "RE: L < PNL"),
    (("conv", "flow6", "L"), "RE", 20.0, "RE of L, PNL: flow6"),
    (("conv", "flow6", "NL"), "FID", 250.0, "FID: conv, flow6 best"),
    (("conv", "flow6", "NL"), "FID", 250.0, "FID: conv NL, RKS gain more"),
    (("conv", "flow2", "RKS"), "unread", -0.45, "unread: NL, RKS least"),
    (("conv", "normal", "NL"), "gap of negative ELBO", 500.0, "gap of negative ELBO: conv"),
    (("conv", "flow6", "PNL"), "seconds", 0.1, "conv, flow6: PNL saves"),
    (("fc", "flow2", "L"), "weights", 1, "weights that differ"),
    (("conv", "flow6", "RKS"), "RT", -0.5, "conv, flow6, RKS: RT"),
    (("fc", "flow6", "RKS"), "variation", 80.0, "fc, flow6: NL, RKS vary less"),
]


def test_each_claim_follows_its_own_figure():
    for key, measure, change, claim in FLIPS:
        at = documents_run()
        at[key][measure] = at[key][measure] + change
        failed = not_earned(fe.claims(at, fe.DOCUMENT, True, True, 3))
        assert any(name.startswith(claim) for name in failed), (claim, failed)


def test_learned_sees_each_dead_part():
    assert fe.learned(documents_run(), 16, 52.5)
    for key, measure, value in ((("conv", "normal", "NL"), "RE", 50.0),
                                (("fc", "flow6", "L"), "RT", 10.0)):
        at = documents_run()
        at[key][measure] = torch.tensor([value])
        assert not fe.learned(at, 16, 52.5)


# --- the run ---

SMOKE = ["--preset", "smoke", "--out", "run"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "run"
    return folder, fe.main(["--preset", "smoke", "--out", str(folder)])


def but_times(results):
    return {cell: {key: value for key, value in row.items() if key != "seconds"}
            for cell, row in results.items() if cell != "mean image"}


def test_smoke_writes_everything(smoke):
    folder, report = smoke
    assert {path.name for path in folder.glob("[!.]*.*")} == {
        *("config.json", "results.json", "metrics.csv", "table.md"),
        *(f"fig_{name}.png" for name in "reconstructions samples paths training scale".split())}
    assert json.load(open(folder / "results.json")) == report
    closing, *others = report["tables"].values()
    assert {row["verdict"] for row in closing} == {"-"} and len(closing) > 35
    assert all("verdict" not in table[0] for table in others)
    text = (folder / "table.md").read_text()
    assert all(len(line) < 100 for line in text.splitlines() if line.startswith("|"))
    assert not re.search(r"-0(\.0+)?\b(?!\.)", text) and "[44.82]" in text  # no negative zero
    cells = but_times(report["results"])
    assert len(cells) == 24
    for row in cells.values():
        assert row["negative ELBO"][0] == pytest.approx(row["RE"][0] - row["RT"][0])
        gap = row["gap of negative ELBO"][0]  # above 0 where test images come out worse
        assert gap == pytest.approx(row["gap of RE"][0] + row["gap of RT"][0])
        assert 10 < row["RE"][0] < 300 and row["distance"][0] > 0
    trained = torch.load(folder / "units" / "seed0-fc-L-flow2.pt")["result"]["log"][-1]
    row = cells["fc-flow2-L"]
    assert row["gap of RE"][0] == pytest.approx(row["RE"][0] - trained[0].item())
    assert row["gap of RT"][0] == pytest.approx(trained[1].item() - row["RT"][0])
    a, b = cells["conv-normal-NL"], cells["conv-flow6-NL"]
    assert a["RE"] == b["RE"] and a["distance"] != b["distance"]  # one decoder, three priors


def test_null(monkeypatch):
    """Untrained nets, and with fc decoders that put out the mean image, earn no row."""
    def train_unit(unit, model, seed, x, objective, epochs, batch):
        net = fe.make(model, seed, x)
        if model.layers == "fc":
            net.decoder[-2].weight.data.zero_()
            net.decoder[-2].bias.data = x.mean(0).flatten()
        return {"weights": net.state_dict(), "log": torch.zeros(epochs, 1 + len(net.priors))}

    judged, claims = [], fe.claims

    def claims_seen(*rest):
        judged.append(rest)
        return claims(*rest)

    monkeypatch.setitem(fe.PRESETS, "quick", dict(fe.PRESETS["smoke"], seeds=2))
    monkeypatch.setattr(fe, "train_unit", train_unit)
    monkeypatch.setattr(fe, "claims", claims_seen)
    monkeypatch.setattr(fe, "plot", lambda *rest: None)
    monkeypatch.setattr(fe, "PERMUTATIONS", 99)
    monkeypatch.setattr(fe, "log_likelihood", lambda decoder, prior, mu, *rest: mu[:, 0])
    seconds = {key: [10.0 + row[8] + 0.01 * i for i in range(2)]
               for key, row in fe.DOCUMENT.items()}
    monkeypatch.setattr(fe, "time_epochs", lambda *rest: seconds)
    report = fe.main(["--out", "null"])
    assert any("Post-hoc" in title for title in report["tables"])
    table = next(iter(report["tables"].values()))
    assert len(table) > 35 and len(not_earned(table)) == len(table)
    at, document, _, _, repeats = judged[0]
    assert len(not_earned(claims(at, document, True, True, repeats))) < 35  # it can be lost


def test_three_colours_and_the_corrected_objective():
    flags = "--dataset glyphs-rgb --objective corrected --seeds 2 --encoder L RKS".split()
    report = fe.main([*SMOKE, *flags])
    assert [row["weights"] for key, row in report["results"].items() if "-" in key] == [10339,
                                                                                       10196]
    closing, *_ = report["tables"].values()
    assert {row["verdict"] for row in closing} == {"-"}
    statistics = report["tables"]["Section 5.1: analyses of variance, p by permutation"]
    assert {row["term"] for row in statistics} == {"encoder"}


def test_kill_and_continue_equals_an_undisturbed_run(smoke, monkeypatch):
    """A real kill -9 in the middle of a net, an error in that of the judge; then the same."""
    shutil.copytree(smoke[0], "run")
    os.remove("run/results.json")
    os.remove("run/units/seed0-fc-L-flow2.pt")
    killed("import frozen_encoder_vae; frozen_encoder_vae.main()",
           "seed0-fc-L-flow2.1.checkpoint", "--preset", "smoke")
    os.remove("run/units/judge.pt")
    three = iter([F.cross_entropy] * 3)
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(common, "EVERY", 0)
        patch.setattr(F, "cross_entropy", lambda *rest: next(three)(*rest))
        fe.main(SMOKE)
    assert os.path.exists("run/units/judge.1.checkpoint")
    monkeypatch.setattr(fe, "plot", lambda *rest: None)
    assert but_times(fe.main(SMOKE)["results"]) == but_times(smoke[1]["results"])
    assert open("run/metrics.csv").read() == (smoke[0] / "metrics.csv").read_text()
    for name in ("judge", "seed0-fc-L-flow2"):
        one, other = (torch.load(folder / "units" / f"{name}.pt")["result"]["weights"]
                      for folder in (pathlib.Path("run"), smoke[0]))
        assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("argv", ["--prior flow4", "--train-images 10",
                                  "--prior normal --dataset svhn"])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    assert argv.split()[0] in refused(fe.main, argv.split()) and os.listdir() == []


def test_the_copy_test():
    """The flow, the model with its loss, and the Fréchet distance, pasted alone, run."""
    note = pasted("frozen_encoder_vae", ["Encoder", "Decoder", "Flow", "VAE", "frechet_distance",
                                         "reconstruction_error", "regularisation_term",
                                         "loss_terms"], "VARIANCE = 1e-6")
    x, eps = digits(), torch.randn(64, 16, generator=g())
    flow = note["Flow"](16, 8, 2)
    decoder = note["Decoder"]("conv", 1, 4)
    vae = note["VAE"](note["Encoder"]("L", "conv", 1, 4), decoder, {"f": flow})
    RE, RT = note["loss_terms"](vae, x, x, eps, "corrected")
    (RE - RT).mean().backward()
    assert vae.encoder.body[0].weight.grad.abs().max() > 0
    assert torch.allclose(flow.inverse(flow(eps)[0]), eps, atol=1e-5)
    one = torch.eye(3).double()
    assert note["frechet_distance"](one[0], one, one[1], one) == pytest.approx(2)
