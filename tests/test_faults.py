"""What tests/faults.py and tests/devices.py have found, in small."""
import os

import common
import pytest
import torch
import toy

META = torch.zeros(2, device="meta")  # stands for a GPU's: it cannot come to the CPU


@pytest.mark.parametrize("argv", [["two\nlines"], ["--out="], ["--data="], ["--preset=--"],
                                  ["--steps", "9" * 401], ["--level", "9" * 401]])
def test_bad_command_lines(argv, refused):
    refused(toy.main, ["--preset", "smoke", *argv])
    assert not os.listdir()


def test_numbers_without_an_end_refuse_what_is_no_float():
    assert common.number(int, 0)("7") == 7
    with pytest.raises(common.argparse.ArgumentTypeError):
        common.number(int, 0)("9" * 401)


@pytest.mark.parametrize("value", [META, [META], (1, META), {"a": [{"b": (META,)}]}])
def test_all_tensors_are_brought_to_the_cpu_before_they_are_saved(value, tmp_path):
    with pytest.raises(NotImplementedError):
        common.save(tmp_path / "x.pt", value)


def test_what_is_saved_keeps_its_shape(tmp_path):
    value = {"a": [torch.ones(2), (1, "x")], 3: {"b": None}}
    common.save(tmp_path / "x.pt", value)
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(found["a"].pop(0), value["a"].pop(0)) and found == value
