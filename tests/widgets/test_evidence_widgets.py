"""The evidence panel without a browser: what is committed, what is chosen, what is measured here."""

from __future__ import annotations

import threading
import time

import made_study
import pytest
from proteus_playground.experiments.evidence import committed as found
from proteus_playground.experiments.evidence.arms import ARMS
from proteus_playground.experiments.evidence.report import summarise
from proteus_playground.experiments.evidence.study import OURS, measure_cell
from proteus_playground.widgets import evidence_panel

from proteus_playground.common.progress import Stopped
from proteus_playground.lm.recall.tasks import TASKS


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    return found.committed(made_study.write(tmp_path_factory.mktemp("studies")))


@pytest.fixture
def panel(studies, monkeypatch):
    model = made_study.recall()
    monkeypatch.setattr(found, "_recall_mini", lambda: model)
    made = evidence_panel(studies, cases=60)
    yield made
    made.close()


def entry(panel, arm: str, length: int = 128):
    panel.choices["length"].value = length
    panel.choices["arm"].value = arm
    return panel.entry


def test_a_study_is_read_as_it_was_written(studies):
    (study,) = studies
    assert study.name == "made up" and "made up" not in study.note and "2 layers" in study.note
    assert list(study.entries) == summarise(made_study.rows())
    assert study.shares(list(study.entries)) == [8]


def test_a_file_that_is_no_study_is_named(tmp_path):
    (tmp_path / "evidence_broken.json").write_text("{}")
    with pytest.raises(ValueError, match="evidence_broken"):
        found.committed(tmp_path)


def test_the_committed_studies_are_where_the_package_looks():
    assert found.folder().is_dir() and found.folder().name == "results"
    for study in found.committed():
        assert study.entries and study.note


def test_it_opens_with_ours_at_the_longest_length(panel):
    assert (panel.choices["arm"].value, panel.choices["length"].value) == (OURS, 256)
    assert f"{panel.entry.accuracy:.3f}" in panel.numbers.value and "3 seeds" in panel.numbers.value
    assert panel.choices["study"].options == ("made up",) and "press the button" in panel.numbers.value


@pytest.mark.parametrize("arm", ["quest", "dense", "oracle"])
def test_a_choice_is_drawn_with_its_interval(panel, arm):
    chosen, number = entry(panel, arm), panel.number
    line, dots = panel.pictures._chosen, panel.pictures._arm
    at = list(line.x).index(128)
    assert line.y[at] == pytest.approx(chosen.accuracy) and list(dots.y) == [arm]
    assert line.error_y.array[at] == pytest.approx(chosen.high - chosen.accuracy)
    assert line.error_y.arrayminus[at] == pytest.approx(chosen.accuracy - chosen.low)
    assert dots.error_x.array[0] == pytest.approx(chosen.high - chosen.accuracy)
    assert len(panel.pictures._arms.x) + len(panel.pictures._full.x) == len(ARMS) - 1
    assert panel.pictures._here_arm.meta == number and panel.choices["length"].value == 128


def test_every_arm_has_its_line(panel):
    names = {name for name in panel.pictures._lines.customdata if name}
    assert names | {OURS, "dense"} == set(ARMS)
    assert list(panel.pictures._lines.x).count(None) == len(names)


def test_another_task_and_the_changes_are_offered(panel):
    panel.choices["task"].value = "copying"
    assert panel.entry.task == "copying"
    panel.view.value = True
    assert panel.choices["arm"].options == made_study.CHANGED and panel.choices["task"].value == "copying"
    assert entry(panel, "no notes").accuracy == 0.7 and not panel.run.disabled
    entry(panel, "k-means prototypes")
    assert panel.run.disabled  # needs gates that the shipped model does not have
    with pytest.raises(ValueError, match="k-means prototypes"):
        next(found.repeat(panel.entry, 1))
    panel.view.value = False
    assert panel.choices["arm"].value in ARMS


def test_a_click_on_a_dot_chooses(panel):
    class Points:
        xs, ys, point_inds = [64], ["quest"], [0]

    panel.pictures._arms._dispatch_on_click(Points, None)
    assert (panel.choices["arm"].value, panel.choices["length"].value) == ("quest", 256)
    Points.point_inds = [list(panel.pictures._lines.customdata).index("local")]
    panel.pictures._lines._dispatch_on_click(Points, None)
    assert (panel.choices["arm"].value, panel.choices["length"].value) == ("local", 64)


def test_a_button_measures_and_draws_beside_the_committed_point(panel):
    chosen = entry(panel, "gates + notes", 64)
    panel.run.click()
    panel.worker.wait()
    (row,) = panel.here.values()
    assert row.cases >= 60 and list(panel.pictures._here.y) == [row.accuracy]
    assert list(panel.pictures._here_arm.y) == ["gates + notes"] and "up to date" in panel.status.value
    assert f"{row.cases:,} answers" in panel.numbers.value
    model, words = made_study.recall()
    task = TASKS["mqar"](8, seed=row.cell.seed, words=words).evaluation()
    same = measure_cell(model, row.cell, task, 60)
    assert row.cell.shortlist == chosen.shortlist and same.cell == row.cell
    again = entry(panel, "gates + notes", 128)
    assert again is not None and "press the button" in panel.numbers.value and len(panel.pictures._here.y) == 1
    panel.choices["task"].value = "copying"
    assert len(panel.pictures._here.y) == 0


def test_measuring_is_repeatable_and_stops(panel):
    chosen = entry(panel, "quest", 64)
    one, two = ([row.right for row in found.repeat(chosen, 100)] for _ in range(2))
    assert one == two and len(one) >= 1
    with pytest.raises(Stopped):
        list(found.repeat(chosen, 10**9, stop=lambda: True))
    held = threading.Event()
    monkey = found.tally
    found.tally = lambda *a: (row for row in monkey(*a) if not held.wait(0.05))
    try:
        panel.cases = 10**9
        panel.run.click()
        end = time.monotonic() + 10
        while panel.worker.busy is None and time.monotonic() < end:
            time.sleep(0.01)
        panel.cancel.click()
        panel.worker.wait(10)
    finally:
        found.tally = monkey
    assert panel.here == {} and "stopped" in panel.status.value


def test_missing_weights_are_said(panel, monkeypatch):
    def gone():
        raise FileNotFoundError("recall-mini is not here")

    monkeypatch.setattr(found, "_recall_mini", gone)
    panel.run.click()
    panel.worker.wait()
    assert "recall-mini is not here" in panel.status.value and "pp-error" in panel.status.value


def test_an_install_without_studies_says_so():
    made = evidence_panel([])
    assert "No study" in made.numbers.value and made.run.disabled


@pytest.mark.parametrize("cases", [0, "many", True])
def test_a_bad_number_of_cases_is_refused(cases):
    with pytest.raises((ValueError, TypeError), match="cases"):
        evidence_panel([], cases=cases)
