"""Kills a resumable run again and again, at random moments, and lets it go on."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

# Every life is forked from a server that has imported these, and has not begun to compute: a process with threads that
# compute cannot be forked.
PRELOADED = ["torch", "pytest", "typer.testing", "proteus_playground.cli.app", "proteus_playground.lm.training"]
STUCK_SECONDS = 120.0  # without a step, after which a life counts as stuck


def _live(work: Callable, folder, told: Connection, most: int | None) -> None:
    """Runs `work(folder, step)`. From its step `most` + 1 on, the process waits to be killed."""
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        if most is not None and taken > most:
            told.poll(None)  # ends by itself only if the test's process is gone
            raise EOFError("the test has ended")
        if most is not None:
            told.send_bytes(b".")

    if most is not None:
        told.send_bytes(b".")  # begun
    work(folder, step)


def run_through_kills(work: Callable, folder, kills: int, span: int, seed: int = 0) -> list[int]:
    """Runs `work(folder, step)` in one process after another, of which the first `kills` are killed, until one ends.

    `work` goes on from what it finds in `folder`, and calls `step()` once in each step. A life is killed some moment
    after it has begun step n, where n is drawn from 0 (its start) to `span`; the moment is drawn from the time that
    its last step took. It never begins more than n + 1 steps, however late the kill comes on a busy machine. So the
    work needs more than kills * (span + 1) steps. Returns each n. `work` must be a function of a module.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork, for many processes that start at once")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    draw = random.Random(seed)
    moments = [draw.randint(0, span) for _ in range(kills)]
    for moment in [*moments, None]:
        here, there = context.Pipe()
        most = None if moment is None else moment + 1
        life = context.Process(target=_live, args=(work, folder, there, most), daemon=True)
        life.start()
        there.close()
        try:
            if moment is not None:
                time.sleep(draw.random() * _time_of_step(here, moment))
                life.kill()
            life.join(STUCK_SECONDS)
            assert life.exitcode == (0 if moment is None else -9), f"exit code {life.exitcode} at step {moment}"
        finally:
            life.kill()
            here.close()
    return moments


def _time_of_step(here: Connection, steps: int) -> float:
    """Waits until `steps` steps have begun; the seconds since the one before."""
    before = now = time.monotonic()
    for _ in range(1 + steps):
        assert here.poll(STUCK_SECONDS), "stuck"
        try:
            here.recv_bytes()
        except EOFError as err:
            raise AssertionError(f"ended before step {steps}: too few steps, or an error of its own") from err
        before, now = now, time.monotonic()
    return now - before
