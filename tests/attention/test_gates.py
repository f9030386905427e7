"""Gates: fitting, luring, moving averages, and surgery on a live layer."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import config, layer, off_by

from proteus_playground import ProteusAttention
from proteus_playground.attention import Gates, ranking, surgery
from proteus_playground.attention.calibration import IN_MEMORY, Calibration
from proteus_playground.attention.kmeans import spherical_kmeans
from proteus_playground.common.texts import load_text
from proteus_playground.playground.random_source import RandomSource

TOPICS = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(1)), dim=1)


def clustered(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    owner = torch.randint(5, (n,), generator=gen)
    return TOPICS[owner] * 4 + 0.2 * torch.randn(n, 16, generator=gen), owner


@pytest.mark.parametrize("few", [0, 99])  # sorted, and picked one by one
def test_the_best_gates_come_in_order_and_ties_go_to_the_lower_index(monkeypatch, few):
    monkeypatch.setattr(ranking, "FEW", few)
    prototypes = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.6, 0.8], [1.0, 0.0]]])
    alive, retired = torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 1, 2, 6, dtype=torch.int64)
    alive[0, 5], retired[0, 0, 1, 1] = False, 0  # one gate is dead, one is empty at the second tick
    q = torch.tensor([[1.0, 0.0], [-0.0, 0.0], [1.0, 0.0], [0.0, -1.0]]).view(1, 4, 1, 2)
    got = ranking.rank_gates(q, prototypes, alive, retired, 2, 6)[0, :, 0].tolist()
    assert got == [[1, 2, 4, 0, 3, -1], [0, 1, 2, 3, 4, -1], [2, 4, 0, 3, -1, -1], [2, 3, 4, 0, -1, -1]]


def test_kmeans_finds_planted_clusters():
    x, owner = clustered(400)
    means, found = spherical_kmeans(F.normalize(x, dim=1), 5, seed=0, iterations=12)
    assert (means @ TOPICS.T).amax(1).min() > 0.99
    assert len({(int(a), int(b)) for a, b in zip(owner, found, strict=True)}) == 5


def test_kmeans_survives_fewer_points_than_clusters():
    x = F.normalize(torch.randn(3, 16), dim=1)
    means, _ = spherical_kmeans(x, 8, seed=0, iterations=5)
    assert means.isfinite().all() and torch.allclose(means.norm(dim=1), torch.ones(8), atol=1e-5)


def test_fit_measures_confidence_usage_and_quantiles():
    x, _ = clustered(500)
    gates = Gates(1, 5, 16).fit(x[:, None])
    assert torch.allclose(gates.usage.sum(), torch.tensor(1.0)) and gates.confidence.min() > 0.9
    assert (gates.salience_quantiles.diff() >= 0).all()


def test_lure_is_nearest_by_cosine_and_ties_go_low():
    gates = Gates(1, 4, 16)
    gates.prototypes[0, 2] = gates.prototypes[0, 1]
    gate, cosine = gates.lure(gates.prototypes[0, 2][None, None] * 7)
    assert gate.item() == 1 and cosine.item() == pytest.approx(1)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_keep_mask_keeps_about_the_ratio(ratio):
    x, _ = clustered(2000)
    gates = Gates(1, 5, 16).fit(x[:1000, None])
    kept = gates.keep_mask(x[None, 1000:, None], ratio).float().mean()
    assert abs(kept - ratio) < 0.07


def test_prototypes_follow_the_keys_in_training():
    torch.manual_seed(0)
    gates = Gates(1, 10, 16, ema_decay=0.8)  # twice the topics: with as many gates as topics two may share one
    for step in range(150):
        x, _ = clustered(200, seed=step)
        gates.observe(x[None, :, None], torch.ones(1, 200, dtype=torch.bool))
        gates.fold()
    x, _ = clustered(500, seed=999)
    assert gates.lure(x[:, None])[1].mean() > 0.95
    assert torch.allclose(gates.prototypes.norm(dim=-1), torch.ones(1, 10), atol=1e-5)


def test_a_dead_gate_is_revived():
    gates = Gates(1, 6, 16, ema_decay=0.5)
    gates.prototypes[0, 3] = -F.normalize(TOPICS.sum(0), dim=0)
    for step in range(60):
        x, _ = clustered(100, seed=step)
        gates.observe(x[None, :, None], torch.ones(1, 100, dtype=torch.bool))
        gates.fold()
    assert gates.usage[0, 3] > 0.01


def test_half_precision_leaves_prototypes_alone():
    gates = Gates(1, 5, 16)
    before = gates.prototypes.clone()
    assert torch.equal(gates.half().prototypes, before)


# surgery

X = torch.randn(2, 120, 32, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_clone_changes_nothing(alpha):
    attn = layer(flux_alpha=alpha, notes=False, heads_awake_max=1, head_top_p=0.8)
    before, stats = attn(X, return_stats=True)
    slot = surgery.clone(attn, 1, 3)
    after, again = attn(X, return_stats=True)
    assert slot == 6 and attn.cfg.gates_per_group == 7
    assert off_by(after, before) <= 1e-5 and torch.equal(stats.awake, again.awake)


def test_clone_into_a_free_slot_changes_nothing_with_notes_either():
    attn = layer(shortlist=40)
    surgery.prune(attn, 0, 2)
    before = attn(X)
    assert surgery.clone(attn, 0, 5) == 2
    assert off_by(attn(X), before) <= 1e-5


def test_move_without_routing_changes_nothing():
    attn = layer(route_heads=False)
    before = attn(X)
    surgery.move(attn, 0, 1, 0)
    assert torch.equal(attn(X), before)


def test_move_takes_the_gates_probability_along():
    attn = layer(heads_awake_max=1)
    _, before = attn(X, return_stats=True)
    for gate in (2, 4):  # the even gates are head 0's; it must keep one
        surgery.move(attn, 0, gate, 1)
    _, after = attn(X, return_stats=True)
    assert after.awake[..., 1].sum() > before.awake[..., 1].sum()
    with pytest.raises(ValueError, match="gate=0: the last gate of head 0"):
        surgery.move(attn, 0, 0, 1)


def test_merge_undoes_clone():
    attn = layer(notes=False)
    before = attn(X)
    slot = surgery.clone(attn, 0, 2)
    surgery.merge(attn, 0, 2, slot)
    assert off_by(attn(X), before) <= 1e-5 and not attn.gates.alive[0, slot]


def test_pruned_gates_lure_and_wake_nothing():
    attn = layer()
    surgery.prune(attn, 0, 4)
    _, stats = attn(X, return_stats=True)
    assert not (stats.gate_of_key[..., 0] == 4).any() and (stats.gate_of_key[..., 1] == 4).any()


@pytest.mark.parametrize("bias", [False, True])
def test_add_head_without_routing_changes_nothing_and_learns(bias):
    attn = layer(route_heads=False, bias=bias)
    before = attn(X)
    assert surgery.add_head(attn) == 2 and attn.cfg.n_heads == 6
    assert off_by(attn(X), before) <= 1e-5
    attn(X).square().sum().backward()
    assert attn.o_proj.weight.grad.view(32, 2, 3, 8)[:, :, 2].any()


def test_add_head_with_routing_runs_and_saves(tmp_path):
    attn = layer(heads_awake_max=1)
    surgery.add_head(attn)
    y, stats = attn(X, return_stats=True)
    assert stats.awake.shape[-1] == 6 and stats.heads_awake == pytest.approx(2)
    assert torch.equal(ProteusAttention.load(attn.save(tmp_path / "a.safetensors")).eval()(X), y)


def test_surgery_between_training_steps():
    attn = layer().train()
    attn(X).sum().backward()
    slot = surgery.clone(attn, 0, 0)
    surgery.prune(attn, 0, 1)
    surgery.merge(attn, 0, 0, slot)
    surgery.add_head(attn)
    attn(X).sum().backward()
    assert attn(X).isfinite().all()


def test_two_thousand_heads_run_and_few_wake():
    torch.manual_seed(0)
    cfg = config(
        d_model=64, n_heads=2048, n_kv_heads=8, head_dim=16, gates_per_group=256, heads_awake_max=2, shortlist=64
    )
    attn = ProteusAttention(cfg)
    x = torch.randn(1, 100, 64)
    attn.calibrate(x)
    y, stats = attn(x, return_stats=True)
    assert stats.heads_awake == 16 and y.isfinite().all()
    assert stats.awake.any(dim=(0, 1)).sum() > 50


def test_grouped_projection_equals_projecting_everything(monkeypatch):
    from proteus_playground.attention import heads

    attn = layer(n_heads=32, gates_per_group=16, heads_awake_max=3, bias=True, keep_ratio=0.6)
    grouped = attn(X)
    monkeypatch.setattr(heads, "GROUPED_FROM", 1000)
    assert off_by(grouped, attn(X)) <= 1e-5


def test_clone_is_deterministic_under_deepcopy():
    a = layer()
    b = copy.deepcopy(a)
    surgery.clone(a, 0, 1)
    surgery.clone(b, 0, 1)
    assert torch.equal(a(X), b(X))


def test_a_calibration_keeps_few_sets_of_gates():
    source = RandomSource()
    made = Calibration(source, load_text("humble token"), 64, None)
    sets = [weakref.ref(made.gates(layer, count)) for count in range(2, 9) for layer in range(source.n_layers)]
    assert sum(each() is not None for each in sets) == IN_MEMORY * source.n_layers < len(sets)
