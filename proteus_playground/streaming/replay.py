"""Pass 1 again, from scores that are known: what a panel plays forwards and backwards.

A token enters the buffer at most once, when its chunk is read, and leaves at most once. So two numbers per champion
hold the state after every chunk, and no step keeps a buffer of its own.

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
    """The page, from 1, that a token stands on."""
    return int(position) // PAGE + 1


@dataclass(frozen=True)
class Document:
    """Token ids with, somewhere among them, a fact to be found."""

    ids: np.ndarray  # (T,) int32
    needle: range  # positions of the fact; empty where there is none

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def plant(body: np.ndarray, ends: np.ndarray, needle: np.ndarray, page: int, lead: int = 0) -> Document:
    """`body` with `needle` written over nothing, between two sentences of page `page`, its own length unchanged.

    body: `(T,)` ids, of which the last give way; ends: `(E,)` rising, places before which a sentence ends. lead: tokens
    in front of the needle that only set it apart. `ValueError` for a page there is not or a needle that does not fit.
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
    """Every token's score, as far as it is known. Filled by one thread while others look at what `until` covers."""

    score: np.ndarray  # (T,) float32
    reason: np.ndarray  # (T,) int32
    explain: Callable[[int], str]
    until: int = 0  # tokens scored so far
    seconds: float = 0.0  # spent on scoring them

    @property
    def done(self) -> bool:
        return self.until == len(self.score)


def empty_scores(tokens: int, explain: Callable[[int], str] = str) -> Scores:
    """Of a document of which nothing is scored yet. explain: the scorer's, where there is one."""
    return Scores(np.full(tokens, -np.inf, np.float32), np.zeros(tokens, np.int32), explain)


def fill(
    scores: Scores, document: Document, scorer: Scorer, piece: int, *, progress: Progress | None = None,
    stop: Stop | None = None,
) -> None:  # fmt: skip
    """Scores what is left, `piece` tokens at a time. Raises `Stopped`; what is scored by then stays."""
    total = len(document)
    while not scores.done:
        check_stop(stop)
        begun, end = perf_counter(), min(scores.until + piece, total)
        score, reason = scorer.score(document.read(scores.until, end))
        check_stop(stop)  # a piece that was finished after the stop was asked for is not known: nobody would be told
        scores.score[scores.until : end], scores.reason[scores.until : end] = score, reason
        scores.until, scores.seconds = end, scores.seconds + perf_counter() - begun
        tell(progress, end / total, f"{end:,} of {total:,} tokens scored")


class _Known:
    """Scores as a store of positions and as the scorer that looks them up."""

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
    """A whole pass 1. A step `s` in 0..S is the state after `s` chunks."""

    plan: StreamPlan
    tokens: int  # of the whole document
    chunks: int  # of the whole document
    steps: int  # chunks whose scores are known
    ever: Champions  # (N,) whoever was in the buffer at some time, in order of position
    entered: np.ndarray  # (N,) int32, the step that let the token in
    left: np.ndarray  # (N,) int32, the step that put it out, NEVER if none
    bar: np.ndarray  # (S + 1,) float32, lowest score in a full buffer, -inf while there is room
    held: np.ndarray  # (S + 1,) int32, tokens in the buffer
    recall: np.ndarray  # (S + 1,) float32, share of the needle's tokens in the buffer, nan without a needle

    def read(self, step: int) -> int:
        """Tokens read after `step` chunks."""
        return min(self.tokens, step * self.plan.chunk_tokens)

    def buffer(self, step: int) -> Champions:
        return self.ever.take(np.flatnonzero((self.entered <= step) & (step < self.left)))

    def promoted(self, step: int) -> Champions:
        return self.ever.take(np.flatnonzero(self.entered == step)) if step else Champions.none()

    def evicted(self, step: int) -> Champions:
        return self.ever.take(np.flatnonzero(self.left == step)) if step else Champions.none()


def replay(scores: Scores, plan: StreamPlan, needle: range = range(0), stop: Stop | None = None) -> Replay:
    """Plays `plan` over the scores that are known. Raises `Stopped`."""
    known, size = _Known(scores), len(scores.score)
    whole = size if scores.done else scores.until // plan.chunk_tokens * plan.chunk_tokens
    ready = range(-(-whole // plan.chunk_tokens))
    entered, left = np.full(size, NEVER, np.int32), np.full(size, NEVER, np.int32)
    rank, champion = np.empty(size, np.float32), np.empty(size, np.int64)
    bar, held, recall = [-np.inf], [0], [0.0 if len(needle) else np.nan]
    for step in stream(known, known, plan, chunks=ready, stop=stop):
        now, fresh = step.index + 1, step.promoted
        entered[fresh.position], left[step.evicted.position] = now, now
        rank[fresh.position], champion[fresh.position] = fresh.score, fresh.champion
        kept = step.buffer
        bar.append(float(kept.score.min()) if len(kept) == plan.buffer_tokens else -np.inf)
        held.append(len(kept))
        found = np.searchsorted(kept.position, [needle.start, needle.stop])
        recall.append(float(found[1] - found[0]) / len(needle) if len(needle) else np.nan)
    at = np.flatnonzero(entered < NEVER)
    ever = Champions(at, rank[at], champion[at], scores.reason[champion[at]])
    return Replay(
        plan, size, -(-size // plan.chunk_tokens), len(ready), ever, entered[at], left[at],
        np.array(bar, np.float32), np.array(held, np.int32), np.array(recall, np.float32),
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of the buffer."""

    start: int
    stop: int
    score: float  # the best among them
    champion: int  # position of the token with that score
    reason: int
    fresh: bool  # whether any of them came in with this step


def runs(kept: Champions, fresh_from: int) -> list[Run]:
    """The buffer's contents as stretches of text, best first; tokens from position `fresh_from` on are new."""
    if not len(kept):
        return []
    cut = np.flatnonzero(np.diff(kept.position) > 1) + 1
    first, last = np.r_[0, cut], np.r_[cut, len(kept)]
    out = []
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        best = a + int(kept.score[a:b].argmax())
        start, last_one = int(kept.position[a]), int(kept.position[b - 1])
        owner, reason = int(kept.champion[best]), int(kept.reason[best])
        out.append(Run(start, last_one + 1, float(kept.score[best]), owner, reason, last_one >= fresh_from))
    return sorted(out, key=lambda run: (-run.score, run.start))
