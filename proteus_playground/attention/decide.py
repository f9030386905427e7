"""A layer's decisions: which tokens take part, which heads each token wakes, and the weights of heads' outputs.

Every way to run the layer uses these functions: `ProteusAttention` over a whole text and token by token, `ProteusLayer`
inside other people's models (this is what the playground's sliders move), and the KV banks of a `ProteusCache`. The
decision about a token depends on that token alone, so it is the same in all of them.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `C` gates per group, `d` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .budget import Budget
from .config import AttentionConfig
from .gates import Gates
from .routing import route


@dataclass(frozen=True)
class TokenDecisions:
    """What was decided about every token. None means all: all tokens take part, all heads are awake with weight 1."""

    budget: Budget
    keep: Tensor | None  # (B, T) bool
    awake: Tensor | None = None  # (B, T, H) bool
    weight: Tensor | None = None  # (B, T, H) float32, 0 for sleeping heads
    logits: Tensor | None = None  # (B, T, G, C) of the router; this and gate_prob are kept for a trace only
    gate_prob: Tensor | None = None  # (B, T, G, C) float32


def decide(
    cfg: AttentionConfig,
    gates: Gates,
    budget: Budget,
    k: Tensor,
    query: Tensor | None,
    *,
    logits: Tensor | None = None,
    balance: Tensor | None = None,
    real: Tensor | None = None,
    before: Tensor | None = None,
    training: bool = False,
    traced: bool = False,
) -> TokenDecisions:
    """Decide which tokens take part, which heads they wake, and with what weight.

    k: un-rotated keys `(B, T, G, d)`. query: `(B, T, G, d)`, the mean over each group's heads, un-rotated; None wakes
    every head. logits: `(B, T, G, C)` and balance: `(G, r)`, both of the router; without logits the prototypes' prior
    alone chooses heads. real, before, training: as in `kept_tokens`. traced: keep logits and gate probabilities.
    """
    keep = kept_tokens(cfg, gates, budget, k, real=real, before=before, training=training)
    if query is None:
        return TokenDecisions(budget, keep)
    if real is not None:  # padding may hold any value, NaN included
        query = query.masked_fill(~real[..., None, None], 0)
        logits = None if logits is None else logits.masked_fill(~real[..., None, None], 0)
    awake, weight, gate_prob = route(
        query,
        gates,
        cfg,
        cfg.heads_per_group,
        logits=logits,
        balance=balance,
        flux_alpha=budget.flux_alpha,
        top_p=budget.head_top_p,
        least=budget.heads_awake_min,
        most=budget.heads_awake_max,
    )
    for_trace = (logits, gate_prob) if traced else (None, None)  # these are large: do not hold them while attending
    return TokenDecisions(budget, keep, awake.flatten(2), weight.flatten(2), *for_trace)


def kept_tokens(
    cfg: AttentionConfig,
    gates: Gates,
    budget: Budget,
    k: Tensor,
    *,
    real: Tensor | None = None,
    before: Tensor | None = None,
    training: bool = False,
) -> Tensor | None:
    """Tokens that take part, `(B, T)` bool; None for all. The first tokens (anchors) always do.

    real: `(B, T)` bool, False at padding. before: `(B,)`, tokens already kept of the sequences that these continue.
    training: keep everything as long as no salience has been measured, which is so in a layer's first training pass.
    """
    return gates.keep_tokens(k, budget.keep_ratio, cfg.n_anchors, real, before, training)


def weigh(out: Tensor, weight: Tensor | None) -> Tensor:
    """Multiply heads' outputs `(..., d)` by their routing weights `(...)`; sleeping heads become 0. None: weight 1."""
    return out if weight is None else out * weight[..., None].to(out.dtype)
