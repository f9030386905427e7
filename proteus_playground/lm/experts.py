"""A mixture of experts with the gates of the attention layer: prototypes and a router choose the experts of a token.

Axes: `B` batch, `T` tokens, `D` model width, `N` experts, `K` slots for awake experts, `F` features inside an expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import AttentionConfig, Gates
from ..attention.heads import pick_awake, project_in, project_out
from ..attention.routing import Router, is_learning, route


class Experts(nn.Module):
    """A mixture of N gated MLPs (SwiGLU) of which each token wakes at most K: `(B, T, D)` -> `(B, T, D)`.

    Experts are woken and weighted like heads at flux alpha 1, whatever alpha is: by Top-P, at least one, with the
    balance bias in the choice only. At K = 1 the weight is 1, so the router receives no gradient. Prototypes are
    vectors in the space of x. In training they follow x, padding included, one forward pass later. The choice for a
    token depends on that token alone, so decoding uses the same function.

    cfg: gates_per_group (at least N gates are made), prior, balance_rate and ema_decay are used. hidden: F. awake: K.
    top_p: probability mass at which waking stops, in (0, 1].
    """

    def __init__(self, cfg: AttentionConfig, hidden: int, n_experts: int, awake: int, top_p: float):
        super().__init__()
        D, C = cfg.d_model, max(n_experts, cfg.gates_per_group)
        self.cfg, self.n_experts, self.awake, self.top_p = cfg, n_experts, awake, top_p
        self.gates = Gates(1, C, D, n_experts, cfg.ema_decay)
        self.router = Router(1, C, n_experts, D, cfg.balance_rate)
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden, D).uniform_(-(D**-0.5), D**-0.5))
        self.down = nn.Parameter(torch.empty(n_experts, hidden, D).uniform_(-(hidden**-0.5), hidden**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        learning = is_learning(self)
        if learning:
            self.gates.fold()
            self.router.fold()
        awake, weight = self.route(x)
        slot, real = pick_awake(awake, self.awake)  # (B, T, 1, K)
        gate, up = project_in(x, self.gate_up, None, slot, real).chunk(2, dim=-1)
        rows = F.silu(gate) * up * weight.gather(-1, slot)[..., None].to(gate.dtype)
        y = project_out(rows, self.down, slot, real)
        if learning:
            every_token = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            self.gates.observe(x[:, :, None], every_token)
            self.router.observe(awake, every_token)
        return y

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which experts wake, bool, and their weights, float32, 0 for sleeping ones: `(B, T, 1, N)` each."""
        awake, weight, _ = route(
            x[:, :, None], self.gates, self.cfg, self.n_experts, logits=self.router(x), balance=self.router.balance,
            flux_alpha=1.0, top_p=self.top_p, least=1, most=self.awake,
        )  # fmt: skip
        return awake, weight
