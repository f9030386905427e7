"""The shortlist in plain PyTorch, with matmuls large enough for a GPU's matrix units and no T x T array ever.

Near reads (window, anchors, notes) are shared by the rows of a block, so a block is one tile. Far reads become
dense by sorting: keys by (gate, position), query rows by (opened gate, position); then "the newest m keys of the
gate" is a sliding window in sorted order, and a tile of rows reads the short span of keys its rows need. The two parts
meet through their log-sum-exp. Work runs in pieces of bounded size; under autograd a piece is recomputed in backward.

Axes: `S` streams (batch x KV group), `T` tokens, `r` rows (heads) per token and stream, `d` head dim, `N` blocks of
`b` rows, `C` gates, `n` probes, `m` ring, `Q` rows per far tile, `K` keys per far tile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ..shortlist import Shortlist, probed_counts

PIECE = 1 << 18  # scores per piece on the CPU, where a piece should stay in cache
PIECE_LARGE = 1 << 24  # on a GPU, and in training, where every piece costs one gradient buffer
ROWS = 1 << 19  # far rows (token, head, probe) handled at a time, unless one stream alone has more


def attend(q: Tensor, k: Tensor, v: Tensor, short: Shortlist, scale: float) -> tuple[Tensor, Tensor]:
    """Rotated q `(B, T, H, d)`, rotated k and v `(B, T, G, d)` -> out like q, log-sum-exp `(B, T, H)` float32."""
    B, T, H, d = q.shape
    G, n = k.shape[2], short.probes.shape[3]
    r = H // G
    qs = q.view(B, T, G, r, d).transpose(1, 2).flatten(0, 1)  # (S, T, r, d), a view when B is 1
    ks, vs = (x.transpose(1, 2).flatten(0, 1) for x in (k * scale, v))
    gate = short.gate.transpose(1, 2).flatten(0, 1)
    left = short.left.flatten(0, 1)  # (S, N, C)
    probes, counts = (x.view(B, T, G, r, n).transpose(1, 2).flatten(0, 1) for x in (short.probes, probed_counts(short)))
    step = max(1, ROWS // (T * r * max(n, 1)))
    cuts = [slice(s, s + step) for s in range(0, B * G, step)]
    parts = (_streams(*(x[cut].contiguous() for x in (qs, ks, vs, gate, left, probes, counts)), short) for cut in cuts)
    if torch.is_grad_enabled():
        return tuple(torch.cat(x).unflatten(0, (B, G)).transpose(1, 2).flatten(2, 3) for x in zip(*parts, strict=True))
    out, lse = q.new_empty(B, T, G, r, d), q.new_empty(B, T, G, r, dtype=torch.float32)
    for cut, part in zip(cuts, parts, strict=True):
        for s, one_out, one_lse in zip(range(B * G)[cut], *part, strict=True):
            out[s // G, :, s % G], lse[s // G, :, s % G] = one_out, one_lse
    return out.flatten(2, 3), lse.flatten(2, 3)


def _streams(q, k, v, gate, left, probes, counts, short: Shortlist):
    """All rows of a few streams: `(S, T, r, d)` and `(S, T, r)`."""
    C = left.shape[2]
    home = torch.where(gate < 0, C, gate)
    order = home.argsort(dim=1, stable=True)  # (S, T): by (gate, position)
    total = torch.zeros(len(gate), C + 1, dtype=torch.int64, device=gate.device)
    total.scatter_add_(1, home, torch.ones_like(home))
    first = total.cumsum(1)[:, :C] - total[:, :C]  # (S, C): where a gate starts in sorted order
    far = _far(q, k, v, order, first, probes, counts, short.ring) if probes.shape[3] else None
    return _near(q, k, v, order, gate, left, probes, far, short)


def _recomputed(function, *args):
    """Run a piece; when a gradient will be asked, drop its scores and compute them again in backward."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def _piece(q: Tensor) -> int:
    return PIECE if q.device.type == "cpu" and not torch.is_grad_enabled() else PIECE_LARGE


def _join(parts, size: int, dim: int):
    """Concatenate pairs of pieces along `dim`; without autograd each is copied home at once and its memory reused."""
    if torch.is_grad_enabled():
        return tuple(torch.cat(x, dim=dim) for x in zip(*parts, strict=True))
    whole, at = None, 0
    for pair in parts:
        if pair[0].shape[dim] == size:
            return pair
        if whole is None:
            whole = tuple(x.new_empty(*x.shape[:dim], size, *x.shape[dim + 1 :]) for x in pair)
        for home, x in zip(whole, pair, strict=True):
            home.narrow(dim, at, x.shape[dim]).copy_(x)
        at += pair[0].shape[dim]
    return whole


# -- far: rings of opened gates ---------------------------------------------------------------------------------


def _far(q, k, v, order, first, probes, counts, m):
    """Attention of every (row, probe) over its ring, in tile order: out `(X, d)`, lse `(X,)`, and where each row's
    result lies, `(S, T, r, n)`, X where its ring is empty. None when every ring is."""
    S, T, r, n = probes.shape
    d, C, device = q.shape[3], first.shape[1], q.device
    rows = (counts.flatten() > 0).nonzero()[:, 0]
    if not len(rows):
        return None
    K = max(16, m // 2)
    columns = T // K + 1  # key tiles a gate can have
    stream = torch.arange(S, device=device).view(S, 1, 1, 1)
    home = (stream * C + probes.clamp(min=0)) * columns + (counts - 1).clamp(min=0) // K  # tile of the newest key
    rank = home.flatten()[rows].argsort(stable=True)
    rows = rows[rank]
    target = 64 if device.type == "cpu" else max(32, min(128, r * n * K))
    place, tile_home, Q = _pack(home.flatten()[rows], target)
    tiles = len(tile_home)
    row_of = rows.new_zeros(tiles * Q).scatter_(0, place, rows).view(tiles, Q)  # spare slots repeat a row, unread
    gate, column = tile_home // columns, tile_home % columns
    start = (column * K + 1 - m).clamp(min=0)  # first key any row of the tile may read, inside the gate
    high = counts.flatten()[row_of] - start[:, None]  # (tiles, Q) each row reads [high - m, high)
    filled = torch.zeros(tiles * Q, dtype=torch.bool, device=device).index_fill_(0, place, True).view(tiles, Q)
    high = high.masked_fill(~filled, 0)
    width, by_width = ((high.amax(1) + 15) // 16 * 16).sort()  # whole vectors: matmuls run faster on round widths
    order = order + torch.arange(S, device=device)[:, None] * T  # key rows over all streams
    base = gate // C * T + first.flatten()[gate] + start
    q2, k2, v2 = q.reshape(S * T * r, d), k.reshape(S * T, d), v.reshape(S * T, d)

    def pieces():
        widths, at = width.tolist(), 0
        while at < tiles:
            step = max(1, _piece(q) // (Q * widths[min(at + 64, tiles - 1)]))
            cut = by_width[at : at + step]
            near = base[cut][:, None] + torch.arange(widths[min(at + step, tiles) - 1], device=device)
            yield _recomputed(
                _ring_tile, q2, k2, v2, row_of[cut] // n, order.flatten()[near.clamp(max=S * T - 1)], high[cut], m
            )
            at += step

    out, lse = _join(pieces(), tiles, 0)
    slot = torch.empty_like(by_width).scatter_(0, by_width, torch.arange(tiles, device=device))
    place = slot[place // Q] * Q + place % Q
    back = torch.full((S * T * r * n,), tiles * Q, device=device).scatter_(0, rows, place)
    return out.flatten(0, 1), lse.flatten(), back.view(S, T, r, n)


def _pack(home: Tensor, target: int) -> tuple[Tensor, Tensor, int]:
    """Cut runs of equal `home` (sorted) into tiles of Q slots: each row's slot, each tile's home, Q."""
    homes, run = home.unique_consecutive(return_counts=True)
    Q = min(target, 1 << (int(run.max()) - 1).bit_length())
    tiles = (run + Q - 1) // Q
    tile_first = tiles.cumsum(0) - tiles
    run_first = run.cumsum(0) - run
    which = torch.repeat_interleave(torch.arange(len(homes), device=home.device), run)
    inside = torch.arange(len(home), device=home.device) - run_first[which]
    return tile_first[which] * Q + inside, torch.repeat_interleave(homes, tiles), Q


def _ring_tile(q, k, v, row_of, key_of, high, m):
    """Tiles of rows over tiles of keys; a row reads keys [high - m, high) of its tile."""
    qt = q.index_select(0, row_of.flatten()).view(*row_of.shape, -1)  # (tiles, Q, d)
    kt, vt = (x.index_select(0, key_of.flatten()).view(*key_of.shape, -1) for x in (k, v))  # (tiles, width, d)
    at, high = torch.arange(key_of.shape[1], dtype=torch.int32, device=q.device), high.int()[..., None]
    seen = (at >= high - m) & (at < high)
    return _attend_tile(qt, kt, vt, torch.where(seen, 0.0, -torch.inf))


def _attend_tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of tiles, `(N, M, d)` over `(N, K, d)` with bias `(N, M, K)`: out, float32 lse `(N, M)`.

    Without autograd a CPU has a fused kernel for this, in two thirds of the time; it is not public, and
    the lines below are what it computes. A row that reads nothing gives no meaningful output.
    """
    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if fused and q.device.type == "cpu" and q.dtype == torch.float32 and not torch.is_grad_enabled():
        out, lse = fused(q[:, None], k[:, None], v[:, None], attn_mask=bias[:, None], scale=1.0)
        return out[:, 0], lse[:, 0]
    score = torch.bmm(q, k.transpose(1, 2)).float() + bias
    top = score.detach().amax(-1, keepdim=True).clamp_(min=-1e30)
    p = score.sub_(top).exp_()
    mass = p.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.bmm((p / mass).to(v.dtype), v), (top + mass.log())[..., 0]


# -- near: window, anchors and notes, one tile per block ----------------------------------------------------------


def _near(q, k, v, order, gate, left, probes, far, short: Shortlist):
    """Near reads of every row merged with the far ones: out `(S, T, r, d)`, lse `(S, T, r)` float32."""
    S, T, r, d = q.shape
    b, w, N, C = short.block, short.window, left.shape[1], left.shape[2]
    end = N * b - T

    def by_block(x):  # (S, T, ...) -> (S, N, b, ...)
        return (pad(x, (0, 0) * (x.dim() - 2) + (0, end)) if end else x).view(S, N, b, *x.shape[2:])

    qb, pb = by_block(q), by_block(probes)
    kw, vw = (pad(x, (0, 0, w, end)) for x in (k, v))
    far_out, far_lse, back = (None, None, None) if far is None else (*far[:2], by_block(far[2]))
    notes = _Notes(k, v, order, gate, left, short) if short.notes else None
    step = max(1, _piece(q) // (S * b * r * (w + b + short.anchors + 2 * C * short.notes)))

    def pieces():
        for i in range(0, N, step):
            cut, span = slice(i, i + step), slice(i * b, min(i + step, N) * b + w)
            means = notes.advance(i, min(i + step, N)) if notes else None
            yield _recomputed(
                _block_tile,
                qb[:, cut],
                kw[:, span],
                vw[:, span],
                k[:, : short.anchors],
                v[:, : short.anchors],
                means,
                left[:, cut],
                pb[:, cut],
                far_out,
                far_lse,
                None if back is None else back[:, cut],
                i,
                short,
            )

    return tuple(x.flatten(1, 2)[:, :T] for x in _join(pieces(), N, 1))


class _Notes:
    """Mean [key, value] of what each note stands for, tick by tick.

    Two kinds: a gate's full note takes in a key at the tick it leaves the window; the note beside an open ring takes
    it in when it drops out of the ring, which is when the key m places newer in that gate leaves the window. Sums
    run per gate, so nothing that other gates or later tokens hold can leave a rounding trace.
    """

    def __init__(self, k, v, order, gate, left, short: Shortlist):
        S, T, d = k.shape
        self.ticks, self.gates, self.streams = *left.shape[1:], S
        self.kv = torch.cat((k, v), dim=-1).flatten(0, 1)
        self.gate = gate.flatten()
        m = min(short.ring, T)
        leaves = ((torch.arange(T, device=k.device) + short.window) // short.block + 1).clamp(max=self.ticks)
        owner, ranked = gate.gather(1, order), leaves[order]  # in (gate, position) order
        dropped = torch.full_like(ranked, self.ticks)
        dropped[:, : T - m] = torch.where(owner[:, m:] == owner[:, : T - m], ranked[:, m:], self.ticks)
        drops = torch.empty_like(dropped).scatter_(1, order, dropped)
        self.counts = (left, (left - m).clamp(min=0))
        self.events = []  # per kind: (tick, key) of every key a note takes in, by tick
        for tick in (leaves.expand(S, T).flatten(), drops.flatten()):
            tick = tick.masked_fill(self.gate < 0, self.ticks)
            at, key = tick.sort(stable=True)
            self.events.append((at, key))
        self.carry = [self.kv.new_zeros(S, 1, self.gates, 2 * d, dtype=torch.float32)] * 2
        self.tokens = T

    def advance(self, start: int, stop: int) -> Tensor:
        """Means at ticks [start, stop), float32 `(2, S, stop - start, C, 2 d)`."""
        n, means = stop - start, []
        for kind, (at, key) in enumerate(self.events):
            low, high = torch.searchsorted(at, torch.tensor([start, stop], device=at.device)).tolist()
            key, tick = key[low:high], at[low:high] - start
            slot = (key // self.tokens * n + tick) * self.gates + self.gate[key]
            fresh = self.kv.new_zeros(self.streams * n * self.gates, self.kv.shape[1], dtype=torch.float32)
            fresh = fresh.index_add(0, slot, self.kv.index_select(0, key).float()).view(self.streams, n, -1)
            # A small triangular matmul is several times faster than a sum along this axis, a large one is quadratic.
            sums = torch.ones(n, n, device=fresh.device).tril() @ fresh if n <= 128 else fresh.cumsum(1)
            sums = sums.view(self.streams, n, self.gates, -1) + self.carry[kind]
            self.carry[kind] = sums[:, -1:]
            means.append(sums / self.counts[kind][:, start:stop].clamp(min=1)[..., None])
        return torch.stack(means)


def _block_tile(q, kw, vw, ka, va, notes, left, probes, far_out, far_lse, back, offset, short: Shortlist):
    """One tile per block: q `(S, N, b, r, d)` over its window, the anchors and the notes, merged with the rings."""
    S, N, b, r, d = q.shape
    w, A = short.window, ka.shape[1]
    keys, values = (
        [x.unfold(1, w + b, b).movedim(-1, -2), a[:, None].expand(S, N, A, d)] for x, a in ((kw, ka), (vw, va))
    )
    if notes is not None:
        for note in notes.to(q.dtype):
            keys.append(note[..., :d])
            values.append(note[..., d:])
    keys, values = (torch.cat(x, dim=2).flatten(0, 1) for x in (keys, values))  # (S N, keys, d)
    near = w + b + A
    bias = torch.empty(S, N, b, r, keys.shape[1] + 1, device=q.device)  # the last column takes writes that miss
    bias[..., :near] = _near_bias(N, b, w, A, offset, q.device)
    if notes is not None:
        _note_bias(bias[..., near:], left, probes, short.ring)
    out, lse = _attend_tile(q.reshape(S * N, b * r, d), keys, values, bias[..., :-1].view(S * N, b * r, -1))
    out, lse = out.view(S, N, b, r, d), lse.view(S, N, b, r)
    if far_out is None:
        return out, lse
    empty = back == len(far_lse)
    ring_lse = far_lse[back.clamp(max=len(far_lse) - 1)].masked_fill(empty, -torch.inf)  # (S, N, b, r, n)
    merged = torch.cat((lse[..., None], ring_lse), dim=-1).logsumexp(-1)
    out = out * (lse - merged).exp().to(out.dtype)[..., None]
    share = (ring_lse - merged[..., None]).exp().to(out.dtype)
    for n in range(share.shape[-1]):
        at = back[..., n].clamp(max=len(far_lse) - 1)
        out = torch.addcmul(out, share[..., n, None], far_out.index_select(0, at.flatten()).view(out.shape))
    return out, merged


def _near_bias(N: int, b: int, w: int, A: int, offset: int, device) -> Tensor:
    """0 where a row reads a window key or an anchor, else -inf: `(N, b, 1, w + b + A)`."""
    edge = (torch.arange(offset, offset + N, device=device) * b - w)[:, None, None]  # first key in the window
    at = torch.arange(w + b, device=device)
    local = (at <= torch.arange(b, device=device)[:, None] + w) & (at >= -edge)
    anchor = (torch.arange(A, device=device) < edge).expand(N, b, A)
    seen = torch.cat((local, anchor), dim=-1)[:, :, None]
    return torch.zeros((), device=device).where(seen, -torch.inf)


def _note_bias(bias: Tensor, left: Tensor, probes: Tensor, ring: int) -> None:
    """Write log(count) of the notes a row reads, else -inf, into bias `(S, N, b, r, 2 C + 1)`.

    The first C columns are notes of gates it did not open, the next C of those it did (less the ring).
    """
    C = left.shape[2]
    bias[..., :C] = left.float().log()[:, :, None, None]
    bias[..., C:] = -torch.inf
    miss = probes < 0
    bias.scatter_(-1, torch.where(miss, 2 * C, probes), -torch.inf)
    rest = (left - ring).clamp(min=0).float().log()[:, :, None, None].expand(*probes.shape[:4], C)
    bias.scatter_(-1, torch.where(miss, 2 * C, probes + C), rest.gather(-1, probes.clamp(min=0)))
