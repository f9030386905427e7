"""The checks of `proteus doctor`: what was found, and what it means."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator

from ..common.versions import WIDGET_STACK, Finding, installed, judge

NEEDED_DISK = 2e9  # bytes: a pulled model, its download and its calibration
NEEDED_MEMORY = 3e9  # bytes: the model in float32 and one text's recorded layers


def examine() -> Iterator[Finding]:
    """Yield every finding, the cheapest first."""
    ok = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield Finding("python", found, "" if ok else "Python 3.11 or newer is needed.", ok)
    yield from _hardware()
    yield _memory()
    yield _disk()
    for package in WIDGET_STACK:
        yield judge(package, installed(package))
    yield _models()


def _hardware() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as err:
        yield Finding("torch", "not installed", f"Nothing runs without it: pip install torch ({err})", False)
        return
    from proteus_playground.attention import choose_backend
    from proteus_playground.common.machine import fast_dtype

    threads = torch.get_num_threads()
    yield Finding("torch", f"{torch.__version__}, {threads} CPU thread{'s' if threads > 1 else ''}")
    if torch.cuda.is_available():
        device, memory = "cuda", torch.cuda.get_device_properties(0).total_memory
        found = f"{torch.cuda.get_device_name(0)}, {memory / 2**30:.1f} GiB"
        bfloat16 = fast_dtype(torch.device("cuda")) is torch.bfloat16
        without = "No bfloat16 in hardware (as on a T4): float16 is used."
        yield Finding("device", found, "Has bfloat16 in hardware." if bfloat16 else without)
    elif torch.backends.mps.is_available():
        device = "mps"
        yield Finding("device", "Apple GPU")
    else:
        device = "cpu"
        yield Finding("device", "no GPU", "The playground runs on the CPU: live up to a few thousand tokens.")
    backend, reason = choose_backend(device)
    yield Finding("backend", backend, reason)


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Finding("memory", "unknown on this system")
    short = "Little for a real model; the random layer works." if total < NEEDED_MEMORY else ""
    return Finding("memory", f"{total / 2**30:.1f} GiB", short)


def _disk() -> Finding:
    from proteus_playground.common.files import cache_dir

    folder = cache_dir()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    short = "Fetching a model takes 2 GB; PROTEUS_CACHE can name another folder." if free < NEEDED_DISK else ""
    return Finding("disk", f"{free / 2**30:.1f} GiB free for {folder}", short)


def _models() -> Finding:
    from proteus_playground.hf.models import DEFAULT, list_models

    names = [info.name for info in list_models()]
    if names:
        return Finding("models", ", ".join(names))
    return Finding("models", "none", f"Only shelf-mini is here. For another, run: proteus models pull {DEFAULT}")
