"""`proteus bench longest`: the longest text whose whole layer, forward, fits a memory cap; each length is run once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Annotated

import typer
from tqdm import tqdm

from ...attention import AttentionConfig
from ...common import options
from ...common.files import write_json
from ...common.machine import environment, markdown
from .rivals import EXACT, LABELS, OURS, BenchCase, Rivals
from .row import OOM, attempt
from .table import case_name


def search(run: Callable[[int], dict], start: int, last: int, halvings: int, budget_s: float) -> list[dict]:
    """The rows of all lengths tried: doubled from `start` to `last`, then halfway to where memory ran out.

    A dense call takes four times as long at twice the length. A length at which it may exceed `budget_s` is not tried.
    """
    tried, tokens = [], start
    while tokens <= last:
        if tried and tried[-1]["who"] in EXACT and tried[-1]["first_ms"] * 4 > budget_s * 1e3:
            reason = f"not tried: more than --budget-s {budget_s:g}, by the last"
            return [*tried, tried[-1] | {"tokens": tokens, "status": reason}]
        tried.append(run(tokens))
        if tried[-1]["status"] != "ok":
            break
        tokens *= 2
    fits, fails = tokens // 2, tokens
    for _ in range(halvings if len(tried) > 1 and tried[-1]["status"] == OOM else 0):
        tried.append(run((fits + fails) // 2))
        middle = tried[-1]["tokens"]
        fits, fails = (middle, fails) if tried[-1]["status"] == "ok" else (fits, middle)
    return tried


def longest_command(
    cap: options.Cap = 0,
    start: Annotated[str, typer.Option(help="First length tried.")] = "64k",
    last: Annotated[str, typer.Option(help="Longest length tried.")] = "8m",
    halvings: Annotated[int, typer.Option(help="Lengths tried between two powers of two.", min=0, max=20)] = 1,
    d_model: options.Width = 512,
    heads: options.Heads = 8,
    groups: options.Groups = "2,8",
    head_dim: options.HeadDim = 64,
    shortlist: options.Shortlist = 256,
    alpha: options.Alpha = 1,
    rivals: Rivals = "flash,cudnn,efficient,mha",
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    config: options.Config = "{}",
    budget_s: Annotated[float, typer.Option(help="Seconds one call may take.", min=0)] = 30,
    seed: options.Seed = 0,
    out: options.Out = "",
) -> None:
    """The longest text whose whole layer, forward, fits a memory cap."""
    dev, kind = options.pick_device(device), options.choose("--dtype", dtype, options.DTYPES)
    first, end = options.parse_lengths(start, "--start")[0], options.parse_lengths(last, "--last")[-1]
    names = [OURS, *options.choose_some("--rivals", rivals, LABELS)]
    fields = {"d_model": d_model, "n_heads": heads, "head_dim": head_dim, "shortlist": shortlist, "backend": backend,
              "flux_alpha": alpha, "route_heads": False, **options.parse_config(config)}  # fmt: skip
    if first > end:
        raise typer.BadParameter(f"{start!r}: must be at most --last {last}", param_hint="--start")
    with options.fields_of("--config"):
        configs = [AttentionConfig(**{**fields, "n_kv_heads": kv}) for kv in options.parse_lengths(groups, "--groups")]
    options.hold_to(cap, dev)
    report = {"benchmark": "longest", **environment(dev), "dtype": dtype, "seed": seed, "cap_gb": cap,
              "config": fields, "rows": []}  # fmt: skip
    for cfg, who in tqdm(list(product(configs, names)), desc="searches", disable=None):

        def run(tokens: int, cfg=cfg, who=who) -> dict:
            return attempt(BenchCase("layer", "forward", tokens, who, cfg, dev, kind, seed), repeats=0, budget_s=0)

        tried = search(run, first, end, halvings, budget_s)
        fits = [row["tokens"] for row in tried if row["status"] == "ok"]
        report["rows"].append({**tried[0], "longest": max(fits, default=None), "tried": tried})
        if out:
            write_json(out, report)
    typer.echo(longest_table(report))


def longest_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
    rows = []
    for row in report["rows"]:
        best = next((one for one in row["tried"] if one["tokens"] == row["longest"]), {})
        missed = sorted((one["tokens"], one["status"]) for one in row["tried"] if one["status"] != "ok")
        rows.append([
            row["groups"],
            case_name(row),
            f"{row['longest']:,}" if best else "–",
            f"{best['peak_mb']:,.0f}" if "peak_mb" in best else "–",
            f"{best['first_ms'] / 1e3:.2f}" if best else "–",
            f"{missed[0][0]:,}: {missed[0][1]}" if missed else "none: the longest asked for",
        ])  # fmt: skip
    cap = f"{report['cap_gb']:g} GB at most" if report["cap_gb"] else "no cap"
    line = f"{report['device']}, torch {report['torch']}, {report['dtype']}, {cap}; whole layer, forward, run once"
    return f"{line}\n\n{markdown(['KV groups', 'who', 'longest', 'peak MB', 'first call, s', 'next'], rows)}"
