"""The study: every cell measured once, resumed to the same rows, and a report that says what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest
import torch
from proteus_playground.experiments.evidence import command
from proteus_playground.experiments.evidence import report as reports
from proteus_playground.experiments.evidence import study as studies
from proteus_playground.experiments.evidence.arms import ARMS
from proteus_playground.experiments.evidence.changes import CHANGES, in_training, with_gates
from proteus_playground.experiments.evidence.spread import spread
from proteus_playground.experiments.evidence.study import OURS, Cell, CellResult, StudySettings, cells, load, study
from proteus_playground.experiments.evidence.subjects import Training
from proteus_playground.experiments.intervals import over_seeds
from small_words import WORDS, small_model

from proteus_playground.cli import app as cli
from proteus_playground.common.progress import Stopped
from proteus_playground.lm.model import ProteusLM
from proteus_playground.lm.recall.recipe import PRESETS, Scale, training_batches
from proteus_playground.lm.recall.tasks import TASKS

SCALE = Scale(width=16, gates=4, stages=((32, 3), (48, 2)), things=(4,), questions=4, warm_up=1, tokens=96, words=WORDS)
ASKED = StudySettings(lengths=(32, 64), things=(4, 16), arms=("dense", "local", "oracle", OURS), seeds=2, cases=40)


@pytest.fixture(scope="module")
def few_tokens():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "TOKENS_PER_BATCH", 1024)
        patch.setattr(studies, "CALIBRATION", 1024)
        yield


@pytest.fixture(scope="module")
def measured(few_tokens, tmp_path_factory):
    """A small study that was run once: its folder and all its events."""
    folder = tmp_path_factory.mktemp("evidence")
    torch.set_num_threads(1)
    return folder, list(study(SCALE, ASKED, folder / "evidence_tiny.json", folder / "models"))


def rows_of(events) -> list[CellResult]:
    return [event for event in events if isinstance(event, CellResult)]


def test_a_study_measures_every_cell_that_fits_once(measured):
    folder, events = measured
    rows = rows_of(events)
    assert [row.cell for row in rows] == cells(SCALE, ASKED)
    places = {(row.cell.length, row.cell.things) for row in rows}
    assert places == {(32, 4), (64, 4), (64, 16)}  # 16 pairs do not fit 32 tokens
    assert len(rows) == 3 * 4 * 2 and len({row.cell for row in rows}) == len(rows)
    for row in rows:
        assert row.cases >= 40 and 0 <= row.right <= row.cases and row.keys <= row.cell.shortlist
        assert row.cell.arm != "dense" or row.keys > row.cell.length / 2  # who answers stands in the second half
    steps = [event for event in events if isinstance(event, Training)]
    assert {step.name for step in steps} == {"dense-0", "alpha-0", "dense-1", "alpha-1"} and len(steps) == 4 * 5
    assert all(step.step.alpha == 0 for step in steps if step.name.startswith("dense"))
    assert load(folder / "evidence_tiny.json", SCALE) == rows


def test_a_study_goes_on_and_gives_what_it_would_have_given(measured, tmp_path):
    folder, events = measured
    again = rows_of(study(SCALE, ASKED, folder / "evidence_tiny.json", tmp_path / "no models"))
    assert again == rows_of(events) and not (tmp_path / "no models").exists()  # nothing is measured twice
    few = replace(ASKED, arms=("local",), lengths=(64,), seeds=1, cases=10_000)
    more = rows_of(
        study(SCALE, few, shutil.copy(folder / "evidence_tiny.json", tmp_path / "more.json"), folder / "models")
    )
    assert min(row.cases for row in more) >= 10_000 and len(load(tmp_path / "more.json")) == len(again)
    out, stopped = tmp_path / "part.json", []
    with pytest.raises(Stopped):
        for event in study(SCALE, ASKED, out, folder / "models", stop=lambda: len(stopped) == 5):
            stopped.append(event)
    assert [row.cell for row in load(out)] == cells(SCALE, ASKED)[:5]
    rest = rows_of(study(SCALE, ASKED, out, folder / "models"))
    assert [(row.cell, row.right, row.cases, row.keys) for row in rest] == [
        (row.cell, row.right, row.cases, row.keys) for row in rows_of(events)
    ]


def test_processes_measure_what_one_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "TOKENS_PER_BATCH", 1 << 14)  # as the other processes have it
    asked = replace(ASKED, arms=("local", OURS), lengths=(64,), things=(4,), cases=10)
    once = rows_of(study(SCALE, asked, tmp_path / "one.json", tmp_path / "models"))
    models = shutil.copytree(tmp_path / "models", tmp_path / "others")
    shutil.rmtree(models / "alpha-1")  # is trained again
    many = list(study(SCALE, asked, tmp_path / "two.json", models, processes=2))
    last, rows = many[0], rows_of(many)
    assert isinstance(last, Training) and (last.name, last.step.step, len(many)) == ("alpha-1", last.steps, 5)
    found = {row.cell: (row.right, row.cases, row.keys) for row in rows}
    assert found == {row.cell: (row.right, row.cases, row.keys) for row in once}
    assert {row.cell for row in load(tmp_path / "two.json", SCALE)} == {*found}


def stuck(item: int, device: str) -> int:
    sleep(600 if item else 0)
    return item


def test_processes_end_when_they_are_stopped():
    began, done = monotonic(), []
    with pytest.raises(Stopped):
        done.extend(spread(stuck, range(3), "cpu", 2, stop=lambda: monotonic() - began > 5))
    assert monotonic() - began < 60
    with pytest.raises(TypeError):
        list(spread(len, (1,), "cpu", 10**9))  # no more processes than items
    with pytest.raises(ChildProcessError, match="processes=2: one of them ended without a result"):
        list(spread(leave, range(2), "cpu", 2))
    assert list(spread(leave, (), "cpu", 2)) == []


def leave(item: int, device: str) -> None:
    os._exit(9)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    """Also where that one is killed and cannot clean up."""
    code = "import sys; sys.path[:0] = sys.argv[1:]\nfrom test_evidence_study import sleepers\n"
    code += "if __name__ == '__main__': sleepers()"
    (tmp_path / "start.py").write_text(code)
    places = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    parent = subprocess.Popen([sys.executable, tmp_path / "start.py", *places], stdout=subprocess.PIPE, text=True)
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    ends = monotonic() + 30
    while any(map(psutil.pid_exists, pids)) and monotonic() < ends:
        sleep(0.2)
    assert not any(map(psutil.pid_exists, pids))


def sleepers() -> None:
    list(spread(say_and_sleep, range(2), "cpu", 2))


def say_and_sleep(item: int, device: str) -> None:
    print(os.getpid(), flush=True)
    sleep(600)


def test_a_file_of_another_scale_is_refused(measured, tmp_path):
    folder, _ = measured
    with pytest.raises(ValueError, match="another scale"):
        next(study(replace(SCALE, width=32), ASKED, folder / "evidence_tiny.json", folder))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="proteus evidence wrote"):
        load(tmp_path / "x.json")
    with pytest.raises(ValueError, match="have learned: mqar"):
        cells(SCALE, replace(ASKED, tasks=("copying",)))
    for bad in ({"arms": ("best",)}, {"changes": ("all",)}, {"tasks": ("x",)}, {"seeds": 0}, {"lengths": (0,)}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            replace(ASKED, **bad)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_one_that_can_be_learned_and_asked(name):
    scale = PRESETS[name]
    first, last = scale.stages[0][0], scale.stages[-1][0]
    rows = training_batches(scale, 0).then.tasks[1:]
    few, many = min(scale.things), max(scale.things)
    assert len(rows) == len(scale.tasks) * len(scale.things)
    assert all(row.min_length() <= (first if row.things == few else last) for row in rows) and many > few
    assert len(cells(scale, replace(command.SETTINGS[name], tasks=scale.tasks))) > 50
    assert max(length for length in command.SETTINGS[name].lengths) >= 4 * last  # beyond what was trained


def test_prototypes_of_a_dense_model_are_fitted_and_those_of_alpha_are_its_own(measured):
    folder, _ = measured
    for kind, own in (("dense", False), ("alpha", True)):
        saved = ProteusLM.load(folder / "models" / f"{kind}-0" / "model.safetensors")
        cell = next(cell for cell in cells(SCALE, ASKED) if cell.subject == (kind, ""))
        (used,) = studies._subject(SCALE, cell, folder / "models", "cpu", None)
        same = torch.equal(used.blocks[0].attn.gates.prototypes, saved.blocks[0].attn.gates.prototypes)
        assert same == own and torch.equal(used.embed.weight, saved.embed.weight)


def test_every_change_changes_what_it_says(measured, tmp_path):
    """Each is measured on a row of its own, and none but the routed ones trains a model that another one has."""
    folder, _ = measured
    asked = replace(ASKED, arms=(), changes=tuple(CHANGES), lengths=(64,), things=(4,), shares=(2,), seeds=1, cases=10)
    events = list(study(replace(SCALE, heads=4, gates=8, nearest_gates=True), asked, tmp_path / "x.json", tmp_path))
    rows = {row.cell.change: row for row in rows_of(events)}
    assert list(rows) != [] and set(rows) == set(CHANGES)
    trained = {event.name for event in events if isinstance(event, Training)}
    assert len(trained) == 1 + 2 + 2 + 3  # as it is, two speeds, two training_batches, three of shared keys
    as_it_is = rows["as it is"]
    assert rows["no notes"].keys < as_it_is.keys and rows["keep 1/2 of the tokens"].keys < as_it_is.keys
    assert rows["rings of the most salient"].keys == pytest.approx(as_it_is.keys, rel=0.02)
    with pytest.raises(ValueError, match="heads=3"):
        in_training(CHANGES["two heads share keys"], 3)


def test_gates_can_be_exchanged_without_touching_a_weight():
    model = small_model()
    other = with_gates(model, 9)
    assert other.blocks[0].attn.gates.prototypes.shape[1] == 9 and model.blocks[0].attn.gates.prototypes.shape[1] == 4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# -- the report ---------------------------------------------------------------------------------------------------


def made_up(arm: str, seed: int, right: int, **other) -> CellResult:
    cell = {"task": "mqar", "length": 64, "things": 4, "arm": arm, "shortlist": 8, "seed": seed, **other}
    return CellResult(Cell(**cell), right, 100, 8.0, 1.0, "a CPU")


def test_intervals_are_students_over_seeds():
    assert over_seeds([0.7]) is None
    low, high = over_seeds([0.5, 0.6, 0.7])
    assert low == pytest.approx(0.6 - 4.303 * 0.1 / 3**0.5, abs=1e-4) and high == pytest.approx(1.2 - low, abs=1e-4)
    assert over_seeds([0.9, 1.0, 0.95])[1] == 1.0
    assert over_seeds([0.25, 0.75]) == (0.0, 1.0)  # 0.5 +- 12.706 * 0.354 / sqrt(2)
    assert over_seeds([0.5] * 3) == (0.5, 0.5)


def test_entries_sentences_and_tables_say_what_the_rows_say():
    rows = [made_up("dense", seed, 100, shortlist=64) for seed in range(3)]
    rows += [made_up(OURS, seed, 90 + seed) for seed in range(3)] + [made_up("quest", seed, 95) for seed in range(3)]
    rows += [
        replace(made_up("oracle", 0, 99), looks=40.0),
        made_up(OURS, 0, 40, change="no notes"),
        made_up(OURS, 0, 90, change="as it is"),
    ]
    entries = reports.summarise(rows)
    ours = next(entry for entry in entries if entry.arm == OURS and not entry.change)
    assert ours.accuracy == pytest.approx(0.91) and ours.seeds == 3 and ours.cases == 300
    assert ours.low == pytest.approx(0.91 - 4.303 * 0.01 / 3**0.5, abs=1e-4)
    (line,) = reports.sentences(entries)
    assert "0.910 of dense" in line and "better: quest (0.950)" in line and "oracle" not in line
    text = reports.tables(entries)
    assert "| dense | 1.000 [1.000, 1.000] · 8 |" in text and "| oracle | 0.990 · 8 + 40 |" in text
    assert text.index("as it is") < text.index("no notes") and "T 64, 4 planted, L 8" in text
    assert len([line for line in text.splitlines() if line.startswith("| T") or "planted" in line]) == 2


def test_a_name_can_stand_in_a_list():
    assert not [name for name in (*ARMS, *CHANGES, *TASKS) if "," in name]


def test_the_command_prints_and_fills_the_page(measured, tmp_path, capsys):
    folder, events = measured
    fields = json.dumps({name: value for name, value in SCALE.to_dict().items() if value != Scale().to_dict()[name]})
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- evidence_tiny:begin -->\nold\n<!-- evidence_tiny:end -->\nafter\n")
    out = str(folder / "evidence_tiny.json")
    same = ["--scale", fields, "--lengths", "32,64", "--pairs", "4,16", "--seeds", "2", "--cases", "40",
            "--arms", f"dense,local,oracle,{OURS}", "--models", str(folder / "models")]  # fmt: skip
    for args in (same, ["--report"]):
        with pytest.raises(SystemExit) as left:
            cli.main(["evidence", "--out", out, "--page", str(page), *args])
        printed = capsys.readouterr().out
        assert left.value.code == 0 and "**mqar, arms**" in printed and printed.count("2 layers, width 16") == 1
        filled = page.read_text()
        assert filled.startswith("before\n") and filled.endswith("\nafter\n") and "old" not in filled
        assert printed.strip() in filled
    assert load(folder / "evidence_tiny.json") == rows_of(events)
    for bad, message in (
        (["--out", str(tmp_path / "none.json"), "--report"], "holds no finished cell"),
        (["--out", out, "--report", "--page", str(tmp_path / "evidence.md")], "evidence.md"),
        (["--scale", '{"wide": 3}'], "--scale"),
        (["--arms", "best"], "--arms"),
        (["--out", str(tmp_path / "new.json"), "--lengths", "32", "--pairs", "64"], "must leave something to measure"),
        (["--device", "mps"], "--device"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["evidence", *bad])
        assert left.value.code in (1, 2) and message in capsys.readouterr().err
