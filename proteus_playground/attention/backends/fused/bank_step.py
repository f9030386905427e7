"""Triton kernels of one token of a KV bank: the oldest block leaves the window, the new key goes in, its row comes out.

`retire_kernel` has a program per gate and lets that gate take its keys from the window. `row_kernel` has one per
sequence and KV group: it writes the new key, ranks the gates for each head, and reads window, rings and notes in one
online softmax. Arithmetic is float32. A tile is `(RP, N, HP)`: heads, keys, half of the features.

Axes: `B` sequences, `H` query heads, `G` KV groups, `r` = H / G, `C` gates per group, `d` head dim, `S` slots, `n`
probes, `e` notes. Slots and sums as in `attention.bank.slots`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .choose import NOTHING, best_of_the_rest, best_while_they_fit, sortable
from .plan import LOG2_E, padded
from .vectors import angles, turn

TILE = 8192  # entries of a tile


def step(bank, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, awake: Tensor | None, positions: Tensor) -> Tensor:
    """As `KVBank.step` after its checks: q `(B, 1, H, d)`, k and v `(B, 1, G, d)`, positions `(B, 1)`."""
    (B, _, H, d), (G, C), budget = q.shape, bank.gates.alive.shape, bank.budget
    S, r, n, e = bank.token.shape[2], H // G, budget.probes, budget.notes
    q, k, v, keep, awake, positions = (None if x is None else x.contiguous() for x in (q, k, v, keep, awake, positions))
    out = torch.empty_like(q)
    now = torch.empty(B, 3, dtype=torch.int64, device=q.device)
    lists = torch.empty(B * H, n + e + 1, dtype=torch.int32, device=q.device)
    scores = torch.empty(B * H, C, dtype=torch.float32, device=q.device)
    flags = {"KEEP": keep is not None, "NOTES": 0 if not bank.notes else 1 if e >= C else 2}
    with torch.cuda.device_of(q):
        retire_kernel[(C + 1, B * G)](
            k, v, keep, bank.rows, bank.token, bank.gate, bank.sums, bank.rounding_error, bank.retired, bank.count,
            bank.seen, positions, now, G, d, C, S, bank.anchors, bank.window, budget.block, bank.ring,
            GD=padded(G * d), DP=padded(d), BP=padded(budget.block), num_warps=1, **flags,
        )  # fmt: skip
        RP, HP, CP = triton.next_power_of_2(r), padded(d // 2), padded(C)
        keys = min(64, max(1, TILE // (RP * HP)))
        row_kernel[(B * G,)](
            q, k, v, keep, awake, out, bank.rows, bank.token, bank.gate, bank.sums, bank.retired, bank.gates.prototypes,
            bank.gates.alive, bank.inv_freq, bank.count, bank.seen, bank.next_position, now, lists, scores,
            G, r, d, C, S, bank.anchors, bank.window, budget.block, n, e, bank.ring, budget.ring_reads,
            bank.scale * LOG2_E, AWAKE=awake is not None, TURN=bank.inv_freq is not None, RING=bank.ring > 0,
            FILL=budget.fills_rings, GD=padded(G * d), BP=padded(budget.block), RP=RP, HP=HP, CP=CP, N=keys,
            num_warps=8, **flags,
        )  # fmt: skip
    return out


@triton.jit
def takes_part(k, v, keep, b, G, d, KEEP: tl.constexpr, GD: tl.constexpr):
    """Whether sequence b keeps its token, and whether its key and value are finite."""
    at = tl.arange(0, GD)
    x = tl.load(k + b * G * d + at, mask=at < G * d, other=0.0).to(tl.float32)
    y = tl.load(v + b * G * d + at, mask=at < G * d, other=0.0).to(tl.float32)
    wrong = ((x - x) != 0) | ((y - y) != 0)  # infinity less itself is NaN
    finite = tl.max(wrong.to(tl.int32), 0) == 0
    wanted = tl.load(keep + b) != 0 if KEEP else finite == finite
    return wanted, finite


@triton.jit
def retire_kernel(
    k, v, keep, rows, token, gate, sums, rounding_error, retired, count, seen, position, now,
    G, d, C, S, anchors, window, block, ring,
    KEEP: tl.constexpr, NOTES: tl.constexpr, GD: tl.constexpr, DP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Where a sequence begins a block, gate c takes its keys among the window's oldest block, in their order.

    Program c = C moves anchors to their own slots. `now` (B, 3) gets count, seen and position of before this token.
    """
    c, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = bg // G
    held = tl.load(count + b)
    if (c == 0) & (bg % G == 0):
        tl.store(now + b * 3, held)
        tl.store(now + b * 3 + 1, tl.load(seen + b))
        tl.store(now + b * 3 + 2, tl.load(position + b))
    if held % block == 0:
        wanted, finite = takes_part(k, v, keep, b, G, d, KEEP, GD)
        j = tl.arange(0, BP)
        index = held + j - window
        old = (j < block) & (index >= 0)
        slot = bg * S + anchors + tl.where(old, index, 0) % window
        here = old & (tl.load(token + slot, mask=old, other=-1) >= 0)
        mine = tl.load(gate + slot, mask=here, other=-2) == tl.where(c == C, -1, c)
        arrived = tl.sum((here & mine).to(tl.int32), 0)
        if wanted & finite & (arrived > 0):
            if c == C:
                move_anchors(rows, token, gate, bg * S, held - window, window, anchors, block, d, DP)
            else:
                take_keys(rows, token, gate, sums, rounding_error, retired, bg, c, arrived, held - window, window,
                          anchors, block, ring, C, S, d, NOTES, DP)  # fmt: skip


@triton.jit
def move_anchors(rows, token, gate, base, first, window, anchors, block, d, DP: tl.constexpr):
    """Keys of the window that belong to no gate go to the slots of their index. base: the group's first slot."""
    x = tl.arange(0, DP)
    for j in range(block):
        index = first + j
        slot = base + anchors + tl.maximum(index, 0) % window
        known = tl.load(token + slot)
        if (index >= 0) & (index < anchors) & (known >= 0):
            for half in tl.static_range(2):
                line = tl.load(rows + (slot * 2 + half) * d + x, mask=x < d)
                tl.store(rows + ((base + index) * 2 + half) * d + x, line, mask=x < d)
            tl.store(token + base + index, known)
            tl.store(gate + base + index, -1)


@triton.jit
def take_keys(
    rows, token, gate, sums, rounding_error, retired, bg, c, arrived, first, window, anchors, block, ring, C, S, d,
    NOTES: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gate c's keys go to its ring, displaced ones and those beyond the ring to sum REST, all of them to sum ALL."""
    x, base = tl.arange(0, 2 * DP), bg * S
    kind, feature = x // DP, x % DP
    fits, at = feature < d, kind * d + feature
    before = tl.load(retired + bg * C + c)
    every, rest = tl.zeros((2 * DP,), tl.float32), tl.zeros((2 * DP,), tl.float32)
    nth = 0
    for j in range(block):
        index = first + j
        slot = base + anchors + tl.maximum(index, 0) % window
        known = tl.load(token + slot)
        if (index >= 0) & (known >= 0) & (tl.load(gate + slot) == c):
            line = tl.load(rows + slot * 2 * d + at, mask=fits, other=0.0)
            every += line.to(tl.float32)
            if arrived - nth <= ring:
                place = base + anchors + window + c * ring + (before + nth) % ring
                if tl.load(token + place) >= 0:
                    rest += tl.load(rows + place * 2 * d + at, mask=fits, other=0.0).to(tl.float32)
                tl.store(rows + place * 2 * d + at, line, mask=fits)
                tl.store(token + place, known)
                tl.store(gate + place, c)
            else:
                rest += line.to(tl.float32)
            nth += 1
    tl.store(retired + bg * C + c, before + arrived)
    if NOTES:
        place = (bg * 2 * C + c) * 2 * d + at
        add_to_sum(sums + place, rounding_error + place, every, fits)
        add_to_sum(sums + C * 2 * d + place, rounding_error + C * 2 * d + place, rest, fits)


@triton.jit
def add_to_sum(sums, rounding_error, added, fits):
    """Kahan's compensated sum, as `Slots._add`."""
    old = tl.load(sums, mask=fits, other=0.0)
    added -= tl.load(rounding_error, mask=fits, other=0.0)
    total = old + added
    tl.store(rounding_error, (total - old) - added, mask=fits)
    tl.store(sums, total, mask=fits)


@triton.jit
def halves(at, half, d, fits):
    """Both halves of vectors that begin at `at`, float32."""
    first = tl.load(at + half, mask=fits, other=0.0).to(tl.float32)
    return first, tl.load(at + d // 2 + half, mask=fits, other=0.0).to(tl.float32)


@triton.jit
def score(q1, q2, k1, k2):
    """Products of queries (RP, HP) with keys (RP or 1, N, HP): (RP, N)."""
    return tl.sum(q1[:, None, :] * k1 + q2[:, None, :] * k2, 2)


@triton.jit
def take(value, v1, v2, top, total, a1, a2):
    """One step of the online softmax, base 2: scores (RP, N), values (RP or 1, N, HP)."""
    new = tl.maximum(top, tl.max(value, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    old, p = tl.exp2(top - base), tl.exp2(value - base[:, None])
    a1 = a1 * old[:, None] + tl.sum(p[:, :, None] * v1, 1)
    a2 = a2 * old[:, None] + tl.sum(p[:, :, None] * v2, 1)
    return new, total * old + tl.sum(p, 1), a1, a2


@triton.jit
def write_key(
    k, v, rows, token, gate, bg, home, k1, k2, best, held, seen, window, anchors, block, S, d, half, fits,
    BP: tl.constexpr,
):  # fmt: skip
    """The new key, rotated `(1, HP)`, and its value into the window; where a block begins, the oldest is cleared."""
    base = bg * S + anchors
    j = tl.arange(0, BP)
    index = held + j - window
    cleared = tl.where(held % block == 0, block, 0)
    old = (j > 0) & (j < cleared) & (index >= 0)
    tl.store(token + base + tl.where(old, index, 0) % window, -1, mask=old)
    slot = base + held % window
    kind = rows.dtype.element_ty
    tl.store(rows + slot * 2 * d + half[None, :], k1.to(kind), mask=fits[None, :])
    tl.store(rows + slot * 2 * d + d // 2 + half[None, :], k2.to(kind), mask=fits[None, :])
    v1, v2 = tl.load(v + home + half, mask=fits), tl.load(v + home + d // 2 + half, mask=fits)
    tl.store(rows + (slot * 2 + 1) * d + half, v1.to(kind), mask=fits)
    tl.store(rows + (slot * 2 + 1) * d + d // 2 + half, v2.to(kind), mask=fits)
    tl.store(token + slot, seen)
    tl.store(gate + slot, tl.where(held < anchors, -1, best))


@triton.jit
def list_gates(at, chosen, heads, c, most, CP: tl.constexpr):
    """Write the gates of the mask chosen (RP, CP) one after another at `at` (RP,), then -1 up to `most`."""
    place = tl.cumsum(chosen.to(tl.int32), 1)
    tl.store(at[:, None] + place - 1, tl.broadcast_to(c[None, :], chosen.shape), mask=chosen & heads[:, None])
    rest = (c[None, :] >= tl.max(place, 1)[:, None]) & (c < most)[None, :]
    tl.store(at[:, None] + tl.broadcast_to(c[None, :], chosen.shape), -1, mask=rest & heads[:, None])


@triton.jit
def match_gates(q1, q2, k1, k2, prototypes, alive, retired, scores, heads, half, fits, C, d, N: tl.constexpr):
    """The gate that the key (1, HP) falls into. Writes the products of each head's query with the prototypes of gates
    that hold a key, -inf for others, to `scores` (RP,)."""
    unit = 1 / tl.maximum(tl.sqrt(tl.sum(k1 * k1 + k2 * k2, 1)), 1e-12)[:, None]
    nearest, best = -float("inf"), 0
    for c0 in range(0, C, N):
        some = c0 + tl.arange(0, N)
        live = tl.load(alive + some, mask=some < C, other=0) != 0
        p1, p2 = halves(prototypes + some[:, None] * d, half[None, :], d, (some < C)[:, None] & fits[None, :])
        cosine = tl.where(live, tl.sum((p1 * k1 + p2 * k2) * unit, 1), -float("inf"))
        close = tl.max(cosine, 0)
        best = tl.where(close > nearest, c0 + tl.argmax(cosine, 0), best)
        nearest = tl.maximum(nearest, close)
        filled = live & (tl.load(retired + some, mask=some < C, other=0) > 0)
        product = tl.where(filled[None, :], score(q1, q2, p1[None, :, :], p2[None, :, :]), -float("inf"))
        tl.store(scores[:, None] + some[None, :], product, mask=heads[:, None] & (some < C)[None, :])
    return best


@triton.jit
def choose_gates(
    scores, retired, opened, noted, heads, C, n, e, ring, ring_reads,
    FILL: tl.constexpr, RING: tl.constexpr, NOTES: tl.constexpr, RP: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """List the gates that each head opens at `opened` (RP,), and the next best at `noted`, by `scores` (RP,).

    Where all notes are read (NOTES 1), which gates are open takes the place of the scores.
    """
    c = tl.arange(0, CP)
    here = heads[:, None] & (c < C)[None, :]
    key = sortable(tl.load(scores[:, None] + c[None, :], mask=here, other=-float("inf")))
    cost, most = tl.full((RP, CP), 1 << 16, tl.int32), n << 16
    if FILL:
        cost += tl.minimum(tl.load(retired + c, mask=c < C, other=0), ring).to(tl.int32)[None, :]
        most += ring_reads
    chosen, low, above = best_while_they_fit(key, cost, most, n + e)
    if RING:
        list_gates(opened, chosen, heads, c, n, CP)
    if NOTES == 2:
        others = tl.where(chosen, NOTHING, key)
        read = best_of_the_rest(others, e, low, above - tl.sum(chosen.to(tl.int32), 1))
        list_gates(noted, read, heads, c, e, CP)
    if NOTES == 1:
        tl.store(scores[:, None] + c[None, :], chosen.to(tl.float32), mask=here)


@triton.jit
def read_window(q1, q2, rows, token, slots, d, half, fits, top, total, a1, a2, N: tl.constexpr):
    """Take in the keys of the first `slots` slots of a group. rows and token: where it begins."""
    for s0 in range(0, slots, N):
        slot = s0 + tl.arange(0, N)
        there = tl.load(token + slot, mask=slot < slots, other=-1) >= 0
        at, here = rows + (slot * 2 * d)[:, None], there[:, None] & fits[None, :]
        y1, y2 = halves(at, half[None, :], d, here)
        z1, z2 = halves(at + d, half[None, :], d, here)
        value = tl.where(there[None, :], score(q1, q2, y1[None, :, :], y2[None, :, :]), -float("inf"))
        top, total, a1, a2 = take(value, z1[None, :, :], z2[None, :, :], top, total, a1, a2)
    return top, total, a1, a2


@triton.jit
def read_rings(q1, q2, rows, token, opened, n, ring, d, heads, half, fits, top, total, a1, a2, N: tl.constexpr):
    """Take in the keys in the rings of the gates that each head has opened. rows and token: where the rings begin."""
    for i0 in range(0, n * ring, N):
        i = i0 + tl.arange(0, N)
        where = tl.load(opened[:, None] + (i // ring)[None, :], mask=heads[:, None] & (i < n * ring)[None, :], other=-1)
        slot = where.to(tl.int64) * ring + (i % ring)[None, :]
        there = tl.load(token + slot, mask=where >= 0, other=-1) >= 0
        at, here = rows + (slot * 2 * d)[:, :, None], there[:, :, None] & fits[None, None, :]
        y1, y2 = halves(at, half[None, None, :], d, here)
        value = tl.where(there, score(q1, q2, y1, y2), -float("inf"))
        z1, z2 = halves(at + d, half[None, None, :], d, here)
        top, total, a1, a2 = take(value, z1, z2, top, total, a1, a2)
    return top, total, a1, a2


@triton.jit
def read_notes(
    q1, q2, sums, retired, scores, noted, C, e, ring, d, heads, half, fits, top, total, a1, a2,
    NOTES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Take in the notes of gates listed at `noted` (RP,) or, with NOTES 1, of all: of an open gate that of the keys
    beyond its ring. sums and retired: where the group's begin."""
    for i0 in range(0, C if NOTES == 1 else e, N):
        i = i0 + tl.arange(0, N)
        if NOTES == 1:
            there = heads[:, None] & (i < C)[None, :]
            is_open = tl.load(scores[:, None] + i[None, :], mask=there, other=0.0) > 0
            where = tl.broadcast_to(i[None, :], there.shape)
        else:
            where = tl.load(noted[:, None] + i[None, :], mask=heads[:, None] & (i < e)[None, :], other=-1)
            there = where >= 0
            is_open = where < -1
        size = tl.load(retired + where, mask=there, other=0)
        size = tl.maximum(size - tl.where(is_open, ring, 0), 0)
        there = there & (size > 0)
        size = tl.maximum(size, 1).to(tl.float32)
        place = (is_open.to(tl.int32) * C + where) * 2 * d
        here = there[:, :, None] & fits[None, None, :]
        y1, y2 = halves(sums + place[:, :, None], half[None, None, :], d, here)
        value = tl.where(there, score(q1, q2, y1, y2) / size + tl.log2(size), -float("inf"))
        z1, z2 = halves(sums + place[:, :, None] + d, half[None, None, :], d, here)
        top, total, a1, a2 = take(value, z1 / size[:, :, None], z2 / size[:, :, None], top, total, a1, a2)
    return top, total, a1, a2


@triton.jit
def row_kernel(
    q, k, v, keep, awake, out, rows, token, gate, sums, retired, prototypes, alive, inv_freq, count, seen,
    next_position, now, lists, scores, G, r, d, C, S, anchors, window, block, n, e, ring, ring_reads, scale,
    KEEP: tl.constexpr, NOTES: tl.constexpr, AWAKE: tl.constexpr, TURN: tl.constexpr, RING: tl.constexpr,
    FILL: tl.constexpr, GD: tl.constexpr, BP: tl.constexpr, RP: tl.constexpr, HP: tl.constexpr, CP: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The rows of the heads of one sequence and group. NOTES: 0 reads none, 1 those of all gates, 2 the e next best."""
    bg = tl.program_id(0).to(tl.int64)
    b, g, base = bg // G, bg % G, bg * S
    held, token_now, position = tl.load(now + b * 3), tl.load(now + b * 3 + 1), tl.load(now + b * 3 + 2)
    wanted, finite = takes_part(k, v, keep, b, G, d, KEEP, GD)
    stays = wanted & finite
    half, h = tl.arange(0, HP), tl.arange(0, RP)
    fits, heads = half < d // 2, h < r
    line, both = bg * r + h, heads[:, None] & fits[None, :]
    scores, retired = scores + line * C, retired + bg * C
    opened, noted = lists + line * (n + e + 1), lists + line * (n + e + 1) + n
    q1, q2 = halves(q + (line * d)[:, None], half[None, :], d, both)
    k1, k2 = halves(k + bg * d, half[None, :], d, fits[None, :])  # (1, HP)
    best = match_gates(q1, q2, k1, k2, prototypes + g * C * d, alive + g * C, retired, scores, heads, half, fits, C, d,
                       N)  # fmt: skip
    if TURN:
        cos, sin = angles(tl.full((1,), 0, tl.int64) + position, inv_freq, half, d)
        kind = q.dtype.element_ty
        q1, q2 = turn(q1.to(kind), q2.to(kind), cos, sin)
        k1, k2 = turn(k1.to(kind), k2.to(kind), cos, sin)
        q1, q2 = q1.to(tl.float32), q2.to(tl.float32)
    if stays:
        write_key(k, v, rows, token, gate, bg, bg * d, k1, k2, best, held, token_now, window, anchors, block, S, d,
                  half, fits, BP)  # fmt: skip
    if g == 0:
        tl.store(count + b, held + stays.to(tl.int64))
        tl.store(seen + b, token_now + 1)
        tl.store(next_position + b, position + 1)
    tl.debug_barrier()  # all of the group's scores and the new key are written
    choose_gates(scores, retired, opened, noted, heads, C, n, e, ring, ring_reads, FILL, RING, NOTES, RP, CP)
    tl.debug_barrier()  # so are the lists
    q1, q2 = q1 * scale, q2 * scale
    top, total = tl.full((RP,), -float("inf"), tl.float32), tl.zeros((RP,), tl.float32)
    a1, a2 = tl.zeros((RP, HP), tl.float32), tl.zeros((RP, HP), tl.float32)
    keys, direct = rows + base * 2 * d, anchors + window
    top, total, a1, a2 = read_window(q1, q2, keys, token + base, direct, d, half, fits, top, total, a1, a2, N)
    if RING:
        top, total, a1, a2 = read_rings(q1, q2, keys + direct * 2 * d, token + base + direct, opened, n, ring, d, heads,
                                        half, fits, top, total, a1, a2, N)  # fmt: skip
    if NOTES:
        top, total, a1, a2 = read_notes(q1, q2, sums + bg * C * 4 * d, retired, scores, noted, C, e, ring, d, heads,
                                        half, fits, top, total, a1, a2, NOTES, N)  # fmt: skip
    share = 1 / tl.where(total > 0, total, 1.0)[:, None]
    a1, a2 = tl.where(wanted, a1 * share, 0.0), tl.where(wanted, a2 * share, 0.0)
    wrong = wanted & (finite == 0)
    a1, a2 = tl.where(wrong, float("nan"), a1), tl.where(wrong, float("nan"), a2)
    if AWAKE:
        up = tl.load(awake + line, mask=heads, other=0) != 0
        a1, a2 = tl.where(up[:, None], a1, 0.0), tl.where(up[:, None], a2, 0.0)
    at = out + (line * d)[:, None] + half[None, :]
    tl.store(at, a1.to(out.dtype.element_ty), mask=both)
    tl.store(at + d // 2, a2.to(out.dtype.element_ty), mask=both)
