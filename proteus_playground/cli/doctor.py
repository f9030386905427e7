"""What `proteus doctor` looks at: each finding, and what it means in plain words."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

NEEDED_DISK = 2e9  # bytes: a pulled model, its download and its calibration
NEEDED_MEMORY = 3e9  # bytes: the model in float32 and one text's cached layers
WIDGET_STACK = {  # name: (first version that works, first that does not, what it is for)
    "ipywidgets": ("7.7", "9", "the sliders"),
    "plotly": ("6.1", None, "the pictures (5 and 6.0 fail beside other widgets)"),
    "anywidget": ("0.9.13", None, "what plotly's figures stand on"),
    "jupyterlab": ("4.2", None, "proteus play; Colab does without"),
    "voila": ("0.5.7", None, "proteus play --app"),
    "transformers": ("5.15", "6", "real models"),
}
OPTIONAL = {"jupyterlab": "lab", "voila": "lab", "transformers": "hf"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `ok` is False only where the playground cannot work like this."""

    topic: str
    found: str
    meaning: str = ""
    ok: bool = True


def examine() -> Iterator[Finding]:
    """Every finding, cheapest first."""
    ok = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} on {platform.platform(terse=True)}"
    yield Finding("python", found, "" if ok else "Python 3.11 or newer is needed.", ok)
    yield from _hardware()
    yield _memory()
    yield _disk()
    for package in WIDGET_STACK:
        yield judge(package, _installed(package))
    yield _models()


def judge(package: str, found: str | None) -> Finding:
    """The verdict on one version of a package of the widget stack; None means that it is not installed."""
    low, high, purpose = WIDGET_STACK[package]
    wanted = f"{package}>={low}" + (f",<{high}" if high else "")
    extra = OPTIONAL.get(package)
    if found is None:
        remedy = f"pip install 'proteus-playground[{extra}]'" if extra else f"pip install '{wanted}'"
        return Finding(package, "not installed", f"For {purpose}: {remedy}", ok=bool(extra))
    fits = _numbers(low) <= _numbers(found) and (high is None or _numbers(found) < _numbers(high))
    remedy = "." if fits else f": pip install '{wanted}'"
    return Finding(package, found, f"For {purpose}{remedy}", fits)


def _hardware() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as err:
        yield Finding("torch", "not installed", f"Nothing runs without it: pip install torch ({err})", False)
        return
    from proteus_playground.attention import choose_backend

    threads = torch.get_num_threads()
    yield Finding("torch", f"{torch.__version__}, {threads} CPU thread{'s' if threads > 1 else ''}")
    if torch.cuda.is_available():
        device, memory = "cuda", torch.cuda.get_device_properties(0).total_memory
        found = f"{torch.cuda.get_device_name(0)}, {memory / 2**30:.1f} GiB"
        yield Finding("device", found, _gpu_meaning(torch))
    elif torch.backends.mps.is_available():
        device = "mps"
        yield Finding("device", "Apple GPU")
    else:
        device = "cpu"
        yield Finding("device", "no GPU", "The playground runs on the CPU: live up to a few thousand tokens.")
    backend, reason = choose_backend(device)
    yield Finding("backend", backend, reason)


def _gpu_meaning(torch) -> str:
    if torch.version.hip or torch.cuda.is_bf16_supported(including_emulation=False):
        return "Has bfloat16 in hardware."
    return "No bfloat16 in hardware (as on a T4): float16 is used."


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return Finding("memory", "unknown on this system")
    short = "Little for a real model; the random layer still works." if total < NEEDED_MEMORY else ""
    return Finding("memory", f"{total / 2**30:.1f} GiB", short)


def _disk() -> Finding:
    from proteus_playground.common.files import cache_dir

    folder = cache_dir()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    short = "Fetching a model takes 2 GB; PROTEUS_CACHE names another place." if free < NEEDED_DISK else ""
    return Finding("disk", f"{free / 2**30:.1f} GiB free for {folder}", short)


def _models() -> Finding:
    from proteus_playground.hf.models import list_models

    names = [info.name for info in list_models()]
    if names:
        return Finding("models", ", ".join(names))
    return Finding("models", "none", "The layer shown is random until you run: proteus models pull smollm2")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """'7.7.1rc2' -> (7, 7, 1): enough to compare releases."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
