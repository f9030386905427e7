"""Triton kernels that write the notes: for every gate and tick, the mean of keys that have left the window.

Each chunk is summed on its own, the sums are added up over chunks, and a second pass over each chunk writes the mean at
every tick. Axes and names as in `index`.
"""

import triton
import triton.language as tl

from .index import scan
from .vectors import load_rows


@triton.jit
def scan_sums_kernel(sums, base, carry, chunks, width, FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Running totals over chunks of `sums` (B G, chunks, width). They start from `carry` (B G, width), or from 0 where
    these chunks are the FIRST, and the last is written to the carry."""
    bg, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLS + tl.arange(0, COLS)
    held = tl.zeros((COLS,), tl.float32)
    if not FIRST:
        held = tl.load(carry + bg * width + column, mask=column < width, other=0.0)
    held = scan(sums + bg * chunks * width, base + bg * (chunks + 1) * width, chunks, width, column, held, ROWS)
    tl.store(carry + bg * width + column, held, mask=column < width)


@triton.jit
def note_block(part, C, GB: tl.constexpr):
    """The share of program `part`: gates, values (1) or keys (0), keys beyond the ring (1) or all retired ones (0)."""
    blocks = tl.cdiv(C, GB)
    return part % blocks * GB + tl.arange(0, GB), part // blocks % 2, part // (2 * blocks)


@triton.jit
def sum_keys(
    total, gates, ring_too, values, k, v, k_scale, v_scale, k_token, v_token, gate, rank, first, order,
    u, end, T, window, ring, G, d,
    INT8: tl.constexpr, DTYPE: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """total (GB, DP) plus what is added to the notes of `gates` while keys at u < end leave the window: their keys, or
    their `values`.

    The note ALL adds each key that leaves the window. The note REST adds the key that this one displaces from the ring,
    the key `ring` places earlier in the same gate.
    """
    real = (u >= window) & (u < T + window) & (u < end)
    home = tl.load(gate + u - window, mask=real, other=-1)
    j = u - window
    if ring_too > 0:
        place = tl.load(rank + j, mask=real, other=0) - ring
        home = tl.where(place >= 0, home, -1)
        j = tl.load(order + tl.load(first + home, mask=home >= 0, other=0) + place, mask=home >= 0, other=0)
    column = tl.arange(0, DP)
    if values > 0:  # two loads and not one from a chosen address, on which the AMD compiler of Triton 3.6 fails
        tile = load_rows(v, v_scale, j, v_token, G, column, home >= 0, d, INT8, DTYPE)
    else:
        tile = load_rows(k, k_scale, j, k_token, G, column, home >= 0, d, INT8, DTYPE)
    return tl.dot((gates[:, None] == home[None, :]).to(DTYPE), tile, total, input_precision="ieee")


@triton.jit
def sums_kernel(
    gate, rank, first, order, k, v, k_scale, v_scale, sums,
    T, G, d, C, window, ring, chunk0, k_batch, k_token, v_batch, v_token,
    INT8: tl.constexpr, DTYPE: tl.constexpr, CH: tl.constexpr, BS: tl.constexpr, DP: tl.constexpr, GB: tl.constexpr,
):  # fmt: skip
    """Sum of the keys and values that each chunk adds to each note: sums (B G, chunks, kinds, C, 2 d) float32.

    Axis 2 of the grid: see `note_block`.
    """
    chunk, bg = chunk0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    gates, values, ring_too = note_block(tl.program_id(2), C, GB)
    kinds = tl.num_programs(2) // (2 * tl.cdiv(C, GB))
    k, k_scale = k + b * k_batch + g * d, k_scale + b * T * G + g
    v, v_scale = v + b * v_batch + g * d, v_scale + b * T * G + g
    total = tl.zeros((GB, DP), tl.float32)
    for at in range(0, CH, BS):
        total = sum_keys(total, gates, ring_too, values, k, v, k_scale, v_scale, k_token, v_token,
                         gate + bg * T, rank + bg * T, first + bg * C, order + bg * T,
                         chunk * CH + at + tl.arange(0, BS), (chunk + 1) * CH, T, window, ring, G, d, INT8, DTYPE,
                         DP)  # fmt: skip
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
    """Means at each tick, `notes` (B G, ticks, kinds, C, 2 d): of all retired keys, and of those less the ring."""
    chunk, bg = chunk0 + tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    gates, values, ring_too = note_block(tl.program_id(2), C, GB)
    kinds = tl.num_programs(2) // (2 * tl.cdiv(C, GB))
    k, k_scale = k + b * k_batch + g * d, k_scale + b * T * G + g
    v, v_scale = v + b * v_batch + g * d, v_scale + b * T * G + g
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
            total = sum_keys(total, gates, ring_too, values, k, v, k_scale, v_scale, k_token, v_token,
                             gate + bg * T, rank + bg * T, first + bg * C, order + bg * T,
                             begin + at + tl.arange(0, BS), begin + block, T, window, ring, G, d, INT8, DTYPE,
                             DP)  # fmt: skip
