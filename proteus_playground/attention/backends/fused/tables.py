"""The index on the host side: the tables that hold it, and the launches that fill them. Nothing waits for the device.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `X` = B G, `r` = H / G, `d` head dim, `C` gates, `N`
chunks, `n` probes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .choose import bucket_bits_kernel, choose_kernel
from .index import bucket_kernel, gates_kernel, order_kernel, probe_kernel, rank_kernel, scan_counts_kernel
from .notes import notes_kernel, scan_sums_kernel, sums_kernel
from .plan import DTYPES, TILE_TOKENS, Plan, compiler_options, few_registers


class Store(NamedTuple):
    """Keys, values and the gate of each key."""

    k: Tensor  # (B, T, G, d) rotated, int8 or in the queries' precision
    v: Tensor  # (B, T, G, d)
    k_scale: Tensor  # (B, T, G) float32; empty when nothing is int8
    v_scale: Tensor
    gate: Tensor  # (X, T) int32, -1 for anchors, padding and dropped tokens


class KeyIndex(NamedTuple):
    """A store, and the index of its keys over N chunks."""

    k: Tensor
    v: Tensor
    k_scale: Tensor
    v_scale: Tensor
    gate: Tensor
    rank: Tensor  # (X, T) int32, earlier keys of the same gate and chunk; of the same gate once ordered
    before: Tensor  # (X, N chunk / block, C) int32, keys of the chunk that left the window before a tick
    count_base: Tensor  # (X, N + 1, C) int32, keys of a gate in earlier chunks
    carry: Tensor  # (X, kinds C 2 d) float32, sums behind the notes at the end of the last piece of rows
    first: Tensor  # (X, C) int32, where a gate begins in `order`
    order: Tensor  # (X, T) int32, tokens in (gate, position) order; written with the first piece of rows
    plan: Plan  # by which the tables were made


class GateLookup(NamedTuple):
    """What is needed to find the gates of keys and queries, and to rotate them."""

    prototypes: Tensor  # (G, C, d) float32
    alive: Tensor  # (G, C) bool
    positions: Tensor | None  # (T,) or (B, T), in tokens; None for 0, 1, ...
    inv_freq: Tensor | None  # (d / 2,) float32; None for no rotation
    length: Tensor | None  # (B,) how many of the T tokens are real; None for all

    @property
    def position_stride(self) -> int:
        return batch_stride(self.positions)


class Rows(NamedTuple):
    """Index of one piece of rows."""

    q: Tensor  # (B, rows, H, d) rotated
    probes: Tensor  # (B, rows, H, n) int32, -1 for none
    noted: Tensor  # (B, rows, H, C / 32) int32, a bit for each gate whose note a row reads; empty where it reads all
    bucket_count: Tensor  # (X, segments, C) int32, (row, probe) pairs of a segment that open a gate
    bucket_rows: Tensor  # (X, segments, C, segment r) int32, their numbers; a row opens a gate at most once
    notes: Tensor  # (X, ticks, kinds, C, 2 d) mean of a gate's keys that have left the window; of those less the ring
    ready: torch.cuda.Event | None  # when order and notes are written; None where they are written already
    weight: Tensor | None  # (B, rows, H) float32, routing weights of the heads' outputs; None where all are 1


def batch_stride(positions: Tensor | None) -> int:
    """Elements from one sequence's positions to the next: 0 where all share them."""
    return positions.stride(0) if positions is not None and positions.dim() == 2 else 0


def make_store(B: int, T: int, G: int, d: int, dtype: torch.dtype, device, int8: bool) -> Store:
    """Room for the rotated keys and the values of T tokens."""
    k, v = (torch.empty(B, T, G, d, dtype=torch.int8 if int8 else dtype, device=device) for _ in "kv")
    k_scale, v_scale = (torch.empty((B, T, G) if int8 else (0,), dtype=torch.float32, device=device) for _ in "kv")
    return Store(k, v, k_scale, v_scale, torch.empty(B * G, T, dtype=torch.int32, device=device))


def lure_keys(k: Tensor, v: Tensor, store: Store, lookup: GateLookup, plan: Plan, t0: int) -> None:
    """Find the gates of keys t0, t0 + 1, ..., rotate them, and store them and their values.

    k and v `(B, tokens, G, d)` un-rotated, feature stride 1. Where they are the store's own tensors nothing is copied.
    """
    (B, tokens, G, d), T, C = k.shape, store.gate.shape[1], lookup.prototypes.shape[1]
    gates_kernel[(triton.cdiv(tokens, plan.tile_tokens), B * G)](
        k, v, lookup.prototypes, lookup.alive, lookup.positions, lookup.inv_freq, lookup.length, store.gate, store.k,
        store.v, store.k_scale, store.v_scale, T, t0, tokens, G, d, C, plan.anchors, *k.stride()[:2], *v.stride()[:2],
        lookup.position_stride, ROPE=lookup.inv_freq is not None, COPY=store.k is not k,
        INT8=store.k.dtype == torch.int8, KEEP=lookup.length is not None, HP=plan.padded_half, CP=plan.padded_gates,
        BT=plan.tile_tokens,
    )  # fmt: skip


def index_keys(k: Tensor, v: Tensor, lookup: GateLookup, plan: Plan, int8: bool) -> KeyIndex:
    """Lure, rotate and rank the keys of a whole call."""
    B, T, G, d = k.shape
    if int8 or lookup.inv_freq is not None:
        store = make_store(B, T, G, d, k.dtype, k.device, int8)
    else:
        none = k.new_empty(0, dtype=torch.float32)
        store = Store(k, v, none, none, torch.empty(B * G, T, dtype=torch.int32, device=k.device))
    lure_keys(k, v, store, lookup, plan, 0)
    return count_keys(store, lookup.prototypes.shape[1], plan)


def count_keys(store: Store, C: int, plan: Plan) -> KeyIndex:
    """Rank keys whose gates are found."""
    (X, T), d, device = store.gate.shape, store.k.shape[3], store.gate.device
    chunks, ints = triton.cdiv(T + plan.window, plan.chunk), {"dtype": torch.int32, "device": device}
    rank, order, first = torch.empty(X, T, **ints), torch.empty(X, T, **ints), torch.empty(X, C, **ints)
    before = torch.empty(X, chunks * (plan.chunk // plan.block), C, **ints)
    count, count_base = torch.empty(X, chunks, C, **ints), torch.empty(X, chunks + 1, C, **ints)
    rank_kernel[(chunks, X)](
        store.gate, rank, before, count, T, C, plan.window, plan.block, CH=plan.chunk,
        BS=min(plan.tile_tokens, plan.chunk), CP=plan.padded_gates, num_warps=2 if plan.padded_gates <= 64 else 4,
        num_stages=1,
    )  # fmt: skip
    scan_counts_kernel[(X,)](count, count_base, first, chunks, C, CP=plan.padded_gates, ROWS=64)
    carry = torch.empty(X, plan.kinds * C * 2 * d, dtype=torch.float32, device=device)
    return KeyIndex(*store, rank, before, count_base, carry, first, order, plan)


def index_rows(
    q: Tensor, keys: KeyIndex, lookup: GateLookup, awake: Tensor | None, t0: int, plan: Plan,
    weigh: Callable[[], Tensor] | None = None,
) -> Rows:  # fmt: skip
    """Open gates for rows t0, t0 + 1, ... of q `(B, rows, H, d)`, sort the rows into buckets, write the ticks' notes.

    Pieces of rows come in order, each starting at a multiple of the segment. weigh: computes `Rows.weight`; it runs
    with the notes on a stream of its own, because opening gates needs neither.
    """
    B, rows, H, d = q.shape
    X, T = keys.gate.shape
    C, chunks, G, n = keys.first.shape[1], keys.count_base.shape[1] - 1, X // B, plan.probes
    r = H // G
    ints = {"dtype": torch.int32, "device": q.device}
    row_chunks = triton.cdiv(rows, plan.chunk)
    ticks = row_chunks * (plan.chunk // plan.block)
    notes = torch.empty(X, ticks, plan.kinds, C, 2 * d, dtype=q.dtype, device=q.device)

    def beside_the_probes():
        if t0 == 0:
            order_kernel[(triton.cdiv(T, 256), X)](
                keys.gate, keys.rank, keys.count_base, keys.first, keys.order, T, C, plan.window, chunks,
                CH=plan.chunk, BT=256,
            )  # fmt: skip
        if plan.notes:
            _write_notes(notes, keys, plan, t0, row_chunks, G, DTYPES[q.dtype])
        return weigh() if weigh else None

    weight, ready = _on_side_stream(q.device, beside_the_probes)
    tiles, segments = triton.cdiv(rows, TILE_TOKENS), triton.cdiv(rows, plan.segment)
    opened = torch.empty(B, rows, H, n, **ints)
    words = triton.cdiv(C, 32) if plan.chooses else 0
    noted = torch.empty(B, rows, H, words, **ints)
    bits = torch.empty(B, rows, H, words, dtype=torch.int64, device=q.device)
    scores = torch.empty(B, rows, H, C if plan.chooses else 0, dtype=torch.float32, device=q.device)
    rope = lookup.inv_freq is not None
    rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device) if rope else q
    if n or rope or plan.chooses:
        probe_kernel[(tiles, X, triton.cdiv(C, plan.probe_gates))](
            q, rotated, lookup.prototypes, lookup.alive, lookup.positions, lookup.inv_freq, awake, keys.before,
            keys.count_base, opened, scores, T, t0, t0 + rows, G, r, d, C, n, plan.block, chunks, *q.stride()[:2],
            lookup.position_stride,
            ROPE=rope, AWAKE=awake is not None, PROBE=n > 0 or plan.chooses, SCORE=plan.chooses, CH=plan.chunk,
            HP=plan.padded_half, CP=plan.probe_gates, BT=TILE_TOKENS, **(compiler_options(plan) if r > 1 else {}),
        )  # fmt: skip
    if plan.chooses:
        choose_kernel[(rows, X)](
            scores, keys.before, keys.count_base, opened, bits, noted, T, t0, rows, G, r, C, n, plan.notes, plan.ring,
            plan.ring_reads, plan.block, chunks, FILL=plan.fills_rings, SOME=plan.some_notes, CH=plan.chunk,
            NP=triton.next_power_of_2(max(n, 1)), CP=plan.padded_gates, num_warps=1, **few_registers(64),
        )  # fmt: skip
    del scores
    bucket_count = torch.empty(X, segments, C, **ints)
    bucket_rows = torch.empty(X, segments, C, plan.segment * r if n else 0, **ints)
    if n:
        sort = bucket_bits_kernel if plan.chooses else bucket_kernel
        sort[(segments * triton.cdiv(C, 4), X)](
            bits if plan.chooses else opened, bucket_count, bucket_rows, rows, G, C, segments, SEG=plan.segment, R=r,
            N=n, BT=1024, num_warps=4 if r > 1 else 2,
        )  # fmt: skip
    return Rows(rotated, opened, noted, bucket_count, bucket_rows, notes, ready, weight)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _on_side_stream(device: torch.device, work: Callable[[], Any]) -> tuple[Any, torch.cuda.Event | None]:
    """Run `work` on a stream of its own, after what this stream holds: its result, and the event of its end."""
    if device.type != "cuda":
        return work(), None
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        return work(), side.record_event()


def wait_for(ready: torch.cuda.Event | None) -> None:
    """Let this stream, not the host, wait for the side stream."""
    if ready is not None:
        torch.cuda.current_stream().wait_event(ready)


def _write_notes(notes: Tensor, keys: KeyIndex, plan: Plan, t0: int, row_chunks: int, G: int, dtype) -> None:
    """Write the notes of `row_chunks` chunks from token t0 on, and move the carry to their end."""
    X, T, C, d, chunks = *keys.gate.shape, keys.first.shape[1], keys.k.shape[3], keys.count_base.shape[1] - 1
    width = plan.kinds * C * 2 * d
    sums, base = (torch.empty(X, row_chunks + i, width, dtype=torch.float32, device=notes.device) for i in (0, 1))
    grid = (row_chunks, X, plan.kinds * 2 * triton.cdiv(C, plan.tile_gates))
    members, vectors = (keys.gate, keys.rank, keys.first, keys.order), (keys.k, keys.v, keys.k_scale, keys.v_scale)
    strides = (*keys.k.stride()[:2], *keys.v.stride()[:2])
    shared = {"INT8": keys.k.dtype == torch.int8, "DTYPE": dtype, "CH": plan.chunk, "DP": plan.padded_dim,
              "GB": plan.tile_gates, "num_warps": 2, "num_stages": 1}  # fmt: skip
    sums_kernel[grid](
        *members, *vectors, sums, T, G, d, C, plan.window, plan.ring, t0 // plan.chunk, *strides,
        BS=min(64, plan.chunk), **shared,
    )  # fmt: skip
    scan_sums_kernel[(X, triton.cdiv(width, 64))](
        sums, base, keys.carry, row_chunks, width, FIRST=t0 == 0, ROWS=64, COLS=64
    )
    notes_kernel[grid](
        *members, *vectors, keys.before, keys.count_base, base, notes,
        T, G, d, C, plan.window, plan.block, plan.ring, chunks, t0 // plan.chunk, *strides, BS=plan.tick_keys,
        **shared,
    )  # fmt: skip
