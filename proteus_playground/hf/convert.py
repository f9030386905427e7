"""Gives a model the slider: a folder with settings, prototypes, a plan for healing, and a reference to its weights.

No weight is changed. The folder is written under a hidden name and renamed at the end, so a conversion that is killed
leaves nothing that looks like one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from ..attention import Gates
from ..attention.calibration import Calibration
from ..attention.settings import Settings, default_settings
from ..common.files import cache_dir, check_folder, new_folder, write_json, write_text
from ..common.texts import calibration_text
from . import models, opening
from .fetch import WEIGHTS, sha256_of
from .healing.plan import Plan, sized
from .healing.presets import PRESETS, preset
from .own.folder import BASELINE, CONFIG, GATES, PLAN, RUNS, Folder, SliderModel, open_folder, read_folder
from .own.stanza import Base, Stanza, is_own, read_config, write_stanza
from .patch import find_decoder
from .shipped_gates import write_gates
from .source import ModelSource
from .weights import check_disk, size, weights_of

README = "README.md"
CALIBRATION_TOKENS = 4096  # read of the calibration text where no gates come with the package
PASSES_OF_TRAINING = 6  # a step of healing costs as much as so many dense passes: teacher, student, gradient, recompute
TIMED_TOKENS = 512
Say = Callable[[str], None]
Measure = Callable[[ModelSource], dict]  # what the model can do before healing, as plain values


@dataclass(frozen=True)
class Parts:
    """What a conversion makes before it writes anything."""

    source: ModelSource
    stanza: Stanza
    gates: dict[int, Gates]
    gates_from: str


def convert(
    model: str,
    out: str | Path,
    *,
    kind: str = "try",
    copy: bool = False,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    measure: Measure | None = None,
    say: Say = print,
) -> Folder:
    """Make the folder `out` of the model called `model`; returns what it holds.

    kind: the preset of the plan. copy: put a copy of the weights into the folder, instead of a reference to them.
    measure: what is kept as `baseline.json`. say: called with each sentence about what is done. The same call again
    changes nothing; with another preset it adds a plan. Raises `ValueError` where `out` is something else, was made of
    another model, or the model has changed since; `OSError`, `MemoryError` as `models.load`.
    """
    if kind not in PRESETS:
        raise ValueError(f"preset={kind!r}: must be one of {', '.join(PRESETS)}")
    check_folder(out, "out")
    out = Path(os.path.realpath(Path(out).expanduser()))
    place = models.find(model)
    if place.mine and is_own(place.home):
        raise ValueError(f"model={model!r} is a converted folder already: heal it, or convert the model that it names")
    if place.base:
        raise ValueError(f"model={model!r} has an adapter already: convert {place.base!r}, the model under it")
    home = models.place_of(model)
    named = place.known or model in models.SHIPPED  # found by its name on every machine
    base = Base(model if named else str(place.gguf or place.home), hashes(home), copy)
    if is_own(out):
        return _again(read_folder(out), base, kind, say)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out={str(out)!r} is a folder with other files: must be a new or an empty one")
    weights = sum((home / name).stat().st_size for name in base.files if name != CONFIG)
    if copy:
        check_disk(weights, out.parent, f"a copy of {model}")
    say(f"{model}: {read_config(home / CONFIG).get('model_type')}, {weights_of(home)}, in {home}")
    say(f"No weight is changed; the weights are {f'copied, {size(weights)}' if copy else 'read from there'}.")
    made = _measured_parts(model, base, device, dtype)
    say(
        f"{len(made.gates)} of {made.source.n_layers} layers get the slider, with {made.stanza.settings.gates} gates "
        f"per KV group, {made.gates_from}; L is {made.stanza.settings.shortlist}."
    )
    speed = _tokens_per_second(made.source)
    slider = SliderModel(made.source.model, made.source.tokenizer, made.stanza, made.gates, made.source.name)
    baseline = {"dense_tokens_per_second": speed} | ({} if measure is None else measure(slider.source()))
    with new_folder(out, "out") as part:
        _write(part, home, made, baseline, model)
        sentence = add_plan(part, kind, made.source, speed)
    say(f"The plan {kind!r}: {sentence}.")
    say(f"{out} is ready. {README} in it lists the next commands.")
    return read_folder(out)


def hashes(home: Path) -> dict[str, str]:
    """sha256 of a model's config and of each of its weight files. Raises `ValueError` where there are none."""
    files = sorted(home.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model={str(home)!r} has no {WEIGHTS}: open it once with transformers and save it again")
    return {file.name: sha256_of(file) for file in (home / CONFIG, *files)}


def _again(folder: Folder, base: Base, kind: str, say: Say) -> Folder:
    """The same command once more: nothing, or another plan."""
    found = folder.stanza.base
    if found.model != base.model or found.copied != base.copied:
        how = f"{found.model!r}{', with a copy of its weights' if found.copied else ', without a copy'}"
        raise ValueError(f"out={str(folder.path)!r} was converted from {how}: must be a new folder")
    if found.files != base.files:
        changed = next(n for n in sorted({*base.files, *found.files}) if base.files.get(n) != found.files.get(n))
        raise ValueError(
            f"model={base.model!r}: {changed} has changed since {str(folder.path)!r} was converted from it; convert it "
            "into a new folder"
        )
    if any(run.name.endswith(f"-{kind}") for run in folder.runs):
        say(f"{folder.path} was converted from {base.model} before, with the plan {kind!r}: nothing to do.")
        return folder
    speed = read_config(folder.path / BASELINE).get("dense_tokens_per_second", 1.0)
    sentence = add_plan(folder.path, kind, open_folder(folder.path).source(), speed)
    say(f"{folder.path} was converted before. The plan {kind!r} was added: {sentence}.")
    return read_folder(folder.path)


def _measured_parts(model: str, base: Base, device: str, dtype: torch.dtype | None) -> Parts:
    """Settings and gates: those that come with the package, or fitted to the calibration text."""
    source = opening.load_source(model, device, dtype)
    counts = {count for _, count in source.own_gates}
    if len(counts) == 1 and {layer for layer, _ in source.own_gates} == set(source.full_layers):
        settings, made_by = Settings(gates=counts.pop()), "which come with the package"
        gates = {layer: its for (layer, _), its in source.own_gates.items()}
    else:
        text = calibration_text("")
        tokens = min(CALIBRATION_TOKENS, len(source.encode(text.body)), source.context or CALIBRATION_TOKENS)
        settings = default_settings(tokens)
        fitted = Calibration(source, text, tokens, cache_dir() / "gates")
        gates = {layer: fitted.gates(layer, settings.gates) for layer in source.full_layers}
        made_by = f"fitted to {tokens:,} tokens of {text.name!r}"
    return Parts(source, Stanza(settings, source.full_layers, base), gates, made_by)


def _tokens_per_second(source: ModelSource) -> float:
    """Of a dense pass; the second of two, since the first one prepares."""
    tokens = min(TIMED_TOKENS, source.context or TIMED_TOKENS)
    ids = torch.arange(tokens) % source.vocabulary
    source.nll(ids[: min(64, tokens)], 1, {})
    began = perf_counter()
    source.nll(ids, 1, {})
    return tokens / (perf_counter() - began)


def _write(part: Path, home: Path, made: Parts, baseline: dict, model: str) -> None:
    copied = list(made.stanza.base.files) if made.stanza.base.copied else []
    for name in {CONFIG, "generation_config.json", f"{WEIGHTS}.index.json", *copied}:
        if (home / name).is_file() and (made.stanza.base.copied or not name.endswith(".index.json")):
            shutil.copyfile(home / name, part / name)
    made.source.tokenizer.save_pretrained(part)
    write_gates(part / GATES, find_decoder(made.source.model), made.gates, {"gates": made.gates_from})
    write_json(part / BASELINE, baseline)
    write_text(part / README, _readme(model, made, baseline))
    write_stanza(part / CONFIG, made.stanza)


def add_plan(folder: Path, kind: str, source: ModelSource, speed: float) -> str:
    """Write the plan called `kind` as a new run, sized to a machine of `speed` dense tokens a second; says how long."""
    plan = fitted_plan(preset(kind), source)
    fit = sized(plan, speed / PASSES_OF_TRAINING)
    number = 1 + len(list((folder / RUNS).glob("*-*")))
    fit.plan.write(folder / RUNS / f"{number:03d}-{kind}" / PLAN)
    return fit.sentence


def fitted_plan(plan: Plan, source: ModelSource) -> Plan:
    """`plan` with lengths that the model was trained for, and with adapters for the matrices that it has."""
    longest = source.context or max(length for stage in plan.stages for length in stage.lengths)
    stages = tuple(
        replace(stage, lengths=tuple(dict.fromkeys(min(length, longest) for length in stage.lengths)))
        for stage in plan.stages
    )
    decoder = find_decoder(source.model)
    linear = {name.rpartition(".")[2] for name, part in decoder.named_modules() if isinstance(part, nn.Linear)}
    adapter = plan.adapter
    if adapter is not None and not set(adapter.targets) <= linear:
        adapter = replace(adapter, targets=tuple(sorted(linear)))
    return replace(plan, stages=stages, adapter=adapter)


def _readme(model: str, made: Parts, baseline: dict) -> str:
    settings, base = made.stanza.settings, made.stanza.base
    copied = ", and copied into this folder" if base.copied else ""
    lines = "".join(f"- {line}\n" for line in baseline.get("sentences", ()))
    return f"""# {made.source.name} with a slider

Made by `proteus convert {model}`. The weights are those of {base.model}, unchanged{copied};
`config.json` names the sha256 of each file under `proteus_attention`. Flux alpha is {settings.flux_alpha:g}, L is
{settings.shortlist}, with {settings.gates} gates per KV group.

In this folder, next:

```bash
proteus heal .                               # train it by the newest plan in runs/, so that the slider costs less
proteus quality . --quick                    # what the slider costs, compared with other selectors
proteus export . --merged --out ../merged    # one checkpoint for transformers
```

In a notebook, `playground(model="PATH OF THIS FOLDER")` opens it.
{f"{chr(10)}Measured when it was converted:{chr(10)}{chr(10)}{lines}" if lines else ""}"""
