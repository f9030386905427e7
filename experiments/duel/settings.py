"""Settings of a duel: the size of both models, their text and their schedule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from ...attention import AttentionConfig
from ...common.checks import whole_number
from ...common.texts import TOPICS, Text, load_text
from ...lm.model import ModelConfig, ProteusLM
from ...lm.training import Recipe, Stage

ARMS = ("dense", "proteus")
SHAKESPEARE = "hub:karpathy/tiny_shakespeare"


@dataclass(frozen=True)
class DuelSettings:
    """Everything that decides a duel; the defaults are the preset "small". Errors name the field that does not fit."""

    text: str = "auto"  # as for `pick_text`
    seed: int = 0
    length: int = 256  # tokens per text
    tokens: int = 2048  # per step
    steps: int = 400  # of each arm, at most
    minutes: float | None = 3.0  # for both arms; the number of steps is lowered to fit. None: no limit
    width: int = 96
    layers: int = 3
    heads: int = 6
    groups: int = 2  # KV groups
    heads_awake: int = 2  # at most, per token and group, at alpha 1
    gates: int = 4  # per group
    probes: int = 2  # gates that a query opens, at most
    nearest_gates: bool = False  # see `AttentionConfig`
    shortlist: int | None = None  # L, reads per query at alpha 1; None: length / 16
    dna_fraction: float = 0.25  # of L
    match: float = 0.0  # weight of the distance to dense attention in Proteus's loss, see `losses.dense_match`
    lr: float = 3e-3
    scored: int = 5  # how many times the held-out text is read
    held_out: int = 24  # windows of `length` tokens in the held-out text
    sample: int = 100  # tokens that are generated after a prompt from the held-out text

    def __post_init__(self) -> None:
        if self.shortlist is None:
            object.__setattr__(self, "shortlist", max(1, self.length // 16))
        for name in ("length", "steps", "scored", "held_out", "sample", "shortlist", "probes"):
            whole_number(name, getattr(self, name), 1)
        if self.minutes is not None and not 0 < self.minutes < inf:
            raise ValueError(f"minutes={self.minutes!r}: must be > 0, or None for no limit")
        self.model("proteus", 2)
        self.recipe("proteus")

    def model(self, arm: str, vocab_size: int) -> ModelConfig:
        attention = AttentionConfig(
            d_model=self.width, n_heads=self.heads, n_kv_heads=self.groups, shortlist=self.shortlist, n_anchors=1,
            gates_per_group=self.gates, heads_awake_max=self.heads_awake, probes=min(self.probes, self.gates),
            nearest_gates=self.nearest_gates, flux_alpha=1.0, dna_fraction=self.dna_fraction,
        )  # fmt: skip
        if arm == "dense":
            attention = replace(attention, flux_alpha=0.0, route_heads=False)
        return ModelConfig(vocab_size, self.layers, attention)

    def recipe(self, arm: str) -> Recipe:
        first = max(1, self.steps // 8)
        rest = Stage((self.length,), self.tokens, max(1, self.steps - first), 0.0)
        if arm == "proteus":
            rest = replace(rest, alpha=(0.0, 1.0), top_share=0.5)
        stages = (Stage((self.length,), self.tokens, first, 0.0), rest)
        warmup = min(50, max(1, self.steps // 10))
        ours = arm == "proteus"
        match = self.match if ours else 0.0
        return Recipe(stages, self.lr, warmup, cooldown=0.3, seed=self.seed, learn_gates=ours, match=match)


PRESETS = {
    "small": DuelSettings(),
    "t4": DuelSettings(length=1024, tokens=16_384, steps=1_000, minutes=4.5, width=256, layers=6, heads=8, groups=2,
                   gates=16, heads_awake=2, lr=2e-3),
    "full": DuelSettings(length=4096, tokens=32_768, steps=1_600, minutes=None, width=384, layers=8, heads=12, groups=4,
                     gates=256, probes=16, nearest_gates=True, dna_fraction=0.5, heads_awake=3, match=1.0, lr=1e-3,
                     scored=4, held_out=48),
}  # fmt: skip


def pick_text(name: str) -> Text:
    """The text called `name`; "auto" is Shakespeare, or Python's manual where the hub does not answer."""
    if name != "auto":
        return load_text(name)
    try:
        return load_text(SHAKESPEARE)
    except (ConnectionError, ImportError):
        return load_text(TOPICS)


def start(settings: DuelSettings, arm: str, vocab_size: int) -> ProteusLM:
    """An arm's untrained model. Both arms have equal weights where shapes agree."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        dense = ProteusLM(settings.model("dense", vocab_size))
        if arm == "dense":
            return dense
        model = ProteusLM(settings.model(arm, vocab_size))
        model.load_state_dict(dense.state_dict(), strict=False)
        return model


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The first nine tenths, to train on, and the last tenth, which is held out."""
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:]
