"""`proteus bench slider`: time from a key on a slider to the painted picture, in a real browser.

Starts JupyterLab on this machine, runs a notebook in headless Chromium and presses arrow keys on each slider. The page
itself measures the time from the key event to the frame in which readout, figure and text all show the new request.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import version
from importlib.resources import files
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Annotated

import numpy as np
import typer

from ...common.files import shipped_notebooks, write_json
from ...common.machine import markdown
from ...common.outputs import output_file

RESULTS = Path("experiments", "results")  # in a clone


def browser_driver() -> ModuleType:
    """`tests/browser/driver.py`, which is shared with the tests. A clone has it, an installed wheel does not."""
    path = Path(str(files("proteus_playground.experiments"))).parent / "tests" / "browser" / "driver.py"
    if not path.is_file():
        raise OSError(f"{path} is missing: bench slider drives a browser as the tests do, and runs in a clone only")
    spec = spec_from_file_location("driver", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_slider(driver: ModuleType, address: str, presses: int, executable: str) -> tuple[dict, dict]:
    """Milliseconds of `presses` arrow keys by slider, after six that are not counted; page title and browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(driver.CHROMIUM_ARGS))
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        driver.run_all(page, address, driver.NOTEBOOK)
        times = {}
        for slider in driver.SLIDERS:
            # Back and forth about the middle: at the end of a scale a press would change nothing.
            for _ in range(6):
                driver.press(page, slider, "ArrowLeft")
            times[slider] = []
            for number in range(presses):
                times[slider].append(driver.press(page, slider, "ArrowRight" if number % 6 < 3 else "ArrowLeft"))
                page.wait_for_timeout(120)
        title = page.locator(".pp-title").inner_text().replace("\n", " · ")
        about = {"workbench": title, "browser": f"Chromium {browser.version}, headless"}
        browser.close()
    return times, about


def spread(times: list[float]) -> tuple[float, float]:
    """Median and 95th percentile, the smallest time that 95% of all do not exceed."""
    return median(times), float(np.percentile(times, 95, method="inverted_cdf"))


def slider_table(times: dict[str, list[float]], about: dict[str, str]) -> str:
    """The times as Markdown, with lines that say how they were measured."""
    rows = [[name, len(some), *(f"{ms:.0f}" for ms in spread(some))] for name, some in times.items()]
    lines = [markdown(["slider", "presses", "median, ms", "95th percentile, ms"], rows), ""]
    return "\n".join([*lines, *(f"{name}: {value}  " for name, value in about.items())])


def slider_command(
    presses: Annotated[int, typer.Option(help="Arrow keys on each of the four sliders.", min=3, max=1000)] = 30,
    out: Annotated[Path | None, typer.Option(help="JSON file, by default slider.json.", callback=output_file)] = None,
) -> None:
    """Time from a key on a slider to the painted picture; prints a table and writes JSON."""
    driver = browser_driver()
    executable = driver.chromium()
    if executable is None:
        raise OSError("no Chromium found: install one, or set PROTEUS_CHROMIUM to its path")
    with tempfile.TemporaryDirectory(prefix="proteus-bench-") as folder:
        shutil.copy(shipped_notebooks() / driver.NOTEBOOK, folder)
        with driver.jupyter_lab(Path(folder)) as address:
            times, about = measure_slider(driver, address, presses, executable)
    every = [ms for some in times.values() for ms in some]
    about |= _about()
    typer.echo(slider_table({**times, "all": every}, about))
    (middle, high), rounded = spread(every), {name: [round(ms, 1) for ms in some] for name, some in times.items()}
    saved = {"median_ms": round(middle, 1), "p95_ms": round(high, 1), **about, "milliseconds": rounded}
    write_json(out or (RESULTS if RESULTS.is_dir() else Path()) / "slider.json", saved)


def _about() -> dict[str, str]:
    packages = ("torch", "plotly", "ipywidgets", "anywidget", "jupyterlab", "ipykernel")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores shared with the browser",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }
