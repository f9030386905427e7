"""What the chunk buffer panel is asked to show: the sizes of the stream, the prompt, and the needle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from traitlets import HasTraits, Int, Unicode, validate

from proteus_playground.streaming.buffer import StreamPlan

from ..parts.state import Field, number

FIELDS = (
    Field("chunk_tokens", "chunk", "chunk", 512, 65_536, 4096,
          "How many tokens are read at a time; a page is 512."),
    Field("per_chunk_budget", "budget", "budget per chunk", 16, 16_384, 128,
          "The most tokens that one chunk may send to the buffer, neighbours included."),
    Field("buffer_tokens", "buffer", "buffer", 64, 65_536, 512,
          "How many tokens of the whole document are kept; where it is full, the lowest score has to leave."),
    Field("neighbours", "neighbours", "neighbours", 0, 64, 8,
          "How many tokens on either side a champion brings along, so that what is kept can be read."),
    Field("page", "page", "page", 1, 4096, 112, "The page of 512 tokens on which the needle is planted."),
    Field("tokens", "tokens", "tokens", 2048, 1_048_576, 100_000, "How long the document is, in tokens."),
)  # fmt: skip
BY_NAME = {field.name: field for field in FIELDS}
PLAN = tuple(field.name for field in FIELDS[:4])
NEEDLE = "The secret ingredient of Grandmother Odalys's potato soup is one spoonful of horseradish."
PROMPT = "What is the secret ingredient of the potato soup?"
CHOICES = {"model": ("smollm2", "random"), "judge": ("words", "layers")}
MAX_WORDS = 2000  # characters of a prompt or a needle


class StreamState(HasTraits):
    """Every control of the panel as a trait. Setting one out of range raises and leaves it as it was."""

    chunk_tokens = Int(BY_NAME["chunk_tokens"].default)
    per_chunk_budget = Int(BY_NAME["per_chunk_budget"].default)
    buffer_tokens = Int(BY_NAME["buffer_tokens"].default)
    neighbours = Int(BY_NAME["neighbours"].default)
    page = Int(BY_NAME["page"].default)
    tokens = Int(BY_NAME["tokens"].default)
    prompt = Unicode(PROMPT)
    needle = Unicode(NEEDLE)
    text = Unicode("pydoc")  # what `haystacks.build` reads
    model = Unicode("smollm2")
    judge = Unicode("words")  # who scores: "words" alone, at once, or the model's "layers", in context

    @validate(*BY_NAME, "prompt", "needle", "text", "model", "judge")
    def _valid(self, proposal):
        return check(proposal["trait"].name, proposal["value"])

    def plan(self) -> StreamPlan:
        return StreamPlan(**{name: getattr(self, name) for name in PLAN})

    def update(self, values: Mapping) -> None:
        """Sets all of `values` or, where one is not allowed, none."""
        checked = {name: check(name, value) for name, value in values.items()}
        with self.hold_trait_notifications():
            for name, value in checked.items():
                setattr(self, name, value)


def check(name: str, value):
    """`value` as trait `name` holds it. ValueError or TypeError names the argument, the value and what is allowed."""
    if name in BY_NAME:
        return number(BY_NAME[name], value)
    if name not in StreamState.class_trait_names():
        raise ValueError(f"{name}={value!r} is no setting: allowed is {', '.join(StreamState.class_trait_names())}")
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: allowed is a string")
    if name in CHOICES and value not in CHOICES[name]:
        raise ValueError(f"{name}={value!r}: allowed is {', '.join(map(repr, CHOICES[name]))}")
    if name in ("prompt", "needle") and len(value) > MAX_WORDS:
        raise ValueError(f"{name} holds {len(value):,} characters: allowed is up to {MAX_WORDS:,}")
    return value


@dataclass(frozen=True)
class Wanted:
    """What one picture is asked to show. `until`: tokens that the layers have scored when it was asked for."""

    judge: str
    prompt: str
    needle: str
    page: int
    plan: StreamPlan
    until: int = 0
