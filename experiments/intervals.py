"""95% confidence intervals and standard errors of means."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import stdev

import numpy as np

RESAMPLES = 2000


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of `values`; None for a single one."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def half_width(values: Sequence[float]) -> float | None:
    """Half of Student's t interval of the mean of `values`; None for a single one."""
    from scipy import stats  # here, because it takes a second to import

    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else None


def over_seeds(values: list[float]) -> tuple[float, float] | None:
    """Student's t interval of one figure in [0, 1] per seed, clipped to [0, 1]; None for a single seed."""
    reach, mean = half_width(values), float(np.mean(values))
    return None if reach is None else (max(0.0, mean - reach), min(1.0, mean + reach))


def over_cases(values: list[float]) -> tuple[float, float]:
    """Of figures in [0, 1]: Wilson's where every case is 0 or 1, else a bootstrap over cases; [0, 1] for one share."""
    from scipy import stats

    if all(value in (0, 1) for value in values):
        low, high = stats.binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
    elif len(values) < 2:
        low, high = 0.0, 1.0
    else:
        sample, seed = (np.asarray(values),), np.random.default_rng(0)
        found = stats.bootstrap(sample, np.mean, n_resamples=RESAMPLES, method="percentile", rng=seed)
        low, high = found.confidence_interval
    return float(low), float(high)
