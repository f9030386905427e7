"""A training run as data: batches, stages, the optimiser's numbers, and the position a run has reached.

Axes: `B` batch, `T` tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from random import Random
from typing import Protocol

from torch import Tensor

from ...attention.budget import check_alpha
from ...common.checks import real_number, whole_number
from ..model import ModelConfig


@dataclass(frozen=True)
class Batch:
    """One step's texts, on the CPU."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORED for positions that are not scored
    weights: Tensor | None = None  # (B, T) float32, weight of each target; None: 1 each


class Batches(Protocol):
    """Endless training text. `batch` is a pure function, so a resumed run reads the same texts."""

    vocab_size: int

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """Batch number `index`: `sequences` texts of `length` tokens."""
        ...


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum. Raises `TypeError` or `ValueError` naming the field."""

    lengths: tuple[int, ...]
    """Tokens per text, >= 1; each step draws one of these."""
    tokens: int
    """Tokens per step and process, >= the longest length; a step has tokens // length texts."""
    steps: int
    """Largest number of optimiser steps, >= 1."""
    alpha: float | tuple[float, float]
    """Flux alpha in [0, 1], or (low, high): each step draws it uniformly."""
    top_share: float = 0.0
    """Share of steps at exactly the high end of alpha, in [0, 1]."""
    share: int | None = None
    """L at alpha 1 is the length divided by this, >= 1. None keeps the model's own L at every length."""
    plateau: float | None = None
    """End the stage early once the loss has stopped falling: its mean over `patience` steps is less than this share,
    in [0, 1], below its mean over the `patience` steps before. None: never."""
    patience: int = 100
    """Steps that `plateau` averages over, >= 1."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        if not self.lengths:
            raise ValueError("lengths=(): must have at least one entry")
        for length in self.lengths:
            whole_number("lengths", length, 1)
        whole_number("tokens", self.tokens, max(self.lengths))
        whole_number("steps", self.steps, 1)
        whole_number("patience", self.patience, 1)
        if self.share is not None:
            whole_number("share", self.share, 1)
        if isinstance(self.alpha, (tuple, list)):
            object.__setattr__(self, "alpha", tuple(map(check_alpha, self.alpha)))
            if len(self.alpha) != 2 or self.alpha[0] > self.alpha[1]:
                raise ValueError(f"alpha={self.alpha!r}: must be one number, or (low, high) with low <= high")
        else:
            check_alpha(self.alpha)
        real_number("top_share", self.top_share, 0, 1)
        if self.plateau is not None:
            real_number("plateau", self.plateau, 0, 1)

    def draw(self, seed: int, step: int) -> tuple[int, float]:
        """Length and alpha of a step: a pure function of seed and step, so all processes draw the same."""
        random = Random(f"{seed}/{step}")
        length = self.lengths[int(random.random() * len(self.lengths))]
        low, high = self.alpha if isinstance(self.alpha, tuple) else (self.alpha, self.alpha)
        at_top, between = random.random() < self.top_share, random.random()
        return length, high if at_top else low + (high - low) * between


@dataclass(frozen=True)
class Recipe:
    """All settings of a run besides model and batches. Raises `TypeError` or `ValueError` naming the field."""

    stages: tuple[Stage, ...]
    """At least one; they follow each other."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, > 0."""
    warmup: int = 100
    """Steps over which the learning rate rises from 0, >= 0."""
    cooldown: float = 0.2
    """Share of the planned steps, in [0, 1], at the end of the run over which the learning rate falls to 0."""
    weight_decay: float = 0.1
    """Weight decay of weight matrices, >= 0; other weights have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moving averages, in [0, 1)."""
    clip: float = 1.0
    """Largest norm of the gradient, > 0."""
    gate_lr: float = 5.0
    """Factor on the learning rate of router and gate weights, > 0."""
    router_z: float = 1e-3
    """Weight of the router z-loss (`losses.router_z`), >= 0."""
    opening: float = 0.0
    """Weight of the opening loss (`losses.opening`), which trains queries to open the gates they need, >= 0."""
    alignment: float = 0.0
    """Weight of the alignment loss for Top-A (`losses.alignment`), >= 0."""
    match: float = 0.0
    """Weight of the distance between each layer's output and dense attention (`losses.dense_match`), >= 0. It counts
    in steps whose alpha is above 0, and needs `checkpoint` to be False."""
    seed: int = 0
    """Seed of the draws of length and alpha, >= 0."""
    checkpoint: bool = False
    """Whether the backward pass recomputes blocks, which saves memory and costs time."""
    learn_gates: bool = True
    """Whether prototypes and balance biases are updated. False saves that work where a dense model is trained."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "betas", tuple(self.betas))
        if not self.stages or not all(isinstance(stage, Stage) for stage in self.stages):
            raise TypeError(f"stages={self.stages!r}: must be one Stage or more")
        for name in ("lr", "clip", "gate_lr"):
            real_number(name, getattr(self, name), 0, above=True)
        for name in ("weight_decay", "router_z", "opening", "alignment", "match"):
            real_number(name, getattr(self, name), 0)
        real_number("cooldown", self.cooldown, 0, 1)
        if self.match and self.checkpoint:
            raise ValueError(f"match={self.match!r}: must be 0 with checkpoint=True, which keeps no layer's output")
        whole_number("warmup", self.warmup, 0)
        whole_number("seed", self.seed, 0)
        for beta in self.betas:
            real_number("betas", beta, 0, 1)
        if len(self.betas) != 2 or max(self.betas) == 1:
            raise ValueError(f"betas={self.betas!r}: must be two numbers in [0, 1)")

    @property
    def steps(self) -> int:
        """Largest number of steps, all stages together."""
        return sum(stage.steps for stage in self.stages)

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A model, the text it reads, and the recipe that trains it: what `proteus train NAME` runs."""

    model: ModelConfig
    batches: Batches
    recipe: Recipe
    description: str


@dataclass
class Position:
    """How far a run has come. Plain numbers, saved with the weights."""

    step: int = 0  # finished steps
    stage: int = 0
    stage_step: int = 0  # finished steps of this stage
    stage_end: int | None = None  # last step of this stage if a plateau ends it early
    tokens: int = 0
    seconds: float = 0.0
    window: float = 0.0  # sum of the losses since the last plateau check, at most `patience` of them
    before: float | None = None  # mean loss of the `patience` steps before those

    def stage_of(self, recipe: Recipe) -> Stage | None:
        """The stage of the next step; None after the last step."""
        return recipe.stages[self.stage] if self.stage < len(recipe.stages) else None

    def steps_left(self, recipe: Recipe) -> int:
        """Largest number of steps that follow."""
        stage = self.stage_of(recipe)
        if stage is None:
            return 0
        later = sum(stage.steps for stage in recipe.stages[self.stage + 1 :])
        return (self.stage_end or stage.steps) - self.stage_step + later

    def rate(self, recipe: Recipe) -> float:
        """Learning rate of the next step: linear warm-up, constant, linear cooldown."""
        warmup = min(1.0, (self.step + 1) / recipe.warmup) if recipe.warmup else 1.0
        steps = _cooldown_steps(recipe)
        return recipe.lr * min(warmup, self.steps_left(recipe) / steps if steps else 1.0)

    def advance(self, recipe: Recipe, loss: float, tokens: int, seconds: float) -> None:
        """Count a finished step, and go on to the next stage if this one has ended."""
        stage = self.stage_of(recipe)
        self.step, self.stage_step = self.step + 1, self.stage_step + 1
        self.tokens, self.seconds, self.window = self.tokens + tokens, self.seconds + seconds, self.window + loss
        if self.stage_step % stage.patience == 0:
            self._check_plateau(recipe, stage)
        if self.stage_step >= (self.stage_end or stage.steps):
            self.stage, self.stage_step, self.stage_end, self.window, self.before = self.stage + 1, 0, None, 0.0, None

    def _check_plateau(self, recipe: Recipe, stage: Stage) -> None:
        """On a plateau, end the stage now, or, in the last stage, after the cooldown."""
        mean, before = self.window / stage.patience, self.before
        self.window, self.before = 0.0, mean
        if stage.plateau is None or before is None or mean < before * (1 - stage.plateau):
            return
        is_last = self.stage == len(recipe.stages) - 1
        end = self.stage_step + (_cooldown_steps(recipe) if is_last else 0)
        self.stage_end = min(self.stage_end or stage.steps, end)


def _cooldown_steps(recipe: Recipe) -> int:
    return round(recipe.cooldown * recipe.steps)
