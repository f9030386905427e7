"""Gates that come with the package, so that a known model needs no calibration. `proteus bench prototypes` made them.

A model is recognised by its sizes and by the weights of its last norm, which every source of it has in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Gates
from ..attention.calibration import new_gates
from ..attention.settings import LayerShape
from ..common.tensors import read_tensors, write_tensors

NAME = "gates_*.safetensors"
KNOWN_BY = "norm"  # the module of a decoder, and the tensor in a file
STORED = ("prototypes", "confidence", "usage", "salience_quantiles")  # the other buffers of `Gates` are as when made
TOLERANCE = 0.01  # of the norm's weights, relative; training the model further changes them by more


def shipped_gates(decoder: nn.Module, shape: LayerShape) -> dict[tuple[int, int], Gates]:
    """(layer, gates per group) -> gates on the CPU, for every layer of a known model; empty for any other model."""
    norm = getattr(getattr(decoder, KNOWN_BY, None), "weight", None)
    if norm is None:
        return {}
    for tensors, about in _stored():
        if tensors[KNOWN_BY].shape == norm.shape and about["layers"] == decoder.config.num_hidden_layers:
            ours = tensors[KNOWN_BY].float()
            if torch.allclose(norm.detach().float().cpu(), ours, rtol=TOLERANCE, atol=TOLERANCE * ours.abs().mean()):
                return {(layer, about["gates"]): _gates(tensors, layer, shape) for layer in about["of"]}
    return {}


def read_gates(path: Path, shapes: Mapping[int, LayerShape]) -> dict[int, Gates]:
    """Gates on the CPU that `write_gates` wrote, of the layers of `shapes`. Raises `ValueError` for another file."""
    tensors, _ = read_tensors(path, "proteus convert")
    try:
        return {layer: _gates(tensors, layer, shape) for layer, shape in shapes.items()}
    except (KeyError, RuntimeError) as err:
        raise ValueError(f"path={str(path)!r}: not the gates of this model's layers ({err})") from err


def write_gates(path: Path, decoder: nn.Module, gates: Mapping[int, Gates], recipe: dict) -> Path:
    """Write the gates of a model's layers, prototypes in half precision. Raises `OSError`."""
    norm = getattr(getattr(decoder, KNOWN_BY, None), "weight", None)
    tensors = {} if norm is None else {KNOWN_BY: norm.detach().half().cpu()}
    for layer, its in gates.items():
        tensors |= {f"{layer}.{name}": getattr(its, name).half().cpu() for name in STORED}
    first = next(iter(gates.values()))
    about = {"layers": decoder.config.num_hidden_layers, "gates": first.gates_per_group, "of": sorted(gates)}
    return write_tensors(path, tensors, about | {"recipe": recipe})


@lru_cache(maxsize=1)
def _stored() -> list[tuple[dict[str, Tensor], dict]]:
    """What the package holds: tensors, and what their file says about them."""
    found = []
    for place in (files(__package__) / "data").iterdir():
        if fnmatch(place.name, NAME):
            with as_file(place) as path:
                found.append(read_tensors(path, "proteus bench prototypes"))
    return found


def _gates(tensors: Mapping[str, Tensor], layer: int, shape: LayerShape) -> Gates:
    gates = new_gates(shape, tensors[f"{layer}.prototypes"].shape[1])
    for name in STORED:
        getattr(gates, name).copy_(tensors[f"{layer}.{name}"])
    gates.prototypes.copy_(F.normalize(gates.prototypes, dim=-1))
    return gates.eval()
