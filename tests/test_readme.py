"""The README's commands run as they stand there, with --preset smoke added, and its tables are
lines of the runs' own tables."""

import importlib
import os
import random
import re
import shlex

import pytest
import torch
from matplotlib import rcParams

from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).splitlines()
SECTIONS = dict(re.findall(r"^## `(\w+)\.py`\n(.*?)(?=^## |\Z)", README, re.S | re.M))


def global_state():
    """What a notebook would not like to find changed."""
    environment = dict(os.environ)
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch's own, when torch.func is first used
    return {
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "generators": (torch.get_rng_state().tolist(), random.getstate()),
        "precision": torch.get_float32_matmul_precision(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "figures": dict(rcParams),
        "system": (environment, os.getcwd()),
    }


def test_the_first_command(capsys):
    """It runs, returns what it printed, and leaves global state as found."""
    first = next(line for line in COMMANDS if "smoke" in line)
    _, script, *flags = shlex.split(first)
    main = importlib.import_module(script.removesuffix(".py")).main
    before = global_state()
    report = main(flags)
    assert global_state() == before
    printed = capsys.readouterr().out
    assert os.path.exists(f"{printed.splitlines()[-1]}/results.json")
    for row in next(iter(report["tables"].values())):
        assert row["claim"] in printed and row["here"] in printed


def strange_rows(section, script):
    """Table rows of a section that its run's table.md does not have."""
    known = (ROOT / ".github" / "results" / f"{script}.md").read_text().splitlines()
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [row for row in rows if row not in known]


@pytest.mark.parametrize("script", sorted(SECTIONS))
def test_tables_are_lines_of_the_runs_own(script):
    rows = [line for line in SECTIONS[script].splitlines() if line.startswith("|")]
    assert len(rows) >= 2 + 5 and strange_rows(SECTIONS[script], script) == []
    digit = next(index for index, letter in enumerate(rows[3]) if letter.isdigit())
    other = rows[3][:digit] + str((int(rows[3][digit]) + 1) % 10) + rows[3][digit + 1 :]
    assert strange_rows(SECTIONS[script].replace(rows[3], other), script) == [other]


def test_sections_open_with_a_picture_and_the_page_is_short():
    assert len(SECTIONS) == 5 and len(README.split()) <= 2500
    assert all(re.match(r"\s*!\[", section) for section in SECTIONS.values())
    first_screen = README.splitlines()[:10]
    assert sum("<img src" in line for line in first_screen) == 5


def test_pictures_and_scripts_exist():
    for path in re.findall(r'(?:\]\(|src=")(\.github/figures/[^)"]+)', README):
        assert (ROOT / path).stat().st_size > 10_000
    for path in re.findall(r"\]\((\.github/results/[^)]*)\)", README):
        assert (ROOT / path).exists()
    for script in ROOT.glob("*.py"):
        assert f"`{script.name}`" in README
    assert sum(path.stat().st_size for path in (ROOT / ".github/figures").iterdir()) < 2.5e6


def test_ci_finds_the_lines_that_it_runs():
    assert sum(line.startswith("python3 -m venv") for line in COMMANDS) == 1
    assert sum(line.startswith("pytest") for line in COMMANDS) == 1


def test_commands_of_readme_and_docstrings_are_real():
    for script in ROOT.glob("*.py"):
        text = README + script.read_text()
        for line in re.findall(rf"^ *python {script.name}(.*?)(?:  |$)", text, re.M):
            importlib.import_module(script.stem).arguments(shlex.split(line))
