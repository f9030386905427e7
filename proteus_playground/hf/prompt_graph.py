"""A prompt's pass through one layer, recorded once as a CUDA graph and replayed by the layers after it.

A layer starts dozens of small kernels, and up to some thousands of tokens the host takes longer to start them than the
GPU to run them. The layers of a model differ only in their numbers. So the first layer runs as usual, the second is
recorded, and it and the later ones replay what was recorded with their own queries, keys, values and gates.

Axes: `B` batch, `T` tokens, `H` query heads, `d` head dim.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

from ..attention.adapter import ProteusLayer
from ..attention.bank.bank import KVBank
from .attention_call import AttentionCall, TurnedCall
from .bank_layer import BankLayer, read_prompt
from .recording import capture

MOST_TOKENS = 1 << 15  # of all texts together: longer prompts keep the GPU busy, and a recording takes memory


class PromptGraph:
    """The recordings of one decoder's layers, one for each form of layer. The cache drops them after each pass."""

    def __init__(self, decoder: nn.Module):
        self._decoder = decoder
        self._refused: set[tuple] = set()  # forms that could not be recorded
        self.forget()

    def forget(self) -> None:
        """Drop the recordings. Their memory is left to later ones."""
        self._recorded: dict[tuple, _Recording | None] = {}  # None for a form of which one layer has run

    def read(self, layer: BankLayer, call: AttentionCall) -> tuple[Tensor, KVBank, Tensor | None] | None:
        """Read a prompt by a recording: its rows `(B, T, H, d)`, which the next `read` overwrites, the filled bank, and
        the sum that `read_prompt` returns.

        None where the pass must run as usual: it cannot be recorded, or it is the first of its form.
        """
        form = _form(layer, call)
        if form is None or form in self._refused:
            return None
        if form not in self._recorded:
            self._recorded[form] = None
            return None
        if self._recorded[form] is None:
            try:
                self._recorded[form] = _Recording(layer, call, self._decoder)
            except Exception as problem:
                self._refused.add(form)
                warnings.warn(f"cuda_graph=True: prompts are read without a graph, because {problem}", stacklevel=2)
                return None
        return self._recorded[form].replay(layer, call)


class _Recording:
    """What a layer does with a prompt, as a CUDA graph over inputs of its own. Raises where it cannot be recorded."""

    def __init__(self, layer: BankLayer, call: AttentionCall, decoder: nn.Module):
        with torch.inference_mode(False):
            gates = copy.deepcopy(layer.layer.gates)
            self._inputs = [x.detach().clone() for x in _inputs(layer, call)]
        gates.prototypes, gates.alive, *others = self._inputs
        twin = copy.copy(layer)
        twin.layer = ProteusLayer(gates, layer.layer.config)

        def run() -> tuple[Tensor, KVBank, Tensor | None]:
            ours = _over(others, call)
            bank = twin.empty_bank(len(ours.v), ours.inv_freq, ours.scale, ours.v.dtype)
            out, total = read_prompt(bank, twin.layer, ours, is_finite=True)
            return out, bank, total

        self._graph, self._made = capture(run, decoder, call.v.device)

    def replay(self, layer: BankLayer, call: AttentionCall) -> tuple[Tensor, KVBank, Tensor | None]:
        """The same for another layer: see `PromptGraph.read`."""
        torch._foreach_copy_(self._inputs, _inputs(layer, call))
        self._graph.replay()
        out, bank, total = self._made
        mine = bank.fork()
        mine.gates, mine.inv_freq = layer.layer.gates, call.inv_freq
        return out, mine, None if total is None else total.clone()


def _form(layer: BankLayer, call: AttentionCall) -> tuple | None:
    """What the kernels of a prompt's pass depend on, besides the inputs' numbers. None where the pass is not served."""
    config, budget, (batch, tokens) = layer.layer.config, layer.budget, call.v.shape[:2]
    chooses_tokens = call.keep is not None or budget.keep_ratio < 1
    if chooses_tokens or config.route_heads or config.int8 or budget.dense:
        return None
    if tokens == 1 or batch * tokens > MOST_TOKENS:
        return None
    with_gradient = call.inv_freq is not None and call.turned is None
    if with_gradient or torch.is_autocast_enabled(call.v.device.type):
        return None
    kinds = tuple((x.shape, x.dtype, x.device) for x in _inputs(layer, call))
    return kinds, call.scale, config, budget, layer.reach


def _inputs(layer: BankLayer, call: AttentionCall) -> list[Tensor]:
    """Tensors of one pass, apart from the bank, which is made in it."""
    gates = layer.layer.gates
    q_and_k = (call.q, call.k) if call.turned is None else (*call.turned, call.back, call.inv_freq)
    return [gates.prototypes, gates.alive, call.v, call.positions, *q_and_k]


def _over(tensors: list[Tensor], call: AttentionCall) -> AttentionCall:
    """A call like `call` over other tensors, those of `_inputs` after the gates'."""
    v, positions, q, k, *turning = tensors
    fields = {"layer": call.layer, "v": v, "positions": positions, "scale": call.scale, "keep": None}
    if not turning:
        return AttentionCall(q=q, k=k, inv_freq=None, **fields)
    return TurnedCall((q, k), turning[0], inv_freq=turning[1], **fields)
