"""The README's commands run as they stand there, with --preset smoke added."""

import importlib
import os
import random
import re
import shlex

import pytest
import torch
from matplotlib import rcParams

import report as results
from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def global_state():
    """What a notebook would not like to find changed."""
    return {
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "generators": (torch.get_rng_state().tolist(), random.getstate()),
        "precision": torch.get_float32_matmul_precision(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "figures": dict(rcParams),
        "system": (dict(os.environ), os.getcwd()),
    }


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python ")])
def test_command(command, capsys):
    """It runs, returns what it printed, and leaves global state as found."""
    _, script, *flags = shlex.split(command, comments=True)
    main = importlib.import_module(script.removesuffix(".py")).main
    before = global_state()
    report = main([*flags, "--preset", "smoke", "--out", "run"])
    assert global_state() == before
    assert report["script"] == script.removesuffix(".py") and os.path.exists("run/results.json")
    printed = capsys.readouterr().out
    for claim in report["claims"]:
        row = f"{claim['claim']}  *{claim['document']}  *{claim['here']}".replace("  *", "\0")
        pattern = re.escape(row).replace("\0", " +") + f" +{'yes' if claim['holds'] else 'no'}$"
        assert re.search(pattern, printed, re.M), claim


def test_tables_say_what_the_results_say():
    assert results.rendered(README, results.stored()) == README
    assert len(results.MARKED.findall(README)) >= 7


def test_numbers_of_the_text_are_founded():
    """No number in a script's section that neither a results.json nor the script holds."""
    data, summary = results.stored(), dict(re.findall(r"^\| \[`(\w+)\.py`\](.*)$", README, re.M))
    for script, section in results.sections(README).items():
        for text in (section, summary[script]):
            assert results.numbers(text, data) and not results.unfounded(text, script, data)


def test_a_changed_figure_is_seen():
    data = results.stored()
    data["runs"]["ae_cube"]["claims"][0][2] = "0.1234"
    assert results.rendered(README, data) != README
    section = results.sections(README)["ae_cube"] + "It is 98.76 now, and 37.5 %.\n"
    assert results.unfounded(section, "ae_cube", data) == {"98.76", "37.5"}
    for wrong in (0.0079, -0.0077):
        data["facts"]["ae_cube"]["0.0077"] = wrong
        assert "0.0077" in results.unfounded(section, "ae_cube", data)


def test_each_script_opens_with_a_picture():
    sections = results.sections(README)
    assert len(sections) == 5
    assert all(re.match(r"\s*!\[", section) for section in sections.values())


def test_ci_finds_the_lines_that_it_runs():
    assert sum(line.startswith("python3 -m venv") for line in COMMANDS) == 1
    assert sum(line.startswith("pytest") for line in COMMANDS) == 1


def test_pictures_and_scripts_exist():
    for path in re.findall(r"\]\((\.github/[^)]+)\)", README):
        assert (ROOT / path).stat().st_size > 10_000
    for script in ROOT.glob("*.py"):
        assert f"`{script.name}`" in README
    assert sum(path.stat().st_size for path in (ROOT / ".github/figures").iterdir()) < 2e6


def test_docstring_commands_are_real():
    for script in ROOT.glob("*.py"):
        for line in re.findall(
            rf"^    python {script.name}(.*?)(?:  |$)", script.read_text(), re.M
        ):
            importlib.import_module(script.stem).arguments(shlex.split(line))
