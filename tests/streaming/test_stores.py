"""Documents as stores: the same rows whatever the mode, and clear errors where the file, disk or text is not right."""

from __future__ import annotations

import codecs
import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kills import run_through_kills

from proteus_playground.common import texts
from proteus_playground.common.progress import Stopped
from proteus_playground.streaming import (
    TextRows,
    encoder,
    generated,
    open_document,
    parse_bytes,
    sources,
    stores,
    token_cache,
    tokenising,
)

WORDS = "the humble token waits\nin line for a gate, and\r\nnobody lures it: naïve 😀 語 prototypes\n\n"


def encode(text: str) -> list[int]:
    """Words and what stands between them; an id depends on the whole word, so a split word shows."""
    out, word = [], ""
    for char in text:
        if char.isspace():
            out += [sum(map(ord, word)) * 131 + len(word)] * bool(word) + [ord(char)]
            word = ""
        else:
            word += char
    return out + [sum(map(ord, word)) * 131 + len(word)] * bool(word)


def open_words(path, tmp_path, **options):
    return open_document(path, encode=encode, fingerprint="words", cache=tmp_path / "cache", **options)


def disk(path, tmp_path, **options):
    return open_words(path, tmp_path, ram_limit=0, **options)


def left_in(folder: Path) -> set[str]:
    """Suffixes of what a run left, the lock aside."""
    return {file.suffix for file in folder.glob("*")} - {".lock"} if folder.exists() else set()


@pytest.fixture
def small(monkeypatch):
    """Pieces and blocks so small that a page of text has many of each."""
    monkeypatch.setattr(tokenising, "CHARACTERS_PER_PIECE", 64)
    monkeypatch.setattr(sources, "BYTES_PER_READ", 50)
    monkeypatch.setattr(token_cache, "TOKENS_PER_HASH", 100)


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_bytes((WORDS * 60).encode())
    return path


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


# -- arrays and generated rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["<i4", "<i8", ">u2", "<u4"])
@pytest.mark.parametrize("limit", [None, 0])
def test_token_arrays(tmp_path, dtype, limit):
    ids = np.random.default_rng(0).integers(0, 60_000, 1000).astype(dtype)
    np.save(tmp_path / "ids.npy", ids)
    store = open_document(tmp_path / "ids.npy", ram_limit=limit)
    assert (len(store), store.kind, store.mode, store.nbytes) == (1000, "tokens", "disk" if limit == 0 else "ram", 4000)
    got = store.read(10, 990)
    assert got.dtype == np.int32 and (got == ids[10:990]).all()
    assert pickle.loads(pickle.dumps(store)).read(3, 3).shape == (0,)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", "bfloat16"])
@pytest.mark.parametrize("limit", [None, 0])
def test_embeddings(tmp_path, dtype, limit):
    import torch
    from safetensors.torch import save_file

    rows = np.random.default_rng(0).standard_normal((300, 7)).astype("<f4")
    if dtype == "bfloat16":
        path = tmp_path / "rows.safetensors"
        save_file({"x": torch.from_numpy(rows).to(torch.bfloat16)}, path)
        rows = torch.from_numpy(rows).to(torch.bfloat16).float().numpy()
    else:
        path = tmp_path / "rows.npy"
        rows = rows.astype(dtype)
        np.save(path, rows)
    store = open_document(path, ram_limit=limit)
    got = store.read(5, 299)
    assert (store.kind, store.width, len(store)) == ("embeddings", 7, 300)
    assert got.dtype == (np.float16 if dtype == "<f2" else np.float32) and got.nbytes == store.nbytes * 294 // 300
    assert (got == rows[5:299].astype(got.dtype)).all()


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


@pytest.mark.parametrize("width", [None, 1, 6, 512])
def test_generated_rows_are_the_same_in_any_slice(width):
    store = generated(10_000, seed=3, width=width, vocabulary=500)
    whole = store.read(0, 10_000)
    for start, stop in [(0, 1), (1023, 1025), (1024, 2048), (777, 5000), (9_999, 10_000), (4, 4)]:
        assert (store.read(start, stop) == whole[start:stop]).all()
    longer = generated(10**9, seed=3, width=width, vocabulary=500)
    assert (longer.read(0, 10_000) == whole).all() and longer.mode == "generated"
    assert len(np.unique(longer.read(10**9 - 2000, 10**9), axis=0)) > 470
    assert (generated(10_000, seed=4, width=width, vocabulary=500).read(0, 99) != whole[:99]).any()
    if width is None:
        assert (whole.min(), whole.max()) == (0, 499)
    else:
        assert abs(whole.mean()) < 0.05 and abs(whole.var() - 1) < 0.05
        assert abs(np.corrcoef(whole[:-1, 0], whole[1:, 0])[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("options", "error"),
    [({"tokens": 0}, ValueError), ({"tokens": 1.5}, TypeError), ({"tokens": 9, "width": 0}, ValueError)]
    + [({"tokens": 9, "seed": -1}, ValueError), ({"tokens": 9, "vocabulary": True}, TypeError)],
)
@pytest.mark.bad_input
def test_what_cannot_be_generated(options, error):
    with pytest.raises(error, match=f"{list(options)[-1]}="):
        generated(**options)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array(["a"], object), "Python objects in dtype"),
        (np.zeros((2, 3, 4)), r"float64 of shape \(2, 3, 4\)"),
        (np.zeros(4), r"float64 of shape \(4,\)"),
        (np.zeros((4, 4), int), r"int64 of shape \(4, 4\)"),
        (np.zeros(0, int), r"shape \(0,\)"),
        (np.zeros((5, 4), order="F"), "column after column"),
        (np.zeros(4, bool), "bool"),
    ],
)
@pytest.mark.bad_input
def test_arrays_that_are_no_document(tmp_path, array, said):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=said):
        open_document(tmp_path / "a.npy")


def test_broken_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5, -1, 7]))
    with pytest.raises(ValueError, match="token 1 is -1: allowed are ids from 0"):
        open_document(tmp_path / "a.npy")
    raw = (tmp_path / "a.npy").read_bytes()
    for torn in (raw[:-4], raw[:20], b"hello"):
        (tmp_path / "a.npy").write_bytes(torn)
        with pytest.raises(ValueError, match="cannot be read as .npy"):
            open_document(tmp_path / "a.npy")
        (tmp_path / "a.safetensors").write_bytes(torn)
        with pytest.raises(ValueError, match="cannot be read as safetensors"):
            open_document(tmp_path / "a.safetensors")
    from safetensors.numpy import save_file

    for tensors in ({"a": np.zeros(3)}, {"a": np.zeros((3, 3), "f4"), "b": np.zeros((3, 3), "f4")}):
        save_file(tensors, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="allowed is one tensor"):
            open_document(tmp_path / "a.safetensors")


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


def test_an_array_that_changes_afterwards(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(1000))
    memory, store = open_document(path), open_document(path, ram_limit=0)
    os.truncate(path, 2000)
    with pytest.raises(OSError, match="a.npy shrank"):
        store.read(0, 10)
    assert memory.read(990, 1000).tolist() == list(range(990, 1000))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="a.npy"):
        store.read(0, 10)


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


# -- runs that do not reach their end ------------------------------------------------------------------------------


def test_a_stopped_run_leaves_nothing_and_the_next_one_is_whole(tmp_path, book, small):
    said = []
    with pytest.raises(Stopped):
        disk(book, tmp_path, progress=lambda share, text: said.append(share), stop=lambda: len(said) > 20)
    assert len(said) == 21 and said == sorted(said) and 0 < said[-1] < 1
    assert left_in(tmp_path / "cache") == set()
    assert disk(book, tmp_path).fingerprint == disk(book, tmp_path / "plain").fingerprint


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, book, small, monkeypatch):
    room, write = [3000], token_cache._write_all

    def full(file, data):
        room[0] -= len(data)
        if room[0] < 0:
            file.write(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(token_cache, "_write_all", full)
    with pytest.raises(OSError, match=r"No space left on device after \d+ tokens: make room") as caught:
        disk(book, tmp_path)
    assert caught.value.errno == errno.ENOSPC and left_in(tmp_path / "cache") == set()


def test_the_system_refuses_a_write_half_way(tmp_path, book):
    """A file size limit: the kernel takes a part of a write, then none."""
    script = CHILD + "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\ntry: run()\n"
    script += "except OSError as err: print(err)"
    done = subprocess.run([sys.executable, "-c", script, str(book), str(tmp_path / "cache")], **PIPES)
    assert "File too large after" in done.stdout, done.stderr
    assert left_in(tmp_path / "cache") == set()


CHILD = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from test_stores import encode
from proteus_playground.streaming import open_document, sources, tokenising
tokenising.CHARACTERS_PER_PIECE, sources.BYTES_PER_READ = 64, 50
def slow(text):
    time.sleep(0.02)
    return encode(text)
def run(encode=encode):
    store = open_document(sys.argv[1], encode=encode, fingerprint="words", ram_limit=0, cache=sys.argv[2], workers=2)
    print(store.fingerprint, flush=True)
"""
PIPES = {"capture_output": True, "text": True, "timeout": 60}


def child_print(book, tmp_path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenising, "CHARACTERS_PER_PIECE", 64)
        return disk(book, tmp_path / "plain").fingerprint


def tokenise(folder: Path, step: Callable[[], None]) -> None:
    """Tokenises from the start; the ids that a killed run left are no finished file."""
    tokenising.CHARACTERS_PER_PIECE, sources.BYTES_PER_READ = 64, 50
    left = left_in(folder / "cache")
    assert ".npy" not in left
    if ".part" in left:
        (folder / "begun").touch()

    def told(text: str) -> list[int]:
        step()
        return encode(text)

    store = open_document(
        folder / "book.txt", encode=told, fingerprint="words", ram_limit=0, cache=folder / "cache", workers=2
    )
    (folder / "print").write_text(store.fingerprint)


def test_kill_at_any_moment_then_run_again_gives_the_same_array(tmp_path, book):
    run_through_kills(tokenise, tmp_path, kills=12, span=40)
    assert (tmp_path / "begun").exists(), "no kill came while the ids were written"
    assert (tmp_path / "print").read_text() == child_print(book, tmp_path)
    assert left_in(tmp_path / "cache") == {".npy", ".json"}


def test_two_processes_tokenise_once(tmp_path, book):
    command = [sys.executable, "-c", CHILD + "run(slow)", str(book), str(tmp_path / "cache")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=60)[0].split()[-1] for child in both]
    assert said == [child_print(book, tmp_path)] * 2
    assert left_in(tmp_path / "cache") == {".npy", ".json"}
