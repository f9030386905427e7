"""Random vectors for whole words, for a table scorer without a language model.

Equal words have equal vectors in any case, so a word matches itself. The vectors of other words are unrelated.
"""

from __future__ import annotations

import numpy as np

from ..common.texts import WORD, word_hash

WIDTH = 512


class RandomWords:
    """Numbers words in order of first use. `vocabulary[i]` is word i with the space before it, `table[i]` its row."""

    name, random = "random vectors", True
    note = "Nothing is learned: a word matches only itself, in any case."

    def __init__(self) -> None:
        self.vocabulary: list[str] = []
        self._number: dict[str, int] = {}
        self._rows = np.zeros((0, WIDTH), np.float32)

    def encode(self, body: str) -> np.ndarray:
        """Word numbers `(n,)` int32."""
        words = WORD.findall(body)
        for word in words:
            if word not in self._number:
                self._number[word] = len(self.vocabulary)
                self.vocabulary.append(word)
        return np.array([self._number[word] for word in words], np.int32)

    @property
    def table(self) -> np.ndarray:
        """`(V, 512)` float32, a row per word encoded so far."""
        new_words = self.vocabulary[len(self._rows) :]
        if new_words:
            seeds = map(word_hash, new_words)
            new_rows = [np.random.default_rng(seed).standard_normal(WIDTH, np.float32) for seed in seeds]
            self._rows = np.concatenate([self._rows, new_rows])
        return self._rows
