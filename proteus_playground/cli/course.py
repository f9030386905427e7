"""`proteus course build`: the notebooks as two courses, one for the teacher and one for the students.

The notebooks are the one source. A cell's metadata may hold `course`: minutes, wrong (what people get wrong), say (what
to say), and the name of an exercise, whose solution stands in `playground/exercises.py`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

from ..common.files import shipped_notebooks, write_text

BUILDS = ("instructor", "student")
NOTES = {"minutes": "Time", "wrong": "What people get wrong", "say": "What to say"}


def build(out: Path) -> list[Path]:
    """Writes `out`/instructor and `out`/student, a copy of each notebook in both; returns the files, by build and name.

    Other files there stay. Raises `ValueError` for course metadata that is not understood, `OSError`.
    """
    written = []
    for kind in BUILDS:
        (out / kind).mkdir(parents=True, exist_ok=True)
        for path in sorted(shipped_notebooks().glob("*.ipynb")):
            book = json.loads(path.read_text(encoding="utf-8"))
            book["cells"] = [made for cell in book["cells"] for made in _cells(cell, kind, path.name)]
            text = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
            place = out / kind / path.name
            write_text(place, text)
            written.append(place)
    return written


def _cells(cell: dict, kind: str, where: str) -> Iterator[dict]:
    """What a cell of the source becomes: itself without its notes, and for the teacher also notes and solution."""
    cell = copy.deepcopy(cell)
    notes = cell["metadata"].pop("course", None)
    yield cell
    if notes is None or kind == "student":
        return
    if unknown := set(notes) - {*NOTES, "exercise"}:
        raise ValueError(f"{where}: course metadata {min(unknown)!r}: allowed is {', '.join(NOTES)}, exercise")
    lines = [f"- *{title}:* {notes[name]}{' minutes' if name == 'minutes' else ''}"
             for name, title in NOTES.items() if name in notes]  # fmt: skip
    yield _made(f"{cell['id']}-notes", "markdown", "\n".join(["**For the teacher**", "", *lines]))
    if "exercise" in notes:
        from ..playground.exercises import EXERCISES

        name = notes["exercise"]
        solution = EXERCISES[name].solution
        code = f'# A solution\n{solution}\n\n\ncheck("{name}", {_name_in(solution)})'
        yield _made(f"{cell['id']}-solution", "code", code)


def _name_in(solution: str) -> str:
    """What a solution defines: "def keep(" -> "keep", "mine = (" -> "mine"."""
    first = next(line for line in solution.splitlines() if line.startswith("def ") or " = " in line)
    return first.removeprefix("def ").split("(")[0].split(" =")[0]


def _made(name: str, kind: str, text: str) -> dict:
    cell = {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
