"""Tokens by a recorded CUDA graph are those of ordinary passes, and what it cannot serve runs as usual."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from test_cache import T, built, write  # noqa: E402 -- after the skip
from test_patch import VOCABULARY, proteus  # noqa: E402

from proteus_playground.hf.cache import ProteusCache  # noqa: E402
from proteus_playground.hf.decode_graph import DecodeGraph  # noqa: E402
from proteus_playground.hf.patch import full_attention_layers, handed  # noqa: E402

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture
def llama():
    return built("llama").to("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def ids(llama):
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(1)).to(llama.device)


def cache_of(model, alpha=1.0, graph=True, **settings):
    layer = proteus(alpha, **settings)
    gates = layer.gates.to(model.device)
    return ProteusCache(model, dict.fromkeys(full_attention_layers(model), gates), layer.config, cuda_graph=graph)


def recorded(cache) -> bool:
    return cache._graph._graph is not None


def one(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, **handed(model, cache)).logits


def test_it_is_refused_where_it_cannot_be(llama):
    with pytest.raises(ValueError, match="cuda_graph=True"):
        cache_of(llama, alpha=0.0)
    if llama.device.type == "cpu":
        with pytest.raises(ValueError, match="for a model on cpu"):
            cache_of(llama)
    else:
        with pytest.raises(ValueError, match="a cache that grows"):
            ProteusCache(llama, {0: proteus(1.0).gates.cuda()}, proteus(1.0).config, cuda_graph=True)


def test_only_a_plain_pass_of_one_token_is_served(llama):
    graph, one_token = DecodeGraph(llama.model, {}), torch.zeros(2, 1, dtype=torch.int64)
    plain, mask = {"input_ids": one_token, "use_cache": True}, torch.ones(2, 9, dtype=torch.int64)
    with torch.no_grad():
        assert graph.serves((), plain) and graph.serves((), plain | {"attention_mask": mask})
        assert graph.serves((), plain | {"position_ids": one_token, "output_attentions": False})
        assert not graph.serves((one_token,), {"use_cache": True})
        assert not graph.serves((), plain | {"input_ids": one_token.expand(2, 3)})
        assert not graph.serves((), plain | {"output_hidden_states": True})
        assert not graph.serves((), plain | {"attention_mask": mask[None, None]})
        assert not graph.serves((), plain | {"attention_mask": mask * 0})
        assert not graph.serves((), plain | {"position_ids": one_token.expand(3, 2, 1)})
        hook = llama.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert not graph.serves((), plain)
        hook.remove()
    assert not graph.serves((), plain)  # a gradient is asked for


@gpu
@pytest.mark.parametrize("settings", [{}, {"keep_ratio": 0.6}, {"route_heads": True, "head_top_p": 0.7}], ids=str)
def test_texts_are_those_of_ordinary_passes(llama, ids, settings):
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    with cache_of(llama, graph=False, **settings) as cache:
        want = write(llama, ids, cache, 90, attention_mask=mask)
        length = cache.get_seq_length()
    with cache_of(llama, **settings) as cache:
        got = write(llama, ids, cache, 90, attention_mask=mask)
        assert recorded(cache) and not cache._graph.refused and cache.get_seq_length() == length
    assert torch.equal(got.sequences, want.sequences)
    assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=0)


@gpu
def test_forks_other_sizes_and_hooks_go_on(llama, ids):
    with cache_of(llama) as cache, cache_of(llama, graph=False) as plain:
        for each in (cache, plain):
            one(llama, each, ids)
        for t in range(20):
            token = ids[:, t : t + 1]
            assert_close(one(llama, cache, token), one(llama, plain, token), atol=1e-4, rtol=0)
        assert recorded(cache)
        twin, other = cache.fork(), plain.fork()
        for t in range(8):
            token = ids[:, t : t + 1]
            assert_close(one(llama, twin, token), one(llama, other, token), atol=1e-4, rtol=0)
            assert_close(one(llama, cache, token.flip(0)), one(llama, plain, token.flip(0)), atol=1e-4, rtol=0)
        heard = []
        hook = llama.model.layers[0].mlp.register_forward_hook(lambda *_: heard.append(1))
        assert_close(one(llama, cache, ids[:, :1]), one(llama, plain, ids[:, :1]), atol=1e-4, rtol=0)
        hook.remove()
        assert heard
        assert_close(one(llama, cache, ids[:, 3:9]), one(llama, plain, ids[:, 3:9]), atol=1e-4, rtol=0)
        for t in range(6):
            token = ids[:, t : t + 1]
            assert_close(one(llama, cache, token), one(llama, plain, token), atol=1e-4, rtol=0)
        llama.double().float()  # the weights lie elsewhere now
        assert_close(one(llama, cache, ids[:, :1]), one(llama, plain, ids[:, :1]), atol=1e-4, rtol=0)


@gpu
def test_a_full_bank_is_noticed_and_a_pass_that_waits_is_not_recorded(llama, ids):
    layer = proteus(1.0)
    gates = dict.fromkeys(full_attention_layers(llama), layer.gates.cuda())
    with ProteusCache(llama, gates, layer.config, tokens=T + 6, cuda_graph=True) as cache:
        one(llama, cache, ids)
        for t in range(6):
            one(llama, cache, ids[:, t : t + 1])
        assert recorded(cache)
        with pytest.raises(ValueError, match=f"at most {T + 6}"):
            one(llama, cache, ids[:, :1])
    mlp = llama.model.layers[1].mlp
    waits, original = (lambda x: original(x * float(x.abs().amax() >= 0))), mlp.forward
    mlp.forward = waits
    with cache_of(llama) as cache, cache_of(llama, graph=False) as plain:
        for each in (cache, plain):
            one(llama, each, ids)
        with pytest.warns(UserWarning, match="passes run without a graph"):
            for t in range(5):
                token = ids[:, t : t + 1]
                assert_close(one(llama, cache, token), one(llama, plain, token), atol=1e-4, rtol=0)
        assert cache._graph.refused and cache.get_seq_length() == T + 5
