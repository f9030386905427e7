"""Tokenising that is stopped, killed, or done by two processes: nothing half-written is left."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from books import disk, encode, left_in
from kills import run_through_kills

from proteus_playground.common.progress import Stopped
from proteus_playground.streaming import open_document, sources, token_cache, tokenising


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
from books import encode
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
