"""CUDA graphs: what a function does on the GPU is recorded once and can be replayed, without the host's work."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

Made = TypeVar("Made")

# The first recording of each decoder, by device, and the stream that it was made on. It is tiny, and stays so that its
# memory does: later recordings share it, and where one is dropped the next takes its place. That is right because the
# passes of one decoder run one after another.
_FIRST: WeakKeyDictionary[nn.Module, dict[torch.device, tuple[torch.cuda.CUDAGraph, torch.cuda.Stream]]] = (
    WeakKeyDictionary()
)


def capture(run: Callable[[], Made], decoder: nn.Module, device: torch.device) -> tuple[torch.cuda.CUDAGraph, Made]:
    """Record what `run` does on the GPU: the graph, and what it returned. Raises what `run` or CUDA raises."""
    firsts = _FIRST.setdefault(decoder, {})
    with torch.cuda.device(device):
        if device not in firsts:
            own = torch.cuda.Stream()
            firsts[device] = _record(lambda: torch.zeros(1, device=device), own, None)[0], own
        first, own = firsts[device]
        return _record(run, own, first.pool())


def _record(run: Callable[[], Made], own: torch.cuda.Stream, pool) -> tuple[torch.cuda.CUDAGraph, Made]:
    """As `torch.cuda.graph`, which would also wait for the GPU and give its spare memory back: that takes longer."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    own.wait_stream(current)
    try:
        with torch.cuda.stream(own):
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                made = run()
            except BaseException:
                with suppress(Exception):  # says only that the recording has failed, not why
                    graph.capture_end()
                raise
            graph.capture_end()
    except BaseException:
        # A recording that fails leaves its stream current, and a random generator that works in graphs only.
        torch.cuda.set_stream(current)
        home = torch.cuda.default_generators[torch.cuda.current_device()]
        home.graphsafe_set_state(home.clone_state())
        raise
    current.wait_stream(own)
    return graph, made
