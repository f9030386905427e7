"""Was the needle in the buffer? Ours beside the same number of tokens taken at random, by recency and by BM25.

Axes: `T` tokens of a document, `K` tokens kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...common.progress import Stop
from ...streaming.buffer import StreamPlan
from ...streaming.pipeline import Scorer, stream
from .bm25 import STRIDE, WINDOW, WindowIndex
from .cases import Needle, NeedleCase, PlantedStore

OURS, RIVALS = "proteus", ("bm25", "random", "recency")
METHODS = (OURS, *RIVALS)


@dataclass(frozen=True)
class Kept:
    """What one method keeps of a document: the same number of tokens for every method."""

    method: str
    ranked: np.ndarray  # (K,) int64 positions, best first
    in_order: bool  # the buffer's positions are of the document, and each stands behind the one before it

    def best(self, most: int) -> np.ndarray:
        """The `most` best positions, in the document's order."""
        return np.sort(self.ranked[:most])


@dataclass(frozen=True)
class Recall:
    """How much of a case's needles is kept, each a share in [0, 1] of all needles."""

    tokens: float  # mean share of a needle's tokens
    whole: float  # needles of which every token is there
    answer: float  # needles of which every token of the answer is there
    decoys: float | None  # mean share of the distractors' tokens
    each: tuple[float, ...]  # by needle: 1 where the answer is there whole, else 0


def kept_by_us(store: PlantedStore, scorer: Scorer, plan: StreamPlan, stop: Stop | None = None) -> Kept:
    """The buffer that pass 1 leaves. Raises `Stopped` between chunks."""
    for step in stream(store, scorer, plan, stop=stop):
        buffer = step.buffer
    at = buffer.position
    rising = bool((np.diff(at) > 0).all() and (at >= 0).all() and (at < len(store)).all())
    return Kept(OURS, at[buffer.ranking()], rising)


def kept_by_rival(method: str, store: PlantedStore, case: NeedleCase, count: int, index: WindowIndex) -> Kept:
    """`count` tokens, chosen by another method. ValueError for a method that is none."""
    if method == "bm25":
        ranked = index.rank(store, case, case.seed)
    elif method == "random":
        starts = np.arange(0, len(store), WINDOW)
        np.random.default_rng([case.seed, case.length]).shuffle(starts)
        ranked = (starts[:, None] + np.arange(WINDOW)).ravel()
        ranked = ranked[ranked < len(store)]
    elif method == "recency":
        ranked = np.arange(len(store))[::-1]
    else:
        raise ValueError(f"method={method!r}: must be one of {', '.join(RIVALS)}")
    return Kept(method, ranked[:count], True)


def recall(kept: Kept, case: NeedleCase) -> Recall:
    """Scores of one method on one case."""
    inside = np.zeros(case.length, bool)
    inside[kept.ranked] = True

    def share(needles: tuple[Needle, ...]) -> float:
        return float(np.mean([inside[needle.start : needle.stop].mean() for needle in needles]))

    each = tuple(float(inside[slice(*needle.answer)].all()) for needle in case.needles)
    whole = float(np.mean([inside[needle.start : needle.stop].all() for needle in case.needles]))
    return Recall(share(case.needles), whole, float(np.mean(each)), share(case.decoys) if case.decoys else None, each)


def describe_methods() -> str:
    """What the rivals do, for the report."""
    return (
        f"Rivals keep exactly as many tokens: bm25 the best windows of {WINDOW} tokens, one every {STRIDE}, by stems "
        f"shared with the prompt; random takes windows of {WINDOW}; recency takes the last tokens."
    )
