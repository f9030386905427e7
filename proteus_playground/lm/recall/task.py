"""What every recall task shares: the words, the seeded batches, and where things are planted.

What has to be read stands far away, only the answers are scored, and noise fills what a task leaves free. Every task
writes with the same words, so that one model can learn them all.

Axes: `B` sequences, `T` tokens, `n` things planted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from ...common.checks import whole_number
from ..losses import IGNORED
from ..training import Batch


@dataclass(frozen=True)
class Words:
    """The vocabulary: keys come first, then values, noise, and the mark that asks for a copy."""

    keys: int = 256
    values: int = 64
    noise: int = 32

    @property
    def copy(self) -> int:
        return self.keys + self.values + self.noise

    @property
    def size(self) -> int:
        return self.copy + 1


@dataclass(frozen=True)
class Task(ABC):
    """Endless batches of one task; each is a pure function of the fields and of the arguments of `batch`.

    things: how many are planted, see the task. seed and held_out choose the stream: a held-out stream shares no batch
    with a training stream. Raises `TypeError` or `ValueError` naming the field.
    """

    things: int = 16
    seed: int = 0
    held_out: bool = False
    words: Words = Words()

    def __post_init__(self) -> None:
        whole_number("things", self.things, 1, self.words.keys)

    @property
    def vocab_size(self) -> int:
        return self.words.size

    def evaluation(self) -> Task:
        """The same task on batches that training never sees."""
        return replace(self, held_out=True)

    @abstractmethod
    def fewest(self) -> int:
        """The shortest length that holds it, tokens."""

    @abstractmethod
    def _write(self, ids: Tensor, targets: Tensor, gen: torch.Generator) -> None:
        """Plant and ask, in place: ids `(B, T)` full of noise, targets `(B, T)` full of IGNORED."""

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """Batch number `index`. Raises `ValueError` where `length` tokens do not hold `things`."""
        if length < self.fewest():
            raise ValueError(f"length={length}: must be at least {self.fewest()} for {self.things} things")
        gen = dice(self, index, sequences, length)
        low, high = self.words.keys + self.words.values, self.words.copy
        ids = torch.randint(low, high, (sequences, length), generator=gen)
        targets = torch.full_like(ids, IGNORED)
        self._write(ids, targets, gen)
        return Batch(ids, targets, None)

    def right(self, batch: Batch, said: Tensor) -> Tensor:
        """Which predictions `said` (B, T) are right answers, `(B, T)` bool."""
        return said == batch.targets

    def _keys(self, B: int, count: int, gen: torch.Generator) -> Tensor:
        return distinct(B, self.words.keys, count, gen)

    def _values(self, B: int, count: int, gen: torch.Generator) -> Tensor:
        return self.words.keys + torch.randint(self.words.values, (B, count), generator=gen)


def dice(*what: object) -> torch.Generator:
    """A generator seeded by what it is for, the same in every process."""
    return torch.Generator().manual_seed(int.from_bytes(sha256(repr(what).encode()).digest()[:7], "big"))


def distinct(B: int, of: int, count: int, gen: torch.Generator) -> Tensor:
    """`count` different numbers below `of` per row, in random order: `(B, count)`."""
    return torch.rand(B, of, generator=gen).argsort(dim=1)[:, :count]


def places(B: int, start: int, stop: int, count: int, gen: torch.Generator, size: int = 2) -> Tensor:
    """Where `count` pieces of `size` tokens go in [start, stop) without touching each other's: `(B, count)`."""
    return start + size * distinct(B, (stop - start) // size, count, gen)


def plant(ids: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> None:
    """Keys at the places `at` (B, n) of ids, each with its value behind it."""
    ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
