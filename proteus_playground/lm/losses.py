"""Auxiliary training losses: router z-loss, gate-opening loss, Top-A alignment loss, and match with dense attention.

The first three are computed from `AttentionTrace`. There is no load-balancing loss, because the router's balance bias
balances the load without a gradient.

Axes: `B` batch, `T` tokens, `R` sampled rows, `D` model width, `G` KV groups, `K` slots for awake heads, `d` head dim,
`C` gates per group, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ..attention import AttentionTrace, ProteusAttention, plan_budget
from ..attention.rope import rotate

if TYPE_CHECKING:
    from .model import ProteusLM

ROWS_PER_TEXT = 64  # used by the opening loss
IGNORED = -100  # target of a position that is not scored, as in cross_entropy


def router_z(traces: Sequence[AttentionTrace]) -> Tensor:
    """Mean over layers, tokens and groups of the square of logsumexp(router logits), a scalar; 0 without a router.

    Keeps logits near zero, where softmax is precise and not saturated: the z-loss of ST-MoE (Zoph et al. 2022,
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


def opening(traces: Sequence[AttentionTrace], model: ProteusLM, first: int = 0) -> Tensor:
    """How badly queries predict the gates of the keys they attend to: nats per row and head, a scalar >= 0.

    For about ROWS_PER_TEXT evenly spaced rows per text, from row `first` modulo their distance on, dense attention is
    computed. The attention on keys beyond the window is summed by gate and multiplied by the row's largest such
    attention, so that rows with diffuse attention hardly count. The loss is the cross-entropy between these sums and
    the softmax over q.p. Only queries receive a gradient. Mean over layers; traces must come from a parallel pass. Same
    purpose as the indexer loss of DeepSeek-V3.2 (2025, https://github.com/deepseek-ai/DeepSeek-V3.2-Exp).
    """
    if not traces or traces[0].keys is None:
        raise ValueError("traces: must be of at least one layer's parallel pass, which records queries and keys")
    losses = [_opening(trace, block.attn, first) for trace, block in zip(traces, model.blocks, strict=True)]
    return torch.stack(losses).mean()


def _opening(trace: AttentionTrace, attn: ProteusAttention, first: int) -> Tensor:
    cfg, gates, k = attn.cfg, attn.gates, trace.keys
    T = k.shape[1]
    step = max(1, T // ROWS_PER_TEXT)
    rows = torch.arange(first % step, T, step, device=k.device)
    q, scale = trace.queries[:, rows].float(), cfg.head_dim**-0.5
    with torch.no_grad(), torch.autocast(k.device.type, enabled=False):
        mass, length = _mass_by_gate(q, k.float(), attn, rows, plan_budget(cfg, T, 1.0).window)
        mass = mass * (trace.heads[:, rows] != 0).any(-1)[..., None]  # sleeping heads and dropped tokens open no gate
    with torch.autocast(k.device.type, enabled=False):
        score = torch.einsum("brgkd,gcd->brgkc", q, gates.prototypes) * (scale * length[:, None, None])
        score = score.masked_fill(mass.isnan() | ~gates.alive[:, None], -torch.inf).log_softmax(-1)
        mass = mass.nan_to_num()
        return -(mass * score.masked_fill(mass == 0, 0)).sum() / mass.sum().clamp(min=1e-6)


def _mass_by_gate(q: Tensor, k: Tensor, attn: ProteusAttention, rows: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attention of the rows q `(B, R, G, K, d)` on keys beyond the window, summed by gate.

    Returns the sums `(B, R, G, K, C)`, NaN for gates without such keys, and the mean norm of each group's keys `(G,)`.
    """
    at = torch.arange(k.shape[1], device=k.device)
    gate = attn.gates.lure(k)[0].transpose(1, 2)[:, None, :, None]  # (B, 1, G, 1, T)
    turned = rotate(q.flatten(2, 3), rows, attn.inv_freq).view_as(q)
    score = torch.einsum("brgkd,btgd->brgkt", turned, rotate(k, None, attn.inv_freq)) * q.shape[-1] ** -0.5
    future = (at > rows[:, None])[:, None, None]  # (R, 1, 1, T)
    far = (at < rows[:, None] - window)[:, None, None].expand_as(score)
    weight = score.masked_fill(future, -torch.inf).softmax(-1) * far
    weight = weight * weight.amax(-1, keepdim=True)
    mass = score.new_zeros(*score.shape[:-1], attn.cfg.gates_per_group)
    gate = gate.expand_as(score)
    count = torch.zeros_like(mass).scatter_add_(-1, gate, far.to(mass.dtype))
    return mass.scatter_add_(-1, gate, weight).masked_fill(count == 0, torch.nan), k.norm(dim=-1).mean((0, 1))


def alignment(trace: AttentionTrace, model: ProteusLM, targets: Tensor) -> Tensor:
    """Mean of 1 - cos(consensus of the heads, unembedding row of the target), a scalar in [0, 2]; 0 without targets.

    trace: of the model's last layer. targets: `(B, T)` int64, IGNORED for positions that are not scored. Consensus: see
    `ProteusAttention.consensus`. This trains awake heads for Top-A, which measures the same cosine. The unembedding
    receives a gradient too. Raises `ValueError` for targets of another shape.
    """
    if targets.shape != trace.heads.shape[:2]:
        raise ValueError(f"targets has shape {tuple(targets.shape)}: must be {tuple(trace.heads.shape[:2])}")
    scored = targets != IGNORED
    if trace.awake is not None:
        scored = scored & trace.awake.any(-1)
    rows = model.unembedding()[targets.clamp(min=0)].float()
    gap = 1 - cosine_similarity(model.blocks[-1].attn.consensus(trace), rows, dim=-1)
    return (gap * scored).sum() / scored.sum().clamp(min=1)


@contextmanager
def attention_calls(model: ProteusLM) -> Iterator[list[tuple[ProteusAttention, Tensor, Tensor]]]:
    """The attention layers that run inside the `with`, in order: the layer, its input and its output, `(B, T, D)` each.

    Both are part of the graph. Raises `ValueError` in a pass with positions or padding. Not for activation
    checkpointing, in which the first pass keeps no graph.
    """
    calls = []

    def keep(attn: ProteusAttention, inputs: tuple, how: dict, output) -> None:
        given = [name for name in ("positions", "key_padding_mask") if how.get(name) is not None]
        if given:
            raise ValueError(f"{given[0]} is given: must be None where a layer is compared with dense attention")
        calls.append((attn, inputs[0], output if isinstance(output, Tensor) else output[0]))

    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.attn.register_forward_hook(keep, with_kwargs=True).remove)
        yield calls


def dense_match(calls: Sequence[tuple[ProteusAttention, Tensor, Tensor]]) -> Tensor:
    """Squared distance of each layer's output to dense attention over the same input, over the square of the latter.

    Mean over layers, a scalar >= 0. Both outputs receive a gradient, so sparse and dense attention move towards each
    other, as in SSA (2025, https://arxiv.org/abs/2511.20102). Dense attention wakes all heads, so in a routed layer the
    distance holds what sleeping heads leave out. calls: see `attention_calls`; `ValueError` for none.
    """
    if not calls:
        raise ValueError("calls=[]: must hold at least one layer's call")
    return torch.stack([relative_square(y, _densely(attn, h)) for attn, h, y in calls]).mean()


def relative_square(got: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of two tensors of one shape over the square of `wanted`, which counts as a constant there."""
    got, wanted = got.float(), wanted.float()
    return (got - wanted).square().sum() / wanted.detach().square().sum().clamp(min=1e-12)


def _densely(attn: ProteusAttention, h: Tensor) -> Tensor:
    """The layer at alpha 0. In evaluation mode, so that its prototypes do not see these keys a second time."""
    was_training = attn.training
    try:
        with attn.eval().settings(flux_alpha=0.0):
            return attn(h)
    finally:
        attn.train(was_training)
