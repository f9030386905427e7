"""A short text as a file, its tokens, and the store that opens it."""

from __future__ import annotations

from pathlib import Path

from proteus_playground.streaming import open_document

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
