"""The chunk buffer panel's words as HTML: the text in the buffer, what each chunk changed, and the tiles."""

from __future__ import annotations

from html import escape

import numpy as np

from proteus_playground.streaming.buffer import Champions
from proteus_playground.streaming.replay import Document, Replay, Run, Scores, page_of, runs

from ..parts.html import MODEL_NAMES, cell, key, note_html, tiles_html
from ..parts.sentences import listed
from ..parts.terms import term_html
from .figure import EVICTED, KEPT, NEEDLE, PROMOTED
from .state import PLAN

RUNS = 40  # stretches of text that are shown
RUN_TOKENS = 60  # shown of one stretch, around its champion
EVENTS = 6  # champions named that were added, and as many that were removed
LEGENDS = {
    "sky": key("#d5dae0", "best score") + key(KEPT, "in the buffer") + key(PROMOTED, "added by this chunk")
    + key(EVICTED, "removed by it") + key("#1b1f24", "score to enter", line=True) + key("#fdf3d7", "this chunk"),
    "curves": key(NEEDLE, "share of the needle that is kept", line=True)
    + key(KEPT, "share of the buffer that is full", line=True),
    "text": key("#d6efe4", "added by this chunk") + key("#f4dcec", "the needle"),
}  # fmt: skip


def word_at(document: Document, words: list[str], position: int) -> str:
    """`“soup” (page 112)`."""
    return f"“{words[document.ids[position]].strip() or '↵'}” (page {page_of(position):,})"


def run_html(run: Run, document: Document, words: list[str], scores: Scores) -> str:
    """One stretch of text: its champion in bold, and the reason of its score."""
    first, last = max(run.start, run.champion - RUN_TOKENS // 2), min(run.stop, run.champion + RUN_TOKENS // 2)

    def text(start: int, stop: int) -> str:
        return escape("".join(words[i] for i in document.ids[start:stop])).replace("\n", "<i>↵</i>")

    parts = [
        "…" if first > run.start else "", text(first, run.champion), f"<b>{text(run.champion, run.champion + 1)}</b>",
        text(run.champion + 1, last), "…" if last < run.stop else "",
    ]  # fmt: skip
    needle = document.needle
    mine = run.start < needle.stop and needle.start < run.stop
    kind = (" pp-needle" if mine else "") + (" pp-new" if run.fresh else "")
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
    """(champion, its tokens with their neighbours, score, reason), best first."""
    champion, first, count = np.unique(some.champion, return_index=True, return_counts=True)
    out = zip(champion.tolist(), count.tolist(), some.score[first].tolist(), some.reason[first].tolist(), strict=True)
    return sorted(out, key=lambda group: (-group[2], group[0]))


def events_html(replay: Replay, step: int, document: Document, words: list[str], scores: Scores) -> str:
    """The champions that this chunk added, and those that it removed."""
    if not step:
        return '<div class="pp-events"><p>No chunk has been read.</p></div>'
    columns = []
    for kind, some, verb in (("in", replay.promoted(step), "Added"), ("out", replay.evicted(step), "Removed")):
        groups = _groups(some)
        lines = [f"<b>{verb} by chunk {step:,}: {len(some):,} tokens</b>"]
        for champion, count, score, reason in groups[:EVENTS]:
            others = f" and {count - 1} neighbour{'s' if count > 2 else ''}" if count > 1 else ""
            mine = " pp-needle" if champion in document.needle else ""
            said = escape(f"{word_at(document, words, champion)}{others}, {score:.2f}, {scores.explain(reason)}")
            lines.append(f'<p class="pp-{kind}{mine}" title="{said}"><i></i>{said}</p>')
        if len(groups) > EVENTS:
            lines.append(
                f'<p class="pp-{kind}"><i></i>and {len(groups) - EVENTS} more {term_html("champion", "champions")}</p>'
            )
        columns.append(f"<div>{''.join(lines)}</div>")
    return f'<div class="pp-events">{"".join(columns)}</div>'


def step_sentence(replay: Replay, step: int) -> str:
    """What the last chunk did, in one sentence."""
    if not step:
        return "Nothing has been read yet."
    came, gone = len(replay.promoted(step)), len(replay.evicted(step))
    first, last = page_of(replay.read(step - 1)), page_of(replay.read(step) - 1)
    where = f"page {first:,}" if first == last else f"pages {first:,} to {last:,}"
    did = f"{came:,} tokens were added" if came else "no token scored high enough"
    removed = f" and {gone:,} were removed for them" if gone else ""
    return f"Chunk {step:,} of {replay.chunks:,}, {where}: {did}{removed}."


def needle_sentence(replay: Replay, step: int, document: Document) -> str:
    """Whether the needle has been read, and how much of it is kept."""
    size = len(document.needle)
    if not size:
        return "No needle was planted."
    kept = round(float(replay.recall[step]) * size)
    if replay.read(step) <= document.needle.start:
        return f"The needle, on page {page_of(document.needle.start):,}, has not been read yet."
    if kept:
        return f"{kept} of the needle's {size} tokens are in the buffer."
    was = (replay.recall[: step + 1] > 0).any()
    return "The needle was in the buffer and has been removed." if was else "The needle was read and not kept."


def numbers_html(request: int, replay: Replay, step: int, document: Document, scores: Scores) -> str:
    kept, bar, size = int(replay.held[step]), float(replay.bar[step]), len(document.needle)
    found = round(float(replay.recall[step]) * size) if size else 0
    read, full = replay.read(step), bool(np.isfinite(bar))
    speed = f"{scores.until / scores.seconds:,.0f} tokens/s" if scores.seconds else ""
    cells = [
        cell("chunk", f"{step:,}", f"of {replay.chunks:,}",
              "Chunks that have been read, of all chunks of the document."),
        cell("tokens read", f"{read:,}", f"of {replay.tokens:,}", "Tokens that have been read and scored."),
        cell("in the buffer", f"{kept:,} of {replay.plan.buffer_tokens:,}",
              f"{kept / max(1, read):.1%} of what was read",
              "Tokens that are kept, of those that the buffer can hold."),
        cell("score to enter", f"{bar:.2f}" if full else "none",
              "lowest in the buffer" if full else "buffer not full yet",
             "Lowest score in the full buffer: a new token must have a higher one."),
        cell("added, removed", f"{len(replay.promoted(step)):,}, {len(replay.evicted(step)):,}", "by this chunk",
             "Tokens that the last chunk added to the buffer, and those that were removed to make room."),
        cell("the needle", f"{found} of {size}" if size else "none", "of its tokens are kept",
              "Tokens of the planted fact that are in the buffer now."),
        cell("scored", f"{scores.until:,}", speed or "tokens",
              "Tokens whose score is known, and the measured speed of scoring on this machine."),
    ]  # fmt: skip
    sizes = " ".join(str(getattr(replay.plan, name)) for name in PLAN)
    return tiles_html(request, cells, f' data-plan="{sizes}"')


def banner_html(source, judge: str, asked: list[str], subject) -> str:
    """What is read and how it is scored; on yellow where the vectors are random."""
    words, note = source.words, source.haystack.note
    if judge == "words":
        whose = "" if words.random else f"{MODEL_NAMES.get(words.model, words.model)}'s "
        names = listed([f"“{word}”" for word in asked[:12]])
        how = (f"Each token is compared with {names}. Its score is its similarity to one of them (cosine of "
               f"{whose}{words.name}) times the rarity of that word in the document; the highest product counts. "
               "The words around it do not count.")  # fmt: skip
    else:
        how = "The score of a token says how well its keys, in context, match the model's queries for the prompt. "
        how += (
            subject.note.replace(words.model, MODEL_NAMES.get(words.model, words.model)) if subject is not None else ""
        )
    said = note_html(f"{note}, one sentence planted. {how}")
    if not words.random:
        return said
    return note_html(f"{words.note} {source.why}", "The word vectors are random.") + said


def answer_html(answer: str, chunks: int, tokens: int, old: bool) -> str:
    """The model's answer; grey where the buffer on show is not the one that it was given."""
    when = f"Answer after {chunks:,} chunks, from {tokens:,} tokens of the buffer alone:"
    kind = " pp-old" if old else ""
    return f'<div class="pp-answer{kind}"><span>{escape(when)}</span> <b>{escape(answer or "(no answer)")}</b></div>'
