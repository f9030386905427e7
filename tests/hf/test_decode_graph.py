"""Tokens by a recorded CUDA graph are those of ordinary passes, and what it cannot serve runs as usual."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from graph_caches import GPU, cache_of, gpu, one  # noqa: E402 -- after the skip
from test_cache import T, write  # noqa: E402
from tiny_decoders import proteus  # noqa: E402

from proteus_playground.hf import cache as hf_cache  # noqa: E402
from proteus_playground.hf import decode_graph  # noqa: E402
from proteus_playground.hf.cache import ProteusCache  # noqa: E402
from proteus_playground.hf.decode_graph import DecodeGraph  # noqa: E402
from proteus_playground.hf.patch import full_attention_layers, patched  # noqa: E402


def recorded(cache) -> bool:
    return cache._graph._graph is not None


def test_it_is_refused_where_it_cannot_be(model):
    with pytest.raises(ValueError, match="cuda_graph=True"):
        cache_of(model, alpha=0.0)
    if model.device.type == "cpu":
        with pytest.raises(ValueError, match="for a model on cpu"):
            cache_of(model)
    else:
        with pytest.raises(ValueError, match="where a layer has no bank"):
            ProteusCache(model, {0: proteus(1.0).gates.cuda()}, proteus(1.0).config, cuda_graph=True)


def test_only_a_plain_pass_of_one_token_is_served(model, texts):
    cache, token = cache_of(model, graph=False), texts[:, :1]
    one(model, cache, texts)
    graph = DecodeGraph(model.model, cache._bank_layers())
    plain, mask, at = {"input_ids": token, "use_cache": True}, torch.ones(2, T + 1, dtype=torch.int64), token * 0 + T

    def serves(*args, **kwargs):
        return graph.state_of(args, plain | kwargs) is not None

    with torch.no_grad():
        assert serves() and serves(position_ids=at) and serves(position_ids=at, attention_mask=mask)
        assert serves(output_attentions=False, output_hidden_states=None)
        assert not serves(attention_mask=mask), "some models count the mask to find positions"
        assert not serves(position_ids=at, attention_mask=mask[:, 1:]) and not serves(attention_mask=mask[None, None])
        assert not serves(position_ids=at, attention_mask=torch.cat((mask[:, :-1], mask[:, :1] * 0), 1))
        assert not serves(position_ids=at.expand(2, 3)) and not serves(position_ids=at.expand(3, 2, 1))
        assert not serves(token) and not serves(input_ids=texts) and not serves(use_cache=False)
        assert (
            not serves(output_hidden_states=True) and not serves(token_type_ids=token) and not serves(return_dict=False)
        )
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        assert not serves()
        hook.remove()
    assert not serves(), "a gradient is asked for"
    cache.close()


class Replayed:
    """Stands in for a CUDA graph where there is no GPU: the first replay has run already, later ones run again."""

    def __init__(self, cache, run):
        self.cache, self.run, self.output, self.runs = cache, run, run(), 0

    def replay(self):
        self.runs += 1
        if self.runs > 1:
            layers = self.cache._bank_layers()
            for layer in layers.values():
                layer.bank.tokens -= 1  # counted by `admit`, and again by the pass
            with patched(self.cache._model, {i: layer.attend for i, layer in layers.items()}):
                self.output.last_hidden_state.copy_(self.run().last_hidden_state)


@pytest.fixture
def replayed(monkeypatch):
    """Records by the stand-in; the list gets one for each recorded pass."""
    made = []

    def record(run, decoder, device):
        made.append(Replayed(made.cache, run))
        return made[-1], made[-1].output

    made = type("Made", (list,), {})()
    monkeypatch.setattr(decode_graph, "capture", record)
    monkeypatch.setattr(hf_cache, "_check_graph", lambda *_: None)
    return made


@pytest.mark.skipif(GPU, reason="a GPU has graphs of its own")
def test_what_is_recorded_is_replayed_until_something_changes(replayed, model, texts):
    mask = torch.ones_like(texts)
    mask[1, :17] = 0
    with cache_of(model, graph=False) as plain:
        want = write(model, texts, plain, 40, attention_mask=mask)
    with cache_of(model) as cache:
        replayed.cache = cache
        got = write(model, texts, cache, 40, attention_mask=mask)
        assert len(replayed) == 1 and replayed[0].runs == 39 - 2  # the prompt's pass gives the first token
    assert torch.equal(got.sequences, want.sequences)
    assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-5, rtol=0)
    with cache_of(model) as cache, cache_of(model, graph=False) as plain:
        replayed.cache = cache

        def step(t):
            assert_close(
                one(model, cache, texts[:, t : t + 1]), one(model, plain, texts[:, t : t + 1]), atol=1e-5, rtol=0
            )
            return cache._graph._warm, recorded(cache)

        for each in (cache, plain):
            one(model, each, texts)
        assert [step(t) for t in range(4)] == [(1, False), (2, False), (3, True), (3, True)]
        model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(model.model.layers[0].mlp.up_proj.weight.clone())
        assert [step(t) for t in range(4)] == [(1, False), (2, False), (3, True), (3, True)]
        cache._bank_layers()[0].bank = cache._bank_layers()[0].bank.fork()
        assert step(9) == (1, False)
        assert cache.get_seq_length() == plain.get_seq_length() == T + 9


@pytest.mark.skipif(GPU, reason="a GPU has graphs of its own")
def test_a_pass_that_cannot_be_recorded_runs_as_usual(monkeypatch, replayed, model, texts):
    def fail(run, decoder, device):
        run()
        raise RuntimeError("the stream is capturing")

    layer = proteus(1.0)
    gates = dict.fromkeys(full_attention_layers(model), layer.gates)
    with ProteusCache(model, gates, layer.config, tokens=T + 4, cuda_graph=True) as cache:
        replayed.cache = cache
        for part in (texts, *(texts[:, :1],) * 4):
            one(model, cache, part)
        with pytest.raises(ValueError, match=f"at most {T + 4}"):
            one(model, cache, texts[:, :1])
        assert not cache._cut_short and cache.get_seq_length() == T + 4
    monkeypatch.setattr(decode_graph, "capture", fail)
    with cache_of(model) as cache, pytest.warns(UserWarning, match="because the stream is capturing"):
        for part in (texts, *(texts[:, :1],) * 3):
            one(model, cache, part)
        assert cache._graph.refused and cache.get_seq_length() == T + 3 and not cache._cut_short


@gpu
@pytest.mark.parametrize("settings", [{}, {"keep_ratio": 0.6}, {"route_heads": True, "head_top_p": 0.7}], ids=str)
def test_texts_are_those_of_ordinary_passes(model, texts, settings):
    mask = torch.ones_like(texts)
    mask[1, :17] = 0
    with cache_of(model, graph=False, **settings) as cache:
        want = write(model, texts, cache, 90, attention_mask=mask)
        length = cache.get_seq_length()
    with cache_of(model, **settings) as cache:
        got = write(model, texts, cache, 90, attention_mask=mask)
        assert recorded(cache) and not cache._graph.refused and cache.get_seq_length() == length
    assert torch.equal(got.sequences, want.sequences)
    assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=0)


@gpu
def test_forks_other_sizes_and_hooks_go_on(model, texts):
    with cache_of(model) as cache, cache_of(model, graph=False) as plain:
        for each in (cache, plain):
            one(model, each, texts)
        for t in range(20):
            token = texts[:, t : t + 1]
            assert_close(one(model, cache, token), one(model, plain, token), atol=1e-4, rtol=0)
        assert recorded(cache)
        twin, other = cache.fork(), plain.fork()
        for t in range(8):
            token = texts[:, t : t + 1]
            assert_close(one(model, twin, token), one(model, other, token), atol=1e-4, rtol=0)
            assert_close(one(model, cache, token.flip(0)), one(model, plain, token.flip(0)), atol=1e-4, rtol=0)
        heard = []
        hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: heard.append(1))
        assert_close(one(model, cache, texts[:, :1]), one(model, plain, texts[:, :1]), atol=1e-4, rtol=0)
        hook.remove()
        assert heard
        assert_close(one(model, cache, texts[:, 3:9]), one(model, plain, texts[:, 3:9]), atol=1e-4, rtol=0)
        for t in range(6):
            token = texts[:, t : t + 1]
            assert_close(one(model, cache, token), one(model, plain, token), atol=1e-4, rtol=0)
        model.double().float()  # the weights lie elsewhere now
        assert_close(one(model, cache, texts[:, :1]), one(model, plain, texts[:, :1]), atol=1e-4, rtol=0)


@gpu
def test_a_full_bank_is_noticed_and_a_pass_that_waits_is_not_recorded(model, texts):
    layer = proteus(1.0)
    gates = dict.fromkeys(full_attention_layers(model), layer.gates.cuda())
    with ProteusCache(model, gates, layer.config, tokens=T + 6, cuda_graph=True) as cache:
        one(model, cache, texts)
        for t in range(6):
            one(model, cache, texts[:, t : t + 1])
        assert recorded(cache)
        with pytest.raises(ValueError, match=f"at most {T + 6}"):
            one(model, cache, texts[:, :1])
    mlp = model.model.layers[1].mlp
    waits, original = (lambda x: original(x * float(x.abs().amax() >= 0))), mlp.forward
    mlp.forward = waits
    with cache_of(model) as cache, cache_of(model, graph=False) as plain:
        for each in (cache, plain):
            one(model, each, texts)
        with pytest.warns(UserWarning, match="passes run without a graph"):
            for t in range(5):
                token = texts[:, t : t + 1]
                assert_close(one(model, cache, token), one(model, plain, token), atol=1e-4, rtol=0)
        assert cache._graph.refused and cache.get_seq_length() == T + 5
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        torch.rand(1, device="cuda"), torch.cuda.empty_cache()  # would raise where a capture had not ended
