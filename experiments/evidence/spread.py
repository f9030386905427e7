"""Do tasks in several processes, each on one device: the GPUs in turn, or the CPU with one thread."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from typing import TypeVar

import torch

from ...common.progress import Stop, check_stop

Item, Result = TypeVar("Item"), TypeVar("Result")
SECONDS = 0.5  # between two looks at `stop`
_device = "cpu"  # of this process, once it is one of several


def spread(
    task: Callable[[Item, str], Result], items: Iterable[Item], device: str, processes: int, stop: Stop | None = None
) -> Iterator[Result]:
    """`task(item, device of its process)` for every item, in the order in which they are done.

    task: a function or a `partial` that can be pickled. The first error ends the work, as does `stop` (`Stopped`); the
    processes are then terminated.
    """
    others = set(multiprocessing.active_children())
    count = torch.cuda.device_count() if device.startswith("cuda") else 0
    spawn = multiprocessing.get_context("spawn")
    devices = spawn.Queue()
    for i in range(processes):
        devices.put(f"cuda:{i % count}" if count else device)
    with ProcessPoolExecutor(processes, spawn, initializer=_begin, initargs=(devices,)) as pool:
        waiting = {pool.submit(_on_own_device, task, item) for item in items}
        try:
            while waiting:
                check_stop(stop)
                done, waiting = wait(waiting, SECONDS, FIRST_COMPLETED)
                yield from (each.result() for each in done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # what it trains is saved every half minute
            raise


def _begin(devices) -> None:
    global _device
    _device = devices.get()
    torch.set_num_threads(1)
    if _device.startswith("cuda"):
        torch.cuda.set_device(_device)


def _on_own_device(task: Callable[[Item, str], Result], item: Item) -> Result:
    return task(item, _device)
