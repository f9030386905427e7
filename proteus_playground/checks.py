"""What many arguments have in common, refused in the same words everywhere."""

from __future__ import annotations


def whole_number(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise `TypeError` or `ValueError` unless `value` is a whole number from `low` to `high`; None sets no end."""
    allowed = f"a whole number >= {low}" if high is None else f"a whole number in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: must be {allowed}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name}={value!r}: must be {allowed}")
