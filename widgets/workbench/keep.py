"""The workbench as one page that needs no network: figures, numbers, the text, and what made them."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import plotly
import plotly.graph_objects as go
import plotly.io as pio
import torch

from proteus_playground.common import __version__
from proteus_playground.common.machine import environment

from ..parts.html import style_sheets
from ..parts.plot import CONFIG
from .readout import TITLE

PANELS = {"heads": ("x", "y"), "gates": ("x2", "y2"), "row": ("x3", "y3", "y4")}
BUTTONS = "<p><button onclick=\"save('{0}','png')\">PNG</button> <button onclick=\"save('{0}','svg')\">SVG</button></p>"
SCRIPT = (
    "<script>function save(id, format) { Plotly.downloadImage(document.getElementById(id), "
    "{format, filename: 'proteus-' + id, scale: format === 'png' ? 2 : 1}); }</script>"
)


def panel_figure(figure: go.FigureWidget, name: str) -> go.Figure:
    """One panel of the workbench's figure as a figure of its own."""
    layout = figure.layout.to_plotly_json()
    names = {axis: f"{axis[0]}axis{axis[1:]}" for axis in PANELS[name]}
    axes = [axis for axis, long in names.items() if layout[long].get("visible", True)]  # the row of A only if pinned
    kept = {names[axis] for axis in axes}
    for key in [key for key in layout if "axis" in key and key not in kept]:
        del layout[key]
    for part in ("images", "shapes"):
        layout[part] = [one for one in layout.get(part, ()) if one["xref"].split()[0] == axes[0]]
    spans = [layout[key]["domain"] for key in kept if key.startswith("y")]
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    for key in kept:
        start, end = layout[key]["domain"]
        whole = key.startswith("x") or high <= low
        layout[key]["domain"] = [0, 1] if whole else [(start - low) / (high - low), (end - low) / (high - low)]
    if name == "gates":
        layout["width"] = 440  # as wide for its height as in the workbench, so that circles stay round
    layout |= {"height": 320, "margin": {"l": 60, "r": 12, "t": 10, "b": 46}, "template": {}}
    return go.Figure([trace for trace in figure.data if (trace.yaxis or "y") in axes], layout)


def page(bench, only: str | None = None) -> str:
    """The page of a workbench that has drawn something. only: a name in `PANELS`; None: all of it."""
    if only is not None and only not in PANELS:
        raise ValueError(f"only={only!r}: allowed is {', '.join(map(repr, PANELS))}")
    if bench.drawn is None:
        raise ValueError("the workbench has drawn nothing yet: wait until its status is “up to date”")
    parts, library = [SCRIPT], True
    for name in PANELS if only is None else (only,):
        figure = pio.to_html(
            panel_figure(bench.pictures.widget, name), CONFIG, include_plotlyjs=library, full_html=False, div_id=name
        )
        parts += [bench.captions[name].value, figure, BUTTONS.format(name)]
        library = False
    if only is None:
        asked = bench.answers is not None
        answer = f"<p>{escape(bench.probe.question)}</p>{bench.ask_box.reply.value}" if asked else ""
        two = bench.ways.pinned.value if bench.drawn.other is not None else ""
        above = [bench.title.value, bench.banner.value, answer, two, bench.numbers.value]
        parts = [*above, *parts, bench.captions["text"].value, _text(bench), bench.next.value]
    body = "\n".join(parts)
    title = f"{TITLE}: {bench.probe.name}, layer {bench.drawn.view.layer}, {bench.state.text}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{style_sheets()} body.pp-app {{ max-width: 1100px; margin: 16px auto; overflow: visible; }} "
        ".pp-text { height: auto; } .pp-cap { position: static; margin-top: 28px; } pre { white-space: pre-wrap; "
        "overflow-wrap: anywhere; }</style></head>"
        f'<body class="pp-app">{body}<details><summary>What made this page: settings, seed, versions, machine</summary>'
        f"<pre>{escape(_made_by(bench))}</pre></details></body></html>"
    )


def _text(bench) -> str:
    """The text as it is on show: which tokens the chosen word reads, and which of them only A or only B reads."""
    frame, kinds = bench.drawn, ("unseen", "local", "anchor", "dna", "note-only")
    mine = frame.row.kind
    other = mine if frame.other_row is None else frame.other_row.kind
    words, salience = "", bytes(bench.text.salience)
    for i, (token, b, a) in enumerate(zip(bench.probe.tokens, mine, other, strict=True)):
        one_by_one = (0 < a < 4, 0 < b < 4)
        only = {(False, True): " pp-only-b", (True, False): " pp-only-a"}.get(one_by_one, "")
        chosen = " pp-chosen" if i == frame.row.token else ""
        yellow = f"background: rgba(240, 228, 66, {salience[i] / 255 * 0.75:.2f})"
        words += f'<span class="pp-tok pp-{kinds[b]}{only}{chosen}" style="{yellow}">{escape(token)}</span>'
    return f'<div class="pp-text">{words}</div>'


def _made_by(bench) -> str:
    """Settings, seed, device and versions, and the line that opens the same workbench."""
    view, state = bench.drawn.view, bench.state
    facts = {"link": f"playground(state={state.to_string()!r})", "state": state.to_dict(), "backend": view.backend,
             "note": bench.probe.note, "shelf (the seed of its text)": state.shelf,
             "proteus-playground": __version__, "plotly": plotly.__version__,
             **environment(torch.device(view.device))}  # fmt: skip
    return json.dumps(facts, indent=1, ensure_ascii=False, default=str)


def keep(bench, path: str | Path, only: str | None = None) -> Path:
    """Writes `page` to `path` (.html) and returns it. Raises as `page`, and `ValueError` for another kind of file."""
    path = Path(path).expanduser()
    if path.suffix != ".html" or not path.parent.is_dir():
        raise ValueError(f"path={str(path)!r}: must be a .html file in a folder that is there")
    path.write_text(page(bench, only), encoding="utf-8")
    return path
