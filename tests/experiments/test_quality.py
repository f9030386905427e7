"""The quality table: what is counted, replies that guesses cannot change, runs that go on, and what is refused."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import run_command
from kills import run_through_kills
from proteus_playground.experiments.quality import cells, questions, subjects, table
from proteus_playground.experiments.quality.arms import Arm, Meter, arm_names, arms, replaced
from proteus_playground.experiments.quality.cells import NLL, Cell, QualitySettings, greedy, measure
from proteus_playground.experiments.quality.questions import Question, question
from proteus_playground.experiments.quality.subjects import ShelfSubject, Subject
from tiny_llama import build
from tiny_shelf import build as build_shelf

from proteus_playground.attention.selectors import SELECTORS
from proteus_playground.common.progress import Stopped
from proteus_playground.hf import models
from proteus_playground.hf.source import ModelSource
from proteus_playground.playground.shelf_source import ShelfSource

SMALL = QualitySettings(lengths=(128,), shares=(8, 4), passages=2, cases=1, tasks=("shelf",))
FEW = ("dense", "ours", "local", "oracle")


@pytest.fixture(scope="module")
def shelves(tmp_path_factory) -> ShelfSubject:
    """A model of random weights that reads shelves."""
    torch.set_num_threads(1)
    return shelf_subject(tmp_path_factory.mktemp("model"))


def shelf_subject(folder: Path) -> ShelfSubject:
    model, tokenizer = build_shelf(folder)
    return ShelfSubject(ShelfSource(model, tokenizer, "tiny"), model.cfg.attention, 512)


def by_letters(seed: int = 0):
    """A Llama of random weights that reads letter by letter, so that every text is made of its tokens."""
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    letters = ["\n", *map(chr, range(32, 127))]
    words = Tokenizer(WordLevel({letter: at for at, letter in enumerate(letters)}, unk_token="?"))
    words.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    model, _ = build(seed, vocab_size=len(letters), max_position_embeddings=4096)
    return model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


@pytest.fixture(scope="module")
def english() -> Subject:
    pytest.importorskip("transformers")
    model, tokenizer = by_letters()
    return Subject(ModelSource(model, tokenizer, "tiny"), tokenizer, ["humble token"], ["commonplace book"], 512)


# -- what an arm reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shelves", "english"])
def test_every_arm_is_counted_and_one_that_may_read_all_is_dense(kind, request):
    subject = request.getfixturevalue(kind)
    (ids,) = subject.passages(96, 1)
    own = subject.source.nll(ids, 48, {})
    for arm in arms(arm_names(), [{}, {"notes": False}], []):
        for L in (24, 96):
            meter = Meter(47)
            value = subject.source.nll(ids, 48, replaced(subject, arm, L, meter))
            found = meter.figures(96)
            assert 1 <= found["reads"] <= (72.5 if arm.dense else min(L, 72.5)), arm.name
            if L == 96 or arm.dense:
                assert value == pytest.approx(own, abs=1e-4) and found["reads"] == 72, arm.name
            else:
                assert value != pytest.approx(own, abs=1e-5), arm.name
                if arm.selector is None:  # its prototypes
                    assert found["looks"] == arm.config(subject, L).gates_per_group
                else:
                    assert bool(found["looks"]) == (arm.selector.looks is not None), arm.name


def test_ours_is_the_selector_of_the_gates(shelves):
    (ids,) = shelves.passages(120, 1)
    fast, slow = Arm("ours"), Arm("gates + notes", SELECTORS["gates + notes"])
    meters = Meter(0), Meter(0)
    pairs = zip((fast, slow), meters, strict=True)
    values = [shelves.source.nll(ids, 60, replaced(shelves, arm, 24, meter)) for arm, meter in pairs]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert meters[0].figures(120) == meters[1].figures(120)


# -- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", questions.ENGLISH)
def test_the_answers_stand_in_the_text_and_not_in_the_question(task, english):
    asked = question(english, task, 1500, 3, seed=1)
    text = english.source.decode(asked.ids.tolist())
    expected = english.source.decode(list(asked.expected))
    assert len(asked.ids) + asked.most == 1500 and asked.score(expected) == 1 and asked.score("nothing") == 0
    body, tail = text.rsplit("\n\n", 1)
    assert asked.score(body) == 1
    assert asked.score(tail) == 0 and asked.score(expected.split(",")[0]) == 1 / len(asked.answers)
    again, other = (question(english, task, 1500, 3, seed=seed) for seed in (1, 2))
    assert torch.equal(again.ids, asked.ids) and not torch.equal(other.ids[: len(asked.ids)], asked.ids)


def test_facts_are_of_the_kind_that_their_task_says(english):
    def lines(task: str) -> list[str]:
        asked = question(english, task, 1500, 0, seed=0)
        text = english.source.decode(asked.ids.tolist()).rsplit("\n\n", 1)[0]
        return re.findall(r"special number for the (.*?) is (\d+)\.", text)

    assert [len(lines(task)) for task in ("needle", "multi-key", "multi-value")] == [1, 8, 4]
    assert len({key for key, _ in lines("multi-key")}) == 8 and len({key for key, _ in lines("multi-value")}) == 1
    asked = question(english, "variables", 1500, 0, seed=0)
    text = english.source.decode(asked.ids.tolist())
    steps = re.findall(r"Let (\w+) be (?:the same as )?(\w+)\.", text)
    assert [old for _, old in steps[1:]] == [new for new, _ in steps[:-1]] and tuple(
        n for n, _ in steps
    ) == asked.answers
    asked = question(english, "common words", 1500, 0, seed=0)
    words = english.source.decode(asked.ids.tolist()).rsplit("\n\n", 1)[0].split("\n\n", 1)[1].split()
    counts = {word: words.count(word) for word in set(words[:-1])}
    assert min(counts[word] for word in asked.answers) > 2 * max(
        count for word, count in counts.items() if word not in asked.answers
    )


def test_a_shelf_is_asked_for_what_it_says(shelves):
    asked = question(shelves, "shelf", 256, 0, seed=0)
    text = shelves.source.decode(asked.ids.tolist())
    assert len(asked.ids) <= 256 and asked.answers[0] in text.split("Question:")[0]
    assert asked.score(shelves.source.decode(list(asked.expected))) == 1


@pytest.mark.bad_input
@pytest.mark.parametrize(("kind", "task"), [("english", task) for task in questions.ENGLISH] + [("shelves", "shelf")])
def test_a_length_without_room_is_refused(kind, task, request):
    with pytest.raises(ValueError, match="length="):
        question(request.getfixturevalue(kind), task, 64 if kind == "english" else 28, 0, 0)


@pytest.mark.parametrize("name", ["dense", "ours", "local"])
def test_no_guess_changes_a_reply(name, english):
    (arm,) = (one for one in arms(list(FEW), [], []) if one.name == name)
    text = english.passages(150, 1)[0]
    passes = []
    asked = Question(text, ("x",), (), 9)

    def reply(guess) -> list[int]:
        meter = Meter(149)
        layers = replaced(english, arm, 24, meter)
        found = greedy(english, asked, layers, guess)
        passes.append(meter)
        return found

    plain = [0] * 0
    while len(plain) < 9:  # one token after another
        ids = torch.cat((text, torch.tensor(plain, dtype=text.dtype)))
        plain += english.source.predict(ids, len(ids), replaced(english, arm, 24, Meter(0)))
        if cells.REPLY.match(english.source.decode(plain)):
            break
    for guess in ([], plain, plain[:3] + [5, 5], [1] * 20):
        assert reply(guess)[: len(plain)] == plain


# -- runs that go on ------------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_with_the_same_rows(shelves, tmp_path):
    some = arms(list(FEW), [], [])
    whole = [done.row for done in measure(shelves, SMALL, some, tmp_path / "whole")]
    assert len(whole) == 3 * (1 + 3 * 2) and len({tuple(cell_of(row)) for row in whole}) == len(whole)
    seen = []
    with pytest.raises(Stopped):
        for done in measure(shelves, SMALL, some, tmp_path / "part", stop=lambda: len(seen) == 4):
            seen.append(done)
    assert len((tmp_path / "part" / cells.ROWS).read_text().splitlines()) == 4
    rest = [done.row for done in measure(shelves, SMALL, some, tmp_path / "part")]
    assert [without_time(row) for row in rest] == [without_time(row) for row in whole]
    again = [done.row for done in measure(shelves, SMALL, some, tmp_path / "part", stop=lambda: True)]
    assert again == rest  # nothing is measured twice
    other = arms(["local"], [], [])
    more = [done.row["arm"] for done in measure(shelves, SMALL, other, tmp_path / "part")]
    assert set(more) == {"dense", "local"}


def cell_of(row: dict) -> tuple:
    return tuple(row[name] for name in ("part", "length", "index", "shortlist", "arm"))


def without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "seconds"}


def killed_run(folder: Path, step) -> None:
    subject = shelf_subject(folder)
    for _ in measure(subject, SMALL, arms(list(FEW), [], []), folder / "run", stop=lambda: step()):
        pass


def test_kills_leave_every_row_once(tmp_path):
    run_through_kills(killed_run, tmp_path, kills=2, span=3)
    rows = [json.loads(line) for line in (tmp_path / "run" / cells.ROWS).read_text().splitlines()]
    assert len(rows) == len({cell_of(row) for row in rows}) == 21


@pytest.mark.bad_input
def test_a_folder_of_another_run_is_refused(shelves, tmp_path):
    some = arms(["local"], [], [])
    list(measure(shelves, QualitySettings(lengths=(64,), shares=(4,), passages=1, cases=0), some, tmp_path))
    with pytest.raises(ValueError, match=r"other settings \(passages, seed\)"):
        settings = QualitySettings(lengths=(64,), shares=(4,), passages=2, cases=0, seed=1)
        list(measure(shelves, settings, some, tmp_path))
    (tmp_path / cells.ROWS).write_text('{"part": "x"}\n')
    with pytest.raises(ValueError, match="a row lacks 'length'"):
        list(measure(shelves, QualitySettings(lengths=(64,), shares=(4,), passages=1, cases=0), some, tmp_path))


# -- the table ------------------------------------------------------------------------------------------------------


def test_gaps_are_those_to_the_dense_pass_of_the_same_passage():
    def row(arm: str, index: int, value: float, part: str = NLL, L: int = 16) -> dict:
        return vars(Cell(part, 128, index, L, arm)) | {"value": value, "reads": 9.0, "looks": 4.0, "seconds": 1.0}

    rows = [row("dense", 0, 3.0, L=128), row("dense", 1, 5.0, L=128), row("dense", 0, 1.0, "needle", 128)]
    rows += [row("ours", 0, 3.1), row("ours", 1, 5.3), row("ours", 0, 0.0, "needle")]
    rows += [row("local", 0, 3.1), row("local", 1, 5.2), row("local", 0, 0.0, "needle"), row("oracle", 0, 1, "needle")]
    entries = table.summarise(rows)
    ours = next(e for e in entries if e["arm"] == "ours" and e["part"] == NLL)
    assert ours["value"] == pytest.approx(0.2) and ours["low"] == pytest.approx(0.2 - 12.706 * 0.1, abs=1e-3)
    about = {"device": "d", "threads": 1, "torch": "t", "dtype": "float32", "seed": 0, "model": "m", "text": ["a"],
             "calibrated_on": ["b"], "own_gates": False, "calibration_tokens": 9, "entries": entries}  # fmt: skip
    text = table.quality_table(about)
    assert "| ours | 0.200 [-1.071, 1.471] | 0.00 [0.00, 0.79] | 9 | 4 |" in text
    assert "gap: ours 0.200; better: local (0.150)." in text and "needle: ours 0.000; better: none of 1 arms." in text


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quality(capsys, monkeypatch, tmp_path, shelves, english):
    """Run `proteus quality` on the tiny models: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        models, "load", lambda name, device, dtype=None: (english.source._model, english.source.tokenizer)
    )
    tiny = shelves.source._model, shelves.source._tokenizer
    monkeypatch.setattr(subjects, "load_shipped", lambda name, device: tiny)
    return partial(run_command, capsys, "quality")


GUEST = "def mine(sight, rows):\n    return sight.window(rows, 9)\n"


def test_the_command_measures_all_arms_and_a_guest_and_goes_on(quality, tmp_path):
    (tmp_path / "guest.py").write_text(GUEST)
    args = ["--model", "shelf-mini", "--lengths", "128,128", "--shares", "8,8", "--passages", "2", "--cases", "1",
            "--ours", "{}", "--ours", '{"probes": 4}', "--selector", "guest.py:mine",
            "--calibration-tokens", "512"]  # fmt: skip
    code, out, _ = quality(*args, "--json", "copy.json")
    assert code == 0
    report = json.loads((tmp_path / "proteus-quality" / cells.REPORT).read_text())
    assert report == json.loads((tmp_path / "copy.json").read_text())
    names = {row["arm"] for row in report["rows"]}
    assert len(report["rows"]) == len({cell_of(row) for row in report["rows"]})
    assert names == {*arm_names(), "ours probes=4", "mine"}
    mine = next(e for e in report["entries"] if e["arm"] == "mine" and e["part"] == NLL)
    assert mine["reads"] == 9 and mine["looks"] == 0 and "| mine | " in out
    before = (tmp_path / "proteus-quality" / cells.ROWS).read_bytes()
    assert quality(*args)[0] == 0 and (tmp_path / "proteus-quality" / cells.ROWS).read_bytes() == before
    (tmp_path / "guest.py").write_text(GUEST.replace("9", "7"))  # other code: its cells alone are measured again
    assert quality(*args)[0] == 0
    added = (tmp_path / "proteus-quality" / cells.ROWS).read_bytes().removeprefix(before).splitlines()
    assert [json.loads(line)["arm"] for line in added] == ["mine"] * 3


def test_a_model_of_transformers_is_read_and_asked(quality, tmp_path):
    args = ("--text", "humble token", "--lengths", "400", "--shares", "8", "--passages", "1", "--cases", "1",
            "--tasks", "needle", "--arms", "ours", "--calibration-tokens", "512")  # fmt: skip
    code, out, err = quality(*args)
    assert code == 0, err
    assert "| arm | gap | needle | reads | looks |" in out and "| ours | " in out


def test_quick_is_a_small_run_that_options_still_change(quality, tmp_path):
    assert quality("--model", "shelf-mini", "--quick", "--arms", "local", "--lengths", "128", "--cases", "2")[0] == 0
    report = json.loads((tmp_path / "proteus-quality" / cells.REPORT).read_text())
    found = {(row["part"], row["length"], row["arm"], row["shortlist"]) for row in report["rows"]}
    assert found == {(part, 128, *one) for part in (NLL, "shelf") for one in (("dense", 128), ("local", 16))}
    assert len(report["rows"]) == 2 * 4


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--lengths", "10"], "lengths=10: must be"),
        (["--lengths", "8k", "--model", "smollm2"], "lengths=8192: must be at most 4096"),
        (["--shares", "100", "--lengths", "128"], "shares=100: must be"),
        (["--arms", "best"], "'best': must be one of dense, ours"),
        (["--tasks", "dance"], "'dance': must be one of needle"),
        (["--passages", "0", "--cases", "0"], "passages=0: must be at least 1"),
        (["--ours", '{"gate": 3}'], "gate"),
        (["--ours", '{"probes": 0}'], "probes=0"),
        (["--ours", "{}", "--ours", "{}"], "'ours': must have a name of its own"),
        (["--selector", "nothing.py:f"], "must be FILE.py:NAME"),
        (["--selector", "guest.py:mine"], "selector 'mine': row 0 of head 0 reads key 1"),
        (["--model", "shelf-mini", "--text", "humble token"], "shelf-mini reads shelves only"),
        (["--model", "smollm2", "--text", "a", "--calibrate", "a"], "is judged and calibrated on"),
        (["--model", "smollm2", "--text", "nothing.txt", "--lengths", "128"], "nothing.txt"),
        (["--out", "x", "--json", "x/report.json"], "is the file of"),
    ],
)
def test_what_does_not_fit_is_named(quality, tmp_path, args, said):
    (tmp_path / "guest.py").write_text("def mine(sight, rows):\n    return sight.window(rows + 1, 3)\n")
    given = args if "--model" in args else ["--model", "shelf-mini", *args]
    code, _, err = quality(*given)
    assert code == 2 and said in " ".join(err.replace("│", " ").split())
    assert not (tmp_path / "proteus-quality").exists()
