"""The rows of new tokens, read from a bank that holds them already. All belong to one block, so they share a tick.

Axes: `B` sequences, `H` query heads, `G` KV groups, `r = H / G`, `C` gates per group, `d` head dim, `m` ring,
`n` probes, `e` notes, `t` new tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shortlist import choose_gates
from .slots import Keys, Slots, as_read


def dense_row(bank: Slots, q: Tensor) -> Tensor:
    """Rows of rotated q `(B, t, H, d)` over all keys of a dense cache."""
    rows = bank.rows[:, :, : bank.tokens]
    tile = _by_group(q, rows.shape[1]).to(rows.dtype)
    out = F.scaled_dot_product_attention(tile, *rows.unbind(3), attn_mask=_seen(bank, q, bank.tokens), scale=bank.scale)
    return _by_token(out, q).to(q.dtype)


def sparse_row(bank: Slots, q: Tensor, rotated: Tensor) -> Tensor:
    """Rows of q `(B, t, H, d)`: one softmax over window and anchors, rings of opened gates, and notes."""
    G, direct = bank.token.shape[1], bank.anchors + bank.window
    tile = _by_group(rotated, G).to(bank.sums.dtype) * bank.scale  # (B, G, t r, d)
    scales = bank.scales[:, :, :direct] if bank.int8 else None
    window = as_read(Keys(bank.rows[:, :, :direct], scales, None, None))
    parts = [(tile @ window[..., 0, :].mT).masked_fill(~_seen(bank, q, direct), -torch.inf)]
    chosen = choose_gates(q, bank.gates, bank.budget, bank.retired[:, :, None], q.shape[1])
    opened, noted = (None if x is None else _by_group(x, G) for x in chosen)  # (B, G, t r, n or e)
    if bank.ring:
        first = direct + opened[..., None] * bank.ring + torch.arange(bank.ring, device=q.device)
        slot = torch.where(opened[..., None] < 0, bank.scratch, first)  # (B, G, t r, n, m)
        keys = bank.keys_at(slot.flatten(2))
        ring = as_read(keys).unflatten(2, (tile.shape[2], -1))  # (B, G, t r, n m, 2, d)
        score = _scores(tile, ring)
        parts.append(score.masked_fill(keys.token.view_as(score) < 0, -torch.inf))
    some = bank.notes and noted is not None
    if some:
        notes, held = _notes_of(bank, noted)
        score = _scores(tile, notes) / held + held.log()
        parts.append(score.masked_fill(noted < 0, -torch.inf))
    elif bank.notes:
        notes, held = bank.sums.flatten(2, 3), _held(bank)
        score = tile @ notes[..., 0, :].mT / held.clamp(min=1) + held.log()
        parts.append(score.masked_fill(~_read_notes(opened, score), -torch.inf))
    weight = torch.cat(parts, dim=-1).softmax(-1).split([x.shape[-1] for x in parts], dim=-1)
    out = weight[0] @ window[..., 1, :]
    if bank.ring:
        out += _mixed(weight[1], ring)
    if some:
        out += _mixed(weight[-1] / held, notes)
    elif bank.notes:
        out += (weight[-1] / held.clamp(min=1)) @ notes[..., 1, :]
    return _by_token(out, q).to(q.dtype)


def _scores(tile: Tensor, own: Tensor) -> Tensor:
    """Products of rows `(..., d)` with keys of their own: own `(..., n, 2, d)` -> `(..., n)`."""
    return (own[..., 0, :] @ tile[..., None])[..., 0]


def _mixed(weight: Tensor, own: Tensor) -> Tensor:
    """Sums of each row's own values, weighted: `(..., n)` and `(..., n, 2, d)` -> `(..., d)`."""
    return (weight[..., None, :] @ own[..., 1, :])[..., 0, :]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """`(B, t, H, ...)` -> `(B, G, t r, ...)`."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)


def _by_token(x: Tensor, like: Tensor) -> Tensor:
    """`(B, G, t r, d)` -> `(B, t, H, d)`."""
    return x.unflatten(2, (like.shape[1], -1)).transpose(1, 2).flatten(2, 3)


def _seen(bank: Slots, q: Tensor, slots: int) -> Tensor:
    """Mask of the first `slots` slots: those that hold a key no newer than the row, `(B, G, t r or 1, slots)`."""
    t, token = q.shape[1], bank.token[:, :, None, :slots]
    if t == 1:
        return token >= 0
    row = bank.seen[:, None] - t + torch.arange(t, device=token.device)  # (B, t)
    row = row.repeat_interleave(q.shape[2] // bank.token.shape[1], dim=1)
    return (token >= 0) & (token <= row[:, None, :, None])


def _notes_of(bank: Slots, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of all keys and values of the gates `gate` `(B, G, t r, e)`, -1 for none: `(B, G, t r, e, 2, d)`. And how
    many keys they hold, `(B, G, t r, e)`, at least 1."""
    B, G, C = bank.retired.shape
    group = torch.arange(B * G, device=gate.device).view(B, G, 1, 1)
    gate = gate.clamp(min=0)
    held = bank.retired.flatten()[gate + group * C].clamp(min=1).to(bank.sums.dtype)
    return bank.sums.flatten(0, 3)[gate + group * (2 * C)], held


def _held(bank: Slots) -> Tensor:
    """Number of keys in each sum, `(B, G, 1, 2 C)` float32: ALL of every gate, then REST."""
    return torch.cat((bank.retired, (bank.retired - bank.ring).clamp(min=0)), dim=-1)[:, :, None].to(bank.sums.dtype)


def _read_notes(opened: Tensor, score: Tensor) -> Tensor:
    """Mask of the notes that rows read where they read all, like `score`; two notes are kept per gate.

    opened: `(B, G, t r, n)`, -1 for none. A row that opened the gate reads its ring one by one and so REST (keys beyond
    the ring); every other row reads ALL.
    """
    C = score.shape[-1] // 2
    marks = torch.zeros(*score.shape[:-1], C + 1, dtype=torch.bool, device=score.device)
    is_open = marks.scatter_(-1, opened.masked_fill(opened < 0, C), True)[..., :C]
    return torch.cat((~is_open, is_open), dim=-1)
