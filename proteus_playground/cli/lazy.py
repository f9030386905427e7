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
    """A group with the commands of `modules` besides its own: name -> the module that holds `name_command`."""

    modules: dict[str, str] = {}

    def __init__(self, **options):
        super().__init__(**options)
        for name, module in self.modules.items():
            self.add_command(LazyCommand(name, module))


class LazyCommand(TyperCommand):
    """Listed with the first sentence of the function's docstring; replaced by the real command when it is called."""

    def __init__(self, name: str, module: str):
        self.module, self.function = module, f"{name.replace('-', '_')}_command"
        super().__init__(name, help=docstring(module, self.function))

    def make_context(self, *args, **options):
        command = typer.Typer(**PLAIN)
        command.command(self.name)(getattr(import_module(self.module), self.function))
        return typer.main.get_command(command).make_context(*args, **options)


def docstring(module: str, function: str) -> str:
    """The docstring of a function, read from the file without importing the module."""
    package, _, file = module.rpartition(".")
    tree = ast.parse((files(package) / f"{file}.py").read_text(encoding="utf-8"))
    return next(ast.get_docstring(node) for node in tree.body if getattr(node, "name", "") == function)
