"""Arms: ways to choose the keys of a row at equal keys per query. Ours, published ones, chance and an oracle.

All arms use the same trained weights. `L` is the cap on keys per row. Our notes count as keys; the block summaries that
a rival compares to choose its keys do not. Arms that choose far keys spend the same share of L on them as the gates do,
and the rest on the newest keys, the row itself included.

Axes: `B` batch, `T` tokens, `R` rows, `H` query heads, `G` KV groups, `d` head dim, `N` blocks of keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import floor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import ProteusAttention
from ...attention.rope import rotate
from ...common.checks import whole_number
from ...lm.model import ProteusLM

SCORES_PER_STEP = 1 << 23  # row-key pairs scored at a time: 64 MB of float64
BLOCK = 16  # keys of a block, or fewer so that at least FEWEST_BLOCKS are chosen
FEWEST_BLOCKS = 4


@dataclass(frozen=True)
class ChoiceInputs:
    """What an arm chooses by: one layer's rotated queries and keys, and how many keys a row may read."""

    q: Tensor  # (B, H, T, d)
    k: Tensor  # (B, H, T, d)
    salience: Tensor  # (B, T) of the gates
    shortlist: int  # L
    far: int  # of L, keys beyond the window
    anchors: int

    def window(self, rows: Tensor, size: int) -> Tensor:
        """The `size` newest keys of each row, itself included: `(R, T)` bool."""
        key = torch.arange(self.k.shape[2], device=rows.device)
        return (key <= rows[:, None]) & (key > rows[:, None] - size)

    def blocks(self) -> tuple[int, int, int]:
        """(keys per block, blocks that a row reads, newest keys in its window)."""
        size = BLOCK
        while size > 1 and (size * FEWEST_BLOCKS > self.far or size > self.shortlist - self.far):
            size //= 2
        return size, self.far // size, self.shortlist - self.far // size * size

    def past_blocks(self, rows: Tensor) -> Tensor:
        """The number of blocks that each row chooses from: `(R,)`."""
        size, _, newest = self.blocks()
        return ((rows - newest).clamp(min=-1) // size + 1).clamp(max=self.k.shape[2] // size)

    def scores(self, rows: Tensor) -> Tensor:
        """True scores `(B, H, R, T)`, not scaled."""
        return self.q[:, :, rows] @ self.k.transpose(-1, -2)

    def best(self, score: Tensor, rows: Tensor) -> Tensor:
        """The window and the `far` older keys of largest `score` (broadcast to `(B, H, R, T)`)."""
        window = self.window(rows, self.shortlist - self.far)
        older = torch.arange(window.shape[1], device=rows.device) < rows[:, None] - (self.shortlist - self.far) + 1
        return window | top(score, older, self.far)


Choice = Callable[[ChoiceInputs, Tensor], Tensor]  # rows (R,) -> the keys they read, bool, broadcast to (B, H, R, T)


def top(score: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest scores along the last axis among `allowed`; of equal ones the newer."""
    allowed = allowed.expand_as(score)
    count = min(count, score.shape[-1])
    if count == 0:
        return torch.zeros_like(allowed)
    newer = torch.arange(score.shape[-1], device=score.device, dtype=torch.float64) * 1e-10
    found = (score.double() + newer).masked_fill(~allowed, -torch.inf).topk(count, dim=-1).indices
    return torch.zeros_like(allowed).scatter(-1, found, True) & allowed


def dense(inputs: ChoiceInputs, rows: Tensor) -> Tensor:
    return inputs.window(rows, inputs.k.shape[2])


def local(inputs: ChoiceInputs, rows: Tensor) -> Tensor:
    return inputs.window(rows, inputs.shortlist)


def local_anchors(inputs: ChoiceInputs, rows: Tensor) -> Tensor:
    """Window and the first keys of the text (StreamingLLM; Xiao et al. 2023, https://arxiv.org/abs/2309.17453)."""
    anchors = min(inputs.anchors, inputs.shortlist - 1)
    first = torch.arange(inputs.k.shape[2], device=rows.device) < anchors
    return inputs.window(rows, inputs.shortlist - anchors) | (first & (first.cumsum(0) <= rows[:, None] + 1))


def random_keys(inputs: ChoiceInputs, rows: Tensor) -> Tensor:
    """Random far keys, drawn anew for every row; they depend on the row's position only."""
    H, T = inputs.k.shape[1:3]
    keys, heads = torch.arange(T, device=rows.device), torch.arange(H, device=rows.device)[:, None, None]
    return inputs.best(_hash(keys) * (1e4 + 1e4 * _hash(rows[:, None] + 0.5 * heads)) % 1, rows)


def _hash(number: Tensor) -> Tensor:
    """A pseudorandom number in [0, 1), the same on every call and for every length of text."""
    return torch.sin(number.double() * 12.9898 + 78.233) * 43758.5453 % 1


def salience_only(inputs: ChoiceInputs, rows: Tensor) -> Tensor:
    """Far keys of greatest salience, independent of the row's query."""
    return inputs.best(inputs.salience[:, None, None].expand(-1, -1, len(rows), -1), rows)


def oracle(inputs: ChoiceInputs, rows: Tensor) -> Tensor:
    """The keys of largest true score, and always the row itself."""
    own = inputs.window(rows, 1)
    return own | top(inputs.scores(rows), inputs.window(rows, len(own[0])) & ~own, inputs.shortlist - 1)


def block_means(inputs: ChoiceInputs, rows: Tensor) -> Tensor:
    """Far blocks by q . mean key (MoBA; Lu et al. 2025, https://arxiv.org/abs/2502.13189). NSA learns it."""
    return _by_block(inputs, rows, lambda q, keys: q @ keys.mean(3).transpose(-1, -2))


def quest(inputs: ChoiceInputs, rows: Tensor) -> Tensor:
    """Far blocks by the largest score that their keys' bounds allow (Tang et al. 2024, https://arxiv.org/abs/2406.10774)."""

    def bound(q: Tensor, keys: Tensor) -> Tensor:
        low, high = keys.amin(3).transpose(-1, -2), keys.amax(3).transpose(-1, -2)
        return q.clamp(min=0) @ high + q.clamp(max=0) @ low

    return _by_block(inputs, rows, bound)


def _by_block(inputs: ChoiceInputs, rows: Tensor, rate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Window and whole past blocks of largest rating: rate(q (B, H, R, d), keys (B, H, N, size, d)) -> (B, H, R, N)."""
    T, (size, blocks, newest) = inputs.k.shape[2], inputs.blocks()
    whole = T // size
    rating = rate(inputs.q[:, :, rows], inputs.k[:, :, : whole * size].unflatten(2, (whole, size)))
    past = torch.arange(whole, device=rows.device) < inputs.past_blocks(rows)[:, None]
    chosen = top(rating, past, blocks).repeat_interleave(size, dim=-1)
    return F.pad(chosen, (0, T - whole * size)) | inputs.window(rows, newest)


@dataclass(frozen=True)
class Arm:
    """One way to choose keys.

    choose: the keys that a row reads; None stands for the layer's own pass, with or without notes. alpha: whether the
    weights trained with a random alpha are used. looks: the number of block summaries or keys that a row compares to
    choose, without reading them: `(R,)`; None for zero. The layer itself compares its prototypes.
    """

    choose: Choice | None = None
    notes: bool = True
    alpha: bool = False
    looks: Callable[[ChoiceInputs, Tensor], Tensor] | None = None


ARMS = {
    "dense": Arm(dense),
    "local": Arm(local),
    "local + anchors": Arm(local_anchors),
    "random keys": Arm(random_keys),
    "block means": Arm(block_means, looks=lambda inputs, rows: inputs.past_blocks(rows)),
    "quest": Arm(quest, looks=lambda inputs, rows: 2 * inputs.past_blocks(rows)),
    "salience only": Arm(salience_only),
    "gates": Arm(notes=False),
    "gates + notes": Arm(),
    "gates + trained alpha": Arm(notes=False, alpha=True),
    "gates + notes + trained alpha": Arm(alpha=True),
    "dense + trained alpha": Arm(dense, alpha=True),
    "oracle": Arm(oracle, looks=lambda _, rows: rows + 1),
}
DENSE_ARMS = tuple(name for name in ARMS if name.startswith("dense"))  # they have no L
Attend = Callable[[ProteusAttention, Tensor], tuple[Tensor, Tensor]]  # h (B, T, D) -> (B, T, D), counts (B, T, 2)


@dataclass(frozen=True)
class ArmOutput:
    """A model's logits, and how much each row read to compute them."""

    logits: Tensor  # (B, T, V)
    reads: Tensor  # (B, T) float32, keys and notes of a row, mean over layers and heads
    looks: Tensor  # (B, T) float32, summaries compared to choose them


def read(model: ProteusLM, ids: Tensor, arm: Arm, shortlist: int, **changes) -> ArmOutput:
    """The model's output when every layer reads the keys that `arm` chooses, at most `shortlist` per row.

    ids: `(B, T)`. changes: other fields of `AttentionConfig` for every layer, in this call only.
    Raises as `walk`, and `ValueError` for routed heads where an arm replaces the layer.
    """
    whole_number("shortlist", shortlist, 1)
    if arm.choose is None:
        fields = {"notes": arm.notes, **changes}
        return walk(model, ids, lambda attn, h: ask_layer(attn, h, shortlist, **fields))
    return walk(model, ids, lambda attn, h: choose_keys(attn, h, arm, shortlist, **changes))


@torch.no_grad()
def walk(model: ProteusLM, ids: Tensor, attend: Attend) -> ArmOutput:
    """Run the model with `attend` in place of every layer's attention. Raises `ValueError` for a model in training."""
    if model.training:
        raise ValueError(
            "model.training=True: must be in evaluation mode, in which prototypes do not change; call eval()"
        )
    replaced = [_Replacement(block.attn, attend) for block in model.blocks]
    try:
        for block, replacement in zip(model.blocks, replaced, strict=True):
            block.attn = replacement
        logits = model(ids)
    finally:
        for block, replacement in zip(model.blocks, replaced, strict=True):
            block.attn = replacement.attn
    return ArmOutput(logits, *torch.stack([replacement.counts for replacement in replaced]).mean(0).unbind(-1))


class _Replacement(nn.Module):
    """Replaces a layer's attention for one call and keeps the counts of what was read."""

    def __init__(self, attn: ProteusAttention, attend: Attend):
        super().__init__()
        self.attn, self.attend, self.counts = attn, attend, None

    def forward(self, h: Tensor) -> Tensor:
        y, self.counts = self.attend(self.attn, h)
        return y


def ask_layer(attn: ProteusAttention, h: Tensor, shortlist: int, **changes) -> tuple[Tensor, Tensor]:
    """The layer's own pass at alpha 1 and L = `shortlist`: `(B, T, D)`, and reads and looks `(B, T, 2)`."""
    with attn.settings(shortlist=min(shortlist, h.shape[1]), flux_alpha=1.0, **changes):
        y, stats = attn(h, return_stats=True)
    reads = stats.reads.sum(2) / stats.awake.sum(2).clamp(min=1)
    return y, counts(reads, 0 if stats.budget.dense else attn.gates.gates_per_group)


def counts(reads: Tensor, looks: Tensor | int) -> Tensor:
    """Reads `(B, T)` and looks, broadcast to it: `(B, T, 2)`."""
    return torch.stack((reads, torch.zeros_like(reads) + looks), dim=-1)


def choose_keys(attn: ProteusAttention, h: Tensor, arm: Arm, shortlist: int, **changes) -> tuple[Tensor, Tensor]:
    """Attention over the keys that the arm chooses: `(B, T, D)`, and reads and looks `(B, T, 2)`, mean over heads."""
    cfg = replace(attn.cfg, **changes)
    if attn.router is not None:
        raise ValueError("route_heads=True: must be False where an arm chooses keys for all heads")
    B, T, _ = h.shape
    L = min(shortlist, T)
    q, k, v = project(attn, h)
    salience = attn.gates.salience(k)
    q, k = (rotate(x, None, attn.inv_freq).transpose(1, 2) for x in (q, k))
    k, v = (x.repeat_interleave(cfg.heads_per_group, dim=1) for x in (k, v.transpose(1, 2)))
    far = min(floor(cfg.dna_fraction * L + 1e-9), L - 1)
    inputs = ChoiceInputs(q, k, salience, L, far, cfg.n_anchors)
    out, reads = torch.empty_like(q), h.new_empty(B, T)
    for rows in rows_in_hand(out.transpose(1, 2)):
        seen = arm.choose(inputs, rows).expand(B, cfg.n_heads, len(rows), T)
        out[:, :, rows] = F.scaled_dot_product_attention(q[:, :, rows], k, v, attn_mask=seen)
        reads[:, rows] = seen.sum(-1).float().mean(1)
    looks = 0 if arm.looks is None else arm.looks(inputs, torch.arange(T, device=h.device))
    return attn.o_proj(out.transpose(1, 2).flatten(2)), counts(reads, looks)


def project(attn: ProteusAttention, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Un-rotated queries `(B, T, H, d)`, keys and values `(B, T, G, d)` of every head."""
    H, G = attn.cfg.n_heads, attn.cfg.n_kv_heads
    parts = ((attn.q_proj, H), (attn.k_proj, G), (attn.v_proj, G))
    return tuple(part(h).unflatten(-1, (count, -1)) for part, count in parts)


def rows_in_hand(q: Tensor) -> tuple[Tensor, ...]:
    """Row numbers of q `(B, T, H, d)`, split so that the scores of one part fit in memory."""
    B, T, H, _ = q.shape
    return torch.arange(T, device=q.device).split(max(1, SCORES_PER_STEP // (B * H * T)))


def calibrate(model: ProteusLM, ids: Tensor, seed: int = 0) -> ProteusLM:
    """Fit every layer's prototypes by k-means to texts `(B, T)`, read at alpha 0; returns the model."""

    def fit(attn: ProteusAttention, h: Tensor) -> tuple[Tensor, Tensor]:
        attn.calibrate(h, seed)
        with attn.settings(flux_alpha=0.0):
            return attn(h), counts(h.new_zeros(h.shape[:2]), 0)

    walk(model, ids, fit)
    return model
