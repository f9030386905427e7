"""The notebooks on gates and on the duel in a real browser: every button pressed, pictures and numbers move.

`PROTEUS_SCREENSHOTS=docs/img` keeps the screenshots; otherwise they go to the test's own folder.
"""

from __future__ import annotations

import os
import re

import driver
import pytest
from notebook_page import traces

pytestmark = pytest.mark.slow
READY_MS = 180_000
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map((e) => e.textContent)"
RAN = f"() => {PROMPTS}.every((prompt) => /\\[\\d+\\]/.test(prompt))"
IDLE = f"""() => document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status === 'idle'
  && !{PROMPTS}.some((prompt) => prompt.includes('*'))"""

DRAWN = """([name, old, what]) => {
  const app = document.querySelector(name);
  const shown = +(app?.querySelector('.pp-readout')?.dataset.request ?? 0);
  const traces = app?.querySelector('.js-plotly-plot')?.data ?? [];
  return shown > old && app.innerText.includes(what) && !app.querySelector('.pp-busy')
    && Math.max(...traces.map((trace) => trace.meta ?? 0)) >= shown;
}"""


def opened(page, address: str, notebook: str, panel: str):
    """The panel of a notebook whose cells have all run without an error."""
    page.set_viewport_size({"width": 1400, "height": 1000})
    for _ in range(3):  # on a busy machine a kernel that has only just come up may forget what it was asked
        driver.start_all(page, address, f"notebooks/{notebook}")
        page.wait_for_function(IDLE, timeout=READY_MS)
        if page.evaluate(RAN):
            break
    page.keyboard.press("Control+b")
    assert "Traceback" not in page.locator(".jp-Notebook").inner_text()
    page.wait_for_function(DRAWN, arg=[panel, 0, ""], timeout=READY_MS)
    found = page.locator(panel).first
    found.scroll_into_view_if_needed()
    page.wait_for_timeout(400)
    return found


class Panel:
    """What is shown, and waiting until it has changed."""

    def __init__(self, page, found, name: str):
        self.page, self.found, self.name, self.traces = page, found, name, traces(name)

    def request(self) -> int:
        return int(self.found.locator(".pp-readout").first.get_attribute("data-request"))

    def press(self, words: str, what: str = "") -> None:
        self.after(lambda: self.found.locator(f'button:has-text("{words}")').first.click(), what)

    def after(self, act, what: str = "") -> None:
        """Does `act` and waits until a newer picture is shown, `what` is said and nothing is at work."""
        old = self.request()
        act()
        self.page.wait_for_function(DRAWN, arg=[self.name, old, what], timeout=30_000)
        self.page.wait_for_timeout(150)

    def drawn(self) -> str:
        return self.page.evaluate(self.traces)

    def value(self, label: str) -> str:
        label_is = self.page.locator(".pp-label", has_text=re.compile(f"^{re.escape(label)}$"))
        cell = self.found.locator(".pp-cell", has=label_is)
        return cell.locator(".pp-value").inner_text()


@pytest.fixture(scope="module")
def gates(lab):
    page, address = lab
    found = opened(page, address, "03_gates_and_prototypes.ipynb", ".pp-prototypes")
    return Panel(page, found, ".pp-prototypes")


def test_a_step_moves_prototypes_numbers_and_pictures(gates):
    before, fit = gates.drawn(), gates.value("mean cosine")
    gates.press("step ▶")
    assert gates.value("updates") == "1" and gates.value("mean cosine") != fit and gates.drawn() != before


def test_play_runs_pauses_and_resets(gates, shots):
    gates.found.locator('button:has-text("fast")').click()
    gates.press("play")
    gates.page.wait_for_function("() => +document.querySelector('.pp-prototypes .pp-value').innerText > 25",
                                 timeout=30_000)  # fmt: skip
    gates.press("pause")
    gates.page.wait_for_function("() => document.querySelector('.pp-prototypes .fa-play')")  # the kernel has it
    gates.page.wait_for_timeout(500)
    at = gates.value("updates")
    gates.page.wait_for_timeout(1000)
    assert gates.value("updates") == at
    gates.found.screenshot(path=shots / "gates.png")


@pytest.mark.parametrize(
    ("button", "said"),
    [("clone", "The layer's output did not change"), ("merge with", "was merged into"), ("prune", "was pruned"),
     ("move to head", "was moved to head"), ("add a head", "new head")],
)  # fmt: skip
def test_surgery_is_done_and_says_what_it_changed(gates, button, said):
    before = gates.drawn()
    gates.press(button, said)
    assert gates.drawn() != before and gates.value("output change") not in ("–", "")


def test_a_click_on_a_bar_follows_that_gate(gates):
    """The bar of the gate that lures most, wherever it is."""
    spot = gates.page.evaluate(
        """() => {
          const figure = document.querySelector('.pp-prototypes .js-plotly-plot');
          const bars = figure.data.find((trace) => trace.name === 'lured');
          const chosen = +document.querySelector('.pp-prototypes .pp-at-text b').innerText.match(/\\d+/)[0];
          let most = chosen === 0 ? 1 : 0;
          bars.y.forEach((count, slot) => { if (slot !== chosen && count > bars.y[most]) most = slot; });
          const { xaxis2, yaxis2 } = figure._fullLayout;
          const box = figure.getBoundingClientRect();
          return [box.x + xaxis2._offset + xaxis2.d2p(bars.x[most]), box.y + yaxis2._offset + yaxis2.d2p(1), most];
        }"""
    )
    gates.page.mouse.move(spot[0], spot[1] - 3)  # plotly looks for what is under the mouse when it has come to rest
    gates.page.wait_for_timeout(300)
    gates.after(lambda: gates.page.mouse.click(spot[0], spot[1] - 3), f"What gate {spot[2]} lures")


def test_the_decay_slider_and_reset_work(gates):
    gates.found.locator(f".pp-knob-ema-decay {driver.HANDLE}").focus()
    for _ in range(5):
        gates.page.keyboard.press("ArrowRight")
    gates.page.wait_for_function(
        "() => Math.abs(document.querySelector('.pp-knob-ema-decay input').value - 0.85) < 1e-6", timeout=10_000
    )
    gates.press("reset")
    assert gates.value("updates") == "0" and gates.value("output change") == "–"
    gates.press("the model's own")
    assert gates.page.complaints == []


# The duel


@pytest.mark.skipif("PROTEUS_SCREENSHOTS" not in os.environ, reason="two minutes of training, for a screenshot only")
def test_the_duel_of_the_notebook_ends(lab, shots):
    page, address = lab
    duel = Panel(page, opened(page, address, "02_duel.ipynb", ".pp-duel"), ".pp-duel")
    duel.found.locator('button:has-text("Start")').click()
    page.wait_for_function("() => document.querySelector('.pp-duel .pp-at-curve p').innerText.includes('(measured)')",
                           timeout=400_000)  # fmt: skip
    for _ in range(40):
        duel.found.locator(".pp-knob-flux-alpha .noUi-handle").press("ArrowLeft")
    page.wait_for_function("() => document.querySelector('.pp-duel .pp-at-curve p').innerText.startsWith('α 0.60')")
    duel.found.screenshot(path=shots / "duel.png")


TINY = "text='humble token', minutes=None, steps=24, length=64, tokens=256, width=32, layers=2, heads=4, scored=2, "
TINY += "held_out=4, sample=8)"


@pytest.fixture(scope="module")
def the_duel(lab, folder):
    """The notebook with a far smaller duel in its panel."""
    book = folder / "notebooks" / "02_duel.ipynb"
    text = book.read_text(encoding="utf-8")
    assert "minutes=4.5 if gpu else 2)" in text
    book.write_text(text.replace("minutes=4.5 if gpu else 2)", TINY), encoding="utf-8")
    page, address = lab
    return Panel(page, opened(page, address, book.name, ".pp-duel"), ".pp-duel")


def wait(panel: Panel, state: str) -> None:
    panel.page.wait_for_selector(f".pp-duel .pp-{state}", timeout=90_000)
    panel.page.wait_for_timeout(300)


def step(panel: Panel) -> int:
    return int(panel.value("step"))


def test_a_duel_starts_stops_and_resumes(the_duel):
    page, before = the_duel.page, the_duel.drawn()
    the_duel.found.locator('button:has-text("Start")').click()
    page.wait_for_function("() => +document.querySelector('.pp-duel .pp-value').innerText > 3", timeout=90_000)
    the_duel.found.locator('button:has-text("Stop")').click()
    wait(the_duel, "stopped")
    stopped = step(the_duel)
    assert 3 < stopped < 24 and the_duel.drawn() != before
    page.wait_for_timeout(800)
    assert step(the_duel) == stopped
    the_duel.found.locator('button:has-text("Resume")').click()
    wait(the_duel, "done")
    assert step(the_duel) == 24 and the_duel.found.locator(".pp-sample").count() == 3
    assert float(the_duel.value("Proteus, α = 1")) > 1
    assert "dense, perplexity" in the_duel.found.locator(".pp-at-loss").inner_text()


@pytest.fixture(scope="module")
def trained(the_duel) -> Panel:
    """The duel once it is over, also where nobody has started it, and the curve is measured."""
    if not the_duel.found.locator(".pp-done").count():
        the_duel.found.locator('button:has-text("Start")').click()
        wait(the_duel, "done")
    the_duel.page.wait_for_function(
        "() => document.querySelector('.pp-duel .pp-at-curve p').innerText.includes('(measured)')", timeout=30_000
    )
    return the_duel


def test_the_slider_moves_along_the_curve(trained):
    the_duel = trained
    before, said = the_duel.drawn(), the_duel.found.locator(".pp-at-curve p")
    words = said.inner_text()
    assert "measured" in words
    the_duel.found.locator(f".pp-knob-flux-alpha {driver.HANDLE}").focus()
    for _ in range(10):
        the_duel.page.keyboard.press("ArrowLeft")
    the_duel.page.wait_for_function(
        "() => document.querySelector('.pp-duel .pp-at-curve p').innerText.startsWith('α 0.90')", timeout=20_000
    )
    the_duel.page.wait_for_timeout(300)
    assert said.inner_text() != words and the_duel.drawn() != before
    assert the_duel.page.complaints == []
