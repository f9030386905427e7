"""Device, versions and threads for reports; the precision a device computes in; Markdown tables."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch


def environment(device: torch.device) -> dict:
    """Device, versions, threads and date, as a report records them beside its figures."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name, "device_type": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def fast_dtype(device: torch.device) -> torch.dtype:
    """The precision of matrix products: on CUDA bfloat16 if the hardware has it, else float16; elsewhere float32."""
    if device.type != "cuda":
        return torch.float32
    in_hardware = torch.version.hip or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if in_hardware else torch.float16


def markdown(header: list[str], rows: list[list]) -> str:
    """A Markdown table with one line per row."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])
