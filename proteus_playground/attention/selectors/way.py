"""How the keys of a row are chosen, and what is taken away from the choice, as one short text each."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.reference import Memberships
from .protocol import SELECTORS, Selector

OURS = "ours"
OFFERED = ("local + anchors", "block means", "quest", "salience only", "snapkv", "knorm", "random keys", "oracle")
PART = re.compile(r"(notes|rings|key (\d+)|head (\d+):(\d+)|gate (\d+):(\d+):(\d+))")
ALLOWED = "notes, rings, key TOKEN, head LAYER:HEAD or gate LAYER:GROUP:GATE, with commas between them"


@dataclass(frozen=True)
class Without:
    """What rows do not read. Reads that are saved in this way are not spent on other keys.

    keys: tokens whose keys are hidden from every row but their own. heads: (layer, head), whose output is 0. gates:
    (layer, KV group, gate), whose far keys and note are not read. Notes, rings and keys are lost in every layer.
    """

    notes: bool = False
    rings: bool = False
    keys: tuple[int, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    gates: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Without:
        """From `str(without)`. ValueError names the part that it cannot read."""
        keys, heads, gates, whole = [], [], [], set()
        for part in filter(None, (part.strip() for part in text.split(","))):
            found = PART.fullmatch(part)
            if found is None:
                raise ValueError(f"without={part!r}: allowed is {ALLOWED}")
            name, key, *numbers = found.groups()
            numbers = [int(n) for n in numbers if n is not None]
            if key is not None:
                keys.append(int(key))
            elif len(numbers) == 2:
                heads.append(tuple(numbers))
            elif numbers:
                gates.append(tuple(numbers))
            else:
                whole.add(name)
        return cls("notes" in whole, "rings" in whole, *(tuple(sorted(set(part))) for part in (keys, heads, gates)))

    def __str__(self) -> str:
        return ", ".join(self.parts())

    def parts(self) -> list[str]:
        """Each thing that is taken away, as `parse` reads it."""
        numbered = (("key", self.keys), ("head", self.heads), ("gate", self.gates))
        return [name for name in ("notes", "rings") if getattr(self, name)] + [
            f"{name} {':'.join(map(str, at)) if isinstance(at, tuple) else at}" for name, all in numbered for at in all
        ]

    def toggled(self, part: str) -> Without:
        """With `part` given back if it is taken away, else without it as well."""
        parts = self.parts()
        return Without.parse(", ".join([one for one in parts if one != part] if part in parts else [*parts, part]))

    def lessen(self, read: Memberships, rows: Tensor, gate: Tensor, layer: int) -> Memberships:
        """`read` less what is taken away. rows: `(R,)`; gate: of each key `(G, T)`. A row always reads its own key."""
        at = torch.arange(gate.shape[1], device=rows.device)
        others = rows[:, None] != at
        window, anchors, rings, notes = read
        for key in self.keys:
            seen = ~(others & (at == key))
            window, anchors, rings, notes = (part & seen for part in (window, anchors, rings, notes))
        lost = torch.zeros_like(gate, dtype=torch.bool)
        for where, group, number in self.gates:
            if where == layer and group < len(gate):
                lost[group] |= gate[group] == number
        if bool(lost.any()):
            left = ~lost.repeat_interleave(window.shape[1] // len(gate), 0)[:, None]
            rings, notes = rings & left, notes & left
        if self.rings:
            rings = torch.zeros_like(rings)
        return Memberships(window, anchors, rings, torch.zeros_like(notes) if self.notes else notes)


@dataclass(frozen=True)
class Way:
    """selector: "ours", or a name in `SELECTORS`. without: what is taken away from its choice."""

    selector: str = OURS
    without: Without = Without()

    @property
    def plain(self) -> bool:
        """Whether a backend computes it, at any length; else it is computed by masks."""
        return self == Way()

    def chooser(self) -> Selector | None:
        """None for ours. ValueError for a name that no selector has."""
        if self.selector == OURS:
            return None
        if self.selector not in SELECTORS:
            raise ValueError(f"selector={self.selector!r}: allowed is {', '.join(map(repr, offered()))}")
        return SELECTORS[self.selector]


PLAIN = Way()


def offered() -> tuple[str, ...]:
    """Ours, the selectors of `OFFERED`, and those that a user has registered."""
    from . import known

    own = {name for name, one in SELECTORS.items() if one.choose.__module__ == known.__name__}
    return OURS, *OFFERED, *(name for name in SELECTORS if name not in own)
