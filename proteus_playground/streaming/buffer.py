"""The buffer of champions: a limited number of tokens, the best of a whole document, chosen chunk by chunk.

A token's rank is the best score within `neighbours` tokens of it, so that champions are kept with their context and can
be read. Of equal ranks the token nearest to its champion comes first, then the earlier token. That is a total order, so
the buffer is a top-k of the document: in whatever order and on however many machines chunks are read, it is the same.

Axes: `n` tokens of a chunk, `K` tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..common.checks import whole_number


@dataclass(frozen=True)
class StreamPlan:
    """Sizes of a stream, in tokens. `ValueError` or `TypeError` names the field that does not fit."""

    chunk_tokens: int = 65_536
    """Tokens of a chunk, >= 1."""
    buffer_tokens: int = 32_768
    """Largest number of tokens kept of the whole document, neighbours included, >= 1."""
    per_chunk_budget: int = 4_096
    """Largest number of tokens that one chunk may promote, neighbours included, >= 1."""
    nucleus: float = 1.0
    """Champions of a chunk are the best tokens that together hold this share of softmax(scores), in (0, 1]; at 1 only
    the budget limits them."""
    neighbours: int = 0
    """Tokens kept on either side of a champion, within its chunk, >= 0."""

    def __post_init__(self) -> None:
        for name, low in (("chunk_tokens", 1), ("buffer_tokens", 1), ("per_chunk_budget", 1), ("neighbours", 0)):
            whole_number(name, getattr(self, name), low)
        if isinstance(self.nucleus, bool) or not isinstance(self.nucleus, int | float):
            raise TypeError(f"nucleus={self.nucleus!r}: expected a number in (0, 1]")
        if not 0 < self.nucleus <= 1:
            raise ValueError(f"nucleus={self.nucleus!r}: must be in (0, 1]")


@dataclass(frozen=True)
class Champions:
    """Kept tokens in order of position."""

    position: np.ndarray  # (K,) int64, position of the token in the document
    score: np.ndarray  # (K,) float32, its rank: the best score within `neighbours` tokens
    champion: np.ndarray  # (K,) int64, position of the token that has this score, often the token itself
    reason: np.ndarray  # (K,) int32, the scorer's code for the reason of the champion's score

    def __len__(self) -> int:
        return len(self.position)

    def take(self, index: np.ndarray) -> Champions:
        """The tokens at `index`, in that order."""
        return Champions(self.position[index], self.score[index], self.champion[index], self.reason[index])

    def best(self, most: int) -> Champions:
        """The `most` highest ranked, in order of position."""
        if len(self) <= most:
            return self
        cut = np.partition(self.score, len(self) - most)[len(self) - most]
        stay = self.score > cut
        tied = np.flatnonzero(self.score == cut)  # only these need the tie-breaking order
        stay[tied[self.take(tied).ranking()[: most - int(stay.sum())]]] = True
        return self.take(np.flatnonzero(stay))

    def ranking(self) -> np.ndarray:
        """Indices from the highest ranked down."""
        return np.lexsort((self.position, np.abs(self.position - self.champion), -self.score))

    @staticmethod
    def none() -> Champions:
        whole = np.zeros(0, np.int64)
        return Champions(whole, np.zeros(0, np.float32), whole, np.zeros(0, np.int32))


def choose(score: np.ndarray, reason: np.ndarray, start: int, plan: StreamPlan) -> Champions:
    """The best tokens of the chunk that begins at token `start`: at most `plan.per_chunk_budget`.

    score: `(n,)` float32, higher is better, -inf for tokens that may not be kept; reason: `(n,)` int32. Raises
    `ValueError` for a score of NaN or +inf, which cannot be ranked, and for another number of reasons than scores.
    """
    if score.ndim != 1 or reason.shape != score.shape:
        raise ValueError(f"score has shape {score.shape}, reason {reason.shape}: must be (n,) both")
    with np.errstate(over="ignore"):  # a score too large for float32 becomes inf, which is refused below
        score = score.astype(np.float32, copy=False)
    bad = ~(score < np.inf)
    if bad.any():
        at = int(bad.argmax())
        raise ValueError(f"score of token {start + at} is {score[at]}: must be a number or -inf; are its rows finite?")
    lead = _nucleus(score, plan.nucleus, plan.per_chunk_budget)
    reach = min(plan.neighbours, len(score) - 1)
    best, owner = lead.copy(), np.arange(len(score))
    for step in range(1, reach + 1):  # nearest first, earlier side first, so an equal score never replaces one
        for shift in (-step, step):
            here = slice(step, None) if shift < 0 else slice(None, -step)
            there = slice(None, -step) if shift < 0 else slice(step, None)
            better = lead[there] > best[here]
            best[here] = np.where(better, lead[there], best[here])
            owner[here] = np.where(better, np.arange(len(score))[there], owner[here])
    kept = np.flatnonzero(best > -np.inf)
    found = Champions(kept + np.int64(start), best[kept], owner[kept] + np.int64(start), reason[owner[kept]])
    return found.best(plan.per_chunk_budget)


def merge(kept: Champions, fresh: Champions, most: int) -> Champions:
    """The `most` best of two disjoint sets, in order of position."""
    both = Champions(*(np.concatenate((getattr(kept, f), getattr(fresh, f))) for f in kept.__dataclass_fields__))
    return both.take(np.argsort(both.position)).best(most)


def _nucleus(score: np.ndarray, mass: float, most: int) -> np.ndarray:
    """`score`, with -inf outside the smallest set of tokens that holds `mass` of softmax(score).

    Tokens below the `most` best may become -inf too. They cannot be chosen, and sorting them would take longer than
    scoring them.
    """
    top = score.max(initial=-np.inf)
    if mass >= 1 or top == -np.inf:
        return score
    share = np.exp(score.astype(np.float64) - top)
    able = np.arange(len(score))
    if len(score) > most:
        able = np.flatnonzero(score >= np.partition(score, len(score) - most)[len(score) - most])
    order = able[np.argsort(-score[able], kind="stable")]
    before = np.cumsum(share[order]) - share[order]
    out = np.full_like(score, -np.inf)
    chosen = order[before < mass * share.sum()]
    out[chosen] = score[chosen]
    return out
