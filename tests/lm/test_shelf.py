"""Shelves, their tokens, the sequences a model learns from, and how its answers are marked."""

from dataclasses import replace

import pytest
import torch

from proteus_playground.attention import AttentionConfig
from proteus_playground.lm.model import ModelConfig, ProteusLM
from proteus_playground.lm.shelf import ShelfTokenizer, shelf
from proteus_playground.lm.shelf import words as lists
from proteus_playground.lm.shelf.batches import ANSWER, PLAIN, VALUE, ShelfBatches, scored
from proteus_playground.lm.shelf.exam import HELD_OUT, ask, exam

TOKENIZER = ShelfTokenizer()


class Knows(torch.nn.Module):
    """Stands in for a model: says the next token of a text it has by heart, except where it is told to err."""

    def __init__(self, wrong: int | None = None):
        super().__init__()
        self.cfg = ModelConfig(TOKENIZER.vocab_size, 1, AttentionConfig(d_model=8, n_heads=1))
        self.embed, self.wrong, self.blocks = torch.nn.Embedding(1, 1), wrong, ()

    def set_flux_alpha(self, value):
        pass

    settings = ProteusLM.settings

    def forward(self, ids):
        said = torch.nn.functional.one_hot(ids.roll(-1, 1), TOKENIZER.vocab_size).float()
        if self.wrong is not None:
            said[ids.roll(-1, 1) == self.wrong] = 0.0
        return said


@pytest.mark.parametrize("seed", range(5))
def test_every_question_is_answered_by_one_sentence_and_one_alone(seed):
    found = shelf(seed, 200)
    assert found == shelf(seed, 200) and found != shelf(seed + 100, 200)
    assert len({question.text for question in found.questions}) == len(found.questions) > 50
    for question in found.questions:
        assert found.text[question.at :].startswith(question.fact)
        assert question.value in question.fact and question.value in question.answer
        entity = " ".join(question.answer.split("the ", 1)[1].split()[:2])
        assert entity in question.fact and entity in question.text
    otherwise = [question for question in found.questions if question.fact != question.answer]
    assert 0.3 < len(otherwise) / len(found.questions) < 0.7


@pytest.mark.parametrize("argument", [{"seed": -1, "sentences": 3}, {"seed": 0, "sentences": 0}])
@pytest.mark.bad_input
def test_a_shelf_of_nothing_is_refused(argument):
    with pytest.raises(ValueError, match="seed|sentences"):
        shelf(**argument)


def test_every_word_of_the_shelves_is_one_token():
    words = [word for name in vars(lists) if name.isupper() for word in getattr(lists, name)]
    assert [word for word in words if len(TOKENIZER.encode(word)) != 1] == []


@pytest.mark.parametrize("text", [" the red soup costs 7 crowns.", " Schnürsenkel, 東京 and\ttabs", " \U0001f35e"])
def test_any_text_comes_back_from_its_tokens(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and max(ids) < TOKENIZER.vocab_size
    assert len(TOKENIZER.spans(text)) == len(TOKENIZER.strings(ids)) == len(ids)


def test_sequences_are_the_same_for_an_index_and_weigh_what_must_be_looked_up():
    batches = ShelfBatches(TOKENIZER, seed=3)
    one, again, other = batches.batch(7, 2, 256), batches.batch(7, 2, 256), batches.batch(8, 2, 256)
    assert torch.equal(one.ids, again.ids) and torch.equal(one.weights, again.weights)
    assert not torch.equal(one.ids, other.ids)
    assert one.ids.shape == one.targets.shape == one.weights.shape == (2, 256)
    assert torch.equal(one.ids[:, 1:], one.targets[:, :-1])
    assert one.weights.unique().tolist() == pytest.approx([PLAIN, ANSWER, VALUE])
    for ids, weights in zip(one.targets, one.weights, strict=True):  # a value stands in the shelf before it is asked
        for at in (weights == VALUE).nonzero()[:, 0].tolist():
            assert ids[at] in ids[: at - 5]


def test_an_answer_holds_its_value_once():
    for question in shelf(1, 400).questions:
        tokens, weights = scored(TOKENIZER, question)
        assert weights.count(VALUE) == 1 and len(tokens) == len(weights)
        assert TOKENIZER.decode([tokens[weights.index(VALUE)]]).strip() == question.value


def test_copies_are_weighed_only_where_they_can_be_known():
    batch = ShelfBatches(TOKENIZER, seed=0, copies=1.0).batch(0, 4, 128)
    for ids, weights in zip(batch.targets, batch.weights, strict=True):
        free = int((weights == 0).sum()) + 1
        assert torch.equal(ids[free:], ids[:-free])


def test_an_exam_marks_whole_answers_and_looked_up_words():
    grades = list(exam(Knows().eval(), TOKENIZER, tokens=600, questions=12, seed=1))
    assert len(grades) == 24 and all(grade.right and grade.value_right for grade in grades)
    assert all(0 < grade.distance < grade.tokens <= 600 for grade in grades)
    period = TOKENIZER.encode(" costs")[0]
    marked = list(exam(Knows(period).eval(), TOKENIZER, tokens=600, questions=40, seed=1, alphas=(0.0,)))
    assert all(grade.right == (" costs" not in grade.question.answer) and grade.value_right for grade in marked)
    assert {grade.right for grade in marked} == {True, False}


def test_exams_ask_what_no_lesson_taught():
    assert HELD_OUT >= 1 << 40  # lessons draw shelves of 40 bits
    one, other = (next(exam(Knows().eval(), TOKENIZER, tokens=300, questions=1, seed=seed)) for seed in (0, 1))
    assert one.question != other.question


def test_a_model_in_training_is_not_asked():
    model = ProteusLM(Knows().cfg)
    with pytest.raises(ValueError, match="training=True"):
        next(exam(model, TOKENIZER, tokens=400, questions=1))
    with pytest.raises(ValueError, match="training=True"):  # it would move its gates
        ask(model, TOKENIZER, shelf(5, 10), shelf(5, 10).questions[0])


def test_an_exam_leaves_each_layer_its_alpha_and_refuses_what_it_cannot_grade():
    model = ProteusLM(replace(Knows().cfg, n_layers=2)).eval()
    model.blocks[1].attn.set_flux_alpha(0.25)
    list(exam(model, TOKENIZER, tokens=300, questions=1))
    assert [block.attn.cfg.flux_alpha for block in model.blocks] == [None, 0.25]
    with pytest.raises(ValueError, match="tokens=300"):  # too short a shelf for so many
        next(exam(model, TOKENIZER, tokens=300, questions=8))
    with pytest.raises(ValueError, match="vocab_size=9999"):
        next(exam(ProteusLM(replace(Knows().cfg, vocab_size=9999)).eval(), TOKENIZER, tokens=300, questions=1))


@pytest.mark.parametrize("content", ["", "{}"])
@pytest.mark.bad_input
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match="other.json"):
        ShelfTokenizer(tmp_path / "other.json").encode("a")


def test_what_a_model_writes_is_compared_to_the_letter():
    model = ProteusLM(Knows().cfg).eval()
    found = shelf(5, 10)
    answer = ask(model, TOKENIZER, found, found.questions[0])
    assert isinstance(answer.text, str) and answer.right == (answer.text == found.questions[0].answer)
