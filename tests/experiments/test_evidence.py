"""Evidence: tasks that mean what their drawings show, arms that read what they may, studies that can go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from proteus_playground.experiments.evidence import arms
from proteus_playground.experiments.evidence.arms import ARMS, read
from proteus_playground.experiments.evidence.rings import attend_by_rings
from small_words import WORDS, small_model

from proteus_playground.attention.selectors import SELECTORS, Sight
from proteus_playground.lm.losses import IGNORED
from proteus_playground.lm.recall import copying, recall
from proteus_playground.lm.recall.recipe import Scale
from proteus_playground.lm.recall.tasks import TASKS, Mixture, WarmedUp

TINY = [make(8, words=WORDS) for make in TASKS.values()]
NAMES = list(TASKS)
UNROUTED = {name: arm for name, arm in ARMS.items() if not arm.alpha}


@pytest.mark.parametrize("task", TINY, ids=NAMES)
def test_a_batch_is_a_pure_function_and_streams_are_apart(task):
    one, again = task.batch(3, 5, 97), replace(task).batch(3, 5, 97)
    assert torch.equal(one.ids, again.ids) and torch.equal(one.targets, again.targets)
    assert one.ids.shape == one.targets.shape == (5, 97) and one.ids.min() >= 0 and one.ids.max() < task.vocab_size
    others = [task.batch(4, 5, 97), replace(task, seed=1).batch(3, 5, 97), task.evaluation().batch(3, 5, 97)]
    assert all(not torch.equal(one.ids, other.ids) for other in others)
    assert task.evaluation().evaluation() == task.evaluation() != task


@pytest.mark.parametrize("task", TINY, ids=NAMES)
def test_the_answer_follows_its_question_and_stood_there_before(task):
    """What is scored is the next token, and the right token was planted where only reading far back finds it."""
    batch = task.batch(0, 20, 120)
    scored = batch.targets != IGNORED
    assert (scored.sum(1) == scored.sum(1)[0]).all() and scored.any()
    rows, at = scored.nonzero(as_tuple=True)
    answers = batch.targets[rows, at]
    assert torch.equal(batch.ids[rows, at + 1], answers)
    for row, place, answer in zip(rows.tolist(), at.tolist(), answers.tolist(), strict=True):
        assert answer in batch.ids[row, :place].tolist()


@pytest.mark.parametrize("length", [64, 65, 128, 255])
@pytest.mark.parametrize("at_end", [False, True])
def test_recall_asks_every_pair_once_and_answers_are_what_was_planted(length, at_end):
    task = recall.Recall(16, words=WORDS, at_end=at_end)
    batch = task.batch(0, 30, length)
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        asked = [i for i, target in enumerate(targets) if target != IGNORED]
        planted = [i for i in range(min(asked)) if ids[i] < WORDS.keys]
        known = {ids[i]: ids[i + 1] for i in planted}
        assert len(planted) == len(known) == len(asked) == 16
        assert {ids[i] for i in asked} == set(known)
        assert all(known[ids[i]] == targets[i] for i in asked)
        assert max(planted) + 1 < min(asked)
        rest = [x for i, x in enumerate(ids) if not {i, i - 1} & {*planted, *asked}]
        assert all(WORDS.keys + WORDS.values <= x < WORDS.copy for x in rest)


def test_recall_asks_again_only_after_all_were_asked():
    batch = recall.Recall(4, questions=10, words=WORDS).batch(0, 8, 64)
    for ids, targets in zip(batch.ids, batch.targets, strict=True):
        asked = ids[targets != IGNORED].tolist()
        assert len(asked) == 10 and len(set(asked[:4])) == len(set(asked[4:8])) == 4


def test_copying_keeps_the_order_and_induction_repeats_the_run():
    batch = copying.SelectiveCopy(8, words=WORDS).batch(0, 6, 50)
    for ids in batch.ids.tolist():
        mark = ids.index(WORDS.copy)
        assert [x for x in ids[:mark] if x < WORDS.keys] == ids[mark + 1 :] and len(ids) - mark == 9
    batch = copying.Induction(8, words=WORDS).batch(0, 40, 50)
    starts = set()
    for ids in batch.ids.tolist():
        start = ids.index(ids[-8])
        starts.add(start)
        assert ids[start : start + 8] == ids[-8:]
    assert len(starts) > 10


def test_many_values_may_come_in_any_order_but_not_twice():
    task = recall.ManyValues(6, words=WORDS, owned=3)
    batch = task.batch(0, 5, 40)
    asked = batch.targets != IGNORED
    answers = batch.targets[asked].view(5, 3)
    for order, good in (
        ([0, 1, 2], [1, 1, 1]),
        ([2, 1, 2], [1, 1, 1]),  # 2 was guessed, but only what stood there has been said
        ([1, 0, 2], [1, 0, 1]),
        ([0, 0, 0], [1, 0, 0]),
    ):
        said = torch.zeros_like(batch.ids).masked_scatter(asked, answers[:, order])
        assert torch.equal(task.correct(batch, said)[asked].view(5, 3), torch.tensor(good).bool().expand(5, 3))
    assert not task.correct(batch, torch.zeros_like(batch.ids)).any()


@pytest.mark.parametrize("task", TINY, ids=NAMES)
@pytest.mark.bad_input
def test_a_text_too_short_is_refused_and_the_shortest_works(task):
    task.batch(0, 3, task.min_length())
    with pytest.raises(ValueError, match="length="):
        task.batch(0, 3, task.min_length() - 1)


def test_repetition_asks_for_all_that_can_be_known():
    batch = copying.Repeat(words=WORDS).batch(0, 30, 67)
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        run = next(i for i, target in enumerate(targets) if target != IGNORED) + 1
        assert 67 // 8 <= run <= 67 // 2
        assert targets[run - 1 : -1] == ids[run:] and ids[run:] == ids[:-run] and targets[-1] == IGNORED
    warmed = WarmedUp(copying.Repeat(words=WORDS), 3, recall.Recall(4, words=WORDS))
    for index, task in ((2, warmed.first), (3, warmed.then)):
        assert torch.equal(warmed.batch(index, 2, 64).ids, task.batch(index, 2, 64).ids)


def test_a_mixture_holds_every_task_in_its_share():
    mixed = Mixture((recall.Recall(4, words=WORDS), copying.SelectiveCopy(4, words=WORDS)), (3.0, 1.0))
    batch = mixed.batch(0, 400, 40)
    copies = (batch.ids == WORDS.copy).any(1).float().mean()
    assert len(batch.ids) == 400 and 0.17 < copies < 0.33
    assert torch.equal(batch.ids, mixed.batch(0, 400, 40).ids)
    with pytest.raises(ValueError, match="weights"):
        Mixture(mixed.tasks, (1.0,))
    with pytest.raises(ValueError, match="same words"):
        Mixture((recall.Recall(4), recall.Recall(4, words=WORDS)))


@pytest.mark.parametrize("shortlist", [24, 25, 40])
@pytest.mark.parametrize("name", UNROUTED)
def test_an_arm_reads_no_more_than_it_may_and_itself(name, shortlist):
    model, ids = small_model(), torch.randint(WORDS.size, (2, 150))
    reads = read(model, ids, ARMS[name], shortlist).reads
    most = torch.arange(1, 151).float()
    assert (reads >= 1).all()
    if name != "dense":
        assert (reads <= most.clamp(max=shortlist)).all()
    if ARMS[name].selector not in arms.OURS:  # rivals get all they may have, but for a block that the window cuts
        lost = 7 if name in ("block means", "quest") else 0
        assert (reads >= (most if name == "dense" else most.clamp(max=shortlist - lost))).all()


@pytest.mark.parametrize("name", UNROUTED)
def test_an_arm_looks_at_nothing_later(name):
    model, ids = small_model(), torch.randint(WORDS.size, (2, 150))
    other = ids.clone()
    other[:, 97:] = torch.randint(WORDS.size, (2, 53))
    one, two = (read(model, x, ARMS[name], 24) for x in (ids, other))
    assert torch.allclose(one.logits[:, :97], two.logits[:, :97], atol=1e-5)
    assert torch.equal(one.reads[:, :97], two.reads[:, :97])
    assert not torch.allclose(one.logits[:, 97:], two.logits[:, 97:], atol=1e-3)
    assert torch.allclose(one.logits[:, :97], read(model, ids[:, :97], ARMS[name], 24).logits, atol=1e-5)


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_that_may_read_all_is_dense(name):
    model, ids = small_model(), torch.randint(WORDS.size, (2, 150))
    model.set_flux_alpha(0.0)
    assert torch.allclose(read(model, ids, ARMS[name], 150).logits, model(ids), atol=1e-5)


def test_our_arms_are_the_layer():
    model, ids = small_model(), torch.randint(WORDS.size, (2, 150))
    logits, stats = model(ids, return_stats=True)
    ours = read(model, ids, ARMS["gates + notes"], 24)
    assert torch.allclose(ours.logits, logits, atol=1e-5)
    assert torch.allclose(ours.reads, torch.stack([s.reads for s in stats]).float().mean((0, 3)))
    assert not torch.allclose(read(model, ids, ARMS["gates"], 24).logits, logits, atol=1e-3)
    assert all(block.attn.cfg == model.cfg.attention for block in model.blocks)


@pytest.mark.parametrize("changes", [{}, {"notes": False}, {"probes": 3}, {"shortlist": 90}, {"nearest_gates": True}])
def test_rings_by_masks_are_the_layer_and_salient_ones_read_as_much(changes):
    """An independent reading of the layer's rule; only which keys of a gate are in its ring differs."""
    attn, h = small_model().blocks[0].attn, torch.randn(2, 90, 32)
    other = {name: value for name, value in changes.items() if name != "shortlist"}
    layer, reads = arms.ask_layer(attn, h, changes.get("shortlist", 24), **other)
    newest, same = attend_by_rings(attn, h, changes.get("shortlist", 24), False, **other)
    assert torch.allclose(newest, layer, atol=1e-5) and torch.allclose(same, reads)
    salient, same = attend_by_rings(attn, h, changes.get("shortlist", 24), True, **other)
    assert torch.allclose(same, reads)
    assert torch.allclose(salient, layer, atol=1e-5) == ("shortlist" in changes)


def test_the_window_arm_is_an_attention_mask():
    """`local` against a mask written out by hand."""
    model, ids = small_model(), torch.randint(WORDS.size, (1, 60))
    attn, h = model.blocks[0].attn, torch.randn(1, 60, 32)
    y, _ = arms.choose_keys(attn, h, ARMS["local"], 10)
    model.set_flux_alpha(0.0)
    for t in (0, 5, 37, 59):
        alone = attn(h[:, max(0, t - 9) : t + 1])[:, -1]
        assert torch.allclose(y[:, t], alone, atol=1e-5)  # scores of RoPE depend on distances alone
    assert read(model, ids, ARMS["local"], 10).reads.max() == 10


def test_the_oracle_reads_the_largest_scores_and_others_do_not():
    q, k = torch.randn(2, 3, 90, 8), torch.randn(2, 3, 90, 8)
    sight = sight_over(q, k, shortlist=12, far=9)
    rows = torch.arange(90)
    score = (q @ k.transpose(-1, -2)).masked_fill(torch.ones(90, 90).triu(1).bool(), -torch.inf)
    mass = {}
    for name, arm in UNROUTED.items():
        if arm.selector not in arms.OURS:
            seen = SELECTORS[arm.selector].choose(sight, rows).expand(2, 3, 90, 90)
            mass[name] = (score.softmax(-1) * seen)[:, :, 30:].sum(-1).mean().item()
    chosen = sight_top(score, 12)
    seen = SELECTORS["oracle"].choose(sight, rows)
    assert ((seen & ~chosen).sum(-1) <= 1).all()  # itself, where it was not among them
    assert max(mass, key=mass.get) == "dense"
    assert all(mass["oracle"] > mass[name] for name in mass if name not in ("oracle", "dense"))
    assert min(mass["block means"], mass["quest"]) > max(mass["random keys"], mass["local"], mass["salience only"])


def sight_over(q, k, shortlist: int, far: int) -> Sight:
    return Sight(q, k, k, q, k, shortlist, far, 2, 1, 1.0, salience=torch.rand(len(k), k.shape[2]))


def sight_top(score, n):
    at = score.topk(n, dim=-1).indices
    return torch.zeros_like(score).bool().scatter(-1, at, True) & (score > -torch.inf)


def test_what_is_looked_at_is_counted():
    model, ids = small_model(), torch.randint(WORDS.size, (1, 150))
    at = torch.arange(150.0)
    looks = {name: read(model, ids, arm, 24).looks[0] for name, arm in UNROUTED.items()}
    for name in ("dense", "local", "local + anchors", "random keys", "salience only", "knorm"):
        assert (looks[name] == 0).all()
    assert (looks["gates"] == 4).all() and (looks["gates + notes"] == 4).all()  # its prototypes
    assert torch.equal(looks["oracle"], at + 1) and torch.equal(looks["snapkv"], at + 1)
    # L 24, 18 of them far: 4 blocks of 4 and a window of 8, so that row 8 is the first with a key beyond its window
    assert torch.equal(looks["block means"], ((at - 8).clamp(min=-4) // 4 + 1))
    assert torch.equal(looks["quest"], 2 * looks["block means"])


def test_random_keys_are_random():
    """Every older key is drawn about as often as another, and rows draw differently."""
    sight = sight_over(*(torch.zeros(1, 2, 400, 4) for _ in range(2)), shortlist=40, far=20)
    seen = SELECTORS["random keys"].choose(sight, torch.arange(380, 400)).expand(2, 20, 400)[..., :300].float()
    drawn = seen.mean((0, 1))
    assert abs(float(drawn.mean()) - 20 / 370) < 0.01 and drawn.max() < 0.35
    both = (seen[:, :-1] * seen[:, 1:]).sum(-1).mean()
    assert both < 5  # two rows share about one key by chance


def test_what_does_not_fit_is_refused():
    model, ids = small_model(), torch.randint(WORDS.size, (1, 50))
    with pytest.raises(ValueError, match="shortlist=0"):
        read(model, ids, ARMS["local"], 0)
    with pytest.raises(ValueError, match="call eval"):
        read(model.train(), ids, ARMS["local"], 8)
    routed = small_model(route_heads=True)
    with pytest.raises(ValueError, match="route_heads"):
        read(routed, ids, ARMS["local"], 8)
    read(routed, ids, ARMS["gates + notes"], 24)
    with pytest.raises(ValueError, match="share=0"):
        Scale(share=0)
    for bad in (0, 41):
        with pytest.raises(ValueError, match="things="):
            recall.Recall(bad, words=WORDS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", sorted(set(UNROUTED) - {"random keys"}))
def test_an_arm_on_a_gpu_is_the_arm_on_a_cpu(name):
    model, ids = small_model(), torch.randint(WORDS.size, (2, 150))
    here = read(model, ids, ARMS[name], 24)
    there = read(model.cuda(), ids.cuda(), ARMS[name], 24)
    assert torch.equal(here.reads, there.reads.cpu())
    assert torch.allclose(here.logits, there.logits.cpu(), atol=2e-2)
