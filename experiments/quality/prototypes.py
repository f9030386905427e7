"""`proteus bench prototypes`: gates for a model that was trained without any, fitted to several kinds of text."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Annotated

import torch
import typer

from ...attention.calibration import SEED
from ...common.machine import environment
from ...common.options import Device, pick_device
from ...common.outputs import output_file
from ...common.texts import load_text
from ...hf.models import DEFAULT
from ...hf.opening import load
from ...hf.patch import find_decoder
from ...hf.shipped_gates import write_gates
from ...hf.source import ModelSource
from .choice import fit_gates, keys_of


def prototypes_command(
    calibrate: Annotated[
        list[str], typer.Option(help="Text to fit gates to: a file or a named text. May be repeated.")
    ],
    out: Annotated[str, typer.Option(help="File for the gates, .safetensors.", callback=output_file)],
    model: Annotated[str, typer.Option(help="A model.")] = DEFAULT,
    gates: Annotated[int, typer.Option(help="Gates per KV group.", min=1)] = 256,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens read of each text.", min=512)] = 16384,
    device: Device = "cpu",
) -> None:
    """Fit gates to a model's keys of several texts, and write them as the package ships them."""
    dev = pick_device(device)
    net, tokenizer = load(model, str(dev))
    source = ModelSource(net, tokenizer, model)
    texts = {name: load_text(name).body for name in calibrate}
    recipe = {
        **environment(torch.device(dev)), "model": model, "seed": SEED, "tokens_each": calibration_tokens,
        "texts": {Path(name).name: sha256(body.encode()).hexdigest() for name, body in texts.items()},
    }  # fmt: skip
    keys = keys_of(source, calibrate, calibration_tokens)
    if gates > (fewest := min(len(its) for its in keys.values())):
        raise typer.BadParameter(f"{gates}: must be at most {fewest}, the tokens read", param_hint="--gates")
    path = write_gates(Path(out), find_decoder(net), fit_gates(source, keys, gates), recipe)
    typer.echo(f"{path}: {path.stat().st_size:,} bytes, {gates} gates per KV group of {len(keys)} layers")
