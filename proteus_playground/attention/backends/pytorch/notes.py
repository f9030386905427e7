"""Notes and anchors: the keys that a block of rows reads besides its window and its rings.

Axes: `B` batch, `T` tokens, `G` KV groups, `r` heads per group, `d` head dim, `N` blocks of `b` rows per sequence,
`U` blocks of all sequences in a row, `C` gates, `n` probes, `e` notes that a row reads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...precision import wide_dtype
from ...shortlist import Shortlist
from .keys import SortedKeys, running_means
from .tile import attend_tile, take_rows


class Notes:
    """Notes and anchors of every block: rows of the table of means, and the bias of each. In columns:

        0           dummy: has no weight, but keeps the softmax defined
        1 .. A      anchors
        A + 1       scratch
        next C      notes ALL, for rows that did not open the gate
        next C      notes REST (less the ring), for rows that did; missing where rows have lists of notes

    With lists of notes a row reads those of the gates in its list, which it did not open; without, those of all gates.
    The scratch column receives writes for places of a list that hold no gate. The bias of a note is log(count) less a
    whole number near the largest, so that half precision holds it well.
    """

    def __init__(self, kv: Tensor, keys: SortedKeys | None, short: Shortlist):
        B, T, G, width = kv.shape
        N, A = short.retired.shape[2], min(short.anchors, T)
        device, wide, self.d, self.anchors = kv.device, wide_dtype(kv.dtype), width // 2, A
        anchors = kv[:, :A].reshape(-1, width)
        self.every = short.noted is None
        reads_notes = self.every or short.noted.shape[3] > 0
        self.means = running_means(keys, anchors) if reads_notes else pad(anchors, (0, 0, 1, 0))
        none = len(self.means) - len(anchors) - 1  # the row of zeros
        edge = torch.arange(N, device=device) * short.block - short.window  # first key in the window, by tick
        at = torch.arange(A, device=device)
        anchor = none + 1 + (torch.arange(B, device=device)[:, None] * A + at)[:, None] * G
        anchor = (anchor + torch.arange(G, device=device)[:, None])[:, None].expand(B, N, G, A)
        unread = torch.full((B, N, G, 1), -torch.inf, dtype=wide, device=device)
        nothing = torch.full_like(unread, torch.finfo(kv.dtype).min / 4)
        retired = short.retired.transpose(1, 2)  # (B, N, G, C)
        top = retired.amax(-1, keepdim=True).clamp(min=1).to(wide).log().round()
        seen = torch.where(at < edge[:, None], 0.0, -torch.inf)[None, :, None] - top
        rows, bias = [unread.new_full((B, N, G, 1), none), anchor], [nothing, seen]
        self.size = None
        if reads_notes:
            newest = keys.newest
            sizes = [unread, retired.to(wide).log() - top]
            closed = torch.full_like(sizes[1], -torch.inf)
            rows += [newest.new_full((B, N, G, 1), none), newest]
            bias += [unread, sizes[1] if self.every else closed]
            if self.every:
                beyond = (retired - short.ring).clamp(min=0)
                sizes.append(beyond.to(wide).log() - top)
                rows.append((newest - short.ring).where(beyond > 0, none))
                bias.append(closed)
            self.size = torch.cat(sizes, dim=-1).to(kv.dtype).flatten(0, 1)  # (B N, G, 1 + C or 2 C)
        cols = sum(x.shape[-1] for x in rows)
        self.rows = pad(torch.cat([x.int() for x in rows], dim=-1), (0, -cols % 8), value=none).flatten(0, 1)
        self.bias = pad(torch.cat(bias, dim=-1), (0, -cols % 8), value=-torch.inf).to(kv.dtype).flatten(0, 1)
        self.top = top.flatten(0, 1)
        self.columns = self.rows.shape[-1]

    def attend(self, cut: slice, tiles: Tensor, opened: Tensor, noted: Tensor | None, scale: float):
        """Attention of tiles `(U, G, b r, d)` over notes and anchors: out and lse.

        opened and noted: `(U, b, G, r, n or e)`, 0 for none, else 1 more than the gate; no gate is in both.
        """
        U, b, G, r = opened.shape[:4]
        kv = take_rows(self.means, self.rows[cut])  # (U, G, columns, 2 d)
        bias = self.bias[cut][:, :, None, None]
        bias = bias.expand(U, G, b, r, bias.shape[-1]).contiguous()
        if self.size is not None:
            sizes = self.size[cut][:, :, None, None].expand(U, G, b, r, -1)
            half, first = self.size.shape[-1] // 2, 1 + self.anchors
            if noted is None:  # every note ALL is read, but REST of opened gates
                column = torch.where(opened > 0, opened + half, 0).transpose(1, 2)
                bias.scatter_(-1, opened.transpose(1, 2) + first, -torch.inf)
            else:
                column = noted.transpose(1, 2)
            bias.scatter_(-1, column + first, sizes.gather(-1, column))
        d = self.d
        out, lse = attend_tile(tiles, kv[..., :d], kv[..., d:], bias.view(*tiles.shape[:3], -1), scale)
        return out, lse + self.top[cut]
