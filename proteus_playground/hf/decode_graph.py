"""One more token through a `ProteusCache`, recorded once as a CUDA graph and then replayed.

A bank does not grow, so a pass of one token always runs the same kernels on the same memory. Replaying them saves the
host's work, which takes several times as long as the GPU's. What decides which kernels run is compared before a replay;
where it has changed, passes run as usual again, and the third of them is recorded.

Axes: `B` texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .attention_call import CACHE_NAMES
from .bank_layer import BankLayer
from .passes import current_pass
from .recording import capture

WARM_UP = 2  # passes of one token before the recorded one: kernels are compiled and workspaces made in them
INPUTS = ("input_ids", "inputs_embeds")
IGNORED = ("attention_mask", "position_ids", "use_cache", *CACHE_NAMES)
HIDDEN = "last_hidden_state"


class DecodeGraph:
    """The recorded pass of one decoder and the layers of one cache."""

    def __init__(self, decoder: nn.Module, layers: Mapping[int, BankLayer]):
        self.decoder, self.layers = decoder, layers
        self.refused = False  # after a pass that could not be recorded
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded, and the memory of it."""
        self._graph, self._hidden, self._kind, self._state, self._warm = None, None, None, None, 0

    def state_of(self, args: tuple, kwargs: dict) -> tuple | None:
        """What the kernels of a pass depend on: the inputs' form, banks, where weights lie, which adapters are on.

        None where the pass is not served: it takes several tokens per text, asks for more than its hidden state, or
        calls a hook, which a replay would not.
        """
        given = [(name, kwargs[name]) for name in INPUTS if kwargs.get(name) is not None]
        extra = [value for name, value in kwargs.items() if name not in (*INPUTS, *IGNORED)]
        if self.refused or args or len(given) != 1 or given[0][1].shape[1] != 1:
            return None
        if any(value is not None and value is not False for value in extra) or kwargs.get("return_dict") is False:
            return None
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or kwargs.get("use_cache") is False:
            return None
        if not self._plain(kwargs.get("attention_mask"), kwargs.get("position_ids")):
            return None
        tensors, adapters = [], []
        for part in self.decoder.modules():  # once a token: this is most of the host's time
            if part._forward_hooks or part._forward_pre_hooks:
                return None
            held = (*part._parameters.values(), *part._buffers.values())
            tensors += [x.data_ptr() for x in held if x is not None]
            if isinstance(getattr(type(part), "disable_adapters", None), property):  # a layer that peft adapted
                adapters.append((part.disable_adapters, *part.active_adapters))
        banks = [(layer.bank, layer.bank.rows.data_ptr()) for layer in self.layers.values()]
        form = [(name, x.shape, x.dtype) for name, x in given]
        return form, torch.is_inference_mode_enabled(), self.decoder.training, banks, tensors, adapters

    def _plain(self, mask: Tensor | None, positions: Tensor | None) -> bool:
        """Whether each text's new token counts, and where it stands is said if a mask is given: some models count a
        mask's tokens to find it."""
        if positions is not None and (positions.dim() != 2 or positions.shape[1] != 1):
            return False
        if mask is None:
            return True
        seen = next(iter(self.layers.values())).get_seq_length()
        shaped = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == seen + 1
        return positions is not None and shaped and bool(mask[:, seen].all())

    def turn(self, state: tuple) -> str:
        """What comes next for a pass of this state: "replay", "record", or "run" as usual, which warms up."""
        if state != self._state:
            self.forget()
            self._state = state
        if self._graph is not None:
            return "replay"
        self._warm += 1
        return "record" if self._warm > WARM_UP else "run"

    def replay(self, kwargs: dict) -> ModelOutput:
        """Run the recorded pass on new inputs. Raises `ValueError` where a bank is full."""
        self._take(kwargs)
        for layer in self.layers.values():
            layer.bank.admit(1)
        return self._run(kwargs)

    def record(self, native: Callable, kwargs: dict) -> ModelOutput:
        """Record `native`, and run it. A pass in which the host waits for the GPU cannot be recorded: it runs as usual,
        and so do all later ones."""
        (name,) = (name for name in INPUTS if kwargs.get(name) is not None)
        with torch.inference_mode(False):
            self._input = {name: kwargs[name].clone()}
            self._position = torch.zeros(len(kwargs[name]), 1, dtype=torch.int64, device=kwargs[name].device)
        self._take(kwargs)
        fixed = {"attention_mask": None, "use_cache": True, **self._input, "position_ids": self._position}
        before, current = [layer.bank.tokens for layer in self.layers.values()], current_pass(self.decoder)
        current.recorded = True
        try:
            graph, output = capture(partial(native, **{**kwargs, **fixed}), self.decoder, self._position.device)
            if not isinstance(output, ModelOutput) or set(output) - {HIDDEN, *CACHE_NAMES}:
                raise TypeError(f"the decoder returns {type(output).__name__} of more than its hidden state")
        except Exception as problem:
            self.forget()
            self.refused = True
            for layer, tokens in zip(self.layers.values(), before, strict=True):
                layer.bank.tokens = tokens
                layer.end_pass()
            current.start()
            warnings.warn(f"cuda_graph=True: passes run without a graph, because {problem}", stacklevel=2)
            return native(**kwargs)
        self._graph, self._hidden, self._kind = graph, output[HIDDEN], type(output)
        self._named = set(output) - {HIDDEN}  # what the decoder calls the cache
        return self._run(kwargs)

    def _take(self, kwargs: dict) -> None:
        """Copy the inputs of a pass to where the recorded kernels read them."""
        for name, home in self._input.items():
            home.copy_(kwargs[name])
        if kwargs.get("position_ids") is None:
            self._position.fill_(next(iter(self.layers.values())).get_seq_length())
        else:
            self._position.copy_(kwargs["position_ids"])

    def _run(self, kwargs: dict) -> ModelOutput:
        self._graph.replay()
        cache = next(kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None)
        return self._kind(**{HIDDEN: self._hidden.clone()}, **dict.fromkeys(self._named, cache))
