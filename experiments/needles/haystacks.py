"""Long documents of real English, as tokens with the positions of sentence ends.

Python's pydoc topics are part of every installation. The Jargon File and the King James text need Debian's packages
`jargon-text` and `bible-kjv`. Any text that `load_text` reads can be used instead.

Axes: `T` tokens, `E` sentence ends.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np

from ...common.texts import TOPICS, load_text

JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
BIBLE = ("bible", "-f", "gen1:1-rev22:21")
SENTENCE = re.compile(r"(?<=[.!?])(?=\s+[A-Z\"'(])")
CHAPTER, VERSE = re.compile(r"^\w+?\d+:1 ", re.MULTILINE), re.compile(r"^\w+?\d+:\d+ ", re.MULTILINE)


class Words(Protocol):
    """A tokenizer: `vocabulary[i]` is the text of token i."""

    vocabulary: list[str]

    def encode(self, body: str) -> np.ndarray:
        """Token ids `(n,)` int32 of a text, without special tokens."""


def read(ids: np.ndarray, words: Words) -> str:
    """The text of some tokens."""
    return "".join(words.vocabulary[i] for i in ids.tolist())


@dataclass(frozen=True)
class Haystack:
    """A document into which facts are written."""

    tokens: np.ndarray  # (T,) int32
    ends: np.ndarray  # (E,) int64, increasing: a sentence ends before each of these tokens; the first is 0
    note: str  # where it came from and how often it was repeated

    @property
    def fingerprint(self) -> str:
        return sha256(self.tokens.tobytes()).hexdigest()[:32]


def installed() -> list[str]:
    """The names of texts for `build` that are on this machine."""
    there = {"pydoc": True, "jargon": JARGON.is_file(), "bible": shutil.which(BIBLE[0])}
    return [name for name, found in there.items() if found]


def build(name: str, length: int, words: Words, seed: int = 0) -> Haystack:
    """`length` tokens of English.

    name: "pydoc", "jargon", "bible", anything that `load_text` reads (a file), several joined by "+", or "auto" for all
    that are installed. A text that is too short is repeated with its paragraphs shuffled by `seed`, and the note says
    so. ValueError for an unknown name or a length below 1.
    """
    if length < 1:
        raise ValueError(f"length={length!r}: must be >= 1")
    found = [_source(part) for part in (installed() if name == "auto" else name.split("+"))]
    paragraphs = [part for body, _ in found for part in re.split(r"\n\s*\n", body) if part.strip()]
    rng, order, count, reads = np.random.default_rng(seed), np.arange(len(paragraphs)), 0, 0
    parts: list[np.ndarray] = []
    known: dict[int, list[np.ndarray]] = {}
    while count < length:
        for index in order:
            if index not in known:
                sentences = SENTENCE.split("\n\n" + paragraphs[index].strip())
                known[index] = [ids for ids in map(words.encode, sentences) if len(ids)]
            parts += known[index]
            count += sum(map(len, known[index]))
            if count >= length:
                break
        if not count:
            raise ValueError(f"haystack={name!r} has no tokens: allowed is a text with words")
        order, reads = rng.permutation(len(paragraphs)), reads + 1
    ends = np.cumsum([0, *map(len, parts)])
    again = f", read {reads} times, after the first with its paragraphs shuffled (seed {seed})" if reads > 1 else ""
    note = f"{' + '.join(source for _, source in found)}{again}: {length:,} tokens"
    return Haystack(np.concatenate(parts)[:length].astype(np.int32), ends[ends < length], note)


def _source(name: str) -> tuple[str, str]:
    """A text and where it comes from."""
    if name == "pydoc":
        text = load_text(TOPICS)
    elif name == "jargon" and JARGON.is_file():
        return gzip.decompress(JARGON.read_bytes()).decode("utf-8"), "the Jargon File"
    elif name == "bible" and shutil.which(BIBLE[0]):
        done = subprocess.run(BIBLE, capture_output=True, text=True, encoding="utf-8", check=True)
        return VERSE.sub("", CHAPTER.sub("\n", done.stdout)), "the King James text"
    elif name in ("jargon", "bible"):
        raise ValueError(f"haystack={name!r} is not installed (Debian: jargon-text, bible-kjv): allowed is "
                         f"{', '.join(installed())}, auto or a file")  # fmt: skip
    else:
        text = load_text(name)
    return text.body, text.source
