"""A tiny Llama that is healed on texts of a small language."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny_llama import build

from proteus_playground.attention.adapter import ProteusLayer
from proteus_playground.attention.calibration import new_gates
from proteus_playground.attention.settings import Settings, config_for
from proteus_playground.hf.adapters import add_adapters
from proteus_playground.hf.healing.corpus import Corpus
from proteus_playground.hf.healing.plan import Adapter, Budgets, Data, Losses, Plan, Rates, Stage
from proteus_playground.hf.healing.run import Run
from proteus_playground.hf.healing.student import Student
from proteus_playground.hf.healing.training import Training, make_accelerator
from proteus_playground.hf.patch import capture, layer_shape

T, WORDS = 64, 20
B = Stage("B", 8 * 128, (T,), Budgets(keys_low=16, keys_high=4), Rates(weights=3e-3, embeddings_and_norms=3e-4))
A = Stage("A", 4 * 128, (T,), losses=Losses(kl=0.0, match=0.0, gates=1.0), trains=("prototypes",), follow=False)
PLAN = Plan((B,), batch_tokens=2 * T, pass_tokens=T, adapter=Adapter(rank=4, mlp_rank=2, dropout=0.1),
            data=Data(held_out_rows=2))  # fmt: skip
SHORT = replace(PLAN, stages=(replace(B, tokens=3 * 128),))


def corpus(seed: int, documents: tuple[int, ...] = (1500, 40, 500), name: str = "") -> Corpus:
    """Documents of a language in which some words follow others."""
    rng, after = np.random.default_rng(seed), np.random.default_rng(9).dirichlet(np.full(WORDS, 0.1), size=WORDS)
    ids = [0]
    for _ in range(sum(documents) - 1):
        ids.append(rng.choice(WORDS, p=after[ids[-1]]))
    ends = np.cumsum(documents)
    return Corpus(name or f"language {seed}", np.array(ids, np.int32), np.ones(len(ids), bool), ends)


def training(plan: Plan = PLAN, model=None) -> Training:
    """A fresh one, by default of a Llama of two layers. It is trained whole where the plan has no adapter."""
    model = (build(num_hidden_layers=2)[0] if model is None else model).requires_grad_(False)
    text, layers = corpus(1), {}
    for at, seen in capture(model, torch.from_numpy(text.ids[:256]).long(), keys_only=True).items():
        shape = layer_shape(model, at)
        layers[at] = ProteusLayer(
            new_gates(shape, 8).fit(seen.k.float()), config_for(Settings(gates=8, probes=4), shape)
        )
    teacher = copy.deepcopy(model) if plan.adapter is None else None
    model = model if plan.adapter is None else add_adapters(model, plan.adapter, plan.seed)
    return Training(Student(model, layers, teacher), plan, [text], [corpus(2)], make_accelerator(plan.precision, "cpu"))


def run(plan: Plan, folder: Path) -> Run:
    return Run(training(plan), folder, {"plan": plan.to_dict()})


def finish(run: Run, **options) -> None:
    """All that is left of a run."""
    while run.training.stage is not None:
        for _ in run.steps(**options):
            pass
        run.finish_stage()


def one_of_two(rank: int, port: int, folder: Path) -> None:
    """Run by each of two processes, which heal one model together."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    finish(run(SHORT, folder))
    torch.distributed.destroy_process_group()
