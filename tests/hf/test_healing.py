"""Healing: a model learns to read few keys from its own dense pass; a killed run goes on with the same bits."""

import json
import multiprocessing
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("peft")
pytest.importorskip("accelerate")
import heal_tiny as tiny  # noqa: E402 -- after the skips
from tiny_llama import WORDS, build, family  # noqa: E402

from proteus_playground.common.tensors import read_tensors  # noqa: E402
from proteus_playground.hf.adapters import apply_adapter, read_adapter, switched_off, write_adapter  # noqa: E402
from proteus_playground.hf.healing import corpus as corpora  # noqa: E402
from proteus_playground.hf.healing.budgets import Drawn, ceiling, draw  # noqa: E402
from proteus_playground.hf.healing.plan import Budgets, Data, Losses, Plan, Rates, Stage, plan_of, sized  # noqa: E402
from proteus_playground.hf.healing.presets import PRESETS, preset  # noqa: E402
from proteus_playground.hf.healing.rows import IGNORED, Batch, Rows, stack  # noqa: E402
from proteus_playground.hf.healing.run import read_log  # noqa: E402
from proteus_playground.hf.healing.training import Training  # noqa: E402
from proteus_playground.hf.patch import patched  # noqa: E402

SPARSE = Budgets(alpha_low=0.5, keys_low=16, keys_high=4)
LONGER = replace(tiny.B, tokens=30 * 128, rates=Rates(weights=6e-3), budgets=SPARSE)


def tensors(training: Training) -> dict:
    return training.state()[0]


@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "all weights"])
def test_the_student_gets_closer_to_its_dense_pass_on_held_out_text(whole):
    training = tiny.training(replace(tiny.PLAN, stages=(LONGER,), adapter=None if whole else tiny.PLAN.adapter))
    before, prototypes = training.measure(shares=(8, 4)), training.student.layers[0].gates.prototypes.clone()
    at_first, steps = held_out_kl(training), []
    while not training.position.over:
        steps.append(training.advance())
    after = training.measure(shares=(8, 4))
    assert held_out_kl(training) < 0.88 * at_first
    assert before.base == before.dense == after.base and after.dense != after.base
    assert all(4 <= after.reads[share] <= tiny.T / share for share in (8, 4))
    assert not torch.equal(training.student.layers[0].gates.prototypes, prototypes)  # they follow the keys
    assert len({step.alpha for step in steps}) > 5 and all(step.kl >= 0 for step in steps)
    assert {step.step: step.read for step in steps}[3] == 3 * 128


def held_out_kl(training) -> float:
    """Nats per token, at flux alpha 1 and L = 8."""
    batch = Rows([tiny.corpus(2)], (), tiny.T, (0,)).batch(0, 8)
    with torch.no_grad():
        return losses_of(training, batch, Losses(match=0.0), Drawn(1.0, 8))["kl"].item() / batch.learned


def test_with_adapters_off_the_trained_model_is_the_base_bit_for_bit():
    training, ids = tiny.training(), torch.arange(40)[None] % tiny.WORDS
    while not training.position.over:
        training.advance()
    base = build(num_hidden_layers=2)[0]
    with torch.no_grad():
        wanted = base(ids, use_cache=False).logits
        with switched_off(training.student.model):
            assert torch.equal(training.student.model(input_ids=ids, use_cache=False).logits, wanted)
        assert not torch.equal(training.student.model(input_ids=ids, use_cache=False).logits, wanted)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_neox"])
def test_other_families_learn_beside_their_sliding_layers(kind):
    sliding = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 16}
    sizes = dict(vocab_size=20, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=128)  # fmt: skip
    model = family(kind, **sizes | (sliding if "gemma" in kind else {}))
    targets = ("q_proj", "query_key_value", "o_proj", "dense")
    plan = replace(
        tiny.PLAN, adapter=replace(tiny.PLAN.adapter, targets=targets), stages=(replace(LONGER, tokens=256),)
    )
    training = tiny.training(plan, model)
    steps = [training.advance(), training.advance()]
    assert len(training.student.layers) == (1 if "gemma" in kind else 2) and all(step.grad_norm > 0 for step in steps)
    assert training.position.over


def losses_of(training, batch, losses, drawn=None):
    stage = replace(tiny.B, losses=losses, follow=False)
    training.student.begin(stage)
    taught = training.student.teach(batch, losses)
    with training.student.patch(drawn or Drawn(1.0, 8), batch.ids.shape[1], stage):
        return training.student(batch, taught, losses)


def test_labels_are_shifted_once_and_padding_is_never_learned():
    training = tiny.training()
    rows = Rows([tiny.corpus(1)], (), tiny.T, (0,))
    batch = rows.batch(0, 1)
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    model = training.student.model
    with torch.no_grad():
        wanted = model(input_ids=batch.ids, labels=batch.ids, use_cache=False).loss * (tiny.T - 1)
    last = Batch(batch.ids, batch.targets.clone(), None)
    last.targets[:, -1] = IGNORED  # transformers has no label for the last token
    assert_close(losses_of(training, last, Losses(cross_entropy=1.0), Drawn(0.0, 8))["cross_entropy"], wanted)
    alone = stack([(batch.ids[0, :40].numpy(), batch.targets[0, :40].numpy())], 40)
    padded = stack([(alone.ids[0].numpy(), alone.targets[0].numpy()), (np.arange(48) % 7, np.full(48, IGNORED))], 48)
    assert padded.real.sum().item() == 88 and padded.learned == alone.learned == 40
    losses = Losses(cross_entropy=1.0, match=0.0)
    one, two = (losses_of(training, b, losses, Drawn(1.0, 12)) for b in (alone, padded.part(0, 1)))
    for name in ("kl", "cross_entropy"):
        assert_close(two[name], one[name], rtol=2e-3, atol=1e-4)


def test_the_losses_are_0_where_the_student_is_the_teacher_and_reach_every_adapter_where_it_is_not():
    training = tiny.training(replace(tiny.PLAN, adapter=replace(tiny.PLAN.adapter, dropout=0.0)))
    batch = Rows([tiny.corpus(1)], (), tiny.T, (0,)).batch(0, 2)
    same = losses_of(training, batch, Losses(), Drawn(0.0, 8))
    assert abs(same["kl"].item()) < 1e-4 and same["match"].item() < 1e-9
    stage = replace(tiny.B, losses=Losses(kl=1.0, match=1.0))
    training.student.begin(stage)
    taught = training.student.teach(batch, stage.losses)
    with training.student.patch(Drawn(1.0, 8), tiny.T, stage):
        figures = training.student(batch, taught, stage.losses)
        figures["loss"].backward()
    weights = dict(training.student.model.named_parameters())
    reached = [name for name, weight in weights.items() if weight.grad is not None and weight.grad.any()]
    assert reached and set(reached) == {name for name in weights if ".lora_B" in name}  # A waits until B is not 0
    assert figures["kl"] > 1 and figures["match"] > 1


def test_prototypes_trained_by_dense_attention_change_nothing_else():
    training = tiny.training(replace(tiny.PLAN, stages=(replace(tiny.A, tokens=8 * 128), tiny.B)))
    before = {name: tensor.clone() for name, tensor in tensors(training).items()}
    steps = []
    while training.stage.name == "A":
        steps.append(training.advance())
        if training.position.over:
            training.finish_stage()
    assert steps[-1].gates < steps[0].gates and steps[0].kl == steps[0].cross_entropy == 0
    after = tensors(training)
    assert {n for n, x in before.items() if not torch.equal(x.nan_to_num(), after[n].nan_to_num())} == {
        f"gates.{at}.prototypes" for at in training.student.layers
    }
    assert_close(after["gates.0.prototypes"].norm(dim=-1), torch.ones(2, 8))


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    plan = replace(tiny.PLAN, stages=(replace(tiny.A, tokens=128), replace(tiny.B, tokens=4 * 128)))
    once, folder = tiny.run(plan, tmp_path / "once"), tmp_path / "killed"
    tiny.finish(once)
    for kill in (1, 4):
        run = tiny.run(plan, folder)
        with pytest.raises(ZeroDivisionError):  # in the middle of a step, after which nothing can be saved
            while True:
                killed_at(run, kill)
                run.finish_stage()
    run = tiny.run(plan, folder)
    assert run.training.position.step == 2
    tiny.finish(run)
    wanted, found = tensors(once.training), tensors(run.training)
    assert all(torch.equal(tensor.nan_to_num(), found[name].nan_to_num()) for name, tensor in wanted.items())
    logs = [
        [{name: value for name, value in vars(step).items() if "second" not in name} for step in read_log(where)]
        for where in (tmp_path / "once", folder)
    ]
    assert len(logs[0]) == 5 and logs[0] == logs[1]
    with pytest.raises(ValueError, match="plan.seed"):
        tiny.run(replace(plan, seed=1), tmp_path / "once")


def killed_at(run, step: int) -> None:
    """The steps of a stage, saved every second one, until the update of `step`, which fails half-way."""
    update = run.training._update

    def fail() -> float:
        if run.training.position.step + 1 == step:
            raise ZeroDivisionError
        return update()

    run.training._update = fail
    for done in run.steps(save_seconds=1e9):
        if done.step % 2 == 0:
            run.save()


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="no forkserver here")
def test_two_processes_are_one_with_twice_the_texts(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # which imports torch once for both
    context.set_forkserver_preload(["heal_tiny", "peft", "accelerate", "transformers.models.llama.modeling_llama"])
    running = [context.Process(target=tiny.one_of_two, args=(rank, port, tmp_path / "two")) for rank in (0, 1)]
    for process in running:
        process.start()
    tiny.finish(tiny.run(tiny.SHORT, tmp_path / "one"))
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0, 0]
    logs = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    for name in ("loss", "kl", "match", "grad_norm", "read"):
        assert [getattr(s, name) for s in logs[1]] == pytest.approx([getattr(s, name) for s in logs[0]], rel=0.02), name


def test_rows_hold_one_document_each_and_every_token_but_short_tails():
    text = tiny.corpus(3, (100, 20, 300, 10))
    table = text.rows(64)
    assert table.tolist() == [[0, 64, 100], [64, 100, 100], [100, 120, 120], [120, 184, 420], [184, 248, 420],
                              [248, 312, 420], [312, 376, 420], [376, 420, 420]]  # fmt: skip
    rows = Rows([text, tiny.corpus(4, (640,))], (1, 3), 64, (5,))
    batch = rows.batch(0, 1000)
    assert torch.equal(batch.ids, Rows(rows.corpora, (1, 3), 64, (5,)).batch(0, 1000).ids)
    assert torch.equal(batch.ids[500:510], rows.batch(500, 10).ids)
    assert (batch.targets[~batch.real] == IGNORED).all()
    assert (rows._pattern == 1).mean() == 0.75
    first, rest = tiny.corpus(3, (400, 400)).split(0.1)
    assert len(first.ids) == 720 and rest.ends.tolist() == [80]
    with pytest.raises(ValueError, match="too few"):
        Rows([tiny.corpus(3, (8,))], (), 64, (0,))


def test_of_a_chat_only_replies_are_learned(tmp_path):
    _, tokenizer = build()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'page ' if m.role == 'user' else 'token ' }}{{ m.content }} again {% endfor %}"
        "{% if add_generation_prompt %}token {% endif %}"
    )
    talk = [{"role": "user", "content": "who waited"}, {"role": "assistant", "content": "a soup"}] * 8
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}) + "\n" + json.dumps({"text": "the soup was cold"}))
    found = corpora.read_corpus(str(tmp_path / "a.jsonl"), tokenizer, 1000)
    learned = tokenizer.decode(found.ids[found.learned])
    assert learned == " ".join(["a soup again"] * 8 + ["the soup was cold"]) and len(found.ends) == 2
    for bad, match in (("{}", "row 1 holds"), ("{", "line 1 is no JSON"), ("", "holds no text")):
        (tmp_path / "b.jsonl").write_text(bad)
        with pytest.raises(ValueError, match=match):
            corpora.read_corpus(str(tmp_path / "b.jsonl"), tokenizer, 1000)
    assert set(WORDS) >= set(learned.split())


def test_budgets_stay_under_a_ceiling_that_rises():
    budgets = Budgets(alpha_low=0.2, alpha_high=0.8, alpha_start=0.4, rise=0.5, dense_share=0.2)
    assert [ceiling(budgets, done) for done in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.4, 0.6, 0.8, 0.8])
    drawn = [draw(budgets, 1024, 0.25, [0, n]) for n in range(300)]
    sparse = [each.alpha for each in drawn if each.alpha > 0]
    assert 0.2 <= min(sparse) < 0.22 and 0.58 < max(sparse) <= 0.6 and 0.7 < len(sparse) / 300 < 0.9
    assert 32 <= min(d.shortlist for d in drawn) < 36 and 120 < max(d.shortlist for d in drawn) <= 128


def test_a_plan_is_a_file_whose_errors_name_the_field(tmp_path):
    for name in PRESETS:
        plan = preset(name, Data(sources=("a.txt", "b.txt"), weights=(1.0, 2.0)))
        plan.write(tmp_path / "plan.json")
        assert Plan.read(tmp_path / "plan.json") == plan
    quick = sized(preset("try"), 1000.0)
    assert quick.minutes == pytest.approx(10, rel=0.05) and quick.sentence.endswith("about 10 minutes here")
    assert sized(preset("guide"), 1000.0).plan == preset("guide")
    wrong = {
        "stages[0].budgets: alpha_low=2": {"stages": [{"budgets": {"alpha_low": 2}}]},
        "plan: 'x' is no field": {"x": 1},
        "stages[0].lengths=4: expected a list": {"stages": [{"lengths": 4}]},
        "adapter: rank='a'": {"adapter": {"rank": "a"}},
        "precision='f': must be one of": {"precision": "f"},
        "each must have a name of its own": {"stages": [{}, {}]},
    }
    for words, values in wrong.items():
        with pytest.raises((ValueError, TypeError)) as caught:
            plan_of(values)
        assert words in str(caught.value)
    (tmp_path / "plan.json").write_text("[")
    with pytest.raises(ValueError, match="plan.json"):
        Plan.read(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="gates must be above 0"):
        Stage(trains=("prototypes",))


def gates(training) -> dict:
    return {at: layer.gates for at, layer in training.student.layers.items()}


def test_an_adapter_s_file_is_small_and_gives_the_model_back(tmp_path):
    training, other = tiny.training(), tiny.training()
    while not training.position.over:
        training.advance()
    path = write_adapter(tmp_path / "a.safetensors", training.student.model, gates(training), {"by": "a test"})
    assert read_adapter(path, other.student.model, gates(other)) == {"by": "a test"}
    read_adapter(path, training.student.model, gates(training))
    own, back = tensors(training), tensors(other)
    assert all(torch.equal(own[n], back[n]) for n in own if n.startswith("weights.") or n.endswith("prototypes"))
    wider = tiny.training(replace(tiny.PLAN, adapter=replace(tiny.PLAN.adapter, rank=5)))
    with pytest.raises(ValueError, match="other ranks"):
        read_adapter(path, wider.student.model, gates(wider))
    ids = torch.arange(64)[None] % tiny.WORDS
    outs = []
    for each in (training.student, other.student):
        with torch.no_grad(), patched(each.model, each.layers):
            outs.append(each.model(input_ids=ids, use_cache=False).logits)
    assert torch.equal(*outs)
    write_adapter(path, training.student.model, gates(training), {"plan": training.plan.to_dict()})
    third = tiny.training(replace(tiny.PLAN, adapter=None))
    merged = apply_adapter(*read_tensors(path, "a test"), third.student.model, gates(third))
    with torch.no_grad(), patched(merged, third.student.layers):
        assert_close(merged(input_ids=ids, use_cache=False).logits, outs[0], rtol=1e-3, atol=1e-3)


def test_a_plateau_ends_a_length_and_then_the_stage():
    stage = replace(tiny.B, lengths=(32, 64), tokens=10_000)
    training = tiny.training(replace(tiny.PLAN, stages=(stage,)))
    patience = stage.plateau.patience
    for gap in (0.5, 0.4, *[0.398] * patience):
        assert training.length == 32
        training.note_gap(gap)
    assert training.length == 64 and training.position.best is None and not training.position.over
    for gap in (0.3, *[0.3] * patience):
        training.note_gap(gap)
    assert training.position.over
