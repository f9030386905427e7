"""Keys and prototypes on two fixed axes, the number of keys that each gate lures, and how well they fit.

The figure is made once; a step sends one message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import plotly.graph_objects as go

from proteus_playground.playground.gate_story import Snapshot

from ..parts.plot import GATE_COLOURS, INK, PAPER, bare, blank, domain, titled

HEIGHT = 540
SPLIT = 0.55  # share of the width that the map takes
MAP, BARS, CURVES = (62, 508), (62, 232), (344, 508)  # pixels from the top
TRAIL = 30  # updates shown in a prototype's path
FIT, MOVED, REVIVED = "#0072B2", "#E69F00", "#009E73"


def _turns() -> list:
    """A colour scale: number n, from 0 to the count of colours less 1, has the n-th colour."""
    edges = np.arange(len(GATE_COLOURS) + 1) / len(GATE_COLOURS)
    return [[float(at), colour] for i, colour in enumerate(GATE_COLOURS) for at in edges[i : i + 2]]


def trails(past: Sequence[Snapshot]) -> np.ndarray:
    """`(points, 2)`: the paths of all live prototypes over the last TRAIL snapshots, nan between them.

    The path of a revived gate begins at the key that it was moved to.
    """
    recent, now = past[-TRAIL:], past[-1]
    paths = []
    for slot in np.flatnonzero(now.alive).tolist():
        for snap in recent:
            if slot in snap.revived:
                paths.append((np.nan, np.nan))
            if slot < len(snap.alive) and snap.alive[slot]:
                paths.append(snap.prototypes[slot])
        paths.append((np.nan, np.nan))
    return np.asarray(paths, np.float32).reshape(-1, 2)


class PrototypePictures:
    """The FigureWidget. A click on a key, a prototype or a bar calls `on_pick(slot)`."""

    def __init__(self, on_pick: Callable[[int], None]):
        self.on_pick, self._slots = on_pick, {}
        self.widget = blank(_layout(), _traces())
        self._trace = {trace.name: trace for trace in self.widget.data}
        for name in ("keys", "prototypes", "lured"):
            self._trace[name].on_click(lambda _, points, __, name=name: self._pick(name, points))

    def reset(self, keys: np.ndarray, tokens: Sequence[str], prototypes: np.ndarray, explained: float) -> None:
        """For another text, layer or group: `keys (T, 2)` of `tokens`, and axes that hold them and `prototypes`."""
        both = np.concatenate([keys, prototypes])
        low, high = both.min(0).astype(float), both.max(0).astype(float)
        pad = 0.05 * np.maximum(high - low, 1e-6)
        layout = self.widget.layout
        layout.xaxis.range, layout.yaxis.range = zip(low - pad, high + pad, strict=True)
        layout.xaxis.title.text = f"two principal components of the keys: {explained:.0%} of their variance"
        self._keys = keys
        self._trace["keys"].update(x=keys[:, 0], y=keys[:, 1], text=list(tokens))

    def draw(self, request: int, past: Sequence[Snapshot], chosen: int, events: dict) -> None:
        """Shows the newest of `past`, inside the caller's `batch_update`. events: index in `past` -> what was done."""
        now, trace = past[-1], self._trace
        trace["keys"].update(customdata=now.gate)
        trace["keys"].marker.color = now.gate % len(GATE_COLOURS)
        mine = self._keys[now.gate == chosen]
        trace["mine"].update(x=mine[:, 0], y=mine[:, 1])
        trace["mine"].marker.color = GATE_COLOURS[chosen % len(GATE_COLOURS)]
        path = trails(past)
        trace["trails"].update(x=path[:, 0], y=path[:, 1])
        live = np.flatnonzero(now.alive)
        at, busy = now.prototypes[live], now.lured[live] > 0
        size = 21 if len(live) <= 24 else 17 if len(live) <= 48 else 13
        shown = busy | (len(live) <= 48)  # with more than 48 gates, those without keys are small and have no number
        blank = "\u00a0"  # plotly never shows a label again that was once empty
        said = [f"<b>{slot}</b>" if big else blank for slot, big in zip(live, shown, strict=True)]
        trace["prototypes"].update(x=at[:, 0], y=at[:, 1], text=said, customdata=live)
        trace["prototypes"].marker.update(color=busy.astype(int), size=np.where(shown, size, size // 2), opacity=1)
        trace["prototypes"].textfont.size = size // 2
        trace["chosen"].marker.size = size + 6
        trace["confidence"].marker.size = size // 2
        trace["chosen"].update(x=now.prototypes[[chosen], 0], y=now.prototypes[[chosen], 1])
        self._draw_bars(now, live, chosen)
        self._draw_curves(past, events)
        self._slots = {"keys": now.gate, "prototypes": live, "lured": np.arange(len(now.lured))}
        trace["keys"].meta = request

    def _draw_bars(self, now: Snapshot, live: np.ndarray, chosen: int) -> None:
        slots = np.arange(len(now.lured))
        said = [f"gate {slot}, head {now.head[slot]}: {now.lured[slot]:,} keys" for slot in slots]
        self._trace["lured"].update(x=slots, y=now.lured, text=said)
        self._trace["lured"].marker.update(color=slots % len(GATE_COLOURS), opacity=np.where(slots == chosen, 1, 0.5))
        self._trace["confidence"].update(x=live, y=now.confidence[live])
        free = slots[~now.alive]
        self._trace["free"].update(x=free, y=np.full(len(free), 0.03))
        layout = self.widget.layout
        layout.xaxis2.range = [-0.7, len(slots) - 0.3]
        layout.xaxis2.dtick = 1 if len(slots) <= 10 else 2 if len(slots) <= 24 else 4 if len(slots) <= 48 else 16
        layout.yaxis2.range = [0, 1.12 * max(1, int(now.lured.max()))]

    def _draw_curves(self, past: Sequence[Snapshot], events: dict) -> None:
        update = np.array([snap.update for snap in past])
        fit = np.array([snap.fit for snap in past], np.float32)
        self._trace["fit"].update(x=update, y=fit)
        self._trace["moved"].update(x=update, y=np.array([snap.moved for snap in past], np.float32))
        woken = [i for i, snap in enumerate(past) if snap.revived]
        self._trace["revived"].update(x=update[woken], y=fit[woken], text=[
            f"gate {past[i].revived[0]} lured too few keys and was revived" for i in woken])  # fmt: skip
        done = sorted(events)
        self._trace["surgery"].update(x=update[done], y=fit[done], text=[events[i] for i in done])
        self.widget.layout.xaxis3.range = [-0.5, max(20, int(update[-1]) * 1.04)]

    def _pick(self, name: str, points) -> None:
        slots = self._slots.get(name, ())
        if points.point_inds and points.point_inds[0] < len(slots):
            self.on_pick(int(slots[points.point_inds[0]]))


def _traces() -> list:
    """In drawing order."""
    map_, bars, shares = ({"xaxis": f"x{x}", "yaxis": f"y{y}"} for x, y in (("", ""), ("2", "2"), ("2", "3")))
    curves = {"xaxis": "x3", "yaxis": "y4"}
    turns = {"colorscale": _turns(), "cmin": 0, "cmax": len(GATE_COLOURS) - 1, "showscale": False}
    said, skip = {"hovertemplate": "%{text}<extra></extra>"}, {"hoverinfo": "skip"}
    diamond = {
        "symbol": "diamond",
        "size": 21,
        "line": {"color": "white", "width": 1.2},
        "cmin": 0,
        "cmax": 1,
        "colorscale": [[0, "#8c959f"], [1, INK]],
        "showscale": False,
    }  # grey where the gate lures no key
    ring = {"symbol": "diamond-open", "size": 27, "color": "#D55E00", "line": {"width": 3}}
    tick = {"symbol": "line-ew", "size": 11, "line": {"color": INK, "width": 2}}

    def sign(name: str, symbol: str, size: int, colour: str) -> go.Scatter:
        marker = {"symbol": symbol, "size": size, "color": colour, "line": {"color": "white", "width": 1}}
        return go.Scatter(name=name, mode="markers", marker=marker, **said, **curves)

    return [
        go.Scatter(name="keys", mode="markers", marker={"size": 7, "opacity": 0.35, "line": {"width": 0}, **turns},
                   hovertemplate="‘%{text}’ · gate %{customdata}<extra></extra>", **map_),
        go.Scatter(name="mine", mode="markers", marker={"size": 7.5, "line": {"width": 0.6, "color": "white"}}, **skip,
                   **map_),
        go.Scatter(name="trails", mode="lines", line={"color": INK, "width": 1.2}, opacity=0.5, **skip, **map_),
        go.Scatter(name="prototypes", mode="markers+text", marker=diamond, textfont={"color": "white", "size": 10},
                   hovertemplate="prototype %{customdata}<extra></extra>", **map_),
        go.Scatter(name="chosen", mode="markers", marker=ring, **skip, **map_),
        go.Bar(name="lured", marker={"line": {"width": 0}, **turns}, textposition="none", **said, **bars),
        go.Scatter(name="confidence", mode="markers", marker=tick,
                   hovertemplate="confidence %{y:.2f}<extra></extra>", **shares),
        go.Scatter(name="free", mode="markers", marker={"symbol": "circle-open", "size": 7, "color": "#8c959f"},
                   hovertemplate="slot %{x} is free<extra></extra>", **shares),
        go.Scatter(name="fit", mode="lines", line={"color": FIT, "width": 2.4},
                   hovertemplate="update %{x}: mean cosine %{y:.2f}<extra></extra>", **curves),
        go.Scatter(name="moved", mode="lines", line={"color": MOVED, "width": 2},
                   hovertemplate="update %{x}: %{y:.1%} changed gates<extra></extra>", **curves),
        sign("revived", "triangle-up", 8, REVIVED),
        sign("surgery", "diamond", 11, "#D55E00"),
    ]  # fmt: skip


def _layout() -> dict:
    across = partial(domain, HEIGHT)

    right, grid = [SPLIT + 0.07, 0.97], {"showgrid": True, "gridcolor": "#eef0f2"}
    return {
        **PAPER, "height": HEIGHT, "margin": {"l": 12, "r": 8, "t": 0, "b": 0, "pad": 0}, "hoverdistance": 20,
        "bargap": 0.25,
        "xaxis": bare("", domain=[0, SPLIT], anchor="y"),
        "yaxis": bare("", domain=across(*MAP), anchor="x"),
        "xaxis2": titled("gate", domain=right, anchor="y2", tick0=0, dtick=1, tickangle=0),
        "yaxis2": titled("keys", domain=across(*BARS), anchor="x2", nticks=5),
        "yaxis3": titled("confidence", overlaying="y2", side="right", anchor="x2", range=[0, 1.05],
                         tickvals=[0, 1]),
        "xaxis3": titled("updates", domain=right, anchor="y4", range=[-0.5, 20], nticks=6),
        "yaxis4": titled("", domain=across(*CURVES), anchor="x3", range=[-0.03, 1.05], tickvals=[0, 0.5, 1],
                         **grid),
    }  # fmt: skip
