"""Run one attention layer of a real model again at any setting of the controls.

The model runs once over the text; every layer's un-rotated queries, keys and values and its dense output are
kept as float16. After that, a view re-runs one layer and not the whole model.

Axes: `T` tokens, `H` query heads, `G` KV groups, `d` head dim, `D` model width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..attention import AttentionConfig, plan_budget, row_reads
from ..attention.adapter import ProteusLayer
from ..attention.calibration import Calibration, watch
from ..attention.captured import check_cache
from ..attention.selectors.seen import refuse_long, see_row
from ..attention.selectors.way import PLAIN, Way
from ..attention.settings import Settings, config_for
from ..common.checks import whole_number
from ..common.files import cache_dir
from ..common.machine import fast_dtype
from ..common.progress import Progress, Stop, Stopped, check_stop, tell
from ..common.texts import Text
from ..common.timing import Stopwatch
from ..hf.models import DEFAULT
from .layer_view import LoadedLayer, group_map, layer_view, load_layer, seeing
from .next_token import next_logprobs
from .random_source import RandomSource
from .source import Source
from .text_window import cut_text, describe
from .views import GateMap, LayerView, ModelView, RowView

__all__ = ["LayerProbe", "Stopped"]

LOADED = 3  # layers kept on the device at least
LOADED_BYTES = 1 << 25  # more layers stay there while they fit in this: all of a small model
CALIBRATION_TOKENS = 2048


class LayerProbe:
    """One model and one text, recorded so that each layer can be examined. Make it with a class method.

    Attributes: `name`; `note`, one sentence about model, text and prototypes; `random`, whether the weights are random;
    `tokens`, T strings; `n_layers`; `layers`, those that can be viewed; `n_heads`, `n_groups`, `head_dim`, `device`.
    Every method may be called from any thread. Views exclude one another, and so do runs of the model.

    A text longer than max_tokens is cut to its first 4 tokens, which models use as attention sinks, and its
    last max_tokens - 4, so that a question at the end is kept. `note` reports the cut.
    """

    def __init__(
        self,
        source: Source,
        text: Text,
        *,
        max_tokens: int,
        calibration: Text | None = None,
        calibration_tokens: int = CALIBRATION_TOKENS,
        cache: Path | None = None,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ):
        from ..common.texts import calibration_text

        self._source, shape = source, source.shape
        self.name, self.random, self.device = source.name, source.random, str(source.device)
        self.n_layers, self.layers = source.n_layers, source.full_layers
        self.n_heads, self.n_groups, self.head_dim = shape.n_heads, shape.n_groups, shape.head_dim
        whole_number("max_tokens", max_tokens, 8)
        whole_number("calibration_tokens", calibration_tokens, 8)
        words, cut = cut_text(source, text.body, max_tokens)
        if len(words) < 2:
            raise ValueError(f"text={text.name!r} has {len(words)} token: must have at least 2")
        if len(words) > (source.context or len(words)):
            raise ValueError(
                f"max_tokens={max_tokens}: must be at most {source.context}, the model's context, for a "
                f"text of {len(words):,} tokens"
            )
        check_cache(len(words), self.n_layers, self.n_heads, self.n_groups, self.head_dim, source.width)
        self.tokens = source.strings(words)
        self._ids = source.ids(words)
        fitted_on = calibration or calibration_text(text.name)
        self.note = describe(source, text, len(words), cut, fitted_on)
        calibration_tokens = min(calibration_tokens, source.context or calibration_tokens)
        self._calibration = Calibration(source, fitted_on, calibration_tokens, cache)
        before_layer = watch("reading the text", self.n_layers, progress, stop)
        self._captured = source.capture(self._ids, before_layer=before_layer)
        self._loaded: OrderedDict[int, LoadedLayer] = OrderedDict()
        self._maps: OrderedDict[tuple, GateMap] = OrderedDict()
        self._latest: LayerView | None = None
        self._watch = Stopwatch(source.device)
        self._dense_nll: tuple[float, float] | None = None
        self._lock, self._model_lock = RLock(), RLock()  # views stay possible while the model runs
        tell(progress, 1.0, self.note)

    @classmethod
    def from_pulled(
        cls,
        text,
        *,
        model: str = DEFAULT,
        max_tokens: int = 1024,
        device: str | None = None,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> LayerProbe:
        """A probe of any model that `hf.opening` opens, such as a pulled one.

        device: None means a GPU if there is one, else the CPU. float32 on the CPU; on a GPU bfloat16 if the hardware
        supports it, else float16.
        Raises `ValueError` for a model that is not pulled or a text or length that does not fit.
        """
        from ..hf.opening import load_source

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        tell(progress, 0.0, f"loading {model}")
        check_stop(stop)
        source, kept = load_source(model, device, fast_dtype(torch.device(device))), cache_dir() / "gates"
        return cls(source, text, max_tokens=max_tokens, cache=kept, progress=progress, stop=stop)

    @classmethod
    def from_model(cls, model, tokenizer, text, *, name: str, max_tokens: int = 1024, **options) -> LayerProbe:
        """A probe of any model that `hf.patch` supports, on the device it is on.

        options: as of `LayerProbe` itself: calibration, the text that prototypes are fitted on, None for one that is
        not `text`; cache, a folder for the prototypes, None for memory only; calibration_tokens, progress, stop.
        """
        from ..hf.source import ModelSource

        return cls(ModelSource(model, tokenizer, name), text, max_tokens=max_tokens, **options)

    @classmethod
    def random_layer(cls, text, *, max_tokens: int = 512, seed: int = 0) -> LayerProbe:
        """A probe of two layers with random weights over whole words: needs no model, and nothing was learned."""
        return cls(RandomSource(seed), text, max_tokens=max_tokens)

    @torch.no_grad()
    def view(self, layer: int, settings: Settings, *, way: Way = PLAIN, stop: Stop | None = None) -> LayerView:
        """Re-run one layer at `settings`. Raises `ValueError` for a value out of range, `Stopped` on request.

        way: what chooses the keys, and what is taken away. A selector that breaks the rules raises as `choose`.
        """
        if not way.plain:
            refuse_long(len(self.tokens))
        with self._lock:
            loaded, runner = self._ready(layer, settings, stop)
            check_stop(stop)
            made = layer_view(loaded, runner, settings, self._source, self._watch, way, lambda: check_stop(stop))
            self._latest = made
            return made

    @torch.no_grad()
    def row(self, layer: int, settings: Settings, token: int, head: int, way: Way = PLAIN) -> RowView:
        """The keys that one query row reads at `settings`; token in [0, T), head in [0, H)."""
        whole_number("token", token, 0, len(self.tokens) - 1)
        whole_number("head", head, 0, self.n_heads - 1)
        with self._lock:
            loaded, runner = self._ready(layer, settings)
            keep, awake = self._taking_part(loaded, runner, settings)
            if (keep is not None and not keep[0, token]) or (awake is not None and not awake[0, token, head]):
                empty = np.zeros(len(self.tokens))
                return RowView(token, head, empty.astype(np.uint8), empty.astype(np.float32), (), 0, True)
            if way.plain:
                row = dict(token=token, head=head, inv_freq=loaded.inv_freq, keep=keep, scale=loaded.scale)
                budget = plan_budget(runner.config, len(self.tokens))
                seen = row_reads(loaded.q, loaded.k, loaded.v, runner.gates, budget, **row)
            else:
                seen = see_row(seeing(loaded, runner, way), token, head)
            return RowView(token, head, seen.kind, seen.weight, seen.gates_opened, seen.notes_read, False)

    @torch.no_grad()
    def gate_map(self, layer: int, group: int, gates: int) -> GateMap:
        """Keys and prototypes of a KV group in 2-D. The axes depend on the keys alone, so no control moves them."""
        whole_number("group", group, 0, self.n_groups - 1)
        self._check_layer(layer)
        config_for(Settings(gates=gates, probes=1), self._source.shape)
        with self._lock:
            at = (layer, group, gates)
            if at not in self._maps:
                loaded = self._load(layer)
                self._maps[at] = group_map(loaded, group, self._calibration.gates(layer, gates))
                while len(self._maps) > 64:
                    self._maps.popitem(last=False)
            return self._maps[at]

    @property
    def predicts(self) -> bool:
        """Whether `next_logprobs` can be asked: the weights were learned, and every layer reads the whole past."""
        return not self.random and len(self.layers) == self.n_layers

    @torch.no_grad()
    def next_logprobs(
        self, token: int, settings: Settings | None, way: Way = PLAIN, *, stop: Stop | None = None
    ) -> np.ndarray:
        """Log-probability of every token to come after `token` `(V,)`; settings None: dense. See `next_token`.

        Raises `ValueError` where `predicts` is False or a value is out of range, `Stopped` on request.
        """
        whole_number("token", token, 0, len(self.tokens) - 1)
        if not self.predicts:
            raise ValueError(f"model={self.name!r}: it has random weights or sliding windows, so no token is predicted")
        with self._model_lock:
            config = None if settings is None else config_for(settings, self._source.shape)
            runners = None if config is None else {i: self._runner(i, config, stop) for i in self.layers}
            return next_logprobs(self._source, self._captured, self._ids, token, runners, way, stop)

    def words_of(self, ids: Sequence[int]) -> list[str]:
        """The text of tokens of the vocabulary, each on its own."""
        return self._source.strings(list(ids))

    def run_model(
        self,
        settings: Settings,
        *,
        layers: Sequence[int] | None = None,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> ModelView:
        """The loss of the whole model with `layers` (None: all in `self.layers`) at `settings`, and of the dense model.

        Both are scored on the second half of the tokens, T // 2 .. T - 1, each predicted from all before it,
        so that every scored row has a long past to choose from. The dense loss is computed once per probe.
        Raises `ValueError` for random weights and for layers out of range, `Stopped` on request.
        """
        if self.random:
            raise ValueError("model='random layer': random weights predict nothing; pull a model to run it whole")
        config = config_for(settings, self._source.shape)
        chosen = self.layers if layers is None else tuple(layers)
        for layer in chosen:
            self._check_layer(layer)
        first = max(1, len(self._ids) // 2)
        with self._model_lock:
            runners = {}
            for done, layer in enumerate(chosen):
                check_stop(stop)
                tell(progress, 0.3 * done / len(chosen), f"prototypes of layer {layer}")
                runners[layer] = self._runner(layer, config, stop)
            if self._dense_nll is None:
                self._dense_nll = self._scored(first, {}, "dense", 0.3, 0.6, progress, stop)
            nll, seconds = self._scored(first, runners, "at these settings", 0.6, 1.0, progress, stop)
        dense_nll, dense_seconds = self._dense_nll
        return ModelView(settings, chosen, nll, dense_nll, len(self._ids) - first, seconds, dense_seconds)

    def _scored(self, first, runners, what, start, end, progress, stop) -> tuple[float, float]:
        """NLL and seconds of one pass of the model; its progress is mapped to `start` .. `end`."""
        scaled = None if progress is None else lambda share, said: progress(start + (end - start) * share, said)
        before = watch(f"the whole model, {what}", self.n_layers, scaled, stop)
        begun = perf_counter()
        return self._source.nll(self._ids, first, runners, before), perf_counter() - begun

    def _ready(self, layer: int, settings: Settings, stop: Stop | None = None) -> tuple[LoadedLayer, ProteusLayer]:
        config = config_for(settings, self._source.shape)
        loaded = self._load(layer)
        check_stop(stop)
        return loaded, self._runner(layer, config, stop)

    def _taking_part(
        self, loaded: LoadedLayer, runner: ProteusLayer, settings: Settings
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens that take part `(1, T)` and heads that they wake `(1, T, H)`; None for all.

        The last view knows them where it is of the same layer and settings: the row on show follows the layer on show.
        """
        view = self._latest
        if view is not None and view.way.plain and (view.layer, view.settings) == (loaded.index, settings):
            kept, awake = (torch.from_numpy(x).to(loaded.k.device)[None] for x in (view.kept, view.awake))
            return None if view.kept.all() else kept, awake
        decisions = runner.decide(loaded.q, loaded.k, logits=loaded.logits)
        return decisions.keep, decisions.awake

    def _runner(self, layer: int, config: AttentionConfig, stop: Stop | None) -> ProteusLayer:
        gates = self._calibration.gates(layer, config.gates_per_group, stop=stop)
        trained = gates is self._source.own_gates.get((layer, config.gates_per_group))
        return ProteusLayer(gates, config, self._source.routers.get(layer) if trained else None)

    def _load(self, layer: int) -> LoadedLayer:
        self._check_layer(layer)
        if layer not in self._loaded:
            self._loaded[layer] = load_layer(layer, self._captured[layer], self._source, self._watch)
        self._loaded.move_to_end(layer)
        while len(self._loaded) > max(LOADED, LOADED_BYTES // self._loaded[layer].nbytes):
            self._loaded.popitem(last=False)
        return self._loaded[layer]

    def _check_layer(self, layer: int) -> None:
        whole_number("layer", layer, 0, self.n_layers - 1)
        if layer not in self.layers:
            raise ValueError(
                f"layer={layer}: attends to a sliding window and is not replaced; allowed is one of {self.layers}"
            )
