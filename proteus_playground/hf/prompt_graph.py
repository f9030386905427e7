"""A prompt's pass through one layer, recorded once as a CUDA graph and replayed by the layers after it.

A layer starts dozens of small kernels, and up to some thousands of tokens the host takes longer to start them than the
GPU to run them. The layers of a model differ only in their numbers. So the first layer runs as usual, the second is
recorded, and it and the later ones replay what was recorded with their own queries, keys, values and gates.

Axes: `B` batch, `T` tokens, `H` query heads, `d` head dim.
"""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.adapter import ProteusLayer
from ..attention.bank.bank import KVBank
from .attention_call import AttentionCall
from .bank_layer import read_prompt
from .recording import capture

if TYPE_CHECKING:
    from .bank_layer import BankLayer

MOST_TOKENS = 1 << 14  # of all texts together: longer prompts keep the GPU busy, and a recording holds on to its memory


class PromptGraph:
    """The recorded pass, for prompts of one form at a time."""

    def __init__(self):
        self._refused = False  # after a pass that could not be recorded
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded, and the memory of it."""
        self._form = self._graph = self._made = None
        self._inputs: list[Tensor] = []

    def read(self, layer: BankLayer, call: AttentionCall) -> tuple[Tensor, KVBank, Tensor | None] | None:
        """What `read_prompt` returns, with the bank: rows `(B, T, H, d)`, which the next `read` overwrites, the filled
        bank, and a sum or None.

        None where the pass must run as usual, and also where it is the first of its form.
        """
        form = None if self._refused else _form(layer, call)
        if form is None:
            return None
        if form != self._form:
            self.forget()
            self._form = form
            return None
        if self._graph is None and not self._record(layer, call):
            return None
        torch._foreach_copy_(self._inputs, _inputs(layer, call))
        self._graph.replay()
        out, bank, total = self._made
        mine = bank.fork()
        mine.gates, mine.inv_freq = layer.layer.gates, call.inv_freq
        return out, mine, None if total is None else total.clone()

    def _record(self, layer: BankLayer, call: AttentionCall) -> bool:
        """Record the layer's pass. Where that fails, all passes run as usual from now on."""
        with torch.inference_mode(False):
            gates = copy.deepcopy(layer.layer.gates)
            self._inputs = [x.clone() for x in _inputs(layer, call)]
        gates.prototypes, gates.alive, q, k, v, positions, *inv_freq = self._inputs
        twin = copy.copy(layer)
        twin.layer = ProteusLayer(gates, layer.layer.config)
        ours = AttentionCall(call.layer, q, k, v, inv_freq[0] if inv_freq else None, positions, call.scale, None)

        def run() -> tuple[Tensor, KVBank, Tensor | None]:
            bank = twin.empty_bank(len(k), ours.inv_freq, ours.scale, k.dtype)
            out, total = read_prompt(bank, twin.layer, ours, waits=False)
            return out, bank, total

        try:
            self._graph, self._made = capture(run, q.device)
        except Exception as problem:
            self.forget()
            self._refused = True
            warnings.warn(f"cuda_graph=True: prompts are read without a graph, because {problem}", stacklevel=2)
            return False
        return True


def _form(layer: BankLayer, call: AttentionCall) -> tuple | None:
    """What the kernels of a prompt's pass depend on, besides the inputs' numbers. None where the pass is not served."""
    config, budget, x = layer.layer.config, layer.budget, call.q
    chooses_tokens = call.keep is not None or budget.keep_ratio < 1
    if chooses_tokens or config.route_heads or config.int8 or budget.dense or x.shape[0] * x.shape[1] > MOST_TOKENS:
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    kinds = [(x.shape, x.dtype, x.device) for x in _inputs(layer, call)]
    return kinds, call.scale, config, budget, layer.reach


def _inputs(layer: BankLayer, call: AttentionCall) -> list[Tensor]:
    """Tensors of one pass. Numbers of the bank's texts are not among them: it is empty."""
    gates = layer.layer.gates
    turned = [] if call.inv_freq is None else [call.inv_freq]
    return [gates.prototypes, gates.alive, call.q, call.k, call.v, call.positions, *turned]
