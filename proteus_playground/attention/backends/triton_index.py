"""Triton kernels that build the index: which gate each key falls into, which gates each row opens, and in what order.

Nothing here waits for the host. Keys are counted in chunks of CH tokens, shifted so that a chunk holds exactly the keys
that leave the window during one stretch of clock ticks: key j stands at u = j + window and leaves at tick u // block + 1.
Rows are bucketed by gate inside segments of SEG tokens, so that a bucket reads one short span of its gate's keys.

Axes: `B` batch, `T` tokens, `G` KV groups, `r` rows (heads) per group, `C` gates, `d` head dim, `n` probes. A name in
capitals is known when a kernel is compiled; `CP`, `HP`, `DP` are C, d / 2 and d rounded up to powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def sharp_dot(x, p, acc):
    """acc + x @ p for a float32 p, exact to float32 rounding: p is cut into parts that x's precision can hold."""
    if x.dtype == tl.float32:
        return tl.dot(x, p, acc, input_precision="ieee")
    high = p.to(x.dtype)
    rest = p - high.to(tl.float32)
    middle = rest.to(x.dtype)
    acc = tl.dot(x, middle, acc)
    if x.dtype == tl.bfloat16:
        low = (rest - middle.to(tl.float32)).to(x.dtype)
        acc = tl.dot(x, low, acc)
    return tl.dot(x, high, acc)


@triton.jit
def turn(first, second, position, inv_freq, half, d, HP: tl.constexpr):
    """RoPE on both halves `(rows, HP)` of a tile at `position` (rows,), in float32, back in the tile's precision."""
    angle = position.to(tl.float32)[:, None] * tl.load(inv_freq + half, mask=half < d // 2, other=0.0)[None, :]
    cos, sin = tl.cos(angle), tl.sin(angle)
    a, b = first.to(tl.float32), second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def store_int8(x, y, at, scale_at, fits, rows):
    """Store the row whose halves are x and y (rows, HP) as int8 and its scale, max |value| / 127."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1))
    scale = tl.maximum(top / 127.0, 1e-30)
    tl.store(scale_at, scale, mask=rows)
    tl.store(at[0], tl.floor(x / scale[:, None] + 0.5).to(tl.int8), mask=fits)
    tl.store(at[1], tl.floor(y / scale[:, None] + 0.5).to(tl.int8), mask=fits)


@triton.jit
def gates_kernel(
    k, v, prototypes, alive, position, inv_freq, length, gate, k_out, v_out, k_scale, v_scale,
    T, G, d, C, anchors, k_batch, k_token, v_batch, v_token, position_batch,
    ROPE: tl.constexpr, INT8: tl.constexpr, KEEP: tl.constexpr, HP: tl.constexpr, CP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Lure keys to gates, `gate` (B, G, T) int32; write them rotated (and values, where INT8 asks for it)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    b, g = tl.program_id(1) // G, tl.program_id(1) % G
    half, c = tl.arange(0, HP), tl.arange(0, CP)
    rows = t < T
    fits = rows[:, None] & (half < d // 2)[None, :]
    k_at = k + b.to(tl.int64) * k_batch + t.to(tl.int64)[:, None] * k_token + g * d + half[None, :]
    first, second = tl.load(k_at, mask=fits, other=0.0), tl.load(k_at + d // 2, mask=fits, other=0.0)
    p_at = prototypes + (g * C + c)[None, :] * d + half[:, None]
    p_fits = (c < C)[None, :] & (half < d // 2)[:, None]
    score = sharp_dot(first, tl.load(p_at, mask=p_fits, other=0.0), tl.zeros((BT, CP), tl.float32))
    score = sharp_dot(second, tl.load(p_at + d // 2, mask=p_fits, other=0.0), score)
    usable = tl.load(alive + g * C + c, mask=c < C, other=0) != 0
    best = tl.argmax(tl.where(usable[None, :], score, -float("inf")), 1)
    end = T
    if KEEP:
        end = tl.load(length + b)
    tl.store(gate + tl.program_id(1).to(tl.int64) * T + t, tl.where((t >= anchors) & (t < end), best, -1), mask=rows)
    if ROPE:
        at = tl.load(position + b.to(tl.int64) * position_batch + t, mask=rows, other=0)
        first, second = turn(first, second, at, inv_freq, half, d, HP)
    line = (b.to(tl.int64) * T + t) * G + g
    out = line[:, None] * d + half[None, :]
    if INT8:
        store_int8(first, second, (k_out + out, k_out + out + d // 2), k_scale + line, fits, rows)
        v_at = v + b.to(tl.int64) * v_batch + t.to(tl.int64)[:, None] * v_token + g * d + half[None, :]
        first, second = tl.load(v_at, mask=fits, other=0.0), tl.load(v_at + d // 2, mask=fits, other=0.0)
        store_int8(first, second, (v_out + out, v_out + out + d // 2), v_scale + line, fits, rows)
    elif ROPE:
        tl.store(k_out + out, first, mask=fits)
        tl.store(k_out + out + d // 2, second, mask=fits)


@triton.jit
def load_rows(x, scale, t, stride, G, column, rows, d, INT8: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `(rows, DP)` of one group's keys or values at tokens t; int8 rows are multiplied by their scale."""
    t = t.to(tl.int64)
    tile = tl.load(x + t[:, None] * stride + column[None, :], mask=rows[:, None] & (column < d)[None, :], other=0)
    if INT8:
        tile = (tile.to(tl.float32) * tl.load(scale + t * G, mask=rows, other=0.0)[:, None]).to(DTYPE)
    return tile


@triton.jit
def gates_block(part, C, GB: tl.constexpr):
    """Which gates the program `part` >= 1 works on, and whether on their values (1) or their keys (0)."""
    blocks = tl.cdiv(C, GB)
    return (part - 1) % blocks * GB + tl.arange(0, GB), (part > blocks).to(tl.int32)


@triton.jit
def sum_keys(
    total, gates, values, gate, k, v, k_scale, v_scale, u, end, T, window, k_token, v_token, G, d,
    INT8: tl.constexpr, DTYPE: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """total (GB, DP) plus the keys (or values) at u that fall into each of `gates`; u < end counts."""
    column = tl.arange(0, DP)
    real = (u >= window) & (u < T + window) & (u < end)
    hot = gates[:, None] == tl.load(gate + u, mask=real, other=-1)[None, :]
    if values > 0:
        x = load_rows(v, v_scale, u - window, v_token, G, column, real, d, INT8, DTYPE)
    else:
        x = load_rows(k, k_scale, u - window, k_token, G, column, real, d, INT8, DTYPE)
    return tl.dot(hot.to(DTYPE), x, total, input_precision="ieee")


@triton.jit
def store_sums(at, x, gates, values, C, d, DP: tl.constexpr):
    """Write x (GB, DP) into a table (C, 2 d) at its gates, in the keys' or the values' half."""
    column = tl.arange(0, DP)
    tl.store(at + gates[:, None] * (2 * d) + values * d + column[None, :], x,
             mask=(gates < C)[:, None] & (column < d)[None, :])  # fmt: skip


@triton.jit
def rank_chunk(
    gate, rank, before, count, u, T, window, C, tick0, block, CH: tl.constexpr, BS: tl.constexpr, CP: tl.constexpr
):
    """Ranks of a chunk's keys in their gates, counts at its ticks and at its end."""
    c = tl.arange(0, CP)
    earlier = (tl.arange(0, BS)[:, None] > tl.arange(0, BS)[None, :]).to(tl.float16)
    running = tl.zeros((CP,), tl.int32)
    for _ in range(CH // BS):
        real = (u >= window) & (u < T + window)
        hot = tl.load(gate + u, mask=real, other=-1)[:, None] == c[None, :]
        so_far = running[None, :] + tl.dot(earlier, hot.to(tl.float16)).to(tl.int32)
        tl.store(rank + u, tl.sum(tl.where(hot, so_far, 0), 1), mask=real)
        starts = (u % block == 0)[:, None] & (c < C)[None, :]
        tl.store(before + (tick0 + u // block)[:, None] * C + c[None, :], so_far, mask=starts)
        running += tl.sum(hot.to(tl.int32), 0)
        u += BS
    tl.store(count + c, running, mask=c < C)


@triton.jit
def chunks_kernel(
    gate, k, v, k_scale, v_scale, rank, before, count, sums,
    T, G, d, C, window, block, k_batch, k_token, v_batch, v_token,
    NOTES: tl.constexpr, INT8: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, BS: tl.constexpr,
    DP: tl.constexpr, CP: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """Per chunk: rank of each key in its gate, counts at every tick, how many keys a gate takes and their sum.

    rank (B G, T); before (B G, ticks, C), keys of the chunk that left before a tick; count (B G, chunks, C); sums
    (B G, chunks, C, 2 d) float32. Axis 2 of the grid: ranks and counts, then blocks of gates of keys, then of values.
    """
    chunk, bg, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    u = chunk * CH + tl.arange(0, BS)
    gate += bg.to(tl.int64) * T - window
    line = bg.to(tl.int64) * tl.num_programs(0) + chunk
    if part == 0:
        rank_chunk(gate, rank + bg.to(tl.int64) * T - window, before, count + line * C, u, T, window, C,
                   bg.to(tl.int64) * (tl.num_programs(0) * (CH // block)), block, CH, BS, CP)  # fmt: skip
    elif NOTES:
        b, g = (bg // G).to(tl.int64), bg % G
        gates, values = gates_block(part, C, GB)
        total = tl.zeros((GB, DP), tl.float32)
        for _ in range(CH // BS):
            total = sum_keys(
                total, gates, values, gate, k + b * k_batch + g * d, v + b * v_batch + g * d, k_scale + b * T * G + g,
                v_scale + b * T * G + g, u, T + window, T, window, k_token, v_token, G, d, INT8, DTYPE, DP,
            )  # fmt: skip
            u += BS
        store_sums(sums + line * C * (2 * d), total, gates, values, C, d, DP)


@triton.jit
def scan(x, base, rows, width, column, zero, ROWS: tl.constexpr):
    """Running totals of x (rows, width) down its rows, exclusive, one row longer: into `base`; returns the last."""
    row = tl.arange(0, ROWS)
    held = zero
    tl.store(base + column, held, mask=column < width)
    for at in range(0, rows, ROWS):
        here = (at + row < rows)[:, None] & (column < width)[None, :]
        place = (at + row).to(tl.int64)[:, None] * width + column[None, :]
        fresh = tl.load(x + place, mask=here, other=0)
        tl.store(base + width + place, held[None, :] + tl.cumsum(fresh, 0), mask=here)
        held += tl.sum(fresh, 0)
    return held


@triton.jit
def scan_kernel(
    count, sums, count_base, sums_base, first, chunks, C, width,
    CP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Exclusive running totals over chunks, and `first` (B G, C): where a gate's keys begin in (gate, position) order.
    Axis 1 of the grid: counts, then blocks of columns of the sums."""
    bg, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part == 0:
        c = tl.arange(0, CP)
        total = scan(count + bg * chunks * C, count_base + bg * (chunks + 1) * C, chunks, C, c,
                     tl.zeros((CP,), tl.int32), ROWS)  # fmt: skip
        tl.store(first + bg * C + c, tl.cumsum(total, 0) - total, mask=c < C)
    else:
        column = (part - 1) * COLS + tl.arange(0, COLS)
        size = C * width
        scan(sums + bg * chunks * size, sums_base + bg * (chunks + 1) * size, chunks, size, column,
             tl.zeros((COLS,), tl.float32), ROWS)  # fmt: skip


@triton.jit
def notes_kernel(
    gate, rank, k, v, k_scale, v_scale, before, count_base, sums_base, first, order, notes,
    T, G, d, C, window, block, chunks, chunk0, k_batch, k_token, v_batch, v_token,
    NOTES: tl.constexpr, INT8: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, BS: tl.constexpr,
    DP: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """Put keys in (gate, position) order, `order` (B G, T), and write each gate's mean at each tick, `notes`
    (B G, ticks, C, 2 d): the mean of every key that has left. Axis 2 of the grid as in `chunks_kernel`."""
    chunk, bg, part = chunk0 + tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    gate += bg * T - window
    base = (bg * (chunks + 1) + chunk) * C
    if part == 0:
        for at in range(0, CH, BS):
            u = chunk * CH + at + tl.arange(0, BS)
            real = (u >= window) & (u < T + window)
            home = tl.load(gate + u, mask=real, other=-1)
            real = real & (home >= 0)
            place = tl.load(first + bg * C + home, mask=real, other=0)
            place += tl.load(count_base + base + home, mask=real, other=0)
            place += tl.load(rank + bg * T + u - window, mask=real, other=0)
            tl.store(order + bg * T + place, u - window, mask=real)
    elif NOTES:
        b, g = bg // G, bg % G
        gates, values = gates_block(part, C, GB)
        column = tl.arange(0, DP)
        total = tl.load(sums_base + (base + gates)[:, None] * (2 * d) + values * d + column[None, :],
                        mask=(gates < C)[:, None] & (column < d)[None, :], other=0.0)  # fmt: skip
        held = tl.load(count_base + base + gates, mask=gates < C, other=0)
        ticks = CH // block
        for tick in range(ticks):
            fresh = tl.load(before + ((bg * chunks + chunk) * ticks + tick) * C + gates, mask=gates < C, other=0)
            mean = total / tl.maximum(held + fresh, 1).to(tl.float32)[:, None]
            line = (bg * tl.num_programs(0) + tl.program_id(0)) * ticks + tick
            store_sums(notes + line * C * (2 * d), mean.to(DTYPE), gates, values, C, d, DP)
            begin = chunk * CH + tick * block
            for at in range(0, block, BS):
                total = sum_keys(
                    total, gates, values, gate, k + b * k_batch + g * d, v + b * v_batch + g * d,
                    k_scale + b * T * G + g, v_scale + b * T * G + g, begin + at + tl.arange(0, BS), begin + block, T,
                    window, k_token, v_token, G, d, INT8, DTYPE, DP,
                )  # fmt: skip


@triton.jit
def probe_kernel(
    q, q_out, prototypes, alive, position, inv_freq, awake, before, count_base, probes, rank, hist,
    T, t0, rows_end, G, r, d, C, n, block, chunks, q_batch, q_token, position_batch,
    ROPE: tl.constexpr, AWAKE: tl.constexpr, PROBE: tl.constexpr, CH: tl.constexpr, HP: tl.constexpr,
    CP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Open the n gates with the largest q.p among those that hold a key, and write queries rotated.

    For rows t0 <= t < rows_end: q and q_out (B, rows, G r, d); probes (B, rows, G r, n), -1 for none; rank, same shape,
    the row's place among those of this tile that open the same gate; hist (B G, tiles, C), how many do.
    """
    at = tl.program_id(0) * BT + tl.arange(0, BT)
    t = t0 + at
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    rows = t < rows_end
    half, c = tl.arange(0, HP), tl.arange(0, CP)
    fits = rows[:, None] & (half < d // 2)[None, :]
    size = rows_end - t0
    where = tl.zeros((BT,), tl.int32)
    if ROPE:
        where = tl.load(position + b * position_batch + t, mask=rows, other=0).to(tl.int32)
    if PROBE:
        p_at = prototypes + (g * C + c)[None, :] * d + half[:, None]
        p_fits = (c < C)[None, :] & (half < d // 2)[:, None]
        p1, p2 = tl.load(p_at, mask=p_fits, other=0.0), tl.load(p_at + d // 2, mask=p_fits, other=0.0)
        held = (bg * (chunks + 1) + t // CH)[:, None] * C + c[None, :]
        fresh = (bg * chunks * (CH // block) + t // block)[:, None] * C + c[None, :]
        here = rows[:, None] & (c < C)[None, :]
        left = tl.load(count_base + held, mask=here, other=0) + tl.load(before + fresh, mask=here, other=0)
        usable = (left > 0) & (tl.load(alive + g * C + c, mask=c < C, other=0) != 0)[None, :]
        earlier = (tl.arange(0, BT)[:, None] > tl.arange(0, BT)[None, :]).to(tl.float16)
        running = tl.zeros((CP,), tl.int32)
    for h in range(r):
        q_at = q + b * q_batch + at.to(tl.int64)[:, None] * q_token + (g * r + h) * d + half[None, :]
        first, second = tl.load(q_at, mask=fits, other=0.0), tl.load(q_at + d // 2, mask=fits, other=0.0)
        line = (b * size + at) * (G * r) + g * r + h
        if PROBE:
            score = sharp_dot(first, p1, tl.zeros((BT, CP), tl.float32))
            score = tl.where(usable, sharp_dot(second, p2, score), -float("inf"))
            if AWAKE:
                up = tl.load(awake + line, mask=rows, other=0) != 0
                score = tl.where(up[:, None], score, -float("inf"))
            for i in range(n):
                best = tl.argmax(score, 1)
                opened = tl.max(score, 1) > -float("inf")
                hot = (best[:, None] == c[None, :]) & opened[:, None]
                so_far = running[None, :] + tl.dot(earlier, hot.to(tl.float16)).to(tl.int32)
                tl.store(probes + line * n + i, tl.where(opened, best, -1), mask=rows)
                tl.store(rank + line * n + i, tl.sum(tl.where(hot, so_far, 0), 1), mask=rows)
                running += tl.sum(hot.to(tl.int32), 0)
                score = tl.where(hot, -float("inf"), score)
        if ROPE:
            first, second = turn(first, second, where, inv_freq, half, d, HP)
            out = q_out + line[:, None] * d + half[None, :]
            tl.store(out, first, mask=fits)
            tl.store(out + d // 2, second, mask=fits)
    if PROBE:
        tl.store(hist + (bg * tl.num_programs(0) + tl.program_id(0)) * C + c, running, mask=c < C)


@triton.jit
def bucket_kernel(
    probes, rank, hist, bucket_start, bucket_count, bucket_rows, rows, G, r, C, n, segments,
    TILES: tl.constexpr, TP: tl.constexpr, CP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Sort row ids (token x r + head) x n + probe, counted from the segment's first row, into buckets (segment, gate).

    bucket_start, bucket_count (B G, segments, C); bucket_rows (B G, segments x SEG x r x n) int32. TILES tiles of BT
    tokens make a segment.
    """
    tile, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    segment, inside = tile // TILES, tile % TILES
    c, s = tl.arange(0, CP), tl.arange(0, TP)
    here = (s < TILES) & (segment * TILES + s < tl.num_programs(0))
    counts = tl.load(hist + (bg * tl.num_programs(0) + segment * TILES + s)[:, None] * C + c[None, :],
                     mask=here[:, None] & (c < C)[None, :], other=0)  # fmt: skip
    total = tl.sum(counts, 0)
    start = tl.cumsum(total, 0) - total
    if inside == 0:
        tl.store(bucket_start + (bg * segments + segment) * C + c, start, mask=c < C)
        tl.store(bucket_count + (bg * segments + segment) * C + c, total, mask=c < C)
    start += tl.sum(tl.where((s < inside)[:, None], counts, 0), 0)
    at = tile * BT + tl.arange(0, BT)
    bucket_rows += (bg * segments + segment) * (TILES * BT * r * n)
    for h in range(r):
        line = (b * rows + at) * (G * r) + g * r + h
        for i in range(n):
            home = tl.load(probes + line * n + i, mask=at < rows, other=-1)
            place = tl.sum(tl.where(home[:, None] == c[None, :], start[None, :], 0), 1)
            place += tl.load(rank + line * n + i, mask=home >= 0, other=0)
            tl.store(bucket_rows + place, ((inside * BT + tl.arange(0, BT)) * r + h) * n + i, mask=home >= 0)
