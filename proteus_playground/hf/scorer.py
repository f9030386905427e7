"""How well each token of a document matches a prompt, by a language model's own queries and keys.

Each sentence of the prompt is scored separately. For each of its rows and each chosen head, the best un-rotated q.k
within RADIUS tokens of a document token is found. Their mean, in standard deviations above the mean of an ordinary text
for the same sentence, is the token's score; the best sentence counts. The mean query of other questions is subtracted,
so that tokens which match any question do not count. A score does not depend on the token's position: a fact a million
tokens away scores like a near one.

(Late interaction, Khattab and Zaharia 2020, https://arxiv.org/abs/2004.12832, with attention heads.)

Axes: `n` tokens of a chunk, `R` rows of a question, `P` picked (layer, KV group) pairs, `d` head dim.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.progress import Stop
from ..common.texts import BOOK, load_text
from .key_reader import Head, KeyReader
from .plain_text import text_ids
from .retrieval_heads import RADIUS, calibration_queries, find_heads, known_heads, match, mean_queries, prompt_queries

SENTENCE = re.compile(r"(?<=[.?!])\s+")
LONGEST = 1024  # tokens of a prompt: each is compared with every token of a document
TOKENS_PER_STEP = 4096  # tokens scored at a time, so that the scores of all rows fit into the processor's cache


@dataclass(frozen=True)
class Question:
    """One sentence of a prompt, as queries."""

    queries: tuple[Tensor, ...]  # one per head, (R, d)
    words: tuple[str, ...]  # text of the first rows, which are the prompt's; the other rows are the chat frame
    mean: float = 0.0  # mean score of an ordinary text
    spread: float = 1.0  # standard deviation of its scores


class ModelScorer:
    """Scores chunks of token ids for one prompt; a `streaming.Scorer`. Made by `Asker.ask`."""

    def __init__(self, reader: KeyReader, heads: Sequence[Head], questions: Sequence[Question]):
        self._reader, self._heads, self._questions = reader, tuple(heads), tuple(questions)
        self.stop: Stop | None = None  # called between batches of windows
        digest = hashlib.sha256(f"{[(q.mean, q.spread) for q in questions]}".encode())
        for question in questions:
            digest.update(b"".join(q.contiguous().numpy().tobytes() for q in question.queries))
        self.fingerprint = f"{reader.fingerprint} {self._heads} {digest.hexdigest()[:16]}"
        self._reasons = [
            f"matches “{word.strip()}” of the prompt (layer {head.layer}, head {head.head})"
            for question in questions for head in heads for word in question.words
        ]  # fmt: skip

    def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `(n,)` of a chunk -> score `(n,)` float32, reason `(n,)` int32.

        A chunk's first token scores -inf: it is an attention sink, whose key does not depend on the token. Raises
        `ValueError` for ids outside the model's vocabulary.
        """
        if rows.ndim != 1 or not len(rows) or rows.dtype.kind not in "iu":
            raise ValueError(f"rows is {rows.dtype} of shape {rows.shape}: must be token ids (n,), n >= 1")
        if not 0 <= rows.min() <= rows.max() < self._reader.vocabulary:
            raise ValueError(f"rows has ids from {rows.min()} to {rows.max()}: must be in [0, "
                             f"{self._reader.vocabulary}), the model's vocabulary")  # fmt: skip
        score, reason = self.of_keys(self._reader.read(rows, self.stop))
        score[0] = -torch.inf
        return score.numpy(), reason.to(torch.int32).numpy()

    def of_keys(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `(n, P, d)` -> score and reason of each token, `(n,)`."""
        parts = []
        for i in range(0, len(keys), TOKENS_PER_STEP):
            around = slice(max(0, i - RADIUS), i + TOKENS_PER_STEP + RADIUS)  # the step's tokens and their neighbours
            own = slice(i - around.start, i - around.start + TOKENS_PER_STEP)
            parts.append(self._score_step(keys[around], own))
        score, reason = (torch.cat(x) for x in zip(*parts, strict=True))
        return score, reason

    def _score_step(self, keys: Tensor, own: slice) -> tuple[Tensor, Tensor]:
        scores, reasons, first, scale = [], [], 0, self._reader.head_dim**-0.5
        for question in self._questions:
            pairs = zip(self._heads, question.queries, strict=True)
            found = torch.stack([match(q, keys[:, self._reader.column(head)], scale)[:, own] for head, q in pairs])
            scores.append((found.mean((0, 1)) - question.mean) / question.spread)
            by_word = found[:, : len(question.words)].flatten(0, 1)  # (heads words, n)
            reasons.append((by_word - by_word.mean(1, keepdim=True)).argmax(0) + first)
            first += len(by_word)
        score, best = torch.stack(scores).max(0)
        return score, torch.stack(reasons).gather(0, best[None])[0]

    def explain(self, reason: int) -> str:
        """The word of the prompt that matched best, and the head in which it did."""
        return self._reasons[reason]


class Asker:
    """A language model that scores documents for any number of prompts.

    heads: None takes those known for `name`, or else finds heads by calibration on `text`. cache: a file for keys by
    window. Raises `ValueError` if no heads are known and there is no text.
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
            raise ValueError(
                f"heads=None: none are known for {name!r}; `proteus models heads {name}` finds and keeps them; or give "
                "heads, or a text on which to find them"
            )
        if not chosen:
            *_, last = find_heads(model, tokenizer, text)
            chosen = last.heads
        self.name, self.heads = name, tuple(chosen)
        self._model, self._tokenizer = model, tokenizer
        self._layers = tuple(sorted({head.layer for head in self.heads}))
        self.reader = KeyReader(model, self.heads, cache)
        self._centre = mean_queries(calibration_queries(model, tokenizer, self._layers))
        ordinary = text_ids(tokenizer, load_text(BOOK).body)
        self._ordinary = self.reader.read(np.array(ordinary, np.int32))

    @property
    def heads_named(self) -> str:
        """The heads as layer.head, in the order they were found."""
        return " ".join(f"{head.layer}.{head.head}" for head in self.heads)

    def ask(self, prompt: str) -> ModelScorer:
        """A scorer for `prompt`. Raises `ValueError` for a prompt without words or with more than `LONGEST` tokens."""
        size = len(text_ids(self._tokenizer, prompt))
        if size > LONGEST:
            raise ValueError(f"prompt={prompt[:40]!r}... has {size:,} tokens: must be at most {LONGEST:,}")
        sentences = [part for part in SENTENCE.split(prompt) if part.strip()] or [prompt]
        return ModelScorer(self.reader, self.heads, [self._question(part) for part in sentences])

    def _question(self, sentence: str) -> Question:
        rows, ids = prompt_queries(self._model, self._tokenizer, sentence, self._layers)
        queries = [rows[head.layer][:, head.head] - self._centre[head.layer][head.head] for head in self.heads]
        words = self._tokenizer.batch_decode([[i] for i in ids.tolist()], clean_up_tokenization_spaces=False)
        plain = Question(tuple(queries), tuple(words))
        score, _ = ModelScorer(self.reader, self.heads, [plain]).of_keys(self._ordinary)
        return replace(plain, mean=float(score.mean()), spread=max(float(score.std()), 1e-6))
