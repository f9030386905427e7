"""The chunk buffer panel: one state, a worker for pictures, and a second one for the model's layers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from tempfile import TemporaryDirectory

from proteus_playground.streaming.replay import PAGE, Scores

from ..parts.sentences import duration
from ..parts.worker import Worker
from . import words as stream_words
from .board import StreamBoard
from .figure import StreamPictures
from .frames import Frame, Frames, Source
from .state import PLAN, StreamState, Wanted

ROOM = 512  # tokens of the model's context that are kept free for prompt and answer
PICTURE_SECONDS = 0.7  # between pictures while the layers score


class StreamPanel(StreamBoard):
    """What `stream_panel` returns. `drawn` is the last `Frame` shown, `transport.step` the chunks read in it."""

    def __init__(self, state: StreamState, make_source: Callable, make_subject: Callable):
        self.pictures = StreamPictures()
        super().__init__(state, self.pictures.widget, self._step, self._load)
        self._make_source, self._make_subject = make_source, make_subject
        self.source: Source | None = None
        self.frames: Frames | None = None
        self.drawn: Frame | None = None
        self.subject = None
        self._folder = TemporaryDirectory(
            prefix="proteus-keys-", ignore_cleanup_errors=True
        )  # deleted when the panel closes
        self._reply: tuple[str, Frame, int, int] | None = None  # answer, frame, step, tokens
        self._running: tuple | None = None  # key of the scores that the layers are computing
        self._drawn_at = 0.0
        self.layers_worker = Worker()
        self.buttons.layers.on_click(lambda _: self.score_in_context())
        self.buttons.answer.on_click(lambda _: self.ask_for_answer())
        self.cancel.on_click(lambda _: self.stop())
        self.transport.jump.on_click(lambda _: self._to_needle())
        state.observe(lambda _: self._ask(), [*PLAN, "prompt", "needle", "page", "judge"])
        state.observe(lambda _: self._load(), ["model"])
        self._load()

    # What is wanted

    def wanted(self) -> Wanted:
        state = self.state
        now = Wanted(state.judge, state.prompt, state.needle, min(state.page, self.page.max), state.plan())
        known = self.frames.layers.get(self.frames.key(now)) if self.frames and state.judge == "layers" else None
        return now if known is None else replace(now, until=known.until)

    def _ask(self) -> None:
        """Requests the picture that the controls ask for."""
        frames, wanted = self.frames, self.wanted()
        if self._running not in (None, Frames.key(wanted)):
            self.layers_worker.cancel("model")  # its result would belong to the old prompt
            self._running = None
        if frames is None:
            return
        if self.drawn is not None and wanted == self.drawn.wanted and not self.problem:
            if self.worker.cancel("frame"):  # back at the picture on show: the one on its way is dropped
                self._say_state("fresh")
            return
        self.say_soon(self._still_stale)
        self.worker.submit("frame", lambda stop, _: frames.make(wanted, stop), self._draw, self._failed)

    def _still_stale(self) -> None:
        """Says that the picture is old, unless the new one is there already."""
        if self.drawn is None or self.wanted() != self.drawn.wanted:
            self._say_state("stale")

    def _say_state(self, state: str) -> None:
        """Shows a status, unless the layers are scoring: then it shows their progress."""
        if state == "fresh" and self.drawn is not None and 0 < self.drawn.scores.until < len(self.drawn.scores.score):
            state = "stopped"
        if self._running is None:
            self.say(state)

    # What is shown

    def _draw(self, _: int, frame: Frame) -> None:
        old, now = self.drawn, frame
        step = self._where(old, now)
        self.drawn, self.problem = now, ""
        with self.pictures.widget.batch_update():
            if old is None or old.scores is not now.scores or old.wanted.until != now.wanted.until:
                self.pictures.scored(now.document, now.scores)
            self.pictures.replayed(now.replay)
            self.transport.extend(now.replay.steps, step)
            self._show(step)
        self.banner.value = stream_words.banner_html(self.source, now.wanted.judge, now.asked, self.subject)
        if self.wanted() == now.wanted:
            self._say_state("fresh")

    def _where(self, old: Frame | None, now: Frame) -> int:
        """The step that has read as far as the old picture; the last step if that showed its end or the text is new."""
        if old is None or old.document is not now.document or old.wanted.prompt != now.wanted.prompt:
            return now.replay.steps
        if old.wanted.judge != now.wanted.judge or self.transport.step >= self.transport.last:
            return now.replay.steps
        read = old.replay.read(self.transport.step)
        return min(now.replay.steps, round(read / now.replay.plan.chunk_tokens))

    def _step(self, step: int) -> None:
        if self.drawn is not None:
            with self.pictures.widget.batch_update():
                self._show(step)

    def _show(self, step: int) -> None:
        """Shows the state after `step` chunks, inside a `batch_update`, so that the messages are sent together."""
        self.number += 1
        frame, number, words = self.drawn, self.number, self.source.words.vocabulary
        run, document, scores = frame.replay, frame.document, frame.scores
        self.pictures.draw(number, step, scores, words)
        self.buffer.value = stream_words.buffer_html(number, run, step, document, words, scores)
        self.events.value = stream_words.events_html(run, step, document, words, scores)
        self.numbers.value = stream_words.numbers_html(number, run, step, document, scores)
        waiting = frame.wanted.judge == "layers" and not run.steps
        empty = "Nothing is scored in context yet: press “Score in context”." if waiting else ""
        self.caption("sky", "Scores along the document", empty or stream_words.step_sentence(run, step))
        self.caption("curves", "How much is in the buffer", stream_words.needle_sentence(run, step, document))
        self.caption("text", "What the buffer holds, best first", "")
        self._show_reply(step)

    def _to_needle(self) -> None:
        if self.drawn is not None and len(self.drawn.document.needle):
            self.transport.pause()
            self.transport.go(self.drawn.document.needle.stop // self.drawn.replay.plan.chunk_tokens + 1)

    # Work that takes longer

    def _load(self) -> None:
        """Loads another text or model; the old picture stays until the new one is there."""
        model, text, tokens = self.state.model, self.state.text, self.state.tokens
        self.worker.cancel()
        self.layers_worker.cancel()
        self._running = None
        self.say("busy", 0.0, f"reading {tokens:,} tokens of {text}")
        self.worker.submit(
            "load", lambda stop, progress: self._make_source(model, text, tokens, stop, progress), self._loaded,
            self._failed, self._progress,
        )  # fmt: skip

    def _loaded(self, _: int, source: Source) -> None:
        if self.source is not None and self.source.words is not source.words:
            self.subject = None
        self.source, self.frames, self.drawn = source, Frames(source), None
        self.page.max = -(-len(source.haystack.tokens) // PAGE)
        self.buttons.layers.disabled = self.buttons.answer.disabled = source.words.random
        self._ask()

    def score_in_context(self) -> None:
        """Scores every token by the model's layers; goes on where it was stopped before."""
        if self.source is None or self.drawn is None or self.source.words.random:
            return
        self.state.judge = "layers"
        source, frames, wanted = self.source, self.frames, self.wanted()
        self._running = Frames.key(wanted)
        self.say("busy", 0.0, "loading the model")

        def work(stop, progress) -> Scores:
            scorer = self._ready(source).scorer(wanted.prompt)
            scorer.stop = stop
            return frames.score_in_context(wanted, scorer, progress, stop)

        self.layers_worker.submit("model", work, self._scored, self._failed, self._scoring)

    def _ready(self, source: Source):
        """The model, loaded on its first use."""
        self.subject = self.subject or self._make_subject(source.words.model, self._folder.name)
        return self.subject

    def ask_for_answer(self) -> None:
        """The model answers the prompt from the buffer on show, or from as many of its best tokens as fit."""
        source, frame, step = self.source, self.drawn, self.transport.step
        if source is None or frame is None or source.words.random or not frame.replay.held[step]:
            return
        self.say("busy", what="the model reads the buffer")

        def work(stop, progress) -> tuple:
            reader = self._ready(source).reader
            kept = frame.replay.buffer(step).best(reader.context - ROOM)
            said = reader.answer(frame.document.ids[kept.position], kept.position, frame.wanted.prompt)
            return said, frame, step, len(kept)

        self.layers_worker.submit("frame", work, self._answered, self._failed)

    def _answered(self, _: int, reply: tuple) -> None:
        self._reply = reply
        self._say_state("fresh")
        self._show_reply(self.transport.step)

    def _show_reply(self, step: int) -> None:
        if self._reply is not None:
            said, frame, at, tokens = self._reply
            self.answer.value = stream_words.answer_html(said, at, tokens, frame is not self.drawn or at != step)

    def _scoring(self, _: int, share: float, what: str) -> None:
        scores = self.frames.layers.get(self._running)
        if scores is None:
            return
        speed = scores.until / max(scores.seconds, 1e-9)
        rest = (len(scores.score) - scores.until) / speed
        self.say("busy", share, f"{what}, {speed:,.0f} a second, {duration(rest)} left")
        if time.monotonic() - self._drawn_at > PICTURE_SECONDS:
            self._drawn_at = time.monotonic()
            self._ask()

    def _scored(self, _: int, scores: Scores) -> None:
        self._running = None
        self._say_state("fresh")
        self._ask()

    def stop(self) -> None:
        """Cancel: the running work stops at its next check; the scores so far are kept and can be played."""
        self.worker.cancel()
        self.layers_worker.cancel()
        self._running = None
        self.say("stopped")
        if self.source is not None:
            self._ask()

    def _end(self) -> None:
        self.layers_worker.close()
        self._folder.cleanup()

    def _failed(self, _: int, err: BaseException) -> None:
        self._running = None
        super()._failed(_, err)
