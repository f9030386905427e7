"""Triton kernels of the forward pass: rings and their notes by bucket, then window, anchors and notes by block.

Both parts are flash attention over short lists, in base 2; the near kernel merges what the far one left by log-sum-exp.
Axes and names as in `triton_index`; `M` rows and `BN` keys make a tile.
"""

import triton
import triton.language as tl

from .triton_index import load_rows


@triton.jit
def absorb(x, keys, values, seen, lift, scale, top, mass, acc, DTYPE: tl.constexpr):
    """Take the keys and values that rows x have `seen` into a running softmax; `lift` is added to their scores."""
    score = tl.dot(x, tl.trans(keys), input_precision="ieee") * scale + lift
    score = tl.where(seen, score, -float("inf"))
    new = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - new[:, None])
    fade = tl.exp2(top - new)
    acc = tl.dot(p.to(DTYPE), values, acc * fade[:, None], input_precision="ieee")
    return new, mass * fade + tl.sum(p, 1), acc


@triton.jit
def left_at(tick, count_base, before, bg, c, chunks, C, block, real, CH: tl.constexpr):
    """How many keys of gate c have left the window at each tick; c may be a number or go along with `tick`."""
    chunk = (tick * block) // CH
    held = tl.load(count_base + (bg * (chunks + 1) + chunk) * C + c, mask=real, other=0)
    return held + tl.load(before + (bg * chunks * (CH // block) + tick) * C + c, mask=real, other=0)


@triton.jit
def far_kernel(
    q, k, v, k_scale, v_scale, order, first, before, count_base, notes, bucket_count, bucket_rows, out,
    lse, T, t0, rows, G, d, C, ring, block, chunks, segments, note_ticks, scale,
    q_batch, q_token, k_batch, k_token, v_batch, v_token,
    NOTES: tl.constexpr, INT8: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, SEG: tl.constexpr,
    R: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, NT: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Every (row, probe) of one bucket over the ring of its gate and the note of the rest.

    out (B, rows, G r, n, d); lse, same without d, natural. scale: of the scores, times log2 e.
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
    tick = start // block + tl.arange(0, NT)
    real = (tl.arange(0, NT) < SEG // block) & (tick * block < t0 + rows)
    if NOTES:
        rest = left_at(tick, count_base, before, bg, c, chunks, C, block, real, CH) - ring
        held = (rest > 0)[:, None] & (column < d)[None, :]
        note_at = notes + ((bg * note_ticks + tick - t0 // block) * (2 * C) + C + c)[:, None] * (2 * d) + column[None, :]
        rest_k, rest_v = tl.load(note_at, mask=held, other=0.0), tl.load(note_at + d, mask=held, other=0.0)
        lift = tl.log2(tl.maximum(rest, 1).to(tl.float32))[None, :]
    for i0 in range(0, count, M):
        i = i0 + tl.arange(0, M)
        ok = i < count
        name = tl.load(bucket_rows + i, mask=ok, other=0)
        t = start + name // (R * N)
        line = (t - t0).to(tl.int64) * (G * R) + g * R + name // N % R
        x = tl.load(q + ((t - t0).to(tl.int64) * q_token + (name // N % R) * d)[:, None] + column[None, :],
                    mask=ok[:, None] & (column < d)[None, :], other=0.0)  # fmt: skip
        left = left_at(t // block, count_base, before, bg, c, chunks, C, block, ok, CH)
        top = tl.zeros((M,), tl.float32) - 1e30
        mass = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, DP), tl.float32)
        if NOTES:
            own = ((t // block)[:, None] == tick[None, :]) & (rest > 0)[None, :]
            top, mass, acc = absorb(x, rest_k, rest_v, own, lift, scale, top, mass, acc, DTYPE)
        low = tl.maximum(tl.min(tl.where(ok, left, T), 0) - ring, 0)
        high = tl.max(left, 0)
        for at in range(low, high, BN):
            place = at + tl.arange(0, BN)
            here = place < high
            j = tl.load(order + place, mask=here, other=0)
            keys = load_rows(k, k_scale, j, k_token, G, column, here, d, INT8, DTYPE)
            values = load_rows(v, v_scale, j, v_token, G, column, here, d, INT8, DTYPE)
            seen = (place[None, :] >= left[:, None] - ring) & (place[None, :] < left[:, None])
            top, mass, acc = absorb(x, keys, values, seen, 0.0, scale, top, mass, acc, DTYPE)
        mass = tl.maximum(mass, 1e-30)
        line = (b * rows * (G * R) + line) * N + name % N
        tl.store(out + line[:, None] * d + column[None, :], (acc / mass[:, None]).to(DTYPE),
                 mask=ok[:, None] & (column < d)[None, :])  # fmt: skip
        tl.store(lse + line, (top + tl.log2(mass)) * 0.6931471805599453, mask=ok)


@triton.jit
def near_rows(tile, hc, t0, rows, r, TT: tl.constexpr, RC: tl.constexpr, M: tl.constexpr):
    """The rows of a near tile: token and head of each, and which of the M there are."""
    m = tl.arange(0, M)
    at = tile * TT + m // RC
    h = hc * RC + m % RC
    return at, t0 + at, h, (m < TT * RC) & (h < r) & (at < rows)


@triton.jit
def near_kernel(
    q, k, v, k_scale, v_scale, notes, before, count_base, probes, far_out, far_lse, weight, length, out, lse,
    T, t0, rows, G, r, d, C, window, block, anchors, chunks, note_ticks, scale,
    q_batch, q_token, k_batch, k_token, v_batch, v_token, out_batch,
    NOTES: tl.constexpr, KINDS: tl.constexpr, N: tl.constexpr, WEIGH: tl.constexpr, KEEP: tl.constexpr, INT8: tl.constexpr,
    DTYPE: tl.constexpr, CH: tl.constexpr, TT: tl.constexpr, RC: tl.constexpr, M: tl.constexpr, BN: tl.constexpr,
    AP: tl.constexpr, GB: tl.constexpr, NTT: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Rows of TT tokens over window, anchors and notes, merged with the far results of their N probes.

    out (B, rows, G r, d), times `weight` (B, rows, G r) where WEIGH; lse (B, rows, G r), natural. Rows past the kept
    length give zeros.
    """
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    column = tl.arange(0, DP)
    at, t, h, ok = near_rows(tl.program_id(0), tl.program_id(2), t0, rows, r, TT, RC, M)
    end = T
    if KEEP:
        end = tl.load(length + b).to(tl.int32)
    fits = ok[:, None] & (column < d)[None, :]
    line = (b * rows + at) * (G * r) + g * r + h
    q_at = q + b * q_batch + at.to(tl.int64)[:, None] * q_token + (g * r + h)[:, None] * d + column[None, :]
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
        for j0 in range(low, tl.minimum(tl.minimum(begin + TT, t0 + rows), end), BN):
            j = j0 + tl.arange(0, BN)
            keys = load_rows(k, k_scale, j, k_token, G, column, j < end, d, INT8, DTYPE)
            values = load_rows(v, v_scale, j, v_token, G, column, j < end, d, INT8, DTYPE)
            seen = (j[None, :] <= t[:, None]) & (j[None, :] >= edge[:, None])
            top, mass, acc = absorb(x, keys, values, seen, 0.0, scale, top, mass, acc, DTYPE)
        if (AP > 0) & ((begin + TT - 1) // block * block > window):
            j = tl.arange(0, AP)
            keys = load_rows(k, k_scale, j, k_token, G, column, j < anchors, d, INT8, DTYPE)
            values = load_rows(v, v_scale, j, v_token, G, column, j < anchors, d, INT8, DTYPE)
            seen = (j[None, :] < anchors) & (j[None, :] < edge[:, None])
            top, mass, acc = absorb(x, keys, values, seen, 0.0, scale, top, mass, acc, DTYPE)
        if NOTES:
            for s in range(NTT):
                tick = begin // block + s
                note = (bg * note_ticks + tick - t0 // block) * (KINDS * C)
                for c0 in range(0, C, GB):
                    c = c0 + tl.arange(0, GB)
                    real = (c < C) & (tick * block < t0 + rows)
                    left = left_at(tick, count_base, before, bg, c, chunks, C, block, real, CH)
                    note_at = notes + (note + c)[:, None] * (2 * d) + column[None, :]
                    held = (left > 0)[:, None] & (column < d)[None, :]
                    keys, values = tl.load(note_at, mask=held, other=0.0), tl.load(note_at + d, mask=held, other=0.0)
                    seen = (left > 0)[None, :] & ((t // block)[:, None] == tick)
                    for i in tl.static_range(N):
                        opened = tl.load(probes + line * N + i, mask=ok, other=-1)
                        seen = seen & (opened[:, None] != c[None, :])
                    lift = tl.log2(tl.maximum(left, 1).to(tl.float32))[None, :]
                    top, mass, acc = absorb(x, keys, values, seen, lift, scale, top, mass, acc, DTYPE)
        for i in tl.static_range(N):
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
    loud = tl.where(alive, 1.0 / mass, 0.0)
    if WEIGH:
        loud *= tl.load(weight + line, mask=ok, other=0.0)
    out_at = out + b * out_batch + (at.to(tl.int64) * (G * r) + g * r + h)[:, None] * d + column[None, :]
    tl.store(out_at, (acc * loud[:, None]).to(DTYPE), mask=fits)
    tl.store(lse + line, tl.where(alive, (top + tl.log2(mass)) * 0.6931471805599453, -float("inf")), mask=ok)
