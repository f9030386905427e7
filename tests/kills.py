"""Kills a resumable run again and again, at random moments, and lets it go on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

STUCK_SECONDS = 120.0  # without a step, after which a life counts as stuck


def run_through_kills(work: Callable, folder, kills: int, span: int, seed: int = 0) -> None:
    """Runs `work(folder, step)` in one process after another, of which the first `kills` are killed, until one ends.

    `work` goes on from what it finds in `folder`, and calls `step()` once in each step. A life is killed some moment
    after it has begun step n, where n is drawn from 0 (its start) to `span`; the moment is drawn from the time that
    its last step took. It never begins more than n + 1 steps, however late the kill comes on a busy machine. So the
    work needs more than kills * (span + 1) steps. `work` must be a function of a module, which is imported once, into
    a process of its own: all lives are forked from there, because a process with threads that compute cannot be forked.
    """
    if not hasattr(os, "fork"):
        pytest.skip("needs fork, for many processes that start at once")
    source = multiprocessing.get_context("spawn").Process(target=_all_lives, args=(work, folder, kills, span, seed))
    source.start()
    source.join()
    assert source.exitcode == 0, "a life failed, or was not killed in time: its error is in stderr"


def _all_lives(work: Callable, folder, kills: int, span: int, seed: int) -> None:
    context, draw = multiprocessing.get_context("fork"), random.Random(seed)
    for moment in [*(draw.randint(0, span) for _ in range(kills)), None]:
        here, there = context.Pipe()
        life = context.Process(target=_live, args=(work, folder, here, there, moment), daemon=True)
        life.start()
        there.close()
        if moment is not None:
            time.sleep(draw.random() * _time_of_step(here, moment))
            life.kill()
        life.join(STUCK_SECONDS)
        here.close()
        assert life.exitcode == (0 if moment is None else -signal.SIGKILL), f"exit code {life.exitcode} at {moment}"


def _live(work: Callable, folder, here: Connection, there: Connection, moment: int | None) -> None:
    """Runs the work and tells of each step. After step `moment` + 1 the process waits to be killed."""
    here.close()
    taken, one_at_a_time = 0, threading.Lock()

    def step() -> None:
        nonlocal taken
        if moment is None:
            return
        with one_at_a_time:
            taken += 1
            if taken > moment + 1:
                there.poll(None)  # returns only if the process at the other end is gone
                raise EOFError("the test has ended")
            there.send_bytes(b".")

    if moment is not None:
        there.send_bytes(b".")  # begun
    work(folder, step)


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
