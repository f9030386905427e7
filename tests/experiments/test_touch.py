"""The four measurements of the notebook 09: their numbers hold what their sentences say."""

from __future__ import annotations

import pytest
from proteus_playground.experiments import touch

from proteus_playground.common.progress import Stopped


def test_the_error_of_int8_stays_below_its_bound_and_grows_with_an_outlier():
    plain, large = (touch.int8_error(0, outlier) for outlier in (1, 8))
    assert 0 < plain.numbers["error"] < plain.numbers["bound"] and plain.numbers["largest"] > 1
    assert large.numbers["error"] > 2 * plain.numbers["error"] and large.numbers["bound"] > plain.numbers["bound"]
    assert large.numbers["largest"] == pytest.approx(plain.numbers["largest"], rel=1e-3)  # the exact result stays
    assert "36 bytes in int8 with its scale, 64 in float16" in plain.sentence


def test_top_a_changes_what_is_written_with_the_same_random_numbers():
    off, again, filtered = (touch.top_a(mode, 0.9, 5.0, tokens=12) for mode in ("off", "off", "filter"))
    assert off.text == again.text != filtered.text and "Top-A as filter" in filtered.sentence
    assert set(off.numbers) == {"repetition", "agreement", "nll"} and off.numbers["nll"] > 0


def test_a_controller_holds_a_density_and_moves_the_shortlist_for_a_latency():
    found = touch.hold("density", 0.2)
    assert found.numbers["measured"] == pytest.approx(0.2, rel=0.06) and 0 < found.numbers["value"] < 1
    assert "settled (on target)" in found.sentence and found.text.startswith("α 0 → ")
    slower = touch.hold("latency", 0.01, tokens=256)  # never reached
    assert slower.numbers["value"] <= 256 and slower.text.startswith("L 256")


def test_the_bank_keeps_its_size_and_the_cache_grows():
    short, long = (touch.write_on(tokens, 32).numbers for tokens in (128, 512))
    assert short["bank"] == long["bank"] and long["cache"] > 2 * short["cache"]
    assert short["equal at"] == pytest.approx(long["equal at"], rel=0.05)
    with pytest.raises(Stopped):
        touch.write_on(128, 32, stop=lambda: True)
