"""`proteus export`: write a converted model into a folder to keep or to share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..common.outputs import output_folder
from ..hf.export import export


def export_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `proteus convert` made.")],
    out: Annotated[Path, typer.Option(help="The folder to make.", file_okay=False, callback=output_folder)],
    merged: Annotated[
        bool, typer.Option("--merged", help="One checkpoint with all weights, for transformers. Without it: a few MB.")
    ] = False,
) -> None:
    """Export a converted model: its settings, gates and adapter alone, or one checkpoint for transformers."""
    export(folder, out, merged=merged, say=typer.echo)
