"""The words that the playground teaches, one plain sentence each, as `glossary.toml` holds them.

`docs/glossary.md` is written from here: `python -m proteus_playground.playground.glossary > docs/glossary.md`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Term:
    """One taught word. Its picture is `docs/img/glossary/{slug}.svg`."""

    word: str
    sentence: str
    field_term: str  # what papers call it
    code: tuple[str, ...]  # names that it has in the code

    @property
    def slug(self) -> str:
        return self.word.lower().replace(" ", "-")


def _read() -> Iterator[Term]:
    held = tomllib.loads((files(__package__) / "glossary.toml").read_text(encoding="utf-8"))
    for word, term in held.items():
        yield Term(word, term["sentence"], term["papers"], tuple(term["code"]))


TERMS = tuple(_read())


@cache
def by_word() -> dict[str, Term]:
    return {term.word: term for term in TERMS}


@cache
def by_code() -> dict[str, Term]:
    """Terms by each of their names in the code."""
    return {name: term for term in TERMS for name in term.code}


def sentence(word: str) -> str:
    """What `word` means. ValueError where the glossary does not have it."""
    if word not in by_word():
        raise ValueError(f"word={word!r}: allowed is {', '.join(by_word())}")
    return by_word()[word].sentence


def markdown() -> str:
    """The page `docs/glossary.md`."""
    head = """# Glossary

The words that the playground teaches, in an order in which each builds on those before it. The panels show the same
sentences as tooltips.

Four words of the field come first. A *token* is a word, a part of a word or a sign, and a model reads a text token by
token. In an attention layer each token has three vectors, its *query*, *key* and *value*. A query is compared with the
keys of the tokens so far, and the values of the most similar keys count most in the result. To *read* a token means to
use its key and its value.

In the pictures a square is a token of the text, the newest one on the right; the dark square is the token whose query
reads. Blue is the window, orange an anchor, green a ring, pink a note; grey tokens are not read.

<!-- Written by: python -m proteus_playground.playground.glossary > docs/glossary.md -->
"""
    return head + "".join(map(_entry, TERMS))


def _entry(term: Term) -> str:
    code = ", ".join(f"`{name}`" for name in term.code)
    return (
        f"\n## {term.word}\n\n![{term.word}](img/glossary/{term.slug}.svg)\n\n{term.sentence}\n\n"
        f"*In papers:* {term.field_term}. *In the code:* {code}.\n"
    )


if __name__ == "__main__":
    print(markdown(), end="")
