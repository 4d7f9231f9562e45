"""frozen_encoder_vae.py: Table 5.6, flow, objective, measures, null test, and the run."""

import itertools
import math
import os
import pathlib
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


# --- the document's tables and nets ---


def test_table_5_6_exactly():
    """Every entry, the text's total, and the true counts that it stands for."""
    total = 0
    for channels, document in ((1, fe.DOCUMENT), (3, fe.SVHN)):
        for (layers, prior, encoder), row in document.items():
            _, sides = fe.count_weights(vae(layers, encoder, prior, channels))
            assert sides == row[-1]
            total += sides
    assert total == 224_590
    assert fe.count_weights(vae("fc"))[0] == 2_047_328
    assert fe.count_weights(vae("conv"))[0] == 29_353


def test_the_transcribed_tables_add_up():
    """negative ELBO = RE - RT (section 5.1), in means rounded to two digits."""
    for document in (fe.DOCUMENT, fe.SVHN):
        for key in document:
            elbo, RT, RE = (fe.published(document, key, name)[0] for name in fe.COLUMNS[:3])
            assert elbo == pytest.approx(RE - RT, abs=0.021), key


# --- flow and objective ---


def test_flow_inverts_and_its_log_determinant_is_autograds():
    """And one coupling is Eqs. (2.2.1) and (2.2.2)."""
    prior, z = fe.Flow(6, 8, 3).double(), torch.randn(5, 6, generator=g(), dtype=torch.double)
    for value in prior.parameters():
        nn.init.normal_(value, generator=g("flow"))
    u, logdet = prior(z)
    assert torch.allclose(prior.inverse(u), z, atol=1e-10) and (u - z).abs().mean() > 0.1
    for row, value in zip(z, logdet):
        J = torch.autograd.functional.jacobian(lambda v: prior(v[None])[0][0], row)
        assert torch.allclose(torch.linalg.slogdet(J)[1], value)
    one = fe.Flow(6, 8, 1).double()
    a, b = z.chunk(2, 1)
    y_b = one.s[0](a).exp() * b + one.t[0](a)
    assert torch.allclose(one(z)[0], torch.cat([y_b.flip(1), a.flip(1)], 1))


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
    with pytest.raises(ValueError, match="as_published"):
        fe.loss_terms(net, x, x, eps, "as_published")


@pytest.mark.parametrize("prior", ["normal", "flow6"])
def test_ceiling_of_the_published_rt(prior):
    """A frozen encoder stays below 8 K - 6.408, and reaches it with saturated flows at 0."""
    net, x, K = vae("fc", "NL", prior), digits(), fe.PRIORS[prior]
    h, eps = net.encoder.frozen(x), torch.randn(64, 16, generator=g())
    assert (fe.loss_terms(net, h, x, eps, "as-published")[1] <= 8 * K - 6.4077).all()
    for s, t in zip(net.priors[prior].s, net.priors[prior].t):
        s[4].bias.data.fill_(50.0)
        t[4].weight.data.zero_()
        t[4].bias.data.zero_()
    RT = fe.loss_terms(net, 0 * h, x, 0 * eps, "as-published")[1]
    assert torch.allclose(RT, torch.tensor(8 * K + (1 + math.log(1e-6)) / 2))


# --- training ---


def test_priors_of_a_frozen_encoder_train_as_if_alone():
    together, alone = fe.build("conv", "NL", ["normal", "flow2"], 1, 0), vae("conv", "NL", "flow2")
    alone.load_state_dict(together.state_dict())  # the normal prior has no weights
    log = fe.train("", together, digits(256), "as-published", 2, 128, g())
    other = fe.train("", alone, digits(256), "as-published", 2, 128, g())
    assert torch.allclose(log[:, [0, 2]], other, rtol=1e-5)
    for key, value in alone.state_dict().items():
        assert torch.allclose(value, together.state_dict()[key], atol=1e-5), key


def test_training_equals_a_plain_loop():
    """Frozen features computed once, against a loop that does all of it in every step."""
    x, net, plain = digits(600), vae("conv", "PNL", "flow2"), vae("conv", "PNL", "flow2")
    log = fe.train("test", net, x, "as-published", 1, 256, g())
    generator, sums = g(), 0
    adam = torch.optim.Adam([p for p in plain.parameters() if p.requires_grad], 1e-3)
    for index in torch.randperm(600, generator=generator).split(256):
        eps = torch.randn(len(index), 16, generator=generator)
        mu, logvar = plain.encoder(x[index])
        z = mu + torch.exp(0.5 * logvar) * eps
        u, logdet = plain.priors["flow2"](z)
        RE = (plain.decoder(z) - x[index]).pow(2).sum((1, 2, 3))
        RT = logdet + (0.5 * (1 + logvar - u**2)).mean(1)
        adam.zero_grad()
        (RE - RT).mean().backward()
        adam.step()
        sums = sums + torch.stack([RE.sum(), RT.sum()]).detach()
    assert torch.allclose(log[0], sums / 600, rtol=1e-4)  # the last batch has 88


def test_splits_are_disjoint_and_drawn_anew():
    x = torch.arange(60_000.0)
    train, test = fe.split(x, 25_000, 60_000, 0)
    assert len(train) == len(test) == 25_000  # and 10,000 for validation: Table 4.1
    assert not set(train.tolist()) & set(test.tolist())
    assert not torch.equal(train, fe.split(x, 25_000, 60_000, 1)[0])
    assert len(fe.split(torch.arange(73_257.0), 25_000, 60_000, 0)[1]) == 38_257


def test_fitted_encoders_and_their_state_dicts():
    """PCA is the best linear code, standardised codes are standard; loading needs no data."""
    x = digits(400)
    model = fe.Model("fc", "PCA", ("normal",))
    codes = fe.make(model, 0, x).encoder.frozen(x)
    values = torch.linalg.eigvalsh(torch.cov(x.flatten(1).T.double()))
    assert torch.allclose(codes.var(0).double(), values[-16:], rtol=1e-3)
    model = fe.Model("conv", "RKS", ("normal",), True)
    net = fe.make(model, 0, x)
    codes = net.encoder.frozen(x)
    assert codes.mean(0).abs().max() < 1e-4 and (codes.std(0) - 1).abs().max() < 1e-4
    again = fe.load_vae(model, 1, net.state_dict(), "cpu")
    assert torch.equal(again.encoder(x)[0], codes)


# --- evaluation ---


def test_samples_go_backwards_through_prior_and_decoder():
    net, flow = vae("conv", "NL", "flow6"), fe.Flow(16, 128, 6)
    net.priors["flow6"] = flow
    images, z = fe.sample(net, "flow6", 4000, g())
    u, _ = flow(z)
    assert u.mean(0).abs().max() < 0.08 and (u.std(0) - 1).abs().max() < 0.06
    assert torch.allclose(images[:5], net.decoder(z[:5]).clamp(0, 1), atol=1e-5)


def test_log_p_of_a_linear_gaussian_model():
    """Known exactly; codes of a random encoder, as far off as a frozen one's."""
    W = torch.randn(64, 16, generator=g("W"))
    x = torch.randn(50, 16, generator=g("z")) @ W.T
    x = x + math.sqrt(0.5) * torch.randn(50, 64, generator=g("x"))
    exact = MultivariateNormal(torch.zeros(64), W @ W.T + torch.eye(64) / 2).log_prob(x)
    mu = x @ (0.02 * torch.randn(64, 16, generator=g("encoder")))
    found = fe.log_likelihood(lambda z: z @ W.T, fe.Flow(16, 8, 0), mu, x, 50, g())
    assert abs((found - exact).mean()) < 0.05
    with pytest.raises(FloatingPointError):
        fe.log_likelihood(lambda z: z @ W.T * math.nan, fe.Flow(16, 8, 0), mu, x, 1, g())


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


def test_frechet_distance_of_gaussians():
    A, root = torch.randn(2, 3, 3, generator=g(), dtype=torch.double)
    A, B, mean = A @ A.T, root @ root.T, torch.tensor([3.0, 4, 0]).double()
    expected = 25 + A.trace() + B.trace() - 2 * torch.linalg.eigvals(A @ B).real.sqrt().sum()
    assert fe.frechet_distance(mean, A, 0 * mean, B) == pytest.approx(expected.item())


def test_inception_is_the_tf_ported_one(tmp_path, monkeypatch, refused):
    """Random weights in the format of the file; without the file, one line."""
    from torchvision.models import inception_v3

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: 1 / 0)
    assert "pt_inception-2015" in refused(fe.main, ["--preset", "smoke", "--fid"])
    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "hub/checkpoints" / fe.INCEPTION.rpartition("/")[2])
    net, seen = fe.inception("cpu"), []
    net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    assert fe.fid_moments(net, torch.full((2, 1, 32, 32), 0.5))[0].shape == (2048,)
    assert torch.allclose(seen[0], torch.tensor(2 * 128 / 255 - 1), atol=1e-6)  # of 256 levels
    for name, size, largest in (("Mixed_5b", 192, False), ("Mixed_7b", 1280, False),
                                ("Mixed_7c", 2048, True)):
        block, h = getattr(net, name), torch.randn(1, size, 9, 9, generator=g())
        pooled = F.avg_pool2d(h, 3, 1, 1, count_include_pad=False)
        if largest:
            pooled = F.max_pool2d(h, 3, 1, 1)
        expected = block.branch_pool.forward(pooled)  # without the hook that pools
        assert torch.allclose(block(h)[:, -expected.shape[1]:], expected, atol=1e-5)


# --- statistics ---

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
    assert fe.t4_within(2.776) == pytest.approx(0.95, abs=1e-4)


def test_p_values_under_the_null_with_shared_cells(monkeypatch):
    """No effect, but the three cells of a frozen encoder are near copies, as in a run."""
    monkeypatch.setattr(fe, "PERMUTATIONS", 199)
    monkeypatch.setattr(fe, "ANALYSES", {"RE": (fe.FULL, {})})
    generator, count = g("null"), 150
    small = dict.fromkeys([" x ".join(term) for term in fe.FULL], 0)
    for _ in range(count):
        shared, at = torch.randn(2, 4, 2, generator=generator), {}
        for layers, prior, encoder in fe.DOCUMENT:
            noise = torch.randn(2, generator=generator)
            if encoder in ("NL", "RKS"):
                place = fe.LAYERS.index(layers), fe.ENCODERS.index(encoder)
                noise = shared[place] + 0.1 * noise
            at[layers, prior, encoder] = {"RE": noise}
        for row in fe.analysis_table(at, fe.DOCUMENT, {}, generator):
            small[row["term"]] += float(row["p"]) <= 0.05
    assert all(value / count < 0.12 for value in small.values()), small


# --- verdicts ---

EARNED = ("reproduced", "better", "yes")
OF_CODE = ("weights", "seconds", "conv, flow6: PNL saves")  # nothing that nets learn


def documents_run(document=fe.DOCUMENT, seeds=3):
    """Cells as the document has them, each seed off by the same little."""
    off, at = torch.linspace(-0.001, 0.001, seeds).double(), {}
    for key in document:
        layers, prior, encoder = key
        found = {name: fe.published(document, key, name)[0] + off for name in fe.COLUMNS}
        frozen, six = encoder in ("NL", "RKS"), prior == "flow6"
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
    """Without learning only those of weights and seconds; of a part of the grid no orders."""
    table = fe.claims(documents_run(), fe.DOCUMENT, True, True, 3)
    assert len(table) > 30 and not_earned(table) == []
    assert table[0]["document"] == "24 of 24"
    table = fe.claims(documents_run(), fe.DOCUMENT, False, True, 3)
    assert not_earned(table) == [row["claim"] for row in table
                                 if not row["claim"].startswith(OF_CODE)]
    assert not_earned(fe.claims(documents_run(fe.SVHN), fe.SVHN, True, True, 3)) == []
    few = {key: row for key, row in documents_run().items() if key[:2] == ("conv", "flow6")}
    assert len(fe.claims(few, fe.DOCUMENT, True, True, 3)) == 13


FLIPS = [  # what is changed in the document's run, and the beginning of a claim that then fails
    (("fc", "normal", "NL"), "RE", -100.0, "RE: L < PNL"),
    (("conv", "flow6", "NL"), "FID", 250.0, "FID: conv NL, RKS gain more"),
    (("conv", "flow6", "PNL"), "seconds", 0.1, "conv, flow6: PNL saves"),
    (("fc", "flow2", "L"), "weights", 1, "weights that differ"),
    (("conv", "flow6", "RKS"), "RT", -0.5, "conv, flow6, RKS: RT"),
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
    return {cell: row | {"seconds": 0} for cell, row in results.items() if cell != "mean image"}


def test_smoke(smoke):
    """Figures, a silent closing table, one decoder of three priors, and what gaps are."""
    folder, report = smoke
    assert len(list(folder.glob("fig_*.png"))) == 4
    closing = next(iter(report["tables"].values()))
    assert {row["verdict"] for row in closing} == {"-"} and len(closing) > 30
    text = (folder / "table.md").read_text()
    assert all(len(line) < 100 for line in text.splitlines() if line.startswith("|"))
    assert "[44.82]" in text and "2,047,328 [10256]" in text
    cells = report["results"]
    row = cells["fc-flow2-L"]
    assert row["negative ELBO"][0] == pytest.approx(row["RE"][0] - row["RT"][0])
    trained = torch.load(folder / "units" / "seed0-fc-L-flow2.pt")["result"]["log"][-1]
    assert row["gap of RE"][0] == pytest.approx(row["RE"][0] - trained[0].item())
    assert row["gap of RT"][0] == pytest.approx(trained[1].item() - row["RT"][0])
    a, b = cells["conv-normal-NL"], cells["conv-flow6-NL"]
    assert a["RE"] == b["RE"] and a["distance"] != b["distance"]


def test_null(monkeypatch):
    """Untrained nets, and with fc decoders that put out the mean image, earn no row."""
    def train_unit(unit, model, seed, x, objective, epochs, batch):
        net = fe.make(model, seed, x)
        if model.layers == "fc":
            net.decoder[-2].weight.data.zero_()
            net.decoder[-2].bias.data = x.mean(0).flatten()
        return {"weights": net.state_dict(), "log": torch.zeros(epochs, 1 + len(net.priors))}

    monkeypatch.setitem(fe.PRESETS, "quick", dict(fe.PRESETS["smoke"], seeds=2))
    monkeypatch.setattr(fe, "train_unit", train_unit)
    monkeypatch.setattr(fe, "plot", lambda *rest: None)
    monkeypatch.setattr(fe, "PERMUTATIONS", 99)
    monkeypatch.setattr(fe, "log_likelihood", lambda decoder, prior, mu, *rest: mu[:, 0])
    seconds = {key: [9.0, 9.0] for key in fe.DOCUMENT}
    monkeypatch.setattr(fe, "time_epochs", lambda *rest: seconds)
    report = fe.main(["--out", "null"])
    table = next(iter(report["tables"].values()))
    of_nets = [row["claim"] for row in table if not row["claim"].startswith(OF_CODE)]
    assert len(of_nets) > 25 and set(of_nets) <= set(not_earned(table))


def test_svhns_tables_and_the_corrected_objective(monkeypatch):
    """Three colours and two seeds to the end, compared with section 5.2."""
    monkeypatch.setattr(fe, "plot", lambda *rest: None)
    tables = fe.main([*SMOKE, "--dataset", "glyphs-rgb", "--seeds", "2"])["tables"]
    assert "[-79.23]" in tables["Table 5.10: negative ELBO [document]"][0]["L"]
    rows = tables["Section 5.2: analyses of variance, p by permutation"]
    assert len(rows) == 5 and {row["document"] for row in rows} == {"F(3, 19) > 21.76"}
    flags = "--dataset glyphs-rgb --encoder NL --seeds 2 --objective corrected --out sum".split()
    tables = fe.main(["--preset", "smoke", *flags])["tables"]
    assert "[" not in tables["Table 5.10: RT"][0]["NL"]
    assert not any("document" in row for rows in tables.values() for row in rows)


def test_kill_and_continue_equals_an_undisturbed_run(smoke, monkeypatch):
    """A real kill -9 in the middle of a net; then the same figures, logs and weights."""
    shutil.copytree(smoke[0], "run")
    os.remove("run/results.json")
    os.remove("run/units/seed0-fc-L-flow2.pt")
    killed("import frozen_encoder_vae; frozen_encoder_vae.main()",
           "seed0-fc-L-flow2.1.checkpoint", "--preset", "smoke")
    monkeypatch.setattr(fe, "plot", lambda *rest: None)
    assert but_times(fe.main(SMOKE)["results"]) == but_times(smoke[1]["results"])
    assert open("run/metrics.csv").read() == (smoke[0] / "metrics.csv").read_text()
    one, other = (torch.load(folder / "units" / "seed0-fc-L-flow2.pt")["result"]["weights"]
                  for folder in (smoke[0], pathlib.Path("run")))
    assert all(torch.equal(one[key], other[key]) for key in other)


@pytest.mark.parametrize("argv", ["--prior flow4", "--train-images 10",
                                  "--prior normal --dataset svhn"])
def test_bad_input_is_one_line_and_writes_nothing(argv, refused):
    assert argv.split()[0] in refused(fe.main, argv.split()) and os.listdir() == []


def test_the_copy_test():
    """The encoder alone, and the model with its loss and sampler, pasted alone, run."""
    x, eps = digits(), torch.randn(64, 16, generator=g())
    alone = pasted("frozen_encoder_vae", ["Encoder"], "VARIANCE = 1e-6")["Encoder"]
    for kind, layers in itertools.product(("PNL", "NL"), fe.LAYERS):
        encoder = alone(kind, layers, 1, 16 if layers == "fc" else 4)
        mu, logvar = encoder(x)
        assert mu.shape == logvar.shape == (64, 16)
        learns = {name for name, value in encoder.named_parameters() if value.requires_grad}
        assert learns == ({"last.weight", "last.bias"} if kind == "PNL" else set())
    note = pasted("frozen_encoder_vae", ["Encoder", "Decoder", "Flow", "VAE", "decode", "sample",
                                         "reconstruction_error", "regularisation_term",
                                         "loss_terms", "frechet_distance"], "VARIANCE = 1e-6")
    encoder, decoder = note["Encoder"]("L", "conv", 1, 4), note["Decoder"]("conv", 1, 4)
    vae = note["VAE"](encoder, decoder, {"f": note["Flow"](16, 8, 2)})
    RE, RT = note["loss_terms"](vae, x, x, eps, "corrected")
    (RE - RT).mean().backward()
    assert encoder.body[0].weight.grad.abs().max() > 0
    assert note["sample"](vae, "f", 3, g())[0].shape == (3, 1, 32, 32)
    one = torch.eye(3).double()
    assert note["frechet_distance"](one[0], one, one[1], one) == pytest.approx(2)
