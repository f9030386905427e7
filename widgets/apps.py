"""`playground()`: the one call that a notebook needs."""

from __future__ import annotations

from collections.abc import Mapping

from .state import PlayState, parse
from .workbench import Workbench


def make_probe(source: Mapping, stop, progress) -> tuple:
    """(a `LayerProbe`, why it is random or ""). The model when it is pulled and its libraries are here."""
    from proteus_playground.probe import LayerProbe
    from proteus_playground.texts import load_text, pasted

    text = pasted(source["pasted"]) if source["pasted"] else load_text(source["text"])
    if source["model"] == "random":
        return LayerProbe.random_layer(text, max_tokens=source["length"]), ""
    why = _why_not(source["model"])
    if why:
        return LayerProbe.random_layer(text, max_tokens=min(source["length"], 512)), why
    return LayerProbe.from_pulled(text, model=source["model"], max_tokens=source["length"], progress=progress,
                                  stop=stop), ""  # fmt: skip


def _why_not(model: str) -> str:
    """Empty where `model` can be loaded; else one sentence on what to do."""
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        return "SmolLM2 needs the hf extra: pip install 'proteus-playground[hf]'."
    from proteus_playground.hf.models import is_pulled

    if not is_pulled(model):
        return (
            "SmolLM2 is not on this machine: run “proteus models pull smollm2” (98 MB), or press Pull under "
            "More controls."
        )
    return ""


def playground(
    text: str | None = None,
    model: str | None = None,
    *,
    length: int | None = None,
    state: str | Mapping | None = None,
    probe=None,
    **settings,
) -> Workbench:
    """A workbench to `display(...)`.

    text: "humble token", "python topics" or the path of a UTF-8 file; model: "smollm2" or "random"; length: tokens
    to read, 64 to 4,096; state: a short string such as "alpha=0.35&L=64&layer=12", JSON or a dict, as the workbench's
    own share box gives it; settings: any field of the state by name, such as `flux_alpha=0.5` or `layer=3`.
    What is named as an argument wins over `state`. probe: a ready `LayerProbe` to look at instead.
    Raises ValueError or TypeError naming what is not allowed. A random layer stands in for a model that is not pulled.
    """
    now = PlayState()
    named = {"text": text, "model": model, "length": length}
    now.restore({**parse(state or {}), **{key: v for key, v in named.items() if v is not None}, **settings})
    if probe is not None:
        return Workbench(now, lambda source, stop, progress: (probe, ""))
    return Workbench(now, make_probe)
