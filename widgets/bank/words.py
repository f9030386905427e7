"""The contents of a KV bank as HTML: window, anchors, and each gate's ring and note; what just moved is marked."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from proteus_playground.attention.bank.view import BankContents, GateContents

from ..parts.html import cell, key, tiles_html
from ..parts.sentences import listed, milliseconds, quantity
from ..parts.terms import term_html, with_terms

LEGEND = (
    key("#0072B2", "window") + key("#E69F00", "anchors") + key("#009E73", "ring: a gate's newest keys")
    + key("#CC79A7", "note: mean of its older keys") + key("#d6efe4", "just arrived")
)  # fmt: skip
SHOWN = 3  # tokens named in the sentence


@dataclass(frozen=True)
class Moves:
    """What one more token changed in a bank."""

    into_ring: dict[int, set[int]]  # gate -> tokens that its ring took
    into_note: dict[int, set[int]]  # gate -> tokens that moved from its ring to its note


def moves(before: BankContents | None, now: BankContents) -> Moves:
    """The difference between two contents; empty without one before."""
    into_ring, into_note = {}, {}
    for old, new in zip(before.gates if before else (), now.gates, strict=False):
        came, went = set(new.ring) - set(old.ring), set(old.ring) - set(new.ring)
        if came:
            into_ring[new.gate] = came
        if went:
            into_note[new.gate] = went
    return Moves(into_ring, into_note)


def word(tokens: list[str], index: int) -> str:
    """A token without its surrounding spaces, with signs for characters that cannot be seen."""
    return escape(tokens[index].strip(" ").replace("\n", "↵").replace("\t", "⇥") or "␣")


def _text(tokens: list[str], indices: tuple[int, ...]) -> str:
    return escape("".join(tokens[i] for i in indices)).replace("\n", "<i>↵</i>")


def near_html(now: BankContents, tokens: list[str], given: int) -> str:
    """The anchors and the window as running text, with the newest token marked."""
    window = now.window
    last = f'<b class="pp-newest">{_text(tokens, window[-1:])}</b>' if window else ""
    by = " · written by the model" if window and window[-1] >= given else ""
    where = f"tokens {window[0]:,} to {window[-1]:,}{by}" if window else "empty"
    anchors = term_html("anchor", "anchors")
    return (
        f'<div class="pp-near pp-near-anchors"><span>{anchors}: the first {len(now.anchors)}</span>'
        f"<p>{_text(tokens, now.anchors)}</p></div>"
        f'<div class="pp-near pp-near-window"><span>{term_html("window")}: {where}</span>'
        f"<p>{_text(tokens, window[:-1])}{last}</p></div>"
    )


def gate_html(gate: GateContents, tokens: list[str], moved: Moves, notes: bool) -> str:
    """One gate: its ring, newest first, and the number of tokens that only its note holds."""
    came, went = moved.into_ring.get(gate.gate, ()), moved.into_note.get(gate.gate, ())
    ring = "".join(
        f'<span class="pp-slip{" pp-came" if i in came else ""}" title="token {i:,}">{word(tokens, i)}</span>'
        for i in gate.ring
    )
    gone = "".join(f'<span class="pp-went" title="token {i:,}">{word(tokens, i)}</span>' for i in sorted(went))
    into = f" ← {gone}" if went else ""
    kept = f"{term_html('note')}: mean of" if notes else "dropped:"
    note = f'<p class="pp-summary">{kept} {gate.summarised:,}{into}</p>' if gate.summarised else ""
    kind = ("" if gate.count else " pp-empty-gate") + (" pp-moved" if came or went else "")
    return f'<div class="pp-gate{kind}"><b>{term_html("gate")} {gate.gate}</b><p>{ring or "no key yet"}</p>{note}</div>'


def gates_html(request: int, now: BankContents, tokens: list[str], moved: Moves) -> str:
    cards = "".join(gate_html(gate, tokens, moved, now.notes) for gate in now.gates)
    dense = with_terms("This layer is dense: it keeps every token and has no gates.")
    empty = "" if now.gates else f'<p class="pp-more">{dense}</p>'
    return f'<div class="pp-gates" data-request="{request}" tabindex="0">{empty}{cards}</div>'


def move_sentence(now: BankContents, tokens: list[str], moved: Moves) -> str:
    """Which tokens left the window for which gate, and which moved from a ring to a note."""
    if not moved.into_ring:
        return "No key left the window with this token, because keys leave it in blocks of several."
    flat = [(index, gate) for gate, some in moved.into_ring.items() for index in sorted(some)]
    some = [f"“{tokens[i].strip() or '↵'}” to gate {gate}" for i, gate in sorted(flat)[:SHOWN]]
    more = [f"{len(flat) - SHOWN} more to other gates"] if len(flat) > SHOWN else []
    said = f"{len(flat)} tokens left the window: {listed(some + more)}."
    gone = [i for some in moved.into_note.values() for i in sorted(some)]
    if gone:
        rest = [f"{len(gone) - SHOWN} more"] if len(gone) > SHOWN else []
        words = listed([f"“{tokens[i].strip() or '↵'}”" for i in gone[:SHOWN]] + rest)
        said += f" {words} moved from a ring to a note."
    return said


def numbers_html(request: int, now: BankContents, seconds: float, nbytes: int, layers: int) -> str:
    in_rings = sum(len(gate.ring) for gate in now.gates)
    in_notes = sum(gate.summarised for gate in now.gates)
    cells = [
        cell("tokens read", f"{now.tokens_seen:,}", "so far", "Tokens that the model has read."),
        cell("window, anchors", f"{len(now.window) + len(now.anchors):,}", f"{len(now.anchors)} of them anchors",
              "Tokens of the window and the anchors: every query reads them one by one."),
        cell("in rings", f"{in_rings:,}", f"at {sum(1 for gate in now.gates if gate.ring)} of {len(now.gates)} gates",
              "Tokens in the rings of the gates: a query that opens a gate reads its ring one by one."),
        cell("in notes only", f"{in_notes:,}", "one note per gate",
              "Tokens that have left their ring: they count only in the mean of their gate, its note."),
        cell("memory", quantity(nbytes, "B"), f"all {layers} layers, for any length",
              "Bytes of all banks together; they do not grow with the text."),
        cell("last token", milliseconds(1000 * seconds), "on this machine", "Measured time to read the last token."),
    ]  # fmt: skip
    return tiles_html(request, cells)
