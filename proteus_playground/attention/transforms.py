"""What a call runs under: a compiler, a transform of `torch.func`, forward-mode derivatives; and what differs there.

PyTorch has public functions for compilers only. The private ones used here exist in all versions that this package
supports.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, get_unwrapped, is_functorch_wrapped_tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def in_func() -> bool:
    """Whether this call runs inside a transform of `torch.func`, such as `grad` or `vmap`."""
    return torch._C._are_functorch_transforms_active()


def in_vmap() -> bool:
    """Whether one of these transforms is `vmap`."""
    return in_func() and any(level.key() == TransformType.Vmap for level in get_interpreter_stack())


def is_transformed() -> bool:
    """Whether operations must be ones that PyTorch itself can differentiate or batch: no kernel of another kind, no
    result written into a given tensor."""
    return in_func() or in_forward_mode()


def is_recorded() -> bool:
    """Whether operations are recorded: for gradients, a graph of torch.compile or torch.export, or a transform."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed()


def is_traced() -> bool:
    """Whether `make_fx` or AOTAutograd write operations down, without torch.compile or torch.export."""
    if torch.compiler.is_compiling():
        return False
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FAKE))


def is_compiling() -> bool:
    """Whether this call is being made into a graph, by whatever tool."""
    return torch.compiler.is_compiling() or is_traced()


def hides_values() -> bool:
    """Whether Python cannot read the values of tensors: in a graph and under `vmap`."""
    return is_compiling() or in_vmap()


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are computed, as by `torch.func.jvp`."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def refuse(wrong: Tensor, message: str, x: Tensor) -> Tensor:
    """Raise a `ValueError` where the number `wrong` is not 0, else return `x`.

    message: may contain `{wrong}`. A compiled graph raises it when it runs. A CUDA graph that is recorded cannot read a
    number; the pass before it, which warms up, has.
    """
    if is_compiling():
        return _refuse(wrong, message, x)
    if wrong.is_cuda and torch.cuda.is_current_stream_capturing():
        return x
    if in_func():  # also for the values that `vmap` hides
        with temporarily_clear_interpreter_stack():
            return refuse(_plain(wrong).max(), message, x)
    if wrong:
        raise ValueError(message.format(wrong=f"{float(wrong):g}"))
    return x


@torch.library.custom_op("proteus::refuse", mutates_args=())
def _refuse(wrong: Tensor, message: str, x: Tensor) -> Tensor:
    return refuse(wrong, message, x).clone()


@_refuse.register_fake
def _(wrong, message, x):
    return torch.empty_like(x)


_refuse.register_autograd(lambda ctx, grad: (None, None, grad))


def _plain(x: Tensor) -> Tensor:
    """The ordinary tensor inside one of `torch.func`."""
    return _plain(get_unwrapped(x)) if is_functorch_wrapped_tensor(x) else x


def without_grad(method):
    """As `torch.no_grad`, but never entered twice: torch.export cannot load the empty blocks that it saves then."""

    @wraps(method)
    def run(*arguments, **named):
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            return method(*arguments, **named)

    return run


def records(method):
    """A method of a module that records a training pass: it replaces buffers, and never writes into them.

    In a compiled graph the buffers keep their values where the graph runs again to recompute activations. Inside
    `torch.func` they get ordinary tensors, which outlive the transform. Raises `RuntimeError` under `vmap` and
    `make_fx`.
    """

    @wraps(method)
    def run(module, *tensors: Tensor) -> None:
        if torch.compiler.is_compiling():
            before = dict(module.named_buffers(recurse=False))
            exporting = getattr(torch.compiler, "is_exporting", bool)()  # export keeps no buffer that was replaced
            method(module, *tensors)
            for name, old in before.items():
                new = getattr(module, name)
                if new is not old:
                    new = torch.where(_is_first_pass(new), new, old)
                    setattr(module, name, old.copy_(new) if exporting else new)
        elif is_traced():
            raise RuntimeError("training=True: must be eval mode under make_fx and AOTAutograd; call eval()")
        elif in_func():
            if in_vmap():
                raise RuntimeError(
                    "training=True: must be eval mode under torch.func.vmap, where no average over all keys can be "
                    "recorded; call eval()"
                )
            with temporarily_clear_interpreter_stack():
                method(module, *(_plain(x) for x in tensors))
        else:
            method(module, *tensors)

    return run


@torch.library.custom_op("proteus::is_first_pass", mutates_args=())
def _is_first_pass(like: Tensor) -> Tensor:
    """False in a backward pass, which recomputes activations: a bool on the device of `like`."""
    return torch.full((), torch._C._current_graph_task_id() == -1, device=like.device)


@_is_first_pass.register_fake
def _(like):
    return like.new_empty((), dtype=torch.bool)
