"""What a model can do before healing: likelihood and answers, dense and through its slider, in seconds."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import fmean

from ...common.machine import environment
from ...common.texts import BOOK, TOPICS
from ...hf.source import ModelSource
from .arms import DENSE, arms
from .cells import NLL, QualitySettings, measure
from .subjects import Subject

LENGTH, SHARE, PASSAGES, CASES = 512, 16, 2, 1
TASKS = ("needle", "multi-key")


def baseline(source: ModelSource) -> dict:
    """Rows of the quality table for one length, and sentences on them. `source` has gates and a config of its own.

    A model whose context is shorter than a question's text answers none.
    """
    length = min(LENGTH, source.context or LENGTH)
    subject = Subject(source, source.tokenizer, (TOPICS,), (BOOK,), LENGTH)
    settings = QualitySettings(
        lengths=(length,), shares=(SHARE,), passages=PASSAGES, cases=CASES, tasks=TASKS if length == LENGTH else ()
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = [done.row for done in measure(subject, settings, arms(["ours"], [], []), Path(folder))]
    about = environment(source.device) | subject.about() | {"length": length, "shortlist": length // SHARE}
    return about | {"sentences": list(_sentences(rows, length)), "rows": rows}


def _sentences(rows: list[dict], length: int):
    dense, ours = ([row for row in rows if (row["arm"] == DENSE) is is_dense] for is_dense in (True, False))
    before, after = (fmean(row["value"] for row in some if row["part"] == NLL) for some in (dense, ours))
    reads = fmean(row["reads"] for row in ours)
    yield (
        f"{TOPICS}, {length} tokens: {before:.3f} nats per token dense, {after:.3f} with {reads:.0f} reads per query "
        f"(gap {after - before:.3f})."
    )
    asked = [row["value"] for row in dense if row["part"] != NLL]
    if asked:
        found = fmean(row["value"] for row in ours if row["part"] != NLL)
        yield f"{len(asked)} questions in {length} tokens: {fmean(asked):.0%} right dense, {found:.0%} with the slider."
