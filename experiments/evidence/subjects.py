"""The models that evidence is measured on: how large, what they are trained on, and where they are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...common.progress import Stop
from ...lm.model import ProteusLM
from ...lm.recall.recipe import Scale, training_batches, training_recipe
from ...lm.training import Step, train

WORKERS = 2  # processes that write texts ahead where another device trains


@dataclass(frozen=True)
class Training:
    """A model is being trained."""

    name: str
    step: Step
    steps: int  # of the whole run, at most


def prepare(
    scale: Scale,
    kind: str,
    seed: int,
    folder: Path,
    *,
    change: str = "",
    device: str = "cpu",
    stop: Stop | None = None,
    **changes,
) -> Iterator[Training | ProteusLM]:
    """The model of a kind and seed: read from `folder`, or trained and kept there; last of all it is yielded itself.

    kind: DENSE, trained at alpha 0, or ALPHA, at an alpha drawn anew for every step. change: a name for `changes`,
    other fields of `AttentionConfig`. Raises as `train`, and `ValueError` for a file that holds no model.
    """
    name = "-".join(part for part in (kind, change, str(seed)) if part)
    path = folder / name / "model.safetensors"
    if not path.is_file():
        torch.manual_seed(seed)
        model = ProteusLM(scale.model_config(**changes)).to(device)
        batches, recipe = training_batches(scale, seed), training_recipe(scale, kind, seed)
        workers = 0 if torch.device(device).type == "cpu" else WORKERS
        for step in train(model, batches, recipe, folder=folder / name, device=device, workers=workers, stop=stop):
            yield Training(name, step, recipe.steps)
        model.save(path)
    yield ProteusLM.load(path, device).eval()
