"""Which part of a text is read, and the sentence that describes it."""

from __future__ import annotations

from ..common.texts import Text
from .source import Source

SINK = 4  # first tokens kept when a text is cut: models use them as attention sinks
CHARS_PER_TOKEN = 40  # more than the average of any text, so that only the ends of a long text are tokenised


def cut_text(source: Source, body: str, max_tokens: int) -> tuple[list, bool]:
    """The tokens to read, at most `max_tokens`, and whether a middle part was left out."""
    reach = max_tokens * CHARS_PER_TOKEN
    words = source.encode(body[-reach:])
    if len(body) > reach and len(words) < max_tokens:  # unusually long tokens: tokenise the whole text
        words, reach = source.encode(body), len(body)
    if len(body) <= reach and len(words) <= max_tokens:
        return words, False
    head = source.encode(body[: SINK * CHARS_PER_TOKEN])[:SINK]
    return head + words[len(head) - max_tokens :], True


def describe(source: Source, text: Text, tokens: int, cut: bool, calibration: Text) -> str:
    """One sentence: the model, the text, and where the prototypes come from or that the weights are random."""
    part = f"the first {SINK} and last {tokens - SINK:,} tokens" if cut else f"all {tokens:,} tokens"
    if source.random:
        stand_in = f"a stand-in layer reads {part} of “{text.name}”"
        return f"Random weights, nothing learned: {stand_in}; pull a model to see a real one."
    fitted = f"its prototypes were fitted on another text, “{calibration.name}”"
    if source.own_gates:
        trained = min(gates for _, gates in source.own_gates)
        other = f"with any other number they are fitted on another text, “{calibration.name}”"
        fitted = f"with {trained} gates its prototypes come {source.gates_from}, {other}"
    return f"{source.name} reads {part} of “{text.name}”; {fitted}."
