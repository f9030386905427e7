"""Argument checks with uniform error messages."""

from __future__ import annotations

from math import inf, isfinite


def whole_number(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise `TypeError` or `ValueError` unless `value` is a whole number in [low, high]; None sets no upper limit."""
    allowed = f"a whole number >= {low}" if high is None else f"a whole number in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: must be {allowed}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r}: must be {allowed}")


def real_number(name: str, value: object, low: float, high: float = inf, *, above: bool = False) -> float:
    """Return `value` as a float. Raise `TypeError` or `ValueError` unless it is finite and in [low, high].

    above: exclude `low` itself.
    """
    allowed = f"{'>' if above else '>='} {low} and " + ("finite" if high == inf else f"<= {high}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: must be a number {allowed}")
    if not (low < value if above else low <= value) or value > high or not isfinite(value):
        raise ValueError(f"{name}={value!r}: must be {allowed}")
    return float(value)
