"""The evidence panel: the committed results, and a button that measures one of them again on this machine."""

from __future__ import annotations

import ipywidgets as w
from proteus_playground.experiments.evidence.committed import Study, can_repeat, named, order, repeat
from proteus_playground.experiments.evidence.report import Entry, sentences
from proteus_playground.experiments.evidence.study import OURS, CellResult

from ..parts.boxes import button, column, labelled, row
from ..parts.controls import tip
from ..parts.html import cell, key, no_tiles_html, note_html, tiles_html
from ..parts.painted import Room
from ..parts.panel import Panel
from ..parts.plot import INK
from .figure import BLUE, MID, RED, EvidencePictures

CASES = 400  # answers that the button asks for
VIEWS = (("arms", False), ("one change at a time", True))
LEGEND = (
    '<div class="pp-legend">' + key(INK, "dense", line=True) + key(RED, "chosen arm", line=True)
    + key(MID, "other arms") + f'<span style="color:{BLUE}">◆ measured here</span>'
    + "<span>bars: 95% intervals over seeds</span></div>"
)  # fmt: skip


NO_STUDY = "No study is in this install: run “proteus evidence” in a checkout."
CHOICES = {  # name: (label, tooltip)
    "study": ("study", ""),
    "task": ("task", ""),
    "things": ("planted", "How many pairs or values are planted in a text"),
    "share": ("L", "How many keys a query may read"),
    "arm": ("arm", "How a query chooses the keys that it reads"),
    "length": ("length", "Length of a text in tokens"),
}


class EvidencePanel(Panel):
    """What `evidence_panel` returns. `entry` is the chosen cell, `here` the cells that were measured again."""

    def __init__(self, studies: list[Study], cases: int = CASES):
        super().__init__("Evidence", {})
        self.studies, self.cases = studies, cases
        self.here: dict[tuple, CellResult] = {}
        self._filling = True  # values that are set now are no choice of the user's
        self.pictures = EvidencePictures(self._picked)
        self.said = w.HTML()
        self.view = w.ToggleButtons(options=VIEWS, value=False)
        self.choices = {name: w.Dropdown(layout={"width": "auto", "flex": "1 1 120px"}) for name in CHOICES}
        for choice in (self.view, *self.choices.values()):
            choice.observe(lambda _: self._chosen(), "value")
        self.run = button("Measure it here", "Ask the small model of this package new questions of this kind, now",
                          self._measure, button_style="info")  # fmt: skip
        self.cancel = button("Cancel", "Stop measuring", self.halt, disabled=True)
        self.place("pp-evidence", self.banner, self._controls(), self.numbers, w.HTML(LEGEND), self.pictures.widget,
                   self.said, Room())  # fmt: skip
        if studies:
            self._choose()
        else:
            self.numbers.value = no_tiles_html(0, NO_STUDY)
            self.run.disabled = True

    def _controls(self) -> w.VBox:
        boxes = {}
        for name, (label, tooltip) in CHOICES.items():
            boxes[name] = labelled(label, tip(self.choices[name], tooltip), "auto")
            boxes[name].add_class("pp-choice")
        self._offer("study", [study.name for study in self.studies])
        self._only_if_many = boxes["study"]
        first = row("pp-actions", boxes["study"], boxes["task"], boxes["things"], boxes["share"], self.view)
        second = row("pp-actions", boxes["arm"], boxes["length"], self.run, self.cancel)
        return column("pp-top", first, second)

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

    def _chosen(self) -> None:
        if not self._filling:
            self._choose()

    def _choose(self) -> None:
        """Offers under each choice the values that exist under those above it, keeps what it can, and draws."""
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
        self.banner.value = note_html(study.note)
        self.say("fresh")
        self._draw()

    def _offer(self, name: str, options: list, first=None) -> None:
        choice, held = self.choices[name], self.choices[name].value
        values = [option[1] if isinstance(option, tuple) else option for option in options]
        if list(choice.options) != options:
            choice.options = options
        wanted = next((value for value in (held, first, *values) if value in values), None)
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
        self.said.value = "".join(map(note_html, sentences([e for e in entries if e.place == place])))

    # What is measured

    def _measure(self) -> None:
        entry = self.entry
        self.say("busy", 0.0, f"{named(entry)} at {entry.length:,} tokens")

        def work(stop, progress) -> CellResult:
            for measured in repeat(entry, self.cases, stop=stop):
                share = min(1.0, measured.cases / self.cases)
                progress(share, f"{measured.right:,} of {measured.cases:,} right so far")
            return measured

        def done(_: int, row: CellResult) -> None:
            self.here[_place(entry)] = row
            self._draw()
            self.say("fresh")

        self.worker.submit("model", work, done, self._failed, self._progress)


def _place(entry: Entry | None) -> tuple | None:
    return None if entry is None else (entry.task, entry.things, entry.shortlist, entry.length, named(entry))


def numbers_html(number: int, entry: Entry | None, here: CellResult | None, entries: list[Entry]) -> str:
    """The chosen cell as committed, compared with dense, and as measured on this machine."""
    if entry is None:
        return no_tiles_html(number, "Not measured at this length.")
    spread = "one seed" if entry.low is None else f"{entry.low:.3f} to {entry.high:.3f}, {entry.seeds} seeds"
    dense = next((e for e in entries if e.arm == "dense" and e.length == entry.length), None)
    share = f"{entry.accuracy / dense.accuracy:.3f}" if dense and dense.accuracy else "–"
    tiles = [
        ("right answers", f"{entry.accuracy:.3f}", spread,
         "Stored result: the mean share over several trained models (seeds), with its 95% interval."),
        ("of dense", share, f"dense {dense.accuracy:.3f}" if dense else "dense was not measured",
         "Share of right answers, divided by that of dense attention."),
        ("keys per query", f"{entry.keys:,.0f}", f"at most {entry.shortlist:,} of {entry.length:,}",
         "Keys and notes that a query reads, averaged over the queries that have to answer."),
        ("comparisons to choose", f"{entry.looks:,.0f}", "per query",
         "Prototypes, block means or bounds that a query is first compared with; they do not count as keys."),
        ("answers asked", f"{entry.cases:,}", "all seeds together", "How many answers the result is the mean of."),
        ("measured here", f"{here.accuracy:.3f}" if here else "–",
         f"{here.cases:,} answers, {here.seconds:.1f} s" if here else "press the button",
         "Measured now by recall-mini, the small model of this package, on new texts.", "pp-here"),
    ]  # fmt: skip
    return tiles_html(number, (cell(*tile) for tile in tiles))
