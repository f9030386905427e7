"""Commands that are imported when they are called, not when they are listed: `proteus --help` must not load torch."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.resources import files

import typer
from typer.core import TyperCommand, TyperGroup

PLAIN = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}  # no boxes that cut lines


class LazyGroup(TyperGroup):
    """A group with the commands of `targets` besides its own: name -> "package.module:function"."""

    targets: dict[str, str] = {}

    def __init__(self, **options):
        super().__init__(**options)
        for name, target in self.targets.items():
            self.add_command(LazyCommand(name, target))


class LazyCommand(TyperCommand):
    """Listed with the first sentence of the function's docstring; replaced by the real command when it is called."""

    def __init__(self, name: str, target: str):
        super().__init__(name, help=docstring(target))
        self.target = target

    def make_context(self, *args, **options):
        module, function = self.target.split(":")
        command = typer.Typer(**PLAIN)
        command.command(self.name)(getattr(import_module(module), function))
        return typer.main.get_command(command).make_context(*args, **options)


def docstring(target: str) -> str:
    """The docstring of "package.module:function", read from the file without importing the module."""
    module, function = target.split(":")
    package, _, file = module.rpartition(".")
    tree = ast.parse((files(package) / f"{file}.py").read_text(encoding="utf-8"))
    return next(ast.get_docstring(node) for node in tree.body if getattr(node, "name", "") == function)
