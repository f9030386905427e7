"""What a training run is, as data: its stages, its optimiser's figures, and the batches it reads."""

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
    targets: Tensor  # (B, T) int64, IGNORED where nothing is asked
    weights: Tensor | None = None  # (B, T) float32, how much each target counts; None: each scored one counts 1


class Batches(Protocol):
    """Endless training text. `batch` is a pure function of its arguments, so that a resumed run reads the same."""

    vocab_size: int

    def batch(self, index: int, sequences: int, length: int) -> Batch:
        """Batch number `index` of `sequences` texts of `length` tokens."""
        ...


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum. Raises `TypeError` or `ValueError` naming the field."""

    lengths: tuple[int, ...]
    """Tokens per text, >= 1; one of these is drawn for every step."""
    tokens: int
    """Tokens per step and process, >= the longest length; a step has tokens // length texts."""
    steps: int
    """Optimiser steps, at most, >= 1."""
    alpha: float | tuple[float, float]
    """Flux alpha in [0, 1], or (low, high) to draw it uniformly for every step."""
    top_share: float = 0.0
    """Share of steps whose alpha is the high end exactly, in [0, 1]."""
    share: int | None = None
    """L at alpha 1 is the length divided by this, >= 1; None: the model's own L whatever the length."""
    plateau: float | None = None
    """End early once the mean loss over `patience` steps is less than this share below that of the steps before."""
    patience: int = 100
    """Steps, >= 1."""

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
        """Length and alpha of a step: a pure function of seed and step, the same on every process."""
        dice = Random(f"{seed}/{step}")
        length = self.lengths[int(dice.random() * len(self.lengths))]
        low, high = self.alpha if isinstance(self.alpha, tuple) else (self.alpha, self.alpha)
        top, between = dice.random() < self.top_share, dice.random()
        return length, high if top else low + (high - low) * between


@dataclass(frozen=True)
class Recipe:
    """Everything that shapes a run besides model and batches. Raises `TypeError` or `ValueError` naming the field."""

    stages: tuple[Stage, ...]
    """In order, at least one."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, > 0."""
    warmup: int = 100
    """Steps over which the rate rises from 0, >= 0."""
    cooldown: float = 0.2
    """Share of the planned steps, the last ones, over which the rate falls to 0, in [0, 1]."""
    weight_decay: float = 0.1
    """Of weight matrices only, >= 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's two averages, in [0, 1)."""
    clip: float = 1.0
    """Largest norm of the gradient, > 0."""
    gate_lr: float = 5.0
    """Factor on the rate of router and gate weights, > 0."""
    router_z: float = 1e-3
    """Weight of the router z-loss, >= 0."""
    opening: float = 0.0
    """Weight of the opening loss, which teaches queries to open the gates of what they attend to, >= 0."""
    alignment: float = 0.0
    """Weight of the alignment loss for Top-A, >= 0."""
    seed: int = 0
    """Of the draws of length and alpha, >= 0."""
    checkpoint: bool = False
    """Whether blocks are computed again in the backward pass, to save memory."""
    learn_gates: bool = True
    """Whether prototypes and balance follow what they see; False trains a dense model at the cost of a dense one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        object.__setattr__(self, "betas", tuple(self.betas))
        if not self.stages or not all(isinstance(stage, Stage) for stage in self.stages):
            raise TypeError(f"stages={self.stages!r}: must be one Stage or more")
        for name in ("lr", "clip", "gate_lr"):
            real_number(name, getattr(self, name), 0, above=True)
        for name in ("weight_decay", "router_z", "opening", "alignment"):
            real_number(name, getattr(self, name), 0)
        real_number("cooldown", self.cooldown, 0, 1)
        whole_number("warmup", self.warmup, 0)
        whole_number("seed", self.seed, 0)
        for beta in self.betas:
            real_number("betas", beta, 0, 1)
        if len(self.betas) != 2 or max(self.betas) == 1:
            raise ValueError(f"betas={self.betas!r}: must be two numbers in [0, 1)")

    @property
    def steps(self) -> int:
        """Steps of all stages, at most."""
        return sum(stage.steps for stage in self.stages)

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """A model to train and how: what a recipe of the models we ship comes to."""

    model: ModelConfig
    batches: Batches
    recipe: Recipe
    description: str
