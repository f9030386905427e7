"""Keys and values in int8, one scale per row: half the memory of float16, with a bound on the error.

A row x becomes round(x / s) with s = max |x| / 127, so that no entry is off by more than s / 2. A score then moves by
at most e = scale x |q|_1 x s_k / 2, an attention weight by a factor within exp(+-2 e), and an output entry by
at most (exp(2 e) - 1) max |v| + s_v / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `(..., d)` as int8 and their scales `(...)` float32."""
    x = x.float()
    scale = (x.abs().amax(-1) / 127).clamp(min=1e-30)
    return torch.floor(x / scale[..., None] + 0.5).to(torch.int8), scale


def through_int8(x: Tensor) -> Tensor:
    """Rows as they come back from storage in int8, in the precision of x."""
    stored, scale = quantize_rows(x)
    return (stored.float() * scale[..., None]).to(x.dtype)


def error_bound(q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    """Largest change of any output entry that int8 keys and values can cause; q, k, v `(..., d)`, any rows."""
    step_k, step_v = quantize_rows(k)[1].max(), quantize_rows(v)[1].max()
    e = scale * q.float().abs().sum(-1).max() * step_k / 2
    return float(torch.expm1(2 * e) * v.float().abs().max() + step_v / 2)
