"""Timing, memory and reporting that every benchmark shares.

Nothing here times an unsynchronised device, and every report carries what it was measured on.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch


def timed_ms(run: Callable[[], object], device: torch.device, repeats: int, budget_s: float = 30.0) -> list[float]:
    """Wall-clock milliseconds of each of up to `repeats` calls, after one warm-up; at least one call is timed.

    Stops early once `budget_s` seconds are spent, so that a slow rival does not hold the table up. A first call
    longer than the budget stands as the measurement: at that length warming up is lost in the time itself.
    """
    times: list[float] = []
    for _ in range(repeats + 1):
        sync(device)
        start = time.perf_counter()
        run()
        sync(device)
        times.append((time.perf_counter() - start) * 1e3)
        if sum(times) > budget_s * 1e3:
            break
    return times[1:] or times


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


def environment(device: torch.device) -> dict:
    """Device, versions and threads: the part of a result that says where it came from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_extra_mb(module: str, args: list[str]) -> float:
    """Peak resident memory, MB, that `python -m module args` reports having added: its last printed line.

    A process of its own, because the high-water mark of this one cannot be set back.
    """
    done = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, env=dict(os.environ))
    if done.returncode:
        raise RuntimeError(f"memory probe failed: {done.stderr.strip()[-500:]}")
    return float(done.stdout.strip().splitlines()[-1])


def write_json(path: Path, payload: dict) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as part:
        json.dump(payload, part, indent=1)
        part.write("\n")
    os.chmod(part.name, 0o644)
    os.replace(part.name, path)


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])
