"""Measured run times: the median of the last few runs, and waiting for a device."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from statistics import median
from time import perf_counter

import torch

RUNS = 5  # run times kept per kind of work and settings
KEYS = 128  # pairs of kind and settings that are kept


class Stopwatch:
    """Median wall time of each kind of work at each setting on one device, warm-up excluded."""

    def __init__(self, device: torch.device):
        self._device = device
        self._warm: set[str] = set()
        self._runs: OrderedDict[tuple[str, Hashable], deque[float]] = OrderedDict()

    def run(self, kind: str, settings: Hashable, work: Callable[[], object]) -> tuple[object, float]:
        """Call `work`; return its result and the median of its last `RUNS` times at these settings, in milliseconds.

        On a GPU the first run at new settings is not counted, because kernels are chosen and may be compiled for
        each shape. On a CPU only the first run of a kind is not counted.
        """
        key = (kind, settings)
        if kind not in self._warm or (self._device.type != "cpu" and key not in self._runs):
            work()
            self._warm.add(kind)
        result, ms = self._timed(work)
        self._runs.setdefault(key, deque(maxlen=RUNS)).append(ms)
        self._runs.move_to_end(key)
        while len(self._runs) > KEYS:
            self._runs.popitem(last=False)
        return result, self.median(kind, settings)

    def count(self, kind: str, settings: Hashable) -> int:
        """How many runs the median is taken from."""
        return len(self._runs.get((kind, settings), ()))

    def median(self, kind: str, settings: Hashable) -> float:
        """The median in milliseconds. Raises `KeyError` if this kind has not run at these settings."""
        return median(self._runs[kind, settings])

    def _timed(self, work: Callable[[], object]) -> tuple[object, float]:
        wait(self._device)
        start = perf_counter()
        result = work()
        wait(self._device)
        return result, (perf_counter() - start) * 1e3


def wait(device: torch.device) -> None:
    """Return when the device has finished all the work it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize()
