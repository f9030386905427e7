"""The studies that are shipped in experiments/results, and measuring one of their cells again on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from ...common.progress import Stop, check_stop
from ...lm.recall.recipe import Scale
from ...lm.recall.tasks import TASKS
from .arms import ARMS, DENSE_ARMS
from .changes import CHANGES
from .report import Entry, about, summarise
from .study import Cell, CellResult, load, tally

SHARES = (2, 4, 8, 16, 32, 64)
TOKENS_PER_STEP = 4096  # read between two checks of the time


@dataclass(frozen=True)
class Study:
    """One JSON file of `proteus evidence`."""

    name: str
    note: str  # machine and models
    scale: Scale
    entries: tuple[Entry, ...]

    def shares(self, entries: list[Entry]) -> list[int]:
        """Length divided by L, for each L at the greatest length of `entries`."""
        some = [entry for entry in entries if entry.arm not in DENSE_ARMS]
        longest = max((entry.length for entry in some), default=0)
        reads = {entry.shortlist for entry in some if entry.length == longest}
        by_reads = {self.scale.shortlist(longest, share): share for share in reversed(SHARES)}
        return sorted(by_reads[L] for L in reads & set(by_reads))

    def at(self, task: str, things: int, share: int, changed: bool) -> list[Entry]:
        """The entries of one task at L = length / share, and the dense ones, which have no L."""
        here = (e for e in self.entries if (e.task, e.things, bool(e.change)) == (task, things, changed))
        return [e for e in here if e.arm in DENSE_ARMS or e.shortlist == self.scale.shortlist(e.length, share)]


def folder() -> Path:
    """The folder of the shipped studies."""
    return Path(str(files("proteus_playground.experiments.results")))


def committed(where: Path | None = None) -> list[Study]:
    """Every study in a folder (None: `folder()`), by name. ValueError where a file is not a study's."""
    studies = []
    for path in sorted((folder() if where is None else where).glob("evidence_*.json")):
        entries = summarise(load(path))
        held = json.loads(path.read_text(encoding="utf-8"))
        if entries:
            name = path.stem.removeprefix("evidence_").replace("_", " ")
            studies.append(Study(name, about(held, entries), Scale(**held["scale"]), tuple(entries)))
    return studies


def can_repeat(entry: Entry) -> bool:
    """Whether the shipped model can be used: the change is one of the evaluation, not of the training or the gates."""
    change = CHANGES.get(entry.change)
    return change is None or (not change.label and change.gates is None)


def repeat(
    entry: Entry, cases: int, *, seconds: float = 20.0, seed: int = 1_000, stop: Stop | None = None
) -> Iterator[CellResult]:
    """Measure an entry's cell with the shipped recall-mini on texts of another seed; yields the result so far.

    Ends with at least `cases` answers, or after `seconds`. Raises `FileNotFoundError` without the model's weights,
    `Stopped` on request, `ValueError` for an entry that needs another model.
    """
    if not can_repeat(entry):
        raise ValueError(f"change={entry.change!r}: must be one that needs no model of its own")
    model, words = _recall_mini()
    cell = Cell(entry.task, entry.length, entry.things, entry.arm, entry.shortlist, seed, entry.change)
    task = TASKS[entry.task](entry.things, seed=seed, words=words).evaluation()
    for row in tally(model, cell, task, TOKENS_PER_STEP):
        check_stop(stop)
        yield row
        if row.cases >= cases or row.seconds >= seconds:
            return


@lru_cache(maxsize=1)
def _recall_mini() -> tuple:
    from ...lm.shipped import load_shipped

    return load_shipped("recall-mini")


def named(entry: Entry) -> str:
    """The name of an entry in tables and figures."""
    return entry.change or entry.arm


def order(entries: list[Entry]) -> list[str]:
    """The names of `entries`, in the order of ARMS and CHANGES."""
    return [name for name in (*ARMS, *CHANGES) if any(named(entry) == name for entry in entries)]
