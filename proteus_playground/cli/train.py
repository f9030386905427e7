"""`proteus train`: train one of the shipped models again, or continue a run that was stopped."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from ..common.checks import real_number
from ..common.files import check_place
from ..common.options import Device, Folder, Precision, choose, pick_device
from ..common.processes import together
from ..common.progress import Stopped
from ..lm.model import ProteusLM
from ..lm.training import Job, Step, read_log, train

MODEL = "model.safetensors"


def train_command(
    name: Annotated[str, typer.Argument(help="A shipped model; a wrong name prints the list.")],
    out: Folder,
    steps: Annotated[
        int | None, typer.Option(help="Stop after so many steps; the same command goes on.", min=1)
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes; the same command goes on.")] = None,
    device: Device = "cpu",
    precision: Precision = "auto",
    every: Annotated[int, typer.Option(help="Steps between measurements of gates and heads.", min=1)] = 50,
    start: Annotated[Path | None, typer.Option(help="Model file to begin with, instead of random weights.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that prepare texts; useful on a GPU.", min=0)] = 0,
) -> None:
    """Train a shipped model by its recipe.

    Under torchrun, all processes train it together.
    """
    from ..lm.shipped import RECIPES

    make, where = choose("NAME", name, RECIPES), pick_device(device)
    check_place(out / MODEL, "--out")
    with together(where) as (rank, _):
        job = make()
        if rank == 0:
            typer.echo(job.description)
        torch.manual_seed(job.recipe.seed)
        model = ProteusLM(job.model) if start is None else ProteusLM.load(start)
        if model.cfg != job.model:
            raise ValueError(f"start={str(start)!r} holds a model of another shape than {name}")
        run(job, model, out, steps, minutes, where, precision, every, workers, quiet=rank > 0)
        if rank == 0:
            typer.echo(f"Model: {model.save(out / MODEL)}")


def run(
    job: Job, model: ProteusLM, out: Path, steps: int | None, minutes: float | None, device: torch.device,
    precision: str, every: int, workers: int = 0, quiet: bool = False,
) -> None:  # fmt: skip
    """Train until the recipe, the steps or the minutes end; print a line if the recipe was not finished."""
    if minutes is not None:
        real_number("minutes", minutes, 0, above=True)
    ends, at = monotonic() + 60 * (minutes or 1e9), 0  # steps done

    def stop() -> bool:
        return monotonic() > ends or (steps is not None and at >= steps)

    options = {"folder": out, "every": every, "device": device, "precision": precision, "workers": workers}
    training = train(model, job.batches, job.recipe, stop=stop, **options)
    at = len(read_log(out))
    with tqdm(total=job.recipe.steps, disable=quiet, unit="step", mininterval=1, initial=at) as bar:
        try:
            for step in training:
                at = step.step
                bar.update(at - bar.n)
                if step.density is not None:
                    bar.set_postfix_str(describe(step))
        except (KeyboardInterrupt, Stopped):
            if not quiet:
                typer.echo(f"Stopped after {at:,} steps. The same command goes on.", err=True)


def describe(step: Step) -> str:
    """Loss, alpha, length and speed of a step, in one line."""
    return f"loss {step.loss:.3f} at alpha {step.alpha:.2f}, T {step.length:,}, {step.tokens_per_second:,.0f} tokens/s"
