"""Texts to train on as token ids, document by document.

A row of training text never holds parts of two documents, so attention needs no mask between documents; the patch would
refuse such a mask. Short documents are padded instead, and padding is never learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.texts import HUB, hub_rows, load_text
from ..plain_text import text_ids

SHORTEST = 16  # tokens of a document that is worth a row of its own


@dataclass(frozen=True)
class Corpus:
    """Documents one after another. `N` tokens in all."""

    name: str
    ids: np.ndarray  # (N,) int32
    learned: np.ndarray  # (N,) bool; False at tokens that are read but not learned, such as a user's question
    ends: np.ndarray  # (documents,) int64, where each document ends

    def rows(self, length: int) -> np.ndarray:
        """Rows of at most `length` tokens as `(rows, 3)` int64: start, end, and end of the document.

        A document's last row is left out where it fills less than a quarter of `length`, unless it is the only one.
        """
        found, start = [], 0
        for end in self.ends.tolist():
            for at in range(start, end, length):
                stop = min(at + length, end)
                if stop - at >= (SHORTEST if at == start else max(SHORTEST, length // 4)):
                    found.append((at, stop, end))
            start = end
        return np.array(found, np.int64).reshape(-1, 3)

    def split(self, share: float) -> tuple[Corpus, Corpus]:
        """The first part, and about the last `share` of the tokens: whole documents, or the end of a long one."""
        cut = int(len(self.ids) * (1 - share))
        end = int(self.ends[np.searchsorted(self.ends, cut)])  # of the document that the cut falls into
        before = int(self.ends[self.ends <= cut].max(initial=0))
        if end < len(self.ids) and end - before < (len(self.ids) - cut) / 2:
            cut = end
        return self._part(0, cut), self._part(cut, len(self.ids))

    def _part(self, start: int, stop: int) -> Corpus:
        inside = self.ends[(self.ends > start) & (self.ends < stop)]
        ends = np.append(inside, stop) - start if stop > start else inside
        return Corpus(self.name, self.ids[start:stop], self.learned[start:stop], ends)


def read_corpus(source: str, tokenizer, max_tokens: int) -> Corpus:
    """The documents of a source, at most about `max_tokens` tokens of them.

    source: a name or file as `load_text` takes it, which is one document; a file .jsonl with a "text" or a chat's
    "messages" in each line; or "hub:owner/dataset[/config]", whose rows hold the same. Of a chat, replies are learned.
    Raises `ValueError` naming the source where it is missing, empty or of another kind, `ConnectionError`.
    """
    parts, masks, total = [], [], 0
    for ids, learned in _documents(source, tokenizer):
        ids = ids[: max_tokens - total]
        parts.append(np.asarray(ids, np.int32))
        masks.append(np.ones(len(ids), bool) if learned is None else np.asarray(learned[: len(ids)], bool))
        total += len(ids)
        if total >= max_tokens:
            break
    if not total:
        raise ValueError(f"source={source!r} holds no text: must hold at least one word")
    ends = np.cumsum([len(part) for part in parts])
    return Corpus(source, np.concatenate(parts), np.concatenate(masks), ends)


def _documents(source: str, tokenizer) -> Iterator[tuple[list[int], list[bool] | None]]:
    """Ids of each document, and which of them are learned; None for all."""
    if source.startswith(HUB):
        rows: Iterable[dict] = hub_rows(source)[1]
    elif source.endswith(".jsonl"):
        rows = _lines(source)
    else:
        rows = [{"text": load_text(source).body}]
    for number, row in enumerate(rows, 1):
        if isinstance(row.get("messages"), list):
            yield chat_ids(tokenizer, row["messages"])
        elif isinstance(row.get("text"), str):
            yield text_ids(tokenizer, row["text"]), None
        else:
            raise ValueError(f"source={source!r}: row {number} holds {sorted(row)}: must hold 'text' or 'messages'")


def _lines(source: str) -> Iterator[dict]:
    if not Path(source).is_file():
        raise ValueError(f"source={source!r} is no file: must be a text, a file, or 'hub:owner/dataset'")
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as err:
                raise ValueError(f"source={source!r}: line {number} is no JSON ({err})") from err
            if isinstance(row, dict):
                yield row


def chat_ids(tokenizer, messages: list[dict]) -> tuple[list[int], list[bool]]:
    """Ids of a chat in the model's template, and which of them are learned: those that the assistant wrote.

    Raises `ValueError` where the tokenizer has no template, or one that rewrites earlier messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("messages: the model has no chat template; must be rows with 'text'")
    ids: list[int] = []
    learned: list[bool] = []
    for count, message in enumerate(messages, 1):
        reply = message.get("role") == "assistant"
        if reply:  # the frame in front of a reply is not learned
            _extend(ids, learned, _rendered(tokenizer, messages[: count - 1], True), False)
        _extend(ids, learned, _rendered(tokenizer, messages[:count], False), reply)
    return ids, learned


def _rendered(tokenizer, messages: list[dict], prompt: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _extend(ids: list[int], learned: list[bool], longer: list[int], reply: bool) -> None:
    if longer[: len(ids)] != ids:
        raise ValueError("messages: the chat template rewrites earlier messages, so replies cannot be told apart")
    learned += [reply] * (len(longer) - len(ids))
    ids[:] = longer
