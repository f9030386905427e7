"""From a key on a slider to the painted picture, in a real browser: `proteus bench slider`.

Starts JupyterLab on this machine, runs a notebook in headless Chromium, presses arrow keys on each slider, and
times in the page itself from the key event to the frame in which readout, figure and text all show the new request.
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


@dataclass(frozen=True)
class Result:
    """Milliseconds from key to paint, by slider, and what they were measured on."""

    milliseconds: dict[str, list[float]]
    about: dict[str, str] = field(default_factory=dict)

    def all(self) -> list[float]:
        return [value for values in self.milliseconds.values() for value in values]


def browser_driver() -> ModuleType:
    """`tests/browser/driver.py`. It belongs to the tests, which a clone has and an installed wheel has not."""
    path = Path(str(files("proteus_playground.experiments"))).parent / "tests" / "browser" / "driver.py"
    if not path.is_file():
        raise OSError(f"{path} is missing: bench slider drives a browser as the tests do, and runs in a clone only")
    spec = spec_from_file_location("driver", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]


def measure(driver: ModuleType, address: str, presses: int, executable: str, notebook: str | None = None) -> Result:
    """`presses` arrow keys on each slider, after three that are not counted."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(driver.CHROMIUM_ARGS))
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        driver.run_all(page, address, notebook or driver.NOTEBOOK)
        taken = {}
        for slider in driver.SLIDERS:
            # To and fro about the middle, so that no press lands on the end of a scale, where nothing would change.
            for _ in range(6):
                driver.press(page, slider, "ArrowLeft")
            taken[slider] = []
            for number in range(presses):
                taken[slider].append(driver.press(page, slider, "ArrowRight" if number % 6 < 3 else "ArrowLeft"))
                page.wait_for_timeout(120)
        title = page.locator(".pp-title").inner_text().replace("\n", " · ")
        about = {"workbench": title, "browser": f"Chromium {browser.version}, headless"}
        browser.close()
    return Result(taken, about)


def table(result: Result) -> str:
    """The result in markdown."""
    rows = [*result.milliseconds.items(), ("all", result.all())]
    lines = ["| slider | presses | median, ms | 95th percentile, ms |", "|---|---|---|---|"]
    lines += [f"| {name} | {len(v)} | {median(v):.0f} | {percentile(v, 0.95):.0f} |" for name, v in rows]
    return "\n".join([*lines, "", *(f"{name}: {value}  " for name, value in result.about.items())])


def command(
    presses: Annotated[int, typer.Option(help="Arrow keys on each of the four sliders.", min=3, max=1000)] = 30,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.", dir_okay=False)] = Path(
        "experiments/results/slider.json"
    ),
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
            result = measure(driver, address, presses, executable)
    result.about.update(_about())
    print(table(result))
    whole = result.all()
    saved = {
        "median_ms": round(median(whole), 1), "p95_ms": round(percentile(whole, 0.95), 1), **result.about,
        "milliseconds": {name: [round(v, 1) for v in values] for name, values in result.milliseconds.items()},
    }  # fmt: skip
    write_json(out, saved)


def _about() -> dict[str, str]:
    packages = ("torch", "plotly", "ipywidgets", "anywidget", "jupyterlab", "ipykernel")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores shared with the browser",
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }
