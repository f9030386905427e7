"""The evidence notebook in a real browser: a cell of a study is measured again at the press of a button.

`PROTEUS_SCREENSHOTS=docs/img` keeps the screenshots; otherwise they go to the test's own folder.
"""

from __future__ import annotations

import driver
import pytest
from notebook_page import traces
from proteus_playground.experiments.evidence.committed import committed

from proteus_playground.lm.shipped import shipped_models

pytestmark = pytest.mark.slow
READY_MS = 120_000
PANEL = traces(".pp-evidence")
NUMBERS = ".pp-evidence .pp-readout"


@pytest.fixture(scope="module")
def evidence(lab):
    if "recall-mini" not in shipped_models():
        pytest.skip("the weights of recall-mini are not in this checkout")
    if not committed():
        pytest.skip("no study is committed in experiments/results")
    page, address = lab
    page.set_viewport_size({"width": 1400, "height": 1180})
    driver.start_all(page, address, "notebooks/08_evidence.ipynb")
    page.keyboard.press("Control+b")
    page.wait_for_selector(f"{NUMBERS}[data-request]", timeout=READY_MS)
    page.wait_for_function("() => document.querySelector('.pp-evidence .js-plotly-plot')?.data?.length === 8")
    page.locator(".pp-evidence").scroll_into_view_if_needed()
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


def test_the_console_stayed_free_of_errors(lab):
    assert lab[0].complaints == []
