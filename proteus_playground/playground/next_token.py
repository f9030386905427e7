"""Probabilities of the token after a chosen one, whose row reads as the controls say in every layer.

The earlier tokens were read densely, as when a prompt is read densely and the answer is written sparsely. So only one
row is computed in each layer, against the recorded keys and values of the tokens before it, which takes milliseconds.

Axes: `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.adapter import ProteusLayer
from ..attention.captured import CapturedLayer
from ..attention.rope import rotate
from ..attention.selectors.seen import Seeing
from ..attention.selectors.way import Way
from ..common.progress import Stop, check_stop
from .source import Source
from .views import NextTokens

TAIL = 8  # tokens that are embedded together: a model may mix the embeddings of neighbours before its first layer
BARS = 10


def next_logprobs(
    source: Source, captured: Mapping[int, CapturedLayer], ids: Tensor, token: int,
    runners: Mapping[int, ProteusLayer] | None, way: Way, stop: Stop | None = None,
) -> np.ndarray:  # fmt: skip
    """`(V,)` float32. captured: of the dense pass over `ids` `(T,)`. runners: of each layer; None for dense rows."""

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, logits: Tensor | None) -> Tensor:
        check_stop(stop)
        past = captured[layer]
        pairs = ((past.q, q), (past.k, k), (past.v, v))
        q_all, k_all, v_all = (torch.cat((old[:token].to(x.device, x.dtype), x[-1:]))[None] for old, x in pairs)
        inv_freq = None if past.inv_freq is None else past.inv_freq.to(q.device)
        out = torch.zeros_like(q)
        if runners is None:
            out[-1] = _dense_row(q_all, k_all, v_all, inv_freq, past.scale)
            return out
        routed = past.logits is not None and logits is not None
        known = torch.cat((past.logits[:token].to(logits.device, logits.dtype), logits[-1:]))[None] if routed else None
        seeing = Seeing(way, layer, runners[layer], q_all, k_all, v_all, inv_freq=inv_freq, scale=past.scale,
                        logits=known)  # fmt: skip
        row = (seeing.at == token).nonzero()[:, 0]
        if len(row):
            out[-1] = seeing.finish(seeing.see(row).out.transpose(1, 2), row)[0, 0]
        return out

    logits = source.next_logits(ids[max(0, token + 1 - TAIL) : token + 1], look)
    return logits.float().log_softmax(-1).cpu().numpy()


def _dense_row(q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor | None, scale: float) -> Tensor:
    """The last row of dense attention, `(H, d)`."""
    at = torch.arange(k.shape[1], device=k.device)
    q, k = rotate(q, at, inv_freq)[:, -1:], rotate(k, at, inv_freq)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[0, :, 0]


def compare(
    before: np.ndarray, after: np.ndarray, words_of: Callable[[list[int]], list[str]], names: tuple[str, str]
) -> NextTokens:
    """The `BARS` likeliest tokens of two log-probabilities `(V,)`, the likeliest of the first ones first."""
    top = np.argsort(-np.maximum(before, after))[:BARS]
    top = top[np.argsort(-before[top])]
    p = np.exp(before.astype(np.float64))
    kl = float((p * (before.astype(np.float64) - after)).sum())
    return NextTokens(tuple(words_of(top.tolist())), np.exp(before[top]), np.exp(after[top]), max(0.0, kl), names)
