"""Training: the loop against a bare one, resuming against not stopping, ranks against one process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kills import run_through_kills
from training_run import LONG, Echo, model, recipe, train_long
from typer.testing import CliRunner

from proteus_playground.cli import app as cli
from proteus_playground.lm import losses, shipped
from proteus_playground.lm.training import Batch, Job, Recipe, Stage, Stopped, read_log, train
from proteus_playground.lm.training.optimiser import build_optimiser, pick_dtype
from proteus_playground.lm.training.recipe import Position

HERE = Path(__file__).parent


def same(a, b) -> bool:
    """Whether two models agree in every bit of weights and buffers."""
    theirs = b.state_dict()
    return all(x.numpy().tobytes() == theirs[name].numpy().tobytes() for name, x in a.state_dict().items())


def whole_run(**changes):
    lm = model()
    return lm, list(train(lm, Echo(), recipe(**changes), every=4))


@pytest.fixture(scope="module")
def finished():
    return whole_run()


# -- what a step is ---------------------------------------------------------------------------------------------


def bare(lm, recipe) -> list[float]:
    """The same run in twenty lines: no stages' bookkeeping, no folder, no looks."""
    gates = [weight for name, weight in lm.named_parameters() if "router" in name]
    plain = [weight for name, weight in lm.named_parameters() if "norm" in name or "embed" in name]
    rest = [weight for weight in lm.parameters() if all(weight is not other for other in gates + plain)]
    optimiser = torch.optim.AdamW(
        [
            {"params": rest, "weight_decay": 0.1},
            {"params": gates, "weight_decay": 0},
            {"params": plain, "weight_decay": 0},
        ],
        betas=(0.9, 0.95),
    )
    seen = []
    for step in range(12):
        stage = recipe.stages[step >= 5]
        length, alpha = stage.draw(0, step)
        rate = recipe.lr * min((step + 1) / 3, 1, (12 - step) / 2)
        for group, factor in zip(optimiser.param_groups, (1, 5, 1), strict=True):
            group["lr"] = rate * factor
        batch = Echo().batch(step, stage.tokens // length, length)
        lm.train().set_flux_alpha(alpha)
        logits, traces = lm(batch.ids, return_trace=True)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimiser.zero_grad()
        (loss + 1e-3 * losses.router_z(traces)).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimiser.step()
        seen.append(float(loss.detach()))
    return seen


def test_steps_are_those_of_a_bare_loop(finished):
    lm, steps = finished
    other = model()
    assert [step.loss for step in steps] == pytest.approx(bare(other, recipe()), rel=1e-4)
    for name, weight in lm.named_parameters():
        torch.testing.assert_close(weight, other.get_parameter(name), rtol=1e-3, atol=1e-4)
    assert [step.step for step in steps] == list(range(1, 13))
    assert steps[-1].tokens == 12 * 96
    assert steps[-1].loss < steps[0].loss


def test_a_weight_of_zero_is_a_target_that_is_not_asked():
    class Half(Echo):
        def __init__(self, by_weight):
            super().__init__()
            self.by_weight = by_weight

        def batch(self, index, sequences, length):
            batch = super().batch(index, sequences, length)
            asked = torch.arange(length) % 2 == 0
            if self.by_weight:
                return Batch(batch.ids, batch.targets, 3.0 * asked.expand_as(batch.ids))
            return Batch(batch.ids, batch.targets.masked_fill(~asked, losses.IGNORED))

    one, other = ([step.loss for step in train(model(), Half(way), recipe())] for way in (True, False))
    assert one == pytest.approx(other, rel=1e-5)


def test_checkpointing_changes_no_bit_and_keeps_less(finished):
    lm, steps = whole_run(checkpoint=True)
    assert same(lm, finished[0])
    assert steps[0].memory_bytes < finished[1][0].memory_bytes


def test_figures_of_a_look(finished):
    looks = [step for step in finished[1] if step.density is not None]
    assert [step.step for step in looks] == [1, 4, 8, 12]
    assert looks[0].heads_awake == 4 and looks[0].density == 1  # alpha 0
    sparse = looks[-1]
    assert 2 <= sparse.heads_awake <= 4 and 0 < sparse.density <= 1
    assert 0 <= sparse.gate_entropy <= torch.tensor(4.0).log() + 1e-6
    assert 0 <= sparse.dead_gates <= 2 * 2 * 4


def test_looking_at_the_model_changes_nothing(finished):
    lm = model()
    for _ in train(lm, Echo(), recipe(), every=1):
        pass
    assert same(lm, finished[0])
    assert not lm.training and lm.blocks[0].attn.cfg.flux_alpha is None


def test_prototypes_stand_still_when_told():
    lm = model(route_heads=False)
    before = lm.blocks[0].attn.gates.prototypes.clone()
    list(train(lm, Echo(), recipe(learn_gates=False)))
    assert lm.blocks[0].attn.gates.prototypes.equal(before)


def test_alignment_is_part_of_the_gradient(finished):
    lm, steps = whole_run(alignment=0.5)
    assert steps[0].loss == finished[1][0].loss and steps[0].grad_norm != finished[1][0].grad_norm
    assert not same(lm, finished[0])


def test_the_opening_loss_is_part_of_the_gradient(finished):
    lm, steps = whole_run(opening=0.5)
    assert steps[0].loss == finished[1][0].loss and steps[0].grad_norm != finished[1][0].grad_norm
    assert not same(lm, finished[0])


def test_processes_that_write_ahead_change_no_bit(finished):
    lm = model()
    steps = list(train(lm, Echo(), recipe(), every=4, workers=1))
    assert [step.loss for step in steps] == [step.loss for step in finished[1]] and same(lm, finished[0])


def test_the_shortlist_follows_the_length_and_is_put_back():
    lm, seen = model(), []
    for block in lm.blocks:
        block.attn.cfg = replace(block.attn.cfg, shortlist=12)  # somebody's own
    attn = lm.blocks[1].attn
    attn.register_forward_pre_hook(lambda layer, x: seen.append((x[0].shape[1], layer.cfg.shortlist)))
    stages = (Stage((24, 48), 96, 4, 1.0, share=8), Stage((24,), 96, 1, 1.0))
    for _ in train(lm, Echo(), recipe(stages=stages)):
        assert attn.cfg.shortlist == 12 and attn.cfg.flux_alpha is None
    assert set(seen) == {(24, 3), (48, 6), (24, 12)} and seen[-1] == (24, 12)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path):
    class Bad(Echo):
        def batch(self, index, sequences, length):
            batch = super().batch(index, sequences, length)
            return Batch(batch.ids, batch.targets, torch.full(batch.ids.shape, torch.nan if index == 7 else 1.0))

    with pytest.raises(FloatingPointError, match="step 8"):
        list(train(model(), Bad(), recipe(), folder=tmp_path / "late"))
    assert not read_log(tmp_path / "late")  # nothing was saved before, and then the weights were spoilt
    with pytest.raises(FloatingPointError, match="step 8"):
        list(train(model(), Bad(), recipe(), folder=tmp_path, save_seconds=0))
    assert [step.step for step in read_log(tmp_path)] == list(range(1, 8))
    assert next(train(model(), Echo(), recipe(), folder=tmp_path)).step == 8


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    lm = model()
    seen = []
    lm.norm.weight.register_hook(lambda gradient: seen.append(1) or gradient * (torch.inf if len(seen) == 4 else 1))
    with pytest.raises(FloatingPointError, match="step 4.*norm"):
        list(train(lm, Echo(), recipe(), folder=tmp_path, save_seconds=0))
    assert [step.step for step in read_log(tmp_path)] == [1, 2, 3]


# -- the schedule -----------------------------------------------------------------------------------------------


def rates(recipe, loss=lambda step: 1 / (step + 1)) -> list[tuple[int, float]]:
    position, seen = Position(), []
    while position.stage_of(recipe):
        seen.append((position.stage, position.rate(recipe)))
        position.advance(recipe, loss(position.step), 1, 0.0)
    return seen


def test_rate_rises_holds_and_falls():
    plan = Recipe((Stage((8,), 8, 10, 0.0), Stage((8,), 8, 10, 1.0)), lr=1.0, warmup=4, cooldown=0.25)
    assert [rate for _, rate in rates(plan)] == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 13 + [0.8, 0.6, 0.4, 0.2])


def test_a_plateau_ends_a_stage_and_starts_the_last_cooldown():
    stage = Stage((8,), 8, 40, 0.0, plateau=0.1, patience=3)
    plan = Recipe((stage, stage), lr=1.0, warmup=0, cooldown=0.1)
    seen = rates(plan, loss=lambda step: 2.0)
    assert [stage for stage, _ in seen] == [0] * 6 + [1] * (6 + 8)  # two windows, then the cooldown's 8 steps
    assert [rate for _, rate in seen[-8:]] == pytest.approx([1 - i / 8 for i in range(8)])
    assert len(rates(plan, loss=lambda step: 0.9**step)) == 80  # falls by 27% in every window


def test_draws_follow_the_stage():
    stage = Stage((8, 16), 16, 10, (0.25, 0.75), top_share=0.4)
    draws = [stage.draw(3, step) for step in range(2000)]
    alphas = torch.tensor([alpha for _, alpha in draws])
    top = alphas == 0.75
    assert 0.36 < top.float().mean() < 0.44
    assert 0.25 <= alphas.min() < 0.27 and 0.48 < alphas[~top].mean() < 0.52
    assert 0.46 < sum(length == 8 for length, _ in draws) / 2000 < 0.54
    assert draws != [stage.draw(4, step) for step in range(2000)]


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: Stage((), 8, 1, 0.0), ValueError, "lengths"),
        (lambda: Stage((16,), 8, 1, 0.0), ValueError, "tokens=8"),
        (lambda: Stage((8,), 8, 0, 0.0), ValueError, "steps=0"),
        (lambda: Stage((8,), 8, 1, 1.5), ValueError, "1.5"),
        (lambda: Stage((8,), 8, 1, (0.5, 0.2)), ValueError, "alpha"),
        (lambda: Stage((8,), 8, 1, 0.0, top_share=2), ValueError, "top_share=2"),
        (lambda: Stage((8,), 8, 1, 0.0, share=0), ValueError, "share=0"),
        (lambda: recipe(opening=-1), ValueError, "opening=-1"),
        (lambda: recipe(match=0.5, checkpoint=True), ValueError, "match=0.5"),
        (lambda: train(model(), Echo(), recipe(), workers=-1), ValueError, "workers=-1"),
        (lambda: Recipe(()), TypeError, "stages"),
        (lambda: recipe(lr=0), ValueError, "lr=0"),
        (lambda: recipe(lr=float("nan")), ValueError, "lr=nan"),
        (lambda: recipe(cooldown=True), TypeError, "cooldown=True"),
        (lambda: recipe(clip=0), ValueError, "clip=0"),
        (lambda: recipe(betas=(0.9,)), ValueError, "betas"),
        (lambda: recipe(betas=(0.9, 1.0)), ValueError, "betas"),
        (lambda: train(model(), Echo(), recipe(), every=0), ValueError, "every=0"),
        (lambda: train(model(), Echo(), recipe(), precision="half"), ValueError, "precision='half'"),
    ],
)  # fmt: skip
@pytest.mark.bad_input
def test_what_does_not_fit_is_named(make, error, names):
    with pytest.raises(error, match=names):
        make()


def test_parameter_groups():
    groups = {
        group["factor"]: group
        for group in build_optimiser(model(), recipe()).param_groups
        if group["weight_decay"] == 0
    }
    assert sum(weight.numel() for weight in groups[5.0]["params"]) == 2 * (2 * 4 * 16)
    assert sum(weight.numel() for weight in groups[1.0]["params"]) == 32 * 16 + 5 * 16


# -- stopping and going on --------------------------------------------------------------------------------------


def test_a_run_stopped_anywhere_ends_the_same(tmp_path, finished):
    for pause in (1, 4, 5, 6, 11):  # abandoned after so many steps in all, with a new model every time
        lm = model(seed=pause)  # whose weights must not count once there is a state
        steps = train(lm if pause > 1 else model(), Echo(), recipe(), folder=tmp_path, every=4)
        for step in steps:
            if step.step == pause:
                steps.close()
    lm = model(seed=9)
    list(train(lm, Echo(), recipe(), folder=tmp_path, every=4))
    assert same(lm, finished[0])
    assert [(s.step, s.loss, s.density) for s in read_log(tmp_path)] == [
        (s.step, s.loss, s.density) for s in finished[1]
    ]
    assert not list(train(model(seed=8), Echo(), recipe(), folder=tmp_path))  # nothing is left to do


def test_a_run_killed_while_it_writes_goes_on(tmp_path, finished):
    child = subprocess.Popen(
        [sys.executable, HERE / "training_run.py", "hang", tmp_path, "7"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"writing\n"
    child.kill()
    child.wait()
    assert [step.step for step in read_log(tmp_path)] == list(range(1, 8))  # one more than the state holds
    lm = model(seed=5)
    steps = list(train(lm, Echo(), recipe(), folder=tmp_path, every=4))
    assert steps[0].step == 7 and same(lm, finished[0])
    assert [step.step for step in read_log(tmp_path)] == list(range(1, 13))


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(tmp_path):
    """Every process but the last is killed within a few steps, while it reads, computes or writes."""
    run_through_kills(train_long, tmp_path, kills=20, span=2)
    alone, _ = whole_run(stages=LONG)
    lm = model(seed=3)
    assert not list(train(lm, Echo(), recipe(stages=LONG), folder=tmp_path)) and same(lm, alone)
    assert [step.step for step in read_log(tmp_path)] == list(range(1, 71))


def test_a_half_line_is_no_step(tmp_path):
    steps = train(model(), Echo(), recipe(), folder=tmp_path, save_seconds=0)
    for _ in range(3):
        next(steps)
    steps.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert next(train(model(), Echo(), recipe(), folder=tmp_path)).step == 4
    assert [step.step for step in read_log(tmp_path)] == [1, 2, 3, 4]


def test_stop_saves(tmp_path, finished):
    asked = iter([False] * 6 + [True])
    with pytest.raises(Stopped):
        list(train(model(), Echo(), recipe(), folder=tmp_path, stop=lambda: next(asked)))
    assert read_log(tmp_path)[-1].step == 6
    lm = model(seed=1)
    list(train(lm, Echo(), recipe(), folder=tmp_path))
    assert same(lm, finished[0])


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (lambda folder: train(model(), Echo(), recipe(lr=1e-3), folder=folder), "recipe.lr"),
        (lambda folder: train(model(shortlist=17), Echo(), recipe(), folder=folder), "model.attention.shortlist"),
        (lambda folder: train(model(), Echo(seed=1), recipe(), folder=folder), "batches"),
        (lambda folder: train(model(), Echo(), recipe(), folder=folder, precision="bfloat16"), "dtype"),
    ],
)
@pytest.mark.bad_input
def test_another_run_in_the_folder_is_refused_by_name(tmp_path, other, names):
    next(steps := train(model(), Echo(), recipe(), folder=tmp_path))
    steps.close()
    with pytest.raises(ValueError, match=rf"\({names}\)"):
        other(tmp_path)


# -- precision and ranks ----------------------------------------------------------------------------------------


def test_a_folder_that_is_no_runs_is_refused_before_the_first_step(tmp_path):
    model().save(tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match=r"state\.safetensors is not of a training run"):
        train(model(), Echo(), recipe(), folder=tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "log.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl is not of a training run"):
        train(model(), Echo(), recipe(), folder=tmp_path / "logs")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        train(model(), Echo(), recipe(), folder=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and (tmp_path / "logs" / "log.jsonl").stat().st_size == 9


def test_low_precision_is_near(finished):
    for precision in ("bfloat16", "float16"):
        losses = [step.loss for step in train(model(), Echo(), recipe(), precision=precision)]
        assert losses == pytest.approx([step.loss for step in finished[1]], rel=0.03)
        assert losses != [step.loss for step in finished[1]]


def test_a_scaled_loss_goes_on_where_it_was(tmp_path):
    once, twice = model(), model()
    list(train(once, Echo(), recipe(), precision="float16"))
    for _ in range(6):
        next(steps := train(twice, Echo(), recipe(), folder=tmp_path, precision="float16"))
        steps.close()
    list(train(twice, Echo(), recipe(), folder=tmp_path, precision="float16"))
    assert same(once, twice)


def test_auto_precision_is_real():
    assert pick_dtype(torch.device("cpu")) is torch.float32
    if torch.cuda.is_available():
        real = torch.cuda.get_device_capability() >= (8, 0)
        assert pick_dtype(torch.device("cuda")) is (torch.bfloat16 if real else torch.float16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_run_is_near_and_goes_on(tmp_path, finished):
    near = [step.loss for step in train(model(), Echo(), recipe(), device="cuda", precision="float32")]
    assert near == pytest.approx([step.loss for step in finished[1]], rel=0.01)
    once = list(train(model(), Echo(), recipe(), device="cuda"))
    assert [step.loss for step in once] == pytest.approx(near, rel=0.05)
    assert once[0].memory_bytes > sum(weight.nbytes for weight in model().parameters())
    running = train(model(), Echo(), recipe(), device="cuda", folder=tmp_path)
    assert [next(running).step for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    running.close()
    rest = list(train(model(seed=1), Echo(), recipe(), device="cuda", folder=tmp_path))
    assert [step.loss for step in rest] == pytest.approx([step.loss for step in once[6:]], rel=0.02)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun's gloo rendezvous needs libuv there")
def test_two_processes_are_one_with_twice_the_texts(tmp_path, finished):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*call, HERE / "training_run.py", "rank", tmp_path], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    lm, ranks = finished[0], [type(finished[0]).load(tmp_path / f"{rank}.safetensors") for rank in (0, 1)]
    assert same(*ranks)
    log = read_log(tmp_path / "run")
    assert [step.loss for step in log] == pytest.approx([step.loss for step in finished[1]], rel=2e-3)
    assert [step.grad_norm for step in log] == pytest.approx([step.grad_norm for step in finished[1]], rel=0.02)
    assert log[-1].tokens == finished[1][-1].tokens
    for name, tensor in lm.state_dict().items():
        if "sample" not in name and "quantiles" not in name:
            torch.testing.assert_close(ranks[0].state_dict()[name], tensor, rtol=0.02, atol=2e-3, msg=name)


def test_the_command_goes_on_and_writes_the_model(tmp_path, finished, monkeypatch):
    job = Job(finished[0].cfg, Echo(), recipe(), "An echo.")
    monkeypatch.setattr(shipped, "RECIPES", {"echo": lambda: job})
    call = ["train", "echo", "--out", str(tmp_path)]
    said = [CliRunner().invoke(cli.app, [*call, *more]) for more in (["--steps", "5"], ["--steps", "5"], [])]
    assert [done.exit_code for done in said] == [0, 0, 0], said
    assert "An echo." in said[0].output and "Stopped after 5 steps" in said[0].output + said[1].output
    assert [step.loss for step in read_log(tmp_path)] == [step.loss for step in finished[1]]
    assert same(type(finished[0]).load(tmp_path / "model.safetensors"), finished[0])
    wrong = CliRunner().invoke(cli.app, ["train", "ech", "--out", str(tmp_path)])
    assert wrong.exit_code == 2 and "echo" in wrong.output


def test_a_recipe_is_plain_data():
    plan = recipe()
    assert Recipe(**{**plan.to_dict(), "stages": [Stage(**s) for s in plan.to_dict()["stages"]]}) == plan
    assert replace(plan, lr=1.0).steps == 12
