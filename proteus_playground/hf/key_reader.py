"""The keys that a few layers of a language model give the tokens of a long document, window by window.

The model reads windows of WINDOW tokens, each of which begins with CONTEXT tokens of the one before: what a key holds
is the token and its surroundings, at a cost that grows with the document's length and no faster. Layers after the last
that is asked for do not run.

Axes: `n` tokens of a chunk, `P` picked (layer, KV group) pairs, `d` head dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attention.captured import half
from ..common.progress import Stop, check_stop
from ..common.tensors import fingerprint
from .patch import AttentionCall, full_attention_layers, layer_shape, patched

WINDOW, CONTEXT, BATCH = 256, 32, 8


@dataclass(frozen=True)
class Head:
    """A query head of a model."""

    layer: int
    head: int


class _Enough(Exception):
    """The last layer that is wanted has spoken."""


class KeyReader:
    """Un-rotated keys that `heads` compare with, float16; heads of one KV group share them.

    cache: a file that keeps every window's keys by its content, so that a document that is read again, or with
    another needle in it, costs only its new windows; None keeps nothing. One pass at a time per model.
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
        """Where in `read`'s axis `P` the keys of `head` are."""
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
            for span, found in zip(some, self._run(torch.from_numpy(ids.astype(np.int64))), strict=True):
                place(span, found)
                if self._cache:
                    self._cache.put(tokens[span[0] : span[2]], found.numpy())
        return keys

    def _run(self, ids: Tensor) -> Tensor:
        """ids `(B, t)` -> `(B, t, P, d)` float16 on the CPU."""
        found = first_layers(self._model, ids, sorted({layer for layer, _ in self.picks}))
        return half(torch.stack([found[layer][1][:, :, group] for layer, group in self.picks], 2))


def first_layers(model, ids: Tensor, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """Un-rotated queries and keys `(B, t, heads, d)` of `layers`, which rise, for ids `(B, t)`; no later layer runs."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def record(call: AttentionCall) -> None:
        found[call.layer] = call.q, call.k
        if call.layer == layers[-1]:
            raise _Enough

    with torch.no_grad(), patched(model, dict.fromkeys(layers, record)), suppress(_Enough):
        model.get_decoder()(ids.to(model.device), use_cache=False)
    return found


def spans(tokens: int):
    """Windows over a chunk: (first token read, first token whose key counts, end). All but a lone one are full."""
    fresh = 0
    while fresh < tokens:
        begin = max(0, min(fresh - CONTEXT, tokens - WINDOW))
        end = min(tokens, begin + WINDOW)
        yield begin, fresh, end
        fresh = end


class WindowCache:
    """An append-only file of records, each the hash of a full window's tokens and its keys in float16.

    A process that is killed leaves at most one unfinished record at the end, which the next one cuts off. One writer at
    a time; a file of another model or other layers is refused by `ValueError`.
    """

    def __init__(self, path: Path, fingerprint: str, values: int):
        self._path, self._size = path, 2 * values
        head = hashlib.sha256(fingerprint.encode()).digest()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 -- lives as long as this object
        self._file.seek(0)
        found = self._file.read(len(head))
        if len(found) < len(head):
            self._file.truncate(0)
            self._file.write(head)
            self._file.flush()
        elif found != head:
            raise ValueError(f"cache={str(path)!r} holds keys of another model or other layers: give another file")
        record = 16 + self._size
        end = self._file.seek(0, 2)
        count = (end - len(head)) // record
        self._file.truncate(len(head) + count * record)
        self._at: dict[bytes, int] = {}
        for i in range(count):
            self._file.seek(len(head) + i * record)
            self._at[self._file.read(16)] = len(head) + i * record + 16

    def get(self, tokens: np.ndarray) -> np.ndarray | None:
        """Keys of a window of exactly these tokens, float16, or None."""
        at = self._at.get(_digest(tokens))
        if at is None:
            return None
        self._file.seek(at)
        return np.frombuffer(bytearray(self._file.read(self._size)), np.float16)

    def put(self, tokens: np.ndarray, keys: np.ndarray) -> None:
        """Remember a full window; shorter ones, at a chunk's end, are not kept."""
        digest, content = _digest(tokens), np.ascontiguousarray(keys).tobytes()
        if len(content) != self._size or digest in self._at:
            return
        end = self._file.seek(0, 2)
        self._file.write(digest + content)
        self._file.flush()
        self._at[digest] = end + 16


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).digest()[:16]
