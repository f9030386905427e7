"""The notebook of the million tokens in a real browser: both panels, played, scrubbed, asked and cancelled.

`PROTEUS_SCREENSHOTS=docs/img` keeps the screenshots; otherwise they go to the test's own folder.
"""

from __future__ import annotations

import driver
import pytest
from notebook_page import traces

NOTEBOOK = "notebooks/04_million_tokens.ipynb"
# What three keys to the left make of each.
KNOBS = {"chunk-tokens": "512", "per-chunk-budget": "45", "buffer-tokens": "181", "neighbours": "5"}
READY_MS = 280_000
pytestmark = pytest.mark.slow
TRACES = traces(".pp-stream")
SHOWN = """([name, value]) => {
  const app = document.querySelector('.pp-stream');
  const { plan, request } = app.querySelector('.pp-readout').dataset;
  const asked = [...app.querySelectorAll('.pp-knobs .pp-knob')].map((knob) => knob.querySelector('input').value);
  const drawn = Math.max(...app.querySelector('.js-plotly-plot').data.map((trace) => trace.meta ?? 0));
  return app.querySelector(`.pp-knob-${name} input`).value === value && plan === asked.join(' ')
    && app.querySelector('.pp-buffer').dataset.request === request && drawn >= +request;
}"""
IDLE = """() => document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status === 'idle'
  && ![...document.querySelectorAll('.jp-InputPrompt')].some((e) => e.textContent.includes('*'))"""


@pytest.fixture(scope="module")
def page(lab):
    page, address = lab
    page.set_viewport_size({"width": 1400, "height": 1240})  # a whole panel fits
    driver.start_all(page, address, NOTEBOOK)
    page.keyboard.press("Control+b")
    page.wait_for_function(IDLE, timeout=READY_MS)
    for panel in (".pp-stream .pp-buffer[data-request]", ".pp-bank .pp-gates[data-request]"):
        page.wait_for_selector(panel, state="attached", timeout=READY_MS)
    page.wait_for_function("() => document.querySelectorAll('.pp-stream .pp-fresh').length === 2", timeout=READY_MS)
    page.locator(".pp-stream").first.scroll_into_view_if_needed()
    page.wait_for_timeout(500)
    return page


@pytest.fixture
def panel(page):
    return page.locator(".pp-stream").first


def request(page) -> int:
    return int(page.locator(".pp-stream .pp-readout").first.get_attribute("data-request"))


def after(page, act, what: str = "") -> str:
    """Does `act`, waits until the panel shows what came of it, and returns its numbers."""
    old = request(page)
    act()
    page.wait_for_function(
        """([old, what]) => {
          const app = document.querySelector('.pp-stream');
          const shown = +app.querySelector('.pp-readout').dataset.request;
          return shown > old && app.querySelector('.pp-buffer').dataset.request == shown && app.innerText.includes(what)
            && !app.querySelector('.pp-stale');
        }""",
        arg=[old, what],
        timeout=30_000,
    )
    page.wait_for_timeout(250)
    return page.locator(".pp-stream .pp-readout").first.inner_text()


def chunk(page) -> int:
    return int(page.locator(".pp-stream .pp-value").first.inner_text().replace(",", ""))


def click(panel, words: str):
    return lambda: panel.locator(f'button:has-text("{words}")').first.click()


def test_every_cell_ran(page):
    said = page.locator(".jp-Notebook").inner_text()
    assert "Traceback" not in said  # the cells of the course that wait for a guess raise one sentence
    assert "are kept." in said and ") promoted, " in said


def test_the_panel_opens_with_the_needle_in_the_buffer(page, panel):
    assert chunk(page) == 25
    assert panel.locator(".pp-run.pp-needle").count() == 1
    assert "horseradish" in panel.locator(".pp-run.pp-needle").inner_text()


@pytest.mark.parametrize(("name", "value"), KNOBS.items(), ids=list(KNOBS))
def test_a_key_on_a_slider_changes_numbers_and_pictures(page, name, value):
    """Each key is a request of its own, so a newer picture is not yet that of the last key: the sizes drawn say so."""
    knob, readout = page.locator(f".pp-stream .pp-knob-{name}").first, page.locator(".pp-stream .pp-readout").first
    first = knob.locator("input").first.input_value()
    page.wait_for_function(SHOWN, arg=[name, first], timeout=30_000)
    before, numbers = page.evaluate(TRACES), readout.inner_text()
    for _ in range(3):
        knob.locator(driver.HANDLE).press("ArrowLeft")
    page.wait_for_function(SHOWN, arg=[name, value], timeout=30_000)
    assert readout.inner_text() != numbers and page.evaluate(TRACES) != before
    knob.locator(".pp-undo").click()
    page.wait_for_function(SHOWN, arg=[name, first], timeout=30_000)
    assert readout.inner_text() == numbers


def test_steps_go_both_ways_and_to_the_needle(page, panel, shots):
    after(page, click(panel, "to the needle"), "Added by chunk 14")
    assert chunk(page) == 14 and panel.locator(".pp-in.pp-needle").count() >= 1
    panel.screenshot(path=shots / "chunk-buffer.png")
    after(page, click(panel, "◀ step"), "has not been read yet")
    assert chunk(page) == 13 and panel.locator(".pp-run.pp-needle").count() == 0
    after(page, click(panel, "step ▶"))
    assert chunk(page) == 14


def test_the_long_slider_scrubs(page, panel):
    before = page.evaluate(TRACES)

    def press() -> None:
        panel.locator(f".pp-scrub {driver.HANDLE}").focus()
        for _ in range(6):
            page.keyboard.press("ArrowLeft")

    after(page, press, "of 25")
    page.wait_for_function("() => document.querySelector('.pp-stream .pp-value').innerText === '8'", timeout=30_000)
    assert chunk(page) == 8 and page.evaluate(TRACES) != before


def test_play_runs_pauses_and_starts_over(page, panel):
    click(panel, "fast")()
    play = panel.locator(".pp-play button")
    after(page, play.nth(1).click)
    page.wait_for_timeout(300)
    assert chunk(page) == 0
    after(page, play.first.click)
    page.wait_for_timeout(1200)
    play.first.click()
    page.wait_for_timeout(800)
    paused = chunk(page)
    assert 0 < paused <= 25
    page.wait_for_timeout(800)
    assert chunk(page) == paused
    play.first.click()
    page.wait_for_function("() => document.querySelector('.pp-stream .pp-value').innerText === '25'", timeout=60_000)
    page.wait_for_timeout(800)


def test_another_prompt_finds_something_else(page, panel):
    box = panel.locator(".pp-prompt input")
    asked = box.input_value()

    def ask(words: str):
        def act() -> None:
            box.fill(words)
            box.press("Enter")

        return act

    after(page, ask("What is a decorator?"), "“decorator”")
    assert panel.locator(".pp-run.pp-needle").count() == 0
    assert "decorator" in panel.locator(".pp-run").first.inner_text()
    after(page, ask(asked), "“soup”")
    assert panel.locator(".pp-run.pp-needle").count() == 1


def test_scoring_in_context_shows_progress_and_is_cancelled(page, panel):
    if panel.locator(".pp-random").count():
        pytest.skip("no model was pulled, so nothing scores in context")
    click(panel, "Score in context")()
    page.wait_for_function("() => / a second, /.test(document.querySelector('.pp-stream .pp-status').innerText)",
                           timeout=120_000)  # fmt: skip
    page.wait_for_function("() => +document.querySelector('.pp-stream .pp-value').innerText > 0", timeout=120_000)
    click(panel, "Cancel")()
    page.wait_for_selector(".pp-stream .pp-status.pp-stopped", timeout=60_000)
    page.wait_for_timeout(800)
    assert 0 < chunk(page) < 25 and panel.locator('button:has-text("Cancel")').is_disabled()
    after(page, click(panel, "words alone"), "one sentence planted")
    assert chunk(page) == 25


def test_the_million_tokens_are_there(page):
    million = page.locator(".pp-stream").nth(1)
    million.scroll_into_view_if_needed()
    assert "1,048,576" in million.locator(".pp-readout").inner_text()
    assert million.locator(".pp-run.pp-needle").count() == 1


def test_the_bank_steps_plays_and_looks_elsewhere(page, shots):
    bank = page.locator(".pp-bank")
    bank.scroll_into_view_if_needed()

    def seen() -> int:
        return int(bank.locator(".pp-value").first.inner_text().replace(",", ""))

    def until(count: int) -> None:
        page.wait_for_function(
            "(n) => +document.querySelector('.pp-bank .pp-value').innerText.replace(',', '') >= n", arg=count,
            timeout=60_000,
        )  # fmt: skip

    first, cards = seen(), bank.locator(".pp-gates").inner_html()
    bank.locator('button:has-text("step ▶")').click()
    until(first + 1)
    bank.locator('button:has-text("fast")').click()
    bank.locator('button:has-text("play")').click()
    until(first + 20)
    bank.locator('button:has-text("pause")').click()
    page.wait_for_timeout(1500)
    stopped = seen()
    page.wait_for_timeout(1000)
    assert seen() == stopped and bank.locator(".pp-gates").inner_html() != cards
    for _ in range(20):
        if bank.locator(".pp-came").count():
            break
        bank.locator('button:has-text("◀ step")').click()
        page.wait_for_timeout(250)
    assert bank.locator(".pp-came").count() and "left the window" in bank.inner_text()
    bank.screenshot(path=shots / "kv-bank.png")
    here = bank.locator(".pp-gates").inner_html()
    bank.locator("select").nth(1).select_option("1")
    page.wait_for_function("() => /KV group 1/.test(document.querySelector('.pp-bank .pp-cap').innerText)")
    assert bank.locator(".pp-gates").inner_html() != here


def test_the_console_stayed_free_of_errors(page):
    assert page.complaints == []
