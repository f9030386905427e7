"""The tasks by name, several of them in one batch, and one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..training import Batch
from .copying import Induction, SelectiveCopy
from .recall import ManyValues, Recall
from .task import Task, dice


@dataclass(frozen=True)
class WarmedUp:
    """Batches of `first` for so many steps, then of `then`: copying is learned first, and recall grows out of it."""

    first: Task
    steps: int
    then: Task | Mixture

    @property
    def vocab_size(self) -> int:
        return self.first.vocab_size

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """Batch number `index` of the whole run."""
        return (self.first if index < self.steps else self.then).batch(index, sequences, length)


@dataclass(frozen=True)
class Mixture:
    """Rows of several tasks in one batch, each row's task drawn by `weights` (equal where left out).

    A task that does not fit a batch's length sits it out.
    """

    tasks: tuple[Task, ...]
    weights: tuple[float, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tasks or len({task.words for task in self.tasks}) > 1:
            raise ValueError(f"tasks={self.tasks!r}: must be at least one, all with the same words")
        if self.weights is not None and (len(self.weights) != len(self.tasks) or min(self.weights) <= 0):
            raise ValueError(f"weights={self.weights!r}: must be {len(self.tasks)} numbers > 0, one per task")

    @property
    def vocab_size(self) -> int:
        return self.tasks[0].vocab_size

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """Batch number `index`; rows stand in the order of `tasks`. Raises `ValueError` where no task fits."""
        fits = torch.tensor([task.fewest() <= length for task in self.tasks])
        if not fits.any():
            raise ValueError(f"length={length}: must be at least {min(task.fewest() for task in self.tasks)}")
        gen = dice("mixture", self.seed, index, sequences, length)
        share = torch.tensor(self.weights or (1.0,) * len(self.tasks)) * fits
        drawn = torch.multinomial(share, sequences, replacement=True, generator=gen)
        count = torch.bincount(drawn, minlength=len(self.tasks)).tolist()
        parts = [task.batch(index, some, length) for task, some in zip(self.tasks, count, strict=True) if some]
        return Batch(torch.cat([part.ids for part in parts]), torch.cat([part.targets for part in parts]), None)


TASKS = {
    "mqar": Recall,
    "copying": SelectiveCopy,
    "induction": Induction,
    "multi-key": lambda things, **other: Recall(things, questions=1, at_end=True, **other),
    "multi-query": lambda things, **other: Recall(things, questions=min(4, things), at_end=True, **other),
    "multi-value": ManyValues,
}
"""Makers by name, each called with `things` and any other field of `Task`."""
