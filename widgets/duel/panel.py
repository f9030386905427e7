"""The duel panel: two models learn the same text side by side, and then one of them gets a slider."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import ipywidgets as w
import torch
from proteus_playground.experiments.duel.curve import Point
from proteus_playground.experiments.duel.duel import PRESETS, DuelSettings, Turn
from proteus_playground.experiments.duel.files import SETTINGS
from traitlets import Float, HasTraits

from ..parts.controls import Knob, _labelled, tip
from ..parts.painted import Room
from ..parts.state import BY_NAME
from ..parts.worker import Worker
from ..stream.board import AUTO, styles
from ..workbench.board import _row
from ..workbench.readout import caption_html, status_html
from . import words as words
from .figure import DuelPictures
from .record import Record

CHOICES = ("small", "t4")
AUTO_TEXT = "Shakespeare (or Python's manual where there is no network)"
LOOK_SECONDS = 0.4  # between pictures


class Slider(HasTraits):
    flux_alpha = Float(1.0)


class DuelPanel(w.VBox):
    """What `duel_panel` returns. `record` is what is known of the duel on show."""

    def __init__(
        self,
        preset: str | None,
        settings: DuelSettings,
        run: Callable[..., Iterator[Turn]],
        curve: Callable[..., Iterator[Point]],
        out: Path | None = None,
    ):
        """preset: the one that is marked; run, curve: as `duel` and `held_out_curve`; out: where runs are kept."""
        self.settings, self.record = settings, Record(settings)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.number, self.problem = 0, ""
        self._duel, self._curve = run, curve
        self._temporary = (
            TemporaryDirectory(prefix="proteus-duel-", ignore_cleanup_errors=True) if out is None else None
        )
        self._out, self._folder = Path(out or self._temporary.name), None
        self._drawn, self._looked = True, 0.0
        self.slider, self.worker, self.room, self.pictures = Slider(), Worker(), Room(), DuelPictures()
        self._build_controls(preset)
        head = _row("pp-head", self.title, self.status)
        top = w.VBox([_row("pp-actions", *self._controls)])
        top.add_class("pp-top")
        for name, caption in self.captions.items():
            caption.add_class(f"pp-at-{name}")
        knob = Knob(self.slider, BY_NAME["flux_alpha"], live=True)
        placed = [self.captions["loss"], self.captions["curve"]]
        picture = w.VBox([self.room, self.pictures.widget, *placed, knob])
        side = w.VBox([self.captions["text"], self.samples])
        picture.add_class("pp-figure")
        side.add_class("pp-side")
        super().__init__([styles(), head, self.banner, top, self.numbers, _row("pp-panels", picture, side)])
        self.add_class("pp-app")
        self.add_class("pp-duel")
        self.slider.observe(lambda _: self._draw_curve(), "flux_alpha")
        self._draw()
        self._rest("ready", "press Start")

    def _build_controls(self, preset: str | None) -> None:
        self.title = w.HTML('<div class="pp-title"><b>Duel</b></div>')
        self.banner, self.numbers, self.status, self.samples = (w.HTML() for _ in range(4))
        self.captions = {name: w.HTML() for name in ("loss", "curve", "text")}
        self.preset = w.ToggleButtons(options=CHOICES, value=preset if preset in CHOICES else None)
        self.preset.add_class("pp-judge")
        self.text = w.Text(value=self.settings.text, layout=w.Layout(width="150px"))
        self.minutes = w.BoundedFloatText(value=self.settings.minutes or 60, min=0.1, max=600, step=0.5,
                                          layout=w.Layout(width="70px"))  # fmt: skip
        tip(self.preset, "How large both models are, and how long their texts")
        tip(self.text, "auto: Shakespeare, or Python's manual where there is no network; or a text's name or path")
        tip(self.minutes, "For both together: fewer steps are taken where all of them would take longer")
        self.start = w.Button(description="Start", button_style="info", layout=AUTO, tooltip="Both from the beginning")
        self.stop = w.Button(description="Stop", layout=AUTO, tooltip="After this step; what is learned is saved")
        self.resume = w.Button(description="Resume", layout=AUTO, tooltip="Go on where it was stopped")
        self.preset.observe(lambda change: self._take(PRESETS[change["new"]]) if change["new"] else None, "value")
        self.start.on_click(lambda _: self.begin())
        self.stop.on_click(lambda _: self.halt())
        self.resume.on_click(lambda _: self._go())
        self._controls = (
            _labelled("preset", self.preset, "52px"), _labelled("text", self.text, "38px"),
            _labelled("minutes", self.minutes, "64px"), self.start, self.stop, self.resume,
        )  # fmt: skip

    def _take(self, settings: DuelSettings) -> None:
        self.settings = settings
        self.minutes.value = settings.minutes or 60

    # Training

    def begin(self) -> None:
        """A new duel, with what the controls say."""
        try:
            self.settings = replace(self.settings, text=self.text.value.strip(), minutes=self.minutes.value)
        except (TypeError, ValueError) as err:
            self._failed(0, err)
            return
        self._folder = self._out / f"duel-{1 + sum(1 for _ in self._out.glob('duel-*'))}"
        self._folder.mkdir(parents=True)
        self._go()

    def _go(self) -> None:
        """Trains in the folder from wherever it is, and then measures the slider's curve."""
        self.worker.cancel()
        record = self.record = Record(self.settings)
        folder, settings, self.problem = self._folder, self.settings, ""
        self._rest("busy", "timing a few steps of each")
        self._draw()

        def work(stop, progress) -> Record:
            taken, since = 0, time.monotonic()
            for turn in self._duel(settings, folder, device=self.device, stop=stop):
                record.add(turn)
                if turn.known:
                    since = time.monotonic()
                else:
                    taken += turn.arm == "proteus"
                if turn.arm == "proteus":
                    self._show(record, progress, words.progress_sentence(record, time.monotonic() - since, taken))
            for point in self._curve(folder, device=self.device, stop=stop):
                record.curve.append(point)
                progress(1.0, "the slider's curve")
            return record

        self.worker.submit("model", work, self._over, self._failed, self._going)

    def _show(self, record: Record, progress, what: str) -> None:
        """From the worker: a picture, if the last one is on the screen and has been looked at.

        Not of a stopped duel in its last step: its picture would be dropped, and the resumed one would wait for it.
        """
        if record is self.record and self._drawn and self.room.free and time.monotonic() - self._looked > LOOK_SECONDS:
            self._drawn, self._looked = False, time.monotonic()
            progress(record.step / max(1, record.steps), what)

    def _going(self, _: int, share: float, what: str) -> None:
        self.status.value = status_html("busy", share, what)
        self._draw()

    def _over(self, *_) -> None:
        self._draw()
        self._rest("done", "training is over", finished=True)

    def halt(self) -> None:
        """Stop: the step that is running is finished and saved; Resume goes on from it."""
        self.worker.cancel()
        self._draw()
        self._rest("stopped")

    def _rest(self, state: str, what: str = "", finished: bool = False) -> None:
        """Which buttons make sense now."""
        self.status.value = status_html(state, None, what)
        busy = state == "busy"
        self.stop.disabled, self.start.disabled = not busy, busy
        self.resume.disabled = busy or finished or self._folder is None

    # What is shown

    def _draw(self) -> None:
        record, self.number = self.record, self.number + 1
        with self.pictures.widget.batch_update():
            self.pictures.draw(self.number, record)
            self.pictures.draw_curve(record, self.slider.flux_alpha)
        self.numbers.value = words.numbers_html(self.number, record)
        self.samples.value = words.samples_html(self.number, record.newest())
        self.banner.value = f'<div class="pp-note">{words.escape(self._note())}</div>'
        self.captions["loss"].value = caption_html("Loss", words.LOSS_LEGEND, words.verdict(record))
        self.captions["text"].value = caption_html(
            "What they write", "", "The same beginning and the same dice for all."
        )
        self._say_curve()
        self.room.ask(self.number)
        self._drawn = True

    def _draw_curve(self) -> None:
        with self.pictures.widget.batch_update():
            self.pictures.draw_curve(self.record, self.slider.flux_alpha)
        self._say_curve()

    def _say_curve(self) -> None:
        said = words.slider_sentence(self.record, self.slider.flux_alpha)
        self.captions["curve"].value = caption_html("Held-out loss along the slider", words.CURVE_LEGEND, said)

    def _note(self) -> str:
        """What is trained on what; from the duel's own file once there is one."""
        s, text = self.settings, AUTO_TEXT if self.settings.text == "auto" else self.settings.text
        if self._folder is not None and (self._folder / SETTINGS).is_file():
            text = json.loads((self._folder / SETTINGS).read_text("utf-8"))["asked"]["text_from"]
        return (
            f"Two models of {s.layers} layers, width {s.width}, {s.heads} heads, learn {text}, byte by byte, "
            f"{s.length:,} at a time, on the {self.device.upper()}. One is dense; Proteus, after a dense start, "
            f"trains at an α drawn for every step, with a shortlist of {s.shortlist} at α = 1."
        )

    def close(self) -> None:
        self.worker.cancel()
        super().close()

    def _failed(self, _: int, err: BaseException) -> None:
        self.problem = str(err) or type(err).__name__
        self._rest("error", self.problem)
