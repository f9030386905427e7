"""A study's results as tables and sentences: means over seeds with 95% intervals.

The unit is a seed, because all cases of one seed are answered by the same model. The interval is Student's t over
seeds, clipped to [0, 1]; a single seed has none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from statistics import mean

from ...common.machine import markdown
from .. import intervals
from .arms import ARMS, DENSE_ARMS
from .changes import CHANGES
from .study import OURS, CellResult

BEST, ORACLE = "dense", "oracle"


@dataclass(frozen=True)
class Entry:
    """The results of one cell over all its seeds."""

    task: str
    length: int
    things: int
    arm: str
    change: str
    shortlist: int
    accuracy: float
    low: float | None  # of the 95% interval; None with one seed
    high: float | None
    keys: float
    seeds: int
    cases: int  # of all seeds
    looks: float = 0.0

    @property
    def place(self) -> tuple[str, int, int]:
        return self.task, self.length, self.things


def summarise(rows: Iterable[CellResult]) -> list[Entry]:
    """One entry per cell: tasks and lengths in order, arms and changes in the order of ARMS and CHANGES."""
    arms, changes = list(ARMS), ["", *CHANGES]

    def place(row: CellResult) -> tuple:
        cell = row.cell
        return (cell.task, cell.things, cell.length, changes.index(cell.change), arms.index(cell.arm), cell.shortlist)

    entries = []
    for _, group in groupby(sorted(rows, key=place), key=place):
        some = list(group)
        cell, accuracies = some[0].cell, [row.accuracy for row in some]
        low, high = intervals.over_seeds(accuracies) or (None, None)
        entries.append(
            Entry(cell.task, cell.length, cell.things, cell.arm, cell.change, cell.shortlist, mean(accuracies), low,
                  high, mean(row.keys for row in some), len(some), sum(row.cases for row in some),
                  mean(row.looks for row in some))
        )  # fmt: skip
    return entries


def tables(entries: list[Entry]) -> str:
    """Markdown: for each task a table of arms and one of changes; a column is a length, a number of things and an L."""
    parts = []
    for changed, title in ((False, "arms"), (True, "one change at a time")):
        mine = [entry for entry in entries if bool(entry.change) == changed]
        for task, some in groupby(mine, key=lambda entry: entry.task):
            parts.append(f"**{task}, {title}**\n\n{_table(list(some))}")
    return "\n\n".join(parts)


def _table(entries: list[Entry]) -> str:
    columns = sorted({(e.things, e.length, e.shortlist) for e in entries if e.arm not in DENSE_ARMS})
    columns = columns or sorted({(e.things, e.length, e.shortlist) for e in entries})
    found = {(e.change or e.arm, e.things, e.length, e.shortlist): e for e in entries}
    lines = []
    for name in dict.fromkeys(e.change or e.arm for e in entries):
        cells = [found.get((name, n, T, L)) or found.get((name, n, T, T)) for n, T, L in columns]
        lines.append([name, *(_cell(entry) for entry in cells)])
    return markdown(["read by", *(f"T {T:,}, {n} planted, L {L}" for n, T, L in columns)], lines)


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    spread = "" if entry.low is None else f" [{entry.low:.3f}, {entry.high:.3f}]"
    looks = f" + {entry.looks:,.0f}" if entry.looks else ""
    return f"{entry.accuracy:.3f}{spread} · {entry.keys:,.0f}{looks}"


def sentences(entries: list[Entry]) -> list[str]:
    """One sentence per place: our share of dense attention's accuracy, and every rival ahead of us."""
    lines = []
    main = [entry for entry in entries if not entry.change]
    for place in dict.fromkeys(entry.place for entry in main):
        here = [entry for entry in main if entry.place == place]
        full = next((entry for entry in here if entry.arm == BEST), None)
        for ours in (entry for entry in here if entry.arm == OURS):
            rivals = [e for e in here if e.shortlist == ours.shortlist and e.arm not in (OURS, ORACLE, *DENSE_ARMS)]
            ahead = [f"{e.arm} ({e.accuracy:.3f})" for e in rivals if e.accuracy > ours.accuracy]
            task, length, things = place
            share = f", {ours.accuracy / full.accuracy:.3f} of dense" if full and full.accuracy else ""
            line = f"{task}, {length:,} tokens, {things} planted, L {ours.shortlist}: {OURS} {ours.accuracy:.3f}{share}"
            beaten = f"; better: {', '.join(ahead) or f'none of {len(rivals)} arms'}" if rivals else ""
            lines.append(f"{line}{beaten}.")
    return lines


def about(held: dict, entries: list[Entry]) -> str:
    """Machine, models, and numbers of seeds and cases of a study."""
    on, scale = held["about"], held["scale"]
    seeds = ", ".join(map(str, sorted({entry.seeds for entry in entries})))
    stages = ", ".join(f"{steps:,} steps at {length:,}" for length, steps in scale["stages"])
    return (
        f"{on['device']}, torch {on['torch']}, Python {on['python']}, {on['date']}; computed in float32. Models: "
        f"{scale['layers']} layers, width {scale['width']}, {scale['heads']} heads, {scale['gates']} gates; trained on "
        f"{', '.join(scale['tasks'])}: {stages} tokens, {scale['tokens']:,} tokens a step. Models (seeds) per "
        f"figure: {seeds}; at least {min(entry.cases // entry.seeds for entry in entries):,} answers by each."
    )
