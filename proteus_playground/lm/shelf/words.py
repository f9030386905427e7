"""The words of the shelves, as `words.toml` holds them."""

from __future__ import annotations

import tomllib
from importlib.resources import files

KINDS, DISHES, THINGS, NAMES, PLACES, SIDES, DAYS = (
    words.split() for words in tomllib.loads((files(__package__) / "words.toml").read_text(encoding="utf-8")).values()
)  # in the order of the file
NUMBERS = [str(n) for n in range(2, 100)]
