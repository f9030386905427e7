"""Keys with values, planted in noise and asked for later: associative recall and needles.

Axes: `B` sequences, `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import IGNORED
from ..training import Batch
from .task import Task, distinct, plant, positions


@dataclass(frozen=True)
class Recall(Task):
    """Multi-query associative recall (MQAR; Arora et al. 2023, https://arxiv.org/abs/2312.04927).

    A row of 24 tokens with 3 things and 3 questions; `.` is noise, `^` marks a scored position, whose target is the
    next token:

        k8 v8 .  .  .  .  k9 v9 .  .  k7 v0 | k8 v8 .  .  .  .  .  .  k9 v9 k7 v0
                                              ^                       ^     ^

    Pairs are spread over the first half and asked for in the second half, each pair once before any is asked again.
    With `at_end` (needles) the questions are the row's last tokens and pairs are spread over all tokens before them.
    Here with 4 things and 1 question:

        k8 v5 .  .  k9 v3 .  .  k5 v6 .  .  .  .  k1 v8 .  .  | k8 v5
                                                                ^
    """

    questions: int | None = None
    """Pairs asked for; None asks for each pair once."""
    at_end: bool = False
    """Whether all questions are at the end of the row."""

    def min_length(self) -> int:
        n_questions = self.questions or self.things
        return 2 * (self.things + n_questions) if self.at_end else 4 * max(self.things, n_questions)

    def _write(self, ids: Tensor, targets: Tensor, generator: torch.Generator) -> None:
        B, T = ids.shape
        n, n_questions = self.things, self.questions or self.things
        keys, values = self._keys(B, n, generator), self._values(B, n, generator)
        half = T // 2 // 2 * 2
        border = T - 2 * n_questions if self.at_end else half
        plant(ids, positions(B, 0, border, n, generator), keys, values)
        rounds = [distinct(B, n, n, generator) for _ in range(-(-n_questions // n))]
        which = torch.cat(rounds, dim=1)[:, :n_questions]
        at = positions(B, border, T, n_questions, generator).sort(dim=1).values
        plant(ids, at, keys.gather(1, which), values.gather(1, which))
        targets.scatter_(1, at, values.gather(1, which))


@dataclass(frozen=True)
class ManyValues(Task):
    """One key with several values among other pairs: all its values are asked for, in any order.

    A row of 20 tokens with 5 things, 3 of them of the key k2:

        k4 v2 k2 v4 .  .  k3 v5 .  .  k2 v8 k2 v0 | k2 v8 k2 v0 k2 v4
                                                    ^     ^     ^

    `things` pairs are planted; up to `owned` of them belong to one key. An answer is correct if it is any value of the
    key that the row has not given yet.
    """

    owned: int = 4
    """Values of the key that is asked for, at most `things`."""

    def min_length(self) -> int:
        return 2 * (self.things + self._owned)

    @property
    def _owned(self) -> int:
        return min(self.owned, self.things)

    def _write(self, ids: Tensor, targets: Tensor, generator: torch.Generator) -> None:
        B, T = ids.shape
        m = self._owned
        keys = self._keys(B, self.things, generator)
        keys[:, :m] = keys[:, :1]
        values = self._values(B, self.things, generator)
        values[:, :m] = self.words.keys + distinct(B, self.words.values, m, generator)
        border = T - 2 * m
        plant(ids, positions(B, 0, border, self.things, generator), keys, values)
        at = torch.arange(border, T, 2).expand(B, m)
        plant(ids, at, keys[:, :m], values[:, :m])
        targets.scatter_(1, at, values[:, :m])

    def correct(self, batch: Batch, predicted: Tensor) -> Tensor:
        scored = batch.targets != IGNORED
        answers = batch.targets[scored].view(len(scored), 1, -1)  # (B, 1, m)
        guess = predicted[scored].view(len(scored), -1, 1)  # (B, m, 1)
        not_given = torch.ones(answers.shape[-1], answers.shape[-1]).triu().bool().to(predicted.device)
        correct = ((guess == answers) & not_given).any(-1)
        return torch.zeros_like(scored).masked_scatter(scored, correct)
