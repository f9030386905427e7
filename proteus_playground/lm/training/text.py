"""Plain text as batches: tokens from anywhere in it, and windows of the part that training never sees.

Axes: `B` batch, `T` tokens, `N` tokens of the whole text.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...common.checks import whole_number
from .recipe import Batch


class Codec(Protocol):
    """Text to tokens and back."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


class Bytes:
    """UTF-8 bytes as tokens; what is no text shows as a question mark in a box."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


class TextBatches:
    """Endless batches of a tokenised text: every row starts anywhere in it and asks for each next token.

    Row i of a batch of n with number k is text number k n + i of the seed, so that processes which share a step read
    what one would have read. Raises `ValueError` for a text shorter than two tokens.
    """

    def __init__(self, tokens: Tensor, vocab_size: int, seed: int = 0):
        """tokens: `(N,)`, of any integer type."""
        whole_number("seed", seed, 0)
        whole_number("tokens of the text", len(tokens), 2)
        self.tokens, self.vocab_size, self.seed = tokens, vocab_size, seed

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """Raises `ValueError` where the text is not longer than `length`."""
        room = len(self.tokens) - length
        if room < 1:
            raise ValueError(f"length={length}: must be less than the text's {len(self.tokens):,} tokens")
        rows = range(index * sequences, (index + 1) * sequences)
        starts = [int(np.random.Philox(key=self.seed, counter=row).random_raw()) % room for row in rows]
        ids = torch.stack([self.tokens[start : start + length + 1] for start in starts]).long()
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def windows(tokens: Tensor, length: int, most: int) -> Tensor:
    """At most `most` windows evenly spread over `(N,)` tokens, `(B, length + 1)` int64: texts and, one on, targets."""
    room = len(tokens) - length - 1
    if room < 0:
        raise ValueError(f"length={length}: must be less than the {len(tokens):,} tokens held out")
    starts = np.unique(np.linspace(0, room, max(1, min(most, 1 + room // length))).round().astype(int))
    return torch.stack([tokens[start : start + length + 1] for start in starts.tolist()]).long()
