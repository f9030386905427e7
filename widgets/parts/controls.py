"""Sliders, numbers and switches, each tied to one trait of the state in both directions."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from math import log2
from pathlib import Path

import ipywidgets as w
from traitlets import HasTraits

from proteus_playground.attention.settings import CONTROLS, Control
from proteus_playground.hf.models import KNOWN, SHIPPED, find

from .boxes import button, labelled, row
from .state import BY_NAME, MAX_LENGTH, PRESET_TIPS, PRESETS, SETTINGS, SHELF, PlayState, opening, preset_settings
from .terms import control_html

STEP = 0.01  # of a slider that is not of whole numbers
WHERE = ("layer", "head")  # what is looked at; no setting of the layer


def tip(widget: w.Widget, sentence: str) -> w.Widget:
    """A tooltip by whichever name this version of ipywidgets has for it."""
    widget_traits = widget.trait_names()
    setattr(widget, "tooltip" if "tooltip" in widget_traits else "description_tooltip", sentence)
    return widget


def bind(state: HasTraits, name: str, widget: HasTraits, to_state=lambda v: v, to_widget=lambda v: v) -> None:
    """Widget and trait follow each other; where the state refuses a value, the widget goes back to the state's.

    A widget that cannot show the state's value, because its range is that of another model, leaves the state alone.
    """
    following = False

    def from_widget(change) -> None:
        if following:
            return
        try:
            setattr(state, name, to_state(change["new"]))
        except (TypeError, ValueError):
            widget.value = to_widget(getattr(state, name))

    def from_state(_) -> None:
        # A slider between two whole numbers already rounds to the state's: writing to it would fight the drag.
        nonlocal following
        if to_state(widget.value) != getattr(state, name):
            following = True
            try:
                widget.value = to_widget(getattr(state, name))
            finally:
                following = False

    widget.observe(from_widget, "value")
    state.observe(from_state, name)


class Knob(w.VBox):
    """Label, numeric entry, reset and slider of one number.

    live: whether the state changes while the slider is dragged, and not only when it is let go. high: largest value,
    where it is smaller than the control's.
    """

    def __init__(self, state: HasTraits, control: Control, *, live: bool, high: float | None = None):
        self._state, self._control = state, control
        self.slider = self._make_slider(control.high if high is None else high, live)
        self.number = self._make_number(control.high if high is None else high)
        back = "Back to the first value"
        self.undo = button("↺", back, lambda: setattr(state, control.name, self._first()), layout={"width": "30px"})
        self.undo.add_class("pp-undo")
        label = w.HTML(control_html(control), layout=w.Layout(flex="1 1 auto"))
        bind(state, control.name, self.slider, self._rounded, float if control.octave_step else lambda v: v)
        bind(state, control.name, self.number, self._rounded)
        head = w.HBox([label, self.number, self.undo], layout=w.Layout(align_items="center"))
        super().__init__([head, self.slider])
        self.add_class("pp-knob")
        self.add_class(f"pp-knob-{control.name.replace('_', '-')}")

    def _make_slider(self, high: float, live: bool) -> w.Widget:
        control, layout = self._control, w.Layout(width="auto", margin="0 4px 0 4px")
        given = {"value": self._value(high), "readout": False, "continuous_update": live, "layout": layout}
        if control.octave_step:
            ends = {"min": log2(control.low), "max": log2(high)}
            slider = w.FloatLogSlider(base=2, step=control.octave_step, **ends, **given)
        elif control.whole:
            slider = w.IntSlider(min=control.low, max=int(high), **given)
        else:
            slider = w.FloatSlider(min=control.low, max=high, step=STEP, **given)
        slider.style.handle_color = "#0072B2"
        return tip(slider, control.tip)

    def _make_number(self, high: float) -> w.Widget:
        control = self._control
        given = {"value": self._value(high), "min": control.low, "max": high, "layout": w.Layout(width="72px")}
        entry = w.BoundedIntText(**given) if control.whole else w.BoundedFloatText(step=STEP, **given)
        unit = f", in {control.unit}" if control.unit not in ("", control.label) else ""
        return tip(entry, f"{control.label} as a number{unit}. {control.tip}")

    def _value(self, high: float):
        return min(getattr(self._state, self._control.name), high)

    def _rounded(self, value: float):
        return round(value) if self._control.whole else round(value, 4)

    def _first(self):
        """The value that the state opens with, within the slider."""
        state, name = self._state, self._control.name
        first = opening(state.model)[name] if isinstance(state, PlayState) else self._control.default
        return min(first, self.number.max)

    def limit(self, high: int) -> None:
        """Another model: the largest layer or head that it has."""
        for widget in (self.slider, self.number):
            widget.max = high
            widget.value = self._value(high)


class Switch(w.Checkbox):
    """The checkbox of a control that is on or off."""

    def __init__(self, state: HasTraits, control: Control):
        super().__init__(value=getattr(state, control.name), description=control.label, indent=False)
        tip(self, control.tip)
        bind(state, control.name, self)


class Presets(w.HBox):
    """A button per preset; the one whose settings are the present ones is marked."""

    def __init__(self, state: PlayState):
        self._buttons = {}
        for name in PRESETS:
            self._buttons[name] = button(
                name, PRESET_TIPS[name], lambda name=name: state.update(preset_settings(name, state.model))
            )
        super().__init__(list(self._buttons.values()), layout=w.Layout(flex_flow="row wrap"))
        self.add_class("pp-presets")
        state.observe(lambda _: self._mark(state.preset()), [*SETTINGS, "model"])
        self._mark(state.preset())

    def _mark(self, now: str | None) -> None:
        for name, made in self._buttons.items():
            made.button_style = "info" if name == now else ""


def main_knobs(state: PlayState) -> w.GridBox:
    """The knobs that are always in sight; the pictures follow them while they are dragged."""
    return grid([Knob(state, control, live=True) for control in CONTROLS if control.main], 210)


class LayerControls(w.VBox):
    """Behind "More controls": which layer and head, the other settings of the layer, and how L is divided."""

    def __init__(self, state: PlayState):
        rest = [control.name for control in CONTROLS if not (control.main or control.switch)]
        highest = {"layer": 29, "head": 8}  # until a model says what it has
        self.knobs = {name: Knob(state, BY_NAME[name], live=False, high=highest.get(name)) for name in (*WHERE, *rest)}
        switches = w.HBox([Switch(state, control) for control in CONTROLS if control.switch])
        self.split = w.HTML()
        super().__init__([grid(self.knobs.values(), 150), switches, self.split])
        self.add_class("pp-layer-controls")


def grid(knobs, least: int) -> w.GridBox:
    """Knobs side by side, each at least `least` pixels wide."""
    columns = f"repeat(auto-fit, minmax({least}px, 1fr))"
    box = w.GridBox(list(knobs), layout=w.Layout(grid_template_columns=columns))
    box.add_class("pp-knobs")
    return box


def _about(known) -> str:
    """A language model of the registry in a sentence."""
    kept = f"{known.megabytes} MB are downloaded once."
    if known.base:
        return f"{KNOWN[known.base].label}, trained further so that the slider costs less; {kept}"
    return f"A language model that was trained without the slider; {kept}"


def model_title(name: str) -> str:
    """How a control calls a model."""
    return {"shelf-mini": "shelf-mini", "random": "random layer"}.get(name) or find(name).label


class ModelEntry(w.Combobox):
    """The name of any model, typed or chosen from those that the package knows.

    choose(name) may raise ValueError; refused(words) is called with "" before it, and with the error's words after it.
    """

    def __init__(self, choose: Callable[[str], None], refused: Callable[[str], None], what: str):
        self._choose, self._refused, self._following = choose, refused, False
        super().__init__(
            options=["shelf-mini", *KNOWN, *SHIPPED, "random"], ensure_option=False, continuous_update=False,
            layout={"width": "190px"},
        )  # fmt: skip
        tip(self, f"{what}: a name of the list, a hub id, or the path of a folder or of a GGUF file")
        self.observe(lambda change: self._chosen(change["new"].strip()), "value")

    def show(self, name: str) -> None:
        """Shows `name` without choosing it."""
        self._following, self.value, self._following = True, name, False

    def _chosen(self, name: str) -> None:
        if self._following or not name:
            return
        self._refused("")
        try:
            self._choose(name)
        except ValueError as err:
            self._refused(str(err))


def open_model(state: PlayState, model: str) -> None:
    """The workbench as `model` opens it, but for what stays. ValueError for a name that leads to no model."""
    if model != state.model:
        kept = ("flux_alpha", "keep_ratio", "shortlist", "length", "shelf", "tour", "pinned")
        state.update(opening(model) | {name: getattr(state, name) for name in kept})


class ModelChoice(w.HBox):
    """Which model is shown. Another one opens at once, as by itself; alpha, keep ratio, L and the text lengths stay."""

    NAMES = (
        ("shelf-mini", "shelf-mini"),
        *((known.label, name) for name, known in KNOWN.items()),
        ("random layer", "random"),
    )
    TIPS = (
        "A small model that comes with the package and was trained with the slider; it answers at once.",
        *(_about(known) for known in KNOWN.values()),
        "A layer of random weights over whole words; it needs no download and has learned nothing.",
    )

    def __init__(self, state: PlayState):
        self.buttons, self._following = w.ToggleButtons(), False
        super().__init__([labelled("model", self.buttons)])
        self.add_class("pp-model")
        self._follow(state.model)
        self.buttons.observe(lambda change: self._choose(state, change["new"]), "value")
        state.observe(lambda change: self._follow(change["new"]), "model")

    def _follow(self, model: str) -> None:
        """Show `model` as chosen; one that is not among the names gets a button at their end."""
        self._following = True  # new options choose their first for a moment
        if model not in dict(self.buttons.options).values():
            other = () if model in dict(self.NAMES).values() else ((find(model).label, model),)
            self.buttons.options, self.buttons.tooltips = self.NAMES + other, self.TIPS + tuple(m for _, m in other)
        self.buttons.value, self._following = model, False

    def _choose(self, state: PlayState, model: str) -> None:
        if not self._following:
            open_model(state, model)


class SourceControls(w.VBox):
    """Behind "More controls": which text is read, and how much of it. Nothing changes before "Read it" is pressed."""

    CHOICES = (SHELF, "humble token", "python topics", "paste", "file")

    def __init__(self, state: PlayState, on_pull):
        self._state = state
        self.refused = w.HTML()
        self.model = ModelEntry(lambda name: open_model(state, name), self._refuse, "The model to show")
        self.model.show(state.model)
        self.kind = w.ToggleButtons(options=self.CHOICES, value=self._kind_of_state())
        self.paste = w.Textarea(value=state.pasted, placeholder="Paste any text here, then press Read it.",
                                layout=w.Layout(width="auto", height="72px"))  # fmt: skip
        self.path = w.Text(placeholder="Path of a UTF-8 text file", layout=w.Layout(width="auto"))
        self.number = w.BoundedIntText(value=state.shelf, min=0, max=999_999, layout=w.Layout(width="90px"))
        self.length = w.BoundedIntText(value=state.length, min=64, max=4096, step=64, layout=w.Layout(width="90px"))
        tip(self.length, BY_NAME["length"].tip)
        tip(self.number, BY_NAME["shelf"].tip)
        self._numbered = labelled("number", self.number)
        self.read = button("Read it", "Run the model on this text", self._apply, button_style="info")
        self.pull = button("", "Download the model, once, into your cache folder", on_pull)
        self.kind.observe(lambda _: self._show(), "value")
        state.observe(lambda _: self._follow(), ["text", "pasted", "length", "shelf", "model"])
        super().__init__([
            w.HBox([labelled("model", self.model), self.refused]),
            labelled("text", self.kind), self._numbered, self.paste, self.path,
            w.HBox([labelled("tokens", self.length), self.read, self.pull]),
        ])  # fmt: skip
        self._show()

    def offer_pull(self, name: str | None) -> None:
        """Shows a button that downloads the model `name`; None hides it."""
        self.pull.layout.display = "none" if name is None else ""
        if name is not None:
            self.pull.description = f"Pull {find(name).label}{find(name).download}"

    def _refuse(self, why: str) -> None:
        self.refused.value = f'<span class="pp-error">{escape(why)}</span>'

    def _kind_of_state(self) -> str:
        if self._state.pasted:
            return "paste"
        return self._state.text if self._state.text in self.CHOICES[:3] else "file"

    def _show(self) -> None:
        for widget, kind in ((self._numbered, SHELF), (self.paste, "paste"), (self.path, "file")):
            widget.layout.display = "" if self.kind.value == kind else "none"

    def _follow(self) -> None:
        state = self._state
        self.model.show(state.model)
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
    """Behind "More controls": the state as a short string for a cell and as JSON; either can be pasted back."""

    def __init__(self, state: PlayState, on_keep: Callable[[str], object] = str):
        self._state, self._on_keep = state, on_keep
        self.cell = w.Text(layout=w.Layout(width="auto"))
        self.json = w.Textarea(layout=w.Layout(width="auto", height="96px"))
        self.restore = button("Restore", "Set every control to the state in the box above", self._restore)
        self.message = w.HTML()
        self.file = w.Text(value="workbench.html", layout=w.Layout(width="220px"))
        tip(self.file, "The .html file to write, on the machine that runs the notebook.")
        self.keep = button("Keep as a page", "Writes figures, numbers, text and settings as one page that needs no "
                           "network. The page can save each figure as PNG or SVG",
                           self._keep, icon="save")  # fmt: skip
        tip(self.cell, "In a notebook cell, this line opens the workbench as it is now.")
        tip(self.json, "The state of every control; paste another one, or a short string, and press Restore.")
        state.observe(lambda _: self._write(), list(state.to_dict()))
        super().__init__([
            w.HTML('<span class="pp-knob-name">This workbench in a cell</span>'), self.cell,
            w.HTML('<span class="pp-knob-name">State: copy it, or paste another and press Restore</span>'), self.json,
            row("pp-keep", self.restore, self.file, self.keep), self.message,
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

    def _keep(self) -> None:
        try:
            kept = escape(str(Path(self._on_keep(self.file.value)).absolute()))
            self.message.value = (
                f'<span class="pp-note">Kept in {kept}. Open it in a browser; JupyterLab shows its pictures after '
                "“Trust HTML”.</span>"
            )
        except (OSError, ValueError) as err:
            self.message.value = f'<span class="pp-error">{escape(str(err))}</span>'

    def _restore(self) -> None:
        try:
            self._state.restore(self.json.value)
            self.message.value = '<span class="pp-note">restored</span>'
        except (TypeError, ValueError) as err:
            self.message.value = f'<span class="pp-error">{escape(str(err))}</span>'
