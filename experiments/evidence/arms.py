"""Arms: selectors of the package, measured with weights trained densely or at a random alpha, at equal keys per query.

`L` is the cap on keys per row. Our notes count as keys; what a selector compares to choose its keys does not. Ours are
measured as the layer's own pass.

Axes: `B` batch, `T` tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...attention import ProteusAttention
from ...attention.selectors import SELECTORS, Sight, attend_all
from ...common.checks import whole_number
from ...lm.model import ProteusLM

OURS = {"gates": {"notes": False}, "gates + notes": {"notes": True}}  # selectors that are the layer's own pass


@dataclass(frozen=True)
class Arm:
    """A selector by its name. alpha: whether the weights trained with a random alpha are used."""

    selector: str
    alpha: bool = False


ARMS = {name: Arm(name) for name in SELECTORS if name != "oracle"}
ARMS |= {f"{name} + trained alpha": Arm(name, alpha=True) for name in (*OURS, "dense")}
ARMS["oracle"] = Arm("oracle")
DENSE_ARMS = tuple(name for name, arm in ARMS.items() if not SELECTORS[arm.selector].capped)  # they have no L
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
    if arm.selector in OURS:
        fields = {**OURS[arm.selector], **changes}
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
    """Attention over what the arm's selector chooses: `(B, T, D)`, and reads and looks `(B, T, 2)`, mean over heads."""
    if attn.router is not None:
        raise ValueError("route_heads=True: must be False where an arm chooses keys for all heads")
    config = replace(attn.cfg, **changes, shortlist=shortlist)
    sight = Sight.of(*attn.project(h), config, inv_freq=attn.inv_freq, gates=attn.gates)
    done = attend_all(SELECTORS[arm.selector], sight)
    return attn.o_proj(done.out.flatten(2)), counts(done.reads.float().mean(2), done.looks)


def calibrate(model: ProteusLM, ids: Tensor, seed: int = 0) -> ProteusLM:
    """Fit every layer's prototypes by k-means to texts `(B, T)`, read at alpha 0; returns the model."""

    def fit(attn: ProteusAttention, h: Tensor) -> tuple[Tensor, Tensor]:
        attn.calibrate(h, seed)
        with attn.settings(flux_alpha=0.0):
            return attn(h), counts(h.new_zeros(h.shape[:2]), 0)

    walk(model, ids, fit)
    return model
