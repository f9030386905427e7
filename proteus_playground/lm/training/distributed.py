"""What the processes of a `torchrun` exchange: sums, mean gradients, and what their gates have seen.

Gradients are averaged after the backward pass, so each rank may use any part of the model. The counts and sums that
gates keep for their next update are added up, which gives the prototypes that one process would have had. The sample
for a dead gate is taken from rank 0, and salience histograms are averaged.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ...common.processes import place

# Buffers of gates and routers, by how the ranks combine them.
ADDED, FROM_RANK_0, AVERAGED = ("pending_sum", "pending_count", "pending_load"), "pending_sample", "pending_quantiles"


def total(values: list[float], device: torch.device) -> list[float]:
    """Each value's sum over the ranks."""
    if place()[1] == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def same_start(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0."""
    if place()[1] > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def mean_gradients(model: nn.Module) -> None:
    """Average the gradients over the ranks; a gradient that a rank does not have counts as 0."""
    ranks = place()[1]
    if ranks == 1:
        return
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    _reduce([weight.grad for weight in weights], ranks)


def share_gates(model: nn.Module) -> None:
    """Call after a forward pass in training mode, so that every rank updates prototypes and balances alike."""
    ranks = place()[1]
    if ranks == 1:
        return
    named = [(name.rsplit(".", 1)[-1], buffer) for name, buffer in model.named_buffers()]
    _reduce([buffer for name, buffer in named if name in ADDED], 1)
    _reduce([buffer for name, buffer in named if name == AVERAGED], ranks)
    for name, buffer in named:
        if name == FROM_RANK_0:
            dist.broadcast(buffer, 0)


def _reduce(tensors: list[Tensor], divisor: int) -> None:
    if not tensors:
        return
    flat = _flatten_dense_tensors(tensors)
    dist.all_reduce(flat)
    for tensor, new in zip(tensors, _unflatten_dense_tensors(flat / divisor, tensors), strict=True):
        tensor.copy_(new)
