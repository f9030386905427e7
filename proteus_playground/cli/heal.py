"""`proteus heal`: train a converted folder stage by stage, with a panel in the terminal and a menu after each stage."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..common.options import Device, pick_device
from ..common.progress import Stopped
from ..hf.healing.history import Board, gap_of, summary
from ..hf.healing.run import read_log
from ..hf.healing.session import BEFORE, Session
from .heal_menu import ask
from .heal_panel import Panel


def heal_command(
    folder: Annotated[Path, typer.Argument(help="A folder that proteus convert made.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to train on in place of the plan's: a name, a file (.txt, .jsonl) or hub:owner/dataset. "
            "May be repeated."
        ),
    ] = None,
    stage: Annotated[str, typer.Option(help="Run only this stage of the plan: A, B, C or D.")] = "",
    full: Annotated[bool, typer.Option("--full", help="Train all weights instead of adapters.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive/--non-interactive", help="Show a menu after each stage and on Ctrl-C.")
    ] = True,
    seconds: Annotated[
        float | None, typer.Option(help="Stop after so many seconds; the same command goes on.", min=1)
    ] = None,
    save_seconds: Annotated[float, typer.Option(help="Seconds between two saves of the state.", min=0)] = 60.0,
    device: Device = "cpu",
) -> None:
    """Train the model of a converted folder so that it reads few keys with little loss.

    The same command continues a run that was stopped or killed. After each stage, adapters or weights and prototypes
    are written into the folder.
    """
    session = Session(folder, data=data or (), full=full, device=str(pick_device(device)))
    training = session.training
    if stage:
        session.go_to(stage)
    if training.stage is None:
        typer.echo(
            f"Run {session.run_folder.name} is finished. To add a plan, run proteus convert with another --preset."
        )
        return
    session.begin(typer.echo)
    board, done = Board(session.run_folder), True
    interactive = interactive and training.accelerator.num_processes == 1
    with Panel(training, seconds) as panel:
        while training.stage is not None and (not stage or training.stage.name == stage):
            done = _stage(session, panel, board, save_seconds)
            if panel.over or not (interactive or done):
                break
            if interactive:
                with panel.paused():
                    if not ask(session, typer.echo, _prompt, only=stage):
                        break
    board.close()
    if training.accelerator.is_main_process:
        _end(session, done)
    if not done:
        raise typer.Exit(130)


def _stage(session: Session, panel: Panel, board: Board, save_seconds: float) -> bool:
    """Train what is left of the present stage. False if Ctrl-C or the time limit stopped it."""
    try:
        with interrupts() as interrupted:
            for step in session.run.steps(save_seconds=save_seconds, stop=lambda: interrupted() or panel.over):
                board.add(step)
                panel.show(step)
    except Stopped:
        return False
    session.finish_stage()
    return True


def _prompt(text: str) -> str:
    return typer.prompt(text, default="", show_default=False)


def _end(session: Session, done: bool) -> None:
    log = read_log(session.run_folder)
    if not done:
        typer.echo("Stopped. The same command goes on from here.", err=True)
    elif log:
        gap = gap_of(log[-1])
        typer.echo(summary(log))
        before = session.run_folder / BEFORE
        if gap is not None and before.is_file():
            first = json.loads(before.read_text())["gaps"].values()
            typer.echo(f"Mean held-out gap: {sum(first) / len(first):.4f} before, {gap:.4f} now.")
        typer.echo(f"Adapters or weights and prototypes are written into {session.folder.path}.")


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed. A second Ctrl-C ends the program at once."""
    seen: list[bool] = []

    def note(number, frame) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)
