"""The invariants of the design: what must hold for any length, alpha, keep ratio and DNA fraction."""

import copy
import dataclasses
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import attend, config, layer, off_by, qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from proteus_playground import ProteusAttention
from proteus_playground.attention import Gates, plan_budget, proteus_attention, rope_frequencies, rotate
from proteus_playground.attention.backends.pytorch.tile import attend_tile
from proteus_playground.attention.backends.pytorch.tiles import attend as torch_attend
from proteus_playground.attention.backends.reference import memberships
from proteus_playground.attention.functional import prepare

ALPHA = st.sampled_from([0.0, 0.3, 0.7, 1.0])
DELTA = st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0])
RHO = st.sampled_from([0.4, 0.8, 1.0])
LENGTH = st.integers(1, 300)
many = settings(max_examples=int(os.environ.get("PROTEUS_EXAMPLES", 40)), deadline=None)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    return request.param


# 1. alpha = 0 is dense attention


@many
@given(tokens=LENGTH, seed=st.integers(0, 99), rho=RHO)
def test_alpha_zero_is_dense(tokens, seed, rho):
    q, k, v = qkv(tokens, seed=seed, grad=True)
    cfg = config(flux_alpha=0.0, keep_ratio=rho)
    ours = attend(q, k, v, cfg).out
    freq, at = rope_frequencies(8, cfg.rope_theta), torch.arange(tokens)
    qr, kr = (rotate(x, at, freq).transpose(1, 2) for x in (q, k))
    kr, vr = (x.repeat_interleave(2, dim=1) for x in (kr, v.transpose(1, 2)))
    dense = F.scaled_dot_product_attention(qr, kr, vr, is_causal=True).transpose(1, 2)
    assert (ours - dense).abs().max() <= 1e-5
    pull = torch.randn_like(dense)
    for a, b in zip(
        torch.autograd.grad((ours * pull).sum(), (q, k, v)),
        torch.autograd.grad((dense * pull).sum(), (q, k, v)),
        strict=True,
    ):
        assert off_by(a, b) <= 1e-5 or (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("route", [False, True])
def test_alpha_zero_layer_is_dense_however_it_is_routed(route):
    attn = layer(route_heads=route, head_top_p=0.5, heads_awake_max=1, keep_ratio=0.5, flux_alpha=0.0)
    x = torch.randn(2, 150, 32)
    y, stats = attn(x, return_stats=True)
    plain = layer(route_heads=False, flux_alpha=0.0)
    plain.load_state_dict({n: t for n, t in attn.state_dict().items() if not n.startswith("router")})
    assert off_by(y, plain(x)) <= 1e-5
    assert stats.heads_awake == 4 and stats.tokens_kept == 300 and stats.backend == "dense"


# 2. nothing after a row can reach it, and neither can its neighbours in the batch


@many
@given(
    tokens=st.integers(2, 300),
    cut=st.floats(0, 1),
    alpha=ALPHA,
    rho=RHO,
    delta=DELTA,
    train=st.booleans(),
    seed=st.integers(0, 99),
)
def test_prefix_invariance(tokens, cut, alpha, rho, delta, train, seed):
    attn = layer(flux_alpha=alpha, keep_ratio=rho, dna_fraction=delta, heads_awake_max=1, head_top_p=0.7).train(train)
    t = min(int(cut * tokens), tokens - 2) + 1
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 32, generator=gen)
    changed = x.clone()
    changed[:, t:] = 5 * torch.randn(2, tokens - t, 32, generator=gen)
    (y, a), (z, b) = copy.deepcopy(attn)(x, return_stats=True), copy.deepcopy(attn)(changed, return_stats=True)
    assert off_by(z[:, :t], y[:, :t]) <= 1e-6
    for name in ("awake", "kept", "reads", "gate_of_key"):
        assert torch.equal(getattr(a, name)[:, :t], getattr(b, name)[:, :t]), name


@many
@given(tokens=st.integers(2, 120), alpha=st.sampled_from([0.5, 1.0]), delta=DELTA, seed=st.integers(0, 99))
def test_prefix_invariance_of_the_very_keys_read(tokens, alpha, delta, seed):
    cfg = config(flux_alpha=alpha, dna_fraction=delta)
    q, k, v = qkv(tokens, seed=seed)
    gates, budget = Gates(2, 6, 8).fit(k), plan_budget(cfg, tokens)
    t = tokens // 2 + 1
    seen = []
    for tail in (0.0, 3.0):
        q2, k2 = q.clone(), k.clone()
        q2[:, t:] += tail
        k2[:, t:] -= tail
        ready = prepare(q2, k2, v, gates, budget, inv_freq=None, positions=None, keep=None)
        if ready.short is None:
            return
        read = memberships(ready.short, 4)
        seen.append((read.direct[:, :, :t], read.notes[:, :, :t]))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert not seen[0][0].triu(1).any()


@many
@given(tokens=LENGTH, alpha=ALPHA, rho=RHO, delta=DELTA)
def test_batch_invariance(tokens, alpha, rho, delta):
    attn = layer(flux_alpha=alpha, keep_ratio=rho, dna_fraction=delta, heads_awake_max=1)
    x = torch.randn(3, tokens, 32)
    together = attn(x)
    for i in range(3):
        assert off_by(attn(x[i : i + 1])[0], together[i]) <= 1e-5


@many
@given(extra=st.integers(1, 80), side=st.sampled_from(["left", "right"]), rho=RHO, delta=DELTA)
def test_padding_changes_nothing(extra, side, rho, delta):
    attn = layer(keep_ratio=rho, dna_fraction=delta)
    x = torch.randn(1, 60, 32)
    pad = 7 * torch.randn(1, extra, 32)
    both = torch.cat((pad, x) if side == "left" else (x, pad), dim=1)
    mask = torch.ones(1, 60 + extra, dtype=torch.bool)
    real = slice(extra, None) if side == "left" else slice(60)
    mask[:, real] = False
    at = torch.zeros(1, 60 + extra, dtype=torch.long)
    at[:, real] = torch.arange(60)
    padded = attn(both, key_padding_mask=mask, positions=at)
    assert off_by(padded[:, real], attn(x)) <= 1e-5
    assert not padded[mask].any()


# 3. every other backend computes what the oracle says

AGAINST_REFERENCE = ("torch",)  # Triton has tests of its own


@many
@given(
    tokens=LENGTH,
    alpha=st.sampled_from([0.4, 0.8, 1.0]),
    delta=DELTA,
    notes=st.booleans(),
    most=st.sampled_from([None, 1, 3, 5]),
    fill=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    probes=st.integers(1, 4),
    size=st.integers(4, 64),
    keep=st.booleans(),
    seed=st.integers(0, 99),
    backend=st.sampled_from(AGAINST_REFERENCE),
)
def test_a_backend_agrees_with_the_reference(
    tokens, alpha, delta, notes, most, fill, heads, probes, size, keep, seed, backend
):
    H, G = heads
    cfg = config(
        n_heads=H, n_kv_heads=G, flux_alpha=alpha, dna_fraction=delta, notes=notes, max_notes=most, probes=probes,
        shortlist=size, nearest_gates=fill,
    )  # fmt: skip
    q, k, v = qkv(tokens, H, G, seed=seed, grad=True)
    mask = torch.rand(2, tokens, generator=torch.Generator().manual_seed(seed)) > 0.3 if keep else None
    gates = Gates(G, 6, 8).fit(k.detach(), seed=seed)
    pull = torch.randn_like(q)
    results = []
    for name in ("reference", backend):
        got = attend(q, k, v, cfg, name, gates, keep=mask, return_lse=True)
        results.append((got, torch.autograd.grad((got.out * pull).sum(), (q, k, v))))
    (ours, ours_grad), (oracle, oracle_grad) = results[1], results[0]
    assert off_by(ours.out, oracle.out) <= 1e-5
    assert torch.allclose(ours.lse, oracle.lse, atol=1e-4)
    assert torch.equal(ours.reads, oracle.reads)
    for a, b in zip(ours_grad, oracle_grad, strict=True):  # a row that reads one key has no gradient but rounding
        assert off_by(a, b) <= 1e-4 or (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 63, 111, 300])
def test_torch_backend_in_low_precision(device, dtype, tokens):
    """Judged against the oracle on the same rounded inputs: no worse than dense attention in that precision."""
    cfg = config(n_heads=6, head_dim=32, d_model=192, shortlist=48)
    q, k, v = qkv(tokens, 6, 2, 32, device=device, dtype=dtype)
    gates = Gates(2, 6, 32).to(device).fit(k)
    exact = attend(q.float(), k.float(), v.float(), cfg, "reference", gates).out
    ours = attend(q, k, v, cfg, "torch", gates).out
    assert ours.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert off_by(ours.float(), exact) <= max(4 * eps, 1e-5)


def test_gradients_on_the_device(device):
    cfg = config(shortlist=40)
    q, k, v = qkv(257, grad=True, device=device)
    gates = Gates(2, 6, 8).to(device).fit(k.detach())
    grads = [
        torch.autograd.grad(attend(q, k, v, cfg, b, gates).out.square().sum(), (q, k, v))
        for b in ("reference", "torch")
    ]
    for a, b in zip(*grads, strict=True):
        assert off_by(b, a) <= 1e-4


def test_long_pieces_agree_with_short_ones(monkeypatch):
    """Cutting the work differently changes nothing: every piece boundary is crossed."""
    from proteus_playground.attention.backends.pytorch import keys as torch_keys
    from proteus_playground.attention.backends.pytorch import rings as torch_rings
    from proteus_playground.attention.backends.pytorch import tiles as tiles

    cfg = config(shortlist=32)
    q, k, v = qkv(700)
    gates = Gates(2, 6, 8).fit(k)
    whole = attend(q, k, v, cfg, "torch", gates).out
    monkeypatch.setattr(tiles, "SCORES_PER_STEP", 1 << 9)
    monkeypatch.setattr(torch_keys, "MEAN_ROWS", 1)
    monkeypatch.setattr(torch_rings, "SCORES_PER_STEP", 1)
    with torch.no_grad():
        assert off_by(attend(q, k, v, cfg, "torch", gates).out, whole) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows,keys,dim", [(1, 1, 8), (37, 63, 16), (64, 64, 64), (129, 200, 72)])
def test_fused_tiles_agree_with_composed_ones(device, dtype, rows, keys, dim):
    gen = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(3, 2, n, dim, generator=gen).to(device, dtype) for n in (rows, keys, keys))
    bias = torch.randn(3, 2, rows, keys, generator=gen).to(device, dtype)
    high = torch.randint(1, keys + 1, (3, 2, rows, 1), generator=gen).to(device)  # a row reads up to 5 keys
    at = torch.arange(keys, device=device)
    bias = bias.masked_fill((at >= high) | (at < high - 5), -torch.inf)
    padded = F.pad(bias, (0, -keys % 8))[..., :keys]
    shared = padded[:1, :1].expand_as(padded)
    for mask in (padded, shared, *([None] if rows == keys else [])):
        with torch.no_grad():
            out, lse = attend_tile(q, k, v, mask, 0.3)
        exact, exact_lse = attend_tile(q.double(), k.double(), v.double(), None if mask is None else mask.double(), 0.3)
        assert out.shape == exact.shape and lse.shape == exact_lse.shape and lse.dtype == torch.float32
        eps = max(torch.finfo(dtype).eps, 1e-5)
        assert off_by(out, exact) <= eps and off_by(lse, exact_lse) <= eps


def test_the_torch_backend_never_waits_for_a_device():
    """A tensor without data cannot be asked for its values: whoever asks, fails."""
    cfg = config(shortlist=40)
    q, k, v = qkv(700)
    gates = Gates(2, 6, 8).fit(k)
    short = prepare(q, k, v, gates, plan_budget(cfg, 700), inv_freq=None, positions=None, keep=None).short
    changes = {name: x.to("meta") for name, x in vars(short).items() if isinstance(x, torch.Tensor)}
    out, lse = torch_attend(*(x.to("meta") for x in (q, k, v)), dataclasses.replace(short, **changes), 0.3)
    assert out.shape == q.shape and lse.shape == q.shape[:3]


def test_a_call_on_a_gpu_never_waits_for_it():
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    cfg = config(shortlist=40)
    q, k, v = qkv(700, device="cuda")
    gates, budget = Gates(2, 6, 8).cuda().fit(k), plan_budget(cfg, 700)
    freq = rope_frequencies(8, cfg.rope_theta, "cuda")

    def call():
        return proteus_attention(q, k, v, gates, budget, inv_freq=freq, backend="torch").out

    with torch.no_grad():
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# 4. a row needs nothing but its past: what decoding step by step will repeat


@many
@given(tokens=st.integers(2, 200), alpha=st.sampled_from([0.5, 1.0]), delta=DELTA, row=st.floats(0, 1))
def test_a_row_is_computed_from_its_prefix_alone(tokens, alpha, delta, row):
    cfg = config(flux_alpha=alpha, dna_fraction=delta)
    q, k, v = qkv(tokens)
    gates = Gates(2, 6, 8).fit(k)
    t = int(row * (tokens - 1))
    whole = attend(q, k, v, cfg, "torch", gates)
    alone = attend(q[:, : t + 1], k[:, : t + 1], v[:, : t + 1], cfg, "torch", gates, tokens=tokens)
    assert off_by(alone.out[:, t], whole.out[:, t]) <= 1e-5
    assert torch.equal(alone.reads[:, t], whole.reads[:, t])


# 5. budgets hold


@many
@given(
    tokens=LENGTH,
    alpha=st.floats(0, 1),
    delta=st.floats(0, 1),
    size=st.integers(1, 80),
    anchors=st.integers(0, 8),
    probes=st.integers(1, 6),
    most=st.sampled_from([None, 1, 3, 5]),
    fill=st.booleans(),
)
def test_reads_never_exceed_the_budget(tokens, alpha, delta, size, anchors, probes, most, fill):
    cfg = config(
        flux_alpha=alpha, dna_fraction=delta, shortlist=size, n_anchors=anchors, probes=probes, max_notes=most,
        nearest_gates=fill,
    )  # fmt: skip
    q, k, v = qkv(tokens)
    budget = plan_budget(cfg, tokens)
    reads = attend(q, k, v, cfg).reads
    assert reads.max() <= budget.shortlist
    assert reads.min() >= 1


@many
@given(tokens=LENGTH, low=st.floats(0, 1), high=st.floats(0, 1), size=st.integers(1, 400), rho=st.floats(0.05, 1))
def test_budgets_never_grow_with_alpha(tokens, low, high, size, rho):
    cfg = config(shortlist=size, keep_ratio=rho, heads_awake_max=1, head_top_p=0.6)
    a, b = (plan_budget(cfg, tokens, x) for x in sorted((low, high)))
    for name in ("shortlist", "keep_ratio", "heads_awake_max", "head_top_p"):
        assert getattr(b, name) <= getattr(a, name) + 1e-12, name
    assert b.window + b.block + b.anchors + b.probes * b.ring + b.notes <= b.shortlist


# 6. everything learns


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("wide", [False, True])
def test_every_parameter_gets_a_gradient(alpha, wide):
    shape = {"n_heads": 32, "gates_per_group": 16, "heads_awake_max": 4} if wide else {"heads_awake_max": 2}
    attn = layer(flux_alpha=alpha, bias=True, **shape).train()
    attn(torch.randn(2, 100, 32)).square().sum().backward()
    for name, p in attn.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


# 7. the same result however it is wrapped


@pytest.fixture
def wrapped():
    attn = layer(heads_awake_max=1, head_top_p=0.8, keep_ratio=0.7, shortlist=30)
    x = torch.randn(2, 130, 32)
    return attn, x, attn(x)


def test_save_and_load(wrapped, tmp_path):
    attn, x, y = wrapped
    assert torch.equal(ProteusAttention.load(attn.save(tmp_path / "a.safetensors")).eval()(x), y)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_deepcopy(wrapped):
    attn, x, y = wrapped
    assert torch.equal(copy.deepcopy(attn)(x), y)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rho", [0.7, 1.0])
def test_checkpoint_in_training(reentrant, rho):
    """Recomputing in backward neither sees moved prototypes nor counts the batch twice."""
    one = layer(n_heads=8, heads_awake_max=2, keep_ratio=rho).train()
    two = copy.deepcopy(one)
    for seed in range(3):
        x = torch.randn(2, 90, 32, generator=torch.Generator().manual_seed(seed))
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = one(a), checkpoint(two, b, use_reentrant=reentrant)
        assert off_by(z, y) <= 1e-6  # the reentrant kind runs forward without autograd, where a CPU fuses tiles
        y.square().sum().backward()
        z.square().sum().backward()
        assert off_by(b.grad, a.grad) <= 1e-5
        for name, p in one.named_parameters():
            assert off_by(dict(two.named_parameters())[name].grad, p.grad) <= 1e-5, name
    for name, buffer in one.named_buffers():
        assert torch.equal(dict(two.named_buffers())[name], buffer), name


def test_compile(wrapped):
    attn, x, y = wrapped
    torch._dynamo.reset()
    compiled = torch.compile(attn, backend="aot_eager")
    assert off_by(compiled(x), y) <= 1e-5


def test_autocast(wrapped):
    """Routing, luring and keeping are decided in float32 on what the projections give; values are bf16."""
    attn, x, y = wrapped
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = attn(x)
        torch.nn.functional.linear(x, attn.o_proj.weight[:, :32])
    dense = copy.deepcopy(attn)
    dense.set_flux_alpha(0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = dense(x)
    floor = off_by(rough.float(), dense(x))
    assert off_by(z.float(), y) <= 20 * floor + 0.05


def test_evaluation_never_moves_a_prototype():
    attn = layer()
    before = copy.deepcopy(attn.state_dict())
    attn(torch.randn(2, 80, 32))
    for name, t in attn.state_dict().items():
        assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), name


def test_an_update_waits_for_the_next_training_pass():
    attn = layer().train()
    before = attn.gates.prototypes.clone()
    attn(torch.randn(2, 80, 32))
    assert torch.equal(attn.gates.prototypes, before)
    attn(torch.randn(2, 80, 32))
    assert not torch.equal(attn.gates.prototypes, before)
