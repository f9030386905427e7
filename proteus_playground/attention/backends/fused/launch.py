"""Launches of the attention kernels, forwards and backwards, and of the rotation.

Where the speed is: a key or value that is loaded serves 64 rows or more. Window, anchors and notes are shared by
neighbouring rows; rings become dense by sorting keys by (gate, position) and rows by (segment, gate). The two parts
meet through their log-sum-exp. Building the index costs O(T C).

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `X` = B G, `r` = H / G, `d` head dim, `C` gates per group,
`n` probes.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .backward import (
    anchor_kernel,
    delta_kernel,
    far_key_kernel,
    far_query_kernel,
    near_key_kernel,
    near_query_kernel,
    note_grad_kernel,
    spread_kernel,
)
from .forward import far_kernel, near_kernel
from .plan import DTYPES, LOG2_E, Plan, compiler_options, padded
from .tables import GateLookup, KeyIndex, Rows, batch_stride, wait_for
from .vectors import rotate_kernel


def read_rows(
    rows: Rows, keys: KeyIndex, out: Tensor, weight: Tensor | None, length: Tensor | None, t0: int, plan: Plan,
    scale: float,
) -> Tensor:  # fmt: skip
    """Attend: writes `out` `(B, rows, H, d)`, times `weight` `(B, rows, H)` if given; returns the log-sum-exp, float32.

    Rows t0, t0 + 1, ... of a text. length: `(B,)`, how many of its tokens are real.
    """
    q, opened = rows.q, rows.probes
    (B, size, H, d), n = q.shape, plan.probes
    X, T = keys.gate.shape
    G, C, chunks = X // B, keys.first.shape[1], keys.count_base.shape[1] - 1
    r = H // G
    far_out = torch.empty(B, size, H, n, d, dtype=q.dtype, device=q.device)
    far_lse = torch.empty(B, size, H, n, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, size, H, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *keys.k.stride()[:2], *keys.v.stride()[:2])
    shared = {"INT8": keys.k.dtype == torch.int8, "DTYPE": DTYPES[q.dtype], "CH": plan.chunk, "DP": plan.padded_dim,
              **compiler_options(plan)}  # fmt: skip
    wait_for(rows.ready)
    if n:
        segments = rows.bucket_count.shape[1]
        far_kernel[(segments * C, X)](
            q, keys.k, keys.v, keys.k_scale, keys.v_scale, keys.order, keys.first, keys.before, keys.count_base,
            rows.bucket_count, rows.bucket_rows, far_out, far_lse,
            T, t0, size, G, d, C, plan.ring, plan.block, chunks, segments, scale * LOG2_E, *strides,
            SEG=plan.segment, R=r, N=n, M=plan.tile_rows, BN=plan.ring_keys, **shared,
        )  # fmt: skip
    near_kernel[(triton.cdiv(size, plan.near_tokens), X, triton.cdiv(r, plan.near_heads))](
        q, keys.k, keys.v, keys.k_scale, keys.v_scale, rows.notes, keys.before, keys.count_base, opened, rows.noted,
        far_out, far_lse, weight, length, out, lse,
        T, t0, size, G, r, d, C, plan.window, plan.block, plan.anchors, plan.ring, chunks, rows.notes.shape[1],
        scale * LOG2_E, *strides, out.stride(0),
        KINDS=plan.kinds, SOME=plan.some_notes, N=n, WEIGH=weight is not None, KEEP=length is not None,
        TT=plan.near_tokens, RC=plan.near_heads, M=plan.tile_rows, BN=plan.tile_keys, NB=plan.tile_notes,
        NTT=plan.near_ticks, **shared,
    )  # fmt: skip
    return lse


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, rows: Rows, keys: KeyIndex, lookup: GateLookup, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of un-rotated q, k, v from that of out, all `(B, T, heads, d)` and contiguous. Deterministic."""
    (B, T, H, d), q, n = grad.shape, rows.q, plan.probes
    X, C, chunks = len(keys.gate), keys.first.shape[1], keys.count_base.shape[1] - 1
    G, r = X // B, H // (X // B)
    base2, kv = scale * LOG2_E, (*keys.k.stride()[:2], *keys.v.stride()[:2])
    wide = plan.padded_dim * q.element_size() > 256
    shared = {"DTYPE": DTYPES[q.dtype], "M": 32 if wide else plan.tile_rows, "DP": plan.padded_dim,
              "num_warps": 8 if wide else 4, "num_stages": 1}  # fmt: skip
    step = 64 if plan.padded_dim <= 64 and not torch.version.hip else 32  # 64 spills on AMD
    ring_step = min(step, plan.ring_keys)
    buckets = {"CH": plan.chunk, "SEG": plan.segment, "R": r, "N": n, "BN": ring_step, **shared}
    keep = {"KEEP": lookup.length is not None}
    wait_for(rows.ready)
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(B * T * H, 64),)](out, grad, delta, B * T * H, d, BT=64, DP=plan.padded_dim)
    stats = (q, keys.k, keys.v, grad, lse, delta)
    far_dq, far_kv = q.new_empty(B, T, H, n, d), q.new_zeros(X, T if n else 0, 2 * d)
    if n:
        segments = rows.bucket_count.shape[1]
        far_query_kernel[(segments * C, X)](
            *stats, keys.order, keys.first, keys.before, keys.count_base, rows.bucket_count, rows.bucket_rows, far_dq,
            T, G, d, C, plan.ring, plan.block, chunks, segments, base2, *kv, **buckets,
        )  # fmt: skip
        far_key_kernel[(triton.cdiv(T, ring_step), X)](
            *stats, keys.gate, keys.rank, keys.order, keys.first, keys.before, keys.count_base, rows.bucket_count,
            rows.bucket_rows, far_kv, T, G, d, C, plan.window, plan.ring, plan.block, chunks, segments, base2, scale,
            *kv, **buckets,
        )  # fmt: skip
    dq = torch.empty_like(q)
    near_query_kernel[(triton.cdiv(T, plan.near_tokens), X, triton.cdiv(r, plan.near_heads))](
        *stats, rows.notes, keys.before, keys.count_base, rows.probes, rows.noted, far_dq, lookup.length, dq,
        T, G, r, d, C, plan.window, plan.block, plan.anchors, plan.ring, chunks, rows.notes.shape[1], base2, scale, *kv,
        KINDS=plan.kinds, SOME=plan.some_notes, N=n, CH=plan.chunk, TT=plan.near_tokens, RC=plan.near_heads, BN=32,
        NB=min(32, plan.tile_notes), NTT=plan.near_ticks, **keep, **{**shared, "M": plan.tile_rows},
    )  # fmt: skip
    del far_dq
    whole, rest = _spread_notes(stats, rows, keys, plan, T, G, r, d, C, chunks, base2, scale, shared)
    spans, AP = triton.cdiv(T, 1024), padded(plan.anchors)
    anchor_grad = q.new_empty(X, spans, AP, 2 * d, dtype=torch.float32)
    sizes = (T, G, r, d, plan.window, plan.block, plan.anchors, base2, scale, *kv)
    if plan.anchors:
        anchor_kernel[(spans, X)](*stats, lookup.length, anchor_grad, *sizes, SPAN=1024, AP=AP, **keep, **shared)
    dk, dv = (q.new_empty(B, T, G, d) for _ in "kv")
    near_key_kernel[(triton.cdiv(T, step), X)](
        *stats, far_kv, whole, rest, anchor_grad.sum(1), lookup.length, dk, dv, *sizes,
        FAR=n > 0, KINDS=plan.kinds, ANCHORS=plan.anchors > 0, AP=AP, BN=step, **keep, **shared,
    )  # fmt: skip
    for x in (dq, dk) if lookup.inv_freq is not None else ():
        rotate_into(x, x, lookup.positions, lookup.inv_freq, -1.0)
    return dq, dk, dv


def _spread_notes(stats, rows: Rows, keys: KeyIndex, plan: Plan, T, G, r, d, C, chunks, base2, scale, shared):
    """Gradient that keys and values `(X, T, 2 d)` get through notes of all keys, and through notes less the ring."""
    q, grad, lse, delta = stats[0], *stats[3:]
    X, ticks, kinds = len(keys.gate), rows.notes.shape[1], plan.kinds
    whole, rest = (q.new_zeros(X, T if kinds > i else 0, 2 * d) for i in (0, 1))
    if kinds:
        table, per, block = torch.empty_like(rows.notes), plan.chunk // plan.block, min(32, plan.tile_notes)
        note_grad_kernel[(ticks, X, triton.cdiv(kinds * C, block))](
            q, grad, lse, delta, rows.notes, keys.before, keys.count_base, rows.probes, rows.noted, table,
            T, G, r, d, C, plan.block, plan.ring, chunks, ticks, base2, scale,
            KINDS=kinds, SOME=plan.some_notes, N=plan.probes, CH=plan.chunk, NB=block, **shared,
        )  # fmt: skip
        total = table.view(X, ticks // per, per, kinds, C, 2 * d).sum(2, dtype=torch.float32)
        later = torch.zeros_like(total)
        later[:, :-1] = total.flip(1).cumsum(1).flip(1)[:, 1:]
        spread_kernel[(ticks // per, X, kinds * 2 * triton.cdiv(C, plan.tile_gates))](
            keys.gate, keys.rank, keys.first, keys.order, table, later, whole, rest,
            T, d, C, plan.window, plan.block, plan.ring, ticks, ticks // per,
            KINDS=kinds, DTYPE=DTYPES[q.dtype], CH=plan.chunk, BS=plan.tick_keys, DP=plan.padded_dim,
            GB=plan.tile_gates,
        )  # fmt: skip
    return whole, rest


def rotate_into(x: Tensor, y: Tensor, positions: Tensor | None, inv_freq: Tensor, sign: float) -> None:
    """RoPE of x `(B, T, N, d)` written to contiguous y, which may be x; sign -1 rotates back."""
    B, T, N, d = x.shape
    rotate_kernel[(triton.cdiv(T, 32), B)](
        x, y, positions, inv_freq, T, N, d, sign, batch_stride(positions), *x.stride()[:2], HP=padded(d // 2), BT=32
    )
