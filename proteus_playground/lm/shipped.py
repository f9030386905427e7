"""The small models that come with the package: their training recipes, and loading them.

The files in `weights/` were written by `proteus train NAME`, which trains a model from its recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import as_file, files

from ..attention import AttentionConfig
from .model import ModelConfig, ProteusLM
from .training import Job, Recipe, Stage

RANDOM = (0.0, 1.0)  # each step draws flux alpha from this interval


def shelf_mini() -> Job:
    """Reads shelves and answers questions about them.

    It has no rotary positions: the convolution shows it which tokens are neighbours, and what it learns at one length
    then also works at others. In training, L at alpha 1 is a sixteenth of the length.
    """
    from .shelf.batches import ShelfBatches
    from .shelf.tokenizer import ShelfTokenizer

    batches = ShelfBatches(ShelfTokenizer(), seed=1, copies=0.1)
    attention = AttentionConfig(
        d_model=128, n_heads=4, n_kv_heads=2, head_dim=32, shortlist=256, dna_fraction=0.75, gates_per_group=128,
        probes=2, head_top_p=0.8, rope_theta=None,
    )  # fmt: skip
    sparse = {"alpha": RANDOM, "top_share": 0.5, "share": 16}
    stages = (
        Stage((128, 256), 1 << 16, 400, 0.0),
        Stage((256, 512, 1024), 1 << 16, 800, **sparse),
        Stage((512, 1024, 2048, 4096), 1 << 16, 2000, **sparse),
    )
    return Job(
        model=ModelConfig(batches.vocab_size, 3, attention, hidden=256, taps=8),
        batches=batches,
        recipe=Recipe(stages, lr=4e-3, warmup=100, cooldown=0.3, weight_decay=0.01, opening=0.3, seed=1),
        description="reads shelves of recipes, receipts, manuals and notes, and answers questions about them",
    )


def recall_mini() -> Job:
    """Answers associative recall tasks; the evidence notebook shows it, and the study trains it as its first model."""
    from .recall.recipe import ALPHA, FULL, training_batches, training_recipe

    description = "looks up the values of keys it has read"
    return Job(FULL.model_config(), training_batches(FULL, 0), training_recipe(FULL, ALPHA, 0), description)


RECIPES: dict[str, Callable[[], Job]] = {"shelf-mini": shelf_mini, "recall-mini": recall_mini}


def shipped_models() -> list[str]:
    """Names of the models whose weights are in this installation."""
    return [name for name in RECIPES if _file(name).is_file()]


def load_shipped(name: str, device: str = "cpu") -> tuple[ProteusLM, object]:
    """A shipped model in evaluation mode, and its vocabulary: a `ShelfTokenizer`, or `Words` for recall-mini.

    Raises `ValueError` for a name that is not shipped, `FileNotFoundError` if its weights are missing.
    """
    if name not in RECIPES:
        raise ValueError(f"name={name!r}: must be one of {', '.join(map(repr, RECIPES))}")
    with as_file(_file(name)) as path:
        model = ProteusLM.load(path, device).eval()
    if name == "shelf-mini":
        from .shelf.tokenizer import ShelfTokenizer

        return model, ShelfTokenizer()
    from .recall.recipe import FULL

    return model, FULL.words


def _file(name: str):
    return files(__package__) / "weights" / f"{name}.safetensors"
