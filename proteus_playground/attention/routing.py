"""Which heads wake for a token, and how loud each is.

A gate's probability mixes a learned router with the prior its prototype gives; a head's is the sum over its
gates; in each KV group heads wake in order of probability until their mass reaches Top-P (nucleus routing).

Axes: `B` batch, `T` tokens, `G` KV groups, `C` gates per group, `r` heads per group, `K` slots for awake heads, `D`
model width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Logits per gate, and a balance bias per head that takes part in the choice only, never in the weight.

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

    @torch.no_grad()
    def observe(self, awake: Tensor, keep: Tensor) -> None:
        """Add the load of a training pass: awake `(B, T, G, r)` bool, keep `(B, T)` bool."""
        self.pending_load += (awake & keep[..., None, None]).sum((0, 1))

    @torch.no_grad()
    def fold(self) -> None:
        """Nudge under-used heads up and over-used heads down by the balance rate; buffers are replaced."""
        load = self.pending_load
        self.balance = self.balance + self.balance_rate * (load.mean(1, keepdim=True) - load).sign()
        self.pending_load = torch.zeros_like(load)


@dataclass(frozen=True)
class Routes:
    """Rows to compute: a slot per head when all may wake, else K slots per group."""

    awake: Tensor  # (B, T, G, r) bool
    weight: Tensor  # (B, T, G, r) float32
    slot: Tensor | None  # (B, T, G, K) head in the group of each slot; None when slots are heads
    real: Tensor  # (B, T, G, K) bool
    logits: Tensor | None  # (B, T, G, C); these two only for a trace
    gate_prob: Tensor | None  # (B, T, G, C)


def is_learning(module: nn.Module) -> bool:
    """Whether a pass may leave what it saw with `module`: in training, and no recomputation in a backward pass."""
    return module.training and torch._C._current_graph_task_id() == -1


def gate_probability(
    logits: Tensor | None, cosine: Tensor, confidence: Tensor, log_share: Tensor, temperature: float, prior_max: float
) -> Tensor:
    """`(1 - b) softmax(logits) + b prior`, `(B, T, G, C)` float32, rows sum to 1.

    The prior is softmax(cosine / temperature) x confidence, renormalised; b = prior_max x the best cosine
    (clipped to [0, 1]). log_share `(G, C)` splits the mass of cloned gates. Dead gates carry cosine -inf and get
    nothing. logits=None: the prior alone.
    """
    dead = cosine == -torch.inf
    prior = (cosine / temperature + log_share).softmax(-1) * confidence
    prior = prior / prior.sum(-1, keepdim=True).clamp(min=1e-9)
    if logits is None:
        return prior
    b = prior_max * cosine.amax(-1, keepdim=True).clamp(0, 1)
    return (1 - b) * (logits.float() + log_share).masked_fill(dead, -torch.inf).softmax(-1) + b * prior


def head_probability(gate_prob: Tensor, head_of_gate: Tensor, heads_per_group: int) -> Tensor:
    """Sum gates' probabilities into their heads: `(B, T, G, C)` -> `(B, T, G, r)`."""
    owner = torch.nn.functional.one_hot(head_of_gate, heads_per_group).to(gate_prob.dtype)  # (G, C, r)
    return torch.einsum("btgc,gcr->btgr", gate_prob, owner)


def wake_heads(
    prob: Tensor, balance: Tensor | None, flux_alpha: float, top_p: float, least: int, most: int
) -> tuple[Tensor, Tensor]:
    """Choose heads by Top-P inside each group and weigh them.

    prob: `(B, T, G, r)`; balance: `(G, r)`, added for the choice only. Returns awake `(B, T, G, r)` bool and
    weight `(B, T, G, r)` float32: `(1 - alpha) + alpha k p`, p renormalised over the k awake heads, 0 asleep. For k = 1
    that is 1 and has no gradient.
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


def prior_route(
    q: Tensor,
    gates,
    budget,
    temperature: float,
    *,
    logits: Tensor | None = None,
    balance: Tensor | None = None,
    prior_max: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Route queries that are in hand: by the prototypes' prior alone, or by a trained router's logits and the prior.

    q: un-rotated queries `(B, T, H, d)`; gates: `Gates`; budget: `Budget` (alpha, Top-P, least and most heads);
    logits: `(B, T, G, C)` and balance: `(G, r)`, both of the router; prior_max: as in `gate_probability`.
    Returns awake `(B, T, H)` bool and weight `(B, T, H)` float32.
    """
    rows = q.unflatten(2, (gates.n_groups, -1))  # (B, T, G, r, d)
    cosine = gates.cosines(rows.mean(3))
    gate = gate_probability(logits, cosine, gates.confidence, gates.log_share, temperature, prior_max)
    prob = head_probability(gate, gates.head_of_gate % rows.shape[3], rows.shape[3])
    awake, weight = wake_heads(
        prob, balance, budget.flux_alpha, budget.head_top_p, budget.heads_awake_min, budget.heads_awake_max
    )
    return awake.flatten(2), weight.flatten(2)
