"""A chat model answers a question from passages of a document.

Axes: `K` tokens kept.
"""

from __future__ import annotations

import numpy as np
import torch

from .patch import handed
from .plain_text import framed_ids

BEFORE, AFTER = "These passages were taken from a long document:\n\n", "\n\nAnswer in a few words, from the passages. "
REPLY = 32  # tokens of an answer
ROOM = 256  # tokens left for the question, the chat frame and the reply


class ChatReader:
    """Pass 2 with a language model. It decodes greedily, so its answer does not depend on a seed.

    compact: number the tokens anew and put a line break wherever tokens were left out. This is for models that were not
    trained on distances like a million tokens. Otherwise every token keeps its position in the document.
    """

    def __init__(self, model, tokenizer, compact: bool = True):
        self._model, self._tokenizer, self._compact = model, tokenizer, compact
        self.context = int(model.config.max_position_embeddings)

    @torch.inference_mode()
    def answer(self, tokens: np.ndarray, positions: np.ndarray, prompt: str) -> str:
        """Answer `prompt` from tokens `(K,)`, ids in document order, and their rising positions `(K,)` there.

        Raises `ValueError` if they and the question do not fit into the model's context.
        """
        if len(tokens) + ROOM > self.context:
            raise ValueError(f"tokens has {len(tokens):,}: must be at most {self.context - ROOM:,} for this model")
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        ask = [{"role": "user", "content": BEFORE + mark + AFTER + prompt}]
        chat = self._tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        head, tail = chat.split(mark, 1)
        head, tail = self._ids(head), framed_ids(self._tokenizer, tail, 0, AFTER + prompt)
        if self._compact:
            tokens = _with_breaks(tokens, positions, self._ids("\n"))
            positions = np.arange(len(tokens))
        end = int(positions[-1]) + 1 if len(positions) else 0
        position_ids = np.concatenate(
            (np.arange(len(head)), len(head) + positions, len(head) + end + np.arange(len(tail)))
        )
        if len(position_ids) + REPLY > self.context:
            raise ValueError(f"prompt and passages have {len(position_ids):,} tokens: must be at most "
                             f"{self.context - REPLY:,} for this model")  # fmt: skip
        return self._reply(np.concatenate((head, tokens, tail)), position_ids)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _reply(self, ids: np.ndarray, position_ids: np.ndarray) -> str:
        from transformers import DynamicCache

        model, reply = self._model, []
        kept = handed(model, DynamicCache())
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        for _ in range(REPLY):
            rows, positions = (
                torch.tensor(np.asarray(x), dtype=torch.long, device=model.device)[None] for x in (ids, position_ids)
            )
            token = int(model(rows, position_ids=positions, **kept, logits_to_keep=1).logits[0, -1].argmax())
            if token in ends:
                break
            reply.append(token)
            ids, position_ids = [token], [int(position_ids[-1]) + 1]
        return self._tokenizer.decode(reply, skip_special_tokens=True).strip()


def _with_breaks(tokens: np.ndarray, positions: np.ndarray, line_break: list[int]) -> np.ndarray:
    """`tokens` with `line_break` wherever tokens of the document were left out."""
    parts = np.split(tokens, np.flatnonzero(np.diff(positions) != 1) + 1) if len(tokens) else [tokens]
    return np.concatenate([np.concatenate((part, line_break)) for part in parts]).astype(np.int64)
