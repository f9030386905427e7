"""Boxes and buttons that every panel uses."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as w

from .terms import with_terms

AUTO = {"width": "auto"}  # a dictionary, because a shared Layout would be closed with the first panel that is closed


def row(css_class: str, *children: w.Widget) -> w.HBox:
    """`children` side by side."""
    box = w.HBox(list(children))
    box.add_class(css_class)
    return box


def column(css_class: str, *children: w.Widget) -> w.VBox:
    """`children` one below the other."""
    box = w.VBox(list(children))
    box.add_class(css_class)
    return box


def labelled(text: str, widget: w.Widget, wide: str = "66px") -> w.HBox:
    """A bold label in front of `widget`; `wide` is the label's width in CSS."""
    label = w.HTML(f'<span class="pp-knob-name">{with_terms(text)}</span>', layout={"flex": f"0 0 {wide}"})
    return w.HBox([label, widget], layout={"align_items": "center"})


def button(words: str, tooltip: str, act: Callable[[], object] | None = None, **traits) -> w.Button:
    """A button as wide as its words; `act` is called without arguments on a click."""
    made = w.Button(**{"description": words, "tooltip": tooltip, "layout": AUTO, **traits})
    if act is not None:
        made.on_click(lambda _: act())
    return made
