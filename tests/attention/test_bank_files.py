"""Banks that are saved, copied, selected or looked into; bad input."""

import copy
import pickle

import pytest
import torch
from banks import parallel, take_in, walk, world
from helpers import layer, off_by, qkv

from proteus_playground.attention import Gates, KVBank
from proteus_playground.common.tensors import read_tensors, write_tensors


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_memory_is_constant_unless_dense():
    q, k, v, _, bank = world(3000)
    *_, dense = world(3000, flux_alpha=0.0)
    size, small = bank.nbytes, dense.nbytes
    for start in range(0, 3000, 1000):
        take_in(bank, k, v, None, start, start + 990)
        take_in(dense, k, v, None, start, start + 990)
        walk(bank, q, k, v, None, start + 990, start + 1000)
        walk(dense, q, k, v, None, start + 990, start + 1000)
        assert bank.nbytes == size
    assert dense.nbytes > 20 * small and dense.window == 3000


def test_a_file_from_before_nearest_notes_loads(tmp_path):
    q, k, v, _, bank = world(120, flux_alpha=1.0)
    assert bank.budget.notes == bank.gates.gates_per_group
    take_in(bank, k, v, None, 0, 100)
    path = bank.save(tmp_path / "bank.safetensors")
    tensors, about = read_tensors(path, "KVBank.save")
    about["budget"]["notes"] = True
    del about["budget"]["ring_reads"]
    write_tensors(path, tensors, about)
    old = KVBank.load(path, bank.gates)
    assert old.budget == bank.budget
    assert torch.equal(walk(old, q, k, v, None, 100, 120), walk(bank, q, k, v, None, 100, 120))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
def test_saved_forked_and_selected_banks_go_on_bit_for_bit(tmp_path, alpha, kind):
    q, k, v, _, like = world(160, flux_alpha=alpha)
    kinds = {"int8": True} if kind == torch.int8 else {"dtype": kind}

    def empty():
        return KVBank.empty(like.budget, like.gates, 2, inv_freq=like.inv_freq, scale=0.5, **kinds)

    bank, copied = empty(), empty()
    take_in(bank, k, v, None, 0, 101)
    saved = KVBank.load(bank.save(tmp_path / "bank.safetensors"), bank.gates)
    copied.load_state_dict(bank.state_dict())
    fork, swapped = bank.fork(), bank.select(torch.tensor([1, 0]))
    torch.save(bank.state_dict(), tmp_path / "state.pt")
    size = (tmp_path / "state.pt").stat().st_size
    assert size < bank.nbytes + 20_000, "every tensor is written once"
    pickled = pickle.loads(pickle.dumps(bank))
    walk(pickled, q, k, v, None, 101, 120)
    later, deep = pickled.fork(), copy.deepcopy(bank)  # a copy after steps holds what they took in
    want = walk(bank, q, k, v, None, 101, 160)
    assert torch.equal(walk(later, q, k, v, None, 120, 160), want[:, 19:])
    for other in (saved, copied, fork, deep):
        assert torch.equal(walk(other, q, k, v, None, 101, 160), want)
    rows = walk(swapped, *(x.flip(0) for x in (q, k, v)), None, 101, 160)
    assert off_by(rows.flip(0), want) <= 1e-6
    assert (want.abs().amax(dim=(2, 3)) > 0).all()


def test_a_fork_leaves_its_origin_alone():
    q, k, v, _, bank = world(160)
    take_in(bank, k, v, None, 0, 77)
    before = {name: x.clone() for name, x in bank.state_dict()["tensors"].items()}
    walk(bank.fork(), q, k, v, None, 77, 160)
    assert all(torch.equal(x, before[name]) for name, x in bank.state_dict()["tensors"].items())
    assert bank.tokens == 77


def test_a_bank_of_other_gates_is_refused_by_name(tmp_path):
    *_, bank = world(100)
    path = bank.save(tmp_path / "bank.safetensors")
    other = Gates(2, 3, 8)
    with pytest.raises(ValueError, match=r"bank\.safetensors.*bank of gates"):
        KVBank.load(path, other)
    with pytest.raises(ValueError, match="gates="):
        KVBank.empty(bank.budget, other, 2, inv_freq=bank.inv_freq).load_state_dict(bank.state_dict())
    with pytest.raises(ValueError, match="state's rows"):
        KVBank.empty(bank.budget, bank.gates, 3, inv_freq=bank.inv_freq).load_state_dict(bank.state_dict())
    with pytest.raises(FileNotFoundError):
        KVBank.load(tmp_path / "none", bank.gates)
    (tmp_path / "text").write_text("not a bank")
    with pytest.raises(ValueError, match=r"KVBank\.save"):
        KVBank.load(tmp_path / "text", bank.gates)
    layer().save(tmp_path / "layer")
    with pytest.raises(ValueError, match=r"KVBank\.save"):
        KVBank.load(tmp_path / "layer", bank.gates)


# looking


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_contents_are_what_the_parallel_pass_reads(drop):
    q, k, v, keep, bank = world(140, drop=drop)
    take_in(bank, k, v, keep, 0, 90)
    walk(bank, q, k, v, keep, 90, 140)
    gate_of_key = parallel(bank, q, k, v, keep).gate_of_key
    for batch in range(2):
        kept = [t for t in range(140) if keep is None or keep[batch, t]]
        start = (len(kept) - 1) // bank.budget.block * bank.budget.block
        edge = max(0, start - bank.budget.window)
        for group in range(2):
            view = bank.contents(batch, group)
            assert view.window == tuple(kept[edge:])
            assert view.anchors == tuple(kept[: min(edge, bank.anchors)])
            assert (view.tokens_seen, view.tokens_kept, view.notes) == (140, len(kept), True)
            for gate in view.gates:
                mine = [t for t in kept[bank.anchors : edge] if gate_of_key[batch, t, group] == gate.gate]
                assert gate.ring == tuple(mine[: -bank.ring - 1 : -1])
                assert (gate.count, gate.summarised) == (len(mine), max(0, len(mine) - bank.ring))


def test_bad_input_is_named():
    q, k, v, _, bank = world(50)
    one = [x[:, :1] for x in (q, k, v)]
    with pytest.raises(ValueError, match="planned for at most 50"):
        bank.extend(*qkv(51)[1:])
    assert bank.tokens == 0
    with pytest.raises(ValueError, match="q has 2 tokens"):
        bank.step(*(x[:, :2] for x in (q, k, v)))
    with pytest.raises(ValueError, match="k has 1 sequences"):
        bank.step(*(x[:1] for x in one))
    with pytest.raises(TypeError, match="keep="):
        bank.step(*one, keep=torch.ones(2, 1))
    with pytest.raises(ValueError, match="awake has shape"):
        bank.step(*one, awake=torch.ones(2, 1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="v has shape"):
        bank.extend(k, v[:, 1:])
    for name, call in {
        "batch=": lambda: KVBank.empty(bank.budget, bank.gates, 0, inv_freq=None),
        "budget=": lambda: KVBank.empty(None, bank.gates, inv_freq=None),
        "gates=": lambda: KVBank.empty(bank.budget, None, inv_freq=None),
        "dtype=": lambda: KVBank.empty(bank.budget, bank.gates, inv_freq=None, dtype=torch.int8),
        "inv_freq": lambda: KVBank.empty(bank.budget, bank.gates, inv_freq=torch.ones(3)),
        "group=": lambda: bank.contents(0, 2),
    }.items():
        with pytest.raises((TypeError, ValueError), match=name):
            call()


def test_bad_states_are_named():
    attn, x = layer(), torch.randn(2, 40, 32)
    with pytest.raises(ValueError, match="tokens=None"):
        layer(flux_alpha=0.5).new_state(2)
    with pytest.raises(ValueError, match="tokens=39"):
        attn.prefill(x, 39)
    with pytest.raises(TypeError, match="state="):
        attn.decode(x, None)
    with pytest.raises(ValueError, match="another layer"):
        attn.decode(x, layer().new_state(2))
    with pytest.raises(ValueError, match="at most 45"):
        attn.decode(x[:, :6], attn.prefill(x, 45)[1])
    with pytest.raises(ValueError, match="training=True"):
        attn.train().decode(x, attn.new_state(2))


def test_states_that_are_none_are_named(tmp_path):
    *_, bank = world(50)
    for state in ({}, None, {"about": bank.state_dict()["about"], "tensors": {}}):
        with pytest.raises(ValueError, match="not what state_dict gave"):
            bank.load_state_dict(state)
    path = bank.save(tmp_path / "bank.safetensors")
    with pytest.raises(TypeError, match="gates=NoneType"):
        KVBank.load(path, None)
    whole = path.read_bytes()
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="bank.safetensors"):
            KVBank.load(path, bank.gates)
