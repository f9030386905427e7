"""`proteus evidence`: train missing models, measure every arm at equal keys per query, print the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...common.files import cache_dir
from ...common.options import choose, choose_some, parse_config, parse_lengths, pick_device
from ...common.outputs import check_different, output_file, output_folder
from ...common.progress import resumable
from ...lm.recall.recipe import ALPHA, PRESETS, RELATED, Scale, training_batches, training_recipe
from ...lm.recall.tasks import TASKS
from ..pages import around, fill
from . import report as reports
from .arms import ARMS
from .changes import CHANGES
from .study import CellResult, StudySettings, cells, load, study

MODELS = "Folder of the models, by default in the cache; missing ones are trained."
PAGE = "Markdown page; the tables go between its marks with the name of --out."
SETTINGS = {
    "small": StudySettings(),
    "full": StudySettings(("mqar", *RELATED), (256, 512, 1024, 2048, 4096), (16, 64, 256)),
}


def evidence_command(
    preset: Annotated[str, typer.Option(help="small: minutes on one core; full: hours on a GPU.")] = "small",
    scale: Annotated[str, typer.Option("--scale", help='Other fields of Scale as JSON, such as {"width": 96}.')] = "{}",
    tasks: Annotated[str | None, typer.Option(help=f"Of {', '.join(TASKS)}; those trained on if left out.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Token counts: 256,1k; 256..4k doubles.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Numbers of planted pairs, or of tokens to repeat.")] = None,
    arms: Annotated[str, typer.Option(help=f"Of {', '.join(ARMS)}; or all, or none.")] = "all",
    changes: Annotated[str, typer.Option(help=f"Ablations: all, none, or of {', '.join(CHANGES)}.")] = "none",
    shares: Annotated[str | None, typer.Option(help="L is the length divided by this; several by commas.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds, each with models and texts of its own; intervals need 3.")] = 3,
    cases: Annotated[int | None, typer.Option(help="Least number of answers per cell and seed.")] = None,
    models: Annotated[Path | None, typer.Option(help=MODELS, callback=output_folder)] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    processes: Annotated[int, typer.Option(help="Processes that share the work, in turn on each GPU.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="JSON file; a stopped run goes on.", callback=output_file)] = Path(
        "evidence.json"
    ),
    page: Annotated[Path | None, typer.Option(help=PAGE, callback=output_file)] = None,
    report: Annotated[bool, typer.Option("--report", help="Print the tables of --out, measure nothing.")] = False,
) -> None:
    """Measure how much of dense attention's recall each way of choosing keys keeps, at equal keys per query."""
    check_different({"--out": out, "--page": page})
    if page:
        around(page, out.stem)  # raises now, and not after hours
    if report:
        return _show(out, page)
    with resumable(report=lambda: _show(out, page) if load(out) else None):
        size = _scale(preset, scale)
        given = {
            "tasks": size.tasks if tasks is None else tuple(choose_some("--tasks", tasks, TASKS)),
            "lengths": None if lengths is None else tuple(parse_lengths(lengths)),
            "things": None if pairs is None else tuple(parse_lengths(pairs, "--pairs")),
            "arms": _some("--arms", arms, tuple(ARMS)), "changes": _some("--changes", changes, tuple(CHANGES)),
            "shares": None if shares is None else tuple(parse_lengths(shares, "--shares")), "seeds": seeds,
            "cases": cases,
        }  # fmt: skip
        settings = replace(SETTINGS[preset], **{name: value for name, value in given.items() if value is not None})
        where = str(pick_device(choose("--device", device, ("cpu", "cuda"))))
        _run(size, settings, out, models or _models_folder(size), where, processes)


def _scale(preset: str, fields: str) -> Scale:
    base = choose("--preset", preset, PRESETS)
    try:
        scale = replace(base, **parse_config(fields, "--scale"))
        (
            training_batches(scale, 0),
            training_recipe(scale, ALPHA, 0),
        )  # raises now what would otherwise be raised after hours
        return scale
    except TypeError as err:
        raise typer.BadParameter(f"{fields!r}: must be fields of Scale ({err})", param_hint="--scale") from None


def _some(option: str, text: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if text in ("all", "none"):
        return allowed if text == "all" else ()
    return tuple(choose_some(option, text, allowed))


def _models_folder(scale: Scale) -> Path:
    """The default folder for the models of a scale."""
    name = sha256(json.dumps(scale.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "evidence" / name


def _run(scale: Scale, settings: StudySettings, out: Path, models: Path, device: str, processes: int) -> None:
    """Run the study with a progress bar. ValueError where the settings leave nothing to measure."""
    wanted = cells(scale, settings)
    if not wanted:
        raise ValueError(
            f"lengths={settings.lengths}, pairs={settings.things}, arms={settings.arms}, changes={settings.changes}: "
            "must leave something to measure, an arm or a change and texts that are long enough for the pairs"
        )
    with tqdm(total=len(wanted), unit="cell", dynamic_ncols=True) as bar:
        for event in study(scale, settings, out, models, device=device, processes=processes):
            if isinstance(event, CellResult):
                cell = event.cell
                bar.set_postfix_str(f"{cell.change or cell.arm}, {cell.task} {cell.length:,}: {event.accuracy:.3f}")
                bar.update()
            elif event.step.step % 10 == 0 or event.step.step == event.steps:
                bar.set_postfix_str(f"{event.name} {event.step.step}/{event.steps}, loss {event.step.loss:.3f}")


def _show(out: Path, page: Path | None) -> None:
    """Print the tables of a file, and put them on the page."""
    entries = reports.summarise(load(out))
    if not entries:
        raise ValueError(f"out={str(out)!r} holds no finished cell: run proteus evidence without --report first")
    held = json.loads(out.read_text(encoding="utf-8"))
    found = "\n".join(f"- {line}" for line in reports.sentences(entries))
    text = "\n\n".join((reports.about(held, entries), reports.tables(entries), found))
    typer.echo(text)
    if page:
        fill(page, out.stem, text)
