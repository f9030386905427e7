"""The queries, keys and values of one attention layer for one text, small enough to keep for every layer of a model.

Axes: `T` tokens, `H` query heads, `G` KV groups, `C` gates per group, `d` head dim, `D` model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

CACHE_LIMIT = 1 << 30  # bytes of float16 kept for one text, all layers together


@dataclass(frozen=True)
class CapturedLayer:
    """Float16 tensors on the CPU. q, v and dense are None where only keys were captured."""

    q: Tensor | None  # (T, H, d), before RoPE
    k: Tensor  # (T, G, d), before RoPE
    v: Tensor | None  # (T, G, d)
    dense: Tensor | None  # (T, D), the layer's own attention output, after o_proj
    inv_freq: Tensor | None  # (d / 2,) float32, radians per token
    scale: float
    logits: Tensor | None = None  # (T, G, C), from a trained router

    def with_dense(self, dense: Tensor) -> CapturedLayer:
        """A copy with the dense output `(T, D)`."""
        return replace(self, dense=dense)


def half(x: Tensor) -> Tensor:
    """A float16 copy on the CPU, clamped to the range of float16."""
    limits = torch.finfo(torch.float16)
    return x.detach().clamp(limits.min, limits.max).to("cpu", torch.float16, copy=True)


def check_cache(tokens: int, layers: int, heads: int, groups: int, head_dim: int, width: int) -> None:
    """Raise `ValueError` if q, k, v and the output of all layers would not fit in `CACHE_LIMIT`."""
    per_token = 2 * layers * (heads * head_dim + 2 * groups * head_dim + width)
    if tokens * per_token > CACHE_LIMIT:
        raise ValueError(
            f"max_tokens={tokens}: caching {layers} layers takes {tokens * per_token / 2**30:.1f} GiB; the "
            f"limit is {CACHE_LIMIT / 2**30:.1f} GiB, so at most {CACHE_LIMIT // per_token:,} tokens"
        )
