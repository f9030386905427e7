"""The benchmarks beside the sweep, on tiny sizes: what they measure, print and save."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import tiny_llama
import torch
from benches import SMALL, saved
from helpers import config
from proteus_playground.experiments.speed import longest, profile, row, stream, top_a
from proteus_playground.experiments.speed.top_a import continuations, repetition

from proteus_playground.lm.model import ModelConfig, ProteusLM
from proteus_playground.lm.sampling import TopA
from proteus_playground.lm.shelf import ShelfTokenizer
from proteus_playground.streaming.buffer import StreamPlan


def test_the_longest_length_is_searched_for():
    def until(most, ms=1.0):
        return lambda tokens: {"who": "flash", "tokens": tokens, "first_ms": ms * tokens**2,
                               "status": "ok" if tokens <= most else row.OOM}  # fmt: skip

    def tried(*args):
        return [(one["tokens"], one["status"] == "ok") for one in longest.search(*args)]

    assert tried(until(13), 2, 64, 1, 1e9) == [(2, True), (4, True), (8, True), (16, False), (12, True)]
    assert tried(until(13), 2, 64, 2, 1e9)[-2:] == [(12, True), (14, False)]
    assert tried(until(1), 2, 64, 2, 1e9) == [(2, False)]
    assert tried(until(99), 2, 8, 1, 1e9) == [(2, True), (4, True), (8, True)]
    rows = longest.search(until(99), 2, 64, 1, 0.1)
    assert [one["tokens"] for one in rows] == [2, 4, 8, 16] and rows[-1]["status"].startswith("not tried: more than")


def test_longest_end_to_end(run):
    asked = "longest --start 32 --last 64 --rivals mha,cudnn --groups 2 --out out.json"
    code, out, err = run(*asked.split(), *SMALL)
    assert code == 0, err
    assert [one["longest"] for one in saved()["rows"]] == [64, 64, None]
    assert "no kernel for this case" in out and "the longest asked for" in out


@pytest.mark.parametrize("passes", ["forward", "training"])
def test_profile_end_to_end(run, passes):
    asked = f"profile --tokens 128 --calls 2 --passes {passes} --top 3 --out out.json"
    code, out, err = run(*asked.split(), *SMALL)
    assert code == 0, err
    report = saved()
    matrix = sum(one["ms"] for one in report["rows"] if one["matrix"])
    assert 0 < report["matrix_share"] < 1 and report["matrix_share"] == pytest.approx(matrix / report["kernels_ms"])
    assert any(one["kernel"] == "aten::mm" and one["matrix"] for one in report["rows"])
    assert report["rule"] and "others |" in out and "on matrix units" in out


def test_profile_of_what_cannot_run_says_why(run):
    code, _, err = run("profile", "--who", "cudnn", "--tokens", "64")
    assert code == 1 and "SDPA, cuDNN: no kernel for this case" in err


@pytest.mark.parametrize(
    ("kernel", "units"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNN", True),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", True),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4> >(Flash_fwd_params)", True),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm75(PyTorchMemEffAttention::AttentionKernel)", True),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", True),
        ("near_kernel", True),
        ("ampere_sgemm_128x64_tn", False),
        ("void gemv2T_kernel_val<int, int, float>(float)", False),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)", False),
        ("Memcpy DtoD (Device -> Device)", False),
    ],
)
def test_which_kernels_run_matrix_units(kernel, units):
    assert profile.runs_matrix_units(kernel, {"near_kernel"}) is units
    assert len(profile.short(kernel)) <= 60


def test_our_kernels_with_a_dot_are_found():
    pytest.importorskip("triton")
    code = "from proteus_playground.experiments.speed.profile import our_matrix_kernels as found; print(*found())"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # it hides the source
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert {"near_kernel", "far_kernel"} <= set(done.stdout.split())


def test_bench_layer_prints_the_table_of_the_readme(run):
    code, out, err = run("layer", "--lengths", "64,256", "--repeats", "1", "--no-memory", "--out", "out.json")
    assert code == 0, err
    assert "| tokens | Proteus, ms | dense SDPA, ms | speed-up | reads per query | peak extra memory, MB |" in out
    assert "| 256 |" in out and "(fused, " in out and "of 128 |" in out
    first = saved()["rows"][0]
    assert {"tokens", "backend", "reads", "dense_reads", "budget", "ours", "dense", "speedup"} <= set(first)


# -- the small models ------------------------------------------------------------------------------------------


@pytest.fixture
def reader(tmp_path):
    """A file of an untrained model that reads shelves."""
    vocabulary = ShelfTokenizer().vocab_size
    torch.manual_seed(0)
    return str(ProteusLM(ModelConfig(vocabulary, 1, config(d_model=16, n_heads=2, shortlist=8))).save(tmp_path / "m"))


def test_bench_exam_counts_the_same_questions_at_every_alpha(run, reader):
    code, out, _ = run(
        "exam", "--model", reader, "--lengths", "512", "--questions", "5", "--alphas", "0,1", "--out", "out.json"
    )
    assert code == 0 and "| 512 | 1 | 32 | 5 | 0.0% |" in out
    rows = saved()["rows"]
    assert [(row["alpha"], row["questions"], row["right"]) for row in rows] == [(0.0, 5, 0.0), (1.0, 5, 0.0)]
    assert rows[0]["far"] == rows[1]["far"] <= 5


def test_bench_top_a_compares_arms_on_the_same_draws(run, reader):
    code, out, _ = run(
        "top-a", "--model", reader, "--prompts", "1", "--seeds", "2", "--tokens", "8", "--out", "out.json"
    )
    assert code == 0 and [line.split(" | ")[0] for line in out.splitlines()[4:]] == ["| none", "| filter", "| reweigh"]
    rows = {row["arm"]: row for row in saved()["rows"]}
    assert rows["filter"]["agreement"]["mean"] > rows["none"]["agreement"]["mean"]
    assert 0 <= rows["none"]["repetition"]["mean"] <= 1 and rows["none"]["nll"]["mean"] > 0


# -- Top-A -----------------------------------------------------------------------------------------------------

V = 23


def model(alpha=1.0, **changes) -> ProteusLM:
    torch.manual_seed(0)
    return ProteusLM(ModelConfig(V, 2, config(flux_alpha=alpha, **changes))).eval()


def text(batch=1, tokens=20, seed=1):
    return torch.randint(V, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def test_rows_measure_every_arm_on_the_same_texts():
    lm, prompts = model(heads_awake_max=1), [text(1, 9)[0], text(1, 14, 2)[0]]
    arms = {"none": None, "filter": TopA(0.9), "reweigh": TopA(mode="reweigh", strength=30.0)}
    found = list(continuations(lm, prompts, arms=arms, new_tokens=16, seeds=(0, 4), top_p=1.0))
    assert [(r.prompt, r.seed, r.arm) for r in found] == [(p, s, a) for p in (0, 1) for s in (0, 4) for a in arms]
    assert lm.cfg.attention.flux_alpha == 1.0 and lm.blocks[0].attn.cfg.flux_alpha == 1.0
    mean = {a: sum(r.agreement for r in found if r.arm == a) / 4 for a in arms}
    assert mean["none"] < mean["filter"] and mean["none"] + 0.1 < mean["reweigh"]
    one = found[3]
    assert one.tokens == tuple(int(t) for t in lm.generate(prompts[0][None], 16, seed=4))
    dense = copy.deepcopy(lm)
    dense.set_flux_alpha(0.0)
    ids = torch.cat((prompts[0], torch.tensor(one.tokens)))
    nll = -dense(ids[None])[0].log_softmax(-1)[torch.arange(8, 24), ids[9:]].mean()
    assert one.nll == pytest.approx(float(nll.detach()), abs=1e-5)
    assert one.repetition == repetition(one.tokens) and list(top_a.ARMS) == list(arms)


def test_repetition():
    assert repetition([1, 2, 3]) == repetition(range(50)) == 0
    assert repetition([7] * 13) == pytest.approx(0.9)


def test_what_continuations_refuse():
    with pytest.raises(ValueError, match="new_tokens=2"):
        next(continuations(model(), [text()[0]], new_tokens=2))
    with pytest.raises(ValueError, match=r"dense\.training="):
        next(continuations(model(), [text()[0]], model().train()))


# -- decode and stream ------------------------------------------------------------------------------------------


def test_bench_decode_reports_time_and_memory_by_context(run):
    small = ["--lengths", "64,256", "--heads", "4", "--groups", "2", "--head-dim", "8", "--shortlist", "24"]
    asked = ["decode", *small, "--config", '{"gates_per_group": 4}', "--repeats", "2", "--out", "out.json"]
    code, shown, err = run(*asked)
    assert code == 0, err
    report = saved()
    rows = {(row["who"], row["context"]): row for row in report["rows"]}
    assert rows["bank", 64]["bytes"] == rows["bank", 256]["bytes"]
    assert rows["dense", 256]["bytes"] == 2 * 257 * 2 * 8 * 4
    assert all(row["eager"]["median_ms"] > 0 and row["eager"]["runs"] == 2 for row in rows.values())
    assert "memory 1.00x" in shown and report["seed"] == 0 and report["dtype"] == "float32"


def test_bench_model_reads_and_writes_both_ways(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path / "cache"))
    for part in tiny_llama.build(max_position_embeddings=512):
        part.save_pretrained(tmp_path / "tiny")
    small = ["--lengths", "48,96", "--new", "2", "--repeats", "1", "--shortlist", "16"]
    code, shown, err = run("model", "--model", str(tmp_path / "tiny"), *small, "--out", "out.json")
    assert code == 0, err
    rows = {(row["who"], row["tokens"]): row for row in saved()["rows"]}
    assert rows["dense", 96]["cache_bytes"] == 3 * 2 * (96 + 2) * 2 * 8 * 4  # layers, k and v, tokens, groups, features
    assert rows["proteus", 96]["cache_bytes"] == rows["proteus", 48]["cache_bytes"]
    assert all(row["prefill"]["median_ms"] > 0 and row["token"]["runs"] == 2 for row in rows.values())
    assert "one more token, ms: Proteus" in shown


PLAN = StreamPlan(chunk_tokens=100, buffer_tokens=60, per_chunk_budget=12, nucleus=0.9, neighbours=1)
BENCH = {"width": 32, "heads": 2, "prompt_rows": 3, "device": "cpu", "seed": 0, "repeats": 2}


def test_the_benchmark_measures_the_same_pass_wherever_the_rows_lie(tmp_path):
    file = tmp_path / "rows.npy"
    stream.write_embeddings(file, 1030, 32, seed=0, step=100)
    for by in stream.BY:
        cases = [
            stream.StreamCase(1030, where, by, PLAN, file=str(file), **BENCH) for where in ("ram", "disk", "generated")
        ]
        rows = [stream.measure_stream(case) for case in cases]
        assert [row["storage"] for row in rows] == ["ram", "disk", "generated"]
        assert {row["kept"] for row in rows} == {60}
        assert all(row["pass_1"]["runs"] == 2 and 0 < row["reading_share"] < 1 for row in rows)
        assert all(row["tokens_per_s"] == 1030 / row["pass_1"]["median_ms"] * 1e3 for row in rows)
        stores = [stream.open_case(case, torch.device("cpu"))[0] for case in cases]
        assert len({stores[i].read(0, 1030).tobytes() for i in range(3)}) == 1


def test_rows_made_on_the_device_do_not_depend_on_how_they_are_read():
    rows = stream.OnDevice(1030, 8, block=100, seed=3, device=torch.device("cpu"))
    whole = rows.read(0, 1030)
    assert whole.shape == (1030, 8)
    for start, stop in ((0, 1), (99, 101), (250, 700), (1000, 1030), (5, 5)):
        assert torch.equal(rows.read(start, stop), whole[start:stop])


@pytest.mark.slow
def test_bench_stream_writes_its_table_and_json(run):
    sizes = ["--chunk-tokens", "512", "--buffer-tokens", "128", "--per-chunk-budget", "64", "--width", "32"]
    code, out, err = run(
        "stream", "--lengths", "2k", *sizes, "--heads", "2", "--repeats", "1", "--storage", "disk",
        "--by", "prompt", "--out", "out.json",
    )  # fmt: skip
    assert code == 0, err
    report = saved()
    assert report["plan"]["chunk_tokens"] == 512 and report["torch"] == torch.__version__
    (row,) = report["rows"]
    assert (row["tokens"], row["kept"]) == (2048, 128) and row["peak_mb"] >= row["pass_1_peak_mb"] > 50
    assert "| 2,048 | disk | prompt |" in out
