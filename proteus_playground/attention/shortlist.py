"""Which keys each query row may read, as small index tables that every backend shares.

Everything but the causal diagonal ticks once per block of `b` rows: a key has left the window of a row when it is more
than `w` tokens older than the first row of the block. Such a key is *retired*, and read through its gate, if at all. A
row ranks the gates by q.p. It opens the first ones, `n` at most, and reads the newest `m` retired keys of each one by
one (the gate's ring). It reads the notes of the next `e`, or of all gates: each is the mean of the gate's retired keys
that it does not read one by one.

Axes: `B` batch, `T` tokens (after dropped tokens have been taken out), `H` query heads, `G` KV groups, `C` gates per
group, `N` blocks, `n` probes, `e` notes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .budget import Budget
from .gates import Gates
from .transforms import is_transformed

SCORES_PER_STEP = 1 << 19  # query-prototype scores held at a time on a CPU
SCORES_PER_STEP_GPU = 1 << 26
FEW = 4  # gates that are picked one by one, which is quicker than sorting up to about here: docs/log.md


@dataclass(frozen=True)
class Shortlist:
    """Index tables of one call. Integers are the budget's, tensors live on the keys' device."""

    window: int
    block: int
    anchors: int
    ring: int
    gate: Tensor  # (B, T, G) int64, gate of each key; -1 for anchors and padding
    retired: Tensor  # (B, G, N, C) int64, keys of a gate that have left the window at a block's tick
    probes: Tensor  # (B, T, H, n) int64, gates a row opens, the best first; -1 for none
    noted: Tensor | None  # (B, T, H, e) int64, closed gates whose notes a row reads, best first; None: all notes

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
    opened, noted = choose_gates(q, gates, budget, retired, block)
    return Shortlist(window, block, budget.anchors, budget.ring, gate, retired, opened, noted)


def everything(gate: Tensor, heads: int) -> Shortlist:
    """A shortlist that holds every key, for the `reference` backend when the budget is dense; gate `(B, T, G)`."""
    B, T, G = gate.shape
    return Shortlist(
        window=T,
        block=1,
        anchors=0,
        ring=0,
        gate=torch.full_like(gate, -1),
        retired=gate.new_zeros(B, G, T, 1),
        probes=gate.new_full((B, T, heads, 0), -1),
        noted=gate.new_full((B, T, heads, 0), -1),
    )


def choose_gates(q: Tensor, gates: Gates, budget: Budget, retired: Tensor, block: int) -> tuple[Tensor, Tensor | None]:
    """Gates that each row opens, `(B, T, H, n)`, and gates whose notes it reads, `(B, T, H, e)`; None for all notes.

    Both begin with the gate that matches best; -1 for none. retired: `(B, G, N, C)`, at the ticks of blocks of `block`
    rows.
    """
    C, n, e = gates.gates_per_group, budget.probes, budget.notes
    reads_all = e >= C
    ranked = rank_gates(q, gates.prototypes, gates.alive, retired, block, n if reads_all else min(C, n + e))
    opened, following = ranked[..., :n], n
    if budget.fills_rings:
        fits = held_keys(opened, retired, block).clamp(max=budget.ring).cumsum(-1) <= budget.ring_reads
        opened, following = opened.masked_fill(~fits, -1), fits.sum(-1, keepdim=True)
    if reads_all:
        return opened, None
    at = (following + torch.arange(e, device=q.device)).expand(*ranked.shape[:3], e)
    return opened, ranked.gather(-1, at.clamp(max=ranked.shape[-1] - 1)).masked_fill(at >= ranked.shape[-1], -1)


def rank_gates(q: Tensor, prototypes: Tensor, alive: Tensor, retired: Tensor, block: int, count: int) -> Tensor:
    """The `count` live gates with the largest q.p among those that hold a key at the row's tick: `(B, T, H, count)`.

    The best come first, of equal ones that with the lower index; -1 where no gate is left. An empty gate is never
    ranked, because there is nothing to read in it.
    """
    B, T, H, _ = q.shape
    G, C = alive.shape
    usable = ((retired > 0) & alive[:, None]).transpose(2, 3)  # (B, G, C, N)
    heads = prototypes.repeat_interleave(H // G, dim=0)  # (H, C, d)
    held = SCORES_PER_STEP if q.device.type == "cpu" else SCORES_PER_STEP_GPU
    step = max(1, held // (B * H * C * block)) * block
    ranked = torch.empty(B, T, H, count, dtype=torch.int64, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for i in range(0, T, step):
            rows = q[:, i : i + step].float().permute(0, 2, 3, 1)  # (B, H, d, t)
            score = torch.matmul(heads, rows)  # (B, H, C, t): the maximum runs over whole vectors of rows
            here = usable[..., i // block : (i + step - 1) // block + 1].repeat_interleave(block, dim=3)
            score.unflatten(1, (G, H // G)).masked_fill_(~here[:, :, None, :, : rows.shape[3]], -torch.inf)
            best = _best_one_by_one(score, count) if count <= FEW else _best_sorted(score, count)
            ranked[:, i : i + step] = best.permute(0, 3, 1, 2)
    return ranked


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
    """The same for larger counts.

    Equal scores are told apart by sorting whole numbers: the bits of the score, in an order that whole numbers keep,
    and below them the index. A NaN ranks first or last.
    """
    score = score.transpose(-1, -2)
    size = score.shape[-1]
    bits = (score + 0.0).view(torch.int32).long()  # -0.0 becomes 0.0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = (key << 20) + torch.arange(size - 1, -1, -1, device=score.device)
    if key.device.type == "cpu" and not is_transformed():  # takes a third of the time
        last = np.partition(key.numpy(), size - count)[..., size - count :]
        best = torch.from_numpy(np.sort(last)[..., ::-1].copy())
    else:
        best = key.topk(count, dim=-1).values
    nothing = -0x7F800001  # what becomes of -inf
    return ((size - 1) - (best & 0xFFFFF)).masked_fill_(best >> 20 == nothing, -1).transpose(-1, -2)


def count_reads(short: Shortlist) -> Tensor:
    """Keys and notes each row reads: `(B, T, H)` int64."""
    T = short.probes.shape[1]
    tick = short.row_tick(T)
    edge = (tick * short.block - short.window).clamp(min=0)  # first key still in the window
    direct = torch.arange(T, device=tick.device) - edge + 1 + edge.clamp(max=short.anchors)
    opened = held_keys(short.probes, short.retired, short.block)
    if short.noted is None:
        filled = (short.retired > 0).sum(-1).transpose(1, 2)[:, tick]  # (B, T, G)
        notes = filled.repeat_interleave(short.probes.shape[2] // filled.shape[2], dim=2)
        notes = notes - ((opened > 0) & (opened <= short.ring)).sum(-1)  # the note of such a gate is empty
    else:
        notes = (short.noted >= 0).sum(-1)
    return direct[:, None] + opened.clamp(max=short.ring).sum(-1) + notes


def held_keys(gate: Tensor, retired: Tensor, block: int) -> Tensor:
    """Retired keys of the gates `gate` `(B, T, H, n)` at the ticks of the rows: likewise, 0 for none.

    retired: `(B, G, N, C)`, at the ticks of blocks of `block` rows.
    """
    B, T, H, n = gate.shape
    G, N, C = retired.shape[1:]
    tick = torch.arange(T, device=gate.device) // block
    first = torch.arange(B * G, device=gate.device).view(B, 1, G, 1, 1) * N + tick.view(1, T, 1, 1, 1)
    spot = gate.view(B, T, G, H // G, n).clamp(min=0) + first * C
    return retired.flatten()[spot].view(gate.shape).masked_fill(gate < 0, 0)
