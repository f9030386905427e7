"""A text in pieces, without autograd: all keys first, then rows, one piece after the other.

Keys and values of the whole text are kept; the index of queries and the notes live for one piece.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...budget import Budget
from ...gates import Gates
from .launch import read_rows
from .plan import make_plan, sizes_of
from .tables import GateLookup, count_keys, index_rows, lure_keys, make_store


class Pieces:
    """`add_keys` for every piece of a text, then `attend` for every piece of rows, both in order."""

    def __init__(
        self,
        gates: Gates,
        budget: Budget,
        batch: int,
        tokens: int,
        heads: int,
        *,
        positions: Tensor | None,
        inv_freq: Tensor | None,
        dtype: torch.dtype,
        scale: float,
        int8: bool,
    ):
        G, C, d = gates.prototypes.shape
        self.gates, self.scale, self.keys = gates, scale, None
        self.plan = make_plan(sizes_of(budget, heads // G, d, C))
        self.lookup = GateLookup(gates.prototypes, gates.alive, positions, inv_freq, None)
        self.store = make_store(batch, tokens, G, d, dtype, gates.prototypes.device, int8)

    def tokens_per_piece(self, most: int) -> int:
        """The largest size of a piece up to `most` tokens; at least one segment."""
        return self.plan.tokens_per_piece(most)

    def add_keys(self, k: Tensor, v: Tensor, t0: int) -> None:
        """Take in un-rotated keys and values `(B, n, G, d)` of tokens t0, t0 + 1, ..."""
        lure_keys(k, v, self.store, self.lookup, self.plan, t0)

    def attend(
        self, q: Tensor, t0: int, awake: Tensor | None = None, weigh: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Rows t0, t0 + 1, ... of un-rotated q `(B, n, H, d)`: the heads' outputs, times their routing weights.

        awake: `(B, n, H)`, 0 for heads that open no gate; None for all awake. weigh: gives the weights `(B, n, H)`
        float32, 0 for sleeping heads; on a GPU it runs beside the search for gates, which does not wait for it.
        """
        if self.keys is None:
            self.keys = count_keys(self.store, self.gates.gates_per_group, self.plan)
        rows = index_rows(q, self.keys, self.lookup, awake, t0, self.plan, weigh)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        read_rows(rows, self.keys, out, rows.weight, None, t0, self.plan, self.scale)
        return out
