"""Training text: batches cut from a tokenised text, and the batches of a stage in the order of its steps.

Axes: `B` batch, `T` tokens, `N` tokens of the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...common.checks import whole_number
from .recipe import Batch, Batches, Stage


class Codec(Protocol):
    """Text to tokens and back."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class Bytes:
    """UTF-8 bytes as tokens. Bytes that are not valid UTF-8 are decoded to U+FFFD, the replacement character."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class TextBatches:
    """Endless batches of a tokenised text: each row starts at a random place, and every next token is a target.

    Row i of batch k with n rows is text number k n + i of the seed. So processes that share a step read the same texts
    as one process would. Raises `ValueError` for a text shorter than two tokens.
    """

    def __init__(self, tokens: Tensor, vocab_size: int, seed: int = 0):
        """tokens: `(N,)`, of any integer type."""
        whole_number("seed", seed, 0)
        whole_number("tokens of the text", len(tokens), 2)
        self.tokens, self.vocab_size, self.seed = tokens, vocab_size, seed

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """Raises `ValueError` if the text is not longer than `length`."""
        n_starts = len(self.tokens) - length
        if n_starts < 1:
            raise ValueError(f"length={length}: must be less than the text's {len(self.tokens):,} tokens")
        rows = range(index * sequences, (index + 1) * sequences)
        draws = [int(np.random.Philox(key=self.seed, counter=row).random_raw()) for row in rows]
        starts = [draw % n_starts for draw in draws]
        ids = torch.stack([self.tokens[start : start + length + 1] for start in starts]).long()
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def windows(tokens: Tensor, length: int, most: int) -> Tensor:
    """At most `most` windows spread evenly over `(N,)` tokens: `(B, length + 1)` int64.

    Columns 0 to length - 1 are a text, columns 1 to length its targets.
    """
    last_start = len(tokens) - length - 1
    if last_start < 0:
        raise ValueError(f"length={length}: must be less than the {len(tokens):,} tokens held out")
    count = max(1, min(most, 1 + last_start // length))
    starts = np.unique(np.linspace(0, last_start, count)).round().astype(int)
    return torch.stack([tokens[start : start + length + 1] for start in starts.tolist()]).long()


@dataclass(frozen=True)
class StageBatches(Dataset):
    """The batch that one process reads at each step of a stage: a pure function of the step."""

    batches: Batches
    stage: Stage
    seed: int
    rank: int
    ranks: int

    def __getitem__(self, step: int) -> Batch:
        length, _ = self.stage.draw(self.seed, step)
        return self.batches.batch(step * self.ranks + self.rank, self.stage.tokens // length, length)

    def loader(self, steps: range, workers: int) -> Iterator[Batch]:
        """The batches of these steps. workers: processes that prepare batches in advance; 0 for none."""
        own = torch.Generator()  # without it, the loader would draw from torch's global generator, which users seed
        return iter(DataLoader(self, batch_size=None, sampler=steps, num_workers=workers, generator=own))
