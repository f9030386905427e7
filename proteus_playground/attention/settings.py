"""The knobs of `AttentionConfig` that the playground offers, how their controls look, and the config they come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from .config import AttentionConfig

KEYS_PER_GATE = 8  # fewest keys that a prototype is fitted to by default
CONFIG = {each.name: each for each in fields(AttentionConfig)}


def offered(of: str, key: str, label: str, tip: str, **shown):
    """A field of `Settings`: the field `of` of `AttentionConfig` as a control.

    Default, range and unit are the config's. `shown` replaces one of them, or sets another field of `Control`.
    """
    default = shown.pop("default", CONFIG[of].default)
    return field(default=default, metadata={"of": of, "key": key, "label": label, "tip": tip, **shown})


@dataclass(frozen=True)
class Settings:
    """One position of every control that changes what a layer computes.

    Six defaults differ from the config's, because the playground looks at models that were trained without a slider:
    flux alpha is pinned, so that the slider and not the length decides; their heads have no trained router, so all stay
    awake; where a visitor switches routing on, Top-P lets some heads sleep, so that there is something to see; and
    many gates, of which a query opens the nearest, cost such a model least likelihood (docs/log.md).
    """

    flux_alpha: float = offered(
        "flux_alpha", "alpha", "flux α", default=1.0, main=True,
        tip="How sparse the layer is: at 0 every query reads every earlier token, at 1 only its shortlist.",
    )  # fmt: skip
    keep_ratio: float = offered(
        "keep_ratio", "keep", "keep ratio ρ", low=0.05, main=True,
        tip="The largest share of the tokens that take part; this layer skips the least salient ones.",
    )  # fmt: skip
    shortlist: int = offered(
        "shortlist", "L", "shortlist L", low=16, high=1024, octave_step=0.25, main=True,
        tip="How many keys and notes one query may read when flux α is 1.",
    )  # fmt: skip
    dna_fraction: float = offered(
        "dna_fraction", "dna", "DNA fraction δ", main=True,
        tip="The share of the shortlist that is spent on gates, near or far; the rest goes to the window and anchors.",
    )  # fmt: skip
    probes: int = offered(
        "probes", "probes", "probes", default=16, high=32, tip="How many gates each query opens, or opens at most."
    )
    nearest_gates: bool = offered(
        "nearest_gates", "nearest", "nearest gates", default=True,
        tip="Opens the best gates for as long as the keys in their rings fit, and reads the notes of the next best; "
        "otherwise all probes share the reads evenly, and the notes of all gates are read.",
    )  # fmt: skip
    gates: int = offered(
        "gates_per_group", "gates", "gates", default=256, low=4, high=512,
        tip="How many gates each KV group has; a change takes a moment, because prototypes are fitted anew.",
    )  # fmt: skip
    notes: bool = offered(
        "notes", "notes", "read notes",
        tip="Whether queries read each gate's note, the mean of its keys that are not read one by one.",
    )  # fmt: skip
    anchors: int = offered(
        "n_anchors", "anchors", "anchors", high=16, tip="How many of the first tokens every query reads."
    )
    route_heads: bool = offered(
        "route_heads", "route", "route heads", default=False,
        tip="Lets heads sleep at tokens that do not need them; a model that was not trained with this gets worse.",
    )  # fmt: skip
    head_top_p: float = offered(
        "head_top_p", "top_p", "Top-P", low=0.05, default=0.9,
        tip="Where heads are routed, they wake, the most probable first, until their probabilities add up to this.",
    )  # fmt: skip


def default_settings(calibration_tokens: int) -> Settings:
    """The default settings of a model whose gates are fitted to so many tokens: fewer gates where these are few."""
    gates = min(Settings.gates, max(1, calibration_tokens // KEYS_PER_GATE))
    return Settings(gates=gates)


@dataclass(frozen=True)
class Control:
    """A number or a switch that a panel shows, with its name in links (`key`) and one plain sentence (`tip`)."""

    name: str
    key: str
    label: str
    low: float
    high: float
    default: float | bool
    tip: str
    unit: str = ""
    of: str = ""  # the field of `AttentionConfig` that it sets, if any
    main: bool = False  # always in sight, and followed while it is dragged
    octave_step: float = 0.0  # the slider moves in powers of two, by this fraction of one; 0: in equal steps

    @property
    def switch(self) -> bool:
        return isinstance(self.default, bool)

    @property
    def whole(self) -> bool:
        return isinstance(self.default, int)


def _control(declared) -> Control:
    allowed = CONFIG[declared.metadata["of"]].metadata.get("range")
    ends = {"low": allowed.low, "high": allowed.high, "unit": allowed.unit} if allowed else {"low": 0, "high": 1}
    return Control(**{"name": declared.name, "default": declared.default, **ends, **declared.metadata})


CONTROLS = tuple(_control(each) for each in fields(Settings))


@dataclass(frozen=True)
class LayerShape:
    """The sizes of a layer that the controls do not change."""

    n_heads: int
    n_groups: int
    head_dim: int
    rest: Mapping = field(default_factory=dict)  # fields of `AttentionConfig` that the model was trained with

    def config(self, **others) -> AttentionConfig:
        """A config of these sizes. others: its other fields."""
        return AttentionConfig(
            d_model=self.n_heads * self.head_dim, n_heads=self.n_heads, n_kv_heads=self.n_groups,
            head_dim=self.head_dim, **others, **self.rest,
        )  # fmt: skip


def config_for(settings: Settings, shape: LayerShape) -> AttentionConfig:
    """The layer that `settings` describe. `ValueError` or `TypeError` names the setting."""
    if not isinstance(settings, Settings):
        raise TypeError(f"settings={settings!r}: expected a {Settings.__module__}.Settings")
    values = {control.name: getattr(settings, control.name) for control in CONTROLS}
    for control in CONTROLS:  # under its own name, which may be shorter than the config's
        if "range" in CONFIG[control.of].metadata:
            CONFIG[control.of].metadata["range"].check(control.name, values[control.name])
    r = shape.n_heads // shape.n_groups
    if settings.probes > settings.gates and not settings.nearest_gates:
        raise ValueError(f"probes={settings.probes!r}: must be at most gates={settings.gates}")
    if settings.route_heads and settings.gates < r:
        raise ValueError(f"gates={settings.gates!r}: must be at least {r}, one per head of a group, to route heads")
    return shape.config(**{control.of: values[control.name] for control in CONTROLS})


def settings_of(config: AttentionConfig) -> dict:
    """What the controls show for a layer of `config`, by name: the way back from `config_for`."""
    return {control.name: getattr(config, control.of) for control in CONTROLS}
