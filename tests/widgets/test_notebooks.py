"""Every notebook as it is stored in the repository: it has what Colab needs, no outputs, and a link to itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
SHOWN = {
    "00_start_here": ("workbench",), "01_the_wall": ("panel",), "02_duel": ("panel",),
    "03_gates_and_prototypes": ("panel",),
    "04_million_tokens": ("panel", "bank", "million"), "05_needles": ("panel",),
    "06_your_own_model": ("panel",), "07_write_your_own_selector": (), "08_evidence": ("panel",),
    "09_more_to_touch": ("bank", "int8", "top_a", "controller"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.ipynb")))
def test_the_notebook_says_what_colab_needs_and_carries_no_outputs(name):
    book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    meta = book["metadata"]
    assert meta["accelerator"] == "GPU" and meta["colab"] == {"gpuType": "T4", "provenance": []}
    assert meta["kernelspec"]["name"] == "python3" and "widgets" not in meta
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    source = "".join("".join(cell["source"]) for cell in code)
    assert source.count("import setup_colab\n\nsetup_colab()") == 1  # it lets widgets draw: see test_setup_colab.py
    assert source.index("setup_colab()") < source.find("display(") or not SHOWN[name]
    assert all(f"display({shown})" in source for shown in SHOWN[name])
    assert "torch==" not in source and "install torch" not in source
    first = "".join(book["cells"][0]["source"])
    assert "[Open in Colab](" in first and f"blob/main/notebooks/{name}.ipynb" in first


def test_all_notebooks_have_the_same_metadata():
    books = [json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.ipynb")]
    assert all(book["metadata"] == books[0]["metadata"] for book in books) and len(books) == len(SHOWN)
