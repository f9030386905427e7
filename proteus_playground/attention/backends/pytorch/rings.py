"""Rings of opened gates as tiles, their number fixed in advance.

A far row is a (token, head, probe). Far rows are sorted by the newest key that they read. Those whose newest key lies
in one column of keys are then neighbours, and read the same short run: the column and the ring before it. A column with
more rows than a tile holds takes several tiles. The number of tiles is an upper bound, because the host does not wait
for the true number; tiles beyond it do empty work.

Axes: `U` blocks of `b` rows, `G` KV groups, `r` heads per group, `d` head dim, `n` probes, `m` ring, `F` far rows,
`Q` far rows and `W` keys per tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .keys import SortedKeys
from .tile import attend_tile, take_rows

SCORES_PER_STEP = 1 << 18  # scores held at a time on a CPU, so that tiles stay in cache
TILES_PER_STEP = 65535  # tiles at a time elsewhere: the most that CUDA launches along one axis


def key_columns(ring: int, rows: int, small: bool = False) -> tuple[int, int]:
    """Keys per column (a power of two) and keys per tile, for `rows` far rows per token and group.

    A column has about `rows` far rows per key. It should fill a tile of 64, and not be much smaller than the ring.
    small: it stays small, because the gates hold few keys each.
    """
    column = 16
    while not small and (
        4 * column < ring or column * rows < 64 or ring + 2 * column - 1 <= -(-(ring + column - 1) // 64) * 64
    ):
        column *= 2
    return column, -(-(ring + column - 1) // 8) * 8


def _sorted_rows(newest: Tensor, none: int) -> tuple[Tensor, Tensor]:
    """Far rows by their newest key: both sorted. Rows that read none may be left out, where that waits for nothing."""
    if newest.device.type != "cpu":
        return newest.sort(stable=True)
    far = (newest < none).nonzero()[:, 0]
    far = far if len(far) else newest.new_zeros(1, dtype=torch.int64)  # at least one, which reads none
    newest, order = newest[far].sort(stable=True)
    return newest, far[order]


class Rings:
    """Tables that all blocks of a call share, and the rings of a run of blocks."""

    def __init__(self, keys: SortedKeys, ring: int, column: int, width: int, small: bool = False):
        B, N, _, self.gates = keys.newest.shape
        self.sequence, self.many, device = N, B, keys.rows.device
        self.rows, self.column = keys.rows, column
        self.newest = pad(keys.newest, (1, 0), value=len(keys.rows)).flatten(0, 1)  # (U, G, 1 + C)
        self.opening = keys.opening(column, ring)  # (homes,) first row of each column's run
        self.edges = torch.arange(0, len(keys.rows) + 1, column, dtype=torch.int32, device=device)
        high, at = torch.arange(width + 1, device=device)[:, None], torch.arange(width, device=device)
        unread = (at >= high) | (at < high - ring)
        self.mask = keys.rows.new_zeros(width + 1, width).masked_fill_(unread, -torch.inf)  # row i reads [i - m, i)
        self.per_tile = 32 if small else 64 if width <= 64 or device.type == "cpu" else 128

    def attend(self, cut: slice, q: Tensor, opened: Tensor, scale: float):
        """Attention of q `(U, b, G, r, d)` over the rings of `opened` `(U, b, G, r, n)`, 0 for none.

        Returns out `(tiles Q, d)`, log-sum-exp `(U, b, G, r, n)`, -inf where nothing is read, and where in `out`
        each result lies, likewise.
        """
        U, b, G, r, n = opened.shape
        Q, W, d, device = self.per_tile, self.mask.shape[1], q.shape[-1], q.device
        newest = self.newest[cut][:, None, :, None].expand(U, b, G, r, -1).gather(-1, opened).flatten()
        newest, far = _sorted_rows(newest, len(self.rows))
        home, source, real = self._tiles(newest, self._bound(U, b, G, r * n))
        row = far[source]  # (tiles, Q)
        flat, step = q.reshape(-1, d), max(1, SCORES_PER_STEP // (Q * W)) if device.type == "cpu" else TILES_PER_STEP
        parts = []
        for i in range(0, len(row), step):
            at = slice(i, i + step)
            first = self.opening[home[at]][:, None]
            high = torch.where(real[at], newest[source[at]] - first + 1, 1)  # an empty slot reads one key
            parts.append(self._attend(take_rows(flat, row[at] // n), first, high, scale))
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(x) for x in zip(*parts, strict=True))
        out, lse = out.reshape(-1, d), pad(lse.reshape(-1)[:-1], (0, 1), value=-torch.inf)
        out[-1] = 0  # the last tile is empty: rows without a ring point to it
        back = torch.full((opened.numel() + 1,), len(out) - 1, dtype=torch.int32, device=device)
        slots = torch.arange(len(out), dtype=torch.int32, device=device)
        back.scatter_(0, torch.where(real, row, opened.numel()).flatten(), slots)
        back = back[:-1].view(U, b, G, r, n)
        return out, lse[back], back

    def _attend(self, q: Tensor, first: Tensor, high: Tensor, scale: float):
        """Tiles of q `(tiles, Q, d)`, each over the W keys from row `first` (tiles, 1) on, of which a row reads the
        ring that ends before `high` (tiles, Q)."""
        W, d = self.mask.shape[1], q.shape[-1]
        mask = take_rows(self.mask, high.flatten()).view(-1, 1, q.shape[1], W)
        keys = first + torch.arange(W, dtype=torch.int32, device=q.device)
        kv = take_rows(self.rows, keys.clamp_(max=len(self.rows) - 1))[:, None]  # (tiles, 1, W, 2 d)
        return attend_tile(q[:, None], kv[..., :d], kv[..., d:], mask, scale)

    def _bound(self, U: int, b: int, G: int, rows: int) -> int:
        """An upper bound of the tiles needed, one of them empty."""
        sequences = min(self.many, U // self.sequence + 2)
        columns = G * (U * b // self.column + 2 * self.gates * sequences)
        return U * b * G * rows // self.per_tile + min(columns, len(self.opening)) + 1

    def _tiles(self, newest: Tensor, tiles: int):
        """Cut sorted far rows into tiles: column `(tiles,)`, far rows in sorted order `(tiles, Q)`, which are real."""
        Q, device = self.per_tile, newest.device
        edge = torch.searchsorted(newest, self.edges, out_int32=True)  # (homes + 1,) first far row of a column
        count = (edge.diff() + (Q - 1)) // Q
        after = count.cumsum(0, dtype=torch.int32)
        if device.type == "cpu":  # on a CPU the true number costs nothing
            tiles = int(after[-1]) + 1
        number = torch.arange(tiles, dtype=torch.int32, device=device)
        home = torch.searchsorted(after, number, right=True).clamp_(max=len(count) - 1)
        start = edge[:-1] + (count - after) * Q  # of a column's first tile, less that tile's number
        at = (start[home] + number * Q)[:, None] + torch.arange(Q, dtype=torch.int32, device=device)
        return home, at.clamp(max=len(newest) - 1), at < edge[1:][home][:, None]
