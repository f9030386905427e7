"""Low-rank adapters: added by `peft`, switched off for a teacher, and one file of adapters and gates.

`peft` is imported when it is needed, because it belongs to the extra `hf`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..attention import Gates
from ..common.tensors import read_tensors, write_tensors

GATES = ("prototypes", "confidence", "usage", "salience_quantiles")  # the other buffers of `Gates` are as when made
WRITER = "proteus heal"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Ranks(Protocol):
    """What an adapter is like: `healing.plan.Adapter` says what each number means."""

    rank: int
    mlp_rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


def add_adapters(model: nn.Module, adapter: Ranks, seed: int) -> nn.Module:
    """The model with adapters that change nothing yet; its weights are frozen. Raises `ValueError`, `ImportError`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as err:
        raise ImportError(f"adapters need the hf extra: pip install 'proteus-playground[hf]' ({err})") from err
    linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    targets = [name for name in adapter.targets if name in linear]
    if not targets:
        raise ValueError(f"adapter.targets={list(adapter.targets)}: must name linear layers, of {sorted(linear)}")
    others = [name for name in targets if name not in ATTENTION]
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=targets, bias="none",
        rank_pattern=dict.fromkeys(others, adapter.mlp_rank),
        alpha_pattern=dict.fromkeys(others, adapter.alpha * adapter.mlp_rank / adapter.rank),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def continue_adapters(model: nn.Module, folder: str | Path) -> nn.Module:
    """The model with the adapters that `peft` wrote into a folder, to be trained further. Raises `ImportError`."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=True)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """No adapters meanwhile: the base exactly. A model without adapters stays as it is."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    before = {name: weight.requires_grad for name, weight in adapter_tensors(model).items()}
    with model.disable_adapter():
        yield
    for name, weight in adapter_tensors(model).items():
        weight.requires_grad_(before[name])  # peft switches all of them on


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' weights by name; the same names in every process and version."""
    return {name: weight for name, weight in model.named_parameters() if ".lora_" in name}


def write_adapter(path: str | Path, model: nn.Module, gates: Mapping[int, Gates], about: dict) -> Path:
    """Write adapters and each layer's gates in half precision: a few megabytes. Raises `OSError`."""
    tensors = {name: weight.detach().half().cpu() for name, weight in adapter_tensors(model).items()}
    for layer, its in gates.items():
        tensors |= {f"gates.{layer}.{name}": getattr(its, name).half().cpu() for name in GATES}
    return write_tensors(path, tensors, about)


def read_adapter(path: str | Path, model: nn.Module, gates: Mapping[int, Gates]) -> dict:
    """Load what `write_adapter` wrote into a model with adapters of the same sizes, and its gates. Returns `about`.

    Raises `FileNotFoundError`, or `ValueError` for a file of another model.
    """
    tensors, about = read_tensors(path, WRITER)
    try:
        _take(tensors, model, gates)
    except (KeyError, RuntimeError, ValueError) as err:
        raise ValueError(f"path={str(path)!r} holds adapters of another model or of other ranks ({err})") from err
    return about


@torch.no_grad()
def _take(tensors: Mapping[str, torch.Tensor], model: nn.Module, gates: Mapping[int, Gates]) -> None:
    own = adapter_tensors(model)
    there = {name: value for name, value in tensors.items() if not name.startswith("gates.")}
    if {n: tuple(w.shape) for n, w in own.items()} != {n: tuple(w.shape) for n, w in there.items()}:
        raise ValueError("names or sizes differ")
    for name, weight in own.items():
        weight.copy_(there[name])
    for layer, its in gates.items():
        load_gates(its, {name: tensors[f"gates.{layer}.{name}"] for name in GATES})


def apply_adapter(
    tensors: Mapping[str, torch.Tensor], about: dict, model: nn.Module, gates: Mapping[int, Gates]
) -> nn.Module:
    """The plain model with adapters added to its weights; `gates` are set as well.

    tensors, about: of a file of `write_adapter` whose `about` holds the plan. Raises `ValueError`, `ImportError`.
    """
    wrapped = add_adapters(model, SimpleNamespace(**about["plan"]["adapter"]), 0)
    _take(tensors, wrapped, gates)
    return wrapped.merge_and_unload().eval().requires_grad_(False)


def load_gates(gates: Gates, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set a layer's buffers `GATES`. Prototypes are brought back to length 1, which half precision does not keep."""
    for name in GATES:
        getattr(gates, name).copy_(tensors[name])
    gates.prototypes.copy_(F.normalize(gates.prototypes, dim=-1))
