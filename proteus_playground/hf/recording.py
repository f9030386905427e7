"""CUDA graphs: what a function does on the GPU is recorded once and can be replayed, without the host's work."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")


def capture(run: Callable[[], Made], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Made]:
    """Record what `run` does on the GPU: the graph, and what it returned. Raises what `run` or CUDA raises.

    `torch.cuda.graph` would also wait for the GPU and give its spare memory back, which takes longer than to record.
    """
    with torch.cuda.device(device):
        graph, current, own = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
        own.wait_stream(current)
        try:
            with torch.cuda.stream(own):
                graph.capture_begin(capture_error_mode="thread_local")
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
