"""Which heads wake for a token, and the weight of each head's output.

A gate's probability mixes a learned router with a prior that the gate's prototype gives. A head's probability is the
sum over its gates. In each KV group heads wake in order of probability until their mass reaches Top-P (nucleus
routing).

Axes: `B` batch, `T` tokens, `G` KV groups, `C` gates per group, `r` heads per group, `D` model width, `d` head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .precision import Float32Buffers, at_least_float32
from .transforms import records, without_grad

if TYPE_CHECKING:
    from .config import AttentionConfig
    from .gates import Gates


class Router(Float32Buffers):
    """Logits per gate, and a balance bias per head that takes part in the choice of heads only, never in their weights.

    The bias follows the loss-free balancing of Wang et al. 2024, https://arxiv.org/abs/2408.15664.
    """

    def __init__(self, n_groups: int, gates_per_group: int, heads_per_group: int, d_model: int, balance_rate: float):
        super().__init__()
        self.balance_rate = balance_rate
        self.weight = nn.Parameter(torch.randn(n_groups, gates_per_group, d_model) * d_model**-0.5)
        self.register_buffer("balance", torch.zeros(n_groups, heads_per_group))
        self.register_buffer("pending_load", torch.zeros(n_groups, heads_per_group))

    def forward(self, x: Tensor) -> Tensor:
        """Gate logits: `(B, T, D)` -> `(B, T, G, C)`."""
        return torch.einsum("btd,gcd->btgc", x, self.weight.to(x.dtype))

    @records
    @without_grad
    def observe(self, awake: Tensor, keep: Tensor) -> None:
        """Add the load of a training pass: awake `(B, T, G, r)` bool, keep `(B, T)` bool."""
        self.pending_load = self.pending_load + (awake & keep[..., None, None]).sum((0, 1))

    @records
    @without_grad
    def fold(self) -> None:
        """Raise the bias of under-used heads and lower that of over-used ones by the balance rate.

        Buffers are replaced, never written in place: a backward pass may still need the old ones.
        """
        load = self.pending_load
        self.balance = self.balance + self.balance_rate * (load.mean(1, keepdim=True) - load).sign()
        self.pending_load = torch.zeros_like(load)


def is_learning(module: nn.Module) -> bool:
    """Whether `module` should record what this pass sees: in training, but not when checkpointing recomputes a pass.

    A compiler cannot tell: there `records` decides when the graph runs.
    """
    return module.training and (torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1)


def route(
    query: Tensor,
    gates: Gates,
    cfg: AttentionConfig,
    heads_per_group: int,
    *,
    logits: Tensor | None,
    balance: Tensor | None,
    flux_alpha: float,
    top_p: float,
    least: int,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Wake heads for every token and weigh them.

    query: `(B, T, G, d)`, compared with the prototypes for the prior. cfg: its prior_temperature and prior_max.
    logits: `(B, T, G, C)` from the router; None uses the prior alone. The rest is as in `wake_heads`.
    Returns awake `(B, T, G, r)` bool, weight `(B, T, G, r)` float32, and the gates' probabilities `(B, T, G, C)`.
    """
    cosine = gates.cosines(query)
    gate_prob = gate_probability(
        logits, cosine, gates.confidence, gates.log_share, cfg.prior_temperature, cfg.prior_max
    )
    head_of_gate = gates.head_of_gate % heads_per_group  # gates fitted for a wider layer serve a narrower one too
    head_prob = head_probability(gate_prob, head_of_gate, heads_per_group)
    awake, weight = wake_heads(head_prob, balance, flux_alpha, top_p, least, most)
    return awake, weight, gate_prob


def gate_probability(
    logits: Tensor | None, cosine: Tensor, confidence: Tensor, log_share: Tensor, temperature: float, prior_max: float
) -> Tensor:
    """`(1 - b) softmax(logits) + b prior`, `(B, T, G, C)` float32, rows sum to 1.

    The prior is softmax(cosine / temperature) x confidence, renormalised; b = prior_max x the best cosine
    (clipped to [0, 1]). log_share `(G, C)` splits the mass of cloned gates. Dead gates have cosine -inf and get
    probability 0. logits=None: the prior alone.
    """
    dead = cosine == -torch.inf
    prior = (cosine / temperature + log_share).softmax(-1) * confidence
    prior = prior / prior.sum(-1, keepdim=True).clamp(min=1e-9)
    if logits is None:
        return prior
    b = prior_max * cosine.amax(-1, keepdim=True).clamp(0, 1)
    return (1 - b) * (at_least_float32(logits) + log_share).masked_fill(dead, -torch.inf).softmax(-1) + b * prior


def head_probability(gate_prob: Tensor, head_of_gate: Tensor, heads_per_group: int) -> Tensor:
    """Sum gates' probabilities into their heads: `(B, T, G, C)` -> `(B, T, G, r)`."""
    heads = torch.arange(heads_per_group, device=head_of_gate.device)
    owner = (head_of_gate[..., None] == heads).to(gate_prob.dtype)  # (G, C, r)
    return torch.einsum("btgc,gcr->btgr", gate_prob, owner)


def wake_heads(
    prob: Tensor, balance: Tensor | None, flux_alpha: float, top_p: float, least: int, most: int
) -> tuple[Tensor, Tensor]:
    """Choose heads by Top-P inside each group and weigh them.

    prob: `(B, T, G, r)`; balance: `(G, r)`, added for the choice only; least, most: heads to wake per token and group.
    Returns awake `(B, T, G, r)` bool and weight `(B, T, G, r)` float32: `(1 - alpha) + alpha k p`, where p is
    renormalised over the k awake heads; 0 for sleeping heads. For k = 1 the weight is 1 and has no gradient.
    """
    if top_p >= 1 and most >= prob.shape[-1]:
        awake = torch.ones_like(prob, dtype=torch.bool)
        share = prob / prob.sum(-1, keepdim=True).clamp(min=1e-9)
        return awake, (1 - flux_alpha) + flux_alpha * prob.shape[-1] * share
    score = prob.detach() if balance is None else prob.detach() + balance
    order = score.argsort(dim=-1, descending=True, stable=True)
    ranked = prob.detach().gather(-1, order)
    rank = torch.arange(prob.shape[-1], device=prob.device)
    enough = torch.zeros_like(ranked, dtype=torch.bool) if top_p >= 1 else ranked.cumsum(-1) - ranked >= top_p
    chosen = (rank < least) | (~enough & (rank < most))
    awake = torch.zeros_like(chosen).scatter_(-1, order, chosen)
    share = prob * awake
    share = share / share.sum(-1, keepdim=True).clamp(min=1e-9)
    weight = (1 - flux_alpha) + flux_alpha * awake.sum(-1, keepdim=True) * share
    return awake, weight * awake
