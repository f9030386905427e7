"""How the prototype panel is laid out: its controls, and the places of its pictures and words."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as w
from traitlets import Float, HasTraits

from proteus_playground.attention.settings import Control
from proteus_playground.playground.gate_story import Snapshot

from ..parts.controls import Knob, _labelled, tip
from ..parts.painted import Room
from ..stream.board import AUTO, styles
from ..workbench.board import _row
from ..workbench.readout import status_html

PACE = {"slow": 0.7, "normal": 0.25, "fast": 0.06}  # seconds between updates
STICKS = "How much of a prototype survives one update: at 0 it jumps to its keys, near 1 it hardly moves."
DECAY = Control("ema_decay", "ema", "EMA decay", 0.0, 0.99, 0.8, STICKS)
SMALL = w.Layout(width="76px")


class Settings(HasTraits):
    ema_decay = Float(DECAY.default)


class PrototypeBoard(w.VBox):
    """The widgets in their places. Buttons call `do`, the other controls `load`, `toggle` and `choose`."""

    def __init__(self, figure: w.DOMWidget):
        self.settings, self.room, self._filling = Settings(), Room(), False
        self.title = w.HTML('<div class="pp-title"><b>Gates and prototypes</b></div>')
        self.banner, self.numbers, self.status, self.text, self.said = (w.HTML() for _ in range(5))
        self.captions = {name: w.HTML() for name in ("map", "bars", "curves", "text")}
        self._make_boxes()
        head = _row("pp-head", self.title, self.status)
        top = w.VBox([self._travel(), self._surgery(), self.said])
        top.add_class("pp-top")
        for name, caption in self.captions.items():
            caption.add_class(f"pp-at-{name}")
        placed = [self.captions[name] for name in ("map", "bars", "curves")]
        picture, side = w.VBox([self.room, figure, *placed]), w.VBox([self.captions["text"], self.text])
        picture.add_class("pp-figure")
        side.add_class("pp-side")
        super().__init__([styles(), head, self.banner, top, self.numbers, _row("pp-panels", picture, side)])
        self.add_class("pp-app")
        self.add_class("pp-prototypes")

    def do(self, what: str, *operands: int) -> None:
        """A step, or surgery."""
        raise NotImplementedError

    def load(self) -> None:
        """From the beginning."""
        raise NotImplementedError

    def toggle(self, on: bool) -> None:
        """Play or pause."""
        raise NotImplementedError

    def choose(self, gate: int) -> None:
        """Follow another gate."""
        raise NotImplementedError

    def _make_boxes(self) -> None:
        self.play = w.ToggleButton(description="play", icon="play", layout=AUTO, tooltip="Update after update")
        self.speed = w.ToggleButtons(options=list(PACE), value="normal")
        self.start = w.ToggleButtons(options=[("scattered", True), ("the model's own", False)], value=True)
        self.layer, self.group, self.gate, self.other, self.head = (w.Dropdown(layout=SMALL) for _ in range(5))
        self.speed.add_class("pp-speed")
        self.start.add_class("pp-judge")
        tip(self.start, "Where prototypes are when it all begins")
        self.play.observe(lambda change: self.toggle(change["new"]), "value")
        for box in (self.start, self.layer, self.group):
            box.observe(lambda _: self._filling or self.load(), "value")
        self.gate.observe(lambda change: self._filling or self.choose(change["new"]), "value")

    def _travel(self) -> w.HBox:
        decay = Knob(self.settings, DECAY, live=True)
        decay.layout.flex = "0 0 230px"
        step = _button("step ▶", "One moving average over the next keys", lambda: self.do("step"))
        reset = _button("reset", "The model as it came, prototypes where they began", self.load)
        return _row("pp-actions", step, self.play, self.speed, reset, decay, _labelled("begin", self.start, "46px"))

    def _surgery(self) -> w.HBox:
        gate, other, head = self.gate, self.other, self.head
        return _row(
            "pp-actions", _labelled("layer", self.layer, "42px"), _labelled("KV group", self.group, "72px"),
            _labelled("gate", gate, "38px"),
            _button("clone", "Copy this gate into a free slot", lambda: self.do("clone", gate.value)),
            _button("prune", "Remove this gate", lambda: self.do("prune", gate.value)),
            _button("merge with", "Fold the other gate into this one",
                    lambda: self.do("merge", gate.value, other.value)), other,
            _button("move to head", "Give this gate to another head of its group",
                    lambda: self.do("move", gate.value, head.value)), head,
            _button("add a head", "One more query head in every group", lambda: self.do("add head")),
        )  # fmt: skip

    def fill_surgery(self, now: Snapshot, chosen: int) -> None:
        """What surgery can choose from: live gates, the nearest one first to be merged, other heads."""
        live = [int(slot) for slot in now.alive.nonzero()[0]]
        others = [slot for slot in live if slot != chosen] or [chosen]
        heads = [head for head in range(now.heads) if head != now.head[chosen]] or [0]
        self.fill(self.gate, live, chosen)
        near = int(now.nearest[chosen])
        self.fill(self.other, others, near if near in others else others[0])
        self.fill(self.head, heads, self.head.value if self.head.value in heads else heads[0])

    def fill(self, box: w.Dropdown, options: list[int], value: int) -> None:
        """Other options, without asking for what they say."""
        self._filling = True
        try:
            if list(box.options) != options:
                box.options = options
            if box.value != value:
                box.value = value
        finally:
            self._filling = False

    def say(self, state: str, what: str = "") -> None:
        self.status.value = status_html(state, None, what)


def _button(words: str, why: str, act: Callable[[], None]) -> w.Button:
    made = w.Button(description=words, tooltip=why, layout=AUTO)
    made.on_click(lambda _: act())
    return made
