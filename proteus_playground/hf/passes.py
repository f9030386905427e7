"""What happens around every pass of a decoder while something of this package is in it.

One function takes the place of the decoder's `forward`. It runs the pass without `torch.compile`, because a compiled
graph is shared between layers and would send them all to one place; and it leads a pass that carries a `ProteusCache`
through that cache. A deep copy of the model, or one from a pickle, runs itself by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from threading import get_ident
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..attention.transforms import in_vmap, is_traced
from .attention_call import CACHE_NAMES
from .native import NAME, set_implementation

WHY = (
    "Proteus runs a patched model in eager mode: use torch.compile without fullgraph, and no torch.export, "
    "torch.jit.trace, make_fx or torch.func.vmap"
)


def not_compiled(function):
    """`function` as torch.compile must leave it: it is called as it is, and everything in it."""
    reason = {"reason": WHY} if "reason" in signature(torch.compiler.disable).parameters else {}  # since torch 2.7
    return torch.compiler.disable(function, **reason)


@dataclass
class Pass:
    """One pass of one thread: which attentions it has called, and the positions that rotary modules were given.

    recorded: a CUDA graph is being made of the pass. Values cannot be read meanwhile, so tables and masks are not
    checked; those of the pass before were, and no new token is padding.
    """

    inside: bool = False
    recorded: bool = False
    called: set[int] = field(default_factory=set)
    positions: Tensor | None = None
    tables: dict[tuple, object] = field(default_factory=dict)  # those already compared with positions

    def start(self) -> None:
        """Forget what the pass has called so far, where it runs once more."""
        self.recorded = False
        self.called.clear()
        self.tables.clear()
        self.positions = None


@dataclass
class _Watched:
    users: int
    previous: object  # a `forward` of the decoder's own that ours covers, or None
    passes: dict[int, Pass] = field(default_factory=dict)  # by thread
    only: list[int] = field(default_factory=list)  # threads that may run passes; empty for all


_WATCHED: WeakKeyDictionary[nn.Module, _Watched] = WeakKeyDictionary()


def current_pass(decoder: nn.Module) -> Pass:
    """This thread's pass. Outside one, where a backward pass computes a layer again, an empty record."""
    watched = _WATCHED.get(decoder)
    return Pass() if watched is None else watched.passes.get(get_ident()) or Pass()


def watch(decoder: nn.Module) -> None:
    """Let passes of `decoder` go through `_forward` until as many calls of `unwatch`."""
    if decoder in _WATCHED:
        _WATCHED[decoder].users += 1
        return
    previous = vars(decoder).get("forward")
    _WATCHED[decoder] = _Watched(1, None if _is_ours(previous) else previous)
    decoder.forward = partial(_forward, decoder)


def unwatch(decoder: nn.Module) -> None:
    """Undo one `watch`; the last one gives the decoder its `forward` back."""
    watched = _WATCHED[decoder]
    watched.users -= 1
    if watched.users:
        return
    del _WATCHED[decoder]
    if not _is_ours(vars(decoder).get("forward")):
        return  # something else covers ours, which goes on to the decoder's own
    del decoder.forward
    if watched.previous is not None:
        decoder.forward = watched.previous


def _is_ours(forward) -> bool:
    """A deep copy of a watched decoder keeps our `forward`, for the copy."""
    return getattr(forward, "func", None) is _forward


@contextmanager
def only_this_thread(decoder: nn.Module) -> Iterator[None]:
    """Refuse passes of other threads meanwhile."""
    threads = _WATCHED[decoder].only
    threads.append(get_ident())
    try:
        yield
    finally:
        threads.pop()


@contextmanager
def eager() -> Iterator[None]:
    """No `torch.compile` meanwhile, whoever asked for it."""
    with torch.compiler.set_stance("force_eager"):
        yield


@not_compiled
def _forward(decoder: nn.Module, *args, **kwargs):
    watched = _WATCHED.get(decoder)
    native = partial(type(decoder).forward, decoder)
    if watched is None:
        if decoder.config._attn_implementation == NAME:  # a copy of a patched decoder
            set_implementation(decoder, "sdpa")
        return native(*args, **kwargs)
    if getattr(torch.compiler, "is_exporting", bool)() or torch.jit.is_tracing() or is_traced() or in_vmap():
        raise RuntimeError(WHY)
    native = watched.previous or native
    if watched.only and watched.only[-1] != get_ident():
        raise RuntimeError("another thread is generating with this model: wait for it, or load the model again")
    cache = next((kwargs[name] for name in CACHE_NAMES if hasattr(kwargs.get(name), "run_pass")), None)
    before, watched.passes[get_ident()] = watched.passes.get(get_ident()), Pass(inside=True)
    try:
        with eager():
            if cache is not None:
                return cache.run_pass(decoder, native, args, kwargs)
            return native(*args, **kwargs)
    finally:
        if before is None:
            watched.passes.pop(get_ident(), None)
        else:
            watched.passes[get_ident()] = before
