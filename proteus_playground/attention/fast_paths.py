"""Two fast equivalents of the layer's general path: dense, and a piece of rows at a time, without autograd.

In pieces, keys and values of the whole text are kept; queries, routes, notes and the heads' outputs live for one piece.
A text of one piece is projected by a single matmul.

Axes: `B` batch, `T` tokens, `D` model width, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backends.dispatch import choose_backend, dense, in_pieces, rotate, route
from .budget import Budget

TOKENS_PER_PIECE = 1 << 16


def attend_in_pieces(
    attn, x: Tensor, positions: Tensor | None, budget: Budget, piece: int = TOKENS_PER_PIECE
) -> Tensor:
    """`ProteusAttention.forward` of x `(B, T, D)` where no token is dropped and no gradient is needed.

    piece: tokens of all sequences together that are projected at a time.
    """
    cfg, (B, T, _) = attn.cfg, x.shape
    H, G, d = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
    routed = attn.router is not None and H > G
    pieces = in_pieces(
        attn.gates,
        budget,
        batch=B,
        tokens=T,
        heads=H,
        positions=None if positions is None else positions.to(x.device),
        inv_freq=attn.inv_freq,
        dtype=x.dtype,
        scale=d**-0.5,
        int8=cfg.int8,
    )
    step = pieces.tokens_per_piece(piece // B)
    for_keys = (attn.k_proj, attn.v_proj)
    for_rows = (attn.q_proj, attn.router) if routed else (attn.q_proj,)
    if step >= T:
        k, v, q, *logits = project(x, (*for_keys, *for_rows))
        pieces.add_keys(_heads(k, G), _heads(v, G), 0)
        return _attend_and_merge(attn, pieces, q, logits, budget, 0)
    for t0 in range(0, T, step):
        k, v = project(x[:, t0 : t0 + step], for_keys)
        pieces.add_keys(_heads(k, G), _heads(v, G), t0)
    y = torch.empty_like(x)
    for t0 in range(0, T, step):
        q, *logits = project(x[:, t0 : t0 + step], for_rows)
        y[:, t0 : t0 + step] = _attend_and_merge(attn, pieces, q, logits, budget, t0)
    return y


def _attend_and_merge(attn, pieces, q: Tensor, logits: list[Tensor], budget: Budget, t0: int) -> Tensor:
    """Layer output `(B, n, D)` for queries `(B, n, H d)` of tokens t0, t0 + 1, ...; logits: [] if not routed."""
    cfg, q = attn.cfg, _heads(q, attn.cfg.n_heads)

    def routes() -> tuple[Tensor, Tensor]:
        balance = attn.router.balance
        return route(q, *logits, attn.gates, balance, budget, cfg.prior_temperature, cfg.prior_max)

    if not logits:
        out = pieces.attend(q, t0)
    elif budget.head_top_p < 1:
        awake, weight = routes()
        out = pieces.attend(q, t0, awake, lambda: weight)
    else:  # all heads are awake: gates can be opened before the weights are known
        out = pieces.attend(q, t0, weigh=lambda: routes()[1])
    return linear(out.flatten(2), attn.o_proj.weight, attn.o_proj.bias)


def attend_densely(attn, x: Tensor, positions: Tensor | None) -> Tensor:
    """`ProteusAttention.forward` at flux alpha 0: one matmul, RoPE, fused attention, one matmul. Any device."""
    cfg = attn.cfg
    choose_backend(x.device, cfg.backend, cfg.head_dim, x.dtype)  # raises where a backend asked for by name cannot run
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
