"""Right answers by length, and every arm at one length. The figure is made once and updated in one message.

Black: dense; red: the chosen arm; grey: the others; a diamond: measured on this machine.
"""

from __future__ import annotations

from collections.abc import Callable

import plotly.graph_objects as go
from proteus_playground.experiments.evidence.committed import named, order
from proteus_playground.experiments.evidence.report import Entry
from proteus_playground.experiments.evidence.study import CellResult

from ..parts.plot import AXIS, GREY, INK, PAPER, blank

HEIGHT, SPLIT, GAP = 470, 0.46, 0.235  # the gap holds the names of the right picture
RED, MID, BLUE = "#d1495b", "#8c959f", "#0072B2"


class EvidencePictures:
    """The FigureWidget. A click calls `on_pick(name, length)`; either may be None."""

    def __init__(self, on_pick: Callable[[str | None, int | None], None]):
        self.widget = blank(_layout(), _traces())
        self._lines, self._dense, self._chosen, self._here = self.widget.data[:4]
        self._arms, self._full, self._arm, self._here_arm = self.widget.data[4:]
        self._on_pick = on_pick
        for trace in (self._lines, self._dense, self._chosen):
            trace.on_click(self._pick_length)
        for trace in (self._arms, self._full, self._arm):
            trace.on_click(self._pick_arm)

    def _pick_length(self, trace, points, _) -> None:
        if points.xs:
            self._on_pick(_name(trace, points), int(points.xs[0]))

    def _pick_arm(self, trace, points, _) -> None:
        if points.ys:
            self._on_pick(str(points.ys[0]), None)

    def draw(self, entries: list[Entry], name: str, length: int, here: list[CellResult], number: int) -> None:
        """entries: of one task at one L; name: the arm or change chosen; here: rows measured on this machine."""
        names = order(entries)
        with self.widget.batch_update():
            others = [n for n in names if n not in (name, "dense")]
            self._lines.update(**_line([e for n in others for e in [*_of(entries, n), None]]))
            self._dense.update(**_line(_of(entries, "dense") if name != "dense" else []))
            self._chosen.update(**_line(_of(entries, name)), error_y=_error(_of(entries, name)))
            mine = [row for row in here if (row.cell.change or row.cell.arm) == name]
            self._here.update(x=[r.cell.length for r in mine], y=[r.accuracy for r in mine],
                              text=[_said(r) for r in mine])  # fmt: skip
            at = {named(e): e for e in entries if e.length == length}
            listed = [at[n] for n in names if n in at]
            self._arms.update(**_dots([e for e in listed if named(e) in others]))
            self._full.update(**_dots([e for e in listed if named(e) == "dense" != name]))
            self._arm.update(**_dots([e for e in listed if named(e) == name]))
            now = [row for row in here if row.cell.length == length]
            self._here_arm.update(x=[r.accuracy for r in now], y=[r.cell.change or r.cell.arm for r in now],
                                  text=[_said(r) for r in now], meta=number)  # fmt: skip
            layout = self.widget.layout
            lengths = sorted({e.length for e in entries})
            layout.xaxis.update(tickvals=lengths, ticktext=[f"{n:,}" for n in lengths])
            layout.yaxis2.update(categoryarray=[named(e) for e in listed][::-1])
            layout.annotations[0].text = f"<b>Right answers by length</b>: {name}"
            layout.annotations[1].text = f"<b>Every arm at {length:,} tokens</b>"


def _of(entries: list[Entry], name: str) -> list[Entry]:
    return sorted((e for e in entries if named(e) == name), key=lambda e: e.length)


def _line(entries: list[Entry | None]) -> dict:
    """Data of a line through `entries`, with a gap at each None."""
    points = [(None,) * 4 if e is None else (e.length, e.accuracy, _words(e), named(e)) for e in entries]
    return {name: [point[i] for point in points] for i, name in enumerate(("x", "y", "text", "customdata"))}


def _dots(entries: list[Entry]) -> dict:
    return {
        "x": [e.accuracy for e in entries], "y": [named(e) for e in entries], "text": [_words(e) for e in entries],
        "error_x": _error(entries),
    }  # fmt: skip


def _error(entries: list[Entry]) -> dict:
    high = [0 if e.high is None else e.high - e.accuracy for e in entries]
    return {"array": high, "arrayminus": [0 if e.low is None else e.accuracy - e.low for e in entries]}


def _words(entry: Entry) -> str:
    spread = "one seed" if entry.low is None else f"{entry.low:.3f} to {entry.high:.3f}, {entry.seeds} seeds"
    return f"{named(entry)}: {entry.accuracy:.3f} ({spread}), {entry.keys:,.0f} keys per row"


def _said(row: CellResult) -> str:
    return f"measured here: {row.accuracy:.3f} of {row.cases:,} answers right, {row.keys:,.0f} keys per row"


def _name(trace, points) -> str | None:
    found = trace.customdata[points.point_inds[0]] if points.point_inds else None
    return None if found is None else str(found)


def _traces() -> list:
    """In drawing order, which `EvidencePictures` relies on."""
    right = {"xaxis": "x2", "yaxis": "y2"}
    hover = {"hovertemplate": "%{text}<extra></extra>", "showlegend": False, "x": [], "y": []}
    bar = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 5}
    diamond = {"symbol": "diamond", "size": 12, "color": BLUE, "line": {"width": 1.5, "color": "white"}}

    def line(colour: str, width: float, size: int) -> dict:
        return {"mode": "lines+markers", "line": {"color": colour, "width": width}, "marker": {"size": size}, **hover}

    return [
        go.Scatter(**line(GREY, 1.2, 4)),
        go.Scatter(**line(INK, 2, 5)),
        go.Scatter(**line(RED, 2.6, 8), error_y=bar),
        go.Scatter(mode="markers", marker=diamond, **hover),
        *[go.Scatter(mode="markers", marker={"size": size, "color": colour}, error_x={**bar, "color": colour}, **hover,
                     **right) for size, colour in ((9, MID), (9, INK), (11, RED))],
        go.Scatter(mode="markers", marker=diamond, **hover, **right),
    ]  # fmt: skip


def _layout() -> dict:
    axis = {**AXIS, "showgrid": True, "gridcolor": "#eef0f2"}
    title = {"xref": "paper", "yref": "paper", "y": 1.0, "yanchor": "bottom", "xanchor": "left", "showarrow": False,
             "font": {"size": 13}, "text": ""}  # fmt: skip
    return {
        **PAPER, "height": HEIGHT, "margin": {"l": 56, "r": 14, "t": 34, "b": 44},
        "annotations": [{**title, "x": 0}, {**title, "x": SPLIT + 0.02}],
        "xaxis": {**axis, "type": "log", "title": {"text": "tokens"}, "domain": [0, SPLIT]},
        "yaxis": {**axis, "title": {"text": "share of right answers"}, "range": [-0.03, 1.05], "tickformat": ".1f"},
        "xaxis2": {**axis, "title": {"text": "share of right answers"}, "range": [-0.03, 1.05], "tickformat": ".1f",
                   "domain": [SPLIT + GAP, 1], "anchor": "y2"},
        "yaxis2": {**axis, "type": "category", "anchor": "x2", "categoryorder": "array", "ticks": ""},
    }  # fmt: skip
