"""What all plotly figures share: colours, axes, and a figure without plotly's own buttons and gestures."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.serializers import custom_serializers
from traitlets import Bool, Dict

from proteus_playground.playground.views import ANCHOR, DNA, LOCAL, NOTE

OKABE_ITO = {LOCAL: "#0072B2", ANCHOR: "#E69F00", DNA: "#009E73", NOTE: "#CC79A7"}
GATE_COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B5A900",
)  # gate g has colour g mod 7  # fmt: skip
INK, GREY = "#1b1f24", "#d4d8dd"
CONFIG = {"displayModeBar": False, "showSendToCloud": False, "displaylogo": False, "doubleClick": False,
          "scrollZoom": False, "responsive": True}  # fmt: skip
PAPER = {"autosize": True, "paper_bgcolor": "white", "plot_bgcolor": "white", "dragmode": False, "hovermode": "closest",
         "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12, "color": INK},
         "showlegend": False, "template": None, "uirevision": "fixed"}  # fmt: skip
AXIS = {"fixedrange": True, "zeroline": False, "showgrid": False, "ticks": "outside", "ticklen": 4, "tickcolor": GREY,
        "linecolor": GREY}  # fmt: skip


class Figure(go.FigureWidget):
    """Plotly's figure, whose changes are one message each, and whose JavaScript is our own.

    Plotly's sends four messages for a change, and its JavaScript answers with three, which hold all defaults.
    """

    _esm = "\n".join(
        ("if (!globalThis.Plotly) {", get_plotlyjs(), "}", (files(__package__) / "plot.js").read_text("utf-8"))
    )
    _change = Dict().tag(sync=True, **custom_serializers)
    _fixed = Bool(False).tag(sync=True)  # whether no scale depends on the data, so that no axis has to be drawn again

    def _send_update_msg(self, restyle_data, relayout_data, trace_indexes=None, source_view_id=None) -> None:
        traces = self._normalize_trace_indexes(trace_indexes)
        self._change = {"style": restyle_data or {}, "layout": relayout_data or {}, "traces": traces}

    def _send_restyle_msg(self, restyle_data, trace_indexes=None, source_view_id=None) -> None:
        self._send_update_msg(restyle_data, {}, trace_indexes)

    def _send_relayout_msg(self, layout_data, source_view_id=None) -> None:
        self._send_update_msg({}, layout_data, [])

    def _send_addTraces_msg(self, new_traces_data) -> None:
        self._change = {"added": new_traces_data}


def blank(layout: dict, traces: Iterable = (), fixed: bool = False) -> Figure:
    """A figure that holds `traces`. fixed: no scale depends on the data."""
    made = Figure(layout=layout)
    made._fixed = fixed
    made._config = {**made._config, **CONFIG}
    for trace in traces:
        made.add_trace(trace)
    return made


def titled(text: str, **rest) -> dict:
    """An axis with a title."""
    return {**AXIS, "title": {"font": {"size": 12}, "standoff": 4, "text": text}, **rest}


def bare(text: str, **rest) -> dict:
    """An axis without numbers, as one side of a box."""
    return titled(text, showticklabels=False, showline=True, mirror=True, **rest) | {"ticks": ""}


def domain(height: int, top: int, bottom: int) -> list[float]:
    """The share of a figure's height (plotly's `domain`) between two distances from its top, all in pixels."""
    return [1 - bottom / height, 1 - top / height]
