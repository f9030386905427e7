"""Scores tokens by a table with one row per vocabulary entry, so that scoring a document is a lookup.

A token's score is the largest, over the words of the prompt, of (rarity of that word in the document) x (cosine of the
two rows). Rarity is log(tokens / (1 + occurrences)), so "the" and "is" in a prompt hardly count. The tokens around a
token do not change its score.

Axes: `T` tokens of the document, `V` vocabulary entries, `D` width of a row, `n` words of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class WordTable(Protocol):
    """A tokenizer with a row for each of its tokens; `encode` may add tokens and rows."""

    vocabulary: list[str]  # V, the text of each token
    table: np.ndarray  # (V, D) float32

    def encode(self, body: str) -> np.ndarray:
        """Token ids `(n,)` int32."""


class TableScorer:
    """A `Scorer` of token ids. Its `words` are the prompt's words that count, in the order of their reason codes.

    document: token ids `(T,)`, from which the rarity of words is counted. Raises `ValueError` if the prompt has no word
    (a token with a letter or a digit).
    """

    def __init__(self, words: WordTable, document: np.ndarray, prompt: str):
        ids = words.encode(prompt)
        table, vocabulary = words.table, words.vocabulary
        prompt_ids = [int(i) for i in dict.fromkeys(ids.tolist()) if any(map(str.isalnum, vocabulary[i]))]
        if not prompt_ids:
            raise ValueError("prompt has no word: must have at least one token with a letter or a digit")
        self.words = [vocabulary[i].strip() for i in prompt_ids]
        count = np.bincount(document, minlength=len(vocabulary))
        used = np.flatnonzero(count)
        match = _unit(table[used]) @ _unit(table[prompt_ids]).T * _rarity(vocabulary, count, self.words)  # (used, n)
        self._score = np.full(len(vocabulary), -np.inf, np.float32)
        self._reason = np.zeros(len(vocabulary), np.int32)
        self._score[used], self._reason[used] = match.max(1), match.argmax(1)
        digest = hashlib.sha256(self._score.tobytes() + self._reason.tobytes() + "\n".join(self.words).encode())
        self.fingerprint = f"table-{digest.hexdigest()[:32]}"

    def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows: `(n,)` token ids -> score `(n,)` float32, reason `(n,)` int32."""
        return self._score[rows], self._reason[rows]

    def explain(self, reason: int) -> str:
        return f"matches “{self.words[reason]}” of the prompt"


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _rarity(vocabulary: Sequence[str], count: np.ndarray, words: list[str]) -> np.ndarray:
    """`(n,)` float32: log(tokens / (1 + occurrences)) of each word, in any case, with or without a space before it."""
    occurrences = {word.lower(): 0 for word in words}
    for i in np.flatnonzero(count):
        word = vocabulary[i].strip().lower()
        if word in occurrences:
            occurrences[word] += int(count[i])
    seen = np.array([occurrences[word.lower()] for word in words])
    return np.log(np.maximum(count.sum(), 1) / (1 + seen)).clip(0.05).astype(np.float32)
