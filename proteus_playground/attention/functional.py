"""Proteus attention over given queries, keys and values: the core that a foreign model can call.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `C` gates per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends.dispatch import attend, choose_backend, dense, dense_lse, without_triton
from .backends.operator import attend_as_operator
from .budget import Budget
from .gates import Gates
from .rope import rotate
from .shortlist import Shortlist, build_shortlist, count_reads
from .transforms import hides_values, is_transformed


@dataclass(frozen=True)
class AttentionResult:
    """Output of a call, and what its rows read."""

    out: Tensor  # (B, T, H, d), zero for dropped tokens and sleeping heads
    lse: Tensor | None  # (B, T, H) float32 log-sum-exp of the scores read; None when dense, unless return_lse
    reads: Tensor | None  # (B, T, H) int64, keys and notes read by each row; 0 for dropped tokens and sleeping heads
    gate_of_key: Tensor | None  # (B, T, G) int64; -1 for anchors and dropped tokens
    backend: str
    backend_reason: str
    index: Any = None  # what `KVBank.extend` takes, if `return_index` asks for it and the backend has one


class Kept(NamedTuple):
    """The inputs of a call, with dropped tokens behind those that take part. `S` is T, or the longest kept length."""

    q: Tensor  # (B, S, H, d)
    k: Tensor  # (B, S, G, d)
    v: Tensor  # (B, S, G, d)
    positions: Tensor | None  # (S,) or (B, S), in tokens; None for 0, 1, ...
    awake: Tensor | None  # (B, S, H)
    index: Tensor | None  # (B, S) token index of each row; None when all T are kept, in their order
    length: Tensor | None  # (B,) how many of the S take part; None for all


@dataclass(frozen=True)
class Prepared:
    """Inputs without the dropped tokens, rotated, and indexed. `S` is the longest kept length."""

    q: Tensor  # (B, S, H, d) rotated
    k: Tensor  # (B, S, G, d) rotated
    v: Tensor  # (B, S, G, d)
    gate: Tensor  # (B, S, G) the gate each key falls into, anchors included
    short: Shortlist | None  # None when everything may be read
    index: Tensor | None  # (B, S) token index of each row; None when all T are kept
    length: Tensor | None  # (B,) kept tokens; None for all


def proteus_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    budget: Budget,
    *,
    inv_freq: Tensor | None,
    positions: Tensor | None = None,
    keep: Tensor | None = None,
    awake: Tensor | None = None,
    backend: str = "auto",
    scale: float | None = None,
    return_lse: bool = False,
    return_index: bool = False,
    explain: bool = True,
    int8: bool = False,
) -> AttentionResult:
    """Causal attention in which each row reads at most `budget.shortlist` keys and notes.

    q: `(B, T, H, d)`, k and v: `(B, T, G, d)`, all un-rotated, H a multiple of G. gates: `Gates` for G groups of
    width d. budget: from `plan_budget`. inv_freq: `(d / 2,)` rotary frequencies in radians per token, or None.
    positions: `(T,)` or `(B, T)`, in tokens, default 0..T-1. keep: `(B, T)` bool, tokens that take part (padding is
    False). awake: `(B, T, H)` bool, rows that count. scale: of the scores, default d^-1/2. explain: False leaves
    `reads` and `gate_of_key` out, which saves time. return_index: keep what fills a `KVBank` with these keys quickly,
    where all tokens take part. int8: sparse rows read keys and values stored in int8, which have
    no gradient.

    Raises `TypeError` or `ValueError` naming the argument. Dense (fused SDPA) when the budget holds every key.
    """
    check_inputs(q, k, v, gates, positions, keep, awake, inv_freq)
    check_budget(budget, q.shape[1], gates.gates_per_group)
    name, why = choose_backend(q.device, backend, gates.head_dim, q.dtype)
    if name == "triton" and is_transformed():
        name, why = without_triton(backend)
    if int8 and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("int8=True: int8 keys and values have no gradient; call under torch.no_grad()")
    if budget.dense and name != "reference":
        name, why = "dense", "everything fits the budget: fused scaled_dot_product_attention"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Triton reads the lengths on the device; the other backends work on fewer rows, for which the host must know them.
    kept = _keep(q, k, v, positions, keep, awake, trim=name != "triton" and not hides_values())
    lse = short = index = None
    if name == "dense":
        rotated_q, rotated_k = (rotate(x, kept.positions, inv_freq) for x in (kept.q, kept.k))
        out = dense(rotated_q, rotated_k, kept.v, scale)
        if return_lse:
            lse = dense_lse(rotated_q, rotated_k, scale)
    else:
        where = {"positions": kept.positions, "inv_freq": inv_freq, "length": kept.length, "awake": kept.awake}
        arguments = {**where, "scale": scale, "int8": int8, "backend": name}
        if hides_values() and name != "triton" and not explain:
            out, lse = attend_as_operator(kept.q, kept.k, kept.v, gates, budget, **arguments)
        else:
            how = {"explain": explain, "return_index": return_index and kept.index is None}
            out, lse, short, index = attend(kept.q, kept.k, kept.v, gates, budget, **arguments, **how)
    reads = gate = None
    if explain:
        reads = _dense_reads(kept.q) if budget.dense else count_reads(short)
        gate = gates.lure(kept.k)[0] if budget.dense else short.gate
    T = q.shape[1]
    return AttentionResult(
        out=_silence(_spread(out, kept, T, 0), awake),
        lse=_spread(lse, kept, T, -torch.inf),
        reads=_silence(_spread(reads, kept, T, 0), awake),
        gate_of_key=_spread(gate, kept, T, -1),
        backend=name,
        backend_reason=why,
        index=index,
    )


def prepare(q, k, v, gates: Gates, budget: Budget, *, inv_freq, positions, keep) -> Prepared:
    """Drop tokens, lure keys, open gates, rotate: the tables behind the `torch` and `reference` backends, for display.

    Arguments as in `proteus_attention`, already checked.
    """
    kept = _keep(q, k, v, positions, keep, None, trim=not hides_values())
    with torch.no_grad():
        gate = gates.lure(kept.k)[0]
        short = None if budget.dense else build_shortlist(gate, kept.q, gates, budget, kept.length)
    q, k = (rotate(x, kept.positions, inv_freq) for x in (kept.q, kept.k))
    return Prepared(q, k, kept.v, gate, short, kept.index, kept.length)


def _keep(q, k, v, positions, keep, awake, trim: bool) -> Kept:
    """Move dropped tokens behind those that take part.

    trim: also cut off the rows that no sequence needs, for which the host waits for a GPU.
    """
    if positions is not None:
        positions = positions.to(q.device)
    if keep is None or (trim and keep.all()):
        return Kept(q, k, v, positions, awake, None, None)
    length = keep.sum(1)
    dropped = ~keep[..., None, None]
    q, k, v = (x.masked_fill(dropped, 0) for x in (q, k, v))  # padding may hold any value, NaN included
    index = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    if trim:
        index = index[:, : max(1, int(length.max()))]
    positions = index if positions is None else _take(positions.expand(keep.shape), index)
    awake = None if awake is None else _take(awake, index)
    return Kept(*(_take(x, index) for x in (q, k, v)), positions, awake, index, length)


def _dense_reads(q: Tensor) -> Tensor:
    B, S, H, _ = q.shape
    return torch.arange(1, S + 1, device=q.device)[None, :, None].expand(B, S, H)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` (B, T, ...) at `index` (B, S)."""
    at = index.view(*index.shape, *(1,) * (x.dim() - 2)).expand(*index.shape, *x.shape[2:])
    return x.gather(1, at)


def _spread(x: Tensor | None, kept: Kept, tokens: int, fill) -> Tensor | None:
    """Kept rows `(B, S, ...)` back at their token indices, `(B, tokens, ...)`; `fill` elsewhere."""
    if x is None or kept.index is None:
        return x
    S = x.shape[1]
    real = torch.arange(S, device=x.device) < kept.length[:, None]
    tail = (1,) * (x.dim() - 2)
    x = x.masked_fill(~real.view(*real.shape, *tail), fill)
    out = x.new_full((x.shape[0], tokens, *x.shape[2:]), fill)
    return out.scatter(1, kept.index.view(*kept.index.shape, *tail).expand_as(x), x)


def _silence(x: Tensor | None, awake: Tensor | None) -> Tensor | None:
    """Zero the rows of sleeping heads."""
    if awake is None or x is None:
        return x
    return x.masked_fill(~awake.view(*awake.shape, *(1,) * (x.dim() - 3)), 0)


def check_budget(budget: Budget, tokens: int, gates_per_group: int) -> None:
    """Raise `ValueError` when a budget was planned for a shorter text or fewer gates, and could be exceeded."""
    if tokens > budget.tokens:
        raise ValueError(f"budget was planned for {budget.tokens} tokens: must be planned for at least {tokens}")
    most = max(budget.probes, budget.notes)
    if not budget.dense and most > gates_per_group:
        raise ValueError(
            f"budget reads {most} gates of {gates_per_group}: plan it with gates_per_group={gates_per_group}"
        )


def check_inputs(q, k, v, gates, positions, keep, awake, inv_freq) -> None:
    """Raise `TypeError` or `ValueError` naming the first argument that does not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name}={type(x).__name__}: expected a floating-point tensor")
        if x.dim() != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be (B, T, heads, d), no axis empty")
    if not isinstance(gates, Gates):
        raise TypeError(f"gates={type(gates).__name__}: expected Gates")
    B, T, H, d = q.shape
    G = gates.n_groups
    if H % G:
        raise ValueError(f"q has {H} heads: must be a multiple of the gates' {G} groups")
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != (B, T, G, d):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {(B, T, G, d)} to go with q and gates")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}: must be {q.dtype} on {q.device}, as q")
    if d != gates.head_dim:
        raise ValueError(f"q has head dim {d}: must be the gates' {gates.head_dim}")
    if inv_freq is not None and (not isinstance(inv_freq, Tensor) or tuple(inv_freq.shape) != (d // 2,)):
        raise ValueError(f"inv_freq={tuple(getattr(inv_freq, 'shape', ()))}: must be a tensor of shape ({d // 2},)")
    if positions is not None and not isinstance(positions, Tensor):
        raise TypeError(f"positions={type(positions).__name__}: expected a tensor ({T},) or ({B}, {T})")
    if positions is not None and tuple(positions.shape) not in ((T,), (B, T)):
        raise ValueError(f"positions has shape {tuple(positions.shape)}: must be ({T},) or ({B}, {T})")
    for name, x, shape in (("keep", keep, (B, T)), ("awake", awake, (B, T, H))):
        if x is not None and (not isinstance(x, Tensor) or x.dtype != torch.bool):
            raise TypeError(f"{name}={getattr(x, 'dtype', type(x).__name__)}: expected a bool tensor {shape}")
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: must be {shape}")
