"""Top-A: only tokens that the awake heads speak for are drawn, and a cached text draws as full passes would."""

import pytest
import torch
import torch.nn.functional as F
from helpers import config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from proteus_playground.lm.model import ModelConfig, ProteusLM
from proteus_playground.lm.sampling import Sampling, TopA

V = 23


def model(alpha=1.0, **changes) -> ProteusLM:
    torch.manual_seed(0)
    return ProteusLM(ModelConfig(V, 2, config(flux_alpha=alpha, **changes))).eval()


def text(batch=1, tokens=20, seed=1):
    return torch.randint(V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def scores(seed, n=2):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, V, generator=gen) * 2, torch.rand(n, V, generator=gen) * 2 - 1


def nucleus(row, top_k, top_p) -> list[int]:
    """By hand: the likeliest tokens, likeliest first, whose predecessors hold less than top_p."""
    order = row.argsort(descending=True).tolist()[:top_k]
    prob, kept, mass = row[order].softmax(-1).tolist(), [], 0.0
    for token, p in zip(order, prob, strict=True):
        if mass >= top_p:
            break
        kept.append(token)
        mass += p
    return kept


@given(
    seed=st.integers(0, 999),
    share=st.floats(0, 1),
    shift=st.sampled_from([-1.0, 0.0, 0.6]),
    top_k=st.none() | st.integers(1, V),
    top_p=st.floats(0.1, 1),
    temperature=st.sampled_from([0, 0.6, 1.5]),
)
@settings(max_examples=80, deadline=None)
def test_filter_draws_only_candidates_that_agree_enough(seed, share, shift, top_k, top_p, temperature):
    logits, agreement = scores(seed)
    agreement = (agreement + shift).clamp(-1, 1)
    drawn = Sampling(temperature, top_k, top_p, seed, TopA(share))(logits, 3, agreement)
    for row, agree, token in zip(logits, agreement, drawn.tolist(), strict=True):
        candidates = nucleus(row / (temperature or 1), top_k, top_p)
        best = max(float(agree[c]) for c in candidates)
        stay = [c for c in candidates if best <= 0 or float(agree[c]) >= share * best - 1e-6]
        assert token in stay
        if temperature == 0:
            assert token == stay[0]
        if best <= 0:  # no candidate is spoken for: as without Top-A
            assert stay == candidates


@pytest.mark.parametrize("top_a", [TopA(0.6), TopA(mode="reweigh", strength=2.0)])
def test_draws_follow_the_new_probabilities(top_a):
    prob, agreement = torch.tensor([[0.5, 0.3, 0.15, 0.05]]), torch.tensor([[-0.2, 0.5, 0.4, 0.9]])
    choose = Sampling(top_p=0.9, seed=3, top_a=top_a)  # the last is no candidate, though it agrees best
    drawn = torch.cat([choose(prob.log(), at, agreement) for at in range(4000)]).bincount(minlength=4) / 4000
    want = torch.tensor([0.0, 0.3, 0.15, 0]) if top_a.mode == "filter" else prob[0] * (2 * agreement[0]).exp()
    want[3] = 0
    assert_close(drawn, want / want.sum(), atol=0.03, rtol=0)


@given(seed=st.integers(0, 999), position=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_a_top_a_that_asks_nothing_changes_nothing(seed, position):
    logits, agreement = scores(seed)
    plain = Sampling(0.8, 10, 0.9, seed)(logits, position)
    for top_a in (TopA(share=0.0), TopA(mode="reweigh", strength=0.0)):
        here = agreement if top_a.mode == "reweigh" else agreement.abs()
        assert torch.equal(Sampling(0.8, 10, 0.9, seed, top_a)(logits, position, here), plain)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("changes", [{}, {"heads_awake_max": 2, "n_heads": 6}, {"route_heads": False}])
def test_cached_agreement_is_the_full_pass_agreement(alpha, changes):
    lm, ids = model(alpha, **changes), text(2, 60)
    full = lm.agreement(lm(ids, return_trace=True)[1][-1])
    assert full.abs().max() <= 1
    state = lm.new_state(2, tokens=60)
    for start, end in ((0, 45), *((t, t + 1) for t in range(45, 60))):
        trace = lm.prefill(ids[:, start:end], state, return_trace=True)[1]
        assert_close(lm.agreement(trace)[:, 0], full[:, end - 1], atol=1e-5, rtol=0)


def test_agreement_is_the_heads_weighted_mean_cosine():
    lm, ids = model(heads_awake_max=1, head_top_p=0.7), text(1, 12)
    trace = lm(ids, return_trace=True)[1][-1]
    parts = lm.blocks[-1].attn.head_contributions(trace)[0]  # one slot a group
    weight = trace.weight[0].unflatten(1, (2, 2)).gather(-1, trace.slot[0])[..., 0]
    for t, token in ((0, 5), (11, 22)):
        cos = F.cosine_similarity(parts[t], lm.unembedding()[token], dim=-1)
        mean = (cos * weight[t]).sum() / weight[t].sum()
        assert_close(lm.agreement(trace)[0, t, token], mean)
    some = torch.full((1, 12), 7)
    assert_close(lm.agreement(trace, some), lm.agreement(trace)[..., 7])


@pytest.mark.parametrize("top_a", [TopA(0.8), TopA(mode="reweigh", strength=40.0)])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_generated_text_is_what_full_passes_choose(top_a, temperature):
    lm, ids = model(heads_awake_max=1), text(2, 30)
    how = {"temperature": temperature, "top_k": 12, "top_p": 0.9, "seed": 5, "top_a": top_a}
    shown = ids
    for _ in range(12):
        logits, traces = lm(shown, return_trace=True)
        token = Sampling(**how)(logits[:, -1], shown.shape[1], lm.agreement(traces[-1])[:, -1])
        shown = torch.cat((shown, token[:, None]), dim=1)
    written = torch.stack(list(lm.generate(ids, 12, **how)), dim=1)
    assert torch.equal(written, shown[:, 30:])
    plain = torch.stack(list(lm.generate(ids, 12, **{**how, "top_a": None})), dim=1)
    assert not torch.equal(written, plain)
    state = lm.new_state(2)
    begun = torch.stack(list(lm.generate(ids, 5, state=state, **how)), dim=1)
    rest = torch.stack(list(lm.generate(None, 7, state=state, **how)), dim=1)
    assert torch.equal(torch.cat((begun, rest), dim=1), written)


def test_a_dropped_token_leaves_the_choice_alone():
    lm, ids = model(keep_ratio=0.3), text(2, 60)
    for block in lm.blocks:
        block.attn.calibrate(torch.randn(1, 200, 32))
    trace = lm(ids, return_trace=True)[1][-1]
    asleep = ~trace.awake.any(-1)
    assert asleep.any() and not lm.agreement(trace)[asleep].any()


REFUSED = {
    "share": (lambda: TopA(1.5), ValueError),
    "share: kind": (lambda: TopA("half"), TypeError),
    "mode": (lambda: TopA(mode="sort"), ValueError),
    "strength": (lambda: TopA(strength=-1.0), ValueError),
    "top_a": (lambda: Sampling(top_a=0.5), TypeError),
    "agreement": (lambda: Sampling(top_a=TopA())(torch.zeros(1, V), 0), ValueError),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.bad_input
def test_refused(name):
    run, kind = REFUSED[name]
    with pytest.raises(kind, match=name.split(":")[0].replace(".", r"\.") + "="):
        run()
