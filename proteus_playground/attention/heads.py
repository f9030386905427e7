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
    rows, count = _by_head(heads, real, len(weight))
    source = x.flatten(0, 1).index_select(0, rows // (heads.shape[2] * heads.shape[3]))
    found = _matmul_by_head(source, weight.transpose(1, 2), count)
    out = found.new_zeros(heads.numel(), weight.shape[1]).index_copy(0, rows, found).view(*heads.shape, -1)
    if bias is not None:
        out = out + bias[heads]
    return out.masked_fill(~real[..., None], 0)


def project_out(rows_out: Tensor, weight: Tensor, heads: Tensor, real: Tensor) -> Tensor:
    """Sum of the chosen rows' output projections, `(B, T, D)`.

    rows_out: `(B, T, G, K, d)`, already weighted; weight: `(N, d, D)` per head; heads, real as above.
    """
    B, T = heads.shape[:2]
    rows, count = _by_head(heads, real, len(weight))
    found = _matmul_by_head(rows_out.flatten(0, 3).index_select(0, rows), weight, count)
    found = found.masked_fill(~real.flatten()[rows][:, None], 0)
    flat = found.new_zeros(B * T, weight.shape[2])
    return flat.index_add(0, rows // (heads.shape[2] * heads.shape[3]), found).view(B, T, -1)


def _by_head(heads: Tensor, real: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by head, those that are not real last, and how many real ones each head has."""
    owner, rows = torch.where(real, heads, n_heads).flatten().sort(stable=True)
    count = torch.zeros(n_heads + 1, dtype=torch.int32, device=owner.device)
    return rows, count.index_add(0, owner, torch.ones_like(owner, dtype=torch.int32))[:n_heads]


def _matmul_by_head(rows: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """rows `(R, n)`, sorted by head, times each head's own weight `(N, n, m)`; rows past the counted ones are anything.

    PyTorch's grouped matmul where it has one for the device: it reads the counts there and skips the rest.
    """
    grouped = getattr(torch.nn.functional, "grouped_mm", None)
    if grouped and rows.is_cuda and rows.dtype == torch.bfloat16 == weight.dtype:
        return grouped(rows, weight, offs=count.cumsum(0, dtype=torch.int32))
    runs = count.tolist()
    parts = [part @ weight[h] for h, part in enumerate(rows[: sum(runs)].split(runs)) if len(part)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - sum(runs), weight.shape[2], dtype=(parts or [rows])[0].dtype)])
