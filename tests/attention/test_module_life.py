"""What a module goes through besides a plain pass: other precisions, NaN, inference mode, meta tensors, checkpoints."""

import copy
import pickle

import pytest
import torch
from helpers import attend, config, layer, off_by, qkv
from torch import nn
from torch.utils.checkpoint import checkpoint

from proteus_playground import AttentionConfig, ProteusAttention
from proteus_playground.attention import CausalProteusMultiheadAttention, Gates, rope_frequencies, rotate, surgery
from proteus_playground.attention.bank import KVBank
from proteus_playground.attention.budget import plan_budget

X = torch.randn(2, 90, 32, generator=torch.Generator().manual_seed(3))
KINDS = [{}, {"keep_ratio": 0.6}, {"heads_awake_max": 1}, {"route_heads": False}, {"backend": "reference"}]
BAD = [float("nan"), float("inf"), -float("inf")]


def same_state(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


# -- projections that are adapted, quantised or watched --------------------------------------------------------------

MANY_HEADS = {"n_heads": 32, "gates_per_group": 16, "heads_awake_max": 3}  # queries are projected head by head
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Doubled(nn.Module):
    """As an adapter stands around a linear map: it has that map's weight, and computes something else."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("changes", [{"flux_alpha": 0.0}, {}, MANY_HEADS])
def test_an_adapted_projection_is_called(changes, name):
    adapted, plain = layer(**changes), layer(**changes)
    setattr(adapted, name, Doubled(getattr(adapted, name)))
    getattr(plain, name).weight.data *= 2
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert off_by(adapted(X), plain(X)) <= 1e-5


@pytest.mark.parametrize("changes", [{"flux_alpha": 0.0}, {}, MANY_HEADS])
def test_hooks_of_projections_are_called(changes):
    attn, called = layer(**changes), []
    for name in PROJECTIONS:
        getattr(attn, name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        attn(X)
    assert sorted(called) == sorted(PROJECTIONS)


@pytest.mark.bad_input
def test_what_reads_a_weight_refuses_an_adapted_projection():
    attn = layer()
    trace = attn(X, return_trace=True)[1]
    attn.o_proj = Doubled(attn.o_proj)
    for read in (lambda: attn.head_contributions(trace), lambda: attn.consensus(trace), lambda: surgery.add_head(attn)):
        with pytest.raises(TypeError, match="o_proj is a .*Doubled: must be an nn.Linear"):
            read()


@pytest.mark.bad_input
def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([X[0, :30], X[1]])
    with pytest.raises(ValueError, match="x is a nested tensor: must be"):
        layer()(nested)
    with pytest.raises(ValueError, match="query is a nested tensor: must be"):
        CausalProteusMultiheadAttention(32, 4, batch_first=True)(nested, nested, nested)


# -- what is not finite ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("changes", KINDS)
def test_a_bad_batch_that_is_skipped_leaves_no_trace(changes, bad):
    attn, twin = (layer(**changes).train() for _ in range(2))
    spoilt = X.clone()
    spoilt[0, 50] = bad
    for i in range(4):
        attn(X), twin(X)
        if i == 1:
            assert not attn(spoilt).isfinite().all()
    assert same_state(attn, twin)
    assert attn(X).isfinite().all()


def test_values_that_are_not_finite_leave_no_trace_either():
    attn, twin = layer().train(), layer().train()
    for each in (attn, twin):
        each(X)
    weight = attn.v_proj.weight.detach().clone()
    attn.v_proj.weight.data[0] = torch.nan  # keys stay finite
    assert not attn(X).isfinite().all()
    attn.v_proj.weight.data.copy_(weight)
    attn(X), twin(X)
    assert same_state(attn, twin)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("changes", [*KINDS, {"flux_alpha": 0.0}, {"flux_alpha": 0.5, "bias": True}])
def test_padding_that_is_not_finite_reaches_nothing(changes, bad):
    padding = torch.zeros(2, 90, dtype=torch.bool)
    padding[0, 70:] = padding[1, :15] = True
    spoilt = X.masked_fill(padding[..., None], bad)
    found = []
    for x in (X, spoilt):
        attn, x = layer(**changes).train(), x.clone().requires_grad_()
        y = attn(x, key_padding_mask=padding)
        y.pow(2).sum().backward()
        attn(x, key_padding_mask=padding)
        found.append((y, x.grad, *(p.grad for p in attn.parameters()), *attn.state_dict().values()))
        eval_y, state = attn.eval().prefill(x.detach(), 100, key_padding_mask=padding)
        end = torch.tensor([[False], [True]])
        token = x.detach()[:, :1] if x is X else x.detach()[:, :1].masked_fill(end[..., None], bad)
        found[-1] += (eval_y, attn.decode(token, state, key_padding_mask=end), attn.decode(X[:, :1], state))
    for clean, dirty in zip(*found, strict=True):
        assert clean is dirty or torch.equal(clean.nan_to_num(7), dirty.nan_to_num(7))
    assert found[1][0].isfinite().all() and found[1][1].isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_dropped_queries_keys_and_values_may_hold_anything(backend, alpha):
    q, k, v = qkv(60)
    keep = torch.ones(2, 60, dtype=torch.bool)
    keep[0, 40:] = keep[1, 3] = False
    gates = Gates(2, 6, 8).fit(k)
    spoilt = (x.masked_fill(~keep[..., None, None], torch.nan) for x in (q, k, v))
    cfg = config(flux_alpha=alpha)
    clean, dirty = (attend(*x, cfg, backend, gates, keep).out for x in ((q, k, v), spoilt))
    assert torch.equal(clean, dirty)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_bad_token_does_not_spoil_a_bank(alpha, bad):
    q, k, v = qkv(60)
    gates, budget = Gates(2, 6, 8).fit(k), plan_budget(config(flux_alpha=alpha), 100)
    bank, twin = (KVBank.empty(budget, gates, 2, inv_freq=rope_frequencies(8, 1e4)) for _ in range(2))
    for each in (bank, twin):
        each.extend(k[:, :50], v[:, :50])
    wrong = k[:, 50:51].clone()
    wrong[0, 0, 0, 0] = bad
    row = bank.step(q[:, 50:51], wrong, v[:, 50:51])
    keep = torch.tensor([[False], [True]])
    clean = twin.step(q[:, 50:51], k[:, 50:51], v[:, 50:51], keep=keep)
    assert row[0].isnan().all() and torch.equal(row[1], clean[1])
    rest = (x[:, 51:] for x in (q, k, v))
    rows = bank.steps(*rest)
    assert rows.isfinite().all() and torch.equal(rows, twin.steps(*(x[:, 51:] for x in (q, k, v))))


# -- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_float64_layer_computes_in_float64(alpha):
    by_tiles, by_masks = (layer(flux_alpha=alpha, backend=name).double() for name in ("torch", "reference"))
    x = X.double()
    assert by_tiles(x).dtype == torch.float64
    assert off_by(by_tiles(x), by_masks(x)) <= 1e-12
    x.requires_grad_()
    assert off_by(by_tiles(x), by_masks(x)) <= 1e-12  # the path with autograd
    y, state = by_tiles.prefill(x.detach()[:, :80], 100)
    rows = [by_tiles.decode(x.detach()[:, i : i + 1], state) for i in range(80, 90)]
    if alpha != 0.5:  # there the budget follows the length
        assert off_by(torch.cat([y, *rows], dim=1), by_tiles(x)) <= 1e-12


def test_alpha_zero_in_float64_is_dense_attention_in_float64():
    attn, x = layer(flux_alpha=0.0).double(), X.double()
    q, k, v = (proj(x).unflatten(-1, (-1, 8)).transpose(1, 2) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
    angle = torch.arange(90).double()[:, None] * 1e4 ** (-torch.arange(0, 8, 2).double() / 8)

    def turn(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)

    assert attn.cfg.rope_theta == 1e4
    k, v = (x.repeat_interleave(2, dim=1) for x in (turn(k), v))
    out = nn.functional.scaled_dot_product_attention(turn(q), k, v, is_causal=True)
    assert off_by(attn(x), attn.o_proj(out.transpose(1, 2).flatten(2))) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_gradcheck_with_rope(alpha, backend):
    attn = layer(flux_alpha=alpha, backend=backend, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, shortlist=12)
    x = torch.randn(1, 20, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert torch.autograd.gradcheck(attn.double(), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_and_autocast(dtype):
    attn = layer()
    wanted = attn(X)
    assert off_by(copy.deepcopy(attn).to(dtype)(X.to(dtype)), wanted) < 0.3
    with torch.autocast("cpu", dtype):
        assert off_by(attn(X), wanted) < 0.3


# -- long texts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_layer_made_in_another_default_precision(dtype):
    """As `from_pretrained` makes models."""
    moved, before = layer().to(dtype), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = ProteusAttention(config()).eval()
        assert made.gates.fit(torch.randn(200, 2, 8)).salience_quantiles.isfinite().all()
    finally:
        torch.set_default_dtype(before)
    assert [x.dtype for x in made.state_dict().values()] == [x.dtype for x in moved.state_dict().values()]
    made.load_state_dict(moved.state_dict())
    assert torch.equal(made(X.to(dtype)), moved(X.to(dtype)))


@pytest.mark.parametrize("assign", [True, False])
def test_a_checkpoint_in_half_precision_leaves_gates_in_float32(assign):
    half = {name: x.half() if x.is_floating_point() else x for name, x in layer().state_dict().items()}
    attn = layer().half()
    attn.load_state_dict(half, assign=assign)
    assert {x.dtype for x in (*attn.gates.buffers(), *attn.router.buffers()) if x.is_floating_point()} == {
        torch.float32
    }
    assert attn(X.half()).isfinite().all()


@pytest.mark.parametrize("shift", [1 << 16, 1 << 20, 1 << 24, 1 << 30])
def test_a_shifted_text_gives_the_same_output(shift):
    for alpha in (0.0, 1.0):
        attn, at = layer(flux_alpha=alpha), torch.arange(90)
        assert off_by(attn(X, positions=at + shift), attn(X, positions=at)) <= 2e-6


def test_a_bank_far_along_gives_the_same_rows():
    attn, found = layer(), []
    for shift in (0, 1 << 24):
        y, state = attn.prefill(X[:, :60], positions=torch.arange(60) + shift)
        found.append(torch.cat([y, *(attn.decode(X[:, i : i + 1], state) for i in range(60, 90))], dim=1))
    assert off_by(*found) <= 2e-6


def test_rotation_at_small_positions_is_what_it_was():
    x, freq = torch.randn(1, 50, 2, 8), rope_frequencies(8, 1e4)
    angle = torch.arange(50.0)[:, None] * freq
    cos, sin, (first, second) = angle.cos()[:, None], angle.sin()[:, None], x.chunk(2, dim=-1)
    wanted = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    assert off_by(rotate(x, None, freq), wanted) <= 1e-6


# -- the life of a module -------------------------------------------------------------------------------------------


def test_training_under_inference_mode_and_then_autograd():
    attn, twin = layer().train(), layer().train()
    for _ in range(2):
        with torch.inference_mode():
            attn(X)
        twin(X)
    assert same_state(attn, twin) and not any(b.is_inference() for b in attn.buffers())
    for mode in (False, True):
        x = X.clone().requires_grad_()
        attn.train(mode)(x).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("assign", [True, False])
def test_meta_init_and_strict_load(assign):
    attn = layer()
    with torch.device("meta"):
        bare = ProteusAttention(attn.cfg)
    if not assign:
        bare = bare.to_empty(device="cpu")
    bare.load_state_dict(attn.state_dict(), strict=True, assign=assign)
    assert torch.equal(bare.eval()(X), attn(X)) and torch.equal(bare.inv_freq, attn.inv_freq)


def test_to_empty_of_a_filled_layer_needs_a_load_and_no_more():
    attn = layer()
    twin = copy.deepcopy(attn).to_empty(device="cpu")
    twin.load_state_dict(attn.state_dict())
    assert torch.equal(twin(X), attn(X))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_copies_and_files_keep_dtype_and_output(dtype, tmp_path):
    attn, x = layer().to(dtype), X.to(dtype)
    assert torch.equal(copy.deepcopy(attn)(x), attn(x))
    assert torch.equal(pickle.loads(pickle.dumps(attn))(x), attn(x))
    loaded = ProteusAttention.load(attn.save(tmp_path / "layer.safetensors")).eval()
    assert loaded.k_proj.weight.dtype == dtype and loaded.gates.prototypes.dtype == torch.float32
    assert torch.equal(loaded(x), attn(x))


def test_a_config_survives_pickling_and_copying():
    cfg = config(heads_awake_max=1)
    assert pickle.loads(pickle.dumps(cfg)) == cfg == copy.deepcopy(cfg) == AttentionConfig(**cfg.to_dict())


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_drop_in_serves_in_transformer_stacks(kind, norm_first):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "batch_first": True, "norm_first": norm_first}
    block = nn.TransformerEncoderLayer(**sizes) if kind == "encoder" else nn.TransformerDecoderLayer(**sizes)
    drop_in = {"batch_first": True, "flux_alpha": 1.0, "shortlist": 24, "gates_per_group": 6}
    block.self_attn = CausalProteusMultiheadAttention(32, 4, **drop_in)
    stack = nn.TransformerEncoder(block, 2) if kind == "encoder" else nn.TransformerDecoder(block, 2)
    mask = nn.Transformer.generate_square_subsequent_mask(90)
    padding = torch.zeros(2, 90, dtype=torch.bool)
    padding[1, 80:] = True

    def run():
        if kind == "encoder":
            return stack(X, mask=mask, src_key_padding_mask=padding, is_causal=True)
        return stack(X, X[:, :7], tgt_mask=mask, tgt_key_padding_mask=padding)

    run().sum().backward()
    assert all(p.grad is not None for name, p in stack.named_parameters() if "self_attn" in name)
    calls, stack = [], stack.eval()
    for each in stack.layers:
        each.self_attn.attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = run()
    assert len(calls) == 2 and first.isfinite().all()  # the fused path of PyTorch would call no layer of ours
    assert off_by(first[0], run()[0]) <= 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("changes", [*KINDS, {"flux_alpha": 0.0}])
def test_gradient_checkpointing(changes, reentrant):
    grads = []
    for way in (None, reentrant):
        attn, x = layer(**changes).train(), X.clone().requires_grad_()
        attn(X)
        y = attn(x) if way is None else checkpoint(attn, x, use_reentrant=way)
        y.pow(2).sum().backward()
        grads.append((x.grad, *(p.grad for p in attn.parameters()), *attn.state_dict().values()))
    for plain, checkpointed in zip(*grads, strict=True):
        assert plain is checkpointed or torch.allclose(plain, checkpointed, atol=1e-5, equal_nan=True)
