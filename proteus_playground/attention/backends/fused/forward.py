"""Triton kernels of the forward pass: rings by bucket, then window, anchors and notes by block.

Both parts are flash attention over short lists, in base 2; the near kernel merges the results of the far one by their
log-sum-exp. Axes and names as in `index`; `M` rows and `BN` keys make a tile.
"""

import triton
import triton.language as tl

from .vectors import load_scales, load_stored


@triton.jit
def absorb(x, keys, values, seen, lift, scale, v_scale, top, mass, acc, DTYPE: tl.constexpr):
    """Add the keys and values that rows x read (`seen`) to a running softmax.

    `scale` multiplies the scores, `v_scale` the values: numbers, or one per key. `lift` is added to the scores.
    """
    score = tl.dot(x, tl.trans(keys), input_precision="ieee") * scale + lift
    score = tl.where(seen, score, -float("inf"))
    new = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - new[:, None])
    fade = tl.exp2(top - new)
    acc = tl.dot((p * v_scale).to(DTYPE), values, acc * fade[:, None], input_precision="ieee")
    return new, mass * fade + tl.sum(p, 1), acc


@triton.jit
def retired_at(tick, count_base, before, bg, c, chunks, C, block, real, CH: tl.constexpr):
    """Number of keys of gate c that have left the window at each tick; c is a number, or one per tick."""
    chunk = (tick * block) // CH
    held = tl.load(count_base + (bg * (chunks + 1) + chunk) * C + c, mask=real, other=0)
    return held + tl.load(before + (bg * chunks * (CH // block) + tick) * C + c, mask=real, other=0)


@triton.jit
def far_kernel(
    q, k, v, k_scale, v_scale, order, first, before, count_base, bucket_count, bucket_rows, out,
    lse, T, t0, rows, G, d, C, ring, block, chunks, segments, scale,
    q_batch, q_token, k_batch, k_token, v_batch, v_token,
    INT8: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, SEG: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    M: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Attention of every (row, probe) of one bucket over the ring of its gate.

    out (B, rows, G r, n, d); lse, the same without d, natural. scale: of the scores, times log2 e.
    """
    segment, c = tl.program_id(0) // C, tl.program_id(0) % C
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    bucket = (bg * segments + segment) * C + c
    count = tl.load(bucket_count + bucket)
    if count == 0:
        return
    bucket_rows += bucket * (SEG * R)
    order += bg * T + tl.load(first + bg * C + c)
    q += b * q_batch + g * R * d
    k += b * k_batch + g * d
    v += b * v_batch + g * d
    k_scale += b * T * G + g
    v_scale += b * T * G + g
    start = t0 + segment * SEG
    column = tl.arange(0, DP)
    for i0 in range(0, count, M):
        i = i0 + tl.arange(0, M)
        ok = i < count
        name = tl.load(bucket_rows + i, mask=ok, other=0)
        t = start + name // (R * N)
        line = (t - t0).to(tl.int64) * (G * R) + g * R + name // N % R
        x = tl.load(q + ((t - t0).to(tl.int64) * q_token + (name // N % R) * d)[:, None] + column[None, :],
                    mask=ok[:, None] & (column < d)[None, :], other=0.0)  # fmt: skip
        retired = retired_at(t // block, count_base, before, bg, c, chunks, C, block, ok, CH)
        top = tl.zeros((M,), tl.float32) - 1e30
        mass = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, DP), tl.float32)
        low = tl.maximum(tl.min(tl.where(ok, retired, T), 0) - ring, 0)
        high = tl.max(retired, 0)
        for at in range(low, high, BN):
            place = at + tl.arange(0, BN)
            here = place < high
            j = tl.load(order + place, mask=here, other=0)
            keys = load_stored(k, j, k_token, column, here, d, DTYPE)
            values = load_stored(v, j, v_token, column, here, d, DTYPE)
            ks, vs = load_scales(k_scale, j, G, here, INT8), load_scales(v_scale, j, G, here, INT8)
            seen = (place[None, :] >= retired[:, None] - ring) & (place[None, :] < retired[:, None])
            top, mass, acc = absorb(x, keys, values, seen, 0.0, scale * ks, vs, top, mass, acc, DTYPE)
        mass = tl.maximum(mass, 1e-30)
        line = (b * rows * (G * R) + line) * N + name % N
        tl.store(out + line[:, None] * d + column[None, :], (acc / mass[:, None]).to(DTYPE),
                 mask=ok[:, None] & (column < d)[None, :])  # fmt: skip
        tl.store(lse + line, (top + tl.log2(mass)) * 0.6931471805599453, mask=ok)


@triton.jit
def note_size(e, tick, count_base, before, bg, chunks, C, block, ring, end, KINDS: tl.constexpr, CH: tl.constexpr):
    """Number of keys in note e of a tick. e < C: all retired keys of gate e; else those of gate e - C less its ring."""
    real = e < tl.where(tick * block < end, KINDS * C, 0)
    retired = retired_at(tick, count_base, before, bg, e % C, chunks, C, block, real, CH)
    return tl.where(real, retired - tl.where(e >= C, ring, 0), 0)


@triton.jit
def reads_note(e0, e, size, probes, noted, line, ok, C, N: tl.constexpr, SOME: tl.constexpr):
    """Which of the notes e, which begin with e0, each row reads: REST of gates that it opened, ALL of every other gate.

    SOME: ALL of the gates whose bit is set in `noted`, and no other.
    """
    if SOME:
        word = tl.load(noted + line * tl.cdiv(C, 32) + e0 // 32, mask=ok, other=0)
        reads = ((word[:, None] >> (e % 32)[None, :]) & 1) != 0
    else:
        opened = (e < 0)[None, :] & ok[:, None]
        for i in tl.static_range(N):
            opened = opened | (tl.load(probes + line * N + i, mask=ok, other=-1)[:, None] == (e % C)[None, :])
        reads = opened == (e >= C)[None, :]
    return (size > 0)[None, :] & reads


@triton.jit
def near_rows(tile, hc, t0, rows, r, TT: tl.constexpr, RC: tl.constexpr, M: tl.constexpr):
    """The M rows of a near tile: index in the piece, token, head, and whether the row exists."""
    m = tl.arange(0, M)
    at = tile * TT + m // RC
    h = hc * RC + m % RC
    return at, t0 + at, h, (m < TT * RC) & (h < r) & (at < rows)


@triton.jit
def near_kernel(
    q, k, v, k_scale, v_scale, notes, before, count_base, probes, noted, far_out, far_lse, weight, length, out, lse,
    T, t0, rows, G, r, d, C, window, block, anchors, ring, chunks, note_ticks, scale,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, out_batch,
    KINDS: tl.constexpr, SOME: tl.constexpr, N: tl.constexpr, WEIGH: tl.constexpr, KEEP: tl.constexpr,
    INT8: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, TT: tl.constexpr, RC: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, NB: tl.constexpr, NTT: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Attention of the rows of TT tokens over window, anchors and notes, merged with the far results of their N probes.

    out (B, rows, G r, d), times `weight` (B, rows, G r) where WEIGH; lse (B, rows, G r), natural. Rows past the kept
    length are zero.
    """
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    column = tl.arange(0, DP)
    row, t, h, ok = near_rows(tl.program_id(0), tl.program_id(2), t0, rows, r, TT, RC, M)
    end = T
    if KEEP:
        end = tl.load(length + b).to(tl.int32)
    fits = ok[:, None] & (column < d)[None, :]
    line = (b * rows + row) * (G * r) + g * r + h
    q_at = q + b * q_batch + row.to(tl.int64)[:, None] * q_token + (g * r + h)[:, None] * d + column[None, :]
    x = tl.load(q_at, mask=fits, other=0.0)
    k += b * k_batch + g * d
    v += b * v_batch + g * d
    k_scale += b * T * G + g
    v_scale += b * T * G + g
    top = tl.zeros((M,), tl.float32) - 1e30
    mass = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, DP), tl.float32)
    begin = t0 + tl.program_id(0) * TT
    edge = t // block * block - window  # a row's first key in the window
    if begin < end:
        low = tl.maximum(begin // block * block - window, 0)
        high = tl.minimum(tl.minimum(begin + TT, t0 + rows), end)
        shown = tl.where((begin + TT - 1) // block * block > window, anchors, 0)  # anchors come before the window
        for at in range(0, high - low + shown, BN):
            place = at + tl.arange(0, BN)
            anchor = place < shown
            j = tl.where(anchor, place, low + place - shown)
            keys = load_stored(k, j, k_token, column, j < high, d, DTYPE)
            values = load_stored(v, j, v_token, column, j < high, d, DTYPE)
            ks, vs = load_scales(k_scale, j, G, j < high, INT8), load_scales(v_scale, j, G, j < high, INT8)
            seen = (j[None, :] <= t[:, None]) & ((j[None, :] >= edge[:, None]) != anchor[None, :])
            top, mass, acc = absorb(x, keys, values, seen, 0.0, scale * ks, vs, top, mass, acc, DTYPE)
        for s in range(NTT * (KINDS > 0)):
            tick = begin // block + s
            note = notes + (bg * note_ticks + tick - t0 // block) * (KINDS * C) * (2 * d)
            for e0 in range(0, KINDS * C, NB):
                e = e0 + tl.arange(0, NB)
                size = note_size(e, tick, count_base, before, bg, chunks, C, block, ring, t0 + rows, KINDS, CH)
                held = (size > 0)[:, None] & (column < d)[None, :]
                note_at = note + e[:, None] * (2 * d) + column[None, :]
                keys, values = tl.load(note_at, mask=held, other=0.0), tl.load(note_at + d, mask=held, other=0.0)
                seen = reads_note(e0, e, size, probes, noted, line, ok, C, N, SOME)
                seen = seen & ((t // block)[:, None] == tick)
                lift = tl.log2(tl.maximum(size, 1).to(tl.float32))[None, :]
                top, mass, acc = absorb(x, keys, values, seen, lift, scale, 1.0, top, mass, acc, DTYPE)
        for i in range(N):
            opened = tl.load(probes + line * N + i, mask=ok, other=-1) >= 0
            far = tl.load(far_lse + line * N + i, mask=opened, other=-float("inf")) * 1.4426950408889634
            part = tl.load(far_out + (line * N + i)[:, None] * d + column[None, :],
                           mask=opened[:, None] & (column < d)[None, :], other=0.0)  # fmt: skip
            new = tl.maximum(top, far)
            fade, share = tl.exp2(top - new), tl.exp2(far - new)
            acc = acc * fade[:, None] + part.to(tl.float32) * share[:, None]
            mass = mass * fade + share
            top = new
    alive = t < end
    mass = tl.maximum(mass, 1e-30)
    factor = tl.where(alive, 1.0 / mass, 0.0)
    if WEIGH:
        factor *= tl.load(weight + line, mask=ok, other=0.0)
    out_at = out + b * out_batch + (row.to(tl.int64) * (G * r) + g * r + h)[:, None] * d + column[None, :]
    tl.store(out_at, (acc * factor[:, None]).to(DTYPE), mask=fits)
    tl.store(lse + line, tl.where(alive, (top + tl.log2(mass)) * 0.6931471805599453, -float("inf")), mask=ok)
