"""The Triton backend against the oracle: on a GPU as it is, elsewhere in Triton's interpreter at small sizes."""

import dataclasses

import pytest
import torch
from helpers import attend, check_overflow, config, layer, off_by, qkv
from torch.utils.checkpoint import checkpoint

from proteus_playground.attention import Gates, plan_budget
from proteus_playground.attention.backends import dispatch
from proteus_playground.attention.int8 import error_bound, quantize_rows, through_int8

pytest.importorskip("triton", reason="Triton is not installed for this system")

from proteus_playground.attention.backends.fused import operators, pieces  # noqa: E402
from proteus_playground.attention.backends.fused.plan import make_plan  # noqa: E402
from proteus_playground.attention.backends.fused.tables import make_store  # noqa: E402
from proteus_playground.attention.fast_paths import attend_in_pieces  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU")
# A tile of the interpreter takes milliseconds, so it gets few of them.
LENGTH = 250 if GPU else 60
PARTS = {"segment": 64, "chunk": 64}  # at most, of a plan
HEADS, GROUPS = (4, 2) if GPU else (2, 1)
LOW = [torch.float16, *([torch.bfloat16] if GPU else [])]  # the interpreter is silently wrong in bfloat16


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """In the interpreter a chunk takes as long as a full one however few keys it holds, so chunks are small."""
    if not GPU:
        for module in (operators, pieces):
            monkeypatch.setattr(module, "make_plan", in_small_parts)
        check_overflow(monkeypatch, False)


def in_small_parts(sizes):
    return dataclasses.replace(make_plan(sizes), **PARTS)


@pytest.fixture(autouse=True)
def poison():
    """New memory holds NaN, so that an element that was never written makes a test fail."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def small(**changes):
    """A calibrated layer with as many heads as the backend runs quickly here."""
    return layer(**{"device": DEVICE, "n_heads": HEADS, "n_kv_heads": GROUPS, "shortlist": 40, **changes})


def both(tokens, dtype=torch.float32, heads=HEADS, groups=GROUPS, dim=16, batch=1, keep=None, awake=None, grad=True,
         planned=300, **changes):  # fmt: skip
    """(out, gradients) of the oracle and of the kernels, on the same inputs."""
    cfg = config(n_heads=heads, n_kv_heads=groups, head_dim=dim, d_model=heads * dim, **changes)
    q, k, v = qkv(tokens, heads, groups, dim, batch, device=DEVICE, dtype=dtype, grad=grad)
    gates = Gates(groups, cfg.gates_per_group, dim).to(DEVICE).fit(k.detach().float())
    pull = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q)
    found = []
    for backend in ("reference", "triton"):
        got = attend(q, k, v, cfg, backend, gates, keep=keep, awake=awake, return_lse=True, tokens=planned)
        found.append((got, torch.autograd.grad((got.out * pull).sum(), (q, k, v)) if grad else ()))
    assert found[1][0].backend == "triton"
    return found


def agree(oracle, ours, tolerance, awake=True):
    assert torch.equal(ours[0].reads, oracle[0].reads)
    assert torch.equal(ours[0].gate_of_key, oracle[0].gate_of_key)
    assert off_by(ours[0].out, oracle[0].out) <= tolerance
    live = oracle[0].lse.isfinite() & awake
    assert torch.equal(live, ours[0].lse.isfinite() & awake)
    assert (ours[0].lse - oracle[0].lse)[live].abs().max() <= max(1e-4, 10 * tolerance)
    for a, b in zip(ours[1], oracle[1], strict=True):
        assert a.dtype == b.dtype and (off_by(a, b) <= 2 * tolerance or (a - b).abs().max() <= 1e-5)


@pytest.mark.parametrize("tokens", [1, 17, 70, *([63, 111, 300, 1025] if GPU else [])])
def test_odd_lengths(tokens, monkeypatch):
    check_overflow(monkeypatch, True)
    agree(*both(tokens, shortlist=32, planned=2000), 1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"dna_fraction": 0.0},
        {"dna_fraction": 0.0, "n_anchors": 0},
        {"dna_fraction": 0.8},
        {"notes": False},
        {"probes": 1},
        {"probes": 4},
        {"flux_alpha": 0.6},
        {"rope_theta": None},
        {"gates_per_group": 1, "probes": 1, "route_heads": False},
        {"shortlist": 5},
        *([{"max_notes": 2}] if GPU else []),
        {"probes": 6, "nearest_gates": True},
        {"probes": 16, "nearest_gates": True, "gates_per_group": 40, "dna_fraction": 0.7},
    ],
    ids=str,
)
def test_every_shape_of_shortlist(changes):
    agree(*both(LENGTH, **{"shortlist": 40, **changes}), 1e-5)


def test_equal_gates_are_taken_in_order():
    """Pairs of equal prototypes, and queries that match all gates alike."""
    cfg = config(
        n_heads=HEADS, n_kv_heads=GROUPS, head_dim=16, shortlist=32, probes=5, nearest_gates=True, gates_per_group=20
    )
    q, k, v = qkv(LENGTH, HEADS, GROUPS, 16, device=DEVICE, batch=1)
    q[:, -20:] = 0
    gates = Gates(GROUPS, 20, 16).to(DEVICE).fit(k)
    gates.prototypes[:, 1::2] = gates.prototypes[:, ::2]
    gates.alive[:, 3] = False
    oracle, ours = (attend(q, k, v, cfg, name, gates) for name in ("reference", "triton"))
    assert torch.equal(ours.reads, oracle.reads) and off_by(ours.out, oracle.out) <= 1e-5


@pytest.mark.parametrize(
    ("heads", "groups", "batch"), [(1, 1, 1), (3, 1, 2), (4, 2, 1), (4, 4, 1) if GPU else (2, 2, 1)]
)
def test_grouped_heads_and_batches(heads, groups, batch):
    agree(*both(LENGTH, heads=heads, groups=groups, batch=batch, shortlist=40), 1e-5)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256] if GPU else [32, 80])
def test_low_precision_and_head_dims(dtype, dim):
    """Judged against the oracle in float32 on the same rounded inputs: a few roundings of the dtype."""
    oracle, ours = both(700 if GPU else LENGTH, dtype, heads=2, groups=1, dim=dim, shortlist=48, planned=700)
    agree(oracle, ours, 4 * torch.finfo(dtype).eps)


def test_dropped_tokens_padding_and_sleeping_heads():
    gen = torch.Generator().manual_seed(3)
    keep = torch.rand(2, LENGTH, generator=gen) > 0.4
    keep[1, LENGTH - 30 :] = False
    awake = torch.rand(2, LENGTH, HEADS, generator=gen) > 0.3
    keep, awake = keep.to(DEVICE), awake.to(DEVICE)
    oracle, ours = both(LENGTH, batch=2, keep=keep, awake=awake, shortlist=28)
    agree(oracle, ours, 1e-5, awake)
    assert not ours[0].out[~keep].any()


def test_a_batch_of_nothing_but_padding():
    keep = torch.ones(2, 60, dtype=torch.bool, device=DEVICE)
    keep[1] = False
    oracle, ours = both(60, batch=2, keep=keep, shortlist=20)
    agree(oracle, ours, 1e-5)


@pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU: too long for the interpreter")
@pytest.mark.parametrize("heads", [(8, 2), (8, 8), (9, 3)])
def test_long_texts_agree_with_the_torch_backend(heads):
    """Several segments, pieces and ring wraps, where the oracle's mask would not fit."""
    H, G = heads
    cfg = config(n_heads=H, n_kv_heads=G, head_dim=64, d_model=H * 64, shortlist=256, gates_per_group=32)
    q, k, v = qkv(9001, H, G, 64, 1, device=DEVICE, dtype=torch.float32, grad=True)
    gates = Gates(G, 32, 64).to(DEVICE).fit(k.detach())
    pull = torch.randn_like(q)
    found = []
    for backend in ("torch", "triton"):
        got = attend(q, k, v, cfg, backend, gates)
        found.append((got.out, *torch.autograd.grad((got.out * pull).sum(), (q, k, v))))
        assert got.backend == backend
    for a, b in zip(*found, strict=True):
        assert off_by(b, a) <= 1e-4


def test_backward_gives_the_same_bits_each_time():
    q, k, v = qkv(LENGTH, HEADS, GROUPS, 16, grad=True, device=DEVICE, batch=1)
    cfg = config(n_heads=HEADS, n_kv_heads=GROUPS, head_dim=16, shortlist=32)
    gates = Gates(GROUPS, 6, 16).to(DEVICE).fit(k.detach())
    runs = [torch.autograd.grad(attend(q, k, v, cfg, "triton", gates).out.square().sum(), (q, k, v)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# the layer


LAYERS = [{}, {"route_heads": False}, {"head_top_p": 0.6}, {"n_kv_heads": HEADS}, {"bias": True}]


@pytest.mark.parametrize("changes", LAYERS)
def test_the_layer_piece_by_piece(changes, monkeypatch):
    """One matmul and fused routing, whole or in pieces, against the plain path of the `torch` backend."""
    attn = small(backend="torch", **changes)
    x = torch.randn(1, 150, 32, device=DEVICE)
    with torch.no_grad():
        plain = attn(x)
        attn.cfg = dataclasses.replace(attn.cfg, backend="triton")
        assert attn._fits_pieces(x, plan_budget(attn.cfg, 150))
        assert off_by(attn(x), plain) <= 1e-5
        budget = plan_budget(attn.cfg, 150)
        monkeypatch.setattr(pieces, "make_plan", in_small_parts)
        assert off_by(attend_in_pieces(attn, x, None, budget, piece=128), plain) <= 1e-5


@pytest.mark.parametrize("changes", [{}, {"heads_awake_max": 1}, {"keep_ratio": 0.6}, {"flux_alpha": 0.5}])
def test_a_training_step(changes):
    """Every parameter's gradient is the `torch` backend's."""
    found = []
    for backend in ("torch", "triton"):
        attn = small(backend=backend, **changes).train()
        x = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        attn(x).square().sum().backward()
        found.append({n: p.grad for n, p in attn.named_parameters()})
    for name, grad in found[0].items():  # one head awake has weight 1: the router's gradient is rounding, about 1e-6
        assert off_by(found[1][name], grad) <= 1e-4 or (found[1][name] - grad).abs().max() <= 1e-5, name


def test_checkpoint_gives_the_same_gradients():
    attn = small(backend="triton")
    x = torch.randn(1, 50, 32, device=DEVICE, requires_grad=True)
    grads = [
        torch.autograd.grad(run(x).square().sum(), x)[0]
        for run in (attn, lambda x: checkpoint(attn, x, use_reentrant=False))
    ]
    assert torch.equal(*grads)


def test_compile_traces_it_whole():
    attn = small(backend="triton", route_heads=False)
    x = torch.randn(1, 50, 32, device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(attn, backend="inductor" if GPU else "aot_eager", fullgraph=True)
    y, z = attn(x), compiled(x)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, z)]
    assert off_by(z, y) <= 1e-5 and off_by(grads[1], grads[0]) <= 1e-4


def test_torch_func_is_refused_by_name_and_served_by_tiles():
    attn, x = layer(device=DEVICE, backend="triton", shortlist=40), torch.randn(1, 50, 32, device=DEVICE)
    with pytest.raises(ValueError, match="backend='triton': torch.func"):
        torch.func.grad(lambda x: attn(x).square().sum())(x)
    with attn.settings(backend="auto"):
        grad = torch.func.grad(lambda x: attn(x).square().sum())(x)
    x.requires_grad_()
    assert off_by(grad, torch.autograd.grad(attn(x).square().sum(), x)[0]) <= 1e-4


@gpu
def test_cuda_graph_replays_on_new_input():
    attn = small(backend="triton")
    x = torch.randn(1, 500, 32, device=DEVICE)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            attn(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = attn(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert off_by(y, attn(x)) <= 1e-6


@gpu
@pytest.mark.parametrize("training", [False, True])
def test_nothing_waits_for_the_host(training):
    attn = small(backend="triton")
    x = torch.randn(1, 500, 32, device=DEVICE, requires_grad=training)
    with torch.set_grad_enabled(training):
        attn(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = attn(x)
            if training:
                y.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_grouped_projections_on_the_device():
    """Many heads, few awake, in bfloat16: PyTorch's grouped matmul, forward and backward, against float32 pieces."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        attn = layer(device=DEVICE, n_heads=64, n_kv_heads=8, head_dim=16, heads_awake_max=2, gates_per_group=8)
        attn.to(dtype)
        x = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16).to(dtype)
        x.requires_grad_()
        y = attn(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), (x, attn.q_proj.weight, attn.o_proj.weight))))
    for exact, ours in zip(*found, strict=True):  # a rounding may wake another head for a token or two
        assert off_by(ours, exact) <= 0.1


# int8


def test_int8_stays_within_its_bound():
    cfg = config(n_heads=HEADS, n_kv_heads=GROUPS, head_dim=16, shortlist=32)
    q, k, v = qkv(LENGTH, HEADS, GROUPS, 16, device=DEVICE, batch=1)
    gates = Gates(GROUPS, 6, 16).to(DEVICE).fit(k)
    exact, ours, slow = (attend(q, k, v, cfg, b, gates, int8=i).out for b, i in
                         (("reference", False), ("triton", True), ("torch", True)))  # fmt: skip
    assert off_by(ours, slow) <= 1e-4  # two devices may round a rotated feature to neighbouring steps
    worst = (ours - exact).abs().max()
    assert 1e-4 < worst <= error_bound(q, k, v, 16**-0.5)


def test_int8_rows_are_within_half_a_step_and_half_the_size():
    x = torch.randn(300, 64).half()
    stored, scale = quantize_rows(x)
    assert ((through_int8(x.float()) - x.float()).abs() <= scale[:, None] * 0.501).all()
    store = make_store(1, 300, 2, 64, torch.float16, "cpu", True)
    full = make_store(1, 300, 2, 64, torch.float16, "cpu", False)
    size = [sum(t.nbytes for t in s[:4]) for s in (store, full)]
    assert size[0] / size[1] == (64 + 4) / 128
    assert stored.dtype == torch.int8


def test_int8_has_no_gradient():
    q, k, v = qkv(100, grad=True, device=DEVICE)
    with pytest.raises(ValueError, match="int8=True.*no gradient"):
        attend(q, k, v, config(), "triton", int8=True)


# who may use it


@pytest.mark.parametrize(("capability", "fits"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_turing_is_refused_with_a_reason(monkeypatch, capability, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    dispatch.probe_triton.cache_clear()
    try:
        name, why = dispatch.choose_backend("cuda")
        assert name == ("triton" if fits else "torch")
        if not fits:
            assert "sm_75" in why and "without tensor cores" in why
            with pytest.raises(ValueError, match="backend='triton'.*sm_75.*'torch'"):
                dispatch.choose_backend("cuda", "triton")
    finally:
        dispatch.probe_triton.cache_clear()


def test_without_a_gpu_it_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch.probe_triton.cache_clear()
    try:
        assert dispatch.choose_backend("cpu")[0] == "torch"
        with pytest.raises(ValueError, match="needs an NVIDIA or AMD GPU"):
            dispatch.choose_backend("cpu", "triton")
        with pytest.raises(ValueError, match="head_dim=512"):
            dispatch.choose_backend("cpu", "triton", head_dim=512)
    finally:
        dispatch.probe_triton.cache_clear()
