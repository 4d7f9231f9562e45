"""The plumbing: arguments, seeds, the run folder, image data."""

import errno
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

import common
from conftest import ROOT

PRESETS = {"smoke": dict(epochs=1), "quick": dict(epochs=7), "paper": dict(epochs=99)}


def arguments(argv, flag=None):
    parser = common.Parser("A script.", PRESETS)
    parser.add_argument("--epochs", type=common.number(int, 1, 1000), help="passes")
    parser.add_argument("--rate", type=common.number(float, 0, 1), default=0.5, help="share")
    parser.add_argument("--extra", action="store_true", help="more units")
    return parser.parse(argv)


def open_run(argv, additive=()):
    return common.Run(__file__, arguments(argv), "nothing", additive)


# --- arguments and seeds ---


def test_presets_and_explicit_flags():
    assert arguments([]).epochs == 7
    assert arguments(["--preset", "paper"]).epochs == 99
    assert arguments(["--epochs", "3", "--preset=paper"]).epochs == 3


def test_help_shows_the_values_in_force(capsys):
    with pytest.raises(SystemExit) as stop:
        arguments(["--preset", "paper", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "default: 99" in text and "default: 0.5" in text


@pytest.mark.parametrize(
    "argv",
    [
        ["--epochs", "0"],
        ["--epochs", "1.5"],
        ["--epochs", "many"],
        ["--epochs"],
        ["--epochs=--"],
        ["--rate", "nan"],
        ["--rate", "inf"],
        ["--rate", "-1"],
        ["--preset", "huge"],
        ["--epoch", "3"],
        ["--seed", "-1"],
        ["--device", "abacus"],
        ["stray"],
    ],
)
def test_bad_flags_are_one_line(argv, refused):
    line = refused(arguments, argv)
    assert argv[0].strip("-=") in line


def test_cuda_without_cuda_is_one_line(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device" in refused(arguments, ["--device", "cuda"])
    assert arguments(["--device", "auto"]).device == "cpu"


def test_generators_differ_by_seed_and_name_and_repeat():
    first = [
        torch.rand(3, generator=common.generator(*key))
        for key in ((0, "f1"), (0, "f2"), (1, "f1"), (0, "f1"))
    ]
    assert torch.equal(first[0], first[3])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_batches_are_a_permutation():
    parts = common.batches(10, 4, common.generator(0, "b"))
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.cat(parts).sort().values.tolist() == list(range(10))


def test_compile_without_compiler_falls_back(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert common.compiled(abs, True) is abs and common.compiled(len, True) is len
    assert capsys.readouterr().err.count("\n") == 1


# --- the run folder ---


def test_units_are_computed_once_and_loaded_safely(capsys):
    calls = []

    def compute(checkpoint):
        calls.append(1)
        return {"x": torch.arange(3), "name": "n", "value": 1.5}

    for _ in range(2):
        with open_run(["--out", "run"]) as run:
            result = run.unit("a", compute)
    assert len(calls) == 1 and torch.equal(result["x"], torch.arange(3)) and result["value"] == 1.5
    assert "reused a" in capsys.readouterr().out


def test_another_configuration_is_refused(refused):
    open_run(["--out", "run"])
    line = refused(open_run, ["--out", "run", "--epochs", "8"])
    assert "--epochs 7" in line and "--out" in line and "--fresh" in line
    assert json.load(open("run/config.json"))["config"]["epochs"] == 7
    open_run(["--out", "run", "--epochs", "8", "--fresh"])
    assert json.load(open("run/config.json"))["config"]["epochs"] == 8


def test_additive_flags_may_change():
    open_run(["--out", "run"], additive=("extra",))
    open_run(["--out", "run", "--extra"], additive=("extra",))


def test_fresh_deletes_the_run_and_nothing_else():
    with open_run(["--out", "run"]) as run:
        run.unit("a", lambda checkpoint: 1)
    open("run/diary.txt", "w").write("mine")
    with open_run(["--out", "run", "--fresh"]) as run:
        assert not (run.folder / "units" / "a.pt").exists()
    assert open("run/diary.txt").read() == "mine"


def test_a_folder_that_is_no_run_is_left_alone(refused):
    os.makedirs("home")
    open("home/diary.txt", "w").write("mine")
    for extra in ([], ["--fresh"]):
        assert "holds no run" in refused(open_run, ["--out", "home", *extra])
    assert os.listdir("home") == ["diary.txt"]


def test_out_on_a_file_or_in_an_impossible_place(refused):
    open("file", "w").close()
    assert "file" in refused(open_run, ["--out", "file"])
    assert "file" in refused(open_run, ["--out", "file/below"])
    assert "/proc" in refused(open_run, ["--out", "/proc/nowhere"])


def test_read_only_folder(refused, monkeypatch):
    def denied(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(common.pathlib.Path, "mkdir", denied)
    assert "Read-only" in refused(open_run, ["--out", "run"])


def test_damaged_config_is_one_line(refused):
    open_run(["--out", "run"])
    for text in ('{"conf', "{}", "[]", '{"model_type": "bert"}'):
        open("run/config.json", "w").write(text)
        for extra in ([], ["--fresh"]):  # it may be somebody's: nothing is deleted
            assert "damaged" in refused(open_run, ["--out", "run", *extra])
        assert open("run/config.json").read() == text and os.path.isdir("run/units")


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_kill_at_any_step_of_opening_a_folder_leaves_one_that_opens(fresh, monkeypatch):
    """Each change of the file system in turn is the last one before a kill."""
    for last in range(20):
        shutil.rmtree("run", ignore_errors=True)
        if fresh:
            with open_run(["--out", "run"]) as run:
                run.unit("a", lambda checkpoint: 1)
        count = iter(range(100))

        def or_die(function):
            def wrapped(*args, **kwargs):
                if next(count) >= last:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            for owner, name in (
                (common.pathlib.Path, "mkdir"),
                (common.pathlib.Path, "unlink"),
                (common.shutil, "rmtree"),
                (common.os, "replace"),
                (common, "open"),
            ):
                patch.setattr(owner, name, or_die(getattr(owner, name, open)), raising=False)
            try:
                open_run(["--out", "run", *fresh])
            except KeyboardInterrupt:
                pass
            else:
                break
        with open_run(["--out", "run", *fresh]) as run:
            assert run.unit("b", lambda checkpoint: 2) == 2
    assert 3 < last < 19


def test_leftovers_of_a_kill_go_and_those_of_a_living_command_stay():
    open_run(["--out", "run"])
    living = f".fluid-0.1.pt.{os.getppid()}.tmp"
    for name in (".fluid-0.1.pt.999999999.tmp", living):
        open(f"run/units/{name}", "w").close()
    open_run(["--out", "run"])
    assert os.listdir("run/units") == [living] * os.path.exists("/proc/self")


@pytest.mark.parametrize(
    "owner, name, error",
    [
        (common.pathlib.Path, "read_bytes", OSError(errno.EIO, "Input/output error")),
        (torch, "load", torch.cuda.OutOfMemoryError("no\nmemory")),
    ],
)
def test_files_that_cannot_be_read_are_not_taken_for_damaged(owner, name, error, monkeypatch):
    with open_run(["--out", "run"]) as run:
        run.unit("a", lambda checkpoint: 1)

    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(owner, name, failing)
    with pytest.raises(SystemExit):
        run.unit("a", lambda checkpoint: 2)
    assert os.listdir("run/units") == ["a.pt"]


def test_results_name_the_source_of_every_unit():
    with open_run(["--out", "run"]) as run:
        run.unit("a", lambda checkpoint: 1)
        run.source = "later"
        run.unit("b", lambda checkpoint: 1)
        first = run.finish({}, [], [])["sources"]
    with open_run(["--out", "run"]) as run:
        run.unit("a", lambda checkpoint: 2)
        assert run.finish({}, [], [])["sources"] == [run.source] and len(first) == 2
        run.unit("b", lambda checkpoint: 2)
        assert run.finish({}, [], [])["sources"] == first


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_unit_is_set_aside_and_computed_again(keep, capsys):
    with open_run(["--out", "run"]) as run:
        run.unit("a", lambda checkpoint: torch.arange(1000))
    data = open("run/units/a.pt", "rb").read()
    open("run/units/a.pt", "wb").write(data[: int(keep * len(data)) if keep < 1 else keep])
    with open_run(["--out", "run"]) as run:
        assert len(run.unit("a", lambda checkpoint: torch.arange(1000))) == 1000
    assert "a.pt" in capsys.readouterr().err
    assert sorted(os.listdir("run/units")) == ["a.pt", "a.pt.broken"]


def test_full_disk_keeps_the_good_file(refused, monkeypatch):
    path = common.pathlib.Path("a.pt")
    common.save(path, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(lambda value: common.save(path, value), 2)
    assert common.load(path, "cpu") == 1 and os.listdir() == ["a.pt"]


def test_checkpoint_restores_parts_and_counts_the_time():
    g, net = common.generator(0, "c"), torch.nn.Linear(2, 1)
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.ones(2)).backward()
    optimiser.step()
    checkpoint = common.Checkpoint(common.pathlib.Path("c.checkpoint"), "cpu")
    assert checkpoint.state is None and not checkpoint.due()
    checkpoint.save((3, torch.ones(2)), net, optimiser, g)
    expected = torch.rand(3, generator=g), net.weight.clone()
    other = torch.nn.Linear(2, 1)
    again = common.Checkpoint(common.pathlib.Path("c.checkpoint"), "cpu")
    step, history = again.restore(other, torch.optim.Adam(other.parameters()), g)
    assert step == 3 and history.tolist() == [1, 1]
    assert torch.equal(torch.rand(3, generator=g), expected[0])
    assert torch.equal(other.weight, expected[1]) and again.earlier > 0


def test_non_finite_stops_with_status_1(capsys):
    with pytest.raises(SystemExit) as stop:
        with open_run(["--out", "run"]):
            raise FloatingPointError("kl is not finite at step 3")
    assert stop.value.code == 1 and capsys.readouterr().err == "error: kl is not finite at step 3\n"


def test_interruption_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        with open_run(["--out", "run"]):
            raise KeyboardInterrupt
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_results_have_no_nan_and_old_figures_go(capsys):
    with open_run(["--out", "run"]) as run:
        open("run/fig_old.png", "w").close()
        report = run.finish(
            {"a": float("nan"), "b": float("inf")},
            [("claim", "1", "2", True), ("other", "1", "2", False)],
            [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "kl": 1.0}],
        )
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "run" and any("claim" in row and row.endswith("yes") for row in out)
    assert (
        report["results"]
        == {"a": None, "b": None}
        == json.load(open("run/results.json"))["results"]
    )
    assert open("run/metrics.csv").read().split() == ["epoch,loss,kl", "1,0.5,", "2,,1.0"]
    assert not os.path.exists("run/fig_old.png")


def test_global_state_is_left_as_found():
    before, random = torch.get_float32_matmul_precision(), torch.get_rng_state()
    with open_run(["--out", "run"]):
        assert torch.get_float32_matmul_precision() == "high"
        torch.nn.Linear(2, 2)  # draws its weights from the global generator
    assert torch.get_float32_matmul_precision() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_first_calls_are_made_before_anything_is_computed(monkeypatch):
    calls = []
    monkeypatch.setattr(common, "settle", lambda: calls.append(1))
    arguments([])
    assert calls == [1]


def test_plot_lines_draws_what_it_is_given():
    y = torch.tensor([1.0, 2, 4])
    fig = common.plot_lines(
        {
            "a": ([("up", None, y, dict(color="C1", std=0.5)), (None, [0, 1], [3, 3], {})], {}),
            "b": ([("down", [1, 2, 3], -y, dict(ls="--"))], dict(xlabel="x", ylabel="loss (nats)")),
            "c": ([("log", None, y, {})], dict(yscale="log")),
        },
        columns=2,
    )
    a, b, c, rest = fig.axes
    assert [line.get_label() for line in a.lines][0] == "up" and len(a.lines) == 2
    assert a.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert a.lines[0].get_ydata().tolist() == y.tolist()
    (band,) = a.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == 0.5 and heights.max() == 4.5
    assert b.get_title() == "b" and b.get_ylabel() == "loss (nats)" and c.get_yscale() == "log"
    assert not rest.axison and [t.get_text() for t in fig.legends[0].get_texts()] == ["up"]
    each = common.plot_lines({"a": ([("up", None, y, {})], {})}, legend="each")
    assert not each.legends and each.axes[0].get_legend().get_texts()[0].get_text() == "up"


def test_print_rows(capsys):
    rows = [{"name": "f1", "mse": 0.00123456}, {"name": "f2", "n": 3, "kl": common.mean_std(
        torch.tensor([1.0, 3.0]))}]
    common.print_rows("models", rows)
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line] == [
        ["models"], ["name", "mse", "n", "kl"], ["----", "--------", "-", "---------------"],
        ["f1", "0.001235", "-", "-"], ["f2", "-", "3", "2.0000", "±", "1.4142"]]


def test_mean_std():
    value = common.mean_std(torch.tensor([1.0, 3.0]))
    assert value == {"mean": 2.0, "std": pytest.approx(2**0.5), "n": 2}
    assert common.show(value, 2) == "2.00 ± 1.41"
    assert common.show(common.mean_std(torch.tensor([1.0])), 1) == "1.0"


# --- image data ---


def test_glyphs_are_digits_and_seeded():
    x, y = common.glyphs(10_000, 0)
    assert x.shape == (10_000, 1, 28, 28) and x.min() >= 0 and x.max() <= 1 and x.max() > 0.99
    assert (y.bincount() > 850).all() and len(y.bincount()) == 10
    again, other = common.glyphs(10_000, 0)[0], common.glyphs(100, 1)[0]
    assert torch.equal(x, again) and not torch.equal(x[:100], other)
    border = torch.cat([x[:, 0, 0], x[:, 0, -1], x[:, 0, :, 0], x[:, 0, :, -1]], 1)
    assert (border > 0.5).any(1).float().mean() < 0.02  # nothing is cut off
    # the labels tell the digits: class means of one half classify the other far above chance
    means = torch.stack([x[:5000][y[:5000] == k].mean(0).flatten() for k in range(10)])
    guess = torch.cdist(x[5000:].flatten(1), means).argmin(1)
    assert (guess == y[5000:]).float().mean() > 0.6


def test_glyphs_in_colour():
    x, _ = common.glyphs(50, 0, channels=3)
    assert x.shape == (50, 3, 28, 28) and (x[:, 0] - x[:, 1]).abs().amax() > 0.1
    assert (x.flatten(2).amax(2) - x.flatten(2).amin(2)).amax(1).min() > 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_image_sheet_keeps_every_image_in_its_place(channels):
    images = torch.rand(2, 3, channels, 4, 5)
    ax = Figure().subplots()
    common.image_sheet(ax, images, ["a", "b"], [7, 8, 9])
    sheet = torch.as_tensor(ax.images[0].get_array()).view(12, 21, channels)
    x, y = ax.get_xticks(), ax.get_yticks()
    for i in range(2):
        for j in range(3):
            shown = sheet[6 * i + 1 : 6 * i + 5, 7 * j + 1 : 7 * j + 6]
            assert torch.equal(shown.permute(2, 0, 1), images[i, j])
            assert (x[j], y[i]) == (7 * j + 3, 6 * i + 2.5)  # the labels at the images' centres
    assert (sheet[::6] == 1).all() and (sheet[:, ::7] == 1).all()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["7", "8", "9"]


def write_mnist(folder, n=5):
    """MNIST's own file format, unpacked, n images."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        pixels = bytes(range(256)) * (n * 784 // 256 + 1)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 2051, n, 28, 28) + pixels[: n * 784]
        )
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, n) + bytes(range(n))
        )
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{split}-{kind}-ubyte.gz").write_bytes(b"")
    return raw


def offline(monkeypatch):
    import urllib.request

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_mnist_file_format(tmp_path):
    write_mnist(tmp_path)
    x, y = common.images("mnist", True, tmp_path)
    assert x.shape == (5, 1, 28, 28) and y.tolist() == [0, 1, 2, 3, 4]
    assert x[0, 0, 0, 255 % 28].item() * 255 == pytest.approx(255 % 28) and x.max() == 1


def test_missing_mnist_names_files_folder_and_the_way_out(tmp_path, refused, monkeypatch):
    offline(monkeypatch)
    line = refused(lambda folder: common.images("mnist", True, folder), tmp_path)
    for word in ("train-images-idx3-ubyte.gz", str(tmp_path / "MNIST" / "raw"), "--dataset glyphs"):
        assert word in line


def test_damaged_mnist_is_one_line(tmp_path, refused, monkeypatch):
    offline(monkeypatch)
    raw = write_mnist(tmp_path)
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot load mnist" in refused(
        lambda folder: common.images("mnist", True, folder), tmp_path
    )


def test_real_mnist_where_it_is():
    folder = ROOT.parent / "shared" / "data"
    if not (folder / "MNIST").exists():
        pytest.skip("no real MNIST beside the checkout")
    import shutil

    shutil.copytree(folder / "MNIST", "data/MNIST")
    x, y = common.images("mnist", False, "data")
    assert x.shape == (10_000, 1, 28, 28) and y[:5].tolist() == [7, 2, 1, 0, 4]


def test_svhn_file_format(tmp_path, monkeypatch, refused):
    import hashlib
    import numpy
    from scipy.io import savemat
    from torchvision import datasets

    offline(monkeypatch)
    assert "test_32x32.mat" in refused(
        lambda folder: common.images("svhn", False, folder), tmp_path
    )
    (tmp_path / "SVHN").mkdir(exist_ok=True)
    path = tmp_path / "SVHN" / "test_32x32.mat"
    pixels = numpy.arange(32 * 32 * 3 * 4).reshape(32, 32, 3, 4).astype("uint8")
    savemat(path, {"X": pixels, "y": numpy.array([[1], [10], [3], [9]])})
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SVHN.split_list, "test", ["url", path.name, md5])
    x, y = common.images("svhn", False, tmp_path)
    assert x.shape == (4, 3, 32, 32) and y.tolist() == [1, 0, 3, 9]
    assert x[2, 1, 0, 3].item() * 255 == pytest.approx(int(pixels[0, 3, 1, 2]))


def test_import_does_nothing_and_is_all_a_script_needs():
    code = "import sys, common; print({'torchvision', 'optuna', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()" and done.returncode == 0
