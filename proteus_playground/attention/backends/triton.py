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

from .triton_forward import far_kernel, near_kernel
from .triton_index import (
    bucket_kernel,
    gates_kernel,
    notes_kernel,
    order_kernel,
    probe_kernel,
    rank_kernel,
    scan_counts_kernel,
    scan_sums_kernel,
    sums_kernel,
)

PIECE = 1 << 17  # tokens whose rows are handled at a time, without autograd: what they need on the way is freed again
TOKENS = 64  # tokens per tile of the index
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
    NT: int  # ticks per segment, at least 16
    TT: int  # tokens per near tile
    RC: int  # heads per near tile
    NEAR_M: int  # rows per near tile
    NEAR_BN: int  # keys per step of a near tile
    FAR_M: int
    FAR_BN: int
    GB: int  # gates per block
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
    wanted = power(-(-128 * gates // (per_group * max(probes, 1))))  # about 128 rows per (segment, gate)
    segment = max(TOKENS, min(wanted, 64 * block, 2048))
    wide = d > 128
    rows = 64 if wide else 128
    heads = min(per_group, rows)
    tokens = max(1, rows // heads)
    tokens = tokens // block * block if tokens >= block else 1 << (tokens.bit_length() - 1)
    return Plan(
        window, block, anchors, probes, ring, notes,
        CH=min(256, segment),
        SEG=segment,
        NT=max(16, segment // block),
        TT=tokens,
        RC=heads,
        NEAR_M=max(16, power(tokens * heads)),
        NEAR_BN=32 if wide else 64,
        FAR_M=64,
        FAR_BN=32,
        GB=max(16, min(32 if wide else 64, power(gates))),
        BS=max(16, block),
        HP=max(16, power(d // 2)),
        CP=max(16, power(gates)),
        DP=max(16, power(d)),
    )  # fmt: skip


class KeyIndex(NamedTuple):
    """What the keys of a call come to. `X` = B G, `N` chunks."""

    k: Tensor  # (B, T, G, d) rotated, int8 or in the queries' precision
    v: Tensor  # (B, T, G, d)
    k_scale: Tensor  # (B, T, G) float32; any tensor when nothing is int8
    v_scale: Tensor
    gate: Tensor  # (X, T) int32, -1 for anchors, padding and dropped tokens
    rank: Tensor  # (X, T) int32, keys of the same gate that came before
    before: Tensor  # (X, N CH / block, C) int32, keys of the chunk that left before a tick
    count_base: Tensor  # (X, N + 1, C) int32, keys of a gate in earlier chunks
    sums_base: Tensor  # (X, N + 1, kinds, C, 2 d) float32, the sum of their keys and values; then the same less the ring
    first: Tensor  # (X, C) int32, where a gate begins in `order`
    order: Tensor  # (X, T) int32, tokens in (gate, position) order


class Finder(NamedTuple):
    """What finds gates and turns vectors."""

    prototypes: Tensor  # (G, C, d) float32
    alive: Tensor  # (G, C) bool
    positions: Tensor  # (T,) or (B, T), in tokens
    inv_freq: Tensor | None  # (d / 2,) float32; None for no rotation
    length: Tensor | None  # (B,) how many of the T tokens are real; None for all

    @property
    def position_stride(self) -> int:
        return self.positions.stride(0) if self.positions.dim() == 2 else 0


class Rows(NamedTuple):
    """What the rows of a piece come to."""

    q: Tensor  # (B, rows, H, d) rotated
    probes: Tensor  # (B, rows, H, n) int32, -1 for none
    bucket_count: Tensor  # (X, segments, C) int32, (row, probe) pairs of a segment that open a gate
    bucket_rows: Tensor  # (X, segments, C, SEG r) int32, their names; a row opens a gate at most once
    notes: Tensor  # (X, ticks, kinds, C, 2 d) mean of a gate's keys that have left the window; of those less the ring


def supported(device: torch.device | str) -> tuple[bool, str]:
    """Whether the kernels run fast on a device, and one sentence saying why."""
    device = torch.device(device)
    if device.type != "cuda":
        return False, f"Triton needs an NVIDIA or AMD GPU, and this is {device.type}"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        fits = arch.startswith(("gfx11", "gfx12", "gfx90a", "gfx94", "gfx95"))
        return fits, f"{name} ({arch}): {'fused Triton kernels' if fits else 'no matrix units that Triton reaches'}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return False, f"{name} (sm_{major}{minor}): Triton compiles matrix products without tensor cores below sm_80"
    return True, f"{name} (sm_{major}{minor}): fused Triton kernels"


def index_keys(k: Tensor, v: Tensor, find: Finder, plan: Plan, int8: bool) -> KeyIndex:
    """Lure, rotate, rank and sum the keys; k and v `(B, T, G, d)` un-rotated, feature stride 1."""
    B, T, G, d = k.shape
    C, X = find.prototypes.shape[1], B * G
    ints = {"dtype": torch.int32, "device": k.device}
    gate = torch.empty(X, T, **ints)
    k_scale = v_scale = torch.empty((B, T, G) if int8 else (0,), dtype=torch.float32, device=k.device)
    k_out, v_out = k, v
    if int8:
        v_scale = torch.empty_like(k_scale)
        k_out, v_out = (torch.empty(k.shape, dtype=torch.int8, device=k.device) for _ in "kv")
    elif find.inv_freq is not None:
        k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    gates_kernel[(triton.cdiv(T, TOKENS), X)](
        k, v, find.prototypes, find.alive, find.positions, find.inv_freq, find.length, gate, k_out, v_out, k_scale,
        v_scale, T, G, d, C, plan.anchors, *k.stride()[:2], *v.stride()[:2], find.position_stride,
        ROPE=find.inv_freq is not None, INT8=int8, KEEP=find.length is not None, HP=plan.HP, CP=plan.CP, BT=TOKENS,
    )  # fmt: skip
    return count_keys(k_out, v_out, k_scale, v_scale, gate, C, plan, k.dtype)


def count_keys(k, v, k_scale, v_scale, gate: Tensor, C: int, plan: Plan, dtype: torch.dtype) -> KeyIndex:
    """The index of rotated keys, whose gates are known."""
    (B, T, G, d), X, device = k.shape, len(gate), k.device
    chunks = triton.cdiv(T + plan.window, plan.CH)
    ints, floats = {"dtype": torch.int32, "device": device}, {"dtype": torch.float32, "device": device}
    rank, order, first = torch.empty(X, T, **ints), torch.empty(X, T, **ints), torch.empty(X, C, **ints)
    before = torch.empty(X, chunks * (plan.CH // plan.block), C, **ints)
    count, count_base = torch.empty(X, chunks, C, **ints), torch.empty(X, chunks + 1, C, **ints)
    rank_kernel[(chunks, X)](
        gate, rank, before, count, T, C, plan.window, plan.block, CH=plan.CH, BS=min(64, plan.CH), CP=plan.CP
    )
    scan_counts_kernel[(X,)](count, count_base, first, chunks, C, CP=plan.CP, ROWS=16)
    order_kernel[(triton.cdiv(T, 256), X)](
        gate, rank, count_base, first, order, T, C, plan.window, chunks, CH=plan.CH, BT=256
    )
    sums, sums_base = (torch.empty(X, chunks + i, plan.kinds, C, 2 * d, **floats) for i in (0, 1))
    if plan.notes:
        sums_kernel[(chunks, X, plan.kinds * 2 * triton.cdiv(C, plan.GB))](
            gate, rank, first, order, k, v, k_scale, v_scale, sums,
            T, G, d, C, plan.window, plan.ring, *k.stride()[:2], *v.stride()[:2],
            INT8=k.dtype == torch.int8, DTYPE=DTYPES[dtype], CH=plan.CH, BS=min(64, plan.CH), DP=plan.DP, GB=plan.GB,
        )  # fmt: skip
        width = plan.kinds * C * 2 * d
        scan_sums_kernel[(X, triton.cdiv(width, 128))](sums, sums_base, chunks, width, ROWS=16, COLS=128)
    return KeyIndex(k, v, k_scale, v_scale, gate, rank, before, count_base, sums_base, first, order)


def index_rows(q: Tensor, keys: KeyIndex, find: Finder, awake: Tensor | None, t0: int, plan: Plan) -> Rows:
    """Open gates for rows t0, t0 + 1, ... of q `(B, rows, H, d)` and sort them into buckets; write the ticks' notes.

    t0 is a multiple of the segment, and everything before it has been through here.
    """
    B, rows, H, d = q.shape
    X, T = keys.gate.shape
    C, chunks, G, n = keys.first.shape[1], keys.count_base.shape[1] - 1, X // B, plan.probes
    r = H // G
    ints = {"dtype": torch.int32, "device": q.device}
    here = triton.cdiv(rows, plan.CH)
    table = torch.empty(X, here * (plan.CH // plan.block), plan.kinds, C, 2 * d, dtype=q.dtype, device=q.device)
    if plan.notes:
        notes_kernel[(here, X, plan.kinds * 2 * triton.cdiv(C, plan.GB))](
            keys.gate, keys.rank, keys.first, keys.order, keys.k, keys.v, keys.k_scale, keys.v_scale, keys.before,
            keys.count_base, keys.sums_base, table, T, G, d, C, plan.window, plan.block, plan.ring, chunks,
            t0 // plan.CH, *keys.k.stride()[:2], *keys.v.stride()[:2],
            INT8=keys.k.dtype == torch.int8, DTYPE=DTYPES[q.dtype], CH=plan.CH, BS=plan.BS, DP=plan.DP, GB=plan.GB,
        )  # fmt: skip
    tiles, segments = triton.cdiv(rows, TOKENS), triton.cdiv(rows, plan.SEG)
    opened = torch.empty(B, rows, H, n, **ints)
    rope = find.inv_freq is not None
    turned = torch.empty(q.shape, dtype=q.dtype, device=q.device) if rope else q
    if n or rope:
        probe_kernel[(tiles, X)](
            q, turned, find.prototypes, find.alive, find.positions, find.inv_freq, awake, keys.before,
            keys.count_base, opened, T, t0, t0 + rows, G, r, d, C, n, plan.block, chunks, *q.stride()[:2], find.position_stride,
            ROPE=rope, AWAKE=awake is not None, PROBE=n > 0, CH=plan.CH, HP=plan.HP, CP=plan.CP, BT=TOKENS,
        )  # fmt: skip
    size = torch.empty(X, segments, C, **ints)
    names = torch.empty(X, segments, C, plan.SEG * r if n else 0, **ints)
    if n:
        bucket_kernel[(segments * C, X)](
            opened, size, names, rows, G, C, segments, SEG=plan.SEG, R=r, N=n, BT=1024,
        )  # fmt: skip
    return Rows(turned, opened, size, names, table)


def read_rows(
    rows: Rows, keys: KeyIndex, out: Tensor, weight: Tensor | None, length: Tensor | None, t0: int, plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attend: fills out `(B, rows, H, d)`, times weight `(B, rows, H)` if given; returns log-sum-exp `(B, rows, H)` float32
    and the far part: its out `(B, rows, H, n, d)` and log-sum-exp `(B, rows, H, n)`."""
    q, opened = rows.q, rows.probes
    (B, size, H, d), n = q.shape, plan.probes
    X, T = keys.gate.shape
    G, C, chunks = X // B, keys.first.shape[1], keys.count_base.shape[1] - 1
    r = H // G
    far_out = torch.empty(B, size, H, n, d, dtype=q.dtype, device=q.device)
    far_lse = torch.empty(B, size, H, n, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, size, H, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:2], *keys.k.stride()[:2], *keys.v.stride()[:2])
    shared = {"NOTES": plan.notes, "INT8": keys.k.dtype == torch.int8, "DTYPE": DTYPES[q.dtype], "CH": plan.CH,
              "DP": plan.DP}  # fmt: skip
    if n:
        segments = rows.bucket_count.shape[1]
        far_kernel[(segments * C, X)](
            q, keys.k, keys.v, keys.k_scale, keys.v_scale, keys.order, keys.first, keys.before, keys.count_base,
            rows.notes, rows.bucket_count, rows.bucket_rows, far_out, far_lse,
            T, t0, size, G, d, C, plan.ring, plan.block, chunks, segments, rows.notes.shape[1], scale * LOG2_E,
            *strides,
            SEG=plan.SEG, R=r, N=n, M=plan.FAR_M, BN=plan.FAR_BN, NT=plan.NT, **shared,
        )  # fmt: skip
    near_kernel[(triton.cdiv(size, plan.TT), X, triton.cdiv(r, plan.RC))](
        q, keys.k, keys.v, keys.k_scale, keys.v_scale, rows.notes, keys.before, keys.count_base, opened, far_out,
        far_lse, weight, length, out, lse,
        T, t0, size, G, r, d, C, plan.window, plan.block, plan.anchors, chunks, rows.notes.shape[1], scale * LOG2_E,
        *strides, out.stride(0),
        KINDS=plan.kinds, N=n, WEIGH=weight is not None, KEEP=length is not None, TT=plan.TT, RC=plan.RC, M=plan.NEAR_M,
        BN=plan.NEAR_BN, AP=max(16, triton.next_power_of_2(plan.anchors)) if plan.anchors else 0, GB=plan.GB,
        NTT=max(1, plan.TT // plan.block), **shared,
    )  # fmt: skip
    return lse, far_out, far_lse
