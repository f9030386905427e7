"""HTML pages that need no network: their style, tables and figures; and the tables that a Markdown page holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.files import write_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

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


def write_page(
    path: Path, title: str, heading: str, about: Iterable[str], body: Iterable[str], style: str = ""
) -> None:
    """Write a page whole or not at all. about: sentences below the heading; body: HTML; style: CSS after ours."""
    lines = "".join(f'<p class="about">{escape(line)}</p>' for line in about)
    write_text(path, f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{escape(title)}</title><style>{STYLE}{style}</style></head>
<body><h1>{escape(heading)}</h1>{lines}{"".join(body)}</body></html>
""")  # fmt: skip


def table(head: list[str], rows: Iterable[tuple[str, list[str]]]) -> str:
    """A table; rows: CSS class and cells. The last cell of a row with fewer cells than `head` spans the rest."""
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head)]
    for kind, cells in rows:
        *others, last = (escape(cell) for cell in cells)
        missing = len(head) - len(cells)
        span = f' class="why" colspan="{missing + 1}"' if missing else ""
        start = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr class="{kind}">{start}<td{span}>{last}</td>')
    return f'<div class="scroll"><table>{"</tr>".join(lines)}</tr></table></div>'


def facts(heading: str, values: Mapping[str, object]) -> str:
    """A heading and a table of names and values."""
    lines = (f"<tr><td>{escape(name)}</td><td>{escape(str(value))}</td></tr>" for name, value in values.items())
    return f'<h2>{escape(heading)}</h2><table class="machine">{"".join(lines)}</table>'


def figure(plot: Figure, first: bool) -> str:
    """A plotly figure; the first one of a page brings plotly's script."""
    buttons = {"displaylogo": False, "showSendToCloud": False}
    return plot.to_html(full_html=False, include_plotlyjs=first, config=buttons)


def around(page: Path, name: str) -> tuple[str, str]:
    """What stands before and after the part of a Markdown page that `fill` writes. ValueError without its marks."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    held = page.read_text(encoding="utf-8")
    if held.count(begin) != 1 or held.count(end) != 1:
        raise ValueError(f"page={str(page)!r}: must hold {begin.strip()} and {end} once each")
    return held[: held.index(begin) + len(begin)], held[held.index(end) :]


def fill(page: Path, name: str, text: str) -> None:
    """Replace what is between the page's marks of that name by `text`."""
    head, rest = around(page, name)
    write_text(page, f"{head}{text}\n{rest}")
