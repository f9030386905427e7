"""Keep a layer or a model on a target by changing one knob between calls, until it settles.

Every knob has whole-numbered settings; a larger one costs more, or as much. After each measurement the controller takes
a damped step towards the target. Steps grow while the target stays on one side, and never go past a setting that is
known to be on the other side, so the search narrows. Where no setting hits the target, the largest one below it is
kept.
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
ALPHA_STEPS = 256  # settings of alpha
CALLS_PER_UPDATE = {"density": 1, "latency_ms": 5, "memory_bytes": 1}  # their median is the measurement


@dataclass(frozen=True)
class Decision:
    """What a controller did after a call, and why."""

    target: str  # 'density', 'latency_ms' or 'memory_bytes'
    goal: float  # share, milliseconds or bytes
    measured: float  # median of the last calls at this setting
    knob: str  # 'alpha', 'shortlist' or 'heads'
    before: float  # its value in the call
    after: float  # its value from now on
    settled: bool  # the knob stays there until the measurement changes
    reason: str  # one plain sentence


class SparseHeadController:
    """Changes flux alpha, the shortlist L or heads_awake_max of every layer in `module` to approach one target.

    `controller(x)` calls the module and returns its output and a `Decision`. To use measurements of your own, call
    `update(value)` instead. Give exactly one target: density, the share in (0, 1] of dense causal attention's reads
    that are done (`AttentionStats.density`); latency_ms, milliseconds per call; memory_bytes, the most that a call
    allocates on an NVIDIA or AMD GPU (elsewhere use `update`, for example with a state's nbytes). Density may be
    missed on either side by `tolerance`, a share of the goal in (0, 1]; latency and memory may only be lower.

    knob: 'alpha', 'shortlist' (needs alpha > 0) or 'heads' (needs alpha > 0 and a router). low, high: the knob's bounds
    in its own units, by default alpha in [0, 1], L from an eighth to eight times its present value, heads from
    heads_awake_min to H/G. damping: share of the estimated distance to the target that one step covers, in (0, 1].
    Raises `TypeError` or `ValueError` naming the argument.
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
        given = {
            name: real_number(name, goal, 0, 1 if name == "density" else inf, above=True)
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
        self._least_share = 1 - tolerance  # shares of the goal between these two count as hit
        self._most_share = 1 + tolerance if self.target == "density" else 1.0
        self._low, self._high = self._bounds(low, high)
        self._set(min(max(self._setting(), self._low), self._high))
        self._measured: deque[float] = deque(maxlen=CALLS_PER_UPDATE[self.target])
        self._under = self._over = None  # settings known to be under and over the target
        self._settled_share: float | None = None  # of the goal, measured when the knob settled
        self._least_step, self._was_over = 1, None  # the step doubles while the target stays on one side

    @property
    def value(self) -> float:
        """The knob's present value."""
        return self._value(self._now)

    def __call__(self, *args, **kwargs):
        """The module's output for these arguments (with stats where density is the target), and the `Decision`."""
        device = self.layers[0].k_proj.weight.device
        if self.target == "density":
            out = self.module(*args, **{**kwargs, "return_stats": True})
            stats = out[1] if isinstance(out[1], tuple) else (out[1],)
            return out, self.update(sum(layer.density for layer in stats) / len(stats))
        if self.target == "memory_bytes":
            if device.type != "cuda":
                raise ValueError(f"memory_bytes on {device}: only a GPU can measure a call's memory; use update(bytes)")
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
        """Use one call's measurement, made at the present setting, to choose the setting for the next call."""
        self._measured.append(real_number("measured", float(measured), 0))
        value = median(self._measured)
        calls, needed = len(self._measured), CALLS_PER_UPDATE[self.target]
        if calls < needed:
            return self._decide(value, self._now, False, f"{calls} of {needed} calls measured")
        share = max(value / self.goal, 1e-9)
        if self._stays(share):
            return self._decide(value, self._now, True, "nothing changed")
        if self._least_share <= share <= self._most_share:
            self._settled_share = share
            return self._decide(value, self._now, True, "on target")
        over = share > self._most_share
        next_setting = self._next(share, over)
        if next_setting == self._now:
            self._settled_share = share
            at_bound = self._now == (self._low if over else self._high)
            reason = "at its bound" if at_bound else "the next setting is too much"
            return self._decide(value, next_setting, True, reason)
        self._measured.clear()
        return self._decide(value, next_setting, False, f"{'over' if over else 'under'} target")

    def _stays(self, share: float) -> bool:
        """Whether the knob had settled and the measurement has not changed since.

        If it has changed, what was measured at other settings no longer holds and is discarded.
        """
        before, self._settled_share = self._settled_share, None
        if before is None:
            return False
        same_side = (before > self._most_share) == (share > self._most_share)
        alike = same_side and abs(share / before - 1) <= 1 - self._least_share
        if alike or self._least_share <= share <= self._most_share:
            self._settled_share = before
            return True
        self._under = self._over = self._was_over = None
        return False

    def _next(self, share: float, over: bool) -> int:
        """The next setting, where the present one measured `share` of the goal."""
        now, scale = self._now, ALPHA_STEPS / 4 if self.knob == "alpha" else self._now
        distance = self.damping * log((self._least_share + self._most_share) / 2 / share) * scale
        longest = max(1, (self._high - self._low) // 4)
        self._least_step = min(2 * self._least_step, longest) if over == self._was_over else 1
        self._was_over = over
        step = min(max(abs(round(distance)), self._least_step), longest)
        if over:
            self._over = now
            if self._under is not None and self._under >= now:  # it contradicts this measurement
                self._under = None
            return max(now - step, self._low if self._under is None else self._between(self._under, now))
        self._under = now
        if self._over is not None and self._over <= now:
            self._over = None
        return min(now + step, self._high if self._over is None else self._between(self._over, now))

    @staticmethod
    def _between(known: int, now: int) -> int:
        """Half way from `now` to a setting known to be on the other side of the target.

        Of two neighbours it is the smaller one: it is under the target.
        """
        if known < now:
            return -(-(now + known) // 2) if known < now - 1 else known
        return (now + known) // 2

    def _decide(self, measured: float, setting: int, settled: bool, reason: str) -> Decision:
        before = self.value
        if setting != self._now:
            self._set(setting)
        return Decision(self.target, self.goal, measured, self.knob, before, self.value, settled, reason)

    def _bounds(self, low: float | None, high: float | None) -> tuple[int, int]:
        """First and last setting."""
        cfg = self.layers[0].cfg
        if self.knob == "alpha":
            low, high = check_alpha(0.0 if low is None else low), check_alpha(1.0 if high is None else high)
            first, last = round((1 - high) * ALPHA_STEPS), round((1 - low) * ALPHA_STEPS)  # a larger alpha costs less
        else:
            if self.knob == "heads":
                least, most = cfg.heads_awake_min, cfg.heads_per_group
                default_first, default_last = least, most
            else:
                least, most = 1, None
                default_first, default_last = max(1, cfg.shortlist // 8), cfg.shortlist * 8
            first = default_first if low is None else low
            last = default_last if high is None else high
            whole_number("low", first, least, most)
            whole_number("high", last, least, most)
        if first > last:
            raise ValueError(f"low={low!r}: must be at most high={high!r}")
        return first, last

    def _setting(self) -> int:
        """The setting nearest to the first layer's value of the knob."""
        value = getattr(self.layers[0].cfg, KNOBS[self.knob])
        if self.knob == "alpha":
            return 0 if value is None else round((1 - value) * ALPHA_STEPS)
        return value

    def _value(self, setting: int) -> float:
        """The knob's value at a setting, in its own units."""
        return 1 - setting / ALPHA_STEPS if self.knob == "alpha" else setting

    def _set(self, setting: int) -> None:
        self._now = setting
        for layer in self.layers:
            layer.cfg = replace(layer.cfg, **{KNOBS[self.knob]: self._value(setting)})
