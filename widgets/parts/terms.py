"""Words of the glossary in HTML, with their sentences as tooltips."""

from __future__ import annotations

from html import escape

from proteus_playground.attention.settings import Control
from proteus_playground.playground import glossary


def term_html(word: str, shown: str | None = None) -> str:
    """A word of the glossary, or `shown` in its place, with its sentence as a tooltip. ValueError for other words."""
    return f'<span class="pp-term" title="{escape(glossary.sentence(word))}">{escape(shown or word)}</span>'


def control_html(control: Control) -> str:
    """A control's name; its tooltip is the glossary's sentence where it has one, else the control's own."""
    term = glossary.by_code().get(control.of)
    sentence = term.sentence if term else control.tip
    return f'<span class="pp-knob-name" title="{escape(sentence)}">{escape(control.label)}</span>'
