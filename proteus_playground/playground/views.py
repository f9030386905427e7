"""What the playground asks for and what it is shown: plain data between the probe and the widgets.

Axes: `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `C` gates per group.
Everything here is a numpy array, a number or a string, so that a view can cross a thread, be
compared, and be drawn without touching a live tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..attention.settings import Settings

# How a key reaches a query row. The numbers are the codes in `RowView.kind`.
UNSEEN, LOCAL, ANCHOR, DNA, NOTE = 0, 1, 2, 3, 4
KIND_NAMES = ("unseen", "local", "anchor", "DNA", "note")


@dataclass(frozen=True)
class LayerView:
    """One layer of one text, run once at `settings`."""

    layer: int
    settings: Settings
    head_map: np.ndarray  # (T, H) float32 in [0, 1]: see head_map_kind
    head_map_kind: str  # "routing weight" or "attention off the anchors"
    awake: np.ndarray  # (T, H) bool: the head computed a row for this token
    kept: np.ndarray  # (T,) bool: the token took part
    salience: np.ndarray  # (T,) float32
    gate_of_key: np.ndarray  # (T, G) int: the gate each key was lured to; -1 for anchors and dropped tokens
    reads: np.ndarray  # (T, H) int: keys and notes read by each row
    error: float  # relative Frobenius error of the layer's attention output (after o_proj) against dense
    latency_ms: float  # this run, measured, warm-up excluded
    dense_ms: float  # fused dense attention on the same tensors, measured once per layer
    flops: float  # predicted floating-point operations of this run
    dense_flops: float
    bytes: float  # predicted bytes of keys, values and queries moved
    dense_bytes: float
    budget: dict  # what alpha and T came to: shortlist, window, block, anchors, probes, ring, notes, keep_ratio, heads
    backend: str
    backend_reason: str
    device: str


@dataclass(frozen=True)
class RowView:
    """What one query row (token, head) sees."""

    token: int
    head: int
    kind: np.ndarray  # (T,) uint8, the codes above
    weight: np.ndarray  # (T,) float32, attention each key gets; a note's is shared evenly by its members
    gates_opened: tuple[int, ...]  # gates this row probed (never an empty one)
    notes_read: int
    asleep: bool  # the head slept or the token was dropped: nothing was read


@dataclass(frozen=True)
class GateMap:
    """A fixed 2-D projection of one KV group's keys and prototypes (un-rotated, unit norm)."""

    layer: int
    group: int
    keys: np.ndarray  # (T, 2) float32
    prototypes: np.ndarray  # (C, 2) float32
    explained: float  # share of the keys' variance that the two axes hold, 0..1


@dataclass(frozen=True)
class ModelView:
    """The whole model at `settings` beside itself, dense, on the same tokens."""

    settings: Settings
    layers: tuple[int, ...]  # the layers that ran through Proteus
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
