"""How many weights a model's files hold, in which type, and whether a device has room for them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8"}
SPARE = 1.1  # a load needs a little more than the weights themselves


@dataclass(frozen=True)
class Weights:
    """parameters: how many; dtype: the name of the type that most have."""

    parameters: int
    dtype: str

    def __str__(self) -> str:
        return f"{in_words(self.parameters)} parameters in {self.dtype}"


def weights_of(folder: Path) -> Weights | None:
    """What the safetensors files of a folder hold, by their headers; None where there are none or they are damaged."""
    found: Counter[str] = Counter()
    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with open(file, "rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    found[tensor["dtype"]] += prod(tensor["shape"])
        except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
            return None
    if not found:
        return None
    most = found.most_common(1)[0][0]
    return Weights(found.total(), NAMES.get(most, most))


def check_memory(name: str, folder: Path, device, dtype) -> None:
    """Raise `MemoryError` where the weights in `folder` do not fit on `device` in this torch.dtype."""
    weights = weights_of(folder)
    if weights is None:
        return
    free, place = _free(device)
    needed = weights.parameters * dtype.itemsize * SPARE
    if needed > free:
        half = "" if dtype.itemsize < 4 else f" dtype bfloat16 needs {size(needed / 2)};"
        raise MemoryError(
            f"model={name!r}: {weights} need {size(needed)} as {str(dtype).removeprefix('torch.')}, and {place} has "
            f"{size(free)} free:{half} otherwise take a smaller model, or a machine with more memory"
        )


def _free(device) -> tuple[float, str]:
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0], "the GPU"
    import psutil

    return psutil.virtual_memory().available, "this machine"


def check_disk(needed: float, folder: Path, what: str) -> None:
    """Raise `OSError` where the disk of `folder` has less than `needed` bytes free."""
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"{what} needs {size(needed)} of disk, and {str(existing)!r} has {size(free)} free: make room there, or "
            "set the environment variable PROTEUS_CACHE to a folder on another disk"
        )


def size(count: float) -> str:
    """Bytes in words: "269 MB", "14.2 GB"."""
    return (
        f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count:.0f} bytes"
    )


def in_words(count: int) -> str:
    """A number of parameters in words: "135M", "7.2B"."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M" if count >= 1e6 else f"{count:,}"
