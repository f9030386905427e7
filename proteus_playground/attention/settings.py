"""The playground's settings of one layer, and the `AttentionConfig` that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..common.checks import whole_number
from .config import AttentionConfig


@dataclass(frozen=True)
class Settings:
    """One position of every control that changes what a layer computes."""

    flux_alpha: float = 1.0  # 0 dense .. 1 constant shortlist
    keep_ratio: float = 1.0  # (0, 1], upper bound on the share of tokens that take part
    shortlist: int = 128  # L, reads per query at flux_alpha = 1
    dna_fraction: float = 0.5  # [0, 1], share of L spent on gates' rings and notes
    probes: int = 2  # gates opened per query, >= 1
    gates: int = 32  # prototypes per KV group, >= 1
    notes: bool = True  # read each gate's summary, where there is room
    anchors: int = 4  # first tokens that are always read, >= 0
    route_heads: bool = False  # let the router put heads to sleep
    head_top_p: float = 0.9  # (0, 1], only with route_heads


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer that the controls do not change."""

    n_heads: int
    n_groups: int
    head_dim: int
    rest: Mapping = field(default_factory=dict)  # fields of `AttentionConfig` that the model was trained with


def config_for(settings: Settings, shape: LayerShape) -> AttentionConfig:
    """The layer that `settings` describe. `ValueError` or `TypeError` names the setting."""
    if not isinstance(settings, Settings):
        raise TypeError(f"settings={settings!r}: expected a proteus_playground.playground.views.Settings")
    for name, low in (("gates", 1), ("anchors", 0)):  # AttentionConfig knows these two by longer names
        whole_number(name, getattr(settings, name), low)
    r = shape.n_heads // shape.n_groups
    if settings.probes > settings.gates:
        raise ValueError(f"probes={settings.probes!r}: must be at most gates={settings.gates}")
    if settings.route_heads and settings.gates < r:
        raise ValueError(f"gates={settings.gates!r}: must be at least {r}, one per head of a group, to route heads")
    if settings.flux_alpha is None:
        raise TypeError("flux_alpha=None: expected a number in [0, 1]")
    return AttentionConfig(
        d_model=shape.n_heads * shape.head_dim,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_groups,
        head_dim=shape.head_dim,
        shortlist=settings.shortlist,
        dna_fraction=settings.dna_fraction,
        keep_ratio=settings.keep_ratio,
        flux_alpha=settings.flux_alpha,
        route_heads=settings.route_heads,
        head_top_p=settings.head_top_p,
        gates_per_group=settings.gates,
        probes=settings.probes,
        n_anchors=settings.anchors,
        notes=settings.notes,
        **shape.rest,
    )
