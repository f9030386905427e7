"""The Triton backend as differentiable operators, which `torch.compile` traces whole.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `r` = H / G, `d` head dim, `C` gates per group.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...budget import Budget
from ...gates import Gates
from ...shortlist import Shortlist
from ...transforms import is_compiling
from .bank_fill import PassIndex
from .launch import backward, read_rows, rotate_into
from .plan import Plan, Sizes, make_plan, padded, sizes_of, tile_tokens
from .routing import route_kernel
from .tables import GateLookup, KeyIndex, index_keys, index_rows, wait_for

TOKENS_PER_STEP = 1 << 17  # rows without autograd are handled in steps, so that their index is freed again


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    budget: Budget,
    *,
    positions: Tensor | None,
    inv_freq: Tensor | None,
    length: Tensor | None,
    awake: Tensor | None,
    scale: float,
    int8: bool,
    explain: bool,
    return_index: bool,
) -> tuple[Tensor, Tensor, Shortlist | None, PassIndex | None]:
    """As `dispatch.attend`. The shortlist is made only where `explain` asks for it."""
    q, k, v = (x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous() for x in (q, k, v))
    sizes = sizes_of(budget, q.shape[2] // k.shape[2], q.shape[3], gates.gates_per_group)
    lookup = GateLookup(gates.prototypes, gates.alive, positions, inv_freq, length)
    if _at_once(q, k, v):
        out, lse, done = _run(q, k, v, lookup, awake, sizes, scale, int8, return_index)
    else:
        (out, lse), done = _forward(q, k, v, *lookup, awake, list(sizes), scale, int8), None
    return out, lse, _shortlist(q, k, v, lookup, awake, sizes) if explain else None, done


def _at_once(*inputs: Tensor) -> bool:
    """Whether to call an operator's function itself, which is quicker: no graph is made, no gradient is asked for."""
    return not (is_compiling() or torch.is_grad_enabled() and any(x.requires_grad for x in inputs))


@torch.no_grad()
def _shortlist(q: Tensor, k: Tensor, v: Tensor, lookup: GateLookup, awake: Tensor | None, sizes: Sizes) -> Shortlist:
    """The index tables by which `attend` reads, in the form that all backends share."""
    B, T, G, C, plan = *k.shape[:3], sizes.gates_per_group, make_plan(sizes)
    with torch.cuda.device_of(q):
        keys = index_keys(k, v, lookup, plan, False)
        rows = index_rows(q, keys, lookup, awake, 0, plan)
        wait_for(rows.ready)
    ticks = torch.arange(-(-T // plan.block), device=q.device)
    retired = keys.count_base[:, ticks * plan.block // plan.chunk] + keys.before[:, ticks]
    return Shortlist(
        window=plan.window,
        block=plan.block,
        anchors=plan.anchors,
        ring=plan.ring,
        gate=keys.gate.view(B, G, T).transpose(1, 2).long(),
        retired=retired.view(B, G, -1, C).long(),
        probes=rows.probes.long(),
        noted=_noted(rows.noted, plan, C) if plan.some_notes or not plan.notes else None,
    )


def _noted(bits: Tensor, plan: Plan, C: int) -> Tensor:
    """Gates whose bits are set, `(B, T, H, e)` int64, in order of their index; -1 after the last."""
    gate = torch.arange(C, device=bits.device)
    chosen = bits[..., gate // 32] >> gate % 32 & 1 if plan.notes else bits.new_zeros(*bits.shape[:3], C)
    first = torch.where(chosen > 0, gate, C).sort(dim=-1).values[..., : plan.notes]
    return first.masked_fill(first == C, -1)


def rotate(x: Tensor, positions: Tensor | None, inv_freq: Tensor) -> Tensor:
    """RoPE of x `(B, T, N, d)` at positions `(T,)`, `(B, T)` or 0, 1, ..., half-split; differentiable."""
    return (_rotate_now if _at_once(x) else _rotate)(x, positions, inv_freq, 1.0)


def route(
    q: Tensor, logits: Tensor, gates: Gates, balance: Tensor, budget: Budget, temperature: float, prior_max: float
) -> tuple[Tensor, Tensor]:
    """As `dispatch.route`."""
    (B, T, H, d), (G, C) = q.shape, gates.alive.shape
    r = H // G
    awake = torch.empty(B, T, H, dtype=torch.int8, device=q.device)
    weight = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    tokens = tile_tokens(C)
    route_kernel[(triton.cdiv(T, tokens), B * G)](
        q, logits, gates.prototypes, gates.alive, gates.confidence, gates.log_share, gates.head_of_gate, balance, awake,
        weight, T, G, r, d, C, budget.heads_awake_min, budget.heads_awake_max, float(budget.head_top_p),
        float(budget.flux_alpha), temperature, prior_max, *q.stride()[:2], *logits.stride()[:2],
        HP=padded(d // 2), CP=padded(C), RP=padded(r), BT=tokens,
    )  # fmt: skip
    return awake, weight


def _run(
    q: Tensor, k: Tensor, v: Tensor, lookup: GateLookup, awake: Tensor | None, sizes: Sizes, scale: float, int8: bool,
    return_index: bool = False,
) -> tuple[Tensor, Tensor, PassIndex | None]:  # fmt: skip
    plan = make_plan(sizes)
    with torch.cuda.device_of(q):
        keys = index_keys(k, v, lookup, plan, int8)
        done = PassIndex(keys, k, v) if return_index else None
        return *_attend(q, keys, lookup, awake, plan, scale), done


@torch.library.custom_op("proteus::shortlist", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, prototypes: Tensor, alive: Tensor, positions: Tensor | None,
    inv_freq: Tensor | None, length: Tensor | None, awake: Tensor | None, sizes: list[int], scale: float, int8: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lookup = GateLookup(prototypes, alive, positions, inv_freq, length)
    return _run(q, k, v, lookup, awake, Sizes(*sizes), scale, int8)[:2]


@_forward.register_fake
def _(q, k, v, prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("proteus::shortlist_backward", mutates_args=())
def _backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, prototypes: Tensor, alive: Tensor,
    positions: Tensor | None, inv_freq: Tensor | None, length: Tensor | None, awake: Tensor | None, sizes: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    lookup, plan = GateLookup(prototypes, alive, positions, inv_freq, length), make_plan(Sizes(*sizes))
    with torch.cuda.device_of(q):
        keys = index_keys(k, v, lookup, plan, False)  # made again: the index is cheap, and large to keep
        rows = index_rows(q.contiguous(), keys, lookup, awake, 0, plan)
        return backward(grad.contiguous(), out, lse, rows, keys, lookup, plan, scale)


@_backward.register_fake
def _(grad, out, lse, q, k, v, *rest):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _save(ctx, inputs, output):
    *tensors, sizes, scale, _ = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.sizes, ctx.scale = sizes, scale
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _):
    out, lse, *tensors = ctx.saved_tensors
    gradients = _backward(grad, out, lse, *tensors, ctx.sizes, ctx.scale)
    return (*gradients, *[None] * 9)


_forward.register_autograd(_differentiate, setup_context=_save)


def _attend(q, keys: KeyIndex, lookup: GateLookup, awake, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """All rows, step by step."""
    B, T, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    step = plan.tokens_per_piece(TOKENS_PER_STEP // B)
    for t0 in range(0, T, step):
        cut = slice(t0, t0 + step)
        rows = index_rows(q[:, cut], keys, lookup, None if awake is None else awake[:, cut].contiguous(), t0, plan)
        lse[:, cut] = read_rows(rows, keys, out[:, cut], None, lookup.length, t0, plan, scale)
    return out, lse


def _rotate_now(x: Tensor, positions: Tensor | None, inv_freq: Tensor, sign: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        rotate_into(x if x.stride(-2) == x.shape[-1] else x.contiguous(), y, positions, inv_freq, sign)
    return y


_rotate = torch.library.custom_op("proteus::rotate", _rotate_now, mutates_args=())


@_rotate.register_fake
def _(x, positions, inv_freq, sign):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _save_rotation(ctx, inputs, output):
    _, *tensors, ctx.sign = inputs
    ctx.save_for_backward(*tensors)


_rotate.register_autograd(
    lambda ctx, grad: (_rotate(grad.contiguous(), *ctx.saved_tensors, -ctx.sign), None, None, None),
    setup_context=_save_rotation,
)
