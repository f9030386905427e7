"""`proteus convert`: a folder that gives a model the slider."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated

import typer

from ..common.options import DTYPES, Device, choose, pick_device
from ..common.outputs import output_folder
from ..experiments.quality.baseline import baseline
from ..hf.convert import convert
from ..hf.healing.presets import PRESETS
from ..hf.source import ModelSource


def convert_command(
    model: Annotated[str, typer.Argument(help="A known model, a hub id, or the path of a folder or of a GGUF file.")],
    out: Annotated[Path, typer.Option(help="The folder to make.", file_okay=False, callback=output_folder)],
    preset: Annotated[str, typer.Option(help=f"Size of the plan for healing: {', '.join(PRESETS)}.")] = "try",
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy the weights into the folder, instead of referring to them.")
    ] = False,
    measure: Annotated[bool, typer.Option(help="Measure likelihood and answers, for comparison after healing.")] = True,
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Number type of the model while it is converted: float32, float16 or bfloat16.")
    ] = "float32",
) -> None:
    """Give a model the slider: make a folder with its settings, its prototypes and a plan for healing.

    No weight is changed. The command asks no questions. The same command again changes nothing; with another --preset
    it adds a plan.
    """
    choose("--preset", preset, PRESETS)
    began, kind = perf_counter(), choose("--dtype", dtype, DTYPES)

    def measured(source: ModelSource) -> dict:
        typer.echo("Measuring likelihood and answers, dense and with the slider.")
        found = baseline(source)
        for line in found["sentences"]:
            typer.echo(f"  {line}")
        return found

    convert(
        model, out, kind=preset, copy=copy, device=str(pick_device(device)), dtype=kind,
        measure=measured if measure else None, say=typer.echo,
    )  # fmt: skip
    typer.echo(f"Took {perf_counter() - began:.0f} s.")
