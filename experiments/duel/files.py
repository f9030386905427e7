"""A duel on disk: its settings, its scores, and its report as CSV and JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor

from ...common.files import whole, write_json
from ...common.machine import environment
from ...common.processes import place
from ...common.runs import RunFolder, as_json, refuse_other
from ...common.texts import Text
from ...lm.training import Step, read_log, train
from ...lm.training.data import Codec, TextBatches
from ...lm.training.distributed import total
from .settings import ARMS, DuelSettings, split, start

SETTINGS, SCORES, ROWS, REPORT = "settings.json", "scores.jsonl", "duel.csv", "duel.json"
TIMED_STEPS, WARM_UP_STEPS = 9, 4  # steps that an arm is timed for, and how many of them do not count
TRAINING_SHARE = 0.8  # share of the time that training may take; the rest is for held-out text and samples


@dataclass(frozen=True)
class Score:
    """Loss and statistics of one arm on the held-out text at one alpha."""

    arm: str
    step: int
    alpha: float
    loss: float  # nats per token
    perplexity: float  # per token
    heads_awake: float  # see `training.look.Look`
    gate_entropy: float
    dead_gates: int
    density: float
    sample: str  # the prompt and the continuation that the model wrote


def claim(
    out: Path, settings: DuelSettings, text: Text, codec: Codec, tokens: Tensor, device: torch.device, precision: str
) -> DuelSettings:
    """Write the duel's settings into `out`, or check that they are there. Returns them with the steps to be taken.

    Raises `ValueError` where `out` holds another duel.
    """
    asked = as_json(asdict(settings)) | {
        "text_from": text.source, "text_hash": sha256(text.body.encode()).hexdigest()[:16],
        "codec": type(codec).__name__, "vocab_size": codec.vocab_size,
    }  # fmt: skip
    folder = run_folder(out)
    there = folder.settings()
    total([0.0], device)  # no process writes before every process has looked
    if there is not None:
        kept = there.get("asked", {})
        refuse_other(f"out={str(out)!r}", asked, {name: kept.get(name) for name in asked}, "duel")
        return replace(settings, steps=there["steps"])
    if settings.minutes is not None:
        settings = replace(settings, steps=_fitting(settings, split(tokens)[0], codec.vocab_size, device, precision))
    if place()[0] == 0:
        folder.write_settings({"asked": asked, "steps": settings.steps})
    return settings


def run_folder(out: str | Path) -> RunFolder:
    return RunFolder(Path(out), SETTINGS, SCORES, (ROWS, REPORT))


def _fitting(settings: DuelSettings, tokens: Tensor, vocab_size: int, device: torch.device, precision: str) -> int:
    """Steps that fit in the minutes, estimated from a few steps of each arm on models that are then thrown away."""
    seconds = 0.0
    for arm in ARMS:
        recipe, batches = settings.recipe(arm), TextBatches(tokens, vocab_size, settings.seed)
        recipe = replace(recipe, stages=(replace(recipe.stages[-1], steps=TIMED_STEPS),))
        model = start(settings, arm, vocab_size)
        speeds = [step.tokens_per_second for step in train(model, batches, recipe, device=device, precision=precision)]
        speed = median(speeds[WARM_UP_STEPS:-1])  # the last step also pays for the statistics
        seconds += settings.tokens * place()[1] / speed
    seconds = total([seconds], device)[0] / place()[1]
    return max(min(settings.steps, 20), min(settings.steps, int(60 * settings.minutes * TRAINING_SHARE / seconds)))


def add_scores(out: Path, scores: Iterable[Score]) -> None:
    run_folder(out).append(map(asdict, scores))


def read_scores(out: str | Path) -> list[Score]:
    """All scores of a folder's duel, one per arm, step and alpha. Raises `ValueError` where a line is no score."""
    try:
        found = {(line["arm"], line["step"], line["alpha"]): Score(**line) for line in run_folder(out).rows()}
    except (ValueError, TypeError, KeyError) as err:
        raise ValueError(f"out={str(out)!r}: its {SCORES} is not of a duel ({err!r})") from err
    return list(found.values())


def write_report(out: str | Path, device: torch.device) -> dict:
    """Write `duel.csv`, a row per step and arm, and `duel.json`, which is returned: settings, machine, scores."""
    out = Path(out)
    logs = {arm: read_log(out / arm) for arm in ARMS}
    with whole(out / ROWS) as part, open(part, "w", encoding="utf-8", newline="") as file:
        names = ["arm", *(field.name for field in fields(Step))]
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows({"arm": arm, **asdict(step)} for arm, log in logs.items() for step in log)
    report = {
        **run_folder(out).settings(),
        "environment": environment(device),
        "arms": {arm: _summary(log) for arm, log in logs.items() if log},
        "scores": [asdict(score) for score in read_scores(out)],
    }
    write_json(out / REPORT, report)
    return report


def _summary(log: list[Step]) -> dict:
    """Steps, speed, memory and final loss of an arm's training."""
    last = log[-max(1, len(log) // 20) :]
    return {
        "steps": log[-1].step, "tokens": log[-1].tokens, "seconds": log[-1].seconds,
        "tokens_per_second": median(step.tokens_per_second for step in log),
        "memory_bytes": max(step.memory_bytes or 0 for step in log),
        "loss_of_last_steps": mean(step.loss for step in last),
    }  # fmt: skip
