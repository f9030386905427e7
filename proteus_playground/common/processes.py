"""Rank and number of processes; joining and leaving a `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=1)  # how long a rank that is done waits for the slowest


def place() -> tuple[int, int]:
    """(rank, ranks) of this process; (0, 1) where it works alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def together(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the other processes where `torchrun` started this one, and leave at the end. Yields (rank, ranks).

    NCCL where `device` is CUDA, each rank on the GPU of its local number; gloo elsewhere.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield place()
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield place()
    finally:
        dist.destroy_process_group()


def own_path(path: str | os.PathLike, rank: int) -> Path:
    """`path`, with `.rankN` added for ranks above 0."""
    path = Path(path)
    return path.with_name(f"{path.name}.rank{rank}") if rank else path
