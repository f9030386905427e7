"""The suite's report as an HTML page and as JSON: heat maps, tables, what was run."""

from __future__ import annotations

from pathlib import Path

from ...common.files import write_json
from .. import pages
from .retrieval import METHODS, OURS, describe_methods
from .summary import accuracy_table, fading_table, heat, recall_table

PAGE, DATA = "report.html", "report.json"
DEFINITIONS = (
    "Each fact replaces as many tokens of the text as it has. Only the prompt points to it: no score is raised.",
    "Answer recall: share of needles whose answer is in the buffer with every token. Whole: with every token of the "
    "fact. Tokens: mean share of a fact's tokens. For the pieces of a jigsaw, the whole piece counts as the answer.",
    "Brackets are 95% intervals: Wilson's where each case is right or wrong, else a bootstrap over cases.",
    describe_methods(),
)
ALIGNMENT = (
    "td:nth-child(2), th:nth-child(2) { text-align: right; } td:first-child, th:first-child { text-align: left; }"
)


def write_report(out: Path, rows: list[dict], about: dict) -> dict:
    """Write report.json and report.html into `out`, each whole or not at all, and return what the JSON holds.

    rows: finished cases; about: what was run, by name. `ValueError` without a case, `ImportError` without plotly.
    """
    if not rows:
        raise ValueError(f"out={str(out)!r} holds no finished case: run proteus verify first")
    report = {"about": about, "cases": len(rows), "out_of_order": [row["key"] for row in rows if not row["in_order"]],
              "recall": recall_table(rows), "accuracy": accuracy_table(rows), "fading": fading_table(rows)}  # fmt: skip
    write_json(out / DATA, report)
    about = (*sentences(report), *DEFINITIONS)
    pages.write_page(out / PAGE, "Proteus: needles", "Needles, and whether they are found", about,
                     _body(report, rows), ALIGNMENT)  # fmt: skip
    return report


def sentences(report: dict) -> list[str]:
    """What was run, in sentences."""
    about, wrong = report["about"], len(report["out_of_order"])
    order = "in every one" if not wrong else f"in all but {wrong:,}"
    return [
        about["about_model"],
        f"Run on {about['device']}, {about['dtype']}, torch {about['torch']}, Python {about['python']}.",
        f"Haystack: {about['about_haystack']}. {about['pairs']} facts, seeds 0 to {about['seeds'] - 1}.",
        f"The buffer is {about['buffer_share']:.1%} of each document; chunks of {about['chunk_tokens']:,} tokens.",
        f"{report['cases']:,} cases; the buffer kept the order of the text {order}.",
    ]


def _body(report: dict, rows: list[dict]) -> list[str]:
    """Heat maps, tables and the facts of the run, as HTML."""
    ways = report["about"]["asked"] if any(row["task"] == "single" for row in rows) else []
    parts = [pages.figure(_maps(rows, asked), not i) for i, asked in enumerate(ways)]
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
    return [*parts, pages.facts("What was run", report["about"])]


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
    figure.update_xaxes(type="category", title="tokens")
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_yaxes(title="depth of the fact", col=1)
    title = f"Answer in the buffer, by depth and length ({asked} questions; {OURS} is ours)"
    return figure.update_layout(title=title, height=380, margin={"l": 55, "r": 10, "t": 80, "b": 60},
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
    head = ["Task", "Asked", "Tokens", "Kept by", *columns.split("|")]
    return pages.table(head, (("ours" if row[3] == OURS else "", row) for row in rows))
