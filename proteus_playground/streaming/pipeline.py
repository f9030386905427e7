"""Pass 1 of the chunked shortlist: read a document chunk by chunk, score every token, keep champions.

A scorer is anything with `fingerprint: str`, `score(rows) -> (score (n,) float32, reason (n,) int32)` and
`explain(reason: int) -> str`. A token's score depends on its own chunk and the prompt, never on other chunks, so pass 1
is a map with a top-k reduce.
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
    """Tells how well each token of a chunk answers the prompt, or how salient it is."""

    fingerprint: str  # changes with anything that changes a score: weights, prompt, layers

    def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows: `(n,)` token ids or `(n, D)` embeddings of one chunk -> score `(n,)` float32, reason `(n,)` int32."""

    def explain(self, reason: int) -> str:
        """One phrase for a reason code."""


@dataclass(frozen=True)
class Event:
    """One token entering or leaving the buffer."""

    kind: str  # "promoted" or "evicted"
    chunk: int  # the chunk that caused it
    token: int  # position in the document
    score: float
    why: str


@dataclass(frozen=True)
class ChunkStep:
    """One chunk has been read."""

    index: int  # of the chunk
    chunks: int  # of the whole document
    start: int  # first token of the chunk
    stop: int  # one past its last token
    tokens: int  # of the whole document
    promoted: Champions  # who entered
    evicted: Champions  # who had to leave
    buffer: Champions  # who is in now
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
    store,
    scorer: Scorer,
    plan: StreamPlan,
    *,
    buffer: Champions | None = None,
    chunks: range | None = None,
    stop: Stop | None = None,
) -> Iterator[ChunkStep]:
    """Read `store` and yield a step per chunk; the last step's `buffer` is the result.

    store: `len(store)` rows and `store.read(start, stop)`. buffer, chunks: what is kept already and the chunks that
    are left, where a run goes on or is shared. Raises `Stopped` when `stop` asks for it between chunks.
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
