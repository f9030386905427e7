"""Ask the shelf: a question, the answers at these settings and dense, and whether heads read the fact."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import ipywidgets as w

from proteus_playground.playground.shelf_probe import Reply, ShelfProbe

from ..parts.controls import tip
from ..parts.sentences import percent, token_name
from ..parts.state import MAX_LENGTH, PlayState

OWN = "pick a question, or type one"


class AskBox(w.VBox):
    """Shown where the model can be asked. `on_show(token)` hears that the guest wants to see the fact's place."""

    def __init__(self, state: PlayState, on_show: Callable[[int], None]):
        self.state, self.probe = state, None
        wide = w.Layout(width="auto", flex="1 1 260px")
        self.pick = w.Dropdown(options=[OWN], value=OWN, layout=wide)
        self.question = w.Text(continuous_update=False, placeholder="what does the plain saw cost?", layout=wide)
        self._filling = False
        self.ask = w.Button(description="Ask", button_style="info", tooltip="The model answers, now and at each slider",
                            layout=w.Layout(width="90px"))  # fmt: skip
        self.another = w.Button(description="another shelf", tooltip="Write another text, with other facts",
                                layout=w.Layout(width="auto"))  # fmt: skip
        self.show = w.Button(description="show the fact", tooltip="Go to the place in the text that holds the answer",
                             layout=w.Layout(width="auto"))  # fmt: skip
        tip(self.pick, "Questions that this shelf answers")
        tip(self.question, "Any question; only those of the list can be judged")
        self.reply = w.HTML()
        self.pick.observe(lambda change: self._picked(change["new"]), "value")
        self.ask.on_click(lambda _: self._ask())
        self.question.observe(lambda _: self._filling or self._ask(), "value")
        self.another.on_click(lambda _: state.update({"shelf": (state.shelf + 1) % 1_000_000, "question": ""}))
        self.show.on_click(lambda _: on_show(self.probe.value[0]))
        row = w.HBox([w.HTML('<span class="pp-knob-name">Ask the shelf</span>'), self.pick, self.question, self.ask,
                      self.show, self.another])  # fmt: skip
        row.add_class("pp-ask-row")
        super().__init__([row, self.reply])
        self.add_class("pp-ask")
        self.offer(None)

    def offer(self, probe: ShelfProbe | None) -> None:
        """Another text, model or question; None hides the box."""
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

    def answered(self, reply: Reply) -> None:
        self.reply.value = reply_html(self.probe, reply)

    def grey(self, old: bool) -> None:
        """Whether the answer on show is one to other settings; dragging to and fro can make it the right one again."""
        plain = self.reply.value.replace('"pp-reply pp-old"', '"pp-reply"')
        self.reply.value = plain.replace('"pp-reply"', '"pp-reply pp-old"') if old else plain

    def _picked(self, question: str) -> None:
        if question != OWN:
            self._fill(question)

    def _fill(self, question: str) -> None:
        """Into the box, but not yet to the model."""
        self._filling = True
        self.question.value = question
        self._filling = False

    def _ask(self) -> None:
        question = self.question.value.strip()[: MAX_LENGTH["question"]]
        if question:
            self.state.question = question


HINT = "Press Ask: the model answers from the text it has read, and every slider then asks it again."
LOOKED = "As in the pictures, each layer is looked at on its own, above dense ones; the answer has them all at work."


def reply_html(probe: ShelfProbe, reply: Reply) -> str:
    """Both answers with their verdicts, and one sentence on who read the fact."""
    said = (("at these settings", reply.said, reply.right), ("dense", reply.dense, reply.dense_right))
    cells = "".join(
        f'<span class="pp-verdict {MARKS[right][0]}"><b>{label}</b> {escape(words) or "(nothing)"} '
        f"<i>{MARKS[right][1]}</i></span>"
        for label, words, right in said
    )
    return f'<div class="pp-reply">{cells}<p title="{LOOKED}">{escape(fact_sentence(probe, reply))}</p></div>'


MARKS = {True: ("pp-right", "✓ right"), False: ("pp-wrong", "✗ wrong"), None: ("", "")}


def fact_sentence(probe: ShelfProbe, reply: Reply) -> str:
    """Where the fact stands, how many heads have it in their shortlist, and who reads it most."""
    if not reply.rows:
        return "Nobody knows the right answer: this question is not one that the shelf answers."
    best = max(range(len(reply.rows)), key=reply.weight)
    layer, head = best // probe.n_heads, best % probe.n_heads
    value = token_name(probe.tokens, reply.value[0])
    most = f"most attention: {percent(reply.weight(best))}, by head {head} of layer {layer}"
    count = reply.readers()
    if not count:
        return f"“{probe.asked.fact}” is in no head's shortlist: {value} is seen through notes only, or not at all."
    return f"“{probe.asked.fact}” {count} of {len(reply.rows)} heads read {value} as a key of its own; {most}."
