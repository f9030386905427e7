"""Runs that can be stopped and resumed: which run a folder belongs to, and the rows that it holds so far.

A run writes its settings down before its first row. A later run in the same folder must have the same settings, and
skips the rows that are there. Every file is written whole or line by line, so a kill loses at most the row in work.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .files import append_lines, check_folder, file_place, read_lines, write_json


def as_json(values: object) -> object:
    """`values` as they come back from a JSON file: tuples are lists, keys are strings."""
    return json.loads(json.dumps(values))


def flat(values: Mapping, head: str = "") -> dict[str, object]:
    """Nested dictionaries as one: {"recipe": {"lr": 1}} becomes {"recipe.lr": 1}."""
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= flat(value, f"{head}{name}.") if isinstance(value, Mapping) else {head + name: value}
    return found


def differences(now: Mapping, there: Mapping) -> dict[str, tuple[object, object]]:
    """(value now, value there) of every name whose values differ; a missing value counts as None."""
    pairs = {name: (now.get(name), there.get(name)) for name in (*now, *there)}
    return {name: (new, old) for name, (new, old) in pairs.items() if new != old}


def refuse_other(where: str, now: Mapping, there: Mapping, kind: str = "run") -> None:
    """Raise `ValueError` naming the settings in which the run of `where`, such as "out='x'", is not this one."""
    other = sorted(differences(now, there))
    if other:
        raise ValueError(
            f"{where} holds a {kind} with other settings ({', '.join(other)}): "
            "allowed is an empty folder, or the same settings to go on"
        )


@dataclass(frozen=True)
class RunFolder:
    """A folder of one run: a JSON file of settings, a file with one row of JSON per line, and files written later."""

    folder: Path
    settings_name: str
    rows_name: str
    report_names: tuple[str, ...] = ()

    def settings(self) -> dict | None:
        """The settings of the run in the folder; None where there is none, {} where the file holds no settings.

        Raises `OSError` where the folder, or a file of the run, cannot be written.
        """
        check_folder(self.folder, "out")
        for name in (self.settings_name, self.rows_name, *self.report_names):
            file_place(self.folder / name, "out")
        path = self.folder / self.settings_name
        if not path.is_file():
            return None
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            there = {}
        return there if isinstance(there, dict) else {}

    def claim(self, settings: dict) -> None:
        """Write `settings` into an empty folder. Raises `ValueError` where the folder belongs to another run."""
        there = self.settings()
        if there is None:
            self.write_settings(settings)
        else:
            refuse_other(f"out={str(self.folder)!r}", as_json(settings), there)

    def write_settings(self, settings: dict) -> None:
        write_json(self.folder / self.settings_name, settings)

    def append(self, rows: Iterable[dict]) -> None:
        """Add rows; they are on disk when this returns."""
        append_lines(self.folder / self.rows_name, rows)

    def rows(self) -> list[dict]:
        """All rows so far, except a last one that a kill cut short. Raises `ValueError` for a line that is no JSON."""
        return read_lines(self.folder / self.rows_name)
