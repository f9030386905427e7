"""Gates that are watched and operated on: the story against the gates' own code, and the panel without a browser."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from proteus_playground.widgets import prototype_panel
from proteus_playground.widgets.parts.painted import Room
from proteus_playground.widgets.prototypes import words as words
from proteus_playground.widgets.prototypes.figure import trails

from proteus_playground.common.texts import load_text
from proteus_playground.lm.model import ModelConfig, ProteusLM
from proteus_playground.playground.gate_story import OPERATIONS, TOKENS_PER_UPDATE, GateStory
from proteus_playground.playground.live import RANDOM, Live, open_live, random_bytes

EXACT = 1e-5  # relative: rounding


@pytest.fixture(scope="module")
def live() -> Live:
    return random_bytes(load_text("humble token"), tokens=512)


@pytest.fixture
def story(live) -> GateStory:
    return GateStory(live, layer=1, group=0)


@pytest.fixture
def panel(live):
    made = prototype_panel(live=live)
    rest(made)
    yield made
    made.close()


def rest(panel) -> None:
    """Until all that was asked for is done and drawn; without an event loop drawing is on the worker's thread."""
    panel.worker.wait()
    time.sleep(0.05)


def trace(panel, name: str):
    return next(trace for trace in panel.pictures.widget.data if trace.name == name)


# The story


def test_an_update_is_the_moving_average_of_the_keys_that_each_gate_lured(story):
    before, decay = story.gates.prototypes.clone(), story.gates.ema_decay
    keys = F.normalize(story._k[0, :TOKENS_PER_UPDATE], dim=-1)
    gate = story.gates.lure(keys)[0]
    story.step()
    for g in range(before.shape[0]):
        for slot in range(before.shape[1]):
            mine = keys[gate[:, g] == slot, g]
            if len(mine):
                mean = F.normalize(mine.mean(0), dim=0)
                wanted = F.normalize(decay * before[g, slot] + (1 - decay) * mean, dim=0)
                torch.testing.assert_close(story.gates.prototypes[g, slot], wanted, atol=1e-5, rtol=0)


def test_prototypes_find_their_keys_and_a_snapshot_does_not_change_later(story):
    first = story.snapshot()
    kept = first.gate.copy(), first.prototypes.copy(), first.alive.copy(), first.usage.copy()
    for _ in range(30):
        now = story.step()
    assert now.update == 30 and now.fit > first.fit + 0.1
    assert now.lured.sum() == len(story.tokens) and (now.lured == np.bincount(now.gate, minlength=len(now.lured))).all()
    story.operate("prune", int(now.lured.argmax()))
    for was, array in zip(kept, (first.gate, first.prototypes, first.alive, first.usage), strict=True):
        assert np.array_equal(was, array)


def test_what_moved_and_who_was_revived_is_what_happened(live):
    """A prototype that looks away from all keys lures nothing, dies out and is sent to one of them."""
    story, woken = GateStory(live, layer=1, ema_decay=0.5), []
    story.gates.prototypes[0, 3] = -F.normalize(story._unit.mean(0), dim=0)
    for _ in range(15):
        before, usage = story.snapshot(), story.gates.usage[0].clone()
        now = story.step()
        assert now.moved == pytest.approx((before.gate != now.gate).mean())
        for slot in now.revived:
            woken.append(slot)
            assert usage[slot] < 0.1 / len(before.alive)  # nearly dead, and then put exactly on a key
            assert (story._unit @ story.gates.prototypes[0, slot]).max() > 1 - 1e-5
    assert 3 in woken


@torch.no_grad()
def test_a_layer_reads_what_it_reads_in_the_model():
    torch.manual_seed(0)
    model, heard = ProteusLM(ModelConfig(256, 2, RANDOM, taps=3)).eval(), []
    ids = torch.randint(0, 256, (80,))
    model.set_flux_alpha(1.0)
    model.blocks[1].attn.register_forward_pre_hook(lambda _, given: heard.append(given[0]))
    model(ids[None])
    story = GateStory(Live(model, ids, [""] * 80, "", True), layer=1)
    assert torch.allclose(story._x, heard[0], atol=1e-5)


def test_the_model_that_was_given_stays_as_it_is(live):
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    story = GateStory(live)
    story.step()
    story.operate("add head")
    after = live.model.state_dict()
    torch.testing.assert_close(dict(after), before, rtol=0, atol=0, equal_nan=True)


def test_begin_with_the_models_own_prototypes(live):
    own = live.model.blocks[0].attn.gates.prototypes
    got = GateStory(live, scattered=False).gates.prototypes[:, : own.shape[1]]
    torch.testing.assert_close(got, own)
    assert not torch.allclose(GateStory(live).gates.prototypes[:, : own.shape[1]], own)


# Surgery


def test_a_clone_changes_nothing_and_merging_it_back_neither(story):
    for _ in range(5):
        now = story.step()
    gate = int(now.lured.argmax())
    cloned = story.operate("clone", gate)
    assert cloned.change < EXACT and cloned.nll[1] == pytest.approx(cloned.nll[0], abs=1e-4) and not cloned.grown
    back = story.operate("merge", gate, cloned.other)
    assert back.change < EXACT and not story.snapshot().alive[cloned.other]


def test_the_fourth_clone_needs_a_slot_of_its_own(story):
    done = [story.operate("clone", 0) for _ in range(4)]
    assert [operation.grown for operation in done] == [False, False, False, True]
    assert len({operation.other for operation in done}) == 4


def test_surgery_says_how_far_the_output_moved(story):
    """Against the layer run by hand before and after."""
    story.step()
    with torch.no_grad():
        before = story.attn(story._x)
    done = story.operate("prune", int(story.snapshot().lured.argmax()))
    with torch.no_grad():
        after = story.attn(story._x)
    assert done.change == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4) and done.change > 0.01


def test_moving_and_adding_change_whose_a_gate_is(story):
    now = story.snapshot()
    gate, head = 5, (int(now.head[5]) + 1) % now.heads
    story.operate("move", gate, head)
    assert story.snapshot().head[gate] == head
    assert story.operate("add head").gate == now.heads and story.snapshot().heads == now.heads + 1
    assert (story.snapshot().head == now.heads).any()
    story.step()


def test_bad_operations_are_named_and_change_nothing(story):
    before = story.snapshot()
    with pytest.raises(ValueError, match="what='fuse'"):
        story.operate("fuse", 0)
    with pytest.raises(ValueError, match="gate=99"):
        story.operate("clone", 99)
    with pytest.raises(ValueError, match="group=7"):
        GateStory(random_bytes(load_text("humble token"), 64), group=7)
    with pytest.raises(ValueError, match="model='gpt'"):
        open_live("gpt")
    assert np.array_equal(story.snapshot().alive, before.alive)


# The panel


def test_it_opens_with_a_picture_and_says_that_weights_are_random(panel):
    assert "These weights are random" in panel.banner.value and panel.problem == ""
    assert len(trace(panel, "keys").x) == 512 and len(trace(panel, "prototypes").x) == 16
    assert f"Gate {panel.chosen} lures" in panel.captions["text"].value


def test_every_step_that_was_asked_for_is_taken(panel):
    for _ in range(7):
        panel.do("step")
    rest(panel)
    assert panel.run.past[-1].update == 7 and len(trace(panel, "fit").x) == 8
    assert np.array_equal(trace(panel, "keys").customdata, panel.run.past[-1].gate)


def test_surgery_on_the_panel_is_drawn_and_told(panel):
    panel.do("step")
    gate = panel.chosen
    panel.do("clone", gate)
    rest(panel)
    assert "did not change" in panel.said.value and len(trace(panel, "prototypes").x) == 17
    panel.do("prune", gate)
    rest(panel)
    assert "was pruned" in panel.said.value and panel.chosen != gate and gate not in panel.gate.options
    assert panel.run.past[-1].alive[panel.chosen]
    panel.do("prune", gate)
    rest(panel)
    assert "not a live" in panel.said.value and panel.problem == ""
    panel.do("add head")
    rest(panel)
    assert "</span>, 3" in panel.said.value and list(panel.head.options) == [
        head for head in range(4) if head != panel.run.past[-1].head[panel.chosen]
    ]


def test_play_goes_on_until_it_is_paused_and_surgery_pauses_it(panel):
    panel.player.speed.value = "fast"
    panel.player.play.value = True
    time.sleep(0.5)
    panel.do("clone", panel.chosen)
    rest(panel)
    at = panel.run.past[-1].update
    assert at > 1 and not panel.player.play.value and panel.run.last.what == "clone"
    time.sleep(0.3)
    assert panel.run.past[-1].update == at


def test_a_click_follows_a_gate(panel):
    panel.do("step")
    rest(panel)
    live = np.flatnonzero(panel.run.past[-1].alive)

    class Points:
        point_inds = [3]

    panel.pictures._pick("prototypes", Points)
    assert panel.chosen == live[3] == panel.gate.value
    panel.pictures._pick("keys", Points)
    assert panel.chosen == panel.run.past[-1].gate[3]
    assert panel.text.value.count("<b>") > 0


def test_reset_and_the_decay_slider(panel):
    panel.settings.ema_decay = 0.0
    panel.do("step")
    rest(panel)
    jumped = panel.run.past[-1].fit
    panel.load()
    rest(panel)
    assert panel.run.past[-1].update == 0 and panel.run.story.gates.ema_decay == 0.0
    panel.settings.ema_decay = 0.95
    panel.do("step")
    rest(panel)
    assert panel.run.past[-1].fit < jumped
    panel.layer.value = 0
    rest(panel)
    assert panel.run.story.layer == 0 and len(panel.run.past) == 1


def test_a_browser_that_paints_slowly_is_waited_for_and_one_that_is_gone_is_not(monkeypatch):
    now = 100.0
    monkeypatch.setattr("proteus_playground.widgets.parts.painted.time", SimpleNamespace(monotonic=lambda: now))
    room = Room()
    room.ask(1)
    assert room.free, "no browser shows the panel"
    room.painted = 0
    assert not room.free, "a browser shows the panel, and has not painted its first picture yet"
    room.painted = 1
    assert room.free
    for picture, seconds in ((2, 2), (3, 4), (4, 8)):  # after each picture that is sent too early the wait doubles
        room.ask(picture)
        now += seconds - 0.1
        assert not room.free
        now += 0.2
        assert room.free
    room.painted = 4
    room.ask(5)
    now += 2.1
    assert room.free, "it had caught up"


def test_a_model_that_cannot_be_made_is_an_error_that_is_shown(live):
    def broken():
        raise RuntimeError("no such model")

    from proteus_playground.widgets.prototypes.panel import PrototypePanel

    panel = PrototypePanel(broken)
    rest(panel)
    panel.do("step")
    panel.player.play.value = True
    rest(panel)
    assert "no such model" in panel.status.value
    panel.close()


# Words and pictures


def test_the_sentence_on_a_gate_counts_what_it_lures(story):
    for _ in range(3):
        now = story.step()
    gate = int(now.lured.argmax())
    said = words.gate_sentence(now, gate, story.tokens)
    assert f"Gate {gate} lures {now.lured[gate]} of 512 keys" in said and f"belongs to head {now.head[gate]}" in said
    html = words.text_html(1, now, gate, story.tokens)
    marked = "".join(part.split("</b>")[0] for part in html.split("<b>")[1:])
    plain = "".join(story.tokens[i] for i in np.flatnonzero(now.gate == gate))
    assert len(marked.replace("<i>↵</i><br>", "\n")) >= len(plain) > 0


def test_paths_break_between_prototypes(story):
    past = [story.snapshot()] + [story.step() for _ in range(4)]
    points = trails(past)
    live = int(past[-1].alive.sum())
    assert len(points) == live * (len(past) + 1) and np.isnan(points[:, 0]).sum() == live
    assert np.allclose(points[:5], [snap.prototypes[0] for snap in past])
    past[3] = replace(past[3], revived=(0,))
    points = trails(past)
    assert np.isnan(points[3]).all() and np.allclose(points[[2, 4]], [past[2].prototypes[0], past[3].prototypes[0]])


def test_every_operation_has_its_sentence(story):
    story.step()
    for what, *operands in (("clone", 0), ("merge", 1, 2), ("prune", 4), ("move", 3, 1), ("add head",)):
        done = story.operate(what, *operands)
        said = words.operation_sentence(done)
        assert f"{done.nll[0]:.3f}" in said and ("did not change" in said) == (done.change < words.NOTHING)
    assert len(OPERATIONS) == 5


def test_a_shipped_model_reads_a_shelf_and_its_absence_is_said(monkeypatch):
    pytest.importorskip("tokenizers", reason="shelves need the hf extra")
    from proteus_playground.lm import shipped
    from proteus_playground.lm.model import ModelConfig, ProteusLM
    from proteus_playground.lm.shelf import ShelfTokenizer

    tokenizer = ShelfTokenizer()
    model = ProteusLM(ModelConfig(tokenizer.vocab_size, 1, RANDOM)).eval()
    monkeypatch.setattr(shipped, "load_shipped", lambda name: (model, tokenizer))
    live = open_live("shelf-mini", 200)
    assert not live.random and len(live.ids) == len(live.tokens) == 200 and live.model is model
    assert " ".join("".join(live.tokens).split()) == " ".join(tokenizer.decode(live.ids.tolist()).split())
    assert GateStory(live).step().lured.sum() == 200

    def missing(name):
        raise FileNotFoundError(name)

    monkeypatch.setattr(shipped, "load_shipped", missing)
    stand_in = open_live("shelf-mini", 100)
    assert stand_in.random and "shelf-mini is not in this installation" in stand_in.note
