"""The workbench with other selectors, two settings, and something taken away; what is kept, hidden and fixed."""

from __future__ import annotations

import ast
import json
import re
import time
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_probe import FakeProbe
from helpers import text_of
from proteus_playground.widgets import PlayState, playground
from proteus_playground.widgets.parts.html import style_sheets
from proteus_playground.widgets.parts.plot import GREY, OKABE_ITO
from proteus_playground.widgets.parts.state import pin_of
from proteus_playground.widgets.workbench import figure, keep, readout, workbench
from proteus_playground.widgets.workbench.ask_box import OURS_ANSWERS
from proteus_playground.widgets.workbench.tradeoff import ALPHAS
from test_widgets import rest

from proteus_playground.attention.selectors import SELECTORS, Way, Without
from proteus_playground.attention.settings import Settings
from proteus_playground.common.texts import Text
from proteus_playground.playground.probe import LayerProbe
from proteus_playground.playground.shelf_probe import Reply, ShelfProbe


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    """The layer is timed again, and the next token asked for, at once."""
    monkeypatch.setattr(workbench, "REST_SECONDS", 0.0)
    monkeypatch.setattr(workbench, "NEXT_SECONDS", 0.0)


@pytest.fixture
def bench():
    made = playground(model="smollm2", probe=FakeProbe())
    made.worker.wait()
    rest(made)
    yield made
    made.close()


def test_two_settings_stand_side_by_side_and_a_link_restores_them(bench):
    bench.ways.pin.click()
    bench.state.update({"flux_alpha": 0.5, "selector": "quest", "without": "notes, head 1:2"})
    rest(bench)
    frame = bench.drawn
    assert frame.other.settings.flux_alpha == 1 and frame.view.settings.flux_alpha == 0.5
    assert frame.view.way == Way("quest", Without.parse("notes, head 1:2")) and frame.other.way == Way()
    said = text_of(bench.numbers.value)
    assert re.search(r"A \d+; B = [\d.]+ × A", said)
    below = bench.pictures._other_stems
    assert any(len(trace.x) for trace in below.values()) and bench.pictures.widget.layout.yaxis4.visible
    assert len(bench.text.other) == len(bench.probe.tokens)
    assert "flux α 1 → 0.5, ours → quest" in bench.ways.pinned.value
    other = PlayState()
    other.restore(bench.state.to_string())
    assert (other.settings(), other.way(), other.pin()) == (
        bench.state.settings(),
        bench.state.way(),
        bench.state.pin(),
    )
    bench.ways.swap.click()
    rest(bench)
    assert bench.drawn.view.settings.flux_alpha == 1 and bench.state.pin()[1].selector == "quest"
    bench.ways.pin.click()
    rest(bench)
    assert not any(len(trace.x) for trace in below.values()) and not bench.text.other and bench.drawn.other is None


def test_the_heads_of_b_are_shown_where_a_has_the_same(bench):
    heat, caption = bench.pictures._heat, bench.captions["heads"]
    bench.state.route_heads = True
    rest(bench)
    bench.ways.pin.click()
    bench.state.selector = "quest"
    rest(bench)
    assert "routing weight of B" in caption.value and "which heads wake does not depend on the keys" in caption.value
    assert (heat.z == figure.heat_cells(bench.drawn.view)[0]).all() and np.max(heat.z) > 20 and heat.zmin == -1
    assert figure.AS_IT_IS in bench.pictures.widget._dom_classes and "pp-two" not in caption.value
    bench.state.flux_alpha = 0.5
    rest(bench)
    assert "B − A in routing weight" in caption.value and "pp-two" in caption.value and heat.zmin == -250
    assert (heat.z == figure.change_cells(bench.drawn.view, bench.drawn.other)[0]).all()
    assert figure.AS_IT_IS not in bench.pictures.widget._dom_classes
    bench.state.route_heads = False
    rest(bench)
    assert "picture is that of B alone, because that of A shows routing weight" in caption.value and heat.zmin == -1
    assert figure.AS_IT_IS in bench.pictures.widget._dom_classes


class FakeShelf(FakeProbe, ShelfProbe):
    """A made-up probe that gives the same answer at all settings."""

    questions, question, asked, start, predicts = (), "where is it?", None, None, True

    def ask(self, settings, *, stop=None):
        self.calls["ask"] = self.calls.get("ask", 0) + 1
        return Reply(settings, "here", "there", None, None, (), (0, 0))


def test_ask_says_that_it_answers_by_ours_whole():
    made = playground(model="smollm2", probe=FakeShelf(60))

    def said() -> str:
        rest(made)
        made.worker.wait()
        return text_of(made.ask_box.reply.value)

    try:
        made.worker.wait()
        assert "at these settings here" in said() and OURS_ANSWERS not in said() and "ours" not in said()
        for change in ({"selector": "quest"}, {"selector": "ours", "without": "notes"}):
            made.state.update(change)
            assert "ours at these settings here" in said() and OURS_ANSWERS in said()
        made.state.without = ""
        assert OURS_ANSWERS not in text_of(made.ask_box.reply.value)  # at once, before the new picture
        assert OURS_ANSWERS not in said() and made.probe.calls["ask"] == 1
        made.state.update({"flux_alpha": 0.5, "selector": "quest"})
        assert "pp-old" in made.ask_box.reply.value
        assert OURS_ANSWERS in said() and "pp-old" not in made.ask_box.reply.value
        assert "<p>where is it?</p>" + made.ask_box.reply.value in keep.page(made)
    finally:
        made.close()


def test_the_next_token_follows_what_is_taken_away(bench):
    bench.worker.wait()
    assert "dense" in text_of(bench.next.value) and "KL" in bench.next.value
    bench.ways.local["head"].click()
    bench.ways.parts["rings"].click()
    rest(bench)
    bench.worker.wait()
    head = f"head {bench.drawn.wanted.layer}:{bench.drawn.row.head}"
    assert bench.state.without == f"rings, {head}" and "less" in text_of(bench.next.value)
    assert [chip.part for chip in bench.ways.chips.children] == [head]
    bench.ways.chips.children[0].click()
    assert bench.state.without == "rings"
    model = bench.probe.run_model(bench.state.settings())
    said = text_of(readout.readout_html(1, bench.drawn.view, 1, model, bench.state.settings()))
    assert "NLL, our selector" in said  # the whole model runs with nothing taken away
    bench.ways.back.click()
    assert not bench.state.without and not bench.ways.chips.children


def test_a_function_of_a_guest_is_checked_and_joins_the_list():
    def near(sight, rows):
        """The nearest keys alone."""
        return sight.window(rows, sight.shortlist)

    def late(sight, rows):
        return ~sight.window(rows, 2)

    made = LayerProbe.random_layer(Text("a", "one two three four " * 20, "test"), max_tokens=64)
    good, bad = playground(selector=near, probe=made), playground(selector=late, probe=FakeProbe(40))
    try:
        good.worker.wait()
        rest(good)
        assert good.drawn.view.way.selector == "near" and "near" in good.ways.choice.options
        assert "keeps the rules" in good.ways.verdict.value and "The nearest keys alone." in good.ways.about.value
        assert bad.state.selector == "ours" and "must read no later key" in bad.ways.verdict.value
        assert "random" in bad.next.value or bad.next.value
        good.worker.wait()
        assert "no next token" in good.next.value
    finally:
        good.close()
        bad.close()
        SELECTORS.pop("near", None)


def test_cost_against_quality_is_measured_and_clicked(bench):
    bench.curve.measure.click()
    assert "Being measured" in bench.curve.said.value
    bench.stop()
    assert bench.curve.said.value == ""
    view, bench.probe.view = bench.probe.view, lambda *args, **how: 1 / 0
    bench.curve.measure.click()
    bench.worker.wait()
    assert bench.curve.said.value == "" and "division by zero" in bench.status.value
    bench.probe.view = view
    bench.curve.measure.click()
    bench.worker.wait()
    bench.worker.wait()
    curve = bench.curve.curves[0]
    rows = curve.rows
    assert [row[0] for row in rows] == list(ALPHAS) and rows[0][3] == 0 and rows[-1][2] < rows[0][2]
    assert list(curve.nll) == list(ALPHAS) and curve.nll[0.5] == pytest.approx(0.15)
    assert "NLL is 0.300 nats per token higher than dense" in bench.curve.said.value and not bench.curve.old
    assert list(bench.curve.widget.data[3].y) == list(curve.nll.values())

    class Points:
        xs = (0.25,)

    bench.curve._clicked(None, Points, None)
    rest(bench)
    assert bench.drawn.view.settings.flux_alpha == 0.25 and bench.curve.widget.data[4].x[0] == 0.25
    assert not bench.curve.old  # alpha is the axis
    bench.state.shortlist = 64
    assert bench.curve.old and "figures of earlier settings" in bench.curve.said.value  # at once
    bench.state.shortlist = 128
    assert not bench.curve.old and "earlier" not in bench.curve.said.value


def test_losses_come_after_the_picture_and_are_marked_while_they_are_missing(bench):
    bench.probe.seconds = 0.02
    bench.curve.measure.click()
    end = time.monotonic() + 20
    while not bench.curve.curves or not bench.curve.curves[0].nll:
        assert time.monotonic() < end
        time.sleep(0.005)
    assert "being measured, " in bench.curve.said.value
    runs = bench.probe.calls["run_model"]
    bench.state.shortlist = 64  # the losses that are missing would be those of other settings
    rest(bench)
    bench.worker.wait()
    curve = bench.curve.curves[0]
    assert 0 < len(curve.nll) < len(ALPHAS) and bench.probe.calls["run_model"] <= runs + 1
    assert f"NLL: {len(curve.nll)} of 9 values are there." in bench.curve.said.value and bench.curve.old
    bench.state.shortlist = 128
    rest(bench)
    bench.worker.wait()
    bench.worker.wait()
    assert len(curve.nll) == len(ALPHAS) and not bench.curve.old and "pp-fresh" in bench.status.value
    bench.curve.measure.click()
    while not bench.curve.curves[0].nll or bench.curve.curves[0] is curve:
        time.sleep(0.005)
    bench.cancel.click()
    assert "stopped; press the button" in bench.curve.said.value and not bench.curve.place.layout.display
    bench.curve.clear()
    assert bench.curve.place.layout.display == "none" and not bench.curve.said.value
    bench.probe.seconds = 0.0
    bench.state.selector = "quest"
    rest(bench)
    bench.curve.measure.click()
    bench.worker.wait()
    assert "No NLL: the whole model runs with our own selector only." in bench.curve.said.value


class Page(HTMLParser):
    """What a page loads, its titles, and whether every element is closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.loads, self.said = [], [], defaultdict(str)
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.loads += [given[name] for name in ("src", "href", "srcset", "action") if name in given]
        if tag not in ("meta", "br", "img", "link", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said[self.open[-1] if self.open else ""] += data


def test_what_is_kept_needs_no_network(bench, tmp_path):
    bench.ways.pin.click()
    bench.state.update({"flux_alpha": 0.5, "selector": "quest"})
    rest(bench)
    page = bench.keep(tmp_path / "all.html").read_text(encoding="utf-8")
    seen = Page(page)
    assert not seen.open and not seen.loads, (seen.open, seen.loads)  # nothing is fetched, not even from this machine
    assert not re.search(r"@import|url\([\"']?(http|//)", seen.said["style"])
    assert seen.said["title"] == "Proteus workbench: Fake, layer 3, humble token" and page.startswith("<!doctype html>")
    made = json.loads(seen.said["pre"])
    assert made["state"] == bench.state.to_dict() and {"torch", "python", "plotly", "device", "date"} <= set(made)
    again = PlayState()
    again.restore(ast.literal_eval(re.fullmatch(r"playground\(state=(.*)\)", made["link"])[1]))
    assert again.to_dict() == bench.state.to_dict()
    assert page.count("Plotly.newPlot") >= 3 and "Plotly.downloadImage(document.getElementById(id)" in page
    for name in keep.PANELS:
        assert f'id="{name}"' in page and f"save('{name}','png')" in page and f"save('{name}','svg')" in page
    one = keep.panel_figure(bench.pictures.widget, "row")
    assert one.layout.xaxis3.domain == (0, 1) and len(one.data) == 9
    heads = keep.panel_figure(bench.pictures.widget, "heads")
    assert [shape.fillcolor for shape in heads.layout.shapes] == [GREY]
    bench.ways.pin.click()
    rest(bench)
    alone = keep.panel_figure(bench.pictures.widget, "row")
    assert alone.layout.yaxis3.domain == (0, 1) and len(alone.data) == 5 and "yaxis4" not in alone.layout
    with pytest.raises(ValueError, match="path="):
        bench.keep(tmp_path / "all.png")
    with pytest.raises(ValueError, match="only='text'"):
        bench.keep(tmp_path / "all.html", "text")


def test_a_lesson_hides_and_fixes_controls():
    made = playground(hide=["keep_ratio", "presets"], fixed={"flux_alpha": 0.5}, probe=FakeProbe(50))
    try:
        knobs = made.knobs()
        assert "pp-hidden" in knobs["keep_ratio"]._dom_classes and knobs["flux_alpha"].slider.disabled
        made.state.update({"flux_alpha": 1.0, "shortlist": 64})
        made.state.restore("alpha=0.1&L=32")
        assert (made.state.flux_alpha, made.state.shortlist) == (0.5, 32)
    finally:
        made.close()
    with pytest.raises(ValueError, match="hide='colour'"):
        playground(hide=["colour"], probe=FakeProbe(50))
    with pytest.raises(ValueError, match="flux_alpha"):
        playground(fixed={"alpha": 2}, probe=FakeProbe(50))


@pytest.mark.bad_input
def test_bad_ways_are_refused_by_name():
    state = PlayState()
    for name, value in (("selector", "best"), ("without", "head 3"), ("pinned", "layer=3"), ("pinned", "alpha=2")):
        with pytest.raises(ValueError, match="selector=|without=|pinned=|flux_alpha="):
            state.update({name: value})
    assert set(PlayState("smollm2").to_dict()) >= {"selector", "without", "pinned"}
    assert pin_of(state.to_dict()).startswith("alpha=1&keep=1")


def test_a_difference_is_zero_where_a_head_slept():
    one, two = (FakeProbe(100).view(0, Settings(route_heads=True, flux_alpha=alpha)) for alpha in (0.0, 1.0))
    cells, _ = figure.change_cells(one, two)
    assert cells.min() >= -250 and cells.max() > 0 and (cells[figure.heat_cells(one)[0] < 0] == 0).all()
    assert "faster than dense attention between 1,024 and 4,096" in readout.pays_sentence(900)


# Colours. Matrices: Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.

SIMULATED = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB under D65."""
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    xyz = np.array(to_xyz) @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def linear(colour: str) -> np.ndarray:
    s = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)


def filtered(rgb: np.ndarray, filters: str) -> np.ndarray:
    """sRGB `(3,)` after the CSS filters `invert` and a `hue-rotate` by half a turn."""
    for name, value in re.findall(r"([\w-]+)\(([\d.]+)", filters):
        if name == "invert":
            rgb = rgb * (1 - 2 * float(value)) + float(value)
        else:
            assert (name, value) == ("hue-rotate", "180")
            rgb = 2 * rgb @ [0.213, 0.715, 0.072] - rgb
        rgb = np.clip(rgb, 0, 1)
    return rgb


def light(colour: str, filters: str) -> float:
    """Luma in 0..1 of `#rrggbb` on a dark page."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return float(filtered(rgb, filters) @ [0.213, 0.715, 0.072])


def test_in_dark_mode_the_high_end_is_the_bright_one():
    sheet = style_sheets()
    whole = re.search(r'"false"\] \.pp-app { filter: ([^;]+);', sheet)[1]
    kept = re.search(rf'"false"\] \.{figure.AS_IT_IS} :is\(\.heatmaplayer, i\) {{ filter: ([^;]+);', sheet)[1]
    assert light("#ffffff", whole) < 0.15 and light(GREY, whole) < 0.3
    steps = [light(colour, f"{kept} {whole}") for _, colour in figure.CIVIDIS[2:]]
    assert all(a < b for a, b in zip(steps[:-1], steps[1:], strict=True)) and steps[0] < 0.3 and steps[-1] > 0.7
    ends = [light(colour, whole) for _, colour in figure.TWO_SCALE]
    assert min(ends) == ends[2] < 0.15 and min(ends[0], ends[-1]) > 0.5
    assert figure.AS_IT_IS in readout.HEAT_LEGEND and figure.AS_IT_IS not in readout.TWO_HEAT_LEGEND


PALETTES = {
    "kinds of keys": [*OKABE_ITO.values(), "#ffffff"],
    "A and B": ["#b35806", "#542788", "#f7f7f7"],
    "before and after": ["#8c959f", "#0072B2", "#ffffff"],
    "time, reads, error, loss": ["#D55E00", "#0072B2", "#1b1f24", "#009E73", "#ffffff"],
}


@pytest.mark.parametrize("name", PALETTES)
def test_colours_stay_apart_for_colour_blind_readers(name):
    for kind, matrix in {"full colour": np.eye(3), **SIMULATED}.items():
        seen = [lab(np.array(matrix) @ linear(colour)) for colour in PALETTES[name]]
        apart = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
        assert min(apart) > 15, (kind, apart)
