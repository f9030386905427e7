"""Outputs replace nothing but plain files: every option of every command, every `save`, every writer of the package."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import stat
import tempfile
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
from every_option import EVERY

import proteus_playground
from proteus_playground.cli import app as cli
from proteus_playground.common import files, outputs

PACKAGE = Path(proteus_playground.__file__).parent
# Options whose help speaks of a file, a folder or a page, and which write nothing to it.
INPUTS = {
    "stream FILE", "stream --prompt", "stream --generated", "train --start", "duel --text", "duel --tokenizer",
    "verify --pairs", "verify --haystack", "bench page REPORT", "bench exam --model", "bench top-a --model",
    "bench choice --text", "bench adaptation --text", "bench prototypes --calibrate", "quality --text",
    "quality --selector",
    "bench healing --text", "bench healing --held-out", "bench healing --plan", "bench healing --start",
    "bench tiny --text",
    "heal FOLDER", "heal --data",
    "quality --model", "quality TARGET", "convert MODEL", "models pull NAME", "models remove NAME", "models heads NAME",
    "export FOLDER", "bench model --model", "convert --copy",
}  # fmt: skip
SPEAKS_OF_FILES = re.compile(r"\b(files?|folder|page)\b|\.npy", re.IGNORECASE)


CHECKED = {outputs.output_file: "file", outputs.report_file: "file", outputs.output_folder: "folder"}
OUTPUTS = [(path, typed, info.callback) for path, typed, info, _ in EVERY if info.callback in CHECKED]


def test_every_option_that_speaks_of_a_file_is_a_checked_output_or_a_known_input():
    found = {
        f"{' '.join(path)} {typed}"
        for path, typed, info, kind in EVERY
        if info.callback not in CHECKED
        and (Path in (kind, *typing.get_args(kind)) or SPEAKS_OF_FILES.search(f"{typed} {info.help or ''}"))
    }
    assert found <= INPUTS, "give it a callback of common.outputs, or list it here as an input"
    assert len(OUTPUTS) >= 20 and len({path for path, *_ in OUTPUTS}) >= 15


@pytest.fixture
def node(tmp_path, monkeypatch):
    """Make a thing that is no plain file, in the current folder, and say whether it is still the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))

    def make(kind: str) -> str:
        if kind == "device":
            try:
                os.mknod("node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            except OSError:
                pytest.skip("device nodes cannot be made here")
        elif kind == "FIFO":
            os.mkfifo("node")
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind("node")
        elif kind == "folder":
            os.mkdir("node")
        elif kind == "plain file":
            Path("node").write_text("the user's")
        elif kind == "link to a FIFO":
            os.mkfifo("target")
            os.symlink("target", "node")
        elif kind == "ring of links":
            os.symlink("node", "node")
        elif kind == "file as parent":
            Path("plain").write_text("the user's")
            return "plain/node"
        return "node"

    return make


KINDS = {
    "file": ("FIFO", "folder", "socket", "device", "link to a FIFO", "ring of links", "file as parent"),
    "folder": ("FIFO", "plain file", "socket", "device", "link to a FIFO", "ring of links", "file as parent"),
}


def listing() -> list:
    found = ((path, path.lstat()) for path in sorted(Path().rglob("*")))
    return [(str(path), seen.st_mode, seen.st_ino, seen.st_size, seen.st_mtime_ns) for path, seen in found]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("path", "typed", "kind"),
    [(path, typed, kind) for path, typed, callback in OUTPUTS for kind in KINDS[CHECKED[callback]]],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_is_no_plain_file_is_refused_before_any_work(path, typed, kind, node, capsys):
    target = node(kind)
    before = listing()
    Path("report.json").write_text("{}")
    arguments = [typed, target] if typed.startswith("--") else ["report.json", target]
    with pytest.raises(SystemExit) as end:
        cli.main([*path, *arguments])
    Path("report.json").unlink()
    error = capsys.readouterr().err
    assert end.value.code in (1, 2) and typed in error and target in error
    assert ("FIFO" in error) == ("FIFO" in kind)
    assert listing() == before


@pytest.mark.parametrize(("path", "typed", "callback"), OUTPUTS, ids=lambda value: getattr(value, "__name__", value))
def test_links_new_names_and_home_are_allowed(path, typed, callback, node, tmp_path, monkeypatch):
    node("folder" if CHECKED[callback] == "folder" else "plain file")
    os.symlink("node", "link")
    os.symlink("nowhere", "dangling")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = listing()
    param = SimpleNamespace(opts=[typed], param_type_name="option")
    for place in ("node", "link", "dangling", "new", "a/b/c", Path("new"), "", None):
        assert callback(param, place) == place
    assert callback(param, "~/new") == str(tmp_path / "new")
    assert listing() == before, "a check makes nothing"


def test_a_link_stays_a_link_and_its_target_is_replaced_as_a_whole(node, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "target"
    target.write_text("old")
    target.chmod(0o600)
    os.symlink("elsewhere/target", "link")
    os.symlink("link", "link to link")
    old = target.stat().st_ino
    with files.whole("link to link") as part:
        assert part.parent == target.parent, "on the target's own file system"
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and target.stat().st_ino != old
    assert Path("link").is_symlink() and Path("link to link").is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o600, "the user's rights stay"
    os.symlink("elsewhere/new", "dangling")
    files.write_json("dangling", [1])
    assert Path("dangling").is_symlink() and json.loads((tmp_path / "elsewhere" / "new").read_text()) == [1]
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["new", "target"]


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", KINDS["file"])
@pytest.mark.parametrize("write", [files.write_json, lambda path, lines: files.append_lines(Path(path), lines)])
def test_writers_refuse_it_too(write, kind, node):
    target = node(kind)
    before = listing()
    with pytest.raises(OSError, match=target.split("/")[0]):
        write(target, [{"a": 1}])
    assert listing() == before


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a/" + "x" * 300], ids=["long", "NUL", "long in a folder"])
@pytest.mark.parametrize("check", [files.check_place, files.check_folder, files.write_json])
def test_names_that_the_system_does_not_allow(check, name, node):
    with pytest.raises(OSError, match=r"(--out|path) cannot be written|File name too long"):
        check(name, "--out")


@pytest.mark.bad_input
@pytest.mark.parametrize("code", ["EACCES", "EROFS", "ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("check", [files.check_place, files.check_folder])
def test_a_folder_that_nothing_can_be_written_into(check, code, node, monkeypatch):
    import errno

    def refuse(dir):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="--out cannot be written in") as caught:
        check("new/deep", "--out")
    assert caught.value.errno == getattr(errno, code) and not Path("new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("check", [files.check_place, files.check_folder])
def test_a_folder_without_rights(check, node):
    os.mkdir("locked", 0o500)
    with pytest.raises(PermissionError, match="--out cannot be written in"):
        check("locked/new", "--out")


@pytest.fixture(scope="module")
def saves():
    """Everything that has a public `save`, by name."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from helpers import layer
    from tiny_llama import build

    from proteus_playground.hf.cache import ProteusCache
    from proteus_playground.lm.model import ModelConfig, ProteusLM

    attn, (llama, _) = layer(), build()
    _, bank = attn.prefill(torch.randn(1, 40, attn.cfg.d_model))
    lm = ProteusLM(ModelConfig(vocab_size=16, n_layers=1, attention=attn.cfg)).eval()
    heads = layer(d_model=48, n_heads=6)  # of the shape of the llama
    things = {"ProteusAttention": attn, "KVBank": bank, "ProteusLM": lm, "ModelState": lm.new_state()}
    things["ProteusCache"] = ProteusCache(llama, {0: heads.gates}, heads.cfg)
    return things


@pytest.mark.bad_input
@pytest.mark.parametrize("kind", KINDS["file"])
@pytest.mark.parametrize("name", ["ProteusAttention", "KVBank", "ProteusLM", "ModelState", "ProteusCache"])
def test_save_refuses_it_too(name, kind, node, saves):
    target = node(kind)
    before = listing()
    with pytest.raises(OSError, match=target.split("/")[0]):
        saves[name].save(target)
    assert listing() == before


@pytest.mark.parametrize("name", ["ProteusAttention", "KVBank", "ProteusLM", "ModelState", "ProteusCache"])
def test_save_writes_the_target_of_a_link(name, node, saves):
    os.symlink("target", "link")
    saves[name].save("link")
    saves[name].save("link")
    assert Path("link").is_symlink() and Path("target").stat().st_size > 100


WRITERS = {"write_text", "write_bytes", "save_file", "symlink_to", "tofile"}
ALLOWED_WRITERS = {
    "common/files.py": "whole, and append_lines after file_place",
    "common/tensors.py": "save_file to the part of whole",
    "cli/play.py": "write_bytes to the part of whole",
    "cli/stream_passes.py": "appends to the log that write_text has just made",
    "experiments/duel/files.py": "csv to the part of whole",
    "experiments/speed/measure.py": "/proc/self/clear_refs",
    "experiments/speed/slider.py": "a notebook in a temporary folder",
    "experiments/speed/stream.py": "embeddings in a temporary folder",
    "hf/convert.py": "copies into a hidden folder, which becomes the checked one when all is written",
    "hf/export.py": "the same",
    "hf/fetch.py": "a download in a folder of its own",
    "hf/healing/session.py": "a hidden folder, which takes the place of the old one when all is written",
    "hf/key_reader.py": "appends after file_place",
    "hf/models.py": "a record in a folder of its own",
    "streaming/token_cache.py": "the part of whole",
}


def test_nothing_else_in_the_package_writes_files():
    """A new writer uses `common.files`, or says here why it need not."""
    found = set()
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "experiments").resolve().rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = PACKAGE if path.is_relative_to(PACKAGE) else (PACKAGE / "experiments").resolve().parent
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("files")
            for alias in node.names
        }
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            owner = getattr(getattr(call.func, "value", None), "id", "")
            modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
            opens = name == "open" and any(isinstance(m, str) and set(m) & set("wax+") and len(m) < 4 for m in modes)
            replaces = owner in ("os", "shutil") and name in ("replace", "rename", "move", "copy", "copyfile")
            saves = name == "save" and owner in ("torch", "np")
            if opens or replaces or saves or (name in WRITERS - imported and owner != "files"):
                found.add(str(path.relative_to(top)).removeprefix("proteus_playground/"))
    assert found <= set(ALLOWED_WRITERS)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("files", "twice"),
    [
        ({"FILE": "a.txt", "--json": "a.txt"}, "--json='a.txt' is the file of FILE"),
        ({"--json": "a.txt", "--events": "./a.txt"}, "--events"),
        ({"--events": "link", "--checkpoint": "a.txt"}, "--checkpoint"),
        ({"--out": Path("b/../a.txt"), "--page": Path("a.txt")}, "--page"),
    ],
)
def test_two_arguments_never_lead_to_one_file(files, twice, node):
    os.symlink("a.txt", "link")
    with pytest.raises(ValueError, match=twice):
        outputs.check_different(files)
    outputs.check_different({"--json": "", "--events": None, "--checkpoint": "a.txt", "FILE": "a"})


@pytest.mark.bad_input
@pytest.mark.parametrize("option", ["--json", "--events", "--checkpoint"])
def test_a_stream_never_writes_over_its_document(option, node, capsys):
    Path("doc.txt").write_text("the user's only copy\n" * 50)
    before = listing()
    with pytest.raises(SystemExit):
        cli.main(["stream", "doc.txt", "--model", "layer", "--prompt", "copy", option, "doc.txt"])
    assert f"{option}='doc.txt' is the file of FILE" in capsys.readouterr().err and listing() == before


def test_every_output_of_a_stream_may_be_a_link(node, capsys):
    Path("doc.txt").write_text("a note about tea, and a page about soup\n" * 50)
    for name in ("json", "events", "checkpoint"):
        os.symlink(f"{name}.target", name)
    arguments = ["--json", "json", "--events", "events", "--checkpoint", "checkpoint", "--no-answer", "--cache", "c"]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            cli.main(["stream", "doc.txt", "--model", "layer", "--prompt", "tea", *arguments])
        assert not end.value.code, capsys.readouterr().err
    assert all(Path(name).is_symlink() for name in ("json", "events", "checkpoint"))
    assert json.loads(Path("json.target").read_text())["kept"] and Path("checkpoint.target").stat().st_size


@pytest.mark.bad_input
def test_a_folder_of_copied_notebooks_keeps_what_is_no_file(node, monkeypatch, tmp_path):
    from proteus_playground.cli import play

    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / play.FIRST).write_text("{}")
    os.mkdir("mine")
    os.mkfifo(f"mine/{play.FIRST}")
    with pytest.raises(FileExistsError, match="--dir cannot be written: it is a FIFO"):
        play.copy_notebooks(shipped, Path("mine"))
    assert stat.S_ISFIFO(os.stat(f"mine/{play.FIRST}").st_mode)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["settings.json", "rows.jsonl", "report.json", ""])
def test_a_run_folder_is_looked_through_before_the_run(name, node):
    from proteus_playground.common.runs import RunFolder

    if name:
        os.mkdir("run")
    os.mkfifo(Path("run", name))
    with pytest.raises(OSError, match="out cannot be written: it is a FIFO"):
        RunFolder(Path("run"), "settings.json", "rows.jsonl", ("report.json",)).claim({"seed": 1})


@pytest.mark.bad_input
@pytest.mark.parametrize("suffix", [".npy", ".json", ".lock"])
def test_a_token_cache_keeps_what_is_no_file(suffix, node):
    from proteus_playground.streaming.sources import TextRows
    from proteus_playground.streaming.token_cache import TokenCache
    from proteus_playground.streaming.tokenising import Work

    cache = TokenCache(Path("cache"), "stem", {"made": "of words"})
    os.mkdir("cache")
    place = Path("cache", ".stem.lock" if suffix == ".lock" else f"stem{suffix}")
    os.mkfifo(place)
    with pytest.raises(OSError, match="it is a FIFO.*cache folder"):
        cache.make(Work(TextRows("t", [{"text": "tea"}], "1"), lambda text: [1, 2]))
    assert stat.S_ISFIFO(os.stat(place).st_mode)


@pytest.mark.bad_input
def test_a_cache_of_keys_refuses_what_is_no_file(node):
    pytest.importorskip("transformers")
    from proteus_playground.hf.key_reader import WindowCache

    with pytest.raises(OSError, match="cache cannot be written: it is a FIFO"):
        WindowCache(Path(node("FIFO")), "model", 8)


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
{make}
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    write(Path("out"))
except OSError as err:
    print("refused:", err)
"""
FILES = "from proteus_playground.common import files\n"
WRITERS_OF_MUCH = {
    "write_text": FILES + "write = lambda path: files.write_text(path, 'tea ' * 5000)",
    "write_json": FILES + "write = lambda path: files.write_json(path, [1] * 5000)",
    "append_lines": FILES + "write = lambda path: files.append_lines(path, [{'a': 1}] * 5000)",
    "ProteusAttention.save": "from helpers import layer\nwrite = layer().save",
}


@pytest.mark.parametrize("name", WRITERS_OF_MUCH)
def test_a_full_disk_leaves_the_earlier_file(name, node):
    """A limit on file sizes stands in for a full disk: the system takes a part of a write, and then refuses."""
    import subprocess
    import sys

    Path("out").write_text('{"earlier": 1}\n')
    script = FULL.format(tests=str(Path(__file__).parent.parent), make=WRITERS_OF_MUCH[name])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "refused:" in done.stdout, done.stdout + done.stderr
    if name == "append_lines":  # the lines before stay, and a next call goes on after them
        assert files.read_lines(Path("out"))[0] == {"earlier": 1}
        files.append_lines(Path("out"), [{"last": 1}])
        assert files.read_lines(Path("out"))[-1] == {"last": 1}
    else:
        assert Path("out").read_text() == '{"earlier": 1}\n'
    assert [path.name for path in Path().iterdir()] == ["out"]
