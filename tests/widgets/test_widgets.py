"""The workbench without a browser: state, latest wins, pictures that follow, and what it says in words."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from html import escape

import numpy as np
import plotly.graph_objects as go
import pytest
from fake_probe import FakeProbe
from helpers import text_of
from proteus_playground.widgets import PRESETS, PlayState, Workbench, playground
from proteus_playground.widgets.apps import make_probe
from proteus_playground.widgets.parts import raster, sentences
from proteus_playground.widgets.parts.controls import Knob, LayerControls, ModelChoice, Switch, main_knobs
from proteus_playground.widgets.parts.html import style_sheets
from proteus_playground.widgets.parts.plot import blank
from proteus_playground.widgets.parts.state import BY_NAME, KEYS, check, opening, parse, preset_settings
from proteus_playground.widgets.workbench import figure, readout
from proteus_playground.widgets.workbench.tour import STEPS, Tour

from proteus_playground.attention import AttentionConfig
from proteus_playground.attention.settings import CONTROLS, LayerShape, Settings, config_for, settings_of
from proteus_playground.playground.glossary import by_code
from proteus_playground.playground.views import ANCHOR, DNA, LOCAL, NOTE, UNSEEN


@pytest.fixture
def bench():
    made = playground(model="smollm2", probe=FakeProbe())
    made.worker.wait()
    yield made
    made.close()


def rest(bench: Workbench) -> None:
    """Until the picture is the one that the controls ask for."""
    end = time.monotonic() + 20
    while (
        bench.drawn is None
        or bench.drawn.wanted != bench.wanted()
        or bench.pictures.widget.data[-1].meta != bench.number
    ):
        assert time.monotonic() < end, f"still stale: {bench.status.value}"
        time.sleep(0.002)
    time.sleep(0.02)  # without an event loop the drawing is on another thread: let its last message go out


# The state


def test_a_state_survives_json_and_the_short_string():
    state = PlayState()
    state.update({"flux_alpha": 0.35, "shortlist": 64, "notes": False, "text": "a b/ü.txt", "token": 7})
    for saved in (state.to_json(), state.to_string(), state.to_dict()):
        other = PlayState()
        other.restore(saved)
        assert other.to_dict() == state.to_dict()
    assert len(json.loads(state.to_json())) == len(state.to_dict())
    assert PlayState().to_string() == ""


def test_a_teachers_string_names_only_what_differs():
    state = PlayState()
    state.restore("alpha=0.35&L=64&layer=12&notes=0")
    assert (state.flux_alpha, state.shortlist, state.layer, state.notes) == (0.35, 64, 12, False)
    assert state.keep_ratio == 1.0


BAD = [
    ({"flux_alpha": 1.1}, "flux_alpha"), ({"flux_alpha": "much"}, "flux_alpha"), ({"flux_alpha": True}, "flux_alpha"),
    ({"flux_alpha": float("nan")}, "flux_alpha"), ({"keep_ratio": 0}, "keep_ratio"), ({"shortlist": 8}, "shortlist"),
    ({"shortlist": 64.5}, "shortlist"), ({"dna_fraction": -0.1}, "dna_fraction"), ({"probes": 0}, "probes"),
    ({"gates": None}, "gates"), ({"anchors": 99}, "anchors"), ({"head_top_p": 0}, "head_top_p"),
    ({"notes": "perhaps"}, "notes"), ({"model": "gpt"}, "model"), ({"text": 3}, "text"), ({"length": 10}, "length"),
    ({"length": float("inf")}, "length"), ({"colour": 1}, "colour"), ("alpha", "state"), ("{", "state"), (3, "state"),
    ({"pasted": "x" * 200_001}, "pasted"), ("layer=-1", "layer"),
]  # fmt: skip


@pytest.mark.parametrize("saved,name", BAD, ids=lambda v: str(v)[:30])
@pytest.mark.bad_input
def test_a_bad_state_is_refused_by_name_and_changes_nothing(saved, name):
    state = PlayState()
    with pytest.raises((ValueError, TypeError), match=name):
        state.restore(saved)
    assert state.to_dict() == PlayState().to_dict()
    with pytest.raises((ValueError, TypeError), match=name):
        playground(state=saved, probe=FakeProbe(20))


def test_the_arguments_of_playground_win_over_its_state():
    made = playground(state="alpha=0.2&L=64", flux_alpha=0.7, probe=FakeProbe(50))
    assert (made.state.flux_alpha, made.state.shortlist) == (0.7, 64)
    with pytest.raises(ValueError, match="flux"):
        playground(flux=0.5, probe=FakeProbe(50))


def test_settings_are_what_the_probe_may_be_asked():
    state = PlayState()
    state.update({"probes": 8, "gates": 4})
    assert state.settings().probes == 4
    assert Settings(**preset_settings("dense")).flux_alpha == 0
    with pytest.raises(ValueError, match="preset='best'"):
        preset_settings("best")


def test_every_control_has_a_sentence_for_its_tooltip():
    for control in BY_NAME.values():
        assert control.tip.endswith(".") and control.tip.count(".") == 1
        assert check(control.name, control.default) == control.default
    assert parse("") == {}


@pytest.mark.parametrize("name", Settings.__dataclass_fields__)
def test_every_knob_that_the_playground_offers_has_a_trait_a_link_key_and_a_control(name):
    declared = Settings.__dataclass_fields__[name]
    of, key = declared.metadata["of"], declared.metadata["key"]
    state = PlayState("smollm2")
    assert getattr(state, name) == declared.default and KEYS[key] == name
    other = not declared.default if isinstance(declared.default, bool) else BY_NAME[name].low
    state.update({name: other})
    assert state.to_string() == f"{key}={other:g}&model=smollm2"
    restored = PlayState()
    restored.restore(state.to_string())
    shape = LayerShape(n_heads=2, n_groups=1, head_dim=4)
    assert (
        getattr(config_for(restored.settings(), shape), of)
        == other
        == settings_of(AttentionConfig(**{of: other}))[name]
    )
    layer_controls = LayerControls(state)
    shown = [*main_knobs(state).children, *layer_controls.knobs.values(), *layer_controls.children[1].children]
    described = {child.description if isinstance(child, Switch) else child._control.label for child in shown}
    assert BY_NAME[name].label in described


def test_a_control_stays_within_what_the_layer_allows():
    for control in CONTROLS:
        allowed = AttentionConfig.__dataclass_fields__[control.of].metadata.get("range")
        if allowed:
            for value in (control.low, control.high, control.default):
                allowed.check(control.name, value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_recognised_and_drawn(bench, name):
    bench.state.update(preset_settings(name))
    rest(bench)
    assert bench.state.preset() == name
    assert bench.drawn.view.settings == Settings(**preset_settings(name))


# Controls


def knob_of(name: str, state: PlayState) -> Knob:
    return Knob(state, BY_NAME[name], live=True)


@pytest.mark.parametrize("name,value", [("flux_alpha", 0.25), ("keep_ratio", 0.5), ("shortlist", 300), ("probes", 5)])
def test_slider_entry_and_state_follow_each_other(name, value):
    state = PlayState("smollm2")
    knob = knob_of(name, state)
    knob.number.value = value
    assert getattr(state, name) == value and knob.slider.value == pytest.approx(value)
    setattr(state, name, BY_NAME[name].default)
    assert knob.number.value == knob.slider.value == BY_NAME[name].default
    knob.slider.value = value
    assert knob.number.value == getattr(state, name) == value
    knob.undo.click()
    assert getattr(state, name) == BY_NAME[name].default
    tip = getattr(knob.slider, "tooltip", None) or knob.slider.description_tooltip
    assert tip == BY_NAME[name].tip
    assert escape(by_code()[BY_NAME[name].of].sentence) in knob.children[0].children[0].value


def test_a_log_slider_between_two_numbers_is_not_pushed_back():
    state = PlayState()
    knob = knob_of("shortlist", state)
    knob.slider.value = 90.51
    assert state.shortlist == 91 and knob.slider.value == 90.51


def test_the_share_box_restores_and_says_what_is_wrong(bench):
    bench.more.value = True
    share = bench.share_controls
    bench.state.flux_alpha = 0.4
    assert "alpha=0.4" in share.cell.value and json.loads(share.json.value)["flux_alpha"] == 0.4
    share.json.value = "alpha=0.75"
    share.restore.click()
    assert bench.state.flux_alpha == 0.75
    share.json.value = "alpha=7"
    share.restore.click()
    assert "flux_alpha" in share.message.value and bench.state.flux_alpha == 0.75


# The tour


def test_the_tour_opens_at_a_step_by_argument_and_by_link():
    made = playground(tour=True, probe=FakeProbe(50))
    try:
        assert made.tour.step == made.state.tour == 1 and len(made.tour.steps) == len(STEPS) == BY_NAME["tour"].high
        made.tour.step = 3  # as the card's button does in the browser
        assert "tour=3" in made.state.to_string()
        made.model_choice.buttons.value = "random"
        assert made.state.tour == 3
        made.state.restore("tour=5")
        assert made.tour.step == 5
        made.tour.step = 0
        assert made.state.tour == 0 and "tour" not in made.state.to_string()
        made.guide.click()
        assert made.tour.step == 1
    finally:
        made.close()
    with pytest.raises(ValueError, match="tour=8"):
        playground(tour=8, probe=FakeProbe(50))


def test_each_step_of_the_tour_is_two_plain_sentences_about_an_element_that_is_there():
    sheet = style_sheets()
    for step in STEPS:
        assert 1 <= len(re.findall(r"[.?!](?: |$)", step.words)) <= 3 and len(step.words) < 260
        assert all(f"{name} " in sheet for name in step.element.split())
    assert len({(step.element, step.part) for step in STEPS}) == len(STEPS)
    assert "pp-term" in Tour().steps[2]["words"]


def test_an_error_is_said_and_the_next_setting_recovers(bench):
    view = bench.probe.view
    bench.probe.view = lambda *a, **k: (_ for _ in ()).throw(ValueError("gates=3: too few"))
    bench.state.flux_alpha = 0.33
    bench.worker.wait()
    assert "gates=3: too few" in bench.status.value and "pp-error" in bench.status.value
    bench.probe.view = view
    bench.state.flux_alpha = 0.34
    rest(bench)
    assert "pp-fresh" in bench.status.value


def test_the_whole_model_runs_with_progress_and_grows_old(bench):
    bench.run_model.click()
    bench.worker.wait()
    assert "3.700" in bench.numbers.value and "NLL (perplexity)" in bench.numbers.value
    bench.state.flux_alpha = 0.2
    rest(bench)
    assert "earlier settings" in bench.numbers.value


def test_a_change_of_settings_ends_a_whole_model_run():
    made = playground(probe=FakeProbe(60, seconds=0.1))
    rest(made)
    made.run_model.click()
    end = time.monotonic() + 5
    while made.worker.busy != "model" and time.monotonic() < end:
        time.sleep(0.005)
    made.state.flux_alpha = 0.1
    rest(made)
    assert made.model_view is None


# Pictures and words


def test_a_click_in_any_panel_is_followed_everywhere(bench):
    layers_run = bench.probe.calls["view"]
    bench.text.clicked = [42, 1]
    rest(bench)
    assert bench.drawn.row.token == bench.text.chosen == 42
    assert "(42)" in bench.captions["row"].value and "(42)" in bench.captions["gates"].value

    class Points:
        xs, ys, point_inds = [77], [5], [[5, 77]]

    bench.pictures._clicked_heat(None, Points, None)
    rest(bench)
    assert (bench.drawn.row.token, bench.drawn.row.head, bench.text.chosen) == (77, 5, 77)
    near = bench.pictures._keys[LOCAL]
    Points.point_inds = [4]
    bench.pictures._pick(Points, near)
    rest(bench)
    assert bench.text.chosen == near[4]
    # Only a row is worked out for a click, apart from the quiet repeats that time the layer.
    assert bench.probe.calls["view"] - layers_run <= 5


def test_scales_stay_fixed_while_a_slider_moves(bench):
    layout = bench.pictures.widget.layout
    axes = [f"{side}axis{number}" for side in "xy" for number in ("", "2", "3")]
    before = {axis: layout[axis].range for axis in axes}
    for alpha in (0.0, 0.3, 0.9):
        bench.state.flux_alpha = alpha
        rest(bench)
    assert {axis: layout[axis].range for axis in axes} == before
    assert None not in before.values()


def test_a_drag_sends_no_points_that_stay_where_they_are(bench):
    sent = []
    bench.pictures.widget.observe(lambda change: sent.append(change["new"]), "_py2js_update")
    bench.state.probes = 3
    rest(bench)
    message = next(message for message in sent if message is not None)
    assert bench.pictures.widget.data.index(bench.pictures._hover) not in message["style_traces"]
    assert not any("images" in key for key in message["layout_data"])


def test_heat_cells_are_means_over_awake_rows_and_fit_the_screen():
    view = FakeProbe(1000).view(0, Settings(route_heads=True))
    cells, middle = figure.heat_cells(view)
    assert cells.shape == (9, 334) and middle[1] == 4
    rows = view.awake[:3, 0]
    want = np.rint(view.head_map[:3, 0][rows].mean() * figure.HEAT_STEPS) if rows.any() else -1
    assert cells[0, 0] == want
    assert cells.min() == -1 and cells.max() <= figure.HEAT_STEPS


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("token", [0, 1, 299])
def test_every_key_of_a_row_is_in_its_line(alpha, token):
    probe = FakeProbe()
    row = probe.row(0, Settings(flux_alpha=alpha), token, 0)
    for kind in (LOCAL, ANCHOR, DNA, NOTE):
        x, y, keys = figure.stems(row, kind)
        of_kind = np.flatnonzero(row.kind == kind)
        assert len(x) == len(y) == len(keys) and not np.isnan(y).any()
        assert (y[0::3] < figure.FLOOR).all() and (y[2::3] < figure.FLOOR).all() and (y[1::3] >= figure.STUB).all()
        heavy = row.weight > 10**figure.FLOOR
        assert set(keys) == set(of_kind if kind != NOTE else of_kind[heavy[of_kind]])


def test_the_picture_of_the_keys_is_a_png_of_dots():
    image = np.zeros((20, 30, 3), np.float32)
    raster.stamp(image, np.array([[10, 15], [0, 0]]), np.array([[1, 0, 0, 0.5], [0, 1, 0, 1]]), raster.disc(2))
    assert image[10, 15].tolist() == [0.5, 0, 0] and image[0, 0, 1] == 1 and image[5, 5].max() == 0
    uri = raster.data_uri(image)
    assert uri.startswith("data:image/png;base64,iVBOR")


def test_words_say_what_the_numbers_are(bench):
    tokens = ["The", " humble", "\n"]
    assert sentences.token_name(tokens, 1) == "‘humble’ (1)" and sentences.token_name(tokens, 2) == "‘↵’ (2)"
    assert sentences.listed(["1", "2", "3"]) == "1, 2 and 3"
    assert sentences.percent(0.004) == "under 1%" and sentences.percent(0) == "0%"
    frame = bench.drawn
    said = sentences.gates_sentence(frame.row, bench.probe.tokens)
    opened = frame.row.gates_opened
    assert (
        f"opened {len(opened)} gates" in said if len(opened) > sentences.NAMED else all(str(g) in said for g in opened)
    )
    said = sentences.gates_sentence(replace(frame.row, gates_opened=(7, 19)), bench.probe.tokens)
    assert "opened gates 7 and 19." in said
    assert f"{(frame.row.kind == DNA).sum()} key" in said
    assert "is skipped" in sentences.text_sentence(frame.view, frame.row, bench.probe.tokens)
    kind = frame.row.kind.copy()
    kind[:5] = UNSEEN
    said = sentences.text_sentence(frame.view, replace(frame.row, kind=kind), bench.probe.tokens)
    assert said.endswith("tokens so far and does not see 5.")
    assert "not seen 5" in text_of(readout.legend_html(kind[: frame.row.token + 1]))


def test_a_sleeping_row_and_a_routed_map_are_said_plainly(bench):
    row = replace(bench.drawn.row, asleep=True, gates_opened=())
    assert "reads nothing" in sentences.gates_sentence(row, bench.probe.tokens)
    assert "computed nothing" in sentences.row_sentence(row, bench.probe.tokens)
    bench.state.route_heads = True
    rest(bench)
    assert "woke" in bench.captions["heads"].value and "routing weight" in bench.captions["heads"].value


def test_the_readout_holds_measured_beside_predicted(bench):
    html = bench.numbers.value
    for word in ("keys per query", "latency", "predicted", "output error", "not run yet", f'"{bench.number}"'):
        assert word in html
    assert sentences.quantity(3.2e9, "FLOP") == "3.2 GFLOP" and sentences.quantity(0, "B") == "0 B"
    budget = bench.drawn.view.budget
    filled = text_of(readout.split_html(budget))
    assert "rings 48" in filled and "notes 16" in filled and "up to 16 gates opened × 7 keys" in filled
    even = text_of(readout.split_html(budget | {"probes": 2, "ring": 24}))
    assert "rings 48" in even and "(2 gates opened × 24 keys)" in even
    assert "Dense" in readout.split_html({"dense": True})


def test_another_model_opens_as_it_opens_by_itself_but_where_the_sliders_are():
    state = PlayState("shelf-mini")
    controls, choice = LayerControls(state), ModelChoice(state)
    controls.knobs["layer"].limit(2)  # shelf-mini has three layers
    state.flux_alpha = 0.6
    choice.buttons.value = "smollm2"
    assert state.settings() == Settings(**preset_settings("gates with notes", "smollm2") | {"flux_alpha": 0.6})
    assert state.layer == opening("smollm2")["layer"] == 12
    controls.knobs["layer"].limit(29)
    assert controls.knobs["layer"].slider.value == controls.knobs["layer"].number.value == 12
    choice.buttons.value = "shelf-mini"
    assert state.gates == opening("shelf-mini")["gates"] and state.flux_alpha == 0.6 and state.layer == 0


def test_a_browser_that_comes_later_gets_what_is_on_show(bench):
    """In Voila, or after the page was loaded again."""
    bench.state.token = 40
    rest(bench)
    figure = bench.pictures.widget
    state = figure.get_state()
    assert [trace["type"] for trace in state["_widget_data"]] == [trace.type for trace in figure.data]
    heat = next(trace for trace in state["_widget_data"] if trace["type"] == "heatmap")
    assert "z" in heat and state["_widget_layout"]["height"] == figure.layout.height
    assert set(figure.get_state("_view_count")) == {"_view_count"}
    sent = []
    bench.next.send_state = lambda key: sent.append(key)
    bench._seen = False
    for number in (1, 2):
        bench.text.painted = bench.number + number
    assert sent == ["value"]  # with the first picture that it shows


def test_what_the_browser_fills_in_takes_no_value_away():
    """Plotly's own rule fails where a value is an array."""
    figure = blank({}, [go.Scatter(x=np.arange(3), y=np.arange(3), text=["a", "b", "c"])])
    uid = figure.data[0].uid
    figure._last_trace_edit_id = 7
    filled = {"uid": uid, "x": {"size": 3}, "text": ["d"], "mode": "lines"}
    figure._js2py_traceDeltas = {"trace_deltas": [filled], "trace_edit_id": 7}
    assert figure._js2py_traceDeltas is None and list(figure.data[0].text) == ["a", "b", "c"]


# Without a model


def test_without_a_pulled_model_a_random_layer_opens_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PROTEUS_CACHE", str(tmp_path))
    made = playground(model="smollm2", length=64)
    rest(made)
    assert made.probe.random and "This layer is random" in made.banner.value
    assert "proteus models pull smollm2" in made.banner.value
    assert made.run_model.disabled
    made.close()


def test_pasted_text_and_its_errors(tmp_path):
    source = {"model": "random", "text": "humble token", "pasted": "one two three four " * 40, "length": 64}
    probe, why = make_probe(source, lambda: False, lambda share, what: None)
    assert len(probe.tokens) <= 64 and why == ""
    made = playground(text=str(tmp_path / "none.txt"), model="random")
    made.worker.wait()
    assert "none.txt" in made.status.value and "pp-error" in made.status.value
