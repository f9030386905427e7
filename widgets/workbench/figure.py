"""Three linked pictures in one FigureWidget, made once; an update sends one message with what changed.

Axes: `T` tokens, `H` heads, `C` gates. All scales are fixed, so that what moves on a drag is the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import plotly.graph_objects as go

from proteus_playground.playground.views import ANCHOR, DNA, LOCAL, NOTE, GateMap, LayerView, RowView

from ..parts import raster

HEIGHT = 640
LEFT, RIGHT = 46, 12  # pixels beside the axes
SPLIT = 0.55  # where the left picture ends and the right one begins, as shares of the width between the margins
GAP = 0.04
TOP = (84, 318)  # pixels from the top: heads and prototypes
BOTTOM = (428, 592)  # the row
HEAT_COLUMNS = 400  # no screen shows more
FLOOR = -4.0  # log10 of the smallest weight drawn: 0.01%
STUB = -3.8  # log10 of the height that a key gets which weighs too little to see
UNDER = -4.5  # where lines run between stems: below the axis
OKABE_ITO = {LOCAL: "#0072B2", ANCHOR: "#E69F00", DNA: "#009E73", NOTE: "#CC79A7"}
GATE_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B5A900")  # in turn
INK, GREY, MARKED = "#1b1f24", "#d4d8dd", "#f3c9e0"
RGB = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in (*GATE_COLOURS, GREY)])
HEAT_STEPS = 250  # weights travel as whole numbers; -1 says that the head slept
CONFIG = {"displayModeBar": False, "showSendToCloud": False, "displaylogo": False, "doubleClick": False,
          "scrollZoom": False, "responsive": True}  # fmt: skip
PAPER = {"autosize": True, "paper_bgcolor": "white", "plot_bgcolor": "white", "dragmode": False, "hovermode": "closest",
         "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12, "color": INK},
         "showlegend": False, "template": None, "uirevision": "fixed"}  # fmt: skip
AXIS = {"fixedrange": True, "zeroline": False, "showgrid": False, "ticks": "outside", "ticklen": 4, "tickcolor": GREY,
        "linecolor": GREY}  # fmt: skip


def blank(layout: dict, traces: Iterable = ()) -> go.FigureWidget:
    """A figure without plotly's own buttons and gestures, and with `traces`."""
    made = go.FigureWidget(layout=layout)
    made._config = {**made._config, **CONFIG}
    for trace in traces:
        made.add_trace(trace)
    return made


def titled(text: str, **rest) -> dict:
    """An axis with a title."""
    return {**AXIS, "title": {"font": {"size": 12}, "standoff": 4, "text": text}, **rest}


def bare(text: str, **rest) -> dict:
    """An axis without numbers, a side of a box."""
    return titled(text, showticklabels=False, showline=True, mirror=True, **rest) | {"ticks": ""}


def domain(height: int, top: int, bottom: int) -> list[float]:
    """Where an axis stands in a figure, from pixels: what plotly calls its domain."""
    return [1 - bottom / height, 1 - top / height]


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


def stems(row: RowView, kind: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One kind of key as a single unbroken line: `x`, `y` float32 and the key at each point.

    Between stems the line runs below the axis, out of sight: a line with gaps would be an element per stem, and the
    browser pays by the element. A note's members that weigh too little to see get no stem.
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
    """The FigureWidget and how a view becomes data in it. `on_pick(token, head | None)` hears clicks."""

    def __init__(self, on_pick: Callable[[int, int | None], None]):
        self.on_pick = on_pick
        self.tokens: list[str] = []
        self.widget = blank(_layout())
        self._keys = {kind: np.empty(0, int) for kind in OKABE_ITO}
        self._lit_index = self._gates = np.empty(0, int)
        self._map: GateMap | None = None
        self._box = np.zeros(2), np.ones(2)  # corners of the plane of keys
        self._add_traces()

    def reset(self, tokens: list[str], heads: int, marked: tuple[int, int] = (0, 0)) -> None:
        """Another text or model: new axes, empty pictures, and a band behind the tokens that are `marked`."""
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
        self, request: int, view: LayerView, row: RowView, gate_map: GateMap, group: int, changed: set[str]
    ) -> None:
        """Sets the data, inside the caller's `batch_update` of `widget`.

        `changed`: whether the "view" or the "gates" differ from the last picture; a row always does.
        """
        if "view" in changed:
            cells, middle = heat_cells(view)
            self._heat.update(z=cells, x=middle.astype(np.float32))
        if changed:
            self._draw_keys(view, gate_map, group)
        self._draw_row(row)
        self._draw_lit(row, gate_map)
        self._cursor.update(x=[row.token], y=[row.head])
        self._here.meta = request

    def _draw_row(self, row: RowView) -> None:
        for kind, trace in self._stems.items():
            x, y, keys = stems(row, kind)
            self._keys[kind] = keys
            words = [self.tokens[i] for i in keys]
            trace.update(x=x, y=y, customdata=row.weight[keys].astype(np.float32), text=words)
        self._here.update(x=[row.token, row.token], y=[FLOOR, 0])

    def _draw_keys(self, view: LayerView, gate_map: GateMap, group: int) -> None:
        gate = view.gate_of_key[:, group]
        if np.array_equal(self._gates, gate) and self._map is gate_map:
            return
        at, protos = gate_map.keys, gate_map.prototypes
        both = np.concatenate([at, protos])
        if self._map is not gate_map:
            self._box = self._frame(both, f"two fixed axes, {gate_map.explained:.0%} of the spread")
        self._gates, self._map = gate, gate_map
        low, high = self._box
        colours = RGB[np.where(gate < 0, len(GATE_COLOURS), gate % len(GATE_COLOURS))]
        self.widget.layout.images[0].update(
            source=raster.key_picture(at, colours, protos, low, high),
            x=low[0], y=high[1], sizex=high[0] - low[0], sizey=high[1] - low[1],
        )  # fmt: skip
        homes = [f"gate {number}" if number >= 0 else "no gate" for number in gate]
        words = [f"{token} · {home}" for token, home in zip(self.tokens, homes, strict=True)]
        words += [f"prototype {c}" for c in range(len(protos))]
        self._feel.update(x=both[:, 0].astype(np.float32), y=both[:, 1].astype(np.float32), text=words)

    def _draw_lit(self, row: RowView, gate_map: GateMap) -> None:
        """The keys this row fetched and the prototypes it opened."""
        self._lit_index = np.flatnonzero(row.kind == DNA)
        at, opened = gate_map.keys[self._lit_index], list(row.gates_opened)
        protos = gate_map.prototypes[opened].reshape(-1, 2)
        self._set(self._lit, x=at[:, 0], y=at[:, 1], text=[self.tokens[i] for i in self._lit_index],
                  customdata=self._lit_index.astype(np.int32))  # fmt: skip
        self._set(self._opened, x=protos[:, 0], y=protos[:, 1], text=[f"<b>{gate}</b>" for gate in opened])
        here = gate_map.keys[row.token]
        self._set(self._star, x=here[:1], y=here[1:])

    def _frame(self, at: np.ndarray, title: str) -> tuple[np.ndarray, np.ndarray]:
        """Axes that hold all points of another projection; their lower left and upper right corner."""
        low, high = at.min(0).astype(float), at.max(0).astype(float)
        pad = 0.06 * np.maximum(high - low, 1e-6)
        low, high = low - pad, high + pad
        layout = self.widget.layout
        layout.xaxis2.range, layout.yaxis2.range = zip(low, high, strict=True)
        layout.xaxis2.title.text = title
        return low, high

    @staticmethod
    def _set(trace, **values) -> None:
        """Sets only what is not there already, since every property set is bytes to the browser."""
        for name, value in values.items():
            old = trace[name]
            new = np.asarray(value, np.float32) if name in ("x", "y") else value
            if old is None or len(old) != len(new) or not np.array_equal(np.asarray(old), np.asarray(new)):
                trace[name] = new

    def _add_traces(self) -> None:
        fig = self.widget
        for trace in _traces():
            fig.add_trace(trace)
        self._heat, self._cursor, self._feel, self._lit, self._opened, self._star = fig.data[:6]
        self._stems = dict(zip(OKABE_ITO, fig.data[6:10], strict=True))
        self._here = fig.data[10]
        self._heat.on_click(self._clicked_heat)
        self._lit.on_click(lambda _, points, __: self._pick(points, self._lit_index))
        self._feel.on_click(lambda _, points, __: self._pick(points, np.arange(len(self.tokens))))
        for kind, trace in self._stems.items():
            trace.on_click(lambda _, points, __, kind=kind: self._pick(points, self._keys[kind]))

    def _clicked_heat(self, _, points, __) -> None:
        if points.xs:
            self.on_pick(int(points.xs[0]), int(points.ys[0]))

    def _pick(self, points, tokens: np.ndarray) -> None:
        if points.point_inds and points.point_inds[0] < len(tokens):
            self.on_pick(int(tokens[points.point_inds[0]]), None)


def _traces() -> list:
    """In drawing order; `Pictures._add_traces` names them."""
    first, second, third = ({"xaxis": f"x{n}", "yaxis": f"y{n}"} for n in ("", "2", "3"))
    skip = {"hoverinfo": "skip", "showlegend": False}
    edge = 1 / (HEAT_STEPS + 1)
    heat = go.Heatmap(
        z=[], zmin=-1, zmax=HEAT_STEPS, colorscale=_slept_then_cividis(edge), showscale=False, zsmooth=False,
        hovertemplate="token %{x:.0f}, head %{y}<extra></extra>", **first,
    )  # fmt: skip
    ring = {"symbol": "square-open", "size": 15, "color": "#D55E00", "line": {"width": 3}}
    lit = {"size": 9, "color": OKABE_ITO[DNA], "line": {"width": 1.5, "color": "white"}}
    opened = {"symbol": "diamond", "size": 19, "color": INK, "line": {"width": 1.5, "color": "white"}}
    star = {"symbol": "star", "size": 16, "color": "#D55E00", "line": {"width": 1.2, "color": "white"}}
    share = "%{text} (%{x:.0f}) gets %{customdata:.2%}<extra></extra>"
    return [
        heat,
        go.Scatter(mode="markers", marker=ring, **skip, **first),
        # The picture of the keys is an image; this unseen line through them is what the mouse feels.
        go.Scatter(mode="lines", line={"color": "rgba(0,0,0,0)", "width": 1, "simplify": False},
                   hovertemplate="%{text}<extra></extra>", showlegend=False, **second),
        go.Scatter(mode="markers", marker=lit, hovertemplate="%{text} (%{customdata}) was fetched<extra></extra>",
                   showlegend=False, **second),
        go.Scatter(mode="markers+text", marker=opened, textfont={"color": "white", "size": 10}, **skip, **second),
        go.Scatter(mode="markers", marker=star, **skip, **second),
        *[go.Scatter(mode="lines", line={"color": colour, "width": 2, "simplify": False},
                     hovertemplate=share, showlegend=False, **third) for colour in OKABE_ITO.values()],
        go.Scatter(mode="lines", line={"color": "#D55E00", "width": 1.5, "dash": "dot"}, **skip, **third),
    ]  # fmt: skip


def _slept_then_cividis(edge: float) -> list:
    from plotly.colors import sequential

    steps = sequential.Cividis
    scale = [[min(1.0, edge + (1 - edge) * i / (len(steps) - 1)), colour] for i, colour in enumerate(steps)]
    return [[0, GREY], [edge, GREY], *scale]


def _layout() -> dict:
    across = partial(domain, HEIGHT)

    return {
        **PAPER, "height": HEIGHT, "margin": {"l": LEFT, "r": RIGHT, "t": 0, "b": 0, "pad": 0}, "hoverdistance": 30,
        "shapes": [{"type": "rect", "xref": "x3", "yref": "y3 domain", "y0": 0, "y1": 1, "x0": 0, "x1": 0,
                    "layer": "below", "line": {"width": 0}, "fillcolor": MARKED, "visible": False}],
        "images": [{"xref": "x2", "yref": "y2", "sizing": "stretch", "layer": "below"}],
        "xaxis": titled("token", domain=[0, SPLIT - GAP / 2], anchor="y"),
        "yaxis": titled("head", domain=across(*TOP), anchor="x", range=[8.5, -0.5]),
        "xaxis2": bare("two fixed axes", domain=[SPLIT + GAP / 2, 1], anchor="y2"),
        "yaxis2": bare("", domain=across(*TOP), anchor="x2"),
        "xaxis3": titled("key position", domain=[0, 1], anchor="y3"),
        "yaxis3": titled("attention (log)", showgrid=True, gridcolor="#eef0f2", domain=across(*BOTTOM),
                         anchor="x3", range=[FLOOR, 0.05], tickvals=[-4, -3, -2, -1, 0],
                         ticktext=["≤0.01%", "0.1%", "1%", "10%", "100%"]),
    }  # fmt: skip
