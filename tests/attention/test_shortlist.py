"""Which gates a row opens and whose notes it reads, against the rule written out for one row at a time."""

import pytest
from helpers import config, qkv

from proteus_playground.attention import Gates
from proteus_playground.attention.budget import plan_budget
from proteus_playground.attention.shortlist import build_shortlist


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("most", [None, 3])
def test_a_row_opens_its_best_gates_while_their_keys_fit_and_reads_the_notes_of_the_next(fill, most):
    q, k, _ = qkv(150, 4, 2, seed=3)
    gates = Gates(2, 12, 8).fit(k, seed=3)
    cfg = config(
        n_heads=4, n_kv_heads=2, flux_alpha=1.0, shortlist=48, probes=6, gates_per_group=12, max_notes=most,
        nearest_gates=fill, n_anchors=2, dna_fraction=0.6,
    )  # fmt: skip
    budget = plan_budget(cfg, 150)
    assert budget.fills_rings == fill and budget.notes == (most or (9 if fill else 12))
    short = build_shortlist(gates.lure(k)[0], q, gates, budget, None)
    fewer = 0
    for row in (70, 111, 149):
        for head in range(4):
            group, held = head // 2, short.retired[0, head // 2, row // short.block]
            score = gates.prototypes[group] @ q[0, row, head]
            ranked = [gate for gate in score.argsort(descending=True, stable=True).tolist() if held[gate] > 0]
            opened, room = [], budget.ring_reads
            for gate in ranked[: budget.probes]:
                room -= min(int(held[gate]), budget.ring)
                if room < 0:
                    break
                opened.append(gate)
            fewer += len(opened) < budget.probes
            assert [gate for gate in short.probes[0, row, head].tolist() if gate >= 0] == opened
            assert (short.noted is None) == (budget.notes == 12)  # the notes of all gates
            if short.noted is not None:
                following = [gate for gate in ranked if gate not in opened][: budget.notes]
                assert [gate for gate in short.noted[0, row, head].tolist() if gate >= 0] == following
    assert (fewer > 0) == fill
