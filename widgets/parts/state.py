"""The one thing that controls and panels share: every setting of the workbench, checked, as JSON or a short string.

`state="alpha=0.35&L=64&layer=12&token=734"` is the short string that a teacher puts in a cell; it names only what
differs from what the model opens with. The JSON holds everything, pasted text included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, urlencode

from traitlets import Bool, Float, HasTraits, Int, TraitType, Unicode, validate

from proteus_playground.attention.selectors import OURS, Way, Without
from proteus_playground.attention.settings import CONTROLS, Control, Settings, settings_of
from proteus_playground.hf.models import ALLOWED, DEFAULT, KNOWN, find

NUMBERS = (
    *(control for control in CONTROLS if not control.switch),
    Control("layer", "layer", "layer", 0, 511, 12, "Which attention layer of the model is shown."),
    Control("head", "head", "head", 0, 511, 3, "Which head's row is followed."),
    Control("token", "token", "token", 0, 1_000_000, 0, "The token whose query every picture shows."),
    Control("length", "length", "length", 64, 4096, 1024, "How many tokens of the text the model reads.", "tokens"),
    Control("shelf", "shelf", "shelf", 0, 999_999, 1, "The number of the shelf; every number is another text."),
    Control("tour", "tour", "tour", 0, 7, 0, "The step of the guided tour that is shown; 0 shows none."),
)
BY_NAME = {control.name: control for control in (*NUMBERS, *CONTROLS)}
WORDS = {
    "text": "text", "model": "model", "pasted": "pasted", "question": "ask", "selector": "by", "without": "without",
    "pinned": "pin",
}  # trait -> key  # fmt: skip
KEYS = {control.key: name for name, control in BY_NAME.items()} | {key: name for name, key in WORDS.items()}
SHELF = "a shelf"  # the text that is written anew for every number


class ModelNames(tuple):
    """Names of models that a panel offers. It contains every other name too that leads to a model."""

    def __contains__(self, name) -> bool:
        try:
            return super().__contains__(name) or find(name) is not None
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"{', '.join(map(repr, self))}, {ALLOWED}"


MODELS = ModelNames(("shelf-mini", *KNOWN, "random"))
SETTINGS = tuple(control.name for control in CONTROLS)
MAX_LENGTH = {"pasted": 200_000, "question": 300, "without": 2_000, "pinned": 4_000}  # characters

PRESETS: dict[str, dict] = {
    "dense": {"flux_alpha": 0.0},
    "window + anchors": {"dna_fraction": 0.0, "notes": False},
    "gates": {"notes": False},
    "gates with notes": {},
    "tiny budget": {"shortlist": 32, "probes": 1},
}
PRESET_TIPS = {
    "dense": "Every query reads every earlier token: ordinary attention.",
    "window + anchors": "A query reads only the nearest tokens and the first few of the text, as in StreamingLLM.",
    "gates": "Half of the shortlist goes to keys of the gates that a query opens, at any distance.",
    "gates with notes": "As “gates”, and a query also reads notes, each the mean of those keys of a gate that it does "
    "not read one by one: of the next nearest gates, or of all gates if they take half of the gates' share or less.",
    "tiny budget": "A query reads only 32 keys and notes: this shows what fails first.",
}


def default_model() -> str:
    """The small model that comes with the package; a language model in an install that came without its weights."""
    from proteus_playground.lm.shipped import shipped_models

    return "shelf-mini" if "shelf-mini" in shipped_models() else DEFAULT


def opening(model: str) -> dict:
    """The value of every trait when `model` opens. ValueError names an unknown `model`."""
    plain = {name: control.default for name, control in BY_NAME.items()}
    words = {"text": "humble token", "pasted": "", "question": "", "model": check("model", model)}
    words |= {"selector": OURS, "without": "", "pinned": ""}
    return plain | words | (_as_trained() | {"text": SHELF, "layer": 0, "head": 0} if model == "shelf-mini" else {})


@lru_cache(maxsize=1)
def _as_trained() -> dict:
    """What shelf-mini was trained with. Its training varied alpha, and L with the length: these two stay out."""
    from proteus_playground.lm.shipped import RECIPES

    trained = settings_of(RECIPES["shelf-mini"]().model.attention)
    return {name: value for name, value in trained.items() if name not in ("flux_alpha", "shortlist")}


def preset_settings(name: str, model: str = DEFAULT) -> dict:
    """All settings of a preset, what it leaves out as `model` opens. ValueError names an unknown `name`."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: allowed is {', '.join(map(repr, PRESETS))}")
    start = opening(model)
    return {key: start[key] for key in SETTINGS} | PRESETS[name]


def checker(
    numbers: Mapping[str, Control],
    texts: Iterable[str],
    choices: Mapping[str, tuple[str, ...]],
    longest: Mapping[str, int],
    forms: Mapping[str, Callable[[str], str]] | None = None,
) -> Callable[[str, object], object]:
    """A function `check(name, value)` that returns `value` as the trait `name` holds it.

    numbers, texts: the traits; choices: what a text may be; longest: its most characters; forms: name -> a function
    that returns a text as it is kept. `check` raises ValueError or TypeError, which name the argument, the value and
    what is allowed.
    """
    known = (*numbers, *texts)

    def check(name: str, value: object) -> object:
        if name in numbers:
            return switch(numbers[name], value) if numbers[name].switch else number(numbers[name], value)
        if name not in known:
            raise ValueError(f"{name}={value!r} is not a setting: allowed is {', '.join(known)}")
        if not isinstance(value, str):
            raise TypeError(f"{name}={value!r}: allowed is a string")
        if name in choices and value not in choices[name]:
            allowed = choices[name]
            words = str(allowed) if isinstance(allowed, ModelNames) else ", ".join(map(repr, allowed))
            raise ValueError(f"{name}={value!r}: allowed is {words}")
        if len(value) > longest.get(name, len(value)):
            raise ValueError(f"{name} holds {len(value):,} characters: allowed is up to {longest[name]:,}")
        return forms[name](value) if forms and name in forms else value

    return check


def _selector(name: str) -> str:
    Way(name).chooser()
    return name


class Pin(NamedTuple):
    """What is pinned as A, to compare with."""

    settings: Settings
    way: Way
    model: str


PINNED = (*SETTINGS, "selector", "without", "model")


def pin_of(values: Mapping) -> str:
    """The settings, the selector, what is taken away and the model, of a state's `to_dict`, as `pinned` holds them."""
    keys = {name: key for key, name in KEYS.items()}
    return urlencode({keys[name]: _short(values[name]) for name in PINNED}, quote_via=quote)


def _pin(text: str) -> str:
    """Raises ValueError or TypeError for a text that `pin_of` does not make."""
    if text and not set(parse(text)) <= set(PINNED):
        raise ValueError(
            f"pinned={text!r}: allowed is settings, a selector, what is taken away and a model, as in a link"
        )
    return text


def unpin(text: str, model: str) -> Pin:
    """What a trait `pinned` holds; what it leaves out is as its model opens, which is `model` where it names none."""
    named = parse(text)
    now = opening(named.get("model", model)) | named
    settings = Settings(**{name: now[name] for name in SETTINGS} | {"probes": min(now["probes"], now["gates"])})
    return Pin(settings, Way(now["selector"], Without.parse(now["without"])), now["model"])


def _short(value):
    return int(value) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value


FORMS = {"without": lambda text: str(Without.parse(text)), "selector": _selector, "pinned": _pin}
check = checker(BY_NAME, WORDS, {"model": MODELS}, MAX_LENGTH, FORMS)


def switch(control: Control, value) -> bool:
    """`value` as True or False. ValueError names the control and the value."""
    text = str(value).lower()
    if text not in {"true", "false", "0", "1", "on", "off"}:
        raise ValueError(f"{control.name}={value!r}: allowed is true or false")
    return text in {"true", "1", "on"}


def number(control: Control, value):
    """`value` as `control` holds it. ValueError or TypeError names the control, the value and what is allowed."""
    allowed = f"allowed is {'a whole number' if control.whole else 'a number'} in [{control.low:g}, {control.high:g}]"
    if isinstance(value, bool):
        raise TypeError(f"{control.name}={value!r}: {allowed}")
    try:
        found = float(value)
    except (TypeError, ValueError) as err:
        raise type(err)(f"{control.name}={value!r}: {allowed}") from err
    if not control.low <= found <= control.high or (control.whole and found != int(found)):
        raise ValueError(f"{control.name}={value!r}: {allowed}")
    return int(found) if control.whole else round(found, 4)


def checked_traits(
    controls: Iterable[Control], check: Callable[[str, object], object], **others: TraitType
) -> type[HasTraits]:
    """A class with one trait per control and the `others`. Setting one passes it through `check(name, value)`."""

    def trait(control: Control) -> TraitType:
        kind = Bool if control.switch else Int if control.whole else Float
        return kind(control.default)

    traits = {control.name: trait(control) for control in controls} | others

    class Checked(HasTraits):
        @validate(*traits)
        def _valid(self, proposal):
            return check(proposal["trait"].name, proposal["value"])

        def update(self, values: Mapping) -> None:
            """Sets all of `values` or, where one is not allowed, none."""
            checked = {name: check(name, value) for name, value in values.items()}
            with self.hold_trait_notifications():
                for name, value in checked.items():
                    setattr(self, name, value)

    return type("CheckedTraits", (Checked,), traits)


TEXTS = {
    "text": Unicode("humble token"),  # SHELF, a name or a path for `load_text`; with `pasted`, a title
    "pasted": Unicode(""),  # the text itself, where the user pasted one
    "question": Unicode(""),  # put to the shelf model, after the text
    "model": Unicode(DEFAULT),
    "selector": Unicode(OURS),  # what chooses the keys: a name of `selectors.offered()`
    "without": Unicode(""),  # what is taken away, as `Without.parse` reads it
    "pinned": Unicode(""),  # settings to compare with, as `pin_of` writes them; "" for none
}


class PlayState(checked_traits(BY_NAME.values(), check, **TEXTS)):
    """Every control of the workbench as a trait, at first as `model` (the default one for None) opens.

    Setting a trait out of range raises and leaves it as it was.
    """

    def __init__(self, model: str | None = None):
        self.fixed: dict = {}  # trait -> value that a lesson has fixed: whatever is set, it stays
        super().__init__(**opening(default_model() if model is None else model))

    @validate(*BY_NAME, *TEXTS)
    def _valid(self, proposal):
        name = proposal["trait"].name
        return self.fixed.get(name, check(name, proposal["value"]))

    def fix(self, values: Mapping) -> None:
        """Sets `values` for good, so that no control, preset or link changes them. All or none."""
        values = {KEYS.get(name, name): value for name, value in values.items()}
        self.update(values)
        self.fixed |= {name: getattr(self, name) for name in values}

    def settings(self) -> Settings:
        now = {name: getattr(self, name) for name in SETTINGS}
        return Settings(**now | {"probes": min(self.probes, self.gates)})

    def way(self) -> Way:
        return Way(self.selector, Without.parse(self.without))

    def pin(self) -> Pin | None:
        """What is pinned, to compare with."""
        return unpin(self.pinned, self.model) if self.pinned else None

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
        return urlencode({key: _short(value) for key, value in changed.items()}, quote_via=quote, safe=" /")

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
