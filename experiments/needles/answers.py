"""Did the model answer? It reads the best tokens of a buffer and the question, and its reply is checked.

Recall measures the buffer and accuracy the model that reads it, so the two are reported separately.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...hf.chat import ROOM
from ...streaming.second_pass import Answerer, gather
from .cases import NeedleCase, PlantedStore
from .retrieval import Kept

DENSE = "dense"


class Reader(Answerer, Protocol):
    """A language model for pass 2, with the number of tokens that it can read at once."""

    context: int


@dataclass(frozen=True)
class Reply:
    """A model's reply, and whether it contains an accepted answer."""

    text: str
    right: bool


def answer(reader: Reader, store: PlantedStore, case: NeedleCase, kept: Kept | None, most: int) -> Reply | None:
    """The reply of `reader` to the case's question.

    kept: the tokens that it may read, of which it gets the best `most`. None stands for the whole document; where that
    does not fit the model, there is no reply and None is returned.
    """
    if kept is None and len(store) + ROOM > reader.context:
        return None
    positions = np.arange(len(store)) if kept is None else kept.best(min(most, reader.context - ROOM))
    text = reader.answer(gather(store, positions), positions, case.prompt)
    return Reply(text, matches(text, case.answers))


def matches(reply: str, accepted: tuple[str, ...]) -> bool:
    """Whether `reply` contains one of `accepted` as whole words; case and punctuation do not matter."""
    return any(f" {plain(text)} " in f" {plain(reply)} " for text in accepted)


def plain(text: str) -> str:
    """The words and numbers of a text, in lower case with one space between them."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return " ".join(re.findall(r"\d+(?::\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?|%", text))
