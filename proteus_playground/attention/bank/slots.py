"""The slots that hold a bank's keys, and how keys move among them: from the window to a ring, from there to a note.

Axes: `B` sequences, `G` KV groups, `C` gates per group, `d` head dim, `m` ring, `K` keys moved at once, `S` slots:

    anchors | window: w + b | ring of gate 0: m | ring of gate 1: m | ... | scratch: 1

Writes that are masked out go to the scratch slot.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import Budget
from ..gates import Gates
from ..int8 import quantize_rows
from ..precision import at_least_float32, wide_dtype
from ..rope import rotate

DENSE_START = 64  # slots that a dense cache starts with


class Keys(NamedTuple):
    """Keys and values being moved, `(B, G, K)`, as they are stored."""

    rows: Tensor  # (B, G, K, 2, d)
    scales: Tensor | None  # (B, G, K, 2) float32 for int8
    token: Tensor  # (B, G, K)
    gate: Tensor  # (B, G, K), -1 for anchors

    def newest(self, n: int) -> Keys:
        return Keys(*(None if x is None else x[:, :, -n:] for x in self))


class Slots:
    """The tensors of a bank, and how keys move among them. Everything happens in place, for all sequences at once.

    The n-th kept token of a sequence is written to slot n mod (w + b) of the window. Once it has left the window, the
    n-th key of its gate is in slot n mod m of the gate's ring, until a newer key replaces it there.
    """

    # Name in files -> attribute.
    TENSORS = {
        "rows": "rows",
        "scales": "scales",
        "token": "token",
        "gate": "gate",
        "sums": "sums",
        "lost": "rounding_error",
        "left": "retired",
        "count": "count",
        "seen": "seen",
        "next_position": "next_position",
    }

    rows: Tensor  # (B, G, S, 2, d), keys rotated at their own positions, and values
    scales: Tensor  # (B, G, S, 2) float32 where rows are int8, else (B, G, S, 0)
    token: Tensor  # (B, G, S) int64, index in the sequence of the token in each slot; -1 for an empty slot
    gate: Tensor  # (B, G, S) int32, gate of the key in a slot of the window; -1 for anchors
    sums: Tensor  # (B, G, 2, C, 2, d) float32, over all keys that left the window, and over those that no ring holds
    rounding_error: Tensor  # like sums, what rounding has added to them
    retired: Tensor  # (B, G, C) int64, keys of each gate that have left the window
    count: Tensor  # (B,) int64, kept tokens
    seen: Tensor  # (B,) int64, tokens, dropped ones included
    next_position: Tensor  # (B,) int64, position of the next token unless one is given

    def __init__(
        self,
        budget: Budget,
        gates: Gates,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        inv_freq: Tensor | None,
        scale: float,
        reach: int | None = None,
        tokens: int = 0,
    ):
        self.budget, self.gates = budget, gates
        self.scale, self.reach, self.tokens = scale, reach, tokens
        self.inv_freq = None if inv_freq is None else inv_freq.to(device)
        if budget.dense:
            self.anchors, self.ring, self.notes = 0, 0, 0
            self.window = min(DENSE_START, budget.tokens)
        else:
            self.anchors, self.ring, self.notes = budget.anchors, budget.ring, budget.notes
            self.window = budget.window + budget.block
        G, C, d = gates.prototypes.shape
        noted = C if self.notes else 0
        slots = self.anchors + self.window + C * self.ring + 1
        shapes = {
            "rows": ((batch, G, slots, 2, d), dtype, 0),
            "scales": ((batch, G, slots, 2 if dtype == torch.int8 else 0), torch.float32, 0),
            "token": ((batch, G, slots), torch.int64, -1),
            "gate": ((batch, G, slots), torch.int32, -1),
            "sums": ((batch, G, 2, noted, 2, d), wide_dtype(dtype), 0),
            "rounding_error": ((batch, G, 2, noted, 2, d), wide_dtype(dtype), 0),
            "retired": ((batch, G, C), torch.int64, 0),
            **dict.fromkeys(("count", "seen", "next_position"), ((batch,), torch.int64, 0)),
        }
        with torch.inference_mode(False):  # so that a bank made in inference mode can be stepped outside it
            for name, (shape, kind, fill) in shapes.items():
                setattr(self, name, torch.full(shape, fill, dtype=kind, device=device))

    @property
    def int8(self) -> bool:
        return self.rows.dtype == torch.int8

    def grow(self, tokens: int) -> None:
        """Make room for `tokens` tokens in a dense cache; the room at least doubles."""
        room = min(max(tokens, 2 * self.window), self.budget.tokens) - self.window
        with torch.inference_mode(False):
            self.rows = F.pad(self.rows, (0, 0, 0, 0, 0, room))
            self.token, self.gate = (F.pad(x, (0, room), value=-1) for x in (self.token, self.gate))
            self.scales = F.pad(self.scales, (0, 0, 0, room))
        self.window += room

    def _new_keys(self, k: Tensor, rotated: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Keys, Tensor]:
        """New keys as they are stored, and the index `(B, n)` of each among the sequence's kept tokens."""
        n, at = k.shape[1], torch.arange(k.shape[1], device=k.device)
        index = self.count[:, None] + (at if keep is None else keep.cumsum(1) - 1)
        rows = torch.stack((rotated, v), dim=3).transpose(1, 2)  # (B, G, n, 2, d)
        if keep is not None:
            rows = rows.masked_fill(~keep[:, None, :, None, None], 0)  # padding may hold any value, NaN included
        rows, scales = quantize_rows(rows) if self.int8 else (rows.to(self.rows.dtype), None)
        token = (self.seen[:, None] + at)[:, None].expand(rows.shape[:3])
        if self.budget.dense:
            gate = torch.full_like(token, -1)
        else:
            gate = self.gates.lure(k)[0].transpose(1, 2).masked_fill((index < self.anchors)[:, None], -1)
        self.seen += n
        return Keys(rows, scales, token, gate), index

    def write_many(
        self, k: Tensor, rotated: Tensor, v: Tensor, keep: Tensor | None, window_is_empty: bool = False
    ) -> None:
        """Many tokens at once: keys that the last row no longer has in its window go to rings and notes directly."""
        new, index = self._new_keys(k, rotated, v, keep)
        count = self.count + (k.shape[1] if keep is None else keep.sum(1))
        stays = keep
        if not self.budget.dense:
            edge = (count - 1)[:, None] // self.budget.block * self.budget.block - self.budget.window
            if not window_is_empty:
                held = self.count[:, None] + torch.arange(-self.window, 0, device=k.device)
                self._empty_window(held, held < edge)
            leaves = index < edge
            self._retire(new, index, leaves if keep is None else leaves & keep)
            stays = ~leaves if keep is None else keep & ~leaves
            if keep is None:  # only the newest keys, at most a window of them, can stay
                new, index, stays = new.newest(self.window), index[:, -self.window :], stays[:, -self.window :]
        self._put(new, (self.anchors + index % self.window)[:, None], None if stays is None else stays[:, None])
        self.count.copy_(count)

    def write(self, k: Tensor, rotated: Tensor, v: Tensor, keep: Tensor | None) -> None:
        """Tokens of one block. Where they begin a new block, the oldest block of keys first leaves the window."""
        if not self.budget.dense:
            b = self.budget.block
            due = self._due(keep)
            if k.device.type != "cpu" or due.any():  # on a GPU the test would make the host wait; a CUDA graph cannot
                self._stop_ageing(due)
                oldest = self.count[:, None] + torch.arange(b, device=k.device) - self.window
                self._empty_window(oldest, due.expand(-1, b))
        new, index = self._new_keys(k, rotated, v, keep)
        self._put(new, (self.anchors + index % self.window)[:, None], None if keep is None else keep[:, None])
        self.count += k.shape[1] if keep is None else keep.sum(1)

    def _due(self, keep: Tensor | None) -> Tensor:
        """Which sequences begin a block with tokens of which `keep` `(B, n)` take part: `(B, 1)` bool."""
        due = (self.count % self.budget.block == 0)[:, None]
        return due if keep is None else due & keep.any(1, keepdim=True)

    def _stop_ageing(self, due: Tensor) -> None:
        """Rotate anchors, rings and sums by one block, in sequences that begin one (`due`, (B, 1)) beyond `reach`."""
        if self.reach is None or self.inv_freq is None:
            return
        turn = (due & (self.count > self.reach - self.budget.block)[:, None]) * self.budget.block  # (B, 1), tokens
        first = self.anchors + self.window  # slot of the first ring
        for far in (self.rows[:, :, : self.anchors, 0], self.rows[:, :, first:, 0], self.sums[..., 0, :]):
            if far.numel():
                far.copy_(rotate(far.flatten(1, -2)[:, None], turn, self.inv_freq).view(far.shape))

    def _empty_window(self, index: Tensor, leaves: Tensor) -> None:
        """Retire the window's keys of kept tokens `index` (B, K), in order, where `leaves` (B, K)."""
        slot = (self.anchors + index % self.window)[:, None]
        keys = self.keys_at(slot)
        leaves = leaves & (keys.token[:, 0] >= 0)  # an empty slot holds nothing to retire
        self._retire(keys, index, leaves)
        self.token.view(-1).index_fill_(0, self._flat(torch.where(leaves[:, None], slot, self.scratch)), -1)

    def _retire(self, keys: Keys, index: Tensor, leaves: Tensor) -> None:
        """Keys `(B, G, K)` leave the window where `leaves` (B, K). Anchors go to slots of their own, the others to the
        ring of their gate; sum ALL of the gate adds each of these, sum REST each key that the ring no longer holds."""
        leaves, index = leaves[:, None], index[:, None]
        gate = keys.gate.long()
        home, lured = gate.clamp(min=0), leaves & (gate >= 0)
        C, m = self.retired.shape[2], self.ring
        hot = (gate[:, :, None] == torch.arange(C, device=gate.device)[:, None]) & leaves[:, :, None]  # (B, G, C, K)
        order = hot.cumsum(-1, dtype=torch.int32)
        arrived = order[..., -1].long()
        nth = order.gather(2, home[:, :, None])[:, :, 0]  # from 1, among those that arrive at the gate
        slot, stays = index.expand_as(gate), leaves & (gate < 0)
        if m:
            rings = lured & (arrived.gather(2, home) - nth < m)
            place = self.anchors + self.window + home * m + (self.retired.gather(2, home) + nth - 1) % m
            slot, stays = torch.where(rings, place, slot), stays | rings
        if self.notes:
            added_to_all = added_to_rest = as_read(keys)
            if m:  # a key that enters the ring displaces one; keys beyond the ring's size pass straight through
                replaced = self.keys_at(torch.where(rings, place, self.scratch))
                displaced = as_read(replaced).masked_fill((replaced.token < 0)[..., None, None], 0)
                added_to_rest = torch.where(rings[..., None, None], displaced, added_to_all)
            added = torch.stack((added_to_all, added_to_rest), dim=2).flatten(-2)
            self._add((hot.to(added.dtype)[:, :, None] @ added).view_as(self.sums))  # (B, G, 2, C, 2, d)
        self._put(keys, slot, stays)
        self.retired += arrived

    def _add(self, added: Tensor) -> None:
        """Add to the sums with Kahan's compensation, so that rounding errors do not pile up over an endless text."""
        added = added - self.rounding_error
        total = self.sums + added
        self.rounding_error.copy_(total - self.sums - added)
        self.sums.copy_(total)

    @property
    def scratch(self) -> int:
        """The slot that takes writes which are masked out; it never holds a key."""
        return self.token.shape[2] - 1

    def _flat(self, slot: Tensor) -> Tensor:
        """Slots `(B or 1, G or 1, K)` as indices into the slots of all sequences and groups: `(B G K,)`."""
        B, G, S = self.token.shape
        first = torch.arange(0, B * G * S, S, device=slot.device).view(B, G, 1)
        return (first + slot).flatten()

    def keys_at(self, slot: Tensor) -> Keys:
        """The keys in slots `(B, G or 1, K)`."""
        at = self._flat(slot)
        shape = (*self.token.shape[:2], slot.shape[2])

        def take(x: Tensor) -> Tensor:
            return x.flatten(0, 2).index_select(0, at).view(*shape, *x.shape[3:])

        return Keys(take(self.rows), take(self.scales) if self.int8 else None, take(self.token), take(self.gate))

    def _put(self, keys: Keys, slot: Tensor, valid: Tensor | None) -> None:
        """Write keys `(B, G, K)` to `slot`, where `valid`; both broadcast to `(B, G, K)`. None: everywhere."""
        at = self._flat(slot if valid is None else torch.where(valid, slot, self.scratch))
        for name, new in keys._asdict().items():
            if new is not None:
                mine = getattr(self, name)
                mine.flatten(0, 2).index_copy_(0, at, new.flatten(0, 2).to(mine.dtype))
        if valid is not None:  # the scratch slot holds nothing
            self.rows[:, :, -1], self.token[:, :, -1] = 0, -1


def as_read(keys: Keys) -> Tensor:
    """Keys and values `(..., 2, d)` as a row reads them, float32."""
    rows = at_least_float32(keys.rows)
    return rows if keys.scales is None else rows * keys.scales[..., None]
