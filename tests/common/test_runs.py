"""Folders of runs that can be resumed: another run is refused by the names that differ, rows survive a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

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


def append_rows(folder: Path) -> None:
    """As `proteus verify` and `proteus duel` go on: rows that are there are skipped, others are added."""
    run = RunFolder(folder, "settings.json", "rows.jsonl")
    run.claim({"seed": 1})
    for number in range(len(run.rows()), ROWS):
        time.sleep(0.002)
        run.append([{"number": number, "text": "tea " * 50}])


def rewrite_rows(folder: Path) -> None:
    """As `proteus evidence` and `proteus bench sweep` go on: one JSON file with all rows so far."""
    path = folder / "rows.json"
    rows = json.loads(path.read_text()) if path.is_file() else []
    for number in range(len(rows), ROWS):
        time.sleep(0.002)
        rows.append({"number": number, "text": "tea " * 50})
        write_json(path, rows)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("work", [append_rows, rewrite_rows])
def test_twenty_kills_leave_every_row_once(work, tmp_path):
    draw, kills, reached = random.Random(0), 0, set()
    while True:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(tmp_path)
                code = 0
            finally:
                os._exit(code)
        if kills < 20:
            time.sleep(draw.uniform(0, 0.03))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        kills += 1
        reached.add(sum(path.stat().st_size for path in tmp_path.glob("rows.json*")))
    rows = read_lines(tmp_path / "rows.jsonl") or json.loads((tmp_path / "rows.json").read_text())
    assert kills == 20 and len(reached) > 5, "hardly any of them came in the middle"
    assert [row["number"] for row in rows] == list(range(ROWS)) and {row["text"] for row in rows} == {"tea " * 50}
