"""Ask a small model about a shelf at any position of the controls, beside itself dense, and see what it read.

The text that is looked at ends where the answer's value has to be said: that row must have found the fact. What nobody
has an answer to ends with the question.

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

OTHER = 1_000_000  # the shelf that gates of another number are fitted on; nobody looks at it
LONGEST = 24  # tokens of an answer; the shelves' own have about 10
ROOM = 48  # tokens kept free behind a shelf for a question and the words before its value
PIECES = 0.05  # share of tokens inside words from which a text is called strange


@dataclass(frozen=True)
class Reply:
    """What the model says at `settings` and dense, and how the row that has to say the value read the fact."""

    settings: Settings
    said: str
    dense: str
    right: bool | None  # None: nobody knows the answer
    dense_right: bool | None
    rows: tuple[RowView, ...]  # of every head of every layer, in order; empty where the fact has no place
    value: tuple[int, int]  # tokens at which the fact's value begins and ends

    def readers(self) -> int:
        """Heads whose row reads the value as a key of its own."""
        first = self.value[0]
        return sum(int(row.kind[first]) in (LOCAL, ANCHOR, DNA) for row in self.rows)

    def weight(self, at: int) -> float:
        """Attention that row `at` gives the value."""
        return float(self.rows[at].weight[slice(*self.value)].sum())


class ShelfProbe(LayerProbe):
    """A `LayerProbe` that can be asked. `questions` are those that the text answers, `asked` the one it ends with."""

    def __init__(self, source: ShelfSource, text: Text, found: Shelf | None, question: str, **given):
        self.questions = () if found is None else found.questions
        self.question = question
        self.start: tuple[int, int] | None = None  # (layer, head) worth looking at first; whoever opens it may say
        self.asked = next((q for q in self.questions if q.text == question), None)
        prompt = "" if not question else (self.asked or Question(question, "", "", "", 0)).prompt
        stem = "" if self.asked is None else " " + self.asked.answer.rpartition(self.asked.value)[0].strip()
        self._stem = len(source.encode(stem)) if stem else 0
        body = text.body + prompt + stem
        other = Text("another shelf", fitting_shelf(source, OTHER, CALIBRATION_TOKENS).text, "written by the package")
        super().__init__(source, Text(text.name, body, text.source), calibration=other, **given)
        self._text = body
        if (strange := _strange(self.tokens)) > PIECES:
            self.note += f" Most of it is new to this model: {strange:.0%} of the tokens are pieces of unknown words."
        self._dense: list[int] | None = None

    @cached_property
    def fact(self) -> tuple[int, int] | None:
        """Tokens at which the fact begins and ends; None where there is none or it was cut off."""
        return None if self.asked is None else self._tokens_of(self.asked.at, len(self.asked.fact))

    @cached_property
    def value(self) -> tuple[int, int] | None:
        """Tokens of the fact's value."""
        if self.asked is None:
            return None
        return self._tokens_of(self.asked.at + self.asked.fact.rindex(self.asked.value), len(self.asked.value))

    def ask(self, settings: Settings, *, stop: Stop | None = None) -> Reply:
        """The answer at `settings` beside the dense one, which is worked out once. `Stopped` on request.

        Raises `ValueError` where nothing was asked or a setting is out of range.
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
        """The (layer, head) that gives the value most attention, of those that are dense where at `settings` none does.

        None where no fact is asked for.
        """
        if self.value is None:
            return None
        for now in (settings, replace(settings, flux_alpha=0.0)):
            weight = [row.weight[slice(*self.value)].sum() for row in self._last_rows(now)]
            if max(weight) > 0:
                break
        return divmod(int(np.argmax(weight)), self.n_heads)

    def _last_rows(self, settings: Settings, stop: Stop | None = None):
        for layer in self.layers:
            for head in range(self.n_heads):
                check_stop(stop)
                yield self.row(layer, settings, len(self.tokens) - 1, head)

    def _answer(self, layers: dict, stop: Stop | None) -> list[int]:
        """Tokens up to the full stop."""
        prompt, full_stop = self._ids[: len(self._ids) - self._stem], self._source.encode("so.")[-1:]
        return self._source.answer(prompt, layers, full_stop, LONGEST, stop)

    def _judge(self, said: str) -> bool | None:
        return None if self.asked is None else self.asked.value in re.findall(r"\w+", said)

    def _tokens_of(self, at: int, length: int) -> tuple[int, int] | None:
        spans = self._source.spans(self._text)
        if len(spans) != len(self.tokens):
            return None  # cut: places in the text are no places in what was read
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
    """A small model over `text`, or over shelf `number` where it is None, with `question` behind it.

    A shelf is as long as fits into max_tokens (at least 64) with the question; another text is cut as by `LayerProbe`.
    """
    source, found = ShelfSource(model, tokenizer, name), None
    if text is None:
        found = fitting_shelf(source, number, max_tokens - ROOM)
        text = Text(f"shelf {number}", found.text, "written by the package")
    kept = cache_dir() / "gates"
    return ShelfProbe(source, text, found, question, max_tokens=max_tokens, cache=kept, progress=progress, stop=stop)


def fitting_shelf(source, number: int, tokens: int) -> Shelf:
    """The longest shelf of this number that `source` reads in at most `tokens` tokens, to within a tenth."""
    sentences = max(1, round(tokens / TOKENS_PER_SENTENCE * 1.1))
    while True:
        found = shelf(number, sentences)
        if sentences == 1 or len(source.encode(found.text)) <= tokens:
            return found
        sentences = max(1, sentences * 19 // 20)


def _strange(tokens: list[str]) -> float:
    """Share of tokens that go on inside a word: the words of a shelf are whole."""
    return sum(token[:1].isalnum() or "\ufffd" in token for token in tokens[1:]) / len(tokens)
