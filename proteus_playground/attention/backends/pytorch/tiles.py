"""The shortlist in plain PyTorch: matmuls large enough for matrix units, no T x T array, no waiting for a GPU.

A row attends three times, and the three results are merged by their log-sum-exp. Window: the rows of a block share
their keys, a strided view of k, and their mask, the same in every block. Notes and anchors: also shared by a block,
rows of a table of running means. Rings: see `rings`. The first rows, whose window still holds every key, are plain
causal attention. Work runs in steps of bounded size; under autograd each step is recomputed in the backward pass.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `r = H / G`, `d` head dim, `N` blocks of `b` rows per
sequence, `U` blocks of all sequences (the batch is one long run of blocks), `C` gates, `n` probes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from ...precision import wide_dtype
from ...shortlist import Shortlist
from ...transforms import in_forward_mode, in_func
from .keys import sort_keys
from .notes import Notes
from .rings import Rings, key_columns
from .tile import attend_tile, fuses_on_cuda, take_rows

SCORES_PER_STEP = 1 << 21  # scores of rings per step on a CPU
SCORES_PER_STEP_FUSED = 1 << 26  # where the fused GPU kernel runs, which stores no scores
SCORES_PER_STEP_LARGE = 1 << 24  # elsewhere on a GPU, and in training, where every step costs one gradient buffer
BLOCKS_PER_STEP = 1 << 15  # a CUDA grid ends at 65,535
CHUNK = 64  # keys of a gate that are summed before the sum is carried over
MANY_GATES, CHUNK_OF_MANY = 128, 16  # with so many gates few keys are in each, so the chunk is smaller
FULL = 4  # opened gates of a row whose rings count as full where a step is planned; others hold less or are closed


def attend(q: Tensor, k: Tensor, v: Tensor, short: Shortlist, scale: float) -> tuple[Tensor, Tensor]:
    """Rotated q `(B, T, H, d)`, rotated k and v `(B, T, G, d)` -> out like q, log-sum-exp `(B, T, H)` float32."""
    differentiable = torch.is_grad_enabled() and (in_func() or any(x.requires_grad for x in (q, k, v)))
    with torch.set_grad_enabled(differentiable or in_forward_mode()):
        return _attend(q, k, v, short, scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, short: Shortlist, scale: float) -> tuple[Tensor, Tensor]:
    B, T, H, d = q.shape
    b, N = short.block, short.retired.shape[2]
    head = -(-short.window // b)  # the first block whose window has lost a key
    if head >= N:
        return _causal(q, k, v, scale)
    work, total, learning = _Blocks(q, k, v, short, scale), B * N, torch.is_grad_enabled()
    cuts = [slice(i, min(i + work.step, total)) for i in range(head, total, work.step)]
    if learning:
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        run = work.run if in_func() else partial(again, work.run)  # torch.func knows no checkpoints
        parts = [run(cut) for cut in cuts]
        out, lse = (torch.cat([x[0].new_zeros(head, *x[0].shape[1:]), *x]) for x in zip(*parts, strict=True))
    else:
        out, lse = q.new_empty(total, b, H, d), q.new_empty(total, b, H, dtype=wide_dtype(q.dtype))
        for cut in cuts:
            work.run(cut, out[cut], lse[cut])
    out, lse = out.view(B, N * b, H, d)[:, :T], lse.view(B, N * b, H)[:, :T]
    head *= b
    if not head:
        return out, lse
    first = _causal(*(x[:, :head] for x in (q, k, v)), scale)
    if learning:
        return tuple(torch.cat((x, rest[:, head:]), dim=1) for x, rest in zip(first, (out, lse), strict=True))
    out[:, :head], lse[:, :head] = first
    return out, lse


def _causal(q, k, v, scale: float):
    """Every row reads all keys up to its own."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return tuple(x.transpose(1, 2) for x in attend_tile(q, k, v, None, scale))


class _Blocks:
    """Tables that all blocks of a call share, and the attention of a run of blocks."""

    def __init__(self, q, k, v, short: Shortlist, scale: float):
        B, T, H, d = q.shape
        G, n, b, r = k.shape[2], short.probes.shape[3], short.block, H // k.shape[2]
        self.window, self.scale = short.window, scale
        end = short.retired.shape[2] * b - T
        padded = (_padded(x, end, 0).contiguous() for x in (q, k, v))
        shapes = ((b, G, r, d), (G, d), (G, d))
        self.q, self.k, self.v = (x.view(-1, *shape) for x, shape in zip(padded, shapes, strict=True))
        self.opened, self.noted = (
            None if x is None else _padded(x, end, -1).reshape(len(self.q), b, G, r, x.shape[-1]) + 1  # 0 for none
            for x in (short.probes, short.noted)
        )
        self.mask = _window_mask(short.window, b, r, q)
        self.notes = self.rings = keys = None
        kv, wide = torch.cat((k, v), dim=-1), 1
        ring = min(short.ring, int(short.retired.max()) if q.device.type == "cpu" else T)  # no gate holds more
        n = n if ring else 0
        many = short.gates_per_group >= MANY_GATES
        small = many and q.device.type == "cpu"
        column, width = key_columns(ring, r * n, small) if n else (1, 0)
        reads_notes = self.noted is None or self.noted.shape[-1] > 0
        if n or reads_notes:
            keys = sort_keys(kv, short, max(column, CHUNK_OF_MANY if many else CHUNK))
        if n:
            self.rings, wide = Rings(keys, ring, column, width, small), min(n, FULL) * width
        if short.anchors or reads_notes:
            self.notes = Notes(kv, keys, short)
            wide = max(wide, self.notes.columns)
        self.step = max(1, min(BLOCKS_PER_STEP, _scores_per_step(q) // (b * H * wide)))

    def run(self, cut: slice, out: Tensor | None = None, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rows of blocks `cut`: out `(U, b, H, d)` and lse `(U, b, H)`, written into the tensors given."""
        q, opened = self.q[cut], self.opened[cut]
        U, b, G, r, d = q.shape
        tiles = q.transpose(1, 2).reshape(U, G, b * r, d)
        parts = [self._window(cut, tiles)]
        if self.notes:
            noted = None if self.noted is None else self.noted[cut]
            parts.append(self.notes.attend(cut, tiles, opened, noted, self.scale))
        # From (U, G, b r, ...) to the axes of q.
        means, sizes = ([x.unflatten(2, (b, r)).transpose(1, 2) for x in part] for part in zip(*parts, strict=True))
        sizes, ring = [x[..., None] for x in sizes], None
        if self.rings:
            ring, ring_size, back = self.rings.attend(cut, q, opened, self.scale)
            sizes.append(ring_size)
            means += [back[..., i] for i in range(back.shape[-1])]
        size = torch.cat(sizes, dim=-1)  # (U, b, G, r, means)
        share = size.softmax(-1)
        size = (size.amax(-1) - share.amax(-1).log()).flatten(2)
        share = share.to(q.dtype)[..., None]
        lse = size if lse is None else lse.copy_(size)
        mixed = torch.mul(means[0], share[..., 0, :], out=None if out is None else out.view_as(q))
        for i in range(1, len(means)):
            mean = means[i] if i < len(parts) else take_rows(ring, means[i])
            mixed = mixed.addcmul(mean, share[..., i, :]) if out is None else mixed.addcmul_(mean, share[..., i, :])
        return mixed.flatten(2, 3), lse

    def _window(self, cut: slice, tiles: Tensor):
        U, G, M, _ = tiles.shape
        b, w = self.q.shape[1], self.window
        span = slice(cut.start * b - w, cut.stop * b)
        k, v = (x[span].unfold(0, w + b, b).transpose(2, 3) for x in (self.k, self.v))  # (U, G, w + b, d)
        return attend_tile(tiles, k, v, self.mask.expand(U, G, M, w + b), self.scale)


def _padded(x: Tensor, end: int, value: int) -> Tensor:
    """`x` (B, T, heads, n) with `end` more tokens of `value`."""
    return pad(x, (0, 0, 0, 0, 0, end), value=value) if end else x


def _scores_per_step(q: Tensor) -> int:
    if torch.is_grad_enabled():
        return SCORES_PER_STEP_LARGE
    if q.device.type == "cpu":
        return SCORES_PER_STEP
    return SCORES_PER_STEP_FUSED if fuses_on_cuda(q) else SCORES_PER_STEP_LARGE


def _window_mask(w: int, b: int, r: int, like: Tensor) -> Tensor:
    """0 where a row of a block reads a key of its window, else -inf: `(b r, w + b)`, rows aligned."""
    mask = like.new_zeros(b * r, -(-(w + b) // 8) * 8)[:, : w + b]
    row, key = torch.arange(b * r, device=like.device) // r, torch.arange(w + b, device=like.device)
    return mask.masked_fill_(key > row[:, None] + w, -torch.inf)
