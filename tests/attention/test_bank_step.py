"""The kernels of one token of a KV bank against PyTorch's operations: the same bank, the same rows."""

from dataclasses import replace

import pytest
import torch
from helpers import check_overflow, config, off_by, qkv

from proteus_playground.attention import ENDLESS, Gates, KVBank, plan_budget, rope_frequencies

pytest.importorskip("triton", reason="Triton is not installed for this system")
from proteus_playground.attention.backends.fused.bank_step import step  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOKENS, BATCH = (150, 2) if GPU else (24, 1)  # a program of the interpreter takes a millisecond
NEAREST = {"nearest_gates": True, "gates_per_group": 24 if GPU else 7, "probes": 4, "dna_fraction": 0.7}


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch):
    check_overflow(monkeypatch, False)
    with torch.no_grad():
        yield


def world(heads=4, groups=2, d=8, batch=BATCH, dtype=torch.float32, turn=True, reach=None, **changes):
    sizes = {"n_heads": heads, "n_kv_heads": groups, "head_dim": d}
    cfg = config(**{"shortlist": 20, "gates_per_group": 5, "flux_alpha": 1.0, **sizes, **changes})
    q, k, v = qkv(TOKENS, heads=heads, groups=groups, dim=d, batch=batch, device=DEVICE)
    seen = qkv(100, groups=groups, dim=d, seed=7, device=DEVICE)[1]
    gates = Gates(groups, cfg.gates_per_group, d).to(DEVICE).fit(seen)
    freq = rope_frequencies(d, 1e4, DEVICE) if turn else None
    budget = replace(plan_budget(cfg, TOKENS), tokens=ENDLESS)
    bank = KVBank.empty(budget, gates, batch, inv_freq=freq, dtype=dtype, reach=reach)
    return [x.to(dtype) for x in (q, k, v)], bank


def by_torch(bank, *tensors, **kwargs):
    """A step without the kernels."""
    bank._kernels = lambda q, k, v: None
    return bank.step(*tensors, **kwargs)


def by_kernels(bank, q, k, v, keep=None, awake=None, positions=None):
    """A step through the kernels, in the interpreter where there is no GPU."""
    bank._kernels = lambda q, k, v: step
    return bank.step(q, k, v, keep=keep, awake=awake, positions=positions)


def compare(bank, inputs, first=0, limit=1e-5, **masks):
    """Walk two copies through the text, and compare every row and, at its end, everything that is kept."""
    other = bank.fork()
    for t in range(first, TOKENS):
        at = slice(t, t + 1)
        now, here = [x[:, at] for x in inputs], {name: x[:, at] for name, x in masks.items()}
        want, got = by_torch(bank, *now, **here), by_kernels(other, *now, **here)
        assert torch.equal(want.isnan(), got.isnan())
        assert off_by(got.nan_to_num(), want.nan_to_num()) <= limit, t
    check_same(other, bank, limit)


def check_same(got, want, limit=1e-5):
    """Two banks hold the same keys, rows within `limit`."""
    for name in ("token", "retired", "count", "seen", "next_position"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    there = want.token >= 0
    assert torch.equal(got.gate[there], want.gate[there])
    assert off_by(got.rows[there], want.rows[there]) <= limit
    assert off_by(got.sums, want.sums) <= 1e-5
    assert got.tokens == want.tokens


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NEAREST,
        {**NEAREST, "heads": 3, "groups": 1, "n_anchors": 0, "turn": False},
        {"notes": False, "heads": 1, "groups": 1},
        {"probes": 1, "gates_per_group": 4, "groups": 1, "d": 36},
        {"dna_fraction": 0.0, "groups": 1},
    ],
    ids=str,
)
def test_rows_and_bank_are_those_of_pytorch(changes):
    inputs, bank = world(**changes)
    first = 0 if GPU or not changes else 12
    if first:
        bank.extend(*(x[:, :first] for x in inputs[1:]))
    compare(bank, inputs, first)


def test_dropped_and_broken_tokens_and_sleeping_heads():
    (q, k, v), bank = world(**NEAREST, batch=2)
    draw = torch.Generator().manual_seed(0)
    keep = (torch.rand(2, TOKENS, generator=draw) > 0.3).to(DEVICE)
    awake = (torch.rand(2, TOKENS, 4, generator=draw) > 0.3).to(DEVICE)
    k[0, TOKENS // 2, 1, 3] = torch.nan
    v[1, TOKENS // 3, 0, 2] = torch.inf
    compare(bank, (q, k, v), keep=keep, awake=awake)


def test_positions_of_ones_own_and_a_reach():
    inputs, bank = world(reach=30, **NEAREST)
    compare(bank, inputs, positions=(torch.arange(TOKENS, device=DEVICE) + 1000).expand(BATCH, -1))


@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if GPU else [])])
def test_low_precision(dtype):
    inputs, bank = world(dtype=dtype, d=16, **NEAREST)
    compare(bank, inputs, limit=2e-2 if dtype == torch.bfloat16 else 3e-3)
