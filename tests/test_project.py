"""Packages are all listed, the README is true, and the address stands in one place."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").is_file(), reason="needs the repository, not only the tests")


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def between(mark: str, page: str = "README.md") -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {mark}:begin -->")[1].split(f"<!-- {mark}:end -->")[0]


def packages() -> dict[str, Path]:
    """Every folder that is installed, by the name it is imported by."""
    return {
        ".".join(("proteus_playground", *path.parent.relative_to(top).parts)): path.parent
        for top in (ROOT / "proteus_playground", ROOT)
        for path in top.rglob("__init__.py")
        if top != ROOT or path.relative_to(ROOT).parts[0] in {"experiments", "notebooks", "widgets"}
    }


def test_every_package_is_listed():
    assert set(setup_cfg()["options"]["packages"].split()) == set(packages())


def test_version_and_address_stand_in_one_place():
    import proteus_playground

    assert setup_cfg()["metadata"]["version"] == proteus_playground.__version__
    done = subprocess.run([sys.executable, ROOT / ".ci" / "repository"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_address_is_rewritten_everywhere(tmp_path):
    for name in ("setup.cfg", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "repository", tmp_path / ".ci")
    old = setup_cfg()["metadata"]["url"].removeprefix("https://github.com/")
    subprocess.run([sys.executable, script, "someone/some.thing-else"], check=True, capture_output=True)
    readme = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert old not in readme and readme.count("someone/some.thing-else") >= 2
    assert "url = https://github.com/someone/some.thing-else" in (tmp_path / "setup.cfg").read_text()
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    (tmp_path / "README.md").write_text(readme.replace("someone/", "other/"), encoding="utf-8")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 1 and "README.md: other/some.thing-else" in done.stdout


@pytest.mark.parametrize("address", ["", "justone", "https://github.com/a/b", "a/b/c", "a b/c"])
def test_a_bad_address_is_refused(address):
    done = subprocess.run([sys.executable, ROOT / ".ci" / "repository", address], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"OWNER/NAME={address!r}: allowed is" in done.stderr


def test_the_tree_names_every_file():
    tree = set(re.findall(r"[\w.]+\.py|[\w.]+/", between("tree", "docs/architecture.md")))
    folders = (ROOT / "proteus_playground", ROOT / "experiments", ROOT / "widgets")
    code = {path.name for folder in folders for path in folder.rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert code - tree == set(), "missing in the tree of docs/architecture.md"
    assert {name for name in tree if name.endswith(".py")} - code == set(), "in the tree, but not there"


def test_the_house_has_few_rooms_and_the_readme_is_short():
    rooms = {path.name for path in (ROOT / "proteus_playground").iterdir() if not path.is_symlink()} - {"__pycache__"}
    assert len(rooms) <= 9, rooms
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("mark", ["run", "test"])
def test_the_commands_are_one_line(mark):
    lines = [line for line in between(mark).strip().splitlines() if not line.startswith("```")]
    assert lines == [f"python3 -m proteus_playground.cli.setup {dict(run='play', test='test')[mark]}"]


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_pictures_and_pages_that_a_page_links_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.slow
def test_a_wheel_holds_widgets_notebooks_and_the_story(tmp_path):
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "test_*.py")
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("building needs setuptools from PyPI, which cannot be reached")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    wanted = {
        f"{name.replace('.', '/')}/{path.relative_to(folder).as_posix()}"
        for name, folder in packages().items()
        for path in [*folder.glob("*.*"), *folder.glob("*_data/*"), *folder.glob("data/*"), *folder.glob("weights/*")]
        if path.is_file() and not path.name.endswith(".pyc")
    }
    studies = {path.name for path in (ROOT / "experiments" / "results").glob("*.json") if "evidence" not in path.name}
    wanted -= {f"proteus_playground/experiments/results/{name}" for name in studies}
    assert wanted <= names, wanted - names
    assert not any(name.startswith(("widgets/", "experiments/", "notebooks/", "tests/")) for name in names)
