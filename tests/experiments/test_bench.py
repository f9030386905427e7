"""The sweep and what all benchmarks share, on tiny sizes: measurements, cases that cannot run, stop and resume."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer
from benches import TINY, case, saved
from proteus_playground.experiments.speed import floor, measure, rivals, row, sweep, table
from proteus_playground.experiments.speed.rivals import OURS
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from proteus_playground.common import files, options

# -- what is asked ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("1k,4096,1m", [1024, 4096, 1 << 20]),
        ("4k..32k", [4096, 8192, 16384, 32768]),
        ("4k..100k/4", [4096, 16384, 65536]),
        ("7,1K..2k", [7, 1024, 2048]),
    ],
)
def test_lengths(text, lengths):
    assert options.parse_lengths(text) == lengths


@pytest.mark.parametrize("text", ["", "0", "4k..", "..4k", "8k..4k", "4k..8k/1", "4k/2", "1.5k", "1k,,2k", "k", "-1"])
@pytest.mark.bad_input
def test_bad_lengths(text):
    with pytest.raises(typer.BadParameter, match="whole numbers >= 1"):
        options.parse_lengths(text)


def test_alphas():
    assert options.parse_alphas("0,0.5,auto") == [0.0, 0.5, None]
    for text in ("1.1", "-0.1", "none", "", "nan"):
        with pytest.raises(typer.BadParameter, match=r"\[0, 1\] or auto"):
            options.parse_alphas(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sweep --lengths 8k..4k", "--lengths"),
        ("sweep --rivals flash,sloth", "--rivals"),
        ("sweep --scope world", "--scope"),
        ("sweep --timing sundial", "--timing"),
        ("sweep --groups 3", "n_kv_heads=3"),
        ("sweep --config []", "--config"),
        ("sweep --cap 4", "--cap"),
        ("sweep --backend abacus", "backend='abacus'"),
        ("longest --start 0", "--start"),
        ("profile --passes sideways", "--passes"),
        ("page nowhere.json page.html", "nowhere.json"),
    ],
)
def test_bad_usage_exits_2_and_names_the_argument(run, line, message):
    code, out, err = run(*line.split())
    assert code == 2 and message in err and "Traceback" not in err, (out, err)


# -- how it is measured ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_the_device_is_idle_before_a_timed_call_and_done_after_it(monkeypatch, kind):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"L2_cache_size": 8}))
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: log.append("flush"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: log.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 77)
    for backend in (torch.cuda, torch.mps):
        monkeypatch.setattr(backend, "synchronize", lambda *a: log.append("sync"))
    ms, peak = measure.clock(lambda: log.append("run"), torch.device(kind))
    if kind == "mps":
        assert log == ["sync", "run", "sync"] and peak is None
    else:
        assert log == ["flush", "sync", "reset", "event", "run", "event", "sync"]
        assert (ms, peak) == (2.5, 77)


def test_a_call_that_waits_for_the_device_is_refused_before_a_capture_begins(monkeypatch):
    from contextlib import nullcontext
    from unittest.mock import MagicMock

    log, waits = [], [True]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", log.append)
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: log.append("graph") or MagicMock(replay=lambda: log.append("replay"))
    )
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda what: nullcontext())
    monkeypatch.setattr(measure, "wait", lambda device: log.append("sync"))

    def call():
        log.append("run")
        if waits[0] and log[-2] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"), measure.captured(call, torch.device("cuda")):
        pass
    assert log == ["error", "run", "default"]
    log.clear(), waits.clear()
    waits.append(False)
    with measure.captured(call, torch.device("cuda")) as replay:
        replay()
    assert log == ["error", "run", "default", "graph", "run", "replay", "sync"]


def test_repeats_end_with_the_budget(monkeypatch):
    monkeypatch.setattr(measure, "clock", lambda run, device: (400.0, None))
    assert len(measure.repeat_ms(None, None, 10, budget_s=1.0)) == 3
    assert len(measure.repeat_ms(None, None, 2, budget_s=1.0)) == 2
    assert len(measure.repeat_ms(None, None, 2, budget_s=0.0)) == 1


@pytest.mark.parametrize(
    ("scope", "passes", "flops", "moved"),
    [
        # 100 tokens, D 32, 4 heads over 2 groups of 8, fp32; 10 keys a row: 4 * 8 * 400 * 10 operations to attend.
        ("attention", "forward", 128_000, 4 * 100 * 8 * (4 + 2 + 2 + 4)),
        ("attention", "training", 3.5 * 128_000, 2 * 4 * 100 * 8 * 12),
        # q and o: 2 * 100 * 32 * 32 each; k and v: half of that each. 3,072 weights, 6,400 numbers in and out.
        ("layer", "forward", 128_000 + 614_400, 4 * (6_400 + 3_072)),
        ("layer", "training", 3.5 * 128_000 + 3 * 614_400, 2 * 4 * (6_400 + 3_072)),
    ],
)
def test_the_floor_by_hand(scope, passes, flops, moved):
    one = case(tokens=100, scope=scope, passes=passes)
    facts = {"keys_per_query": 10, "heads_awake": 4, "tokens_kept": 100}
    found = floor.floor(one, facts, {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e7})
    assert (found["flops"], found["bytes"]) == (flops, moved)
    assert found["compute_ms"] == pytest.approx(flops / 1e6) and found["memory_ms"] == pytest.approx(moved / 1e4)
    assert found["ms"] == max(found["compute_ms"], found["memory_ms"])


def test_a_sleeping_head_and_a_dropped_token_lower_the_floor():
    whole, half = (floor.work(case(tokens=100), 10, heads, kept)[0] for heads, kept in ((4, 100), (2, 50)))
    assert whole - half == 0.75 * (128_000 + 409_600)


def test_rates_are_measured(monkeypatch):
    monkeypatch.setattr(floor, "TRIES", 1)
    assert all(value > 0 for value in floor.measure_rates(torch.device("cpu"), torch.float32).values())


# -- who is compared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["fused", "flash"])
@pytest.mark.parametrize("scope", ["attention", "layer"])
def test_dense_rivals_compute_what_we_do_at_alpha_zero(who, scope):
    ours, theirs = (rivals.enter(case(name, scope=scope, flux_alpha=0.0)) for name in (OURS, who))
    assert set(theirs.ways) == {"grouped", "repeated"}
    if scope == "layer":  # the same weights: our q, k and v projections are their one
        q, k, v, o = (weight.detach() for weight in ours.leaves[1:])
        theirs.leaves[1].data, theirs.leaves[2].data = torch.cat([q, k, v]), o
    with torch.inference_mode(), theirs.context():
        for way in theirs.ways.values():
            torch.testing.assert_close(way(), ours.ways[""](), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("who", "tokens"), [("flex", 300), ("flex", 1024), ("flex-dense", 300)])
def test_flex_reads_window_and_anchors(who, tokens):
    one = case(who, tokens, shortlist=200)
    mask = rivals._flex_mask(one)
    slow = create_block_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu")
    assert torch.equal(mask.to_dense(), slow.to_dense())
    for ours, theirs in ((mask.kv_num_blocks, slow.kv_num_blocks), (mask.full_kv_num_blocks, slow.full_kv_num_blocks)):
        assert torch.equal(ours, theirs)
    at = torch.arange(tokens)
    reads = mask.mask_mod(0, 0, at[:, None], at).sum(1).double()
    assert reads.max() == (200 if who == "flex" else tokens)
    assert rivals._rival_facts(one)["keys_per_query"] == pytest.approx(float(reads.mean()))


def test_long_inputs_are_drawn_in_pieces_and_by_seed(monkeypatch):
    monkeypatch.setattr(rivals, "TOKENS_PER_DRAW", 50)
    draws = [rivals.make_inputs(case().cfg, 120, torch.device("cpu"), torch.float32, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (1, 120, 4, 8) and draws[0].std() > 0.5


def test_a_row_holds_what_was_asked():
    one = case(tokens=128, passes="training", route_heads=True, heads_awake_max=1, keep_ratio=0.5)
    found = row.attempt(one, 3, 10, "both", {"matmul_flops_per_s": 1e9, "copy_bytes_per_s": 1e9})
    assert found["status"] == "ok" and found["eager"]["runs"] == 3
    assert found["graph"] == {"failed": "failed: RuntimeError: cpu has no CUDA graphs"}
    assert found["eager"]["q1_ms"] <= found["ms"] <= found["eager"]["q3_ms"] and found["first_ms"] > 0
    assert found["heads_awake"] == 2 and found["tokens_kept"] < 128 and found["flux_alpha"] == 1.0
    assert found["keys_per_query"] <= 24 and found["backend"] and found["backend_reason"]
    assert found["floor_ratio"] == pytest.approx(found["ms"] / found["floor"]["ms"])
    assert found["tokens_per_s"] == pytest.approx(128 / found["ms"] * 1e3)


def test_a_call_is_weighed_in_a_process_of_its_own():
    found = row.attempt(case(tokens=2048, scope="attention"), 1, 10, memory=True)
    assert found["status"] == "ok" and 0 < found["extra_mb"] < 500


# -- the sweep -------------------------------------------------------------------------------------------------


def test_a_sweep_end_to_end(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)

    def refuse():
        raise RuntimeError("compiler: no such thing")

    monkeypatch.setattr(rivals, "_compiled_flex", refuse)
    asked = "sweep --lengths 48..96 --alphas 1,auto --scope layer,attention --passes forward,training"
    who = "fused,cudnn,mha,flex,nsa,fa3"
    code, out, err = run(*asked.split(), "--rivals", who, *TINY, "--out", "out.json", "--page", "page.html")
    assert code == 0, err
    report = saved()
    rows = {sweep.key(one): one for one in report["rows"]}
    assert len(rows) == len(report["rows"]) == 2 * 2 * 2 * (2 + 6) and report["left_out"] == []
    assert report["rates"] and report["torch"] == torch.__version__ and report["settings"]["shortlist"] == 32

    def status(who, tokens, scope="layer", alpha=None):
        return rows[scope, "training", 2, tokens, who, alpha]["status"]

    assert status("fused", 96) == status("mha", 96) == status(OURS, 96, alpha=1.0) == status(OURS, 48, "layer", "auto")
    assert status("cudnn", 48) == "no kernel for this case on this device"
    assert status("flex", 48) == "failed: RuntimeError: compiler: no such thing"
    assert status("flex", 96) == "skipped: failed at 48 tokens"
    assert status("nsa", 48).startswith("not installed: flash-linear-attention")
    assert status("fa3", 48, "attention").startswith("not installed: flash-attn-3: ")
    assert status("mha", 48, "attention").startswith("not offered: ")
    assert rows["layer", "forward", 2, 96, "mha", None]["keys_per_query"] == 48.5
    assert rows["layer", "forward", 2, 96, OURS, "auto"]["backend"] == "dense"

    assert out.count("| tokens | who | ms (q1–q3) | vs best dense |") == 4
    assert "Proteus, α by length" in out and "not installed: flash-linear-attention" in out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<table>") == 4 and page.count('class="plotly-graph-div"') == 4 and "Plotly.newPlot" in page
    assert 'src="http' not in page.replace("'", '"').split("plotly.js v")[0], "the page needs no network"
    code, again, _ = run("page", "out.json", "again.html")
    assert code == 0 and again == out and (tmp_path / "again.html").stat().st_size > 1e6


@pytest.mark.parametrize("pair", [False, True])
def test_flash_attention_is_called_as_its_package_wants_it(monkeypatch, pair):
    """A stand-in for flash-attn-4, which takes `(B, T, H, d)` and KV groups as they are."""

    def attend(q, k, v, causal):
        assert causal and q.shape[2] == 2 * k.shape[2]
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)
        return (out.transpose(1, 2), None) if pair else out.transpose(1, 2)

    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=attend))
    for scope in ("layer", "attention"):
        outs = []
        for who, way in (("fa4", ""), ("fused", "grouped")):
            torch.manual_seed(0)  # weights of the projections
            ready = rivals.enter(replace(case(tokens=40, scope=scope), who=who))
            outs.append(ready.ways[way]())
            assert ready.facts()["keys_per_query"] == 20.5
        torch.testing.assert_close(*outs)


def test_a_stopped_sweep_goes_on_where_it_was(run, monkeypatch):
    ask = ["sweep", "--lengths", "32..128", "--rivals", "fused", *TINY, "--out", "out.json"]
    attempt, asked = row.attempt, []

    def stop_at_three(one, **how):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((one.who, one.tokens))
        return attempt(one, **how)

    monkeypatch.setattr(sweep, "attempt", stop_at_three)
    code, _, err = run(*ask)
    assert code == 130 and "3 rows to go: the same command goes on" in err
    before = saved()
    assert len(before["rows"]) == 3 and len(before["left_out"]) == 3

    asked.clear()
    monkeypatch.setattr(sweep, "attempt", lambda one, **how: asked.append((one.who, one.tokens)) or attempt(one, **how))
    code, out, _ = run(*ask, "--resume")
    assert code == 0 and asked == [("fused", 64), (OURS, 128), ("fused", 128)]
    after = saved()
    assert after["rows"][:3] == before["rows"] and len(after["rows"]) == 6 and after["left_out"] == []

    asked.clear()
    code, _, err = run(*ask, "--dtype", "bfloat16")
    assert code == 2 and "dtype 'float32', now 'bfloat16'" in err and "--fresh" in err and not asked
    assert saved() == after
    code, _, _ = run(*ask, "--lengths", "32", "--dtype", "bfloat16", "--fresh")
    assert code == 0 and len(saved()["rows"]) == 2


def test_another_file_is_never_overwritten(run, tmp_path):
    for text in ("[1, 2]", "not JSON", '{"rows": []}'):
        (tmp_path / "out.json").write_text(text)
        code, _, err = run("sweep", "--lengths", "32", *TINY, "--out", "out.json")
        assert code == 2 and "is no sweep's report" in err and (tmp_path / "out.json").read_text() == text


def test_running_out_of_memory_is_a_row(run, monkeypatch):
    enter = rivals.enter

    def small(one):
        if one.tokens >= 64 and one.who == "fused":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 EiB")
        if one.tokens >= 64 and one.who == "mha":
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return enter(one)

    monkeypatch.setattr(row, "enter", small)
    code, out, _ = run("sweep", "--lengths", "32..128", "--rivals", "fused,mha", *TINY, "--out", "out.json")
    assert code == 0
    told = {(one["who"], one["tokens"]): one["status"] for one in saved()["rows"]}
    for who in ("fused", "mha"):
        assert told[who, 32] == "ok" and told[who, 64] == "out of memory"
        assert told[who, 128] == "skipped: out of memory at 64 tokens"
    assert told[OURS, 128] == "ok" and "| out of memory |" in out


def test_who_took_too_long_is_not_tried_at_longer_lengths():
    slow = case("fused", 64).key() | {"status": "ok", "ms": 2500.0}
    assert sweep.skipped(case("fused", 128), [slow], 2.0) == "skipped: 2.5 s a call at 64 tokens, over --budget-s 2"
    assert sweep.skipped(case("fused", 128), [slow], 3.0) is None
    assert sweep.skipped(case("fused", 32), [slow], 2.0) is None
    assert sweep.skipped(case("fused", 128, scope="attention"), [slow], 2.0) is None
    broke = case(tokens=64).key() | {"status": "failed: ValueError: odd"}
    assert sweep.skipped(case(tokens=128), [broke], 2.0) is None, "ours is tried again"


def test_a_limit_ends_a_run_cleanly(run, monkeypatch):
    code, out, err = run("sweep", "--lengths", "32", *TINY, "--out", "out.json", "--limit-s", "1e-9")
    assert code == 0 and "rows to go" in err and "rows left out, from Proteus" in out
    assert saved()["rows"] == [] and len(saved()["left_out"]) == 7


def test_a_device_that_a_kernel_broke_ends_the_run_but_not_its_rows(run, monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sweep, "wait", broken)
    code, _, err = run("sweep", "--lengths", "32", "--rivals", "", *TINY, "--out", "out.json")
    assert code == 1 and "run the command again" in err and len(saved()["rows"]) == 1


def test_best_dense_is_the_fastest_exact_row():
    settings = {"n_heads": 4}
    rows = [case(who).key() | {"status": "ok", "ms": ms} for who, ms in ((OURS, 2.0), ("flash", 6.0), ("mha", 9.0))]
    rows.append(case("flex").key() | {"status": "ok", "ms": 1.0})
    ((title, found),) = table.sections({"settings": settings, "rows": rows})
    assert title == "Whole layer, hidden states in and out; forward; 4 heads over 2 KV groups"
    assert [one["speedup"] for one in found] == [3.0, 1.0, pytest.approx(2 / 3), 6.0]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1} and list(tmp_path.iterdir()) == [path]
