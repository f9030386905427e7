"""Asking the shelf: where the fact stands, what is answered and judged, and the box that shows it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import tiny_shelf
from fake_probe import FakeProbe
from helpers import text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from proteus_playground.widgets import PlayState, apps, playground
from proteus_playground.widgets.parts.controls import ModelChoice
from proteus_playground.widgets.parts.state import SHELF, opening, preset_settings
from proteus_playground.widgets.workbench import workbench
from proteus_playground.widgets.workbench.ask_box import OWN, Answers, fact_sentence, reply_html

from proteus_playground.attention.settings import Settings
from proteus_playground.common.progress import Stopped
from proteus_playground.common.texts import load_text, pasted
from proteus_playground.lm.shelf import shelf
from proteus_playground.playground.shelf_probe import ROOM, open_shelf
from proteus_playground.playground.views import ANCHOR, DNA, LOCAL

OWN_SETTINGS = Settings(shortlist=48, gates=8, probes=2, nearest_gates=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return tiny_shelf.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def asking(small, at: int = 3, tokens: int = 256, **given):
    question = open_shelf(*small, None, number=5, max_tokens=tokens).questions[at].text
    return open_shelf(*small, None, **{"number": 5, "question": question, "max_tokens": tokens, **given})


def answers(probe, monkeypatch, here: str, dense: str) -> None:
    """Lets the model say this."""
    said = {True: here, False: dense}
    monkeypatch.setattr(probe._source, "answer", lambda ids, layers, *a: probe._source.encode(said[bool(layers)]))


# The probe


@settings(max_examples=25, deadline=None)
@given(number=st.integers(0, 999_999), at=st.floats(0, 0.999), tokens=st.integers(120, 500))
def test_the_fact_and_its_value_are_found_in_any_shelf(small, number, at, tokens):
    questions = open_shelf(*small, None, number=number, max_tokens=tokens).questions
    if not questions:
        return
    wanted = questions[int(at * len(questions))]
    probe = open_shelf(*small, None, number=number, question=wanted.text, max_tokens=tokens)
    words = "".join(probe.tokens[slice(*probe.fact)]).strip()
    assert words == wanted.fact
    assert "".join(probe.tokens[slice(*probe.value)]).strip() == wanted.value
    assert probe.fact[0] <= probe.value[0] < probe.value[1] <= probe.fact[1] <= len(probe.tokens) <= tokens
    stem = wanted.answer.rpartition(wanted.value)[0].strip()
    assert "".join(probe.tokens).endswith(f"Question: {wanted.text} Answer: {stem}")


def test_a_shelf_fills_the_length(small):
    for tokens in (128, 512, 1024):
        size = len(open_shelf(*small, None, max_tokens=tokens).tokens)
        assert 0.75 * (tokens - ROOM) < size <= tokens - ROOM


@pytest.mark.parametrize(
    "here, dense, right",
    [("right", "wrong", (True, False)), ("wrong", "right", (False, True)), ("", "", (False, False))],
)
def test_the_generator_judges(small, monkeypatch, here, dense, right):
    probe = asking(small)
    said = {"right": probe.asked.answer, "wrong": probe.asked.answer.replace(probe.asked.value, "elsewhere"), "": "so"}
    answers(probe, monkeypatch, said[here], said[dense])
    reply = probe.ask(OWN_SETTINGS)
    assert (reply.right, reply.dense_right) == right and reply.said == said[here] and reply.settings == OWN_SETTINGS


def test_the_answer_is_asked_for_behind_the_question(small, monkeypatch):
    """The words before the value are there to look at, not to help the model."""
    probe, prompts = asking(small), []
    monkeypatch.setattr(probe._source, "answer", lambda ids, *a: prompts.append(probe.tokens[: len(ids)]) or [])
    probe.ask(OWN_SETTINGS)
    assert len(prompts) == 2 and all(tokens[-2:] == [" Answer", ":"] for tokens in prompts)
    assert len(prompts[0]) < len(probe.tokens)


def test_readers_are_the_rows_that_the_panel_shows(small):
    probe = asking(small)
    changes = {}, {"flux_alpha": 0.0}, {"dna_fraction": 0.0, "notes": False}
    for now in (replace(OWN_SETTINGS, **change) for change in changes):
        reply, last, value = probe.ask(now), len(probe.tokens) - 1, probe.value[0]
        rows = [probe.row(layer, now, last, head) for layer in probe.layers for head in range(probe.n_heads)]
        assert reply.readers() == sum(int(row.kind[value]) in (LOCAL, ANCHOR, DNA) for row in rows)
        assert [reply.weight(i) for i in range(len(rows))] == [float(row.weight[value]) for row in rows]
    dense = probe.ask(replace(OWN_SETTINGS, flux_alpha=0.0))
    best = int(np.argmax([dense.weight(i) for i in range(len(dense.rows))]))
    assert probe.finder(dense.settings) == (best // probe.n_heads, best % probe.n_heads)
    assert dense.readers() == len(dense.rows) and dense.said == dense.dense


def test_an_answer_can_be_stopped_before_each_layer(small):
    probe, asked = asking(small), []
    probe._source.answer(probe._ids, {}, (), 1, lambda: asked.append(True))
    assert len(asked) >= probe.n_layers > 1


def test_a_question_that_nobody_can_judge(small):
    probe = open_shelf(*small, None, question="where is the golden fleece?", max_tokens=200)
    reply = probe.ask(OWN_SETTINGS)
    assert reply.right is reply.dense_right is None and reply.rows == () and probe.finder(OWN_SETTINGS) is None
    assert "".join(probe.tokens).endswith("Question: where is the golden fleece? Answer:")
    assert "does not answer this question" in fact_sentence(probe, Answers(reply))


def test_a_text_of_another_world_is_called_so(small):
    story = open_shelf(*small, load_text("humble token"), question="what is soup?", max_tokens=200)
    assert "parts of unknown words" in story.note and story.questions == () and "soup" in "".join(story.tokens)
    known = open_shelf(*small, pasted(shelf(3, 8).text), max_tokens=200)
    assert "unknown" not in known.note


def test_nothing_asked_and_stopped(small):
    with pytest.raises(ValueError, match="question=''"):
        open_shelf(*small, None, max_tokens=128).ask(OWN_SETTINGS)
    with pytest.raises(Stopped):
        asking(small).ask(OWN_SETTINGS, stop=lambda: True)


# The box


@pytest.fixture
def bench(small, monkeypatch):
    monkeypatch.setattr(apps, "_shipped", lambda name: small)
    monkeypatch.setattr(workbench, "REST_SECONDS", 0.0)
    made = playground(model="shelf-mini", shelf=5, length=192, gates=8, shortlist=48)
    rest(made)
    yield made
    made.close()


def rest(bench) -> None:
    """Until picture and answer are the ones that the controls ask for."""
    end = time.monotonic() + 30
    while True:
        bench.worker.wait()
        asked = not bench.state.question or (bench.answers and bench.answers.of(bench.state.settings(), bench._pin()))
        opened = bench.probe is not None and getattr(bench.probe, "question", "") in ("", bench.state.question)
        if opened and bench.drawn is not None and bench.drawn.wanted == bench.wanted() and asked:
            break
        assert time.monotonic() < end, bench.status.value
        time.sleep(0.005)
    time.sleep(0.05)


def ask(bench, at: int = 2) -> str:
    question = bench.probe.questions[at].text
    bench.ask_box.pick.value = question
    bench.ask_box.ask.click()
    rest(bench)
    return question


def test_it_opens_unasked_with_questions_to_pick(bench):
    box = bench.ask_box
    assert box.layout.display == "" and "Press Ask" in box.reply.value and bench.answers is None
    assert box.pick.options == (OWN, *(question.text for question in bench.probe.questions))
    assert box.question.value in box.pick.options
    assert bench.text.marked == [0, 0] and not bench.pictures.widget.layout.shapes[0].visible


def test_ask_shows_answer_and_fact_and_follows_the_row_that_needs_it(bench):
    question = ask(bench)
    probe, frame = bench.probe, bench.drawn
    assert bench.state.question == probe.question == question
    assert frame.row.token == len(probe.tokens) - 1 and (frame.view.layer, frame.row.head) == probe.start
    weights = [bench.answers.b.weight(i) for i in range(len(bench.answers.b.rows))]
    assert not any(weights) or weights.index(max(weights)) == probe.start[0] * probe.n_heads + probe.start[1]
    assert bench.text.marked == list(probe.fact)
    band = bench.pictures.widget.layout.shapes[0]
    assert band.visible and (band.x0, band.x1) == (probe.fact[0] - 0.5, probe.fact[1] - 0.5)
    html = bench.ask_box.reply.value
    assert "at these settings" in html and "dense" in html and ("✓" in html or "✗" in html)
    assert fact_sentence(probe, bench.answers) in text_of(html)
    bench.ask_box.show.click()
    assert bench.text.look[0] == probe.value[0]


def test_picking_alone_asks_nothing_and_typing_asks(bench):
    bench.ask_box.pick.value = bench.ask_box.pick.options[1]
    assert bench.state.question == "" and bench.ask_box.question.value == bench.ask_box.pick.options[1]
    bench.ask_box.question.value = "where is the honey pot?"
    rest(bench)
    assert bench.state.question == "where is the honey pot?" and bench.answers.b.right is None


def test_a_slider_asks_again_and_the_old_answer_is_grey_meanwhile(bench):
    ask(bench)
    before = bench.answers.b
    bench.state.flux_alpha = 0.0
    assert "pp-old" in bench.ask_box.reply.value
    rest(bench)
    assert bench.answers.b.settings.flux_alpha == 0 and bench.answers.b is not before
    assert "pp-old" not in bench.ask_box.reply.value
    assert bench.answers.b.said == bench.answers.b.dense
    token, reply = bench.drawn.row.token, bench.answers.b
    bench.text.clicked = [3, 1]
    rest(bench)
    assert bench.drawn.row.token == 3 != token and bench.answers.b is reply  # a click asks nothing


def test_many_moves_end_with_the_answer_of_the_last(bench):
    ask(bench)
    for step in range(60):
        bench.state.flux_alpha = round(0.01 + step * 0.01, 2)
    rest(bench)
    assert bench.answers.b.settings.flux_alpha == 0.6 == bench.drawn.view.settings.flux_alpha


def test_to_and_fro_the_answer_is_the_right_one_again(bench):
    ask(bench)
    for _ in range(5):
        bench.state.flux_alpha = 0.3
        assert "pp-old" in bench.ask_box.reply.value
        bench.state.flux_alpha = 1.0
        rest(bench)
        assert bench.drawn.view.settings.flux_alpha == 1.0 and "pp-old" not in bench.ask_box.reply.value


def test_to_and_fro_before_the_answer_still_brings_it(bench, monkeypatch):
    ask(bench)
    answer, begun = bench.probe.ask, threading.Event()

    def slow(*args, **given):
        begun.set()
        time.sleep(0.2)
        return answer(*args, **given)

    monkeypatch.setattr(bench.probe, "ask", slow)
    bench.state.flux_alpha = 0.5
    assert begun.wait(10)
    bench.state.flux_alpha = 0.4
    bench.state.flux_alpha = 0.5
    rest(bench)
    assert bench.answers.b.settings.flux_alpha == 0.5 and "pp-old" not in bench.ask_box.reply.value


def test_what_is_pinned_answers_beside_what_the_sliders_set(bench):
    ask(bench)
    bench.ways.pin.click()
    rest(bench)
    assert bench.answers.a.settings.flux_alpha == 1.0
    pinned = bench.answers.a
    bench.state.flux_alpha = 0.0
    assert "pp-old" in bench.ask_box.reply.value
    rest(bench)
    answers, said = bench.answers, text_of(bench.ask_box.reply.value)
    assert answers.a is pinned and answers.b.settings.flux_alpha == 0  # A is asked once
    assert f"B, at these settings {answers.b.said}" in said and f"A, pinned {answers.a.said}" in said
    assert f"with B {answers.b.readers()} of the {len(answers.b.rows)} heads" in said
    assert f"with A {answers.a.readers()}" in said and "pp-old" not in bench.ask_box.reply.value
    bench.ways.swap.click()
    rest(bench)
    assert (bench.answers.b.settings.flux_alpha, bench.answers.a.settings.flux_alpha) == (1.0, 0.0)
    bench.ways.pin.click()
    rest(bench)
    assert bench.answers.a is None and "pinned" not in text_of(bench.ask_box.reply.value)


def test_an_answer_is_asked_for_once(bench, monkeypatch):
    """What is pinned has answered already, and going back to a setting asks nothing."""
    ask(bench)
    asked, answer = [], bench.probe.ask

    def counted(settings, **given):
        asked.append(settings)
        return answer(settings, **given)

    monkeypatch.setattr(bench.probe, "ask", counted)
    bench.ways.pin.click()
    rest(bench)
    assert bench.answers.a is bench.answers.b and not asked
    bench.state.flux_alpha = 0.5
    rest(bench)
    bench.ways.swap.click()
    rest(bench)
    assert [settings.flux_alpha for settings in asked] == [0.5] and bench.answers.a.settings.flux_alpha == 0.5


def test_dense_answers_of_two_models_stand_apart(small):
    probe = asking(small)
    b = probe.ask(OWN_SETTINGS)
    a = replace(b, dense="eleven", dense_right=False)
    both = text_of(reply_html(probe, Answers(b, None, a)))
    assert "dense, B" in both and "dense, A eleven" in both
    assert "dense, A" not in text_of(reply_html(probe, Answers(b, None, b)))


def test_another_shelf_forgets_the_question(bench):
    ask(bench)
    tokens = bench.probe.tokens
    bench.ask_box.another.click()
    rest(bench)
    assert (bench.state.shelf, bench.state.question, bench.answers) == (6, "", None)
    assert bench.probe.tokens != tokens and "Press Ask" in bench.ask_box.reply.value


def test_a_link_brings_model_question_and_place_back(bench, small):
    question = ask(bench)
    bench.state.update({"token": 17, "layer": 1, "head": 2})
    rest(bench)
    link = bench.state.to_string()
    assert "ask=" in link and question.split()[-1].strip("?") in link
    other = playground(state=link)
    rest(other)
    assert other.state.to_dict() == bench.state.to_dict()
    assert (other.probe.question, other.drawn.row.token, other.drawn.view.layer) == (question, 17, 1)
    other.close()


def test_text_from_outside_cannot_become_markup(bench):
    bench.ask_box.question.value = "who is <script>x</script>?"
    rest(bench)
    assert "<script>" not in bench.ask_box.reply.value + bench.captions["row"].value + bench.title.value
    reply = replace(bench.answers.b, said="<b>bold</b>")
    assert "<b>bold" not in reply_html(bench.probe, Answers(reply))


# The model


def test_each_model_opens_with_its_own_text():
    assert PlayState("shelf-mini").text == SHELF and PlayState("smollm2").text == "humble token"
    for model in ("shelf-mini", "smollm2", "random"):
        state = PlayState(model)
        other = PlayState()
        other.restore(state.to_string())
        assert other.to_dict() == state.to_dict() == PlayState(model).to_dict()
        assert preset_settings("gates with notes", model) == {k: opening(model)[k] for k in state.settings().__dict__}
    with pytest.raises(ValueError, match="model='gpt'"):
        PlayState("gpt")
    with pytest.raises(ValueError, match="question holds"):
        PlayState("random").question = "x" * 301


def test_the_selector_opens_another_model(bench):
    ask(bench)
    choice = bench.model_choice
    choice.buttons.value = "random"
    rest(bench)
    assert bench.probe.random and bench.ask_box.layout.display == "none" and bench.state.question == ""
    assert bench.state.text == "humble token" and bench.text.marked == [0, 0]
    choice.buttons.value = "shelf-mini"
    rest(bench)
    assert bench.state.text == SHELF and bench.ask_box.layout.display == ""
    bench.state.restore("model=random")
    assert choice.buttons.value == "random"
    rest(bench)


def test_any_model_may_read_a_shelf():
    made = playground(model="random", text=SHELF, length=128)
    rest(made)
    assert made.probe.random and "Receipt" in "".join(made.probe.tokens)
    made.close()


def test_weights_that_are_missing_are_said(monkeypatch):
    def gone(name):
        raise FileNotFoundError("not here")

    monkeypatch.setattr(apps, "_shipped", gone)
    made = playground(model="shelf-mini", length=64)
    rest(made)
    assert made.probe.random and "shelf-mini are not in this install" in made.banner.value
    assert made.source_controls.pull.layout.display == "none"
    made.close()


def test_the_box_stays_hidden_for_other_probes():
    made = playground(probe=FakeProbe(40))
    made.worker.wait()
    assert made.ask_box.layout.display == "none" and isinstance(made.model_choice, ModelChoice)
    made.close()
