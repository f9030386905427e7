"""The small panels: one measurement per setting, a grey sentence while the next is on its way, errors in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import text_of
from proteus_playground.experiments.touch import Found
from proteus_playground.widgets import touch_panel
from proteus_playground.widgets.touch.panel import KINDS, TouchPanel


@pytest.mark.parametrize("name", KINDS)
def test_a_panel_measures_at_its_controls_and_again_when_one_moves(name):
    asked = []

    def measure(stop, progress, **setting):
        asked.append(setting)
        if len(asked) == 3:
            raise ValueError("share=9: too much")
        return Found({"n": len(asked)}, f"Measured {len(asked)}.", "<b>")

    panel = TouchPanel(replace(KINDS[name], measure=measure))
    try:
        panel.worker.wait()
        assert (
            set(asked[0]) == set(panel.knobs) and "Measured 1.<" in panel.said.value and "&lt;b&gt;" in panel.said.value
        )
        knob = list(panel.knobs.values())[-1]
        knob.value = knob.options[0] if hasattr(knob, "options") and knob.index else getattr(knob, "max", 4)
        panel.worker.wait()
        assert len(asked) == 2 and asked[1] != asked[0] and "pp-old" not in panel.said.value
        panel.ask()
        panel.worker.wait()
        assert "share=9: too much" in panel.status.value and "pp-old" in panel.said.value
    finally:
        panel.close()


def test_the_real_panel_of_int8_says_its_numbers():
    panel = touch_panel("int8")
    try:
        panel.worker.wait()
        assert f"{panel.found.numbers['error']:.2g}" in text_of(panel.said.value)
    finally:
        panel.close()
    with pytest.raises(ValueError, match="what='int4': allowed is 'int8', 'top-a', 'controller', 'bank'"):
        touch_panel("int4")
