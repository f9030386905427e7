"""Prototypes for a model that was trained without any: k-means on the model's keys for a calibration text.

The keys cost one pass over the calibration text, the prototypes of one layer a few tens of milliseconds. Both are
kept on disk with the recipe that made them. A file with another recipe is made again.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import Protocol

import torch
from torch import Tensor

from ..common import __version__
from ..common.progress import Progress, Stop, check_stop, tell
from ..common.tensors import read_tensors, write_tensors
from ..common.texts import Text
from . import Gates
from .captured import CapturedLayer
from .settings import LayerShape

FORMAT = "1"
SEED = 0
CHARS_PER_TOKEN = 20  # more than the average of any text, so the start that is tokenised holds enough tokens
IN_MEMORY = 3  # sets of gates per layer that are kept in memory: one of 512 gates takes 0.3 to 4 MB


@dataclass(frozen=True)
class Store:
    """A folder of safetensors files, each with the recipe that made it. folder=None: nothing is kept on disk."""

    folder: Path | None

    def read(self, name: str, recipe: dict) -> dict[str, Tensor] | None:
        """The tensors of `name`, or None where there is no readable file with exactly this recipe."""
        if self.folder is None:
            return None
        try:
            tensors, found = read_tensors(self.folder / f"{name}.safetensors", "Calibration")
        except (OSError, ValueError):
            return None
        return tensors if found == recipe else None

    def write(self, name: str, tensors: dict[str, Tensor], recipe: dict) -> None:
        """Write the file, whole or not at all. A folder that cannot be written is no error: fitting again is enough."""
        if self.folder is not None:
            with suppress(OSError):
                write_tensors(self.folder / f"{name}.safetensors", tensors, recipe)


class KeySource(Protocol):
    """What `Calibration` needs of a model: its name and shape, and the keys that its layers make of a text."""

    name: str
    fingerprint: str  # changes when the weights do
    shape: LayerShape  # of each layer's attention
    n_layers: int
    device: torch.device  # where a layer runs
    own_gates: Mapping[tuple[int, int], Gates]  # (layer, gates per group) -> gates that need no fitting
    gates_from: str  # "from its training", "with the package": where these come from

    def encode(self, body: str) -> list:
        """Tokens of a text, in the form that `ids` takes."""

    def ids(self, tokens: list) -> Tensor:
        """Token numbers `(T,)` int64."""

    def capture(
        self, ids: Tensor, *, keys_only: bool = False, before_layer: Callable[[int], None] | None = None
    ) -> dict[int, CapturedLayer]:
        """Run the dense model once on `ids` `(T,)` and record, on the CPU in float16, what each layer sees.

        keys_only: record only k. before_layer: called with each layer's index before it runs; its exception ends the
        pass.
        """


class Calibration:
    """Gates of every layer of one model, fitted when they are first needed.

    source: the model; text: what prototypes are fitted on; tokens: how many of its tokens are read; folder: where keys
    and prototypes are kept, None for memory only.
    """

    def __init__(self, source: KeySource, text: Text, tokens: int, folder: Path | None):
        self.source, self.text = source, text
        self._store = Store(folder)
        self._tokens = tokens
        self._keys: dict[int, Tensor] | None = None
        self._gates: OrderedDict[tuple[int, int], Gates] = OrderedDict()
        self._lock = RLock()
        self._recipe = {
            "format": FORMAT,
            "package": __version__,
            "model": source.name,
            "model_hash": source.fingerprint,
            "text": text.name,
            "text_sha256": sha256(text.body.encode()).hexdigest(),
            "tokens": tokens,
            "seed": SEED,
        }
        label = re.sub(r"\W+", "-", f"{source.name}-{text.name}").strip("-").lower()
        self._label = f"{label}-{source.fingerprint[:8]}"

    def gates(self, layer: int, n_gates: int, *, progress: Progress | None = None, stop: Stop | None = None) -> Gates:
        """Gates of `layer`, with `n_gates` prototypes per KV group, on the source's device.

        If the source has that many gates for this layer, they are returned. Raises `ValueError` for more gates than the
        calibration text has tokens, `Stopped` when `stop` requests it.
        """
        if (layer, n_gates) in self.source.own_gates:
            return self.source.own_gates[layer, n_gates]
        if n_gates > self._tokens:
            raise ValueError(f"gates={n_gates}: must be at most {self._tokens}, the tokens they are fitted on")
        with self._lock:
            at = (layer, n_gates)
            if at not in self._gates:
                self._gates[at] = self._load_or_fit(layer, n_gates, progress, stop)
            self._gates.move_to_end(at)
            while len(self._gates) > IN_MEMORY * self.source.n_layers:
                self._gates.popitem(last=False)
            return self._gates[at]

    def _load_or_fit(self, layer: int, n_gates: int, progress: Progress | None, stop: Stop | None) -> Gates:
        gates = new_gates(self.source.shape, n_gates)
        recipe = self._recipe | {"layer": layer, "gates": n_gates}
        name = f"{self._label}-layer{layer}-gates{n_gates}"
        saved = self._store.read(name, recipe)
        if saved is not None and _shapes(saved) == _shapes(gates.state_dict()):
            gates.load_state_dict(saved)
        else:
            keys = self._keys_of(layer, progress, stop)
            check_stop(stop)
            gates.fit(keys.float(), seed=layer_seed(layer))
            self._store.write(name, gates.state_dict(), recipe)
        return gates.eval().to(self.source.device)

    def _keys_of(self, layer: int, progress: Progress | None, stop: Stop | None) -> Tensor:
        """Un-rotated keys `(N, G, d)` of the calibration text, float16. One pass captures those of all layers."""
        if self._keys is None:
            name = f"{self._label}-keys"
            saved = self._store.read(name, self._recipe)
            if saved is None:
                words = self.source.encode(self.text.body[: self._tokens * CHARS_PER_TOKEN])
                ids = self.source.ids(words[: self._tokens])
                before = watch(f"calibrating on {self.text.name}", self.source.n_layers, progress, stop)
                found = self.source.capture(ids, keys_only=True, before_layer=before)
                saved = {str(index): captured.k for index, captured in found.items()}
                self._store.write(name, saved, self._recipe)
            self._keys = {int(index): k for index, k in saved.items()}
        return self._keys[layer]


def new_gates(shape: LayerShape, n_gates: int) -> Gates:
    """Gates of a layer of `shape`, `n_gates` per KV group, not fitted yet."""
    with torch.random.fork_rng(devices=[]):  # new gates start at random; keep the caller's generator as it is
        return Gates(shape.n_groups, n_gates, shape.head_dim, shape.n_heads // shape.n_groups)


def layer_seed(layer: int) -> int:
    """The seed with which the gates of a layer are fitted."""
    return SEED + 1000 * layer


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def watch(what: str, layers: int, progress: Progress | None, stop: Stop | None) -> Callable[[int], None]:
    """A `before_layer` hook that reports progress and raises `Stopped` when `stop` requests it."""

    def before(layer: int) -> None:
        check_stop(stop)
        tell(progress, layer / layers, f"{what}: layer {layer + 1} of {layers}")

    return before
