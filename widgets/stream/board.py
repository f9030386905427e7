"""How the chunk buffer panel is laid out: its controls, and the places of its pictures and words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import ipywidgets as w

from ..parts.controls import Knob, _labelled, bind, tip
from ..parts.painted import Room
from ..workbench.board import _row
from ..workbench.readout import caption_html, status_html
from .state import BY_NAME, PLAN, StreamState
from .words import LEGENDS

SPEEDS = {"slow": 1200, "normal": 500, "fast": 150}  # milliseconds per chunk
AUTO = w.Layout(width="auto")


def styles() -> w.HTML:
    """The playground's style sheets, for the front of a panel."""
    sheets = "".join(
        (files("proteus_playground.widgets.parts") / f"{name}.css").read_text("utf-8")
        for name in ("style", "stream", "learning")
    )
    style = w.HTML(f"<style>{sheets}</style>")
    style.layout.display = "none"
    return style


class Transport(w.HBox):
    """Play, pause, step, speed and a slider of all steps; `step` follows, and `on_step(step)` hears of it."""

    def __init__(self, on_step: Callable[[int], None], jump: str = "", jump_tip: str = ""):
        self._on_step = on_step
        self.play = w.Play(value=0, min=0, max=1, step=1, interval=SPEEDS["normal"],
                           show_repeat=False, layout=w.Layout(width="96px"))  # fmt: skip
        self.scrub = w.IntSlider(value=0, min=0, max=1, readout=False, continuous_update=True,
                                 layout=w.Layout(width="auto", flex="1 1 200px"))  # fmt: skip
        self.scrub.style.handle_color = "#0072B2"
        self.speed = w.ToggleButtons(options=list(SPEEDS), value="normal")
        self.back = w.Button(description="◀ step", tooltip="One step back", layout=AUTO)
        self.forward = w.Button(description="step ▶", tooltip="One step forward", layout=AUTO)
        self.jump = w.Button(description=jump, tooltip=jump_tip, layout=AUTO)
        self.jump.layout.display = "" if jump else "none"
        tip(self.scrub, "Drag to go back and forth")
        self.play.add_class("pp-play")
        self.speed.add_class("pp-speed")
        self.scrub.add_class("pp-scrub")
        self.back.on_click(lambda _: self._click(-1))
        self.forward.on_click(lambda _: self._click(1))
        self.speed.observe(lambda change: setattr(self.play, "interval", SPEEDS[change["new"]]), "value")
        for widget in (self.play, self.scrub):
            widget.observe(lambda change: self.go(change["new"]), "value")
        super().__init__([self.back, self.play, self.forward, self.speed, self.scrub, self.jump])
        self.add_class("pp-transport")

    @property
    def step(self) -> int:
        return self.scrub.value

    @property
    def last(self) -> int:
        return self.scrub.max

    def go(self, step: int) -> None:
        """To `step`, within what there is. A moving player is not sent its own position: it may be further already."""
        step = max(0, min(step, self.last))
        new, self._heard = step != self._heard, step
        self.scrub.value = step
        if abs(self.play.value - step) > (1 if self.playing else 0):
            self.play.value = step
        if new:
            self._on_step(step)

    _heard = -1

    @property
    def playing(self) -> bool:
        return bool(getattr(self.play, "playing", getattr(self.play, "_playing", False)))

    def pause(self) -> None:
        setattr(self.play, "playing" if self.play.has_trait("playing") else "_playing", False)

    def extend(self, last: int, step: int) -> None:
        """Another number of steps, and where to stand among them; `on_step` is not called."""
        self._heard = step
        for widget in (self.play, self.scrub):
            if last < widget.value:
                widget.value = step
            widget.max = last
            widget.value = step

    def _click(self, by: int) -> None:
        self.pause()
        self.go(self.step + by)


@dataclass(frozen=True)
class Buttons:
    """The buttons of the panel's middle row."""

    layers: w.Button
    answer: w.Button
    cancel: w.Button
    more: w.ToggleButton


class StreamBoard(w.VBox):
    """The widgets in their places."""

    def __init__(
        self, state: StreamState, figure: w.DOMWidget, on_step: Callable[[int], None], on_read: Callable[[], None]
    ):
        self.state = state
        self.title = w.HTML('<div class="pp-title"><b>Chunk buffer</b></div>')
        self.banner, self.numbers, self.status, self.events = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.captions = {name: w.HTML() for name in ("sky", "curves", "text")}
        self.buffer, self.answer = w.HTML(), w.HTML()
        self.transport = Transport(on_step, "to the needle", "Go to the step that reads the needle")
        self.buttons = Buttons(
            w.Button(description="Score in context", layout=AUTO,
                     tooltip="Let SmolLM2's own queries and keys judge every token: minutes on a CPU, once"),
            w.Button(description="Answer", layout=AUTO,
                     tooltip="Let SmolLM2 answer the prompt from what the buffer holds now, and nothing else"),
            w.Button(description="Cancel", layout=AUTO, disabled=True,
                     tooltip="Stop what is running; what is scored stays"),
            w.ToggleButton(description="Another document", icon="file-text-o", layout=AUTO),
        )  # fmt: skip
        for name, caption in self.captions.items():
            caption.add_class(f"pp-at-{name}")
        picture = w.VBox([Room(), figure, self.captions["sky"], self.captions["curves"]])
        picture.add_class("pp-figure")
        side = w.VBox([self.captions["text"], self.buffer])
        side.add_class("pp-side")
        drawer = _source(state, on_read)
        self.buttons.more.observe(lambda c: setattr(drawer.layout, "display", "" if c["new"] else "none"), "value")
        top = w.VBox([_knobs(state), self._asking()])
        top.add_class("pp-top")
        head = _row("pp-head", self.title, self.status)
        panels = _row("pp-panels", picture, side)
        super().__init__([styles(), head, self.banner, top, drawer, self.transport, self.numbers, self.answer, panels,
                          self.events])  # fmt: skip
        self.add_class("pp-app")
        self.add_class("pp-stream")
        self.caption("sky", "Scores along the document", "Reading the document …")

    def caption(self, name: str, title: str, sentence: str) -> None:
        self.captions[name].value = caption_html(title, LEGENDS[name], sentence)

    def say(self, state: str, share: float | None = None, what: str = "") -> None:
        self.status.value = status_html(state, share, what)

    def _asking(self) -> w.VBox:
        """Prompt, needle, page, who judges, and the buttons."""
        state, wide = self.state, w.Layout(width="auto", flex="1 1 260px")
        prompt = w.Text(continuous_update=False, layout=wide, value=state.prompt)
        needle = w.Text(continuous_update=False, layout=wide, value=state.needle)
        page = w.BoundedIntText(value=state.page, min=1, max=4096, layout=w.Layout(width="80px"))
        self.page = page
        judge = w.ToggleButtons(options=[("words alone", "words"), ("in context", "layers")], value=state.judge)
        tip(prompt, "What is asked at the end of the document; press Enter.")
        tip(needle, "The fact that is planted; leave it empty for none. Press Enter.")
        tip(page, BY_NAME["page"].tip)
        for name, widget in (("prompt", prompt), ("needle", needle), ("page", page), ("judge", judge)):
            widget.add_class(f"pp-{name}")
            bind(state, name, widget)
        first = _row("pp-actions", _labelled("prompt", prompt), _labelled("judged by", judge, "76px"),
                     self.buttons.layers, self.buttons.answer)  # fmt: skip
        second = _row("pp-actions", _labelled("needle", needle), _labelled("on page", page, "76px"), self.buttons.more,
                      self.buttons.cancel)  # fmt: skip
        return w.VBox([first, second])


def _knobs(state: StreamState) -> w.GridBox:
    knobs = [Knob(state, BY_NAME[name], live=True) for name in PLAN]
    box = w.GridBox(knobs, layout=w.Layout(grid_template_columns="repeat(auto-fit, minmax(210px, 1fr))"))
    box.add_class("pp-knobs")
    return box


def _source(state: StreamState, on_read: Callable[[], None]) -> w.VBox:
    """Behind a button: which document, how long."""
    text = w.Text(value=state.text, layout=w.Layout(width="320px"))
    tokens = w.BoundedIntText(value=state.tokens, min=2048, max=1_048_576, step=1024, layout=w.Layout(width="110px"))
    sizes = w.HBox(
        [w.Button(description=name, layout=AUTO, tooltip=f"{size:,} tokens") for name, size in SIZES.items()]
    )
    read = w.Button(description="Read it", button_style="info", tooltip="Make a document of this text", layout=AUTO)
    tip(text, "“pydoc” (Python's manual), “jargon” or “bible” where they are installed, or the path of a UTF-8 file")
    tip(tokens, BY_NAME["tokens"].tip)
    for button, size in zip(sizes.children, SIZES.values(), strict=True):
        button.on_click(lambda _, size=size: setattr(tokens, "value", size))

    def apply(_) -> None:
        state.update({"text": text.value.strip(), "tokens": tokens.value})
        on_read()

    state.observe(lambda c: setattr(text, "value", c["new"]), "text")
    state.observe(lambda c: setattr(tokens, "value", c["new"]), "tokens")
    read.on_click(apply)
    drawer = w.VBox([_row("pp-actions", _labelled("text", text), _labelled("tokens", tokens), sizes, read)])
    drawer.add_class("pp-source")
    drawer.layout.display = "none"
    return drawer


SIZES = {"10K": 10_240, "100K": 100_000, "one million": 1_048_576}
