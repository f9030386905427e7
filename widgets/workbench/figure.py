"""The workbench's three linked pictures in one FigureWidget. It is made once; an update sends one message of changes.

Axes: `T` tokens, `H` heads, `C` gates. All scales are fixed, so that on a drag only the data move.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sequential

from proteus_playground.playground.views import DNA, NOTE, GateMap, LayerView, RowView

from ..parts import raster
from ..parts.plot import GATE_COLOURS, GREY, INK, OKABE_ITO, PAPER, bare, blank, domain, titled

HEIGHT = 680
LEFT, RIGHT = 54, 12  # pixels beside the axes
SPLIT = 0.55  # where the left picture ends and the right one begins, as shares of the width between the margins
GAP = 0.04
TOP = (104, 338)  # pixels from the top: heads and prototypes
BOTTOM = (466, 630)  # the row
HEAT_COLUMNS = 400  # more would not be visible on a screen
FLOOR = -4.0  # log10 of the smallest weight drawn: 0.01%
STUB = -3.8  # log10 of the height at which a key of smaller weight is drawn
UNDER = -4.5  # log10 of the height, below the axis, at which lines run from stem to stem
MARKED = "#f3c9e0"
NUMBERED = 4  # opened gates that carry their numbers
BOTH = ((466, 546), (550, 630))  # the row of B, and below it the row of A, where settings are pinned
HIDDEN = (HEIGHT - 1, HEIGHT)  # its background would lie over the row of B
RGB = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in (*GATE_COLOURS, GREY)])
CLEAR = "rgba(0,0,0,0)"
HEAT_STEPS = 250  # weights are sent as whole numbers 0..250, and -1 where the head slept


def heat_cells(view: LayerView) -> tuple[np.ndarray, np.ndarray]:
    """`(H, columns)` int16 in -1..250 and the token at the middle of each column `(columns,)`."""
    size, heads = view.head_map.shape
    step = -(-size // HEAT_COLUMNS)
    columns = -(-size // step)
    rows = np.zeros((columns * step, heads), bool)
    rows[:size] = view.awake & view.kept[:, None]
    weight = np.zeros(rows.shape, np.float32)
    weight[:size] = view.head_map
    count = rows.reshape(columns, step, heads).sum(1)
    mean = (weight * rows).reshape(columns, step, heads).sum(1) / np.maximum(count, 1)
    cells = np.where(count > 0, np.rint(np.clip(mean, 0, 1) * HEAT_STEPS), -1)
    return cells.T.astype(np.int16), np.arange(columns) * step + (step - 1) / 2


def change_cells(view: LayerView, other: LayerView) -> tuple[np.ndarray, np.ndarray]:
    """As `heat_cells`: `view` less `other`, -250..250; 0 where one of them slept."""
    (b, middle), (a, _) = heat_cells(view), heat_cells(other)
    return np.where((a < 0) | (b < 0), 0, b - a).astype(np.int16), middle


def compares(view: LayerView, other: LayerView | None) -> bool:
    """Whether there is a difference to show: both maps hold the same quantity, and some cell differs."""
    return other is not None and view.head_map_kind == other.head_map_kind and change_cells(view, other)[0].any()


def stems(row: RowView, kind: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keys of one kind as a single unbroken line: `x`, `y` float32 and the key at each point, all `(points,)`.

    Between stems the line runs below the axis, where it is hidden: a line with gaps would be drawn as one element per
    stem, which is slow. A key that is seen through a note only and whose weight is below FLOOR gets no stem.
    """
    keys = np.flatnonzero(row.kind == kind)
    height = np.log10(np.maximum(row.weight[keys], 1e-12))
    if kind == NOTE:
        keys, height = keys[height > FLOOR], height[height > FLOOR]
    points = np.repeat(keys, 3)
    y = np.full(len(points), UNDER, np.float32)
    y[1::3] = np.maximum(height, STUB)
    return points.astype(np.float32), y, points


class Pictures:
    """The FigureWidget, and how a view becomes its data. A click calls `on_pick(token, head or None)`."""

    def __init__(self, on_pick: Callable[[int, int | None], None]):
        self.on_pick = on_pick
        self.tokens: list[str] = []
        self.widget = blank(_layout())
        self.widget.add_class(AS_IT_IS)
        self._keys = {kind: np.empty(0, int) for kind in OKABE_ITO}
        self._lit_index = self._gates = np.empty(0, int)
        self._map: GateMap | None = None
        self._two = False
        self._box = np.zeros(2), np.ones(2)  # lower left and upper right corner of the picture of keys
        self._add_traces()

    def reset(self, tokens: list[str], heads: int, marked: tuple[int, int] = (0, 0)) -> None:
        """For another text or model: new axes, empty pictures, and a band behind tokens `marked[0]` to `marked[1]`."""
        self.tokens = tokens
        size, fig = len(tokens), self.widget
        with fig.batch_update():
            fig.layout.xaxis.range = [-0.5, size - 0.5]
            fig.layout.xaxis3.range = [-0.02 * size, size * 1.01]
            fig.layout.shapes[0].update(x0=marked[0] - 0.5, x1=marked[1] - 0.5, visible=marked[0] < marked[1])
            fig.layout.yaxis.update(range=[heads - 0.5, -0.5], dtick=max(1, -(-heads // 10)))
            for trace in fig.data:
                if trace.type == "scatter":
                    trace.update(x=[], y=[])
            self._heat.z = []
            self._map = None

    def draw(
        self,
        request: int,
        view: LayerView,
        row: RowView,
        gate_map: GateMap,
        group: int,
        changed: set[str],
        other: LayerView | None = None,
        other_row: RowView | None = None,
    ) -> None:
        """Sets the data, inside the caller's `batch_update` of `widget`.

        changed: which of "view" and "gates" differ from the last picture; the row is always drawn. other, other_row: of
        the settings that are pinned: the heat map shows the difference, if any, and their row hangs below.
        """
        if "view" in changed:
            differs = compares(view, other)
            cells, middle = change_cells(view, other) if differs else heat_cells(view)
            self._colour_heat(differs)
            self._heat.update(z=cells, x=middle.astype(np.float32))
        if (other is not None) != self._two:
            self._show_two(other is not None)
        if self._two:
            self._draw_row(other_row, self._other_stems)
            self._set(self._other_lit, **_points(gate_map, np.flatnonzero(other_row.kind == DNA)))
        if changed:
            self._draw_keys(view, gate_map, group)
        self._draw_row(row, self._stems)
        self._here.update(x=[row.token, row.token], y=[FLOOR, 0])
        self._draw_lit(row, gate_map)
        self._cursor.update(x=[row.token], y=[row.head])
        self._here.meta = request

    def _show_two(self, two: bool) -> None:
        """Makes room for A, or takes it back."""
        self._two, layout = two, self.widget.layout
        layout.yaxis3.domain = domain(HEIGHT, *(BOTH[0] if two else BOTTOM))
        layout.yaxis4.update(visible=two, domain=domain(HEIGHT, *(BOTH[1] if two else HIDDEN)))
        layout.xaxis3.anchor = "y4" if two else "y3"
        layout.yaxis3.title.text = "B (log)" if two else "attention (log)"
        if not two:
            for trace in (*self._other_stems.values(), self._other_lit):
                trace.update(x=[], y=[])

    def _colour_heat(self, differs: bool) -> None:
        """In dark mode the class keeps Cividis as it is: turned over, its low end would be the brightest."""
        if (self._heat.zmin < -1) == differs:
            return
        self._heat.update(zmin=-HEAT_STEPS if differs else -1, colorscale=TWO_SCALE if differs else CIVIDIS)
        (self.widget.remove_class if differs else self.widget.add_class)(AS_IT_IS)

    def _draw_row(self, row: RowView, traces: dict) -> None:
        for kind, trace in traces.items():
            x, y, keys = stems(row, kind)
            if traces is self._stems:
                self._keys[kind] = keys
            words = [self.tokens[i] for i in keys]
            trace.update(x=x, y=y, customdata=row.weight[keys].astype(np.float32), text=words)

    def _draw_keys(self, view: LayerView, gate_map: GateMap, group: int) -> None:
        gate = view.gate_of_key[:, group]
        if np.array_equal(self._gates, gate) and self._map is gate_map:
            return
        at, protos = gate_map.keys, gate_map.prototypes
        both = np.concatenate([at, protos])
        if self._map is not gate_map:
            self._box = self._frame(both, f"two principal components: {gate_map.explained:.0%} of the variance")
        self._gates, self._map = gate, gate_map
        low, high = self._box
        colours = RGB[np.where(gate < 0, len(GATE_COLOURS), gate % len(GATE_COLOURS))]
        self.widget.layout.images[0].update(
            source=raster.key_picture(at, colours, protos, low, high),
            x=low[0], y=high[1], sizex=high[0] - low[0], sizey=high[1] - low[1],
        )  # fmt: skip
        lured_by = [f"gate {number}" if number >= 0 else "no gate" for number in gate]
        words = [f"{token} · {name}" for token, name in zip(self.tokens, lured_by, strict=True)]
        words += [f"prototype {c}" for c in range(len(protos))]
        self._hover.update(x=both[:, 0].astype(np.float32), y=both[:, 1].astype(np.float32), text=words)

    def _draw_lit(self, row: RowView, gate_map: GateMap) -> None:
        """Marks the keys that this row reads from rings and the prototypes of the gates that it opened."""
        self._lit_index = np.flatnonzero(row.kind == DNA)
        at, opened = gate_map.keys[self._lit_index], list(row.gates_opened)
        protos = gate_map.prototypes[opened].reshape(-1, 2)
        self._set(self._lit, x=at[:, 0], y=at[:, 1], text=[self.tokens[i] for i in self._lit_index],
                  customdata=self._lit_index.astype(np.int32))  # fmt: skip
        numbers = [f"<b>{gate}</b>" if len(opened) <= NUMBERED else "" for gate in opened]  # more would overlap
        self._set(self._opened, x=protos[:, 0], y=protos[:, 1], text=numbers)
        here = gate_map.keys[row.token]
        self._set(self._star, x=here[:1], y=here[1:])

    def _frame(self, at: np.ndarray, title: str) -> tuple[np.ndarray, np.ndarray]:
        """Fits the axes to the points of another projection; returns their lower left and upper right corner."""
        low, high = at.min(0).astype(float), at.max(0).astype(float)
        pad = 0.06 * np.maximum(high - low, 1e-6)
        low, high = low - pad, high + pad
        layout = self.widget.layout
        layout.xaxis2.range, layout.yaxis2.range = zip(low, high, strict=True)
        layout.xaxis2.title.text = title
        return low, high

    @staticmethod
    def _set(trace, **values) -> None:
        """Sets the properties that differ from the present ones: each one that is set is sent to the browser."""
        for name, value in values.items():
            old = trace[name]
            new = np.asarray(value, np.float32) if name in ("x", "y") else value
            if old is None or len(old) != len(new) or not np.array_equal(np.asarray(old), np.asarray(new)):
                trace[name] = new

    def _add_traces(self) -> None:
        fig = self.widget
        for trace in _traces():
            fig.add_trace(trace)
        self._heat, self._cursor, self._hover, self._lit, self._opened, self._star = fig.data[:6]
        self._stems = dict(zip(OKABE_ITO, fig.data[6:10], strict=True))
        self._other_stems = dict(zip(OKABE_ITO, fig.data[10:14], strict=True))
        self._other_lit, self._here = fig.data[14:]
        self._heat.on_click(self._clicked_heat)
        self._lit.on_click(lambda _, points, __: self._pick(points, self._lit_index))
        self._hover.on_click(lambda _, points, __: self._pick(points, np.arange(len(self.tokens))))
        for kind, trace in self._stems.items():
            trace.on_click(lambda _, points, __, kind=kind: self._pick(points, self._keys[kind]))

    def _clicked_heat(self, _, points, __) -> None:
        if points.xs:
            self.on_pick(int(points.xs[0]), int(points.ys[0]))

    def _pick(self, points, tokens: np.ndarray) -> None:
        if points.point_inds and points.point_inds[0] < len(tokens):
            self.on_pick(int(tokens[points.point_inds[0]]), None)


def _points(gate_map: GateMap, keys: np.ndarray) -> dict:
    at = gate_map.keys[keys]
    return {"x": at[:, 0], "y": at[:, 1]}


EDGE = 1 / (HEAT_STEPS + 1)  # below it a head slept, and the grey behind the picture is seen
CIVIDIS = [[0, CLEAR], [EDGE, CLEAR]] + [
    [min(1.0, EDGE + (1 - EDGE) * i / (len(sequential.Cividis) - 1)), colour]
    for i, colour in enumerate(sequential.Cividis)
]
AS_IT_IS = "pp-cividis"
TWO_SCALE = [[0, "#b35806"], [0.25, "#f1a340"], [0.5, "#f7f7f7"], [0.75, "#998ec3"], [1, "#542788"]]


def _traces() -> list:
    """In drawing order, which `Pictures._add_traces` relies on."""
    first, second, third = ({"xaxis": f"x{n}", "yaxis": f"y{n}"} for n in ("", "2", "3"))
    skip = {"hoverinfo": "skip", "showlegend": False}
    heat = go.Heatmap(
        z=[], zmin=-1, zmax=HEAT_STEPS, colorscale=CIVIDIS, showscale=False, zsmooth=False,
        hovertemplate="token %{x:.0f}, head %{y}<extra></extra>", **first,
    )  # fmt: skip
    ring = {"symbol": "square-open", "size": 15, "color": "#D55E00", "line": {"width": 3}}
    fourth = {"xaxis": "x3", "yaxis": "y4"}
    other = {"size": 13, "color": INK, "symbol": "circle-open", "line": {"width": 1.5}}
    lit = {"size": 9, "color": OKABE_ITO[DNA], "line": {"width": 1.5, "color": "white"}}
    opened = {"symbol": "diamond", "size": 19, "color": INK, "line": {"width": 1.5, "color": "white"}}
    star = {"symbol": "star", "size": 16, "color": "#D55E00", "line": {"width": 1.2, "color": "white"}}
    share = "%{text} (%{x:.0f}) gets %{customdata:.2%}<extra></extra>"
    return [
        heat,
        go.Scatter(mode="markers", marker=ring, cliponaxis=False, **skip, **first),
        # The keys are drawn as an image, which has no tooltips: this transparent line through them has.
        go.Scatter(mode="lines", line={"color": CLEAR, "width": 1, "simplify": False},
                   hovertemplate="%{text}<extra></extra>", showlegend=False, **second),
        go.Scatter(mode="markers", marker=lit, hovertemplate="%{text} (%{customdata}), read from a ring<extra></extra>",
                   showlegend=False, **second),
        go.Scatter(mode="markers+text", marker=opened, textfont={"color": "white", "size": 10}, **skip, **second),
        go.Scatter(mode="markers", marker=star, **skip, **second),
        *[go.Scatter(mode="lines", line={"color": colour, "width": 2, "simplify": False},
                     hovertemplate=share, showlegend=False, **axes) for axes in (third, fourth)
          for colour in OKABE_ITO.values()],
        go.Scatter(mode="markers", marker=other, **skip, **second),
        go.Scatter(mode="lines", line={"color": "#D55E00", "width": 1.5, "dash": "dot"}, **skip, **third),
    ]  # fmt: skip


def _layout() -> dict:
    across = partial(domain, HEIGHT)

    return {
        **PAPER, "height": HEIGHT, "margin": {"l": LEFT, "r": RIGHT, "t": 0, "b": 0, "pad": 0}, "hoverdistance": 30,
        "shapes": [{"type": "rect", "xref": "x3", "yref": "y3 domain", "y0": 0, "y1": 1, "x0": 0, "x1": 0,
                    "layer": "below", "line": {"width": 0}, "fillcolor": MARKED, "visible": False},
                   {"type": "rect", "xref": "x domain", "yref": "y domain", "x0": 0, "x1": 1, "y0": 0, "y1": 1,
                    "layer": "below", "line": {"width": 0}, "fillcolor": GREY}],
        "images": [{"xref": "x2", "yref": "y2", "sizing": "stretch", "layer": "below"}],
        "xaxis": titled("token", domain=[0, SPLIT - GAP / 2], anchor="y"),
        "yaxis": titled("head", domain=across(*TOP), anchor="x", range=[8.5, -0.5]),
        "xaxis2": bare("", domain=[SPLIT + GAP / 2, 1], anchor="y2"),
        "yaxis2": bare("", domain=across(*TOP), anchor="x2"),
        "xaxis3": titled("position of the key", domain=[0, 1], anchor="y3"),
        "yaxis3": titled("attention (log)", showgrid=True, gridcolor="#eef0f2", domain=across(*BOTTOM),
                         anchor="x3", range=[FLOOR, 0.05], tickvals=[-4, -3, -2, -1, 0],
                         ticktext=["≤0.01%", "0.1%", "1%", "10%", "100%"]),
        "yaxis4": titled("A (log)", showgrid=True, gridcolor="#eef0f2", domain=across(*HIDDEN), anchor="x3",
                         range=[0.05, FLOOR], tickvals=[-3, -1], ticktext=["0.1%", "10%"], visible=False),
    }  # fmt: skip
