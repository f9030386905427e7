"""A number in a dataclass of settings: its default, its range, its unit, and the check."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isfinite

from ..common.checks import whole_number


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high` in some `unit`; an end marked `open` is not included."""

    low: float
    high: float
    open_low: bool
    open_high: bool
    unit: str
    none: str  # what None means, for an error message

    def check(self, name: str, value: object) -> None:
        """Raise `TypeError` or `ValueError`, which name the argument, its value and what is allowed."""
        if isinstance(self.low, int):
            whole_number(name, value, self.low)
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}={value!r}: expected a number {self._allowed()}")
        too_low = value <= self.low if self.open_low else value < self.low
        too_high = value >= self.high if self.open_high else value > self.high
        if not isfinite(value) or too_low or too_high:
            raise ValueError(f"{name}={value!r}: must be {self._allowed()}")

    def _allowed(self) -> str:
        if self.high == inf:
            ends = f"{'>' if self.open_low else '>='} {self.low:g} and finite"
        else:
            ends = f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        return f"{ends}, or None {self.none}" if self.none else ends


def knob(default, low, high=inf, *, open_low=False, open_high=False, unit="", none="", repr=True):
    """A number of `AttentionConfig` with its `Range`; a `low` written without a point makes it a whole number.

    unit: what the number counts. none: what None means, for the error message of a field that allows it.
    """
    allowed = Range(low, high, open_low, open_high, unit, none)
    return field(default=default, repr=repr, metadata={"range": allowed})
