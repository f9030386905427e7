"""The state of pass 1 on disk: the buffer, the next chunk, and the recipe of the run.

The file is always replaced as a whole. A process that is killed at any moment leaves the state after some chunk, and
the next run reads the chunks after it again. Pass 1 has no other state, so it ends with the same buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from ..common import __version__
from ..common.runs import differences
from ..common.tensors import read_tensors, write_tensors
from .buffer import Champions, StreamPlan

FORMAT = 1
NAMES = tuple(field.name for field in fields(Champions))


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors file and the recipe of the run that may write it."""

    path: Path
    recipe: Mapping[str, object]  # plain values; a run with any other value counts as another run

    def load(self) -> tuple[Champions, int] | None:
        """The buffer and the next chunk; None if there is no file.

        Raises `ValueError` for a file of another recipe, naming what differs, and for a file that is no checkpoint.
        """
        if not self.path.exists():
            return None
        tensors, about = read_tensors(self.path, "a checkpointed stream")
        theirs = about.get("recipe")
        found, reached = {name: tensor.numpy() for name, tensor in tensors.items()}, about.get("next_chunk")
        if not isinstance(theirs, dict) or type(reached) is not int or not _is_buffer(found):
            raise ValueError(f"checkpoint={str(self.path)!r}: not a checkpoint of a stream")
        pairs = differences(self.recipe, theirs).items()
        other = [f"{name} is {now!r} now, {there!r} there" for name, (now, there) in pairs]
        if other:
            raise ValueError(
                f"checkpoint={str(self.path)!r}: belongs to another run ({'; '.join(other)}); "
                "start afresh (fresh=True, --fresh) or name another file"
            )
        return Champions(**found), reached

    def save(self, buffer: Champions, next_chunk: int) -> None:
        """`OSError` if the file cannot be written; the earlier file stays."""
        tensors = {name: torch.from_numpy(getattr(buffer, name)) for name in NAMES}
        write_tensors(self.path, tensors, {"recipe": dict(self.recipe), "next_chunk": next_chunk})


def _is_buffer(found: dict[str, np.ndarray]) -> bool:
    """Whether these arrays have a buffer's types, are equally long, and are in order of position."""
    if found.keys() != set(NAMES):
        return False
    empty, position = Champions.none(), found["position"]
    if position.ndim != 1:
        return False
    same_types = all(found[name].dtype == getattr(empty, name).dtype for name in NAMES)
    same_lengths = all(found[name].shape == position.shape for name in NAMES)
    return same_types and same_lengths and bool((np.diff(position, prepend=-1) > 0).all())


def recipe(store, scorer, plan: StreamPlan, rank: int, ranks: int) -> dict[str, object]:
    """Everything that decides the final buffer of a run, under names that an error message can show."""
    return {
        "document": store.fingerprint, "tokens": len(store), "scorer": scorer.fingerprint, **asdict(plan), "rank": rank,
        "ranks": ranks, "version": __version__, "format": FORMAT,
    }  # fmt: skip
