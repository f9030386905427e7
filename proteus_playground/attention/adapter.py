"""Our attention for one layer of a model that was trained without it.

The model gives queries, keys and values. What a `ProteusAttention` decides with weights of its own is decided from the
gates alone where there is no router: the tokens to keep from their salience, the heads to wake from the prototypes'
prior. `ProteusLayer` holds the gates and budgets of one such layer.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `C` gates per group, `d` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .backends.dispatch import dense
from .budget import Budget, plan_budget
from .config import AttentionConfig
from .decide import TokenDecisions, decide, weigh
from .functional import AttentionResult, proteus_attention
from .gates import Gates
from .rope import rotate
from .routing import Router
from .settings import LayerShape

ROWS_PER_TILE = 64  # query rows that share one fetched key and value; every backend aims at this many


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
    """Gates and budgets of one layer. Called with a patch's `AttentionCall` it returns the heads' outputs."""

    gates: Gates
    config: AttentionConfig
    router: Router | None = None  # trained together with these gates

    def __call__(self, call) -> Tensor:
        """`(B, T, H, d)`, before o_proj."""
        return self.run_call(call).out

    def run_call(self, call) -> LayerRun:
        """What the layer does with an `AttentionCall`."""
        return self.run(
            call.q, call.k, call.v, inv_freq=call.inv_freq, positions=call.positions, scale=call.scale, real=call.keep
        )

    def decide(
        self,
        q: Tensor,
        k: Tensor,
        real: Tensor | None = None,
        *,
        budget: Budget | None = None,
        before: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> TokenDecisions:
        """Which tokens take part and which heads they wake; q `(B, T, H, d)` and k `(B, T, G, d)` un-rotated.

        real: `(B, T)` bool, False at padding. budget: None plans one for T tokens. before: `(B,)`, tokens already kept
        of the text that these continue. logits: `(B, T, G, C)` of the router for these tokens; without a router the
        prototypes' prior chooses heads.
        """
        mean_query = q.unflatten(2, (self.gates.n_groups, -1)).mean(3) if self.config.route_heads else None
        return decide(
            self.config,
            self.gates,
            budget or plan_budget(self.config, k.shape[1]),
            k,
            mean_query,
            logits=None if self.router is None else logits,
            balance=None if self.router is None else self.router.balance,
            real=real,
            before=before,
        )

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
        explain: bool = True,
        return_index: bool = False,
    ) -> LayerRun:
        """Decide, attend and weigh. q `(B, T, H, d)`, k and v `(B, T, G, d)`, all un-rotated.

        real, budget, logits: as in `decide`; the others as in `proteus_attention`.
        """
        decisions = self.decide(q, k, real, budget=budget, logits=logits)
        result = proteus_attention(
            q,
            k,
            v,
            self.gates,
            decisions.budget,
            inv_freq=inv_freq,
            positions=positions,
            keep=decisions.keep,
            awake=decisions.awake,
            backend=self.config.backend,
            scale=scale,
            explain=explain,
            return_index=return_index,
            int8=self.config.int8,
        )
        out = weigh(result.out, decisions.weight)
        return LayerRun(out, result, decisions.budget, decisions.keep, decisions.awake, decisions.weight)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor | None, positions: Tensor, scale: float
) -> Tensor:
    """Fused causal attention on the same un-rotated tensors: `(B, T, H, d)`."""
    return dense(rotate(q, positions, inv_freq), rotate(k, positions, inv_freq), v, scale)


def predicted_cost(
    reads: int, rows: int, keys: int, gates: int, shape: LayerShape, itemsize: int
) -> tuple[float, float]:
    """Estimate the FLOPs and bytes of a run.

    reads: keys and notes read by all rows together; rows: (token, head) pairs computed; keys: tokens that took part;
    gates: prototypes compared with each key and each row, 0 for a dense run; itemsize: bytes per number.
    FLOPs: two matmuls of 2 d operations per read, 2 d per comparison with a prototype.
    Bytes: each row's query and output once, each key and value at least once, and one fetch of a key and value
    for every `ROWS_PER_TILE` reads of it, since that many neighbouring rows share a tile.
    """
    d, G = shape.head_dim, shape.n_groups
    flops = 4.0 * d * reads + 2.0 * d * gates * (rows + keys * G)
    fetched = max(reads / ROWS_PER_TILE, keys * G)
    return flops, float(itemsize) * d * (2 * rows + 2 * fetched)
