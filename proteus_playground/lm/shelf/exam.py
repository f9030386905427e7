"""Held-out questions for a model that reads shelves, and its answers.

An answer counts as right if greedy decoding gives exactly the expected text. One forward pass over shelf, questions and
expected answers decides that: greedy decoding gives an answer exactly if each of its tokens is the likeliest one there.
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

HELD_OUT = 1 << 50  # seeds of exams begin here; training shelves have seeds of 40 bits
TOKENS_PER_QUESTION = 28  # with its answer, at most


@dataclass(frozen=True)
class Graded:
    """The answer to one question about a shelf, at one alpha."""

    question: Question
    tokens: int  # before the answer
    distance: int  # from the end of the fact to the answer, in tokens
    flux_alpha: float | None
    right: bool  # the whole answer
    value_right: bool  # the value alone: the one word that has to be looked up


@dataclass(frozen=True)
class Answer:
    """The answer that a model wrote."""

    text: str
    right: bool


@torch.no_grad()
def exam(
    model: ProteusLM, tokenizer: ShelfTokenizer, *, tokens: int, questions: int, seed: int = 0, per_shelf: int = 8,
    alphas: tuple[float, ...] = (0.0, 1.0),
) -> Iterator[Graded]:  # fmt: skip
    """Ask `questions` questions, each at every alpha of `alphas`. A shelf with its questions has up to `tokens` tokens.

    The model must be in evaluation mode; its own alpha is not changed. per_shelf: questions that follow one shelf.
    Raises `TypeError` or `ValueError` naming the argument.
    """
    for name, value in (("questions", questions), ("per_shelf", per_shelf)):
        whole_number(name, value, 1)
    whole_number("seed", seed, 0)
    least = TOKENS_PER_QUESTION * max(8, 2 * min(per_shelf, questions))  # so that at least half is shelf
    whole_number("tokens", tokens, least)
    _check(model, tokenizer)
    device = model.embed.weight.device
    for number in range(-(-questions // per_shelf)):
        ids, placed = _paper(tokenizer, tokens, min(per_shelf, questions - number * per_shelf), seed, number)
        for alpha in alphas:
            with model.settings(flux_alpha=alpha):
                predicted = model(torch.tensor([ids], device=device))[0].argmax(-1).tolist()
            for question, start, answer, fact in placed:
                wrote, value = predicted[start - 1 : start - 1 + len(answer)], tokenizer.encode(question.value)[0]
                at = answer.index(value)
                yield Graded(question, start, start - fact, alpha, wrote == answer, wrote[at] == value)


def _check(model: ProteusLM, tokenizer: ShelfTokenizer) -> None:
    """`ValueError` for a model in training mode, which would learn from the questions, or with other tokens."""
    if model.training:
        raise ValueError("training=True: the model must be in evaluation mode; call eval()")
    if model.cfg.vocab_size != tokenizer.vocab_size:
        raise ValueError(f"vocab_size={model.cfg.vocab_size}: must be the tokenizer's {tokenizer.vocab_size}")


def _paper(tokenizer: ShelfTokenizer, tokens: int, count: int, seed: int, number: int) -> tuple[list[int], list]:
    """Tokens of a shelf with questions and answers, and (question, start, answer, end of the fact) of each."""
    random = Random(f"{seed}/{number}")
    shelf_tokens = tokens - count * TOKENS_PER_QUESTION
    text = shelf(HELD_OUT + random.getrandbits(40), shelf_tokens // 6)
    ids = tokenizer.encode(text.text)[:shelf_tokens]
    ends = [stop for _, stop in tokenizer.spans(text.text)[:shelf_tokens]]
    inside = [q for q in text.questions if q.at + len(q.fact) <= ends[-1]]
    placed = []
    for question in random.sample(inside, min(count, len(inside))):
        ids += tokenizer.encode(question.prompt)
        answer = tokenizer.encode(question.answer)
        fact = next(i for i, end in enumerate(ends) if end >= question.at + len(question.fact))
        placed.append((question, len(ids), answer, fact))
        ids += answer
    return ids, placed


@torch.no_grad()
def ask(model: ProteusLM, tokenizer: ShelfTokenizer, text: Shelf, question: Question) -> Answer:
    """Let the model answer a question about a shelf by greedy decoding, at its current settings.

    Each token takes a pass over the whole text. The model must be in evaluation mode.
    """
    _check(model, tokenizer)
    ids = tokenizer.encode(text.ask(question))
    written: list[int] = []
    for _ in range(TOKENS_PER_QUESTION):
        logits = model(torch.tensor([ids + written], device=model.embed.weight.device))
        written.append(int(logits[0, -1].argmax()))
        if tokenizer.decode(written).endswith("."):
            break
    answer = tokenizer.decode(written).strip()
    return Answer(answer, answer == question.answer)
