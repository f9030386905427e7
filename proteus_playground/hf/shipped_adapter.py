"""The healed model that comes with the package: an adapter and gates over a known model.

`proteus bench healing` made it; docs/own-model.md says how, and what it costs and brings.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from torch import nn

from ..attention.calibration import new_gates
from ..common.tensors import read_tensors
from .adapters import WRITER, apply_adapter
from .patch import layer_shape


def with_shipped_adapter(model: nn.Module, file: str) -> nn.Module:
    """The plain model with the adapter of `file` added to its weights. Its gates lie in `model.proteus_gates`.

    file: of the folder `data`. Raises `ImportError` without `peft`.
    """
    with as_file(files(__package__) / "data" / file) as path:
        tensors, about = read_tensors(path, WRITER)
        counts = {int(name.split(".")[1]): x.shape[1] for name, x in tensors.items() if name.endswith(".prototypes")}
        gates = {layer: new_gates(layer_shape(model, layer), count).eval() for layer, count in counts.items()}
        healed = apply_adapter(tensors, about, model, gates)
    healed.proteus_gates = {(layer, counts[layer]): its for layer, its in gates.items()}
    return healed
