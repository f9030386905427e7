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
PIECE_GPU = 1 << 26


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
        opened = open_gates(q, prototypes, alive, left, block, probes)
    return Shortlist(window, block, anchors, ring, notes, gate, left, opened)


def open_gates(q: Tensor, prototypes: Tensor, alive: Tensor, left: Tensor, block: int, probes: int) -> Tensor:
    """The live gates with the largest q.p among those that hold a key at the row's tick: `(B, T, H, n)`, -1 for none.

    An empty gate is never opened: a probe would be wasted on it.
    """
    B, T, H, _ = q.shape
    G, C = alive.shape
    usable = ((left > 0) & alive[:, None]).transpose(2, 3)  # (B, G, C, N)
    heads = prototypes.repeat_interleave(H // G, dim=0)  # (H, C, d)
    step = max(1, (PIECE if q.device.type == "cpu" else PIECE_GPU) // (B * H * C * block)) * block
    opened = torch.empty(B, T, H, probes, dtype=torch.int64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for i in range(0, T, step):
            rows = q[:, i : i + step].float().permute(0, 2, 3, 1)  # (B, H, d, t)
            score = torch.matmul(heads, rows)  # (B, H, C, t): the maximum runs over whole vectors of rows
            here = usable[..., i // block : (i + step - 1) // block + 1].repeat_interleave(block, dim=3)
            score.unflatten(1, (G, H // G)).masked_fill_(~here[:, :, None, :, : rows.shape[3]], -torch.inf)
            for pick, home in zip(_top(score, probes), opened[:, i : i + step].unbind(3), strict=True):
                home.copy_(pick.transpose(1, 2))
    return opened


def _count_left(gate: Tensor, C: int, window: int, block: int) -> Tensor:
    """Running count per gate of the keys that have left the window at each tick: `(B, G, N, C)`."""
    B, T, G = gate.shape
    ticks = -(-T // block)
    tick = ((torch.arange(T, device=gate.device) + window) // block + 1).clamp(max=ticks)  # when key j leaves
    slot = gate.where(gate >= 0, C) * (ticks + 1) + tick[:, None]  # (B, T, G)
    flat = slot.transpose(1, 2).reshape(B * G, T)
    counts = torch.zeros(B * G, (C + 1) * (ticks + 1), dtype=torch.int64, device=gate.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat))
    counts = counts.view(B, G, C + 1, ticks + 1)[:, :, :C, :ticks].cumsum(3)  # fast along the last axis only
    return counts.transpose(2, 3).contiguous()


def _top(score: Tensor, n: int) -> list[Tensor]:
    """Indices of the n largest along the axis before the last, ties to the lower index, -1 where the score is -inf."""
    size = score.shape[-2]
    low_first = torch.arange(size, 0, -1, dtype=score.dtype, device=score.device)[:, None]
    picks = []
    for i in range(n):
        if score.device.type == "cpu":  # half the time of a maximum that also returns its index
            best = score.amax(dim=-2, keepdim=True)
            index = size - torch.where(score == best, low_first, 0).amax(dim=-2, keepdim=True).long()
            index = index.clamp(max=size - 1)  # a NaN equals nothing; its row is NaN, the others stand
        else:
            best, index = score.max(dim=-2, keepdim=True)
        picks.append(index.masked_fill(best == -torch.inf, -1)[..., 0, :])
        if i < n - 1:
            score.scatter_(-2, index, -torch.inf)
    return picks


def count_reads(short: Shortlist) -> Tensor:
    """Keys and notes each row reads: `(B, T, H)` int64."""
    B, T, H, n = short.probes.shape
    G, N, C = short.left.shape[1:]
    tick = short.row_tick(T)
    edge = (tick * short.block - short.window).clamp(min=0)  # first key still in the window
    near = torch.arange(T, device=tick.device) - edge + 1 + edge.clamp(max=short.anchors)
    gain = short.left.clamp(max=short.ring)  # what opening a gate adds
    always = torch.zeros_like(short.left[..., 0])  # (B, G, N)
    if short.notes:
        filled = short.left > 0
        always = filled.sum(-1)
        gain = gain - (filled & (short.left <= short.ring)).long()  # its note is empty then
    gain = torch.nn.functional.pad(gain, (1, 0)).flatten()
    base = torch.arange(B * G, device=tick.device).view(B, 1, G, 1, 1) * N + tick.view(1, T, 1, 1, 1)
    spot = short.probes.view(B, T, G, H // G, n) + (base * (C + 1) + 1)
    reads = gain.index_select(0, spot.flatten()).view(spot.shape).sum(-1)
    return (reads + (near[:, None] + always.transpose(1, 2)[:, tick])[..., None]).flatten(2)
