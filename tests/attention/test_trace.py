"""What a pass hands out about itself: exact, part of the graph, the same one token at a time; and the losses on it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import config, layer, off_by
from torch.testing import assert_close

from proteus_playground.attention import plan_budget, surgery
from proteus_playground.attention.rope import rotate
from proteus_playground.lm import losses
from proteus_playground.lm.losses import alignment, opening, router_z
from proteus_playground.lm.model import ModelConfig, ProteusLM

V = 23
CASES = {
    "all awake": {},
    "some awake": {"heads_awake_max": 1, "head_top_p": 0.7, "n_heads": 6, "n_kv_heads": 2},
    "slots": {"heads_awake_max": 2, "n_heads": 6, "n_kv_heads": 2, "head_top_p": 0.5},
    "grouped": {"heads_awake_max": 2, "n_heads": 24, "n_kv_heads": 2, "gates_per_group": 12},
    "no router": {"route_heads": False},
    "dropped": {"keep_ratio": 0.5, "heads_awake_max": 1},
    "biased": {"bias": True},
}


def model(alpha=1.0, layers=2, **changes) -> ProteusLM:
    torch.manual_seed(0)
    return ProteusLM(ModelConfig(V, layers, config(flux_alpha=alpha, **changes)))


def text(batch=2, tokens=40, seed=1):
    return torch.randint(V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha, train", [(0.0, False), (0.0, True), (0.6, False), (1.0, True)])
@pytest.mark.parametrize("name", CASES)
def test_contributions_sum_to_the_output(name, alpha, train):
    attn, x = layer(flux_alpha=alpha, **CASES[name]).train(train), torch.randn(2, 40, 32)
    y, stats, trace = copy.deepcopy(attn)(x, return_stats=True, return_trace=True)
    assert_close(y, attn(x), atol=1e-5, rtol=1e-4)
    parts = attn.head_contributions(trace)
    bias = attn.o_proj.bias if attn.cfg.bias else 0
    assert_close((parts.sum(2) + bias)[stats.kept], y[stats.kept], atol=1e-5, rtol=1e-4)
    assert not parts[~stats.kept].any()
    if trace.awake is not None:
        assert torch.equal(trace.awake, stats.awake)
        assert_close(trace.weight, stats.head_weights)
        assert_close(trace.gate_prob.sum(-1), torch.ones(2, 40, 2))
        slots = parts.norm(dim=-1) > 0
        assert torch.equal(slots.sum(-1), stats.awake.sum(-1))  # sleepers add nothing
    else:
        assert trace.router_logits is None and trace.weight is None


@pytest.mark.parametrize("name", ["all awake", "slots", "grouped", "no router"])
def test_each_contribution_is_its_head_alone(name):
    attn, x = layer(**CASES[name]), torch.randn(1, 40, 32)
    trace = attn(x, return_trace=True)[1]
    r, d = attn.cfg.heads_per_group, attn.cfg.head_dim
    parts = attn.head_contributions(trace).unflatten(2, (2, -1))
    slot = torch.arange(r).expand(1, 40, 2, r) if trace.slot is None else trace.slot
    for t, g, k in ((0, 0, 0), (39, 1, 0), (20, 1, -1)):
        head = g * r + int(slot[0, t, g, k])
        alone = attn.o_proj.weight[:, head * d : (head + 1) * d] @ trace.heads[0, t, g, k]
        assert_close(parts[0, t, g, k], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_consensus_is_the_mean_cosine(name):
    attn = layer(**CASES[name])
    trace = attn(torch.randn(1, 30, 32), return_trace=True)[1]
    parts, unit = attn.head_contributions(trace), F.normalize(torch.randn(32), dim=0)
    cos = F.cosine_similarity(parts, unit, dim=-1)
    if trace.weight is None:
        mean = cos.mean(-1)
    else:
        weight = trace.weight.unflatten(2, (2, -1))
        weight = (weight if trace.slot is None else weight.gather(-1, trace.slot)).flatten(2)
        mean = (cos * weight).sum(-1) / weight.sum(-1).clamp(min=1e-9)
    assert_close(attn.consensus(trace) @ unit, mean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_one_token_at_a_time_the_trace_is_the_same(name, alpha):
    attn, x = layer(flux_alpha=alpha, **CASES[name]), torch.randn(2, 90, 32)
    whole = attn(x, return_trace=True)[1]
    _, state, first = attn.prefill(x[:, :50], return_trace=True)
    traces = [first] + [attn.decode(x[:, t : t + 1], state, return_trace=True)[1] for t in range(50, 80)]
    traces.append(attn.decode(x[:, 80:], state, return_trace=True)[1])
    for part in ("router_logits", "gate_prob", "awake", "weight"):
        if getattr(whole, part) is not None:
            steps = torch.cat([getattr(trace, part) for trace in traces], dim=1)
            assert_close(steps, getattr(whole, part), atol=1e-5, rtol=1e-5)
    steps = torch.cat([attn.head_contributions(trace) for trace in traces], dim=1)
    assert_close(steps, attn.head_contributions(whole), atol=1e-5, rtol=1e-4)
    assert_close(traces[-1].last().heads, whole.heads[:, -1:], atol=1e-5, rtol=1e-4)


def test_a_pruned_gate_has_no_logit():
    attn = layer()
    surgery.prune(attn, 0, int((attn.gates.head_of_gate[0] == attn.gates.head_of_gate[0, 0]).nonzero()[0]))
    logits = attn(torch.randn(1, 9, 32), return_trace=True)[1].router_logits
    assert torch.equal(logits[0, 0].isinf(), ~attn.gates.alive) and logits.logsumexp(-1).isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_recomputing_takes_the_way_of_the_first_pass(alpha):
    ids, grads = text(), []
    for checkpoint in (False, True):
        lm = model(alpha).train()
        lm(ids, checkpoint=checkpoint).square().mean().backward()
        grads.append([p.grad for p in lm.parameters()])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_model_gives_every_layers_trace_and_the_same_gradients_when_it_recomputes(alpha):
    ids, grads = text(), []
    for checkpoint in (False, True):
        lm = model(alpha, heads_awake_max=2, n_heads=6).train()
        for _ in range(3):  # prototypes and balance have moved
            lm(ids)
        logits, traces = lm(ids, return_trace=True, checkpoint=checkpoint)
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten()) + router_z(traces)
        (loss + alignment(traces[-1], lm, ids)).backward()
        grads.append([p.grad for p in lm.parameters()] + [lm.blocks[0].attn.router.pending_load])
        assert len(traces) == 2 and all(p.grad is not None for p in lm.parameters())
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


def test_model_hidden_stats_and_alpha():
    lm, ids = model(1.0).eval(), text()
    logits, stats, traces = lm(ids, return_stats=True, return_trace=True)
    assert_close(lm(ids), logits)
    assert len(stats) == len(traces) == 2
    assert_close(F.linear(lm.hidden(ids), lm.embed.weight), logits)
    lm.set_flux_alpha(0.0)
    assert {s.flux_alpha for s in lm(ids, return_stats=True)[1]} == {0.0}
    with pytest.raises(ValueError, match="flux_alpha=2"):
        lm.set_flux_alpha(2)


def test_router_z_is_the_mean_square_and_shrinks_the_logits():
    lm, ids = model(heads_awake_max=1).train(), text(1, 20)
    traces = lm(ids, return_trace=True)[1]
    by_hand = torch.stack([t.router_logits.exp().sum(-1).log() ** 2 for t in traces]).mean()
    assert_close(router_z(traces), by_hand)
    assert router_z(model(route_heads=False)(ids, return_trace=True)[1]) == 0
    optimiser, sizes = torch.optim.SGD([b.attn.router.weight for b in lm.blocks], 0.3), []
    for _ in range(6):
        z = router_z(lm(ids, return_trace=True)[1])
        optimiser.zero_grad()
        z.backward()
        optimiser.step()
        sizes.append(float(z.detach()))
    assert sizes[-1] < 0.8 * sizes[0]
    with pytest.raises(ValueError, match="traces="):
        router_z([])


def test_router_z_leaves_padding_out():
    attn, x = layer(), torch.randn(1, 20, 32)
    padding = torch.arange(20)[None] >= 12
    short, padded = attn(x[:, :12], return_trace=True)[1], attn(x, key_padding_mask=padding, return_trace=True)[1]
    assert_close(router_z([padded]), router_z([short]))


def spelled_out(trace, attn, rows: range) -> torch.Tensor:
    """The opening loss of one layer, row by row."""
    q, k, gates, d = trace.queries, trace.keys, attn.gates, attn.cfg.head_dim
    B, T, G, K, _ = q.shape
    turned, keys = (rotate(x.flatten(2, -2), None, attn.inv_freq).view_as(x) for x in (q, k))
    home, window = gates.lure(k)[0], plan_budget(attn.cfg, T, 1.0).window
    total = weights = torch.zeros(())
    for b, t, g, s in itertools.product(range(B), rows, range(G), range(K)):
        far = [j for j in range(t + 1) if j < t - window]
        if not far or not trace.heads[b, t, g, s].any():
            continue
        p = (keys[b, : t + 1, g] @ turned[b, t, g, s] / d**0.5).softmax(0).detach()[far]
        held = sorted({int(home[b, j, g]) for j in far})
        mass = torch.stack([p[[int(home[b, j, g]) == c for j in far]].sum() for c in held]) * p.max()
        length = k[:, :, g].norm(dim=-1).mean().detach()
        total = total - (mass * (gates.prototypes[g, held] @ q[b, t, g, s] * length / d**0.5).log_softmax(0)).sum()
        weights = weights + mass.sum()
    return total / weights


@pytest.mark.parametrize("name", ["slots", "no router", "dropped"])
def test_the_opening_loss_is_what_it_says(name, monkeypatch):
    monkeypatch.setattr(losses, "ROWS_PER_TEXT", 10)
    lm, ids = model(layers=1, **CASES[name]).train(), text()
    lm.blocks[0].attn.calibrate(torch.randn(2, 40, 32))
    traces = lm(ids, return_trace=True)[1]
    found = opening(traces, lm, first=7)  # 40 tokens, 10 rows: every fourth, from the fourth on
    assert_close(found, spelled_out(traces[0], lm.blocks[0].attn, range(3, 40, 4)))
    found.backward()
    q, k = (getattr(lm.blocks[0].attn, f"{name}_proj").weight.grad for name in "qk")
    assert q.abs().sum() > 0 and k is None
    with pytest.raises(ValueError, match="traces"):
        opening((), lm)


def test_the_opening_loss_teaches_queries_to_open_the_gate_of_what_they_attend_to():
    lm, ids = model(layers=1, route_heads=False, gates_per_group=16).train(), text(4, 120)
    attn = lm.blocks[0].attn

    def hits() -> float:
        """How often the gate of the likeliest key is the first that a row opens."""
        trace = copy.deepcopy(lm).eval()(ids, return_trace=True)[1][0]
        q, k = trace.queries[:, 60:], trace.keys[:, :40]
        likely = torch.einsum("btgkd,bsgd->btgks", q, k).argmax(-1)
        home = attn.gates.lure(k)[0].transpose(1, 2)[:, None, :, None].expand(*likely.shape, -1)
        first = torch.einsum("btgkd,gcd->btgkc", q, attn.gates.prototypes).argmax(-1)
        return float((home.gather(-1, likely[..., None])[..., 0] == first).float().mean())

    attn.calibrate(torch.randn(2, 100, 32))
    with torch.no_grad():
        attn.q_proj.weight *= 4  # attention that has made up its mind
    before, optimiser, sizes = hits(), torch.optim.Adam([attn.q_proj.weight], 3e-3), []
    for step in range(60):
        loss = opening(lm(ids, return_trace=True)[1], lm, step)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        sizes.append(float(loss.detach()))
    assert sizes[-1] < 0.75 * sizes[0] and hits() > before + 0.05, (sizes[0], sizes[-1], before, hits())


def test_alignment_is_what_it_says_and_teaches():
    lm, ids = model(heads_awake_max=2, n_heads=6).train(), text(1)
    targets = ids.roll(-1, 1)
    targets[:, 30:] = -100
    trace = lm(ids, return_trace=True)[1][-1]
    consensus = lm.blocks[-1].attn.consensus(trace)
    cos = F.cosine_similarity(consensus[:, :30], lm.unembedding()[targets[:, :30]], dim=-1)
    assert_close(alignment(trace, lm, targets), (1 - cos).mean())
    assert alignment(trace, lm, torch.full_like(ids, -100)) == 0
    with pytest.raises(ValueError, match="targets has shape"):
        alignment(trace, lm, targets[:, 1:])
    optimiser, sizes = torch.optim.Adam(lm.parameters(), 3e-2), []
    for _ in range(8):
        gap = alignment(lm(ids, return_trace=True)[1][-1], lm, targets)
        optimiser.zero_grad()
        gap.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in lm.parameters())
        optimiser.step()
        sizes.append(float(gap.detach()))
    assert sizes[-1] < sizes[0] - 0.3


def test_unembedding_rows_point_where_logits_rise():
    lm = model().eval()
    torch.nn.init.uniform_(lm.norm.weight, 0.2, 2)
    x = torch.randn(32)
    logits, scale = F.linear(lm.norm(x), lm.embed.weight), x.square().mean().sqrt()
    assert_close(lm.unembedding() @ x / scale, logits, atol=1e-4, rtol=1e-4)


def test_load_evens_out_and_gradient_never_sees_the_balance():
    torch.manual_seed(0)
    lm, ids = model(layers=1, heads_awake_max=1, n_heads=4, n_kv_heads=1, prior_max=0.0, balance_rate=0.02), text(4)
    router = lm.blocks[0].attn.router
    with torch.no_grad():
        router.weight[:, lm.blocks[0].attn.gates.head_of_gate[0] == 0] *= 4  # one head starts far ahead

    def spread() -> float:
        awake = copy.deepcopy(lm).eval()(ids, return_trace=True)[1][0].awake.float().mean((0, 1))
        return float(awake.max() - awake.min())

    before = spread()
    lm.train()
    for _ in range(30):
        lm(ids)
    assert spread() < 0.5 * before and before > 0.15 and router.balance.abs().max() > 0.02
    assert not router.balance.requires_grad

    # with the choice held fixed, weights and their gradient are the same whatever the balance
    def weights(bias: float):
        wide = model(layers=1, heads_awake_max=2, n_heads=2, n_kv_heads=1, head_top_p=0.999999)
        wide.blocks[0].attn.router.balance += bias * torch.tensor([[1.0, -1.0]])
        logits, traces = wide(ids, return_trace=True)
        assert traces[0].awake.all()
        logits.square().mean().backward()
        return traces[0].weight, wide.blocks[0].attn.router.weight.grad

    (a, grad), (b, again) = weights(0.0), weights(0.3)
    assert_close(a, b)
    assert_close(grad, again)
    assert off_by(grad, torch.zeros_like(grad)) > 0
