"""AdamW over three groups of parameters, and the course of their learning rates."""

from __future__ import annotations

from math import cos, pi

import torch
from torch import nn

from .plan import Rates


def build_optimiser(student: nn.Module, rates: Rates) -> torch.optim.AdamW | None:
    """AdamW over what has a gradient; None where nothing has. A group's "full" is its largest learning rate."""
    tables = {id(part.weight) for part in student.modules() if isinstance(part, nn.Embedding)}
    groups: dict[str, list] = {"prototypes": [], "weights": [], "embeddings_and_norms": []}
    for name, weight in student.named_parameters():
        if weight.requires_grad:
            kind = "embeddings_and_norms" if weight.dim() < 2 or id(weight) in tables else "weights"
            groups["prototypes" if name.startswith("prototypes.") else kind].append(weight)
    kinds = [
        {"params": weights, "full": getattr(rates, kind), "weight_decay": rates.weight_decay * (kind == "weights")}
        for kind, weights in groups.items()
        if weights
    ]
    return torch.optim.AdamW(kinds, lr=1.0) if kinds else None


def set_rates(optimiser: torch.optim.Optimizer, rates: Rates, done: float) -> None:
    """Learning rates when a share `done` of the stage is over."""
    for group in optimiser.param_groups:
        group["lr"] = group["full"] * course(rates, done)


def course(rates: Rates, done: float) -> float:
    """The share of the largest rate: a straight rise, then half a cosine down to `rates.end`."""
    if done < rates.warmup:
        return max(done / rates.warmup, 1e-2)
    rest = min(1.0, (done - rates.warmup) / max(1e-9, 1 - rates.warmup))
    return rates.end + (1 - rates.end) * (1 + cos(pi * rest)) / 2
