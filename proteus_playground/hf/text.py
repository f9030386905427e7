"""Text generation as a stream, of any length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch

from ..common.checks import whole_number
from ..lm.sampling import Sampling
from .patch import handed
from .plain_text import text_ids

TOKENS_PER_STEP = 512  # tokens of a prompt that go through the model at a time


@torch.inference_mode()
def stream_text(
    model,
    tokenizer,
    prompt: str,
    cache,
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.7,
    top_k: int | None = None,
    top_p: float = 0.95,
    seed: int = 0,
    chat: bool = False,
) -> Iterator[str]:
    """Continue `prompt` and yield the text in parts, until the model emits an end token.

    cache: a transformers cache of one text, empty or with what came before; a `ProteusCache` does not grow. At each
    yield it holds the prompt and all tokens so far, so that another call can continue with another prompt.
    max_new_tokens: None sets no limit. temperature, top_k, top_p, seed: see `Sampling`. chat: the prompt is a rendered
    chat template, so control tokens such as <|im_end|> count; otherwise they stay text. The tokenizer must be a fast
    one. Raises `TypeError` or `ValueError` naming the argument.
    """
    from tokenizers.decoders import DecodeStream

    choose = Sampling(temperature, top_k, top_p, seed)
    if max_new_tokens is not None:
        whole_number("max_new_tokens", max_new_tokens, 1)
    ids = tokenizer(prompt, verbose=False)["input_ids"] if chat else text_ids(tokenizer, prompt)
    ids = torch.tensor([ids], device=model.device)
    if not ids.numel():
        raise ValueError(f"prompt={prompt!r}: must have at least one token")
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    pieces = DecodeStream(skip_special_tokens=True)  # keeps part of a character until the rest has come
    kept = handed(model, cache)
    for part in ids.split(TOKENS_PER_STEP, dim=1):
        logits = model(part, **kept, logits_to_keep=1).logits[:, -1]
    for _ in count() if max_new_tokens is None else range(max_new_tokens):
        token = choose(logits, cache.get_seq_length())
        logits = model(token[:, None], **kept, logits_to_keep=1).logits[:, -1]
        piece = pieces.step(tokenizer.backend_tokenizer, int(token))
        if piece:
            yield piece
        if int(token) in ends:
            return
