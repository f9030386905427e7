"""`playground()` and the functions that make the other panels.

Each returns a panel to `display(...)`. `panel.close()` releases it; running its notebook cell again closes the panel
that the cell made before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch
from proteus_playground.experiments.duel.curve import held_out_curve
from proteus_playground.experiments.duel.duel import PRESETS, duel
from proteus_playground.experiments.evidence.committed import Study, committed
from proteus_playground.experiments.needles import haystacks, subjects
from proteus_playground.experiments.needles.live import live as live_needles
from proteus_playground.experiments.needles.pairs import load_pairs
from proteus_playground.experiments.speed.wall import LENGTHS, LIMIT_S, climb

from proteus_playground.attention.selectors import OURS, SELECTORS, Selector, check_selector, register
from proteus_playground.common.checks import whole_number
from proteus_playground.common.progress import Progress, Stop
from proteus_playground.common.texts import load_text, pasted
from proteus_playground.hf.models import DEFAULT, find, is_pulled
from proteus_playground.hf.opening import title
from proteus_playground.lm import shipped
from proteus_playground.lm.shelf import shelf
from proteus_playground.playground.bank_reading import BankReader, open_reading
from proteus_playground.playground.live import Live, open_live
from proteus_playground.playground.probe import LayerProbe
from proteus_playground.playground.shelf_probe import open_shelf
from proteus_playground.streaming.random_words import RandomWords

from .bank.panel import BankPanel
from .duel.panel import DuelPanel
from .evidence.panel import CASES, EvidencePanel
from .needles.panel import NeedlePanel
from .parts.panel import Panel
from .parts.state import SHELF, PlayState, parse
from .prototypes.panel import PrototypePanel
from .stream.frames import Source
from .stream.panel import StreamPanel
from .stream.state import StreamState
from .stream.state import check as check_stream
from .touch.panel import KINDS, TouchPanel
from .wall.panel import WallPanel
from .workbench.ways_box import verdict_html
from .workbench.workbench import Workbench

FIRST_QUESTION = "what does the copper engine cost?"  # the shelf that opens first answers it


def make_probe(source: Mapping, stop, progress) -> tuple:
    """(a `LayerProbe`, why its layer is random or ""). It is random without the model or its libraries.

    source: the traits that `workbench.SOURCE` names, and the `settings`. Only shelf-mini answers the question.
    """
    model, length = source["model"], source["length"]
    why = "" if model == "random" else _why_not(model)
    if model == "shelf-mini" and not why:
        return _ask_shelf(source, stop, progress), ""
    text = _text(source)
    if model == "random" or why:
        return LayerProbe.random_layer(text, max_tokens=min(length, 512) if why else length), why
    return LayerProbe.from_pulled(text, model=model, max_tokens=length, progress=progress, stop=stop), ""


def _ask_shelf(source: Mapping, stop, progress):
    written = source["text"] == SHELF and not source["pasted"]
    probe = open_shelf(
        *_shipped(source["model"]), None if written else _text(source), number=source["shelf"],
        question=source["question"], max_tokens=source["length"], progress=progress, stop=stop,
    )  # fmt: skip
    probe.start = probe.finder(source["settings"])  # computed here, because it would hold up the thread that draws
    return probe


def _text(source: Mapping):
    if source["pasted"]:
        return pasted(source["pasted"])
    if source["text"] != SHELF:
        return load_text(source["text"])
    return pasted(shelf(source["shelf"], max(1, source["length"] // 10)).text, SHELF, "written by the package")


@lru_cache(maxsize=1)
def _shipped(name: str) -> tuple:
    """A shipped model and its tokenizer, kept so that a question does not read the weights again."""
    return shipped.load_shipped(name)


def _why_not(model: str) -> str:
    """Empty if `model` can be loaded, else a sentence that says what to do."""
    if model == "shelf-mini":
        try:
            _shipped(model)
        except FileNotFoundError:
            return "The weights of shelf-mini are not in this install: get proteus-playground again, or train them."
        return ""
    if find_spec("transformers") is None:
        return f"{find(model).label} needs the hf extra: pip install 'proteus-playground[hf]'."
    if is_pulled(model):
        return ""
    place = find(model)
    return (
        f"{place.label} is not on this machine: run “proteus models pull {model}”{place.download}, "
        "or press Pull under More controls."
    )


def playground(
    text: str | None = None,
    model: str | None = None,
    *,
    length: int | None = None,
    state: str | Mapping | None = None,
    probe=None,
    selector: str | Callable | None = None,
    hide: Iterable[str] = (),
    fixed: Mapping | None = None,
    tour: bool | int = False,
    **settings,
) -> Workbench:
    """A workbench to `display(...)`.

    text: "a shelf" (number `shelf`), "humble token", "python topics" or the path of a UTF-8 file; model: "shelf-mini",
    "random" or a language model (a known name, a hub id, the path of a folder or of a GGUF file);
    length: tokens to read, 64 to 4,096; question: asked of shelf-mini behind the text; state: a short string such as
    "alpha=0.35&L=64&layer=12", JSON or a dict, as the workbench's own share box gives it;
    settings: any other field of the state by name, such as `flux_alpha=0.5` or `layer=3`. An argument
    takes precedence over `state`. selector: what chooses the keys: "ours", the name of a selector, or a function of
    your own (docs/selectors.md), which is checked first; the panel shows the result. hide: controls that are not shown,
    such as "keep_ratio", "presets", "selectors"; fixed: values that no control can change, such as {"flux_alpha": 1}.
    tour: True opens the guided tour, a whole number its step.
    Without any argument the panel opens with a question that is asked already. probe: a ready `LayerProbe`
    to show instead. A model that is not pulled is replaced by a random layer, and the panel says so. ValueError or
    TypeError names an argument that is not allowed.
    """
    now = PlayState()
    named = {"text": text, "model": model, "length": length, "tour": 1 if tour is True else tour or None}
    now.restore({**parse(state or {}), **{key: v for key, v in named.items() if v is not None}, **settings})
    verdict = ""
    if selector is not None:
        name, verdict = guest(selector) if callable(selector) else (selector, "")
        now.update({"selector": name})
    if probe is None and not (state or text or model or length or settings) and now.model == "shelf-mini":
        now.question = FIRST_QUESTION
    made = Workbench(now, make_probe if probe is None else lambda source, stop, progress: (probe, ""), verdict)
    try:
        made.fix(fixed or {})
        made.hide(hide)
    except (TypeError, ValueError):
        made.close()
        raise
    return made


def guest(choose: Callable) -> tuple[str, str]:
    """Checks a function as a selector and registers it. (Its name, or "ours" where it breaks a rule; the verdict.)"""
    made = next((one for one in SELECTORS.values() if one.choose is choose), None)
    name = getattr(choose, "__name__", "yours") if made is None else made.name
    title = (choose.__doc__ or f"{name}, a function of your own.").strip().split("\n")[0]
    try:
        check_selector(made or Selector(name, choose, title))
        if made is None:
            register(name, title)(choose)
    except Exception as err:  # whatever a function of a guest may raise
        return OURS, verdict_html(name, str(err) or type(err).__name__)
    return name, verdict_html(name)


def make_source(model: str, text: str, tokens: int, stop, progress) -> Source:
    """A text as tokens of `model`, or as whole words with random vectors where it is not pulled."""
    why = "" if model == "random" else _why_not(model)
    if model == "random" or why:
        words = RandomWords()
    else:
        from proteus_playground.hf.embeddings import PulledWords

        words = PulledWords(model)
    progress(0.3, f"reading {tokens:,} tokens of {text}")
    return Source(words, haystacks.build(text, tokens, words), why)


def make_subject(model: str, folder: str):
    """The model, ready to score in context and to answer; the keys that it computes are kept in `folder`."""
    return subjects.load(model, cache=Path(folder) / f"{title(model)}.keys".replace("/", "--"))


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

    text: "pydoc", "jargon" or "bible" where they are installed, "auto", or the path of a UTF-8 file; prompt: the
    question; needle: a sentence to plant, "" for none; settings: `page` to plant it on, `tokens` of the document,
    `model` (a language model or "random"), `chunk_tokens`, `per_chunk_budget`, `buffer_tokens`, `neighbours`. source,
    subject: a ready document, and a ready model that scores it in context and answers. A model that is not pulled is
    replaced by random word vectors, and the panel says so. ValueError or TypeError names an argument that is not
    allowed.
    """
    state = StreamState()
    named = {"text": text, "prompt": prompt, "needle": needle}
    state.update({**{name: value for name, value in named.items() if value is not None}, **settings})
    made = make_source if source is None else lambda *_: source
    return StreamPanel(state, made, make_subject if subject is None else lambda *_: subject)


def bank_panel(
    text: str = "humble token",
    model: str = DEFAULT,
    *,
    tokens: int = 1024,
    start: int = 256,
    layer: int = 12,
    group: int = 1,
    reading: BankReader | None = None,
) -> BankPanel:
    """The KV bank panel, to `display(...)`.

    text: a name or path for `load_text`; model: a language model or "random"; tokens: read from the text
    before the model goes on writing, the first `start` of them at once; layer, group: whose bank is shown first;
    reading: a ready `BankReader` instead. A model that is not pulled is replaced by a random layer.
    """
    check_stream("model", model)

    def make(stop: Stop, progress: Progress) -> tuple[BankReader, str]:
        if reading is not None:
            return reading, ""
        why = "" if model == "random" else _why_not(model)
        body, name = load_text(text), "random" if why else model
        return open_reading(body, name, tokens=tokens, start=start, progress=progress, stop=stop), why

    return BankPanel(make, layer, group)


def evidence_panel(studies: list[Study] | None = None, *, cases: int = CASES) -> EvidencePanel:
    """The committed studies, and a button that measures one cell again, to `display(...)`.

    studies: from `evidence.committed`, by default the committed ones; cases: answers that the button asks for, >= 1.
    """
    whole_number("cases", cases, 1)
    return EvidencePanel(committed() if studies is None else studies, cases)


def prototype_panel(
    model: str = "shelf-mini", *, tokens: int = 1024, layer: int = 1, group: int = 0, live: Live | None = None
) -> PrototypePanel:
    """The panel of gates and prototypes, to `display(...)`.

    model, tokens: as for `open_live`; layer, group: shown first; live: a ready `Live` instead. Surgery operates on a
    copy of the model.
    """
    return PrototypePanel((lambda: open_live(model, tokens)) if live is None else lambda: live, layer, group)


def duel_panel(
    preset: str | None = None, *, out: str | Path | None = None, run=None, curve=None, **settings
) -> DuelPanel:
    """The panel of the duel, to `display(...)`.

    preset: "small" or "t4", by default the one for this machine; out: a folder for the runs, which are otherwise
    deleted when the panel closes; settings: any field of `DuelSettings`, such as `text="humble token"` or `minutes=2`;
    run, curve: instead of `duel` and `held_out_curve`. ValueError or TypeError names an argument that is not allowed.
    """
    preset = preset or ("t4" if torch.cuda.is_available() else "small")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: allowed is {', '.join(map(repr, PRESETS))}")
    if "length" in settings:
        settings = {"shortlist": None, **settings}  # None: a fixed share of the new length
    return DuelPanel(preset, replace(PRESETS[preset], **settings), run or duel, curve or held_out_curve, out)


def wall_panel(
    *, device: str | None = None, lengths: list[int] | None = None, limit_s: float = LIMIT_S, run=None
) -> WallPanel:
    """The live benchmark of dense attention and Proteus by length, to `display(...)`.

    device: "cpu" or "cuda", by default the GPU where there is one; lengths: in tokens, growing; limit_s: a line stops
    after a call of more than so many seconds; run: instead of `experiments.speed.wall.climb`. ValueError names an
    argument that is not allowed.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lengths = list(lengths or LENGTHS[where.type])
    if lengths != sorted(set(lengths)) or lengths[0] < 1:
        raise ValueError(f"lengths={lengths!r}: allowed are whole numbers >= 1, each larger than the one before")
    if not limit_s > 0:
        raise ValueError(f"limit_s={limit_s!r}: allowed is a number of seconds > 0")
    return WallPanel(run or climb, where, lengths, limit_s)


def needle_panel(
    model: str = "smollm2", *, subject: subjects.Subject | None = None, pairs=None, run=None
) -> NeedlePanel:
    """The validation suite, live, to `display(...)`.

    model: a pulled model, or "layer", a random layer that shows the chance level and replaces a model that is not
    pulled. subject: a ready one instead; pairs: facts, by default those of the package; run: instead of
    `experiments.needles.live.live`.
    """

    def open_subject() -> tuple[subjects.Subject, str]:
        why = "" if subject or model == subjects.LAYER else _why_not(model)
        return subject or subjects.load(subjects.LAYER if why else model, answers=False), why

    return NeedlePanel(open_subject, pairs or load_pairs(), run or live_needles)


def touch_panel(what: str) -> TouchPanel:
    """A small panel with one measured sentence, to `display(...)`. what: "int8", "top-a", "controller" or "bank"."""
    if what not in KINDS:
        raise ValueError(f"what={what!r}: allowed is {', '.join(map(repr, KINDS))}")
    return TouchPanel(KINDS[what])


def healing_panel(
    folder: str | Path, *, seconds: float | None = None, device: str | None = None, session=None
) -> Panel:
    """Healing of a folder that `proteus convert` made, by its newest plan, to `display(...)`.

    The same call goes on with a run that was stopped. seconds: how long the run may take on this machine, instead of
    the plan's minutes; a run that has begun keeps its plan. device: "cpu" or "cuda", by default the GPU where there is
    one; session: instead of `hf.healing.session.Session`. ValueError names an argument that is not allowed, or what the
    folder lacks; ImportError without the `heal` extra.
    """
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds={seconds!r}: allowed is a number of seconds > 0, or None")
    if missing := [name for name in ("transformers", "peft", "accelerate") if find_spec(name) is None]:
        raise ImportError(
            f"healing needs the heal extra: pip install 'proteus-playground[heal]' ({missing[0]} is missing)"
        )
    from .healing.panel import HealingPanel  # it brings transformers, which the other panels do without

    return HealingPanel(
        folder, seconds, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")), session
    )
