"""`proteus stream`: read a document of any length, keep what answers a prompt, and answer from that.

What a model must bring is small, so that the built-in layer and a language model are run by the same lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Protocol

import numpy as np
import typer
from tqdm import tqdm

from ..common import files
from ..common.machine import environment
from ..common.options import choose, parse_size, pick_device
from ..common.processes import own_path, place, together
from ..streaming.buffer import Champions, StreamPlan
from ..streaming.pipeline import ChunkStep, Scorer
from ..streaming.replay import page_of
from ..streaming.run import run
from ..streaming.second_pass import POSITIONS, gather
from ..streaming.sources import open_document
from ..streaming.stores import TOP_ID, Store, digest, parse_bytes

SHOWN = 10  # champions in the report
AROUND = 12  # kept tokens shown on either side of one
WIDEST = 500  # characters of a text that is shown


class Task(Protocol):
    """A model with one document and one prompt."""

    rows: object  # the store that `scorer` reads
    scorer: Scorer

    def answer(self, champions: Champions, positions: str) -> dict:
        """Pass 2, as the report holds it; an answer in words stands under "text"."""


class Model(Protocol):
    """What reads a document: made for a prompt, before the document is opened."""

    name: str
    fingerprint: str  # of `encode`
    positions: str  # one of POSITIONS: what suits it in pass 2

    def encode(self, body: str) -> list[int]: ...

    def generated(self, tokens: int) -> Store: ...

    def text(self, rows: np.ndarray) -> str | None:
        """Rows of the document as text, None where they are none."""

    def on(self, store: Store) -> Task: ...


def make_model(name: str, prompt: str | None, source: str | None, seed: int, device: str) -> Model:
    """`ValueError` for a name that is not known."""
    if name == "layer":
        from ..streaming.layer_model import LayerModel

        return LayerModel(prompt, source=source, seed=seed, device=device)
    from ..streaming.hf_model import StreamModel

    return StreamModel(name, prompt, device)


@dataclass(frozen=True)
class Job:
    """What the command line asked for."""

    plan: StreamPlan
    checkpoint: Path
    fresh: bool
    events: Path | None
    positions: str
    answer: bool  # whether pass 2 follows
    silent: bool | None  # None: where there is no terminal
    about: dict  # prompt, seed, device and versions, for the report


class EventLog:
    """Promotions and evictions as JSON lines; a resumed run takes back those of chunks that are read again."""

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
        """Begin the file anew with the whole lines there were of chunks before `first`."""
        lines = []
        if first and self._path.is_file():
            with self._path.open(encoding="utf-8") as old:
                lines = list(takewhile(lambda line: line.endswith("\n") and json.loads(line)["chunk"] < first, old))
        files.write_text(self._path, "".join(lines))


def stream_document(model: Model, store: Store, task: Task, job: Job) -> dict:
    """Both passes; the report. Raises `KeyboardInterrupt` with pass 1 saved."""
    rank, ranks = place()
    log = EventLog(own_path(job.events, rank), task.scorer) if job.events else None
    steps = run(task.rows, task.scorer, job.plan, checkpoint=job.checkpoint, fresh=job.fresh)
    begun, read, promoted, evicted = perf_counter(), 0, 0, 0
    try:
        with tqdm(total=len(store), unit="token", unit_scale=True, desc="pass 1", disable=job.silent) as bar:
            for step in steps:
                if not read and step.index < step.chunks:
                    bar.update(step.start)  # read before, or by the ranks below
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
        "best": list(best(kept, store, task.scorer, model)),
    }  # fmt: skip
    if job.answer and rank == 0:
        begun = perf_counter()
        report["pass_2"] = {"positions": job.positions, **task.answer(kept, job.positions)}
        report["pass_2"]["seconds"] = perf_counter() - begun
    return report


def best(kept: Champions, store: Store, scorer: Scorer, model: Model) -> Iterator[dict]:
    """The champions with the highest scores, each with the text kept around it; none stands in another's text."""
    runs = np.concatenate(([0], np.cumsum(np.diff(kept.position) > 1)))  # a gap ends a stretch of text
    shown, seen = 0, np.zeros(len(kept), bool)
    for i in kept.ranking():
        if seen[i] or kept.position[i] != kept.champion[i]:
            continue
        at = kept.position[i]
        near = np.flatnonzero((runs == runs[i]) & (np.abs(kept.position - at) <= AROUND))
        seen[near] = True
        yield {
            "token": int(at),
            "page": page_of(at),
            "score": float(kept.score[i]),
            "why": scorer.explain(int(kept.reason[i])),
            "text": model.text(gather(store, kept.position[near])),
        }
        shown += 1
        if shown == SHOWN:
            return


def in_words(report: dict) -> Iterator[str]:
    """The report as lines to read."""
    document, first = report["document"], report["pass_1"]
    yield f"document  {document['name']}: {document['tokens']:,} {document['kind']}, {report['storage']['why']}"
    shared = f", one of {report['ranks']} processes" if report["ranks"] > 1 else ""
    yield (
        f"pass 1    {report['model']}, {first['tokens_read']:,} tokens in {first['seconds']:.1f} s{shared}: "
        f"{first['tokens_per_s']:,.0f} tokens/s; {first['promoted']:,} promoted, {first['evicted']:,} evicted"
    )
    yield f"kept      {report['kept']:,} tokens, {report['kept_share']:.2%} of the document; the best:"
    for one in report["best"]:
        text = "" if one["text"] is None else f"  …{_line(one['text'])}…"
        yield f"  page {one['page']:,}, score {one['score']:.2f} ({one['why']}){text}"
    if "pass_2" in report:
        second = report["pass_2"]
        yield f"pass 2    over what was kept, {second['positions']} positions, {second['seconds']:.1f} s:"
        rest = {name: value for name, value in second.items() if name not in ("positions", "seconds")}
        yield f"  {_line(rest.get('text', '')) or json.dumps(rest)}"


def _line(text: str) -> str:
    """A document's text as one line of at most `WIDEST` characters that tells a terminal nothing to do."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= WIDEST else f"{shown[: WIDEST - 1]}…"


def command(
    file: Annotated[str | None, typer.Argument(help="Text, .npy, .safetensors, .jsonl, .parquet or hub:...")] = None,
    prompt: Annotated[str, typer.Option(help="What is asked; a .npy of rows for embeddings; '' for salience.")] = "",
    model: Annotated[str, typer.Option(help="smollm2, or layer: the built-in layer, untrained.")] = "smollm2",
    generated: Annotated[str, typer.Option(help="Instead of FILE, a random document of so many tokens.")] = "",
    chunk_tokens: Annotated[str, typer.Option(help="Tokens read at a time.")] = "64k",
    buffer_tokens: Annotated[str, typer.Option(help="Tokens kept of the whole document.")] = "32k",
    per_chunk_budget: Annotated[str, typer.Option(help="Tokens one chunk may promote.")] = "4k",
    nucleus: Annotated[float, typer.Option(help="Share of softmax(scores) a chunk's champions hold, in (0, 1].")] = 1.0,
    neighbours: Annotated[int, typer.Option(help="Tokens on either side that a champion brings along.")] = 8,
    ram_limit: Annotated[str, typer.Option(help="Memory the document may take, such as 2GB; else half the free.")] = "",
    cache: Annotated[str, typer.Option(help="Folder for token ids and checkpoints.")] = "",
    workers: Annotated[int, typer.Option(help="Threads that tokenise.", min=1)] = 1,
    checkpoint: Annotated[str, typer.Option(help="File to resume from; one in the cache, removed when done.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again whatever the checkpoint holds.")] = False,
    positions: Annotated[str, typer.Option(help=f"In pass 2: {' or '.join(POSITIONS)}; else the model's own.")] = "",
    answer: Annotated[bool, typer.Option(help="Whether pass 2 follows.")] = True,
    json_file: Annotated[str, typer.Option("--json", help="Write the report there; - for standard output.")] = "",
    events: Annotated[str, typer.Option(help="Write promotions and evictions there, as JSON lines.")] = "",
    seed: Annotated[int, typer.Option(help="Of the layer's weights and a generated document.", min=0, max=TOP_ID)] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    progress: Annotated[bool | None, typer.Option(help="Show progress; where there is a terminal.")] = None,
) -> None:
    """Read a document of any length, keep what answers the prompt, and answer from that.

    Stop it any time: the same command goes on. Under torchrun the processes share the document.
    """
    if (file is None) == (not generated):
        raise typer.BadParameter("give a FILE or --generated N, one of the two", param_hint="FILE")
    if positions:
        choose("--positions", positions, POSITIONS)
    sizes = {"chunk_tokens": chunk_tokens, "buffer_tokens": buffer_tokens, "per_chunk_budget": per_chunk_budget}
    sizes = {name: parse_size(text, f"--{name.replace('_', '-')}") for name, text in sizes.items()}
    plan = StreamPlan(**sizes, nucleus=nucleus, neighbours=neighbours)
    limit = _bytes(ram_limit)
    for option, path in (("--json", json_file), ("--events", events), ("--checkpoint", checkpoint)):
        if path and (option, path) != ("--json", "-"):
            _check_place(option, path)
    try:
        with together(pick_device(device)) as (rank, _):
            reader = make_model(model, prompt or None, file, seed, device)
            if generated:
                store = reader.generated(parse_size(generated, "--generated"))
            else:
                store = _open(file, reader, limit, cache, workers, _silent(progress, rank))
            task = reader.on(store)
            path = Path(checkpoint) if checkpoint else _default_checkpoint(cache, store, task.scorer, plan)
            log, silent = Path(events) if events else None, _silent(progress, rank)
            about = {"prompt": prompt, "seed": seed, **environment(pick_device(device))}
            stand = positions or reader.positions
            job = Job(plan, path, fresh, log, stand, answer and bool(prompt), silent, about)
            report = stream_document(reader, store, task, job)
            if rank == 0:
                _say(report, json_file)
            if not checkpoint:
                own_path(path, rank).unlink(missing_ok=True)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. The same command{' without --fresh' if fresh else ''} goes on from here.", err=True)
        raise typer.Exit(130) from None


def _bytes(ram_limit: str) -> int | None:
    try:
        return parse_bytes(ram_limit) if ram_limit else None
    except ValueError as err:
        raise typer.BadParameter(str(err), param_hint="--ram-limit") from None


def _check_place(option: str, path: str) -> None:
    try:
        files.check_place(path)
    except OSError as err:
        raise type(err)(err.errno, f"{option} cannot be written there: {err.strerror}", path) from err


def _open(file: str, model: Model, limit: int | None, cache: str, workers: int, silent: bool | None) -> Store:
    with tqdm(bar_format="{desc}", leave=False, disable=silent) as line:
        return open_document(
            file,
            encode=model.encode,
            fingerprint=model.fingerprint,
            ram_limit=limit,
            cache=Path(cache) / "documents" if cache else None,
            workers=workers,
            progress=lambda _, sentence: line.set_description_str(sentence),
        )


def _default_checkpoint(cache: str, store: Store, scorer: Scorer, plan: StreamPlan) -> Path:
    folder = Path(cache).expanduser() if cache else files.cache_dir()
    return folder / "streams" / f"{digest(store.fingerprint, scorer.fingerprint, plan)[:24]}.safetensors"


def _silent(progress: bool | None, rank: int) -> bool | None:
    """What tqdm calls `disable`: None leaves it to whether there is a terminal."""
    return True if rank else None if progress is None else not progress


def _say(report: dict, json_file: str) -> None:
    whole = json.dumps(report, indent=1, ensure_ascii=False)
    if json_file == "-":
        typer.echo(whole)
        return
    for line in in_words(report):
        typer.echo(line)
    if json_file:
        files.write_text(json_file, whole + "\n")
