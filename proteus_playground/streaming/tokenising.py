"""Text into token ids, in pieces and on several threads.

Where the pieces end depends on the text alone, so the ids do too. A piece has `PIECE` characters and ends at the next
single space or line break between two words; where `PIECE` characters more bring none, at the next start of a word
among them; where there is none either, right there. Byte-level BPE cuts its words at those places itself, so that
pieces give the ids that the whole text would.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

import numpy as np

from ..common.progress import Progress, Stop, check_stop, tell
from .stores import TOP_ID, size_words

PIECE = 65_536  # characters
BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
WORD = re.compile(r"(?<=\s)(?=\S)")
IDS = np.dtype("<i4")

Encode = Callable[[str], "list[int]"]


class TextSource(Protocol):
    """Text that is read from any byte on. `recipe` is JSON and changes with the content."""

    name: str
    recipe: dict[str, object]
    nbytes: int | None  # of its text in UTF-8, None where it is not known

    def text(self, start: int) -> Iterator[str]:
        """The text from byte `start` (of its UTF-8 form) on, in parts of any length."""

    def check(self) -> None:
        """`ChangedFile` where the source is not what it was when it was opened."""


def encoder(tokenizer) -> tuple[Encode, str]:
    """`encode` and `fingerprint` of a fast Hugging Face tokenizer, for `open_document`; without special tokens added.

    It works on a copy, and through `encode_batch_fast`: `encode` holds Python's lock, so threads would gain nothing.
    """
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    own = type(fast).from_str(fast.to_str())
    own.no_truncation()
    own.no_padding()
    return (
        lambda piece: own.encode_batch_fast([piece], add_special_tokens=False)[0].ids,
        sha256(own.to_str().encode()).hexdigest(),
    )


def pieces(parts: Iterable[str], size: int) -> Iterator[str]:
    """The text of `parts` cut as the module says, however `parts` are cut."""
    text, at = "", 0
    for part in parts:
        if at:
            text, at = text[at:], 0
        text += part  # in place where it can be: a data set's rows are short
        while len(text) - at >= 2 * size + 2:
            end = _cut(text, at, size)
            yield text[at:end]
            at = end
    while at < len(text):
        end = _cut(text, at, size)
        yield text[at:end]
        at = end


def _cut(text: str, at: int, size: int) -> int:
    if len(text) - at <= size:
        return len(text)
    until = at + 2 * size + 2  # two characters more, to see what follows a break
    found = BETWEEN_WORDS.search(text, at + size, until) or WORD.search(text, at + size, until)
    return found.start() if found else min(at + 2 * size, len(text))


@dataclass(frozen=True)
class Work:
    """What one tokenising run needs to know."""

    source: TextSource
    encode: Encode
    workers: int = 1
    progress: Progress | None = None
    stop: Stop | None = None

    def run(self, done: int = 0, tokens: int = 0) -> Iterator[tuple[int, bytes]]:
        """(bytes of text read so far, ids of the next piece) from byte `done` on. Raises `Stopped` between pieces."""
        pool, ahead = ThreadPoolExecutor(self.workers), deque()
        try:
            for piece in pieces(self.source.text(done), PIECE):
                ahead.append((len(piece.encode()), pool.submit(_ids, self.encode, piece)))
                if len(ahead) > 2 * self.workers:
                    done, tokens, ids = self._next(ahead, done, tokens)
                    yield done, ids
            while ahead:
                done, tokens, ids = self._next(ahead, done, tokens)
                yield done, ids
        finally:
            pool.shutdown(cancel_futures=True)
        self.source.check()
        if not tokens:
            raise ValueError(f"{self.source.name} is empty: allowed is text with at least one token")

    def _next(self, ahead: deque, done: int, tokens: int) -> tuple[int, int, bytes]:
        check_stop(self.stop)
        size, future = ahead.popleft()
        ids = future.result()
        done, tokens = done + size, tokens + len(ids) // IDS.itemsize
        total = self.source.nbytes
        of = f" of {size_words(total)}" if total else ""
        share = min(1.0, done / total) if total else 0.0
        tell(self.progress, share, f"tokenised {size_words(done)}{of}: {tokens:,} tokens")
        return done, tokens, ids


def _ids(encode: Encode, piece: str) -> bytes:
    ids = np.asarray(encode(piece))
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise TypeError(f"encode returned {ids.dtype} of shape {ids.shape}: allowed is a list of whole numbers")
    if len(ids) and not 0 <= ids.min() <= ids.max() <= TOP_ID:
        raise ValueError(f"encode returned ids from {ids.min()} to {ids.max()}: allowed is 0 to {TOP_ID}")
    return ids.astype(IDS).tobytes()


def to_memory(work: Work) -> tuple[np.ndarray, str]:
    """All ids `(T,)` int32, and the sha256 of their bytes."""
    kept = bytearray()
    for _, ids in work.run():
        kept += ids
    return np.frombuffer(kept, IDS).astype(np.int32, copy=False), sha256(kept).hexdigest()
