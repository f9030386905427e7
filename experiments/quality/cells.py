"""The loop of the quality table. Every cell is measured once and saved at once, so that a stopped run can go on.

A cell is one passage or one question, one length, one share of the keys and one arm. All arms of a passage run one
after another in one process, the dense pass first: gaps are differences to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from torch import Tensor

from ...common.checks import whole_number
from ...common.progress import Stop, check_stop
from ...common.runs import RunFolder
from .arms import DENSE, Arm, Meter, replaced
from .questions import TASKS, Question, question, tasks_of
from .subjects import Subject

SETTINGS, ROWS, REPORT = "settings.json", "rows.jsonl", "report.json"
NLL = "likelihood"
SHORTEST = 64  # tokens of a passage
REPLY = re.compile(r"\s*(.*?\w.*?)(\.|\n\n)", re.DOTALL)  # ends with its first sentence or paragraph that holds a word


@dataclass(frozen=True)
class QualitySettings:
    """What a run measures. `ValueError` names the field that does not fit."""

    lengths: tuple[int, ...] = (2048,)
    shares: tuple[int, ...] = (32, 16, 8)  # L is the length divided by this
    passages: int = 3  # of each text
    cases: int = 5  # questions of each task
    tasks: tuple[str, ...] = tuple(TASKS)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lengths", "shares"):
            if not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: must have at least one entry")
        for value in self.lengths:
            whole_number("lengths", value, SHORTEST)
        for value in self.shares:
            whole_number("shares", value, 1, min(self.lengths) // 4)
        whole_number("passages", self.passages, 0)
        whole_number("cases", self.cases, 0)
        whole_number("seed", self.seed, 0)
        for task in set(self.tasks) - set(TASKS):
            raise ValueError(f"tasks={task!r}: must be one of {', '.join(TASKS)}")
        if not self.passages and not (self.cases and self.tasks):
            raise ValueError("passages=0: must be at least 1 where no question is asked")


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    part: str  # NLL, or a task
    length: int
    index: int  # of the passage or question
    shortlist: int  # L; the length itself for the dense pass
    arm: str
    mark: str = ""


@dataclass(frozen=True)
class Done:
    """A finished cell."""

    index: int  # from 1
    total: int
    row: dict  # a line of the rows file


def cells(subject: Subject, settings: QualitySettings, arms: list[Arm]) -> list[Cell]:
    """Every cell once, those of one passage or question together.

    Raises `ValueError` or `TypeError` for fields of ours that do not fit.
    """
    tasks = [task for task in settings.tasks if task in tasks_of(subject)]
    parts = [(NLL, settings.passages * len(subject.texts)), *((task, settings.cases) for task in tasks)]

    def cell(part: str, length: int, index: int, arm: Arm, share: int) -> Cell:
        L = length if arm.dense else length // share
        return Cell(part, length, index, L, arm.name, arm.mark(subject, L))

    every = (
        cell(part, length, index, arm, share)
        for length in sorted(settings.lengths)
        for part, count in parts
        for index in range(count)
        for arm in arms
        for share in (settings.shares[:1] if arm.dense else settings.shares)
    )
    return list(dict.fromkeys(every))


def measure(
    subject: Subject, settings: QualitySettings, arms: list[Arm], out: Path, *, stop: Stop | None = None
) -> Iterator[Done]:
    """Measure the cells that `out` lacks. Yields every row, known ones too, in the order of `cells`.

    Raises `ValueError` where `out` holds a run of another model, text or seed, or a length does not fit the model,
    `Stopped`, `OSError`.
    """
    longest, context = max(settings.lengths), subject.source.context
    if context is not None and longest > context:
        raise ValueError(f"lengths={longest}: must be at most {context} for {subject.source.name}")
    every, by_name = cells(subject, settings, arms), {arm.name: arm for arm in arms}
    run = RunFolder(out, SETTINGS, ROWS, (REPORT,))
    run.claim(subject.about() | {"passages": settings.passages, "seed": settings.seed})
    known = {_cell(row): row for row in run.rows()}
    held, passages = {}, {}
    for number, cell in enumerate(every, 1):
        if cell not in known:
            check_stop(stop)
            if cell.part == NLL:
                if cell.length not in passages:
                    passages[cell.length] = subject.passages(cell.length, settings.passages)
                row = likelihood(subject, by_name[cell.arm], passages[cell.length][cell.index], cell)
            else:
                if (cell.part, cell.length, cell.index) not in held:
                    asked = question(subject, cell.part, cell.length, cell.index, settings.seed)
                    held = {(cell.part, cell.length, cell.index): asked}
                dense = known.get(Cell(cell.part, cell.length, cell.index, cell.length, DENSE), {})
                (asked,) = held.values()
                row = answered(subject, by_name[cell.arm], asked, cell, dense.get("tokens"))
            known[cell] = row
            run.append([row])
        yield Done(number, len(every), known[cell])


def _cell(row: dict) -> Cell:
    try:
        return Cell(row["part"], row["length"], row["index"], row["shortlist"], row["arm"], row["mark"])
    except KeyError as err:
        raise ValueError(f"out: a row lacks {err}: must be what proteus quality wrote, or another folder") from err


def likelihood(subject: Subject, arm: Arm, ids: Tensor, cell: Cell) -> dict:
    """Mean negative log-likelihood of a passage's second half, nats per token."""
    began, half = perf_counter(), len(ids) // 2
    meter = Meter(half - 1)
    value = subject.source.nll(ids, half, replaced(subject, arm, cell.shortlist, meter))
    return _row(cell, value, meter, len(ids), began)


def answered(subject: Subject, arm: Arm, asked: Question, cell: Cell, guess: list[int] | None) -> dict:
    """The share of the right answers in the model's reply. guess: as in `greedy`; None for the expected reply."""
    began, meter = perf_counter(), Meter(len(asked.ids) - 1)
    layers = replaced(subject, arm, cell.shortlist, meter)
    tokens = greedy(subject, asked, layers, asked.expected if guess is None else guess)
    text = subject.source.decode(tokens)
    reply = found[1] if (found := REPLY.match(text)) else text
    row = _row(cell, asked.score(reply), meter, len(asked.ids), began)
    return row | {"reply": reply, "tokens": tokens}


def _row(cell: Cell, value: float, meter: Meter, tokens: int, began: float) -> dict:
    return vars(cell) | {"value": value, **meter.figures(tokens), "seconds": round(perf_counter() - began, 3)}


def greedy(subject: Subject, asked: Question, layers: Mapping, guess: Sequence[int]) -> list[int]:
    """The reply that the model writes when it always takes the likeliest token. The whole text is read at every pass.

    guess: tokens that the reply may begin with. They are read together with the text, and kept as far as the model
    itself would have written them, so a right guess saves passes and a wrong one changes nothing: no row depends on a
    later token. After a wrong guess the next one is what followed the last two tokens where they occurred before.
    """
    said, guess, ids = [], list(guess), asked.ids
    while len(said) < asked.most:
        tried = guess[: asked.most - len(said) - 1]
        text = ids.new_tensor([*ids.tolist(), *said, *tried])
        likeliest = subject.source.predict(text, len(ids) + len(said), layers)
        right = next(
            (i for i, pair in enumerate(zip(tried, likeliest, strict=False)) if pair[0] != pair[1]), len(tried)
        )
        said += likeliest[: right + 1]
        wrong = right < len(tried)
        guess = _followed([*ids.tolist(), *said]) if wrong or not guess[right + 1 :] else guess[right + 1 :]
        if REPLY.match(subject.source.decode(said)):
            break
    return said


def _followed(tokens: list[int]) -> list[int]:
    """What followed the last two tokens where they occurred last before; nothing if they did not."""
    last = tokens[-2:]
    spots = (i for i in range(len(tokens) - 3, 0, -1) if tokens[i - 1 : i + 1] == last)
    return tokens[at + 1 :] if (at := next(spots, None)) is not None else []
