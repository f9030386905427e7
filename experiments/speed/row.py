"""One row of a benchmark: a case run, timed, weighed and set beside its floor, or the reason why it was not."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from ...attention import AttentionConfig
from ...common.options import DTYPES
from .floor import floor
from .measure import captured, clock, in_own_process, peak_in_process, release, repeat_ms, summary
from .rivals import Case, Entry, NotOffered, enter

TIMINGS = ("eager", "graph", "both")
OOM = "out of memory"
OOM_SIGNS = (OOM, "can't allocate", "cublas_status_alloc_failed")


def attempt(
    case: Case, repeats: int, budget_s: float, timing: str = "eager", rates: dict | None = None, memory: bool = False
) -> dict:
    """A row: the case's key, a `status` ('ok', or why not) and, where it ran, what was measured.

    Never raises an `Exception`: one that cannot run does not end a table. repeats: timed calls, after a first one that
    is kept apart; 0 runs a case once and no more. rates: from `measure_rates`, for floors. memory: on a CPU, weigh the
    case in a process of its own (on CUDA it always is weighed, in this one).
    """
    row = {**case.key(), "status": "ok"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA says at length why a kernel does not take a case; the row says it
            row |= _measured(case, repeats, budget_s, timing, rates)
            if memory and case.device.type == "cpu":
                row["extra_mb"] = _own_process_mb(case, row["way"])
    except Exception as problem:
        row["status"] = reason(problem)
    with suppress(RuntimeError):  # a device that a kernel broke refuses even this, and the row must not be lost
        release(case.device)
    return row


def reason(problem: Exception) -> str:
    """Why a case did not run, in one line."""
    said = " ".join(str(problem).split()) or type(problem).__name__
    lower = said.lower()
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or any(sign in lower for sign in OOM_SIGNS):
        return OOM
    if isinstance(problem, NotOffered):
        return f"not offered: {said}"
    if isinstance(problem, ImportError):
        return f"not installed: {said[:200]}"
    if "no available kernel" in lower or "no viable backend" in lower:
        return "no kernel for this case on this device"
    return f"failed: {type(problem).__name__}: {said[:200]}"


def _measured(case: Case, repeats: int, budget_s: float, timing: str, rates: dict | None) -> dict:
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
            left = budget_s - once / 1e3
            more = repeat_ms(run, device, repeats - 1, left) if repeats > 1 and left > 0 else []
            row["eager"] = summary([once, *more])
    taken = {name: row[name]["median_ms"] for name in ("eager", "graph") if "median_ms" in row.get(name, {})}
    row["timing"] = min(taken, key=taken.get)
    row["ms"] = taken[row["timing"]]
    row["tokens_per_s"] = case.tokens / row["ms"] * 1e3
    return row | _facts(case, entry, row["ms"], rates)


def _facts(case: Case, entry: Entry, ms: float, rates: dict | None) -> dict:
    """What the case read, and its floor where that is known."""
    try:
        facts = entry.facts()
    except Exception as problem:  # the statistics of a call that itself fits may not fit
        return {"facts": reason(problem)}
    if rates and facts["keys_per_query"] is not None:
        facts["floor"] = floor(case, facts, rates)
        facts["floor_ratio"] = ms / facts["floor"]["ms"]
    return facts


def runnable(case: Case, entry: Entry, forward: Callable[[], Tensor]) -> Callable[[], object]:
    """The call to time: `forward`, and in a training pass its backward to inputs and weights."""
    if case.passes == "forward":
        return forward
    upstream = entry.leaves[0].detach().clone()
    return lambda: torch.autograd.grad(forward(), entry.leaves, upstream, allow_unused=True)


def quickest(case: Case, entry: Entry, repeats: int):
    """The faster of an entry's ways: name, call, ms of the first call (warm-up and compilation), of the second, and
    its peak in bytes. A way that cannot run is passed over; the last one's error is raised if none can. Without
    `repeats` the first way that runs, run once."""
    tried, problem = [], None
    for name, forward in entry.ways.items():
        try:
            run = runnable(case, entry, forward)
            first = clock(run, case.device)
            if not repeats:
                return name, run, first[0], *first
            tried.append((name, run, first[0], *clock(run, case.device)))
        except Exception as error:
            problem = error.with_traceback(None)  # its frames would hold the memory that ran out
            release(case.device)
    if not tried:
        raise problem
    return min(tried, key=lambda one: one[3])


def _graph(run, device: torch.device, repeats: int, budget_s: float, once: float) -> dict:
    if once > budget_s * 1e3 / 4:
        return {"failed": f"not tried: in a call of {once / 1e3:.1f} s launches do not count"}
    try:
        with captured(run, device) as replay:
            clock(replay, device)
            return summary(repeat_ms(replay, device, repeats, budget_s))
    except Exception as problem:
        return {"failed": reason(problem)}


def _own_process_mb(case: Case, way: str) -> float:
    """Peak resident memory, MB, that one call of the case adds to a CPU process which already holds its inputs."""
    fields = {name: getattr(case, name) for name in ("scope", "passes", "tokens", "who", "seed")}
    asked = {**fields, "cfg": case.cfg.to_dict(), "dtype": str(case.dtype).removeprefix("torch."), "way": way}
    return float(in_own_process("proteus_playground.experiments.speed.row", [json.dumps(asked)]))


def _probe(cfg: dict, dtype: str, way: str, tokens: int, **fields) -> float:
    kind = {"cfg": AttentionConfig(**cfg), "dtype": DTYPES[dtype], "device": torch.device("cpu"), **fields}

    def added(length: int) -> float:
        case = Case(tokens=length, **kind)
        entry = enter(case)
        run = runnable(case, entry, entry.ways[way])
        with torch.set_grad_enabled(case.passes == "training"), entry.context():
            return peak_in_process(run)

    added(min(tokens, 1024))  # what a process needs to run anything is not the case's
    return added(tokens)


if __name__ == "__main__":
    print(_probe(**json.loads(sys.argv[1])))
