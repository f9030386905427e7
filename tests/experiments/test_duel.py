"""The duel: both arms read the same, from the same start; a duel that was killed ends as one that was not."""

import csv
import json
from dataclasses import replace
from itertools import islice

import pytest
import torch
from proteus_playground.experiments.duel import settings as duel_settings
from proteus_playground.experiments.duel.command import report_lines, side_by_side
from proteus_playground.experiments.duel.duel import PRESETS, DuelSettings, duel, read_scores
from proteus_playground.experiments.duel.settings import start
from typer.testing import CliRunner

from proteus_playground.cli import app as cli
from proteus_playground.common.texts import pasted
from proteus_playground.lm.training import train
from proteus_playground.lm.training.data import Bytes, TextBatches, windows

TINY = DuelSettings(
    text="humble token", length=32, tokens=128, steps=10, minutes=None, width=16, layers=2, heads=4, heads_awake=1,
    scored=2, held_out=3, sample=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def over(tmp_path_factory):
    """A duel that nothing interrupted: its folder and its turns."""
    out = tmp_path_factory.mktemp("duel")
    return out, list(duel(TINY, out))


def test_turns_alternate_and_say_the_same_schedule(over):
    turns = over[1]
    assert [(turn.arm, turn.step.step) for turn in turns] == [
        (a, i) for i in range(1, 11) for a in ("dense", "proteus")
    ]
    for dense, ours in zip(turns[::2], turns[1::2], strict=True):
        assert (dense.step.lr, dense.step.tokens, dense.step.length) == (ours.step.lr, ours.step.tokens, 32)
        assert dense.step.alpha == 0
    alphas = [turn.step.alpha for turn in turns[1::2]]
    assert alphas[0] == 0 and max(alphas) == 1 and any(0 < alpha < 1 for alpha in alphas)


def test_arms_start_alike_and_read_the_same_text(monkeypatch):
    dense, ours = (start(TINY, arm, 256) for arm in ("dense", "proteus"))
    extra = set(ours.state_dict()) - set(dense.state_dict())
    assert extra and all(".router." in name for name in extra)
    for name, tensor in dense.state_dict().items():
        assert tensor.nan_to_num().equal(ours.state_dict()[name].nan_to_num()), name
    ids = torch.randint(0, 256, (2, 32))
    for model in (dense, ours):
        model.eval().set_flux_alpha(0.0)
    torch.testing.assert_close(dense(ids), ours(ids), rtol=1e-4, atol=1e-4)  # alpha 0 is dense attention
    seen = []
    for arm in ("dense", "proteus"):
        texts = TextBatches(torch.arange(500) % 256, 256, TINY.seed)
        read, batch = [], texts.batch
        monkeypatch.setattr(texts, "batch", lambda *a, batch=batch, read=read: read.append(batch(*a)) or read[-1])
        list(train(start(TINY, arm, 256), texts, TINY.recipe(arm)))
        seen.append(torch.cat([batch.ids for batch in read]))
    assert seen[0].equal(seen[1])


def test_scores_are_those_of_the_saved_models(over):
    out, turns = over
    scores = read_scores(out)
    assert [score for turn in turns for score in turn.scores] == scores
    keys = [(score.arm, score.alpha) for score in scores]
    assert keys == [("dense", 0), ("proteus", 0), ("proteus", 1)] * 2
    assert [score.step for score in scores] == [5] * 3 + [10] * 3
    text = torch.tensor(Bytes().encode(duel_settings.pick_text(TINY.text).body))
    held_out = windows(text[len(text) * 9 // 10 :], 32, 3)
    for score in scores[3:]:
        model = duel_settings.ProteusLM.load(out / f"{score.arm}.safetensors").eval()
        model.set_flux_alpha(score.alpha)
        logits = model(held_out[:, :-1]).detach()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten())
        assert score.loss == pytest.approx(float(loss), rel=1e-5)
        assert score.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    dense, ours = scores[3], scores[5]
    assert (dense.density, dense.heads_awake) == (1, 4)
    assert ours.density * 33 / 2 <= 2 and ours.heads_awake == 2  # at most L = T / 16 reads, a head per group
    assert scores[4].density == 1
    assert all(len(score.sample) > 30 for score in scores)


def test_a_duel_stopped_anywhere_ends_the_same(over, tmp_path):
    for turns in (1, 7, 10):  # new ones, within a pair, at a score and after it; 18 of 20 in all
        running = duel(TINY, tmp_path)
        list(islice((turn for turn in running if not turn.known), turns))
        running.close()
    again = list(duel(TINY, tmp_path))
    assert [(turn.arm, turn.step.step) for turn in again] == [(turn.arm, turn.step.step) for turn in over[1]]
    assert [turn.step.loss for turn in again] == [turn.step.loss for turn in over[1]]
    assert sorted(map(str, read_scores(tmp_path))) == sorted(map(str, read_scores(over[0])))
    for name in ("dense.safetensors", "proteus.safetensors"):
        assert (tmp_path / name).read_bytes() == (over[0] / name).read_bytes()


def test_a_score_cut_short_is_taken_again(over, tmp_path):
    running = duel(TINY, tmp_path)
    for turn in running:
        if turn.arm == "proteus" and turn.scores:
            break
    running.close()
    path = tmp_path / "scores.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_scores(tmp_path)) == 2
    list(duel(TINY, tmp_path))
    assert sorted(map(str, read_scores(tmp_path))) == sorted(map(str, read_scores(over[0])))


def test_another_duel_in_the_folder_is_refused_by_name(over):
    with pytest.raises(ValueError, match=r"\(lr, seed\)"):
        duel(replace(TINY, seed=1, lr=1e-4), over[0])


def test_report(over):
    out, turns = over
    report = json.loads((out / "duel.json").read_text())
    assert report["arms"]["proteus"]["steps"] == 10 and report["arms"]["dense"]["tokens"] == 1280
    assert report["environment"]["torch"] == torch.__version__
    with open(out / "duel.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], int(row["step"])) for row in rows] == [
        (a, i) for a in ("dense", "proteus") for i in range(1, 11)
    ]
    assert float(rows[-1]["loss"]) == turns[-1].step.loss
    said = "\n".join(report_lines(report))
    assert said.count("| proteus |") == 2 and "against dense" in said


def test_fewer_steps_where_time_is_short(tmp_path):
    turns = list(duel(replace(TINY, steps=100_000, minutes=1e-6, sample=1), tmp_path))
    assert len(turns) == 2 * 20 and turns[0].steps == 20
    assert turns[-1].step.lr < 0.2 * TINY.lr and len(turns[-1].scores) == 2  # a whole schedule, and its score
    assert list(duel(replace(TINY, steps=100_000, minutes=1e-6, sample=1), tmp_path))[0].steps == 20


def test_auto_text_is_the_manual_offline(monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        if name.startswith("hub:"):
            raise ConnectionError(name)
        return pasted("text", name)

    monkeypatch.setattr(duel_settings, "load_text", load)
    assert duel_settings.pick_text("auto").name == "python topics"
    assert asked[0] == "hub:karpathy/tiny_shakespeare"
    with pytest.raises(ConnectionError):
        duel_settings.pick_text("hub:some/thing")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"steps": 0}, "steps=0"),
        ({"minutes": 0}, "minutes=0"),
        ({"length": 4096}, "tokens=128"),
        ({"heads": 3}, "kv_heads"),
    ],
)
def test_what_does_not_fit_is_named(changes, names):
    with pytest.raises(ValueError, match=names):
        replace(TINY, **changes)


def test_presets_read_a_sixteenth():
    assert all(preset.shortlist * 16 == preset.length for preset in PRESETS.values())


def test_text_batches_and_windows():
    text = torch.arange(100)
    batches = TextBatches(text, 100, seed=3)
    whole = batches.batch(2, 6, 20)
    assert whole.targets.equal(whole.ids + 1) and whole.ids.shape == (6, 20)
    assert torch.cat([batches.batch(4, 3, 20).ids, batches.batch(5, 3, 20).ids]).equal(whole.ids)  # two ranks
    assert not whole.ids.equal(TextBatches(text, 100, seed=4).batch(2, 6, 20).ids)
    starts = torch.cat([batches.batch(i, 50, 98).ids[:, 0] for i in range(4)])
    assert sorted(set(starts.tolist())) == [0, 1]
    assert batches.batch(0, 1, 99).ids[0].equal(text[:99])
    with pytest.raises(ValueError, match="length=100"):
        batches.batch(0, 1, 100)
    held = windows(text, 20, 3)
    assert held[:, 0].tolist() == [0, 40, 79] and held.shape == (3, 21)
    assert len(windows(text, 20, 50)) == 4  # no more than there are side by side
    with pytest.raises(ValueError, match="length=100"):
        windows(text, 100, 1)


def test_bytes_come_back():
    text = "naïve ☃\n"
    assert Bytes().decode(Bytes().encode(text)) == text and max(Bytes().encode(text)) < 256


def test_columns_keep_apart():
    assert side_by_side("one two", "a\nb", 4) == ["one  | a", "two  | b"]


def test_the_command_prints_and_refuses(tmp_path, monkeypatch):
    from proteus_playground.experiments.duel import command as duel_command

    monkeypatch.setitem(duel_command.PRESETS, "small", TINY)
    call = ["duel", "--text", "humble token", "--steps", "4", "--seeds", "0,1", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, call)
    assert done.exit_code == 0, done.output
    assert done.output.count("| dense | 0 |") == 2 and (tmp_path / "seed-1" / "duel.json").is_file()
    assert CliRunner().invoke(cli.app, ["duel", "--preset", "huge"]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["duel", "--seeds", "x"]).exit_code == 2
