"""Whether the Hugging Face hub may be used, and where it is: one answer for models and data sets."""

from __future__ import annotations

import os

SECONDS = 5.0  # the hub counts as unreachable if it takes longer to answer


def switched_off() -> str:
    """The environment variable that forbids use of the hub, or an empty string."""
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return variable
    return ""


def endpoint() -> str | None:
    """The mirror in $HF_ENDPOINT, read at each call; None for the hub itself."""
    return os.environ.get("HF_ENDPOINT") or None
