"""Where a bank's keys stand, and how they move: window, then ring, then sum.

Axes: `B` sequences, `G` KV groups, `C` gates per group, `d` head dim, `m` ring, `K` keys handled at once, `S` slots:
anchors, then the window's w + b, then m per gate, then one spare where everything is written that is not to be kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import Budget
from ..gates import Gates
from ..int8 import quantize_rows
from ..rope import rotate

GROWTH = 64  # slots a dense cache starts with


class Keys(NamedTuple):
    """Keys and values on their way, `(B, G, K)`, as they are stored."""

    rows: Tensor  # (B, G, K, 2, d)
    scales: Tensor | None  # (B, G, K, 2) float32 for int8
    token: Tensor  # (B, G, K)
    gate: Tensor  # (B, G, K), -1 for anchors

    def newest(self, n: int) -> Keys:
        return Keys(*(None if x is None else x[:, :, -n:] for x in self))


class Slots:
    """The tensors of a bank, and how keys move among them. Everything happens in place, for all sequences at once.

    A key of gate c with n keys before it stands in slot n mod m of the gate's ring once it has left the window; its
    place before that is its rank among the sequence's kept tokens, modulo the window.
    """

    TENSORS = ("rows", "scales", "token", "gate", "sums", "lost", "left", "count", "seen", "next_position")

    rows: Tensor  # (B, G, S, 2, d), keys rotated at their own positions, and values
    scales: Tensor  # (B, G, S, 2) float32 where rows are int8, else (B, G, S, 0)
    token: Tensor  # (B, G, S) int64, which token of the sequence a slot holds; -1 empty
    gate: Tensor  # (B, G, S) int32, gate of the key in a slot of the window; -1 for anchors
    sums: Tensor  # (B, G, 2, C, 2, d) float32, over all keys that left the window, and over those that no ring holds
    lost: Tensor  # like sums, what rounding added to them
    left: Tensor  # (B, G, C) int64, keys that have left the window for each gate
    count: Tensor  # (B,) int64
    seen: Tensor  # (B,) int64
    next_position: Tensor  # (B,) int64, of the next token unless it is given

    def __init__(self, budget: Budget, gates: Gates, batch: int, dtype: torch.dtype, device: torch.device):
        sparse = not budget.dense
        self.budget, self.gates = budget, gates
        self.anchors, self.ring, self.notes = sparse * budget.anchors, sparse * budget.ring, sparse and budget.notes
        self.window = budget.window + budget.block if sparse else min(GROWTH, budget.tokens)
        G, C, d = gates.prototypes.shape
        slots = self.anchors + self.window + C * self.ring + 1
        shapes = {
            "rows": ((batch, G, slots, 2, d), dtype, 0),
            "scales": ((batch, G, slots, 2 * (dtype == torch.int8)), torch.float32, 0),
            "token": ((batch, G, slots), torch.int64, -1),
            "gate": ((batch, G, slots), torch.int32, -1),
            "sums": ((batch, G, 2, C * self.notes, 2, d), torch.float32, 0),
            "lost": ((batch, G, 2, C * self.notes, 2, d), torch.float32, 0),
            "left": ((batch, G, C), torch.int64, 0),
            **dict.fromkeys(("count", "seen", "next_position"), ((batch,), torch.int64, 0)),
        }
        with torch.inference_mode(False):  # so that a state made under inference mode may be stepped outside it
            for name, (shape, kind, fill) in shapes.items():
                setattr(self, name, torch.full(shape, fill, dtype=kind, device=device))

    @property
    def int8(self) -> bool:
        return self.rows.dtype == torch.int8

    def _grow(self, tokens: int) -> None:
        """Make room for `tokens` in a dense cache, at least twice what there is."""
        room = min(max(tokens, 2 * self.window), self.budget.tokens) - self.window
        with torch.inference_mode(False):
            self.rows = F.pad(self.rows, (0, 0, 0, 0, 0, room))
            self.token, self.gate = (F.pad(x, (0, room), value=-1) for x in (self.token, self.gate))
            self.scales = F.pad(self.scales, (0, 0, 0, room))
        self.window += room

    def _keys(self, k: Tensor, turned: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Keys, Tensor]:
        """New keys as they are stored, and the place `(B, n)` of each among the sequence's kept tokens."""
        n, at = k.shape[1], torch.arange(k.shape[1], device=k.device)
        index = self.count[:, None] + (at if keep is None else keep.cumsum(1) - 1)
        rows = torch.stack((turned, v), dim=3).transpose(1, 2)  # (B, G, n, 2, d)
        if keep is not None:
            rows = rows.masked_fill(~keep[:, None, :, None, None], 0)  # padding may hold anything, NaN included
        rows, scales = quantize_rows(rows) if self.int8 else (rows.to(self.rows.dtype), None)
        token = (self.seen[:, None] + at)[:, None].expand(rows.shape[:3])
        if self.budget.dense:
            gate = torch.full_like(token, -1)
        else:
            gate = self.gates.lure(k)[0].transpose(1, 2).masked_fill((index < self.anchors)[:, None], -1)
        self.seen += n
        return Keys(rows, scales, token, gate), index

    def _take_in(self, k: Tensor, turned: Tensor, v: Tensor, keep: Tensor | None) -> None:
        """Many tokens at once: what their last row's tick would have sent from the window goes there straight."""
        new, index = self._keys(k, turned, v, keep)
        count = self.count + (k.shape[1] if keep is None else keep.sum(1))
        stays = keep
        if not self.budget.dense:
            edge = (count - 1)[:, None] // self.budget.block * self.budget.block - self.budget.window
            held = self.count[:, None] + torch.arange(-self.window, 0, device=k.device)
            self._leave(held, held < edge)
            gone = index < edge
            self._retire(new, index, gone if keep is None else gone & keep)
            stays = ~gone if keep is None else keep & ~gone
            if keep is None:  # no more than a window of the newest can stay
                new, index, stays = new.newest(self.window), index[:, -self.window :], stays[:, -self.window :]
        self._put(new, (self.anchors + index % self.window)[:, None], None if stays is None else stays[:, None])
        self.count.copy_(count)

    def _write(self, k: Tensor, turned: Tensor, v: Tensor, keep: Tensor | None) -> None:
        """Tokens of one block, before which a block of keys leaves the window if they begin a new one."""
        if not self.budget.dense:
            b = self.budget.block
            due = (self.count % b == 0)[:, None]
            due = due if keep is None else due & keep.any(1, keepdim=True)
            if k.device.type != "cpu" or due.any():  # looking would make a GPU wait, and a CUDA graph cannot
                self._stop_ageing(due)
                oldest = self.count[:, None] + torch.arange(b, device=k.device) - self.window
                self._leave(oldest, due.expand(-1, b))
        new, index = self._keys(k, turned, v, keep)
        self._put(new, (self.anchors + index % self.window)[:, None], None if keep is None else keep[:, None])
        self.count += k.shape[1] if keep is None else keep.sum(1)

    def _stop_ageing(self, due: Tensor) -> None:
        """Turn anchors, rings and sums along by the block that passed, where a sequence `(B, 1)` is beyond reach."""
        if self.reach is None or self.inv_freq is None:
            return
        turn = (due & (self.count > self.reach - self.budget.block)[:, None]) * self.budget.block  # (B, 1), tokens
        near = self.anchors + self.window
        for far in (self.rows[:, :, : self.anchors, 0], self.rows[:, :, near:, 0], self.sums[..., 0, :]):
            if far.numel():
                far.copy_(rotate(far.flatten(1, -2)[:, None], turn, self.inv_freq).view(far.shape))

    def _leave(self, index: Tensor, leaves: Tensor) -> None:
        """Send the window's keys at places `index` (B, K), in order, on their way where `leaves` (B, K)."""
        slot = (self.anchors + index % self.window)[:, None]
        keys = self._at(slot)
        leaves = leaves & (keys.token[:, 0] >= 0)  # not what has left before
        self._retire(keys, index, leaves)
        self.token.view(-1).index_fill_(0, self._flat(torch.where(leaves[:, None], slot, self._spare)), -1)

    def _retire(self, keys: Keys, index: Tensor, leaves: Tensor) -> None:
        """Keys `(B, G, K)` leave the window where `leaves` (B, K): anchors stay one by one, the others go to their
        gate's ring, newest last, and what that drops goes to the gate's sum."""
        leaves, index = leaves[:, None], index[:, None]
        gate = keys.gate.long()
        home, lured = gate.clamp(min=0), leaves & (gate >= 0)
        C, m = self.left.shape[2], self.ring
        hot = (gate[:, :, None] == torch.arange(C, device=gate.device)[:, None]) & leaves[:, :, None]  # (B, G, C, K)
        order = hot.cumsum(-1)
        arrived = order[..., -1]
        nth = order.gather(2, home[:, :, None])[:, :, 0]  # from 1, among those that arrive at the gate
        slot, stays = index.expand_as(gate), leaves & (gate < 0)
        if m:
            rings = lured & (arrived.gather(2, home) - nth < m)
            place = self.anchors + self.window + home * m + (self.left.gather(2, home) + nth - 1) % m
            slot, stays = torch.where(rings, place, slot), stays | rings
        if self.notes:
            own = fell = as_read(keys)
            if m:
                old = self._at(torch.where(rings, place, self._spare))
                old = as_read(old).masked_fill((old.token < 0)[..., None, None], 0)
                fell = torch.where(rings[..., None, None], old, own)
            moved = hot.float()[:, :, None] @ torch.stack((own, fell), dim=2).flatten(-2)  # (B, G, 2, C, 2 d)
            self._add(moved.view_as(self.sums))
        self._put(keys, slot, stays)
        self.left += arrived

    def _add(self, moved: Tensor) -> None:
        """Add to the sums, and carry over what float32 rounds away (Kahan): a text without end must not drift."""
        moved = moved - self.lost
        total = self.sums + moved
        self.lost.copy_(total - self.sums - moved)
        self.sums.copy_(total)

    @property
    def _spare(self) -> int:
        return self.token.shape[2] - 1

    def _flat(self, slot: Tensor) -> Tensor:
        """Slots `(B or 1, G or 1, K)` as places in all sequences' and groups' slots: `(B G K,)`."""
        B, G, S = self.token.shape
        first = torch.arange(0, B * G * S, S, device=slot.device).view(B, G, 1)
        return (first + slot).flatten()

    def _at(self, slot: Tensor) -> Keys:
        """What stands in slots `(B, G or 1, K)`."""
        at = self._flat(slot)
        shape = (*self.token.shape[:2], slot.shape[2])

        def take(x: Tensor) -> Tensor:
            return x.flatten(0, 2).index_select(0, at).view(*shape, *x.shape[3:])

        return Keys(take(self.rows), take(self.scales) if self.int8 else None, take(self.token), take(self.gate))

    def _put(self, keys: Keys, slot: Tensor, valid: Tensor | None) -> None:
        """Write keys `(B, G, K)` to `slot`, where `valid`; both broadcast to `(B, G, K)`. None: everywhere."""
        at = self._flat(slot if valid is None else torch.where(valid, slot, self._spare))
        for name, new in keys._asdict().items():
            if new is not None:
                mine = getattr(self, name)
                mine.flatten(0, 2).index_copy_(0, at, new.flatten(0, 2).to(mine.dtype))
        if valid is not None:  # nothing stands in the spare slot
            self.rows[:, :, -1], self.token[:, :, -1] = 0, -1


def as_read(keys: Keys) -> Tensor:
    """Keys and values `(..., 2, d)` as a row reads them, float32."""
    rows = keys.rows.float()
    return rows if keys.scales is None else rows * keys.scales[..., None]
