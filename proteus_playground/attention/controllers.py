"""Keep a layer or a model on a target by nudging one knob between calls, until it settles.

Every knob is a row of whole-numbered settings, dearer as they grow. A damped step goes towards the target, longer while
the target stays on one side, and never past a setting that is known to be on the other side of it: so the search
narrows. Where no setting hits the target the dearest one below it stays. A dearer setting must cost more, or as much.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, log
from statistics import median
from time import perf_counter

import torch
from torch import nn

from ..common.checks import real_number, whole_number
from ..common.timing import wait
from .budget import check_alpha
from .layer import ProteusAttention

KNOBS = {"alpha": "flux_alpha", "shortlist": "shortlist", "heads": "heads_awake_max"}  # fields of AttentionConfig
STEPS = 256  # settings of alpha
WINDOW = {"density": 1, "latency_ms": 5, "memory_bytes": 1}  # calls whose median counts


@dataclass(frozen=True)
class Decision:
    """What a controller did after a call, and why."""

    target: str  # 'density', 'latency_ms' or 'memory_bytes'
    goal: float  # share, milliseconds or bytes
    measured: float  # median of the last calls at this setting
    knob: str  # 'alpha', 'shortlist' or 'heads'
    before: float  # its value in the call
    after: float  # its value from now on
    settled: bool  # it stays until the measurement changes
    reason: str  # one plain sentence


class SparseHeadController:
    """Nudges flux alpha, the shortlist L or the most heads awake of every layer in `module` towards one target.

    `controller(x)` calls the module and returns its output and a `Decision`; or measure yourself and `update(value)`.
    Targets, exactly one: density, the share in (0, 1] of dense causal attention's reads that are done
    (`AttentionStats.density`), hit from either side; latency_ms, per call; memory_bytes, the most that a call
    allocates on an NVIDIA or AMD GPU (anywhere else measure yourself, say a state's nbytes). The last two are budgets,
    aimed at from below. knob: 'alpha', 'shortlist' (needs alpha > 0), 'heads' (the same, and a router). low, high: the
    knob's bounds in its own units, by default alpha in [0, 1], L from an eighth to eight times what it is, heads from
    heads_awake_min to H/G. tolerance: share of the goal that counts as hit. damping: share of the estimated way that is
    gone at once, in (0, 1]. Raises `TypeError` or `ValueError` naming the argument.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        density: float | None = None,
        latency_ms: float | None = None,
        memory_bytes: int | None = None,
        knob: str = "alpha",
        low: float | None = None,
        high: float | None = None,
        tolerance: float = 0.05,
        damping: float = 0.5,
        clock: Callable[[], float] = perf_counter,
    ):
        goals = {"density": density, "latency_ms": latency_ms, "memory_bytes": memory_bytes}
        most = {"density": 1}
        given = {
            name: real_number(name, goal, 0, most.get(name, inf), above=True)
            for name, goal in goals.items()
            if goal is not None
        }
        if len(given) != 1:
            raise ValueError(f"{', '.join(goals)}: exactly one target must be given, got {len(given)}")
        ((self.target, self.goal),) = given.items()
        if knob not in KNOBS:
            raise ValueError(f"knob={knob!r}: must be one of {', '.join(map(repr, KNOBS))}")
        real_number("tolerance", tolerance, 0, 1, above=True)
        real_number("damping", damping, 0, 1, above=True)
        self.module, self.knob, self.damping, self.clock = module, knob, damping, clock
        self.layers = [layer for layer in module.modules() if isinstance(layer, ProteusAttention)]
        if not self.layers:
            raise ValueError(f"module={type(module).__name__}: must hold a ProteusAttention")
        self._bottom, self._top = 1 - tolerance, 1 + tolerance if self.target == "density" else 1.0
        self._low, self._high = self._bounds(low, high)
        self._set(min(max(self._setting(), self._low), self._high))
        self._seen: deque[float] = deque(maxlen=WINDOW[self.target])
        self._below = self._above = None  # settings known to be under and over the target
        self._held: float | None = None  # the share of the goal at which it settled
        self._stride, self._was_over = 1, None  # the least step: doubles while the target stays on one side

    @property
    def value(self) -> float:
        """The knob's value in force."""
        return self._value(self._now)

    def __call__(self, *args, **kwargs):
        """What the module returns for these arguments (with stats where density is the target), and the `Decision`."""
        device = self.layers[0].k_proj.weight.device
        if self.target == "density":
            out = self.module(*args, **{**kwargs, "return_stats": True})
            stats = out[1] if isinstance(out[1], tuple) else (out[1],)
            return out, self.update(sum(layer.density for layer in stats) / len(stats))
        if self.target == "memory_bytes":
            if device.type != "cuda":
                raise ValueError(f"memory_bytes on {device}: a call's memory is read on a GPU alone; use update(bytes)")
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            out = self.module(*args, **kwargs)
            return out, self.update(torch.cuda.max_memory_allocated(device) - before)
        wait(device)
        start = self.clock()
        out = self.module(*args, **kwargs)
        wait(device)
        return out, self.update((self.clock() - start) * 1e3)

    def update(self, measured: float) -> Decision:
        """Take in one call's measurement, at the setting in force, and set the knob for the next."""
        self._seen.append(real_number("measured", float(measured), 0))
        value = median(self._seen)
        if len(self._seen) < self._seen.maxlen:
            return self._decide(value, self._now, False, f"{len(self._seen)} of {self._seen.maxlen} calls measured")
        share = max(value / self.goal, 1e-9)
        if self._stays(share):
            return self._decide(value, self._now, True, "nothing changed")
        if self._bottom <= share <= self._top:
            self._held = share
            return self._decide(value, self._now, True, "on target")
        over = share > self._top
        following = self._next(share, over)
        if following == self._now:
            self._held = share
            at_bound = self._now == (self._low if over else self._high)
            return self._decide(value, following, True, "at its bound" if at_bound else "the next setting is too much")
        self._seen.clear()
        return self._decide(value, following, False, f"{'over' if over else 'under'} target")

    def _stays(self, share: float) -> bool:
        """Whether what settled has not changed since; if it has, what was known of other settings is forgotten."""
        held, self._held = self._held, None
        if held is None:
            return False
        alike = (held > self._top) == (share > self._top) and abs(share / held - 1) <= 1 - self._bottom
        if alike or self._bottom <= share <= self._top:
            self._held = held
            return True
        self._below = self._above = self._was_over = None
        return False

    def _next(self, share: float, over: bool) -> int:
        now, scale = self._now, STEPS / 4 if self.knob == "alpha" else self._now
        way = self.damping * log((self._bottom + self._top) / 2 / share) * scale
        most = max(1, (self._high - self._low) // 4)
        self._stride = min(2 * self._stride, most) if over == self._was_over else 1
        self._was_over = over
        step = min(max(abs(round(way)), self._stride), most)
        if over:
            self._above = now
            if self._below is not None and self._below >= now:
                self._below = None
            wall, bound = self._below, self._low
            return max(now - step, bound if wall is None else -(-(now + wall) // 2) if wall < now - 1 else wall)
        self._below = now
        if self._above is not None and self._above <= now:
            self._above = None
        wall, bound = self._above, self._high
        return min(now + step, bound if wall is None else (now + wall) // 2)

    def _decide(self, measured: float, following: int, settled: bool, reason: str) -> Decision:
        before = self.value
        if following != self._now:
            self._set(following)
        return Decision(self.target, self.goal, measured, self.knob, before, self.value, settled, reason)

    def _bounds(self, low: float | None, high: float | None) -> tuple[int, int]:
        """First and last setting."""
        cfg = self.layers[0].cfg
        if self.knob == "alpha":
            low, high = check_alpha(0.0 if low is None else low), check_alpha(1.0 if high is None else high)
            cheap, dear = round((1 - high) * STEPS), round((1 - low) * STEPS)
        else:
            heads = self.knob == "heads"
            least, most = (cfg.heads_awake_min, cfg.heads_per_group) if heads else (1, None)
            cheap = (least if heads else max(1, cfg.shortlist // 8)) if low is None else low
            dear = (most or cfg.shortlist * 8) if high is None else high
            whole_number("low", cheap, least, most)
            whole_number("high", dear, least, most)
        if cheap > dear:
            raise ValueError(f"low={low!r}: must be at most high={high!r}")
        return cheap, dear

    def _setting(self) -> int:
        value = getattr(self.layers[0].cfg, KNOBS[self.knob])
        if self.knob == "alpha":
            return 0 if value is None else round((1 - value) * STEPS)
        return value

    def _value(self, setting: int) -> float:
        return 1 - setting / STEPS if self.knob == "alpha" else setting

    def _set(self, setting: int) -> None:
        self._now = setting
        for layer in self.layers:
            layer.cfg = replace(layer.cfg, **{KNOBS[self.knob]: self._value(setting)})
