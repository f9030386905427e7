"""A language model reads a text token by token through its KV banks, and then writes on by itself."""

from __future__ import annotations

from threading import RLock
from time import perf_counter

import torch

from ..attention.bank.view import BankContents
from ..attention.settings import Settings
from ..common.texts import Text
from ..hf.cache import ProteusCache
from ..hf.patch import handed
from ..hf.source import ModelSource
from ..lm.sampling import Sampling
from .bank_reading import SETTINGS

PIECE = 256  # tokens of the beginning that are read at a time


class ModelReading:
    """A `bank_reading.Reading` of a transformers model that `hf.patch` supports, every full layer of it in banks."""

    random = False

    def __init__(
        self, model, tokenizer, name: str, text: Text, *, tokens: int = 1024, start: int = 256,
        settings: Settings = SETTINGS, sampling: Sampling | None = None,
    ):  # fmt: skip
        """Reads the first `tokens` tokens of `text`, `start` of them at once, and samples what follows."""
        source = ModelSource(model, tokenizer, name)
        self.name, self.groups, self.layers = name, source.shape.n_groups, source.full_layers
        self._model, self._tokenizer, self._choose = model, tokenizer, sampling or Sampling(0.7, None, 0.95, 0)
        self._cache = ProteusCache.for_model(model, tokenizer, settings, name=name)
        self._ids = source.encode(text.body)[:tokens]
        self.note = f"{name} reads {len(self._ids):,} tokens of {text.name} one by one, and then writes on by itself."
        self.tokens: list[str] = []
        self.given, self.seconds = len(self._ids), 0.0
        self._lock, self._logits = RLock(), None
        first = self._ids[: max(1, min(start, self.given))]
        for at in range(0, len(first), PIECE):
            self._take_in(first[at : at + PIECE])

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes

    def step(self) -> bool:
        with self._lock:
            begun, at = perf_counter(), len(self.tokens)
            token = self._ids[at] if at < self.given else int(self._choose(self._logits, at))
            self._take_in([token])
            self.seconds = perf_counter() - begun
        return True

    def contents(self, layer: int, group: int) -> BankContents:
        with self._lock:
            return self._cache.banks[layer].contents(0, group)

    def close(self) -> None:
        """Leave the model as it was."""
        self._cache.close()

    @torch.inference_mode()
    def _take_in(self, ids: list[int]) -> None:
        row = torch.tensor([ids], device=self._model.device)
        self._logits = self._model(row, **handed(self._model, self._cache), logits_to_keep=1).logits[:, -1]
        self.tokens += self._tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
