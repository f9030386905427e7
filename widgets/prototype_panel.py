"""The prototype panel: prototypes are drawn to keys, step by step, and gates are operated on while they are."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import ipywidgets as w
from traitlets import Float, HasTraits

from proteus_playground.gate_story import GateStory, Live, Operation, Snapshot

from . import prototype_words as words
from .board import _row
from .controls import Knob, _labelled, tip
from .prototype_figure import PrototypePictures
from .readout import caption_html, status_html
from .room import Room
from .state import Field
from .stream_board import AUTO, styles
from .worker import Worker

PACE = {"slow": 0.7, "normal": 0.25, "fast": 0.06}  # seconds between updates
STICKS = "How much of a prototype survives one update: at 0 it jumps to its keys, near 1 it hardly moves."
DECAY = Field("ema_decay", "ema", "EMA decay", 0.0, 0.99, 0.8, STICKS)
SMALL = w.Layout(width="76px")


@dataclass
class Run:
    """A story from its beginning: what its gates looked like, and what was done to them before which picture."""

    story: GateStory
    past: list[Snapshot]
    events: dict[int, str] = field(default_factory=dict)
    last: Operation | None = None
    said: str = ""


class Settings(HasTraits):
    ema_decay = Float(DECAY.default)


class PrototypePanel(w.VBox):
    """What `prototype_panel` returns. `run` is the `Run` on show, `chosen` the gate that is followed."""

    def __init__(self, make: Callable[[], Live], layer: int = 0, group: int = 0):
        self.run: Run | None = None
        self.chosen, self.number, self.problem = 0, 0, ""
        self._make, self._live, self._first = make, None, (layer, group)
        self._todo: deque = deque()  # steps and operations asked for: each is done, none is overtaken
        self._filling, self._drawn = False, True
        self.settings, self.worker = Settings(), Worker()
        self.room = Room()
        self.pictures = PrototypePictures(self.choose)
        self.settings.observe(self._set_decay, "ema_decay")
        self._build_controls()
        head = _row("pp-head", self.title, self.status)
        top = w.VBox([_row("pp-actions", *self._travel), _row("pp-actions", *self._surgery), self.said])
        top.add_class("pp-top")
        for name, caption in self.captions.items():
            caption.add_class(f"pp-at-{name}")
        placed = [self.captions[name] for name in ("map", "bars", "curves")]
        picture, side = w.VBox([self.room, self.pictures.widget, *placed]), w.VBox([self.captions["text"], self.text])
        picture.add_class("pp-figure")
        side.add_class("pp-side")
        super().__init__([styles(), head, self.banner, top, self.numbers, _row("pp-panels", picture, side)])
        self.add_class("pp-app")
        self.add_class("pp-prototypes")
        self._load()

    def _build_controls(self) -> None:
        self.title = w.HTML('<div class="pp-title"><b>Gates and prototypes</b></div>')
        self.banner, self.numbers, self.status, self.text, self.said = (w.HTML() for _ in range(5))
        self.captions = {name: w.HTML() for name in ("map", "bars", "curves", "text")}

        def button(words: str, why: str, act: Callable[[], None]) -> w.Button:
            made = w.Button(description=words, tooltip=why, layout=AUTO)
            made.on_click(lambda _: act())
            return made

        self.play = w.ToggleButton(description="play", icon="play", layout=AUTO, tooltip="Update after update")
        self.play.observe(lambda change: self._toggle(change["new"]), "value")
        self.speed = w.ToggleButtons(options=list(PACE), value="normal")
        self.speed.add_class("pp-speed")
        self.start = w.ToggleButtons(options=[("scattered", True), ("the model's own", False)], value=True)
        self.start.add_class("pp-judge")
        tip(self.start, "Where prototypes are when it all begins")
        self.layer, self.group = w.Dropdown(layout=SMALL), w.Dropdown(layout=SMALL)
        for box in (self.start, self.layer, self.group):
            box.observe(lambda _: None if self._filling else self._load(), "value")
        self.gate, self.other, self.head = (w.Dropdown(layout=SMALL) for _ in range(3))
        self.gate.observe(lambda change: self._filling or self.choose(change["new"]), "value")
        decay = Knob(self.settings, DECAY, live=True)
        decay.layout.flex = "0 0 230px"
        self._travel = (
            button("step ▶", "One moving average over the next keys", lambda: self.do("step")), self.play, self.speed,
            button("reset", "The model as it came, prototypes where they began", self._load), decay,
            _labelled("begin", self.start, "46px"),
        )  # fmt: skip
        self._surgery = (
            _labelled("layer", self.layer, "42px"), _labelled("KV group", self.group, "72px"),
            _labelled("gate", self.gate, "38px"),
            button("clone", "Copy this gate into a free slot", lambda: self.do("clone", self.gate.value)),
            button("prune", "Remove this gate", lambda: self.do("prune", self.gate.value)),
            button("merge with", "Fold the other gate into this one",
                   lambda: self.do("merge", self.gate.value, self.other.value)), self.other,
            button("move to head", "Give this gate to another head of its group",
                   lambda: self.do("move", self.gate.value, self.head.value)), self.head,
            button("add a head", "One more query head in every group", lambda: self.do("add head")),
        )  # fmt: skip

    # The story

    def _load(self) -> None:
        """From the beginning, with what the controls ask for."""
        self.play.value = False
        self.worker.cancel()
        self._todo.clear()
        self._say("busy", "the model reads the text")
        layer, group = self._first if self._live is None else (self.layer.value, self.group.value)
        scattered, decay = self.start.value, self.settings.ema_decay

        def work(stop, progress) -> Run:
            self._live = self._live or self._make()
            most = len(self._live.model.blocks) - 1, self._live.model.cfg.attention.n_kv_heads - 1
            where = {"layer": min(layer, most[0]), "group": min(group, most[1])}
            story = GateStory(self._live, **where, scattered=scattered, ema_decay=decay)
            return Run(story, [story.snapshot()])

        self.worker.submit("load", work, self._loaded, self._failed)

    def _loaded(self, _: int, run: Run) -> None:
        live, self.run, self.problem, story = self._live, run, "", run.story
        kind, loud = ("pp-random", "<b>These weights are random.</b> ") if live.random else ("pp-note", "")
        self.banner.value = f'<div class="{kind}">{loud}{words.escape(live.note)}</div>'
        self._fill(self.layer, list(range(len(live.model.blocks))), story.layer)
        self._fill(self.group, list(range(live.model.cfg.attention.n_kv_heads)), story.group)
        self.chosen = int(run.past[0].lured.argmax())
        with self.pictures.widget.batch_update():
            self.pictures.reset(story.keys, live.tokens, run.past[0].prototypes[run.past[0].alive], story.explained)
        self._draw()

    def _set_decay(self, change) -> None:
        if self.run is not None:
            self.run.story.gates.ema_decay = change["new"]

    # Steps and operations

    def do(self, what: str, *operands: int) -> None:
        """A "step", or one of `gate_story.OPERATIONS` with its operands. What plays is paused."""
        if self.run is None:
            return
        self.play.value = False
        self._todo.append((what, *operands))
        self._say("busy", "at work")
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
        except ValueError as err:  # surgery says what is not possible, and nothing has changed
            run.said = str(err)
            return
        run.said = words.operation_sentence(run.last)
        run.past.append(run.story.snapshot())
        run.events[len(run.past) - 1] = f"{what}: output changed by {run.last.change:.1%}"

    def _toggle(self, on: bool) -> None:
        self.play.description, self.play.icon = ("pause", "pause") if on else ("play", "play")
        if not on:
            self.worker.cancel("frame")
            self.worker.submit("model", lambda stop, progress: None, lambda *_: self._draw(), self._failed)
            return
        run = self.run

        def work(stop, progress) -> None:
            while run is not None and not stop():
                self._apply(run, "step")
                if self._drawn and self.room.free:  # what is slower than the gates shows several steps at once
                    self._drawn = False
                    progress(0.0, "")
                end = time.monotonic() + PACE[self.speed.value]
                while time.monotonic() < end and not stop():
                    time.sleep(0.01)

        self.worker.submit("frame", work, lambda *_: None, self._failed, lambda *_: self._draw())

    # What is shown

    def choose(self, gate: int) -> None:
        """Follows another gate; a click on a key, a prototype or a bar comes here."""
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
            self.chosen = int(now.nearest[self.chosen])  # where most of its keys went
        with self.pictures.widget.batch_update():
            self.pictures.draw(self.number, past, self.chosen, run.events)
        self._fill_surgery(now)
        self.said.value = f'<div class="pp-said">{words.escape(run.said or "Choose a gate and operate on it.")}</div>'
        self.numbers.value = words.numbers_html(self.number, past, run.last)
        self.text.value = words.text_html(self.number, now, self.chosen, tokens)
        where = f"Keys of layer {run.story.layer}, KV group {run.story.group}"
        for name, title, legend, said in (
            ("map", where, words.MAP_LEGEND, "Click a key, a prototype or a bar to follow its gate."),
            ("bars", "Keys lured per gate", words.BAR_LEGEND, words.spread_sentence(now)),
            ("curves", "How well they fit", words.CURVE_LEGEND, words.fit_sentence(past)),
            ("text", f"What gate {self.chosen} lures", "", words.gate_sentence(now, self.chosen, tokens)),
        ):  # fmt: skip
            self.captions[name].value = caption_html(title, legend, said)
        self._say("fresh")
        self.room.ask(self.number)
        self._drawn = True

    def _fill_surgery(self, now: Snapshot) -> None:
        live = [int(slot) for slot in now.alive.nonzero()[0]]
        others = [slot for slot in live if slot != self.chosen] or [self.chosen]
        heads = [head for head in range(now.heads) if head != now.head[self.chosen]] or [0]
        self._fill(self.gate, live, self.chosen)
        near = int(now.nearest[self.chosen])
        self._fill(self.other, others, near if near in others else others[0])
        self._fill(self.head, heads, self.head.value if self.head.value in heads else heads[0])

    def _fill(self, box: w.Dropdown, options: list[int], value: int) -> None:
        """Other options, without asking for what they say."""
        self._filling = True
        try:
            if list(box.options) != options:
                box.options = options
            if box.value != value:
                box.value = value
        finally:
            self._filling = False

    def _say(self, state: str, what: str = "") -> None:
        self.status.value = status_html(state, None, what)

    def close(self) -> None:
        self.worker.cancel()
        super().close()

    def _failed(self, _: int, err: BaseException) -> None:
        self.problem = str(err) or type(err).__name__
        self.play.value = False
        self._say("error", what=self.problem)
