"""What is measured now and then during training: the use of gates and heads, and the memory of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..model import ProteusLM

DEAD = 0.02  # a gate that receives less than this share of its even part of the keys counts as dead
Result = TypeVar("Result")


@dataclass(frozen=True)
class Look:
    """Means over the layers."""

    heads_awake: float  # per token, of n_heads
    gate_entropy: float  # nats, of the share of keys that each gate of a group lures; log C if all are equal
    dead_gates: int  # in the whole model: gates that lure less than 0.02 / C of the keys
    density: float  # see `AttentionStats.density`


@torch.no_grad()
def look(model: ProteusLM, ids: Tensor) -> Look:
    """Run texts `(B, T)` at the current settings, in evaluation mode, and average. The model stays in that mode."""
    stats = model.eval()(ids, return_stats=True)[1]
    entropy, dead = gate_health(model)
    awake = sum(layer.heads_awake for layer in stats) / len(stats)
    density = sum(layer.density for layer in stats) / len(stats)
    return Look(awake, entropy, dead, density)


def gate_health(model: ProteusLM) -> tuple[float, int]:
    """Entropy of the gates' use (nats, mean over groups and layers), and the number of living gates hardly used."""
    gates = [block.attn.gates for block in model.blocks]
    entropy = torch.stack([torch.special.entr(_share(g.usage)).sum(-1).mean() for g in gates]).mean()
    dead = torch.stack([(g.alive & (g.usage < DEAD / g.gates_per_group)).sum() for g in gates]).sum()
    return float(entropy), int(dead)


def _share(usage: Tensor) -> Tensor:
    return usage / usage.sum(-1, keepdim=True).clamp(min=1e-9)


def measure_memory(
    device: torch.device, held: Callable[[], Iterable[Tensor]], step: Callable[[], Result]
) -> tuple[Result, int]:
    """Run one training step. Returns its result and the bytes it needed: the tensors of `held()` and the step's own.

    held: lists the tensors that outlive a step (weights, buffers, the optimiser's averages); called after the step. On
    CUDA the bytes are the allocator's peak. Elsewhere they are counted: one gradient per weight and every tensor that
    the forward pass keeps for the backward pass; temporary tensors are not included.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) - _bytes(held())
        torch.cuda.reset_peak_memory_stats(device)
        result = step()
        return result, torch.cuda.max_memory_allocated(device) - before
    kept: dict[int, int] = {}  # bytes by address, so that a storage with two views counts once

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = step()
    for tensor in held():
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    gradients = [tensor for tensor in held() if tensor.requires_grad]
    return result, _bytes(held()) + _bytes(gradients) + sum(kept.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
