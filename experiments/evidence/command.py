"""`proteus evidence`: train what is missing, measure every arm at equal keys per query, print the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...common.files import cache_dir, check_place
from ...common.options import choose, choose_some, parse_config, parse_lengths, pick_device
from ...lm.recall.recipe import ALPHA, PRESETS, RELATED, Scale, training_batches, training_recipe
from ...lm.recall.tasks import TASKS
from . import report as reports
from .arms import ARMS
from .changes import CHANGES
from .study import Asked, Row, cells, load, study

EVERY = tuple(TASKS)
ASKED = {"small": Asked(), "full": Asked(("mqar", *RELATED), (256, 512, 1024, 2048, 4096), (16, 64, 256))}

Preset = Annotated[str, typer.Option(help="small: minutes on one core; full: hours on a GPU.")]
ScaleFields = Annotated[str, typer.Option("--scale", help='Other fields of Scale as JSON, such as {"width": 96}.')]
Tasks = Annotated[str | None, typer.Option(help=f"Of {', '.join(EVERY)}; those that the models are trained on.")]
Lengths = Annotated[str | None, typer.Option(help="Token counts: 256,1k; 256..4k doubles.")]
Pairs = Annotated[str | None, typer.Option(help="How many are planted: pairs, or tokens to be said again.")]
Arms = Annotated[str, typer.Option(help=f"Of {', '.join(ARMS)}; or all, or none.")]
Changes = Annotated[str, typer.Option(help=f"One part changed at a time: all, none, or of {', '.join(CHANGES)}.")]
Shares = Annotated[str | None, typer.Option(help="L is the length divided by this; several by commas.")]
Seeds = Annotated[int, typer.Option(help="Models and texts of their own; 3 or more for an interval worth having.")]
Cases = Annotated[int | None, typer.Option(help="Answers asked for in each cell and seed, at least.")]
Models = Annotated[
    Path | None, typer.Option(help="Folder of the models, trained ones are used; the cache if left out.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="JSON file; a run that was stopped goes on from what is there.")]
Page = Annotated[Path | None, typer.Option(help="Markdown page in which tables are put between marks named as --out.")]
Report = Annotated[bool, typer.Option("--report", help="Print the tables of --out, measure nothing.")]


def evidence_command(
    preset: Preset = "small",
    scale: ScaleFields = "{}",
    tasks: Tasks = None,
    lengths: Lengths = None,
    pairs: Pairs = None,
    arms: Arms = "all",
    changes: Changes = "none",
    shares: Shares = None,
    seeds: Seeds = 3,
    cases: Cases = None,
    models: Models = None,
    device: Device = "cpu",
    out: Out = Path("evidence.json"),
    page: Page = None,
    report: Report = False,
) -> None:
    """How much of dense attention's recall each way of choosing keys keeps, at equal keys per query."""
    stopped = False
    if not report:
        size = _scale(preset, scale)
        given = {
            "tasks": size.tasks if tasks is None else tuple(choose_some("--tasks", tasks, TASKS)),
            "lengths": None if lengths is None else tuple(parse_lengths(lengths)),
            "things": None if pairs is None else tuple(parse_lengths(pairs, "--pairs")),
            "arms": _some("--arms", arms, tuple(ARMS)), "changes": _some("--changes", changes, tuple(CHANGES)),
            "shares": None if shares is None else tuple(parse_lengths(shares, "--shares")), "seeds": seeds,
            "cases": cases,
        }  # fmt: skip
        asked = replace(ASKED[preset], **{name: value for name, value in given.items() if value is not None})
        stopped = _run(
            size, asked, out, models or _home(size), str(pick_device(choose("--device", device, ("cpu", "cuda"))))
        )
    _print(out, page)
    if stopped:
        typer.echo("Stopped. The same command goes on from here.", err=True)
        raise typer.Exit(130)


def _scale(preset: str, fields: str) -> Scale:
    base = choose("--preset", preset, PRESETS)
    try:
        scale = replace(base, **parse_config(fields))
        training_batches(scale, 0), training_recipe(scale, ALPHA, 0)  # refuses now what would fail after hours
        return scale
    except TypeError as err:
        raise typer.BadParameter(f"{fields!r}: must be fields of Scale ({err})", param_hint="--scale") from None


def _some(option: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if text in ("all", "none"):
        return allowed if text == "all" else ()
    return tuple(choose_some(option, text, allowed))


def _home(scale: Scale) -> Path:
    """Where the models of a scale are kept unless told otherwise."""
    name = sha256(json.dumps(scale.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "evidence" / name


def _run(scale: Scale, asked: Asked, out: Path, models: Path, device: str) -> bool:
    """True where Ctrl+C ended it."""
    check_place(out)
    try:
        with tqdm(total=len(cells(scale, asked)), unit="cell", dynamic_ncols=True) as bar:
            for event in study(scale, asked, out, models, device=device):
                if isinstance(event, Row):
                    cell = event.cell
                    bar.set_postfix_str(f"{cell.change or cell.arm}, {cell.task} {cell.length:,}: {event.accuracy:.3f}")
                    bar.update()
                elif event.step.step % 10 == 0:
                    bar.set_postfix_str(f"{event.name} {event.step.step}/{event.steps}, loss {event.step.loss:.3f}")
    except KeyboardInterrupt:
        return True
    return False


def _print(out: Path, page: Path | None) -> None:
    """The tables of a file, on the screen and on the page."""
    entries = reports.summarise(load(out))
    if not entries:
        raise ValueError(f"out={str(out)!r} holds no finished cell: run proteus evidence without --report first")
    held = json.loads(out.read_text(encoding="utf-8"))
    found = "\n".join(f"- {line}" for line in reports.sentences(entries))
    text = "\n\n".join((reports.about(held, entries), reports.tables(entries), found))
    typer.echo(text)
    if page:
        reports.fill(page, out.stem, text)
