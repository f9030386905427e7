"""One JupyterLab and one browser for all files of this folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from notebook_page import notebook_page


@pytest.fixture(scope="session")
def browser_lab(tmp_path_factory) -> Iterator[tuple]:
    """(page, address, folder that JupyterLab shows)"""
    folder = tmp_path_factory.mktemp("lab")
    with notebook_page(folder) as (page, address):
        yield page, address, folder


@pytest.fixture(scope="module")
def folder(browser_lab) -> Path:
    return browser_lab[2]


@pytest.fixture(scope="module")
def lab(browser_lab) -> Iterator[tuple]:
    """(page, address) without complaints of an earlier file; the file's kernels are ended after it."""
    page, address, _ = browser_lab
    page.set_viewport_size({"width": 1400, "height": 1060})
    page.complaints.clear()
    yield page, address
    page.goto("about:blank")
    for session in json.load(urlopen(f"{address}/api/sessions")):
        urlopen(Request(f"{address}/api/sessions/{session['id']}", method="DELETE"))
