"""`proteus bench sweep`: our attention and its rivals by length, in one run that can be stopped and resumed.

Every row is saved as soon as it is measured. A case that cannot run becomes a row with the reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...attention import AttentionConfig
from ...common import options
from ...common.files import write_json
from ...common.machine import environment
from ...common.outputs import check_different, output_file
from ...common.progress import resumable
from ...common.runs import differences
from .floor import measure_rates
from .measure import release, wait
from .rivals import LABELS, OURS, BenchCase, Rivals
from .row import OOM, TIMINGS, attempt
from .table import PASSES, SCOPES, case_name, sweep_tables

KEY = ("scope", "passes", "groups", "tokens", "who", "alpha")


def key(row: dict) -> tuple:
    return tuple(row[part] for part in KEY)


class Sweep:
    """A report that grows row by row, and the file that it is saved in (None: not saved)."""

    def __init__(self, report: dict, path: Path | None):
        self.report, self.path = report, path

    def save(self) -> None:
        if self.path:
            write_json(self.path, self.report)

    def missing(self, cases: list[BenchCase]) -> list[BenchCase]:
        """Cases without a row."""
        done = {key(row) for row in self.report["rows"]}
        return [case for case in cases if key(case.key()) not in done]

    def run(
        self, cases: list[BenchCase], limit_s: float, budget_s: float, *, weighed: Collection[str] = (), **options
    ) -> None:
        """Measure the cases without a row. `options` go to `attempt`, as does `memory` for the cases of `weighed`.

        Ends after the row in which `limit_s` seconds are over (0: never). Cases that are then missing, or missing after
        Ctrl-C, are listed in `left_out`. Raises `OSError` when a row broke the device for all later rows.
        """
        end, rows = time.monotonic() + (limit_s or float("inf")), self.report["rows"]
        try:
            bar = tqdm(self.missing(cases), desc="rows", disable=None)
            for case in bar:
                if time.monotonic() > end:
                    break
                bar.set_postfix_str(f"{case.tokens:,} {case.scope} {case.passes} {case_name(case.key())}")
                skip = skipped(case, rows, budget_s)
                if skip:
                    rows.append(case.key() | {"status": skip})
                else:
                    rows.append(attempt(case, budget_s=budget_s, memory=case.who in weighed, **options))
                self.save()
                wait(case.device)
        except RuntimeError as err:
            raise OSError(f"{case.device} failed in the last row; run the command again ({err})") from err
        finally:
            self.report["left_out"] = [case.key() for case in self.missing(cases)]
            self.save()


def skipped(case: BenchCase, rows: list[dict], budget_s: float) -> str | None:
    """Why a case is not tried: at a shorter length it did not run or took more than `budget_s` seconds for a call.

    Our own cases are tried again after every failure except one for lack of memory.
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
    """The sweep of a file, or a new one. Raises `ValueError` for rows that were measured under other conditions."""
    path = Path(out) if out else None
    if fresh or not path or not path.exists():
        return Sweep(new, path)
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        here, there = ({**r["settings"], "device": r["device"], "torch": r["torch"]} for r in (new, old))
        held = len([key(row) for row in old["rows"]])
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"--out {out}: exists and is no sweep's report; choose another file, or --fresh") from err
    other = [f"{name} {old!r}, now {new!r}" for name, (new, old) in differences(here, there).items()]
    if other:
        raise ValueError(f"--out {out}: holds {held} rows measured otherwise ({'; '.join(other)}); choose the same "
                         "settings, another file, or --fresh to start over")  # fmt: skip
    return Sweep({**new, **old}, path)


def plan_cases(axes: dict[str, list], fields: dict, **fixed) -> list[BenchCase]:
    """Every case of a sweep, shortest first, ours first. Raises `ValueError` when a config does not hold."""
    cases = {}
    for tokens, scope, passes, groups, who, alpha in product(*axes.values()):
        cfg = AttentionConfig(**{**fields, "n_kv_heads": groups, "flux_alpha": alpha})
        case = BenchCase(scope, passes, tokens, who, cfg, **fixed)
        cases.setdefault(key(case.key()), case)  # a rival has no alpha, so it is measured once
    return list(cases.values())


def sweep_command(
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
    page: Annotated[str, typer.Option(help="HTML page to write.", callback=output_file)] = "",
    resume: Annotated[bool, typer.Option("--resume/--fresh", help="Add to the rows in --out, or start over.")] = True,
) -> None:
    """Our attention and rivals by length: time, memory, reads, floor. After Ctrl-C the same command goes on."""
    check_different({"--out": out, "--page": page})
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
    with options.fields_of("--config"):
        cases = plan_cases(axes, fields, device=dev, dtype=kind, seed=seed)
    settings = {**fields, "dtype": dtype, "seed": seed, "repeats": repeats, "budget_s": budget_s, "timing": timing,
                "cap_gb": cap}  # fmt: skip
    report = {"benchmark": "sweep", **environment(dev), "settings": settings, "rates": {}, "rows": [], "left_out": []}
    sweep = open_sweep(out, not resume, report)
    options.hold_to(cap, dev)
    sweep.report["rates"] = sweep.report["rates"] or measure_rates(dev, kind)
    release(dev)
    how = {"repeats": repeats, "timing": timing, "rates": sweep.report["rates"]}
    with resumable("", report=lambda: _show(sweep, page)):
        sweep.run(cases, limit_s, budget_s, weighed=[OURS, *LABELS] if memory else [], **how)


def _show(sweep: Sweep, page: str) -> None:
    """Print the tables, write the page, and say how to go on where rows are missing."""
    typer.echo(sweep_tables(sweep.report))
    if page:
        from .page import write_page

        write_page(sweep.report, Path(page))
    missing = len(sweep.report["left_out"])
    if missing:
        how = "the same command goes on from there" if sweep.path else "without --out nothing was kept"
        typer.echo(f"Stopped with {missing} rows to go: {how}.", err=True)
