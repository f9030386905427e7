"""Documents as stores: the same rows whatever the mode, and clear errors where the file, disk or text is not right."""

from __future__ import annotations

import codecs
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from books import WORDS, disk, encode, left_in, open_words
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_playground.common import texts
from proteus_playground.streaming import (
    TextRows,
    encoder,
    generated,
    open_document,
    parse_bytes,
    sources,
    stores,
    tokenising,
)

# -- the same ids, however they are read ---------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(
        st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\r\té😀語ab"), min_size=1, max_size=400
    ),
    mark=st.booleans(),
    workers=st.integers(1, 3),
)
def test_ids_depend_on_the_text_alone(tmp_path_factory, text, mark, workers):
    tmp_path = tmp_path_factory.mktemp("ids")
    path = tmp_path / "any.txt"
    path.write_bytes(codecs.BOM_UTF8 * mark + text.encode())
    body = text.removeprefix("\ufeff") if not mark else text  # a first U+FEFF is a mark, not text
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenising, "CHARACTERS_PER_PIECE", 16)
        if not body:
            with pytest.raises(ValueError, match="is empty"):
                disk(path, tmp_path)
            return
        expected = sum(map(encode, tokenising.pieces([body], 16)), [])
        for block in (1, 7, 1 << 20):
            patch.setattr(sources, "BYTES_PER_READ", block)
            for limit in (None, 0):
                store = open_words(path, tmp_path / str(block), workers=workers, ram_limit=limit)
                assert store.mode == ("disk" if limit == 0 else "ram") and store.kind == "tokens"
                assert store.read(0, len(store)).tolist() == expected
                seen.append(store.fingerprint)
    assert len(set(seen)) == 1


@given(text=st.text(st.sampled_from("ab é語 \n\r\t"), max_size=300), size=st.integers(1, 40), step=st.integers(1, 50))
def test_pieces_are_the_text_cut_by_the_rule(text, size, step):
    cut = list(tokenising.pieces((text[at : at + step] for at in range(0, len(text), step)), size))
    assert "".join(cut) == text and all(cut)
    assert cut == list(tokenising.pieces([text], size))
    for piece, after in zip(cut, cut[1:], strict=False):
        assert size <= len(piece) <= 2 * size + 2
        word_split = not piece[-1].isspace() and not after[0].isspace()
        if word_split:
            assert not any(char.isspace() for char in (piece + after)[size - 1 : 2 * size]), "a break was there to take"


def test_smollm2_gives_the_ids_of_the_whole_text(smollm2, monkeypatch, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    own, fingerprint = encoder(tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json")))
    body = texts.load_text(texts.TOPICS).body[:120_000] + (WORDS * 50) + texts.load_text(texts.STORY).body
    path = tmp_path / "topics.txt"
    path.write_bytes(body.encode())
    for piece, workers in ((1_000, 1), (1_013, 2), (65_536, 2)):
        monkeypatch.setattr(tokenising, "CHARACTERS_PER_PIECE", piece)
        store = open_document(path, encode=own, fingerprint=fingerprint, workers=workers)
        assert store.read(0, len(store)).tolist() == own(body)


def test_rows_files_and_names_are_documents(tmp_path, small):
    rows = [{"text": line} for line in WORDS.splitlines()]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    body = "\n".join(row["text"] for row in rows)
    expected = sum(map(encode, tokenising.pieces([body], 64)), [])
    for source in (path, TextRows("lines", rows, "1")):
        store = open_words(source, tmp_path)
        assert store.mode == "ram" and store.read(0, len(store)).tolist() == expected
    story = open_words(texts.STORY, tmp_path)
    assert story.read(0, 9).tolist() == encode(texts.load_text(texts.STORY).body[:1000])[:9]
    with pytest.raises(ValueError, match="lines has no text in column 'body' of row 0"):
        open_words(TextRows("lines", rows, "1", column="body"), tmp_path)


@pytest.mark.parametrize(("name", "body"), [("rows.jsonl", b'{"text": "tea"}\n{"te'), ("rows.parquet", b"no")])
@pytest.mark.bad_input
def test_broken_rows_name_their_file(tmp_path, name, body):
    pytest.importorskip("datasets")
    (tmp_path / name).write_bytes(body)
    with pytest.raises(ValueError, match=f"{name} cannot be read as rows"):
        open_words(tmp_path / name, tmp_path)


def test_a_datasets_stream_is_a_document(tmp_path, book):
    datasets = pytest.importorskip("datasets")
    rows = datasets.load_dataset("text", data_files=str(book), split="train", streaming=True)
    store = open_words(TextRows("book", rows, "1"), tmp_path)
    assert store.read(0, len(store)).tolist() == encode("\n".join(row["text"] for row in rows))


def test_a_hub_stream_is_pinned_to_its_revision(tmp_path, monkeypatch):
    made = []

    def hub_rows(name):
        return revision, (made.append(row) or {"text": row} for row in ("potato", "soup"))

    monkeypatch.setattr(texts, "hub_rows", hub_rows)
    for revision in ("a", "a", "b"):  # noqa: B007 -- `hub_rows` sees it
        assert open_words("hub:a/b", tmp_path).read(0, 3).tolist() == encode("potato\nsoup")
    assert len(made) == 4  # once for each revision


# -- where it lies, and why ----------------------------------------------------------------------------------------


def test_the_choice_follows_free_memory_and_the_limit(tmp_path, book, monkeypatch):
    monkeypatch.setattr(stores, "free_memory", lambda: 40_000)
    store = open_words(book, tmp_path)
    size = book.stat().st_size
    assert 4 * size > 20_000 > store.nbytes  # the text might not have fitted, its ids do
    assert store.mode == "ram" and store.why.endswith("needed, 40.0 kB free, limit 20.0 kB (50% of that)")
    low = open_words(book, tmp_path, ram_limit=store.nbytes - 1)
    assert low.mode == "disk" and str(tmp_path / "cache") in low.why and "(as asked)" in low.why
    assert low.fingerprint == store.fingerprint
    assert open_words(book, tmp_path, ram_limit=10**12).why.endswith("limit 40.0 kB (all that is free)")
    monkeypatch.setattr(stores, "free_memory", lambda: 8 * size)
    fresh = open_words(book, tmp_path / "other")
    assert fresh.mode == "ram" and "at most" in fresh.why and not (tmp_path / "other").exists()


def test_memory_stays_flat_on_disk(tmp_path):
    """A document of 48 MB of text and 64 MB of ids, in a fresh process."""
    script = f"""
import os, sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import numpy as np, psutil
from proteus_playground.streaming import open_document
rss = lambda: psutil.Process().memory_info().rss
def encode(text): return np.frombuffer(text.encode(), np.uint8)[::3]
open("big.txt", "w").write("to be or not " * 3_700_000)
before = top = rss()
def look(*_):
    global top
    top = max(top, rss())
store = open_document("big.txt", encode=encode, fingerprint="b", ram_limit=0, cache="c", workers=2, progress=look)
for start in range(0, len(store), 65536):
    store.read(start, min(start + 65536, len(store))); look()
print(store.mode, store.nbytes, top - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    mode, size, grown = done.stdout.split()
    assert mode == "disk" and int(size) > 60e6
    assert int(grown) < 30e6


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("2GB", 2 * 10**9), ("2 gib", 2**31), ("1.5k", 1500), ("7MB", 7 * 10**6), ("3T", 3 * 10**12)],
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "2XB", "1e9", "2 G B", "nan"])
@pytest.mark.bad_input
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is no size: allowed is"):
        parse_bytes(text)


def test_fingerprints_follow_the_content(tmp_path, book):
    np.save(tmp_path / "a.npy", np.arange(50))
    first = open_document(tmp_path / "a.npy")
    assert open_document(tmp_path / "a.npy", ram_limit=0).fingerprint == first.fingerprint
    np.save(tmp_path / "a.npy", np.arange(50)[::-1].copy())
    prints = {first.fingerprint, open_document(tmp_path / "a.npy").fingerprint}
    prints |= {generated(50, seed=seed, width=width).fingerprint for seed in (0, 1) for width in (None, 4)}
    prints |= {open_document(book, encode=encode, fingerprint=name).fingerprint for name in "ab"}
    book.write_bytes(book.read_bytes().replace(b"gate", b"date"))
    prints.add(open_document(book, encode=encode, fingerprint="a").fingerprint)
    assert len(prints) == 9 and all(int(some, 16) for some in prints)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.bad_input
def test_broken_and_empty_text(tmp_path, limit, small):
    path = tmp_path / "a.txt"
    for broken, byte in ((b"\xff", 0xFF), (b"\xe8\xaa", 0xE8), (b"\xe8\xaa ", 0xE8)):
        path.write_bytes("naïve ".encode() * 99 + broken)
        with pytest.raises(ValueError, match=rf"not UTF-8 text \(byte 693 is {byte:#04x}\)"):
            open_words(path, tmp_path, ram_limit=limit)
    for empty in (b"", codecs.BOM_UTF8):
        path.write_bytes(empty)
        with pytest.raises(ValueError, match="empty"):
            open_words(path, tmp_path, ram_limit=limit)
    assert left_in(tmp_path / "cache") == set()


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file: allowed is a UTF-8 text file"):
        open_words(tmp_path / "none.txt", tmp_path)
    with pytest.raises(IsADirectoryError, match="a folder is no document"):
        open_words(tmp_path, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        open_words(tmp_path / "pipe", tmp_path)
    with pytest.raises(TypeError, match="source=7: allowed is"):
        open_words(7, tmp_path)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"ram_limit": -1}, ValueError, "ram_limit=-1"),
        ({"ram_limit": "2GB"}, TypeError, "ram_limit='2GB'"),
        ({"workers": 0}, ValueError, "workers=0"),
        ({"encode": None}, ValueError, "encode=None"),
        ({"encode": lambda text: "ids"}, TypeError, "encode returned"),
        ({"encode": lambda text: [0.5]}, TypeError, "encode returned float64"),
        ({"encode": lambda text: [-3]}, ValueError, "encode returned ids from -3 to -3"),
        ({"encode": lambda text: []}, ValueError, "is empty"),
    ],
)
@pytest.mark.bad_input
def test_arguments_that_are_not_allowed(tmp_path, book, options, error, said):
    with pytest.raises(error, match=said):
        open_document(book, **({"encode": encode, "fingerprint": "words", "cache": tmp_path / "cache"} | options))
    store = open_words(book, tmp_path)
    for start, stop in [(-1, 2), (2, 1), (0, len(store) + 1)]:
        with pytest.raises(ValueError, match=f"start={start}, stop={stop}: allowed is"):
            store.read(start, stop)


def unprivileged(action):
    """Run `action` as nobody where we are root, whom no permission stops."""
    if os.geteuid():
        return action()
    os.seteuid(65534)
    try:
        return action()
    finally:
        os.seteuid(0)


def test_no_permission(tmp_path, book):
    book.chmod(0)
    with pytest.raises(PermissionError, match="book.txt"):
        unprivileged(lambda: open_words(book, tmp_path))
    book.chmod(0o644)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for folder in (locked, locked / "below", book):  # read-only, in a read-only one, and a file
        with pytest.raises(OSError, match="cache folder, or name another"):
            unprivileged(
                lambda folder=folder: open_document(
                    sources.TextRows("rows", [{"text": WORDS}], "1"),
                    encode=encode,
                    fingerprint="words",
                    ram_limit=0,
                    cache=folder,
                )
            )
    assert list(locked.iterdir()) == []


# -- files that change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["shrank", "grew", "was written to"])
@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.bad_input
def test_text_that_changes_while_it_is_tokenised(tmp_path, book, small, how, limit):
    raw = book.read_bytes()

    def change(share, said):
        os.utime(book, ns=(1, 1))
        book.write_bytes({"shrank": raw[:300], "grew": raw + b"x", "was written to": raw[::-1]}[how])

    with pytest.raises(OSError, match=f"book.txt {how} while it was in use"):
        open_words(book, tmp_path, ram_limit=limit, progress=change)
    assert left_in(tmp_path / "cache") == set()


def test_text_that_is_replaced_while_it_is_tokenised(tmp_path, book, small):
    def replace(share, said):
        (tmp_path / "new.txt").write_bytes(book.read_bytes() + b"!")
        os.replace(tmp_path / "new.txt", book)

    with pytest.raises(OSError, match="book.txt grew while it was in use"):
        disk(book, tmp_path, progress=replace)
    assert left_in(tmp_path / "cache") == set()


def test_the_cache_is_used_once_made_and_made_again_when_it_is_not_sound(tmp_path, book, small):
    calls = []

    def counted(text):
        calls.append(text)
        return encode(text)

    def again():
        calls.clear()
        store = open_document(book, encode=counted, fingerprint="c", ram_limit=0, cache=tmp_path / "cache")
        assert store.read(0, len(store)).tolist() == expected
        return bool(calls)

    expected = sum(map(encode, tokenising.pieces([book.read_bytes().decode()], 64)), [])
    assert again() and not again() and left_in(tmp_path / "cache") == {".npy", ".json"}
    (array,) = (tmp_path / "cache").glob("*.npy")
    (recipe,) = (tmp_path / "cache").glob("*.json")
    assert np.load(array, mmap_mode="r").tolist() == expected  # any other program can read it
    raw = array.read_bytes()
    os.utime(array)
    assert not again()  # touched, but sound
    for broken in (raw[:-3], raw[:-4] + b"\0\0\0\1", b""):
        array.write_bytes(broken)
        assert again() and not again()
    for words in ("", "[1]", "{}", '{"recipe": 1}', recipe.read_text()[:-9]):
        recipe.write_text(words)
        assert again() and not again()
    recipe.unlink()  # as after a kill between the two files
    assert again() and not again()
    book.write_bytes(book.read_bytes().replace(b"gate", b"date"))
    expected = sum(map(encode, tokenising.pieces([book.read_bytes().decode()], 64)), [])
    assert again() and left_in(tmp_path / "cache") == {".npy", ".json"}
