"""The needles panel: the validation suite runs case by case, with our facts or the visitor's, in any text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape

import ipywidgets as w
from proteus_playground.experiments.needles.live import DEPTHS, LENGTHS, LIVE_TASKS, Found, methods, total
from proteus_playground.experiments.needles.pairs import Pair
from proteus_playground.experiments.needles.retrieval import OURS
from proteus_playground.experiments.needles.subjects import Subject

from ..parts.boxes import button, column, labelled, row
from ..parts.controls import tip
from ..parts.html import cell, key, no_tiles_html, note_html, tiles_html
from ..parts.painted import Room
from ..parts.panel import Panel
from .figure import COLOURS, NAMES, TASKS, NeedlePictures

OWN_TASKS = ("single", "jigsaw", "fading")  # one fact makes no cluster
ABOUT = (
    "A fact is planted in a text, and a buffer keeps the 3% of the tokens that fit the question best. The question "
    "uses other words than the fact. Every method keeps equally many tokens."
)
FIRST = (
    "Old Tobias keeps his silver trumpet under the kitchen stairs.",
    "Where does the aged musician hide an instrument of precious metal?",
    "under the kitchen stairs",
)


class NeedlePanel(Panel):
    """What `needle_panel` returns. `found` holds the cases that are finished."""

    def __init__(
        self, open_subject: Callable[[], tuple[Subject, str]], pairs: list[Pair], run: Callable[..., Iterator[Found]]
    ):
        """open_subject: the model, and why it is the random layer or ""."""
        super().__init__("Needles", {})
        self.found: list[Found] = []
        self.subject: Subject | None = None
        self._open, self._pairs, self._run, self._methods = open_subject, pairs, run, methods()
        self.pictures = NeedlePictures(LENGTHS, DEPTHS, self._methods)
        self.said = w.HTML()
        wide = {"layout": {"width": "auto", "flex": "1 1 260px"}}
        self.fact, self.question = w.Text(FIRST[0], **wide), w.Text(FIRST[1], **wide)
        self.answer = w.Text(FIRST[2], layout={"width": "auto", "flex": "0 1 190px"})
        self.text = w.Text("pydoc", layout={"width": "260px"})
        tip(self.text, "pydoc is Python's manual; or write the path of a text file of yours")
        start = button("Start", "Run the suite with the facts of the package", self.begin, button_style="info")
        mine = button("with my needle", "Run the suite with the fact below", lambda: self.begin(own=True))
        self.cancel = button("Stop", "Stop after this case", self.halt, disabled=True)
        first = row("pp-actions", labelled("text", self.text, "38px"), start, mine, self.cancel)
        own = row("pp-actions", self.fact, self.question, self.answer)
        for box, label in ((self.fact, "a fact"), (self.question, "a question about it"), (self.answer, "its answer")):
            tip(box, f"Your own needle: {label}")
        note = w.HTML(
            note_html("My needle: a fact, a question in other words, and the answer as it stands in the fact.")
        )
        legend = "".join(key(COLOURS[method], NAMES[method]) for method in self._methods)
        self.place("pp-needles", self.banner, column("pp-top", first, note, own), self.numbers,
                   w.HTML(f'<div class="pp-legend">{legend}</div>'), self.pictures.widget,
                   self.said, Room())  # fmt: skip
        self._draw()
        self.say("ready", what="press Start")

    def own_pair(self) -> Pair:
        """The visitor's needle. ValueError where the fact does not hold the answer or a box is empty."""
        fact, question, answer = (box.value.strip() for box in (self.fact, self.question, self.answer))
        if not (fact and question and answer):
            raise ValueError("My needle: fact, question and answer must all be filled in.")
        if answer.lower() not in fact.lower():
            raise ValueError(f"My needle: the fact must contain the answer {answer!r}, word for word.")
        return Pair("own", fact, question, question, (answer,), ())

    def begin(self, own: bool = False) -> None:
        """Runs the suite from its beginning."""
        self.worker.cancel()
        self.found, self.problem = [], ""
        self._draw()
        try:
            pairs, tasks = ([self.own_pair()], OWN_TASKS) if own else (self._pairs, LIVE_TASKS)
        except ValueError as err:
            self._failed(0, err)
            return
        text, count = self.text.value.strip() or "pydoc", total(tasks)
        self.say("busy", 0.0, "opening the model")

        def work(stop, progress) -> None:
            self.subject = self.subject or self._open()
            found = []
            for one in self._run(self.subject[0], pairs, text, tasks, stop=stop):
                found.append(one)
                self._new = list(found)
                progress(len(found) / count, f"{TASKS[one.task]}, {one.length:,} tokens")

        self.worker.submit("model", work, self._over, self._failed, self._going)

    def _going(self, _: int, share: float, what: str) -> None:
        self.found = self._new
        self._draw()
        self.say("busy", share, what)

    def _over(self, *_) -> None:
        self._draw()
        self.say("done", what="all cases are measured")

    def _draw(self) -> None:
        self.number += 1
        subject, why = self.subject or (None, "")
        note = f"{ABOUT} {subject.note if subject else ''} {why}"
        self.banner.value = note_html(note, why and "These scores are random.")
        self.pictures.draw(self.found, self.number)
        self.numbers.value = numbers_html(self.number, self.found, self._methods)
        self.said.value = "".join(f'<p class="pp-said">{line}</p>' for line in sentences(self.found))


def numbers_html(number: int, found: list[Found], names: tuple[str, ...]) -> str:
    """How many facts each method found in all cases so far, and how much it kept."""
    if not found:
        return no_tiles_html(number, "Nothing is measured yet: press Start.")
    cells = [cell("cases", str(len(found)), f"{found[-1].length:,} tokens now", "Documents that were read so far.")]
    for name in names:
        share = sum(one.share[name] for one in found) / len(found)
        cells.append(cell(NAMES[name], f"{share:.0%}", "of the facts found", "Mean over all cases so far."))
    kept = f"of {found[-1].length:,} in the last text"
    cells.append(cell("tokens kept", str(found[-1].kept), kept, "The same number for every method."))
    return tiles_html(number, cells)


def sentences(found: list[Found]) -> list[str]:
    """The newest case of each task in words, with what is left of its first fact."""
    said = []
    for task in LIVE_TASKS:
        for one in [one for one in found if one.task == task][-1:]:
            marks = " ".join("✓" if each else "✗" for each in one.each)
            what = {
                "single": f"The answer is {'kept' if one.share[OURS] == 1 else 'lost'}",
                "jigsaw": f"Pieces kept whole: {marks}",
                "clustered": f"Of four facts close together: {marks}",
                "fading": "Mentions with "
                + ", ".join(f"{s:.0%} {'✓' if e else '✗'}" for s, e in zip(one.strengths, one.each, strict=True))
                + " of their words",
            }[task]
            said.append(
                f"<b>{TASKS[task]}</b> at {one.length:,} tokens: {what}. Kept of the fact: <i>{escape(one.text)}</i>"
            )
    return said
