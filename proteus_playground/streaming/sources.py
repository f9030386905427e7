"""`open_document` opens any kind of document: text files, rows of text, arrays of token ids or of embeddings.

Axes: `T` rows of a document, `D` width of an embedding.
"""

from __future__ import annotations

import errno
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..common import texts
from ..common.checks import whole_number
from ..common.encodings import decoded, encoding_of
from ..common.files import cache_dir
from ..common.progress import Progress, Stop, check_stop, tell
from . import tokenising
from .arrays import file_recipe, npy_rows, safetensors_rows
from .stores import ArrayRows, FileRows, Seen, Store, digest, fits, row_bytes, size_words
from .token_cache import TokenCache
from .tokenising import Encode, TextSource, Work

BYTES_PER_READ = 1 << 20  # of a text file
BYTES_PER_LOAD = 16 << 20  # of rows that are loaded into memory
BUILDERS = {".jsonl": "json", ".parquet": "parquet"}
ALLOWED = (
    "a UTF-8 text file, .npy, .safetensors, .jsonl, .parquet, 'hub:owner/dataset', a named text, TextRows or Store"
)


@dataclass(frozen=True)
class TextRows:
    """Rows with a column of text, joined by line breaks: a `datasets` stream, or any iterable of mappings.

    `identity` must change with the rows, because cached tokens are found by it.
    """

    name: str
    rows: Iterable[Mapping[str, object]]
    identity: str
    column: str = "text"
    nbytes: int | None = None

    @property
    def recipe(self) -> dict[str, object]:
        return {"source": self.name, "identity": self.identity, "column": self.column}

    def text(self) -> Iterator[str]:
        """`ValueError` names a row without text."""
        for number, row in enumerate(self._checked_rows()):
            found = row.get(self.column)
            if not isinstance(found, str):
                what = f"only {sorted(row)}" if found is None else f"but {type(found).__name__}"
                raise ValueError(f"{self.name} has no text in column {self.column!r} of row {number}, {what}")
            yield ("\n" if number else "") + row[self.column]

    def _checked_rows(self) -> Iterator[Mapping[str, object]]:
        try:
            yield from self.rows
        except ValueError as err:  # broken JSON or Parquet: the library does not name the file
            raise ValueError(f"{self.name} cannot be read as rows of text ({err})") from err

    def check(self) -> None:
        """Nothing to check: rows have no date or size."""


@dataclass(frozen=True)
class TextFile:
    """A file of UTF-8, or of UTF-16 or UTF-32 with a byte order mark, read in blocks."""

    path: Path
    seen: Seen

    @property
    def name(self) -> str:
        return str(self.path)

    @cached_property
    def nbytes(self) -> int:
        """At most; a sign of two bytes in UTF-16 may have three in UTF-8."""
        with open(self.path, "rb") as file:
            codec, _ = encoding_of(file.read(4))
        return self.seen.size * 3 // 2 if codec.startswith("utf-16") else self.seen.size

    @cached_property
    def recipe(self) -> dict[str, object]:
        return file_recipe(self.path, self.seen)

    def text(self) -> Iterator[str]:
        """`ValueError` names the byte that is not text, and what the file looks like."""
        yield from decoded(self._blocks(), self.name, self.path)

    def _blocks(self) -> Iterator[bytes]:
        with open(self.path, "rb") as file:
            self.seen.check(os.fstat(file.fileno()), self.path)
            more = True
            while more:
                block = file.read(BYTES_PER_READ)
                self.seen.check(os.fstat(file.fileno()), self.path)
                more = bool(block)
                yield block

    def check(self) -> None:
        self.seen.check(os.stat(self.path), self.path)


def open_document(
    source: str | os.PathLike | TextRows | Store,
    *,
    encode: Encode | None = None,
    fingerprint: str = "",
    ram_limit: int | None = None,
    cache: str | os.PathLike | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Store:
    """`source` as a `Store` of token ids or embeddings, in memory if it fits and on disk if not.

    source: a UTF-8 text file of any size; `.npy` with `(T,)` whole numbers or `(T, D)` floats; `.safetensors` with one
    `(T, D)` tensor; `.jsonl`, `.parquet` or "hub:owner/dataset[/config]" with a column "text", read as a stream;
    `TextRows`; a name of `texts.text_names()`.
    encode, fingerprint: a function from text to ids, called from `workers` threads at once, and a string that changes
    when the function does (`tokenising.encoder` gives both). Only text needs them.
    ram_limit: bytes that may be kept in memory, by default half of the free memory. cache: the folder for ids that do
    not fit into memory, by default the user's cache folder; ids found there are used even if they would fit.

    The ids do not depend on `workers`, `ram_limit` or `cache`. Raises `ValueError` or `TypeError` for what is not
    allowed (for broken UTF-8 it names the byte). `OSError` stands for a full disk, and for a file that is missing,
    changes or cannot be read; `Stopped` is raised when `stop` asks for it. After a full disk or a stop, the next call
    tokenises afresh.
    """
    if isinstance(source, Store):
        return source
    whole_number("workers", workers, 1)
    if ram_limit is not None:
        whole_number("ram_limit", ram_limit, 0)
    opened = source if isinstance(source, TextRows) else _opened(source)
    if isinstance(opened, FileRows):
        identity = digest(*file_recipe(opened.path, opened.seen).values())
        return _loaded(str(opened.path), opened, identity, ram_limit, progress, stop)
    if encode is None or not fingerprint:
        raise ValueError(f"encode={encode!r}, fingerprint={fingerprint!r}: allowed for text is a function and its name")
    return _tokenised(opened, Work(opened, encode, workers, progress, stop), fingerprint, ram_limit, cache)


def _tokenised(
    text: TextSource, work: Work, fingerprint: str, ram_limit: int | None, cache: str | os.PathLike | None
) -> Store:
    folder = Path(cache).expanduser() if cache is not None else cache_dir() / "documents"
    stem = re.sub(r"\W+", "-", Path(text.name).name)[:20] + "-" + digest(text.name, fingerprint)[:12]
    recipe = text.recipe | {"tokeniser": fingerprint, "piece": tokenising.CHARACTERS_PER_PIECE}
    cached = TokenCache(folder, stem, recipe)
    found = cached.find()
    if found is None and text.nbytes is not None:
        in_memory, figures = fits(text.nbytes * tokenising.IDS.itemsize, ram_limit)
        if in_memory:
            ids, sha = tokenising.to_memory(work)
            identity = digest(fingerprint, len(ids), sha)
            return Store(text.name, ArrayRows(ids), "ram", f"in memory: at most {figures}", identity)
    rows, sha = found or cached.make(work)
    return _loaded(text.name, rows, digest(fingerprint, *rows.shape, sha), ram_limit, work.progress, work.stop)


def _loaded(
    name: str, rows: FileRows, identity: str, ram_limit: int | None, progress: Progress | None, stop: Stop | None
) -> Store:
    """Rows of a file, loaded into memory if they fit."""
    in_memory, figures = fits(row_bytes(rows) * rows.shape[0], ram_limit)
    if not in_memory:
        return Store(name, rows, "disk", f"on disk, in {rows.path}: {figures}", identity)
    array = np.empty(rows.shape, rows.dtype)
    step = max(1, BYTES_PER_LOAD // row_bytes(rows))
    for start in range(0, len(array), step):
        check_stop(stop)
        array[start : start + step] = rows.read(start, min(start + step, len(array)))
        tell(progress, start / len(array), f"loading {size_words(array.nbytes)}")
    return Store(name, ArrayRows(array), "ram", f"in memory: {figures}", identity)


def _opened(source: str | os.PathLike) -> TextSource | FileRows:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source={source!r}: allowed is {ALLOWED}")
    name = os.fspath(source)
    if name.startswith(texts.HUB):
        revision, rows = texts.hub_rows(name)
        return TextRows(name, rows, revision)
    if name in texts.text_names():
        body = texts.load_text(name).body
        return TextRows(name, [{"text": body}], digest(body), nbytes=len(body.encode()))
    path = _path(name)
    if path.suffix == ".npy":
        return npy_rows(path)
    if path.suffix == ".safetensors":
        return safetensors_rows(path)
    if path.suffix in BUILDERS:
        return _rows_of_file(path)
    return TextFile(path, Seen.now(path))


def _path(name: str) -> Path:
    """The path of a file that can be opened; if it cannot, an `OSError` that says what is allowed."""
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"a folder is no document: allowed is {ALLOWED}", str(path))
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, f"no such file: allowed is {ALLOWED}", str(path))
    if not path.is_file():
        raise OSError(errno.EINVAL, "no regular file, so it cannot be read twice: save it first", str(path))
    with open(path, "rb") as file:
        if not file.read(1):
            raise ValueError(f"{path} is an empty file: allowed is {ALLOWED}")
    return path


def _rows_of_file(path: Path) -> TextRows:
    from datasets import load_dataset

    recipe = file_recipe(path, Seen.now(path))
    if path.suffix == ".jsonl":
        with open(path, "rb") as file:
            if file.read(BYTES_PER_READ).removeprefix(BOM_UTF8).lstrip()[:1] not in (b"{", b"[", b""):
                # pyarrow ends the whole process for a first row of `null`
                raise ValueError(f"{path} cannot be read as rows of text: its first row is no JSON object")
    try:
        rows = load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train", streaming=True)
    except ValueError as err:
        raise ValueError(f"{path} cannot be read as rows of text ({err})") from err
    return TextRows(str(path), rows, digest(*recipe.values()))
