"""The bank panel: a text is read token by token, and one sees where its words go."""

from __future__ import annotations

import time
from collections.abc import Callable

import ipywidgets as w

from proteus_playground.attention.bank.view import BankContents
from proteus_playground.playground.bank_reading import BankReader

from ..parts.controls import _labelled
from ..parts.worker import Worker
from ..stream.board import AUTO, styles
from ..workbench.board import _row
from ..workbench.readout import NAMES, caption_html, status_html
from . import words as bank_words

PACE = {"slow": 0.7, "normal": 0.2, "fast": 0.0}  # seconds between tokens
PAST = 400  # steps that can be gone back


class BankPanel(w.VBox):
    """What `bank_panel` returns. `reading`: a `BankReader`; `past`: contents after each step; `at`: the one shown."""

    def __init__(self, make_reading: Callable, layer: int = 12, group: int = 1):
        self.reading: BankReader | None = None
        self.past: list[BankContents] = []
        self.at, self.number, self.problem, self._playing = -1, 0, "", False
        self._make, self._first = make_reading, (layer, group)
        self.worker = Worker()
        self.title = w.HTML('<div class="pp-title"><b>KV bank</b></div>')
        self.banner, self.numbers, self.status, self.near, self.gates = (w.HTML() for _ in range(5))
        self.caption = w.HTML()
        self.play = w.ToggleButton(description="play", icon="play", layout=AUTO, tooltip="Read on, token after token")
        self.back = w.Button(description="◀ step", tooltip="One token back", layout=AUTO)
        self.forward = w.Button(description="step ▶", tooltip="One token on", layout=AUTO)
        self.again = w.Button(description="start again", tooltip="Read the text from its beginning", layout=AUTO)
        self.speed = w.ToggleButtons(options=list(PACE), value="normal")
        self.layer = w.Dropdown(options=[layer], layout=w.Layout(width="80px"))
        self.group = w.Dropdown(options=[group], layout=w.Layout(width="80px"))
        self.speed.add_class("pp-speed")
        self.play.observe(lambda change: self._toggle(change["new"]), "value")
        self.back.on_click(lambda _: self._back())
        self.forward.on_click(lambda _: self._forward())
        self.again.on_click(lambda _: self._load())
        for box in (self.layer, self.group):
            box.observe(lambda _: self._look_elsewhere(), "value")
        where = _labelled("layer", self.layer, "44px"), _labelled("KV group", self.group, "74px")
        row = _row("pp-transport", self.back, self.play, self.forward, self.speed, *where, self.again)
        head = _row("pp-head", self.title, self.status)
        super().__init__([styles(), head, self.banner, row, self.numbers, self.near, self.caption, self.gates])
        self.add_class("pp-app")
        self.add_class("pp-bank")
        self._load()

    def _load(self) -> None:
        self.play.value = False
        self.worker.cancel()
        self._say("busy", what="reading the beginning of the text")
        if self.reading is not None:
            self._first = self.layer.value, self.group.value
        self.worker.submit("load", lambda stop, progress: self._make(), self._loaded, self._failed)

    def _loaded(self, _: int, made: tuple[BankReader, str]) -> None:
        reading, why = made
        old, self.reading = self.reading, None
        if old is not None and hasattr(old, "close"):
            old.close()
        layer, group = self._first
        self.layer.options, self.group.options = list(reading.layers), list(range(reading.groups))
        self.layer.value = layer if layer in reading.layers else reading.layers[-1]
        self.group.value = min(group, reading.groups - 1)
        self.reading, self.problem = reading, ""
        name = NAMES.get(reading.name, reading.name)
        kind, loud = ("pp-random", "<b>This layer is random.</b> ") if reading.random else ("pp-note", "")
        note = reading.note.replace(reading.name, name, 1)
        self.banner.value = f'<div class="{kind}">{loud}{bank_words.escape(f"{note} {why}")}</div>'
        self._look_elsewhere()

    def _look_elsewhere(self) -> None:
        """Another layer or group: what came before was not written down for it."""
        if self.reading is not None:
            self.past = [self._contents()]
            self._show(0)

    def _contents(self) -> BankContents:
        return self.reading.contents(self.layer.value, self.group.value)

    # Steps

    def _forward(self) -> None:
        self.play.value = False
        if self.at < len(self.past) - 1:
            self._show(self.at + 1)
        else:
            self._run(once=True)

    def _back(self) -> None:
        self.play.value = False
        if self.at > 0:
            self._show(self.at - 1)

    def _toggle(self, on: bool) -> None:
        self.play.description, self.play.icon = ("pause", "pause") if on else ("play", "play")
        if on:
            self._run()
        else:
            self.worker.cancel("frame")

    def _run(self, once: bool = False) -> None:
        """Reads on from the newest token, wherever the picture is."""
        reading = self.reading
        if reading is None:
            return

        def work(stop, progress) -> bool:
            while not stop():
                if not reading.step():
                    return False
                progress(0.0, "")
                if once:
                    return True
                end = time.monotonic() + PACE[self.speed.value]
                while time.monotonic() < end and not stop():
                    time.sleep(0.01)
            return True

        self.worker.submit("frame", work, self._rested, self._failed, lambda *_: self._read())

    def _read(self) -> None:
        """A token was read. Where the kernel is slower than the model, several are shown at once."""
        now = self._contents()
        if self.past and now.tokens_seen == self.past[-1].tokens_seen:
            return
        self.past = [*self.past[-PAST:], now]
        self._show(len(self.past) - 1)

    def _rested(self, _: int, more: bool) -> None:
        if not more:
            self.play.value = False
            self._say("done", what="the text is at its end")

    def _show(self, at: int) -> None:
        self.at, self.number = at, self.number + 1
        now, tokens = self.past[at], self.reading.tokens
        moved = bank_words.moves(self.past[at - 1] if at else None, now)
        self.near.value = bank_words.near_html(now, tokens, self.reading.given)
        sentence = bank_words.move_sentence(now, tokens, moved) if at else "Press play, or step on."
        where = f"Layer {self.layer.value}, KV group {self.group.value}: where its keys are"
        self.caption.value = caption_html(where, bank_words.LEGEND, sentence)
        self.gates.value = bank_words.gates_html(self.number, now, tokens, moved)
        self.numbers.value = bank_words.numbers_html(self.number, now, self.reading.seconds, self.reading.nbytes,
                                                     len(self.reading.layers))  # fmt: skip
        self.back.disabled = at == 0
        self._say("fresh")

    def _say(self, state: str, what: str = "") -> None:
        self.status.value = status_html(state, None, what)

    def close(self) -> None:
        self.worker.cancel()
        super().close()

    def _failed(self, _: int, err: BaseException) -> None:
        self.problem = str(err) or type(err).__name__
        self.play.value = False
        self._say("error", what=self.problem)
