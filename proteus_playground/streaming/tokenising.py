"""Text into token ids, in pieces and on several threads.

The ends of the pieces depend on the text alone, so the ids do too. A piece has `CHARACTERS_PER_PIECE` characters and
goes on to the next single space or line break between two words. If as many characters again contain none, it ends at
the first start of a word among them, or after them if there is none either. Byte-level BPE splits words at the same
places, so tokenising piece by piece gives the ids of the whole text.
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

CHARACTERS_PER_PIECE = 65_536
BETWEEN_WORDS = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
WORD = re.compile(r"(?<=\s)(?=\S)")
IDS = np.dtype("<i4")

Encode = Callable[[str], "list[int]"]


class TextSource(Protocol):
    """A text to tokenise. `recipe` can be written as JSON and changes with the content."""

    name: str
    recipe: dict[str, object]
    nbytes: int | None  # of the text in UTF-8, None if it is not known

    def text(self) -> Iterator[str]:
        """The text, in parts of any length."""

    def check(self) -> None:
        """`ChangedFile` if the source has changed since it was opened."""


def encoder(tokenizer) -> tuple[Encode, str]:
    """`encode` and `fingerprint` of a fast Hugging Face tokenizer, for `open_document`. It adds no special tokens, and
    those that are spelled out in a text stay text.

    It uses a copy of the tokenizer, and `encode_batch_fast`, because `encode` holds Python's global lock, so that
    several threads would be no faster than one.
    """
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    own = type(fast).from_str(fast.to_str())
    own.no_truncation()
    own.no_padding()
    own.encode_special_tokens = True  # splits them as text
    return (
        lambda piece: own.encode_batch_fast([piece], add_special_tokens=False)[0].ids,
        sha256((own.to_str() + " special tokens as text").encode()).hexdigest(),  # the setting is not in the JSON
    )


def pieces(parts: Iterable[str], size: int) -> Iterator[str]:
    """The text of `parts` cut into pieces by the rule above, wherever `parts` were cut."""
    text, at = "", 0
    for part in parts:
        if at:
            text, at = text[at:], 0
        text += part  # Python extends the string in place, which matters for the many short rows of a data set
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
    """One tokenising run: the text, the tokenizer, the number of threads, and the caller's progress and stop."""

    source: TextSource
    encode: Encode
    workers: int = 1
    progress: Progress | None = None
    stop: Stop | None = None

    def run(self) -> Iterator[bytes]:
        """The ids of one piece after another. Raises `Stopped` between pieces, `ValueError` for an empty text."""
        nbytes = tokens = 0  # done so far
        for size, ids in self._encoded():
            check_stop(self.stop)
            nbytes, tokens = nbytes + size, tokens + len(ids) // IDS.itemsize
            total = self.source.nbytes
            of = f" of {size_words(total)}" if total else ""
            share = min(1.0, nbytes / total) if total else 0.0
            tell(self.progress, share, f"tokenised {size_words(nbytes)}{of}: {tokens:,} tokens")
            yield ids
        self.source.check()
        if not tokens:
            raise ValueError(f"{self.source.name} is empty: allowed is text with at least one token")

    def _encoded(self) -> Iterator[tuple[int, bytes]]:
        """(bytes of UTF-8, ids) of each piece, in order; two pieces per thread are encoded in advance."""
        pool, waiting = ThreadPoolExecutor(self.workers), deque()
        try:
            for piece in pieces(self.source.text(), CHARACTERS_PER_PIECE):
                waiting.append((len(piece.encode()), pool.submit(_ids, self.encode, piece)))
                if len(waiting) > 2 * self.workers:
                    size, future = waiting.popleft()
                    yield size, future.result()
            for size, future in waiting:
                yield size, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


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
    for ids in work.run():
        kept += ids
    return np.frombuffer(kept, IDS).astype(np.int32, copy=False), sha256(kept).hexdigest()
