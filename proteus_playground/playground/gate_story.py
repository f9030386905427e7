"""The gates of one layer, step by step: prototypes move towards keys, and surgery changes gates and heads.

The text goes through the model once, and the keys of one KV group are projected onto two fixed axes. Each update does
to the gates what a training step does, `observe` and `fold`, while the weights stay fixed. Each operation is one of
`attention.surgery`.

Axes: `T` tokens, `C` gates per group, `G` KV groups, `d` head dim, `V` vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Gates, ProteusAttention, surgery
from ..common.checks import real_number, whole_number
from .layer_view import principal_plane
from .live import Live

TOKENS_PER_UPDATE = 256  # fewer than the text has, as a training step uses a batch and not all texts
SPARE = 3  # free slots made at the start, so that the first clones add no slot: its note would cost another read
OPERATIONS = ("clone", "prune", "merge", "move", "add head")


@dataclass(frozen=True)
class Snapshot:
    """The gates of one KV group after some updates. Later updates do not change the arrays."""

    update: int  # moving averages taken so far
    gate: np.ndarray  # (T,) int, the slot whose prototype lured each key
    lured: np.ndarray  # (C,) int, keys in each slot
    prototypes: np.ndarray  # (C, 2) float32, on the plane of `GateStory.keys`
    alive: np.ndarray  # (C,) bool, False for a free slot
    confidence: np.ndarray  # (C,) float32 in [0, 1]
    usage: np.ndarray  # (C,) float32, moving average of the share of keys lured
    head: np.ndarray  # (C,) int, the head of the group that the gate belongs to
    nearest: np.ndarray  # (C,) int, the live slot whose prototype is most like this one's
    heads: int  # heads in the group
    fit: float  # mean cosine of the keys to the prototypes they are lured by
    moved: float  # share of the keys that changed their slot in the last update
    revived: tuple[int, ...]  # slots whose unused prototype the last update moved to a key that fitted no gate


@dataclass(frozen=True)
class Operation:
    """One operation of surgery and what it changed."""

    what: str  # one of OPERATIONS
    gate: int  # the slot operated on; the new head for "add head"
    other: int | None  # the slot merged into it, the head it moved to, the slot a clone took
    grown: bool  # whether every group got one more slot
    change: float  # of the layer's output over the text, Frobenius, relative to the output before
    nll: tuple[float, float]  # the model's mean loss per token of the text before and after, nats


class GateStory:
    """A copy of a model and the gates of one of its KV groups. It must be used by one thread at a time.

    scattered: begin with prototypes in random directions, drawn with `seed`; ema_decay: of the moving average, 0 to 1;
    flux_alpha: where outputs are compared before and after an operation. `keys` `(T, 2)` are the group's unit keys on
    the two axes along which they vary most; `explained` is the share of their variance along these axes.
    """

    def __init__(
        self,
        live: Live,
        *,
        layer: int = 0,
        group: int = 0,
        scattered: bool = True,
        ema_decay: float = 0.8,
        flux_alpha: float = 1.0,
        seed: int = 0,
    ):
        model = live.model
        whole_number("layer", layer, 0, len(model.blocks) - 1)
        whole_number("group", group, 0, model.cfg.attention.n_kv_heads - 1)
        real_number("ema_decay", ema_decay, 0, 1)
        self.model = deepcopy(model).eval().requires_grad_(False)
        for block in self.model.blocks:
            block.attn.set_flux_alpha(flux_alpha)
        self.tokens, self.layer, self.group, self.update = live.tokens, layer, group, 0
        first = int(self.gates.alive[group].nonzero()[0])
        spare = [surgery.clone(self.attn, group, first) for _ in range(SPARE)]
        for slot in spare:
            surgery.merge(self.attn, group, first, slot)
        self._ids = live.ids[None]
        self._x = self._hidden()
        self._k = self.attn.k_proj(self._x).unflatten(-1, (self.attn.cfg.n_kv_heads, -1))
        self._unit = F.normalize(self._k[0, :, group].float(), dim=-1)
        self._centre, self._axes, self.explained = principal_plane(self._unit)
        self.keys = ((self._unit - self._centre) @ self._axes.T).numpy()
        self.gates.ema_decay = ema_decay
        if scattered:
            scatter(self.gates, seed)
        self._moved, self._revived = 0.0, ()

    @property
    def attn(self) -> ProteusAttention:
        return self.model.blocks[self.layer].attn

    @property
    def gates(self) -> Gates:
        return self.attn.gates

    def _hidden(self) -> Tensor:
        """The input of the layer's attention, `(1, T, D)`."""
        x = self.model._embed(self._ids)
        for block in self.model.blocks[: self.layer]:
            x = block(x)
        return self.model.blocks[self.layer].attn_norm(x)

    def _lured(self) -> tuple[Tensor, Tensor]:
        gate, cosine = self.gates.lure(self._k[0])
        return gate[:, self.group], cosine[:, self.group]

    def step(self) -> Snapshot:
        """Update the moving averages with the next TOKENS_PER_UPDATE tokens; after its end the text begins again."""
        gates, g, size = self.gates, self.group, len(self.tokens)
        before = self._lured()[0]
        at = (torch.arange(min(TOKENS_PER_UPDATE, size)) + self.update * TOKENS_PER_UPDATE) % size
        gates.observe(self._k[:, at], torch.ones(1, len(at), dtype=torch.bool))
        gates.fold()
        self.update += 1
        # Only a revived prototype lies exactly on a key; a moving average does not.
        on_sample = (gates.prototypes[g] @ F.normalize(gates.pending_sample[g], dim=-1)) > 1 - 1e-6
        self._revived = tuple((on_sample & gates.alive[g]).nonzero()[:, 0].tolist())
        self._moved = float((self._lured()[0] != before).float().mean())
        return self.snapshot()

    def snapshot(self) -> Snapshot:
        gates, g = self.gates, self.group
        gate, cosine = self._lured()
        prototypes, alive = gates.prototypes[g], gates.alive[g]
        like = (prototypes @ prototypes.T).fill_diagonal_(-torch.inf).masked_fill(~alive, -torch.inf)
        return Snapshot(
            update=self.update, gate=gate.numpy(), lured=torch.bincount(gate, minlength=len(alive)).numpy(),
            prototypes=((prototypes - self._centre) @ self._axes.T).numpy(), alive=alive.numpy().copy(),
            confidence=gates.confidence[g].numpy().copy(), usage=gates.usage[g].numpy().copy(),
            head=gates.head_of_gate[g].numpy().copy(), nearest=like.argmax(1).numpy(),
            heads=self.attn.cfg.heads_per_group, fit=float(cosine.mean()), moved=self._moved, revived=self._revived,
        )  # fmt: skip

    def operate(self, what: str, gate: int = 0, other: int | None = None) -> Operation:
        """One of OPERATIONS on `gate`; other: the slot to merge with it, or the head to move it to.

        `ValueError` from `attention.surgery` where it cannot be done; nothing has changed then.
        """
        if what not in OPERATIONS:
            raise ValueError(f"what={what!r}: allowed is {', '.join(map(repr, OPERATIONS))}")
        attn, g, slots = self.attn, self.group, self.gates.gates_per_group
        out, nll = self._output()
        if what == "clone":
            other = surgery.clone(attn, g, gate)
        elif what == "prune":
            surgery.prune(attn, g, gate)
        elif what == "merge":
            surgery.merge(attn, g, gate, other)
        elif what == "move":
            surgery.move(attn, g, gate, other)
        else:
            gate = surgery.add_head(attn)
        attn.requires_grad_(False)
        now, nll_now = self._output()
        self._moved, self._revived = 0.0, ()
        change = float((now - out).norm() / out.norm().clamp(min=1e-9))
        return Operation(what, gate, other, self.gates.gates_per_group > slots, change, (nll, nll_now))

    @torch.no_grad()
    def _output(self) -> tuple[Tensor, float]:
        """The layer's output over the text and the model's loss per token, nats."""
        logits = self.model(self._ids)[0, :-1]
        return self.attn(self._x), float(F.cross_entropy(logits, self._ids[0, 1:]))


def scatter(gates: Gates, seed: int = 0) -> None:
    """Give the prototypes random directions and equal usage, as in a new layer."""
    gen = torch.Generator().manual_seed(seed)
    gates.prototypes = F.normalize(torch.randn(gates.prototypes.shape, generator=gen), dim=-1).to(gates.prototypes)
    gates.usage = torch.full_like(gates.usage, 1 / gates.gates_per_group)
    gates.confidence = torch.ones_like(gates.confidence)
    gates.pending_sum, gates.pending_count = torch.zeros_like(gates.pending_sum), torch.zeros_like(gates.pending_count)
