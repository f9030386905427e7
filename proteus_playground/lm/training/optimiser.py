"""AdamW over three groups of parameters: matrices with weight decay, the rest without, gates at a rate of their own."""

from __future__ import annotations

import torch
from torch import nn

from .recipe import Recipe

GATES = {"router", "gates"}  # parts of a parameter's name


def build(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """The optimiser. A group's "factor" multiplies the schedule's rate."""
    groups: dict[str, list] = {"matrices": [], "rest": [], "gates": []}
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        kind = "rest" if weight.dim() < 2 or id(weight) in tables else "matrices"
        groups["gates" if GATES & set(name.split(".")) else kind].append(weight)
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
