"""HTML that every panel uses: style sheets, captions, tiles, legends, banner and status.

They are made here and nowhere else; `with_terms` gives the glossary's words in them a tooltip.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from html import escape
from importlib.resources import files

import ipywidgets as w

from proteus_playground.hf.models import KNOWN

from .terms import with_terms

SHEETS = ("style", "stream", "learning")
MODEL_NAMES = {name: known.label for name, known in KNOWN.items()}
STATUS_WORDS = {"fresh": "up to date", "stale": "computing …", "stopped": "stopped"}


@cache
def style_sheets() -> str:
    """The text of all style sheets."""
    folder = files("proteus_playground.widgets.parts")
    return "".join((folder / f"{name}.css").read_text("utf-8") for name in SHEETS)


def styles() -> w.HTML:
    """The style sheets as a widget without size, for the front of a panel."""
    style = w.HTML(f"<style>{style_sheets()}</style>")
    style.layout.display = "none"
    return style


def title_html(title: str, *parts: str) -> str:
    """The name of a panel, and what is shown in it."""
    shown = "".join(f"<span>{with_terms(part)}</span>" for part in parts)
    return f'<div class="pp-title"><b>{with_terms(title)}</b>{shown}</div>'


def note_html(note: str, random: str = "") -> str:
    """One line on what is shown. `random`: a bold sentence in front, on yellow, where the numbers mean nothing."""
    if random:
        return f'<div class="pp-random"><b>{escape(random)}</b> {with_terms(note)}</div>'
    return f'<div class="pp-note">{with_terms(note)}</div>'


def caption_html(title: str, legend: str, sentence: str) -> str:
    """A picture's title, its legend (HTML) and one sentence (text) on what it shows."""
    return (
        f'<div class="pp-cap" role="img" aria-label="{escape(title)}. {escape(sentence)}">'
        f'<div><b>{with_terms(title)}</b><span class="pp-legend">{legend}</span></div>'
        f'<p title="{escape(sentence)}">{with_terms(sentence)}</p></div>'
    )


def key(colour: str, word: str, line: bool = False) -> str:
    """One entry of a legend: a coloured square or line, and a word."""
    return f'<span><i class="{"pp-line" if line else ""}" style="background:{colour}"></i>{with_terms(word)}</span>'


def cell(label: str, value: str, below: str, tip: str, extra: str = "") -> str:
    """One tile: a label, a value, a line below it, and a sentence as tooltip. `extra`: one more CSS class."""
    return (
        f'<div class="pp-cell {extra}" title="{escape(tip)}"><span class="pp-label">{with_terms(label)}</span>'
        f'<span class="pp-value">{escape(value)}</span><span class="pp-below">{with_terms(below)}</span></div>'
    )


def tiles_html(request: int, cells: Iterable[str], extra: str = "") -> str:
    """The row of tiles of picture number `request`. `extra`: more attributes of the element."""
    return f'<div class="pp-readout" data-request="{request}"{extra}>{"".join(cells)}</div>'


def no_tiles_html(request: int, why: str) -> str:
    """What stands in the place of the tiles while there are no numbers."""
    return f'<div class="pp-readout pp-empty" data-request="{request}">{with_terms(why)}</div>'


def status_html(state: str, share: float | None = None, what: str = "") -> str:
    """`state`: one of STATUS_WORDS, or busy, ready, done or error, with words in `what`; share 0..1 draws a bar."""
    words = STATUS_WORDS.get(state, what)
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<div class="pp-status pp-{state}" role="status"><i></i>{with_terms(words)}{bar}</div>'
