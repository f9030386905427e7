"""A healing run so far, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import numpy as np

from proteus_playground.hf.healing.run import read_log
from proteus_playground.hf.healing.session import BEFORE
from proteus_playground.hf.healing.training import Step
from proteus_playground.hf.own.stanza import read_config

CALM = 0.9  # the share of a smoothed loss that the next step keeps
MOST = 400  # points of a line: more would not be visible


@dataclass(frozen=True)
class Curve:
    """The gap on held-out text by reads. Each tuple goes from few reads to many.

    The gap is to the untouched model: if training made the dense pass worse, that would not count as a smaller gap.
    """

    read: int  # tokens of the run before it was measured
    shares: tuple[int, ...]  # the numbers that the length was divided by for L
    reads: tuple[float, ...]  # keys and notes that a query read
    gaps: tuple[float, ...]  # nats per token: the trained model with few keys, less the untouched one with all
    dense: float  # nats per token of the trained model's own dense pass
    base: float  # of the untouched model

    @property
    def gap(self) -> float:
        return fmean(self.gaps)


def curve_of(measured: dict, read: int) -> Curve:
    """A curve from what `Measured.to_dict` gives, or a JSON file that holds it."""
    base, shares = measured["base"], sorted((int(share) for share in measured["sparse"]), reverse=True)
    reads, sparse = ({int(share): value for share, value in measured[name].items()} for name in ("reads", "sparse"))
    return Curve(read, tuple(shares), tuple(reads[s] for s in shares), tuple(sparse[s] - base for s in shares),
                 measured["dense"], base)  # fmt: skip


@dataclass
class Record:
    """Every step and every curve of a run. before: measured before the first step, None until it is."""

    before: Curve | None = None
    curves: list[Curve] = field(default_factory=list)
    last: Step | None = None
    read: list[int] = field(default_factory=list)  # tokens after each step that has a loss
    loss: list[float] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)  # smoothed within a stage
    _stage: str = ""
    _sums: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, run_folder: Path) -> Record:
        """What a run's folder holds."""
        made = cls()
        if (run_folder / BEFORE).is_file():
            made.before = curve_of(read_config(run_folder / BEFORE), 0)
        for step in read_log(run_folder):
            made.add(step)
        return made

    def add(self, step: Step) -> None:
        """Adds a step. Stages without a loss, which only move prototypes, add no point to the lines."""
        self.last = step
        if step.held_out:
            self.curves.append(curve_of(step.held_out, step.read))
        if not step.loss:
            return
        total, weight = self._sums if step.stage == self._stage else (0.0, 0.0)
        self._stage, self._sums = step.stage, (CALM * total + (1 - CALM) * step.loss, CALM * weight + 1 - CALM)
        self.read.append(step.read)
        self.loss.append(step.loss)
        self.calm.append(self._sums[0] / self._sums[1])

    def line(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and the values `name`, two float32 arrays of at most MOST points."""
        values = list(getattr(self, name))
        at = np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST)).round().astype(int)) if values else []
        return np.asarray(self.read[: len(values)], np.float32)[at], np.asarray(values, np.float32)[at]
