"""A `ProteusLM` and its tokenizer as a `Source` that also answers questions.

Settings other than the model's own run in a twin, a model that shares every weight but whose layers have other budgets,
gates and routers.

Axes: `T` tokens, `H` query heads, `d` head dim, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.adapter import ProteusLayer
from ..attention.captured import CapturedLayer, half
from ..attention.settings import LayerShape
from ..common.progress import Stop, check_stop
from ..common.tensors import fingerprint
from ..hf.attention_call import Attend, AttentionCall
from ..lm.model import ProteusLM
from .source import Look

# Fields of `AttentionConfig` that no control changes.
TRAINED = ("prior_max", "prior_temperature", "heads_awake_min", "heads_awake_max")


class ShelfSource:
    """Wraps a model, which must be in evaluation mode and is neither copied nor changed, and a `ShelfTokenizer`.

    A layer that has as many gates as in training uses the trained gates and the trained router.
    """

    random, context, gates_from = False, None, "from its training"

    def __init__(self, model: ProteusLM, tokenizer, name: str):
        if model.training:
            raise ValueError("training=True: the model must be in evaluation mode; call eval()")
        self.name, self._model, self._tokenizer = name, model, tokenizer
        cfg = model.cfg.attention
        trained = {field: getattr(cfg, field) for field in TRAINED} if cfg.route_heads else {}
        self.shape = LayerShape(cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, trained)
        self.n_layers, self.width = len(model.blocks), cfg.d_model
        self.full_layers = tuple(range(self.n_layers))
        self.device, self.dtype = model.embed.weight.device, model.embed.weight.dtype
        layers = {index: block.attn for index, block in enumerate(model.blocks)}
        self.own_gates = {(index, attn.gates.gates_per_group): attn.gates for index, attn in layers.items()}
        self.routers = {index: attn.router for index, attn in layers.items() if attn.router is not None}
        self.fingerprint = fingerprint(model)

    def encode(self, body: str) -> list[int]:
        return self._tokenizer.encode(body)

    def spans(self, body: str) -> list[tuple[int, int]]:
        """First character of each token of `encode(body)`, and the character after its last."""
        return self._tokenizer.spans(body)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def ids(self, tokens: list[int]) -> Tensor:
        return torch.tensor(tokens)

    def strings(self, tokens: list[int]) -> list[str]:
        """The text of each token on its own."""
        return self._tokenizer.strings(tokens)

    def project(self, layer: int, out: Tensor) -> Tensor:
        """o_proj: `(T, H d)` -> `(T, D)`."""
        return self._model.blocks[layer].attn.o_proj(out)

    @torch.no_grad()
    def capture(
        self, ids: Tensor, *, keys_only: bool = False, before_layer: Callable[[int], None] | None = None
    ) -> dict[int, CapturedLayer]:
        """Queries, keys and values of `ids` `(T,)` in each layer of the dense model, on the CPU in float16."""
        found: dict[int, CapturedLayer] = {}

        def record(layer: int, x: Tensor, y: Tensor) -> None:
            attn = self._model.blocks[layer].attn
            d, of = self.shape.head_dim, {"inv_freq": attn.inv_freq, "scale": self.shape.head_dim**-0.5}
            k = half(attn.k_proj(x[0]).unflatten(-1, (-1, d)))
            if keys_only:
                found[layer] = CapturedLayer(None, k, None, None, **of)
                return
            q, v = (half(proj(x[0]).unflatten(-1, (-1, d))) for proj in (attn.q_proj, attn.v_proj))
            logits = None if attn.router is None else half(attn.router(x)[0])
            found[layer] = CapturedLayer(q, k, v, half(y[0]), logits=logits, **of)

        self._twin({}, before_layer, record).hidden(ids.to(self.device)[None])
        return found

    @torch.inference_mode()
    def nll(
        self,
        ids: Tensor,
        first: int,
        layers: Mapping[int, ProteusLayer | Attend],
        before_layer: Callable[[int], None] | None = None,
    ) -> float:
        """Mean negative log-likelihood, nats, of tokens `first` .. T-1 of `ids`, each given its past.

        layers: index -> what runs in place of that layer's attention. A function of an `AttentionCall`, as for
        `hf.patch.patched`, gets un-rotated queries, keys and values and wakes every head.
        """
        ids = ids.to(self.device)
        states = self._twin(layers, before_layer).hidden(ids[None])[0, first - 1 : -1]
        return F.cross_entropy(states @ self._model.embed.weight.T, ids[first:]).item()

    @torch.inference_mode()
    def predict(self, ids: Tensor, first: int, layers: Mapping[int, ProteusLayer | Attend]) -> list[int]:
        """The likeliest token at each position `first` .. T of `ids` `(T,)`, given what is before it."""
        states = self._twin(layers).hidden(ids.to(self.device)[None])[0, first - 1 :]
        return (states @ self._model.embed.weight.T).argmax(-1).tolist()

    @torch.inference_mode()
    def next_logits(self, ids: Tensor, look: Look) -> Tensor:
        """See `Source`."""
        twin = self._twin({})
        for index, block in enumerate(twin.blocks):
            block.attn = _Looked(index, self._model.blocks[index].attn, look)
        return twin.hidden(ids.to(self.device)[None])[0, -1] @ self._model.embed.weight.T

    @torch.inference_mode()
    def answer(
        self, ids: Tensor, layers: Mapping[int, ProteusLayer], ends: Iterable[int], most: int, stop: Stop | None = None
    ) -> list[int]:
        """Greedy continuation of `ids` `(T,)`: at most `most` tokens, up to but without the first one in `ends`.

        layers: index -> what runs in place of that layer's attention; all other layers are dense. Raises `Stopped` on
        request, between two layers.
        """
        model, ends, said = self._twin(layers, lambda _: check_stop(stop)), set(ends), []
        state = model.new_state(1, len(ids) + most)
        for token in model.generate(ids.to(self.device)[None], most, temperature=0.0, state=state):
            if int(token) in ends:
                break
            said.append(int(token))
        return said

    def _twin(self, layers: Mapping[int, ProteusLayer], before=None, after=None) -> ProteusLM:
        """The model with `layers` at their settings and the others dense.

        before(layer) is called before each layer, after(layer, x, y) after its attention.
        """
        model = _share(self._model)
        model.blocks = nn.ModuleList(map(_share, self._model.blocks))
        for index, block in enumerate(model.blocks):
            block.attn = _attention(index, block.attn, layers.get(index))
            if before is not None:
                block.attn_norm = _Before(block.attn_norm, partial(before, index))
            if after is not None:
                block.attn = _Hooked(index, block.attn, after)
        return model


def _share(module: nn.Module) -> nn.Module:
    """A new module with the same submodules, which can be exchanged without changing the first module."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _attention(index: int, attn: nn.Module, runner: ProteusLayer | Attend | None) -> nn.Module:
    """The layer with the budgets, gates and router of `runner`; dense if that is None."""
    twin = _share(attn)
    if runner is None:
        twin.cfg = replace(attn.cfg, flux_alpha=0.0)
        return twin
    if not isinstance(runner, ProteusLayer):
        return _Called(index, attn, runner)
    twin.cfg = replace(runner.config, d_model=attn.cfg.d_model, bias=attn.cfg.bias)
    twin.gates = runner.gates
    twin.router = (runner.router or _Untrained()) if runner.config.route_heads else None
    return twin


class _Called(nn.Module):
    """Takes the place of a layer and asks a function for the heads' outputs."""

    def __init__(self, index: int, attn: nn.Module, attend: Attend):
        super().__init__()
        self.index, self.attn, self.attend = index, attn, attend

    def forward(self, x: Tensor, **options):
        attn, scale = self.attn, self.attn.cfg.head_dim**-0.5
        at = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        call = AttentionCall(self.index, *attn.project(x), attn.inv_freq, at, scale, None)
        return attn.o_proj(self.attend(call).flatten(2))


class _Looked(nn.Module):
    """Takes the place of a layer and asks a `Look`."""

    def __init__(self, index: int, attn: nn.Module, look: Look):
        super().__init__()
        self.index, self.attn, self.look = index, attn, look

    def forward(self, x: Tensor, **options):
        logits = None if self.attn.router is None else self.attn.router(x)[0]
        q, k, v = (part[0] for part in self.attn.project(x))
        return self.attn.o_proj(self.look(self.index, q, k, v, logits).flatten(1)[None])


class _Untrained(nn.Module):
    """Takes the place of a router and returns no logits, so that heads are routed by the prototypes' prior alone."""

    balance = None

    def forward(self, x: Tensor) -> None:
        return None


class _Before(nn.Module):
    """Calls a function, then the module that it replaces."""

    def __init__(self, module: nn.Module, call: Callable[[], None]):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Tensor:
        self.call()
        return self.module(x)


class _Hooked(nn.Module):
    """Wraps a layer's attention and calls a hook after it has run."""

    def __init__(self, index: int, attn: nn.Module, after):
        super().__init__()
        self.index, self.attn, self.after = index, attn, after

    def forward(self, x: Tensor, **options):
        y = self.attn(x, **options)
        self.after(self.index, x, y)
        return y
