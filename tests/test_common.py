"""The plumbing: arguments, streams, the run folder, steps, torchrun, verdicts, image data."""

import argparse
import csv
import errno
import json
import math
import os
import pathlib
import signal
import struct
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

import common
import toy
from conftest import ROOT, environment
from helpers import killed

TOY = str(ROOT / "tests" / "toy.py")
SMALL = ["--preset", "smoke", "--out", "run"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes most of the toy's time; processes of their own draw."""
    monkeypatch.setattr(Figure, "savefig", lambda fig, buffer, **more: buffer.write(b"picture"))


def results(folder="run"):
    return json.load(open(f"{folder}/results.json"))["results"]


# --- arguments and seeds ---


def arguments(argv):
    parser = common.Parser("A script.", {"smoke": dict(epochs=1), "quick": dict(epochs=7),
                                         "paper": dict(epochs=99)})
    parser.add("--epochs", type=common.number(int, 1, 1000), help="passes")
    parser.add("--rate", type=common.number(float, -50, 1), default=0.5, help="share")
    return parser.parse(argv)


def test_presets_explicit_flags_and_help(capsys):
    assert arguments([]).epochs == 7
    assert arguments(["--preset", "paper"]).epochs == 99
    assert arguments(["--epochs", "3", "--preset=paper"]).epochs == 3
    assert arguments(["--rate", "-1e1"]).rate == -10
    assert arguments(["--out=~/x"]).out == os.path.expanduser("~/x")
    with pytest.raises(SystemExit) as stop:
        arguments(["--preset", "paper", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "default: 99" in text and "default: 0.5" in text


@pytest.mark.parametrize(
    "argv",
    ["--epochs 0", "--epochs 1.5", "--epochs=--", "--rate nan", "--rate inf", "--rate -51",
     "--preset huge", "--epoch 3", "--device abacus", "--device cuda"],
)
def test_bad_flags_are_one_line(argv, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = argv.split()
    assert argv[0].strip("-=") in refused(arguments, argv)


def test_generators_differ_by_seed_and_name_and_repeat():
    def draw(seed, name):
        return torch.rand(1, generator=common.generator(seed, name)).item()

    assert draw(0, "f1") == draw(0, "f1")
    assert len({draw(0, "f1"), draw(0, "f2"), draw(1, "f1")}) == 3


# --- streams ---


def test_a_screen_and_an_environment_that_lack_everything():
    """No UTF-8, a notebook's backend, a cluster's ranks without torchrun."""
    more = dict(PYTHONIOENCODING="ascii", MPLBACKEND="nonsense", RANK="0", WORLD_SIZE="4",
                LOCAL_RANK="0")
    done = subprocess.run([sys.executable, TOY, *SMALL], env=environment(**more),
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.splitlines()[-1] == "run"
    assert "?? of a walk ?" in done.stdout
    assert "σ²" in open("run/table.md", encoding="utf-8").read()
    assert open("run/fig_walks.png", "rb").read()[1:4] == b"PNG"


def test_full_disks_and_closed_streams(monkeypatch):
    """Files first, then the screen."""
    command = f"{sys.executable} {TOY} {' '.join(SMALL)} --units a b > /dev/full"
    done = subprocess.run(["bash", "-c", command], env=environment(), capture_output=True,
                          text=True)
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert len(results()) == 2 and os.path.exists("run/table.md")
    monkeypatch.setattr(sys, "stderr", None)
    common.prepare_streams()
    common.note("to nobody")


def test_what_a_user_can_mend_is_one_line_and_all_else_a_traceback(capsys):
    def shown(error):
        common.in_one_line(type(error), error, None)
        return capsys.readouterr().err

    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    for error in (MemoryError(), raised.value):
        assert "out of memory on the CPU" in shown(error)
    assert shown(FloatingPointError("kl is not finite")) == "error: kl is not finite\n"
    assert "the same command continues" in shown(KeyboardInterrupt())
    assert shown(ZeroDivisionError("by zero")) == "ZeroDivisionError: by zero\n"


def test_imports_are_few_and_an_interrupt_during_them_is_one_line():
    open("slow.py", "w").write("import time; print('here', flush=True); time.sleep(60)")
    code = ("import sys, common; print({'torchvision', 'optuna', 'scipy'} & set(sys.modules)); "
            "sys.path.insert(0, '.'); import slow")
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "set()\n"
    process.stdout.readline()  # in the middle of an import
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].count("\n") == 1
    assert process.returncode == -signal.SIGINT  # as shells expect it: 130


# --- the run folder ---


def test_units_are_computed_once_and_say_where_they_come_from(capsys, monkeypatch):
    before = torch.get_rng_state()
    first = toy.main(SMALL)
    assert torch.equal(torch.get_rng_state(), before)  # left as found
    table = [line for line in open("run/table.md").read().splitlines() if line[:1] == "|"]
    assert table[2] == "| σ² of a walk é | 1        | 1.01 ± 0.06 | reproduced |"
    assert len({len(line) for line in table}) == 1 and table[2] in capsys.readouterr().out
    monkeypatch.setattr(toy, "walk", None)  # would be an error now
    monkeypatch.setattr(torch, "__version__", "later")
    again = toy.main(SMALL)
    assert again["results"] == first["results"] and again["units"] == first["units"]
    assert set(again["units"]["a"]) == {"seconds", "device", "torch"} and again["units"]["a"][
        "torch"] != "later"
    out = capsys.readouterr().out
    assert "reused a" in out and out.splitlines()[-1] == "run"
    unit = torch.load("run/units/a.pt", weights_only=True)
    torch.nn.Linear(2, 2).load_state_dict(unit["result"]["weights"])


def test_other_flags_and_other_folders_are_refused_and_fresh_deletes_the_run_alone(refused):
    os.makedirs("run")
    open("run/diary.txt", "w").write("mine")
    for extra in ([], ["--fresh"]):
        assert "holds no run" in refused(toy.main, [*SMALL, *extra])
    os.rename("run/diary.txt", "run/.DS_Store")  # a file browser's own
    toy.main(SMALL)
    line = refused(toy.main, [*SMALL, "--steps", "8"])
    assert "steps 30" in line and "--out" in line and "--fresh" in line and len(results()) == 3
    mine = ["run/diary.txt", "run/.notes.v2.tmp", "run/units/.x.tmp", "run/units/notes"]
    for path in [*mine, "run/fig_old.png"]:
        open(path, "w").write("mine")
    toy.main([*SMALL, "--steps", "8", "--fresh", "--units", "a"])
    assert json.load(open("run/config.json"))["config"]["steps"] == 8
    assert all(open(path).read() == "mine" for path in mine)
    assert {path.name for path in pathlib.Path("run/units").glob("*.pt")} == {"a.pt"}
    assert not os.path.exists("run/fig_old.png")


def test_additive_flags_keep_what_earlier_commands_left():
    toy.main([*SMALL, "--units", "b"])
    before = results()
    toy.main([*SMALL, "--units", "a"])
    assert list(results()) == ["b", "a"] and results()["b"] == before["b"]
    assert {row["unit"] for row in csv.DictReader(open("run/metrics.csv"))} == {"a", "b"}


def test_damaged_or_foreign_configurations_are_one_line(refused):
    """And it may be somebody's: --fresh deletes nothing there."""
    toy.main(SMALL)
    whole = pathlib.Path("run/config.json").read_text()
    other = whole.replace('"script": "toy"', '"script": "other"')
    for text, words in (('{"conf', "is damaged"), ('{"config": null}', "is damaged"),
                        (other, "--script other")):
        open("run/config.json", "w").write(text)
        for extra in ([], ["--fresh"]):
            assert words in refused(toy.main, [*SMALL, *extra])
    assert len(os.listdir("run/units")) == 3


def test_a_file_cut_short_or_of_another_unit_is_named(refused, monkeypatch):
    toy.main(SMALL)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):  # no damage of the file
        patch.setattr(torch, "load", lambda *rest, **more: bytes(10**15))
        toy.main(SMALL)
    whole = open("run/units/a.pt", "rb").read()
    for size in (0, 10, 400):
        open("run/units/a.pt", "wb").write(whole[:size])
        assert "run/units/a.pt is damaged: delete it" in refused(toy.main, SMALL)
    os.remove("run/units/a.pt")
    before = results()
    toy.main(SMALL)
    assert results() == before
    os.replace("run/units/b.pt", "run/units/c.pt")
    assert "c.pt is not the unit c of this run: delete it" in refused(toy.main, SMALL)
    toy.main([*SMALL, "--seed", "5", "--out", "other"])
    os.replace("other/units/c.pt", "run/units/c.pt")
    assert "c.pt is not the unit c of this run: delete it" in refused(toy.main, SMALL)


def test_a_full_disk_is_one_line_and_keeps_the_good_files(refused, monkeypatch):
    toy.main([*SMALL, "--units", "a"])
    before = open("run/results.json").read()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "b.pt: No space left" in refused(toy.main, [*SMALL, "--units", "a", "b"])
    assert open("run/results.json").read() == before and os.listdir("run/units") == ["a.pt"]
    toy.main([*SMALL, "--units", "a", "b"])
    assert len(results()) == 2


def test_two_commands_at_once_and_results_without_nan(refused):
    with common.Run("x.py", arguments(["--out", "run"]), "nothing") as run:
        assert "another command is at work in run" in refused(toy.main, SMALL)
        report = run.finish({"a": float("nan"), "b": torch.tensor(math.inf)}, [], {},
                            [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "kl": 1.0}])
    assert report["results"] == {"a": None, "b": None} == results()
    assert open("run/metrics.csv", "rb").read() == b"epoch,loss,kl\n1,0.5,\n2,,1.0\n"


# --- steps ---


def test_killed_and_continued():
    """A real kill -9 in the middle of a unit, then the same command: as if undisturbed."""
    flags = ["--preset", "smoke", "--steps", "200"]
    toy.main([*flags, "--out", "undisturbed"])
    code = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); import toy; toy.main()"
    printed = killed(code, "b.1.checkpoint", *flags)
    assert printed.startswith("a: ") and " s, loss " in printed  # at once, not held back
    toy.main([*flags, "--out", "run"])
    assert results() == results("undisturbed")
    for name in "abc":
        one, other = (torch.load(f"{folder}/units/{name}.pt")["result"]
                      for folder in ("run", "undisturbed"))
        assert torch.equal(one["log"], other["log"])
        assert torch.equal(one["weights"]["weight"], other["weights"]["weight"])
    assert not list(pathlib.Path("run").rglob("*.checkpoint"))


def test_a_second_loop_of_a_unit_goes_on_where_it_was(monkeypatch):
    monkeypatch.setattr(common, "EVERY", 0)
    seen = []

    def compute(name, stop):
        total = torch.zeros(())
        for loop in ("first", "second"):
            log = torch.zeros(5, 1)
            for step in common.steps(loop, 5, log, ["x"], total):
                if (loop, step) == stop:
                    raise KeyboardInterrupt
                seen.append((loop, step))
                total += step
                log[step] = total
        return total

    with common.Run("x.py", arguments(["--out", "run"]), "nothing") as run:
        with pytest.raises(KeyboardInterrupt):
            run.unit("u", lambda: compute("u", ("second", 3)))
        assert seen[-1] == ("second", 2) and len(seen) == 8
        assert run.unit("u", lambda: compute("u", None)) == 20
        assert seen[8:] == [("second", 3), ("second", 4)]


@pytest.mark.parametrize("every", [0, 1000])
def test_a_number_that_is_none_stops_with_step_and_term(every, monkeypatch):
    monkeypatch.setattr(common, "EVERY", every)
    log = torch.zeros(50, 2, 3)
    with pytest.raises(FloatingPointError, match="net: kl is not finite at step 7$"):
        for step in common.steps("net", 50, log, ["mse", "kl"]):
            if step >= 7:
                log[step, 1, 2] = float("nan")


# --- torchrun ---


def two_processes(*flags):
    """As torchrun starts them: [(status, what it prints, its errors)]"""
    processes = []
    for rank in "01":
        more = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(20000 + os.getpid() % 10000))
        processes.append(subprocess.Popen(
            [sys.executable, TOY, *SMALL, *flags], env=environment(**more), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    found = [process.communicate(timeout=60) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found)]


def test_processes_share_the_units_and_the_first_one_reports():
    alone = toy.main(["--preset", "smoke", "--out", "alone"])
    (status, out, err), (other_status, other_out, other_err) = two_processes()
    assert status == other_status == 0, err + other_err
    assert results() == alone["results"] and os.path.exists("run/fig_walks.png")
    assert [out.count(f"{name}: ") for name in "abc"] == [1, 0, 1]
    assert [other_out.count(f"{name}: ") for name in "abc"] == [0, 1, 0]
    assert "## The doc" in out and "## The doc" not in other_out


def test_a_failed_process_ends_the_others():
    (status, *_), (other_status, _, err) = two_processes("--units", "a", "bad")
    assert status != 0 and other_status != 0 and "loss is not finite" in err
    assert not os.path.exists("run/results.json")


# --- tables and verdicts ---


def test_published_figures():
    assert common.show([3.0e-5, 3.2e-5]) == "3.1e-05 ± 1e-06" and common.show(0.0052) == "0.0052"
    def verdict(here, published=1.0, **options):
        return common.reproduced("x", published, here, **options)["verdict"]

    assert verdict([1.09, 1.09]) == "reproduced" and verdict([1.11, 1.11]) == "differs"
    assert verdict(1.11, better="lower") == "worse" and verdict(1.11, better="higher") == "better"
    assert verdict(0.89, better="lower") == "better"
    assert verdict(1.09, fitted=True) == "fitted" and verdict(1.2, fitted=True) == "differs"
    assert verdict(1.04, tolerance=0.03) == "differs"
    assert verdict(-0.95, published=-1.0) == "reproduced"
    assert verdict(1.0, earned=False) == verdict(0.5, better="lower", earned=False) == "open"
    assert verdict(1.5, better="lower", earned=False) == "worse"
    assert verdict(float("nan"), better="lower") == "worse"


def test_orders_need_two_standard_errors_paired_by_repeat():
    def verdict(low, high, **options):
        return common.ordered("x", low, high, **options)["verdict"]

    low = [1.0, 5.0, 9.0]  # far apart, but each below its partner
    assert verdict(low, [1.5, 5.6, 9.4]) == "yes" and verdict([1.5, 5.6, 9.4], low) == "no"
    assert verdict(low, [5.6, 9.4, 1.5]) == "open"
    assert verdict([0.0, 0.0, 0.0, 0.0], [0.4, 0.0, 0.4, 0.0]) == "open"  # 0.2 and 2 * 0.115
    assert verdict([0.0, 0.0, 0.0, 0.0], [0.4, 0.1, 0.4, 0.1]) == "yes"  # 0.25 and 2 * 0.087
    assert verdict(low, [1.5, 5.6, 9.4], earned=False) == "open"
    assert verdict([1.5, 5.6, 9.4], low, earned=False) == "no"
    assert verdict([1.0], [9.0]) == "open" and verdict([1.0, 1.0], [1.0, 1.0]) == "open"
    assert verdict(low, [float("nan")] * 3) != "yes"
    assert common.ordered("x", [1.0, 1.0], [2.0, 2.5])["here"] == "1 < 2.25 (± 0.2)"
    assert common.ordered("x", [2.0, 2.5], [1.0, 1.0])["here"] == "2.25 > 1 (± 0.2)"
    assert common.ordered("x", [1.0, 1.0], [1.0, 1.0])["here"] == "1 = 1 (± 0)"


def test_a_claim_throughout():
    def verdict(*verdicts):
        return common.throughout("x", [{"verdict": v} for v in verdicts])

    assert verdict("yes", "yes")["verdict"] == "yes" and verdict("yes", "yes")["here"] == "2 of 2"
    assert verdict("yes", "open")["verdict"] == "open" and verdict("yes", "no", "open")[
        "verdict"] == "no"


# --- figures and image data ---


def test_glyphs_are_digits_and_seeded():
    x, y = common.glyphs(3000, 0)
    assert x.shape == (3000, 1, 28, 28) and x.min() >= 0 and x.max() <= 1 and x.max() > 0.99
    assert (y.bincount() > 230).all() and len(y.bincount()) == 10
    assert torch.equal(x[:100], common.glyphs(100, 0)[0])
    border = torch.cat([x[:, 0, 0], x[:, 0, -1], x[:, 0, :, 0], x[:, 0, :, -1]], 1)
    assert (border > 0.5).any(1).float().mean() < 0.02  # nothing is cut off
    # the labels tell the digits: class means of one half classify the other far above chance
    means = torch.stack([x[:1500][y[:1500] == k].mean(0).flatten() for k in range(10)])
    guess = torch.cdist(x[1500:].flatten(1), means).argmin(1)
    assert (guess == y[1500:]).float().mean() > 0.6
    x, _ = common.glyphs(50, 0, channels=3)
    assert x.shape == (50, 3, 28, 28) and (x[:, 0] - x[:, 1]).abs().amax() > 0.1


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


def write_mnist(folder):
    """MNIST's own file format, unpacked, five images."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    images = struct.pack(">4i", 2051, 5, 28, 28) + (bytes(range(256)) * 16)[:5 * 784]
    labels = struct.pack(">2i", 2049, 5) + bytes(range(5))
    for split in ("train", "t10k"):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(labels)


def offline(monkeypatch):
    import urllib.request

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_mnist_missing_and_in_its_own_format(tmp_path, refused, monkeypatch):
    offline(monkeypatch)
    line = refused(lambda folder: common.images("mnist", True, folder), tmp_path)
    for word in ("train-images-idx3-ubyte.gz", str(tmp_path / "MNIST" / "raw"), "--dataset glyphs"):
        assert word in line
    write_mnist(tmp_path)
    x, y = common.images("mnist", True, tmp_path)
    assert x.shape == (5, 1, 28, 28) and y.tolist() == [0, 1, 2, 3, 4]
    assert x[0, 0, 0, 255 % 28].item() * 255 == pytest.approx(255 % 28) and x.max() == 1


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


# --- what tests/faults.py and tests/devices.py have found, in small ---


@pytest.mark.parametrize("argv", [["two\nlines"], ["--out="], ["--data="], ["--preset=--"],
                                  ["--steps", "9" * 401], ["--level", "9" * 401]])
def test_bad_command_lines(argv, refused):
    refused(toy.main, ["--preset", "smoke", *argv])
    assert not os.listdir()


def test_all_tensors_are_brought_to_the_cpu_and_keep_their_places(tmp_path):
    meta = torch.zeros(2, device="meta")  # stands for a GPU's: it cannot come to the CPU
    for value in (meta, [meta], (1, meta), {"a": [{"b": (meta,)}]}):
        with pytest.raises(NotImplementedError):
            common.save(tmp_path / "x.pt", value)
    value = {"a": [torch.ones(2), (1, "x")], 3: {"b": None}}
    common.save(tmp_path / "x.pt", value)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(found["a"].pop(0), value["a"].pop(0)) and found == value
