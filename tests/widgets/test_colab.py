"""The first notebook as Colab would run it: ipywidgets 7.7.1, ipykernel 6.17, and a stand-in for `google.colab`.

The old versions come first on the path of one kernel; the environment itself does not change.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from old_widgets import install

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "00_start_here.ipynb"
STAND_IN = """import sys

callers = []


def enable_custom_widget_manager():
    callers.append(sys._getframe(1).f_globals["__name__"])
"""
REPORT = """
import json, time, asyncio
import google.colab.output, ipykernel, ipywidgets

for _ in range(1200):
    if workbench.drawn is not None or workbench.problem:
        break
    await asyncio.sleep(0.1)
workbench.state.flux_alpha = 0.5
for _ in range(300):
    if workbench.drawn.wanted == workbench.wanted():
        break
    await asyncio.sleep(0.1)
print(json.dumps({
    "callers": google.colab.output.callers, "ipywidgets": ipywidgets.__version__, "ipykernel": ipykernel.__version__,
    "drawn": workbench.drawn.view.settings.flux_alpha, "problem": workbench.problem, "threads": workbench._threads,
}))
"""
WATCH_DRAWING = """
import threading
workbench._threads = []
draw = workbench._draw
def watched(*args):
    workbench._threads.append(threading.current_thread() is threading.main_thread())
    draw(*args)
workbench._draw = watched
"""


@pytest.fixture(scope="module")
def colab_path(tmp_path_factory) -> str:
    """A PYTHONPATH on which Colab's versions come first."""
    old = tmp_path_factory.mktemp("colab") / "site"
    try:
        path = install(old)
    except OSError as err:
        pytest.skip(str(err))
    colab = old / "google" / "colab"
    colab.mkdir(parents=True)
    (colab / "__init__.py").write_text("")
    (colab / "output.py").write_text(STAND_IN)
    return path


@pytest.mark.slow
def test_the_notebook_runs_with_colabs_versions(colab_path, tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "Colab", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", colab_path)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(NOTEBOOK, as_version=4)
    last = next(i for i, cell in enumerate(book.cells) if cell.id == "workbench")
    book.cells.insert(last + 1, nbformat.v4.new_code_cell(WATCH_DRAWING))
    book.cells.append(nbformat.v4.new_code_cell(REPORT))
    nbclient.NotebookClient(book, timeout=200, kernel_name="python3").execute(cwd=str(tmp_path))
    said = "".join(output.text for output in book.cells[-1].outputs if output.output_type == "stream")
    report = json.loads(said.strip().splitlines()[-1])
    assert (report["ipywidgets"], report["ipykernel"]) == ("7.7.1", "6.17.1")
    # The notebook's first cell calls setup_colab, which enables it once; anywidget enables it again by itself in Colab.
    assert report["callers"].count("proteus_playground.widgets.colab") == 1
    others = {caller.partition(".")[0] for caller in report["callers"]} - {"proteus_playground"}
    assert others <= {"anywidget"}
    assert report["problem"] == "" and report["drawn"] == 0.5
    assert report["threads"] and all(report["threads"]), "widgets were touched outside the kernel's own thread"
    shown = next(cell for cell in book.cells if cell.id == "workbench").outputs
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in shown)
