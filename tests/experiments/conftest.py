from __future__ import annotations

import pytest
from proteus_playground.experiments.speed import sweep

from proteus_playground.cli import app as cli


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run `proteus bench`: (exit code, stdout, stderr). The rates of this machine are not what is tested."""
    monkeypatch.chdir(tmp_path)
    rates = {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9}
    monkeypatch.setattr(sweep, "measure_rates", lambda *args: rates)

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", *args])
        out = capfd.readouterr()
        return end.value.code or 0, out.out, out.err

    return call
