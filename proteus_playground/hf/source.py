"""A transformers causal LM as a `Source`: tokens in, each layer's tensors out, likelihood of a text.

Axes: `T` tokens, `H` query heads, `d` head dim, `D` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from threading import RLock

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import AttentionConfig, Gates
from ..attention.captured import CapturedLayer
from ..common.tensors import fingerprint
from .patch import Attend, capture, find_decoder, full_attention_layers, patched, surveyed
from .plain_text import text_ids
from .shipped_gates import shipped_gates

NLL_ROWS = 256  # rows of logits turned into float32 probabilities at a time


class ModelSource:
    """Wraps a model that `hf.patch` supports, and its tokenizer; the model is neither copied nor changed."""

    random = False
    routers = {}  # it was trained without any
    gates_from = "with the package"
    config: AttentionConfig | None = None  # of its layers, where the model has a slider of its own

    def __init__(self, model, tokenizer, name: str):
        decoder, known = surveyed(model)
        self.full_layers = full_attention_layers(model)
        if not self.full_layers:
            raise ValueError(f"model={name!r}: every layer reads a sliding window, so there is nothing to replace")
        self.name, self._model, self.tokenizer = name, model, tokenizer
        self._layers = known.layers
        self.shape = known.layers[self.full_layers[0]].shape
        self.n_layers, self.width = len(self._layers), decoder.config.hidden_size
        self.context = getattr(decoder.config, "max_position_embeddings", None)
        self.device = model.device
        self.dtype = torch.float32 if self.device.type == "cpu" else model.dtype
        self.fingerprint = fingerprint(model)
        self._lock = RLock()  # a pass goes through the patch of whoever patched last, so one pass at a time

    @property
    def model(self):
        """The transformers model."""
        return self._model

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return self._model.get_input_embeddings().weight.shape[0]

    @cached_property
    def own_gates(self) -> dict[tuple[int, int], Gates]:
        """(layer, gates per group) -> the gates that come with the package."""
        healed = getattr(self._model, "proteus_gates", None)  # of `shipped_adapter`
        found = healed or shipped_gates(find_decoder(self._model), self.shape)
        return {at: gates.to(self.device) for at, gates in found.items() if at[0] in self.full_layers}

    def encode(self, body: str) -> list[int]:
        """Token ids, with whatever the tokenizer puts in front of a text. Control tokens in the text stay text."""
        return text_ids(self.tokenizer, body)

    def ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens)

    def decode(self, ids: list[int]) -> str:
        """The text of some tokens, without control tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def strings(self, tokens: list[int]) -> list[str]:
        """What each token reads as on its own."""
        return self.tokenizer.batch_decode([[token] for token in tokens], clean_up_tokenization_spaces=False)

    def project(self, layer: int, out: Tensor) -> Tensor:
        """The layer's output projection: `(T, H d)` -> `(T, D)`. Raises `ValueError` where more than that follows."""
        facts = self._layers[layer]
        if facts.output is None:
            raise ValueError(f"layer={layer} of {self.name}: more than a projection follows its attention")
        projection = getattr(find_decoder(self._model).get_submodule(facts.name), facts.output)
        heads = out.unflatten(-1, (facts.shape.n_heads, -1))[..., : facts.value_dim].flatten(-2)
        return projection(heads.to(projection.weight.dtype))

    def capture(
        self, ids: Tensor, *, keys_only: bool = False, before_layer: Callable[[int], None] | None = None
    ) -> dict[int, CapturedLayer]:
        """Queries, keys and values of `ids` `(T,)` in each layer that can be patched."""
        with self._lock:
            return capture(self._model, ids, keys_only=keys_only, before_layer=before_layer)

    @torch.inference_mode()
    def nll(
        self, ids: Tensor, first: int, layers: Mapping[int, Attend], before_layer: Callable[[int], None] | None = None
    ) -> float:
        """Mean negative log-likelihood, nats, of tokens `first` .. T-1 of `ids`, each given its past."""
        ids, scored = ids.to(self.device), len(ids) - first
        logits = self._logits(ids, scored + 1, layers, before_layer)[:-1]
        pieces = zip(logits.split(NLL_ROWS), ids[first:].split(NLL_ROWS), strict=True)
        total = sum(F.cross_entropy(rows.float(), wanted, reduction="sum").item() for rows, wanted in pieces)
        return total / scored

    @torch.inference_mode()
    def predict(self, ids: Tensor, first: int, layers: Mapping[int, Attend]) -> list[int]:
        """The likeliest token at each position `first` .. T of `ids` `(T,)`, given what is before it."""
        return self._logits(ids.to(self.device), len(ids) - first + 1, layers).argmax(-1).tolist()

    @torch.inference_mode()
    def next_logits(self, ids: Tensor, look: Callable) -> Tensor:
        """Logits `(V,)` of the token after `ids`, the last few of a text; `look` as in `playground.source.Source`."""

        def attend(call) -> Tensor:
            return look(call.layer, call.q[0], call.k[0], call.v[0], None)[None]

        return self._logits(ids.to(self.device), 1, dict.fromkeys(self.full_layers, attend))[0]

    def _logits(self, ids: Tensor, last: int, layers: Mapping[int, Attend], before_layer=None) -> Tensor:
        """Of the last rows of a pass over `ids` `(T,)`: `(last, V)`."""
        with self._lock, patched(self._model, layers, before_layer):
            return self._model(ids[None], use_cache=False, logits_to_keep=last).logits[0]
