"""The suite's findings as one HTML page that needs no network, and as JSON: heat maps, tables, what was run."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ...common.files import write_json, write_text
from ..speed.page import BUTTONS, STYLE
from .retrieval import METHODS, OURS, describe_methods
from .summary import accuracy_table, fading_table, heat, recall_table

PAGE, DATA = "report.html", "report.json"
DEFINITIONS = (
    "Every fact stands in the text, in place of as many of its tokens; the prompt asks for it; no score is raised.",
    "Answer recall: needles of which every token of the answer is in the buffer. Whole: every token of the fact. "
    "Tokens: mean share of a fact's tokens. Of a jigsaw's pieces, the whole piece is asked for.",
    "Brackets hold 95% intervals: Wilson's where each case is right or wrong, else a bootstrap over cases.",
    describe_methods(),
)
OTHER = "td:nth-child(2), th:nth-child(2) { text-align: right; } td:first-child, th:first-child { text-align: left; }"


def write_report(out: Path, rows: list[dict], about: dict) -> dict:
    """Write report.json and report.html into `out`, each whole or not at all, and return what the JSON holds.

    rows: finished cases; about: what was run, by name. `ValueError` without a case, `ImportError` without plotly.
    """
    if not rows:
        raise ValueError(f"out={str(out)!r} holds no finished case: run proteus verify first")
    report = {"about": about, "cases": len(rows), "out_of_order": [row["key"] for row in rows if not row["in_order"]],
              "recall": recall_table(rows), "accuracy": accuracy_table(rows), "fading": fading_table(rows)}  # fmt: skip
    write_json(out / DATA, report)
    write_text(out / PAGE, _page(report, rows))
    return report


def sentences(report: dict) -> list[str]:
    """What was run and what came out, in words."""
    about, wrong = report["about"], len(report["out_of_order"])
    order = "in every one" if not wrong else f"in all but {wrong:,}"
    return [
        about["about_model"],
        f"Run on {about['device']}, {about['dtype']}, torch {about['torch']}, Python {about['python']}.",
        f"Haystack: {about['about_haystack']}. {about['pairs']} facts, seeds 0 to {about['seeds'] - 1}.",
        f"The buffer is {about['buffer_share']:.1%} of each document; chunks of {about['chunk_tokens']:,} tokens.",
        f"{report['cases']:,} cases; the buffer's positions rose {order}.",
    ]


def _page(report: dict, rows: list[dict]) -> str:
    lines = "".join(f'<p class="about">{escape(line)}</p>' for line in (*sentences(report), *DEFINITIONS))
    parts = [_maps(rows, asked) for asked in report["about"]["asked"] if any(r["task"] == "single" for r in rows)]
    parts = [part.to_html(full_html=False, include_plotlyjs=not i, config=BUTTONS) for i, part in enumerate(parts)]
    shares = ("answer", "whole", "tokens")
    recall = [
        [*_where(e), *(_share(e[name]) for name in shares), _percent(e["decoys"]), _n(e["answer"])]
        for e in report["recall"]
    ]
    parts.append("<h2>Was it in the buffer?</h2>" + _table("Answer|Whole|Tokens|Look-alikes|Cases", recall))
    if report["accuracy"]:
        right = [[*_where(e), _share(e["right"]), _n(e["right"])] for e in report["accuracy"]]
        parts.append("<h2>Did the model answer?</h2>" + _table("Right|Cases", right))
    if report["fading"]:
        fading = [[*_where(e), f"{e['strength']:.0%}", _share(e["answer"]), _n(e["answer"])] for e in report["fading"]]
        parts.append("<h2>As the signal fades</h2>" + _table("Of the fact|Answer|Cases", fading))
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in report["about"].items())
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>Proteus: needles</title><style>{STYLE}{OTHER}</style></head>
<body><h1>Needles, and whether they are found</h1>{lines}{"".join(parts)}
<h2>What was run</h2><table class="machine">{facts}</table></body></html>
"""


def _maps(rows: list[dict], asked: str):
    """Heat maps of depth by length, one per method, side by side."""
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(METHODS), subplot_titles=METHODS, shared_yaxes=True, horizontal_spacing=0.02)
    for column, method in enumerate(METHODS, 1):
        lengths, depths, grid = heat(rows, asked, method)
        figure.add_heatmap(
            x=[f"{length:,}" for length in lengths], y=[f"{depth:.0%}" for depth in depths], z=grid.tolist(), row=1,
            col=column, zmin=0, zmax=1, colorscale="RdYlGn", showscale=column == len(METHODS), xgap=1, ygap=1,
            hovertemplate="%{x} tokens, depth %{y}: %{z:.0%}<extra>" + method + "</extra>",
            colorbar={"tickformat": ".0%"},
        )  # fmt: skip
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed")
    title = f"Answer in the buffer, by depth and length ({asked} questions; {OURS} is ours)"
    return figure.update_layout(title=title, height=380, margin={"l": 55, "r": 10, "t": 80, "b": 40},
                                template="plotly_white")  # fmt: skip


def _where(entry: dict) -> list[str]:
    return [entry["task"], entry["asked"], f"{entry['length']:,}", entry["method"]]


def _share(value: dict) -> str:
    return f"{value['mean']:.1%} [{value['low']:.1%}, {value['high']:.1%}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _n(value: dict) -> str:
    return f"{value['cases']:,}"


def _table(columns: str, rows: list[list[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("Task", "Asked", "Tokens", "Kept by", *columns.split("|")))
    body = ""
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="{"ours" if row[3] == OURS else ""}">{cells}</tr>'
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
