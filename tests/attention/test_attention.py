"""The layer's parts: config, budgets, stats, row views, the drop-in and the block; and bad input to all of them."""

import pytest
import torch
from helpers import attend, config, layer, off_by, qkv
from torch import nn

from proteus_playground import AttentionConfig, ProteusAttention
from proteus_playground.attention import (
    CausalProteusMultiheadAttention,
    Gates,
    choose_backend,
    plan_budget,
    proteus_attention,
    rope_frequencies,
    rotate,
    row_reads,
    surgery,
)
from proteus_playground.attention.adapter import ProteusLayer
from proteus_playground.attention.budget import alpha_for_length, split_shortlist
from proteus_playground.lm.model import ProteusBlock

X = torch.randn(2, 90, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("changes", [{}, {"heads_awake_max": 1}, {"head_top_p": 0.5}, {"route_heads": False}])
def test_the_layer_and_the_adapter_decide_alike(changes):
    """What the playground runs on a layer's queries, keys and values is what the layer computes."""
    attn = layer(flux_alpha=0.7, keep_ratio=0.6, **changes)
    with torch.no_grad():
        y, stats = attn(X, return_stats=True)
        q, k, v = (proj(X).unflatten(-1, (-1, attn.cfg.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
        logits = None if attn.router is None else attn.router(X)
        runner = ProteusLayer(attn.gates, attn.cfg, attn.router)
        run = runner.run(q, k, v, inv_freq=attn.inv_freq, scale=attn.cfg.head_dim**-0.5, logits=logits)
    assert torch.equal(run.keep, stats.kept)
    assert run.awake is None or torch.equal(run.awake & run.keep[..., None], stats.awake)
    assert off_by(attn.o_proj(run.out.flatten(2)), y) <= 1e-5


def test_rotation_is_undone_by_negative_positions():
    x, at, freq = torch.randn(2, 7, 3, 8), torch.arange(7), rope_frequencies(8, 1e4)
    assert torch.allclose(rotate(rotate(x, at, freq), -at, freq), x, atol=1e-6)


def test_alpha_follows_the_length():
    assert [alpha_for_length(t, 512, 4096) for t in (1, 512, 4096, 10**6)] == [0, 0, 1, 1]
    assert 0.6 < alpha_for_length(2048, 512, 4096) < 0.7


def test_set_flux_alpha_pins_and_releases():
    attn = layer(flux_alpha=None, dense_below=32, shortlist_from=64)
    assert attn(X, return_stats=True)[1].flux_alpha == 1
    attn.set_flux_alpha(0.25)
    assert attn(X, return_stats=True)[1].flux_alpha == 0.25
    attn.set_flux_alpha(None)
    assert attn(X[:, :32], return_stats=True)[1].backend == "dense"


def test_notes_go_before_probes_when_the_share_is_small():
    roomy, tight = (plan_budget(config(shortlist=size), 1000) for size in (32, 12))
    assert roomy.notes and roomy.ring == 5
    border, below = (split_shortlist(size, 1.0, 0, 2, 16, notes=None) for size in (33, 32))  # 32 and 31 for the gates
    assert border["notes"] and border["ring"] == 8 and not below["notes"] and below["ring"] == 15
    assert not tight.notes and tight.ring == 3
    nearest = split_shortlist(32, 1.0, 0, 2, 16, notes=5)
    assert (nearest["notes"], nearest["ring"], nearest["ring_reads"]) == (5, 13, 26)


def test_filled_rings_hold_about_the_root_of_their_reads():
    for size, notes, probes, ring, reads in ((128, 16, 16, 7, 48), (512, 32, 16, 15, 224), (128, 16, 2, 24, 48)):
        plan = split_shortlist(size, 0.5, 4, probes, 256, None, nearest_gates=True)
        assert (plan["probes"], plan["ring"], plan["ring_reads"], plan["notes"]) == (probes, ring, reads, notes)


def test_stats_say_what_happened():
    attn = layer(heads_awake_max=1, keep_ratio=0.5)
    mask = torch.zeros(2, 90, dtype=torch.bool)
    mask[0, 80:] = True
    _, s = attn(X, key_padding_mask=mask, return_stats=True)
    assert s.tokens_seen == 170 and s.tokens_kept == int(s.kept.sum()) < 170
    assert s.heads_awake == 2 and s.keys_per_query == pytest.approx(float(s.reads.sum() / s.awake.sum()))
    assert not s.reads[~s.kept].any() and (s.gate_of_key[~s.kept] == -1).all()
    assert s.backend == "torch" and "CPU" in s.backend_reason


def test_head_weights_are_one_at_alpha_zero_and_average_one_above():
    for alpha in (0.0, 0.4, 1.0):
        _, s = layer(flux_alpha=alpha)(X, return_stats=True)
        assert torch.allclose(s.head_weights.sum(-1), torch.full((2, 90), 4.0), atol=1e-4)
        assert alpha or (s.head_weights == 1).all()


def test_top_p_wakes_fewer_heads_where_the_router_is_sure():
    attn = layer(head_top_p=0.5)
    with torch.no_grad():
        attn.router.weight.mul_(20)
    assert attn(X, return_stats=True)[1].heads_awake < 4


@pytest.mark.parametrize("size", [12, 24, 60])
@pytest.mark.parametrize("rho", [0.6, 1.0])
def test_row_view_is_the_row_that_was_computed(size, rho):
    cfg = config(shortlist=size)
    q, k, v = qkv(150)
    gates = Gates(2, 6, 8).fit(k)
    keep = torch.rand(2, 150) < rho
    result = attend(q, k, v, cfg, "torch", gates, keep=keep)
    for token in (0, 40, 149):
        view = row_reads(
            q,
            k,
            v,
            gates,
            plan_budget(cfg, 150),
            token=token,
            head=3,
            batch=1,
            keep=keep,
            inv_freq=rope_frequencies(8, cfg.rope_theta),
        )
        direct = ((view.kind > 0) & (view.kind < 4)).sum()
        assert direct + view.notes_read == result.reads[1, token, 3]
        if keep[1, token]:
            mix = torch.tensor(view.weight) @ v[1, :, 1]
            assert torch.allclose(mix, result.out[1, token, 3], atol=1e-4)
        else:
            assert not view.weight.any()


def test_drop_in_matches_multihead_attention_at_alpha_zero():
    theirs = nn.MultiheadAttention(32, 4, batch_first=True)
    ours = CausalProteusMultiheadAttention(32, 4, batch_first=True, rope_theta=None, flux_alpha=0.0)
    q, k, v = theirs.in_proj_weight.detach().chunk(3)
    state = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": theirs.out_proj.weight}
    for name, part in zip("qkv", theirs.in_proj_bias.detach().chunk(3), strict=True):
        state[f"{name}_proj.bias"] = part
    ours.attn.load_state_dict({**state, "o_proj.bias": theirs.out_proj.bias}, strict=False)
    causal = nn.Transformer.generate_square_subsequent_mask(90)
    want, weights = theirs(X, X, X, attn_mask=causal)
    got, shown = ours(X, X, X, attn_mask=causal)
    assert off_by(got, want) <= 1e-5 and off_by(shown, weights) <= 1e-5
    memory = torch.randn(2, 33, 32)
    pad = torch.zeros(2, 33, dtype=torch.bool)
    pad[1, 20:] = True
    want, weights = theirs(X, memory, memory, key_padding_mask=pad, average_attn_weights=False)
    got, shown = ours(X, memory, memory, key_padding_mask=pad, average_attn_weights=False)
    assert off_by(got, want) <= 1e-5 and off_by(shown, weights) <= 1e-5


def test_drop_in_shapes_and_sparse_weights():
    ours = CausalProteusMultiheadAttention(32, 4, flux_alpha=1.0, shortlist=24, gates_per_group=6, n_kv_heads=2)
    ours.attn.calibrate(X)
    x = X.transpose(0, 1)
    out, weights = ours.eval()(x, x, x, is_causal=True)
    assert out.shape == x.shape and weights.shape == (2, 90, 90)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 90), atol=1e-5) and not weights.triu(1).any()
    same = x[:, 0]
    one, none = ours(same, same, same, need_weights=False)
    assert none is None and off_by(one, out[:, 0]) <= 1e-5


def test_block_adds_to_the_residual_stream():
    block = ProteusBlock(config()).eval()
    y, stats = block(X, return_stats=True)
    assert y.shape == X.shape and stats.backend == "torch" and torch.equal(block(X), y)


def test_an_explicit_backend_is_never_replaced():
    assert choose_backend("cpu", "reference") == ("reference", "asked for by name")
    assert layer(backend="reference")(X, return_stats=True)[1].backend == "reference"


def test_nothing_quadratic_is_ever_built():
    """No tensor of T x T elements appears while 4,096 tokens are attended."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return out

    q, k, v = qkv(4096, batch=1)
    gates = Gates(2, 6, 8).fit(k)
    with torch.no_grad(), Watch():
        attend(q, k, v, config(), "torch", gates)
    assert largest < 4096**2 / 4


# bad input: the error names the argument

CONFIG_CASES = [
    ("d_model", 0),
    ("d_model", 1.5),
    ("d_model", True),
    ("d_model", 30),
    ("n_heads", -1),
    ("n_heads", "8"),
    ("n_kv_heads", 3),
    ("n_kv_heads", 0),
    ("head_dim", 7),
    ("head_dim", 0),
    ("shortlist", 0),
    ("shortlist", 1e3),
    ("dna_fraction", -0.1),
    ("dna_fraction", 1.1),
    ("dna_fraction", "half"),
    ("dna_fraction", float("nan")),
    ("keep_ratio", 0),
    ("keep_ratio", 1.01),
    ("flux_alpha", -0.5),
    ("flux_alpha", 2),
    ("flux_alpha", "1"),
    ("dense_below", 0),
    ("shortlist_from", 512),
    ("route_heads", 1),
    ("head_top_p", 0.0),
    ("head_top_p", 1.5),
    ("heads_awake_min", 0),
    ("heads_awake_min", 3),
    ("heads_awake_max", 3),
    ("gates_per_group", 0),
    ("gates_per_group", 1),
    ("probes", 0),
    ("probes", 7),
    ("n_anchors", -1),
    ("notes", "yes"),
    ("rope_theta", 0),
    ("rope_theta", float("inf")),
    ("prior_max", 2),
    ("prior_temperature", 0),
    ("balance_rate", -1),
    ("ema_decay", 1.0),
    ("bias", 0),
    ("backend", "cuda"),
    ("backend", None),
    ("init_scale", 0),
]


@pytest.mark.parametrize(("name", "value"), CONFIG_CASES, ids=lambda x: str(x))
@pytest.mark.bad_input
def test_config_refuses(name, value):
    base = {"d_model": 32, "n_heads": 4, "n_kv_heads": 2, "gates_per_group": 6}
    if (name, value) == ("d_model", 30):
        base["n_kv_heads"] = 4
    with pytest.raises((TypeError, ValueError), match=name) as error:
        AttentionConfig(**{**base, name: value})
    assert repr(value) in str(error.value)


def call(**changes):
    q, k, v = qkv(20)
    args = {"q": q, "k": k, "v": v, "gates": Gates(2, 6, 8), "budget": plan_budget(config(), 20), "inv_freq": None}
    args.update(changes)
    return proteus_attention(**args)


LAYER_CASES = {
    "x: list": (lambda: layer()([[1.0]]), "x"),
    "x: integers": (lambda: layer()(torch.ones(1, 4, 32, dtype=torch.long)), "x"),
    "x: two axes": (lambda: layer()(torch.ones(4, 32)), "x has shape"),
    "x: wrong width": (lambda: layer()(torch.ones(1, 4, 31)), "D=32"),
    "x: empty": (lambda: layer()(torch.ones(1, 0, 32)), "x has shape"),
    "positions": (lambda: layer()(X, positions=torch.arange(3)), "positions"),
    "budget: type": (lambda: layer()(X, budget=3), "budget=int"),
    "budget: layer": (lambda: layer()(X, budget=plan_budget(config(), 10)), "planned for 10 tokens"),
    "key_padding_mask: float": (lambda: layer()(X, key_padding_mask=torch.ones(2, 90)), "key_padding_mask"),
    "key_padding_mask: shape": (
        lambda: layer()(X, key_padding_mask=torch.ones(2, 9, dtype=torch.bool)),
        "key_padding_mask",
    ),
    "set_flux_alpha": (lambda: layer().set_flux_alpha(1.5), "flux_alpha=1.5"),
    "set_flux_alpha: text": (lambda: layer().set_flux_alpha("max"), "flux_alpha='max'"),
    "calibrate": (lambda: layer().calibrate(torch.ones(2, 3)), "x has shape"),
    "calibrate: NaN": (lambda: layer().calibrate(torch.full((1, 9, 32), torch.nan)), "k of shape"),
    "keep before calibration": (lambda: ProteusAttention(config(keep_ratio=0.5)).eval()(X), "keep_ratio"),
    "cfg": (lambda: ProteusAttention({"d_model": 32}), "cfg=dict"),
    "load: missing": (lambda: ProteusAttention.load("nowhere.safetensors"), "nowhere.safetensors"),
    "load: not ours": (lambda: ProteusAttention.load(__file__), "path="),
    "q: axes": (lambda: call(q=torch.ones(1, 2, 3)), "q has shape"),
    "q: integers": (lambda: call(q=torch.ones(2, 20, 4, 8, dtype=torch.int)), "q="),
    "q: heads": (lambda: call(q=torch.ones(2, 20, 3, 8)), "q has 3 heads"),
    "q: width": (
        lambda: call(q=torch.ones(2, 20, 4, 6), k=torch.ones(2, 20, 2, 6), v=torch.ones(2, 20, 2, 6)),
        "head dim 6",
    ),
    "k: length": (lambda: call(k=torch.ones(2, 19, 2, 8)), "k has shape"),
    "v: dtype": (lambda: call(v=torch.ones(2, 20, 2, 8).half()), "v is"),
    "gates": (lambda: call(gates=None), "gates="),
    "inv_freq": (lambda: call(inv_freq=torch.ones(3)), "inv_freq"),
    "positions: shape": (lambda: call(positions=torch.arange(4)), "positions"),
    "keep: dtype": (lambda: call(keep=torch.ones(2, 20)), "keep="),
    "keep: shape": (lambda: call(keep=torch.ones(2, 2, dtype=torch.bool)), "keep has shape"),
    "awake: shape": (lambda: call(awake=torch.ones(2, 20, dtype=torch.bool)), "awake has shape"),
    "backend": (lambda: call(backend="tpu"), "backend='tpu'"),
    "tokens": (lambda: plan_budget(config(), 0), "tokens=0"),
    "gates: count": (lambda: Gates(0, 4, 8), "n_groups=0"),
    "gates: width": (lambda: Gates(1, 4, 8).lure(torch.ones(3, 1, 9)), "d=8"),
    "gates: keys": (lambda: Gates(1, 4, 8).fit([1]), "k=list"),
    "gates: no keys": (lambda: Gates(1, 4, 8).fit(torch.ones(0, 1, 8)), "k of shape"),
    "gates: decay": (lambda: Gates(1, 4, 8, ema_decay=1), "ema_decay=1"),
    "gates: keep_ratio": (lambda: Gates(1, 4, 8).keep_mask(torch.ones(3, 1, 8), 0), "keep_ratio=0"),
    "clone: group": (lambda: surgery.clone(layer(), 9, 0), "group=9"),
    "clone: gate": (lambda: surgery.clone(layer(), 0, -1), "gate=-1"),
    "clone: layer": (lambda: surgery.clone(nn.Linear(1, 1), 0, 0), "attn=Linear"),
    "merge: itself": (lambda: surgery.merge(layer(), 0, 1, 1), "other=1"),
    "move: head": (lambda: surgery.move(layer(), 0, 1, 2), "head=2"),
    "row: token": (
        lambda: row_reads(*qkv(9), Gates(2, 6, 8), plan_budget(config(), 9), token=9, head=0, inv_freq=None),
        "token=9",
    ),
    "row: head": (
        lambda: row_reads(*qkv(9), Gates(2, 6, 8), plan_budget(config(), 9), token=0, head=True, inv_freq=None),
        "head=True",
    ),
    "mha: kdim": (lambda: CausalProteusMultiheadAttention(32, 4, kdim=16), "kdim=16"),
    "mha: add_bias_kv": (lambda: CausalProteusMultiheadAttention(32, 4, add_bias_kv=True), "add_bias_kv"),
    "mha: dropout": (lambda: CausalProteusMultiheadAttention(32, 4, dropout=1.0), "dropout=1.0"),
    "mha: field": (lambda: CausalProteusMultiheadAttention(32, 4, flux=1), "flux"),
    "mha: attn_mask": (
        lambda: CausalProteusMultiheadAttention(32, 4)(X, X, X, attn_mask=torch.zeros(90, 90)),
        "attn_mask",
    ),
    "mha: key_padding_mask": (
        lambda: CausalProteusMultiheadAttention(32, 4, batch_first=True)(
            X, X, X, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool)
        ),
        "key_padding_mask",
    ),
    "mha: padding bias": (
        lambda: CausalProteusMultiheadAttention(32, 4, batch_first=True)(X, X, X, key_padding_mask=-torch.ones(2, 90)),
        "key_padding_mask holds",
    ),
    "budget: short": (lambda: call(budget=plan_budget(config(), 10)), "planned for 10 tokens"),
    "budget: gates": (
        lambda: call(gates=Gates(2, 2, 8), budget=plan_budget(config(shortlist=18, gates_per_group=4), 20)),
        "reads 4 gates of 2",
    ),
    "positions: list": (lambda: call(positions=[1]), "positions=list"),
    "mha: query": (lambda: CausalProteusMultiheadAttention(32, 4)(torch.ones(3), None, None), "query"),
    "block: hidden": (lambda: ProteusBlock(config(), hidden=0), "hidden=0"),
}


@pytest.mark.parametrize("case", LAYER_CASES)
def test_refusals_name_the_argument(case):
    run, named = LAYER_CASES[case]
    with pytest.raises((TypeError, ValueError, FileNotFoundError)) as error:
        run()
    assert named in str(error.value)


def test_the_last_gate_cannot_be_pruned():
    attn = layer(route_heads=False, gates_per_group=2, probes=1)
    surgery.prune(attn, 0, 0)
    with pytest.raises(ValueError, match="gate=1: the last live gate"):
        surgery.prune(attn, 0, 1)
    with pytest.raises(ValueError, match="gate=0: not a live gate"):
        surgery.prune(attn, 0, 0)


def test_a_nan_crashes_nothing_and_stays_in_its_row_of_the_batch():
    attn = layer()
    x = X.clone()
    x[0, 70] = torch.nan
    y = attn(x)
    assert y[0, 70].isnan().all() and off_by(y[1], attn(X)[1]) <= 1e-6


def test_many_heads_under_autocast():
    attn = layer(n_heads=32, gates_per_group=16, heads_awake_max=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert off_by(attn(X).float(), attn(X).float()) == 0


def test_padding_masks_of_either_kind_agree():
    ours = CausalProteusMultiheadAttention(32, 4, batch_first=True, flux_alpha=1.0, shortlist=24).eval()
    pad = torch.zeros(2, 90, dtype=torch.bool)
    pad[0, 80:] = True
    floats = torch.zeros(2, 90).masked_fill(pad, torch.finfo(torch.float32).min)
    assert torch.equal(ours(X, X, X, key_padding_mask=pad)[0], ours(X, X, X, key_padding_mask=floats)[0])


def test_drop_in_inside_pytorchs_own_layer():
    shell = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    shell.self_attn = CausalProteusMultiheadAttention(32, 4, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(90)
    assert shell.eval()(X, src_mask=causal, is_causal=True).shape == X.shape
