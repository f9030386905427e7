"""The built-in layer as a reader of documents: `proteus stream --model layer`, which needs no language model.

Nothing is learned. Words are hashed to fixed random vectors, and the layer's queries resemble its keys, so that a word
of the prompt matches the same word in the document. Each word is weighted by its logarithmic rarity, so that a frequent
word counts for little.

Axes: `n` tokens, `P` words of the prompt, `D` model width.
"""

from __future__ import annotations

from binascii import crc32
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from ..attention import AttentionConfig, ProteusAttention
from ..common.texts import WORD, word_hash
from .arrays import npy_rows
from .buffer import Champions
from .layer_scorer import LayerScorer, one_thread_each
from .second_pass import attend_over
from .sources import open_document
from .stores import Store, generated

WIDTH, HEADS, GROUPS = 512, 8, 2
TABLE = 8192  # vectors; a word is the sum of two of them, so that hardly any two words are alike
FORMS = 32  # ids of one word: with and without a capital or a space before it
ROWS_FITTED = 8192  # that prototypes are fitted to
TOKENS_PER_COUNT = 1 << 20  # read at a time to count words
CHAMPIONS_IN_ANSWER = 5


@dataclass(frozen=True)
class Embedded:
    """A document of words in the form of embeddings."""

    store: Store
    table: np.ndarray  # (TABLE, D)

    @property
    def fingerprint(self) -> str:
        return self.store.fingerprint

    def __len__(self) -> int:
        return len(self.store)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.embed(self.store.read(start, stop) // FORMS)

    def embed(self, words: np.ndarray) -> np.ndarray:
        """Hashes of words `(n,)` -> `(n, D)` float32."""
        rows = self.table[words % TABLE]
        rows += self.table[words // TABLE]
        return rows


def number(word: str) -> int:
    """A hash in [0, TABLE^2), the same for any case and with or without the space before it."""
    return word_hash(word) % TABLE**2


class LayerModel:
    """Reads text or embeddings for one prompt, or scores by salience if the prompt is None.

    source: the document. If its ids come from the cache on disk, it is read again to learn the words they stand for.
    """

    name, fingerprint, positions = "layer", "hashed words", "original"

    def __init__(self, prompt: str | None, *, source: str | None = None, seed: int = 0, device: str = "cpu"):
        self._prompt, self._source, self._seed, self._device = prompt, source, seed, torch.device(device)
        self._words: dict[int, str] = {}

    def encode(self, body: str) -> list[int]:
        """Ids of words, each with the space before it: a hash of the word and of its form."""
        ids = []
        for word in WORD.findall(body):
            ids.append(number(word) * FORMS + crc32(word.encode()) % FORMS)
            self._words.setdefault(ids[-1], word)
        return ids

    def generated(self, tokens: int) -> Store:
        return generated(tokens, seed=self._seed, width=WIDTH)

    def text(self, rows: np.ndarray) -> str | None:
        """The text of tokens; None for embeddings."""
        if rows.ndim == 2:
            return None
        if self._source is not None and not self._words.keys() >= set(rows.tolist()):
            with TemporaryDirectory() as nowhere:
                open_document(self._source, encode=self.encode, fingerprint=self.fingerprint, cache=nowhere)
        return "".join(self._words[int(i)] for i in rows)

    def on(self, store: Store) -> LayerTask:
        """The task for one document. `ValueError` for a prompt that shares no word with it or does not fit it."""
        rows = store
        if store.kind == "tokens":
            if Path(self._source or "").suffix == ".npy":
                raise ValueError(
                    f"FILE={self._source!r} holds ids of another vocabulary: {self.name} reads text or "
                    "embeddings (T, D); use a language model"
                )
            generator = torch.Generator().manual_seed(self._seed + 1_000_003)  # another seed than that of the weights
            rows = Embedded(store, (torch.randn(TABLE, WIDTH, generator=generator) * 0.5**0.5).numpy())
        attn = _attention(rows, store.width or WIDTH, self._seed).to(self._device)
        if self._prompt is None:
            return LayerTask(rows, LayerScorer(attn), attn, None)
        prompt, weight, labels = self._prompt_rows(store, rows)
        prompt, weight = prompt.to(self._device), weight.to(self._device)
        return LayerTask(rows, LayerScorer(attn, prompt * weight[:, None], labels), attn, prompt)

    def _prompt_rows(self, store: Store, rows: Store | Embedded) -> tuple[Tensor, Tensor, list[str]]:
        """The prompt's rows `(P, D)`, their weights `(P,)`, and their names."""
        if store.kind == "embeddings":
            if Path(self._prompt).suffix != ".npy":
                raise ValueError(f"prompt={self._prompt!r}: for embeddings must be .npy rows (P, D={store.width})")
            given = npy_rows(Path(self._prompt))
            if given.shape[1:] != (store.width,):
                raise ValueError(f"prompt={self._prompt!r} has shape {given.shape}: must be (P, D={store.width})")
            given_rows = torch.from_numpy(given.read(0, given.shape[0])).float()
            if not given_rows.isfinite().all():
                raise ValueError(f"prompt={self._prompt!r} holds NaN or infinite values: must be finite")
            return given_rows, torch.ones(len(given_rows)), [str(row) for row in range(len(given_rows))]
        words = dict.fromkeys(word.strip().lower() for word in WORD.findall(self._prompt))
        words = [word for word in words if any(map(str.isalnum, word))]
        if not words:
            raise ValueError(f"prompt={self._prompt!r}: must have at least one word")
        hashes = np.array([number(word) for word in words])
        count = _count(store, hashes)
        if not count.any():
            raise ValueError(f"prompt={self._prompt[:80]!r}: must have at least one word that is in the document")
        rarity = np.log(len(store) / np.maximum(1, count))
        # A word that is not in the document would match by chance alone, so it weighs nothing.
        weight = np.where(count, rarity, 0).astype(np.float32)
        return torch.from_numpy(rows.embed(hashes)), torch.from_numpy(weight), words


@dataclass(frozen=True)
class LayerTask:
    """One document and one prompt, prepared for both passes."""

    rows: Store | Embedded
    scorer: LayerScorer
    attn: ProteusAttention
    prompt: Tensor | None  # (P, D)

    def answer(self, champions: Champions, positions: str) -> dict:
        """The champions that the prompt's last row attends to most: random weights give no other answer.

        "share_to_champions" is the row's attention to champions, the rest goes to the prompt itself; "share" is a
        champion's part of it. `ValueError` without a prompt.
        """
        if self.prompt is None:
            raise ValueError("prompt=None: pass 2 needs a prompt")
        share = attend_over(self.attn, self.rows, champions, self.prompt, positions=positions).reads().astype(float)
        total = float(share.sum())
        most = np.argsort(-share, kind="stable")[:CHAMPIONS_IN_ANSWER] if total else []
        read = [{"token": int(champions.position[i]), "share": float(share[i]) / total} for i in most]
        return {"share_to_champions": total, "most_read": read}


def _attention(rows: Store | Embedded, width: int, seed: int) -> ProteusAttention:
    """The layer, determined by seed and document, with prototypes fitted to the document's beginning."""
    # One thread each, so that rounding does not depend on the number of threads.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), one_thread_each():
        torch.manual_seed(seed)
        attn = ProteusAttention(AttentionConfig(width, HEADS, GROUPS, head_dim=64, route_heads=False)).eval()
        keys = attn.k_proj.weight.view(GROUPS, 64, width).repeat_interleave(HEADS // GROUPS, dim=0)
        attn.q_proj.weight.copy_(keys.flatten(0, 1) + attn.q_proj.weight / 2)
        begin = torch.from_numpy(rows.read(0, min(ROWS_FITTED, len(rows)))).float()
        if not begin.isfinite().all():
            at = int((~begin.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"row {at} of the document holds NaN or infinite values: must be finite")
        return attn.calibrate(begin[None])


def _count(store: Store, hashes: np.ndarray) -> np.ndarray:
    """How often each word number occurs, int64. Reads the document once."""
    order, count = np.argsort(hashes), np.zeros(len(hashes), np.int64)
    for start in range(0, len(store), TOKENS_PER_COUNT):
        words = store.read(start, min(start + TOKENS_PER_COUNT, len(store))) // FORMS
        found = words[np.isin(words, hashes)]
        count += np.bincount(order[np.searchsorted(hashes, found, sorter=order)], minlength=len(hashes))
    return count
