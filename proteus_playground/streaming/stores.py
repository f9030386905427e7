"""A document as rows that are read slice by slice: from memory, from disk, or generated when they are read.

Files are read by offset and not mapped into memory: if a mapped file shrinks, the system kills the process that reads
it, and mapped pages count as the process's memory.

Axes: `T` rows of a document, `D` width of an embedding.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np

from ..common.checks import whole_number

TOP_ID = 2**31 - 1  # token ids are int32
FREE_MEMORY_SHARE = 0.5  # that a document may take if no limit is given
ROWS_PER_SEED = 1024  # of a generated document
UNITS = {"": 1, "b": 1} | {f"{p}{b}": n**i for i, p in enumerate("kmgt", 1) for b, n in (("b", 1000), ("ib", 1024))}


class ChangedFile(OSError):
    """A file has changed since it was opened."""


class Rows(Protocol):
    """The rows of a document. `read` returns a new array: `(stop - start,)` int32 or `(stop - start, D)` floats."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Store:
    """An opened document of `T` rows. It can be pickled, and read from several threads at once."""

    name: str
    rows: Rows
    mode: str
    """"ram", "disk" or "generated"."""
    why: str
    """One sentence: where the rows are and why, with the bytes needed, free and allowed."""
    fingerprint: str
    """Hex digest, the same for the same content in every mode."""

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def kind(self) -> str:
        return "tokens" if len(self.rows.shape) == 1 else "embeddings"

    @property
    def width(self) -> int | None:
        """`D`, None for tokens."""
        return self.rows.shape[1] if len(self.rows.shape) == 2 else None

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as `read` returns them."""
        return row_bytes(self.rows) * len(self)

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of rows `start` to `stop`: `(n,)` int32 token ids, or `(n, D)` float16 or float32.

        Raises `ValueError` for a slice outside the document and for an id out of range, `OSError` if the file is gone
        or has changed since it was opened.
        """
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start={start!r}, stop={stop!r}: allowed is 0 <= start <= stop <= {len(self)}")
        return self.rows.read(start, stop)


@dataclass(frozen=True)
class ArrayRows:
    """Rows in memory: `(T,)` int32 or `(T, D)` floats."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop].copy()


@dataclass(frozen=True)
class Seen:
    """Size and time of a file, to notice if it changes after it was opened."""

    size: int
    mtime_ns: int

    @classmethod
    def now(cls, path: Path) -> Seen:
        return cls.of(os.stat(path))

    @classmethod
    def of(cls, stat: os.stat_result) -> Seen:
        return cls(stat.st_size, stat.st_mtime_ns)

    def check(self, stat: os.stat_result, path: Path) -> None:
        """Raise `ChangedFile`, which says how `path` changed."""
        now = Seen.of(stat)
        if now == self:
            return
        how = "was written to" if now.size == self.size else "shrank" if now.size < self.size else "grew"
        raise ChangedFile(
            f"{path} {how} while it was in use ({self.size:,} bytes then, {now.size:,} now): open it again"
        )


@dataclass(frozen=True)
class FileRows:
    """Rows that follow each other in a file from byte `offset` on."""

    path: Path
    offset: int
    stored: np.dtype
    shape: tuple[int, ...]
    seen: Seen
    bfloat16: bool = False  # numpy has no such type, so `stored` is uint16

    @property
    def dtype(self) -> np.dtype:
        if len(self.shape) == 1:
            return np.dtype(np.int32)
        return np.dtype(np.float16 if self.stored.kind == "f" and self.stored.itemsize == 2 else np.float32)

    def read(self, start: int, stop: int) -> np.ndarray:
        width = self.shape[1] if len(self.shape) == 2 else 1
        with open(self.path, "rb") as file:
            self.seen.check(os.fstat(file.fileno()), self.path)
            file.seek(self.offset + start * width * self.stored.itemsize)
            out = np.fromfile(file, self.stored, (stop - start) * width)
            self.seen.check(os.fstat(file.fileno()), self.path)
        out = out.reshape(stop - start, *self.shape[1:])
        if self.bfloat16:
            return (out.astype(np.uint32) << 16).view(np.float32)
        if len(self.shape) == 1 and len(out) and not 0 <= out.min() <= out.max() <= TOP_ID:
            at = int(((out < 0) | (out > TOP_ID)).argmax())
            raise ValueError(f"{self.path}: token {start + at} is {out[at]}: allowed are ids from 0 to {TOP_ID}")
        return out.astype(self.dtype, copy=False)


@dataclass(frozen=True)
class GeneratedRows:
    """Rows that are generated each time they are read, in blocks that depend on (`seed`, number of the block).

    Embeddings are uniform with mean 0 and variance 1; token ids are uniform in [0, `vocabulary`).
    """

    shape: tuple[int, ...]
    seed: int
    vocabulary: int

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.int32 if len(self.shape) == 1 else np.float32)

    def read(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for block in range(start // ROWS_PER_SEED, -(-stop // ROWS_PER_SEED)):
            first = block * ROWS_PER_SEED
            low, high = max(start, first), min(stop, first + ROWS_PER_SEED)
            self._fill(out[low - start : high - start], block, low - first)
        return out

    def _fill(self, out: np.ndarray, block: int, skip: int) -> None:
        """Made of raw random bits, because numpy's distributions may change between versions."""
        bits = np.random.SFC64(np.random.SeedSequence((self.seed, block)))
        if out.ndim == 1:
            raw = bits.random_raw(ROWS_PER_SEED // 2).view(np.uint32)[skip : skip + len(out)].astype(np.uint64)
            out[:] = (raw * np.uint64(self.vocabulary)) >> np.uint64(32)
            return
        width = out.shape[1]
        raw = bits.random_raw(ROWS_PER_SEED * width // 4).view(np.int16).reshape(ROWS_PER_SEED, width)
        raw = raw[skip : skip + len(out)]
        np.add(raw, np.float32(0.5), out=out)
        out *= np.float32((12 / (2**32 - 1)) ** 0.5)  # whole numbers over 2^16 values have variance (2^32 - 1)/12


def generated(tokens: int, *, seed: int = 0, width: int | None = None, vocabulary: int = 32_768) -> Store:
    """A document of `tokens` random rows that takes no memory: embeddings `(T, width)`, or ids if `width` is None.

    `ValueError` or `TypeError` names the argument that is not a whole number in its range.
    """
    for name, value, low in (("tokens", tokens, 1), ("seed", seed, 0), ("vocabulary", vocabulary, 1)):
        whole_number(name, value, low, TOP_ID)
    if width is not None:
        whole_number("width", width, 1, TOP_ID)
    rows = GeneratedRows((tokens,) if width is None else (tokens, width), seed, vocabulary)
    why = f"generated when read: keeping all rows would need {size_words(row_bytes(rows) * tokens)}"
    name = f"{tokens:,} generated {'tokens' if width is None else f'embeddings of width {width}'}, seed {seed}"
    return Store(name, rows, "generated", why, digest("generated", ROWS_PER_SEED, *rows.shape, seed, vocabulary))


def free_memory() -> int:
    """Bytes that the system can provide without swapping."""
    import psutil

    return psutil.virtual_memory().available


def fits(needed: int, ram_limit: int | None) -> tuple[bool, str]:
    """Whether `needed` bytes may be kept in memory, and the three numbers that decide it, in words."""
    free = free_memory()
    if ram_limit is None:
        limit, reason = int(FREE_MEMORY_SHARE * free), f"{FREE_MEMORY_SHARE:.0%} of that"
    elif ram_limit <= free:
        limit, reason = ram_limit, "as asked"
    else:
        limit, reason = free, "all that is free"
    figures = f"{size_words(needed)} needed, {size_words(free)} free, limit {size_words(limit)} ({reason})"
    return needed <= limit, figures


def row_bytes(rows: Rows) -> int:
    """Bytes of one row as `read` returns it."""
    return rows.dtype.itemsize * (rows.shape[1] if len(rows.shape) == 2 else 1)


def size_words(count: int) -> str:
    """1500 -> "1.5 kB"."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} bytes"


def parse_bytes(text: str) -> int:
    """ "2GB" -> 2 000 000 000, "512 MiB" -> 536 870 912, "1000" -> 1000. `ValueError` for any other text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)\s*", str(text).lower())
    unit = match and (match[2] if match[2] in UNITS else f"{match[2]}b")
    if not match or unit not in UNITS:
        raise ValueError(
            f"{text!r} is no size: allowed is a number of bytes, such as 2000000, '500MB', '2GB' or '2GiB'"
        )
    return int(float(match[1]) * UNITS[unit])


def digest(*parts: object) -> str:
    """Hex sha256 of all parts in order."""
    return sha256("\0".join(map(str, parts)).encode()).hexdigest()
