"""Ask a small model a question about a shelf at any setting, compare its dense answer, and see which keys it read.

The recorded text ends just before the value in the answer, so that its last row is the one that must find the fact. If
the answer is unknown, the text ends with the question.

Axes: `T` tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..attention.settings import Settings, config_for
from ..common.files import cache_dir
from ..common.progress import Progress, Stop, check_stop
from ..common.texts import Text
from ..lm.shelf import Question, Shelf, shelf
from ..lm.shelf.batches import TOKENS_PER_SENTENCE
from .probe import CALIBRATION_TOKENS, LayerProbe
from .shelf_source import ShelfSource
from .views import ANCHOR, DNA, LOCAL, RowView

OTHER = 1_000_000  # number of the shelf on which gates are fitted when their number is not the trained one
LONGEST = 24  # tokens of an answer; correct ones have about 10
ROOM = 48  # tokens left free after a shelf for the question and the words before the value
UNKNOWN_WORDS = 0.05  # share of tokens inside words above which the note warns of unknown words


@dataclass(frozen=True)
class Reply:
    """The model's answers at `settings` and dense, and what the row that must produce the value read."""

    settings: Settings
    said: str
    dense: str
    right: bool | None  # whether `said` holds the value; None if the answer is unknown
    dense_right: bool | None
    rows: tuple[RowView, ...]  # one per layer and head, in order; empty if the text does not hold the fact
    value: tuple[int, int]  # first token of the fact's value, and the token after its last

    def readers(self) -> int:
        """Number of heads whose row reads the value as a single key, not through a note."""
        first = self.value[0]
        return sum(int(row.kind[first]) in (LOCAL, ANCHOR, DNA) for row in self.rows)

    def weight(self, at: int) -> float:
        """Attention weight that row `at` gives to the value."""
        return float(self.rows[at].weight[slice(*self.value)].sum())


class ShelfProbe(LayerProbe):
    """A `LayerProbe` that answers questions. `questions`: those the text answers; `asked`: the one it ends with."""

    def __init__(self, source: ShelfSource, text: Text, found: Shelf | None, question: str, **given):
        self.questions = () if found is None else found.questions
        self.question = question
        self.start: tuple[int, int] | None = None  # (layer, head) to show first; set by whoever opens the probe
        self.asked = next((q for q in self.questions if q.text == question), None)
        prompt = "" if not question else (self.asked or Question(question, "", "", "", 0)).prompt
        stem = "" if self.asked is None else " " + self.asked.answer.rpartition(self.asked.value)[0].strip()
        self._stem = len(source.encode(stem)) if stem else 0
        body = text.body + prompt + stem
        other = Text("another shelf", fitting_shelf(source, OTHER, CALIBRATION_TOKENS).text, "written by the package")
        super().__init__(source, Text(text.name, body, text.source), calibration=other, **given)
        self._text = body
        if (share := _share_inside_words(self.tokens)) > UNKNOWN_WORDS:
            self.note += f" This model was trained on other text: {share:.0%} of the tokens are parts of unknown words."
        self._dense: list[int] | None = None

    @cached_property
    def fact(self) -> tuple[int, int] | None:
        """First token of the fact and the token after its last; None if there is no fact or it was cut off."""
        return None if self.asked is None else self._tokens_of(self.asked.at, len(self.asked.fact))

    @cached_property
    def value(self) -> tuple[int, int] | None:
        """First token of the fact's value and the token after its last; None as for `fact`."""
        if self.asked is None:
            return None
        return self._tokens_of(self.asked.at + self.asked.fact.rindex(self.asked.value), len(self.asked.value))

    def ask(self, settings: Settings, *, stop: Stop | None = None) -> Reply:
        """The answers at `settings` and dense; the dense one is computed once.

        Raises `ValueError` without a question or for a setting out of range, `Stopped` on request.
        """
        if not self.question:
            raise ValueError("question='': must be a question, given when the probe was made")
        with self._model_lock:
            if self._dense is None:
                self._dense = self._answer({}, stop)
            config = config_for(settings, self._source.shape)
            said = self._answer({layer: self._runner(layer, config, stop) for layer in self.layers}, stop)
        rows = [] if self.value is None else list(self._last_rows(settings, stop))
        words = [self._source.decode(ids).strip() for ids in (said, self._dense)]
        return Reply(settings, *words, *map(self._judge, words), tuple(rows), self.value or (0, 0))

    def finder(self, settings: Settings) -> tuple[int, int] | None:
        """(layer, head) whose last row attends most to the value at `settings`, or at alpha 0 if none does there.

        None if the question asks for no fact.
        """
        if self.value is None:
            return None
        for tried in (settings, replace(settings, flux_alpha=0.0)):
            weight = [row.weight[slice(*self.value)].sum() for row in self._last_rows(tried)]
            if max(weight) > 0:
                break
        return divmod(int(np.argmax(weight)), self.n_heads)

    def _last_rows(self, settings: Settings, stop: Stop | None = None):
        for layer in self.layers:
            for head in range(self.n_heads):
                check_stop(stop)
                yield self.row(layer, settings, len(self.tokens) - 1, head)

    def _answer(self, layers: dict, stop: Stop | None) -> list[int]:
        """The tokens of the answer up to its full stop."""
        prompt, full_stop = self._ids[: len(self._ids) - self._stem], self._source.encode("so.")[-1:]
        return self._source.answer(prompt, layers, full_stop, LONGEST, stop)

    def _judge(self, said: str) -> bool | None:
        return None if self.asked is None else self.asked.value in re.findall(r"\w+", said)

    def _tokens_of(self, at: int, length: int) -> tuple[int, int] | None:
        spans = self._source.spans(self._text)
        if len(spans) != len(self.tokens):
            return None  # the text was cut, so character positions do not match its tokens
        inside = [i for i, (start, stop) in enumerate(spans) if start < at + length and stop > at]
        return inside[0], inside[-1] + 1


def open_shelf(
    model,
    tokenizer,
    text: Text | None,
    *,
    number: int = 0,
    question: str = "",
    max_tokens: int = 1024,
    name: str = "shelf-mini",
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> ShelfProbe:
    """A small model with `text`, or with shelf `number` if `text` is None, followed by `question`.

    A shelf is as long as fits into max_tokens (at least 64) with the question; another text is cut as by `LayerProbe`.
    """
    source, found = ShelfSource(model, tokenizer, name), None
    if text is None:
        found = fitting_shelf(source, number, max_tokens - ROOM)
        text = Text(f"shelf {number}", found.text, "written by the package")
    kept = cache_dir() / "gates"
    return ShelfProbe(source, text, found, question, max_tokens=max_tokens, cache=kept, progress=progress, stop=stop)


def fitting_shelf(source: ShelfSource, number: int, tokens: int) -> Shelf:
    """The longest shelf of this number that has at most `tokens` tokens for `source`, to within a tenth."""
    sentences = max(1, round(tokens / TOKENS_PER_SENTENCE * 1.1))
    while True:
        found = shelf(number, sentences)
        if sentences == 1 or len(source.encode(found.text)) <= tokens:
            return found
        sentences = max(1, sentences * 19 // 20)


def _share_inside_words(tokens: list[str]) -> float:
    """Share of tokens that continue a word: every word of a shelf is one token."""
    return sum(token[:1].isalnum() or "\ufffd" in token for token in tokens[1:]) / len(tokens)
