"""Other selectors, and less of their choice, for display: against the backends and against plain loops."""

from __future__ import annotations

import pytest
import torch

from proteus_playground.attention import AttentionConfig, Gates
from proteus_playground.attention.adapter import ProteusLayer
from proteus_playground.attention.rope import rope_frequencies, rotate
from proteus_playground.attention.rows import row_reads
from proteus_playground.attention.selectors import SELECTORS, Sight, attend_all
from proteus_playground.attention.selectors.seen import Seeing, see_layer, see_row
from proteus_playground.attention.selectors.way import PLAIN, Way, Without, offered

H, G, D, T = 4, 2, 8, 150


@pytest.fixture(scope="module")
def layer():
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, T, n, D, generator=gen) for n in (H, G, G))
    gates = Gates(G, 16, D).eval()
    gates.fit(torch.randn(1, 400, G, D, generator=gen))

    def make(way=PLAIN, **changes):
        config = AttentionConfig(
            d_model=H * D, n_heads=H, n_kv_heads=G, head_dim=D, gates_per_group=16, n_anchors=2, backend="reference",
            **{"shortlist": 40, "flux_alpha": 1.0, "route_heads": False, "probes": 3} | changes,
        )  # fmt: skip
        given = dict(inv_freq=rope_frequencies(D, 10_000.0), scale=D**-0.5)
        runner = ProteusLayer(gates, config)
        return runner, (q, k, v), given, Seeing(way, 1, runner, q, k, v, **given)

    return make


OURS = [{}, {"flux_alpha": 0.5}, {"flux_alpha": 0.0}, {"notes": False}, {"nearest_gates": True, "probes": 8},
        {"keep_ratio": 0.6}, {"route_heads": True, "head_top_p": 0.6}]  # fmt: skip


@pytest.mark.parametrize("changes", OURS, ids=str)
def test_our_own_choice_by_masks_is_that_of_the_backends(layer, changes):
    runner, tensors, given, seeing = layer(**changes)
    run, seen = runner.run(*tensors, **given), see_layer(seeing)
    torch.testing.assert_close(seen.out, run.out, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen.result.reads, run.result.reads)
    assert torch.equal(seen.result.gate_of_key, run.result.gate_of_key)
    if not changes.get("route_heads") and seeing.at[-1] == T - 1:
        want = row_reads(*tensors, runner.gates, run.budget, token=T - 1, head=1, keep=run.keep, **given)
        row = see_row(seeing, T - 1, 1)
        assert (row.kind == want.kind).all() and row.gates_opened == want.gates_opened
        assert row.notes_read == want.notes_read and abs(row.weight - want.weight).max() < 1e-5


@pytest.mark.parametrize("name", offered()[1:])
def test_other_selectors_are_as_attend_all_computes_them(layer, name):
    runner, (q, k, v), given, seeing = layer(Way(name))
    sight = Sight.of(q, k, v, runner.config, gates=runner.gates, **given)
    want, seen = attend_all(SELECTORS[name], sight), see_layer(seeing)
    torch.testing.assert_close(seen.out, want.out, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen.result.reads, want.reads)
    assert seen.looks == pytest.approx(want.looks.float().mean().item())
    assert see_row(seeing, T - 1, 0).weight.sum() == pytest.approx(1, abs=1e-4)


def test_what_is_taken_away_is_not_read(layer):
    runner, (q, k, v), given, whole = layer()
    before = see_row(whole, T - 1, 1)
    gate = before.gates_opened[0]
    lost = Without.parse(f"key 149, key 148, gate 1:0:{gate}, head 1:2, gate 0:0:{before.gates_opened[1]}")
    less = layer(Way(without=lost))[3]
    after = see_row(less, T - 1, 1)
    of_gate = whole.gate[0, :, 0].numpy() == gate
    far = before.kind >= 3
    assert (before.kind != 0)[of_gate & far].any() and not after.kind[of_gate & far].any()
    assert after.kind[149] and not after.kind[148]  # a row always reads its own key
    assert gate not in after.gates_opened and before.gates_opened[1] in after.gates_opened  # layer 0's gate stays
    out = see_layer(less).out
    assert not out[:, :, 2].any() and out[:, :, 1].any()
    # Without rings and notes a row reads its window and the anchors: written out.
    bare = see_layer(layer(Way(without=Without(notes=True, rings=True)))[3])
    turned_q, turned_k = (rotate(x, torch.arange(T), given["inv_freq"]) for x in (q, k))
    kind = torch.from_numpy(before.kind)
    near = (kind == 1) | (kind == 2)
    p = (turned_k[0, :, 0] @ turned_q[0, T - 1, 1] * D**-0.5).masked_fill(~near, -torch.inf).softmax(0)
    torch.testing.assert_close(bare.out[0, T - 1, 1], p @ v[0, :, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.bad_input
def test_ways_are_text_and_back():
    text = "notes, key 7, key 12, head 2:3, gate 1:0:9"
    lost = Without.parse(text)
    assert str(lost) == text and Without.parse(str(lost)) == lost and str(lost.toggled("notes")) == text[7:]
    assert lost.toggled("rings").rings and Without.parse("") == Without() and Way().plain
    for bad in ("head 3", "keys 4", "key -1", "all"):
        with pytest.raises(ValueError, match="without="):
            Without.parse(bad)
    with pytest.raises(ValueError, match="selector='best': allowed is 'ours'"):
        Way("best").chooser()
