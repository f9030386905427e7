"""The `torch` and `reference` backends as one operator, for compilers and `torch.func`.

Their sizes follow the data, which no compiler can trace. Inside an operator they are hidden: a compiler sees the shapes
of its results only, and `vmap` calls it once per element. The Triton backend has operators of its own.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `C` gates per group.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..budget import Budget
from ..gates import Gates
from ..precision import wide_dtype
from ..transforms import in_forward_mode, in_func
from .dispatch import attend


def attend_as_operator(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, budget: Budget, **arguments
) -> tuple[Tensor, Tensor]:
    """As `dispatch.attend`, without the shortlist. It has first derivatives in reverse mode."""
    if in_forward_mode():
        raise RuntimeError(
            "jacfwd, hessian: torch.func.vmap cannot run over forward-mode derivatives of sparse attention; use jacrev "
            "or jvp, or set flux_alpha=0"
        )
    sizes = [getattr(budget, name) + 0 for name in _SIZES]
    order = ("positions", "inv_freq", "length", "awake")
    tensors = q, k, v, gates.prototypes, gates.alive, *(arguments.pop(name) for name in order)
    run = _Forward.apply if in_func() else _forward
    return run(*tensors, sizes, *(arguments[name] for name in ("scale", "int8", "backend")))


def _run(q, k, v, prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8, backend):
    """`dispatch.attend` on the rows that some sequence needs; the others are zero."""
    gates = Gates.of(prototypes, alive)
    plan = Budget(**dict.fromkeys(_SHARES, 1.0), **dict(zip(_SIZES, sizes, strict=True)))
    tokens = q.shape[1]
    most = tokens if length is None else max(1, int(length.max()))
    q, k, v, awake = (None if x is None else x[:, :most] for x in (q, k, v, awake))
    positions = None if positions is None else positions[..., :most]
    where = {"positions": positions, "inv_freq": inv_freq, "length": length, "awake": awake}
    out, lse, *_ = attend(q, k, v, gates, plan, **where, scale=scale, int8=int8, explain=False, backend=backend)
    return pad(out, (0, 0, 0, 0, 0, tokens - most)), pad(lse, (0, 0, 0, tokens - most))


_SHARES = [each.name for each in fields(Budget) if each.type == "float"]  # decide about heads and tokens, not reads
_SIZES = [each.name for each in fields(Budget) if each.type != "float"]


@torch.library.custom_op("proteus::attend", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, prototypes: Tensor, alive: Tensor, positions: Tensor | None,
    inv_freq: Tensor | None, length: Tensor | None, awake: Tensor | None, sizes: list[int], scale: float, int8: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = q, k, v, prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8, backend
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return tuple(x.contiguous() for x in _run(*arguments))


@_forward.register_fake
def _(q, *arguments):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide_dtype(q.dtype))


@torch.library.custom_op("proteus::attend_backward", mutates_args=())
def _backward(
    grad: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, prototypes: Tensor, alive: Tensor,
    positions: Tensor | None, inv_freq: Tensor | None, length: Tensor | None, awake: Tensor | None, sizes: list[int],
    scale: float, int8: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8, backend
    stream = torch.cuda.current_stream(q.device) if q.is_cuda else None

    def gradients() -> tuple[Tensor, ...]:
        with torch.cuda.stream(stream):
            qkv = tuple(x.detach().requires_grad_() for x in (q, k, v))
            found = torch.autograd.grad(_run(*qkv, *arguments), qkv, (grad, grad_lse))
            return tuple(x.contiguous() for x in found)

    with ThreadPoolExecutor(1) as thread:  # autograd is off in the thread that runs an operator
        return thread.submit(gradients).result()


@_backward.register_fake
def _(grad, grad_lse, q, k, v, *arguments):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    ctx.settings = inputs[9:]


def _differentiate(ctx, grad, grad_lse):
    return (*_Backward.apply(grad, grad_lse, *ctx.saved_tensors, *ctx.settings), *[None] * 10)


def _refuse(ctx, *_):
    raise RuntimeError(
        "torch.func.vmap: sparse attention has first derivatives only there; call grad of grad without vmap"
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def _save_nothing(ctx, inputs, output):
    pass


class _Forward(torch.autograd.Function):
    """`_forward` for `torch.func`, which does not know the derivatives of an operator."""

    generate_vmap_rule = True
    setup_context, backward = staticmethod(_save), staticmethod(_differentiate)

    @staticmethod
    def forward(q, k, v, prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8, backend):
        return _forward(q, k, v, prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8, backend)


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context, backward = staticmethod(_save_nothing), staticmethod(_refuse)

    @staticmethod
    def forward(
        grad, grad_lse, q, k, v, prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8, backend
    ):
        return _backward(
            grad, grad_lse, q, k, v, prototypes, alive, positions, inv_freq, length, awake, sizes, scale, int8, backend
        )


def _one_by_one(operator):
    """The rule by which `vmap` calls an operator: once per element."""

    def rule(info, in_dims, *arguments):
        calls = [
            operator(*(x.select(at, i) if isinstance(at, int) else x for x, at in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(x) for x in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


for _operator in (_forward, _backward):
    _operator.register_vmap(_one_by_one(_operator))
