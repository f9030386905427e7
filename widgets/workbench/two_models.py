"""The models of A and B: opened once each, and compared only where the same token and the same head exist in both."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from proteus_playground.attention.selectors import Way
from proteus_playground.attention.settings import Settings
from proteus_playground.playground.shelf_probe import Reply, ShelfProbe

from ..parts.html import MODEL_NAMES
from ..parts.state import Pin, PlayState
from .board import Board
from .tradeoff import lines

KEPT = 8  # predictions that are kept, and answers
SOURCE = ("model", "text", "pasted", "length", "shelf", "question")


def source_of(state: PlayState, model: str | None = None) -> dict:
    """What a probe is made of: the traits in `SOURCE`, with another `model` if one is given."""
    found = {name: getattr(state, name) for name in SOURCE}
    return found if model is None else found | {"model": model}


class Probes:
    """Opens probes by `make(source, stop, progress)` -> (probe, why it is random or ""), and keeps those in use."""

    def __init__(self, make: Callable):
        self._make, self._kept = make, {}

    def open(self, source: Mapping, settings, stop, progress) -> tuple:
        """A probe that is kept, or a new one. A random one in place of a model is made anew each time."""
        at = tuple(source.values())
        if at in self._kept:
            return self._kept[at]
        made = self._make({**source, "settings": settings}, stop, progress)
        if not made[1]:
            self._kept[at] = made
        return made

    def keep(self, *sources: Mapping | None) -> None:
        """Lets go of all probes but those of `sources`."""
        wanted = [tuple(source.values()) for source in sources if source is not None]
        self._kept = {at: made for at, made in self._kept.items() if at in wanted}


def apart(a, b) -> str:
    """Why the pictures of two probes cannot be compared, as a sentence; "" where they can."""
    names = [MODEL_NAMES.get(probe.name, probe.name) for probe in (a, b)]
    if a.tokens != b.tokens:
        return (
            f"A is not shown: {names[0]} and {names[1]} cut this text into different tokens, so the same place is not "
            "the same word in both. Unpin A, or give A a model with the tokens of B."
        )
    shapes = [(probe.n_layers, probe.n_heads, probe.n_groups) for probe in (a, b)]
    if shapes[0] != shapes[1]:
        words = [f"{n} layers of {heads} heads in {groups} groups" for n, heads, groups in shapes]
        return f"A is not shown: {names[0]} has {words[0]} and {names[1]} {words[1]}, so no head is the same in both."
    return ""


class TwoModels(Board):
    """A board with the probes of A and B. `probe` is that of B, which the sliders set; None until one is open.

    `pinned_probe` is that of A where A is another model, open and comparable with B; None elsewhere.
    """

    def __init__(self, probes: Probes, state: PlayState, *board):
        super().__init__(state, *board)
        self.probes, self.probe, self.pinned_probe = probes, None, None
        self._a_source: dict | None = None  # what the probe of A is made of, where A is another model
        self._a_made: tuple | None = None  # (a probe, why it is random), once it is open
        self._expected: dict[tuple, np.ndarray] = {}  # (probe, token, settings, way) -> log-probabilities that follow
        self._replies: dict[tuple, Reply] = {}  # (probe, settings) -> the answer to the question
        self._missing = ""  # the model that Pull fetches
        state.observe(lambda _: self._load_pinned(), ["pinned", *SOURCE])

    def _pin(self) -> Pin | None:
        """What is pinned, where it can be shown: another model has to be open and comparable."""
        pin = self.state.pin()
        return pin if pin is None or pin.model == self.state.model or self.pinned_probe is not None else None

    def _probe_of(self, pin: Pin):
        return self.probe if pin.model == self.state.model else self.pinned_probe

    def _answering(self, pin: Pin | None) -> Pin | None:
        """What is pinned, if its model can answer the question."""
        return pin if pin is not None and isinstance(self._probe_of(pin), ShelfProbe) else None

    def _lines(self) -> list[Pin]:
        """What the curves of B and A are of, as the controls ask for them."""
        return lines(Pin(self.state.settings(), self.state.way(), self.state.model), self._pin())

    def _load_pinned(self) -> None:
        """Opens the model of A where it differs from that of B; until it is there, B is shown alone."""
        state, pin = self.state, self.state.pin()
        source = None if pin is None or pin.model == state.model else source_of(state, pin.model)
        if source == self._a_source:
            return
        self._a_source, self._a_made = source, None
        self._forget()
        self.worker.cancel("pinned")
        self._judge_pinned()
        if source is not None:
            self.worker.submit("pinned", lambda stop, progress: self.probes.open(source, pin.settings, stop, progress),
                               self._pinned_loaded, self._pinned_failed, self._progress)  # fmt: skip

    def _pinned_loaded(self, _: int, made: tuple) -> None:
        self._a_made = made
        self._judge_pinned()
        if self.probe is None:
            return
        self.say("fresh" if self.wanted() == self._shown() else "stale")
        self._settings_changed()

    def _pinned_failed(self, number: int, err: BaseException) -> None:
        self._failed(number, err)
        self.ways.say_apart(f"A is not shown: {self.problem}")

    def _stop_pinned(self) -> None:
        """After the worker was cancelled."""
        if self._a_source is not None and self._a_made is None:
            self._a_source = None
            self.ways.say_apart("A is not shown: opening its model was stopped. Unpin A and pin it again.")

    def _judge_pinned(self) -> None:
        """Decides whether A's model can be shown beside B's, and says why not."""
        self.pinned_probe, why = None, ""
        if self._a_source is not None:
            why = "A is being opened; until then B is shown alone."
        if self._a_made is not None and self.probe is not None:
            probe, random = self._a_made
            why = f"A is not shown: {random}" if random else apart(probe, self.probe)
            if random:
                self._offer_pull(self._a_source["model"])
            self.pinned_probe = None if why else probe
        self.ways.say_apart(why)

    def _offer_pull(self, model: str) -> None:
        self._missing = "" if model in ("shelf-mini", "random") else model
        self.source_controls.offer_pull(self._missing or None)

    def _pulled(self) -> None:
        self._a_source = None
        self._load_pinned()
        self._load()

    # What the probes have said

    def _expect(self, probe, token: int, settings: Settings | None, way: Way, stop) -> np.ndarray:
        at = (id(probe), token, settings, way)
        return _once(self._expected, at, lambda: probe.next_logprobs(token, settings, way, stop=stop))

    def _reply(self, probe: ShelfProbe, settings: Settings, stop) -> Reply:
        return _once(self._replies, (id(probe), settings), lambda: probe.ask(settings, stop=stop))

    def _forget(self) -> None:
        """Lets go of what probes have said: another probe may get the number of one that is gone."""
        self._expected.clear()
        self._replies.clear()


def _once(kept: dict, at: tuple, make: Callable):
    """What is kept of `at`, else what `make()` gives; of more than KEPT the one that was longest not asked for goes."""
    found = kept.pop(at, None)
    kept[at] = found = make() if found is None else found
    if len(kept) > KEPT:
        kept.pop(next(iter(kept)))
    return found
