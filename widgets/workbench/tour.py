"""The guided tour: seven steps, each beside the part of the workbench that it explains."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import anywidget
from traitlets import Dict, Int, List

from ..parts.terms import with_terms

FIGURE = ".pp-panels .pp-figure"


@dataclass(frozen=True)
class Step:
    """part: (left, right, top, bottom) of the element, the first two as shares of its width, the others in pixels."""

    title: str
    words: str
    element: str  # CSS selector of what is framed
    part: tuple[float, float, float, float] | None = None  # None: the whole element


STEPS = (
    Step("The sliders",
         "Drag flux α down to 0 and back up to 1, or click it and use the arrow keys. At 0 every query reads all "
         "earlier tokens; at 1 it reads a few. Watch “keys per query”.", ".pp-top"),
    Step("Heads",
         "A column is a token and a row is a head; the line above the picture says what a bright cell means. Click a "
         "cell: all pictures then follow that head at that token.", FIGURE, (0, 0.56, 0, 372)),
    Step("Prototypes",
         "Each dot is a key, in the colour of its gate; ★ is the key of your word, and filled diamonds are the gates "
         "that its query opened. Click another dot: other gates open.", FIGURE, (0.57, 1, 0, 372)),
    Step("The text",
         "Click a word, or click the text once and use the arrow keys. A line under a word shows that the query of "
         "your word reads it, and the line's colour says why; yellow words are salient.", ".pp-text"),
    Step("What a query reads",
         "Each line is an earlier token that the query of your word reads, and its height is the attention that the "
         "token gets. A lower shortlist L leaves fewer lines, and the others get more attention.",
         FIGURE, (0, 1, 376, 680)),
    Step("What comes next",
         "The bars compare which tokens the model expects after your word: with dense attention, and at these "
         "settings.", ".pp-next"),
    Step("Compare two settings",
         "Press “Pin as A”, then move a slider: it sets B, and every picture shows A and B. “take away” removes notes, "
         "far keys, a head, a gate or one key, to see what changes without them.", ".pp-ways"),
)  # fmt: skip


class Tour(anywidget.AnyWidget):
    """A card beside the framed part of the panel that holds it. `step` counts from 1; 0 shows nothing.

    The card is reached by the tab key and takes the focus when a step was chosen here; Escape ends the tour.
    """

    _esm = (files(__package__) / "tour.js").read_text(encoding="utf-8")
    steps = List(Dict()).tag(sync=True)
    step = Int(0).tag(sync=True)

    def __init__(self):
        steps = [{"title": one.title, "words": with_terms(one.words), "element": one.element, "part": one.part}
                 for one in STEPS]  # fmt: skip
        super().__init__(steps=steps)
