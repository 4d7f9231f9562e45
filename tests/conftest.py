"""Tests run offline, on the CPU, from any folder."""

import os
import pathlib
import sys

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
