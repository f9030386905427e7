"""A study with made-up figures and a model of random weights: what an evidence panel needs, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from proteus_playground.experiments.evidence.arms import ARMS, calibrate
from proteus_playground.experiments.evidence.study import OURS, Cell, CellResult, save

from proteus_playground.lm.model import ProteusLM
from proteus_playground.lm.recall.recipe import Scale
from proteus_playground.lm.recall.task import Words
from proteus_playground.lm.recall.tasks import TASKS

WORDS = Words(64, 32, 16)
SCALE = Scale(width=32, heads=2, gates=4, words=WORDS, tasks=("mqar", "copying"))
CHANGED = ("no notes", "k-means prototypes")


def rows(seeds: int = 3) -> list[CellResult]:
    found = []
    for seed in range(seeds):
        for task in SCALE.tasks:
            for length in (64, 128, 256):
                L = SCALE.shortlist(length, 8)
                for at, arm in enumerate(ARMS):
                    share = length if arm.startswith("dense") else L
                    right = 1000 - 60 * at - length // 2 + 9 * seed
                    cell = Cell(task, length, 8, arm, share, seed)
                    found.append(CellResult(cell, right, 1000, float(share), 1.0, "made up"))
                found += [CellResult(Cell(task, length, 8, OURS, L, seed, change), 700, 1000, float(L), 1.0, "made up")
                          for change in CHANGED]  # fmt: skip
    return found


def write(folder: Path, name: str = "evidence_made_up.json") -> Path:
    save(folder / name, SCALE, rows(), "cpu")
    return folder


def recall() -> tuple[ProteusLM, Words]:
    """Stands in for `load_shipped("recall-mini")`."""
    torch.manual_seed(0)
    model = ProteusLM(SCALE.model_config()).eval()
    ids = TASKS["mqar"](8, words=WORDS).batch(0, 4, 128).ids
    return calibrate(model, ids), WORDS
