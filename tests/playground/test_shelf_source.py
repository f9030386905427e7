"""A `ProteusLM` under the probe does what the model itself does, at any settings, and stays as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_shelf import build

from proteus_playground.attention.settings import Settings, config_for
from proteus_playground.common.texts import Text
from proteus_playground.lm.shelf import shelf
from proteus_playground.playground.probe import LayerProbe, Stopped
from proteus_playground.playground.shelf_source import ShelfSource

OWN = Settings(shortlist=48, gates=8, probes=2, nearest_gates=False)  # what the tiny model was made with
ROUTED = replace(OWN, route_heads=True, head_top_p=0.6)
TEXT, OTHER = (Text(f"shelf {seed}", shelf(seed, 24).text, "made up") for seed in (1, 2))


@pytest.fixture(scope="module", params=[False, True], ids=["all heads", "router"])
def probe(request, tmp_path_factory):
    model, tokenizer = build(tmp_path_factory.mktemp("model"), route_heads=request.param, head_top_p=0.6, prior_max=0.3)
    return LayerProbe(ShelfSource(model, tokenizer, "tiny"), TEXT, max_tokens=512, calibration=OTHER)


def own_settings(probe) -> Settings:
    return ROUTED if probe._source.routers else OWN


def own_logits(probe, alpha: float) -> torch.Tensor:
    """What the model itself says at flux alpha `alpha`, `(T, V)`."""
    model = probe._source._model
    model.set_flux_alpha(alpha)
    with torch.no_grad():
        logits = model(probe._ids[None])[0]
    model.set_flux_alpha(None)
    return logits


def runners(probe, settings: Settings) -> dict:
    config = config_for(settings, probe._source.shape)
    return {layer: probe._runner(layer, config, None) for layer in probe.layers}


def test_alpha_zero_is_the_dense_model(probe):
    settings = replace(own_settings(probe), flux_alpha=0.0)
    for layer in probe.layers:
        assert probe.view(layer, settings).error < 1e-5
    whole = probe.run_model(settings)
    first = len(probe.tokens) // 2
    wanted = F.cross_entropy(own_logits(probe, 0.0)[first - 1 : -1], probe._ids[first:]).item()
    assert whole.nll == pytest.approx(wanted, abs=1e-5) and whole.dense_nll == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_its_own_settings_are_the_model_itself(probe, alpha):
    first = len(probe.tokens) // 2
    wanted = F.cross_entropy(own_logits(probe, alpha)[first - 1 : -1], probe._ids[first:]).item()
    found = probe.run_model(replace(own_settings(probe), flux_alpha=alpha)).nll
    assert found == pytest.approx(wanted, abs=1e-5)
    assert abs(found - probe.run_model(replace(OWN, flux_alpha=0.0)).nll) > 1e-4


def test_a_view_is_what_the_layer_says_of_itself(probe):
    """The first layer reads the same in the dense model and in the sparse one."""
    model, settings = probe._source._model, own_settings(probe)
    model.set_flux_alpha(1.0)
    with torch.no_grad():
        x = model.blocks[0].attn_norm(model.embed(probe._ids[None]))
        _, stats = model.blocks[0].attn(x, return_stats=True)
    model.set_flux_alpha(None)
    view = probe.view(0, settings)
    same = torch.from_numpy(view.awake) == stats.awake[0]
    assert same.float().mean() > 0.995  # float16 kept in between may turn a tie
    assert (torch.from_numpy(view.reads) == stats.reads[0])[same].float().mean() > 0.98
    if settings.route_heads:
        assert view.head_map_kind == "routing weight" and not view.awake.all()


def test_without_a_router_heads_are_routed_alike_in_a_layer_and_in_the_model(probe):
    """Gates that were not trained have no router: the prior speaks in both places."""
    settings = replace(ROUTED, gates=6)
    layer = runners(probe, settings)[0]
    assert layer.router is None
    model = probe._source._model
    attn, x = model.blocks[0].attn, model.blocks[0].attn_norm(model.embed(probe._ids[None]))
    q, k, v = (proj(x).unflatten(-1, (-1, attn.cfg.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    with torch.no_grad():
        out = layer.run(q, k, v, inv_freq=attn.inv_freq, scale=attn.cfg.head_dim**-0.5).out.flatten(2)
        twin = probe._source._twin({0: layer}).blocks[0].attn
        assert torch.allclose(attn.o_proj(out), twin(x), atol=1e-5)


def test_the_router_is_used_with_the_gates_it_was_trained_with(probe):
    own, other = runners(probe, own_settings(probe)), runners(probe, replace(own_settings(probe), gates=6))
    for layer, block in enumerate(probe._source._model.blocks):
        assert own[layer].gates is block.attn.gates and own[layer].router is block.attn.router
        assert other[layer].gates.gates_per_group == 6 and other[layer].router is None
    assert "with 8 gates its prototypes come from its training, with any other number" in probe.note
    assert "fitted on another text, “shelf 2”" in probe.note
    assert probe.view(1, replace(OWN, gates=6)).gate_of_key.max() < 6


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_an_answer_is_the_likeliest_token_again_and_again(probe, alpha):
    """Against the parallel pass over all that was said so far, at a length that budgets know from the start."""
    settings, prompt = replace(own_settings(probe), flux_alpha=alpha), probe._ids[:150]
    said = probe._source.answer(prompt, runners(probe, settings), [], 4)
    ids = prompt
    for token in said:
        twin = probe._source._twin(runners(probe, settings))
        with torch.no_grad():
            x = twin.embed(ids[None])
            for block in twin.blocks:
                x, _ = block.prefill(x, len(prompt) + 4)
        logits = twin.norm(x)[0, -1] @ twin.embed.weight.T
        assert logits[token] > logits.max() - 1e-4
        ids = torch.cat([ids, torch.tensor([token])])
    assert probe._source.answer(prompt, {}, said[:1], 4) == [] or alpha
    assert len(said) == 4


def test_the_model_is_left_as_it_was(probe):
    model = probe._source._model
    before = {name: x.clone() for name, x in model.state_dict().items()}
    parts, cfg = [id(block.attn) for block in model.blocks], [block.attn.cfg for block in model.blocks]
    probe.run_model(replace(OWN, gates=6))
    probe._source.answer(probe._ids[:50], runners(probe, OWN), [], 2)
    assert [id(block.attn) for block in model.blocks] == parts and [block.attn.cfg for block in model.blocks] == cfg
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(block.attn._forward_hooks for block in model.blocks)


def test_it_stops_when_asked_and_refuses_a_model_in_training(probe):
    with pytest.raises(Stopped):
        probe._source.answer(probe._ids[:50], {}, [], 4, lambda: True)
    with pytest.raises(Stopped):
        probe.run_model(OWN, stop=lambda: True)
    source = probe._source
    source._model.train()
    with pytest.raises(ValueError, match="training=True"):
        ShelfSource(source._model, source._tokenizer, "tiny")
    source._model.eval()
