"""The chunk buffer panel and the bank panel without a browser: replay against the loop itself, words, latest wins."""

from __future__ import annotations

import time

import numpy as np
import pytest
from helpers import SENTENCE
from hypothesis import given, settings
from hypothesis import strategies as st
from proteus_playground.experiments.needles.haystacks import Haystack, read
from proteus_playground.widgets import stream_panel
from proteus_playground.widgets.stream import figure as stream_figure
from proteus_playground.widgets.stream import words as stream_words
from proteus_playground.widgets.stream.frames import Source
from proteus_playground.widgets.stream.state import NUMBERS, StreamState, check

from proteus_playground.common.progress import Stopped
from proteus_playground.streaming.buffer import StreamPlan
from proteus_playground.streaming.pipeline import stream
from proteus_playground.streaming.random_words import RandomWords
from proteus_playground.streaming.replay import Document, Scores, empty_scores, fill, page_of, plant, replay, runs
from proteus_playground.streaming.table_scorer import TableScorer

FACT, PROMPT = "The soup has horseradish.", "What has the soup?"


def scores_of(score: np.ndarray, until: int | None = None) -> Scores:
    reason = np.arange(len(score), dtype=np.int32)
    return Scores(score.astype(np.float32), reason, str, len(score) if until is None else until)


class Known:
    """The scores as a store and a scorer: the oracle's way to them."""

    fingerprint = "known"

    def __init__(self, scores: Scores):
        self.scores = scores

    def __len__(self) -> int:
        return len(self.scores.score)

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop)

    def score(self, rows):
        return self.scores.score[rows], self.scores.reason[rows]

    def explain(self, reason: int) -> str:
        return str(reason)


# Replay


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 300), chunk=st.integers(1, 80), most=st.integers(1, 60), budget=st.integers(1, 40),
    near=st.integers(0, 5), seed=st.integers(0, 10**6), ties=st.booleans(),
)  # fmt: skip
def test_a_replay_holds_what_the_stream_held_after_every_chunk(size, chunk, most, budget, near, seed, ties):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, 4, size).astype(np.float32) if ties else rng.standard_normal(size).astype(np.float32)
    score[rng.random(size) < 0.1] = -np.inf
    plan, scores = StreamPlan(chunk, most, budget, neighbours=near), scores_of(score)
    needle = range(size // 3, min(size, size // 3 + 7))
    got = replay(scores, plan, needle)
    assert got.steps == got.chunks == -(-size // chunk)
    assert len(got.buffer(0)) == 0 and got.held[0] == 0
    for step in stream(Known(scores), Known(scores), plan):
        now = step.index + 1
        for mine, theirs in (
            (got.buffer(now), step.buffer), (got.promoted(now), step.promoted), (got.evicted(now), step.evicted)
        ):  # fmt: skip
            for name in ("position", "score", "champion", "reason"):
                assert np.array_equal(getattr(mine, name), getattr(theirs, name)), (now, name)
        inside = np.isin(step.buffer.position, needle).sum() / len(needle)
        assert got.recall[now] == pytest.approx(inside) and got.held[now] == len(step.buffer)
        full = len(step.buffer) == most
        assert got.bar[now] == (step.buffer.score.min() if full else -np.inf)


def test_scores_that_are_known_in_part_are_played_as_far_as_whole_chunks_go():
    plan = StreamPlan(100, 50, 20)
    score = np.random.default_rng(0).random(1000)
    part, whole = replay(scores_of(score, 350), plan), replay(scores_of(score), plan)
    assert (part.steps, part.chunks, whole.steps) == (3, 10, 10)
    assert np.array_equal(part.buffer(3).position, whole.buffer(3).position)


def test_filling_can_be_stopped_and_goes_on_where_it_was():
    document = Document(np.arange(1000, dtype=np.int32), range(0))
    seen = []

    class Scorer:
        fingerprint = "slow"

        def score(self, rows):
            seen.append(int(rows[0]))
            return rows.astype(np.float32), rows.astype(np.int32)

        def explain(self, reason):
            return str(reason)

    scores = empty_scores(len(document))
    with pytest.raises(Stopped):
        fill(scores, document, Scorer(), 128, stop=lambda: len(seen) == 3)
    assert scores.until == 256 and not scores.done
    told = []
    fill(scores, document, Scorer(), 128, progress=lambda share, what: told.append(share))
    assert scores.done and seen == [0, 128, 256, *range(256, 1000, 128)] and told[-1] == 1
    assert np.array_equal(scores.score, np.arange(1000))
    fill(scores, document, Scorer(), 128)
    assert len(seen) == 9


def test_a_needle_is_planted_between_sentences_on_its_page():
    words = RandomWords()
    body = words.encode(SENTENCE * 200)
    ends = np.flatnonzero(np.array([words.vocabulary[i] == "." for i in body])) + 1
    ids = words.encode(f" {FACT}")
    document = plant(body, ends, ids, 3)
    assert len(document) == len(body) and page_of(document.needle.start) == 3 == page_of(document.needle.stop - 1)
    assert read(document.ids[document.needle.start : document.needle.stop], words) == f" {FACT}"
    assert words.vocabulary[document.ids[document.needle.start - 1]] == "."
    with pytest.raises(ValueError, match="page=99"):
        plant(body, ends, ids, 99)
    with pytest.raises(ValueError, match="needle"):
        plant(body[:3], ends, ids, 1)
    assert len(plant(body, ends, ids[:0], 1).needle) == 0


def test_runs_join_neighbours_and_name_the_champion():
    score = np.zeros(60)
    score[[10, 40]] = 5, 9
    kept = replay(scores_of(score), StreamPlan(60, 10, 10, neighbours=2)).buffer(1)
    first, second = runs(kept, 40)[:2]
    assert (first.start, first.stop, first.champion, first.score, first.fresh) == (38, 43, 40, 9, True)
    assert (second.start, second.stop, second.champion, second.fresh) == (8, 13, 10, False)
    assert runs(kept.take(np.zeros(0, int)), 0) == []


# The fast scorer


def test_a_word_finds_itself_and_rare_words_count_more():
    words = RandomWords()
    ids = words.encode(SENTENCE * 30 + " Soup was there.")
    scorer = TableScorer(words, ids, "The soup?")
    score, reason = scorer.score(ids)
    best = int(score.argmax())
    assert (
        words.vocabulary[ids[best]] == " Soup" and scorer.explain(int(reason[best])) == "matches “soup” of the prompt"
    )
    assert score[best] == pytest.approx(np.log(len(ids) / 2), rel=1e-5)
    the = np.array([words.vocabulary[i].strip().lower() == "the" for i in ids])
    assert (score[the] < score[best] / 2).all() and np.isfinite(score).all()
    assert scorer.words == ["The", "soup"]
    other = TableScorer(words, ids, "The cat?")
    assert other.fingerprint != scorer.fingerprint
    with pytest.raises(ValueError, match="prompt has no word"):
        TableScorer(words, ids, "?!")


def test_random_words_are_the_same_everywhere_and_grow():
    first, second = RandomWords(), RandomWords()
    a, b = first.encode("soup and bread"), second.encode("bread, soup")
    assert np.array_equal(first.table[a[0]], second.table[b[2]])
    before = first.table.copy()
    first.encode("cheese")
    assert len(first.table) == len(before) + 1 and np.array_equal(first.table[: len(before)], before)
    upper = RandomWords()
    one, two = upper.encode("Soup soup")
    assert one != two and np.array_equal(upper.table[one], upper.table[two])


def test_pulled_words_are_the_tokenizers_own(smollm2):
    from transformers import AutoTokenizer

    from proteus_playground.hf.embeddings import PulledWords

    words, tokenizer = PulledWords("smollm2"), AutoTokenizer.from_pretrained(smollm2, local_files_only=True)
    body = "The soup was “warm”.\n\n  Ünï def f(x): 12,345"
    ids = words.encode(body)
    assert ids.tolist() == tokenizer(body, add_special_tokens=False)["input_ids"]
    assert "".join(words.vocabulary[i] for i in words.encode("The soup, warm.")) == "The soup, warm."
    assert words.table.shape[0] == len(words.vocabulary) and words.table.dtype == np.float32


# The panel


class Words(RandomWords):
    """As a pulled model's: not random, with a model behind them."""

    name, random, model = "embeddings", False, "fake"


class FakeSubject:
    """Scores in context at a pace, and answers with how much it was given."""

    note = "fake scores tokens by their number."

    def __init__(self, seconds: float = 0.0):
        self.seconds, self.stops = seconds, []
        self.reader = self
        self.context = 4096

    def scorer(self, prompt):
        outer = self

        class Scorer:
            fingerprint, stop = f"fake {prompt}", None

            def score(self, rows):
                time.sleep(outer.seconds)
                return (rows % 97).astype(np.float32), np.zeros(len(rows), np.int32)

            def explain(self, reason):
                return "is <odd>"

        return Scorer()

    def answer(self, tokens, positions, prompt):
        return f"{len(tokens)} tokens to “{prompt}”"


def make_source(words: RandomWords, tokens: int = 12_000) -> Source:
    ids = words.encode(SENTENCE * (tokens // 17 + 1))[:tokens]
    ends = np.flatnonzero(np.array([words.vocabulary[i] == "." for i in ids])) + 1
    return Source(words, Haystack(ids, ends, f"a test: {tokens:,} tokens"), "")


def make_panel(words: RandomWords | None = None, seconds: float = 0.0, **settings):
    given = {"page": 12, "needle": FACT, "prompt": PROMPT, "chunk_tokens": 1024, "buffer_tokens": 64} | settings
    return stream_panel(source=make_source(words or Words()), subject=FakeSubject(seconds), **given)


def rest(panel) -> None:
    """Until the picture is the one that the controls ask for."""
    end = time.monotonic() + 20
    panel.worker.wait()  # without an event loop the drawing is on its thread, too
    while panel.drawn is None or panel.drawn.wanted != panel.wanted():
        assert time.monotonic() < end, f"still stale: {panel.status.value}"
        time.sleep(0.002)
        panel.worker.wait()


@pytest.fixture
def panel():
    made = make_panel()
    rest(made)
    yield made
    made.close()


BAD = [{"chunk_tokens": 3}, {"buffer_tokens": 0}, {"neighbours": -1}, {"page": 0}, {"tokens": 10}, {"prompt": 3},
       {"needle": "x" * 2001}, {"model": "gpt"}, {"judge": "me"}, {"colour": 1}, {"per_chunk_budget": 1.5}]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.bad_input
def test_a_bad_setting_is_refused_by_name_and_changes_nothing(bad):
    (name,) = bad
    state = StreamState()
    with pytest.raises((ValueError, TypeError), match=name):
        state.update({"neighbours": 3, **bad})
    assert state.neighbours == StreamState().neighbours
    with pytest.raises((ValueError, TypeError), match=name):
        stream_panel(source=make_source(Words()), **bad)


def test_every_field_has_a_sentence_and_a_default_that_is_allowed():
    for field in NUMBERS:
        assert field.tip.endswith(".") and check(field.name, field.default) == field.default


def test_the_panel_opens_at_the_end_with_the_needle_found(panel):
    assert panel.transport.step == panel.transport.last == 12
    assert "pp-needle" in panel.buffer.value and "the needle" in panel.buffer.value
    assert "6 of" not in panel.numbers.value.split("the needle")[0]
    kept, needle = panel.drawn.replay.buffer(12).position, panel.drawn.document.needle
    found = int(np.isin(kept, needle).sum())
    assert found and f"{found} of the needle" in panel.captions["curves"].value
    assert f"{found} of {len(needle)}" in panel.numbers.value
    assert "pp-fresh" in panel.status.value


def test_stepping_shows_who_came_and_who_left(panel):
    panel.transport.jump.click()
    step = panel.transport.step
    assert step == panel.drawn.document.needle.start // 1024 + 1
    assert f"Added by chunk {step}" in panel.events.value and "pp-in pp-needle" in panel.events.value
    assert "“soup” (page 12)" in panel.events.value
    panel.transport.back.click()
    assert panel.transport.step == step - 1 and "has not been read yet" in panel.captions["curves"].value
    assert "pp-needle" not in panel.buffer.value
    panel.transport.forward.click()
    assert panel.transport.step == panel.transport.scrub.value == panel.transport.play.value == step
    panel.transport.go(0)
    assert "Nothing is kept yet" in panel.buffer.value and "No chunk has been read" in panel.events.value
    panel.transport.go(10**6)
    assert panel.transport.step == 12


def test_every_slider_changes_numbers_and_picture(panel):
    for name, value in (("chunk_tokens", 2048), ("per_chunk_budget", 16), ("buffer_tokens", 500), ("neighbours", 1)):
        before, words = panel.pictures.widget.to_json(), panel.numbers.value
        setattr(panel.state, name, value)
        rest(panel)
        assert panel.pictures.widget.to_json() != before and panel.numbers.value != words
        assert panel.drawn.replay.plan == panel.state.plan()


def test_a_plan_keeps_the_place_in_the_document(panel):
    panel.transport.go(4)
    panel.state.chunk_tokens = 512
    rest(panel)
    assert panel.transport.step == 8 and panel.transport.last == 24
    panel.transport.go(24)
    panel.state.chunk_tokens = 4096
    rest(panel)
    assert panel.transport.step == panel.transport.last == 3


def test_prompt_needle_and_page_are_asked_anew(panel):
    panel.state.prompt = "Where is the cat?"
    rest(panel)
    assert "“cat”" in panel.banner.value and "was read and not kept" in panel.captions["curves"].value
    panel.state.update({"prompt": PROMPT, "page": 3})
    rest(panel)
    assert page_of(panel.drawn.document.needle.start) == 3
    panel.state.needle = ""
    rest(panel)
    assert "No needle was planted" in panel.captions["curves"].value and "none" in panel.numbers.value
    panel.state.prompt = "?"
    panel.worker.wait()
    assert "prompt has no word" in panel.status.value and "pp-error" in panel.status.value
    panel.state.prompt = PROMPT
    rest(panel)
    assert "pp-fresh" in panel.status.value


def test_scoring_in_context_is_cancelled_and_goes_on():
    made = make_panel(seconds=0.05, judge="words")
    rest(made)
    made.buttons.layers.click()
    end = time.monotonic() + 10
    while not made.frames.layers or next(iter(made.frames.layers.values())).until < 4096:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert "a second" in made.status.value and not made.cancel.disabled
    made.cancel.click()
    made.layers_worker.wait()
    rest(made)
    done = next(iter(made.frames.layers.values())).until
    assert 4096 <= done < 12_000 and "pp-stopped" in made.status.value
    assert made.transport.last == done // 1024 == made.drawn.replay.steps
    made.buttons.layers.click()
    made.layers_worker.wait()
    rest(made)
    assert next(iter(made.frames.layers.values())).done and made.transport.last == 12
    assert "is &lt;odd&gt;" in made.buffer.value and "<odd>" not in made.buffer.value + made.events.value
    made.state.judge = "words"
    rest(made)
    assert "pp-needle" in made.buffer.value
    made.close()


def test_another_prompt_ends_a_run_in_context_and_its_scores_are_never_drawn():
    made = make_panel(seconds=0.05)
    rest(made)
    made.buttons.layers.click()
    while not made.frames.layers:
        time.sleep(0.005)
    made.state.prompt = "Where is the cat?"
    made.layers_worker.wait()
    rest(made)
    assert made.drawn.wanted.prompt == "Where is the cat?" and made.drawn.replay.steps == 0
    assert "Nothing is scored in context yet" in made.captions["sky"].value
    made.close()


def test_an_answer_belongs_to_the_buffer_it_was_given(panel):
    panel.buttons.answer.click()
    panel.layers_worker.wait()
    kept = panel.drawn.replay.held[12]
    assert f"{kept} tokens to “{PROMPT}”" in panel.answer.value and "pp-old" not in panel.answer.value
    panel.transport.go(5)
    assert "pp-old" in panel.answer.value
    panel.transport.go(12)
    assert "pp-old" not in panel.answer.value
    panel.state.buffer_tokens = 100
    rest(panel)
    assert "pp-old" in panel.answer.value


def test_random_vectors_say_so_and_have_nobody_to_ask():
    made = make_panel(RandomWords())
    rest(made)
    assert "vectors are random" in made.banner.value
    assert made.buttons.layers.disabled and made.buttons.answer.disabled
    made.close()


def test_without_a_pulled_model_the_panel_opens_on_random_vectors(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path))
    made = stream_panel(tokens=4096, page=4)
    rest(made)
    assert "vectors are random" in made.banner.value and "proteus models pull smollm2" in made.banner.value
    assert "of the needle" in made.captions["curves"].value
    made.state.update({"text": str(tmp_path / "none.txt")})
    made._load()
    made.worker.wait()
    assert "none.txt" in made.status.value and "pp-error" in made.status.value
    made.close()


def test_columns_tell_read_kept_new_and_gone():
    score = np.zeros(4000)
    score[[100, 1500, 2500, 3500]] = 1, 2, 3, 4
    got = replay(scores_of(score), StreamPlan(1000, 2, 1))
    codes = stream_figure.strip_codes(got, 3)
    column = {name: at * 800 // 4000 for name, at in (("a", 100), ("b", 1500), ("c", 2500), ("d", 3500))}
    assert codes[column["a"]] == stream_figure.GONE_CODE and codes[column["c"]] == stream_figure.NEW_CODE
    assert 2 <= codes[column["b"]] <= 100 and codes[column["d"]] == 0 and codes[700] == 0 and codes[100] == 1
    sky = stream_figure.skyline(score[:2000].astype(np.float32), 4000)
    assert sky[column["b"]] == 2 and np.isnan(sky[-1]) and len(sky) == 800


def test_an_answer_cannot_become_markup():
    assert "&lt;script" in stream_words.answer_html("<script>", 1, 2, False)


def test_the_readout_says_which_sizes_it_is_of(panel):
    panel.state.update({"neighbours": 3, "per_chunk_budget": 45})
    rest(panel)
    assert 'data-plan="1024 45 64 3"' in panel.numbers.value
