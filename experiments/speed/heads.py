"""`proteus bench heads`: many heads, few awake. What 2,048 heads cost beside 64, in one run.

Timed is a whole `ProteusAttention` layer, forward, routing and projections included. The same number of heads is
awake per token in both, so the difference is what the sleepers cost.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...attention import AttentionConfig, ProteusAttention
from ...common.files import write_json
from ...common.machine import environment, markdown
from ...common.options import parse_lengths, pick_device
from .measure import in_own_process, peak_in_process, summary, timed_ms

GROUPS = 8


def build(heads: int, awake: int, d_model: int, device, seed: int) -> ProteusAttention:
    """A layer of `heads` heads of which `awake` are awake per token, spread over 8 KV groups."""
    torch.manual_seed(seed)
    per_group = heads // GROUPS
    cfg = AttentionConfig(
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=GROUPS,
        head_dim=64,
        heads_awake_max=awake // GROUPS,
        gates_per_group=max(32, per_group),
        flux_alpha=1.0,
    )
    return ProteusAttention(cfg).to(device).eval()


def command(
    heads: Annotated[str, typer.Option(help="Comma-separated head counts, multiples of 8.")] = "64,2048",
    awake: Annotated[int, typer.Option(help="Heads awake per token, a multiple of 8.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens.")] = 1024,
    d_model: Annotated[int, typer.Option(help="Model width.")] = 512,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed runs of each.")] = 7,
    seed: Annotated[int, typer.Option(help="Seed of weights and input.")] = 0,
    out: Annotated[str, typer.Option(help="JSON file to write.")] = "",
) -> None:
    """Many heads, few awake: time and memory of 2,048 heads beside 64."""
    dev = pick_device(device)
    rows = []
    for count in parse_lengths(heads, "--heads"):
        for option, value in (("--heads", count), ("--awake", awake)):
            if value % GROUPS or value > count:
                raise typer.BadParameter(
                    f"{value}: must be a multiple of {GROUPS} and at most the heads there are", param_hint=option
                )
        attn = build(count, awake, d_model, dev, seed)
        x = torch.randn(1, tokens, d_model, generator=torch.Generator().manual_seed(seed)).to(dev)
        attn.calibrate(x)
        with torch.inference_mode():
            stats = attn(x, return_stats=True)[1]
            row = {
                "heads": count,
                "awake": stats.heads_awake,
                "used": int(stats.awake.any(dim=(0, 1)).sum()),
                "parameters": sum(p.numel() for p in attn.parameters()),
            }
            row |= summary(timed_ms(lambda attn=attn, x=x: attn(x), dev, repeats))
        if dev.type == "cpu":
            asked = [str(v) for v in (count, awake, tokens, d_model)]
            row["extra_mb"] = float(in_own_process("proteus_playground.experiments.speed.heads", asked))
        rows.append(row)
    report = {
        "benchmark": "heads",
        **environment(dev),
        "dtype": "float32",
        "seed": seed,
        "tokens": tokens,
        "d_model": d_model,
        "rows": rows,
    }
    typer.echo(
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, float32, seed {seed}; "
        f"T = {tokens}, d_model = {d_model}, 8 KV groups of 64\n"
    )
    typer.echo(
        markdown(
            [
                "heads",
                "awake per token",
                "heads used by some token",
                "parameters, million",
                "layer, ms",
                "peak extra memory, MB",
            ],
            [
                [
                    r["heads"],
                    f"{r['awake']:.0f}",
                    r["used"],
                    f"{r['parameters'] / 1e6:.1f}",
                    f"{r['median_ms']:.0f}",
                    f"{r['extra_mb']:,.0f}" if "extra_mb" in r else "–",
                ]
                for r in rows
            ],
        )
    )
    if out:
        write_json(Path(out), report)


def _memory_probe(heads: int, awake: int, tokens: int, d_model: int) -> float:
    attn = build(heads, awake, d_model, "cpu", 0)
    x = torch.randn(1, tokens, d_model)
    with torch.inference_mode():
        attn(x[:, :256])
        return peak_in_process(lambda: attn(x))


if __name__ == "__main__":
    print(_memory_probe(*map(int, sys.argv[1:])))
