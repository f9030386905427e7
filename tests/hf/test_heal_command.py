"""`proteus heal`: a converted folder is trained stage by stage, a menu changes what follows, it opens healed."""

import csv
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("rich")
import tiny_llama  # noqa: E402 -- after the skips
from heal_tiny import A, B  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from proteus_playground.cli import app as cli  # noqa: E402
from proteus_playground.cli import heal as command  # noqa: E402
from proteus_playground.cli.heal_menu import ask  # noqa: E402
from proteus_playground.hf.convert import convert  # noqa: E402
from proteus_playground.hf.healing.plan import Adapter, Data, Plan  # noqa: E402
from proteus_playground.hf.healing.run import read_log  # noqa: E402
from proteus_playground.hf.healing.session import Session  # noqa: E402
from proteus_playground.hf.own.folder import open_folder  # noqa: E402

STAGES = (replace(A, tokens=128), replace(B, tokens=2 * 128), replace(B, name="D", tokens=128, optional=True))
IDS = torch.arange(50)[None] % 20


@pytest.fixture
def own(tmp_path):
    """A converted folder of a tiny model, with a plan of three short stages."""
    model, tokenizer = tiny_llama.build(num_hidden_layers=2)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = convert(str(tmp_path / "base"), tmp_path / "own", say=lambda sentence: None)
    words = " ".join(tiny_llama.WORDS[i * i % 19] for i in range(600))
    (tmp_path / "text.txt").write_text(words)
    (tmp_path / "other.txt").write_text(" ".join(reversed(words.split())))
    data = Data(sources=(str(tmp_path / "text.txt"),), held_out_rows=1, held_out_share=0.2)
    plan = Plan(STAGES, batch_tokens=128, adapter=Adapter(rank=2, mlp_rank=2, dropout=0.1), data=data)
    plan.write(folder.runs[0] / "plan.json")
    return folder


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["heal", *map(str, arguments)])


def logits(path):
    slider = open_folder(path)
    with torch.no_grad():
        return slider.model(IDS).logits


def test_a_folder_is_trained_to_the_end_and_opens_with_what_was_learned(own):
    before, run = logits(own.path), own.runs[0]
    done = invoke(own.path, "--non-interactive", "--save-seconds", 0)
    assert done.exit_code == 0, done.output
    assert "Mean held-out gap" in done.output and "time left" in done.output and "gate entropy" in done.output
    steps = read_log(run)
    assert [step.stage for step in steps] == ["A", "B", "B", "D"]
    with open(run / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [step.loss for step in steps]
    assert len(json.loads((run / "history.json").read_text())) == 4
    assert "## Stage B\n\n2 steps, 256 tokens" in (run / "summary.md").read_text()
    assert (own.path / "adapter").is_dir() and not (own.path / "healed").exists()
    healed = logits(own.path)
    assert not torch.equal(healed, before) and torch.allclose(healed, before, atol=5.0)
    again = invoke(own.path, "--non-interactive")
    assert again.exit_code == 0 and "is finished" in again.output
    whole = invoke(own.path, "--non-interactive", "--full")
    assert whole.exit_code != 0 and "has an adapter" in str(whole.exception)


def test_ctrl_c_stops_between_two_steps_and_the_same_command_goes_on(own, monkeypatch):
    show = command.Panel.show

    def press(panel, step):
        show(panel, step)
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(command.Panel, "show", press)
    stopped = invoke(own.path, "--non-interactive")
    assert stopped.exit_code == 130 and "The same command goes on" in stopped.output
    assert [step.step for step in read_log(own.runs[0])] == [1, 2]
    rest = invoke(own.path, "--non-interactive")
    assert rest.exit_code == 0 and "Going on after step 2, in stage B" in rest.output
    assert [step.step for step in read_log(own.runs[0])] == [1, 2, 3, 4]


def test_the_menu_changes_what_follows(own, tmp_path):
    session, said = Session(own.path), []
    for _ in session.run.steps():
        pass
    session.finish_stage()
    answers = iter([
        "9", "2", "5", "3", str(tmp_path / "other.txt"), "3", "nowhere.txt",
        "4", "rates.weights=5e-5", "rates.nothing=1", "budgets.keys_low=1", "", "1",
    ])  # fmt: skip
    assert ask(session, said.append, lambda text: next(answers))
    text = "\n".join(said)
    assert "'9': must be a number from 1 to 6" in text and "## Stage A" in text and "own dense pass" in text
    assert "name='nowhere.txt' is no known text" in text and "must be a line above" in text and "keys_low=1" in text
    kept = Plan.read(own.runs[0] / "plan.json")
    assert kept == session.training.plan and kept.stage("B").rates.weights == 5e-5
    assert kept.data.sources == (str(tmp_path / "other.txt"),) and kept.stage("B").budgets == STAGES[1].budgets
    session.go_to("D")
    answers = iter(["7"])
    assert not ask(session, said.append, lambda text: next(answers))
    assert said[-2:] == ["Stage D is skipped.", "No stage is left."]
    later = Session(own.path)
    assert later.training.stage is None and later.training.plan == kept


def test_one_stage_alone_and_what_cannot_be_healed(own, tmp_path):
    before = logits(own.path)
    assert invoke(own.path, "--stage", "D", "--full", "--non-interactive").exit_code == 0
    assert {step.stage for step in read_log(own.runs[0])} == {"D"}
    assert (own.path / "healed").is_dir() and not (own.path / "adapter").exists()
    assert not torch.equal(logits(own.path), before)
    for arguments, words in (
        ((own.path, "--stage", "X"), "stage='X'"),
        ((tmp_path / "base",), "proteus convert"),
        ((own.path, "--data", "nowhere.txt"), "nowhere.txt"),
    ):
        found = invoke(*arguments, "--non-interactive")
        assert found.exit_code != 0 and words in str(found.exception) + found.output, arguments
