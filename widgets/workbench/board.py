"""The workbench's layout and its words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import ipywidgets as w

from proteus_playground.attention.selectors import Way
from proteus_playground.attention.settings import Settings
from proteus_playground.playground.views import GateMap, LayerView, ModelView, RowView

from ..parts import sentences
from ..parts.boxes import button, column, row
from ..parts.controls import (
    Knob,
    LayerControls,
    ModelChoice,
    Presets,
    ShareControls,
    SourceControls,
    main_knobs,
    model_title,
)
from ..parts.html import MODEL_NAMES, no_tiles_html
from ..parts.panel import Panel
from ..parts.state import Pin, PlayState
from . import readout
from .ask_box import AskBox
from .figure import compares
from .next_bars import no_bars_html
from .tour import Tour
from .tradeoff import Tradeoff
from .ways_box import WaysBox


@dataclass(frozen=True)
class Wanted:
    """What a picture has to show."""

    settings: Settings
    layer: int
    head: int
    token: int
    way: Way = Way()
    pin: Pin | None = None


@dataclass(frozen=True)
class Frame:
    """A finished picture: what was wanted, and the data that show it."""

    wanted: Wanted
    view: LayerView
    row: RowView
    gate_map: GateMap
    group: int
    other: LayerView | None = None  # of what is pinned as A
    other_row: RowView | None = None


LEGENDS = {"heads": readout.HEAT_LEGEND, "gates": readout.GATE_LEGEND, "row": "", "text": readout.TEXT_LEGEND}
EMPTY_TITLES = {"heads": "Heads", "gates": "Prototypes", "row": "What a query reads", "text": "The text"}


class Board(Panel):
    """The widgets in their places. `drawn` is the last `Frame` shown and `number` its request."""

    def __init__(
        self, state: PlayState, pictures: w.DOMWidget, text: w.DOMWidget, on_pull: Callable[[], None],
        on_show: Callable[[int], None], verdict: str = "",
        on_curve: Callable[[], object] = lambda: None,
        on_keep: Callable[[str], object] = str,
    ):  # fmt: skip
        super().__init__(readout.TITLE, LEGENDS)
        self.state, self.drawn = state, None
        self.model_view: ModelView | None = None
        self.model_a: tuple[Pin, ModelView] | None = None  # the whole model at what was pinned
        self.run_model = button(
            "Run the whole model",
            "Run every layer at these settings, and compare the model's loss with that of dense attention",
        )
        self.cancel = button("Cancel", "Stop what is running")
        self.more = w.ToggleButton(description="More controls", icon="sliders", layout={"width": "auto"})
        self.more.observe(lambda change: self._show_more(change["new"]), "value")
        self.guide = button("Guided tour", "Seven steps through the pictures; Escape ends it",
                            lambda: state.update({"tour": 1}), icon="map-signs")  # fmt: skip
        self.tour = Tour()
        self.tour.observe(lambda change: state.update({"tour": change["new"]}), "step")
        state.observe(lambda _: self._show_tour(), "tour")
        self.layer_controls = LayerControls(state)
        self.source_controls = SourceControls(state, on_pull)
        self.ask_box, self.ways = AskBox(state, on_show), WaysBox(state, verdict)
        self.curve, self.pays = Tradeoff(state, on_curve), w.HTML()
        self.kl: readout.Far | None = None
        self.next = w.HTML(no_bars_html("The model is being loaded …"))
        self.share_controls = ShareControls(state, on_keep)
        self.drawer = w.GridBox([self.layer_controls, self.source_controls, self.share_controls])
        self.drawer.add_class("pp-drawer")
        self.presets, self.main = Presets(state), main_knobs(state)
        actions = row("pp-actions", self.presets, self.run_model, self.cancel, self.more, self.guide)
        knobs = column("pp-top", self.main, actions)
        self.model_choice = ModelChoice(state)
        over = [self.captions[name] for name in ("heads", "gates", "row")]
        self.place(
            "pp-workbench", self.tour, row("pp-banner", self.banner, self.model_choice), knobs, self.drawer,
            self.numbers, self.pays, self.ways, self.ask_box,
            self.beside([pictures, *over], [self.captions["text"], text, self.next]),
            self.curve,
        )  # fmt: skip
        self._show_more(False)
        self._show_tour()
        self._show_empty(
            "The model is being loaded, then it reads the text once. After that, only the layer on show runs again."
        )

    def _draw_words(self, frame: Frame, probe, timed: LayerView, runs: int) -> None:
        view, row, tokens = frame.view, frame.row, probe.tokens
        name = sentences.token_name(tokens, row.token)
        self._draw_numbers(timed, runs)
        self.ways.follow(view.layer, frame.group, row, tokens)
        two = frame.other is not None
        self._draw_heads_caption(view, row.head, frame.other)
        self.caption("gates", f"Prototypes of KV group {frame.group}", sentences.gates_sentence(row, tokens),
                     readout.TWO_GATE_LEGEND if two else None)  # fmt: skip
        said = sentences.row_sentence(row, tokens)
        if two:
            below = sentences.shares(frame.other_row)
            said = f"Attention of B, above: {sentences.shares(row)}. Of A, below: {below}."
        self.caption("row", f"What {name} reads in head {row.head}", said,
                     readout.legend_html(row.kind[: row.token + 1], bool(getattr(probe, "fact", None))))  # fmt: skip
        self.caption("text", "The text", sentences.text_sentence(view, row, tokens),
                     readout.TWO_TEXT_LEGEND if two else None)  # fmt: skip
        pin, shown = frame.wanted.pin, MODEL_NAMES.get(probe.name, probe.name)
        if pin is not None and pin.model != self.state.model:
            shown = f"B {shown}, A {model_title(pin.model)}"
        self.title.value = readout.workbench_title_html(shown, probe.n_layers, len(tokens), self.state.text, view)
        self._draw_split()

    def _draw_heads_caption(self, view: LayerView, head: int, other: LayerView | None) -> None:
        what, legend, said = view.head_map_kind, None, sentences.heads_sentence(view, head)
        if compares(view, other):
            what, legend = f"B − A in {what}", readout.TWO_HEAT_LEGEND
            said = sentences.two_heads_sentence(view, other)
        elif other is not None:
            what, said = f"{what} of B", sentences.same_heads_sentence(view, other)
        self.caption("heads", f"Heads: {what}", said, legend)

    def _draw_numbers(self, view: LayerView, runs: int) -> None:
        drawn = self.drawn
        if drawn.other is None:
            html = readout.readout_html(self.number, view, runs, self.model_view, drawn.wanted.settings, self.kl)
        else:
            model_a = self.model_a[1] if self.model_a and self.model_a[0] == drawn.wanted.pin else None
            html = readout.two_html(self.number, view, drawn.other, self.model_view, model_a, drawn.wanted.settings)
        self.numbers.value = html

    def send_words(self) -> None:
        """Sends all words once more. A browser that opened the page while they changed has missed some."""
        for words in (self.title, self.banner, self.numbers, self.status, self.pays, self.next, self.ask_box.reply,
                      *self.captions.values()):  # fmt: skip
            words.send_state("value")

    def _show_empty(self, why: str) -> None:
        for name, title in EMPTY_TITLES.items():
            self.caption(name, title, why if name == "heads" else "", "")
        self.numbers.value = no_tiles_html(0, why)

    def knobs(self) -> dict[str, Knob]:
        """Every slider by the name of its trait."""
        return {knob._control.name: knob for knob in (*self.main.children, *self.layer_controls.knobs.values())}

    def fix(self, values: Mapping) -> None:
        """Sets `values` of the state for good, and greys their sliders. ValueError as of the state."""
        self.state.fix(values)
        for name, knob in self.knobs().items():
            if name in self.state.fixed:
                for part in (knob.slider, knob.number, knob.undo):
                    part.disabled = True

    def hide(self, names: Iterable[str]) -> None:
        """Hides controls for a lesson: traits that have a slider, or the parts named here. ValueError for another."""
        knobs = self.knobs()
        parts = knobs | {
            "model": self.model_choice, "selectors": self.ways, "question": self.ask_box, "presets": self.presets,
            "more": self.more, "run_model": self.run_model, "next": self.next, "curve": self.curve, "pays": self.pays,
            "text": self.source_controls, "link": self.share_controls, "tour": self.guide,
        }  # fmt: skip
        for name in names:
            if name not in parts:
                raise ValueError(f"hide={name!r}: allowed is {', '.join(parts)}")
            parts[name].add_class("pp-hidden")

    def _show_tour(self) -> None:
        self.tour.step = self.state.tour

    def _show_more(self, shown: bool) -> None:
        self.drawer.layout.display = "" if shown else "none"
        self.share_controls.visible = shown
        self._draw_split()

    def _draw_split(self) -> None:
        if self.more.value and self.drawn is not None:
            self.layer_controls.split.value = readout.split_html(self.drawn.view.budget)
