"""How large the models of the study are, and what they are trained on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ...attention import AttentionConfig
from ...common.checks import whole_number
from ..model import ModelConfig
from ..training import Recipe, Stage
from .copying import Repeat
from .task import Words
from .tasks import TASKS, Mixture, WarmedUp

DENSE, ALPHA = "dense", "alpha"


@dataclass(frozen=True)
class Scale:
    """Everything that shapes the models. A study keeps to one scale; raises where the parts say so."""

    width: int = 64
    """D, features."""
    heads: int = 2
    """H, each with keys of its own."""
    layers: int = 2
    taps: int = 3
    """Tokens of the short convolution over the embeddings, see `ModelConfig`."""
    gates: int = 64
    """C per KV group."""
    probes: int = 4
    dna_fraction: float = 0.75
    rope_theta: float | None = None
    """Base of the rotary positions; without them what is learned at 256 tokens holds at 4,096."""
    share: int = 8
    """L at alpha 1 in training is the length divided by this; at evaluation the study says."""
    opening: float = 0.0
    """Weight of the opening loss in the alpha model, its dense stages too."""
    tasks: tuple[str, ...] = ("mqar",)
    """What one model is trained on, all at once, of `TASKS`."""
    things: tuple[int, ...] = (4, 16, 32)
    """Planted in a training text, one row of a batch like this, another like that, where the text holds them."""
    questions: int = 16
    """Asked in a training text of MQAR, at least; more than there are things ask again."""
    warm_up: int = 0
    """Steps at the start that read nothing but `Repeat`."""
    copies: float = 0.34
    """Share of rows that repeat after that, in [0, 1): recall grows out of copying."""
    stages: tuple[tuple[int, int], ...] = ((64, 300), (128, 200), (256, 300))
    """Length in tokens and steps, one after another."""
    dense_stages: int = 2
    """At the start, at alpha 0 also where alpha is drawn at random later: recall is learned before it is thinned."""
    tokens: int = 4096
    """Per step."""
    lr: float = 4e-3
    top_share: float = 0.6
    """Of steps at alpha 1 exactly where alpha is drawn at random."""
    words: Words = field(default_factory=Words)

    def __post_init__(self) -> None:
        for name in ("tasks", "things"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "stages", tuple((length, steps) for length, steps in self.stages))
        if isinstance(self.words, dict):
            object.__setattr__(self, "words", Words(**self.words))
        whole_number("share", self.share, 1)
        for name in self.tasks:
            if name not in TASKS:
                raise ValueError(f"tasks={name!r}: must be one of {', '.join(TASKS)}")
        if not 0 <= self.copies < 1:
            raise ValueError(f"copies={self.copies!r}: must be in [0, 1)")
        if not isinstance(self.words, Words):
            raise TypeError(f"words={self.words!r}: expected Words, or a dict of its fields")
        self.model()

    def reads(self, length: int, share: int) -> int:
        """L for texts of `length`: 1/share of them, and no fewer than 8."""
        return min(length, max(length // share, 8))

    def model(self, **changes) -> ModelConfig:
        """changes: other fields of `AttentionConfig`."""
        shape = {
            "d_model": self.width, "n_heads": self.heads, "route_heads": False, "gates_per_group": self.gates,
            "probes": self.probes, "dna_fraction": self.dna_fraction, "rope_theta": self.rope_theta, "flux_alpha": 1.0,
            "shortlist": self.reads(max(length for length, _ in self.stages), self.share),
        }  # fmt: skip
        attention = AttentionConfig(**{**shape, **changes})
        return ModelConfig(self.words.size, self.layers, attention, hidden=2 * self.width, taps=self.taps)

    def to_dict(self) -> dict:
        return asdict(self)


RELATED = ("induction", "multi-key", "multi-query")  # who has learned mqar and repetition can do these


SMALL = Scale()


FULL = Scale(
    gates=128, dna_fraction=0.875, opening=0.3, things=(4, 16, 64, 128), tokens=32768, lr=3e-3, top_share=0.5,
    stages=((64, 400), (128, 400), (256, 600), (512, 600), (1024, 1000)),
)  # fmt: skip


PRESETS = {"small": SMALL, "full": FULL}


def lessons(scale: Scale, seed: int) -> WarmedUp:
    """What a model reads in training: repetition, then every task with every number of things that fits the text."""
    rows = []
    for name in scale.tasks:
        for things in scale.things:
            asked = {"questions": max(things, scale.questions)} if name == "mqar" else {}
            rows.append(TASKS[name](things, seed=seed, words=scale.words, **asked))
    again = Repeat(seed=seed, words=scale.words)
    if scale.copies:
        weights = (scale.copies * len(rows) / (1 - scale.copies), *(1.0,) * len(rows))
        return WarmedUp(again, scale.warm_up, Mixture((again, *rows), weights, seed))
    return WarmedUp(again, scale.warm_up, Mixture(tuple(rows), seed=seed))


def plan(scale: Scale, kind: str, seed: int) -> Recipe:
    """How it is trained."""
    stages = []
    for i, (length, steps) in enumerate(scale.stages):
        dense = kind == DENSE or i < scale.dense_stages
        thinned = {} if dense else {"top_share": scale.top_share, "share": scale.share}
        stages.append(Stage((length,), scale.tokens, steps, 0.0 if dense else (0.0, 1.0), **thinned))
    figures = {"lr": scale.lr, "warmup": 50, "weight_decay": 0.01, "seed": seed, "learn_gates": kind != DENSE}
    return Recipe(tuple(stages), opening=scale.opening if kind == ALPHA else 0.0, **figures)
