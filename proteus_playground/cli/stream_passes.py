"""What `proteus stream` does with a document: both passes, the log of events, and the figures of the report.

What a model must offer is small, so that the built-in layer and a language model are run by the same lines.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Protocol

import numpy as np
from tqdm import tqdm

from ..common import files
from ..common.processes import own_path, place
from ..streaming.buffer import Champions, StreamPlan
from ..streaming.pipeline import ChunkStep, Scorer
from ..streaming.run import run
from ..streaming.stores import Store
from .stream_report import best_champions


class Task(Protocol):
    """A model with one document and one prompt."""

    rows: object  # the store that `scorer` reads
    scorer: Scorer

    def answer(self, champions: Champions, positions: str) -> dict:
        """The result of pass 2 for the report; an answer in words has the key "text"."""


class Model(Protocol):
    """What reads a document. It is made for one prompt, before the document is opened."""

    name: str
    fingerprint: str  # of `encode`
    positions: str  # one of POSITIONS: the model's own choice for pass 2

    def encode(self, body: str) -> list[int]:
        """Token ids of a text."""

    def generated(self, tokens: int) -> Store:
        """A random document of so many tokens."""

    def text(self, rows: np.ndarray) -> str | None:
        """Rows of the document as text; None for embeddings, which have no text."""

    def on(self, store: Store) -> Task:
        """The model with this document opened."""


def make_model(name: str, prompt: str | None, source: str | None, seed: int, device: str) -> Model:
    """The model called `name`, for one prompt. Raises `ValueError` for an unknown name."""
    if name == "layer":
        from ..streaming.layer_model import LayerModel

        return LayerModel(prompt, source=source, seed=seed, device=device)
    from ..streaming.hf_model import StreamModel

    return StreamModel(name, prompt, device)


@dataclass(frozen=True)
class Job:
    """What was asked for on the command line."""

    plan: StreamPlan
    checkpoint: Path
    fresh: bool
    events: Path | None
    positions: str
    answer: bool  # whether pass 2 follows
    silent: bool | None  # True: no progress bar; None: only if there is a terminal
    about: dict  # prompt, seed, device and versions, for the report


class EventLog:
    """Promotions and evictions as JSON lines. A resumed run first removes those of chunks that it reads again."""

    def __init__(self, path: Path, scorer: Scorer):
        self._path, self._scorer, self._file = path, scorer, None

    def write(self, step: ChunkStep) -> None:
        if self._file is None:
            self._keep(step.index)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 -- closed by close()
        lines = (json.dumps(asdict(event), ensure_ascii=False) for event in step.events(self._scorer))
        self._file.writelines(f"{line}\n" for line in lines)
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _keep(self, first: int) -> None:
        """Rewrite the file with only its complete lines of chunks before `first`."""
        lines = []
        if first and self._path.is_file():
            try:
                with self._path.open(encoding="utf-8") as old:
                    lines = list(takewhile(lambda line: line.endswith("\n") and json.loads(line)["chunk"] < first, old))
            except (ValueError, TypeError, KeyError) as err:
                raise ValueError(f"--events {self._path}: holds no events, so it is left as it is ({err})") from err
        files.write_text(self._path, "".join(lines))


def stream_document(model: Model, store: Store, task: Task, job: Job) -> dict:
    """Run both passes and return the report. On `KeyboardInterrupt`, pass 1 has been saved."""
    rank, ranks = place()
    log = EventLog(own_path(job.events, rank), task.scorer) if job.events else None
    steps = run(task.rows, task.scorer, job.plan, checkpoint=job.checkpoint, fresh=job.fresh)
    begun, read, promoted, evicted = perf_counter(), 0, 0, 0
    try:
        with tqdm(total=len(store), unit="token", unit_scale=True, desc="pass 1", disable=job.silent) as bar:
            for step in steps:
                if not read and step.index < step.chunks:
                    bar.update(step.start)  # read earlier, or by lower ranks
                read += step.stop - step.start
                promoted, evicted = promoted + len(step.promoted), evicted + len(step.evicted)
                bar.update(step.stop - step.start)
                if log:
                    log.write(step)
    finally:
        steps.close()
        if log:
            log.close()
    seconds, kept = perf_counter() - begun, step.buffer
    report = {
        "document": {"name": store.name, "kind": store.kind, "tokens": len(store), "fingerprint": store.fingerprint},
        "storage": {"mode": store.mode, "why": store.why},
        "model": model.name,
        **job.about,
        "plan": asdict(job.plan),
        "ranks": ranks,
        "pass_1": {
            "tokens_read": read, "seconds": seconds, "tokens_per_s": read / seconds,
            "promoted": promoted, "evicted": evicted,
        },
        "kept": len(kept),
        "kept_share": len(kept) / len(store),
        "best": list(best_champions(kept, store, task.scorer, model.text)),
    }  # fmt: skip
    if job.answer and rank == 0:
        begun = perf_counter()
        report["pass_2"] = {"positions": job.positions, **task.answer(kept, job.positions)}
        report["pass_2"]["seconds"] = perf_counter() - begun
    return report
