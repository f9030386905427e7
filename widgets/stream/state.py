"""The settings of the chunk buffer panel: the sizes of the stream, the prompt, and the needle."""

from __future__ import annotations

from dataclasses import dataclass

from traitlets import Unicode

from proteus_playground.attention.settings import Control
from proteus_playground.hf.models import DEFAULT, KNOWN
from proteus_playground.streaming.buffer import StreamPlan

from ..parts.state import ModelNames, checked_traits, checker

NUMBERS = (
    Control("chunk_tokens", "chunk", "chunk", 512, 65_536, 4096,
            "How many tokens are read at a time; a page is 512 tokens.", "tokens", octave_step=1.0),
    Control("per_chunk_budget", "budget", "budget per chunk", 16, 16_384, 128,
            "The most tokens that one chunk may send to the buffer, neighbours included.", "tokens", octave_step=0.5),
    Control("buffer_tokens", "buffer", "buffer", 64, 65_536, 512,
            "How many tokens of the whole document are kept; a full buffer drops the tokens that score lowest.",
            "tokens", octave_step=0.5),
    Control("neighbours", "neighbours", "neighbours", 0, 64, 8,
            "How many tokens on either side of a champion are kept with it, so that the buffer can be read.", "tokens"),
    Control("page", "page", "page", 1, 4096, 112, "The page of 512 tokens on which the needle is planted."),
    Control("tokens", "tokens", "tokens", 2048, 1_048_576, 100_000, "How long the document is, in tokens."),
)  # fmt: skip
BY_NAME = {control.name: control for control in NUMBERS}
PLAN = tuple(control.name for control in NUMBERS[:4])  # the fields of a `StreamPlan`
NEEDLE = "The secret ingredient of Grandmother Odalys's potato soup is one spoonful of horseradish."
PROMPT = "What is the secret ingredient of the potato soup?"
CHOICES = {"model": ModelNames((*KNOWN, "random")), "judge": ("words", "layers")}
MAX_WORDS = 2000  # characters of a prompt or a needle


TEXTS = {
    "prompt": Unicode(PROMPT),
    "needle": Unicode(NEEDLE),
    "text": Unicode("pydoc"),  # what `haystacks.build` reads
    "model": Unicode(DEFAULT),
    "judge": Unicode("words"),  # what scores: "words" alone, at once, or the model's "layers", in context
}
check = checker(BY_NAME, TEXTS, CHOICES, dict.fromkeys(("prompt", "needle"), MAX_WORDS))


class StreamState(checked_traits(NUMBERS, check, **TEXTS)):
    """Every control of the panel as a trait. Setting one out of range raises and leaves it as it was."""

    def plan(self) -> StreamPlan:
        return StreamPlan(**{name: getattr(self, name) for name in PLAN})


@dataclass(frozen=True)
class Wanted:
    """What one picture shows. until: how many tokens the layers had scored when the picture was requested."""

    judge: str
    prompt: str
    needle: str
    page: int
    plan: StreamPlan
    until: int = 0
