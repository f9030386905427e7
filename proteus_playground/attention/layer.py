"""The layer: project, route, keep, budget, shortlist, attend, weigh heads, project out.

Axes: `B` batch, `T` tokens, `D` model width, `H` query heads, `G` KV groups, `r` heads per group, `d` head dim,
`C` gates per group, `K` slots for awake heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.tensors import read_tensors, write_tensors
from . import decoding
from .backends import choose_backend
from .bank.bank import KVBank
from .budget import Budget, check_alpha, plan_budget
from .config import AttentionConfig
from .fast_paths import attend_densely, attend_in_pieces
from .functional import proteus_attention
from .gates import Gates
from .heads import is_grouped, pick_awake, project_in, project_out
from .rope import Frequencies
from .routing import Router, Routes, gate_probability, head_probability, is_learning, wake_heads
from .stats import stats_of
from .trace import AttentionTrace, trace_of


class ProteusAttention(nn.Module):
    """Causal self-attention in which each token wakes few of many heads and each query reads few of many keys.

    Mixture of attention heads + IVF-style sparse attention over key clusters. `attn(x)` maps `(B, T, D)` to
    `(B, T, D)`; `attn(x, return_stats=True)` also returns `AttentionStats`. At flux alpha 0 it is exactly fused
    dense attention. In training, prototypes follow the keys by a moving average, one forward pass late.
    """

    def __init__(self, cfg: AttentionConfig):
        super().__init__()
        if not isinstance(cfg, AttentionConfig):
            raise TypeError(f"cfg={type(cfg).__name__}: expected AttentionConfig")
        self.cfg = cfg
        H, G, d, D, C = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_model, cfg.gates_per_group
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, n * d, bias=cfg.bias) for n in (H, G, G))
        self.o_proj = nn.Linear(H * d, D, bias=cfg.bias)
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(proj.weight, std=cfg.init_scale * proj.in_features**-0.5)
        self.rope = None if cfg.rope_theta is None else Frequencies(d, cfg.rope_theta)
        self.gates = Gates(G, C, d, cfg.heads_per_group, cfg.ema_decay)
        self.router = Router(G, C, cfg.heads_per_group, D, cfg.balance_rate) if cfg.route_heads else None

    def extra_repr(self) -> str:
        return f"flux_alpha={self.cfg.flux_alpha}, shortlist={self.cfg.shortlist}, backend={self.cfg.backend!r}"

    @property
    def inv_freq(self) -> Tensor | None:
        """Rotary frequencies, `(d / 2,)` float32, radians per token."""
        return None if self.rope is None else self.rope.inv_freq

    def set_flux_alpha(self, value: float | None) -> None:
        """Pin alpha in [0, 1], or release it with None so that the length decides."""
        self.cfg = replace(self.cfg, flux_alpha=None if value is None else check_alpha(value))

    @contextmanager
    def settings(self, **changes) -> Iterator[None]:
        """Other fields of the layer's `AttentionConfig` while the block runs; then these are as they were before."""
        before = {name: getattr(self.cfg, name) for name in changes}
        self.cfg = replace(self.cfg, **changes)
        try:
            yield
        finally:
            self.cfg = replace(self.cfg, **before)

    @torch.no_grad()
    def calibrate(self, x: Tensor, seed: int = 0) -> ProteusAttention:
        """Fit prototypes, confidence and the salience histogram to hidden states `(B, T, D)`."""
        self._check(x, None, None)
        self.gates.fit(self.k_proj(x).unflatten(-1, (self.cfg.n_kv_heads, -1)), seed=seed)
        return self

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        return_stats: bool = False,
        return_trace: bool = False,
    ):
        """Attend causally.

        x: `(B, T, D)`. positions: `(T,)` or `(B, T)`, in tokens, default 0..T-1. key_padding_mask: `(B, T)` bool,
        True for padding, as in `nn.MultiheadAttention`. Returns `(B, T, D)`, zero for dropped tokens and padding
        (their residual stands), then `AttentionStats` and `AttentionTrace` when asked. Budgets follow T, padding
        included. Raises `TypeError` or `ValueError` naming the argument.
        """
        self._check(x, positions, key_padding_mask)
        learning = is_learning(self)
        if learning:
            self._fold()
        budget = plan_budget(self.cfg, x.shape[1])
        return self._pass(x, budget, positions, key_padding_mask, learning, return_stats, return_trace)

    def _pass(self, x: Tensor, budget: Budget, positions, key_padding_mask, learning, return_stats, return_trace):
        """The parallel pass, by the shortest way there is; in training always the same, as recomputation must be."""
        cfg = self.cfg
        if key_padding_mask is None and not (self.training or return_stats or return_trace):
            if budget.flux_alpha == 0:  # every head wakes with weight 1, every token stays: nothing to decide
                return attend_densely(self, x, positions)
            if self._fits_pieces(x, budget):
                with torch.cuda.device_of(x):
                    return attend_in_pieces(self, x, positions, budget)
        k, v = (proj(x).unflatten(-1, (cfg.n_kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        keep = self.kept(k, budget, key_padding_mask)
        q, routes = self._queries(x, budget, keep, return_trace)
        awake = None if routes is None else routes.real.flatten(2)
        result = proteus_attention(
            q,
            k,
            v,
            self.gates,
            budget,
            positions=positions,
            keep=keep,
            awake=awake,
            backend=cfg.backend,
            explain=return_stats,
            int8=cfg.int8,
            inv_freq=self.inv_freq,
        )
        heads = self._weigh(result.out, routes)
        y = self._merge(heads, routes)
        if keep is not None and cfg.bias:
            y = y.masked_fill(~keep[..., None], 0)
        if learning:
            self._observe(k, keep, routes)
        asked = [stats_of(result, routes, keep, key_padding_mask, budget)] if return_stats else []
        asked += [trace_of(heads, routes, keep, self.gates, q, k)] if return_trace else []
        return (y, *asked) if asked else y

    def new_state(self, batch: int = 1, tokens: int | None = None, *, dtype: torch.dtype | None = None) -> KVBank:
        """An empty state for `decode`, for `batch` sequences.

        tokens: the most the sequences may come to hold, which budgets follow below flux alpha 1 and the state's size
        with them. None: without end, at alpha 1 or where alpha follows the length (it is 1 then) with the constant
        budget, at alpha 0 as a cache that grows. Raises `ValueError` for None at an alpha between.
        dtype: of stored keys and values, default the weights'.
        """
        return decoding.new_state(self, batch, tokens, dtype)

    @torch.no_grad()
    def prefill(
        self,
        x: Tensor,
        tokens: int | None = None,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        return_trace: bool = False,
    ):
        """The parallel pass over x `(B, T, D)` and the state after it (`KVBank`), to go on from with `decode`.

        Arguments as in `forward`, but budgets are those of `new_state(B, tokens)`. Positions follow on from each
        sequence's last token that is not padding. In eval mode only, without autograd. Returns y, the state and, when
        asked, the `AttentionTrace`. Raises as `forward` does.
        """
        self._check(x, positions, key_padding_mask)
        self._refuse_training()
        state = self.new_state(len(x), tokens, dtype=x.dtype)
        if x.shape[1] > state.budget.tokens:
            raise ValueError(f"tokens={tokens}: must be at least the {x.shape[1]} tokens of x")
        out = self._pass(x, state.budget, positions, key_padding_mask, False, False, return_trace)
        decoding.fill(self, x, state, positions, key_padding_mask)
        return (out[0], state, out[1]) if return_trace else (out, state)

    @torch.no_grad()
    def decode(
        self,
        x: Tensor,
        state: KVBank,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        return_trace: bool = False,
    ):
        """The next n tokens, `(B, n, D)` -> `(B, n, D)`: the rows of the parallel pass over all so far.

        Changes `state` in place. positions: `(n,)` or `(B, n)`, by default they follow on. key_padding_mask: `(B, n)`
        bool, True for what is no token (a sequence that has ended). In eval mode only: in training prototypes would
        move between a key's step and its query's. Without autograd. return_trace: also these rows' `AttentionTrace`.
        Raises `TypeError` or `ValueError`.
        """
        self._check(x, positions, key_padding_mask)
        self._refuse_training()
        if not isinstance(state, KVBank):
            raise TypeError(f"state={type(state).__name__}: expected KVBank, from new_state or prefill")
        if state.gates is not self.gates:
            raise ValueError("state is of another layer: must come from this layer's new_state or prefill")
        return decoding.advance(self, x, state, positions, key_padding_mask, return_trace)

    def head_contributions(self, trace: AttentionTrace) -> Tensor:
        """What each slot's head adds to the residual, `(B, T, G K, D)`; zero for sleepers.

        Their sum and o_proj's bias are the layer's output, where a token was not dropped.
        """
        return trace.contributions(self.o_proj.weight)

    def consensus(self, trace: AttentionTrace) -> Tensor:
        """Where the awake heads point together: the mean of their contributions' directions by weight, `(B, T, D)`.

        float32. Its dot product with a unit vector is the heads' mean cosine with it. Zero where no head is awake.
        """
        return trace.consensus(self.o_proj.weight)

    def _refuse_training(self) -> None:
        if self.training:
            raise ValueError("training=True: must be eval mode to decode, where prototypes stand still; call eval()")

    def kept(self, k: Tensor, budget: Budget, padding: Tensor | None) -> Tensor | None:
        """Tokens that take part, `(B, T)` bool; None for all. The anchors always do."""
        cut = budget.keep_ratio < 1
        unmeasured = cut and self.training and bool(self.gates.salience_quantiles[0].isnan())  # the first training pass
        return self.gates.keep_tokens(
            k, 1.0 if unmeasured else budget.keep_ratio, self.cfg.n_anchors, None if padding is None else ~padding
        )

    def _fits_pieces(self, x: Tensor, budget: Budget) -> bool:
        """Whether the Triton backend can run the whole layer piece by piece: nothing dropped, no gradient asked."""
        cfg = self.cfg
        traced = torch.is_grad_enabled() or torch.compiler.is_compiling()
        plain = not (traced or torch.is_autocast_enabled(x.device.type))
        whole = not budget.dense and budget.keep_ratio == 1 and budget.heads_awake_max == cfg.heads_per_group
        return plain and whole and choose_backend(x.device, cfg.backend, cfg.head_dim, x.dtype)[0] == "triton"

    def _queries(self, x: Tensor, budget: Budget, keep: Tensor | None, traced: bool = False):
        """Rows to attend with, `(B, T, G K, d)`, un-rotated, and how they were routed (`Routes` or None)."""
        cfg, G, r = self.cfg, self.cfg.n_kv_heads, self.cfg.heads_per_group
        if self.router is None:
            return self.q_proj(x).unflatten(-1, (cfg.n_heads, -1)), None
        slots = budget.heads_awake_max
        grouped = is_grouped(cfg.n_heads, cfg.head_dim, cfg.d_model, slots, r)
        if grouped:
            mean = self._per_head(self.q_proj.weight).unflatten(0, (G, r)).mean(1)  # (G, d, D)
            q_mean = torch.einsum("btD,gdD->btgd", x, mean.to(x.dtype))
            if cfg.bias:
                q_mean = q_mean + self.q_proj.bias.view(G, r, -1).mean(1)
        else:
            q = self.q_proj(x).unflatten(-1, (G, r, cfg.head_dim))  # (B, T, G, r, d)
            q_mean = q.mean(3)
        gates, logits = self.gates, self.router(x)
        prob = gate_probability(
            logits, gates.cosines(q_mean), gates.confidence, gates.log_share, cfg.prior_temperature, cfg.prior_max
        )
        awake, weight = wake_heads(
            head_probability(prob, gates.head_of_gate, r),
            self.router.balance,
            budget.flux_alpha,
            budget.head_top_p,
            budget.heads_awake_min,
            slots,
        )
        traced = (logits, prob) if traced else (None, None)  # else nothing holds on to them
        if slots == r:
            return q.flatten(2, 3), Routes(awake, weight, None, awake, *traced)
        slot, real = pick_awake(awake, slots)
        if keep is not None:
            real = real & keep[..., None, None]  # a dropped token projects no query
        routes = Routes(awake, weight, slot, real, *traced)
        if grouped:
            bias = self.q_proj.bias.view(cfg.n_heads, -1) if cfg.bias else None
            q = project_in(x, self._per_head(self.q_proj.weight), bias, self._global(slot), real)
        else:
            q = q.gather(3, slot[..., None].expand(*slot.shape, cfg.head_dim))
        return q.flatten(2, 3), routes

    def _per_head(self, weight: Tensor) -> Tensor:
        return weight.view(self.cfg.n_heads, self.cfg.head_dim, -1)

    def _global(self, slot: Tensor) -> Tensor:
        """Head index in the layer of each slot."""
        base = torch.arange(self.cfg.n_kv_heads, device=slot.device) * self.cfg.heads_per_group
        return slot + base[:, None]

    def _weigh(self, out: Tensor, routes: Routes | None) -> Tensor:
        """Each head as loud as it is awake: rows `(B, T, G K, d)` -> `(B, T, G, K, d)`."""
        out = out.unflatten(2, (self.cfg.n_kv_heads, -1))
        if routes is None:
            return out
        weight = routes.weight if routes.slot is None else routes.weight.gather(-1, routes.slot)
        return out * (weight * routes.real)[..., None].to(out.dtype)

    def _merge(self, out: Tensor, routes: Routes | None) -> Tensor:
        """Project weighted heads out: `(B, T, G, K, d)` -> `(B, T, D)`."""
        cfg = self.cfg
        if routes is None or routes.slot is None:
            return self.o_proj(out.flatten(2))
        if is_grouped(cfg.n_heads, cfg.head_dim, cfg.d_model, routes.slot.shape[-1], cfg.heads_per_group):
            y = project_out(out, self._per_head(self.o_proj.weight.T), self._global(routes.slot), routes.real)
            return y if self.o_proj.bias is None else y + self.o_proj.bias
        spread = out.new_zeros(*out.shape[:3], cfg.heads_per_group, cfg.head_dim)
        return self.o_proj(spread.scatter(3, routes.slot[..., None].expand_as(out), out).flatten(2))

    def _fold(self) -> None:
        self.gates.fold()
        if self.router is not None:
            self.router.fold()

    @torch.no_grad()
    def _observe(self, k: Tensor, keep: Tensor | None, routes: Routes | None) -> None:
        keep = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if keep is None else keep
        self.gates.observe(k, keep)
        if routes is not None:
            self.router.observe(routes.awake, keep)

    def _check(self, x, positions, padding) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x={type(x).__name__}: expected a floating-point tensor (B, T, D)")
        if x.dim() != 3 or x.shape[2] != self.cfg.d_model or 0 in x.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}: must be (B, T, D={self.cfg.d_model}), no axis empty")
        if positions is not None and not isinstance(positions, Tensor):
            raise TypeError(f"positions={type(positions).__name__}: expected a tensor (T,) or (B, T)")
        if positions is not None and tuple(positions.shape) not in ((x.shape[1],), tuple(x.shape[:2])):
            raise ValueError(
                f"positions has shape {tuple(positions.shape)}: must be (T,) or (B, T) for x {tuple(x.shape)}"
            )
        if padding is not None and (not isinstance(padding, Tensor) or padding.dtype != torch.bool):
            raise TypeError(
                f"key_padding_mask={getattr(padding, 'dtype', type(padding).__name__)}: expected a bool "
                "tensor (B, T), True for padding"
            )
        if padding is not None and padding.shape != x.shape[:2]:
            raise ValueError(f"key_padding_mask has shape {tuple(padding.shape)}: must be {tuple(x.shape[:2])}")

    def save(self, path: str | Path) -> Path:
        """Write weights, gates and config to one safetensors file, whole or not at all."""
        return write_tensors(path, self.state_dict(), self.cfg.to_dict())

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> ProteusAttention:
        """Rebuild a saved layer. Raises `FileNotFoundError`, or `ValueError` when the file is not one of ours."""
        tensors, about = read_tensors(path, "ProteusAttention.save")
        try:
            attn = cls(AttentionConfig(**about))
            attn.load_state_dict(tensors)
        except Exception as problem:
            raise ValueError(
                f"path={str(path)!r}: not a file that ProteusAttention.save wrote ({problem})"
            ) from problem
        return attn.to(device)
