"""Which keys each query row may read, as small index tables that every backend shares.

Everything but the causal diagonal ticks once per block of `b` rows: a key has left the window of a row when it is more
than `w` tokens older than the first row of the block. Such a key is *retired*, and read through its gate: the newest
`m` retired keys of an opened gate one by one (its ring), the others through the gate's note.

Axes: `B` batch, `T` tokens (after dropped tokens have been taken out), `H` query heads, `G` KV groups, `C` gates per
group, `N` blocks, `n` probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import Budget
from .gates import Gates

SCORES_PER_STEP = 1 << 19  # query-prototype scores held at a time on a CPU
SCORES_PER_STEP_GPU = 1 << 26


@dataclass(frozen=True)
class Shortlist:
    """Index tables of one call. Integers are the budget's, tensors live on the keys' device."""

    window: int
    block: int
    anchors: int
    ring: int
    notes: bool
    gate: Tensor  # (B, T, G) int64, gate of each key; -1 for anchors and padding
    retired: Tensor  # (B, G, N, C) int64, keys of a gate that have left the window at a block's tick
    probes: Tensor  # (B, T, H, n) int64, gates a row opens; -1 where there is nothing to open

    @property
    def gates_per_group(self) -> int:
        return self.retired.shape[3]

    def row_tick(self, tokens: int) -> Tensor:
        """Block index of every row: `(T,)`."""
        return torch.arange(tokens, device=self.gate.device) // self.block


def build_shortlist(gate: Tensor, q: Tensor, gates: Gates, budget: Budget, length: Tensor | None) -> Shortlist:
    """The index tables of a call.

    gate: `(B, T, G)`, the gate each key is lured to; q: un-rotated queries `(B, T, H, d)`; budget: not a dense one;
    length: `(B,)`, how many of the T tokens are real (the others are padding at the end), None for all.
    """
    T, window, block = gate.shape[1], budget.window, budget.block
    at = torch.arange(T, device=gate.device)
    in_no_gate = (at < budget.anchors)[:, None]
    if length is not None:
        in_no_gate = in_no_gate | (at >= length[:, None])[..., None]
    gate = gate.masked_fill(in_no_gate, -1)
    retired = _count_retired(gate, gates.gates_per_group, window, block)
    opened = gate.new_full((*q.shape[:3], 0), -1)
    if budget.probes and budget.ring:
        opened = open_gates(q, gates.prototypes, gates.alive, retired, block, budget.probes)
    return Shortlist(window, block, budget.anchors, budget.ring, budget.notes, gate, retired, opened)


def everything(gate: Tensor, heads: int) -> Shortlist:
    """A shortlist that holds every key, for the `reference` backend when the budget is dense; gate `(B, T, G)`."""
    B, T, G = gate.shape
    return Shortlist(
        window=T,
        block=1,
        anchors=0,
        ring=0,
        notes=False,
        gate=torch.full_like(gate, -1),
        retired=gate.new_zeros(B, G, T, 1),
        probes=gate.new_full((B, T, heads, 0), -1),
    )


def open_gates(q: Tensor, prototypes: Tensor, alive: Tensor, retired: Tensor, block: int, probes: int) -> Tensor:
    """The live gates with the largest q.p among those that hold a key at the row's tick: `(B, T, H, n)`, -1 for none.

    An empty gate is never opened, because there is nothing to read in it.
    """
    B, T, H, _ = q.shape
    G, C = alive.shape
    usable = ((retired > 0) & alive[:, None]).transpose(2, 3)  # (B, G, C, N)
    heads = prototypes.repeat_interleave(H // G, dim=0)  # (H, C, d)
    held = SCORES_PER_STEP if q.device.type == "cpu" else SCORES_PER_STEP_GPU
    step = max(1, held // (B * H * C * block)) * block
    opened = torch.empty(B, T, H, probes, dtype=torch.int64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for i in range(0, T, step):
            rows = q[:, i : i + step].float().permute(0, 2, 3, 1)  # (B, H, d, t)
            score = torch.matmul(heads, rows)  # (B, H, C, t): the maximum runs over whole vectors of rows
            here = usable[..., i // block : (i + step - 1) // block + 1].repeat_interleave(block, dim=3)
            score.unflatten(1, (G, H // G)).masked_fill_(~here[:, :, None, :, : rows.shape[3]], -torch.inf)
            for pick, slot in zip(_top(score, probes), opened[:, i : i + step].unbind(3), strict=True):
                slot.copy_(pick.transpose(1, 2))
    return opened


def _count_retired(gate: Tensor, C: int, window: int, block: int) -> Tensor:
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
        if score.device.type == "cpu":  # takes half the time of a maximum that also returns its index
            best = score.amax(dim=-2, keepdim=True)
            index = size - torch.where(score == best, low_first, 0).amax(dim=-2, keepdim=True).long()
            index = index.clamp(max=size - 1)  # a NaN equals nothing: its own row becomes NaN, no other does
        else:
            best, index = score.max(dim=-2, keepdim=True)
        picks.append(index.masked_fill(best == -torch.inf, -1)[..., 0, :])
        if i < n - 1:
            score.scatter_(-2, index, -torch.inf)
    return picks


def count_reads(short: Shortlist) -> Tensor:
    """Keys and notes each row reads: `(B, T, H)` int64."""
    B, T, H, n = short.probes.shape
    G, N, C = short.retired.shape[1:]
    tick = short.row_tick(T)
    edge = (tick * short.block - short.window).clamp(min=0)  # first key still in the window
    direct = torch.arange(T, device=tick.device) - edge + 1 + edge.clamp(max=short.anchors)
    gain = short.retired.clamp(max=short.ring)  # what opening a gate adds
    always = torch.zeros_like(short.retired[..., 0])  # (B, G, N)
    if short.notes:
        filled = short.retired > 0
        always = filled.sum(-1)
        gain = gain - (filled & (short.retired <= short.ring)).long()  # its note is empty then
    gain = torch.nn.functional.pad(gain, (1, 0)).flatten()
    base = torch.arange(B * G, device=tick.device).view(B, 1, G, 1, 1) * N + tick.view(1, T, 1, 1, 1)
    spot = short.probes.view(B, T, G, H // G, n) + (base * (C + 1) + 1)
    reads = gain.index_select(0, spot.flatten()).view(spot.shape).sum(-1)
    return (reads + (direct[:, None] + always.transpose(1, 2)[:, tick])[..., None]).flatten(2)
