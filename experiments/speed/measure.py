"""Timing, memory and reporting that every benchmark shares.

Nothing here times an unsynchronised device, and every report carries what it was measured on.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def clock(run: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Milliseconds of one call, and on CUDA its peak of allocated bytes, inputs included (elsewhere None).

    The device is idle before the call and done after it, so that launching counts. On CUDA the time is between two
    events, and the level-2 cache holds nothing of the inputs.
    """
    if device.type != "cuda":
        sync(device)
        start = time.perf_counter()
        run()
        sync(device)
        return (time.perf_counter() - start) * 1e3, None
    torch.zeros(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)
    sync(device)
    torch.cuda.reset_peak_memory_stats(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    sync(device)
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated(device)


def repeat_ms(run: Callable[[], object], device: torch.device, repeats: int, budget_s: float) -> list[float]:
    """Milliseconds of up to `repeats` calls, at least one, fewer once `budget_s` seconds are spent."""
    times: list[float] = []
    while not times or (len(times) < repeats and sum(times) < budget_s * 1e3):
        times.append(clock(run, device)[0])
    return times


def timed_ms(run: Callable[[], object], device: torch.device, repeats: int, budget_s: float = 30.0) -> list[float]:
    """`repeat_ms` after one call that warms up and is not counted."""
    clock(run, device)
    return repeat_ms(run, device, repeats, budget_s)


@contextmanager
def captured(run: Callable[[], object], device: torch.device) -> Iterator[Callable[[], None]]:
    """A CUDA graph of `run`, as the call that replays it; `run` has been called before.

    Raises `RuntimeError` where there are no graphs, or `run` waits for the device, which a graph cannot.
    """
    if device.type != "cuda":
        raise RuntimeError(f"{device.type} has no CUDA graphs")
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    torch.cuda.set_sync_debug_mode("error")  # says so before a capture is begun: a broken one harms what follows
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
        sync(device)
        graph.reset()


def release(device: torch.device) -> None:
    """Give back what a finished or failed run left cached."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sync(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def summary(times: list[float]) -> dict:
    """Median, quartiles and count of a list of milliseconds."""
    low, mid, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median_ms": mid, "q1_ms": low, "q3_ms": high, "runs": len(times)}


def in_own_process(module: str, args: list[str]) -> str:
    """The last line that `python -m module args` prints: the high-water mark of this process cannot be set back."""
    done = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(f"{module} failed in a process of its own: {done.stderr.strip()[-500:]}")
    return done.stdout.strip().splitlines()[-1]


def peak_mb() -> float:
    """The most resident memory that this process has held, MB."""
    return _memory("VmHWM") / 1e6


def peak_in_process(run) -> float:
    """Peak resident memory that `run()` adds to what this process holds now, MB. Exact on Linux; elsewhere what it adds
    to the highest there ever was, which can only be less."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back to what is held now
    before = _memory("VmRSS")
    run()
    return (_memory("VmHWM") - before) / 1e6


def _memory(name: str) -> int:
    """Bytes this process holds (VmRSS) or has held at most (VmHWM)."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) * 1024
    except OSError:
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
