"""Do tasks in several processes, each on one device: the GPUs in turn, or the CPU with one thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
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

    task: a function or a `partial` that can be pickled. processes: at most one per item is started. The first error
    ends the work, as does `stop` (`Stopped`); the processes are then terminated, as they are when this process ends.
    Raises `ChildProcessError` where one of them ends without a result.
    """
    items, others = list(items), set(multiprocessing.active_children())
    if not items:
        return
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Value("i", 0)
    with ProcessPoolExecutor(min(processes, len(items)), spawn, initializer=_begin, initargs=(device, begun)) as pool:
        waiting = {pool.submit(_on_own_device, task, item) for item in items}
        try:
            while waiting:
                check_stop(stop)
                done, waiting = wait(waiting, SECONDS, FIRST_COMPLETED)
                yield from (each.result() for each in done)
        except BaseException as problem:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # what it trains is saved every half minute
            if isinstance(problem, BrokenProcessPool):
                raise ChildProcessError(
                    f"processes={processes}: one of them ended without a result, likely for lack of memory; the same "
                    "command goes on, for instance with fewer processes"
                ) from problem
            raise


def _begin(device: str, begun) -> None:
    """In a new process: its number decides its GPU, and it ends with the process that started it."""
    global _device
    with begun.get_lock():
        number, begun.value = begun.value, begun.value + 1
    torch.set_num_threads(1)
    _device = device
    if device.startswith("cuda"):
        _device = f"cuda:{number % torch.cuda.device_count()}"
        torch.cuda.set_device(_device)
    Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _on_own_device(task: Callable[[Item, str], Result], item: Item) -> Result:
    return task(item, _device)
