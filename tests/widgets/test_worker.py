"""The worker: the newest request wins, stopped jobs hold nothing, memory and threads are given back."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from proteus_playground.widgets.parts import worker as parts_worker
from proteus_playground.widgets.parts.worker import Worker

from proteus_playground.common.progress import Stopped


def test_an_overtaken_result_is_dropped_and_a_quick_one_is_drawn():
    worker, drawn = Worker(patience=0.05), []

    def job(seconds):
        def compute(stop, progress):
            time.sleep(seconds)
            return seconds

        return compute

    worker.submit("frame", job(0.3), lambda n, r: drawn.append(r), lambda n, e: None)
    time.sleep(0.05)
    worker.submit("frame", job(0.01), lambda n, r: drawn.append(r), lambda n, e: None)
    worker.wait(5)
    assert drawn == [0.01]
    worker.submit("frame", job(0.03), lambda n, r: drawn.append(r), lambda n, e: None)
    time.sleep(0.01)
    worker.submit("frame", job(0.02), lambda n, r: drawn.append(r), lambda n, e: None)
    worker.wait(5)
    assert drawn == [0.01, 0.03, 0.02]


def test_a_result_can_be_cancelled_until_it_is_shown():
    async def run() -> None:
        worker, heard = Worker(), []
        worker.submit("frame", lambda stop, progress: 1, lambda n, r: heard.append(r), lambda n, e: heard.append(e))
        worker.wait(5)  # the loop is held up meanwhile: the result is there, and nobody has heard of it
        assert worker.cancel("frame") and not worker.cancel("frame")
        await asyncio.sleep(0.05)
        assert heard == []

    asyncio.run(run())


def test_cancel_stops_what_runs_and_forgets_what_waits():
    worker, heard = Worker(), []

    def forever(stop, progress):
        while not stop():
            time.sleep(0.005)
        raise RuntimeError("stopped")

    worker.submit("model", forever, lambda n, r: heard.append(r), lambda n, e: heard.append(e))
    time.sleep(0.05)
    worker.submit("frame", forever, lambda n, r: heard.append(r), lambda n, e: heard.append(e))
    worker.cancel()
    worker.wait(5)
    assert heard == []


def test_a_worker_puts_back_the_number_of_threads():
    seen, here = [], torch.get_num_threads()

    def compute(stop, progress):
        seen.append(torch.get_num_threads())
        return torch.get_num_threads()

    def after(number, result):
        seen.append(torch.get_num_threads())

    worker = Worker()
    for _ in range(2):
        worker.submit("frame", compute, after, lambda *_: None)
        worker.wait(5)
    inside, outside = seen[0::2], seen[1::2]
    assert len(seen) == 4 and len(set(inside)) == len(set(outside)) == 1 and inside[0] <= outside[0]
    assert torch.get_num_threads() == here
    worker.close()


def test_a_closed_worker_runs_nothing_and_its_thread_ends():
    worker, heard = Worker(), []

    def forever(stop, progress):
        while not stop():
            time.sleep(0.005)

    worker.submit("model", forever, lambda *_: heard.append("done"), lambda *_: heard.append("failed"))
    thread = worker._thread
    time.sleep(0.02)
    worker.close()
    thread.join(5)
    assert not thread.is_alive() and heard == []
    worker.submit("model", forever, lambda *_: heard.append("done"), lambda *_: heard.append("failed"))
    worker.wait(1)
    assert heard == [] and worker._thread is None


def test_what_a_stopped_job_held_is_freed_at_once():
    worker, held = Worker(), []

    def compute(stop, progress):
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        while not stop():
            time.sleep(0.005)
        raise Stopped

    gc.disable()
    try:
        worker.submit("frame", compute, lambda *_: None, lambda *_: None)
        while not held:
            time.sleep(0.005)
        worker.cancel()
        worker.wait(5)
        assert held[0]() is None
    finally:
        gc.enable()
        worker.close()


def test_memory_is_handed_back_when_no_request_has_come_for_a_while(monkeypatch):
    """The time that a request runs counts: it is measured from the moment that the last one came."""
    handed, now = threading.Event(), [0.0]
    monkeypatch.setattr(parts_worker, "hand_back_memory", handed.set)
    monkeypatch.setattr(parts_worker, "QUIET_SECONDS", 1000.0)
    monkeypatch.setattr(parts_worker, "time", SimpleNamespace(monotonic=lambda: now[0]))
    worker = Worker()

    def compute(stop, progress):
        now[0] += 2000

    worker.submit("frame", compute, lambda *_: None, lambda *_: None)
    assert handed.wait(20)
    worker.close()


HEAP = """
import asyncio
import ctypes
from proteus_playground.widgets.parts import worker

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", *"abcdef")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes = Info, ctypes.c_void_p, [ctypes.c_size_t]
libc.mallopt(-3, 32 << 20)  # where glibc's own limit ends
mapped = [libc.mallinfo2().hblks]
for prepare in (lambda: None, worker.map_large_blocks):
    prepare()
    libc.malloc(64 * worker.LARGE - 4096)
    mapped.append(libc.mallinfo2().hblks)
print(mapped[1] - mapped[0], mapped[2] - mapped[1])
"""


def test_a_large_block_lies_outside_the_heaps():
    """In a process of its own, whose heap has no large gap that a block would fill."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("needs glibc 2.33 or later")
    said = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["0", "1"], said
