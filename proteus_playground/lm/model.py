"""A small causal language model. Its config alone makes its attention dense or sparse.

Axes: `B` batch, `T` tokens, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from ..attention import AttentionConfig, AttentionTrace, KVBank, ProteusAttention
from ..attention.transforms import hides_values
from ..common.checks import real_number, whole_number
from ..common.tensors import read_tensors, write_tensors
from .experts import Experts
from .sampling import Sampling, TopA


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a `ProteusLM`. Raises `TypeError` or `ValueError` naming the field."""

    vocab_size: int
    """Number of different tokens V, >= 1."""
    n_layers: int
    """Blocks, >= 1."""
    attention: AttentionConfig
    """Attention of every block; its `d_model` is the model's width."""
    hidden: int | None = None
    """Width of the MLPs in features, >= 1. None means 8/3 D rounded up to a multiple of 8."""
    n_experts: int = 1
    """MLPs per block, >= 1. More than one form a mixture of experts: see `Experts`."""
    experts_awake: int = 2
    """Largest number of experts awake per token, in [1, n_experts]; unused with a single MLP. At 1 the router has no
    gradient."""
    expert_top_p: float = 1.0
    """Top-P of experts: they are woken until their probability mass reaches this, in (0, 1]."""
    taps: int = 0
    """Width in tokens, >= 0, of a short causal convolution over the embeddings, the current token included; 0: none."""

    def __post_init__(self) -> None:
        if not isinstance(self.attention, AttentionConfig):
            raise TypeError(f"attention={type(self.attention).__name__}: expected AttentionConfig")
        for name in ("vocab_size", "n_layers"):
            whole_number(name, getattr(self, name), 1)
        if self.hidden is not None:
            whole_number("hidden", self.hidden, 1)
        whole_number("taps", self.taps, 0)
        whole_number("n_experts", self.n_experts, 1)
        whole_number("experts_awake", self.experts_awake, 1, self.n_experts if self.n_experts > 1 else None)
        real_number("expert_top_p", self.expert_top_p, 0, 1, above=True)

    def to_dict(self) -> dict:
        """Plain values, from which `from_dict` makes the config again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> ModelConfig:
        return cls(**{**values, "attention": AttentionConfig(**values["attention"])})


@dataclass(frozen=True)
class Output:
    """A result, and what was requested beside it with return_stats or return_trace, in that order."""

    y: Tensor
    reports: tuple = ()

    @classmethod
    def of(cls, returned: Tensor | tuple) -> Output:
        """Wrap what a layer returned: y alone, or a tuple of y and its reports."""
        return cls(returned[0], returned[1:]) if isinstance(returned, tuple) else cls(returned)

    def unwrap(self) -> Tensor | tuple:
        """y alone, or a tuple of y and its reports."""
        return (self.y, *self.reports) if self.reports else self.y


class ProteusBlock(nn.Module):
    """RMSNorm and `ProteusAttention`, then RMSNorm and a SwiGLU MLP or experts; both are added to the residual stream.

    `(B, T, D)` -> `(B, T, D)`. hidden: MLP width, default 8/3 D rounded up to a multiple of 8. experts: their number,
    the largest number awake, and Top-P, as in `ModelConfig`; None for one MLP.
    """

    def __init__(self, cfg: AttentionConfig, hidden: int | None = None, experts: tuple[int, int, float] | None = None):
        super().__init__()
        if hidden is not None:
            whole_number("hidden", hidden, 1)
        D = cfg.d_model
        hidden = hidden or -(-8 * D // 24) * 8
        self.attn_norm, self.mlp_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.attn = ProteusAttention(cfg)
        self.experts = Experts(cfg, hidden, *experts) if experts else None
        if not experts:
            self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
            self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, x: Tensor, **attention):
        """`(B, T, D)`, followed by stats and trace on request. `attention` goes to `ProteusAttention.forward`."""
        attended = Output.of(self.attn(self.attn_norm(x), **attention))
        return Output(self._mlp(x + attended.y), attended.reports).unwrap()

    def prefill(self, x: Tensor, tokens: int | None = None, *, return_trace: bool = False):
        """`forward` for the beginning of a text, and the state after it: see `ProteusAttention.prefill`."""
        y, *state_and_trace = self.attn.prefill(self.attn_norm(x), tokens, return_trace=return_trace)
        return self._mlp(x + y), *state_and_trace

    def decode(self, x: Tensor, state: KVBank, *, return_trace: bool = False):
        """The next tokens, `(B, n, D)`: see `ProteusAttention.decode`."""
        attended = Output.of(self.attn.decode(self.attn_norm(x), state, return_trace=return_trace))
        return Output(self._mlp(x + attended.y), attended.reports).unwrap()

    def _mlp(self, x: Tensor) -> Tensor:
        h = self.mlp_norm(x)
        if self.experts is not None:
            return x + self.experts(h)
        gate, value = self.gate_up(h).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


@dataclass
class ModelState:
    """All that a `ProteusLM` keeps of the texts it has read: a state per layer, and a token still to be read."""

    layers: list[KVBank]
    planned: int | None  # largest length of the texts in tokens; None: unlimited
    pending: Tensor | None = None  # (B, 1) int64
    recent: Tensor | None = None  # (B, <= taps - 1) int64, the last tokens read, for the convolution

    @property
    def tokens(self) -> int:
        """Length of the texts, in tokens."""
        return self.layers[0].tokens + (self.pending is not None)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def fork(self) -> ModelState:
        """An independent copy, so that one beginning can have two continuations."""
        return replace(self, layers=[layer.fork() for layer in self.layers])

    def save(self, path: str | Path) -> Path:
        """Write the state to one safetensors file, whole or not at all; `ProteusLM.load_state` reads it."""
        states = [layer.state_dict() for layer in self.layers]
        tensors = {f"{i}.{name}": tensor for i, state in enumerate(states) for name, tensor in state["tensors"].items()}
        optional = {"pending": self.pending, "recent": self.recent}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        return write_tensors(path, tensors, {"planned": self.planned, "layers": [state["about"] for state in states]})


class ProteusLM(nn.Module):
    """Embedding, blocks, RMSNorm, and the embedding's weights again as output head: ids `(B, T)` -> logits `(B, T, V)`.

    With `cfg.taps` the output of a short depthwise convolution is added to the embeddings, so that a token's key also
    depends on the tokens before it. Small models then learn much sooner to look things up (Fu et al. 2023,
    https://arxiv.org/abs/2212.14052).
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if not isinstance(cfg, ModelConfig):
            raise TypeError(f"cfg={type(cfg).__name__}: expected ModelConfig")
        self.cfg = cfg
        D = cfg.attention.d_model
        self.embed = nn.Embedding(cfg.vocab_size, D)
        nn.init.normal_(self.embed.weight, std=D**-0.5)
        self.taps = nn.Parameter(torch.randn(D, 1, cfg.taps) * cfg.taps**-0.5) if cfg.taps else None
        experts = (cfg.n_experts, cfg.experts_awake, cfg.expert_top_p) if cfg.n_experts > 1 else None
        self.blocks = nn.ModuleList(ProteusBlock(cfg.attention, cfg.hidden, experts) for _ in range(cfg.n_layers))
        self.norm = nn.RMSNorm(D)

    def forward(self, ids: Tensor, *, checkpoint: bool = False, **attention):
        """Logits of the token after each token: ids `(B, T)` int64 in [0, V) -> `(B, T, V)`.

        checkpoint: keep only each block's input for the backward pass, which recomputes the rest. `attention` goes to
        every `ProteusAttention.forward`: positions, key_padding_mask, return_stats, return_trace. With the last two,
        the logits are followed by a tuple of all layers' `AttentionStats`, and by one of their `AttentionTrace`.
        """
        states = self._states(ids, checkpoint, attention)
        return Output(F.linear(states.y, self.embed.weight), states.reports).unwrap()

    def hidden(self, ids: Tensor, **attention) -> Tensor:
        """Input of the head: ids `(B, T)` -> normed states `(B, T, D)`. Their product with `embed` is the logits."""
        return self._states(ids, False, attention).y

    def _states(self, ids: Tensor, checkpoint: bool, attention: dict) -> Output:
        self._check(ids)
        x, reports = self._embed(ids, padding=attention.get("key_padding_mask")), []
        for block in self.blocks:
            run = partial(recompute, block, use_reentrant=False) if checkpoint else block
            out = Output.of(run(x, **attention))
            x = out.y
            reports.append(out.reports)
        return Output(self.norm(x), tuple(zip(*reports, strict=True)))  # one tuple of all layers per kind of report

    def unembedding(self) -> Tensor:
        """A row per token, `(V, D)`: the direction in the residual that raises its logit most (includes the norm)."""
        return self.embed.weight * self.norm.weight

    def set_flux_alpha(self, value: float | None) -> None:
        """Set every layer's alpha in [0, 1]; with None it follows the length of the text."""
        for block in self.blocks:
            block.attn.set_flux_alpha(value)

    @contextmanager
    def settings(self, **changes) -> Iterator[None]:
        """`ProteusAttention.settings` of every layer."""
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(block.attn.settings(**changes))
            yield

    # -- text, token by token ---------------------------------------------------------------------------------

    def new_state(self, batch: int = 1, tokens: int | None = None) -> ModelState:
        """An empty state. tokens: largest length of the texts, see `ProteusAttention.new_state`."""
        return ModelState([block.attn.new_state(batch, tokens) for block in self.blocks], tokens)

    def prefill(self, ids: Tensor | None, state: ModelState, *, return_trace: bool = False):
        """Read the next tokens of every text, `(B, T)`, into `state`. Returns the logits after the last one, `(B, V)`.

        A token that generation left pending is read first; ids=None reads only that. return_trace: also return the
        last layer's `AttentionTrace` of the last token, T = 1.
        """
        return self._read(ids, state, return_trace).unwrap()

    @torch.no_grad()
    def _read(self, ids: Tensor | None, state: ModelState, return_trace: bool) -> Output:
        if ids is not None:
            self._check(ids)
            if len(ids) != state.layers[0].batch:
                raise ValueError(f"ids has {len(ids)} texts: must have {state.layers[0].batch}, as the state")
        ids = torch.cat([x for x in (state.pending, ids) if x is not None], dim=1)
        first, state.pending = state.tokens == 0 and ids.shape[1] > 1, None
        x = self._embed(ids, state.recent)
        if self.taps is not None:
            read = ids if state.recent is None else torch.cat((state.recent, ids), dim=1)
            state.recent = read[:, max(0, read.shape[1] - self.cfg.taps + 1) :]
        for i, block in enumerate(self.blocks):
            traced = return_trace and block is self.blocks[-1]
            if first:
                x, state.layers[i], *traces = block.prefill(x, state.planned, return_trace=traced)
            else:
                out = Output.of(block.decode(x, state.layers[i], return_trace=traced))
                x, traces = out.y, out.reports
        return Output(self._head(x[:, -1]), tuple(trace.last() for trace in traces))

    @torch.no_grad()
    def agreement(self, trace: AttentionTrace, tokens: Tensor | None = None) -> Tensor:
        """Agreement of the last layer's awake heads with each token, in [-1, 1]: `(B, T, V)`.

        Weighted mean over heads of the cosine between a head's contribution to the residual and the token's row of
        `unembedding`; 0 if no head is awake. trace: the last layer's. tokens: `(B, T)`, to compute one token each,
        `(B, T)`.
        """
        consensus = self.blocks[-1].attn.consensus(trace)
        rows = F.normalize(self.unembedding().float(), dim=-1)
        return F.linear(consensus, rows) if tokens is None else (consensus * rows[tokens]).sum(-1)

    def generate(
        self,
        ids: Tensor | None,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        top_a: TopA | None = None,
        state: ModelState | None = None,
    ) -> Iterator[Tensor]:
        """Continue each text of ids `(B, T)`, one token `(B,)` at a time; without end if max_new_tokens is None.

        temperature 0 takes the likeliest token; top_k, top_p, seed, top_a: see `Sampling`. state: the texts read so
        far, which ids continue. At every yield it contains all tokens yielded, so it can be saved, forked, or passed to
        another call, with more ids or, once a token was yielded, with ids=None. By default a new state of constant
        memory. The model must be in evaluation mode. Raises `TypeError` or `ValueError` naming the argument.
        """
        choose = Sampling(temperature, top_k, top_p, seed, top_a)
        if max_new_tokens is not None:
            whole_number("max_new_tokens", max_new_tokens, 1)
        if self.training:
            raise ValueError("training=True: the model must be in evaluation mode to generate; call eval()")
        if ids is None and (state is None or state.pending is None):
            raise ValueError("ids=None: allowed only with a state that has yielded a token; give ids (B, T)")
        if ids is not None:
            self._check(ids)
        state = self.new_state(len(ids)) if state is None else state
        return self._tokens(ids, max_new_tokens, choose, state)

    def _tokens(self, ids: Tensor | None, limit: int | None, choose: Sampling, state: ModelState) -> Iterator[Tensor]:
        for _ in count() if limit is None else range(limit):
            out = self._read(ids, state, return_trace=choose.top_a is not None)
            agreement = self.agreement(*out.reports)[:, -1] if out.reports else None
            token = choose(out.y, state.tokens, agreement)
            state.pending, ids = token[:, None], None
            yield token

    def _embed(self, ids: Tensor, before: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        """ids `(B, T)`, after tokens `before` `(B, n)` -> `(B, T, D)`. padding: `(B, T)` bool, True for padding."""
        if self.taps is None:
            return self.embed(ids)
        x = self.embed(ids if before is None else torch.cat((before, ids), dim=1))
        if padding is not None:
            x = x.masked_fill(padding[..., None], 0)
        missing = self.cfg.taps - 1 - (x.shape[1] - ids.shape[1])
        padded = F.pad(x.transpose(1, 2), (missing, 0))
        return x[:, -ids.shape[1] :] + F.conv1d(padded, self.taps, groups=x.shape[2]).transpose(1, 2)

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embed.weight)

    def _check(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids={getattr(ids, 'dtype', type(ids).__name__)}: expected an integer tensor (B, T)")
        if ids.dim() != 2 or 0 in ids.shape:
            raise ValueError(f"ids has shape {tuple(ids.shape)}: must be (B, T), no axis empty")
        V = self.cfg.vocab_size
        # Only on the CPU, since the check would wait for a GPU; a compiled graph leaves it to the embedding.
        if ids.device.type == "cpu" and not hides_values() and not 0 <= int(ids.min()) <= int(ids.max()) < V:
            raise ValueError(f"ids runs from {int(ids.min())} to {int(ids.max())}: must be in [0, {V})")

    # -- files ------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write weights, gates and config to one safetensors file, whole or not at all."""
        return write_tensors(path, self.state_dict(), self.cfg.to_dict())

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> ProteusLM:
        """Load a saved model. Raises `FileNotFoundError`, or `ValueError` if `save` did not write the file."""
        tensors, about = read_tensors(path, "ProteusLM.save")
        try:
            model = cls(ModelConfig.from_dict(about))
            model.load_state_dict(tensors)
        except Exception as problem:
            raise ValueError(f"path={str(path)!r}: not a file that ProteusLM.save wrote ({problem})") from problem
        return model.to(device)

    def load_state(self, path: str | Path) -> ModelState:
        """Load what `ModelState.save` wrote for this model. Raises as `load`, and `ValueError` for other gates."""
        tensors, about = read_tensors(path, "ModelState.save")
        try:
            pending, recent = tensors.pop("pending", None), tensors.pop("recent", None)
            batch = len(tensors["0.count"])
            state = self.new_state(batch, about["planned"])
            for i, (layer, layer_about) in enumerate(zip(state.layers, about["layers"], strict=True)):
                prefix = f"{i}."
                own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
                layer.load_state_dict({"about": layer_about, "tensors": own})
            if (0 if recent is None else recent.shape[1]) != min(max(0, self.cfg.taps - 1), state.layers[0].tokens):
                raise ValueError(f"taps={self.cfg.taps}: the state is of a model with another convolution")
        except Exception as problem:
            raise ValueError(f"path={str(path)!r}: not a state of this model ({problem})") from problem
        device = self.embed.weight.device
        state.pending = None if pending is None else pending.to(device)
        state.recent = None if recent is None else recent.to(device)
        return state
