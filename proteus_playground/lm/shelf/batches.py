"""Training sequences made of shelves: a shelf, then questions about it with their answers, up to the full length.

A share of the sequences repeats random words instead. From these a small model learns soonest to look up what followed
the same words before.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch

from ..training import Batch
from .grammar import Question, Shelf, shelf
from .tokenizer import ShelfTokenizer

TOKENS_PER_SENTENCE = 6.75  # of a shelf, on average
# Weight of a token in the loss: in the text, in an answer, as the answer's value, in a repetition.
PLAIN, ANSWER, VALUE, COPY = 0.1, 0.5, 3.0, 0.3


@dataclass(frozen=True)
class ShelfBatches:
    """Endless shelves with questions; `batch` is a pure function of its arguments and the fields.

    questions: smallest and largest share of a sequence that is questions. copies: share of sequences that repeat words.
    """

    tokenizer: ShelfTokenizer
    seed: int = 0
    questions: tuple[float, float] = (0.2, 0.5)
    copies: float = 0.0

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """ids, targets and the targets' weights in the loss, each `(sequences, length)`."""
        random = Random(f"{self.seed}.{index}.{sequences}.{length}")
        kinds = (self._copies if random.random() < self.copies else self._sequence for _ in range(sequences))
        rows = [write(random, length + 1) for write in kinds]
        ids = torch.tensor([row for row, _ in rows])
        weights = torch.tensor([weight for _, weight in rows])
        return Batch(ids[:, :-1], ids[:, 1:].contiguous(), weights[:, 1:].contiguous())

    def _sequence(self, random: Random, length: int) -> tuple[list[int], list[float]]:
        share = random.uniform(*self.questions)  # of the sequence that is questions
        text = shelf(random.getrandbits(40), max(1, int(length * (1 - share) / TOKENS_PER_SENTENCE)))
        ids = self.tokenizer.encode(text.text)[: int(length * (1 - share / 2))]
        weights = [PLAIN] * len(ids)
        for piece, weight in self._dialogue(random, text):
            ids += piece
            weights += weight
            if len(ids) >= length:
                break
        return ids[:length], weights[:length]

    def _copies(self, random: Random, length: int) -> tuple[list[int], list[float]]:
        period = random.randint(max(2, min(length // 8, 64)), max(2, min(length // 2, 256)))
        words = [random.randrange(256, self.vocab_size) for _ in range(period)]
        ids = (words * (length // period + 1))[:length]
        return ids, [0.0] * period + [COPY] * (length - period)

    def _dialogue(self, random: Random, text: Shelf):
        """Endless questions in random order: tokens and weights of each question with its answer."""
        while True:
            for question in random.sample(text.questions, len(text.questions)):
                yield scored(self.tokenizer, question)


def scored(tokenizer: ShelfTokenizer, question: Question) -> tuple[list[int], list[float]]:
    """Tokens of a question and its answer, and the weight of each in the loss."""
    before, answer = tokenizer.encode(question.prompt), tokenizer.encode(question.answer)
    value = tokenizer.encode(question.value)[0]
    return before + answer, [PLAIN] * len(before) + [VALUE if token == value else ANSWER for token in answer]
