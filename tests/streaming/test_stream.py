"""Pass 1 as it is run (killed, resumed, shared), the layer that scores it, and pass 2."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import layer
from kills import run_through_kills

from proteus_playground import AttentionConfig, ProteusAttention
from proteus_playground.common import tensors
from proteus_playground.common.progress import Stopped
from proteus_playground.streaming.buffer import Champions, StreamPlan, choose
from proteus_playground.streaming.layer_scorer import LayerScorer
from proteus_playground.streaming.run import run
from proteus_playground.streaming.second_pass import attend_over, gather, second_pass

HERE = Path(__file__).resolve().parent
PLAN = StreamPlan(chunk_tokens=100, buffer_tokens=60, per_chunk_budget=12, nucleus=0.9, neighbours=1)
WIDTH = 32


@dataclass(frozen=True)
class Array:
    """Rows in memory, as a store."""

    rows: np.ndarray
    fingerprint: str = "rows"

    @classmethod
    def random(cls, tokens: int = 1030, seed: int = 0) -> Array:
        return cls(np.random.default_rng(seed).standard_normal((tokens, WIDTH), np.float32))

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.rows[start:stop]


def prompted(rows: int = 5, **changes) -> LayerScorer:
    return LayerScorer(layer(**changes), torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(9)))


def final(*args, **kwargs) -> Champions:
    *_, last = run(*args, **kwargs)
    return last.buffer


def same(one: Champions, other: Champions) -> bool:
    return all(
        getattr(one, name).dtype == getattr(other, name).dtype
        and getattr(one, name).tobytes() == getattr(other, name).tobytes()
        for name in vars(one)
    )


# -- the layer as a scorer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 40, 300])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_content_match_is_the_best_dot_product_of_any_prompt_row_and_head(rows, groups, bias):
    attn = layer(n_kv_heads=groups, bias=bias)
    for proj in (attn.q_proj, attn.k_proj):
        if bias:
            torch.nn.init.normal_(proj.bias)
    prompt, x = torch.randn(rows, WIDTH), torch.randn(777, WIDTH)
    scorer = LayerScorer(attn, prompt)
    score, reason = scorer.score(x.numpy())
    with torch.no_grad():
        q = attn.q_proj(prompt).view(rows, 4, 8)
        k = attn.k_proj(x).view(777, groups, 8).repeat_interleave(4 // groups, dim=1)
        every = torch.einsum("phd,nhd->nph", q, k).flatten(1) * 8**-0.5  # all prompt rows and heads
    assert np.allclose(score, every.amax(1), atol=1e-5)
    assert score.dtype == np.float32 and reason.dtype == np.int32
    named = every[torch.arange(777), torch.from_numpy(reason).long()]
    assert np.allclose(named, every.amax(1), atol=1e-5), "the row and head named are not the best"
    row, head = divmod(int(reason[0]), 4)
    assert scorer.explain(int(reason[0])) == f"matches prompt row {row} in head {head}"


def test_short_prompts_make_no_keys_and_long_ones_do():
    assert prompted(1)._measure.__name__ == "_match_folded"
    assert prompted(300)._measure.__name__ == "_match_keys"


@pytest.mark.parametrize("dead", [False, True])
def test_without_a_prompt_the_score_is_salience(dead):
    attn = layer(gates_per_group=5)
    attn.gates.alive[1, 3] = not dead
    x = torch.randn(900, WIDTH)
    score, reason = LayerScorer(attn).score(x.numpy())
    with torch.no_grad():
        k = attn.k_proj(x).unflatten(-1, (2, 8))
        gate, best = attn.gates.lure(k)
        lured = best * torch.stack([attn.gates.confidence[g][gate[:, g]] for g in range(2)], dim=1)
    assert np.allclose(score, attn.gates.salience(k), atol=1e-6)
    group, slot = np.divmod(reason, 5)
    rows = np.arange(900)
    assert np.allclose(lured[rows, group], lured.amax(1), atol=1e-6)
    assert (gate[rows, group].numpy() == slot).all()
    assert LayerScorer(attn).explain(7) == "salient: gate 2 of KV group 1"


@pytest.mark.parametrize("tokens", [1, 7, 64, 5003])
@pytest.mark.parametrize("rows", [None, 2, 200])
def test_scores_do_not_depend_on_threads_or_where_the_rows_lie(tokens, rows):
    attn = ProteusAttention(AttentionConfig(d_model=512, n_heads=8, n_kv_heads=2))
    scorer = LayerScorer(attn, None if rows is None else torch.randn(rows, 512))
    x = np.random.default_rng(0).standard_normal((tokens, 512), np.float32)
    moved = np.empty(x.size + 1, np.float32)[1:].reshape(x.shape)
    moved[:] = x
    before, found = torch.get_num_threads(), []
    try:
        for threads, data in ((1, x), (2, x), (3, moved), (1, torch.from_numpy(x))):
            torch.set_num_threads(threads)
            found.append(b"".join(part.tobytes() for part in scorer.score(data)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1


def test_the_fingerprint_follows_what_changes_a_score():
    base = prompted().fingerprint
    assert prompted().fingerprint == base
    others = [prompted(4), prompted(seed=1), LayerScorer(layer()), LayerScorer(layer(seed=1))]
    assert len({base, *(scorer.fingerprint for scorer in others)}) == 5


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (np.zeros((3, 31), np.float32), "must be (n, D=32)"),
        (np.zeros(3, np.int32), "expected floating-point rows"),
        ([[0.0]], "expected floating-point rows"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows, problem):
    with pytest.raises((TypeError, ValueError)) as err:
        prompted().score(rows)
    assert "rows" in str(err.value) and problem in str(err.value)


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="prompt has no rows"):
        LayerScorer(layer(), torch.zeros(0, WIDTH))
    with pytest.raises(ValueError, match="labels has 1 entries"):
        LayerScorer(layer(), torch.zeros(2, WIDTH), ["one"])
    with pytest.raises(TypeError, match="expected ProteusAttention"):
        LayerScorer(torch.nn.Linear(2, 2))


# -- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_after", [0, 1, 4, 10, 11])
def test_a_stopped_run_goes_on_to_the_same_buffer(tmp_path, stop_after):
    store, scorer, path = Array.random(), prompted(), tmp_path / "c.safetensors"
    whole = final(store, scorer, PLAN)
    asked = iter(range(100))
    steps = []
    try:
        for step in run(store, scorer, PLAN, checkpoint=path, stop=lambda: next(asked) >= stop_after):
            steps.append(step.index)
    except Stopped:
        assert stop_after <= 10
    rest = list(run(store, scorer, PLAN, checkpoint=path))
    assert [*steps[:11], *(step.index for step in rest)] == list(range(12))
    assert same(rest[-1].buffer, whole)
    assert [step.index for step in run(store, scorer, PLAN, checkpoint=path)] == [11]  # nothing left to read
    assert len(list(run(store, scorer, PLAN, checkpoint=path, fresh=True))) == 12


def test_a_run_that_fails_or_is_left_keeps_what_was_done(tmp_path):
    store, scorer, path = Array.random(), prompted(), tmp_path / "c.safetensors"
    for step in run(store, scorer, PLAN, checkpoint=path, every_s=1e9):
        if step.index == 3:
            break
    with pytest.raises(KeyboardInterrupt):
        for step in run(store, scorer, PLAN, checkpoint=path, every_s=1e9):
            assert step.index > 3
            if step.index == 6:
                raise KeyboardInterrupt
    step = next(run(store, scorer, PLAN, checkpoint=path))
    assert step.index == 7


def test_a_checkpoint_of_another_run_is_refused_and_says_why(tmp_path):
    store, path = Array.random(), tmp_path / "c.safetensors"
    final(store, prompted(), PLAN, checkpoint=path)
    cases = {
        "buffer_tokens is 61 now, 60 there": (store, prompted(), replace(PLAN, buffer_tokens=61)),
        "scorer is ": (store, prompted(seed=1), PLAN),
        "document is 'other' now, 'rows' there": (replace(store, fingerprint="other"), prompted(), PLAN),
    }
    for problem, args in cases.items():
        with pytest.raises(ValueError, match="belongs to another run") as err:
            final(*args, checkpoint=path)
        assert problem in str(err.value) and "--fresh" in str(err.value)
        whole = final(*args)
        assert same(final(*args, checkpoint=path, fresh=True), whole)
        final(store, prompted(), PLAN, checkpoint=path, fresh=True)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\0\0\0\0\0\0\0{}      "])
@pytest.mark.bad_input
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "c.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="c.safetensors"):
        final(Array.random(), prompted(), PLAN, checkpoint=path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "harm",
    [
        lambda arrays, about: about.pop("next_chunk"),
        lambda arrays, about: about.update(next_chunk="7"),
        lambda arrays, about: about.update(recipe=[1]),
        lambda arrays, about: arrays.pop("score"),
        lambda arrays, about: arrays.update(score=arrays["score"][:3]),
        lambda arrays, about: arrays.update(position=arrays["position"].float()),
        lambda arrays, about: arrays.update(position=arrays["position"].flip(0)),
    ],
)
@pytest.mark.bad_input
def test_a_checkpoint_that_holds_no_buffer_is_refused(tmp_path, harm):
    store, path = Array.random(), tmp_path / "c.safetensors"
    final(store, prompted(), PLAN, checkpoint=path)
    arrays, about = tensors.read_tensors(path, "a run")
    harm(arrays, about)
    tensors.write_tensors(path, arrays, about)
    with pytest.raises(ValueError, match="c.safetensors.*not a checkpoint"):
        final(store, prompted(), PLAN, checkpoint=path)


class Sums:
    """A scorer that is no network: a process that was forked from one with threads may not use one."""

    fingerprint = "sums"

    def __init__(self, step: Callable[[], None] = lambda: None):
        self.step = step  # called before each chunk

    def score(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.step()
        return rows.sum(1), (rows[:, 0] > 0).astype(np.int32)

    def explain(self, reason: int) -> str:
        return str(reason)


def stream(folder: Path, step: Callable[[], None]) -> None:
    final(Array.random(60_000), Sums(step), PLAN, checkpoint=folder / "c.safetensors", every_s=0)


def test_fifty_kills_leave_the_same_buffer(tmp_path):
    run_through_kills(stream, tmp_path, kills=50, span=10)
    store = Array.random(60_000)
    assert _next_chunk(tmp_path / "c.safetensors") == 600
    assert same(final(store, Sums(), PLAN, checkpoint=tmp_path / "c.safetensors"), final(store, Sums(), PLAN))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(tmp_path):
    store, path = Array.random(), tmp_path / "c.safetensors"
    child = os.fork()
    if child == 0:
        try:
            steps = run(store, Sums(), PLAN, checkpoint=path, every_s=0)
            for _ in range(5):
                next(steps)

            def half(tensors, part, about):
                Path(part).write_bytes(b"half a file")
                os.kill(os.getpid(), signal.SIGKILL)

            tensors.save_file = half
            next(steps)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert _next_chunk(path) == 5
    assert same(final(store, Sums(), PLAN, checkpoint=path), final(store, Sums(), PLAN))


def _next_chunk(path: Path) -> int:
    return tensors.read_tensors(path, "a test")[1]["next_chunk"]


# -- ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_end_with_the_buffer_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(HERE / "stream_ranks.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole = final(Array.random(), prompted(), PLAN)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            assert found["ranks"] == 2
            assert same(Champions(**{name: found[name] for name in vars(whole)}), whole)
    assert sorted(p.name for p in tmp_path.glob("c.*")) == ["c.safetensors", "c.safetensors.rank1"]
    with pytest.raises(ValueError, match="ranks is 1 now, 2 there"):
        final(Array.random(), prompted(), PLAN, checkpoint=tmp_path / "c.safetensors")


# -- pass 2 -----------------------------------------------------------------------------------------------------


def test_gather_reads_only_the_stretches_that_hold_champions():
    store, read = Array.random(5000), []
    watched = type("Watched", (), {"read": lambda self, a, b: read.append((a, b)) or store.read(a, b)})()
    at = np.array([3, 4, 900, 2049, 4999])
    assert (gather(watched, at) == store.rows[at]).all()
    assert read == [(3, 901), (2049, 2050), (4999, 5000)]
    assert gather(store, at[:0]).shape == (0, WIDTH)


@pytest.mark.parametrize("positions", ["original", "compacted"])
def test_pass_two_is_attention_over_champions_and_prompt_where_they_stood(positions):
    attn, store, prompt = layer(flux_alpha=0.0), Array.random(), torch.randn(3, WIDTH)
    kept = final(store, LayerScorer(attn, prompt), PLAN)
    found = attend_over(attn, store, kept, prompt, positions=positions)
    rows = torch.cat((torch.from_numpy(store.rows[kept.position]), prompt))
    at = [*kept.position, 1030, 1031, 1032] if positions == "original" else range(len(rows))
    with torch.no_grad():
        wanted = attn(rows[None], positions=torch.tensor(at))[0, -3:]
    assert torch.allclose(found.out, wanted, atol=1e-5)
    with torch.no_grad():  # what the last row reads, spelled out
        place = torch.tensor(at)[:, None] * attn.inv_freq
        turn = torch.polar(torch.ones(()), place)[:, None]  # (K + P, 1, d / 2)
        half = lambda x: torch.view_as_complex(torch.stack(x.chunk(2, -1), -1).contiguous()) * turn  # noqa: E731
        q, k = half(attn.q_proj(rows).view(-1, 4, 8)), half(attn.k_proj(rows).view(-1, 2, 8)).repeat_interleave(2, 1)
        share = ((q[-1] * k.conj()).real.sum(-1) * 8**-0.5).softmax(0).mean(1)  # (K + P,), heads alike at alpha 0
    assert np.allclose(found.reads(), share[:-3], atol=1e-5)
    assert found.reads(0).sum() < 1
    with pytest.raises(ValueError, match=r"row=3: must be in \[-3, 3\)"):
        found.reads(3)


def test_a_language_model_gets_the_champions_in_order_with_their_positions():
    ids = Array(np.arange(5000, dtype=np.int32))
    none = np.zeros(2, np.int64)
    kept = Champions(np.array([70, 4000]), none.astype(np.float32), none, none.astype(np.int32))
    seen = []
    model = type("Model", (), {"answer": lambda self, *args: seen.append([*map(list, args[:2]), args[2]]) or "tea"})()
    assert second_pass(ids, kept, "what?", model) == "tea"
    assert seen == [[[70, 4000], [70, 4000], "what?"]]


@pytest.mark.parametrize(
    ("score", "problem"),
    [([1, np.nan], "token 71 is nan"), ([np.inf, 1], "token 70 is inf"), ([1e39, 1], "inf"), ([[1, 2]], "(1, 2)"),
     ([1, 2, 3], "(3,)")],
)  # fmt: skip
@pytest.mark.bad_input
def test_scores_that_cannot_be_ranked_are_refused(score, problem):
    with pytest.raises(ValueError, match="score .*" + re.escape(problem)):
        choose(np.array(score, float), np.zeros(2, np.int32), 70, PLAN)


@pytest.mark.parametrize("given", [3, 200])
@pytest.mark.bad_input
def test_a_scorer_that_miscounts_is_refused(given):
    scorer = prompted()
    scorer.score = lambda rows: (np.zeros(given, np.float32), np.zeros(given, np.int32))
    with pytest.raises(ValueError, match=f"gave {given} scores for 100 tokens"):
        final(Array.random(), scorer, PLAN)
