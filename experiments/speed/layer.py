"""`proteus bench layer`: one attention call against fused dense attention, by length, both in one run.

Timed from un-rotated queries, keys and values to heads' outputs: rotation on both sides, luring and probing on ours.
Dense is `scaled_dot_product_attention`, at the fastest of the backends that run on the device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ...attention import AttentionConfig, plan_budget
from ...common import options
from ...common.files import write_json
from ...common.machine import environment, markdown
from .rivals import KERNELS, OURS, Case
from .row import attempt

THETA = 100_000.0  # SmolLM2's
BUDGET_S = 60.0  # of repeats, each


def measure_length(ours: Case, rivals: list[str], repeats: int, memory: bool) -> dict:
    """One row of the table: our case, and the fastest of `rivals` on the same inputs."""
    mine = attempt(ours, repeats, BUDGET_S, memory=memory)
    row = {
        "tokens": ours.tokens,
        "status": mine["status"],
        "dense_reads": (ours.tokens + 1) / 2,
        "budget": plan_budget(ours.cfg, ours.tokens).to_dict(),
    }
    names = {"backend": "backend", "reads": "keys_per_query", "ours": "eager", "ours_extra_mb": "extra_mb"}
    row |= {name: mine[source] for name, source in names.items() if source in mine}
    tried = [attempt(replace(ours, who=who), repeats, BUDGET_S) for who in rivals]
    ran = [one for one in tried if one["status"] == "ok"]
    if ran:
        best = min(ran, key=lambda one: one["ms"])
        kernel = ", ".join(filter(None, (best["who"], best["way"] if best["who"] == "fused" else "")))
        row |= {"dense_kernel": kernel, "dense": best["eager"]}
        if "ours" in row:
            row["speedup"] = best["ms"] / mine["ms"]
    elif tried:
        row["dense_kernel"] = tried[-1]["status"]
    return row


def command(
    lengths: options.Lengths = "1k,4k,16k,64k",
    heads: options.Heads = 9,
    groups: Annotated[int, typer.Option(help="KV groups; divides heads.")] = 3,
    head_dim: options.HeadDim = 64,
    shortlist: options.Shortlist = 128,
    alpha: options.Alpha = 1,
    dna: Annotated[float, typer.Option(help="DNA fraction.")] = 0.5,
    gates: Annotated[int, typer.Option(help="Gates per KV group.")] = 32,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    repeats: Annotated[int, typer.Option(help="Timed runs of each, fewer when slow.")] = 9,
    seed: options.Seed = 0,
    dense: Annotated[bool, typer.Option(help="Time dense attention too.")] = True,
    rival: Annotated[str, typer.Option(help="On CUDA, hold dense to one kernel: flash, cudnn or efficient.")] = "",
    memory: Annotated[bool, typer.Option(help="Also measure peak extra memory in a process of its own (CPU).")] = True,
    cap: options.Cap = 0,
    out: options.Out = "",
) -> None:
    """One attention call against fused dense attention, by length, both in one run."""
    dev, kind = options.pick_device(device), options.choose("--dtype", dtype, options.DTYPES)
    rivals = ([*KERNELS] if dev.type == "cuda" else ["fused"]) if dense else []
    if rival and rivals:
        options.choose("--rival", rival, KERNELS)
        rivals = [rival]
    options.hold_to(cap, dev)
    cfg = AttentionConfig(
        d_model=heads * head_dim,
        n_heads=heads,
        n_kv_heads=groups,
        head_dim=head_dim,
        shortlist=shortlist,
        dna_fraction=dna,
        gates_per_group=gates,
        flux_alpha=alpha,
        rope_theta=THETA,
        route_heads=False,
    )
    rows = []
    for tokens in tqdm(options.parse_lengths(lengths), desc="lengths", disable=None):
        rows.append(
            measure_length(Case("attention", "forward", tokens, OURS, cfg, dev, kind, seed), rivals, repeats, memory)
        )
    report = {
        "benchmark": "layer",
        **environment(dev),
        "dtype": dtype,
        "seed": seed,
        "cap_gb": cap,
        "config": cfg.to_dict(),
        "rows": rows,
    }
    typer.echo(table(report))
    if out:
        write_json(Path(out), report)


def table(report: dict) -> str:
    """The report as Markdown, with the line that says where it was measured."""
    cfg = report["config"]
    rows = [
        [
            f"{r['tokens']:,}",
            f"{r['ours']['median_ms']:.1f}" if "ours" in r else r["status"],
            f"{r['dense']['median_ms']:.1f} ({r['dense_kernel']})" if "dense" in r else r.get("dense_kernel", "–"),
            f"{r['speedup']:.2f}x" if "speedup" in r else "–",
            f"{r['reads']:.0f} of {r['dense_reads']:,.0f}" if "reads" in r else "–",
            f"{r['ours_extra_mb']:,.0f}" if "ours_extra_mb" in r else "–",
        ]
        for r in report["rows"]
    ]
    head = ["tokens", "Proteus, ms", "dense SDPA, ms", "speed-up", "reads per query", "peak extra memory, MB"]
    return (
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}, seed "
        f"{report['seed']}; {cfg['n_heads']} heads over {cfg['n_kv_heads']} KV groups of {cfg['head_dim']}, "
        f"L = {cfg['shortlist']}, alpha = {cfg['flux_alpha']:g}\n\n{markdown(head, rows)}"
    )
