"""`proteus bench exam`: the share of held-out questions about shelves that a small model answers, by alpha."""

from __future__ import annotations

from typing import Annotated

import typer
from tqdm import tqdm

from ...common.machine import environment, markdown
from ...common.options import Device, Out, parse_alphas, parse_lengths, pick_device
from ...lm.model import ProteusLM
from ...lm.shelf.exam import Graded, exam
from ...lm.shelf.tokenizer import ShelfTokenizer
from ...lm.shipped import load_shipped
from .measure import publish


def exam_command(
    model: Annotated[str, typer.Option(help="A file of ProteusLM.save; the shipped shelf-mini if left out.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of shelf and questions: 1k,4k; 1k..4k doubles.")] = "1k..4k",
    share: Annotated[int, typer.Option(help="L is the length divided by this.", min=1)] = 16,
    alphas: Annotated[str, typer.Option(help="Flux alphas.")] = "0,0.5,1",
    questions: Annotated[int, typer.Option(help="Held-out questions per length.", min=1, max=10**6)] = 400,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of the shelves.", min=0)] = 0,
    out: Out = "",
) -> None:
    """Held-out questions about shelves: the share answered to the letter, by length and alpha."""
    dev = pick_device(device)
    if None in parse_alphas(alphas):
        raise typer.BadParameter(f"{alphas!r}: must be numbers in [0, 1]", param_hint="--alphas")
    lm = ProteusLM.load(model, str(dev)).eval() if model else load_shipped("shelf-mini", str(dev))[0]
    asked, rows = tuple(parse_alphas(alphas)), []
    for tokens in parse_lengths(lengths):
        paper = exam(lm, ShelfTokenizer(), tokens=tokens, questions=questions, seed=seed, alphas=asked)
        with lm.settings(shortlist=max(1, tokens // share)):
            grades = list(tqdm(paper, total=questions * len(asked), unit="answer", desc=f"{tokens:,} tokens"))
        rows += [_row(tokens, tokens // share, alpha, grades) for alpha in asked]
    report = {"benchmark": "exam", **environment(dev), "dtype": "float32", "seed": seed, "rows": rows}
    publish(report, exam_table(report), out)


def exam_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
    about = f"{report['device']}, torch {report['torch']}, float32, seed {report['seed']}; whole answers to the letter"
    titles = ["tokens", "alpha", "L", "questions", "right", "word looked up right", "facts in the first half"]
    return f"{about}\n\n{markdown(titles, [_cells(row) for row in report['rows']])}"


def _row(tokens: int, shortlist: int, alpha: float, grades: list[Graded]) -> dict:
    mine = [grade for grade in grades if grade.flux_alpha == alpha]
    far = [grade for grade in mine if grade.distance > tokens / 2]
    return {
        "tokens": tokens, "alpha": alpha, "shortlist": shortlist, "questions": len(mine),
        "right": _share([grade.right for grade in mine]), "value_right": _share([grade.value_right for grade in mine]),
        "far": len(far), "far_right": _share([grade.right for grade in far]),
    }  # fmt: skip


def _share(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _cells(row: dict) -> list[str]:
    shares = ["–" if row[name] is None else f"{row[name]:.1%}" for name in ("right", "value_right", "far_right")]
    reads = f"{row['shortlist']:,}" if row["alpha"] else "–"
    return [f"{row['tokens']:,}", f"{row['alpha']:g}", reads, f"{row['questions']:,}", *shares]
