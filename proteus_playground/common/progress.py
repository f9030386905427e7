"""Progress callbacks and cancellation for long-running jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[float, str], None]  # share done in [0, 1], one plain sentence
Stop = Callable[[], bool]  # True: end at the next safe point


class Stopped(Exception):
    """Raised when the caller's `stop` returned True; no unfinished result was kept."""


def check_stop(stop: Stop | None) -> None:
    """Raise `Stopped` if `stop()` returns True."""
    if stop is not None and stop():
        raise Stopped("stopped on request")


def tell(progress: Progress | None, share: float, sentence: str) -> None:
    """Report the share done and what is being done, unless `progress` is None."""
    if progress is not None:
        progress(share, sentence)


@contextmanager
def resumable(
    goes_on: str = "The same command goes on from here.", *, report: Callable[[], object] | None = None
) -> Iterator[None]:
    """Around the work of a command that continues where it stopped: Ctrl-C and `Stopped` end the block with exit 130.

    report: called after the block, whether it was finished or stopped, but not after an error. goes_on: the sentence
    printed on stderr after "Stopped."; an empty one prints nothing. Raises `typer.Exit`.
    """
    stopped = False
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        stopped = True
    if report is not None:
        report()
    if stopped:
        import typer  # here, because libraries import this module without the command line

        if goes_on:
            typer.echo(f"Stopped. {goes_on}", err=True)
        raise typer.Exit(130)
