"""`proteus bench page`: a sweep as one HTML page that needs no network: time and memory by length, tables, machine."""

from __future__ import annotations

import json
from html import escape
from itertools import groupby
from math import log2
from pathlib import Path
from typing import Annotated

import typer

from ...common.files import write_text
from .rivals import LABELS, OURS
from .table import HEAD, about, cells, markdown_report, name, panels

OUR_COLOURS = ("#d1495b", "#e58f65", "#8f2d56", "#f4b942")
COLOURS = dict(zip(LABELS, ("#1d7874", "#2e86ab", "#7b9e3e", "#5c6b73", "#9a8c98", "#6a4c93", "#b08968", "#343a40"),
                   strict=True))  # fmt: skip
BUTTONS = {"displaylogo": False, "showSendToCloud": False}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22282d; background: #fff; margin: 2rem auto; max-width: 1160px;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .2rem; }
p.about { color: #5c6b73; margin: 0 0 .2rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e6e9eb; white-space: nowrap; }
th { color: #5c6b73; font-weight: 600; } td:nth-child(2), th:nth-child(2) { text-align: left; }
td.why { text-align: left; color: #8a949b; white-space: normal; } tr.ours td { background: #fdf1f2; }
tr.first td { border-top: 2px solid #c5ccd1; } summary { cursor: pointer; color: #5c6b73; }
table.machine td { text-align: left; }
"""


def write_page(report: dict, path: Path) -> None:
    """Write the page whole or not at all. Raises `ImportError` without plotly."""
    parts, script = [], True
    for title, rows in panels(report):
        parts.append(f"<h2>{escape(title)}</h2>")
        if any("ms" in row for row in rows):
            parts.append(_figure(rows).to_html(full_html=False, include_plotlyjs=script, config=BUTTONS))
            script = False
        parts.append(f"<details><summary>Table, {len(rows)} rows</summary>{_table(rows)}</details>")
    lines = "".join(f'<p class="about">{escape(line)}</p>' for line in about(report).splitlines())
    write_text(path, f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Proteus sweep</title><style>{STYLE}</style></head><body>
<h1>Proteus beside its rivals, by length</h1>{lines}{"".join(parts)}
<h2>Where this was measured</h2>{_machine(report)}</body></html>
""")  # fmt: skip


def _series(rows: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """Name, colour and measured rows of everyone who has any, ours first."""

    def who(row):
        return (row["who"] != OURS, row["who"], str(row["alpha"]))

    measured = [list(rows) for _, rows in groupby(sorted((r for r in rows if "ms" in r), key=who), key=who)]
    ours = [rows for rows in measured if rows[0]["who"] == OURS]
    colours = [OUR_COLOURS[i % len(OUR_COLOURS)] for i in range(len(ours))]
    colours += [COLOURS[rows[0]["who"]] for rows in measured[len(ours) :]]
    return [(name(rows[0]), colour, rows) for rows, colour in zip(measured, colours, strict=True)]


def _figure(rows: list[dict]):
    """Time by length with quartiles and our floor, and peak memory by length; both axes logarithmic."""
    from plotly.subplots import make_subplots

    weight = "peak_mb" if any("peak_mb" in row for row in rows) else "extra_mb"
    titles = ("milliseconds", "peak memory, MB" if weight == "peak_mb" else "peak extra memory, MB")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles, horizontal_spacing=0.08)
    for label, colour, measured in _series(rows):
        ours = measured[0]["who"] == OURS
        look = {"mode": "lines+markers", "legendgroup": label, "name": label, "marker": {"size": 8 if ours else 6},
                "line": {"color": colour, "width": 3.5 if ours else 1.8}}  # fmt: skip
        taken = [row[row["timing"]] for row in measured]
        figure.add_scatter(
            x=[row["tokens"] for row in measured], y=[row["ms"] for row in measured], row=1, col=1, **look,
            error_y={"type": "data", "symmetric": False, "thickness": 1, "width": 3,
                     "array": [t["q3_ms"] - t["median_ms"] for t in taken],
                     "arrayminus": [t["median_ms"] - t["q1_ms"] for t in taken]},
            customdata=[[*cells(row), f"{row['first_ms'] / 1e3:.2f} s"] for row in measured],
            hovertemplate="%{x:,} tokens: %{customdata[2]}<br>%{customdata[6]} keys per query, "
                          "%{customdata[7]} times the floor<br>first call, compilation included, %{customdata[8]}",
        )  # fmt: skip
        heavy = [row for row in measured if row.get(weight)]
        figure.add_scatter(x=[r["tokens"] for r in heavy], y=[r[weight] for r in heavy], row=1, col=2, showlegend=False,
                           hovertemplate="%{x:,} tokens: %{y:,.0f} MB", **look)  # fmt: skip
        low = [row for row in measured if ours and "floor" in row]
        if low:
            figure.add_scatter(x=[r["tokens"] for r in low], y=[r["floor"]["ms"] for r in low], row=1, col=1,
                               name=f"floor of {label}", mode="lines", hovertemplate="%{x:,} tokens: %{y:.3g} ms",
                               line={"color": colour, "dash": "dot", "width": 2})  # fmt: skip
    lengths = sorted({row["tokens"] for row in rows})
    figure.update_xaxes(type="log", tickvals=lengths, ticktext=[_tokens(n) for n in lengths], gridcolor="#eef0f2")
    figure.update_yaxes(type="log", gridcolor="#eef0f2", dtick=1, exponentformat="none", separatethousands=True)
    return figure.update_layout(height=430, margin={"l": 55, "r": 10, "t": 40, "b": 30}, plot_bgcolor="#fff",
                                legend={"orientation": "h", "y": -0.1, "yanchor": "top"}, template="plotly_white",
                                hoverlabel={"align": "left"})  # fmt: skip


def _tokens(count: int) -> str:
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= size and log2(size / (count & -count)) <= 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def _table(rows: list[dict]) -> str:
    lines, before = [], None
    for row in rows:
        kind = " ".join(("ours" if row["who"] == OURS else "", "first" if row["tokens"] != before else ""))
        tokens, who, *rest = map(escape, cells(row))
        more = "".join(f"<td>{cell}</td>" for cell in rest)
        if row["status"] != "ok":
            more = f'<td class="why" colspan="{len(rest)}">{rest[0]}</td>'
        lines.append(f'<tr class="{kind.strip()}"><td>{tokens}</td><td>{who}</td>{more}</tr>')
        before = row["tokens"]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in HEAD)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _machine(report: dict) -> str:
    facts = {key: value for key, value in report.items() if isinstance(value, (str, int, float)) and key != "benchmark"}
    facts |= report["settings"] | {key: f"{value:,.4g}" for key, value in report["rates"].items()}
    lines = "".join(f"<tr><td>{escape(key)}</td><td>{escape(str(value))}</td></tr>" for key, value in facts.items())
    return f'<table class="machine">{lines}</table>'


def command(
    report: Annotated[Path, typer.Argument(help="What `proteus bench sweep --out` wrote.", exists=True)],
    page: Annotated[Path, typer.Argument(help="HTML page to write.")],
) -> None:
    """Print a sweep's tables and write its page, wherever it was measured."""
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        text = markdown_report(found)
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"REPORT {report}: must be what proteus bench sweep wrote") from problem
    typer.echo(text)
    write_page(found, page)
