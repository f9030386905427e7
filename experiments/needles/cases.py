"""Documents with facts written into them, and the positions of each fact.

A fact replaces as many haystack tokens as it has, after the end of a sentence and within one chunk. All other chunks
keep their content, so the keys that a model computed for them can be used again. A scorer gets only the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .haystacks import Haystack, Words
from .pairs import Pair

REACH = 256  # tokens that a fact may move to replace whole sentences


@dataclass(frozen=True)
class Needle:
    """A fact, or a piece of one, and its position in the document."""

    pair: str  # id of the pair it belongs to
    text: str  # the whole text, also where only a share of its tokens was written
    start: int
    stop: int
    answer: tuple[int, int]  # positions of the answer within the document, as start and stop
    strength: float = 1.0  # share of the fact's tokens that were written


@dataclass(frozen=True)
class NeedleCase:
    """One document and one prompt."""

    task: str
    asked: str  # "paraphrase" or "literal"
    length: int  # tokens
    depth: float | None  # wanted share of the document before the needle; None where there are several places
    seed: int
    prompt: str
    answers: tuple[str, ...]  # accepted answers if the prompt is one question, else empty
    needles: tuple[Needle, ...]
    decoys: tuple[Needle, ...]  # distractors
    written: tuple[tuple[int, np.ndarray], ...]  # (start, ids) of everything that replaced haystack tokens

    @property
    def key(self) -> str:
        """A name that no other case of a run has."""
        ids = "+".join(dict.fromkeys(needle.pair for needle in self.needles))
        return f"{self.task}/{self.asked}/{self.length}/{self.depth}/{self.seed}/{ids}"


@dataclass(frozen=True)
class PlantedStore:
    """A case's document as a store for `stream`: the haystack's first tokens with the facts written into them."""

    tokens: np.ndarray
    case: NeedleCase

    def __len__(self) -> int:
        return self.case.length

    def read(self, start: int, stop: int) -> np.ndarray:
        rows = self.tokens[start : min(stop, len(self))].copy()
        for at, ids in self.case.written:
            low, high = max(at, start), min(at + len(ids), stop)
            if low < high:
                rows[low - start : high - start] = ids[low - at : high - at]
        return rows


class Planter:
    """Finds places for the facts of one document and records them."""

    def __init__(self, haystack: Haystack, length: int, chunk_tokens: int, words: Words):
        if length > len(haystack.tokens):
            raise ValueError(f"length={length!r}: the haystack has {len(haystack.tokens):,} tokens")
        self._tokens, self._length, self._chunk, self._words = haystack.tokens, length, chunk_tokens, words
        self._ends = haystack.ends[haystack.ends < length]
        self.written: list[tuple[int, np.ndarray]] = []

    def fact(self, pair: Pair, text: str, depth: float, strength: float = 1.0, seed: int = 0) -> Needle:
        """Write `text` near `depth`. Below `strength` 1 only that share of its tokens is written, the answer's always;
        the others keep the haystack's tokens."""
        ids = self._words.encode(" " + text)
        low, high = answer_span(ids, text, pair.answers, self._words)
        start = self._place(len(ids), depth)
        if strength < 1:
            ids = self._weaken(ids, start, range(low, high), strength, seed)
        self.written.append((start, ids))
        return Needle(pair.id, text, start, start + len(ids), (start + low, start + high), strength)

    def piece(self, pair: Pair, ids: np.ndarray, text: str, depth: float) -> Needle:
        """Write a part of a fact; all of it counts as the answer."""
        start = self._place(len(ids), depth)
        self.written.append((start, ids))
        return Needle(pair.id, text, start, start + len(ids), (start, start + len(ids)))

    def _place(self, count: int, depth: float) -> int:
        """A sentence end near `depth` with room for `count` tokens in its chunk; whole sentences if possible."""
        if not 0 <= depth <= 1:
            raise ValueError(f"depth={depth!r}: must be in [0, 1]")
        ends = self._ends
        free = (ends + count <= self._length) & (ends // self._chunk == (ends + count - 1) // self._chunk)
        for start, ids in self.written:
            free &= (ends + count <= start) | (ends >= start + len(ids))
        if not free.any():
            raise ValueError(
                f"length={self._length!r}: no sentence end left with room for {count} tokens within a chunk of "
                f"{self._chunk:,}; ask for longer documents or chunks"
            )
        places = ends[free]
        distance = np.abs(places - depth * (self._length - count))
        whole = np.isin(places + count, ends) & (distance <= REACH)
        if whole.any():
            places, distance = places[whole], distance[whole]
        return int(places[distance.argmin()])

    def _weaken(self, ids: np.ndarray, start: int, answer: range, strength: float, seed: int) -> np.ndarray:
        other = np.array([i for i in range(len(ids)) if i not in answer], dtype=int)
        weakened = np.random.default_rng(seed).permutation(other)[: round((1 - strength) * len(ids))]
        ids = ids.copy()
        ids[weakened] = self._tokens[start + weakened]
        return ids


def answer_span(ids: np.ndarray, text: str, answers: tuple[str, ...], words: Words) -> tuple[int, int]:
    """Start and stop within `ids` of the first of `answers` that `text` contains, in upper or lower case.

    Without one, as in a distractor, all of `ids`.
    """
    ends = np.cumsum([len(words.vocabulary[i]) for i in ids.tolist()])
    body = "".join(words.vocabulary[i] for i in ids.tolist()).lower()
    at = next((at for at in (body.find(answer.lower()) for answer in answers) if at >= 0), None)
    if at is None:
        return 0, len(ids)
    size = next(len(answer) for answer in answers if body.find(answer.lower()) == at)
    return int(np.searchsorted(ends, at, "right")), int(np.searchsorted(ends, at + size, "left")) + 1
