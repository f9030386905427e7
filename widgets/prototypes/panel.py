"""The prototype panel: prototypes move towards keys, step by step, and one operates on gates meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from proteus_playground.playground.gate_story import GateStory, Operation, Snapshot
from proteus_playground.playground.live import Live

from ..parts.html import note_html
from ..parts.terms import with_terms
from . import words
from .board import PrototypeBoard
from .figure import PrototypePictures


@dataclass
class Run:
    """A story from its beginning. past: its gates after each step; events: index in `past` -> what was done."""

    story: GateStory
    past: list[Snapshot]
    events: dict[int, str] = field(default_factory=dict)
    last: Operation | None = None
    said: str = ""


class PrototypePanel(PrototypeBoard):
    """What `prototype_panel` returns. `run` is the `Run` on show, `chosen` the gate that is followed."""

    def __init__(self, make: Callable[[], Live], layer: int = 0, group: int = 0):
        self.run: Run | None = None
        self.chosen = 0
        self._make, self._live, self._first = make, None, (layer, group)
        self._todo: deque = (
            deque()
        )  # steps and operations that were asked for: unlike pictures, none of them is dropped
        self._drawn = True
        self.pictures = PrototypePictures(self.choose)
        super().__init__(self.pictures.widget)
        self.settings.observe(self._set_decay, "ema_decay")
        self.load()

    # The story

    def load(self) -> None:
        """Starts from the beginning, with what the controls ask for."""
        self.player.pause()
        self.worker.cancel()
        self._todo.clear()
        self.say("busy", what="the model reads the text")
        layer, group = self._first if self._live is None else (self.layer.value, self.group.value)
        scattered, decay = self.start.value, self.settings.ema_decay

        def work(stop, progress) -> Run:
            if self._live is None:
                self._live = self._make()
            most = len(self._live.model.blocks) - 1, self._live.model.cfg.attention.n_kv_heads - 1
            where = {"layer": min(layer, most[0]), "group": min(group, most[1])}
            story = GateStory(self._live, **where, scattered=scattered, ema_decay=decay)
            return Run(story, [story.snapshot()])

        self.worker.submit("load", work, self._loaded, self._failed)

    def _loaded(self, _: int, run: Run) -> None:
        live, self.run, self.problem, story = self._live, run, "", run.story
        self.banner.value = note_html(live.note, "These weights are random." if live.random else "")
        self.fill(self.layer, list(range(len(live.model.blocks))), story.layer)
        self.fill(self.group, list(range(live.model.cfg.attention.n_kv_heads)), story.group)
        self.chosen = int(run.past[0].lured.argmax())
        with self.pictures.widget.batch_update():
            self.pictures.reset(story.keys, live.tokens, run.past[0].prototypes[run.past[0].alive], story.explained)
        self._draw()

    def _set_decay(self, change) -> None:
        if self.run is not None:
            self.run.story.gates.ema_decay = change["new"]

    # Steps and operations

    def do(self, what: str, *operands: int) -> None:
        """Takes a "step", or does one of `gate_story.OPERATIONS` with its operands. Pauses the player."""
        if self.run is None:
            return
        self.player.pause()
        self._todo.append((what, *operands))
        self.say("busy", what="at work")
        run = self.run

        def work(stop, progress) -> None:
            while self._todo:
                self._apply(run, *self._todo.popleft())

        self.worker.submit("model", work, lambda *_: self._draw(), self._failed)

    @staticmethod
    def _apply(run: Run, what: str, *operands: int) -> None:
        if what == "step":
            run.past.append(run.story.step())
            return
        try:
            run.last = run.story.operate(what, *operands)
        except ValueError as err:  # the operation is not possible, and nothing has changed
            run.said = str(err)
            return
        run.said = words.operation_sentence(run.last)
        run.past.append(run.story.snapshot())
        run.events[len(run.past) - 1] = f"{what}: output changed by {words.amount(run.last.change)}"

    def toggle(self, on: bool) -> None:
        """Plays until it is paused; surgery and a single step pause it, too."""
        if not on:
            self.worker.cancel("frame")
            self.worker.submit("model", lambda stop, progress: None, lambda *_: self._draw(), self._failed)
            return
        run = self.run
        if run is None:  # nothing to play yet
            self.player.pause()
            return

        def work(stop, progress) -> None:
            while not stop():
                self._apply(run, "step")
                if (
                    self._drawn and self.room.free
                ):  # a browser that is slower than the gates gets one picture for several steps
                    self._drawn = False
                    progress(0.0, "")
                self.player.rest(stop)

        self.worker.submit("frame", work, lambda *_: None, self._failed, lambda *_: self._draw())

    # What is shown

    def choose(self, gate: int) -> None:
        """Follows another gate; a click on a key, a prototype or a bar calls this."""
        if self.run is not None and gate is not None and self.run.past[-1].alive[gate]:
            self.chosen = gate
            self._draw()

    def _draw(self) -> None:
        run = self.run
        if run is None:
            return
        past, tokens = list(run.past), run.story.tokens
        now, self.number = past[-1], self.number + 1
        if not now.alive[self.chosen]:
            self.chosen = int(now.nearest[self.chosen])  # the gate that took most of its keys
        with self.pictures.widget.batch_update():
            self.pictures.draw(self.number, past, self.chosen, run.events)
        self.fill_surgery(now, self.chosen)
        self.said.value = f'<div class="pp-said">{with_terms(run.said or "Choose a gate and operate on it.")}</div>'
        self.numbers.value = words.numbers_html(self.number, past, run.last)
        self.text.value = words.text_html(self.number, now, self.chosen, tokens)
        where = f"Keys of layer {run.story.layer}, KV group {run.story.group}"
        self.caption("map", where, "Click a key, a prototype or a bar to follow its gate.")
        self.caption("bars", "Keys lured per gate", words.spread_sentence(now))
        self.caption("curves", "How well prototypes fit their keys", words.fit_sentence(past))
        self.caption("text", f"What gate {self.chosen} lures", words.gate_sentence(now, self.chosen, tokens))
        self.say("fresh")
        self.room.ask(self.number)
        self._drawn = True

    def _failed(self, _: int, err: BaseException) -> None:
        self.player.pause()
        super()._failed(_, err)
