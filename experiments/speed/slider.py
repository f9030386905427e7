"""`proteus bench slider`: time from a key on a slider to the painted picture, in a real browser.

Starts JupyterLab on this machine, runs a notebook in headless Chromium and presses arrow keys on each slider. The page
itself measures the time from the key event to the frame in which readout, figure and text all show the new request.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Annotated

import typer

from ...common.files import write_json

RESULTS = Path("experiments", "results")  # in a clone


@dataclass(frozen=True)
class SliderTimes:
    """Milliseconds from key to paint, by slider, and what they were measured on."""

    milliseconds: dict[str, list[float]]
    about: dict[str, str] = field(default_factory=dict)

    def all(self) -> list[float]:
        return [value for values in self.milliseconds.values() for value in values]


def browser_driver() -> ModuleType:
    """`tests/browser/driver.py`, which is shared with the tests. A clone has it, an installed wheel does not."""
    path = Path(str(files("proteus_playground.experiments"))).parent / "tests" / "browser" / "driver.py"
    if not path.is_file():
        raise OSError(f"{path} is missing: bench slider drives a browser as the tests do, and runs in a clone only")
    spec = spec_from_file_location("driver", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def measure_slider(
    driver: ModuleType, address: str, presses: int, executable: str, notebook: str | None = None
) -> SliderTimes:
    """Times of `presses` arrow keys on each slider, after six that are not counted."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(driver.CHROMIUM_ARGS))
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        driver.run_all(page, address, notebook or driver.NOTEBOOK)
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
    return SliderTimes(times, about)


def slider_table(result: SliderTimes) -> str:
    """The result as Markdown."""
    rows = [*result.milliseconds.items(), ("all", result.all())]
    lines = ["| slider | presses | median, ms | 95th percentile, ms |", "|---|---|---|---|"]
    lines += [f"| {name} | {len(v)} | {median(v):.0f} | {percentile(v, 0.95):.0f} |" for name, v in rows]
    return "\n".join([*lines, "", *(f"{name}: {value}  " for name, value in result.about.items())])


def slider_command(
    presses: Annotated[int, typer.Option(help="Arrow keys on each of the four sliders.", min=3, max=1000)] = 30,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file; slider.json if left out, in a clone's results folder.", dir_okay=False),
    ] = None,
) -> None:
    """Time from a key on a slider to the painted picture; prints a table and writes JSON."""
    driver = browser_driver()
    executable = driver.chromium()
    if executable is None:
        raise OSError("no Chromium found: install one, or set PROTEUS_CHROMIUM to its path")
    from proteus_playground.common.files import shipped_notebooks

    with tempfile.TemporaryDirectory(prefix="proteus-bench-") as folder:
        shutil.copy(shipped_notebooks() / driver.NOTEBOOK, folder)
        with driver.jupyter_lab(Path(folder)) as address:
            result = measure_slider(driver, address, presses, executable)
    result.about.update(_about())
    print(slider_table(result))
    whole = result.all()
    saved = {
        "median_ms": round(median(whole), 1), "p95_ms": round(percentile(whole, 0.95), 1), **result.about,
        "milliseconds": {name: [round(v, 1) for v in values] for name, values in result.milliseconds.items()},
    }  # fmt: skip
    write_json(out or (RESULTS if RESULTS.is_dir() else Path()) / "slider.json", saved)


def _about() -> dict[str, str]:
    packages = ("torch", "plotly", "ipywidgets", "anywidget", "jupyterlab", "ipykernel")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores shared with the browser",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }
