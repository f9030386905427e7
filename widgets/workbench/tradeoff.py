"""Cost against quality over flux alpha, measured on this machine: time, reads and error of the layer on show, and the
loss of the whole model, which is measured last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import log10
from statistics import median

import ipywidgets as w

from proteus_playground.attention.selectors import Way
from proteus_playground.attention.settings import Settings

from ..parts.boxes import button, column, row
from ..parts.painted import Room
from ..parts.plot import PAPER, blank, titled
from ..parts.state import PlayState
from .readout import mean_reads

ALPHAS = tuple(i / 8 for i in range(9))
RUNS = 3
LINES = (("time", "#D55E00", "dash"), ("keys read", "#0072B2", "solid"), ("output error", "#1b1f24", "dot"))
NLL = "NLL over dense (right axis)"
OLD = "pp-old-curve"
NLL_COLOUR = "#009E73"


@dataclass
class Curve:
    """What was measured, and of what: a layer, its settings but for alpha, and its way of choosing keys."""

    layer: int
    settings: Settings
    way: Way
    rows: list[tuple]  # from `measure`
    nll: dict[float, float] = field(default_factory=dict)  # alpha -> NLL of the whole model less that of dense, nats
    no_nll: str = ""  # why there is none, or no more; "" where it is there or on its way

    def of(self, layer: int, settings: Settings, way: Way) -> bool:
        """Whether these are the figures of that layer, those settings but for alpha, and that way."""
        return (layer, replace(settings, flux_alpha=0.0), way) == (
            self.layer, replace(self.settings, flux_alpha=0.0), self.way,
        )  # fmt: skip

    @property
    def due(self) -> float | None:
        """The next alpha whose loss is not there yet."""
        return None if self.no_nll else next((alpha for alpha in ALPHAS if alpha not in self.nll), None)


def measure(probe, layer: int, settings: Settings, way: Way, stop: Callable, progress: Callable) -> Curve:
    """(alpha, time, reads, error) of each alpha: time and reads as shares of dense attention's; time None by masks.

    The loss of the whole model is left to the caller, who asks `Curve.due`.
    """
    rows, dense_reads = [], (len(probe.tokens) + 1) / 2
    for done, alpha in enumerate(ALPHAS):
        progress(done / len(ALPHAS), f"measuring at flux α {alpha:g}")
        now = replace(settings, flux_alpha=alpha)
        views = [probe.view(layer, now, way=way, stop=stop) for _ in range(RUNS if way.plain else 1)]
        view = views[-1]
        time = median(one.latency_ms for one in views) / view.dense_ms if way.plain else None
        rows.append((alpha, time, mean_reads(view) / dense_reads, view.error))
    why = "the whole model runs with our own selector only" if not way.plain else ""
    return Curve(layer, settings, way, rows, no_nll="random weights predict nothing" if probe.random else why)


class Tradeoff(w.VBox):
    """Empty until its button is pressed; a click on a point sets alpha. `on_measure()` asks for the numbers."""

    def __init__(self, state: PlayState, on_measure: Callable[[], object]):
        self.state, self.curve, self.what = state, None, ""
        self.measure = button("Cost against quality over α", "Runs this layer, then the whole model, at nine positions "
                              "of flux α, and draws time, keys read, output error and loss",
                              on_measure, icon="line-chart")  # fmt: skip
        self.said, self.widget = w.HTML(), None
        self.place = row("pp-curve")
        super().__init__([row("pp-ways-row", self.measure, self.said), self.place])
        state.observe(lambda _: self.follow(), "flux_alpha")

    def draw(self, curve: Curve, what: str) -> None:
        """Shows a curve, whole or with losses still to come; what: the layer and text that it belongs to."""
        self.curve, self.what = curve, what
        if self.widget is None:
            self._make()
        self.place.layout.display = ""
        with self.widget.batch_update():
            for at, trace in enumerate(self.widget.data[:3], 1):
                known = [(one[0], one[at]) for one in curve.rows if one[at] is not None]
                trace.update(x=[x for x, _ in known], y=[y for _, y in known])
            slowest = max([1.0, *(one[1] for one in curve.rows if one[1] is not None)])
            self.widget.layout.yaxis.range = [-2.2, max(1.3, log10(slowest) + 0.2)]
            losses = sorted(curve.nll.items())
            self.widget.data[3].update(x=[x for x, _ in losses], y=[y for _, y in losses])
            low, high = min([0.0, *curve.nll.values()]), max([0.1, *curve.nll.values()])
            self.widget.layout.yaxis2.range = [low - 0.08 * (high - low), high + 0.15 * (high - low)]
            self.follow()
        self._say()

    @property
    def old(self) -> bool:
        return OLD in self.place._dom_classes

    def mark(self, old: bool) -> None:
        """Greys the figures, and says so, where they are those of another layer, other settings or another way."""
        if self.curve is None or old == self.old:
            return
        (self.place.add_class if old else self.place.remove_class)(OLD)
        self._say()

    def halt(self) -> None:
        """Says that no more losses come."""
        if self.curve is not None and self.curve.due is not None:
            self.curve.no_nll = "stopped; press the button to measure again"
            self._say()

    def _say(self) -> None:
        curve = self.curve
        cheapest = min(curve.rows, key=lambda one: one[2])
        old = self.old
        earlier = "These are the figures of earlier settings: press the button to measure again. " if old else ""
        said = (
            f"{earlier}{self.what}. At α {cheapest[0]:g} a query reads {cheapest[2]:.0%} of the keys; its output "
            f"differs from dense by {cheapest[3]:.0%}. {loss_sentence(curve, old)} Click a point to go there."
        )
        self.said.value = f'<span class="pp-note" role="note">{said}</span>'

    def follow(self) -> None:
        """Moves the mark to the present alpha."""
        if self.widget is not None:
            self.widget.data[4].update(x=[self.state.flux_alpha] * 2, y=[0, 10])

    def clear(self) -> None:
        """For another model or text, whose numbers are others."""
        self.curve, self.said.value, self.place.layout.display = None, "", "none"
        if self.widget is not None:
            with self.widget.batch_update():
                for trace in self.widget.data:
                    trace.update(x=[], y=[])

    def _make(self) -> None:
        layout = {
            **PAPER, "height": 270, "margin": {"l": 60, "r": 60, "t": 48, "b": 40}, "showlegend": True,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "xaxis": titled("flux α", range=[-0.02, 1.02]),
            "yaxis": titled("share of dense (log)", type="log", range=[-2.2, 1.3], tickvals=[0.01, 0.1, 1, 10, 100],
                            ticktext=["1%", "10%", "100%", "10×", "100×"], showgrid=True, gridcolor="#eef0f2"),
            "yaxis2": titled("nats per token", overlaying="y", side="right", tickmode="auto", nticks=5,
                             tickformat=".2f", range=[-0.01, 0.1]),
        }  # fmt: skip
        lines = [
            {"type": "scatter", "mode": "lines+markers", "name": name, "x": [], "y": [],
             "line": {"color": colour, "dash": dash}, "hovertemplate": "α %{x}: %{y:.1%}<extra>" + name + "</extra>"}
            for name, colour, dash in LINES
        ]  # fmt: skip
        loss = {"type": "scatter", "mode": "lines+markers", "name": NLL, "x": [], "y": [], "yaxis": "y2",
                "line": {"color": NLL_COLOUR}, "marker": {"symbol": "diamond", "size": 8},
                "hovertemplate": "α %{x}: %{y:+.3f} nats<extra>NLL</extra>"}  # fmt: skip
        now = {"type": "scatter", "mode": "lines", "x": [], "y": [], "line": {"color": "#57606a", "width": 1},
               "name": "now", "hoverinfo": "skip"}  # fmt: skip
        self.widget = blank(layout, [*lines, loss, now])
        for trace in self.widget.data[:4]:
            trace.on_click(self._clicked)
        self.place.children = (column("pp-figure", self.widget, Room()),)

    def _clicked(self, _, points, __) -> None:
        if points.xs:
            self.state.flux_alpha = float(points.xs[0])


def loss_sentence(curve: Curve, old: bool = False) -> str:
    """The loss of the whole model at the largest alpha, or what is still to come, or why there is none.

    old: of earlier settings, whose missing values do not come any more.
    """
    done = f"{len(curve.nll)} of {len(ALPHAS)} values are there"
    if curve.no_nll:
        return f"No NLL: {curve.no_nll}." if not curve.nll else f"NLL: {done}; {curve.no_nll}."
    if curve.due is not None:
        return f"NLL: {done}." if old else f"NLL of the whole model: being measured, {done}."
    last = ALPHAS[-1]
    return f"With all layers at α {last:g} the whole model's NLL is {curve.nll[last]:+.3f} nats per token from dense."
