"""What the tests of the scripts share: a real kill -9, and the copy test."""

import ast
import pathlib
import subprocess
import sys
import time

from conftest import ROOT, environment


def killed(code, part, *flags):
    """Run code, a checkpoint after each step, and kill -9 it once run/units/<part> is there:
    what it had printed."""
    path = pathlib.Path("run/units", part)
    code = f"import common; common.EVERY = 0; {code}"
    command = [sys.executable, "-c", code, *flags, "--out", "run"]
    process = subprocess.Popen(command, env=environment(), stdout=open("printed", "w"))
    deadline = time.time() + 120
    while not path.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert path.exists() and not pathlib.Path("run/results.json").exists()
    assert not path.with_name(f"{part.split('.1.')[0]}.pt").exists()  # in the middle of a unit
    return pathlib.Path("printed").read_text()


def pasted(script, names, head=""):
    """A notebook with these functions and classes of a script, and nothing else of it."""
    source = (ROOT / f"{script}.py").read_text()
    parts = [head, "import math, torch", "import torch.nn.functional as F", "from torch import nn"]
    for node in ast.parse(source).body:
        if getattr(node, "name", "") in names:
            parts.append(ast.get_source_segment(source, node))
    assert len(parts) == 4 + len(names)
    notebook = {"__name__": "notebook"}
    exec("\n\n".join(parts), notebook)
    return notebook
