"""The healing panel: a converted folder is trained by its newest plan, and the gap closes on show."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w
import torch

from proteus_playground.hf.healing.session import Session, newest_plan
from proteus_playground.hf.own.folder import read_folder

from ..parts.boxes import button, column, row
from ..parts.html import note_html
from ..parts.painted import Room
from ..parts.panel import Panel
from ..parts.terms import with_terms
from . import words
from .figure import HealingPictures
from .record import Record

MEASURE_SECONDS = 15.0  # of training between two measurements of held-out text
PICTURE_SECONDS = 0.5  # between pictures


class HealingPanel(Panel):
    """What `healing_panel` returns. `record` holds the run so far."""

    def __init__(
        self, folder: str | Path, seconds: float | None, device: torch.device, session: Callable[..., Session] | None
    ):
        """seconds: how long the run may take, None for as long as the plan says; session: instead of `Session`.

        Raises `ValueError` where `proteus convert` did not make the folder, or where it has no plan.
        """
        super().__init__("Healing", {})
        self.folder, self.seconds, self.device, self._open = read_folder(folder), seconds, device, session or Session
        self.run_folder, self.plan = newest_plan(self.folder)
        self.record, self.share, self.left = Record.of(self.run_folder), 0.0, None
        self._drawn, self._drawn_at = True, 0.0
        self.room, self.pictures, self.said = Room(), HealingPictures(), w.HTML()
        self.start = button("Start", "Train by the newest plan of the folder", self.begin, button_style="info")
        self.cancel = button("Stop", "Stop after this step; the state is kept", self.halt, disabled=True)
        controls = column("pp-top", row("pp-actions", self.start, self.cancel))
        self.place("pp-healing", self.banner, controls, self.numbers, w.HTML(words.LEGEND), self.pictures.widget,
                   self.said, self.room)  # fmt: skip
        self._draw()
        self._rest("ready", f"press {self.start.description}")

    def begin(self) -> None:
        """Trains from the last saved step to the end of the plan."""
        self.worker.cancel()
        self.problem = ""
        self._rest("busy", "opening the model")
        self.worker.submit("model", self._work, self._over, self._failed, self._going)

    # On the worker

    def _work(self, stop, progress) -> None:
        session = self._open(self.folder.path, device=str(self.device))
        training = session.training
        if training.stage is not None:
            session.begin(lambda sentence: progress(0.0, sentence), self.seconds, MEASURE_SECONDS)
        self.plan, self.record = training.plan, Record.of(session.run_folder)
        began, at_first = time.monotonic(), training.left
        while training.stage is not None:
            for step in session.run.steps(stop=stop):
                self.record.add(step)
                done = at_first - training.left
                self.left = training.left * (time.monotonic() - began) / done if done else None
                self.share = 1 - training.left / self.plan.tokens
                self._report(progress)
            session.finish_stage()

    def _report(self, progress) -> None:
        """Asks for a picture, if the last one has been painted and was shown for PICTURE_SECONDS."""
        if self._drawn and self.room.free and time.monotonic() - self._drawn_at > PICTURE_SECONDS:
            self._drawn, self._drawn_at = False, time.monotonic()
            progress(self.share, f"stage {self.record.last.stage}")

    # What is shown

    def _going(self, _: int, share: float, what: str) -> None:
        self.say("busy", share, what)
        self._draw()

    def _over(self, *_) -> None:
        self.share, self.left = 1.0, 0.0
        self._draw()
        self._rest("done", "over: the folder opens with what was learned", finished=True)

    def halt(self) -> None:
        """Stop: the running step is finished and saved; Go on continues from it."""
        super().halt()
        self._draw()
        self._rest("stopped")

    def _failed(self, number: int, err: BaseException) -> None:
        super()._failed(number, err)
        self._rest("error", self.problem)

    def _rest(self, state: str, what: str = "", finished: bool = False) -> None:
        """Shows a status, and enables the buttons that can be used in it."""
        self.start.description = "Start" if self.record.last is None else "Go on"
        self.start.disabled = state == "busy" or finished
        self.say(state, what=what)

    def _draw(self) -> None:
        self.number += 1
        self.pictures.draw(self.record, self.plan.tokens, self.number)
        self.numbers.value = words.numbers_html(self.number, self.record, self.share, self.left)
        self.banner.value = note_html(words.note(self.folder, self.plan))
        self.said.value = f'<p class="pp-said">{with_terms(words.verdict(self.record))}</p>'
        self.room.ask(self.number)
        self._drawn = True
