"""The specification: every membership rule spelled out as a mask. For tests, short texts and chosen rows; not fast.

Axes: `B` batch, `T` tokens, `R` rows, `H` query heads, `G` KV groups, `C` gates per group, `d` head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..precision import at_least_float32
from ..shortlist import Shortlist


class Memberships(NamedTuple):
    """How each row reaches each key: `(B, H, R, T)` bool each, at most one of them True."""

    window: Tensor  # keys that have not left the row's window
    anchors: Tensor  # the first keys, once they have left it
    rings: Tensor  # keys read one by one because the row opened their gate
    notes: Tensor  # keys read through the note of their gate; no row reads a key of the others, once it is retired

    @property
    def direct(self) -> Tensor:
        """Keys read one by one."""
        return self.window | self.anchors | self.rings


def memberships(short: Shortlist, heads: int, rows: Tensor | None = None, order: Tensor | None = None) -> Memberships:
    """How the rows of all `heads` heads reach the keys.

    rows: `(R,)` int64, token indices; None for all. order: `(B, T)`, distinct numbers: a ring holds the keys of its
    gate that have the largest; None for their order in the text, as in every backend.
    """
    B, T, G = short.gate.shape
    key = torch.arange(T, device=short.gate.device)
    rows = key if rows is None else rows
    start = rows[:, None] // short.block * short.block  # the first row of each row's block
    retired = key < start - short.window  # (R, T)
    window, anchor = (key <= rows[:, None]) & ~retired, retired & (key < short.anchors)
    gate = short.gate.transpose(1, 2)  # (B, G, T)
    behind = (retired & (gate >= 0)[:, :, None]).repeat_interleave(heads // G, dim=1)  # (B, H, R, T)
    newest = _newest(gate, retired, short.ring, order).repeat_interleave(heads // G, dim=1)
    rings = newest & behind & _of_gates(short.probes[:, rows], gate, short.gates_per_group)
    notes = behind & ~rings
    if short.noted is not None:
        notes &= _of_gates(short.noted[:, rows], gate, short.gates_per_group)
    return Memberships(window.expand(rings.shape), anchor.expand(rings.shape), rings, notes)


def _of_gates(chosen: Tensor, gate: Tensor, gates: int) -> Tensor:
    """Whether a key's gate `(B, G, T)` is among those that a row chose `(B, R, H, n)`, -1 for none: `(B, H, R, T)`."""
    chosen = chosen.transpose(1, 2)
    marks = torch.zeros(*chosen.shape[:3], gates + 1, dtype=torch.bool, device=gate.device)
    marks.scatter_(-1, chosen.where(chosen >= 0, gates), True)
    marks[..., gates] = False
    home = gate.where(gate >= 0, gates).repeat_interleave(chosen.shape[1] // gate.shape[1], dim=1)
    return marks.gather(-1, home[:, :, None].expand(*chosen.shape[:3], gate.shape[2]))


def _newest(gate: Tensor, retired: Tensor, ring: int, order: Tensor | None) -> Tensor:
    """Whether a retired key is among the last `ring` of its gate: of the text, or in an `order`. `(B, G, R, T)`.

    gate: `(B, G, T)`; retired: `(R, T)`. Keys are sorted by gate, so that each gate's are a run, and counted.
    """
    T = gate.shape[2]
    nth = torch.arange(T, device=gate.device) if order is None else order.argsort(-1).argsort(-1)[:, None]
    run = (gate * T + nth).argsort(-1)  # (B, G, T)
    home = gate.gather(-1, run)
    last = torch.searchsorted(home, home, right=True) - 1  # the end of each key's run
    shape = *gate.shape[:2], len(retired), T
    run, last = (x[:, :, None].expand(shape) for x in (run, last))
    there = retired.expand(shape).gather(-1, run)
    count = there.cumsum(-1)
    later = count.gather(-1, last) - count  # retired keys of the same gate behind it
    return torch.zeros_like(there).scatter_(-1, run, there & (later < ring))


def attend(q: Tensor, k: Tensor, v: Tensor, short: Shortlist, scale: float) -> tuple[Tensor, Tensor]:
    """Rotated q `(B, T, H, d)`, rotated k and v `(B, T, G, d)` -> out like q, log-sum-exp `(B, T, H)` float32."""
    p, share, lse = _probabilities(q, k, short, scale)
    vh = at_least_float32(v).repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2)
    T = q.shape[1]
    note_v = torch.einsum("bhtcs,bhsd->bhtcd", share, vh)
    out = p[..., :T] @ vh + torch.einsum("bhtc,bhtcd->bhtd", p[..., T:], note_v)
    return out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)


def weights(q: Tensor, k: Tensor, short: Shortlist, scale: float) -> Tensor:
    """Attention each key gets, `(B, H, T, T)` float32, rows sum to 1; a note's is shared evenly by its members."""
    p, share, _ = _probabilities(q, k, short, scale)
    T = q.shape[1]
    return p[..., :T] + torch.einsum("bhtc,bhtcs->bhts", p[..., T:], share)


def _probabilities(q, k, short: Shortlist, scale: float):
    """Softmax over [keys | notes] `(B, H, T, T + C)`, each note's members `(B, H, T, C, T)`, log-sum-exp."""
    H = q.shape[2]
    read = memberships(short, H)
    gate = short.gate.transpose(1, 2).repeat_interleave(H // k.shape[2], dim=1)[:, :, None, None]  # (B, H, 1, 1, T)
    gates = torch.arange(short.gates_per_group, device=gate.device)
    noted = read.notes[:, :, :, None] & (gate == gates[:, None])  # (B, H, T, C, T)
    qh = at_least_float32(q).transpose(1, 2)  # (B, H, T, d)
    kh = at_least_float32(k).repeat_interleave(H // k.shape[2], dim=2).transpose(1, 2)
    count = noted.sum(-1)  # (B, H, T, C)
    share = noted.to(qh.dtype) / count.clamp(min=1)[..., None]
    note_k = torch.einsum("bhtcs,bhsd->bhtcd", share, kh)
    score = (qh @ kh.transpose(-1, -2) * scale).masked_fill(~read.direct, -torch.inf)
    note = torch.einsum("bhtd,bhtcd->bhtc", qh, note_k) * scale + count.clamp(min=1).to(qh.dtype).log()
    both = torch.cat((score, note.masked_fill(count == 0, -torch.inf)), dim=-1)
    return both.softmax(-1), share, both.logsumexp(-1)
