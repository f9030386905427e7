"""`playground()`, `stream_panel()` and `bank_panel()`: the calls that a notebook needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from proteus_playground.bank_reading import Reading

from .bank_panel import BankPanel
from .state import PlayState, check, parse
from .stream_frames import Source
from .stream_panel import StreamPanel
from .stream_state import StreamState
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


def make_source(model: str, text: str, tokens: int, stop, progress) -> Source:
    """A text as tokens of `model`, or as whole words with random vectors where it is not pulled."""
    from proteus_playground.experiments.haystacks import build
    from proteus_playground.streaming.random_words import RandomWords

    why = "" if model == "random" else _why_not(model)
    if model == "random" or why:
        words = RandomWords()
    else:
        from proteus_playground.hf.embeddings import PulledWords

        words = PulledWords(model)
    progress(0.3, f"reading {tokens:,} tokens of {text}")
    return Source(words, build(text, tokens, words), why)


def make_subject(model: str, folder: str):
    """The model itself, ready to score in context and to answer; the keys it makes are kept in `folder`."""
    from proteus_playground.experiments.subjects import load

    return load(model, cache=Path(folder) / f"{model}.keys")


def stream_panel(
    text: str | None = None,
    prompt: str | None = None,
    needle: str | None = None,
    *,
    source: Source | None = None,
    subject=None,
    **settings,
) -> StreamPanel:
    """The chunk buffer panel, to `display(...)`.

    text: "pydoc", "jargon" or "bible" where they are installed, "auto", or the path of a UTF-8 file; prompt: what is
    asked; needle: a sentence to plant, "" for none; settings: `page` to plant it on, `tokens` of the document, `model`
    ("smollm2" or "random"), `chunk_tokens`, `per_chunk_budget`, `buffer_tokens`, `neighbours`. source, subject: a ready
    document, and what scores it in context and answers, instead. Random word vectors stand in for a model that is not
    pulled. Raises ValueError or TypeError naming what is not allowed.
    """
    state = StreamState()
    named = {"text": text, "prompt": prompt, "needle": needle}
    state.update({**{name: value for name, value in named.items() if value is not None}, **settings})
    made = make_source if source is None else lambda *_: source
    return StreamPanel(state, made, make_subject if subject is None else lambda *_: subject)


def bank_panel(
    text: str = "humble token",
    model: str = "smollm2",
    *,
    tokens: int = 1024,
    start: int = 256,
    layer: int = 12,
    group: int = 1,
    reading: Reading | None = None,
) -> BankPanel:
    """The KV bank panel, to `display(...)`.

    text: a name or path for `load_text`; model: "smollm2" or "random"; tokens: of the text that are read before the
    model writes on, `start` of them at once; layer, group: whose bank is shown first; reading: a ready `Reading`
    instead. A random layer stands in for a model that is not pulled.
    """
    from proteus_playground.bank_reading import open_reading
    from proteus_playground.texts import load_text

    check("model", model)

    def make() -> tuple[Reading, str]:
        if reading is not None:
            return reading, ""
        why = "" if model == "random" else _why_not(model)
        return open_reading(load_text(text), "random" if why else model, tokens=tokens, start=start), why

    return BankPanel(make, layer, group)
