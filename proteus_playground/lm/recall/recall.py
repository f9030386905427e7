"""Keys with values, planted in noise and asked for: associative recall and needles.

Axes: `B` sequences, `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import IGNORED
from ..training import Batch
from .task import Task, distinct, places, plant


@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall (MQAR; Arora et al. 2023, https://arxiv.org/abs/2312.04927).

    A row of 24 tokens with 3 things and 3 questions; `.` is noise, `^` marks a scored answer, one place early:

        k7 v2  .  .  k1 v9 k4 v4  .  .  .  .  |  .  .  k1 v9  .  .  k7 v2 k4 v4  .  .
                                                       ^            ^     ^

    Pairs are spread over the first half and asked for all over the second, each once before any is asked again.
    at_end: pairs are spread as far as they can be, and the questions are the row's last words (needles).
    """

    questions: int | None = None
    """None asks for each pair once."""
    at_end: bool = False

    def fewest(self) -> int:
        asked = self.questions or self.things
        return 2 * (self.things + asked) if self.at_end else 4 * max(self.things, asked)

    def _write(self, ids: Tensor, targets: Tensor, gen: torch.Generator) -> None:
        B, T = ids.shape
        n, asked = self.things, self.questions or self.things
        keys, values = self._keys(B, n, gen), self._values(B, n, gen)
        half = T // 2 // 2 * 2
        border = T - 2 * asked if self.at_end else half
        plant(ids, places(B, 0, border, n, gen), keys, values)
        rounds = [distinct(B, n, n, gen) for _ in range(-(-asked // n))]
        which = torch.cat(rounds, dim=1)[:, :asked]
        at = places(B, border, T, asked, gen).sort(dim=1).values
        plant(ids, at, keys.gather(1, which), values.gather(1, which))
        targets.scatter_(1, at, values.gather(1, which))


@dataclass(frozen=True)
class ManyValues(Task):
    """One key with several values among other pairs: all its values are asked for, in any order.

        k7 v2  .  k1 v9  .  k7 v4  .  .  k7 v5  .  |  k7 v4 k7 v2 k7 v5
                                                       ^     ^     ^

    `things` pairs are planted; up to `owned` of them are of the one key. Right is any of its values not yet said.
    """

    owned: int = 4

    def fewest(self) -> int:
        return 2 * (self.things + self._owned)

    @property
    def _owned(self) -> int:
        return min(self.owned, self.things)

    def _write(self, ids: Tensor, targets: Tensor, gen: torch.Generator) -> None:
        B, T = ids.shape
        m = self._owned
        keys = self._keys(B, self.things, gen)
        keys[:, :m] = keys[:, :1]
        values = self._values(B, self.things, gen)
        values[:, :m] = self.words.keys + distinct(B, self.words.values, m, gen)
        border = T - 2 * m
        plant(ids, places(B, 0, border, self.things, gen), keys, values)
        at = torch.arange(border, T, 2).expand(B, m)
        plant(ids, at, keys[:, :m], values[:, :m])
        targets.scatter_(1, at, values[:, :m])

    def right(self, batch: Batch, said: Tensor) -> Tensor:
        asked = batch.targets != IGNORED
        answers = batch.targets[asked].view(len(asked), 1, -1)  # (B, 1, m)
        guess = said[asked].view(len(asked), -1, 1)  # (B, m, 1)
        open_still = torch.ones(answers.shape[-1], answers.shape[-1]).triu().bool().to(said.device)
        good = ((guess == answers) & open_still).any(-1)
        return torch.zeros_like(asked).masked_scatter(asked, good)
