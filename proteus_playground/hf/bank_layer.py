"""One decoder layer's KV bank behind the face that transformers' caches have.

Axes: `B` batch, `T` tokens, `H` query heads, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from ..attention import AttentionConfig, Budget, Gates
from ..attention.adapter import ProteusLayer
from ..attention.bank.bank import ENDLESS, KVBank
from ..attention.decide import weigh
from .attention_call import AttentionCall

NO_GRADIENT = "a ProteusCache gives no gradient: use torch.no_grad(), and model.eval()"


class _NoGradient(torch.autograd.Function):
    """The identity; a backward pass through it says why there is none."""

    @staticmethod
    def forward(ctx, out: Tensor, q: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(NO_GRADIENT)


class Recordings(Protocol):
    """Recorded passes over prompts, see `prompt_graph.PromptGraph`."""

    def read(self, layer: BankLayer, call: AttentionCall) -> tuple[Tensor, KVBank, Tensor | None] | None:
        """Rows, filled bank and sum of a prompt's pass; None where it must run as usual."""


class BankLayer(CacheLayerMixin):
    """One decoder layer's bank as a cache layer: new keys and values pass through, `attend` puts them into the bank.

    alone: whether every layer that reads the whole past has a bank. transformers makes one mask for all of these: of
    the new tokens only if so, else of the whole past. tracks: whether the layer remembers which tokens were real; one
    layer of a cache does so for all. defers: whether the layer leaves the sum of a prompt's keys and values in `total`
    and does not ask whether they are finite. The cache looks at all sums after the pass, so that the host waits for a
    GPU once, not in each layer. prompt: recordings that the layer shares with others, or None.
    """

    is_sliding = is_compileable = is_croppable = supports_early_init = False

    def __init__(self, layer: ProteusLayer, budget: Budget, alone: bool, reach: int | None):
        super().__init__()
        self.layer, self.budget, self.alone, self.reach = layer, budget, alone, reach
        self.bank: KVBank | None = None
        self._inv_freq: Tensor | None = None  # of the last call
        self._new = 0  # tokens that `update` was given and `attend` was not
        self.tracks = self.defers = False
        self.prompt: Recordings | None = None
        self.total: Tensor | None = None
        self.past: Tensor | None = None  # (B,) which tokens of each text were real, as `digest` says

    def attend(self, call: AttentionCall) -> Tensor:
        """Rows of the new tokens, `(B, T, H, d)`, which then go into the bank. A backward pass raises."""
        new, self._new = self._new, 0
        if new != call.v.shape[1]:
            raise ValueError(
                f"layer {call.layer} attends to {call.v.shape[1]} keys and put {new} into its cache: a layer "
                "that reads another layer's keys must stay native; where gradient checkpointing took the cache away, "
                "call model.eval()"
            )
        with torch.no_grad():
            out = self._attend(call)
            if self.past is not None:
                keep = call.v.new_ones(call.v.shape[:2], dtype=torch.bool) if call.keep is None else call.keep
                self.past += digest(keep, self.bank.seen - new)
        return _NoGradient.apply(out, call.q) if torch.is_grad_enabled() and call.q.requires_grad else out

    def _attend(self, call: AttentionCall) -> Tensor:
        layer, budget = self.layer, self.budget
        self._check_frequencies(call)
        self.check_past(call.past)
        if self.bank is None:
            replayed = None if self.prompt is None or not self.defers else self.prompt.read(self, call)
            if replayed is not None:
                out, bank, self.total = replayed
                self._start(bank)
                return out
            self._start(self.empty_bank(len(call.v), call.inv_freq, call.scale, call.v.dtype))
        bank = self.bank
        if bank.tokens == 0 and call.v.shape[1] > 1:
            out, self.total = read_prompt(bank, layer, call, is_finite=self.defers)
            return out
        decisions = layer.decide(call.q, call.k, call.keep, budget=budget, before=bank.count)
        how = {"keep": decisions.keep, "awake": decisions.awake, "positions": call.positions}
        if call.v.shape[1] == 1:
            out = bank.step(call.q, call.k, call.v, **how, turned=call.turned)
        else:
            out = bank.steps(call.q, call.k, call.v, **how)
        return weigh(out, decisions.weight)

    def check_past(self, past: Tensor | None) -> None:
        """Raise `ValueError` unless a mask shows those of the earlier tokens that were real when they were read.

        past: `(B, tokens so far)` bool, or None where the mask does not say.
        """
        if past is None or self.past is None:
            return
        if past.shape[1] != self.get_seq_length() or not torch.equal(digest(past).to(self.past), self.past):
            raise ValueError(
                "attention_mask shows other earlier tokens than it did when they were read: a ProteusCache cannot hide "
                "or show tokens later; give the mask of the whole text with every pass"
            )

    def _check_frequencies(self, call: AttentionCall) -> None:
        """The bank's keys are turned by the frequencies of the first call."""
        if self.bank is not None and call.inv_freq is not self._inv_freq:
            held = self.bank.inv_freq
            if held is not None and not torch.equal(held, call.inv_freq.to(held.device)):
                raise ValueError(
                    f"layer {call.layer}: the model's rotary frequencies have changed with the length of the text "
                    "(dynamic NTK, LongRoPE) or with its precision, and keys of a ProteusCache keep those of its first "
                    "tokens; stay within the trained length, load the model with another rope_type, or begin the text "
                    "again in this precision"
                )
        self._inv_freq = call.inv_freq

    def empty_bank(self, batch: int, inv_freq: Tensor | None, scale: float, dtype: torch.dtype) -> KVBank:
        """A bank without tokens for this layer."""
        int8 = self.layer.config.int8
        dtype = torch.float32 if dtype == torch.int8 else dtype
        return KVBank.empty(
            self.budget, self.layer.gates, batch, inv_freq=inv_freq, scale=scale, dtype=dtype, int8=int8,
            reach=self.reach,
        )  # fmt: skip

    def _start(self, bank: KVBank) -> None:
        """Begin the texts of `bank`."""
        self.bank = bank
        if self.tracks:
            with torch.inference_mode(False):
                self.past = torch.zeros(bank.batch, dtype=torch.int64, device=bank.count.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the bank is made by the first `attend`."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self._new += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self.bank is None else self.bank.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self.get_seq_length()
        return (query_length, seen) if self.alone else (seen + query_length, 0)

    def get_max_length(self) -> int:
        return -1 if self.budget.tokens == ENDLESS else self.budget.tokens

    def take(self, other: BankLayer) -> None:
        """Go on from an independent copy of the bank of `other`."""
        self.bank, self._inv_freq = other.bank.fork(), other._inv_freq
        self._take_past(other.past)

    def _take_past(self, past: Tensor | None) -> None:
        """Remember, in memory of its own, which tokens of the texts were real."""
        with torch.inference_mode(False):
            self.past = None if past is None else past.clone()

    def end_pass(self) -> None:
        """Drop tokens that were put in and not attended to, where a pass was cut short."""
        self._new, self.total = 0, None

    def reset(self) -> None:
        self.bank, self._inv_freq, self._new, self.past, self.total = None, None, 0, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.bank is not None:
            self.bank = self.bank.select(indices.to(self.bank.count.device))
        if self.past is not None:
            self._take_past(self.past[indices.to(self.past.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.bank is not None:
            self.batch_select_indices(torch.arange(self.bank.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove={tokens_to_remove}: a KV bank cannot take tokens back, so assisted generation does "
                "not run with a ProteusCache; fork() the cache before a continuation that may be thrown away"
            )

    def offload(self) -> None:
        raise ValueError("offloading: a ProteusCache is small and stays on its device")

    prefetch = offload

    # -- files ------------------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict | None]:
        """Tensors of the gates and the bank, and the bank's plain values. Layers may share gates and frequencies, files
        may not: those are copies."""
        tensors = {f"gates.{name}": tensor.clone() for name, tensor in self.layer.gates.state_dict().items()}
        if self.bank is None:
            return tensors, None
        state = self.bank.state_dict()
        tensors |= {f"bank.{name}": tensor for name, tensor in state["tensors"].items()}
        if self.bank.inv_freq is not None:
            tensors["inv_freq"] = self.bank.inv_freq.clone()
        if self.past is not None:
            tensors["past"] = self.past.clone()
        return tensors, state["about"]

    def load_state_dict(self, tensors: dict[str, Tensor], about: dict | None) -> None:
        """Take over a bank, for the same gates and budget. Raises `ValueError` or `KeyError` where it does not fit."""
        if about is None:
            return
        mine = {name.removeprefix("bank."): x for name, x in tensors.items() if name.startswith("bank.")}
        self._start(self.empty_bank(len(mine["count"]), tensors.get("inv_freq"), about["scale"], mine["rows"].dtype))
        if self.tracks:
            self._take_past(tensors.get("past"))  # files of earlier versions have none
        self.bank.load_state_dict({"about": about, "tensors": mine})


class HybridBankLayer(LinearAttentionLayer, BankLayer):
    """A bank, and the recurrent states of a layer that has both kinds of memory (Falcon-H1, Zamba 2)."""

    is_compileable = False

    def __init__(self, layer: ProteusLayer, budget: Budget, alone: bool, reach: int | None, states: int):
        BankLayer.__init__(self, layer, budget, alone, reach)
        LinearAttentionLayer.__init__(self, number_of_states=states)

    def take(self, other: HybridBankLayer) -> None:
        BankLayer.take(self, other)
        for name, value in vars(LinearAttentionLayer(number_of_states=other.number_of_states)).items():
            setattr(self, name, copy.deepcopy(getattr(other, name, value)))

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        BankLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        BankLayer.batch_select_indices(self, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        BankLayer.crop(self, tokens_to_remove)

    def offload(self) -> None:
        BankLayer.offload(self)

    prefetch = offload

    def state_dict(self):
        raise ValueError("recurrent states cannot be saved: fork() the cache instead")


def read_prompt(
    bank: KVBank, layer: ProteusLayer, call: AttentionCall, is_finite: bool
) -> tuple[Tensor, Tensor | None]:
    """Rows of a text's first tokens, `(B, T, H, d)`, which go into the empty bank.

    is_finite: keys and values count as finite, and their sum `()` is returned for a later look, None where there is
    none; else the host waits for a GPU to see.
    """
    where = {"inv_freq": call.inv_freq, "positions": call.positions, "scale": call.scale}
    how = {"budget": bank.budget, "explain": False, "return_index": True}
    run = layer.run(call.q, call.k, call.v, real=call.keep, **how, **where)
    index = run.result.index
    bank.extend(call.k, call.v, keep=run.keep, positions=call.positions, index=index, is_finite=is_finite)
    return run.out, index.total if is_finite and index is not None else None


def digest(real: Tensor, start: Tensor | None = None) -> Tensor:
    """A number per text, `(B,)` int64, that says which tokens are real: `real` `(B, n)` bool, from token `start` `(B,)`
    on, by default 0.

    Numbers of two parts of a text add up to that of both.
    """
    at = torch.arange(1, 1 + real.shape[1], device=real.device)
    at = at if start is None else at + start[:, None]
    return (real * (at * 2_654_435_761 % 2_147_483_647)).sum(-1)


def gates_from(tensors: dict[str, Tensor], config: AttentionConfig) -> Gates:
    """The gates among `BankLayer.state_dict`'s tensors."""
    with torch.random.fork_rng(devices=[]):  # new gates start at random; the caller's seed is not ours
        gates = Gates(config.n_kv_heads, config.gates_per_group, config.head_dim, config.heads_per_group)
    gates.load_state_dict({n.removeprefix("gates."): x for n, x in tensors.items() if n.startswith("gates.")})
    return gates.eval().to(tensors["gates.prototypes"].device)
