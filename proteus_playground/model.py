"""A small causal language model whose attention is dense or Proteus by its config alone.

Axes: `B` batch, `T` tokens, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import AttentionConfig, KVBank, ProteusAttention
from .checks import whole_number
from .sampling import Sampling
from .tensors import read_tensors, write_tensors


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a `ProteusLM`. Raises `TypeError` or `ValueError` naming the field."""

    vocab_size: int
    """Different tokens V, >= 1."""
    n_layers: int
    """Blocks, >= 1."""
    attention: AttentionConfig
    """Of every block; its `d_model` is the model's width."""
    hidden: int | None = None
    """Width of the MLPs, features, >= 1. None means 8/3 D rounded up to a multiple of 8."""

    def __post_init__(self) -> None:
        if not isinstance(self.attention, AttentionConfig):
            raise TypeError(f"attention={type(self.attention).__name__}: expected AttentionConfig")
        for name in ("vocab_size", "n_layers"):
            whole_number(name, getattr(self, name), 1)
        if self.hidden is not None:
            whole_number("hidden", self.hidden, 1)

    def to_dict(self) -> dict:
        """Plain values, enough for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        return cls(**{**values, "attention": AttentionConfig(**values["attention"])})


class ProteusBlock(nn.Module):
    """RMSNorm, `ProteusAttention`, RMSNorm, SwiGLU MLP, each added to the residual: `(B, T, D)` -> `(B, T, D)`.

    hidden: MLP width, default 8/3 D rounded up to a multiple of 8.
    """

    def __init__(self, cfg: AttentionConfig, hidden: int | None = None):
        super().__init__()
        if hidden is not None:
            whole_number("hidden", hidden, 1)
        D = cfg.d_model
        hidden = hidden or -(-8 * D // 24) * 8
        self.attn_norm, self.mlp_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.attn = ProteusAttention(cfg)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor, *, return_stats: bool = False, **attention):
        """`attention` is passed on to `ProteusAttention.forward`; with return_stats also its `AttentionStats`."""
        out = self.attn(self.attn_norm(x), return_stats=return_stats, **attention)
        y, stats = out if return_stats else (out, None)
        x = self._mlp(x + y)
        return (x, stats) if return_stats else x

    def prefill(self, x: Tensor, tokens: int | None = None) -> tuple[Tensor, KVBank]:
        """`forward` of a text's beginning, and the state after it: see `ProteusAttention.prefill`."""
        y, state = self.attn.prefill(self.attn_norm(x), tokens)
        return self._mlp(x + y), state

    def decode(self, x: Tensor, state: KVBank) -> Tensor:
        """The next tokens, `(B, n, D)`: see `ProteusAttention.decode`."""
        return self._mlp(x + self.attn.decode(self.attn_norm(x), state))

    def _mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


@dataclass
class ModelState:
    """All that a `ProteusLM` remembers of its texts: a state per layer, and the last token if no layer saw it yet."""

    layers: list[KVBank]
    planned: int | None  # how long the texts may become, tokens; None without end
    pending: Tensor | None = None  # (B, 1) int64

    @property
    def tokens(self) -> int:
        """How long the texts are, in tokens."""
        return self.layers[0].tokens + (self.pending is not None)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def fork(self) -> ModelState:
        """An independent copy: two continuations can share what they have read."""
        return replace(self, layers=[layer.fork() for layer in self.layers])

    def save(self, path: str | Path) -> Path:
        """Write the state to one safetensors file, whole or not at all; `ProteusLM.load_state` reads it."""
        states = [layer.state_dict() for layer in self.layers]
        tensors = {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state["tensors"].items()}
        if self.pending is not None:
            tensors["pending"] = self.pending
        return write_tensors(path, tensors, {"planned": self.planned, "layers": [state["about"] for state in states]})


class ProteusLM(nn.Module):
    """Embedding, blocks, RMSNorm, and the embedding again as the head: tokens `(B, T)` -> logits `(B, T, V)`."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if not isinstance(cfg, ModelConfig):
            raise TypeError(f"cfg={type(cfg).__name__}: expected ModelConfig")
        self.cfg = cfg
        D = cfg.attention.d_model
        self.embed = nn.Embedding(cfg.vocab_size, D)
        nn.init.normal_(self.embed.weight, std=D**-0.5)
        self.blocks = nn.ModuleList(ProteusBlock(cfg.attention, cfg.hidden) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(D)

    def forward(self, ids: Tensor, **attention) -> Tensor:
        """Logits of the next token after each: ids `(B, T)` int64 in [0, V) -> `(B, T, V)`.

        `attention` goes to every `ProteusAttention.forward`: positions, key_padding_mask.
        """
        self._check(ids)
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, **attention)
        return self._head(x)

    # -- text, token by token ---------------------------------------------------------------------------------

    def new_state(self, batch: int = 1, tokens: int | None = None) -> ModelState:
        """A state that has read nothing. tokens: how long texts may become, as `ProteusAttention.new_state` says."""
        return ModelState([block.attn.new_state(batch, tokens) for block in self.blocks], tokens)

    @torch.no_grad()
    def prefill(self, ids: Tensor | None, state: ModelState) -> Tensor:
        """Read the next tokens of every text, `(B, T)`, into `state`. Logits after the last one, `(B, V)`.

        A token that generation left pending is read first; ids=None reads nothing else.
        """
        if ids is not None:
            self._check(ids)
            if len(ids) != state.layers[0].batch:
                raise ValueError(f"ids has {len(ids)} texts: must have {state.layers[0].batch}, as the state")
        ids = torch.cat([x for x in (state.pending, ids) if x is not None], dim=1)
        first, state.pending = state.tokens == 0 and ids.shape[1] > 1, None
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            if first:
                x, state.layers[i] = block.prefill(x, state.planned)
            else:
                x = block.decode(x, state.layers[i])
        return self._head(x[:, -1])

    def generate(
        self,
        ids: Tensor | None,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        state: ModelState | None = None,
    ) -> Iterator[Tensor]:
        """Continue each text of ids `(B, T)`, one token `(B,)` at a time; for ever when max_new_tokens is None.

        temperature 0 takes the likeliest token; top_k, top_p, seed: see `Sampling`. state: goes on after what it has
        read, and at every yield it holds all that was yielded: save it, fork it, or pass it on with ids=None (a state
        that has yielded) or with more ids. Left out, it is a new one, of memory that stays the same.
        The model must be in evaluation mode. Raises `TypeError` or `ValueError` naming the argument.
        """
        choose = Sampling(temperature, top_k, top_p, seed)
        if max_new_tokens is not None:
            whole_number("max_new_tokens", max_new_tokens, 1)
        if self.training:
            raise ValueError("training=True: the model must be in evaluation mode to generate; call eval()")
        if ids is None and (state is None or state.pending is None):
            raise ValueError("ids=None: only a state that has yielded a token goes on without more; give ids (B, T)")
        if ids is not None:
            self._check(ids)
        state = self.new_state(len(ids)) if state is None else state
        return self._tokens(ids, max_new_tokens, choose, state)

    def _tokens(self, ids: Tensor | None, limit: int | None, choose: Sampling, state: ModelState) -> Iterator[Tensor]:
        for _ in count() if limit is None else range(limit):
            logits = self.prefill(ids, state)
            token = choose(logits, state.tokens)
            state.pending, ids = token[:, None], None
            yield token

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embed.weight)

    def _check(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids={getattr(ids, 'dtype', type(ids).__name__)}: expected an integer tensor (B, T)")
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids has shape {tuple(ids.shape)}: must be (B, T), no axis empty")
        V = self.cfg.vocab_size
        if ids.device.type == "cpu" and not 0 <= int(ids.min()) <= int(ids.max()) < V:  # a GPU would have to wait
            raise ValueError(f"ids runs from {int(ids.min())} to {int(ids.max())}: must be in [0, {V})")

    # -- files ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write weights, gates and config to one safetensors file, whole or not at all."""
        return write_tensors(path, self.state_dict(), self.cfg.to_dict())

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> ProteusLM:
        """Rebuild a saved model. Raises `FileNotFoundError`, or `ValueError` when the file is not one of ours."""
        tensors, about = read_tensors(path, "ProteusLM.save")
        try:
            model = cls(ModelConfig.from_dict(about))
            model.load_state_dict(tensors)
        except Exception as problem:
            raise ValueError(f"path={str(path)!r}: not a file that ProteusLM.save wrote ({problem})") from problem
        return model.to(device)

    def load_state(self, path: str | Path) -> ModelState:
        """A state that `ModelState.save` wrote for this model. Raises as `load`, and `ValueError` for other gates."""
        tensors, about = read_tensors(path, "ModelState.save")
        try:
            pending = tensors.pop("pending", None)
            batch = len(tensors["0.count"])
            state = self.new_state(batch, about["planned"])
            for i, (layer, its) in enumerate(zip(state.layers, about["layers"], strict=True)):
                head = f"{i}."
                mine = {name.removeprefix(head): x for name, x in tensors.items() if name.startswith(head)}
                layer.load_state_dict({"about": its, "tensors": mine})
        except Exception as problem:
            raise ValueError(f"path={str(path)!r}: not a state of this model ({problem})") from problem
        state.pending = None if pending is None else pending.to(self.embed.weight.device)
        return state
