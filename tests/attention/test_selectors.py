"""Selectors: rules that each is held to, errors that name what is wrong, and ours against the layer itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers import attend, config, off_by, qkv

from proteus_playground.attention import Gates, rope_frequencies
from proteus_playground.attention.selectors import (
    SELECTORS,
    Choice,
    Selector,
    SelectorLayer,
    Sight,
    StandIns,
    attend_all,
    attend_rows,
    check_selector,
    choose,
    known,
    load_selector,
    register,
)
from proteus_playground.attention.selectors import attend as attending

PAGE = Path(__file__).resolve().parents[2] / "docs" / "selectors.md"


def sight_of(tokens: int = 90, gates: bool = True, **changes) -> Sight:
    """A sight of 2 texts, 4 heads over 2 groups, with fitted gates."""
    cfg = config(**{"route_heads": False, "dna_fraction": 0.75, **changes})
    q, k, v = qkv(tokens)
    fitted = Gates(2, cfg.gates_per_group, 8).fit(k) if gates else None
    return Sight.of(q, k, v, cfg, inv_freq=rope_frequencies(8, 10_000.0), gates=fitted)


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_keeps_the_rules(name):
    check_selector(SELECTORS[name])


@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_reads_what_it_may(name):
    """All of L, but for whole blocks that the window cuts, and for our own rings that hold fewer keys."""
    sight, rows = sight_of(), torch.arange(90)
    choice = choose(SELECTORS[name], sight, rows)
    most = (rows + 1) if name == "dense" else (rows + 1).clamp(max=24)
    lost = {"block means": 7, "quest": 7, "gates": 24, "gates + notes": 24}.get(name, 0)
    assert (choice.reads <= most).all() and (choice.reads >= most - lost).all()
    assert choice.keys[..., rows, rows].all()  # itself


# -- what is refused ----------------------------------------------------------------------------------------------


def later(sight, rows):
    return sight.window(rows + 1, 5)


def too_much(sight, rows):
    return sight.window(rows, sight.shortlist + 1)


def nothing(sight, rows):
    return sight.window(rows, 0)


def numbers(sight, rows):
    return sight.scores(rows)


def a_list(sight, rows):
    return [rows]


def wrong_shape(sight, rows):
    return sight.window(rows, 5).T


def by_chance(sight, rows):
    return sight.best(torch.rand(len(rows), sight.tokens), rows)


def by_the_whole_text(sight, rows):
    """Causal by its mask, but a mean over all tokens decides."""
    return sight.best((sight.k @ sight.k.mean(2)[..., None])[..., 0][:, :, None], rows)


def by_the_length(sight, rows):
    return sight.window(rows, 5 if sight.tokens > 80 else 4)


def by_its_company(sight, rows):
    return sight.window(rows, min(len(rows), 6))


def too_many_stand_ins(sight, rows):
    shape = (*sight.q.shape[:2], len(rows), 9)
    means = torch.zeros(*shape, 8).double()
    return Choice(sight.window(rows, sight.shortlist - 8), StandIns(means, means, torch.ones(shape)))


def stand_ins_of_the_future(sight, rows):
    shape = (*sight.q.shape[:2], len(rows), 1, 8)
    mean = sight.rotated_k.mean(2)[:, :, None, None].expand(shape)
    return Choice(sight.window(rows, 5), StandIns(mean, mean, (rows > 8)[:, None].expand(shape[:-1]).double()))


def misshapen_stand_ins(sight, rows):
    mean = sight.rotated_k[:, :, :1]
    return Choice(sight.window(rows, 5), StandIns(mean, mean, torch.ones(2, 4, len(rows), 1)))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("function", "kind", "said"),
    [
        (later, ValueError, r"row 0 of head 0 reads key 1: must read no later key"),
        (too_much, ValueError, r"row 12 of head 0 reads 13 keys and stand-ins: must read at least 1 and at most 12"),
        (nothing, ValueError, r"row 0 of head 0 reads 0 keys"),
        (numbers, TypeError, r"returned a tensor of torch.float64: must be a bool tensor"),
        (a_list, TypeError, r"returned list"),
        (wrong_shape, ValueError, r"shape \(83, 61\): must broadcast to \(B, H, R, T\) = \(2, 4, 61, 83\)"),
        (by_chance, ValueError, r"another choice at a second call"),
        (by_the_whole_text, ValueError, r"another choice when tokens from 61 on change"),
        (by_the_length, ValueError, r"row 4 makes another choice when tokens from 61 on are left out"),
        (by_its_company, ValueError, r"another choice when other rows are asked for"),
        (too_many_stand_ins, ValueError, r"row 0 of head 0 reads 10 keys and stand-ins"),
        (stand_ins_of_the_future, ValueError, r"row 9 makes another choice when tokens from 61 on change \(of stand"),
        (misshapen_stand_ins, ValueError, r"key of its stand-ins has shape"),
    ],
)
def test_a_selector_that_breaks_a_rule_is_refused_by_name(function, kind, said):
    with pytest.raises(kind, match=said) as error:
        check_selector(Selector(function.__name__, function, "breaks a rule"))
    assert f"selector '{function.__name__}'" in str(error.value)


@pytest.mark.bad_input
def test_rules_hold_at_every_use(monkeypatch):
    sight = sight_of()
    with pytest.raises(ValueError, match="row 0 of head 0 reads key 1"):
        attend_all(Selector("later", later, ""), sight)
    with pytest.raises(ValueError, match="selector 'gates' chooses by gates"):
        choose(SELECTORS["gates"], sight_of(gates=False), torch.arange(3))
    monkeypatch.setattr(attending, "LONGEST", 89)
    with pytest.raises(ValueError, match="asked for 90 tokens.*limited to 89"):
        attend_all(SELECTORS["local"], sight)


# -- the registry ---------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """A copy that a test may write to."""
    there = dict(SELECTORS)
    yield SELECTORS
    SELECTORS.clear()
    SELECTORS.update(there)


@pytest.mark.bad_input
def test_a_name_belongs_to_one_function(registry):
    register("mine", "The newest five.", looks=lambda sight, rows: 3)(later)
    assert registry["mine"].choose is later
    assert registry["mine"].count_looks(sight_of(), torch.arange(2)).tolist() == [3, 3]
    register("mine", "Again.")(later)  # the same cell of a notebook, run again
    with pytest.raises(ValueError, match="name='mine' is taken"):
        register("mine", "Another.")(too_much)
    with pytest.raises(TypeError, match="choose=3"):
        register("three", "No function.")(3)


def test_the_example_of_the_page_runs_from_a_file(registry, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 20
    (tmp_path / "echo.py").write_text(code)
    echo = load_selector(f"{tmp_path}/echo.py:echo")
    assert (echo.name, echo.title) == ("echo", "Far keys most like the row's own key.")
    assert echo.count_looks(sight_of(), torch.tensor([7])).item() == 8
    found = attend_rows(echo, sight_of(), torch.arange(90))
    assert (found.reads == torch.arange(1, 91).clamp(max=24)[:, None]).all()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        ("mine.txt:f", "", "must be FILE.py:NAME"),
        ("mine.py", "", "must be FILE.py:NAME"),
        ("mine.py:f", "g = 1", "has no function 'f'"),
        ("mine.py:f", "f = 1", "has no function 'f'"),
        ("mine.py:f", "raise KeyError(1)", "cannot be run \\(KeyError: 1\\)"),
        ("mine.py:f", "def f(sight, rows): return sight.window(rows, 99)", "selector 'f': row 12 of head 0 reads 13"),
    ],
)
def test_a_file_without_a_good_selector_is_refused(registry, tmp_path, place, code, said):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ValueError, match=said):
        load_selector(f"{tmp_path}/{place}")


def test_the_page_lists_every_selector():
    text = PAGE.read_text(encoding="utf-8")
    listed = text.split("<!-- selectors:begin -->")[1].split("<!-- selectors:end -->")[0]
    for one in SELECTORS.values():
        paper = f" ([paper]({one.paper}))" if one.paper else ""
        assert f"| {one.name} | {one.title}{paper} |" in listed


# -- rows and layers -------------------------------------------------------------------------------------------------


def test_some_rows_are_those_rows_of_all(monkeypatch):
    sight = sight_of()
    for name, selector in SELECTORS.items():
        whole = attend_all(selector, sight)
        rows = torch.tensor([3, 40, 41, 89])
        some = attend_rows(selector, sight, rows)
        assert torch.allclose(some.out, whole.out[:, rows], atol=1e-6), name
        assert torch.equal(some.reads, whole.reads[:, rows]) and torch.equal(some.looks, whole.looks[rows])
        with monkeypatch.context() as patch:
            patch.setattr(attending, "SCORES_PER_STEP", 1)  # one row at a time
            assert torch.allclose(attend_all(selector, sight).out, whole.out, atol=1e-6), name


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"notes": False}, {"max_notes": 2}, {"max_notes": 3, "nearest_gates": True, "probes": 4}, {"shortlist": 90}],
    ids=str,
)
def test_our_selector_is_the_layer(backend, changes):
    sight = sight_of(**changes)
    done = attend_all(SELECTORS["gates + notes" if sight.config.notes else "gates"], sight)
    layer = attend(*qkv(90), sight.config, backend=backend, gates=sight.gates)
    assert off_by(done.out, layer.out) < 1e-5 and torch.equal(done.reads, layer.reads)


@pytest.mark.parametrize(
    "changes", [{}, {"max_notes": 2}, {"max_notes": 3, "nearest_gates": True, "probes": 4}], ids=str
)
def test_gradients_of_our_selector_are_those_of_the_layer(changes):
    cfg = config(**{"route_heads": False, "dna_fraction": 0.75, **changes})
    freq = rope_frequencies(8, 10_000.0)
    gates = Gates(2, cfg.gates_per_group, 8).fit(qkv(90)[1])
    grads = []
    for way in ("selector", "reference", "torch"):
        leaves = qkv(90, grad=True)
        if way == "selector":
            out = attend_all(SELECTORS["gates + notes"], Sight.of(*leaves, cfg, inv_freq=freq, gates=gates)).out
        else:
            out = attend(*leaves, cfg, backend=way, gates=gates).out
        pull = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad((out * pull).sum(), leaves))
    for other in grads[1:]:
        assert all(off_by(a, b) < 1e-5 for a, b in zip(grads[0], other, strict=True))


def test_snapkv_sees_the_newest_queries_and_knorm_the_smallest_keys():
    """Both written out for one row by hand."""
    sight, row = sight_of(), torch.tensor([80])
    older = 80 - (24 - sight.far)  # the last key beyond the window
    small = sight.k[1, 3, : older + 1].norm(dim=-1).argsort()[: sight.far]
    keys = choose(SELECTORS["knorm"], sight, row).keys[1, 3, 0]
    assert set(keys.nonzero()[:, 0].tolist()) == {*small.tolist(), *range(older + 1, 81)}
    paid = torch.zeros(81)
    for t in range(80 - known.OBSERVED + 1, 81):
        for h in (2, 3):  # the heads of group 1
            paid[: t + 1] += (sight.rotated_k[1, h, : t + 1] @ sight.rotated_q[1, h, t] * 8**-0.5).softmax(0)
    smooth = torch.nn.functional.avg_pool1d(paid[None], 5, 1, 2)[0, : older + 1]
    keys = choose(SELECTORS["snapkv"], sight, row).keys[1, 3, 0]
    wanted = smooth.argsort(descending=True)[: sight.far]
    assert set(keys.nonzero()[:, 0].tolist()) == {*wanted.tolist(), *range(older + 1, 81)}


def test_a_model_that_reads_every_key_by_a_selector_gives_its_own_logits():
    pytest.importorskip("transformers")
    from tiny_llama import build

    from proteus_playground.hf.patch import full_attention_layers, layer_shape, patched

    model, _ = build()
    cfg = layer_shape(model, 0).config(shortlist=24)
    ids = torch.randint(20, (1, 150))
    own = model(ids).logits
    for name in ("dense", "local"):
        layer = SelectorLayer(SELECTORS[name], cfg)
        with patched(model, dict.fromkeys(full_attention_layers(model), layer)):
            found = model(ids, use_cache=False).logits
        assert torch.allclose(found, own, atol=1e-4) == (name == "dense")
    assert torch.allclose(found[:, :24], own[:, :24], atol=1e-4)  # as long as the window holds everything


@pytest.mark.bad_input
def test_padding_is_refused():
    pytest.importorskip("transformers")
    from tiny_llama import build

    from proteus_playground.hf.patch import layer_shape, patched

    model, _ = build()
    mask = torch.ones(1, 40, dtype=torch.long)
    mask[0, :5] = 0
    layer = SelectorLayer(SELECTORS["local"], layer_shape(model, 0).config(shortlist=24))
    with patched(model, {0: layer}), pytest.raises(ValueError, match="selector 'local' got padding"):
        model(torch.randint(20, (1, 40)), attention_mask=mask, use_cache=False)
