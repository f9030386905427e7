"""The probe re-runs one layer of a model at any position of the controls, and the whole model on request."""

import json
import subprocess
import sys
from dataclasses import astuple, replace
from itertools import product
from threading import Event, Thread

import numpy as np
import pytest
import torch
from tiny_llama import WORDS, build

from proteus_playground.attention import captured
from proteus_playground.attention.calibration import Store
from proteus_playground.attention.settings import Settings
from proteus_playground.common.texts import Text, calibration_text, load_text
from proteus_playground.common.timing import RUNS, Stopwatch
from proteus_playground.playground import probe
from proteus_playground.playground.probe import LayerProbe, Stopped
from proteus_playground.playground.random_source import RandomSource
from proteus_playground.playground.views import ANCHOR, DNA, LOCAL, NOTE, UNSEEN

T = 150
SMALL = Settings(shortlist=32, gates=6, probes=2, nearest_gates=False)


def story(tokens: int, seed: int = 0, name: str = "a tale") -> Text:
    picks = torch.randint(len(WORDS), (tokens,), generator=torch.Generator().manual_seed(seed))
    return Text(name, " ".join(WORDS[i] for i in picks), "made up")


@pytest.fixture(scope="module")
def net():
    pytest.importorskip("transformers")
    return build()


def open_probe(net, **kwargs) -> LayerProbe:
    kwargs = dict(name="tiny", calibration=story(300, 1, "another tale"), calibration_tokens=256) | kwargs
    return LayerProbe.from_model(*net, kwargs.pop("text", story(T)), **kwargs)


@pytest.fixture(scope="module")
def tiny(net):
    return open_probe(net)


@pytest.fixture(scope="module")
def rand():
    return LayerProbe.random_layer(load_text("humble token"), max_tokens=200)


def test_alpha_zero_is_the_model(tiny):
    settings = replace(SMALL, flux_alpha=0.0)
    for layer in range(3):
        view = tiny.view(layer, settings)
        assert view.error < 1e-5 and view.backend == "dense"
        assert (view.reads == np.arange(1, T + 1)[:, None]).all()
    whole = tiny.run_model(settings)
    assert whole.layers == (0, 1, 2) and whole.scored_tokens == T - T // 2
    assert abs(whole.nll - whole.dense_nll) < 1e-4
    assert whole.perplexity == pytest.approx(np.exp(whole.nll)) and whole.seconds > 0


def test_dense_nll_is_the_models_own(net, tiny):
    model, tokenizer = net
    ids = torch.tensor(tokenizer(story(T).body)["input_ids"])
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    first = T // 2
    wanted = torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[first:]).item()
    assert tiny.run_model(SMALL).dense_nll == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("source", ["tiny", "rand"])
def test_every_combination_of_the_switches_runs(source, request):
    one = request.getfixturevalue(source)
    size = len(one.tokens)
    for alpha, rho, delta, notes, anchors, route in product(
        (0.0, 0.5, 1.0), (1.0, 0.6), (0.0, 0.5, 1.0), (True, False), (0, 4), (False, True)
    ):
        settings = replace(
            SMALL, flux_alpha=alpha, keep_ratio=rho, dna_fraction=delta, notes=notes, anchors=anchors,
            route_heads=route, head_top_p=0.6,
        )  # fmt: skip
        view = one.view(1, settings)
        assert view.head_map.shape == view.awake.shape == view.reads.shape == (size, one.n_heads)
        assert view.head_map.dtype == np.float32 and view.salience.dtype == np.float32
        assert view.head_map.min() >= 0 and view.head_map.max() <= 1 and np.isfinite(view.error)
        assert view.kept.shape == view.salience.shape == (size,) and view.gate_of_key.shape == (size, one.n_groups)
        assert view.reads.max() <= view.budget["shortlist"]
        assert ((view.reads > 0) == view.awake).all() and not view.awake[~view.kept].any()
        assert view.head_map_kind == ("routing weight" if route else "attention to other keys than anchors")
        assert view.settings == settings and view.latency_ms > 0 and view.dense_ms > 0
        assert view.flops > 0 and view.bytes > 0
        if rho == 1 or alpha == 0:
            assert view.kept.all()
        if not route:
            assert (view.awake == view.kept[:, None]).all()


def test_fewer_reads_cost_less_and_err_more(tiny):
    views = [tiny.view(1, replace(SMALL, flux_alpha=alpha)) for alpha in (0.0, 0.5, 1.0)]
    assert views[0].flops > views[1].flops > views[2].flops
    assert views[0].error < views[1].error < views[2].error
    assert views[0].flops == views[0].dense_flops and views[0].bytes == views[0].dense_bytes


@pytest.mark.parametrize("source", ["tiny", "rand"])
@pytest.mark.parametrize(
    "alpha, rho, notes, route",
    [(0, 1.0, True, False), (1, 1.0, True, False), (1, 0.7, False, False), (0.5, 0.6, True, True)],
)
def test_a_row_agrees_with_its_view(source, alpha, rho, notes, route, request):
    one = request.getfixturevalue(source)
    settings = replace(SMALL, flux_alpha=float(alpha), keep_ratio=rho, notes=notes, route_heads=route, head_top_p=0.5)
    view = one.view(0, settings)
    places = list(product((0, 3, 70, len(one.tokens) - 1), (0, one.n_heads - 1)))
    rows = [one.row(0, settings, *place) for place in places]
    one.view(1, settings)
    for (token, head), row in zip(places, rows, strict=True):
        alone = one.row(0, settings, token, head)  # after a view of another layer
        assert np.array_equal(alone.kind, row.kind) and np.array_equal(alone.weight, row.weight)
        assert row.asleep == (not view.awake[token, head])
        direct = np.isin(row.kind, (LOCAL, ANCHOR, DNA)).sum()
        assert direct + row.notes_read == view.reads[token, head]
        assert (row.weight[row.kind == UNSEEN] == 0).all() and (row.kind[token + 1 :] == UNSEEN).all()
        if row.asleep:
            assert not row.weight.any()
            continue
        assert row.weight.sum() == pytest.approx(1, abs=1e-5) and row.kind[token] == LOCAL
        home = view.gate_of_key[:, head * one.n_groups // one.n_heads]
        assert set(home[row.kind == DNA]) <= set(row.gates_opened)
        assert len(set(home[row.kind == NOTE])) == row.notes_read
        if not route:
            first = view.kept.nonzero()[0][: max(1, view.budget["anchors"])]
            assert view.head_map[token, head] == pytest.approx(1 - row.weight[first].sum(), abs=1e-4)


def test_head_map_without_anchors(tiny):
    settings = replace(SMALL, anchors=0, notes=False, dna_fraction=0.0)
    view = tiny.view(0, settings)
    for token in (0, 10, 60, T - 1):
        row = tiny.row(0, settings, token, 2)
        assert view.head_map[token, 2] == pytest.approx(1 - row.weight[0], abs=1e-4)


def test_anchors_are_never_dropped(tiny):
    view = tiny.view(2, replace(SMALL, keep_ratio=0.05, anchors=6))
    assert view.kept[:6].all() and not view.kept.all()
    assert tiny.view(2, replace(SMALL, keep_ratio=0.05, anchors=0)).kept[0]


def test_chosen_layers_only(tiny):
    whole = tiny.run_model(SMALL)
    some = tiny.run_model(SMALL, layers=[1])
    none = tiny.run_model(SMALL, layers=[])
    assert some.layers == (1,) and none.layers == ()
    assert abs(none.nll - none.dense_nll) < 1e-6
    assert len({whole.nll, some.nll, none.nll}) == 3


def test_the_map_stands_still(tiny):
    one, two = tiny.gate_map(1, 1, 6), tiny.gate_map(1, 1, 12)
    assert one.keys.shape == (T, 2) and one.prototypes.shape == (6, 2) and two.prototypes.shape == (12, 2)
    assert one.keys.dtype == one.prototypes.dtype == np.float32
    np.testing.assert_array_equal(one.keys, two.keys)
    assert 0 < one.explained <= 1
    assert tiny.gate_map(1, 1, 6) is one


def test_a_long_text_keeps_its_first_tokens_and_its_tail(net):
    whole = open_probe(net, max_tokens=T)
    cut = open_probe(net, max_tokens=50)
    assert cut.tokens == whole.tokens[:4] + whole.tokens[-46:]
    assert f"all {T} tokens of “a tale”" in whole.note and "first 4 and last 46 tokens" in cut.note
    assert "another tale" in cut.note
    long = open_probe(net, text=story(30_000), max_tokens=50)
    assert len(long.tokens) == 50 and long.tokens[4:] == story(30_000).body.split()[-46:]


def test_a_recipe_that_does_not_match_is_made_again(net, tmp_path, monkeypatch):
    passes = []
    plain = probe.Calibration._keys_of

    def counted(self, layer, *args):
        passes.append(layer)
        return plain(self, layer, *args)

    monkeypatch.setattr(probe.Calibration, "_keys_of", counted)

    def first_view(**kwargs):
        passes.clear()
        return open_probe(net, cache=tmp_path, **kwargs).view(1, SMALL), len(passes)

    fresh, fitted = first_view()
    again, refitted = first_view()
    assert (fitted, refitted) == (1, 0) and again.error == fresh.error
    (file,) = tmp_path.glob("*layer1-gates6.safetensors")
    from safetensors import safe_open

    with safe_open(file, "pt") as saved:
        recipe = json.loads(saved.metadata()["about"])
    assert recipe["text"] == "another tale" and recipe["tokens"] == 256 and len(recipe["text_sha256"]) == 64
    assert {"package", "model", "model_hash", "seed", "layer", "gates", "format"} <= set(recipe)
    assert first_view(calibration=story(300, 2, "another tale"))[1] == 1
    assert first_view(calibration_tokens=128)[1] == 1
    with torch.no_grad():
        net[0].lm_head.weight[0] += 1
    assert first_view()[1] == 1
    for whole in tmp_path.iterdir():
        whole.write_bytes(whole.read_bytes()[:100])
    broken, fitted = first_view()
    assert fitted == 1 and not list(tmp_path.glob("*.part"))


def test_a_folder_that_cannot_be_written_is_no_error(net, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert open_probe(net, cache=tmp_path / "file").view(0, SMALL).error > 0
    assert Store(None).read("x", {}) is None


def test_calibration_reads_other_text(net):
    one = LayerProbe.from_model(*net, load_text("humble token"), name="tiny", max_tokens=64)
    assert one.note.endswith("“commonplace book”.")
    assert calibration_text("humble token").name != "humble token"


def test_stop_is_heard(net):
    with pytest.raises(Stopped):
        open_probe(net, stop=lambda: True)
    one = open_probe(net)
    with pytest.raises(Stopped):
        one.view(0, SMALL, stop=lambda: True)
    asked = iter([False] * 6 + [True] * 99)
    with pytest.raises(Stopped):
        one.run_model(SMALL, stop=lambda: next(asked))
    assert net[0].config._attn_implementation == "sdpa"
    assert one.run_model(SMALL).nll > 0


def test_progress_goes_forward(net):
    said = []
    one = open_probe(net, progress=lambda share, sentence: said.append((share, sentence)))
    assert said[-1] == (1.0, one.note)
    said.clear()
    one.run_model(SMALL, progress=lambda share, sentence: said.append((share, sentence)))
    shares = [share for share, _ in said]
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] <= 1 and all(s for _, s in said)


def test_the_same_from_many_threads(tiny):
    settings = [replace(SMALL, flux_alpha=alpha / 4) for alpha in range(5)]
    wanted = [tiny.view(at % 3, one).error for at, one in enumerate(settings)]
    found = [None] * 5

    def work(at):
        for _ in range(3):
            found[at] = tiny.view(at % 3, settings[at]).error
            tiny.row(at % 3, settings[at], 100, 1)

    threads = [Thread(target=work, args=(at,)) for at in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_nothing_global_is_touched(net):
    state, grad = torch.random.get_rng_state(), torch.is_grad_enabled()
    one = open_probe(net)
    one.view(0, SMALL)
    one.run_model(SMALL)
    assert torch.is_grad_enabled() == grad and torch.equal(torch.random.get_rng_state(), state)


BAD_SETTINGS = [
    ("flux_alpha", -0.1), ("flux_alpha", 1.5), ("flux_alpha", None), ("flux_alpha", "half"),
    ("flux_alpha", np.nan),
    ("keep_ratio", 0.0), ("keep_ratio", 1.1), ("keep_ratio", True), ("shortlist", 0), ("shortlist", 12.5),
    ("dna_fraction", -1), ("dna_fraction", 2), ("probes", 0), ("probes", 7), ("probes", 1.0), ("gates", 0),
    ("gates", 2.0), ("gates", 10_000), ("anchors", -1), ("anchors", None), ("notes", 1),
    ("route_heads", "yes"),
    ("head_top_p", 0.0), ("head_top_p", 2.0),
]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD_SETTINGS)
@pytest.mark.bad_input
def test_settings_out_of_range_name_themselves(tiny, name, value):
    with pytest.raises((ValueError, TypeError), match=rf"{name}={value!r}"):
        tiny.view(0, replace(SMALL, **{name: value}))


BAD_CALLS = [
    (lambda p: p.view(3, SMALL), "layer=3"),
    (lambda p: p.view(-1, SMALL), "layer=-1"),
    (lambda p: p.view(1.0, SMALL), "layer=1.0"),
    (lambda p: p.view(0, None), "settings=None"),
    (lambda p: p.row(0, SMALL, T, 0), f"token={T}"),
    (lambda p: p.row(0, SMALL, -1, 0), "token=-1"),
    (lambda p: p.row(0, SMALL, 0, 6), "head=6"),
    (lambda p: p.row(0, SMALL, 0, "1"), "head='1'"),
    (lambda p: p.row(9, SMALL, 0, 0), "layer=9"),
    (lambda p: p.gate_map(0, 2, 6), "group=2"),
    (lambda p: p.gate_map(5, 0, 6), "layer=5"),
    (lambda p: p.gate_map(0, 0, 0), "gates=0"),
    (lambda p: p.run_model(SMALL, layers=[0, 7]), "layer=7"),
    (lambda p: p.run_model(replace(SMALL, gates=0)), "gates=0"),
    (lambda p: p.view(0, replace(SMALL, route_heads=True, gates=2)), "gates=2"),
]


@pytest.mark.parametrize("call, said", BAD_CALLS, ids=[said for _, said in BAD_CALLS])
@pytest.mark.bad_input
def test_bad_calls_name_the_argument(tiny, call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call(tiny)


@pytest.mark.parametrize("value", [7, 513, 20.0, "all", True])
@pytest.mark.bad_input
def test_lengths_that_do_not_fit(net, value):
    with pytest.raises((ValueError, TypeError), match=f"max_tokens={value!r}"):
        open_probe(net, text=story(600), max_tokens=value)


def test_a_text_of_one_token(net):
    with pytest.raises(ValueError, match="text='short'"):
        open_probe(net, text=Text("short", "soup", "made up"))


def test_memory_is_bounded(net, monkeypatch):
    monkeypatch.setattr(captured, "CACHE_LIMIT", 50_000)
    with pytest.raises(ValueError, match=r"max_tokens=150.*at most 65 tokens"):
        open_probe(net)


def test_layers_that_cannot_be_repeated_are_noticed(net, monkeypatch):
    one = open_probe(net)
    layer = one._captured[0]
    one._captured[0] = replace(layer, scale=2 * layer.scale)
    with pytest.raises(RuntimeError, match="layer 0"):
        one.view(0, SMALL)


def test_random_layer_says_so(rand):
    assert rand.random and "random" in rand.note.lower() and rand.name == "random layer"
    assert len(rand.tokens) == 200 and "".join(rand.tokens[-20:]) in load_text("humble token").body
    assert rand.view(0, Settings(flux_alpha=0.0)).error < 1e-5
    with pytest.raises(ValueError, match="random"):
        rand.run_model(Settings())
    one, two = RandomSource(1), RandomSource(1)
    ids = one.ids(one.encode("Soup, soup and SOUP."))
    assert ids[0] == ids[2] == ids[4]
    assert torch.equal(one.capture(ids)[1].k, two.capture(ids)[1].k)


def test_random_layer_needs_no_transformers():
    code = """
import sys
sys.modules["transformers"] = None
from proteus_playground.attention.settings import Settings
from proteus_playground.common.texts import load_text
from proteus_playground.playground.probe import LayerProbe
probe = LayerProbe.random_layer(load_text("humble token"), max_tokens=64)
assert probe.view(0, Settings()).reads.shape == (64, 8)
assert not {"plotly", "ipywidgets"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_views_hold_plain_data_only(tiny):
    for view in (tiny.view(0, SMALL), tiny.row(0, SMALL, 100, 1), tiny.gate_map(0, 0, 6)):
        assert not any(isinstance(value, torch.Tensor) for value in astuple(view))


def test_a_model_that_is_not_pulled(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path))
    for model in ("smollm2", "nobody"):
        with pytest.raises(ValueError, match=model):
            LayerProbe.from_pulled(story(T), model=model, device="cpu")


def test_timing_forgets_and_skips_the_warm_up():
    watch, runs = Stopwatch(torch.device("cpu")), []
    for at in range(1000):
        result, ms = watch.run("work", at, lambda: runs.append(1) or len(runs))
        assert ms >= 0
    assert result == 1001 and watch.count("work", 999) == 1 and watch.count("work", 0) == 0
    for _ in range(9):
        watch.run("work", 999, lambda: None)
    assert watch.count("work", 999) == RUNS and watch.median("work", 999) >= 0


def test_views_go_on_while_the_model_runs(net):
    one, entered, seen = open_probe(net), Event(), []

    def stop():
        entered.set()
        return bool(seen)

    def whole():
        with pytest.raises(Stopped):
            while True:
                one.run_model(SMALL, stop=stop)

    running = Thread(target=whole)
    running.start()
    assert entered.wait(20)
    seen.append(one.view(0, SMALL))
    running.join(20)
    assert not running.is_alive() and seen[0].error > 0


@pytest.mark.slow
def test_smollm2(smollm2):
    """On a real model alpha 0 is the model, and gates beat window and anchors at the same reads."""
    one = LayerProbe.from_pulled(load_text("humble token"), max_tokens=1024, device="cpu")
    assert (one.n_layers, one.n_heads, one.n_groups, one.head_dim) == (30, 9, 3, 64)
    assert one.view(12, Settings(flux_alpha=0.0)).error < 1e-5
    dense = one.run_model(Settings(flux_alpha=0.0))
    assert abs(dense.nll - dense.dense_nll) < 1e-4
    window = one.run_model(Settings(dna_fraction=0.0, notes=False))
    gates = one.run_model(Settings())
    assert dense.dense_nll < gates.nll < window.nll


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_probe_on_a_gpu(net, dtype):
    """Every kind of setting runs on CUDA in the dtype the card uses, and alpha 0 is the model's own output."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    import copy

    model = copy.deepcopy(net[0]).to("cuda", dtype)
    seen = LayerProbe.from_model(model, net[1], story(T), name="tiny", calibration=story(T, 1, "another"))
    for alpha, ratio, route in product((0.0, 0.5, 1.0), (0.6, 1.0), (False, True)):
        now = replace(SMALL, flux_alpha=alpha, keep_ratio=ratio, route_heads=route)
        view = seen.view(1, now)
        assert np.isfinite(view.error) and view.device.startswith("cuda")
        if alpha == 0:
            assert view.error < 20 * torch.finfo(dtype).eps + 2e-3
    result = seen.run_model(replace(SMALL, flux_alpha=0.0))
    assert abs(result.nll - result.dense_nll) < 50 * torch.finfo(dtype).eps
