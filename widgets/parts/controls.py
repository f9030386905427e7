"""Sliders, numbers and switches, each tied to one trait of the state in both directions."""

from __future__ import annotations

from math import log2

import ipywidgets as w
from traitlets import HasTraits

from .state import (
    BY_NAME,
    MAX_LENGTH,
    PRESET_TIPS,
    PRESETS,
    SETTINGS,
    SHELF,
    Field,
    PlayState,
    opening,
    preset_settings,
)

MAIN = ("flux_alpha", "keep_ratio", "shortlist", "dna_fraction")
MINOR = ("layer", "head", "probes", "gates", "anchors", "head_top_p")
STEPS = dict.fromkeys(("flux_alpha", "keep_ratio", "dna_fraction", "head_top_p", "ema_decay"), 0.01)


def tip(widget: w.Widget, sentence: str) -> w.Widget:
    """A tooltip by whichever name this version of ipywidgets has for it."""
    widget_traits = widget.trait_names()
    setattr(widget, "tooltip" if "tooltip" in widget_traits else "description_tooltip", sentence)
    return widget


def bind(state: HasTraits, name: str, widget: HasTraits, to_state=lambda v: v, to_widget=lambda v: v) -> None:
    """Widget and trait follow each other; a value the state refuses goes back to what the state holds."""

    def from_widget(change) -> None:
        try:
            setattr(state, name, to_state(change["new"]))
        except (TypeError, ValueError):
            widget.value = to_widget(getattr(state, name))

    def from_state(_) -> None:
        # A slider between two whole numbers is already where it should be: writing would fight the drag.
        if to_state(widget.value) != getattr(state, name):
            widget.value = to_widget(getattr(state, name))

    widget.observe(from_widget, "value")
    state.observe(from_state, name)


class Knob(w.VBox):
    """Label, numeric entry, reset and slider of one number. `live`: follows the drag; else the release.

    log: whether the slider moves in powers of two, `fine` of one at a time.
    """

    def __init__(
        self, state: HasTraits, field: Field, *, live: bool, log: bool = False, high: float | None = None,
        fine: float = 0.25,
    ):  # fmt: skip
        self._state, self._field = state, field
        top = field.high if high is None else high
        value = min(getattr(state, field.name), top)
        wide = w.Layout(width="auto", margin="0 4px 0 4px")
        given = {"readout": False, "continuous_update": live, "layout": wide}
        if log:
            ends = {"min": log2(field.low), "max": log2(top)}
            self.slider = w.FloatLogSlider(value=value, base=2, step=fine, **ends, **given)
        elif field.whole:
            self.slider = w.IntSlider(value=value, min=int(field.low), max=int(top), **given)
        else:
            self.slider = w.FloatSlider(value=value, min=field.low, max=top, step=STEPS[field.name], **given)
        self.slider.style.handle_color = "#0072B2"
        entry = w.BoundedIntText if field.whole else w.BoundedFloatText
        step = {} if field.whole else {"step": STEPS[field.name]}
        self.number = entry(value=value, min=field.low, max=top, layout=w.Layout(width="72px"), **step)
        self.undo = w.Button(description="↺", layout=w.Layout(width="30px"))
        tip(self.slider, field.tip)
        tip(self.number, f"{field.label}, as a number. {field.tip}")
        self.undo.tooltip = "Back to where it was at first"
        self.undo.add_class("pp-undo")
        label = w.HTML(f'<span class="pp-knob-name" title="{field.tip}">{field.label}</span>')
        label.layout.flex = "1 1 auto"
        bind(state, field.name, self.slider, self._whole, float if log else lambda v: v)
        bind(state, field.name, self.number, self._whole)
        self.undo.on_click(lambda _: setattr(state, field.name, self._default()))
        head = w.HBox([label, self.number, self.undo], layout=w.Layout(align_items="center"))
        super().__init__([head, self.slider])
        self.add_class("pp-knob")
        self.add_class(f"pp-knob-{field.name.replace('_', '-')}")

    def _whole(self, value: float):
        return round(value) if self._field.whole else round(value, 4)

    def _default(self):
        state, name = self._state, self._field.name
        first = opening(state.model)[name] if isinstance(state, PlayState) else self._field.default
        return min(first, self.number.max)

    def limit(self, high: int) -> None:
        """Another model: the largest layer or head there is."""
        for widget in (self.slider, self.number):
            widget.max = high


class Presets(w.HBox):
    """A button per preset; the one that the settings are at is marked."""

    def __init__(self, state: PlayState):
        self._buttons = {}
        for name in PRESETS:
            button = w.Button(description=name, tooltip=PRESET_TIPS[name], layout=w.Layout(width="auto"))
            button.on_click(lambda _, name=name: state.update(preset_settings(name, state.model)))
            self._buttons[name] = button
        super().__init__(list(self._buttons.values()), layout=w.Layout(flex_flow="row wrap"))
        self.add_class("pp-presets")
        state.observe(lambda _: self._mark(state.preset()), [*SETTINGS, "model"])
        self._mark(state.preset())

    def _mark(self, now: str | None) -> None:
        for name, button in self._buttons.items():
            button.button_style = "info" if name == now else ""


def main_knobs(state: PlayState) -> w.GridBox:
    knobs = [Knob(state, BY_NAME[name], live=True, log=name == "shortlist") for name in MAIN]
    box = w.GridBox(knobs, layout=w.Layout(grid_template_columns="repeat(auto-fit, minmax(210px, 1fr))"))
    box.add_class("pp-knobs")
    return box


class LayerControls(w.VBox):
    """Behind "more": which layer and head, how gates are probed, and how L comes to be divided."""

    def __init__(self, state: PlayState):
        self.knobs = {name: Knob(state, BY_NAME[name], live=False, high={"layer": 29, "head": 8}.get(name))
                      for name in MINOR}  # fmt: skip
        notes = w.Checkbox(value=state.notes, description="read notes", indent=False)
        route = w.Checkbox(value=state.route_heads, description="route heads", indent=False)
        tip(notes, "Whether every gate shows one note that averages what was not read, where there is room for all.")
        tip(route, "Whether heads may sleep; the output of a model that was not trained for it suffers.")
        bind(state, "notes", notes)
        bind(state, "route_heads", route)
        self.split = w.HTML()
        grid = w.GridBox(list(self.knobs.values()),
                         layout=w.Layout(grid_template_columns="repeat(auto-fit, minmax(150px, 1fr))"))  # fmt: skip
        grid.add_class("pp-knobs")
        super().__init__([grid, w.HBox([notes, route]), self.split])
        self.add_class("pp-layer-controls")


class ModelChoice(w.HBox):
    """Which model is looked at; another one opens at once, with its own text, layer and question."""

    NAMES = (("shelf-mini", "shelf-mini"), ("SmolLM2", "smollm2"), ("random layer", "random"))
    TIPS = (
        "A small model that comes with the package and was trained with the slider: answers at once.",
        "A model of 135 million parameters, trained without the slider; 98 MB, fetched once.",
        "Random weights over whole words: needs nothing, learned nothing.",
    )

    def __init__(self, state: PlayState):
        self.buttons = w.ToggleButtons(options=self.NAMES, value=state.model, tooltips=self.TIPS)
        super().__init__([_labelled("model", self.buttons)])
        self.add_class("pp-model")
        self.buttons.observe(lambda change: self._choose(state, change["new"]), "value")
        state.observe(lambda change: setattr(self.buttons, "value", change["new"]), "model")

    @staticmethod
    def _choose(state: PlayState, model: str) -> None:
        if model != state.model:
            start, names = opening(model), ("model", "text", "pasted", "question", "layer", "head", "token")
            state.update({name: start[name] for name in names})


class SourceControls(w.VBox):
    """Behind "more": which text is read, and how much of it. Takes effect on its button."""

    CHOICES = (SHELF, "humble token", "python topics", "paste", "file")

    def __init__(self, state: PlayState, on_pull):
        self._state = state
        self.kind = w.ToggleButtons(options=self.CHOICES, value=self._kind_of_state())
        self.paste = w.Textarea(value=state.pasted, placeholder="Paste any text here, then press Read it.",
                                layout=w.Layout(width="auto", height="72px"))  # fmt: skip
        self.path = w.Text(placeholder="Path of a UTF-8 text file", layout=w.Layout(width="auto"))
        self.number = w.BoundedIntText(value=state.shelf, min=0, max=999_999, layout=w.Layout(width="90px"))
        self.length = w.BoundedIntText(value=state.length, min=64, max=4096, step=64, layout=w.Layout(width="90px"))
        tip(self.length, BY_NAME["length"].tip)
        tip(self.number, BY_NAME["shelf"].tip)
        self._numbered = _labelled("number", self.number)
        self.read = w.Button(description="Read it", button_style="info", tooltip="Run the model on this text")
        self.pull = w.Button(description="Pull SmolLM2 (98 MB)", tooltip="Fetch the model into this user's cache, once",
                             layout=w.Layout(width="auto"))  # fmt: skip
        self.read.on_click(lambda _: self._apply())
        self.pull.on_click(lambda _: on_pull())
        self.kind.observe(lambda _: self._show(), "value")
        state.observe(lambda _: self._follow(), ["text", "pasted", "length", "shelf"])
        super().__init__([
            _labelled("text", self.kind), self._numbered, self.paste, self.path,
            w.HBox([_labelled("tokens", self.length), self.read, self.pull]),
        ])  # fmt: skip
        self._show()

    def _kind_of_state(self) -> str:
        if self._state.pasted:
            return "paste"
        return self._state.text if self._state.text in self.CHOICES[:3] else "file"

    def _show(self) -> None:
        for widget, kind in ((self._numbered, SHELF), (self.paste, "paste"), (self.path, "file")):
            widget.layout.display = "" if self.kind.value == kind else "none"

    def _follow(self) -> None:
        state = self._state
        self.length.value, self.number.value = state.length, state.shelf
        self.kind.value = self._kind_of_state()
        if state.pasted:
            self.paste.value = state.pasted
        if self.kind.value == "file":
            self.path.value = state.text

    def _apply(self) -> None:
        kind = self.kind.value
        text = {"paste": "pasted text", "file": self.path.value.strip()}.get(kind, kind)
        pasted = self.paste.value[: MAX_LENGTH["pasted"]] if kind == "paste" else ""
        now = {"length": self.length.value, "shelf": self.number.value, "text": text, "pasted": pasted}
        self._state.update({**now, "question": ""})


class ShareControls(w.VBox):
    """Behind "more": the state as a short string for a cell and as JSON; either can be pasted back."""

    def __init__(self, state: PlayState):
        self._state = state
        self.cell = w.Text(layout=w.Layout(width="auto"))
        self.json = w.Textarea(layout=w.Layout(width="auto", height="96px"))
        self.restore = w.Button(description="Restore", tooltip="Set every control to what the box above says")
        self.message = w.HTML()
        tip(self.cell, "Put this line in a cell and it opens the workbench as it is now.")
        tip(self.json, "The whole state; paste another one, or a short string, and press Restore.")
        self.restore.on_click(lambda _: self._restore())
        state.observe(lambda _: self._write(), list(state.to_dict()))
        super().__init__([
            w.HTML('<span class="pp-knob-name">This workbench in a cell</span>'), self.cell,
            w.HTML('<span class="pp-knob-name">State: copy it, or paste one and restore</span>'), self.json,
            w.HBox([self.restore, self.message]),
        ])  # fmt: skip
        self.visible = False

    @property
    def visible(self) -> bool:
        return self._visible

    @visible.setter
    def visible(self, value: bool) -> None:
        self._visible = value
        self._write()

    def _write(self) -> None:
        if self._visible:
            self.cell.value = f"playground(state={self._state.to_string()!r})"
            self.json.value = self._state.to_json()

    def _restore(self) -> None:
        try:
            self._state.restore(self.json.value)
            self.message.value = '<span class="pp-note">restored</span>'
        except (TypeError, ValueError) as err:
            from html import escape

            self.message.value = f'<span class="pp-error">{escape(str(err))}</span>'


def _labelled(text: str, widget: w.Widget, wide: str = "66px") -> w.HBox:
    label = w.HTML(f'<span class="pp-knob-name">{text}</span>', layout=w.Layout(flex=f"0 0 {wide}"))
    return w.HBox([label, widget], layout=w.Layout(align_items="center"))
