"""The panel of the KV bank: a text is read token by token, forwards and backwards."""

from __future__ import annotations

import time

import pytest
from helpers import SENTENCE, text_of
from proteus_playground.widgets import bank_panel
from proteus_playground.widgets.bank import words as bank_words

from proteus_playground.attention.bank.view import BankContents, GateContents
from proteus_playground.common.progress import Stopped
from proteus_playground.common.texts import load_text, pasted
from proteus_playground.playground.bank_reading import RandomReader, open_reading


def gate(number: int, ring: tuple[int, ...], count: int) -> GateContents:
    return GateContents(number, ring, count, count - len(ring))


def test_moves_name_the_tokens_that_came_into_rings_and_notes():
    tokens = [f" w{i}" for i in range(20)]
    before = BankContents(10, 10, (0, 1), (6, 7, 8, 9), (gate(0, (3, 2), 2), gate(1, (5, 4), 3)), True)
    after = BankContents(11, 11, (0, 1), (8, 9, 10), (gate(0, (3, 2), 2), gate(1, (7, 6), 5)), True)
    moved = bank_words.moves(before, after)
    assert moved.into_ring == {1: {6, 7}} and moved.into_note == {1: {4, 5}}
    sentence = bank_words.move_sentence(after, tokens, moved)
    assert "2 tokens left the window: “w6” to gate 1 and “w7” to gate 1" in sentence
    assert "“w4” and “w5” moved from a ring to a note" in sentence
    shown = bank_words.gates_html(7, after, tokens, moved)
    assert shown.count("pp-came") == 2 and shown.count("pp-went") == 2 and 'data-request="7"' in shown
    assert bank_words.moves(None, after) == bank_words.Moves({}, {})
    assert "No key left" in bank_words.move_sentence(after, tokens, bank_words.Moves({}, {}))


def test_a_bank_shows_words_as_text():
    tokens = ["<b>", "\n", " "]
    now = BankContents(3, 3, (), (0, 1, 2), (gate(0, (0, 1, 2), 3),), True)
    shown = bank_words.gates_html(1, now, tokens, bank_words.Moves({}, {})) + bank_words.near_html(now, tokens, 9)
    assert "gate</span> 0</b>" in shown and "&lt;b&gt;" in shown and "↵" in shown and "␣" in shown


@pytest.fixture(scope="module")
def reading_text():
    return pasted((SENTENCE + " A potato soup was on the table.") * 12, "a test")


def test_the_bank_panel_reads_steps_back_and_looks_elsewhere(reading_text):
    made = bank_panel(reading=RandomReader(reading_text, tokens=200, start=60), layer=0, group=1)
    made.worker.wait()
    assert "This layer is random" in made.banner.value and made.past[0].tokens_seen == 60
    for count in (61, 62, 63):
        made.player.forward.click()
        made.worker.wait()
        assert made.past[made.at].tokens_seen == count and f"{count:,}" in made.numbers.value
    newest = made.gates.value
    made.player.back.click()
    made.player.back.click()
    assert made.past[made.at].tokens_seen == 61
    made.player.forward.click()
    made.player.forward.click()
    assert made.past[made.at].tokens_seen == 63 and len(made.reading.tokens) == 63
    assert made.gates.value.split(">", 1)[1] == newest.split(">", 1)[1]
    made.layer.value = 1
    assert len(made.past) == 1 and "Layer 1, KV group 1" in text_of(made.captions["moves"].value)
    made.close()


def test_playing_ends_with_the_text_and_can_be_paused(reading_text):
    made = bank_panel(reading=RandomReader(reading_text, tokens=150, start=60), layer=0)
    made.worker.wait()
    made.player.speed.value = "fast"
    made.player.play.value = True
    while len(made.reading.tokens) < 80:
        time.sleep(0.005)
    made.player.play.value = False
    made.worker.wait()
    stopped = len(made.reading.tokens)
    time.sleep(0.1)
    assert len(made.reading.tokens) == stopped < 150 and made.player.play.description == "play"
    made.player.play.value = True
    made.worker.wait()
    assert len(made.reading.tokens) == 150 and not made.player.play.value
    assert "end of the text" in made.status.value and made.past[-1].tokens_seen == 150
    moved = bank_words.moves(made.past[0], made.past[-1])
    assert moved.into_ring
    made.close()


def test_a_random_reading_holds_every_token_somewhere(reading_text):
    reading = RandomReader(reading_text, tokens=180, start=170)
    now = reading.contents(1, 0)
    held = [*now.anchors, *now.window, *(i for g in now.gates for i in g.ring)]
    assert len(held) == len(set(held)) and len(held) + sum(g.summarised for g in now.gates) == 170
    size = reading.nbytes
    while reading.step():
        pass
    assert reading.nbytes == size and len(reading.tokens) == 180


@pytest.mark.parametrize("model", ["random", "smollm2"])
def test_the_reading_of_the_beginning_can_be_stopped(model, request):
    if model == "smollm2":
        request.getfixturevalue("smollm2")
    said = []

    def stop() -> bool:
        return any("beginning" in words for _, words in said)

    with pytest.raises(Stopped):
        open_reading(
            load_text("humble token"), model, tokens=600, start=600, stop=stop,
            progress=lambda *share_and_words: said.append(share_and_words),
        )  # fmt: skip
    assert said[-1] == (0.0, "reading the beginning of the text")
    if model == "smollm2":  # the patch of the stopped reading is gone
        open_reading(load_text("humble token"), model, tokens=2, start=1).close()


@pytest.mark.slow
def test_a_model_reads_and_then_writes(smollm2):
    reading = open_reading(load_text("humble token"), tokens=70, start=68)
    for _ in range(4):
        assert reading.step()
    assert len(reading.tokens) == 72 and reading.given == 70
    assert reading.contents(12, 1).tokens_seen == 72
    reading.close()
