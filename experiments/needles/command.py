"""`proteus verify`: run the validation suite, or go on with it, and write its report."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...common.machine import environment
from ...common.options import choose_some, parse_lengths, pick_device
from ...common.outputs import output_folder
from ...common.progress import resumable
from .pairs import load_pairs
from .report import PAGE, sentences, write_report
from .subjects import load
from .tasks import ASKED, TASKS
from .verify import VerifySettings, read_rows, run_folder, verify

EVERY_TASK, BOTH_WAYS = ",".join(TASKS), ",".join(ASKED)
LIBRARIES = ("numpy", "transformers", "bm25s", "snowballstemmer", "scipy")

Lengths = Annotated[str, typer.Option(help="Token counts: 4k,1m; 4k..1m doubles; 4k..1m/4 goes in steps of 4.")]
Depths = Annotated[str, typer.Option(help="Depths of the grid, shares in [0, 1].")]
Tasks = Annotated[str, typer.Option(help=f"Of {EVERY_TASK}.")]
Asked = Annotated[
    str, typer.Option(help="paraphrase: questions share no content word with the fact; literal: they use its words.")
]
PairsFile = Annotated[
    Path | None, typer.Option(help="JSON file of facts and questions; ours if left out.", exists=True, dir_okay=False)
]
Source = Annotated[
    str, typer.Option(help="pydoc, jargon, bible, a file, several joined by +, or auto: all that are installed.")
]
Share = Annotated[float, typer.Option(help="Tokens kept, as a share of the document.")]
Chunk = Annotated[int, typer.Option(help="Tokens per chunk.")]
PerChunk = Annotated[
    float, typer.Option(help="Tokens one chunk may promote, as a multiple of its fair share of the buffer.")
]
Neighbours = Annotated[int, typer.Option(help="Tokens on either side of a champion that are kept with it.")]
Seeds = Annotated[
    int,
    typer.Option(
        help="Number of seeds; each plants other facts in other places. Live fire asks for every fact once per seed."
    ),
]
Answers = Annotated[int, typer.Option(help="Cases per task, length and way of asking that the model also answers.")]
Read = Annotated[int, typer.Option(help="Best tokens of a buffer that the model reads to answer.")]
Model = Annotated[str, typer.Option(help="A pulled model, or layer: a layer with random weights, for chance level.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 (twice as fast where AVX512-BF16 is) or float16.")]
Out = Annotated[
    Path, typer.Option(help="Folder; a run that was stopped goes on from what is there.", callback=output_folder)
]


def verify_command(
    lengths: Lengths = "4k..64k/4",
    depths: Depths = "0,0.25,0.5,0.75,1",
    tasks: Tasks = EVERY_TASK,
    asked: Asked = BOTH_WAYS,
    pairs: PairsFile = None,
    haystack: Source = "auto",
    buffer_share: Share = 0.03,
    chunk: Chunk = 4096,
    per_chunk: PerChunk = 4.0,
    neighbours: Neighbours = 12,
    seeds: Seeds = 3,
    answers: Answers = 0,
    read: Read = 1024,
    model: Model = "smollm2",
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Out = Path("proteus-verify"),
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
