"""The words of the shelves, as `words.toml` holds them."""

from __future__ import annotations

import tomllib
from importlib.resources import files

_lists = tomllib.loads((files(__package__) / "words.toml").read_text(encoding="utf-8"))
KINDS, DISHES, THINGS, NAMES, PLACES, SIDES, DAYS = (
    _lists[name].split() for name in ("kinds", "dishes", "things", "names", "places", "sides", "days")
)
NUMBERS = [str(n) for n in range(2, 100)]
