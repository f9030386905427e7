"""Triton kernels that build the index: which gate each key falls into, which gates each row opens, and in what order.

Nothing here waits for the host. Keys are counted in chunks of CH tokens, shifted so that a chunk holds exactly the keys
that leave the window during one stretch of clock ticks: key j stands at u = j + window and leaves at u // block + 1.
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
def angles(position, inv_freq, half, d):
    """Cosine and sine of position x frequency, `(rows, HP)` float32, to 1e-6 up to angles of a few million.

    The library's functions fall back on local memory for large angles and cost ten times as much.
    """
    angle = position.to(tl.float32)[:, None] * tl.load(inv_freq + half, mask=half < d // 2, other=0.0)[None, :]
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)  # quarter turns; pi / 2 is taken off in parts of few bits
    x = tl.fma(turns, -1.5703125, angle)
    x = tl.fma(turns, -0.0004837512969970703, x)
    x = tl.fma(turns, -7.549789948768648e-08, x)
    y = x * x
    sine = x + x * y * (-0.16666654611 + y * (0.0083321608736 + y * -0.00019515295891))
    cosine = 1 - 0.5 * y + y * y * (0.04166664568298827 + y * (-0.001388731625493765 + y * 2.443315711809948e-05))
    quarter = turns.to(tl.int32)
    swap = (quarter & 1) == 1
    cos, sin = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def positions_of(position, offset, t, rows):
    """Where tokens t stand: as given, or 0, 1, ... when nothing is given."""
    if position is None:  # noqa: SIM108 - a compile-time branch
        where = t
    else:
        where = tl.load(position + offset + t, mask=rows, other=0)
    return where


@triton.jit
def turn(first, second, cos, sin):
    """RoPE on both halves `(rows, HP)` of a tile, in float32, back in the tile's precision."""
    a, b = first.to(tl.float32), second.to(tl.float32)
    return (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)


@triton.jit
def rotate_kernel(
    x, y, position, inv_freq, T, N, d, sign, position_batch, x_batch, x_token, HP: tl.constexpr, BT: tl.constexpr
):
    """RoPE of x (B, T, N, d) into y, contiguous (y may be x): forwards (sign 1) or back (sign -1)."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    b, half = tl.program_id(1).to(tl.int64), tl.arange(0, HP)
    cos, sin = angles(positions_of(position, b * position_batch, t, t < T), inv_freq, half, d)
    fits = (t < T)[:, None] & (half < d // 2)[None, :]
    for h in range(N):
        at = x + b * x_batch + t.to(tl.int64)[:, None] * x_token + h * d + half[None, :]
        first, second = tl.load(at, mask=fits, other=0.0), tl.load(at + d // 2, mask=fits, other=0.0)
        first, second = turn(first, second, cos, sin * sign)
        out = y + ((b * T + t)[:, None] * N + h) * d + half[None, :]
        tl.store(out, first, mask=fits)
        tl.store(out + d // 2, second, mask=fits)


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
    T, t0, tokens, G, d, C, anchors, k_batch, k_token, v_batch, v_token, position_batch,
    ROPE: tl.constexpr, COPY: tl.constexpr, INT8: tl.constexpr, KEEP: tl.constexpr, HP: tl.constexpr,
    CP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Lure the keys of tokens t0, t0 + 1, ... to gates, `gate` (B, G, T) int32; store them rotated, and their values.

    COPY: whether k_out and v_out (B, T, G, d) take them; otherwise k and v stay where they are.
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
def load_scales(scale, t, G, rows, INT8: tl.constexpr):
    """What the rows at tokens t are to be multiplied by, `(1, rows)`, when they are read as they are stored."""
    if INT8:  # noqa: SIM108 - a compile-time branch
        scales = tl.load(scale + t.to(tl.int64) * G, mask=rows, other=0.0)[None, :]
    else:
        scales = 1.0
    return scales


@triton.jit
def load_stored(x, t, stride, column, rows, d, DTYPE: tl.constexpr):
    """Rows `(rows, DP)` at tokens t as they are stored; int8 is exact in every DTYPE."""
    t = t.to(tl.int64)
    tile = tl.load(x + t[:, None] * stride + column[None, :], mask=rows[:, None] & (column < d)[None, :], other=0)
    return tile.to(DTYPE)


@triton.jit
def load_rows(x, scale, t, stride, G, column, rows, d, INT8: tl.constexpr, DTYPE: tl.constexpr):
    """Rows `(rows, DP)` of one group's keys or values at tokens t; int8 rows are multiplied by their scale."""
    t = t.to(tl.int64)
    tile = tl.load(x + t[:, None] * stride + column[None, :], mask=rows[:, None] & (column < d)[None, :], other=0)
    if INT8:
        tile = (tile.to(tl.float32) * tl.load(scale + t * G, mask=rows, other=0.0)[:, None]).to(DTYPE)
    return tile


@triton.jit
def rank_kernel(gate, rank, before, count, T, C, window, block, CH: tl.constexpr, BS: tl.constexpr, CP: tl.constexpr):
    """Per chunk: rank of each key in its gate, counts at every tick, and how many keys a gate takes.

    rank (B G, T); before (B G, ticks, C), keys of the chunk that left before a tick; count (B G, chunks, C).
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
    """Running totals of x (rows, width) down its rows, exclusive, one row longer: into `base`; returns the last."""
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
    """Running totals over chunks, and `first` (B G, C): where a gate's keys begin in (gate, position) order."""
    bg, c = tl.program_id(0).to(tl.int64), tl.arange(0, CP)
    total = scan(count + bg * chunks * C, base + bg * (chunks + 1) * C, chunks, C, c, tl.zeros((CP,), tl.int32), ROWS)
    tl.store(first + bg * C + c, tl.cumsum(total, 0) - total, mask=c < C)


@triton.jit
def scan_sums_kernel(sums, base, carry, chunks, width, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Running totals over chunks of `sums` (B G, chunks, width), from `carry` (B G, width) on
    unless they are the FIRST; the carry takes the last."""
    bg, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    held = tl.zeros((COLS,), tl.float32)
    if not FIRST:
        held = tl.load(carry + bg * width + column, mask=column < width, other=0.0)
    held = scan(sums + bg * chunks * width, base + bg * (chunks + 1) * width, chunks, width, column, held, ROWS)
    tl.store(carry + bg * width + column, held, mask=column < width)


@triton.jit
def order_kernel(gate, rank, count_base, first, order, T, C, window, chunks, CH: tl.constexpr, BT: tl.constexpr):
    """Put keys in (gate, position) order: `order` (B G, T). Rank counts from the gate's first key from here on."""
    j, bg = tl.program_id(0) * BT + tl.arange(0, BT), tl.program_id(1).to(tl.int64)
    home = tl.load(gate + bg * T + j, mask=j < T, other=-1)
    real = home >= 0
    place = tl.load(count_base + (bg * (chunks + 1) + (j + window) // CH) * C + home, mask=real, other=0)
    place += tl.load(rank + bg * T + j, mask=real, other=0)
    tl.store(rank + bg * T + j, place, mask=real)
    tl.store(order + bg * T + tl.load(first + bg * C + home, mask=real, other=0) + place, j, mask=real)


@triton.jit
def note_block(part, C, GB: tl.constexpr):
    """What program `part` sums: which gates, their values (1) or keys (0), what left the ring (1) or the window (0)."""
    blocks = tl.cdiv(C, GB)
    return part % blocks * GB + tl.arange(0, GB), part // blocks % 2, part // (2 * blocks)


@triton.jit
def sum_keys(
    total, gates, ring_too, x, scale, stride, gate, rank, first, order, u, end, T, window, ring, G, d,
    INT8: tl.constexpr, DTYPE: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """total (GB, DP) plus what enters the notes of `gates` while keys at u < end leave the window.

    A full note takes the very keys; the note beside an open ring takes those they push out, `ring` places older.
    """
    real = (u >= window) & (u < T + window) & (u < end)
    home = tl.load(gate + u - window, mask=real, other=-1)
    j = u - window
    if ring_too > 0:
        place = tl.load(rank + j, mask=real, other=0) - ring
        home = tl.where(place >= 0, home, -1)
        j = tl.load(order + tl.load(first + home, mask=home >= 0, other=0) + place, mask=home >= 0, other=0)
    tile = load_rows(x, scale, j, stride, G, tl.arange(0, DP), home >= 0, d, INT8, DTYPE)
    return tl.dot((gates[:, None] == home[None, :]).to(DTYPE), tile, total, input_precision="ieee")


@triton.jit
def sums_kernel(
    gate, rank, first, order, k, v, k_scale, v_scale, sums,
    T, G, d, C, window, ring, chunk0, k_batch, k_token, v_batch, v_token,
    INT8: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, BS: tl.constexpr, DP: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to each note: sums (B G, chunks, kinds, C, 2 d) float32. Axis 2: see `note_block`."""
    chunk, bg = chunk0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    gates, values, ring_too = note_block(tl.program_id(2), C, GB)
    kinds = tl.num_programs(2) // (2 * tl.cdiv(C, GB))
    x, scale, stride = k + b * k_batch + g * d, k_scale + b * T * G + g, k_token
    if values > 0:
        x, scale, stride = v + b * v_batch + g * d, v_scale + b * T * G + g, v_token
    total = tl.zeros((GB, DP), tl.float32)
    for at in range(0, CH, BS):
        total = sum_keys(total, gates, ring_too, x, scale, stride, gate + bg * T, rank + bg * T, first + bg * C,
                         order + bg * T, chunk * CH + at + tl.arange(0, BS), (chunk + 1) * CH, T, window, ring, G, d,
                         INT8, DTYPE, DP)  # fmt: skip
    line = ((bg * tl.num_programs(0) + chunk - chunk0) * kinds + ring_too) * C + gates
    column = tl.arange(0, DP)
    tl.store(sums + line[:, None] * (2 * d) + values * d + column[None, :], total,
             mask=(gates < C)[:, None] & (column < d)[None, :])  # fmt: skip


@triton.jit
def notes_kernel(
    gate, rank, first, order, k, v, k_scale, v_scale, before, count_base, sums_base, notes,
    T, G, d, C, window, block, ring, chunks, chunk0, k_batch, k_token, v_batch, v_token,
    INT8: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, BS: tl.constexpr, DP: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """Means at each tick, `notes` (B G, ticks, kinds, C, 2 d): of all keys that left, and of those less the ring."""
    chunk, bg = chunk0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    gates, values, ring_too = note_block(tl.program_id(2), C, GB)
    kinds = tl.num_programs(2) // (2 * tl.cdiv(C, GB))
    x, scale, stride = k + b * k_batch + g * d, k_scale + b * T * G + g, k_token
    if values > 0:
        x, scale, stride = v + b * v_batch + g * d, v_scale + b * T * G + g, v_token
    column = values * d + tl.arange(0, DP)
    fits = (gates < C)[:, None] & (tl.arange(0, DP) < d)[None, :]
    line = ((bg * (tl.num_programs(0) + 1) + tl.program_id(0)) * kinds + ring_too) * C + gates
    total = tl.load(sums_base + line[:, None] * (2 * d) + column[None, :], mask=fits, other=0.0)
    held = tl.load(count_base + (bg * (chunks + 1) + chunk) * C + gates, mask=gates < C, other=0) - ring_too * ring
    ticks = CH // block
    for tick in range(ticks):
        fresh = tl.load(before + ((bg * chunks + chunk) * ticks + tick) * C + gates, mask=gates < C, other=0)
        mean = total / tl.maximum(held + fresh, 1).to(tl.float32)[:, None]
        line = (((bg * tl.num_programs(0) + tl.program_id(0)) * ticks + tick) * kinds + ring_too) * C + gates
        tl.store(notes + line[:, None] * (2 * d) + column[None, :], mean.to(DTYPE), mask=fits)
        begin = chunk * CH + tick * block
        for at in range(0, block, BS):
            total = sum_keys(total, gates, ring_too, x, scale, stride, gate + bg * T, rank + bg * T,
                             first + bg * C, order + bg * T, begin + at + tl.arange(0, BS), begin + block, T, window,
                             ring, G, d, INT8, DTYPE, DP)  # fmt: skip


@triton.jit
def probe_kernel(
    q, q_out, prototypes, alive, position, inv_freq, awake, before, count_base, probes,
    T, t0, rows_end, G, r, d, C, n, block, chunks, q_batch, q_token, position_batch,
    ROPE: tl.constexpr, AWAKE: tl.constexpr, PROBE: tl.constexpr, CH: tl.constexpr, HP: tl.constexpr,
    CP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Open the n gates with the largest q.p among those that hold a key, and write queries rotated.

    For rows t0 <= t < rows_end: q and q_out (B, rows, G r, d); probes (B, rows, G r, n), -1 for none.
    """
    at = tl.program_id(0) * BT + tl.arange(0, BT)
    t = t0 + at
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    rows = t < rows_end
    half, c = tl.arange(0, HP), tl.arange(0, CP)
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
        left = tl.load(count_base + held, mask=here, other=0) + tl.load(before + fresh, mask=here, other=0)
        usable = (left > 0) & (tl.load(alive + g * C + c, mask=c < C, other=0) != 0)[None, :]
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
                most, best = tl.max(score, 1, return_indices=True)
                opened = most > -float("inf")
                tl.store(probes + line * n + i, tl.where(opened, best, -1), mask=rows)
                score = tl.where(best[:, None] == c[None, :], -float("inf"), score)
        if ROPE:
            first, second = turn(first, second, cos, sin)
            out = q_out + line[:, None] * d + half[None, :]
            tl.store(out, first, mask=fits)
            tl.store(out + d // 2, second, mask=fits)


@triton.jit
def bucket_kernel(
    probes, bucket_count, bucket_rows, rows, G, C, segments,
    SEG: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """List, for each of four gates, the (row, probe) pairs of a segment that open it, by their names.

    A name is (token x R + head) x N + probe, counted from the segment's first row. bucket_count (B G, segments, C);
    bucket_rows (.., SEG x R) int32. One running sum counts all four gates: each has 16 bits of it.
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


@triton.jit
def route_kernel(
    q, logits, prototypes, alive, confidence, log_share, head_of_gate, balance, awake, weight,
    rows, G, r, d, C, least, most, top_p, alpha, temperature, prior_max, q_batch, q_token, l_batch, l_token,
    HP: tl.constexpr, CP: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Wake heads and weigh them, as `routing` defines it: awake (B, rows, G r) int8, weight the same shape float32."""
    at = tl.program_id(0) * BT + tl.arange(0, BT)
    b, g = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G
    half, c, h = tl.arange(0, HP), tl.arange(0, CP), tl.arange(0, RP)
    here = at < rows
    fits = here[:, None] & (half < d // 2)[None, :]
    first, second = tl.zeros((BT, HP), tl.float32), tl.zeros((BT, HP), tl.float32)
    for i in range(r):
        q_at = q + b * q_batch + at.to(tl.int64)[:, None] * q_token + (g * r + i) * d + half[None, :]
        first += tl.load(q_at, mask=fits, other=0.0).to(tl.float32)
        second += tl.load(q_at + d // 2, mask=fits, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(first * first, 1) + tl.sum(second * second, 1))
    p_at = prototypes + (g * C + c)[None, :] * d + half[:, None]
    p_fits = (c < C)[None, :] & (half < d // 2)[:, None]
    DTYPE: tl.constexpr = q.dtype.element_ty
    cosine = sharp_dot(first.to(DTYPE), tl.load(p_at, mask=p_fits, other=0.0), tl.zeros((BT, CP), tl.float32))
    cosine = sharp_dot(second.to(DTYPE), tl.load(p_at + d // 2, mask=p_fits, other=0.0), cosine)
    gate = g * C + c
    usable = (tl.load(alive + gate, mask=c < C, other=0) != 0)[None, :]
    share = tl.load(log_share + gate, mask=c < C, other=0.0)[None, :]
    cosine = tl.where(usable, cosine / tl.maximum(length, 1e-12)[:, None], -float("inf"))
    prior = softmax(cosine / temperature + share) * tl.load(confidence + gate, mask=c < C, other=0.0)[None, :]
    prior = prior / tl.maximum(tl.sum(prior, 1), 1e-9)[:, None]
    trust = prior_max * tl.minimum(tl.maximum(tl.max(cosine, 1), 0.0), 1.0)[:, None]
    l_at = logits + b * l_batch + at.to(tl.int64)[:, None] * l_token + gate[None, :]
    learned = tl.load(l_at, mask=here[:, None] & (c < C)[None, :], other=0.0).to(tl.float32) + share
    prob = (1 - trust) * softmax(tl.where(usable, learned, -float("inf"))) + trust * prior
    owner = tl.load(head_of_gate + gate, mask=c < C, other=-1)
    of_head = tl.zeros((BT, RP), tl.float32)
    for i in range(r):
        mass = tl.sum(tl.where((owner == i)[None, :], prob, 0.0), 1)
        of_head = tl.where((h == i)[None, :], mass[:, None], of_head)
    score = of_head + tl.load(balance + g * r + h, mask=h < r, other=0.0)[None, :]
    score = tl.where((h < r)[None, :], score, -float("inf"))
    up, reached, woken = tl.zeros((BT, RP), tl.int1), tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    for i in range(most):
        best = tl.argmax(score, 1)
        hot = best[:, None] == h[None, :]
        wake = (i < least) | (top_p >= 1) | (reached < top_p)
        up = up | (hot & wake[:, None])
        woken += wake.to(tl.float32)
        reached += tl.sum(tl.where(hot, of_head, 0.0), 1)
        score = tl.where(hot, -float("inf"), score)
    loud = tl.where(up, of_head, 0.0)
    loud = (1 - alpha) + alpha * woken[:, None] * loud / tl.maximum(tl.sum(loud, 1), 1e-9)[:, None]
    line = ((b * rows + at) * G + g)[:, None] * r + h[None, :]
    fits = here[:, None] & (h < r)[None, :]
    tl.store(awake + line, up.to(tl.int8), mask=fits)
    tl.store(weight + line, tl.where(up, loud, 0.0), mask=fits)


@triton.jit
def softmax(x):
    """Softmax over the last axis of `(rows, columns)`; -inf gets nothing."""
    x = tl.exp(x - tl.max(x, 1)[:, None])
    return x / tl.sum(x, 1)[:, None]
