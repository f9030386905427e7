"""`proteus bench layer`: one attention call against fused dense attention, by length, both in one run.

Timed from un-rotated queries, keys and values to heads' outputs: rotation on both sides, luring and probing on ours.
Dense is `scaled_dot_product_attention`, at the fastest of the backends that run on the device.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from ..attention import AttentionConfig, Gates, plan_budget, proteus_attention, rope_frequencies, rotate
from .measure import environment, markdown, peak_extra_mb, summary, timed_ms, write_json

RIVALS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
THETA = 100_000.0  # SmolLM2's


def make_inputs(tokens: int, heads: int, groups: int, head_dim: int, gates: int, device, dtype, seed: int):
    """Queries and keys drawn around shared topics, so that gates have something to find, and fitted `Gates`."""
    gen = torch.Generator().manual_seed(seed)
    topics = torch.randn(64, head_dim, generator=gen)

    def draw(n):
        topic = topics[torch.randint(64, (1, tokens, n), generator=gen)]
        return (topic + torch.randn(1, tokens, n, head_dim, generator=gen)).to(device, dtype)

    q, k = draw(heads), draw(groups)
    v = torch.randn(1, tokens, groups, head_dim, generator=gen).to(device, dtype)
    return q, k, v, Gates(groups, gates, head_dim).to(device).fit(k[:, :4096], seed=seed)


def dense_calls(q, k, v, freq) -> dict:
    """Every way to run dense causal attention here: name -> call."""
    at = torch.arange(q.shape[1], device=q.device)
    r = q.shape[2] // k.shape[2]

    def call(repeat_kv: bool):
        qr, kr = (rotate(x, at, freq).transpose(1, 2) for x in (q, k))
        vr = v.transpose(1, 2)
        if repeat_kv:
            kr, vr = (x.repeat_interleave(r, dim=1) for x in (kr, vr))
        return scaled_dot_product_attention(qr, kr, vr, is_causal=True, enable_gqa=not repeat_kv)

    def forced(backend):
        with sdpa_kernel(backend):
            return call(repeat_kv=True)

    if q.device.type == "cuda":
        return {name: lambda b=b: forced(b) for name, b in RIVALS.items()}
    return {"fused, grouped": lambda: call(False), "fused, repeated": lambda: call(True)}


def best_dense(calls: dict, device, repeats: int, budget_s: float) -> tuple[str, list[float]]:
    """The fastest dense call and its times; one that cannot run on this device is passed over."""
    found = {}
    for name, call in calls.items():
        try:
            found[name] = timed_ms(call, device, repeats, budget_s)
        except RuntimeError as refusal:
            if "out of memory" not in str(refusal) and "kernel" not in str(refusal):
                raise
    if not found:
        return "out of memory", []
    name = min(found, key=lambda n: summary(found[n])["median_ms"])
    return name, found[name]


def measure_length(
    tokens: int,
    cfg: AttentionConfig,
    device,
    dtype,
    seed: int,
    repeats: int,
    budget_s: float,
    dense: bool,
    rival: str | None,
) -> dict:
    """One row of the table."""
    q, k, v, gates = make_inputs(
        tokens, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.gates_per_group, device, dtype, seed
    )
    freq = rope_frequencies(cfg.head_dim, cfg.rope_theta, device)
    budget = plan_budget(cfg, tokens)
    with torch.inference_mode():
        result = proteus_attention(q, k, v, gates, budget, inv_freq=freq, backend=cfg.backend)
        row = {
            "tokens": tokens,
            "backend": result.backend,
            "reads": float(result.reads.float().mean()),
            "dense_reads": (tokens + 1) / 2,
            "budget": budget.to_dict(),
        }
        del result
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            base = torch.cuda.memory_allocated(device)
        ours = timed_ms(
            lambda: proteus_attention(q, k, v, gates, budget, inv_freq=freq, backend=cfg.backend),
            device,
            repeats,
            budget_s,
        )
        row |= {"ours": summary(ours)}
        if device.type == "cuda":
            row["ours_extra_mb"] = (torch.cuda.max_memory_allocated(device) - base) / 1e6
        if dense:
            calls = dense_calls(q, k, v, freq)
            name, times = best_dense({rival: calls[rival]} if rival else calls, device, repeats, budget_s)
            row["dense_kernel"] = name
            if times:
                row |= {"dense": summary(times), "speedup": summary(times)["median_ms"] / row["ours"]["median_ms"]}
    return row


def command(
    lengths: Annotated[str, typer.Option(help="Comma-separated token counts; 4k means 4,096.")] = "1k,4k,16k,64k",
    heads: Annotated[int, typer.Option(help="Query heads.")] = 9,
    groups: Annotated[int, typer.Option(help="KV groups; divides heads.")] = 3,
    head_dim: Annotated[int, typer.Option(help="Features per head.")] = 64,
    shortlist: Annotated[int, typer.Option(help="L, reads per query.")] = 128,
    alpha: Annotated[float, typer.Option(help="Flux alpha.")] = 1.0,
    dna: Annotated[float, typer.Option(help="DNA fraction.")] = 0.5,
    gates: Annotated[int, typer.Option(help="Gates per KV group.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(help="Timed runs of each, fewer when slow.")] = 9,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    dense: Annotated[bool, typer.Option(help="Time dense attention too.")] = True,
    rival: Annotated[str, typer.Option(help="On CUDA, hold dense to one kernel: flash, cudnn or efficient.")] = "",
    memory: Annotated[bool, typer.Option(help="Also measure peak extra memory in a process of its own (CPU).")] = True,
    cap: Annotated[float, typer.Option(help="On CUDA, hold this process to so many GB; 0 for all there is.")] = 0,
    out: Annotated[str, typer.Option(help="JSON file to write.")] = "",
) -> None:
    """One attention call against fused dense attention, by length, both in one run."""
    dev, kind = pick_device(device), _choice("dtype", dtype, DTYPES)
    if rival:
        _choice("rival", rival, RIVALS)
    if cap and dev.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(cap * 1e9 / torch.cuda.get_device_properties(dev).total_memory)
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
    for tokens in tqdm(parse_lengths(lengths), desc="lengths", disable=None):
        row = measure_length(tokens, cfg, dev, kind, seed, repeats, 60.0, dense, rival or None)
        if memory and dev.type == "cpu":
            args = [str(tokens), json.dumps(cfg.to_dict())]
            row["ours_extra_mb"] = peak_extra_mb("proteus_playground.bench.layer", args)
        rows.append(row)
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
            f"{r['ours']['median_ms']:.1f}",
            f"{r['dense']['median_ms']:.1f} ({r['dense_kernel']})" if "dense" in r else r.get("dense_kernel", "–"),
            f"{r['speedup']:.2f}x" if "speedup" in r else "–",
            f"{r['reads']:.0f} of {r['dense_reads']:,.0f}",
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


def parse_lengths(text: str) -> list[int]:
    """'1k,4096,1m' -> [1024, 4096, 1048576]."""
    units = {"k": 1024, "m": 1024**2}
    lengths = []
    for part in text.lower().split(","):
        digits, unit = (part[:-1], units[part[-1]]) if part[-1:] in units else (part, 1)
        if not digits.isdigit() or int(digits) < 1:
            raise typer.BadParameter(
                f"{part!r}: must be whole numbers >= 1 separated by commas, such as 1k,4096,1m", param_hint="--lengths"
            )
        lengths.append(int(digits) * unit)
    return lengths


def pick_device(name: str) -> torch.device:
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(name):
        allowed = ", ".join(n for n, ok in usable.items() if ok)
        raise typer.BadParameter(f"{name!r}: must be one of {allowed} on this machine", param_hint="--device")
    return torch.device(name)


def _choice(option: str, value: str, allowed: dict):
    if value not in allowed:
        raise typer.BadParameter(f"{value!r}: must be one of {', '.join(allowed)}", param_hint=f"--{option}")
    return allowed[value]


def _memory_probe(tokens: int, cfg: AttentionConfig) -> float:
    """Peak resident memory that one call adds to a process which already holds its inputs, MB."""
    shape = (cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.gates_per_group)
    q, k, v, fitted = make_inputs(tokens, *shape, "cpu", torch.float32, 0)
    freq = rope_frequencies(cfg.head_dim, cfg.rope_theta)
    with torch.inference_mode():
        short = min(tokens, 1024)
        proteus_attention(q[:, :short], k[:, :short], v[:, :short], fitted, plan_budget(cfg, short), inv_freq=freq)
        return peak_in_process(lambda: proteus_attention(q, k, v, fitted, plan_budget(cfg, tokens), inv_freq=freq))


def peak_in_process(run) -> float:
    """Peak resident memory that `run()` adds to what this process holds now, MB."""
    before = _resident_bytes()
    run()
    return (_peak_bytes() - before) / 1e6


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident_bytes() -> int:
    """What this process holds now. Off Linux: its high-water mark, which can only make the difference smaller."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return _peak_bytes()


if __name__ == "__main__":
    print(_memory_probe(int(sys.argv[1]), AttentionConfig(**json.loads(sys.argv[2]))))
