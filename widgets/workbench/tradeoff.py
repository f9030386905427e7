"""Cost against quality: time, reads and error of the layer on show over flux alpha, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import ipywidgets as w

from proteus_playground.attention.selectors import Way
from proteus_playground.attention.settings import Settings

from ..parts.boxes import button, column, row
from ..parts.plot import PAPER, blank, titled
from ..parts.state import PlayState
from .readout import mean_reads

ALPHAS = tuple(i / 8 for i in range(9))
RUNS = 3
LINES = (("time", "#D55E00", "dash"), ("keys read", "#0072B2", "solid"), ("output error", "#1b1f24", "dot"))


def measure(probe, layer: int, settings: Settings, way: Way, stop: Callable, progress: Callable) -> list[tuple]:
    """(alpha, time, reads, error) of each alpha: time and reads as shares of dense attention's; time None by masks."""
    rows, dense_reads = [], (len(probe.tokens) + 1) / 2
    for done, alpha in enumerate(ALPHAS):
        progress(done / len(ALPHAS), f"measuring at flux α {alpha:g}")
        now = replace(settings, flux_alpha=alpha)
        views = [probe.view(layer, now, way=way, stop=stop) for _ in range(RUNS if way.plain else 1)]
        view = views[-1]
        time = median(one.latency_ms for one in views) / view.dense_ms if way.plain else None
        rows.append((alpha, time, mean_reads(view) / dense_reads, view.error))
    return rows


class Tradeoff(w.VBox):
    """Empty until its button is pressed; a click on a point sets alpha. `on_measure()` asks for the numbers."""

    def __init__(self, state: PlayState, on_measure: Callable[[], object]):
        self.state, self.rows = state, []
        self.measure = button("Cost against quality over α", "Runs this layer at nine positions of flux α and draws "
                              "time, keys read and output error",
                              on_measure, icon="line-chart")  # fmt: skip
        self.said, self.widget = w.HTML(), None
        self.place = row("pp-curve")
        super().__init__([row("pp-ways-row", self.measure, self.said), self.place])
        state.observe(lambda _: self.follow(), "flux_alpha")

    def draw(self, rows: list[tuple], what: str) -> None:
        """rows: from `measure`; what: the layer and text that they belong to."""
        self.rows = rows
        if self.widget is None:
            self._make()
        with self.widget.batch_update():
            for at, trace in enumerate(self.widget.data[:3], 1):
                known = [(one[0], one[at]) for one in rows if one[at] is not None]
                trace.update(x=[x for x, _ in known], y=[y for _, y in known])
            self.follow()
        cheapest = min(rows, key=lambda one: one[2])
        self.said.value = (
            f'<span class="pp-note" role="note">{what}. At α {cheapest[0]:g} a query reads {cheapest[2]:.0%} '
            f"of the keys; its output differs from dense by {cheapest[3]:.0%}. Click a point to go there.</span>"
        )

    def follow(self) -> None:
        """Moves the mark to the present alpha."""
        if self.widget is not None:
            self.widget.data[3].update(x=[self.state.flux_alpha] * 2, y=[0, 10])

    def clear(self) -> None:
        """For another model or text, whose numbers are others."""
        self.rows, self.said.value = [], ""
        if self.widget is not None:
            with self.widget.batch_update():
                for trace in self.widget.data:
                    trace.update(x=[], y=[])

    def _make(self) -> None:
        layout = {
            **PAPER, "height": 230, "margin": {"l": 60, "r": 12, "t": 8, "b": 40}, "showlegend": True,
            "legend": {"orientation": "h", "y": 1.12, "x": 0},
            "xaxis": titled("flux α", range=[-0.02, 1.02]),
            "yaxis": titled("share of dense (log)", type="log", range=[-2.2, 1.3], tickvals=[0.01, 0.1, 1, 10],
                            ticktext=["1%", "10%", "100%", "10×"], showgrid=True, gridcolor="#eef0f2"),
        }  # fmt: skip
        lines = [
            {"type": "scatter", "mode": "lines+markers", "name": name, "x": [], "y": [],
             "line": {"color": colour, "dash": dash}, "hovertemplate": "α %{x}: %{y:.1%}<extra>" + name + "</extra>"}
            for name, colour, dash in LINES
        ]  # fmt: skip
        now = {"type": "scatter", "mode": "lines", "x": [], "y": [], "line": {"color": "#57606a", "width": 1},
               "name": "now", "hoverinfo": "skip"}  # fmt: skip
        self.widget = blank(layout, [*lines, now])
        for trace in self.widget.data[:3]:
            trace.on_click(self._clicked)
        self.place.children = (column("pp-figure", self.widget),)

    def _clicked(self, _, points, __) -> None:
        if points.xs:
            self.state.flux_alpha = float(points.xs[0])
