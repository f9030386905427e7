"""The evidence: committed results at once, and any one of them measured again here on demand."""

from __future__ import annotations

from html import escape

import ipywidgets as w
from proteus_playground.experiments.evidence.committed import Study, can_repeat, named, order, repeat
from proteus_playground.experiments.evidence.report import Entry, sentences
from proteus_playground.experiments.evidence.study import OURS, CellResult

from ..parts.controls import _labelled, tip
from ..parts.painted import Room
from ..parts.worker import Worker
from ..stream.board import styles
from ..workbench import readout
from ..workbench.board import _row
from .figure import BLUE, INK, MID, RED, EvidencePictures

CASES = 400  # answers asked for on demand
VIEWS = (("arms", False), ("one change at a time", True))
LEGEND = (
    '<div class="pp-legend">' + readout._key(INK, "dense", line=True) + readout._key(RED, "chosen", line=True)
    + readout._key(MID, "every other") + f'<span style="color:{BLUE}">◆ measured here</span>'
    + "<span>bars: 95% intervals over seeds</span></div>"
)  # fmt: skip


class EvidencePanel(w.VBox):
    """What `evidence_panel` returns. `entry` is the chosen cell, `here` what was measured, `number` counts pictures."""

    def __init__(self, studies: list[Study], cases: int = CASES):
        self.studies, self.cases, self.number = studies, cases, 0
        self.here: dict[tuple, CellResult] = {}
        self._filling = True  # nothing chosen yet is anybody's choice
        self.worker = Worker()
        self.pictures = EvidencePictures(self._picked)
        self.title = w.HTML('<div class="pp-title"><b>Evidence</b></div>')
        self.note, self.status, self.numbers, self.said = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        self.view = w.ToggleButtons(options=VIEWS, value=False)
        names = ("study", "task", "things", "share", "arm", "length")
        self.choices = {name: w.Dropdown(layout=w.Layout(width="auto", flex="1 1 120px")) for name in names}
        for choice in (self.view, *self.choices.values()):
            choice.observe(lambda _: self._filling or self._choose(), "value")
        self.run = w.Button(description="Measure it here", button_style="info", layout=w.Layout(width="auto"),
                            tooltip="Ask the small model that comes with the package the same, now")  # fmt: skip
        self.cancel = w.Button(description="Cancel", layout=w.Layout(width="auto"), disabled=True)
        self.run.on_click(lambda _: self._measure())
        self.cancel.on_click(lambda _: self.stop())
        super().__init__([styles(), _row("pp-head", self.title, self.status), self.note, self._controls(), self.numbers,
                          w.HTML(LEGEND), self.pictures.widget, self.said, Room()])  # fmt: skip
        self.add_class("pp-app")
        self.add_class("pp-evidence")
        if studies:
            self._choose()
        else:
            self.numbers.value = '<div class="pp-readout pp-empty" data-request="0">No study is in this install: ' \
                                 "run “proteus evidence” in a checkout.</div>"  # fmt: skip
            self.run.disabled = True

    def _controls(self) -> w.VBox:
        labels = {"study": "study", "task": "task", "things": "planted", "share": "L", "arm": "arm", "length": "length"}
        tips = {"things": "How many pairs or values are planted in a text", "share": "How many keys a row may read",
                "arm": "How a row chooses the keys it reads", "length": "Tokens of a text"}  # fmt: skip
        for name, sentence in tips.items():
            tip(self.choices[name], sentence)
        boxes = {name: _labelled(labels[name], choice, "auto") for name, choice in self.choices.items()}
        for box in boxes.values():
            box.add_class("pp-choice")
        self._offer("study", [study.name for study in self.studies])
        first = _row("pp-actions", boxes["study"], boxes["task"], boxes["things"], boxes["share"], self.view)
        second = _row("pp-actions", boxes["arm"], boxes["length"], self.run, self.cancel)
        self._only_if_many = boxes["study"]
        controls = w.VBox([first, second])
        controls.add_class("pp-top")
        return controls

    # What is chosen

    @property
    def study(self) -> Study:
        return next(study for study in self.studies if study.name == self.choices["study"].value)

    @property
    def entries(self) -> list[Entry]:
        return self.study.at(*(self.choices[name].value for name in ("task", "things", "share")), self.view.value)

    @property
    def entry(self) -> Entry | None:
        """The committed cell of the chosen arm and length."""
        chosen = self.choices["arm"].value, self.choices["length"].value
        return next((entry for entry in self.entries if (named(entry), entry.length) == chosen), None)

    def _choose(self) -> None:
        """Offer what there is under each choice above it, keep what still holds, and draw."""
        self.worker.cancel()
        self._filling = True
        study, changed = self.study, self.view.value
        if not any(bool(entry.change) == changed for entry in study.entries):
            self.view.value = changed = not changed
        mine = [entry for entry in study.entries if bool(entry.change) == changed]
        self._offer("task", list(dict.fromkeys(entry.task for entry in mine)), "mqar")
        mine = [entry for entry in mine if entry.task == self.choices["task"].value]
        self._offer("things", sorted({entry.things for entry in mine}))
        mine = [entry for entry in mine if entry.things == self.choices["things"].value]
        self._offer("share", [(f"1/{share} of the length", share) for share in study.shares(mine)])
        entries = self.entries
        self._offer("arm", order(entries), OURS)
        self._offer("length", sorted({e.length for e in entries if named(e) == self.choices["arm"].value})[::-1])
        self._filling = False
        self._only_if_many.layout.display = "" if len(self.studies) > 1 else "none"
        self.view.layout.display = "" if len({bool(entry.change) for entry in study.entries}) > 1 else "none"
        self.note.value = f'<div class="pp-note">{escape(study.note)}</div>'
        self._say("fresh")
        self._draw()

    def _offer(self, name: str, options: list, first=None) -> None:
        choice, held = self.choices[name], self.choices[name].value
        values = [option[1] if isinstance(option, tuple) else option for option in options]
        if list(choice.options) != options:
            choice.options = options
        wanted = held if held in values else first if first in values else values[0] if values else None
        if choice.value != wanted:
            choice.value = wanted

    def _picked(self, name: str | None, length: int | None) -> None:
        self._filling = True
        if name in self.choices["arm"].options:
            self.choices["arm"].value = name
        if length in self.choices["length"].options:
            self.choices["length"].value = length
        self._filling = False
        self._choose()

    # What is shown

    def _draw(self) -> None:
        entry, entries = self.entry, self.entries
        self.number += 1
        near = {(e.task, e.things, e.shortlist, e.length, named(e)) for e in entries}
        here = [row for place, row in self.here.items() if place in near]
        self.pictures.draw(entries, self.choices["arm"].value, self.choices["length"].value, here, self.number)
        self.numbers.value = numbers_html(self.number, entry, self.here.get(_place(entry)), entries)
        self.run.disabled = entry is None or not can_repeat(entry)
        place = None if entry is None else entry.place
        self.said.value = "".join(f'<p class="pp-note">{escape(line)}</p>' for line in sentences(
            [e for e in entries if e.place == place]))  # fmt: skip

    def _say(self, state: str, share: float | None = None, what: str = "") -> None:
        self.status.value = readout.status_html(state, share, what)
        self.cancel.disabled = state != "busy"

    # What is measured

    def _measure(self) -> None:
        entry = self.entry
        self._say("busy", 0.0, f"{named(entry)} at {entry.length:,} tokens")

        def work(stop, progress) -> CellResult:
            for row in repeat(entry, self.cases, stop=stop):
                progress(min(1.0, row.cases / self.cases), f"{row.right:,} of {row.cases:,} right so far")
            return row

        def done(_: int, row: CellResult) -> None:
            self.here[_place(entry)] = row
            self._draw()
            self._say("fresh")

        self.worker.submit("model", work, done, self._failed, lambda _, share, what: self._say("busy", share, what))

    def _failed(self, _: int, err: BaseException) -> None:
        self._say("error", what=str(err) or type(err).__name__)

    def stop(self) -> None:
        self.worker.cancel()
        self._say("stopped")

    def close(self) -> None:
        self.worker.cancel()
        super().close()


def _place(entry: Entry | None) -> tuple | None:
    return entry and (entry.task, entry.things, entry.shortlist, entry.length, named(entry))


def numbers_html(number: int, entry: Entry | None, here: CellResult | None, entries: list[Entry]) -> str:
    """The chosen cell as committed, dense beside it, and as measured here."""
    if entry is None:
        return f'<div class="pp-readout pp-empty" data-request="{number}">Not measured at this length.</div>'
    spread = "one seed" if entry.low is None else f"{entry.low:.3f} to {entry.high:.3f}, {entry.seeds} seeds"
    dense = next((e for e in entries if e.arm == "dense" and e.length == entry.length), None)
    share = f"{entry.accuracy / dense.accuracy:.3f}" if dense and dense.accuracy else "–"
    cells = [
        ("right answers", f"{entry.accuracy:.3f}", spread, "Committed: the mean over seeds and its 95% interval."),
        ("of dense", share, f"dense {dense.accuracy:.3f}" if dense else "dense was not asked",
         "Share of what dense gets right."),
        ("keys per row", f"{entry.keys:,.0f}", f"at most {entry.shortlist:,} of {entry.length:,}",
         "Keys and notes read by the rows that answer, on average."),
        ("looked at to choose", f"{entry.looks:,.0f}", "summaries per row",
         "Prototypes, block means or bounds that a row is compared with before it reads; not counted as keys."),
        ("answers asked", f"{entry.cases:,}", "all seeds together", "How many answers the figure rests on."),
        ("measured here", f"{here.accuracy:.3f}" if here else "–",
         f"{here.cases:,} answers, {here.seconds:.1f} s" if here else "press the button",
         "The recall-mini weights of this install, on texts that nobody has seen before.", "pp-here"),
    ]  # fmt: skip
    return f'<div class="pp-readout" data-request="{number}">{"".join(readout._cell(*cell) for cell in cells)}</div>'
