"""Generate without end in fixed memory: `model.generate(ids, past_key_values=ProteusCache(model, gates, settings))`.

The chosen layers of a transformers decoder keep a KV bank each; the other layers keep the cache that transformers
would give them. While a cache lives, its model's passes look for it: one that carries it runs those layers through
their banks, every other pass is native. A prompt goes through the parallel pass, then tokens go one by one. Positions
are the text's own and grow without bound, so a model reads beyond what it was trained on sooner or later.

transformers' `generate` itself keeps the ids and mask of the whole text, 16 bytes per token; `hf.text.stream_text`
keeps nothing.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
)

from ..attention import AttentionConfig, Budget, Gates, plan_budget
from ..attention.adapter import ProteusLayer
from ..attention.bank.bank import ENDLESS, KVBank
from ..attention.calibration import Calibration
from ..attention.settings import Settings, config_for, default_settings
from ..common.files import cache_dir
from ..common.progress import Progress, Stop
from ..common.tensors import fingerprint, read_tensors, write_tensors
from ..common.texts import Text, calibration_text
from .bank_layer import NO_GRADIENT, BankLayer, HybridBankLayer, gates_from
from .decode_graph import DecodeGraph
from .passes import current_pass, only_this_thread, unwatch, watch
from .patch import check_layers, find_decoder, patched, reads_whole_past, surveyed
from .prompt_graph import PromptGraph
from .source import ModelSource

CALIBRATION_TOKENS = 2048


class ProteusCache(Cache):
    """A transformers cache that keeps the keys of chosen layers in KV banks, for one model and one batch of texts.

    Beams are reordered; taking tokens back (`crop`, assisted generation) is refused. No gradient. Each text keeps its
    own count, so prompts may be padded on the left. A pass that another thread runs through the same model meanwhile
    is refused. `close()`, the end of a `with` block, or the end of the cache's life leaves the model as it was.
    """

    def __init__(
        self,
        model,
        gates: Mapping[int, Gates],
        settings: Settings | AttentionConfig,
        *,
        tokens: int | None = None,
        reach: int | None = None,
        cuda_graph: bool = False,
    ):
        """An empty cache.

        model: a causal LM that `hf.patch` supports. gates: prototypes of each layer that gets a bank, by its index.
        settings: the budgets, as the playground's controls or as a config of the layers' sizes. tokens: how long a text
        may become; None: without end at flux alpha 0 (a plain cache, which grows) and 1, and the model's trained
        context in between, where budgets depend on the length. reach: tokens; once a text is longer, no key that left
        the window seems farther away than that (see `KVBank`), so that a model goes on making sense beyond what it was
        trained on. None leaves all positions as they are. Not with int8 or at flux alpha 0. cuda_graph: record the pass
        of one token as a CUDA graph and replay it, which is several times as fast; every layer must have a bank. Beam
        search, whose banks change with every token, runs without. A prompt of up to 32,768 tokens without padding uses
        graphs too: one layer is recorded, the later ones replay it. Run all passes of the model on one CUDA stream; the
        memory of recordings stays with the model.
        Raises `TypeError` or `ValueError` naming the argument.
        """
        decoder, known = surveyed(model)
        check_layers(dict.fromkeys(gates, id), known)
        if not gates:
            raise ValueError(f"gates={gates!r}: must hold the gates of at least one layer")
        shape = known.layers[next(iter(gates))].shape
        config = settings if isinstance(settings, AttentionConfig) else config_for(settings, shape)
        if (config.n_heads, config.n_kv_heads, config.head_dim) != (shape.n_heads, shape.n_groups, shape.head_dim):
            raise ValueError(f"settings is for other layers ({config}): must be for {shape}")
        alpha = 1 if config.flux_alpha is None else config.flux_alpha
        if tokens is None:
            tokens_planned = ENDLESS if alpha in (0, 1) else getattr(decoder.config, "max_position_embeddings", None)
        else:
            tokens_planned = tokens
        if tokens_planned is None:
            raise ValueError("tokens=None: must be given, since this model's config names no trained context")
        budget = plan_budget(config, tokens_planned)
        for index, its in gates.items():
            _check_gates(index, its, config)
            if known.layers[index].shape != shape:
                raise ValueError(f"gates has key {index}: that layer has other sizes than layer {next(iter(gates))}")
        if reach is not None:
            _check_reach(reach, budget, config.int8)
        self._model, self._decoder, self._config = model, decoder, config
        self._plan = {"tokens": tokens, "reach": reach}
        layers = DynamicCache(config=model.config).layers
        alone = set(gates) == set(reads_whole_past(model))
        for index, its in gates.items():
            native = layers[index] if index < len(layers) else None
            layers[index : index + 1] = [_bank_for(index, native, ProteusLayer(its, config), budget, alone, reach)]
        super().__init__(layers=layers)
        banks = self._bank_layers()
        next(iter(banks.values())).tracks = True
        only_banks = all(type(layer) is BankLayer for layer in layers)
        if cuda_graph:
            _check_graph(only_banks, budget, decoder.device)
        self._graph = DecodeGraph(decoder, banks) if cuda_graph else None
        self._prompt = PromptGraph(decoder) if cuda_graph else None
        for layer in banks.values():
            layer.defers, layer.prompt = only_banks, self._prompt
        self._running = self._cut_short = False
        watch(decoder)
        self._closing = finalize(self, unwatch, decoder)
        self._closing.atexit = False

    @classmethod
    def for_model(
        cls,
        model,
        tokenizer,
        settings: Settings | None = None,
        *,
        layers: Iterable[int] | None = None,
        tokens: int | None = None,
        reach: int | None | str = "auto",
        cuda_graph: bool = False,
        name: str | None = None,
        calibration: Text | None = None,
        folder: Path | None = None,
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> ProteusCache:
        """A cache whose gates are read from `folder`, or fitted to the model's keys of another text and kept there.

        settings: default `Settings()`, with fewer gates for a model of short context. layers: which get a bank, default
        all that read the whole past. name: under which the gates are kept, default the model's class. calibration: the
        text, default one that comes with the package. folder: default the user's cache. The first time takes one pass
        over 2,048 tokens. reach: "auto" is half the trained context where the text has no limit (flux alpha 1, no
        `tokens`), else None: no bound. tokens, cuda_graph: as in `ProteusCache`. Raises `Stopped` when `stop` requests
        it.
        """
        source = ModelSource(model, tokenizer, name or type(model).__name__)
        text = calibration or calibration_text("")
        enough = min(CALIBRATION_TOKENS, source.context or CALIBRATION_TOKENS)
        settings = settings or default_settings(enough)
        learned = Calibration(source, text, enough, folder or cache_dir() / "gates")
        chosen = source.full_layers if layers is None else layers
        gates = {index: learned.gates(index, settings.gates, progress=progress, stop=stop) for index in chosen}
        if reach == "auto":
            endless = tokens is None and settings.flux_alpha == 1 and source.context
            near = settings.shortlist * 2  # what `reach` has to hold at least
            reach = source.context // 2 if endless and source.context // 2 >= near else None
        return cls(model, gates, settings, tokens=tokens, reach=reach, cuda_graph=cuda_graph)

    # -- a life -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the model as it was. The cache can still be saved and looked at."""
        self._closing()
        if self._graph is not None:
            self._graph.forget()

    def __enter__(self) -> ProteusCache:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def run_pass(self, decoder: nn.Module, native: Callable, args: tuple, kwargs: dict):
        """One pass of the model, through the banks: what `native(*args, **kwargs)` returns then."""
        if decoder is not self._decoder or not self._closing.alive:
            raise RuntimeError("this ProteusCache is closed, or was made for another model")
        if self._cut_short:
            raise RuntimeError("a pass through this ProteusCache was cut short: reset() it, or go on from a fork")
        if decoder.training and torch.is_grad_enabled():
            raise ValueError(f"{type(decoder).__name__} is in training mode, and {NO_GRADIENT}")
        self._check_mask(kwargs.get("attention_mask"))
        recordable = self._graph is not None and self.get_seq_length() > 0
        state = self._graph.state_of(args, kwargs) if recordable else None
        turn = "run" if state is None else self._graph.turn(state)
        lengths = self._lengths()
        layers = {i: layer.attend for i, layer in self._bank_layers().items()}
        with only_this_thread(decoder) if turn == "replay" else patched(self._model, layers, one_thread=True):
            self._running = True
            try:
                if turn == "replay":
                    return self._graph.replay(kwargs)
                if turn == "record":
                    return self._graph.record(native, kwargs)
                return self._run_through(native, args, kwargs)
            except BaseException:
                recurrent = any(hasattr(layer, "recurrent_states") for layer in self.layers)
                self._cut_short = recurrent or self._lengths() != lengths
                raise
            finally:
                self._running = False
                if self._prompt is not None:
                    self._prompt.forget()
                for layer in self._bank_layers().values():
                    layer.end_pass()

    def _run_through(self, native: Callable, args: tuple, kwargs: dict):
        """A pass as usual. Where a prompt turns out to have keys or values that are not finite, it runs once more, and
        the banks look for them in each layer."""
        output, banks = native(*args, **kwargs), self._bank_layers().values()
        totals = [layer.total for layer in banks if layer.total is not None]
        finite = not totals or bool(torch.stack([x.to(totals[0].device) for x in totals]).isfinite().all())
        for layer in banks:
            layer.total = None
        if finite:
            return output
        for layer in banks:
            layer.reset()
            layer.defers = False
        current_pass(self._decoder).start()
        try:
            return native(*args, **kwargs)
        finally:
            for layer in banks:
                layer.defers = True

    def _check_mask(self, mask: Tensor | None) -> None:
        """Padding is not kept, so a later mask must show the same tokens as the earlier ones did."""
        bank, seen = next(iter(self._bank_layers().values())), self.get_seq_length()
        if not seen or not (mask is None or isinstance(mask, Tensor) and mask.dim() == 2):
            return
        if mask is None:
            mask = torch.ones(1, seen, dtype=torch.bool, device=self._decoder.device).expand(bank.bank.batch, -1)
        bank.check_past(mask[:, :seen].bool())

    def _bank_layers(self) -> dict[int, BankLayer]:
        return {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, BankLayer)}

    def _lengths(self) -> list[int]:
        return [layer.get_seq_length() for layer in self.layers if isinstance(layer, CacheLayerMixin)]

    def reset(self) -> None:
        """Drop all tokens of the text."""
        super().reset()
        self._cut_short = False
        if self._graph is not None:
            self._graph.forget()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """New keys and values of a layer, `(B, G, T, d)`, go in; the keys and values to attend to come back."""
        if not self._running:
            raise RuntimeError("this ProteusCache is closed, or was made for another model")
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def banks(self) -> dict[int, KVBank | None]:
        """Each chosen layer's bank; None before the first token."""
        return {i: layer.bank for i, layer in self._bank_layers().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept, layers without a bank included."""
        banks = sum(bank.nbytes for bank in self.banks.values() if bank is not None)
        native = (vars(layer) for layer in self.layers if not isinstance(layer, BankLayer))
        return banks + sum(x.nbytes for x in tree_leaves(list(native)) if isinstance(x, Tensor))

    # -- copies and files -------------------------------------------------------------------------------------

    def fork(self) -> ProteusCache:
        """An independent copy for the same model: two continuations can share what they have read."""
        gates = {i: layer.layer.gates for i, layer in self._bank_layers().items()}
        twin = ProteusCache(self._model, gates, self._config, **self._plan, cuda_graph=self._graph is not None)
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, BankLayer):
                twin.layers[index] = copy.deepcopy(layer)
            elif layer.bank is not None:
                twin.layers[index].take(layer)
        twin._cut_short = self._cut_short
        return twin

    def __deepcopy__(self, memo) -> ProteusCache:
        return self.fork()

    def save(self, path: str | Path) -> Path:
        """Write all that is kept, and the gates, to one safetensors file, whole or not at all."""
        tensors, banks = {}, {}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, BankLayer):
                mine, banks[index] = layer.state_dict()
            elif not isinstance(layer, CacheLayerMixin):
                raise ValueError(f"layer {index} keeps a {type(layer).__name__}: only keys and values can be saved")
            else:
                mine = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
            tensors |= {f"{index}.{name}": tensor for name, tensor in mine.items()}
        about = {"model": fingerprint(self._model), "config": self._config.to_dict(), "plan": self._plan}
        return write_tensors(path, tensors, about | {"length": self.get_seq_length(), "banks": banks})

    @classmethod
    def load(cls, path: str | Path, model, *, cuda_graph: bool = False) -> ProteusCache:
        """A saved cache, for the same model. cuda_graph: as in `ProteusCache`.

        Raises `FileNotFoundError`, or `ValueError` when it is not one of it.
        """
        tensors, about = read_tensors(path, "ProteusCache.save")
        try:
            if about["model"] != fingerprint(model):
                raise ValueError("it was made for another model")
            config = AttentionConfig(**about["config"])
            mine = [{} for _ in find_decoder(model).layers]
            for name, tensor in tensors.items():
                index, _, rest = name.partition(".")
                mine[int(index)][rest] = tensor.to(model.device)
            gates = {int(index): gates_from(mine[int(index)], config) for index in about["banks"]}
            cache = cls(model, gates, config, **about["plan"], cuda_graph=cuda_graph)
            for index, layer in enumerate(cache.layers):
                if isinstance(layer, BankLayer):
                    layer.load_state_dict(mine[index], about["banks"][str(index)])
                elif mine[index]:
                    layer.update(mine[index]["keys"], mine[index]["values"])
                    layer.cumulative_length = about["length"]  # a sliding window does not hold how long the text is
        except (KeyError, TypeError, ValueError, RuntimeError) as problem:
            raise ValueError(f"path={str(path)!r}: not a cache of this model ({problem})") from problem
        return cache


def _bank_for(index: int, native, *bank) -> BankLayer:
    """The bank of layer `index`, in place of the cache layer that transformers would give it."""
    if type(native) is DynamicLayer:
        return BankLayer(*bank)
    if type(native) is LinearAttentionAndFullAttentionLayer:
        return HybridBankLayer(*bank, states=native.number_of_states)
    kind = "nothing" if native is None else f"a {type(native).__name__}"
    raise ValueError(f"gates has key {index}: transformers' cache keeps {kind} for it, which a bank cannot replace")


def _check_gates(index: int, gates: Gates, config: AttentionConfig) -> None:
    if not isinstance(gates, Gates):
        raise TypeError(f"gates[{index}]={type(gates).__name__}: expected Gates")
    found = (gates.n_groups, gates.gates_per_group, gates.head_dim)
    wanted = (config.n_kv_heads, config.gates_per_group, config.head_dim)
    if found != wanted:
        raise ValueError(f"gates[{index}] has groups, gates and head dim {found}: must have {wanted}")


def _check_graph(only_banks: bool, budget: Budget, device: torch.device) -> None:
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True: must be False for a model on {device}")
    if budget.dense or not only_banks:
        raise ValueError("cuda_graph=True: must be False where a layer has no bank, or the budget holds every key")


def _check_reach(reach: int, budget: Budget, int8: bool) -> None:
    near = budget.window + 2 * budget.block
    if isinstance(reach, bool) or not isinstance(reach, int) or reach < near:
        raise ValueError(f"reach={reach!r}: must be a whole number >= {near}, the window and two blocks, or None")
    if int8 or budget.dense:
        raise ValueError(f"reach={reach}: must be None for int8 keys, which cannot be turned, and for a dense cache")
