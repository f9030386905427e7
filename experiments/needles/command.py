"""`proteus verify`: run the validation suite, or go on with it, and write its report."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...common.machine import environment
from ...common.options import Device, Folder, Lengths, choose_some, parse_lengths, pick_device
from ...common.progress import resumable
from ...hf.models import DEFAULT
from .pairs import load_pairs
from .report import PAGE, sentences, write_report
from .subjects import load
from .tasks import ASKED, TASKS
from .verify import VerifySettings, read_rows, run_folder, verify

EVERY_TASK, BOTH_WAYS = ",".join(TASKS), ",".join(ASKED)
LIBRARIES = ("numpy", "transformers", "bm25s", "snowballstemmer", "scipy")


def verify_command(
    lengths: Lengths = "4k..64k/4",
    depths: Annotated[str, typer.Option(help="Depths of the grid, shares in [0, 1].")] = "0,0.25,0.5,0.75,1",
    tasks: Annotated[str, typer.Option(help=f"Of {EVERY_TASK}.")] = EVERY_TASK,
    asked: Annotated[
        str, typer.Option(help="paraphrase: in other words than the fact. literal: in its words.")
    ] = BOTH_WAYS,
    pairs: Annotated[
        Path | None, typer.Option(help="JSON of facts and questions; ours if left out.", exists=True, dir_okay=False)
    ] = None,
    haystack: Annotated[
        str, typer.Option(help="pydoc, jargon, bible, files; joined by +; auto: all of them.")
    ] = "auto",
    buffer_share: Annotated[float, typer.Option(help="Tokens kept, as a share of the document.")] = 0.03,
    chunk: Annotated[int, typer.Option(help="Tokens per chunk.")] = 4096,
    per_chunk: Annotated[float, typer.Option(help="A chunk may fill so many times its share of the buffer.")] = 4.0,
    neighbours: Annotated[int, typer.Option(help="Tokens on either side of a champion that are kept with it.")] = 12,
    seeds: Annotated[int, typer.Option(help="Number of seeds; each plants other facts in other places.")] = 3,
    answers: Annotated[int, typer.Option(help="Cases of each kind that the model also answers.")] = 0,
    read: Annotated[int, typer.Option(help="Best tokens of a buffer that the model reads to answer.")] = 1024,
    model: Annotated[str, typer.Option(help="A model, or layer: random weights, for chance level.")] = DEFAULT,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32, float16 or bfloat16, twice as fast with AVX512-BF16.")
    ] = "float32",
    out: Folder = Path("proteus-verify"),
) -> None:
    """Plant facts in long documents of real English and see whether they are found."""
    settings = VerifySettings(
        lengths=tuple(sorted(set(parse_lengths(lengths)))), depths=_shares(depths), seeds=seeds, haystack=haystack,
        tasks=tuple(choose_some("--tasks", tasks, TASKS)), asked=tuple(choose_some("--asked", asked, ASKED)),
        buffer_share=buffer_share, chunk_tokens=chunk, per_chunk=per_chunk, neighbours=neighbours, answers=answers,
        read_tokens=read,
    )  # fmt: skip
    facts, where = load_pairs(pairs), pick_device(device)
    subject = load(model, device, cache=out / "keys", dtype=dtype, answers=answers > 0)
    with resumable(report=lambda: _report(out, environment(where))), tqdm(unit="case", dynamic_ncols=True) as bar:
        for done in verify(settings, facts, subject, out):
            bar.total = done.total
            bar.set_postfix_str(done.row["key"][:60], refresh=False)
            bar.update(done.index - bar.n)


def _report(out: Path, machine: dict) -> None:
    """Write and print the report of the finished cases, if there are any."""
    rows = list(read_rows(out).values())
    if rows:
        versions = {name: version(name) if find_spec(name) else "none" for name in LIBRARIES}
        report = write_report(out, rows, run_folder(out).settings() | machine | versions)
        typer.echo("\n".join((*sentences(report), f"Report: {out / PAGE}")))


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        problem = f"{text!r}: must be numbers in [0, 1] separated by commas"
        raise typer.BadParameter(problem, param_hint="--depths") from None
