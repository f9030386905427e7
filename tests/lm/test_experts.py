"""Experts behind gates: each token wakes few, alone and causally; the rest of the model does not notice."""

import copy
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from helpers import config, off_by
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from proteus_playground.common.tensors import read_tensors, write_tensors
from proteus_playground.lm.experts import Experts
from proteus_playground.lm.model import ModelConfig, ProteusLM

V = 23


def model(n=4, awake=2, top_p=1.0, alpha=1.0, **changes) -> ProteusLM:
    torch.manual_seed(0)
    return ProteusLM(ModelConfig(V, 2, config(flux_alpha=alpha, **changes), 24, n, awake, top_p))


def text(batch=2, tokens=40, seed=1):
    return torch.randint(V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def experts(n=4, awake=2, top_p=1.0) -> Experts:
    torch.manual_seed(0)
    return Experts(config(), 24, n, awake, top_p)


@pytest.mark.parametrize("n, awake, top_p", [(4, 2, 1.0), (4, 4, 1.0), (5, 3, 0.5), (9, 1, 1.0)])
def test_it_is_the_weighted_sum_of_whole_experts(n, awake, top_p):
    layer, x = experts(n, awake, top_p).eval(), torch.randn(2, 30, 32)
    on, weight = (t[:, :, 0] for t in layer.route(x))
    count = on.sum(-1)
    assert count.min() >= 1 and count.max() <= awake and bool((count < awake).any()) == (top_p < 1)
    assert_close(weight.sum(-1), count.float())
    assert not weight[~on].any()
    want = torch.zeros_like(x)
    for e in range(n):
        gate, up = (x @ layer.gate_up[e].T).chunk(2, -1)
        want += weight[..., e, None] * (F.silu(gate) * up @ layer.down[e])
    assert_close(layer(x), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["compile", "export", "vmap"])
def test_graphs_and_vmap_give_what_eager_gives(way):
    lm, ids = model(), text()
    lm.train()(ids)
    lm.eval()
    runs = {
        "compile": lambda: torch.compile(lm, backend="aot_eager", fullgraph=True)(ids),
        "export": lambda: torch.export.export(lm, (ids,)).module()(ids),
        "vmap": lambda: torch.func.vmap(lambda one: lm(one[None])[0])(ids),
    }
    assert off_by(runs[way](), lm(ids)) <= 1e-5


@given(cut=st.integers(1, 39), train=st.booleans(), top_p=st.sampled_from([0.5, 1.0]))
@settings(max_examples=15, deadline=None)
def test_nothing_after_a_token_reaches_it(cut, train, top_p):
    lm, ids = model(top_p=top_p, heads_awake_max=1).train(train), text()
    changed = torch.cat((ids[:, :cut], text(2, 40 - cut, 9)), dim=1)
    a, b = copy.deepcopy(lm)(ids), copy.deepcopy(lm)(changed)
    assert off_by(b[:, :cut], a[:, :cut]) <= 1e-6
    alone = copy.deepcopy(lm)(ids[:1])
    assert off_by(alone, a[:1]) <= 1e-6


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_generated_text_is_that_of_the_full_pass(alpha):
    lm, ids = model(alpha=alpha).eval(), text(2, 20)
    shown = ids
    for _ in range(30):
        shown = torch.cat((shown, lm(shown)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(torch.stack(list(lm.generate(ids, 30, temperature=0)), 1), shown[:, 20:])
    assert len(list(islice(lm.generate(ids, seed=2), 5))) == 5


def test_save_load_copy_and_old_files(tmp_path):
    lm, ids = model().eval(), text()
    again = ProteusLM.load(lm.save(tmp_path / "model.safetensors")).eval()
    assert again.cfg == lm.cfg
    assert torch.equal(again(ids), lm(ids)) and torch.equal(copy.deepcopy(lm)(ids), lm(ids))
    plain = model(1)
    assert not any("experts" in name for name in plain.state_dict())
    tensors, about = read_tensors(plain.save(tmp_path / "plain.safetensors"), "ProteusLM.save")
    for name in ("n_experts", "experts_awake", "expert_top_p"):  # as it was before there were experts
        del about[name]
    old = ProteusLM.load(write_tensors(tmp_path / "old.safetensors", tensors, about))
    assert old.cfg == plain.cfg and torch.equal(old.eval()(ids), plain.eval()(ids))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_it_learns_and_every_weight_has_a_gradient(checkpoint):
    lm, ids = model().train(), text(2, 24)
    optimiser, losses = torch.optim.AdamW(lm.parameters(), 1e-2), []
    for _ in range(12):
        logits = lm(ids, checkpoint=checkpoint)[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        optimiser.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())
        assert lm.blocks[0].experts.router.weight.grad.abs().max() > 0
        optimiser.step()
    assert losses[-1] < 0.8 * losses[0]


def test_recomputing_changes_neither_gradients_nor_what_is_noted():
    seen = []
    for checkpoint in (False, True):
        lm, ids = model().train(), text()
        for _ in range(2):
            lm(ids, checkpoint=checkpoint).square().mean().backward()
        layer = lm.blocks[1].experts
        state = [layer.gates.prototypes, layer.gates.pending_count, layer.router.balance, layer.router.pending_load]
        seen.append([p.grad for p in lm.parameters()] + state)
    for a, b in zip(*seen, strict=True):
        assert_close(a, b)


def test_one_expert_awake_teaches_its_router_nothing():
    for awake, learns in ((1, False), (2, True)):
        layer = experts(awake=awake)
        layer(torch.randn(1, 50, 32)).square().sum().backward()
        grad = layer.router.weight.grad
        assert bool(grad is not None and grad.abs().max() > 1e-6) == learns


def test_load_evens_out_and_prototypes_follow_the_tokens():
    layer, x = experts(n=4, awake=1).train(), F.normalize(torch.randn(1, 200, 32) + 1.0, dim=-1) * 5
    with torch.no_grad():
        layer.router.weight[:, layer.gates.head_of_gate[0] == 2] += 0.3  # one expert is ahead everywhere
    layer.router.balance_rate = 0.05

    def most() -> float:
        return float(layer.route(x)[0].float().mean((0, 1, 2)).max())

    before, near = most(), layer.gates.cosines(x[:, :, None]).amax(-1).mean()
    for _ in range(60):
        layer(x)
    assert before > 0.7 and most() < 0.6
    assert layer.gates.cosines(x[:, :, None]).amax(-1).mean() > near
    still = layer.gates.prototypes.clone()
    layer.eval()(x)
    assert torch.equal(layer.gates.prototypes, still)


@pytest.mark.parametrize("given_, named", [((0, 1, 1.0), "n_experts=0"), ((4, 5, 1.0), "experts_awake=5"),
                                           ((4, 2, 0.0), "expert_top_p=0.0")])  # fmt: skip
@pytest.mark.bad_input
def test_refused(given_, named):
    with pytest.raises(ValueError, match=named):
        model(*given_)
