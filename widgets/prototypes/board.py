"""The prototype panel's layout and controls."""

from __future__ import annotations

import ipywidgets as w
from traitlets import Float, HasTraits

from proteus_playground.attention.settings import Control
from proteus_playground.playground.gate_story import Snapshot

from ..parts.boxes import button, column, labelled, row
from ..parts.controls import Knob, tip
from ..parts.painted import Room
from ..parts.panel import Panel
from ..parts.transport import Player
from .words import LEGENDS

SECONDS = {"slow": 0.7, "normal": 0.25, "fast": 0.06}  # seconds between updates
KEEPS = "The share of a prototype that one update keeps: at 0 it becomes the mean of its keys, near 1 it hardly moves."
DECAY = Control("ema_decay", "ema", "EMA decay", 0.0, 0.99, 0.8, KEEPS)
SMALL = {"width": "76px"}


class Settings(HasTraits):
    ema_decay = Float(DECAY.default)


class PrototypeBoard(Panel):
    """The widgets in their places. Buttons call `do`, other controls `load`, `toggle` and `choose`, of the subclass."""

    def __init__(self, figure: w.DOMWidget):
        super().__init__("Gates and prototypes", LEGENDS)
        self.settings, self.room, self._filling = Settings(), Room(), False
        self.text, self.said = w.HTML(), w.HTML()
        self._make_boxes()
        top = column("pp-top", self._travel(), self._surgery(), self.said)
        over = [self.captions[name] for name in ("map", "bars", "curves")]
        panels = self.beside([self.room, figure, *over], [self.captions["text"], self.text])
        self.place("pp-prototypes", self.banner, top, self.numbers, panels)

    def _make_boxes(self) -> None:
        tips = (
            "Take one update after another",
            "Move each prototype towards the keys that it lures among the next ones",
            "",
        )
        self.player = Player(SECONDS, self.toggle, lambda: self.do("step"), tips=tips)
        self.start = w.ToggleButtons(options=[("scattered", True), ("the model's own", False)], value=True)
        self.layer, self.group, self.gate, self.other, self.head = (w.Dropdown(layout=SMALL) for _ in range(5))
        self.start.add_class("pp-judge")
        tip(self.start, "Where the prototypes are at the beginning")
        for box in (self.start, self.layer, self.group):
            box.observe(lambda _: self._start_again(), "value")
        self.gate.observe(lambda change: self._gate_chosen(change["new"]), "value")

    def _start_again(self) -> None:
        if not self._filling:
            self.load()

    def _gate_chosen(self, gate: int) -> None:
        if not self._filling:
            self.choose(gate)

    def _travel(self) -> w.HBox:
        decay = Knob(self.settings, DECAY, live=True)
        decay.layout.flex = "0 0 230px"
        reset = button(
            "reset", "Undo everything: the model as it was loaded, and the prototypes at their first places", self.load
        )
        return row("pp-actions", *self.player.buttons, reset, decay, labelled("begin", self.start, "46px"))

    def _surgery(self) -> w.HBox:
        gate, other, head = self.gate, self.other, self.head
        return row(
            "pp-actions", labelled("layer", self.layer, "42px"), labelled("KV group", self.group, "72px"),
            labelled("gate", gate, "38px"),
            button("clone", "Copy this gate into a free slot", lambda: self.do("clone", gate.value)),
            button("prune", "Remove this gate", lambda: self.do("prune", gate.value)),
            button("merge with", "Fold the other gate into this one",
                    lambda: self.do("merge", gate.value, other.value)), other,
            button("move to head", "Give this gate to another head of its group",
                    lambda: self.do("move", gate.value, head.value)), head,
            button("add a head", "One more query head in every group", lambda: self.do("add head")),
        )  # fmt: skip

    def fill_surgery(self, now: Snapshot, chosen: int) -> None:
        """Offers what surgery may choose: live gates, a gate to merge with (first the nearest one), and other heads."""
        live = [int(slot) for slot in now.alive.nonzero()[0]]
        others = [slot for slot in live if slot != chosen] or [chosen]
        heads = [head for head in range(now.heads) if head != now.head[chosen]] or [0]
        self.fill(self.gate, live, chosen)
        near = int(now.nearest[chosen])
        self.fill(self.other, others, near if near in others else others[0])
        self.fill(self.head, heads, self.head.value if self.head.value in heads else heads[0])

    def fill(self, box: w.Dropdown, options: list[int], value: int) -> None:
        """Sets options and value without calling `load` or `choose`."""
        self._filling = True
        try:
            if list(box.options) != options:
                box.options = options
            if box.value != value:
                box.value = value
        finally:
            self._filling = False
