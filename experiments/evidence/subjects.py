"""The models that the study measures: trained where they are missing, and kept in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...common.progress import Stop
from ...lm.model import ProteusLM
from ...lm.recall.recipe import Scale, training_batches, training_recipe
from ...lm.training import Step, train

WORKERS = 2  # processes that prepare texts while another device trains


@dataclass(frozen=True)
class Training:
    """One step of a model's training."""

    name: str
    step: Step
    steps: int  # of the whole run, at most


def prepare(
    scale: Scale, kind: str, seed: int, folder: Path, *, change: str = "", device: str = "cpu",
    stop: Stop | None = None, **changes,
) -> Iterator[Training | ProteusLM]:  # fmt: skip
    """Load the model of a kind and seed from `folder`, or train it and save it there. Yields it last.

    kind: DENSE, trained at alpha 0, or ALPHA, trained at a random alpha in every step. change: a name for `changes`,
    which are other fields of `AttentionConfig`. Raises as `train`, and `ValueError` for a file that holds no model.
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
