"""The workbench: one state, one worker, four linked panels. `playground()` is the one call a notebook needs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from importlib.resources import files

import ipywidgets as w

from proteus_playground.views import GateMap, LayerView, ModelView, RowView, Settings

from . import readout, sentences
from .controls import LayerControls, Presets, ShareControls, SourceControls, main_knobs
from .figure import Pictures
from .state import SETTINGS, PlayState, parse
from .text_panel import TextPanel
from .worker import Worker

PAINT_SECONDS = 0.25  # how long a picture may take to appear before the next one is sent anyway
STALE_SECONDS = 0.12  # a marker that would flash for less is not shown
REPEATS = 4  # extra runs once a slider rests, so that the latency shown is a median
NAMES = {"smollm2": "SmolLM2-135M"}
SOURCE = ("model", "text", "pasted", "length")


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


class Workbench(w.VBox):
    """The widget that `playground` returns. `state` is a `PlayState`; `drawn` the last `Frame` shown, `number` its request."""

    def __init__(self, state: PlayState, make_probe: Callable):
        self.state, self.probe, self.drawn, self.number = state, None, None, 0
        self.model_view: ModelView | None = None
        self.problem = ""
        self._make_probe = make_probe
        self._view: LayerView | None = None  # the worker's last, so that a click re-runs no layer
        self._runs = 0
        self._painted = threading.Event()
        self._seen = False  # whether a browser has ever answered
        self.worker = Worker(pace=self._pace)
        self.pictures = Pictures(self._picked)
        self.text = TextPanel()
        self._build()
        self.text.observe(self._text_painted, "painted")
        self.text.observe(lambda change: self._picked(change["new"][0], None), "clicked")
        state.observe(lambda _: self._settings_changed(), [*SETTINGS, "layer"])
        state.observe(lambda _: self._ask(), ["head", "token"])
        state.observe(lambda _: self._load(), list(SOURCE))
        self._load()

    def _build(self) -> None:
        state = self.state
        style = w.HTML(f"<style>{(files(__package__) / 'style.css').read_text(encoding='utf-8')}</style>")
        style.layout.display = "none"
        self.title, self.banner, self.numbers, self.status = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.captions = {name: w.HTML() for name in ("heads", "gates", "row", "text")}
        self.run_model = w.Button(description="Run the whole model", tooltip="Every layer at these settings, against dense",
                                  layout=w.Layout(width="auto"))  # fmt: skip
        self.cancel = w.Button(
            description="Cancel", tooltip="Stop what is running", layout=w.Layout(width="auto")
        )
        self.more = w.ToggleButton(description="More controls", icon="sliders", layout=w.Layout(width="auto"))
        self.run_model.on_click(lambda _: self._run_whole_model())
        self.cancel.on_click(lambda _: self.stop())
        self.more.observe(lambda change: self._show_more(change["new"]), "value")
        self.layer_controls = LayerControls(state)
        self.source_controls = SourceControls(state, self._pull)
        self.share_controls = ShareControls(state)
        self.drawer = w.GridBox([self.layer_controls, self.source_controls, self.share_controls])
        self.drawer.add_class("pp-drawer")
        for name, caption in self.captions.items():
            caption.add_class(f"pp-at-{name}")
        figure = w.VBox([self.pictures.widget, *(self.captions[name] for name in ("heads", "gates", "row"))])
        figure.add_class("pp-figure")
        text = w.VBox([self.captions["text"], self.text])
        text.add_class("pp-side")
        panels = _row("pp-panels", figure, text)
        knobs = w.VBox(
            [main_knobs(state), _row("pp-actions", Presets(state), self.run_model, self.cancel, self.more)]
        )
        knobs.add_class("pp-top")
        super().__init__([style, _row("pp-head", self.title, self.status), self.banner, knobs, self.drawer, self.numbers,
                          panels])  # fmt: skip
        self.add_class("pp-app")
        self._show_more(False)
        self._show_empty(
            "The model is being loaded and reads the text once. After that only one layer runs at a time."
        )

    # What is wanted

    def wanted(self) -> Wanted:
        """The controls as they are, within what this model and text have."""
        state, probe = self.state, self.probe
        if probe is None:
            return Wanted(state.settings(), state.layer, state.head, state.token)
        return Wanted(state.settings(), min(state.layer, probe.n_layers - 1), min(state.head, probe.n_heads - 1),
                      min(state.token, len(probe.tokens) - 1))  # fmt: skip

    def _settings_changed(self) -> None:
        if self.worker.busy == "model":
            self.worker.cancel("model")  # its answer would be for settings that are gone
        self._ask()

    def _ask(self) -> None:
        """One request for the picture as the controls now are."""
        probe, wanted = self.probe, self.wanted()
        if probe is None or (wanted == self._shown() and not self.problem):
            return
        self._set_status("stale")
        self.worker.cancel("repeat")
        self.worker.submit(
            "frame", lambda stop, _: self._compute(probe, wanted, stop), self._draw, self._failed
        )

    def _mark_stale(self) -> None:
        """Says that the picture is old, unless the new one is there before anybody could read it."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._set_status("stale")
        else:
            loop.call_later(STALE_SECONDS, self._still_stale)

    def _still_stale(self) -> None:
        if self.wanted() != self._shown() and self.worker.busy in (None, "frame"):
            self._set_status("stale")

    def _shown(self) -> Wanted | None:
        return self.drawn.wanted if self.drawn is not None else None

    def _compute(self, probe, wanted: Wanted, stop) -> Frame:
        """On the worker: re-runs only what `wanted` changes."""
        view, settings, layer = self._view, wanted.settings, wanted.layer
        if view is None or (view.layer, view.settings) != (layer, settings):
            view = probe.view(layer, settings, stop=stop)
        group = wanted.head * probe.n_groups // probe.n_heads
        row = probe.row(layer, settings, wanted.token, wanted.head)
        gate_map = probe.gate_map(layer, group, settings.gates)
        if probe is self.probe:
            self._view = view
        return Frame(wanted, view, row, gate_map, group)

    # What is shown

    def _draw(self, number: int, frame: Frame) -> None:
        old, tokens, now = self.drawn, self.probe.tokens, frame.wanted
        changed = {name for name, part in (("view", "view"), ("gates", "gate_map"))
                   if old is None or getattr(old, part) is not getattr(frame, part)}  # fmt: skip
        self._painted.clear()
        self.drawn, self.number, self.problem = frame, number, ""
        self._runs = 1 if "view" in changed else self._runs
        self.text.draw(number, frame.view.salience, frame.view.kept, frame.row.kind,
                       frame.view.gate_of_key[:, frame.group], now.token)  # fmt: skip
        self._draw_words(frame, tokens)
        if self.wanted() == now:
            self._set_status("fresh")
        # Last, because it keeps the browser busy longest: all then appears in one repaint.
        self.pictures.draw(number, frame.view, frame.row, frame.gate_map, frame.group, changed)
        if "view" in changed:
            self._time_again(frame)

    def _draw_words(self, frame: Frame, tokens: list[str]) -> None:
        view, row = frame.view, frame.row
        legend = readout.legend_html(readout.kind_counts(row.kind))
        name = sentences.token_name(tokens, row.token)
        self._draw_numbers()
        self._caption(
            "heads", f"Heads: {view.head_map_kind}", HEAT_LEGEND, sentences.heads_sentence(view, row.head)
        )
        self._caption("gates", f"Prototypes of KV group {frame.group}", GATE_LEGEND,
                      sentences.gates_sentence(row, tokens))
        self._caption(
            "row", f"What {name} sees in head {row.head}", legend, sentences.row_sentence(row, tokens)
        )
        self._caption("text", "The text", TEXT_LEGEND, sentences.text_sentence(view, row, tokens))
        self._draw_title(view)
        if self.more.value:
            self.layer_controls.split.value = readout.split_html(view.budget, frame.wanted.settings.gates)

    def _draw_numbers(self) -> None:
        frame = self.drawn
        self.numbers.value = readout.readout_html(
            self.number, frame.view, self._runs, self.model_view, frame.wanted.settings
        )

    def _draw_title(self, view: LayerView) -> None:
        probe = self.probe
        name = NAMES.get(probe.name, probe.name)
        self.title.value = (
            f'<div class="pp-title"><b>Proteus workbench</b><span>{escape(name)}, layer {view.layer} of '
            f"{probe.n_layers}</span><span>{len(probe.tokens):,} tokens of {escape(self.state.text)}</span>"
            f"<span>on {escape(view.device)}, {escape(view.backend)} backend ({escape(view.backend_reason)})</span></div>"
        )

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
        words = {
            "fresh": "up to date",
            "stale": "computing …",
            "busy": what,
            "error": what,
            "stopped": "stopped",
        }[state]
        bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
        self.status.value = (
            f'<div class="pp-status pp-{state}" role="status"><i></i>{escape(words)}{bar}</div>'
        )
        self.cancel.disabled = state in ("fresh", "error", "stopped")

    # Work that takes longer

    def _load(self) -> None:
        """Another model or text: the old pictures stay, marked stale, until the new ones are there."""
        state = self.state
        source = {name: getattr(state, name) for name in SOURCE}
        self.worker.cancel()
        self._set_status("busy", 0.0, "loading")
        self.worker.submit("load", lambda stop, progress: self._make_probe(source, stop, progress), self._loaded,
                           self._failed, self._progress)  # fmt: skip

    def _loaded(self, _: int, made: tuple) -> None:
        probe, why_random = made
        state = self.state
        self.worker.cancel("frame", "repeat", "model")
        self.probe, self.drawn, self.model_view, self._view = probe, None, None, None
        self.banner.value = _banner(probe, why_random)
        self.run_model.disabled = probe.random
        self.source_controls.pull.layout.display = "" if why_random else "none"
        self.layer_controls.knobs["layer"].limit(probe.n_layers - 1)
        self.layer_controls.knobs["head"].limit(probe.n_heads - 1)
        last = _last_word(probe.tokens)
        self.pictures.reset(probe.tokens, probe.n_heads)
        self.text.tokens = probe.tokens
        state.update({
            "layer": min(state.layer, probe.n_layers - 1), "head": min(state.head, probe.n_heads - 1),
            "token": state.token if 0 < state.token < len(probe.tokens) else last,
        })  # fmt: skip
        self._ask()

    def _run_whole_model(self) -> None:
        probe, settings = self.probe, self.state.settings()
        if probe is None or probe.random:
            return
        self._set_status("busy", 0.0, "whole model")
        self.worker.cancel("repeat")
        self.worker.submit("model", lambda stop, progress: probe.run_model(settings, progress=progress, stop=stop),
                           self._model_done, self._failed, self._progress)  # fmt: skip

    def _model_done(self, _: int, view: ModelView) -> None:
        self.model_view = view
        self._draw_numbers()
        self._set_status("fresh" if self.wanted() == self._shown() else "stale")

    def _time_again(self, frame: Frame) -> None:
        """Once the slider rests: a few more runs of the same layer, for a median that means something."""
        probe, wanted = self.probe, frame.wanted
        rest = threading.Event()

        def again(stop, _):
            for _ in range(40):
                rest.wait(0.02)
                if stop():
                    return None
            view = frame.view
            for _ in range(REPEATS):
                if stop():
                    return None
                view = probe.view(wanted.layer, wanted.settings, stop=stop)
            return view

        def show(_: int, view: LayerView | None) -> None:
            if view is not None and self.drawn is frame:
                self._runs += REPEATS
                self.numbers.value = readout.readout_html(
                    self.number, view, self._runs, self.model_view, wanted.settings
                )

        self.worker.submit("repeat", again, show, lambda number, err: None)

    def _pull(self) -> None:
        from proteus_playground.hf.models import pull

        self._set_status("busy", 0.0, "pulling SmolLM2, 98 MB; this cannot be cancelled")
        self.worker.submit("load", lambda stop, progress: pull("smollm2", progress=False), lambda n, path: self._load(),
                           self._failed, self._progress)  # fmt: skip

    def stop(self) -> None:
        """Cancel: what runs stops at its next check, what waits is forgotten."""
        self.worker.cancel()
        if self.probe is None:
            self._show_empty(
                "Stopped before a model was there. Choose a text under More controls and press Read it."
            )
        self._set_status("fresh" if self.drawn and self.wanted() == self._shown() else "stopped")

    def close(self) -> None:
        self.worker.cancel()
        super().close()

    def _progress(self, _: int, share: float, what: str) -> None:
        self._set_status("busy", share, what)

    def _failed(self, _: int, err: BaseException) -> None:
        self.problem = str(err) or type(err).__name__
        self._set_status("error", what=self.problem)
        if self.probe is None:
            self._show_empty(self.problem)

    # What the user does

    def _picked(self, token: int, head: int | None) -> None:
        if self.probe is not None and 0 <= token < len(self.probe.tokens):
            self.state.update({"token": token} | ({} if head is None else {"head": head}))

    def _show_more(self, shown: bool) -> None:
        self.drawer.layout.display = "" if shown else "none"
        self.share_controls.visible = shown
        if shown and self.drawn is not None:
            self.layer_controls.split.value = readout.split_html(
                self.drawn.view.budget, self.drawn.wanted.settings.gates
            )

    # Pacing: a browser that is slower than the layer is never sent more than it can draw

    def _text_painted(self, change) -> None:
        self._seen = True
        if change["new"] >= self.number:
            self._painted.set()

    def _pace(self) -> None:
        if self._seen and self.worker.busy == "frame":
            self._painted.wait(PAINT_SECONDS)


HEAT_LEGEND = '<span class="pp-cividis">0 <i></i> 1</span><span><i style="background:#d4d8dd"></i>asleep or dropped</span>'
GATE_LEGEND = ('<span>◇ prototype</span><span>◆ opened</span><span><i style="background:#009E73"></i>fetched</span>'
               '<span style="color:#D55E00">★ this token</span>')  # fmt: skip
TEXT_LEGEND = ('<span><i style="background:#f6ee92"></i>salient</span><span><i class="pp-line" style="background:#0072B2">'
               '</i>local</span><span><i class="pp-line" style="background:#E69F00"></i>anchor</span><span><i class="pp-line"'
               ' style="background:#009E73"></i>DNA</span><span><i class="pp-line" style="background:#CC79A7"></i>note</span>'
               )  # fmt: skip


def _last_word(tokens: list[str]) -> int:
    """A row worth looking at first: the last real word, which has the whole text behind it."""
    words = (i for i in range(len(tokens) - 1, -1, -1) if len(tokens[i].strip()) > 3 and tokens[i].strip().isalpha())
    return next(words, len(tokens) - 1)


def _row(name: str, *children: w.Widget) -> w.HBox:
    box = w.HBox(list(children))
    box.add_class(name)
    return box


def _banner(probe, why_random: str) -> str:
    """One line on what is being looked at; loud where it is random."""
    if not probe.random:
        return f'<div class="pp-note">{escape(probe.note)}</div>'
    how = f" {escape(why_random)}" if why_random else ""
    return f'<div class="pp-random"><b>This layer is random.</b> {escape(probe.note)}{how}</div>'


def make_probe(source: Mapping, stop, progress) -> tuple:
    """(a `LayerProbe`, why it is random or ""). The model when it is pulled and its libraries are here."""
    from proteus_playground.probe import LayerProbe
    from proteus_playground.texts import load_text, pasted

    text = pasted(source["pasted"]) if source["pasted"] else load_text(source["text"])
    if source["model"] == "random":
        return LayerProbe.random_layer(text, max_tokens=source["length"]), ""
    why = _why_not(source["model"])
    if why:
        return LayerProbe.random_layer(text, max_tokens=min(source["length"], 512)), why
    return LayerProbe.from_pulled(text, model=source["model"], max_tokens=source["length"], progress=progress,
                                  stop=stop), ""  # fmt: skip


def _why_not(model: str) -> str:
    """Empty where `model` can be loaded; else one sentence on what to do."""
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        return "SmolLM2 needs the hf extra: pip install 'proteus-playground[hf]'."
    from proteus_playground.hf.models import is_pulled

    if not is_pulled(model):
        return "SmolLM2 is not on this machine: run “proteus models pull smollm2” (98 MB), or press Pull under More controls."
    return ""


def playground(
    text: str | None = None,
    model: str | None = None,
    *,
    length: int | None = None,
    state: str | Mapping | None = None,
    probe=None,
    **settings,
) -> Workbench:
    """A workbench to `display(...)`.

    text: "humble token", "python topics" or the path of a UTF-8 file; model: "smollm2" or "random"; length: tokens
    to read, 64 to 4,096; state: a short string such as "alpha=0.35&L=64&layer=12", JSON or a dict, as the workbench's
    own share box gives it; settings: any field of the state by name, such as `flux_alpha=0.5` or `layer=3`.
    What is named as an argument wins over `state`. probe: a ready `LayerProbe` to look at instead.
    Raises ValueError or TypeError naming what is not allowed. The random layer stands in for a model that is not pulled.
    """
    now = PlayState()
    named = {"text": text, "model": model, "length": length}
    now.restore({**parse(state or {}), **{key: v for key, v in named.items() if v is not None}, **settings})
    if probe is not None:
        return Workbench(now, lambda source, stop, progress: (probe, ""))
    return Workbench(now, make_probe)
