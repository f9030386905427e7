"""The study's loop. Every cell is measured once and saved at once, so that a stopped run can go on.

A cell is one task, length, number of things, arm, L and seed. A seed decides a model and the texts that test it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from ...common.checks import whole_number
from ...common.files import check_folder, check_place, write_json
from ...common.machine import environment
from ...common.progress import Stop, check_stop
from ...common.runs import as_json, differences
from ...lm.losses import IGNORED
from ...lm.model import ProteusLM
from ...lm.recall.recipe import ALPHA, DENSE, RELATED, Scale, training_batches
from ...lm.recall.task import Task
from ...lm.recall.tasks import TASKS
from .arms import ARMS, DENSE_ARMS, ArmOutput, calibrate, read, walk
from .changes import AS_IT_IS, CHANGES, in_training, with_gates
from .rings import attend_by_rings
from .spread import spread
from .subjects import Training, prepare

OURS = "gates + notes + trained alpha"
CALIBRATION = 1 << 14  # tokens of training text that k-means is fitted to
UNTRAINED_BATCH = 10**9  # index of a batch that no training reaches
TOKENS_PER_BATCH = 1 << 14


@dataclass(frozen=True)
class StudySettings:
    """What a run measures. `ValueError` names the field that does not fit."""

    tasks: tuple[str, ...] = ("mqar",)
    lengths: tuple[int, ...] = (256, 512, 1024)
    things: tuple[int, ...] = (16, 64)
    arms: tuple[str, ...] = tuple(ARMS)
    changes: tuple[str, ...] = ()
    shares: tuple[int, ...] = (8,)  # L is the length divided by this
    seeds: int = 3
    cases: int = 1000  # answers per cell, at least

    def __post_init__(self) -> None:
        for name, allowed in (("tasks", TASKS), ("arms", ARMS), ("changes", CHANGES)):
            for word in set(getattr(self, name)) - set(allowed):
                raise ValueError(f"{name}={word!r}: must be one of {', '.join(allowed)}")
        for name in ("lengths", "things", "shares"):
            for value in getattr(self, name):
                whole_number(name, value, 1)
        whole_number("seeds", self.seeds, 1)
        whole_number("cases", self.cases, 1)


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    task: str
    length: int  # tokens
    things: int
    arm: str
    shortlist: int  # L
    seed: int
    change: str = ""  # of CHANGES; empty for the arms themselves

    @property
    def subject(self) -> tuple[str, str]:
        """Kind of the model that answers, and the settings beside its scale that it was trained with."""
        return ALPHA if ARMS[self.arm].alpha else DENSE, CHANGES[self.change or AS_IT_IS].label

    @property
    def reader(self) -> tuple:
        """What decides the model that answers, with its gates."""
        return self.seed, *self.subject, self.change


@dataclass(frozen=True)
class CellResult:
    """The measurements of one cell."""

    cell: Cell
    right: int  # answers
    cases: int  # answers asked for
    keys: float  # keys and notes read per answering row, mean over these rows, layers and heads
    seconds: float
    device: str
    looks: float = 0.0  # block summaries or prototypes compared to choose the keys, likewise

    @property
    def accuracy(self) -> float:
        return self.right / self.cases

    def to_dict(self) -> dict:
        """Flat, as a line of the JSON."""
        found = asdict(self)
        return found.pop("cell") | found

    @classmethod
    def from_dict(cls, line: dict) -> CellResult:
        names = ("right", "cases", "keys", "seconds", "device", "looks")
        return cls(Cell(**{k: v for k, v in line.items() if k not in names}), **{name: line[name] for name in names})


def cells(scale: Scale, settings: StudySettings) -> list[Cell]:
    """Every cell whose things fit its length, grouped by model. ValueError for a task that no model was taught."""
    learned = (*scale.tasks, *(RELATED if "mqar" in scale.tasks else ()))
    strange = sorted(set(settings.tasks) - set(learned))
    if strange:
        raise ValueError(f"tasks={strange[0]!r}: must be one that the models have learned: {', '.join(learned)}")
    wanted: dict[Cell, None] = {}
    changes = [name for name in settings.changes if not CHANGES[name].is_own(scale)]
    arms = [(arm, "") for arm in settings.arms] + [(OURS, change) for change in changes]
    for seed in range(settings.seeds):
        for task in settings.tasks:
            for things in settings.things:
                fewest = maker(scale, task, things, seed).min_length()
                for length in (length for length in sorted(settings.lengths) if length >= fewest):
                    for share in settings.shares:
                        L = scale.shortlist(length, share)
                        for arm, change in arms:
                            reads = length if arm in DENSE_ARMS else L
                            wanted[Cell(task, length, things, arm, reads, seed, change)] = None
    return sorted(wanted, key=lambda cell: (cell.seed, cell.subject, cell.change))


def study(
    scale: Scale, settings: StudySettings, out: Path, models: Path, *, device: str = "cpu", processes: int = 1,
    stop: Stop | None = None,
) -> Iterator[CellResult | Training]:  # fmt: skip
    """Measure the cells that `out` lacks. Yields every result, known ones first, and `Training` while models train.

    out: JSON file of all results so far. models: folder of the models, as `prepare` keeps them; a missing model is
    trained. processes: how many share the work, in turn on each GPU; with more than one, results come in the order in
    which they are done, and of each model's training the last step. Raises `ValueError` where `out` was measured at
    another scale, `Stopped`, `OSError`.
    """
    check_place(out, "out")
    check_folder(models, "models")
    known = {row.cell: row for row in load(out, scale)}
    wanted = cells(scale, settings)
    done = {cell for cell in wanted if cell in known and known[cell].cases >= settings.cases}
    yield from (known[cell] for cell in wanted if cell in done)
    missing = [cell for cell in wanted if cell not in done]
    work = (scale, models, settings.cases, missing, device)
    for event in _alone(*work, stop) if processes == 1 else _shared(*work, processes, stop):
        if isinstance(event, CellResult):
            known[event.cell] = event
            save(out, scale, list(known.values()), device)
        yield event


def _alone(
    scale: Scale, models: Path, cases: int, missing: list[Cell], device: str, stop: Stop | None
) -> Iterator[CellResult | Training]:
    held, model = None, None
    for cell in missing:
        check_stop(stop)
        if held != cell.reader:
            for event in _subject(scale, cell, models, device, stop):
                if isinstance(event, Training):
                    yield event
                else:
                    held, model = cell.reader, event
        yield measure_cell(model, cell, maker(scale, cell.task, cell.things, cell.seed), cases)


def _shared(
    scale: Scale, models: Path, cases: int, missing: list[Cell], device: str, processes: int, stop: Stop | None
) -> Iterator[CellResult | Training]:
    """First every model is trained, by one process each, then every cell is measured."""
    one_cell_per_model = {(cell.seed, *cell.subject): cell for cell in missing}.values()
    for last in spread(partial(_train, scale, models), one_cell_per_model, device, processes, stop):
        if last is not None:
            yield last
    yield from spread(partial(_measure, scale, models, cases), missing, device, processes, stop)


def _train(scale: Scale, models: Path, cell: Cell, device: str) -> Training | None:
    """Train a cell's model if it is missing; the last step, None if nothing was trained."""
    steps = [event for event in _trained(scale, cell, models, device, None) if isinstance(event, Training)]
    return steps[-1] if steps else None


def _measure(scale: Scale, models: Path, cases: int, cell: Cell, device: str) -> CellResult:
    model = _last_subject(scale, models, cell, device)
    return measure_cell(model, cell, maker(scale, cell.task, cell.things, cell.seed), cases)


_kept: dict[tuple, ProteusLM] = {}  # the last subject of a process that measures many cells


def _last_subject(scale: Scale, models: Path, cell: Cell, device: str) -> ProteusLM:
    """The model that answers in a cell, made again only where another one answered in the cell before."""
    at = (scale, models, cell.reader)
    if at not in _kept:
        _kept.clear()
        *_, _kept[at] = _subject(scale, cell, models, device, None)
    return _kept[at]


def maker(scale: Scale, task: str, things: int, seed: int) -> Task:
    """Held-out texts of a task."""
    return TASKS[task](things, seed=seed, words=scale.words).evaluation()


def _subject(scale: Scale, cell: Cell, models: Path, device: str, stop: Stop | None) -> Iterator[Training | ProteusLM]:
    """The model that answers in a cell; gates are fitted where training did not fit them or their number changes."""
    change = CHANGES[cell.change or AS_IT_IS]
    for event in _trained(scale, cell, models, device, stop):
        if isinstance(event, Training):
            yield event
            continue
        model = event if change.gates is None else with_gates(event, change.gates)
        if cell.subject[0] == DENSE or change.gates is not None:
            lessons = replace(scale, **change.lessons)
            length = max(length for length, _ in lessons.stages)
            ids = training_batches(lessons, cell.seed).batch(UNTRAINED_BATCH, max(1, CALIBRATION // length), length).ids
            model = calibrate(model, ids.to(device), cell.seed)
        yield model


def _trained(scale: Scale, cell: Cell, models: Path, device: str, stop: Stop | None) -> Iterator[Training | ProteusLM]:
    """The model of a cell as it was trained, by `prepare`."""
    (kind, trained), change = cell.subject, CHANGES[cell.change or AS_IT_IS]
    fields, lessons = in_training(change, scale.heads), replace(scale, **change.lessons)
    yield from prepare(lessons, kind, cell.seed, models, change=trained, device=device, stop=stop, **fields)


def measure_cell(model: ProteusLM, cell: Cell, task: Task, cases: int) -> CellResult:
    """Read batch after batch until at least `cases` answers were asked for."""
    return next(row for row in tally(model, cell, task, TOKENS_PER_BATCH) if row.cases >= cases)


@torch.no_grad()
def tally(model: ProteusLM, cell: Cell, task: Task, tokens: int) -> Iterator[CellResult]:
    """The row so far after every batch of about `tokens` tokens, without end."""
    device, began = model.embed.weight.device, perf_counter()
    name, right, answers, keys, looks = environment(device)["device"], 0, 0, 0.0, 0.0
    for index in count():
        batch = task.batch(index, max(1, tokens // cell.length), cell.length)
        found = read_batch(model, batch.ids.to(device), cell)
        scored = batch.targets != IGNORED
        right += int((task.correct(batch, found.logits.argmax(-1).cpu()) & scored).sum())
        keys += float(found.reads.cpu()[scored].sum())
        looks += float(found.looks.cpu()[scored].sum())
        answers += int(scored.sum())
        spent = round(perf_counter() - began, 3)
        yield CellResult(cell, right, answers, round(keys / answers, 3), spent, name, round(looks / answers, 3))


def read_batch(model: ProteusLM, ids: Tensor, cell: Cell) -> ArmOutput:
    """One batch `(B, T)`, read by the cell's arm or change."""
    change = CHANGES[cell.change or AS_IT_IS]
    if change.salient:
        return walk(model, ids, lambda attn, h: attend_by_rings(attn, h, cell.shortlist, True, **change.reads))
    return read(model, ids, ARMS[cell.arm], cell.shortlist, **change.reads)


def load(out: Path, scale: Scale | None = None) -> list[CellResult]:
    """The results in a file, none where it is missing. ValueError for another kind of file or another scale."""
    if not out.is_file():
        return []
    try:
        held = json.loads(out.read_text(encoding="utf-8"))
        rows = [CellResult.from_dict(line) for line in held["rows"]]
        there = held["scale"]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"out={str(out)!r}: must be what proteus evidence wrote, or no file yet ({err!r})") from err
    other = [] if scale is None else sorted(differences(as_json(scale.to_dict()), there))
    if other:
        raise ValueError(
            f"out={str(out)!r} was measured at another scale ({', '.join(other)}): "
            "give another file, or the same options"
        )
    return rows


def save(out: Path, scale: Scale, rows: list[CellResult], device: str) -> None:
    """Write all results so far, whole or not at all."""
    about = environment(torch.device(device))
    write_json(out, {"about": about, "scale": scale.to_dict(), "rows": [row.to_dict() for row in rows]})
