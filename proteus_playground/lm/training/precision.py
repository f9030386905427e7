"""Which precision a device trains in: bfloat16 where it is real, float16 with a scaled loss on a T4, else float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from ...common.machine import fast_dtype

CHOICES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The dtype that matrices are multiplied in. ValueError names `precision` where it is unknown."""
    if precision not in CHOICES:
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(CHOICES)}")
    if precision != "auto":
        return CHOICES[precision]
    return fast_dtype(device)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Keeps float16 gradients from vanishing; does nothing in the other precisions."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
