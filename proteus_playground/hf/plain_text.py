"""Token ids of other people's text: a control token that is spelled out in it, such as <|im_end|>, stays text.

Otherwise a document could end the user's turn in a prompt and begin one of its own. Only the frame of a chat template
may hold control tokens.
"""

from __future__ import annotations


def text_ids(tokenizer, text: str, **options) -> list[int]:
    """Ids of `text`, with whatever the tokenizer puts in front of a text; options: as of the tokenizer's call."""
    return tokenizer(text, split_special_tokens=True, verbose=False, **options)["input_ids"]


def framed_ids(tokenizer, rendered: str, start: int, text: str) -> list[int]:
    """Ids of a rendered chat template. `text` begins at character `start` of it; all the rest is the template's own.

    Raises `ValueError` if it is not there, because a template has rewritten it.
    """
    if text_ids(tokenizer, text, add_special_tokens=False) == _all_ids(tokenizer, text):
        return _all_ids(tokenizer, rendered)  # no control token in the text: split all at once
    kept = next((t for t in (text, text.rstrip(), text.strip()) if rendered.startswith(t, start)), None)
    if kept is None:
        raise ValueError(f"text={text[:40]!r} holds control tokens, and the model's chat template rewrites it")
    before, after = rendered[:start], rendered[start + len(kept) :]
    middle = text_ids(tokenizer, kept, add_special_tokens=False)
    return [*_all_ids(tokenizer, before), *middle, *_all_ids(tokenizer, after)]


def _all_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
