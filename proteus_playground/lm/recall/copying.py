"""Say again what stood there: selective copying, induction, plain repetition.

Axes: `B` sequences, `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import IGNORED
from .task import Task, places


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Selective copying (Gu & Dao 2023, https://arxiv.org/abs/2312.00752): say the keys again, without the noise.

    .  k2  .  .  k9 k4  .  .  .  k1  .  | copy k2 k9 k4 k1
                                           ^   ^  ^  ^
    """

    def fewest(self) -> int:
        return 2 * self.things + 1

    def _write(self, ids: Tensor, targets: Tensor, gen: torch.Generator) -> None:
        B, T = ids.shape
        n = self.things
        border = T - n - 1
        said = self._keys(B, n, gen)
        ids.scatter_(1, places(B, 0, border, n, gen, size=1).sort(dim=1).values, said)
        ids[:, border], ids[:, border + 1 :] = self.words.copy, said
        targets[:, border : T - 1] = said


@dataclass(frozen=True)
class Induction(Task):
    """A run of tokens comes again (Olsson et al. 2022, https://arxiv.org/abs/2209.11895): how did it go on?

    .  .  k2 k9 k4 k1  .  .  .  .  .  .  | k2 k9 k4 k1
                                           ^  ^  ^
    """

    def fewest(self) -> int:
        return 2 * self.things

    def _write(self, ids: Tensor, targets: Tensor, gen: torch.Generator) -> None:
        B, T = ids.shape
        n = self.things
        run = self._keys(B, n, gen)
        start = torch.randint(T - 2 * n + 1, (B, 1), generator=gen)
        ids.scatter_(1, start + torch.arange(n), run)
        ids[:, T - n :] = run
        targets[:, T - n : T - 1] = run[:, 1:]


@dataclass(frozen=True)
class Repeat(Task):
    """Any words, a run of which comes again and again: what recall models are warmed up with. `things` is not used.

    n1 k7 v3 k2 v8 | n1 k7 v3 k2 v8 | n1 k7 v3
                ^    ^  ^  ^  ^  ^    ^  ^
    """

    def fewest(self) -> int:
        return 8

    def _write(self, ids: Tensor, targets: Tensor, gen: torch.Generator) -> None:
        B, T = ids.shape
        words = torch.randint(self.words.copy, (B, T), generator=gen)
        run = torch.randint(T // 8, T // 2 + 1, (B, 1), generator=gen)
        at = torch.arange(T)
        ids.copy_(words.gather(1, at % run))
        targets[:, :-1] = ids[:, 1:].masked_fill(at[1:] < run, IGNORED)
