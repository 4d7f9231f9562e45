"""Tests run offline, on the CPU, from any folder."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in an empty folder, so that nothing lands in the checkout."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys):
    """Call main(argv), check the contract for bad input (status 2, one line), return the line."""

    def check(main, argv):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1, error
        assert error.startswith("error: "), error
        return error

    return check


def environment(**more):
    """Of a script as a process: as many threads as here, since other numbers round differently."""
    threads = str(torch.get_num_threads())
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS=threads, **more)


@pytest.fixture
def killed_and_continued():
    """Run a script's smoke preset in ./run, kill -9 it once run/units/<part> is there, and run the
    same command again: what that prints."""

    def check(script, part):
        code = f"import common, {script}; common.EVERY = 0; {script}.main()"
        command = [sys.executable, "-c", code, "--preset", "smoke", "--out", "run"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, env=environment(), **quiet)
        deadline = time.time() + 120
        while not pathlib.Path("run/units", part).exists() and time.time() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not os.path.exists("run/results.json")
        command[2] = f"import {script}; {script}.main()"  # fewer checkpoints: much faster
        second = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert second.returncode == 0, second.stderr
        return second.stdout

    return check
