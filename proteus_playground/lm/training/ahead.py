"""The batches of one stage in the order of its steps, written ahead by processes of their own where asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from .recipe import Batch, Batches, Stage


@dataclass(frozen=True)
class Texts(Dataset):
    """What one process reads at each step of a stage: a pure function of the step."""

    batches: Batches
    stage: Stage
    seed: int
    rank: int
    ranks: int

    def __getitem__(self, step: int) -> Batch:
        length, _ = self.stage.draw(self.seed, step)
        return self.batches.batch(step * self.ranks + self.rank, self.stage.tokens // length, length)

    def loader(self, steps: range, workers: int) -> Iterator[Batch]:
        """The batches of these steps. workers: processes that write them ahead; 0 for none."""
        alone = torch.Generator()  # else it would draw from the numbers that users have seeded
        return iter(DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, generator=alone))
