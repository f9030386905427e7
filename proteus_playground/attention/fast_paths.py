"""Two short ways through the layer: dense, and the Triton backend without autograd, a piece of rows at a time.

In pieces, keys and values of the whole text are kept; queries, routes, notes and heads' outputs live for one piece. A
text of one piece is projected by a single matmul.

Axes: `B` batch, `T` tokens, `D` model width, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backends.dispatch import choose_backend, dense
from .budget import Budget
from .rope import rotate


def attend_in_pieces(attn, x: Tensor, positions: Tensor | None, budget: Budget, piece: int = 1 << 16) -> Tensor:
    """`ProteusAttention.forward` of x `(B, T, D)` where nothing is dropped and no gradient is asked."""
    from .backends.fused import launch as triton

    cfg, (B, T, _) = attn.cfg, x.shape
    H, G, d = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    positions = None if positions is None else positions.to(x.device)
    freq = attn.inv_freq
    find = triton.Finder(attn.gates.prototypes, attn.gates.alive, positions, freq, None)
    plan = triton.plan_for(budget, H // G, d, cfg.gates_per_group)
    routed = attn.router is not None and H > G
    step = max(plan.SEG, piece // B // plan.SEG * plan.SEG)
    early = (attn.k_proj, attn.v_proj)
    late = (attn.q_proj, attn.router) if routed else (attn.q_proj,)
    if step >= T:
        k, v, *rest = project(x, (*early, *late))
        store = triton.make_store(B, T, G, d, k.dtype, x.device, cfg.int8)
        triton.lure_keys(_heads(k, G), _heads(v, G), store, find, plan, 0)
    else:
        store = triton.make_store(B, T, G, d, x.dtype, x.device, cfg.int8)
        for t0 in range(0, T, step):
            k, v = (_heads(y, G) for y in project(x[:, t0 : t0 + step], early))
            triton.lure_keys(k, v, store, find, plan, t0)
        rest, y = None, torch.empty_like(x)
    keys = triton.count_keys(store, cfg.gates_per_group, plan)
    for t0 in range(0, T, step):
        here = slice(t0, t0 + step)
        q, *logits = rest or project(x[:, here], late)
        q, found = _heads(q, H), [None, None]  # who is awake, and how loud
        route = partial(_route, found, attn, q, logits, budget) if routed else None
        if routed and budget.head_top_p < 1:
            route()
            route = None
        rows = triton.index_rows(q, keys, find, found[0], t0, plan, route)  # all awake: no probe waits for the routes
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        triton.read_rows(rows, keys, out, found[1], None, t0, plan, d**-0.5)
        done = linear(out.flatten(2), attn.o_proj.weight, attn.o_proj.bias)
        if step >= T:
            return done
        y[:, here] = done
    return y


def _route(found: list, attn, q: Tensor, logits: list[Tensor], budget: Budget) -> None:
    from .backends.fused import launch as triton

    cfg = attn.cfg
    found[:] = triton.route(q, logits[0], attn.gates, attn.router.balance, budget, cfg.prior_temperature, cfg.prior_max)


def attend_densely(attn, x: Tensor, positions: Tensor | None) -> Tensor:
    """`ProteusAttention.forward` at flux alpha 0: one matmul, RoPE, fused attention, one matmul. Any device."""
    cfg = attn.cfg
    choose_backend(x.device, cfg.backend, cfg.head_dim, x.dtype)  # a backend asked for by name must run here
    freq, positions = attn.inv_freq, None if positions is None else positions.to(x.device)
    q, k, v = project(x, (attn.q_proj, attn.k_proj, attn.v_proj))
    q, k, v = _heads(q, cfg.n_heads), _heads(k, cfg.n_kv_heads), _heads(v, cfg.n_kv_heads)
    out = dense(rotate(q, positions, freq), rotate(k, positions, freq), v, cfg.head_dim**-0.5)
    return linear(out.flatten(2), attn.o_proj.weight, attn.o_proj.bias)


def project(x: Tensor, layers) -> list[Tensor]:
    """x `(B, T, D)` through several linear maps at once: their outputs `(B, T, features)`, views of one matmul."""
    weights = [layer.weight.flatten(0, -2) for layer in layers]
    biases = [getattr(layer, "bias", None) for layer in layers]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    return list(linear(x, torch.cat(weights), bias).split([len(w) for w in weights], dim=-1))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1))
