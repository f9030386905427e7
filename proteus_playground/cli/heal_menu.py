"""The menu of `proteus heal` between two stages: numbered lines, answered by a number."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from ..common.runs import flat
from ..experiments.quality.baseline import baseline
from ..hf.healing.history import summary
from ..hf.healing.plan import Plan, plan_of
from ..hf.healing.run import read_log
from ..hf.healing.session import Session
from ..hf.source import ModelSource

Say = Callable[[str], object]
Prompt = Callable[[str], str]


def ask(session: Session, say: Say, prompt: Prompt, only: str = "") -> bool:
    """Ask until the answer is to go on (True) or to stop (False). only: the stage after which the command ends."""
    while True:
        training = session.training
        following = training.stage if not only or (training.stage and training.stage.name == only) else None
        if following is None:
            say("No stage is left.")
            return False
        choices = {
            f"go on with stage {following.name}": None,
            "show metrics": show_metrics,
            "take another corpus": change_corpus,
            f"change settings of stage {following.name}": change_settings,
            "measure held-out text and questions": examine,
            "stop": None,
        }
        if following.optional:
            choices[f"skip stage {following.name}"] = skip
        for number, words in enumerate(choices, 1):
            say(f"  {number}  {words}")
        answer = prompt(f"Stage {following.name} is next. Number").strip()
        if not answer.isdecimal() or not 1 <= int(answer) <= len(choices):
            say(f"{answer!r}: must be a number from 1 to {len(choices)}")
            continue
        words = list(choices)[int(answer) - 1]
        if choices[words] is None:
            return words != "stop"
        try:
            choices[words](session, say, prompt)
        except (ValueError, TypeError, OSError) as err:
            say(f"error: {err}")


def show_metrics(session: Session, say: Say, prompt: Prompt) -> None:
    say(summary(read_log(session.run_folder)))


def change_corpus(session: Session, say: Say, prompt: Prompt) -> None:
    """Sources are separated by commas."""
    now = ", ".join(session.training.plan.data.sources)
    sources = [
        part.strip()
        for part in prompt(f"Texts, files or hub:owner/dataset, with commas between them (now {now})").split(",")
    ]
    session.use_data([source for source in sources if source])
    tokens = sum(len(corpus.ids) for corpus in session.training.corpora)
    say(f"The text to train on now has {tokens:,} tokens.")


def change_settings(session: Session, say: Say, prompt: Prompt) -> None:
    """One setting at a time, such as rates.weights=1e-4; an empty answer ends."""
    while True:
        training = session.training
        plan, number = training.plan.to_dict(), training.position.stage
        stage = plan["stages"][number]
        say("\n".join(f"  {name}={json.dumps(value)}" for name, value in flat(stage).items()))
        answer = prompt("NAME=VALUE, or nothing to go back").strip()
        if not answer:
            return
        name, _, value = answer.partition("=")
        try:
            _set(stage, name.strip(), json.loads(value))
            session.use_plan(_same_seed(plan_of(plan), training.plan))
        except (KeyError, ValueError, TypeError) as err:
            say(f"{answer!r}: must be a line above, with another value ({err})")


def _same_seed(plan: Plan, before: Plan) -> Plan:
    return replace(plan, seed=before.seed, adapter=before.adapter)


def _set(values: dict, name: str, value) -> None:
    """Change a nested value that is there already; `KeyError` where it is not."""
    *heads, last = name.split(".")
    for head in heads:
        values = values[head]
    if last not in values or isinstance(values[last], dict):
        raise KeyError(name)
    values[last] = value


def examine(session: Session, say: Say, prompt: Prompt) -> None:
    measured = session.training.measure()
    say(f"Held-out text, nats per token: base {measured.base:.4f}, own dense pass {measured.dense:.4f}")
    for share, gap in measured.gaps.items():
        say(f"  gap {gap:.4f} with 1/{share} of the keys ({measured.reads[share]:.0f} reads per query)")
    student = session.training.student
    source = ModelSource(student.model, session.tokenizer, session.folder.path.name)
    source.own_gates = {(at, layer.gates.gates_per_group): layer.gates for at, layer in student.layers.items()}
    source.config = next(iter(student.layers.values())).config
    for line in baseline(source)["sentences"]:  # the questions of the folder's baseline.json
        say(f"  {line}")


def skip(session: Session, say: Say, prompt: Prompt) -> None:
    name = session.training.stage.name
    session.run.finish_stage()
    say(f"Stage {name} is skipped.")
