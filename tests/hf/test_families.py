"""Families of transformers' models are served exactly or refused in words; keys before RoPE are the model's own."""

import copy
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from torch.testing import assert_close

pytest.importorskip("transformers")
from tiny_decoders import SIZES, VOCABULARY, logits  # noqa: E402 -- after the skip
from tiny_llama import family  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

from proteus_playground.attention import AttentionConfig, Gates, rotate  # noqa: E402
from proteus_playground.attention.adapter import ProteusLayer  # noqa: E402
from proteus_playground.hf.cache import ProteusCache  # noqa: E402
from proteus_playground.hf.families import survey  # noqa: E402
from proteus_playground.hf.patch import find_decoder, full_attention_layers, handed, layer_shape, patched  # noqa: E402

T, NEW = 40, 12
FULL = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 16}
MLA = dict(num_key_value_heads=6, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
           head_dim=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
           moe_intermediate_size=16)  # fmt: skip
SERVED = {  # what each adds to the sizes
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, **FULL}, "phi": {}, "phi3": {"pad_token_id": 0}, "gpt_neox": {}, "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48}, "glm": {"head_dim": 8, "pad_token_id": 0}, "cohere": {},
    "stablelm": {}, "smollm3": {"pad_token_id": 0, "no_rope_layer_interval": 2}, "olmo2": {}, "granite": {},
    "helium": {"head_dim": 8}, "gptj": {"rotary_dim": 4}, "nanochat": {}, "deepseek_v3": MLA,
}  # fmt: skip
REFUSED = {
    "gemma2": ({"head_dim": 8}, "caps its scores"),
    "gpt_oss": ({"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, "attention sinks"),
    "hunyuan_v1_dense": ({"head_dim": 8, "pad_token_id": 0}, "something follows the rotation"),
    "diffllama": ({"head_dim": 8}, "calls its attention 2 times"),
}


def layers_of(model, alpha):
    shape = layer_shape(model, full_attention_layers(model)[0])
    torch.manual_seed(3)
    gates = Gates(shape.n_groups, 6, shape.head_dim, heads_per_group=shape.n_heads // shape.n_groups)
    gates.fit(torch.randn(200, shape.n_groups, shape.head_dim))
    config = AttentionConfig(
        d_model=shape.n_heads * shape.head_dim, n_heads=shape.n_heads, n_kv_heads=shape.n_groups,
        head_dim=shape.head_dim, flux_alpha=alpha, shortlist=24, gates_per_group=6, route_heads=False,
    )  # fmt: skip
    return dict.fromkeys(full_attention_layers(model), ProteusLayer(gates, config))


def cache_of(model, layers):
    return ProteusCache(model, {i: layer.gates for i, layer in layers.items()}, next(iter(layers.values())).config)


def write(model, ids, mask, cache=None, **more):
    cached = {} if cache is None else handed(model, cache)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True,
                          output_logits=True, **cached, **more)  # fmt: skip


@pytest.fixture(scope="module")
def ids():
    return 1 + torch.randint(VOCABULARY - 1, (2, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mask(ids):
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    return mask


@pytest.mark.parametrize("kind", SERVED)
def test_a_family_is_served_exactly(kind, ids, mask):
    if kind == "gptj" and Version(version("transformers")) < Version("5.18"):
        pytest.skip("its attention has code of its own before transformers 5.18, and is refused")
    model = family(kind, **SIZES | SERVED[kind])
    dense, real = layers_of(model, 0.0), mask.bool()
    assert len(dense) == (2 if kind == "gemma3_text" else 3)
    native = logits(model, ids, attention_mask=mask)[real]
    with patched(model, dense):
        ours = logits(model, ids, attention_mask=mask)[real]
    assert_close(ours, native, atol=2e-4 * native.abs().max(), rtol=0)
    with cache_of(model, dense) as cache:
        assert torch.equal(write(model, ids, mask, cache).sequences, write(model, ids, mask).sequences)
    sparse = layers_of(model, 1.0)
    with cache_of(model, sparse) as cache:
        out = write(model, ids, torch.ones_like(ids), cache)
    with patched(model, sparse):
        full = logits(model, out.sequences)[:, T - 1 : -1]
    assert_close(torch.stack(out.logits, 1), full, atol=2e-4 * full.abs().max(), rtol=0)


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.bad_input
def test_a_family_is_refused_in_words(kind, ids):
    extra, reason = REFUSED[kind]
    model = family(kind, **SIZES | extra)
    native = logits(model, ids)
    with pytest.raises(ValueError, match=f"model={type(model).__name__}.*{reason}"):
        full_attention_layers(model)
    with pytest.raises(ValueError, match=f"key 1.*{type(model).__name__}.*{reason}"), patched(model, {1: id}):
        pass
    assert_close(logits(model, ids), native)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "helium", "cohere", "phi", "smollm3"])
def test_keys_are_those_before_the_rotation(kind, ids):
    """F4: 64 copies of a token have one key, and it is what the projection gave, in the order that the call names."""
    model, seen, given = family(kind, **SIZES | SERVED[kind]), {}, {}
    attention = find_decoder(model).layers[1].self_attn
    source = getattr(attention, "k_norm", attention.k_proj)
    hook = source.register_forward_hook(lambda module, args, output: given.update(k=output))
    with patched(model, {1: lambda call: seen.update(call=call)}):
        logits(model, ids[:1, :1].expand(1, 64))
    hook.remove()
    call = seen["call"]
    own = given["k"].reshape(1, 64, 2, 8)
    own = own if call.order is None else own[..., list(call.order)]
    assert_close(call.k, own, atol=1e-5, rtol=0)
    assert (call.k - call.k[:, :1]).abs().max() < 1e-5
    gate, _ = Gates(2, 6, 8, heads_per_group=3).fit(torch.randn(200, 2, 8)).lure(call.k)
    assert (gate == gate[:, :1]).all()


def test_norms_after_the_rotation_are_served_where_they_commute(ids):
    """nanochat's has no weights; Hunyuan's with equal weights; else it is refused."""
    extra = REFUSED["hunyuan_v1_dense"][0]
    model = family("hunyuan_v1_dense", **SIZES | extra)
    for name, weight in model.named_parameters():
        if "layernorm" in name and "self_attn" in name:
            weight.fill_(1.3)
    assert full_attention_layers(copy.deepcopy(model)) == (0, 1, 2)


def test_features_that_are_not_turned_have_frequency_zero(ids):
    model, seen = family("glm", **SIZES | SERVED["glm"]), {}
    with patched(model, {0: lambda call: seen.update(call=call)}):
        logits(model, ids)
    call = seen["call"]
    assert call.inv_freq.tolist()[2:] == [0, 0] and call.order == (0, 2, 4, 5, 1, 3, 6, 7)
    turned = rotate(call.k, call.positions, call.inv_freq)
    assert torch.equal(turned[..., [2, 3, 6, 7]], call.k[..., [2, 3, 6, 7]])


def test_a_survey_leaves_no_trace(ids):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train()
    state = torch.random.get_rng_state()
    survey(find_decoder(model))
    assert torch.equal(state, torch.random.get_rng_state()) and all(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert not [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_a_model_whose_weights_are_not_loaded_is_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with pytest.raises(TypeError, match="meta device"):
        full_attention_layers(model)


def test_a_pass_without_gradients_leaves_nothing_that_a_later_one_cannot_use(ids):
    model = family("cohere", **SIZES).requires_grad_(True)
    layers = layers_of(model, 1.0)
    with torch.inference_mode(), patched(model, layers):
        logits(model, ids)
    with patched(model, layers):
        logits(model, ids).square().mean().backward()
    assert find_decoder(model).layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_of_any_size_are_no_reason_to_refuse(ids, dtype):
    """Large biases of keys make scores that bfloat16 rounds by more than one."""
    model = family("qwen2", **SIZES).to(dtype)
    for block in find_decoder(model).layers:
        block.self_attn.k_proj.bias.fill_(30)
        block.self_attn.q_proj.bias.fill_(30)
    assert full_attention_layers(model) == (0, 1, 2)
