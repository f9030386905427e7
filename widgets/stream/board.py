"""The chunk buffer panel's layout and controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ipywidgets as w

from ..parts.boxes import AUTO, button, column, labelled, row
from ..parts.controls import Knob, bind, grid, tip
from ..parts.painted import Room
from ..parts.panel import Panel
from ..parts.transport import Transport
from .state import BY_NAME, PLAN, StreamState
from .words import LEGENDS

SIZES = {"10K": 10_240, "100K": 100_000, "one million": 1_048_576}


@dataclass(frozen=True)
class Buttons:
    """The buttons of the panel's middle row."""

    layers: w.Button
    answer: w.Button
    more: w.ToggleButton


class StreamBoard(Panel):
    """The widgets in their places."""

    def __init__(
        self, state: StreamState, figure: w.DOMWidget, on_step: Callable[[int], None], on_read: Callable[[], None]
    ):
        super().__init__("Chunk buffer", LEGENDS)
        self.state = state
        self.events, self.buffer, self.answer = w.HTML(), w.HTML(), w.HTML()
        self.transport = Transport(on_step, "to the needle", "Go to the step that reads the needle")
        self.buttons = Buttons(
            button(
                "Score in context",
                "Score every token by the language model's own queries and keys; the first time takes minutes on a CPU",
            ),
            button("Answer", "The language model answers the prompt from the tokens in the buffer alone"),
            w.ToggleButton(description="Another document", icon="file-text-o", layout=AUTO),
        )
        self.cancel = button("Cancel", "Stop what is running; the scores so far are kept", disabled=True)
        drawer = _source(state, on_read)
        self.buttons.more.observe(lambda c: setattr(drawer.layout, "display", "" if c["new"] else "none"), "value")
        top = column("pp-top", grid([Knob(state, BY_NAME[name], live=True) for name in PLAN], 210), self._asking())
        panels = self.beside(
            [Room(), figure, self.captions["sky"], self.captions["curves"]], [self.captions["text"], self.buffer]
        )
        self.place(
            "pp-stream", self.banner, top, drawer, self.transport, self.numbers, self.answer, panels, self.events
        )
        self.caption("sky", "Scores along the document", "Reading the document …")

    def _asking(self) -> w.VBox:
        """Prompt, needle, page, the kind of score, and the buttons."""
        state, wide = self.state, {"width": "auto", "flex": "1 1 260px"}
        prompt = w.Text(continuous_update=False, layout=wide, value=state.prompt)
        needle = w.Text(continuous_update=False, layout=wide, value=state.needle)
        self.page = page = w.BoundedIntText(value=state.page, min=1, max=4096, layout={"width": "80px"})
        judge = w.ToggleButtons(options=[("words alone", "words"), ("in context", "layers")], value=state.judge)
        tip(prompt, "The question at the end of the document; press Enter.")
        tip(needle, "The fact that is planted in the document; leave it empty for none. Press Enter.")
        tip(page, BY_NAME["page"].tip)
        for name, widget in (("prompt", prompt), ("needle", needle), ("page", page), ("judge", judge)):
            widget.add_class(f"pp-{name}")
            bind(state, name, widget)
        first = row("pp-actions", labelled("prompt", prompt), labelled("scored by", judge, "76px"),
                     self.buttons.layers, self.buttons.answer)  # fmt: skip
        second = row("pp-actions", labelled("needle", needle), labelled("on page", page, "76px"), self.buttons.more,
                      self.cancel)  # fmt: skip
        return w.VBox([first, second])


def _source(state: StreamState, on_read: Callable[[], None]) -> w.VBox:
    """Controls of the document, hidden until its button is pressed."""
    text = w.Text(value=state.text, layout={"width": "320px"})
    tokens = w.BoundedIntText(value=state.tokens, min=2048, max=1_048_576, step=1024, layout={"width": "110px"})
    sizes = w.HBox(
        [
            button(name, f"{size:,} tokens", lambda size=size: setattr(tokens, "value", size))
            for name, size in SIZES.items()
        ]
    )
    tip(text, "“pydoc” (Python's manual), “jargon” or “bible” where they are installed, or the path of a UTF-8 file")
    tip(tokens, BY_NAME["tokens"].tip)

    def apply() -> None:
        state.update({"text": text.value.strip(), "tokens": tokens.value})
        on_read()

    state.observe(lambda c: setattr(text, "value", c["new"]), "text")
    state.observe(lambda c: setattr(tokens, "value", c["new"]), "tokens")
    read = button("Read it", "Make a document of this text", apply, button_style="info")
    drawer = column("pp-source", row("pp-actions", labelled("text", text), labelled("tokens", tokens), sizes, read))
    drawer.layout.display = "none"
    return drawer
