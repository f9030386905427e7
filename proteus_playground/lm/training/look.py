"""What a model's gates and heads are doing, read now and then while it trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import ProteusLM

DEAD = 0.02  # of an even share of the keys


@dataclass(frozen=True)
class Look:
    """Means over the layers."""

    heads_awake: float  # per token, of n_heads
    gate_entropy: float  # nats, of the share of keys that each gate of a group lures; log C when even
    dead_gates: int  # in the whole model: gates that lure less than 0.02 / C of the keys
    density: float  # see `AttentionStats.density`


@torch.no_grad()
def look(model: ProteusLM, ids: Tensor) -> Look:
    """Run the texts `(B, T)` in evaluation mode at the alpha in force, and sum up. Leaves the model in that mode."""
    stats = model.eval()(ids, return_stats=True)[1]
    entropy, dead = gate_health(model)
    awake, density = (sum(getattr(layer, of) for layer in stats) / len(stats) for of in ("heads_awake", "density"))
    return Look(awake, entropy, dead, density)


def gate_health(model: ProteusLM) -> tuple[float, int]:
    """Entropy of the gates' use in nats, mean over groups and layers, and the number of living gates hardly used."""
    gates = [block.attn.gates for block in model.blocks]
    entropy = torch.stack([torch.special.entr(_share(g.usage)).sum(-1).mean() for g in gates]).mean()
    dead = torch.stack([(g.alive & (g.usage < DEAD / g.gates_per_group)).sum() for g in gates]).sum()
    return float(entropy), int(dead)


def _share(usage: Tensor) -> Tensor:
    return usage / usage.sum(-1, keepdim=True).clamp(min=1e-9)
