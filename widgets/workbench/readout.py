"""The workbench's tiles, legends and banner as HTML: what a run cost and how far its output is from dense."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from proteus_playground.attention.settings import Settings
from proteus_playground.playground.views import LayerView, ModelView

from ..parts.html import MODEL_NAMES, cell, key, note_html, tiles_html, title_html
from ..parts.plot import GREY, OKABE_ITO
from ..parts.sentences import milliseconds, quantity
from ..parts.terms import with_terms
from .figure import MARKED

TITLE = "Proteus workbench"
NLL_TIP = "How badly the model predicts the next token, in nats (mean negative log-likelihood); lower is better."
SPLIT_COLOURS = {"window": "#0072B2", "anchors": "#E69F00", "rings": "#009E73", "notes": "#CC79A7"}


@dataclass(frozen=True)
class Far:
    """How far the next token is from that of `source`, nats; None while it is not known. old: of an earlier picture."""

    nats: float | None
    source: str
    old: bool = False


def readout_html(
    request: int, view: LayerView, runs: int, model: ModelView | None, settings: Settings, kl: Far | None = None
) -> str:
    """All tiles. runs: `view.latency_ms` is their median; model: may have been run at other `settings`.

    kl: for a model that was trained with the slider; None for others.
    """
    size, heads = view.head_map.shape
    reads = mean_reads(view)
    kept = int(view.kept.sum())
    timed = "one run" if runs == 1 else f"the median of {runs} runs"
    cells = [
        cell("keys per query", f"{reads:,.0f}", f"of {(size + 1) / 2:,.0f} when dense",
              "Keys and notes that one query reads, averaged over all rows that were computed."),
        cell("tokens kept", f"{kept:,}", f"of {size:,}", "Tokens that take part in this layer."),
        cell("heads awake", f"{view.awake[view.kept].sum(1).mean() if kept else 0:.1f}", f"of {heads}",
              "Heads that computed a row, averaged over the tokens that take part."),
        cell("looks per query", f"{view.looks:,.0f}", "not timed (masks)",
              "Summaries or keys that a query compares to choose its keys, without reading them. The time of masks "
              "says nothing about this way of choosing.") if not view.way.plain else
        cell("latency", milliseconds(view.latency_ms), f"dense {milliseconds(view.dense_ms)}",
              f"Measured time of this layer's attention at these settings, {timed} after a warm-up run. "
              "Dense is PyTorch's fused attention on the same tensors."),
        cell("work, predicted", quantity(view.flops, "FLOP"), f"dense {quantity(view.dense_flops, 'FLOP')}",
              "Additions and multiplications at these settings. They are calculated, not measured; the latency beside "
              "them is measured."),
        cell("bytes, predicted", quantity(view.bytes, "B"), f"dense {quantity(view.dense_bytes, 'B')}",
              "Bytes of queries, keys and values that are moved at these settings. They are calculated, not measured."),
        _error_cell(view, kl),
        _model_cell(model, settings, view.way.plain),
    ]  # fmt: skip
    return tiles_html(request, cells)


def _error_cell(view: LayerView, kl: Far | None) -> str:
    if kl is not None:
        value = "…" if kl.nats is None else f"{kl.nats:.3f} nats" if kl.nats >= 0.0005 else f"as {kl.source}"
        return cell("next token", value, f"KL from {kl.source}",
                    f"How far the probabilities of the next token are from those with {kl.source} (KL divergence). "
                    "This layer's output differs from dense by "
                    f"{view.error:.0%}: this model was trained to answer with sleeping heads and few keys, not to copy "
                    "its dense output.", "pp-old" if kl.old else "")  # fmt: skip
    return cell("output error", f"{view.error:.1%}" if view.error >= 5e-4 else "none", "relative to dense",
                f"How far this layer's output is from that of dense attention, as a share of it: "
                f"{view.error:.2e}.")  # fmt: skip


@cache
def _measured_layer() -> tuple[str, tuple[tuple[int, float], ...]]:
    """The machine of `proteus bench layer` on a CPU, and (tokens, time of dense / time of ours)."""
    found = json.loads((files("proteus_playground.experiments.results") / "layer_cpu.json").read_text("utf-8"))
    rows = tuple((row["tokens"], row["speedup"]) for row in found["rows"] if row["status"] == "ok")
    return f"{found['threads']} threads of an {found['device']}", rows


def pays_sentence(tokens: int) -> str:
    """From which length on our layer is faster than dense attention, as measured."""
    where, rows = _measured_layer()
    slower = max(size for size, ratio in rows if ratio < 1)
    faster = [(size, ratio) for size, ratio in rows if ratio >= 1]
    said = ", ".join(f"{ratio:.1f}× at {size:,}" for size, ratio in faster)
    now = "too short for a gain in speed" if tokens < faster[0][0] else "long enough for a gain in speed"
    return (
        f"With {tokens:,} tokens this text is {now}: on a CPU our layer becomes faster than dense attention between "
        f"{slower:,} and {faster[0][0]:,} tokens. It was faster by {said} tokens ({where}, proteus bench layer)."
    )


def pays_html(tokens: int) -> str:
    return f'<div class="pp-note">{with_terms(pays_sentence(tokens))}</div>'


def mean_reads(view: LayerView) -> float:
    """Keys and notes per query, averaged over the rows that were computed."""
    rows = view.awake & view.kept[:, None]
    return float(view.reads[rows].mean()) if rows.any() else 0.0


def two_html(
    request: int, b: LayerView, a: LayerView, model: ModelView | None, model_a: ModelView | None, settings: Settings
) -> str:
    """Tiles of B with A, what is pinned, below, and the ratio. model: of B, may have been run at other `settings`."""
    timed = a.way.plain and b.way.plain
    pairs = (
        ("keys per query", mean_reads(b), mean_reads(a), lambda x: f"{x:,.0f}"),
        ("tokens kept", float(b.kept.sum()), float(a.kept.sum()), lambda x: f"{x:,.0f}"),
        ("heads awake", float(b.awake[b.kept].sum(1).mean()), float(a.awake[a.kept].sum(1).mean()),
         lambda x: f"{x:.1f}"),
        ("latency", b.latency_ms, a.latency_ms, milliseconds) if timed else
        ("looks per query", b.looks, a.looks, lambda x: f"{x:,.0f}"),
        ("work, predicted", b.flops, a.flops, lambda x: quantity(x, "FLOP")),
        ("bytes, predicted", b.bytes, a.bytes, lambda x: quantity(x, "B")),
        ("output error", b.error, a.error, lambda x: f"{x:.1%}"),
    )  # fmt: skip
    cells = [cell(f"{label}: B", words(now), f"A {words(was)}{_ratio(now, was)}",
                  "B is set by the sliders, A is pinned.")
             for label, now, was, words in pairs]  # fmt: skip
    return tiles_html(request, [*cells, _two_models_cell(model, model_a, settings)])


def _two_models_cell(model: ModelView | None, model_a: ModelView | None, settings: Settings) -> str:
    tip = f"{NLL_TIP} Run the whole model measures A and B, both with our own selector and nothing taken away."
    if model is None:
        return cell("whole model", "–", "not run yet", tip)
    old = model.settings != settings
    below = "A not run yet" if model_a is None else f"A {model_a.nll:.3f} ({model.nll - model_a.nll:+.3f})"
    return cell("NLL: B, earlier" if old else "NLL: B", f"{model.nll:.3f}", below, tip, "pp-old" if old else "")


def _ratio(now: float, was: float) -> str:
    return f"; B = {now / was:.2g} × A" if was > 0 else ""


def _model_cell(model: ModelView | None, settings: Settings, plain: bool = True) -> str:
    """plain: whether the pictures show our own selector, with which the whole model always runs."""
    if model is None:
        return cell("whole model", "–", "not run yet", NLL_TIP)
    old = model.settings != settings
    tip = f"{NLL_TIP} {model.scored_tokens:,} tokens, {model.seconds:.1f} s; dense took {model.dense_seconds:.1f} s."
    below = f"dense {model.dense_nll:.3f} ({model.dense_perplexity:.1f})"
    label = "NLL, earlier settings" if old else "NLL (perplexity)" if plain else "NLL, our selector"
    return cell(label, f"{model.nll:.3f} ({model.perplexity:.1f})", below, tip, "pp-old" if old else "")


def split_html(budget: dict) -> str:
    """A bar that shows how one query's reads are divided."""
    if budget.get("dense"):
        return '<div class="pp-split-note">Dense: a query reads every earlier token, so no budget is divided.</div>'
    parts = {
        "window": budget["window"] + budget["block"], "anchors": budget["anchors"],
        "rings": budget["ring_reads"], "notes": budget["notes"],
    }  # fmt: skip
    total = max(1, sum(parts.values()))
    bars = "".join(
        f'<span style="flex-grow:{count};background:{SPLIT_COLOURS[name]}" title="{name}: {count}"></span>'
        for name, count in parts.items() if count
    )  # fmt: skip
    words = "".join(key(SPLIT_COLOURS[name], f"{name} {count}") for name, count in parts.items())
    ring = "no keys from gates"
    if budget["ring_reads"]:
        most = "up to " if budget["probes"] * budget["ring"] > budget["ring_reads"] else ""
        ring = f"{most}{budget['probes']} gates opened × {budget['ring']} keys"
    said = f"One query may read {budget['shortlist']} keys and notes. The parts below come to {total} ({ring})."
    return (
        f'<div class="pp-split-note">{with_terms(said)}</div>'
        f'<div class="pp-split">{bars}</div><div class="pp-legend">{words}</div>'
    )


def legend_html(kinds: np.ndarray, fact: bool = False) -> str:
    """A coloured square for each way in which a row sees keys, and their number; kinds: of `RowView`, up to the row.

    fact: whether a band marks the sentence that holds the answer.
    """
    band = key(MARKED, "band: the fact") if fact else ""
    names = {1: "window", 2: "anchors", 3: "rings", 4: "by notes only", 0: "not seen"}
    colours = {**OKABE_ITO, 0: GREY}
    return "".join(key(colours[kind], f"{name} {(kinds == kind).sum():,}") for kind, name in names.items()) + band


def workbench_title_html(name: str, layers: int, tokens: int, text: str, view: LayerView) -> str:
    where = f"on {view.device}, {view.backend} backend ({view.backend_reason})"
    parts = (f"{name}, layer {view.layer} (of 0 to {layers - 1})", f"{tokens:,} tokens of “{text}”", where)
    return title_html(TITLE, *parts)


def banner_html(probe, why_random: str) -> str:
    """One line on the model and its text, on yellow where the layer is random."""
    note = probe.note.replace(probe.name, MODEL_NAMES.get(probe.name, probe.name), 1)
    return note_html(f"{note} {why_random}".strip(), "This layer is random." if probe.random else "")


HEAT_LEGEND = '<span class="pp-cividis">0 <i></i> 1</span>' + key(GREY, "asleep or skipped")
GATE_LEGEND = (
    f"<span>● key, coloured by its gate</span><span>{with_terms('◇ prototype')}</span><span>◆ opened</span>"
    + key(OKABE_ITO[3], "ring")
    + '<span style="color:#D55E00">★ this token</span>'
)
TWO_GATE_LEGEND = GATE_LEGEND + "<span>○ read by A</span>"
TWO_HEAT_LEGEND = '<span class="pp-two">A more <i></i> B more</span>'
TEXT_LEGEND = key("#f6ee92", "salient") + "".join(
    key(OKABE_ITO[kind], word, line=True) for kind, word in ((1, "window"), (2, "anchor"), (3, "ring"), (4, "note"))
)
TWO_TEXT_LEGEND = (
    TEXT_LEGEND
    + '<span><i class="pp-swatch pp-only-b"></i>double: only B reads it one by one</span>'
    + '<span><i class="pp-swatch pp-only-a"></i>dashed: only A does</span>'
)
