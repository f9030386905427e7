"""The versions of Colab, installed into a folder that comes first on the path of one kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

AS_IN_COLAB = ("ipywidgets==7.7.1", "ipykernel==6.17.1", "ipython_genutils==0.2.0", "nest_asyncio", "comm")


def install(folder: Path) -> str:
    """A PYTHONPATH on which Colab's versions come first. Raises `OSError` where PyPI cannot be reached."""
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *AS_IN_COLAB]
    done = subprocess.run([*line, "--disable-pip-version-check"], capture_output=True, text=True, timeout=180)
    if done.returncode:
        raise OSError(f"PyPI is not reachable, so Colab's versions are not here: {done.stderr[-200:]}")
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
