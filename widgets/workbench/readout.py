"""What a run cost and how far it is from dense: measured numbers, as HTML."""

from __future__ import annotations

from html import escape

import numpy as np

from proteus_playground.attention.settings import Settings
from proteus_playground.playground.views import LayerView, ModelView

from .figure import OKABE_ITO

NAMES = {"smollm2": "SmolLM2-135M"}
SPLIT_COLOURS = {"window": "#0072B2", "own block": "#56B4E9", "anchors": "#E69F00", "rings": "#009E73",
                 "notes": "#CC79A7"}  # fmt: skip


def quantity(value: float, unit: str) -> str:
    """`3.2 GFLOP`: three digits and a prefix."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms"


def _cell(label: str, value: str, below: str, tip: str, extra: str = "") -> str:
    return (
        f'<div class="pp-cell {extra}" title="{escape(tip)}"><span class="pp-label">{escape(label)}</span>'
        f'<span class="pp-value">{escape(value)}</span><span class="pp-below">{escape(below)}</span></div>'
    )


def readout_html(request: int, view: LayerView, runs: int, model: ModelView | None, settings: Settings) -> str:
    """All the numbers. `runs`: how many `view.latency_ms` is the median of; `model` may be of other settings."""
    size, heads = view.head_map.shape
    rows = view.awake & view.kept[:, None]
    reads = float(view.reads[rows].mean()) if rows.any() else 0.0
    took = view.latency_ms
    kept = int(view.kept.sum())
    cells = [
        _cell("keys per query", f"{reads:,.0f}", f"of {(size + 1) / 2:,.0f} when dense",
              "Keys and notes that a query reads, averaged over every row that was computed."),
        _cell("tokens kept", f"{kept:,}", f"of {size:,}", "Tokens that take part in this layer."),
        _cell("heads awake", f"{view.awake[view.kept].sum(1).mean() if kept else 0:.1f}", f"of {heads}",
              "Heads that computed a row, per token that takes part."),
        _cell("latency", milliseconds(took), f"dense {milliseconds(view.dense_ms)}",
              f"Measured: the median of the last {'run' if runs == 1 else f'{runs} runs'} of this layer's attention at "
              "these settings, warm-up excluded; "
              "dense is this machine's fused attention on the same tensors."),
        _cell("work, predicted", quantity(view.flops, "FLOP"), f"dense {quantity(view.dense_flops, 'FLOP')}",
              "Floating-point operations that this setting asks for, counted and not measured: hold them "
              "against the latency beside them."),
        _cell("bytes, predicted", quantity(view.bytes, "B"), f"dense {quantity(view.dense_bytes, 'B')}",
              "Bytes of queries, keys and values that this setting has to move, counted and not measured."),
        _cell("output error", f"{view.error:.1%}" if view.error >= 5e-4 else "none", "of dense output's size",
              f"How far this layer's output is from dense attention, relative: {view.error:.2e}."),
        _model_cell(model, settings),
    ]  # fmt: skip
    return f'<div class="pp-readout" data-request="{request}">{"".join(cells)}</div>'


def _model_cell(model: ModelView | None, settings: Settings) -> str:
    tip = "Mean negative log-likelihood per token with every layer at these settings; lower is better."
    if model is None:
        return _cell("whole model", "–", "not run yet", tip)
    old = model.settings != settings
    tip = f"{tip} {model.scored_tokens:,} tokens, {model.seconds:.1f} s; dense took {model.dense_seconds:.1f} s."
    below = f"dense {model.dense_nll:.3f} ({model.dense_perplexity:.1f})"
    label = "NLL, at other settings" if old else "NLL (perplexity)"
    return _cell(label, f"{model.nll:.3f} ({model.perplexity:.1f})", below, tip, "pp-old" if old else "")


def split_html(budget: dict, gates: int) -> str:
    """A bar of how one query's reads are divided; where notes are read there is one per gate."""
    if budget.get("dense"):
        return '<div class="pp-split-note">Dense: every earlier token is read, so there is nothing to divide.</div>'
    parts = {
        "window": budget["window"], "own block": budget["block"], "anchors": budget["anchors"],
        "rings": budget["probes"] * budget["ring"], "notes": gates if budget["notes"] else 0,
    }  # fmt: skip
    total = max(1, sum(parts.values()))
    bars = "".join(
        f'<span style="flex-grow:{count};background:{SPLIT_COLOURS[name]}" title="{name}: {count}"></span>'
        for name, count in parts.items() if count
    )  # fmt: skip
    words = "".join(
        f'<span><i style="background:{SPLIT_COLOURS[name]}"></i>{name} {count}</span>'
        for name, count in parts.items()
    )  # fmt: skip
    ring = f"{budget['probes']} gates opened × {budget['ring']} keys" if budget["ring"] else "no keys from gates"
    return (
        f'<div class="pp-split-note">One query may read {budget["shortlist"]}: {total} are planned ({ring}).</div>'
        f'<div class="pp-split">{bars}</div><div class="pp-legend">{words}</div>'
    )


def legend_html(counts: dict[int, int]) -> str:
    """Coloured squares with how many keys of each kind the row reads."""
    names = {1: "local", 2: "anchor", 3: "DNA", 4: "note only"}
    return "".join(
        f'<span><i style="background:{OKABE_ITO[kind]}"></i>{name} {counts.get(kind, 0):,}</span>'
        for kind, name in names.items()
    )


def caption_html(title: str, legend: str, sentence: str) -> str:
    return (
        f'<div class="pp-cap"><div><b>{escape(title)}</b><span class="pp-legend">{legend}</span></div>'
        f'<p title="{escape(sentence)}">{escape(sentence)}</p></div>'
    )


def kind_counts(kind: np.ndarray) -> dict[int, int]:
    return {int(code): int(count) for code, count in zip(*np.unique(kind, return_counts=True), strict=True)}


def title_html(name: str, layers: int, tokens: int, text: str, view: LayerView) -> str:
    where = f"on {view.device}, {view.backend} backend ({view.backend_reason})"
    parts = (f"{NAMES.get(name, name)}, layer {view.layer} of {layers}", f"{tokens:,} tokens of {text}", where)
    spans = "".join(f"<span>{escape(part)}</span>" for part in parts)
    return f'<div class="pp-title"><b>Proteus workbench</b>{spans}</div>'


def banner_html(probe, why_random: str) -> str:
    """One line on what is being looked at; loud where it is random."""
    if not probe.random:
        return f'<div class="pp-note">{escape(probe.note)}</div>'
    how = f" {escape(why_random)}" if why_random else ""
    return f'<div class="pp-random"><b>This layer is random.</b> {escape(probe.note)}{how}</div>'


def status_html(state: str, share: float | None, what: str) -> str:
    """`state` is fresh, stale, busy, stopped or error; `share` in 0..1 draws a bar."""
    words = {"fresh": "up to date", "stale": "computing …", "stopped": "stopped"}.get(state, what)
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<div class="pp-status pp-{state}" role="status"><i></i>{escape(words)}{bar}</div>'


def _key(colour: str, word: str, line: bool = False) -> str:
    return f'<span><i class="{"pp-line" if line else ""}" style="background:{colour}"></i>{word}</span>'


HEAT_LEGEND = '<span class="pp-cividis">0 <i></i> 1</span>' + _key("#d4d8dd", "asleep or dropped")
GATE_LEGEND = (
    "<span>◇ prototype</span><span>◆ opened</span>"
    + _key(OKABE_ITO[3], "fetched")
    + '<span style="color:#D55E00">★ this token</span>'
)
TEXT_LEGEND = _key("#f6ee92", "salient") + "".join(
    _key(OKABE_ITO[kind], word, line=True) for kind, word in ((1, "local"), (2, "anchor"), (3, "DNA"), (4, "note"))
)
