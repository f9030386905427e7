"""What an import may bring with it, each tried in a fresh process: this one has imported everything."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WIDGETS = {"ipywidgets", "plotly", "anywidget", "IPython"}


def imported(statement: str) -> set[str]:
    """Names of top-level modules in memory after `statement`."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import proteus_playground", WIDGETS | {"transformers", "datasets"}),
        ("from proteus_playground import AttentionConfig, ProteusAttention", WIDGETS | {"transformers"}),
        ("import proteus_playground.attention, proteus_playground.playground.views", WIDGETS | {"transformers"}),
        ("import proteus_playground.playground.probe", WIDGETS | {"transformers"}),
        ("import proteus_playground.common.texts", WIDGETS | {"transformers", "torch", "datasets"}),
        ("import proteus_playground.hf.models", WIDGETS | {"transformers", "huggingface_hub"}),
        ("import proteus_playground.experiments.speed.sweep", WIDGETS | {"transformers"}),
        ("import proteus_playground.cli.app", WIDGETS | {"transformers", "torch"}),
    ],
)
def test_an_import_stays_light(statement, forbidden):
    brought = imported(statement) & forbidden
    assert brought == set()


def test_on_a_cpu_no_triton_kernel_is_imported():
    code = """
import sys, torch
from proteus_playground import AttentionConfig, ProteusAttention
attn = ProteusAttention(AttentionConfig(d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, shortlist=24, flux_alpha=1.0))
attn.eval()(torch.randn(1, 100, 32))
print(*[name for name in sys.modules if ".backends.fused" in name])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A copy in which every folder lies where it is installed: import-linter follows folders, not `package_dir`."""
    place = tmp_path_factory.mktemp("installed")
    skip = shutil.ignore_patterns("__pycache__", "*.json", "*.safetensors", "experiments", "widgets", "notebooks")
    package = shutil.copytree(ROOT / "proteus_playground", place / "proteus_playground", ignore=skip)
    for name in ("experiments", "widgets"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    return place


def test_imports_run_one_way_and_in_no_circle(installed):
    code = (
        "import sys; from importlinter.cli import lint_imports_command; sys.path.insert(0, '.'); lint_imports_command()"
    )
    command = [sys.executable, "-c", code, str(ROOT / "setup.cfg"), "--no-cache"]
    done = subprocess.run(command, cwd=installed, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


# The name to import a distribution by, where it is not its own.
IMPORTED_AS = {"import-linter": "importlinter", "flash-linear-attention": "fla"}


def declared() -> set[str]:
    """Names of modules that setup.cfg asks for, extras included."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    wanted = (line.strip() for text in lines for line in text.splitlines())
    names = {re.split(r"[<>=!;\[ ]", line)[0] for line in wanted if line and not line.startswith("#")}
    return {IMPORTED_AS.get(name, name.replace("-", "_")) for name in names}


def test_everything_imported_is_declared():
    found = {}
    for folder in ("proteus_playground", "experiments", "widgets", "tests"):
        ours = {path.stem for path in (ROOT / "tests").rglob("*.py")} | {"proteus_playground"}
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                for name in {name.partition(".")[0] for name in names} - ours - sys.stdlib_module_names:
                    found.setdefault(name, path.relative_to(ROOT))
    missing = {name: str(path) for name, path in found.items() if name not in declared()}
    assert missing == {}
