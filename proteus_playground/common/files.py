"""The cache folder, and files that are written under a temporary name first, so that none is ever incomplete.

Only plain files are replaced. A device, a FIFO, a socket or a folder is refused; of a link, the target is written.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import stat
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


def file_place(path: str | os.PathLike, name: str = "path") -> Path:
    """Where a file called `path` is written: `path` itself, or the target if it is a link.

    Raises `OSError`, which names the argument `name`, for a folder, a device, a FIFO, a socket or a name that the
    system does not allow.
    """
    found = _kind(path, name)
    if found not in (None, "a plain file"):
        code = errno.EISDIR if found == "a folder" else errno.EEXIST
        raise OSError(
            code, f"{name} cannot be written: it is {found}, allowed is a plain file or a new name", str(path)
        )
    return Path(os.path.realpath(path))


def check_place(path: str | os.PathLike, name: str = "path") -> None:
    """Raise `OSError` now, not after hours of work, where no file called `path` can be written; nothing is made."""
    _check_folder(file_place(path, name).parent, name, path)


def check_folder(path: str | os.PathLike, name: str = "path") -> None:
    """Raise `OSError` where `path` is no folder and cannot become one, or where nothing can be written into it."""
    found = _kind(path, name)
    if found not in (None, "a folder"):
        raise OSError(
            errno.ENOTDIR, f"{name} cannot be written: it is {found}, allowed is a folder or a new name", str(path)
        )
    _check_folder(Path(os.path.realpath(path)), name, path)


def _kind(path: str | os.PathLike, name: str) -> str | None:
    """What a path leads to; None where there is nothing yet."""
    try:
        mode = os.stat(Path(path)).st_mode
    except (FileNotFoundError, NotADirectoryError):  # of a file in place of a folder, `_check_folder` says more
        return None
    except (OSError, ValueError) as err:  # too long, a ring of links, no right to look, a NUL in the name
        code, why = getattr(err, "errno", None) or errno.EINVAL, getattr(err, "strerror", None) or str(err)
        raise OSError(code, f"{name} cannot be written: {why}", str(path)) from err
    if stat.S_ISREG(mode):
        return "a plain file"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _check_folder(folder: Path, name: str, path: str | os.PathLike) -> None:
    """Raise `OSError` unless files can be made in `folder`, or in the part of its path that exists."""
    names = [Path(path).name]
    while not os.path.lexists(folder):
        names.append(folder.name)
        folder = folder.parent
    if not folder.is_dir():
        raise OSError(errno.ENOTDIR, f"{name} cannot be written: {str(folder)!r} is not a folder", str(path))
    for new in names:  # one that is too long for the system would fail only when it is made
        _kind(folder / new, name)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as err:
        raise OSError(err.errno, f"{name} cannot be written in {str(folder)!r}: {err.strerror}", str(path)) from err


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path to write to. It is renamed to `path` when the block ends, and deleted if the block fails.

    The folder is made if it is missing. A link stays a link, and its target is replaced. A file that is replaced keeps
    its rights. A process that is killed leaves only a `.part` file. Raises `OSError`, also where `file_place` does.
    """
    path = file_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        os.chmod(part, stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike, name: str = "path") -> Iterator[Path]:
    """A hidden folder to write to, which becomes `path` when the block ends, and is deleted if the block fails.

    Raises `ValueError` where `path` has files in it, `OSError` where `check_folder` does. What a process that was
    killed has left is removed by the next one.
    """
    check_folder(path, name)
    path = Path(os.path.realpath(path))
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{name}={str(path)!r} is a folder with other files: must be a new or an empty one")
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    try:
        yield part
        os.chmod(part, 0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` in UTF-8, all of it or nothing."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: object) -> None:
    """Write `content` as indented JSON, all of it or nothing."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def append_lines(path: Path, lines: Iterable[dict]) -> None:
    """Append lines of JSON and wait until they are on disk. An unfinished last line, left by a kill, is replaced."""
    path = file_place(path)
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


def _umask() -> int:
    """The rights that the user withholds from new files; a temporary file is private until it is renamed."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def shipped_notebooks() -> Path:
    """The folder of the installed notebooks; in an editable installation the one of the checkout."""
    return Path(str(files("proteus_playground.notebooks")))
