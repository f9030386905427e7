"""The models in the package: they load, they are what their recipes say, and they can do what they are for."""

import pytest
import torch

from proteus_playground.lm.model import ProteusLM
from proteus_playground.lm.shelf.exam import exam
from proteus_playground.lm.shipped import RECIPES, load_shipped, shipped_models


def test_every_shipped_model_has_its_weights():
    assert shipped_models() == list(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_model_is_what_its_recipe_trains(name):
    job, (model, _) = RECIPES[name](), load_shipped(name)
    assert model.cfg == job.model and not model.training
    assert job.batches.vocab_size == model.cfg.vocab_size
    untrained = ProteusLM(job.model).state_dict()
    assert {key: x.shape for key, x in untrained.items()} == {key: x.shape for key, x in model.state_dict().items()}
    assert all(x.isfinite().all() for key, x in model.state_dict().items() if "pending" not in key)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name='shelf-maxi': must be one of 'shelf-mini', 'recall-mini'"):
        load_shipped("shelf-maxi")


@torch.no_grad()
def test_shelf_mini_answers_questions_it_has_not_learned_from():
    model, tokenizer = load_shipped("shelf-mini")
    grades = list(exam(model, tokenizer, tokens=1024, questions=32, seed=5))
    for alpha in (0.0, 1.0):
        right = [grade.right for grade in grades if grade.flux_alpha == alpha]
        assert sum(right) / len(right) > 0.9, alpha


@torch.no_grad()
def test_recall_mini_looks_up_values():
    from proteus_playground.lm.recall.tasks import Recall

    model, words = load_shipped("recall-mini")
    task = Recall(16, words=words).evaluation()
    batch = task.batch(0, 16, 256)
    asked = batch.targets >= 0
    for alpha, least in ((0.0, 0.98), (1.0, 0.97)):
        with model.settings(flux_alpha=alpha, shortlist=256 // 8):
            right = task.correct(batch, model(batch.ids).argmax(-1))[asked]
        assert right.float().mean() > least, alpha
