"""A model's text, piece by piece as it is written, for as long as one likes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch

from ..common.checks import whole_number
from ..lm.sampling import Sampling
from .patch import handed

READ = 512  # tokens of a prompt that go through the model at a time


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
) -> Iterator[str]:
    """Continue `prompt` and yield text as it comes, until the model ends it, or for ever if it does not.

    cache: a transformers cache of one text, empty or of what came before; a `ProteusCache` keeps its size. At every
    yield it holds the prompt and all the tokens so far, so a next call goes on with a next prompt. max_new_tokens: None
    sets no limit. temperature, top_k, top_p, seed: see `Sampling`. The tokenizer must be a fast one.
    Raises `TypeError` or `ValueError` naming the argument.
    """
    from tokenizers.decoders import DecodeStream

    choose = Sampling(temperature, top_k, top_p, seed)
    if max_new_tokens is not None:
        whole_number("max_new_tokens", max_new_tokens, 1)
    ids = torch.tensor([tokenizer(prompt, verbose=False)["input_ids"]], device=model.device)
    if not ids.numel():
        raise ValueError(f"prompt={prompt!r}: must have at least one token")
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    pieces = DecodeStream(skip_special_tokens=True)  # holds back half a character until the rest is there
    kept = handed(model, cache)
    for part in ids.split(READ, dim=1):
        logits = model(part, **kept, logits_to_keep=1).logits[:, -1]
    for _ in count() if max_new_tokens is None else range(max_new_tokens):
        token = choose(logits, cache.get_seq_length())
        logits = model(token[:, None], **kept, logits_to_keep=1).logits[:, -1]
        piece = pieces.step(tokenizer.backend_tokenizer, int(token))
        if piece:
            yield piece
        if int(token) in ends:
            return
