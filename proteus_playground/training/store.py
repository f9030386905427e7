"""A run on disk: one file with all that a resumed run needs, and a log with a line per step.

The log is on disk before the state that counts its last step, and lines past the state are dropped when a run goes on:
however it was stopped, each step stands there once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ..files import whole
from ..tensors import read_tensors, write_tensors

STATE, LOG = "state.safetensors", "log.jsonl"


@dataclass(frozen=True)
class Saved:
    """What `state.safetensors` holds."""

    tensors: dict[str, Tensor]
    place: dict
    scaler: dict


class Store:
    """The folder of one run."""

    def __init__(self, folder: Path, run: dict):
        """run: what model, recipe and batches are, as JSON can hold it; a folder of another run is refused."""
        self.folder, self.run = Path(folder), json.loads(json.dumps(run))
        self._lines: list[dict] = []

    def load(self) -> Saved | None:
        """The state to go on from, None in a new folder. ValueError where the folder holds something else."""
        if not (self.folder / STATE).is_file():
            if (self.folder / LOG).is_file():  # of a run that ended before its first save
                self._cut(0)
            return None
        tensors, about = read_tensors(self.folder / STATE, "training")
        there = about.get("run", {})
        other = [name for name in _names(there) if _at(self.run, name) != _at(there, name)]  # settings may be newer
        if other:
            raise ValueError(
                f"folder={str(self.folder)!r} holds a run with other settings ({', '.join(other)}): "
                "allowed is an empty folder, or the same settings to go on"
            )
        self._cut(about["place"]["step"])
        return Saved(tensors, about["place"], about["scaler"])

    def log(self, step) -> None:
        """Note a `Step`; it is on disk once the state is."""
        self._lines.append({name: value for name, value in asdict(step).items() if value is not None})

    def save(self, tensors: dict[str, Tensor], place: dict, scaler: dict) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        append_lines(self.folder / LOG, self._lines)
        self._lines.clear()
        write_tensors(self.folder / STATE, tensors, {"run": self.run, "place": place, "scaler": scaler})

    def _cut(self, step: int) -> None:
        kept = [line for line in read_lines(self.folder / LOG) if line["step"] <= step]
        with whole(self.folder / LOG) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def append_lines(path: Path, lines: Iterable[dict]) -> None:
    """Add lines of JSON to a file, in place of one that a kill cut short, and wait until they are on disk."""
    whole_lines = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
    with open(path, "ab") as file:
        file.truncate(whole_lines)
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict]:
    """A file's lines of JSON, none where there is no file; one that a kill cut short is left out."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _names(values: dict, head: str = "") -> Iterable[str]:
    """Dotted names of all values in nested dicts."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _names(value, f"{head}{key}.")
        else:
            yield head + key


def _at(values: dict, name: str) -> object:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values
