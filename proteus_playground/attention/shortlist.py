"""Which keys each query row may read, as small index tables that every backend shares.

Everything but the causal diagonal ticks once per block of `b` rows: a key has left the window of a row when it is
older than the row's block start by more than `w`. What has left is reached through the gates: the newest `m` keys
of an opened gate one by one (its ring), the rest through the gate's note.

Axes: `B` batch, `T` tokens (after dropped tokens have been taken out), `H` query heads, `G` KV groups, `C` gates per
group, `N` blocks, `n` probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PIECE = 1 << 19  # query-prototype scores held at a time on a CPU
PIECE_GPU = 1 << 27


@dataclass(frozen=True)
class Shortlist:
    """Index tables of one call. Integers are the budget's, tensors live on the keys' device."""

    window: int
    block: int
    anchors: int
    ring: int
    notes: bool
    gate: Tensor  # (B, T, G) int64, gate of each key; -1 for anchors and padding
    left: Tensor  # (B, G, N, C) int64, keys of a gate that have left the window at a block's tick
    probes: Tensor  # (B, T, H, n) int64, gates a row opens; -1 where there is nothing to open

    @property
    def gates_per_group(self) -> int:
        return self.left.shape[3]

    def row_tick(self, tokens: int) -> Tensor:
        """Block index of every row: `(T,)`."""
        return torch.arange(tokens, device=self.gate.device) // self.block


def build_shortlist(
    gate: Tensor,
    q: Tensor,
    prototypes: Tensor,
    alive: Tensor,
    length: Tensor,
    *,
    window: int,
    block: int,
    anchors: int,
    probes: int,
    ring: int,
    notes: bool,
) -> Shortlist:
    """Turn gate choices into index tables.

    gate: `(B, T, G)`, the gate each key is lured to; q: un-rotated queries `(B, T, H, d)`; prototypes: `(G, C, d)`
    float32; alive: `(G, C)` bool; length: `(B,)`, how many of the T tokens are real (the rest is padding at the end).
    """
    T, C = gate.shape[1], prototypes.shape[1]
    at = torch.arange(T, device=gate.device)
    real = at < length[:, None]  # (B, T)
    gate = gate.masked_fill(~real[..., None] | (at < anchors)[:, None], -1)
    left = _count_left(gate, C, window, block)
    opened = gate.new_full((*q.shape[:3], 0), -1)
    if probes and ring:
        opened = _open_gates(q, prototypes, alive, left, block, probes)
    return Shortlist(window, block, anchors, ring, notes, gate, left, opened)


def _open_gates(q: Tensor, prototypes: Tensor, alive: Tensor, left: Tensor, block: int, probes: int) -> Tensor:
    """The live gates with the largest q.p among those that hold a key at the row's tick: `(B, T, H, n)`, -1 for none.

    An empty gate is never opened: a probe would be wasted on it.
    """
    B, T, H, _ = q.shape
    G, C = alive.shape
    usable = ((left > 0) & alive[:, None]).transpose(1, 2)  # (B, N, G, C)
    step = max(1, (PIECE if q.device.type == "cpu" else PIECE_GPU) // (B * H * C * block)) * block
    parts = []
    with torch.autocast(q.device.type, enabled=False):
        for i in range(0, T, step):
            rows = q[:, i : i + step].float().unflatten(2, (G, H // G))  # (B, t, G, r, d)
            score = torch.einsum("btgrd,gcd->btgrc", rows, prototypes)
            here = usable[:, i // block : (i + step - 1) // block + 1].repeat_interleave(block, dim=1)
            score = score.masked_fill_(~here[:, : rows.shape[1], :, None], -torch.inf)
            parts.append(_top(score, probes).flatten(2, 3))
    return torch.cat(parts, dim=1)


def _count_left(gate: Tensor, C: int, window: int, block: int) -> Tensor:
    """Running count per gate of the keys that have left the window at each tick: `(B, G, N, C)`."""
    B, T, G = gate.shape
    ticks = -(-T // block)
    tick = ((torch.arange(T, device=gate.device) + window) // block + 1).clamp(max=ticks)  # when key j leaves
    slot = tick[:, None] * (C + 1) + gate.where(gate >= 0, torch.full_like(gate, C))  # (B, T, G)
    flat = slot.permute(0, 2, 1).reshape(B * G, T)
    counts = torch.zeros(B * G, (ticks + 1) * (C + 1), dtype=torch.int64, device=gate.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    return counts.view(B, G, ticks + 1, C + 1)[:, :, :ticks, :C].cumsum(2)


def _top(score: Tensor, n: int) -> Tensor:
    """Indices of the n largest along the last axis, ties to the lower index, -1 where the score is -inf."""
    low_first = torch.arange(score.shape[-1], 0, -1, dtype=score.dtype, device=score.device)
    picks = []
    for _ in range(n):  # twice as fast on a CPU as a maximum that also returns its index
        best = score.amax(dim=-1, keepdim=True)
        index = score.shape[-1] - torch.where(score == best, low_first, 0).amax(dim=-1, keepdim=True).long()
        index = index.clamp(max=score.shape[-1] - 1)  # a NaN equals nothing; its row is NaN, the others stand
        picks.append(index.masked_fill(best == -torch.inf, -1))
        score.scatter_(-1, index, -torch.inf)
    return torch.cat(picks, dim=-1)


def probed_counts(short: Shortlist) -> Tensor:
    """Keys that have left in each opened gate, 0 where nothing was opened: `(B, T, H, n)`."""
    B, T, H, n = short.probes.shape
    G, C = short.left.shape[1], short.gates_per_group
    tick = short.row_tick(T)
    base = torch.arange(B * G, device=tick.device).view(B, 1, G, 1, 1) * short.left.shape[2] + tick.view(1, T, 1, 1, 1)
    probe = short.probes.view(B, T, G, H // G, n)
    count = short.left.flatten()[base * C + probe.clamp(min=0)]
    return count.masked_fill(probe < 0, 0).view(B, T, H, n)


def count_reads(short: Shortlist) -> Tensor:
    """Keys and notes each row reads: `(B, T, H)` int64."""
    B, T, H, _ = short.probes.shape
    G = short.left.shape[1]
    tick = short.row_tick(T)
    edge = (tick * short.block - short.window).clamp(min=0)  # first key still in the window
    near = torch.arange(T, device=tick.device) - edge + 1 + edge.clamp(max=short.anchors)
    count = probed_counts(short)
    reads = near[:, None] + count.clamp(max=short.ring).sum(-1)
    if short.notes:
        filled = (short.left > 0).sum(-1).permute(0, 2, 1)[:, tick]  # (B, T, G)
        filled = filled.repeat_interleave(H // G, dim=2)
        reads = reads + filled - ((count > 0) & (count <= short.ring)).sum(-1)
    return reads
