"""The workbench: one state, one worker, four linked pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from proteus_playground.attention.selectors import Way, Without
from proteus_playground.attention.settings import Settings
from proteus_playground.common.progress import Stopped
from proteus_playground.hf.models import find, pull
from proteus_playground.playground.next_token import compare
from proteus_playground.playground.shelf_probe import ShelfProbe
from proteus_playground.playground.views import LayerView, ModelView

from ..parts.state import SETTINGS, Pin, PlayState
from ..parts.text_panel import TextPanel
from ..parts.worker import LANES
from . import readout
from .ask_box import Answers
from .board import Frame, Wanted
from .figure import Pictures
from .keep import keep
from .next_bars import NONE, bars_html, no_bars_html
from .tradeoff import ALPHAS, Curve, measure_all, names
from .two_models import SOURCE, Probes, TwoModels, source_of

PAINT_SECONDS = 0.25  # after which the next picture is sent even if the browser has not painted the last one
REST_SECONDS = 0.8  # without a move, after which the layer is timed again
NEXT_SECONDS = 0.2  # likewise, after which the next token is asked for
REPEATS = 4  # extra runs, so that the latency shown is a median
WAYS = ("selector", "without", "pinned")


class Workbench(TwoModels):
    """What `playground` returns. `state` is a `PlayState`, `drawn` the last `Frame` shown and `number` its request."""

    def __init__(self, state: PlayState, make_probe: Callable, verdict: str = ""):
        self.pictures, self.text = Pictures(self._picked), TextPanel()
        self._painted = threading.Event()
        self._moved = threading.Event()  # set as soon as a slider moves
        self._seen = False  # whether a browser has ever painted a picture
        super().__init__(
            Probes(make_probe), state, self.pictures.widget, self.text, self._pull, self._go_to, verdict,
            self._measure_curve, self.keep,
        )  # fmt: skip
        self.answers: Answers | None = None
        self._view: LayerView | None = None  # the last one computed, so that a click on a token re-runs no layer
        self._timed: LayerView | None = None  # the last run of the layer on show; its latency is the median of `_runs`
        self._runs = 0
        self._other: LayerView | None = None  # the last one computed of what is pinned, by the probe `_a_seen`
        self._a_seen = None
        self._fitted: set[tuple[int, int]] = set()  # (layer, gates) whose prototypes are fitted
        self.run_model.on_click(lambda _: self._run_whole_model())
        self.cancel.on_click(lambda _: self.stop())
        self.text.observe(self._text_painted, "painted")
        self.text.observe(lambda change: self._picked(change["new"][0], None), "clicked")
        state.observe(lambda _: self._settings_changed(), [*SETTINGS, *WAYS, "layer"])
        state.observe(lambda _: self._ask(), ["head", "token"])
        state.observe(lambda _: self._load(), list(SOURCE))
        self._load()
        self._load_pinned()

    @property
    def keys_per_query(self) -> float | None:
        """Keys and notes that one query reads on average, of the picture on show; None before the first one."""
        return None if self.drawn is None else readout.mean_reads(self.drawn.view)

    # What is wanted

    def wanted(self) -> Wanted:
        """What the controls ask for, within the layers, heads and tokens that exist."""
        state, probe = self.state, self.probe
        if probe is None:
            return Wanted(state.settings(), state.layer, state.head, state.token, state.way())
        return Wanted(state.settings(), min(state.layer, probe.n_layers - 1), min(state.head, probe.n_heads - 1),
                      min(state.token, len(probe.tokens) - 1), state.way(), self._pin())  # fmt: skip

    def _settings_changed(self) -> None:
        if self.worker.busy == "model":
            self.worker.cancel("model")  # its result would belong to the old settings
        self.worker.cancel("ask", "next", "loss")  # likewise; they are asked for again after the picture
        self._show_reply()
        self._ask()
        self._measure_loss()

    def _ask(self) -> None:
        """Requests the picture that the controls ask for."""
        probe, wanted = self.probe, self.wanted()
        if probe is None:
            return
        if wanted == self._shown() and not self.problem:
            self._stay()
            return
        self._stop_timing()
        self.say_soon(self._still_stale)
        a = None if wanted.pin is None else self._probe_of(wanted.pin)
        self.worker.submit("frame", lambda stop, _: self._compute(probe, a, wanted, stop), self._draw, self._failed)

    def _stay(self) -> None:
        """The controls are back at the picture on show: drops the picture on its way, and asks the model if need be."""
        if self.worker.cancel("frame") and self.worker.busy != "model":
            self.say("fresh")
        self._ask_next(self.drawn)
        self._ask_model(self.drawn.wanted)
        if self._runs == 1:
            self._stop_timing()
            self._time_again(self.drawn)

    def _stop_timing(self) -> None:
        self._moved.set()
        self.worker.cancel("repeat")

    def _still_stale(self) -> None:
        """Says that the picture is old, unless the new one is there already."""
        wanted = self.wanted()
        if wanted == self._shown() or self.worker.busy not in (None, "frame"):
            return
        if (wanted.layer, wanted.settings.gates) in self._fitted:
            self.say("stale")
        else:
            words = f"fitting {wanted.settings.gates} prototypes per KV group, once for this layer …"
            self.say("busy", what=words)

    def _shown(self) -> Wanted | None:
        return self.drawn.wanted if self.drawn is not None else None

    def _compute(self, probe, a, wanted: Wanted, stop) -> Frame:
        """On the worker: computes what differs from the last picture. a: the probe of what is pinned, or None."""
        settings, layer, way = wanted.settings, wanted.layer, wanted.way
        view = _again(self._view, probe, layer, settings, way, stop)
        group = wanted.head * probe.n_groups // probe.n_heads
        row = probe.row(layer, settings, wanted.token, wanted.head, way)
        gate_map = probe.gate_map(layer, group, settings.gates)
        other = other_row = None
        if wanted.pin is not None:
            pin = wanted.pin
            other = _again(self._other if a is self._a_seen else None, a, layer, pin.settings, pin.way, stop)
            other_row = a.row(layer, pin.settings, wanted.token, wanted.head, pin.way)
        if probe is self.probe:
            self._view, self._other, self._a_seen = view, other, a
        return Frame(wanted, view, row, gate_map, group, other, other_row)

    # What is shown

    def _draw(self, number: int, frame: Frame) -> None:
        old, now = self.drawn, frame.wanted
        changed = {name for name, part in (("view", "view"), ("gates", "gate_map"))
                   if old is None or getattr(old, part) is not getattr(frame, part)}  # fmt: skip
        if old is not None and old.other is not frame.other:
            changed.add("view")
        self._painted.clear()
        self.drawn, self.number, self.problem = frame, number, ""
        if self.kl is not None:
            self.kl = replace(self.kl, old=True)
        self._fitted.add((now.layer, now.settings.gates))
        if "view" in changed:
            self._timed, self._runs = frame.view, 1
        # The figure's message is sent at the end of the batch, after the small ones: one repaint shows all of them.
        with self.pictures.widget.batch_update():
            self.pictures.draw(number, frame.view, frame.row, frame.gate_map, frame.group, changed,
                               frame.other, frame.other_row)  # fmt: skip
            self.text.draw(number, frame.view.salience, frame.view.kept, frame.row.kind,
                           frame.view.gate_of_key[:, frame.group], now.token,
                           None if frame.other_row is None else frame.other_row.kind)  # fmt: skip
            self._draw_words(frame, self.probe, self._timed, self._runs)
            if self.wanted() == now:
                self.say("fresh")
        self._ask_next(frame)
        self._ask_model(now)
        if "view" in changed:
            self._time_again(frame)

    def _ask_next(self, frame: Frame) -> None:
        """Asks what the model expects after the chosen token, once the sliders rest."""
        probe, wanted = self.probe, frame.wanted
        if not probe.predicts:
            return
        settings, way = wanted.settings, wanted.way
        before, names, first = (None, Way()), ("dense", "these settings"), probe
        if wanted.pin is not None:
            before, names, first = wanted.pin[:2], ("A", "B"), self._probe_of(wanted.pin)
        elif way.without != Without():
            before, names = (settings, Way(way.selector)), ("all", "less")
        moved = self._moved = threading.Event()

        def compute(stop, _):
            if moved.wait(NEXT_SECONDS):
                raise Stopped
            asked = ((first, before), (probe, (settings, way)))
            made = [self._expect(one, wanted.token, *at, stop) for one, at in asked]
            return compare(*made, probe.words_of, names)

        def show(_: int, seen) -> None:
            if isinstance(probe, ShelfProbe) and wanted.pin is None and self.drawn is frame:
                self.kl = readout.Far(seen.kl, names[0])
                self._draw_numbers(self._timed, self._runs)
            self.next.value = bars_html(self.number, seen, probe.tokens, wanted.token)

        self.worker.submit("next", compute, show, self._no_next)

    def _no_next(self, _: int, err: BaseException) -> None:
        if not isinstance(err, Stopped):
            self.next.value = no_bars_html(str(err))

    def _ask_model(self, wanted: Wanted) -> None:
        """Asks the question again at the settings of the picture that has just been drawn, and at those of A."""
        probe, settings, pin = self.probe, wanted.settings, self._answering(wanted.pin)
        if not (isinstance(probe, ShelfProbe) and probe.question):
            return
        if self.answers is None or not self.answers.of(settings, pin):
            a = None if pin is None else self._probe_of(pin)

            def ask(stop, _) -> Answers:
                b = self._reply(probe, settings, stop)
                return Answers(b, pin, None if pin is None else self._reply(a, pin.settings, stop))

            self.worker.submit("ask", ask, self._answered, self._failed)

    def _answered(self, _: int, answers: Answers) -> None:
        self.answers = answers
        self._show_reply()

    def _show_reply(self) -> None:
        """All answers: grey while they are those of other settings; with other keys chosen, a sentence says whose."""
        if self.answers is not None:
            pin = self._answering(self._pin())
            plain = self.state.way().plain and (pin is None or pin.way.plain)
            self.ask_box.answered(self.answers, ours=not plain)
            self.ask_box.grey(not self.answers.of(self.state.settings(), pin))

    # Work that takes longer

    def _load(self) -> None:
        """Loads another model or text; the old pictures stay, marked as old, until the new ones are there."""
        state = self.state
        source, settings = source_of(state), state.settings()
        self.worker.cancel(*(lane for lane in LANES if lane != "pinned"))
        self.say("busy", 0.0, "loading")
        self.worker.submit("load", lambda stop, progress: self.probes.open(source, settings, stop, progress),
                           self._loaded, self._failed, self._progress)  # fmt: skip

    def _loaded(self, _: int, made: tuple) -> None:
        probe, why = made
        state = self.state
        self.worker.cancel("frame", "next", "ask", "repeat", "model", "curve", "loss")
        self.probes.keep(source_of(state), self._a_source)
        place = self._place(probe)
        self.probe, self.drawn, self.model_view, self._view, self.answers = probe, None, None, None, None
        self._fitted.clear()
        self._forget()
        self.model_a = self._other = None
        self.kl = readout.Far(None, "dense") if isinstance(probe, ShelfProbe) else None
        self.curve.clear()
        self.pays.value = readout.pays_html(len(probe.tokens))
        self.next.value = no_bars_html("…" if probe.predicts else NONE)
        self.banner.value = readout.banner_html(probe, why)
        self.run_model.disabled = probe.random
        self._offer_pull(state.model if why else "")
        self.layer_controls.knobs["layer"].limit(probe.n_layers - 1)
        self.layer_controls.knobs["head"].limit(probe.n_heads - 1)
        shelf = probe if isinstance(probe, ShelfProbe) else None
        fact = (shelf.fact if shelf else None) or (0, 0)
        self._judge_pinned()
        self.ask_box.offer(shelf)
        self.pictures.reset(probe.tokens, probe.n_heads, fact)
        self.text.marked, self.text.tokens = fact, probe.tokens
        state.update(place)
        self._ask()

    def _place(self, probe) -> dict:
        """Layer, head and token to show first: those of the state, or the row that has to find the answer."""
        state, end = self.state, len(probe.tokens)
        asked = isinstance(probe, ShelfProbe) and probe.question
        layer, head = min(state.layer, probe.n_layers - 1), min(state.head, probe.n_heads - 1)
        if asked and (self.probe is not None or state.token == 0):
            layer, head = probe.start or (layer, head)
            return {"layer": layer, "head": head, "token": end - 1}
        token = state.token if 0 < state.token < end else end - 1 if asked else _last_word(probe.tokens)
        return {"layer": layer, "head": head, "token": token}

    def _run_whole_model(self) -> None:
        probe, settings = self.probe, self.state.settings()
        if probe is None or probe.random:
            return
        self.say("busy", 0.0, "whole model")
        self._stop_timing()
        pin = self._pin()
        a = None if pin is None else self._probe_of(pin)

        def run(stop, progress) -> tuple[ModelView, tuple[Pin, ModelView] | None]:
            view = probe.run_model(settings, progress=progress, stop=stop)
            return view, pin and (pin, a.run_model(pin.settings, progress=progress, stop=stop))

        self.worker.submit("model", run, self._model_done, self._failed, self._progress)

    def _model_done(self, _: int, views: tuple) -> None:
        self.model_view, self.model_a = views
        if self.drawn is not None:
            self._draw_numbers(self._timed, self._runs)
            self._ask_next(self.drawn)
            if self._runs == 1:
                self._time_again(self.drawn)
        self.say("fresh" if self.wanted() == self._shown() else "stale")

    def _time_again(self, frame: Frame) -> None:
        """Runs the layer a few more times once the slider rests, so that the latency shown is a median."""
        probe, wanted, moved = self.probe, frame.wanted, self._moved
        if not wanted.way.plain:
            return
        if moved.is_set():
            moved = self._moved = threading.Event()

        rested = time.monotonic() + REST_SECONDS

        def again(stop, _):
            if moved.wait(rested - time.monotonic()):
                return None
            view = frame.view
            for _ in range(REPEATS):
                if stop():
                    return None
                view = probe.view(wanted.layer, wanted.settings, stop=stop)
            return view

        def show(_: int, view: LayerView | None) -> None:
            if view is not None and self.drawn is frame:
                self._timed, self._runs = view, self._runs + REPEATS
                self._draw_numbers(view, self._runs)

        self.worker.submit("repeat", again, show, lambda number, err: None)

    def _measure_curve(self) -> None:
        """Cost and quality over alpha, of the layer on show."""
        probe, wanted = self.probe, self.wanted()
        if probe is None:
            return
        self.say("busy", 0.0, "cost against quality")
        self.curve.wait()
        self._stop_timing()
        asked = [(self._probe_of(of), of) for of in self._lines()]
        selectors = " and ".join(dict.fromkeys(of.way.selector for _, of in asked))
        name = f"Layer {wanted.layer}, {len(probe.tokens):,} tokens, {selectors}, on this machine"

        def show(_: int, curves: list[Curve]) -> None:
            self.curve.draw(curves, name)
            self._mark_curve()
            self.say("fresh" if self.wanted() == self._shown() else "stale")
            self._measure_loss()

        def failed(number: int, err: BaseException) -> None:
            self.curve.halt()
            self._failed(number, err)

        self.worker.submit("curve", lambda *told: measure_all(wanted.layer, asked, *told), show, failed,
                           self._progress)  # fmt: skip

    def _mark_curve(self) -> bool:
        """Marks the curves as old or not; returns whether they are of what is on show."""
        pin, ours = self._pin(), self.curve.are_of(self.wanted().layer, self._lines())
        self.curve.mark(not ours, None if pin is None else pin.settings.flux_alpha)
        return ours

    def _measure_loss(self) -> None:
        """Runs the whole model at the next alpha of the curves that has no loss yet, after everything else."""
        curves, curve = self.curve.curves, self.curve.unfinished
        if not self._mark_curve() or curve is None:
            return
        probe, alpha, name = self._probe_of(curve.of), curve.due, names(len(curves))[curves.index(curve)]
        settings, what = replace(curve.of.settings, flux_alpha=alpha), f"{name}whole model at flux α {alpha:g}"

        def run(stop, progress) -> ModelView:
            progress(len(curve.nll) / len(ALPHAS), what)
            return probe.run_model(settings, stop=stop)

        def show(_: int, view: ModelView) -> None:
            curve.nll[alpha] = view.nll - view.dense_nll
            self.curve.draw(curves, self.curve.what)
            self.say("fresh" if self.wanted() == self._shown() else "stale")
            self._measure_loss()

        self.worker.submit("loss", run, show, self._failed, self._progress)

    def keep(self, path: str | Path, only: str | None = None) -> Path:
        """Writes what is on show as one page that needs no network. See `keep.keep`."""
        return keep(self, path, only)

    def _pull(self) -> None:
        model = self._missing
        place = find(model)
        self.say("busy", 0.0, f"fetching {place.label}{place.download}; this cannot be cancelled")
        self.worker.submit("load", lambda stop, progress: pull(model, progress=False), lambda n, path: self._pulled(),
                           self._failed, self._progress)  # fmt: skip

    def stop(self) -> None:
        """Cancel: stops the running work at its next check, and drops the work that waits."""
        self.worker.cancel()
        self._stop_pinned()
        self.curve.halt()
        if self.probe is None:
            self._show_empty("Stopped before a model was loaded. Choose a text under More controls and press Read it.")
        self.say("fresh" if self.drawn and self.wanted() == self._shown() else "stopped")

    def _end(self) -> None:
        self._moved.set()
        self._painted.set()

    def _failed(self, _: int, err: BaseException) -> None:
        super()._failed(_, err)
        if self.probe is None:
            self._show_empty(self.problem)

    # What the user does

    def _go_to(self, token: int) -> None:
        """Scrolls the text to a token without choosing it."""
        self.text.look = [token, self.text.look[1] + 1]

    def _picked(self, token: int, head: int | None) -> None:
        if self.probe is not None and 0 <= token < len(self.probe.tokens):
            self.state.update({"token": token} | ({} if head is None else {"head": head}))

    # Pacing: a browser that draws more slowly than the layer runs is not sent more than it can draw

    def _text_painted(self, change) -> None:
        if not self._seen:
            self.send_words()
        self._seen = True
        if change["new"] >= self.number:
            self._painted.set()

    def _pace(self) -> None:
        if self._seen and self.worker.busy == "frame":
            self._painted.wait(PAINT_SECONDS)


def _again(old: LayerView | None, probe, layer: int, settings: Settings, way: Way, stop) -> LayerView:
    """`old` if it shows the same, else a new run of the layer."""
    if old is not None and (old.layer, old.settings, old.way) == (layer, settings, way):
        return old
    return probe.view(layer, settings, way=way, stop=stop)


def _last_word(tokens: list[str]) -> int:
    """The row to show first: the last word of more than three letters, which has the whole text before it."""
    words = (i for i in range(len(tokens) - 1, -1, -1) if len(tokens[i].strip()) > 3 and tokens[i].strip().isalpha())
    return next(words, len(tokens) - 1)
