"""Which part of a text is read, and the sentence that says so."""

from __future__ import annotations

SINK = 4  # first tokens kept when a text is cut: models lean on them
CHARS_PER_TOKEN = 40  # more than any text has on average, so that only the ends of a long one are tokenised


def cut_text(source, body: str, max_tokens: int) -> tuple[list, bool]:
    """Tokens to read, at most `max_tokens`, and whether a middle part was left out."""
    reach = max_tokens * CHARS_PER_TOKEN
    words = source.encode(body[-reach:])
    if len(body) > reach and len(words) < max_tokens:  # words longer than any in English: look at all of it
        words, reach = source.encode(body), len(body)
    if len(body) <= reach and len(words) <= max_tokens:
        return words, False
    head = source.encode(body[: SINK * CHARS_PER_TOKEN])[:SINK]
    return head + words[len(head) - max_tokens :], True


def describe(source, text, tokens: int, cut: bool, calibration) -> str:
    """One plain sentence: model, text, and where its prototypes come from, or that the weights are random."""
    part = f"the first {SINK} and last {tokens - SINK:,} tokens" if cut else f"all {tokens:,} tokens"
    if source.random:
        stand_in = f"a stand-in layer reads {part} of {text.name}"
        return f"Random weights, nothing learned: {stand_in}; pull a model to see a real one."
    fitted = f"prototypes were fitted on other text, {calibration.name}"
    if source.own_gates:
        own = min(gates for _, gates in source.own_gates)
        fitted = f"gates are its own where there are {own}, else fitted on {calibration.name}"
    return f"{source.name} reads {part} of {text.name}; {fitted}."
