"""How much memory a training step needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def step_bytes(device: torch.device, held: Callable[[], Iterable[Tensor]], work: Callable[[], None]) -> int:
    """Run `work()`, one training step, and count bytes: what `held()` lists after it, and what the step added at most.

    On CUDA that is the allocator's peak. Elsewhere it is a count: a gradient for each weight, and every tensor that the
    forward pass keeps for the backward one; temporary tensors are not in it.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) - _bytes(held())
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    for tensor in held():
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    gradients = [tensor for tensor in held() if tensor.requires_grad]
    return _bytes(held()) + _bytes(gradients) + sum(kept.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
