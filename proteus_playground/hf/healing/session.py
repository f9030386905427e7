"""The healing of a converted folder: its newest run, its data, and what each finished stage writes back into it."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch

from ...attention.adapter import ProteusLayer
from ...common.files import write_json
from ..adapters import add_adapters, continue_adapters
from ..models import load_folder
from ..own.folder import ADAPTER, GATES, HEALED, Folder, gates_of, layers_of, read_folder
from ..patch import find_decoder
from ..shipped_gates import write_gates
from .corpus import Corpus, read_corpus
from .history import write_history
from .plan import Plan, measured_every, sized
from .run import Run, read_log
from .student import Student
from .training import Position, Training, make_accelerator

PLAN, BEFORE = "plan.json", "before.json"
Say = Callable[[str], object]


class Session:
    """One run of a converted folder, opened to be trained."""

    def __init__(
        self, path: str | Path, *, data: Sequence[str] = (), full: bool = False, device: str = "cpu",
        precision: str | None = None,
    ):  # fmt: skip
        """data: sources in place of the plan's. full: train all weights, not adapters.

        Raises `ValueError` where `proteus convert` did not make the folder, where it has no plan, or where its run was
        begun with other adapters or another seed.
        """
        from transformers import AutoTokenizer

        self.folder: Folder = read_folder(path)
        self.folder.check_base()
        self.run_folder, plan = newest_plan(self.folder)
        if data:
            plan = replace(plan, data=replace(plan.data, sources=tuple(data), weights=(), held_out=()))
        if full:
            plan = replace(plan, adapter=None)
        if plan.adapter is None and self.folder.adapter is not None:
            raise ValueError(
                f"full: {str(path)!r} has an adapter: convert its base into a new folder to train it whole"
            )
        if precision:
            plan = replace(plan, precision=precision)
        accelerator = make_accelerator(plan.precision, device)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder.path, local_files_only=True)
        corpora, held_out = self.read(plan)
        base, healed = self.folder.base_path(), self.folder.healed
        model, teacher = load_folder(healed or base, device, tokenizer=False)[0], None
        layers = layers_of(model, self.folder.stanza, gates_of(self.folder, model))
        if plan.adapter is None:
            teacher = copy.deepcopy(model) if healed is None else load_folder(base, device, tokenizer=False)[0]
        elif self.folder.adapter is not None:
            model = continue_adapters(model, self.folder.adapter)
        else:
            model = add_adapters(model, plan.adapter, plan.seed)
        self.training = Training(Student(model, layers, teacher), plan, corpora, held_out, accelerator)
        adapter = plan.to_dict()["adapter"]
        self.run = Run(self.training, self.run_folder, {"adapter": adapter or "all weights", "seed": plan.seed})
        self.write_plan()

    def read(self, plan: Plan) -> tuple[list[Corpus], list[Corpus]]:
        """The corpora of a plan's data: to train on, and held out. Raises `ValueError` naming a source."""
        data = plan.data
        corpora = [read_corpus(source, self.tokenizer, data.max_tokens) for source in data.sources]
        if data.held_out:
            return corpora, [read_corpus(source, self.tokenizer, data.max_tokens) for source in data.held_out]
        pairs = [corpus.split(data.held_out_share) for corpus in corpora]
        return [first for first, _ in pairs], [rest for _, rest in pairs]

    def begin(self, say: Say, seconds: float | None = None, every: float | None = None) -> None:
        """Before the first step: measure held-out text, and shorten the plan to what this machine can do in time.

        A run that has begun keeps its plan. say: is told what is done, and how long the plan takes here. seconds: how
        long the run may take, in place of the plan's minutes. every: seconds of training between two measurements of
        held-out text, in stages that would measure it at their end only.
        """
        training, before = self.training, self.run_folder / BEFORE
        say = say if training.accelerator.is_main_process else lambda sentence: None
        if training.position.step:
            say(f"Going on after step {training.position.step:,}, in stage {training.stage.name}.")
        if training.position.step or before.is_file():
            return
        say("Measuring held-out text before the first step.")
        began = perf_counter()
        measured, took = training.measure(), perf_counter() - began
        plan, speed = training.plan, training.speed()
        if seconds is not None:
            plan = replace(plan, minutes=seconds / 60)
        fit = sized(plan, speed if every is None else speed * every / (every + took))
        self.use_plan(fit.plan if every is None else measured_every(fit.plan, round(speed * every)))
        if training.accelerator.is_main_process:
            write_json(before, measured.to_dict())
        say(fit.sentence)

    def write_plan(self) -> None:
        """Keep the plan, which a menu may have changed, beside the run's state."""
        if self.training.accelerator.is_main_process:
            self.training.plan.write(self.run_folder / PLAN)

    def use_data(self, sources: Sequence[str]) -> None:
        """Train on other texts from here on; what is held out comes from them too. Raises `ValueError`."""
        plan = self.training.plan
        plan = replace(plan, data=replace(plan.data, sources=tuple(sources), weights=(), held_out=()))
        self.training.use(plan, *self.read(plan))
        self.write_plan()

    def use_plan(self, plan: Plan) -> None:
        """Go on by another plan of the same data."""
        self.training.use(plan, self.training.corpora, self.training.held_out)
        self.write_plan()

    def go_to(self, name: str) -> None:
        """Begin the stage called `name`, unless it is at work. Raises `ValueError` for a name that the plan lacks."""
        at, plan = self.training.position, self.training.plan
        number = plan.stages.index(plan.stage(name))
        if at.stage != number:
            self.training.jump(Position(number, at.step, at.seconds, at.read))

    def finish_stage(self) -> None:
        """Write the model back into the folder, and go on to the next stage."""
        self.write_back()
        self.run.finish_stage()
        if self.training.accelerator.is_main_process:
            write_history(self.run_folder, read_log(self.run_folder))

    def write_back(self) -> None:
        """Write adapter or weights and gates into the folder, each whole or not at all. Raises `OSError`."""
        training, path = self.training, self.folder.path
        if not training.accelerator.is_main_process:
            return
        model = training.student.model
        if training.plan.adapter is None:
            whole_folder(path / HEALED, model.save_pretrained)
        else:  # "auto" would ask the hub whether the embeddings are those of the base
            whole_folder(path / ADAPTER, partial(model.save_pretrained, save_embedding_layers=False))
        gates = {at: layer.gates for at, layer in training.student.layers.items()}
        about = {"gates": "healed", "run": self.run_folder.name, "read": training.position.read}
        write_gates(path / GATES, find_decoder(model), gates, about)


def newest_plan(folder: Folder) -> tuple[Path, Plan]:
    """The folder's newest run that has a plan. Raises `ValueError` where there is none."""
    runs = [run for run in folder.runs if (run / PLAN).is_file()]
    if not runs:
        raise ValueError(f"folder={str(folder.path)!r} has no plan in runs/: `proteus convert` writes one")
    return runs[-1], Plan.read(runs[-1] / PLAN)


def whole_folder(path: Path, save) -> None:
    """Let `save` fill a new folder, which then takes the place of `path`."""
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    old = part.with_suffix(".old")
    try:
        save(str(part))
        os.chmod(part, 0o755)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def gate_entropy(layers: dict[int, ProteusLayer]) -> float:
    """Nats, of the share of keys that each gate of a group lures, mean of groups and layers."""
    usage = [layer.gates.usage / layer.gates.usage.sum(-1, keepdim=True).clamp(min=1e-9) for layer in layers.values()]
    return float(torch.stack([torch.special.entr(share).sum(-1).mean() for share in usage]).mean())
