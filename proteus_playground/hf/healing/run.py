"""A run in a folder: steps are logged, the state is saved, and the same call goes on where a run was stopped or killed.

The folder holds what `lm.training.store` writes: `log.jsonl` with one line per step, `state.safetensors` with weights,
gates, optimiser and position.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from time import monotonic

from ...common.files import read_lines
from ...common.progress import Stop, Stopped
from ...lm.training.distributed import total
from ...lm.training.store import LOG, Store
from .training import Step, Training


class Run:
    """A training and the folder that it is kept in."""

    def __init__(self, training: Training, folder: Path, about: dict):
        """about: what must be the same for a run to go on, as JSON can hold it. Goes on from the folder's state if any.

        Raises `ValueError` where the folder holds another run.
        """
        self.training, self.folder = training, folder
        self.store = Store(folder, about)
        saved = self.store.load()
        if saved is not None:
            training.restore(saved.tensors, {"position": saved.position, "scaler": saved.scaler})

    def save(self) -> None:
        """Write log and state; only the first process does."""
        if self.training.accelerator.is_main_process:
            tensors, about = self.training.state()
            self.store.save(tensors, about["position"], about["scaler"])

    def steps(self, *, save_seconds: float = 60.0, stop: Stop | None = None) -> Iterator[Step]:
        """The steps that are left of the stage at work. The state is saved now and then, at the end, and when stopped.

        Held-out text is measured where the plan says so and at the stage's end. Raises `Stopped` between two steps
        when `stop` requests it in any process.
        """
        training, saved_at, whole = self.training, monotonic(), True
        stage, every = training.stage, training.stage.plateau.every
        try:
            while not training.position.over:
                if total([float(stop is not None and stop())], training.accelerator.device)[0]:
                    raise Stopped("stopped on request")
                whole, before = False, training.position.tokens
                step = training.advance()
                if training.position.over or (every and training.position.tokens // every > before // every):
                    measured = training.measure()
                    step = replace(step, held_out=measured.to_dict())
                    if every and not training.position.over:
                        training.note_gap(measured.gap)
                whole = True
                if training.accelerator.is_main_process:
                    self.store.log(step)
                if monotonic() - saved_at >= save_seconds:
                    self.save()
                    saved_at = monotonic()
                yield step
        finally:
            if whole and training.stage is stage:
                self.save()

    def finish_stage(self) -> None:
        """Go on to the next stage, and save that."""
        self.training.finish_stage()
        self.save()

    def log(self) -> list[Step]:
        """All steps so far that are on disk."""
        return read_log(self.folder)


def read_log(folder: Path) -> list[Step]:
    """The steps that the run in a folder has logged."""
    known = {each.name for each in fields(Step)}
    return [Step(**{n: v for n, v in line.items() if n in known}) for line in read_lines(Path(folder) / LOG)]
