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

import torch
from torch import Tensor

from .budget import Budget
from .gates import Gates
from .ranking import rank_gates


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
    noted: Tensor | None  # (B, T, H, e) int64, closed gates whose notes a row reads; None: all notes

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
