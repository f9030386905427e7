"""Set up a fresh clone and open the playground, or run the tests: `python3 -m proteus_playground.cli.setup play`.

Needs nothing but Python 3.11 to 3.13: it makes the virtual environment `.venv` in the clone, installs into it, and goes
on in it. PyTorch's default build for Linux brings several gigabytes of CUDA libraries. Where there is no NVIDIA GPU the
CPU build (about 200 MB) is installed instead, after a question if there is somebody to ask.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

CLONE = Path(__file__).resolve().parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = {"play": "lab,hf", "test": "test"}


def main(args: list[str] | None = None) -> int:
    """Run one of the two jobs; returns the exit code of its last command."""
    name = "python3 -m proteus_playground.cli.setup"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.split("\n")[0])
    parser.add_argument("job", choices=EXTRAS, help="play: open the notebooks. test: run the tests.")
    parser.add_argument("--torch", choices=("cpu", "default"), help="build of PyTorch; by default as found here")
    chosen, rest = parser.parse_known_args(args)  # the rest goes to `proteus play` or to pytest
    if not (CLONE / "setup.cfg").is_file():
        parser.error(f"{CLONE} is no clone of the repository: run this in a clone")
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        parser.error(f"Python {platform.python_version()}: must be 3.11 to 3.13")
    python = make_environment(CLONE / ".venv")
    install(python, EXTRAS[chosen.job], chosen.torch or pick_torch())
    proteus = [str(python), "-m", "proteus_playground"]
    if chosen.job == "test":
        return subprocess.call([str(python), "-m", "pytest", "-q", *rest], cwd=CLONE)
    if subprocess.call([*proteus, "models", "pull"]):
        print("No language model was fetched: the playground opens on shelf-mini, which is part of this repository.")
    return subprocess.call([*proteus, "play", *rest])


def make_environment(folder: Path) -> Path:
    """The Python of the virtual environment in `folder`, which is made if it is missing."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        print(f"Making the virtual environment {folder}")
        venv.create(folder, with_pip=True)
    return python


def install(python: Path, extras: str, build: str) -> None:
    """Install the clone with `extras`. `SystemExit` where pip fails, with pip's own message above."""
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    installed = subprocess.call([str(python), "-c", "import torch"], stderr=subprocess.DEVNULL) == 0
    if build == "cpu" and not installed:
        print("Installing the CPU build of PyTorch (about 200 MB)", flush=True)
        index = ["--index-url", CPU_INDEX] if answers(CPU_INDEX) else []
        if not index:
            print(f"{CPU_INDEX} does not answer: PyPI's build is installed, which may be larger", flush=True)
        if subprocess.call([*pip, "torch", *index], cwd=CLONE):
            raise SystemExit("PyTorch could not be installed: see pip's message above")
    print(f"Installing the playground with [{extras}]", flush=True)
    if subprocess.call([*pip, "-e", f".[{extras}]"], cwd=CLONE):
        raise SystemExit("The playground could not be installed: see pip's message above")


def pick_torch(ask: Callable[[str], str] | None = None) -> str:
    """The build of PyTorch for this machine, "cpu" or "default".

    ask: like `input`. None: ask at a terminal; elsewhere take "cpu" where there is no GPU.
    """
    if sys.platform != "linux" or shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        return "default"  # macOS and Windows have no CUDA in the default build
    if ask is None and sys.stdin.isatty():
        ask = input
    reply = ask("No NVIDIA GPU found. Install PyTorch without CUDA, 200 MB instead of gigabytes? [Y/n] ") if ask else ""
    return "default" if reply.strip().lower().startswith("n") else "cpu"


def answers(address: str) -> bool:
    """Whether a server answers there within five seconds."""
    try:
        with urlopen(address, timeout=5):
            return True
    except (URLError, OSError):
        return False


if __name__ == "__main__":
    sys.exit(main())
