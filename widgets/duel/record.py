"""What a duel has shown so far: plain numbers that a picture can be made of at any time."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from proteus_playground.experiments.duel.curve import Point
from proteus_playground.experiments.duel.duel import ARMS, DuelSettings, Score, Turn

CALM = 0.9  # of a smoothed value that stays with the next step
MOST = 400  # points of a line; no plot of ours is wider


@dataclass
class Series:
    """One arm, step by step; `looks` are the steps at which gates and heads were looked at."""

    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    calm_loss: list[float] = field(default_factory=list)
    calm_speed: list[float] = field(default_factory=list)  # tokens per second
    looks: list = field(default_factory=list)  # of `Step`
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def add(self, step) -> None:
        """Takes in a `Step`. Smoothing weighs the first steps as if they had been there for ever."""
        new = (step.loss, step.tokens_per_second, 1.0)
        self._sums = [CALM * old + (1 - CALM) * value for old, value in zip(self._sums, new, strict=True)]
        self.tokens.append(step.tokens)
        self.loss.append(step.loss)
        self.calm_loss.append(self._sums[0] / self._sums[2])
        self.calm_speed.append(self._sums[1] / self._sums[2])
        if step.density is not None:
            self.looks.append(step)

    def line(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and the values called `name`, float32, at most MOST of them."""
        count = len(self.tokens)
        at = np.unique(np.linspace(0, count - 1, min(count, MOST)).round().astype(int)) if count else np.zeros(0, int)
        tokens, values = np.asarray(self.tokens, np.float32), np.asarray(getattr(self, name), np.float32)
        return tokens[at], values[at]


class Record:
    """Every `Turn` so far, and at the end the `Point`s of the slider."""

    def __init__(self, settings: DuelSettings):
        self.settings = settings
        self.arms = {arm: Series() for arm in ARMS}
        self.scores: list[Score] = []
        self.curve: list[Point] = []
        self.step = self.steps = 0

    def add(self, turn: Turn) -> None:
        self.arms[turn.arm].add(turn.step)
        self.scores += turn.scores
        self.step, self.steps = turn.step.step, turn.steps

    def scored(self, arm: str, alpha: float) -> list[Score]:
        """In order of steps."""
        return sorted((s for s in self.scores if (s.arm, s.alpha) == (arm, alpha)), key=lambda score: score.step)

    def newest(self) -> list[Score]:
        """Dense, Proteus read densely, Proteus at alpha 1, as far as there is one."""
        found = [self.scored(*which) for which in (("dense", 0.0), ("proteus", 0.0), ("proteus", 1.0))]
        return [scores[-1] for scores in found if scores]

    def tokens_at(self, step: int) -> int:
        """Tokens that an arm had read after `step`."""
        tokens = self.arms["dense"].tokens or self.arms["proteus"].tokens
        return tokens[min(step, len(tokens)) - 1] if tokens else 0

    def loss_at(self, alpha: float) -> float | None:
        """On the curve, between two measured points along a straight line; None while there is none."""
        if not self.curve:
            return None
        return float(np.interp(alpha, *zip(*((point.alpha, point.loss) for point in self.curve), strict=True)))
