"""The heat map of the needles, which fills cell by cell, and the share found in each task by each method."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import plotly.graph_objects as go
from proteus_playground.experiments.needles.live import LIVE_TASKS, Found
from proteus_playground.experiments.needles.retrieval import OURS

from ..parts.plot import PAPER, blank, titled

HEIGHT = 330
COLOURS = {OURS: "#0072B2", "bm25": "#E69F00", "random": "#8c959f", "recency": "#57606a"}
NAMES = {OURS: "our buffer", "bm25": "BM25 (equal words)", "random": "random windows", "recency": "newest tokens"}
TASKS = {"single": "one needle", "jigsaw": "jigsaw", "clustered": "cluster", "fading": "fading"}
LOST, KEPT = "#f3d3c3", "#0072B2"


class NeedlePictures:
    """The FigureWidget."""

    def __init__(self, lengths: tuple[int, ...], depths: tuple[float, ...], methods: tuple[str, ...]):
        self.lengths, self.depths, self.methods = lengths, depths, methods
        grid = go.Heatmap(
            name="grid", zmin=0, zmax=1, xgap=3,
            ygap=3, showscale=False, colorscale=[[0, LOST], [1, KEPT]], hoverinfo="text", texttemplate="%{text}",
        )  # fmt: skip
        bars = [
            go.Bar(name=method, xaxis="x2", yaxis="y2", orientation="h", marker={"color": COLOURS[method]},
                   hoverinfo="text", textposition="outside", cliponaxis=False) for method in reversed(methods)
        ]  # fmt: skip
        self.widget = blank(_layout(lengths, depths), [grid, *bars])
        self._trace = {trace.name: trace for trace in self.widget.data}

    def draw(self, found: list[Found], number: int) -> None:
        """Shows all finished cases; cells that were not measured stay white."""
        z = np.full((len(self.depths), len(self.lengths)), np.nan)
        for one in found:
            if one.task == "single":
                z[self.depths.index(one.depth), self.lengths.index(one.length)] = one.share[OURS]
        words = [["" if np.isnan(v) else "found" if v else "lost" for v in line] for line in z]
        with self.widget.batch_update():
            self._trace["grid"].update(z=z, text=words)
            tasks = [task for task in LIVE_TASKS if any(one.task == task for one in found)][::-1]
            for method in self.methods:
                shares = [fmean(one.share[method] for one in found if one.task == task) for task in tasks]
                self._trace[method].update(
                    y=[TASKS[task] for task in tasks], x=shares, text=[f"{share:.0%}" for share in shares],
                    hovertext=[f"{NAMES[method]}, {TASKS[t]}: {s:.0%}" for t, s in zip(tasks, shares, strict=True)],
                )  # fmt: skip
            self._trace["grid"].meta = number


def _layout(lengths: tuple[int, ...], depths: tuple[float, ...]) -> dict:
    title = {"xref": "paper", "yref": "paper", "y": 1.02, "yanchor": "bottom", "xanchor": "left", "showarrow": False,
             "font": {"size": 13}}  # fmt: skip
    return {
        **PAPER, "height": HEIGHT, "margin": {"l": 56, "r": 40, "t": 34, "b": 44}, "barmode": "group", "bargap": 0.25,
        "annotations": [{**title, "x": 0, "text": "<b>One needle: is its answer in the buffer?</b>"},
                        {**title, "x": 0.54, "text": "<b>Share of facts found, by task</b>"}],
        "xaxis": titled("tokens of text", domain=[0, 0.42], tickvals=list(range(len(lengths))),
                        ticktext=[f"{n:,}" for n in lengths], range=[-0.5, len(lengths) - 0.5]),
        "yaxis": titled("depth of the needle", tickvals=list(range(len(depths))),
                        ticktext=[f"{depth:.0%}" for depth in depths], range=[len(depths) - 0.5, -0.5]),
        "xaxis2": titled("share found", domain=[0.54, 1], anchor="y2", range=[0, 1.05], tickformat=".0%"),
        "yaxis2": titled("", anchor="x2", type="category", categoryorder="array",
                         categoryarray=[TASKS[task] for task in LIVE_TASKS][::-1]),
    }  # fmt: skip
