"""One attention layer of a model that knows nothing of Proteus, run at one position of the controls.

What a trained `ProteusAttention` decides from its own weights is decided here from the gates alone: the keep
mask from their salience, the heads from the prototypes' prior. `ProteusLayer` is one such layer, ready for a
patch.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `r` heads per group, `C` gates per group, `d`
head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import AttentionConfig, AttentionResult, Budget, Gates, plan_budget, proteus_attention
from .backends.dispatch import dense
from .rope import rotate
from .routing import Router, prior_route
from .settings import LayerShape

TILE = 64  # query rows that share one fetched key and value: the aim of every backend here


@dataclass(frozen=True)
class LayerRun:
    """What one run did. `out` is before o_proj; rows of dropped tokens and sleeping heads are 0."""

    out: Tensor  # (B, T, H, d)
    result: AttentionResult
    budget: Budget
    keep: Tensor | None  # (B, T) bool; None when every token took part
    awake: Tensor | None  # (B, T, H) bool; None when every head is awake
    weight: Tensor | None  # (B, T, H) float32; None when all are 1


@dataclass(frozen=True)
class ProteusLayer:
    """Gates and budgets of one layer; called with a patch's `AttentionCall` it answers `(B, T, H, d)`."""

    gates: Gates
    config: AttentionConfig
    router: Router | None = None  # trained together with these gates

    def __call__(self, call) -> Tensor:
        return self.run(
            call.q, call.k, call.v, inv_freq=call.inv_freq, positions=call.positions, scale=call.scale, real=call.keep
        ).out

    def decide(
        self,
        q: Tensor,
        k: Tensor,
        real: Tensor | None = None,
        *,
        budget: Budget | None = None,
        before: Tensor | None = None,
        logits: Tensor | None = None,
    ):
        """Budget, keep `(B, T)`, awake `(B, T, H)` and weight `(B, T, H)`; None stands for "all".

        real: `(B, T)` bool, False at padding. budget: None plans one for T tokens. before: `(B,)`, tokens kept of a
        text that these go on. logits: `(B, T, G, C)`, what the router says of these tokens; without a router the
        prototypes' prior chooses heads. A token's decision depends on that token only.
        """
        budget = budget or plan_budget(self.config, k.shape[1])
        keep = self.gates.keep_tokens(k, budget.keep_ratio, self.config.n_anchors, real, before)
        awake = weight = None
        if self.config.route_heads:
            trained = {}
            if self.router is not None:
                trained = {"logits": logits, "balance": self.router.balance, "prior_max": self.config.prior_max}
            awake, weight = prior_route(q, self.gates, budget, self.config.prior_temperature, **trained)
        return budget, keep, awake, weight

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        inv_freq: Tensor | None,
        positions: Tensor | None = None,
        scale: float,
        real: Tensor | None = None,
        budget: Budget | None = None,
        logits: Tensor | None = None,
    ) -> LayerRun:
        """q `(B, T, H, d)`, k and v `(B, T, G, d)`, un-rotated. real, budget, logits: as in `decide`."""
        budget, keep, awake, weight = self.decide(q, k, real, budget=budget, logits=logits)
        result = proteus_attention(
            q,
            k,
            v,
            self.gates,
            budget,
            inv_freq=inv_freq,
            positions=positions,
            keep=keep,
            awake=awake,
            backend=self.config.backend,
            scale=scale,
            int8=self.config.int8,
        )
        out = result.out if weight is None else result.out * weight[..., None].to(result.out.dtype)
        return LayerRun(out, result, budget, keep, awake, weight)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor | None, positions: Tensor, scale: float
) -> Tensor:
    """Fused causal attention on the same un-rotated tensors: `(B, T, H, d)`."""
    return dense(rotate(q, positions, inv_freq), rotate(k, positions, inv_freq), v, scale)


def predicted_cost(
    reads: int, rows: int, keys: int, gates: int, shape: LayerShape, itemsize: int
) -> tuple[float, float]:
    """FLOPs and bytes of a run.

    reads: keys and notes read by all rows together; rows: (token, head) pairs that computed; keys: tokens
    that took part; gates: prototypes compared with each key and each row, 0 when nothing is looked up.
    FLOPs: two matmuls of 2 d operations per read, 2 d per comparison with a prototype.
    Bytes: each row's query in and output out, each key and value at least once, and one fetch of a key and
    value for every `TILE` reads of it, since that many neighbouring rows share a tile.
    """
    d, G = shape.head_dim, shape.n_groups
    flops = 4.0 * d * reads + 2.0 * d * gates * (rows + keys * G)
    fetched = max(reads / TILE, keys * G)
    return flops, float(itemsize) * d * (2 * rows + 2 * fetched)
