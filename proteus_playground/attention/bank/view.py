"""What a KV bank holds, as plain numbers: for display."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .bank import KVBank


@dataclass(frozen=True)
class GateContents:
    """One gate's sticky notes and summary. Token indices count from 0 in the sequence, dropped tokens included."""

    gate: int  # index in the group
    ring: tuple[int, ...]  # tokens read one by one when a row opens the gate, newest first
    count: int  # keys that have left the window for this gate, those in the ring included
    summarised: int  # of these, keys that only the gate's summary still holds (0 kept of them when notes are off)


@dataclass(frozen=True)
class BankContents:
    """What a bank holds of one sequence, for one KV group, after its last token."""

    tokens_seen: int  # dropped tokens and padding included
    tokens_kept: int
    anchors: tuple[int, ...]  # first kept tokens, once they have left the window; oldest first
    window: tuple[int, ...]  # tokens every row reads one by one, oldest first
    gates: tuple[GateContents, ...]  # one per gate of the group, in order; () for a dense cache
    notes: bool  # whether summaries are read


def view_of(bank: KVBank, batch: int, group: int) -> BankContents:
    """Contents of sequence `batch` and KV group `group`, which are in range."""
    budget, near = bank.budget, bank.anchors + bank.window
    token = bank.token[batch, group].tolist()
    gates = []
    for gate, count in enumerate([] if budget.dense else bank.left[batch, group].tolist()):
        first, held = near + gate * bank.ring, min(count, bank.ring)
        ring = tuple(token[first + (count - 1 - i) % bank.ring] for i in range(held))
        gates.append(GateContents(gate, ring, count, count - held))
    return BankContents(
        tokens_seen=int(bank.seen[batch]),
        tokens_kept=int(bank.count[batch]),
        anchors=tuple(t for t in token[: bank.anchors] if t >= 0),
        window=tuple(sorted(t for t in token[bank.anchors : near] if t >= 0)),
        gates=tuple(gates),
        notes=budget.notes and not budget.dense,
    )
