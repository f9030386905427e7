"""`proteus bench layer`: a small sweep, one attention call beside fused dense attention by length, as one table.

Both are timed from un-rotated queries, keys and values to heads' outputs: rotation is included, and in our case luring
and probing. Dense is `scaled_dot_product_attention`, in the fastest of the backends that run on the device.
"""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer

from ...attention import AttentionConfig, plan_budget
from ...common import options
from ...common.machine import environment, markdown
from .measure import measured_on, publish
from .rivals import KERNELS, OURS
from .sweep import Sweep, plan_cases

THETA = 100_000.0  # SmolLM2's
BUDGET_S = 60.0  # for the repeats of one row


def layer_command(
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
    fields = {"d_model": heads * head_dim, "n_heads": heads, "head_dim": head_dim, "shortlist": shortlist,
              "dna_fraction": dna, "gates_per_group": gates, "rope_theta": THETA, "route_heads": False}  # fmt: skip
    axes = {"tokens": options.parse_lengths(lengths), "scope": ["attention"], "passes": ["forward"],
            "groups": [groups], "who": [OURS, *rivals], "alpha": [alpha]}  # fmt: skip
    cases = plan_cases(axes, fields, device=dev, dtype=kind, seed=seed)
    sweep = Sweep({"rows": []}, None)
    sweep.run(cases, limit_s=0, budget_s=BUDGET_S, weighed=[OURS] if memory else [], repeats=repeats)
    cfg, same_length = cases[0].cfg, groupby(sweep.report["rows"], key=lambda row: row["tokens"])
    about = {"dtype": dtype, "seed": seed, "cap_gb": cap, "config": cfg.to_dict()}
    rows = [length_row(cfg, *rows) for _, rows in same_length]
    report = {"benchmark": "layer", **environment(dev), **about, "rows": rows}
    publish(report, layer_table(report), out)


def length_row(cfg: AttentionConfig, ours: dict, *dense: dict) -> dict:
    """One row of the table, from the sweep's rows of one length: ours, and the fastest of the dense ones."""
    tokens = ours["tokens"]
    row = {"tokens": tokens, "status": ours["status"], "dense_reads": (tokens + 1) / 2,
           "budget": plan_budget(cfg, tokens).to_dict()}  # fmt: skip
    names = {"backend": "backend", "reads": "keys_per_query", "ours": "eager", "ours_extra_mb": "extra_mb"}
    row |= {name: ours[source] for name, source in names.items() if source in ours}
    ran = [one for one in dense if one["status"] == "ok"]
    if ran:
        best = min(ran, key=lambda one: one["ms"])
        kernel = f"fused, {best['way']}" if best["who"] == "fused" and best["way"] else best["who"]
        row |= {"dense_kernel": kernel, "dense": best["eager"]}
        if "ours" in row:
            row["speedup"] = best["ms"] / ours["ms"]
    elif dense:
        row["dense_kernel"] = dense[-1]["status"]
    return row


def layer_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
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
        f"{measured_on(report)}; {cfg['n_heads']} heads over {cfg['n_kv_heads']} KV groups of {cfg['head_dim']}, "
        f"L = {cfg['shortlist']}, alpha = {cfg['flux_alpha']:g}\n\n{markdown(head, rows)}"
    )
