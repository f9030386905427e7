"""How long a run takes, as the median of the last few."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from statistics import median
from time import perf_counter

import torch

RUNS = 5
KEYS = 128  # settings remembered


class Stopwatch:
    """Median wall time per kind of work and its settings, on one device, warm-up excluded."""

    def __init__(self, device: torch.device):
        self._device = device
        self._warm: set[str] = set()
        self._runs: OrderedDict[tuple[str, Hashable], deque[float]] = OrderedDict()

    def run(self, kind: str, settings: Hashable, work: Callable[[], object]) -> tuple[object, float]:
        """The result of `work` and the median of its last `RUNS` times at these settings, milliseconds.

        A GPU picks and may compile kernels for each shape, so there the first run at new settings is not
        counted; a CPU is warm after the first run of a kind.
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
        """How many runs the median stands on."""
        return len(self._runs.get((kind, settings), ()))

    def median(self, kind: str, settings: Hashable) -> float:
        """Milliseconds. Raises `KeyError` for what has not run."""
        return median(self._runs[kind, settings])

    def _timed(self, work: Callable[[], object]) -> tuple[object, float]:
        wait(self._device)
        start = perf_counter()
        result = work()
        wait(self._device)
        return result, (perf_counter() - start) * 1e3


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
