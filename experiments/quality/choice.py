"""`proteus bench choice`: what sparse attention costs a model in likelihood, by how many gates and notes it reads.

All layers that read the whole past are replaced, without training. The gap is the mean negative log-likelihood of the
second half of a passage, in nats per token, less that of the model's own dense pass over the same tokens.

Axes: `T` tokens, `G` KV groups, `d` head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from ...attention import AttentionConfig, Gates
from ...attention.adapter import ProteusLayer
from ...attention.calibration import CHARS_PER_TOKEN, SEED, layer_seed, new_gates
from ...common.machine import environment, markdown
from ...common.options import Device, Out, pick_device
from ...common.texts import load_text
from ...hf.models import DEFAULT
from ...hf.opening import load_source
from ...hf.source import ModelSource
from ..intervals import standard_error
from ..speed.measure import measured_on, publish

PASS_TOKENS = 2048  # tokens of calibration text that the model reads at a time
BASE = {"gates_per_group": 256, "probes": 16, "nearest_gates": True}


@dataclass(frozen=True)
class Choice:
    """One row of the table: the fields of `AttentionConfig` that decide which keys and notes are read."""

    name: str
    fields: Mapping[str, object] = field(default_factory=dict)


def choices(shortlist: int) -> list[Choice]:
    """The config's defaults; `BASE`; even rings with nearest notes; and `BASE` with one number changed."""
    half = shortlist // 4  # of the gates' share: notes take no more, and each opened gate needs a key
    changes: dict[str, Sequence] = {
        "gates_per_group": (32, 64, 128, 512),
        "probes": tuple(n for n in (4, 8, 32) if n <= half),
        "max_notes": tuple(n for n in (8, 24, 32, 64) if n <= half),
        "notes": (False,),
        "dna_fraction": (0.35, 0.65),
    }
    changed = [Choice(f"{name}={value}", {**BASE, name: value}) for name, values in changes.items() for value in values]
    even = {**BASE, "nearest_gates": False, "probes": 8, "max_notes": 16}
    named = [Choice(", ".join(f"{name}={value}" for name, value in fields.items()), fields) for fields in (BASE, even)]
    return [Choice("default"), *named, *changed]


def passages(source: ModelSource, text: str, tokens: int, count: int) -> list[Tensor]:
    """`count` passages of `tokens` ids each, `(tokens,)`, spread evenly over the text but for its first tenth.

    text: as in `load_text`. Raises `ValueError` where the text is too short for one passage.
    """
    ids = source.encode(load_text(text).body)
    first, last = len(ids) // 10, len(ids) - tokens
    if last < first:
        raise ValueError(f"text={text!r} has {len(ids)} tokens: must have at least {tokens * 10 // 9 + 1}")
    starts = [first + (last - first) * i // max(1, count - 1) for i in range(count)]
    return [source.ids(ids[start : start + tokens]) for start in starts]


def keys_of(source: ModelSource, texts: Sequence[str], tokens: int) -> dict[int, Tensor]:
    """Un-rotated keys `(N, G, d)` of each layer, from the first `tokens` tokens of every text."""
    found: dict[int, list[Tensor]] = {}
    for name in texts:
        ids = source.ids(source.encode(load_text(name).body[: tokens * CHARS_PER_TOKEN])[:tokens])
        for part in ids.split(PASS_TOKENS):
            for layer, captured in source.capture(part, keys_only=True).items():
                found.setdefault(layer, []).append(captured.k)
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def fit_gates(source: ModelSource, keys: Mapping[int, Tensor], gates: int) -> dict[int, Gates]:
    """Gates of every layer, fitted to its keys by k-means."""
    return {
        layer: new_gates(source.shape, gates)
        .to(source.device)
        .fit(its.to(source.device).float(), seed=layer_seed(layer))
        .eval()
        for layer, its in keys.items()
    }


def config_of(source: ModelSource, shortlist: int, choice: Choice) -> AttentionConfig:
    """The config of the source's layers at flux alpha 1, all heads awake."""
    return source.shape.config(flux_alpha=1.0, route_heads=False, shortlist=shortlist, **choice.fields)


def gap(source: ModelSource, ids: Tensor, dense: float, gates: Mapping[int, Gates], config: AttentionConfig):
    """The gap on one passage, and the mean number of keys and notes that a query reads."""
    reads: list[float] = []

    def attend(layer: ProteusLayer) -> Callable:
        def run(call) -> Tensor:
            done = layer.run_call(call)
            reads.append(done.result.reads.float().mean().item())
            return done.out

        return run

    layers = {index: attend(ProteusLayer(its, config)) for index, its in gates.items()}
    return source.nll(ids, len(ids) // 2, layers) - dense, fmean(reads)


def measure_choices(
    source: ModelSource, keys: Mapping[int, Tensor], texts: Mapping[str, Sequence[Tensor]], shortlist: int
) -> Iterator[dict]:
    """One row per choice and text. keys: those of `keys_of`, to fit gates to; texts: passages by name."""
    dense = {name: [source.nll(ids, len(ids) // 2, {}) for ids in its] for name, its in texts.items()}
    fitted: dict[int, dict[int, Gates]] = {}
    for choice in tqdm(choices(shortlist), unit="choice"):
        config = config_of(source, shortlist, choice)
        count = config.gates_per_group
        if count not in fitted:
            fitted[count] = fit_gates(source, keys, count)
        for name, its in texts.items():
            pairs = zip(its, dense[name], strict=True)
            found = [gap(source, ids, base, fitted[count], config) for ids, base in pairs]
            gaps, reads = zip(*found, strict=True)
            yield {
                "choice": choice.name,
                "text": name,
                "gaps": gaps,
                "reads": fmean(reads),
                "dense": fmean(dense[name]),
            }


def choice_command(
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
    """How much likelihood a model loses, by the number of gates, opened gates, notes, and the gates' share of L."""
    dev = pick_device(device)
    if both := sorted(set(text) & set(calibrate)):
        raise typer.BadParameter(f"{both[0]!r} is judged and calibrated on: must be two texts", param_hint="--text")
    source = load_source(model, str(dev))
    try:
        texts = {name: passages(source, name, tokens, passages_each) for name in text}
        keys = keys_of(source, calibrate, calibration_tokens)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from problem
    rows = list(measure_choices(source, keys, texts, shortlist))
    report = {"benchmark": "choice", **environment(dev), "dtype": "float32", "seed": SEED, "model": model}
    report |= {"tokens": tokens, "passages": passages_each, "shortlist": shortlist, "calibrated_on": calibrate}
    report |= {"calibration_tokens": calibration_tokens, "rows": rows}
    publish(report, choice_table(report), out)


def choice_table(report: dict) -> str:
    """The report as Markdown: gap and reads of each text by choice, with a line that says how it was measured."""
    about = (
        f"{measured_on(report)}; {report['model']}, {report['passages']} passages of {report['tokens']:,} tokens, "
        f"L = {report['shortlist']}, gates fitted to {report['calibration_tokens']:,} tokens each of "
        f"{', '.join(report['calibrated_on'])}; gap to dense in nats per token ± standard error (reads per query)"
    )
    return f"{about}\n\n{gap_table(report['rows'], 'choice', 'choice')}"


def gap_table(rows: Sequence[dict], kind: str, title: str) -> str:
    """Rows as Markdown, a column for each text: mean gap ± standard error (reads). kind: field that names a line."""
    names = list(dict.fromkeys(row["text"] for row in rows))
    cells: dict[str, list[str]] = {}
    for row in rows:
        error = standard_error(row["gaps"])
        tail = "" if error is None else f" ± {error:.3f}"
        cells.setdefault(row[kind], []).append(f"{fmean(row['gaps']):.3f}{tail} ({row['reads']:.0f})")
    return markdown([title, *names], [[name, *row] for name, row in cells.items()])
