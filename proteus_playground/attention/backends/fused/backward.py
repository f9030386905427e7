"""Triton kernels of the backward pass.

Each gradient has one writer and a fixed order of additions, so the pass is deterministic. Scores are computed again,
tile by tile, from the log-sum-exp of the forward pass. The gradient of a key has five parts: from rows that read it in
their window, as an anchor, in a ring, and through the two notes of its gate, ALL and REST. Axes and names as in
`index`.
"""

import triton
import triton.language as tl

from .forward import near_rows, note_size, reads_note, retired_at
from .vectors import load_rows


@triton.jit
def load_stats(lse, delta, line, ok):
    """Base-2 log-sum-exp and delta of rows. For rows that read nothing it is +inf, so that their weights are zero."""
    log = tl.load(lse + line, mask=ok, other=float("inf"))
    log = tl.where(log == -float("inf"), float("inf"), log * 1.4426950408889634)
    return log, tl.load(delta + line, mask=ok, other=0.0)


@triton.jit
def weights(x, do, keys, values, seen, lift, scale, log, delta):
    """Attention p of a tile and the gradient of its scores, both float32."""
    score = tl.dot(x, tl.trans(keys), input_precision="ieee") * scale + lift
    p = tl.where(seen, tl.exp2(score - log[:, None]), 0.0)
    return p, p * (tl.dot(do, tl.trans(values), input_precision="ieee") - delta[:, None])


@triton.jit
def delta_kernel(out, grad, delta, rows, d, BT: tl.constexpr, DP: tl.constexpr):
    """delta (rows,) = sum over features of out x grad, float32."""
    line = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    column = tl.arange(0, DP)
    at = line[:, None] * d + column[None, :]
    fits = (line < rows)[:, None] & (column < d)[None, :]
    product = tl.load(out + at, mask=fits, other=0.0).to(tl.float32) * tl.load(grad + at, mask=fits, other=0.0)
    tl.store(delta + line, tl.sum(product, 1), mask=line < rows)


@triton.jit
def far_query_kernel(
    q, k, v, do, lse, delta, order, first, before, count_base, bucket_count, bucket_rows, dq,
    T, G, d, C, ring, block, chunks, segments, scale, k_batch, k_token, v_batch, v_token,
    DTYPE: tl.constexpr, CH: tl.constexpr, SEG: tl.constexpr, R: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradient of queries from rings, dq (B, T, G R, N, d), one bucket at a time; q and do (B, T, G R, d)."""
    segment, c = tl.program_id(0) // C, tl.program_id(0) % C
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    bucket = (bg * segments + segment) * C + c
    count = tl.load(bucket_count + bucket)
    if count == 0:
        return
    bucket_rows += bucket * (SEG * R)
    order += bg * T + tl.load(first + bg * C + c)
    k += b * k_batch + g * d
    v += b * v_batch + g * d
    column = tl.arange(0, DP)
    for i0 in range(0, count, M):
        i = i0 + tl.arange(0, M)
        ok = i < count
        name = tl.load(bucket_rows + i, mask=ok, other=0)
        t = segment * SEG + name // (R * N)
        line = (b * T + t) * (G * R) + g * R + name // N % R
        fits = ok[:, None] & (column < d)[None, :]
        x = tl.load(q + line[:, None] * d + column[None, :], mask=fits, other=0.0)
        y = tl.load(do + line[:, None] * d + column[None, :], mask=fits, other=0.0)
        log, dl = load_stats(lse, delta, line, ok)
        retired = retired_at(t // block, count_base, before, bg, c, chunks, C, block, ok, CH)
        acc = tl.zeros((M, DP), tl.float32)
        low = tl.maximum(tl.min(tl.where(ok, retired, T), 0) - ring, 0)
        for at in range(low, tl.max(retired, 0), BN):
            place = at + tl.arange(0, BN)
            here = place < tl.max(retired, 0)
            j = tl.load(order + place, mask=here, other=0)
            keys = load_rows(k, k, j, k_token, G, column, here, d, False, DTYPE)
            values = load_rows(v, v, j, v_token, G, column, here, d, False, DTYPE)
            seen = ok[:, None] & (place[None, :] >= retired[:, None] - ring) & (place[None, :] < retired[:, None])
            p, ds = weights(x, y, keys, values, seen, 0.0, scale, log, dl)
            acc = tl.dot(ds.to(DTYPE), keys, acc, input_precision="ieee")
        tl.store(dq + (line * N + name % N)[:, None] * d + column[None, :], acc.to(DTYPE), mask=fits)


@triton.jit
def near_query_kernel(
    q, k, v, do, lse, delta, notes, before, count_base, probes, noted, far_dq, length, dq,
    T, G, r, d, C, window, block, anchors, ring, chunks, note_ticks, scale, natural,
    k_batch, k_token, v_batch, v_token,
    KINDS: tl.constexpr, SOME: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, DTYPE: tl.constexpr,
    CH: tl.constexpr, TT: tl.constexpr, RC: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr,
    NTT: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradient of the rotated queries, far part included: dq (B, T, G r, d). `natural`: scale without log2 e."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    column = tl.arange(0, DP)
    row, t, h, ok = near_rows(tl.program_id(0), tl.program_id(2), 0, T, r, TT, RC, M)
    end = T
    if KEEP:
        end = tl.load(length + b).to(tl.int32)
    fits = ok[:, None] & (column < d)[None, :]
    line = (b * T + t) * (G * r) + g * r + h
    x = tl.load(q + line[:, None] * d + column[None, :], mask=fits, other=0.0)
    y = tl.load(do + line[:, None] * d + column[None, :], mask=fits, other=0.0)
    log, dl = load_stats(lse, delta, line, ok)
    k += b * k_batch + g * d
    v += b * v_batch + g * d
    acc = tl.zeros((M, DP), tl.float32)
    begin = tl.program_id(0) * TT
    edge = t // block * block - window
    low = tl.maximum(begin // block * block - window, 0)
    high = tl.minimum(tl.minimum(begin + TT, T), end)
    shown = tl.where((begin + TT - 1) // block * block > window, anchors, 0)
    for at in range(0, high - low + shown, BN):
        place = at + tl.arange(0, BN)
        anchor = place < shown
        j = tl.where(anchor, place, low + place - shown)
        keys = load_rows(k, k, j, k_token, G, column, j < high, d, False, DTYPE)
        values = load_rows(v, v, j, v_token, G, column, j < high, d, False, DTYPE)
        seen = ok[:, None] & (j[None, :] <= t[:, None]) & ((j[None, :] >= edge[:, None]) != anchor[None, :])
        p, ds = weights(x, y, keys, values, seen, 0.0, scale, log, dl)
        acc = tl.dot(ds.to(DTYPE), keys, acc, input_precision="ieee")
    for s in range(NTT * (KINDS > 0)):
        tick = begin // block + s
        note = notes + (bg * note_ticks + tick) * (KINDS * C) * (2 * d)
        for e0 in range(0, KINDS * C, NB):
            e = e0 + tl.arange(0, NB)
            size = note_size(e, tick, count_base, before, bg, chunks, C, block, ring, T, KINDS, CH)
            held = (size > 0)[:, None] & (column < d)[None, :]
            note_at = note + e[:, None] * (2 * d) + column[None, :]
            keys, values = tl.load(note_at, mask=held, other=0.0), tl.load(note_at + d, mask=held, other=0.0)
            seen = reads_note(e0, e, size, probes, noted, line, ok, C, N, SOME)
            seen = ok[:, None] & seen & ((t // block)[:, None] == tick)
            lift = tl.log2(tl.maximum(size, 1).to(tl.float32))[None, :]
            p, ds = weights(x, y, keys, values, seen, lift, scale, log, dl)
            acc = tl.dot(ds.to(DTYPE), keys, acc, input_precision="ieee")
    for i in range(N):
        opened = tl.load(probes + line * N + i, mask=ok, other=-1) >= 0
        acc += tl.load(far_dq + (line * N + i)[:, None] * d + column[None, :],
                       mask=fits & opened[:, None], other=0.0).to(tl.float32)  # fmt: skip
    tl.store(dq + line[:, None] * d + column[None, :], (acc * natural).to(DTYPE), mask=fits)


@triton.jit
def note_grad_kernel(
    q, do, lse, delta, notes, before, count_base, probes, noted, grad,
    T, G, r, d, C, block, ring, chunks, note_ticks, scale, natural,
    KINDS: tl.constexpr, SOME: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, M: tl.constexpr,
    NB: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradient of the sums behind the notes of one tick, `grad` laid out as `notes` (B G, ticks, kinds, C, 2 d)."""
    tick, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    column = tl.arange(0, DP)
    e0 = tl.program_id(2) * NB
    e = e0 + tl.arange(0, NB)
    size = note_size(e, tick, count_base, before, bg, chunks, C, block, ring, T, KINDS, CH)
    held = (size > 0)[:, None] & (column < d)[None, :]
    at = ((bg * note_ticks + tick) * (KINDS * C) + e)[:, None] * (2 * d) + column[None, :]
    keys, values = tl.load(notes + at, mask=held, other=0.0), tl.load(notes + at + d, mask=held, other=0.0)
    lift = tl.log2(tl.maximum(size, 1).to(tl.float32))[None, :]
    dk, dv = tl.zeros((NB, DP), tl.float32), tl.zeros((NB, DP), tl.float32)
    for m0 in range(0, block * r, M):
        m = m0 + tl.arange(0, M)
        t = tick * block + m // r
        ok = (m < block * r) & (t < T)
        line = (b * T + t) * (G * r) + g * r + m % r
        fits = ok[:, None] & (column < d)[None, :]
        x = tl.load(q + line[:, None] * d + column[None, :], mask=fits, other=0.0)
        y = tl.load(do + line[:, None] * d + column[None, :], mask=fits, other=0.0)
        log, dl = load_stats(lse, delta, line, ok)
        seen = ok[:, None] & reads_note(e0, e, size, probes, noted, line, ok, C, N, SOME)
        p, ds = weights(x, y, keys, values, seen, lift, scale, log, dl)
        dk = tl.dot(tl.trans(ds.to(DTYPE)), x, dk, input_precision="ieee")
        dv = tl.dot(tl.trans(p.to(DTYPE)), y, dv, input_precision="ieee")
    share = 1.0 / tl.maximum(size, 1).to(tl.float32)[:, None]
    fits = (e < KINDS * C)[:, None] & (column < d)[None, :]
    tl.store(grad + at, (dk * share * natural).to(DTYPE), mask=fits)
    tl.store(grad + at + d, (dv * share).to(DTYPE), mask=fits)


@triton.jit
def spread_kernel(
    gate, rank, first, order, grad, later, whole, rest, T, d, C, window, block, ring, note_ticks, note_chunks,
    KINDS: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, BS: tl.constexpr, DP: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """Pass the gradient of the notes on to their members, from the last tick to the first, because a key is a member of
    the notes of every tick after it was added. `later` (B G, chunks, kinds, C, 2 d) float32 is that of all later
    chunks; whole and rest (B G, T, 2 d) are the results for the notes ALL and REST.
    """
    chunk, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(C, GB)
    part = tl.program_id(2)
    gates, half, kind = part % blocks * GB + tl.arange(0, GB), part // blocks % 2, part // (2 * blocks)
    column = half * d + tl.arange(0, DP)
    fits = (gates < C)[:, None] & (tl.arange(0, DP) < d)[None, :]
    at = ((bg * note_chunks + chunk) * KINDS + kind) * C + gates
    total = tl.load(later + at[:, None] * (2 * d) + column[None, :], mask=fits, other=0.0)
    ticks = CH // block
    for back in range(ticks):
        tick = ticks - 1 - back
        for s in range(0, block, BS):
            inside = s + tl.arange(0, BS)
            u = chunk * CH + tick * block + inside
            real = (inside < block) & (u >= window) & (u < T + window)
            j = u - window
            home = tl.load(gate + bg * T + j, mask=real, other=-1)
            if kind > 0:
                place = tl.load(rank + bg * T + j, mask=real, other=0) - ring
                home = tl.where(place >= 0, home, -1)
                j = tl.load(order + bg * T + tl.load(first + bg * C + home, mask=home >= 0, other=0) + place,
                            mask=home >= 0, other=0)  # fmt: skip
            hot = home[:, None] == gates[None, :]
            share = tl.dot(hot.to(DTYPE), total.to(DTYPE), input_precision="ieee")
            mine = (tl.sum(hot.to(tl.int32), 1) > 0)[:, None] & (tl.arange(0, DP) < d)[None, :]
            out = (bg * T + j)[:, None] * (2 * d) + column[None, :]
            if kind == 0:
                tl.store(whole + out, share.to(DTYPE), mask=mine)
            else:
                tl.store(rest + out, share.to(DTYPE), mask=mine)
        line = ((bg * note_ticks + chunk * ticks + tick) * KINDS + kind) * C + gates
        total += tl.load(grad + line[:, None] * (2 * d) + column[None, :], mask=fits, other=0.0).to(tl.float32)


@triton.jit
def far_key_kernel(
    q, k, v, do, lse, delta, gate, rank, order, first, before, count_base, bucket_count, bucket_rows, far,
    T, G, d, C, window, ring, block, chunks, segments, scale, natural, k_batch, k_token, v_batch, v_token,
    DTYPE: tl.constexpr, CH: tl.constexpr, SEG: tl.constexpr, R: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
    BN: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradient of keys and values from rings, far (B G, T, 2 d): BN keys in (gate, position) order at a time."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    column = tl.arange(0, DP)
    count = tl.load(count_base + (bg * (chunks + 1) + chunks) * C + C - 1) + tl.load(first + bg * C + C - 1)
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    here = at < count
    j = tl.load(order + bg * T + at, mask=here, other=0)
    home = tl.load(gate + bg * T + j, mask=here, other=-1)
    place = tl.load(rank + bg * T + j, mask=here, other=0)
    keys = load_rows(k + b * k_batch + g * d, k, j, k_token, G, column, here, d, False, DTYPE)
    values = load_rows(v + b * v_batch + g * d, v, j, v_token, G, column, here, d, False, DTYPE)
    dk, dv = tl.zeros((BN, DP), tl.float32), tl.zeros((BN, DP), tl.float32)
    if tl.max(home, 0) >= 0:
        for c in range(tl.min(tl.where(here, home, C), 0), tl.max(home, 0) + 1):
            mine = home == c
            oldest, newest = tl.min(tl.where(mine, j, T), 0), tl.max(tl.where(mine, place, -1), 0)
            # From the tick at which the oldest of these keys leaves the window until the newest leaves the ring.
            start = ((oldest + window) // block + 1) * block // SEG
            over = tl.load(first + bg * C + c) + newest + ring
            total = tl.load(count_base + (bg * (chunks + 1) + chunks) * C + c)
            last = tl.where(newest + ring < total, tl.load(order + bg * T + tl.minimum(over, T - 1)), T)
            stop = tl.minimum((last + window) // block * block // SEG + 1, segments)
            for segment in range(start, tl.where(newest >= 0, stop, start)):
                bucket = (bg * segments + segment) * C + c
                size = tl.load(bucket_count + bucket)
                for i0 in range(0, size, M):
                    i = i0 + tl.arange(0, M)
                    ok = i < size
                    name = tl.load(bucket_rows + bucket * (SEG * R) + i, mask=ok, other=0)
                    t = segment * SEG + name // (R * N)
                    retired = retired_at(t // block, count_base, before, bg, c, chunks, C, block, ok, CH)
                    seen = ok[:, None] & mine[None, :]
                    seen = seen & (place[None, :] >= retired[:, None] - ring) & (place[None, :] < retired[:, None])
                    if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
                        line = (b * T + t) * (G * R) + g * R + name // N % R
                        fits = ok[:, None] & (column < d)[None, :]
                        x = tl.load(q + line[:, None] * d + column[None, :], mask=fits, other=0.0)
                        y = tl.load(do + line[:, None] * d + column[None, :], mask=fits, other=0.0)
                        log, dl = load_stats(lse, delta, line, ok)
                        p, ds = weights(x, y, keys, values, seen, 0.0, scale, log, dl)
                        dk = tl.dot(tl.trans(ds.to(DTYPE)), x, dk, input_precision="ieee")
                        dv = tl.dot(tl.trans(p.to(DTYPE)), y, dv, input_precision="ieee")
    out = far + (bg * T + j)[:, None] * (2 * d) + column[None, :]
    fits = here[:, None] & (column < d)[None, :]
    tl.store(out, (dk * natural).to(DTYPE), mask=fits)
    tl.store(out + d, dv.to(DTYPE), mask=fits)


@triton.jit
def read_by_rows(
    dk, dv, q, do, lse, delta, b, g, keys, values, j, start, stop, anchors_only, T, G, r, d, window, block, anchors,
    end, scale, DTYPE: tl.constexpr, M: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Add the gradient of keys j from rows of tokens [start, stop): read in the window, or as anchors outside it."""
    column = tl.arange(0, DP)
    for m0 in range(start * r, stop * r, M):
        m = m0 + tl.arange(0, M)
        t = m // r
        ok = (m < stop * r) & (t < end)
        line = (b * T + t) * (G * r) + g * r + m % r
        fits = ok[:, None] & (column < d)[None, :]
        x = tl.load(q + line[:, None] * d + column[None, :], mask=fits, other=0.0)
        y = tl.load(do + line[:, None] * d + column[None, :], mask=fits, other=0.0)
        log, dl = load_stats(lse, delta, line, ok)
        edge = t // block * block - window
        inside = (j[None, :] <= t[:, None]) & (j[None, :] >= edge[:, None])
        gone = (j[None, :] < anchors) & (j[None, :] < edge[:, None])
        seen = ok[:, None] & tl.where(anchors_only, gone, inside) & (j < end)[None, :]
        p, ds = weights(x, y, keys, values, seen, 0.0, scale, log, dl)
        dk = tl.dot(tl.trans(ds.to(DTYPE)), x, dk, input_precision="ieee")
        dv = tl.dot(tl.trans(p.to(DTYPE)), y, dv, input_precision="ieee")
    return dk, dv


@triton.jit
def anchor_kernel(
    q, k, v, do, lse, delta, length, grad, T, G, r, d, window, block, anchors, scale, natural,
    k_batch, k_token, v_batch, v_token,
    KEEP: tl.constexpr, DTYPE: tl.constexpr, SPAN: tl.constexpr, AP: tl.constexpr, M: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradient of anchors from rows that have them outside the window: grad (B G, spans, AP, 2 d) float32, SPAN tokens
    at a time."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    column, j = tl.arange(0, DP), tl.arange(0, AP)
    end = T
    if KEEP:
        end = tl.load(length + b).to(tl.int32)
    keys = load_rows(k + b * k_batch + g * d, k, j, k_token, G, column, j < tl.minimum(anchors, T), d, False, DTYPE)
    values = load_rows(v + b * v_batch + g * d, v, j, v_token, G, column, j < tl.minimum(anchors, T), d, False, DTYPE)
    dk, dv = tl.zeros((AP, DP), tl.float32), tl.zeros((AP, DP), tl.float32)
    start = tl.program_id(0) * SPAN
    dk, dv = read_by_rows(dk, dv, q, do, lse, delta, b, g, keys, values, j, start, tl.minimum(start + SPAN, end), True,
                          T, G, r, d, window, block, anchors, end, scale, DTYPE, M, DP)  # fmt: skip
    at = ((bg * tl.num_programs(0) + tl.program_id(0)) * AP + j)[:, None] * (2 * d) + column[None, :]
    fits = (j < AP)[:, None] & (column < d)[None, :]
    tl.store(grad + at, dk * natural, mask=fits)
    tl.store(grad + at + d, dv, mask=fits)


@triton.jit
def near_key_kernel(
    q, k, v, do, lse, delta, far, whole, rest, anchor_grad, length, dk_out, dv_out,
    T, G, r, d, window, block, anchors, scale, natural, k_batch, k_token, v_batch, v_token,
    FAR: tl.constexpr, KINDS: tl.constexpr, ANCHORS: tl.constexpr, KEEP: tl.constexpr, DTYPE: tl.constexpr,
    AP: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradient of the rotated keys and of the values (B, T, G, d): that from windows plus the parts computed before."""
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    column = tl.arange(0, DP)
    start = tl.program_id(0) * BN
    j = start + tl.arange(0, BN)
    here = j < T
    end = T
    if KEEP:
        end = tl.load(length + b).to(tl.int32)
    keys = load_rows(k + b * k_batch + g * d, k, j, k_token, G, column, here, d, False, DTYPE)
    values = load_rows(v + b * v_batch + g * d, v, j, v_token, G, column, here, d, False, DTYPE)
    dk, dv = tl.zeros((BN, DP), tl.float32), tl.zeros((BN, DP), tl.float32)
    stop = tl.minimum((start + BN - 1 + window) // block * block + block, end)
    dk, dv = read_by_rows(dk, dv, q, do, lse, delta, b, g, keys, values, j, start, stop, False, T, G, r, d, window,
                          block, anchors, end, scale, DTYPE, M, DP)  # fmt: skip
    dk *= natural
    fits = here[:, None] & (column < d)[None, :]
    at = (bg * T + j)[:, None] * (2 * d) + column[None, :]
    if FAR:
        dk += tl.load(far + at, mask=fits, other=0.0).to(tl.float32)
        dv += tl.load(far + at + d, mask=fits, other=0.0).to(tl.float32)
    if KINDS > 0:
        dk += tl.load(whole + at, mask=fits, other=0.0).to(tl.float32)
        dv += tl.load(whole + at + d, mask=fits, other=0.0).to(tl.float32)
    if KINDS > 1:
        dk += tl.load(rest + at, mask=fits, other=0.0).to(tl.float32)
        dv += tl.load(rest + at + d, mask=fits, other=0.0).to(tl.float32)
    if ANCHORS:
        a_at = (bg * AP + j)[:, None] * (2 * d) + column[None, :]
        dk += tl.load(anchor_grad + a_at, mask=fits & (j < AP)[:, None], other=0.0)
        dv += tl.load(anchor_grad + a_at + d, mask=fits & (j < AP)[:, None], other=0.0)
    out = ((b * T + j) * G + g)[:, None] * d + column[None, :]
    tl.store(dk_out + out, dk.to(DTYPE), mask=fits)
    tl.store(dv_out + out, dv.to(DTYPE), mask=fits)
