"""Pass 1 with checkpoints: it can be resumed, and shared by the processes of a `torchrun`.

Each rank reads a range of chunks and keeps a buffer of its own; the result is the best of all buffers. The order of
champions is total, so this is the buffer that one process would have kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from time import monotonic

import numpy as np
import torch
import torch.distributed as dist

from ..common.processes import own_path, place
from ..common.progress import Stop
from .buffer import Champions, StreamPlan, merge
from .checkpoint import Checkpoint, recipe
from .pipeline import ChunkStep, Scorer, stream


def run(
    store, scorer: Scorer, plan: StreamPlan, *, checkpoint: str | os.PathLike | None = None, fresh: bool = False,
    every_s: float = 1.0, stop: Stop | None = None,
) -> Iterator[ChunkStep]:  # fmt: skip
    """Yield a step for each chunk that this process still has to read, then a closing step with the result.

    The closing step has `index == chunks`, reads nothing, and its `buffer` is the result, the same on every rank. It is
    yielded even if no chunk was left to read. store: as for `stream`, with a `fingerprint`. checkpoint: a file (ranks
    above 0 add `.rankN` to its name), written at most every `every_s` seconds and when the run ends, is stopped or
    fails. fresh: start from the beginning whatever the checkpoint holds.

    Raises `ValueError` for a checkpoint of another run, `Stopped`, `OSError`.
    """
    rank, ranks = place()
    total = -(-len(store) // plan.chunk_tokens)
    mine = range(total * rank // ranks, total * (rank + 1) // ranks)
    file, found = None, None
    if checkpoint is not None:
        file = Checkpoint(own_path(checkpoint, rank), recipe(store, scorer, plan, rank, ranks))
        found = None if fresh else file.load()
    kept, done = found or (Champions.none(), mine.start)
    saved, saved_at = None if fresh else done, monotonic()
    try:
        for step in stream(store, scorer, plan, buffer=kept, chunks=range(done, mine.stop), stop=stop):
            kept, done = step.buffer, step.index + 1
            if file is not None and monotonic() - saved_at >= every_s:
                file.save(kept, done)
                saved, saved_at = done, monotonic()
            yield step
    finally:
        if file is not None and saved != done:
            file.save(kept, done)
    yield _closing(kept, _best_of_all(kept, plan.buffer_tokens), total, len(store))


def _best_of_all(kept: Champions, most: int) -> Champions:
    """The `most` best of all ranks' buffers, on every rank."""
    _, ranks = place()
    if ranks == 1:
        return kept
    flat = np.full((most, 4), -1, np.int64)  # as long as a full buffer; a position of -1 marks an empty place
    flat[: len(kept)] = np.stack((kept.position, kept.score.view(np.int32), kept.champion, kept.reason), axis=1)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    parts = [torch.empty(most, 4, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(parts, torch.from_numpy(flat).to(device))
    best = Champions.none()
    for part in parts:
        rows = part.cpu().numpy()
        position, score, champion, reason = rows[rows[:, 0] >= 0].T
        score = score.astype(np.int32).view(np.float32)
        best = merge(best, Champions(position, score, champion, reason.astype(np.int32)), most)
    return best


def _closing(kept: Champions, best: Champions, total: int, tokens: int) -> ChunkStep:
    """The step that replaces this rank's buffer by the best of all ranks."""
    promoted = best.take(np.flatnonzero(~np.isin(best.position, kept.position, assume_unique=True)))
    evicted = kept.take(np.flatnonzero(~np.isin(kept.position, best.position, assume_unique=True)))
    return ChunkStep(total, total, tokens, tokens, tokens, promoted, evicted, best, 0.0)
