"""Held-out questions for a model that reads shelves, and what it answers.

An answer is right when the model, taking the likeliest token each time, writes it to the last letter. That is read off
one pass over shelf, questions and right answers: all of an answer's tokens are the likeliest ones there exactly when
greedy writing gives that answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch

from ...common.checks import whole_number
from ..model import ProteusLM
from .grammar import Question, Shelf, shelf
from .tokenizer import ShelfTokenizer

HELD_OUT = 1 << 50  # seeds of exams begin here; shelves to learn from have seeds of 40 bits
ROOM = 28  # tokens of a question with its answer, at most


@dataclass(frozen=True)
class Graded:
    """One question, asked behind a shelf at one setting."""

    question: Question
    tokens: int  # before the answer
    distance: int  # from the end of the fact to the answer, tokens
    flux_alpha: float | None
    right: bool  # the whole answer
    value_right: bool  # the one word that had to be looked up


@dataclass(frozen=True)
class Answer:
    """What a model wrote."""

    text: str
    right: bool


@torch.no_grad()
def exam(
    model: ProteusLM, tokenizer: ShelfTokenizer, *, tokens: int, questions: int, seed: int = 0, per_shelf: int = 8,
    alphas: tuple[float, ...] = (0.0, 1.0),
) -> Iterator[Graded]:  # fmt: skip
    """Ask `questions` questions behind shelves that fill `tokens` tokens with them, each at every alpha of `alphas`.

    The model must be in evaluation mode; its alpha is left alone. per_shelf: questions behind one shelf, the
    first of them right behind it. Raises `TypeError` or `ValueError` naming the argument.
    """
    for name, value in (("questions", questions), ("per_shelf", per_shelf)):
        whole_number(name, value, 1)
    whole_number("seed", seed, 0)
    whole_number("tokens", tokens, ROOM * max(8, 2 * min(per_shelf, questions)))  # half of it shelf, or more
    _check(model, tokenizer)
    device = model.embed.weight.device
    for number in range(-(-questions // per_shelf)):
        ids, asked = _paper(tokenizer, tokens, min(per_shelf, questions - number * per_shelf), seed, number)
        for alpha in alphas:
            with model.settings(flux_alpha=alpha):
                said = model(torch.tensor([ids], device=device))[0].argmax(-1).tolist()
            for question, start, answer, fact in asked:
                wrote, value = said[start - 1 : start - 1 + len(answer)], tokenizer.encode(question.value)[0]
                at = answer.index(value)
                yield Graded(question, start, start - fact, alpha, wrote == answer, wrote[at] == value)


def _check(model: ProteusLM, tokenizer: ShelfTokenizer) -> None:
    """`ValueError` for a model that would learn while it is asked, or that has other tokens."""
    if model.training:
        raise ValueError("training=True: the model must be in evaluation mode to be asked; call eval()")
    if model.cfg.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"vocab_size={model.cfg.vocab_size}: must be the tokenizer's {tokenizer.vocab_size}")


def _paper(tokenizer: ShelfTokenizer, tokens: int, count: int, seed: int, number: int) -> tuple[list[int], list]:
    """Tokens of a shelf with questions and answers, and (question, start, answer, end of the fact) of each."""
    random = Random(f"{seed}/{number}")
    room = tokens - count * ROOM
    text = shelf(HELD_OUT + random.getrandbits(40), room // 6)
    ids = tokenizer.encode(text.text)[:room]
    ends = [stop for _, stop in tokenizer.spans(text.text)[:room]]
    inside = [q for q in text.questions if q.at + len(q.fact) <= ends[-1]]
    asked = []
    for question in random.sample(inside, min(count, len(inside))):
        ids += tokenizer.encode(question.prompt)
        answer = tokenizer.encode(question.answer)
        fact = next(i for i, end in enumerate(ends) if end >= question.at + len(question.fact))
        asked.append((question, len(ids), answer, fact))
        ids += answer
    return ids, asked


@torch.no_grad()
def ask(model: ProteusLM, tokenizer: ShelfTokenizer, text: Shelf, question: Question) -> Answer:
    """Let the model write its likeliest answer behind the shelf, at its current settings, by full passes.

    The model must be in evaluation mode.
    """
    _check(model, tokenizer)
    ids = tokenizer.encode(text.ask(question))
    written: list[int] = []
    for _ in range(ROOM):
        logits = model(torch.tensor([ids + written], device=model.embed.weight.device))
        written.append(int(logits[0, -1].argmax()))
        if tokenizer.decode(written).endswith("."):
            break
    said = tokenizer.decode(written).strip()
    return Answer(said, said == question.answer)
