"""Pass 2: attention over the champions that pass 1 kept, followed by the prompt.

Champions keep their positions in the document ("original"), so that distances stay true; or they are numbered from 0
on ("compacted"), for a model that was never trained on such large distances.

Axes: `K` champions, `P` prompt rows, `D` model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..attention import AttentionStats, ProteusAttention, plan_budget, row_reads
from .buffer import Champions

POSITIONS = ("original", "compacted")
ROWS_PER_READ = 1024  # champions within the same stretch of so many rows are read at once


class Answerer(Protocol):
    """A language model that answers from given tokens."""

    def answer(self, tokens: np.ndarray, positions: np.ndarray, prompt: str) -> str:
        """tokens: `(K,)` ids in document order; positions: `(K,)`, theirs in the document; the prompt follows them."""


def gather(store, position: np.ndarray) -> np.ndarray | Tensor:
    """The rows of `store` at `position`, `(K,)` ascending: `(K,)` ids or `(K, D)` embeddings."""
    ends = np.flatnonzero(np.diff(position // ROWS_PER_READ)) + 1
    if not len(position):
        return store.read(0, 0)
    parts = []
    for some in np.split(position, ends):
        first = int(some[0])
        parts.append(store.read(first, int(some[-1]) + 1)[some - first])
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def placed(champions: Champions, tokens: int, prompt_rows: int, positions: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions of champions `(K,)` and prompt `(P,)`, for a document of `tokens` tokens; positions: of `POSITIONS`."""
    if positions not in POSITIONS:
        raise ValueError(f"positions={positions!r}: must be one of {', '.join(POSITIONS)}")
    if positions == "original":
        return champions.position, np.arange(tokens, tokens + prompt_rows)
    return np.arange(len(champions)), np.arange(len(champions), len(champions) + prompt_rows)


def second_pass(store, champions: Champions, prompt: str, model: Answerer) -> str:
    """A language model's answer to `prompt` from the champions alone, without the rest of the document."""
    return model.answer(gather(store, champions.position), champions.position, prompt)


@dataclass(frozen=True)
class LayerAnswer:
    """The output of the built-in layer for champions and prompt."""

    out: Tensor  # (P, D), the prompt's rows
    stats: AttentionStats  # of all K + P rows
    attn: ProteusAttention
    rows: Tensor  # (K + P, D)
    positions: Tensor  # (K + P,)

    def reads(self, row: int = -1) -> np.ndarray:
        """The attention weights of prompt row `row` on the champions, `(K,)` float32.

        Weighted mean over the row's awake heads. The rest to a sum of 1 is attention to the prompt itself.
        """
        P, attn, cfg = len(self.out), self.attn, self.attn.cfg
        if not -P <= row < P:
            raise ValueError(f"row={row!r}: must be in [{-P}, {P})")
        token = len(self.rows) - P + row % P
        weight = self.stats.head_weights[0, token]  # (H,)
        with torch.no_grad():
            k, v = (proj(self.rows[None]).unflatten(-1, (cfg.n_kv_heads, -1)) for proj in (attn.k_proj, attn.v_proj))
            q = attn.q_proj(self.rows[token]).view(1, 1, cfg.n_heads, -1).expand(1, len(self.rows), -1, -1)
            budget = plan_budget(cfg, len(self.rows))
            keep = attn.kept(k, budget, None)
            total = np.zeros(len(self.rows), np.float32)
            for head in weight.nonzero()[:, 0].tolist():
                seen = row_reads(
                    q, k, v, attn.gates, budget, token=token, head=head, inv_freq=attn.inv_freq,
                    positions=self.positions, keep=keep,
                )  # fmt: skip
                total += seen.weight * float(weight[head])
        return (total / max(float(weight.sum()), 1e-12))[: len(self.rows) - P]


def attend_over(
    attn: ProteusAttention, store, champions: Champions, prompt: Tensor, *, positions: str = "original"
) -> LayerAnswer:
    """The layer's output for `prompt` `(P, D)` after the champions of `store`. `ValueError` names `positions`."""
    kept = torch.as_tensor(gather(store, champions.position)).to(prompt.device, prompt.dtype)
    rows = torch.cat((kept, prompt))
    place = torch.from_numpy(np.concatenate(placed(champions, len(store), len(prompt), positions))).to(prompt.device)
    with torch.no_grad():
        out, stats = attn(rows[None], positions=place, return_stats=True)
    return LayerAnswer(out[0, len(kept) :], stats, attn, rows, place)
