"""The document as a skyline of scores, a strip, and two curves, one above the other on one axis of pages.

The figure is made once; a step sends one message. A grey veil covers the part that has not been read yet.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import plotly.graph_objects as go

from proteus_playground.streaming.buffer import Champions
from proteus_playground.streaming.replay import PAGE, Document, Replay, Scores, page_of

from ..parts.plot import AXIS, GREY, INK, PAPER, blank, domain

HEIGHT = 470
COLUMNS = 800  # more would not be visible on a screen
SKY, STRIP, CURVES = (58, 262), (278, 306), (354, 432)  # pixels from the top
KEPT, PROMOTED, EVICTED, NEEDLE = "#0072B2", "#009E73", "#D55E00", "#B0307E"
NEW_CODE, GONE_CODE = 101, 102  # in the strip, above the shares 2..100
BORDERS = 260  # with more chunks than this their borders are not drawn


def _mark(symbol: str, size: float, colour: str, edge: str, width: float) -> dict:
    marker = {"symbol": symbol, "size": size, "color": colour, "line": {"width": width, "color": edge}}
    return {"mode": "markers", "marker": marker}


LOOK = {
    "sky": {"mode": "lines", "line": {"width": 0.6, "color": "#aab2bb"}, "fill": "tozeroy", "fillcolor": "#d5dae0"},
    "bar": {"mode": "lines", "line": {"width": 1.6, "color": INK, "shape": "hv"}},
    "kept": _mark("circle", 5, KEPT, KEPT, 0),
    "evicted": _mark("x-thin", 9, EVICTED, EVICTED, 2.2),
    "promoted": _mark("triangle-up", 10, PROMOTED, "white", 1),
    "needle": _mark("star", 15, NEEDLE, "white", 1.2),
}  # fmt: skip


def pages(position: np.ndarray | float) -> np.ndarray:
    """Positions as numbers on the axis of pages: page 1 begins at 1."""
    return np.asarray(position, np.float64) / PAGE + 1


def skyline(score: np.ndarray, tokens: int) -> np.ndarray:
    """`(columns,)` float32: the best finite score in each column of a document of `tokens`, nan where there is none."""
    columns = min(COLUMNS, tokens)
    column = np.arange(len(score)) * columns // tokens
    best = np.full(columns, -np.inf, np.float32)
    np.maximum.at(best, column, score)
    return np.where(np.isfinite(best), best, np.nan)


def tallest(some: Champions, tokens: int) -> Champions:
    """The best champion of each column: more would not be visible."""
    column = some.position * min(COLUMNS, tokens) // tokens
    order = np.lexsort((some.position != some.champion, -some.score, column))
    first = np.r_[True, np.diff(column[order]) > 0] if len(order) else np.zeros(0, bool)
    return some.take(order[first])


def strip_codes(replay: Replay, step: int) -> np.ndarray:
    """`(columns,)` uint8: 0 not read, 1 read, 2..100 per cent of the column kept, NEW_CODE added, GONE_CODE removed."""
    columns = min(COLUMNS, replay.tokens)
    edges = -(-np.arange(columns + 1) * replay.tokens // columns)

    def count(some: Champions) -> np.ndarray:
        return np.bincount(some.position * columns // replay.tokens, minlength=columns)

    kept = count(replay.buffer(step))
    code = np.where(edges[:-1] < replay.read(step), 1, 0)
    code = np.where(kept > 0, 2 + np.rint(98 * kept / np.diff(edges)), code)
    code = np.where(count(replay.evicted(step)) > 0, GONE_CODE, code)
    return np.where(count(replay.promoted(step)) > 0, NEW_CODE, code).astype(np.uint8)


class StreamPictures:
    """The FigureWidget. `scored` and `replayed` set what is the same at every step, `draw` the rest."""

    def __init__(self) -> None:
        self.widget = blank(_layout())
        for name, look in LOOK.items():
            hover = {"hoverinfo": "skip"} if name in ("sky", "bar") else {"hovertemplate": "%{text}<extra></extra>"}
            self.widget.add_trace(go.Scatter(**look, **hover, showlegend=False, name=name))
        scale = [[0, "#f3f4f6"], [0.5 / 102, "#f3f4f6"], [0.5 / 102, GREY], [1.5 / 102, GREY], [1.5 / 102, "#9ec5e2"],
                 [100.5 / 102, KEPT], [100.5 / 102, PROMOTED], [101.5 / 102, PROMOTED], [101.5 / 102, EVICTED],
                 [1, EVICTED]]  # fmt: skip
        self.widget.add_trace(go.Heatmap(z=[], zmin=0, zmax=102, colorscale=scale, showscale=False, hoverinfo="skip",
                                         xaxis="x", yaxis="y2", name="strip"))  # fmt: skip
        for name, colour, shown in (("borders", "white", "y2"), ("held", KEPT, "y3"), ("recall", NEEDLE, "y3")):
            line = {"color": colour, "width": 1} if name == "borders" else {"color": colour, "width": 2, "shape": "hv"}
            self.widget.add_trace(go.Scatter(mode="lines", line=line, xaxis="x", yaxis=shown, name=name,
                                             hoverinfo="skip", showlegend=False))  # fmt: skip
        self._trace = {trace.name: trace for trace in self.widget.data}
        self._replay: Replay | None = None
        self._document: Document | None = None
        self._top = self._floor = 0.0

    def scored(self, document: Document, scores: Scores) -> None:
        """For other scores: skyline, axes and the place of the needle."""
        size = len(document)
        sky = skyline(scores.score[: scores.until], size)
        known = sky[np.isfinite(sky)]
        self._floor, self._top = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        room = max(self._top - self._floor, 1e-3)
        at = pages((np.arange(len(sky)) + 0.5) * size / len(sky))
        layout, self._document = self.widget.layout, document
        layout.xaxis.range = [1, float(pages(size))]
        layout.yaxis.range = [self._floor - 0.08 * room, self._top + 0.12 * room]
        self._trace["sky"].update(x=at.astype(np.float32), y=sky)
        middle = (document.needle.start + document.needle.stop) / 2
        x = float(pages(middle))
        layout.shapes[2].update(x0=x, x1=x, visible=bool(len(document.needle)))
        right = x > float(pages(size * 0.8))
        said = f"the needle, page {page_of(document.needle.start):,}" if len(document.needle) else ""
        layout.annotations[0].update(x=x, text=said, xanchor="right" if right else "left")

    def replayed(self, replay: Replay) -> None:
        """For another plan: chunk borders."""
        self._replay = replay
        edge = np.arange(1, replay.chunks) * replay.plan.chunk_tokens if replay.chunks <= BORDERS else np.zeros(0)
        x = np.repeat(pages(edge), 3)
        y = np.tile([-0.5, 0.5, np.nan], len(edge))
        self._trace["borders"].update(x=x.astype(np.float32), y=y.astype(np.float32))

    def draw(self, request: int, step: int, scores: Scores, words: list[str]) -> None:
        """The state after `step` chunks, inside the caller's `batch_update`. words: the vocabulary."""
        replay, document = self._replay, self._document
        kept, fresh, gone = replay.buffer(step), replay.promoted(step), replay.evicted(step)
        old = kept.take(np.flatnonzero(~np.isin(kept.position, fresh.position, assume_unique=True)))
        for name, some in (("kept", old), ("promoted", fresh), ("evicted", gone)):
            some = tallest(some, replay.tokens)
            text = [f"{_word(words, document, at)} · page {page_of(at):,} · {score:.2f}"
                    for at, score in zip(some.champion.tolist(), some.score.tolist(), strict=True)]  # fmt: skip
            self._trace[name].update(x=pages(some.position).astype(np.float32), y=some.score, text=text)
        self._draw_needle(step, kept, scores)
        self._trace["strip"].update(z=strip_codes(replay, step)[None], **self._columns())
        ends = pages(np.minimum(np.arange(step + 1) * replay.plan.chunk_tokens, replay.tokens)).astype(np.float32)
        bar = np.where(np.isfinite(replay.bar[: step + 1]), replay.bar[: step + 1], np.nan)
        self._trace["bar"].update(x=ends, y=bar)
        self._trace["held"].update(x=ends, y=replay.held[: step + 1] / replay.plan.buffer_tokens)
        self._trace["recall"].update(x=ends, y=replay.recall[: step + 1])
        self._draw_front(replay, step)
        self._trace["sky"].meta = request

    def _draw_front(self, replay: Replay, step: int) -> None:
        """Marks the chunk that was just read, and veils the part that was not."""
        read = replay.read(max(0, step - 1)), replay.read(step), replay.tokens
        first, last, end = (float(pages(at)) for at in read)
        chunk, veil = self.widget.layout.shapes[:2]
        chunk.update(x0=first, x1=last)
        veil.update(x0=last, x1=end)
        unread = (end - last) / max(end - 1, 1e-9)
        self.widget.layout.annotations[1].update(x=(last + end) / 2, text="not read yet" if unread > 0.12 else "")

    def _draw_needle(self, step: int, kept: Champions, scores: Scores) -> None:
        """A star at the needle's best token once it has been read: full while any of it is kept, else hollow."""
        needle = self._document.needle
        if not len(needle) or self._replay.read(step) <= needle.start:
            self._trace["needle"].update(x=[], y=[], text=[])
            return
        part = scores.score[needle.start : needle.stop]
        best = needle.start + int(part.argmax())
        found = np.searchsorted(kept.position, [needle.start, needle.stop])
        share = int(found[1] - found[0])
        said = f"{share} of the needle's {len(needle)} tokens are kept"
        self._trace["needle"].update(
            x=[float(pages(best))], y=[float(part.max())], text=[said],
            marker={"symbol": "star" if share else "star-open", "line": {"color": "white" if share else NEEDLE}},
        )  # fmt: skip

    def _columns(self) -> dict:
        columns = min(COLUMNS, len(self._document))
        width = len(self._document) / columns / PAGE
        return {"x0": 1 + width / 2, "dx": width, "y": [0]}


def _word(words: list[str], document: Document, position: int) -> str:
    return f"“{words[document.ids[position]].strip() or '↵'}”"


def _layout() -> dict:
    across = partial(domain, HEIGHT)
    under = {"y": across(*SKY)[0], "font": {"size": 12}, "showarrow": False, "xref": "x", "yref": "paper"}
    sky = {"yref": "y domain", "y0": 0, "y1": 1, "xref": "x", "x0": 1, "x1": 1, "type": "rect", "line": {"width": 0}}
    return {
        **PAPER, "height": HEIGHT, "margin": {"l": 46, "r": 12, "t": 0, "b": 0}, "hoverdistance": 12,
        "xaxis": {**AXIS, "anchor": "y3", "domain": [0, 1], "range": [1, 2], "tickformat": ",d",
                  "title": {"text": "page", "standoff": 2, "font": {"size": 12}}},
        "yaxis": {**AXIS, "domain": across(*SKY), "anchor": "x", "title": {"text": "score", "standoff": 2}},
        "yaxis2": {**AXIS, "domain": across(*STRIP), "anchor": "x", "ticks": "", "range": [-0.5, 0.5],
                   "tickvals": [0], "ticktext": ["tokens"]},
        "yaxis3": {**AXIS, "domain": across(*CURVES), "anchor": "x", "range": [-0.04, 1.08], "tickvals": [0, 0.5, 1],
                   "ticktext": ["0", "50%", "100%"], "showgrid": True, "gridcolor": "#eef0f2"},
        "shapes": [
            {**sky, "fillcolor": "#fdf3d7", "layer": "below"},
            {**sky, "fillcolor": "#f3f4f6", "layer": "above"},
            {"type": "line", "xref": "x", "yref": "paper", "x0": 1, "x1": 1, "y0": across(*CURVES)[0],
             "y1": across(*SKY)[1], "line": {"color": NEEDLE, "width": 1.3, "dash": "dot"}, "layer": "above"},
        ],
        "annotations": [
            {**under, "x": 1, "y": across(*SKY)[1], "yanchor": "top", "text": "", "font": {"size": 12, "color": NEEDLE},
             "bgcolor": "rgba(255,255,255,0.8)", "borderpad": 1},
            {**under, "x": 1, "y": across(SKY[1] - 26, SKY[1])[1], "text": "", "font": {"color": "#6e7781"}},
        ],
    }  # fmt: skip
