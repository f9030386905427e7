"""Facts, and questions about them in other words.

A fact is a sentence that fits into any document. Its question uses other words: the two share no stem of a content
word (`bm25.stems` decides, and a test checks every pair), so a method that finds the fact must compare meanings. The
literal question uses the fact's own words. Distractors are facts of the same form about somebody or something else;
they share no content word with the question either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

NAME = "paraphrases.json"
TEXTS, LISTS = ("id", "fact", "question", "literal_question"), ("answers", "distractors")


@dataclass(frozen=True)
class Pair:
    """A fact and its questions. The fact contains at least one of `answers`, in upper or lower case."""

    id: str
    fact: str
    question: str
    literal_question: str
    answers: tuple[str, ...]
    distractors: tuple[str, ...]

    def asked(self, how: str) -> str:
        """The question; how: "paraphrase" or "literal"."""
        return {"paraphrase": self.question, "literal": self.literal_question}[how]


def load_pairs(path: Path | None = None) -> list[Pair]:
    """The pairs of a JSON file, by default the shipped one. Raises `ValueError` naming the faulty pair, `OSError`."""
    path = files(__package__) / NAME if path is None else Path(path)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(rows, ensure_ascii=False).encode()  # JSON can contain half a surrogate pair, which is no text
    except (ValueError, RecursionError) as err:
        raise ValueError(f"pairs={str(path)!r} is not JSON ({err}): allowed is a list of objects") from err
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"pairs={str(path)!r}: allowed is a list of at least one object")
    pairs = [_pair(row, f"pairs={str(path)!r}, entry {i}") for i, row in enumerate(rows, 1)]
    if twice := {pair.id for pair in pairs if [p.id for p in pairs].count(pair.id) > 1}:
        raise ValueError(f"pairs={str(path)!r}: id {min(twice)!r} occurs twice")
    return pairs


def _pair(row: object, where: str) -> Pair:
    if not isinstance(row, dict) or set(row) != {*TEXTS, *LISTS}:
        raise ValueError(f"{where}: allowed is an object with exactly {', '.join((*TEXTS, *LISTS))}")
    for name in TEXTS:
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{where}: {name}={row[name]!r}: allowed is a text that is not empty")
    for name in LISTS:
        good = isinstance(row[name], list) and all(isinstance(text, str) and text.strip() for text in row[name])
        if not good or (name == "answers" and not row[name]):
            raise ValueError(f"{where}: {name}={row[name]!r}: allowed is a list of texts, one answer at least")
    if not any(answer.lower() in row["fact"].lower() for answer in row["answers"]):
        raise ValueError(f"{where}: none of answers={row['answers']!r} occurs in the fact {row['fact']!r}")
    return Pair(*(row[name] for name in TEXTS), *(tuple(row[name]) for name in LISTS))
