"""Triton kernels that choose among many gates: those a row opens while their keys fit, and those whose notes it reads.

One program compares all gates of a few rows; a set of gates is a bit each, in words of 32. Axes and names as in
`index`.
"""

import triton
import triton.language as tl

from .forward import retired_at

NOTHING = tl.constexpr(-0x7F800001)  # what `sortable` makes of -inf


@triton.jit
def sortable(score):
    """Whole numbers in the order of float32 scores."""
    return flip((score + 0.0).to(tl.int32, bitcast=True))  # -0.0 becomes 0.0


@triton.jit
def flip(bits):
    """The bits of negative numbers turned round, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def between(low, high):
    """A whole number above low and below high, in the middle of the scores that they stand for if there is one."""
    score = (flip(low).to(tl.float32, bitcast=True) + flip(high).to(tl.float32, bitcast=True)) * 0.5
    middle = sortable(score)
    return tl.where((middle > low) & (middle < high), middle, (low >> 1) + (high >> 1) + (low & high & 1))


@triton.jit
def best_while_they_fit(key, cost, most, plenty):
    """The largest keys of each row of key (M, CP) whose costs add up to `most` or less; of equal keys the first.

    A cost is 65,536 for a gate, plus what it takes up; `most` likewise, and both parts must fit. Keys that are NOTHING
    are never taken. Returns a mask, a number `low`, and how many keys of each row are above `low`: more than `plenty`,
    or all. `best_of_the_rest` begins its search there.
    """
    real = key > NOTHING
    low = tl.min(tl.where(real, key, 0x7FFFFFFF), 1) - 1
    return halve(key, tl.where(real, cost, 0), most, low, tl.sum(tl.where(real, cost, 0), 1), plenty)


@triton.jit
def best_of_the_rest(key, count, low, above):
    """The `count` largest of each row of key (M, CP); of equal keys the first. low, above: those of
    `best_while_they_fit`, less the keys that it took: `above` keys are larger than `low`, more than `count` or all."""
    cost = tl.where(key > NOTHING, 1 << 16, 0)
    chosen, _, _ = halve(key, cost, count << 16, low, above << 16, count)
    return chosen


@triton.jit
def halve(key, cost, most, low, beyond, plenty):
    """As `best_while_they_fit`, by halving what is between `low` and the largest key.

    beyond: what the keys above `low` cost, which is too much, or all there is. cost: 0 for keys that are NOTHING.
    """
    high = tl.max(key, 1)  # keys above it fit
    taken = tl.zeros_like(high)  # what the keys above `high` cost
    known, above = low, beyond >> 16
    whole = fit(beyond, most)
    high = tl.where(whole, NOTHING, high)
    low = tl.where(whole, NOTHING, low)
    taken = tl.where(whole, beyond, taken)
    while tl.max(((high > low + 1) & ((beyond >> 16) > (taken >> 16) + 1)).to(tl.int32), 0) > 0:
        middle = between(low, high)
        here = tl.sum(tl.where(key > middle[:, None], cost, 0), 1)
        fits, many = fit(here, most), (here >> 16) > plenty
        known, above = tl.where(many, middle, known), tl.where(many, here >> 16, above)
        high, taken = tl.where(fits, middle, high), tl.where(fits, here, taken)
        low, beyond = tl.where(fits, low, middle), tl.where(fits, beyond, here)
    chosen = key > high[:, None]
    if tl.max((~whole & ((beyond >> 16) > (taken >> 16) + 1)).to(tl.int32), 0) > 0:  # several keys are equal to `high`
        equal = (key == high[:, None]) & ~whole[:, None]
        chosen = chosen | (equal & fit(taken[:, None] + tl.cumsum(tl.where(equal, cost, 0), 1), most))
    return chosen, known, above


@triton.jit
def fit(cost, most):
    """Whether both parts of a cost are within `most`."""
    return ((cost >> 16) <= (most >> 16)) & ((cost & 0xFFFF) <= (most & 0xFFFF))


@triton.jit
def store_bits(at, chosen, words, CP: tl.constexpr, COUNT: tl.constexpr):
    """Write the mask chosen (1, CP) as `words` words of 32 bits. COUNT: of 64; the lower half holds the bits, the upper
    half how many bits of the words before are set."""
    WORD: tl.constexpr = min(CP, 32)
    word = tl.arange(0, CP // WORD)
    each = chosen.to(tl.int32).reshape(CP // WORD, WORD)
    bits = tl.sum(each << tl.arange(0, WORD)[None, :], 1)
    if COUNT:
        held = tl.sum(each, 1)
        earlier = (tl.cumsum(held, 0) - held).to(tl.int64)
        bits = (bits.to(tl.int64) & 0xFFFFFFFF) | (earlier << 32)
    tl.store(at + word, bits, mask=word < words)


@triton.jit
def choose_kernel(
    scores, before, count_base, probes, opened, noted,
    T, t0, rows, G, r, C, n, e, ring, ring_reads, block, chunks,
    FILL: tl.constexpr, SOME: tl.constexpr, CH: tl.constexpr, NP: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """The gates that the heads of one token and group open and, with SOME, the e best others, whose notes they read.

    scores (B, rows, G r, C) float32, -inf for gates that cannot be opened; probes (B, rows, G r, n), -1 for none;
    opened (B, rows, G r, words) int64 and noted, likewise int32, as `store_bits` writes them. With FILL a row opens
    gates only as long as their rings hold ring_reads keys or fewer.
    """
    at, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    c, slot = tl.arange(0, CP)[None, :], tl.arange(0, NP)[None, :]
    cost, most, words = tl.full((1, CP), 1 << 16, tl.int32), n << 16, tl.cdiv(C, 32)
    if FILL:
        tick = (t0 + at) // block
        cost += tl.minimum(retired_at(tick, count_base, before, bg, c, chunks, C, block, c < C, CH), ring)
        most += ring_reads
    for h in range(r):
        line = (b * rows + at) * (G * r) + g * r + h
        key = sortable(tl.load(scores + line * C + c, mask=c < C, other=-float("inf")))
        chosen, low, above = best_while_they_fit(key, cost, most, n + e)
        place = tl.cumsum(chosen.to(tl.int32), 1)
        some = tl.max(place, 1)
        tl.store(probes + line * n + place - 1, c, mask=chosen)
        tl.store(probes + line * n + slot, -1, mask=(slot >= some[:, None]) & (slot < n))
        store_bits(opened + line * words, chosen, words, CP, True)
        if SOME:
            read = best_of_the_rest(tl.where(chosen, NOTHING, key), e, low, above - some)
            store_bits(noted + line * words, read, words, CP, False)


@triton.jit
def count_bits(x):
    """How many of the 32 bits of x are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + ((x >> 4) & 0x0F0F0F0F)) & 0x0F0F0F0F
    return (x + (x >> 8) + (x >> 16) + (x >> 24)) & 0xFF


@triton.jit
def bucket_bits_kernel(
    opened, bucket_count, bucket_rows, rows, G, C, segments,
    SEG: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """As `index.bucket_kernel`, from the bits `opened`: a row's probes come in the order of their gates."""
    quads, words = tl.cdiv(C, 4), tl.cdiv(C, 32)
    segment, quad = tl.program_id(0) // quads, tl.program_id(0) % quads
    bg = tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    bucket = (bg * segments + segment) * C + quad * 4
    opened += ((b * rows + segment * SEG) * G + g) * (R * words)
    shift = quad % 8 * 4
    count = tl.zeros((1,), tl.int64)
    for at in range(0, SEG * R, BT):
        name = at + tl.arange(0, BT)
        token = name // R
        here = (name < SEG * R) & (segment * SEG + token < rows)
        row = opened + token * (G * R * words) + name % R * words
        both = tl.load(row + quad // 8, mask=here, other=0)
        word = (both & 0xFFFFFFFF).to(tl.int32)
        four = (word >> shift) & 15
        if tl.max(four, 0) > 0:
            slot = (both >> 32).to(tl.int32) + count_bits(word & ((1 << shift) - 1))
            wide = four.to(tl.int64)
            one = (wide & 1) | ((wide & 2) << 15) | ((wide & 4) << 30) | ((wide & 8) << 45)
            place = count + tl.cumsum(one, 0)
            for i in tl.static_range(4):
                hit = ((four >> i) & 1) != 0
                tl.store(bucket_rows + (bucket + i) * (SEG * R) + ((place >> (16 * i)) & 0xFFFF) - 1, name * N + slot,
                         mask=hit)  # fmt: skip
                slot += hit.to(tl.int32)
            count += tl.sum(one, 0)
    four = tl.arange(0, 4)
    tl.store(bucket_count + bucket + four, ((count >> (four * 16).to(tl.int64)) & 0xFFFF).to(tl.int32),
             mask=quad * 4 + four < C)  # fmt: skip
