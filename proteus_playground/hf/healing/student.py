"""The model as its own teacher: a dense pass without adapters gives the target, a sparse pass with them is trained.

The dense pass is the model's own attention, unchanged. The sparse pass goes through `hf.patch.patched`, so it reads the
same keys as in use.

Axes: `B` batch, `T` tokens, `D` model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...attention.adapter import LayerRun, ProteusLayer
from ...attention.budget import Budget, plan_budget
from ..adapters import switched_off
from ..attention_call import AttentionCall
from ..patch import find_decoder, patched, surveyed
from .budgets import Drawn
from .losses import Head, gate_loss, output_match, token_losses
from .plan import Losses, Stage
from .rows import Batch


@dataclass(frozen=True)
class Taught:
    """What the dense pass gave."""

    hidden: Tensor  # (B, T, D)
    outputs: dict[int, Tensor]  # attention outputs (B, T, D) by layer; empty where they are not compared


class Student(nn.Module):
    """The model, its gates, and the losses of one pass. Its parameters are the model's, and prototypes if trained.

    teacher: a frozen copy, for a model that is trained whole; None where switching the adapters off gives it.
    """

    def __init__(self, model: nn.Module, layers: Mapping[int, ProteusLayer], teacher: nn.Module | None = None):
        super().__init__()
        self.model, self.layers = model, dict(layers)
        self._teacher = (model if teacher is None else teacher,)  # in a tuple, so that it is no part of this module
        for each in (model, self.teacher):
            each.eval()  # no dropout, until a pass that learns
        self.head, self.teacher_head = head_of(model), head_of(self.teacher)
        self.prototypes = nn.ParameterDict()
        self._first, self._gate_losses = False, []  # whether this is a layer's first run, not one for the gradient

    @property
    def teacher(self) -> nn.Module:
        """The model whose dense pass teaches, with its adapters switched off."""
        return self._teacher[0]

    def begin(self, stage: Stage) -> None:
        """Make ready for a stage: only what it trains has gradients."""
        weights = "weights" in stage.trains
        has_adapters = any(".lora_" in name for name, _ in self.model.named_parameters())
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(weights and (".lora_" in name or not has_adapters))
        trained = self.layers if "prototypes" in stage.trains else {}
        self.prototypes = nn.ParameterDict(
            {str(layer): nn.Parameter(its.gates.prototypes.clone()) for layer, its in trained.items()}
        )

    @torch.no_grad()
    def teach(self, batch: Batch, losses: Losses) -> Taught | None:
        """The dense pass; None where no loss needs it."""
        if not (losses.kl or losses.match):
            return None
        layers = self.layers if losses.match else {}
        with switched_off(self.teacher), watched(self.teacher, layers) as outputs:
            return Taught(run(self.teacher, batch), outputs)

    @contextmanager
    def patch(self, drawn: Drawn, tokens: int, stage: Stage) -> Iterator[None]:
        """A context for a pass over rows of `tokens` tokens and its backward pass: layers run at the drawn budget."""
        self._gate_losses = []
        layers = {at: self._attend(at, layer, drawn, tokens, stage) for at, layer in self.layers.items()}
        dropouts = [part for name, part in self.model.named_modules() if name.endswith("lora_dropout")]
        try:
            for part in dropouts:
                part.train()
            with patched(self.model, layers):
                yield
        finally:
            for part in dropouts:
                part.eval()

    def _attend(self, at: int, layer: ProteusLayer, drawn: Drawn, tokens: int, stage: Stage) -> Callable:
        budget = budget_of(layer, tokens, drawn)

        def attend(call: AttentionCall) -> Tensor | None:
            if self._first and stage.follow:
                real = call.keep
                layer.gates.observe(
                    call.k, call.k.new_ones(call.k.shape[:2], dtype=torch.bool) if real is None else real
                )
            if self._first and str(at) in self.prototypes:
                with torch.enable_grad():
                    self._gate_losses.append(gate_loss(self.prototypes[str(at)], layer.gates, call, tokens // 32))
            return None if budget.dense else sparse_run(layer, call, budget, explain=False).out

        return attend

    def forward(self, batch: Batch, taught: Taught | None, losses: Losses) -> dict[str, Tensor]:
        """The losses of a pass, each a sum over its learned tokens; within `patch`. "loss" is their weighted sum."""
        figures = dict.fromkeys(("kl", "match", "cross_entropy", "gates"), batch.ids.new_zeros((), dtype=torch.float32))
        learns = any(weight.requires_grad for weight in self.model.parameters())
        with torch.set_grad_enabled(learns), watched(self.model, self.layers if losses.match else {}) as outputs:
            self._first = True
            try:
                hidden = run(self.model, batch)
            finally:
                self._first = False
            if losses.kl or losses.cross_entropy:
                known = hidden.detach() if taught is None else taught.hidden
                pairs = hidden.flatten(0, 1), self.head, known.flatten(0, 1), self.teacher_head
                figures["kl"], figures["cross_entropy"] = token_losses(*pairs, batch.targets.flatten())
            if losses.match:
                figures["match"] = output_match(outputs, taught.outputs, batch.real) * batch.learned
        if self._gate_losses:
            figures["gates"] = torch.stack(self._gate_losses).mean() * batch.learned
        return figures | {"loss": sum(getattr(losses, name) * value for name, value in figures.items())}

    @torch.no_grad()
    def after_step(self, stage: Stage) -> None:
        """Give the gates the trained prototypes, or move their prototypes to the keys of the step."""
        for layer, prototypes in self.prototypes.items():
            prototypes.copy_(nn.functional.normalize(prototypes, dim=-1))
            self.layers[int(layer)].gates.prototypes = prototypes.detach().clone()
        if stage.follow:
            for layer in self.layers.values():
                layer.gates.fold()


def run(model: nn.Module, batch: Batch) -> Tensor:
    """The decoder's last hidden states `(B, T, D)`."""
    mask = {} if batch.real is None else {"attention_mask": batch.real.long()}
    return find_decoder(model)(batch.ids, use_cache=False, **mask)[0]


def budget_of(layer: ProteusLayer, tokens: int, drawn: Drawn) -> Budget:
    """The budget of a layer for rows of `tokens` tokens."""
    return plan_budget(replace(layer.config, shortlist=drawn.shortlist), tokens, drawn.alpha)


def sparse_run(layer: ProteusLayer, call: AttentionCall, budget: Budget, explain: bool) -> LayerRun:
    """The layer at a budget, computed in autocast's precision where that is on. explain: as in `proteus_attention`."""
    kind = call.q.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else call.q.dtype
    return layer.run(
        call.q.to(dtype), call.k.to(dtype), call.v.to(dtype), inv_freq=call.inv_freq, positions=call.positions,
        scale=call.scale, real=call.keep, budget=budget, explain=explain,
    )  # fmt: skip


@contextmanager
def watched(model: nn.Module, layers: Mapping[int, object]) -> Iterator[dict[int, Tensor]]:
    """The outputs of the attentions of `layers` in the pass within: `(B, T, D)` each, behind the projection."""
    (decoder, known), found = surveyed(model), {}

    def keep(layer: int):
        def hook(module, args, output) -> None:
            found.setdefault(layer, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as undo:
        for layer in layers:
            module = decoder.get_submodule(known.layers[layer].name)
            undo.callback(module.register_forward_hook(keep(layer)).remove)
        yield found


def head_of(model: nn.Module) -> Head:
    """From hidden states to logits, as the model does it. Raises `ValueError` where a model does it in another way."""
    output, config = model.get_output_embeddings(), model.config.get_text_config()
    cap, divisor = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden)
        logits = logits if divisor is None else logits / divisor
        logits = logits if factor is None else logits * factor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    ids = torch.arange(4, device=output.weight.device)[None] % output.weight.shape[0]
    with torch.no_grad():
        wanted, got = model(input_ids=ids, use_cache=False).logits, head(run(model, Batch(ids, ids, None)))
    if not torch.allclose(wanted.float(), got.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(
            f"model={type(model).__name__}: logits are not made by its output layer, so it cannot be healed"
        )
    return head


def prepare_training(model: nn.Module, checkpoint: bool) -> None:
    """No dropout of the model's own, and activations computed again in the backward pass if wanted."""
    model.eval()
    decoder, how = find_decoder(model), {"use_reentrant": False}
    if checkpoint and hasattr(decoder, "activation_checkpointing_enable"):  # since transformers 5.2x
        decoder.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    elif checkpoint:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    for part in decoder.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.training = checkpoint  # of this module only, so that no dropout inside it is switched on
