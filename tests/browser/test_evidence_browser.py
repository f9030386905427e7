"""The evidence notebook and the ask box in a real browser: both answer at the press of a button.

`PROTEUS_SCREENSHOTS=docs/img` keeps the screenshots; otherwise they go to the test's own folder.
"""

from __future__ import annotations

import driver
import pytest
from notebook_page import notebook_page, traces
from proteus_playground.experiments.evidence.committed import committed

from proteus_playground.lm.shipped import shipped_models

pytestmark = pytest.mark.slow
READY_MS = 120_000
PANEL, FIGURE = traces(".pp-evidence"), traces(".pp-figure")
NUMBERS = ".pp-evidence .pp-readout"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with notebook_page(tmp_path_factory.mktemp("lab")) as (page, address):
        page.set_viewport_size({"width": 1400, "height": 1180})
        yield page, address


def need(model: str) -> None:
    if model not in shipped_models():
        pytest.skip(f"the weights of {model} are not in this checkout")


@pytest.fixture(scope="module")
def evidence(lab):
    need("recall-mini")
    if not committed():
        pytest.skip("no study is committed in experiments/results")
    page, address = lab
    driver.start_all(page, address, "notebooks/05_evidence.ipynb")
    page.keyboard.press("Control+b")
    page.wait_for_selector(f"{NUMBERS}[data-request]", timeout=READY_MS)
    page.wait_for_function("() => document.querySelector('.pp-evidence .js-plotly-plot')?.data?.length === 8")
    page.locator(".pp-evidence").scroll_into_view_if_needed()
    return page


@pytest.fixture(scope="module")
def shelf(lab):
    need("shelf-mini")
    page, address = lab
    driver.run_all(page, address, f"notebooks/{driver.NOTEBOOK}")
    page.keyboard.press("Control+b")
    page.wait_for_timeout(500)
    page.locator(".pp-app").scroll_into_view_if_needed()
    return page


def after(page, act) -> str:
    """Does `act`, waits for the next picture, and returns its numbers."""
    old = int(page.locator(NUMBERS).get_attribute("data-request"))
    act()
    page.wait_for_function(
        f"(old) => +document.querySelector('{NUMBERS}').dataset.request > old", arg=old, timeout=60_000
    )
    page.wait_for_timeout(300)
    return page.locator(NUMBERS).inner_text()


def test_the_committed_figures_are_there_at_once(evidence):
    drawn = evidence.evaluate(PANEL)
    assert "intervals" in evidence.locator(".jp-Notebook").inner_text() and drawn.count("null") < len(drawn)
    assert "press the button" in evidence.locator(NUMBERS).inner_text()


def test_another_length_changes_the_picture(evidence):
    before, numbers = evidence.evaluate(PANEL), evidence.locator(NUMBERS).inner_text()
    length = evidence.locator(".pp-evidence select").nth(5)
    last = length.locator("option").count() - 1
    assert after(evidence, lambda: length.select_option(index=last)) != numbers
    assert evidence.evaluate(PANEL) != before


def test_a_button_measures_and_draws_a_point(evidence, shots):
    before = evidence.evaluate(PANEL)
    now = after(evidence, lambda: evidence.locator('button:has-text("Measure it here")').click())
    assert "press the button" not in now and " s" in now
    assert evidence.evaluate(PANEL) != before
    evidence.locator(".pp-evidence").screenshot(path=shots / "evidence.png")


@pytest.fixture(scope="module")
def asked(shelf) -> str:
    """The first question is asked and answered; what the figure showed before."""
    before = shelf.evaluate(FIGURE)
    shelf.locator('.pp-ask button:text-is("Ask")').click()
    shelf.wait_for_selector(".pp-verdict", timeout=60_000)
    driver.settle(shelf)
    shelf.wait_for_timeout(300)
    return before


def test_a_question_is_answered_and_its_fact_shown(shelf, asked, shots):
    said = shelf.locator(".pp-reply").inner_text()
    assert "at these settings" in said and "dense" in said
    assert shelf.evaluate(FIGURE) != asked and shelf.locator(".pp-tok.pp-fact").count() > 3
    chosen = shelf.locator(".pp-tok").count() - 1
    assert int(shelf.locator(".pp-chosen").get_attribute("data-i")) == chosen
    shelf.locator('button:has-text("show the fact")').click()
    shelf.wait_for_timeout(300)
    shelf.locator(".pp-app").screenshot(path=shots / "ask-the-shelf.png")


@pytest.mark.usefixtures("asked")
def test_a_slider_asks_again(shelf):
    reply = "document.querySelector('.pp-reply')"
    shelf.evaluate(f"() => {{ window.ppOld = {reply}; }}")
    handle = shelf.locator(".pp-knob-flux-alpha .noUi-handle")
    for _ in range(20):
        handle.press("ArrowLeft")
    number = "document.querySelector('.pp-knob-flux-alpha input').value"  # the kernel's word that it heard every key
    shelf.wait_for_function(f"() => {number} === '0.8'", timeout=30_000)
    shelf.wait_for_function(f"() => {reply} !== window.ppOld && !{reply}.classList.contains('pp-old') "
                            f"&& {reply}.querySelector('.pp-verdict')", timeout=60_000)  # fmt: skip
    driver.settle(shelf)


def test_the_console_stayed_free_of_errors(lab):
    assert lab[0].complaints == []
