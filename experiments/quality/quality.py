"""`proteus quality`: likelihood and answers of one model by every way to choose keys, at equal reads per query."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...common.files import write_json
from ...common.machine import environment
from ...common.options import Device, Folder, Seed, choose_some, fields_of, parse_config, parse_lengths, pick_device
from ...common.outputs import check_different, output_file
from ...common.progress import resumable
from ...hf.models import DEFAULT
from ..speed.measure import publish
from .arms import arm_names, arms
from .cells import REPORT, QualitySettings, measure
from .questions import TASKS
from .subjects import load
from .table import quality_table, summarise

QUICK = {"lengths": "512", "shares": "8", "passages": 2, "cases": 1, "tasks": "needle,multi-key,shelf"}
EVERY = ", ".join(TASKS)


def quality_command(
    target: Annotated[str, typer.Argument(metavar="[MODEL]", help="The same as --model.")] = "",
    model: Annotated[str, typer.Option(help="A model, a converted folder, or shelf-mini.")] = DEFAULT,
    text: Annotated[
        list[str] | None, typer.Option(help="Text to judge by: a file or a named text. May be repeated.")
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to fit gates to, another one; default: the gates that come with it, if any. Repeatable."
        ),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens read of each calibration text.", min=512)] = 16384,
    lengths: Annotated[str | None, typer.Option(help="Token counts: 2k,4k; 2k..8k doubles. Default 2k.")] = None,
    shares: Annotated[str | None, typer.Option(help="L is the length divided by this; default 32,16,8.")] = None,
    passages: Annotated[int | None, typer.Option(help="Passages of each text; default 3.", min=0)] = None,
    cases: Annotated[int | None, typer.Option(help="Questions of each task; default 5.", min=0)] = None,
    tasks: Annotated[str | None, typer.Option(help=f"all, none, or of {EVERY}. Default all.")] = None,
    arm: Annotated[str, typer.Option("--arms", help=f"all, or of {', '.join(arm_names())}.")] = "all",
    ours: Annotated[
        list[str] | None, typer.Option(help='Fields of AttentionConfig for ours, as JSON. May be repeated, "{}" too.')
    ] = None,
    selector: Annotated[
        list[str] | None,
        typer.Option(help="A selector of yours as FILE.py:NAME; it is checked first. May be repeated."),
    ] = None,
    seed: Seed = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="512 tokens, one share, two tasks, few cases: minutes on a CPU.")
    ] = False,
    device: Device = "cpu",
    out: Folder = Path("proteus-quality"),
    as_json: Annotated[
        str, typer.Option("--json", help="JSON file for the report, besides that in --out.", callback=output_file)
    ] = "",
) -> None:
    """Measure what each way of choosing keys costs a model in likelihood and answers, at equal reads."""
    check_different({"--json": as_json, "--out": out / REPORT})
    given = {"lengths": lengths, "shares": shares, "passages": passages, "cases": cases, "tasks": tasks}
    given = (QUICK if quick else {}) | {name: value for name, value in given.items() if value is not None}
    given |= {name: tuple(parse_lengths(given[name], f"--{name}")) for name in ("lengths", "shares") if name in given}
    given["tasks"] = tuple(_some("--tasks", given.get("tasks", "all"), list(TASKS)))
    settings = QualitySettings(**given, seed=seed)
    settings_of_ours = [parse_config(fields, "--ours") for fields in ours or []]
    chosen = arms(_some("--arms", arm, arm_names()), settings_of_ours, selector or [])
    dev, rows = pick_device(device), []
    subject = load(target or model, dev, text or [], calibrate or [], calibration_tokens)

    def show() -> None:
        if rows:
            report = {"benchmark": "quality", **environment(dev), "dtype": "float32", **subject.about()}
            report |= {"seed": seed, "passages": settings.passages, "cases": settings.cases}
            report |= {"entries": summarise(rows), "rows": rows}
            write_json(out / REPORT, report)
            publish(report, quality_table(report), as_json)

    with resumable(report=show), fields_of("--ours"), tqdm(unit="cell", dynamic_ncols=True) as bar:
        for done in measure(subject, settings, chosen, out):
            rows.append(done.row)
            bar.total = done.total
            bar.set_postfix_str(f"{done.row['part']}, {done.row['arm']}, L {done.row['shortlist']}", refresh=False)
            bar.update(done.index - bar.n)


def _some(option: str, text: str, allowed: list[str]) -> list[str]:
    if text in ("all", "none"):
        return allowed if text == "all" else []
    return choose_some(option, text, allowed)
