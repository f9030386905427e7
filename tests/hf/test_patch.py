"""A transformers decoder runs with other attention in chosen layers, exactly, and is left as it was."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

pytest.importorskip("transformers")
from tiny_decoders import SIZES, YARN, T, compiled, logits, make, proteus, untouched  # noqa: E402
from transformers import (  # noqa: E402 -- after the skip
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from proteus_playground.attention import rotate  # noqa: E402
from proteus_playground.hf.patch import NAME, capture, full_attention_layers, handed, patched  # noqa: E402


@pytest.mark.parametrize(
    "kind, config, extra",
    [
        (LlamaForCausalLM, LlamaConfig, {}),
        (LlamaForCausalLM, LlamaConfig, {"rope_parameters": YARN}),
        (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
        (Qwen3ForCausalLM, Qwen3Config, {}),
        (
            Gemma3ForCausalLM,
            Gemma3TextConfig,
            {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
        ),
    ],
    ids=["llama", "yarn", "biased", "qwen3", "gemma3"],
)
def test_alpha_zero_is_the_native_model(kind, config, extra, ids):
    model = make(kind, config, **extra)
    native = logits(model, ids)
    with patched(model, dict.fromkeys(full_attention_layers(model), proteus(0.0))):
        ours = logits(model, ids)
    assert_close(ours, native, atol=1e-4, rtol=0)
    assert untouched(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_the_layer(llama, ids, side):
    mask = torch.ones_like(ids)
    real = slice(20, None) if side == "left" else slice(0, T - 20)
    mask[1] = 0
    mask[1, real] = 1
    native = logits(llama, ids, attention_mask=mask)
    with patched(llama, dict.fromkeys(range(3), proteus(0.0))):
        ours = logits(llama, ids, attention_mask=mask)
    assert_close(ours[mask.bool()], native[mask.bool()], atol=1e-4, rtol=0)


def test_positions_may_start_anywhere(llama, ids):
    at = torch.arange(T)[None] + 100
    native = logits(llama, ids, position_ids=at)
    with patched(llama, dict.fromkeys(range(3), proteus(0.0))):
        assert_close(logits(llama, ids, position_ids=at), native, atol=1e-4, rtol=0)


def test_only_the_chosen_layers_change(llama, ids):
    calls = []

    def spy(call):
        calls.append((call.layer, tuple(call.q.shape), tuple(call.k.shape)))
        return proteus(1.0)(call)

    native = logits(llama, ids)
    with patched(llama, {1: spy}):
        ours = logits(llama, ids)
    assert calls == [(1, (2, T, 6, 8), (2, T, 2, 8))]
    assert (ours - native).abs().max() > 1e-4
    with patched(llama, {}):
        assert_close(logits(llama, ids), native)


def test_everything_is_undone_after_an_exception(llama, ids):
    class Boom(Exception):
        pass

    def fail(call):
        raise Boom

    native = logits(llama, ids)
    with pytest.raises(Boom), patched(llama, {0: fail}, before_layer=lambda layer: None):
        logits(llama, ids)
    assert untouched(llama)
    with pytest.raises(RuntimeError, match="already patched"), patched(llama, {}), patched(llama, {}):
        pass
    assert untouched(llama)
    assert_close(logits(llama, ids), native)


def test_before_layer_sees_each_layer_and_can_end_the_pass(llama, ids):
    seen = []

    def before(layer):
        seen.append(layer)
        if layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), patched(llama, {}, before_layer=before):
        logits(llama, ids)
    assert seen == [0, 1] and untouched(llama)


def test_capture_turned_again_is_what_the_model_computes(llama, ids):
    seen = {}

    def spy(module, args, kwargs):
        seen["x"], seen["tables"] = kwargs["hidden_states"], kwargs["position_embeddings"]

    hook = llama.model.layers[2].self_attn.register_forward_pre_hook(spy, with_kwargs=True)
    layers = capture(llama, ids[0])
    hook.remove()
    assert sorted(layers) == [0, 1, 2] and untouched(llama)
    attention, layer = llama.model.layers[2].self_attn, layers[2]
    for ours, projection in ((layer.q, attention.q_proj), (layer.k, attention.k_proj), (layer.v, attention.v_proj)):
        plain = projection(seen["x"])[0].unflatten(-1, (-1, 8))
        assert ours.dtype == torch.float16 and ours.device.type == "cpu"
        assert_close(ours.float(), plain, atol=2e-3, rtol=2e-3)
    cos, sin = (table[0, :, None] for table in seen["tables"])
    q = attention.q_proj(seen["x"])[0].unflatten(-1, (-1, 8))
    turned = q * cos + torch.cat((-q[..., 4:], q[..., :4]), -1) * sin
    again = rotate(layer.q.float()[None], torch.arange(T), layer.inv_freq)[0]
    assert_close(again, turned, atol=2e-3, rtol=2e-3)
    output, _ = attention(seen["x"], position_embeddings=seen["tables"], attention_mask=None)
    assert_close(layer.dense.float(), output[0], atol=2e-3, rtol=2e-3)


def test_capture_of_keys_only(llama, ids):
    layers = capture(llama, ids[0], keys_only=True)
    assert all(x.q is None and x.v is None and x.dense is None for x in layers.values())
    assert layers[0].k.shape == (T, 2, 8)


def test_gradient_reaches_the_projections_through_a_patched_layer(ids):
    model = make(LlamaForCausalLM, LlamaConfig).requires_grad_(True)
    with patched(model, {1: proteus(1.0)}):
        logits(model, ids).square().mean().backward()
    attention = model.model.layers[1].self_attn
    assert all(p.weight.grad.abs().sum() > 0 for p in (attention.q_proj, attention.k_proj, attention.v_proj))


def test_decoding_with_a_cache_is_refused(llama, ids):
    with patched(llama, {0: proteus(0.0)}):
        past = handed(llama, DynamicCache(config=llama.config))
        llama(ids, **past)
        with pytest.raises(ValueError, match="KV cache"):
            llama(ids[:, :1], **past)
    assert untouched(llama)


def test_a_sliding_layer_is_refused_by_name():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = make(Gemma3ForCausalLM, Gemma3TextConfig, sliding_window=16, layer_types=kinds)
    assert full_attention_layers(model) == (1,)
    with pytest.raises(ValueError, match="key 2.*sliding window of 16"), patched(model, {2: proteus(0.0)}):
        pass


def test_a_mask_that_is_not_causal_with_padding_is_refused(llama, ids):
    banded = torch.ones(T, T, dtype=torch.bool).tril().triu(-5)[None, None]
    with patched(llama, {0: proteus(0.0)}), pytest.raises(ValueError, match="attention_mask"):
        logits(llama, ids, attention_mask=banded)


@pytest.mark.parametrize(
    "layers, error, said",
    [
        ({3: proteus(0.0)}, ValueError, "key 3"),
        ({-1: proteus(0.0)}, ValueError, "key -1"),
        ({True: proteus(0.0)}, ValueError, "key True"),
        ({"1": proteus(0.0)}, ValueError, "key '1'"),
        ({0: 1.0}, TypeError, r"layers\[0\]"),
    ],
)
@pytest.mark.bad_input
def test_layers_that_are_none(llama, layers, error, said):
    with pytest.raises(error, match=said), patched(llama, layers):
        pass
    assert untouched(llama)


def test_another_build_of_model_is_refused():
    model = BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=11))
    with pytest.raises(TypeError, match="model=BloomForCausalLM.*AttentionInterface"), patched(model, {}):
        pass


def test_rope_that_is_not_half_split_is_refused(llama, ids):
    rotary = llama.model.rotary_emb
    plain = rotary.forward

    def interleaved(x, position_ids):
        return tuple(table[..., : table.shape[-1] // 2].repeat_interleave(2, -1) for table in plain(x, position_ids))

    rotary.forward = interleaved
    try:
        with patched(llama, {0: proteus(0.0)}), pytest.raises(ValueError, match="half-split"):
            logits(llama, ids)
    finally:
        del rotary.forward


def test_the_name_is_registered_but_never_left_on_a_model(llama):
    from transformers import AttentionInterface

    with patched(llama, {}):
        assert llama.config._attn_implementation == NAME
    assert NAME in AttentionInterface().valid_keys() and llama.config._attn_implementation == "sdpa"


# -- torch.compile, copies, training ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["model", "forward", "decoder", "layers"])
def test_a_compiled_model_is_patched_as_it_is_in_eager_mode(how, ids):
    model = make(LlamaForCausalLM, LlamaConfig)
    native, layers = logits(model, ids), {i: proteus(i / 2) for i in range(3)}
    with patched(model, layers):
        eager = logits(model, ids)
    both = compiled(model, how)
    assert_close(logits(both, ids), native, atol=1e-5, rtol=0)
    who = []
    with patched(model, {i: lambda call: who.append(call.layer) for i in range(3)}):
        logits(both, ids)
    assert who == [0, 1, 2]
    with patched(model, layers):
        assert torch.equal(logits(both, ids), eager)
    assert_close(logits(both, ids), native, atol=1e-5, rtol=0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "trace",
    [
        lambda model, ids: torch.jit.trace(lambda x: logits(model, x), ids),
        lambda model, ids: make_fx(lambda x: logits(model, x))(ids),
        lambda model, ids: torch.func.vmap(lambda x: logits(model, x[None]))(ids),
    ],
    ids=["jit.trace", "make_fx", "vmap"],
)
def test_other_tracers_are_refused(llama, ids, trace):
    with patched(llama, dict.fromkeys(range(3), proteus(1.0))), pytest.raises(RuntimeError, match="eager mode"):
        trace(llama, ids)


def test_func_grad_of_a_patched_model(ids):
    model = make(LlamaForCausalLM, LlamaConfig)
    weights = dict(model.named_parameters())

    def loss(weights):
        return torch.func.functional_call(model, weights, (ids,), {"use_cache": False}).logits.square().mean()

    with patched(model, dict.fromkeys(range(3), proteus(1.0))):
        found = torch.func.grad(loss)(weights)
        logits(model.requires_grad_(True), ids).square().mean().backward()
    for name, weight in weights.items():
        assert_close(found[name], weight.grad, atol=1e-5, rtol=1e-3)


def test_an_export_is_refused(ids):
    model = make(LlamaForCausalLM, LlamaConfig)
    with patched(model, {0: proteus(1.0)}), pytest.raises(RuntimeError, match="no torch.export"):
        torch.export.export(model, (ids,), {"use_cache": False})


def test_a_deep_copy_of_a_patched_model_is_native_and_can_be_patched(llama, ids):
    native = logits(llama, ids)
    with patched(llama, {0: proteus(1.0)}, before_layer=lambda layer: None):
        ours, twin = logits(llama, ids), copy.deepcopy(llama)
        assert_close(logits(twin, ids), native)
    with patched(twin, {0: proteus(1.0)}):
        assert_close(logits(twin, ids), ours)
    assert_close(logits(twin, ids), native)
    assert twin.config._attn_implementation == "sdpa"


def test_a_pickle_of_a_patched_model_is_native_in_another_process(ids, tmp_path):
    model = make(LlamaForCausalLM, LlamaConfig)
    file, found = tmp_path / "model", tmp_path / "logits"
    with patched(model, dict.fromkeys(range(3), proteus(1.0))):
        file.write_bytes(pickle.dumps((model, ids)))
    program = (
        "import pickle, sys, torch; model, ids = pickle.load(open(sys.argv[1], 'rb')); "
        "torch.save(model(ids, use_cache=False).logits, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, file, found], check=True)
    assert_close(torch.load(found), logits(model, ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_backward_pass_outside_the_block_is_refused(ids, reentrant):
    model = make(LlamaForCausalLM, LlamaConfig).requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with patched(model, dict.fromkeys(range(3), proteus(1.0))):
        loss = logits(model, ids).square().mean()
    with pytest.raises(RuntimeError, match="within the `patched` block"):
        loss.backward(retain_graph=True)
    with patched(model, dict.fromkeys(range(3), proteus(1.0))), pytest.raises(RuntimeError, match="within"):
        loss.backward()  # the graph is of the first patch, not of this one


def test_layers_that_are_taken_out_or_exchanged_are_noticed(ids):
    model = make(LlamaForCausalLM, LlamaConfig)
    with patched(model, dict.fromkeys(range(3), proteus(0.0))):
        logits(model, ids)
    del model.model.layers[2]
    model.config.num_hidden_layers = 2
    native = logits(model, ids)
    with patched(model, dict.fromkeys(range(2), proteus(0.0))):
        assert_close(logits(model, ids), native, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="layers has key 2"), patched(model, dict.fromkeys(range(3), proteus(0.0))):
        pass


def test_autocast(ids):
    model = make(LlamaForCausalLM, LlamaConfig)
    with torch.autocast("cpu", torch.bfloat16):
        native = logits(model, ids)
        with patched(model, dict.fromkeys(range(3), proteus(0.0))):
            ours = logits(model, ids)
    exact = logits(model, ids)
    assert ours.dtype == native.dtype
    assert (ours - exact).abs().max() <= 1.5 * (native - exact).abs().max()


def test_gradient_checkpointing_gives_the_same_gradient(ids):
    found = []
    for checkpointing in (False, True):
        model = make(LlamaForCausalLM, LlamaConfig).requires_grad_(True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with patched(model, {0: proteus(1.0), 2: proteus(0.5)}):
            logits(model, ids).square().mean().backward()
        found.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(ids, dtype):
    model = make(LlamaForCausalLM, LlamaConfig).to(dtype)
    native = logits(model, ids)
    with patched(model, dict.fromkeys(range(3), proteus(0.0))):
        assert_close(logits(model, ids), native, atol=1e-6 if dtype == torch.float64 else 0.03, rtol=0)


def test_dynamic_frequencies_of_a_whole_pass_are_served(ids):
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | {"max_position_embeddings": 32}, rope_parameters=rope)).eval()
    with torch.no_grad():
        native = logits(model, ids)
        with patched(model, dict.fromkeys(range(3), proteus(0.0))):
            assert_close(logits(model, ids), native, atol=1e-4, rtol=0)


def test_layers_that_stay_native_run_the_models_own_attention(ids):
    """Gemma 2 caps scores, which sdpa does not know: all of its layers stay native, in eager mode."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, attn_implementation="eager", attn_logit_softcapping=0.5, sliding_window=16)
    model = Gemma2ForCausalLM(config).eval().requires_grad_(False)
    native = logits(model, ids)
    with patched(model, {}):
        assert_close(logits(model, ids), native, atol=1e-5, rtol=0)
    assert model.config._attn_implementation == "eager"
