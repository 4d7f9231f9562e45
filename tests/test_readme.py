"""The README's commands run as they stand there, with --preset smoke added."""

import importlib
import os
import re
import shlex

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("python ")])
def test_command(command):
    _, script, *flags = shlex.split(command, comments=True)
    main = importlib.import_module(script.removesuffix(".py")).main
    report = main([*flags, "--preset", "smoke", "--out", "run"])
    assert report["script"] == script.removesuffix(".py") and os.path.exists("run/results.json")


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
