"""`proteus bench sweep`: us and our rivals by length, in one run that can be stopped and resumed.

Every row is saved as soon as it is measured; what cannot run is a row that says why.
"""

from __future__ import annotations

import json
import time
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...attention import AttentionConfig
from ...common import options
from ...common.files import write_json
from ...common.machine import environment
from ...common.runs import differences
from .floor import measure_rates
from .measure import release, sync
from .rivals import LABELS, OURS, Case, Rivals
from .row import OOM, TIMINGS, attempt
from .table import PASSES, SCOPES, markdown_report, name

KEY = ("scope", "passes", "groups", "tokens", "who", "alpha")


def key(row: dict) -> tuple:
    return tuple(row[part] for part in KEY)


class Sweep:
    """A report as it grows, and the file that it lives in (None: nowhere)."""

    def __init__(self, report: dict, path: Path | None):
        self.report, self.path = report, path

    def save(self) -> None:
        if self.path:
            write_json(self.path, self.report)

    def missing(self, cases: list[Case]) -> list[Case]:
        """Cases that have no row yet."""
        done = {key(row) for row in self.report["rows"]}
        return [case for case in cases if key(case.key()) not in done]

    def run(self, cases: list[Case], limit_s: float, budget_s: float, **how) -> None:
        """Measure the cases that have no row yet, `how` being what `attempt` takes.

        Ends between two rows once `limit_s` seconds are spent (0: never); what is then missing, or after Ctrl-C, is
        listed in `left_out`. Raises `OSError` when a row broke the device for every later one.
        """
        end, rows = time.monotonic() + (limit_s or float("inf")), self.report["rows"]
        try:
            bar = tqdm(self.missing(cases), desc="rows", disable=None)
            for case in bar:
                if time.monotonic() > end:
                    break
                bar.set_postfix_str(f"{case.tokens:,} {case.scope} {case.passes} {name(case.key())}")
                skip = skipped(case, rows, budget_s)
                rows.append(case.key() | {"status": skip} if skip else attempt(case, budget_s=budget_s, **how))
                self.save()
                sync(case.device)
        except RuntimeError as lost:
            raise OSError(f"{case.device} answers no more after the last row; run the command again ({lost})") from lost
        finally:
            self.report["left_out"] = [case.key() for case in self.missing(cases)]
            self.save()


def skipped(case: Case, rows: list[dict], budget_s: float) -> str | None:
    """Why a case is not tried, after what became of it at a shorter length.

    What did not run, or took more than `budget_s` for a call, is not tried again; ours is, unless memory ran out.
    """
    for row in rows:
        shorter = row["tokens"] < case.tokens and key(row | {"tokens": case.tokens}) == key(case.key())
        if not shorter or row["status"].startswith("skipped"):
            continue
        if row["status"] != "ok" and (case.who != OURS or row["status"] == OOM):
            return f"skipped: {row['status'].partition(':')[0]} at {row['tokens']:,} tokens"
        if row.get("ms", 0) > budget_s * 1e3:
            return f"skipped: {row['ms'] / 1e3:.1f} s a call at {row['tokens']:,} tokens, over --budget-s {budget_s:g}"
    return None


def open_sweep(out: str, fresh: bool, new: dict) -> Sweep:
    """A sweep over the file's rows, or over none. Raises `ValueError` when the file's rows are not comparable."""
    path = Path(out) if out else None
    if fresh or not path or not path.exists():
        return Sweep(new, path)
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        here, there = ({**r["settings"], "device": r["device"], "torch": r["torch"]} for r in (new, old))
        held = len([key(row) for row in old["rows"]])
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"--out {out}: exists and is no sweep's report; choose another file, or --fresh") from problem
    other = [f"{name} {old!r}, now {new!r}" for name, (new, old) in differences(here, there).items()]
    if other:
        raise ValueError(f"--out {out}: holds {held} rows measured otherwise ({'; '.join(other)}); choose the same "
                         "settings, another file, or --fresh to start over")  # fmt: skip
    return Sweep({**new, **old}, path)


def plan(axes: dict[str, list], fields: dict, **fixed) -> list[Case]:
    """Every case of a sweep, shortest first, ours first. Raises `ValueError` when a config does not hold."""
    cases = {}
    for tokens, scope, passes, groups, who, alpha in product(*axes.values()):
        cfg = AttentionConfig(**{**fields, "n_kv_heads": groups, "flux_alpha": alpha})
        case = Case(scope, passes, tokens, who, cfg, **fixed)
        cases.setdefault(key(case.key()), case)  # a rival has no alpha: it comes once
    return list(cases.values())


def command(
    lengths: options.Lengths = "4k..1m",
    d_model: options.Width = 512,
    heads: options.Heads = 8,
    groups: options.Groups = "2,8",
    head_dim: options.HeadDim = 64,
    shortlist: options.Shortlist = 256,
    alphas: Annotated[str, typer.Option(help="Flux alphas; auto lets the length decide.")] = "1",
    rivals: Rivals = "flash,cudnn,efficient,mha,flex,nsa",
    scope: Annotated[str, typer.Option(help="layer: hidden states in and out; attention: q, k, v in.")] = "layer",
    passes: Annotated[str, typer.Option(help="forward; training: forward + backward.")] = "forward",
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    config: options.Config = "{}",
    repeats: Annotated[int, typer.Option(help="Timed calls of each, fewer when slow.", min=1)] = 20,
    budget_s: Annotated[float, typer.Option(help="Seconds of calls a row; a slower call ends a series.", min=0)] = 10,
    limit_s: Annotated[float, typer.Option(help="Seconds for the whole run; 0 for no end.", min=0)] = 0,
    timing: Annotated[str, typer.Option(help="eager (launches count), graph (CUDA graph), both.")] = "eager",
    memory: Annotated[bool, typer.Option(help="On a CPU, weigh each case in a process of its own.")] = True,
    cap: options.Cap = 0,
    seed: options.Seed = 0,
    out: options.Out = "",
    page: Annotated[str, typer.Option(help="HTML page to write.")] = "",
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Add to the rows in --out, or start over.")] = True,
) -> None:
    """Us and rivals by length: time, memory, reads, floor. Ctrl-C stops it; the same command goes on from there."""
    dev, kind = options.pick_device(device), options.choose("--dtype", dtype, options.DTYPES)
    options.choose("--timing", timing, TIMINGS)
    axes = {
        "tokens": sorted(options.parse_lengths(lengths)),
        "scope": options.choose_some("--scope", scope, SCOPES),
        "passes": options.choose_some("--passes", passes, PASSES),
        "groups": options.parse_lengths(groups, "--groups"),
        "who": [OURS, *options.choose_some("--rivals", rivals, LABELS)],
        "alpha": options.parse_alphas(alphas),
    }
    fields = {"d_model": d_model, "n_heads": heads, "head_dim": head_dim, "shortlist": shortlist, "backend": backend,
              "route_heads": False, **options.parse_config(config)}  # fmt: skip
    cases = plan(axes, fields, device=dev, dtype=kind, seed=seed)
    settings = {**fields, "dtype": dtype, "seed": seed, "repeats": repeats, "budget_s": budget_s, "timing": timing,
                "cap_gb": cap}  # fmt: skip
    report = {"benchmark": "sweep", **environment(dev), "settings": settings, "rates": {}, "rows": [], "left_out": []}
    sweep = open_sweep(out, not resume, report)
    options.hold_to(cap, dev)
    sweep.report["rates"] = sweep.report["rates"] or measure_rates(dev, kind)
    release(dev)
    how = {"repeats": repeats, "timing": timing, "rates": sweep.report["rates"], "memory": memory}
    stopped = False
    try:
        sweep.run(cases, limit_s, budget_s, **how)
    except KeyboardInterrupt:
        stopped = True
    _tell(sweep, page)
    if stopped:
        raise typer.Exit(130)


def _tell(sweep: Sweep, page: str) -> None:
    """Print the tables, draw the page, and say how to go on where rows are missing."""
    typer.echo(markdown_report(sweep.report))
    if page:
        from .page import write_page

        write_page(sweep.report, Path(page))
    left = len(sweep.report["left_out"])
    if left:
        how = "the same command goes on from there" if sweep.path else "without --out nothing was kept"
        typer.echo(f"Stopped with {left} rows to go: {how}.", err=True)
