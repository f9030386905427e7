"""`proteus bench top-a`: repetition, agreement and likelihood of a small model's text with and without Top-A."""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean, stdev
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from ...common.files import check_place
from ...common.machine import environment, markdown
from ...common.options import Alpha, Device, Out, Seed, pick_device
from ...lm.model import ProteusLM
from ...lm.shelf import ShelfTokenizer, shelf
from ...lm.shelf.exam import HELD_OUT
from ...lm.shipped import load_shipped
from .measure import publish
from .sampling_effect import ARMS, Continuation, continuations

MEASURED = {"repetition": "repeated 4-grams", "agreement": "agreement", "nll": "nats per token under dense"}


def top_a_command(
    model: Annotated[str, typer.Option(help="A file of ProteusLM.save; the shipped shelf-mini if left out.")] = "",
    prompts: Annotated[int, typer.Option(help="Shelves to write on.", min=1)] = 8,
    seeds: Annotated[int, typer.Option(help="Continuations of each, by every arm.", min=1)] = 3,
    tokens: Annotated[int, typer.Option(help="Tokens written.", min=4)] = 128,
    alpha: Alpha = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature of sampling.")] = 1.0,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Out = "",
) -> None:
    """Text written with and without Top-A: repetition, agreement of the heads, likelihood under dense attention."""
    dev, tokenizer = pick_device(device), ShelfTokenizer()
    if out:
        check_place(out)
    lm = ProteusLM.load(model, str(dev)).eval() if model else load_shipped("shelf-mini", str(dev))[0]
    lm.set_flux_alpha(alpha)
    begun = [shelf(HELD_OUT + seed * 1000 + i, 60).text for i in range(prompts)]
    ids = [torch.tensor(tokenizer.encode(text), device=dev) for text in begun]
    written = continuations(lm, ids, new_tokens=tokens, seeds=range(seeds), temperature=temperature)
    found: dict[str, list[Continuation]] = defaultdict(list)
    for one in tqdm(written, total=prompts * seeds * len(ARMS), unit="text"):
        found[one.arm].append(one)
    rows = [{"arm": arm} | {name: _mean(some, name) for name in MEASURED} for arm, some in found.items()]
    report = {"benchmark": "top-a", **environment(dev), "dtype": "float32", "seed": seed, "alpha": alpha, "rows": rows}
    report |= {"temperature": temperature, "tokens": tokens, "texts": prompts * seeds}
    publish(report, top_a_table(report), out)


def top_a_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
    about = (
        f"{report['device']}, torch {report['torch']}, float32, seed {report['seed']}; {report['texts']} texts, "
        f"{report['tokens']} tokens, per arm; alpha {report['alpha']:g}, temperature {report['temperature']:g}, "
        "Top-P 0.95; mean ± standard error"
    )
    return f"{about}\n\n{markdown(['Top-A', *MEASURED.values()], [_cells(row) for row in report['rows']])}"


def _mean(some: list[Continuation], name: str) -> dict:
    values = [getattr(one, name) for one in some]
    return {"mean": fmean(values), "error": stdev(values) / len(values) ** 0.5 if len(values) > 1 else None}


def _cells(row: dict) -> list[str]:
    errors = {name: row[name]["error"] for name in MEASURED}
    tail = {name: "" if error is None else f" ± {error:.3f}" for name, error in errors.items()}
    return [row["arm"], *(f"{row[name]['mean']:.3f}{tail[name]}" for name in MEASURED)]
