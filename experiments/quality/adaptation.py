"""`proteus bench adaptation`: what it brings to fit prototypes to the text that is read, and on which text they depend.

The gap is that of `bench choice`: the second half of a passage, sparse less dense. Prototypes that follow the text see
the first half of the passage alone, as they would see a prompt: no later key moves them, so a longer text changes no
earlier row.

Axes: `T` tokens, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from ...attention import Gates
from ...attention.calibration import SEED
from ...common.machine import environment
from ...common.options import Device, Out, pick_device
from ...common.texts import load_text
from ...hf.models import DEFAULT
from ...hf.opening import load_source
from ...hf.source import ModelSource
from ..speed.measure import measured_on, publish
from .choice import BASE, PASS_TOKENS, Choice, config_of, fit_gates, gap, gap_table, keys_of, passages

FOLLOWED = (1, 4, 16)  # times that prototypes are moved to the keys of the first half, each a fifth of the way
SHIPPED, OWN = "several kinds of text (the package's)", "the first tenth of the same text"


def followed(gates: Mapping[int, Gates], keys: Mapping[int, Tensor], times: int) -> dict[int, Gates]:
    """Copies of gates, moved `times` times to keys `(N, G, d)` of each layer, as training moves them."""
    moved = {layer: copy.deepcopy(its) for layer, its in gates.items()}
    for layer, its in moved.items():
        seen = keys[layer].to(its.prototypes.device)[None]
        for _ in range(times):
            its.observe(seen, torch.ones(seen.shape[:2], dtype=torch.bool, device=seen.device))
            its.fold()
    return moved


def prompt_keys(source: ModelSource, ids: Tensor) -> dict[int, Tensor]:
    """Keys of the first half of a passage `(T,)`, un-rotated, `(T / 2, G, d)` by layer."""
    return {layer: seen.k.float() for layer, seen in source.capture(ids[: len(ids) // 2], keys_only=True).items()}


def own_keys(source: ModelSource, text: str, tokens: int) -> dict[int, Tensor]:
    """Keys of at most `tokens` tokens of a text's first tenth, where no passage lies."""
    ids = source.ids(source.encode(load_text(text).body))
    parts: dict[int, list[Tensor]] = {}
    for part in ids[: len(ids) // 10][:tokens].split(PASS_TOKENS):
        for layer, captured in source.capture(part, keys_only=True).items():
            parts.setdefault(layer, []).append(captured.k)
    return {layer: torch.cat(each) for layer, each in parts.items()}


def measure_text(
    source: ModelSource, text: str, its: Sequence[Tensor], shortlist: int, fitted: Mapping[str, dict], tokens: int
) -> Iterator[dict]:
    """One row per kind of prototypes. fitted: kinds that do not depend on the passage, by name."""
    config = config_of(source, shortlist, Choice("base", BASE))
    dense = [source.nll(ids, len(ids) // 2, {}) for ids in its]
    kinds = dict(fitted) | {OWN: fit_gates(source, own_keys(source, text, tokens), config.gates_per_group)}

    def row(name: str, gates_of) -> dict:
        found = [gap(source, ids, base, gates_of(ids), config) for ids, base in zip(its, dense, strict=True)]
        gaps, reads = zip(*found, strict=True)
        return {"prototypes": name, "text": text, "gaps": gaps, "reads": fmean(reads)}

    for name, gates in kinds.items():
        yield row(name, lambda ids, gates=gates: gates)
    start = fitted[SHIPPED] if SHIPPED in fitted else next(iter(fitted.values()))
    for times in FOLLOWED:
        yield row(
            f"moved {times} times to the first half",
            lambda ids, times=times: followed(start, prompt_keys(source, ids), times),
        )


def adaptation_command(
    text: Annotated[list[str], typer.Option(help="Text to judge by: a file or a named text. May be repeated.")],
    calibrate: Annotated[list[str], typer.Option(help="Text to fit gates to, another one. May be repeated.")],
    model: Annotated[str, typer.Option(help="A model.")] = DEFAULT,
    tokens: Annotated[int, typer.Option(help="Tokens of a passage.", min=64)] = 2048,
    passages_each: Annotated[int, typer.Option("--passages", help="Passages of each text.", min=1)] = 3,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens read of each calibration text.", min=512)] = 16384,
    shortlist: Annotated[int, typer.Option(help="L: keys and notes read per query.", min=32)] = 128,
    device: Device = "cpu",
    out: Out = "",
) -> None:
    """How much likelihood a model loses, by the text that its prototypes were fitted to."""
    dev = pick_device(device)
    if both := sorted(set(text) & set(calibrate)):
        raise typer.BadParameter(f"{both[0]!r} is judged and calibrated on: must be two texts", param_hint="--text")
    source = load_source(model, str(dev))
    count = BASE["gates_per_group"]
    shipped = {layer: source.own_gates.get((layer, count)) for layer in source.full_layers}
    fitted = {} if None in shipped.values() else {SHIPPED: shipped}
    try:
        for name in calibrate:
            fitted[name] = fit_gates(source, keys_of(source, [name], calibration_tokens), count)
        if len(calibrate) > 1:
            share = calibration_tokens // len(calibrate)
            fitted["all of these"] = fit_gates(source, keys_of(source, calibrate, share), count)
        judged = {name: passages(source, name, tokens, passages_each) for name in text}
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    rows = []
    for name, its in tqdm(judged.items(), unit="text"):
        rows += measure_text(source, name, its, shortlist, fitted, calibration_tokens)
    report = {"benchmark": "adaptation", **environment(dev), "dtype": "float32", "seed": SEED, "model": model}
    report |= {"tokens": tokens, "passages": passages_each, "shortlist": shortlist, "rows": rows}
    publish(report | {"calibration_tokens": calibration_tokens}, adaptation_table(report), out)


def adaptation_table(report: dict) -> str:
    """The report as Markdown: gap and reads of each text by the text that prototypes were fitted to."""
    about = (
        f"{measured_on(report)}; {report['model']}, {report['passages']} passages of {report['tokens']:,} tokens, "
        f"L = {report['shortlist']}; gap to dense in nats per token ± standard error (reads per query)"
    )
    return f"{about}\n\n{gap_table(report['rows'], 'prototypes', 'prototypes fitted to')}"


if __name__ == "__main__":
    typer.run(adaptation_command)
