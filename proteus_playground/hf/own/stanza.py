"""The `proteus_attention` stanza: what a model's `config.json` says about its slider.

transformers keeps a field of a config that it has no class for, so a folder with the stanza still opens as the model
that it was.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from ...attention import AttentionConfig
from ...attention.settings import LayerShape, Settings, config_for
from ...common.checks import whole_number
from ...common.files import write_json

KEY = "proteus_attention"
ALONE = "proteus_config.json"  # holds the stanza of an exported slider, a folder that is no checkpoint
VERSION = 1
ANY_SHAPE = LayerShape(1, 1, 2)  # settings that no layer could have are refused before the model is open


@dataclass(frozen=True)
class Schedule:
    """Flux alpha follows the length: 0 up to `dense_below` tokens, 1 from `shortlist_from` tokens on."""

    dense_below: int = AttentionConfig.dense_below
    shortlist_from: int = AttentionConfig.shortlist_from


@dataclass(frozen=True)
class Base:
    """The model under the slider. model: a known name, a hub id or an absolute path. files: sha256 by file name.

    copied: its weights lie in the folder itself.
    """

    model: str
    files: Mapping[str, str]
    copied: bool = False


@dataclass(frozen=True)
class Stanza:
    """The slider of one model.

    settings: of all layers. layers: indices of those that have the slider. overrides: fields of `Settings` in which a
    layer differs, by its index. schedule: None pins alpha at `settings.flux_alpha`. base: None in an exported model,
    which holds all its weights.
    """

    settings: Settings
    layers: tuple[int, ...]
    base: Base | None = None
    overrides: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    schedule: Schedule | None = None
    version: int = VERSION

    def settings_of(self, layer: int) -> Settings:
        """The settings of one layer."""
        return replace(self.settings, **self.overrides.get(layer, {}))

    def config(self, layer: int, shape: LayerShape) -> AttentionConfig:
        """The config of one layer of these sizes. `ValueError` or `TypeError` names the setting."""
        config = config_for(self.settings_of(layer), shape)
        return config if self.schedule is None else replace(config, flux_alpha=None, **asdict(self.schedule))

    def with_alpha(self, alpha: float | None) -> Stanza:
        """The same slider at another flux alpha; None lets it follow the length."""
        if alpha is None:
            return replace(self, schedule=self.schedule or Schedule())
        overrides = {at: {k: v for k, v in its.items() if k != "flux_alpha"} for at, its in self.overrides.items()}
        new = replace(self, settings=replace(self.settings, flux_alpha=alpha), overrides=overrides, schedule=None)
        config_for(new.settings, ANY_SHAPE)
        return new

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        plain = asdict(self)
        return plain | {"layers": list(self.layers), "overrides": {str(at): its for at, its in self.overrides.items()}}

    @classmethod
    def from_dict(cls, plain: object) -> Stanza:
        """What `to_dict` gave. Raises `ValueError` or `TypeError` naming the field, its value and what is allowed."""
        given = _fields(cls, plain, KEY)
        if given.get("version") != VERSION:
            raise ValueError(f"{KEY}.version={given.get('version')!r}: allowed is {VERSION}; convert the model again")
        overrides = given.get("overrides", {})
        if not isinstance(overrides, dict) or not all(key.isdecimal() for key in overrides):
            raise ValueError(f"{KEY}.overrides={overrides!r}: must give settings by the number of a layer")
        schedule, base = given.get("schedule"), given.get("base")
        stanza = cls(
            Settings(**_fields(Settings, given.get("settings"), f"{KEY}.settings")),
            _layers(given.get("layers")),
            None if base is None else _base(base),
            {int(at): _fields(Settings, its, f"{KEY}.overrides.{at}") for at, its in overrides.items()},
            None if schedule is None else Schedule(**_fields(Schedule, schedule, f"{KEY}.schedule")),
        )
        if extra := sorted(set(stanza.overrides) - set(stanza.layers)):
            raise ValueError(f"{KEY}.overrides has key {extra[0]}: must be one of the layers {stanza.layers}")
        for layer in stanza.layers:
            stanza.config(layer, ANY_SHAPE)
        return stanza


def is_own(path: str | Path) -> bool:
    """Whether `path` is a converted folder or an exported slider, whose weights are its base's."""
    if (Path(path) / ALONE).is_file():
        return True
    try:
        stanza = read_config(Path(path) / "config.json").get(KEY)
    except ValueError:
        return False
    return isinstance(stanza, dict) and stanza.get("base") is not None


def read_stanza(config_file: Path) -> Stanza:
    """The stanza of a `config.json`. Raises `ValueError` or `TypeError` naming what is wrong with it."""
    return Stanza.from_dict(read_config(config_file).get(KEY))


def write_stanza(config_file: Path, stanza: Stanza) -> None:
    """Put `stanza` into a `config.json`, all of it or nothing; the other fields stay as they are."""
    write_json(config_file, read_config(config_file) | {KEY: stanza.to_dict()})


def read_config(config_file: Path) -> dict:
    """A model's `config.json`. Raises `ValueError` where there is none or it is no JSON object."""
    try:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"{str(config_file)!r}: no readable config.json of a model ({err})") from err
    if not isinstance(config, dict):
        raise ValueError(f"{str(config_file)!r} holds a {type(config).__name__}: a model's config is a JSON object")
    return config


def _fields(kind: type, plain: object, name: str) -> dict:
    allowed = [each.name for each in fields(kind)]
    if not isinstance(plain, dict):
        raise ValueError(f"{name}={plain!r}: must be a JSON object with {', '.join(allowed)}")
    if unknown := sorted(set(plain) - set(allowed)):
        raise ValueError(f"{name} has {unknown[0]!r}: allowed is {', '.join(allowed)}")
    return plain


def _layers(plain: object) -> tuple[int, ...]:
    if not isinstance(plain, (list, tuple)) or not plain:
        raise ValueError(f"{KEY}.layers={plain!r}: must be a list of at least one layer")
    for layer in plain:
        whole_number(f"{KEY}.layers", layer, 0)
    if len(set(plain)) != len(plain):
        raise ValueError(f"{KEY}.layers={plain!r}: must name each layer once")
    return tuple(plain)


def _base(plain: object) -> Base:
    base = _fields(Base, plain, f"{KEY}.base")
    files = base.get("files")
    if not isinstance(base.get("model"), str) or not isinstance(base.get("copied", False), bool):
        raise ValueError(f"{KEY}.base={plain!r}: must give the model's name or path, and copied as true or false")
    if not isinstance(files, dict) or not files or not all(isinstance(value, str) for value in files.values()):
        raise ValueError(f"{KEY}.base.files={files!r}: must give the sha256 of each file")
    return Base(**base)
