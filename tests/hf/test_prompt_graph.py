"""Prompts whose layers replay a recorded one are read as by ordinary passes, and what it cannot serve runs as usual."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from graph_caches import GPU, cache_of, gpu, one  # noqa: E402 -- after the skip
from test_cache import write  # noqa: E402

from proteus_playground.attention.bank.bank import KVBank  # noqa: E402
from proteus_playground.hf import bank_layer, prompt_graph  # noqa: E402
from proteus_playground.hf.prompt_graph import PromptGraph  # noqa: E402

TENSORS = KVBank.TENSORS.values()


class Again:
    """Stands in for a CUDA graph where there is no GPU: a replay runs the recorded function once more."""

    def __init__(self, run):
        self.run, self.made, self.replays = run, run(), 0

    def replay(self):
        self.replays += 1
        out, bank, _ = self.run()
        self.made[0].copy_(out)
        for name in TENSORS:
            getattr(self.made[1], name).copy_(getattr(bank, name))


@pytest.fixture
def recordings(monkeypatch):
    """Those that the stand-in has made."""
    made = []

    def record(run, decoder, device):
        made.append(Again(run))
        return made[-1], made[-1].made

    monkeypatch.setattr(prompt_graph, "capture", record)
    return made


def with_prompt_graph(model, **settings):
    """A cache whose layers share a `PromptGraph`, and none for tokens."""
    cache = cache_of(model, graph=False, **settings)
    cache._prompt = PromptGraph(model.model)
    for layer in cache._bank_layers().values():
        layer.prompt = cache._prompt
    return cache


def assert_same_banks(cache, plain, atol):
    for mine, its in zip(cache.banks.values(), plain.banks.values(), strict=True):
        assert mine.tokens == its.tokens
        for name in TENSORS:
            assert_close(getattr(mine, name), getattr(its, name), atol=atol, rtol=0)


@pytest.mark.skipif(GPU, reason="a GPU has graphs of its own")
def test_layers_after_the_second_replay_it(recordings, model, texts):
    with with_prompt_graph(model) as cache, cache_of(model, graph=False) as plain:
        for text in (texts, texts.flip(0), texts[:, :20], texts[:1]):
            assert_close(one(model, cache, text), one(model, plain, text), atol=1e-5, rtol=0)
            assert_same_banks(cache, plain, 1e-5)
            assert_close(one(model, cache, text[:, :1]), one(model, plain, text[:, :1]), atol=1e-5, rtol=0)
            cache.reset(), plain.reset()
    layers = len(cache._bank_layers())
    assert [its.replays for its in recordings] == [layers - 1] * 4, "one for each prompt"


@pytest.mark.skipif(GPU, reason="a GPU has graphs of its own")
def test_what_cannot_be_recorded_runs_as_usual(monkeypatch, recordings, model, texts):
    mask = torch.ones_like(texts)
    mask[1, :17] = 0
    for settings, more in [({"keep_ratio": 0.6}, {}), ({"route_heads": True}, {}), ({}, {"attention_mask": mask})]:
        with with_prompt_graph(model, **settings) as cache, cache_of(model, graph=False, **settings) as plain:
            got, want = (write(model, texts, each, 5, **more) for each in (cache, plain))
            assert torch.equal(got.sequences, want.sequences)
    assert not recordings

    def fail(run, decoder, device):
        raise RuntimeError("the stream is capturing")

    monkeypatch.setattr(prompt_graph, "capture", fail)
    with with_prompt_graph(model) as cache, cache_of(model, graph=False) as plain:
        with pytest.warns(UserWarning, match="because the stream is capturing"):
            got = one(model, cache, texts)
        assert_close(got, one(model, plain, texts), atol=1e-5, rtol=0)
        assert_same_banks(cache, plain, 1e-5)


@pytest.mark.skipif(GPU, reason="a GPU has graphs of its own")
def test_layers_of_another_form_have_a_recording_of_their_own_and_none_outlives_its_pass(recordings, model, texts):
    with with_prompt_graph(model) as cache, cache_of(model, graph=False) as plain:
        for each in (cache, plain):
            each._bank_layers()[1].reach = 200
        assert_close(one(model, cache, texts), one(model, plain, texts), atol=1e-5, rtol=0)
        assert [its.replays for its in recordings] == [1] and not cache._prompt._recorded
        cache.reset()
        hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one(model, cache, texts)
        hook.remove()
        assert len(recordings) == 2 and not cache._prompt._recorded
        cache.reset(), plain.reset()
        assert_close(one(model, cache, texts[:, :1]), one(model, plain, texts[:, :1]), atol=1e-5, rtol=0)
        assert len(recordings) == 2, "a prompt of one token is not recorded"


@pytest.mark.skipif(GPU, reason="a GPU has sums of its own")
def test_a_prompt_that_is_not_finite_is_read_again(monkeypatch, model, texts):
    usual, waited = bank_layer.read_prompt, []

    def not_finite(bank, layer, call, is_finite):
        waited.append(not is_finite)
        out, _ = usual(bank, layer, call, is_finite)
        return (out * torch.nan, torch.tensor(torch.nan)) if is_finite else (out, None)

    with cache_of(model, graph=False) as cache, cache_of(model, graph=False) as plain:
        want = one(model, plain, texts)
        monkeypatch.setattr(bank_layer, "read_prompt", not_finite)
        assert_close(one(model, cache, texts), want, atol=0, rtol=0)
        layers = len(cache.banks)
        assert waited == [False] * layers + [True] * layers
        assert_same_banks(cache, plain, 0)
        assert all(layer.defers and layer.total is None for layer in cache._bank_layers().values())
        assert_close(one(model, cache, texts[:, :1]), one(model, plain, texts[:, :1]), atol=0, rtol=0)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_on_a_gpu_are_those_of_ordinary_passes(monkeypatch, model, texts, dtype):
    atol, long, made, recorded = 2e-5 if dtype == torch.float32 else 0.05, texts.repeat(1, 30), 0, []
    usual = prompt_graph.capture
    monkeypatch.setattr(prompt_graph, "capture", lambda *given: recorded.append(1) or usual(*given))
    model.to(dtype)
    with cache_of(model) as cache, cache_of(model, graph=False) as plain:
        for text in (texts, texts.flip(0), long, long[:1]):
            assert_close(one(model, cache, text), one(model, plain, text), atol=atol, rtol=0)
            assert len(recorded) == (made := made + 1) and not cache._prompt._refused
            assert_same_banks(cache, plain, atol * 30)
            for t in range(5):
                assert_close(one(model, cache, texts[: len(text), t : t + 1]),
                             one(model, plain, texts[: len(text), t : t + 1]), atol=atol, rtol=0)  # fmt: skip
            cache.reset(), plain.reset()
        got, want = (write(model, texts, each, 20) for each in (cache, plain))
        assert torch.equal(got.sequences, want.sequences) or dtype != torch.float32
        assert len(recorded) == made + 1, "a mask of nothing but ones is no padding"


@gpu
def test_keys_that_are_not_finite_on_a_gpu(model, texts):
    model.model.embed_tokens.weight[7] = torch.nan
    bad = texts.clone()
    bad[1, 30] = 7
    with cache_of(model) as cache, cache_of(model, graph=False) as plain:
        assert all(layer.defers for layer in plain._bank_layers().values())
        for layer in plain._bank_layers().values():
            layer.defers = False
        got, want = one(model, cache, bad), one(model, plain, bad)
        assert torch.equal(got.isnan(), want.isnan()) and want.isnan().any() and not want.isnan().all()
        assert_close(got, want, atol=1e-4, rtol=0, equal_nan=True)
        assert_close(one(model, cache, texts[:, :1]), one(model, plain, texts[:, :1]), atol=1e-4, rtol=0)
