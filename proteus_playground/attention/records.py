"""What one pass of a layer did: figures and maps to show (`AttentionStats`), tensors for losses (`AttentionTrace`).

Axes: `B` batch, `T` tokens, `D` model width, `H` query heads, `G` KV groups, `r` heads per group, `K` slots for awake
heads, `d` head dim, `C` gates per group.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import Budget
from .decide import TokenDecisions
from .functional import AttentionResult
from .gates import Gates
from .heads import HeadRows


@dataclass(frozen=True)
class AttentionStats:
    """Figures and maps of one pass. Means are over the tokens that took part and the heads that were awake."""

    flux_alpha: float  # in [0, 1], as used in this pass
    keys_per_query: float  # mean reads of a row, notes included
    tokens_kept: int  # tokens that took part, padding excluded
    tokens_seen: int  # all tokens, padding excluded
    heads_awake: float  # mean heads awake per token, of n_heads
    backend: str
    backend_reason: str
    budget: Budget
    reads: Tensor  # (B, T, H) int64, 0 for dropped tokens and sleeping heads
    kept: Tensor  # (B, T) bool
    awake: Tensor  # (B, T, H) bool
    head_weights: Tensor  # (B, T, H) float32, 0 for sleeping heads
    gate_of_key: Tensor  # (B, T, G) int64, -1 for anchors and dropped tokens

    @property
    def density(self) -> float:
        """Reads done, as a share of those of dense causal attention by every head for every token, padding included."""
        B, T, H = self.reads.shape
        return float(self.reads.sum()) / (B * H * T * (T + 1) / 2)


@dataclass(frozen=True)
class AttentionTrace:
    """Tensors of one pass, still part of the graph: for losses and for Top-A. Zero for dropped tokens.

    In a layer without a router, where every head is awake with weight 1, the routing fields are None. While decoding,
    queries and keys are None.
    """

    router_logits: Tensor | None  # (B, T, G, C) float32, as they enter the softmax: -inf for a pruned gate
    gate_prob: Tensor | None  # (B, T, G, C) float32, router and prior mixed; rows sum to 1
    heads: Tensor  # (B, T, G, K, d) weighted outputs of heads before o_proj, zero where a slot is empty
    slot: Tensor | None  # (B, T, G, K) int64, head in the group of each slot; None when slots are heads (K = r)
    awake: Tensor | None  # (B, T, H) bool
    weight: Tensor | None  # (B, T, H) float32, 0 for sleeping heads
    queries: Tensor | None = None  # (B, T, G, K, d) un-rotated, of the heads in the slots
    keys: Tensor | None = None  # (B, T, G, d) un-rotated

    def last(self) -> AttentionTrace:
        """The trace of the last token alone, T = 1."""
        parts = (getattr(self, part.name) for part in fields(self))
        return AttentionTrace(*(None if x is None else x[:, -1:] for x in parts))

    def contributions(self, o_proj: Tensor) -> Tensor:
        """`ProteusAttention.head_contributions`, from the weight of o_proj `(D, H d)`."""
        G, d = self.heads.shape[2], self.heads.shape[4]
        weight = o_proj.T.unflatten(0, (G, -1, d)).to(self.heads.dtype)  # (G, r, d, D)
        if self.slot is None:
            return torch.einsum("btgkd,gkdm->btgkm", self.heads, weight).flatten(2, 3)
        head_of_slot = F.one_hot(self.slot, weight.shape[1]).to(self.heads.dtype)  # (B, T, G, K, r)
        spread = (head_of_slot[..., None] * self.heads[..., None, :]).flatten(4)  # (B, T, G, K, r d)
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


@dataclass(frozen=True)
class LayerOutput:
    """A pass's output, and its records where they were asked for."""

    y: Tensor  # (B, T, D)
    stats: AttentionStats | None = None
    trace: AttentionTrace | None = None

    def unwrap(self) -> Tensor | tuple:
        """y alone, or (y, stats), (y, trace) or (y, stats, trace): the records that are not None."""
        records = tuple(record for record in (self.stats, self.trace) if record is not None)
        return (self.y, *records) if records else self.y


def stats_of(
    result: AttentionResult, decisions: TokenDecisions, rows: HeadRows, padding: Tensor | None
) -> AttentionStats:
    """The stats of a pass; result: with `explain`. Waits for the device."""
    reads, budget = result.reads, decisions.budget
    every_token = torch.ones(reads.shape[:2], dtype=torch.bool, device=reads.device)
    kept = every_token if decisions.keep is None else decisions.keep
    if decisions.awake is None:
        awake = kept[..., None].expand_as(reads)
        weight = awake.float()
    else:
        awake = decisions.awake & kept[..., None]
        weight = decisions.weight.detach() * awake
        if rows.slot is not None:
            per_slot = reads.unflatten(2, (rows.slot.shape[2], -1))
            per_head = awake.unflatten(2, (rows.slot.shape[2], -1))
            reads = per_slot.new_zeros(per_head.shape).scatter(3, rows.slot, per_slot).flatten(2)
    n_rows, tokens = int(awake.sum()), int(kept.sum())
    return AttentionStats(
        flux_alpha=budget.flux_alpha,
        keys_per_query=float(reads.sum()) / max(n_rows, 1),
        tokens_kept=tokens,
        tokens_seen=int(every_token.sum() if padding is None else (~padding).sum()),
        heads_awake=n_rows / max(tokens, 1),
        backend=result.backend,
        backend_reason=result.backend_reason,
        budget=budget,
        reads=reads,
        kept=kept,
        awake=awake,
        head_weights=weight,
        gate_of_key=result.gate_of_key,
    )


def trace_of(
    heads: Tensor,
    decisions: TokenDecisions,
    rows: HeadRows,
    gates: Gates,
    q: Tensor | None = None,
    k: Tensor | None = None,
) -> AttentionTrace:
    """The trace of weighted heads `(B, T, G, K, d)`; decisions: traced; q `(B, T, G K, d)` and k un-rotated."""
    q = None if q is None else q.unflatten(2, heads.shape[2:4])
    if decisions.awake is None:
        return AttentionTrace(None, None, heads, None, None, None, q, k)
    awake, weight, keep = decisions.awake, decisions.weight, decisions.keep
    if keep is not None:
        awake, weight = awake & keep[..., None], weight * keep[..., None]
    logits = (decisions.logits.float() + gates.log_share).masked_fill(~gates.alive, -torch.inf)
    return AttentionTrace(logits, decisions.gate_prob, heads, rows.slot, awake, weight, q, k)
