"""A sweep's report as Markdown: one table per scope, pass and number of KV groups."""

from __future__ import annotations

from itertools import groupby

from ...common.machine import markdown
from .rivals import EXACT, LABELS, OURS

SCOPES = {"layer": "Whole layer, hidden states in and out", "attention": "Attention alone, un-rotated q, k, v in"}
PASSES = {"forward": "forward", "training": "forward + backward"}
HEAD = ["tokens", "who", "ms (q1–q3)", "vs best dense", "peak MB", "tokens/s", "keys/query", "x floor"]


def case_name(row: dict) -> str:
    """The name of a row's attention in tables and figures."""
    if row["who"] != OURS:
        return LABELS[row["who"]]
    return "Proteus, α by length" if row["alpha"] == "auto" else f"Proteus, α = {row['alpha']:g}"


def sections(report: dict) -> list[tuple[str, list[dict]]]:
    """Heading and rows of each table, by length. Each row gets its `speedup` over the fastest dense row.

    A case that is skipped for a reason that does not depend on the length is shown at its first length only.
    """

    def section(row):
        return [*SCOPES].index(row["scope"]), [*PASSES].index(row["passes"]), row["groups"]

    found = []
    rows = [row for row in report["rows"] if not row["status"].startswith(("skipped: not ", "skipped: no "))]
    for (scope, passes, groups), same in groupby(sorted(rows, key=section), key=section):
        kind = f"{[*SCOPES.values()][scope]}; {[*PASSES.values()][passes]}"
        title = f"{kind}; {report['settings']['n_heads']} heads over {groups} KV groups"
        found.append((title, [row | {"speedup": best / row["ms"] if best and "ms" in row else None}
                              for row, best in _with_best(sorted(same, key=lambda row: row["tokens"]))]))  # fmt: skip
    return found


def _with_best(rows: list[dict]):
    for _, same in groupby(rows, key=lambda row: row["tokens"]):
        same = list(same)
        best = min((row["ms"] for row in same if row["who"] in EXACT and "ms" in row), default=None)
        yield from ((row, best) for row in same)


def cells(row: dict) -> list[str]:
    """One row of the table, with a dash where nothing was measured."""
    if row["status"] != "ok":
        return [f"{row['tokens']:,}", case_name(row), row["status"], *["–"] * 5]
    times = row[row["timing"]]
    quartiles = f"{_short(row['ms'])} ({_short(times['q1_ms'])}–{_short(times['q3_ms'])}) {row['timing']}"
    if "failed" in row.get("graph", {}):
        quartiles += "; no graph"
    memory = row.get("peak_mb")
    return [
        f"{row['tokens']:,}",
        case_name(row) + (f", {row['way']}" if row["way"] else ""),
        quartiles,
        f"{row['speedup']:.2f}x" if row["speedup"] else "–",
        f"{memory:,.0f}" if memory else (f"+{row['extra_mb']:,.0f}" if "extra_mb" in row else "–"),
        f"{row['tokens_per_s']:,.0f}",
        f"{row['keys_per_query']:,.0f}" if row.get("keys_per_query") else "–",
        f"{row['floor_ratio']:.1f}" if "floor_ratio" in row else "–",
    ]


def _short(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def about(report: dict) -> str:
    """Where and how the sweep was measured, one line each."""
    s, rates = report["settings"], report["rates"]
    lines = [
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, Python {report['python']}, "
        f"{report['date']}; {s['dtype']}, seed {s['seed']}, batch 1, d_model {s['d_model']}, "
        f"{s['n_heads']} heads of {s['head_dim']}, L = {s['shortlist']}, backend {s['backend']}",
        f"up to {s['repeats']} calls or {s['budget_s']:g} s a row, timing {s['timing']}"
        + (f", {s['cap_gb']:g} GB at most" if s["cap_gb"] else "")
        + "; peak MB includes inputs and weights; with a + it is what the call adds to them",
        f"measured rates: {rates['matmul_flops_per_s'] / 1e12:,.4g} TFLOP/s matmul, "
        f"{rates['copy_bytes_per_s'] / 1e9:,.4g} GB/s copy" if rates else "no rates",
    ]  # fmt: skip
    if report["left_out"]:
        rest = report["left_out"]
        lines.append(f"{len(rest)} rows left out, from {case_name(rest[0])} at {rest[0]['tokens']:,} tokens on")
    return "\n".join(lines)


def sweep_tables(report: dict) -> str:
    """The whole report as Markdown."""
    tables = [f"**{title}**\n\n{markdown(HEAD, [cells(row) for row in rows])}" for title, rows in sections(report)]
    return "\n\n".join([about(report), *tables])
