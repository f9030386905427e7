"""A question to shelf-mini, its answers at these settings and dense, and how many heads read the fact."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import ipywidgets as w

from proteus_playground.playground.shelf_probe import Reply, ShelfProbe

from ..parts.boxes import button, row
from ..parts.controls import tip
from ..parts.sentences import percent, token_name
from ..parts.state import MAX_LENGTH, PlayState
from ..parts.terms import with_terms

OWN = "choose a question, or type one"


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

    def answered(self, reply: Reply, note: str = "") -> None:
        """note: a sentence that replaces the one on the heads that read the fact, where other keys are chosen."""
        self.reply.value = reply_html(self.probe, reply, note)

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


def reply_html(probe: ShelfProbe, reply: Reply, note: str = "") -> str:
    """Both answers, marked right or wrong, and one sentence: `note`, or which heads read the fact."""
    said = (
        ("ours at these settings" if note else "at these settings", reply.said, reply.right),
        ("dense", reply.dense, reply.dense_right),
    )
    cells = "".join(
        f'<span class="pp-verdict {MARKS[right][0]}"><b>{label}</b> {escape(words) or "(no answer)"} '
        f"<i>{MARKS[right][1]}</i></span>"
        for label, words, right in said
    )
    return (
        f'<div class="pp-reply">{cells}<p title="{LOOKED}">{with_terms(note or fact_sentence(probe, reply))}</p></div>'
    )


MARKS = {True: ("pp-right", "✓ right"), False: ("pp-wrong", "✗ wrong"), None: ("", "")}


def fact_sentence(probe: ShelfProbe, reply: Reply) -> str:
    """How many heads read the fact's key itself and not through a note, and which head gives it most attention."""
    if not reply.rows:
        return "The text does not answer this question, so no answer can be marked right or wrong."
    best = max(range(len(reply.rows)), key=reply.weight)
    layer, head = best // probe.n_heads, best % probe.n_heads
    value = token_name(probe.tokens, reply.value[0])
    most = f"head {head} of layer {layer} gives it most attention ({percent(reply.weight(best))})"
    count = reply.readers()
    if not count:
        return f"“{probe.asked.fact}”: no head reads the key of {value} itself; it is read through notes or not at all."
    where = f"{count} of the {len(reply.rows)} heads in all layers"
    return f"“{probe.asked.fact}”: {where} read the key of {value} itself; {most}."
