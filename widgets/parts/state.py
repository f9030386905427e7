"""The one thing that controls and panels share: every setting of the workbench, checked, as JSON or a short string.

`state="alpha=0.35&L=64&layer=12&token=734"` is the short string a teacher puts in a cell; it names only what
differs from what the model opens with. The JSON holds everything, pasted text included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import parse_qsl, quote, urlencode

from traitlets import Bool, Float, HasTraits, Int, Unicode, validate

from proteus_playground.attention.settings import Settings


@dataclass(frozen=True)
class Field:
    """One number of the state: `key` is its name in the short string, `tip` one plain sentence for a tooltip."""

    name: str
    key: str
    label: str
    low: float
    high: float
    default: float
    tip: str

    @property
    def whole(self) -> bool:
        return isinstance(self.default, int)


FIELDS = (
    Field("flux_alpha", "alpha", "flux α", 0.0, 1.0, 1.0,
          "How sparse the layer is: at 0 every query reads every earlier token, at 1 only its shortlist."),
    Field("keep_ratio", "keep", "keep ratio ρ", 0.05, 1.0, 1.0,
          "The largest share of tokens that take part; the least salient are skipped by this layer."),
    Field("shortlist", "L", "shortlist L", 16, 1024, 128,
          "How many keys and notes one query may read when flux α is 1."),
    Field("dna_fraction", "dna", "DNA fraction δ", 0.0, 1.0, 0.5,
          "The share of the shortlist spent on far keys that gates fetch; the rest goes to near ones and anchors."),
    Field("probes", "probes", "probes", 1, 8, 2, "How many gates each query opens."),
    Field("gates", "gates", "gates", 4, 128, 32,
          "How many prototypes each KV group has; a new number is fitted again, which takes a moment."),
    Field("anchors", "anchors", "anchors", 0, 16, 4, "How many of the first tokens every query always reads."),
    Field("head_top_p", "top_p", "Top-P", 0.05, 1.0, 0.9,
          "With head routing: heads wake until their probability adds up to this."),
    Field("layer", "layer", "layer", 0, 511, 12, "Which attention layer of the model is shown."),
    Field("head", "head", "head", 0, 511, 3, "Which head's row is followed."),
    Field("token", "token", "token", 0, 1_000_000, 0, "Which token is the query that every panel follows."),
    Field("length", "length", "length", 64, 4096, 1024, "How many tokens of the text the model reads."),
    Field("shelf", "shelf", "shelf", 0, 999_999, 1, "Which shelf is written: every number gives another one."),
)  # fmt: skip
BY_NAME = {field.name: field for field in FIELDS}
SWITCHES = {"notes": "notes", "route_heads": "route"}  # trait -> key
WORDS = {"text": "text", "model": "model", "pasted": "pasted", "question": "ask"}
KEYS = {field.key: field.name for field in FIELDS} | {k: n for n, k in (SWITCHES | WORDS).items()}
SHELF = "a shelf"  # the text that is written anew for every number
MODELS = ("shelf-mini", "smollm2", "random")
SETTINGS = tuple(Settings.__dataclass_fields__)
MAX_LENGTH = {"pasted": 200_000, "question": 300}  # characters

PRESETS: dict[str, dict] = {
    "dense": {"flux_alpha": 0.0},
    "window + anchors": {"dna_fraction": 0.0, "notes": False},
    "gates": {"notes": False},
    "gates with notes": {},
    "tiny budget": {"shortlist": 32, "probes": 1},
}
PRESET_TIPS = {
    "dense": "Every query reads every earlier token: ordinary attention.",
    "window + anchors": "Near tokens and the first few only, which is what StreamingLLM does.",
    "gates": "Half the shortlist goes to far keys fetched from the gates each query opens.",
    "gates with notes": "As gates, and every gate also shows one note that averages what was not read, where there is "
    "room: all notes together take half of the gates' share at most.",
    "tiny budget": "Thirty-two reads per query: watch what breaks first.",
}


def default_model() -> str:
    """The small model that comes with the package; SmolLM2 in an install that came without its weights."""
    from proteus_playground.lm.shipped import shipped_models

    return "shelf-mini" if "shelf-mini" in shipped_models() else "smollm2"


def opening(model: str) -> dict:
    """Every trait as `model` opens. ValueError names an unknown `model`."""
    plain = {field.name: field.default for field in FIELDS} | {"notes": True, "route_heads": False}
    words = {"text": "humble token", "pasted": "", "question": "", "model": check("model", model)}
    return plain | words | (_as_trained() | {"text": SHELF, "layer": 0, "head": 0} if model == "shelf-mini" else {})


@lru_cache(maxsize=1)
def _as_trained() -> dict:
    """The settings that shelf-mini was trained with, but for L, which follows the length of the text."""
    from proteus_playground.lm.shipped import RECIPES

    cfg = RECIPES["shelf-mini"]().model.attention
    same = {name: getattr(cfg, name) for name in ("dna_fraction", "probes", "notes", "route_heads", "head_top_p")}
    return same | {"gates": cfg.gates_per_group, "anchors": cfg.n_anchors}


def preset_settings(name: str, model: str = "smollm2") -> dict:
    """All settings of a preset, what it leaves out as `model` opens. ValueError names an unknown `name`."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: allowed is {', '.join(map(repr, PRESETS))}")
    start = opening(model)
    return {key: start[key] for key in SETTINGS} | PRESETS[name]


def check(name: str, value):
    """`value` as trait `name` holds it. ValueError or TypeError names the argument, the value and what is allowed."""
    if name in BY_NAME:
        return number(BY_NAME[name], value)
    if name in SWITCHES:
        text = str(value).lower()
        if text not in {"true", "false", "0", "1", "on", "off"}:
            raise ValueError(f"{name}={value!r}: allowed is true or false")
        return text in {"true", "1", "on"}
    if name not in WORDS:
        raise ValueError(f"{name}={value!r} is no part of the state: allowed is {', '.join(KEYS.values())}")
    if not isinstance(value, str):
        raise TypeError(f"{name}={value!r}: allowed is a string")
    if name == "model" and value not in MODELS:
        raise ValueError(f"model={value!r}: allowed is {', '.join(map(repr, MODELS))}")
    if len(value) > MAX_LENGTH.get(name, len(value)):
        raise ValueError(f"{name} holds {len(value):,} characters: allowed is up to {MAX_LENGTH[name]:,}")
    return value


def number(field: Field, value):
    """`value` as `field` holds it. ValueError or TypeError names the field, the value and what is allowed."""
    allowed = f"allowed is {'a whole number' if field.whole else 'a number'} in [{field.low:g}, {field.high:g}]"
    if isinstance(value, bool):
        raise TypeError(f"{field.name}={value!r}: {allowed}")
    try:
        found = float(value)
    except (TypeError, ValueError) as err:
        raise type(err)(f"{field.name}={value!r}: {allowed}") from err
    if not field.low <= found <= field.high or (field.whole and found != int(found)):
        raise ValueError(f"{field.name}={value!r}: {allowed}")
    return int(found) if field.whole else round(found, 4)


class PlayState(HasTraits):
    """Every control of the workbench as a trait, at first as `model` (the default one for None) opens.

    Setting one out of range raises and leaves it as it was.
    """

    flux_alpha = Float(BY_NAME["flux_alpha"].default)
    keep_ratio = Float(BY_NAME["keep_ratio"].default)
    shortlist = Int(BY_NAME["shortlist"].default)
    dna_fraction = Float(BY_NAME["dna_fraction"].default)
    probes = Int(BY_NAME["probes"].default)
    gates = Int(BY_NAME["gates"].default)
    anchors = Int(BY_NAME["anchors"].default)
    head_top_p = Float(BY_NAME["head_top_p"].default)
    notes = Bool(True)
    route_heads = Bool(False)
    layer = Int(BY_NAME["layer"].default)
    head = Int(BY_NAME["head"].default)
    token = Int(0)
    length = Int(BY_NAME["length"].default)
    shelf = Int(BY_NAME["shelf"].default)
    text = Unicode("humble token")  # SHELF, a name or a path for `load_text`; with `pasted`, a title
    pasted = Unicode("")  # the text itself, where the user pasted one
    question = Unicode("")  # asked of the shelf model behind the text
    model = Unicode("smollm2")

    def __init__(self, model: str | None = None):
        super().__init__(**opening(default_model() if model is None else model))

    @validate(*KEYS.values())
    def _valid(self, proposal):
        return check(proposal["trait"].name, proposal["value"])

    def settings(self) -> Settings:
        now = {name: getattr(self, name) for name in SETTINGS}
        return Settings(**now | {"probes": min(self.probes, self.gates)})

    def update(self, values: Mapping) -> None:
        """Sets all of `values` or, where one is not allowed, none."""
        checked = {name: check(name, value) for name, value in values.items()}
        with self.hold_trait_notifications():
            for name, value in checked.items():
                setattr(self, name, value)

    def preset(self) -> str | None:
        """The name of the preset that the settings are at, if any."""
        now = self.settings()
        return next((name for name in PRESETS if Settings(**preset_settings(name, self.model)) == now), None)

    def to_dict(self) -> dict:
        return {name: getattr(self, name) for name in KEYS.values()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_string(self) -> str:
        """What differs from what the model opens with, as `alpha=0.35&L=64`. Empty for a new state."""
        fresh = opening(self.model) | {"model": default_model()}
        changed = {key: getattr(self, name) for key, name in KEYS.items() if getattr(self, name) != fresh[name]}
        short = {key: int(v) if isinstance(v, bool) else f"{v:g}" if isinstance(v, float) else v
                 for key, v in changed.items()}  # fmt: skip
        return urlencode(short, quote_via=quote, safe=" /")

    def restore(self, saved: str | Mapping) -> None:
        """From `to_json`, `to_string` or a dict; what it leaves out is as the model opens. All or nothing."""
        given = parse(saved)
        self.update({**opening(given.get("model", default_model())), **given})


def parse(saved: str | Mapping) -> dict:
    """A saved state as {trait: value}, each checked. ValueError or TypeError says what is wrong with it."""
    if isinstance(saved, Mapping):
        values = dict(saved)
    elif not isinstance(saved, str):
        raise TypeError(f"state={saved!r}: allowed is a JSON object, a string such as 'alpha=0.35&L=64', or a dict")
    elif saved.lstrip().startswith("{"):
        try:
            values = json.loads(saved)
        except json.JSONDecodeError as err:
            raise ValueError(f"state={saved[:60]!r} is not JSON: {err}") from err
    else:
        try:
            values = dict(parse_qsl(saved.strip(), keep_blank_values=True, strict_parsing=bool(saved.strip())))
        except ValueError as err:
            raise ValueError(f"state={saved[:60]!r}: allowed is pairs such as 'alpha=0.35&L=64'") from err
    named = {KEYS.get(key, key): value for key, value in values.items()}
    return {name: check(name, value) for name, value in named.items()}
