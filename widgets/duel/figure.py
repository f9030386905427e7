"""A duel while it runs: both losses, four small plots of speed, heads and gates, and the slider's curve.

The figure is made once; a picture sends one message.
"""

from __future__ import annotations

from functools import partial
from math import log

import numpy as np
import plotly.graph_objects as go

from ..parts.plot import AXIS, PAPER, blank, domain
from .record import Record

HEIGHT = 590
DENSE, PROTEUS, HERE = "#57606a", "#0072B2", "#D55E00"
LOSS, CURVE, UPPER, LOWER = (66, 318), (430, 548), (40, 222), (312, 548)  # pixels from the top
LEFT, MIDDLE, RIGHT = [0.0, 0.5], [0.585, 0.76], [0.835, 1.0]  # shares of the width
LOOKS = {"dense": ("density", "heads_awake"), "proteus": ("density", "heads_awake", "gate_entropy")}
SMALL = ("tokens per second", "share of keys read", "heads awake", "gate entropy, nats")


class DuelPictures:
    """The FigureWidget."""

    def __init__(self):
        self.widget = blank(_layout(), _traces())
        self._trace = {trace.name: trace for trace in self.widget.data}

    def draw(self, request: int, record: Record) -> None:
        """Shows all results so far, inside the caller's `batch_update`."""
        for arm, series in record.arms.items():
            for name, what in (("loss", "loss"), ("calm", "calm_loss"), ("speed", "calm_speed")):
                x, y = series.line(what)
                self._trace[f"{name} {arm}"].update(x=x, y=y)
            at = np.array([step.tokens for step in series.looks], np.float32)
            for name in LOOKS[arm]:
                self._trace[f"{name} {arm}"].update(x=at, y=np.array([getattr(step, name) for step in series.looks]))
            self._trace[f"density {arm}"].text = [f"α {step.alpha:.2f}" for step in series.looks]
        for arm, alpha in (("dense", 0.0), ("proteus", 0.0), ("proteus", 1.0)):
            scores = record.scored(arm, alpha)
            x = [record.tokens_at(score.step) for score in scores]
            self._trace[f"held out {arm} {alpha:g}"].update(x=x, y=[score.loss for score in scores])
        self._frame(record)
        self._trace["loss dense"].meta = request

    def _frame(self, record: Record) -> None:
        """Sets the axes: x to the end of training, y to the losses after the first steep fall."""
        settings, layout = record.settings, self.widget.layout
        steps = record.steps or settings.steps
        for axis in (layout.xaxis, layout.xaxis2, layout.xaxis3, layout.xaxis4, layout.xaxis5):
            axis.range = [0, 1.03 * steps * settings.tokens]
        layout.yaxis4.range = [0, 1.12 * settings.heads]
        layout.yaxis5.range = [0, 1.12 * max(0.1, log(settings.gates))]
        known = [series for series in record.arms.values() if series.tokens]
        if known:
            calm = [loss for series in known for loss in series.calm_loss[len(series.calm_loss) // 12 :]]
            raw = [loss for series in known for loss in series.loss] + [score.loss for score in record.scores]
            room = max(max(calm) - min(raw), 0.05)
            layout.yaxis.range = [min(raw) - 0.06 * room, max(calm) + 0.06 * room]
            layout.yaxis2.range = [0, 1.15 * max(max(series.calm_speed) for series in known)]

    def draw_curve(self, record: Record, alpha: float) -> None:
        """Shows the slider's curve and the slider's point on it; both are empty until the curve is measured."""
        curve, dense = record.curve, record.scored("dense", 0.0)
        at, loss = [point.alpha for point in curve], [point.loss for point in curve]
        self._trace["curve"].update(x=at, y=loss, text=[f"{point.density:.0%} of the keys read" for point in curve])
        here = record.loss_at(alpha)
        self._trace["here"].update(x=[] if here is None else [alpha], y=[] if here is None else [here])
        shown = bool(curve and dense)
        self._trace["dense line"].update(x=[0, 1] if shown else [], y=[dense[-1].loss] * 2 if shown else [])
        if curve:
            both = loss + ([dense[-1].loss] if dense else [])
            room = max(max(both) - min(both), 0.02)
            self.widget.layout.yaxis6.range = [min(both) - 0.2 * room, max(both) + 0.25 * room]


def _traces() -> list:
    """In drawing order."""
    colours = {"dense": DENSE, "proteus": PROTEUS}
    axes = {n: {"xaxis": f"x{n}" if n > 1 else "x", "yaxis": f"y{n}" if n > 1 else "y"} for n in range(1, 7)}

    def line(name: str, colour: str, width: float, where: int, **rest) -> go.Scatter:
        return go.Scatter(name=name, mode="lines", line={"color": colour, "width": width}, **axes[where], **rest)

    def dots(name: str, symbol: str, colour: str, size: float, where: int, hover: str, **rest) -> go.Scatter:
        marker = {"symbol": symbol, "color": colour, "size": size, "line": {"width": 1.2, "color": "white"}}
        if symbol.endswith("open"):
            marker["line"] = {"width": 2, "color": colour}
        return go.Scatter(name=name, mode="markers", marker=marker, hovertemplate=f"{hover}<extra></extra>",
                          **axes[where], **rest)  # fmt: skip

    made = []
    for arm, colour in colours.items():
        made += [
            line(f"loss {arm}", colour, 1, 1, opacity=0.3, hoverinfo="skip"),
            line(f"calm {arm}", colour, 2.4, 1, hovertemplate=f"{arm}, %{{x:,}} tokens: %{{y:.3f}}<extra></extra>"),
            line(f"speed {arm}", colour, 2, 2, hovertemplate=f"{arm}: %{{y:,.0f}} tokens/s<extra></extra>"),
            dots(f"density {arm}", "circle", colour, 6, 3, f"{arm}, %{{text}}: %{{y:.0%}}"),
            dots(f"heads_awake {arm}", "circle", colour, 6, 4, f"{arm}: %{{y:.1f}} heads"),
        ]
    made += [
        dots("gate_entropy proteus", "circle", PROTEUS, 6, 5, "%{y:.2f} nats"),
        dots("held out proteus 0", "diamond-open", PROTEUS, 9, 1, "held out, Proteus at α 0: %{y:.3f}"),
        dots("held out proteus 1", "diamond", PROTEUS, 14, 1, "held out, Proteus at α 1: %{y:.3f}"),
        dots("held out dense 0", "circle", DENSE, 8, 1, "held out, dense: %{y:.3f}"),
        go.Scatter(name="dense line", mode="lines", line={"color": DENSE, "width": 1.5, "dash": "dot"},
                   hoverinfo="skip", **axes[6]),
        go.Scatter(name="curve", mode="lines+markers", line={"color": PROTEUS, "width": 2}, marker={"size": 7},
                   hovertemplate="α %{x}: loss %{y:.3f}, %{text}<extra></extra>", **axes[6]),
        dots("here", "circle", HERE, 15, 6, "the slider: %{y:.3f}"),
    ]  # fmt: skip
    return made


def _layout() -> dict:
    across = partial(domain, HEIGHT)
    boxes = {"": (LEFT, LOSS), "2": (MIDDLE, UPPER), "3": (RIGHT, UPPER), "4": (MIDDLE, LOWER), "5": (RIGHT, LOWER),
             "6": (LEFT, CURVE)}  # fmt: skip
    layout = {
        **PAPER, "height": HEIGHT, "margin": {"l": 52, "r": 12, "t": 0, "b": 0},
        "annotations": [
            {"text": f"<b>{words}</b>", "xref": "paper", "yref": "paper", "x": across_[0], "showarrow": False,
             "y": 1 - (top[0] - 24) / HEIGHT, "xanchor": "left", "yanchor": "middle", "font": {"size": 12}}
            for words, (across_, top) in zip(SMALL, list(boxes.values())[1:5], strict=True)
        ],
    }  # fmt: skip
    for number, (x, y) in boxes.items():
        words, form = ("flux α", "") if number == "6" else ("tokens read", "~s")
        layout[f"xaxis{number}"] = {
            **AXIS, "domain": x, "anchor": f"y{number}", "range": [0, 1], "tickformat": form, "tickangle": 0,
            "nticks": 5 if x is LEFT else 3, "title": {"text": words, "standoff": 3, "font": {"size": 12}},
        }  # fmt: skip
        layout[f"yaxis{number}"] = {
            **AXIS, "domain": across(*y), "anchor": f"x{number}", "showgrid": True, "gridcolor": "#eef0f2",
            "nticks": 6, "rangemode": "tozero",
        }  # fmt: skip
    for name in ("yaxis", "yaxis6"):
        layout[name]["title"] = {"text": "nats per token", "standoff": 2, "font": {"size": 12}}
    layout["yaxis2"]["tickformat"] = "~s"
    layout["yaxis3"].update(range=[0, 1.08], tickformat=".0%")
    layout["xaxis6"]["range"] = [-0.03, 1.03]
    return layout
