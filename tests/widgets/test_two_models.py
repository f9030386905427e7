"""A and B of two models: both are shown where they can be compared, and the panel says why where they cannot."""

from __future__ import annotations

import time

import pytest
from fake_probe import FakeProbe
from helpers import text_of
from proteus_playground.widgets import PlayState
from proteus_playground.widgets.parts.state import opening, pin_of, unpin
from proteus_playground.widgets.workbench import workbench
from proteus_playground.widgets.workbench.tradeoff import ALPHAS, NLL
from proteus_playground.widgets.workbench.two_models import Probes, apart, source_of
from proteus_playground.widgets.workbench.workbench import Workbench
from test_widgets import rest

KIND = {"smollm2": {}, "someone/healed": {"error": 0.5}, "someone/other": {"tokens": 90}, "someone/wide": {"heads": 12}}


class Healed(FakeProbe):
    """A probe with another error and other next tokens than `FakeProbe`."""

    def __init__(self, name: str, tokens: int = 120, heads: int = 9, error: float = 0.0):
        super().__init__(tokens, heads=heads)
        self.name, self.plus = name, error

    def view(self, layer, settings, **given):
        view = super().view(layer, settings, **given)
        object.__setattr__(view, "error", view.error + self.plus)
        return view

    def next_logprobs(self, token, *rest, **given):
        return super().next_logprobs((token + round(10 * self.plus)) % len(self.tokens), *rest, **given)

    def run_model(self, settings, **given):
        view = super().run_model(settings, **given)
        object.__setattr__(view, "nll", view.nll + self.plus)
        return view


@pytest.fixture
def made(monkeypatch):
    """(a workbench of smollm2, the models that were opened)."""
    monkeypatch.setattr(workbench, "REST_SECONDS", 0.0)
    monkeypatch.setattr(workbench, "NEXT_SECONDS", 0.0)
    opened = []

    def make(source, stop, progress):
        opened.append(source["model"])
        if source["model"] == "someone/gone":
            raise OSError("the disk is gone")
        if source["model"] not in KIND:
            return FakeProbe(120), f"{source['model']} is not on this machine"
        return Healed(source["model"], **KIND[source["model"]]), ""

    state = PlayState("smollm2")
    state.flux_alpha = 0.5
    bench = Workbench(state, make)
    bench.worker.wait()
    rest(bench)
    yield bench, opened
    bench.close()


def choose_a(bench, name: str) -> None:
    bench.ways.model_a.value = name
    bench.worker.wait()
    rest(bench)


def measure(bench) -> None:
    """Until the cost curve and all its losses are there."""
    bench.curve.measure.click()
    for _ in range(3):
        bench.worker.wait()


def test_every_panel_shows_both_models(made):
    bench, opened = made
    bench.ways.pin.click()
    assert bench.ways.model_a.value == "smollm2" and "smollm2-slider" in bench.ways.model_a.options
    choose_a(bench, "someone/healed")
    frame = bench.drawn
    assert frame.other.error == pytest.approx(0.6) and frame.view.error == pytest.approx(0.1)
    assert "10.0%" in text_of(bench.numbers.value) and "A 60.0%" in text_of(bench.numbers.value)
    assert frame.other_row is not None and len(bench.text.other) == len(bench.probe.tokens)
    assert bench.pictures.widget.layout.yaxis4.visible and "read by A" in bench.captions["gates"].value
    assert "B smollm2, A someone/healed" in text_of(bench.title.value).replace("SmolLM2-135M", "smollm2")
    assert "someone/healed → SmolLM2-135M" in bench.ways.pinned.value and not bench.ways.apart.value
    bench.worker.wait()
    assert "Likeliest with A" in bench.next.value and "KL under" not in bench.next.value
    bench.run_model.click()
    bench.worker.wait()
    said = text_of(bench.numbers.value)
    assert "NLL: B3.550" in said and "A 4.050 (-0.500)" in said
    bench.state.flux_alpha = 0.4
    rest(bench)
    assert "NLL: B, earlier" in text_of(bench.numbers.value)
    link = bench.state.to_string()
    other = PlayState()
    other.restore(link)
    assert other.pin() == bench.state.pin() and other.pin().model == "someone/healed"
    assert opened == ["smollm2", "someone/healed"]


def test_a_link_opens_both_and_exchanging_them_opens_neither_again(made):
    bench, opened = made
    bench.ways.pin.click()
    choose_a(bench, "someone/healed")
    bench.ways.swap.click()
    bench.worker.wait()
    rest(bench)
    assert bench.state.model == "someone/healed" and bench.state.pin().model == "smollm2"
    assert bench.drawn.view.error == pytest.approx(0.6) and bench.drawn.other.error == pytest.approx(0.1)
    assert opened == ["smollm2", "someone/healed"]
    bench.model_choice.buttons.value = "smollm2"  # as A: one model at two settings, and A stays pinned
    bench.worker.wait()
    rest(bench)
    assert bench.drawn.other is not None and bench.pinned_probe is None and len(opened) == 2
    bench.ways.pin.click()
    rest(bench)
    assert bench.drawn.other is None and bench.ways.model_a_row.layout.display == "none"
    state = PlayState("smollm2")
    state.pinned = pin_of(state.to_dict() | {"model": "someone/healed"})
    again = Workbench(state, bench.probes._make)
    again.worker.wait()
    rest(again)
    assert again.drawn.other is not None
    again.close()


@pytest.mark.parametrize(
    "name,why",
    [
        (
            "someone/other",
            "someone/other and SmolLM2-135M cut this text into different tokens, so the same place is not",
        ),
        (
            "someone/wide",
            "has 4 layers of 12 heads in 3 groups and SmolLM2-135M 4 layers of 9 heads in 3 groups, so no head",
        ),
        ("someone/missing", "A is not shown: someone/missing is not on this machine"),
        ("someone/gone", "A is not shown: the disk is gone"),
        ("no such model", "model='no such model': allowed is"),
    ],
)
def test_the_control_says_why_a_is_not_shown(made, name, why):
    bench, _ = made
    bench.ways.pin.click()
    choose_a(bench, name)
    assert why in text_of(bench.ways.apart.value)
    refused = name == "no such model"
    assert (bench.drawn.other is None) != refused and bench.drawn.wanted.settings == bench.state.settings()
    if name == "someone/missing":
        assert "Pull someone/missing" in bench.source_controls.pull.description
    choose_a(bench, "someone/healed")
    assert bench.drawn.other.error == pytest.approx(0.6) and not bench.ways.apart.value


def test_any_name_can_be_typed_for_b_too(made):
    bench, _ = made
    bench.source_controls.model.value = "someone/healed"
    bench.worker.wait()
    rest(bench)
    assert bench.state.model == "someone/healed" == bench.model_choice.buttons.value
    assert bench.state.flux_alpha == 0.5
    bench.source_controls.model.value = "nothing like it"
    assert "model='nothing like it'" in text_of(bench.source_controls.refused.value)
    assert bench.state.model == "someone/healed"


def test_only_the_probes_in_use_are_kept():
    probes, state = Probes(lambda source, stop, progress: (object(), "")), PlayState("smollm2")
    b, a = source_of(state), source_of(state, "random")
    one, two = (probes.open(source, None, None, None) for source in (b, a))
    assert probes.open(b, None, None, None) is one and probes.open(a, None, None, None) is two
    probes.keep(b, None)
    assert probes.open(b, None, None, None) is one and probes.open(a, None, None, None) is not two
    assert apart(FakeProbe(50), FakeProbe(50)) == ""


def test_a_pin_without_a_model_is_of_the_model_on_show():
    pin = unpin("alpha=0.3", "random")
    assert (pin.settings.flux_alpha, pin.model) == (0.3, "random")
    assert unpin("model=shelf-mini", "random").settings.gates == opening("shelf-mini")["gates"]
    with pytest.raises(ValueError, match="allowed is settings, a selector, what is taken away and a model"):
        PlayState().update({"pinned": "layer=3"})


def test_cost_against_quality_is_drawn_of_both(made):
    bench, _ = made
    bench.ways.pin.click()
    choose_a(bench, "someone/healed")
    measure(bench)
    b, a = bench.curve.curves
    assert bench.curve.unfinished is None and not bench.curve.old
    assert [row[3] for row in a.rows] == pytest.approx([row[3] + 0.5 for row in b.rows])
    assert a.nll[0.5] == pytest.approx(b.nll[0.5] + 0.5) and len(a.nll) == len(ALPHAS)
    traces = {trace.name: trace for trace in bench.curve.widget.data}
    assert list(traces["output error of A"].y) == [row[3] for row in a.rows]
    assert list(traces[NLL + " of A"].y) == list(a.nll.values())
    assert traces[NLL + " of A"].opacity < 1 and "A, the faint lines: At α" in bench.curve.said.value
    bench.ways.pin.click()  # unpinned: the figures are those of two
    rest(bench)
    assert bench.curve.old
    measure(bench)
    assert len(bench.curve.curves) == 1 and not bench.curve.old and not traces["output error of A"].y
    assert "faint" not in bench.curve.said.value


def test_a_pinned_setting_is_another_curve_and_its_own_alpha_is_none(made):
    bench, _ = made
    bench.ways.pin.click()
    bench.state.shortlist = 32
    rest(bench)
    measure(bench)
    b, a = bench.curve.curves
    assert (a.of.settings.shortlist, b.of.settings.shortlist) == (128, 32) and a.rows[-1][2] > b.rows[-1][2]
    assert not bench.curve.old
    bench.state.pinned = pin_of(bench.state.to_dict() | {"shortlist": 128, "flux_alpha": 0.25})
    assert not bench.curve.old  # alpha is the axis
    bench.state.pinned = pin_of(bench.state.to_dict() | {"shortlist": 64})
    assert bench.curve.old and "shortlist L 64 → 32" in bench.ways.pinned.value
    bench.state.shortlist = 64
    assert "A and B are the same" in bench.ways.pinned.value
    bench.state.flux_alpha = 1.0  # A and B lie on one curve, which is measured once
    assert "flux α 0.5 → 1" in bench.ways.pinned.value
    rest(bench)
    measure(bench)
    assert len(bench.curve.curves) == 1 and not bench.curve.old
    now, pinned = bench.curve.widget.data[4:6]
    assert (now.x[0], pinned.x[0]) == (1.0, 0.5) and pinned.visible
    bench.ways.pin.click()
    assert not pinned.visible and not bench.curve.old


def test_losses_go_on_when_the_model_of_a_is_back(made):
    bench, _ = made
    bench.ways.pin.click()
    choose_a(bench, "someone/healed")
    for probe in (bench.probe, bench.pinned_probe):
        probe.seconds = 0.01
    bench.curve.measure.click()
    end = time.monotonic() + 30
    while not bench.curve.curves or not bench.curve.curves[0].nll:
        assert time.monotonic() < end
        time.sleep(0.005)
    for name in ("someone/other", "someone/healed"):
        bench.ways.model_a.value = name
        bench.worker.wait()
    rest(bench)
    while bench.curve.unfinished is not None:
        assert time.monotonic() < end, "no loss is on its way"
        bench.worker.wait()
    assert [len(curve.nll) for curve in bench.curve.curves] == [len(ALPHAS)] * 2 and not bench.curve.old


@pytest.mark.parametrize("name,shown", [("smollm2", True), ("someone/healed", True), ("someone/other", False)])
def test_the_alpha_of_a_is_marked_where_a_is_shown(made, name, shown):
    bench, _ = made
    bench.ways.pin.click()
    choose_a(bench, name)
    measure(bench)
    assert bench.curve.widget.data[5].visible == shown and (bench.drawn.other is not None) == shown


def test_the_curves_name_both_selectors(made):
    bench, _ = made
    bench.ways.pin.click()
    bench.state.selector = "quest"
    rest(bench)
    measure(bench)
    assert "120 tokens, quest and ours, on this machine. B: At" in bench.curve.said.value
