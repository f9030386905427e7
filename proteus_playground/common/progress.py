"""How long work says where it is and hears that it should end."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, str], None]  # share done in [0, 1], one plain sentence
Stop = Callable[[], bool]  # True: end at the next safe point


class Stopped(Exception):
    """The caller's `stop` answered True; nothing half-made was kept."""


def check_stop(stop: Stop | None) -> None:
    """Raise `Stopped` if `stop` asks for it."""
    if stop is not None and stop():
        raise Stopped("stopped on request")


def tell(progress: Progress | None, share: float, sentence: str) -> None:
    if progress is not None:
        progress(share, sentence)
