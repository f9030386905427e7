"""A duel on disk: what it is, its scores, and its report as CSV and JSON."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor

from ...common.files import append_lines, read_lines, whole, write_json
from ...common.machine import environment
from ...common.processes import place
from ...common.texts import Text
from ...lm.training import Step, read_log, train
from ...lm.training.distributed import total
from ...lm.training.data import Codec, TextBatches
from .settings import ARMS, Settings, split, start

SETTINGS, SCORES, ROWS, REPORT = "settings.json", "scores.jsonl", "duel.csv", "duel.json"
PROBE, WARM = 9, 4  # steps that an arm is timed for, and how many of them do not count
RESERVE = 0.8  # share of the time that training may take; the rest is for held-out text and samples


@dataclass(frozen=True)
class Score:
    """How an arm does on the held-out text at one alpha."""

    arm: str
    step: int
    alpha: float
    loss: float  # nats per token
    perplexity: float  # per token
    heads_awake: float  # see `training.look.Look`
    gate_entropy: float
    dead_gates: int
    density: float
    sample: str  # the prompt, and what the model wrote after it


def claim(
    out: Path, settings: Settings, text: Text, codec: Codec, tokens: Tensor, device: torch.device, precision: str
) -> Settings:
    """Write down what this duel is, or see that `out` holds the same. The settings with the steps that it will take.

    ValueError where `out` holds another duel.
    """
    asked = {**asdict(settings), "text_from": text.source, "text_hash": sha256(text.body.encode()).hexdigest()[:16],
             "codec": type(codec).__name__, "vocab_size": codec.vocab_size}  # fmt: skip
    there = json.loads((out / SETTINGS).read_text(encoding="utf-8")) if (out / SETTINGS).is_file() else None
    total([0.0], device)  # every process has looked before one writes
    if there is not None:
        other = sorted(name for name in asked if there["asked"].get(name) != asked[name])
        if other:
            raise ValueError(
                f"out={str(out)!r} holds a duel with other settings ({', '.join(other)}): allowed is an empty "
                "folder, or the same settings to go on"
            )
        return replace(settings, steps=there["steps"])
    if settings.minutes is not None:
        settings = replace(settings, steps=_fitting(settings, split(tokens)[0], codec.vocab_size, device, precision))
    if place()[0] == 0:
        write_json(out / SETTINGS, {"asked": asked, "steps": settings.steps})
    return settings


def _fitting(settings: Settings, tokens: Tensor, vocab_size: int, device: torch.device, precision: str) -> int:
    """Steps that fit in the minutes, by the time of a few of each arm's on models thrown away after."""
    seconds = 0.0
    for arm in ARMS:
        recipe, batches = settings.recipe(arm), TextBatches(tokens, vocab_size, settings.seed)
        recipe = replace(recipe, stages=(replace(recipe.stages[-1], steps=PROBE),))
        model = start(settings, arm, vocab_size)
        speeds = [step.tokens_per_second for step in train(model, batches, recipe, device=device, precision=precision)]
        seconds += settings.tokens * place()[1] / median(speeds[WARM:-1])  # the first are slow, the last is measured
    seconds = total([seconds], device)[0] / place()[1]
    return max(min(settings.steps, 20), min(settings.steps, int(60 * settings.minutes * RESERVE / seconds)))


def add_scores(out: Path, scores: Iterable[Score]) -> None:
    append_lines(out / SCORES, map(asdict, scores))


def read_scores(out: str | Path) -> list[Score]:
    """The scores that a folder's duel has, each once."""
    found = {(line["arm"], line["step"], line["alpha"]): Score(**line) for line in read_lines(Path(out) / SCORES)}
    return list(found.values())


def write_report(out: str | Path, device: torch.device) -> dict:
    """`duel.csv`, a row per step and arm, and `duel.json`, which is returned: settings, machine, arms, scores."""
    out = Path(out)
    logs = {arm: read_log(out / arm) for arm in ARMS}
    with whole(out / ROWS) as part, open(part, "w", encoding="utf-8", newline="") as file:
        names = ["arm", *(field.name for field in fields(Step))]
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows({"arm": arm, **asdict(step)} for arm, log in logs.items() for step in log)
    report = {
        **json.loads((out / SETTINGS).read_text(encoding="utf-8")),
        "environment": environment(device),
        "arms": {arm: _summary(log) for arm, log in logs.items() if log},
        "scores": [asdict(score) for score in read_scores(out)],
    }
    write_json(out / REPORT, report)
    return report


def _summary(log: list[Step]) -> dict:
    """An arm's training in a few figures."""
    last = log[-max(1, len(log) // 20) :]
    return {
        "steps": log[-1].step,
        "tokens": log[-1].tokens,
        "seconds": log[-1].seconds,
        "tokens_per_second": median(step.tokens_per_second for step in log),
        "memory_bytes": max(step.memory_bytes or 0 for step in log),
        "loss_of_last_steps": mean(step.loss for step in last),
    }
