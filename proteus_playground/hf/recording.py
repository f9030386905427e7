"""CUDA graphs: what a function does on the GPU is recorded once and can be replayed, without the host's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

Made = TypeVar("Made")

# Memory of each decoder's recordings, by device. One that is dropped leaves its part to the next; the passes of one
# decoder never run at the same time.
_POOLS: WeakKeyDictionary[nn.Module, dict[torch.device, torch.cuda.MemPool]] = WeakKeyDictionary()


def capture(run: Callable[[], Made], decoder: nn.Module, device: torch.device) -> tuple[torch.cuda.CUDAGraph, Made]:
    """Record what `run` does on the GPU: the graph, and what it returned. Raises what `run` or CUDA raises.

    `torch.cuda.graph` would also wait for the GPU and give its spare memory back, which takes longer than to record.
    """
    with torch.cuda.device(device):
        graph, current, own = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        own.wait_stream(current)
        try:
            with torch.cuda.stream(own):
                graph.capture_begin(_pool(decoder, device), capture_error_mode="thread_local")
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


def _pool(decoder: nn.Module, device: torch.device) -> tuple[int, int] | None:
    """The memory of the decoder's recordings; None where each has its own, before torch 2.7."""
    if not hasattr(torch.cuda.MemPool, "use_count"):
        return None
    pools = _POOLS.setdefault(decoder, {})
    if device not in pools:
        pools[device] = torch.cuda.MemPool()
    return pools[device].id
