"""The selectors that come with the package: ours, published ones, chance, and an oracle that nobody can build.

Those that choose far keys spend the same share of L on them as the gates do, and the rest on the newest keys, the row
itself included. The summaries that a selector compares to choose its keys do not count as reads, but as looks.

Axes: `B` batch, `T` tokens, `R` rows, `H` query heads, `G` KV groups, `d` head dim, `N` blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.reference import memberships
from ..budget import plan_budget
from ..shortlist import Shortlist, build_shortlist
from .protocol import Choice, Sight, StandIns, register, top

BLOCK = 16  # keys of a block, or fewer so that at least FEWEST_BLOCKS are chosen
FEWEST_BLOCKS = 4
OBSERVED = 32  # newest queries by which SnapKV rates keys
POOLED = 5  # neighbouring keys over which it smooths its ratings


@register("dense", "Every earlier key.", capped=False)
def dense(sight: Sight, rows: Tensor) -> Tensor:
    return sight.window(rows, sight.tokens)


@register("local", "The newest keys.")
def local(sight: Sight, rows: Tensor) -> Tensor:
    return sight.window(rows, sight.shortlist)


@register(
    "local + anchors", "The newest keys and the first of the text (StreamingLLM).",
    paper="https://arxiv.org/abs/2309.17453",
)  # fmt: skip
def local_anchors(sight: Sight, rows: Tensor) -> Tensor:
    anchors = min(sight.anchors, sight.shortlist - 1)
    first = torch.arange(sight.tokens, device=rows.device) < anchors
    return sight.window(rows, sight.shortlist - anchors) | (first & (first.cumsum(0) <= rows[:, None] + 1))


@register("random keys", "Random far keys, drawn anew for every row; they depend on the row's position only.")
def random_keys(sight: Sight, rows: Tensor) -> Tensor:
    keys, heads = (torch.arange(size, device=rows.device) for size in (sight.tokens, sight.k.shape[1]))
    heads = heads[:, None, None]
    return sight.best(_hash(keys) * (1e4 + 1e4 * _hash(rows[:, None] + 0.5 * heads)) % 1, rows)


def _hash(number: Tensor) -> Tensor:
    """A pseudorandom number in [0, 1), the same on every call and for every length of text."""
    return torch.sin(number.double() * 12.9898 + 78.233) * 43758.5453 % 1


# -- whole blocks of past keys ------------------------------------------------------------------------------------


def blocks(sight: Sight) -> tuple[int, int, int]:
    """(keys per block, blocks that a row reads, newest keys in its window)."""
    size = BLOCK
    while size > 1 and (size * FEWEST_BLOCKS > sight.far or size > sight.shortlist - sight.far):
        size //= 2
    return size, sight.far // size, sight.shortlist - sight.far // size * size


def past_blocks(sight: Sight, rows: Tensor) -> Tensor:
    """The number of blocks that each row chooses from: `(R,)`."""
    size, _, newest = blocks(sight)
    return ((rows - newest).clamp(min=-1) // size + 1).clamp(max=sight.tokens // size)


@register(
    "block means", "Far blocks by q . mean key (MoBA; NSA learns the means).", paper="https://arxiv.org/abs/2502.13189",
    looks=past_blocks,
)  # fmt: skip
def block_means(sight: Sight, rows: Tensor) -> Tensor:
    return _by_block(sight, rows, lambda q, keys: q @ keys.mean(3).transpose(-1, -2))


@register(
    "quest", "Far blocks by the largest score that the bounds of their keys allow.",
    paper="https://arxiv.org/abs/2406.10774", looks=lambda sight, rows: 2 * past_blocks(sight, rows),
)  # fmt: skip
def quest(sight: Sight, rows: Tensor) -> Tensor:
    def bound(q: Tensor, keys: Tensor) -> Tensor:
        low, high = keys.amin(3).transpose(-1, -2), keys.amax(3).transpose(-1, -2)
        return q.clamp(min=0) @ high + q.clamp(max=0) @ low

    return _by_block(sight, rows, bound)


def _by_block(sight: Sight, rows: Tensor, rate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Window and whole past blocks of largest rating: rate(q (B, H, R, d), keys (B, H, N, size, d)) -> (B, H, R, N)."""
    T, (size, count, newest) = sight.tokens, blocks(sight)
    whole = T // size
    rating = rate(sight.rotated_q[:, :, rows], sight.rotated_k[:, :, : whole * size].unflatten(2, (whole, size)))
    past = torch.arange(whole, device=rows.device) < past_blocks(sight, rows)[:, None]
    chosen = top(rating, past, count).repeat_interleave(size, dim=-1)
    return F.pad(chosen, (0, T - whole * size)) | sight.window(rows, newest)


# -- keys that a bounded cache would hold -------------------------------------------------------------------------


@register("salience only", "Far keys of greatest salience, whatever the row's query is.", needs_gates=True)
def salience_only(sight: Sight, rows: Tensor) -> Tensor:
    return sight.best(sight.salience[:, None, None], rows)


@register(
    "snapkv", "Far keys by the attention that the newest 32 queries pay to them (SnapKV).",
    paper="https://arxiv.org/abs/2404.14469", looks=lambda _, rows: rows + 1,
)  # fmt: skip
def snapkv(sight: Sight, rows: Tensor) -> Tensor:
    """After Li et al. 2024: attention of the last queries, mean over them and the heads of a group, smoothed.

    SnapKV reads a prompt densely, evicts once at its end, and keeps what is written afterwards. Here every row is
    treated as the end of a prompt: it chooses among all earlier keys, by the queries up to its own. So nothing is lost
    for good, which favours it, and rows of the prompt read no more than L keys, as those of every other selector.
    """
    first = max(0, int(rows.min()) - OBSERVED + 1)
    observed = torch.arange(first, int(rows.max()) + 1, device=rows.device)
    later = ~sight.window(observed, sight.tokens)
    paid = (sight.scores(observed) * sight.scale).masked_fill(later, -torch.inf).softmax(-1)
    paid = paid.unflatten(1, (sight.groups, -1)).mean(2).double()  # (B, G, observed, T)
    total = F.pad(paid.cumsum(2), (0, 0, 1, 0))
    last = rows - first + 1
    seen = total[:, :, last] - total[:, :, (last - OBSERVED).clamp(min=0)]
    rating = F.avg_pool1d(seen.flatten(0, 2), POOLED, 1, POOLED // 2).view(seen.shape)
    rating = rating.float()  # rounds away what depends on how many rows are asked for at once
    return sight.best(rating.repeat_interleave(sight.q.shape[1] // sight.groups, dim=1), rows)


@register("knorm", "Far keys of smallest norm (Devoto et al.).", paper="https://arxiv.org/abs/2406.11430")
def knorm(sight: Sight, rows: Tensor) -> Tensor:
    """After Devoto et al. 2024, who evict the keys of largest norm, since those of small norm get most attention.

    They read a prompt densely and evict at its end, and keep the first two layers whole. Here the cache is bounded from
    the first token and in every layer: a key that leaves the window stays as long as few enough have a smaller norm.
    """
    return sight.best(-sight.k.norm(dim=-1)[:, :, None], rows)


# -- ours ---------------------------------------------------------------------------------------------------------


def _prototypes(sight: Sight, rows: Tensor) -> Tensor | int:
    return 0 if _short(sight, True) is None else sight.gates.gates_per_group


@register("gates", "Ours without notes: keys of the gates whose prototypes the query is most like.",
          looks=_prototypes, needs_gates=True)  # fmt: skip
def gates_alone(sight: Sight, rows: Tensor) -> Tensor | Choice:
    return _by_gates(sight, rows, False)


@register("gates + notes", "Ours: the same, and means of the keys that are not read one by one.",
          looks=_prototypes, needs_gates=True)  # fmt: skip
def gates_and_notes(sight: Sight, rows: Tensor) -> Tensor | Choice:
    return _by_gates(sight, rows, True)


def _by_gates(sight: Sight, rows: Tensor, notes: bool) -> Tensor | Choice:
    """What the `reference` backend reads at flux alpha 1 when every token takes part and every head is awake."""
    short = _short(sight, notes)
    if short is None:
        return dense(sight, rows)
    read = memberships(short, sight.q.shape[1], rows)
    return Choice(read.direct, _means(sight, read.notes, short) if notes else None)


def _short(sight: Sight, notes: bool) -> Shortlist | None:
    """The index tables; None where the budget holds every key."""
    config = replace(sight.config, flux_alpha=1.0, notes=sight.config.notes and notes)
    budget = plan_budget(config, sight.tokens)
    if budget.dense:
        return None

    def build() -> Shortlist:
        with torch.no_grad():
            k = sight.k[:, :: sight.q.shape[1] // sight.groups].transpose(1, 2)
            return build_shortlist(sight.gates.lure(k)[0], sight.q.transpose(1, 2), sight.gates, budget, None)

    return sight.once(f"gates, notes={notes}", build)


def _means(sight: Sight, noted: Tensor, short: Shortlist) -> StandIns | None:
    """The note of each gate that holds a key of `noted` `(B, H, R, T)`, one after another."""
    heads = sight.q.shape[1] // sight.groups
    gate = short.gate.transpose(1, 2).repeat_interleave(heads, dim=1)  # (B, H, T), -1 for none
    members = F.one_hot(gate.clamp(min=0), short.gates_per_group).float()
    count = noted.float() @ members  # (B, H, R, C)
    most = int((count > 0).sum(-1).max())
    if not most:
        return None
    size, which = count.topk(most, dim=-1)
    key, value = [], []
    for one, held in zip(which.unbind(-1), size.unbind(-1), strict=True):
        inside = noted & (gate[:, :, None] == one[..., None]) & (held > 0)[..., None]
        share = (inside / held.clamp(min=1)[..., None]).to(sight.k.dtype)
        key.append(share @ sight.rotated_k)
        value.append(share @ sight.v)
    return StandIns(torch.stack(key, 3), torch.stack(value, 3), size)


@register("oracle", "The keys of largest true score, and always the row itself.", looks=lambda _, rows: rows + 1)
def oracle(sight: Sight, rows: Tensor) -> Tensor:
    own = sight.window(rows, 1)
    return own | top(sight.scores(rows), sight.window(rows, len(own[0])) & ~own, sight.shortlist - 1)
