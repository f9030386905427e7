"""The precision of sums and exponentials: float32, or float64 for inputs in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float64 if it is float64, else in float32."""
    return x.to(wide_dtype(x.dtype))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Float32Buffers(nn.Module):
    """A module whose floating buffers are float32, in whatever precision it is made, moved or loaded.

    A prototype in half precision would move keys between gates, and a count in half precision stops at 256.
    """

    def register_buffer(self, name: str, tensor: Tensor, persistent: bool = True) -> None:
        super().register_buffer(name, _float32(tensor), persistent)

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                setattr(self, name, before[name].to(buffer.device))
        return self

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        for name, _ in self.named_buffers(recurse=False):
            if isinstance(state_dict.get(prefix + name), Tensor):
                state_dict[prefix + name] = _float32(state_dict[prefix + name])
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _float32(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x
