"""A model answers from passages: what it is given, where each token is said to stand, and what it says."""

import numpy as np
import pytest
from tiny_llama import build

pytest.importorskip("transformers")
from proteus_playground.hf.chat import REPLY, ROOM, ChatReader  # noqa: E402 -- after the skip


@pytest.fixture(scope="module")
def net():
    model, tokenizer = build()
    tokenizer.chat_template = "{% for m in messages %}page {{ m['content'] }} again{% endfor %} it"
    return model, tokenizer


def passes(reader, monkeypatch) -> list[tuple[list[int], list[int]]]:
    """Ids and positions of every pass of the model."""
    seen, forward = [], reader._model.forward

    def watched(ids, position_ids=None, **kwargs):
        seen.append((ids[0].tolist(), position_ids[0].tolist()))
        return forward(ids, position_ids=position_ids, **kwargs)

    monkeypatch.setattr(reader._model, "forward", watched)
    return seen


@pytest.mark.parametrize("compact", [True, False])
def test_passages_stand_where_they_should(net, monkeypatch, compact):
    reader = ChatReader(*net, compact=compact)
    seen = passes(reader, monkeypatch)
    kept = np.array([40, 41, 90])
    reader.answer(np.array([2, 3, 5]), kept, "humble soup")
    (ids, at), later = seen[0], seen[1:]
    begin = ids.index(2)
    if compact:
        assert ids[begin : begin + 3] == [2, 3, 5]  # a word-level tokenizer has no line break to put between them
        assert at == list(range(len(ids)))
    else:
        assert at[:begin] == list(range(begin))
        assert at[begin : begin + 3] == [begin + 40, begin + 41, begin + 90]
        assert at[begin + 3 :] == list(range(begin + 91, begin + 91 + len(ids) - begin - 3))
    assert [len(one) for one, _ in later] == [1] * len(later)
    assert [place[0] for _, place in later] == list(range(at[-1] + 1, at[-1] + 1 + len(later)))


def test_the_reply_is_the_greedy_one(net):
    model, tokenizer = net
    reader = ChatReader(model, tokenizer)
    said = reader.answer(np.array([2, 3, 5, 7]), np.arange(4), "humble soup")
    model.generation_config.eos_token_id, kept = None, model.generation_config.eos_token_id
    try:
        whole = reader.answer(np.array([2, 3, 5, 7]), np.arange(4), "humble soup")
        assert len(tokenizer(whole)["input_ids"]) <= REPLY and whole.startswith(said)
        first = int(tokenizer(whole)["input_ids"][1])
        model.generation_config.eos_token_id = first
        assert len(reader.answer(np.array([2, 3, 5, 7]), np.arange(4), "humble soup")) < len(whole)
    finally:
        model.generation_config.eos_token_id = kept


def test_breaks_mark_what_was_left_out():
    from proteus_playground.hf.chat import _with_breaks

    assert _with_breaks(np.array([5, 6, 7, 8]), np.array([1, 2, 9, 20]), [0]).tolist() == [5, 6, 0, 7, 0, 8, 0]


def test_too_much_to_read_is_refused(net):
    with pytest.raises(ValueError, match=f"must be at most {512 - ROOM} for this model"):
        ChatReader(*net).answer(np.ones(512, np.int64), np.arange(512), "what?")


def test_nothing_kept_is_still_a_question(net):
    assert isinstance(ChatReader(*net).answer(np.zeros(0, np.int64), np.zeros(0, np.int64), "soup"), str)


def test_a_question_may_hold_any_character(net):
    reader = ChatReader(*net)
    assert isinstance(reader.answer(np.array([2, 3]), np.arange(2), "soup \N{OBJECT REPLACEMENT CHARACTER} soup"), str)


def test_a_question_that_does_not_fit_is_refused(net):
    with pytest.raises(ValueError, match=f"must be at most {512 - REPLY} for this model"):
        ChatReader(*net).answer(np.array([2, 3]), np.arange(2), "humble soup " * 300)
