"""The shortlist in Triton: the index, the forward pass and the backward pass, fused, with no wait for the host.

Where the speed is: a key or value that is loaded serves 64 rows or more. Window, anchors and notes are shared by
neighbouring rows; rings become dense by sorting keys by (gate, position) and rows by (segment, gate). The two parts
meet through their log-sum-exp. Building the index costs O(T C).

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `r` = H / G, `d` head dim, `C` gates, `n` probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...shortlist import Shortlist
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
from .index import (
    bucket_kernel,
    gates_kernel,
    notes_kernel,
    order_kernel,
    probe_kernel,
    rank_kernel,
    rotate_kernel,
    route_kernel,
    scan_counts_kernel,
    scan_sums_kernel,
    sums_kernel,
)

PIECE = 1 << 17  # tokens whose rows are handled at a time, without autograd: what they need on the way is freed again
TOKENS = 64  # tokens per tile of the index
TILE = 64  # rows per tile
LOG2_E = 1.4426950408889634
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Plan:
    """Integers of a call: the budget's, and the sizes that kernels are compiled for. None depends on the length."""

    window: int
    block: int
    anchors: int
    probes: int  # n, 0 where rings are empty
    ring: int
    notes: bool
    CH: int  # tokens per chunk of keys
    SEG: int  # tokens per segment of rows
    TT: int  # tokens per near tile
    RC: int  # heads per near tile
    M: int  # rows per tile
    BN: int  # keys per step of a tile
    NB: int  # notes per step of a tile
    GB: int  # gates per block when keys are summed
    BS: int  # keys per step when a tick is summed
    HP: int  # d / 2, C, d as powers of two of at least 16
    CP: int
    DP: int

    @property
    def kinds(self) -> int:
        """Notes per gate: of all that has left the window, and, where rings are read, of that less the ring."""
        return self.notes * (1 + (self.probes > 0))


@cache
def make_plan(
    window: int, block: int, anchors: int, probes: int, ring: int, notes: bool, per_group: int, d: int, gates: int
) -> Plan:
    """The plan for r = `per_group` rows per token and group, head dim d and C = `gates`."""
    power = triton.next_power_of_2
    probes = probes if ring else 0
    wanted = power(-(-256 * gates // (per_group * max(probes, 1))))  # about 256 rows per (segment, gate)
    segment = min(4096, max(TOKENS, wanted), max(TOKENS, 1 << 15 >> (per_group * max(probes, 1) - 1).bit_length()))
    heads = min(per_group, TILE)
    tokens = TILE // heads
    tokens = tokens // block * block if tokens >= block else 1 << (tokens.bit_length() - 1)
    return Plan(
        window, block, anchors, probes, ring, notes,
        CH=min(segment, max(TOKENS, min(256, 16 * block))),
        SEG=segment,
        TT=tokens,
        RC=heads,
        M=TILE,
        BN=32 if d > 128 else 64,
        NB=max(16, min(32, power(gates * (2 if probes else 1)))),
        GB=max(16, min(32 if d > 128 else 64, power(gates))),
        BS=max(16, block),
        HP=max(16, power(d // 2)),
        CP=max(16, power(gates)),
        DP=max(16, power(d)),
    )  # fmt: skip


def _stride(positions: Tensor | None) -> int:
    return positions.stride(0) if positions is not None and positions.dim() == 2 else 0


def tuned(plan: Plan) -> dict:
    """Compiler options of the attention kernels: on NVIDIA, few enough registers that four tiles share a processor."""
    options = {"num_warps": 8 if plan.DP > 128 else 4, "num_stages": 1}
    return options | ({"maxnreg": 128} if plan.DP <= 64 and not torch.version.hip else {})


class Store(NamedTuple):
    """Keys, values and the gate of each key. `X` = B G."""

    k: Tensor  # (B, T, G, d) rotated, int8 or in the queries' precision
    v: Tensor  # (B, T, G, d)
    k_scale: Tensor  # (B, T, G) float32; empty when nothing is int8
    v_scale: Tensor
    gate: Tensor  # (X, T) int32, -1 for anchors, padding and dropped tokens


class KeyIndex(NamedTuple):
    """A store, and what its keys come to, over N chunks."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    gate: Tensor
    rank: Tensor  # (X, T) int32, keys of the same gate and chunk that came before; of the same gate once ordered
    before: Tensor  # (X, N CH / block, C) int32, keys of the chunk that left before a tick
    count_base: Tensor  # (X, N + 1, C) int32, keys of a gate in earlier chunks
    carry: Tensor  # (X, kinds C 2 d) float32, what notes had taken in when the last piece of rows ended
    first: Tensor  # (X, C) int32, where a gate begins in `order`
    order: Tensor  # (X, T) int32, tokens in (gate, position) order; the first piece of rows fills it


class Finder(NamedTuple):
    """What finds gates and turns vectors."""

    prototypes: Tensor  # (G, C, d) float32
    alive: Tensor  # (G, C) bool
    positions: Tensor | None  # (T,) or (B, T), in tokens; None for 0, 1, ...
    inv_freq: Tensor | None  # (d / 2,) float32; None for no rotation
    length: Tensor | None  # (B,) how many of the T tokens are real; None for all

    @property
    def position_stride(self) -> int:
        return _stride(self.positions)


class Rows(NamedTuple):
    """What the rows of a piece come to."""

    q: Tensor  # (B, rows, H, d) rotated
    probes: Tensor  # (B, rows, H, n) int32, -1 for none
    bucket_count: Tensor  # (X, segments, C) int32, (row, probe) pairs of a segment that open a gate
    bucket_rows: Tensor  # (X, segments, C, SEG r) int32, their names; a row opens a gate at most once
    notes: Tensor  # (X, ticks, kinds, C, 2 d) mean of a gate's keys that have left the window; of those less the ring
    ready: torch.cuda.Event | None  # when order and notes are written; None for already


def make_store(B: int, T: int, G: int, d: int, dtype: torch.dtype, device, int8: bool) -> Store:
    """Room for the rotated keys and the values of T tokens."""
    k, v = (torch.empty(B, T, G, d, dtype=torch.int8 if int8 else dtype, device=device) for _ in "kv")
    k_scale, v_scale = (torch.empty((B, T, G) if int8 else (0,), dtype=torch.float32, device=device) for _ in "kv")
    return Store(k, v, k_scale, v_scale, torch.empty(B * G, T, dtype=torch.int32, device=device))


def lure_keys(k: Tensor, v: Tensor, store: Store, find: Finder, plan: Plan, t0: int) -> None:
    """Find the gates of keys t0, t0 + 1, ..., rotate them, and store them and their values.

    k and v `(B, tokens, G, d)` un-rotated, feature stride 1; where the store holds these very tensors they stay.
    """
    (B, tokens, G, d), T, C = k.shape, store.gate.shape[1], find.prototypes.shape[1]
    gates_kernel[(triton.cdiv(tokens, TOKENS), B * G)](
        k, v, find.prototypes, find.alive, find.positions, find.inv_freq, find.length, store.gate, store.k, store.v,
        store.k_scale, store.v_scale, T, t0, tokens, G, d, C, plan.anchors, *k.stride()[:2], *v.stride()[:2],
        find.position_stride, ROPE=find.inv_freq is not None, COPY=store.k is not k, INT8=store.k.dtype == torch.int8,
        KEEP=find.length is not None, HP=plan.HP, CP=plan.CP, BT=TOKENS,
    )  # fmt: skip


def index_keys(k: Tensor, v: Tensor, find: Finder, plan: Plan, int8: bool) -> KeyIndex:
    """Lure, rotate and rank the keys of a whole call."""
    B, T, G, d = k.shape
    if int8 or find.inv_freq is not None:
        store = make_store(B, T, G, d, k.dtype, k.device, int8)
    else:
        none = k.new_empty(0, dtype=torch.float32)
        store = Store(k, v, none, none, torch.empty(B * G, T, dtype=torch.int32, device=k.device))
    lure_keys(k, v, store, find, plan, 0)
    return count_keys(store, find.prototypes.shape[1], plan)


def count_keys(store: Store, C: int, plan: Plan) -> KeyIndex:
    """Rank keys whose gates are known."""
    (X, T), d, device = store.gate.shape, store.k.shape[3], store.gate.device
    chunks, ints = triton.cdiv(T + plan.window, plan.CH), {"dtype": torch.int32, "device": device}
    rank, order, first = torch.empty(X, T, **ints), torch.empty(X, T, **ints), torch.empty(X, C, **ints)
    before = torch.empty(X, chunks * (plan.CH // plan.block), C, **ints)
    count, count_base = torch.empty(X, chunks, C, **ints), torch.empty(X, chunks + 1, C, **ints)
    rank_kernel[(chunks, X)](
        store.gate, rank, before, count, T, C, plan.window, plan.block, CH=plan.CH, BS=min(64, plan.CH), CP=plan.CP,
        num_warps=2, num_stages=1,
    )  # fmt: skip
    scan_counts_kernel[(X,)](count, count_base, first, chunks, C, CP=plan.CP, ROWS=64)
    carry = torch.empty(X, plan.kinds * C * 2 * d, dtype=torch.float32, device=device)
    return KeyIndex(*store, rank, before, count_base, carry, first, order)


def index_rows(
    q: Tensor, keys: KeyIndex, find: Finder, awake: Tensor | None, t0: int, plan: Plan, meanwhile=None
) -> Rows:
    """Open gates for rows t0, t0 + 1, ... of q `(B, rows, H, d)` and sort them into buckets; write the ticks' notes.

    Pieces come in order, each starting at a multiple of the segment. `meanwhile` is called beside, with the notes.
    """
    B, rows, H, d = q.shape
    X, T = keys.gate.shape
    C, chunks, G, n = keys.first.shape[1], keys.count_base.shape[1] - 1, X // B, plan.probes
    r = H // G
    ints = {"dtype": torch.int32, "device": q.device}
    here = triton.cdiv(rows, plan.CH)
    table = torch.empty(X, here * (plan.CH // plan.block), plan.kinds, C, 2 * d, dtype=q.dtype, device=q.device)

    def beside():
        if t0 == 0:
            order_kernel[(triton.cdiv(T, 256), X)](
                keys.gate, keys.rank, keys.count_base, keys.first, keys.order, T, C, plan.window, chunks, CH=plan.CH,
                BT=256,
            )  # fmt: skip
        if plan.notes:
            _sum_notes(table, keys, plan, t0, here, G, DTYPES[q.dtype])
        if meanwhile:
            meanwhile()

    ready = _aside(q.device, beside)
    tiles, segments = triton.cdiv(rows, TOKENS), triton.cdiv(rows, plan.SEG)
    opened = torch.empty(B, rows, H, n, **ints)
    rope = find.inv_freq is not None
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device) if rope else q
    if n or rope:
        probe_kernel[(tiles, X)](
            q, turned, find.prototypes, find.alive, find.positions, find.inv_freq, awake, keys.before,
            keys.count_base, opened, T, t0, t0 + rows, G, r, d, C, n, plan.block, chunks, *q.stride()[:2],
            find.position_stride,
            ROPE=rope, AWAKE=awake is not None, PROBE=n > 0, CH=plan.CH, HP=plan.HP, CP=plan.CP, BT=TOKENS,
            **(tuned(plan) if r > 1 else {}),
        )  # fmt: skip
    size = torch.empty(X, segments, C, **ints)
    names = torch.empty(X, segments, C, plan.SEG * r if n else 0, **ints)
    if n:
        bucket_kernel[(segments * triton.cdiv(C, 4), X)](
            opened, size, names, rows, G, C, segments, SEG=plan.SEG, R=r, N=n, BT=1024, num_warps=4 if r > 1 else 2,
        )  # fmt: skip
    return Rows(turned, opened, size, names, table, ready)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _aside(device: torch.device, work) -> torch.cuda.Event | None:
    """Run `work` on a stream of its own, which waits for this one; the event says when it is done."""
    if device.type != "cuda":
        work()
        return None
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()
        return side.record_event()


def _join(ready: torch.cuda.Event | None) -> None:
    if ready is not None:
        torch.cuda.current_stream().wait_event(ready)


def _sum_notes(table: Tensor, keys: KeyIndex, plan: Plan, t0: int, here: int, G: int, dtype) -> None:
    """Write the notes of `here` chunks from token t0 on, and move the carry to their end."""
    X, T, C, d, chunks = *keys.gate.shape, keys.first.shape[1], keys.k.shape[3], keys.count_base.shape[1] - 1
    width = plan.kinds * C * 2 * d
    sums, base = (torch.empty(X, here + i, width, dtype=torch.float32, device=table.device) for i in (0, 1))
    grid, members = (here, X, plan.kinds * 2 * triton.cdiv(C, plan.GB)), (keys.gate, keys.rank, keys.first, keys.order)
    vectors, strides = (keys.k, keys.v, keys.k_scale, keys.v_scale), (*keys.k.stride()[:2], *keys.v.stride()[:2])
    shared = {"INT8": keys.k.dtype == torch.int8, "DTYPE": dtype, "CH": plan.CH, "DP": plan.DP, "GB": plan.GB,
              "num_warps": 2, "num_stages": 1}  # fmt: skip
    sums_kernel[grid](
        *members, *vectors, sums, T, G, d, C, plan.window, plan.ring, t0 // plan.CH, *strides,
        BS=min(64, plan.CH), **shared,
    )  # fmt: skip
    scan_sums_kernel[(X, triton.cdiv(width, 64))](sums, base, keys.carry, here, width, FIRST=t0 == 0, ROWS=64, COLS=64)
    notes_kernel[grid](
        *members, *vectors, keys.before, keys.count_base, base, table,
        T, G, d, C, plan.window, plan.block, plan.ring, chunks, t0 // plan.CH, *strides, BS=plan.BS, **shared,
    )  # fmt: skip


def read_rows(
    rows: Rows, keys: KeyIndex, out: Tensor, weight: Tensor | None, length: Tensor | None, t0: int, plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend: fills out `(B, rows, H, d)`, times weight `(B, rows, H)` if given.

    Returns log-sum-exp `(B, rows, H)` float32 and the far part: its out `(B, rows, H, n, d)` and log-sum-exp
    `(B, rows, H, n)`.
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
    shared = {"INT8": keys.k.dtype == torch.int8, "DTYPE": DTYPES[q.dtype], "CH": plan.CH, "DP": plan.DP, **tuned(plan)}
    _join(rows.ready)
    if n:
        segments = rows.bucket_count.shape[1]
        far_kernel[(segments * C, X)](
            q, keys.k, keys.v, keys.k_scale, keys.v_scale, keys.order, keys.first, keys.before, keys.count_base,
            rows.bucket_count, rows.bucket_rows, far_out, far_lse,
            T, t0, size, G, d, C, plan.ring, plan.block, chunks, segments, scale * LOG2_E, *strides,
            SEG=plan.SEG, R=r, N=n, M=plan.M, BN=plan.BN, **shared,
        )  # fmt: skip
    near_kernel[(triton.cdiv(size, plan.TT), X, triton.cdiv(r, plan.RC))](
        q, keys.k, keys.v, keys.k_scale, keys.v_scale, rows.notes, keys.before, keys.count_base, opened, far_out,
        far_lse, weight, length, out, lse,
        T, t0, size, G, r, d, C, plan.window, plan.block, plan.anchors, plan.ring, chunks, rows.notes.shape[1],
        scale * LOG2_E, *strides, out.stride(0),
        KINDS=plan.kinds, N=n, WEIGH=weight is not None, KEEP=length is not None, TT=plan.TT, RC=plan.RC, M=plan.M,
        BN=plan.BN, NB=plan.NB, NTT=max(1, plan.TT // plan.block), **shared,
    )  # fmt: skip
    return lse, far_out, far_lse


def backward(
    grad: Tensor, out: Tensor, lse: Tensor, rows: Rows, keys: KeyIndex, find: Finder, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of un-rotated q, k, v from that of out, all `(B, T, heads, d)` and contiguous; same bits every time."""
    (B, T, H, d), q, n = grad.shape, rows.q, plan.probes
    X, C, chunks = len(keys.gate), keys.first.shape[1], keys.count_base.shape[1] - 1
    G, r = X // B, H // (X // B)
    base2, kv = scale * LOG2_E, (*keys.k.stride()[:2], *keys.v.stride()[:2])
    wide = plan.DP * q.element_size() > 256
    shared = {"DTYPE": DTYPES[q.dtype], "M": 32 if wide else plan.M, "DP": plan.DP, "num_warps": 8 if wide else 4,
              "num_stages": 1}  # fmt: skip
    step = 64 if plan.DP <= 64 and not torch.version.hip else 32  # 64 spills on AMD
    buckets = {"CH": plan.CH, "SEG": plan.SEG, "R": r, "N": n, "BN": step, **shared}
    keep = {"KEEP": find.length is not None}
    _join(rows.ready)
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(B * T * H, 64),)](out, grad, delta, B * T * H, d, BT=64, DP=plan.DP)
    stats = (q, keys.k, keys.v, grad, lse, delta)
    far_dq, far_kv = q.new_empty(B, T, H, n, d), q.new_zeros(X, T if n else 0, 2 * d)
    if n:
        segments = rows.bucket_count.shape[1]
        far_query_kernel[(segments * C, X)](
            *stats, keys.order, keys.first, keys.before, keys.count_base, rows.bucket_count, rows.bucket_rows, far_dq,
            T, G, d, C, plan.ring, plan.block, chunks, segments, base2, *kv, **buckets,
        )  # fmt: skip
        far_key_kernel[(triton.cdiv(T, step), X)](
            *stats, keys.gate, keys.rank, keys.order, keys.first, keys.before, keys.count_base, rows.bucket_count,
            rows.bucket_rows, far_kv, T, G, d, C, plan.window, plan.ring, plan.block, chunks, segments, base2, scale,
            *kv, **buckets,
        )  # fmt: skip
    dq = torch.empty_like(q)
    near_query_kernel[(triton.cdiv(T, plan.TT), X, triton.cdiv(r, plan.RC))](
        *stats, rows.notes, keys.before, keys.count_base, rows.probes, far_dq, find.length, dq,
        T, G, r, d, C, plan.window, plan.block, plan.anchors, plan.ring, chunks, rows.notes.shape[1], base2, scale, *kv,
        KINDS=plan.kinds, N=n, CH=plan.CH, TT=plan.TT, RC=plan.RC, BN=32, NB=min(32, plan.NB),
        NTT=max(1, plan.TT // plan.block), **keep, **{**shared, "M": plan.M},
    )  # fmt: skip
    del far_dq
    whole, rest = _spread_notes(stats, rows, keys, plan, T, G, r, d, C, chunks, base2, scale, shared)
    spans, AP = triton.cdiv(T, 1024), max(16, triton.next_power_of_2(plan.anchors))
    anchor_grad = q.new_empty(X, spans, AP, 2 * d, dtype=torch.float32)
    sizes = (T, G, r, d, plan.window, plan.block, plan.anchors, base2, scale, *kv)
    if plan.anchors:
        anchor_kernel[(spans, X)](*stats, find.length, anchor_grad, *sizes, SPAN=1024, AP=AP, **keep, **shared)
    dk, dv = (q.new_empty(B, T, G, d) for _ in "kv")
    near_key_kernel[(triton.cdiv(T, step), X)](
        *stats, far_kv, whole, rest, anchor_grad.sum(1), find.length, dk, dv, *sizes,
        FAR=n > 0, KINDS=plan.kinds, ANCHORS=plan.anchors > 0, AP=AP, BN=step, **keep, **shared,
    )  # fmt: skip
    for x in (dq, dk) if find.inv_freq is not None else ():
        rotate_into(x, x, find.positions, find.inv_freq, -1.0)
    return dq, dk, dv


def _spread_notes(stats, rows: Rows, keys: KeyIndex, plan: Plan, T, G, r, d, C, chunks, base2, scale, shared):
    """What members of notes get, `(X, T, 2 d)`: through whole notes, and through those less the ring."""
    q, grad, lse, delta = stats[0], *stats[3:]
    X, ticks, kinds = len(keys.gate), rows.notes.shape[1], plan.kinds
    whole, rest = (q.new_zeros(X, T if kinds > i else 0, 2 * d) for i in (0, 1))
    if kinds:
        table, per, block = torch.empty_like(rows.notes), plan.CH // plan.block, min(32, plan.NB)
        note_grad_kernel[(ticks, X, triton.cdiv(kinds * C, block))](
            q, grad, lse, delta, rows.notes, keys.before, keys.count_base, rows.probes, table,
            T, G, r, d, C, plan.block, plan.ring, chunks, ticks, base2, scale,
            KINDS=kinds, N=plan.probes, CH=plan.CH, NB=block, **shared,
        )  # fmt: skip
        total = table.view(X, ticks // per, per, kinds, C, 2 * d).sum(2, dtype=torch.float32)
        later = torch.zeros_like(total)
        later[:, :-1] = total.flip(1).cumsum(1).flip(1)[:, 1:]
        spread_kernel[(ticks // per, X, kinds * 2 * triton.cdiv(C, plan.GB))](
            keys.gate, keys.rank, keys.first, keys.order, table, later, whole, rest,
            T, d, C, plan.window, plan.block, plan.ring, ticks, ticks // per,
            KINDS=kinds, DTYPE=DTYPES[q.dtype], CH=plan.CH, BS=plan.BS, DP=plan.DP, GB=plan.GB,
        )  # fmt: skip
    return whole, rest


def rotate_into(x: Tensor, y: Tensor, positions: Tensor | None, inv_freq: Tensor, sign: float) -> None:
    """RoPE of x `(B, T, N, d)` written to contiguous y, which may be x; sign -1 turns back."""
    B, T, N, d = x.shape
    stride = _stride(positions)
    rotate_kernel[(triton.cdiv(T, 32), B)](
        x, y, positions, inv_freq, T, N, d, sign, stride, *x.stride()[:2],
        HP=max(16, triton.next_power_of_2(d // 2)), BT=32,
    )  # fmt: skip


# -- what the rest of the package calls ---------------------------------------------------------------------------


def plan_for(budget, per_group: int, d: int, gates: int) -> Plan:
    """The plan for a `Budget`."""
    return make_plan(*_sizes(budget, per_group, d, gates))


def _sizes(budget, per_group: int, d: int, gates: int) -> list[int]:
    return [budget.window, budget.block, budget.anchors, budget.probes, budget.ring, int(budget.notes), per_group, d,
            gates]  # fmt: skip


def attend(
    q: Tensor, k: Tensor, v: Tensor, find: Finder, awake: Tensor | None, budget, scale: float, int8: bool
) -> tuple[Tensor, Tensor]:
    """Un-rotated q `(B, T, H, d)`, k and v `(B, T, G, d)` -> out like q, log-sum-exp `(B, T, H)` float32.

    awake: `(B, T, H)` bool, rows whose gates are worth opening. Differentiable, and whole under `torch.compile`.
    """
    q, k, v = (x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous() for x in (q, k, v))
    sizes = _sizes(budget, q.shape[2] // k.shape[2], q.shape[3], find.prototypes.shape[1])
    return _forward(q, k, v, *find, awake, sizes, scale, int8)


@torch.no_grad()
def explain(q: Tensor, k: Tensor, v: Tensor, find: Finder, awake: Tensor | None, budget) -> Shortlist:
    """The index tables that `attend` reads by, in the form all backends share."""
    (B, T, H, d), G, C = q.shape, k.shape[2], find.prototypes.shape[1]
    plan = plan_for(budget, H // G, d, C)
    with torch.cuda.device_of(q):
        keys = index_keys(k, v, find, plan, False)
        rows = index_rows(q, keys, find, awake, 0, plan)
        _join(rows.ready)
    probes = rows.probes
    ticks = torch.arange(-(-T // plan.block), device=q.device)
    left = keys.count_base[:, ticks * plan.block // plan.CH] + keys.before[:, ticks]
    gate = keys.gate.view(B, G, T).transpose(1, 2).long()
    return Shortlist(
        plan.window, plan.block, plan.anchors, plan.ring, plan.notes, gate, left.view(B, G, -1, C).long(), probes.long()
    )


def rotate(x: Tensor, positions: Tensor | None, inv_freq: Tensor) -> Tensor:
    """RoPE of x `(B, T, N, d)` at positions `(T,)`, `(B, T)` or 0, 1, ..., half-split; differentiable."""
    return _rotate(x, positions, inv_freq, 1.0)


def route(q: Tensor, logits: Tensor, gates, balance: Tensor, budget, temperature: float, prior_max: float):
    """`routing` in one kernel: q `(B, T, H, d)` un-rotated, logits `(B, T, G C)` -> awake int8 and weight float32, both
    `(B, T, H)`. gates: `Gates`; balance `(G, r)`."""
    (B, T, H, d), (G, C) = q.shape, gates.alive.shape
    r = H // G
    awake = torch.empty(B, T, H, dtype=torch.int8, device=q.device)
    weight = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    power = triton.next_power_of_2
    route_kernel[(triton.cdiv(T, TOKENS), B * G)](
        q, logits, gates.prototypes, gates.alive, gates.confidence, gates.log_share, gates.head_of_gate, balance, awake,
        weight, T, G, r, d, C, budget.heads_awake_min, budget.heads_awake_max, float(budget.head_top_p),
        float(budget.flux_alpha), temperature, prior_max, *q.stride()[:2], *logits.stride()[:2],
        HP=max(16, power(d // 2)), CP=max(16, power(C)), RP=max(16, power(r)), BT=TOKENS,
    )  # fmt: skip
    return awake, weight


# -- the public operator ------------------------------------------------------------------------------------------


@torch.library.custom_op("proteus::shortlist", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, prototypes: Tensor, alive: Tensor, positions: Tensor | None,
    inv_freq: Tensor | None, length: Tensor | None, awake: Tensor | None, sizes: list[int], scale: float, int8: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    find, plan = Finder(prototypes, alive, positions, inv_freq, length), make_plan(*sizes)
    with torch.cuda.device_of(q):
        return _attend(q, index_keys(k, v, find, plan, int8), find, awake, plan, scale)


@_forward.register_fake
def _(q, k, v, prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("proteus::shortlist_backward", mutates_args=())
def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, prototypes: Tensor, alive: Tensor,
    positions: Tensor | None, inv_freq: Tensor | None, length: Tensor | None, awake: Tensor | None, sizes: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    find, plan = Finder(prototypes, alive, positions, inv_freq, length), make_plan(*sizes)
    with torch.cuda.device_of(q):
        keys = index_keys(k, v, find, plan, False)  # again, rather than kept: the index is cheap and would be large
        rows = index_rows(q.contiguous(), keys, find, awake, 0, plan)
        return backward(grad.contiguous(), out, lse, rows, keys, find, plan, scale)


@_backward.register_fake
def _(grad, out, lse, q, k, v, *rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx, inputs, output):
    *tensors, sizes, scale, _ = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.sizes, ctx.scale = sizes, scale
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    out, lse, *tensors = ctx.saved_tensors
    found = _backward(grad, out, lse, *tensors, ctx.sizes, ctx.scale)
    return (*found, *[None] * 9)


_forward.register_autograd(_differentiate, setup_context=_save)


def _attend(q, keys: KeyIndex, find: Finder, awake, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """All rows, piece by piece."""
    B, T, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    step = max(plan.SEG, PIECE // B // plan.SEG * plan.SEG)
    for t0 in range(0, T, step):
        cut = slice(t0, t0 + step)
        rows = index_rows(q[:, cut], keys, find, None if awake is None else awake[:, cut].contiguous(), t0, plan)
        lse[:, cut] = read_rows(rows, keys, out[:, cut], None, find.length, t0, plan, scale)[0]
    return out, lse


@torch.library.custom_op("proteus::rotate", mutates_args=())
def _rotate(x: Tensor, positions: Tensor | None, inv_freq: Tensor, sign: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        rotate_into(x if x.stride(-2) == x.shape[-1] else x.contiguous(), y, positions, inv_freq, sign)
    return y


@_rotate.register_fake
def _(x, positions, inv_freq, sign):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save_rotation(ctx, inputs, output):
    _, *tensors, ctx.sign = inputs
    ctx.save_for_backward(*tensors)


_rotate.register_autograd(
    lambda ctx, grad: (_rotate(grad.contiguous(), *ctx.saved_tensors, -ctx.sign), None, None, None),
    setup_context=_save_rotation,
)
