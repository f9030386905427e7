"""Questions with checkable answers in long texts, after RULER.

Hsieh et al. 2024, https://arxiv.org/abs/2404.06654. Facts are written into our own English, as in the validation suite,
and the model continues "the special number for X is". Sentences and numbers are ours, so the figures are not RULER's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from ...lm.shelf import shelf
from ...lm.shelf.exam import HELD_OUT, TOKENS_PER_QUESTION
from ..needles.answers import matches
from ..needles.cases import Planter
from ..needles.haystacks import read
from ..needles.pairs import Pair
from .subjects import SENTENCE, ShelfSubject, Subject

KINDS = ("quiet", "broken", "silver", "hollow", "distant", "wooden", "gentle", "crooked", "purple", "frozen")
THINGS = ("lantern", "harbour", "violin", "orchard", "compass", "bridge", "kettle", "meadow", "statue", "mirror")
KEYS, VALUES, HOPS = 8, 4, 3  # facts of the same form; values of one key; steps from the first variable to the last
COMMON, OFTEN = 3, 8  # words that occur often, and how many times as often as the others
SPARE = 8  # tokens that an answer may have beyond the expected one
HEAD = "Some special numbers are hidden in the following text. Remember them.\n\n"


@dataclass(frozen=True)
class Question:
    """A text that ends where the answer begins. Its score is the share of `answers` in the reply."""

    ids: Tensor  # (T,)
    answers: tuple[str, ...]
    expected: tuple[int, ...]  # tokens of a right reply
    most: int  # tokens of a reply

    def score(self, reply: str) -> float:
        return sum(matches(reply, (text,)) for text in self.answers) / len(self.answers)


@dataclass(frozen=True)
class _Draw:
    """The random things of one question: names and numbers."""

    subject: Subject
    length: int  # tokens of text, question and reply
    rng: np.random.Generator

    def keys(self, count: int) -> list[str]:
        kinds, things = self.rng.permutation(KINDS), self.rng.permutation(THINGS)
        return [f"{kind} {thing}" for kind, thing in zip(kinds[:count], things[:count], strict=True)]

    def numbers(self, count: int) -> list[str]:
        return [str(n) for n in self.rng.choice(9000, count, replace=False) + 1000]

    def ask(self, facts: list[tuple[str, float]], tail: str, answers: list[str], expected: str) -> Question:
        """A text of the subject with `facts` at their depths in [0, 1], and the question."""
        encode, words = self.subject.source.encode, self.subject.words
        before, after, said = encode(HEAD), words.encode(tail), words.encode(expected)
        room = self.length - len(before) - len(after) - len(said) - SPARE
        if room < sum(len(words.encode(text)) + 1 for text, _ in facts) * 2:
            raise ValueError(f"length={self.length}: too short for a text with {len(facts)} facts and a question")
        haystack = self.subject.haystack(room)
        planter = Planter(haystack, room, room, words)
        for text, depth in facts:
            planter.fact(Pair(text, text, "", "", (text,), ()), text, depth)
        body = haystack.tokens.copy()
        for start, ids in planter.written:
            body[start : start + len(ids)] = ids
        ids = torch.tensor([*before, *body.tolist(), *after.tolist()])
        return Question(ids, tuple(answers), tuple(said.tolist()), len(said) + SPARE)


def needle(draw: _Draw) -> Question:
    """One number, at a random place."""
    return _number(draw, 1)


def multi_key(draw: _Draw) -> Question:
    """One number of eight; the others belong to other things."""
    return _number(draw, KEYS)


def _number(draw: _Draw, count: int) -> Question:
    keys, numbers = draw.keys(count), draw.numbers(count)
    facts = [
        (_fact(*pair), depth) for pair, depth in zip(zip(keys, numbers, strict=True), _depths(draw, count), strict=True)
    ]
    tail = f"\n\n{_fact(keys[0])}"
    return draw.ask(facts, tail, numbers[:1], f" {numbers[0]}.")


def multi_value(draw: _Draw) -> Question:
    """Four numbers of one thing, far apart; all are asked for."""
    (key,), numbers = draw.keys(1), draw.numbers(VALUES)
    facts = [(_fact(key, number), depth) for number, depth in zip(numbers, sorted(_depths(draw, VALUES)), strict=True)]
    tail = f"\n\nThe {VALUES} special numbers for the {key} are"
    return draw.ask(facts, tail, numbers, f" {', '.join(numbers)}.")


def variables(draw: _Draw) -> Question:
    """A number goes from one name to the next, far apart; all names that have it are asked for."""
    names, (number,) = list(draw.rng.permutation(THINGS)[: HOPS + 1]), draw.numbers(1)
    steps = [f"Let {names[0]} be {number}."]
    steps += [f"Let {new} be the same as {old}." for old, new in zip(names[:-1], names[1:], strict=True)]
    facts = list(zip(steps, sorted(_depths(draw, len(steps))), strict=True))
    tail = f"\n\nThe {len(names)} words that are {number} are"
    return draw.ask(facts, tail, names, f" {', '.join(names)}.")


def common_words(draw: _Draw) -> Question:
    """A list of words of the text, three of which occur far more often; these are asked for."""
    subject, words = draw.subject, draw.subject.words
    text = read(subject.haystack(draw.length).tokens, words)
    pool = sorted({word.lower() for word in re.findall(r"\b[A-Za-z]{5,9}\b", text)})
    if len(pool) < 4 * COMMON:
        raise ValueError(f"length={draw.length}: the text has {len(pool)} long words: must have {4 * COMMON}")
    pool = list(draw.rng.permutation(pool))
    often, rare = pool[:COMMON], pool[COMMON : COMMON + max(2 * COMMON, draw.length // 24)]
    bag = list(draw.rng.permutation(often * OFTEN * max(1, len(rare) // (COMMON * OFTEN)) + rare))
    head = subject.source.encode("Read the following list of words and remember which of them occur most often.\n\n")
    tail = words.encode(f"\n\nThe {COMMON} words that occur most often in the list are").tolist()
    expected = words.encode(f" {', '.join(often)}.").tolist()
    room = draw.length - len(head) - len(tail) - len(expected) - SPARE
    body = words.encode(" ".join(bag * (1 + room // len(bag)))).tolist()[: max(0, room)]
    ids = torch.tensor([*head, *body, *tail])
    return Question(ids, tuple(often), tuple(expected), len(expected) + SPARE)


def shelf_question(draw: _Draw) -> Question:
    """A fact of a shelf, for the model that reads shelves."""
    source, room = draw.subject.source, draw.length - TOKENS_PER_QUESTION
    text = shelf(HELD_OUT + int(draw.rng.integers(1 << 40)), max(8, room // SENTENCE))
    ends = [stop for _, stop in source.spans(text.text)[: max(0, room)]]
    inside = [one for one in text.questions if ends and one.at + len(one.fact) <= ends[-1]]
    if not inside:
        raise ValueError(f"length={draw.length}: too short for a shelf with a question")
    asked = inside[int(draw.rng.integers(len(inside)))]
    ids = source.encode(text.text)[:room] + source.encode(asked.prompt)
    expected = source.encode(asked.answer)
    return Question(source.ids(ids), (asked.value,), tuple(expected), len(expected))


def _fact(key: str, number: str = "") -> str:
    """A fact, or without a number its beginning, which ends where the number would be."""
    return f"The special number for the {key} is" + (f" {number}." if number else "")


def _depths(draw: _Draw, count: int) -> list[float]:
    """Places spread over the text, in a random order."""
    return list(draw.rng.permutation((np.arange(count) + draw.rng.random(count)) / count))


ENGLISH: dict[str, Callable[[_Draw], Question]] = {
    "needle": needle, "multi-key": multi_key, "multi-value": multi_value, "variables": variables,
    "common words": common_words,
}  # fmt: skip
SHELF: dict[str, Callable[[_Draw], Question]] = {"shelf": shelf_question}
TASKS = ENGLISH | SHELF


def tasks_of(subject: Subject) -> tuple[str, ...]:
    """Names of the tasks that the subject's words can express."""
    return tuple(SHELF if isinstance(subject, ShelfSubject) else ENGLISH)


def question(subject: Subject, task: str, length: int, index: int, seed: int) -> Question:
    """Question `index` of a task, the same for every arm. Raises `ValueError` for a length without room for it."""
    rng = np.random.default_rng([seed, length, index, crc32(task.encode())])
    return TASKS[task](_Draw(subject, length, rng))
