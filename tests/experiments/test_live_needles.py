"""The live suite measures the cases of the validation suite, here with the random layer."""

from __future__ import annotations

from proteus_playground.experiments.needles.live import live, methods, total
from proteus_playground.experiments.needles.pairs import load_pairs
from proteus_playground.experiments.needles.subjects import LAYER, load


def test_every_case_comes_once_with_all_methods():
    subject, tasks = load(LAYER), ("single", "fading")
    found = list(live(subject, load_pairs()[:2], tasks=tasks, lengths=(512, 1024), depths=(0.0, 1.0)))
    assert len(found) == total(tasks, (512, 1024), (0.0, 1.0)) == 6
    assert all(set(one.share) == set(methods()) and 0 < one.kept < one.length for one in found)
    last = [one for one in found if one.task == "single" and one.depth == 1.0]
    assert all(one.share["recency"] in (0.0, 1.0) and one.text for one in last)
    assert [len(one.each) for one in found if one.task == "fading"] == [5, 5]
