"""Training stage by stage: how one step changes the model, its gates, the optimiser and the position.

A step depends on the plan's seed and on the position alone: which rows it reads, which budgets its passes draw, and
what dropout hides. So a run that goes on from a saved position does what the uninterrupted run would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import isfinite
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

from ...common.machine import fast_dtype
from ...lm.training import distributed
from .budgets import ceiling, draw
from .corpus import Corpus
from .evaluate import Measured, measure
from .optimiser import build_optimiser, set_rates
from .plan import Plan, Stage
from .rows import Batch, Rows, held_out_rows
from .student import Student, prepare_training

FIGURES = ("kl", "match", "cross_entropy", "gates")
SHARES = (32, 16, 8)  # L of held-out measurements is the length divided by each
SPEED_S = 10.0  # seconds of training passes that a CPU's speed is judged by
MIXED = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}


@dataclass
class Position:
    """Where a run is. A stage's numbers begin again at 0 with the next one."""

    stage: int = 0  # index in the plan; the number of stages once all are done
    step: int = 0  # of the whole run
    seconds: float = 0.0  # spent on steps, of the whole run
    read: int = 0  # tokens, of the whole run
    tokens: int = 0  # of this stage
    level: int = 0  # index of the stage's length
    level_tokens: int = 0  # read at this length
    row: int = 0  # next row at this length
    best: float | None = None  # smallest held-out gap at this length
    stale: int = 0  # measurements since then
    over: bool = False  # whether the stage has ended


@dataclass(frozen=True)
class Step:
    """One optimiser step. Losses are means over the learned tokens of all its passes, before the update."""

    step: int  # of the run, from 1
    stage: str
    length: int  # tokens of a row
    alpha: float  # mean of the passes of this process
    ceiling: float  # the largest flux alpha that they could draw
    shortlist: float  # L at flux alpha 1, mean of the passes of this process
    reads: float  # L at the alpha drawn, mean of the passes of this process: keys and notes that a query may read
    loss: float  # weighted sum of the next four
    kl: float
    match: float
    cross_entropy: float
    gates: float
    rate: float  # learning rate of the first group of parameters
    grad_norm: float  # before clipping
    read: int  # tokens of the run so far
    tokens_per_second: float
    seconds: float  # spent on steps so far
    held_out: dict | None = None  # see `evaluate.Measured`; where it was measured after this step


def make_accelerator(precision: str = "auto", device: str | None = None):
    """Accelerate's `Accelerator` for a plan's precision. device: "cpu" keeps it off a GPU. Raises `ImportError`."""
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as err:
        raise ImportError(f"healing needs the heal extra: pip install 'proteus-playground[heal]' ({err})") from err
    cpu = device == "cpu" or not torch.cuda.is_available()
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = fast_dtype(torch.device("cpu" if cpu else "cuda")) if precision == "auto" else named[precision]
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(mixed_precision=MIXED[dtype], cpu=cpu, kwargs_handlers=[buffers])


class Training:
    """A student, its data, and all that changes from step to step."""

    def __init__(
        self, student: Student, plan: Plan, corpora: Sequence[Corpus], held_out: Sequence[Corpus], accelerator
    ):
        self.plan, self.corpora, self.held_out, self.accelerator = plan, corpora, held_out, accelerator
        self.student = student.to(accelerator.device)
        for layer in student.layers.values():
            layer.gates.to(accelerator.device)
        prepare_training(student.model, plan.checkpoint)
        self.position, self.optimiser, self._rows = Position(), None, {}
        self._module: nn.Module = student
        self._begin()

    @property
    def stage(self) -> Stage | None:
        """The stage at work; None once all are done."""
        return self.plan.stages[self.position.stage] if self.position.stage < len(self.plan.stages) else None

    @property
    def length(self) -> int:
        """Tokens of a row now."""
        return self.stage.lengths[self.position.level]

    @property
    def left(self) -> int:
        """Tokens that the plan's stages still read at most."""
        return max(0, sum(stage.tokens for stage in self.plan.stages[self.position.stage :]) - self.position.tokens)

    def _begin(self) -> None:
        """A new optimiser for the stage at the position."""
        self.accelerator.free_memory()
        self.optimiser, self._module = None, self.student
        if self.stage is None:
            return
        self.student.begin(self.stage)
        self.student.to(self.accelerator.device)
        raw = build_optimiser(self.student, self.stage.rates)
        if raw is not None:
            self._module, self.optimiser = self.accelerator.prepare(self.student, raw)

    def finish_stage(self) -> None:
        """Go on to the next stage."""
        at = self.position
        self.jump(Position(at.stage + 1, at.step, at.seconds, at.read))

    def jump(self, position: Position) -> None:
        """Go on at another position, with a new optimiser."""
        self.accelerator.unwrap_model(self._module, keep_fp32_wrapper=False)
        self.position = position
        self._begin()

    def use(self, plan: Plan, corpora: Sequence[Corpus], held_out: Sequence[Corpus]) -> None:
        """Go on by a plan with other stages or other data; adapter, seed and precision stay."""
        self.plan, self.corpora, self.held_out, self._rows = plan, corpora, held_out, {}

    # -- one step ---------------------------------------------------------------------------------------------

    def advance(self) -> Step:
        """One optimiser step. Raises `FloatingPointError` if the loss is not finite."""
        began, at, stage = perf_counter(), self.position, self.stage
        length, done = self.length, at.tokens / stage.tokens
        batch, passes = self._batch()
        learned = max(1, batch.learned)
        if self.optimiser is not None:
            set_rates(self.optimiser, stage.rates, done)
        sums, drawn = torch.zeros(1 + len(FIGURES), device=self.accelerator.device), []
        for number, (first, part) in enumerate(passes, 1):
            budget = draw(stage.budgets, length, done, [self.plan.seed, at.stage, at.level, first])
            drawn.append(budget)
            figures = self._pass(part, first, budget, learned, last=number == len(passes))
            sums += torch.stack([figures[name].detach().float() for name in ("loss", *FIGURES)])
        norm = self._update()
        sums = [value / learned for value in distributed.total(sums.tolist(), self.accelerator.device)]
        if not isfinite(sums[0]) or not (isfinite(norm) or self.accelerator.scaler is not None):
            raise FloatingPointError(f"step {at.step + 1}: loss {sums[0]:g}, norm {norm:g}; lower the plan's rates")
        tokens = batch.ids.numel()
        at.row, at.step, at.read = at.row + len(batch.ids), at.step + 1, at.read + tokens
        at.tokens, at.level_tokens = at.tokens + tokens, at.level_tokens + tokens
        at.seconds += (took := perf_counter() - began)
        rate = 0.0 if self.optimiser is None else self.optimiser.param_groups[0]["lr"]
        alpha, shortlist, reads = np.mean([(b.alpha, b.shortlist, b.reads(length)) for b in drawn], axis=0).tolist()
        step = Step(
            at.step, stage.name, length, alpha, ceiling(stage.budgets, done), shortlist, reads, *sums, rate, norm,
            at.read, tokens / took, at.seconds,
        )  # fmt: skip
        at.over = at.tokens >= stage.tokens
        if not at.over and at.level_tokens >= stage.tokens / len(stage.lengths):
            self._next_length()
        return step

    def _batch(self) -> tuple[Batch, list[tuple[int, Batch]]]:
        """All rows of the step, and the passes of this process, each with the number of its first row."""
        at, length = self.position, self.length
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        each = max(1, max(1, self.plan.batch_tokens // length) // ranks)
        batch = self._rows_of(length).batch(at.row, each * ranks)
        rows = min(each, max(1, self.plan.pass_tokens // length))
        starts = range(rank * each, (rank + 1) * each, rows)
        return batch, [(at.row + i, batch.part(i, min(i + rows, (rank + 1) * each))) for i in starts]

    def _rows_of(self, length: int) -> Rows:
        key = self.position.stage, self.position.level
        if key not in self._rows:
            self._rows = {key: Rows(self.corpora, self.plan.data.weights, length, (self.plan.seed, *key))}
        return self._rows[key]

    def _pass(self, batch: Batch, first: int, budget, learned: int, last: bool) -> dict[str, Tensor]:
        """The forward and backward pass of some rows."""
        stage, batch = self.stage, batch.to(self.accelerator.device)
        with self.accelerator.autocast():
            taught = self.student.teach(batch, stage.losses)
        torch.manual_seed(int(np.random.default_rng([self.plan.seed, self.position.stage, first]).integers(2**62)))
        waits = nullcontext() if last or self.optimiser is None else self.accelerator.no_sync(self._module)
        with waits, self.student.patch(budget, batch.ids.shape[1], stage):
            with self.accelerator.autocast():
                figures = self._module(batch, taught, stage.losses)
            if self.optimiser is not None:
                self.accelerator.backward(figures["loss"] * (self.accelerator.num_processes / learned))
        return figures

    def _update(self) -> float:
        """The optimiser's and the gates' step. Returns the gradient's norm."""
        norm = 0.0
        if self.optimiser is not None:
            weights = [weight for group in self.optimiser.param_groups for weight in group["params"]]
            norm = float(self.accelerator.clip_grad_norm_(weights, self.stage.rates.clip))
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        if self.stage.follow:
            distributed.share_gates(nn.ModuleList([layer.gates for layer in self.student.layers.values()]))
        self.student.after_step(self.stage)
        return norm

    def speed(self, passes: int = 4) -> float:
        """Tokens per second in the stage with most tokens, from passes of several budgets; they change nothing.

        On a GPU each runs twice, and the second run is timed: the first may compile kernels. Elsewhere a pass is one
        row, and no other follows once `SPEED_S` seconds are over.
        """
        before, tokens, took = self.position, [stage.tokens for stage in self.plan.stages], 0.0
        self.position = Position(tokens.index(max(tokens)))
        self._begin()
        kept = {at: dict(layer.gates.named_buffers()) for at, layer in self.student.layers.items()}
        stage, (batch, parts), on_gpu = self.stage, self._batch(), self.accelerator.device.type == "cuda"
        rows, timed = parts[0][1] if on_gpu else parts[0][1].part(0, 1), 0
        while timed < passes and (on_gpu or took < SPEED_S or self.accelerator.num_processes > 1):
            budget = draw(stage.budgets, self.length, 1.0, [self.plan.seed, timed])
            for _ in range(2 if on_gpu else 1):
                began = perf_counter()
                self._pass(rows, 0, budget, batch.learned, last=True)["loss"].item()
                self._wait()
            took, timed = took + perf_counter() - began, timed + 1
        self.student.zero_grad(set_to_none=True)
        for at, layer in self.student.layers.items():
            for name, buffer in kept[at].items():
                setattr(layer.gates, name, buffer)
        self.position = before
        self._begin()
        ranks = self.accelerator.num_processes
        seconds = distributed.total([took], self.accelerator.device)[0] / ranks  # the same in all, as the plan must be
        return timed * rows.ids.numel() * ranks / seconds

    def _wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    # -- held-out text ----------------------------------------------------------------------------------------

    def measure(
        self, corpora: Sequence[Corpus] | None = None, length: int | None = None, shares: Sequence[int] = SHARES
    ) -> Measured:
        """The gap on held-out rows. corpora: None for the plan's; length: None for the one at work."""
        length = length or (self.stage or self.plan.stages[-1]).lengths[self.position.level]
        corpora = self.held_out if corpora is None else corpora
        rows = [r for corpus in corpora for r in held_out_rows(corpus, length, self.plan.data.held_out_rows)]
        with self.accelerator.autocast():
            return measure(self.student, rows, shares)

    def note_gap(self, gap: float) -> None:
        """End the length at work, or the stage with its last one, where the gap has not fallen for long enough."""
        at, plateau = self.position, self.stage.plateau
        if at.best is None or gap < at.best - abs(at.best) * plateau.least:
            at.best, at.stale = gap, 0
            return
        at.stale += 1
        if at.stale >= plateau.patience and not self._next_length():
            at.over = True

    def _next_length(self) -> bool:
        """Go on to the stage's next length. False where there is none."""
        at = self.position
        if at.level + 1 >= len(self.stage.lengths):
            return False
        at.level, at.level_tokens, at.row, at.best, at.stale = at.level + 1, 0, 0, None, 0
        return True

    # -- saving and going on ----------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors of what is trained, of gates and of the optimiser; and position and loss scaler as plain values."""
        tensors = {f"weights.{name}": weight.detach() for name, weight in self._trained().items()}
        for at, layer in self.student.layers.items():
            tensors |= {f"gates.{at}.{name}": buffer for name, buffer in layer.gates.named_buffers()}
        if self.optimiser is not None:
            names = {id(weight): name for name, weight in self.student.named_parameters()}
            for weight, kept in self.optimiser.state.items():
                tensors |= {f"optimiser.{names[id(weight)]}/{kind}": value for kind, value in kept.items()}
        scaler = self.accelerator.scaler
        return tensors, {"position": asdict(self.position), "scaler": scaler.state_dict() if scaler else {}}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], about: dict) -> None:
        """Go on from what `state` gave."""
        self.position = Position(**about["position"])
        for at, layer in self.student.layers.items():
            layer.gates.load_state_dict({n: tensors[f"gates.{at}.{n}"] for n, _ in layer.gates.named_buffers()})
        for name, weight in self._trained().items():
            if f"weights.{name}" in tensors:
                weight.copy_(tensors[f"weights.{name}"])
        self._begin()
        if self.optimiser is not None:
            named = dict(self.student.named_parameters())
            order = [weight for group in self.optimiser.param_groups for weight in group["params"]]
            index = {id(weight): i for i, weight in enumerate(order)}
            states: dict[int, dict] = {}
            for key, value in tensors.items():
                if key.startswith("optimiser."):
                    name, _, kind = key.removeprefix("optimiser.").rpartition("/")
                    states.setdefault(index[id(named[name])], {})[kind] = value
            groups = self.optimiser.state_dict()["param_groups"]
            self.optimiser.load_state_dict({"state": states, "param_groups": groups})
        if about["scaler"]:
            self.accelerator.scaler.load_state_dict(about["scaler"])

    def _trained(self) -> dict[str, Tensor]:
        """The weights that some stage trains: adapters, or all of the model."""
        named = dict(self.student.model.named_parameters())
        adapters = {name: weight for name, weight in named.items() if ".lora_" in name}
        return adapters or named
