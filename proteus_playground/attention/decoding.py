"""One layer, token by token: a prefill by the parallel pass, then steps from a bank of fixed size.

Axes: `B` batch, `n` tokens, `D` model width, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .bank.bank import ENDLESS, KVBank
from .budget import Budget, plan_budget
from .trace import trace_of

if TYPE_CHECKING:
    from .layer import ProteusAttention

PIECE = 1 << 16  # tokens whose keys and values are held at a time while a prefill fills a bank


def budget_for(attn: ProteusAttention, tokens: int | None) -> Budget:
    """Budgets of a sequence that may come to hold `tokens` tokens, or that never ends."""
    alpha = attn.cfg.flux_alpha
    if tokens is None and alpha is not None and 0 < alpha < 1:
        raise ValueError(
            f"tokens=None: at flux_alpha={alpha} budgets follow the length; give the most tokens the state may hold"
        )
    return plan_budget(attn.cfg, ENDLESS if tokens is None else tokens)


def new_state(attn: ProteusAttention, batch: int, tokens: int | None, dtype: torch.dtype | None) -> KVBank:
    """An empty bank for this layer."""
    weight = attn.k_proj.weight
    return KVBank.empty(
        budget_for(attn, tokens),
        attn.gates,
        batch,
        inv_freq=attn.inv_freq,
        dtype=weight.dtype if dtype is None else dtype,
        device=weight.device,
        int8=attn.cfg.int8,
    )


def fill(attn: ProteusAttention, x: Tensor, state: KVBank, positions: Tensor | None, padding: Tensor | None) -> None:
    """Take the keys and values of hidden states `(B, n, D)` into a bank, a piece at a time."""
    for i in range(0, x.shape[1], PIECE):
        cut = slice(i, i + PIECE)
        k, v = _keys_values(attn, x[:, cut])
        keep = _kept(attn, k, state, None if padding is None else padding[:, cut])
        state.extend(k, v, keep=keep, positions=None if positions is None else positions[..., cut])
    if padding is not None:  # padding at the end is no part of the text: what comes next follows the last real token
        at = torch.arange(x.shape[1], device=x.device) if positions is None else positions.to(x.device)
        last = at.expand(x.shape[:2]).masked_fill(padding, -1).amax(1)
        state.next_position.copy_(last + 1)


def advance(attn: ProteusAttention, x: Tensor, state: KVBank, positions, padding: Tensor | None, traced: bool):
    """The next tokens of every sequence, `(B, n, D)` -> `(B, n, D)`, and their trace if asked."""
    k, v = _keys_values(attn, x)
    keep = _kept(attn, k, state, padding)
    q, routes = attn._queries(x, state.budget, keep, traced)
    awake = None if routes is None else routes.real.flatten(2)
    take = state.step if x.shape[1] == 1 else state.steps
    heads = attn._weigh(take(q, k, v, keep=keep, awake=awake, positions=positions), routes)
    y = attn._merge(heads, routes)
    if keep is not None and attn.cfg.bias:
        y = y.masked_fill(~keep[..., None], 0)
    return (y, trace_of(heads, routes, keep, attn.gates)) if traced else y


def _keys_values(attn: ProteusAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(proj(x).unflatten(-1, (attn.cfg.n_kv_heads, -1)) for proj in (attn.k_proj, attn.v_proj))


def _kept(attn: ProteusAttention, k: Tensor, state: KVBank, padding: Tensor | None) -> Tensor | None:
    real = None if padding is None else ~padding
    return attn.gates.keep_tokens(k, state.budget.keep_ratio, attn.cfg.n_anchors, real, state.count)
