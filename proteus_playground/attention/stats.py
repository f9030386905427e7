"""What a layer's pass did, as figures and maps to show.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Budget
from .functional import AttentionResult
from .routing import Routes


@dataclass(frozen=True)
class AttentionStats:
    """What one forward pass did. Means run over tokens that took part and heads that were awake."""

    flux_alpha: float  # the alpha in force
    keys_per_query: float  # mean reads of a row, notes included
    tokens_kept: int  # tokens that took part, padding excluded
    tokens_seen: int  # tokens that could have, padding excluded
    heads_awake: float  # mean heads awake per token, of n_heads
    backend: str
    backend_reason: str
    budget: Budget
    reads: Tensor  # (B, T, H) int64, 0 for dropped tokens and sleeping heads
    kept: Tensor  # (B, T) bool
    awake: Tensor  # (B, T, H) bool
    head_weights: Tensor  # (B, T, H) float32, 0 asleep
    gate_of_key: Tensor  # (B, T, G) int64, -1 for anchors and dropped tokens

    @property
    def density(self) -> float:
        """Reads done, as a share of those of dense causal attention by every head for every token, padding included."""
        B, T, H = self.reads.shape
        return float(self.reads.sum()) / (B * H * T * (T + 1) / 2)


def stats_of(
    result: AttentionResult, routes: Routes | None, keep: Tensor | None, padding: Tensor | None, budget: Budget
) -> AttentionStats:
    """The stats of a pass over everything that was asked of it. Waits for the device."""
    reads = result.reads
    full = torch.ones(reads.shape[:2], dtype=torch.bool, device=reads.device)
    kept = full if keep is None else keep
    if routes is None:
        awake = kept[..., None].expand_as(reads)
        weight = awake.float()
    else:
        awake = routes.awake.flatten(2) & kept[..., None]
        weight = routes.weight.detach().flatten(2) * awake
        if routes.slot is not None:
            rows = reads.unflatten(2, (routes.slot.shape[2], -1))
            reads = rows.new_zeros(routes.awake.shape).scatter(3, routes.slot, rows).flatten(2)
    rows, tokens = int(awake.sum()), int(kept.sum())
    return AttentionStats(
        flux_alpha=budget.flux_alpha,
        keys_per_query=float(reads.sum()) / max(rows, 1),
        tokens_kept=tokens,
        tokens_seen=int(full.sum() if padding is None else (~padding).sum()),
        heads_awake=rows / max(tokens, 1),
        backend=result.backend,
        backend_reason=result.backend_reason,
        budget=budget,
        reads=reads,
        kept=kept,
        awake=awake,
        head_weights=weight,
        gate_of_key=result.gate_of_key,
    )
