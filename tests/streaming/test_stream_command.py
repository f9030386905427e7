"""`proteus stream`: it finds a fact, goes on after an interruption, and says what cannot be done."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from proteus_playground.cli import app as cli
from proteus_playground.streaming.layer_scorer import LayerScorer

SMALL = ["--model", "layer", "--chunk-tokens", "500", "--buffer-tokens", "300", "--per-chunk-budget", "60"]
FACT = "The password of the vault at Elmsworth is marigold seventeen."


@pytest.fixture
def proteus(capsys, monkeypatch, tmp_path):
    """Run `proteus`: (exit code, stdout, stderr). What it keeps goes to a folder of the test."""
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))

    def call(*args) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([str(arg) for arg in args])
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def document(tmp_path) -> Path:
    words = ["tea", "was", "cold", "while", "rain", "fell", "upon", "every", "roof", "by", "some", "window"]
    draw = random.Random(0)
    body = [" ".join(draw.choices(words, k=12)) + "." for _ in range(400)]
    body[310] = FACT
    path = tmp_path / "document.txt"
    path.write_text("\n".join(body), encoding="utf-8")
    return path


@pytest.mark.parametrize("memory", [[], ["--ram-limit", "0"]])
def test_the_command_finds_a_fact_and_reports_it(proteus, document, tmp_path, memory):
    asked = [document, "--prompt", "What is the password of the vault at Elmsworth?", *SMALL, *memory]
    for _ in range(2):  # the second time its ids are on disk, and no word has been met
        code, out, err = proteus("stream", *asked, "--json", "-", "--events", tmp_path / "events.jsonl")
        assert code == 0, err
        report = json.loads(out)
        first = report["best"][0]
        assert FACT in " ".join(first["text"].split())
        assert first["page"] == first["token"] // 512 + 1
        assert report["kept"] == 300 and report["pass_1"]["tokens_read"] == report["document"]["tokens"] > 5000
        assert report["storage"]["mode"] == ("disk" if memory else "ram")
        events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        inside = set()
        for event in events:
            assert (event["token"] in inside) == (event["kind"] == "evicted")
            inside ^= {event["token"]}
        assert len(inside) == 300 and len(events) == report["pass_1"]["promoted"] + report["pass_1"]["evicted"]
        assert first["token"] in inside
        assert 0 <= report["pass_2"]["share_to_champions"] <= 1
        assert not list((tmp_path / "cache").rglob("streams/*"))
    code, out, _ = proteus("stream", *asked)
    assert code == 0 and "page " in out and FACT in out


def test_an_interrupted_command_goes_on(proteus, document, tmp_path, monkeypatch):
    def ask(name: str, *more) -> tuple[int, str, str]:
        files = ["--json", tmp_path / f"{name}.json", "--events", tmp_path / f"{name}.jsonl"]
        return proteus("stream", document, "--prompt", "tea at Elmsworth", *SMALL, *files, *more)

    assert ask("whole")[0] == 0
    score, calls = LayerScorer.score, iter(range(100))

    def interrupted(self, rows):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return score(self, rows)

    monkeypatch.setattr(LayerScorer, "score", interrupted)
    code, _, err = ask("again")
    assert code == 130 and "The same command goes on" in err
    with open(tmp_path / "again.jsonl", "a") as file:
        file.write('{"chunk": 4, "half a li')  # killed while it wrote
    assert ask("again")[0] == 0
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "again"))
    assert other["pass_1"]["tokens_read"] == one["document"]["tokens"] - 4 * 500
    assert one["best"] == other["best"] and one["kept"] == other["kept"]
    assert (tmp_path / "whole.jsonl").read_text() == (tmp_path / "again.jsonl").read_text()
    mine = tmp_path / "mine.safetensors"
    assert ask("again", "--checkpoint", mine)[0] == 0 and mine.is_file()
    code, _, err = ask("again", "--checkpoint", mine, "--neighbours", "2")
    assert code == 2 and "neighbours is 2 now, 8 there" in err
    assert ask("again", "--checkpoint", mine, "--neighbours", "2", "--fresh")[0] == 0


def test_embeddings_and_generated_documents(proteus, tmp_path):
    rows = np.random.default_rng(0).standard_normal((3000, 32), np.float32)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "prompt.npy", 10 * rows[[1234]])
    code, out, err = proteus(
        "stream", tmp_path / "rows.npy", "--prompt", tmp_path / "prompt.npy", *SMALL, "--json", "-"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["best"][0]["token"] == 1234 and report["best"][0]["text"] is None
    code, out, err = proteus("stream", "--generated", "2k", *SMALL)
    assert code == 0 and "2,048 embeddings" in out and "salient: gate" in out and "pass 2" not in out


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([], "give a FILE or --generated N"),
        (["x.txt", "--generated", "2k"], "give a FILE or --generated N"),
        (["no.txt", "--model", "layer"], "no.txt"),
        (["--generated", "2k", "--model", "elk", "--prompt", "tea"], "'elk'"),
        (["--generated", "2x", "--model", "layer"], "--generated"),
        (["--generated", "2k", "--model", "layer", "--chunk-tokens", "0"], "--chunk-tokens"),
        (["--generated", "2k", "--model", "layer", "--positions", "new"], "original, compacted"),
        (["--generated", "2k", "--model", "layer", "--ram-limit", "much"], "--ram-limit: 'much'"),
        (["--generated", "2k", "--model", "layer", "--seed", "-1"], "'--seed'"),
        (["--generated", "2k", "--model", "layer", "--json", "."], "--json cannot be written"),
        (["--generated", "2k", "--model", "layer", "--events", "."], "--events cannot be written"),
        (["--generated", "2k", "--model", "layer", "--checkpoint", "."], "--checkpoint cannot be written"),
        (["--generated", "2k", "--model", "layer", "--prompt", "tea"], "must be .npy rows (P, D=512)"),
    ],
)
@pytest.mark.bad_input
def test_what_cannot_be_done_is_said(proteus, args, problem):
    code, _, err = proteus("stream", *args)
    assert code in (1, 2) and problem in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("rows", "prompt", "problem"),
    [
        (np.arange(100), "", "ids of another vocabulary"),
        (np.full((100, 8), np.nan, np.float32), "", "row 0 of the document holds NaN"),
        (np.ones((100, 8), np.float32), np.ones(8, np.float32), "(8,)"),
        (np.ones((100, 8), np.float32), np.ones((2, 9), np.float32), "must be (P, D=8)"),
        (np.ones((100, 8), np.float32), np.full((2, 8), np.inf, np.float32), "must be finite"),
        (np.ones((100, 8), np.float32), np.ones((2, 8), complex), "complex128"),
        (np.ones((100, 8), np.float32), np.array([{}], object), "prompt.npy"),
    ],
)
@pytest.mark.bad_input
def test_arrays_that_are_no_document_or_prompt_are_refused(proteus, tmp_path, rows, prompt, problem):
    np.save(tmp_path / "rows.npy", rows)
    if not isinstance(prompt, str):
        np.save(tmp_path / "prompt.npy", prompt, allow_pickle=True)
        prompt = tmp_path / "prompt.npy"
    code, _, err = proteus("stream", tmp_path / "rows.npy", "--prompt", prompt, *SMALL)
    assert code == 2 and problem in err


def test_a_word_that_is_not_in_the_document_says_nothing(proteus, document):
    code, _, err = proteus("stream", document, "--prompt", "zebra", *SMALL)
    assert code == 2 and "prompt='zebra'" in err
    reports = []
    for prompt in ("Elmsworth", "Elmsworth zebra"):
        _, out, _ = proteus("stream", document, "--prompt", prompt, *SMALL, "--json", "-")
        reports.append(json.loads(out)["best"][0])
    one, other = reports
    assert one["token"] == other["token"] and one["score"] == pytest.approx(other["score"], rel=1e-4)


def test_what_is_shown_is_one_line_of_plain_text(proteus, tmp_path):
    path = tmp_path / "loud.txt"
    path.write_text("tea \x1b[31m\a\0" * 5 + "x" * 9999, encoding="utf-8")
    code, out, _ = proteus("stream", path, "--model", "layer", "--prompt", "tea")
    assert code == 0 and all(line.isprintable() and len(line) < 700 for line in out.splitlines())
