"""One thread that computes for a panel. The newest request wins: a result that was overtaken is never drawn."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

LANES = (
    "load",
    "pinned",
    "frame",
    "next",
    "ask",
    "model",
    "curve",
    "repeat",
    "loss",
)  # in the order in which waiting requests are served
QUIET_SECONDS = 2.0  # without a new request, after which freed memory is handed back, once no request runs
IDLE_SECONDS = 10.0  # then, after which the thread ends; the next request starts another


@dataclass
class Request:
    """A job and the functions that receive its outcome.

    `compute(stop, progress)` runs on the worker's thread; the other functions run on the kernel's thread.
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
    """A function that runs its argument where widgets may be changed: on the running event loop, else at once.

    A kernel runs its cells and the messages of its widgets on one asyncio loop, so a function that is posted there
    never sees a half-made change. A plain script or a test has no loop, and may change widgets on any thread.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return lambda call: call()

    def post(call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed because the kernel is shutting down
            loop.call_soon_threadsafe(call)

    return post


@contextlib.contextmanager
def one_core_left() -> Iterator[None]:
    """Inside, torch computes with one thread fewer than there are cores; afterwards with as many as before.

    Threads that have computed before keep their own number, for instance the one that runs a notebook's cells; a thread
    that computes for the first time meanwhile takes the smaller number. Fewer threads are needed because the browser
    draws while a layer runs, and two compute threads that share two cores with it wait for each other at every step:
    a layer of shelf-mini over 1,024 tokens on two busy cores took 94 ms with one thread and 1,006 ms with two (medians
    of 35 runs).
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, (os.cpu_count() or 2) - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


LARGE = 1 << 19  # bytes from which glibc gives a block a mapping of its own
UNUSED = 8 << 20  # bytes free at the end of a heap, from which glibc hands them back
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def map_large_blocks() -> None:
    """Makes glibc keep large blocks out of its heaps, for the whole process; elsewhere does nothing.

    By itself glibc raises its limit for such blocks to 32 MB. The temporary tensors of a layer then lie in the heap of
    the worker's thread, between small blocks that stay, and `malloc_trim` does not hand back the free end of a thread's
    heap: after 5,000 moves of the sliders that heap had 129 MB, 32 MB of them in use. The limit for the free end is set
    too, because the first call would fix it at 128 kB, and a layer would take longer.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGE)
        mallopt(_M_TRIM_THRESHOLD, UNUSED)


def hand_back_memory() -> None:
    """Hands freed memory back to the system, in about 10 ms, where glibc would keep it; elsewhere does nothing.

    The tensors of a picture have other sizes at each setting, so glibc keeps many gaps that it cannot fill: after 4,000
    moves of the sliders a kernel held 650 MB, and 569 MB once they were handed back.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class Worker:
    """Runs requests one by one; in each lane only the newest one waits.

    A running request is stopped and its result dropped once a newer one of its lane has waited for `patience` seconds.
    A quicker one is still drawn, so that pictures follow a drag. `pace` blocks after a result until the browser has
    painted it, so that a slow browser is never sent more than it can draw.
    """

    def __init__(self, *, patience: float = 0.15, pace: Callable[[], None] | None = None):
        self.patience = patience
        self.started = 0  # requests begun
        self._post = on_kernel_thread()
        self._pace = pace or (lambda: None)
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Request] = {}
        self._posted: dict[int, Request] = {}  # computed, but not yet shown on the kernel's thread
        self._running: Request | None = None
        self._asked = 0.0  # when the newest request came, on the monotonic clock
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._closed = False

    def submit(self, lane: str, compute, done, failed, progress=lambda n, share, what: None) -> int:
        """Queues a job in place of the one that waits in its lane; returns its number. A closed worker runs none."""
        with self._changed:
            request = Request(next(self._numbers), lane, compute, done, failed, progress)
            if self._closed:
                return request.number
            self._waiting[lane], self._asked = request, time.monotonic()
            running = self._running
            if running is not None and running.lane == lane and running.overtaken_at is None:
                running.overtaken_at = time.monotonic()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="proteus-worker", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return request.number

    def cancel(self, *lanes: str) -> bool:
        """Stops the running request, and drops those that wait or are not shown yet, in `lanes` or in all lanes.

        Returns whether there was any.
        """
        with self._changed:
            known = [*self._waiting.values(), *self._posted.values(), self._running]
            gone = [r for r in known if r is not None and r.lane in (lanes or LANES) and not r.stopped]
            for lane in lanes or LANES:
                self._waiting.pop(lane, None)
            for request in gone:
                request.stopped = True
            self._changed.notify_all()
        return bool(gone)

    def close(self) -> None:
        """Cancels everything and ends the thread as soon as the running request has stopped."""
        with self._changed:
            self._closed = True
        self.cancel()

    @property
    def busy(self) -> str | None:
        """The lane of the running request; None if none runs or it has been stopped."""
        running = self._running
        return running.lane if running is not None and not running.stopped else None

    def wait(self, timeout: float = 60.0) -> None:
        """Blocks until nothing runs or waits, for scripts and tests; in a kernel it would block the drawing.

        TimeoutError after `timeout` seconds.
        """
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
            asked = self._wait_for_request(self._asked + QUIET_SECONDS - time.monotonic())
        if not asked:
            hand_back_memory()
        with self._changed:
            self._wait_for_request(IDLE_SECONDS)
            if not self._waiting:
                self._thread = None
                return None
            lane = next(lane for lane in LANES if lane in self._waiting)
            self._running = self._waiting.pop(lane)
            self.started += 1
            return self._running

    def _wait_for_request(self, seconds: float) -> bool:
        return bool(self._changed.wait_for(lambda: self._waiting or self._closed, seconds))

    def _work(self) -> None:
        map_large_blocks()
        while (request := self._next()) is not None:
            self._run(request)
            del request  # while the thread waits it keeps nothing of the last panel or model

    def _run(self, request: Request) -> None:
        def progress(share: float, what: str) -> None:
            self._post(lambda: None if self._gone(request) else request.progress(request.number, share, what))

        try:
            with one_core_left():
                result = request.compute(lambda: self._gone(request), progress)
        except Exception as err:  # `_hand_over` drops what a stopped job raises
            # Not in a variable of this frame, which the error's traceback refers to: only Python's collector would free
            # such a ring, and with it all that the stopped job held.
            self._hand_over(request, partial(request.failed, request.number, err))
            return
        if self._hand_over(request, lambda: self._deliver(request, result)):
            self._pace()

    def _hand_over(self, request: Request, call: Callable[[], None]) -> bool:
        """Posts `call` to the kernel's thread; it can be cancelled until it runs. False: it was cancelled already."""
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
        except Exception as err:  # show that a picture could not be drawn; an exception would be lost with the thread
            request.failed(request.number, err)
