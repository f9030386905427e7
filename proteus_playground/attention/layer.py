"""The layer: project, keep and route, budget, shortlist, attend, weigh heads, project out.

Axes: `B` batch, `T` tokens, `n` next tokens, `D` model width, `H` query heads, `G` KV groups, `d` head dim, `C` gates
per group, `K` slots for awake heads per group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.tensors import read_tensors, write_tensors
from .backends import choose_backend
from .bank.bank import ENDLESS, KVBank
from .budget import Budget, check_alpha, plan_budget
from .config import AttentionConfig
from .decide import TokenDecisions, decide, kept_tokens, weigh
from .fast_paths import attend_densely, attend_in_pieces
from .functional import check_budget, proteus_attention
from .gates import Gates
from .heads import HeadRows, awake_queries, check_linear, is_bare, merge_heads, pick_rows, project_queries
from .records import AttentionTrace, LayerOutput, stats_of, trace_of
from .rope import Frequencies
from .routing import Router, is_learning
from .transforms import in_forward_mode, in_vmap, is_recorded, is_traced

TOKENS_PER_STEP = 1 << 16  # tokens whose keys and values are held at a time while a prefill fills a bank


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

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        budget: Budget | None = None,
        return_stats: bool = False,
        return_trace: bool = False,
    ):
        """Attend causally.

        x: `(B, T, D)`. positions: `(T,)` or `(B, T)`, in tokens, default 0..T-1. key_padding_mask: `(B, T)` bool,
        True for padding, as in `nn.MultiheadAttention`. budget: default that of T tokens, padding included.
        Returns `(B, T, D)`, then `AttentionStats` and `AttentionTrace` if asked for. The output is zero for dropped
        tokens and padding, so that only their residual goes on. Raises `TypeError` or `ValueError` naming the argument.
        """
        self._check(x, positions, key_padding_mask, budget)
        if (return_stats or return_trace) and in_vmap():
            raise RuntimeError("return_stats, return_trace: must be False under torch.func.vmap")
        learning = is_learning(self)
        if learning:
            self._fold()
        budget = plan_budget(self.cfg, x.shape[1]) if budget is None else budget
        x = _without_padding(x, key_padding_mask)
        plain = key_padding_mask is None and not (self.training or return_stats or return_trace)
        if plain and (fast := self._fast_path(x, budget, positions)) is not None:
            return fast
        k, v = self._keys_values(x)
        # Which tokens are kept and which heads are awake; only awake heads project queries.
        q, rows, decisions = self._decide(x, k, budget, key_padding_mask, traced=return_trace)
        # Each query row gets its shortlist of keys and attends to these alone.
        result = proteus_attention(
            q,
            k,
            v,
            self.gates,
            budget,
            positions=positions,
            keep=decisions.keep,
            awake=rows.awake,
            backend=self.cfg.backend,
            explain=return_stats,
            int8=self.cfg.int8,
            inv_freq=self.inv_freq,
        )
        heads = weigh(result.out.unflatten(2, (self.cfg.n_kv_heads, -1)), rows.weight)
        y = self._project_out(heads, rows, decisions.keep)
        if learning:
            self._observe(k, decisions, y)
        stats = stats_of(result, decisions, rows, key_padding_mask) if return_stats else None
        trace = trace_of(heads, decisions, rows, self.gates, q, k) if return_trace else None
        return LayerOutput(y, stats, trace).unwrap()

    def _fast_path(self, x: Tensor, budget: Budget, positions: Tensor | None) -> Tensor | None:
        """The same output by a shorter way where there is one, else None.

        Never used in training: activation checkpointing must recompute exactly what the first pass computed. It reads
        weights and calls no projection.
        """
        if not is_bare(self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            return None
        if budget.flux_alpha == 0:  # every token takes part and every head has weight 1: there is nothing to decide
            return attend_densely(self, x, positions)
        if self._fits_pieces(x, budget):
            with torch.cuda.device_of(x):
                return attend_in_pieces(self, x, positions, budget)
        return None

    def _fits_pieces(self, x: Tensor, budget: Budget) -> bool:
        """Whether the Triton backend can run the whole layer piece by piece: no token dropped, no gradient needed."""
        cfg = self.cfg
        eager = not (is_recorded() or torch.is_autocast_enabled(x.device.type))
        whole = not budget.dense and budget.keep_ratio == 1 and budget.heads_awake_max == cfg.heads_per_group
        if not (eager and whole):
            return False
        return choose_backend(x.device, cfg.backend, cfg.head_dim, x.dtype)[0] == "triton"

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Un-rotated queries `(B, T, H, d)`, keys and values `(B, T, G, d)` of every head."""
        return self.q_proj(x).unflatten(-1, (self.cfg.n_heads, -1)), *self._keys_values(x)

    def _keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values, `(B, T, G, d)` each."""
        k, v = (proj(x).unflatten(-1, (self.cfg.n_kv_heads, -1)) for proj in (self.k_proj, self.v_proj))
        return k, v

    def _decide(
        self,
        x: Tensor,
        k: Tensor,
        budget: Budget,
        padding: Tensor | None,
        before: Tensor | None = None,
        traced: bool = False,
    ) -> tuple[Tensor, HeadRows, TokenDecisions]:
        """Un-rotated queries of awake heads `(B, T, G K, d)`, which heads these are, and what was decided.

        before: `(B,)`, tokens already kept of the sequences that x continues.
        """
        routed = self.router is not None
        queries, mean = project_queries(x, self.q_proj, self.cfg, budget.heads_awake_max if routed else None)
        decisions = decide(
            self.cfg,
            self.gates,
            budget,
            k,
            mean,
            logits=self.router(x) if routed else None,
            balance=self.router.balance if routed else None,
            real=None if padding is None else ~padding,
            before=before,
            training=self.training,
            traced=traced,
        )
        rows = pick_rows(decisions, self.cfg.n_kv_heads)
        return awake_queries(x, queries, self.q_proj, self.cfg, rows), rows, decisions

    def _project_out(self, heads: Tensor, rows: HeadRows, keep: Tensor | None) -> Tensor:
        """Weighted outputs of heads `(B, T, G, K, d)` -> `(B, T, D)`."""
        y = merge_heads(heads, self.o_proj, self.cfg, rows)
        if keep is not None and self.cfg.bias:
            y = y.masked_fill(~keep[..., None], 0)  # o_proj's bias would change the dropped tokens
        return y

    def _fold(self) -> None:
        """Update prototypes and balance with what earlier training passes observed, never with this pass."""
        with ordinary_tensors():
            self.gates.fold()
            if self.router is not None:
                self.router.fold()

    def _observe(self, k: Tensor, decisions: TokenDecisions, y: Tensor) -> None:
        """Record this pass for the next `_fold`, unless the keys or the output y hold NaN or infinite values."""
        k, y, keep = k.detach(), y.detach(), decisions.keep
        if keep is None:
            keep = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
        finite = (k.isfinite().all(-1).all(-1) | ~keep).all() & y.isfinite().all()  # stays on the device
        keep = keep & finite
        with ordinary_tensors():
            self.gates.observe(k, keep)
            if decisions.awake is not None:
                self.router.observe(decisions.awake.unflatten(2, (self.cfg.n_kv_heads, -1)), keep)

    def kept(self, k: Tensor, budget: Budget, padding: Tensor | None) -> Tensor | None:
        """Tokens that take part, `(B, T)` bool; None for all. k: un-rotated keys; padding: True for padding."""
        real = None if padding is None else ~padding
        return kept_tokens(self.cfg, self.gates, budget, k, real=real, training=self.training)

    # -- token by token -------------------------------------------------------------------------------------------

    def new_state(self, batch: int = 1, tokens: int | None = None, *, dtype: torch.dtype | None = None) -> KVBank:
        """An empty state for `decode`, for `batch` sequences.

        tokens: longest the sequences may become. For 0 < alpha < 1 the budget depends on it, so it is required. None
        means unlimited: in fixed memory at alpha 1 (or where alpha follows the length), as an ordinary growing KV cache
        at alpha 0. dtype: of stored keys and values, default the weights'. Raises `ValueError` where tokens is missing.
        """
        alpha, weight = self.cfg.flux_alpha, self.k_proj.weight
        if tokens is None and alpha is not None and 0 < alpha < 1:
            raise ValueError(
                f"tokens=None: at flux_alpha={alpha} budgets follow the length; give the most tokens the state may hold"
            )
        return KVBank.empty(
            plan_budget(self.cfg, ENDLESS if tokens is None else tokens),
            self.gates,
            batch,
            inv_freq=self.inv_freq,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device,
            int8=self.cfg.int8,
        )

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
        """Process all of x `(B, T, D)` at once and return y and the state after it (`KVBank`), for `decode`.

        Arguments as in `forward`, but budgets are those of `new_state(B, tokens)`. Positions follow on from each
        sequence's last token that is not padding. In eval mode only, without autograd. return_trace: the
        `AttentionTrace` is returned as well, after the state. Raises as `forward` does.
        """
        self._check(x, positions, key_padding_mask)
        self._check_decoding()
        x = _without_padding(x, key_padding_mask)
        state = self.new_state(len(x), tokens, dtype=x.dtype)
        budget = state.budget
        if x.shape[1] > budget.tokens:
            raise ValueError(f"tokens={tokens}: must be at least the {x.shape[1]} tokens of x")
        out = self.forward(
            x, positions=positions, key_padding_mask=key_padding_mask, budget=budget, return_trace=return_trace
        )
        self._fill(x, state, positions, key_padding_mask)
        return (out[0], state, out[1]) if return_trace else (out, state)

    def _fill(self, x: Tensor, state: KVBank, positions: Tensor | None, padding: Tensor | None) -> None:
        """Put the keys and values of x `(B, T, D)` into a bank."""
        for i in range(0, x.shape[1], TOKENS_PER_STEP):
            part = slice(i, i + TOKENS_PER_STEP)
            k, v = self._keys_values(x[:, part])
            real = None if padding is None else ~padding[:, part]
            keep = kept_tokens(self.cfg, self.gates, state.budget, k, real=real, before=state.count)
            state.extend(k, v, keep=keep, positions=None if positions is None else positions[..., part])
        if padding is not None:  # padding at the end is no part of the text: decoding follows the last real token
            at = torch.arange(x.shape[1], device=x.device) if positions is None else positions.to(x.device)
            last = at.expand(x.shape[:2]).masked_fill(padding, -1).amax(1)
            state.next_position.copy_(last + 1)

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
        """The next n tokens, `(B, n, D)` -> `(B, n, D)`: the rows that `forward` would give over all tokens so far.

        Changes `state` in place. positions: `(n,)` or `(B, n)`, by default they follow on. key_padding_mask: `(B, n)`
        bool, True for what is no token (a sequence that has ended). In eval mode only: in training prototypes would
        move between a key's step and its query's. Without autograd. return_trace: these rows' `AttentionTrace` is
        returned as well. Raises `TypeError` or `ValueError`.
        """
        self._check(x, positions, key_padding_mask)
        self._check_decoding()
        if not isinstance(state, KVBank):
            raise TypeError(f"state={type(state).__name__}: expected KVBank, from new_state or prefill")
        if state.gates is not self.gates:
            raise ValueError("state is of another layer: must come from this layer's new_state or prefill")
        x = _without_padding(x, key_padding_mask)
        k, v = self._keys_values(x)
        q, rows, decisions = self._decide(x, k, state.budget, key_padding_mask, state.count, return_trace)
        read = state.step if x.shape[1] == 1 else state.steps
        out = read(q, k, v, keep=decisions.keep, awake=rows.awake, positions=positions)
        heads = weigh(out.unflatten(2, (self.cfg.n_kv_heads, -1)), rows.weight)
        y = self._project_out(heads, rows, decisions.keep)
        trace = trace_of(heads, decisions, rows, self.gates) if return_trace else None
        return LayerOutput(y, trace=trace).unwrap()

    def _check_decoding(self) -> None:
        if in_vmap():
            raise RuntimeError("prefill, decode: a KV bank holds the whole batch; call them without torch.func.vmap")
        if self.training:
            raise ValueError("training=True: must be eval mode to decode, where prototypes stand still; call eval()")

    # -- settings, records and files ------------------------------------------------------------------------------

    def extra_repr(self) -> str:
        return f"flux_alpha={self.cfg.flux_alpha}, shortlist={self.cfg.shortlist}, backend={self.cfg.backend!r}"

    @property
    def inv_freq(self) -> Tensor | None:
        """Rotary frequencies, `(d / 2,)`, radians per token: float64 in a float64 layer, else float32."""
        if self.rope is None:
            return None
        weight = self.k_proj.weight
        if self.rope.inv_freq.is_meta and not weight.is_meta:  # weights were assigned to a layer on the meta device
            self.rope.fill(weight)
        return self.rope.inv_freq

    def set_flux_alpha(self, value: float | None) -> None:
        """Pin alpha in [0, 1], or release it with None so that the length decides."""
        self.cfg = replace(self.cfg, flux_alpha=None if value is None else check_alpha(value))

    @contextmanager
    def settings(self, **changes) -> Iterator[None]:
        """Change fields of the layer's `AttentionConfig` while the block runs, then restore them."""
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

    def head_contributions(self, trace: AttentionTrace) -> Tensor:
        """What each slot's head adds to the residual, `(B, T, G K, D)`; zero for sleeping heads.

        Their sum and o_proj's bias are the layer's output, where a token was not dropped. Raises `TypeError` for an
        adapted o_proj.
        """
        check_linear(o_proj=self.o_proj)
        return trace.contributions(self.o_proj.weight)

    def consensus(self, trace: AttentionTrace) -> Tensor:
        """Mean direction of the awake heads' contributions, weighted by their routing weights: `(B, T, D)` float32.

        Its dot product with a unit vector is the heads' mean cosine with it. Zero where no head is awake. Raises
        `TypeError` for an adapted o_proj.
        """
        check_linear(o_proj=self.o_proj)
        return trace.consensus(self.o_proj.weight)

    def save(self, path: str | Path) -> Path:
        """Write weights, gates and config to one safetensors file, whole or not at all."""
        return write_tensors(path, self.state_dict(), self.cfg.to_dict())

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> ProteusAttention:
        """Rebuild a saved layer, in the precision that it was saved in.

        Raises `FileNotFoundError`, or `ValueError` when the file is not one of ours.
        """
        tensors, about = read_tensors(path, "ProteusAttention.save")
        try:
            attn = cls(AttentionConfig(**about)).to(tensors["k_proj.weight"].dtype)
            attn.load_state_dict(tensors)
        except Exception as problem:
            raise ValueError(
                f"path={str(path)!r}: not a file that ProteusAttention.save wrote ({problem})"
            ) from problem
        return attn.to(device)

    def _check(self, x, positions, padding, budget=None) -> None:
        if torch.jit.is_tracing():
            raise RuntimeError(
                "torch.jit.trace would repeat the choices made for one text: use torch.export.export or torch.compile"
            )
        if is_traced() and in_forward_mode():  # which would end the process, in PyTorch 2.13
            raise RuntimeError(
                "torch.func.linearize: forward-mode derivatives cannot be traced here; use torch.func.jvp"
            )
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"x={type(x).__name__}: expected a floating-point tensor (B, T, D)")
        if x.is_nested:
            raise ValueError("x is a nested tensor: must be (B, T, D), padded, with a key_padding_mask")
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
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(f"budget={type(budget).__name__}: expected Budget, from plan_budget")
        if budget is not None:
            check_budget(budget, x.shape[1], self.cfg.gates_per_group)


def ordinary_tensors():
    """A block whose results may be used by autograd later, even in `torch.inference_mode`."""
    leave = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return torch.inference_mode(False) if leave else nullcontext()


def _without_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """`x` with zeros at padding, which may hold any value, NaN included."""
    return x if padding is None else x.masked_fill(padding[..., None], 0)
