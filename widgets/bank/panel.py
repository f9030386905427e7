"""The bank panel: a text is read token by token, and the panel shows where its keys are kept."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets as w

from proteus_playground.attention.bank.view import BankContents
from proteus_playground.common.progress import Progress, Stop
from proteus_playground.playground.bank_reading import BankReader

from ..parts.boxes import button, labelled, row
from ..parts.html import MODEL_NAMES, note_html
from ..parts.panel import Panel
from ..parts.transport import Player
from . import words

SECONDS = {"slow": 0.7, "normal": 0.2, "fast": 0.0}  # between tokens
PAST = 400  # steps that can be gone back


class BankPanel(Panel):
    """What `bank_panel` returns. `past` is what the bank held after each step, `at` the index of the one on show."""

    def __init__(
        self, make_reading: Callable[[Stop, Progress], tuple[BankReader, str]], layer: int = 12, group: int = 1
    ):
        super().__init__("KV bank", {"moves": words.LEGEND})
        self.reading: BankReader | None = None
        self.past: list[BankContents] = []
        self.at = -1
        self._make, self._first = make_reading, (layer, group)
        self.near, self.gates = w.HTML(), w.HTML()
        self.player = Player(
            SECONDS, self._toggle, self._forward, self._back,
            ("Read one token after another", "Read one more token", "Go back one token"),
        )  # fmt: skip
        again = button("start again", "Read the text from its beginning", self._load)
        self.layer = w.Dropdown(options=[layer], layout={"width": "80px"})
        self.group = w.Dropdown(options=[group], layout={"width": "80px"})
        for box in (self.layer, self.group):
            box.observe(lambda _: self._look_elsewhere(), "value")
        where = labelled("layer", self.layer, "44px"), labelled("KV group", self.group, "74px")
        controls = row("pp-transport", *self.player.buttons, *where, again)
        self.place("pp-bank", self.banner, controls, self.numbers, self.near, self.captions["moves"], self.gates)
        self._load()

    def _load(self) -> None:
        self.player.pause()
        self.worker.cancel()
        self.say("busy", what="reading the beginning of the text")
        if self.reading is not None:
            self._first = self.layer.value, self.group.value
        self.worker.submit("load", self._make, self._loaded, self._failed, self._progress)

    def _loaded(self, _: int, made: tuple[BankReader, str]) -> None:
        reading, why = made
        self._close_reading()
        layer, group = self._first
        self.layer.options, self.group.options = list(reading.layers), list(range(reading.groups))
        self.layer.value = layer if layer in reading.layers else reading.layers[-1]
        self.group.value = min(group, reading.groups - 1)
        self.reading, self.problem = reading, ""
        note = reading.note.replace(reading.name, MODEL_NAMES.get(reading.name, reading.name), 1)
        self.banner.value = note_html(f"{note} {why}", "This layer is random." if reading.random else "")
        self._look_elsewhere()

    def _close_reading(self) -> None:
        reading, self.reading = self.reading, None
        if hasattr(reading, "close"):
            reading.close()

    def _look_elsewhere(self) -> None:
        """Shows another layer or group; its earlier contents were not recorded, so going back begins here."""
        if self.reading is not None:
            self.past = [self._contents()]
            self._show(0)

    def _contents(self) -> BankContents:
        return self.reading.contents(self.layer.value, self.group.value)

    # Steps

    def _forward(self) -> None:
        self.player.pause()
        if self.at < len(self.past) - 1:
            self._show(self.at + 1)
        else:
            self._run(once=True)

    def _back(self) -> None:
        self.player.pause()
        if self.at > 0:
            self._show(self.at - 1)

    def _toggle(self, playing: bool) -> None:
        if playing:
            self._run()
        else:
            self.worker.cancel("frame")

    def _run(self, once: bool = False) -> None:
        """Reads on from the newest token, whichever token is on show."""
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
                self.player.rest(stop)
            return True

        self.worker.submit("frame", work, self._rested, self._failed, lambda *_: self._read())

    def _read(self) -> None:
        """Shows the token that was read; several at once where the kernel draws more slowly than the model reads."""
        now = self._contents()
        if self.past and now.tokens_seen == self.past[-1].tokens_seen:
            return
        self.past = [*self.past[-PAST:], now]
        self._show(len(self.past) - 1)

    def _rested(self, _: int, more: bool) -> None:
        if not more:
            self.player.pause()
            self.say("done", what="the end of the text is reached")

    def _show(self, at: int) -> None:
        self.at, self.number = at, self.number + 1
        now, reading = self.past[at], self.reading
        moved = words.moves(self.past[at - 1] if at else None, now)
        sentence = words.move_sentence(now, reading.tokens, moved) if at else "Press play or step."
        self.near.value = words.near_html(now, reading.tokens, reading.given)
        self.caption("moves", f"Layer {self.layer.value}, KV group {self.group.value}: where its keys are", sentence)
        self.gates.value = words.gates_html(self.number, now, reading.tokens, moved)
        self.numbers.value = words.numbers_html(self.number, now, reading.seconds, reading.nbytes, len(reading.layers))
        self.player.back.disabled = at == 0
        self.say("fresh")

    def _failed(self, _: int, err: BaseException) -> None:
        self.player.pause()
        super()._failed(_, err)

    def _end(self) -> None:
        self._close_reading()
