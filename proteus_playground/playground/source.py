"""What the playground needs of a model: the `Source` protocol.

`RandomSource`, `ShelfSource` and `hf.source.ModelSource` implement it; `LayerProbe` takes any of them.

Axes: `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `D` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from ..attention.adapter import ProteusLayer
from ..attention.calibration import KeySource

Look = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Source(KeySource, Protocol):
    """A model and its tokenizer. Its weights are never changed, and it works in evaluation mode.

    From `KeySource`: `name`, `fingerprint`, `shape`, `n_layers`, `device`, `own_gates`, `gates_from`, `encode`, `ids`,
    `capture`.
    """

    random: bool  # whether the weights are random, so that nothing was learned
    width: int  # D
    context: int | None  # the longest text, in tokens; None sets no limit
    full_layers: tuple[int, ...]  # layers that attend to the whole past, not to a sliding window
    routers: Mapping[int, nn.Module]  # layer -> its trained head router, for layers that have one
    dtype: torch.dtype  # in which a layer is run again

    def strings(self, tokens: list) -> list[str]:
        """The text of each token on its own, for tokens as `encode` returns them."""

    def project(self, layer: int, out: Tensor) -> Tensor:
        """The layer's output projection: concatenated head outputs `(T, H d)` -> `(T, D)`."""

    def next_logits(self, ids: Tensor, look: Look) -> Tensor:
        """Logits `(V,)` of the token after `ids`, the last few tokens of a text.

        look: called in place of each layer's attention as look(layer, q, k, v, logits): un-rotated `(n, heads, d)` and
        the router's logits `(n, G, C)` or None, for these n tokens; returns the heads' outputs `(n, H, d)`.
        """

    def nll(
        self,
        ids: Tensor,
        first: int,
        layers: Mapping[int, ProteusLayer],
        before_layer: Callable[[int], None] | None = None,
    ) -> float:
        """Mean negative log-likelihood, nats per token, of tokens `first` .. T-1 of `ids` `(T,)` given their past.

        layers: index -> what runs in place of that layer's attention; all other layers are dense. before_layer is
        called with each layer's index before it runs and may raise. Raises `ValueError` for random weights.
        """
