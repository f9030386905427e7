"""Time and memory of one call by length, one line for each kind of attention. The figure is made once."""

from __future__ import annotations

from math import log10

import plotly.graph_objects as go
from proteus_playground.experiments.speed.rivals import OURS
from proteus_playground.experiments.speed.wall import WHO, line

from ..parts.plot import GREY, PAPER, blank, titled

HEIGHT = 380
COLOURS = {"mha": "#D55E00", "fused": "#1b1f24", OURS: "#0072B2"}
MEASURES = ("ms", "mb")


class WallPictures:
    """The FigureWidget: per measure three lines, the settings of before in grey, and a cross where a line stops."""

    def __init__(self, lengths: list[int]):
        self.widget = blank(_layout(lengths), _traces())
        self._trace = {trace.name: trace for trace in self.widget.data}

    def draw(self, rows: list[dict], alpha: float, shortlist: int, number: int) -> None:
        """Shows all rows; those of ours at other settings are grey."""
        with self.widget.batch_update():
            for what in MEASURES:
                ends = []
                for who, label in WHO.items():
                    mine = line(rows, who, alpha, shortlist)
                    good = [row for row in mine if row[what]]
                    self._trace[f"{who} {what}"].update(**_points(good, what, label))
                    ends += [(good[-1], row["why"], label) for row in mine if row["why"] and good]
                self._trace[f"stop {what}"].update(
                    x=[row["tokens"] for row, _, _ in ends], y=[row[what] for row, _, _ in ends],
                    hovertext=[f"{label} stops: {why}" for _, why, label in ends],
                )  # fmt: skip
                self._trace[f"before {what}"].update(**_before(rows, alpha, shortlist, what))
            self._trace["mha ms"].meta = number


def _points(rows: list[dict], what: str, label: str) -> dict:
    unit = {"ms": "ms", "mb": "MB"}[what]
    return {
        "x": [row["tokens"] for row in rows], "y": [row[what] for row in rows],
        "hovertext": [f"{label}, {row['tokens']:,} tokens: {row[what]:,.0f} {unit}" for row in rows],
    }  # fmt: skip


def _before(rows: list[dict], alpha: float, shortlist: int, what: str) -> dict:
    """Our rows at other settings as one trace, with a gap between settings."""
    x, y, said = [], [], []
    others = dict.fromkeys((row["alpha"], row["shortlist"]) for row in rows if row["who"] == OURS)
    for setting in others.keys() - {(alpha, shortlist)}:
        points = _points([row for row in line(rows, OURS, *setting) if row[what]], what,
                         f"Proteus, α {setting[0]:g}, L {setting[1]}")  # fmt: skip
        x, y, said = [*x, *points["x"], None], [*y, *points["y"], None], [*said, *points["hovertext"], ""]
    return {"x": x, "y": y, "hovertext": said}


def _short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K" if tokens >= 1024 else str(tokens)


def _traces() -> list:
    made = []
    for what, axes in zip(MEASURES, ({}, {"xaxis": "x2", "yaxis": "y2"}), strict=True):
        every = {**axes, "x": [], "y": [], "hoverinfo": "text"}
        made.append(go.Scatter(name=f"before {what}", mode="lines", line={"color": GREY, "width": 2}, **every))
        for who in WHO:
            pen = {"color": COLOURS[who], "width": 2.5}
            made.append(go.Scatter(name=f"{who} {what}", mode="lines+markers", line=pen, marker={"size": 7}, **every))
        cross = {"symbol": "x", "size": 14, "color": "#a3330a", "line": {"width": 1.5, "color": "white"}}
        made.append(go.Scatter(name=f"stop {what}", mode="markers", marker=cross, **every))
    return made


def _layout(lengths: list[int]) -> dict:
    ticks = {"tickvals": lengths, "ticktext": [_short(n) for n in lengths]}
    ends = [log10(lengths[0]) - 0.1, log10(lengths[-1]) + 0.1]
    grid = {"type": "log", "dtick": 1, "showgrid": True, "gridcolor": "#eef0f2"}
    return {
        **PAPER, "height": HEIGHT, "margin": {"l": 62, "r": 14, "t": 10, "b": 44},
        "xaxis": titled("tokens of text", domain=[0, 0.45], range=ends, **grid, **ticks),
        "yaxis": titled("time of one call, ms", **grid),
        "xaxis2": titled("tokens of text", domain=[0.55, 1], anchor="y2", range=ends, **grid, **ticks),
        "yaxis2": titled("memory that a call adds, MB", anchor="x2", **grid),
    }  # fmt: skip
