"""What an import may bring with it, each tried in a fresh process: this one has imported everything."""

from __future__ import annotations

import subprocess
import sys

import pytest

WIDGETS = {"ipywidgets", "plotly", "anywidget", "IPython"}


def imported(statement: str) -> set[str]:
    """Names of top-level modules in memory after `statement`."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import proteus_playground", WIDGETS | {"transformers", "datasets"}),
        ("from proteus_playground import AttentionConfig, ProteusAttention", WIDGETS | {"transformers"}),
        ("import proteus_playground.attention, proteus_playground.views", WIDGETS | {"transformers"}),
        ("import proteus_playground.probe", WIDGETS | {"transformers"}),
        ("import proteus_playground.texts, proteus_playground.hub", WIDGETS | {"transformers", "torch", "datasets"}),
        ("import proteus_playground.hf.models", WIDGETS | {"transformers", "huggingface_hub"}),
        ("import proteus_playground.bench.sweep, proteus_playground.bench.page", WIDGETS | {"plotly"}),
        ("import proteus_playground.cli", WIDGETS | {"transformers", "torch"}),
    ],
)
def test_an_import_stays_light(statement, forbidden):
    brought = imported(statement) & forbidden
    assert brought == set()
