"""Rotary position embedding, half-split convention (Llama, GPT-NeoX): frequencies, and `rotate`.

Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backends.dispatch import rotate

__all__ = ["Frequencies", "rope_frequencies", "rotate"]


def rope_frequencies(head_dim: int, theta: float, device=None) -> Tensor:
    """Angular frequency per feature pair, radians per token: `(head_dim / 2,)` float32."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    return theta ** (-pairs / head_dim)


class Frequencies(nn.Module):
    """`rope_frequencies` that follow a module between devices and stay float32."""

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        self.register_buffer("inv_freq", rope_frequencies(head_dim, theta), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = rope_frequencies(self.head_dim, self.theta, self.inv_freq.device)
        return self
