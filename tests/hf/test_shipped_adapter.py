"""The healed model of the package: its file is small and says how it was made, and it loses less than its base."""

import json
from importlib.resources import files

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
from proteus_playground.experiments import results  # noqa: E402
from proteus_playground.experiments.quality.choice import BASE, Choice, config_of, gap  # noqa: E402

import proteus_playground.hf  # noqa: E402
from proteus_playground.common.tensors import read_tensors  # noqa: E402
from proteus_playground.common.texts import load_text  # noqa: E402
from proteus_playground.hf import convert, models, opening  # noqa: E402
from proteus_playground.hf.healing.adapters import WRITER, apply_adapter  # noqa: E402

SLIDER = "smollm2-slider"


def test_its_file_is_small_and_says_how_it_was_made():
    place = files(proteus_playground.hf) / "data" / models.KNOWN[SLIDER].adapter
    tensors, about = read_tensors(place, WRITER)
    report = json.loads((files(results) / "healing_h200.json").read_text())
    assert place.stat().st_size <= 10e6 and place.stat().st_size / 1e6 == pytest.approx(report["megabytes"], abs=0.01)
    assert all(each.dtype == torch.float16 for each in tensors.values())
    assert about["plan"] == report["plan"] and about["texts"] == report["texts"]
    read, judged = about["plan"]["data"]["sources"], about["plan"]["data"]["held_out"]
    assert set(read) == set(about["texts"]) and not set(read) & set(judged) and "jargon.txt" in judged
    assert not [name for name in (*read, *judged) if "/" in name]


def test_it_opens_by_its_name_and_loses_less_than_its_base(smollm2):
    healed, base = opening.load_source(SLIDER), opening.load_source("smollm2")
    assert healed.name == SLIDER and opening.base_name(SLIDER) == "smollm2" and opening.files_of(SLIDER) == smollm2
    count = BASE["gates_per_group"]
    assert set(healed.own_gates) == {(layer, count) for layer in healed.full_layers}
    assert not torch.equal(healed.own_gates[0, count].prototypes, base.own_gates[0, count].prototypes)
    ids = base.ids(base.encode(load_text("python topics").body))[:512]
    dense, gaps = {}, {}
    for source in (healed, base):
        dense[source.name] = source.nll(ids, 256, {})
        gates = {layer: source.own_gates[layer, count] for layer in source.full_layers}
        gaps[source.name], _ = gap(source, ids, dense[source.name], gates, config_of(source, 32, Choice("base", BASE)))
    assert gaps[SLIDER] < 0.8 * gaps["smollm2"] and dense[SLIDER] < dense["smollm2"] + 0.02


def test_what_needs_the_plain_model_says_so(smollm2, tmp_path):
    with pytest.raises(ValueError, match="convert 'smollm2', the model under it"):
        convert.convert(SLIDER, tmp_path / "own")
    with pytest.raises(ValueError, match="comes with the package and is not removed; 'smollm2'"):
        models.remove(SLIDER)
    with pytest.raises(ValueError, match="comes with the package and is not removed"):
        models.remove("tiny-english")


def test_an_adapter_of_another_model_is_refused():
    tensors, about = read_tensors(files(proteus_playground.hf) / "data" / models.KNOWN[SLIDER].adapter, WRITER)
    with pytest.raises(ValueError, match="names or sizes differ"):
        apply_adapter(tensors, about, opening.load("tiny-english")[0], {})
