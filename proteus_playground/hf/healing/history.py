"""A run's history for people: a table (CSV, JSON), a page per stage (Markdown), TensorBoard where it is installed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from itertools import groupby
from math import exp
from pathlib import Path

from ...common.files import write_json, write_text
from ...common.machine import markdown
from .plan import spoken
from .training import Step

CSV, JSON, SUMMARY, BOARD = "history.csv", "history.json", "summary.md", "tensorboard"


def write_history(folder: Path, steps: Sequence[Step]) -> None:
    """Write all files of a run's history into its folder. Raises `OSError`."""
    rows = [asdict(step) for step in steps]
    write_json(folder / JSON, rows)
    table = io.StringIO()
    names = [each.name for each in fields(Step) if each.name != "held_out"]
    writer = csv.DictWriter(table, [*names, "gap"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"gap": gap_of(step)} for row, step in zip(rows, steps, strict=True))
    write_text(folder / CSV, table.getvalue())
    write_text(folder / SUMMARY, summary(steps))


def gap_of(step: Step) -> float | None:
    """Mean of the gaps measured after a step."""
    gaps = step.held_out and step.held_out["gaps"]
    return sum(gaps.values()) / len(gaps) if gaps else None


def summary(steps: Sequence[Step]) -> str:
    """What each stage did, as Markdown."""
    parts, read, seconds = ["# Healing\n"], 0, 0.0
    for name, group in groupby(steps, lambda step: step.stage):
        its = list(group)
        tokens, took = its[-1].read - read, its[-1].seconds - seconds
        read, seconds = its[-1].read, its[-1].seconds
        head = max(1, len(its) // 10)
        rows = [
            [label, *(f"{sum(getattr(s, field) for s in some) / len(some):.4f}" for some in (its[:head], its[-head:]))]
            for label, field in (("loss", "loss"), ("KL", "kl"), ("match", "match"), ("cross-entropy", "cross_entropy"))
        ]
        parts.append(f"## Stage {name}\n\n{len(its):,} steps, {tokens:,} tokens, {spoken(took / 60)}.\n")
        parts.append(markdown(["mean of", "first tenth of the steps", "last tenth"], rows) + "\n")
        measured = [step for step in its if step.held_out]
        if measured:
            shares = list(measured[-1].held_out["gaps"])
            header = ["step", *(f"gap at 1/{share}" for share in shares), "dense", "base"]
            found = [
                [step.step, *(f"{step.held_out['gaps'][share]:.4f}" for share in shares),
                 f"{step.held_out['dense']:.4f}", f"{step.held_out['base']:.4f}"]
                for step in measured
            ]  # fmt: skip
            parts.append("Held-out text, nats per token:\n\n" + markdown(header, found) + "\n")
    return "\n".join(parts)


class Board:
    """TensorBoard's files of a run; does nothing where tensorboard is not installed."""

    def __init__(self, folder: Path):
        self._writer = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / BOARD)

    def add(self, step: Step) -> None:
        if self._writer is None:
            return
        for name in ("loss", "kl", "match", "cross_entropy", "gates", "alpha", "reads", "rate", "tokens_per_second"):
            self._writer.add_scalar(name, getattr(step, name), step.step)
        self._writer.add_scalar("perplexity", exp(min(50.0, step.cross_entropy)), step.step)
        for share, gap in (step.held_out or {"gaps": {}})["gaps"].items():
            self._writer.add_scalar(f"gap/1_{share}", gap, step.step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
