"""Attention layers with random weights over whole words, shown while no model is pulled.

Queries and keys share half of their projection, so that equal words attract each other. Nothing was learned.

Axes: `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `D` model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.adapter import dense_attention
from ..attention.captured import CapturedLayer, half
from ..attention.rope import rope_frequencies
from ..attention.settings import LayerShape
from ..common.texts import WORD, word_hash

VOCABULARY = 8192  # embeddings; a word is hashed to one of them


class RandomSource:
    """A `Source` of two layers with 8 heads and 2 KV groups of 32 features; a seed gives the same on every machine."""

    name, random, shape = "random layer", True, LayerShape(n_heads=8, n_groups=2, head_dim=32)
    n_layers, width, context = 2, 256, None
    full_layers = (0, 1)
    own_gates, routers, gates_from = {}, {}, ""  # nothing was trained
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, seed: int = 0):
        gen = torch.Generator().manual_seed(seed)
        H, G, d, D = self.shape.n_heads, self.shape.n_groups, self.shape.head_dim, self.width
        self.fingerprint = f"random-{seed}"
        self._embedding = torch.randn(VOCABULARY, D, generator=gen)
        self._layers = []
        for _ in range(self.n_layers):
            key, value, difference = (torch.randn(n, d, D, generator=gen) * D**-0.5 for n in (G, G, H))
            query = 1.5 * (key.repeat_interleave(H // G, dim=0) + difference)
            self._layers.append((query, key, value, torch.randn(D, H * d, generator=gen) * (H * d) ** -0.5))

    def encode(self, body: str) -> list[str]:
        """The words and signs of `body`, each with the space before it."""
        return WORD.findall(body)

    def ids(self, words: list[str]) -> Tensor:
        """Word numbers `(T,)`; equal words get equal numbers, whatever their case."""
        return torch.tensor([word_hash(word) % VOCABULARY for word in words])

    def strings(self, words: list[str]) -> list[str]:
        return words

    def project(self, layer: int, out: Tensor) -> Tensor:
        """o_proj: `(T, H d)` -> `(T, D)`."""
        return F.linear(out, self._layers[layer][3])

    def capture(
        self, ids: Tensor, *, keys_only: bool = False, before_layer: Callable[[int], None] | None = None
    ) -> dict[int, CapturedLayer]:
        """Queries, keys and values of `ids` `(T,)` in each layer; its output plus its input goes to the next layer."""
        x, found = self._embedding[ids], {}
        inv_freq, scale = rope_frequencies(self.shape.head_dim, 10_000.0), self.shape.head_dim**-0.5
        at = torch.arange(len(ids))[None]
        for layer, weights in enumerate(self._layers):
            if before_layer is not None:
                before_layer(layer)
            unit = x * x.square().mean(-1, keepdim=True).rsqrt()
            q, k, v = (torch.einsum("td,nhd->tnh", unit, weight) for weight in weights[:3])
            out = self.project(layer, dense_attention(q[None], k[None], v[None], inv_freq, at, scale)[0].flatten(1))
            x = x + out
            recorded = (None, half(k), None, None) if keys_only else map(half, (q, k, v, out))
            found[layer] = CapturedLayer(*recorded, inv_freq, scale)
        return found

    def next_logits(self, *_, **__):
        raise ValueError("model='random layer': random weights predict nothing; pull a model to see the next token")

    def nll(self, *_, **__):
        raise ValueError("model='random layer': random weights predict nothing; pull a model to run the whole model")
