"""Triton kernels that build the index: the gate of each key, the gates that each row opens, and both sorted by gate.

Nothing here waits for the host. Keys are counted in chunks of CH tokens, shifted so that a chunk holds exactly the keys
that leave the window during one run of ticks: key j has index u = j + window, and leaves at tick u // block + 1. Rows
are bucketed by gate inside segments of SEG tokens, so that a bucket reads one short span of its gate's keys.

Axes: `B` batch, `T` tokens, `G` KV groups, `r` rows (heads) per group, `C` gates, `d` head dim, `n` probes. A name in
capitals is known when a kernel is compiled; `CP`, `HP`, `DP` are C, d / 2 and d rounded up to powers of two. The fields
of `plan.Plan` say what each size is.
"""

import triton
import triton.language as tl

from .vectors import angles, positions_of, sharp_dot, store_int8, turn


@triton.jit
def gates_kernel(
    k, v, prototypes, alive, position, inv_freq, length, gate, k_out, v_out, k_scale, v_scale,
    T, t0, tokens, G, d, C, anchors, k_batch, k_token, v_batch, v_token, position_batch,
    ROPE: tl.constexpr, COPY: tl.constexpr, INT8: tl.constexpr, KEEP: tl.constexpr, HP: tl.constexpr,
    CP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Find the gates of the keys of tokens t0, t0 + 1, ..., `gate` (B, G, T) int32.

    COPY: also write the keys, rotated, and their values to k_out and v_out (B, T, G, d).
    """
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    t = t0 + row
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    half, c = tl.arange(0, HP), tl.arange(0, CP)
    rows = row < tokens
    fits = rows[:, None] & (half < d // 2)[None, :]
    k_at = k + b.to(tl.int64) * k_batch + row.to(tl.int64)[:, None] * k_token + g * d + half[None, :]
    first, second = tl.load(k_at, mask=fits, other=0.0), tl.load(k_at + d // 2, mask=fits, other=0.0)
    p_at = prototypes + (g * C + c)[None, :] * d + half[:, None]
    p_fits = (c < C)[None, :] & (half < d // 2)[:, None]
    score = sharp_dot(first, tl.load(p_at, mask=p_fits, other=0.0), tl.zeros((BT, CP), tl.float32))
    score = sharp_dot(second, tl.load(p_at + d // 2, mask=p_fits, other=0.0), score)
    usable = tl.load(alive + g * C + c, mask=c < C, other=0) != 0
    best = tl.argmax(tl.where(usable[None, :], score, -float("inf")), 1)
    best = tl.minimum(best, C - 1)  # a key that is NaN matches anything
    end = T
    if KEEP:
        end = tl.load(length + b)
    tl.store(gate + tl.program_id(1).to(tl.int64) * T + t, tl.where((t >= anchors) & (t < end), best, -1), mask=rows)
    if ROPE:
        cos, sin = angles(positions_of(position, b.to(tl.int64) * position_batch, t, rows), inv_freq, half, d)
        first, second = turn(first, second, cos, sin)
    line = (b.to(tl.int64) * T + t) * G + g
    out = line[:, None] * d + half[None, :]
    if COPY:
        v_at = v + b.to(tl.int64) * v_batch + row.to(tl.int64)[:, None] * v_token + g * d + half[None, :]
        v1, v2 = tl.load(v_at, mask=fits, other=0.0), tl.load(v_at + d // 2, mask=fits, other=0.0)
        if INT8:
            store_int8(first, second, (k_out + out, k_out + out + d // 2), k_scale + line, fits, rows)
            store_int8(v1, v2, (v_out + out, v_out + out + d // 2), v_scale + line, fits, rows)
        else:
            tl.store(k_out + out, first, mask=fits)
            tl.store(k_out + out + d // 2, second, mask=fits)
            tl.store(v_out + out, v1, mask=fits)
            tl.store(v_out + out + d // 2, v2, mask=fits)


@triton.jit
def rank_kernel(gate, rank, before, count, T, C, window, block, CH: tl.constexpr, BS: tl.constexpr, CP: tl.constexpr):
    """Per chunk: the rank of each key in its gate, the counts at every tick, and the keys of each gate.

    rank (B G, T); before (B G, ticks, C), keys of the chunk that left the window before a tick; count (B G, chunks, C).
    """
    chunk, chunks, bg = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    c, u = tl.arange(0, CP), chunk * CH + tl.arange(0, BS)
    earlier = (tl.arange(0, BS)[:, None] > tl.arange(0, BS)[None, :]).to(tl.float16)
    running = tl.zeros((CP,), tl.int32)
    before += bg * chunks * (CH // block) * C
    for _ in range(CH // BS):
        real = (u >= window) & (u < T + window)
        hot = tl.load(gate + bg * T + u - window, mask=real, other=-1)[:, None] == c[None, :]
        so_far = running[None, :] + tl.dot(earlier, hot.to(tl.float16)).to(tl.int32)
        tl.store(rank + bg * T + u - window, tl.sum(tl.where(hot, so_far, 0), 1), mask=real)
        starts = (u % block == 0)[:, None] & (c < C)[None, :]
        tl.store(before + (u // block)[:, None] * C + c[None, :], so_far, mask=starts)
        running += tl.sum(hot.to(tl.int32), 0)
        u += BS
    tl.store(count + (bg * chunks + chunk) * C + c, running, mask=c < C)


@triton.jit
def scan(x, base, rows, width, column, held, ROWS: tl.constexpr):
    """Exclusive running totals of x (rows, width) over its rows, from `held` on: rows + 1 of them, written to `base`.

    Returns the last.
    """
    row = tl.arange(0, ROWS)
    tl.store(base + column, held, mask=column < width)
    for at in range(0, rows, ROWS):
        here = (at + row < rows)[:, None] & (column < width)[None, :]
        place = (at + row).to(tl.int64)[:, None] * width + column[None, :]
        fresh = tl.load(x + place, mask=here, other=0)
        tl.store(base + width + place, held[None, :] + tl.cumsum(fresh, 0), mask=here)
        held += tl.sum(fresh, 0)
    return held


@triton.jit
def scan_counts_kernel(count, base, first, chunks, C, CP: tl.constexpr, ROWS: tl.constexpr):
    """Running totals over chunks, and `first` (B G, C): where the keys of each gate begin in (gate, position) order."""
    bg, c = tl.program_id(0).to(tl.int64), tl.arange(0, CP)
    total = scan(count + bg * chunks * C, base + bg * (chunks + 1) * C, chunks, C, c, tl.zeros((CP,), tl.int32), ROWS)
    tl.store(first + bg * C + c, tl.cumsum(total, 0) - total, mask=c < C)


@triton.jit
def order_kernel(gate, rank, count_base, first, order, T, C, window, chunks, CH: tl.constexpr, BT: tl.constexpr):
    """Write the keys in (gate, position) order: `order` (B G, T). Afterwards `rank` counts all keys of the gate."""
    j, bg = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1).to(tl.int64)
    home = tl.load(gate + bg * T + j, mask=j < T, other=-1)
    real = home >= 0
    place = tl.load(count_base + (bg * (chunks + 1) + (j + window) // CH) * C + home, mask=real, other=0)
    place += tl.load(rank + bg * T + j, mask=real, other=0)
    tl.store(rank + bg * T + j, place, mask=real)
    tl.store(order + bg * T + tl.load(first + bg * C + home, mask=real, other=0) + place, j, mask=real)


@triton.jit
def probe_kernel(
    q, q_out, prototypes, alive, position, inv_freq, awake, before, count_base, probes, scores,
    T, t0, rows_end, G, r, d, C, n, block, chunks, q_batch, q_token, position_batch,
    ROPE: tl.constexpr, AWAKE: tl.constexpr, PROBE: tl.constexpr, SCORE: tl.constexpr, CH: tl.constexpr,
    HP: tl.constexpr, CP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Open the n gates with the largest q.p among those that hold a key, and write the queries rotated.

    For rows t0 <= t < rows_end: q and q_out (B, rows, G r, d); probes (B, rows, G r, n), -1 for none. SCORE: open none,
    but write q.p to scores (B, rows, G r, C) float32, -inf for gates that hold no key, CP gates to a program.
    """
    at = tl.program_id(0) * BT + tl.arange(0, BT)
    t = t0 + at
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    rows = t < rows_end
    half, c = tl.arange(0, HP), tl.program_id(2) * CP + tl.arange(0, CP)
    fits = rows[:, None] & (half < d // 2)[None, :]
    size = rows_end - t0
    if ROPE:
        cos, sin = angles(positions_of(position, b * position_batch, t, rows), inv_freq, half, d)
    if PROBE:
        p_at = prototypes + (g * C + c)[None, :] * d + half[:, None]
        p_fits = (c < C)[None, :] & (half < d // 2)[:, None]
        p1, p2 = tl.load(p_at, mask=p_fits, other=0.0), tl.load(p_at + d // 2, mask=p_fits, other=0.0)
        held = (bg * (chunks + 1) + t // CH)[:, None] * C + c[None, :]
        fresh = (bg * chunks * (CH // block) + t // block)[:, None] * C + c[None, :]
        here = rows[:, None] & (c < C)[None, :]
        retired = tl.load(count_base + held, mask=here, other=0) + tl.load(before + fresh, mask=here, other=0)
        usable = (retired > 0) & (tl.load(alive + g * C + c, mask=c < C, other=0) != 0)[None, :]
    for h in range(r):
        q_at = q + b * q_batch + at.to(tl.int64)[:, None] * q_token + (g * r + h) * d + half[None, :]
        first, second = tl.load(q_at, mask=fits, other=0.0), tl.load(q_at + d // 2, mask=fits, other=0.0)
        line = (b * size + at) * (G * r) + g * r + h
        if PROBE:
            score = sharp_dot(first, p1, tl.zeros((BT, CP), tl.float32))
            score = tl.where(usable, sharp_dot(second, p2, score), -float("inf"))
            if AWAKE:
                is_awake = tl.load(awake + line, mask=rows, other=0) != 0
                score = tl.where(is_awake[:, None], score, -float("inf"))
            if SCORE:
                tl.store(scores + line[:, None] * C + c[None, :], score, mask=here)
            for i in range(0 if SCORE else n):
                most, best = tl.max(score, 1, return_indices=True)
                opened = most > -float("inf")
                tl.store(probes + line * n + i, tl.where(opened, best, -1), mask=rows)
                score = tl.where(best[:, None] == c[None, :], -float("inf"), score)
        if ROPE:
            first, second = turn(first, second, cos, sin)
            out = q_out + line[:, None] * d + half[None, :]
            if tl.program_id(2) == 0:
                tl.store(out, first, mask=fits)
                tl.store(out + d // 2, second, mask=fits)


@triton.jit
def bucket_kernel(
    probes, bucket_count, bucket_rows, rows, G, C, segments,
    SEG: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """List the (row, probe) pairs of a segment that open a gate, for four gates at a time.

    A pair has the number (token x R + head) x N + probe, tokens counted from the segment's first row. bucket_count
    (B G, segments, C); bucket_rows (.., SEG x R) int32. One running sum counts all four gates, in 16 bits each.
    """
    quads = tl.cdiv(C, 4)
    segment, quad = tl.program_id(0) // quads, tl.program_id(0) % quads
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    bucket = (bg * segments + segment) * C + quad * 4
    probes += ((b * rows + segment * SEG) * G + g) * (R * N)
    count = tl.zeros((1,), tl.int64)
    for at in range(0, SEG * R * N, BT):
        name = at + tl.arange(0, BT)
        token = name // (R * N)
        here = (name < SEG * R * N) & (segment * SEG + token < rows)
        home = tl.load(probes + token * (G * R * N) + name % (R * N), mask=here, other=-1) - quad * 4
        hit = (home >= 0) & (home < 4)
        shift = tl.where(hit, home, 0).to(tl.int64) * 16
        one = tl.where(hit, tl.full((BT,), 1, tl.int64) << shift, 0)
        place = ((count + tl.cumsum(one, 0)) >> shift) & 0xFFFF
        tl.store(bucket_rows + (bucket + home) * (SEG * R) + place - 1, name, mask=hit)
        count += tl.sum(one, 0)
    four = tl.arange(0, 4)
    tl.store(bucket_count + bucket + four, ((count >> (four * 16).to(tl.int64)) & 0xFFFF).to(tl.int32),
             mask=quad * 4 + four < C)  # fmt: skip
