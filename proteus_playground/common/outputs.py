"""What is done with every option that names an output: its place is checked before any work begins."""

from __future__ import annotations

import os
from collections.abc import Mapping

import typer

from .files import check_folder, check_place


def output_file(param: typer.CallbackParam, value):
    """The callback of an option that names a file to write. Raises `OSError` naming the option."""
    return _checked(check_place, param, value)


def report_file(param: typer.CallbackParam, value):
    """The same for a file that may be "-", standard output."""
    return value if value == "-" else _checked(check_place, param, value)


def output_folder(param: typer.CallbackParam, value):
    """The same for a folder to write into."""
    return _checked(check_folder, param, value)


def check_different(files: Mapping[str, str | os.PathLike | None]) -> None:
    """Raise `ValueError` naming two arguments that lead to the same file; None and '' lead to none."""
    seen: dict[str, str] = {}
    for name, path in files.items():
        if path and (other := seen.setdefault(os.path.realpath(path), name)) != name:
            raise ValueError(f"{name}={str(path)!r} is the file of {other} too: allowed is a file of its own")


def _checked(check, param: typer.CallbackParam, value):
    if value is None or value == "":
        return value
    option = param.opts[0] if param.param_type_name == "option" else param.name.upper()
    path = type(value)(os.path.expanduser(value))
    check(path, option)
    return path
