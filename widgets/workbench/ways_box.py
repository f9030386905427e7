"""What chooses the keys, what is taken away, and the settings that are pinned to compare with."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

import ipywidgets as w
import numpy as np

from proteus_playground.attention.selectors import OURS, SELECTORS, Without, offered
from proteus_playground.playground.views import RowView

from ..parts.boxes import button, labelled, row
from ..parts.controls import ModelEntry, bind, model_title, tip
from ..parts.sentences import shown
from ..parts.state import BY_NAME, SETTINGS, PlayState, pin_of, unpin

OURS_TITLE = "Ours: the window, the anchors, and keys and notes of the gates that a query opens."
WHAT = {
    "notes": "No query reads a note, in any layer; the reads that this saves are not spent on other keys.",
    "rings": "No query reads a key beyond the window and the anchors, in any layer, whichever selector chose the key.",
}


class WaysBox(w.VBox):
    """`follow` names the head, the gate and the key that can be taken away next: those of the row on show."""

    def __init__(self, state: PlayState, verdict: str = ""):
        self.state = state
        self.choice = w.Dropdown(options=offered(), value=state.selector, layout={"width": "170px"})
        bind(state, "selector", self.choice)
        self.about = w.HTML()
        self.pin = button("Pin as A", "Keeps these settings as A; then move a slider: it sets B, and every "
                          "picture shows A and B",
                          self._pin, icon="thumb-tack")  # fmt: skip
        self.pin.add_class("pp-pin")
        self.swap = button(
            "A ⇄ B", "Exchanges A and B: the sliders take the settings of A, and those of B are pinned", self._swap
        )
        self.pinned, self.apart = w.HTML(), w.HTML()
        self.model_a = ModelEntry(self._choose_model, self.say_apart, "The model of A")
        self.model_a_row = labelled("A's model", self.model_a, "76px")
        self.parts = {part: self._toggle(part, words, WHAT[part])
                      for part, words in (("notes", "notes"), ("rings", "far keys"))}  # fmt: skip
        self.local = {name: self._toggle("", "") for name in ("head", "gate", "key")}
        self.chips = row("pp-chips")
        self.back = button(
            "give all back", "Gives back everything that was taken away", lambda: setattr(state, "without", "")
        )
        self.verdict = w.HTML(verdict)
        self._names = {"head": "", "gate": "", "key": ""}
        away = w.HTML('<span class="pp-knob-name">take away</span>')
        choose = row("pp-ways-row", labelled("selector", self.choice, "172px"), self.about)
        less = row("pp-ways-row", away, *self.parts.values(), *self.local.values(), self.chips, self.back)
        compare = row("pp-ways-row", self.pin, self.swap, self.model_a_row, self.pinned, self.apart)
        super().__init__([choose, self.verdict, less, compare])
        self.add_class("pp-ways")
        state.observe(lambda _: self._show(), ["selector", "without", "pinned", "model"])
        state.observe(lambda _: self._say_pinned(), SETTINGS)
        self._show()

    def follow(self, layer: int, group: int, seen: RowView, tokens: list[str]) -> None:
        """The row on show: its head, the gate that it opened first, the key that it gives most attention."""
        key = _strongest(seen)
        names = {
            "head": (f"head {layer}:{seen.head}", f"head {seen.head}", "The output of this head in this layer is 0."),
            "gate": (f"gate {layer}:{group}:{seen.gates_opened[0]}", f"gate {seen.gates_opened[0]}",
                     "Neither the far keys nor the note of this gate are read. The query matches this gate best.")
            if seen.gates_opened else ("", "gate", "This row opened no gate."),
            "key": (f"key {key}", f"key ‘{shown(tokens[key])}’",
                    "No other row reads this key, in any layer. It gets most attention here.")
            if key is not None else ("", "key", "This row reads no other key."),
        }  # fmt: skip
        for name, (part, words, what) in names.items():
            made = self.local[name]
            if (self._names[name], made.description) != (part, words):
                self._names[name], made.description, made.disabled = part, words, not part
                tip(made, what)

    def _toggle(self, part: str, words: str, what: str = "") -> w.Button:
        made = button(words, what)
        made.on_click(lambda _: self._take(part or self._names[self._name_of(made)]))
        return made

    def _name_of(self, made: w.Button) -> str:
        return next(name for name, one in self.local.items() if one is made)

    def _take(self, part: str) -> None:
        if part:
            self.state.without = str(Without.parse(self.state.without).toggled(part))

    def _pin(self) -> None:
        self.state.pinned = "" if self.state.pinned else pin_of(self.state.to_dict())

    def _swap(self) -> None:
        state = self.state
        if state.pinned:
            (settings, way, model), now = unpin(state.pinned, state.model), pin_of(state.to_dict())
            wanted = {name: getattr(settings, name) for name in SETTINGS} | {"model": model, "pinned": now}
            state.update({**wanted, "selector": way.selector, "without": str(way.without)})

    def _choose_model(self, name: str) -> None:
        """Gives A another model, at the settings that are pinned. Raises as `check`."""
        state = self.state
        if state.pinned:
            settings, way, _ = unpin(state.pinned, state.model)
            pinned = {key: getattr(settings, key) for key in SETTINGS} | {"selector": way.selector, "model": name}
            state.pinned = pin_of(pinned | {"without": str(way.without)})

    def say_apart(self, why: str) -> None:
        """Why A is not shown; "" where it is."""
        self.apart.value = f'<span class="pp-note" role="status">{escape(why)}</span>' if why else ""

    def _show(self) -> None:
        state = self.state
        if tuple(self.choice.options) != offered():
            self.choice.options = offered()
            self.choice.value = state.selector
        title = OURS_TITLE if state.selector == OURS else SELECTORS[state.selector].title
        note = "" if state.selector == OURS else " Computed by masks for display, so it is not timed."
        self.about.value = f'<span class="pp-note">{title}{note}</span>'
        parts = Without.parse(state.without).parts()
        for part, made in self.parts.items():
            made.button_style = "warning" if part in parts else ""
        chips = [part for part in parts if part not in self.parts]
        if [chip.part for chip in self.chips.children] != chips:
            old, self.chips.children = self.chips.children, [_chip(part, self._take) for part in chips]
            for chip in old:
                chip.close()
        self.back.layout.display = "" if parts else "none"
        self.pin.description = "Unpin A" if state.pinned else "Pin as A"
        self.pin.button_style = "info" if state.pinned else ""
        self.swap.layout.display = self.model_a_row.layout.display = "" if state.pinned else "none"
        if state.pinned:
            self.model_a.show(unpin(state.pinned, state.model).model)
        self._say_pinned()

    def _say_pinned(self) -> None:
        self.pinned.value = f'<span class="pp-note">{pin_words(self.state)}</span>'


def verdict_html(name: str, broken: str = "") -> str:
    """What a check of a guest's selector found."""
    if broken:
        return (
            f'<p class="pp-verdict-line pp-wrong"><i>✗ {escape(name)} is not used yet.</i> {escape(broken)}. Correct '
            "it and run the cell again. Until then the workbench uses our own selector.</p>"
        )
    return (
        f'<p class="pp-verdict-line pp-right"><i>✓ {escape(name)} keeps the rules:</i> no later key, at most L reads, '
        "the same choice at every call. It is in the list of selectors.</p>"
    )


class _Chip(w.Button):
    part = ""


def _chip(part: str, take: Callable[[str], None]) -> _Chip:
    name, _, at = part.partition(" ")
    layer, _, rest = at.partition(":")
    words = f"{name} {at}" if name == "key" else f"{name} {rest.split(':')[-1]} of layer {layer}"
    made = _Chip(
        description=f"{words} ✕", tooltip=f"Give back: {words}", button_style="warning", layout={"width": "auto"}
    )
    made.part = part
    made.on_click(lambda _: take(part))
    return made


def pin_words(state: PlayState) -> str:
    """How A differs from B, in words."""
    if not state.pinned:
        return "To compare two settings, press Pin as A, then move the sliders: they set B."
    settings, way, model = unpin(state.pinned, state.model)
    now, here = state.settings(), state.way()
    differ = [f"{BY_NAME[name].label} {_value(getattr(settings, name))} → {_value(getattr(now, name))}"
              for name in SETTINGS if getattr(settings, name) != getattr(now, name)]  # fmt: skip
    if model != state.model:
        differ.insert(0, f"{model_title(model)} → {model_title(state.model)}")
    if way.selector != here.selector:
        differ.append(f"{way.selector} → {here.selector}")
    if way.without != here.without:
        differ.append(f"{_without(way.without)} → {_without(here.without)}")
    return (
        f"A → B: {', '.join(differ)}"
        if differ
        else "A and B are the same: move a slider, choose another selector, or give A another model."
    )


def _without(parts: Without) -> str:
    """`all` or `without notes, far keys`: by the names on the buttons."""
    names = ["far keys" if part == "rings" else part for part in parts.parts()]
    return f"without {', '.join(names)}" if names else "all"


def _value(value: float | bool) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else f"{value:g}"


def _strongest(seen: RowView) -> int | None:
    """The key that gets most attention, the row's own left out; None where no other is read one by one."""
    weight = np.where((seen.kind > 0) & (seen.kind < 4), seen.weight, 0)
    weight[seen.token] = 0
    return int(weight.argmax()) if weight.max() > 0 else None
