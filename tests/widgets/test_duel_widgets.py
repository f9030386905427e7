"""The duel panel without a browser: a duel of made-up turns, drawn, stopped and resumed; and a tiny real one."""

from __future__ import annotations

import time

import numpy as np
import pytest
from proteus_playground.experiments.duel.curve import ALPHAS, Point, held_out_curve
from proteus_playground.experiments.duel.duel import PRESETS, Score, Turn
from proteus_playground.widgets import duel_panel
from proteus_playground.widgets.duel import words as words
from proteus_playground.widgets.duel.record import MOST, Record

from proteus_playground.common.progress import Stopped
from proteus_playground.lm.training import Step

TINY = {"text": "humble token", "minutes": None, "steps": 6, "length": 32, "tokens": 64, "width": 16, "layers": 1,
        "heads": 2, "groups": 1, "heads_awake": 1, "scored": 1, "held_out": 3, "sample": 4}  # fmt: skip
STEPS = 40


def a_step(arm: str, step: int) -> Step:
    alpha = 0.0 if arm == "dense" else step % 5 / 4
    looked = dict(memory_bytes=1, heads_awake=4 - alpha, gate_entropy=1.0, dead_gates=0, density=1 - alpha / 2)
    return Step(step, 0, 64, alpha, 5 - step / STEPS, 1e-3, 64 * step, step / 10, 640.0, 1.0,
                **looked if step % 10 == 1 else {})  # fmt: skip


def a_score(arm: str, step: int, alpha: float) -> Score:
    loss = 4 - step / STEPS + 0.1 * alpha
    return Score(arm, step, alpha, loss, float(np.exp(loss)), 4.0, 1.0, 0, 1 - alpha / 2, f"Once upon {arm} {alpha:g}")


class FakeDuel:
    """Turns as `duel` yields them, at most `pause` seconds apart; it remembers how far it came, as a folder would."""

    def __init__(self, pause: float = 0.0):
        self.pause, self.reached, self.asked = pause, {}, []

    def __call__(self, settings, out, *, device="cpu", stop=None):
        self.asked.append((settings, out))
        for step in range(1, STEPS + 1):
            for arm in ("dense", "proteus"):
                known = step <= self.reached.get(out, 0)
                if not known:
                    if stop is not None and stop():
                        raise Stopped("stopped on request")
                    time.sleep(self.pause)
                alphas = (0.0,) if arm == "dense" else (0.0, 1.0)
                due = step % 20 == 0
                yield Turn(arm, a_step(arm, step), STEPS,
                           tuple(a_score(arm, step, alpha) for alpha in alphas) if due else (), known)  # fmt: skip
            self.reached[out] = max(step, self.reached.get(out, 0))


def a_curve(out, *, device="cpu", stop=None):
    for alpha in ALPHAS:
        yield Point(alpha, 3.0 + alpha**2, 1 - alpha / 2, 4.0)


@pytest.fixture
def panel():
    made = duel_panel("small", run=FakeDuel(0.001), curve=a_curve)
    yield made
    made.close()


def rest(panel) -> None:
    """Until the worker is; without an event loop drawing is on its thread, so what it drew is there."""
    panel.worker.wait()
    time.sleep(0.05)


def trace(panel, name: str):
    return next(trace for trace in panel.pictures.widget.data if trace.name == name)


def record_of(steps: int) -> Record:
    record = Record(PRESETS["small"])
    for step in range(1, steps + 1):
        for arm in ("dense", "proteus"):
            scores = (a_score(arm, step, 0.0),) if step == steps else ()
            record.add(Turn(arm, a_step(arm, step), steps, scores, False))
    return record


# What is remembered


def test_a_line_keeps_its_ends_and_is_never_longer_than_a_plot_is_wide():
    record = record_of(1500)
    tokens, loss = record.arms["dense"].line("loss")
    assert len(tokens) == len(loss) == MOST and (tokens[0], tokens[-1]) == (64, 64 * 1500)
    assert np.all(np.diff(tokens) > 0) and loss[-1] == pytest.approx(record.arms["dense"].loss[-1])
    assert [len(axis) for axis in Record(PRESETS["small"]).arms["dense"].line("loss")] == [0, 0]


def test_smoothing_is_the_weighted_mean_of_what_came_before():
    series = record_of(30).arms["proteus"]
    for at in (0, 3, 29):
        weight = 0.9 ** np.arange(at, -1, -1)
        assert series.calm_loss[at] == pytest.approx(np.average(series.loss[: at + 1], weights=weight))


def test_the_slider_stands_between_the_measured_points():
    record = Record(PRESETS["small"])
    assert record.loss_at(0.3) is None and "Measured when" in words.slider_sentence(record, 0.3)
    record.curve = [Point(0.0, 3.0, 1.0, 4.0), Point(0.5, 3.2, 0.5, 4.0), Point(1.0, 4.0, 0.1, 4.0)]
    assert record.loss_at(0.25) == pytest.approx(3.1) and record.loss_at(1.0) == 4.0
    assert "3.100 (between measured" in words.slider_sentence(record, 0.25)
    assert "3.200 (measured)" in words.slider_sentence(record, 0.5)


def test_the_verdict_compares_the_newest_scores():
    record = Record(PRESETS["small"])
    record.scores = [a_score("dense", 20, 0.0), a_score("dense", 40, 0.0), a_score("proteus", 40, 0.0)]
    assert "held-out text, which training never uses" in words.verdict(record)
    record.scores.append(a_score("proteus", 40, 1.0))
    assert "10.5% worse than dense" in words.verdict(record)  # exp(0.1)
    assert "<i>Once upon </i>dense 0" in words.samples_html(1, record.newest())


# The panel


def test_it_waits_until_it_is_told_to_start(panel):
    time.sleep(0.1)
    assert panel.record.step == 0 and panel.stop.disabled and panel.resume.disabled and not panel.start.disabled


def test_a_duel_is_drawn_to_its_end(panel):
    panel.begin()
    assert panel.start.disabled and not panel.stop.disabled
    rest(panel)
    assert panel.problem == "" and panel.record.step == STEPS and len(panel.record.curve) == len(ALPHAS)
    for arm in ("dense", "proteus"):
        assert len(trace(panel, f"loss {arm}").x) == STEPS and len(trace(panel, f"density {arm}").x) == 4
        assert trace(panel, f"loss {arm}").x[-1] == 64 * STEPS
    assert list(trace(panel, "held out proteus 1").y) == [a_score("proteus", step, 1.0).loss for step in (20, 40)]
    assert "10.5% worse" in panel.captions["loss"].value and "training is over" in panel.status.value
    assert panel.samples.value.count("pp-sample ") == 3 and panel.resume.disabled and not panel.start.disabled
    assert trace(panel, "loss dense").meta == panel.number


def test_the_slider_moves_the_point_and_the_words(panel):
    panel.begin()
    rest(panel)
    seen = []
    for alpha in (0.5, 0.6):
        panel.state.flux_alpha = alpha
        (at,), (loss,) = trace(panel, "here").x, trace(panel, "here").y
        assert at == alpha and f"loss {loss:.3f}" in panel.captions["curve"].value
        seen.append(loss)
    assert seen[0] == 3.25 and 3.25 < seen[1] < 3.5625


def test_stop_ends_it_soon_and_resume_goes_on(panel):
    panel._duel.pause = 0.03
    panel.begin()
    while panel.record.step < 5:
        time.sleep(0.01)
    panel.halt()
    begun = time.monotonic()
    rest(panel)
    stopped = panel.record.step
    assert time.monotonic() - begun < 1 and 5 <= stopped < STEPS
    assert "stopped" in panel.status.value and not panel.resume.disabled and panel.record.curve == []
    panel._duel.pause = 0.0
    panel._go()
    rest(panel)
    assert panel.record.step == STEPS and len(panel._duel.reached) == 1
    assert panel.record.arms["dense"].tokens == [64 * step for step in range(1, STEPS + 1)]  # each step once
    panel.begin()
    rest(panel)
    assert len(panel._duel.reached) == 2, "Start is a new duel"


def test_the_last_step_of_a_stopped_duel_holds_up_no_picture_of_the_resumed_one(panel):
    sent = []
    panel._report(record_of(3), lambda *told: sent.append(told), "a step")  # its record is no more the one on show
    assert sent == [] and panel._drawn
    panel._report(panel.record, lambda *told: sent.append(told), "a step")
    assert len(sent) == 1 and not panel._drawn


def test_presets_and_boxes_say_what_is_trained(panel):
    panel.preset.value = "t4"
    assert panel.minutes.value == PRESETS["t4"].minutes
    panel.text.value, panel.minutes.value = " python topics ", 1.5
    panel.begin()
    rest(panel)
    asked = panel._duel.asked[-1][0]
    assert (asked.text, asked.minutes, asked.width) == ("python topics", 1.5, PRESETS["t4"].width)


def test_what_goes_wrong_is_said(panel):
    def broken(*_, **__):
        raise ValueError("text='nowhere' is no known text")
        yield

    panel._duel = broken
    panel.begin()
    rest(panel)
    assert "nowhere" in panel.status.value and not panel.start.disabled


def test_what_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="preset='huge'"):
        duel_panel("huge")
    with pytest.raises(ValueError, match="minutes=-1"):
        duel_panel("small", minutes=-1)
    assert duel_panel("small", length=128).settings.shortlist == 8


def test_a_real_duel_of_a_few_steps(tmp_path):
    panel = duel_panel("small", out=tmp_path, **TINY)
    panel._folder = tmp_path / "one"
    panel._go()
    rest(panel)
    assert panel.problem == "" and panel.record.step == 6
    scores = {(score.arm, score.alpha): score for score in panel.record.newest()}
    assert set(scores) == {("dense", 0.0), ("proteus", 0.0), ("proteus", 1.0)}
    ends = panel.record.curve[0], panel.record.curve[-1]
    for point in ends:  # the curve is of the model and the text that the last scores are of
        assert point.loss == pytest.approx(scores["proteus", point.alpha].loss, abs=2e-3)
        assert point.density == pytest.approx(scores["proteus", point.alpha].density)
    assert ends[0].density > ends[1].density and "written for this project" in panel.banner.value
    with pytest.raises(FileNotFoundError):
        next(held_out_curve(tmp_path / "two"))
    with pytest.raises(Stopped):
        next(held_out_curve(tmp_path / "one", stop=lambda: True))
    panel.close()
