"""Was the needle in the buffer? Our buffer beside as many tokens chosen at random, by recency and by BM25.

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
    """The tokens of a document that one method keeps; their number is the same for all methods."""

    method: str
    ranked: np.ndarray  # (K,) int64 positions, best first
    in_order: bool  # positions are valid and strictly increasing

    def best(self, most: int) -> np.ndarray:
        """The `most` best positions, in the document's order."""
        return np.sort(self.ranked[:most])


@dataclass(frozen=True)
class Recall:
    """How much of a case's needles is kept, as shares in [0, 1]."""

    tokens: float  # mean share of each needle's tokens
    whole: float  # share of needles whose tokens are all kept
    answer: float  # share of needles whose answer is kept with every token
    decoys: float | None  # mean share of each distractor's tokens
    each: tuple[float, ...]  # for each needle 1 if its answer is kept with every token, else 0


def kept_by_us(store: PlantedStore, scorer: Scorer, plan: StreamPlan, stop: Stop | None = None) -> Kept:
    """The buffer after pass 1. Raises `Stopped` between chunks."""
    for step in stream(store, scorer, plan, stop=stop):
        buffer = step.buffer
    at = buffer.position
    rising = bool((np.diff(at) > 0).all() and (at >= 0).all() and (at < len(store)).all())
    return Kept(OURS, at[buffer.ranking()], rising)


def kept_by_rival(method: str, store: PlantedStore, case: NeedleCase, count: int, index: WindowIndex) -> Kept:
    """`count` tokens chosen by another method. ValueError for an unknown method."""
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
    """The shares of a case's needles and distractors that are kept."""
    inside = np.zeros(case.length, bool)
    inside[kept.ranked] = True

    def share(needles: tuple[Needle, ...]) -> float:
        return float(np.mean([inside[needle.start : needle.stop].mean() for needle in needles]))

    each = tuple(float(inside[slice(*needle.answer)].all()) for needle in case.needles)
    whole = float(np.mean([inside[needle.start : needle.stop].all() for needle in case.needles]))
    return Recall(share(case.needles), whole, float(np.mean(each)), share(case.decoys) if case.decoys else None, each)


def describe_methods() -> str:
    """A sentence about the rivals for the report."""
    return (
        f"Rivals keep exactly as many tokens: bm25 the best windows of {WINDOW} tokens, one every {STRIDE}, by stems "
        f"shared with the prompt; random keeps random windows of {WINDOW}; recency keeps the last tokens."
    )
