"""Gates that come with the package: which models get them, and that they fit the model."""

import pytest
import torch
from tiny_llama import build

from proteus_playground.hf import shipped_gates as shipped
from proteus_playground.hf.patch import find_decoder
from proteus_playground.hf.source import ModelSource


@pytest.fixture
def net():
    pytest.importorskip("transformers")
    model, tokenizer = build()
    with torch.no_grad():
        find_decoder(model).norm.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    return model, tokenizer


@pytest.fixture
def stored(net, tmp_path, monkeypatch):
    """Gates of the tiny model, in place of those that the package holds."""
    source = ModelSource(*net, "tiny")
    fitted = {
        layer: shipped.new_gates(source.shape, 8).fit(torch.randn(64, source.shape.n_groups, source.shape.head_dim))
        for layer in source.full_layers
    }
    path = shipped.write_gates(tmp_path / "g.safetensors", find_decoder(net[0]), fitted, {"texts": {"a": "b"}})
    held = [shipped.read_tensors(path, "a test")]
    monkeypatch.setattr(shipped, "_stored", lambda: held)
    return fitted


def test_a_known_model_gets_its_gates_in_full_precision_and_they_are_what_was_written(net, stored):
    source = ModelSource(*net, "any name")
    assert set(source.own_gates) == {(layer, 8) for layer in source.full_layers}
    for layer, before in stored.items():
        gates = source.own_gates[layer, 8]
        assert gates.prototypes.dtype == torch.float32 and not gates.training
        assert torch.allclose(gates.prototypes.norm(dim=-1), torch.ones(()), atol=1e-6)
        assert torch.allclose(gates.prototypes, before.prototypes, atol=2e-3)
        assert torch.allclose(gates.salience_quantiles, before.salience_quantiles, atol=2e-3)


def test_a_model_that_was_trained_further_or_has_another_shape_gets_none(net, stored):
    model, tokenizer = net
    with torch.no_grad():
        find_decoder(model).norm.weight.mul_(1.1)
    assert ModelSource(model, tokenizer, "tiny").own_gates == {}
    with torch.no_grad():
        find_decoder(model).norm.weight.div_(1.1)
    assert ModelSource(model, tokenizer, "tiny").own_gates != {}
    find_decoder(model).norm = torch.nn.Identity()
    assert ModelSource(model, tokenizer, "tiny").own_gates == {}


def test_the_package_knows_smollm2_and_its_prototypes_lie_among_the_keys(smollm2):
    from proteus_playground.hf.models import load

    source = ModelSource(*load("smollm2"), "smollm2")
    assert set(source.own_gates) == {(layer, 256) for layer in source.full_layers}
    ids = source.ids(
        source.encode("A river runs through the old town, and the mill beside it has not worked for years.")
    )
    for layer, seen in source.capture(ids, keys_only=True).items():
        keys = torch.nn.functional.normalize(seen.k.float(), dim=-1)
        cosine = source.own_gates[layer, 256].lure(keys)[1]
        assert cosine[1:].mean() > 0.7, layer  # the first token's keys resemble no others
