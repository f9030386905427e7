"""Triton kernel that fills an empty KV bank from the index of a parallel pass over the same keys.

Axes: `B` sequences, `T` tokens, `G` KV groups, `C` gates per group, `d` head dim, `S` slots. Slots and sums as in
`attention.bank.slots`; the index as in `tables.KeyIndex`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import retired_at
from .tables import KeyIndex, batch_stride

KEYS = 16  # that one program copies at a time
SUMMED = 1 << 13  # numbers of keys that one program adds up at a time: a gate may hold a large part of the text


class PassIndex:
    """The index of a pass over k and v `(B, T, G, d)`; `total` `()`, their sum, is finite only if all of them are."""

    def __init__(self, keys: KeyIndex, k: Tensor, v: Tensor):
        self.keys, self.shape = keys, k.shape
        self.total = k.sum(dtype=torch.float32) + v.sum(dtype=torch.float32)


def fill(bank, done: PassIndex, positions: Tensor | None) -> bool:
    """Put all T keys of a pass into an empty bank, as `KVBank.extend` does. positions: `(T,)` or `(B, T)`, or None.

    Keys and values must be finite. False, and nothing is done, where the bank stores them otherwise.
    """
    keys = done.keys
    if keys.k.dtype != bank.rows.dtype or bank.int8 or bank.sums.dtype != torch.float32:
        return False
    (X, T), C, d, plan = keys.gate.shape, keys.first.shape[1], keys.k.shape[3], keys.plan
    G, S, direct = X // bank.batch, bank.token.shape[2], bank.anchors + bank.window
    with torch.cuda.device_of(keys.k):
        fill_kernel[(C + triton.cdiv(direct, KEYS), X)](
            keys.gate, keys.order, keys.first, keys.before, keys.count_base, keys.k, keys.v, positions, bank.rows,
            bank.token, bank.gate, bank.sums, bank.retired, bank.count, bank.seen, bank.next_position,
            T, G, C, d, S, bank.anchors, bank.window, bank.budget.window, plan.block, bank.ring,
            keys.count_base.shape[1] - 1, *keys.k.stride()[:2], *keys.v.stride()[:2], batch_stride(positions),
            NOTES=bank.notes > 0, CH=plan.chunk, DP=plan.padded_dim, N=KEYS, M=max(16, SUMMED // plan.padded_dim),
            num_warps=4,
        )  # fmt: skip
    return True


@triton.jit
def copy_keys(k, v, j, here, slot, gate, rows, token, home, k_token, v_token, d, DP: tl.constexpr):
    """Copy keys and values of tokens j to `slot`; returns them, `(N, DP)` float32, 0 where not `here`.

    gate: of the keys; home: the bank's table of gates. All but j and slot begin where the group's do.
    """
    column = tl.arange(0, DP)
    fits = here[:, None] & (column < d)[None, :]
    j = j.to(tl.int64)
    x = tl.load(k + j[:, None] * k_token + column[None, :], mask=fits, other=0.0)
    y = tl.load(v + j[:, None] * v_token + column[None, :], mask=fits, other=0.0)
    at = rows + slot[:, None] * (2 * d) + column[None, :]
    tl.store(at, x, mask=fits)
    tl.store(at + d, y, mask=fits)
    tl.store(token + slot, j, mask=here)
    tl.store(home + slot, gate, mask=here)
    return x.to(tl.float32), y.to(tl.float32)


@triton.jit
def fill_ring(
    order, left, c, k, v, rows, token, home, whole, rest, first_slot, ring, k_token, v_token, d,
    NOTES: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The newest keys of the `left` that gate c holds go to its ring; sums of all and of the others to `whole`, `rest`.

    order: where the gate's keys begin, oldest first.
    """
    column = tl.arange(0, DP)
    passed = tl.maximum(left - ring, 0)
    k_sum, v_sum = tl.zeros((DP,), tl.float32), tl.zeros((DP,), tl.float32)
    if NOTES:
        k_sums, v_sums = tl.zeros((M, DP), tl.float32), tl.zeros((M, DP), tl.float32)
        for i0 in range(0, passed, M):
            i = i0 + tl.arange(0, M)
            fits = (i < passed)[:, None] & (column < d)[None, :]
            j = tl.load(order + i, mask=i < passed, other=0).to(tl.int64)
            k_sums += tl.load(k + j[:, None] * k_token + column[None, :], mask=fits, other=0.0).to(tl.float32)
            v_sums += tl.load(v + j[:, None] * v_token + column[None, :], mask=fits, other=0.0).to(tl.float32)
        k_sum, v_sum = tl.sum(k_sums, 0), tl.sum(v_sums, 0)
        tl.store(rest + column, k_sum, mask=column < d)
        tl.store(rest + d + column, v_sum, mask=column < d)
    for i0 in range(passed, left, N):
        i = i0 + tl.arange(0, N)
        j = tl.load(order + i, mask=i < left, other=0)
        x, y = copy_keys(k, v, j, i < left, first_slot + i % ring, c, rows, token, home, k_token, v_token, d, DP)
        k_sum, v_sum = k_sum + tl.sum(x, 0), v_sum + tl.sum(y, 0)
    if NOTES:
        tl.store(whole + column, k_sum, mask=column < d)
        tl.store(whole + d + column, v_sum, mask=column < d)


@triton.jit
def fill_kernel(
    gate, order, first, before, count_base, k, v, position, rows, token, home, sums, retired, count, seen,
    next_position, T, G, C, d, S, anchors, slots, window, block, ring, chunks,
    k_batch, k_token, v_batch, v_token, position_batch,
    NOTES: tl.constexpr, CH: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Program c < C fills the ring and the sums of gate c. Each of the others copies N keys of anchors and window.

    slots: of the window, which is `window` and one block. home: the bank's gate of the key in each slot.
    """
    c, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    k, v = k + b * k_batch + g * d, v + b * v_batch + g * d
    rows, token, home, gate = rows + bg * S * 2 * d, token + bg * S, home + bg * S, gate + bg * T
    tick = (T - 1) // block
    if c < C:
        left = retired_at(tick, count_base, before, bg, c, chunks, C, block, True, CH)
        tl.store(retired + bg * C + c, left.to(tl.int64))
        mine = order + bg * T + tl.load(first + bg * C + c)
        whole, rest = sums + (bg * 2 * C + c) * 2 * d, sums + (bg * 2 * C + C + c) * 2 * d
        fill_ring(mine, left, c, k, v, rows, token, home, whole, rest, anchors + slots + c * ring, ring, k_token,
                  v_token, d, NOTES, DP, N, M)  # fmt: skip
        if (c == 0) & (g == 0):
            last = T - 1
            if position is not None:
                last = tl.load(position + b * position_batch + T - 1)
            tl.store(count + b, T)
            tl.store(seen + b, T)
            tl.store(next_position + b, last + 1)
    else:
        i = (c - C) * N + tl.arange(0, N)
        edge = tl.maximum(tick * block - window, 0)  # the first key in the window
        apart = tl.minimum(anchors, edge)  # anchors that have left it
        j = tl.where(i < apart, i, edge + i - apart)
        slot = tl.where(i < apart, i, anchors + j % slots)
        its = tl.load(gate + j, mask=j < T, other=-1)
        copy_keys(k, v, j, j < T, slot, its, rows, token, home, k_token, v_token, d, DP)
