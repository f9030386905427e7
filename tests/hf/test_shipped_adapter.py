"""The healed model of the package: its file is small and says how it was made, and its name opens it."""

import json
from importlib.resources import files

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
pytest.importorskip("peft")
from proteus_playground.experiments import results  # noqa: E402

import proteus_playground.hf  # noqa: E402
from proteus_playground.common.tensors import read_tensors  # noqa: E402
from proteus_playground.hf import convert, models, opening  # noqa: E402
from proteus_playground.hf.adapters import WRITER, apply_adapter  # noqa: E402

SLIDER = "smollm2-slider"


def test_its_file_is_small_and_says_how_it_was_made():
    place = files(proteus_playground.hf) / "data" / models.KNOWN[SLIDER].adapter
    tensors, about = read_tensors(place, WRITER)
    first, report = (json.loads((files(results) / f"healing_{n}h200.json").read_text()) for n in ("", "more_"))
    assert place.stat().st_size <= 10e6 and place.stat().st_size / 1e6 == pytest.approx(report["megabytes"], abs=0.01)
    assert all(each.dtype == torch.float16 for each in tensors.values())
    assert about["plan"] == report["plan"] and about["texts"] == report["texts"] == first["texts"]
    assert about["start"] == report["start"] and report["before"] == first["after"]
    read, judged = about["plan"]["data"]["sources"], about["plan"]["data"]["held_out"]
    assert set(read) == set(about["texts"]) and not set(read) & set(judged) and "jargon.txt" in judged
    assert not [name for name in (*read, *judged) if "/" in name]


def test_it_opens_by_its_name_as_its_base_and_the_adapter(smollm2):
    healed, base = opening.load_source(SLIDER), opening.load_source("smollm2")
    assert healed.name == SLIDER and opening.base_name(SLIDER) == "smollm2" and opening.files_of(SLIDER) == smollm2
    tensors, about = read_tensors(files(proteus_playground.hf) / "data" / models.KNOWN[SLIDER].adapter, WRITER)
    scale = about["plan"]["adapter"]["alpha"] / about["plan"]["adapter"]["rank"]
    plain, sum_ = dict(base.model.named_parameters()), dict(healed.model.named_parameters())
    for name in ("model.layers.3.self_attn.q_proj", "model.layers.29.mlp.down_proj"):
        down, up = (tensors[f"base_model.model.{name}.lora_{which}.default.weight"].float() for which in "AB")
        added = scale * up @ down
        assert_close(sum_[f"{name}.weight"], plain[f"{name}.weight"] + added)
        assert added.norm() > 1e-3 * plain[f"{name}.weight"].norm()
    assert set(healed.own_gates) == set(base.own_gates) == {(layer, 256) for layer in range(30)}
    assert_close(healed.own_gates[3, 256].prototypes, tensors["gates.3.prototypes"].float(), rtol=0, atol=1e-3)
    assert not torch.equal(healed.own_gates[3, 256].prototypes, base.own_gates[3, 256].prototypes)


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
