"""Token ids and embeddings from array files: `.npy` and `.safetensors`. Pickled objects are refused.

Axes: `T` rows of a document, `D` width of an embedding.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import numpy as np

from .stores import FileRows, Seen

SAMPLES, BYTES_PER_SAMPLE = 16, 1 << 16  # parts of a file that are hashed
FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4"}  # names in safetensors -> types that numpy can read


def file_recipe(path: Path, seen: Seen) -> dict[str, object]:
    """What identifies a file: path, size, time, and a hash of `SAMPLES` parts spread over it."""
    sha = sha256()
    with open(path, "rb") as file:
        for step in range(SAMPLES):
            file.seek(max(0, seen.size - BYTES_PER_SAMPLE) * step // (SAMPLES - 1))
            sha.update(file.read(BYTES_PER_SAMPLE))
    return {"source": str(path), "size": seen.size, "mtime_ns": seen.mtime_ns, "sample": sha.hexdigest()}


def npy_rows(path: Path) -> FileRows:
    """`(T,)` whole numbers or `(T, D)` floats of 2, 4 or 8 bytes; ValueError names anything else."""
    allowed = "allowed is (T,) whole numbers or (T, D) floats, T and D >= 1, row after row"
    seen = Seen.now(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as err:  # Python objects, an incomplete file, or no .npy file at all
        raise ValueError(f"{path} cannot be read as .npy ({err}): {allowed}") from err
    if not isinstance(array, np.memmap):
        raise ValueError(f"{path} is an archive of arrays: {allowed}")
    ids = array.ndim == 1 and array.dtype.kind in "iu"
    floats = array.ndim == 2 and array.dtype.kind == "f" and array.dtype.itemsize <= 8
    if not (ids or floats) or not array.size or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else ", column after column"
        raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}{order}: {allowed}")
    return FileRows(path, array.offset, array.dtype, array.shape, seen)


def safetensors_rows(path: Path) -> FileRows:
    """The file's only tensor, `(T, D)` in F16, BF16 or F32; ValueError names anything else."""
    from safetensors import SafetensorError, safe_open

    allowed = f"allowed is one tensor (T, D), T and D >= 1, of {', '.join(FLOATS)}"
    seen = Seen.now(path)
    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 -- no mapping
            found = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in tensors.items()}
    except SafetensorError as err:
        raise ValueError(f"{path} cannot be read as safetensors ({err}): {allowed}") from err
    dtype, shape = next(iter(found.values()), ("nothing", ()))
    if len(found) != 1 or dtype not in FLOATS or len(shape) != 2 or 0 in shape:
        raise ValueError(f"{path} holds {found}: {allowed}")
    with open(path, "rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")  # the file is: length of the header, header, tensor
    return FileRows(path, offset, np.dtype(FLOATS[dtype]), shape, seen, bfloat16=dtype == "BF16")
