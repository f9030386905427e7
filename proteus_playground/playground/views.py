"""Plain data between the probe and the widgets: settings go in, views come out.

Axes: `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `C` gates per group.
Everything here is a numpy array, a number or a string, so that a view can be passed between threads,
compared and drawn without touching a tensor of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..attention.rows import ANCHOR, DNA, LOCAL, NOTE, UNSEEN  # noqa: F401 - the codes in `RowView.kind`
from ..attention.selectors.way import Way
from ..attention.settings import Settings


@dataclass(frozen=True)
class LayerView:
    """One layer's attention over one text, computed once at `settings`."""

    layer: int
    settings: Settings
    head_map: np.ndarray  # (T, H) float32 in [0, 1]: see head_map_kind
    head_map_kind: str  # "routing weight" or "attention to other keys than anchors"
    awake: np.ndarray  # (T, H) bool: the head was awake at this token
    kept: np.ndarray  # (T,) bool: the token was not dropped by the keep ratio
    salience: np.ndarray  # (T,) float32
    gate_of_key: np.ndarray  # (T, G) int: the gate that lured each key; -1 for anchors and dropped tokens
    reads: np.ndarray  # (T, H) int: keys and notes read by each row
    error: float  # relative Frobenius error of the layer's attention output (after o_proj) against dense
    latency_ms: float  # measured time of this layer, warm-up excluded
    dense_ms: float  # measured time of fused dense attention on the same tensors
    flops: float  # predicted floating-point operations of this run
    dense_flops: float
    bytes: float  # predicted bytes of keys, values and queries moved
    dense_bytes: float
    budget: dict  # set by alpha and T: shortlist, window, block, anchors, probes, ring, notes, keep_ratio, heads
    backend: str
    backend_reason: str
    device: str
    way: Way = Way()  # who chose the keys, and what was taken away
    looks: float = 0.0  # summaries or keys that a row of another selector compares without reading them, a mean


@dataclass(frozen=True)
class RowView:
    """What one query row (token, head) reads."""

    token: int
    head: int
    kind: np.ndarray  # (T,) uint8, the codes above
    weight: np.ndarray  # (T,) float32, attention weight of each key; a note's weight is divided evenly among its keys
    gates_opened: tuple[int, ...]  # gates this row opened; empty gates are left out
    notes_read: int
    asleep: bool  # the head was asleep or the token was dropped, so nothing was read


@dataclass(frozen=True)
class GateMap:
    """A fixed 2-D projection of one KV group's keys and prototypes (un-rotated, unit norm)."""

    layer: int
    group: int
    keys: np.ndarray  # (T, 2) float32
    prototypes: np.ndarray  # (C, 2) float32
    explained: float  # share of the keys' variance along the two axes, 0..1


@dataclass(frozen=True)
class ModelView:
    """The whole model at `settings`, compared with the dense model on the same tokens."""

    settings: Settings
    layers: tuple[int, ...]  # the layers whose attention was replaced
    nll: float  # mean negative log-likelihood per scored token, nats
    dense_nll: float
    scored_tokens: int
    seconds: float
    dense_seconds: float

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.nll))

    @property
    def dense_perplexity(self) -> float:
        return float(np.exp(self.dense_nll))


@dataclass(frozen=True)
class NextTokens:
    """What the model expects after a token, twice: `before` and `after` a change. The likeliest of both, most first."""

    words: tuple[str, ...]
    before: np.ndarray  # (len(words),) probability
    after: np.ndarray
    kl: float  # KL(before, after) over the whole vocabulary, nats
    names: tuple[str, str]  # what before and after are
