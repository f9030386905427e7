"""One more token through a `ProteusCache`, recorded once as a CUDA graph and then replayed.

A bank does not grow, so a pass of one token always runs the same kernels on the same memory. Replaying them saves the
host's work, which takes several times as long as the GPU's. What decides which kernels run is compared before a replay;
where it has changed, the pass runs as usual and is recorded again.

Axes: `B` texts, `D` model width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .attention_call import CACHE_NAMES
from .bank_layer import BankLayer
from .passes import current_pass

WARM_UP = 2  # passes of one token before the recorded one: kernels are compiled and workspaces made in them
INPUTS = ("input_ids", "inputs_embeds")
IGNORED = ("attention_mask", "position_ids", "use_cache", *CACHE_NAMES)


class DecodeGraph:
    """The recorded pass of one decoder and the layers of one cache."""

    def __init__(self, decoder: nn.Module, layers: Mapping[int, BankLayer]):
        self.decoder, self.layers = decoder, layers
        self.refused = False  # after a pass that could not be recorded
        self.forget()

    def forget(self) -> None:
        """Drop what was recorded, and the memory of it."""
        self._graph, self._output, self._state, self._warm = None, None, None, 0

    def serves(self, args: tuple, kwargs: dict) -> bool:
        """Whether a pass with these arguments takes one token per text, and asks for nothing but its hidden state."""
        given = [kwargs[name] for name in INPUTS if kwargs.get(name) is not None]
        extra = {name: value for name, value in kwargs.items() if name not in (*INPUTS, *IGNORED)}
        if self.refused or args or len(given) != 1 or given[0].shape[1] != 1 or any(extra.values()):
            return False
        if torch.is_grad_enabled() or kwargs.get("use_cache") is False or self._hooked():
            return False
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        plain = mask is None or isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask[:, -1].all())
        return plain and (positions is None or positions.dim() == 2)

    def ready(self, kwargs: dict) -> bool:
        """Whether the recorded pass is the one that these arguments ask for."""
        return self._graph is not None and self._state == self._seen(kwargs)

    def due(self, kwargs: dict) -> bool:
        """Whether a pass should be recorded now; else counts it as one that warms up."""
        state = self._seen(kwargs)
        if state != self._state:
            self.forget()
            self._state = state
        self._warm += 1
        return self._warm > WARM_UP

    def replay(self, kwargs: dict) -> ModelOutput:
        """Run the recorded pass on new inputs. Raises `ValueError` where a bank is full."""
        for layer in self.layers.values():
            layer.bank.admit(1)
        return self._run(kwargs)

    def record(self, native: Callable, kwargs: dict) -> ModelOutput:
        """Record `native`, and run it. A pass that waits for the host cannot be recorded: it runs as usual, and so do
        all later ones."""
        with torch.inference_mode(False):
            (name,) = (name for name in INPUTS if kwargs.get(name) is not None)
            self._input = {name: kwargs[name].clone()}
            self._position = torch.zeros(len(kwargs[name]), 1, dtype=torch.int64, device=kwargs[name].device)
        fixed = {"attention_mask": None, "use_cache": True, **self._input, "position_ids": self._position}
        before = [layer.bank.tokens for layer in self.layers.values()]
        graph, current = torch.cuda.CUDAGraph(), current_pass(self.decoder)
        current.recorded = True
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                output = native(**{**kwargs, **fixed})
            if [name for name, value in output.items() if isinstance(value, Tensor)] != ["last_hidden_state"]:
                raise RuntimeError(f"the decoder returns {', '.join(output)}")
        except RuntimeError as problem:
            self.forget()
            self.refused = True
            for layer, tokens in zip(self.layers.values(), before, strict=True):
                layer.bank.tokens = tokens
                layer.end_pass()
            current.start()
            warnings.warn(f"cuda_graph=True: passes run without a graph, because {problem}", stacklevel=2)
            return native(**kwargs)
        self._graph, self._output = graph, output
        return self._run(kwargs)

    def _run(self, kwargs: dict) -> ModelOutput:
        for name, home in self._input.items():
            home.copy_(kwargs[name])
        if kwargs.get("position_ids") is None:
            self._position.fill_(next(iter(self.layers.values())).bank.tokens - 1)
        else:
            self._position.copy_(kwargs["position_ids"])
        self._graph.replay()
        said = {name: value.clone() if isinstance(value, Tensor) else value for name, value in self._output.items()}
        return type(self._output)(**said)

    def _seen(self, kwargs: dict) -> tuple:
        """What the recorded kernels depend on: inputs' form, banks, and where the weights lie."""
        given = next((name, x.shape, x.dtype) for name in INPUTS if (x := kwargs.get(name)) is not None)
        banks = tuple(layer.bank for layer in self.layers.values())
        weights = tuple(x.data_ptr() for x in self.decoder.parameters())
        return *given, torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda"), banks, weights

    def _hooked(self) -> bool:
        """Whether somebody listens to a part of the decoder, which a replay would not tell."""
        return any(part._forward_hooks or part._forward_pre_hooks for part in self.decoder.modules())
