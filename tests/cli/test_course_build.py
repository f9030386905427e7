"""`proteus course build`: students get no solution and no notes, the teacher gets both, and every solution is right."""

from __future__ import annotations

import json
import re

from typer.testing import CliRunner

from proteus_playground.cli.app import app
from proteus_playground.cli.course import build
from proteus_playground.common.files import shipped_notebooks
from proteus_playground.playground.exercises import EXERCISES


def source(cell: dict) -> str:
    return "".join(cell["source"])


def test_one_source_makes_two_builds(tmp_path, capsys):
    done = CliRunner().invoke(app, ["course", "build", "--out", str(tmp_path)])
    names = sorted(path.name for path in shipped_notebooks().glob("*.ipynb"))
    assert done.exit_code == 0 and f"{len(names)} notebooks each" in done.output
    exercises = set()
    for name in names:
        books = {kind: json.loads((tmp_path / kind / name).read_text("utf-8")) for kind in ("instructor", "student")}
        cells = {kind: book["cells"] for kind, book in books.items()}
        assert all("course" not in cell["metadata"] for kind in cells for cell in cells[kind])
        assert len({cell["id"] for cell in cells["instructor"]}) == len(cells["instructor"])
        student = "\n".join(map(source, cells["student"]))
        assert "For the teacher" not in student and "# A solution" not in student
        assert all("raises-exception" in cell["metadata"]["tags"] for cell in cells["student"] if "..." in source(cell)
                   and cell["cell_type"] == "code")  # fmt: skip
        tags = [tag for cell in cells["student"] for tag in cell["metadata"].get("tags", ())]
        assert tags.count("predict") >= 1 and tags.count("exercise") == 1, name
        extra = [cell for cell in cells["instructor"] if cell["id"].endswith(("-notes", "-solution"))]
        assert [cell for cell in cells["instructor"] if cell not in extra] == cells["student"]
        notes = "\n".join(source(cell) for cell in extra if cell["cell_type"] == "markdown")
        assert all(title in notes for title in ("Time", "What people get wrong", "What to say")), name
        (solution,) = (source(cell) for cell in extra if cell["cell_type"] == "code")
        asked = next(source(cell) for cell in cells["student"] if "exercise" in cell["metadata"].get("tags", ()))
        exercises |= {name for name in EXERCISES if f'check("{name}"' in asked and f'check("{name}"' in solution}
        imported, call = asked.split("\n")[0], re.search(r"^hint\(.*?, 0\)", asked, re.M).group(0)
        exec(f"{imported}\n{call.replace(', 0', ', 1')}", {})
        assert capsys.readouterr().out.startswith("Hint 1 of"), name
        exec("from proteus_playground.playground.course import check, hint\n" + solution, {})
        assert "Right." in capsys.readouterr().out
    assert exercises == set(EXERCISES)


def test_a_second_build_gives_the_same_files(tmp_path):
    first = {path: path.read_bytes() for path in build(tmp_path)}
    assert {path: path.read_bytes() for path in build(tmp_path)} == first
