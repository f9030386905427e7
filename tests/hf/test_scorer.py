"""A model's own queries and keys find what a prompt asks for: exactly, window by window, from a cache or not."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kills import run_through_kills
from tiny_llama import build

pytest.importorskip("transformers")
from proteus_playground.common.progress import Stopped  # noqa: E402
from proteus_playground.hf import key_reader, scorer  # noqa: E402 -- after the skip
from proteus_playground.hf.key_reader import CONTEXT, WINDOW, Head, KeyReader, WindowCache, spans  # noqa: E402
from proteus_playground.hf.patch import capture  # noqa: E402
from proteus_playground.hf.retrieval_heads import calibration_pairs, find_heads, known_heads, near_max  # noqa: E402
from proteus_playground.hf.scorer import Asker  # noqa: E402

HEADS = (Head(1, 0), Head(0, 4), Head(1, 2))


@pytest.fixture(scope="module")
def net():
    return build()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(1, 20, 700).astype(np.int32)


@given(st.integers(1, 3 * WINDOW + 5))
def test_windows_cover_each_token_once(n):
    found = list(spans(n))
    assert [i for _, fresh, end in found for i in range(fresh, end)] == list(range(n))
    assert all(end - begin == min(n, WINDOW) for begin, _, end in found)
    assert all(fresh - begin >= CONTEXT for begin, fresh, _ in found[1:])


@given(st.integers(1, 40), st.integers(0, 9))
def test_the_best_nearby_is_the_best_nearby(n, radius):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    want = torch.stack([x[:, max(0, i - radius) : i + radius + 1].amax(1) for i in range(n)], 1)
    assert torch.equal(near_max(x, radius), want)


def test_keys_are_those_of_a_plain_pass(net, tokens):
    keys = KeyReader(net[0], HEADS).read(tokens)
    assert keys.shape == (700, 2, 8)
    for begin, fresh, end in spans(700):
        layers = capture(net[0], torch.from_numpy(tokens[begin:end].astype(np.int64)), keys_only=True)
        for at, (layer, group) in enumerate([(0, 1), (1, 0)]):
            want = layers[layer].k[fresh - begin :, group]
            torch.testing.assert_close(keys[fresh:end, at], want, atol=2e-3, rtol=2e-3)


def test_layers_above_the_last_one_asked_for_do_not_run(net, tokens, monkeypatch):
    ran = []
    hook = net[0].model.layers[2].register_forward_pre_hook(lambda *_: ran.append(1))
    KeyReader(net[0], HEADS).read(tokens)
    hook.remove()
    assert ran == []


def counted(reader, monkeypatch) -> list[int]:
    seen, run = [], reader._run
    monkeypatch.setattr(reader, "_run", lambda ids: seen.append(len(ids)) or run(ids))
    return seen


def test_the_cache_pays_for_new_windows_only(net, tokens, tmp_path, monkeypatch):
    first = KeyReader(net[0], HEADS, tmp_path / "keys")
    want = first.read(tokens)
    again = KeyReader(net[0], HEADS, tmp_path / "keys")
    seen = counted(again, monkeypatch)
    assert torch.equal(again.read(tokens), want) and seen == []
    changed = tokens.copy()
    changed[300] = 1 + changed[300] % 19
    fresh = KeyReader(net[0], HEADS).read(changed)
    torch.testing.assert_close(again.read(changed), fresh, atol=2e-3, rtol=2e-3)  # other company in a batch
    assert sum(seen) == sum(begin <= 300 < end for begin, _, end in spans(700))


def window(number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(256, number), np.full(1000, number, np.float16)


def write_windows(folder: Path, step: Callable[[], None]) -> None:
    """Adds windows eight at a time, until there are 640. Those that were added before have to be there, and whole."""
    cache, there, done = WindowCache(folder / "keys", "model", 1000), 0, folder / "done"
    while (found := cache.get(window(there)[0])) is not None:
        assert found.tolist() == [there] * 1000
        there += 1
    assert there >= (done.stat().st_size if done.is_file() else 0)
    for number in range(there, 640, 8):
        step()
        cache.put([window(number + k) for k in range(8)])
        done.write_bytes(bytes(number + 8))


def test_a_writer_that_is_killed_leaves_whole_windows(tmp_path):
    run_through_kills(write_windows, tmp_path, kills=10, span=6)
    cache = WindowCache(tmp_path / "keys", "model", 1000)
    assert all(cache.get(window(i)[0]).tolist() == [i] * 1000 for i in range(640))
    assert cache.get(np.full(256, -1)) is None


def test_a_cache_of_the_old_format_is_made_again_and_other_files_are_kept(net, tokens, tmp_path):
    reader, file = KeyReader(net[0], HEADS), tmp_path / "keys"
    file.write_bytes(hashlib.sha256(reader.fingerprint.encode()).digest() + bytes(100))
    assert torch.equal(KeyReader(net[0], HEADS, file).read(tokens), reader.read(tokens))
    other = tmp_path / "notes.txt"
    other.write_text("no cache at all, but a text of somebody's own " * 30)
    with pytest.raises(ValueError, match="cache=.*another model"):
        KeyReader(net[0], HEADS, other)
    assert other.read_text().startswith("no cache")


def test_a_cache_of_other_layers_is_refused(net, tokens, tmp_path):
    KeyReader(net[0], HEADS, tmp_path / "keys").read(tokens)
    with pytest.raises(ValueError, match="cache=.*other layers"):
        KeyReader(net[0], [Head(2, 0)], tmp_path / "keys")


def test_scores_are_what_the_formula_says(net, tokens, monkeypatch):
    asker = Asker(*net, "tiny", heads=HEADS)
    ask = asker.ask("humble soup on page five")
    keys = asker.reader.read(tokens).float()
    rows = []
    (question,) = ask._questions
    for head, q in zip(HEADS, question.queries, strict=True):
        dots = q @ keys[:, asker.reader.column(head)].T * 8**-0.5
        rows += [torch.stack([row[max(0, i - 8) : i + 9].max() for i in range(700)]) for row in dots]
    want = torch.stack(rows)
    score, reason = ask.score(tokens)
    assert score[0] == -np.inf
    np.testing.assert_allclose(score[1:], (want.mean(0)[1:] - question.mean) / question.spread, atol=1e-3)
    own = want - want.mean(1, keepdim=True)
    best = own.gather(0, torch.from_numpy(reason).long()[None])[0]
    np.testing.assert_allclose(best, own.amax(0), atol=1e-4)
    monkeypatch.setattr(scorer, "TOKENS_PER_STEP", 64)
    np.testing.assert_allclose(ask.score(tokens)[0], score, atol=1e-4)


def test_queries_do_not_depend_on_what_every_question_has(net):
    asker = Asker(*net, "tiny", heads=HEADS)
    plain = asker.ask("cold soup")
    for layer in asker._layers:
        asker._centre[layer] = asker._centre[layer] + 1
    moved = asker.ask("cold soup")
    both = zip(plain._questions[0].queries, moved._questions[0].queries, strict=True)
    assert all(torch.allclose(a - 1, b, atol=1e-6) for a, b in both)
    assert plain.fingerprint != moved.fingerprint != asker.ask("the page").fingerprint


def test_a_reason_names_a_word_and_a_head(net, tokens):
    ask = Asker(*net, "tiny", heads=HEADS).ask("the humble soup")
    reasons = set(ask.score(tokens)[1].tolist())
    said = {ask.explain(code) for code in reasons}
    assert said <= {f"matches “{w}” of the prompt (layer {h.layer}, head {h.head})" for w in ("humble", "soup")
                    for h in HEADS}  # fmt: skip
    assert len(said) > 1


def test_each_sentence_of_a_prompt_asks_for_itself(net, tokens):
    asker = Asker(*net, "tiny", heads=HEADS)
    one, two = (asker.ask(part).score(tokens) for part in ("the humble soup?", "a page!"))
    both = asker.ask("the humble soup? a page!")
    score, reason = both.score(tokens)
    np.testing.assert_allclose(score, np.maximum(one[0], two[0]))
    first = asker.ask("the humble soup?")
    second = asker.ask("a page!")
    want = [first.explain(i) if a >= b else second.explain(j)
            for a, b, i, j in zip(one[0], two[0], one[1], two[1], strict=True)]  # fmt: skip
    assert [both.explain(code) for code in reason[1:]] == want[1:]
    assert set((one[0] > two[0])[1:].tolist()) == {True, False}


def test_scores_are_measured_against_ordinary_text(net):
    asker = Asker(*net, "tiny", heads=HEADS)
    score, _ = asker.ask("the humble soup").of_keys(asker._ordinary)
    assert abs(float(score.mean())) < 1e-4 and abs(float(score.std()) - 1) < 1e-3


def test_the_chat_frame_is_asked_with_but_is_no_reason(net, tokens):
    model, tokenizer = build()
    tokenizer.chat_template = "{% for m in messages %}page {{ m['content'] }} again{% endfor %} it"
    ask = Asker(model, tokenizer, "tiny", heads=HEADS).ask("humble soup")
    (question,) = ask._questions
    assert len(question.queries[0]) == 4 and question.words == ("humble", "soup")
    said = {ask.explain(code) for code in set(ask.score(tokens)[1].tolist())}
    assert said <= {f"matches “{w}” of the prompt (layer {h.layer}, head {h.head})" for w in ("humble", "soup")
                    for h in HEADS}  # fmt: skip


def test_stop_is_heard_between_batches(net, tokens, monkeypatch):
    monkeypatch.setattr(key_reader, "BATCH", 1)
    ask = Asker(*net, "tiny", heads=HEADS).ask("soup")
    asked = []
    ask.stop = lambda: asked.append(1) or len(asked) > 2
    with pytest.raises(Stopped):
        ask.score(tokens)
    assert len(asked) == 3


def test_heads_of_a_model_nobody_calibrated(net):
    with pytest.raises(ValueError, match="heads=None"):
        Asker(*net, "tiny")
    with pytest.raises(ValueError, match="calibration needs 8,192"):
        list(find_heads(*net, "too short a text"))
    assert known_heads("tiny") is None
    with pytest.raises(ValueError, match="prompt='  '"):
        Asker(*net, "tiny", heads=HEADS).ask("  ")


@pytest.mark.parametrize("rows", [[], [[1]], [1.0], [-1], [10**6]])
@pytest.mark.bad_input
def test_what_are_no_ids_of_the_model_are_refused(net, rows):
    with pytest.raises(ValueError, match="rows "):
        Asker(*net, "tiny", heads=HEADS).ask("soup").score(np.array(rows))


def test_one_token_is_a_sink_and_a_prompt_has_an_end(net):
    asker = Asker(*net, "tiny", heads=HEADS)
    assert asker.ask("soup").score(np.array([3]))[0].tolist() == [-np.inf]
    with pytest.raises(ValueError, match="must be at most 1,024"):
        asker.ask("humble soup. " * 600)


def test_calibration_chooses_heads_one_by_one(net):
    steps = list(find_heads(*net, "the humble token waited on page five " * 1200, most=2, last_layer=1))
    assert [len(step.heads) for step in steps] == [1, 2] and set(steps[0].heads) < set(steps[1].heads)
    assert all(head.layer <= 1 for head in steps[1].heads)
    assert all(0 <= step.median <= 1 and 0 <= step.within <= 1 for step in steps)


@pytest.mark.slow
def test_smollm2_finds_facts_by_other_words(smollm2):
    from proteus_playground.common.texts import load_text
    from proteus_playground.hf.models import load

    model, tokenizer = load("smollm2")
    asker = Asker(model, tokenizer, "smollm2")
    hay = np.array(tokenizer(load_text("python topics").body, verbose=False)["input_ids"][4000:5024], np.int32)
    above = []
    for at, pair in enumerate(calibration_pairs()[:8]):
        fact = tokenizer(" " + pair["fact"], verbose=False)["input_ids"]
        text, start = hay.copy(), 100 * (at + 1)
        text[start : start + len(fact)] = fact
        score, _ = asker.ask(pair["question"]).score(text)
        above.append((score >= score[start : start + len(fact)].mean()).mean())
    assert np.median(above) < 0.02
