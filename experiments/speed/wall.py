"""The wall, live: three kinds of attention at growing lengths on this machine, until they stop.

The measurements are those of `proteus bench sweep`; this file adds the order, the stopping and the sentences.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files

import torch

from ...attention import AttentionConfig
from ...common.progress import Stop, check_stop
from ...streaming.stores import fits, size_words
from .rivals import OURS, BenchCase
from .row import attempt

WHO = {"mha": "dense, unfused", "fused": "dense, fused", OURS: "Proteus"}
LENGTHS = {"cpu": [512 << i for i in range(7)], "cuda": [1024 << i for i in range(11)]}
LIMIT_S = 1.0  # a line whose call took longer stops
REPEATS = 3
SHAPE = {"d_model": 512, "n_heads": 8, "n_kv_heads": 8, "head_dim": 64, "route_heads": False}
STAND_IN = "t4_stand_in_h200.json"


def climb(
    rows: list[dict], alpha: float, shortlist: int, device: torch.device, lengths: Iterable[int] | None = None,
    limit_s: float = LIMIT_S, stop: Stop | None = None,
) -> Iterator[dict]:  # fmt: skip
    """Rows that `rows` does not hold yet, shortest texts first, each as soon as it is measured.

    A row: tokens, who, alpha and shortlist (None for dense), ms, mb (peak memory that one call adds, MB; None where it
    is not known), keys (read per query), why ("" or why the line stops here, without ms). Raises `Stopped`.
    """
    rows = list(rows)
    for tokens in lengths or LENGTHS[device.type]:
        for who in WHO:
            mine = line(rows, who, alpha, shortlist)
            if any(row["tokens"] == tokens or row["why"] for row in mine):
                continue
            check_stop(stop)
            ours = who == OURS
            row = {"tokens": tokens, "who": who, "alpha": alpha if ours else None,
                   "shortlist": shortlist if ours else None, "ms": None, "mb": None, "keys": None}  # fmt: skip
            why = too_slow(mine, limit_s) or too_large(mine, device)
            row |= {"why": why} if why else _measured(tokens, who, alpha, shortlist, device, limit_s)
            rows.append(row)
            yield row


def _measured(tokens: int, who: str, alpha: float, shortlist: int, device: torch.device, limit_s: float) -> dict:
    cfg = AttentionConfig(**SHAPE, shortlist=shortlist, flux_alpha=alpha)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    case = BenchCase("layer", "forward", tokens, who, cfg, device, dtype)
    row = attempt(case, REPEATS, limit_s / 4, memory=True)
    if row["status"] != "ok":
        return {"why": row["status"]}
    return {"ms": row["ms"], "mb": max(row["extra_mb"], 0.0), "keys": row.get("keys_per_query"), "why": ""}


def line(rows: list[dict], who: str, alpha: float, shortlist: int) -> list[dict]:
    """The rows of one kind of attention, shortest first; of ours those at this alpha and L."""
    setting = (alpha, shortlist) if who == OURS else (None, None)
    mine = [row for row in rows if row["who"] == who and (row["alpha"], row["shortlist"]) == setting]
    return sorted(mine, key=lambda row: row["tokens"])


def too_slow(mine: list[dict], limit_s: float) -> str:
    """Why the next length is not tried for lack of time, or ""."""
    if mine and mine[-1]["ms"] > limit_s * 1e3:
        last = mine[-1]
        return f"a call took {last['ms'] / 1e3:.1f} s at {last['tokens']:,} tokens, over the limit of {limit_s:g} s"
    return ""


def too_large(mine: list[dict], device: torch.device) -> str:
    """Why the next length is not tried for lack of memory, or "": a CPU ends a process that asks for too much.

    The need is estimated from the last two lengths: memory grows on as it grew there, two to four times a doubling.
    """
    known = [row["mb"] for row in mine if row["mb"]]
    if device.type != "cpu" or len(known) < 2:
        return ""
    need = int(known[-1] * min(4.0, max(2.0, known[-1] / known[-2])) * 1e6)
    enough, figures = fits(need, None)
    return "" if enough else f"not enough memory: about {figures}"


def crossing(rows: list[dict], alpha: float, shortlist: int) -> list[str]:
    """Where the lines cross and where they stop, in words, from what was measured."""
    ours = _measured_at(rows, OURS, alpha, shortlist)
    said = []
    for who, label in list(WHO.items())[:2]:
        said += _compared(label, ours, _measured_at(rows, who, alpha, shortlist))
        stopped = [row for row in line(rows, who, alpha, shortlist) if row["why"]]
        said += [f"{label.capitalize()}, stops before {row['tokens']:,} tokens: {row['why']}." for row in stopped]
    stopped = [row for row in line(rows, OURS, alpha, shortlist) if row["why"]]
    said += [f"Proteus stops before {row['tokens']:,} tokens: {row['why']}." for row in stopped]
    return said


def _compared(label: str, ours: dict[int, dict], theirs: dict[int, dict]) -> list[str]:
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return []
    longest = both[-1]
    at_end = f"{times(theirs[longest]['ms'] / ours[longest]['ms'])} at {longest:,} tokens"
    first = _first_faster(ours, theirs)
    if first is None:
        return [f"Proteus has not overtaken {label} attention up to {longest:,} tokens: it is {at_end}."]
    if first == both[0]:
        return [f"Proteus was faster than {label} attention at every length: {at_end}."]
    before = both[both.index(first) - 1]
    return [f"Proteus overtakes {label} attention between {before:,} and {first:,} tokens: it is {at_end}."]


def _first_faster(ours: dict[int, dict], theirs: dict[int, dict]) -> int | None:
    """The length from which ours was faster at every length that both measured."""
    both = sorted(ours.keys() & theirs.keys())
    slower = [n for n in both if ours[n]["ms"] >= theirs[n]["ms"]]
    return next((n for n in both if not slower or n > slower[-1]), None)


def overtakes(rows: list[dict], who: str, alpha: float, shortlist: int) -> int | None:
    """The length from which ours was faster than `who` ("mha" or "fused"); None where it never was."""
    return _first_faster(*(_measured_at(rows, one, alpha, shortlist) for one in (OURS, who)))


def never_overtakes(rows: list[dict], who: str, alpha: float, shortlist: int) -> str:
    """A sentence where both were measured and ours was never faster than `who`; "" elsewhere."""
    ours, theirs = (_measured_at(rows, one, alpha, shortlist) for one in (OURS, who))
    return " ".join(_compared(WHO[who], ours, theirs)) if _first_faster(ours, theirs) is None else ""


def _measured_at(rows: list[dict], who: str, alpha: float, shortlist: int) -> dict[int, dict]:
    """The rows of one line that have figures, by length."""
    return {row["tokens"]: row for row in line(rows, who, alpha, shortlist) if not row["why"]}


def times(ratio: float) -> str:
    """2 -> "2.0 times faster", 0.5 -> "2.0 times slower"."""
    return f"{max(ratio, 1 / ratio):.1f} times {'faster' if ratio >= 1 else 'slower'}"


@cache
def stand_in() -> tuple[str, tuple[dict, ...]]:
    """(what was measured, its rows): a large GPU that may use only a free T4's memory and kernels."""
    report = json.loads((files("proteus_playground.experiments.results") / STAND_IN).read_text("utf-8"))
    note = (
        f"Measured on one {report['device']} that was limited to a T4's {report['settings']['cap_gb']} GB and to the "
        f"kernels that a T4 has (attention without projections, {report['settings']['dtype']}, 2 KV groups, "
        f"L {report['settings']['shortlist']}, torch {report['torch']}, {report['date']}). A T4 computes "
        f"about 15 times more slowly; it needs the memory that is shown. Unfused attention was not measured: its "
        f"scores alone take {size_words(8 * 32768**2 * 2)} at 32,768 tokens."
    )
    rows = sorted((row for row in report["rows"] if row["scope"] == "attention"), key=lambda row: row["tokens"])
    return note, tuple(rows)
