"""Arms of the quality table: the model's own pass, ours at one or more settings, every selector, and a guest's.

Axes: `B` batch, `T` tokens, `H` query heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from ...attention import AttentionConfig
from ...attention.adapter import ProteusLayer
from ...attention.selectors import SELECTORS, Selector, SelectorLayer, load_selector
from ..evidence.arms import OURS
from .subjects import Subject

DENSE = "dense"
OWN = (DENSE, *OURS)  # selectors that are measured as a pass of their own instead


@dataclass(frozen=True)
class Arm:
    """One way to read. Without a selector it is ours, with these fields of `AttentionConfig`, or the dense pass.

    code: changes when a guest's code does.
    """

    name: str
    selector: Selector | None = None
    fields: Mapping[str, object] = field(default_factory=dict)
    code: str = ""

    @property
    def dense(self) -> bool:
        return self.name == DENSE

    def config(self, subject: Subject, shortlist: int) -> AttentionConfig:
        """Flux alpha 1 and all heads awake. Raises `ValueError` or `TypeError` naming a field that does not fit."""
        fields = {"flux_alpha": 1.0, "route_heads": False, "shortlist": shortlist}
        return subject.config(**{**fields, **self.fields})

    def mark(self, subject: Subject, shortlist: int) -> str:
        """Changes when the code or the config does, so that a later run takes no result of another one for its own."""
        return "" if self.dense else sha256(f"{self.code} {self.config(subject, shortlist)}".encode()).hexdigest()[:16]


def arm_names() -> list[str]:
    """The names that `arms` takes."""
    return [DENSE, "ours", *(name for name in SELECTORS if name not in OWN)]


def arms(names: list[str], settings: list[dict], guests: list[str]) -> list[Arm]:
    """The arms of a run, the dense pass first. settings: fields of ours, one arm each. guests: FILE.py:NAME.

    Raises as `load_selector`, and `ValueError` for a guest with the name of another arm.
    """
    ours = [Arm(f"ours {_named(fields)}" if fields else "ours", fields=fields) for fields in settings or [{}]]
    found = [Arm(DENSE), *(ours if "ours" in names else [])]
    found += [Arm(name, SELECTORS[name]) for name in names if name not in (DENSE, "ours")]
    for place in guests:
        guest = load_selector(place)
        file = Path(place.rpartition(":")[0]).expanduser()
        found.append(Arm(guest.name, guest, code=sha256(file.read_bytes()).hexdigest()[:16]))
    every = [arm.name for arm in found]
    if twice := sorted({name for name in every if every.count(name) > 1}):
        raise ValueError(f"selector={twice[0]!r}: must have a name of its own")
    return found


def _named(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(fields.items()))


class Meter:
    """Counts what the rows from `first` on read and look at, in all layers and passes."""

    def __init__(self, first: int):
        self.first, self._reads, self._looks = first, [], []

    def add(self, reads: Tensor, looks: Tensor) -> None:
        """reads `(B, T, H)` and looks `(T,)` of one layer."""
        self._reads.append(reads[:, self.first :].float().mean().item())
        self._looks.append(looks[self.first :].float().mean().item())

    def figures(self, tokens: int) -> dict[str, float]:
        """Means per query. Without any counted layer the pass was the model's own, in which row t reads t + 1 keys."""
        if not self._reads:
            return {"reads": fmean(range(self.first + 1, tokens + 1)), "looks": 0.0}
        return {"reads": round(fmean(self._reads), 3), "looks": round(fmean(self._looks), 3)}


def replaced(subject: Subject, arm: Arm, shortlist: int, meter: Meter) -> dict[int, Callable[[object], Tensor]]:
    """What runs in place of each layer's attention, for `Source.nll` and `predict`; nothing for the dense pass."""
    if arm.dense:
        return {}
    config = arm.config(subject, shortlist)
    needs_gates = arm.selector is None or arm.selector.needs_gates
    gates = subject.gates(config.gates_per_group) if needs_gates else {}
    return {layer: _counted(arm, config, gates.get(layer), meter) for layer in subject.layers}


def _counted(arm: Arm, config: AttentionConfig, gates, meter: Meter) -> Callable[[object], Tensor]:
    def by_selector(call) -> Tensor:
        done = SelectorLayer(arm.selector, config, gates).run_call(call)
        meter.add(done.reads, done.looks)
        return done.out

    def by_layer(call) -> Tensor:
        done = ProteusLayer(gates, config).run_call(call)
        looks = 0 if done.budget.dense else gates.gates_per_group
        meter.add(done.result.reads, torch.full(done.out.shape[1:2], looks))
        return done.out

    return by_layer if arm.selector is None else by_selector
