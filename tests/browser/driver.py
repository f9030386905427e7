"""Drives JupyterLab in headless Chromium: what the browser tests and `proteus bench slider` share."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

NOTEBOOK = "00_start_here.ipynb"
SLIDERS = ("flux-alpha", "keep-ratio", "shortlist", "dna-fraction")
CHROMIUM_ARGS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--no-first-run")  # fmt: skip
READY_MS = 180_000
HANDLE = ":is(.noUi-handle, .ui-slider-handle)"  # of a slider of ipywidgets 8, and of 7
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # the workbench stays in the page when it is scrolled away
}
# Before a notebook asks for a kernel it also says that it is idle; cells that are run then are lost, or a dialog opens.
CONNECTED = """() => {
  const name = document.querySelector('.jp-Toolbar-kernelName')?.innerText;
  const state = document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;
  return state === 'idle' && name && name !== 'No Kernel';
}"""
STARTED = """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(
  (e) => /\\[(\\*|\\d+)\\]/.test(e.textContent))"""
# Waits until figure, readout and text all hold a newer request than `old`, and resolves after the frame that shows
# them is painted. It listens and does not poll, since asking for frames would itself cost time.
WATCH = """(old) => {
  const app = document.querySelector('.pp-app');
  const figure = app.querySelector('.js-plotly-plot');
  window.ppPainted = new Promise((resolve) => {
    let pressed = null;
    let plotted = 0;
    const look = () => {
      const readout = +app.querySelector('.pp-readout').dataset.request;
      const text = +app.querySelector('.pp-text').dataset.request;
      if (pressed === null || readout <= old || text < readout || plotted < readout) return;
      watcher.disconnect();
      const channel = new MessageChannel();
      channel.port1.onmessage = () => resolve(performance.now() - pressed);
      requestAnimationFrame(() => channel.port2.postMessage(0));
    };
    const watcher = new MutationObserver(look);
    watcher.observe(app, { childList: true, subtree: true, attributeFilter: ['data-request'] });
    figure.on('plotly_afterplot', () => {
      plotted = Math.max(...figure.data.map((trace) => trace.meta || 0));
      look();
    });
    addEventListener('keydown', (event) => { pressed = event.timeStamp; }, { capture: true, once: true });
  });
}"""


def chromium() -> str | None:
    """The browser to drive: $PROTEUS_CHROMIUM, else the first on the path."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("PROTEUS_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def jupyter_lab(folder: Path, env: dict[str, str] | None = None) -> Iterator[str]:
    """JupyterLab over `folder` with settings of its own; yields its address and stops it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="proteus-lab-") as home:
        places = {f"JUPYTER_{name}_DIR": f"{home}/{name.lower()}" for name in ("CONFIG", "DATA", "RUNTIME")}
        places["IPYTHONDIR"] = f"{home}/ipython"
        for name, setting in SETTINGS.items():
            path = Path(home) / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(setting))
        line = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--allow-root",
                f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--ServerApp.token=",
                "--ServerApp.disable_check_xsrf=True",
                f"--ServerApp.root_dir={folder}", f"--LabApp.workspaces_dir={home}/workspaces",
                f"--LabApp.user_settings_dir={home}/settings"]  # fmt: skip
        log = open(Path(home) / "log", "w+")  # noqa: SIM115 - closed below, after the server that writes to it
        server = subprocess.Popen(line, env={**os.environ, **places, **(env or {})}, stdout=log, stderr=log)
        try:
            _wait_for(f"http://127.0.0.1:{port}/api", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            if server.poll() is None:
                server.kill()
            log.close()


def _wait_for(address: str, server: subprocess.Popen, log) -> None:
    for _ in range(300):
        with contextlib.suppress(URLError, OSError), urlopen(address, timeout=2):
            return
        if server.poll() is not None:
            break
        time.sleep(0.2)
    log.seek(0)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read()[-2000:]}")


def run_all(page, address: str, notebook: str = NOTEBOOK, ready_ms: int = READY_MS) -> None:
    """Opens `notebook` in a page, runs every cell and waits until the workbench is up to date."""
    start_all(page, address, notebook)
    page.wait_for_selector(".pp-text[data-request]", state="attached", timeout=ready_ms)
    settle(page, ready_ms)
    page.locator(".pp-app").scroll_into_view_if_needed()


def start_all(page, address: str, notebook: str) -> None:
    """Opens `notebook` in a page and has every cell run."""
    from playwright.sync_api import TimeoutError

    page.goto(f"{address}/lab/tree/{notebook}?reset")
    page.wait_for_function(CONNECTED, timeout=90_000)
    for _ in range(5):  # a kernel that has only just said that it is idle may miss the first call
        if page.locator(".jp-Dialog").count():
            page.keyboard.press("Escape")  # on a busy machine JupyterLab may ask about a kernel that is still coming up
        with contextlib.suppress(TimeoutError):
            page.click('.lm-MenuBar-item:has-text("Run")', timeout=8_000)
            page.click('[data-command="runmenu:run-all"]', timeout=8_000)
            page.wait_for_function(STARTED, timeout=20_000)
            break


def settle(page, timeout: int = 30_000) -> int:
    """Waits until nothing is stale and the browser has drawn the last request, and returns its number."""
    page.wait_for_function(
        """() => {
          const readout = document.querySelector('.pp-readout');
          const text = document.querySelector('.pp-text');
          const fresh = document.querySelector('.pp-status.pp-fresh');
          return fresh && readout && text && +readout.dataset.request > 0
            && readout.dataset.request === text.dataset.request;
        }""",
        timeout=timeout,
    )
    return int(page.locator(".pp-readout").get_attribute("data-request"))


def press(page, slider: str, key: str) -> float:
    """One key on one slider; milliseconds until all of the workbench shows what came of it."""
    old = settle(page)
    page.focus(f".pp-knob-{slider} {HANDLE}")
    page.evaluate(WATCH, old)
    page.keyboard.press(key)
    return page.evaluate("window.ppPainted")
