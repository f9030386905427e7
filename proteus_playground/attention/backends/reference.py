"""The oracle: every membership rule spelled out on a T x T mask. Small T only; nothing here is fast.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `C` gates per group, `d` head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..shortlist import Shortlist


def memberships(short: Shortlist, heads: int) -> tuple[Tensor, Tensor]:
    """Who reads what: `direct` (B, H, T, T) bool, keys read one by one; `noted` (B, H, T, C, T) bool, members of
    each gate's note."""
    B, T, G = short.gate.shape
    C = short.gates_per_group
    r = heads // G
    row, key = torch.arange(T)[:, None], torch.arange(T)[None, :]
    row, key = row.to(short.gate.device), key.to(short.gate.device)
    start = row // short.block * short.block
    gone = key < start - short.window  # (T, T): the key has left the row's window
    local = (key <= row) & ~gone
    anchor = (key < short.anchors) & (key <= row)
    gate = short.gate.permute(0, 2, 1).repeat_interleave(r, dim=1)  # (B, H, T)
    hot = gate[..., None] == torch.arange(C, device=gate.device)  # (B, H, T, C)
    in_gate = hot.movedim(-1, -2)[:, :, None] & gone[:, None, :]  # (B, H, T, C, T): left keys by gate
    newer = in_gate.flip(-1).cumsum(-1).flip(-1) - in_gate.long()  # how many newer left keys share the gate
    opened = (short.probes.movedim(2, 1)[..., None] == torch.arange(C, device=gate.device)).any(3)  # (B, H, T, C)
    ring = in_gate & (newer < short.ring) & opened[..., None]
    noted = in_gate & ~ring if short.notes else torch.zeros_like(in_gate)
    return local | anchor | ring.any(3), noted


def attend(q: Tensor, k: Tensor, v: Tensor, short: Shortlist, scale: float) -> tuple[Tensor, Tensor]:
    """Rotated q `(B, T, H, d)`, rotated k and v `(B, T, G, d)` -> out like q, log-sum-exp `(B, T, H)` float32."""
    p, share, lse = _probabilities(q, k, short, scale)
    vh = v.float().repeat_interleave(q.shape[2] // k.shape[2], dim=2).transpose(1, 2)
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
    direct, noted = memberships(short, H)
    qh = q.float().transpose(1, 2)  # (B, H, T, d)
    kh = k.float().repeat_interleave(H // k.shape[2], dim=2).transpose(1, 2)
    count = noted.sum(-1)  # (B, H, T, C)
    share = noted.float() / count.clamp(min=1)[..., None]
    note_k = torch.einsum("bhtcs,bhsd->bhtcd", share, kh)
    score = (qh @ kh.transpose(-1, -2) * scale).masked_fill(~direct, -torch.inf)
    note = torch.einsum("bhtd,bhtcd->bhtc", qh, note_k) * scale + count.clamp(min=1).log()
    both = torch.cat((score, note.masked_fill(count == 0, -torch.inf)), dim=-1)
    return both.softmax(-1), share, both.logsumexp(-1)
