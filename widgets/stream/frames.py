"""Documents, scores and replays of the chunk buffer panel, computed on a worker and kept."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from proteus_playground.experiments.needles.haystacks import Haystack

from proteus_playground.streaming.replay import Document, Replay, Scores, empty_scores, fill, plant, replay
from proteus_playground.streaming.table_scorer import TableScorer

from .state import Wanted

TOKENS_PER_STEP = 2048  # scored by the layers between two reports of progress, which also check for Cancel
REMEMBERED = 6  # documents, and as many scores of each kind


@dataclass(frozen=True)
class Source:
    """A text as tokens, and the vocabulary they come from."""

    words: object  # a `WordTable` with `name`, `random`, and `note` where it is random, else `model`
    haystack: Haystack
    why: str  # why the words are random; "" if they are not, or if random words were asked for


@dataclass(frozen=True)
class Frame:
    """A finished picture: what was wanted, and the data that show it."""

    wanted: Wanted
    document: Document
    scores: Scores
    replay: Replay
    asked: list[str]  # the prompt's words that take part


class Frames:
    """All pictures of one source. `layers`: `key` -> scores by the model's layers."""

    def __init__(self, source: Source):
        self.source = source
        self.layers: dict[tuple, Scores] = {}
        self._documents: dict[tuple, Document] = {}
        self._tables: dict[tuple, tuple[Scores, list[str]]] = {}

    @staticmethod
    def key(wanted: Wanted) -> tuple:
        """What the scores in context depend on."""
        return wanted.prompt, wanted.needle, wanted.page

    def make(self, wanted: Wanted, stop) -> Frame:
        """The picture of `wanted`; recomputes only what differs from earlier ones. Raises `Stopped`."""
        document = self.document(wanted)
        if wanted.judge == "words":
            scores, asked = self._table(wanted, document)
        else:
            scores, asked = self.layers.get(self.key(wanted)) or empty_scores(len(document)), []
        return Frame(wanted, document, scores, replay(scores, wanted.plan, document.needle, stop), asked)

    def score_in_context(self, wanted: Wanted, scorer, progress, stop) -> Scores:
        """Scores the tokens that `scorer` has not scored yet. Raises `Stopped`; the scores so far are kept."""
        document = self.document(wanted)
        scores = self.layers.setdefault(self.key(wanted), empty_scores(len(document), scorer.explain))
        _forget(self.layers)
        fill(scores, document, scorer, TOKENS_PER_STEP, progress=progress, stop=stop)
        return scores

    def document(self, wanted: Wanted) -> Document:
        at = (wanted.needle, wanted.page)
        if at not in self._documents:
            words, needle = self.source.words, wanted.needle.strip()
            ids = words.encode(f"\n\n{needle}") if needle else np.zeros(0, np.int32)
            lead = next((i for i, token in enumerate(ids) if words.vocabulary[token].strip()), 0)
            haystack = self.source.haystack
            self._documents[at] = plant(haystack.tokens, haystack.ends, ids, wanted.page, lead)
            _forget(self._documents)
        return self._documents[at]

    def _table(self, wanted: Wanted, document: Document) -> tuple[Scores, list[str]]:
        at = self.key(wanted)
        if at not in self._tables:
            begun = time.perf_counter()
            scorer = TableScorer(self.source.words, document.ids, wanted.prompt)
            scores = empty_scores(len(document), scorer.explain)
            fill(scores, document, scorer, len(document))
            scores.seconds = time.perf_counter() - begun
            self._tables[at] = scores, scorer.words
            _forget(self._tables)
        return self._tables[at]


def _forget(table: dict) -> None:
    """Removes the oldest entries beyond REMEMBERED."""
    while len(table) > REMEMBERED:
        table.pop(next(iter(table)))
