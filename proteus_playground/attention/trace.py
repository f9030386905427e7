"""What a layer's pass computed on its way, as part of the graph: for losses and for Top-A.

Axes: `B` batch, `T` tokens, `D` model width, `H` query heads, `G` KV groups, `r` heads per group, `K` slots for awake
heads, `d` head dim, `C` gates per group.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .gates import Gates
from .routing import Routes


@dataclass(frozen=True)
class AttentionTrace:
    """What a pass computed on its way, part of the graph: for losses and for Top-A. Zero for dropped tokens.

    Routing is None in a layer without a router, where every head is awake at weight 1; queries and keys are None
    one token at a time.
    """

    router_logits: Tensor | None  # (B, T, G, C) float32, as they enter the softmax: -inf for a pruned gate
    gate_prob: Tensor | None  # (B, T, G, C) float32, router and prior mixed; rows sum to 1
    heads: Tensor  # (B, T, G, K, d) weighted outputs of heads before o_proj, zero where a slot is empty
    slot: Tensor | None  # (B, T, G, K) int64, head in the group of each slot; None when slots are heads (K = r)
    awake: Tensor | None  # (B, T, H) bool
    weight: Tensor | None  # (B, T, H) float32, 0 asleep
    queries: Tensor | None = None  # (B, T, G, K, d) un-rotated, of the heads in the slots
    keys: Tensor | None = None  # (B, T, G, d) un-rotated

    def last(self) -> AttentionTrace:
        """The same of the last token alone, T = 1."""
        parts = (getattr(self, part.name) for part in fields(self))
        return AttentionTrace(*(None if x is None else x[:, -1:] for x in parts))

    def contributions(self, o_proj: Tensor) -> Tensor:
        """`ProteusAttention.head_contributions`, from the weight of o_proj `(D, H d)`."""
        G, d = self.heads.shape[2], self.heads.shape[4]
        weight = o_proj.T.unflatten(0, (G, -1, d)).to(self.heads.dtype)  # (G, r, d, D)
        if self.slot is None:
            return torch.einsum("btgkd,gkdm->btgkm", self.heads, weight).flatten(2, 3)
        mine = F.one_hot(self.slot, weight.shape[1]).to(self.heads.dtype)  # (B, T, G, K, r)
        spread = (mine[..., None] * self.heads[..., None, :]).flatten(4)  # (B, T, G, K, r d)
        return torch.einsum("btgkn,gnm->btgkm", spread, weight.flatten(1, 2)).flatten(2, 3)

    def consensus(self, o_proj: Tensor) -> Tensor:
        """`ProteusAttention.consensus`, from the weight of o_proj `(D, H d)`."""
        direction = F.normalize(self.contributions(o_proj).float(), dim=-1, eps=1e-6)
        if self.weight is None:
            return direction.mean(2)
        weight = self.weight
        if self.slot is not None:
            weight = weight.unflatten(2, (self.slot.shape[2], -1)).gather(-1, self.slot).flatten(2)
        return (weight[..., None] * direction).sum(2) / weight.sum(2, keepdim=True).clamp(min=1e-9)


def trace_of(
    heads: Tensor,
    routes: Routes | None,
    keep: Tensor | None,
    gates: Gates,
    q: Tensor | None = None,
    k: Tensor | None = None,
) -> AttentionTrace:
    """The trace of weighted heads `(B, T, G, K, d)`; keep `(B, T)` bool or None; q `(B, T, G K, d)`, k un-rotated."""
    q = None if q is None else q.unflatten(2, heads.shape[2:4])
    if routes is None:
        return AttentionTrace(None, None, heads, None, None, None, q, k)
    awake, weight = routes.awake.flatten(2), routes.weight.flatten(2)
    if keep is not None:
        awake, weight = awake & keep[..., None], weight * keep[..., None]
    logits = (routes.logits.float() + gates.log_share).masked_fill(~gates.alive, -torch.inf)
    return AttentionTrace(logits, routes.gate_prob, heads, routes.slot, awake, weight, q, k)
