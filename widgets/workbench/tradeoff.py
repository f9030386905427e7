"""Cost against quality over flux alpha, measured on this machine, of B and of what is pinned as A.

Time, reads and error are those of the layer on show; the loss is the whole model's, and is measured last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from math import log10
from statistics import median

import ipywidgets as w

from ..parts.boxes import button, column, row
from ..parts.painted import Room
from ..parts.plot import PAPER, blank, titled
from ..parts.state import Pin, PlayState
from .readout import mean_reads

ALPHAS = tuple(i / 8 for i in range(9))
RUNS = 3
LINES = (("time", "#D55E00", "dash"), ("keys read", "#0072B2", "solid"), ("output error", "#1b1f24", "dot"))
NLL = "NLL over dense (right axis)"
OLD = "pp-old-curve"
FAINT = 0.4  # opacity of A's lines
NLL_COLOUR = "#009E73"


@dataclass
class Curve:
    """What was measured of one layer: time, reads and error at each alpha, and the loss of the whole model."""

    layer: int
    of: Pin  # settings, way of choosing keys, and model; its alpha is 0, as every alpha is measured
    rows: list[tuple]  # from `measure`
    nll: dict[float, float] = field(default_factory=dict)  # alpha -> NLL of the whole model less that of dense, nats
    no_nll: str = ""  # why there is none, or no more; "" where it is there or on its way

    @property
    def due(self) -> float | None:
        """The next alpha whose loss is not there yet."""
        return None if self.no_nll else next((alpha for alpha in ALPHAS if alpha not in self.nll), None)


def lines(*shown: Pin | None) -> list[Pin]:
    """What curves are of, each once: settings that differ in alpha only lie on one curve. None is left out."""
    zero = [pin._replace(settings=replace(pin.settings, flux_alpha=0.0)) for pin in shown if pin is not None]
    return list(dict.fromkeys(zero))


def names(count: int) -> list[str]:
    """What stands before the words on each of `count` curves."""
    return ["B: ", "A: "] if count == 2 else [""]


def measure_all(layer: int, asked: list[tuple], stop: Callable, progress: Callable) -> list[Curve]:
    """The curve of each (probe, what it is of) in `asked`, without losses: B's first, then A's if there is one."""
    found = []
    for (probe, of), name in zip(asked, names(len(asked)), strict=True):

        def tell(share: float, what: str, name: str = name, done: int = len(found)) -> None:
            progress((done + share) / len(asked), name + what)

        found.append(measure(probe, layer, of, stop, tell))
    return found


def measure(probe, layer: int, of: Pin, stop: Callable, progress: Callable) -> Curve:
    """(alpha, time, reads, error) of each alpha: time and reads as shares of dense attention's; time None by masks.

    The loss of the whole model is left to the caller, who asks `Curve.due`.
    """
    way = of.way
    rows, dense_reads = [], (len(probe.tokens) + 1) / 2
    for done, alpha in enumerate(ALPHAS):
        progress(done / len(ALPHAS), f"measuring at flux α {alpha:g}")
        now = replace(of.settings, flux_alpha=alpha)
        views = [probe.view(layer, now, way=way, stop=stop) for _ in range(RUNS if way.plain else 1)]
        view = views[-1]
        time = median(one.latency_ms for one in views) / view.dense_ms if way.plain else None
        rows.append((alpha, time, mean_reads(view) / dense_reads, view.error))
    why = "the whole model runs with our own selector only" if not way.plain else ""
    return Curve(layer, of, rows, no_nll="random weights predict nothing" if probe.random else why)


class Tradeoff(w.VBox):
    """Empty until its button is pressed; a click on a point sets alpha. `on_measure()` asks for the numbers."""

    def __init__(self, state: PlayState, on_measure: Callable[[], object]):
        self.state, self.what = state, ""
        self.curves: list[Curve] = []  # of B, and of A where it is another
        self.measure = button("Cost against quality over α", "Runs this layer, then the whole model, at nine positions "
                              "of flux α, and draws time, keys read, output error and loss",
                              on_measure, icon="line-chart")  # fmt: skip
        self.said, self.widget = w.HTML(), None
        self.place = row("pp-curve")
        super().__init__([row("pp-ways-row", self.measure, self.said), self.place])

    def draw(self, curves: list[Curve], what: str) -> None:
        """Shows curves, whole or with losses still to come; what: the layer and text that they belong to."""
        self.curves, self.what = curves, what
        if self.widget is None:
            self._make()
        self.place.layout.display = ""
        with self.widget.batch_update():
            for traces, curve in zip_longest(self._lines(), curves):
                _fill(traces, curve)
            slowest = max([1.0, *(one[1] for curve in curves for one in curve.rows if one[1] is not None)])
            self.widget.layout.yaxis.range = [-2.2, max(1.3, log10(slowest) + 0.2)]
            losses = [loss for curve in curves for loss in curve.nll.values()]
            low, high = min([0.0, *losses]), max([0.1, *losses])
            self.widget.layout.yaxis2.range = [low - 0.08 * (high - low), high + 0.15 * (high - low)]
        self._say()

    def _lines(self) -> tuple:
        """The traces of B's curve and of A's."""
        return self.widget.data[:4], self.widget.data[6:]

    @property
    def old(self) -> bool:
        return OLD in self.place._dom_classes

    def are_of(self, layer: int, shown: list[Pin]) -> bool:
        """Whether the curves are those of `shown`, from `lines`, in that layer."""
        return bool(self.curves) and [(one.layer, one.of) for one in self.curves] == [(layer, of) for of in shown]

    @property
    def unfinished(self) -> Curve | None:
        """The first curve with losses to come."""
        return next((curve for curve in self.curves if curve.due is not None), None)

    def mark(self, old: bool, alpha_a: float | None) -> None:
        """Moves the marks to the present alpha and to that of A, None where A is not shown.

        Greys the figures, and says so, where they are those of another layer, other settings or another way.
        """
        if not self.curves:
            return
        with self.widget.batch_update():
            for trace, alpha in zip(self.widget.data[4:6], (self.state.flux_alpha, alpha_a), strict=True):
                trace.update(x=[alpha or 0.0] * 2, y=[0, 10], visible=alpha is not None)
        if old != self.old:
            (self.place.add_class if old else self.place.remove_class)(OLD)
            self._say()

    def wait(self) -> None:
        """Says that figures are being measured, until `draw` or `halt`."""
        self.said.value = '<span class="pp-note" role="status">Being measured …</span>'

    def halt(self) -> None:
        """Says that no more figures come."""
        for curve in self.curves:
            if curve.due is not None:
                curve.no_nll = "stopped; press the button to measure again"
        if self.curves:
            self._say()
        else:
            self.said.value = ""

    def _say(self) -> None:
        earlier = "These are the figures of earlier settings: press the button to measure again. " if self.old else ""
        said = " A, the faint lines: ".join(curve_sentence(curve, self.old) for curve in self.curves)
        said = f"{earlier}{self.what}. {names(len(self.curves))[0]}{said} Click a point to go there."
        self.said.value = f'<span class="pp-note" role="note">{said}</span>'

    def clear(self) -> None:
        """For another model or text, whose numbers are others."""
        self.curves, self.said.value, self.place.layout.display = [], "", "none"
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
        mark = {"type": "scatter", "mode": "lines", "x": [], "y": [], "hoverinfo": "skip"}
        marks = [{**mark, "name": "now", "line": {"color": "#57606a", "width": 1}},
                 {**mark, "name": "A", "line": {"color": "#57606a", "width": 1, "dash": "dash"}}]  # fmt: skip
        self.widget = blank(layout, [*_traces("B"), *marks, *_traces("A")])
        for trace in (trace for traces in self._lines() for trace in traces):
            trace.on_click(self._clicked)
        self.place.children = (column("pp-figure", self.widget, Room()),)

    def _clicked(self, _, points, __) -> None:
        if points.xs:
            self.state.flux_alpha = float(points.xs[0])


def _traces(of: str) -> list[dict]:
    """Lines of time, reads, error and loss of "B" or of "A", whose lines are faint and not in the legend."""
    shown = {"type": "scatter", "mode": "lines+markers", "x": [], "y": [],
             "opacity": 1 if of == "B" else FAINT, "showlegend": of == "B"}  # fmt: skip
    behind = "" if of == "B" else " of A"
    lines = [
        {**shown, "name": name + behind, "line": {"color": colour, "dash": dash},
         "hovertemplate": f"α %{{x}}: %{{y:.1%}}<extra>{name}{behind}</extra>"}
        for name, colour, dash in LINES
    ]  # fmt: skip
    loss = {**shown, "name": NLL + behind, "yaxis": "y2", "line": {"color": NLL_COLOUR},
            "marker": {"symbol": "diamond", "size": 8},
            "hovertemplate": f"α %{{x}}: %{{y:+.3f}} nats<extra>NLL{behind}</extra>"}  # fmt: skip
    return [*lines, loss]


def _fill(traces, curve: Curve | None) -> None:
    """Puts a curve into its four traces; None empties them."""
    rows, losses = ([], {}) if curve is None else (curve.rows, curve.nll)
    for at, trace in enumerate(traces[:3], 1):
        known = [(one[0], one[at]) for one in rows if one[at] is not None]
        trace.update(x=[x for x, _ in known], y=[y for _, y in known])
    known = sorted(losses.items())
    traces[3].update(x=[x for x, _ in known], y=[y for _, y in known])


def curve_sentence(curve: Curve, old: bool = False) -> str:
    """What is read at the cheapest alpha and what that costs in output error and loss."""
    alpha, _, reads, error = min(curve.rows, key=lambda one: one[2])
    return (
        f"At α {alpha:g} a query reads {reads:.0%} of the keys; its output differs from dense by {error:.0%}. "
        f"{loss_sentence(curve, old)}"
    )


def loss_sentence(curve: Curve, old: bool = False) -> str:
    """The loss of the whole model at the largest alpha, or what is still to come, or why there is none.

    old: of earlier settings, whose missing values do not come any more.
    """
    done = f"{len(curve.nll)} of {len(ALPHAS)} values are there"
    if curve.no_nll:
        return f"No NLL: {curve.no_nll}." if not curve.nll else f"NLL: {done}; {curve.no_nll}."
    if curve.due is not None:
        return f"NLL: {done}." if old else f"NLL of the whole model: being measured, {done}."
    last, gap = ALPHAS[-1], curve.nll[ALPHAS[-1]]
    than = f"{abs(gap):.3f} nats per token {'lower' if gap < 0 else 'higher'} than dense (lower is better)"
    return f"With all layers at α {last:g} the whole model's NLL is {than}."
