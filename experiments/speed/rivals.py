"""What the sweep compares: our attention and its rivals, with inputs and weights of the same shapes.

Most rivals are attention functions over rotated `q (B, T, H, d)`, `k, v (B, T, G, d)`; as a whole layer they get one
fused projection in front and one behind. `nn.MultiheadAttention` and native sparse attention are layers themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ...attention import AttentionConfig, Gates, ProteusAttention, plan_budget, proteus_attention, rope_frequencies
from ...attention.rope import rotate

OURS = "proteus"
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LABELS = {
    "flash": "SDPA, flash",
    "cudnn": "SDPA, cuDNN",
    "efficient": "SDPA, memory-efficient",
    "fused": "SDPA, its own choice",
    "fa3": "FlashAttention 3",
    "fa4": "FlashAttention 4",
    "mha": "nn.MultiheadAttention, unfused, T x T weights",
    "flex": "FlexAttention, window + anchors",
    "flex-dense": "FlexAttention, causal",
    "nsa": "native sparse attention (fla)",
}
FLASH_PACKAGES = {"fa3": ("flash-attn-3", "flash_attn_interface"), "fa4": ("flash-attn-4", "flash_attn.cute")}
EXACT = (*KERNELS, "fused", *FLASH_PACKAGES, "mha", "flex-dense")  # dense attention, which reads every key
TOKENS_PER_DRAW = 1 << 16  # drawn at a time, so that long inputs do not need twice their memory
CALIBRATION = 4096  # tokens that prototypes are fitted on
TILE = 128  # FlexAttention's block
NSA_BLOCK = 64  # keys per block that native sparse attention selects


class NotOffered(Exception):
    """Raised for a combination that a rival does not support, with the reason."""


@dataclass(frozen=True)
class BenchCase:
    """One thing to measure: which attention, at which shapes, length and precision."""

    scope: str  # 'layer': hidden states (1, T, D) in and out; 'attention': un-rotated q, k, v to heads' outputs
    passes: str  # 'forward', or 'training': forward and backward
    tokens: int
    who: str
    cfg: AttentionConfig
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    def key(self) -> dict:
        """The values that distinguish this case from the others of a run."""
        alpha = ("auto" if self.cfg.flux_alpha is None else self.cfg.flux_alpha) if self.who == OURS else None
        return {"scope": self.scope, "passes": self.passes, "groups": self.cfg.n_kv_heads, "tokens": self.tokens,
                "who": self.who, "alpha": alpha}  # fmt: skip


@dataclass
class ReadyCase:
    """A case with its inputs and weights made. The first of `leaves` has the shape of the output."""

    ways: dict[str, Callable[[], Tensor]]  # forward calls that compute the same; the fastest counts
    leaves: list[Tensor]  # tensors that a training pass computes gradients of
    facts: Callable[[], dict]  # statistics of a call; runs the case once more, untimed
    context: Callable[[], AbstractContextManager] = field(default=nullcontext)


def enter(case: BenchCase) -> ReadyCase:
    """Build a case. Raises `NotOffered`, `ImportError`, `RuntimeError` when it cannot be built here."""
    if case.who == OURS:
        return _our_layer(case) if case.scope == "layer" else _our_attention(case)
    facts = partial(_rival_facts, case)
    if case.who in ("mha", "nsa"):
        if case.scope != "layer":
            raise NotOffered("it is a layer with projections of its own")
        layer = (_mha if case.who == "mha" else _nsa)(case)
        x, leaves = _hidden(case, layer)
        return ReadyCase({"": lambda: layer(x)}, leaves, facts)
    make = _flex if case.who.startswith("flex") else _flash_attention if case.who in FLASH_PACKAGES else _sdpa
    ways, context = make(case)
    freq = rope_frequencies(case.cfg.head_dim, case.cfg.rope_theta, case.device)
    if case.scope == "layer":
        layer = _place(PlainLayer(case.cfg, freq), case)
        x, leaves = _hidden(case, layer)
        return ReadyCase({name: partial(layer, x, attend) for name, attend in ways.items()}, leaves, facts, context)
    q, k, v, _ = make_inputs(case.cfg, case.tokens, case.device, case.dtype, case.seed)
    leaves = [x.requires_grad_(case.passes == "training") for x in (q, k, v)]
    at = torch.arange(case.tokens, device=case.device)
    calls = {name: lambda a=attend: a(rotate(q, at, freq), rotate(k, at, freq), v) for name, attend in ways.items()}
    return ReadyCase(calls, leaves, facts, context)


# -- inputs and weights ---------------------------------------------------------------------------------------


def draw(tokens: int, n: int, width: int, topics: Tensor, gen: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Vectors `(1, tokens, n, width)` around shared `topics` (64, width), so that keys form clusters."""
    out = torch.empty(1, tokens, n, width, dtype=dtype, device=topics.device)
    for i in range(0, tokens, TOKENS_PER_DRAW):
        piece = out[:, i : i + TOKENS_PER_DRAW]
        topic = torch.randint(64, piece.shape[:3], generator=gen, device=topics.device)
        piece.copy_(topics[topic] + torch.randn(piece.shape, generator=gen, device=topics.device))
    return out


def make_inputs(cfg: AttentionConfig, tokens: int, device, dtype, seed: int) -> tuple[Tensor, Tensor, Tensor, Gates]:
    """Un-rotated q `(1, T, H, d)`, k and v `(1, T, G, d)`, and `Gates` fitted to the first keys."""
    gen = torch.Generator(device).manual_seed(seed)
    topics = torch.randn(64, cfg.head_dim, generator=gen, device=device)
    q, k = (draw(tokens, n, cfg.head_dim, topics, gen, dtype) for n in (cfg.n_heads, cfg.n_kv_heads))
    v = draw(tokens, cfg.n_kv_heads, cfg.head_dim, torch.zeros_like(topics), gen, dtype)
    gates = Gates(cfg.n_kv_heads, cfg.gates_per_group, cfg.head_dim).to(device)
    return q, k, v, gates.fit(k[:, :CALIBRATION], seed=seed)


def _hidden(case: BenchCase, layer: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Hidden states `(1, T, D)`, and the leaves of a training pass."""
    gen = torch.Generator(case.device).manual_seed(case.seed)
    topics = torch.randn(64, case.cfg.d_model, generator=gen, device=case.device)
    x = draw(case.tokens, 1, case.cfg.d_model, topics, gen, case.dtype)[:, :, 0]
    return x.requires_grad_(case.passes == "training"), [x, *layer.parameters()]


def _place(layer: nn.Module, case: BenchCase) -> nn.Module:
    return layer.to(case.device, case.dtype).train(case.passes == "training")


class PlainLayer(nn.Module):
    """A layer of four projections and RoPE around any attention; weights of the same shapes as ours."""

    def __init__(self, cfg: AttentionConfig, freq: Tensor):
        super().__init__()
        self.cfg, self.freq = cfg, freq
        self.qkv = nn.Linear(cfg.d_model, (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim, bias=cfg.bias)
        self.out = nn.Linear(cfg.n_heads * cfg.head_dim, cfg.d_model, bias=cfg.bias)

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """`(B, T, D)` -> `(B, T, D)`."""
        H, G = self.cfg.n_heads, self.cfg.n_kv_heads
        qk, v = self.qkv(x).unflatten(-1, (-1, self.cfg.head_dim)).split((H + G, G), dim=2)
        q, k = rotate(qk, torch.arange(x.shape[1], device=x.device), self.freq).split((H, G), dim=2)
        return self.out(attend(q, k, v).flatten(2))


# -- ours -----------------------------------------------------------------------------------------------------


def _our_layer(case: BenchCase) -> ReadyCase:
    torch.random.default_generator.manual_seed(case.seed)
    layer = _place(ProteusAttention(case.cfg), case)
    x, leaves = _hidden(case, layer)
    layer.calibrate(x[:, :CALIBRATION].detach())

    def facts() -> dict:
        layer.eval()
        with torch.no_grad():
            stats = layer(x, return_stats=True)[1]
        names = ("keys_per_query", "tokens_kept", "heads_awake", "flux_alpha", "backend", "backend_reason")
        return {name: getattr(stats, name) for name in names}

    return ReadyCase({"": lambda: layer(x)}, leaves, facts)


def _our_attention(case: BenchCase) -> ReadyCase:
    cfg = case.cfg
    q, k, v, gates = make_inputs(cfg, case.tokens, case.device, case.dtype, case.seed)
    freq, budget = rope_frequencies(cfg.head_dim, cfg.rope_theta, case.device), plan_budget(cfg, case.tokens)
    call = partial(proteus_attention, q, k, v, gates, budget, inv_freq=freq, backend=cfg.backend)

    def facts() -> dict:
        with torch.no_grad():
            result = call()
        return {"keys_per_query": float(result.reads.float().mean()), "tokens_kept": case.tokens,
                "heads_awake": cfg.n_heads, "flux_alpha": budget.flux_alpha, "backend": result.backend,
                "backend_reason": result.backend_reason}  # fmt: skip

    leaves = [x.requires_grad_(case.passes == "training") for x in (q, k, v)]
    return ReadyCase({"": lambda: call(explain=False).out}, leaves, facts)


# -- rivals ---------------------------------------------------------------------------------------------------


def _rival_facts(case: BenchCase) -> dict:
    keys = (case.tokens + 1) / 2 if case.who in EXACT else None  # native sparse attention does not report it
    if case.who == "flex":
        window, anchors = _window_and_anchors(case.cfg)
        row = torch.arange(1, case.tokens + 1, dtype=torch.float64)
        keys = float((row.clamp(max=window) + (row - window).clamp(0, anchors)).mean())
    return {"keys_per_query": keys, "tokens_kept": case.tokens, "heads_awake": case.cfg.n_heads, "flux_alpha": None,
            "backend": case.who, "backend_reason": LABELS[case.who]}  # fmt: skip


def _sdpa(case: BenchCase):
    """Fused dense attention held to one kernel, with KV groups as they are and with keys and values repeated."""
    r = case.cfg.heads_per_group

    def attend(q: Tensor, k: Tensor, v: Tensor, repeat: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if repeat:
            k, v = (x.repeat_interleave(r, dim=1) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=r > 1 and not repeat)
        return out.transpose(1, 2)

    ways = {"grouped": partial(attend, repeat=False), "repeated": partial(attend, repeat=True)}
    context = partial(sdpa_kernel, KERNELS[case.who]) if case.who in KERNELS else nullcontext
    return (ways if r > 1 else {"": ways["grouped"]}), context


def _of_package(package: str, module: str) -> ModuleType:
    """A module of a package that may be missing; then `ImportError` names the package."""
    try:
        return import_module(module)
    except ImportError as missing:
        raise ImportError(f"{package}: {missing}") from missing


def _flash_attention(case: BenchCase):
    """Dense attention of https://github.com/Dao-AILab/flash-attention, with KV groups as they are."""
    run = _of_package(*FLASH_PACKAGES[case.who]).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = run(q, k, v, causal=True)
        return out[0] if isinstance(out, tuple) else out  # some versions also return the logarithms of the sums

    return {"": attend}, nullcontext


def _window_and_anchors(cfg: AttentionConfig) -> tuple[int, int]:
    """Window and anchors that come to L keys per query."""
    anchors = min(cfg.n_anchors, cfg.shortlist - 1)
    return cfg.shortlist - anchors, anchors


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 256  # beyond the limit FlexAttention would run unfused and look slow
    return torch.compile(flex_attention)


def _flex(case: BenchCase):
    run, mask = _compiled_flex(), _flex_mask(case)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return run(q, k, v, block_mask=mask, enable_gqa=case.cfg.heads_per_group > 1).transpose(1, 2)

    return {"": attend}, nullcontext


def _flex_mask(case: BenchCase):
    """The block mask, computed per block: one entry per pair of tokens would not fit in memory for long texts."""
    from torch.nn.attention.flex_attention import BlockMask

    window, anchors = (1 << 30, 0) if case.who == "flex-dense" else _window_and_anchors(case.cfg)

    def seen(batch, head, query, key):
        return (key <= query) & ((query - key < window) | (key < anchors))

    at = torch.arange(-(-case.tokens // TILE), device=case.device)
    gap = (at[:, None] - at) * TILE  # from the block's first key to its first query
    some = (gap >= 0) & ((gap - TILE + 1 < window) | (at * TILE < anchors))
    whole = (gap > 0) & (gap + TILE - 1 < window) & ((at[:, None] + 1) * TILE <= case.tokens)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(*listed(some & ~whole), *listed(whole), BLOCK_SIZE=TILE, mask_mod=seen,
                                    seq_lengths=(case.tokens, case.tokens))  # fmt: skip


def _mha(case: BenchCase) -> nn.Module:
    """`nn.MultiheadAttention` with returned weights: a key head per query head, no rotation, a T x T array."""
    cfg, T = case.cfg, case.tokens
    if cfg.n_heads * cfg.head_dim != cfg.d_model:
        raise NotOffered(f"nn.MultiheadAttention has d_model / heads = {cfg.d_model / cfg.n_heads:g} features per head")
    mask = torch.ones(T, T, dtype=torch.bool, device=case.device).triu_(1)
    layer = _place(nn.MultiheadAttention(cfg.d_model, cfg.n_heads, bias=cfg.bias, batch_first=True), case)
    run = layer.forward
    layer.forward = lambda x: run(x, x, x, attn_mask=mask, need_weights=True, average_attn_weights=False)[0]
    return layer


def _nsa(case: BenchCase) -> nn.Module:
    """Native sparse attention (Yuan et al. 2025) from `flash-linear-attention`, reading about L keys per query."""
    cfg = case.cfg
    layer = _of_package("flash-linear-attention", "fla.layers.nsa").NativeSparseAttention(
        hidden_size=cfg.d_model, num_heads=cfg.n_heads, num_kv_heads=cfg.n_kv_heads, head_dim=cfg.head_dim,
        block_size=NSA_BLOCK, block_counts=max(1, cfg.shortlist // 2 // NSA_BLOCK), window_size=cfg.shortlist // 2,
        rope_theta=cfg.rope_theta,
    )  # fmt: skip
    layer = _place(layer, case)
    run = layer.forward
    layer.forward = lambda x: run(x)[0]
    return layer


Rivals = Annotated[str, typer.Option(help=f"Of {', '.join(LABELS)}; '' for none.")]
