"""The slots that hold a bank's keys, and how keys move among them: from the window to a ring, from there to a note.

Axes: `B` sequences, `G` KV groups, `C` gates per group, `d` head dim, `m` ring, `K` keys moved at once, `S` slots:

    anchors | window: w + b | ring of gate 0: m | ring of gate 1: m | ... | scratch: 1

Writes that are masked out go to the scratch slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
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
ALIGNED = 64  # each tensor begins at a multiple of so many bytes, because kernels read whole vectors
MINUS_ONE = ("token", "gate")  # tensors of an empty bank that are -1, in the order of memory the last; others are 0


class Keys(NamedTuple):
    """Keys and values being moved, `(B, G, K)`, as they are stored."""

    rows: Tensor  # (B, G, K, 2, d)
    scales: Tensor | None  # (B, G, K, 2) float32 for int8
    token: Tensor  # (B, G, K)
    gate: Tensor  # (B, G, K), -1 for anchors

    def then(self, later: Keys) -> Keys:
        """These and `later` ones, along K."""
        return Keys(*(None if x is None else torch.cat((x, y), dim=2) for x, y in zip(self, later, strict=True)))


class Slots:
    """The tensors of a bank, and how keys move among them. Everything happens in place, for all sequences at once.

    A new bank's tensors lie in one piece of memory: to make it, or to copy it, takes a GPU few operations.

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
        self.inv_freq = None if inv_freq is None else inv_freq.to(device).contiguous()
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
            "rows": ((batch, G, slots, 2, d), dtype),
            "scales": ((batch, G, slots, 2 if dtype == torch.int8 else 0), torch.float32),
            "sums": ((batch, G, 2, noted, 2, d), wide_dtype(dtype)),
            "rounding_error": ((batch, G, 2, noted, 2, d), wide_dtype(dtype)),
            "retired": ((batch, G, C), torch.int64),
            **dict.fromkeys(("count", "seen", "next_position"), ((batch,), torch.int64)),
            "token": ((batch, G, slots), torch.int64),
            "gate": ((batch, G, slots), torch.int32),
        }
        self._places, end = [], 0
        for name, (shape, kind) in shapes.items():
            start = -(-end // ALIGNED) * ALIGNED
            end = start + prod(shape) * kind.itemsize
            self._places.append((name, slice(start, end), kind, shape))
        with torch.inference_mode(False):  # so that a bank made in inference mode can be stepped outside it
            memory = torch.zeros(end, dtype=torch.uint8, device=device)
            first = next(place.start for name, place, *_ in self._places if name in MINUS_ONE)
            memory[first:] = 255  # an integer whose bytes are all 255 is -1
            self._lie_in(memory)

    def _lie_in(self, memory: Tensor) -> None:
        """Take the tensors from `memory` (bytes,) uint8."""
        self._memory = memory
        for name, place, kind, shape in self._places:
            setattr(self, name, memory[place].view(kind).view(shape))

    def __getstate__(self) -> dict:
        """For pickle, `torch.save` and `deepcopy`, which would write the memory once for each tensor in it."""
        return {**vars(self), "_memory": None, **{name: getattr(self, name).clone() for name in self.TENSORS.values()}}

    def _twin(self):
        """Another object with the same attributes."""
        twin = object.__new__(type(self))
        twin.__dict__.update(vars(self))
        return twin

    def _replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these tensors, by their attributes' names. Each has memory of its own now."""
        self._memory = None
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    @property
    def int8(self) -> bool:
        return self.rows.dtype == torch.int8

    def grow(self, tokens: int) -> None:
        """Make room for `tokens` tokens in a dense cache; the room at least doubles."""
        room = min(max(tokens, 2 * self.window), self.budget.tokens) - self.window
        with torch.inference_mode(False):
            rows, scales = F.pad(self.rows, (0, 0, 0, 0, 0, room)), F.pad(self.scales, (0, 0, 0, room))
            token, gate = (F.pad(x, (0, room), value=-1) for x in (self.token, self.gate))
            self._replace({"rows": rows, "scales": scales, "token": token, "gate": gate})
        self.window += room

    def _new_keys(self, k: Tensor, rotated: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Keys, Tensor]:
        """New keys as they are stored, and the index `(B, n)` of each among the sequence's kept tokens."""
        n, at = k.shape[1], torch.arange(k.shape[1], device=k.device)
        index = self.count[:, None] + (at if keep is None else keep.cumsum(1) - 1)
        rows = torch.stack((rotated.transpose(1, 2), v.transpose(1, 2)), dim=3)  # (B, G, n, 2, d)
        if keep is not None:
            rows = torch.where(keep[:, None, :, None, None], rows, 0)  # padding may hold any value, NaN included
        rows, scales = quantize_rows(rows) if self.int8 else (rows.to(self.rows.dtype), None)
        token = (self.seen[:, None] + at)[:, None].expand(rows.shape[:3])
        if self.budget.dense:
            gate = torch.full_like(token, -1, dtype=self.gate.dtype)
        else:
            lured = self.gates.lure(k)[0].transpose(1, 2)
            gate = lured.to(self.gate.dtype, memory_format=torch.contiguous_format)
            gate.masked_fill_((index < self.anchors)[:, None], -1)
        self.seen += n
        return Keys(rows, scales, token, gate), index

    def write_many(self, k: Tensor, rotated: Tensor, v: Tensor, keep: Tensor | None, is_empty: bool) -> None:
        """Many tokens at once: keys that the last row no longer has in its window go to rings and notes directly.

        is_empty: whether the bank holds nothing yet.
        """
        keys, index = self._new_keys(k, rotated, v, keep)
        if self.budget.dense:
            self._put(keys, (index % self.window)[:, None], None if keep is None else keep[:, None])
        else:
            if not is_empty:
                keys, index, keep = self._after_window(keys, index, keep)
            block_start = index[:, -1:] & -self.budget.block  # of the last row's block, whose size is a power of two
            leaves = index < block_start - self.budget.window
            slot = torch.where(leaves, index, self.anchors + index % self.window)
            if keep is not None:
                leaves, slot = leaves & keep, torch.where(keep, slot, self.scratch)
            self._put(keys, self._retire(keys, index, leaves, slot, is_empty))
            self._clear_scratch()
        torch.add(index[:, -1], 1, out=self.count)

    def _after_window(self, new: Keys, index: Tensor, keep: Tensor | None) -> tuple[Keys, Tensor, Tensor]:
        """Take the keys out of the window: they come before the new ones, whose arguments are those of `write_many`."""
        held = self.count[:, None] + torch.arange(-self.window, 0, device=index.device)
        keys = self.keys_at((self.anchors + held % self.window)[:, None])
        self.token[:, :, self.anchors : self.anchors + self.window] = -1
        keep = torch.ones_like(index, dtype=torch.bool) if keep is None else keep
        here = torch.cat((keys.token[:, 0] >= 0, keep), dim=1)  # an empty slot holds nothing
        return keys.then(new), torch.cat((held, index), dim=1), here

    def write(self, k: Tensor, rotated: Tensor, v: Tensor, keep: Tensor | None) -> None:
        """Tokens of one block. Where they begin a new block, the oldest block of keys first leaves the window."""
        if not self.budget.dense:
            b = self.budget.block
            due = self._due(keep)
            if k.device.type != "cpu" or due.any():  # on a GPU the test would make the host wait; a CUDA graph cannot
                self._stop_ageing(due)
                oldest = self.count[:, None] + torch.arange(b, device=k.device) - self.window
                self._empty_window(oldest, due)
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

    def _empty_window(self, index: Tensor, due: Tensor) -> None:
        """Retire the window's keys of kept tokens `index` (B, K), in order, where `due` (B, 1)."""
        slot = (self.anchors + index % self.window)[:, None]
        keys = self.keys_at(slot)
        leaves = due & (keys.token[:, 0] >= 0)  # an empty slot holds nothing to retire
        self._put(keys, self._retire(keys, index, leaves, torch.where(leaves, index, self.scratch)))
        self._clear_scratch()
        self.token.view(-1).index_fill_(0, self._flat(torch.where(leaves[:, None], slot, self.scratch)), -1)

    def _retire(self, keys: Keys, index: Tensor, leaves: Tensor, slot: Tensor, is_empty: bool = False) -> Tensor:
        """Count keys `(B, G, K)`, oldest first, that leave the window where `leaves` (B, K), and add them to the sums.

        index: `(B, K)` among the kept tokens. slot: `(B, K)`, where anchors and keys that stay belong. Returns where
        each belongs, `(B, G, K)`: of the others, the newest m of a gate in its ring, the rest in the scratch slot.
        """
        leaves = (leaves & (index >= self.anchors))[:, None]
        m, total, parts = self.ring, self.retired.numel(), self.retired.numel() + self.retired.shape[2] + 1
        gate = keys.gate + self._first(self.retired, keys.gate.dtype)  # among those of all groups; -1 for an anchor's
        # A stable sort leaves the keys of a gate in their order. Those that enter no gate come last, in C + 1 parts,
        # because one thread of a GPU adds up a part.
        by_gate, order = torch.where(leaves, gate, keys.gate + (total + 1)).flatten().sort(stable=True)
        edges = torch.searchsorted(by_gate, torch.arange(parts + 1, dtype=by_gate.dtype, device=gate.device))
        self.retired += edges.diff()[:total].view_as(self.retired)
        place = self.scratch
        if m:
            rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=gate.device))
            gate = gate.long()
            behind = edges[1:].take(gate) - rank.view_as(gate)  # 1 for the newest key of its gate
            nth = self.retired.take(gate) - behind
            place = torch.add(self.anchors + self.window + nth % m, keys.gate, alpha=m)
            place = torch.where(behind > m, self.scratch, place)
        slot = torch.where(leaves, place, slot[:, None])
        if self.notes:
            self._note(keys, slot, order, edges, is_empty)
        return slot

    def _note(self, keys: Keys, slot: Tensor, order: Tensor, edges: Tensor, is_empty: bool) -> None:
        """Add its new keys to sum ALL of each gate. Add to sum REST those of them that pass straight through the ring,
        and the keys in the ring that the others replace. order: of the keys, by gate; edges: where each gate begins."""
        entered = torch.maximum(edges[:-1], edges[1:] - self.ring)
        starts, gates = torch.stack((edges[:-1], entered), dim=1), self.retired.shape
        passed, newest = sums_of_parts(as_read(keys), order, starts.flatten(), (*gates, 2)).unbind(3)
        if is_empty:
            torch.add(passed, newest, out=self.sums[:, :, 0])
            self.sums[:, :, 1] = passed
            return
        rest = passed
        if self.ring:  # the rows of an empty slot of a ring, and of the scratch slot, are zero
            rest = passed + sums_of_parts(as_read(self.keys_at(slot)), order, edges[:-1], gates)
        self._add(torch.stack((passed + newest, rest), dim=2))

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

    def _first(self, x: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        """Where each sequence and group begins, `(B, G, 1)`, in the entries of x `(B, G, n)` one after another."""
        B, G, n = x.shape
        return torch.arange(0, B * G * n, n, dtype=dtype, device=x.device).view(B, G, 1)

    def _flat(self, slot: Tensor) -> Tensor:
        """Slots `(B or 1, G or 1, K)` as indices into the slots of all sequences and groups: `(B G K,)`."""
        return (self._first(self.token) + slot).flatten()

    def keys_at(self, slot: Tensor) -> Keys:
        """The keys in slots `(B, G or 1, K)`."""
        at = self._flat(slot)
        shape = (*self.token.shape[:2], slot.shape[2])

        def take(x: Tensor) -> Tensor:
            return x.flatten(0, 2).index_select(0, at).view(*shape, *x.shape[3:])

        return Keys(take(self.rows), take(self.scales) if self.int8 else None, take(self.token), take(self.gate))

    def _put(self, keys: Keys, slot: Tensor, valid: Tensor | None = None) -> None:
        """Write keys `(B, G, K)` to `slot`, where `valid`; both broadcast to `(B, G, K)`. None: everywhere."""
        slot = slot if valid is None else torch.where(valid, slot, self.scratch)
        at, slot = self._flat(slot), slot.expand_as(keys.token)
        self.rows.flatten(0, 2).index_copy_(0, at, keys.rows.flatten(0, 2))
        if self.int8:
            self.scales.flatten(0, 2).index_copy_(0, at, keys.scales.flatten(0, 2))
        self.token.scatter_(2, slot, keys.token)
        self.gate.scatter_(2, slot, keys.gate)
        if valid is not None:
            self._clear_scratch()

    def _clear_scratch(self) -> None:
        self.rows[:, :, -1], self.token[:, :, -1] = 0, -1


def as_read(keys: Keys) -> Tensor:
    """Keys and values `(..., 2, d)` as a row reads them, float32."""
    rows = at_least_float32(keys.rows)
    return rows if keys.scales is None else rows * keys.scales[..., None]


def sums_of_parts(x: Tensor, order: Tensor, starts: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sums `(*shape, ...)` of the rows of x `(B, G, K, ...)` in the first parts of `order` (B G K,), which begin at
    `starts`. The rows of a part are added in their order, so every run gives the same bits."""
    if x.device.type == "mps":  # embedding_bag is missing there before PyTorch 2.10
        return sums_of_parts(x.cpu(), order.cpu(), starts.cpu(), shape).to(x.device)
    sums = F.embedding_bag(order, x.flatten(0, 2).flatten(1), starts, mode="sum")
    return sums[: prod(shape)].view(*shape, *x.shape[3:])
