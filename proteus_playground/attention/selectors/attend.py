"""Attention over what a selector chooses: for rows that are asked for, and for every row of a layer.

Every choice is checked before it is used. Masks are made for some rows at a time. That takes time in proportion to
T x T, so it serves comparisons at lengths where this is bearable; the backends serve our own selector at any length.

Axes: `B` batch, `T` tokens, `R` rows, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AttentionConfig
from ..gates import Gates
from ..precision import at_least_float32
from .protocol import Choice, Selector, Sight

SCORES_PER_STEP = 1 << 23  # row-key pairs scored at a time: 64 MB of float64
LONGEST = 1 << 15  # tokens of a whole pass


class SelectedRows(NamedTuple):
    """Attention of some rows, and how much they read."""

    out: Tensor  # (B, R, H, d)
    reads: Tensor  # (B, R, H) int64, keys and stand-ins
    looks: Tensor  # (R,) int64, summaries or keys compared to choose, without reading them


def attend_rows(selector: Selector, sight: Sight, rows: Tensor) -> SelectedRows:
    """The rows `(R,)`, read as `selector` chooses. Raises as `choose`."""
    choice = choose(selector, sight, rows)
    q, k, v = sight.rotated_q[:, :, rows], sight.rotated_k, sight.v
    if choice.stand_ins is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=choice.keys, scale=sight.scale)
    else:
        out = _with_stand_ins(q, k, v, choice, sight.scale)
    return SelectedRows(out.transpose(1, 2), choice.reads.transpose(1, 2), selector.count_looks(sight, rows))


def _with_stand_ins(q: Tensor, k: Tensor, v: Tensor, choice: Choice, scale: float) -> Tensor:
    """One softmax over keys and stand-ins: `(B, H, R, d)`."""
    dtype = q.dtype
    q, k, v, key, value = (at_least_float32(x) for x in (q, k, v, *choice.stand_ins[:2]))
    count = choice.stand_ins.count
    score = (q @ k.transpose(-1, -2) * scale).masked_fill(~choice.keys, -torch.inf)
    mean = (key @ q[..., None])[..., 0] * scale + count.clamp(min=1).to(q.dtype).log()
    p = torch.cat((score, mean.masked_fill(count == 0, -torch.inf)), dim=-1).softmax(-1)
    T = k.shape[2]
    return (p[..., :T] @ v + (p[..., None, T:] @ value)[..., 0, :]).to(dtype)


def choose(selector: Selector, sight: Sight, rows: Tensor) -> Choice:
    """What `selector` chooses for `rows` `(R,)`, with its mask expanded to `(B, H, R, T)`.

    Raises `TypeError` or `ValueError` naming the selector, the row and the key, where it returns something else than
    `Choose` says, or reads nothing, a later key, or more than L.
    """
    name = f"selector {selector.name!r}"
    if selector.needs_gates and (sight.gates is None or sight.config is None):
        raise ValueError(f"{name} chooses by gates: gates must be given, with their config")
    found = selector.choose(sight, rows)
    choice = found if isinstance(found, Choice) else Choice(found)
    keys, (B, H, T, d) = choice.keys, sight.q.shape
    if not isinstance(keys, Tensor) or keys.dtype != torch.bool:
        kind = f"a tensor of {keys.dtype}" if isinstance(keys, Tensor) else f"{type(keys).__name__}"
        raise TypeError(f"{name} returned {kind}: must be a bool tensor, True where a row reads a key")
    wanted = B, H, len(rows), T
    if keys.dim() > 4 or keys.shape[-1:] != (T,) or any(
        size not in (1, full) for size, full in zip(keys.shape[::-1], wanted[::-1], strict=False)
    ):  # fmt: skip
        raise ValueError(
            f"{name} returned a mask of shape {tuple(keys.shape)}: must broadcast to (B, H, R, T) = {wanted}"
        )
    choice = choice._replace(keys=keys.expand(wanted))
    _check_stand_ins(name, choice, (*wanted[:3], d))
    key = torch.arange(T, device=rows.device)
    if where := _first(choice.keys & (key > rows[:, None])):
        b, h, r, j = where
        raise ValueError(f"{name}: row {int(rows[r])} of head {h} reads key {j}: must read no later key than its own")
    reads, allowed = choice.reads, rows + 1
    if selector.capped:
        allowed = allowed.clamp(max=sight.shortlist)
    if where := _first((reads > allowed) | (reads < 1)):
        _, h, r = where
        raise ValueError(
            f"{name}: row {int(rows[r])} of head {h} reads {int(reads[where])} keys and stand-ins: must read at least "
            f"1 and at most {int(allowed[r])}"
        )
    return choice


def _check_stand_ins(name: str, choice: Choice, shape: tuple[int, ...]) -> None:
    if choice.stand_ins is None:
        return
    key, value, count = choice.stand_ins
    for part, x, tail in (("key", key, shape[3:]), ("value", value, shape[3:]), ("count", count, ())):
        wanted = (*shape[:3], count.shape[-1], *tail)
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name}: {part} of its stand-ins has shape {tuple(x.shape)}: must be {wanted}")
    if bool((count < 0).any()):
        raise ValueError(f"{name}: count of its stand-ins is {count.min().item():g} somewhere: must be 0 or more")


def _first(wrong: Tensor) -> tuple[int, ...] | None:
    """Index of the first True."""
    return tuple(wrong.nonzero()[0].tolist()) if bool(wrong.any()) else None


def row_steps(B: int, H: int, T: int, device: torch.device) -> tuple[Tensor, ...]:
    """Row numbers 0..T-1, split so that the scores of one part fit in memory."""
    return torch.arange(T, device=device).split(max(1, SCORES_PER_STEP // (B * H * T)))


def attend_all(selector: Selector, sight: Sight) -> SelectedRows:
    """Every row of a text of up to `LONGEST` tokens, with R = T; some rows at a time. Raises as `choose`."""
    B, H, T, _ = sight.q.shape
    if T > LONGEST:
        raise ValueError(
            f"selector {selector.name!r} was asked for {T:,} tokens: a pass by masks takes time in proportion to their "
            f"square, so it is limited to {LONGEST:,}"
        )
    parts = [attend_rows(selector, sight, rows) for rows in row_steps(B, H, T, sight.q.device)]
    out, reads, looks = zip(*parts, strict=True)
    return SelectedRows(torch.cat(out, 1), torch.cat(reads, 1), torch.cat(looks))


@dataclass(frozen=True)
class SelectorLayer:
    """A selector in place of a layer's attention; called with a patch's `AttentionCall` it returns the heads' outputs.

    config: as in `Sight.of`. gates: of this layer, for selectors that need them.
    """

    selector: Selector
    config: AttentionConfig
    gates: Gates | None = None

    def __call__(self, call) -> Tensor:
        """`(B, T, H, d)`, before o_proj."""
        return self.run_call(call).out

    def run_call(self, call) -> SelectedRows:
        """Every row of an `AttentionCall`. Raises as `attend_all`, and `ValueError` for padding."""
        if call.keep is not None and not call.keep.all():
            raise ValueError(f"selector {self.selector.name!r} got padding: must get texts of one length")
        sight = Sight.of(
            call.q, call.k, call.v, self.config, inv_freq=call.inv_freq, positions=call.positions, gates=self.gates,
            scale=call.scale,
        )  # fmt: skip
        return attend_all(self.selector, sight)
