"""AdamW over three groups of parameters, and the precision that a device trains in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ...common.machine import fast_dtype
from .recipe import Recipe

GATE_MODULES = {"router", "gates"}  # parts of a parameter's name
PRECISIONS = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW: matrices with weight decay, all other weights without, router and gates at a learning rate of their own.

    A group's "factor" multiplies the schedule's rate.
    """
    groups: dict[str, list] = {"matrices": [], "rest": [], "gates": []}
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        kind = "rest" if weight.dim() < 2 or id(weight) in tables else "matrices"
        groups["gates" if GATE_MODULES & set(name.split(".")) else kind].append(weight)
    decay, factor = {"matrices": recipe.weight_decay}, {"gates": recipe.gate_lr}
    kinds = [
        {"params": weights, "weight_decay": decay.get(kind, 0.0), "factor": factor.get(kind, 1.0)}
        for kind, weights in groups.items()
        if weights
    ]
    fused = all(weight.device.type in ("cpu", "cuda") for weight in model.parameters())
    return torch.optim.AdamW(kinds, lr=recipe.lr, betas=recipe.betas, fused=fused)


def set_rate(optimiser: torch.optim.AdamW, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate * group["factor"]


def pick_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The dtype of matrix products. auto: bfloat16 where the GPU computes it, else float16 on CUDA, else float32.

    `ValueError` names `precision` if it is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
    return fast_dtype(device) if precision == "auto" else PRECISIONS[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def loss_scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Scales the loss so that float16 gradients do not vanish; does nothing in the other precisions."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
