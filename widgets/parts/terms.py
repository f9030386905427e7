"""Words of the glossary in HTML, with their sentences as tooltips."""

from __future__ import annotations

import re
from html import escape

from proteus_playground.attention.settings import Control
from proteus_playground.playground import glossary

LONGEST_FIRST = sorted(glossary.by_word(), key=len, reverse=True)
BY_LOWER_CASE = {word.lower(): word for word in LONGEST_FIRST}
# Left as they are: quoted words, which come from a text; `word=`, an argument; `word-...`, a name.
QUOTED_OR_TERM = re.compile(
    rf"[‘“][^’”]*[’”]|\b({'|'.join(map(re.escape, LONGEST_FIRST))})(s|d)?\b(?![=-])", re.IGNORECASE
)


def term_html(word: str, shown: str | None = None) -> str:
    """A word of the glossary, or `shown` in its place, with its sentence as a tooltip. ValueError for other words."""
    return f'<span class="pp-term" title="{escape(glossary.sentence(word))}">{escape(shown or word)}</span>'


def with_terms(text: str) -> str:
    """`text` as HTML, in which the first use of each word of the glossary has its sentence as a tooltip."""
    parts, seen, end = [], set(), 0
    for match in QUOTED_OR_TERM.finditer(text):
        word = BY_LOWER_CASE.get((match[1] or "").lower())
        if word is None or word in seen:
            continue
        parts += [escape(text[end : match.start()]), term_html(word, match[0])]
        seen.add(word)
        end = match.end()
    return "".join(parts) + escape(text[end:])


def control_html(control: Control) -> str:
    """A control's name; its tooltip is the glossary's sentence where it has one, else the control's own."""
    term = glossary.by_code().get(control.of)
    sentence = term.sentence if term else control.tip
    return f'<span class="pp-knob-name" title="{escape(sentence)}">{escape(control.label)}</span>'
