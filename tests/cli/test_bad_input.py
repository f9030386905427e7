"""Bad numbers, bad files and damaged runs: each ends with a sentence that names the argument."""

from __future__ import annotations

import json
import os
import typing
from pathlib import Path

import pytest

pytest.importorskip("torch")

from every_option import EVERY  # noqa: E402

from proteus_playground.cli import app as cli  # noqa: E402

pytestmark = pytest.mark.bad_input
HUGE = "99999999999999999999"
NUMBERS = {int: ("x", "1.5", "", "1e3", "٣x"), float: ("x", "", "1,5")}


@pytest.fixture
def refused(capsys, monkeypatch, tmp_path):
    """Run `proteus`, which must fail, with an empty cache in an empty folder; what it says."""
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(list(args))
        assert end.value.code in (1, 2)
        return capsys.readouterr().err

    return call


def kind_of(hint) -> type:
    return next(kind for kind in (*typing.get_args(hint), hint) if kind is not type(None))


@pytest.mark.parametrize(
    ("path", "typed", "value"),
    [
        (path, typed, value)
        for path, typed, info, hint in EVERY
        for value in NUMBERS.get(kind_of(hint), ())
        if typed.startswith("--")
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_is_no_number_is_named(path, typed, value, refused):
    assert typed in refused(*path, f"{typed}={value}")


CASES = [
    ("bench heads --tokens -1", "--tokens"),
    ("bench heads --tokens 0", "--tokens"),
    (f"bench heads --tokens {HUGE}", "--tokens"),
    (f"bench heads --d-model {HUGE}", "--d-model"),
    (f"bench heads --seed {HUGE}", "--seed"),
    ("bench heads --seed -1", "--seed"),
    (f"bench decode --heads {HUGE}", "--heads"),
    (f"bench decode --head-dim {HUGE}", "--head-dim"),
    (f"bench decode --lengths {HUGE}", "--lengths"),
    (f"bench profile --tokens {HUGE}", "--tokens"),
    (f"bench profile --tokens {HUGE}m", "--tokens"),
    (f"bench profile --d-model {HUGE}", "--d-model"),
    (f"bench profile --shortlist {HUGE}", "--shortlist"),
    (f"bench exam --questions {HUGE}", "--questions"),
    (f"bench exam --lengths {HUGE}", "--lengths"),
    ("bench exam --model nofile", "nofile"),
    ("bench exam --alphas auto", "--alphas"),
    ("bench stream --storage=", "--storage"),
    ("bench stream --by=", "--by"),
    ("bench stream --storage tape", "--storage"),
    (f"bench stream --lengths {HUGE}", "--lengths"),
    (f"bench stream --chunk-tokens {HUGE}", "--chunk-tokens"),
    ("bench stream --nucleus nan", "nucleus=nan"),
    ("bench stream --nucleus inf", "nucleus=inf"),
    ("bench longest --start 8m --last 4k", "--start"),
    (f"bench longest --halvings {HUGE}", "--halvings"),
    ("bench sweep --alphas nan", "--alphas"),
    ("bench sweep --budget-s -1", "--budget-s"),
    ("bench sweep --lengths 8k..4k", "--lengths"),
    ("bench sweep --lengths 4k..8k/1", "--lengths"),
    ("bench sweep --lengths 0", "--lengths"),
    ("bench sweep --cap nan", "--cap"),
    ("bench sweep --cap -1", "--cap"),
    ("bench layer --dna nan", "dna_fraction=nan"),
    ("bench layer --gates 0", "gates_per_group=0"),
    ("bench page nofile p.html", "nofile"),
    ("evidence --scale x", "--scale"),
    ("evidence --scale []", "--scale"),
    ("evidence --scale {\"depth\":1}", "--scale"),
    ("evidence --lengths 0", "--lengths"),
    ("evidence --seeds 0", "seeds=0"),
    ("evidence --cases -1", "cases=-1"),
    ("evidence --report", "evidence.json"),
    (f"verify --chunk {HUGE} --model layer", "chunk_tokens="),
    (f"verify --seeds {HUGE} --model layer", "seeds="),
    ("verify --answers -1 --model layer", "answers=-1"),
    ("verify --buffer-share nan --model layer", "buffer_share=nan"),
    ("verify --depths nan --model layer", "depths"),
    ("verify --pairs . --model layer", "--pairs"),
    ("verify --pairs nofile --model layer", "--pairs"),
    ("verify --haystack nofile --model layer", "nofile"),
    ("duel --minutes nan", "minutes=nan"),
    ("duel --minutes -1", "minutes=-1"),
    ("duel --seeds 1,x", "--seeds"),
    ("duel --seeds=", "--seeds"),
    ("duel --tokenizer .", "--tokenizer"),
    ("duel --text .", "'.' is a folder"),
    ("train shelf-mini --out t --minutes nan", "minutes=nan"),
    ("train shelf-mini --out t --minutes 0", "minutes=0"),
    ("train shelf-mini --out t --start nofile", "nofile"),
    ("train shelf-huge --out t", "NAME"),
    ("train shelf-mini --out t --device tpu", "--device"),
    ("train shelf-mini --out t --precision float8", "precision='float8'"),
    ("stream --generated 100 --model layer --nucleus nan", "nucleus=nan"),
    ("stream --generated 100 --model layer --neighbours -1", "neighbours=-1"),
    (f"stream --generated {HUGE} --model layer", "--generated"),
    (f"stream --generated 100 --model layer --buffer-tokens {HUGE}", "--buffer-tokens"),
    (f"stream --generated 100 --model layer --seed {HUGE}", "--seed"),
    ("stream --generated 100 --model layer --ram-limit -1", "--ram-limit"),
    ("stream . --model layer", "a folder is no document"),
    ("stream nofile --model layer", "nofile"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "named"), CASES, ids=[line for line, _ in CASES])
def test_bad_values_are_named(line, named, refused):
    assert named in refused(*line.split())


@pytest.mark.parametrize("command", ["sweep", "longest", "profile", "decode"])
@pytest.mark.parametrize(
    ("fields", "named"),
    [('{"depth": 1}', "--config"), ('{"keep_ratio": "a"}', "keep_ratio='a'"), ('{"keep_ratio": NaN}', "keep_ratio=nan"),
     ("[" * 100_000, "--config"), ("null", "--config"), ('{"keep_ratio": 1e999}', "keep_ratio=inf"),
     ('{"shortlist": true}', "shortlist=True")],
)  # fmt: skip
def test_bad_fields_of_a_config_are_named(command, fields, named, refused):
    assert named in refused("bench", command, "--config", fields)


ROWS = {
    "null": (b"null\n", "its first row is no JSON object"),
    "text": (b'"tea"\n', "its first row is no JSON object"),
    "number": (b'{"text": 1}\n', "no text in column 'text' of row 0, but int"),
    "other column": (b'{"body": "tea"}\n', "no text in column 'text' of row 0, only ['body']"),
    "null text": (b'{"text": null}\n', "no text in column 'text' of row 0"),
    "half": (b'{"text": "te', "cannot be read as rows of text"),
    "UTF-16": ('{"text": "tea"}\n'.encode("utf-16"), "cannot be read as rows of text"),
    "lines": (b"\n\n\n", "is empty"),
    "nothing": (b"", "is an empty file"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_bad_rows_of_text_are_named(kind, refused):
    pytest.importorskip("datasets")
    Path("rows.jsonl").write_bytes(ROWS[kind][0])
    error = refused("stream", "rows.jsonl", "--model", "layer", "--no-progress")
    assert "rows.jsonl" in error and ROWS[kind][1] in error


STREAM = ("stream", "doc.txt", "--model", "layer", "--prompt", "tea", "--no-answer", "--no-progress")
DAMAGE = {
    "text": b"hello\n", "a list": b"[1]\n", "an object": b"{}\n", "no UTF-8": b"\xff\xfe\n",
    "binary": bytes(1000) + b"\n",
    "a wrong type": b'{"chunk": "a", "arm": 1, "step": "x", "alpha": []}\n',
}  # fmt: skip


def stream(*options: str) -> None:
    Path("doc.txt").write_text("a note about tea, and a page about soup\n" * 200)
    with pytest.raises(SystemExit) as end:
        cli.main([*STREAM, *options])
    assert not end.value.code


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_of_something_else_is_no_log_of_events(damage, refused):
    options = ("--checkpoint", "ck", "--events", "events.jsonl")
    stream(*options)
    Path("events.jsonl").write_bytes(DAMAGE[damage])
    assert "--events events.jsonl" in refused(*STREAM, *options)
    assert Path("events.jsonl").read_bytes() == DAMAGE[damage], "it is left as it was"


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_named_and_kept(share, refused):
    stream("--checkpoint", "ck")
    whole = Path("ck").read_bytes()
    half = whole[: int(share * len(whole))]
    Path("ck").write_bytes(half)
    assert "'ck': not a file that a checkpointed stream wrote" in refused(*STREAM, "--checkpoint", "ck")
    assert Path("ck").read_bytes() == half


DUEL = ("duel", "--text", "humble token", "--steps", "2", "--length", "16", "--out", "d")


@pytest.fixture(scope="module")
def finished_duel(tmp_path_factory):
    """The files of a duel of two steps, by name."""
    here, out = os.getcwd(), tmp_path_factory.mktemp("duel")
    os.chdir(out)
    try:
        with pytest.raises(SystemExit) as end:
            cli.main(list(DUEL))
        assert not end.value.code
    finally:
        os.chdir(here)
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def restore(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["settings.json", "scores.jsonl", "dense/log.jsonl", "proteus/state.safetensors"])
def test_a_damaged_duel_is_named(name, damage, refused, finished_duel):
    restore(finished_duel)
    Path("d", name).write_bytes(DAMAGE[damage])
    error = refused(*DUEL)
    assert "out='d'" in error or "'d/" in error
    assert Path("d", name).read_bytes() == DAMAGE[damage]


@pytest.mark.parametrize("share", [0, 0.3, 0.7])
@pytest.mark.parametrize("arm", ["dense", "proteus"])
def test_a_log_that_lost_steps_is_named(arm, share, refused, finished_duel):
    restore(finished_duel)
    log = Path("d", arm, "log.jsonl")
    log.write_bytes(log.read_bytes()[: int(share * log.stat().st_size)])
    assert f"folder='d/{arm}': its log.jsonl has" in refused(*DUEL)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ledger_of_notebooks_costs_no_notebook(damage, tmp_path):
    from proteus_playground.cli import play

    shipped, mine = tmp_path / "shipped", tmp_path / "mine"
    shipped.mkdir()
    (shipped / play.FIRST).write_text("{}")
    play.copy_notebooks(shipped, mine, say=lambda _: None)
    (mine / play.FIRST).write_text("the user's")
    (mine / play.LEDGER).write_bytes(DAMAGE[damage])
    play.copy_notebooks(shipped, mine, say=lambda _: None)
    assert (mine / play.FIRST).read_text() == "the user's" and isinstance(
        json.loads((mine / play.LEDGER).read_text()), dict
    )
