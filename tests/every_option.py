"""Every option and argument of every command, found in the command line itself, so that none can be forgotten."""

from __future__ import annotations

import inspect
import typing
from importlib import import_module

import typer

from proteus_playground.cli import app as cli
from proteus_playground.cli.lazy import LazyCommand


def commands(group=None, path=()):
    """(words on the command line, function) of every command."""
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        elif isinstance(command, LazyCommand):
            yield (*path, name), getattr(import_module(command.module), command.function)
        else:
            yield (*path, name), inspect.unwrap(command.callback)


def options():
    """(words of the command, name as it is typed, declaration, type) of every option and argument of every command."""
    for path, function in commands():
        for name, hint in typing.get_type_hints(function, include_extras=True).items():
            for info in getattr(hint, "__metadata__", ()):
                words = name.replace("_", "-")
                typed = f"--{words}" if isinstance(info, typer.models.OptionInfo) else words.upper()
                declared = [info.default, *(info.param_decls or ())]  # typer takes the first name for a default
                typed = next((text for text in declared if str(text).startswith("--")), typed).split("/")[0]
                yield path, typed, info, typing.get_args(hint)[0]


EVERY = list(options())
