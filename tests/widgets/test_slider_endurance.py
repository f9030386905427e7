"""A short run of tests/slider_endurance.py: a real kernel, moves as a browser sends them, panels opened and closed."""

from __future__ import annotations

import pytest
from slider_endurance import endure, faults, kernel

pytestmark = pytest.mark.slow


def test_a_hundred_moves_in_a_real_kernel():
    with kernel() as there:
        found = endure(there, moves=120, cycles=2, panels=("workbench",), quiet=False)
    assert faults(found) == [] and found["pictures"] > 5
    assert found["counts"][-1]["figures"] == found["counts"][-1]["panels"] == 1
    assert found["opened"]["workbench"][1]["widgets"] == 0
