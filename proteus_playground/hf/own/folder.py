"""A converted folder: the slider of a model beside a reference to its weights, or beside a copy of them.

`config.json` holds the `proteus_attention` stanza, `gates.safetensors` the prototypes of each layer, `adapter/` what
healing changed in a few matrices, `healed/` all weights where healing changed them all, and `runs/` what is planned and
what was done. Only `proteus convert` and `proteus heal` write here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...attention import Gates
from ...attention.adapter import ProteusLayer
from ..cache import ProteusCache
from ..fetch import progress_bars, sha256_of
from ..models import load_folder, place_of
from ..patch import check_layers, layer_shape, patched, surveyed
from ..shipped_gates import read_gates
from ..source import ModelSource
from .stanza import ALONE, KEY, Stanza, is_own, read_config, read_stanza

__all__ = ["Folder", "SliderModel", "is_own", "open_folder", "read_folder"]

CONFIG, GATES, ADAPTER, HEALED, RUNS = "config.json", "gates.safetensors", "adapter", "healed", "runs"
BASELINE, PLAN = "baseline.json", "plan.json"  # measured before healing; in each run


@dataclass(frozen=True)
class Folder:
    """What a converted folder holds. adapter and healed: None where healing has not written them."""

    path: Path
    stanza: Stanza
    adapter: Path | None  # a folder that `peft` wrote
    healed: Path | None  # a folder with all weights
    runs: tuple[Path, ...]  # oldest first

    @property
    def gates_file(self) -> Path:
        return self.path / GATES

    def base_path(self) -> Path:
        """Where the base's weights lie. Raises `ValueError` where they are not on this machine any more."""
        return self.path if self.stanza.base.copied else place_of(self.stanza.base.model)

    def check_base(self) -> None:
        """Raise `ValueError` if a file of the base has changed since the conversion, or is gone."""
        place, base = self.base_path(), self.stanza.base
        for name, wanted in base.files.items():
            if base.copied and name == CONFIG:
                continue  # it holds the stanza now
            found = sha256_of(place / name) if (place / name).is_file() else None
            if found != wanted:
                what = "is gone" if found is None else "has changed"
                raise ValueError(
                    f"model={base.model!r}: {name} {what} since {str(self.path)!r} was converted from it; bring the "
                    "old file back, or convert the model again into a new folder"
                )


def read_folder(path: str | Path) -> Folder:
    """What a converted folder or an exported slider holds, without the weights.

    Raises `ValueError` naming what is missing or wrong.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_dir():
        raise ValueError(f"folder={str(path)!r}: no such folder; `proteus convert MODEL --out {path.name}` makes one")
    if (path / ALONE).is_file():
        stanza, adapter = Stanza.from_dict(read_config(path / ALONE)), path
    elif KEY in read_config(path / CONFIG):
        stanza, adapter = read_stanza(path / CONFIG), path / ADAPTER
    else:
        raise ValueError(
            f"folder={str(path)!r}: its {CONFIG} has no {KEY!r}; `proteus convert {path} --out DIR` makes a new folder "
            "that has it"
        )
    if stanza.base is None:
        raise ValueError(
            f"folder={str(path)!r}: an exported model. Open it with transformers; to heal, convert its base model"
        )
    if not (path / GATES).is_file():
        raise ValueError(f"folder={str(path)!r}: {GATES} is missing; convert the model again")
    healed = path / HEALED
    runs = (path / RUNS).iterdir() if (path / RUNS).is_dir() else ()
    return Folder(
        path,
        stanza,
        adapter if (adapter / "adapter_config.json").is_file() else None,
        healed if (healed / CONFIG).is_file() else None,
        tuple(sorted(run for run in runs if run.is_dir() and not run.name.startswith("."))),
    )


class SliderModel:
    """A transformers model with its slider: gates of each layer, settings, and flux alpha, which can be set.

    model: weights of the base, with what healing changed. gates: by layer. layers: what each layer computes at the
    present alpha, as `hf.patch.patched` takes it.
    """

    def __init__(self, model, tokenizer, stanza: Stanza, gates: Mapping[int, Gates], name: str):
        check_layers(dict.fromkeys(gates, id), surveyed(model)[1])
        self.model, self.tokenizer, self.stanza, self.gates, self.name = model, tokenizer, stanza, dict(gates), name
        self._place()

    @property
    def alpha(self) -> float | None:
        """Flux alpha of all layers; None follows the length."""
        return None if self.stanza.schedule else self.stanza.settings.flux_alpha

    @alpha.setter
    def alpha(self, alpha: float | None) -> None:
        self.stanza = self.stanza.with_alpha(alpha)
        self._place()

    def _place(self) -> None:
        self.layers = layers_of(self.model, self.stanza, self.gates)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Passes of `model` inside the block run through the slider; outside it they are the model's own."""
        with patched(self.model, self.layers):
            yield

    def cache(self, **how) -> ProteusCache:
        """A cache for `generate` at the present alpha. how: `tokens` and `reach` of `ProteusCache`."""
        if self.stanza.overrides:
            raise ValueError("overrides: a cache takes layers of equal settings only; generate without it")
        return ProteusCache(self.model, self.gates, next(iter(self.layers.values())).config, **how)

    def source(self) -> ModelSource:
        """The model as the playground reads it, with these gates."""
        source = ModelSource(self.model, self.tokenizer, self.name)
        source.own_gates = {(at, gates.gates_per_group): gates for at, gates in self.gates.items()}
        source.gates_from, source.config = "with the folder", next(iter(self.layers.values())).config
        return source


def open_folder(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, merge: bool = True
) -> SliderModel:
    """The model of a converted folder with its slider, in evaluation mode and without gradients.

    merge: add an adapter to the weights, so that passes cost no more than the base's; False keeps it beside them, where
    `with model.disable_adapter():` switches it off. Raises `ValueError` for a folder that is not complete,
    or a base that has changed.
    """
    folder = read_folder(path)
    folder.check_base()
    model, _ = load_folder(folder.healed or folder.base_path(), device, dtype, tokenizer=False)
    if folder.adapter is not None:
        model = _with_adapter(model, folder.adapter, merge)
    from transformers import AutoTokenizer

    words = folder.base_path() if (folder.path / ALONE).is_file() else folder.path
    tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
    return SliderModel(model, tokenizer, folder.stanza, gates_of(folder, model), folder.path.name)


def gates_of(folder: Folder, model) -> dict[int, Gates]:
    """The folder's gates of each layer, on the model's device. Raises `ValueError` where they are of other layers."""
    gates = read_gates(folder.gates_file, {at: layer_shape(model, at) for at in folder.stanza.layers})
    return {at: its.to(model.device) for at, its in gates.items()}


def layers_of(model, stanza: Stanza, gates: Mapping[int, Gates]) -> dict[int, ProteusLayer]:
    """What each layer of the stanza computes, as `hf.patch.patched` takes it."""
    return {at: ProteusLayer(gates[at], stanza.config(at, layer_shape(model, at))) for at in stanza.layers}


def _with_adapter(model, adapter: Path, merge: bool):
    try:
        from peft import PeftModel
    except ImportError as err:
        raise ImportError(f"an adapter needs the hf extra: pip install 'proteus-playground[hf]' ({err})") from err
    with progress_bars(False):
        healed = PeftModel.from_pretrained(model, str(adapter))
        return (healed.merge_and_unload() if merge else healed).eval().requires_grad_(False)
