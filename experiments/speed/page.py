"""`proteus bench page`: a sweep as an HTML page: time and memory by length, tables, machine."""

from __future__ import annotations

import json
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer

from ...common.outputs import check_different, output_file
from .. import pages
from .rivals import LABELS, OURS
from .table import HEAD, about, case_name, cells, sections, sweep_tables

OUR_COLOURS = ("#d1495b", "#e58f65", "#8f2d56", "#f4b942")
COLOURS = dict(zip(LABELS, ("#1d7874", "#2e86ab", "#7b9e3e", "#5c6b73", "#0b3954", "#087e8b", "#9a8c98", "#6a4c93",
                            "#b08968", "#343a40"), strict=True))  # fmt: skip


def write_page(report: dict, path: Path) -> None:
    """Write a sweep's page whole or not at all. Raises `ImportError` without plotly."""
    parts, first = [], True
    for title, rows in sections(report):
        parts.append(f"<h2>{escape(title)}</h2>")
        if any("ms" in row for row in rows):
            parts.append(pages.figure(_figure(rows), first))
            first = False
        parts.append(f"<details><summary>Table, {len(rows)} rows</summary>{_table(rows)}</details>")
    facts = {key: value for key, value in report.items() if isinstance(value, (str, int, float)) and key != "benchmark"}
    facts |= report["settings"] | {key: f"{value:,.4g}" for key, value in report["rates"].items()}
    parts.append(pages.facts("Where this was measured", facts))
    pages.write_page(path, "Proteus sweep", "Proteus beside its rivals, by length", about(report).splitlines(), parts)


def _series(rows: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """Name, colour and rows of every attention that was measured, ours first."""

    def who(row):
        return (row["who"] != OURS, row["who"], str(row["alpha"]))

    measured = [list(rows) for _, rows in groupby(sorted((r for r in rows if "ms" in r), key=who), key=who)]
    ours = [rows for rows in measured if rows[0]["who"] == OURS]
    colours = [OUR_COLOURS[i % len(OUR_COLOURS)] for i in range(len(ours))]
    colours += [COLOURS[rows[0]["who"]] for rows in measured[len(ours) :]]
    return [(case_name(rows[0]), colour, rows) for rows, colour in zip(measured, colours, strict=True)]


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
        times = [row[row["timing"]] for row in measured]
        figure.add_scatter(
            x=[row["tokens"] for row in measured], y=[row["ms"] for row in measured], row=1, col=1, **look,
            error_y={"type": "data", "symmetric": False, "thickness": 1, "width": 3,
                     "array": [t["q3_ms"] - t["median_ms"] for t in times],
                     "arrayminus": [t["median_ms"] - t["q1_ms"] for t in times]},
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
        if count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"


def _table(rows: list[dict]) -> str:
    """The rows as HTML, with a line above each new length and a reason in place of the figures of a skipped case."""
    lines, before = [], None
    for row in rows:
        kind = ("ours " if row["who"] == OURS else "") + ("first" if row["tokens"] != before else "")
        lines.append((kind.strip(), cells(row) if row["status"] == "ok" else cells(row)[:3]))
        before = row["tokens"]
    return pages.table(HEAD, lines)


def page_command(
    report: Annotated[Path, typer.Argument(help="What `proteus bench sweep --out` wrote.", exists=True)],
    page: Annotated[Path, typer.Argument(help="HTML page to write.", callback=output_file)],
) -> None:
    """Print a sweep's tables and write its page, wherever it was measured."""
    check_different({"REPORT": report, "PAGE": page})
    try:
        found = json.loads(report.read_text(encoding="utf-8"))
        text = sweep_tables(found)
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"REPORT {report}: must be what proteus bench sweep wrote") from err
    typer.echo(text)
    write_page(found, page)
