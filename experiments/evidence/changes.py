"""Ablations: one change at a time to the models that were trained with a random alpha.

Most changes apply to the evaluation only and use the same weights; those with `trained` need models of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...lm.model import ProteusLM
from ...lm.recall.recipe import Scale

AS_IT_IS = "as it is"


@dataclass(frozen=True)
class Change:
    """One ablation.

    part: the part that is changed. reads: fields of `AttentionConfig` in the evaluation. trained: fields in training,
    where the model has to learn them; "half" stands for half the heads. lessons: fields of `Scale` in training. gates:
    number of gates per group, fitted by k-means; 0 keeps their number, None keeps the gates. salient: rings hold the
    most salient keys of a gate instead of the newest.
    """

    part: str
    reads: dict = field(default_factory=dict)
    trained: dict = field(default_factory=dict)
    lessons: dict = field(default_factory=dict)
    gates: int | None = None
    salient: bool = False

    @property
    def label(self) -> str:
        """Settings that its model is trained with; empty where the study's own model is used."""
        return ",".join(f"{name}={value}" for name, value in sorted({**self.trained, **self.lessons}.items()))

    def is_own(self, scale: Scale) -> bool:
        """Whether its lessons are those of the study's own models."""
        return bool(self.lessons) and all(getattr(scale, name) == value for name, value in self.lessons.items())


GROUPED = {"n_kv_heads": "half"}
ROUTED = GROUPED | {"route_heads": True}
CHANGES = {
    AS_IT_IS: Change(""),
    "no notes": Change("notes", {"notes": False}),
    "no anchors": Change("anchors", {"n_anchors": 0}),
    "window and anchors alone": Change("DNA", {"dna_fraction": 0.0}),
    "half of L by gates": Change("DNA", {"dna_fraction": 0.5}),
    "nine tenths of L by gates": Change("DNA", {"dna_fraction": 0.9}),
    "1 probe": Change("probes x ring", {"probes": 1}),
    "4 probes": Change("probes x ring", {"probes": 4}),
    "8 probes": Change("probes x ring", {"probes": 8}),
    "32 probes": Change("probes x ring", {"probes": 32}),
    "4 probes; notes of all gates": Change("nearest gates", {"nearest_gates": False, "probes": 4}),
    "rings of the most salient": Change("rings", salient=True),
    "k-means prototypes": Change("prototypes", gates=0),
    "8 gates by k-means": Change("gates", gates=8),
    "32 gates by k-means": Change("gates", gates=32),
    "64 gates by k-means": Change("gates", gates=64),
    "256 gates by k-means": Change("gates", gates=256),
    "keep 3/4 of the tokens": Change("keep", {"keep_ratio": 0.75}),
    "keep 1/2 of the tokens": Change("keep", {"keep_ratio": 0.5}),
    "opening loss": Change("opening loss", lessons={"opening": 0.3}),
    "alpha 1 in every thinned step": Change("random alpha", lessons={"top_share": 1.0}),
    "EMA 0.9": Change("EMA", trained={"ema_decay": 0.9}),
    "EMA 0.999": Change("EMA", trained={"ema_decay": 0.999}),
    "two heads share keys": Change("routing", trained=GROUPED),
    "routed": Change("routing", trained=ROUTED),
    "routed with Top-P 0.6": Change("Top-P", {"head_top_p": 0.6}, trained=ROUTED),
    "routed with one of two awake": Change("Top-P", {"heads_awake_max": 1}, trained=ROUTED),
    "routed without balance": Change("balance", trained=ROUTED | {"balance_rate": 0.0}),
}


def in_training(change: Change, heads: int) -> dict:
    """Fields of `AttentionConfig` that a change's model is trained with. ValueError where heads cannot be halved."""
    if "half" in change.trained.values() and heads % 2:
        raise ValueError(f"heads={heads}: must be even for changes in which two heads share keys")
    return {name: heads // 2 if value == "half" else value for name, value in change.trained.items()}


def with_gates(model: ProteusLM, count: int) -> ProteusLM:
    """A model of the same weights with `count` new gates per group, not yet fitted; 0 keeps their number."""
    shape = model.cfg.to_dict()
    shape["attention"] |= {"gates_per_group": count} if count else {}
    other = ProteusLM(type(model.cfg).from_dict(shape)).to(model.embed.weight.device).eval()
    kept = {name: x for name, x in model.state_dict().items() if ".gates." not in name}
    other.load_state_dict(kept, strict=False)
    return other
