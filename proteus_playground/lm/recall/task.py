"""The base of all recall tasks: vocabulary, seeded batches, and the placing of keys and values.

A task plants what has to be remembered far from where it is needed, scores the answers only, and fills the other places
with noise. All tasks use the same vocabulary, so that one model can learn them together.

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
    """The vocabulary, in order of token ids: keys, values, noise, and one mark that asks for a copy.

    The numbers count the tokens of a kind.
    """

    keys: int = 256
    values: int = 64
    noise: int = 32

    @property
    def copy(self) -> int:
        """The token id of the mark that asks for a copy."""
        return self.keys + self.values + self.noise

    @property
    def size(self) -> int:
        return self.copy + 1


@dataclass(frozen=True)
class Task(ABC):
    """Endless batches of one task; each is a pure function of the fields and of the arguments of `batch`.

    things: number of pairs, or of tokens to repeat, that are planted in a row. seed, held_out: choose the stream of
    batches; a held-out stream shares no batch with a training stream. Raises `TypeError` or `ValueError` naming the
    field. Names of classes and fields are part of each batch's seed, so renaming one changes every text.
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
        """The same task with batches that are never used in training."""
        return replace(self, held_out=True)

    @abstractmethod
    def min_length(self) -> int:
        """The shortest possible row, in tokens."""

    @abstractmethod
    def _write(self, ids: Tensor, targets: Tensor, generator: torch.Generator) -> None:
        """Write the task into ids `(B, T)`, filled with noise, and targets `(B, T)`, filled with IGNORED."""

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """Batch number `index`. Raises `ValueError` if `things` do not fit into `length` tokens."""
        if length < self.min_length():
            raise ValueError(f"length={length}: must be at least {self.min_length()} for {self.things} things")
        generator = seeded_generator(self, index, sequences, length)
        low, high = self.words.keys + self.words.values, self.words.copy
        ids = torch.randint(low, high, (sequences, length), generator=generator)
        targets = torch.full_like(ids, IGNORED)
        self._write(ids, targets, generator)
        return Batch(ids, targets, None)

    def correct(self, batch: Batch, predicted: Tensor) -> Tensor:
        """Whether each predicted token `(B, T)` is a correct answer, `(B, T)` bool."""
        return predicted == batch.targets

    def _keys(self, B: int, count: int, generator: torch.Generator) -> Tensor:
        return distinct(B, self.words.keys, count, generator)

    def _values(self, B: int, count: int, generator: torch.Generator) -> Tensor:
        return self.words.keys + torch.randint(self.words.values, (B, count), generator=generator)


def seeded_generator(*parts: object) -> torch.Generator:
    """A random generator that is seeded by the repr of `parts`, the same in every process."""
    return torch.Generator().manual_seed(int.from_bytes(sha256(repr(parts).encode()).digest()[:7], "big"))


def distinct(B: int, limit: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` different numbers below `limit` for each row, in random order: `(B, count)`."""
    return torch.rand(B, limit, generator=generator).argsort(dim=1)[:, :count]


def positions(B: int, start: int, stop: int, count: int, generator: torch.Generator, size: int = 2) -> Tensor:
    """Random positions in [start, stop) for `count` groups of `size` tokens that do not overlap: `(B, count)`."""
    return start + size * distinct(B, (stop - start) // size, count, generator)


def plant(ids: Tensor, at: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write keys at the positions `at` `(B, n)` of ids, each followed by its value."""
    ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
