"""The gap by reads, one line for each measurement, and the loss by tokens. The figure is made once."""

from __future__ import annotations

import plotly.graph_objects as go

from ..parts.plot import GREY, INK, PAPER, blank, titled
from .record import Curve, Record

HEIGHT = 360
BEFORE, EARLIER, NOW = "#D55E00", "#a9cbe4", "#0072B2"


class HealingPictures:
    """The FigureWidget."""

    def __init__(self):
        self.widget = blank(_layout(), _traces())
        self._trace = {trace.name: trace for trace in self.widget.data}

    def draw(self, record: Record, tokens: int, number: int) -> None:
        """Shows all curves and losses so far. tokens: what the plan reads in all; number: that of the picture."""
        *earlier, now = record.curves or [None]
        with self.widget.batch_update():
            self._trace["before"].update(**_points([record.before], "before healing"))
            self._trace["earlier"].update(**_points(earlier, "earlier"))
            self._trace["now"].update(**_points([now], "now"))
            for name in ("loss", "calm"):
                x, y = record.line(name)
                self._trace[name].update(x=x, y=y)
            self._frame(record, tokens)
            self._trace["now"].meta = number

    def _frame(self, record: Record, tokens: int) -> None:
        """Sets the axes: those of the gap by all curves, that of the tokens to the end of the plan."""
        layout, curves = self.widget.layout, [curve for curve in (record.before, *record.curves) if curve is not None]
        layout.xaxis2.range = [0, 1.02 * max(1, tokens)]
        if not curves:
            return
        last = curves[-1]
        layout.xaxis.update(
            tickvals=list(last.reads),
            ticktext=[f"{reads:.0f}<br>1/{share}" for reads, share in zip(last.reads, last.shares, strict=True)],
        )
        gaps = [gap for curve in curves for gap in curve.gaps]
        layout.yaxis.range = [min(0.0, *gaps) - 0.02 * max(gaps), 1.1 * max(1e-3, *gaps)]


def _points(curves: list[Curve | None], label: str) -> dict:
    """Several curves as one trace, with a gap between them."""
    x, y, said = [], [], []
    for curve in curves:
        if curve is not None:
            x += [*curve.reads, None]
            y += [*curve.gaps, None]
            said += [
                f"{label}, after {curve.read:,} tokens<br>1/{share} of the keys, {reads:.0f} reads: {gap:.3f}"
                for share, reads, gap in zip(curve.shares, curve.reads, curve.gaps, strict=True)
            ] + [""]
    return {"x": x, "y": y, "hovertext": said}


def _traces() -> list:
    dots = {"mode": "lines+markers", "hoverinfo": "text"}
    other = {"xaxis": "x2", "yaxis": "y2", "mode": "lines"}
    return [
        go.Scatter(name="earlier", line={"color": EARLIER, "width": 1.5}, marker={"size": 4}, **dots),
        go.Scatter(name="before", line={"color": BEFORE, "width": 2.5, "dash": "dot"}, marker={"size": 8}, **dots),
        go.Scatter(name="now", line={"color": NOW, "width": 3}, marker={"size": 9}, **dots),
        go.Scatter(name="loss", line={"color": GREY, "width": 1}, hoverinfo="skip", **other),
        go.Scatter(name="calm", line={"color": INK, "width": 2}, hovertemplate="%{y:.3f}<extra></extra>", **other),
    ]


def _layout() -> dict:
    title = {"xref": "paper", "yref": "paper", "y": 1.02, "yanchor": "bottom", "xanchor": "left", "showarrow": False,
             "font": {"size": 13}}  # fmt: skip
    grid = {"showgrid": True, "gridcolor": "#eef0f2"}
    return {
        **PAPER, "height": HEIGHT, "margin": {"l": 62, "r": 14, "t": 34, "b": 56},
        "annotations": [{**title, "x": 0, "text": "<b>Gap on held-out text, by reads</b>"},
                        {**title, "x": 0.7, "text": "<b>Loss in training</b>"}],
        "xaxis": titled("keys and notes that a query reads, and their share of the text", type="log",
                        domain=[0, 0.6], **grid),
        "yaxis": titled("gap, nats per token", **grid, zeroline=True, zerolinecolor=GREY),
        "xaxis2": titled("tokens of text", domain=[0.7, 1], anchor="y2", nticks=4),
        "yaxis2": titled("", anchor="x2", rangemode="tozero", **grid),
    }  # fmt: skip
