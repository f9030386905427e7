"""Where a run is in its curriculum: which stage, what rate, and whether the loss still falls."""

from __future__ import annotations

from dataclasses import dataclass

from .recipe import Recipe, Stage


@dataclass
class Place:
    """All that the schedule remembers; plain numbers, saved with the weights."""

    step: int = 0  # finished
    stage: int = 0
    stage_step: int = 0  # finished in this stage
    stage_end: int | None = None  # of this stage, where a plateau brought it forward
    tokens: int = 0
    seconds: float = 0.0
    window: float = 0.0  # sum of the losses of the last steps, patience of them at most
    before: float | None = None  # mean loss of the patience steps before those

    def stage_of(self, recipe: Recipe) -> Stage | None:
        """The stage that the next step belongs to; None when the run is over."""
        return recipe.stages[self.stage] if self.stage < len(recipe.stages) else None

    def left(self, recipe: Recipe) -> int:
        """Steps to come, at most."""
        stage = self.stage_of(recipe)
        if stage is None:
            return 0
        later = sum(stage.steps for stage in recipe.stages[self.stage + 1 :])
        return (self.stage_end or stage.steps) - self.stage_step + later

    def rate(self, recipe: Recipe) -> float:
        """Learning rate of the next step: linear warm-up, constant, linear cooldown over the last steps."""
        up = min(1.0, (self.step + 1) / recipe.warmup) if recipe.warmup else 1.0
        last = _cooldown(recipe)
        return recipe.lr * min(up, self.left(recipe) / last if last else 1.0)

    def advance(self, recipe: Recipe, loss: float, tokens: int, seconds: float) -> None:
        """Count a finished step in, and go on to the next stage where this one is over."""
        stage = self.stage_of(recipe)
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        self.tokens, self.seconds, self.window = self.tokens + tokens, self.seconds + seconds, self.window + loss
        if self.stage_step % stage.patience == 0:
            self._judge(recipe, stage)
        if self.stage_step >= (self.stage_end or stage.steps):
            self.stage, self.stage_step, self.stage_end, self.window, self.before = self.stage + 1, 0, None, 0.0, None

    def _judge(self, recipe: Recipe, stage: Stage) -> None:
        """End a stage on a plateau at once; the last one with the run's cooldown."""
        mean, before = self.window / stage.patience, self.before
        self.window, self.before = 0.0, mean
        if stage.plateau is None or before is None or mean < before * (1 - stage.plateau):
            return
        last = self.stage == len(recipe.stages) - 1
        end = self.stage_step + (_cooldown(recipe) if last else 0)
        self.stage_end = min(self.stage_end or stage.steps, end)


def _cooldown(recipe: Recipe) -> int:
    """Steps over which the rate falls."""
    return round(recipe.cooldown * recipe.steps)
