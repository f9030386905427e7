"""The gates that match each query row best, in order.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `C` gates per group, `N` blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .transforms import is_transformed

SCORES_PER_STEP = 1 << 19  # query-prototype scores held at a time on a CPU
SCORES_PER_STEP_GPU = 1 << 26
FEW = 4  # gates that are picked one by one, which is quicker than sorting up to about here: docs/log.md


def rank_gates(q: Tensor, prototypes: Tensor, alive: Tensor, retired: Tensor, block: int, count: int) -> Tensor:
    """The `count` live gates with the largest q.p among those that hold a key at the row's tick: `(B, T, H, count)`.

    The best come first, of equal ones that with the lower index; -1 where no gate is left. An empty gate is never
    ranked, because there is nothing to read in it.
    """
    B, T, H, _ = q.shape
    G, C = alive.shape
    usable = (retired > 0) & alive[:, None]  # (B, G, N, C)
    held = SCORES_PER_STEP if q.device.type == "cpu" else SCORES_PER_STEP_GPU
    step = max(1, held // (B * H * C * block)) * block
    ranked = torch.empty(B, T, H, count, dtype=torch.int64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for i in range(0, T, step):
            rows = q[:, i : i + step].float().transpose(1, 2).unflatten(1, (G, H // G))  # (B, G, r, t, d)
            size = rows.shape[3]
            here = usable[:, :, i // block : (i + step - 1) // block + 1].repeat_interleave(block, dim=2)
            here = here[:, :, None, :size]
            if count <= FEW:
                score = prototypes[:, None] @ rows.mT  # (B, G, r, C, t): the maximum runs over whole vectors of rows
                best = _best_one_by_one(score.masked_fill_(~here.mT, -torch.inf), count).mT
            else:
                score = (rows.flatten(2, 3) @ prototypes.mT).unflatten(2, (-1, size))  # (B, G, r, t, C)
                best = _best_sorted(score.masked_fill_(~here, -torch.inf), count)
            ranked[:, i : i + step] = best.flatten(1, 2).transpose(1, 2)
    return ranked


def _best_one_by_one(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the axis before the last, in their place: ties to the lower index, -1 where
    the score is -inf."""
    size = score.shape[-2]
    low_first = torch.arange(size, 0, -1, dtype=score.dtype, device=score.device)[:, None]
    picks = torch.empty(*score.shape[:-2], count, score.shape[-1], dtype=torch.int64, device=score.device)
    for i in range(count):
        if score.device.type == "cpu":  # takes half the time of a maximum that also returns its index
            best = score.amax(dim=-2, keepdim=True)
            index = size - torch.where(score == best, low_first, 0).amax(dim=-2, keepdim=True).long()
            index = index.clamp(max=size - 1)  # a NaN equals nothing: its own row becomes NaN, no other does
        else:
            best, index = score.max(dim=-2, keepdim=True)
        picks[..., i : i + 1, :] = index.masked_fill(best == -torch.inf, -1)
        if i < count - 1:
            score.scatter_(-2, index, -torch.inf)
    return picks


def _best_sorted(score: Tensor, count: int) -> Tensor:
    """The same along the last axis, for larger counts.

    Equal scores are told apart by sorting whole numbers: the bits of the score, in an order that whole numbers keep,
    and below them the index. A NaN ranks first or last.
    """
    size = score.shape[-1]
    bits = (score + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits ^= (bits >> 31) & 0x7FFFFFFF
    key = bits.long().mul_(1 << 20).add_(torch.arange(size - 1, -1, -1, device=score.device))
    if key.device.type == "cpu" and not is_transformed():  # takes a third of the time
        last = np.partition(key.numpy(), size - count)[..., size - count :]
        best = torch.from_numpy(np.sort(last)[..., ::-1].copy())
    else:
        best = key.topk(count, dim=-1).values
    nothing = -0x7F800001  # what becomes of -inf
    return ((size - 1) - (best & 0xFFFFF)).masked_fill_(best >> 20 == nothing, -1)
