"""What one query row reads, key by key: for display, at the cost of one head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.checks import whole_number
from .backends.reference import memberships
from .budget import Budget
from .functional import check_inputs, prepare
from .gates import Gates

# How a key reaches a row: not at all, in its window, as an anchor, in the ring of a gate it opened, through a note.
UNSEEN, LOCAL, ANCHOR, DNA, NOTE = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class RowReads:
    """What one row reads. Attention on a note is divided evenly among its members."""

    kind: np.ndarray  # (T,) uint8: UNSEEN, LOCAL, ANCHOR, DNA or NOTE
    weight: np.ndarray  # (T,) float32, sums to 1 unless the token was dropped
    gates_opened: tuple[int, ...]
    notes_read: int


def row_reads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    budget: Budget,
    *,
    token: int,
    head: int,
    batch: int = 0,
    inv_freq: Tensor | None,
    positions: Tensor | None = None,
    keep: Tensor | None = None,
    scale: float | None = None,
) -> RowReads:
    """What row (token, head) reads. Arguments as in `proteus_attention`; `token` in [0, T), `head` in [0, H)."""
    check_inputs(q, k, v, gates, positions, keep, None, inv_freq)
    for name, value, size in (("token", token, q.shape[1]), ("head", head, q.shape[2]), ("batch", batch, q.shape[0])):
        whole_number(name, value, 0, size - 1)
    T, group = q.shape[1], head // (q.shape[2] // gates.n_groups)
    if positions is not None and positions.dim() == 2:
        positions = positions[batch]
    one = slice(batch, batch + 1)
    with torch.no_grad():
        # Only this head and its group: shortlists of other heads are not needed.
        ready = prepare(
            q[one, :, head : head + 1],
            k[one, :, group : group + 1],
            v[one, :, group : group + 1],
            gates.group(group),
            budget,
            inv_freq=inv_freq,
            positions=positions,
            keep=None if keep is None else keep[one],
        )
        kind, weight = np.zeros(T, np.uint8), np.zeros(T, np.float32)
        at, where = token, np.arange(T)
        if ready.index is not None:
            where = ready.index[0, : int(ready.length[0])].cpu().numpy()
            if token not in where:
                return RowReads(kind, weight, (), 0)
            at = int(np.flatnonzero(where == token)[0])
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        codes, share, opened, notes = _row(ready, at, scale)
    kind[where[: at + 1]], weight[where[: at + 1]] = codes.cpu().numpy(), share.cpu().numpy()
    return RowReads(kind, weight, opened, notes)


def _row(ready, at: int, scale: float):
    """Codes and weights of keys 0..at, the gates opened and the number of notes, in kept-token order."""
    short = ready.short
    keys = ready.k[0, : at + 1, 0].float()
    score = keys @ ready.q[0, at, 0].float() * scale
    code = torch.full((at + 1,), LOCAL, dtype=torch.uint8, device=score.device)
    if short is None:
        return code, score.softmax(0), (), 0
    gate = short.gate[0, : at + 1, 0]
    opened = tuple(int(c) for c in short.probes[0, at, 0].tolist() if c >= 0)
    read = memberships(short, 1, torch.tensor([at], device=code.device))
    code[:] = UNSEEN
    for kind, mask in ((LOCAL, read.window), (ANCHOR, read.anchors), (DNA, read.rings), (NOTE, read.notes)):
        code[mask[0, 0, 0, : at + 1]] = kind
    direct = read.direct[0, 0, 0, : at + 1]
    noted = (code == NOTE).nonzero()[:, 0]
    homes, member = gate[noted].unique(return_inverse=True)
    size = torch.bincount(member, minlength=len(homes)).float()
    mean = torch.zeros(len(homes), keys.shape[1], device=keys.device).index_add_(0, member, keys[noted])
    note = (mean / size[:, None]) @ ready.q[0, at, 0].float() * scale + size.log()
    both = torch.cat((score.masked_fill(~direct, -torch.inf), note)).softmax(0)
    share = both[: at + 1].clone()
    share[noted] = (both[at + 1 :] / size)[member]
    return code, share, opened, len(homes)
