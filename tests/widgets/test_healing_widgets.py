"""The healing panel: it trains a folder, stops, goes on, and says how far the gap has fallen."""

from __future__ import annotations

import time
from dataclasses import replace

import made_healing
import pytest
import tiny_llama

for name in ("transformers", "peft", "accelerate"):
    pytest.importorskip(name)
from proteus_playground.widgets import healing_panel  # noqa: E402 -- after the skips
from proteus_playground.widgets.healing import words  # noqa: E402
from proteus_playground.widgets.healing.record import MOST, Record, curve_of  # noqa: E402

from proteus_playground.hf.convert import convert  # noqa: E402
from proteus_playground.hf.healing.plan import Adapter, Budgets, Data, Plan, Stage  # noqa: E402
from proteus_playground.hf.healing.run import read_log  # noqa: E402
from proteus_playground.hf.own.folder import read_folder  # noqa: E402

STAGES = (replace(made_healing.A, lengths=(128,)), Stage("B", 6 * 128, (128,), Budgets(keys_low=16, keys_high=4)))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A converted folder of a tiny model, with a plan of two short stages."""
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny_llama.build(num_hidden_layers=2)
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    folder = convert(str(tmp_path / "base"), tmp_path / "own", say=lambda sentence: None)
    (tmp_path / "text.txt").write_text(" ".join(tiny_llama.WORDS[i * i % 19] for i in range(1500)))
    data = Data(sources=(str(tmp_path / "text.txt"),), held_out_rows=1, held_out_share=0.2)
    plan = Plan(STAGES, batch_tokens=128, adapter=Adapter(rank=2, mlp_rank=2), data=data)
    plan.write(folder.runs[0] / "plan.json")
    return folder


def shown(panel) -> str:
    return "".join(part.value for part in (panel.status, panel.banner, panel.numbers, panel.said))


def trace(panel, name: str):
    return next(trace for trace in panel.pictures.widget.data if trace.name == name)


def test_a_folder_is_healed_and_the_curves_are_drawn(own):
    panel = healing_panel(own.path, device="cpu")
    assert panel.start.description == "Start" and "Nothing is trained yet" in shown(panel)
    panel.begin()
    assert panel.start.disabled and not panel.cancel.disabled
    panel.worker.wait()
    assert panel.problem == "" and "what was learned" in panel.status.value and panel.start.disabled
    steps = read_log(own.runs[0])
    assert [step.stage for step in steps] == ["A"] + ["B"] * 6 and read_folder(own.path).adapter is not None
    record = panel.record
    assert record.last.step == 7 and len(record.loss) == 6  # stage A has no loss
    assert [curve.read for curve in record.curves] == [step.read for step in steps if step.held_out]
    assert record.before.shares == (32, 16, 8) and record.before.reads[0] < record.before.reads[2]
    assert list(trace(panel, "before").y[:3]) == list(record.before.gaps)
    assert list(trace(panel, "now").y[:3]) == list(record.curves[-1].gaps)
    assert len(trace(panel, "earlier").x) == 4 * (len(record.curves) - 1) and len(trace(panel, "calm").x) == 6
    assert f"{record.curves[-1].gap:.3f}" in panel.numbers.value and "after 896 tokens" in panel.said.value
    panel.close()
    again = healing_panel(own.path, device="cpu")  # shows what the folder holds
    assert len(again.record.curves) == len(record.curves) and again.start.description == "Go on"
    again.begin()
    again.worker.wait()
    assert "what was learned" in again.status.value and read_log(own.runs[0]) == steps
    again.close()


def test_stop_keeps_the_state_and_the_same_call_goes_on(own, monkeypatch):
    panel = healing_panel(own.path, device="cpu")
    add, steps = Record.add, []

    def stop_after_three(record, step):
        add(record, step)
        steps.append(step.step)
        if step.step == 3:
            panel.halt()

    with monkeypatch.context() as patch:
        patch.setattr(Record, "add", stop_after_three)
        panel.begin()
        panel.worker.wait()
    assert steps == [1, 2, 3] and "stopped" in panel.status.value and panel.start.description == "Go on"
    assert not panel.start.disabled and panel.cancel.disabled
    panel.close()
    later = healing_panel(own.path, device="cpu")
    assert later.record.last.step == 3
    later.begin()
    later.worker.wait()
    assert [step.step for step in read_log(own.runs[0])] == [1, 2, 3, 4, 5, 6, 7]
    later.close()


def test_seconds_shorten_the_plan_and_set_the_distance_of_measurements(own):
    panel = healing_panel(own.path, device="cpu", seconds=0.001)
    panel.begin()
    panel.worker.wait()
    assert [step.stage for step in read_log(own.runs[0])] == ["A", "B"]  # one step of each stage
    plan = Plan.read(own.runs[0] / "plan.json")
    assert plan == panel.plan and plan.minutes == 0.001 / 60 and all(stage.plateau.every for stage in plan.stages)
    panel.close()


def test_what_cannot_be_healed_is_said(own, tmp_path):
    with pytest.raises(ValueError, match="has no 'proteus_attention'"):
        healing_panel(tmp_path / "base")
    with pytest.raises(ValueError, match="seconds=0: allowed is a number of seconds > 0"):
        healing_panel(own.path, seconds=0)
    weights = tmp_path / "base" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    panel = healing_panel(own.path, device="cpu")
    panel.begin()
    panel.worker.wait()
    assert "model.safetensors is gone" in panel.problem and "pp-error" in panel.status.value
    assert not panel.start.disabled
    weights = (tmp_path / "elsewhere").rename(weights)
    panel.begin()
    panel.worker.wait()
    assert panel.problem == "" and "what was learned" in panel.status.value
    panel.close()


def test_closing_ends_the_training(own, monkeypatch):
    panel, began = healing_panel(own.path, device="cpu"), []
    add = Record.add
    monkeypatch.setattr(Record, "add", lambda record, step: (add(record, step), began.append(step), time.sleep(0.05)))
    panel.begin()
    while not began:
        time.sleep(0.01)
    panel.close()
    panel.worker.wait()
    count = len(read_log(own.runs[0]))
    assert 0 < count < 7 and not list(own.path.glob(".*.part"))


def test_the_words_say_how_far_the_gap_has_fallen():
    record = Record()
    assert "before the first step" in words.verdict(record)
    record.before = curve_of(made_healing.measured(0.1), 0)
    assert words.verdict(record).startswith("With 1/32 of the keys (2 reads per query) the gap is 0.400")
    record.add(made_healing.step(2, gap=0.025))
    assert "was 0.400 nats per token before healing and is 0.100 after 256 tokens: 75% of it is gone" in words.verdict(
        record
    )
    record.add(made_healing.step(3, gap=0.2))
    assert "is gone" not in words.verdict(record)
    worse = made_healing.measured(0.1) | {"dense": 3.3}  # the trained model's own dense pass does not count
    assert curve_of(worse, 0).gaps == record.before.gaps
    assert curve_of({name: {str(k): v for k, v in value.items()} if isinstance(value, dict) else value
                     for name, value in made_healing.measured(0.1).items()}, 0) == record.before  # fmt: skip


def test_a_long_run_is_drawn_with_few_points():
    record = Record()
    for number in range(1, 2000):
        record.add(made_healing.step(number))
    x, y = record.line("calm")
    assert len(x) == len(y) == MOST and x[-1] == 128 * 1999 and (y[1:] <= y[:-1]).all()
