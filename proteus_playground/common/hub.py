"""Whether to ask the Hugging Face hub at all: one answer for models and for data sets."""

from __future__ import annotations

import os

SECONDS = 5.0  # how long the hub may take to answer before we go without it


def switched_off() -> str:
    """The environment variable that forbids asking the hub, or an empty string."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return variable
    return ""


def endpoint() -> str | None:
    """A mirror named by $HF_ENDPOINT, read at each call, else None for the hub itself."""
    return os.environ.get("HF_ENDPOINT") or None
