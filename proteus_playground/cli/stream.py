"""`proteus stream`: read a document of any length, keep what answers a prompt, and answer from that."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..common import files
from ..common.machine import environment
from ..common.options import Device, choose, parse_size, pick_device
from ..common.outputs import check_different, output_file, output_folder, report_file
from ..common.processes import own_path, together
from ..common.progress import resumable
from ..hf.models import DEFAULT
from ..streaming.buffer import StreamPlan
from ..streaming.second_pass import POSITIONS
from ..streaming.sources import open_document
from ..streaming.stores import TOP_ID, Store, digest, parse_bytes
from .stream_passes import Job, Model, make_model, stream_document
from .stream_report import write_report


def stream_command(
    file: Annotated[str | None, typer.Argument(help="Text, .npy, .safetensors, .jsonl, .parquet or hub:...")] = None,
    prompt: Annotated[str, typer.Option(help="The question, or .npy rows for embeddings; '' scores by salience.")] = "",
    model: Annotated[str, typer.Option(help="A model, or layer: the built-in, untrained layer.")] = DEFAULT,
    generated: Annotated[str, typer.Option(help="Tokens of a random document to read instead of FILE.")] = "",
    chunk_tokens: Annotated[str, typer.Option(help="Tokens per chunk.")] = "64k",
    buffer_tokens: Annotated[str, typer.Option(help="Tokens kept of the whole document.")] = "32k",
    per_chunk_budget: Annotated[str, typer.Option(help="Tokens one chunk may promote.")] = "4k",
    nucleus: Annotated[float, typer.Option(help="Share of softmax(scores) a chunk's champions hold, in (0, 1].")] = 1.0,
    neighbours: Annotated[int, typer.Option(help="Tokens on either side that a champion brings along.")] = 8,
    ram_limit: Annotated[str, typer.Option(help="Memory for the document, such as 2GB; else half the free.")] = "",
    cache: Annotated[str, typer.Option(help="Folder for token ids and checkpoints.", callback=output_folder)] = "",
    workers: Annotated[int, typer.Option(help="Threads that tokenise.", min=1)] = 1,
    checkpoint: Annotated[str, typer.Option(help="File to resume from; else in the cache.", callback=output_file)] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore the checkpoint and begin again.")] = False,
    positions: Annotated[str, typer.Option(help=f"In pass 2: {' or '.join(POSITIONS)}; '' for the model's own.")] = "",
    answer: Annotated[bool, typer.Option(help="Run pass 2.")] = True,
    json_file: Annotated[str, typer.Option("--json", help="JSON report; - prints it.", callback=report_file)] = "",
    events: Annotated[str, typer.Option(help="JSON lines of promotions, evictions.", callback=output_file)] = "",
    seed: Annotated[int, typer.Option(help="Seed of weights and of a random document.", min=0, max=TOP_ID)] = 0,
    device: Device = "cpu",
    progress: Annotated[bool | None, typer.Option(help="Show progress; by default only in a terminal.")] = None,
) -> None:
    """Read a document of any length and answer a question about it.

    The tokens that match the prompt best are kept and the answer is made from them. Ctrl-C stops it; the same command
    goes on from there. Under torchrun the processes share the document.
    """
    if (file is None) == (not generated):
        raise typer.BadParameter("give a FILE or --generated N, one of the two", param_hint="FILE")
    check_different({"FILE": file, "--json": json_file, "--events": events, "--checkpoint": checkpoint})
    if positions:
        choose("--positions", positions, POSITIONS)
    sizes = {"chunk_tokens": chunk_tokens, "buffer_tokens": buffer_tokens, "per_chunk_budget": per_chunk_budget}
    sizes = {name: parse_size(text, f"--{name.replace('_', '-')}") for name, text in sizes.items()}
    plan = StreamPlan(**sizes, nucleus=nucleus, neighbours=neighbours)
    limit = _bytes(ram_limit)
    without = " without --fresh" if fresh else ""
    with resumable(f"The same command{without} goes on from here."), together(pick_device(device)) as (rank, _):
        silent = True if rank else None if progress is None else not progress  # None: a bar only in a terminal
        reader = make_model(model, prompt or None, file, seed, device)
        if generated:
            store = reader.generated(parse_size(generated, "--generated"))
        else:
            store = _open(file, reader, limit, cache, workers, silent)
        task = reader.on(store)
        name = f"{digest(store.fingerprint, task.scorer.fingerprint, plan)[:24]}.safetensors"
        job = Job(
            plan=plan,
            checkpoint=Path(checkpoint or (Path(cache) if cache else files.cache_dir()) / "streams" / name),
            fresh=fresh,
            events=Path(events) if events else None,
            positions=positions or reader.positions,
            answer=answer and bool(prompt),
            silent=silent,
            about={"prompt": prompt, "seed": seed, **environment(pick_device(device))},
        )
        report = stream_document(reader, store, task, job)
        if rank == 0:
            write_report(report, json_file)
        if not checkpoint:
            own_path(job.checkpoint, rank).unlink(missing_ok=True)


def _bytes(ram_limit: str) -> int | None:
    try:
        return parse_bytes(ram_limit) if ram_limit else None
    except ValueError as err:
        raise typer.BadParameter(str(err), param_hint="--ram-limit") from None


def _open(file: str, model: Model, limit: int | None, cache: str, workers: int, silent: bool | None) -> Store:
    with tqdm(bar_format="{desc}", leave=False, disable=silent) as line:
        return open_document(
            file, encode=model.encode, fingerprint=model.fingerprint, ram_limit=limit,
            cache=Path(cache) / "documents" if cache else None, workers=workers,
            progress=lambda _, sentence: line.set_description_str(sentence),
        )  # fmt: skip
