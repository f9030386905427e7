"""Latest wins: one thread that computes, and a promise that nobody sees an overtaken result."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LANES = ("load", "frame", "ask", "model", "repeat")  # in the order in which waiting requests are served
IDLE_SECONDS = 10.0  # after which the thread ends; the next request starts another


@dataclass
class Request:
    """A job and what to do with its outcome.

    `compute(stop, progress)` runs on the worker, the rest on the kernel's thread.
    """

    number: int
    lane: str
    compute: Callable[[Callable[[], bool], Callable[[float, str], None]], Any]
    done: Callable[[int, Any], None]
    failed: Callable[[int, BaseException], None]
    progress: Callable[[int, float, str], None]
    stopped: bool = False
    overtaken_at: float | None = field(default=None)


def on_kernel_thread() -> Callable[[Callable[[], None]], None]:
    """How to run something where widgets may be touched: the running event loop, or at once where there is none.

    A kernel runs its cells and its widgets' messages on one asyncio loop, so what is posted there never
    meets a half-made change; a plain script or a test has no loop and one thread is as good as another.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return lambda call: call()

    def post(call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the kernel is going, nobody looks
            loop.call_soon_threadsafe(call)

    return post


def settle() -> None:
    """Make this process answer a drag evenly: leave the browser a core, and keep memory once it has been asked for.

    Two compute threads beside a busy browser wait for each other at every step, and glibc hands large blocks back
    to the system after each use, which costs a tenth to a quarter of a small layer's time to fetch again.
    """
    import torch

    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) - 1)))
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc: nothing to settle
        libc = ctypes.CDLL("libc.so.6")
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            libc.mallopt(option, 512 << 20)


class Worker:
    """Runs requests one by one; in each lane only the newest one waits.

    A running request that a newer one of its lane has waited for longer than `patience` seconds is stopped
    and its result dropped; a quicker one is still drawn, so that pictures follow a drag. `pace` blocks after a
    result until it has been painted, so that a slow browser is never sent more than it can draw.
    """

    def __init__(self, *, patience: float = 0.15, pace: Callable[[], None] | None = None):
        self.patience = patience
        self.started = 0  # requests begun, for tests and the curious
        self._post = on_kernel_thread()
        self._pace = pace or (lambda: None)
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Request] = {}
        self._posted: dict[int, Request] = {}  # done, but not yet heard of on the kernel's thread
        self._running: Request | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def submit(self, lane: str, compute, done, failed, progress=lambda n, share, what: None) -> int:
        """Queues a job, overtakes what waits in its lane, and returns its number."""
        with self._changed:
            request = Request(next(self._numbers), lane, compute, done, failed, progress)
            self._waiting[lane] = request
            running = self._running
            if running is not None and running.lane == lane and running.overtaken_at is None:
                running.overtaken_at = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="proteus-worker", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return request.number

    def cancel(self, *lanes: str) -> bool:
        """Stops what runs, forgets what waits or is yet to be shown, in `lanes` or in all. False: nothing did."""
        with self._changed:
            known = [*self._waiting.values(), *self._posted.values(), self._running]
            gone = [r for r in known if r is not None and r.lane in (lanes or LANES) and not r.stopped]
            for lane in lanes or LANES:
                self._waiting.pop(lane, None)
            for request in gone:
                request.stopped = True
            self._changed.notify_all()
        return bool(gone)

    @property
    def busy(self) -> str | None:
        """The lane of the request that runs, if one does that nobody has stopped."""
        running = self._running
        return running.lane if running is not None and not running.stopped else None

    def wait(self, timeout: float = 60.0) -> None:
        """Blocks until nothing runs or waits. For scripts and tests: inside a kernel it would block the drawing."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._waiting and self._running is None, timeout):
                raise TimeoutError(f"the worker was still busy after {timeout:g} s")

    def _gone(self, request: Request) -> bool:
        late = request.overtaken_at is not None and time.monotonic() - request.overtaken_at > self.patience
        return request.stopped or late

    def _next(self) -> Request | None:
        with self._changed:
            self._running = None
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: bool(self._waiting), IDLE_SECONDS):
                self._thread = None
                return None
            lane = next(lane for lane in LANES if lane in self._waiting)
            self._running = self._waiting.pop(lane)
            self.started += 1
            return self._running

    def _work(self) -> None:
        settle()
        while (request := self._next()) is not None:
            self._run(request)

    def _run(self, request: Request) -> None:
        def progress(share: float, what: str) -> None:
            self._post(lambda: None if self._gone(request) else request.progress(request.number, share, what))

        try:
            result = request.compute(lambda: self._gone(request), progress)
        except Exception as err:  # whatever a stopped job raises is no news
            failure = err
            self._hand_over(request, lambda: request.failed(request.number, failure))
            return
        if self._hand_over(request, lambda: self._deliver(request, result)):
            self._pace()

    def _hand_over(self, request: Request, call: Callable[[], None]) -> bool:
        """Runs `call` on the kernel's thread, until when it can be cancelled. False: nobody wants it any more."""
        if self._gone(request):
            return False
        with self._changed:
            self._posted[request.number] = request

        def take() -> None:
            with self._changed:
                self._posted.pop(request.number, None)
            if not request.stopped:
                call()

        self._post(take)
        return True

    @staticmethod
    def _deliver(request: Request, result) -> None:
        try:
            request.done(request.number, result)
        except Exception as err:  # a picture that cannot be drawn must be said, not lost with its thread
            request.failed(request.number, err)
