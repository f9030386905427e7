"""The bank against the parallel pass: the same rows, in memory that does not grow."""

import os
from dataclasses import replace

import pytest
import torch
from banks import parallel, part, take_in, walk, world
from helpers import layer, off_by
from hypothesis import given, settings
from hypothesis import strategies as st

from proteus_playground.attention import ENDLESS, KVBank, rotate
from proteus_playground.attention.bank import bank as bank_file
from proteus_playground.attention.int8 import error_bound

ALPHA = st.sampled_from([0.0, 0.3, 0.7, 1.0, None])
DELTA = st.sampled_from([0.0, 0.5, 0.8, 1.0])
few = settings(max_examples=int(os.environ.get("PROTEUS_EXAMPLES", 40)) // 2, deadline=None)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


# the same rows


@few
@given(
    tokens=st.integers(1, 160),
    cut=st.floats(0, 1),
    alpha=ALPHA,
    delta=DELTA,
    notes=st.booleans(),
    most=st.sampled_from([None, 1, 2]),
    fill=st.booleans(),
    drop=st.sampled_from([0.0, 0.5]),
    size=st.sampled_from([12, 30, 60]),
    heads=st.sampled_from([2, 4, 6]),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_the_parallel_pass(tokens, cut, alpha, delta, notes, most, fill, drop, size, heads, seed):
    q, k, v, keep, bank = world(
        tokens, heads=heads, drop=drop, seed=seed, flux_alpha=alpha, dna_fraction=delta, notes=notes, max_notes=most,
        shortlist=size, nearest_gates=fill,
    )  # fmt: skip
    want, start = parallel(bank, q, k, v, keep).out, int(cut * tokens)
    take_in(bank, k, v, keep, 0, start)
    assert off_by(walk(bank, q, k, v, keep, start, tokens), want[:, start:]) <= 1e-5


@few
@given(
    tokens=st.integers(1, 160),
    cut=st.floats(0, 1),
    alpha=ALPHA,
    delta=DELTA,
    drop=st.sampled_from([0.0, 0.5]),
    heads=st.sampled_from([2, 6]),
    seed=st.integers(0, 99),
)
def test_many_steps_at_once_are_steps_one_by_one(tokens, cut, alpha, delta, drop, heads, seed):
    q, k, v, keep, bank = world(tokens, heads=heads, drop=drop, seed=seed, flux_alpha=alpha, dna_fraction=delta)
    start = min(int(cut * tokens), tokens - 1)
    take_in(bank, k, v, keep, 0, start)
    single = bank.fork()
    want = walk(single, q, k, v, keep, start, tokens)
    assert off_by(bank.steps(*(x[:, start:] for x in (q, k, v)), keep=part(keep, start, tokens)), want) <= 1e-5
    assert [bank.contents(b, g) for b in (0, 1) for g in (0, 1)] == [
        single.contents(b, g) for b in (0, 1) for g in (0, 1)
    ]


def test_past_every_rings_wrap_around(device):
    q, k, v, keep, bank = world(400, device, drop=0.2)
    want = parallel(bank, q, k, v, keep).out
    assert off_by(walk(bank, q, k, v, keep, 0, 400), want) <= 1e-5
    assert int(bank.retired.min()) > 3 * bank.ring and bank.ring >= 2


@few
@given(
    tokens=st.integers(1, 120),
    cut=st.floats(0, 1),
    alpha=ALPHA,
    rho=st.sampled_from([0.4, 1.0]),
    route=st.sampled_from(
        [
            {},
            {"route_heads": False},
            {"heads_awake_max": 1},
            {"head_top_p": 0.6, "bias": True},
            {"n_heads": 32, "heads_awake_max": 2, "gates_per_group": 16},  # projected head by head
        ]
    ),
)
def test_layer_decodes_what_it_computes(tokens, cut, alpha, rho, route):
    attn = layer(flux_alpha=alpha, keep_ratio=rho, dense_below=40, shortlist_from=100, **route)
    x, start = torch.randn(3, tokens, 32), int(cut * tokens)
    want, stats = attn(x, return_stats=True)
    y, state = attn.prefill(x[:, :start], tokens) if start else (x[:, :0], attn.new_state(3, tokens))
    assert start == 0 or off_by(y, want[:, :start]) <= 1e-5
    at = (start + tokens) // 2
    pieces = [x[:, start:at], *x[:, at:].split(1, dim=1)]  # several tokens at once, then one by one
    y = torch.cat([x[:, :0], *(attn.decode(piece, state) for piece in pieces if piece.shape[1])], dim=1)
    assert start == tokens or off_by(y, want[:, start:]) <= 1e-5
    assert torch.equal(state.count, stats.kept.sum(1)) and torch.all(state.seen == tokens)


@pytest.mark.parametrize("alpha", [1.0, None])
def test_endless_state_gives_the_rows_of_any_longer_text(alpha):
    attn = layer(flux_alpha=alpha, dense_below=40, shortlist_from=100)
    x = torch.randn(2, 300, 32)
    y, state = attn.prefill(x[:, :20])
    assert off_by(torch.cat((y, attn.decode(x[:, 20:], state)), dim=1), attn(x)) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rho", [0.4, 1.0])
def test_padded_sequences_decode_as_they_would_alone(side, rho):
    attn = layer(keep_ratio=rho)
    lengths, wide, new = (70, 41, 1), 70, 40
    texts = [torch.randn(1, n + new, 32) for n in lengths]
    x = torch.full((3, wide, 32), torch.nan)
    mask, at = torch.ones(3, wide, dtype=torch.bool), torch.zeros(3, wide, dtype=torch.long)
    for i, n in enumerate(lengths):
        real = slice(wide - n, None) if side == "left" else slice(n)
        x[i, real], mask[i, real], at[i, real] = texts[i][0, :n], False, torch.arange(n)
    _, state = attn.prefill(x, positions=at, key_padding_mask=mask)
    y = attn.decode(torch.cat([text[:, n:] for text, n in zip(texts, lengths, strict=True)]), state)
    for i, n in enumerate(lengths):
        alone = attn.prefill(texts[i])[0]
        assert off_by(y[i], alone[0, n:]) <= 1e-5


def test_a_sequence_that_has_ended_stays_as_it_is():
    attn = layer()
    x, ended = torch.randn(2, 80, 32), torch.zeros(2, 40, dtype=torch.bool)
    ended[1] = True
    _, state = attn.prefill(x[:, :40])
    before = state.contents(1)
    y = attn.decode(x[:, 40:], state, key_padding_mask=ended)
    after = state.contents(1)
    assert y[1].abs().max() == 0 and y[0].abs().min(dim=-1).values.max() > 0
    assert replace(after, tokens_seen=before.tokens_seen) == before


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_extend_is_many_is_steps(drop, alpha):
    q, k, v, keep, whole = world(211, drop=drop, flux_alpha=alpha)
    parts, steps, one_piece = whole.fork(), whole.fork(), whole.fork()
    take_in(whole, k, v, keep, 0, 211)
    edges = (0, 1, 9, 60, 61, 200, 211)
    for a, b in zip(edges, edges[1:], strict=False):
        take_in(parts, k, v, keep, a, b)
    walk(steps, q, k, v, keep, 0, 211)
    one_piece.extend(k[:, :100], v[:, :100], keep=part(keep, 0, 100), positions=torch.arange(100))
    one_piece.extend(k[:, 100:], v[:, 100:], keep=part(keep, 100, 211))
    for other in (parts, steps, one_piece):
        for batch in range(2):
            for group in range(2):
                assert other.contents(batch, group) == whole.contents(batch, group)
        assert off_by(other.sums, whole.sums) <= 1e-6 and torch.equal(other.next_position, whole.next_position)
        here = slice(0, 211) if alpha == 0 else slice(0, -1)  # the spare slot holds nothing
        full = whole.token[:, :, here] >= 0
        assert torch.equal(other.rows[:, :, here][full], whole.rows[:, :, here][full])


@pytest.mark.parametrize("piece, drop", [(10_000, 0.0), (37, 0.3)])  # piece: tokens that a bank takes in at a time
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"notes": False},
        {"dna_fraction": 0.0},  # no rings and no notes
        {"ring": 0, "probes": 0, "ring_reads": 0},  # notes alone
        {"nearest_gates": True, "max_notes": 2},
        {"int8": True},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"flux_alpha": 0.0},
    ],
    ids=str,
)
def test_each_key_lies_where_single_steps_put_it(monkeypatch, device, kind, piece, drop):
    budget_of = {name: value for name, value in kind.items() if name in ("ring", "probes", "ring_reads")}
    made_of = {name: value for name, value in kind.items() if name in ("dtype", "int8")}
    changes = {name: value for name, value in kind.items() if name not in budget_of | made_of}
    q, k, v, keep, like = world(300, device, drop=drop, **changes)
    q, k, v = (x.to(kind.get("dtype", torch.float32)) for x in (q, k, v))
    budget = replace(like.budget, **budget_of)
    steps = KVBank.empty(budget, like.gates, 2, inv_freq=like.inv_freq, **made_of)
    whole, parts = steps.fork(), steps.fork()
    monkeypatch.setattr(bank_file, "NUMBERS_PER_STEP", piece * (steps.rows[:, :, 0].numel() + steps.retired.numel()))
    walk(steps, q, k, v, keep, 0, 300)
    take_in(whole, k, v, keep, 0, 300)
    take_in(parts, k, v, keep, 0, 41)
    walk(parts, q, k, v, keep, 41, 58)
    take_in(parts, k, v, keep, 58, 60)
    take_in(parts, k, v, keep, 60, 300)
    if budget.dense:
        steps.grow(whole.window)
    assert budget.dense or int(steps.retired.min()) > 3 * budget.ring
    for other in (whole, parts):
        here = steps.token >= 0
        for name in ("token", "retired", "count", "seen", "next_position"):
            assert torch.equal(getattr(other, name), getattr(steps, name)), name
        for name in ("gate", "rows") + ("scales",) * steps.int8:
            mine, theirs = getattr(other, name)[here], getattr(steps, name)[here]
            rounding = 0 if device == "cpu" or name == "gate" else 1e-2 if mine.element_size() == 2 else 1e-6
            assert off_by(mine, theirs) <= rounding, name  # on a GPU another kernel rotates single keys
        assert off_by(other.sums, steps.sums) <= 1e-6 and not other.rows[:, :, -1].any()


def test_a_filled_bank_is_the_same_bits_in_every_run(device):
    _, k, v, keep, bank = world(5000, device, drop=0.1)
    twin = bank.fork()
    for other in (bank, twin):
        take_in(other, k, v, keep, 0, 3000)
        take_in(other, k, v, keep, 3000, 5000)
    for name in ("sums", "rounding_error", "token", "retired", "rows"):
        assert torch.equal(getattr(bank, name), getattr(twin, name)), name


def test_long_sums_stay_exact():
    """60,000 keys in pieces and blocks: the sums are off by no more than float32 rounds."""
    _, k, v, _, bank = world(60_000, batch=1)
    take_in(bank, k, v, None, 0, 50_000)
    walk(bank, k.repeat_interleave(2, 2), k, v, None, 50_000, 50_500)
    turned = rotate(k, torch.arange(60_000), bank.inv_freq)
    gone = max(bank.contents().gates[0].ring) + 1
    rows, gate = torch.stack((turned, v), 3)[0].double(), bank.gates.lure(k)[0][0]
    first = min(bank.contents().window)
    assert gone <= first
    for g in range(2):
        for c in range(3):
            mine = (gate[:, g] == c).nonzero()[:, 0]
            mine = mine[(mine >= bank.anchors) & (mine < first)]
            assert int(bank.retired[0, g, c]) == len(mine)
            for which, members in enumerate((mine, mine[: -bank.ring])):
                assert off_by(bank.sums[0, g, which, c], rows[members, g].sum(0)) <= 1e-5


def test_a_long_past_does_not_round_the_present_away():
    q, k, v, _, bank = world(600, batch=1)
    take_in(bank, k, v, None, 0, 100)
    late = bank.fork()
    late.sums += 2.0**24  # whole numbers are all that float32 still holds
    for other in (bank, late):
        for start in range(100, 600, 10):
            take_in(other, k, v, None, start, start + 10)
    moved = late.sums.double() - late.rounding_error - 2.0**24
    assert off_by(moved, bank.sums) <= 0.05  # 0.02; without the carry 0.15


# int8


@pytest.mark.parametrize("delta", [0.3, 0.8])
def test_int8_is_the_parallel_pass_in_int8_and_near_float(delta):
    q, k, v, keep, bank = world(200, drop=0.2, int8=True, dna_fraction=delta)
    *_, plain = world(200, dna_fraction=delta)
    take_in(bank, k, v, keep, 0, 90)
    take_in(plain, k, v, keep, 0, 90)
    out, exact = walk(bank, q, k, v, keep, 90, 200), walk(plain, q, k, v, keep, 90, 200)
    want = parallel(bank, q, k, v, keep, int8=True).out[:, 90:]
    assert off_by(out, want) <= 1e-5
    turned = (rotate(x, torch.arange(200), bank.inv_freq) for x in (q, k))
    bound = error_bound(*turned, v, bank.scale)
    assert 0 < (out - exact).abs().max() <= bound
    assert bank.rows.nbytes * 4 == plain.rows.nbytes and bank.nbytes < plain.nbytes


def test_int8_layer():
    attn = layer(int8=True)
    x = torch.randn(2, 150, 32)
    y, state = attn.prefill(x[:, :50])
    assert state.int8 and off_by(torch.cat((y, attn.decode(x[:, 50:], state)), dim=1), attn(x)) <= 1e-5


# odds


def test_state_made_under_inference_mode_steps_outside_it():
    attn = layer()
    x = torch.randn(1, 60, 32)
    with torch.inference_mode():
        _, state = attn.prefill(x[:, :30], 60)
        fork = state.fork()
    assert torch.equal(attn.decode(x[:, 30:], state), attn.decode(x[:, 30:], fork))


def test_nan_in_padding_or_dropped_tokens_reaches_no_row():
    q, k, v, keep, bank = world(150, drop=0.3)
    clean = bank.fork()
    take_in(clean, k, v, keep, 0, 70)
    want = walk(clean, q, k, v, keep, 70, 150)
    for x in (q, k, v):
        x[~keep] = torch.nan
    take_in(bank, k, v, keep, 0, 70)
    assert torch.equal(walk(bank, q, k, v, keep, 70, 150), want)


def test_autocast_and_half_banks():
    attn = layer()
    x = torch.randn(1, 100, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = attn.prefill(x[:, :50])
        y = torch.cat((y, attn.decode(x[:, 50:], state)), dim=1)
        want = attn(x)
    assert off_by(y, want) <= 0.03
    half = attn.to(torch.bfloat16)
    y, state = half.prefill(x[:, :50].bfloat16())
    assert state.rows.dtype == torch.bfloat16 and state.sums.dtype == torch.float32
    assert off_by(torch.cat((y, half.decode(x[:, 50:].bfloat16(), state)), dim=1), want) <= 0.05


def test_cuda_graph_replays_steps():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    q, k, v, _, bank = world(200, "cuda")
    bank.budget = replace(bank.budget, tokens=ENDLESS)
    now = [x[:, :1].clone() for x in (q, k, v)]
    want = walk(bank.fork(), q, k, v, None, 0, 200)
    bank.fork().step(*now)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bank.step(*now)
    for t in range(200):
        for x, home in zip((q, k, v), now, strict=True):
            home.copy_(x[:, t : t + 1])
        graph.replay()
        assert off_by(out, want[:, t : t + 1]) <= 1e-5
