"""Contents of a KV bank as plain numbers: for display."""

from __future__ import annotations

from dataclasses import dataclass

from .slots import Slots


@dataclass(frozen=True)
class GateContents:
    """One gate's ring and note. Token indices count from 0 in the sequence, dropped tokens included."""

    gate: int  # index in the group
    ring: tuple[int, ...]  # tokens read one by one when a row opens the gate, newest first
    count: int  # keys that have left the window for this gate, those in the ring included
    summarised: int  # of these, keys beyond the ring: only in the gate's note, or forgotten when notes are off


@dataclass(frozen=True)
class BankContents:
    """Contents of a bank for one sequence and one KV group, after its last token."""

    tokens_seen: int  # dropped tokens and padding included
    tokens_kept: int
    anchors: tuple[int, ...]  # first kept tokens, once they have left the window; oldest first
    window: tuple[int, ...]  # tokens every row reads one by one, oldest first
    gates: tuple[GateContents, ...]  # one per gate of the group, in order; () for a dense cache
    notes: bool  # whether notes are read


def view_of(bank: Slots, batch: int, group: int) -> BankContents:
    """Contents of sequence `batch` and KV group `group`, which are in range."""
    budget, first_ring = bank.budget, bank.anchors + bank.window
    token = bank.token[batch, group].tolist()
    gates = []
    for gate, count in enumerate([] if budget.dense else bank.retired[batch, group].tolist()):
        first, held = first_ring + gate * bank.ring, min(count, bank.ring)
        ring = tuple(token[first + (count - 1 - i) % bank.ring] for i in range(held))
        gates.append(GateContents(gate, ring, count, count - held))
    return BankContents(
        tokens_seen=int(bank.seen[batch]),
        tokens_kept=int(bank.count[batch]),
        anchors=tuple(t for t in token[: bank.anchors] if t >= 0),
        window=tuple(sorted(t for t in token[bank.anchors : first_ring] if t >= 0)),
        gates=tuple(gates),
        notes=budget.notes > 0 and not budget.dense,
    )
