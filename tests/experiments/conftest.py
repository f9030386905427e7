from __future__ import annotations

from functools import partial

import pytest
from helpers import run_command
from proteus_playground.experiments.speed import sweep


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run `proteus bench`: (exit code, stdout, stderr). The rates of this machine are not what is tested."""
    monkeypatch.chdir(tmp_path)
    rates = {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9}
    monkeypatch.setattr(sweep, "measure_rates", lambda *args: rates)
    return partial(run_command, capfd, "bench")
