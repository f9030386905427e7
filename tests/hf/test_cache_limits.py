"""What a ProteusCache cannot do is refused in words; compiled and hybrid models are served."""

from contextlib import nullcontext
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch.testing import assert_close

pytest.importorskip("transformers")
from test_cache import T, built, cache_of, write  # noqa: E402 -- after the skip
from tiny_decoders import SIZES, VOCABULARY, compiled, logits, make  # noqa: E402
from tiny_llama import family  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from proteus_playground.hf.patch import full_attention_layers, handed, patched  # noqa: E402


@pytest.fixture(scope="module")
def llama():
    return built("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(1))


def test_training_through_a_cache_is_refused(ids):
    # transformers 5.15 to 5.17 hand no cache to checkpointed layers, with or without gradients
    old = Version(version("transformers")) < Version("5.18")
    expectation = pytest.raises(ValueError, match="call model.eval()") if old else nullcontext()
    model = make(LlamaForCausalLM, LlamaConfig).requires_grad_(True)
    cache, _ = cache_of(model)
    with pytest.raises(RuntimeError, match="ProteusCache gives no gradient"):
        model(ids, **handed(model, cache)).logits.mean().backward()
    model.train().gradient_checkpointing_enable()
    fresh, _ = cache_of(model)
    with pytest.raises(ValueError, match="training mode.*no_grad"):
        model(ids, **handed(model, fresh))
    with torch.no_grad(), expectation:
        model(ids, **handed(model, fresh))
        assert fresh.get_seq_length() == T


@pytest.mark.parametrize("how", ["forward", "decoder", "layers"])
def test_a_compiled_model_writes_as_in_eager_mode(ids, how):
    model = built("llama")
    with cache_of(model)[0] as cache:
        expected = write(model, ids, cache, 9).sequences
    compiled(model, how)
    with cache_of(model)[0] as cache:
        assert torch.equal(write(model, ids, cache, 9).sequences, expected)
        assert all(bank.tokens == T + 8 for bank in cache.banks.values())


def test_frequencies_that_change_with_the_length_are_refused(ids):
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"max_position_embeddings": 32}, rope_parameters=rope)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    cache, _ = cache_of(model, alpha=0.0)
    model(ids[:, :30], **handed(model, cache))
    spare = cache.fork()
    with pytest.raises(ValueError, match="frequencies have changed with the length"):
        for at in range(30, T):
            model(ids[:, at : at + 1], **handed(model, cache))
    assert spare.get_seq_length() == 30


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
@pytest.mark.bad_input
def test_a_mask_must_go_on_as_it_began(llama, ids, layers):
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    token, more = ids[:, :1], torch.ones(2, 1, dtype=torch.long)
    cache, _ = cache_of(llama, layers)
    with torch.no_grad():
        llama(ids, attention_mask=mask, **handed(llama, cache))
        spare = cache.fork()
        llama(token, attention_mask=torch.cat((mask, more), 1), **handed(llama, cache))
        other = mask.roll(1, 1)  # as many tokens, others of them
        for wrong in (None, torch.ones(2, T + 1, dtype=torch.long), torch.cat((other, more), 1), more):
            with pytest.raises(ValueError, match="attention_mask shows other earlier tokens"):
                llama(token, attention_mask=wrong, **handed(llama, spare))
        llama(token, attention_mask=torch.cat((mask, more), 1), **handed(llama, spare))
    assert spare.get_seq_length() == cache.get_seq_length() == T + 1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_hybrid_keeps_its_recurrent_state(ids, alpha, tmp_path):
    model = family(
        "qwen3_next", **SIZES | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    assert full_attention_layers(model) == (1,)
    cache, layers = cache_of(model, alpha=alpha)
    out = write(model, ids, cache, 30)
    with patched(model, layers):
        full = logits(model, out.sequences)
    assert_close(torch.stack(out.logits, 1), full[:, T - 1 : -1], atol=1e-3, rtol=0)
    assert cache.nbytes > sum(bank.nbytes for bank in cache.banks.values())
    with pytest.raises(ValueError, match="only keys and values can be saved"):
        cache.save(tmp_path / "it.safetensors")
