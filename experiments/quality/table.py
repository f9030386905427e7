"""The quality table as Markdown, one per length and share, and what it says about ours in sentences."""

from __future__ import annotations

from itertools import groupby
from statistics import fmean

from ...common.machine import markdown
from ..intervals import half_width, over_cases
from ..speed.measure import measured_on
from .arms import DENSE
from .cells import NLL

OURS, ORACLE = "ours", "oracle"


def summarise(rows: list[dict]) -> list[dict]:
    """One entry per length, L, arm and part: mean, 95% interval, reads and looks. Gaps are to the dense pass."""
    dense = {(r["part"], r["length"], r["index"]): r["value"] for r in rows if r["arm"] == DENSE}
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["length"], row["shortlist"], row["arm"], row["part"]), []).append(row)
    return [_entry(*key, some, dense) for key, some in found.items()]


def _entry(length: int, shortlist: int, arm: str, part: str, rows: list[dict], dense: dict) -> dict:
    values = [row["value"] for row in rows]
    if part == NLL:
        values = [row["value"] - dense[part, length, row["index"]] for row in rows]
        reach = half_width(values)
        low, high = (None, None) if reach is None else (fmean(values) - reach, fmean(values) + reach)
    else:
        low, high = over_cases(values)
    means = {name: fmean(row[name] for row in rows) for name in ("reads", "looks", "seconds")}
    return {"length": length, "shortlist": shortlist, "arm": arm, "part": part, "value": fmean(values), "low": low,
            "high": high, "count": len(rows), **means}  # fmt: skip


def quality_table(report: dict) -> str:
    """All tables of a report, with a line that says how they were measured."""
    own = "those that come with it, if it has as many, else " if report["own_gates"] else ""
    about = (
        f"{measured_on(report)}; {report['model']}, judged on {', '.join(report['text'])}, gates: {own}fitted to "
        f"{report['calibration_tokens']:,} tokens each of {', '.join(report['calibrated_on'])}. Gap: nats per token of "
        "a passage's second half above the model's own dense pass. Tasks: share of the right answers in greedy "
        "replies. Reads and looks, per query, layer and head: keys and stand-ins that are read; summaries or keys that "
        "are compared without being read. [95% interval]"
    )
    entries = report["entries"]
    sizes = sorted({(e["length"], e["shortlist"]) for e in entries if e["arm"] != DENSE})
    sizes = sizes or sorted({(e["length"], e["shortlist"]) for e in entries})
    parts = [f"**T = {T:,}, L = {L:,}**\n\n{_one(entries, T, L)}" for T, L in sizes]
    return "\n\n".join([about, *parts, *sentences(entries)])


def _here(entries: list[dict], T: int, L: int) -> list[dict]:
    return [e for e in entries if e["length"] == T and (e["shortlist"] == L or e["arm"] == DENSE)]


def _one(entries: list[dict], T: int, L: int) -> str:
    here = _here(entries, T, L)
    parts = list(dict.fromkeys(e["part"] for e in here))
    found = {(e["arm"], e["part"]): e for e in here}
    lines = []
    for arm in dict.fromkeys(e["arm"] for e in here):
        mine = [found.get((arm, part)) for part in parts]
        some = next(e for e in mine if e)
        lines.append([arm, *map(_cell, mine), f"{some['reads']:,.0f}", f"{some['looks']:,.0f}"])
    return markdown(["arm", *("gap" if part == NLL else part for part in parts), "reads", "looks"], lines)


def _cell(entry: dict | None) -> str:
    if entry is None:
        return "–"
    digits = 3 if entry["part"] == NLL else 2
    if entry["part"] == NLL and entry["arm"] == DENSE:
        return "0"
    interval = "" if entry["low"] is None else f" [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
    return f"{entry['value']:.{digits}f}{interval}"


def sentences(entries: list[dict]) -> list[str]:
    """One sentence per length, L and part that names every arm better than the best of ours. The oracle is no rival."""
    lines = []
    capped = sorted((e for e in entries if e["arm"] != DENSE), key=lambda e: (e["length"], e["shortlist"]))
    for (T, L), group in groupby(capped, key=lambda e: (e["length"], e["shortlist"])):
        here = list(group)
        for part in dict.fromkeys(e["part"] for e in here):
            some = [e for e in here if e["part"] == part]
            ours = [e for e in some if e["arm"].split(" ")[0] == OURS]
            rivals = [e for e in some if e not in ours and e["arm"] != ORACLE]
            if not ours or not rivals:
                continue
            sign = -1 if part == NLL else 1
            best = max(ours, key=lambda e: sign * e["value"])
            ahead = [f"{e['arm']} ({e['value']:.3f})" for e in rivals if sign * e["value"] > sign * best["value"]]
            what = "gap" if part == NLL else part
            lines.append(
                f"T {T:,}, L {L:,}, {what}: {best['arm']} {best['value']:.3f}; better: "
                f"{', '.join(ahead) or f'none of {len(rivals)} arms'}."
            )
    return ["\n".join(f"- {line}" for line in lines)] if lines else []
