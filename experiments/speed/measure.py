"""Timing, memory and reports of all benchmarks. No device is timed without waiting for it before and after."""

from __future__ import annotations

import gc
import json
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import typer

from ...common.files import write_json
from ...common.timing import wait


def clock(run: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Milliseconds of one call, and on CUDA its peak of allocated bytes, inputs included (elsewhere None).

    The device is idle before the call and has finished after it, so the time of launching counts. On CUDA the time is
    measured between two events, and the level-2 cache is overwritten first.
    """
    if device.type != "cuda":
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        return (time.perf_counter() - start) * 1e3, None
    torch.zeros(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    wait(device)
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated(device)


def repeat_ms(run: Callable[[], object], device: torch.device, repeats: int, budget_s: float) -> list[float]:
    """Milliseconds of each of up to `repeats` calls: at least one, and none after `budget_s` seconds are spent."""
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < budget_s * 1e3):
        times.append(clock(run, device)[0])
    return times


@contextmanager
def captured(run: Callable[[], object], device: torch.device) -> Iterator[Callable[[], None]]:
    """Yields a function that replays a CUDA graph of `run`, which must have been called before.

    Raises `RuntimeError` on a device without graphs, and where `run` waits for the device, which a graph cannot do.
    """
    if device.type != "cuda":
        raise RuntimeError(f"{device.type} has no CUDA graphs")
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_sync_debug_mode("error")  # fails before the capture: a broken capture harms later calls
    try:
        with torch.cuda.stream(side):
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    try:
        yield graph.replay
    finally:
        wait(device)
        graph.reset()


def release(device: torch.device) -> None:
    """Free the memory that a finished or failed run left cached."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summary(times: list[float]) -> dict:
    """Median, quartiles and number of a list of milliseconds."""
    low, mid, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median_ms": mid, "q1_ms": low, "q3_ms": high, "runs": len(times)}


def in_own_process(function: Callable, *args: object) -> object:
    """`function(*args)` in a new process: the high-water mark of this process's memory may be an earlier call's.

    Function and arguments are pickled; the result must be what JSON can hold. Raises `RuntimeError` where it fails.
    """
    call = "import json, pickle, sys; f, args = pickle.load(sys.stdin.buffer); print(json.dumps(f(*args)))"
    done = subprocess.run([sys.executable, "-c", call], input=pickle.dumps((function, args)), capture_output=True)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{function.__name__} failed in a process of its own: {message[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_mb() -> float:
    """The most resident memory that this process has held, MB."""
    return _memory("VmHWM") / 1e6


def added_peak_mb(run: Callable[[], object]) -> float:
    """Peak resident memory that `run()` adds to what this process holds now, MB.

    Exact on Linux. Elsewhere it is what `run` adds to the highest value so far, so it may be too small.
    """
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is held now
    before = _memory("VmRSS")
    run()
    return (_memory("VmHWM") - before) / 1e6


def publish(report: dict, text: str, out: str) -> None:
    """Print a benchmark's table and, where `out` names a file, save its report there as JSON."""
    typer.echo(text)
    if out:
        write_json(Path(out), report)


def measured_on(report: dict) -> str:
    """Machine, precision and seed of a report, the beginning of the line above its table."""
    return (
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['dtype']}, "
        f"seed {report['seed']}"
    )


def _memory(name: str) -> int:
    """Bytes this process holds (VmRSS) or has held at most (VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) * 1024
    except OSError:
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
