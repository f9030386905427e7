"""The cache folder, and files that are written under a temporary name first, so that none is ever incomplete."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path


def cache_dir() -> Path:
    """The folder for models, calibrations and documents: $PROTEUS_CACHE, by default the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("PROTEUS_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("proteus-playground", appauthor=False)


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to. It is renamed to `path` when the block ends, and deleted if the block fails.

    The folder is made if it is missing. A process that is killed leaves only a `.part` file. Raises `OSError`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` in UTF-8, all of it or nothing."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` as indented JSON, all of it or nothing."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def append_lines(path: Path, lines: Iterable[dict]) -> None:
    """Append lines of JSON and wait until they are on disk. An unfinished last line, left by a kill, is replaced."""
    whole_lines = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
    with open(path, "ab") as file:
        file.truncate(whole_lines)
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict]:
    """The lines of JSON in a file, without an unfinished last one; an empty list if there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def check_place(path: str | os.PathLike) -> None:
    """Raise `OSError` before hours of work if `path` is a folder or its folder cannot be written to."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder, not a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _umask() -> int:
    """The rights that the user withholds from new files; a temporary file is private until it is renamed."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def shipped_notebooks() -> Path:
    """The folder of the installed notebooks; in an editable installation the one of the checkout."""
    return Path(str(files("proteus_playground.notebooks")))
