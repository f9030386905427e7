"""A downloaded language model for `proteus stream`: it tokenises, scores by content match, and answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..hf import opening
from ..hf.chat import ROOM, ChatReader
from ..hf.scorer import Asker, ModelScorer
from .buffer import Champions
from .second_pass import second_pass
from .stores import Store
from .tokenising import encoder

TOKENS_TO_ANSWER = 2048  # best tokens of the buffer that an answer is made from: more would take minutes on a CPU


@dataclass(frozen=True)
class ModelTask:
    """One document and one prompt. Pass 1 uses `rows` and `scorer`; `answer` is pass 2."""

    rows: Store
    scorer: ModelScorer
    prompt: str
    model: object
    tokenizer: object

    def answer(self, champions: Champions, positions: str) -> dict:
        """The reply, and how many tokens it was made from."""
        reader = ChatReader(self.model, self.tokenizer, compact=positions == "compacted")
        best = champions.best(min(TOKENS_TO_ANSWER, (reader.context - ROOM) // 2))
        return {"text": second_pass(self.rows, best, self.prompt, reader), "tokens_read": len(best)}


class StreamModel:
    """A downloaded model for one prompt. `ValueError` if it is not downloaded or the prompt is empty."""

    positions = "compacted"  # no model here was trained on distances of a million tokens

    def __init__(self, name: str, prompt: str | None, device: str):
        if not prompt:
            allowed = "a question; --model layer also scores by salience"
            raise ValueError(f"prompt={prompt!r}: must be {allowed}")
        self._prompt = prompt
        self._model, self._tokenizer = opening.load(name, device)
        self.encode, self.fingerprint = encoder(self._tokenizer)
        self._asker = Asker(self._model, self._tokenizer, opening.base_name(name))
        self.name = f"{opening.title(name)}, heads {self._asker.heads_named}"

    def generated(self, tokens: int) -> Store:
        raise ValueError(f"generated={tokens!r}: random rows mean nothing to {self.name}; use --model layer")

    def text(self, rows: np.ndarray) -> str:
        return self._tokenizer.decode(rows.tolist())

    def on(self, store: Store) -> ModelTask:
        if store.kind != "tokens":
            raise ValueError(f"FILE holds {store.kind}: {self.name} reads text or token ids; use --model layer")
        return ModelTask(store, self._asker.ask(self._prompt), self._prompt, self._model, self._tokenizer)
