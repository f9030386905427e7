"""One row of a benchmark: a case's times, memory and floor, or the reason why it could not run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from .floor import floor
from .measure import added_peak_mb, captured, clock, in_own_process, release, repeat_ms, summary
from .rivals import BenchCase, NotOffered, ReadyCase, enter

TIMINGS = ("eager", "graph", "both")
OOM = "out of memory"
OOM_SIGNS = (OOM, "can't allocate", "cublas_status_alloc_failed")


def attempt(
    case: BenchCase, repeats: int, budget_s: float, timing: str = "eager", rates: dict | None = None,
    memory: bool = False,
) -> dict:  # fmt: skip
    """A row: the case's key, a `status` ("ok", or the reason why it did not run) and the measurements.

    Never raises an `Exception`, so one case that cannot run does not end a table. repeats: timed calls after the first
    call, which is reported separately; 0 runs a case exactly once. rates: from `measure_rates`, for floors. memory: on
    a CPU, measure memory in a process of its own (on CUDA it is always measured, in this process).
    """
    row = {**case.key(), "status": "ok"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of SDPA, about kernels that do not take a case; `status` says so
            row |= _measured(case, repeats, budget_s, timing, rates)
            if memory and case.device.type == "cpu":
                row["extra_mb"] = in_own_process(added_mb, case, row["way"])
    except Exception as problem:
        row["status"] = reason(problem)
    with suppress(RuntimeError):  # a device that a kernel broke refuses this too; keep the row
        release(case.device)
    return row


def reason(problem: Exception) -> str:
    """Why a case did not run, in one line."""
    message = " ".join(str(problem).split()) or type(problem).__name__
    lower = message.lower()
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or any(sign in lower for sign in OOM_SIGNS):
        return OOM
    if isinstance(problem, NotOffered):
        return f"not offered: {message}"
    if isinstance(problem, ImportError):
        return f"not installed: {message[:200]}"
    if "no available kernel" in lower or "no viable backend" in lower:
        return "no kernel for this case on this device"
    return f"failed: {type(problem).__name__}: {message[:200]}"


def _measured(case: BenchCase, repeats: int, budget_s: float, timing: str, rates: dict | None) -> dict:
    entry = enter(case)
    device = case.device
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with torch.set_grad_enabled(case.passes == "training"), entry.context():
        way, run, first, once, peak = quickest(case, entry, repeats)
        row = {"way": way, "first_ms": first}
        if peak is not None:
            row |= {"peak_mb": peak / 1e6, "extra_mb": (peak - held) / 1e6}
        if not repeats:
            return row
        if timing != "eager":
            row["graph"] = _graph(run, device, repeats, budget_s, once)
        if timing != "graph" or "failed" in row["graph"]:
            remaining_s = budget_s - once / 1e3
            more = repeat_ms(run, device, repeats - 1, remaining_s) if repeats > 1 and remaining_s > 0 else []
            row["eager"] = summary([once, *more])
    medians = {name: row[name]["median_ms"] for name in ("eager", "graph") if "median_ms" in row.get(name, {})}
    row["timing"] = min(medians, key=medians.get)
    row["ms"] = medians[row["timing"]]
    row["tokens_per_s"] = case.tokens / row["ms"] * 1e3
    return row | _facts(case, entry, row["ms"], rates)


def _facts(case: BenchCase, entry: ReadyCase, ms: float, rates: dict | None) -> dict:
    """Keys read, heads awake and tokens kept, and the case's floor where it is known."""
    try:
        facts = entry.facts()
    except Exception as problem:  # a call may fit in memory where its statistics do not
        return {"facts": reason(problem)}
    if rates and facts["keys_per_query"] is not None:
        facts["floor"] = floor(case, facts, rates)
        facts["floor_ratio"] = ms / facts["floor"]["ms"]
    return facts


def runnable(case: BenchCase, entry: ReadyCase, forward: Callable[[], Tensor]) -> Callable[[], object]:
    """The call to time: `forward`; in a training pass also its backward pass to inputs and weights."""
    if case.passes == "forward":
        return forward
    upstream = entry.leaves[0].detach().clone()
    return lambda: torch.autograd.grad(forward(), entry.leaves, upstream, allow_unused=True)


def quickest(case: BenchCase, entry: ReadyCase, repeats: int) -> tuple[str, Callable, float, float, int | None]:
    """The fastest of the ways to run a case: (name, call, first ms, second ms, peak bytes of the second call).

    The first call includes warm-up and compilation. A way that cannot run is passed over; if none can, the last one's
    error is raised. With `repeats` 0, the first way that runs is called only once.
    """
    tried, problem = [], None
    for name, forward in entry.ways.items():
        try:
            run = runnable(case, entry, forward)
            first = clock(run, case.device)
            if not repeats:
                return name, run, first[0], *first
            tried.append((name, run, first[0], *clock(run, case.device)))
        except Exception as error:
            problem = error.with_traceback(None)  # its stack frames would hold on to memory
            release(case.device)
    if not tried:
        raise problem
    return min(tried, key=lambda one: one[3])


def _graph(run, device: torch.device, repeats: int, budget_s: float, once: float) -> dict:
    if once > budget_s * 1e3 / 4:
        return {"failed": f"not tried: in a call of {once / 1e3:.1f} s the time of launches does not matter"}
    try:
        with captured(run, device) as replay:
            clock(replay, device)
            return summary(repeat_ms(replay, device, repeats, budget_s))
    except Exception as problem:
        return {"failed": reason(problem)}


def added_mb(case: BenchCase, way: str) -> float:
    """Peak resident memory, MB, that one call of the case adds to a CPU process that already holds its inputs."""

    def added(tokens: int) -> float:
        same = replace(case, tokens=tokens)
        entry = enter(same)
        run = runnable(same, entry, entry.ways[way])
        with torch.set_grad_enabled(same.passes == "training"), entry.context():
            return added_peak_mb(run)

    added(min(case.tokens, 1024))  # warm-up: memory that a process needs to run anything is not the case's
    return added(case.tokens)
