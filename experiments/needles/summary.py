"""Finished cases as tables: means with 95% intervals, by task, way of asking, length and method.

The unit is a case. Where every case is right or wrong the interval is Wilson's, else a bootstrap over cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np

from ..intervals import over_cases
from .answers import DENSE
from .retrieval import METHODS


def share(values: Iterable[float]) -> dict:
    """Mean, interval and number of cases."""
    values = [float(value) for value in values]
    low, high = over_cases(values)
    return {"mean": float(np.mean(values)), "low": low, "high": high, "cases": len(values)}


def recall_table(rows: list[dict]) -> list[dict]:
    """One entry per task, way of asking, length and method: answer, whole and tokens as `share`, decoys as a mean."""
    table = []
    for group, some in _groups(rows):
        for method in METHODS:
            found = [row["recall"][method] for row in some]
            decoys = [one["decoys"] for one in found if one["decoys"] is not None]
            entry = {name: share(one[name] for one in found) for name in ("answer", "whole", "tokens")}
            table.append(group | {"method": method} | entry | {"decoys": float(np.mean(decoys)) if decoys else None})
    return table


def accuracy_table(rows: list[dict]) -> list[dict]:
    """One entry per task, way of asking, length and method that chose the text to read."""
    table = []
    for group, some in _groups(rows):
        for method in (DENSE, *METHODS):
            right = [row["replies"][method]["right"] for row in some if method in row["replies"]]
            if right:
                table.append(group | {"method": method, "right": share(right)})
    return table


def fading_table(rows: list[dict]) -> list[dict]:
    """How often the answer was kept, by the share of the fact's tokens that was written."""
    table = []
    for group, some in _groups([row for row in rows if row["task"] == "fading"]):
        for method in METHODS:
            each = zip(*(row["recall"][method]["each"] for row in some), strict=True)
            for strength, kept in zip(some[0]["strengths"], each, strict=True):
                table.append(group | {"method": method, "strength": strength, "answer": share(kept)})
    return table


def heat(rows: list[dict], asked: str, method: str) -> tuple[list[int], list[float], np.ndarray]:
    """Lengths, depths and mean answer recall `(depths, lengths)` of the single-needle grid; NaN where no case ran."""
    some = [row for row in rows if row["task"] == "single" and row["asked"] == asked]
    lengths, depths = sorted({row["length"] for row in some}), sorted({row["depth"] for row in some})
    grid = np.full((len(depths), len(lengths)), np.nan)
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            cell = [r["recall"][method]["answer"] for r in some if r["depth"] == depth and r["length"] == length]
            grid[i, j] = np.mean(cell) if cell else np.nan
    return lengths, depths, grid


def _groups(rows: list[dict]) -> Iterator[tuple[dict, list[dict]]]:
    names = ("task", "asked", "length")

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in names)

    for values, some in groupby(sorted(rows, key=key), key=key):
        yield dict(zip(names, values, strict=True)), list(some)
