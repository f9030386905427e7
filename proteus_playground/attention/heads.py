"""Projections of the heads that are awake, and of no others.

A row is a (token, head) pair. Where heads are many and few are awake, each head multiplies only its own tokens
(a grouped matmul, one group per head); otherwise all heads are projected and the awake rows are picked.

Axes: `B` batch, `T` tokens, `D` model width, `H` query heads, `G` KV groups, `K` slots for awake heads per group, `r`
heads per group, `d` head dim, `N` heads of a weight, `R` rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .config import AttentionConfig
from .decide import TokenDecisions
from .transforms import hides_values, in_vmap

GROUPED_FROM = 4  # project head by head once all heads together are this many times wider than the model


@dataclass(frozen=True)
class HeadRows:
    """The rows to compute: one per head where all heads may wake (slot is None), else K slots per token and group."""

    slot: Tensor | None  # (B, T, G, K) int64, head in the group of each slot
    real: Tensor | None  # (B, T, G, K) bool, False for a slot without an awake head; None where heads are not routed
    weight: Tensor | None  # (B, T, G, K) float32, weight of the slot's head; None where heads are not routed

    @property
    def awake(self) -> Tensor | None:
        """Rows to attend with, `(B, T, G K)` bool; None for all."""
        return None if self.real is None else self.real.flatten(2)


def pick_rows(decisions: TokenDecisions, n_groups: int) -> HeadRows:
    """The rows that awake heads need: a slot per head that may be awake, so that shapes do not follow the data."""
    if decisions.awake is None:
        return HeadRows(None, None, None)
    awake, weight = (x.unflatten(2, (n_groups, -1)) for x in (decisions.awake, decisions.weight))
    slots = decisions.budget.heads_awake_max
    if slots == awake.shape[-1]:
        return HeadRows(None, awake, weight)
    slot, real = pick_awake(awake, slots)
    if decisions.keep is not None:
        real = real & decisions.keep[..., None, None]  # a dropped token projects no query
    return HeadRows(slot, real, weight.gather(-1, slot))


def project_queries(
    x: Tensor, q_proj: nn.Linear, cfg: AttentionConfig, slots: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """What routing needs of the queries: all heads' `(B, T, G, r, d)`, and their mean in each group `(B, T, G, d)`.

    slots: heads that may be awake in a group; None where heads are not routed, then there is no mean. Where rows are
    projected head by head, the mean comes from the mean weight, and the queries are None.
    """
    G, r = cfg.n_kv_heads, cfg.heads_per_group
    if slots is None or not is_grouped(cfg, slots, x, q_proj):
        queries = q_proj(x).unflatten(-1, (G, r, cfg.head_dim))
        return queries, None if slots is None else queries.mean(3)
    weight = _per_head(q_proj.weight, cfg).unflatten(0, (G, r)).mean(1)  # (G, d, D)
    mean = torch.einsum("btD,gdD->btgd", x, weight.to(x.dtype))
    return None, mean if q_proj.bias is None else mean + q_proj.bias.view(G, r, -1).mean(1)


def awake_queries(x: Tensor, queries: Tensor | None, q_proj: nn.Linear, cfg: AttentionConfig, rows: HeadRows) -> Tensor:
    """Queries of the rows, `(B, T, G K, d)`; queries: what `project_queries` gave."""
    if rows.slot is None:
        q = queries
    elif queries is not None:
        q = queries.gather(3, rows.slot[..., None].expand(*rows.slot.shape, cfg.head_dim))
    else:
        bias = None if q_proj.bias is None else q_proj.bias.view(cfg.n_heads, -1)
        q = project_in(x, _per_head(q_proj.weight, cfg), bias, _head_of_slot(rows.slot, cfg), rows.real)
    return q.flatten(2, 3)


def merge_heads(out: Tensor, o_proj: nn.Linear, cfg: AttentionConfig, rows: HeadRows) -> Tensor:
    """Project the rows' weighted outputs and add them up: `(B, T, G, K, d)` -> `(B, T, D)`."""
    if rows.slot is None:
        return o_proj(out.flatten(2))
    if is_grouped(cfg, rows.slot.shape[-1], out, o_proj):
        y = project_out(out, _per_head(o_proj.weight.T, cfg), _head_of_slot(rows.slot, cfg), rows.real)
        return y if o_proj.bias is None else y + o_proj.bias
    every_head = out.new_zeros(*out.shape[:3], cfg.heads_per_group, cfg.head_dim)
    return o_proj(every_head.scatter(3, rows.slot[..., None].expand_as(out), out).flatten(2))


def is_grouped(cfg: AttentionConfig, slots: int, x: Tensor, proj: nn.Module) -> bool:
    """Whether rows of x are projected head by head. Without a grouped matmul, Python must know how many each has."""
    wide = slots < cfg.heads_per_group and cfg.n_heads * cfg.head_dim > GROUPED_FROM * cfg.d_model
    return wide and is_bare(proj) and (not hides_values() or _has_grouped_matmul(x, proj.weight))


def is_bare(*layers: nn.Module) -> bool:
    """Whether weight and bias say all that `layers` compute. Adapted, quantised and hooked layers must be called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return all(type(one) is nn.Linear and not any(getattr(one, name) for name in hooks) for one in layers)


def check_linear(**layers: nn.Module) -> None:
    """Raise `TypeError` for one of `layers` whose weight does not say all that it computes. Hooks are not asked for."""
    for name, one in layers.items():
        if type(one) is not nn.Linear and not is_parametrized(one):
            raise TypeError(
                f"{name} is a {type(one).__module__}.{type(one).__qualname__}: must be an nn.Linear, because its "
                "weight is read here; merge adapters first"
            )


def _per_head(weight: Tensor, cfg: AttentionConfig) -> Tensor:
    """`(H d, D)` -> `(H, d, D)`."""
    return weight.view(cfg.n_heads, cfg.head_dim, -1)


def _head_of_slot(slot: Tensor, cfg: AttentionConfig) -> Tensor:
    """Index in the layer, [0, H), of each slot's head."""
    first = torch.arange(cfg.n_kv_heads, device=slot.device) * cfg.heads_per_group
    return slot + first[:, None]


def pick_awake(awake: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Up to `slots` awake heads per token and group, `(B, T, G, K)` each: index in the group; whether it is awake."""
    index = (~awake).to(torch.int8).argsort(dim=-1, stable=True)[..., :slots]
    return index, awake.gather(-1, index)


def project_in(x: Tensor, weight: Tensor, bias: Tensor | None, heads: Tensor, real: Tensor) -> Tensor:
    """Project x for chosen rows, zero where not `real`: `(B, T, G, K, d)`.

    x: `(B, T, D)`; weight: `(N, d, D)` per head; bias: `(N, d)` or None; heads, real: `(B, T, G, K)`, head in [0, N).
    """
    rows, count = _by_head(heads, real, len(weight))
    source = x.flatten(0, 1).index_select(0, rows // (heads.shape[2] * heads.shape[3]))
    projected = _matmul_by_head(source, weight.transpose(1, 2), count)
    out = projected.new_zeros(heads.numel(), weight.shape[1]).index_copy(0, rows, projected).view(*heads.shape, -1)
    if bias is not None:
        out = out + bias[heads]
    return out.masked_fill(~real[..., None], 0)


def project_out(rows_out: Tensor, weight: Tensor, heads: Tensor, real: Tensor) -> Tensor:
    """Project chosen rows out and add up those of each token: `(B, T, D)`.

    rows_out: `(B, T, G, K, d)`, already weighted; weight: `(N, d, D)` per head; heads, real: as in `project_in`.
    """
    B, T = heads.shape[:2]
    rows, count = _by_head(heads, real, len(weight))
    projected = _matmul_by_head(rows_out.flatten(0, 3).index_select(0, rows), weight, count)
    projected = projected.masked_fill(~real.flatten()[rows][:, None], 0)
    flat = projected.new_zeros(B * T, weight.shape[2])
    return flat.index_add(0, rows // (heads.shape[2] * heads.shape[3]), projected).view(B, T, -1)


def _by_head(heads: Tensor, real: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """Indices of rows sorted by head, those that are not real last, and the number of real rows of each head."""
    owner, rows = torch.where(real, heads, n_heads).flatten().sort(stable=True)
    count = torch.zeros(n_heads + 1, dtype=torch.int32, device=owner.device)
    return rows, count.index_add(0, owner, torch.ones_like(owner, dtype=torch.int32))[:n_heads]


def _matmul_by_head(rows: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Multiply rows `(R, n)`, sorted by head, by each head's own weight `(N, n, m)`.

    Rows after the counted ones hold arbitrary values in the result. PyTorch's grouped matmul is used where there is
    one for the device, since it reads the counts there and makes nothing wait. Else, where Python cannot read the
    counts, each head multiplies all rows.
    """
    if _has_grouped_matmul(rows, weight):
        return torch.nn.functional.grouped_mm(rows, weight, offs=count.cumsum(0, dtype=torch.int32))
    if hides_values():
        head = (torch.arange(len(rows), device=rows.device)[:, None] >= count.cumsum(0)).sum(-1, keepdim=True)
        out = rows.new_zeros(len(rows), weight.shape[2])
        for h, one in enumerate(weight):
            out = torch.where(head == h, rows @ one, out)
        return out
    runs = count.tolist()
    parts = [part @ weight[h] for h, part in enumerate(rows[: sum(runs)].split(runs)) if len(part)]
    return torch.cat([*parts, rows.new_zeros(len(rows) - sum(runs), weight.shape[2], dtype=(parts or [rows])[0].dtype)])


def _has_grouped_matmul(rows: Tensor, weight: Tensor) -> bool:
    known = hasattr(torch.nn.functional, "grouped_mm") and rows.is_cuda and not in_vmap()
    return known and rows.dtype == torch.bfloat16 == weight.dtype
