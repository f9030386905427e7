"""Rotary position embedding, half-split convention (Llama, GPT-NeoX): frequencies, and `rotate`.

Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backends.dispatch import rotate
from .precision import wide_dtype

__all__ = ["Frequencies", "rope_frequencies", "rotate", "rotate_both"]


def rotate_both(q: Tensor, k: Tensor, positions: Tensor, inv_freq: Tensor | None) -> tuple[Tensor, Tensor]:
    """q `(B, T, H, d)` and k `(B, T, G, d)`, rotated in one call, which is quicker than two where tokens are few."""
    return rotate(torch.cat((q, k), dim=2), positions, inv_freq).split((q.shape[2], k.shape[2]), dim=2)


def rope_frequencies(head_dim: int, theta: float, device=None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Angular frequency per feature pair, radians per token: `(head_dim / 2,)`."""
    pairs = torch.arange(0, head_dim, 2, dtype=dtype, device=device)
    return theta ** (-pairs / head_dim)


class Frequencies(nn.Module):
    """`rope_frequencies` that follow a module between devices; float64 in a float64 module, else float32.

    They are in no state dict, so every move computes them again: `to_empty` would leave them without values.
    """

    def __init__(self, head_dim: int, theta: float):
        super().__init__()
        self.head_dim, self.theta = head_dim, theta
        dtype = wide_dtype(torch.get_default_dtype())
        self.register_buffer("inv_freq", rope_frequencies(head_dim, theta, dtype=dtype), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.fill(self.inv_freq)
        return self

    def fill(self, like: Tensor) -> None:
        """Compute the frequencies for the device and the precision of `like`."""
        frequencies = rope_frequencies(self.head_dim, self.theta, "cpu", wide_dtype(like.dtype))
        self.inv_freq = frequencies.to(like.device)
