"""The shortlist in plain PyTorch, with matmuls large enough for a GPU's matrix units and no T x T array ever.

Near reads (window, anchors, notes) are shared by the rows of a block, so a block is one tile. Far reads become
dense by sorting: keys by (gate, position), query rows by (opened gate, position); then "the newest m keys of the
gate" is a sliding window in sorted order, and a tile of rows needs two aligned tiles of m keys. The two parts meet
through their log-sum-exp. Work runs in pieces of bounded size; under autograd a piece is recomputed in backward.

Axes: `S` streams (batch x KV group), `T` tokens, `r` rows (heads) per token and stream, `d` head dim, `N` blocks of
`b` rows, `C` gates, `n` probes, `m` ring, `Q` rows per far tile, `K` keys per far tile.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..shortlist import Shortlist, probed_counts

PIECE = 1 << 20  # scores per piece on the CPU, where a piece should stay in cache
PIECE_GPU = 1 << 26
ROWS = 1 << 19  # far rows (token, head, probe) handled at a time, unless one stream alone has more


def attend(q: Tensor, k: Tensor, v: Tensor, short: Shortlist, scale: float) -> tuple[Tensor, Tensor]:
    """Rotated q `(B, T, H, d)`, rotated k and v `(B, T, G, d)` -> out like q, log-sum-exp `(B, T, H)` float32."""
    B, T, H, d = q.shape
    G, n, C = k.shape[2], short.probes.shape[3], short.gates_per_group
    r = H // G
    qs = (q * scale).view(B, T, G, r, d).transpose(1, 2).reshape(B * G, T, r, d)
    ks, vs = (x.transpose(1, 2).reshape(B * G, T, d) for x in (k, v))
    gate = short.gate.transpose(1, 2).reshape(B * G, T)
    left = short.left.flatten(0, 1)  # (S, N, C)
    probes, counts = (x.view(B, T, G, r, n).transpose(1, 2).reshape(B * G, T, r, n)
                      for x in (short.probes, probed_counts(short)))
    step = max(1, ROWS // (T * r * max(n, 1)))
    parts = [_streams(qs[s:s + step], ks[s:s + step], vs[s:s + step], gate[s:s + step], left[s:s + step],
                      probes[s:s + step], counts[s:s + step], short) for s in range(0, B * G, step)]
    out, lse = (torch.cat(x).unflatten(0, (B, G)).transpose(1, 2).flatten(2, 3) for x in zip(*parts, strict=True))
    return out, lse


def _streams(q, k, v, gate, left, probes, counts, short: Shortlist):
    """All rows of a few streams: `(S, T, r, d)` and `(S, T, r)`."""
    C = left.shape[2]
    order = torch.where(gate < 0, C, gate).argsort(dim=1, stable=True)  # (S, T): by (gate, position)
    total = torch.zeros(len(gate), C + 1, dtype=torch.int64, device=gate.device)
    total.scatter_add_(1, torch.where(gate < 0, C, gate), torch.ones_like(gate))
    first = total.cumsum(1)[:, :C] - total[:, :C]  # (S, C): where a gate starts in sorted order
    far = _far(q, k, v, order, first, probes, counts, short.ring) if probes.shape[3] else None
    return _near(q, k, v, order, first, left, probes, far, short)


def _recomputed(function, *args):
    """Run a piece; when a gradient will be asked, drop its scores and compute them again in backward."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def _piece(q: Tensor) -> int:
    return PIECE if q.device.type == "cpu" else PIECE_GPU


# -- far: rings of opened gates ---------------------------------------------------------------------------------


def _far(q, k, v, order, first, probes, counts, m):
    """Attention of every (row, probe) over its ring: out `(S, T, r, n, d)`, lse `(S, T, r, n)`; -inf where empty."""
    S, T, r, n = probes.shape
    d, C = q.shape[3], first.shape[1]
    K = max(m, 16)
    begin = (counts - m).clamp(min=0)  # first ring key, counted inside the gate
    tile = begin // K  # the ring lies in key tiles `tile` and `tile + 1` of its gate
    stream = torch.arange(S, device=q.device).view(S, 1, 1, 1)
    home = (stream * C + probes.clamp(min=0)) * (T // K + 2) + tile
    rows = (counts.flatten() > 0).nonzero()[:, 0]
    if not len(rows):
        return q.new_zeros(S, T, r, n, d), q.new_full((S, T, r, n), -torch.inf, dtype=torch.float32)
    home = home.flatten()[rows]
    rank = home.argsort(stable=True)
    rows, home = rows[rank], home[rank]
    place, tile_home, Q = _pack(home, target=min(256, max(32, r * n * K)))
    tiles = len(tile_home)
    row_of = rows.new_zeros(tiles * Q).scatter_(0, place, rows)  # empty slots repeat row 0 and are never read back
    gate_row = (tile_home // (T // K + 2))
    start = tile_home % (T // K + 2) * K  # (tiles,) first key of the pair of key tiles, inside the gate
    key_at = (first.flatten()[gate_row] + start)[:, None] + torch.arange(2 * K, device=q.device)
    key_of = order.flatten()[(gate_row // C * T)[:, None] + key_at.clamp(max=T - 1)] + (gate_row // C * T)[:, None]
    low = (begin.flatten()[row_of].view(tiles, Q) - start[:, None])
    high = (counts.flatten()[row_of].view(tiles, Q) - start[:, None])
    q2, k2, v2 = q.reshape(S * T * r, d), k.reshape(S * T, d), v.reshape(S * T, d)
    step = max(1, _piece(q) // (Q * 2 * K))
    parts = [_recomputed(_ring_tile, q2, k2, v2, row_of.view(tiles, Q)[i:i + step] // n, key_of[i:i + step],
                         low[i:i + step], high[i:i + step]) for i in range(0, tiles, step)]
    out, lse = (torch.cat(x).flatten(0, 1) for x in zip(*parts, strict=True))
    back = torch.full((S * T * r * n,), -1, device=q.device).scatter_(0, rows, place)
    missing = back < 0
    out = out.index_select(0, back.clamp(min=0)).masked_fill(missing[:, None], 0)
    lse = lse.index_select(0, back.clamp(min=0)).masked_fill(missing, -torch.inf)
    return out.view(S, T, r, n, d), lse.view(S, T, r, n)


def _pack(home: Tensor, target: int) -> tuple[Tensor, Tensor, int]:
    """Cut runs of equal `home` (sorted) into tiles of Q slots: each row's slot, each tile's home, Q."""
    homes, run = home.unique_consecutive(return_counts=True)
    Q = min(target, 1 << (int(run.max()) - 1).bit_length())
    tiles = (run + Q - 1) // Q
    tile_first = tiles.cumsum(0) - tiles
    run_first = run.cumsum(0) - run
    index = torch.arange(len(home), device=home.device)
    which = torch.repeat_interleave(torch.arange(len(homes), device=home.device), run)
    inside = index - run_first[which]
    return tile_first[which] * Q + inside, torch.repeat_interleave(homes, tiles), Q


def _ring_tile(q, k, v, row_of, key_of, low, high):
    """Tiles of rows over tiles of keys; a row reads keys [low, high) of its tile."""
    qt = q.index_select(0, row_of.flatten()).view(*row_of.shape, -1)  # (tiles, Q, d)
    kt, vt = (x.index_select(0, key_of.flatten()).view(*key_of.shape, -1) for x in (k, v))  # (tiles, 2K, d)
    at = torch.arange(key_of.shape[1], device=q.device)
    seen = (at >= low[..., None]) & (at < high[..., None])
    score = torch.bmm(qt, kt.transpose(1, 2)).float().masked_fill(~seen, -torch.inf)
    top = score.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    p = (score - top).exp()
    mass = p.sum(-1, keepdim=True).clamp(min=1e-30)
    out = torch.bmm(p.to(v.dtype), vt) / mass.to(v.dtype)
    return out, (top + mass.log())[..., 0]


# -- near: window, anchors and notes, one tile per block ----------------------------------------------------------


def _near(q, k, v, order, first, left, probes, far, short: Shortlist):
    """Near reads of every row merged with the far ones: out `(S, T, r, d)`, lse `(S, T, r)` float32."""
    S, T, r, d = q.shape
    b, w = short.block, short.window
    N = left.shape[1]
    pad = N * b - T
    qb, pb = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, pad)).view(S, N, b, *x.shape[2:]) for x in (q, probes))
    kw, vw = (torch.nn.functional.pad(x, (0, 0, w, pad)) for x in (k, v))
    far = None if far is None else tuple(
        torch.nn.functional.pad(x, (0,) * (2 * x.dim() - 4) + (0, pad)).view(S, N, b, *x.shape[2:]) for x in far)
    sums = _running_sums(k, v, order) if short.notes else None
    step = max(1, _piece(q) // (S * b * r * (w + b + short.anchors + 2 * first.shape[1] * short.notes)))
    parts = []
    for i in range(0, N, step):
        cut = slice(i, i + step)
        span = slice(i * b, min(i + step, N) * b + w)
        parts.append(_recomputed(_block_tile, qb[:, cut], kw[:, span], vw[:, span], k[:, :short.anchors],
                                 v[:, :short.anchors], sums, first, left[:, cut], pb[:, cut],
                                 *((x[:, cut] for x in far) if far else (None, None)), i, short))
    out, lse = (torch.cat(x, dim=1).flatten(1, 2)[:, :T] for x in zip(*parts, strict=True))
    return out, lse


def _running_sums(k: Tensor, v: Tensor, order: Tensor) -> Tensor:
    """Prefix sums of [k, v] in (gate, position) order, `(S, T + 1, 2 d)`.

    float64 where the device has it: a note is the difference of two sums, and what other gates hold must not
    leave a trace in it.
    """
    S, T, d = k.shape
    kv = torch.cat((k, v), dim=-1).gather(1, order[..., None].expand(-1, -1, 2 * d))
    kv = kv.to(torch.float32 if k.device.type == "mps" else torch.float64)
    return torch.nn.functional.pad(kv.cumsum(1), (0, 0, 1, 0))


def _note_means(sums, first, until):
    """Mean key and value of the first `until` (S, N, C) keys of every gate: `(S, N, C, d)` twice."""
    S, T1, d2 = sums.shape
    base = torch.arange(S, device=sums.device)[:, None] * T1 + first  # (S, C)
    flat = sums.reshape(S * T1, d2)
    start = flat.index_select(0, base.flatten()).view(S, 1, -1, d2)
    stop = flat.index_select(0, (base[:, None] + until).flatten()).view(*until.shape, d2)
    mean = (stop - start) / until.clamp(min=1)[..., None]
    return mean.chunk(2, dim=-1)


def _block_tile(q, kw, vw, ka, va, sums, first, left, probes, far_out, far_lse, offset, short: Shortlist):
    """One tile per block: q `(S, N, b, r, d)` over its window, the anchors and the notes, merged with the rings."""
    S, N, b, r, d = q.shape
    w = short.window
    rows = q.reshape(S * N, b * r, d)
    edge = (torch.arange(offset, offset + N, device=q.device) * b - w)  # (N,) first key in each block's window
    keys = [kw.unfold(1, w + b, b).movedim(-1, -2)]
    values = [vw.unfold(1, w + b, b).movedim(-1, -2)]
    at = torch.arange(w + b, device=q.device)
    causal = at[None] <= torch.arange(b, device=q.device)[:, None] + w  # (b, w + b)
    local = causal & (at >= -edge[:, None, None])  # (N, b, w + b): not before the text's start
    bias = [_as_bias(local[None, :, :, None].expand(S, N, b, r, w + b))]
    if short.anchors:
        keys.append(ka[:, None].expand(S, N, *ka.shape[1:]))
        values.append(va[:, None].expand(S, N, *va.shape[1:]))
        old = torch.arange(ka.shape[1], device=q.device) < edge[:, None]  # (N, anchors): out of the window
        bias.append(_as_bias(old[None, :, None, None].expand(S, N, b, r, ka.shape[1])))
    if short.notes:
        opened = torch.zeros(S, N, b, r, left.shape[2] + 1, dtype=torch.bool, device=q.device)
        opened.scatter_(-1, torch.where(probes < 0, left.shape[2], probes), True)
        opened = opened[..., :-1]
        for until, mine in ((left, ~opened), ((left - short.ring).clamp(min=0), opened)):
            note_k, note_v = _note_means(sums, first, until)
            keys.append(note_k.to(q.dtype))
            values.append(note_v.to(q.dtype))
            weight = until.float().log()[:, :, None, None]  # log(0) = -inf: an empty note is not read
            bias.append(weight.where(mine, -torch.inf))
    keys, values = (torch.cat(x, dim=2).flatten(0, 1) for x in (keys, values))  # (S N, keys, d)
    score = torch.bmm(rows, keys.transpose(1, 2)).float() + torch.cat(bias, dim=-1).view(S * N, b * r, -1)
    top = score.detach().amax(-1, keepdim=True)
    p = (score - top).exp()
    mass = p.sum(-1, keepdim=True)
    lse = (top + mass.log()).view(S, N, b, r)
    out = (torch.bmm(p.to(values.dtype), values) / mass.to(values.dtype)).view(S, N, b, r, d)
    if far_out is None:
        return out.flatten(2, 2), lse
    both = torch.cat((lse[..., None], far_lse), dim=-1)
    merged = both.logsumexp(-1)
    share = (both - merged[..., None]).exp().to(out.dtype)
    out = share[..., :1] * out + torch.einsum("...n,...nd->...d", share[..., 1:], far_out)
    return out, merged


def _as_bias(mask: Tensor) -> Tensor:
    return torch.zeros((), device=mask.device).where(mask, -math.inf)
