"""Play, pause, step and speed: steps that a worker takes (`Player`), or a slider of known steps (`Transport`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import ipywidgets as w

from .boxes import AUTO, button
from .controls import tip

SPEEDS = {"slow": 1200, "normal": 500, "fast": 150}  # milliseconds per step of a `Transport`


def speed_buttons(names: Iterable[str]) -> w.ToggleButtons:
    """One button per speed, "normal" chosen."""
    made = w.ToggleButtons(options=list(names), value="normal")
    made.add_class("pp-speed")
    return made


class Player:
    """Step, play and speed of a panel whose worker takes the steps. The panel places `buttons`.

    seconds: name of a speed -> seconds between two steps. `on_play(playing)`, `on_step()` and `on_back()` are called on
    the kernel's thread; without `on_back` there is no step back. tips: tooltips of play, step forward and step back.
    """

    def __init__(
        self, seconds: dict[str, float], on_play: Callable[[bool], None], on_step: Callable[[], None],
        on_back: Callable[[], None] | None = None, tips: tuple[str, str, str] = ("", "", ""),
    ):  # fmt: skip
        self._seconds, self._on_play = seconds, on_play
        self.play = w.ToggleButton(description="play", icon="play", layout=AUTO, tooltip=tips[0])
        self.forward = button("step ▶", tips[1], on_step)
        self.speed = speed_buttons(seconds)
        self.play.observe(lambda change: self._toggled(change["new"]), "value")
        self.buttons = (self.forward, self.play, self.speed)
        if on_back is not None:
            self.back = button("◀ step", tips[2], on_back)
            self.buttons = (self.back, self.play, self.forward, self.speed)

    def pause(self) -> None:
        self.play.value = False

    def rest(self, stop: Callable[[], bool]) -> None:
        """On the worker, after a step: waits until the next one is due, or until `stop()`."""
        end = time.monotonic() + self._seconds[self.speed.value]
        while time.monotonic() < end and not stop():
            time.sleep(0.01)

    def _toggled(self, playing: bool) -> None:
        self.play.description = self.play.icon = "pause" if playing else "play"
        self._on_play(playing)


class Transport(w.HBox):
    """Play, pause, step, speed and a slider of all steps. `on_step(step)` is called whenever `step` has changed.

    jump, jump_tip: words and tooltip of one more button, `jump`, which is hidden without words.
    """

    def __init__(self, on_step: Callable[[int], None], jump: str = "", jump_tip: str = ""):
        self._on_step, self._reported = on_step, -1  # the step that `on_step` was last called with
        self.play = w.Play(value=0, min=0, max=1, step=1, interval=SPEEDS["normal"], show_repeat=False,
                           layout={"width": "96px"})  # fmt: skip
        self.scrub = w.IntSlider(value=0, min=0, max=1, readout=False, continuous_update=True,
                                 layout={"width": "auto", "flex": "1 1 200px"})  # fmt: skip
        self.scrub.style.handle_color = "#0072B2"
        self.speed = speed_buttons(SPEEDS)
        self.back = button("◀ step", "One step back", lambda: self._click(-1))
        self.forward = button("step ▶", "One step forward", lambda: self._click(1))
        self.jump = button(jump, jump_tip)
        self.jump.layout.display = "" if jump else "none"
        tip(self.scrub, "Drag to go back and forth")
        self.play.add_class("pp-play")
        self.scrub.add_class("pp-scrub")
        self.speed.observe(lambda change: setattr(self.play, "interval", SPEEDS[change["new"]]), "value")
        for widget in (self.play, self.scrub):
            widget.observe(lambda change: self.go(change["new"]), "value")
        super().__init__([self.back, self.play, self.forward, self.speed, self.scrub, self.jump])
        self.add_class("pp-transport")

    @property
    def step(self) -> int:
        return self.scrub.value

    @property
    def last(self) -> int:
        return self.scrub.max

    def go(self, step: int) -> None:
        """Shows `step`, or the nearest step that exists.

        A playing player's value is left alone where it is one ahead: setting it back would fight the browser.
        """
        step = max(0, min(step, self.last))
        new, self._reported = step != self._reported, step
        self.scrub.value = step
        if abs(self.play.value - step) > (1 if self.playing else 0):
            self.play.value = step
        if new:
            self._on_step(step)

    @property
    def playing(self) -> bool:
        return bool(getattr(self.play, "playing", getattr(self.play, "_playing", False)))

    def pause(self) -> None:
        setattr(self.play, "playing" if self.play.has_trait("playing") else "_playing", False)

    def extend(self, last: int, step: int) -> None:
        """Sets the number of the last step and the step to show, without calling `on_step`."""
        self._reported = step
        for widget in (self.play, self.scrub):
            if last < widget.value:
                widget.value = step
            widget.max = last
            widget.value = step

    def _click(self, by: int) -> None:
        self.pause()
        self.go(self.step + by)
