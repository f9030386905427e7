"""The prototype panel's words: which keys a gate lures, what surgery changed, and the text with these keys marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import groupby

import numpy as np

from proteus_playground.playground.gate_story import TOKENS_PER_UPDATE, Operation, Snapshot

from ..parts.html import cell, key, tiles_html
from ..parts.sentences import listed, percent, shown
from ..parts.terms import with_terms
from .figure import FIT, MOVED, REVIVED

NOTHING = 5e-6  # a smaller relative change of an output is rounding
NAMED = 4  # words named in the sentence on a gate
CONFIDENCE = "How similar the keys of a gate usually are to its prototype (cosine, moving average)."
LEGENDS = {
    "map": f"<span>{with_terms('● key, coloured by its gate')}</span><span>{with_terms('◆ prototype, its path')}</span>"
    '<span style="color:#8c959f">◆ lures no key</span><span style="color:#D55E00">◇ chosen</span>',
    "bars": f'<span class="pp-term" title="{CONFIDENCE}">▁ confidence</span><span>○ free slot</span>',
    "curves": key(FIT, "cosine", line=True) + key(MOVED, "changed gates", line=True)
    + f'<span style="color:{REVIVED}">▲ revived</span><span style="color:#D55E00">◆ surgery</span>',
    "text": "",
}  # fmt: skip


def gate_sentence(now: Snapshot, gate: int, tokens: Sequence[str]) -> str:
    """`Gate 7 lures 312 of 1,024 keys (30%), mostly ‘e’, ‘a’ and ‘t’. It belongs to head 2; confidence 0.81.`"""
    mine = np.flatnonzero(now.gate == gate)
    whose = f"It belongs to head {now.head[gate]}; confidence {now.confidence[gate]:.2f}."
    if not len(mine):
        return f"Gate {gate} lures no key of this text: other prototypes are nearer. {whose}"
    common = Counter(shown(tokens[i]) for i in mine).most_common(NAMED)
    only = "all of them" if len(common) == 1 else "mostly"
    words = listed([f"‘{word}’" for word, _ in common])
    keys = f"{len(mine):,} of {len(tokens):,} keys" if len(mine) > 1 else "one key"
    return f"Gate {gate} lures {keys} ({percent(len(mine) / len(tokens))}), {only} {words}. {whose}"


def spread_sentence(now: Snapshot) -> str:
    """How many gates lure no key, and which gate lures most."""
    live = np.flatnonzero(now.alive)
    idle = int((now.lured[live] == 0).sum())
    most = int(now.lured.argmax())
    some = f"{idle} of {len(live)} gates lure no key" if idle else f"All {len(live)} gates lure keys"
    return f"{some}; gate {most} most ({percent(now.lured[most] / len(now.gate))})."


def fit_sentence(past: Sequence[Snapshot]) -> str:
    """Mean cosine between keys and their prototypes, now and at first."""
    now = past[-1]
    if now.update == 0:
        return "No update has been made yet: press step or play."
    woken = f"; gate {now.revived[0]} revived" if now.revived else ""
    return f"Mean cosine {now.fit:.2f}, at first {past[0].fit:.2f}{woken}."


def amount(change: float) -> str:
    return "under 0.1%" if change < 0.001 else f"{change:.1%}"


def operation_sentence(done: Operation) -> str:
    """What was done, and what it changed."""
    did = {
        "clone": f"Gate {done.gate} was cloned into slot {done.other}; the two share its probability",
        "prune": f"Gate {done.gate} was pruned; its keys were lured to their next nearest gates",
        "merge": f"Gate {done.other} was merged into gate {done.gate}",
        "move": f"Gate {done.gate} was moved to head {done.other}",
        "add head": f"Every group has a new head, {done.gate}. Its output is zero until it is trained. Where heads are "
        "routed, it takes half of the busiest gate's probability at once",
    }[done.what]
    before, after = done.nll
    effect = "did not change" if done.change < NOTHING else f"changed by {amount(done.change)}"
    why = ""
    if done.grown and done.change >= NOTHING:
        why = " One more slot changes how L is divided between rings and notes, so even a clone changes the output."
    return f"{did}. The layer's output {effect}; the model's loss was {before:.3f} and is {after:.3f}.{why}"


def text_html(request: int, now: Snapshot, gate: int, tokens: Sequence[str]) -> str:
    """The text, with the tokens that `gate` lures marked."""
    mine = now.gate == gate
    parts = []
    for lured, run in groupby(range(len(tokens)), key=lambda i: bool(mine[i])):
        words = escape("".join(tokens[i] for i in run)).replace("\n", "<i>↵</i><br>")
        parts.append(f"<b>{words}</b>" if lured else words)
    return f'<div class="pp-luring" data-request="{request}" tabindex="0">{"".join(parts)}</div>'


def numbers_html(request: int, past: Sequence[Snapshot], last: Operation | None) -> str:
    now, first = past[-1], past[0]
    live = int(now.alive.sum())
    effect = "–" if last is None else "none" if last.change < NOTHING else amount(last.change)
    loss = "–" if last is None else f"{last.nll[1]:.3f}"
    cells = [
        cell("updates", f"{now.update:,}", f"of {min(TOKENS_PER_UPDATE, len(now.gate))} keys each",
              "Updates of the moving average; each takes the next keys of the text."),
        cell("gates", f"{live}", f"{len(now.alive) - live} slots free", "Live gates of this KV group."),
        cell("heads", f"{now.heads}", "in this group", "Query heads that share the keys of this group."),
        cell("mean cosine", f"{now.fit:.3f}", f"{first.fit:.3f} at first",
              "Cosine between each key of the text and the prototype that lures it, averaged over all keys."),
        cell("changed gates", f"{now.moved:.1%}", "with the last update",
              "Keys that the last update moved to another gate."),
        cell("revived", f"{sum(len(snap.revived) for snap in past):,}", "gates, so far",
              "Gates that lured too few keys, so that their prototypes were moved to the keys that fitted worst."),
        cell("output change", effect, "by the last surgery",
              "How much this layer's output on this text changed, as a share of its size, at flux α = 1."),
        cell("loss", loss, "" if last is None else f"before surgery {last.nll[0]:.3f}",
              "The model's mean loss per token of this text, in nats, with every layer at flux α = 1."),
    ]  # fmt: skip
    return tiles_html(request, cells)
