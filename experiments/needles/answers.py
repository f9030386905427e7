"""Did the model answer? It reads the best tokens of a buffer and the question, and its reply is compared.

Recall says what was there to be read, accuracy what a model of this size made of it: they are never mixed.
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
    """A language model as pass 2 sees it, that knows how many tokens it can read at once."""

    context: int


@dataclass(frozen=True)
class Reply:
    """What was said and whether an accepted answer stands in it."""

    text: str
    right: bool


def answer(reader: Reader, store: PlantedStore, case: NeedleCase, kept: Kept | None, most: int) -> Reply | None:
    """Ask `reader` the case's question. kept: what may be read, `most` tokens of it; None for the whole document, which
    is dense reading, and gives None where it does not fit the model."""
    if kept is None and len(store) + ROOM > reader.context:
        return None
    positions = np.arange(len(store)) if kept is None else kept.best(min(most, reader.context - ROOM))
    text = reader.answer(gather(store, positions), positions, case.prompt)
    return Reply(text, matches(text, case.answers))


def matches(reply: str, accepted: tuple[str, ...]) -> bool:
    """True where one of `accepted` stands in `reply` as whole words, whatever the case and the punctuation."""
    return any(f" {plain(text)} " in f" {plain(reply)} " for text in accepted)


def plain(text: str) -> str:
    """Lower-case words and numbers with one space between them."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    return " ".join(re.findall(r"\d+(?::\d+)?|[^\W\d_]+(?:'[^\W\d_]+)?|%", text))
