"""A bank filled from the index of a parallel pass, against PyTorch's operations: the same slots, sums and next row."""

import pytest
import torch
from helpers import check_overflow, off_by
from test_bank_step import NEAREST, TOKENS, check_same, world

from proteus_playground.attention import proteus_attention

pytest.importorskip("triton", reason="Triton is not installed for this system")


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch):
    check_overflow(monkeypatch, False)
    with torch.no_grad():
        yield


def filled(q, k, v, bank, tokens=TOKENS, positions=None, index=True):
    """A copy of the empty bank after `extend` with the index of a pass over the same tokens, or without one."""
    q, k, v = (x[:, :tokens] for x in (q, k, v))
    how = {"inv_freq": bank.inv_freq, "positions": positions, "explain": False, "backend": "triton"}
    run = proteus_attention(q, k, v, bank.gates, bank.budget, **how, return_index=True)
    assert run.index is not None
    twin = bank.fork()
    twin.extend(k, v, positions=positions, index=run.index if index else None)
    return twin


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**NEAREST, "heads": 2, "groups": 1},
        {"groups": 1},
        {"notes": False, "groups": 1, "heads": 1, "turn": False, "n_anchors": 0},
        {"dna_fraction": 0.0, "groups": 1, "d": 36},
    ],
    ids=str,
)
def test_bank_is_that_of_pytorch(changes):
    (q, k, v), bank = world(**changes)
    tokens = TOKENS if changes else 3  # fewer than the window holds
    at = torch.arange(5, 5 + tokens, device=k.device) if changes else None
    got, want = (filled(q, k, v, bank, tokens, at, index) for index in (True, False))
    check_same(got, want)
    now = [x[:, -1:] for x in (q, k, v)]
    assert off_by(got.step(*now), want.step(*now)) <= 1e-5


def test_a_key_that_is_nan_falls_into_a_gate_that_exists():
    """Else what sorts the keys by gate would write beyond its tables."""
    (q, k, v), bank = world(groups=1, heads=1, batch=2)
    k[:, ::7] = torch.nan
    how = {"inv_freq": bank.inv_freq, "explain": False, "backend": "triton", "return_index": True}
    index = proteus_attention(q, k, v, bank.gates, bank.budget, **how).index
    assert index.total.isnan() and index.keys.gate.max() < bank.gates.gates_per_group
    assert bank.gates.gates_per_group & (bank.gates.gates_per_group - 1), "a power of two needs no padding"


def test_calls_that_the_kernel_does_not_serve_go_the_usual_way():
    (q, k, v), bank = world(groups=1, heads=1, batch=2)
    broken = k.clone()
    broken[0, 4] = torch.nan
    plain = bank.fork()
    plain.extend(broken, v)
    check_same(filled(q, broken, v, bank), plain)
    run = proteus_attention(
        q, k, v, bank.gates, bank.budget, inv_freq=bank.inv_freq, backend="triton", explain=False, return_index=True
    )
    keep = torch.arange(TOKENS, device=k.device).expand(2, -1) > 2
    some, plain = bank.fork(), bank.fork()
    some.extend(k, v, keep=keep, index=run.index)
    plain.extend(k, v, keep=keep)
    check_same(some, plain)
    with pytest.raises(ValueError, match="index is of keys"):
        bank.fork().extend(k[:, 1:], v[:, 1:], index=run.index)
    dropped = proteus_attention(
        q, k, v, bank.gates, bank.budget, inv_freq=bank.inv_freq, keep=keep, backend="triton", explain=False,
        return_index=True,
    )  # fmt: skip
    assert dropped.index is None  # its tokens are not those of the text
