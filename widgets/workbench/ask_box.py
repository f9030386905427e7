"""A question to shelf-mini, its answers at these settings, as A and dense, and how many heads read the fact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import ipywidgets as w

from proteus_playground.attention.settings import Settings
from proteus_playground.playground.shelf_probe import Reply, ShelfProbe

from ..parts.boxes import button, row
from ..parts.controls import tip
from ..parts.sentences import percent, token_name
from ..parts.state import MAX_LENGTH, Pin, PlayState
from ..parts.terms import with_terms

OWN = "choose a question, or type one"


@dataclass(frozen=True)
class Answers:
    """What B answers and, where something is pinned, what A answers."""

    b: Reply
    pin: Pin | None = None
    a: Reply | None = None

    def of(self, settings: Settings, pin: Pin | None) -> bool:
        """Whether these are the answers of B at `settings` and of that A."""
        return (self.b.settings, self.pin) == (settings, pin)


class AskBox(w.VBox):
    """Shown where the model can answer questions. "show the fact" calls `on_show(token)` with the fact's place."""

    def __init__(self, state: PlayState, on_show: Callable[[int], None]):
        self.state, self.probe = state, None
        wide = {"width": "auto", "flex": "1 1 260px"}
        self.pick = w.Dropdown(options=[OWN], value=OWN, layout=wide)
        self.question = w.Text(continuous_update=False, placeholder="what does the plain saw cost?", layout=wide)
        self._filling = False
        self.ask = button("Ask", "The model answers now, and again whenever a slider moves", self._ask,
                          button_style="info", layout={"width": "90px"})  # fmt: skip
        self.another = button(
            "another shelf",
            "Make another text with other facts",
            lambda: state.update({"shelf": (state.shelf + 1) % 1_000_000, "question": ""}),
        )
        self.show = button("show the fact", "Scroll the text to the words that hold the answer",
                           lambda: on_show(self.probe.value[0]))  # fmt: skip
        tip(self.pick, "Questions that the text answers")
        tip(
            self.question,
            "Type any question; an answer can be marked right or wrong only if the question is in the list",
        )
        self.reply = w.HTML()
        self.pick.observe(lambda change: self._picked(change["new"]), "value")
        self.question.observe(lambda _: self._typed(), "value")
        name = w.HTML('<span class="pp-knob-name">Ask the shelf</span>')
        asking = row("pp-ask-row", name, self.pick, self.question, self.ask, self.show, self.another)
        super().__init__([asking, self.reply])
        self.add_class("pp-ask")
        self.offer(None)

    def offer(self, probe: ShelfProbe | None) -> None:
        """For another text, model or question; None hides the box."""
        self.probe = probe
        self.layout.display = "none" if probe is None else ""
        if probe is None:
            return
        asked = [question.text for question in probe.questions]
        if list(self.pick.options) != [OWN, *asked]:
            self.pick.options = [OWN, *asked]
        self.pick.value = probe.question if probe.question in asked else OWN
        self._fill(probe.question or (asked[len(asked) // 3] if asked else ""))
        self.another.layout.display = "" if asked else "none"
        self.show.layout.display = "none" if probe.value is None else ""
        self.reply.value = f'<div class="pp-reply">{HINT if not probe.question else "…"}</div>'

    def answered(self, answers: Answers, ours: bool) -> None:
        """ours: other keys are chosen in the pictures, so a sentence says whose the answers are."""
        self.reply.value = reply_html(self.probe, answers, OURS_ANSWERS if ours else "")

    def grey(self, old: bool) -> None:
        """Greys the answer while the settings differ from those it was given at."""
        plain = self.reply.value.replace('"pp-reply pp-old"', '"pp-reply"')
        self.reply.value = plain.replace('"pp-reply"', '"pp-reply pp-old"') if old else plain

    def _picked(self, question: str) -> None:
        if question != OWN:
            self._fill(question)

    def _fill(self, question: str) -> None:
        """Writes a question into the box without asking it."""
        self._filling = True
        self.question.value = question
        self._filling = False

    def _typed(self) -> None:
        if not self._filling:
            self._ask()

    def _ask(self) -> None:
        question = self.question.value.strip()[: MAX_LENGTH["question"]]
        if question:
            self.state.question = question


HINT = "Press Ask: the model answers from the text that it has read, and again whenever a slider moves."
LOOKED = (
    "The pictures show one layer at these settings, with dense layers below it. For the answer, all layers run at them."
)


OURS_ANSWERS = (
    "Answers come from our own selector, with nothing taken away. The bars of the next token show the effect of "
    "the chosen selector and of what is taken away."
)


def reply_html(probe: ShelfProbe, answers: Answers, note: str = "") -> str:
    """All answers, marked right or wrong, and one sentence: `note`, or which heads read the fact."""
    cells = "".join(
        f'<span class="pp-verdict {MARKS[right][0]}"><b>{label}</b> {escape(words) or "(no answer)"} '
        f"<i>{MARKS[right][1]}</i></span>"
        for label, words, right in _said(answers, "ours at these settings" if note else "at these settings")
    )
    sentence = with_terms(note or fact_sentence(probe, answers))
    return f'<div class="pp-reply">{cells}<p title="{LOOKED}">{sentence}</p></div>'


def _said(answers: Answers, at: str) -> list[tuple[str, str, bool | None]]:
    """(label, words, whether they are right) of each answer; the dense one of A where A is another model."""
    a, b = answers.a, answers.b
    dense = [("dense", b.dense, b.dense_right)]
    if a is None:
        return [(at, b.said, b.right), *dense]
    if (a.dense, a.dense_right) != (b.dense, b.dense_right):
        dense = [("dense, B", b.dense, b.dense_right), ("dense, A", a.dense, a.dense_right)]
    return [(f"B, {at}", b.said, b.right), ("A, pinned", a.said, a.right), *dense]


MARKS = {True: ("pp-right", "✓ right"), False: ("pp-wrong", "✗ wrong"), None: ("", "")}


def fact_sentence(probe: ShelfProbe, answers: Answers) -> str:
    """How many heads read the fact's key itself and not through a note, and which head gives it most attention."""
    reply, a = answers.b, answers.a
    if not reply.rows:
        return "The text does not answer this question, so no answer can be marked right or wrong."
    value, heads = token_name(probe.tokens, reply.value[0]), f"of the {len(reply.rows)} heads in all layers"
    if a is not None:
        counts = f"with B {reply.readers()} {heads} read the key of {value} itself, with A {a.readers()}"
        return f"“{probe.asked.fact}”: {counts}; the others read it through notes or not at all."
    best = max(range(len(reply.rows)), key=reply.weight)
    layer, head = best // probe.n_heads, best % probe.n_heads
    most = f"head {head} of layer {layer} gives it most attention ({percent(reply.weight(best))})"
    if not reply.readers():
        return f"“{probe.asked.fact}”: no head reads the key of {value} itself; it is read through notes or not at all."
    return f"“{probe.asked.fact}”: {reply.readers()} {heads} read the key of {value} itself; {most}."
