"""Projections of the heads that are awake, and of no others.

Rows are (token, head) pairs. Where heads are many and few are awake, each head multiplies only its own tokens
(a grouped matmul, one group per head); otherwise all heads are projected and rows picked.

Axes: `B` batch, `T` tokens, `D` model width, `G` KV groups, `K` slots for awake heads, `r` heads per group, `d` head
dim, `R` rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUPED_FROM = 4  # project head by head once all heads together are this many times wider than the model


def is_grouped(heads: int, head_dim: int, d_model: int, slots: int, per_group: int) -> bool:
    """Whether rows are projected head by head."""
    return slots < per_group and heads * head_dim > GROUPED_FROM * d_model


def pick_awake(awake: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Up to `slots` awake heads of each token and group: index in the group and validity, `(B, T, G, K)` each."""
    index = (~awake).to(torch.int8).argsort(dim=-1, stable=True)[..., :slots]
    return index, awake.gather(-1, index)


def project_in(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, real: Tensor) -> Tensor:
    """Queries of chosen rows, zero where not `real`: `(B, T, G, K, d)`.

    x: `(B, T, D)`; weight: `(N, d, D)` per head; bias: `(N, d)` or None; heads, real: `(B, T, G, K)`, head in [0, N).
    """
    tokens, rows, runs = _by_head(heads, real, len(weight))
    source = x.flatten(0, 1).index_select(0, tokens).split(runs)
    parts = [part @ weight[h].T + (0 if bias is None else bias[h]) for h, part in enumerate(source) if len(part)]
    found = torch.cat(parts) if parts else x.new_zeros(0, weight.shape[1])
    return found.new_zeros(heads.numel(), weight.shape[1]).index_copy(0, rows, found).view(*heads.shape, -1)


def project_out(rows_out: Tensor, weight: Tensor, heads: Tensor, real: Tensor) -> Tensor:
    """Sum of the chosen rows' output projections, `(B, T, D)`.

    rows_out: `(B, T, G, K, d)`, already weighted; weight: `(N, d, D)` per head; heads, real as above.
    """
    B, T = heads.shape[:2]
    tokens, rows, runs = _by_head(heads, real, len(weight))
    source = rows_out.flatten(0, 3).index_select(0, rows).split(runs)
    parts = [part @ weight[h] for h, part in enumerate(source) if len(part)]
    flat = rows_out.new_zeros(B * T, weight.shape[2])
    return (flat.index_add(0, tokens, torch.cat(parts).to(flat.dtype)) if parts else flat).view(B, T, -1)


def _by_head(heads: Tensor, real: Tensor, n_heads: int) -> tuple[Tensor, Tensor, list[int]]:
    """Real rows sorted by head: their tokens, their flat row numbers, and how many rows each head has."""
    owner = torch.where(real, heads, n_heads).flatten()
    owner, rows = owner.sort(stable=True)
    runs = torch.bincount(owner, minlength=n_heads + 1)[:n_heads].tolist()
    rows = rows[: sum(runs)]
    return rows // (heads.shape[2] * heads.shape[3]), rows, runs
