"""The results of a duel so far, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from proteus_playground.experiments.duel.curve import Point
from proteus_playground.experiments.duel.duel import ARMS, DuelSettings, Score, Turn

CALM = 0.9  # the share of a smoothed value that the next step keeps
MOST = 400  # points of a line: more would not be visible


@dataclass
class Series:
    """One model, step by step. `looks` are the steps at which gates and heads were measured."""

    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    calm_loss: list[float] = field(default_factory=list)
    calm_speed: list[float] = field(default_factory=list)  # tokens per second
    looks: list = field(default_factory=list)  # of `Step`
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def add(self, step) -> None:
        """Adds a `Step`. A smoothed value is the weighted mean of all steps so far, without bias at first."""
        new = (step.loss, step.tokens_per_second, 1.0)
        self._sums = [CALM * old + (1 - CALM) * value for old, value in zip(self._sums, new, strict=True)]
        self.tokens.append(step.tokens)
        self.loss.append(step.loss)
        self.calm_loss.append(self._sums[0] / self._sums[2])
        self.calm_speed.append(self._sums[1] / self._sums[2])
        if step.density is not None:
            self.looks.append(step)

    def line(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens read and the values `name`, two float32 arrays of at most MOST points."""
        count = len(self.tokens)
        at = np.unique(np.linspace(0, count - 1, min(count, MOST)).round().astype(int)) if count else np.zeros(0, int)
        tokens, values = np.asarray(self.tokens, np.float32), np.asarray(getattr(self, name), np.float32)
        return tokens[at], values[at]


class Record:
    """Every `Turn` so far and, at the end, the `Point`s of the slider's curve."""

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
        """The scores of one model at `alpha`, in order of steps."""
        return sorted((s for s in self.scores if (s.arm, s.alpha) == (arm, alpha)), key=lambda score: score.step)

    def newest(self) -> list[Score]:
        """The newest scores of dense, of Proteus at alpha 0 and of Proteus at alpha 1, as far as there are any."""
        found = [self.scored(*which) for which in (("dense", 0.0), ("proteus", 0.0), ("proteus", 1.0))]
        return [scores[-1] for scores in found if scores]

    def tokens_at(self, step: int) -> int:
        """Tokens that each model had read after `step`."""
        tokens = self.arms["dense"].tokens or self.arms["proteus"].tokens
        return tokens[min(step, len(tokens)) - 1] if tokens else 0

    def loss_at(self, alpha: float) -> float | None:
        """The loss on the curve, interpolated linearly between measured points; None before they are measured."""
        if not self.curve:
            return None
        return float(np.interp(alpha, *zip(*((point.alpha, point.loss) for point in self.curve), strict=True)))
