"""The first notebook in a real browser: JupyterLab, Chromium, keys on sliders and clicks on pictures.

`PROTEUS_SCREENSHOTS=docs/img` keeps the screenshots; otherwise they go to the test's own folder.
"""

from __future__ import annotations

import driver
import pytest
from notebook_page import traces

from proteus_playground.lm.shipped import shipped_models

pytestmark = pytest.mark.slow
TRACES = traces(".pp-figure")
AXES = "[...document.querySelectorAll('.pp-figure .nsewdrag')].map((e) => e.getBoundingClientRect().toJSON())"


@pytest.fixture(scope="module")
def notebook(lab):
    """The notebook, every cell run."""
    page, address = lab
    driver.run_all(page, address, f"notebooks/{driver.NOTEBOOK}")
    page.keyboard.press("Control+b")
    page.wait_for_timeout(500)
    page.locator(".pp-app").scroll_into_view_if_needed()
    return page


@pytest.fixture(scope="module")
def shelf(notebook):
    """As it opens, with the model that comes with the package."""
    if "shelf-mini" not in shipped_models():
        pytest.skip("the weights of shelf-mini are not in this checkout")
    return notebook


@pytest.fixture(scope="module")
def asked(shelf) -> str:
    """The first question is asked and answered; what the figure showed before."""
    before = shelf.evaluate(TRACES)
    old = shelf.locator(".pp-reply").inner_text()
    shelf.locator(".pp-ask select").select_option(index=3)
    shelf.locator('.pp-ask button:text-is("Ask")').click()
    new = "document.querySelector('.pp-reply').innerText !== old && document.querySelector('.pp-verdict')"
    shelf.wait_for_function(f"(old) => {new}", arg=old, timeout=60_000)
    driver.settle(shelf)
    shelf.wait_for_timeout(300)
    return before


def test_a_question_is_answered_and_its_fact_shown(shelf, asked, shots):
    said = shelf.locator(".pp-reply").inner_text()
    assert "at these settings" in said and "dense" in said
    assert shelf.evaluate(TRACES) != asked and shelf.locator(".pp-tok.pp-fact").count() > 3
    chosen = shelf.locator(".pp-tok").count() - 1
    assert int(shelf.locator(".pp-chosen").get_attribute("data-i")) == chosen
    shelf.locator('button:has-text("show the fact")').click()
    shelf.wait_for_timeout(300)
    shelf.set_viewport_size({"width": 1400, "height": 1500})  # all of the panel fits below JupyterLab's bars
    shelf.wait_for_timeout(300)
    shelf.locator(".pp-app").screenshot(path=shots / "ask-the-shelf.png")
    shelf.set_viewport_size({"width": 1400, "height": 1060})


@pytest.mark.usefixtures("asked")
def test_a_slider_asks_again(shelf):
    reply = "document.querySelector('.pp-reply')"
    shelf.evaluate(f"() => {{ window.ppOld = {reply}; }}")
    handle = shelf.locator(f".pp-knob-flux-alpha {driver.HANDLE}")
    for _ in range(20):
        handle.press("ArrowLeft")
    number = "document.querySelector('.pp-knob-flux-alpha input').value"  # the kernel's word that it heard every key
    shelf.wait_for_function(f"() => {number} === '0.8'", timeout=30_000)
    shelf.wait_for_function(f"() => {reply} !== window.ppOld && !{reply}.classList.contains('pp-old') "
                            f"&& {reply}.querySelector('.pp-verdict')", timeout=60_000)  # fmt: skip
    driver.settle(shelf)
    shelf.locator(".pp-knob-flux-alpha .pp-undo").click()
    driver.settle(shelf)


def box(page, name: str) -> dict:
    return page.locator(name).bounding_box()


def test_the_tour_frames_each_picture_and_the_keyboard_leads_through_it(shelf):
    shelf.locator('button:has-text("Guided tour")').click()
    framed = []
    for step in range(1, 8):
        shelf.wait_for_function(
            f"() => document.querySelector('.pp-tour').textContent.startsWith('{step} of 7') "
            "&& document.activeElement.className === 'pp-tour'"
        )
        frame, card = box(shelf, ".pp-tour-frame"), box(shelf, ".pp-tour")
        framed.append((round(frame["x"]), round(frame["width"]), round(frame["height"])))
        apart = card["y"] >= frame["y"] + frame["height"] - 1 or card["y"] + card["height"] <= frame["y"] + 1
        assert apart, (step, frame, card)
        if step == 5:
            row = box(shelf, ".pp-at-row")
            assert frame["y"] <= row["y"] <= frame["y"] + frame["height"]
        for _ in range(1 if step == 1 else 2):  # over Back, where it can be pressed
            shelf.keyboard.press("Tab")
        if step < 7:
            shelf.keyboard.press("Enter")
    assert len(set(framed)) == 7
    shelf.keyboard.press("Escape")
    shelf.wait_for_selector(".pp-tour", state="hidden")
    assert shelf.locator(".pp-tour-frame").is_hidden()


def test_cost_and_quality_are_drawn_and_the_losses_come_last(shelf):
    shelf.locator('button:has-text("Cost against quality")').click()
    said = "document.querySelector('.pp-workbench').innerText"
    shelf.wait_for_function(f"() => {said}.includes('than dense (lower is better)')", timeout=120_000)
    figure = "document.querySelector('.pp-curve .js-plotly-plot')"
    shelf.wait_for_function(f"() => {figure}.data[3].x.length === 9 && {figure}.querySelectorAll('.point').length > 30")


def test_another_model_can_be_typed_for_a_and_the_panel_says_why_it_is_not_shown(shelf):
    shelf.locator('button:has-text("Pin as A")').click()
    entry = shelf.locator(".pp-ways input[type=text]")
    entry.fill("random")
    entry.press("Enter")
    shelf.wait_for_function("() => document.querySelector('.pp-ways').innerText.includes('A is not shown: random layer "
                            "and shelf-mini cut this text into different tokens')", timeout=60_000)  # fmt: skip
    shelf.locator('button:has-text("Unpin A")').click()
    driver.settle(shelf)
    entry.wait_for(state="hidden")


@pytest.fixture(scope="module")
def page(notebook):
    """With SmolLM2."""
    notebook.locator('.pp-model button:text-is("SmolLM2-135M")').click()
    notebook.wait_for_function("() => !document.querySelector('.pp-title').innerText.includes('shelf-mini')",
                               timeout=driver.READY_MS)  # fmt: skip
    driver.settle(notebook, driver.READY_MS)
    return notebook


def test_the_whole_model_is_run_at_these_settings(page, shots):
    page.locator('button:has-text("Run the whole model")').click()
    page.wait_for_function("() => document.querySelector('.pp-readout').innerText.includes('NLL (perplexity)')",
                           timeout=driver.READY_MS)  # fmt: skip
    driver.settle(page)
    page.set_viewport_size({"width": 1400, "height": 1500})
    page.wait_for_timeout(300)
    page.locator(".pp-app").screenshot(path=shots / "playground.png")
    page.set_viewport_size({"width": 1400, "height": 1060})


@pytest.mark.parametrize("name", driver.SLIDERS)
def test_a_key_on_a_slider_changes_numbers_and_pictures(page, name):
    old = driver.settle(page)
    before, readout = page.evaluate(TRACES), page.locator(".pp-readout").inner_text()
    page.focus(f".pp-knob-{name} {driver.HANDLE}")
    for _ in range(12):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("(old) => +document.querySelector('.pp-readout').dataset.request > old", arg=old)
    assert driver.settle(page) > old
    page.wait_for_timeout(200)
    assert page.locator(".pp-readout").inner_text() != readout
    assert page.evaluate(TRACES) != before
    entry = page.locator(f".pp-knob-{name} input").first
    assert entry.input_value() not in ("1", "128", "0.5")
    page.locator(f".pp-knob-{name} .pp-undo").click()
    driver.settle(page)


def test_plain_keys_in_a_panel_are_not_the_notebooks(page):
    """In command mode "a" inserts a cell and an arrow folds headings."""
    cells = page.locator(".jp-Cell").count()
    handle = page.locator(f".pp-knob-flux-alpha {driver.HANDLE}")
    for key in "aab":
        handle.press(key)
    page.wait_for_timeout(300)
    assert page.locator(".jp-Cell").count() == cells
    assert handle.get_attribute("data-lm-suppress-shortcuts") is not None
    handle.press("Control")
    assert handle.get_attribute("data-lm-suppress-shortcuts") is None


def test_a_held_key_ends_on_the_last_value(page):
    page.focus(f".pp-knob-flux-alpha {driver.HANDLE}")
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    entry = "document.querySelector('.pp-knob-flux-alpha input').value"  # comes back from the kernel, as it gets to it
    page.wait_for_function(f"() => Math.abs({entry} - 0.4) < 1e-6", timeout=30_000)
    page.wait_for_timeout(400)
    driver.settle(page)
    assert float(page.locator(".pp-knob-flux-alpha input").first.input_value()) == pytest.approx(0.4)
    page.locator('button:has-text("gates with notes")').click()
    page.wait_for_timeout(400)
    driver.settle(page)


def chosen(page) -> int:
    return int(page.locator(".pp-chosen").get_attribute("data-i"))


def axes(page) -> list[dict]:
    """Where the plots of the figure lie in the window, once it has been scrolled there."""
    page.evaluate("document.querySelector('.pp-figure').scrollIntoView({block: 'center'})")
    page.wait_for_timeout(200)
    return page.evaluate(AXES)


def follow(page, act) -> int:
    """Does `act`, waits until the pictures follow, and returns the chosen token."""
    old = driver.settle(page)
    act()
    page.wait_for_function("(old) => +document.querySelector('.pp-text').dataset.request > old", arg=old)
    driver.settle(page)
    return chosen(page)


def test_a_click_on_a_word_is_followed_by_the_figures(page):
    before = page.evaluate(TRACES)
    token = follow(page, lambda: page.locator('.pp-tok[data-i="300"]').click())
    assert token == 300
    page.wait_for_timeout(200)
    assert "(300)" in page.locator(".pp-at-row").inner_text() and "(300)" in page.locator(".pp-at-gates").inner_text()
    assert page.evaluate(TRACES) != before


def test_the_tooltip_of_a_word_explains_the_words_that_it_uses(page):
    token = page.locator('.pp-tok[data-i="300"]')
    token.hover()
    tooltip = token.get_attribute("title")
    assert tooltip.startswith("token 300 · salience") and "\n\ngate: A gate collects keys" in tooltip


def test_a_click_in_the_heat_map_is_followed_by_the_text(page):
    box = axes(page)[0]
    x, y = box["x"] + 0.5 * box["width"], box["y"] + 0.72 * box["height"]
    before = chosen(page)

    def click() -> None:
        for step in range(10):  # a busy page may be late to see where the pointer is
            page.mouse.move(x - step % 2, y)
            page.wait_for_timeout(200)
            page.mouse.click(x - step % 2, y)
            page.wait_for_timeout(400)
            if chosen(page) != before:
                return

    token = follow(page, click)
    assert abs(token - 511) < 10
    page.wait_for_function("document.querySelector('.pp-at-row').innerText.includes('in head 6')")


@pytest.mark.parametrize("panel,at,start", [(2, (0.66, 0.2), 700), (1, (0.4, 0.2), 650)], ids=["row", "prototypes"])
def test_a_click_in_the_other_figures_chooses_a_token(page, panel, at, start):
    before = follow(page, lambda: page.locator(f'.pp-tok[data-i="{start}"]').click())
    box = axes(page)[panel]

    def click() -> None:
        # Wherever the nearest point is: a few steps about the middle of the panel find one.
        for step in range(40):
            x = box["x"] + (at[0] + 0.012 * (step % 4)) * box["width"]
            y = box["y"] + (at[1] + 0.07 * (step // 4)) * box["height"]
            page.mouse.move(x, y)
            page.wait_for_timeout(120)
            if page.locator(".pp-figure .hovertext").count():
                page.mouse.click(x, y)
                page.wait_for_timeout(400)
                if chosen(page) != before:
                    return

    assert follow(page, click) != before


def test_more_controls_open_and_the_state_can_be_shared(page):
    page.locator('button:has-text("More controls")').click()
    page.wait_for_selector(".pp-drawer", state="visible")
    drawer = page.locator(".pp-drawer").inner_text()
    assert "The parts below come to" in drawer or "Dense" in drawer
    texts = page.locator(".pp-drawer input[type=text]")
    assert any("playground(state=" in texts.nth(at).input_value() for at in range(texts.count()))
    page.locator('button:has-text("More controls")').click()


def test_the_keyboard_walks_through_the_text(page):
    follow(page, lambda: page.locator('.pp-tok[data-i="500"]').click())
    assert follow(page, lambda: page.keyboard.press("ArrowRight")) == 501


def test_the_console_stayed_free_of_errors(page):
    assert page.complaints == []
