"""Pass 1 replayed from known scores, forwards and backwards, for a panel.

A token enters the buffer at most once, when its chunk is read, and leaves it at most once. So two numbers per champion
describe the buffer after every chunk, and no buffer has to be stored per step.

Axes: `T` tokens of the document, `N` tokens that were ever in the buffer, `S` chunks read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from ..common.progress import Progress, Stop, check_stop, tell
from .buffer import Champions, StreamPlan
from .pipeline import Scorer, stream

PAGE = 512  # tokens
NEVER = np.iinfo(np.int32).max


def page_of(position: int) -> int:
    """The page of a token; pages count from 1."""
    return int(position) // PAGE + 1


@dataclass(frozen=True)
class Document:
    """Token ids with a needle among them: a fact that a prompt asks for."""

    ids: np.ndarray  # (T,) int32
    needle: range  # positions of the fact; empty if there is none

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def plant(body: np.ndarray, ends: np.ndarray, needle: np.ndarray, page: int, lead: int = 0) -> Document:
    """`body` with `needle` inserted between two sentences of page `page`, cut at the end to its old length.

    body: `(T,)` ids; ends: `(E,)` rising positions at which a sentence has just ended. lead: number of tokens at the
    front of `needle` that only separate it from the text. Raises `ValueError` if there is no such page or the needle
    does not fit.
    """
    room, last = len(body) - len(needle), page_of(max(0, len(body) - 1))
    if room < 0:
        raise ValueError(f"needle has {len(needle)} tokens: must fit in the document's {len(body):,}")
    if not 1 <= page <= last:
        raise ValueError(f"page={page}: must be in [1, {last}], the pages of {len(body):,} tokens")
    first = min((page - 1) * PAGE, room)
    after = ends[np.searchsorted(ends, first) :]
    at = int(after[0]) if len(after) and after[0] < min(first + PAGE - len(needle), room) else first
    return Document(
        np.concatenate([body[:at], needle, body[at:room]]).astype(np.int32), range(at + lead, at + len(needle))
    )


@dataclass
class Scores:
    """The scores of the tokens before `until`. One thread fills them while others read the part before `until`."""

    score: np.ndarray  # (T,) float32
    reason: np.ndarray  # (T,) int32
    explain: Callable[[int], str]
    until: int = 0  # tokens scored so far
    seconds: float = 0.0  # spent on scoring them

    @property
    def done(self) -> bool:
        return self.until == len(self.score)


def empty_scores(tokens: int, explain: Callable[[int], str] = str) -> Scores:
    """The scores of a document before any token is scored. explain: the scorer's, if there is one."""
    return Scores(np.full(tokens, -np.inf, np.float32), np.zeros(tokens, np.int32), explain)


def fill(
    scores: Scores, document: Document, scorer: Scorer, piece: int, *, progress: Progress | None = None,
    stop: Stop | None = None,
) -> None:  # fmt: skip
    """Score the remaining tokens, `piece` tokens at a time. Raises `Stopped`; the pieces scored before that stay."""
    total = len(document)
    while not scores.done:
        check_stop(stop)
        begun, end = perf_counter(), min(scores.until + piece, total)
        score, reason = scorer.score(document.read(scores.until, end))
        check_stop(stop)  # a piece that ends after a stop is dropped, because no progress would be reported for it
        scores.score[scores.until : end], scores.reason[scores.until : end] = score, reason
        scores.until, scores.seconds = end, scores.seconds + perf_counter() - begun
        tell(progress, end / total, f"{end:,} of {total:,} tokens scored")


class _KnownScores:
    """Known scores in the roles of a store, whose rows are positions, and of a scorer, which looks them up."""

    def __init__(self, scores: Scores):
        self._scores = scores

    def __len__(self) -> int:
        return len(self._scores.score)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._scores.score[rows], self._scores.reason[rows]


@dataclass(frozen=True)
class Replay:
    """A complete pass 1. Step `s` in 0..S is the state after `s` chunks."""

    plan: StreamPlan
    tokens: int  # of the whole document
    chunks: int  # of the whole document
    steps: int  # chunks whose scores are known
    ever: Champions  # (N,) all tokens that were in the buffer at some time, in order of position
    entered_at: np.ndarray  # (N,) int32, the step that promoted the token
    evicted_at: np.ndarray  # (N,) int32, the step that evicted it, NEVER if none
    bar: np.ndarray  # (S + 1,) float32, lowest score in a full buffer, -inf while it is not full
    held: np.ndarray  # (S + 1,) int32, tokens in the buffer
    recall: np.ndarray  # (S + 1,) float32, share of the needle's tokens in the buffer, nan without a needle

    def read(self, step: int) -> int:
        """Tokens read after `step` chunks."""
        return min(self.tokens, step * self.plan.chunk_tokens)

    def buffer(self, step: int) -> Champions:
        return self.ever.take(np.flatnonzero((self.entered_at <= step) & (step < self.evicted_at)))

    def promoted(self, step: int) -> Champions:
        return self.ever.take(np.flatnonzero(self.entered_at == step)) if step else Champions.none()

    def evicted(self, step: int) -> Champions:
        return self.ever.take(np.flatnonzero(self.evicted_at == step)) if step else Champions.none()


def replay(scores: Scores, plan: StreamPlan, needle: range = range(0), stop: Stop | None = None) -> Replay:
    """Run pass 1 with `plan` over the scores that are known. Raises `Stopped`."""
    known, size = _KnownScores(scores), len(scores.score)
    chunks = -(-size // plan.chunk_tokens)
    ready = chunks if scores.done else scores.until // plan.chunk_tokens  # a chunk counts once it is fully scored
    entered_at, evicted_at = np.full(size, NEVER, np.int32), np.full(size, NEVER, np.int32)
    rank, champion = np.empty(size, np.float32), np.empty(size, np.int64)
    bar, held, recall = [-np.inf], [0], [0.0 if len(needle) else np.nan]
    for step in stream(known, known, plan, chunks=range(ready), stop=stop):
        now, fresh = step.index + 1, step.promoted
        entered_at[fresh.position], evicted_at[step.evicted.position] = now, now
        rank[fresh.position], champion[fresh.position] = fresh.score, fresh.champion
        kept = step.buffer
        bar.append(float(kept.score.min()) if len(kept) == plan.buffer_tokens else -np.inf)
        held.append(len(kept))
        found = np.searchsorted(kept.position, [needle.start, needle.stop])
        recall.append(float(found[1] - found[0]) / len(needle) if len(needle) else np.nan)
    at = np.flatnonzero(entered_at < NEVER)
    ever = Champions(at, rank[at], champion[at], scores.reason[champion[at]])
    return Replay(
        plan=plan, tokens=size, chunks=chunks, steps=ready, ever=ever, entered_at=entered_at[at],
        evicted_at=evicted_at[at], bar=np.array(bar, np.float32), held=np.array(held, np.int32),
        recall=np.array(recall, np.float32),
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of the buffer: a stretch of text."""

    start: int
    stop: int
    score: float  # the best among them
    champion: int  # position of the token with that score
    reason: int
    fresh: bool  # whether any of its tokens is new


def runs(kept: Champions, fresh_from: int) -> list[Run]:
    """The buffer as stretches of text, best first; tokens from position `fresh_from` on count as new."""
    if not len(kept):
        return []
    cut = np.flatnonzero(np.diff(kept.position) > 1) + 1
    firsts, ends = np.r_[0, cut], np.r_[cut, len(kept)]
    out = []
    for a, b in zip(firsts.tolist(), ends.tolist(), strict=True):
        best = a + int(kept.score[a:b].argmax())
        start, stop = int(kept.position[a]), int(kept.position[b - 1]) + 1
        owner, reason = int(kept.champion[best]), int(kept.reason[best])
        out.append(Run(start, stop, float(kept.score[best]), owner, reason, fresh=stop > fresh_from))
    return sorted(out, key=lambda run: (-run.score, run.start))
