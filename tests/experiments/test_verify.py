"""The validation suite: questions share no word with their facts, facts stand where it says, rivals are fair."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from html import escape

import numpy as np
import pytest
from helpers import run_command

pytest.importorskip("bm25s", reason="the verify extra")

from proteus_playground.experiments.intervals import over_cases
from proteus_playground.experiments.needles import answers, bm25, haystacks, retrieval, summary, verify
from proteus_playground.experiments.needles.cases import PlantedStore, Planter
from proteus_playground.experiments.needles.pairs import load_pairs
from proteus_playground.experiments.needles.report import sentences, write_report
from proteus_playground.experiments.needles.subjects import Subject, load
from proteus_playground.experiments.needles.tasks import ASKED, FADES, REPEATS, TASKS, World, cases

from proteus_playground.common.progress import Stopped
from proteus_playground.streaming.random_words import RandomWords

PAIRS = load_pairs()
CHUNK = 1024


class Oracle:
    """Knows which fact a question means: a token scores the share of that fact's words around it."""

    fingerprint, made = "oracle", 0

    def __init__(self, words: RandomWords, prompt: str):
        Oracle.made += 1
        meant = [pair.fact for pair in PAIRS if pair.question in prompt or pair.literal_question in prompt]
        self._wanted = [np.unique(words.encode(" " + fact)) for fact in meant]

    def score(self, rows):
        near = [np.convolve(np.isin(rows, wanted), np.ones(7) / 7, "same") for wanted in self._wanted]
        return np.max(near, axis=0, initial=0).astype(np.float32) * np.ones(len(rows), np.float32), np.zeros(
            len(rows), np.int32
        )

    def explain(self, reason):
        return "it is meant"


class Parrot:
    """Says everything it has read."""

    context = 5000

    def __init__(self, words):
        self._words, self.read = words, []

    def answer(self, tokens, positions, prompt):
        assert len(positions) == len(tokens) and (np.diff(positions) > 0).all()
        self.read.append(len(tokens))
        return haystacks.read(tokens, self._words)


def subject(reads: bool = False) -> Subject:
    words = RandomWords()
    reader = Parrot(words) if reads else None
    return Subject("oracle", "It knows.", words, lambda prompt: Oracle(words, prompt), reader, "cpu", "float32")


@pytest.fixture(scope="module")
def world() -> World:
    words = RandomWords()
    return World(haystacks.build("pydoc", 8192, words), words, tuple(PAIRS), (0.0, 0.5, 1.0), CHUNK)


def settings(**changes) -> verify.VerifySettings:
    base = {"lengths": (4096,), "depths": (0.0, 0.5, 1.0), "seeds": 1, "haystack": "pydoc", "chunk_tokens": CHUNK}
    return verify.VerifySettings(**base | {"buffer_share": 0.1} | changes)


def rows_of(chosen: verify.VerifySettings, who: Subject, out, **more) -> dict[str, dict]:
    found = {done.row["key"]: done.row for done in verify.verify(chosen, PAIRS, who, out, **more)}
    return {key: {name: value for name, value in row.items() if name != "seconds"} for key, row in found.items()}


# -- the pairs ------------------------------------------------------------------------------------------


def test_questions_share_no_content_word_with_facts_or_distractors():
    assert len(PAIRS) >= 60
    for pair in PAIRS:
        fact, asked, literal, *others = map(set, bm25.stems([pair.fact, pair.question, pair.literal_question,
                                                             *pair.distractors]))  # fmt: skip
        assert len(fact) >= 3 and len(asked) >= 3, pair.id
        assert not fact & asked, (pair.id, fact & asked)
        assert len(fact & literal) >= 3, (pair.id, "a literal question uses the fact's words")
        assert len(others) >= 2 and not any(other & asked for other in others), pair.id
        assert all(other & fact for other in others), (pair.id, "a distractor has the fact's form")


def test_answers_are_given_by_the_fact_alone():
    for pair in PAIRS:
        assert answers.matches(pair.fact, pair.answers), pair.id
        for text in (pair.question, pair.literal_question, *pair.distractors):
            assert not answers.matches(text, pair.answers), (pair.id, text)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rows: rows[0].pop("fact"), "entry 1: allowed is an object with exactly"),
        (lambda rows: rows[1].update(question=" "), "entry 2: question=' '"),
        (lambda rows: rows[1].update(answers=[]), "entry 2: answers="),
        (lambda rows: rows[0].update(answers=["xyz"]), "none of answers=.* occurs in the fact"),
        (lambda rows: rows[1].update(id=rows[0]["id"]), "occurs twice"),
        (lambda rows: rows[0].update(fact="It is red \ud800."), "is not JSON .*surrogates"),
        (lambda rows: rows.clear(), "at least one object"),
    ],
)
@pytest.mark.bad_input
def test_bad_pairs_are_named(tmp_path, change, complaint):
    rows = [{"id": i, "fact": "It is red.", "question": "Which hue?", "literal_question": "Is it red or blue?",
             "answers": ["red"], "distractors": []} for i in "ab"]  # fmt: skip
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(rows))
    assert [pair.id for pair in load_pairs(file)] == ["a", "b"]
    change(rows)
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=complaint):
        load_pairs(file)
    for broken in ("{", "[" * 100_000):
        file.write_text(broken)
        with pytest.raises(ValueError, match="is not JSON"):
            load_pairs(file)


# -- haystacks and cases --------------------------------------------------------------------------------


def test_a_longer_haystack_begins_with_the_shorter_one(tmp_path):
    text = 'One is here. Two are there!\n\nThree stand (by the door). Four?\n\nFive "fled". Six'
    file = tmp_path / "own.txt"
    file.write_text(text)
    words = RandomWords()
    short, long = haystacks.build(str(file), 20, words), haystacks.build(str(file), 200, words)
    assert len(short.tokens) == 20 and len(long.tokens) == 200
    assert (long.tokens[:20] == short.tokens).all() and (long.ends[long.ends < 20] == short.ends).all()
    assert ("\n\n" + text).startswith(haystacks.read(short.tokens, words))
    assert "read 1" not in short.note and "paragraphs shuffled (seed 0)" in long.note
    again, other = haystacks.build(str(file), 200, words), haystacks.build(str(file), 200, words, seed=1)
    assert (again.tokens == long.tokens).all() and (other.tokens != long.tokens).any()
    for end in long.ends[1:]:
        assert haystacks.read(long.tokens[end - 1 : end], words).strip() in {".", "!", "?", "Six", ")"}
    with pytest.raises(ValueError, match="nowhere"):
        haystacks.build("nowhere", 20, words)
    with pytest.raises(ValueError, match="length=0"):
        haystacks.build("pydoc", 0, words)


@pytest.mark.parametrize("task", TASKS)
def test_needles_stand_where_they_are_said_to(world, task):
    """Exact spans, one chunk each, no overlap; every other token is the haystack's own."""
    found = list(cases(world, [task], [4096, 8192], 2, list(ASKED)))
    assert len({case.key for case in found}) == len(found)
    for case in found:
        store, taken = PlantedStore(world.haystack.tokens, case), np.zeros(case.length, int)
        text = store.read(0, case.length)
        assert len(store) == len(text) == case.length
        for needle in (*case.needles, *case.decoys):
            taken[needle.start : needle.stop] += 1
            assert needle.start in world.haystack.ends
            assert needle.start // CHUNK == (needle.stop - 1) // CHUNK
            assert (store.read(needle.start, needle.stop) == text[needle.start : needle.stop]).all()
            if needle.strength == 1:
                assert haystacks.read(text[needle.start : needle.stop], world.words) == " " + needle.text
        assert taken.max() == 1
        assert (text[taken == 0] == world.haystack.tokens[: case.length][taken == 0]).all()
        for needle in case.needles:
            answer = haystacks.read(text[slice(*needle.answer)], world.words)
            pair = next(pair for pair in PAIRS if pair.id == needle.pair)
            assert task == "jigsaw" or answers.matches(answer, pair.answers)
        for pair in {needle.pair for needle in case.needles}:
            assert next(p for p in PAIRS if p.id == pair).asked(case.asked) in case.prompt


def test_each_task_is_what_it_says(world):
    def one(task):
        return next(cases(world, [task], [8192], 1, ["literal"]))

    fading = one("fading")
    starts = [needle.start for needle in fading.needles]
    gaps = np.diff(starts)
    assert (gaps[1:] > 1.2 * gaps[:-1]).all() and [n.strength for n in fading.needles] == list(FADES)
    fact = world.words.encode(" " + fading.needles[0].text)
    for needle, strength in zip(fading.needles, FADES, strict=True):
        there = PlantedStore(world.haystack.tokens, fading).read(needle.start, needle.stop)
        kept = np.mean(there == fact)
        answer = (needle.answer[1] - needle.answer[0]) / len(fact)
        assert abs(kept - max(strength, answer)) < 0.15

    jigsaw = one("jigsaw")
    pair = next(pair for pair in PAIRS if pair.id == jigsaw.needles[0].pair)
    assert " ".join(needle.text for needle in jigsaw.needles) == pair.fact
    assert (np.diff([needle.start for needle in jigsaw.needles]) > CHUNK).all()

    cluster = [needle.start for needle in one("clustered").needles]
    assert max(cluster) - min(cluster) < CHUNK
    assert len(one("distractors").decoys) >= 2 * REPEATS
    assert {case.needles[0].pair for case in cases(world, ["live"], [4096], 1, ["literal"])} == {p.id for p in PAIRS}
    assert [needle.start for needle in one("ordering").needles] == sorted(n.start for n in one("ordering").needles)
    depths = [case.needles[0].start / 8192 for case in cases(world, ["single"], [8192], 1, ["literal"])]
    assert np.allclose(depths, world.depths, atol=0.04)
    first, second = (list(cases(world, ["live"], [4096], 1, [how])) for how in ASKED)
    assert [case.needles for case in first] == [case.needles for case in second], "asked of the same documents"


def test_a_document_that_is_full_says_so(world):
    planter = Planter(world.haystack, 256, 64, world.words)
    with pytest.raises(ValueError, match="length=256: no sentence end left"):
        for _ in range(50):
            planter.fact(PAIRS[0], PAIRS[0].fact, 0.5)
    with pytest.raises(ValueError, match="depth=1.5"):
        planter.fact(PAIRS[0], PAIRS[0].fact, 1.5)
    with pytest.raises(ValueError, match="length=9999"):
        Planter(world.haystack, 9999, 64, world.words)


# -- rivals and scores ----------------------------------------------------------------------------------


def test_rivals_keep_as_many_tokens_and_bm25_finds_what_it_can_read(world):
    index = bm25.WindowIndex(world.haystack.tokens, world.words)
    found = {how: [] for how in ASKED}
    for case in list(cases(world, ["live"], [4000], 1, list(ASKED)))[::6]:
        store = PlantedStore(world.haystack.tokens, case)
        for name in retrieval.RIVALS:
            kept = retrieval.kept_by_rival(name, store, case, 400, index)
            assert len(set(kept.ranked.tolist())) == 400 and kept.ranked.min() >= 0 and kept.ranked.max() < 4000
            if name == "recency":
                assert (kept.best(10) == np.arange(3990, 4000)).all()
        own = whole_document(store)
        assert (index.rank(store, case, 3) == bm25.WindowIndex(own, world.words).rank(store, case, 3)).all()
        found[case.asked].append(
            retrieval.recall(retrieval.kept_by_rival("bm25", store, case, 400, index), case).answer
        )
    assert np.mean(found["literal"]) > 0.95 and np.mean(found["paraphrase"]) < 0.5
    with pytest.raises(ValueError, match="method='best'"):
        retrieval.kept_by_rival("best", store, case, 4, index)


def whole_document(store: PlantedStore) -> np.ndarray:
    """The whole document, so that an index made of it owes nothing to what was cached."""
    return store.read(0, len(store))


def test_recall_counts_tokens(world):
    case = next(cases(world, ["single"], [4096], 1, ["literal"]))
    needle = case.needles[0]
    span, answer = np.arange(needle.start, needle.stop), np.arange(*needle.answer)

    def score(positions):
        return retrieval.recall(retrieval.Kept("x", positions, True), case)

    assert score(span) == retrieval.Recall(1.0, 1.0, 1.0, None, (1.0,))
    assert score(answer) == retrieval.Recall(len(answer) / len(span), 0.0, 1.0, None, (1.0,))
    missing = score(np.setdiff1d(span, answer[:1]))
    assert (missing.whole, missing.answer) == (0.0, 0.0) and missing.tokens == pytest.approx(1 - 1 / len(span))
    assert score(np.arange(needle.stop, needle.stop + 9)).tokens == 0


@pytest.mark.parametrize(
    ("reply", "accepted", "right"),
    [
        ("It leaves at 6:15.", ("quarter past six", "6:15"), True),
        ("A QUARTER past six!", ("quarter past six", "6:15"), True),
        ("At 16:15.", ("6:15",), False),
        ("Fourteenth", ("fourteen",), False),
        ("The price was 4,000 crowns", ("4000",), True),
        ("the butcher’s shop", ("butcher's",), True),
        ("70%", ("70%",), True),
        ("", ("jade",), False),
    ],
)
def test_replies_are_matched_by_whole_words(reply, accepted, right):
    assert answers.matches(reply, accepted) is right


def test_intervals_against_known_ones():
    assert over_cases([1.0] * 9 + [0.0]) == pytest.approx((0.5958, 0.9821), abs=1e-3)  # Wilson 1927, 9 of 10
    assert over_cases([1.0] * 88)[0] == pytest.approx(88 / (88 + 1.96**2), abs=1e-3)
    low, high = over_cases([0.2, 0.4, 0.6, 0.8] * 10)
    assert 0.42 < low < 0.46 and 0.54 < high < 0.58  # 0.5 +- 1.96 * 0.224 / sqrt(40)
    assert over_cases([0.5]) == (0.0, 1.0)


# -- the loop -------------------------------------------------------------------------------------------


def test_every_task_runs_and_who_knows_finds(tmp_path):
    found = rows_of(settings(answers=2), subject(reads=True), tmp_path)
    assert {row["task"] for row in found.values()} == set(TASKS)
    for row in found.values():
        assert row["in_order"] and row["kept"] == 410
        if row["task"] in {"single", "live", "distractors"}:
            assert row["recall"]["proteus"]["whole"] == 1, row["key"]
    alone = [row for row in found.values() if row["task"] == "live" and row["asked"] == "paraphrase"]
    assert np.mean([row["recall"]["bm25"]["answer"] for row in alone]) < 0.3
    asked = [row for row in found.values() if row["replies"]]
    assert len([row for row in asked if row["task"] == "live"]) == 2 * len(ASKED)
    assert {row["task"] for row in asked} == {"single", "live", "fading", "jigsaw", "distractors"}
    for row in asked:
        assert set(row["replies"]) == {answers.DENSE, *retrieval.METHODS}
        kept = row["recall"]["proteus"]["answer"]
        assert row["task"] == "jigsaw" or row["replies"]["proteus"]["right"] >= (kept == 1)
        assert row["task"] == "jigsaw" or row["replies"][answers.DENSE]["right"]


def test_reading_takes_the_best_tokens_that_fit(world):
    case = next(cases(world, ["single"], [8192], 1, ["literal"]))
    store, reader = PlantedStore(world.haystack.tokens, case), Parrot(world.words)
    assert answers.answer(reader, store, case, None, 100) is None, "dense does not fit"
    kept = retrieval.Kept("x", np.arange(8191, 0, -1), True)
    assert answers.answer(reader, store, case, kept, 10).text == haystacks.read(store.read(8182, 8192), world.words)
    answers.answer(reader, store, case, kept, 8000)
    assert reader.read == [10, Parrot.context - answers.ROOM]


def test_a_run_goes_on_where_it_was_cut(tmp_path):
    chosen = settings(tasks=("single", "many"))
    full = rows_of(chosen, subject(), tmp_path / "full")
    halts = iter([False] * 9 + [True] * 99)
    with pytest.raises(Stopped):
        rows_of(chosen, subject(), tmp_path / "cut", stop=lambda: next(halts))
    lines = (tmp_path / "cut" / verify.CASES).read_bytes()
    done = lines.count(b"\n")
    assert 0 < done < len(full)
    (tmp_path / "cut" / verify.CASES).write_bytes(lines + b'{"key": "sing')  # as a kill while writing leaves it
    before = Oracle.made
    assert rows_of(chosen, subject(), tmp_path / "cut") == full
    assert Oracle.made - before == len(full) - done + 1, "finished cases are not measured again"
    written = [json.loads(line)["key"] for line in (tmp_path / "cut" / verify.CASES).read_text().splitlines()]
    assert sorted(written) == sorted(full)
    with pytest.raises(ValueError, match=r"other settings \(seeds\)"):
        rows_of(replace(chosen, seeds=2), subject(), tmp_path / "cut")
    for line in ("nonsense", "[]", '{"key": "single"}'):
        (tmp_path / "cut" / verify.CASES).write_text(f"{line}\n")
        with pytest.raises(ValueError, match="is not what verify wrote"):
            rows_of(chosen, subject(), tmp_path / "cut")
    (tmp_path / "cut" / verify.SETTINGS).write_text("[1]")
    with pytest.raises(ValueError, match="other settings"):
        rows_of(chosen, subject(), tmp_path / "cut")


def test_the_report_holds_what_was_measured(tmp_path):
    pytest.importorskip("plotly")
    chosen = settings(lengths=(2048, 4096), answers=1)
    rows = list(rows_of(chosen, subject(reads=True), tmp_path).values())
    about = verify.run_folder(tmp_path).settings() | {"torch": "2", "python": "3"}
    report = write_report(tmp_path, rows, about)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "plotly" in page and 'src="http' not in page and "It knows." in page
    for word in (*TASKS, *retrieval.METHODS, "2,048", "4,096", "Wilson", "Did the model answer?"):
        assert word in page
    assert all(escape(line) in page for line in sentences(report))
    live = next(e for e in report["recall"] if (e["task"], e["length"], e["method"]) == ("live", 4096, "proteus"))
    assert live["answer"]["cases"] == len(PAIRS) and live["answer"]["low"] <= live["answer"]["mean"]
    lengths, depths, grid = summary.heat(rows, "literal", "proteus")
    assert lengths == [2048, 4096] and depths == [0.0, 0.5, 1.0] and grid.shape == (3, 2)
    rows[0]["in_order"] = False
    assert "in all but 1" in " ".join(sentences(write_report(tmp_path, rows, about)))
    with pytest.raises(ValueError, match="no finished case"):
        write_report(tmp_path, [], about)


def test_a_random_layer_is_at_chance(tmp_path):
    found = rows_of(settings(tasks=("live",), asked=("paraphrase",)), load("layer"), tmp_path)
    share = np.mean([row["recall"]["proteus"]["tokens"] for row in found.values()])
    assert share < 0.35, "a tenth is kept, and nothing was learned"


@pytest.fixture
def run(capfd, tmp_path):
    return partial(run_command, capfd, "verify", "--out", str(tmp_path / "out"))


def test_the_command_writes_a_report_and_goes_on(run, tmp_path):
    args = ("--model", "layer", "--lengths", "1k,2k", "--tasks", "single,distractors", "--seeds", "1", "--haystack",
            "pydoc", "--depths", "0.1,0.9", "--chunk", "512")  # fmt: skip
    code, out, _ = run(*args)
    assert code == 0 and "what chance gives" in out and "12 cases" in out
    first = (tmp_path / "out" / verify.CASES).read_bytes()
    assert run(*args)[0] == 0 and (tmp_path / "out" / verify.CASES).read_bytes() == first
    about = json.loads((tmp_path / "out" / "report.json").read_text())["about"]
    assert {"torch", "bm25s", "device", "dtype", "seeds", "haystack_hash", "scorer"} <= set(about)
    code, _, err = run(*args, "--buffer-share", "0.5")
    assert code == 2 and "other settings (buffer_share)" in err


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("--lengths", "many"), "'many': must be whole numbers"),
        (("--lengths", "100"), "lengths=100: must be >= 256"),
        (("--depths", "0,2"), "depths=2.0: must be in [0, 1]"),
        (("--depths", "x"), "'x': must be numbers"),
        (("--tasks", "dance"), "'dance': must be one of single"),
        (("--tasks", ""), "tasks=()"),
        (("--asked", "loudly"), "'loudly': must be one of"),
        (("--buffer-share", "0"), "buffer_share=0.0: must be in (0, 1]"),
        (("--seeds", "0"), "seeds=0: must be >= 1"),
        (("--per-chunk", "nan"), "per_chunk=nan: must be >= 1"),
        (("--per-chunk", "inf"), "per_chunk=inf: must be >= 1"),
        (("--neighbours", "-1"), "neighbours=-1"),
        (("--lengths", "1000000m"), "must fit in memory"),
        (("--dtype", "int8"), "dtype='int8'"),
        (("--model", "nobody"), "name='nobody' is not a known model"),
        (("--haystack", "nothing.txt"), "nothing.txt"),
    ],
)
def test_bad_options_are_named(run, tmp_path, args, complaint):
    code, _, err = run("--model", "layer", *args)
    assert code == 2 and complaint in err
    assert not (tmp_path / "out").exists()
