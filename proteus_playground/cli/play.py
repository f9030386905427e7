"""`proteus play`: find the notebooks, choose a port, and start JupyterLab or Voila."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

from ..common.files import file_place, shipped_notebooks, whole, write_json

APP = "proteus-workbench.ipynb"
FIRST = "00_start_here.ipynb"
HOST = "127.0.0.1"
LEDGER = ".proteus-notebooks.json"  # sha256 of each notebook as it was copied; a different hash is the user's edit
Say = Callable[[str], None]


def notebooks_folder(directory: Path, say: Say = print) -> Path:
    """The folder to open: the notebooks of a checkout, else copies of the installed ones in `directory`.

    Raises `FileNotFoundError` if the installation has no notebooks.
    """
    shipped = shipped_notebooks()
    if not (shipped / FIRST).is_file():
        raise FileNotFoundError(f"{FIRST} is not in {shipped}: install proteus-playground again")
    if shipped.parent.name != "proteus_playground":
        return shipped
    copy_notebooks(shipped, directory, say)
    return directory.resolve()


def copy_notebooks(shipped: Path, directory: Path, say: Say = print) -> None:
    """Copy new notebooks, replace those that the user has not changed, and keep the others."""
    directory.mkdir(parents=True, exist_ok=True)
    ledger = file_place(directory / LEDGER, "--dir")
    ours = _read_ledger(ledger)
    for notebook in sorted(shipped.glob("*.ipynb")):
        content, copy = notebook.read_bytes(), file_place(directory / notebook.name, "--dir")
        if copy.exists() and _sha256(copy.read_bytes()) not in {ours.get(notebook.name), _sha256(content)}:
            say(f"Kept your {copy}; the one that came with this version is {notebook}.")
            continue
        with whole(copy) as part:
            part.write_bytes(content)
        ours[notebook.name] = _sha256(content)
    write_json(ledger, ours)
    say(f"Your notebooks are in {directory.resolve()}.")


def app_notebook() -> Path:
    """A notebook of one cell that opens the workbench, in a temporary folder of its own: what Voila shows.

    Its files, such as a kept page, are written where the command was given.
    """
    code = f"import os\n\nfrom proteus_playground.widgets import playground\n\nos.chdir({os.getcwd()!r})\nplayground()"
    cell = {"cell_type": "code", "id": "workbench", "metadata": {}, "outputs": [], "execution_count": None}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = {"cells": [cell | {"source": code}], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path = Path(mkdtemp(prefix="proteus-app-")) / APP
    write_json(path, book)
    return path


def _read_ledger(path: Path) -> dict[str, str]:
    """The hashes of the copies that we made. A damaged file counts as empty: then every notebook that differs stays."""
    try:
        ours = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        ours = {}
    return ours if isinstance(ours, dict) else {}


def free_port(port: str | None = None) -> int:
    """`port` if it is free, else a `ValueError`; without `port`, 8888 or the next free one."""
    if port is not None:
        # Parsed here and not by typer, whose message would leave out the value.
        if not (port.isdecimal() and 1 <= int(port) <= 65535):
            raise ValueError(f"--port {port}: allowed is a whole number from 1 to 65535")
        if not _is_free(int(port)):
            raise ValueError(f"--port {port} cannot be opened on {HOST}: allowed is a port that is not in use")
        return int(port)
    return next(p for p in [*range(8888, 8908), _any_port()] if _is_free(p))


def server_command(notebook: Path, port: int, browser: bool, app: bool) -> list[str]:
    """The command line of the server: reachable from this machine only, with a token, on exactly `port`."""
    if app:
        line = [sys.executable, "-m", "voila", str(notebook), f"--port={port}", f"--Voila.ip={HOST}"]
        # Voila uses a token only on request.
        line += ["--strip_sources=True", "--token"]
    else:
        line = [sys.executable, "-m", "jupyterlab", f"--ServerApp.ip={HOST}", f"--ServerApp.port={port}"]
        line += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={notebook.parent}"]
        line += [f"--LabApp.default_url=/doc/tree/{notebook.name}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            line += ["--allow-root"]  # as in containers; Jupyter refuses to run as root otherwise
    return line if browser else [*line, "--no-browser"]


def serve(notebook: Path, port: int, browser: bool, app: bool, say: Say = print) -> None:
    """Replace this process by the server, so that signals reach it. Raises `ImportError` without the `lab` extra."""
    module = "voila" if app else "jupyterlab"
    if find_spec(module) is None:
        raise ImportError(f"{module} is not installed: pip install 'proteus-playground[lab]'")
    line = server_command(notebook, port, browser, app)
    say(f"Opening {notebook}. The address with its token follows; Ctrl-C stops it.")
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(line[0], line)
    raise SystemExit(subprocess.call(line))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _any_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
