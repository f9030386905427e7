"""What compilers and the transforms of `torch.func` make of a layer: what eager calls give, or a refusal in words."""

import copy
import io
import shutil
from functools import partial

import pytest
import torch
from helpers import config, layer, off_by
from torch import func, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from proteus_playground import ProteusAttention
from proteus_playground.attention import CausalProteusMultiheadAttention

X = torch.randn(2, 90, 32, generator=torch.Generator().manual_seed(3))
WITH_PADDING = {"key_padding_mask": torch.arange(90) >= torch.tensor([[70], [90]])}
ALL_AT_ONCE = {"keep_ratio": 0.6, "heads_awake_max": 1, "head_top_p": 0.9}  # in one layer, to keep the tests quick
GROUPED = {"n_heads": 16, "head_dim": 16, "heads_awake_max": 2, "gates_per_group": 12}  # rows projected head by head


def compiled(module, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True)


def exported(module):
    """What a file holds of the module."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (X,), WITH_PADDING), file)
    file.seek(0)
    return torch.export.load(file).module()


def by_autograd(module) -> dict[str, torch.Tensor]:
    x = X.clone().requires_grad_()
    y = module(x, **WITH_PADDING)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return {"y": y, "x": x.grad, **grads}


def by_func(module) -> dict[str, torch.Tensor]:
    def loss(params, x):
        y = func.functional_call(module, params, (x,), WITH_PADDING)
        return y.square().sum(), y

    (grads, of_x), y = func.grad(loss, argnums=(0, 1), has_aux=True)(dict(module.named_parameters()), X)
    return {"y": y, "x": of_x, **grads}


WAYS = {
    "compile": lambda module: by_autograd(compiled(module)),
    "export": lambda module: by_autograd(exported(module)),
    "func.grad": by_func,
}


def assert_same(found: dict, wanted: dict) -> None:
    largest = max(x.norm() for x in wanted.values())
    for name, x in wanted.items():
        y = found.get(name, found.get(f"_orig_mod.{name}"))
        assert (y - x).norm() <= 1e-5 * x.norm().clamp(min=0.01 * largest), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_compilers_and_func_give_what_eager_gives(alpha, way):
    attn = layer(flux_alpha=alpha, **ALL_AT_ONCE)
    assert_same(WAYS[way](attn), by_autograd(copy.deepcopy(attn)))


@pytest.mark.parametrize("changes", [GROUPED, {"backend": "reference"}, {"max_notes": 2}])
def test_other_kinds_of_layers_compile_too(changes):
    attn = layer(**changes)
    assert_same(WAYS["compile"](attn), by_autograd(copy.deepcopy(attn)))


@pytest.mark.parametrize("way", [compiled, exported, lambda module: module])
def test_training_passes_record_what_eager_ones_record(way):
    attn, twin = (layer(**ALL_AT_ONCE).train() for _ in range(2))
    run = way(attn)
    for _ in range(3):
        found = by_func(run) if run is attn else by_autograd(run)
        assert_same(found, by_autograd(twin))
    state = dict((run if way is exported else attn).named_buffers())
    for name, buffer in twin.gates.named_buffers():
        mine = state[f"gates.{name}"]
        assert type(mine) is torch.Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(mine)
        assert torch.allclose(mine, buffer, atol=1e-5, equal_nan=True), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_compiled_layer_records_a_pass_once(reentrant):
    attn, twin = layer().train(), layer().train()
    run = compiled(attn, "eager")
    for _ in range(2):
        x = X.clone().requires_grad_()
        checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
        twin(X)
    assert torch.allclose(attn.gates.pending_sum, twin.gates.pending_sum, atol=1e-5)
    assert torch.allclose(attn.gates.prototypes, twin.gates.prototypes, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_default_compiler_gives_what_eager_gives():
    attn = layer(route_heads=False)
    with torch.no_grad():
        assert off_by(compiled(attn, "inductor")(X), attn(X)) <= 1e-5


def test_a_layer_compiled_for_all_sizes_at_once():
    attn = layer(**ALL_AT_ONCE)
    run = torch.compile(attn, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((2, 90, 32), (1, 33, 32), (3, 120, 32)):
        x = torch.randn(shape)
        assert off_by(run(x), attn(x)) <= 1e-5


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_make_fx_gives_what_eager_gives(alpha):
    attn, other = layer(flux_alpha=alpha, **ALL_AT_ONCE), torch.randn(2, 90, 32)
    grad = func.grad(lambda x: attn(x).square().sum())
    for run in (attn, grad):
        assert off_by(make_fx(run)(X)(other), run(other)) <= 1e-5


def test_a_compiled_layer_takes_any_length_and_an_exported_one_too():
    attn, sizes = layer(), {"x": {0: torch.export.Dim("B"), 1: torch.export.Dim("T", min=50, max=200)}}
    runs = compiled(attn, "eager"), torch.export.export(attn, (X,), dynamic_shapes=sizes).module()
    for shape in ((2, 90, 32), (3, 50, 32), *((1, T, 32) for T in range(60, 71)), (4, 200, 32)):
        x = torch.randn(shape)
        assert all(off_by(run(x), attn(x)) <= 1e-5 for run in runs)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_vmap_and_gradients_per_sample(alpha):
    attn = layer(flux_alpha=alpha, keep_ratio=0.6)
    params = dict(attn.named_parameters())

    def loss(params, x):
        return func.functional_call(attn, params, (x[None],)).square().sum()

    assert off_by(func.vmap(lambda x: attn(x[None])[0])(X), attn(X)) <= 1e-5
    each = func.vmap(func.grad(loss), in_dims=(None, 0))(params, X)
    for i in range(2):
        alone = func.grad(loss)(params, X[i])
        assert_same({name: grad[i] for name, grad in each.items()}, alone)


def test_vmap_over_layers():
    layers = [layer(seed, keep_ratio=0.6) for seed in range(3)]
    params, buffers = func.stack_module_state(layers)

    def run(params, buffers):
        return func.functional_call(layers[0], (params, buffers), (X,))

    for y, attn in zip(func.vmap(run)(params, buffers), layers, strict=True):
        assert off_by(y, attn(X)) <= 1e-5
    buffers["gates.salience_quantiles"][1] = torch.nan
    with pytest.raises(ValueError, match="keep_ratio=0.6"):
        func.vmap(run)(params, buffers)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_forward_mode_agrees_with_reverse_mode(alpha):
    attn = layer(flux_alpha=alpha, **ALL_AT_ONCE)
    gen = torch.Generator().manual_seed(1)
    along, weight = (torch.randn(X.shape, generator=gen) for _ in range(2))
    y, change = func.jvp(attn, (X,), (along,))
    grad = func.vjp(attn, X)[1](weight)[0]
    assert off_by(y, attn(X)) <= 1e-5 and torch.allclose((change * weight).sum(), (grad * along).sum(), rtol=1e-4)


def test_second_derivatives():
    attn = layer(d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, shortlist=12).double()
    x, along = (torch.randn(1, 20, 8, dtype=torch.float64) for _ in range(2))

    def loss(x):
        return attn(x).square().sum()

    forward = func.jvp(func.grad(loss), (x,), (along,))[1]
    reverse = func.grad(lambda x: (func.grad(loss)(x) * along).sum())(x)
    assert off_by(forward, reverse) <= 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda x: attn(x)[0, -1], x)
    assert off_by(func.jacrev(lambda x: attn(x)[0, -1])(x), jacobian) <= 1e-9


def test_compile_of_a_gradient():
    attn = layer()
    grad = func.grad(lambda x: attn(x).square().sum())
    assert off_by(compiled(grad)(X), grad(X)) <= 1e-5


@pytest.mark.parametrize("need_weights", [True, False])
def test_the_drop_in_compiles_and_exports(need_weights):
    torch.manual_seed(0)
    attn = CausalProteusMultiheadAttention(32, 4, batch_first=True, flux_alpha=1.0, shortlist=24, gates_per_group=6)
    attn.eval()
    mask = nn.Transformer.generate_square_subsequent_mask(90)
    named = {"attn_mask": mask, "need_weights": need_weights, **WITH_PADDING}
    wanted = attn(X, X, X, **named)
    for run in (compiled(attn), torch.export.export(attn, (X, X, X), named).module()):
        for found, want in zip(run(X, X, X, **named), wanted, strict=True):
            assert found is want or off_by(found, want) <= 1e-5
    grad, of_eager = func.grad(lambda x: attn(x, x, x, **named)[0].square().sum())(X), X.clone().requires_grad_()
    attn(of_eager, of_eager, of_eager, **named)[0].square().sum().backward()
    assert off_by(grad, of_eager.grad) <= 1e-5


def gradient_of(attn):
    return lambda x: func.grad(lambda z: attn(z).square().sum())(x).sum()


def uncalibrated():
    return ProteusAttention(config(keep_ratio=0.5)).eval()


def drop_in(mask=None, **named):
    attn = CausalProteusMultiheadAttention(32, 4, batch_first=True, flux_alpha=1.0, shortlist=24, gates_per_group=6)
    return lambda x: attn.eval()(x, x, x, attn_mask=mask, **named)[0]


REFUSED = {
    "compile, keep ratio without calibration": (lambda: compiled(uncalibrated(), "eager")(X), "keep_ratio=0.5"),
    "compile, drop-in with another mask": (
        lambda: compiled(drop_in(torch.zeros(90, 90, dtype=torch.bool)), "eager")(X),
        "must be None or the (90, 90) causal mask",
    ),
    "compile, drop-in with biases": (lambda: compiled(drop_in(torch.full((90, 90), 0.5)), "eager")(X), "such as 0.5"),
    "torch.jit.trace": (lambda: torch.jit.trace(layer(), X), "use torch.export.export or torch.compile"),
    "vmap in training": (lambda: func.vmap(layer().train())(X[:, None]), "call eval()"),
    "vmap, drop-in with weights": (lambda: func.vmap(drop_in())(X[:, None]), "need_weights=True: must be False"),
    "vmap, stats": (lambda: func.vmap(partial(layer(), return_stats=True))(X[:, None]), "return_stats"),
    "vmap, prefill": (lambda: func.vmap(layer().prefill)(X[:, None]), "without torch.func.vmap"),
    "make_fx in training": (lambda: make_fx(layer().train())(X), "call eval()"),
    "make_fx of a gradient in training": (lambda: make_fx(gradient_of(layer().train()))(X), "call eval()"),
    "linearize": (lambda: func.linearize(layer(), X), "use torch.func.jvp"),
    "linearize, dense": (lambda: func.linearize(layer(flux_alpha=0.0), X), "use torch.func.jvp"),
    "jacfwd": (lambda: func.jacfwd(layer())(X), "use jacrev or jvp"),
    "grad of grad in vmap": (lambda: func.vmap(func.grad(gradient_of(layer())))(X[:, None]), "without vmap"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_transformed_is_refused(case):
    run, says = REFUSED[case]
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        run()
    assert says in str(refusal.value) and torch.is_grad_enabled()
