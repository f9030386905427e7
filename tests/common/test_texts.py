from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from tiny_model import fake_hub

from proteus_playground.common import hub, texts
from proteus_playground.common.texts import Text, calibration_text, load_text, pasted, text_names


def test_the_story_is_whole_and_ends_with_its_question():
    story = load_text("humble token")
    words = story.body.split()
    assert 1400 <= len(words) <= 1700
    assert "page 55,555" in " ".join(words[:30])
    closing = story.body.strip().splitlines()[-1]
    assert closing.startswith('"How do you make potato soup') and closing.endswith('?"')


@pytest.mark.parametrize(
    "fact", ["RECEIPT NUMBER 4471", "one spoonful of horseradish", "eleven minutes with the lid on"]
)
def test_the_story_plants_each_answer_once_and_early(fact):
    body = load_text("humble token").body
    assert body.count(fact) == 1
    assert body.index(fact) < len(body) / 4


def test_the_commonplace_book_is_varied_and_shares_nothing_with_the_story():
    book, story = load_text("commonplace book").body, load_text("humble token").body
    pieces = [line for line in book.splitlines() if re.match(r"[A-Z]{2,}|[A-Z] [A-Z]{2,}", line)]
    assert 2200 <= len(book.split()) <= 2500 and len(pieces) >= 20
    assert not re.search(r"potato|soup|horseradish|leek|receipt|Odalys|Halloran|carburetor|4471", book, re.I)
    words = [re.findall(r"\w+", body.lower()) for body in (book, story)]
    in_book, in_story = ({tuple(some[at : at + 6]) for at in range(len(some) - 5)} for some in words)
    assert not in_book & in_story


def test_pythons_manual_is_english_and_large():
    manual = load_text("python topics")
    assert len(manual.body) > 300_000
    assert " the " in manual.body and not manual.body.startswith(" ")


@pytest.mark.parametrize("name", text_names())
def test_every_name_loads_and_is_calibrated_on_another_text(name):
    text = load_text(name)
    assert isinstance(text, Text) and text.name == name and text.source
    other = calibration_text(exclude=name)
    assert other.name != name and other.body != text.body
    assert other.name == ("python topics" if name == "commonplace book" else "commonplace book")


def test_a_file_of_ones_own_is_read_as_it_is(tmp_path):
    file = tmp_path / "soup.txt"
    file.write_bytes("\ufeffLauch, Kartoffeln,\n\n  Crème fraîche 🥔\n".encode())
    text = load_text(str(file))
    assert text == Text("soup.txt", "Lauch, Kartoffeln,\n\n  Crème fraîche 🥔\n", str(file))
    assert load_text(file) == text
    assert calibration_text(exclude=str(file)).name == "commonplace book"


def test_pasted_text():
    assert pasted("potato soup").body == "potato soup"


def _broken(folder: Path) -> Path:
    file = folder / "latin1.txt"
    file.write_bytes("Crème".encode("latin-1"))
    return file


def _empty(folder: Path) -> Path:
    file = folder / "empty.txt"
    file.write_text(" \n\t\n")
    return file


def _huge(folder: Path) -> Path:
    file = folder / "huge.txt"
    with open(file, "wb") as hole:
        hole.truncate(texts.MAX_BYTES + 1)
    return file


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_broken, "is not UTF-8 text (byte 2 is 0xe8)"),
        (_empty, "is an empty file"),
        (_huge, "holds 32,000,001 bytes: allowed is up to 32,000,000"),
        (lambda folder: folder / "missing.txt", "is no known text and no file: allowed is 'humble token'"),
        (lambda folder: folder, "is a folder"),
    ],
)
@pytest.mark.bad_input
def test_a_bad_file_is_named(tmp_path, make, message):
    path = str(make(tmp_path))
    with pytest.raises(ValueError, match=re.escape(f"name={path!r} {message}")):
        load_text(path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load_text(""), ValueError, "name=''"),
        (lambda: load_text("Humble Token"), ValueError, "name='Humble Token'"),
        (lambda: load_text("a\0b"), ValueError, r"name='a\x00b'"),
        (lambda: load_text(None), TypeError, "name=None"),
        (lambda: load_text(b"humble token"), TypeError, "name=b'humble token'"),
        (lambda: load_text("hub:"), ValueError, "name='hub:'"),
        (lambda: load_text("hub:tiny_shakespeare"), ValueError, "name='hub:tiny_shakespeare'"),
        (lambda: load_text("hub:a/b/c/d"), ValueError, "name='hub:a/b/c/d'"),
        (lambda: pasted(""), ValueError, "body=''"),
        (lambda: pasted("  \n"), ValueError, "body='  \\n'"),
        (lambda: pasted(7), TypeError, "body=7"),
        (lambda: calibration_text(None), TypeError, "exclude=None"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"])
@pytest.mark.bad_input
def test_the_hub_is_not_asked_when_switched_off(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConnectionError, match=rf"name='hub:a/b' .* \({variable} is set\): allowed .* 'humble token'"):
        load_text("hub:a/b")


def test_a_hub_that_cannot_be_reached_is_given_up_on_quickly(monkeypatch, tmp_path):
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hub, "SECONDS", 0.3)
    with fake_hub(tmp_path, silent=30) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        began = time.perf_counter()
        with pytest.raises(ConnectionError, match="name='hub:a/b' needs the Hugging Face hub"):
            load_text("hub:a/b")
    assert time.perf_counter() - began < 5


def test_rows_of_a_data_set_are_joined_up_to_the_limit(monkeypatch):
    import datasets

    monkeypatch.setattr(texts, "_ask_hub", lambda name, repo: "5f0e")
    monkeypatch.setattr(texts, "MAX_BYTES", 80)
    asked = []

    def load_dataset(repo, config, *, split, streaming, revision):
        asked.append((repo, config, split, streaming, revision))
        return iter([{"text": "potato"}] * 1000)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = load_text("hub:Salesforce/wikitext/wikitext-2-raw-v1")
    assert text.body == "potato\npotato" and text.name.startswith("hub:")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "train", True, "5f0e")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kw: iter([{"image": 1}]))
    with pytest.raises(ValueError, match="name='hub:a/pictures' has no 'text' column"):
        load_text("hub:a/pictures")
