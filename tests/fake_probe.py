"""A probe with the real one's interface and made-up, repeatable numbers, so that widgets are tested in milliseconds."""

from __future__ import annotations

import time

import numpy as np

from proteus_playground.attention.budget import split_shortlist
from proteus_playground.attention.selectors.way import PLAIN, Way
from proteus_playground.attention.settings import Settings
from proteus_playground.playground.views import ANCHOR, DNA, LOCAL, NOTE, GateMap, LayerView, ModelView, RowView

WORDS = ("the", "soup", "was", "warm", "and", "a", "humble", "token", "sat", "on", "page", "fifty", "five", "\n", "why")


class FakeProbe:
    """Causal, deterministic, counted: `calls` says how often each method ran. `seconds` slows `view` down."""

    def __init__(self, tokens: int = 300, *, seconds: float = 0.0, heads: int = 9, groups: int = 3, layers: int = 4):
        self.tokens = [(" " if i else "") + WORDS[i * 7 % len(WORDS)] for i in range(tokens)]
        self.name, self.random, self.note = "Fake", False, "Made-up numbers for tests."
        self.n_layers, self.n_heads, self.n_groups, self.head_dim = layers, heads, groups, 8
        self.device = "cpu"
        self.seconds = seconds
        self._maps: dict[tuple, GateMap] = {}
        self.predicts = True
        self.calls = {"next_logprobs": 0, "view": 0, "row": 0, "gate_map": 0, "run_model": 0}

    def view(self, layer: int, settings: Settings, *, way: Way = PLAIN, stop=None) -> LayerView:
        self.calls["view"] += 1
        self._wait(stop)
        size, rng = len(self.tokens), np.random.default_rng(layer)
        salience = rng.random(size).astype(np.float32)
        head_map = rng.random((size, self.n_heads)).astype(np.float32) * (1 - 0.7 * settings.flux_alpha)
        budget = self._budget(settings)
        reads = np.minimum(np.arange(size)[:, None] + 1, budget["shortlist"]).repeat(self.n_heads, 1)
        awake = rng.random((size, self.n_heads)) < (0.5 if settings.route_heads else 2.0)
        share = budget["shortlist"] / size
        return LayerView(
            layer=layer, settings=settings, head_map=head_map, awake=awake, reads=reads, salience=salience,
            head_map_kind="routing weight" if settings.route_heads else "attention to other keys than anchors",
            kept=salience >= np.quantile(salience, 1 - settings.keep_ratio) - 1e-6,
            gate_of_key=rng.integers(0, settings.gates, (size, self.n_groups)),
            error=0.2 * settings.flux_alpha, latency_ms=1 + 9 * share, dense_ms=10.0,
            flops=1e9 * share, dense_flops=1e9, bytes=1e6 * share, dense_bytes=1e6,
            budget=budget, backend="fake", backend_reason="made up", device="cpu", way=way,
        )  # fmt: skip

    def row(self, layer: int, settings: Settings, token: int, head: int, way: Way = PLAIN) -> RowView:
        self.calls["row"] += 1
        size, budget = len(self.tokens), self._budget(settings)
        kind = np.zeros(size, np.uint8)
        rng = np.random.default_rng(token * 31 + head)
        old = max(0, token - budget["window"])
        if settings.notes and budget["notes"]:
            kind[:old] = NOTE
        kind[rng.choice(old, min(old, budget["ring_reads"]), replace=False)] = DNA
        kind[old : token + 1] = LOCAL
        kind[: min(budget["anchors"], token + 1)] = ANCHOR
        weight = np.where(kind > 0, rng.random(size) ** 4 + 1e-4, 0).astype(np.float32)
        gates = tuple(int(g) for g in rng.choice(settings.gates, min(settings.probes, settings.gates), replace=False))
        return RowView(token, head, kind, weight / weight.sum(), gates, budget["notes"], asleep=False)

    def gate_map(self, layer: int, group: int, gates: int) -> GateMap:
        self.calls["gate_map"] += 1
        return self._maps.setdefault((layer, group, gates), self._map(layer, group, gates))

    def _map(self, layer: int, group: int, gates: int) -> GateMap:
        rng = np.random.default_rng(layer * 9 + group)
        prototypes = rng.normal(size=(gates, 2)).astype(np.float32) * 0.4
        keys = prototypes[rng.integers(0, gates, len(self.tokens))]
        keys = keys + 0.06 * rng.normal(size=keys.shape).astype(np.float32)
        return GateMap(layer, group, keys.astype(np.float32), prototypes, 0.31)

    def next_logprobs(self, token: int, settings, way: Way = PLAIN, *, stop=None) -> np.ndarray:
        self.calls["next_logprobs"] += 1
        logits = np.random.default_rng(token).normal(size=len(WORDS)) * (2 + len(str(way.without)) + (settings is None))
        return (logits - np.log(np.exp(logits).sum())).astype(np.float32)

    def words_of(self, ids) -> list[str]:
        return [WORDS[i] for i in ids]

    def run_model(self, settings: Settings, *, layers=None, progress=None, stop=None) -> ModelView:
        self.calls["run_model"] += 1
        for step in range(10):
            self._wait(stop)
            if progress:
                progress(step / 10, f"layer {step}")
        nll = 3.4 + 0.3 * settings.flux_alpha
        return ModelView(settings, tuple(range(self.n_layers)), nll, 3.4, 512, 1.0, 2.0)

    def _budget(self, settings: Settings) -> dict:
        size = len(self.tokens)
        reads = round(size ** (1 - settings.flux_alpha) * min(settings.shortlist, size) ** settings.flux_alpha)
        split = split_shortlist(
            reads, settings.dna_fraction, settings.anchors, settings.probes, settings.gates,
            None if settings.notes else 0, settings.nearest_gates,
        )  # fmt: skip
        return {
            "flux_alpha": settings.flux_alpha, "shortlist": reads, "keep_ratio": settings.keep_ratio, **split,
            "dense": settings.flux_alpha == 0,
        }  # fmt: skip

    def _wait(self, stop) -> None:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            if stop is not None and stop():
                raise RuntimeError("stopped")
            time.sleep(0.002)
