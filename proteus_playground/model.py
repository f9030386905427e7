"""The transformer block: pre-norm attention and a gated MLP, each added to the residual stream."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionConfig, ProteusAttention


class ProteusBlock(nn.Module):
    """RMSNorm, `ProteusAttention`, RMSNorm, SwiGLU MLP: `(B, T, D)` -> `(B, T, D)`.

    hidden: MLP width, default 8/3 D rounded up to a multiple of 8.
    """

    def __init__(self, cfg: AttentionConfig, hidden: int | None = None):
        super().__init__()
        if hidden is not None and (isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1):
            raise ValueError(f"hidden={hidden!r}: must be a whole number >= 1, or None")
        D = cfg.d_model
        hidden = hidden or -(-8 * D // 24) * 8
        self.attn_norm, self.mlp_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.attn = ProteusAttention(cfg)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor, *, return_stats: bool = False, **attention):
        """`attention` is passed on to `ProteusAttention.forward`; with return_stats also its `AttentionStats`."""
        out = self.attn(self.attn_norm(x), return_stats=return_stats, **attention)
        y, stats = out if return_stats else (out, None)
        x = x + y
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        x = x + self.down(F.silu(gate) * up)
        return (x, stats) if return_stats else x
