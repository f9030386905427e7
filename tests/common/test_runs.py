"""Folders of runs that can be resumed: another run is refused by the names that differ, rows survive a kill."""

from __future__ import annotations

import pytest

from proteus_playground.common.runs import RunFolder, differences, flat, refuse_other


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
