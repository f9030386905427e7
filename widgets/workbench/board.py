"""How the workbench is laid out, and its words: everything that is neither computed nor a figure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import ipywidgets as w

from proteus_playground.attention.settings import Settings
from proteus_playground.playground.views import GateMap, LayerView, ModelView, RowView

from ..parts import sentences
from ..parts.controls import LayerControls, ModelChoice, Presets, ShareControls, SourceControls, main_knobs
from ..parts.state import PlayState
from . import readout
from .ask_box import AskBox


@dataclass(frozen=True)
class Wanted:
    """What a picture is asked to show."""

    settings: Settings
    layer: int
    head: int
    token: int


@dataclass(frozen=True)
class Frame:
    """A finished picture: what was wanted and what came of it."""

    wanted: Wanted
    view: LayerView
    row: RowView
    gate_map: GateMap
    group: int


class Board(w.VBox):
    """The widgets in their places. `drawn` is the last `Frame` shown and `number` its request."""

    def __init__(
        self,
        state: PlayState,
        pictures: w.DOMWidget,
        text: w.DOMWidget,
        on_pull: Callable[[], None],
        on_show: Callable[[int], None],
    ):
        self.state, self.drawn, self.number = state, None, 0
        self.model_view: ModelView | None = None
        style = w.HTML(
            f"<style>{(files('proteus_playground.widgets.parts') / 'style.css').read_text(encoding='utf-8')}</style>"
        )
        style.layout.display = "none"
        self.title, self.banner, self.numbers, self.status = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.captions = {name: w.HTML() for name in ("heads", "gates", "row", "text")}
        auto = w.Layout(width="auto")
        every = "Every layer at these settings, against dense"
        self.run_model = w.Button(description="Run the whole model", tooltip=every, layout=auto)
        self.cancel = w.Button(description="Cancel", tooltip="Stop what is running", layout=auto)
        self.more = w.ToggleButton(description="More controls", icon="sliders", layout=auto)
        self.more.observe(lambda change: self._show_more(change["new"]), "value")
        self.layer_controls = LayerControls(state)
        self.source_controls = SourceControls(state, on_pull)
        self.ask_box = AskBox(state, on_show)
        self.share_controls = ShareControls(state)
        self.drawer = w.GridBox([self.layer_controls, self.source_controls, self.share_controls])
        self.drawer.add_class("pp-drawer")
        for name, caption in self.captions.items():
            caption.add_class(f"pp-at-{name}")
        figure = w.VBox([pictures, *(self.captions[name] for name in ("heads", "gates", "row"))])
        figure.add_class("pp-figure")
        side = w.VBox([self.captions["text"], text])
        side.add_class("pp-side")
        panels = _row("pp-panels", figure, side)
        knobs = w.VBox([main_knobs(state), _row("pp-actions", Presets(state), self.run_model, self.cancel, self.more)])
        knobs.add_class("pp-top")
        head = _row("pp-head", self.title, self.status)
        self.model_choice = ModelChoice(state)
        banner = _row("pp-banner", self.banner, self.model_choice)
        super().__init__([style, head, banner, knobs, self.ask_box, self.drawer, self.numbers, panels])
        self.add_class("pp-app")
        self._show_more(False)
        self._show_empty("The model is being loaded and reads the text once. After that only one layer runs at a time.")

    def _draw_words(self, frame: Frame, probe, timed: LayerView, runs: int) -> None:
        view, row, tokens = frame.view, frame.row, probe.tokens
        legend = readout.legend_html(readout.kind_counts(row.kind))
        name = sentences.token_name(tokens, row.token)
        self._draw_numbers(timed, runs)
        heads = sentences.heads_sentence(view, row.head)
        self._caption("heads", f"Heads: {view.head_map_kind}", readout.HEAT_LEGEND, heads)
        self._caption(
            "gates", f"Prototypes of KV group {frame.group}", readout.GATE_LEGEND, sentences.gates_sentence(row, tokens)
        )
        self._caption("row", f"What {name} sees in head {row.head}", legend, sentences.row_sentence(row, tokens))
        self._caption("text", "The text", readout.TEXT_LEGEND, sentences.text_sentence(view, row, tokens))
        self.title.value = readout.title_html(probe.name, probe.n_layers, len(tokens), self.state.text, view)
        if self.more.value:
            self.layer_controls.split.value = readout.split_html(view.budget, frame.wanted.settings.gates)

    def _draw_numbers(self, view: LayerView, runs: int) -> None:
        self.numbers.value = readout.readout_html(self.number, view, runs, self.model_view, self.drawn.wanted.settings)

    def _caption(self, panel: str, title: str, legend: str, sentence: str) -> None:
        self.captions[panel].value = readout.caption_html(title, legend, sentence)

    def _show_empty(self, why: str) -> None:
        for panel, title in (
            ("heads", "Heads"),
            ("gates", "Prototypes"),
            ("row", "What a query sees"),
            ("text", "The text"),
        ):
            self._caption(panel, title, "", why if panel == "heads" else "")
        self.numbers.value = f'<div class="pp-readout pp-empty" data-request="0">{escape(why)}</div>'
        if not self.title.value:
            self.title.value = '<div class="pp-title"><b>Proteus workbench</b></div>'

    def _set_status(self, state: str, share: float | None = None, what: str = "") -> None:
        self.status.value = readout.status_html(state, share, what)
        self.cancel.disabled = state in ("fresh", "error", "stopped")

    def _show_more(self, shown: bool) -> None:
        self.drawer.layout.display = "" if shown else "none"
        self.share_controls.visible = shown
        if shown and self.drawn is not None:
            self.layer_controls.split.value = readout.split_html(
                self.drawn.view.budget, self.drawn.wanted.settings.gates
            )


def _row(name: str, *children: w.Widget) -> w.HBox:
    box = w.HBox(list(children))
    box.add_class(name)
    return box
