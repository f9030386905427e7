"""The plan of a healing run: its stages, what each trains on which budgets, and the data. A plan is a JSON file.

Lengths and amounts of text are in tokens, losses in nats, learning rates are those of AdamW.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from ...attention.knobs import knob
from ...common.checks import whole_number
from ...common.files import write_json
from ..adapters import ATTENTION

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
PARTS = ("prototypes", "weights")
MLP = ("gate_proj", "up_proj", "down_proj")


class _Checked:
    """Numbers declared by `knob` are checked; errors name the field, its value and what is allowed."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, optional = getattr(self, each.name), each.type.endswith("| None")
            if "range" in each.metadata and not (value is None and optional):
                each.metadata["range"].check(each.name, value)
            elif isinstance(each.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{each.name}={value!r}: expected True or False")
        self._check()

    def _check(self) -> None:
        pass

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")


@dataclass(frozen=True)
class Budgets(_Checked):
    """Which budgets the passes of a stage are drawn from. Each pass draws flux alpha and L anew."""

    alpha_low: float = knob(0.0, 0.0, 1.0)
    """Smallest flux alpha of a sparse pass."""
    alpha_high: float = knob(1.0, 0.0, 1.0)
    """Largest flux alpha, once the ceiling has risen."""
    alpha_start: float = knob(1.0, 0.0, 1.0)
    """Largest flux alpha at the stage's first step; the ceiling rises from here to `alpha_high` in a straight line."""
    rise: float = knob(0.5, 0.0, 1.0)
    """Share of the stage during which the ceiling rises."""
    keys_high: int = knob(8, 1)
    """The largest L at flux alpha 1 is the length divided by this; L is drawn evenly on a logarithmic scale."""
    keys_low: int = knob(32, 1)
    """The smallest L at flux alpha 1 is the length divided by this, at least `keys_high`."""
    dense_share: float = knob(0.15, 0.0, 1.0)
    """Share of the passes that run at flux alpha 0."""

    def _check(self) -> None:
        if self.alpha_low > self.alpha_high:
            self._refuse("alpha_low", f"at most alpha_high={self.alpha_high}")
        if self.keys_low < self.keys_high:
            self._refuse("keys_low", f"at least keys_high={self.keys_high}")


@dataclass(frozen=True)
class Rates(_Checked):
    """Largest learning rate of each group of parameters. It falls along a cosine to the share `end` of it."""

    prototypes: float = knob(1e-3, 0.0)
    """Prototypes, where the stage trains them by a loss."""
    weights: float = knob(2e-4, 0.0)
    """Adapters, or the matrices of a model that is trained whole."""
    embeddings_and_norms: float = knob(2e-5, 0.0)
    """Embeddings, norms and biases of a model that is trained whole."""
    warmup: float = knob(0.05, 0.0, 1.0)
    """Share of the stage during which the rates rise from 0."""
    end: float = knob(0.1, 0.0, 1.0)
    """Share of the rates that is left at the stage's last step."""
    weight_decay: float = knob(0.0, 0.0)
    """Decoupled weight decay of matrices."""
    clip: float = knob(1.0, 0.0, open_low=True)
    """Largest norm of the gradient."""


@dataclass(frozen=True)
class Losses(_Checked):
    """Weight of each loss."""

    kl: float = knob(1.0, 0.0)
    """KL divergence of the student's next token from the teacher's, nats per token."""
    match: float = knob(0.1, 0.0)
    """Squared distance of the student's attention outputs from the teacher's, over their square; mean of the layers."""
    cross_entropy: float = knob(0.0, 0.0)
    """Cross-entropy of the text's next token, nats per token."""
    gates: float = knob(0.0, 0.0)
    """Cross-entropy between the gates' scores for a query and its dense attention on each gate's keys, nats."""


@dataclass(frozen=True)
class Plateau(_Checked):
    """When a stage, or a length of it, ends early: its held-out gap has stopped falling."""

    every: int | None = knob(None, 1, none="for no early end")
    """Tokens between two measurements of the held-out gap."""
    patience: int = knob(3, 1)
    """Measurements in a row without progress after which it ends."""
    least: float = knob(0.01, 0.0, 1.0)
    """Share by which the gap must fall below the best so far to count as progress."""


@dataclass(frozen=True)
class Stage(_Checked):
    """One stage of a run. Its optimiser starts anew."""

    name: str = "B"
    tokens: int = knob(2_000_000, 1)
    """Text that the stage reads at most."""
    lengths: tuple[int, ...] = (2048,)
    """Tokens of a row. With several, the stage goes to the next on a plateau, or after an equal share of its tokens."""
    budgets: Budgets = field(default_factory=Budgets)
    rates: Rates = field(default_factory=Rates)
    losses: Losses = field(default_factory=Losses)
    plateau: Plateau = field(default_factory=Plateau)
    trains: tuple[str, ...] = ("weights",)
    """What gradients change: "weights" (the adapters, or the whole model) and "prototypes". Empty where prototypes only
    follow the keys."""
    follow: bool = True
    """Whether prototypes follow the keys by a moving average."""
    optional: bool = False
    """Whether the menu offers to skip it."""

    def _check(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            self._refuse("name", "a string that is not empty")
        if not self.lengths:
            self._refuse("lengths", "at least one length")
        for length in self.lengths:
            whole_number("lengths", length, 2)
        if set(self.trains) - set(PARTS) or not (self.trains or self.follow):
            self._refuse("trains", f"some of {', '.join(map(repr, PARTS))}, or empty where follow is true")
        if "weights" in self.trains and not (self.losses.kl or self.losses.match or self.losses.cross_entropy):
            raise ValueError(f"losses of stage {self.name}: kl, match or cross_entropy must be above 0")
        if ("prototypes" in self.trains) != (self.losses.gates > 0):
            raise ValueError(f"losses of stage {self.name}: gates must be above 0 where prototypes are trained, else 0")


@dataclass(frozen=True)
class Adapter(_Checked):
    """Low-rank adapters (LoRA) that are trained in place of the weights."""

    rank: int = knob(16, 1)
    """Rank of the adapters of attention."""
    mlp_rank: int = knob(8, 1)
    """Rank of the adapters of the MLPs."""
    alpha: float = knob(32.0, 0.0, open_low=True)
    """An adapter's product is multiplied by alpha / rank of attention, in all layers alike."""
    dropout: float = knob(0.0, 0.0, 1.0, open_high=True)
    targets: tuple[str, ...] = (*ATTENTION, *MLP)
    """Names of the linear layers that get one; those of attention are q_proj, k_proj, v_proj and o_proj."""

    def _check(self) -> None:
        if not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            self._refuse("targets", "at least one name of a linear layer")


@dataclass(frozen=True)
class Data(_Checked):
    """What is read. A source is the name of a text, a file (.txt, .jsonl) or "hub:owner/dataset[/config]"."""

    sources: tuple[str, ...] = ("commonplace book",)
    weights: tuple[float, ...] = ()
    """Share of each source in the rows, in any unit; empty for shares in proportion to their lengths."""
    held_out: tuple[str, ...] = ()
    """Sources to measure on. Empty: the last part of each source, which is then not trained on."""
    held_out_share: float = knob(0.05, 0.0, 0.5, open_low=True)
    held_out_rows: int = knob(8, 1)
    """Most rows of each source to measure on."""
    max_tokens: int = knob(50_000_000, 1)
    """Most tokens that are taken from one source."""

    def _check(self) -> None:
        if not self.sources:
            self._refuse("sources", "at least one text, file or data set")
        if self.weights and len(self.weights) != len(self.sources):
            self._refuse("weights", f"one number for each of {len(self.sources)} sources, or empty")
        if any(isinstance(w, bool) or not isinstance(w, (int, float)) or not w > 0 for w in self.weights):
            self._refuse("weights", "numbers above 0")


@dataclass(frozen=True)
class Plan(_Checked):
    """A healing run as data. `plan.write(path)` writes it to a file and `Plan.read(path)` reads it."""

    stages: tuple[Stage, ...] = (Stage(),)
    seed: int = knob(0, 0)
    batch_tokens: int = knob(8192, 1)
    """Tokens of a step, over all processes; a length above it is one row a step."""
    pass_tokens: int = knob(8192, 1)
    """Most tokens that go through the model at a time; a length above it is one row."""
    precision: str = "auto"
    """Of matrix products. auto: bfloat16 where the GPU computes it, else float16 on CUDA, else float32."""
    checkpoint: bool = True
    """Whether a layer's activations are computed again in the backward pass, which saves memory."""
    adapter: Adapter | None = field(default_factory=Adapter)
    """None trains all weights."""
    data: Data = field(default_factory=Data)
    minutes: float | None = knob(None, 0.0, open_low=True, none="for as long as the stages say")
    """How long `sized` lets the run take."""

    def _check(self) -> None:
        if not self.stages:
            self._refuse("stages", "at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages={names}: each must have a name of its own")
        if self.precision not in PRECISIONS:
            self._refuse("precision", f"one of {', '.join(PRECISIONS)}")

    def stage(self, name: str) -> Stage:
        """The stage called `name`. Raises `ValueError`."""
        found = {stage.name: stage for stage in self.stages}
        if name not in found:
            raise ValueError(f"stage={name!r}: must be one of {', '.join(found)}")
        return found[name]

    @property
    def tokens(self) -> int:
        """Text that all stages read at most."""
        return sum(stage.tokens for stage in self.stages)

    def to_dict(self) -> dict:
        """Plain values, as JSON holds them: `plan_of(plan.to_dict()) == plan`."""
        return json.loads(json.dumps(asdict(self)))

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises `OSError`."""
        write_json(path, self.to_dict())

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a JSON file. Raises `FileNotFoundError`, or `ValueError` that names the file and the field."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"plan={str(path)!r}: no such file")
        try:
            return plan_of(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, TypeError) as err:
            raise ValueError(f"plan={str(path)!r}: {err}") from err


def plan_of(values: Mapping) -> Plan:
    """A plan from plain values; what is left out has its default. Raises `ValueError` or `TypeError` naming a field."""
    return _built(Plan, values, "plan")


def _built(kind: type, values: object, where: str):
    """A dataclass from a dictionary, with those inside it."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{where}={values!r}: expected an object with fields of a {kind.__name__.lower()}")
    types = get_type_hints(kind)
    if unknown := sorted(set(values) - set(types)):
        raise ValueError(f"{where}: {unknown[0]!r} is no field of a {kind.__name__.lower()}; known: {', '.join(types)}")
    made = {name: _value(types[name], value, f"{where}.{name}") for name, value in values.items()}
    try:
        return kind(**made)
    except (ValueError, TypeError) as err:
        raise type(err)(f"{where}: {err}") from err


def _value(declared, value: object, where: str):
    if isinstance(declared, UnionType):  # X | None
        if value is None:
            return None
        declared = next(each for each in get_args(declared) if each is not type(None))
    if is_dataclass(declared):
        return _built(declared, value, where)
    if get_origin(declared) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{where}={value!r}: expected a list")
        return tuple(_value(get_args(declared)[0], each, f"{where}[{at}]") for at, each in enumerate(value))
    if declared is str and not isinstance(value, str):
        raise TypeError(f"{where}={value!r}: expected a string")
    return value


@dataclass(frozen=True)
class Sized:
    """A plan that fits a machine, and how long it takes there."""

    plan: Plan
    minutes: float
    sentence: str  # such as "8,192,000 tokens in 3 stages: about 12 minutes here"


def sized(plan: Plan, tokens_per_second: float) -> Sized:
    """`plan` with fewer tokens in each stage where it would take longer than `plan.minutes`; at least one step each."""
    if not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second={tokens_per_second!r}: must be above 0")
    minutes = plan.tokens / tokens_per_second / 60
    if plan.minutes is not None and minutes > plan.minutes:
        share = plan.minutes / minutes
        stages = (replace(s, tokens=max(plan.batch_tokens, round(s.tokens * share))) for s in plan.stages)
        plan = replace(plan, stages=tuple(stages))
        minutes = plan.tokens / tokens_per_second / 60
    count = len(plan.stages)
    sentence = f"{plan.tokens:,} tokens in {count} stage{'s' if count > 1 else ''}: about {spoken(minutes)} here"
    return Sized(plan, minutes, sentence)


def measured_every(plan: Plan, tokens: int) -> Plan:
    """`plan` with held-out text measured every `tokens` tokens in stages that would measure it at their end only.

    None of these stages ends early by it.
    """
    tokens = max(1, tokens)
    stages = tuple(
        stage
        if stage.plateau.every is not None
        else replace(stage, plateau=replace(stage.plateau, every=tokens, patience=1 + stage.tokens // tokens))
        for stage in plan.stages
    )
    return replace(plan, stages=stages)


def spoken(minutes: float) -> str:
    """A duration in the unit that fits: seconds, minutes, hours or days."""
    if minutes < 1:
        amount, unit = max(1, round(minutes * 60)), "second"
    elif minutes < 100:
        amount, unit = round(minutes), "minute"
    elif minutes < 60 * 48:
        amount, unit = round(minutes / 60), "hour"
    else:
        amount, unit = round(minutes / 60 / 24), "day"
    return f"{amount} {unit}{'' if amount == 1 else 's'}"
