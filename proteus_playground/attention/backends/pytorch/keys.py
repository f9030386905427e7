"""Keys in (gate, position) order, where every ring is a run of rows and every note the mean of a prefix.

Each gate starts at a multiple of `chunk` rows, so the place of a key in its chunk, and with it every rounding, depends
only on earlier keys of its gate. All sizes are bounds that the host can compute without waiting for the device.

Axes: `B` batch, `T` tokens, `G` KV groups, `C` gates, `N` blocks per sequence, `R` rows, `d` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...precision import wide_dtype
from ...shortlist import Shortlist
from .tile import take_rows

MEAN_ROWS = 1 << 19  # rows of running sums, in float32, held at a time


@dataclass(frozen=True)
class SortedKeys:
    """Keys and values by (sequence, group, gate, position), with zero rows between gates and at the end."""

    rows: Tensor  # (R, 2 d), [k | v]
    newest: Tensor  # (B, N, G, C) int32, row of the newest key that has left the window at a tick; R for none
    first: Tensor  # (R / chunk,) row at which the gate of each chunk starts, R past the last gate
    chunk: int

    def opening(self, column: int, ring: int) -> Tensor:
        """For each column of `column` rows, the first row that a query row reads whose newest key lies there: int32."""
        home = torch.arange(0, len(self.rows), column, dtype=torch.int32, device=self.rows.device)
        first = self.first.int().repeat_interleave(self.chunk // column)
        return torch.maximum(home + (1 - ring), first)


def sort_keys(kv: Tensor, short: Shortlist, chunk: int) -> SortedKeys:
    """Sort `kv`, [k | v] of `(B, T, G, 2 d)`; chunk: a power of two."""
    B, T, G = short.gate.shape
    C, device = short.gates_per_group, kv.device
    stream = torch.arange(B * G, device=device).view(B, 1, G)
    home = torch.where(short.gate < 0, B * G * C, short.gate + stream * C).int()
    ranked, order = home.flatten().sort(stable=True)
    bound = torch.searchsorted(ranked, torch.arange(B * G * C + 1, dtype=torch.int32, device=device))
    chunks = (bound.diff() + (chunk - 1)) // chunk
    after = chunks.cumsum(0)  # (B G C,) chunk in which the next gate starts
    start = (after - chunks) * chunk
    R = (B * G * (T // chunk + C) + 1) * chunk
    shift = torch.cat((start - bound[:-1], R - bound[-1:]))  # keys in no gate land at R or later
    place = (shift[ranked] + torch.arange(len(ranked), device=device)).clamp_(max=R)
    kv = pad(kv.flatten(0, 2), (0, 0, 0, 1))  # its last row is zero
    source = torch.full((R + 1,), len(kv) - 1, device=device).scatter_(0, place, order)
    retired = short.retired.transpose(1, 2)  # (B, N, G, C)
    newest = (start.view(B, 1, G, C) + retired - 1).masked_fill_(retired == 0, R).int()
    owner = torch.searchsorted(after, torch.arange(R // chunk, device=device), right=True)
    return SortedKeys(take_rows(kv, source[:R]), newest, pad(start, (0, 1), value=R)[owner], chunk)


def running_means(keys: SortedKeys, extra: Tensor) -> Tensor:
    """Row i is the mean of a gate's keys and values up to row i; after all rows a row of zeros, then `extra`.

    Inside a chunk sums are float32. They start from the sum over earlier chunks of the same gate, a difference of
    prefix sums over all gates in float64: the other gates' keys, which may be later ones, cancel exactly enough that
    nothing of them is left in float32.
    """
    rows, chunk = keys.rows, keys.chunk
    R, width = rows.shape
    pieces = rows.view(-1, chunk, width)
    at = torch.arange(R // chunk, device=rows.device)
    first = torch.minimum(keys.first // chunk, at)  # chunk in which this chunk's gate starts
    wide = wide_dtype(rows.dtype)
    total = pieces.sum(1, dtype=wide).double().nan_to_num_(0, 0, 0)
    before = total.t().contiguous().cumsum(1).t() - total
    carry = (before - before[first]).to(wide)  # (R / chunk, 2 d)
    rank = (at - first)[:, None] * chunk + torch.arange(1, chunk + 1, device=rows.device)
    share = rank.to(wide).reciprocal_()[..., None]  # (R / chunk, chunk, 1)
    tail = torch.cat((extra.new_zeros(1, width), extra))
    step = max(1, MEAN_ROWS // chunk)

    def means(i: int, out: Tensor | None = None) -> Tensor:
        sums = pieces[i : i + step].to(wide, copy=True)
        sums[:, 0] += carry[i : i + step]
        return torch.mul(sums.cumsum(1), share[i : i + step], out=out)

    if torch.is_grad_enabled():
        return torch.cat([means(i).to(rows.dtype).flatten(0, 1) for i in range(0, len(pieces), step)] + [tail])
    table = rows.new_empty(R + len(tail), width)
    table[R:] = tail
    for i in range(0, len(pieces), step):
        means(i, table[:R].view(-1, chunk, width)[i : i + step])
    return table
