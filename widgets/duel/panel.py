"""The duel panel: two models learn the same text side by side; then a slider changes the α of one of them."""

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

from ..parts.boxes import button, column, labelled, row
from ..parts.controls import Knob, tip
from ..parts.html import note_html
from ..parts.painted import Room
from ..parts.panel import Panel
from ..parts.state import BY_NAME
from . import words
from .figure import DuelPictures
from .record import Record

CHOICES = ("small", "t4")
AUTO_TEXT = "Shakespeare (without a network: Python's manual)"
PICTURE_SECONDS = 0.4  # between pictures


class Slider(HasTraits):
    flux_alpha = Float(1.0)


class DuelPanel(Panel):
    """What `duel_panel` returns. `record` holds the results so far of the duel on show."""

    def __init__(
        self, preset: str | None, settings: DuelSettings, run: Callable[..., Iterator[Turn]],
        curve: Callable[..., Iterator[Point]], out: Path | None = None,
    ):  # fmt: skip
        """preset: the button that is marked; run, curve: as `duel` and `held_out_curve`; out: folder of the runs."""
        super().__init__("Duel", words.LEGENDS)
        self.settings, self.record = settings, Record(settings)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._duel, self._curve = run, curve
        self._temporary = (
            TemporaryDirectory(prefix="proteus-duel-", ignore_cleanup_errors=True) if out is None else None
        )
        self._out, self._folder = Path(out or self._temporary.name), None
        self._drawn, self._drawn_at = True, 0.0
        self.state, self.room, self.pictures = Slider(), Room(), DuelPictures()
        self._build_controls(preset)
        knob = Knob(self.state, BY_NAME["flux_alpha"], live=True)
        over = [self.captions["loss"], self.captions["curve"]]
        panels = self.beside([self.room, self.pictures.widget, *over, knob], [self.captions["text"], self.samples])
        controls = column("pp-top", row("pp-actions", *self._controls))
        self.place("pp-duel", self.banner, controls, self.numbers, panels)
        self.state.observe(lambda _: self._draw_curve(), "flux_alpha")
        self._draw()
        self._rest("ready", "press Start")

    def _build_controls(self, preset: str | None) -> None:
        self.samples = w.HTML()
        self.preset = w.ToggleButtons(options=CHOICES, value=preset if preset in CHOICES else None)
        self.preset.add_class("pp-judge")
        self.text = w.Text(value=self.settings.text, layout={"width": "150px"})
        self.minutes = w.BoundedFloatText(value=self.settings.minutes or 60, min=0.1, max=600, step=0.5,
                                          layout={"width": "70px"})  # fmt: skip
        tip(self.preset, "The size of both models and the length of their texts")
        tip(
            self.text,
            "auto: Shakespeare, or Python's manual if there is no network; otherwise the name or the path of a text",
        )
        tip(self.minutes, "Time limit for both models together; if all steps would take longer, fewer are taken")
        self.start = button("Start", "Train both models from the beginning", self.begin, button_style="info")
        self.stop = button("Stop", "Stop after this step; the models are saved", self.halt)
        self.resume = button("Resume", "Go on from the step at which it was stopped", self._go)
        self.preset.observe(lambda change: self._choose_preset(change["new"]), "value")
        self._controls = (
            labelled("preset", self.preset, "52px"), labelled("text", self.text, "38px"),
            labelled("minutes", self.minutes, "64px"), self.start, self.stop, self.resume,
        )  # fmt: skip

    def _choose_preset(self, preset: str | None) -> None:
        if preset is not None:
            self.settings = PRESETS[preset]
            self.minutes.value = self.settings.minutes or 60

    # Training

    def begin(self) -> None:
        """Starts a new duel with the settings of the controls."""
        try:
            self.settings = replace(self.settings, text=self.text.value.strip(), minutes=self.minutes.value)
        except (TypeError, ValueError) as err:
            self._failed(0, err)
            return
        self._folder = self._out / f"duel-{1 + sum(1 for _ in self._out.glob('duel-*'))}"
        self._folder.mkdir(parents=True)
        self._go()

    def _go(self) -> None:
        """Trains from the last step saved in the folder, and then measures the slider's curve."""
        self.worker.cancel()
        record = self.record = Record(self.settings)
        folder, settings, self.problem = self._folder, self.settings, ""
        self._rest("busy", "timing a few steps of each model")
        self._draw()

        def work(stop, progress) -> Record:
            taken, since = 0, time.monotonic()
            for turn in self._duel(settings, folder, device=self.device, stop=stop):
                record.add(turn)
                if turn.known:
                    since = time.monotonic()
                elif turn.arm == "proteus":
                    taken += 1
                if turn.arm == "proteus":
                    self._report(record, progress, words.progress_sentence(record, time.monotonic() - since, taken))
            for point in self._curve(folder, device=self.device, stop=stop):
                record.curve.append(point)
                progress(1.0, "the slider's curve")
            return record

        self.worker.submit("model", work, self._over, self._failed, self._going)

    def _report(self, record: Record, progress, what: str) -> None:
        """On the worker: asks for a picture, if the last one has been painted and was shown for PICTURE_SECONDS.

        A stopped duel in its last step asks for none: it would be dropped, and the resumed duel would wait for it.
        """
        if (
            record is self.record
            and self._drawn
            and self.room.free
            and time.monotonic() - self._drawn_at > PICTURE_SECONDS
        ):
            self._drawn, self._drawn_at = False, time.monotonic()
            progress(record.step / max(1, record.steps), what)

    def _going(self, _: int, share: float, what: str) -> None:
        self.say("busy", share, what)
        self._draw()

    def _over(self, *_) -> None:
        self._draw()
        self._rest("done", "training is over", finished=True)

    def halt(self) -> None:
        """Stop: the running step is finished and saved; Resume goes on from it."""
        self.worker.cancel()
        self._draw()
        self._rest("stopped")

    def _rest(self, state: str, what: str = "", finished: bool = False) -> None:
        """Shows a status, and enables the buttons that can be used in it."""
        self.say(state, what=what)
        busy = state == "busy"
        self.stop.disabled, self.start.disabled = not busy, busy
        self.resume.disabled = busy or finished or self._folder is None

    # What is shown

    def _draw(self) -> None:
        record, self.number = self.record, self.number + 1
        with self.pictures.widget.batch_update():
            self.pictures.draw(self.number, record)
            self.pictures.draw_curve(record, self.state.flux_alpha)
        self.numbers.value = words.numbers_html(self.number, record)
        self.samples.value = words.samples_html(self.number, record.newest())
        self.banner.value = note_html(self._note())
        self.caption("loss", "Loss", words.verdict(record))
        self.caption("text", "What they write", "All continue the same prompt with the same random seed.")
        self._say_curve()
        self.room.ask(self.number)
        self._drawn = True

    def _draw_curve(self) -> None:
        with self.pictures.widget.batch_update():
            self.pictures.draw_curve(self.record, self.state.flux_alpha)
        self._say_curve()

    def _say_curve(self) -> None:
        said = words.slider_sentence(self.record, self.state.flux_alpha)
        self.caption("curve", "Held-out loss along the slider", said)

    def _note(self) -> str:
        """Which models are trained on which text; the text as the duel's own file names it, once there is one."""
        s, text = self.settings, AUTO_TEXT if self.settings.text == "auto" else self.settings.text
        if self._folder is not None and (self._folder / SETTINGS).is_file():
            text = json.loads((self._folder / SETTINGS).read_text("utf-8"))["asked"]["text_from"]
        return (
            f"Two models of {s.layers} layers, width {s.width}, {s.heads} heads, learn {text}, byte by byte, "
            f"in pieces of {s.length:,}, on the {self.device.upper()}. One is dense. The other, Proteus, is "
            f"dense at first and then trains at a random α in every step; at α = 1 its shortlist is {s.shortlist}."
        )

    def _failed(self, _: int, err: BaseException) -> None:
        super()._failed(_, err)
        self._rest("error", self.problem)

    def _end(self) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()
