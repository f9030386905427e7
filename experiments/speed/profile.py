"""`proteus bench profile`: the time of one call by kernel (on a CPU: by operation)."""

from __future__ import annotations

import pkgutil
import re
from importlib import import_module
from typing import Annotated

import torch
import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from ...attention import AttentionConfig
from ...attention.backends import fused
from ...common import options
from ...common.machine import environment, markdown
from .measure import publish, repeat_ms, summary, wait
from .rivals import LABELS, OURS, BenchCase, NotOffered, enter
from .row import quickest, reason
from .table import PASSES, SCOPES, case_name

BUDGET_S = 30.0  # of timed calls
MATRIX = r"gemm(?!v)|nvjet|cutlass|xmma|wgmma|fmha|flash|sdpa|flex_attention|(?:^|::)(?:add|b|baddb)?mm$"
NOT_MATRIX = r"simt|sgemm|ffma|splitkreduce|combine|dot_do_o|convert_dq"  # fp32 cores, and helpers of the above
RULE = (f"a kernel runs matrix units if its name matches /{MATRIX}/ and not /{NOT_MATRIX}/, or if it is a Triton "
        "kernel of ours whose source, or that of a function it calls, has a dot")  # fmt: skip


def our_matrix_kernels() -> set[str]:
    """Triton functions of our backends that call `dot`, directly or not; empty where Triton is not installed."""
    sources: dict[str, str] = {}
    for found in pkgutil.iter_modules(fused.__path__, f"{fused.__name__}."):
        try:
            module = import_module(found.name)
        except ImportError:
            continue
        sources |= {n: f.src for n, f in vars(module).items() if isinstance(getattr(f, "src", None), str)}
    reached, size = {"dot"}, 0
    while size != len(reached):
        size = len(reached)
        calls = re.compile(rf"\b(?:{'|'.join(reached)})\(")
        reached |= {n for n, source in sources.items() if calls.search(re.sub(r"def \w+\(", "", source))}
    return reached - {"dot"}


def runs_matrix_units(kernel: str, ours: set[str]) -> bool:
    """Whether a kernel runs matrix units by the rule in `RULE`, which looks at names only."""
    lower = kernel.lower()
    return kernel in ours or bool(re.search(MATRIX, lower) and not re.search(NOT_MATRIX, lower))


def short(kernel: str) -> str:
    """A C++ kernel's name without return type, namespaces and template arguments, with its functor in brackets."""
    plain = re.sub(r"^void ", "", kernel)
    functor = re.search(r"(\w*Functor\w*|\w+_kernel_(?:cuda|impl))", plain)
    base = re.split(r"[<(]", plain)[0].split("::")[-1].strip() if not kernel.startswith("aten::") else kernel
    name = f"{base} [{functor[1]}]" if functor and functor[1] != base else base
    return name if len(name) <= 60 else f"{name[:57]}..."


def by_kernel(run, device: torch.device, calls: int) -> list[dict]:
    """Kernels of one call, longest first: name, launches and milliseconds, each the mean of `calls` calls."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    wait(device)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            run()
        wait(device)
    ours, rows = our_matrix_kernels(), []
    for event in profiler.key_averages():
        note = getattr(event, "is_user_annotation", False) or event.key.startswith("ProfilerStep")
        if note or (event.device_type == DeviceType.CUDA) != on_gpu:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        rows.append({"kernel": event.key, "short": short(event.key), "calls": event.count / calls,
                     "ms": microseconds / calls / 1e3, "matrix": runs_matrix_units(event.key, ours)})  # fmt: skip
    if not any(row["ms"] for row in rows):
        raise OSError(f"the profiler recorded no kernels on {device}: it may lack the permission")
    return sorted(rows, key=lambda row: -row["ms"])


def profile_command(
    tokens: Annotated[str, typer.Option(help="Tokens; 64k means 65,536.")] = "64k",
    who: Annotated[str, typer.Option(help=f"{OURS}, or one of {', '.join(LABELS)}.")] = OURS,
    scope: Annotated[str, typer.Option(help="layer or attention.")] = "layer",
    passes: Annotated[str, typer.Option(help="forward or training.")] = "forward",
    d_model: options.Width = 512,
    heads: options.Heads = 8,
    groups: Annotated[int, typer.Option(help="KV groups; divides heads.")] = 2,
    head_dim: options.HeadDim = 64,
    shortlist: options.Shortlist = 256,
    alpha: options.Alpha = 1,
    dtype: options.Dtype = "float32",
    device: options.Device = "cpu",
    backend: options.Backend = "auto",
    config: options.Config = "{}",
    calls: Annotated[int, typer.Option(help="Calls that the profile is the mean of.", min=1)] = 5,
    top: Annotated[int, typer.Option(help="Kernels in the table; the JSON has all.", min=1)] = 20,
    seed: options.Seed = 0,
    out: options.Out = "",
) -> None:
    """Where one call's time goes, by kernel, and the share of kernels that run matrix units."""
    dev, kind = options.pick_device(device), options.choose("--dtype", dtype, options.DTYPES)
    options.choose("--who", who, [OURS, *LABELS])
    fields = {"d_model": d_model, "n_heads": heads, "n_kv_heads": groups, "head_dim": head_dim, "flux_alpha": alpha,
              "shortlist": shortlist, "backend": backend, "route_heads": False,
              **options.parse_config(config)}  # fmt: skip
    options.choose("--scope", scope, [*SCOPES])
    options.choose("--passes", passes, [*PASSES])
    length = options.parse_lengths(tokens, "--tokens")[0]
    with options.fields_of("--config"):
        case = BenchCase(scope, passes, length, who, AttentionConfig(**fields), dev, kind, seed)
    try:
        entry = enter(case)
        with torch.set_grad_enabled(passes == "training"), entry.context():
            way, run, *_ = quickest(case, entry, repeats=1)
            times = summary(repeat_ms(run, dev, calls, BUDGET_S))
            rows = by_kernel(run, dev, calls)
    except (NotOffered, RuntimeError) as problem:
        raise OSError(f"{case_name(case.key())}: {reason(problem)}") from problem
    busy = sum(row["ms"] for row in rows)
    matrix = sum(row["ms"] for row in rows if row["matrix"])
    report = {"benchmark": "profile", **environment(dev), **case.key(), "way": way, "backend": entry.facts()["backend"],
              "dtype": dtype, "seed": seed, "config": fields, "call": times, "kernels_ms": busy,
              "matrix_share": matrix / busy, "rule": RULE, "rows": rows}  # fmt: skip
    publish(report, profile_table(report, top), out)


def profile_table(report: dict, top: int) -> str:
    """The report as Markdown: the `top` longest kernels, the rest in one line."""
    busy, rows = report["kernels_ms"], report["rows"]
    shown, rest = rows[:top], rows[top:]
    if rest:
        sums = {name: sum(row[name] for row in rest) for name in ("calls", "ms")}
        shown = [*shown, {"short": f"{len(rest)} others", "matrix": False, **sums}]
    lines = [[row["short"], f"{row['calls']:g}", f"{row['ms']:.3f}", f"{row['ms'] / busy:.1%}",
              "yes" if row["matrix"] else ""] for row in shown]  # fmt: skip
    what = "kernels" if report["device_type"] == "cuda" else "operations"
    head = (
        f"{report['device']}, torch {report['torch']}, {report['dtype']}; {case_name(report)} ({report['backend']}), "
        f"{report['scope']}, {report['passes']}, {report['tokens']:,} tokens, {report['config']['n_heads']} heads over "
        f"{report['groups']} KV groups: {report['call']['median_ms']:.3f} ms a call, {busy:.3f} ms of it in {what}, "
        f"{report['matrix_share']:.1%} of those on matrix units"
    )
    return f"{head}\n\n{markdown([what[:-1], 'calls', 'ms', 'share', 'matrix units'], lines)}"
