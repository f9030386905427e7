"""What all plotly figures share: colours, axes, and a figure without plotly's own buttons and gestures."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go

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
    """Plotly's figure, with what is on show as its state.

    Plotly brings the state up to date only where a figure is a cell's result by itself; ours lie in boxes. A browser
    that comes later, in Voila or after a reload, would get an empty figure.
    """

    def get_state(self, key=None, drop_defaults=False) -> dict:
        state = super().get_state(key, drop_defaults)
        if key is None and hasattr(self, "_layout_obj"):  # which it lacks while it is being made
            for name, now in (("_widget_layout", self._layout_obj._props), ("_widget_data", self._data)):
                state[name] = self.trait_metadata(name, "to_json", self._trait_to_json)(now, self)
        return state

    @staticmethod
    def _remove_overlapping_props(input_data, delta_data, prop_path=()) -> list:
        """Nothing: what the browser fills in takes the place of no value of ours, and plotly's rule fails on arrays."""
        return []


def blank(layout: dict, traces: Iterable = ()) -> Figure:
    """A figure that holds `traces`."""
    made = Figure(layout=layout)
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
