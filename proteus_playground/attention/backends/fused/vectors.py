"""Triton kernels and functions that load, rotate, multiply and store vectors.

Axes: `B` batch, `T` tokens, `G` KV groups, `d` head dim. A name in capitals is known when a kernel is compiled; `HP`
and `DP` are d / 2 and d, rounded up to powers of two.
"""

import triton
import triton.language as tl


@triton.jit
def sharp_dot(x, p, acc):
    """acc + x @ p for a float32 p, exact to float32 rounding: p is split into parts that fit x's precision."""
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
    """Cosine and sine of position x frequency, `(rows, HP)` float32, to 1e-6 at angles below 2^31.

    Products are float64 and reduced to an eighth of a turn, since float32 holds a large angle too coarsely. The
    library's functions use local memory for large angles and take ten times as long.
    """
    frequency = tl.load(inv_freq + half, mask=half < d // 2, other=0.0).to(tl.float64)
    angle = position.to(tl.float64)[:, None] * frequency[None, :]
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)  # quarter turns
    x = (angle - turns * 1.5707963267948966).to(tl.float32)
    y = x * x
    sine = x + x * y * (-0.16666654611 + y * (0.0083321608736 + y * -0.00019515295891))
    cosine = 1 - 0.5 * y + y * y * (0.04166664568298827 + y * (-0.001388731625493765 + y * 2.443315711809948e-05))
    quarter = (turns.to(tl.int64) & 3).to(tl.int32)
    swap = (quarter & 1) == 1
    cos, sin = tl.where(swap, sine, cosine), tl.where(swap, cosine, sine)
    return tl.where(((quarter + 1) & 2) == 2, -cos, cos), tl.where((quarter & 2) == 2, -sin, sin)


@triton.jit
def positions_of(position, offset, t, rows):
    """Positions of tokens t: as given, or 0, 1, ... when `position` is None."""
    if position is None:  # noqa: SIM108 - a compile-time branch
        where = t
    else:
        where = tl.load(position + offset + t, mask=rows, other=0)
    return where


@triton.jit
def turn(first, second, cos, sin):
    """RoPE on both halves `(rows, HP)` of a tile, computed in float32, returned in the tile's precision."""
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
    """Store rows whose halves are x and y (rows, HP) as int8, and their scales, max |value| / 127."""
    x, y = x.to(tl.float32), y.to(tl.float32)
    top = tl.maximum(tl.max(tl.abs(x), 1), tl.max(tl.abs(y), 1))
    scale = tl.maximum(top / 127.0, 1e-30)
    tl.store(scale_at, scale, mask=rows)
    tl.store(at[0], tl.floor(x / scale[:, None] + 0.5).to(tl.int8), mask=fits)
    tl.store(at[1], tl.floor(y / scale[:, None] + 0.5).to(tl.int8), mask=fits)


@triton.jit
def load_scales(scale, t, G, rows, INT8: tl.constexpr):
    """Factors of the stored rows at tokens t, `(1, rows)`: their scales for int8, else 1."""
    if INT8:  # noqa: SIM108 - a compile-time branch
        scales = tl.load(scale + t.to(tl.int64) * G, mask=rows, other=0.0)[None, :]
    else:
        scales = 1.0
    return scales


@triton.jit
def load_stored(x, t, stride, column, rows, d, DTYPE: tl.constexpr):
    """Rows `(rows, DP)` at tokens t without their scales; int8 values are exact in every DTYPE."""
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
