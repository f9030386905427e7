"""Recall models: their size, their training text, and their training recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ...attention import AttentionConfig
from ...common.checks import whole_number
from ..model import ModelConfig
from ..training import Recipe, Stage
from .copying import Repeat
from .task import Words
from .tasks import TASKS, Mixture, WarmedUp

DENSE, ALPHA = "dense", "alpha"  # kinds of model: trained at alpha 0, or at an alpha drawn anew for every step


@dataclass(frozen=True)
class Scale:
    """All settings of the models; a study uses one scale. Raises `TypeError` or `ValueError` naming the field."""

    width: int = 64
    """D, features."""
    heads: int = 2
    """H, each head with keys of its own."""
    layers: int = 2
    taps: int = 3
    """Width of the short convolution over the embeddings, in tokens; see `ModelConfig`."""
    gates: int = 64
    """C per KV group."""
    probes: int = 4
    nearest_gates: bool = False
    """See `AttentionConfig.nearest_gates`."""
    dna_fraction: float = 0.75
    rope_theta: float | None = None
    """Base of the rotary positions. None leaves them out: what is learned at 256 tokens then also works at 4,096."""
    share: int = 8
    """L at alpha 1 in training is the length divided by this. A study sets its own L for evaluation."""
    opening: float = 0.0
    """Weight of the opening loss for an alpha model, in its dense stages too."""
    tasks: tuple[str, ...] = ("mqar",)
    """Names from `TASKS`; one model is trained on all of them together."""
    things: tuple[int, ...] = (4, 16, 32)
    """Numbers of pairs, or of tokens to repeat, per training text. Each row of a batch uses one of them; those that do
    not fit into the length are skipped."""
    questions: int = 16
    """Least number of questions in a training text of MQAR; with more questions than pairs, pairs are asked again."""
    warm_up: int = 0
    """Steps at the start that train on `Repeat` alone."""
    copies: float = 0.34
    """Share of `Repeat` rows after the warm-up, in [0, 1): learning to copy helps learning recall."""
    stages: tuple[tuple[int, int], ...] = ((64, 300), (128, 200), (256, 300))
    """Stages of the training: (length in tokens, steps) each."""
    dense_stages: int = 2
    """Number of stages at the start in which an alpha model trains at alpha 0, so that it learns recall before keys are
    left out."""
    tokens: int = 4096
    """Tokens per step."""
    lr: float = 4e-3
    top_share: float = 0.6
    """Share of steps at exactly alpha 1 in the stages that draw alpha at random."""
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
        self.model_config()  # raises for sizes that do not fit

    def shortlist(self, length: int, share: int) -> int:
        """L for texts of `length` tokens: the length divided by `share`, at least 8."""
        return min(length, max(length // share, 8))

    def model_config(self, **changes) -> ModelConfig:
        """changes: other fields of `AttentionConfig`."""
        shape = {
            "d_model": self.width, "n_heads": self.heads, "route_heads": False, "gates_per_group": self.gates,
            "probes": self.probes, "nearest_gates": self.nearest_gates, "dna_fraction": self.dna_fraction,
            "rope_theta": self.rope_theta, "flux_alpha": 1.0,
            "shortlist": self.shortlist(max(length for length, _ in self.stages), self.share),
        }  # fmt: skip
        attention = AttentionConfig(**{**shape, **changes})
        return ModelConfig(self.words.size, self.layers, attention, hidden=2 * self.width, taps=self.taps)

    def to_dict(self) -> dict:
        return asdict(self)


RELATED = ("induction", "multi-key", "multi-query")  # tasks that a model trained on mqar and repetition can do
SMALL = Scale()
FULL = Scale(
    gates=128, probes=16, nearest_gates=True, dna_fraction=0.875, things=(4, 16, 64, 128), tokens=32768, lr=3e-3,
    top_share=0.5, stages=((64, 400), (128, 400), (256, 600), (512, 600), (1024, 1000)),
)  # fmt: skip
PRESETS = {"small": SMALL, "full": FULL}


def training_batches(scale: Scale, seed: int) -> WarmedUp:
    """Training text: first repetition, then rows of every task with every number of things that fits."""
    rows = []
    for name in scale.tasks:
        for things in scale.things:
            options = {"questions": max(things, scale.questions)} if name == "mqar" else {}
            rows.append(TASKS[name](things, seed=seed, words=scale.words, **options))
    repeat = Repeat(seed=seed, words=scale.words)
    if scale.copies:
        weights = (scale.copies * len(rows) / (1 - scale.copies), *(1.0,) * len(rows))
        return WarmedUp(repeat, scale.warm_up, Mixture((repeat, *rows), weights, seed))
    return WarmedUp(repeat, scale.warm_up, Mixture(tuple(rows), seed=seed))


def training_recipe(scale: Scale, kind: str, seed: int) -> Recipe:
    """How a model of `kind`, DENSE or ALPHA, is trained."""
    stages = []
    for i, (length, steps) in enumerate(scale.stages):
        if kind == DENSE or i < scale.dense_stages:
            stages.append(Stage((length,), scale.tokens, steps, 0.0))
        else:
            sparse = {"alpha": (0.0, 1.0), "top_share": scale.top_share, "share": scale.share}
            stages.append(Stage((length,), scale.tokens, steps, **sparse))
    options = {"lr": scale.lr, "warmup": 50, "weight_decay": 0.01, "seed": seed, "learn_gates": kind != DENSE}
    return Recipe(tuple(stages), opening=scale.opening if kind == ALPHA else 0.0, **options)
