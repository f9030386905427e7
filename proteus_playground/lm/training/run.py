"""Train a model: the loop, and how one step changes model, optimiser and position.

`train` is a generator that the command line, the tests and the notebooks share; to stop a run, stop iterating.

Axes: `B` batch, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from math import isfinite
from pathlib import Path
from time import monotonic, perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.checks import whole_number
from ...common.files import check_folder, check_place, read_lines
from ...common.processes import place
from ...common.progress import Stop, Stopped
from .. import losses
from ..model import ProteusLM
from . import distributed
from .data import StageBatches
from .look import look, measure_memory
from .optimiser import autocast, build_optimiser, loss_scaler, pick_dtype, set_rate
from .recipe import Batch, Batches, Position, Recipe
from .store import LOG, STATE, Saved, Store


@dataclass(frozen=True)
class Step:
    """One optimiser step. The last five are measured every few steps and None in between."""

    step: int  # from 1
    stage: int  # from 0
    length: int  # tokens per text
    alpha: float
    loss: float  # weighted mean cross-entropy before the update, nats per scored token
    lr: float
    tokens: int  # read so far, by all processes
    seconds: float  # spent on steps so far, without measuring and without the caller's own work
    tokens_per_second: float  # of this step
    grad_norm: float  # before clipping
    memory_bytes: int | None = None  # see `look.measure_memory`
    heads_awake: float | None = None  # this and the next three: see `look.Look`
    gate_entropy: float | None = None
    dead_gates: int | None = None
    density: float | None = None


def train(
    model: ProteusLM,
    batches: Batches,
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    every: int = 10,
    device: str | torch.device | None = None,
    precision: str = "auto",
    save_seconds: float = 30.0,
    workers: int = 0,
    stop: Stop | None = None,
) -> Iterator[Step]:
    """Train `model` in place and yield a `Step` after each step; at the end the model is in evaluation mode.

    folder: where the run is saved: every save_seconds, at its end, and when it is stopped between two steps. The same
    call resumes it, on the CPU with exactly the same bits. every: steps between two measurements of gates and memory.
    device: default the model's. precision: auto, float32, bfloat16 or float16. workers: processes that prepare batches
    in advance. Under `torchrun` (inside `common.processes.together`) each process reads batches of its own. Raises
    `ValueError` for a folder of another run, `FloatingPointError` if the loss is not finite, `Stopped`, `OSError`.
    """
    whole_number("every", every, 1)
    whole_number("workers", workers, 0)
    if batches.vocab_size > model.cfg.vocab_size:
        raise ValueError(f"batches.vocab_size={batches.vocab_size}: must be at most the model's {model.cfg.vocab_size}")
    run = Run(model, batches, recipe, torch.device(device or model.embed.weight.device), precision, workers)
    store = None
    if folder is not None:
        check_folder(folder, "folder")
        store = Store(folder, run.about())
        for name in (STATE, LOG):
            check_place(store.folder / name, "folder")
        saved = store.load()
        if saved is not None:
            run.restore(saved)
    distributed.same_start(model)
    return _steps(run, store, every, save_seconds, stop)


def read_log(folder: str | Path) -> list[Step]:
    """The steps that the run in a folder has logged."""
    return [Step(**line) for line in read_lines(Path(folder) / LOG)]


def _steps(run: Run, store: Store | None, every: int, save_seconds: float, stop: Stop | None) -> Iterator[Step]:
    saved_step, saved_at, between_steps = run.position.step, monotonic(), True
    store = store if run.rank == 0 else None

    def save() -> None:
        nonlocal saved_step, saved_at
        if store is not None and saved_step != run.position.step:
            store.save(*run.state())
            saved_step, saved_at = run.position.step, monotonic()

    try:
        while run.position.stage_of(run.recipe) is not None:
            if distributed.total([float(stop is not None and stop())], run.device)[0]:
                raise Stopped("stopped on request")
            between_steps = False  # a step that fails half-way must not be saved
            number, is_last = run.position.step + 1, run.position.steps_left(run.recipe) == 1
            step = run.advance(measured=number == 1 or number % every == 0 or is_last)
            between_steps = True
            if store is not None:
                store.log(step)
                if monotonic() - saved_at >= save_seconds:
                    save()
            yield step
    finally:
        if between_steps:
            save()
        run.model.eval()


class Run:
    """Model, optimiser and position: all that changes from step to step."""

    def __init__(
        self, model: ProteusLM, batches: Batches, recipe: Recipe, device: torch.device, precision: str, workers: int = 0
    ):
        self.model, self.batches, self.recipe, self.device = model.to(device), batches, recipe, device
        self.dtype = pick_dtype(device, precision)
        self.optimiser, self.scaler = build_optimiser(model, recipe), loss_scaler(device, self.dtype)
        self.position, (self.rank, self.ranks) = Position(), place()
        self.names = {id(weight): name for name, weight in model.named_parameters()}
        self.workers = workers
        self._loader: tuple[int, Iterator[Batch]] | None = None  # a stage's number, and its batches that follow
        self._next: tuple[int, Batch] | None = None  # prepared in advance: its stage's number, and the batch

    # -- one step ---------------------------------------------------------------------------------------------

    def advance(self, measured: bool) -> Step:
        """Take the next step. measured: also measure its memory, and then the gates and heads."""
        began, position, figures = perf_counter(), self.position, {}
        stage, rate = position.stage, position.rate(self.recipe)
        length, alpha = position.stage_of(self.recipe).draw(self.recipe.seed, position.step)
        batch, scored = self._batch()
        with self.model.settings(flux_alpha=alpha, **self._shortlist(length)):
            learn = partial(self._learn, batch, scored, rate)
            if measured:
                (loss, norm), figures["memory_bytes"] = measure_memory(self.device, self._held, learn)
            else:
                loss, norm = learn()
            tokens, seconds = batch.ids.numel() * self.ranks, perf_counter() - began
            position.advance(self.recipe, loss, tokens, seconds)
            if measured:
                figures |= asdict(look(self.model, batch.ids[:1].to(self.device)))
        return Step(
            step=position.step, stage=stage, length=length, alpha=alpha, loss=loss, lr=rate, tokens=position.tokens,
            seconds=position.seconds, tokens_per_second=tokens / seconds, grad_norm=norm, **figures,
        )  # fmt: skip

    def _batch(self) -> tuple[Batch, float]:
        """The next step's batch, and the sum of its targets' weights over all ranks."""
        prepared, self._next = self._next, None
        if prepared is not None and prepared[0] == self.position.stage:
            batch = prepared[1]
        else:
            batch = self._load(self.position.step)
        scored = batch.targets != losses.IGNORED
        weight = scored.sum() if batch.weights is None else batch.weights[scored].sum()
        return batch, distributed.total([float(weight)], self.device)[0]

    def _load(self, step: int) -> Batch:
        """The batch of a step; one loader serves a whole stage."""
        position, stage = self.position, self.position.stage_of(self.recipe)
        if self._loader is None or self._loader[0] != position.stage:
            texts = StageBatches(self.batches, stage, self.recipe.seed, self.rank, self.ranks)
            steps = range(step, position.step + stage.steps - position.stage_step)
            self._loader = position.stage, texts.loader(steps, self.workers)
        return next(self._loader[1])

    def _load_next(self) -> None:
        """Prepare the next step's batch while the device computes this step."""
        if self.position.stage_step + 1 < self.position.stage_of(self.recipe).steps:
            self._next = self.position.stage, self._load(self.position.step + 1)

    def _shortlist(self, length: int) -> dict:
        """The setting of L at alpha 1 if the stage makes it follow the length."""
        share = self.position.stage_of(self.recipe).share
        return {"shortlist": max(1, length // share)} if share else {}

    def _learn(self, batch: Batch, scored: float, rate: float) -> tuple[float, float]:
        """Forward pass, backward pass, update. Returns the loss over all ranks and the gradient's norm."""
        model, recipe = self.model.train(self.recipe.learn_gates), self.recipe
        set_rate(self.optimiser, rate)
        self.optimiser.zero_grad(set_to_none=True)
        with autocast(self.device, self.dtype):
            loss, extra = self._loss(batch, scored)
        self.scaler.scale(loss + extra).backward()
        if recipe.learn_gates:
            distributed.share_gates(model)
        distributed.mean_gradients(model)
        self.scaler.unscale_(self.optimiser)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.device.type != "cpu":
            self._load_next()
        return self._checked(float(loss.detach()), float(extra.detach()), float(norm))

    def _checked(self, loss: float, extra: float, norm: float) -> tuple[float, float]:
        """Mean loss over the ranks, and the norm. `FloatingPointError` if one is not finite.

        With a scaled loss the gradient may overflow: the scaler skips that update.
        """
        loss, extra = (value / self.ranks for value in distributed.total([loss, extra], self.device))
        if not isfinite(loss + extra) or not (isfinite(norm) or self.scaler.is_enabled()):
            found = f"the loss is {loss:g}, the auxiliary losses {extra:g}, the gradient's norm {norm:g}"
            raise FloatingPointError(f"step {self.position.step + 1}: {found}; lower lr={self.recipe.lr:g}")
        return loss, norm

    def _loss(self, batch: Batch, scored: float) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy, and the recipe's auxiliary losses."""
        recipe, options = self.recipe, {"checkpoint": True} if self.recipe.checkpoint else {}
        ids, targets = (x.to(self.device, non_blocking=True) for x in (batch.ids, batch.targets))
        routed = recipe.router_z > 0 and self.model.cfg.attention.route_heads
        matched = recipe.match > 0 and self.model.blocks[0].attn.cfg.flux_alpha != 0
        with losses.attention_calls(self.model) if matched else nullcontext() as calls:
            if recipe.alignment > 0 or recipe.opening > 0 or routed:
                logits, traces = self.model(ids, return_trace=True, **options)
            else:
                logits, traces = self.model(ids, **options), ()
        each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=losses.IGNORED, reduction="none")
        if batch.weights is not None:
            each = each * batch.weights.to(self.device, non_blocking=True).flatten()
        extra = each.new_zeros(())
        if routed:
            extra = extra + recipe.router_z * losses.router_z(traces)
        if recipe.opening:
            extra = extra + recipe.opening * losses.opening(traces, self.model, first=self.position.step)
        if recipe.alignment:
            extra = extra + recipe.alignment * losses.alignment(traces[-1], self.model, targets)
        if matched:
            extra = extra + recipe.match * losses.dense_match(calls)
        return each.sum() * (self.ranks / max(scored, 1e-9)), extra

    # -- saving and resuming ----------------------------------------------------------------------------------

    def _held(self) -> list[Tensor]:
        """Weights, buffers and the optimiser's averages."""
        averages = [tensor for state in self.optimiser.state.values() for tensor in state.values()]
        return [*self.model.parameters(), *self.model.buffers(), *averages]

    def about(self) -> dict:
        """What must be the same for a run to resume. Batches are compared by a hash of their first text."""
        first = self.batches.batch(0, 1, self.recipe.stages[0].lengths[0])
        text = sha256(first.ids.numpy().tobytes() + first.targets.numpy().tobytes()).hexdigest()[:16]
        about = {"model": self.model.cfg.to_dict(), "recipe": self.recipe.to_dict()}
        return {**about, "batches": text, "dtype": str(self.dtype).removeprefix("torch."), "processes": self.ranks}

    def state(self) -> tuple[dict[str, Tensor], dict, dict]:
        """Tensors of model and optimiser, position, and the loss scaler's state."""
        averages = {
            f"optimiser.{self.names[id(weight)]}/{name}": tensor
            for weight, state in self.optimiser.state.items()
            for name, tensor in state.items()
        }
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {**weights, **averages}, asdict(self.position), self.scaler.state_dict()

    def restore(self, saved: Saved) -> None:
        """Go on from what `state` gave."""
        part = {"model": {}, "optimiser": {}}
        for name, tensor in saved.tensors.items():
            head, _, rest = name.partition(".")
            part[head][rest] = tensor
        self.model.load_state_dict(part["model"])
        weights = [weight for group in self.optimiser.param_groups for weight in group["params"]]
        index = {self.names[id(weight)]: i for i, weight in enumerate(weights)}
        states: dict[int, dict] = {}
        for name, tensor in part["optimiser"].items():
            weight, _, kind = name.rpartition("/")
            states.setdefault(index[weight], {})[kind] = tensor
        self.optimiser.load_state_dict({"state": states, "param_groups": self.optimiser.state_dict()["param_groups"]})
        if saved.scaler:
            self.scaler.load_state_dict(saved.scaler)
        self.position = Position(**{field.name: saved.position[field.name] for field in fields(Position)})
