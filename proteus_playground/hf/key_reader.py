"""Keys of the tokens of a long document in a few layers of a language model, computed window by window.

The model reads windows of WINDOW tokens. Each begins with the last CONTEXT tokens of the one before, so that a key
depends on the token's surroundings, and the cost grows linearly with the document's length. Layers after the last one
that is needed do not run.

Axes: `n` tokens of a chunk, `P` picked (layer, KV group) pairs, `d` head dim.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention.captured import half
from ..common.files import file_place
from ..common.progress import Stop, check_stop
from ..common.tensors import fingerprint
from .patch import AttentionCall, full_attention_layers, layer_shape, patched

WINDOW, CONTEXT = 256, 32  # tokens
BATCH = 8  # windows per pass of the model
MODEL = b"model"  # names the row of a cache that holds the fingerprint


@dataclass(frozen=True)
class Head:
    """A query head of a model."""

    layer: int
    head: int


class _LastLayerDone(Exception):
    """Raised to end a pass of the model after the last layer that is needed."""


class KeyReader:
    """Un-rotated keys of the KV groups that `heads` belong to, float16; heads of one group share their keys.

    cache: a file that keeps the keys of each window by its tokens, so that reading a document again, or with another
    needle in it, costs only its new windows; None keeps nothing. A model runs one pass at a time.
    """

    def __init__(self, model, heads: Sequence[Head], cache: Path | None = None):
        self._model = model
        self.vocabulary = model.get_input_embeddings().num_embeddings
        shape = layer_shape(model, full_attention_layers(model)[0])
        self.head_dim, self._per_group = shape.head_dim, shape.n_heads // shape.n_groups
        self.picks = tuple(sorted({(head.layer, head.head // self._per_group) for head in heads}))
        self.fingerprint = f"{fingerprint(model)} {WINDOW}+{CONTEXT} {self.picks}"
        width = len(self.picks) * self.head_dim
        self._cache = None if cache is None else WindowCache(Path(cache), self.fingerprint, WINDOW * width)

    def column(self, head: Head) -> int:
        """The index of the keys of `head` in the axis `P` of what `read` returns."""
        return self.picks.index((head.layer, head.head // self._per_group))

    @torch.no_grad()
    def read(self, tokens: np.ndarray, stop: Stop | None = None) -> Tensor:
        """tokens: `(n,)` ids of one chunk -> `(n, P, d)` float16 on the CPU. Raises `Stopped` between batches."""
        keys = torch.empty(len(tokens), len(self.picks), self.head_dim, dtype=torch.float16)

        def place(span: tuple[int, int, int], found: Tensor) -> None:
            begin, fresh, end = span
            keys[fresh:end] = found[fresh - begin : end - begin]

        todo = []
        for span in spans(len(tokens)):
            known = self._cache.get(tokens[span[0] : span[2]]) if self._cache else None
            if known is None:
                todo.append(span)
            else:
                place(span, torch.from_numpy(known).view(-1, *keys.shape[1:]))
        for i in range(0, len(todo), BATCH):
            check_stop(stop)
            some = todo[i : i + BATCH]
            ids = np.stack([tokens[begin:end] for begin, _, end in some])
            found = self._run(torch.from_numpy(ids.astype(np.int64)))
            for span, keys_of_span in zip(some, found, strict=True):
                place(span, keys_of_span)
            if self._cache:
                self._cache.put(zip(ids, found.numpy(), strict=True))
        return keys

    def _run(self, ids: Tensor) -> Tensor:
        """ids `(B, t)` -> `(B, t, P, d)` float16 on the CPU."""
        found = first_layers(self._model, ids, sorted({layer for layer, _ in self.picks}))
        return half(torch.stack([found[layer][1][:, :, group] for layer, group in self.picks], 2))


def first_layers(model, ids: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Un-rotated queries and keys `(B, t, heads, d)` of `layers`, in rising order, for ids `(B, t)`.

    The pass ends after the last of them.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def record(call: AttentionCall) -> None:
        found[call.layer] = call.q, call.k
        if call.layer == layers[-1]:
            raise _LastLayerDone

    with torch.no_grad(), patched(model, dict.fromkeys(layers, record)), suppress(_LastLayerDone):
        model.get_decoder()(ids.to(model.device), use_cache=False)
    return found


def spans(tokens: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a chunk: (first token read, first token whose key is new, end). All are full unless there is one."""
    fresh = 0
    while fresh < tokens:
        begin = max(0, min(fresh - CONTEXT, tokens - WINDOW))
        end = min(tokens, begin + WINDOW)
        yield begin, fresh, end
        fresh = end


class WindowCache:
    """Keys of full windows by the window's tokens, in an SQLite file. It may be killed and may have several writers.

    Raises `ValueError` for a file of another model, of other layers, or of another kind.
    """

    def __init__(self, path: Path, fingerprint: str, values: int):
        path = file_place(path, "cache")
        path.parent.mkdir(parents=True, exist_ok=True)
        if _is_old_format(path, fingerprint):
            path.unlink()
        self._nbytes = 2 * values  # of a full window
        self._file = sqlite3.connect(path, timeout=60, check_same_thread=False)
        try:
            with self._file:
                self._file.execute("CREATE TABLE IF NOT EXISTS windows (tokens BLOB PRIMARY KEY, keys BLOB)")
                self._file.execute("INSERT OR IGNORE INTO windows VALUES (?, ?)", (MODEL, fingerprint.encode()))
            same = self._find(MODEL) == fingerprint.encode()
        except sqlite3.DatabaseError:
            same = False
        if not same:
            self._file.close()
            raise ValueError(f"cache={str(path)!r} holds keys of another model or other layers: give another file")

    def get(self, tokens: np.ndarray) -> np.ndarray | None:
        """Keys of a window of exactly these tokens, float16, or None."""
        keys = self._find(_digest(tokens))
        return None if keys is None else np.frombuffer(bytearray(keys), np.float16)

    def put(self, windows: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Keep pairs of tokens and keys. Shorter windows, at the end of a chunk, are left out."""
        rows = ((_digest(tokens), np.ascontiguousarray(keys).tobytes()) for tokens, keys in windows)
        with self._file:
            full = [row for row in rows if len(row[1]) == self._nbytes]
            self._file.executemany("INSERT OR IGNORE INTO windows VALUES (?, ?)", full)

    def _find(self, name: bytes) -> bytes | None:
        row = self._file.execute("SELECT keys FROM windows WHERE tokens = ?", (name,)).fetchone()
        return row and row[0]


def _is_old_format(path: Path, fingerprint: str) -> bool:
    """Whether `path` is this model's cache from before version 0.2, a file of records; its keys are made again."""
    head = hashlib.sha256(fingerprint.encode()).digest()
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(head)) == head


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).digest()[:16]
