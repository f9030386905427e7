"""Tasks that repeat earlier tokens: selective copying, induction, plain repetition.

In the drawings `k` are keys, `v` values, `n` or `.` noise; `^` marks a scored position, whose target is the next token.

Axes: `B` sequences, `T` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses import IGNORED
from .task import Task, positions


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Selective copying (Gu & Dao 2023, https://arxiv.org/abs/2312.00752): repeat the keys without the noise.

    A row of 16 tokens with 4 things:

        .  k1 .  k2 .  .  k3 .  .  k7 .  | copy k1 k2 k3 k7
                                           ^    ^  ^  ^

    Keys are spread over the row in random places; after the mark `copy` they follow in the same order.
    """

    def min_length(self) -> int:
        return 2 * self.things + 1

    def _write(self, ids: Tensor, targets: Tensor, generator: torch.Generator) -> None:
        B, T = ids.shape
        n = self.things
        border = T - n - 1
        keys = self._keys(B, n, generator)
        ids.scatter_(1, positions(B, 0, border, n, generator, size=1).sort(dim=1).values, keys)
        ids[:, border], ids[:, border + 1 :] = self.words.copy, keys
        targets[:, border : T - 1] = keys


@dataclass(frozen=True)
class Induction(Task):
    """Induction (Olsson et al. 2022, https://arxiv.org/abs/2209.11895): a run of tokens returns; continue it.

    A row of 16 tokens with 4 things:

        .  .  k6 k9 k8 k1 .  .  .  .  .  .  | k6 k9 k8 k1
                                              ^  ^  ^

    The run of keys is at a random place in the noise, and once more at the end.
    """

    def min_length(self) -> int:
        return 2 * self.things

    def _write(self, ids: Tensor, targets: Tensor, generator: torch.Generator) -> None:
        B, T = ids.shape
        n = self.things
        run = self._keys(B, n, generator)
        start = torch.randint(T - 2 * n + 1, (B, 1), generator=generator)
        ids.scatter_(1, start + torch.arange(n), run)
        ids[:, T - n :] = run
        targets[:, T - n : T - 1] = run[:, 1:]


@dataclass(frozen=True)
class Repeat(Task):
    """Plain repetition, on which recall models are warmed up: a run of random words is repeated. Ignores `things`.

    A row of 16 tokens whose run is 5 words long:

        k7 n5 k0 k7 k7 | k7 n5 k0 k7 k7 | k7 n5 k0 k7 k7 | k7
                    ^    ^  ^  ^  ^  ^    ^  ^  ^  ^  ^

    The run is between an eighth and a half of the row.
    """

    def min_length(self) -> int:
        return 8

    def _write(self, ids: Tensor, targets: Tensor, generator: torch.Generator) -> None:
        B, T = ids.shape
        words = torch.randint(self.words.copy, (B, T), generator=generator)
        run = torch.randint(T // 8, T // 2 + 1, (B, 1), generator=generator)
        at = torch.arange(T)
        ids.copy_(words.gather(1, at % run))
        targets[:, :-1] = ids[:, 1:].masked_fill(at[1:] < run, IGNORED)
