"""A document's token ids in a .npy file that is made once; what a kill or a full disk interrupts, the next run resumes.

Three names in the cache folder: `.npy`, `.part` while it is made, and `.json`, the recipe with how far the file is
and the sha256 of the ids so far.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..common.files import write_json
from ..common.progress import Stopped, check_stop, tell
from .stores import ChangedFile, FileRows, Seen
from .tokenising import IDS, Work

JOURNAL = 64  # pieces between two entries: some seconds of work at most are done again
HEADER = 128  # bytes of a .npy header with one axis: numpy leaves room there for the largest length


@dataclass(frozen=True)
class Record:
    """How far a file is: `tokens` ids made of the first `bytes` bytes of text. `mtime_ns` is 0 until it is whole."""

    recipe: dict[str, object]
    bytes: int = 0
    tokens: int = 0
    sha256: str = ""
    mtime_ns: int = 0


@dataclass(frozen=True)
class TokenCache:
    """The ids of one document in `folder`, under names that begin with `stem`; `recipe` changes with the content."""

    folder: Path
    stem: str
    recipe: dict[str, object]

    def find(self) -> tuple[FileRows, str] | None:
        """The ids and the sha256 of their bytes, or None where there is no sound file of this recipe."""
        record, path = self._record(), self._path(".npy")
        if not record.mtime_ns or not path.is_file():
            return None
        seen = Seen.now(path)
        if seen.size != HEADER + IDS.itemsize * record.tokens:
            return None
        if seen.mtime_ns != record.mtime_ns and _hash(path, record.tokens).hexdigest() != record.sha256:
            return None  # somebody wrote to it
        return FileRows(path, HEADER, IDS, (record.tokens,), seen), record.sha256

    def make(self, work: Work) -> tuple[FileRows, str]:
        """Tokenise into the file, from where the last run ended; a second process waits, then finds it.

        OSError where the folder cannot be written or the disk is full: what is done stays for the next run. What can
        never be finished, since the text is broken or has changed, is removed.
        """
        with self._alone(work):
            found = self.find()
            if found is None:
                self._fill(work)
                found = self.find()
        if found is None:
            raise ChangedFile(f"{self._path('.npy')} was changed as soon as it was written")
        return found

    @contextmanager
    def _alone(self, work: Work) -> Iterator[None]:
        """One process at a time; the system releases the lock when its holder is killed."""
        from filelock import FileLock, Timeout

        key = self.folder / f".{self.stem}.lock"
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            key.touch()  # a lock that may not be opened would look like one that another process holds
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

    def _fill(self, work: Work) -> None:
        self._path(".npy").unlink(missing_ok=True)  # not sound, or of another recipe: its room is needed
        for torn in self.folder.glob(f".{self.stem}.json.*.part"):  # a kill in the middle of an entry
            torn.unlink()
        part = self._path(".part")
        record, sha = self._resume(part)
        try:
            with self._writing():
                file = open(part, "r+b" if record.tokens else "wb", buffering=0)  # noqa: SIM115 -- closed below
            with file:
                file.seek(HEADER + IDS.itemsize * record.tokens)
                file.truncate()
                record = self._append(file, record, sha, work)
                self._finish(file, record)
        except (ValueError, TypeError, ChangedFile):
            for suffix in (".part", ".json"):
                self._path(suffix).unlink(missing_ok=True)
            raise
        os.replace(part, self._path(".npy"))

    def _append(self, file, record: Record, sha, work: Work) -> Record:
        """The rest of the document, with a journal entry now and then and where it breaks off."""
        try:
            for number, (done, ids) in enumerate(work.run(record.bytes, record.tokens), 1):
                with self._writing(record.tokens):
                    _write(file, ids)
                sha.update(ids)
                # One assignment, so that no interrupt leaves bytes and tokens of different pieces.
                record = Record(self.recipe, done, record.tokens + len(ids) // IDS.itemsize, sha.hexdigest())
                if number % JOURNAL == 0:
                    self._journal(record)
        except (Stopped, KeyboardInterrupt, OSError):
            file.truncate(HEADER + IDS.itemsize * record.tokens)  # a full disk gives back the room for the entry
            self._journal(record)
            raise
        return record

    def _finish(self, file, record: Record) -> None:
        with self._writing(record.tokens):
            file.seek(0)
            shape = {"descr": IDS.str, "fortran_order": False, "shape": (record.tokens,)}
            np.lib.format.write_array_header_1_0(file, shape)
            os.fsync(file.fileno())
        mtime_ns = os.fstat(file.fileno()).st_mtime_ns
        self._journal(Record(self.recipe, record.bytes, record.tokens, record.sha256, mtime_ns))

    def _resume(self, part: Path) -> tuple[Record, object]:
        """How far `part` is and the running hash; the start where it does not hold what its journal says."""
        record = self._record()
        if record.tokens and part.is_file():
            sha = _hash(part, record.tokens)
            if sha.hexdigest() == record.sha256:
                return record, sha
        return Record(self.recipe), sha256()

    def _record(self) -> Record:
        try:
            record = Record(**json.loads(self._path(".json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # none yet, or not ours
            return Record(self.recipe)
        return record if record.recipe == self.recipe else Record(self.recipe)

    def _journal(self, record: Record) -> None:
        with self._writing(record.tokens):
            write_json(self._path(".json"), asdict(record))

    def _path(self, suffix: str) -> Path:
        return self.folder / f"{self.stem}{suffix}"

    @contextmanager
    def _writing(self, tokens: int = 0) -> Iterator[None]:
        """The system's OSError, saying what was written and what can be done."""
        try:
            yield
        except OSError as err:
            after = f" after {tokens:,} tokens" if tokens else ""
            what = f"{err.strerror}{after}: make room or rights in the cache folder, or name another, and run again"
            raise type(err)(err.errno, what, str(self.folder)) from err


def _write(file, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def _hash(path: Path, tokens: int):
    """The sha256 of the first `tokens` ids, read in pieces; of less where the file is shorter."""
    sha, left = sha256(), IDS.itemsize * tokens
    with open(path, "rb") as file:
        file.seek(HEADER)
        while left and (block := file.read(min(left, 1 << 20))):
            sha.update(block)
            left -= len(block)
    return sha
