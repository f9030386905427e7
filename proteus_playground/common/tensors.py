"""Named tensors and a few plain values in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import safe_open, save_file
from torch import Tensor

from .files import whole


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], about: dict) -> Path:
    """Write `tensors` and `about`, which JSON must be able to hold, all of it or nothing. Raises `OSError`."""
    with whole(path) as part:
        try:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"about": json.dumps(about)}
            )
        except SafetensorError as err:  # what the system said is only in its words, such as "(os error 28)"
            code = re.search(r"os error (\d+)", str(err))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from err
    return Path(path)


def read_tensors(path: str | os.PathLike, writer: str) -> tuple[dict[str, Tensor], dict]:
    """Read what `write_tensors` wrote: tensors on the CPU, and `about`. writer: named in errors as the file's author.

    Raises `FileNotFoundError`, or `ValueError` for a file of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path={str(path)!r}: no such file")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 -- no mapping
    except Exception as problem:
        raise ValueError(f"path={str(path)!r}: not a file that {writer} wrote ({problem})") from problem


def fingerprint(model) -> str:
    """Hex digest of a sample of every weight. It identifies the model that stored prototypes belong to."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:32]
