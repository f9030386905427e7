"""Train a model: one generator for the command line, the tests and the notebooks; Stop stops iterating."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import torch

from ...common.checks import whole_number
from ...common.files import check_place, read_lines
from ...common.progress import Stop, Stopped
from ..model import ProteusLM
from . import ranks
from .recipe import Batches, Recipe
from .run import Run, Step
from .store import LOG, STATE, Store


def train(
    model: ProteusLM,
    batches: Batches,
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    every: int = 10,
    device: str | torch.device | None = None,
    precision: str = "auto",
    save_seconds: float = 30.0,
    workers: int = 0,
    stop: Stop | None = None,
) -> Iterator[Step]:
    """Train `model` in place and yield a `Step` after each; at the end the model is in evaluation mode.

    folder: where the run is saved, every save_seconds, at its end, and when it is stopped between two steps; the same
    call goes on from there, bit for bit on the CPU. every: how often gates and memory are looked at. device: default
    the model's. precision: auto, float32, bfloat16 or float16. workers: processes that write texts ahead. Under
    `torchrun` (inside `streaming.run.together`) each process reads batches of its own. Raises `ValueError` for a
    folder of another run, `FloatingPointError` where the loss is not finite, `Stopped`, `OSError`.
    """
    whole_number("every", every, 1)
    whole_number("workers", workers, 0)
    if batches.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"batches.vocab_size={batches.vocab_size}: must be at most the model's {model.cfg.vocab_size}")
    run = Run(model, batches, recipe, torch.device(device or model.embed.weight.device), precision, workers)
    store = None
    if folder is not None:
        store = Store(folder, run.about())
        run.restore(store.load())
        check_place(store.folder / STATE)
    ranks.same_start(model)
    return _steps(run, store, every, save_seconds, stop)


def read_log(folder: str | Path) -> list[Step]:
    """The steps that a folder's run has logged."""
    return [Step(**line) for line in read_lines(Path(folder) / LOG)]


def _steps(run: Run, store: Store | None, every: int, save_seconds: float, stop: Stop | None) -> Iterator[Step]:
    saved, last, between = run.place.step, monotonic(), True
    store = store if ranks.place()[0] == 0 else None

    def save() -> None:
        nonlocal saved, last
        if store is not None and saved != run.place.step:
            store.save(*run.state())
            saved, last = run.place.step, monotonic()

    try:
        while run.place.stage_of(run.recipe) is not None:
            if ranks.total([float(stop is not None and stop())], run.device)[0]:
                raise Stopped("stopped on request")
            between = False  # what is half done here must not be saved
            measured = run.place.step == 0 or (run.place.step + 1) % every == 0 or run.place.left(run.recipe) == 1
            step = run.advance(measured)
            between = True
            if store is not None:
                store.log(step)
                if monotonic() - last >= save_seconds:
                    save()
            yield step
    finally:
        if between:
            save()
        run.model.eval()
