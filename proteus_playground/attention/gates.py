"""Gates: slots that each own one prototype, in key space before RoPE.

A key is lured to the gate whose prototype is nearest by cosine; a query probes the gates with the largest q.p.
That is an inverted file (IVF) whose centroids are spherical k-means means, kept fresh by a moving average
(online k-means, as in VQ-VAE's EMA codebook, https://arxiv.org/abs/1711.00937).

Axes: `B` batch, `T` tokens, `G` KV groups, `C` gates per group, `d` head dim, `r` heads per group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.checks import whole_number
from .kmeans import spherical_kmeans
from .precision import Float32Buffers, at_least_float32
from .transforms import records, refuse, without_grad

OBSERVE_LIMIT = 1 << 13  # keys one training pass adds to the moving averages
FIT_LIMIT = 1 << 16  # keys that k-means uses; more change a centroid by less than its own noise
QUANTILES = 257  # points of the salience histogram that the keep decision uses


class Gates(Float32Buffers):
    """Prototypes of every KV group, how well each is used, and which head each belongs to.

    Buffers: `prototypes` (G, C, d) float32 unit vectors; `alive` (G, C) bool; `confidence` (G, C), mean cosine of
    the keys lured, in [0, 1]; `usage` (G, C), share of keys lured; `head_of_gate` (G, C), index in the group;
    `log_share` (G, C), log of the part of a split gate's routing probability that this slot carries;
    `salience_quantiles` (QUANTILES,), NaN until `fit` or a training pass has seen keys.
    """

    def __init__(
        self, n_groups: int, gates_per_group: int, head_dim: int, heads_per_group: int = 1, ema_decay: float = 0.99
    ):
        super().__init__()
        sizes = {
            "n_groups": n_groups,
            "gates_per_group": gates_per_group,
            "head_dim": head_dim,
            "heads_per_group": heads_per_group,
        }
        for name, value in sizes.items():
            whole_number(name, value, 1)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay={ema_decay!r}: must be in [0, 1)")
        self.ema_decay = ema_decay
        shape = (n_groups, gates_per_group)
        self.register_buffer("prototypes", F.normalize(torch.randn(*shape, head_dim), dim=-1))
        self.register_buffer("alive", torch.ones(shape, dtype=torch.bool))
        self.register_buffer("confidence", torch.ones(shape))
        self.register_buffer("usage", torch.full(shape, 1 / gates_per_group))
        self.register_buffer("head_of_gate", (torch.arange(gates_per_group) % heads_per_group).repeat(n_groups, 1))
        self.register_buffer("log_share", torch.zeros(shape))
        self.register_buffer("salience_quantiles", torch.full((QUANTILES,), torch.nan))
        # What training passes have observed since the last fold. It is kept apart so that no update can reach the
        # forward pass that caused it, and saved so that a resumed run folds the same.
        self.register_buffer("pending_sum", torch.zeros(*shape, head_dim))
        self.register_buffer("pending_count", torch.zeros(shape))
        self.register_buffer("pending_sample", torch.full((n_groups, head_dim), torch.nan))
        self.register_buffer("pending_quantiles", torch.full((QUANTILES,), torch.nan))

    @property
    def n_groups(self) -> int:
        return self.prototypes.shape[0]

    @property
    def gates_per_group(self) -> int:
        """Slots per group, dead ones included."""
        return self.prototypes.shape[1]

    @property
    def head_dim(self) -> int:
        return self.prototypes.shape[2]

    @classmethod
    def of(cls, prototypes: Tensor, alive: Tensor) -> Gates:
        """Gates with prototypes `(G, C, d)` and `alive` `(G, C)` only: they can lure keys, and no more."""
        gates = cls.__new__(cls)
        nn.Module.__init__(gates)
        gates.register_buffer("prototypes", prototypes)
        gates.register_buffer("alive", alive)
        return gates

    def group(self, index: int) -> Gates:
        """The gates of one KV group, sharing their memory, as `Gates` of a single group."""
        one = Gates(1, self.gates_per_group, self.head_dim, ema_decay=self.ema_decay)
        for name, buffer in self.named_buffers(recurse=False):
            setattr(one, name, buffer if "quantiles" in name else buffer[index : index + 1])
        return one

    def check_keys(self, k: Tensor, name: str = "k") -> None:
        """Raise unless `k` is floating `(..., G, d)` for these gates."""
        if not isinstance(k, Tensor) or not k.is_floating_point():
            raise TypeError(f"{name}={type(k).__name__}: expected a floating-point tensor (..., G, d)")
        if k.dim() < 3 or tuple(k.shape[-2:]) != (self.n_groups, self.head_dim):
            raise ValueError(f"{name} has shape {tuple(k.shape)}: must be (..., G={self.n_groups}, d={self.head_dim})")

    def cosines(self, x: Tensor) -> Tensor:
        """Cosine of each vector to each prototype: `(..., G, d)` -> `(..., G, C)`, dead gates -inf.

        float32, or float64 for a float64 x.
        """
        with torch.autocast(x.device.type, enabled=False):
            unit = F.normalize(at_least_float32(x), dim=-1)
            cos = torch.einsum("...gd,gcd->...gc", unit, self.prototypes.to(unit.dtype))
            return torch.where(self.alive, cos, -torch.inf)

    @without_grad
    def lure(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """The gate that each key falls into, and the cosine: `(..., G, d)` -> two `(..., G)` (int64, float32).

        Ties go to the lower slot, so that cloning a gate changes nothing until one of the two prototypes moves.
        """
        self.check_keys(k)
        best, gate = self.cosines(k).max(dim=-1)
        return gate, best

    @without_grad
    def salience(self, k: Tensor) -> Tensor:
        """How strongly a token is lured: max cosine x that gate's confidence, mean over groups.

        Keys `(..., G, d)` -> `(...)` float32.
        """
        gate, best = self.lure(k)
        return (best * self._per_gate(self.confidence, gate)).mean(-1)

    def _per_gate(self, table: Tensor, gate: Tensor) -> Tensor:
        return table[torch.arange(self.n_groups, device=gate.device), gate]

    def keep_mask(self, k: Tensor, keep_ratio: float, training: bool = False) -> Tensor:
        """Which tokens are salient: at or above the (1 - keep_ratio) quantile of the stored histogram. `(B, T)` bool.

        The decision uses the token alone, so it is causal and the same in streaming. Where keep_ratio < 1 and no
        quantiles were ever measured, it keeps every token if `training`, else it raises `ValueError`.
        """
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio={keep_ratio!r}: must be in (0, 1]")
        if keep_ratio == 1:
            return torch.ones(k.shape[:-2], dtype=torch.bool, device=k.device)
        quantile = self._quantile(1 - keep_ratio)
        if not training:
            needed = f"keep_ratio={keep_ratio!r}: below 1 the gates need salience quantiles; "
            quantile = refuse(quantile.isnan(), needed + "call calibrate(x) or fit(k), or train first", quantile)
        return ~(self.salience(k) < quantile)  # NaN is kept, so that the loss shows it

    def keep_tokens(
        self,
        k: Tensor,
        keep_ratio: float,
        n_anchors: int,
        real: Tensor | None = None,
        before: Tensor | None = None,
        training: bool = False,
    ) -> Tensor | None:
        """Tokens that take part, `(B, T)` bool, None for all: the salient ones and the first few, but no padding.

        real: `(B, T)` bool, False at padding. before: `(B,)`, how many tokens of each sequence were kept before these.
        training: as in `keep_mask`.
        The first max(1, n_anchors) real tokens of a sequence stay: many rows attend to them (attention sinks), but
        they resemble no prototype, so salience alone would drop them.
        """
        if keep_ratio == 1:
            return real
        salient = self.keep_mask(k, keep_ratio, training)
        real = torch.ones_like(salient) if real is None else real
        nth = real.cumsum(1) if before is None else real.cumsum(1) + before[:, None]
        return real & (salient | (nth <= max(1, n_anchors)))

    def _quantile(self, q: float) -> Tensor:
        """The salience at quantile q in [0, 1], interpolated in the stored histogram."""
        at = q * (QUANTILES - 1)
        low = int(at)
        high = min(low + 1, QUANTILES - 1)
        return torch.lerp(self.salience_quantiles[low], self.salience_quantiles[high], at - low)

    @torch.no_grad()
    def fit(self, k: Tensor, seed: int = 0, iterations: int = 12) -> Gates:
        """Spherical k-means on un-rotated keys `(..., G, d)`; also sets confidence, usage and quantiles.

        Starts by k-means++; empty clusters restart at the keys that fit worst. Deterministic per seed and device type.
        """
        self.check_keys(k)
        keys = F.normalize(k.detach().float().reshape(-1, self.n_groups, self.head_dim), dim=-1)
        if not len(keys) or not keys.isfinite().all():
            raise ValueError(
                f"k of shape {tuple(k.shape)} is empty or holds NaN or infinite values: calibrate on "
                "at least one finite key"
            )
        if len(keys) > FIT_LIMIT:
            gen = torch.Generator().manual_seed(seed)
            keys = keys[torch.randperm(len(keys), generator=gen)[:FIT_LIMIT].to(keys.device)]
        for g in range(self.n_groups):
            slots = self.alive[g].nonzero()[:, 0]
            means, gate = spherical_kmeans(keys[:, g], len(slots), seed + g, iterations)
            self.prototypes[g, slots] = means.to(self.prototypes)
        self._measure(keys)
        self.pending_sum.zero_()
        self.pending_count.zero_()
        return self

    def _measure(self, keys: Tensor) -> None:
        """Set confidence, usage and the histogram from unit keys `(N, G, d)`."""
        gate, best = self.lure(keys)
        count, total = self._per_gate_sums(gate, best[..., None])
        self.confidence.copy_((total[..., 0] / count.clamp(min=1)).clamp(0, 1))
        self.usage.copy_(count / len(keys))
        self.salience_quantiles.copy_(self._histogram(self.salience(keys)))

    @staticmethod
    def _histogram(salience: Tensor, keep: Tensor | None = None) -> Tensor:
        """Quantiles of salience, `(QUANTILES,)`; keep: which entries count, the others sort to the end."""
        at, last = torch.linspace(0, 1, QUANTILES, device=salience.device, dtype=torch.float32), salience.numel() - 1
        if keep is not None:
            salience, last = salience.masked_fill(~keep, torch.inf), (keep.sum() - 1).clamp(min=0)
        return salience.flatten().sort().values[(at * last).round().long()]

    def _per_gate_sums(self, gate: Tensor, values: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Count and sum of `values` (N, G, f) per gate, where `keep` (N,): `(G, C)`, `(G, C, f)`."""
        one_hot = (gate[..., None] == torch.arange(self.gates_per_group, device=gate.device)).to(values.dtype)
        if keep is not None:
            one_hot = one_hot * keep[:, None, None]
        return one_hot.sum(0), torch.einsum("ngc,ngf->gcf", one_hot, values.reshape(-1, *values.shape[-2:]))

    @records
    @without_grad
    def observe(self, k: Tensor, keep: Tensor) -> None:
        """Record the keys `(B, T, G, d)` of a training pass, where `keep` (B, T), for the next `fold`.

        Changes no prototype. From a long text about OBSERVE_LIMIT evenly spaced tokens are taken. If any kept key is
        not finite, nothing is recorded.
        """
        keep = keep & (k.isfinite().all(-1).all(-1) | ~keep).all()  # stays on the device
        step = -(-k.shape[0] * k.shape[1] // OBSERVE_LIMIT)
        keep = keep[:, ::step].flatten()
        keys = F.normalize(k[:, ::step].detach().float(), dim=-1).flatten(0, 1).nan_to_num(0, 0, 0)  # (N, G, d)
        gate, best = self.lure(keys)
        count, total = self._per_gate_sums(gate, keys, keep)
        self.pending_count = self.pending_count + count
        self.pending_sum = self.pending_sum + total
        any_kept = keep.any()  # stays on the device: reading it here would make a GPU wait
        worst = (
            best.mean(-1).masked_fill(~keep, torch.inf).argmin()
        )  # the key that fits worst: a dead gate may move here
        self.pending_sample = torch.where(any_kept, keys.index_select(0, worst[None])[0], self.pending_sample)
        measured = self._histogram(self.salience(keys), keep)
        stored = self.salience_quantiles
        updated = torch.where(stored.isnan(), measured, torch.lerp(measured, stored, self.ema_decay))
        self.pending_quantiles = torch.where(any_kept, updated, self.pending_quantiles)

    @records
    @without_grad
    def fold(self) -> None:
        """Move prototypes, usage and confidence towards the keys observed since the last fold (moving averages).

        Buffers are replaced, never written in place: a backward pass may still need the old ones. Nothing here waits
        for the device.
        """
        count, total = self.pending_count, self.pending_sum
        any_seen, seen = count.any(), (count > 0)[..., None]
        mean = total / count.clamp(min=1)[..., None]
        moved = F.normalize(torch.lerp(F.normalize(mean, dim=-1), self.prototypes, self.ema_decay), dim=-1)
        self.prototypes = torch.where(seen, moved, self.prototypes)
        tight = (mean * self.prototypes).sum(-1).clamp(0, 1)
        self.confidence = torch.where(seen[..., 0], torch.lerp(tight, self.confidence, self.ema_decay), self.confidence)
        share = count / count.sum(1, keepdim=True).clamp(min=1)
        self.usage = torch.where(any_seen, torch.lerp(share, self.usage, self.ema_decay), self.usage)
        self._revive(any_seen)
        self.salience_quantiles = torch.where(any_seen, self.pending_quantiles, self.salience_quantiles)
        self.pending_sum = torch.zeros_like(total)
        self.pending_count = torch.zeros_like(count)

    def _revive(self, any_seen: Tensor) -> None:
        """Move the least used gate of each group to the key that fits worst, if its usage is below 2% of the mean."""
        usage = self.usage.masked_fill(~self.alive, torch.inf)
        least, slot = usage.min(dim=1, keepdim=True)  # (G, 1)
        dead = any_seen & (least < 0.02 / self.gates_per_group) & self.pending_sample.isfinite().all(1, keepdim=True)
        here = dead & (torch.arange(self.gates_per_group, device=slot.device) == slot)  # (G, C)
        sample = F.normalize(self.pending_sample, dim=-1)[:, None]
        self.prototypes = torch.where(here[..., None], sample, self.prototypes)
        self.usage = torch.where(here, 1 / self.gates_per_group, self.usage)
