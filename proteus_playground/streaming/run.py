"""Pass 1 as it is run: checkpointed, resumed, and shared by the processes of a `torchrun`.

Ranks take neighbouring chunks, each keeps a buffer of its own, and the best of all buffers is the result: the order of
champions is total, so it is the buffer one process would have kept.
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
    store,
    scorer: Scorer,
    plan: StreamPlan,
    *,
    checkpoint: str | os.PathLike | None = None,
    fresh: bool = False,
    every_s: float = 1.0,
    stop: Stop | None = None,
) -> Iterator[ChunkStep]:
    """Yield a step per chunk that is left to this process, then a closing step whose `buffer` is the result.

    The closing step has `index == chunks`, reads nothing, and on every rank holds the same buffer; it comes even where
    a checkpoint had nothing left to read. store: as for `stream`, with a `fingerprint`. checkpoint: a file, to which
    every rank above 0 adds `.rankN`; written at most every `every_s` seconds and when the run ends, is stopped or
    fails. fresh: begin again whatever it holds.

    Raises `ValueError` for a checkpoint of another run, `Stopped`, `OSError`.
    """
    rank, ranks = place()
    total = -(-len(store) // plan.chunk_tokens)
    mine = range(total * rank // ranks, total * (rank + 1) // ranks)
    file = None
    if checkpoint is not None:
        file = Checkpoint(own_path(checkpoint, rank), recipe(store, scorer, plan, rank, ranks))
    kept, done = (None if file is None or fresh else file.load()) or (Champions.none(), mine.start)
    saved, last = None if fresh else done, monotonic()
    try:
        for step in stream(store, scorer, plan, buffer=kept, chunks=range(done, mine.stop), stop=stop):
            kept, done = step.buffer, step.index + 1
            if file is not None and monotonic() - last >= every_s:
                file.save(kept, done)
                saved, last = done, monotonic()
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
    flat = np.full((most, 4), -1, np.int64)  # as wide as any rank's buffer can be; no position is negative
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
    """What the other ranks' champions changed."""
    come = best.take(np.flatnonzero(~np.isin(best.position, kept.position, assume_unique=True)))
    gone = kept.take(np.flatnonzero(~np.isin(kept.position, best.position, assume_unique=True)))
    return ChunkStep(total, total, tokens, tokens, tokens, come, gone, best, 0.0)
