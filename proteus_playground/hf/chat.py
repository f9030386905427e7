"""A chat model answers a question from passages that were kept of a document.

Axes: `K` tokens kept.
"""

from __future__ import annotations

import numpy as np
import torch

from .patch import handed

BEFORE, AFTER = "These passages were taken from a long document:\n\n", "\n\nAnswer in a few words, from the passages. "
REPLY = 32  # tokens
ROOM = 256  # tokens that the question, the frame around it and the reply take at most


class ChatReader:
    """Pass 2 with a language model; greedy, so that a seed changes nothing.

    compact: number what is read afresh and put a line break where something was left out, for a model that never saw
    distances like a million tokens; else every token keeps the position it had.
    """

    def __init__(self, model, tokenizer, compact: bool = True):
        self._model, self._tokenizer, self._compact = model, tokenizer, compact
        self.context = int(model.config.max_position_embeddings)

    @torch.inference_mode()
    def answer(self, tokens: np.ndarray, positions: np.ndarray, prompt: str) -> str:
        """tokens: `(K,)` ids in document order; positions: `(K,)`, where they stand there, rising.

        `ValueError` where they do not fit the model's context beside the question.
        """
        if len(tokens) + ROOM > self.context:
            raise ValueError(f"tokens has {len(tokens):,}: must be at most {self.context - ROOM:,} for this model")
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        ask = [{"role": "user", "content": BEFORE + mark + AFTER + prompt}]
        chat = self._tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
        head, tail = (self._ids(part) for part in chat.split(mark, 1))
        if self._compact:
            tokens = _with_breaks(tokens, positions, self._ids("\n"))
            positions = np.arange(len(tokens))
        end = int(positions[-1]) + 1 if len(positions) else 0
        stand = np.concatenate((np.arange(len(head)), len(head) + positions, len(head) + end + np.arange(len(tail))))
        if len(stand) + REPLY > self.context:
            raise ValueError(f"prompt and passages have {len(stand):,} tokens: must be at most "
                             f"{self.context - REPLY:,} for this model")  # fmt: skip
        return self._reply(np.concatenate((head, tokens, tail)), stand)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _reply(self, ids: np.ndarray, stand: np.ndarray) -> str:
        from transformers import DynamicCache

        model, said = self._model, []
        kept = handed(model, DynamicCache())
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        for _ in range(REPLY):
            rows, place = (
                torch.tensor(np.asarray(x), dtype=torch.long, device=model.device)[None] for x in (ids, stand)
            )
            token = int(model(rows, position_ids=place, **kept, logits_to_keep=1).logits[0, -1].argmax())
            if token in ends:
                break
            said.append(token)
            ids, stand = [token], [int(stand[-1]) + 1]
        return self._tokenizer.decode(said, skip_special_tokens=True).strip()


def _with_breaks(tokens: np.ndarray, positions: np.ndarray, pause: list[int]) -> np.ndarray:
    """`tokens` with `pause` where the document goes on elsewhere."""
    parts = np.split(tokens, np.flatnonzero(np.diff(positions) != 1) + 1) if len(tokens) else [tokens]
    return np.concatenate([np.concatenate((part, pause)) for part in parts]).astype(np.int64)
