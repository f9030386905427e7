"""One run: model, optimiser and place in the schedule, and how a step changes them.

Axes: `B` batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from math import isfinite
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import losses
from ..model import ProteusLM
from . import optimiser, ranks
from .ahead import Texts
from .look import look
from .memory import step_bytes
from .precision import autocast, pick_dtype, scaler
from .recipe import Batch, Batches, Recipe
from .schedule import Place
from .store import Saved


@dataclass(frozen=True)
class Step:
    """One optimiser step. The last five are measured every few steps and None in between."""

    step: int  # from 1
    stage: int  # from 0
    length: int  # tokens per text
    alpha: float
    loss: float  # weighted mean cross-entropy, nats per scored token, before the step
    lr: float
    tokens: int  # read so far, by all processes
    seconds: float  # spent training so far; measuring and whatever the caller does in between not counted
    tokens_per_second: float  # of this step
    grad_norm: float  # before clipping
    memory_bytes: int | None = None  # see `memory.step_bytes`
    heads_awake: float | None = None  # see `look.Look`
    gate_entropy: float | None = None
    dead_gates: int | None = None
    density: float | None = None


class Run:
    """Model, optimiser and place: all that changes from step to step."""

    def __init__(
        self, model: ProteusLM, batches: Batches, recipe: Recipe, device: torch.device, wanted: str, workers: int = 0
    ):
        self.model, self.batches, self.recipe, self.device = model.to(device), batches, recipe, device
        self.dtype = pick_dtype(device, wanted)
        self.optimiser, self.scaler = optimiser.build(model, recipe), scaler(device, self.dtype)
        self.place, self.rank, self.ranks = Place(), *ranks.place()
        self.names = {id(weight): name for name, weight in model.named_parameters()}
        self.workers = workers
        self._loader: tuple[int, Iterator[Batch]] | None = None  # of which stage, and its batches to come
        self._next: tuple[int, Batch] | None = None  # written ahead: of which stage, and the batch

    # -- one step ---------------------------------------------------------------------------------------------

    def advance(self, measured: bool) -> Step:
        """Take the next step, and look at the model where `measured`."""
        began, place, seen, result = perf_counter(), self.place, {}, []
        stage, rate = place.stage, place.rate(self.recipe)
        length, alpha = place.stage_of(self.recipe).draw(self.recipe.seed, place.step)
        batch, scored = self._batch()

        def work() -> None:
            result.extend(self._learn(batch, scored, rate))

        with self.model.settings(flux_alpha=alpha, **self._shortlist(length)):
            if measured:
                seen["memory_bytes"] = step_bytes(self.device, self._held, work)
            else:
                work()
            loss, norm = result
            tokens, seconds = batch.ids.numel() * self.ranks, perf_counter() - began
            place.advance(self.recipe, loss, tokens, seconds)
            if measured:
                seen |= asdict(look(self.model, batch.ids[:1].to(self.device)))
        return Step(
            step=place.step, stage=stage, length=length, alpha=alpha, loss=loss, lr=rate, tokens=place.tokens,
            seconds=place.seconds, tokens_per_second=tokens / seconds, grad_norm=norm, **seen,
        )  # fmt: skip

    def _batch(self) -> tuple[Batch, float]:
        """The next step's batch, and its weight over all ranks."""
        made, self._next = self._next, None
        batch = made[1] if made and made[0] == self.place.stage else self._write(self.place.step)
        asked = batch.targets != losses.IGNORED
        weight = asked.sum() if batch.weights is None else batch.weights[asked].sum()
        return batch, ranks.total([float(weight)], self.device)[0]

    def _write(self, step: int) -> Batch:
        """A step's batch; a stage's come from one loader."""
        place, stage = self.place, self.place.stage_of(self.recipe)
        if self._loader is None or self._loader[0] != place.stage:
            texts = Texts(self.batches, stage, self.recipe.seed, self.rank, self.ranks)
            to_come = range(step, place.step + stage.steps - place.stage_step)
            self._loader = place.stage, texts.loader(to_come, self.workers)
        return next(self._loader[1])

    def _write_ahead(self) -> None:
        """The batch of the step after this one, while the device works on this one."""
        if self.place.stage_step + 1 < self.place.stage_of(self.recipe).steps:
            self._next = self.place.stage, self._write(self.place.step + 1)

    def _shortlist(self, length: int) -> dict:
        """L of a step at alpha 1, where it follows the length."""
        share = self.place.stage_of(self.recipe).share
        return {"shortlist": max(1, length // share)} if share else {}

    def _learn(self, batch: Batch, scored: float, rate: float) -> tuple[float, float]:
        """Forward, backward, update. The loss over all ranks and the gradient's norm."""
        model, recipe = self.model.train(self.recipe.learn_gates), self.recipe
        optimiser.set_rate(self.optimiser, rate)
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.dtype):
            loss, extra = self._loss(batch, scored)
        self.scaler.scale(loss + extra).backward()
        if recipe.learn_gates:
            ranks.share_gates(model)
        ranks.mean_gradients(model)
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.device.type != "cpu":
            self._write_ahead()
        return self._checked(float(loss.detach()), float(extra.detach()), float(norm))

    def _checked(self, loss: float, extra: float, norm: float) -> tuple[float, float]:
        """Mean loss over the ranks, and the norm. A scaled gradient may overflow: the scaler drops that step."""
        loss, extra = (value / self.ranks for value in ranks.total([loss, extra], self.device))
        if not isfinite(loss + extra) or not (isfinite(norm) or self.scaler.is_enabled()):
            found = f"the loss is {loss:g}, what is added to it {extra:g}, the gradient's norm {norm:g}"
            raise FloatingPointError(f"step {self.place.step + 1}: {found}; lower lr={self.recipe.lr:g}")
        return loss, norm

    def _loss(self, batch: Batch, scored: float) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy, and what the recipe adds to it."""
        recipe, keep = self.recipe, {"checkpoint": True} if self.recipe.checkpoint else {}
        ids, targets = (x.to(self.device, non_blocking=True) for x in (batch.ids, batch.targets))
        routed = recipe.router_z > 0 and self.model.cfg.attention.route_heads
        traced = recipe.alignment > 0 or recipe.opening > 0 or routed
        logits, traces = self.model(ids, return_trace=True, **keep) if traced else (self.model(ids, **keep), ())
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=losses.IGNORED, reduction="none")
        if batch.weights is not None:
            each = each * batch.weights.to(self.device, non_blocking=True).flatten()
        extra = each.new_zeros(())
        if routed:
            extra = extra + recipe.router_z * losses.router_z(traces)
        if recipe.opening:
            extra = extra + recipe.opening * losses.opening(traces, self.model, first=self.place.step)
        if recipe.alignment:
            extra = extra + recipe.alignment * losses.alignment(traces[-1], self.model, targets)
        return each.sum() * (self.ranks / max(scored, 1e-9)), extra

    # -- what is held and what is kept ------------------------------------------------------------------------

    def _held(self) -> list[Tensor]:
        """Weights, buffers and the optimiser's averages."""
        averages = [tensor for state in self.optimiser.state.values() for tensor in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *averages]

    def _tensors(self) -> dict[str, Tensor]:
        averages = {
            f"optimiser.{self.names[id(weight)]}/{name}": tensor
            for weight, state in self.optimiser.state.items()
            for name, tensor in state.items()
        }
        return {**{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}, **averages}

    def about(self) -> dict:
        """What must be the same for a run to go on; the batches by their first text."""
        first = self.batches.batch(0, 1, self.recipe.stages[0].lengths[0])
        text = sha256(first.ids.numpy().tobytes() + first.targets.numpy().tobytes()).hexdigest()[:16]
        about = {"model": self.model.cfg.to_dict(), "recipe": self.recipe.to_dict()}
        return {**about, "batches": text, "dtype": str(self.dtype).removeprefix("torch."), "processes": self.ranks}

    def state(self) -> tuple[dict[str, Tensor], dict, dict]:
        return self._tensors(), asdict(self.place), self.scaler.state_dict()

    def restore(self, saved: Saved | None) -> None:
        """Go on from what `state` gave."""
        if saved is None:
            return
        part = {"model": {}, "optimiser": {}}
        for name, tensor in saved.tensors.items():
            head, _, rest = name.partition(".")
            part[head][rest] = tensor
        self.model.load_state_dict(part["model"])
        weights = [weight for group in self.optimiser.param_groups for weight in group["params"]]
        names = {self.names[id(weight)]: i for i, weight in enumerate(weights)}
        states: dict[int, dict] = {}
        for name, tensor in part["optimiser"].items():
            weight, _, kind = name.rpartition("/")
            states.setdefault(names[weight], {})[kind] = tensor
        self.optimiser.load_state_dict({"state": states, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.scaler.load_state_dict(saved.scaler) if saved.scaler else None
        self.place = Place(**{field.name: saved.place[field.name] for field in fields(Place)})
