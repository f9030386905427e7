"""tiny-english, from the package to a checkpoint for transformers: converted, healed, exported, opened."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
from transformers import AutoModelForCausalLM  # noqa: E402 -- after the skip

from proteus_playground.hf.convert import convert  # noqa: E402
from proteus_playground.hf.export import export  # noqa: E402
from proteus_playground.hf.healing.plan import Plan  # noqa: E402
from proteus_playground.hf.healing.run import read_log  # noqa: E402
from proteus_playground.hf.healing.session import PLAN, Session  # noqa: E402
from proteus_playground.hf.models import place_of  # noqa: E402
from proteus_playground.hf.own.folder import open_folder  # noqa: E402


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.slow
def test_tiny_english_is_converted_healed_exported_and_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))
    own = convert("tiny-english", tmp_path / "own", kind="quick", say=lambda sentence: None)
    assert own.stanza.base.model == "tiny-english"  # not a path of this machine
    file = own.runs[0] / PLAN
    plan = Plan.read(file)
    assert plan.stage("B").lengths == (512,) and plan.minutes == 3
    stages = tuple(replace(stage, tokens=1024) for stage in plan.stages)
    replace(plan, stages=stages, data=replace(plan.data, held_out_rows=1)).write(file)
    session = Session(own.path)
    while session.training.stage is not None:
        for _ in session.run.steps():
            pass
        session.finish_stage()
    steps = read_log(own.runs[0])
    assert [step.stage for step in steps] == ["A", "A", "B", "B"] and steps[-1].held_out["gaps"]["8"] > 0
    merged = export(own.path, tmp_path / "merged", merged=True, say=lambda sentence: None)
    model, slider = AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), open_folder(own.path, dtype=torch.half)
    ids = slider.tokenizer("The librarian put the book back on the shelf.", return_tensors="pt").input_ids.repeat(1, 9)
    with slider.patched():
        healed = logits(slider.model, ids)
    assert model.dtype == torch.half and torch.equal(logits(model, ids), healed)
    base = AutoModelForCausalLM.from_pretrained(place_of("tiny-english"), dtype="auto")
    assert not torch.equal(logits(base, ids), logits(slider.model, ids))  # both dense: the adapter changed the weights


def test_the_recipe_names_its_texts_and_what_came_out():
    recipe = json.loads((place_of("tiny-english") / "recipe.json").read_text("utf-8"))
    assert recipe["benchmark"] == "tiny" and recipe["held_out_loss"] == 2.9672 and len(recipe["texts"]) == 66
    assert recipe["read"] == recipe["steps"] * recipe["batch"] * 1024
    assert not {"humble_token.txt", "commonplace_book.txt"} & set(recipe["texts"])  # these are held out
