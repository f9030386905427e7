"""For every panel: latest wins, one message per picture, no markup from outside, and nothing left after `close`."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import ipywidgets
import made_study
import numpy as np
import psutil
import pytest
import tiny_llama
from fake_probe import FakeProbe
from helpers import SENTENCE
from proteus_playground.experiments.evidence import committed
from proteus_playground.experiments.needles.haystacks import Haystack
from proteus_playground.experiments.needles.live import Found
from proteus_playground.widgets import (
    bank_panel,
    duel_panel,
    evidence_panel,
    healing_panel,
    needle_panel,
    playground,
    prototype_panel,
    stream_panel,
    wall_panel,
)  # fmt: skip
from proteus_playground.widgets.parts import panel as panels
from proteus_playground.widgets.parts.panel import Panel
from proteus_playground.widgets.stream.frames import Source

from proteus_playground.common.texts import load_text, pasted
from proteus_playground.playground.bank_reading import RandomReader
from proteus_playground.playground.live import random_bytes
from proteus_playground.streaming.random_words import RandomWords

MARKUP = "<script>x</script> <b>bold</b>"


def registry() -> dict:
    """All open widgets, as ipywidgets 7 and 8 keep them."""
    from ipywidgets.widgets import widget

    return widget._instances if hasattr(widget, "_instances") else ipywidgets.Widget.widgets


def a_probe(seconds: float = 0.0) -> FakeProbe:
    return FakeProbe(120, seconds=seconds)


def a_source(markup: str = "") -> Source:
    words = RandomWords()
    ids = words.encode(SENTENCE * 300 + markup)[-4000:]
    ends = np.flatnonzero(np.array([words.vocabulary[i] == "." for i in ids])) + 1
    return Source(words, Haystack(ids, ends, f"a test{markup}"), markup)


def a_stream(source: Source | None = None, **settings):
    given = {"page": 3, "needle": "The soup has horseradish.", "prompt": "What has the soup?", "chunk_tokens": 512}
    return stream_panel(source=source or a_source(), subject=object(), **given | settings)


def a_bank(text: str = SENTENCE * 12):
    return bank_panel(reading=RandomReader(pasted(text, "a test"), tokens=120, start=100), layer=0)


def a_duel(**settings):
    return duel_panel("small", run=lambda *a, **k: iter(()), curve=lambda *a, **k: iter(()), **settings)


def a_wall(why: str = ""):
    """Measured at two lengths, where unfused attention stops at the second."""

    def run(rows, alpha, shortlist, device, lengths, limit_s, stop):
        for tokens, who in ((512, "mha"), (512, "proteus"), (1024, "mha"), (1024, "proteus")):
            ours, broken = who == "proteus", who == "mha" and tokens == 1024
            yield {"tokens": tokens, "who": who, "alpha": alpha if ours else None,
                   "shortlist": shortlist if ours else None, "ms": None if broken else 5.0,
                   "mb": None if broken else 2.0, "keys": 9.0, "why": why or "too slow" if broken else ""}  # fmt: skip

    panel = wall_panel(device="cpu", lengths=[512, 1024], run=run)
    panel.begin()
    return panel


def a_needle(text: str = "the soup has · horseradish"):
    """One case of each task, without a model."""

    def run(subject, pairs, haystack, tasks, stop):
        for task in tasks:
            yield Found(task, 1024, 0.5 if task == "single" else None, "?", {"proteus": 1.0, "bm25": 0.0, "random": 0.0,
                        "recency": 0.0}, (1.0, 0.0), (1.0, 0.8), 31, text)  # fmt: skip

    panel = needle_panel(subject=SimpleNamespace(note=text), run=run)
    panel.begin()
    return panel


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A function that plans to heal a converted tiny model on a text, and opens the panel; its run is made up."""
    for name in ("transformers", "peft", "accelerate"):
        pytest.importorskip(name)
    from made_healing import PLAN, MadeSession, plan_for

    from proteus_playground.hf.convert import convert

    place = tmp_path_factory.mktemp("healing")
    model, tokenizer = tiny_llama.build(num_hidden_layers=2)
    model.save_pretrained(place / "base"), tokenizer.save_pretrained(place / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTEUS_CACHE", str(place / "cache"))
        folder = convert(str(place / "base"), place / "own", say=lambda sentence: None)

    def open_panel(text: str = "a text"):
        plan_for(text).write(folder.runs[0] / PLAN)
        panel = healing_panel(folder.path, session=MadeSession)
        panel.begin()
        return panel

    return open_panel


@pytest.fixture(scope="module")
def live():
    return random_bytes(load_text("humble token"), tokens=200)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return committed.committed(made_study.write(tmp_path_factory.mktemp("studies")))[0]


PANELS = ("workbench", "stream", "bank", "prototypes", "duel", "evidence", "wall", "needles", "healing")


@pytest.fixture
def opened(live, study, request) -> Callable[[str], Panel]:
    """Opens a panel by name and waits for its first picture."""
    made = {
        "workbench": lambda: playground(model="smollm2", probe=a_probe()),
        "stream": a_stream,
        "bank": a_bank,
        "prototypes": lambda: prototype_panel(live=live),
        "duel": a_duel,
        "evidence": lambda: evidence_panel([study]),
        "wall": a_wall,
        "needles": a_needle,
        "healing": lambda: request.getfixturevalue("own")(),
    }

    def open_panel(name: str) -> Panel:
        panel = made[name]()
        wait(panel)
        return panel

    return open_panel


def wait(panel: Panel) -> None:
    panel.worker.wait()
    time.sleep(0.02)  # without an event loop the worker's thread draws: let it send its last message


# Latest wins


@dataclass(frozen=True)
class Drag:
    """A panel whose pictures follow a setting: `name` is the trait, `slow(panel)` makes a picture take a while."""

    make: Callable[[], Panel]
    name: str
    values: tuple
    slow: Callable[[Panel, threading.Event], None]


def slow_probe(panel, begun: threading.Event) -> None:
    view = panel.probe.view
    panel.probe.view = lambda *given, **more: (begun.set(), time.sleep(0.2), view(*given, **more))[2]


def slow_frames(panel, begun: threading.Event) -> None:
    make = panel.frames.make
    panel.frames.make = lambda *given: (begun.set(), time.sleep(0.2), make(*given))[2]


DRAGS = {
    "workbench": Drag(lambda: playground(model="smollm2", probe=a_probe(0.02)), "flux_alpha",
                      tuple(0.05 + (move * 37 % 90) / 100 for move in range(300)), slow_probe),
    "stream": Drag(a_stream, "neighbours", tuple(move * 7 % 60 for move in range(300)), slow_frames),
}  # fmt: skip


@pytest.fixture(params=DRAGS)
def drag(request):
    return DRAGS[request.param]


@pytest.fixture
def dragged(drag):
    panel = drag.make()
    rest(panel)
    yield panel
    panel.close()


def rest(panel) -> None:
    """Until the picture is the one that the controls ask for."""
    end = time.monotonic() + 20
    while panel.drawn is None or panel.drawn.wanted != panel.wanted() or "pp-fresh" not in panel.status.value:
        assert time.monotonic() < end, f"still stale: {panel.status.value}"
        time.sleep(0.005)
    time.sleep(0.02)


def test_back_at_the_picture_on_show_nothing_older_follows(drag, dragged):
    shown, old, begun = dragged.drawn, getattr(dragged.state, drag.name), threading.Event()
    drag.slow(dragged, begun)
    setattr(dragged.state, drag.name, drag.values[1])
    assert begun.wait(5) and old != drag.values[1]
    setattr(dragged.state, drag.name, old)
    dragged.worker.wait()
    assert dragged.drawn is shown and shown.wanted == dragged.wanted() and "pp-fresh" in dragged.status.value


@pytest.mark.slow
def test_many_quick_moves_leave_no_stale_picture_and_no_growth(drag, dragged):
    threads, before, shown = threading.active_count(), dragged.worker.started, []
    draw = dragged._draw
    dragged._draw = lambda number, frame: (shown.append(number), draw(number, frame))
    for move in range(1000):
        setattr(dragged.state, drag.name, drag.values[move % len(drag.values)])
        if move % 20 == 0:
            time.sleep(0.001)
    rest(dragged)
    assert getattr(dragged.state, drag.name) == drag.values[999 % len(drag.values)]
    assert dragged.worker.started - before < 250 and shown == sorted(shown)
    assert threading.active_count() <= threads and len(dragged.worker._waiting) <= 1


def messages(figure) -> list:
    """Collects what is sent to the browser about `figure` from now on."""
    sent = []

    def collect(change) -> None:
        if change["new"] is not None:
            sent.append(change["new"])

    figure.observe(collect, "_py2js_update")
    return sent


@pytest.mark.parametrize("name,act", [
    ("workbench", lambda panel: setattr(panel.state, "flux_alpha", 0.5)),
    ("stream", lambda panel: panel.transport.go(3)),
    ("prototypes", lambda panel: panel.do("step")),
    ("duel", lambda panel: setattr(panel.state, "flux_alpha", 0.5) or panel._draw()),
    ("evidence", lambda panel: panel._picked("quest", None)),
    ("healing", lambda panel: panel._draw()),
])  # fmt: skip
def test_one_figure_message_per_picture(opened, name, act):
    panel = opened(name)
    sent, number = messages(panel.pictures.widget), panel.number
    act(panel)
    wait(panel)
    assert panel.number > number and len(sent) == 1
    panel.close()


# Text from outside


def marked_probe() -> FakeProbe:
    probe = a_probe()
    probe.tokens, probe.note, probe.name = [MARKUP] * 120, MARKUP, MARKUP
    return probe


@pytest.fixture
def with_markup(live, study, request) -> dict[str, Callable[[], Panel]]:
    """Panels whose texts, notes and names hold markup."""
    marked = replace(live, tokens=[MARKUP] * len(live.tokens), note=MARKUP)
    return {
        "workbench": lambda: playground(probe=marked_probe()),
        "stream": lambda: a_stream(a_source(MARKUP), needle=MARKUP + " soup"),
        "bank": lambda: a_bank(SENTENCE + f" {MARKUP}" * 40),
        "prototypes": lambda: prototype_panel(live=marked),
        "duel": lambda: a_duel(text=MARKUP),
        "evidence": lambda: evidence_panel([replace(study, note=MARKUP)]),
        "wall": lambda: a_wall(MARKUP),
        "needles": lambda: a_needle(MARKUP),
        "healing": lambda: request.getfixturevalue("own")(MARKUP),
    }


@pytest.mark.parametrize("name", PANELS)
def test_text_from_outside_cannot_become_markup(name, with_markup):
    panel = with_markup[name]()
    wait(panel)
    shown = "".join(widget.value for widget in panels.held(panel) if isinstance(widget, ipywidgets.HTML))
    assert "<script>" not in shown and "<b>bold" not in shown
    assert "&lt;" in shown and panel.problem == ""
    panel.close()


# Closing


@pytest.mark.parametrize("name", PANELS)
def test_panels_that_were_closed_leave_nothing(opened, name):
    """Twenty workbenches, and eight of each other panel."""
    memory = psutil.Process().memory_info

    def once() -> weakref.ref:
        panel = opened(name)
        gone = weakref.ref(panel)
        panel.close()
        panel.close()  # closing twice is allowed
        return gone

    def leftovers() -> tuple[list[str], bool]:
        end = time.monotonic() + 10
        while time.monotonic() < end:  # a worker's thread may still be about to end
            gc.collect()
            if last() is None:
                break
            time.sleep(0.05)
        return sorted(registry()), last() is None

    before = sorted(registry())
    last = once()
    assert leftovers() == (before, True)
    threads, resident = threading.active_count(), memory().rss
    for _ in range(19 if name == "workbench" else 7):
        last = once()
    assert leftovers() == (before, True)
    assert threading.active_count() <= threads
    assert memory().rss - resident < 60 << 20


def test_parts_of_the_frame_that_a_panel_does_not_place_are_closed_too():
    before = sorted(registry())
    bare = Panel("Bare", {"picture": ""})
    bare.place("pp-bare")
    bare.close()
    assert sorted(registry()) == before


def test_a_closed_panel_no_longer_follows_its_state(opened):
    panel = opened("workbench")
    state, probe = panel.state, panel.probe
    panel.close()
    calls = dict(probe.calls)
    state.flux_alpha = 0.123
    panel.worker.wait()
    assert probe.calls == calls and not state._trait_notifiers.get("flux_alpha", {}).get("change")


def test_a_closed_panel_leaves_others_open(opened):
    first, second = opened("workbench"), opened("stream")
    kept = {widget.model_id for widget in panels.held(second)}
    first.close()
    assert kept <= set(registry())
    second.transport.go(2)
    assert second.transport.step == 2
    second.close()


def test_a_cell_that_is_run_again_closes_the_panels_of_its_last_run(opened, monkeypatch):
    runs = iter([("cell a", "run 1")] * 2 + [("cell b", "run 2"), ("cell a", "run 3"), None])
    monkeypatch.setattr(panels, "running_cell", lambda: next(runs))
    one, two, other, again, without = (opened("duel") for _ in range(5))
    assert [panel.comm is None for panel in (one, two, other, again, without)] == [True, True, False, False, False]
    for panel in (other, again, without):
        panel.close()


def test_outside_a_notebook_there_is_no_cell():
    assert panels.running_cell() is None


# Needles


def test_a_needle_of_ones_own_is_checked_and_measured():
    panel = a_needle()
    wait(panel)
    assert [one.task for one in panel.found] == ["single", "jigsaw", "clustered", "fading"]
    assert "Mentions with 100% ✓, 80% ✗" in panel.said.value and panel.problem == ""
    panel.answer.value = "elsewhere"
    panel.begin(own=True)
    assert "must contain the answer 'elsewhere'" in panel.problem and panel.found == []
    panel.answer.value = "kitchen stairs"
    panel.begin(own=True)
    wait(panel)
    assert [one.task for one in panel.found] == ["single", "jigsaw", "fading"] and panel.problem == ""
    panel.close()
