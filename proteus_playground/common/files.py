"""Where files are kept, and files that appear whole or not at all: written beside their place, then renamed."""

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
    """The folder for models, calibrations and documents: $PROTEUS_CACHE, else the user's cache folder."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("PROTEUS_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("proteus-playground", appauthor=False)


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to; it takes the name `path` when the block ends, and vanishes if the block fails.

    The folder is made if need be. A process that is killed leaves only a `.part` file. OSError as the system says.
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
    """`text` in UTF-8, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: object) -> None:
    """What JSON can hold, line by line, whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def append_lines(path: Path, lines: Iterable[dict]) -> None:
    """Add lines of JSON to a file, in place of one that a kill cut short, and wait until they are on disk."""
    whole_lines = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0
    with open(path, "ab") as file:
        file.truncate(whole_lines)
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict]:
    """A file's lines of JSON, none where there is no file; one that a kill cut short is left out."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def check_place(path: str | os.PathLike) -> None:
    """OSError now, not after hours of work, where `path` is a folder or nothing can be written beside it."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder stands there, a file must", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def _umask() -> int:
    """What the user wants taken from a new file's rights; a temporary file is private until it is renamed."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def shipped_notebooks() -> Path:
    """The folder of the installed notebooks. An editable installation has the checkout's own."""
    return Path(str(files("proteus_playground.notebooks")))
