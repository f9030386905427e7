"""What a training step may add to cross-entropy: small routers, and heads that point at the word that comes.

Both read `AttentionTrace`. Load balance is no loss: a router's balance bias sees to it, outside the gradient.

Axes: `B` batch, `T` tokens, `D` model width, `G` KV groups, `C` gates per group, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .attention import AttentionTrace

if TYPE_CHECKING:
    from .model import ProteusLM

IGNORED = -100  # a target that is not scored, as in cross_entropy


def router_z(traces: Sequence[AttentionTrace]) -> Tensor:
    """Mean over layers, tokens and groups of the square of logsumexp(router logits), a scalar; 0 without a router.

    Keeps logits near zero, where softmax is precise and not yet decided: the z-loss of ST-MoE (Zoph et al. 2022,
    https://arxiv.org/abs/2202.08906). Dropped tokens and padding do not count.
    """
    if not traces:
        raise ValueError("traces=(): must hold at least one AttentionTrace")
    layers = [_z(trace) for trace in traces if trace.router_logits is not None]
    return torch.stack(layers).mean() if layers else traces[0].heads.new_zeros((), dtype=torch.float32)


def _z(trace: AttentionTrace) -> Tensor:
    square = trace.router_logits.float().logsumexp(-1).square().mean(-1)  # (B, T)
    counts = trace.awake.any(-1)
    return (square * counts).sum() / counts.sum().clamp(min=1)


def alignment(trace: AttentionTrace, model: ProteusLM, targets: Tensor) -> Tensor:
    """Mean of 1 - cos(the heads' consensus, the target's unembedding row), a scalar in [0, 2]; 0 where none is scored.

    trace: of the model's last layer; targets: `(B, T)` int64, -100 not scored. Consensus: see
    `ProteusAttention.consensus`. It teaches awake heads to point where Top-A looks. Gradient reaches the unembedding
    too. Raises `ValueError` for targets of another shape.
    """
    if targets.shape != trace.heads.shape[:2]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}: must be {tuple(trace.heads.shape[:2])}")
    scored = targets != IGNORED
    if trace.awake is not None:
        scored = scored & trace.awake.any(-1)
    rows = model.unembedding()[targets.clamp(min=0)].float()
    gap = 1 - cosine_similarity(model.blocks[-1].attn.consensus(trace), rows, dim=-1)
    return (gap * scored).sum() / scored.sum().clamp(min=1)
