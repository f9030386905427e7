"""Shelves: seeded texts made of recipes, receipts, manuals and notes, with questions that one sentence answers.

A *fact* is a sentence about an *entity* (a kind and a noun: "the golden soup") that ends in its value: "the golden soup
cooks for 40 minutes". No two facts of a shelf share entity and attribute, but many share a word, so a question can only
be answered by a reader that uses all of its words. Half of the facts are worded differently from their answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from ...common.checks import whole_number
from .words import DAYS, DISHES, KINDS, NAMES, NUMBERS, PLACES, SIDES, THINGS


@dataclass(frozen=True)
class Attribute:
    """A property of an entity: `{e}` is the entity, `{v}` the value, which is the last word apart from a unit."""

    question: str
    answer: str
    otherwise: str  # the same fact in other words
    values: tuple[str, ...]


COOKS = Attribute(
    "how long does {e} cook?", "{e} cooks for {v} minutes.", "on the stove {e} needs {v} minutes.", tuple(NUMBERS)
)
SERVED = Attribute("what is {e} served with?", "{e} is served with {v}.", "beside {e} put some {v}.", tuple(SIDES))
COSTS = Attribute("what does {e} cost?", "{e} costs {v} crowns.", "the price of {e} is {v} crowns.", tuple(NUMBERS))
FUSE = Attribute("what fuse does {e} take?", "{e} takes a fuse of {v} amps.", "fit {e} with {v} amps.", tuple(NUMBERS))
BUILT = Attribute("who built {e}?", "{e} was built by {v}.", "the maker of {e} is {v}.", tuple(NAMES))
KEPT = Attribute("who keeps {e}?", "{e} is kept by {v}.", "for {e} ask {v}.", tuple(NAMES))
PLACE = Attribute("where is {e}?", "{e} is in the {v}.", "look for {e} in the {v}.", tuple(PLACES))
DUE = Attribute("when is {e} due?", "{e} is due on {v}.", "bring back {e} on {v}.", tuple(DAYS))

DOCUMENTS = (  # heading, nouns, attributes, (least, most) entities, (least, most) facts per entity
    ("Recipe.", DISHES, (COOKS, SERVED), (1, 2), (1, 2)),
    ("Receipt.", DISHES + THINGS, (COSTS,), (2, 5), (1, 1)),
    ("Manual.", THINGS, (FUSE, BUILT), (1, 2), (1, 2)),
    ("Note.", DISHES + THINGS, (KEPT, PLACE, DUE), (2, 4), (1, 2)),
)
FILLERS = (
    "it rained all day.", "the cat slept by the window.", "nobody came.", "all was well.", "the wind turned at noon.",
    "keep this page dry.", "thank you and good bye.", "the lamps were lit early.",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about a shelf. `at` is the beginning of the fact in `Shelf.text`, in characters."""

    text: str
    answer: str
    value: str
    fact: str
    at: int

    @property
    def prompt(self) -> str:
        """The text that follows a shelf so that a model answers; see `Shelf.ask`."""
        return f" Question: {self.text} Answer:"


@dataclass(frozen=True)
class Shelf:
    """A text and all questions about it, in the order of their facts."""

    text: str
    questions: tuple[Question, ...]

    def ask(self, question: Question) -> str:
        """The shelf followed by one question, up to the beginning of the answer."""
        return self.text + question.prompt


def shelf(seed: int, sentences: int) -> Shelf:
    """A shelf of at least `sentences` sentences (about 11 tokens each), the same for a seed on every machine.

    sentences: in [1, 20,000]; with more, all entities would be used up. Raises `TypeError` or `ValueError` naming the
    argument.
    """
    whole_number("seed", seed, 0)
    whole_number("sentences", sentences, 1, 20_000)
    random = Random(seed)
    parts: list[str] = []
    questions: list[Question] = []
    taken: set[tuple[Attribute, str]] = set()
    length = count = 0
    while count < sentences:
        for sentence, question in _document(random, taken):
            at = length + (1 if parts else 0)
            if question is not None:
                questions.append(Question(*question, fact=sentence, at=at))
            parts.append(sentence)
            length, count = at + len(sentence), count + 1
    return Shelf(" ".join(parts), tuple(questions))


def _document(random: Random, taken: set) -> list[tuple[str, tuple[str, str, str] | None]]:
    """Sentences of one document, each with the (question, answer, value) that it decides, or None."""
    heading, nouns, attributes, entities, facts = random.choice(DOCUMENTS)
    lines: list = [(heading, None)]
    for _ in range(random.randint(*entities)):
        entity = f"the {random.choice(KINDS)} {random.choice(nouns)}"
        for attribute in random.sample(attributes, random.randint(*facts)):
            if (attribute, entity) in taken:
                continue
            taken.add((attribute, entity))
            value = random.choice(attribute.values)
            fact = random.choice((attribute.answer, attribute.otherwise)).format(e=entity, v=value)
            question, answer = attribute.question.format(e=entity), attribute.answer.format(e=entity, v=value)
            lines.append((fact, (question, answer, value)))
        if random.random() < 0.1:
            lines.append((random.choice(FILLERS), None))
    return lines
