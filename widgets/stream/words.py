"""What the chunk buffer panel says: the buffer as text to read, who came and went, and the numbers, as HTML."""

from __future__ import annotations

from html import escape

import numpy as np

from proteus_playground.streaming.buffer import Champions
from proteus_playground.streaming.replay import Document, Replay, Run, Scores, page_of, runs

from ..parts.sentences import listed
from ..workbench.readout import NAMES, _cell, _key
from .figure import EVICTED, KEPT, NEEDLE, PROMOTED
from .state import PLAN

RUNS = 40  # stretches of text that are shown
RUN_TOKENS = 60  # of one stretch, about its champion
EVENTS = 6  # of each kind
LEGENDS = {
    "sky": _key("#d5dae0", "best score") + _key(KEPT, "in the buffer") + _key(PROMOTED, "just came in")
    + _key(EVICTED, "just left") + _key("#1b1f24", "lowest score in a full buffer", line=True),
    "curves": _key(NEEDLE, "the needle", line=True) + _key(KEPT, "the buffer", line=True),
    "text": _key("#d6efe4", "just came in") + _key("#f4dcec", "the needle"),
}  # fmt: skip


def word_at(document: Document, words: list[str], position: int) -> str:
    """`“soup” (page 112)`."""
    return f"“{words[document.ids[position]].strip() or '↵'}” (page {page_of(position):,})"


def run_html(run: Run, document: Document, words: list[str], scores: Scores) -> str:
    """One stretch: its champion in bold, and why it is here."""
    first, last = max(run.start, run.champion - RUN_TOKENS // 2), min(run.stop, run.champion + RUN_TOKENS // 2)

    def text(start: int, stop: int) -> str:
        return escape("".join(words[i] for i in document.ids[start:stop])).replace("\n", "<i>↵</i>")

    parts = [
        "…" if first > run.start else "", text(first, run.champion), f"<b>{text(run.champion, run.champion + 1)}</b>",
        text(run.champion + 1, last), "…" if last < run.stop else "",
    ]  # fmt: skip
    needle = document.needle
    mine = run.start < needle.stop and needle.start < run.stop
    kind = " pp-needle" * mine + " pp-new" * run.fresh
    why = escape(scores.explain(run.reason))
    head = f"<b>{run.score:.2f}</b> page {page_of(run.champion):,} · {why}" + (" · <b>the needle</b>" if mine else "")
    return f'<div class="pp-run{kind}"><span>{head}</span><p>{"".join(parts)}</p></div>'


def buffer_html(request: int, replay: Replay, step: int, document: Document, words: list[str], scores: Scores) -> str:
    """The buffer after `step` chunks, best stretch first."""
    found = runs(replay.buffer(step), replay.read(step - 1) if step else 0)
    body = "".join(run_html(run, document, words, scores) for run in found[:RUNS])
    more = f'<p class="pp-more">and {len(found) - RUNS:,} more stretches</p>' if len(found) > RUNS else ""
    empty = '<p class="pp-more">Nothing is kept yet: press play, or step forward.</p>' if not found else ""
    return f'<div class="pp-buffer" data-request="{request}" tabindex="0">{empty}{body}{more}</div>'


def _groups(some: Champions) -> list[tuple[int, int, float, int]]:
    """(champion, tokens it stands for, score, reason), best first."""
    champion, first, count = np.unique(some.champion, return_index=True, return_counts=True)
    out = zip(champion.tolist(), count.tolist(), some.score[first].tolist(), some.reason[first].tolist(), strict=True)
    return sorted(out, key=lambda group: (-group[2], group[0]))


def events_html(replay: Replay, step: int, document: Document, words: list[str], scores: Scores) -> str:
    """Who came and who left with this chunk, champion by champion."""
    if not step:
        return '<div class="pp-events"><p>No chunk has been read.</p></div>'
    columns = []
    for kind, some, verb in (("in", replay.promoted(step), "Promoted"), ("out", replay.evicted(step), "Evicted")):
        groups = _groups(some)
        lines = [f"<b>{verb} by chunk {step:,}: {len(some):,} tokens</b>"]
        for champion, count, score, reason in groups[:EVENTS]:
            others = f" and {count - 1} neighbour{'s' if count > 2 else ''}" if count > 1 else ""
            mine = " pp-needle" if champion in document.needle else ""
            said = escape(f"{word_at(document, words, champion)}{others}, {score:.2f}, {scores.explain(reason)}")
            lines.append(f'<p class="pp-{kind}{mine}" title="{said}"><i></i>{said}</p>')
        if len(groups) > EVENTS:
            lines.append(f'<p class="pp-{kind}"><i></i>and {len(groups) - EVENTS} more champions</p>')
        columns.append(f"<div>{''.join(lines)}</div>")
    return f'<div class="pp-events">{"".join(columns)}</div>'


def step_sentence(replay: Replay, step: int) -> str:
    """What the last chunk did, in one sentence."""
    if not step:
        return "Nothing has been read yet."
    came, gone = len(replay.promoted(step)), len(replay.evicted(step))
    first, last = page_of(replay.read(step - 1)), page_of(replay.read(step) - 1)
    where = f"page {first:,}" if first == last else f"pages {first:,} to {last:,}"
    did = "nobody good enough" if not came else f"{came:,} tokens came in"
    left = f" and {gone:,} had to leave" if gone else ""
    return f"Chunk {step:,} of {replay.chunks:,}, {where}: {did}{left}."


def needle_sentence(replay: Replay, step: int, document: Document) -> str:
    """Where the needle is by now."""
    size = len(document.needle)
    if not size:
        return "No needle was planted."
    kept = round(float(replay.recall[step]) * size)
    if replay.read(step) <= document.needle.start:
        return f"The needle, on page {page_of(document.needle.start):,}, has not been read yet."
    if kept:
        return f"{kept} of the needle's {size} tokens are in the buffer."
    was = (replay.recall[: step + 1] > 0).any()
    return "The needle was in the buffer and has been evicted." if was else "The needle was read and not kept."


def numbers_html(request: int, replay: Replay, step: int, document: Document, scores: Scores) -> str:
    kept, bar, size = int(replay.held[step]), float(replay.bar[step]), len(document.needle)
    found = round(float(replay.recall[step]) * size) if size else 0
    read = replay.read(step)
    speed = f"{scores.until / scores.seconds:,.0f} tokens/s" if scores.seconds else ""
    cells = [
        _cell("chunk", f"{step:,}", f"of {replay.chunks:,}", "Chunks read so far, and in the whole document."),
        _cell("tokens read", f"{read:,}", f"of {replay.tokens:,}", "Tokens that have been read and scored."),
        _cell("in the buffer", f"{kept:,} of {replay.plan.buffer_tokens:,}",
              f"{kept / max(1, read):.1%} of what was read",
              "Tokens that are kept, and how many fit."),
        _cell("to get in", f"{bar:.2f}" if np.isfinite(bar) else "any score", "is the lowest score in"
              if np.isfinite(bar) else "there is room", "A token has to score above the lowest one of a full buffer."),
        _cell("came, left", f"{len(replay.promoted(step)):,}, {len(replay.evicted(step)):,}", "with this chunk",
              "Tokens that this chunk brought in, and those that had to leave for them."),
        _cell("the needle", f"{found} of {size}" if size else "none", "of its tokens are kept",
              "How much of the planted fact is in the buffer now: its recall."),
        _cell("scored", f"{scores.until:,}", speed or "tokens",
              "Tokens whose score is known, and how fast they were scored on this machine; measured."),
    ]  # fmt: skip
    sizes = " ".join(str(getattr(replay.plan, name)) for name in PLAN)
    return f'<div class="pp-readout" data-request="{request}" data-plan="{sizes}">{"".join(cells)}</div>'


def banner_html(source, judge: str, asked: list[str], subject) -> str:
    """What is read and who judges it; loud where the vectors are random."""
    words, note = source.words, source.haystack.note
    if judge == "words":
        whose = "" if words.random else f"{NAMES.get(words.model, words.model)}'s "
        names = listed([f"“{word}”" for word in asked[:12]])
        how = (f"A token's score: how near it is (cosine of {whose}{words.name}) to the nearest of {names}, times how "
               "rare that word is here. Each token is judged alone.")  # fmt: skip
    else:
        how = "A token's score: how well the model's own queries for the prompt match its keys, in context. "
        how += subject.note.replace(words.model, NAMES.get(words.model, words.model)) if subject is not None else ""
    said = f'<div class="pp-note">{escape(note)}, one sentence planted. {escape(how)}</div>'
    if not words.random:
        return said
    loud = f"<b>The word vectors are random.</b> {escape(words.note)} {escape(source.why)}"
    return f'<div class="pp-random">{loud}</div>{said}'


def answer_html(answer: str, chunks: int, tokens: int, old: bool) -> str:
    """What the model said; grey where the buffer that it said it from is not the one on show."""
    when = f"After {chunks:,} chunks, from {tokens:,} tokens of the buffer and nothing else, the model answers:"
    kind = " pp-old" if old else ""
    return f'<div class="pp-answer{kind}"><span>{escape(when)}</span> <b>{escape(answer or "nothing")}</b></div>'
