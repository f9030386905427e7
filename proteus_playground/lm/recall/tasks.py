"""The recall tasks by name, and batches that mix several tasks or train one after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..training import Batch
from .copying import Induction, SelectiveCopy
from .recall import ManyValues, Recall
from .task import Task, seeded_generator


@dataclass(frozen=True)
class WarmedUp:
    """Batches of `first` for `steps` steps, then of `then`: models that have learned to copy learn recall sooner."""

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
    """Rows of several tasks in one batch; the task of each row is drawn by `weights` (None: equal).

    A task that does not fit into a batch's length gets no rows in it.
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
        """Batch number `index`, with rows in the order of `tasks`. Raises `ValueError` if no task fits."""
        fits = torch.tensor([task.min_length() <= length for task in self.tasks])
        if not fits.any():
            raise ValueError(f"length={length}: must be at least {min(task.min_length() for task in self.tasks)}")
        generator = seeded_generator("mixture", self.seed, index, sequences, length)
        share = torch.tensor(self.weights or (1.0,) * len(self.tasks)) * fits
        drawn = torch.multinomial(share, sequences, replacement=True, generator=generator)
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
"""Functions that make a task, by name; each takes `things` and any other field of `Task`."""
