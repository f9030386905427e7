"""`proteus bench healing`: train an adapter by a plan on text files, and measure the gap before and after.

Held-out files are measured before and after: the untouched base, the trained model's own dense pass, and its sparse
pass at several L. The run goes on where it was stopped or killed. `smollm2_slider.json` is the plan of the adapter that
comes with the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from time import monotonic
from typing import Annotated

import typer

from ...attention.adapter import ProteusLayer
from ...attention.settings import Settings, config_for
from ...common.files import write_json
from ...common.machine import environment, markdown
from ...common.options import Device, Folder, parse_lengths, pick_device
from ...common.processes import place
from ...common.progress import resumable
from ...hf.adapters import add_adapters, read_adapter, write_adapter
from ...hf.healing.corpus import Corpus, read_corpus
from ...hf.healing.plan import Plan, sized
from ...hf.healing.run import Run
from ...hf.healing.student import Student
from ...hf.healing.training import Step, Training, make_accelerator
from ...hf.opening import load_source
from ..quality.choice import fit_gates, keys_of

SLIDER = "smollm2_slider.json"
PLAN, BEFORE, REPORT, ADAPTER = "plan.json", "before.json", "report.json", "adapter.safetensors"
CALIBRATION_TOKENS = 16_384  # of each text, for a model whose gates do not come with the package


def healing_command(
    text: Annotated[list[str], typer.Option(help="Text file to train on. May be repeated.")],
    held_out: Annotated[list[str], typer.Option(help="Text file to measure on, never trained on. May be repeated.")],
    out: Folder,
    model: Annotated[str, typer.Option(help="A pulled model.")] = "smollm2",
    plan: Annotated[str, typer.Option(help="JSON file with a plan; by default that of smollm2-slider.")] = "",
    start: Annotated[str, typer.Option(help="File of an adapter to train further; by default a new one.")] = "",
    minutes: Annotated[
        float | None, typer.Option(help="Shorten the plan so that it takes at most about so many minutes.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds; the same command goes on.")] = None,
    lengths: Annotated[str, typer.Option(help="Token counts to measure at: 2k,8k.")] = "2k,8k",
    rows: Annotated[int, typer.Option(help="Most rows of each held-out text to measure.", min=1)] = 8,
    save_seconds: Annotated[float, typer.Option(help="Seconds between two saves of the state.", min=1)] = 60.0,
    device: Device = "cpu",
) -> None:
    """Train an adapter by a plan on text files, and measure the gap before and after on others."""
    if both := sorted(set(text) & set(held_out)):
        raise typer.BadParameter(
            f"{both[0]!r} is given for training and for measuring: must be two texts", param_hint="--text"
        )
    ends, at = monotonic() + (seconds or 1e12), parse_lengths(lengths)
    accelerator = make_accelerator("auto", device)
    chosen = _plan(plan, out, text, held_out, rows)
    training, about, judged = _opened(model, device, text, held_out, chosen, accelerator)
    if start:
        gates = {at: layer.gates for at, layer in training.student.layers.items()}
        read_adapter(start, training.student.model, gates)
        about |= {"start": sha256(Path(start).read_bytes()).hexdigest()}
    say = typer.echo if place()[0] == 0 else lambda line: None
    if not (out / BEFORE).is_file():
        write_json(out / BEFORE, dict(_measured(training, judged, at, say)))
    if not (out / PLAN).is_file():
        fitting = sized(replace(training.plan, minutes=minutes), training.speed())
        training.plan = fitting.plan
        training.plan.write(out / PLAN)
        say(fitting.sentence)
    about |= {"plan": training.plan.to_dict()}
    run = Run(training, out, about)
    with resumable():
        while training.stage is not None:
            for step in run.steps(save_seconds=save_seconds, stop=lambda: monotonic() > ends):
                if step.step % 10 == 0 or step.held_out:
                    say(_line(step))
            run.finish_stage()
        student = training.student
        gates = {at: layer.gates for at, layer in student.layers.items()}
        about = _without_folders(about)
        write_adapter(out / ADAPTER, student.model, gates, about)
        read_adapter(out / ADAPTER, student.model, gates)  # what is measured is what is kept
        after = dict(_measured(training, judged, at, say))
        report = {
            "benchmark": "healing",
            **environment(accelerator.device),
            "dtype": accelerator.mixed_precision,
            **about,
        }
        report |= {"before": json.loads((out / BEFORE).read_text()), "after": json.loads(json.dumps(after))}
        report |= {"megabytes": round((out / ADAPTER).stat().st_size / 1e6, 2), "read": training.position.read}
        report |= {"seconds": round(training.position.seconds, 1)}
        write_json(out / REPORT, report)
        say(table(report))


def _plan(path: str, out: Path, text: Sequence[str], held_out: Sequence[str], rows: int) -> Plan:
    """The plan of the run in the folder, or a new one from a file."""
    if (out / PLAN).is_file():
        return Plan.read(out / PLAN)
    plan = Plan.read(path or str(files(__package__) / SLIDER))
    data = replace(plan.data, sources=tuple(text), held_out=tuple(held_out), held_out_rows=rows)
    return replace(plan, data=data)


def _opened(model: str, device: str, text, held_out, plan: Plan, accelerator):
    """The training, what describes it, and the held-out texts by name."""
    source = load_source(model, str(pick_device(device)))
    tokenizer = source.tokenizer
    own = source.own_gates
    gates = {layer: own.get((layer, Settings.gates)) for layer in source.full_layers}
    if None in gates.values():
        gates = fit_gates(source, keys_of(source, text, CALIBRATION_TOKENS), Settings.gates)
    config = config_for(Settings(), source.shape)
    layers = {layer: ProteusLayer(its, config) for layer, its in gates.items()}
    corpora = [read_corpus(name, tokenizer, plan.data.max_tokens) for name in text]
    judged = {Path(name).stem: read_corpus(name, tokenizer, plan.data.max_tokens) for name in held_out}
    about = {"model": model, "fingerprint": source.fingerprint, "texts": {c.name: _hash(c) for c in corpora}}
    student = Student(add_adapters(source.model, plan.adapter, plan.seed), layers)
    return Training(student, plan, corpora, list(judged.values()), accelerator), about, judged


def _without_folders(about: dict) -> dict:
    """What describes the training, with texts called by their files' names alone."""
    names = {place: [Path(name).name for name in about["plan"]["data"][place]] for place in ("sources", "held_out")}
    plan = about["plan"] | {"data": about["plan"]["data"] | names}
    return about | {"plan": plan, "texts": {Path(name).name: its for name, its in about["texts"].items()}}


def _hash(corpus: Corpus) -> str:
    return sha256(corpus.ids.tobytes()).hexdigest()[:16]


def _measured(training: Training, judged: Mapping[str, Corpus], lengths: Sequence[int], say):
    """(name, figures) of each held-out text at each length that it fills."""
    for name, corpus in judged.items():
        for length in lengths:
            if len(corpus.ids) >= length:
                measured = training.measure([corpus], length)
                say(f"{name} at {length:,}: base {measured.base:.4f}, own {measured.dense:.4f}, {_gaps(measured.gaps)}")
                yield f"{name}@{length}", measured.to_dict()


def _gaps(gaps: Mapping) -> str:
    return "gap " + ", ".join(f"{gap:.4f} at 1/{share}" for share, gap in gaps.items())


def _line(step: Step) -> str:
    line = f"{step.stage} {step.step}: loss {step.loss:.4f}, KL {step.kl:.4f}, match {step.match:.4f}, "
    line += f"{step.read:,} tokens, {step.tokens_per_second:,.0f} tokens/s"
    return line + (f"; held out: {_gaps(step.held_out['gaps'])}" if step.held_out else "")


def table(report: dict) -> str:
    """The report as Markdown: gaps of each held-out text before and after."""
    rows = []
    for name, after in report["after"].items():
        before, moved = report["before"][name], after["dense"] - after["base"]
        for share, gap in after["gaps"].items():
            figures = f"{after['reads'][share]:.0f}", f"{before['gaps'][share]:.3f}", f"{gap:.3f}", f"{moved:+.3f}"
            rows.append([name, f"1/{share}", *figures])
    header = ["text@tokens", "L", "reads", "gap before", "gap after", "dense less base"]
    about = (
        f"{report['device']}, torch {report['torch']}, {report['dtype']}; {report['model']}, {report['read']:,} tokens "
        f"in {report['seconds']:.0f} s, adapter {report['megabytes']} MB; gap to its own dense pass, nats per token"
    )
    return f"{about}\n\n{markdown(header, rows)}"


if __name__ == "__main__":
    typer.run(healing_command)
