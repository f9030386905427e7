"""Rank and number of processes; joining and leaving the process group of `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TIMEOUT = timedelta(days=1)  # a rank that is done waits so long for the slowest


def place() -> tuple[int, int]:
    """(rank, number of ranks) of this process; (0, 1) for a single process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def together(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the process group if `torchrun` started this process, and leave it at the end. Yields (rank, ranks).

    On CUDA the backend is NCCL and each rank uses the GPU of its local number; elsewhere the backend is gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield place()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield place()
    finally:
        dist.destroy_process_group()


def own_path(path: str | os.PathLike, rank: int) -> Path:
    """`path` for rank 0, else `path` with `.rankN` appended."""
    path = Path(path)
    return path.with_name(f"{path.name}.rank{rank}") if rank else path
