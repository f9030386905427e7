"""transformers generates through KV banks: as the full pass would, in fixed memory, and the model is left alone."""

import copy
import gc
from threading import Thread

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers")
from tiny_decoders import SIZES, VOCABULARY, logits, make, proteus, untouched  # noqa: E402 -- after the skip
from tiny_model import save as save_tiny  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from proteus_playground.attention import plan_budget, rotate  # noqa: E402
from proteus_playground.attention.settings import Settings
from proteus_playground.common.texts import load_text, pasted  # noqa: E402
from proteus_playground.hf.cache import ProteusCache  # noqa: E402
from proteus_playground.hf.patch import CACHE_NAMES, full_attention_layers, handed, patched  # noqa: E402
from proteus_playground.hf.text import stream_text  # noqa: E402

T = 45
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
}


def built(kind):
    """Its ends are not tokens that it writes, so that texts have the length that is asked for."""
    model = make(*KINDS[kind][:2], **KINDS[kind][2])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@pytest.fixture(scope="module")
def llama():
    return built("llama")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCABULARY, (2, T), generator=torch.Generator().manual_seed(1))


def cache_of(model, layers=None, alpha=1.0, **settings):
    """A cache, and the layer that the same gates and budgets make of a full pass."""
    layer = proteus(alpha, **settings)
    chosen = full_attention_layers(model) if layers is None else layers
    return ProteusCache(model, dict.fromkeys(chosen, layer.gates), layer.config), dict.fromkeys(chosen, layer)


def write(model, ids, cache, n=60, **more):
    more.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(
        ids,
        **handed(model, cache),
        max_new_tokens=n,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_decoding_is_the_full_patched_pass(kind, alpha, ids):
    model = built(kind)
    cache, layers = cache_of(model, alpha=alpha)
    out = write(model, ids, cache, 45)
    with patched(model, layers):
        full = logits(model, out.sequences)
    assert_close(torch.stack(out.logits, 1), full[:, T - 1 : -1], atol=1e-4, rtol=0)
    if alpha == 0:
        assert torch.equal(out.sequences, write(model, ids, DynamicCache(config=model.config), 45).sequences)
    else:
        bank = next(iter(cache.banks.values()))
        assert bank.tokens == T + 44 and max(gate.count for gate in bank.contents().gates) > bank.ring > 0


@pytest.mark.parametrize(
    "settings", [{"keep_ratio": 0.6}, {"route_heads": True, "head_top_p": 0.7}, {"int8": True}], ids=str
)
def test_every_decision_of_a_layer_is_the_same_token_by_token(llama, ids, settings):
    cache, layers = cache_of(llama, **settings)
    out = write(llama, ids, cache, 60)
    with patched(llama, layers):
        full = logits(llama, out.sequences)
    assert_close(torch.stack(out.logits, 1), full[:, T - 1 : -1], atol=2e-2 if "int8" in settings else 1e-4, rtol=0)


@pytest.mark.parametrize("layers", [(1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_left_padding_with_some_layers_native(llama, ids, layers, alpha):
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    cache, patch = cache_of(llama, layers, alpha)
    out = write(llama, ids, cache, 30, attention_mask=mask)
    mask = torch.cat((mask, mask.new_ones(2, 30)), 1)
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with patched(llama, patch):
        full = logits(llama, out.sequences, attention_mask=mask, position_ids=at)
    assert_close(torch.stack(out.logits, 1), full[:, T - 1 : -1], atol=1e-4, rtol=0)
    short, _ = cache_of(llama, layers, alpha)
    alone = write(llama, ids[1:, 17:], short, 30)
    assert torch.equal(alone.sequences[0, T - 17 :], out.sequences[1, T:])


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_a_prompt_may_come_in_pieces(llama, layers):
    text = torch.randint(VOCABULARY, (2, 230), generator=torch.Generator().manual_seed(4))
    cache, patch = cache_of(llama, layers)
    edges = (0, 1, 40, 41, 43, 190, 230)
    with torch.no_grad():
        got = [llama(text[:, a:b], **handed(llama, cache)).logits for a, b in zip(edges, edges[1:], strict=False)]
    with patched(llama, patch):
        assert_close(torch.cat(got, 1), logits(llama, text), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_decoder_may_be_handed_its_cache_by_either_name(llama, ids, name, monkeypatch):
    cache, patch = cache_of(llama)
    (here,), native = handed(llama.model, None), LlamaModel.forward

    def renamed(decoder, ids, **kwargs):
        """As a transformers of that name would; the one that is installed has only one of them."""
        return native(decoder, ids, **{here: kwargs.pop(name)}, **kwargs)

    with torch.no_grad(), patched(llama, patch):
        full = llama.model(ids).last_hidden_state
    monkeypatch.setattr(LlamaModel, "forward", renamed)
    with torch.no_grad():
        got = llama.model(ids, **{name: cache}).last_hidden_state
    assert all(bank.tokens == T for bank in cache.banks.values())
    assert_close(got, full, atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_the_name_that_every_transformers_takes_writes_through_the_banks(llama, ids):
    one, other = cache_of(llama)[0], cache_of(llama)[0]
    found = llama.generate(ids, past_key_values=one, max_new_tokens=3, do_sample=False)
    assert all(bank.tokens == T + 2 for bank in one.banks.values())
    assert torch.equal(found, write(llama, ids, other, 3).sequences)


def test_memory_stays_while_a_plain_cache_grows(llama, ids):
    cache, _ = cache_of(llama)
    plain, sizes = DynamicCache(config=llama.config), []
    write(llama, ids, cache, 2)
    for n in (10, 200):
        one, other = cache.fork(), copy.deepcopy(plain)
        write(llama, ids, other, n)
        sizes.append((one.nbytes, sum(layer.keys.nbytes + layer.values.nbytes for layer in other.layers)))
        out = write(llama, torch.cat((ids, ids), 1), one, n)
        assert out.sequences.shape[1] == 2 * T + n and one.nbytes == cache.nbytes
    assert sizes[1][0] == sizes[0][0] and sizes[1][1] > 4 * sizes[0][1]


def test_it_works_in_one_expression_and_leaves_nothing(llama, ids):
    native = logits(llama, ids)
    layer = proteus(1.0)
    gates = dict.fromkeys(range(3), layer.gates)
    llama.generate(ids, **handed(llama, ProteusCache(llama, gates, layer.config)), max_new_tokens=3)
    gc.collect()
    assert untouched(llama) and "forward" not in vars(llama.model)
    with ProteusCache(llama, gates, layer.config) as cache:
        write(llama, ids, cache, 3)
        assert_close(logits(llama, ids), native)
        assert untouched(llama) and "forward" in vars(llama.model)
    assert "forward" not in vars(llama.model)
    with pytest.raises(RuntimeError, match="closed"):
        write(llama, ids, cache, 3)
    cache.close()


def test_two_caches_take_turns(llama, ids):
    alone = []
    for alpha in (0.0, 1.0):
        cache, _ = cache_of(llama, alpha=alpha)
        alone.append(write(llama, ids, cache, 40).sequences)
    a, b = cache_of(llama, alpha=0.0)[0], cache_of(llama, alpha=1.0)[0]
    texts = [ids, ids]
    for _ in range(8):
        texts = [write(llama, text, cache, 5).sequences for text, cache in zip(texts, (a, b), strict=True)]
    assert torch.equal(texts[0], alone[0]) and torch.equal(texts[1], alone[1])
    a.close()
    assert torch.equal(write(llama, texts[1], b, 3).sequences[:, :-3], texts[1])


def test_a_deep_copy_of_the_model_is_a_model_of_its_own(llama, ids):
    cache, _ = cache_of(llama)
    twin = copy.deepcopy(llama)
    with torch.no_grad():
        twin.model.embed_tokens.weight.mul_(2)
    del cache
    assert (logits(twin, ids) - logits(llama, ids)).abs().max() > 1e-3
    other, _ = cache_of(llama)
    with pytest.raises(RuntimeError, match="another model"):
        write(twin, ids, other, 3)
    mine, patch = cache_of(twin)
    out = write(twin, ids, mine, 3)
    with patched(twin, patch):
        assert_close(out.logits[-1], logits(twin, out.sequences)[:, -2], atol=1e-4, rtol=0)


def test_a_pass_that_is_cut_short_is_noticed(llama, ids):
    cache, _ = cache_of(llama)
    write(llama, ids, cache, 3)
    spare = cache.fork()

    def stop(*_):
        raise KeyboardInterrupt

    hook = llama.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        write(llama, ids.repeat(1, 2), cache, 3)
    hook.remove()
    assert untouched(llama)
    with pytest.raises(RuntimeError, match="cut short"):
        write(llama, ids.repeat(1, 2), cache, 3)
    write(llama, ids.repeat(1, 2), spare, 3)
    cache.reset()
    fresh, _ = cache_of(llama)
    assert torch.equal(write(llama, ids, cache, 9).sequences, write(llama, ids, fresh, 9).sequences)


def test_another_thread_is_refused_and_harms_nothing(llama, ids):
    cache, _ = cache_of(llama)
    expected, seen = write(llama, ids, cache.fork(), 5).sequences, []

    def intrude(*_):
        def run():
            try:
                logits(llama, ids)
            except RuntimeError as refused:
                seen.append(str(refused))

        if not seen:
            other = Thread(target=run)
            other.start()
            other.join()

    hook = llama.model.layers[1].mlp.register_forward_pre_hook(intrude)
    try:
        assert torch.equal(write(llama, ids, cache, 5).sequences, expected)
    finally:
        hook.remove()
    assert len(seen) == 1 and "another thread" in seen[0]


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_saved_forked_and_copied_caches_go_on_alike(llama, ids, layers, tmp_path):
    cache, _ = cache_of(llama, layers)
    begun = write(llama, ids, cache, 40).sequences
    others = [cache.fork(), copy.deepcopy(cache), ProteusCache.load(cache.save(tmp_path / "it.safetensors"), llama)]
    expected = write(llama, begun, cache, 15).sequences
    for other in others:
        assert torch.equal(write(llama, begun, other, 15).sequences, expected)
    empty, _ = cache_of(llama, layers)
    again = ProteusCache.load(empty.save(tmp_path / "empty.safetensors"), llama)
    assert torch.equal(write(llama, ids, again, 40).sequences, begun)


def test_a_sliding_window_is_saved_too(ids, tmp_path):
    model = built("gemma3")
    cache, _ = cache_of(model)
    begun = write(model, ids, cache, 40).sequences
    again = ProteusCache.load(cache.save(tmp_path / "it.safetensors"), model)
    assert torch.equal(write(model, begun, again, 20).sequences, write(model, begun, cache, 20).sequences)


def test_a_file_of_another_model_is_refused(llama, tmp_path):
    path = cache_of(llama)[0].save(tmp_path / "it.safetensors")
    with pytest.raises(ValueError, match="another model"):
        ProteusCache.load(path, built("qwen3"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ProteusCache.load("nowhere", llama)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_beams_and_several_continuations(llama, ids, alpha):
    cache, layers = cache_of(llama, alpha=alpha)
    found = llama.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **handed(llama, cache),
        num_beams=3,
        max_new_tokens=25,
        do_sample=False,
    )
    if alpha == 0:
        native = llama.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=25, do_sample=False
        )
        assert torch.equal(found, native)
    many = llama.generate(
        ids, attention_mask=torch.ones_like(ids), **handed(llama, cache_of(llama, alpha=alpha)[0]),
        num_return_sequences=2, do_sample=True, max_new_tokens=5,
    )  # fmt: skip
    assert many.shape == (4, T + 5) and found.shape == (2, T + 25)


def test_taking_tokens_back_is_refused(llama, ids):
    cache, _ = cache_of(llama)
    write(llama, ids[:1], cache, 3)
    with pytest.raises(ValueError, match="tokens_to_remove=-2"):
        cache.crop(-2)
    with pytest.raises(ValueError, match="(?i)crop|take tokens back|assisted"):
        llama.generate(ids[:1].repeat(1, 3), **handed(llama, cache_of(llama)[0]), prompt_lookup_num_tokens=3,
                       max_new_tokens=20, do_sample=False)  # fmt: skip


def test_between_dense_and_constant_the_length_is_planned(llama, ids):
    layer = proteus(0.5)
    cache = ProteusCache(llama, {0: layer.gates}, layer.config)
    assert cache.layers[0].budget == plan_budget(layer.config, SIZES["max_position_embeddings"])
    short = ProteusCache(llama, {0: layer.gates}, layer.config, tokens=T + 2)
    with pytest.raises(ValueError, match=f"{T + 2}"):
        write(llama, ids, short, 9)


REFUSED = {
    "no gates": (lambda m, p: ProteusCache(m, {}, p.config), "gates={}"),
    "layer": (lambda m, p: ProteusCache(m, {5: p.gates}, p.config), "key 5"),
    "gates": (lambda m, p: ProteusCache(m, {0: None}, p.config), "gates[0]=NoneType"),
    "other gates": (lambda m, p: ProteusCache(m, {0: p.gates}, Settings()), "gates[0] has groups"),
    "settings": (lambda m, p: ProteusCache(m, {0: p.gates}, None), "settings=None"),
    "other layers": (lambda m, p: ProteusCache(m, {0: p.gates}, proteus(1.0, heads=4).config), "other layers"),
    "tokens": (lambda m, p: ProteusCache(m, {0: p.gates}, p.config, tokens=0), "tokens=0"),
    "reach": (lambda m, p: ProteusCache(m, {0: p.gates}, p.config, reach=3), "reach=3"),
    "reach: dense": (lambda m, p: ProteusCache(m, {0: p.gates}, proteus(0.0).config, reach=300), "reach=300"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument(llama, case):
    run, named = REFUSED[case]
    with pytest.raises((TypeError, ValueError)) as error:
        run(llama, proteus(1.0))
    assert named in str(error.value)
    assert "forward" not in vars(llama.model)


def test_gates_are_fitted_and_text_streams(tmp_path):
    save_tiny(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    model.generation_config.eos_token_id, tokenizer = None, AutoTokenizer.from_pretrained(tmp_path)
    settings = Settings(shortlist=24, gates=6)
    words = pasted("potato soup is good " * 100)
    made = dict(settings=settings, calibration=words, folder=tmp_path / "gates")
    cache = ProteusCache.for_model(model, tokenizer, **made)
    assert len(list((tmp_path / "gates").glob("*.safetensors"))) == 3  # the keys, and two layers' gates
    wanted = dict(max_new_tokens=70, seed=2, temperature=1.0)
    pieces = list(stream_text(model, tokenizer, "potato soup", cache, **wanted))
    assert cache.get_seq_length() == 2 + 70 and set("".join(pieces).split()) <= {"?", "potato", "soup", "is", "good"}
    again = ProteusCache.for_model(model, tokenizer, **made)
    assert pieces == list(
        stream_text(model, tokenizer, "potato soup", again, max_new_tokens=70, seed=2, temperature=1.0)
    )
    size = again.nbytes
    assert len(list(stream_text(model, tokenizer, "is", again, max_new_tokens=30))) <= 30
    assert again.nbytes == size and again.get_seq_length() == 72 + 31
    with pytest.raises(ValueError, match="prompt=''"):
        next(stream_text(model, tokenizer, "", again))
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        next(stream_text(model, tokenizer, "is", again, max_new_tokens=0))


def test_beyond_reach_nothing_seems_farther_away(llama, ids):
    """Window and anchors only, in one layer: the oracle moves the anchors along, a block at a time."""
    layer, reach = proteus(1.0, dna_fraction=0.0), 60
    gates = {0: layer.gates}
    cache = ProteusCache(llama, gates, layer.config, reach=reach)
    seen = {}
    out = write(llama, ids[:1], cache, 90, attention_mask=None)
    tokens, budget = T + 89, cache.layers[0].budget
    with patched(llama, {0: lambda call: seen.update(call=call)}):
        logits(llama, out.sequences[:, :-1])
    call, last = seen["call"], tokens - 1
    moved = budget.block * sum(t % budget.block == 0 for t in range(reach - budget.block + 1, tokens))
    read = [*range(budget.anchors), *range(last // budget.block * budget.block - budget.window, tokens)]
    at = torch.tensor([t + moved if t < budget.anchors else t for t in read])
    k, q = rotate(call.k[:, read], at, call.inv_freq), rotate(call.q[:, -1:], torch.tensor([last]), call.inv_freq)
    score = torch.einsum("bgrd,bkgd->bgrk", q[:, 0].unflatten(1, (2, 3)), k) * call.scale
    expected = torch.einsum("bgrk,bkgd->bgrd", score.softmax(-1), call.v[:, read]).flatten(1)
    bank = cache.banks[0]
    rows, held = bank.rows[:, :, :-1], bank.token[:, :, :-1] >= 0  # all but the spare slot
    score = torch.einsum("bgrd,bgkd->bgrk", q[:, 0].unflatten(1, (2, 3)), rows[..., 0, :]) * call.scale
    weight = score.masked_fill(~held[:, :, None], -torch.inf).softmax(-1)
    assert_close(torch.einsum("bgrk,bgkd->bgrd", weight, rows[..., 1, :]).flatten(1), expected, atol=1e-5, rtol=1e-4)
    assert last - moved <= reach
    plain, _ = cache_of(llama, (0,), dna_fraction=0.0)
    assert (torch.stack(write(llama, ids[:1], plain, 90).logits) - torch.stack(out.logits)).abs().max() > 1e-4


@pytest.mark.slow
def test_smollm2_writes_as_its_full_patched_pass(smollm2, tmp_path):
    from proteus_playground.hf.models import load

    model, tokenizer = load("smollm2")
    ids = tokenizer(load_text("humble token").body, return_tensors="pt").input_ids[:, :300]
    words = pasted(load_text("commonplace book").body[:1500])
    settings = Settings(shortlist=48, gates=8)
    cache = ProteusCache.for_model(
        model, tokenizer, settings, layers=(2, 17), calibration=words, folder=tmp_path, tokens=400
    )
    layers = {i: layer.layer for i, layer in enumerate(cache.layers) if i in cache.banks}
    out = write(model, ids, cache, 24)
    assert min(gate.summarised for gate in cache.banks[2].contents().gates) > 0
    with patched(model, layers):
        full = logits(model, out.sequences)
    assert_close(torch.stack(out.logits, 1), full[:, 299:-1], atol=1e-4, rtol=1e-4)
