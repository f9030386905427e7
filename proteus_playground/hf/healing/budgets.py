"""The budget of each pass, drawn at random under a ceiling that rises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...attention.budget import geometric
from .plan import Budgets

SMALLEST = 8  # keys and notes per query


@dataclass(frozen=True)
class Drawn:
    """What one pass runs on."""

    alpha: float
    shortlist: int  # L at flux alpha 1

    def reads(self, tokens: int) -> int:
        """Keys and notes that a query of a row of `tokens` tokens may read."""
        return geometric(tokens, min(self.shortlist, tokens), self.alpha)


def draw(budgets: Budgets, length: int, done: float, seed: Sequence[int]) -> Drawn:
    """The budget of a pass over rows of `length` tokens. done: share of the stage behind it; seed: its numbers."""
    rng = np.random.default_rng(seed)
    dense, alpha, octave = rng.random(3)
    low, high = (max(SMALLEST, length // part) for part in (budgets.keys_low, budgets.keys_high))
    shortlist = int(round(low * (high / low) ** octave))
    if dense < budgets.dense_share:
        return Drawn(0.0, shortlist)
    return Drawn(budgets.alpha_low + (ceiling(budgets, done) - budgets.alpha_low) * alpha, shortlist)


def ceiling(budgets: Budgets, done: float) -> float:
    """The largest flux alpha when a share `done` of the stage is over."""
    risen = 1.0 if budgets.rise == 0 else min(1.0, done / budgets.rise)
    return max(budgets.alpha_low, budgets.alpha_start + (budgets.alpha_high - budgets.alpha_start) * risen)
