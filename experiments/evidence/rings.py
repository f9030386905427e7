"""Which keys of an opened gate are read one by one: its newest, or its most salient. With masks, for short texts.

The layer keeps the newest, because a ring that keeps them needs no search; this is what that costs in recall.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...attention import ProteusAttention, plan_budget
from ...attention.backends.reference import memberships
from ...attention.functional import Prepared, prepare
from ...attention.selectors.attend import row_steps
from .arms import counts


def attend_by_rings(attn: ProteusAttention, h: Tensor, shortlist: int, salient: bool, **changes) -> tuple[Tensor, ...]:
    """The layer at alpha 1 with rings of another order: h `(B, T, D)` -> `(B, T, D)`, reads and looks `(B, T, 2)`.

    With salient=False it is the layer's own pass. Heads must not be routed, and every token takes part.
    """
    cfg = replace(attn.cfg, shortlist=min(shortlist, h.shape[1]), flux_alpha=1.0, **changes)
    budget = plan_budget(cfg, h.shape[1])
    q, k, v = attn.project(h)
    ready = prepare(q, k, v, attn.gates, budget, inv_freq=attn.inv_freq, positions=None, keep=None)
    order = None
    if salient:  # of equally salient keys the newer one counts as more salient
        order = attn.gates.salience(k).double() + torch.arange(h.shape[1], device=h.device) * 1e-10
    out, reads = torch.empty_like(q), h.new_empty(h.shape[:2])
    for rows in row_steps(len(q), q.shape[2], q.shape[1], q.device):
        out[:, rows], reads[:, rows] = _rows(ready, rows, order, cfg.head_dim**-0.5)
    return attn.o_proj(out.flatten(2)), counts(reads, 0 if ready.short is None else attn.gates.gates_per_group)


def _rows(ready: Prepared, rows: Tensor, order: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Some rows: `(B, R, H, d)` and their reads `(B, R)`. With a budget for everything the shortlist is None."""
    short, H = ready.short, ready.q.shape[2]
    q = ready.q[:, rows].transpose(1, 2)  # (B, H, R, d)
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2).transpose(1, 2) for x in (ready.k, ready.v))
    if short is None:
        seen = (torch.arange(k.shape[2], device=q.device) <= rows[:, None]).expand(*q.shape[:3], -1)
        return _mix(q, k, v, seen, [], scale), seen.sum(-1).float().mean(1)
    read = memberships(short, H, rows, order)
    gate = short.gate.repeat_interleave(H // short.gate.shape[2], dim=2).transpose(1, 2)[:, :, None]  # (B, H, 1, T)
    notes = [read.notes & (gate == c) for c in range(short.gates_per_group)] if read.notes.any() else []
    reads = read.direct.sum(-1) + sum(note.any(-1).long() for note in notes)
    return _mix(q, k, v, read.direct, notes, scale), reads.float().mean(1)


def _mix(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, notes: list[Tensor], scale: float) -> Tensor:
    """Softmax over the keys seen and the mean key of each note's members, its score raised by log(count)."""
    scores = [(q @ k.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)]
    means = []
    for note in notes:
        count = note.sum(-1, keepdim=True)
        share = note.to(q.dtype) / count.clamp(min=1)
        score = (q * (share @ k)).sum(-1, keepdim=True) * scale + count.clamp(min=1).log()
        scores.append(score.masked_fill(count == 0, -torch.inf))
        means.append(share @ v)
    p = torch.cat(scores, dim=-1).softmax(-1)
    T = k.shape[2]
    out = p[..., :T] @ v
    for i, mean in enumerate(means):
        out = out + p[..., T + i : T + i + 1] * mean
    return out.transpose(1, 2)
