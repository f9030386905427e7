"""The report of `proteus stream`: the best champions with their text, as lines to read or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import typer

from ..common import files
from ..streaming.buffer import Champions
from ..streaming.pipeline import Scorer
from ..streaming.replay import page_of
from ..streaming.second_pass import gather
from ..streaming.stores import Store

SHOWN = 10  # champions in the report
AROUND = 12  # kept tokens shown on either side of a champion
WIDEST = 500  # characters of a text that are shown


def best_champions(
    kept: Champions, store: Store, scorer: Scorer, text: Callable[[np.ndarray], str | None]
) -> Iterator[dict]:
    """The champions with the highest scores, each with the text kept around it; none lies in the text of another.

    text: turns rows of the document into text.
    """
    runs = np.concatenate(([0], np.cumsum(np.diff(kept.position) > 1)))  # a gap ends a stretch of text
    shown, seen = 0, np.zeros(len(kept), bool)
    for i in kept.ranking():
        if seen[i] or kept.position[i] != kept.champion[i]:
            continue
        at = kept.position[i]
        near = np.flatnonzero((runs == runs[i]) & (np.abs(kept.position - at) <= AROUND))
        seen[near] = True
        why, said = scorer.explain(int(kept.reason[i])), text(gather(store, kept.position[near]))
        yield {"token": int(at), "page": page_of(at), "score": float(kept.score[i]), "why": why, "text": said}
        shown += 1
        if shown == SHOWN:
            return


def in_words(report: dict) -> Iterator[str]:
    """The report as lines of plain text."""
    document, first = report["document"], report["pass_1"]
    yield f"document  {document['name']}: {document['tokens']:,} {document['kind']}, {report['storage']['why']}"
    shared = f", one of {report['ranks']} processes" if report["ranks"] > 1 else ""
    yield (
        f"pass 1    {report['model']}, {first['tokens_read']:,} tokens in {first['seconds']:.1f} s{shared}: "
        f"{first['tokens_per_s']:,.0f} tokens/s; {first['promoted']:,} promoted, {first['evicted']:,} evicted"
    )
    yield f"kept      {report['kept']:,} tokens, {report['kept_share']:.2%} of the document; the best:"
    for one in report["best"]:
        text = "" if one["text"] is None else f"  …{_line(one['text'])}…"
        yield f"  page {one['page']:,}, score {one['score']:.2f} ({one['why']}){text}"
    if "pass_2" in report:
        second = report["pass_2"]
        yield f"pass 2    over what was kept, {second['positions']} positions, {second['seconds']:.1f} s:"
        rest = {name: value for name, value in second.items() if name not in ("positions", "seconds")}
        yield f"  {_line(rest.get('text', '')) or json.dumps(rest)}"


def _line(text: str) -> str:
    """A text as one line of at most `WIDEST` characters, without control characters for the terminal."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if len(shown) <= WIDEST else f"{shown[: WIDEST - 1]}…"


def write_report(report: dict, json_file: str) -> None:
    """Print the report; json_file: also write it there as JSON, or print only JSON for "-"."""
    whole = json.dumps(report, indent=1, ensure_ascii=False)
    if json_file == "-":
        typer.echo(whole)
        return
    for line in in_words(report):
        typer.echo(line)
    if json_file:
        files.write_text(json_file, whole + "\n")
