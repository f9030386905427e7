"""What a KV bank holds, as HTML to read: window, anchors, and each gate's sticky notes; what just moved is marked."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from proteus_playground.attention.bank.view import BankContents, GateContents

from ..parts.sentences import listed
from ..workbench.readout import _cell, _key, milliseconds, quantity

LEGEND = (
    _key("#0072B2", "window, read word by word") + _key("#E69F00", "anchors") + _key("#009E73", "sticky notes")
    + _key("#CC79A7", "summary") + _key("#d6efe4", "just arrived")
)  # fmt: skip
SHOWN = 3  # moves named in the sentence


@dataclass(frozen=True)
class Moves:
    """What one token changed in a bank."""

    pinned: dict[int, set[int]]  # gate -> tokens that came into its ring
    summed: dict[int, set[int]]  # gate -> tokens that its ring dropped into the summary


def moves(before: BankContents | None, now: BankContents) -> Moves:
    """Nothing where there is no step before."""
    pinned, summed = {}, {}
    for old, new in zip(before.gates if before else (), now.gates, strict=False):
        came, went = set(new.ring) - set(old.ring), set(old.ring) - set(new.ring)
        if came:
            pinned[new.gate] = came
        if went:
            summed[new.gate] = went
    return Moves(pinned, summed)


def word(tokens: list[str], index: int) -> str:
    """A token as it can be shown alone."""
    return escape(tokens[index].strip(" ").replace("\n", "↵").replace("\t", "⇥") or "␣")


def _text(tokens: list[str], indices: tuple[int, ...]) -> str:
    return escape("".join(tokens[i] for i in indices)).replace("\n", "<i>↵</i>")


def near_html(now: BankContents, tokens: list[str], given: int) -> str:
    """The window as running text, the newest token marked, behind the anchors."""
    window = now.window
    last = f'<b class="pp-newest">{_text(tokens, window[-1:])}</b>' if window else ""
    by = " · written by the model" if window and window[-1] >= given else ""
    where = f"tokens {window[0]:,} to {window[-1]:,}{by}" if window else "empty"
    return (
        f'<div class="pp-near pp-near-anchors"><span>anchors: the first {len(now.anchors)}</span>'
        f"<p>{_text(tokens, now.anchors)}</p></div>"
        f'<div class="pp-near pp-near-window"><span>window: {where}</span>'
        f"<p>{_text(tokens, window[:-1])}{last}</p></div>"
    )


def gate_html(gate: GateContents, tokens: list[str], moved: Moves, notes: bool) -> str:
    """One gate: its ring, newest first, and how many tokens only its summary holds."""
    came, went = moved.pinned.get(gate.gate, ()), moved.summed.get(gate.gate, ())
    ring = "".join(
        f'<span class="pp-slip{" pp-came" if i in came else ""}" title="token {i:,}">{word(tokens, i)}</span>'
        for i in gate.ring
    )
    gone = "".join(f'<span class="pp-went" title="token {i:,}">{word(tokens, i)}</span>' for i in sorted(went))
    into = f" ← {gone}" if went else ""
    kept = "summary of" if notes else "forgotten:"
    note = f'<p class="pp-summary">{kept} {gate.summarised:,}{into}</p>' if gate.summarised else ""
    kind = " pp-empty-gate" * (not gate.count) + " pp-moved" * bool(came or went)
    return f'<div class="pp-gate{kind}"><b>gate {gate.gate}</b><p>{ring or "nothing yet"}</p>{note}</div>'


def gates_html(request: int, now: BankContents, tokens: list[str], moved: Moves) -> str:
    cards = "".join(gate_html(gate, tokens, moved, now.notes) for gate in now.gates)
    empty = "" if now.gates else '<p class="pp-more">This layer is dense: it keeps every token, and has no gates.</p>'
    return f'<div class="pp-gates" data-request="{request}" tabindex="0">{empty}{cards}</div>'


def move_sentence(now: BankContents, tokens: list[str], moved: Moves) -> str:
    """Who left the window for which gate, and who went into a summary."""
    if not moved.pinned:
        return "Nothing left the window with this token: a block of keys leaves it at a time."
    flat = [(index, gate) for gate, some in moved.pinned.items() for index in sorted(some)]
    some = [f"“{tokens[i].strip() or '↵'}” to gate {gate}" for i, gate in sorted(flat)[:SHOWN]]
    more = f" and {len(flat) - SHOWN} others" if len(flat) > SHOWN else ""
    said = f"{len(flat)} tokens left the window: {listed(some) if not more else ', '.join(some) + more}."
    gone = [i for some in moved.summed.values() for i in sorted(some)]
    if gone:
        words = listed([f"“{tokens[i].strip() or '↵'}”" for i in gone[:SHOWN]])
        rest = f" and {len(gone) - SHOWN} more" if len(gone) > SHOWN else ""
        said += f" {words}{rest} went into a summary."
    return said


def numbers_html(request: int, now: BankContents, seconds: float, nbytes: int, layers: int) -> str:
    pinned = sum(len(gate.ring) for gate in now.gates)
    summed = sum(gate.summarised for gate in now.gates)
    cells = [
        _cell("tokens read", f"{now.tokens_seen:,}", "so far", "Tokens that have gone through the model."),
        _cell("in the window", f"{len(now.window) + len(now.anchors):,}", f"{len(now.anchors)} of them anchors",
              "Tokens that every row reads one by one."),
        _cell("on sticky notes", f"{pinned:,}", f"at {sum(bool(g.ring) for g in now.gates)} of {len(now.gates)} gates",
              "Tokens in the gates' rings: read one by one by a row that opens their gate."),
        _cell("in summaries only", f"{summed:,}", "one note per gate",
              "Tokens that their ring has dropped: only the gate's average still holds them."),
        _cell("memory", quantity(nbytes, "B"), f"all {layers} layers, for any length",
              "Bytes of all banks together; they do not grow with the text."),
        _cell("last token", milliseconds(1000 * seconds), "on this machine", "How long the last token took; measured."),
    ]  # fmt: skip
    return f'<div class="pp-readout" data-request="{request}">{"".join(cells)}</div>'
