"""Small panels of the notebook 09: a control or two, and one sentence measured at their setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

import ipywidgets as w
from proteus_playground.experiments import touch
from proteus_playground.experiments.touch import Found

from ..parts.boxes import button, labelled, row
from ..parts.controls import tip
from ..parts.html import note_html
from ..parts.panel import Panel
from ..parts.terms import with_terms


@dataclass(frozen=True)
class Kind:
    """title, note: what the panel shows. knobs: name of an argument of `measure` -> (its widget's maker, a tooltip)."""

    title: str
    note: str
    measure: Callable[..., Found]
    knobs: dict[str, tuple[Callable[[], w.Widget], str]]


def _choice(*options, value=None) -> Callable[[], w.Widget]:
    return lambda: w.ToggleButtons(options=list(options), value=options[0] if value is None else value)


def _slider(low: float, high: float, value: float, step: float) -> Callable[[], w.Widget]:
    return lambda: w.FloatSlider(value=value, min=low, max=high, step=step, continuous_update=False)


KINDS = {
    "int8": Kind(
        "INT8 against its bound",
        "Keys and values of shelf-mini, 512 tokens, are stored in 8 bits with one scale per row, and read again.",
        touch.int8_error,
        {
            "layer": (_choice(0, 1, 2), "The layer of shelf-mini whose keys and values are stored."),
            "outlier": (_choice(1, 2, 4, 8, 16), "Factor on one feature of every key; the exact result stays."),
        },
    ),
    "top-a": Kind(
        "Top-A while a model writes",
        "shelf-mini goes on writing after 256 tokens of a shelf, always with the same random numbers.",
        touch.top_a,
        {
            "mode": (_choice("off", "filter", "reweigh"), "What Top-A does to the candidates of the next token."),
            "share": (_slider(0, 1, 0.5, 0.1), "filter: candidates below this share of the best are dropped."),
            "strength": (_slider(0, 40, 5, 5), "reweigh: nats that are added per unit of agreement."),
        },
    ),
    "controller": Kind(
        "A controller that holds a target",
        "A layer of random weights reads 2,048 tokens again and again; a controller moves one knob between the calls.",
        touch.hold,
        {
            "target": (_choice("density", "latency"), "density moves flux α; latency moves the shortlist L."),
            "share": (_slider(0.1, 0.9, 0.5, 0.1), "The goal, as a share of what the dear end of the knob costs."),
        },
    ),
    "bank": Kind(
        "The KV bank against a plain cache",
        "shelf-mini reads a text, then writes 20 tokens: with the KV bank, and with a cache that keeps every key.",
        touch.write_on,
        {
            "tokens": (_choice(256, 1024, 2048, 4096, value=1024), "Tokens that are read before it writes."),
            "shortlist": (_choice(32, 64, 128, 256, value=128), "The shortlist L of the bank."),
        },
    ),
}  # fmt: skip


class TouchPanel(Panel):
    """What `touch_panel` returns. `found` is the last measurement, None before it; `knobs` the controls by name."""

    def __init__(self, kind: Kind):
        super().__init__(kind.title, {})
        self.found: Found | None = None
        self._measure = kind.measure
        self.knobs = {name: tip(make(), what) for name, (make, what) in kind.knobs.items()}
        self.cancel = button("Stop", "Stop this measurement", self.halt, disabled=True)
        again = button("measure again", "Measure once more at the same setting", self.ask)
        self.said = w.HTML()
        controls = [labelled(name, knob, "78px") for name, knob in self.knobs.items()]
        self.place("pp-touch", self.banner, *controls, row("pp-ways-row", again, self.cancel), self.said)
        self.banner.value = note_html(kind.note)
        for knob in self.knobs.values():
            knob.observe(lambda _: self.ask(), "value")
        self.ask()

    def ask(self) -> None:
        """Measures at the present setting; the last sentence is grey until the new one is there."""
        setting = {name: knob.value for name, knob in self.knobs.items()}
        self.number += 1
        self._write(old=True)
        self.say("busy", what="measuring …")
        self.worker.cancel()
        self.worker.submit("frame", lambda stop, progress: self._measure(**setting, stop=stop, progress=progress),
                           self._show, self._failed, self._progress)  # fmt: skip

    def _show(self, _: int, found: Found) -> None:
        self.found = found
        self._write()
        self.say("fresh")

    def _write(self, old: bool = False) -> None:
        if self.found is not None:
            more = f"<pre>{escape(self.found.text)}</pre>" if self.found.text else ""
            grey = " pp-old" if old else ""
            self.said.value = f'<div class="pp-found{grey}">{with_terms(self.found.sentence)}{more}</div>'
