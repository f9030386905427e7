"""A page of JupyterLab over copies of the notebooks, which asks nothing of other machines, and keeps console errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import driver
import pytest

INSIDE = ("data:", "blob:", "ws://127.0.0.1", "http://127.0.0.1", "http://localhost")  # addresses on this machine
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def traces(panel: str) -> str:
    """JavaScript that tells all that the figure inside `panel` draws."""
    return f"""() => {{
      const figure = document.querySelector('{panel} .js-plotly-plot');
      return JSON.stringify(figure.data.map((trace) => [trace.z, trace.x && [...trace.x], trace.y && [...trace.y]]));
    }}"""


@contextmanager
def notebook_page(folder: Path) -> Iterator[tuple]:
    """(page, address); `page.complaints` holds the console's errors. Skips where there is no browser."""
    executable = driver.chromium()
    if executable is None:
        pytest.skip("no Chromium here: install one or set PROTEUS_CHROMIUM")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    shutil.copytree(NOTEBOOKS, folder / "notebooks")
    with driver.jupyter_lab(folder) as address, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(driver.CHROMIUM_ARGS))
        page = browser.new_page(viewport={"width": 1400, "height": 1060})
        page.complaints = []
        page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda err: page.complaints.append(str(err)))
        outside = []
        page.on("request", lambda request: None if request.url.startswith(INSIDE) else outside.append(request.url))
        yield page, address
        browser.close()
        assert outside == []
