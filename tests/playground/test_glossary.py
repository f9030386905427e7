"""The glossary: its page is written from `TERMS`, every term has a picture, and the controls use its words."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from proteus_playground.widgets.parts.html import no_tiles_html, note_html, status_html, title_html
from proteus_playground.widgets.parts.terms import term_html, with_terms
from proteus_playground.widgets.parts.text_panel import TextPanel

from proteus_playground.attention.settings import CONTROLS
from proteus_playground.playground.glossary import TERMS, by_code, by_word, markdown, sentence

DOCS = Path(__file__).parents[2] / "docs"
needs_docs = pytest.mark.skipif(not DOCS.is_dir(), reason="needs the repository, not only the tests")


@needs_docs
def test_the_page_is_what_the_terms_say():
    page = (DOCS / "glossary.md").read_text(encoding="utf-8")
    assert page == markdown(), "run: python -m proteus_playground.playground.glossary > docs/glossary.md"


@needs_docs
@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.word)
def test_every_term_has_a_small_picture_with_a_title(term):
    body = (DOCS / "img" / "glossary" / f"{term.slug}.svg").read_text(encoding="utf-8")
    assert len(body) <= 1600
    assert ET.fromstring(body).find("{http://www.w3.org/2000/svg}title").text


def test_a_term_is_one_sentence_and_says_each_name_once():
    assert len(by_word()) == len(TERMS) and len(by_code()) == sum(len(term.code) for term in TERMS)
    for term in TERMS:
        assert term.sentence.endswith(".") and term.sentence.count(".") == 1
        assert not {"sticky", "summary"} & set(term.sentence.lower().split())


def test_every_knob_of_the_layer_that_a_control_sets_is_a_taught_word():
    assert {control.of for control in CONTROLS} - set(by_code()) == {"route_heads"}


def test_a_term_carries_its_sentence_as_a_tooltip():
    assert sentence("ring") in term_html("ring").replace("&#x27;", "'") and ">rings</span>" in term_html(
        "ring", "rings"
    )
    assert "<b>" not in term_html("note", "<b>note")
    with pytest.raises(ValueError, match="word='sticky note'"):
        term_html("sticky note")


def test_each_taught_word_of_a_text_has_a_tooltip_once_and_quoted_tokens_have_none():
    html = with_terms("2 gates opened by ‘note’: rings, notes and the DNA fraction; notes again, <b>rings</b>")
    for shown in ("gates", "rings", "notes", "DNA fraction"):
        assert html.count(f">{shown}</span>") == 1
    assert html.count("pp-term") == 4 and "‘note’" in html and "&lt;b&gt;" in html
    assert with_terms("nothing taught, brings, integrated") == "nothing taught, brings, integrated"
    assert with_terms("gates=3: allowed is 4") == "gates=3: allowed is 4"  # an argument of the code, not a word
    assert with_terms("shelf-mini") == "shelf-mini"  # a name


@pytest.mark.parametrize("html", [
    note_html("one gate, <b>"), note_html("one gate, <b>", "It is random."), title_html("Panel", "one gate, <b>"),
    status_html("busy", what="one gate, <b>"), no_tiles_html(1, "one gate, <b>"),
], ids=["banner", "random banner", "title", "status", "no tiles"])  # fmt: skip
def test_taught_words_have_a_tooltip_in_banner_title_and_status(html):
    assert f"one {term_html('gate')}, &lt;b&gt;" in html


def test_the_tooltip_of_a_token_brings_the_sentences_of_its_words():
    panel = TextPanel()
    taught = re.search(r"TAUGHT = \[null, (.*)\]", panel._esm)[1].replace('"', "").split(", ")
    assert panel.terms == {word: sentence(word) for word in ["salience", "gate", *taught]}
    panel.close()
