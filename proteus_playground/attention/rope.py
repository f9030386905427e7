"""Rotary position embedding, half-split convention (Llama, GPT-NeoX).

Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PIECE = 2048  # tokens turned at a time on a CPU


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


def rotate(x: Tensor, positions: Tensor | None, inv_freq: Tensor | None) -> Tensor:
    """Turn each feature pair of `x` by position x frequency.

    x: `(B, T, N, d)`; positions: `(B, T)` or `(T,)`, in tokens, None for 0, 1, ...; inv_freq: `(d / 2,)`,
    or None for no turn.
    The angles are float32 whatever the dtype of `x`. Negative positions undo a rotation.
    """
    if inv_freq is None:
        return x
    if x.is_cuda and fused(x):
        from .backends.fused.launch import rotate as run

        return run(x, positions, inv_freq)
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    angle = positions.to(torch.float32)[..., None] * inv_freq.to(torch.float32)  # (B, T, d/2) or (T, d/2)
    cos, sin = angle.cos()[..., None, :], angle.sin()[..., None, :]
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        return torch.cat(turned, dim=-1).to(x.dtype)
    out = torch.empty_like(x)  # no temporaries, and in pieces that stay in cache: a third of the time at 64K tokens
    for i in range(0, x.shape[1], PIECE):
        cut = slice(i, i + PIECE)
        first, second = x[:, cut].chunk(2, dim=-1)
        left, right = out[:, cut].chunk(2, dim=-1)
        c, s = cos[..., cut, :, :], sin[..., cut, :, :]
        torch.mul(first, c, out=left).addcmul_(second, s, value=-1)
        torch.mul(second, c, out=right).addcmul_(first, s)
    return out


def fused(x: Tensor) -> bool:
    """Whether Triton's kernel turns `x`."""
    from .backends.dispatch import probe_triton

    return x.stride(-1) == 1 and probe_triton(x.device, x.shape[-1], x.dtype)[0]
