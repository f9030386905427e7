"""A training run on disk: one file with all that a resumed run needs, and a log with one line per step.

The log is written before the state that counts its last step. When a run resumes, lines that are newer than the state
are removed. So the log holds each step exactly once, wherever the run was interrupted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ...common.files import append_lines, read_lines, write_text
from ...common.runs import as_json, flat, refuse_other
from ...common.tensors import read_tensors, write_tensors

STATE, LOG = "state.safetensors", "log.jsonl"


@dataclass(frozen=True)
class Saved:
    """The content of `state.safetensors`."""

    tensors: dict[str, Tensor]
    position: dict
    scaler: dict


class Store:
    """The folder of one run."""

    def __init__(self, folder: str | Path, run: dict):
        """run: describes model, recipe and batches, as JSON can hold it; a folder of another run is refused."""
        self.folder, self.run = Path(folder), as_json(run)
        self._lines: list[dict] = []

    def load(self) -> Saved | None:
        """The state to go on from, None in a new folder. `ValueError` if the folder holds something else."""
        if not (self.folder / STATE).is_file():
            if (self.folder / LOG).is_file():  # the run ended before it was first saved
                self._cut(0)
            return None
        tensors, about = read_tensors(self.folder / STATE, "training")
        if not (isinstance(about, dict) and {"run", "place", "scaler"} <= set(about)):
            raise ValueError(f"folder={str(self.folder)!r}: its {STATE} is not of a training run")
        there, now = flat(about["run"]), flat(self.run)
        # Only settings that were saved are compared: a newer version may have added some.
        refuse_other(f"folder={str(self.folder)!r}", {name: now.get(name) for name in there}, there)
        self._cut(about["place"]["step"])
        return Saved(tensors, about["place"], about["scaler"])

    def log(self, step) -> None:
        """Add a `Step` to the log; `save` writes it to disk."""
        self._lines.append({name: value for name, value in asdict(step).items() if value is not None})

    def save(self, tensors: dict[str, Tensor], position: dict, scaler: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        append_lines(self.folder / LOG, self._lines)
        self._lines.clear()
        write_tensors(self.folder / STATE, tensors, {"run": self.run, "place": position, "scaler": scaler})

    def _cut(self, step: int) -> None:
        """Remove the log's lines after `step`."""
        try:
            kept = [line for line in read_lines(self.folder / LOG) if line["step"] <= step]
        except (ValueError, TypeError, KeyError) as err:
            raise ValueError(f"folder={str(self.folder)!r}: its {LOG} is not of a training run ({err!r})") from err
        if len(kept) != step:
            problem = f"its {LOG} has {len(kept):,} of the {step:,} steps that {STATE} was saved after"
            raise ValueError(f"folder={str(self.folder)!r}: {problem}, so it has lost lines: allowed is a whole run")
        write_text(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in kept))
