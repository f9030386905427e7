"""Pass 1 of the chunked shortlist: read a document chunk by chunk, score every token, keep champions.

A token's score depends on its own chunk and the prompt, never on other chunks, so pass 1 is a map over chunks followed
by a top-k reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from ..common.progress import Stop, check_stop
from .buffer import Champions, StreamPlan, choose, merge


class Scorer(Protocol):
    """Measures how well each token of a chunk matches the prompt, or how salient it is."""

    fingerprint: str  # changes with everything that changes a score: weights, prompt, layers

    def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows: `(n,)` token ids or `(n, D)` embeddings of one chunk -> score `(n,)` float32, reason `(n,)` int32."""

    def explain(self, reason: int) -> str:
        """A reason code in words."""


@dataclass(frozen=True)
class Event:
    """One token that entered or left the buffer."""

    kind: str  # "promoted" or "evicted"
    chunk: int  # the chunk that caused it
    token: int  # position in the document
    score: float
    why: str


@dataclass(frozen=True)
class ChunkStep:
    """The state after one chunk."""

    index: int  # of the chunk
    chunks: int  # of the whole document
    start: int  # first token of the chunk
    stop: int  # one past its last token
    tokens: int  # of the whole document
    promoted: Champions  # tokens that entered the buffer
    evicted: Champions  # tokens that left it
    buffer: Champions  # its content now
    seconds: float  # reading, scoring and merging

    def events(self, scorer: Scorer) -> Iterator[Event]:
        """Promotions, then evictions, each with the reason in words."""
        for kind, some in (("promoted", self.promoted), ("evicted", self.evicted)):
            for token, score, champion, reason in zip(
                some.position, some.score, some.champion, some.reason, strict=True
            ):
                why = scorer.explain(int(reason))
                if champion != token:
                    why = f"{abs(champion - token)} from token {champion}: {why}"
                yield Event(kind, self.index, int(token), float(score), why)


def stream(
    store, scorer: Scorer, plan: StreamPlan, *, buffer: Champions | None = None, chunks: range | None = None,
    stop: Stop | None = None,
) -> Iterator[ChunkStep]:  # fmt: skip
    """Read `store` and yield a step per chunk; the last step's `buffer` is the result.

    store: has `len(store)` rows and `store.read(start, stop)`. buffer, chunks: the champions so far and the chunks to
    read, if a run is resumed or shared. Raises `Stopped` between chunks when `stop` asks for it, and `ValueError` for
    scores that cannot be ranked.
    """
    total = -(-len(store) // plan.chunk_tokens)
    kept = Champions.none() if buffer is None else buffer
    for index in range(total) if chunks is None else chunks:
        check_stop(stop)
        begun = perf_counter()
        start, end = index * plan.chunk_tokens, min(len(store), (index + 1) * plan.chunk_tokens)
        score, reason = scorer.score(store.read(start, end))
        if len(score) != end - start:
            raise ValueError(f"scorer gave {len(score)} scores for {end - start} tokens: must be one each")
        fresh = choose(score, reason, start, plan)
        after = merge(kept, fresh, plan.buffer_tokens)
        promoted = fresh.take(np.flatnonzero(np.isin(fresh.position, after.position, assume_unique=True)))
        evicted = kept.take(np.flatnonzero(~np.isin(kept.position, after.position, assume_unique=True)))
        kept = after
        yield ChunkStep(index, total, start, end, len(store), promoted, evicted, kept, perf_counter() - begun)
