"""Named texts: a story and a commonplace book of the project's own, Python's manual, a file, a hub data set.

A `Text` is always complete. It is cut where it is read, because only a tokenizer can count tokens.
"""

from __future__ import annotations

import os
import re
from binascii import crc32
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from proteus_playground.common import hub
from proteus_playground.common.encodings import decoded

STORY, BOOK, TOPICS, HUB = "humble token", "commonplace book", "python topics", "hub:"
SHIPPED = {
    STORY: ("humble_token.txt", "a story written for this project"),
    BOOK: ("commonplace_book.txt", "short pieces of many kinds, written for this project"),
}
MAX_BYTES = 32_000_000  # of a file or data set: far more than a model can read, far less than memory
WORD = re.compile(r"\s*\w+|\s*[^\w\s]")  # a word or a sign, with the space before it


@dataclass(frozen=True)
class Text:
    """A named text: `body` is the text itself, `source` a few words about where it came from."""

    name: str
    body: str
    source: str


def text_names() -> list[str]:
    """Names for `load_text` that need neither a file nor a network."""
    return [*SHIPPED, TOPICS]


def load_text(name: str) -> Text:
    """A text by name: one of `text_names()`, a path to a UTF-8 file, or "hub:owner/dataset[/config]".

    ValueError names `name` where a file is missing, empty, too large or not UTF-8, or a data set has no text
    column; ConnectionError where the hub does not answer; TypeError where `name` is no string or path.
    """
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"name={name!r}: allowed is a string or a path")
    name = os.fspath(name)
    if name in SHIPPED:
        file, source = SHIPPED[name]
        return pasted((files(__package__) / "texts_data" / file).read_text(encoding="utf-8"), name, source)
    if name == TOPICS:
        from pydoc_data.topics import topics

        body = "\n\n".join(topics[key].strip() for key in sorted(topics))
        return pasted(body, TOPICS, "Python's own manual")
    if name.startswith(HUB):
        return _from_hub(name)
    return _from_file(name)


def pasted(body: str, name: str = "pasted text", source: str = "pasted by you") -> Text:
    """A `Text` from a string. ValueError where `body` is empty, TypeError where it is no string."""
    if not isinstance(body, str):
        raise TypeError(f"body={body!r}: allowed is a string")
    if not body.strip():
        raise ValueError(f"body={body[:20]!r} of {name!r} is empty: allowed is text with at least one word")
    return Text(name, body, source)


def calibration_text(exclude: str) -> Text:
    """A text other than the one called `exclude`, to fit prototypes on: the commonplace book, else the manual.

    The book is preferred because it is varied. Prototypes fitted on the manual alone resemble few tokens of a story,
    so that a keep ratio would drop most of them.
    """
    if not isinstance(exclude, str | os.PathLike):
        raise TypeError(f"exclude={exclude!r}: allowed is the name of a text")
    return load_text(TOPICS if os.fspath(exclude) == BOOK else BOOK)


def word_hash(word: str) -> int:
    """A hash in [0, 2^32), the same on every machine, for any case, and with or without the space before the word."""
    return crc32(word.strip().lower().encode())


def _from_file(name: str) -> Text:
    known = ", ".join(repr(known) for known in text_names())
    allowed = f"allowed is {known}, the path of a UTF-8 text file, or 'hub:owner/dataset'"
    try:
        path = Path(name).expanduser()
        found = path.is_file()
    except (OSError, RuntimeError):  # too long for a file name, or ~ of nobody
        path, found = Path(name), False
    if not name.strip() or not found:
        what = "is a folder" if name.strip() and len(name) < 255 and path.is_dir() else "is no known text and no file"
        raise ValueError(f"name={name!r} {what}: {allowed}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"name={name!r} holds {path.stat().st_size:,} bytes: allowed is up to {MAX_BYTES:,}")
    try:
        body = "".join(decoded([path.read_bytes()], f"name={name!r}", path))
    except OSError as err:
        raise ValueError(f"name={name!r} cannot be read ({err.strerror}): {allowed}") from err
    if not body.strip():
        raise ValueError(f"name={name!r} is an empty file: allowed is a file with at least one word")
    return Text(path.name, body, str(path))


def hub_rows(name: str) -> tuple[str, Iterable[dict]]:
    """Revision and streamed rows of the split "train" of "hub:owner/dataset[/config]"; errors as for `load_text`."""
    owner, _, rest = name.removeprefix(HUB).partition("/")
    dataset, _, config = rest.partition("/")
    if not owner or not dataset or "/" in config:
        raise ValueError(f"name={name!r}: allowed is 'hub:owner/dataset' or 'hub:owner/dataset/config'")
    repo = f"{owner}/{dataset}"
    revision = _ask_hub(name, repo)
    from datasets import load_dataset

    try:
        # Streamed, so that the first megabytes of a large collection arrive at once.
        return revision, load_dataset(repo, config or None, split="train", streaming=True, revision=revision)
    except ValueError as err:
        raise ValueError(f"name={name!r} cannot be opened: {err}") from err


def _from_hub(name: str) -> Text:
    parts, size = [], 0
    for row in hub_rows(name)[1]:
        if not isinstance(row.get("text"), str):
            raise ValueError(f"name={name!r} has no 'text' column, only {sorted(row)}: allowed is text")
        parts.append(row["text"])
        size += len(row["text"])
        if size > MAX_BYTES // 8:
            break
    repo = "/".join(name.removeprefix(HUB).split("/")[:2])
    return pasted("\n".join(parts), name, f"{repo} on the Hugging Face hub")


def _ask_hub(name: str, repo: str) -> str:
    """A data set's revision. ConnectionError if the hub does not answer, ValueError if it lacks the set. No retries."""
    away = f"name={name!r} needs the Hugging Face hub, which cannot be reached"
    hint = f"allowed without it is {', '.join(map(repr, text_names()))} or a file"
    if variable := hub.switched_off():
        raise ConnectionError(f"{away} ({variable} is set): {hint}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return HfApi(endpoint=hub.endpoint()).dataset_info(repo, timeout=hub.SECONDS).sha
    except RepositoryNotFoundError as err:
        raise ValueError(f"name={name!r}: the hub has no public data set {repo!r}") from err
    except Exception as err:  # the hub's clients raise their own families, which change between versions
        raise ConnectionError(f"{away} ({type(err).__name__}): {hint}") from err
