"""Folders of runs that can be resumed: another run is refused by the names that differ, rows survive a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kills import run_through_kills

from proteus_playground.common.files import read_lines, write_json
from proteus_playground.common.runs import RunFolder, differences, flat, refuse_other

ROWS = 150  # of a run that is killed twenty times


def test_a_folder_belongs_to_one_run(tmp_path):
    run = RunFolder(tmp_path / "out", "settings.json", "rows.jsonl")
    assert run.settings() is None and run.rows() == []
    run.claim({"lengths": (1, 2), "seed": 0})
    run.append([{"row": 1}, {"row": 2}])
    run.claim({"lengths": (1, 2), "seed": 0})  # tuples come back as lists and are the same settings
    with pytest.raises(ValueError, match=r"out='.*' holds a run with other settings \(depth, seed\): allowed is"):
        run.claim({"lengths": (1, 2), "seed": 1, "depth": 3})
    path = run.folder / "rows.jsonl"
    path.write_bytes(path.read_bytes() + b'{"row": 3')  # a kill while writing
    assert run.rows() == [{"row": 1}, {"row": 2}]
    run.append([{"row": 4}])
    assert run.rows() == [{"row": 1}, {"row": 2}, {"row": 4}]


@pytest.mark.parametrize("text", ["[1]", "nonsense"])
@pytest.mark.bad_input
def test_a_file_that_holds_no_settings_is_another_run(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        RunFolder(tmp_path, "settings.json", "rows.jsonl").claim({"seed": 0})


def test_differences_are_named_in_order():
    now, there = {"b": 1, "a": {"x": 1, "y": 2}}, {"b": 1, "a": {"x": 1, "y": 3}, "c": 4}
    assert differences(flat(now), flat(there)) == {"a.y": (2, 3), "c": (None, 4)}
    with pytest.raises(ValueError, match=r"folder='f' holds a duel with other settings \(a.y, c\)"):
        refuse_other("folder='f'", flat(now), flat(there), "duel")


def append_rows(folder: Path, step: Callable[[], None]) -> None:
    """As `proteus verify` and `proteus duel` go on: rows that are there are skipped, others are added."""
    run = RunFolder(folder, "settings.json", "rows.jsonl")
    run.claim({"seed": 1})
    for number in range(len(run.rows()), ROWS):
        step()
        run.append([{"number": number, "text": "tea " * 50}])


def rewrite_rows(folder: Path, step: Callable[[], None]) -> None:
    """As `proteus evidence` and `proteus bench sweep` go on: one JSON file with all rows so far."""
    path = folder / "rows.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    for number in range(len(rows), ROWS):
        step()
        rows.append({"number": number, "text": "tea " * 50})
        write_json(path, rows)


@pytest.mark.parametrize("work", [append_rows, rewrite_rows])
def test_twenty_kills_leave_every_row_once(work, tmp_path):
    run_through_kills(work, tmp_path, kills=20, span=6)
    rows = read_lines(tmp_path / "rows.jsonl") or json.loads((tmp_path / "rows.json").read_text())
    assert [row["number"] for row in rows] == list(range(ROWS)) and {row["text"] for row in rows} == {"tea " * 50}
