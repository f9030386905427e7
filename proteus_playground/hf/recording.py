"""CUDA graphs: what a function does on the GPU is recorded once and can be replayed, without the host's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

Made = TypeVar("Made")

# A small recording of each decoder, by device. All others of that decoder share its memory: one that is dropped leaves
# its part to the next. The passes of one decoder never run at the same time.
_FIRST: WeakKeyDictionary[nn.Module, dict[torch.device, torch.cuda.CUDAGraph]] = WeakKeyDictionary()


def capture(run: Callable[[], Made], decoder: nn.Module, device: torch.device) -> tuple[torch.cuda.CUDAGraph, Made]:
    """Record what `run` does on the GPU: the graph, and what it returned. Raises what `run` or CUDA raises."""
    first = _FIRST.setdefault(decoder, {})
    if device not in first:
        first[device], _ = _record(lambda: torch.zeros(1, device=device), device, None)
    return _record(run, device, first[device].pool())


def _record(run: Callable[[], Made], device: torch.device, pool) -> tuple[torch.cuda.CUDAGraph, Made]:
    """As `torch.cuda.graph`, which would also wait for the GPU and give its spare memory back: that takes longer."""
    with torch.cuda.device(device):
        graph, current, own = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        own.wait_stream(current)
        try:
            with torch.cuda.stream(own):
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    made = run()
                finally:
                    graph.capture_end()
        except BaseException:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own,
            home = torch.cuda.default_generators[torch.cuda.current_device()]
            home.graphsafe_set_state(home.clone_state())  # and random numbers to be drawn in a graph only
            raise
        current.wait_stream(own)
        return graph, made
