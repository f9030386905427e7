"""The small language model writes what its full pass would write, in fixed memory, and can stop and go on anywhere."""

from itertools import islice

import pytest
import torch
from helpers import config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from proteus_playground.lm.model import ModelConfig, ProteusLM
from proteus_playground.lm.sampling import Sampling

V = 23


def language_model(alpha=1.0, layers=2, **changes) -> ProteusLM:
    torch.manual_seed(0)
    model = ProteusLM(ModelConfig(V, layers, config(flux_alpha=alpha, **changes))).eval()
    x = model.embed(text(2, 200)).detach()
    for block in model.blocks:
        block.attn.calibrate(x)
    return model


def text(batch, tokens, seed=1):
    return torch.randint(V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def written(tokens) -> torch.Tensor:
    """`(B, n)` of an iterator of `(B,)`."""
    return torch.stack(list(tokens), dim=1)


@pytest.mark.parametrize("alpha, changes", [(1.0, {}), (1.0, {"keep_ratio": 0.6}), (0.0, {})])
def test_greedy_text_is_the_likeliest_of_the_full_pass_at_every_step(alpha, changes):
    model, ids = language_model(alpha, **changes), text(2, 30)
    state, shown = model.new_state(2), ids
    logits = [model.prefill(ids, state)]
    for _ in range(120):  # every ring goes round
        token = logits[-1].argmax(-1, keepdim=True)
        shown = torch.cat((shown, token), dim=1)
        logits.append(model.prefill(token, state))
    assert_close(torch.stack(logits, 1), model(shown)[:, 29:], atol=1e-4, rtol=1e-4)
    if alpha:
        assert max(gate.count for gate in state.layers[0].contents().gates) > state.layers[0].ring
    assert torch.equal(written(model.generate(ids, 120, temperature=0)), shown[:, 30:])


def test_between_dense_and_constant_the_length_must_be_planned():
    model, ids = language_model(0.5), text(1, 40)
    with pytest.raises(ValueError, match="tokens=None"):
        model.generate(ids, 5)
    state = model.new_state(1, tokens=60)
    assert len(list(model.generate(ids, 20, state=state))) == 20
    whole = text(1, 60)
    assert_close(model.prefill(whole, model.new_state(1, tokens=60)), model(whole)[:, -1], atol=1e-4, rtol=1e-4)


def test_dense_or_proteus_is_the_config_alone():
    dense, sparse = (language_model(alpha, route_heads=False) for alpha in (0.0, 1.0))
    sparse.load_state_dict(dense.state_dict())
    short, long = text(2, 20), text(2, 120)
    assert_close(dense(short), sparse(short), atol=1e-5, rtol=1e-4)  # a shortlist of 24 holds them all
    assert (dense(long) - sparse(long)).abs().max() > 1e-3


@given(
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, V + 2),
    top_p=st.floats(0.05, 1),
    seed=st.integers(0, 2**40),
    position=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_draws_come_from_the_nucleus_and_repeat(temperature, top_k, top_p, seed, position):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(5)) * 2
    choose = Sampling(temperature, top_k, top_p, seed)
    token = choose(logits, position)
    assert torch.equal(token, Sampling(temperature, top_k, top_p, seed)(logits.clone(), position))
    for row, chosen in zip(logits, token.tolist(), strict=True):
        order = row.argsort(descending=True).tolist()[:top_k]
        prob = (row / temperature)[order].softmax(-1)
        rank = order.index(chosen)  # a ValueError: not among the top k
        assert float(prob[:rank].sum()) < top_p + 1e-5


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    drawn = torch.cat([Sampling(top_p=0.9, seed=3)(logits, at) for at in range(4000)]).bincount(minlength=4) / 4000
    assert_close(drawn, torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03, rtol=0)


def test_the_seed_decides():
    model, ids = language_model(), text(2, 12)
    first, again, other = (written(model.generate(ids, 40, seed=seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_stopped_text_goes_on_as_it_would_have(alpha, tmp_path):
    model, ids = language_model(alpha), text(2, 12)
    whole = written(model.generate(ids, 90, seed=4))
    state = model.new_state(2)
    begun = written(model.generate(ids, 50, seed=4, state=state))
    assert state.tokens == 62 and torch.equal(begun, whole[:, :50])
    fork, saved = state.fork(), model.load_state(state.save(tmp_path / "state.safetensors"))
    for one in (state, fork, saved):
        assert torch.equal(written(model.generate(None, 40, seed=4, state=one)), whole[:, 50:])
    assert model.load_state(fork.save(tmp_path / "state.safetensors")).tokens == 102


def test_two_continuations_share_what_was_read():
    model, prefix = language_model(), text(1, 70)
    state = model.new_state()
    model.prefill(prefix, state)
    for seed in (1, 2):
        more = text(1, 9, seed)
        alone = written(model.generate(torch.cat((prefix, more), 1), 30, temperature=0))
        assert torch.equal(written(model.generate(more, 30, temperature=0, state=state.fork())), alone)
    assert state.tokens == 70


def test_text_without_end_in_memory_that_stays():
    model, ids = language_model(layers=1), text(1, 3)
    state = model.new_state()
    sizes = {state.nbytes for _ in islice(model.generate(ids, seed=1, state=state), 500)}
    assert len(sizes) == 1 and state.tokens == 503
    dense = language_model(0.0, layers=1)
    state = dense.new_state()
    sizes = {state.nbytes for _ in islice(dense.generate(ids, seed=1, state=state), 200)}
    assert len(sizes) > 1


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_save_and_load(alpha, tmp_path):
    model, ids = language_model(alpha), text(2, 50)
    again = ProteusLM.load(model.save(tmp_path / "model.safetensors")).eval()
    assert again.cfg == model.cfg and torch.equal(again(ids), model(ids))


def test_it_learns():
    model = language_model().train()
    optimiser, ids = torch.optim.AdamW(model.parameters(), 1e-2), text(4, 40)
    losses = []
    for _ in range(30):
        logits = model(ids)[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


REFUSED = {
    "cfg": (lambda m, ids: ProteusLM(config()), "cfg=AttentionConfig"),
    "attention": (lambda m, ids: ModelConfig(V, 1, {}), "attention=dict"),
    "vocab_size": (lambda m, ids: ModelConfig(0, 1, config()), "vocab_size=0"),
    "n_layers": (lambda m, ids: ModelConfig(V, 1.5, config()), "n_layers=1.5"),
    "hidden": (lambda m, ids: ModelConfig(V, 1, config(), 0), "hidden=0"),
    "ids: float": (lambda m, ids: m(ids.float()), "ids=torch.float32"),
    "ids: shape": (lambda m, ids: m(ids[0]), "ids has shape (9,)"),
    "ids: range": (lambda m, ids: m(ids + V), "must be in [0, 23)"),
    "ids: none": (lambda m, ids: m.generate(None, 3), "ids=None"),
    "ids: fresh state": (lambda m, ids: m.generate(None, 3, state=m.new_state()), "ids=None"),
    "batch": (lambda m, ids: m.prefill(ids, m.new_state(3)), "3"),
    "max_new_tokens": (lambda m, ids: m.generate(ids, 0), "max_new_tokens=0"),
    "temperature": (lambda m, ids: m.generate(ids, temperature=-1), "temperature=-1"),
    "temperature: text": (lambda m, ids: m.generate(ids, temperature="hot"), "temperature='hot'"),
    "top_k": (lambda m, ids: m.generate(ids, top_k=0), "top_k=0"),
    "top_p": (lambda m, ids: m.generate(ids, top_p=0.0), "top_p=0.0"),
    "seed": (lambda m, ids: m.generate(ids, seed=-1), "seed=-1"),
    "training": (lambda m, ids: m.train().generate(ids), "training=True"),
    "file": (lambda m, ids: ProteusLM.load("nowhere.safetensors"), "nowhere"),
    "state file": (lambda m, ids: m.load_state("nowhere.safetensors"), "nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_argument(case):
    run, named = REFUSED[case]
    with pytest.raises((TypeError, ValueError, FileNotFoundError)) as error:
        run(language_model(), text(2, 9))
    assert named in str(error.value)


def test_a_file_of_another_kind_or_model_is_refused(tmp_path):
    model = language_model()
    path = model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not a state of this model"):
        model.load_state(path)
    state = model.new_state()
    model.prefill(text(1, 5), state)
    state.save(path)
    with pytest.raises(ValueError, match="ProteusLM.save"):
        ProteusLM.load(path)
    torch.manual_seed(9)
    with pytest.raises(ValueError, match="not a state of this model"):
        ProteusLM(ModelConfig(V, 2, config())).load_state(path)


@pytest.mark.parametrize("saved, read", [(0, 3), (3, 0), (3, 8)])
@pytest.mark.bad_input
def test_a_state_is_refused_by_a_model_with_another_convolution(tmp_path, saved, read):
    torch.manual_seed(0)
    one, other = (ProteusLM(ModelConfig(V, 2, config(), taps=taps)).eval() for taps in (saved, read))
    for a, b in zip(one.blocks, other.blocks, strict=True):
        b.load_state_dict(a.state_dict())
    state = one.new_state()
    one.prefill(text(1, 12), state)
    path = state.save(tmp_path / "state.safetensors")
    assert one.load_state(path).tokens == 12
    with pytest.raises(ValueError, match=f"taps={read}"):
        other.load_state(path)
