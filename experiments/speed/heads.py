"""`proteus bench heads`: time and memory of a layer with 2,048 heads beside one with 64, few of them awake.

A whole `ProteusAttention` layer is timed, forward, routing and projections included. The same number of heads is awake
per token in every row, so the difference is the cost of the sleeping heads.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from ...attention import AttentionConfig, ProteusAttention
from ...common import options
from ...common.machine import environment, markdown
from .measure import added_peak_mb, clock, in_own_process, measured_on, publish, repeat_ms, summary

GROUPS = 8
BUDGET_S = 30.0  # of timed calls of a row


def build(heads: int, awake: int, d_model: int, device: torch.device, seed: int) -> ProteusAttention:
    """A layer of `heads` heads in 8 KV groups, `awake` of them awake per token."""
    torch.manual_seed(seed)
    per_group = heads // GROUPS
    cfg = AttentionConfig(
        d_model=d_model, n_heads=heads, n_kv_heads=GROUPS, head_dim=64, heads_awake_max=awake // GROUPS,
        gates_per_group=max(32, per_group), flux_alpha=1.0,
    )  # fmt: skip
    return ProteusAttention(cfg).to(device).eval()


def measure_heads(heads: int, awake: int, tokens: int, d_model: int, device: torch.device, repeats: int, seed: int):
    """One row of the table, as a dictionary."""
    attn = build(heads, awake, d_model, device, seed)
    x = torch.randn(1, tokens, d_model, generator=torch.Generator().manual_seed(seed)).to(device)
    attn.calibrate(x)
    with torch.inference_mode():
        stats = attn(x, return_stats=True)[1]
        clock(lambda: attn(x), device)  # warm-up
        times = summary(repeat_ms(lambda: attn(x), device, repeats, BUDGET_S))
    row = {
        "heads": heads, "awake": stats.heads_awake, "used": int(stats.awake.any(dim=(0, 1)).sum()),
        "parameters": sum(p.numel() for p in attn.parameters()), **times,
    }  # fmt: skip
    if device.type == "cpu":
        row["extra_mb"] = in_own_process(heads_added_mb, heads, awake, tokens, d_model)
    return row


def heads_added_mb(heads: int, awake: int, tokens: int, d_model: int) -> float:
    """Peak resident memory, MB, that one call adds to this process after a short one."""
    attn = build(heads, awake, d_model, torch.device("cpu"), 0)
    x = torch.randn(1, tokens, d_model)
    with torch.inference_mode():
        attn(x[:, :256])
        return added_peak_mb(lambda: attn(x))


def heads_command(
    heads: Annotated[str, typer.Option(help="Comma-separated head counts, multiples of 8.")] = "64,2048",
    awake: Annotated[int, typer.Option(help="Heads awake per token, a multiple of 8.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens.", min=1, callback=options.no_huge_number)] = 1024,
    d_model: options.Width = 512,
    device: options.Device = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 7,
    seed: options.Seed = 0,
    out: options.Out = "",
) -> None:
    """Many heads, few awake: time and memory of 2,048 heads beside 64."""
    dev, rows = options.pick_device(device), []
    for count in options.parse_lengths(heads, "--heads"):
        for option, value in (("--heads", count), ("--awake", awake)):
            if value % GROUPS or value > count:
                problem = f"{value}: must be a multiple of {GROUPS} and at most the heads there are"
                raise typer.BadParameter(problem, param_hint=option)
        rows.append(measure_heads(count, awake, tokens, d_model, dev, repeats, seed))
    about = {"dtype": "float32", "seed": seed, "tokens": tokens, "d_model": d_model}
    report = {"benchmark": "heads", **environment(dev), **about, "rows": rows}
    publish(report, heads_table(report), out)


def heads_table(report: dict) -> str:
    """The report as Markdown, with a line that says where it was measured."""
    rows = [
        [r["heads"], f"{r['awake']:.0f}", r["used"], f"{r['parameters'] / 1e6:.1f}", f"{r['median_ms']:.0f}",
         f"{r['extra_mb']:,.0f}" if "extra_mb" in r else "–"]
        for r in report["rows"]
    ]  # fmt: skip
    head = ["heads", "awake per token", "heads used by some token", "parameters, million", "layer, ms",
            "peak extra memory, MB"]  # fmt: skip
    about = f"T = {report['tokens']}, d_model = {report['d_model']}, {GROUPS} KV groups of 64"
    return f"{measured_on(report)}; {about}\n\n{markdown(head, rows)}"
