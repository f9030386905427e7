"""The token ids of a document in a `.npy` file, which is made once and then found again.

A `.json` file beside it holds the recipe of the ids, their number and their sha256. It is written last: an array
without it does not count as complete. An interrupted run leaves nothing, and the next one starts from the beginning: a
hundred million tokens are made in about two minutes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..common.files import file_place, whole, write_json
from ..common.progress import check_stop, tell
from .arrays import npy_rows
from .stores import ChangedFile, FileRows
from .tokenising import IDS, Work

TOKENS_PER_HASH = 1 << 18


@dataclass(frozen=True)
class TokenCache:
    """The ids of one document in `folder`, under names that begin with `stem`; `recipe` changes with the content."""

    folder: Path
    stem: str
    recipe: dict[str, object]

    def find(self) -> tuple[FileRows, str] | None:
        """The ids and the sha256 of their bytes, or None if there is no complete, unchanged file of this recipe."""
        try:
            if not all(self._path(suffix).is_file() for suffix in (".json", ".npy")):
                return None  # also for a FIFO, which a reader would wait for
            record = json.loads(self._path(".json").read_text(encoding="utf-8"))
            rows = npy_rows(self._path(".npy"))
            if record["recipe"] != self.recipe or (rows.stored, rows.shape) != (IDS, (record["tokens"],)):
                return None
            if rows.seen.mtime_ns != record["mtime_ns"] and _hash(rows) != record["sha256"]:
                return None
            return rows, record["sha256"]
        except (OSError, ValueError, TypeError, KeyError):  # no such file, or not one that `make` wrote
            return None

    def make(self, work: Work) -> tuple[FileRows, str]:
        """Tokenise into the file. If another process is doing that already, wait for it and use its file.

        Raises what `Work.run` raises, and `OSError` if the folder cannot be written or the disk is full. Whatever it
        raises, it leaves no unfinished file.
        """
        with self._lock(work):
            found = self.find()
            if found is None:
                self._write(work)
                found = self.find()
        if found is None:
            raise ChangedFile(f"{self._path('.npy')} was changed as soon as it was written")
        return found

    @contextmanager
    def _lock(self, work: Work) -> Iterator[None]:
        """Let one process at a time make the file; the system releases the lock if its holder is killed."""
        from filelock import FileLock, Timeout

        key = self.folder / f".{self.stem}.lock"
        with self._explained():
            self.folder.mkdir(parents=True, exist_ok=True)
            for place in (key, self._path(".json"), self._path(".npy")):
                file_place(place, "cache")
            key.touch()  # FileLock cannot tell a file without permission from a lock that another process holds
        lock = FileLock(key)
        while not lock.is_locked:
            check_stop(work.stop)
            try:
                lock.acquire(timeout=0.5)
            except Timeout:
                tell(work.progress, 0.0, "another process is tokenising this document: waiting for it")
        try:
            yield
        finally:
            lock.release()

    def _write(self, work: Work) -> None:
        ours = [file_place(self._path(suffix)) for suffix in (".npy", ".json")]
        for leftover in (*ours, *self.folder.glob(f"*{self.stem}*.part")):
            leftover.unlink(missing_ok=True)  # changed, of another recipe, or of a run that was killed
        tokens, sha = 0, sha256()
        with whole(self._path(".npy")) as part, open(part, "wb", buffering=0) as file:
            _write_header(file, 0)
            for ids in work.run():
                with self._explained(tokens):
                    _write_all(file, ids)
                sha.update(ids)
                tokens += len(ids) // IDS.itemsize
            with self._explained(tokens):
                file.seek(0)
                _write_header(file, tokens)  # as long as the first: numpy pads headers for the largest number
                os.fsync(file.fileno())
            mtime_ns = os.fstat(file.fileno()).st_mtime_ns
        record = {"recipe": self.recipe, "tokens": tokens, "sha256": sha.hexdigest(), "mtime_ns": mtime_ns}
        with self._explained(tokens):
            write_json(self._path(".json"), record)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}{suffix}"

    @contextmanager
    def _explained(self, tokens: int = 0) -> Iterator[None]:
        """Add to an `OSError` how much was written and what can be done."""
        try:
            yield
        except OSError as err:
            after = f" after {tokens:,} tokens" if tokens else ""
            what = f"{err.strerror}{after}: make room or rights in the cache folder, or name another, and run again"
            raise type(err)(err.errno, what, str(self.folder)) from err


def _write_header(file, tokens: int) -> None:
    header = {"descr": IDS.str, "fortran_order": False, "shape": (tokens,)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_all(file, data: bytes) -> None:
    """The system may write a part of `data` before it reports a full disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _hash(rows: FileRows) -> str:
    sha, tokens = sha256(), rows.shape[0]
    for start in range(0, tokens, TOKENS_PER_HASH):
        sha.update(rows.read(start, min(start + TOKENS_PER_HASH, tokens)).astype(IDS).tobytes())
    return sha.hexdigest()
