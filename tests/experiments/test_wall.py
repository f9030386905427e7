"""The wall: lines stop for lack of time or memory and say so, and the sentences follow from the rows."""

from __future__ import annotations

import torch
from proteus_playground.experiments.speed import wall

CPU = torch.device("cpu")


def fake(case, *_, **__) -> dict:
    """Unfused: 4 times the time a doubling; ours constant. 1 s at 4,096 tokens."""
    ms = {"mha": 1000 * (case.tokens / 4096) ** 2, "fused": 250 * (case.tokens / 4096) ** 2, wall.OURS: 100}[case.who]
    mb = case.tokens**2 / 1e4 if case.who == "mha" else case.tokens / 100
    failed = case.who == "fused" and case.tokens == 8192
    return {"status": "out of memory" if failed else "ok", "ms": ms, "extra_mb": mb, "keys_per_query": 200.0}


def test_lines_stop_and_the_sentences_say_why(monkeypatch):
    monkeypatch.setattr(wall, "attempt", fake)
    rows = list(wall.climb([], 1.0, 256, CPU, [512, 1024, 2048, 4096, 8192], limit_s=0.5))
    assert [r["tokens"] for r in rows if r["who"] == "mha" and r["why"]] == [8192]
    said = " ".join(wall.crossing(rows, 1.0, 256))
    assert "overtakes dense, unfused attention between 1,024 and 2,048 tokens: it is 10.0 times faster at 4,096" in said
    assert "stops before 8,192 tokens: a call took 1.0 s at 4,096 tokens, over the limit of 0.5 s." in said
    assert "Dense, fused, stops before 8,192 tokens: out of memory." in said
    assert wall.overtakes(rows, "mha", 1.0, 256) == 2048 and wall.overtakes(rows, "fused", 1.0, 256) == 4096
    assert wall.never_overtakes(rows, "fused", 1.0, 256) == "" == wall.never_overtakes([], "fused", 1.0, 256)
    short = [row for row in rows if row["tokens"] <= 1024]
    never = wall.never_overtakes(short, "fused", 1.0, 256)
    assert never.startswith("Proteus has not overtaken dense, fused attention up to 1,024 tokens: it is")
    more = list(wall.climb(rows, 0.5, 256, CPU, [512, 1024], limit_s=0.5))  # dense attention has no alpha
    assert {row["who"] for row in more} == {wall.OURS} and len(more) == 2

    monkeypatch.setattr(wall, "fits", lambda need, limit: (need < 300e6, f"{need / 1e6:.0f} MB"))
    rows = list(wall.climb([], 1.0, 256, CPU, [512, 1024, 2048], limit_s=9))
    assert [r["why"] for r in rows if r["who"] == "mha"] == ["", "", "not enough memory: about 419 MB"]


def test_a_row_is_measured_and_the_stand_in_is_labelled():
    row = wall._measured(80, wall.OURS, 1.0, 16, CPU, 1.0)
    assert row["why"] == "" and row["ms"] > 0 and row["mb"] >= 0 and 0 < row["keys"] <= 16
    note, rows = wall.stand_in()
    assert (
        "was limited to a T4's" in note and "14.7 GB" in note and {r["who"] for r in rows} == {wall.OURS, "efficient"}
    )
