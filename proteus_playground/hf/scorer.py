"""How well each token of a document answers a prompt, by a language model's own queries and keys.

For every row of the prompt and every chosen head, the best un-rotated q.k within RADIUS tokens; their mean is the
token's score. Queries have the mean of other questions taken away, so that what any question would look at does not
count. Nothing depends on where a token stands: a fact a million tokens away scores like a near one.
(Late interaction, Khattab and Zaharia 2020, https://arxiv.org/abs/2004.12832, with a model's attention heads.)

Axes: `n` tokens of a chunk, `R` prompt rows, `d` head dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..progress import Stop
from .key_reader import Head, KeyReader
from .retrieval_heads import RADIUS, find_heads, known_heads, match, mean_queries, prompt_queries

PIECE = 4096  # tokens scored at a time: what a prompt's rows make of them stays in the processor's cache


class ModelScorer:
    """Scores chunks of token ids for one prompt; a `streaming.Scorer`. Made by `Asker.ask`.

    queries: a head's rows `(R, d)` each; words: what the first of them, the prompt's own, read as.
    """

    def __init__(self, reader: KeyReader, heads: Sequence[Head], queries: Sequence[Tensor], words: list[str]):
        self._reader, self._heads, self._queries, self._words = reader, tuple(heads), tuple(queries), words
        self.stop: Stop | None = None  # asked between batches of windows
        digest = hashlib.sha256(b"".join(q.contiguous().numpy().tobytes() for q in queries)).hexdigest()[:16]
        self.fingerprint = f"{reader.fingerprint} {self._heads} {digest}"

    def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `(n,)` of a chunk -> score `(n,)` float32, reason `(n,)` int32.

        A chunk's first token is a sink, whose key tells nothing of it: -inf.
        """
        keys = self._reader.read(rows, self.stop)
        parts = []
        for i in range(0, len(keys), PIECE):
            near = slice(max(0, i - RADIUS), i + PIECE + RADIUS)  # what the piece's own tokens are compared with
            found = self._match(keys[near])[:, i - near.start : i - near.start + PIECE]
            own = found.unflatten(0, (len(self._heads), -1))[:, : len(self._words)].flatten(0, 1)
            parts.append((found.mean(0), (own - own.mean(1, keepdim=True)).argmax(0)))
        score, reason = (torch.cat(x) for x in zip(*parts, strict=True))
        score[0] = -torch.inf
        return score.numpy(), reason.to(torch.int32).numpy()

    def _match(self, keys: Tensor) -> Tensor:
        """Keys `(n, P, d)` -> `(heads R, n)`."""
        pairs, scale = zip(self._heads, self._queries, strict=True), self._reader.head_dim**-0.5
        return torch.cat([match(q, keys[:, self._reader.column(head)], scale) for head, q in pairs])

    def explain(self, reason: int) -> str:
        """The prompt's word that matched best there, and the head that says so."""
        head, row = divmod(reason, len(self._words))
        at = self._heads[head]
        return f"matches “{self._words[row].strip()}” of the prompt (layer {at.layer}, head {at.head})"


class Asker:
    """A language model made ready to score documents for any number of prompts.

    heads: None takes those known for `name`, else finds them by calibration on `text`; `ValueError` where there is
    neither. cache: a file for keys by window.
    """

    def __init__(
        self,
        model,
        tokenizer,
        name: str,
        *,
        heads: Sequence[Head] | None = None,
        text: str | None = None,
        cache: Path | None = None,
    ):
        chosen = heads or known_heads(name)
        if not chosen and text is None:
            raise ValueError(f"heads=None: none are known for {name!r}; give heads, or a text to find them by")
        if not chosen:
            *_, last = find_heads(model, tokenizer, text)
            chosen = last.heads
        self.name, self.heads = name, tuple(chosen)
        self._model, self._tokenizer = model, tokenizer
        self._layers = tuple(sorted({head.layer for head in self.heads}))
        self.reader = KeyReader(model, self.heads, cache)
        self._centre = mean_queries(model, tokenizer, self._layers)

    @property
    def heads_named(self) -> str:
        """The heads as layer.head, in the order they were found."""
        return " ".join(f"{head.layer}.{head.head}" for head in self.heads)

    def ask(self, prompt: str) -> ModelScorer:
        """A scorer for `prompt`. `ValueError` for a prompt without a token."""
        rows, ids = prompt_queries(self._model, self._tokenizer, prompt, self._layers)
        queries = [rows[head.layer][:, head.head] - self._centre[head.layer][head.head] for head in self.heads]
        words = self._tokenizer.batch_decode([[i] for i in ids.tolist()], clean_up_tokenization_spaces=False)
        return ModelScorer(self.reader, self.heads, queries, words)
