"""Opens any model by its name: a pulled one, a folder or GGUF of the user's own, a converted folder, an exported model.

The playground, `proteus stream`, `verify`, `quality` and the benchmarks open models here.
"""

from __future__ import annotations

from pathlib import Path

from . import models
from .own.stanza import is_own


def load(name: str, device: str = "cpu", dtype=None):
    """The model called `name`, in evaluation mode and without gradients, and its tokenizer; errors as of `models.load`.

    A converted folder gives its base with what healing changed; an exported model gives its dense pass.
    """
    place = models.find(name)
    if not _converted(place):
        model, tokenizer = models.load(name, device, dtype)
        if hasattr(model, "slider"):
            model.flux_alpha = 0.0
        return model, tokenizer
    from .own.folder import open_folder

    slider = open_folder(place.home, device, dtype)
    return slider.model, slider.tokenizer


def load_source(name: str, device: str = "cpu", dtype=None):
    """The model called `name` as a `ModelSource`. The gates of a converted or exported one are the source's own."""
    from .source import ModelSource

    place = models.find(name)
    if _converted(place):
        from .own.folder import open_folder

        return open_folder(place.home, device, dtype).source()
    model, tokenizer = models.load(name, device, dtype)
    if not hasattr(model, "slider"):
        return ModelSource(model, tokenizer, title(name))
    from .own.folder import SliderModel

    slider = model.slider()
    return SliderModel(model, tokenizer, slider.stanza, slider.gates, title(name)).source()


def title(name: str) -> str:
    """How a model is called on a panel and in a report: a folder or a file by the last part of its path."""
    place = models.find(name)
    return name if place.known else place.label


def files_of(name: str) -> Path:
    """The folder with the tokenizer and the weights of a model, of a converted folder those of its base."""
    place = models.find(name)
    if not _converted(place):
        return models.place_of(name)
    from .own.folder import read_folder

    return read_folder(place.home).base_path()


def base_name(name: str) -> str:
    """The name under which a model's retrieval heads are kept; for a converted or healed model, that of its base."""
    place = models.find(name)
    if not _converted(place):
        return place.base or (name if place.known else str(place.gguf or place.home))
    from .own.folder import read_folder

    return read_folder(place.home).stanza.base.model


def _converted(place: models.Place) -> bool:
    return place.mine and is_own(place.home)
