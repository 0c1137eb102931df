"""The short form of `make faults`: a few cases of every sweep. The sweeps fork, so they have a process of their own."""

import os
import subprocess
import sys

import pytest
from conftest import CHECKOUT
from fault_sweeps import SWEEPS


@pytest.mark.parametrize("names", ["F1,F13,F20,F21", "F2,F3,F4", "F6,F7,F8,F14,F19"])
def test_nothing_is_lost(names):
    command = [sys.executable, str(CHECKOUT / "tests" / "fault_sweeps.py"), "--short", "--only", names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "FTKIT_FAULT": ""})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("all survived") == sum(len(SWEEPS[name]) for name in names.split(","))


def test_every_sweep_has_a_short_form_in_this_file():
    marks = next(mark for mark in test_nothing_is_lost.pytestmark if mark.name == "parametrize")
    assert sorted(name for names in marks.args[1] for name in names.split(",")) == sorted(SWEEPS)
